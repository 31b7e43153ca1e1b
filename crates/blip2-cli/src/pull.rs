//! `blip2 pull`: fetch a model's parts into the cache, checked against their hashes; a model of the hub into its own.

use blip2::assets::{self, Check};
use serde_json::json;

use crate::cli::{Global, PullArgs, PullName};
use crate::progress::Progress;
use crate::{Outcome, hub, output};

pub(crate) fn run(global: &Global, args: &PullArgs) -> anyhow::Result<Outcome> {
    let mut bar = Progress::bytes();
    let mut progress = |name: &str, done, total| bar.update(name, done, total);
    let files = match &args.name {
        PullName::Mini => {
            let parts = assets::mini_parts(Check::Full, &mut progress)?;
            vec![parts.vit, parts.llm_gguf]
        }
        PullName::Minilm => {
            let parts = assets::bert_minilm(Check::Full, &mut progress)?;
            vec![parts.weights, parts.vocab]
        }
        PullName::Hub(id) => vec![hub::from_env()?.fetch(id, &mut progress)?],
    };
    drop(bar);
    for file in files {
        let file = file.to_string_lossy();
        output::line(global.format, &json!({"file": file}), &file)?;
    }
    Ok(Outcome::AllFine)
}

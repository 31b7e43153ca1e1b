//! `blip2 pull`: fetch a model's parts into the cache, checked against their hashes.

use blip2::assets::{self, Check};

use crate::Outcome;
use crate::cli::PullArgs;
use crate::progress::Progress;

pub(crate) fn run(args: &PullArgs) -> anyhow::Result<Outcome> {
    let mut bar = Progress::bytes();
    let mut progress = |name: &str, done, total| bar.update(name, done, total);
    let files = match args.name.as_str() {
        "mini" => {
            let parts = assets::mini_parts(Check::Full, &mut progress)?;
            vec![parts.vit, parts.llm_gguf]
        }
        "minilm" => {
            let parts = assets::bert_minilm(Check::Full, &mut progress)?;
            vec![parts.weights, parts.vocab]
        }
        name => anyhow::bail!("pull {name}: `mini` and `minilm` can be pulled"),
    };
    drop(bar);
    for file in files {
        println!("{}", file.display());
    }
    Ok(Outcome::AllFine)
}

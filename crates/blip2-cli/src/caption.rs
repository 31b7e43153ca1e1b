//! `blip2 caption`: say what pictures show.

use std::path::Path;

use blip2::generate::Hypothesis;
use blip2::model::Captioner;
use serde_json::{Value, json};

use crate::cli::{CaptionArgs, Global};
use crate::output::Row;
use crate::pictures::Found;
use crate::{Outcome, model};

pub(crate) fn run(global: &Global, args: &CaptionArgs) -> anyhow::Result<Outcome> {
    let options = model::generate_options(&args.generate, args.num_captions.into());
    let found = Found::new(&args.images);
    if found.is_hopeless() {
        return found.report(global.format);
    }
    let captioner = model::captioner(global)?;
    let side = captioner.vision().config().image_size;
    let prompt = args.prompt.as_deref().unwrap_or_else(|| captioner.caption_prompt());
    found.for_each_batch(&args.pictures, side, global.format, |paths, pictures| {
        let prompts = vec![prompt; pictures.len()];
        let captions = captioner.generate(pictures, &prompts, &options)?;
        paths
            .iter()
            .zip(captions)
            .map(|(path, captions)| Ok(vec![row(&captioner, path, &captions)?]))
            .collect()
    })
}

fn row(captioner: &Captioner, path: &Path, captions: &[Hypothesis]) -> anyhow::Result<Row> {
    let name = path.to_string_lossy();
    let captions: Vec<Value> =
        captions.iter().map(|caption| describe(captioner, caption)).collect::<Result<_, _>>()?;
    let texts = captions.iter().filter_map(|caption| caption["text"].as_str());
    let text = texts.map(|text| format!("{name}: {text}")).collect::<Vec<_>>().join("\n");
    Ok(Row { json: json!({"image": name, "captions": captions}), text })
}

/// One caption as the contract wants it.
pub(crate) fn describe(captioner: &Captioner, caption: &Hypothesis) -> anyhow::Result<Value> {
    Ok(json!({
        "text": captioner.text(caption)?,
        "tokens": caption.tokens,
        "score": caption.score,
    }))
}

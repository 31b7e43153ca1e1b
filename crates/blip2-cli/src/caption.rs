//! `blip2 caption`: say what pictures show.

use blip2::generate::Hypothesis;
use blip2::model::Captioner;
use serde_json::{Value, json};

use crate::cli::{CaptionArgs, GenerateArgs, Global};
use crate::{Outcome, model, output, pictures};

pub(crate) fn run(global: &Global, args: &CaptionArgs) -> anyhow::Result<Outcome> {
    let options = args.generate.options(args.num_captions)?;
    // Before the model is loaded: a mistyped path should not cost a download.
    pictures::expand(&args.images)?;
    let captioner = model::captioner(global)?;
    let prompt = args.prompt.as_deref().unwrap_or_else(|| captioner.caption_prompt());
    pictures::for_each_batch(&args.images, &args.pictures, global.format, |paths, pictures| {
        let prompts = vec![prompt; pictures.len()];
        let captions = captioner.generate(pictures, &prompts, &options)?;
        for (path, captions) in paths.iter().zip(captions) {
            let name = path.to_string_lossy();
            let rows = captions
                .iter()
                .map(|caption| describe(&captioner, caption))
                .collect::<Result<Vec<_>, _>>()?;
            let texts: Vec<&str> = rows.iter().filter_map(|row| row["text"].as_str()).collect();
            let text = match texts[..] {
                [one] => format!("{name}: {one}"),
                _ => texts
                    .iter()
                    .map(|text| format!("{name}: {text}"))
                    .collect::<Vec<_>>()
                    .join("\n"),
            };
            output::line(global.format, &json!({"image": name, "captions": rows}), &text)?;
        }
        Ok(())
    })
}

/// One caption as the contract wants it.
pub(crate) fn describe(captioner: &Captioner, caption: &Hypothesis) -> anyhow::Result<Value> {
    Ok(json!({
        "text": captioner.text(caption)?,
        "tokens": caption.tokens,
        "score": caption.score,
    }))
}

impl GenerateArgs {
    /// The search that was typed: sampling if any of its flags was given, beams otherwise.
    pub(crate) fn options(&self, num_return: u16) -> anyhow::Result<blip2::generate::Options> {
        model::generate_options(self, num_return.into())
    }
}

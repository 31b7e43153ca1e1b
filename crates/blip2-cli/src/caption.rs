//! `blip2 caption`: say what pictures show.

use std::path::Path;

use blip2::generate::{Hypothesis, Options};
use blip2::model::{Manifest, Model};
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
    let model = model::open(&global.model)?;
    if stage(&model, args)? == 1 {
        return by_first_stage(global, args, &model, &found, &options);
    }
    let captioner = model::captioner(global, &model)?;
    let side = captioner.vision().config().image_size;
    let prompt = args.prompt.as_deref().unwrap_or_else(|| captioner.caption_prompt());
    found.for_each_batch(&args.pictures, side, global.format, |paths, pictures| {
        let prompts = vec![prompt; pictures.len()];
        rows(paths, &captioner.generate(pictures, &prompts, &options)?, |c| captioner.text(c))
    })
}

/// The stage that was asked for, else the second. That the first one could write, too, is worth a hint and no more: its
/// captions are those of a model in training.
fn stage(model: &Model, args: &CaptionArgs) -> anyhow::Result<u8> {
    if let Some(stage) = args.stage {
        return Ok(stage);
    }
    let Manifest { name, stage1, stage2, .. } = &model.manifest;
    if stage2.is_none() && stage1.as_ref().is_some_and(|part| !part.config.matching_only) {
        anyhow::bail!("model {name} has no stage-2 part; its first stage captions with --stage 1");
    }
    Ok(2)
}

fn by_first_stage(
    global: &Global,
    args: &CaptionArgs,
    model: &Model,
    found: &Found,
    options: &Options,
) -> anyhow::Result<Outcome> {
    if args.prompt.is_some() {
        anyhow::bail!("--prompt: the first stage writes captions from their first word on");
    }
    let matcher = model::matcher(global, model)?;
    let side = matcher.vision().config().image_size;
    found.for_each_batch(&args.pictures, side, global.format, |paths, pictures| {
        rows(paths, &matcher.caption(pictures, options)?, |c| matcher.text(c))
    })
}

/// A row for each picture with its captions.
fn rows(
    paths: &[&Path],
    captions: &[Vec<Hypothesis>],
    text: impl Fn(&Hypothesis) -> blip2::Result<String>,
) -> anyhow::Result<Vec<Vec<Row>>> {
    let row = |(path, captions): (&&Path, &Vec<Hypothesis>)| -> anyhow::Result<Vec<Row>> {
        let name = path.to_string_lossy();
        let texts = captions.iter().map(&text).collect::<blip2::Result<Vec<_>>>()?;
        let json: Vec<Value> =
            captions.iter().zip(&texts).map(|(caption, text)| describe(text, caption)).collect();
        let lines: Vec<String> = texts.iter().map(|text| format!("{name}: {text}")).collect();
        let json = json!({"image": name, "captions": json});
        Ok(vec![Row { json, text: lines.join("\n") }])
    };
    paths.iter().zip(captions).map(row).collect()
}

/// One caption as the contract wants it.
pub(crate) fn describe(text: &str, caption: &Hypothesis) -> Value {
    json!({"text": text, "tokens": caption.tokens, "score": caption.score})
}

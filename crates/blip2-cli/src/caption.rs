//! `blip2 caption`: say what pictures show.

use std::path::Path;

use blip2::choice::{Candidates, candidates};
use blip2::generate::{Hypothesis, Options};
use blip2::model::{CaptionStage, Manifest, Model};
use serde_json::{Value, json};

use crate::cli::{CaptionArgs, Global, StageName};
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
    match stage(&model, args)? {
        CaptionStage::First => by_first_stage(global, args, &model, &found, &options),
        CaptionStage::Second => by_second_stage(global, args, &model, &found, &options),
        CaptionStage::Both => by_both(global, args, &model, &found, &options),
    }
}

/// Who was asked for, else who the model's description names. That a first stage alone could write, too, is worth a hint and
/// no more: its captions are those of a model in training. Only the second goes on from a prompt.
fn stage(model: &Model, args: &CaptionArgs) -> anyhow::Result<CaptionStage> {
    let Manifest { name, stage1, stage2, caption_stage, .. } = &model.manifest;
    let asked = args.stage.map(|stage| match stage {
        StageName::First => CaptionStage::First,
        StageName::Second => CaptionStage::Second,
        StageName::Both => CaptionStage::Both,
    });
    let stage = match (asked, &args.prompt) {
        (Some(CaptionStage::First | CaptionStage::Both), Some(_)) => {
            anyhow::bail!("--prompt: the first stage writes captions from their first word on");
        }
        (Some(asked), _) => return Ok(asked),
        (None, Some(_)) => CaptionStage::Second,
        (None, None) => *caption_stage,
    };
    if stage != CaptionStage::First
        && stage2.is_none()
        && stage1.as_ref().is_some_and(|part| !part.config.matching_only)
    {
        anyhow::bail!("model {name} has no stage-2 part; its first stage captions with --stage 1");
    }
    Ok(stage)
}

fn by_second_stage(
    global: &Global,
    args: &CaptionArgs,
    model: &Model,
    found: &Found,
    options: &Options,
) -> anyhow::Result<Outcome> {
    let captioner = model::captioner(global, model)?;
    let side = captioner.vision().config().image_size;
    let prompt = args.prompt.as_deref().unwrap_or_else(|| captioner.caption_prompt());
    found.for_each_batch(&args.pictures, side, global.format, |paths, pictures| {
        let prompts = vec![prompt; pictures.len()];
        rows(paths, &captioner.generate(pictures, &prompts, options)?, |c| captioner.text(c))
    })
}

fn by_first_stage(
    global: &Global,
    args: &CaptionArgs,
    model: &Model,
    found: &Found,
    options: &Options,
) -> anyhow::Result<Outcome> {
    let matcher = model::matcher(global, model)?;
    let side = matcher.vision().config().image_size;
    found.for_each_batch(&args.pictures, side, global.format, |paths, pictures| {
        rows(paths, &matcher.caption(pictures, options)?, |c| matcher.text(c))
    })
}

fn by_both(
    global: &Global,
    args: &CaptionArgs,
    model: &Model,
    found: &Found,
    options: &Options,
) -> anyhow::Result<Outcome> {
    let (captioner, matcher) = model::both(global, model)?;
    let side = captioner.vision().config().image_size;
    found.for_each_batch(&args.pictures, side, global.format, |paths, pictures| {
        let patches = captioner.vision().encode(pictures)?;
        let all = candidates(&captioner, &matcher, &patches, options)?;
        let each = |(path, candidates): (&&Path, Candidates)| {
            let best = candidates.best(args.num_captions.into());
            let described = best.into_iter().map(|candidate| {
                let mut json = describe(&candidate.text, &candidate.hypothesis);
                json["stage"] = candidate.stage.into();
                json["itm"] = candidate.fit.itm.into();
                json["itc"] = candidate.fit.itc.into();
                (candidate.text, json)
            });
            vec![row(path, described.collect())]
        };
        Ok(paths.iter().zip(all).map(each).collect())
    })
}

/// A row for each picture with its captions.
fn rows(
    paths: &[&Path],
    captions: &[Vec<Hypothesis>],
    text: impl Fn(&Hypothesis) -> blip2::Result<String>,
) -> anyhow::Result<Vec<Vec<Row>>> {
    let each = |(path, captions): (&&Path, &Vec<Hypothesis>)| -> anyhow::Result<Vec<Row>> {
        let described = captions.iter().map(|caption| {
            let text = text(caption)?;
            let json = describe(&text, caption);
            Ok((text, json))
        });
        Ok(vec![row(path, described.collect::<blip2::Result<_>>()?)])
    };
    paths.iter().zip(captions).map(each).collect()
}

/// One picture's captions: their texts, and what JSON says of them.
fn row(path: &Path, captions: Vec<(String, Value)>) -> Row {
    let name = path.to_string_lossy();
    let lines: Vec<String> = captions.iter().map(|(text, _)| format!("{name}: {text}")).collect();
    let json: Vec<Value> = captions.into_iter().map(|(_, json)| json).collect();
    Row { json: json!({"image": name, "captions": json}), text: lines.join("\n") }
}

/// One caption as the contract wants it.
pub(crate) fn describe(text: &str, caption: &Hypothesis) -> Value {
    json!({"text": text, "tokens": caption.tokens, "score": caption.score})
}

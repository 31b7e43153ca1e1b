//! `blip2 caption`: say what pictures show.

use std::path::Path;

use blip2::choice::{Candidate, Candidates, candidates};
use blip2::generate::{Hypothesis, Options};
use blip2::image::Rgb;
use blip2::model::{CaptionStage, Manifest, Model, Vision};
use serde_json::{Value, json};

use crate::cli::{CaptionArgs, Global, StageName};
use crate::output::Row;
use crate::pictures::Found;
use crate::{Outcome, model};

pub(crate) fn run(global: &Global, args: &CaptionArgs) -> anyhow::Result<Outcome> {
    let options = &model::generate_options(&args.generate, args.num_captions.into());
    let found = &Found::new(&args.images);
    if found.is_hopeless() {
        return found.report(global.format);
    }
    let model = &model::open(&global.model)?;
    let call = Call { global, args, model, found, options };
    match stage(model, args)? {
        CaptionStage::First => call.by_first_stage(),
        CaptionStage::Second => call.by_second_stage(),
        CaptionStage::Both => call.by_both(),
    }
}

/// Who was asked for, else who the model's description names. That a first stage alone could write, too, is worth a hint and
/// no more: its captions are those of a model in training. Only the second goes on from a prompt.
fn stage(model: &Model, args: &CaptionArgs) -> anyhow::Result<CaptionStage> {
    let Manifest { name, stage2, caption_stage, .. } = &model.manifest;
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
    if stage != CaptionStage::First && stage2.is_none() && model.manifest.first_stage_writes() {
        anyhow::bail!("model {name} has no stage-2 part; its first stage captions with --stage 1");
    }
    Ok(stage)
}

/// What was asked of which model, about which pictures.
struct Call<'a> {
    global: &'a Global,
    args: &'a CaptionArgs,
    model: &'a Model,
    found: &'a Found,
    options: &'a Options,
}

impl Call<'_> {
    fn by_second_stage(&self) -> anyhow::Result<Outcome> {
        let captioner = model::captioner(self.global, self.model)?;
        let prompt = self.args.prompt.as_deref().unwrap_or_else(|| captioner.caption_prompt());
        let bytes = captioner.picture_bytes(prompt, self.options);
        self.for_each_batch(captioner.vision(), bytes, |paths, pictures| {
            let prompts = vec![prompt; pictures.len()];
            let captions = captioner.generate(pictures, &prompts, self.options)?;
            rows(paths, &captions, |c| captioner.text(c))
        })
    }

    fn by_first_stage(&self) -> anyhow::Result<Outcome> {
        let matcher = model::matcher(self.global, self.model)?;
        let bytes = matcher.caption_bytes(self.options);
        self.for_each_batch(matcher.vision(), bytes, |paths, pictures| {
            rows(paths, &matcher.caption(pictures, self.options)?, |c| matcher.text(c))
        })
    }

    fn by_both(&self) -> anyhow::Result<Outcome> {
        let (captioner, matcher) = model::both(self.global, self.model)?;
        let prompt = captioner.caption_prompt();
        let bytes =
            captioner.picture_bytes(prompt, self.options) + matcher.caption_bytes(self.options);
        self.for_each_batch(captioner.vision(), bytes, |paths, pictures| {
            let patches = captioner.vision().encode(pictures)?;
            let all = candidates(&captioner, &matcher, &patches, self.options)?;
            let each = |(path, candidates): (&&Path, Candidates)| {
                let best = candidates.best(self.args.num_captions.into());
                vec![row(path, best.into_iter().map(described).collect())]
            };
            Ok(paths.iter().zip(all).map(each).collect())
        })
    }

    fn for_each_batch(
        &self,
        vision: &Vision,
        bytes: usize,
        work: impl FnMut(&[&Path], &[Rgb]) -> anyhow::Result<Vec<Vec<Row>>>,
    ) -> anyhow::Result<Outcome> {
        let side = vision.config().image_size;
        self.found.for_each_batch(&self.args.pictures, side, bytes, self.global.format, work)
    }
}

/// A chosen caption: its text, and what JSON says of it.
fn described(candidate: Candidate) -> (String, Value) {
    let mut json = describe(&candidate.text, &candidate.hypothesis);
    json["stage"] = candidate.stage.into();
    json["itm"] = candidate.fit.itm.into();
    json["itc"] = candidate.fit.itc.into();
    json["rank"] = candidate.rank().into();
    (candidate.text, json)
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

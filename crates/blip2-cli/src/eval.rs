//! `blip2 eval`: measure a model on held-out pictures, beside two baselines.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use blip2_train::evaluate::{EvalFile, Subject, evaluate};

use crate::cli::{EvalArgs, Global};
use crate::progress::{Progress, say};
use crate::{Outcome, model, output, train};

pub(crate) fn run(global: &Global, args: &EvalArgs) -> anyhow::Result<Outcome> {
    let file = EvalFile::read(&args.recipe, &args.set)?;
    train::build_data(&file.data.dir, file.data.build)?;
    let description = model::open(&global.model)?;
    let (captioner, matcher) = match description.manifest.stage1 {
        Some(_) => {
            let (captioner, matcher) = model::both(global, &description)?;
            (captioner, Some(matcher))
        }
        None => (model::captioner(global, &description)?, None),
    };
    let subject = Subject {
        name: &description.manifest.name,
        hash: description.hash()?,
        vision_key: blip2_train::parts::vision_key(&description)?,
        caption_stage: description.manifest.caption_stage,
        captioner: &captioner,
        matcher: matcher.as_ref(),
    };
    let mut bar = Progress::pictures();
    let report = evaluate(&subject, &file, &mut |what, done, total| bar.update(what, done, total))?;
    drop(bar);

    std::fs::create_dir_all(&file.out).with_context(|| file.out.display().to_string())?;
    let text = report.to_text();
    write(&file.out, "report.txt", &text)?;
    write(&file.out, "report.json", &report.to_json()?)?;
    let page = write(&file.out, "report.html", &report.to_html())?;
    output::line(global.format, &serde_json::to_value(&report)?, &text)?;
    say(&page.display().to_string());
    Ok(Outcome::AllFine)
}

fn write(folder: &Path, name: &str, text: &str) -> anyhow::Result<PathBuf> {
    let path = folder.join(name);
    blip2_train::checkpoint::write_atomic(&path, text.as_bytes())?;
    Ok(path)
}

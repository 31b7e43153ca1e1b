//! `blip2 eval`: measure a model on held-out pictures, beside two baselines.

use anyhow::Context as _;
use blip2_train::evaluate::{EvalFile, Subject, evaluate};

use crate::cli::{EvalArgs, Global};
use crate::progress::Progress;
use crate::{Outcome, model, train};

pub(crate) fn run(global: &Global, args: &EvalArgs) -> anyhow::Result<Outcome> {
    let file = EvalFile::read(&args.recipe, &args.set)?;
    train::build_data(&file.data.dir, file.data.build)?;
    let description = model::open(&global.model)?;
    let captioner = model::captioner(global)?;
    let matcher = match description.manifest.stage1 {
        Some(_) if file.retrieval.pairs > 0 => Some(model::matcher(global)?),
        _ => None,
    };
    let subject = Subject {
        name: &description.manifest.name,
        hash: description.hash()?,
        vision_key: blip2_train::parts::vision_key(&description)?,
        captioner: &captioner,
        matcher: matcher.as_ref(),
    };
    let mut bar = Progress::pictures();
    let report = evaluate(&subject, &file, &mut |what, done, total| bar.update(what, done, total))?;
    drop(bar);

    let write = |name: &str, text: &str| {
        let path = file.out.join(name);
        blip2_train::checkpoint::write_atomic(&path, text.as_bytes())?;
        anyhow::Ok(path)
    };
    std::fs::create_dir_all(&file.out).with_context(|| file.out.display().to_string())?;
    let text = report.to_text();
    write("report.txt", &text)?;
    write("report.json", &report.to_json()?)?;
    let page = write("report.html", &report.to_html())?;
    println!("{text}");
    eprintln!("{}", page.display());
    Ok(Outcome::AllFine)
}

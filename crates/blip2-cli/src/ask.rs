//! `blip2 ask`: answer a question about a picture.

use anyhow::Context as _;
use serde_json::json;

use crate::cli::{AskArgs, Global};
use crate::{Outcome, caption, model, output, pictures};

pub(crate) fn run(global: &Global, args: &AskArgs) -> anyhow::Result<Outcome> {
    let options = args.generate.options(1)?;
    let history =
        args.history.iter().map(|turn| turn_of(turn)).collect::<anyhow::Result<Vec<_>>>()?;
    let captioner = model::captioner(global)?;
    let prompt = captioner.question_prompt(&history, &args.question);
    let images = std::slice::from_ref(&args.image);
    pictures::for_each_batch(images, &args.pictures, global.format, |paths, pictures| {
        let prompts = vec![prompt.as_str(); pictures.len()];
        for (path, answers) in paths.iter().zip(captioner.generate(pictures, &prompts, &options)?) {
            let best = answers.first().context("the search found no answer")?;
            let row = caption::describe(&captioner, best)?;
            let text = row["text"].as_str().unwrap_or_default().to_owned();
            let json = json!({
                "image": path.to_string_lossy(),
                "question": args.question,
                "answer": row["text"],
                "tokens": row["tokens"],
                "score": row["score"],
            });
            output::line(global.format, &json, &text)?;
        }
        Ok(())
    })
}

fn turn_of(turn: &str) -> anyhow::Result<(&str, &str)> {
    turn.split_once('=').with_context(|| format!("--history {turn:?}: expected 'question=answer'"))
}

//! `blip2 ask`: answer a question about a picture.

use std::path::Path;

use anyhow::Context as _;
use blip2::generate::Hypothesis;
use blip2::model::Captioner;
use serde_json::json;

use crate::cli::{AskArgs, Global};
use crate::output::Row;
use crate::pictures::Found;
use crate::{Outcome, caption, model};

pub(crate) fn run(global: &Global, args: &AskArgs) -> anyhow::Result<Outcome> {
    let options = model::generate_options(&args.generate, 1);
    let found = Found::new(std::slice::from_ref(&args.image));
    if found.is_hopeless() {
        return found.report(global.format);
    }
    let captioner = model::captioner(global, &model::open(&global.model)?)?;
    let side = captioner.vision().config().image_size;
    let history: Vec<(&str, &str)> =
        args.history.iter().map(|turn| (turn.question.as_str(), turn.answer.as_str())).collect();
    let prompt = captioner.question_prompt(&history, &args.question);
    let bytes = captioner.picture_bytes(&prompt, &options);
    found.for_each_batch(&args.pictures, side, bytes, global.format, |paths, pictures| {
        let prompts = vec![prompt.as_str(); pictures.len()];
        let questions = vec![args.question.as_str(); pictures.len()];
        let answers = captioner.answer(pictures, &questions, &prompts, &options)?;
        paths
            .iter()
            .zip(answers)
            .map(|(path, answers)| Ok(vec![row(&captioner, path, &args.question, &answers)?]))
            .collect()
    })
}

fn row(
    captioner: &Captioner,
    path: &Path,
    question: &str,
    answers: &[Hypothesis],
) -> anyhow::Result<Row> {
    let best = answers.first().context("the search found no answer")?;
    let text = captioner.text(best)?;
    let answer = caption::describe(&text, best);
    let json = json!({
        "image": path.to_string_lossy(),
        "question": question,
        "answer": answer["text"],
        "tokens": answer["tokens"],
        "score": answer["score"],
    });
    Ok(Row { json, text })
}

//! `blip2 match`: how well texts fit pictures.

use std::path::Path;

use blip2::model::Score;
use serde_json::json;

use crate::cli::{Global, MatchArgs};
use crate::output::Row;
use crate::pictures::Found;
use crate::{Outcome, model, texts};

pub(crate) fn run(global: &Global, args: &MatchArgs) -> anyhow::Result<Outcome> {
    let found = Found::new(&args.images);
    if found.is_hopeless() {
        return found.report(global.format);
    }
    let model = model::open(&global.model)?;
    let texts = texts::prepare(&model, &args.text)?;
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let matcher = model::matcher(global, &model)?;
    let side = matcher.vision().config().image_size;
    let bytes = matcher.picture_bytes();
    found.for_each_batch(&args.pictures, side, bytes, global.format, |paths, pictures| {
        let scores = matcher.score(pictures, &texts)?;
        Ok(paths.iter().zip(scores).map(|(path, scores)| rows(path, &args.text, scores)).collect())
    })
}

/// A row for each text, as it was typed.
fn rows(path: &Path, texts: &[String], scores: Vec<Score>) -> Vec<Row> {
    let image = path.to_string_lossy();
    let row = |(text, score): (&String, Score)| Row {
        json: json!({"image": image, "text": text, "itm": score.itm, "itc": score.itc}),
        text: format!("{image}: itm {:.4} itc {:+.4} {text}", score.itm, score.itc),
    };
    texts.iter().zip(scores).map(row).collect()
}

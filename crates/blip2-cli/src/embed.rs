//! `blip2 embed`: pictures and texts as vectors of the common space, normalised.

use std::path::Path;

use serde_json::json;

use crate::cli::{EmbedArgs, Global};
use crate::output::{self, Row};
use crate::pictures::Found;
use crate::{Outcome, model, texts};

pub(crate) fn run(global: &Global, args: &EmbedArgs) -> anyhow::Result<Outcome> {
    let found = Found::new(&args.image);
    if args.text.is_empty() && found.is_hopeless() {
        return found.report(global.format);
    }
    let texts = texts::prepare(&model::open(&global.model)?, &args.text)?;
    let matcher = model::matcher(global)?;
    for (typed, text) in args.text.iter().zip(&texts) {
        let embedding = matcher.embed_texts(&[text])?.to_vec2::<f32>()?.swap_remove(0);
        let people = format!("{typed}: {}", numbers(&embedding));
        output::line(global.format, &json!({"text": typed, "embedding": embedding}), &people)?;
    }
    let side = matcher.vision().config().image_size;
    found.for_each_batch(&args.pictures, side, global.format, |paths, pictures| {
        let embeddings = matcher.embed_images(pictures)?.to_vec3::<f32>()?;
        Ok(paths.iter().zip(embeddings).map(|(path, each)| vec![row(path, &each)]).collect())
    })
}

/// A picture's vectors, one a query.
fn row(path: &Path, queries: &[Vec<f32>]) -> Row {
    let image = path.to_string_lossy();
    let text = queries
        .iter()
        .enumerate()
        .map(|(i, query)| format!("{image} query {i}: {}", numbers(query)))
        .collect::<Vec<_>>()
        .join("\n");
    Row { json: json!({"image": image, "embedding": queries}), text }
}

fn numbers(values: &[f32]) -> String {
    values.iter().map(|v| format!("{v:+.4}")).collect::<Vec<_>>().join(" ")
}

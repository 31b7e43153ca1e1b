//! `blip2 embed`: pictures and texts as vectors of the common space, normalised.

use serde_json::json;

use crate::cli::{EmbedArgs, Global};
use crate::{Outcome, model, output, pictures};

pub(crate) fn run(global: &Global, args: &EmbedArgs) -> anyhow::Result<Outcome> {
    if !args.image.is_empty() {
        pictures::expand(&args.image)?;
    }
    let matcher = model::matcher(global)?;
    for text in &args.text {
        let embedding = matcher.embed_texts(&[text])?.to_vec2::<f32>()?.swap_remove(0);
        let people = format!("{text}: {}", numbers(&embedding));
        output::line(global.format, &json!({"text": text, "embedding": embedding}), &people)?;
    }
    if args.image.is_empty() {
        return Ok(Outcome::AllFine);
    }
    pictures::for_each_batch(&args.image, &args.pictures, global.format, |paths, pictures| {
        let embeddings = matcher.embed_images(pictures)?.to_vec3::<f32>()?;
        for (path, queries) in paths.iter().zip(embeddings) {
            let image = path.to_string_lossy();
            let people = queries
                .iter()
                .enumerate()
                .map(|(i, q)| format!("{image} query {i}: {}", numbers(q)));
            let people = people.collect::<Vec<_>>().join("\n");
            output::line(global.format, &json!({"image": image, "embedding": queries}), &people)?;
        }
        Ok(())
    })
}

fn numbers(values: &[f32]) -> String {
    values.iter().map(|v| format!("{v:+.4}")).collect::<Vec<_>>().join(" ")
}

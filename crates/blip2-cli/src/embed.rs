//! `blip2 embed`: pictures and texts as vectors, of the common space or before it.

use std::path::Path;

use blip2::model::Matcher;
use serde_json::json;

use crate::cli::{EmbedArgs, FeaturesName, Global};
use crate::output::{self, Row};
use crate::pictures::Found;
use crate::{Outcome, model, texts};

pub(crate) fn run(global: &Global, args: &EmbedArgs) -> anyhow::Result<Outcome> {
    let found = Found::new(&args.image);
    if args.features == FeaturesName::Multimodal && (args.text.is_empty() || args.image.is_empty())
    {
        anyhow::bail!("--features multimodal wants --image and --text");
    }
    if args.text.is_empty() && found.is_hopeless() {
        return found.report(global.format);
    }
    let model = model::open(&global.model)?;
    let texts = texts::prepare(&model, &args.text)?;
    let matcher = model::matcher(global, &model)?;
    let side = matcher.vision().config().image_size;
    let (bytes, format) = (matcher.picture_bytes(), global.format);
    if args.features == FeaturesName::Multimodal {
        return found.for_each_batch(&args.pictures, side, bytes, format, |paths, pictures| {
            let mut rows: Vec<Vec<Row>> = paths.iter().map(|_| Vec::new()).collect();
            for (typed, text) in args.text.iter().zip(&texts) {
                let features = matcher.multimodal_features(pictures, text)?.to_vec3::<f32>()?;
                for ((rows, path), each) in rows.iter_mut().zip(paths).zip(features) {
                    rows.push(row(path, Some(typed), &each));
                }
            }
            Ok(rows)
        });
    }
    for (typed, text) in args.text.iter().zip(&texts) {
        let Row { json, text } = text_row(&matcher, args.features, typed, text)?;
        output::line(global.format, &json, &text)?;
    }
    found.for_each_batch(&args.pictures, side, bytes, format, |paths, pictures| {
        let features = match args.features {
            FeaturesName::Hidden => matcher.image_features(pictures)?,
            _ => matcher.embed_images(pictures)?,
        };
        let features = features.to_vec3::<f32>()?;
        Ok(paths.iter().zip(features).map(|(path, each)| vec![row(path, None, &each)]).collect())
    })
}

fn text_row(
    matcher: &Matcher,
    features: FeaturesName,
    typed: &str,
    text: &str,
) -> anyhow::Result<Row> {
    if features == FeaturesName::Hidden {
        let tokens = matcher.text_features(text)?.to_vec2::<f32>()?;
        let lines =
            tokens.iter().enumerate().map(|(i, t)| format!("{typed} token {i}: {}", numbers(t)));
        let text = lines.collect::<Vec<_>>().join("\n");
        return Ok(Row { json: json!({"text": typed, "embedding": tokens}), text });
    }
    let embedding = matcher.embed_texts(&[text])?.to_vec2::<f32>()?.swap_remove(0);
    let text = format!("{typed}: {}", numbers(&embedding));
    Ok(Row { json: json!({"text": typed, "embedding": embedding}), text })
}

/// A picture's vectors, one a query; with a text that was looked at with it.
fn row(path: &Path, with: Option<&str>, queries: &[Vec<f32>]) -> Row {
    let image = path.to_string_lossy();
    let name = with.map_or(image.to_string(), |text| format!("{image} with {text}"));
    let text = queries
        .iter()
        .enumerate()
        .map(|(i, query)| format!("{name} query {i}: {}", numbers(query)))
        .collect::<Vec<_>>()
        .join("\n");
    let json = match with {
        Some(with) => json!({"image": image, "text": with, "embedding": queries}),
        None => json!({"image": image, "embedding": queries}),
    };
    Row { json, text }
}

fn numbers(values: &[f32]) -> String {
    values.iter().map(|v| format!("{v:+.4}")).collect::<Vec<_>>().join(" ")
}

//! `blip2 match`: how well do texts fit pictures?

use serde_json::json;

use crate::cli::{Global, MatchArgs};
use crate::{Outcome, model, output, pictures};

pub(crate) fn run(global: &Global, args: &MatchArgs) -> anyhow::Result<Outcome> {
    pictures::expand(&args.images)?;
    let matcher = model::matcher(global)?;
    let texts: Vec<&str> = args.text.iter().map(String::as_str).collect();
    pictures::for_each_batch(&args.images, &args.pictures, global.format, |paths, pictures| {
        for (path, scores) in paths.iter().zip(matcher.score(pictures, &texts)?) {
            for (text, score) in texts.iter().zip(scores) {
                let image = path.to_string_lossy();
                let json =
                    json!({"image": image, "text": text, "itm": score.itm, "itc": score.itc});
                let line = format!("{image}: itm {:.4} itc {:+.4} {text}", score.itm, score.itc);
                output::line(global.format, &json, &line)?;
            }
        }
        Ok(())
    })
}

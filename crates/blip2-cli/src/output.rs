//! Results on standard output: whole lines, flushed one by one, so that a stop leaves nothing half-written.

use std::io::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use crate::cli::Format;
use crate::progress::say;

/// One result.
pub(crate) struct Row {
    /// For programs.
    pub(crate) json: Value,
    /// For people; may be several lines.
    pub(crate) text: String,
}

/// Writes one result: the JSON object on its line, or the text for people.
pub(crate) fn line(format: Format, json: &Value, text: &str) -> anyhow::Result<()> {
    let mut line = match format {
        Format::Jsonl => json.to_string(),
        Format::Text => text.to_owned(),
    };
    line.push('\n');
    let mut out = std::io::stdout().lock();
    out.write_all(line.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Reports a picture that can't be used: its own line in JSON, standard error otherwise.
pub(crate) fn failure(format: Format, image: &Path, reason: &str) -> anyhow::Result<()> {
    match format {
        Format::Jsonl => {
            line(format, &json!({"image": image.to_string_lossy(), "error": reason}), "")
        }
        Format::Text => {
            say(&format!("blip2: {reason}"));
            Ok(())
        }
    }
}

/// Whether the reader of our output went away (`blip2 … | head`), which is no failure.
pub(crate) fn is_closed_pipe(err: &anyhow::Error) -> bool {
    err.downcast_ref::<std::io::Error>()
        .is_some_and(|err| err.kind() == std::io::ErrorKind::BrokenPipe)
}

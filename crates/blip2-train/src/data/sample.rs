//! One sample: a picture, still encoded, and the JSON beside it.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// A question about the picture and its answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuestionAnswer {
    /// Plain English, lower case, with its question mark.
    pub question: String,
    /// As short as a person would answer.
    pub answer: String,
}

/// `KEY.json` of a sample.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// The caption: a lower-case phrase or sentence.
    pub caption: String,
    /// Every caption of the picture, the plain one first; may be empty (then only `caption`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub captions: Vec<String>,
    /// Questions with answers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub qa: Vec<QuestionAnswer>,
    /// What the picture shows; pictures of one concept are all in one split.
    #[serde(default)]
    pub concept: String,
    /// The package the picture comes from, or `scene` or `shapes`.
    #[serde(default)]
    pub source: String,
    /// The licence of the picture.
    #[serde(default)]
    pub licence: String,
    /// Groups captions of one picture (ITC targets); the sample's own key when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_id: Option<u64>,
    /// The head noun of the caption, e.g. `tiger` of "a sumatran tiger".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub noun: Option<String>,
    /// May the picture be mirrored? False where the caption says left or right.
    #[serde(default = "yes")]
    pub flip: bool,
}

fn yes() -> bool {
    true
}

/// A picture with its captions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Unique within a data set; letters, digits, `-`, `_`, `/`.
    pub key: String,
    /// How the picture is named in the shard: `jpg`, `png`, `webp`…
    pub extension: String,
    /// The picture as a file holds it.
    pub image: Vec<u8>,
    /// Captions and the rest.
    pub meta: Meta,
}

impl Meta {
    /// Reads `KEY.json`.
    ///
    /// # Errors
    /// Not JSON, no `caption`, or an empty one.
    pub fn parse(json: &[u8]) -> Result<Self> {
        let meta: Self =
            serde_json::from_slice(json).map_err(|e| Error::Data(format!("json: {e}")))?;
        if meta.caption.trim().is_empty() {
            return Err(Error::Data("json: `caption` is empty".into()));
        }
        Ok(meta)
    }

    /// All captions, at least one.
    pub fn all_captions(&self) -> Vec<&str> {
        if self.captions.is_empty() {
            vec![self.caption.as_str()]
        } else {
            self.captions.iter().map(String::as_str).collect()
        }
    }
}

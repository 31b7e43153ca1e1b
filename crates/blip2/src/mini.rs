//! The default model: a true BLIP-2 of small pretrained parts whose bridge is trained by this program.
//!
//! ViT-S/14 → Q-Former (MiniLM's shape) → SmolLM2-135M. The frozen parts are fetched; the bridge will be carried inside the
//! program ([`crate::model::Files::Builtin`]) once its full recipes have run. State of the work: `models/mini/README.md`.

use crate::model::Model;
use crate::{Error, Result};

/// The mini model.
///
/// # Errors
/// In this version always: its bridge is not trained yet. The message says how to train one.
pub fn model() -> Result<Model> {
    Err(Error::Config(
        "this version carries no trained bridge for mini yet; `blip2 train recipes/mini_stage1.toml` and then \
         mini_stage2.toml make one (hours), `blip2 train recipes/tiny_cpu.toml` a toy (minutes); use it with \
         --model runs/NAME/model"
            .into(),
    ))
}

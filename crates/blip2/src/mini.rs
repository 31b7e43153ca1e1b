//! The default model: a BLIP-2 of small pretrained parts, its bridge trained by this program and carried inside it.
//!
//! ViT-S/14 → Q-Former (MiniLM's shape) → SmolLM2-135M. Data, training and results: `models/mini/README.md`.

use crate::Result;
use crate::model::{Files, Model};

const FILES: &[(&str, &[u8])] = &[
    ("model.json", include_bytes!("../../../models/mini/model.json")),
    ("stage1.gguf", include_bytes!("../../../models/mini/stage1.gguf")),
    ("stage2.gguf", include_bytes!("../../../models/mini/stage2.gguf")),
    ("vocab.txt", include_bytes!("../../../models/mini/vocab.txt")),
];

/// The mini model. Its frozen parts are fetched into the cache when they are first loaded.
///
/// # Errors
/// Never for an intact program; the type is that of any other model.
pub fn model() -> Result<Model> {
    Model::open(Files::Builtin(FILES))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::CaptionStage;

    /// What a training run writes does not say so: it is easily lost when mini is packed anew.
    #[test]
    fn mini_chooses_from_both_stages() {
        assert_eq!(model().unwrap().manifest.caption_stage, CaptionStage::Both);
    }
}

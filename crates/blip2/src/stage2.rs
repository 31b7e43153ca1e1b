//! Stage 2: the queries become soft words in front of a frozen language model (paper §3.3).
//!
//! The trained part only: `ln_vision`, the query side of the Q-Former, and one fully connected layer into the language
//! model's width. It knows no language model; [`crate::model`] and the trainer put the two together.
//! Shapes: b batch, p picture tokens, q queries, l language-model width.

use blip2_ops::Dropout;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::nn::{LayerNorm, Linear};
use crate::params::Params;
use crate::qformer::{QFormer, QFormerConfig, TextBranch};

/// The shape of the stage-2 bridge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage2Config {
    /// The Q-Former, without its text branch.
    pub qformer: QFormerConfig,
    /// Features per token of the language model.
    pub llm_width: usize,
    /// Epsilon of `ln_vision`: 1e-5 in LAVIS, 1e-6 in Hugging Face files.
    pub ln_vision_eps: f64,
    /// Whether the queries read the question as well, and look for what it asks for (paper §4.3, fine-tuning on VQA).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub reads_questions: bool,
}

/// The bridge of stage 2.
pub struct Stage2 {
    config: Stage2Config,
    ln_vision: LayerNorm,
    qformer: QFormer,
    llm_proj: Linear,
}

impl Stage2 {
    /// Reads the weights.
    ///
    /// # Errors
    /// If the configuration makes no sense; weights that don't fit are reported by [`Params::build`].
    pub fn new(params: &Params, config: &Stage2Config) -> Result<Self> {
        let q = &config.qformer;
        Ok(Self {
            ln_vision: params.pp("ln_vision").layer_norm(q.encoder_width, config.ln_vision_eps)?,
            qformer: QFormer::new(
                params,
                q,
                if config.reads_questions { TextBranch::Guides } else { TextBranch::Absent },
            )?,
            llm_proj: params.pp("llm_proj").linear(q.width, config.llm_width, true)?,
            config: config.clone(),
        })
    }

    /// The shape this bridge was built with.
    #[must_use]
    pub fn config(&self) -> &Stage2Config {
        &self.config
    }

    /// Image-encoder output (b, p, encoder width) → soft words (b, q, l).
    ///
    /// # Errors
    /// If the width is another.
    pub fn soft_words(&self, patches: &Tensor, dropout: &Dropout) -> Result<Tensor> {
        let picture = self.qformer.picture(patches, &self.ln_vision)?;
        let (queries, _) = self.qformer.queries(&picture, dropout)?;
        self.llm_proj.forward(&queries)
    }

    /// [`Self::soft_words`] for questions: row i looks at picture `pictures[i]` with the text `ids` (t, n), of which `tokens`
    /// (t, n) u8 says what is no padding → (t, q, l).
    ///
    /// # Errors
    /// If this bridge reads no questions, or shapes don't fit.
    pub fn soft_words_asked(
        &self,
        patches: &Tensor,
        pictures: &[u32],
        (ids, tokens): (&Tensor, &Tensor),
        dropout: &Dropout,
    ) -> Result<Tensor> {
        let picture = self.qformer.picture(patches, &self.ln_vision)?;
        let queries = self.qformer.pair(&picture.select(pictures)?, ids, tokens, dropout)?;
        self.llm_proj.forward(&queries)
    }
}

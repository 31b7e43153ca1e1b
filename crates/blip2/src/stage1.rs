//! Stage 1: the Q-Former learns which pictures and texts belong together (paper §3.2).
//!
//! `ln_vision`, the Q-Former and three heads: projections to a common space (ITC), matched or not (ITM), and the
//! language-model head (ITG). Features in, features out: the losses are `blip2_train::losses`.
//! Shapes: b batch, p picture tokens, q queries, t text tokens, e common space.

use blip2_ops::{Dropout, l2_normalize};
use candle_core::{D, DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::generate::StepModel;
use crate::nn::{KvCache, LayerNorm, Linear};
use crate::params::Params;
use crate::qformer::{Picture, QFormer, QFormerConfig, TextBranch};
use crate::{Error, Result};

/// The shape of the stage-1 model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage1Config {
    /// The bridge.
    pub qformer: QFormerConfig,
    /// Features of the common space of pictures and texts.
    pub embed_dim: usize,
    /// Epsilon of `ln_vision`: 1e-5 in LAVIS, 1e-6 in Hugging Face files.
    pub ln_vision_eps: f64,
    /// Whether the language-model head and the temperature are missing: Hugging Face's checkpoints drop them. Such a model
    /// matches and embeds, but can't be trained on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub matching_only: bool,
}

/// A picture as stage 1 sees it.
#[derive(Clone)]
pub struct ImageFeatures {
    /// The picture's keys and values, for further passes.
    pub picture: Picture,
    /// The queries' output (b, q, w).
    pub queries: Tensor,
    /// Projected and normalised (b, q, e).
    pub embeds: Tensor,
    /// The queries' self-attention keys and values, which ITG continues.
    pub caches: Vec<KvCache>,
}

/// The stage-1 model without its image encoder.
#[derive(Clone)]
pub struct Stage1 {
    config: Stage1Config,
    ln_vision: LayerNorm,
    qformer: QFormer,
    vision_proj: Linear,
    text_proj: Linear,
    itm_head: Linear,
    temp: Option<Tensor>,
}

impl Stage1 {
    /// Reads the weights.
    ///
    /// # Errors
    /// If the configuration makes no sense; weights that don't fit are reported by [`Params::build`].
    pub fn new(params: &Params, config: &Stage1Config) -> Result<Self> {
        let w = config.qformer.width;
        Ok(Self {
            ln_vision: params
                .pp("ln_vision")
                .layer_norm(config.qformer.encoder_width, config.ln_vision_eps)?,
            qformer: QFormer::new(
                params,
                &config.qformer,
                if config.matching_only { TextBranch::Reads } else { TextBranch::Whole },
            )?,
            vision_proj: params.pp("vision_proj").linear(w, config.embed_dim, true)?,
            text_proj: params.pp("text_proj").linear(w, config.embed_dim, true)?,
            itm_head: params.pp("itm_head").linear(w, 2, true)?,
            temp: (!config.matching_only).then(|| params.tensor("temp", &[])).transpose()?,
            config: config.clone(),
        })
    }

    /// The shape this model was built with.
    #[must_use]
    pub fn config(&self) -> &Stage1Config {
        &self.config
    }

    /// The learned temperature, a scalar that divides similarities.
    ///
    /// # Errors
    /// If this model's checkpoint has none.
    pub fn temp(&self) -> Result<&Tensor> {
        self.temp.as_ref().ok_or_else(|| {
            Error::Config(
                "this stage-1 model has no temperature: its checkpoint only matches".into(),
            )
        })
    }

    /// The bridge itself.
    #[must_use]
    pub fn qformer(&self) -> &QFormer {
        &self.qformer
    }

    /// This model with [`QFormer::with_words`].
    ///
    /// # Errors
    /// As there.
    pub fn with_words(&self, ids: &Tensor) -> Result<Self> {
        Ok(Self { qformer: self.qformer.with_words(ids)?, ..self.clone() })
    }

    /// Image-encoder output (b, p, encoder width) → everything stage 1 wants of a picture.
    ///
    /// # Errors
    /// If the width is another.
    pub fn image(&self, patches: &Tensor, dropout: &Dropout) -> Result<ImageFeatures> {
        let picture = self.qformer.picture(patches, &self.ln_vision)?;
        let (queries, caches) = self.qformer.queries(&picture, dropout)?;
        let embeds = l2_normalize(&self.vision_proj.forward(&queries)?)?;
        Ok(ImageFeatures { picture, queries, embeds, caches })
    }

    /// Texts `ids` (b, t) starting with `[CLS]`, `tokens` (b, t) u8 → projected and normalised (b, e).
    ///
    /// # Errors
    /// If the text is too long.
    pub fn text(&self, ids: &Tensor, tokens: &Tensor, dropout: &Dropout) -> Result<Tensor> {
        let hidden = self.qformer.text(ids, tokens, dropout)?;
        let cls = hidden.narrow(1, 0, 1)?.squeeze(1)?;
        Ok(l2_normalize(&self.text_proj.forward(&cls)?)?)
    }

    /// Picture i with text i → logits (b, 2), not matched and matched, averaged over the queries.
    ///
    /// # Errors
    /// If shapes don't fit.
    pub fn itm(
        &self,
        picture: &Picture,
        ids: &Tensor,
        tokens: &Tensor,
        dropout: &Dropout,
    ) -> Result<Tensor> {
        let queries = self.qformer.pair(picture, ids, tokens, dropout)?;
        Ok(self.itm_head.forward(&queries)?.mean(1)?)
    }

    /// Texts starting with `[DEC]` behind the cached queries → hidden states (b, t, w) for [`QFormer::lm_logits`].
    ///
    /// # Errors
    /// If shapes don't fit.
    pub fn itg(
        &self,
        caches: &[KvCache],
        ids: &Tensor,
        tokens: &Tensor,
        dropout: &Dropout,
    ) -> Result<Tensor> {
        self.qformer.continue_text(ids, tokens, &mut caches.to_vec(), dropout)
    }
}

/// Captions by the first stage alone (ITG): its own head goes on from `[DEC]`, behind the cached queries.
pub struct ItgDecoder<'a> {
    model: &'a Stage1,
    caches: Vec<KvCache>,
    rows: usize,
    start: [u32; 1],
}

impl<'a> ItgDecoder<'a> {
    /// Goes on from `image`, of any number of pictures.
    ///
    /// # Errors
    /// If the model's checkpoint brought no language-model head.
    pub fn new(model: &'a Stage1, image: ImageFeatures) -> Result<Self> {
        if model.config.matching_only {
            return Err(Error::Config(
                "this stage-1 model has no language-model head: its checkpoint only matches".into(),
            ));
        }
        let (rows, start) = (image.queries.dim(0)?, [model.config.qformer.dec()]);
        Ok(Self { model, caches: image.caches, rows, start })
    }
}

impl StepModel for ItgDecoder<'_> {
    fn start(&mut self) -> Result<Tensor> {
        self.step(&vec![self.start[0]; self.rows])
    }

    fn step(&mut self, ids: &[u32]) -> Result<Tensor> {
        let ids = Tensor::from_slice(ids, (ids.len(), 1), &Device::Cpu)?;
        let tokens = Tensor::ones(ids.shape(), DType::U8, &Device::Cpu)?;
        let qformer = &self.model.qformer;
        let hidden = qformer.continue_text(&ids, &tokens, &mut self.caches, &Dropout::off())?;
        qformer.lm_logits(&hidden.squeeze(1)?)
    }

    fn reorder(&mut self, rows: &[usize]) -> Result<()> {
        let rows: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
        self.caches.iter_mut().try_for_each(|cache| cache.reorder(&rows))
    }

    fn prompt_ids(&self, _: usize) -> &[u32] {
        &self.start
    }
}

/// Cosine of every picture (a, q, e) with every text (b, e), the best of the queries: (a, b). No temperature.
///
/// # Errors
/// If the common spaces differ.
pub fn similarity(images: &Tensor, texts: &Tensor) -> Result<Tensor> {
    let (a, q, e) = images.dims3()?;
    let all = blip2_ops::linear(&images.reshape((a * q, e))?, texts, None)?; // (a·q, b)
    Ok(all.reshape((a, q, texts.dim(0)?))?.max(1)?)
}

/// Probability that picture and text match, from ITM logits (b, 2).
///
/// # Errors
/// If there are not two logits.
pub fn match_probability(logits: &Tensor) -> Result<Vec<f32>> {
    let difference = (logits.narrow(D::Minus1, 1, 1)? - logits.narrow(D::Minus1, 0, 1)?)?;
    let difference = difference.flatten_all()?.to_vec1::<f32>()?;
    Ok(difference.into_iter().map(|d| 1.0 / (1.0 + (-d).exp())).collect())
}

//! The Q-Former (paper §3.1): the trained bridge between a frozen image encoder and a frozen language model.
//!
//! A BERT whose self-attention is shared by learned queries and text. Queries alone attend to the picture, in every
//! n-th layer, and have a feed-forward network of their own. What queries and text see of each other makes the three
//! tasks of stage 1 ([`crate::nn::mask`]):
//!
//! - [`QFormer::queries`]: queries only (ITC's picture side, and all of stage 2);
//! - [`QFormer::text`]: text only (ITC's text side);
//! - [`QFormer::pair`]: both, fully visible to each other (ITM);
//! - [`QFormer::continue_text`]: text, causal, behind the cached keys and values of the queries (ITG).
//!
//! Post-norm, as BERT. It knows no image encoder and no language model. Shapes: b batch, q queries, t text tokens,
//! p picture tokens, w width.

use blip2_ops::{Dropout, MixedPrecision, add};
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::nn::{Activation, Attention, KvCache, LayerNorm, Linear, Mlp, check_sizes, mask};
use crate::params::Params;
use crate::{Error, Result};

/// The shape of a Q-Former.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QFormerConfig {
    /// Features per token.
    pub width: usize,
    /// Layers.
    pub depth: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Features inside the feed-forward networks.
    pub mlp_width: usize,
    /// Layers 0, n, 2n, … attend to the picture.
    pub cross_attention_freq: usize,
    /// Features per picture token.
    pub encoder_width: usize,
    /// Learned queries.
    pub num_queries: usize,
    /// Word pieces, `[DEC]` included.
    pub vocab_size: usize,
    /// Longest text, in tokens.
    pub max_positions: usize,
    /// Epsilon of every layer normalisation.
    pub layer_norm_eps: f64,
    /// Probability of dropping a feature or an attention weight, in training.
    pub dropout: f32,
}

impl QFormerConfig {
    /// The token that texts to be generated begin with, `[DEC]`: the last one, added to BERT's.
    #[must_use]
    pub fn dec(&self) -> u32 {
        self.vocab_size as u32 - 1
    }

    /// The published shape, from `bert-base-uncased`, for pictures of `encoder_width` features.
    #[must_use]
    pub fn base(encoder_width: usize) -> Self {
        Self {
            width: 768,
            depth: 12,
            num_heads: 12,
            mlp_width: 3072,
            cross_attention_freq: 2,
            encoder_width,
            num_queries: 32,
            vocab_size: 30523,
            max_positions: 512,
            layer_norm_eps: 1e-12,
            dropout: 0.1,
        }
    }

    fn check(&self) -> Result<()> {
        let sizes = [
            ("width", self.width),
            ("depth", self.depth),
            ("num_heads", self.num_heads),
            ("mlp_width", self.mlp_width),
            ("encoder_width", self.encoder_width),
            ("num_queries", self.num_queries),
            ("vocab_size", self.vocab_size),
            ("max_positions", self.max_positions),
        ];
        check_sizes("Q-Former", &sizes)
    }

    /// Whether layer `index` attends to the picture.
    #[must_use]
    pub fn has_cross_attention(&self, index: usize) -> bool {
        self.cross_attention_freq > 0 && index.is_multiple_of(self.cross_attention_freq)
    }

    /// Bytes of the keys and values that the layers make of a picture of so many tokens.
    #[must_use]
    pub fn picture_bytes(&self, tokens: usize) -> usize {
        let layers = (0..self.depth).filter(|&layer| self.has_cross_attention(layer)).count();
        2 * layers * self.width * tokens * size_of::<f32>()
    }
}

/// How much of a Q-Former reads text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextBranch {
    /// None: stage 2 has dropped it.
    Absent,
    /// It is read beside the queries and says nothing of its own: a stage 2 whose queries know the question. The last layer
    /// has no feed-forward network for it.
    Guides,
    /// It reads but does not write: matching and embedding.
    Reads,
    /// With the language-model head, too: all of stage 1.
    Whole,
}

/// What text needs: absent in stage 2, where queries never meet word pieces.
#[derive(Clone)]
struct TextEmbeddings {
    words: Tensor,
    positions: Tensor,
    head: Option<LmHead>,
}

/// Hidden state → logits over word pieces, tied to the word embeddings.
#[derive(Clone)]
struct LmHead {
    words: Tensor,
    dense: Linear,
    norm: LayerNorm,
    bias: Tensor,
}

/// A feed-forward network with its residual and norm.
#[derive(Clone)]
struct FeedForward {
    mlp: Mlp,
    norm: LayerNorm,
}

impl FeedForward {
    fn new(params: &Params, config: &QFormerConfig) -> Result<Self> {
        Ok(Self {
            mlp: Mlp::new(params, config.width, config.mlp_width, Activation::Gelu)?,
            norm: params.pp("norm").layer_norm(config.width, config.layer_norm_eps)?,
        })
    }

    fn forward(&self, x: &Tensor, p: f32, dropout: &Dropout) -> Result<Tensor> {
        residual(x, &self.mlp.forward(x)?, &self.norm, p, dropout)
    }
}

#[derive(Clone)]
struct CrossAttention {
    attn: Attention,
    norm: LayerNorm,
}

#[derive(Clone)]
struct Layer {
    self_attn: Attention,
    self_attn_norm: LayerNorm,
    cross_attn: Option<CrossAttention>,
    ffn_query: FeedForward,
    ffn_text: Option<FeedForward>,
}

/// Post-norm: `norm(x + dropout(branch))`.
fn residual(
    x: &Tensor,
    branch: &Tensor,
    norm: &LayerNorm,
    p: f32,
    dropout: &Dropout,
) -> Result<Tensor> {
    norm.forward(&add(x, &dropout.apply(branch, p)?)?)
}

impl Layer {
    fn new(params: &Params, config: &QFormerConfig, index: usize, with_text: bool) -> Result<Self> {
        let (w, eps) = (config.width, config.layer_norm_eps);
        let attention = |name: &str, key_width| {
            Attention::new(&params.pp(name), w, key_width, config.num_heads, config.dropout)
        };
        let cross = || -> Result<_> {
            Ok(CrossAttention {
                attn: attention("cross_attn", config.encoder_width)?,
                norm: params.pp("cross_attn_norm").layer_norm(w, eps)?,
            })
        };
        Ok(Self {
            self_attn: attention("self_attn", w)?,
            self_attn_norm: params.pp("self_attn_norm").layer_norm(w, eps)?,
            cross_attn: config.has_cross_attention(index).then(cross).transpose()?,
            ffn_query: FeedForward::new(&params.pp("ffn_query"), config)?,
            ffn_text: with_text
                .then(|| FeedForward::new(&params.pp("ffn_text"), config))
                .transpose()?,
        })
    }

    /// Queries attend to the picture, then take their own feed-forward network.
    fn finish_queries(
        &self,
        x: &Tensor,
        picture: Option<&Kv>,
        p: f32,
        dropout: &Dropout,
    ) -> Result<Tensor> {
        let x = match (&self.cross_attn, picture) {
            (Some(cross), Some((k, v))) => {
                let seen = cross.attn.attend_projected(x, k, v, None, dropout)?;
                residual(x, &seen, &cross.norm, p, dropout)?
            }
            _ => x.clone(),
        };
        self.ffn_query.forward(&x, p, dropout)
    }

    fn finish_text(&self, x: &Tensor, p: f32, dropout: &Dropout) -> Result<Tensor> {
        self.ffn_text.as_ref().ok_or_else(no_text)?.forward(x, p, dropout)
    }
}

fn no_text() -> Error {
    Error::Config("this Q-Former has no text branch: it comes from stage 2, which drops it".into())
}

/// Keys and values of a picture for one cross-attention layer, each (b, p, w).
type Kv = (Tensor, Tensor);

/// A picture projected once for every layer that attends to it; the same picture serves several passes.
#[derive(Debug, Clone)]
pub struct Picture {
    layers: Vec<Option<Kv>>,
    batch: usize,
}

impl Picture {
    /// Applies `f` to every layer's keys and values; the batch may grow (a gather over ranks).
    ///
    /// # Errors
    /// Whatever `f` says.
    pub fn map(&self, f: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> Result<Self> {
        let mut batch = self.batch;
        let mut layers = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            layers.push(match layer {
                None => None,
                Some((k, v)) => {
                    let kv = (f(k)?, f(v)?);
                    batch = kv.0.dim(0)?;
                    Some(kv)
                }
            });
        }
        Ok(Self { layers, batch })
    }

    /// The pictures at `rows`, in that order, repeats allowed.
    ///
    /// # Errors
    /// If a row is out of range.
    pub fn select(&self, rows: &[u32]) -> Result<Self> {
        let index = Tensor::new(rows, &Device::Cpu)?;
        let selected = self.map(|kv| kv.index_select(&index, 0))?;
        Ok(Self { batch: rows.len(), ..selected })
    }
}

/// The bridge: learned queries that read a picture, and text that shares their self-attention.
#[derive(Clone)]
pub struct QFormer {
    config: QFormerConfig,
    query_tokens: Tensor,
    embed_norm: LayerNorm,
    text: Option<TextEmbeddings>,
    layers: Vec<Layer>,
}

impl QFormer {
    /// Reads `query_tokens` beside, and everything else under, `qformer`. Without text the word embeddings, the text
    /// feed-forward networks and the language-model head are neither wanted nor allowed.
    ///
    /// # Errors
    /// If a size is out of range or the heads don't divide the width; weights that don't fit are reported by
    /// [`Params::build`].
    pub fn new(params: &Params, config: &QFormerConfig, text: TextBranch) -> Result<Self> {
        config.check()?;
        let with_text = text != TextBranch::Absent;
        let query_tokens = params.tensor("query_tokens", &[1, config.num_queries, config.width])?;
        let params = params.pp("qformer");
        Ok(Self {
            query_tokens,
            embed_norm: params.pp("embed_norm").layer_norm(config.width, config.layer_norm_eps)?,
            text: with_text.then(|| TextEmbeddings::new(&params, config, text)).transpose()?,
            layers: (0..config.depth)
                .map(|i| {
                    let is_mute = text == TextBranch::Guides && i + 1 == config.depth;
                    Layer::new(&params.pp("layers").pp(i), config, i, with_text && !is_mute)
                })
                .collect::<Result<_>>()?,
            config: config.clone(),
        })
    }

    /// The shape this Q-Former was built with.
    #[must_use]
    pub fn config(&self) -> &QFormerConfig {
        &self.config
    }

    /// This Q-Former for a training step, reading the words `ids` (n) u32 alone: token i is then the word that stands i-th in
    /// `ids`. The gradient of all word embeddings is made once for many passes, not by each. The head speaks all words as
    /// before, so what it says can't be read back: not for decoding.
    ///
    /// # Errors
    /// If there is no text branch, or no such word.
    pub fn with_words(&self, ids: &Tensor) -> Result<Self> {
        ids.dims1()?;
        let mut few = self.clone();
        let text = few.text.as_mut().ok_or_else(no_text)?;
        text.words = blip2_ops::embedding(&text.words, ids)?;
        Ok(few)
    }

    /// Projects what `norm` makes of picture tokens (b, p, `encoder_width`) to the keys and values of every cross-attention.
    ///
    /// Where the tokens are constants and `norm` is trained, the gradient of every token would only be made to be summed up: there
    /// the norm's scale and shift go into the projections. Not in mixed precision, where what the norm makes is what is rounded.
    ///
    /// # Errors
    /// If the tokens have another width.
    pub fn picture(&self, tokens: &Tensor, norm: &LayerNorm) -> Result<Picture> {
        let inside = norm.is_trained() && !tokens.track_op() && !MixedPrecision::is_on();
        let x = if inside { norm.standardise(tokens)? } else { norm.forward(tokens)? };
        let project = |attn: &Attention| {
            if inside { attn.project_standardised(&x, norm) } else { attn.project(&x) }
        };
        let cross = self.layers.iter().map(|layer| layer.cross_attn.as_ref());
        let layers = cross.map(|cross| cross.map(|cross| project(&cross.attn)).transpose());
        Ok(Picture { layers: layers.collect::<Result<_>>()?, batch: tokens.dim(0)? })
    }

    /// Queries only: → (b, q, w) and each layer's self-attention keys and values for [`Self::continue_text`].
    ///
    /// # Errors
    /// If shapes don't fit.
    pub fn queries(&self, picture: &Picture, dropout: &Dropout) -> Result<(Tensor, Vec<KvCache>)> {
        let mut x = self.enter(&self.expand_queries(picture.batch)?, dropout)?;
        let mut caches = vec![KvCache::default(); self.layers.len()];
        for ((layer, kv), cache) in self.layers.iter().zip(&picture.layers).zip(&mut caches) {
            let seen = layer.self_attn.attend_cached(&x, cache, None, dropout)?;
            x = residual(&x, &seen, &layer.self_attn_norm, self.config.dropout, dropout)?;
            x = layer.finish_queries(&x, kv.as_ref(), self.config.dropout, dropout)?;
        }
        Ok((x, caches))
    }

    /// Text only, every token sees every token: `ids` (b, t) u32, `tokens` (b, t) u8 (0 = padding) → (b, t, w).
    ///
    /// # Errors
    /// If there is no text branch, or the text is longer than the positions.
    pub fn text(&self, ids: &Tensor, tokens: &Tensor, dropout: &Dropout) -> Result<Tensor> {
        let bias = mask::padding(tokens, 0)?;
        let mut x = self.enter(&self.embed_text(ids, 0)?, dropout)?;
        for layer in &self.layers {
            let seen = layer.self_attn.attend(&x, Some(&bias), dropout)?;
            x = residual(&x, &seen, &layer.self_attn_norm, self.config.dropout, dropout)?;
            x = layer.finish_text(&x, self.config.dropout, dropout)?;
        }
        Ok(x)
    }

    /// Queries and text, all visible to each other: → the queries' rows (b, q, w). Row i of the batch is
    /// picture i with text i.
    ///
    /// # Errors
    /// If there is no text branch, or shapes don't fit.
    pub fn pair(
        &self,
        picture: &Picture,
        ids: &Tensor,
        tokens: &Tensor,
        dropout: &Dropout,
    ) -> Result<Tensor> {
        let (q, p) = (self.config.num_queries, self.config.dropout);
        let t = ids.dim(1)?;
        let bias = mask::padding(tokens, q)?;
        let joined =
            Tensor::cat(&[&self.expand_queries(picture.batch)?, &self.embed_text(ids, 0)?], 1)?;
        let mut x = self.enter(&joined, dropout)?;
        for (i, (layer, kv)) in self.layers.iter().zip(&picture.layers).enumerate() {
            let seen = layer.self_attn.attend(&x, Some(&bias), dropout)?;
            x = residual(&x, &seen, &layer.self_attn_norm, p, dropout)?;
            let queries = layer.finish_queries(&x.narrow(1, 0, q)?, kv.as_ref(), p, dropout)?;
            if i + 1 == self.layers.len() {
                // Nobody reads the last layer's text rows.
                return Ok(queries);
            }
            let text = layer.finish_text(&x.narrow(1, q, t)?, p, dropout)?;
            x = Tensor::cat(&[&queries, &text], 1)?;
        }
        Ok(x.narrow(1, 0, q)?)
    }

    /// Text behind the cached queries (and behind the text already in `caches`), each token seeing the queries and the
    /// text up to itself: `ids` (b, t), `tokens` (b, t) u8 → hidden states (b, t, w). The caches grow by t.
    ///
    /// # Errors
    /// If there is no text branch, or shapes don't fit.
    pub fn continue_text(
        &self,
        ids: &Tensor,
        tokens: &Tensor,
        caches: &mut [KvCache],
        dropout: &Dropout,
    ) -> Result<Tensor> {
        let before = caches.first().map_or(0, KvCache::len);
        // Text positions start at 0 although the queries' keys stand before them.
        let position = before.saturating_sub(self.config.num_queries);
        let bias = mask::multimodal_causal(tokens, before)?;
        let mut x = self.enter(&self.embed_text(ids, position)?, dropout)?;
        for (layer, cache) in self.layers.iter().zip(caches) {
            let seen = layer.self_attn.attend_cached(&x, cache, Some(&bias), dropout)?;
            x = residual(&x, &seen, &layer.self_attn_norm, self.config.dropout, dropout)?;
            x = layer.finish_text(&x, self.config.dropout, dropout)?;
        }
        Ok(x)
    }

    /// Hidden states (…, w) → logits over word pieces (…, vocabulary).
    ///
    /// # Errors
    /// If there is no text branch.
    pub fn lm_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let text = self.text.as_ref().ok_or_else(no_text)?;
        let head = text.head.as_ref().ok_or_else(|| {
            Error::Config(
                "this Q-Former has no language-model head: its checkpoint only matches".into(),
            )
        })?;
        let x = blip2_ops::gelu(&head.dense.forward(hidden)?)?;
        let x = head.norm.forward(&x)?;
        Ok(blip2_ops::linear(&x, &head.words, Some(&head.bias))?)
    }

    fn expand_queries(&self, batch: usize) -> Result<Tensor> {
        let shape = (batch, self.config.num_queries, self.config.width);
        Ok(self.query_tokens.broadcast_as(shape)?.contiguous()?)
    }

    fn embed_text(&self, ids: &Tensor, first_position: usize) -> Result<Tensor> {
        let text = self.text.as_ref().ok_or_else(no_text)?;
        let t = ids.dim(1)?;
        let end = first_position + t;
        if end > self.config.max_positions {
            return Err(Error::Config(format!(
                "text of {end} tokens is longer than the Q-Former's {} positions",
                self.config.max_positions
            )));
        }
        let positions = text.positions.narrow(0, first_position, t)?.contiguous()?;
        Ok(blip2_ops::embedding(&text.words, ids)?.broadcast_add(&positions)?)
    }

    /// One norm and dropout for queries and text alike.
    fn enter(&self, x: &Tensor, dropout: &Dropout) -> Result<Tensor> {
        Ok(dropout.apply(&self.embed_norm.forward(x)?, self.config.dropout)?)
    }
}

impl TextEmbeddings {
    fn new(params: &Params, config: &QFormerConfig, text: TextBranch) -> Result<Self> {
        let w = config.width;
        let words = params.pp("word_embeddings").tensor("weight", &[config.vocab_size, w])?;
        let head = || LmHead::new(&params.pp("lm_head"), config, words.clone());
        Ok(Self {
            positions: params
                .pp("position_embeddings")
                .tensor("weight", &[config.max_positions, w])?,
            head: (text == TextBranch::Whole).then(head).transpose()?,
            words,
        })
    }
}

impl LmHead {
    fn new(params: &Params, config: &QFormerConfig, words: Tensor) -> Result<Self> {
        let w = config.width;
        Ok(Self {
            words,
            dense: params.pp("dense").linear(w, w, true)?,
            norm: params.pp("norm").layer_norm(w, config.layer_norm_eps)?,
            bias: params.tensor("bias", &[config.vocab_size])?,
        })
    }
}

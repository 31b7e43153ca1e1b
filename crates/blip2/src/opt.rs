//! OPT (2.7B, 6.7B and its smaller sisters): a frozen decoder-only language model.
//!
//! Learned positions, biases everywhere, ReLU. Norms stand before each branch, except in OPT-350m, where they stand
//! behind it and where words are narrower than the model: two projections lead in and out. All weights are frozen, but
//! the gradient flows through to the input embeddings.
//!
//! Not here: tokens to text ([`crate::tokenizer`]), choosing tokens ([`crate::generate`]).
//!
//! Letters: `b` rows, `t` new positions, `d` width, `v` vocabulary.

use blip2_ops::{Dropout, FrozenWeight, add, frozen_linear};
use candle_core::Tensor;
use serde::Deserialize;

use crate::nn::mask::Layout;
use crate::nn::{Activation, Attention, KvCache, KvCaches, LayerNorm, Linear, Mlp, check_sizes};
use crate::params::Params;
use crate::{Error, Result};

/// The position table has two rows in front that no position uses.
const POSITION_OFFSET: usize = 2;
const NORM_EPS: f64 = 1e-5;

/// The shape of an OPT: the fields of its `config.json` that matter, with transformers' defaults for those that a file
/// leaves out.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct OptConfig {
    /// Number of token ids that have an embedding.
    pub vocab_size: usize,
    /// Width of a token.
    pub hidden_size: usize,
    /// Width inside the feed-forward networks.
    pub ffn_dim: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Most positions, cached ones included.
    pub max_position_embeddings: usize,
    /// Whether norms stand before the branches; OPT-350m has them behind.
    pub do_layer_norm_before: bool,
    /// Width of a word's embedding, if it is not the model's.
    pub word_embed_proj_dim: Option<usize>,
    /// Whether the last norm was left out of a pre-norm model.
    #[serde(rename = "_remove_final_layer_norm")]
    pub remove_final_layer_norm: bool,
    /// Non-linearity of the feed-forward networks.
    pub activation_function: String,
    /// Whether linear maps have a bias; only with is known.
    pub enable_bias: bool,
    /// Whether norms have weights; only with is known.
    pub layer_norm_elementwise_affine: bool,
    /// Id that starts a text.
    pub bos_token_id: u32,
    /// Id that ends a text.
    pub eos_token_id: u32,
    /// Id of padding.
    pub pad_token_id: u32,
}

impl Default for OptConfig {
    fn default() -> Self {
        Self {
            vocab_size: 50272,
            hidden_size: 768,
            ffn_dim: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            max_position_embeddings: 2048,
            do_layer_norm_before: true,
            word_embed_proj_dim: None,
            remove_final_layer_norm: false,
            activation_function: "relu".into(),
            enable_bias: true,
            layer_norm_elementwise_affine: true,
            bos_token_id: 2,
            eos_token_id: 2,
            pad_token_id: 1,
        }
    }
}

impl OptConfig {
    fn word_width(&self) -> usize {
        self.word_embed_proj_dim.unwrap_or(self.hidden_size)
    }

    fn check(&self) -> Result<()> {
        let refuse = |what: String| Err(Error::Config(format!("OPT configuration: {what}")));
        if self.activation_function != "relu" {
            return refuse(format!(
                "activation_function {} is not known",
                self.activation_function
            ));
        }
        if !self.enable_bias || !self.layer_norm_elementwise_affine {
            return refuse("an OPT without biases or norm weights is not known".into());
        }
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("ffn_dim", self.ffn_dim),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("max_position_embeddings", self.max_position_embeddings),
            ("word_embed_proj_dim", self.word_width()),
        ];
        check_sizes("OPT", &sizes)
    }
}

struct Block {
    attn: Attention,
    attn_norm: LayerNorm,
    mlp: Mlp,
    mlp_norm: LayerNorm,
    pre_norm: bool,
}

impl Block {
    fn new(params: &Params, config: &OptConfig) -> Result<Self> {
        let d = config.hidden_size;
        let heads = config.num_attention_heads;
        Ok(Self {
            attn: Attention::new(&params.pp("attn"), d, d, heads, 0.0)?,
            attn_norm: params.pp("attn_norm").layer_norm(d, NORM_EPS)?,
            mlp: Mlp::new(&params.pp("mlp"), d, config.ffn_dim, Activation::Relu)?,
            mlp_norm: params.pp("mlp_norm").layer_norm(d, NORM_EPS)?,
            pre_norm: config.do_layer_norm_before,
        })
    }

    fn attend(&self, x: &Tensor, layout: &Layout, cache: Option<&mut KvCache>) -> Result<Tensor> {
        let (bias, off) = (layout.bias.as_ref(), Dropout::off());
        match cache {
            Some(cache) => self.attn.attend_cached(x, cache, bias, &off),
            None => self.attn.attend(x, bias, &off),
        }
    }

    fn forward(&self, x: &Tensor, layout: &Layout, cache: Option<&mut KvCache>) -> Result<Tensor> {
        if self.pre_norm {
            let x = add(x, &self.attend(&self.attn_norm.forward(x)?, layout, cache)?)?;
            return Ok(add(&x, &self.mlp.forward(&self.mlp_norm.forward(&x)?)?)?);
        }
        let x = self.attn_norm.forward(&add(x, &self.attend(x, layout, cache)?)?)?;
        self.mlp_norm.forward(&add(&x, &self.mlp.forward(&x)?)?)
    }
}

/// The model. All weights are frozen.
pub struct Opt {
    config: OptConfig,
    words: FrozenWeight,
    positions: FrozenWeight,
    project_in: Option<Linear>,
    project_out: Option<Linear>,
    blocks: Vec<Block>,
    final_norm: Option<LayerNorm>,
    /// None: tied to the words.
    head: Option<FrozenWeight>,
}

impl Opt {
    /// Reads the weights under the names of [`crate::checkpoint::from_hf_opt`]. Whether the head is tied to the words is
    /// decided by the tensors, not by the configuration: some published files have a head of their own.
    ///
    /// # Errors
    /// A configuration out of range; weights that don't fit are reported by [`Params::build`].
    pub fn new(params: &Params, config: &OptConfig) -> Result<Self> {
        config.check()?;
        let (d, w) = (config.hidden_size, config.word_width());
        let head = params.pp("lm_head");
        let head_rows = head.dims("weight").and_then(|dims| dims.first().copied());
        let projected = |name: &str, from, to| -> Result<Option<Linear>> {
            (w != d).then(|| params.pp(name).linear(from, to, false)).transpose()
        };
        let final_norm = config.do_layer_norm_before && !config.remove_final_layer_norm;
        let rows = config.max_position_embeddings + POSITION_OFFSET;
        Ok(Self {
            words: params.pp("embed_tokens").matrix("weight", config.vocab_size, w)?,
            positions: params.pp("embed_positions").matrix("weight", rows, d)?,
            project_in: projected("project_in", w, d)?,
            project_out: projected("project_out", d, w)?,
            blocks: (0..config.num_hidden_layers)
                .map(|i| Block::new(&params.pp("blocks").pp(i), config))
                .collect::<Result<_>>()?,
            final_norm: final_norm
                .then(|| params.pp("final_norm").layer_norm(d, NORM_EPS))
                .transpose()?,
            head: head_rows.map(|rows| head.matrix("weight", rows, w)).transpose()?,
            config: config.clone(),
        })
    }

    /// Shape and constants.
    #[must_use]
    pub fn config(&self) -> &OptConfig {
        &self.config
    }

    /// An empty cache for [`Self::forward`].
    #[must_use]
    pub fn new_cache(&self) -> KvCaches {
        KvCaches::new(self.blocks.len())
    }

    /// The table of word embeddings.
    #[must_use]
    pub fn words(&self) -> &FrozenWeight {
        &self.words
    }

    /// Number of logits per position.
    #[must_use]
    pub fn num_logits(&self) -> usize {
        self.head.as_ref().unwrap_or(&self.words).shape().0
    }

    /// Embedded words (b, t, word width) as the blocks want them (b, t, d).
    ///
    /// # Errors
    /// Another width.
    pub fn widen(&self, words: Tensor) -> Result<Tensor> {
        match &self.project_in {
            Some(project) => project.forward(&words),
            None => Ok(words),
        }
    }

    /// Embeddings `(b, t, d)`, without positions, to hidden states `(b, t, d)`; `layout` says where they stand and what
    /// they see. With a `cache`, the new keys and values are appended to it.
    ///
    /// # Errors
    /// Another width than the model's, or more positions than it knows.
    pub fn forward(
        &self,
        x: &Tensor,
        layout: &Layout,
        mut cache: Option<&mut KvCaches>,
    ) -> Result<Tensor> {
        layout.check(x, self.config.hidden_size, self.config.max_position_embeddings)?;
        let rows: Vec<u32> = layout.positions.iter().map(|p| p + POSITION_OFFSET as u32).collect();
        let mut x = (x + self.positions.rows(&rows)?.reshape(x.shape())?)?;
        for (i, block) in self.blocks.iter().enumerate() {
            let cache = cache.as_mut().map(|caches| caches.layer(i));
            x = block.forward(&x, layout, cache)?;
        }
        match &self.final_norm {
            Some(norm) => norm.forward(&x),
            None => Ok(x),
        }
    }

    /// Hidden states `(…, d)` to logits `(…, v)`.
    ///
    /// # Errors
    /// Another width than the model's.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let head = self.head.as_ref().unwrap_or(&self.words);
        Ok(match &self.project_out {
            Some(project) => frozen_linear(&project.forward(hidden)?, head, None)?,
            None => frozen_linear(hidden, head, None)?,
        })
    }
}

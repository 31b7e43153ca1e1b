//! T5 v1.1 and FlanT5 (XL, XXL and their smaller sisters): a frozen encoder–decoder language model.
//!
//! Pre-norm blocks with RMS norms, no biases, attention without a scale, and relative positions: a table in the first
//! layer of each stack gives every pair of positions a bias by the distance between them. The encoder reads queries and
//! prompt once; its keys and values are projected once for every layer of the decoder that looks at them.
//!
//! Not here: tokens to text ([`crate::tokenizer`]), choosing tokens ([`crate::generate`]).
//!
//! Letters: `b` rows, `s` positions of the encoder, `t` of the decoder, `d` width, `h` heads, `v` vocabulary.

use blip2_ops::{Dropout, FrozenWeight, add, frozen_linear};
use candle_core::{Device, Tensor};
use serde::Deserialize;

use crate::nn::{
    Activation, Attention, AttentionShape, KvCache, KvCaches, Linear, RmsNorm, check_sizes, mask,
};
use crate::params::Params;
use crate::{Error, Result};

/// The shape of a T5: the fields of its `config.json` that matter, with transformers' defaults for those that a file
/// leaves out.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct T5Config {
    /// Number of token ids that have an embedding.
    pub vocab_size: usize,
    /// Width of a token.
    pub d_model: usize,
    /// Width of one head.
    pub d_kv: usize,
    /// Width inside the feed-forward networks.
    pub d_ff: usize,
    /// Blocks of the encoder.
    pub num_layers: usize,
    /// Blocks of the decoder, if their number is another.
    pub num_decoder_layers: Option<usize>,
    /// Attention heads.
    pub num_heads: usize,
    /// Rows of the table of relative positions.
    pub relative_attention_num_buckets: usize,
    /// From this distance on all positions share a row.
    pub relative_attention_max_distance: usize,
    /// Added to the mean square in the norms.
    pub layer_norm_epsilon: f64,
    /// Kind of feed-forward network, `gated-gelu` or `relu`, say.
    pub feed_forward_proj: String,
    /// Its non-linearity, where it is another than `feed_forward_proj` says: published BLIP-2 files say `gelu`.
    pub dense_act_fn: Option<String>,
    /// Id of padding.
    pub pad_token_id: u32,
    /// Id that ends a text.
    pub eos_token_id: u32,
    /// Id that the decoder starts with.
    pub decoder_start_token_id: u32,
}

impl Default for T5Config {
    fn default() -> Self {
        Self {
            vocab_size: 32128,
            d_model: 512,
            d_kv: 64,
            d_ff: 2048,
            num_layers: 6,
            num_decoder_layers: None,
            num_heads: 8,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            layer_norm_epsilon: 1e-6,
            feed_forward_proj: "relu".into(),
            dense_act_fn: None,
            pad_token_id: 0,
            eos_token_id: 1,
            decoder_start_token_id: 0,
        }
    }
}

impl T5Config {
    fn check(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("d_model", self.d_model),
            ("d_kv", self.d_kv),
            ("d_ff", self.d_ff),
            ("num_layers", self.num_layers),
            ("num_decoder_layers", self.decoder_layers()),
            ("num_heads", self.num_heads),
            ("relative_attention_num_buckets", self.relative_attention_num_buckets),
        ];
        check_sizes("T5", &sizes)?;
        if !(0.0..1.0).contains(&self.layer_norm_epsilon) {
            return Err(Error::Config(format!(
                "T5 configuration: layer_norm_epsilon {} is not in 0..1",
                self.layer_norm_epsilon
            )));
        }
        if self.decoder_start_token_id as usize >= self.vocab_size {
            return Err(Error::Config(format!(
                "T5 configuration: decoder_start_token_id {} of {} words",
                self.decoder_start_token_id, self.vocab_size
            )));
        }
        let (buckets, distance) =
            (self.relative_attention_num_buckets, self.relative_attention_max_distance);
        if !buckets.is_multiple_of(4) || distance <= buckets / 2 {
            return Err(Error::Config(format!(
                "T5 configuration: {buckets} buckets for distances up to {distance}: expected a multiple of 4, and \
                 distances beyond its half"
            )));
        }
        Ok(())
    }

    fn decoder_layers(&self) -> usize {
        self.num_decoder_layers.unwrap_or(self.num_layers)
    }

    /// Whether the feed-forward networks are gated, and their non-linearity.
    fn feed_forward(&self) -> Result<(bool, Activation)> {
        let (gated, named) = match self.feed_forward_proj.strip_prefix("gated-") {
            // What transformers makes of it.
            Some("gelu") => (true, "gelu_new"),
            Some(other) => (true, other),
            None => (false, self.feed_forward_proj.as_str()),
        };
        let activation = match self.dense_act_fn.as_deref().unwrap_or(named) {
            "relu" => Activation::Relu,
            "gelu" => Activation::Gelu,
            "gelu_new" => Activation::GeluNew,
            other => {
                return Err(Error::Config(format!(
                    "T5 configuration: the activation {other} is not known"
                )));
            }
        };
        Ok((gated, activation))
    }

    fn attention(&self) -> AttentionShape {
        AttentionShape {
            width: self.d_model,
            key_width: self.d_model,
            inner: self.num_heads * self.d_kv,
            num_heads: self.num_heads,
            scale: 1.0,
            bias: false,
            dropout: 0.0,
        }
    }
}

/// `down(act(gate(x)) · up(x))`, or without the gate `down(act(up(x)))`.
struct FeedForward {
    gate: Option<Linear>,
    up: Linear,
    down: Linear,
    activation: Activation,
}

impl FeedForward {
    fn new(params: &Params, config: &T5Config) -> Result<Self> {
        let (gated, activation) = config.feed_forward()?;
        let (d, f) = (config.d_model, config.d_ff);
        Ok(Self {
            gate: gated.then(|| params.pp("gate").linear(d, f, false)).transpose()?,
            up: params.pp("up").linear(d, f, false)?,
            down: params.pp("down").linear(f, d, false)?,
            activation,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let up = self.up.forward(x)?;
        let inner = match &self.gate {
            Some(gate) => (self.activation.forward(&gate.forward(x)?)? * up)?,
            None => self.activation.forward(&up)?,
        };
        self.down.forward(&inner)
    }
}

struct EncoderBlock {
    attn: Attention,
    attn_norm: RmsNorm,
    ffn: FeedForward,
    ffn_norm: RmsNorm,
}

impl EncoderBlock {
    fn new(params: &Params, config: &T5Config) -> Result<Self> {
        Ok(Self {
            attn: Attention::of_shape(&params.pp("attn"), &config.attention())?,
            attn_norm: norm(&params.pp("attn_norm"), config)?,
            ffn: FeedForward::new(&params.pp("ffn"), config)?,
            ffn_norm: norm(&params.pp("ffn_norm"), config)?,
        })
    }

    fn forward(&self, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let seen = self.attn.attend(&self.attn_norm.forward(x)?, Some(bias), &Dropout::off())?;
        let x = add(x, &seen)?;
        Ok(add(&x, &self.ffn.forward(&self.ffn_norm.forward(&x)?)?)?)
    }
}

struct DecoderBlock {
    attn: Attention,
    attn_norm: RmsNorm,
    cross: Attention,
    cross_norm: RmsNorm,
    ffn: FeedForward,
    ffn_norm: RmsNorm,
}

impl DecoderBlock {
    fn new(params: &Params, config: &T5Config) -> Result<Self> {
        Ok(Self {
            attn: Attention::of_shape(&params.pp("attn"), &config.attention())?,
            attn_norm: norm(&params.pp("attn_norm"), config)?,
            cross: Attention::of_shape(&params.pp("cross"), &config.attention())?,
            cross_norm: norm(&params.pp("cross_norm"), config)?,
            ffn: FeedForward::new(&params.pp("ffn"), config)?,
            ffn_norm: norm(&params.pp("ffn_norm"), config)?,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        cache: &mut KvCache,
        bias: &Tensor,
        encoded: &KvCache,
        padding: &Tensor,
    ) -> Result<Tensor> {
        let off = Dropout::off();
        let seen = self.attn.attend_cached(&self.attn_norm.forward(x)?, cache, Some(bias), &off)?;
        let x = add(x, &seen)?;
        let y = self.cross_norm.forward(&x)?;
        let x = add(&x, &self.cross.attend_to(&y, encoded, Some(padding), &off)?)?;
        Ok(add(&x, &self.ffn.forward(&self.ffn_norm.forward(&x)?)?)?)
    }
}

fn norm(params: &Params, config: &T5Config) -> Result<RmsNorm> {
    Ok(RmsNorm::new(params.tensor("weight", &[config.d_model])?, config.layer_norm_epsilon))
}

/// A table of biases by relative position, of one stack.
struct RelativeBias {
    /// (buckets, h), row after row.
    table: Vec<f32>,
    buckets: usize,
    heads: usize,
    max_distance: usize,
    /// Whether keys may lie ahead: they have half of the rows then.
    both_ways: bool,
}

impl RelativeBias {
    fn new(params: &Params, config: &T5Config, both_ways: bool) -> Result<Self> {
        let (buckets, heads) = (config.relative_attention_num_buckets, config.num_heads);
        Ok(Self {
            table: params.tensor("weight", &[buckets, heads])?.flatten_all()?.to_vec1()?,
            buckets,
            heads,
            max_distance: config.relative_attention_max_distance,
            both_ways,
        })
    }

    /// The row for a key `distance` positions behind (negative) or ahead of its query: near distances have a row each,
    /// far ones share rows that widen with the logarithm.
    fn bucket(&self, distance: i64) -> usize {
        let rows = if self.both_ways { self.buckets / 2 } else { self.buckets };
        let ahead = self.both_ways && distance > 0;
        let n = if self.both_ways {
            distance.unsigned_abs()
        } else {
            (-distance).max(0).unsigned_abs()
        };
        let (n, exact) = (n as usize, rows / 2);
        let row = if n < exact {
            n
        } else {
            let step =
                (n as f32 / exact as f32).ln() / (self.max_distance as f32 / exact as f32).ln();
            (exact + (step * (rows - exact) as f32) as usize).min(rows - 1)
        };
        row + if ahead { rows } else { 0 }
    }

    /// Biases (1, h, queries, keys) of the last `queries` of `keys` positions; a causal stack hides what lies ahead.
    fn bias(&self, queries: usize, keys: usize) -> Result<Tensor> {
        let mut bias = Vec::with_capacity(self.heads * queries * keys);
        for head in 0..self.heads {
            for query in keys - queries..keys {
                bias.extend((0..keys).map(|key| {
                    let distance = key as i64 - query as i64;
                    if distance > 0 && !self.both_ways {
                        return f32::NEG_INFINITY;
                    }
                    self.table[self.bucket(distance) * self.heads + head]
                }));
            }
        }
        Ok(Tensor::from_vec(bias, (1, self.heads, queries, keys), &Device::Cpu)?)
    }
}

/// The model. All weights are frozen.
pub struct T5 {
    config: T5Config,
    words: FrozenWeight,
    encoder: Vec<EncoderBlock>,
    encoder_bias: RelativeBias,
    encoder_norm: RmsNorm,
    decoder: Vec<DecoderBlock>,
    decoder_bias: RelativeBias,
    decoder_norm: RmsNorm,
    /// None: tied to the words, hidden states scaled down.
    head: Option<FrozenWeight>,
}

/// What the decoder knows: the encoder's keys and values, and its own so far; owned by the caller.
#[derive(Debug, Clone)]
pub struct Memory {
    /// Keys and values of the encoder's output, per layer of the decoder: (rows, s, inner).
    cross: Vec<KvCache>,
    /// Hides the encoder's padding: (rows, 1, 1, s).
    padding: Tensor,
    own: KvCaches,
}

impl Memory {
    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.padding.dims()[0]
    }

    /// Makes row `i` a copy of the present row `rows[i]`.
    ///
    /// # Errors
    /// A row that isn't there.
    pub fn reorder(&mut self, rows: &[u32]) -> Result<()> {
        self.cross.iter_mut().try_for_each(|cache| cache.reorder(rows))?;
        self.padding = self.padding.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)?;
        self.own.reorder(rows)
    }
}

impl T5 {
    /// Reads the weights under the names of [`crate::checkpoint::from_hf_t5`]. Whether the head is tied to the words is
    /// decided by the tensors, not by the configuration: files re-saved by newer programs claim it wrongly.
    ///
    /// # Errors
    /// A configuration out of range; weights that don't fit are reported by [`Params::build`].
    pub fn new(params: &Params, config: &T5Config) -> Result<Self> {
        config.check()?;
        let (encoder, decoder) = (params.pp("encoder"), params.pp("decoder"));
        let block = |stack: &Params, i: usize| stack.pp("blocks").pp(i);
        let bias = |stack: &Params, both_ways| {
            RelativeBias::new(&block(stack, 0).pp("relative_bias"), config, both_ways)
        };
        let head = params.pp("lm_head");
        let head_rows = head.dims("weight").and_then(|dims| dims.first().copied());
        Ok(Self {
            words: params.pp("words").matrix("weight", config.vocab_size, config.d_model)?,
            encoder: (0..config.num_layers)
                .map(|i| EncoderBlock::new(&block(&encoder, i), config))
                .collect::<Result<_>>()?,
            encoder_bias: bias(&encoder, true)?,
            encoder_norm: norm(&encoder.pp("final_norm"), config)?,
            decoder: (0..config.decoder_layers())
                .map(|i| DecoderBlock::new(&block(&decoder, i), config))
                .collect::<Result<_>>()?,
            decoder_bias: bias(&decoder, false)?,
            decoder_norm: norm(&decoder.pp("final_norm"), config)?,
            head: head_rows.map(|rows| head.matrix("weight", rows, config.d_model)).transpose()?,
            config: config.clone(),
        })
    }

    /// Shape and constants.
    #[must_use]
    pub fn config(&self) -> &T5Config {
        &self.config
    }

    /// The table of word embeddings, of encoder and decoder alike.
    #[must_use]
    pub fn words(&self) -> &FrozenWeight {
        &self.words
    }

    /// Number of logits per position.
    #[must_use]
    pub fn num_logits(&self) -> usize {
        self.head.as_ref().unwrap_or(&self.words).shape().0
    }

    /// Reads embeddings `x` (b, s, d), of which `visible` says what holds something.
    ///
    /// # Errors
    /// Shapes that don't fit.
    pub fn encode(&self, x: &Tensor, visible: &[Vec<bool>]) -> Result<Memory> {
        let (b, s, d) = x.dims3()?;
        if d != self.config.d_model || visible.len() != b || visible.iter().any(|r| r.len() != s) {
            return Err(Error::Config(format!(
                "embeddings {:?} and a mask of {} rows for a T5 of width {}",
                x.dims(),
                visible.len(),
                self.config.d_model
            )));
        }
        let tokens: Vec<u8> = visible.iter().flatten().map(|seen| u8::from(*seen)).collect();
        let padding = mask::padding(&Tensor::from_vec(tokens, (b, s), &Device::Cpu)?, 0)?;
        let bias = self.encoder_bias.bias(s, s)?.broadcast_add(&padding)?;
        let mut x = x.clone();
        for block in &self.encoder {
            x = block.forward(&x, &bias)?;
        }
        let x = self.encoder_norm.forward(&x)?;
        let cross = self.decoder.iter().map(|block| {
            let (k, v) = block.cross.project(&x)?;
            KvCache::holding(k, v)
        });
        let cross = cross.collect::<Result<_>>()?;
        Ok(Memory { cross, padding, own: KvCaches::new(self.decoder.len()) })
    }

    /// Appends one id to each row of `memory`: logits (rows, v) of the token that follows.
    ///
    /// # Errors
    /// Not as many ids as rows, or an id outside the vocabulary.
    pub fn decode(&self, ids: &[u32], memory: &mut Memory) -> Result<Tensor> {
        if ids.len() != memory.rows() {
            return Err(Error::Config(format!("{} ids for {} rows", ids.len(), memory.rows())));
        }
        let ids = Tensor::from_slice(ids, (ids.len(), 1), &Device::Cpu)?;
        self.logits(&self.read(&ids, memory)?.squeeze(1)?)
    }

    /// Appends ids (rows, t) to the rows of `memory`: hidden states (rows, t, d) behind each of them. The gradient flows to
    /// what the encoder read.
    ///
    /// # Errors
    /// Not as many rows, or an id outside the vocabulary.
    pub fn read(&self, ids: &Tensor, memory: &mut Memory) -> Result<Tensor> {
        let (rows, t) = ids.dims2()?;
        if rows != memory.rows() {
            return Err(Error::Config(format!("{rows} rows of ids for {} rows", memory.rows())));
        }
        let flat: Vec<u32> = ids.flatten_all()?.to_vec1()?;
        let mut x = self.words.rows(&flat)?.reshape((rows, t, self.config.d_model))?;
        let bias = self.decoder_bias.bias(t, memory.own.len() + t)?;
        for (i, (block, cross)) in self.decoder.iter().zip(&memory.cross).enumerate() {
            x = block.forward(&x, memory.own.layer(i), &bias, cross, &memory.padding)?;
        }
        self.decoder_norm.forward(&x)
    }

    /// Hidden states (…, d) to logits (…, v).
    ///
    /// # Errors
    /// Another width than the model's.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(match &self.head {
            Some(head) => frozen_linear(hidden, head, None)?,
            None => {
                let scale = (self.config.d_model as f64).powf(-0.5);
                frozen_linear(&(hidden * scale)?, &self.words, None)?
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bias(both_ways: bool) -> RelativeBias {
        let table = (0..32).map(|i| i as f32).collect();
        RelativeBias { table, buckets: 32, heads: 1, max_distance: 128, both_ways }
    }

    #[test]
    fn buckets_are_transformers() {
        // Made with T5Attention._relative_position_bucket of transformers 4.57.1.
        let distances =
            [-200, -128, -127, -64, -20, -16, -15, -9, -8, -7, -1, 0, 1, 7, 8, 12, 100, 300];
        let two_way = [15, 15, 15, 14, 10, 10, 9, 8, 8, 7, 1, 0, 17, 23, 24, 25, 31, 31];
        let causal = [31, 31, 31, 26, 17, 16, 15, 9, 8, 7, 1, 0, 0, 0, 0, 0, 0, 0];
        for (both_ways, expected) in [(true, two_way), (false, causal)] {
            let bias = bias(both_ways);
            assert_eq!(distances.map(|d| bias.bucket(d)), expected);
        }
    }

    #[test]
    fn a_causal_stack_does_not_look_ahead() {
        let bias = bias(false).bias(2, 4).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(bias, [2.0, 1.0, 0.0, f32::NEG_INFINITY, 3.0, 2.0, 1.0, 0.0]);
    }
}

//! The LLaMA family (SmolLM2, Vicuna, …): a frozen decoder-only language model.
//!
//! Pre-norm blocks of grouped-query attention with rotary positions and a SwiGLU feed-forward, RMS
//! norms, no biases. Weights come from a GGUF file, kept as stored or converted, or from tensors
//! under Hugging Face names; all of them are frozen, but the gradient flows through to the input
//! embeddings, so that stage 2 can train what is put in front of the text.
//!
//! Not here: tokens to text ([`crate::tokenizer`]), choosing tokens ([`crate::generate`]).
//!
//! Letters: `b` rows, `t` new positions, `s` = cached + `t` positions, `d` width, `h` query heads,
//! `g` key–value heads, `e` head width, `v` vocabulary.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blip2_ops::{
    FrozenWeight, Heads, RopeStyle, WeightFormat, add, attention, frozen_linear, rms_norm, rope,
    silu_gate,
};
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{DType, Device, Storage, Tensor};
use rayon::prelude::*;
use serde::Deserialize;

use crate::nn::mask::Layout;
use crate::nn::{KvCache, KvCaches, check_sizes};
use crate::stored::Stored;
use crate::{Error, Result};

/// Shape and constants of a LLaMA-like model.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Number of token ids, `v`.
    pub vocab_size: usize,
    /// Width of a token, `d`.
    pub width: usize,
    /// Width between the two halves of the feed-forward.
    pub ffn_width: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Query heads, `h`.
    pub num_heads: usize,
    /// Key–value heads, `g`; a divisor of `num_heads`.
    pub num_kv_heads: usize,
    /// Width of one head, `e`; even.
    pub head_width: usize,
    /// Added to the mean square in the norms.
    pub norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_base: f32,
    /// Which elements of a head rotate together: neighbours in GGUF files, whose query and key rows
    /// are permuted for it, halves under Hugging Face names.
    pub rope_style: RopeStyle,
    /// Most positions, cached ones included.
    pub max_len: usize,
    /// Whether the logits use the token embeddings, and no matrix of their own.
    pub tied: bool,
    /// Id that starts a text, if there is one.
    pub bos: Option<u32>,
    /// Id that ends a text.
    pub eos: u32,
}

/// The model. All weights are frozen.
#[derive(Clone)]
pub struct Llama {
    config: LlamaConfig,
    embeddings: FrozenWeight,
    blocks: Vec<Block>,
    norm: Tensor,
    /// None: tied to the embeddings.
    output: Option<FrozenWeight>,
}

#[derive(Clone)]
struct Block {
    attn_norm: Tensor,
    q: FrozenWeight,
    k: FrozenWeight,
    v: FrozenWeight,
    out: FrozenWeight,
    ffn_norm: Tensor,
    gate: FrozenWeight,
    up: FrozenWeight,
    down: FrozenWeight,
}

impl Llama {
    /// Reads the model of a GGUF file. Without a `format` the matrices stay as they are stored.
    ///
    /// # Errors
    /// A file of another architecture, metadata out of range, a tensor that is missing, unexpected,
    /// mis-shaped or not finite.
    pub fn from_gguf(gguf: &Gguf, format: Option<WeightFormat>) -> Result<Self> {
        let has_output = gguf.content.tensor_infos.contains_key("output.weight");
        let config = LlamaConfig::from_gguf(gguf.metadata(), !has_output)
            .map_err(|e| Error::file(&gguf.path, e.to_string()))?;
        let mut weights = GgufWeights {
            file: File::open(&gguf.path).map_err(Error::io(&gguf.path))?,
            gguf,
            format,
            left: gguf.content.tensor_infos.keys().cloned().collect(),
        };
        Self::assemble(config, &mut weights)
    }

    /// Builds the model from tensors under Hugging Face names (`model.layers.0.self_attn.q_proj.weight`,
    /// …), its matrices kept in `format`; without one in a format that changes no value.
    ///
    /// # Errors
    /// A configuration out of range, or a tensor that is missing, unexpected, mis-shaped or not finite.
    pub fn from_hf<T: Clone + Into<Stored>>(
        config: LlamaConfig,
        tensors: &BTreeMap<String, T>,
        format: impl Into<Option<WeightFormat>>,
    ) -> Result<Self> {
        let left = tensors.keys().cloned().collect();
        Self::assemble(config, &mut HfWeights { tensors, format: format.into(), left })
    }

    fn assemble(config: LlamaConfig, weights: &mut dyn Weights) -> Result<Self> {
        config.check()?;
        let LlamaConfig { vocab_size, width, ffn_width, .. } = config;
        let (q_width, kv_width) =
            (config.num_heads * config.head_width, config.num_kv_heads * config.head_width);
        let embeddings = weights.matrix("token_embd.weight", vocab_size, width)?;
        let mut blocks = Vec::new();
        for i in 0..config.depth {
            let name = |part: &str| format!("blk.{i}.{part}.weight");
            blocks.push(Block {
                attn_norm: weights.vector(&name("attn_norm"), width)?,
                q: weights.matrix(&name("attn_q"), q_width, width)?,
                k: weights.matrix(&name("attn_k"), kv_width, width)?,
                v: weights.matrix(&name("attn_v"), kv_width, width)?,
                out: weights.matrix(&name("attn_output"), width, q_width)?,
                ffn_norm: weights.vector(&name("ffn_norm"), width)?,
                gate: weights.matrix(&name("ffn_gate"), ffn_width, width)?,
                up: weights.matrix(&name("ffn_up"), ffn_width, width)?,
                down: weights.matrix(&name("ffn_down"), width, ffn_width)?,
            });
        }
        let norm = weights.vector("output_norm.weight", width)?;
        let output = if config.tied {
            None
        } else {
            Some(weights.matrix("output.weight", vocab_size, width)?)
        };
        let left = weights.left();
        if !left.is_empty() {
            return Err(Error::Weights(format!(
                "{} tensors that a LLaMA of this configuration doesn't have: {}",
                left.len(),
                listed(left)
            )));
        }
        Ok(Self { config, embeddings, blocks, norm, output })
    }

    /// Shape and constants.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Bytes held by the matrices.
    pub fn bytes(&self) -> usize {
        let block = |b: &Block| {
            [&b.q, &b.k, &b.v, &b.out, &b.gate, &b.up, &b.down].map(FrozenWeight::bytes)
        };
        self.embeddings.bytes()
            + self.output.as_ref().map_or(0, FrozenWeight::bytes)
            + self.blocks.iter().flat_map(block).sum::<usize>()
    }

    /// An empty cache for [`Self::forward`].
    pub fn new_cache(&self) -> KvCaches {
        KvCaches::new(self.blocks.len())
    }

    /// The table of word embeddings.
    pub fn words(&self) -> &FrozenWeight {
        &self.embeddings
    }

    /// Embeddings `(b, t, d)` to hidden states `(b, t, d)` after the last norm; `layout` says where they stand and what they
    /// see. What comes out at padding means nothing. With a `cache`, the new keys and values are appended to it.
    ///
    /// # Errors
    /// Another width than the model's, or more positions than it knows.
    pub fn forward(
        &self,
        x: &Tensor,
        layout: &Layout,
        mut cache: Option<&mut KvCaches>,
    ) -> Result<Tensor> {
        let LlamaConfig { width, max_len, norm_eps, .. } = self.config;
        layout.check(x, width, max_len)?;
        let mut x = x.clone();
        for (i, block) in self.blocks.iter().enumerate() {
            let cache = cache.as_mut().map(|caches| caches.layer(i));
            x = block.forward(&x, &self.config, layout, cache)?;
        }
        Ok(rms_norm(&x, &self.norm, norm_eps)?)
    }

    /// Hidden states `(…, d)` to logits `(…, v)`. At a vocabulary of 49 152 a position costs
    /// 197 kB, so ask only for the positions that are needed.
    ///
    /// # Errors
    /// Another width than the model's.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(frozen_linear(hidden, self.output.as_ref().unwrap_or(&self.embeddings), None)?)
    }
}

impl Block {
    fn forward(
        &self,
        x: &Tensor,
        config: &LlamaConfig,
        layout: &Layout,
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let LlamaConfig { num_heads, num_kv_heads, head_width, norm_eps, .. } = *config;
        let rotate = |x: &Tensor, heads| {
            rope(x, &layout.positions, heads, config.rope_base, config.rope_style)
        };
        let y = rms_norm(x, &self.attn_norm, norm_eps)?;
        let q = rotate(&frozen_linear(&y, &self.q, None)?, num_heads)?; // (b, t, h·e)
        let k = rotate(&frozen_linear(&y, &self.k, None)?, num_kv_heads)?; // (b, t, g·e)
        let v = frozen_linear(&y, &self.v, None)?;
        let scale = 1.0 / (head_width as f32).sqrt();
        let heads = Heads { heads: num_heads, kv_heads: num_kv_heads, scale };
        let bias = layout.bias.as_ref();
        let y = match cache {
            Some(cache) => {
                cache.append(k, v)?;
                cache.attend(&q, bias, heads, None)?
            }
            None => attention(&q, &k, &v, bias, heads, None)?,
        };
        let x = add(x, &frozen_linear(&y, &self.out, None)?)?;

        let y = rms_norm(&x, &self.ffn_norm, norm_eps)?;
        let gate = frozen_linear(&y, &self.gate, None)?;
        let up = frozen_linear(&y, &self.up, None)?;
        Ok(add(&x, &frozen_linear(&silu_gate(&gate, &up)?, &self.down, None)?)?)
    }
}

// ---- configuration -------------------------------------------------------------------------------

impl LlamaConfig {
    /// The configuration in a GGUF header. `tied`: the file has no `output.weight`.
    ///
    /// # Errors
    /// Another architecture, scaled rotary positions, a missing field or one out of range.
    pub fn from_gguf(metadata: &HashMap<String, Value>, tied: bool) -> Result<Self> {
        let get = |key: &str| {
            metadata.get(key).ok_or_else(|| Error::Config(format!("the GGUF header has no {key}")))
        };
        let optional = |key: &str| -> Result<Option<usize>> {
            match metadata.get(key) {
                Some(value) => Ok(Some(value.to_u64()? as usize)),
                None => Ok(None),
            }
        };
        let number = |key: &str| -> Result<usize> { Ok(get(key)?.to_u64()? as usize) };
        let id = |key: &str| optional(key).map(|id| id.map(|id| id as u32));

        let architecture = get("general.architecture")?.to_string()?;
        if architecture != "llama" {
            return Err(Error::Config(format!("architecture {architecture}, expected llama")));
        }
        if let Some(Value::String(scaling)) = metadata.get("llama.rope.scaling.type")
            && scaling != "none"
        {
            return Err(Error::Config(format!("rotary positions scaled by {scaling}: not known")));
        }
        let (width, num_heads) =
            (number("llama.embedding_length")?, number("llama.attention.head_count")?);
        let head_width = match optional("llama.attention.key_length")? {
            Some(head_width) => head_width,
            None => width / num_heads.max(1),
        };
        let rotated = optional("llama.rope.dimension_count")?.unwrap_or(head_width);
        if rotated != head_width {
            return Err(Error::Config(format!(
                "{rotated} of {head_width} elements of a head rotate; only all of them is known"
            )));
        }
        let vocab_size = match optional("llama.vocab_size")? {
            Some(size) => size,
            None => get("tokenizer.ggml.tokens")?.to_vec()?.len(),
        };
        let eos = id("tokenizer.ggml.eos_token_id")?;
        let config = Self {
            vocab_size,
            width,
            ffn_width: number("llama.feed_forward_length")?,
            depth: number("llama.block_count")?,
            num_heads,
            num_kv_heads: optional("llama.attention.head_count_kv")?.unwrap_or(num_heads),
            head_width,
            norm_eps: f64::from(get("llama.attention.layer_norm_rms_epsilon")?.to_f32()?),
            rope_base: match metadata.get("llama.rope.freq_base") {
                Some(value) => value.to_f32()?,
                None => 10_000.0,
            },
            rope_style: RopeStyle::Interleaved,
            max_len: number("llama.context_length")?,
            tied,
            bos: id("tokenizer.ggml.bos_token_id")?,
            eos: eos.ok_or_else(|| Error::Config("the GGUF header names no end token".into()))?,
        };
        config.check()?;
        Ok(config)
    }

    /// The configuration in a Hugging Face `config.json`.
    ///
    /// # Errors
    /// Not such a file, a missing field, or a variant not known here (biases, scaled rotary
    /// positions, another activation).
    pub fn from_hf(json: &str) -> Result<Self> {
        let hf: HfConfig =
            serde_json::from_str(json).map_err(|e| Error::Config(format!("config.json: {e}")))?;
        let refuse = |what: String| Err(Error::Config(format!("config.json: {what} is not known")));
        if hf.hidden_act != "silu" {
            return refuse(format!("activation {}", hf.hidden_act));
        }
        if hf.attention_bias || hf.mlp_bias {
            return refuse("a LLaMA with biases".into());
        }
        if let Some(scaling) = hf.rope_scaling.filter(|scaling| !scaling.is_null()) {
            return refuse(format!("rope_scaling {scaling}"));
        }
        let eos = match hf.eos_token_id {
            Eos::One(id) => Some(id),
            Eos::Several(ids) => ids.first().copied(),
        };
        let Some(eos) = eos else { return refuse("a model without an end token".into()) };
        let config = Self {
            vocab_size: hf.vocab_size,
            width: hf.hidden_size,
            ffn_width: hf.intermediate_size,
            depth: hf.num_hidden_layers,
            num_heads: hf.num_attention_heads,
            num_kv_heads: hf.num_key_value_heads.unwrap_or(hf.num_attention_heads),
            head_width: match hf.head_dim {
                Some(head_width) => head_width,
                None => hf.hidden_size / hf.num_attention_heads.max(1),
            },
            norm_eps: hf.rms_norm_eps,
            rope_base: hf.rope_theta,
            rope_style: RopeStyle::HalfSplit,
            max_len: hf.max_position_embeddings,
            tied: hf.tie_word_embeddings,
            bos: hf.bos_token_id,
            eos,
        };
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        let refuse = |what: String| Err(Error::Config(format!("LLaMA configuration: {what}")));
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("width", self.width),
            ("ffn_width", self.ffn_width),
            ("depth", self.depth),
            ("num_heads", self.num_heads),
            ("num_kv_heads", self.num_kv_heads),
            ("head_width", self.head_width),
            ("max_len", self.max_len),
        ];
        check_sizes("LLaMA", &sizes)?;
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return refuse(format!(
                "num_heads {} is no multiple of num_kv_heads {}",
                self.num_heads, self.num_kv_heads
            ));
        }
        if !self.head_width.is_multiple_of(2) {
            return refuse(format!("head_width {} is odd", self.head_width));
        }
        if !(self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return refuse(format!("norm_eps {} is not in (0, 1)", self.norm_eps));
        }
        if !(self.rope_base.is_finite() && self.rope_base > 0.0) {
            return refuse(format!("rope_base {} is not above 0", self.rope_base));
        }
        Ok(())
    }
}

/// The fields of a `config.json` that matter here; the rest is for other programs.
#[derive(Deserialize)]
struct HfConfig {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: f64,
    #[serde(default = "default_rope_base")]
    rope_theta: f32,
    rope_scaling: Option<serde_json::Value>,
    max_position_embeddings: usize,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default = "default_activation")]
    hidden_act: String,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    bos_token_id: Option<u32>,
    eos_token_id: Eos,
}

/// One end token, or several, of which the first is the one that training puts there.
#[derive(Deserialize)]
#[serde(untagged)]
enum Eos {
    One(u32),
    Several(Vec<u32>),
}

fn default_rope_base() -> f32 {
    10_000.0
}

fn default_activation() -> String {
    "silu".into()
}

// ---- weights -------------------------------------------------------------------------------------

/// An opened GGUF file: its header is read, its tensors are read when asked for.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    content: Content,
}

impl Gguf {
    /// Reads the header.
    ///
    /// # Errors
    /// No such file, or not a GGUF file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        let mut reader = std::io::BufReader::new(file);
        let content = Content::read(&mut reader).map_err(|e| Error::file(path, e.to_string()))?;
        Ok(Self { path: path.to_path_buf(), content })
    }

    /// The model as Hugging Face describes and names it: `config.json` and tensors in f32, queries and keys in the order that
    /// rotates halves.
    ///
    /// # Errors
    /// As [`Llama::from_gguf`].
    pub fn to_hf(&self) -> Result<(serde_json::Value, BTreeMap<String, Tensor>)> {
        let has_output = self.content.tensor_infos.contains_key("output.weight");
        let config = LlamaConfig::from_gguf(self.metadata(), !has_output)
            .map_err(|e| Error::file(&self.path, e.to_string()))?;
        let mut file = File::open(&self.path).map_err(Error::io(&self.path))?;
        let mut tensors = BTreeMap::new();
        for (name, info) in &self.content.tensor_infos {
            let tensor = info
                .read(&mut file, self.content.tensor_data_offset, &Device::Cpu)
                .and_then(|tensor| tensor.dequantize(&Device::Cpu))
                .map_err(|e| Error::file(&self.path, format!("tensor {name}: {e}")))?;
            let heads = match name.rsplit('.').nth(1) {
                Some("attn_q") => Some(config.num_heads),
                Some("attn_k") => Some(config.num_kv_heads),
                _ => None,
            };
            let tensor = match heads {
                Some(heads) => {
                    let (rows, columns) = tensor.dims2()?;
                    let halves = (heads, rows / heads / 2, 2, columns);
                    tensor.reshape(halves)?.transpose(1, 2)?.reshape((rows, columns))?
                }
                None => tensor,
            };
            tensors.insert(hf_name(name), tensor);
        }
        let json = serde_json::json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"],
            "vocab_size": config.vocab_size, "hidden_size": config.width,
            "intermediate_size": config.ffn_width, "num_hidden_layers": config.depth,
            "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_width, "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_base,
            "max_position_embeddings": config.max_len, "tie_word_embeddings": config.tied,
            "hidden_act": "silu", "attention_bias": false, "mlp_bias": false,
            "bos_token_id": config.bos, "eos_token_id": config.eos, "pad_token_id": config.eos,
        });
        Ok((json, tensors))
    }

    /// The header's fields.
    pub fn metadata(&self) -> &HashMap<String, Value> {
        &self.content.metadata
    }
}

/// Where weights come from. Names are those of GGUF; what was asked for is struck off the list of
/// what is left.
trait Weights {
    fn matrix(&mut self, name: &str, rows: usize, columns: usize) -> Result<FrozenWeight>;
    fn vector(&mut self, name: &str, len: usize) -> Result<Tensor>;
    fn left(&self) -> &BTreeSet<String>;
}

struct GgufWeights<'a> {
    gguf: &'a Gguf,
    file: File,
    format: Option<WeightFormat>,
    left: BTreeSet<String>,
}

impl GgufWeights<'_> {
    fn read(&mut self, name: &str, shape: &[usize]) -> Result<candle_core::quantized::QTensor> {
        let Gguf { path, content } = self.gguf;
        let Some(info) = content.tensor_infos.get(name) else {
            return Err(Error::file(path, format!("no tensor {name}")));
        };
        check_shape(name, info.shape.dims(), shape)
            .map_err(|e| Error::file(path, e.to_string()))?;
        self.left.remove(name);
        info.read(&mut self.file, content.tensor_data_offset, &Device::Cpu)
            .map_err(|e| Error::file(path, format!("tensor {name}: {e}")))
    }
}

impl Weights for GgufWeights<'_> {
    fn matrix(&mut self, name: &str, rows: usize, columns: usize) -> Result<FrozenWeight> {
        let stored = self.read(name, &[rows, columns])?;
        let values = stored.dequantize(&Device::Cpu)?;
        check_finite(name, &values)?;
        Ok(match self.format {
            Some(_) => FrozenWeight::kept(&values, self.format)?,
            None => FrozenWeight::from_qtensor(Arc::new(stored))?,
        })
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Tensor> {
        let values = self.read(name, &[len])?.dequantize(&Device::Cpu)?;
        check_finite(name, &values)?;
        Ok(values)
    }

    fn left(&self) -> &BTreeSet<String> {
        &self.left
    }
}

struct HfWeights<'a, T> {
    tensors: &'a BTreeMap<String, T>,
    format: Option<WeightFormat>,
    left: BTreeSet<String>,
}

impl<T: Clone + Into<Stored>> HfWeights<'_, T> {
    /// In the type that it is stored in.
    fn read(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let name = hf_name(name);
        let Some(tensor) = self.tensors.get(&name) else {
            return Err(Error::Weights(format!("no tensor {name}")));
        };
        let stored: Stored = tensor.clone().into();
        check_shape(&name, &stored.dims(), shape)?;
        let values = stored.load()?;
        check_finite(&name, &values.to_dtype(DType::F32)?)?;
        self.left.remove(&name);
        Ok(values)
    }
}

impl<T: Clone + Into<Stored>> Weights for HfWeights<'_, T> {
    fn matrix(&mut self, name: &str, rows: usize, columns: usize) -> Result<FrozenWeight> {
        Ok(FrozenWeight::kept(&self.read(name, &[rows, columns])?, self.format)?)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Tensor> {
        Ok(self.read(name, &[len])?.to_dtype(DType::F32)?)
    }

    fn left(&self) -> &BTreeSet<String> {
        &self.left
    }
}

/// GGUF's name of a tensor to Hugging Face's.
fn hf_name(name: &str) -> String {
    const TOP: [(&str, &str); 3] = [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("output.weight", "lm_head.weight"),
    ];
    const PARTS: [(&str, &str); 9] = [
        ("attn_norm", "input_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ];
    if let Some((_, hf)) = TOP.iter().find(|(gguf, _)| *gguf == name) {
        return (*hf).to_owned();
    }
    let layer = name.strip_prefix("blk.").and_then(|rest| rest.strip_suffix(".weight"));
    let parts = layer.and_then(|rest| rest.split_once('.'));
    let known = |part: &str| PARTS.iter().find(|(gguf, _)| *gguf == part).map(|(_, hf)| *hf);
    match parts.and_then(|(i, part)| Some((i, known(part)?))) {
        Some((i, part)) => format!("model.layers.{i}.{part}.weight"),
        None => name.to_owned(),
    }
}

fn check_shape(name: &str, shape: &[usize], expected: &[usize]) -> Result<()> {
    if shape == expected {
        return Ok(());
    }
    Err(Error::Weights(format!("tensor {name} has the shape {shape:?}, expected {expected:?}")))
}

fn check_finite(name: &str, values: &Tensor) -> Result<()> {
    let values = values.contiguous()?;
    let (storage, layout) = values.storage_and_layout();
    let Storage::Cpu(cpu) = &*storage else { return Ok(()) };
    let flat = &cpu.as_slice::<f32>()?[layout.start_offset()..][..values.elem_count()];
    match flat.par_iter().position_any(|x| !x.is_finite()) {
        None => Ok(()),
        Some(i) => Err(Error::Weights(format!("tensor {name} is {} at element {i}", flat[i]))),
    }
}

/// Up to eight of the names, and how many more there are.
fn listed(names: &BTreeSet<String>) -> String {
    let shown: Vec<&str> = names.iter().take(8).map(String::as_str).collect();
    match names.len() - shown.len() {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

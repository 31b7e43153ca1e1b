//! The starting point of stage 1: a Q-Former made from a BERT (paper §3.1).

use std::collections::BTreeMap;

use blip2::checkpoint;
use blip2::stage1::Stage1Config;
use candle_core::{Device, Tensor};

use crate::rng::Rng;
use crate::{Error, Result};

/// Deviation of fresh weights, as BERT's.
const STD: f64 = 0.02;
/// Where the temperature starts.
const TEMP: f32 = 0.07;

/// Names and values of a fresh stage-1 model. `bert` is a checkpoint under BERT's own names, or empty for a model from
/// scratch (tests, toy runs).
///
/// From BERT come embeddings, self-attention and the text feed-forward network; each query feed-forward network starts as
/// a copy of the text one; `[DEC]` is a new word; cross-attention, queries and heads are fresh.
///
/// # Errors
/// If BERT's tensors don't have the shapes that `config` wants: the tensor is named.
pub fn stage1(
    config: &Stage1Config,
    bert: BTreeMap<String, Tensor>,
    seed: u64,
) -> Result<BTreeMap<String, Tensor>> {
    let shapes = shapes(config);
    let mut bert = if bert.is_empty() { bert } else { from_bert(bert, &shapes, seed)? };
    let mut tensors = BTreeMap::new();
    for (index, (name, shape)) in shapes.iter().enumerate() {
        let twin = name.replace(".ffn_query.", ".ffn_text.");
        let tensor = match bert.get(&twin) {
            Some(tensor) if tensor.dims() == shape.as_slice() => tensor.clone(),
            Some(tensor) => {
                return Err(Error::Recipe(format!(
                    "BERT's {twin} has shape {:?}, the Q-Former wants {shape:?}",
                    tensor.dims()
                )));
            }
            None => fresh(name, shape, &mut Rng::new(seed, &[index as u64]))?,
        };
        tensors.insert(name.clone(), tensor);
    }
    bert.retain(|name, _| !tensors.contains_key(name));
    if !bert.is_empty() {
        let left: Vec<_> = bert.keys().take(5).collect();
        return Err(Error::Recipe(format!(
            "BERT is deeper than the Q-Former: no place for {left:?}"
        )));
    }
    // Without BERT, too, queries and text start with the same feed-forward network.
    let copies: Vec<_> = tensors
        .iter()
        .filter(|(name, _)| name.contains(".ffn_text."))
        .map(|(name, tensor)| (name.replace(".ffn_text.", ".ffn_query."), tensor.clone()))
        .collect();
    tensors.extend(copies);
    Ok(tensors)
}

/// BERT under our names, with one more word: `[DEC]`.
fn from_bert(
    bert: BTreeMap<String, Tensor>,
    shapes: &BTreeMap<String, Vec<usize>>,
    seed: u64,
) -> Result<BTreeMap<String, Tensor>> {
    const WORDS: &str = "qformer.word_embeddings.weight";
    let mut bert = checkpoint::from_bert(bert)?;
    if let (Some(words), Some(shape)) = (bert.get(WORDS), shapes.get(WORDS))
        && words.dims().len() == 2
        && words.dims()[0] + 1 == shape[0]
    {
        let dec = normal(&[1, words.dims()[1]], &mut Rng::new(seed, &[u64::MAX]))?;
        let words = Tensor::cat(&[words, &dec], 0)?;
        bert.insert(WORDS.into(), words);
    }
    Ok(bert)
}

fn fresh(name: &str, shape: &[usize], rng: &mut Rng) -> Result<Tensor> {
    if name == "temp" {
        return Ok(Tensor::new(TEMP, &Device::Cpu)?);
    }
    if let ["vision_proj" | "text_proj" | "itm_head", "weight"] =
        name.split('.').collect::<Vec<_>>()[..]
    {
        return uniform(shape, rng);
    }
    if name.ends_with("bias") {
        return Ok(Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu)?);
    }
    if shape.len() == 1 {
        return Ok(Tensor::ones(shape, candle_core::DType::F32, &Device::Cpu)?);
    }
    normal(shape, rng)
}

/// The heads start as any linear layer of PyTorch does: uniform within 1/√inputs.
fn uniform(shape: &[usize], rng: &mut Rng) -> Result<Tensor> {
    let bound = 1.0 / (shape[1] as f64).sqrt();
    let values: Vec<f32> =
        (0..shape.iter().product()).map(|_| ((2.0 * rng.uniform() - 1.0) * bound) as f32).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

fn normal(shape: &[usize], rng: &mut Rng) -> Result<Tensor> {
    let values: Vec<f32> =
        (0..shape.iter().product()).map(|_| (rng.normal() * STD) as f32).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// Every tensor of the stage-1 model with its shape.
pub(crate) fn shapes(config: &Stage1Config) -> BTreeMap<String, Vec<usize>> {
    let q = &config.qformer;
    let w = q.width;
    let mut shapes = BTreeMap::new();
    let mut add = |name: String, shape: &[usize]| {
        shapes.insert(name, shape.to_vec());
    };
    let mut module = |name: &str, weight: &[usize]| {
        add(format!("{name}.weight"), weight);
        add(format!("{name}.bias"), &weight[..1]);
    };
    module("ln_vision", &[q.encoder_width]);
    module("vision_proj", &[config.embed_dim, w]);
    module("text_proj", &[config.embed_dim, w]);
    module("itm_head", &[2, w]);
    module("qformer.embed_norm", &[w]);
    module("qformer.lm_head.dense", &[w, w]);
    module("qformer.lm_head.norm", &[w]);
    for i in 0..q.depth {
        let layer = format!("qformer.layers.{i}");
        let mut attention = |name: &str, key_width: usize| {
            for (part, input) in [("q", w), ("k", key_width), ("v", key_width), ("out", w)] {
                module(&format!("{layer}.{name}.{part}"), &[w, input]);
            }
            module(&format!("{layer}.{name}_norm"), &[w]);
        };
        attention("self_attn", w);
        if q.has_cross_attention(i) {
            attention("cross_attn", q.encoder_width);
        }
        for ffn in ["ffn_text", "ffn_query"] {
            module(&format!("{layer}.{ffn}.fc1"), &[q.mlp_width, w]);
            module(&format!("{layer}.{ffn}.fc2"), &[w, q.mlp_width]);
            module(&format!("{layer}.{ffn}.norm"), &[w]);
        }
    }
    add("query_tokens".into(), &[1, q.num_queries, w]);
    add("temp".into(), &[]);
    add("qformer.word_embeddings.weight".into(), &[q.vocab_size, w]);
    add("qformer.position_embeddings.weight".into(), &[q.max_positions, w]);
    add("qformer.lm_head.bias".into(), &[q.vocab_size]);
    shapes
}

/// The starting point of stage 2: what it keeps of stage 1 (`ln_vision`, queries, the query side of the Q-Former), and
/// `llm_proj` (`llm_width`, w): that of an earlier stage 2 if there is one, else a fresh one. `rms`, if given, is how large
/// the elements of its output shall be at first; queries leave their last norm with elements of about 1. `questions` is the
/// number of layers of a bridge that reads questions, too: it keeps what reads them.
///
/// # Errors
/// If the weights hold no queries.
pub fn stage2(
    bridge: &BTreeMap<String, Tensor>,
    llm_width: usize,
    rms: Option<f64>,
    seed: u64,
    questions: Option<usize>,
) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors: BTreeMap<String, Tensor> = bridge
        .iter()
        .filter(|(name, _)| {
            in_stage2(name) || questions.is_some_and(|depth| guides_stage2(name, depth))
        })
        .map(|(n, t)| (n.clone(), t.clone()))
        .collect();
    let width = tensors
        .get("query_tokens")
        .ok_or_else(|| Error::Recipe("the weights to start from hold no query_tokens".into()))?
        .dim(candle_core::D::Minus1)?;
    let earlier = ["llm_proj.weight", "llm_proj.bias"]
        .map(|name| bridge.get(name).map(|tensor| (name.to_owned(), tensor.clone())));
    if let [Some(weight), Some(bias)] = earlier {
        tensors.extend([weight, bias]);
        return Ok(tensors);
    }
    let mut weight = uniform(&[llm_width, width], &mut Rng::new(seed, &[0]))?;
    if let Some(rms) = rms {
        // A uniform number within ±a has a root mean square of a/√3; here a = 1/√width, and width of them add up.
        weight = (weight * (rms * 3f64.sqrt()))?;
    }
    tensors.insert("llm_proj.weight".into(), weight);
    tensors.insert("llm_proj.bias".into(), fresh("bias", &[llm_width], &mut Rng::new(seed, &[1]))?);
    Ok(tensors)
}

/// Whether a stage 2 of `depth` layers that reads questions keeps the stage-1 tensor called `name` for it.
#[must_use]
pub fn guides_stage2(name: &str, depth: usize) -> bool {
    let last = format!("qformer.layers.{}.", depth.saturating_sub(1));
    (name.contains(".ffn_text.") && !name.starts_with(&last))
        || name.starts_with("qformer.word_embeddings.")
        || name.starts_with("qformer.position_embeddings.")
}

/// Whether stage 2 keeps the stage-1 tensor called `name`.
#[must_use]
pub fn in_stage2(name: &str) -> bool {
    let bridge = name.starts_with("qformer.layers.") && !name.contains(".ffn_text.");
    bridge
        || name == "query_tokens"
        || name.starts_with("ln_vision.")
        || name.starts_with("qformer.embed_norm.")
}

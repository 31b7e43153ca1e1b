//! How long a training step takes, stage 1 and stage 2, on synthetic pictures and texts of real shapes: mini's, or `base`, the
//! published Q-Former behind CLIP ViT-L in front of OPT-350m.
//!
//! ```sh
//! cargo run --release -p blip2-train --example bench_step -- 2 step.safetensors [STEPS [f32|bf16 [mini|base]]]
//! ```
//!
//! One stage in a process, as in training. Writes weights and batch to the file, so that `benches/train_step.py`, which calls
//! this, takes the very same step in PyTorch. Prints one JSON object: the loss without dropout, and the seconds of each step with
//! dropout, optimiser included.

#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use blip2::llm::Llm;
use blip2::params::ParamStore;
use blip2::qformer::QFormerConfig;
use blip2::stage1::{Stage1, Stage1Config};
use blip2::stage2::{Stage2, Stage2Config};
use blip2_ops::{
    Communicator, Dropout, MixedPrecision, SingleProcess, WeightFormat, on_computing_thread,
};
use blip2_train::init;
use blip2_train::optim::{AdamW, AdamWConfig, Gradients, clip_factor};
use blip2_train::rng::Rng;
use blip2_train::steps::{
    LlmText, Negatives, Stage1Batch, StepContext, Texts, stage1_with, stage2,
};
use candle_core::{DType, Device, Tensor};
use serde_json::json;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Steps that don't count: memory that a process takes for the first time is cleared by the kernel. Also in train_step.py.
const WARM_UP: u64 = 3;

/// What is trained, and on how much.
struct Shape {
    qformer: QFormerConfig,
    /// Pictures of a batch, tokens per picture, word pieces per text.
    stage1: (usize, usize, usize),
    /// The same for stage 2; its texts are token ids of the language model.
    stage2: (usize, usize, usize),
    /// `config.json` of the language model.
    llm: serde_json::Value,
}

fn shape(name: &str) -> Result<Shape> {
    Ok(match name {
        "mini" => Shape {
            qformer: QFormerConfig {
                width: 384,
                depth: 6,
                mlp_width: 1536,
                num_queries: 16,
                ..QFormerConfig::base(384)
            },
            stage1: (64, 145, 12),
            stage2: (32, 145, 16),
            llm: json!({
                "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
                "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
                "hidden_act": "silu", "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2,
            }),
        },
        "base" => Shape {
            qformer: QFormerConfig::base(1024),
            stage1: (8, 257, 16),
            stage2: (8, 257, 16),
            llm: json!({
                "model_type": "opt", "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24,
                "num_attention_heads": 16, "word_embed_proj_dim": 512, "do_layer_norm_before": false,
            }),
        },
        other => return Err(format!("{other}: mini or base").into()),
    })
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let stage = args.next().ok_or("give the stage, 1 or 2")?;
    let path = args.next().ok_or("give the file for weights and batch")?;
    let steps = args.next().map_or(Ok(4), |n| n.parse())?;
    let _mixed = match args.next().as_deref() {
        None | Some("f32") => None,
        Some("bf16") => Some(MixedPrecision::start().ok_or("no AVX-512 BF16 here")?),
        Some(other) => return Err(format!("{other}: f32 or bf16").into()),
    };
    let shape = shape(args.next().as_deref().unwrap_or("mini"))?;
    let mut dump = HashMap::new();
    let found = match stage.as_str() {
        "1" => bench_stage1(&shape, steps, &mut dump)?,
        "2" => bench_stage2(&shape, steps, &mut dump)?,
        other => return Err(format!("stage {other}: 1 or 2").into()),
    };
    candle_core::safetensors::save(&dump, path)?;
    println!("{found}");
    Ok(())
}

fn config(shape: &Shape) -> Stage1Config {
    let qformer = shape.qformer.clone();
    Stage1Config { qformer, embed_dim: 256, ln_vision_eps: 1e-5, matching_only: false }
}

fn normal(shape: &[usize], seed: u64, scale: f64) -> Result<Tensor> {
    let mut rng = Rng::new(seed, &[]);
    let values: Vec<f32> =
        (0..shape.iter().product()).map(|_| (rng.normal() * scale) as f32).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

fn ids(rows: usize, columns: usize, below: usize, seed: u64) -> Result<Tensor> {
    let mut rng = Rng::new(seed, &[]);
    let ids: Vec<u32> = (0..rows * columns).map(|_| rng.below(below) as u32).collect();
    Ok(Tensor::from_vec(ids, (rows, columns), &Device::Cpu)?)
}

/// Keeps what the other program starts from: weights, copied since steps change them in place, and the batch.
fn keep(
    dump: &mut HashMap<String, Tensor>,
    weights: impl IntoIterator<Item = (String, Tensor)>,
    [patches, ids]: [&Tensor; 2],
) -> Result<()> {
    for (name, tensor) in weights {
        dump.insert(name, tensor.copy()?);
    }
    dump.insert("batch.patches".into(), patches.clone());
    dump.insert("batch.ids".into(), ids.clone());
    Ok(())
}

/// Times whole steps: forward, backward, clipping, AdamW.
fn time(
    params: &ParamStore,
    steps: u64,
    mut loss: impl FnMut(&Dropout) -> blip2_train::Result<Tensor> + Send,
) -> Result<serde_json::Value> {
    let value = loss(&Dropout::off())?.to_scalar::<f32>()?;
    let config =
        AdamWConfig { betas: [0.9, 0.98], eps: 1e-8, weight_decay: 0.05, layer_decay: 1.0 };
    let (mut adamw, mut gradients) = (AdamW::new(params, config), Gradients::new(params)?);
    let mut seconds = Vec::new();
    for step in 0..WARM_UP + steps {
        let begin = Instant::now();
        gradients.clear();
        // As the trainer does.
        let grads = on_computing_thread(|| {
            gradients.collect(1.0, || {
                Ok::<_, blip2_train::Error>(loss(&Dropout::new(step))?.backward()?)
            })
        })?;
        gradients.add(params, &grads, 1.0)?;
        let scale = clip_factor(gradients.norm()?, 1.0);
        adamw.step(params, &gradients, 1e-5, scale)?;
        if step >= WARM_UP {
            seconds.push(begin.elapsed().as_secs_f64());
        }
    }
    Ok(json!({"loss": value, "seconds": seconds}))
}

fn bench_stage1(
    shape: &Shape,
    steps: u64,
    dump: &mut HashMap<String, Tensor>,
) -> Result<serde_json::Value> {
    let (b, p, t) = shape.stage1;
    let config = config(shape);
    let params = ParamStore::new(init::stage1(&config, BTreeMap::new(), 1)?)?;
    let model = params.build(|p| Stage1::new(p, &config))?;
    let patches = normal(&[b, p, config.qformer.encoder_width], 2, 1.0)?;
    let ids = ids(b, t, 30_000, 3)?;
    let texts = Texts { tokens: Tensor::ones((b, t), DType::U8, &Device::Cpu)?, ids: ids.clone() };
    keep(dump, params.to_tensors(), [&patches, &ids])?;
    let ranks: Arc<dyn Communicator> = Arc::new(SingleProcess);
    time(&params, steps, |dropout| {
        let batch = Stage1Batch { patches: &patches, texts: &texts, image_ids: None };
        let rng = Rng::new(4, &[]);
        let mut context =
            StepContext { dropout, smoothing: 0.1, itm_pairs: None, rng, ranks: &ranks };
        // Every pair's wrong partner is the next one, so that both programs judge the same pairs.
        let next: Vec<u32> = (0..b).map(|i| ((i + 1) % b) as u32).collect();
        let negatives = Negatives { images: next.clone(), texts: next };
        let losses = stage1_with(&model, &batch, &mut context, |_, _, _, _| Ok(negatives))?;
        Ok(losses.total)
    })
}

fn bench_stage2(
    shape: &Shape,
    steps: u64,
    dump: &mut HashMap<String, Tensor>,
) -> Result<serde_json::Value> {
    let (b, p, t) = shape.stage2;
    let config = config(shape);
    let weights = language_weights(&shape.llm)?;
    let stored = weights.iter().map(|(name, t)| (name.clone(), t.clone().into())).collect();
    let llm = Llm::from_hf(&shape.llm, stored, WeightFormat::F32, Path::new("the benchmark"))?;
    let stage1 = init::stage1(&config, BTreeMap::new(), 1)?;
    let params = ParamStore::new(init::stage2(&stage1, llm.width(), Some(0.1), 5, None)?)?;
    let config = Stage2Config {
        qformer: config.qformer,
        llm_width: llm.width(),
        ln_vision_eps: config.ln_vision_eps,
        reads_questions: false,
    };
    let model = params.build(|p| Stage2::new(p, &config))?;
    let patches = normal(&[b, p, config.qformer.encoder_width], 6, 1.0)?;
    let ids = ids(b, t, llm.vocab_size(), 7)?;
    let texts: Vec<Vec<LlmText>> = ids
        .to_vec2::<u32>()?
        .into_iter()
        .map(|ids| vec![LlmText { ids, prompt_len: 0, question: Vec::new() }])
        .collect();
    keep(dump, params.to_tensors().into_iter().chain(weights), [&patches, &ids])?;
    time(&params, steps, |dropout| stage2(&model, &llm, &patches, &texts, dropout))
}

/// Random weights for a language model, under transformers' names.
fn language_weights(config: &serde_json::Value) -> Result<BTreeMap<String, Tensor>> {
    let size = |name: &str| config[name].as_u64().map(|n| n as usize).ok_or(format!("no {name}"));
    let mut tensors = BTreeMap::new();
    let mut add = |name: String, shape: &[usize]| -> Result<()> {
        let tensor = match shape {
            [width] if name.ends_with("bias") => Tensor::zeros(*width, DType::F32, &Device::Cpu)?,
            [width] => Tensor::ones(*width, DType::F32, &Device::Cpu)?,
            _ => normal(shape, tensors.len() as u64, 0.02)?,
        };
        tensors.insert(name, tensor);
        Ok(())
    };
    let (w, depth) = (size("hidden_size")?, size("num_hidden_layers")?);
    if config["model_type"] == "llama" {
        let f = size("intermediate_size")?;
        let kv = w / size("num_attention_heads")? * size("num_key_value_heads")?;
        add("model.embed_tokens.weight".into(), &[size("vocab_size")?, w])?;
        add("model.norm.weight".into(), &[w])?;
        for i in 0..depth {
            for (part, shape) in [
                ("input_layernorm", &[w][..]),
                ("post_attention_layernorm", &[w]),
                ("self_attn.q_proj", &[w, w]),
                ("self_attn.k_proj", &[kv, w]),
                ("self_attn.v_proj", &[kv, w]),
                ("self_attn.o_proj", &[w, w]),
                ("mlp.gate_proj", &[f, w]),
                ("mlp.up_proj", &[f, w]),
                ("mlp.down_proj", &[w, f]),
            ] {
                add(format!("model.layers.{i}.{part}.weight"), shape)?;
            }
        }
        return Ok(tensors);
    }
    let (f, words) = (size("ffn_dim")?, size("word_embed_proj_dim")?);
    for (part, shape) in [
        ("embed_tokens", [50272, words]),
        ("embed_positions", [2050, w]),
        ("project_in", [w, words]),
        ("project_out", [words, w]),
    ] {
        add(format!("model.decoder.{part}.weight"), &shape)?;
    }
    for i in 0..depth {
        for (part, shape) in [
            ("self_attn.q_proj", &[w, w][..]),
            ("self_attn.k_proj", &[w, w]),
            ("self_attn.v_proj", &[w, w]),
            ("self_attn.out_proj", &[w, w]),
            ("self_attn_layer_norm", &[w]),
            ("fc1", &[f, w]),
            ("fc2", &[w, f]),
            ("final_layer_norm", &[w]),
        ] {
            let name = format!("model.decoder.layers.{i}.{part}");
            add(format!("{name}.weight"), shape)?;
            add(format!("{name}.bias"), &shape[..1])?;
        }
    }
    Ok(tensors)
}

//! The language side: tokenizers, the LLaMA family and generation.
//!
//! Laws on tiny random models (cached = uncached, padded = unpadded, batch = single, one beam =
//! greedy, many beams = exhaustive search), then goldens on tiny and on real weights. The latter need
//! the parts in the program's cache, or `BLIP2_TEST_SMOLLM2` (the GGUF file) and
//! `BLIP2_TEST_BERT_VOCAB` (a `vocab.txt`), and say so when they are skipped.

#![allow(clippy::unwrap_used, reason = "helpers of tests, too, are tests")]

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use blip2::assets;
use blip2::generate::{
    Beam, EarlyStopping, Hypothesis, Options, RepetitionScope, Sampling, StepModel, Strategy,
    generate,
};
use blip2::llama::{Gguf, Llama, LlamaConfig};
use blip2::llm::{Llm, LlmDecoder};
use blip2::nn::KvCaches;
use blip2::nn::mask::Layout;
use blip2::tokenizer::{MAX_CHARS, Padding, Side, SpecialIds, TextBatch, Tokenizer, Width};
use blip2_ops::{RopeStyle, WeightFormat};
use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{DType, Device, Tensor, Var};

// ---- helpers -------------------------------------------------------------------------------------

/// Numbers in [-1, 1) that depend on the seed alone.
fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

fn random(seed: u64, scale: f32, shape: &[usize]) -> Tensor {
    let values = noise(seed, shape.iter().product());
    let values: Vec<f32> = values.into_iter().map(|x| x * scale).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference, relative to the largest value.
fn difference(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let (a, b) = (flat(a), flat(b));
    let most = b.iter().fold(1e-6f32, |m, x| m.max(x.abs()));
    a.iter().zip(&b).fold(0f32, |m, (x, y)| m.max((x - y).abs())) / most
}

#[track_caller]
fn assert_close(a: &Tensor, b: &Tensor, tolerance: f32) {
    let difference = difference(a, b);
    assert!(difference <= tolerance, "relative difference {difference} > {tolerance}");
}

fn ids(rows: &[&[u32]]) -> Tensor {
    let flat: Vec<u32> = rows.concat();
    Tensor::from_vec(flat, (rows.len(), rows[0].len()), &Device::Cpu).unwrap()
}

fn all_visible(b: usize, t: usize) -> Vec<Vec<bool>> {
    vec![vec![true; t]; b]
}

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(name)
}

fn golden_tensors(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(golden(name), &Device::Cpu).unwrap()
}

fn golden_ids(tensor: &Tensor) -> Vec<u32> {
    let ids: Vec<i64> =
        tensor.to_dtype(DType::I64).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    ids.into_iter().map(|id| id as u32).collect()
}

fn golden_json(name: &str) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(golden(name)).unwrap()).unwrap()
}

fn ids_of(value: &serde_json::Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn tiny_config() -> LlamaConfig {
    LlamaConfig {
        vocab_size: 37,
        width: 20,
        ffn_width: 28,
        depth: 2,
        num_heads: 3,
        num_kv_heads: 1,
        head_width: 6,
        norm_eps: 1e-5,
        rope_base: 100.0,
        rope_style: RopeStyle::HalfSplit,
        max_len: 64,
        tied: true,
        bos: Some(1),
        eos: 2,
    }
}

fn tiny_tensors(config: &LlamaConfig) -> BTreeMap<String, Tensor> {
    let (d, f) = (config.width, config.ffn_width);
    let (q, kv) = (config.num_heads * config.head_width, config.num_kv_heads * config.head_width);
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, d]),
        ("model.norm.weight".to_owned(), vec![d]),
    ];
    for i in 0..config.depth {
        for (name, shape) in [
            ("input_layernorm", vec![d]),
            ("self_attn.q_proj", vec![q, d]),
            ("self_attn.k_proj", vec![kv, d]),
            ("self_attn.v_proj", vec![kv, d]),
            ("self_attn.o_proj", vec![d, q]),
            ("post_attention_layernorm", vec![d]),
            ("mlp.gate_proj", vec![f, d]),
            ("mlp.up_proj", vec![f, d]),
            ("mlp.down_proj", vec![d, f]),
        ] {
            shapes.push((format!("model.layers.{i}.{name}.weight"), shape));
        }
    }
    let tensor = |(seed, (name, shape)): (usize, (String, Vec<usize>))| {
        let tensor = random(seed as u64 + 1, if shape.len() == 1 { 1.0 } else { 0.5 }, &shape);
        (name, tensor)
    };
    shapes.into_iter().enumerate().map(tensor).collect()
}

fn tiny() -> Llama {
    let config = tiny_config();
    Llama::from_hf(config.clone(), &tiny_tensors(&config), WeightFormat::F32).unwrap()
}

// ---- LLaMA: laws ---------------------------------------------------------------------------------

/// Hidden states of embeddings of which `visible` says what holds something, cached positions first.
fn forward(
    llama: &Llama,
    x: &Tensor,
    visible: &[Vec<bool>],
    cache: Option<&mut KvCaches>,
) -> blip2::Result<Tensor> {
    let cached = cache.as_ref().map_or(0, |cache| cache.len());
    llama.forward(x, &Layout::causal(x, visible, cached)?, cache)
}

#[test]
fn cached_equals_uncached() {
    let llama = tiny();
    let x = random(5, 1.0, &[2, 7, 20]);
    let whole = forward(&llama, &x, &all_visible(2, 7), None).unwrap();
    let mut cache = llama.new_cache();
    let mut parts = Vec::new();
    for (start, len) in [(0, 3), (3, 1), (4, 1), (5, 2)] {
        let visible = all_visible(2, start + len);
        let part = x.narrow(1, start, len).unwrap();
        parts.push(forward(&llama, &part, &visible, Some(&mut cache)).unwrap());
    }
    assert_eq!(cache.len(), 7);
    assert_close(&Tensor::cat(&parts, 1).unwrap(), &whole, 1e-5);
}

#[test]
fn padding_changes_nothing_wherever_it_stands() {
    let llama = tiny();
    let x = random(6, 1.0, &[1, 5, 20]);
    let bare = forward(&llama, &x, &all_visible(1, 5), None).unwrap();
    // Visible columns of a row of eight: on the left, on the right, with a hole (queries, pads, text).
    for places in [[3, 4, 5, 6, 7], [0, 1, 2, 3, 4], [0, 1, 5, 6, 7]] {
        let mut rows: Vec<Tensor> = (0..8).map(|i| random(90 + i, 1.0, &[1, 1, 20])).collect();
        let mut visible = vec![false; 8];
        for (i, place) in places.into_iter().enumerate() {
            rows[place] = x.narrow(1, i, 1).unwrap();
            visible[place] = true;
        }
        let padded = Tensor::cat(&rows, 1).unwrap();
        let hidden = forward(&llama, &padded, &[visible], None).unwrap();
        assert!(flat(&hidden).iter().all(|x| x.is_finite()));
        let places: Vec<u32> = places.into_iter().map(|p| p as u32).collect();
        let places = Tensor::new(places, &Device::Cpu).unwrap();
        assert_close(&hidden.index_select(&places, 1).unwrap(), &bare, 1e-5);
    }
}

#[test]
fn a_row_does_not_see_its_neighbours_or_its_future() {
    let llama = tiny();
    let x = random(7, 1.0, &[3, 6, 20]);
    let all = forward(&llama, &x, &all_visible(3, 6), None).unwrap();
    let one = x.narrow(0, 1, 1).unwrap().narrow(1, 0, 4).unwrap();
    let one = forward(&llama, &one, &all_visible(1, 4), None).unwrap();
    assert_close(&one, &all.narrow(0, 1, 1).unwrap().narrow(1, 0, 4).unwrap(), 1e-5);
}

#[test]
fn the_gradient_reaches_the_embeddings_and_is_right() {
    let llama = tiny();
    let visible = vec![vec![true; 5], vec![false, false, true, true, true]];
    let picked = random(9, 1.0, &[2, 5, 37]);
    let loss = |x: &Tensor| {
        let logits = llama.logits(&forward(&llama, x, &visible, None).unwrap()).unwrap();
        // Only what stands at visible places means anything.
        let logits = logits.narrow(1, 2, 3).unwrap();
        (logits * picked.narrow(1, 2, 3).unwrap()).unwrap().sum_all().unwrap()
    };
    let x = Var::from_tensor(&random(8, 1.0, &[2, 5, 20])).unwrap();
    let gradients = loss(x.as_tensor()).backward().unwrap();
    let gradient = flat(gradients.get(&x).expect("a gradient for the embeddings"));
    let values = flat(x.as_tensor());
    let most = gradient.iter().fold(0f32, |m, g| m.max(g.abs()));
    assert!(most > 0.1);
    for at in [0, 19, 43, 77, 99, 140, 160, 199] {
        let moved = |by: f32| {
            let mut values = values.clone();
            values[at] += by;
            let x = Tensor::from_vec(values, (2, 5, 20), &Device::Cpu).unwrap();
            f64::from(loss(&x).to_scalar::<f32>().unwrap())
        };
        let numeric = ((moved(1e-2) - moved(-1e-2)) / 2e-2) as f32;
        let error = (numeric - gradient[at]).abs() / most;
        assert!(error < 5e-3, "element {at}: {} by hand, {numeric} by difference", gradient[at]);
    }
    // Masked columns get none.
    assert!(gradient[100..140].iter().all(|g| *g == 0.0));
}

/// GGUF stores query and key rows permuted for interleaved rotation; both readings are one model.
#[test]
fn a_gguf_file_is_the_same_model_as_the_tensors_it_was_made_of() {
    let config = tiny_config();
    let tensors = tiny_tensors(&config);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    write_gguf(&path, &config, &tensors, "llama");
    let gguf = Gguf::open(&path).unwrap();
    let ours = Llama::from_gguf(&gguf, None).unwrap();
    assert_eq!(ours.config().rope_style, RopeStyle::Interleaved);
    assert_eq!(ours.config().num_kv_heads, 1);

    let x = random(10, 1.0, &[2, 6, 20]);
    let run = |llama: &Llama| {
        let hidden = forward(llama, &x, &all_visible(2, 6), None).unwrap();
        llama.logits(&hidden).unwrap()
    };
    assert_close(&run(&ours), &run(&tiny()), 1e-5);
    let half = Llama::from_gguf(&gguf, Some(WeightFormat::F16)).unwrap();
    assert!(half.bytes() * 2 == ours.bytes());
    assert_close(&run(&half), &run(&ours), 1e-2);

    let wrong = folder.path().join("wrong.gguf");
    write_gguf(&wrong, &config, &tensors, "mamba");
    let error = Llama::from_gguf(&Gguf::open(&wrong).unwrap(), None).err().unwrap().to_string();
    assert!(error.contains("wrong.gguf") && error.contains("mamba"), "{error}");
}

fn write_gguf(
    path: &std::path::Path,
    config: &LlamaConfig,
    tensors: &BTreeMap<String, Tensor>,
    architecture: &str,
) {
    let parts = [
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    let mut stored = Vec::new();
    for (name, tensor) in tensors {
        let renamed = match name.as_str() {
            "model.embed_tokens.weight" => "token_embd.weight".to_owned(),
            "model.norm.weight" => "output_norm.weight".to_owned(),
            other => {
                let rest = other.strip_prefix("model.layers.").unwrap();
                let (layer, rest) = rest.split_once('.').unwrap();
                let part = rest.strip_suffix(".weight").unwrap();
                let (_, to) = parts.iter().find(|(from, _)| *from == part).unwrap();
                format!("blk.{layer}.{to}.weight")
            }
        };
        let mut tensor = tensor.clone();
        if name.contains("q_proj") || name.contains("k_proj") {
            // (heads, 2, half, in) → (heads, half, 2, in)
            let (rows, columns) = tensor.dims2().unwrap();
            let e = config.head_width;
            let split = tensor.reshape((rows / e, 2, e / 2, columns)).unwrap();
            tensor = split.transpose(1, 2).unwrap().reshape((rows, columns)).unwrap();
        }
        stored.push((renamed, QTensor::quantize(&tensor, GgmlDType::F32).unwrap()));
    }
    let n = |x: usize| Value::U32(x as u32);
    let metadata = [
        ("general.architecture", Value::String(architecture.into())),
        ("llama.block_count", n(config.depth)),
        ("llama.context_length", n(config.max_len)),
        ("llama.embedding_length", n(config.width)),
        ("llama.feed_forward_length", n(config.ffn_width)),
        ("llama.attention.head_count", n(config.num_heads)),
        ("llama.attention.head_count_kv", n(config.num_kv_heads)),
        ("llama.attention.key_length", n(config.head_width)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(config.norm_eps as f32)),
        ("llama.rope.freq_base", Value::F32(config.rope_base)),
        ("llama.vocab_size", n(config.vocab_size)),
        ("tokenizer.ggml.bos_token_id", n(1)),
        ("tokenizer.ggml.eos_token_id", n(2)),
    ];
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<(&str, &QTensor)> =
        stored.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut file = std::fs::File::create(path).unwrap();
    gguf_file::write(&mut file, &metadata, &tensors).unwrap();
}

#[test]
fn weights_that_do_not_fit_are_named() {
    let config = tiny_config();
    let refused = |change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        let mut tensors = tiny_tensors(&config);
        change(&mut tensors);
        Llama::from_hf(config.clone(), &tensors, WeightFormat::F32).err().unwrap().to_string()
    };
    let name = "model.layers.1.mlp.up_proj.weight";
    let missing = refused(&|tensors| drop(tensors.remove(name)));
    assert!(missing.contains(name), "{missing}");
    let shape = refused(&|tensors| drop(tensors.insert(name.into(), random(1, 1.0, &[27, 20]))));
    assert!(shape.contains(name) && shape.contains("[27, 20]"), "{shape}");
    let extra =
        refused(&|tensors| drop(tensors.insert("lm_head.weight".into(), random(1, 1.0, &[2]))));
    assert!(extra.contains("lm_head.weight"), "{extra}");
    let nan = refused(&|tensors| {
        let mut values = noise(1, 28 * 20);
        values[31] = f32::NAN;
        tensors.insert(name.into(), Tensor::from_vec(values, (28, 20), &Device::Cpu).unwrap());
    });
    assert!(nan.contains(name) && nan.contains("NaN"), "{nan}");
}

#[test]
fn wrong_input_is_an_error_not_a_panic() {
    let llama = tiny();
    let error = |r: blip2::Result<Tensor>| r.err().unwrap().to_string();
    let x = random(1, 1.0, &[1, 3, 20]);
    assert!(error(forward(&llama, &x, &all_visible(1, 4), None)).contains("mask"));
    assert!(error(forward(&llama, &x, &all_visible(2, 3), None)).contains("mask"));
    let narrow = random(1, 1.0, &[1, 3, 19]);
    assert!(error(forward(&llama, &narrow, &all_visible(1, 3), None)).contains("19"));
    let long = random(1, 1.0, &[1, 65, 20]);
    assert!(error(forward(&llama, &long, &all_visible(1, 65), None)).contains("65"));
    let llm = Llm::Llama(llama);
    assert!(error(llm.embed(&ids(&[&[3, 37]]))).contains("37"));
    assert!(LlmDecoder::new(&llm, x.clone(), vec![vec![false; 3]]).is_err());
    assert!(LlmDecoder::new(&llm, x, vec![vec![true; 2]]).is_err());
}

#[test]
fn hugging_face_configurations() {
    let json = r#"{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
        "rope_theta": 100000, "rope_scaling": null, "max_position_embeddings": 8192,
        "tie_word_embeddings": true, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2}"#;
    let config = LlamaConfig::from_hf(json).unwrap();
    assert_eq!((config.head_width, config.rope_base, config.tied), (64, 100_000.0, true));
    let scaled = json.replace("null", r#"{"rope_type": "llama3"}"#);
    assert!(LlamaConfig::from_hf(&scaled).unwrap_err().to_string().contains("rope_scaling"));
    let uneven = json.replace("\"num_key_value_heads\": 3", "\"num_key_value_heads\": 2");
    assert!(LlamaConfig::from_hf(&uneven).unwrap_err().to_string().contains("num_kv_heads"));
}

// ---- generation: laws on a table -----------------------------------------------------------------

/// A model whose next-token logits are noise that depends on the picture and the text so far.
struct Oracle {
    vocab: usize,
    rows: Vec<(u64, Vec<u32>)>,
    steps: usize,
}

impl Oracle {
    fn new(vocab: usize, items: &[u64]) -> Self {
        Self { vocab, rows: items.iter().map(|i| (*i, vec![])).collect(), steps: 0 }
    }

    fn logits(vocab: usize, item: u64, text: &[u32]) -> Vec<f32> {
        let seed = text.iter().fold(item + 17, |s, t| s.wrapping_mul(31) + u64::from(*t) + 1);
        noise(seed.wrapping_mul(0x5851_f42d_4c95_7f2d), vocab).iter().map(|x| 3.0 * x).collect()
    }

    fn all(&self) -> blip2::Result<Tensor> {
        let rows: Vec<f32> =
            self.rows.iter().flat_map(|(i, text)| Self::logits(self.vocab, *i, text)).collect();
        Ok(Tensor::from_vec(rows, (self.rows.len(), self.vocab), &Device::Cpu)?)
    }
}

impl StepModel for Oracle {
    fn start(&mut self) -> blip2::Result<Tensor> {
        self.all()
    }
    fn step(&mut self, ids: &[u32]) -> blip2::Result<Tensor> {
        self.steps += 1;
        assert_eq!(ids.len(), self.rows.len());
        self.rows.iter_mut().zip(ids).for_each(|((_, text), id)| text.push(*id));
        self.all()
    }
    fn reorder(&mut self, rows: &[usize]) -> blip2::Result<()> {
        self.rows = rows.iter().map(|row| self.rows[*row].clone()).collect();
        Ok(())
    }
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let total: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
    logits.iter().map(|x| f64::from(*x) - total.ln()).collect()
}

fn run(vocab: usize, items: &[u64], options: &Options) -> Vec<Vec<Hypothesis>> {
    generate(&mut Oracle::new(vocab, items), items.len(), options).unwrap()
}

fn beams(num_beams: usize, length_penalty: f32, early_stopping: EarlyStopping) -> Strategy {
    Strategy::Beam(Beam { num_beams, length_penalty, early_stopping })
}

fn with(strategy: Strategy) -> Options {
    Options { strategy, max_new_tokens: 8, eos: vec![3], ..Options::default() }
}

#[test]
fn greedy_takes_the_likeliest_and_stops_at_the_end_token() {
    for item in 0..20 {
        let options = with(Strategy::Greedy);
        let found = &run(11, &[item], &options)[0][0];
        let (mut text, mut score) = (vec![], 0.0);
        while text.len() < 8 && text.last() != Some(&3) {
            let scores = log_softmax(&Oracle::logits(11, item, &text));
            let best = (0..11).max_by(|a, b| scores[*a].total_cmp(&scores[*b])).unwrap();
            score += scores[best];
            text.push(best as u32);
        }
        assert_eq!(found.tokens, text);
        assert!((f64::from(found.score) - score).abs() < 1e-4);
    }
}

#[test]
fn one_beam_is_greedy() {
    let items: Vec<u64> = (0..9).collect();
    let greedy = run(11, &items, &with(Strategy::Greedy));
    let beam = run(11, &items, &with(beams(1, 1.0, EarlyStopping::Heuristic)));
    assert_eq!(greedy, beam);
}

#[test]
fn a_batch_is_its_pictures_one_by_one() {
    let items = [4, 8, 15, 16, 23, 42];
    let sampling = Sampling { temperature: 1.3, top_k: 7, top_p: 0.95, seed: 5 };
    let strategies = [
        (Strategy::Greedy, 1),
        (beams(3, 1.0, EarlyStopping::Heuristic), 3),
        (beams(4, -1.0, EarlyStopping::Never), 2),
        (beams(2, 0.0, EarlyStopping::Always), 1),
        (Strategy::Sample(sampling), 3),
        (Strategy::BeamSample(Beam { num_beams: 3, ..Beam::default() }, sampling), 2),
    ];
    for (strategy, num_return) in strategies {
        let options = Options { num_return, ..with(strategy) };
        let together = run(13, &items, &options);
        for (item, found) in items.iter().zip(&together) {
            assert_eq!(found.len(), num_return);
            assert_eq!(&run(13, &[*item], &options)[0], found, "{options:?}");
        }
    }
}

/// With room for every prefix, beam search is the exhaustive search it approximates.
#[test]
fn enough_beams_find_the_best_of_all_texts() {
    let (vocab, eos, longest) = (5usize, 3u32, 4usize);
    for item in 0..10u64 {
        for penalty in [0.0f32, 1.0, -1.0] {
            let mut all: Vec<(f64, Vec<u32>)> = Vec::new();
            let mut open: Vec<(f64, Vec<u32>)> = vec![(0.0, vec![])];
            while let Some((score, text)) = open.pop() {
                let next = log_softmax(&Oracle::logits(vocab, item, &text));
                for token in 0..vocab as u32 {
                    let longer = [&text[..], &[token]].concat();
                    let score = score + next[token as usize];
                    if token == eos || longer.len() == longest {
                        let length = (longer.len() as f64).powf(f64::from(penalty));
                        all.push((score / length, longer));
                    } else {
                        open.push((score, longer));
                    }
                }
            }
            all.sort_by(|a, b| b.0.total_cmp(&a.0));
            let options = Options {
                max_new_tokens: longest,
                num_return: 3,
                eos: vec![eos],
                strategy: beams(300, penalty, EarlyStopping::Never),
                ..Options::default()
            };
            let found = &run(vocab, &[item], &options)[0];
            for (found, (score, text)) in found.iter().zip(&all) {
                assert_eq!(&found.tokens, text, "item {item}, penalty {penalty}");
                assert!((f64::from(found.score) - score).abs() < 1e-4);
            }
        }
    }
}

#[test]
fn no_end_token_before_the_minimum_and_none_after_the_maximum() {
    let strategies = [Strategy::Greedy, beams(3, -2.0, EarlyStopping::Heuristic)];
    for strategy in strategies {
        let options = Options { min_new_tokens: 5, ..with(strategy) };
        for found in run(5, &(0..30).collect::<Vec<_>>(), &options) {
            let tokens = &found[0].tokens;
            assert!((5..=8).contains(&tokens.len()));
            assert!(!tokens[..4].contains(&3));
            assert!(tokens.len() == 8 || tokens.last() == Some(&3));
        }
    }
}

/// While some id is still unused, of 40 a few always have a positive logit.
#[test]
fn a_great_repetition_penalty_forbids_repetition() {
    let options =
        Options { repetition_penalty: 1e6, max_new_tokens: 8, eos: vec![], ..Options::default() };
    for found in run(40, &(0..20).collect::<Vec<_>>(), &options) {
        let mut tokens = found[0].tokens.clone();
        tokens.sort_unstable();
        tokens.dedup();
        assert_eq!(tokens.len(), 8);
    }
}

#[test]
fn sampling_follows_the_distribution_it_is_given() {
    let sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 11 };
    let n = 20_000;
    let options = Options {
        strategy: Strategy::Sample(sampling),
        num_return: n,
        max_new_tokens: 1,
        ..Options::default()
    };
    let count = |options: &Options| {
        let mut counts = [0usize; 9];
        for found in &run(9, &[2], options)[0] {
            counts[found.tokens[0] as usize] += 1;
        }
        counts
    };
    let expected: Vec<f64> =
        log_softmax(&Oracle::logits(9, 2, &[])).into_iter().map(f64::exp).collect();
    for (count, p) in count(&options).into_iter().zip(&expected) {
        let deviation = (p * (1.0 - p) / n as f64).sqrt();
        assert!((count as f64 / n as f64 - p).abs() < 4.0 * deviation + 1e-4);
    }
    // The two likeliest only, whether by number or by probability.
    let mut order: Vec<usize> = (0..9).collect();
    order.sort_by(|a, b| expected[*b].total_cmp(&expected[*a]));
    let top_p = (expected[order[0]] + 1e-3) as f32;
    for trimmed in [Sampling { top_k: 2, ..sampling }, Sampling { top_p, ..sampling }] {
        let counts = count(&Options { strategy: Strategy::Sample(trimmed), ..options.clone() });
        let (a, b) = (counts[order[0]], counts[order[1]]);
        assert_eq!(a + b, n);
        let share = expected[order[0]] / (expected[order[0]] + expected[order[1]]);
        assert!((a as f64 / n as f64 - share).abs() < 0.02);
    }
}

#[test]
fn a_seed_is_a_text() {
    let sample = |seed| {
        let strategy = Strategy::Sample(Sampling { seed, ..Sampling::default() });
        run(40, &[9], &Options { num_return: 4, ..with(strategy) })
    };
    assert_eq!(sample(1), sample(1));
    assert_ne!(sample(1), sample(2));
    assert_ne!(sample(1)[0][0].tokens, sample(1)[0][1].tokens);
}

#[test]
fn finished_rows_leave_the_batch() {
    let mut model = Oracle::new(4, &[0, 1, 2, 3, 4, 5]);
    let found = generate(&mut model, 6, &with(Strategy::Greedy)).unwrap();
    let longest = found.iter().map(|f| f[0].tokens.len()).max().unwrap();
    let shortest = found.iter().map(|f| f[0].tokens.len()).min().unwrap();
    assert!(shortest < longest, "the test wants texts of different lengths");
    assert_eq!(model.steps, longest - 1);
    assert!(model.rows.len() < 6);
}

#[test]
fn options_out_of_range_are_refused() {
    let refused = |options: Options| {
        generate(&mut Oracle::new(5, &[1]), 1, &options).unwrap_err().to_string()
    };
    let base = Options::default;
    assert!(refused(Options { max_new_tokens: 0, ..base() }).contains("max_new_tokens"));
    assert!(refused(Options { min_new_tokens: 31, ..base() }).contains("31"));
    assert!(refused(Options { repetition_penalty: 0.0, ..base() }).contains("repetition"));
    assert!(refused(Options { num_return: 2, ..base() }).contains("num_return"));
    assert!(refused(with(beams(0, 1.0, EarlyStopping::Never))).contains("num_beams"));
    let cold = Sampling { temperature: 0.0, ..Sampling::default() };
    assert!(refused(with(Strategy::Sample(cold))).contains("temperature"));
    let nothing = Sampling { top_p: 0.0, ..Sampling::default() };
    assert!(refused(with(Strategy::Sample(nothing))).contains("top_p"));
    assert!(generate(&mut Oracle::new(5, &[1]), 2, &base()).is_err(), "one row for two pictures");
    assert_eq!(run(5, &[], &base()).len(), 0);
}

// ---- generation: a language model behind it ------------------------------------------------------

#[test]
fn a_left_padded_batch_of_prompts_is_its_prompts_one_by_one() {
    let llm = Llm::Llama(tiny());
    let prompts: [&[u32]; 3] = [&[1, 9, 9, 14], &[1, 30], &[1, 5, 6, 7, 8, 22]];
    let rows: Vec<Vec<u32>> = prompts.iter().map(|p| p.to_vec()).collect();
    let strategies = [
        Strategy::Greedy,
        beams(3, 1.0, EarlyStopping::Heuristic),
        beams(4, -1.0, EarlyStopping::Never),
    ];
    for strategy in strategies {
        let options = Options { max_new_tokens: 9, eos: vec![2], strategy, ..Options::default() };
        let texts = |rows: &[Vec<u32>], side| {
            let batch = TextBatch::new(rows, 2, side, 0).unwrap();
            let embeds = llm.embed(&batch.ids).unwrap();
            let mut decoder = LlmDecoder::new(&llm, embeds, batch.mask).unwrap();
            generate(&mut decoder, rows.len(), &options).unwrap()
        };
        let together = texts(&rows, Side::Left);
        let right = texts(&rows, Side::Right);
        for ((row, together), right) in rows.iter().zip(&together).zip(&right) {
            let alone = &texts(std::slice::from_ref(row), Side::Left)[0];
            for other in [together, right] {
                assert_eq!(alone[0].tokens, other[0].tokens);
                assert!((alone[0].score - other[0].score).abs() < 1e-4);
            }
        }
    }
}

/// Decoding with a cache that beams reorder equals reading each whole text anew.
#[test]
fn cached_beams_equal_rereading() {
    struct Reread<'a> {
        llm: &'a Llm,
        rows: Vec<Vec<u32>>,
    }
    impl StepModel for Reread<'_> {
        fn start(&mut self) -> blip2::Result<Tensor> {
            let t = self.rows[0].len();
            let batch = TextBatch::new(&self.rows, 2, Side::Left, 0)?;
            let hidden = self.llm.hidden(&self.llm.embed(&batch.ids)?, &batch.mask, None)?;
            self.llm.logits(&hidden.narrow(1, t - 1, 1)?.squeeze(1)?)
        }
        fn step(&mut self, ids: &[u32]) -> blip2::Result<Tensor> {
            self.rows.iter_mut().zip(ids).for_each(|(row, id)| row.push(*id));
            self.start()
        }
        fn reorder(&mut self, rows: &[usize]) -> blip2::Result<()> {
            self.rows = rows.iter().map(|row| self.rows[*row].clone()).collect();
            Ok(())
        }
    }
    let llm = Llm::Llama(tiny());
    let rows = vec![vec![1, 4, 5], vec![1, 20, 30]];
    let options = Options {
        max_new_tokens: 10,
        num_return: 4,
        eos: vec![2],
        strategy: beams(4, 0.5, EarlyStopping::Heuristic),
        ..Options::default()
    };
    let anew = generate(&mut Reread { llm: &llm, rows: rows.clone() }, 2, &options).unwrap();
    let batch = TextBatch::new(&rows, 2, Side::Left, 0).unwrap();
    let prompt = llm.embed(&batch.ids).unwrap();
    let mut decoder = LlmDecoder::new(&llm, prompt, batch.mask).unwrap();
    let cached = generate(&mut decoder, 2, &options).unwrap();
    for (a, b) in anew.iter().flatten().zip(cached.iter().flatten()) {
        assert_eq!(a.tokens, b.tokens);
        assert!((a.score - b.score).abs() < 1e-4);
    }
}

/// The tiny LLaMA of the goldens called `name`.
fn golden_llama(name: &str) -> Llama {
    let about = golden_json("generate.json");
    let mut config = about["shape"].clone();
    config["vocab_size"] = about["vocabulary"][name].clone();
    config["num_hidden_layers"] = 2.into();
    config["bos_token_id"] = 1.into();
    config["eos_token_id"] = 2.into();
    let config = LlamaConfig::from_hf(&config.to_string()).unwrap();
    let prefix = format!("{name}.");
    let tensors = golden_tensors("llama_tiny.safetensors");
    let own = |(key, tensor): (String, Tensor)| Some((key.strip_prefix(&prefix)?.into(), tensor));
    Llama::from_hf(config, &tensors.into_iter().filter_map(own).collect(), WeightFormat::F32)
        .unwrap()
}

#[test]
fn a_forward_pass_is_transformers() {
    let golden = golden_tensors("llama_tiny.safetensors");
    for name in ["small", "wide"] {
        let llm = Llm::Llama(golden_llama(name));
        let get = |part: &str| &golden[&format!("forward.{name}.{part}")];
        let ids = get("ids").to_dtype(DType::U32).unwrap();
        let (b, t) = ids.dims2().unwrap();
        let x = llm.embed(&ids).unwrap();
        assert_close(&x, get("hidden.0"), 1e-6);
        let hidden = llm.hidden(&x, &all_visible(b, t), None).unwrap();
        assert_close(&hidden, get("hidden.2"), 1e-5);
        assert_close(&llm.logits(&hidden).unwrap(), get("logits"), 1e-5);
    }
}

/// Greedy and beam search from left-padded prompts, in 58 settings.
#[test]
fn decoding_is_transformers() {
    let prompts = golden_tensors("generate.safetensors");
    let mask: Vec<Vec<bool>> = prompts["mask"]
        .to_vec2::<i64>()
        .unwrap()
        .into_iter()
        .map(|row| row.into_iter().map(|m| m == 1).collect())
        .collect();
    let about = golden_json("generate.json");
    let mut seen = 0;
    for case in about["cases"].as_array().unwrap() {
        let llm = Llm::Llama(golden_llama(case["model"].as_str().unwrap()));
        let settings = &case["settings"];
        let whole = |key: &str, or: u64| settings[key].as_u64().unwrap_or(or) as usize;
        let real = |key: &str| settings[key].as_f64().unwrap_or(1.0) as f32;
        let num_beams = whole("num_beams", 1);
        let early = match &settings["early_stopping"] {
            serde_json::Value::Bool(true) => EarlyStopping::Always,
            serde_json::Value::String(never) if never == "never" => EarlyStopping::Never,
            _ => EarlyStopping::Heuristic,
        };
        let greedy = num_beams == 1;
        let options = Options {
            strategy: if greedy {
                Strategy::Greedy
            } else {
                beams(num_beams, real("length_penalty"), early)
            },
            max_new_tokens: about["max_new_tokens"].as_u64().unwrap() as usize,
            min_new_tokens: whole("min_new_tokens", 0),
            repetition_penalty: real("repetition_penalty"),
            repetition_scope: RepetitionScope::All,
            num_return: whole("num_return_sequences", 1),
            eos: match &settings["eos_token_id"] {
                serde_json::Value::Array(_) => ids_of(&settings["eos_token_id"]),
                one => vec![one.as_u64().unwrap() as u32],
            },
        };
        let prompt = prompts["embeds"].clone();
        let mut decoder = LlmDecoder::new(&llm, prompt, mask.clone()).unwrap();
        let found = generate(&mut decoder, 3, &options).unwrap().concat();
        let expected: Vec<Vec<u32>> = serde_json::from_value(case["tokens"].clone()).unwrap();
        let tokens: Vec<Vec<u32>> = found.iter().map(|h| h.tokens.clone()).collect();
        assert_eq!(tokens, expected, "{settings}");
        let scores = case["scores"].as_array().map_or(&[][..], |scores| scores);
        assert_eq!(scores.is_empty(), greedy);
        for (found, score) in found.iter().zip(scores) {
            let score = score.as_f64().unwrap() as f32;
            let error = (found.score - score).abs() / score.abs().max(1.0);
            assert!(error < 1e-4, "{settings}: score {} for {score}", found.score);
        }
        seen += 1;
    }
    assert_eq!(seen, 58);
}

// ---- tokenizers ----------------------------------------------------------------------------------

const VOCAB: &str =
    "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\ndog\ncat\n##s\n'\ns\n.\n,\n中\nrun\n##ning\ncafe\n";

#[test]
fn word_pieces() {
    let tokenizer = Tokenizer::from_wordpiece_vocab(VOCAB.as_bytes()).unwrap();
    assert_eq!(tokenizer.special(), SpecialIds { bos: Some(17), eos: 3, pad: 0 });
    assert_eq!(tokenizer.vocab_size(), 18);
    let encode = |text| tokenizer.encode(text, false).unwrap();
    assert_eq!(encode("A dog, cats."), [5, 6, 12, 7, 8, 11]);
    assert_eq!(encode("RUNNING  Café\n中中"), [14, 15, 16, 13, 13]);
    assert_eq!(encode("zebra dog's"), [1, 6, 9, 10]);
    assert!(encode("").is_empty());
    assert_eq!(tokenizer.encode("a dog", true).unwrap(), [2, 5, 6, 3]);
    let ids = tokenizer.encode("The dog's cats, running.", true).unwrap();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "dog's cats, running.");
    assert_eq!(tokenizer.decode(&[17, 5, 6, 3], false).unwrap(), "[DEC] a dog [SEP]");
    let broken = Tokenizer::from_wordpiece_vocab(b"[PAD]\na\n").err().unwrap().to_string();
    assert!(broken.contains("[CLS]"), "{broken}");
}

#[test]
fn batches_are_cut_and_padded() {
    let tokenizer = Tokenizer::from_wordpiece_vocab(VOCAB.as_bytes()).unwrap();
    let batch = |padding| {
        let batch = tokenizer.encode_batch(&["a dog a dog a", "cat"], true, padding).unwrap();
        (batch.ids.to_vec2::<u32>().unwrap(), batch.mask)
    };
    let mut padding = Padding { max_len: 5, side: Side::Right, width: Width::Longest };
    let (ids, mask) = batch(padding);
    assert_eq!(ids, [[2, 5, 6, 5, 3], [2, 7, 3, 0, 0]]);
    assert_eq!(mask[1], [true, true, true, false, false]);
    padding.side = Side::Left;
    let (ids, mask) = batch(padding);
    assert_eq!(ids[1], [0, 0, 2, 7, 3]);
    assert_eq!(mask[1], [false, false, true, true, true]);
    padding = Padding { max_len: 9, side: Side::Right, width: Width::Max };
    assert_eq!(batch(padding).0[0], [2, 5, 6, 5, 6, 5, 3, 0, 0]);
    padding.max_len = 2;
    assert!(tokenizer.encode_batch(&["a"], true, padding).is_err());
    padding = Padding { max_len: 9, side: Side::Left, width: Width::Longest };
    assert!(tokenizer.encode_batch::<&str>(&[], true, padding).is_err());
}

#[test]
fn texts_have_a_longest() {
    let tokenizer = Tokenizer::from_wordpiece_vocab(VOCAB.as_bytes()).unwrap();
    assert!(tokenizer.encode(&"é ".repeat(MAX_CHARS / 2), false).is_ok());
    let error = tokenizer.encode(&"a".repeat(MAX_CHARS + 1), false).unwrap_err().to_string();
    assert!(error.contains("65537") && error.contains("65536"), "{error}");
}

fn byte_metadata(merges: &[&str]) -> HashMap<String, Value> {
    let string = |s: &str| Value::String(s.into());
    let tokens = ["<|end|>", "a", "b", "Ġ", "1", "2", "ab", "Ġab", "c"];
    let mut kinds = vec![Value::I32(1); tokens.len()];
    kinds[0] = Value::I32(3);
    HashMap::from([
        ("tokenizer.ggml.model".into(), string("gpt2")),
        ("tokenizer.ggml.pre".into(), string("smollm")),
        ("tokenizer.ggml.tokens".into(), Value::Array(tokens.map(string).to_vec())),
        ("tokenizer.ggml.token_type".into(), Value::Array(kinds)),
        ("tokenizer.ggml.merges".into(), Value::Array(merges.iter().map(|m| string(m)).collect())),
        ("tokenizer.ggml.eos_token_id".into(), Value::U32(0)),
        ("tokenizer.ggml.add_eos_token".into(), Value::Bool(true)),
    ])
}

#[test]
fn byte_pairs_of_a_gguf_header() {
    let tokenizer = Tokenizer::from_gguf(&byte_metadata(&["a b", "Ġ ab"])).unwrap();
    assert_eq!(tokenizer.encode("ab ab 12", false).unwrap(), [6, 7, 3, 4, 5]);
    assert_eq!(tokenizer.encode("a<|end|>", true).unwrap(), [1, 0, 0]);
    assert_eq!(tokenizer.special(), SpecialIds { bos: None, eos: 0, pad: 0 });
    assert_eq!(tokenizer.decode(&[7, 3, 4, 0], true).unwrap(), " ab 1");
    assert_eq!(tokenizer.decode(&[999], true).unwrap(), "");

    let refused = |metadata| Tokenizer::from_gguf(&metadata).err().unwrap().to_string();
    assert!(refused(byte_metadata(&["a c"])).contains("a c"), "ac is no token");
    assert!(refused(byte_metadata(&["ab"])).contains("merge 0"));
    let mut metadata = byte_metadata(&[]);
    metadata.insert("tokenizer.ggml.pre".into(), Value::String("klingon".into()));
    assert!(refused(metadata).contains("klingon"));
    let mut metadata = byte_metadata(&[]);
    metadata.insert("tokenizer.ggml.eos_token_id".into(), Value::U32(9));
    assert!(refused(metadata).contains('9'));
}

#[test]
fn tokenizer_json_brings_its_own_surroundings() {
    let json = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, "a": 2, "dog": 3, "?": 4}, "unk_token": "?"}}"#;
    let special = SpecialIds { bos: Some(0), eos: 1, pad: 1 };
    let tokenizer = Tokenizer::from_json(json.as_bytes(), special).unwrap();
    assert_eq!(tokenizer.encode("a dog barks", true).unwrap(), [0, 2, 3, 4]);
    assert_eq!(tokenizer.encode("a dog", false).unwrap(), [2, 3]);
    let error = Tokenizer::from_json(json.as_bytes(), SpecialIds { pad: 77, ..special });
    assert!(error.err().unwrap().to_string().contains("77"));
    assert!(Tokenizer::from_json(b"{", special).is_err());
}

// ---- real weights --------------------------------------------------------------------------------

/// The real GGUF file: named by the environment, or in the program's cache; else a loud word that
/// the test is skipped.
fn smollm2() -> Option<PathBuf> {
    let cached = || Some(assets::cached_mini_parts().ok()??.llm_gguf);
    asset("BLIP2_TEST_SMOLLM2", cached)
}

/// The `vocab.txt` of BERT: named by the environment, or the mini model's.
fn bert_vocab() -> Option<PathBuf> {
    let mini = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/mini/vocab.txt");
    asset("BLIP2_TEST_BERT_VOCAB", || Some(mini))
}

fn asset(variable: &str, cached: impl FnOnce() -> Option<PathBuf>) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map(PathBuf::from).or_else(cached);
    if path.is_none() {
        eprintln!("SKIPPED: {variable} names no file and the cache holds none");
    }
    path
}

#[test]
fn smollm2_knows_the_capital_of_france() {
    let Some(path) = smollm2() else { return };
    let (llm, tokenizer) = Llm::open(&path, None).unwrap();
    assert_eq!((llm.width(), llm.vocab_size(), llm.eos()), (576, 49_152, 2));
    let ids = tokenizer.encode("The capital of France is", true).unwrap();
    let batch = TextBatch::new(&[ids], 2, Side::Left, 0).unwrap();
    let prompt = llm.embed(&batch.ids).unwrap();
    let mut decoder = LlmDecoder::new(&llm, prompt, batch.mask).unwrap();
    let options = Options { max_new_tokens: 2, eos: vec![2], ..Options::default() };
    let found = generate(&mut decoder, 1, &options).unwrap();
    assert_eq!(tokenizer.decode(&found[0][0].tokens, true).unwrap(), " Paris.");
}

#[test]
fn smollm2_tokens_are_transformers() {
    let Some(path) = smollm2() else { return };
    let tokenizer = Tokenizer::from_gguf(Gguf::open(&path).unwrap().metadata()).unwrap();
    for case in golden_json("smollm2.json")["strings"].as_array().unwrap() {
        let (text, ids) = (case["text"].as_str().unwrap(), ids_of(&case["ids"]));
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids, "{text:?}");
        let decoded = |skip| tokenizer.decode(&ids, skip).unwrap();
        assert_eq!(decoded(true), case["decoded"].as_str().unwrap(), "{text:?}");
        assert_eq!(decoded(false), case["decoded_with_special"].as_str().unwrap(), "{text:?}");
    }
}

#[test]
fn word_pieces_are_transformers() {
    let Some(path) = bert_vocab() else { return };
    let tokenizer = Tokenizer::from_wordpiece_vocab(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(tokenizer.special(), SpecialIds { bos: Some(30_522), eos: 102, pad: 0 });
    let padding = Padding { max_len: 32, side: Side::Right, width: Width::Max };
    for case in golden_json("bert_tokenizer.json")["strings"].as_array().unwrap() {
        let (text, ids) = (case["text"].as_str().unwrap(), ids_of(&case["ids"]));
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids, "{text:?}");
        let batch = tokenizer.encode_batch(&[text], true, padding).unwrap();
        assert_eq!(batch.ids.to_vec2::<u32>().unwrap()[0], ids_of(&case["ids_32"]), "{text:?}");
        let length = batch.mask[0].iter().filter(|m| **m).count();
        assert_eq!(length as u64, case["length_32"].as_u64().unwrap(), "{text:?}");
    }
}

#[test]
fn smollm2_numbers_and_texts_are_transformers() {
    let Some(path) = smollm2() else { return };
    let (llm, _) = Llm::open(&path, None).unwrap();
    let golden = golden_tensors("smollm2.safetensors");
    let prompt = golden_ids(&golden["ids"]);
    let x = llm.embed(&ids(&[&prompt])).unwrap();
    assert_close(&x.squeeze(0).unwrap(), &golden["embedded"], 1e-6);
    let visible = all_visible(1, prompt.len());
    let hidden = llm.hidden(&x, &visible, None).unwrap().squeeze(0).unwrap();
    assert_close(&hidden, &golden["final_norm"], 1e-5);
    let last = hidden.narrow(0, prompt.len() - 1, 1).unwrap();
    let logits = llm.logits(&last).unwrap().squeeze(0).unwrap();
    assert_close(&logits, &golden["last_logits"], 1e-5);

    let texts = |strategy, num_return| {
        let options = Options {
            max_new_tokens: 16,
            eos: vec![2],
            strategy,
            num_return,
            ..Options::default()
        };
        let mut decoder = LlmDecoder::new(&llm, x.clone(), visible.clone()).unwrap();
        generate(&mut decoder, 1, &options).unwrap().remove(0)
    };
    let greedy = texts(Strategy::Greedy, 1);
    assert_eq!(greedy[0].tokens, golden_ids(&golden["greedy"]));
    let beams = texts(beams(3, 1.0, EarlyStopping::Heuristic), 3);
    let width = golden["beam3"].dim(1).unwrap();
    let scores = flat(&golden["beam3_scores"]);
    for ((beam, tokens), score) in
        beams.iter().zip(golden_ids(&golden["beam3"]).chunks(width)).zip(scores)
    {
        // transformers pads what ended earlier with the end token.
        let mut padded = beam.tokens.clone();
        padded.resize(width, 2);
        assert_eq!(padded, tokens);
        assert!((beam.score - score).abs() < 2e-5, "{} for {score}", beam.score);
    }
}

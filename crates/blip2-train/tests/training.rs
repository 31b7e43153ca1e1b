//! Laws and goldens of the training machinery, on toy problems: no pictures, no model, seconds.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blip2::params::ParamStore;
use blip2_ops::{Communicator, SingleProcess, linear};
use blip2_train::checkpoint::Checkpoints;
use blip2_train::evaluate::EvalFile;
use blip2_train::log::StepRecord;
use blip2_train::optim::{AdamW, AdamWConfig, Gradients, clip_factor, decays};
use blip2_train::order::BatchPlan;
use blip2_train::recipe::{Recipe, RecipeFile};
use blip2_train::schedule::{Position, Schedule, ScheduleKind};
use blip2_train::trainer::{
    Draws, Monitor, Outcome, Resume, Run, RunFolder, Source, Start, StepOutput, Task, train,
};
use blip2_train::{Error, Result};
use candle_core::{Device, Tensor, Var};

// ---------------------------------------------------------------- schedules

fn schedule(kind: ScheduleKind, warmup_steps: u64) -> Schedule {
    Schedule {
        kind,
        lr: 1e-4,
        min_lr: 1e-5,
        warmup_lr: 1e-6,
        warmup_steps,
        total_steps: 1000,
        total_epochs: 10,
        accumulate: 1,
    }
}

fn at(step: u64) -> Position {
    Position { step, epoch: step / 100, step_in_epoch: step % 100 }
}

#[track_caller]
fn close(a: f64, b: f64) {
    assert!((a - b).abs() <= 1e-9 * b.abs().max(1e-12), "{a} is not {b}");
}

#[test]
fn paper_warms_up_by_step_and_then_follows_one_cosine() {
    let s = schedule(ScheduleKind::Paper, 200);
    close(s.lr(at(0)), 1e-6);
    close(s.lr(at(50)), 1e-6 + 99e-6 * 0.25);
    close(s.lr(at(200)), 1e-4);
    close(s.lr(at(400)), 1e-5 + 0.5 * 9e-5 * (1.0 + (std::f64::consts::PI * 0.25).cos()));
    close(s.lr(at(600)), 5.5e-5);
    close(s.lr(at(1000)), 1e-5);
    close(s.lr(at(5000)), 1e-5);
    close(schedule(ScheduleKind::Paper, 0).lr(at(0)), 1e-4);
}

#[test]
fn lavis_warms_up_in_epoch_0_only_and_then_steps_by_epoch() {
    // The released stage 1: 868 steps an epoch, 5000 of warm-up, 10 epochs.
    let s = schedule(ScheduleKind::Lavis, 5000);
    let at = |step| Position { step, epoch: step / 868, step_in_epoch: step % 868 };
    close(s.lr(at(0)), 1e-6);
    close(s.lr(at(867)), 1e-6 + 99e-6 * 867.0 / 5000.0); // ≈ 1.8e-5
    let second = 1e-5 + 0.5 * 9e-5 * (1.0 + (std::f64::consts::PI / 10.0).cos());
    close(s.lr(at(868)), second); // ≈ 9.8e-5: the jump
    close(s.lr(at(2 * 868 - 1)), second);
    assert!((s.lr(at(867)) - 1.8e-5).abs() < 2e-7 && (second - 9.78e-5).abs() < 1e-7);
    // A short warm-up stays at the top for the rest of epoch 0.
    close(schedule(ScheduleKind::Lavis, 100).lr(at(500)), 1e-4);
    // The rate is set before every micro-batch; the update sees the last one.
    let two = Schedule { accumulate: 2, ..schedule(ScheduleKind::Lavis, 100) };
    close(two.lr(at(10)), 1e-6 + 99e-6 * 0.21);
}

// ---------------------------------------------------------------- optimiser

#[test]
fn vectors_and_biases_do_not_decay_and_the_rest_does() {
    for (name, dims, expected) in [
        ("qformer.layers.0.ffn_text.fc1.weight", &[4, 2][..], true),
        ("qformer.layers.0.ffn_text.fc1.bias", &[4], false),
        ("qformer.embed_norm.weight", &[4], false),
        ("lm_head.bias", &[4], false),
        ("odd.bias", &[2, 2], false),
        ("query_tokens", &[1, 3, 4], true),
        ("temp", &[], true),
        ("qformer.word_embeddings.weight", &[9, 4], true),
    ] {
        assert_eq!(decays(name, dims), expected, "{name}");
    }
}

#[test]
fn clipping_scales_down_and_never_up() {
    assert_eq!(clip_factor(10.0, 0.0), 1.0);
    assert_eq!(clip_factor(0.5, 1.0), 1.0);
    assert!((clip_factor(4.0, 1.0) - 0.25).abs() < 1e-6);
    assert_eq!(clip_factor(0.0, 1.0), 1.0);
}

fn golden() -> BTreeMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/adamw.safetensors");
    blip2::params::read_file(&path).unwrap()
}

fn with_prefix(golden: &BTreeMap<String, Tensor>, prefix: &str) -> BTreeMap<String, Tensor> {
    let strip =
        |(name, t): (&String, &Tensor)| Some((name.strip_prefix(prefix)?.to_owned(), t.clone()));
    golden.iter().filter_map(strip).collect()
}

#[track_caller]
fn near(actual: &Tensor, expected: &Tensor, tolerance: f32, what: &str) {
    let (a, b) = (flat(actual), flat(expected));
    assert_eq!(a.len(), b.len(), "{what}");
    let scale = b.iter().fold(0f32, |m, x| m.max(x.abs()));
    for (x, y) in a.iter().zip(&b) {
        assert!((x - y).abs() <= tolerance * scale, "{what}: {x} is not {y}");
    }
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// A loss whose gradient is exactly `grads`.
fn loss_with(params: &ParamStore, grads: &BTreeMap<String, Tensor>) -> Tensor {
    let terms = params.vars().map(|(name, var)| {
        (var.as_tensor() * &grads[name]).unwrap().sum_all().unwrap().reshape(1).unwrap()
    });
    Tensor::cat(&terms.collect::<Vec<_>>(), 0).unwrap().sum_all().unwrap()
}

#[test]
fn eight_steps_of_adamw_equal_pytorchs() {
    let golden = golden();
    let params = ParamStore::new(with_prefix(&golden, "start.")).unwrap();
    let config =
        AdamWConfig { betas: [0.9, 0.98], eps: 1e-8, weight_decay: 0.05, layer_decay: 1.0 };
    let mut optimizer = AdamW::new(&params, config);
    let mut gradients = Gradients::new(&params).unwrap();
    let norms = golden["norms"].to_vec1::<f32>().unwrap();
    let rates = golden["rates"].to_vec1::<f64>().unwrap();
    for (step, (norm, rate)) in norms.into_iter().zip(rates).enumerate() {
        let loss = loss_with(&params, &with_prefix(&golden, &format!("grad.{step}.")));
        gradients.clear();
        gradients.add(&params, &loss.backward().unwrap(), 1.0).unwrap();
        let own = gradients.norm().unwrap();
        assert!((own - f64::from(norm)).abs() < 1e-5 * own, "norm {own} is not {norm}");
        optimizer.step(&params, &gradients, rate, clip_factor(own, 1.5)).unwrap();
        for (name, expected) in with_prefix(&golden, &format!("after.{step}.")) {
            near(params.get(&name).unwrap(), &expected, 2e-6, &format!("step {step}, {name}"));
        }
    }
    let state = optimizer.state().unwrap();
    for prefix in ["m.", "v."] {
        for (name, expected) in with_prefix(&golden, prefix) {
            near(&state[&format!("{prefix}{name}")], &expected, 2e-6, &name);
        }
    }
}

#[test]
fn accumulated_micro_batches_are_their_mean() {
    let golden = golden();
    let params = ParamStore::new(with_prefix(&golden, "start.")).unwrap();
    let [one, two] = [0, 1].map(|i| with_prefix(&golden, &format!("grad.{i}.")));
    let mut gradients = Gradients::new(&params).unwrap();
    for _ in 0..2 {
        // The second round must not remember the first.
        gradients.clear();
        for (grads, loss) in [(&one, 2.0), (&two, 4.0)] {
            let backward = loss_with(&params, grads).backward().unwrap();
            gradients.add(&params, &backward, 0.5).unwrap();
            gradients.add_loss(loss, 0.5);
        }
        let mean = one.iter().flat_map(|(name, a)| {
            let both = flat(a).into_iter().zip(flat(&two[name]));
            both.map(|(x, y)| 0.5 * x + 0.5 * y).collect::<Vec<_>>()
        });
        assert_eq!(flat(gradients.flat()), mean.collect::<Vec<_>>());
        assert_eq!(gradients.loss(), 3.0);
    }
}

#[test]
fn a_parameter_without_gradient_is_named() {
    let params = ParamStore::new(with_prefix(&golden(), "start.")).unwrap();
    let loss = params.get("layer.weight").unwrap().sum_all().unwrap();
    let mut gradients = Gradients::new(&params).unwrap();
    let err = gradients.add(&params, &loss.backward().unwrap(), 1.0).unwrap_err().to_string();
    assert!(err.contains("layer.bias got no gradient"), "{err}");
}

/// What a backward pass collects counts, but only for its own micro-batch, and with its own share.
#[test]
fn a_parameter_that_is_not_collected_is_named() {
    let numbers =
        |shape: &[usize]| Tensor::ones(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
    let tensors = [("a", &[3, 4][..]), ("b", &[2, 3])];
    let tensors = tensors.map(|(name, shape)| (name.to_owned(), numbers(shape)));
    let params = ParamStore::new(tensors.into()).unwrap();
    let weight = |name: &str| params.get(name).unwrap().as_tensor();
    let first = || linear(&numbers(&[5, 4]), weight("a"), None).unwrap();
    let both = || linear(&first(), weight("b"), None).unwrap();
    let backward = |loss: Tensor| loss.sum_all().unwrap().backward().unwrap();
    let mut gradients = Gradients::new(&params).unwrap();
    let grads = gradients.collect(1.0, || backward(both()));
    gradients.add(&params, &grads, 1.0).unwrap();
    let err = gradients.add(&params, &grads, 1.0).unwrap_err().to_string();
    assert!(err.contains("a got no gradient"), "{err}");
    let grads = gradients.collect(1.0, || backward(first()));
    let err = gradients.add(&params, &grads, 1.0).unwrap_err().to_string();
    assert!(err.contains("b got no gradient"), "{err}");
    let grads = gradients.collect(0.5, || backward(both()));
    let err = gradients.add(&params, &grads, 1.0).unwrap_err().to_string();
    assert!(err.contains("1 of a micro-batch of which 0.5 has been collected"), "{err}");
}

#[test]
fn an_optimisers_state_must_fit() {
    let params = ParamStore::new(with_prefix(&golden(), "start.")).unwrap();
    let config =
        AdamWConfig { betas: [0.9, 0.98], eps: 1e-8, weight_decay: 0.05, layer_decay: 1.0 };
    let mut optimizer = AdamW::new(&params, config);
    let mut state = optimizer.state().unwrap();
    optimizer.restore(&state, 3).unwrap();
    assert_eq!(optimizer.steps(), 3);
    state.insert("m.temp".into(), Tensor::zeros(2, candle_core::DType::F32, &Device::Cpu).unwrap());
    assert!(optimizer.restore(&state, 3).unwrap_err().to_string().contains("m.temp has shape [2]"));
    let temp = state.remove("m.temp").unwrap();
    state.insert("m.other".into(), temp);
    assert!(optimizer.restore(&state, 3).unwrap_err().to_string().contains("lacks m.temp"));
}

/// A second rank that always answers with the same numbers.
struct Echo;

impl Communicator for Echo {
    fn rank(&self) -> usize {
        0
    }
    fn world(&self) -> usize {
        2
    }
    fn all_gather(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Tensor::cat(&[x, x], 0)
    }
    fn all_reduce_sum(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        x + x
    }
}

#[test]
fn ranks_average_gradients_and_loss() {
    let golden = golden();
    let params = ParamStore::new(with_prefix(&golden, "start.")).unwrap();
    let backward = loss_with(&params, &with_prefix(&golden, "grad.0.")).backward().unwrap();
    let mut gradients = Gradients::new(&params).unwrap();
    gradients.add(&params, &backward, 1.0).unwrap();
    gradients.add_loss(3.0, 1.0);
    let before = flat(gradients.flat());
    let ranks: Arc<dyn Communicator> = Arc::new(Echo);
    gradients.average(&ranks).unwrap();
    assert_eq!(flat(gradients.flat()), before);
    assert_eq!(gradients.loss(), 3.0);
}

// ---------------------------------------------------------------- recipes

fn recipe_text(name: &str) -> String {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes");
    fs::read_to_string(dir.join(name)).unwrap()
}

fn recipe(changes: &[&str]) -> Recipe {
    let changes: Vec<String> = changes.iter().map(|c| (*c).to_owned()).collect();
    RecipeFile::parse(&recipe_text("tiny_cpu.toml"), &changes).unwrap().runs().remove(0)
}

#[test]
fn every_shipped_recipe_is_valid_and_begins_with_its_command() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes");
    let mut count = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        let verb = if text.lines().any(|line| line.starts_with("[stage")) {
            assert!(!RecipeFile::read(&path, &[]).unwrap().runs().is_empty());
            "train"
        } else {
            EvalFile::read(&path, &[]).unwrap();
            "eval"
        };
        let comment: String = text.lines().take_while(|line| line.starts_with('#')).collect();
        assert!(comment.contains(&format!("{verb} recipes/{name}")), "{name}");
        assert!(comment.contains("Cost") && comment.contains("Expected"), "{name}");
        *count.entry(verb).or_insert(0) += 1;
    }
    assert!(count["train"] >= 3 && count["eval"] >= 2, "{count:?}");
}

#[test]
fn the_toys_evaluation_looks_where_the_toy_was_trained() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/tiny_eval.toml");
    let (eval, train) = (EvalFile::read(&path, &[]).unwrap(), recipe(&[]));
    assert_eq!(eval.data.dir, train.data.dir);
    assert_eq!(eval.data.features, train.features.dir);
    assert_eq!((eval.data.split, eval.data.train), (train.data.test, train.data.train));
}

#[test]
fn bad_evaluations_are_refused_with_file_and_field_named() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/tiny_eval.toml");
    for (change, reason) in [
        ("decode.min_new_tokens=61", "decode.min_new_tokens is 61; it must be at most"),
        ("decode.max_new_tokens=0", "decode.max_new_tokens is 0"),
        ("decode.num_beams=0", "decode.num_beams is 0"),
        ("decode.length_penalty=nan", "decode.length_penalty is NaN"),
        ("decode.length_penalty=inf", "decode.length_penalty is inf"),
        ("data.batch_size=0", "data.batch_size is 0"),
        ("data.colour=1", "unknown field `colour`"),
    ] {
        let err = EvalFile::read(&path, &[change.to_owned()]).unwrap_err();
        assert!(matches!(err, Error::Recipe(_)));
        let said = err.to_string();
        assert!(said.contains(reason) && said.contains("tiny_eval.toml"), "{change}: {said}");
        assert_eq!(said.matches("recipe: ").count(), 1, "{said}");
    }
}

#[track_caller]
fn refused(changes: &[&str], reason: &str) {
    let changes: Vec<String> = changes.iter().map(|c| (*c).to_owned()).collect();
    let err = RecipeFile::parse(&recipe_text("tiny_cpu.toml"), &changes).unwrap_err();
    assert!(matches!(err, Error::Recipe(_)));
    assert!(err.to_string().contains(reason), "{changes:?}: {err}");
}

#[test]
fn bad_recipes_are_refused_with_the_field_named() {
    refused(&["stage1.train.batchsize=3"], "unknown field `batchsize`");
    refused(&["nonsense=3"], "unknown field `nonsense`");
    refused(&["model.vision.colour=1"], "colour");
    refused(&["stage1.train.batch_size=\"x\""], "batch_size");
    refused(&["stage1.train.batch_size=0"], "stage1.train.batch_size is 0");
    refused(&["stage1.train.batch_size=1"], "stage1.train.batch_size is 1");
    refused(&["stage1.train.steps=0"], "stage1.train.steps");
    refused(&["stage1.train.accumulate=0"], "stage1.train.accumulate");
    refused(&["stage1.train.clip=-1"], "stage1.train.clip");
    refused(&["stage1.train.clip=nan"], "stage1.train.clip");
    refused(&["stage1.optimizer.lr=0.0"], "stage1.optimizer.lr");
    refused(&["stage1.optimizer.min_lr=0.5"], "stage1.optimizer.min_lr");
    refused(&["stage1.optimizer.betas=[0.9, 1.0]"], "stage1.optimizer.betas");
    refused(&["stage1.optimizer.warmup_steps=150"], "stage1.optimizer.warmup_steps");
    refused(&["stage1.optimizer.schedule=\"cosine\""], "schedule");
    refused(&["stage1.label_smoothing=1.0"], "stage1.label_smoothing");
    refused(&["stage1.itm_pairs=0"], "stage1.itm_pairs is 0");
    refused(&["stage1.itm_pairs=1000"], "stage1.itm_pairs is 1000");
    refused(&["stage1.train.precision=\"f16\""], "unknown variant `f16`");
    refused(&["stage2.questions=1.5"], "stage2.questions");
    refused(&["stage2.question_prompt=\"Answer:\""], "stage2.question_prompt");
    refused(&["augment.scale=[0.9, 0.5]"], "augment.scale");
    refused(&["augment.flip=2.0"], "augment.flip");
    refused(&["model.vision.patch_size=15"], "model.vision.patch_size is 15");
    refused(&["model.qformer.init.num_heads=5"], "model.qformer.init.num_heads is 5");
    refused(&["model.llm.num_kv_heads=3"], "model.llm.num_kv_heads is 3");
    refused(&["model.llm={from=\"mini\", weights=\"int3\"}"], "model.llm.weights is int3");
    refused(&["runtime.log_every=0"], "runtime.log_every");
    refused(&["name=../x"], "name is ../x");
    refused(&["data.captions=\"all\""], "captions");
    refused(&["stage1"], "expected key=value");
    refused(&["stage1..lr=1"], "empty part");
    refused(&["seed.x=1"], "seed is a value");
    let text = recipe_text("tiny_cpu.toml");
    let err = RecipeFile::parse(&text.replace("eps = 1e-8", ""), &[]).unwrap_err().to_string();
    assert!(err.contains("missing field `eps`"), "{err}");
    let err = RecipeFile::parse(&text.replace("steps = 150", "steps = 1\nepochs = 1"), &[]);
    assert!(err.unwrap_err().to_string().contains("stage1.train.steps, stage1.train.epochs"));
    let err = RecipeFile::parse("seed = = 3", &[]).unwrap_err().to_string();
    assert!(err.contains("line 1"), "{err}");
}

#[test]
fn changes_are_applied_and_typed() {
    let changed = recipe(&[
        "stage1.optimizer.lr=3e-4",
        "seed=9",
        "name=other",
        "data.dir=\"a b\"",
        "stage1.train.epochs=2",
        "augment.scale=[0.2, 0.3]",
    ]);
    assert_eq!((changed.optimizer.lr, changed.seed), (3e-4, 9));
    assert_eq!((changed.name.as_str(), changed.data.dir.as_path()), ("other", Path::new("a b")));
    assert_eq!(changed.augment.scale, [0.2, 0.3]);
    assert_eq!((changed.train.steps, changed.train.epochs), (None, Some(2)));
}

#[test]
fn the_hash_sees_what_decides_the_numbers_and_nothing_else() {
    let hash = |changes: &[&str]| recipe(changes).hash().unwrap();
    let base = hash(&[]);
    for same in ["runtime.threads=3", "name=x", "data.dir=\"y\"", "features.batch_size=3"] {
        assert_eq!(hash(&[same]), base, "{same}");
    }
    for other in ["seed=8", "stage1.optimizer.lr=2e-3", "augment.flip=0.0", "features.views=1"] {
        assert_ne!(hash(&[other]), base, "{other}");
    }
}

// ---------------------------------------------------------------- the loop, on a toy

/// Learns y = W x with noise from dropout; samples are drawn from their index, batches from the plan's numbers.
struct Toy {
    params: ParamStore,
    source: ToySource,
    /// Steps whose loss is NaN.
    broken: Vec<u64>,
    /// Steps that hold nothing to learn.
    idle: Vec<u64>,
    step: AtomicU64,
}

struct ToySource {
    samples: usize,
    fail_at: Option<u64>,
}

impl Source for ToySource {
    type Batch = (Tensor, Tensor, u64);

    fn samples(&self) -> usize {
        self.samples
    }

    fn hash(&self) -> String {
        format!("toy-{}", self.samples)
    }

    fn load(&self, plan: &BatchPlan) -> Result<Self::Batch> {
        if self.fail_at == Some(plan.step) {
            return Err(Error::Data(format!("sample {} is broken", plan.samples[0])));
        }
        // Later batches load faster, so that loaders overtake each other.
        std::thread::sleep(std::time::Duration::from_micros(300 * (3 - plan.step % 3)));
        let mut x = Vec::new();
        for &sample in &plan.samples {
            let mut rng = plan.rng(sample);
            x.extend(
                (0..3).map(|i| ((sample * 7 + i * 3) % 11) as f32 / 11.0 + rng.uniform() as f32),
            );
        }
        let y: Vec<f32> = x.chunks(3).flat_map(|x| [x[0] - x[1], 2.0 * x[2]]).collect();
        let n = plan.samples.len();
        Ok((
            Tensor::from_vec(x, (n, 3), &Device::Cpu)?,
            Tensor::from_vec(y, (n, 2), &Device::Cpu)?,
            plan.step,
        ))
    }
}

impl Toy {
    fn new() -> Self {
        let start = |shape: &[usize]| {
            let n: usize = shape.iter().product();
            let values: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
        };
        let tensors = [("w", start(&[2, 3])), ("b", start(&[2])), ("s", start(&[]))];
        let tensors = tensors.into_iter().map(|(name, t)| (name.to_owned(), t)).collect();
        Self {
            params: ParamStore::new(tensors).unwrap(),
            source: ToySource { samples: 50, fail_at: None },
            broken: Vec::new(),
            idle: Vec::new(),
            step: AtomicU64::new(0),
        }
    }

    fn var(&self, name: &str) -> &Var {
        self.params.get(name).unwrap()
    }
}

impl Task for Toy {
    type Source = ToySource;

    fn source(&self) -> &ToySource {
        &self.source
    }

    fn params(&self) -> &ParamStore {
        &self.params
    }

    fn step(
        &self,
        (x, y, step): &(Tensor, Tensor, u64),
        draws: Draws,
        _ranks: &Arc<dyn Communicator>,
    ) -> Result<StepOutput> {
        self.step.store(*step, Ordering::Relaxed);
        if self.idle.contains(step) {
            return Ok(StepOutput::nothing("all samples are the same"));
        }
        let x = draws.dropout().apply(x, 0.2)?;
        let out = linear(&x, self.var("w"), Some(self.var("b")))?.broadcast_mul(self.var("s"))?;
        let noise = draws.negatives().uniform() * 0.1;
        let mut loss = ((out - y)?.sqr()?.mean_all()? * (1.0 + noise))?;
        if self.broken.contains(step) {
            loss = (loss * f64::NAN)?;
        }
        let value = loss.to_scalar()?;
        let parts = vec![("mse", value), ("noise", noise as f32)];
        StepOutput::new(&loss, parts)
    }
}

/// Remembers everything, and sets the stop flag after a step.
#[derive(Default)]
struct Notes {
    losses: BTreeMap<u64, u64>,
    others: BTreeMap<u64, Vec<u64>>,
    starts: Vec<u64>,
    notes: Vec<String>,
    stop_at: Option<u64>,
    stop: Arc<AtomicBool>,
}

impl Monitor for Notes {
    fn start(&mut self, start: &Start) -> Result<()> {
        self.starts.push(start.step);
        Ok(())
    }

    fn step(&mut self, record: &StepRecord, waiting: f64) -> Result<()> {
        assert!((0.0..=1.0).contains(&waiting) && record.images_per_s > 0.0);
        let mut numbers = vec![record.grad_norm.to_bits(), record.lr.to_bits()];
        numbers.extend(record.parts.values().map(|value| value.to_bits()));
        self.others.insert(record.step, numbers);
        self.losses.insert(record.step, record.loss.to_bits());
        if self.stop_at == Some(record.step) {
            self.stop.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    fn note(&mut self, text: &str) {
        self.notes.push(text.to_owned());
    }
}

const TOY: [&str; 6] = [
    "stage1.train.steps=60",
    "stage1.train.batch_size=4",
    "stage1.train.accumulate=2",
    "runtime.checkpoint_every=7",
    "runtime.log_every=4",
    "runtime.loaders=3",
];

fn go(task: &Toy, dir: &Path, resume: Resume, notes: &mut Notes, more: &[&str]) -> Result<Outcome> {
    notes.stop = Arc::new(AtomicBool::new(false));
    let stop = notes.stop.clone();
    let folder = RunFolder::claim(dir, resume)?;
    let run = Run { folder: &folder, stop: &stop, ranks: Arc::new(SingleProcess) };
    train(task, &recipe(&[&TOY[..], more].concat()), &run, notes)
}

fn sha(outcome: Outcome) -> String {
    match outcome {
        Outcome::Finished { steps: 60, sha256, .. } => sha256,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_run_stopped_at_any_step_and_resumed_ends_with_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let mut whole = Notes::default();
    let hash =
        sha(go(&Toy::new(), &dir.path().join("whole"), Resume::No, &mut whole, &[]).unwrap());
    assert_eq!(whole.losses.len(), 60);

    let mut parts = Notes::default();
    let interrupted = dir.path().join("parts");
    for stop_at in [1, 5, 7, 8, 29, 30, 59] {
        parts.stop_at = Some(stop_at);
        let outcome = go(&Toy::new(), &interrupted, Resume::Yes, &mut parts, &[]).unwrap();
        assert_eq!(outcome, Outcome::Stopped { step: stop_at });
    }
    parts.stop_at = None;
    let outcome = go(&Toy::new(), &interrupted, Resume::Yes, &mut parts, &[]).unwrap();
    assert_eq!(sha(outcome), hash);
    assert_eq!(parts.starts, [0, 1, 5, 7, 8, 29, 30, 59]);
    assert_eq!(parts.losses, whole.losses);
    assert_eq!(parts.others, whole.others);
    // A finished run can be "resumed": nothing is done again.
    let again = go(&Toy::new(), &interrupted, Resume::Yes, &mut parts, &[]).unwrap();
    assert_eq!(sha(again), hash);
    assert_eq!(parts.starts.last(), Some(&60));
}

#[test]
fn a_run_killed_without_warning_goes_on_from_its_last_checkpoint_with_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let mut whole = Notes::default();
    let hash =
        sha(go(&Toy::new(), &dir.path().join("whole"), Resume::No, &mut whole, &[]).unwrap());
    // A loader that fails at step 40 ends the run like a kill does: no checkpoint after step 35.
    let killed = dir.path().join("killed");
    let mut toy = Toy::new();
    toy.source.fail_at = Some(40);
    let mut notes = Notes::default();
    let err = go(&toy, &killed, Resume::No, &mut notes, &[]).unwrap_err().to_string();
    assert!(err.contains("is broken"), "{err}");
    assert_eq!(sha(go(&Toy::new(), &killed, Resume::Yes, &mut notes, &[]).unwrap()), hash);
    assert_eq!(notes.starts, [0, 35]);
    assert_eq!((notes.losses, notes.others), (whole.losses, whole.others));
}

#[test]
fn the_number_of_loaders_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let hashes = ["1", "2", "5"].map(|loaders| {
        let change = format!("runtime.loaders={loaders}");
        let run = dir.path().join(loaders);
        sha(go(&Toy::new(), &run, Resume::No, &mut Notes::default(), &[&change]).unwrap())
    });
    assert_eq!(hashes[0], hashes[1]);
    assert_eq!(hashes[0], hashes[2]);
    let other =
        go(&Toy::new(), &dir.path().join("seed"), Resume::No, &mut Notes::default(), &["seed=8"]);
    assert_ne!(sha(other.unwrap()), hashes[0]);
}

#[test]
fn training_learns() {
    let dir = tempfile::tempdir().unwrap();
    let mut notes = Notes::default();
    go(&Toy::new(), dir.path(), Resume::No, &mut notes, &["stage1.optimizer.lr=0.05"]).unwrap();
    let loss = |step| f64::from_bits(notes.losses[&step]);
    assert!(loss(60) < 0.7 * loss(1), "{} → {}", loss(1), loss(60));
}

#[test]
fn a_step_that_is_not_finite_changes_nothing_and_too_many_in_a_row_end_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let mut toy = Toy::new();
    toy.broken = vec![10, 11, 30];
    let mut notes = Notes::default();
    go(&toy, &dir.path().join("a"), Resume::No, &mut notes, &[]).unwrap();
    let skipped = notes.notes.iter().filter(|note| note.contains("skipped step")).count();
    assert_eq!(skipped, 3, "{:?}", notes.notes);
    assert!(toy.params.vars().all(|(_, var)| flat(var).iter().all(|x| x.is_finite())));
    let state = Checkpoints::new(dir.path().join("a/checkpoints"), 3).latest().unwrap();
    let state = state.newest.unwrap().state;
    assert_eq!((state.step, state.optimizer_steps, state.skipped), (60, 57, 3));

    let mut toy = Toy::new();
    toy.broken = (20..40).collect();
    let err = go(&toy, &dir.path().join("b"), Resume::No, &mut Notes::default(), &[]).unwrap_err();
    assert!(err.to_string().contains("10 steps in a row were not finite"), "{err}");
    assert_eq!(toy.step.load(Ordering::Relaxed), 29);
}

#[test]
fn a_step_with_nothing_to_learn_is_skipped_and_counted_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    let mut toy = Toy::new();
    toy.idle = vec![10, 30];
    let mut notes = Notes { stop_at: Some(11), ..Notes::default() };
    go(&toy, &dir.path().join("a"), Resume::No, &mut notes, &[]).unwrap();
    notes.stop_at = None;
    // Resuming does not stumble over the same batch again.
    go(&toy, &dir.path().join("a"), Resume::Yes, &mut notes, &[]).unwrap();
    let skipped: Vec<_> = notes.notes.iter().filter(|note| note.contains("skipped step")).collect();
    assert_eq!(skipped.len(), 2, "{skipped:?}");
    assert!(skipped.iter().all(|note| note.ends_with("all samples are the same")), "{skipped:?}");
    let state = Checkpoints::new(dir.path().join("a/checkpoints"), 3).latest().unwrap();
    let state = state.newest.unwrap().state;
    assert_eq!((state.step, state.optimizer_steps, state.skipped), (60, 58, 2));

    let mut toy = Toy::new();
    toy.idle = (0..60).collect();
    let err = go(&toy, &dir.path().join("b"), Resume::No, &mut Notes::default(), &[]).unwrap_err();
    assert!(err.to_string().ends_with("all samples are the same"), "{err}");
}

#[test]
fn a_folder_with_another_run_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut notes = Notes { stop_at: Some(9), ..Notes::default() };
    go(&Toy::new(), dir.path(), Resume::No, &mut notes, &[]).unwrap();
    let err = go(&Toy::new(), dir.path(), Resume::No, &mut notes, &[]).unwrap_err().to_string();
    assert!(err.contains("holds a run at step 9"), "{err}");
    assert!(err.contains("--resume") && err.contains("--out"), "{err}");
    let lr = ["stage1.optimizer.lr=2e-3"];
    let err = go(&Toy::new(), dir.path(), Resume::Yes, &mut notes, &lr).unwrap_err().to_string();
    assert!(err.contains("optimizer.lr (0.001 → 0.002)"), "{err}");
    let mut other = Toy::new();
    other.source.samples = 51;
    let err = go(&other, dir.path(), Resume::Yes, &mut notes, &[]).unwrap_err().to_string();
    assert!(err.contains("data (toy-50 → toy-51)"), "{err}");
    notes.stop_at = None;
    go(&Toy::new(), dir.path(), Resume::WithChanges, &mut notes, &lr).unwrap();
    assert!(notes.notes.iter().any(|note| note.contains("resumed with changes")));
}

#[test]
fn one_folder_has_one_run_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let lock = fs::File::create(dir.path().join(".lock")).unwrap();
    lock.lock().unwrap();
    let err = go(&Toy::new(), dir.path(), Resume::No, &mut Notes::default(), &[]).unwrap_err();
    assert!(err.to_string().contains("in use by another run"), "{err}");
}

// ---------------------------------------------------------------- checkpoints

/// A run with sound checkpoints at 35, 42 and 49.
fn three_checkpoints(dir: &Path) -> Checkpoints {
    let mut toy = Toy::new();
    toy.source.fail_at = Some(50);
    go(&toy, dir, Resume::No, &mut Notes::default(), &[]).unwrap_err();
    let store = Checkpoints::new(dir.join("checkpoints"), 3);
    let steps: Vec<u64> = store.list().unwrap().into_iter().map(|(step, _)| step).collect();
    assert_eq!(steps, [35, 42, 49], "the newest three stay");
    store
}

fn newest_files(store: &Checkpoints) -> Vec<PathBuf> {
    let (_, dir) = store.list().unwrap().pop().unwrap();
    let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    assert_eq!(files.len(), 4);
    files
}

#[test]
fn a_damaged_newest_checkpoint_falls_back_to_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let store = three_checkpoints(dir.path());
    let sound = store.latest().unwrap().newest.unwrap();
    assert_eq!(sound.state.step, 49);
    let mut tried = 0;
    for path in newest_files(&store) {
        let bytes = fs::read(&path).unwrap();
        let mut check = |damaged: Option<&[u8]>, what: &str| {
            match damaged {
                Some(damaged) => fs::write(&path, damaged).unwrap(),
                None => fs::remove_file(&path).unwrap(),
            }
            let found = store.latest().unwrap();
            let step = found.newest.as_ref().map(|loaded| loaded.state.step);
            if step == Some(49) {
                // A flip between two spellings of the same manifest is no damage: everything else is as it was.
                assert!(path.ends_with("manifest.json"), "{what} of {} unnoticed", path.display());
                assert_eq!(found.newest.unwrap().state, sound.state);
            } else {
                assert_eq!(step, Some(42), "{what} of {}", path.display());
                assert_eq!(found.damaged.len(), 1);
            }
            tried += 1;
        };
        check(None, "removal");
        for cut in (0..20).map(|i| bytes.len() * i / 20) {
            check(Some(&bytes[..cut]), &format!("cut to {cut}"));
        }
        for i in 0..60 {
            let (at, bit) = (bytes.len() * i / 60, i % 8);
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << bit;
            check(Some(&flipped), &format!("bit {bit} of byte {at}"));
        }
        check(Some(&[&bytes[..], b" x"].concat()), "a longer file");
        fs::write(&path, &bytes).unwrap();
    }
    assert!(tried > 300);
    assert_eq!(store.latest().unwrap().newest.unwrap().state, sound.state);
}

#[test]
fn a_run_with_a_damaged_checkpoint_warns_goes_on_and_ends_with_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let whole = go(&Toy::new(), &dir.path().join("whole"), Resume::No, &mut Notes::default(), &[]);
    let run = dir.path().join("run");
    let store = three_checkpoints(&run);
    let weights = newest_files(&store).pop().unwrap();
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() - 1]).unwrap();
    let mut notes = Notes::default();
    let outcome = go(&Toy::new(), &run, Resume::Yes, &mut notes, &[]).unwrap();
    assert_eq!(sha(outcome), sha(whole.unwrap()));
    assert_eq!(notes.starts, [42]);
    assert!(
        notes.notes[0].contains("damaged checkpoint") && notes.notes[0].contains("step-00000049")
    );
    assert!(run.join("checkpoints/damaged-step-00000049").exists());
}

#[test]
fn with_every_checkpoint_damaged_the_run_starts_afresh() {
    let dir = tempfile::tempdir().unwrap();
    let store = three_checkpoints(dir.path());
    for (_, path) in store.list().unwrap() {
        fs::write(path.join("state.json"), b"{}").unwrap();
    }
    let mut notes = Notes::default();
    go(&Toy::new(), dir.path(), Resume::Yes, &mut notes, &[]).unwrap();
    assert_eq!(notes.starts, [0]);
    assert!(notes.notes.iter().any(|note| note.contains("no sound checkpoint")));
}

//! The tiny recipe's pipeline with real models at toy size: data, both stages, the model folder. A minute at most.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blip2::generate::Options;
use blip2::image::{Pixels, decode};
use blip2::model::{Files, Model};
use blip2_train::Result;
use blip2_train::data::mini::{MiniConfig, build};
use blip2_train::data::{Dataset, Meta};
use blip2_train::log::StepRecord;
use blip2_train::recipe::{Recipe, RecipeFile};
use blip2_train::tasks::{Session, Trained, train_recipe};
use blip2_train::trainer::{Monitor, Outcome, Resume, Start};

const SAMPLES: usize = 48;

fn recipe(root: &Path, changes: &[&str]) -> RecipeFile {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/tiny_cpu.toml");
    let root = root.display();
    let mut all = vec![
        format!("data.dir=\"{root}/data\""),
        format!("features.dir=\"{root}/features\""),
        "stage1.train.batch_size=8".into(),
        "stage2.train.batch_size=8".into(),
        "stage1.train.steps=12".into(),
        "stage2.train.steps=12".into(),
        "stage1.optimizer.warmup_steps=2".into(),
        "stage2.optimizer.warmup_steps=2".into(),
        "runtime.checkpoint_every=5".into(),
        "runtime.loaders=2".into(),
    ];
    all.extend(changes.iter().map(|change| (*change).to_owned()));
    RecipeFile::read(&path, &all).unwrap()
}

fn data(root: &Path) {
    build(&MiniConfig::tiny(&root.join("data"), SAMPLES), &|_| {}).unwrap();
}

type Bits = BTreeMap<(u32, u64), Vec<u64>>;

/// Collects every number of every step, and stops at one.
struct Watch<'a> {
    stage: u32,
    seen: &'a std::sync::Mutex<Bits>,
    stop_at: Option<(u32, u64)>,
    stop: Arc<AtomicBool>,
}

impl Monitor for Watch<'_> {
    fn start(&mut self, _: &Start) -> Result<()> {
        Ok(())
    }

    fn step(&mut self, record: &StepRecord, _: f64) -> Result<()> {
        let numbers = [record.loss, record.lr, record.grad_norm].into_iter();
        let bits = numbers.chain(record.parts.values().copied()).map(f64::to_bits).collect();
        self.seen.lock().unwrap().insert((self.stage, record.step), bits);
        if self.stop_at == Some((self.stage, record.step)) {
            self.stop.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    fn note(&mut self, _: &str) {}
}

/// Trains in `dir`; returns every step's numbers.
fn run(
    file: &RecipeFile,
    dir: &Path,
    stop_at: Option<(u32, u64)>,
    seen: &'static std::sync::Mutex<Bits>,
) -> Trained {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    let mut monitor = |stage, _: &Path, _: &Recipe| -> Box<dyn Monitor> {
        Box::new(Watch { stage, seen, stop_at, stop: stop.clone() })
    };
    let mut session = Session {
        dir,
        resume: Resume::Yes,
        stop: &flag,
        download: &mut |_, _, _| {},
        encoding: &mut |_, _| {},
        monitor: &mut monitor,
    };
    train_recipe(file, &mut session).unwrap()
}

fn hashes(trained: &Trained) -> Vec<String> {
    let Trained::Finished { stages, .. } = trained else { panic!("not finished") };
    let hash = |(_, outcome): &(u32, Outcome)| match outcome {
        Outcome::Finished { sha256, .. } => sha256.clone(),
        Outcome::Stopped { step } => panic!("stopped at {step}"),
    };
    stages.iter().map(hash).collect()
}

fn leak() -> &'static std::sync::Mutex<Bits> {
    Box::leak(Box::default())
}

#[test]
fn both_stages_stopped_and_resumed_give_the_same_bits_and_a_model_that_works() {
    let root = tempfile::tempdir().unwrap();
    data(root.path());
    let file = recipe(root.path(), &[]);
    let whole = leak();
    let trained = run(&file, &root.path().join("whole"), None, whole);
    assert_eq!(whole.lock().unwrap().len(), 24);

    let parts = leak();
    let dir = root.path().join("parts");
    for stop_at in [(1, 1), (1, 6), (2, 3), (2, 5)] {
        assert_eq!(run(&file, &dir, Some(stop_at), parts), Trained::Stopped);
    }
    assert_eq!(hashes(&run(&file, &dir, None, parts)), hashes(&trained));
    assert_eq!(*parts.lock().unwrap(), *whole.lock().unwrap());

    use_it(&dir.join("model"), root.path());
}

/// The model folder serves matching and captioning.
fn use_it(model: &Path, root: &Path) {
    let model = Model::open(Files::Folder(model.to_path_buf())).unwrap();
    let dataset = Dataset::open_split(&root.join("data"), "test").unwrap();
    let sample = dataset.get(0).unwrap();
    let picture = decode(&sample.image, Pixels::default()).unwrap();
    let captions: Vec<&str> = Meta::all_captions(&sample.meta);
    let scores = model.matcher(None, &mut |_, _, _| {}).unwrap();
    let scores = scores.score(std::slice::from_ref(&picture), &captions).unwrap();
    assert!(scores[0].iter().all(|score| (0.0..=1.0).contains(&score.itm)));
    let captioner = model.captioner(None, &mut |_, _, _| {}).unwrap();
    let options = Options { max_new_tokens: 4, ..Options::default() };
    let prompt = captioner.caption_prompt().to_owned();
    let texts = captioner.generate(&[picture], &[&prompt], &options).unwrap();
    assert_eq!(texts.len(), 1);
}

#[test]
fn without_a_cache_a_run_repeats_to_the_bit_too() {
    let root = tempfile::tempdir().unwrap();
    data(root.path());
    let changes = ["features.views=0", "stage1.train.steps=4", "stage2.train.steps=4"];
    let file = recipe(root.path(), &changes);
    let (a, b) = (leak(), leak());
    let first = run(&file, &root.path().join("a"), None, a);
    assert_eq!(run(&file, &root.path().join("b"), Some((1, 3)), b), Trained::Stopped);
    let second = run(&file, &root.path().join("b"), None, b);
    assert_eq!(hashes(&first), hashes(&second));
    assert_eq!(*a.lock().unwrap(), *b.lock().unwrap());
    assert!(!root.path().join("features").exists());
}

#[test]
fn stage_1_learns_its_drawings() {
    let root = tempfile::tempdir().unwrap();
    data(root.path());
    let changes = ["stage1.train.steps=60", "runtime.checkpoint_every=100"];
    let mut file = recipe(root.path(), &changes);
    file.stage2 = None;
    let seen = leak();
    run(&file, &root.path().join("run"), None, seen);
    let seen = seen.lock().unwrap();
    let mean = |steps: std::ops::Range<u64>| {
        let n = steps.end - steps.start;
        steps.map(|step| f64::from_bits(seen[&(1, step)][0])).sum::<f64>() / n as f64
    };
    let (first, last) = (mean(1..6), mean(55..60));
    assert!(last < first - 1.0, "loss {first} → {last}");
}

//! The tiny recipe's pipeline with real models at toy size: data, both stages, the model folder. A minute at most.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blip2::generate::Options;
use blip2::image::{Pixels, decode};
use blip2::model::{Files, Model};
use blip2_train::Result;
use blip2_train::checkpoint::save_tensors;
use blip2_train::data::mini::{MiniConfig, build};
use blip2_train::data::{Dataset, Meta, Sample, ShardWriter};
use blip2_train::log::StepRecord;
use blip2_train::monitor::{CURVES, RunLog};
use blip2_train::recipe::{Recipe, RecipeFile};
use blip2_train::tasks::{Session, Trained, train_recipe};
use blip2_train::trainer::{Monitor, Outcome, Resume, Start};
use candle_core::{Device, Tensor};

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

/// A split's first sample.
fn first(root: &Path, split: &str) -> Sample {
    Dataset::open_split(&root.join("data"), split, &mut |_| {}).unwrap().get(0).unwrap()
}

/// The model folder serves matching and captioning.
fn use_it(model: &Path, root: &Path) {
    let model = Model::open(Files::Folder(model.to_path_buf())).unwrap();
    let sample = first(root, "test");
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

/// Three steps of stage 1 alone.
fn short(root: &Path, changes: &[&str]) -> RecipeFile {
    let mut file = recipe(root, &[&["stage1.train.steps=3"][..], changes].concat());
    file.stage2 = None;
    file
}

/// Trains as the program does.
fn train(file: &RecipeFile, dir: &Path, resume: Resume) -> Result<Trained> {
    let mut session = Session {
        dir,
        resume,
        stop: &AtomicBool::new(false),
        download: &mut |_, _, _| {},
        encoding: &mut |_, _| {},
        monitor: &mut |_, dir: &Path, recipe: &Recipe| -> Box<dyn Monitor> {
            Box::new(RunLog::new(dir, recipe.runtime.log_every))
        },
    };
    train_recipe(file, &mut session)
}

#[track_caller]
fn refused(file: &RecipeFile, dir: &Path, resume: Resume, reasons: &[&str]) {
    let said = train(file, dir, resume).unwrap_err().to_string();
    assert!(reasons.iter().all(|reason| said.contains(reason)), "{reasons:?}: {said}");
}

#[test]
fn a_finished_stage_leaves_a_picture_of_its_losses() {
    let root = tempfile::tempdir().unwrap();
    data(root.path());
    let dir = root.path().join("run");
    train(&short(root.path(), &[]), &dir, Resume::No).unwrap();
    let picture = image::open(dir.join("stage1").join(CURVES)).unwrap();
    assert_eq!((picture.width(), picture.height()), (1120, 560));
}

#[test]
fn a_run_that_may_not_start_leaves_everything_as_it_is() {
    let root = tempfile::tempdir().unwrap();
    data(root.path());
    let (dir, features) = (root.path().join("run"), root.path().join("features"));
    let file = short(root.path(), &[]);
    train(&file, &dir, Resume::No).unwrap();
    let (vocab, manifest) = (dir.join("model/vocab.txt"), dir.join("model/model.json"));
    fs::write(&vocab, "as it is").unwrap();
    fs::remove_dir_all(&features).unwrap();
    let nothing_happened = || {
        assert_eq!(fs::read_to_string(&vocab).unwrap(), "as it is");
        assert!(!features.exists());
    };

    refused(&file, &dir, Resume::No, &["holds a run at step 3", "--resume"]);
    nothing_happened();
    let other = File::create(dir.join("stage1/.lock")).unwrap();
    other.lock().unwrap();
    refused(&file, &dir, Resume::Yes, &["in use by another run"]);
    nothing_happened();
    drop(other);
    // What the last stage lacks is said before the first one begins.
    let late = recipe(root.path(), &["stage2.init=\"nowhere/stage1\""]);
    refused(&late, &dir, Resume::Yes, &["nowhere/stage1"]);
    nothing_happened();
    let early = short(root.path(), &["stage1.init=\"nowhere/else\""]);
    refused(&early, &dir, Resume::Yes, &["nowhere/else"]);
    nothing_happened();
    fs::write(&manifest, "{").unwrap();
    refused(&file, &dir, Resume::Yes, &["model.json"]);
    nothing_happened();
    assert_eq!(fs::read_to_string(&manifest).unwrap(), "{");
}

#[test]
fn weights_to_start_from_that_do_not_fit_are_refused_with_their_file() {
    let root = tempfile::tempdir().unwrap();
    data(root.path());
    let path = root.path().join("start.safetensors");
    let place = path.to_str().unwrap();
    let dir = root.path().join("run");
    let first = short(root.path(), &[&format!("stage1.init=\"{place}\"")]);
    let mut second = recipe(root.path(), &[&format!("stage2.init=\"{place}\"")]);
    second.stage1 = None;
    let save = |value: f32| {
        let tensor = Tensor::new(value, &Device::Cpu).unwrap();
        save_tensors(&path, &BTreeMap::from([("a".to_owned(), tensor)])).unwrap();
    };
    for (value, reason) in [(f32::NAN, "a holds NaN"), (f32::NEG_INFINITY, "a holds -inf")] {
        save(value);
        refused(&first, &dir, Resume::No, &[place, reason]);
        refused(&second, &dir, Resume::No, &[place, reason]);
    }
    save(1.0);
    refused(&first, &dir, Resume::No, &[place, "missing"]);
    refused(&second, &dir, Resume::No, &[place, "no query_tokens"]);
}

/// Nothing can be learnt from a batch whose captions are all the same, but no run, and no resumed one, ends for it.
#[test]
fn two_samples_of_one_caption_are_skipped() {
    let root = tempfile::tempdir().unwrap();
    data(root.path());
    let same = root.path().join("same");
    let mut writer = ShardWriter::new(&same, "train", 2).unwrap();
    for key in ["a", "b"] {
        let mut sample = Sample { key: key.into(), ..first(root.path(), "train") };
        sample.meta.captions.clear();
        writer.write(&sample).unwrap();
    }
    writer.finish().unwrap();
    let place = format!("data.dir=\"{}\"", same.display());
    let file = short(root.path(), &[&place, "stage1.train.batch_size=2"]);
    let (dir, seen) = (root.path().join("run"), leak());
    assert_eq!(run(&file, &dir, Some((1, 1)), seen), Trained::Stopped);
    assert_eq!(hashes(&run(&file, &dir, None, seen)).len(), 1);
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 3);
    assert!(seen.values().all(|numbers| f64::from_bits(numbers[0]).is_nan()));
}

//! Training in mixed precision follows training in f32. A process of its own, because all its products are rounded.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use blip2_ops::MixedPrecision;
use blip2_train::Result;
use blip2_train::data::mini::{MiniConfig, build};
use blip2_train::log::StepRecord;
use blip2_train::recipe::{Recipe, RecipeFile};
use blip2_train::tasks::{Session, train_recipe};
use blip2_train::trainer::{Monitor, Resume, Start};

struct Losses(Arc<Mutex<Vec<f64>>>);

impl Monitor for Losses {
    fn start(&mut self, _: &Start) -> Result<()> {
        Ok(())
    }

    fn step(&mut self, record: &StepRecord, _: f64) -> Result<()> {
        self.0.lock().unwrap().push(record.loss);
        Ok(())
    }

    fn note(&mut self, _: &str) {}
}

/// The losses of 12 steps of each stage.
fn losses(root: &Path, name: &str, precision: &str) -> Result<Vec<f64>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/tiny_cpu.toml");
    let at = root.display();
    let mut changes =
        vec![format!("data.dir=\"{at}/data\""), format!("features.dir=\"{at}/features\"")];
    for stage in [1, 2] {
        changes.push(format!("stage{stage}.train.steps=12"));
        changes.push(format!("stage{stage}.train.precision=\"{precision}\""));
        changes.push(format!("stage{stage}.optimizer.warmup_steps=4"));
    }
    let file = RecipeFile::read(&path, &changes)?;
    let found = Arc::default();
    let mut session = Session {
        dir: &root.join(name),
        resume: Resume::No,
        stop: &AtomicBool::new(false),
        download: &mut |_, _, _| {},
        encoding: &mut |_, _| {},
        monitor: &mut |_, _: &Path, _: &Recipe| Box::new(Losses(Arc::clone(&found))),
    };
    train_recipe(&file, &mut session)?;
    let losses = found.lock().unwrap().clone();
    Ok(losses)
}

#[test]
fn mixed_precision_follows_f32_and_itself_to_the_bit() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    build(&MiniConfig::tiny(&root.join("data"), 32), &|_| {}).unwrap();
    if MixedPrecision::start().is_none() {
        let refusal = losses(root, "mixed", "bf16").unwrap_err().to_string();
        assert!(refusal.contains("AVX-512 BF16"), "{refusal}");
        assert!(!root.join("mixed").exists(), "nothing is begun");
        return;
    }
    let exact = losses(root, "exact", "f32").unwrap();
    let mixed = losses(root, "mixed", "bf16").unwrap();
    assert_eq!(exact.len(), 24);
    assert_ne!(exact, mixed);
    for (step, (exact, mixed)) in exact.iter().zip(&mixed).enumerate() {
        assert!((exact - mixed).abs() < 0.02 * exact, "step {step}: {mixed} instead of {exact}");
    }
    assert_eq!(losses(root, "again", "bf16").unwrap(), mixed);
}

//! `kill -9` at 20 random moments of a run of both stages, resumed each time: the same loss bits and weight hashes as a
//! run that nobody touched. The killed run is this same test program, started again for [`child`] alone.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use blip2_train::checkpoint::{Checkpoints, sha256};
use blip2_train::data::mini::{MiniConfig, build};
use blip2_train::log::read_metrics;
use blip2_train::monitor::{METRICS, RunLog};
use blip2_train::recipe::{Recipe, RecipeFile};
use blip2_train::rng::Rng;
use blip2_train::tasks::{Session, Trained, train_recipe};
use blip2_train::trainer::{MODEL, Resume};

const KILLS: usize = 20;
const STEPS: u64 = 60;
const ROOT: &str = "BLIP2_KILL_TEST_ROOT";
const RUN: &str = "BLIP2_KILL_TEST_RUN";

/// Trains in the folder that the environment names; the other test's process.
#[test]
#[ignore = "started by the other test, as the process to be killed"]
fn child() {
    let (Ok(root), Ok(run)) = (std::env::var(ROOT), std::env::var(RUN)) else { return };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/tiny_cpu.toml");
    let mut changes =
        vec![format!("data.dir=\"{root}/data\""), format!("features.dir=\"{run}/features\"")];
    changes.extend(
        [
            "stage1.train.batch_size=4",
            "stage2.train.batch_size=4",
            "runtime.checkpoint_every=2",
            "runtime.keep_checkpoints=2",
        ]
        .map(str::to_owned),
    );
    changes.extend([1, 2].map(|stage| format!("stage{stage}.train.steps={STEPS}")));
    let file = RecipeFile::read(&path, &changes).unwrap();
    let mut session = Session {
        dir: Path::new(&run),
        resume: Resume::Yes,
        stop: &AtomicBool::new(false),
        download: &mut |_, _, _| {},
        encoding: &mut |_, _| {},
        monitor: &mut |_, dir: &Path, recipe: &Recipe| {
            Box::new(RunLog::new(dir, recipe.runtime.log_every))
        },
    };
    assert!(matches!(train_recipe(&file, &mut session).unwrap(), Trained::Finished { .. }));
}

fn start(root: &Path, run: &Path) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--ignored"])
        .envs([(ROOT, root), (RUN, run)])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Every number of every step but its speed, and the hash of the result, of both stages.
fn result(run: &Path) -> Vec<(Vec<Vec<u64>>, String)> {
    let stage = |name: &str| {
        let dir = run.join(name);
        let steps = read_metrics(&dir.join(METRICS)).unwrap().into_iter().map(|record| {
            let numbers = [record.loss, record.lr, record.grad_norm].into_iter();
            let bits = numbers.chain(record.parts.into_values()).map(f64::to_bits);
            std::iter::once(record.step).chain(bits).collect()
        });
        (steps.collect(), sha256(&std::fs::read(dir.join(MODEL)).unwrap()))
    };
    vec![stage("stage1"), stage("stage2")]
}

/// The step of the newest checkpoint, of both stages together.
fn progress(run: &Path) -> u64 {
    let newest = |stage: &str| {
        let store = Checkpoints::new(run.join(stage).join("checkpoints"), 1);
        store.list().unwrap().last().map_or(0, |(step, _)| *step)
    };
    newest("stage1") + newest("stage2")
}

#[test]
fn killed_twenty_times_it_ends_with_the_same_bits() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    build(&MiniConfig::tiny(&root.join("data"), 32), &|_| {}).unwrap();

    let whole = root.join("whole");
    let begin = std::time::Instant::now();
    assert!(start(root, &whole).wait().unwrap().success());
    let usual = begin.elapsed();
    let expected = result(&whole);
    assert_eq!(expected[0].0.len(), STEPS as usize);

    // Kills are spread over the run: the k-th comes a random while after the k-th part of the way is done.
    let killed = root.join("killed");
    let mut rng = Rng::new(std::process::id().into(), &[]);
    let mut kills = 0;
    for k in 0..KILLS as u64 {
        let mut child = start(root, &killed);
        let goal = k * 2 * STEPS / KILLS as u64;
        while progress(&killed) < goal && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(2));
        }
        let pause = usual.as_secs_f64() / KILLS as f64 * rng.uniform();
        std::thread::sleep(Duration::from_secs_f64(pause));
        kills += usize::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(start(root, &killed).wait().unwrap().success());
    assert!(kills >= KILLS / 2, "only {kills} of {KILLS} kills came before the end");
    assert_eq!(result(&killed), expected);
}

//! A long run must not grow: resident memory after 2 000 tiny steps is what it was after the warm-up. A process of its
//! own, because other tests' memory would hide the leak.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(target_os = "linux")]

use std::path::Path;
use std::sync::atomic::AtomicBool;

use blip2_train::Result;
use blip2_train::data::mini::{MiniConfig, build};
use blip2_train::log::StepRecord;
use blip2_train::recipe::{Recipe, RecipeFile};
use blip2_train::tasks::{Session, train_recipe};
use blip2_train::trainer::{Monitor, Resume, Start};

const STEPS: u64 = 2000;
/// Steps until every allocator, thread and checkpoint has had its turn.
const WARM: u64 = 400;
/// One f32 activation tensor of a step leaked each time would be more than this.
const GROWTH: u64 = 8 << 20;

struct Resident {
    stage: u32,
    warm: u64,
}

impl Monitor for Resident {
    fn start(&mut self, _: &Start) -> Result<()> {
        Ok(())
    }

    fn step(&mut self, record: &StepRecord, _: f64) -> Result<()> {
        if record.step <= WARM {
            self.warm = self.warm.max(resident());
        } else if record.step == STEPS {
            let (warm, now) = (self.warm, resident());
            assert!(now <= warm + GROWTH, "stage {}: {warm} → {now} bytes", self.stage);
        }
        Ok(())
    }

    fn note(&mut self, _: &str) {}
}

/// Resident bytes of this process.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn two_thousand_steps_need_no_more_memory_than_four_hundred() {
    let root = tempfile::tempdir().unwrap();
    let at = root.path().display();
    build(&MiniConfig::tiny(&root.path().join("data"), 32), &|_| {}).unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/tiny_cpu.toml");
    let mut changes =
        vec![format!("data.dir=\"{at}/data\""), format!("features.dir=\"{at}/features\"")];
    changes.extend(
        [
            "model.vision={from=\"random\", image_size=28, patch_size=14, width=24, depth=1, num_heads=2, mlp_width=24}",
            "model.qformer.init={from=\"random\", width=24, depth=2, num_heads=2, ffn_width=24}",
            "model.qformer.num_queries=2",
            "stage1.train.batch_size=4",
            "stage2.train.batch_size=4",
            "runtime.checkpoint_every=100",
        ]
        .map(str::to_owned),
    );
    changes.extend([1, 2].map(|stage| format!("stage{stage}.train.steps={STEPS}")));
    let file = RecipeFile::read(&path, &changes).unwrap();
    let mut session = Session {
        dir: &root.path().join("run"),
        resume: Resume::No,
        stop: &AtomicBool::new(false),
        download: &mut |_, _, _| {},
        encoding: &mut |_, _| {},
        monitor: &mut |stage, _: &Path, _: &Recipe| Box::new(Resident { stage, warm: 0 }),
    };
    train_recipe(&file, &mut session).unwrap();
}

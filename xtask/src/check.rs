//! The steps of `cargo xtask check`. Each is a command that can be run by hand as well.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::tidy;

/// One step.
pub(crate) struct Step {
    name: &'static str,
    run: fn(&Path) -> Result<()>,
}

const FMT: Step = Step { name: "fmt", run: |root| cargo(root, &["fmt", "--all", "--check"], &[]) };

const TIDY: Step = Step { name: "tidy", run: tidy::run };

const DENY: Step = Step { name: "deny", run: deny };

// Everything is built in the one profile that is also run: a debug build would compile it all once more.
const CLIPPY: Step = Step {
    name: "clippy",
    run: |root| {
        let args = ["clippy", "--workspace", "--all-targets", "--release", "--", "-D", "warnings"];
        cargo(root, &args, &[])
    },
};

const DOCS: Step = Step {
    name: "docs",
    run: |root| {
        let args = ["doc", "--no-deps", "--workspace", "--release"];
        cargo(root, &args, &[("RUSTDOCFLAGS", "-D warnings")])
    },
};

const TEST: Step =
    Step { name: "test", run: |root| cargo(root, &["test", "--release", "--workspace"], &[]) };

/// Everything, cheapest first; the tests' closing lines come last.
pub(crate) const ALL: &[Step] = &[FMT, TIDY, DENY, CLIPPY, DOCS, TEST];

/// What should pass before every commit.
pub(crate) const FAST: &[Step] = &[FMT, TIDY, CLIPPY];

/// The step called `name`.
pub(crate) fn step(name: &str) -> Option<&'static Step> {
    ALL.iter().find(|step| step.name == name)
}

/// Runs `steps` in `root`, and stops at the first that fails.
pub(crate) fn run(steps: &[Step], root: &Path) -> Result<()> {
    for (i, step) in steps.iter().enumerate() {
        eprintln!("== {} ({} of {})", step.name, i + 1, steps.len());
        let start = Instant::now();
        (step.run)(root).with_context(|| format!("step {}", step.name))?;
        eprintln!("== {}: fine, {:.0} s", step.name, start.elapsed().as_secs_f64());
    }
    Ok(())
}

fn cargo(root: &Path, args: &[&str], vars: &[(&str, &str)]) -> Result<()> {
    let status = Command::new("cargo")
        .args(args)
        .envs(vars.iter().copied())
        .current_dir(root)
        .status()
        .context("cargo can't be started")?;
    if !status.success() {
        bail!("`cargo {}` failed ({status})", args.join(" "));
    }
    Ok(())
}

/// Licences, sources and duplicates as in `deny.toml`. Building cargo-deny takes longer than all else together on a
/// small machine, so it is used where it is installed and missed aloud where it is not.
fn deny(root: &Path) -> Result<()> {
    let there = Command::new("cargo").args(["deny", "--version"]).output();
    if !there.is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: cargo-deny is not installed (cargo install --locked cargo-deny)");
        return Ok(());
    }
    // Without advisories: their data base lies on a host that build machines may not reach.
    cargo(root, &["deny", "--workspace", "check", "bans", "licenses", "sources"], &[])
}

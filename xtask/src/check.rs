//! The steps of `cargo xtask check`. Each is a command that can be run by hand as well.
//!
//! Tests that could not run are named again in the last lines. In CI (`CI=true`), where nobody reads them, that is a
//! failure, unless `BLIP2_ALLOW_SKIPS=1` says that it is meant.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::tidy;

/// One step.
pub(crate) struct Step {
    name: &'static str,
    run: fn(&Path) -> Result<Done>,
}

/// What a step that did not fail says.
enum Done {
    /// All was checked.
    Fine,
    /// Something could not be: what, and why.
    Skipped(String),
}

const FMT: Step = Step { name: "fmt", run: |root| cargo(root, &["fmt", "--all", "--check"], &[]) };

const TIDY: Step = Step { name: "tidy", run: |root| tidy::run(root).map(|()| Done::Fine) };

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

/// Tests on real weights say that they skip where the mini parts are missing; this gets them.
const PARTS: Step = Step {
    name: "parts",
    run: |root| {
        let args = ["run", "--release", "--package", "blip2-cli", "--", "pull", "mini"];
        Ok(match cargo(root, &args, &[]) {
            Ok(done) => done,
            Err(err) => Done::Skipped(format!(
                "the parts of mini can't be had ({err:#}); real-weight tests did not run"
            )),
        })
    },
};

const TEST: Step =
    Step { name: "test", run: |root| cargo(root, &["test", "--release", "--workspace"], &[]) };

/// Everything, cheapest first; the tests' closing lines come last.
pub(crate) const ALL: &[Step] = &[FMT, TIDY, DENY, CLIPPY, DOCS, PARTS, TEST];

/// What should pass before every commit.
pub(crate) const FAST: &[Step] = &[FMT, TIDY, CLIPPY];

/// The step called `name`.
pub(crate) fn step(name: &str) -> Option<&'static Step> {
    ALL.iter().find(|step| step.name == name)
}

/// Runs `steps` in `root`, and stops at the first that fails. Its last lines say what was skipped, and in CI it fails for
/// that.
pub(crate) fn run(steps: &[Step], root: &Path) -> Result<()> {
    let mut skipped = Vec::new();
    let ran = run_each(steps, root, &mut skipped);
    for what in &skipped {
        eprintln!("SKIPPED: {what}");
    }
    ran?;
    let is_set = |name: &str, value: &str| std::env::var(name).is_ok_and(|set| set == value);
    judge(&skipped, is_set("CI", "true") && !is_set("BLIP2_ALLOW_SKIPS", "1"))
}

fn run_each(steps: &[Step], root: &Path, skipped: &mut Vec<String>) -> Result<()> {
    for (i, step) in steps.iter().enumerate() {
        eprintln!("== {} ({} of {})", step.name, i + 1, steps.len());
        let start = Instant::now();
        let done = (step.run)(root).with_context(|| format!("step {}", step.name))?;
        let word = match done {
            Done::Fine => "fine",
            Done::Skipped(what) => {
                eprintln!("SKIPPED: {what}");
                skipped.push(what);
                "skipped"
            }
        };
        eprintln!("== {}: {word}, {:.0} s", step.name, start.elapsed().as_secs_f64());
    }
    Ok(())
}

/// Whether a run that skipped something passes.
fn judge(skipped: &[String], strict: bool) -> Result<()> {
    if strict && !skipped.is_empty() {
        bail!("{} skipped, and CI is true; BLIP2_ALLOW_SKIPS=1 allows it", skipped.len());
    }
    Ok(())
}

fn cargo(root: &Path, args: &[&str], vars: &[(&str, &str)]) -> Result<Done> {
    let status = Command::new("cargo")
        .args(args)
        .envs(vars.iter().copied())
        .current_dir(root)
        .status()
        .context("cargo can't be started")?;
    if !status.success() {
        bail!("`cargo {}` failed ({status})", args.join(" "));
    }
    Ok(Done::Fine)
}

/// Licences, sources and duplicates as in `deny.toml`. Building cargo-deny takes longer than all else together on a
/// small machine, so it is used where it is installed and missed aloud where it is not; no test depends on it.
fn deny(root: &Path) -> Result<Done> {
    let there = Command::new("cargo").args(["deny", "--version"]).output();
    if !there.is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: cargo-deny is not installed (cargo install --locked cargo-deny)");
        return Ok(Done::Fine);
    }
    // Without advisories: their data base lies on a host that build machines may not reach.
    cargo(root, &["deny", "--workspace", "check", "bans", "licenses", "sources"], &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    const SKIPS: Step = Step { name: "skips", run: |_| Ok(Done::Skipped("it".into())) };
    const FAILS: Step = Step { name: "fails", run: |_| bail!("no") };

    #[test]
    fn what_is_skipped_is_kept_whatever_comes_behind_it() {
        let mut skipped = Vec::new();
        run_each(&[SKIPS, SKIPS], Path::new("."), &mut skipped).unwrap();
        assert_eq!(skipped, ["it", "it"]);
        skipped.clear();
        assert!(run_each(&[SKIPS, FAILS, SKIPS], Path::new("."), &mut skipped).is_err());
        assert_eq!(skipped, ["it"]);
    }

    #[test]
    fn skipping_fails_where_nobody_reads_that_it_did() {
        let skipped = ["it".to_owned()];
        assert!(judge(&skipped, false).is_ok());
        assert!(judge(&[], true).is_ok());
        let said = judge(&skipped, true).unwrap_err().to_string();
        assert!(said.contains("BLIP2_ALLOW_SKIPS=1"), "{said}");
    }
}

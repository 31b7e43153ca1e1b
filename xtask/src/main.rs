//! The chores of this repository: `cargo xtask check` is exactly what CI runs.

mod check;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask CHORE

  check      everything CI runs, cheapest first: fmt, tidy, deny, clippy, docs, test
  fast       fmt, tidy and clippy: before a commit
  fmt        formatting (check only)
  tidy       the rules of this repository that no other tool knows
  deny       licences and sources of dependencies, if cargo-deny is installed
  clippy     lints, warnings are errors
  docs       documentation, warnings are errors
  test       all tests, as in README.md";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [chore] = args.as_slice() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let steps = match chore.as_str() {
        "check" => check::ALL,
        "fast" => check::FAST,
        name => match check::step(name) {
            Some(step) => std::slice::from_ref(step),
            None => {
                eprintln!("{USAGE}");
                return ExitCode::from(2);
            }
        },
    };
    match check::run(steps, &root()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("error: {err:#}");
            ExitCode::FAILURE
        }
    }
}

/// The root of the repository: the folder above this package.
fn root() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package).to_path_buf()
}

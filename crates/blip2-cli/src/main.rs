//! The `blip2` program. One verb, one file; this one is the table of contents.

mod ask;
mod bench;
mod caption;
mod cli;
mod convert;
mod data;
mod embed;
mod eval;
mod hub;
mod inspect;
mod matching;
mod memory;
mod model;
mod new_folder;
mod output;
mod pictures;
mod progress;
mod pull;
mod texts;
mod threads;
mod train;

use std::process::ExitCode;

use crate::cli::{Cli, Verb};
use crate::progress::say;

/// Tensors come and go by the megabyte; the system's allocator gives such memory back and asks for it again each time,
/// which costs a training step about half as much again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Whether everything went well; errors of single pictures are reported where they happen and end in `SomeFailed`.
pub(crate) enum Outcome {
    AllFine,
    SomeFailed,
}

fn main() -> ExitCode {
    threads::one_pool();
    memory::give_back_soon();
    // Wrong usage leaves through clap with code 2, `--help` with code 0.
    let cli = Cli::read(std::env::args_os()).unwrap_or_else(|err| err.exit());
    match run(&cli) {
        Ok(Outcome::AllFine) => ExitCode::SUCCESS,
        Ok(Outcome::SomeFailed) => ExitCode::FAILURE,
        Err(err) if output::is_closed_pipe(&err) => ExitCode::SUCCESS,
        Err(err) => {
            say(&format!("blip2: {err:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<Outcome> {
    cli.global.apply()?;
    match &cli.verb {
        Verb::Caption(args) => caption::run(&cli.global, args),
        Verb::Ask(args) => ask::run(&cli.global, args),
        Verb::Match(args) => matching::run(&cli.global, args),
        Verb::Embed(args) => embed::run(&cli.global, args),
        Verb::Inspect(args) => inspect::run(&cli.global, args),
        Verb::Pull(args) => pull::run(&cli.global, args),
        Verb::Convert(args) => convert::run(&cli.global, args),
        Verb::Data(args) => data::run(&cli.global, args),
        Verb::Train(args) => train::run(&cli.global, args),
        Verb::Eval(args) => eval::run(&cli.global, args),
        Verb::Bench(args) => bench::run(&cli.global, args),
    }
}

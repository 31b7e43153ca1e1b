//! `blip2 train`: everything a recipe says, from its data to a model folder.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use blip2_train::data::mini::{self, MiniConfig};
use blip2_train::data::package::Origin;
use blip2_train::monitor::RunLog;
use blip2_train::recipe::{DataBuild, RecipeFile};
use blip2_train::tasks::{Session, Trained, train_recipe};
use blip2_train::trainer::{Monitor, Resume};

use crate::Outcome;
use crate::cli::TrainArgs;
use crate::progress::{self, Progress};

/// Training pictures of the set that is drawn, not downloaded.
const TINY_SAMPLES: usize = 512;

pub(crate) fn run(args: &TrainArgs) -> anyhow::Result<Outcome> {
    let recipe = RecipeFile::read(&args.recipe, &args.set)?;
    let stop = stop_on_signal()?;
    build_data(&recipe.data.dir, recipe.data.build)?;
    let dir = run_dir(&recipe, args.out.as_ref());
    let (mut downloads, mut pictures) = (Progress::bytes(), Progress::pictures());
    let mut session = Session {
        dir: &dir,
        resume: if args.resume { Resume::Yes } else { Resume::No },
        stop: &stop,
        download: &mut |name, done, total| downloads.update(name, done, total),
        encoding: &mut |done, total| pictures.update("encoding pictures", done, total),
        monitor: &mut |_, dir, recipe| -> Box<dyn Monitor> {
            Box::new(RunLog::new(dir, recipe.runtime.log_every))
        },
    };
    match train_recipe(&recipe, &mut session)? {
        Trained::Stopped => {
            eprintln!("stopped; go on with: blip2 train {} --resume", args.recipe.display());
            Ok(Outcome::SomeFailed)
        }
        Trained::Finished { model, .. } => {
            println!("{}", model.display());
            eprintln!("try it: blip2 caption --model {} PICTURE", model.display());
            Ok(Outcome::AllFine)
        }
    }
}

/// Makes the data set of `dir` if it is not there yet.
pub(crate) fn build_data(dir: &Path, build: DataBuild) -> anyhow::Result<()> {
    let config = match build {
        DataBuild::None => return Ok(()),
        _ if dir.join("mini.json").is_file() => return Ok(()),
        DataBuild::Tiny => MiniConfig::tiny(dir, TINY_SAMPLES),
        DataBuild::Mini => {
            MiniConfig::full(dir, Origin::Cache(blip2::assets::cache_dir()?.join("packages")))
        }
    };
    eprintln!("building the data set in {}", dir.display());
    mini::build(&config, &progress::say)
        .with_context(|| format!("building the data set in {}", dir.display()))?;
    Ok(())
}

/// A flag that Ctrl-C and a request to terminate set; a second one ends the program at once.
fn stop_on_signal() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::SeqCst) {
            #[expect(clippy::exit, reason = "the second Ctrl-C means it; checkpoints are atomic")]
            std::process::exit(130);
        }
        eprintln!("\nstopping after this step; once more to stop at once");
    })?;
    Ok(stop)
}

/// The folder of a recipe's run.
pub(crate) fn run_dir(recipe: &RecipeFile, out: Option<&PathBuf>) -> PathBuf {
    out.cloned().unwrap_or_else(|| Path::new("runs").join(&recipe.name))
}

//! `blip2 train`: everything a recipe says, from its data to a model folder.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use blip2_train::budget::Budget;
use blip2_train::data::mini::{self, MiniConfig};
use blip2_train::data::package::Origin;
use blip2_train::log::StepRecord;
use blip2_train::monitor::RunLog;
use blip2_train::recipe::{DataBuild, Length, RecipeFile};
use blip2_train::tasks::{Session, Trained, train_recipe, use_threads};
use blip2_train::trainer::{Monitor, Resume, Start};
use serde_json::json;

use crate::cli::{Global, TrainArgs};
use crate::progress::{Progress, say};
use crate::{Outcome, memory, output};

/// Training pictures of the set that is drawn, not downloaded.
const TINY_SAMPLES: usize = 512;

pub(crate) fn run(global: &Global, args: &TrainArgs) -> anyhow::Result<Outcome> {
    let recipe = RecipeFile::read(&args.recipe, &args.set)?;
    if args.dry_run {
        return dry_run(global, &recipe);
    }
    if let Some(unheeded) = use_threads(recipe.runtime.threads) {
        say(&unheeded);
    }
    let stop = stop_on_signal()?;
    build_data(&recipe.data.dir, recipe.data.build)?;
    memory::give_back_soon();
    let dir = run_dir(&recipe, args.out.as_ref());
    let (mut downloads, mut pictures) = (Progress::bytes(), Progress::pictures());
    let mut session = Session {
        dir: &dir,
        resume: match (args.resume, args.with_changes) {
            (false, _) => Resume::No,
            (true, false) => Resume::Yes,
            (true, true) => Resume::WithChanges,
        },
        stop: &stop,
        download: &mut |name, done, total| downloads.update(name, done, total),
        encoding: &mut |done, total| {
            memory::keep();
            pictures.update("encoding pictures", done, total);
        },
        monitor: &mut |_, dir, recipe| -> Box<dyn Monitor> {
            Box::new(Loaded(RunLog::new(dir, recipe.runtime.log_every)))
        },
    };
    match train_recipe(&recipe, &mut session)? {
        Trained::Stopped => {
            say(&format!("stopped; go on with: {}", resume_command(args)));
            Ok(Outcome::SomeFailed)
        }
        Trained::Finished { model, .. } => {
            let model = model.to_string_lossy();
            output::line(global.format, &json!({"model": model}), &model)?;
            say(&format!("try it: blip2 caption --model {} PICTURE", quoted(&model)));
            Ok(Outcome::AllFine)
        }
    }
}

/// A run's log, at whose first line the model is in memory.
struct Loaded(RunLog);

impl Monitor for Loaded {
    fn start(&mut self, start: &Start) -> blip2_train::Result<()> {
        memory::keep();
        self.0.start(start)
    }

    fn step(&mut self, record: &StepRecord, waiting: f64) -> blip2_train::Result<()> {
        self.0.step(record, waiting)
    }

    fn note(&mut self, text: &str) {
        self.0.note(text);
    }
}

/// A table of what each stage of the recipe takes.
fn dry_run(global: &Global, file: &RecipeFile) -> anyhow::Result<Outcome> {
    for recipe in file.runs() {
        let budget = Budget::of(&recipe)?;
        let millions = |n: u64| format!("{:.1} M ({n})", n as f64 / 1e6);
        let gigabytes = |n: u64| format!("{:.1} GB", n as f64 / 1e9);
        let length = match recipe.length {
            Length::Steps(n) => format!("{n} steps"),
            Length::Epochs(n) => format!("{n} epochs"),
        };
        let [vision, bridge, llm] = budget.flops.map(|flops| flops / 1e12);
        let all = budget.frozen_bytes + budget.trained_bytes + budget.activation_bytes;
        let text = [
            format!(
                "{}, stage {}: {length} of {} pictures",
                recipe.name, budget.stage, budget.pictures
            ),
            format!(
                "  trained         {}, ln_vision {} of them",
                millions(budget.trained),
                budget.ln_vision
            ),
            format!("  image encoder   {}", millions(budget.vision)),
            format!("  language model  {}", millions(budget.llm)),
            format!(
                "  memory          {} = frozen {} + trained {} + activations about {}",
                gigabytes(all),
                gigabytes(budget.frozen_bytes),
                gigabytes(budget.trained_bytes),
                gigabytes(budget.activation_bytes)
            ),
            format!(
                "  arithmetic      {:.1} TFLOP a step = image encoder {vision:.1} + bridge {bridge:.1} + language model {llm:.1}",
                vision + bridge + llm
            ),
        ];
        output::line(global.format, &serde_json::to_value(&budget)?, &text.join("\n"))?;
    }
    Ok(Outcome::AllFine)
}

/// What to type to go on: with another folder or other changes it would be another run.
fn resume_command(args: &TrainArgs) -> String {
    let mut command = format!("blip2 train {}", quoted(&args.recipe.to_string_lossy()));
    if let Some(out) = &args.out {
        command += &format!(" --out {}", quoted(&out.to_string_lossy()));
    }
    for change in &args.set {
        command += &format!(" --set {}", quoted(change));
    }
    command + " --resume"
}

/// A word as a shell wants it: in single quotes, if something in it has a meaning there.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "-_./=,:@%+".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
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
    say(&format!("building the data set in {}", dir.display()));
    memory::keep();
    mini::build(&config, &say)
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
        say("\nstopping after this step; once more to stop at once");
    })?;
    Ok(stop)
}

/// The folder of a recipe's run.
pub(crate) fn run_dir(recipe: &RecipeFile, out: Option<&PathBuf>) -> PathBuf {
    out.cloned().unwrap_or_else(|| Path::new("runs").join(&recipe.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_to_go_on_names_the_same_run() {
        let mut args = TrainArgs {
            recipe: "recipes/tiny_cpu.toml".into(),
            set: Vec::new(),
            out: None,
            dry_run: false,
            resume: false,
            with_changes: false,
        };
        assert_eq!(resume_command(&args), "blip2 train recipes/tiny_cpu.toml --resume");
        args.out = Some("my runs/a".into());
        args.set = vec!["seed=3".into(), "stage2.prompt=it's".into()];
        let expected = r"--out 'my runs/a' --set seed=3 --set 'stage2.prompt=it'\''s' --resume";
        assert_eq!(resume_command(&args), format!("blip2 train recipes/tiny_cpu.toml {expected}"));
    }
}

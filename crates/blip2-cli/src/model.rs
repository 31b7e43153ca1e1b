//! From `--model` to a loaded model.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use blip2::generate::{Beam, Options, Sampling, Strategy};
use blip2::mini;
use blip2::model::{Captioner, Files, MANIFEST, Matcher, Model};

use crate::cli::{GenerateArgs, Global};
use crate::progress::Progress;

/// Finds the model that `name` stands for and reads its description.
pub(crate) fn open(name: &str) -> anyhow::Result<Model> {
    if name == "mini" {
        return Ok(mini::model()?);
    }
    let folder = PathBuf::from(name);
    if !folder.join(MANIFEST).is_file() {
        anyhow::bail!("--model {name}: neither `mini` nor a folder with a {MANIFEST}");
    }
    Ok(Model::open(Files::Folder(folder))?)
}

/// Loads what captions and answers.
pub(crate) fn captioner(global: &Global) -> anyhow::Result<Captioner> {
    let mut bar = Progress::bytes();
    let model = open(&global.model)?;
    Ok(model.captioner(global.weights, &mut |name, done, total| bar.update(name, done, total))?)
}

/// Loads what matches and embeds.
pub(crate) fn matcher(global: &Global) -> anyhow::Result<Matcher> {
    let mut bar = Progress::bytes();
    let model = open(&global.model)?;
    Ok(model.matcher(global.weights, &mut |name, done, total| bar.update(name, done, total))?)
}

/// The search that was typed: sampling if one of its flags was given, else beams, else greedy.
pub(crate) fn generate_options(args: &GenerateArgs, num_return: usize) -> anyhow::Result<Options> {
    let sampled = args.top_p.is_some() || args.temperature.is_some();
    let strategy = if sampled {
        Strategy::Sample(Sampling {
            temperature: args.temperature.unwrap_or(1.0),
            top_p: args.top_p.unwrap_or(1.0),
            top_k: 0,
            seed: args.seed,
        })
    } else if args.num_beams == 1 {
        Strategy::Greedy
    } else {
        Strategy::Beam(Beam {
            num_beams: args.num_beams.into(),
            length_penalty: args.length_penalty,
            ..Beam::default()
        })
    };
    if !sampled && num_return > args.num_beams.into() {
        anyhow::bail!(
            "--num-captions {num_return} needs at least as many --num-beams, or --top-p to sample"
        );
    }
    Ok(Options {
        strategy,
        max_new_tokens: args.max_new_tokens.into(),
        min_new_tokens: args.min_new_tokens.into(),
        repetition_penalty: args.repetition_penalty,
        num_return,
        eos: Vec::new(),
    })
}

/// A folder to write into that is not there yet, or is empty.
pub(crate) fn check_new_folder(folder: &Path) -> anyhow::Result<()> {
    let taken = folder.is_dir()
        && folder.read_dir().with_context(|| folder.display().to_string())?.next().is_some();
    if taken {
        anyhow::bail!("{}: this folder is not empty", folder.display());
    }
    Ok(())
}

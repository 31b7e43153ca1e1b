//! From `--model` to a loaded model.

use std::path::Path;

use anyhow::Context as _;
use blip2::generate::{Beam, Options, RepetitionScope, Sampling, Strategy};
use blip2::hub::HubId;
use blip2::mini;
use blip2::model::{Captioner, Matcher, Model};

use crate::cli::{GenerateArgs, Global, ScopeName};
use crate::progress::Progress;
use crate::{hub, memory};

/// Finds the model that `name` stands for and reads its description.
pub(crate) fn open(name: &str) -> anyhow::Result<Model> {
    if name == "mini" {
        return Ok(mini::model()?);
    }
    let folder = Path::new(name);
    if folder.is_dir() {
        return Model::open_folder(folder).with_context(|| format!("--model {name}"));
    }
    let Ok(id) = name.parse::<HubId>() else {
        anyhow::bail!(
            "--model {name}: neither `mini`, nor a folder, nor a name on the hub (ORG/NAME)"
        );
    };
    let mut bar = Progress::bytes();
    let mut progress = |name: &str, done, total| bar.update(name, done, total);
    let folder = hub::from_env()?
        .folder(&id, &mut progress)
        .with_context(|| format!("--model {name}: no such folder here, so a name on the hub"))?;
    Model::open_folder(&folder).with_context(|| format!("--model {name}"))
}

/// Loads what captions and answers.
pub(crate) fn captioner(global: &Global, model: &Model) -> anyhow::Result<Captioner> {
    let mut bar = Progress::bytes();
    let loaded = model
        .captioner(global.weights.0, &mut |name, done, total| bar.update(name, done, total))?;
    memory::keep();
    Ok(loaded)
}

/// Loads what matches and embeds.
pub(crate) fn matcher(global: &Global, model: &Model) -> anyhow::Result<Matcher> {
    let mut bar = Progress::bytes();
    let loaded =
        model.matcher(global.weights.0, &mut |name, done, total| bar.update(name, done, total))?;
    memory::keep();
    Ok(loaded)
}

/// Loads both stages around one image encoder.
pub(crate) fn both(global: &Global, model: &Model) -> anyhow::Result<(Captioner, Matcher)> {
    let mut bar = Progress::bytes();
    let loaded =
        model.both(global.weights.0, &mut |name, done, total| bar.update(name, done, total))?;
    memory::keep();
    Ok(loaded)
}

/// The search that was typed: sampling if one of its flags was given, else beams, else greedy.
pub(crate) fn generate_options(args: &GenerateArgs, num_return: usize) -> Options {
    let strategy = if args.is_sampled() {
        Strategy::Sample(Sampling {
            temperature: args.temperature.unwrap_or(1.0),
            top_p: args.top_p.unwrap_or(1.0),
            top_k: args.top_k.map_or(0, |k| k as usize),
            seed: args.seed.unwrap_or(0),
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
    Options {
        strategy,
        max_new_tokens: args.max_new_tokens.into(),
        min_new_tokens: args.min_new_tokens.into(),
        repetition_penalty: args.repetition_penalty,
        repetition_scope: match args.repetition_scope {
            ScopeName::All => RepetitionScope::All,
            ScopeName::New => RepetitionScope::New,
        },
        num_return,
        eos: Vec::new(),
    }
}

//! `blip2 data`: make and check training data.

use std::path::Path;

use blip2_train::data::mini::{self, MiniConfig};
use blip2_train::data::package::Origin;
use blip2_train::data::{ShardReader, Tally};
use serde_json::json;

use crate::cli::{DataArgs, DataCheckArgs, DataMiniArgs, DataVerb, Global};
use crate::progress::say;
use crate::{Outcome, new_folder, output};

pub(crate) fn run(global: &Global, args: &DataArgs) -> anyhow::Result<Outcome> {
    match &args.verb {
        DataVerb::Mini(args) => build_mini(global, args),
        DataVerb::Check(args) => check(global, args),
    }
}

fn build_mini(global: &Global, args: &DataMiniArgs) -> anyhow::Result<Outcome> {
    let report =
        new_folder::write(&args.out, |folder| Ok(mini::build(&mini_config(args, folder)?, &say)?))?;
    for (split, sources) in &report.counts {
        let pictures = sources.values().sum::<usize>();
        let json = json!({"split": split, "pictures": pictures});
        output::line(global.format, &json, &format!("{split}: {pictures} pictures"))?;
    }
    let file = args.out.join("mini.json");
    let file = file.to_string_lossy();
    output::line(global.format, &json!({"file": file}), &file)?;
    Ok(Outcome::AllFine)
}

/// The set that was asked for, to be built in `out`.
fn mini_config(args: &DataMiniArgs, out: &Path) -> anyhow::Result<MiniConfig> {
    let mut config = match (args.tiny, &args.packages) {
        (Some(samples), _) => MiniConfig::tiny(out, samples),
        (None, Some(folder)) => MiniConfig::full(out, Origin::Folder(folder.clone())),
        (None, None) => {
            MiniConfig::full(out, Origin::Cache(blip2::assets::cache_dir()?.join("packages")))
        }
    };
    config.cifar_100.clone_from(&args.cifar_100);
    config.caltech_101.clone_from(&args.caltech_101);
    if let Some(seed) = args.seed {
        config.seed = seed;
    }
    Ok(config)
}

/// Reads every sample of the shards, and says what can't be used.
fn check(global: &Global, args: &DataCheckArgs) -> anyhow::Result<Outcome> {
    let mut tally = Tally::default();
    for shard in &args.shards {
        for sample in ShardReader::open(shard)? {
            match sample {
                Ok(_) => tally.good += 1,
                Err(bad) => {
                    say(&bad.to_string());
                    tally.add(&bad);
                }
            }
        }
    }
    let (samples, faults) = (tally.good, tally.bad());
    let json = json!({"samples": samples, "faults": faults});
    output::line(global.format, &json, &format!("{samples} samples, {faults} faults"))?;
    Ok(if faults == 0 { Outcome::AllFine } else { Outcome::SomeFailed })
}

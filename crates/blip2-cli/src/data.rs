//! `blip2 data`: make and check training data.

use blip2_train::data::mini::{self, MiniConfig};
use blip2_train::data::package::Origin;
use blip2_train::data::{ShardReader, Tally};

use crate::cli::{DataArgs, DataCheckArgs, DataMiniArgs, DataVerb};
use crate::{Outcome, model, progress};

pub(crate) fn run(args: &DataArgs) -> anyhow::Result<Outcome> {
    match &args.verb {
        DataVerb::Mini(args) => build_mini(args),
        DataVerb::Check(args) => check(args),
    }
}

fn build_mini(args: &DataMiniArgs) -> anyhow::Result<Outcome> {
    model::check_new_folder(&args.out)?;
    let mut config = match (args.tiny, &args.packages) {
        (Some(samples), _) => MiniConfig::tiny(&args.out, samples),
        (None, Some(folder)) => MiniConfig::full(&args.out, Origin::Folder(folder.clone())),
        (None, None) => MiniConfig::full(&args.out, Origin::Cache(blip2::assets::cache_dir()?.join("packages"))),
    };
    if let Some(seed) = args.seed {
        config.seed = seed;
    }
    let report = mini::build(&config, &progress::say)?;
    for (split, sources) in &report.counts {
        println!("{split}: {} pictures", sources.values().sum::<usize>());
    }
    println!("{}", args.out.join("mini.json").display());
    Ok(Outcome::AllFine)
}

/// Reads every sample of the shards, and says what can't be used.
fn check(args: &DataCheckArgs) -> anyhow::Result<Outcome> {
    let mut tally = Tally::default();
    for shard in &args.shards {
        for sample in ShardReader::open(shard)? {
            match sample {
                Ok(_) => tally.good += 1,
                Err(bad) => {
                    eprintln!("{bad}");
                    tally.add(&bad);
                }
            }
        }
    }
    println!("{} samples, {} faults", tally.good, tally.bad());
    Ok(if tally.bad() == 0 { Outcome::AllFine } else { Outcome::SomeFailed })
}

//! `blip2 convert`: write a model folder again, its bridge packed in few bits.

use blip2::pack::{self, Bits, Packing};

use crate::cli::{BitsName, ConvertArgs};
use crate::{Outcome, model};

pub(crate) fn run(args: &ConvertArgs) -> anyhow::Result<Outcome> {
    model::check_new_folder(&args.to)?;
    let packing = Packing { matrices: bits(args.matrices), embeddings: bits(args.embeddings) };
    let bytes = pack::pack(&model::open(&args.from)?, packing, &args.to)?;
    eprintln!("{:.1} MB of weights", bytes as f64 / 1e6);
    println!("{}", args.to.display());
    Ok(Outcome::AllFine)
}

fn bits(name: BitsName) -> Bits {
    match name {
        BitsName::F16 => Bits::F16,
        BitsName::Q8 => Bits::Q8,
        BitsName::Q5 => Bits::Q5,
        BitsName::Q4 => Bits::Q4,
    }
}

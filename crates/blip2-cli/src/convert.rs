//! `blip2 convert`: write a model folder again, its bridge packed in few bits.

use blip2::pack::{self, Bits, Packing};
use serde_json::json;

use crate::cli::{BitsName, ConvertArgs, Global};
use crate::progress::say;
use crate::{Outcome, model, new_folder, output};

pub(crate) fn run(global: &Global, args: &ConvertArgs) -> anyhow::Result<Outcome> {
    let packing = Packing { matrices: bits(args.matrices), embeddings: bits(args.embeddings) };
    let model = model::open(&args.from)?;
    let bytes = new_folder::write(&args.to, |folder| Ok(pack::pack(&model, packing, folder)?))?;
    say(&format!("{:.1} MB of weights", bytes as f64 / 1e6));
    let json = json!({"model": args.to.to_string_lossy(), "bytes": bytes});
    output::line(global.format, &json, &args.to.to_string_lossy())?;
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

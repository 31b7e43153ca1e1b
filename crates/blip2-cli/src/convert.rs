//! `blip2 convert`: write a model in another layout.

use std::path::Path;

use anyhow::bail;
use blip2::convert::{FrozenFiles, Half, Parts};
use blip2::lavis::HeadCounts;
use blip2::model::Files;
use blip2::pack::{self, Bits, Packing};
use candle_core::DType;
use serde_json::json;

use crate::cli::{BitsName, ConvertArgs, DtypeName, Global, Layout};
use crate::progress::{Progress, say};
use crate::{Outcome, model, new_folder, output};

pub(crate) fn run(global: &Global, args: &ConvertArgs) -> anyhow::Result<Outcome> {
    let bytes = if Path::new(&args.from).is_file() { lavis(args)? } else { folder(args)? };
    say(&format!("{:.1} MB of weights", bytes as f64 / 1e6));
    let json = json!({"model": args.to.to_string_lossy(), "bytes": bytes});
    output::line(global.format, &json, &args.to.to_string_lossy())?;
    Ok(Outcome::AllFine)
}

fn lavis(args: &ConvertArgs) -> anyhow::Result<u64> {
    if args.packs() {
        bail!(
            "{}: a LAVIS checkpoint is not packed; convert it with --layout blip2 first",
            args.from
        );
    }
    let heads = HeadCounts {
        vision: args.vision_heads.map(usize::from),
        qformer: args.qformer_heads.map(usize::from),
    };
    let frozen = FrozenFiles { vision: args.vision.clone(), llm: args.llm.clone(), heads };
    let parts = Parts::of_lavis(Path::new(&args.from), &frozen)?;
    write(args, &parts, Layout::Hf)
}

fn folder(args: &ConvertArgs) -> anyhow::Result<u64> {
    let model = model::open(&args.from)?;
    if args.packs() {
        let bits = |name: Option<BitsName>| bits(name.unwrap_or(BitsName::Q8));
        let packing = Packing { matrices: bits(args.matrices), embeddings: bits(args.embeddings) };
        return new_folder::write(&args.to, |to| Ok(pack::pack(&model, packing, to)?));
    }
    let mut bar = Progress::bytes();
    let parts = Parts::of_model(&model, &mut |name, done, total| bar.update(name, done, total))?;
    let default = match model.files() {
        Files::HuggingFace(_) => Layout::Blip2,
        Files::Folder(_) | Files::Builtin(_) => Layout::Hf,
    };
    write(args, &parts, default)
}

fn write(args: &ConvertArgs, parts: &Parts, default: Layout) -> anyhow::Result<u64> {
    let dtype = args.dtype.map(dtype);
    new_folder::write(&args.to, |to| {
        Ok(match args.layout.unwrap_or(default) {
            Layout::Hf => {
                let half = half(args, parts)?;
                parts.lost(half).iter().for_each(|lost| say(&format!("note: {lost}")));
                parts.write_hf(half, dtype, to)?
            }
            Layout::Blip2 => parts.write_folder(dtype, to)?,
        })
    })
}

/// The stage that was asked for, else the last there is.
fn half(args: &ConvertArgs, parts: &Parts) -> anyhow::Result<Half> {
    let halves = parts.halves();
    let wanted = match args.stage {
        Some(1) => Some(Half::Matches),
        Some(_) => Some(Half::Generates),
        None => halves.last().copied(),
    };
    match wanted.filter(|half| halves.contains(half)) {
        Some(half) => Ok(half),
        None => bail!("{}: it has no stage {}", args.from, args.stage.unwrap_or(2)),
    }
}

fn dtype(name: DtypeName) -> DType {
    match name {
        DtypeName::F32 => DType::F32,
        DtypeName::F16 => DType::F16,
        DtypeName::Bf16 => DType::BF16,
    }
}

fn bits(name: BitsName) -> Bits {
    match name {
        BitsName::F16 => Bits::F16,
        BitsName::Q8 => Bits::Q8,
        BitsName::Q5 => Bits::Q5,
        BitsName::Q4 => Bits::Q4,
    }
}

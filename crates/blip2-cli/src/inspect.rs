//! `blip2 inspect`: a model's parts, shapes, parameters, and memory in each weight format.

use std::collections::BTreeMap;

use blip2::model::Model;
use blip2_ops::WeightFormat;
use serde_json::{Value, json};

use crate::cli::{Global, InspectArgs};
use crate::progress::Progress;
use crate::{Outcome, model, output};

/// The part whose tables of embeddings are kept like its matrices.
const LLM: &str = "llm";

/// One part of a model, counted.
struct Part {
    name: &'static str,
    tensors: BTreeMap<String, Vec<usize>>,
}

pub(crate) fn run(global: &Global, args: &InspectArgs) -> anyhow::Result<Outcome> {
    let model = model::open(args.name.as_deref().unwrap_or(&global.model))?;
    let parts = parts(&model)?;
    let json = json!({
        "name": model.manifest.name,
        "manifest": model.manifest,
        "parts": parts.iter().map(Part::json).collect::<Vec<_>>(),
    });
    output::line(global.format, &json, &text(&model, &parts))?;
    Ok(Outcome::AllFine)
}

fn parts(model: &Model) -> anyhow::Result<Vec<Part>> {
    let mut bar = Progress::bytes();
    let mut progress = |name: &str, done, total| bar.update(name, done, total);
    let vision = model.vision_tensors(&mut progress)?;
    let mut parts = vec![Part::new("vision", vision.iter().map(|(n, t)| (n, t.dims().to_vec())))];
    if model.manifest.llm.is_some() {
        parts.push(Part { name: LLM, tensors: model.language_shapes(&mut progress)? });
    }
    if let Some(part) = &model.manifest.stage1 {
        let tensors = model.weights(&part.weights)?;
        parts.push(Part::new("stage1", tensors.iter().map(|(n, t)| (n, t.dims().to_vec()))));
    }
    if let Some(part) = &model.manifest.stage2 {
        let tensors = model.weights(&part.weights)?;
        parts.push(Part::new("stage2", tensors.iter().map(|(n, t)| (n, t.dims().to_vec()))));
    }
    Ok(parts)
}

/// Bits per weight, scales included.
fn bits(format: WeightFormat) -> f64 {
    match format {
        WeightFormat::F32 => 32.0,
        WeightFormat::F16 => 16.0,
        WeightFormat::Q8_0 => 8.5,
        WeightFormat::Q4K => 4.5,
    }
}

impl Part {
    fn new<'a>(name: &'static str, shapes: impl Iterator<Item = (&'a String, Vec<usize>)>) -> Self {
        Self { name, tensors: shapes.map(|(name, shape)| (name.clone(), shape)).collect() }
    }

    fn parameters(&self) -> usize {
        self.tensors.values().map(|shape| shape.iter().product::<usize>()).sum()
    }

    /// Memory with `format` asked for.
    fn bytes(&self, format: WeightFormat) -> f64 {
        let each = self.tensors.iter().map(|(name, shape)| {
            let bits = bits(self.kept_in(name, shape, format));
            shape.iter().product::<usize>() as f64 * bits / 8.0
        });
        each.sum()
    }

    /// The format a tensor gets when `format` is asked for: matrices of linear layers what their rows allow, the others f32.
    fn kept_in(&self, name: &str, shape: &[usize], format: WeightFormat) -> WeightFormat {
        let is_table = self.name != LLM && name.contains("_embeddings.");
        match shape {
            [_, width] if !is_table => format.for_width(*width),
            _ => WeightFormat::F32,
        }
    }

    fn json(&self) -> Value {
        let memory: BTreeMap<_, _> = WeightFormat::ALL
            .into_iter()
            .map(|format| (format.as_str(), self.bytes(format) as u64))
            .collect();
        json!({"part": self.name, "parameters": self.parameters(), "memory_bytes": memory, "tensors": self.tensors})
    }
}

fn text(model: &Model, parts: &[Part]) -> String {
    let mut lines = vec![format!("{}\n", model.manifest.name)];
    let mut head = format!("{:<10}{:>8}{:>16}", "part", "tensors", "parameters");
    for format in WeightFormat::ALL {
        head += &format!("{:>12}", format!("{format} MB"));
    }
    lines.push(head);
    for part in parts {
        let mut line =
            format!("{:<10}{:>8}{:>16}", part.name, part.tensors.len(), part.parameters());
        for format in WeightFormat::ALL {
            line += &format!("{:>12.1}", part.bytes(format) / 1e6);
        }
        lines.push(line);
    }
    for part in parts {
        lines.push(format!("\n{}", part.name));
        lines.extend(part.tensors.iter().map(|(name, shape)| format!("  {name:<56} {shape:?}")));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use blip2_ops::FrozenWeight;
    use candle_core::{DType, Device, Tensor};

    use super::*;

    /// Bytes of one tensor in each format, best first.
    fn bytes(part: &'static str, name: &str, shape: &[usize]) -> [f64; 4] {
        let name = name.to_owned();
        let part = Part::new(part, [(&name, shape.to_vec())].into_iter());
        WeightFormat::ALL.map(|format| part.bytes(format))
    }

    #[test]
    fn a_matrix_takes_what_its_frozen_weight_takes() {
        for width in [256, 96, 48, 588] {
            let weight = Tensor::zeros((4, width), DType::F32, &Device::Cpu).unwrap();
            let real = WeightFormat::ALL
                .map(|format| FrozenWeight::new(&weight, format).unwrap().bytes() as f64);
            assert_eq!(bytes("vision", "blocks.0.mlp.fc1.weight", &[4, width]), real, "{width}");
        }
    }

    #[test]
    fn what_is_no_matrix_of_a_linear_layer_stays_in_f32() {
        for (part, name, shape) in [
            ("vision", "cls_token", &[1, 1, 256][..]),
            ("vision", "blocks.0.norm1.weight", &[256]),
            ("stage1", "qformer.word_embeddings.weight", &[1, 256]),
            ("stage1", "query_tokens", &[1, 1, 256]),
        ] {
            assert_eq!(bytes(part, name, shape), [1024.0; 4], "{name}");
        }
        assert_eq!(bytes("stage1", "temp", &[]), [4.0; 4]);
        assert_eq!(bytes(LLM, "token_embd.weight", &[1, 256]), [1024.0, 512.0, 272.0, 144.0]);
    }
}

//! `blip2 inspect`: a model's parts, shapes, parameters, and memory in each weight format.

use std::collections::BTreeMap;

use blip2::model::Model;
use blip2::params;
use candle_core::Tensor;
use serde_json::{Value, json};

use crate::cli::{Global, InspectArgs};
use crate::progress::Progress;
use crate::{Outcome, model, output};

/// Bits per weight of a matrix, scales included; vectors stay in f32.
const FORMATS: [(&str, f64); 4] = [("f32", 32.0), ("f16", 16.0), ("q8_0", 8.5), ("q4_k", 4.5)];

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
    let mut parts = vec![Part::new("vision", &model.vision_tensors(&mut progress)?)];
    if model.manifest.llm.is_some() {
        parts.push(Part { name: "llm", tensors: params::shapes(&model.llm_path(&mut progress)?)? });
    }
    if let Some(part) = &model.manifest.stage1 {
        parts.push(Part::new("stage1", &model.weights(&part.weights)?));
    }
    if let Some(part) = &model.manifest.stage2 {
        parts.push(Part::new("stage2", &model.weights(&part.weights)?));
    }
    Ok(parts)
}

impl Part {
    fn new(name: &'static str, tensors: &BTreeMap<String, Tensor>) -> Self {
        Self {
            name,
            tensors: tensors.iter().map(|(name, t)| (name.clone(), t.dims().to_vec())).collect(),
        }
    }

    fn parameters(&self) -> usize {
        self.tensors.values().map(|shape| shape.iter().product::<usize>()).sum()
    }

    fn bytes(&self, bits: f64) -> f64 {
        let each = self.tensors.values().map(|shape| {
            let bits = if shape.len() < 2 { 32.0 } else { bits };
            shape.iter().product::<usize>() as f64 * bits / 8.0
        });
        each.sum()
    }

    fn json(&self) -> Value {
        let memory: BTreeMap<_, _> =
            FORMATS.iter().map(|(name, bits)| (*name, self.bytes(*bits) as u64)).collect();
        json!({"part": self.name, "parameters": self.parameters(), "memory_bytes": memory, "tensors": self.tensors})
    }
}

fn text(model: &Model, parts: &[Part]) -> String {
    let mut lines = vec![format!("{}\n", model.manifest.name)];
    let mut head = format!("{:<10}{:>8}{:>16}", "part", "tensors", "parameters");
    for (name, _) in FORMATS {
        head += &format!("{:>12}", format!("{name} MB"));
    }
    lines.push(head);
    for part in parts {
        let mut line =
            format!("{:<10}{:>8}{:>16}", part.name, part.tensors.len(), part.parameters());
        for (_, bits) in FORMATS {
            line += &format!("{:>12.1}", part.bytes(bits) / 1e6);
        }
        lines.push(line);
    }
    for part in parts {
        lines.push(format!("\n{}", part.name));
        lines.extend(part.tensors.iter().map(|(name, shape)| format!("  {name:<56} {shape:?}")));
    }
    lines.join("\n")
}

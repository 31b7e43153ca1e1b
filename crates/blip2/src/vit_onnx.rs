//! The weights of a DINOv2-style ViT out of its ONNX export, under the names and layouts of [`crate::vit`].
//!
//! Matrices are anonymous and transposed (in, out) in the export: each is found through the `MatMul` node that uses it.
//! Position embeddings keep their grid of 37×37; the graph resizes them on every run, [`crate::nn::fit_positions`] once,
//! when the encoder is built.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};

use crate::onnx::OnnxFile;
use crate::{Error, Result};

/// Shape of the exported encoder.
struct Shape {
    width: usize,
    mlp_width: usize,
    patch: usize,
    /// Patches along a side in the stored position embeddings.
    stored: usize,
    /// Blocks to keep. The last of the twelve is left out: BLIP-2 reads the second-last layer.
    depth: usize,
}

/// The ViT-S/14 that the mini model looks through.
const VIT_S: Shape = Shape { width: 384, mlp_width: 1536, patch: 14, stored: 37, depth: 11 };

/// All tensors of the ViT-S/14 in `bytes`, an ONNX file; `origin` names it in errors.
///
/// # Errors
/// If a node or weight is missing or has another shape.
pub(crate) fn vit_s_weights(bytes: Vec<u8>, origin: &Path) -> Result<BTreeMap<String, Tensor>> {
    Export { file: OnnxFile::parse(bytes, origin)?, origin, shape: VIT_S }.weights()
}

struct Export<'a> {
    file: OnnxFile,
    origin: &'a Path,
    shape: Shape,
}

impl Export<'_> {
    fn weights(&self) -> Result<BTreeMap<String, Tensor>> {
        let (w, p) = (self.shape.width, self.shape.patch);
        let mut all = BTreeMap::new();
        let patch = self
            .plain("embeddings.patch_embeddings.projection.weight", &[w, 3, p, p])?
            .reshape((w, 3 * p * p))?;
        all.insert("patch_embed.weight".into(), patch);
        let bias = self.plain("embeddings.patch_embeddings.projection.bias", &[w])?;
        all.insert("patch_embed.bias".into(), bias);
        all.insert("cls_token".into(), self.plain("embeddings.cls_token", &[1, 1, w])?);
        all.insert("pos_embed".into(), self.positions()?);
        for i in 0..self.shape.depth {
            self.block(i, &mut all)?;
        }
        Ok(all)
    }

    fn block(&self, i: usize, all: &mut BTreeMap<String, Tensor>) -> Result<()> {
        let (w, hidden) = (self.shape.width, self.shape.mlp_width);
        // (ours, theirs, in, out)
        for (ours, theirs, input, output) in [
            ("attn.q", "attention.attention.query", w, w),
            ("attn.k", "attention.attention.key", w, w),
            ("attn.v", "attention.attention.value", w, w),
            ("attn.out", "attention.output.dense", w, w),
            ("mlp.fc1", "mlp.fc1", w, hidden),
            ("mlp.fc2", "mlp.fc2", hidden, w),
        ] {
            let node = format!("/backbone/encoder/layer.{i}/{}/MatMul", theirs.replace('.', "/"));
            all.insert(format!("blocks.{i}.{ours}.weight"), self.matrix(&node, input, output)?);
            let bias = self.plain(&format!("encoder.layer.{i}.{theirs}.bias"), &[output])?;
            all.insert(format!("blocks.{i}.{ours}.bias"), bias);
        }
        for (ours, theirs) in [
            ("norm1.weight", "norm1.weight"),
            ("norm1.bias", "norm1.bias"),
            ("norm2.weight", "norm2.weight"),
            ("norm2.bias", "norm2.bias"),
            ("scale1", "layer_scale1.lambda1"),
            ("scale2", "layer_scale2.lambda1"),
        ] {
            let vector = self.plain(&format!("encoder.layer.{i}.{theirs}"), &[w])?;
            all.insert(format!("blocks.{i}.{ours}"), vector);
        }
        Ok(())
    }

    /// A tensor that kept its name.
    fn plain(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let values = self.file.f32(&format!("backbone.{name}"), shape)?;
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    /// The weight (out, in) of the product at `node`, which holds it as (in, out).
    fn matrix(&self, node: &str, input: usize, output: usize) -> Result<Tensor> {
        let values = self.file.f32(self.input(node, 1)?, &[input, output])?;
        Ok(Tensor::from_vec(values, (input, output), &Device::Cpu)?.t()?.contiguous()?)
    }

    /// The class token's position and the patches' (1, 1 + stored², w).
    fn positions(&self) -> Result<Tensor> {
        let Shape { width: w, stored, .. } = self.shape;
        let class = self.input("/backbone/embeddings/Concat_6", 0)?;
        let mut values = self.file.f32(class, &[1, 1, w])?;
        let patches = self.input("/backbone/embeddings/Reshape_1", 0)?;
        values.extend(self.file.f32(patches, &[1, stored * stored, w])?);
        Ok(Tensor::from_vec(values, (1, 1 + stored * stored, w), &Device::Cpu)?)
    }

    fn input(&self, node: &str, index: usize) -> Result<&str> {
        let inputs = &self.file.node(node)?.inputs;
        inputs.get(index).map(String::as_str).ok_or_else(|| {
            Error::file(self.origin, format!("node {node} has {} inputs", inputs.len()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_the_encoder_is_refused_by_name() {
        // A model with an empty graph.
        let message = vit_s_weights(vec![0x3a, 0x00], Path::new("x.onnx")).unwrap_err().to_string();
        assert!(message.contains("x.onnx"), "{message}");
        assert!(message.contains("patch_embeddings"), "{message}");
    }
}

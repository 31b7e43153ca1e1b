//! The weights of a DINOv2-style ViT out of its ONNX export, under the names and layouts of [`crate::vit`].
//!
//! Two things the export does are undone here. Matrices are anonymous and transposed (in, out): each is found through
//! the `MatMul` node that uses it. And the graph resizes its 37×37 position embeddings to the size of the picture on
//! every run: that is done once, for 224×224 pixels, with the same bicubic filter.

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
    /// Patches along a side of the pictures it will see.
    wanted: usize,
    /// Blocks to keep. The last of the twelve is left out: BLIP-2 reads the second-last layer.
    depth: usize,
}

/// The ViT-S/14 that the mini model looks through.
const VIT_S: Shape =
    Shape { width: 384, mlp_width: 1536, patch: 14, stored: 37, wanted: 16, depth: 11 };

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

    /// The class token's position and the patches' (1, 1 + wanted², w).
    fn positions(&self) -> Result<Tensor> {
        let Shape { width: w, stored, wanted, .. } = self.shape;
        let class = self.input("/backbone/embeddings/Concat_6", 0)?;
        let mut values = self.file.f32(class, &[1, 1, w])?;
        let patches = self.input("/backbone/embeddings/Reshape_1", 0)?;
        let patches = self.file.f32(patches, &[1, stored * stored, w])?;
        values.extend(resize_grid(&patches, stored, wanted, w));
        Ok(Tensor::from_vec(values, (1, 1 + wanted * wanted, w), &Device::Cpu)?)
    }

    fn input(&self, node: &str, index: usize) -> Result<&str> {
        let inputs = &self.file.node(node)?.inputs;
        inputs.get(index).map(String::as_str).ok_or_else(|| {
            Error::file(self.origin, format!("node {node} has {} inputs", inputs.len()))
        })
    }
}

/// Bicubic resize of a square grid (from, from, w) to (to, to, w), both row-major, as the graph's `Resize` does it:
/// `half_pixel` coordinates, coefficient −0.75, edges repeated, no smoothing. Sums are taken in f64.
fn resize_grid(grid: &[f32], from: usize, to: usize, w: usize) -> Vec<f32> {
    let taps: Vec<_> = (0..to).map(|o| cubic_taps(o, from, to)).collect();
    let mut out = Vec::with_capacity(to * to * w);
    for rows in &taps {
        for columns in &taps {
            out.extend((0..w).map(|c| {
                let mut sum = 0.0f64;
                for &(y, wy) in rows {
                    for &(x, wx) in columns {
                        sum += wy * wx * f64::from(grid[(y * from + x) * w + c]);
                    }
                }
                sum as f32
            }));
        }
    }
    out
}

/// The four input positions, and their weights, that make output `o` along one axis.
fn cubic_taps(o: usize, from: usize, to: usize) -> [(usize, f64); 4] {
    const A: f64 = -0.75;
    let near = |s: f64| ((A + 2.0) * s - (A + 3.0)) * s * s + 1.0;
    let far = |s: f64| ((A * s - 5.0 * A) * s + 8.0 * A) * s - 4.0 * A;
    let source = (o as f64 + 0.5) * (from as f64 / to as f64) - 0.5;
    let t = source - source.floor();
    let weights = [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)];
    std::array::from_fn(|i| {
        let at = source.floor() as i64 + i as i64 - 1;
        (at.clamp(0, from as i64 - 1) as usize, weights[i])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resizing_to_the_same_size_changes_nothing() {
        let grid: Vec<f32> = (0..5 * 5 * 2).map(|i| (i as f32 * 0.7).sin()).collect();
        assert_eq!(resize_grid(&grid, 5, 5, 2), grid);
    }

    #[test]
    fn weights_sum_to_one_and_edges_repeat() {
        for o in 0..16 {
            let taps = cubic_taps(o, 37, 16);
            let sum: f64 = taps.iter().map(|t| t.1).sum();
            assert!((sum - 1.0).abs() < 1e-12, "output {o}: {sum}");
        }
        // Output 0 of 16 lies at input 0.65625, output 15 at 35.34375.
        assert_eq!(cubic_taps(0, 37, 16).map(|t| t.0), [0, 0, 1, 2]);
        assert_eq!(cubic_taps(15, 37, 16).map(|t| t.0), [34, 35, 36, 36]);
    }

    #[test]
    fn a_file_without_the_encoder_is_refused_by_name() {
        // A model with an empty graph.
        let message = vit_s_weights(vec![0x3a, 0x00], Path::new("x.onnx")).unwrap_err().to_string();
        assert!(message.contains("x.onnx"), "{message}");
        assert!(message.contains("patch_embeddings"), "{message}");
    }
}

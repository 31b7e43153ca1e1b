//! The image encoder on its real weights, from package to features, against onnxruntime (`golden/vit_s.py`).
//!
//! Needs the mini parts in the cache (`blip2 pull mini`); says so and passes where they are missing.

#![allow(clippy::unwrap_used, reason = "helpers of tests, too, are tests")]

use std::path::Path;

use blip2::assets::cached_mini_parts;
use blip2::nn::{Corners, fit_positions};
use blip2::params::{Params, read_file};
use blip2::vit::{Vit, VitConfig};
use blip2_ops::WeightFormat;
use candle_core::{DType, Device, Tensor};

/// Greatest difference allowed, relative to the greatest value.
const TOLERANCE: f32 = 1e-4;

const SIZE: usize = 224;

/// The two inputs of `golden/vit_s.py`: formulas in f64, stored as f32.
fn pixels() -> Tensor {
    let mut wave = Vec::with_capacity(3 * SIZE * SIZE);
    let mut steps = Vec::with_capacity(3 * SIZE * SIZE);
    for c in 0..3usize {
        for y in 0..SIZE {
            for x in 0..SIZE {
                let (cf, yf, xf) = (c as f64, y as f64, x as f64);
                let angle =
                    0.37 + 0.11 * cf + 0.043 * yf + 0.029 * (cf + 1.0) * xf + 0.0007 * xf * yf;
                wave.push((1.5 * angle.sin()) as f32);
                let step = (7 * y + 13 * x + 5 * c + (x * y) / 9) % 61;
                steps.push((step as f64 / 61.0 * 4.0 - 2.0) as f32);
            }
        }
    }
    wave.extend(steps);
    Tensor::from_vec(wave, (2, 3, SIZE, SIZE), &Device::Cpu).unwrap()
}

fn assert_close(name: &str, ours: &Tensor, theirs: &Tensor) {
    let max = |t: &Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    let error = max(&(ours - theirs).unwrap()) / max(theirs);
    println!("{name}: relative difference {error:.1e}");
    assert!(error < TOLERANCE, "{name}: relative difference {error:.1e}");
}

#[test]
fn features_are_those_of_onnxruntime() {
    let Some(parts) = cached_mini_parts().unwrap() else {
        eprintln!("SKIPPED: the mini parts are not in the cache; run `blip2 pull mini` first");
        return;
    };
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/vit_s.safetensors");
    let golden = read_file(&golden).unwrap();
    let rows = golden["rows"].to_dtype(DType::U32).unwrap();

    let mut tensors = read_file(&parts.vit).unwrap();
    let fitted = fit_positions(&tensors["pos_embed"], SIZE / 14, Corners::Edges).unwrap();
    tensors.insert("pos_embed".into(), fitted);
    let positions = tensors["pos_embed"].index_select(&rows, 1).unwrap();
    assert_close("positions", &positions, &golden["positions"]);

    let origin = parts.vit.to_string_lossy();
    let vit = Params::build(tensors, WeightFormat::F32, &origin, |params| {
        Vit::new(params, &VitConfig::dino_s())
    })
    .unwrap();
    let pixels = pixels();
    let embeddings = vit.embed(&pixels).unwrap();
    assert_close("embeddings", &embeddings.index_select(&rows, 1).unwrap(), &golden["embeddings"]);
    let features = vit.forward(&pixels).unwrap();
    assert_eq!(features.dims(), [2, 257, 384]);
    assert_close("block10", &features.index_select(&rows, 1).unwrap(), &golden["block10"]);
    // The golden holds some rows only; the sum is over all of them.
    let sum = features.abs().unwrap().sum((1, 2)).unwrap().to_dtype(DType::F32).unwrap();
    let golden_sum = golden["block10.abs_sum"].to_dtype(DType::F32).unwrap();
    assert_close("block10, all rows", &sum, &golden_sum);
}

//! What the golden tests of both stages share: the tiny model of `golden/lavis_tiny.py`, and comparing tensors.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::collections::BTreeMap;
use std::path::Path;

use blip2::checkpoint::from_lavis;
use blip2::params::read_file;
use blip2::qformer::QFormerConfig;
use blip2::stage1::Stage1Config;
use candle_core::{DType, Tensor};

pub(crate) type Tensors = BTreeMap<String, Tensor>;

pub(crate) fn golden(name: &str) -> Tensors {
    read_file(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(name)).unwrap()
}

pub(crate) fn config() -> Stage1Config {
    Stage1Config {
        qformer: QFormerConfig {
            width: 36,
            depth: 4,
            num_heads: 4,
            mlp_width: 60,
            cross_attention_freq: 3,
            encoder_width: 22,
            num_queries: 5,
            vocab_size: 98,
            max_positions: 40,
            layer_norm_eps: 1e-12,
            dropout: 0.1,
        },
        embed_dim: 10,
        ln_vision_eps: 1e-5,
        matching_only: false,
    }
}

pub(crate) fn weights() -> Tensors {
    from_lavis(golden("blip2_tiny.safetensors")).unwrap()
}

pub(crate) fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference, relative to the largest expected value.
pub(crate) fn difference(found: &Tensor, expected: &Tensor) -> f32 {
    assert_eq!(found.dims(), expected.dims());
    let (found, expected) = (numbers(found), numbers(expected));
    let scale = expected.iter().fold(0.0f32, |a, b| a.max(b.abs())).max(1e-6);
    found.iter().zip(&expected).fold(0.0f32, |a, (x, y)| a.max((x - y).abs())) / scale
}

pub(crate) fn assert_close(what: &str, found: &Tensor, expected: &Tensor, tolerance: f32) {
    let difference = difference(found, expected);
    assert!(difference <= tolerance, "{what}: relative difference {difference:e}");
}

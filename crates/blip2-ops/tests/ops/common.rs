//! What the tests share: reproducible numbers, and comparison with a message that says where.

use candle_core::{Device, Tensor, Var};

/// Numbers in about (-2, 2), the same for the same seed.
pub(crate) fn numbers(seed: u64, shape: &[usize]) -> Tensor {
    let n: usize = shape.iter().product();
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    let values: Vec<f32> = (0..n).map(|_| (next() + next() + next() - 1.5) * 1.3).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// A trainable copy.
pub(crate) fn var(t: &Tensor) -> Var {
    Var::from_tensor(&t.contiguous().unwrap()).unwrap()
}

pub(crate) fn list(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1::<f32>().unwrap()
}

/// Asserts |a - b| <= tolerance * (1 + |b|) for every element.
pub(crate) fn close(name: &str, a: &Tensor, b: &Tensor, tolerance: f32) {
    assert_eq!(a.dims(), b.dims(), "{name}: shapes differ");
    for (i, (a, b)) in list(a).iter().zip(list(b)).enumerate() {
        let error = (a - b).abs() / (1.0 + b.abs());
        assert!(error <= tolerance, "{name}: element {i} is {a}, expected {b} (error {error:e})");
    }
}

/// A strided tensor with the values of `t` (its last two dimensions lie transposed in memory).
pub(crate) fn strided(t: &Tensor) -> Tensor {
    let n = t.rank();
    if n == 0 {
        return t.clone();
    }
    if n == 1 {
        // Every second element of a longer vector.
        let twice = Tensor::stack(&[t, t], 1).unwrap();
        return twice.narrow(1, 0, 1).unwrap().squeeze(1).unwrap();
    }
    let turned = t.transpose(n - 2, n - 1).unwrap().contiguous().unwrap();
    turned.transpose(n - 2, n - 1).unwrap()
}

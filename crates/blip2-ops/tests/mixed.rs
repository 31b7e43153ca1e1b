//! Mixed precision holds for the whole process, so it is tested in one of its own.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use blip2_ops::{FrozenWeight, MixedPrecision, WeightFormat, frozen_linear, linear};
use candle_core::{Device, Tensor, Var};

fn numbers(shape: (usize, usize), seed: u64) -> Tensor {
    let n = shape.0 * shape.1;
    let values: Vec<f32> = (0..n as u64)
        .map(|i| {
            ((i + seed).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// How far b is from a, relative to a's size.
fn off(a: &Tensor, b: &Tensor) -> f32 {
    let (a, b) = (values(a), values(b));
    let square = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
    square(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / square(&mut a.iter().copied())
}

/// A frozen weight so large that it is multiplied in several blocks, the last not even a panel's multiple, is as the trained one
/// with its numbers, to the bit.
fn in_several_blocks(format: WeightFormat) {
    let (out, width) = (2100, 768);
    let frozen = FrozenWeight::new(&numbers((out, width), 4), format).unwrap();
    let trained = frozen.rows(&(0..out as u32).collect::<Vec<_>>()).unwrap();
    let x = Var::from_tensor(&numbers((40, width), 5)).unwrap();
    let [ours, theirs] =
        [frozen_linear(&x, &frozen, None).unwrap(), linear(&x, &trained, None).unwrap()].map(|y| {
            let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            [values(&y), values(grads.get(&x).unwrap())]
        });
    assert!(ours == theirs, "{format}");
}

#[test]
fn products_round_their_factors_while_it_lives() {
    let x = Var::from_tensor(&numbers((70, 96), 1)).unwrap();
    let w = Var::from_tensor(&numbers((130, 96), 2)).unwrap();
    let bias = numbers((1, 130), 3).squeeze(0).unwrap();
    let frozen = FrozenWeight::new(w.as_tensor(), WeightFormat::F32).unwrap();
    let all = || {
        let y = linear(&x, &w, Some(&bias)).unwrap();
        let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let z = frozen_linear(&x, &frozen, Some(&bias)).unwrap();
        let frozen_grads = z.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let untracked = frozen_linear(&x.detach(), &frozen, Some(&bias)).unwrap();
        let thin = linear(&x.narrow(0, 0, 3).unwrap(), &w, None).unwrap();
        let few = FrozenWeight::new(&w.narrow(0, 0, 8).unwrap(), WeightFormat::F32).unwrap();
        let few = frozen_linear(&x, &few, None).unwrap();
        let of = |grads: &candle_core::backprop::GradStore, var| grads.get(var).unwrap().clone();
        let rounded = [y, of(&grads, &x), of(&grads, &w), z, of(&frozen_grads, &x)];
        (rounded, [untracked, thin, few])
    };
    let (exact, kept) = all();
    let Some(mixed) = MixedPrecision::start() else {
        eprintln!("this processor has no AVX-512 BF16: nothing to compare");
        return;
    };
    let second = MixedPrecision::start();
    let (rounded, still) = all();
    for (i, (exact, rounded)) in exact.iter().zip(&rounded).enumerate() {
        let off = off(exact, rounded);
        assert!((1e-4..5e-3).contains(&off), "result {i} is off by {off}");
    }
    for (kept, still) in kept.iter().zip(&still) {
        assert_eq!(values(kept), values(still), "no product of mixed precision");
    }
    // Whether trained or frozen, a weight makes the same products.
    assert_eq!(values(&rounded[0]), values(&rounded[3]));
    for format in WeightFormat::ALL {
        in_several_blocks(format);
    }

    drop(second);
    assert_eq!(values(&all().0[0]), values(&rounded[0]), "one still lives");
    drop(mixed);
    for (exact, again) in exact.iter().zip(&all().0) {
        assert_eq!(values(exact), values(again));
    }
}

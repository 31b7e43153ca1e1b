//! Writing GGUF blocks: rows of f32 → stored bytes, bit for bit what candle's quantiser makes of finite numbers, but for one case. 32 numbers of
//! Q4_K that are all the same, and not zero, become zeros there; here they count for the block's scale and minimum as any others do. (And the
//! scale of eight minimums that are zero is a zero without a sign; there the compiler decides.)
//!
//! Candle takes one number after the other: OPT-2.7B in q4_k had its first caption after 71 s, and now has it after 13. Here many sub-blocks are fitted
//! side by side, a lane each: sums are taken in the same order, so that they are the same.

use half::f16;

use crate::blocks::IntKind;
use crate::host::{TO_INTEGER, simd};

/// Numbers that share a scale.
const SUB: usize = 32;
/// Sub-blocks of a block of Q4_K.
const SUBS: usize = 8;
/// Bytes of a block of Q8_0, and of one of Q4_K.
const Q8_0: usize = IntKind::Q8_0.bytes();
const Q4_K: usize = IntKind::Q4K.bytes();
/// How often a sub-block's scale and minimum are fitted to its integers.
const FITS: usize = 5;
/// The largest integer of Q4_K.
const TOP: f32 = 15.0;
/// The largest of its scales of scales, which have six bits.
const TOP_SCALE: f32 = 63.0;

/// Sub-blocks that are fitted together: so many that the compiler keeps loops over them, and makes vectors of them. (Eight, unrolled, it makes pairs of.)
const LANES: usize = 8 * SUBS;

/// A number of each of them.
type Lanes = [f32; LANES];

/// Packs rows into blocks of Q8_0: a scale (f16), 32 integers.
pub(crate) fn q8_0(rows: &[f32], bytes: &mut [u8]) {
    assert_eq!(bytes.len(), rows.len() / SUB * Q8_0);
    simd(
        #[inline(always)]
        |_| {
            for (x, block) in rows.as_chunks::<SUB>().0.iter().zip(bytes.as_chunks_mut::<Q8_0>().0)
            {
                // Magnitudes are in the order of their bits.
                let top = x.iter().fold(0, |top, x| x.abs().to_bits().max(top));
                let scale = f32::from_bits(top) / 127.0;
                let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
                let (head, integers) = block.split_at_mut(2);
                head.copy_from_slice(&f16::from_f32(scale).to_le_bytes());
                for (integer, x) in integers.iter_mut().zip(x) {
                    // The inverse of a tiny scale is infinite, and zero is to stay zero.
                    let wanted = if *x == 0.0 { 0.0 } else { x * inverse };
                    *integer = low_byte(wanted.round().clamp(-128.0, 127.0));
                }
            }
        },
    );
}

/// Packs rows into blocks of Q4_K: a scale of scales and one of minimums (f16), eight of each (six bits), 256 integers (four bits).
pub(crate) fn q4_k(rows: &[f32], bytes: &mut [u8]) {
    assert_eq!(bytes.len(), rows.len() / (SUBS * SUB) * Q4_K);
    simd(
        #[inline(always)]
        |_| {
            let mut lanes = [[0.0; LANES]; SUB];
            let together = rows.as_chunks::<SUB>().0.chunks(LANES);
            for (x, bytes) in together.zip(bytes.chunks_mut(LANES / SUBS * Q4_K)) {
                put_side_by_side(x, &mut lanes);
                let (scales, mins) = fit(&lanes);
                let fitted = scales.as_chunks::<SUBS>().0.iter().zip(mins.as_chunks::<SUBS>().0);
                let blocks = x.as_chunks::<SUBS>().0.iter().zip(bytes.as_chunks_mut::<Q4_K>().0);
                for ((x, block), (scales, mins)) in blocks.zip(fitted) {
                    write_q4_k(x, scales, mins, block);
                }
            }
        },
    );
}

#[inline(always)]
fn write_q4_k(
    x: &[[f32; SUB]; SUBS],
    scales: &[f32; SUBS],
    mins: &[f32; SUBS],
    block: &mut [u8; Q4_K],
) {
    let (head, packed) = block.split_at_mut(16);
    let (halves, counts) = head.split_at_mut(4);
    let (scale, scales) = in_six_bits(scales);
    let (min, mins) = in_six_bits(mins);
    halves[..2].copy_from_slice(&scale.to_le_bytes());
    halves[2..].copy_from_slice(&min.to_le_bytes());
    counts.copy_from_slice(&pack_scales(scales, mins));

    let (scale, min) = (scale.to_f32(), min.to_f32());
    let mut integers = [[0; SUB]; SUBS];
    for (i, (x, integers)) in x.iter().zip(&mut integers).enumerate() {
        let step = scale * f32::from(scales[i]);
        let min = min * f32::from(mins[i]);
        fill_integers(x, step, min, integers);
    }
    let pairs = integers.as_chunks::<2>().0.iter().zip(packed.as_chunks_mut::<SUB>().0);
    for ([low, high], out) in pairs {
        for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
            *out = low | high << 4;
        }
    }
}

/// Position by position instead of sub-block by sub-block. What lies in lanes that are left over does not matter.
#[inline(always)]
fn put_side_by_side(x: &[[f32; SUB]], lanes: &mut [Lanes; SUB]) {
    for (lane, x) in x.iter().enumerate() {
        for (lanes, x) in lanes.iter_mut().zip(x) {
            lanes[lane] = *x;
        }
    }
}

/// Scale and minimum (subtracted, so never negative) of each sub-block: integers and scale are fitted to each other in
/// turns, until the integers stay what they are.
#[inline(always)]
fn fit(x: &[Lanes; SUB]) -> (Lanes, Lanes) {
    let (mut min, mut max) = ([0f32; LANES], x[0]);
    for x in x {
        for i in 0..LANES {
            min[i] = if x[i] < min[i] { x[i] } else { min[i] };
            max[i] = if x[i] > max[i] { x[i] } else { max[i] };
        }
    }
    let (mut scale, mut inverse, mut live) = ([0f32; LANES], [0f32; LANES], [0u32; LANES]);
    for i in 0..LANES {
        inverse[i] = TOP / (max[i] - min[i]);
        // Where all are the same negative number, or zero, the minimum says everything.
        live[i] = u32::from(max[i] != min[i]);
    }

    let mut levels = [[0f32; LANES]; SUB];
    for _ in 0..FITS {
        let (mut along, mut squares, mut changed) = ([0f32; LANES], [0f32; LANES], [0; LANES]);
        for (x, levels) in x.iter().zip(&mut levels) {
            for i in 0..LANES {
                let above = x[i] - min[i];
                let nearest = level(inverse[i] * above);
                changed[i] |= u32::from(nearest != levels[i]);
                levels[i] = nearest;
                along[i] += above * nearest;
                squares[i] += nearest * nearest;
            }
        }
        let (mut fitted, mut residues) = ([0f32; LANES], [0f32; LANES]);
        for i in 0..LANES {
            fitted[i] = along[i] / squares[i];
        }
        for (x, levels) in x.iter().zip(&levels) {
            for i in 0..LANES {
                residues[i] += x[i] - fitted[i] * levels[i];
            }
        }
        for i in 0..LANES {
            let (is_live, mean) = (live[i] != 0, residues[i] / SUB as f32);
            let mean = if mean > 0.0 { 0.0 } else { mean };
            scale[i] = if is_live { fitted[i] } else { scale[i] };
            min[i] = if is_live { mean } else { min[i] };
            inverse[i] = 1.0 / fitted[i];
            live[i] &= changed[i];
        }
        if live == [0; LANES] {
            break;
        }
    }
    for min in &mut min {
        // Not `-min`: no zero is to have a sign.
        *min = 0.0 - *min;
    }
    (scale, min)
}

/// That of a small integer, in two's complement. (`as` would look for numbers too large, one after the other.)
#[inline(always)]
fn low_byte(integer: f32) -> u8 {
    (integer + TO_INTEGER).to_bits() as u8
}

/// The nearest of 0 to 15, as a float; of what is no number 0.
#[inline(always)]
fn level(x: f32) -> f32 {
    let nearest = x.round();
    if nearest > 0.0 { nearest.min(TOP) } else { 0.0 }
}

/// The largest by 63, and how often that goes into each.
#[inline(always)]
fn in_six_bits(values: &[f32; SUBS]) -> (f16, [u8; SUBS]) {
    let top = values.iter().fold(0f32, |top, value| value.max(top));
    let inverse = if top > 0.0 { TOP_SCALE / top } else { 0.0 };
    let count = |value: f32| ((inverse * value).round() as u8).min(TOP_SCALE as u8);
    let mut counts = [0; SUBS];
    for (out, value) in counts.iter_mut().zip(values) {
        *out = count(*value);
    }
    (f16::from_f32(top / TOP_SCALE), counts)
}

/// Six bits of eight scales and eight minimums in 12 bytes: the first four of each lie whole in the low bits of a byte, the last
/// four have their low bits together in a byte and their two high bits above those of the first.
#[inline(always)]
fn pack_scales(scales: [u8; SUBS], mins: [u8; SUBS]) -> [u8; 12] {
    let mut out = [0; 12];
    for i in 0..4 {
        out[i] = scales[i] | scales[i + 4] >> 4 << 6;
        out[i + 4] = mins[i] | mins[i + 4] >> 4 << 6;
        out[i + 8] = scales[i + 4] & 15 | mins[i + 4] << 4;
    }
    out
}

/// The integers of a sub-block whose scale and minimum have been rounded.
#[inline(always)]
fn fill_integers(x: &[f32; SUB], step: f32, min: f32, levels: &mut [u8; SUB]) {
    if step == 0.0 {
        return levels.fill(0);
    }
    for (out, x) in levels.iter_mut().zip(x) {
        *out = low_byte(level((x + min) / step));
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::{GgmlDType, QStorage, QTensor};
    use candle_core::{Device, Tensor};

    use super::*;

    const BLOCK: usize = SUB * SUBS;

    /// Numbers of every kind: of one sign, wide, tiny, huge, zeros, one large among small, whole steps.
    const KINDS: [fn(f32, usize) -> f32; 13] = [
        |x, _| x,
        |x, _| x.abs(),
        |x, _| -x.abs() - 1.0,
        |x, _| x * x * x * 1e4,
        |x, _| x * 1e-30,
        |x, _| x * 1e-42,
        |x, _| x * 1e38,
        |x, _| 2.0 * x * 3.3e38,
        |_, i| if i.is_multiple_of(2) { 0.0 } else { -0.0 },
        |x, i| if i.is_multiple_of(37) { 100.0 * x } else { 0.01 * x },
        |x, _| (x * 15.0).round() / 8.0,
        |x, i| if (i / SUB).is_multiple_of(2) { 0.0 } else { x },
        |_, i| (i % 16) as f32,
    ];

    /// Four blocks of each kind, and at last blocks whose sub-blocks are of different ones.
    fn blocks() -> Vec<f32> {
        let mut state = 7u64;
        let mut random = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        let of_one = (0..4 * BLOCK * KINDS.len()).map(|i| (i / (4 * BLOCK), i));
        let mixed = (0..5 * BLOCK).map(|i| (i / SUB % KINDS.len(), i));
        of_one.chain(mixed).map(|(kind, i)| KINDS[kind](random(), i)).collect()
    }

    fn check(dtype: GgmlDType, block: usize, bytes: usize, quantise: fn(&[f32], &mut [u8])) {
        let rows = blocks();
        let tensor = Tensor::from_slice(&rows, rows.len(), &Device::Cpu).unwrap();
        let theirs = QTensor::quantize(&tensor, dtype).unwrap();
        let mut theirs = theirs.data().unwrap().into_owned();
        if dtype == GgmlDType::Q4K {
            for [_, _, low, high, ..] in theirs.as_chunks_mut::<Q4_K>().0 {
                *high &= if (*low, *high) == (0, 0x80) { 0x7F } else { 0xFF };
            }
        }
        let mut ours = vec![0xAA; theirs.len()];
        quantise(&rows, &mut ours);
        for (i, (ours, theirs)) in ours.chunks(bytes).zip(theirs.chunks(bytes)).enumerate() {
            let numbers = &rows[i * block..(i + 1) * block];
            assert_eq!(ours, theirs, "block {i} of {dtype:?}, from {numbers:?}");
        }
    }

    #[test]
    fn bytes_are_those_of_the_reference() {
        check(GgmlDType::Q8_0, SUB, Q8_0, q8_0);
        check(GgmlDType::Q4K, BLOCK, Q4_K, q4_k);
    }

    /// What the reference makes zeros of.
    #[test]
    fn numbers_that_are_all_the_same_are_kept() {
        for value in [0.75f32, -0.75, 1e-3, -2e5] {
            let mut rows: Vec<f32> = blocks()[..BLOCK].iter().map(|x| x * value).collect();
            rows[2 * SUB..3 * SUB].fill(value);
            let mut bytes = vec![0; Q4_K];
            q4_k(&rows, &mut bytes);
            let storage = QStorage::from_data(bytes.into(), &Device::Cpu, GgmlDType::Q4K).unwrap();
            let back = QTensor::new(storage, BLOCK).unwrap().dequantize(&Device::Cpu).unwrap();
            for back in &back.to_vec1::<f32>().unwrap()[2 * SUB..3 * SUB] {
                assert!((back - value).abs() <= value.abs() / 63.0, "{value} became {back}");
            }
        }
    }
}

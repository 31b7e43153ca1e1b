//! Reading GGUF blocks: rows of stored bytes → f32, bit for bit what candle's `dequantize` gives.
//!
//! Block layouts are those of the GGUF format. Those with a kernel of their own are read by `panel.rs`; formats without a
//! reader anywhere fall back to candle's own (slower) row look-up in `frozen.rs`.

use crate::host::simd;
use candle_core::quantized::GgmlDType;

/// Whether [`dequantize`] knows the format.
pub(crate) fn known(dtype: GgmlDType) -> bool {
    use GgmlDType::{BF16, Q5_0, Q5_1, Q5K, Q6K};
    matches!(dtype, BF16 | Q5_0 | Q5_1 | Q5K | Q6K)
}

/// Unpacks whole blocks of a [`known`] format.
pub(crate) fn dequantize(dtype: GgmlDType, bytes: &[u8], out: &mut [f32]) {
    simd(
        #[inline(always)]
        |_| {
            // A macro, because a function passed as a value would not be inlined, and so not be
            // compiled for the SIMD chosen here.
            macro_rules! blocks {
                ($bytes:literal, $n:literal, $unpack:ident) => {
                    for (block, y) in
                        bytes.as_chunks::<$bytes>().0.iter().zip(out.as_chunks_mut::<$n>().0)
                    {
                        $unpack(block, y);
                    }
                };
            }
            match dtype {
                GgmlDType::BF16 => {
                    for (h, y) in bytes.as_chunks::<2>().0.iter().zip(out) {
                        *y = f32::from_bits(u32::from(u16::from_le_bytes(*h)) << 16);
                    }
                }
                GgmlDType::Q5_0 => blocks!(22, 32, q5_0),
                GgmlDType::Q5_1 => blocks!(24, 32, q5_1),
                GgmlDType::Q5K => blocks!(176, 256, q5_k),
                GgmlDType::Q6K => blocks!(210, 256, q6_k),
                _ => out.fill(f32::NAN),
            }
        },
    );
}

/// f16 bits → f32 without branches, so that loops over it are vectorised.
#[inline(always)]
pub(crate) fn half_to_f32(h: u16) -> f32 {
    // 2^112: the difference of the exponents' biases. Also makes subnormal halves normal.
    const REBIAS: f32 = f32::from_bits((112 + 127) << 23);
    let h = u32::from(h);
    let magnitude = f32::from_bits((h & 0x7FFF) << 13) * REBIAS;
    // Infinity and NaN have all exponent bits set in both formats.
    let special = if h & 0x7C00 == 0x7C00 { 0x7F80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | (h & 0x8000) << 16)
}

#[inline(always)]
fn half(block: &[u8], at: usize) -> f32 {
    half_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}

#[inline(always)]
fn word(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// d, 32 fifth bits, nibbles.
#[inline(always)]
fn q5_0(block: &[u8; 22], y: &mut [f32; 32]) {
    let (d, high) = (half(block, 0), word(block, 2));
    for j in 0..16 {
        let q = u32::from(block[6 + j]);
        let low = (q & 15) | ((high >> j) & 1) << 4;
        let top = (q >> 4) | ((high >> (j + 16)) & 1) << 4;
        y[j] = (low as i32 - 16) as f32 * d;
        y[j + 16] = (top as i32 - 16) as f32 * d;
    }
}

/// d, minimum, 32 fifth bits, nibbles.
#[inline(always)]
fn q5_1(block: &[u8; 24], y: &mut [f32; 32]) {
    let (d, m, high) = (half(block, 0), half(block, 2), word(block, 4));
    for j in 0..16 {
        let q = u32::from(block[8 + j]);
        let low = (q & 15) | ((high >> j) & 1) << 4;
        let top = (q >> 4) | ((high >> (j + 16)) & 1) << 4;
        y[j] = low as f32 * d + m;
        y[j + 16] = top as f32 * d + m;
    }
}

/// The j-th of eight 6-bit (scale, minimum) pairs packed in 12 bytes.
#[inline(always)]
fn scale_min(j: usize, s: &[u8]) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        (s[j + 4] & 15 | (s[j - 4] >> 6) << 4, s[j + 4] >> 4 | (s[j] >> 6) << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// d, dmin, scales, a plane of fifth bits, then four groups of 32 bytes: low nibbles, high nibbles.
#[inline(always)]
fn q5_k(block: &[u8; 176], y: &mut [f32; 256]) {
    let (d, dmin, scales) = (half(block, 0), half(block, 2), &block[4..16]);
    let fifth = &block[16..48];
    for g in 0..4 {
        let q = &block[48 + 32 * g..80 + 32 * g];
        let y = &mut y[64 * g..64 * g + 64];
        let ((s1, m1), (s2, m2)) = (scale_min(2 * g, scales), scale_min(2 * g + 1, scales));
        let (d1, m1, d2, m2) = (d * s1, dmin * m1, d * s2, dmin * m2);
        let (low, high) = y.split_at_mut(32);
        for (((low, high), q), fifth) in low.iter_mut().zip(high).zip(q).zip(fifth) {
            let bits = fifth >> (2 * g);
            *low = d1 * f32::from(q & 15 | (bits & 1) << 4) - m1;
            *high = d2 * f32::from(q >> 4 | (bits & 2) << 3) - m2;
        }
    }
}

/// 128 low nibble bytes, 64 bytes of upper pairs of bits, 16 signed scales, d.
#[inline(always)]
fn q6_k(block: &[u8; 210], y: &mut [f32; 256]) {
    let d = half(block, 208);
    for n in 0..2 {
        let ql = &block[64 * n..64 * n + 64];
        let qh = &block[128 + 32 * n..160 + 32 * n];
        let sc = &block[192 + 8 * n..200 + 8 * n];
        let y = &mut y[128 * n..128 * n + 128];
        for half in 0..2 {
            let ds = [0, 2, 4, 6].map(|i| d * f32::from(sc[half + i] as i8));
            for l in 16 * half..16 * half + 16 {
                let (a, b, h) = (i32::from(ql[l]), i32::from(ql[l + 32]), i32::from(qh[l]));
                y[l] = ds[0] * ((a & 15 | (h & 3) << 4) - 32) as f32;
                y[l + 32] = ds[1] * ((b & 15 | (h >> 2 & 3) << 4) - 32) as f32;
                y[l + 64] = ds[2] * ((a >> 4 | (h >> 4 & 3) << 4) - 32) as f32;
                y[l + 96] = ds[3] * ((b >> 4 | (h >> 6) << 4) - 32) as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    #[test]
    fn every_half_becomes_the_same_number() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (half_to_f32(bits), f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan());
        }
    }
}

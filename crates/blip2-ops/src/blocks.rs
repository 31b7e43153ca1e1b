//! Blocks of 32 positions with a scale of their own: of quantised weights, as kernels read them, and of x.

use std::ops::Range;

use rayon::prelude::*;

use crate::float_tiles::cut;
use crate::gguf_read::half_to_f32;
use crate::host::{self, TO_INTEGER, simd};
use crate::tile::{BLOCK, COLUMNS, Integers, Ints, Isa, PAIRS, Q4_K_HEAD, Row, Unit};

/// Positions along k of quantised weights that are worked on together: unpacked, they fit the first-level cache. A block of Q4_K.
pub(crate) const INT_CHUNK: usize = 256;
const CHUNK_BLOCKS: usize = INT_CHUNK / BLOCK;

/// A quantised format that has panels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IntKind {
    Q8_0,
    Q4_0,
    Q4_1,
    Q4K,
}

impl IntKind {
    /// Positions along k in a block.
    pub(crate) fn positions(self) -> usize {
        match self {
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 => 32,
            Self::Q4K => 256,
        }
    }

    /// Bytes of a block.
    pub(crate) const fn bytes(self) -> usize {
        match self {
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q4K => 144,
        }
    }

    /// Bytes of a row of `width` weights.
    pub(crate) fn row_bytes(self, width: usize) -> usize {
        width / self.positions() * self.bytes()
    }

    /// Whether a weight is more than scale times integer.
    pub(crate) fn has_offset(self) -> bool {
        matches!(self, Self::Q4_1 | Self::Q4K)
    }

    /// Unpacks whole blocks.
    #[inline(always)]
    fn unpack<Q: Integers>(self, units: &[Unit], out: &mut [Ints<Q>]) {
        let blocks = units.chunks_exact(self.bytes() / 2);
        match self {
            Self::Q8_0 => {
                for (units, out) in blocks.zip(out) {
                    out.scale = halves(&units[0]);
                    Q::bytes(&units[1..], out.q.parts());
                }
            }
            Self::Q4_0 => {
                for (units, out) in blocks.zip(out) {
                    out.scale = halves(&units[0]);
                    let (low, high) = in_halves(out.q.parts());
                    Q::nibbles(&units[1..], low, high, 8);
                }
            }
            Self::Q4_1 => {
                for (units, out) in blocks.zip(out) {
                    out.scale = halves(&units[0]);
                    out.offset = halves(&units[1]);
                    let (low, high) = in_halves(out.q.parts());
                    Q::nibbles(&units[2..], low, high, 0);
                }
            }
            Self::Q4K => {
                for (units, out) in blocks.zip(out.as_chunks_mut::<8>().0) {
                    let mut scales = [[[0.0; COLUMNS]; 2]; 8];
                    q4_k_scales(units, &mut scales);
                    for (out, scales) in out.iter_mut().zip(scales) {
                        [out.scale, out.offset] = scales;
                    }
                    let pairs =
                        units[Q4_K_HEAD..].chunks_exact(PAIRS).zip(out.as_chunks_mut::<2>().0);
                    for (units, [low, high]) in pairs {
                        Q::nibbles(units, low.q.parts(), high.q.parts(), 0);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn in_halves<T>(all: &mut [T]) -> (&mut [T], &mut [T]) {
    all.split_at_mut(all.len() / 2)
}

/// A half of each column.
#[inline(always)]
pub(crate) fn halves(unit: &Unit) -> Row {
    let mut out = [0f32; COLUMNS];
    for (out, half) in out.iter_mut().zip(unit.as_chunks::<2>().0) {
        *out = half_to_f32(u16::from_le_bytes(*half));
    }
    out
}

/// The eight scales and offsets of every column: two halves that multiply 6-bit integers, packed in twelve bytes.
#[inline(always)]
pub(crate) fn q4_k_scales(units: &[Unit], out: &mut [[Row; 2]; 8]) {
    let (d, d_min) = (halves(&units[0]), halves(&units[1]));
    let mut packed = [[0u8; COLUMNS]; 12];
    for (bytes, unit) in packed.as_chunks_mut::<2>().0.iter_mut().zip(&units[2..Q4_K_HEAD]) {
        for (c, pair) in unit.as_chunks::<2>().0.iter().enumerate() {
            bytes[0][c] = pair[0];
            bytes[1][c] = pair[1];
        }
    }
    for (j, [scale, offset]) in out.iter_mut().enumerate() {
        for c in 0..COLUMNS {
            let (s, m) = if j < 4 {
                (packed[j][c] & 63, packed[j + 4][c] & 63)
            } else {
                let low = packed[j + 4][c];
                (low & 15 | packed[j - 4][c] >> 6 << 4, low >> 4 | packed[j][c] >> 6 << 4)
            };
            scale[c] = d[c] * f32::from(s);
            offset[c] = -(d_min[c] * f32::from(m));
        }
    }
}

/// Units of `positions` along k.
pub(crate) fn units_of(kind: IntKind, positions: usize) -> usize {
    kind.row_bytes(positions) / 2
}

/// Room for the unpacked blocks of a chunk.
pub(crate) struct Blocks<Q>(Box<[Ints<Q>; CHUNK_BLOCKS]>);

impl<Q: Integers> Default for Blocks<Q> {
    fn default() -> Self {
        Self(Box::new([Ints::EMPTY; CHUNK_BLOCKS]))
    }
}

impl<Q: Integers> Blocks<Q> {
    /// The blocks that `units` hold, a chunk or less.
    pub(crate) fn unpack(&mut self, isa: Isa, kind: IntKind, units: &[Unit]) -> &[Ints<Q>] {
        let blocks = units.len() * 2 / kind.bytes() * kind.positions() / BLOCK;
        let out = &mut self.0[..blocks];
        isa.compile(
            #[inline(always)]
            || kind.unpack(units, out),
        );
        &self.0[..blocks]
    }
}

/// How integers of x are kept, for a kernel.
pub(crate) trait Kept: Sized + Send {
    /// Positions along k that one of them holds.
    const POSITIONS: usize;

    /// Writes block `block` of row `row` of a tile of `height` rows to the tile's place.
    fn keep(integers: &[i16; BLOCK], place: &mut [Self], height: usize, block: usize, row: usize);
}

/// Rows of x as integers, each with a scale, and with the sum of the integers, scaled: `[chunk][tile][block][row]`, integers as they are [`Kept`].
pub(crate) struct Places<'a, T> {
    pub(crate) integers: &'a mut [T],
    pub(crate) scales: &'a mut [f32],
    pub(crate) sums: &'a mut [f32],
}

/// Quantises rows of x, `width` long; rows that a tile has and x has not are left as they are.
pub(crate) fn quantise<T: Kept>(
    x: &[f32],
    width: usize,
    chunks: &[Range<usize>],
    tiles: &[Range<usize>],
    to: Places<'_, T>,
) {
    let Places { integers, scales, sums } = to;
    let integers = cut(integers, chunks, tiles, T::POSITIONS).into_iter();
    let scales = cut(scales, chunks, tiles, BLOCK);
    let sums = cut(sums, chunks, tiles, BLOCK);
    let parts = chunks.iter().flat_map(|k| tiles.iter().map(move |rows| (k, rows)));
    let tasks: Vec<_> = integers.zip(scales.into_iter().zip(sums)).zip(parts).collect();
    let run = |((integers, (scales, sums)), (k, rows)): (_, (&Range<usize>, &Range<usize>))| {
        quantise_tile(x, width, k, rows, Places::<T> { integers, scales, sums });
    };
    if x.len() < host::GRAIN {
        tasks.into_iter().for_each(run);
    } else {
        tasks.into_par_iter().for_each(run);
    }
}

/// A chunk of a tile's rows.
fn quantise_tile<T: Kept>(
    x: &[f32],
    width: usize,
    k: &Range<usize>,
    rows: &Range<usize>,
    to: Places<'_, T>,
) {
    let (height, Places { integers, scales, sums }) = (rows.len(), to);
    simd(
        #[inline(always)]
        |_| {
            for (row, x) in x[rows.start * width..].chunks_exact(width).take(height).enumerate() {
                for (block, x) in x[k.clone()].as_chunks::<BLOCK>().0.iter().enumerate() {
                    let quantised = Quantised::new(x);
                    T::keep(&quantised.integers, integers, height, block, row);
                    let place = block * height + row;
                    (scales[place], sums[place]) = (quantised.scale, quantised.sum);
                }
            }
        },
    );
}

/// A block of x as integers.
struct Quantised {
    integers: [i16; BLOCK],
    scale: f32,
    /// Of the integers, scaled.
    sum: f32,
}

impl Quantised {
    /// Numbers that are not finite make the scale NaN, and so every result: nothing is hidden by rounding.
    #[inline(always)]
    fn new(x: &[f32; BLOCK]) -> Self {
        const MOST: f32 = 32767.0;
        /// Below this everything is zero: its reciprocal would overflow.
        const LEAST: f32 = 1e-30;
        const LANES: usize = 16;
        // Magnitudes are in the order of their bits. Integers wrap, or their sums would not be vectorised; those of numbers that are not
        // finite do not matter.
        let mut most = [0u32; LANES];
        for x in x.as_chunks::<LANES>().0 {
            for (most, x) in most.iter_mut().zip(x) {
                *most = x.abs().to_bits().max(*most);
            }
        }
        let largest = f32::from_bits(most.into_iter().fold(0, u32::max));
        let (scale, factor) = match () {
            () if !largest.is_finite() => (f32::NAN, 0.0),
            () if largest < LEAST => (0.0, 0.0),
            () => (largest / MOST, MOST / largest),
        };
        let mut integers = [0i16; BLOCK];
        let mut totals = [0u32; LANES];
        let parts = integers.as_chunks_mut::<LANES>().0.iter_mut().zip(x.as_chunks::<LANES>().0);
        for (q, x) in parts {
            for ((total, q), x) in totals.iter_mut().zip(q).zip(x) {
                let rounded =
                    (x * factor + TO_INTEGER).to_bits().wrapping_sub(TO_INTEGER.to_bits());
                *q = rounded as i16;
                *total = total.wrapping_add(rounded);
            }
        }
        let total = totals.into_iter().fold(0, u32::wrapping_add) as i32;
        Self { integers, scale, sum: scale * total as f32 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_too_small_for_a_scale_are_zero() {
        for x in [0.0, 1e-31, -1e-38] {
            let block = Quantised::new(&[x; BLOCK]);
            assert_eq!((block.scale, block.sum, block.integers), (0.0, 0.0, [0; BLOCK]));
        }
        let block = Quantised::new(&[-1e-20; BLOCK]);
        assert_eq!(block.integers[0], -32767);
        assert!((block.sum / (-32.0 * 1e-20) - 1.0).abs() < 1e-6);
    }
}

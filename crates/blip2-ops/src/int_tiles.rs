//! Products of quantised weights with many rows of x in 16 bits, by tile instructions for bytes (AMX-INT8).
//!
//! An integer of x is 256 times its upper byte, signed, and its lower one, unsigned; a weight fits a signed byte. Tiles multiply both bytes
//! with a block of weights, vectors put the two sums together and scale them. Sums of integers are exact, so the results are those of
//! `tile::ints` to the bit.

#![cfg_attr(
    not(all(target_arch = "x86_64", target_os = "linux")),
    allow(dead_code, reason = "other machines have no tiles: nothing here is ever reached")
)]

use std::cell::Cell;

use crate::amx::ByteTiles;
use crate::blocks::{Blocks, INT_CHUNK, IntKind, Kept, Places, quantise, units_of};
use crate::factor::{chunks, lengthen};
use crate::tile::{BLOCK, COLUMNS, INT_ROWS, Integers, Ints, Isa, Row, Unit};

/// Rows of x in a tile, at most.
const ROWS: usize = 16;
/// And at least: fewer are multiplied otherwise, and so many tiles of them are as high.
const FEWEST: usize = 7;
const _: () = assert!(FEWEST == INT_ROWS + 1 && ROWS + 1 >= 2 * FEWEST);
/// Positions along k that lie together: an instruction sums four products.
const QUADS: usize = BLOCK / 4;

/// A block of x: the upper bytes of its integers, then the lower ones.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct SplitBlock {
    upper: [i8; BLOCK],
    lower: [u8; BLOCK],
}

impl SplitBlock {
    const EMPTY: Self = Self { upper: [0; BLOCK], lower: [0; BLOCK] };
}

/// `[block][row]`.
impl Kept for SplitBlock {
    const POSITIONS: usize = BLOCK;

    #[inline(always)]
    fn keep(integers: &[i16; BLOCK], place: &mut [Self], height: usize, block: usize, row: usize) {
        let split = &mut place[block * height + row];
        for ((upper, lower), q) in split.upper.iter_mut().zip(&mut split.lower).zip(integers) {
            *upper = (q >> 8) as i8;
            *lower = *q as u8;
        }
    }
}

/// Four positions along k of each column, in two tiles of sixteen columns.
pub(crate) type Quad = [[[i8; 4]; COLUMNS / 2]; 2];

/// A block of weights as tiles read it.
pub(crate) type Quads = [Quad; QUADS];

impl Integers for Quads {
    const EMPTY: Self = [[[[0; 4]; COLUMNS / 2]; 2]; QUADS];

    type Part = Quad;

    #[inline(always)]
    fn parts(&mut self) -> &mut [Quad] {
        self
    }

    #[inline(always)]
    fn bytes(units: &[Unit], out: &mut [Quad]) {
        for ([first, second], out) in units.as_chunks::<2>().0.iter().zip(out) {
            interleave(first, second, out);
        }
    }

    #[inline(always)]
    fn nibbles(units: &[Unit], low: &mut [Quad], high: &mut [Quad], zero: i8) {
        for (([first, second], low), high) in units.as_chunks::<2>().0.iter().zip(low).zip(high) {
            let ([first, of_first], [second, of_second]) =
                (halves(first, zero), halves(second, zero));
            interleave(&first, &second, low);
            interleave(&of_first, &of_second, high);
        }
    }
}

/// The lower halves of bytes, and the upper ones, less `zero`.
#[inline(always)]
fn halves(unit: &Unit, zero: i8) -> [Unit; 2] {
    let mut halves = [[0; 2 * COLUMNS]; 2];
    let [low, high] = &mut halves;
    for ((low, high), byte) in low.iter_mut().zip(high).zip(unit) {
        *low = ((byte & 15) as i8 - zero) as u8;
        *high = ((byte >> 4) as i8 - zero) as u8;
    }
    halves
}

/// Two positions, then the next two, of each column.
#[inline(always)]
fn interleave(first: &Unit, second: &Unit, out: &mut Quad) {
    let pairs = first.as_chunks::<2>().0.iter().zip(second.as_chunks::<2>().0);
    for (([a, b], [c, d]), out) in pairs.zip(out.as_flattened_mut()) {
        *out = [*a as i8, *b as i8, *c as i8, *d as i8];
    }
}

/// Sums of a block and half of the columns, for the upper and the lower bytes of x: `[byte][row]`.
#[repr(align(64))]
struct Sums([[[i32; COLUMNS / 2]; ROWS]; 2]);

/// What a task needs room for; when it goes its thread's tiles are given back.
pub(crate) struct Room {
    blocks: Blocks<Quads>,
    /// Of the block that is multiplied, and of the one before it.
    sums: Box<[Sums; 2]>,
    /// Tiles belong to a thread.
    _of_this_thread: std::marker::PhantomData<*const ()>,
}

impl Default for Room {
    fn default() -> Self {
        let empty = || Sums([[[0; COLUMNS / 2]; ROWS]; 2]);
        Self {
            blocks: Blocks::default(),
            sums: Box::new([empty(), empty()]),
            _of_this_thread: std::marker::PhantomData,
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        crate::amx::x86::give_back();
    }
}

thread_local! {
    /// Where the rows of the last product lay, for those of the next: a new place would be cleared before it is filled.
    static PLACE: Cell<Place> = Cell::default();
}

#[derive(Default)]
struct Place {
    splits: Vec<SplitBlock>,
    scales: Vec<f32>,
    sums: Vec<f32>,
}

/// Rows of x in tiles, all of one height, the last not full: `[chunk][tile][block][row]`, and behind them what is left of larger ones.
pub(crate) struct ByteRows {
    tiles: ByteTiles,
    place: Place,
    pub(crate) n: usize,
    /// Rows of a tile.
    height: usize,
    /// Blocks along k.
    blocks: usize,
}

impl ByteRows {
    /// `x (n, width)` of whole blocks.
    pub(crate) fn new(tiles: ByteTiles, x: &[f32], n: usize, width: usize) -> Self {
        let (height, blocks) = (n.div_ceil(n.div_ceil(ROWS)), width / BLOCK);
        let mut rows = Self { tiles, place: PLACE.take(), n, height, blocks };
        let len = rows.padded() * blocks;
        lengthen(&mut rows.place.splits, len, SplitBlock::EMPTY);
        lengthen(&mut rows.place.scales, len, 0.0);
        lengthen(&mut rows.place.sums, len, 0.0);
        let chunks = chunks(width, INT_CHUNK);
        let tiles: Vec<_> = (0..n).step_by(height).map(|row| row..row + height).collect();
        let Place { splits, scales, sums } = &mut rows.place;
        let places = Places {
            integers: &mut splits[..len],
            scales: &mut scales[..len],
            sums: &mut sums[..len],
        };
        quantise(x, width, &chunks, &tiles, places);
        rows
    }

    /// Rows with those that the last tile lacks.
    fn padded(&self) -> usize {
        self.n.next_multiple_of(self.height)
    }

    /// Adds the product with the panel that `units` begin with to `out`. Units that lie behind it are those that come next.
    pub(crate) fn times(
        &self,
        isa: Isa,
        kind: IntKind,
        mut units: &[Unit],
        room: &mut Room,
        out: &mut [Row],
    ) {
        let Place { splits, scales, sums } = &self.place;
        let per_chunk = units_of(kind, INT_CHUNK);
        for first in (0..self.blocks).step_by(INT_CHUNK / BLOCK) {
            let count = (INT_CHUNK / BLOCK).min(self.blocks - first);
            let (now, behind) = units.split_at(units_of(kind, count * BLOCK));
            units = behind;
            let weights = room.blocks.unpack(isa, kind, now);
            let start = first * self.padded();
            let part = start..start + weights.len() * self.padded();
            let chunk = Chunk {
                splits: &splits[part.clone()],
                scales: &scales[part.clone()],
                sums: &sums[part],
                height: self.height,
                weights,
                next: &behind[..per_chunk.min(behind.len())],
            };
            chunk.multiply(self.tiles, kind.has_offset(), &mut room.sums, out);
        }
    }
}

/// Some blocks of all tiles, and the weights that belong to them.
struct Chunk<'a> {
    splits: &'a [SplitBlock],
    scales: &'a [f32],
    sums: &'a [f32],
    height: usize,
    weights: &'a [Ints<Quads>],
    /// What will be unpacked soon; memory is asked for it meanwhile.
    next: &'a [Unit],
}

impl Chunk<'_> {
    /// Adds the products to `out (n, 32)`.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    fn multiply(&self, _: ByteTiles, offsets: bool, sums: &mut [Sums; 2], out: &mut [Row]) {
        // SAFETY: a `ByteTiles` is only made where there are these instructions and vectors; the height is at most 16, and the tiles
        // are set up for it.
        #[expect(unsafe_code, reason = "instructions chosen at run time")]
        unsafe {
            crate::amx::x86::set_up(x86::tiles(self.height));
            x86::multiply(self, offsets, sums, out);
        }
    }

    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    fn multiply(&self, tiles: ByteTiles, _: bool, _: &mut [Sums; 2], _: &mut [Row]) {
        tiles.never();
    }
}

impl Drop for ByteRows {
    fn drop(&mut self) {
        PLACE.set(std::mem::take(&mut self.place));
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::*;
    use std::slice::Chunks;

    use super::{Chunk, FEWEST, Ints, Quads, ROWS, SplitBlock, Sums, Unit};
    use crate::amx::x86::Tiles;
    use crate::tile::x86::{ask_for, load16, scaled, store16};
    use crate::tile::{Row, part_of};

    /// Tiles 0 and 1 for sums of upper and of lower bytes, 4 and 5 for these bytes of x, 6 for sixteen columns of weights.
    pub(super) fn tiles(height: usize) -> Tiles {
        let (sums, x, weights, none) = ([height as u8, 64], [height as u8, 32], [8, 64], [0, 0]);
        [sums, sums, none, none, x, x, weights, none]
    }

    // What the instructions below say in numbers.
    const _: () = assert!(size_of::<SplitBlock>() == LINE && size_of::<Quads>() == 8 * 2 * LINE);
    const _: () = assert!(size_of::<Sums>() == 2 * 1024);

    /// Bytes of a full row of a tile.
    const LINE: usize = 64;

    /// Parts in which the sums of a block are put together.
    const PARTS: usize = 3;

    /// Adds the products of a chunk to `out`.
    ///
    /// # Safety
    /// Only where there are tiles of bytes, and after they have been set up as [`tiles`] of the chunk's height.
    #[expect(unsafe_code, reason = "tiles are read and written through pointers")]
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn multiply(
        chunk: &Chunk<'_>,
        offsets: bool,
        sums: &mut [Sums; 2],
        out: &mut [Row],
    ) {
        macro_rules! by_height {
            ($($height:literal)*) => {
                match (chunk.height, offsets) {
                    // SAFETY: as asked for.
                    $(($height, false) => unsafe { of_height::<$height, false>(chunk, sums, out) },)*
                    // SAFETY: as asked for.
                    $(($height, true) => unsafe { of_height::<$height, true>(chunk, sums, out) },)*
                    (height, _) => unreachable!("a tile of {height} rows"),
                }
            };
        }
        const { assert!(FEWEST == 7 && ROWS == 16) };
        by_height!(7 8 9 10 11 12 13 14 15 16);
    }

    /// [`multiply`] for tiles of R rows.
    ///
    /// # Safety
    /// As there.
    #[expect(unsafe_code, reason = "tiles are read and written through pointers")]
    #[target_feature(enable = "avx512f")]
    unsafe fn of_height<const R: usize, const OFFSETS: bool>(
        chunk: &Chunk<'_>,
        sums: &mut [Sums; 2],
        out: &mut [Row],
    ) {
        let blocks = chunk.weights.len();
        // The first of a tile's blocks has no time for it.
        let steps = (2 * (blocks - 1) * out.len().div_ceil(R)).max(1);
        let mut next = chunk.next.chunks(chunk.next.len().div_ceil(steps).max(1));
        let splits = chunk.splits.as_chunks::<R>().0.chunks_exact(blocks);
        let scales = chunk.scales.as_chunks::<R>().0.chunks_exact(blocks);
        let of_x = chunk.sums.as_chunks::<R>().0.chunks_exact(blocks);
        for (((splits, scales), sums_of_x), out) in
            splits.zip(scales).zip(of_x).zip(out.chunks_mut(R))
        {
            let tile = Tile { splits, scales, sums: sums_of_x, weights: chunk.weights };
            for half in 0..2 {
                let mut results = [_mm512_setzero_ps(); R];
                for (result, out) in results.iter_mut().zip(&*out) {
                    *result = load16(out, half);
                }
                // SAFETY: as asked for.
                unsafe {
                    tile.add::<OFFSETS>(half, &mut next, sums, &mut results);
                }
                for (result, out) in results.into_iter().zip(&mut *out) {
                    store16(out, half, result);
                }
            }
        }
    }

    /// Some blocks of R rows.
    struct Tile<'a, const R: usize> {
        splits: &'a [[SplitBlock; R]],
        scales: &'a [[f32; R]],
        sums: &'a [[f32; R]],
        weights: &'a [Ints<Quads>],
    }

    impl<const R: usize> Tile<'_, R> {
        /// Adds the products with half of the columns. While tiles multiply a block, vectors put together the sums of the one before.
        ///
        /// # Safety
        /// As for [`multiply`].
        #[expect(unsafe_code, reason = "tiles are read and written through pointers")]
        #[inline]
        #[target_feature(enable = "avx512f")]
        unsafe fn add<const OFFSETS: bool>(
            &self,
            half: usize,
            next: &mut Chunks<'_, Unit>,
            sums: &mut [Sums; 2],
            results: &mut [__m512; R],
        ) {
            let [now, before] = &mut sums.each_mut();
            // SAFETY: as asked for.
            unsafe {
                upper_bytes(&self.splits[0], &self.weights[0].q, half);
                lower_bytes(&self.splits[0]);
                store_upper(before);
                store_lower(before);
                for block in 1..self.weights.len() {
                    next.next().unwrap_or_default().iter().for_each(ask_for);
                    let (splits, weights) = (&self.splits[block], &self.weights[block].q);
                    upper_bytes(splits, weights, half);
                    self.scale::<OFFSETS>(block - 1, half, 0, before, results);
                    lower_bytes(splits);
                    self.scale::<OFFSETS>(block - 1, half, 1, before, results);
                    store_upper(now);
                    self.scale::<OFFSETS>(block - 1, half, 2, before, results);
                    store_lower(now);
                    std::mem::swap(now, before);
                }
            }
            for part in 0..PARTS {
                self.scale::<OFFSETS>(self.weights.len() - 1, half, part, before, results);
            }
        }

        /// Adds part `part` of a block's sums.
        #[inline]
        #[target_feature(enable = "avx512f")]
        fn scale<const OFFSETS: bool>(
            &self,
            block: usize,
            half: usize,
            part: usize,
            Sums([upper, lower]): &Sums,
            results: &mut [__m512; R],
        ) {
            let weights = &self.weights[block];
            let (scale, offset) = (load16(&weights.scale, half), load16(&weights.offset, half));
            for r in part_of(R, part, PARTS) {
                let upper = _mm512_slli_epi32::<8>(integers16(&upper[r]));
                let total = _mm512_add_epi32(upper, integers16(&lower[r]));
                results[r] = scaled(total, scale, self.scales[block][r], results[r]);
                if OFFSETS {
                    let sum = _mm512_set1_ps(self.sums[block][r]);
                    results[r] = _mm512_fmadd_ps(sum, offset, results[r]);
                }
            }
        }
    }

    // What one of these instructions leaves in a tile is there for the next, though nothing tells the compiler so: it has no way
    // to pass a tile on. This relies on compiled code never using tiles by itself, as it can't unless it is built for them.

    /// Multiplies upper bytes with half of the columns.
    ///
    /// # Safety
    /// As for [`multiply`].
    #[expect(unsafe_code, reason = "tiles are loaded through pointers")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn upper_bytes<const R: usize>(splits: &[SplitBlock; R], weights: &Quads, half: usize) {
        // SAFETY: they read half of each of R splits, and half of each of eight rows of weights.
        unsafe {
            asm!(
                "tileloadd tmm6, [{weights} + {two_lines}]",
                "tileloadd tmm4, [{splits} + {line}]",
                "tilezero tmm0",
                "tdpbssd tmm0, tmm4, tmm6",
                weights = in(reg) (&raw const *weights).cast::<u8>().add(half * LINE),
                splits = in(reg) splits,
                line = in(reg) LINE,
                two_lines = in(reg) 2 * LINE,
                out("tmm0") _, out("tmm4") _, out("tmm6") _,
                options(nostack, readonly),
            );
        }
    }

    /// Multiplies lower bytes with the same columns.
    ///
    /// # Safety
    /// After [`upper_bytes`].
    #[expect(unsafe_code, reason = "tiles are loaded through pointers")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn lower_bytes<const R: usize>(splits: &[SplitBlock; R]) {
        // SAFETY: they read the other half of each of R splits.
        unsafe {
            asm!(
                "tileloadd tmm5, [{splits} + {line} + 32]",
                "tilezero tmm1",
                "tdpbusd tmm1, tmm5, tmm6",
                splits = in(reg) splits,
                line = in(reg) LINE,
                out("tmm1") _, out("tmm5") _,
                options(nostack, readonly),
            );
        }
    }

    /// Writes the sums of [`upper_bytes`].
    ///
    /// # Safety
    /// After it.
    #[expect(unsafe_code, reason = "tiles are stored through pointers")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store_upper(sums: &mut Sums) {
        // SAFETY: it writes at most sixteen rows of the first part.
        unsafe {
            asm!(
                "tilestored [{sums} + {line}], tmm0",
                sums = in(reg) sums,
                line = in(reg) LINE,
                options(nostack),
            );
        }
    }

    /// Writes the sums of [`lower_bytes`].
    ///
    /// # Safety
    /// After it.
    #[expect(unsafe_code, reason = "tiles are stored through pointers")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store_lower(sums: &mut Sums) {
        // SAFETY: it writes at most sixteen rows of the second part.
        unsafe {
            asm!(
                "tilestored [{sums} + {line} + 1024], tmm1",
                sums = in(reg) sums,
                line = in(reg) LINE,
                options(nostack),
            );
        }
    }

    #[target_feature(enable = "avx512f")]
    fn integers16(row: &[i32; 16]) -> __m512i {
        // SAFETY: it reads the 16 integers, at any address.
        #[expect(unsafe_code, reason = "vectors are loaded through pointers")]
        unsafe {
            _mm512_loadu_si512(row.as_ptr().cast())
        }
    }
}

//! The innermost products: a few rows of x with a panel of 32 output columns, frozen weights in any format or f32.
//!
//! One kernel for floats (weights f32 or f16), one for integers (quantised weights, x as 16-bit integers with a scale per
//! block), each written for AVX-512, for AVX2 and in plain Rust. **All give the same bits**: an output is a sum over k in
//! one fixed order, floats by fused multiply-add, integers exactly, whatever the vector width, the number of rows that
//! are computed together and the number of threads. (Only machines that can't multiply and add in one instruction round
//! twice.) Where a processor multiplies tiles of bytes, many rows of integers are not done here but in `int_tiles.rs`: an [`Isa`]
//! knows whether.
//!
//! Letters: R rows of x in a tile, k positions along the inner dimension.

use std::ops::Range;
use std::sync::OnceLock;

use crate::amx::ByteTiles;
use crate::host::simd;

pub(crate) use crate::matrix::{COLUMNS, Row};
pub(crate) use packed::{Packed, PackedIsa, floats_of_packed, ints_of_bytes, ints_of_nibbles};

/// Positions along k that share a scale.
pub(crate) const BLOCK: usize = 32;
/// Most rows of a tile of integers by AVX-512.
pub(crate) const INT_ROWS: usize = 6;
/// Pairs of positions in a block: integer products are summed two by two.
pub(crate) const PAIRS: usize = BLOCK / 2;

/// Units of a block of Q4_K that hold its scales, before its integers.
pub(crate) const Q4_K_HEAD: usize = 8;

/// Two bytes of each column's block.
pub(crate) type Unit = [u8; 2 * COLUMNS];

/// A set of instructions that kernels are written for, and that this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Isa {
    set: Set,
    /// Besides `set`.
    byte_tiles: Option<ByteTiles>,
}

/// Only [`Isa::available`] makes an [`Isa`] of one: it has asked the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "other processors have none"))]
enum Set {
    /// AVX-512 F, BW and VNNI.
    Avx512,
    /// AVX2, FMA and F16C.
    Avx2,
    /// Any machine.
    Portable,
}

impl Isa {
    /// The best that this machine has.
    pub(crate) fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available()[0])
    }

    /// All that this machine has, best first.
    pub(crate) fn available() -> Vec<Self> {
        let mut found = Vec::new();
        let plain = |set| Isa { set, byte_tiles: None };
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vnni")
            {
                let byte_tiles = ByteTiles::detect();
                if byte_tiles.is_some() {
                    found.push(Self { set: Set::Avx512, byte_tiles });
                }
                found.push(plain(Set::Avx512));
            }
            if is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
            {
                found.push(plain(Set::Avx2));
            }
        }
        found.push(plain(Set::Portable));
        found
    }

    /// Runs `f`, which is plain Rust, compiled for these instructions (it must be `#[inline(always)]`).
    #[inline(always)]
    pub(crate) fn compile(self, f: impl FnOnce()) {
        match self.set {
            // SAFETY: `available` has asked the processor for these instructions.
            #[cfg(target_arch = "x86_64")]
            #[expect(unsafe_code, reason = "instructions chosen at run time")]
            Set::Avx512 => unsafe { x86::compile_avx512(f) },
            _ => simd(
                #[inline(always)]
                |_| f(),
            ),
        }
    }

    /// Most rows of a tile of floats: as many sums as registers hold.
    pub(crate) fn float_rows(self) -> usize {
        match self.set {
            Set::Avx512 => 14,
            Set::Avx2 => 6,
            Set::Portable => 4,
        }
    }

    /// Whether tiles of floats are known to be as fast as the products of a library.
    pub(crate) fn has_wide_tiles(self) -> bool {
        matches!(self.set, Set::Avx512)
    }

    /// Most rows of a tile of integers, which has two sums for each result.
    pub(crate) fn int_rows(self) -> usize {
        match self.set {
            Set::Avx512 => INT_ROWS,
            Set::Avx2 | Set::Portable => 2,
        }
    }

    /// Tiles of bytes, where there are some, for more rows than a tile of integers has.
    pub(crate) fn byte_tiles(self, rows: usize) -> Option<ByteTiles> {
        self.byte_tiles.filter(|_| rows > self.int_rows())
    }
}

/// Weights of a panel, one row of columns for each k.
#[derive(Clone, Copy)]
pub(crate) enum Floats<'a> {
    F32(&'a [[f32; COLUMNS]]),
    /// Bits of halves.
    F16(&'a [[u16; COLUMNS]]),
}

impl<'a> Floats<'a> {
    pub(crate) const NONE: Self = Self::F32(&[]);

    /// Of `count` parts, as equal as can be, that with number `i`.
    pub(crate) fn part(self, i: usize, count: usize) -> Self {
        match self {
            Self::F32(rows) => Self::F32(&rows[part_of(rows.len(), i, count)]),
            Self::F16(rows) => Self::F16(&rows[part_of(rows.len(), i, count)]),
        }
    }
}

/// Of `count` parts of `n`, as equal as can be, that with number `i`.
pub(crate) fn part_of(n: usize, i: usize, count: usize) -> Range<usize> {
    i * n / count..(i + 1) * n / count
}

/// A block of quantised weights: integers, and what turns them into numbers.
#[repr(C, align(64))]
pub(crate) struct Ints<Q = Pairs> {
    pub(crate) q: Q,
    /// A weight is `scale q + offset`.
    pub(crate) scale: Row,
    pub(crate) offset: Row,
}

/// Of each pair of positions, each column's two weights.
pub(crate) type Pairs = [[i16; 2 * COLUMNS]; PAIRS];

/// The integers of a block as a kernel reads them.
pub(crate) trait Integers {
    const EMPTY: Self;

    /// Those of a few neighbouring positions.
    type Part;

    /// All of them.
    fn parts(&mut self) -> &mut [Self::Part];

    /// Reads signed bytes.
    fn bytes(units: &[Unit], out: &mut [Self::Part]);

    /// Reads low halves of bytes to one place, high ones to another, both less `zero`.
    fn nibbles(units: &[Unit], low: &mut [Self::Part], high: &mut [Self::Part], zero: i8);
}

impl Integers for Pairs {
    const EMPTY: Self = [[0; 2 * COLUMNS]; PAIRS];

    type Part = [i16; 2 * COLUMNS];

    #[inline(always)]
    fn parts(&mut self) -> &mut [Self::Part] {
        self
    }

    #[inline(always)]
    fn bytes(units: &[Unit], out: &mut [Self::Part]) {
        // One long loop: short ones of known length are unrolled before they can be vectorised.
        for (byte, q) in units.as_flattened().iter().zip(out.as_flattened_mut()) {
            *q = i16::from(*byte as i8);
        }
    }

    #[inline(always)]
    fn nibbles(units: &[Unit], low: &mut [Self::Part], high: &mut [Self::Part], zero: i8) {
        let (low, high) = (low.as_flattened_mut(), high.as_flattened_mut());
        for ((byte, low), high) in units.as_flattened().iter().zip(low).zip(high) {
            *low = i16::from(byte & 15) - i16::from(zero);
            *high = i16::from(byte >> 4) - i16::from(zero);
        }
    }
}

impl<Q: Integers> Ints<Q> {
    /// A block to unpack into.
    pub(crate) const EMPTY: Self =
        Self { q: Q::EMPTY, scale: [0.0; COLUMNS], offset: [0.0; COLUMNS] };
}

/// `out (R, 32) += a (k, R) · w (k, 32)`; `a` lies k by k. At most [`Isa::float_rows`] rows. `next` is what will be multiplied
/// soon; memory is asked for it meanwhile.
pub(crate) fn floats(isa: Isa, a: &[f32], w: Floats<'_>, next: Floats<'_>, out: &mut [Row]) {
    match isa.set {
        // SAFETY: `available` has asked the processor for these instructions.
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "instructions chosen at run time")]
        Set::Avx512 => unsafe { x86::floats_avx512(a, w, next, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "instructions chosen at run time")]
        Set::Avx2 => unsafe { x86::floats_avx2(a, w, out) },
        _ => portable::floats(a, w, out),
    }
}

/// Rows of x as integers, for the blocks of a panel: of each block `PAIRS × R` pairs, low half first.
#[derive(Clone, Copy)]
pub(crate) struct IntRows<'a> {
    /// Pairs of positions, pair by pair, each for every row.
    pub(crate) pairs: &'a [i32],
    /// x is `scale` times its integers: of each block one of each row.
    pub(crate) scales: &'a [f32],
    /// The sum of each row's block, scaled.
    pub(crate) sums: &'a [f32],
}

/// `out (R, 32) += x · w` block after block. At most [`Isa::int_rows`] rows. `offsets`: whether weights have any.
pub(crate) fn ints(isa: Isa, x: IntRows<'_>, w: &[Ints], offsets: bool, out: &mut [Row]) {
    match isa.set {
        // SAFETY: `available` has asked the processor for these instructions.
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "instructions chosen at run time")]
        Set::Avx512 => unsafe { x86::ints_avx512(x, w, offsets, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "instructions chosen at run time")]
        Set::Avx2 => unsafe { x86::ints_avx2(x, w, offsets, out) },
        _ => portable::ints(x, w, offsets, out),
    }
}

/// Where in its units a block's integers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lies {
    /// Signed bytes.
    Bytes,
    /// The lower halves of bytes.
    Low,
    /// The upper halves of bytes.
    High,
}

/// Kernels that read packed integers.
#[cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, unused_imports, unused_variables, reason = "other processors have none")
)]
mod packed {
    use super::{IntRows, Isa, Lies, Row, Set, Unit};

    /// Instructions with kernels that read packed integers; only [`Isa::packed`] makes one.
    #[derive(Clone, Copy)]
    pub(crate) struct PackedIsa(PackedSet);

    #[derive(Clone, Copy)]
    enum PackedSet {
        #[cfg(target_arch = "x86_64")]
        Avx512,
    }

    impl Isa {
        /// Kernels that read packed integers, where there are some: for so few rows that unpacking to memory first would cost more
        /// than the products.
        pub(crate) fn packed(self, rows: usize) -> Option<PackedIsa> {
            match self.set {
                #[cfg(target_arch = "x86_64")]
                Set::Avx512 if rows <= self.int_rows() => Some(PackedIsa(PackedSet::Avx512)),
                _ => None,
            }
        }
    }

    /// Integers as they lie in memory, two positions a unit, and what turns them into numbers.
    pub(crate) struct Packed<'a> {
        pub(crate) units: &'a [Unit],
        pub(crate) lies: Lies,
        /// A weight is `scale q + offset`; in halves of bytes without an offset, `scale (q - 8)`.
        pub(crate) scale: &'a Row,
        pub(crate) offset: Option<&'a Row>,
    }

    /// [`super::floats`] straight from packed integers: the weights and sums are the same to the bit.
    pub(crate) fn floats_of_packed(isa: PackedIsa, a: &[f32], w: &Packed<'_>, out: &mut [Row]) {
        match isa.0 {
            // SAFETY: `available` has asked the processor for these instructions.
            #[cfg(target_arch = "x86_64")]
            #[expect(unsafe_code, reason = "instructions chosen at run time")]
            PackedSet::Avx512 => unsafe { super::x86::packed_avx512(a, w, out) },
        }
    }

    /// [`super::ints`] straight from the bytes of 8-bit blocks (two of scale, 32 integers).
    pub(crate) fn ints_of_bytes(isa: PackedIsa, x: IntRows<'_>, units: &[Unit], out: &mut [Row]) {
        match isa.0 {
            // SAFETY: `available` has asked the processor for these instructions.
            #[cfg(target_arch = "x86_64")]
            #[expect(unsafe_code, reason = "instructions chosen at run time")]
            PackedSet::Avx512 => unsafe { super::x86::bytes_avx512(x, units, out) },
        }
    }

    /// [`ints_of_bytes`] for pairs of blocks whose integers are the lower and the upper halves of the same 16 units, with the
    /// scale and the offset of each block.
    pub(crate) fn ints_of_nibbles(
        isa: PackedIsa,
        x: IntRows<'_>,
        units: &[Unit],
        scales: &[[Row; 2]],
        out: &mut [Row],
    ) {
        match isa.0 {
            // SAFETY: `available` has asked the processor for these instructions.
            #[cfg(target_arch = "x86_64")]
            #[expect(unsafe_code, reason = "instructions chosen at run time")]
            PackedSet::Avx512 => unsafe { super::x86::nibbles_avx512(x, units, scales, out) },
        }
    }
}

/// Calls the kernel of so many rows: each has its sums in registers, so the number is part of the code.
#[cfg(target_arch = "x86_64")]
macro_rules! by_rows {
    ($rows:expr, $kernel:ident $args:tt; $($n:literal)*) => {
        match $rows {
            0 => {}
            $($n => $kernel::<$n> $args,)*
            rows => unreachable!("a tile of {rows} rows"),
        }
    };
}

mod portable {
    use super::{Floats, IntRows, Ints, PAIRS, Row};
    use crate::gguf_read::half_to_f32;
    use crate::host::{Fma, simd};

    pub(super) fn floats(a: &[f32], w: Floats<'_>, out: &mut [Row]) {
        let rows = out.len().max(1);
        simd(
            #[inline(always)]
            |f| match w {
                Floats::F32(w) => {
                    for (a, w) in a.chunks_exact(rows).zip(w) {
                        add(f, a, w, out);
                    }
                }
                Floats::F16(w) => {
                    for (a, w) in a.chunks_exact(rows).zip(w) {
                        let mut row = [0f32; 32];
                        for (row, w) in row.iter_mut().zip(w) {
                            *row = half_to_f32(*w);
                        }
                        add(f, a, &row, out);
                    }
                }
            },
        );
    }

    #[inline(always)]
    fn add(f: Fma, a: &[f32], w: &Row, out: &mut [Row]) {
        for (a, out) in a.iter().zip(out) {
            for (out, w) in out.iter_mut().zip(w) {
                *out = f.of(*a, *w, *out);
            }
        }
    }

    pub(super) fn ints(x: IntRows<'_>, w: &[Ints], offsets: bool, out: &mut [Row]) {
        simd(
            #[inline(always)]
            |f| ints_with(f, x, w, offsets, out),
        );
    }

    #[inline(always)]
    fn ints_with(f: Fma, x: IntRows<'_>, w: &[Ints], offsets: bool, out: &mut [Row]) {
        let rows = out.len().max(1);
        let blocks = x.pairs.chunks_exact(PAIRS * rows);
        let scales = x.scales.chunks_exact(rows).zip(x.sums.chunks_exact(rows));
        for ((pairs, (scales, sums)), w) in blocks.zip(scales).zip(w) {
            for (r, out) in out.iter_mut().enumerate() {
                let mut total = [0i32; 32];
                for (pairs, q) in pairs.chunks_exact(rows).zip(&w.q) {
                    let (low, high) = (i32::from(pairs[r] as i16), pairs[r] >> 16);
                    for (total, q) in total.iter_mut().zip(q.as_chunks::<2>().0) {
                        *total += low * i32::from(q[0]) + high * i32::from(q[1]);
                    }
                }
                for (c, out) in out.iter_mut().enumerate() {
                    *out = f.of(total[c] as f32, w.scale[c] * scales[r], *out);
                    if offsets {
                        *out = f.of(sums[r], w.offset[c], *out);
                    }
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::*;

    use super::{Floats, IntRows, Ints, Lies, PAIRS, Packed, Q4_K_HEAD, Row, Unit};

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) fn compile_avx512(f: impl FnOnce()) {
        f();
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) fn floats_avx512(a: &[f32], w: Floats<'_>, next: Floats<'_>, out: &mut [Row]) {
        match w {
            Floats::F32(w) => {
                let next = if let Floats::F32(next) = next { next } else { &[] };
                by_rows!(out.len(), f32_avx512(a, w, next, out); 1 2 3 4 5 6 7 8 9 10 11 12 13 14);
            }
            Floats::F16(w) => {
                let next = if let Floats::F16(next) = next { next } else { &[] };
                by_rows!(out.len(), f16_avx512(a, w, next, out); 1 2 3 4 5 6 7 8 9 10 11 12 13 14);
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn floats_avx2(a: &[f32], w: Floats<'_>, out: &mut [Row]) {
        match w {
            Floats::F32(w) => by_rows!(out.len(), f32_avx2(a, w, out); 1 2 3 4 5 6),
            Floats::F16(w) => by_rows!(out.len(), f16_avx2(a, w, out); 1 2 3 4 5 6),
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) fn ints_avx512(x: IntRows<'_>, w: &[Ints], offsets: bool, out: &mut [Row]) {
        by_rows!(out.len(), i16_avx512(x, w, offsets, out); 1 2 3 4 5 6);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) fn bytes_avx512(x: IntRows<'_>, units: &[Unit], out: &mut [Row]) {
        by_rows!(out.len(), i8_avx512(x, units, out); 1 2 3 4 5 6);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) fn nibbles_avx512(
        x: IntRows<'_>,
        units: &[Unit],
        scales: &[[Row; 2]],
        out: &mut [Row],
    ) {
        by_rows!(out.len(), i4_avx512(x, units, scales, out); 1 2 3 4 5 6);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) fn packed_avx512(a: &[f32], w: &Packed<'_>, out: &mut [Row]) {
        match (w.lies, w.offset) {
            (Lies::Bytes, _) => {
                by_rows!(out.len(), floats_of_avx512(a, w, |q| signed_bytes(q), out); 1 2 3 4 5 6);
            }
            (Lies::Low, None) => {
                by_rows!(out.len(), floats_of_avx512(a, w, |q| signed_low(q), out); 1 2 3 4 5 6);
            }
            (Lies::High, None) => {
                by_rows!(out.len(), floats_of_avx512(a, w, |q| signed_high(q), out); 1 2 3 4 5 6);
            }
            (Lies::Low, Some(_)) => {
                by_rows!(out.len(), floats_of_avx512(a, w, |q| low(q), out); 1 2 3 4 5 6);
            }
            (Lies::High, Some(_)) => {
                by_rows!(out.len(), floats_of_avx512(a, w, |q| high(q), out); 1 2 3 4 5 6);
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn ints_avx2(x: IntRows<'_>, w: &[Ints], offsets: bool, out: &mut [Row]) {
        by_rows!(out.len(), i16_avx2(x, w, offsets, out); 1 2);
    }

    /// Sixteen of a row's columns from column `16 i` on.
    #[target_feature(enable = "avx512f")]
    pub(crate) fn load16(row: &Row, i: usize) -> __m512 {
        let part = &row.as_chunks::<16>().0[i];
        // SAFETY: it reads the 16 numbers of `part`, at any address.
        #[expect(unsafe_code, reason = "vectors are loaded through pointers")]
        unsafe {
            _mm512_loadu_ps(part.as_ptr())
        }
    }

    #[target_feature(enable = "avx512f")]
    pub(crate) fn store16(row: &mut Row, i: usize, value: __m512) {
        let part = &mut row.as_chunks_mut::<16>().0[i];
        // SAFETY: it writes the 16 numbers of `part`, at any address.
        #[expect(unsafe_code, reason = "vectors are stored through pointers")]
        unsafe {
            _mm512_storeu_ps(part.as_mut_ptr(), value);
        }
    }

    /// Both vectors of every row.
    #[target_feature(enable = "avx512f")]
    fn load_rows<const R: usize>(rows: &[Row; R]) -> [[__m512; 2]; R] {
        let mut loaded = [[_mm512_setzero_ps(); 2]; R];
        for (loaded, row) in loaded.iter_mut().zip(rows) {
            *loaded = [load16(row, 0), load16(row, 1)];
        }
        loaded
    }

    #[target_feature(enable = "avx512f")]
    fn store_rows<const R: usize>(rows: &mut [Row; R], values: [[__m512; 2]; R]) {
        for (row, [left, right]) in rows.iter_mut().zip(values) {
            store16(row, 0, left);
            store16(row, 1, right);
        }
    }

    #[target_feature(enable = "avx512f")]
    fn halves16(row: &[u16; 32], i: usize) -> __m512 {
        let part = &row.as_chunks::<16>().0[i];
        // SAFETY: it reads the 16 halves of `part`, at any address.
        #[expect(unsafe_code, reason = "vectors are loaded through pointers")]
        let halves = unsafe { _mm256_loadu_si256(part.as_ptr().cast()) };
        _mm512_cvtph_ps(halves)
    }

    #[target_feature(enable = "avx512f")]
    fn pairs16(row: &[i16; 64], i: usize) -> __m512i {
        let part = &row.as_chunks::<32>().0[i];
        // SAFETY: it reads the 32 integers of `part`, at any address.
        #[expect(unsafe_code, reason = "vectors are loaded through pointers")]
        unsafe {
            _mm512_loadu_si512(part.as_ptr().cast())
        }
    }

    /// Eight of a row's columns from column `8 i` on.
    #[target_feature(enable = "avx")]
    fn load8(row: &Row, i: usize) -> __m256 {
        let part = &row.as_chunks::<8>().0[i];
        // SAFETY: it reads the 8 numbers of `part`, at any address.
        #[expect(unsafe_code, reason = "vectors are loaded through pointers")]
        unsafe {
            _mm256_loadu_ps(part.as_ptr())
        }
    }

    #[target_feature(enable = "avx")]
    fn store8(row: &mut Row, i: usize, value: __m256) {
        let part = &mut row.as_chunks_mut::<8>().0[i];
        // SAFETY: it writes the 8 numbers of `part`, at any address.
        #[expect(unsafe_code, reason = "vectors are stored through pointers")]
        unsafe {
            _mm256_storeu_ps(part.as_mut_ptr(), value);
        }
    }

    #[target_feature(enable = "avx,f16c")]
    fn halves8(row: &[u16; 32], i: usize) -> __m256 {
        let part = &row.as_chunks::<8>().0[i];
        // SAFETY: it reads the 8 halves of `part`, at any address.
        #[expect(unsafe_code, reason = "vectors are loaded through pointers")]
        let halves = unsafe { _mm_loadu_si128(part.as_ptr().cast()) };
        _mm256_cvtph_ps(halves)
    }

    #[target_feature(enable = "avx")]
    fn pairs8(row: &[i16; 64], i: usize) -> __m256i {
        let part = &row.as_chunks::<16>().0[i];
        // SAFETY: it reads the 16 integers of `part`, at any address.
        #[expect(unsafe_code, reason = "vectors are loaded through pointers")]
        unsafe {
            _mm256_loadu_si256(part.as_ptr().cast())
        }
    }

    /// Positions along k ahead of which a tile of many rows asks for x, which comes from the second-level cache.
    const AHEAD: usize = 16;

    /// Positions along k between which it asks for a part of the weights that come next.
    const STRIP: usize = 8;

    /// The units of 64 bytes ahead of which few rows ask for weights, which come from memory: one or two of floats, up to six of
    /// integers.
    const FEW_AHEAD: usize = 64;

    /// Bytes that memory gives at once.
    const LINE: usize = 64;

    /// Asks for `row` to be brought to the second-level cache.
    #[inline(always)]
    fn ask<T>(row: &[T; 32]) {
        row.chunks(LINE / size_of::<T>()).for_each(|line| ask_for(&line[0]));
    }

    /// Asks for the line of memory with `place` to be brought to the second-level cache.
    #[inline(always)]
    pub(crate) fn ask_for<T>(place: &T) {
        let place: *const T = place;
        // SAFETY: an address that is only asked for may be any.
        #[expect(unsafe_code, reason = "a hint takes a pointer")]
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(place.cast());
        }
    }

    /// Asks for what lies `ahead` of `place`, which may be behind its end.
    #[inline(always)]
    fn prefetch<T>(place: &T, ahead: usize) {
        let place: *const T = place;
        // SAFETY: an address that is only asked for may be any.
        #[expect(unsafe_code, reason = "a hint takes a pointer")]
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(place.wrapping_add(ahead).cast());
        }
    }

    /// Adds row I's products with two vectors of columns, if there is such a row.
    ///
    /// Where there are many rows, two of three are read as part of the multiplications: that costs no instruction, but a load more.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn add_row<const I: usize, const R: usize>(
        sums: &mut [[__m512; 2]; R],
        a: &[f32; R],
        w: [__m512; 2],
    ) {
        if I >= R {
            return;
        }
        for (sum, w) in sums[I].iter_mut().zip(w) {
            if R < 8 || I.is_multiple_of(3) {
                *sum = _mm512_fmadd_ps(_mm512_set1_ps(a[I]), w, *sum);
                continue;
            }
            // SAFETY: it reads number I of R.
            #[expect(
                unsafe_code,
                reason = "the compiler would read only once what is needed twice"
            )]
            unsafe {
                asm!(
                    "vfmadd231ps {sum}, {w}, dword ptr [{a} + {offset}]{{1to16}}",
                    sum = inout(zmm_reg) *sum,
                    w = in(zmm_reg) w,
                    a = in(reg) a.as_ptr(),
                    offset = const 4 * I,
                    options(pure, readonly, nostack),
                );
            }
        }
    }

    /// Adds the products of all rows.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn add_rows<const R: usize>(sums: &mut [[__m512; 2]; R], a: &[f32; R], w: [__m512; 2]) {
        const { assert!(R <= 14) };
        add_row::<0, R>(sums, a, w);
        add_row::<1, R>(sums, a, w);
        add_row::<2, R>(sums, a, w);
        add_row::<3, R>(sums, a, w);
        add_row::<4, R>(sums, a, w);
        add_row::<5, R>(sums, a, w);
        add_row::<6, R>(sums, a, w);
        add_row::<7, R>(sums, a, w);
        add_row::<8, R>(sums, a, w);
        add_row::<9, R>(sums, a, w);
        add_row::<10, R>(sums, a, w);
        add_row::<11, R>(sums, a, w);
        add_row::<12, R>(sums, a, w);
        add_row::<13, R>(sums, a, w);
    }

    /// R rows times two vectors of columns, which differ in how weights are loaded.
    macro_rules! float_avx512 {
        ($name:ident, $weight:ty, $load:ident) => {
            #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
            fn $name<const R: usize>(
                a: &[f32],
                w: &[[$weight; 32]],
                next: &[[$weight; 32]],
                out: &mut [Row],
            ) {
                let Some(out) = out.first_chunk_mut::<R>() else { return };
                let mut sums = load_rows(out);
                let strips = a.as_chunks::<R>().0.chunks(STRIP).zip(w.chunks(STRIP));
                let mut next = next.chunks(next.len().div_ceil(strips.len().max(1)).max(1));
                for (a, w) in strips {
                    if R > 2 {
                        next.next().unwrap_or_default().iter().for_each(ask);
                    }
                    for (a, w) in a.iter().zip(w) {
                        if R >= 8 {
                            prefetch(a, AHEAD);
                        } else if R <= 2 {
                            prefetch(w, FEW_AHEAD / 2);
                            prefetch(&w[w.len() / 2], FEW_AHEAD / 2 * w.len());
                        }
                        add_rows(&mut sums, a, [$load(w, 0), $load(w, 1)]);
                    }
                }
                store_rows(out, sums);
            }
        };
    }

    float_avx512!(f32_avx512, f32, load16);
    float_avx512!(f16_avx512, u16, halves16);

    /// As above with half as many columns at a time: there are half as many registers, too.
    macro_rules! float_avx2 {
        ($name:ident, $weight:ty, $load:ident) => {
            #[target_feature(enable = "avx2,fma,f16c")]
            fn $name<const R: usize>(a: &[f32], w: &[[$weight; 32]], out: &mut [Row]) {
                let Some(out) = out.first_chunk_mut::<R>() else { return };
                for half in 0..2 {
                    let mut sums = [[_mm256_setzero_ps(); 2]; R];
                    for r in 0..R {
                        sums[r] = [load8(&out[r], 2 * half), load8(&out[r], 2 * half + 1)];
                    }
                    for (a, w) in a.as_chunks::<R>().0.iter().zip(w) {
                        let (left, right) = ($load(w, 2 * half), $load(w, 2 * half + 1));
                        for r in 0..R {
                            let x = _mm256_set1_ps(a[r]);
                            sums[r][0] = _mm256_fmadd_ps(x, left, sums[r][0]);
                            sums[r][1] = _mm256_fmadd_ps(x, right, sums[r][1]);
                        }
                    }
                    for r in 0..R {
                        store8(&mut out[r], 2 * half, sums[r][0]);
                        store8(&mut out[r], 2 * half + 1, sums[r][1]);
                    }
                }
            }
        };
    }

    float_avx2!(f32_avx2, f32, load8);
    float_avx2!(f16_avx2, u16, halves8);

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn i16_avx512<const R: usize>(x: IntRows<'_>, w: &[Ints], offsets: bool, out: &mut [Row]) {
        let Some(out) = out.first_chunk_mut::<R>() else { return };
        let mut results = load_rows(out);
        let blocks = x.pairs.as_chunks::<R>().0.as_chunks::<PAIRS>().0;
        let scales = x.scales.as_chunks::<R>().0.iter().zip(x.sums.as_chunks::<R>().0);
        for ((pairs, (scales, sums)), w) in blocks.iter().zip(scales).zip(w) {
            let mut totals = [[_mm512_setzero_si512(); 2]; R];
            for (pairs, q) in pairs.iter().zip(&w.q) {
                let (left, right) = (pairs16(q, 0), pairs16(q, 1));
                for r in 0..R {
                    let x = _mm512_set1_epi32(pairs[r]);
                    totals[r][0] = _mm512_dpwssd_epi32(totals[r][0], left, x);
                    totals[r][1] = _mm512_dpwssd_epi32(totals[r][1], right, x);
                }
            }
            for half in 0..2 {
                let (scale, offset) = (load16(&w.scale, half), load16(&w.offset, half));
                for r in 0..R {
                    results[r][half] = scaled(totals[r][half], scale, scales[r], results[r][half]);
                    if offsets {
                        let sum = _mm512_set1_ps(sums[r]);
                        results[r][half] = _mm512_fmadd_ps(sum, offset, results[r][half]);
                    }
                }
            }
        }
        store_rows(out, results);
    }

    /// The 32 bytes from byte `32 i` on.
    #[target_feature(enable = "avx512f")]
    fn bytes32(unit: &Unit, i: usize) -> __m256i {
        let part = &unit.as_chunks::<32>().0[i];
        // SAFETY: it reads the 32 bytes of `part`, at any address.
        #[expect(unsafe_code, reason = "vectors are loaded through pointers")]
        unsafe {
            _mm256_loadu_si256(part.as_ptr().cast())
        }
    }

    /// Two signed bytes of each lane.
    #[target_feature(enable = "avx512f")]
    fn signed_bytes(both: __m512i) -> [__m512i; 2] {
        let first = _mm512_slli_epi32::<24>(both);
        let second = _mm512_slli_epi32::<16>(both);
        [_mm512_srai_epi32::<24>(first), _mm512_srai_epi32::<24>(second)]
    }

    /// The lower halves of two bytes of each lane.
    #[target_feature(enable = "avx512f")]
    fn low(both: __m512i) -> [__m512i; 2] {
        let half = _mm512_set1_epi32(15);
        [_mm512_and_si512(both, half), _mm512_and_si512(_mm512_srli_epi32::<8>(both), half)]
    }

    /// The upper ones; above the two bytes there is nothing.
    #[target_feature(enable = "avx512f")]
    fn high(both: __m512i) -> [__m512i; 2] {
        let half = _mm512_set1_epi32(15);
        [_mm512_and_si512(_mm512_srli_epi32::<4>(both), half), _mm512_srli_epi32::<12>(both)]
    }

    #[target_feature(enable = "avx512f")]
    fn signed_low(both: __m512i) -> [__m512i; 2] {
        low(both).map(|q| _mm512_sub_epi32(q, _mm512_set1_epi32(8)))
    }

    #[target_feature(enable = "avx512f")]
    fn signed_high(both: __m512i) -> [__m512i; 2] {
        high(both).map(|q| _mm512_sub_epi32(q, _mm512_set1_epi32(8)))
    }

    /// As `f32_avx512`, with weights made on the way: `integers` takes those of two positions out of the lanes of a unit.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn floats_of_avx512<const R: usize>(
        a: &[f32],
        w: &Packed<'_>,
        integers: impl Fn(__m512i) -> [__m512i; 2],
        out: &mut [Row],
    ) {
        let Some(out) = out.first_chunk_mut::<R>() else { return };
        let scale = [load16(w.scale, 0), load16(w.scale, 1)];
        let offset = w.offset.map(|offset| [load16(offset, 0), load16(offset, 1)]);
        let mut sums = load_rows(out);
        for (a, unit) in a.as_chunks::<R>().0.as_chunks::<2>().0.iter().zip(w.units) {
            prefetch(unit, FEW_AHEAD);
            for half in 0..2 {
                let q = integers(_mm512_cvtepu16_epi32(bytes32(unit, half)));
                for side in 0..2 {
                    let scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(q[side]), scale[half]);
                    let weight = match offset {
                        Some(offset) => _mm512_add_ps(scaled, offset[half]),
                        None => scaled,
                    };
                    for r in 0..R {
                        let x = _mm512_set1_ps(a[side][r]);
                        sums[r][half] = _mm512_fmadd_ps(x, weight, sums[r][half]);
                    }
                }
            }
        }
        store_rows(out, sums);
    }

    /// A block's integer sums, scaled by weight and by x, added to the results.
    #[target_feature(enable = "avx512f")]
    pub(crate) fn scaled(total: __m512i, scale: __m512, x: f32, result: __m512) -> __m512 {
        let factor = _mm512_mul_ps(scale, _mm512_set1_ps(x));
        _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), factor, result)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn i8_avx512<const R: usize>(x: IntRows<'_>, units: &[Unit], out: &mut [Row]) {
        let Some(out) = out.first_chunk_mut::<R>() else { return };
        let mut results = load_rows(out);
        let blocks = x.pairs.as_chunks::<R>().0.as_chunks::<PAIRS>().0;
        let scales = x.scales.as_chunks::<R>().0;
        for ((pairs, scales), units) in
            blocks.iter().zip(scales).zip(units.as_chunks::<{ PAIRS + 1 }>().0)
        {
            let [head, q @ ..] = units;
            let mut totals = [[_mm512_setzero_si512(); 2]; R];
            for (pairs, q) in pairs.iter().zip(q) {
                prefetch(q, FEW_AHEAD);
                let left = _mm512_cvtepi8_epi16(bytes32(q, 0));
                let right = _mm512_cvtepi8_epi16(bytes32(q, 1));
                for r in 0..R {
                    let x = _mm512_set1_epi32(pairs[r]);
                    totals[r][0] = _mm512_dpwssd_epi32(totals[r][0], left, x);
                    totals[r][1] = _mm512_dpwssd_epi32(totals[r][1], right, x);
                }
            }
            for half in 0..2 {
                let scale = _mm512_cvtph_ps(bytes32(head, half));
                for r in 0..R {
                    results[r][half] = scaled(totals[r][half], scale, scales[r], results[r][half]);
                }
            }
        }
        store_rows(out, results);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn i4_avx512<const R: usize>(
        x: IntRows<'_>,
        units: &[Unit],
        scales: &[[Row; 2]],
        out: &mut [Row],
    ) {
        let Some(out) = out.first_chunk_mut::<R>() else { return };
        let low_half = _mm256_set1_epi8(15);
        let mut results = load_rows(out);
        let blocks = x.pairs.as_chunks::<R>().0.as_chunks::<PAIRS>().0.as_chunks::<2>().0;
        let of_x = x.scales.as_chunks::<R>().0.iter().zip(x.sums.as_chunks::<R>().0);
        let mut of_x = of_x.zip(scales);
        for (pairs, units) in blocks.iter().zip(units.as_chunks::<PAIRS>().0) {
            // Of the lower, then of the upper block.
            let mut totals = [[[_mm512_setzero_si512(); 2]; R]; 2];
            for (p, unit) in units.iter().enumerate() {
                prefetch(unit, FEW_AHEAD);
                for half in 0..2 {
                    let both = bytes32(unit, half);
                    let low = _mm256_and_si256(both, low_half);
                    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(both), low_half);
                    let q = [_mm512_cvtepu8_epi16(low), _mm512_cvtepu8_epi16(high)];
                    for block in 0..2 {
                        for r in 0..R {
                            let x = _mm512_set1_epi32(pairs[block][p][r]);
                            totals[block][r][half] =
                                _mm512_dpwssd_epi32(totals[block][r][half], q[block], x);
                        }
                    }
                }
            }
            for totals in totals {
                let Some(((scales, sums), [scale, offset])) = of_x.next() else {
                    unreachable!("scales for every block")
                };
                for half in 0..2 {
                    let (scale, offset) = (load16(scale, half), load16(offset, half));
                    for r in 0..R {
                        let result = scaled(totals[r][half], scale, scales[r], results[r][half]);
                        results[r][half] = _mm512_fmadd_ps(_mm512_set1_ps(sums[r]), offset, result);
                    }
                }
            }
        }
        // Scales take no turn in the loop above: this is what they would have asked for.
        if let Some(last) = units.last() {
            (1..=Q4_K_HEAD).for_each(|i| prefetch(last, FEW_AHEAD + i));
        }
        store_rows(out, results);
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn i16_avx2<const R: usize>(x: IntRows<'_>, w: &[Ints], offsets: bool, out: &mut [Row]) {
        let Some(out) = out.first_chunk_mut::<R>() else { return };
        let blocks = x.pairs.as_chunks::<R>().0.as_chunks::<PAIRS>().0;
        let scales = x.scales.as_chunks::<R>().0.iter().zip(x.sums.as_chunks::<R>().0);
        for ((pairs, (scales, sums)), w) in blocks.iter().zip(scales).zip(w) {
            let mut totals = [[_mm256_setzero_si256(); 4]; R];
            for (pairs, q) in pairs.iter().zip(&w.q) {
                for part in 0..4 {
                    let weights = pairs8(q, part);
                    for r in 0..R {
                        let products = _mm256_madd_epi16(weights, _mm256_set1_epi32(pairs[r]));
                        totals[r][part] = _mm256_add_epi32(totals[r][part], products);
                    }
                }
            }
            for part in 0..4 {
                let (scale, offset) = (load8(&w.scale, part), load8(&w.offset, part));
                for r in 0..R {
                    let factor = _mm256_mul_ps(scale, _mm256_set1_ps(scales[r]));
                    let total = _mm256_cvtepi32_ps(totals[r][part]);
                    let mut result = _mm256_fmadd_ps(total, factor, load8(&out[r], part));
                    if offsets {
                        result = _mm256_fmadd_ps(_mm256_set1_ps(sums[r]), offset, result);
                    }
                    store8(&mut out[r], part, result);
                }
            }
        }
    }
}

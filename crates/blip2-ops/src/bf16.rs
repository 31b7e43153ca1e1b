//! Products whose factors are rounded to bf16, for training in mixed precision: about 1.6 times as fast as f32 where the
//! processor multiplies pairs of bf16 (AVX-512 BF16). Sums stay f32.
//!
//! Both factors are packed first, as panels of so many lanes (rows of a, columns of b) in which two neighbouring positions
//! along k make a word. An output is a sum over k in one order, whatever the threads.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;

use crate::matrix::{Output, Rows, RowsMut, line, line_mut, split_columns};
use crate::tile::{COLUMNS, Row};
use crate::work;

/// Rows of a in a tile: with two vectors of columns of b, their sums fill the registers.
const ROWS: usize = 14;
// `x86::tile` has two vectors of 16 columns.
const _: () = assert!(COLUMNS == 32);
/// Pairs along k that a tile goes through at once: a panel of b then fits the nearest cache.
const PAIRS: usize = 256;
/// Positions along k that are summed before they are added to an output.
pub(crate) const CHUNK: usize = 2 * PAIRS;
/// Panels of a, and of b, that make a piece of work.
const PANELS: usize = 8;

/// What callers have made sure of.
const STRIDES: &str = "bf16 products are of matrices with a contiguous dimension";

/// Two bf16, that of the lower k in the lower half, of each lane of a panel.
type Words<const LANES: usize> = [u32; LANES];

/// Memory for the panels of both factors.
type Scratch = (Vec<Words<ROWS>>, Vec<Words<COLUMNS>>);

/// Memory of earlier products, taken and put back; seldom more than one.
static SPARE: Mutex<Vec<Scratch>> = Mutex::new(Vec::new());

fn spare() -> MutexGuard<'static, Vec<Scratch>> {
    SPARE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many [`MixedPrecision`] live.
static MIXED: AtomicUsize = AtomicUsize::new(0);

/// As long as one lives, this process rounds the factors of its large products to bf16. Excepted are attention's, and those
/// of x without gradient with frozen weights in panels (f32, f16, q8_0, q4_0, q4_1, q4_k).
#[derive(Debug)]
pub struct MixedPrecision(());

impl MixedPrecision {
    /// Begins; `None` if this processor has no instructions for it (AVX-512 F, BW, VL and BF16), so that nothing would be won.
    #[must_use]
    pub fn start() -> Option<Self> {
        Fast::detect().map(|_| {
            MIXED.fetch_add(1, Ordering::Relaxed);
            Self(())
        })
    }

    /// Whether one is under way, begun by whomever.
    #[must_use]
    pub fn is_on() -> bool {
        MIXED.load(Ordering::Relaxed) > 0
    }
}

impl Drop for MixedPrecision {
    fn drop(&mut self) {
        if MIXED.fetch_sub(1, Ordering::Relaxed) == 1 {
            spare().clear();
        }
    }
}

/// The instructions, on a machine that has them.
#[derive(Clone, Copy, Debug)]
struct Fast(());

impl Fast {
    fn detect() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bf16")
        {
            return Some(Self(()));
        }
        None
    }
}

/// `out (m,n) [+]= alpha * a (m,k) · b (k,n)`; each has a contiguous dimension, out its columns.
pub(crate) fn product(out: RowsMut<'_>, output: Output, alpha: f32, a: Rows<'_>, b: Rows<'_>) {
    product_with(Fast::detect(), out, output, alpha, a, b);
}

fn product_with(
    fast: Option<Fast>,
    out: RowsMut<'_>,
    output: Output,
    alpha: f32,
    a: Rows<'_>,
    b: Rows<'_>,
) {
    multiply(fast, out, output, alpha, a, |words| pack(fast, b.transpose(), words));
}

/// Some outputs of a frozen weight in f32, [`COLUMNS`] of them side by side.
#[derive(Clone, Copy)]
pub(crate) struct FrozenPanels<'a> {
    /// `[panel][k][columns]`.
    pub(crate) floats: &'a [Row],
    /// Positions along k.
    pub(crate) width: usize,
}

impl FrozenPanels<'_> {
    /// `y (n, outputs) [+]= x (n, width) · weightᵀ`. The panels are nearly what is wanted.
    pub(crate) fn forward(self, y: RowsMut<'_>, output: Output, x: Rows<'_>) {
        work::product(y.nrows(), self.width, y.ncols());
        let fast = Fast::detect();
        multiply(fast, y, output, 1.0, x, |words| pack_panels(fast, self, words));
    }

    /// `dx (n, width) [+]= dy (n, outputs) · weight`.
    pub(crate) fn backward(self, dx: RowsMut<'_>, output: Output, dy: Rows<'_>) {
        work::product(dy.nrows(), dy.ncols(), self.width);
        let (fast, pairs) = (Fast::detect(), dy.ncols().div_ceil(2));
        multiply(fast, dx, output, 1.0, dy, |words| pack_turned(fast, self, pairs, words));
    }
}

/// `out (m,n) [+]= alpha * a (m,k) · b (k,n)`, where `pack_b` makes the panels of b.
fn multiply(
    fast: Option<Fast>,
    out: RowsMut<'_>,
    output: Output,
    alpha: f32,
    a: Rows<'_>,
    pack_b: impl FnOnce(&mut Vec<Words<COLUMNS>>),
) {
    let pairs = a.ncols().div_ceil(2);
    let (mut words_a, mut words_b) = spare().pop().unwrap_or_default();
    pack(fast, a, &mut words_a);
    pack_b(&mut words_b);
    let panels_a: Vec<_> = words_a.chunks_exact(pairs).collect();
    let panels_b: Vec<_> = words_b.chunks_exact(pairs).collect();
    let mut pieces = Vec::new();
    let columns = split_columns(out, PANELS * COLUMNS);
    for (mut rest, b) in columns.into_iter().zip(panels_b.chunks(PANELS)) {
        for a in panels_a.chunks(PANELS) {
            let rows = (PANELS * ROWS).min(rest.nrows());
            let (out, below) = rest.split_at_row_mut(rows);
            pieces.push(Piece { out, a, b });
            rest = below;
        }
    }
    pieces.into_par_iter().for_each(|piece| {
        compile(
            fast,
            #[inline(always)]
            || piece.compute(fast, output, alpha),
        );
    });
    spare().push((words_a, words_b));
}

/// A block of the output, and the panels that make it.
struct Piece<'a> {
    out: RowsMut<'a>,
    a: &'a [&'a [Words<ROWS>]],
    b: &'a [&'a [Words<COLUMNS>]],
}

impl Piece<'_> {
    #[inline(always)]
    fn compute(mut self, fast: Option<Fast>, output: Output, alpha: f32) {
        let pairs = self.a[0].len();
        for first in (0..pairs).step_by(PAIRS) {
            let part = first..(first + PAIRS).min(pairs);
            // What the first part of k replaces, the others add to.
            let output = if first == 0 { output } else { Output::Add };
            for (j, b) in self.b.iter().enumerate() {
                for (i, a) in self.a.iter().enumerate() {
                    let sums = tile(fast, &a[part.clone()], &b[part.clone()]);
                    self.write(i * ROWS, j * COLUMNS, output, alpha, &sums);
                }
            }
        }
    }

    /// Writes a tile at `(row, column)`, or as much of it as the output has.
    #[inline(always)]
    fn write(
        &mut self,
        row: usize,
        column: usize,
        output: Output,
        alpha: f32,
        sums: &[[f32; COLUMNS]; ROWS],
    ) {
        let rows = ROWS.min(self.out.nrows() - row);
        for (out, sums) in self.out.as_mut().subrows_mut(row, rows).row_iter_mut().zip(sums) {
            let places = line_mut(out)[column..].iter_mut().zip(sums);
            match output {
                Output::Replace => places.for_each(|(out, sum)| *out = alpha * sum),
                Output::Add => places.for_each(|(out, sum)| *out += alpha * sum),
            }
        }
    }
}

/// Packs a matrix (lanes, k), one of whose dimensions is contiguous: panel after panel, each (pairs, LANES). Missing lanes,
/// and the last half of an odd k, are 0.
fn pack<const LANES: usize>(fast: Option<Fast>, matrix: Rows<'_>, words: &mut Vec<Words<LANES>>) {
    let pairs = matrix.ncols().div_ceil(2);
    words.resize(matrix.nrows().div_ceil(LANES) * pairs, [0; LANES]);
    words.par_chunks_mut(PANELS * pairs).enumerate().for_each(|(i, words)| {
        let first = i * PANELS * LANES;
        let lanes = matrix.subrows(first, (PANELS * LANES).min(matrix.nrows() - first));
        compile(
            fast,
            #[inline(always)]
            || match lanes.col_stride() == 1 {
                true => pack_lanes(lanes, pairs, words),
                false => pack_pairs(lanes, pairs, words),
            },
        );
    });
}

/// Panels of a frozen weight: two neighbouring k become a word.
fn pack_panels(fast: Option<Fast>, weight: FrozenPanels<'_>, words: &mut Vec<Words<COLUMNS>>) {
    let FrozenPanels { floats, width } = weight;
    let pairs = width.div_ceil(2);
    words.resize(floats.len() / width * pairs, [0; COLUMNS]);
    let panels = words.par_chunks_mut(pairs).zip(floats.par_chunks(width));
    panels.for_each(|(words, rows)| {
        compile(
            fast,
            #[inline(always)]
            || {
                for (words, rows) in words.iter_mut().zip(rows.chunks(2)) {
                    pack_across(&rows[0], rows.get(1).map_or(&[][..], |row| row), words);
                }
            },
        );
    });
}

/// The same turned: k counts outputs, of which two neighbours become a word, and a lane is one of the weight's columns.
fn pack_turned(
    fast: Option<Fast>,
    weight: FrozenPanels<'_>,
    pairs: usize,
    words: &mut Vec<Words<COLUMNS>>,
) {
    let FrozenPanels { floats, width } = weight;
    words.resize(width.div_ceil(COLUMNS) * pairs, [0; COLUMNS]);
    words.par_chunks_mut(pairs).enumerate().for_each(|(i, words)| {
        let lanes = i * COLUMNS..width.min((i + 1) * COLUMNS);
        compile(
            fast,
            #[inline(always)]
            || {
                for (panel, words) in floats.chunks(width).zip(words.chunks_mut(COLUMNS / 2)) {
                    turn(&panel[lanes.clone()], words);
                }
            },
        );
    });
}

/// A row for each lane, of [`COLUMNS`] positions along k, to a word of each lane for every two of them. Missing lanes are 0.
#[inline(always)]
fn turn(rows: &[Row], words: &mut [Words<COLUMNS>]) {
    let mut lanes = [[0u32; COLUMNS / 2]; COLUMNS];
    for (lane, row) in lanes.iter_mut().zip(rows) {
        for (word, [low, high]) in lane.iter_mut().zip(row.as_chunks::<2>().0) {
            *word = bits(*low) | bits(*high) << 16;
        }
    }
    for (p, words) in words.iter_mut().enumerate() {
        for (word, lane) in words.iter_mut().zip(&lanes) {
            *word = lane[p];
        }
    }
}

/// Lane by lane: each is contiguous along k.
#[inline(always)]
fn pack_lanes<const LANES: usize>(lanes: Rows<'_>, pairs: usize, words: &mut [Words<LANES>]) {
    if !lanes.nrows().is_multiple_of(LANES) {
        words.fill([0; LANES]);
    }
    for (l, row) in lanes.row_iter().enumerate() {
        let panel = &mut words[l / LANES * pairs..][..pairs];
        pack_along(line(row), l % LANES, panel);
    }
}

/// Pair by pair: the lanes of each k are contiguous, those of all panels together.
#[inline(always)]
fn pack_pairs<const LANES: usize>(lanes: Rows<'_>, pairs: usize, words: &mut [Words<LANES>]) {
    if !lanes.nrows().is_multiple_of(LANES) {
        words.fill([0; LANES]);
    }
    let line = |k: usize| {
        if k == lanes.ncols() {
            return &[][..];
        }
        let Some(line) = lanes.col(k).try_as_col_major() else { unreachable!("{STRIDES}") };
        line.as_slice()
    };
    for p in 0..pairs {
        let mut high = line(2 * p + 1).chunks(LANES);
        for (panel, low) in line(2 * p).chunks(LANES).enumerate() {
            pack_across(low, high.next().unwrap_or(&[]), &mut words[panel * pairs + p]);
        }
    }
}

/// Lane `l` of a panel, from its numbers along k.
#[inline(always)]
fn pack_along<const LANES: usize>(line: &[f32], l: usize, words: &mut [Words<LANES>]) {
    let (pairs, rest) = line.as_chunks::<2>();
    for ([low, high], words) in pairs.iter().zip(&mut *words) {
        words[l] = bits(*low) | bits(*high) << 16;
    }
    if let ([low], Some(words)) = (rest, words.last_mut()) {
        words[l] = bits(*low);
    }
}

/// A word of each lane, from the numbers of two neighbouring k; the second may be missing.
#[inline(always)]
fn pack_across<const LANES: usize>(low: &[f32], high: &[f32], words: &mut Words<LANES>) {
    for (word, low) in words.iter_mut().zip(low) {
        *word = bits(*low);
    }
    for (word, high) in words.iter_mut().zip(high) {
        *word |= bits(*high) << 16;
    }
}

/// The nearest bf16, ties to even; a NaN stays one. Written so that the compiler makes vectors of it.
#[inline(always)]
pub(crate) fn bits(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if x.is_nan() { 0x7fc0 } else { rounded }
}

/// Runs `f`, which is plain Rust, compiled for the instructions of `fast` (it must be `#[inline(always)]`).
#[inline(always)]
fn compile(fast: Option<Fast>, f: impl FnOnce()) {
    match fast {
        // SAFETY: `detect` has asked the processor for these instructions.
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "instructions chosen at run time")]
        Some(_) => unsafe { x86::compile(f) },
        _ => f(),
    }
}

/// `a (k, ROWS)ᵀ · b (k, COLUMNS)`.
#[inline(always)]
fn tile(fast: Option<Fast>, a: &[Words<ROWS>], b: &[Words<COLUMNS>]) -> [[f32; COLUMNS]; ROWS] {
    match fast {
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "instructions chosen at run time")]
        Some(_) => unsafe { x86::tile(a, b) },
        _ => plain_tile(a, b),
    }
}

/// The kernel of machines that have no other; nobody is [`MixedPrecision`] there, so only tests call it.
fn plain_tile(a: &[Words<ROWS>], b: &[Words<COLUMNS>]) -> [[f32; COLUMNS]; ROWS] {
    let halves = |word: u32| [word << 16, word & 0xffff_0000].map(f32::from_bits);
    let mut sums = [[0f32; COLUMNS]; ROWS];
    for (a, b) in a.iter().zip(b) {
        for (sums, a) in sums.iter_mut().zip(a) {
            for (sum, b) in sums.iter_mut().zip(b) {
                let ([a0, a1], [b0, b1]) = (halves(*a), halves(*b));
                *sum += a0 * b0 + a1 * b1;
            }
        }
    }
    sums
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{COLUMNS, ROWS, Words};

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) fn compile(f: impl FnOnce()) {
        f();
    }

    /// Two vectors of sums for each row.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) fn tile(a: &[Words<ROWS>], b: &[Words<COLUMNS>]) -> [[f32; COLUMNS]; ROWS] {
        let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
        for (a, b) in a.iter().zip(b) {
            let (left, right) = (load(b, 0), load(b, 1));
            for r in 0..ROWS {
                let x = pairs(_mm512_set1_epi32(a[r].cast_signed()));
                sums[r][0] = _mm512_dpbf16_ps(sums[r][0], x, left);
                sums[r][1] = _mm512_dpbf16_ps(sums[r][1], x, right);
            }
        }
        let mut out = [[0f32; COLUMNS]; ROWS];
        for (out, sums) in out.iter_mut().zip(sums) {
            for (half, sum) in out.as_chunks_mut::<16>().0.iter_mut().zip(sums) {
                // SAFETY: it writes the 16 numbers of `half`, at any address.
                #[expect(unsafe_code, reason = "vectors are stored through pointers")]
                unsafe {
                    _mm512_storeu_ps(half.as_mut_ptr(), sum);
                }
            }
        }
        out
    }

    /// Sixteen of the columns, from column `16 i` on.
    #[target_feature(enable = "avx512f")]
    fn load(words: &Words<COLUMNS>, i: usize) -> __m512bh {
        let part = &words.as_chunks::<16>().0[i];
        // SAFETY: it reads the 16 words of `part`, at any address.
        #[expect(unsafe_code, reason = "vectors are loaded through pointers")]
        pairs(unsafe { _mm512_loadu_si512(part.as_ptr().cast()) })
    }

    #[target_feature(enable = "avx512f")]
    fn pairs(words: __m512i) -> __m512bh {
        // SAFETY: both are any 64 bytes.
        #[expect(unsafe_code, reason = "the same bits under another name")]
        unsafe {
            std::mem::transmute(words)
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use half::bf16;

    use super::*;
    use crate::matrix;
    use crate::panel::Panels;

    pub(crate) fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    fn both() -> Vec<Option<Fast>> {
        Fast::detect().map(Some).into_iter().chain([None]).collect()
    }

    fn rounded(x: f32) -> f64 {
        f64::from(bf16::from_f32(x).to_f32())
    }

    /// The product of the rounded factors, whose f32 sums may be off by their rounding alone.
    fn check(fast: Option<Fast>, [m, k, n]: [usize; 3], turned: [bool; 2]) {
        let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
        let view = |data, rows, cols, turned| match turned {
            true => matrix::rows(data, cols, rows).transpose(),
            false => matrix::rows(data, rows, cols),
        };
        let (a, b) = (view(&a, m, k, turned[0]), view(&b, k, n, turned[1]));
        // The output is some columns of a wider matrix.
        let mut wide = numbers(m * (n + 5), 3);
        let before = wide.clone();
        let out = matrix::rows_mut(&mut wide, m, n + 5).subcols_mut(2, n);
        product_with(fast, out, Output::Add, 0.5, a, b);
        for i in 0..m {
            for (column, (now, before)) in
                wide[i * (n + 5)..].iter().zip(&before[i * (n + 5)..]).take(n + 5).enumerate()
            {
                let sum = match column.checked_sub(2).filter(|j| *j < n) {
                    Some(j) => (0..k).map(|p| rounded(a[(i, p)]) * rounded(b[(p, j)])).sum(),
                    None => 0.0,
                };
                let off = (f64::from(*now) - f64::from(*before) - 0.5 * sum).abs();
                assert!(
                    off < 2e-6 * k as f64,
                    "{fast:?} {m} {k} {n} {turned:?}: ({i}, {column}) is off by {off}"
                );
            }
        }
    }

    #[test]
    fn a_product_is_that_of_the_rounded_factors() {
        for fast in both() {
            for sizes in [[1, 1, 1], [14, 32, 32], [15, 33, 31], [120, 17, 300], [3, 1100, 40]] {
                for turned in [[false, false], [false, true], [true, false], [true, true]] {
                    check(fast, sizes, turned);
                }
            }
        }
    }

    /// Whatever the panels' last columns and an odd k.
    #[test]
    fn panels_of_a_weight_give_what_its_rows_give() {
        for [n, width, outputs] in [[16, 16, 16], [20, 33, 70], [17, 64, 31], [40, 100, 129]] {
            let (weight, x) = (numbers(outputs * width, 1), numbers(n * width, 2));
            let read = |i, to: &mut [f32]| to.copy_from_slice(&weight[i..][..to.len()]);
            let panels = Panels::f32(outputs, width, read);
            let mut floats = Vec::new();
            let floats = panels.floats(0..outputs.div_ceil(COLUMNS), &mut floats);
            let frozen = FrozenPanels { floats, width };
            let by_rows = matrix::rows(&weight, outputs, width);
            let product = |f: &dyn Fn(RowsMut<'_>), columns| {
                let mut out = numbers(n * columns, 3);
                f(matrix::rows_mut(&mut out, n, columns));
                out
            };
            let x = matrix::rows(&x, n, width);
            let ours = product(&|y| frozen.forward(y, Output::Replace, x), outputs);
            let theirs = |y: RowsMut<'_>| {
                product_with(Fast::detect(), y, Output::Replace, 1.0, x, by_rows.transpose());
            };
            assert_eq!(ours, product(&theirs, outputs), "{n} {width} {outputs}");

            let dy = numbers(n * outputs, 4);
            let dy = matrix::rows(&dy, n, outputs);
            let ours = product(&|dx| frozen.backward(dx, Output::Add, dy), width);
            let theirs = |dx: RowsMut<'_>| {
                product_with(Fast::detect(), dx, Output::Add, 1.0, dy, by_rows);
            };
            assert_eq!(ours, product(&theirs, width), "{n} {width} {outputs}, backward");
        }
    }

    #[test]
    fn numbers_round_as_bf16_do() {
        let odd =
            [0.0, -0.0, 1.0, f32::MAX, f32::MIN, f32::INFINITY, f32::MIN_POSITIVE, 1.003_906_2];
        for x in odd.into_iter().chain(numbers(1000, 5)) {
            assert_eq!(bits(x), u32::from(bf16::from_f32(x).to_bits()), "{x}");
        }
        assert!(bf16::from_bits(bits(f32::NAN) as u16).is_nan());
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let (m, k, n) = (200, 600, 300);
        let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut out = vec![f32::NAN; m * n];
            let to = matrix::rows_mut(&mut out, m, n);
            let (a, b) = (matrix::rows(&a, m, k), matrix::rows(&b, k, n));
            pool.install(|| product(to, Output::Replace, 1.0, a, b));
            out
        };
        assert_eq!(with(1), with(3));
    }

    #[test]
    fn what_is_no_number_stays_none() {
        for fast in both() {
            let mut a = numbers(20 * 20, 1);
            a[25] = f32::NAN;
            let b = numbers(20 * 20, 2);
            let mut out = vec![0f32; 400];
            let (to, a) = (matrix::rows_mut(&mut out, 20, 20), matrix::rows(&a, 20, 20));
            product_with(fast, to, Output::Replace, 1.0, a, matrix::rows(&b, 20, 20));
            assert!(out[20..40].iter().all(|x| x.is_nan()));
            assert!(out[40..].iter().all(|x| x.is_finite()));
        }
    }
}

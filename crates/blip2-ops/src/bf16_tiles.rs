//! Large products of factors rounded to bf16, by tile instructions (`amx.rs`): mixed precision on processors that have them.
//!
//! Both factors are packed as the instructions read them: some hundred rows of a, and of b some panels of 32 columns at a time, the next
//! part of k while tiles multiply this one. An output is a sum over k in one order, whatever the threads and the other rows.

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use crate::amx::{self, Amx, Line, Multiplier, PAIRS, STEP, WordPairs, flushed};
use crate::factor::{Factor, chunks, copy_lines, lengthen, pieces, turn_lines, write};
use crate::matrix::{Finish, Rows, RowsMut};
use crate::tile::{COLUMNS, Row};

/// Positions along k that are worked on together.
const CHUNK: usize = 512;
/// Steps of them.
const STEPS: usize = CHUNK / STEP;
/// Rows that are packed together.
const MOST_ROWS: usize = 512;

/// `out (m,n) [+]= alpha * a (m,k) · b (k,n) + bias`; a has a contiguous dimension, out's is its columns.
pub(crate) fn product(
    amx: Option<Amx>,
    out: RowsMut<'_>,
    finish: Finish<'_>,
    a: Rows<'_>,
    b: &impl Factor,
) {
    let mut rest = out;
    let mut done = 0;
    while rest.nrows() > 0 {
        let rows = MOST_ROWS.min(rest.nrows());
        let (out, below) = rest.split_at_row_mut(rows);
        block(amx, out, finish, a.subrows(done, rows), b);
        rest = below;
        done += rows;
    }
}

/// [`product`] of rows that are packed together.
fn block(amx: Option<Amx>, out: RowsMut<'_>, finish: Finish<'_>, a: Rows<'_>, b: &impl Factor) {
    let a = Packed::new(amx, a);
    pieces(out).into_par_iter().for_each(|(panels, out)| {
        let mut scratch = SCRATCH.take();
        scratch.make_room(panels.len(), a.rows);
        scratch.sum(amx, &a, b, panels.clone());
        write(out, panels.start * COLUMNS, finish, &scratch.sums, a.rows);
        SCRATCH.set(scratch);
    });
    LINES.set(a.lines);
}

thread_local! {
    /// Where the last product's rows and the last task's panels lay, for the next: a new place would be cleared before it is filled.
    static LINES: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
    static SCRATCH: Cell<Scratch> = Cell::default();
}

fn steps_of(k: &Range<usize>) -> usize {
    k.len().div_ceil(STEP)
}

/// Room for what a task works on.
#[derive(Default)]
struct Scratch {
    /// Of two chunks of k, this and the next, each panel packed.
    pairs: [Vec<WordPairs>; 2],
    /// Rows of b as they come.
    rows: Vec<Row>,
    /// Sums: `[panel][row]`.
    sums: Vec<Row>,
    /// Of a panel.
    rows_of_a: usize,
}

impl Scratch {
    fn make_room(&mut self, panels: usize, rows: usize) {
        for pairs in &mut self.pairs {
            lengthen(pairs, panels * STEPS * PAIRS, WordPairs([0; COLUMNS]));
        }
        lengthen(&mut self.rows, CHUNK, [0.0; COLUMNS]);
        lengthen(&mut self.sums, panels * rows, [0.0; COLUMNS]);
        self.sums[..panels * rows].fill([0.0; COLUMNS]);
        self.rows_of_a = rows;
    }

    /// Sums of all rows of a with `panels` of b.
    fn sum(&mut self, amx: Option<Amx>, a: &Packed, b: &impl Factor, panels: Range<usize>) {
        let mut all = chunks(a.width, CHUNK).into_iter();
        let Some(mut k) = all.next() else { return };
        for (i, panel) in panels.clone().enumerate() {
            self.pack(amx, i, b, panel, &k, 0..steps_of(&k));
        }
        loop {
            self.pairs.swap(0, 1);
            let next = all.next();
            let multiplier = Multiplier::new(amx);
            for (g, group) in a.groups.iter().enumerate() {
                let lines = a.lines(&k, group);
                for (i, panel) in panels.clone().enumerate() {
                    self.add(&multiplier, i, steps_of(&k), lines, group);
                    // Tiles multiply while the next chunk is packed.
                    if let Some(next) = &next {
                        let steps = share(steps_of(next), b.grain(), g, a.groups.len());
                        self.pack(amx, i, b, panel, next, steps);
                    }
                }
            }
            let Some(next) = next else { return };
            k = next;
        }
    }

    /// Adds the product of a group with panel `i`.
    fn add(
        &mut self,
        multiplier: &Multiplier,
        i: usize,
        steps: usize,
        a: &[Line],
        group: &Range<usize>,
    ) {
        let b = &self.pairs[1][i * STEPS * PAIRS..][..steps * PAIRS];
        let sums = &mut self.sums[i * self.rows_of_a..][group.clone()];
        multiplier.add(a, b, sums);
    }

    /// Packs `steps` of positions `k` of `panel` as panel `i` of the next chunk.
    fn pack(
        &mut self,
        amx: Option<Amx>,
        i: usize,
        b: &impl Factor,
        panel: usize,
        k: &Range<usize>,
        steps: Range<usize>,
    ) {
        let place = (i * STEPS + steps.start) * PAIRS;
        let mut pairs = self.pairs[0][place..].chunks_exact_mut(PAIRS);
        for first in steps.clone().step_by(b.grain()) {
            let last = steps.end.min(first + b.grain());
            let k = k.start + first * STEP..k.end.min(k.start + last * STEP);
            let rows = b.rows(panel, k.clone(), &mut self.rows[..k.len()]);
            for (rows, pairs) in rows.chunks(STEP).zip(&mut pairs) {
                if let Some(rows) = rows.as_array() {
                    pack_pairs(amx, rows, pairs);
                } else {
                    let mut padded = [[0f32; COLUMNS]; STEP];
                    padded[..rows.len()].copy_from_slice(rows);
                    pack_pairs(amx, &padded, pairs);
                }
            }
        }
    }
}

/// The share of `steps`, in whole grains, of one of `count`.
fn share(steps: usize, grain: usize, i: usize, count: usize) -> Range<usize> {
    let grains = steps.div_ceil(grain);
    let bound = |i: usize| steps.min(i * grains / count * grain);
    bound(i)..bound(i + 1)
}

/// Rows of a: `[chunk][group][step][row]`.
struct Packed {
    lines: Vec<Line>,
    groups: Vec<Range<usize>>,
    /// Two or more: two tiles cannot share one row.
    rows: usize,
    width: usize,
}

impl Packed {
    fn new(amx: Option<Amx>, a: Rows<'_>) -> Self {
        let (rows, width) = (a.nrows().max(2), a.ncols());
        let groups = amx::groups(rows);
        let mut lines = LINES.take();
        lengthen(&mut lines, rows * width.div_ceil(STEP), Line([0; STEP / 2]));
        let mut tasks = Vec::new();
        let mut rest = &mut *lines;
        for k in chunks(width, CHUNK) {
            for group in &groups {
                let (part, behind) = rest.split_at_mut(group.len() * steps_of(&k));
                tasks.push((k.clone(), group.clone(), part));
                rest = behind;
            }
        }
        tasks.into_par_iter().for_each(|(k, group, lines)| {
            let rows = group.start..group.end.min(a.nrows());
            let steps = lines.chunks_exact_mut(group.len());
            for (step, lines) in steps.enumerate() {
                let k = k.start + step * STEP..k.end.min(k.start + (step + 1) * STEP);
                pack_rows(amx, a.get(rows.clone(), k), lines);
            }
        });
        Self { lines, groups, rows, width }
    }

    /// What belongs to a chunk and a group.
    fn lines(&self, k: &Range<usize>, group: &Range<usize>) -> &[Line] {
        let steps = steps_of(k);
        let start = self.rows * (k.start / STEP) + group.start * steps;
        &self.lines[start..start + group.len() * steps]
    }
}

/// A step of some rows of a as lines, one for each of them; those that are missing are 0.
fn pack_rows(amx: Option<Amx>, a: Rows<'_>, lines: &mut [Line]) {
    let mut block = [[0f32; STEP]; amx::ROWS];
    if a.col_stride() == 1 {
        copy_lines(a, &mut block);
    } else {
        turn_lines(a.transpose(), &mut block[..a.nrows()]);
    }
    let rows = &block[..lines.len()];
    match amx {
        // SAFETY: an `Amx` is only made where there are these instructions.
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "instructions chosen at run time")]
        Some(_) => unsafe { x86::pack_rows(rows, lines) },
        _ => plain::pack_rows(rows, lines),
    }
}

/// A step of a panel of b, a row for each position, as pairs.
fn pack_pairs(amx: Option<Amx>, rows: &[Row; STEP], pairs: &mut [WordPairs]) {
    match amx {
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "instructions chosen at run time")]
        Some(_) => unsafe { x86::pack_pairs(rows, pairs) },
        _ => plain::pack_pairs(rows, pairs),
    }
}

/// What the instructions do.
mod plain {
    use super::{Line, Row, STEP, WordPairs, flushed};
    use crate::bf16::bits;

    fn word(low: f32, high: f32) -> u32 {
        bits(flushed(low)) | bits(flushed(high)) << 16
    }

    pub(super) fn pack_rows(rows: &[Row], lines: &mut [Line]) {
        for (row, line) in rows.iter().zip(lines) {
            for ([low, high], out) in row.as_chunks::<2>().0.iter().zip(&mut line.0) {
                *out = word(*low, *high);
            }
        }
    }

    pub(super) fn pack_pairs(rows: &[Row; STEP], pairs: &mut [WordPairs]) {
        for ([low, high], pair) in rows.as_chunks::<2>().0.iter().zip(pairs) {
            for ((low, high), out) in low.iter().zip(high).zip(&mut pair.0) {
                *out = word(*low, *high);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Line, Row, STEP, WordPairs};
    use crate::tile::x86::load16;

    #[target_feature(enable = "avx512f")]
    fn store(words: &mut [u32; 16], value: __m512i) {
        // SAFETY: it writes the 16 words, at any address.
        #[expect(unsafe_code, reason = "vectors are stored through pointers")]
        unsafe {
            _mm512_storeu_si512(words.as_mut_ptr().cast(), value);
        }
    }

    /// The nearest bf16 of `low`, then those of `high`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn nearest(low: __m512, high: __m512) -> __m512i {
        let both = _mm512_cvtne2ps_pbh(high, low);
        // SAFETY: both are any 64 bytes.
        #[expect(unsafe_code, reason = "the same bits under another name")]
        unsafe {
            std::mem::transmute(both)
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) fn pack_rows(rows: &[Row], lines: &mut [Line]) {
        for (row, line) in rows.iter().zip(lines) {
            store(&mut line.0, nearest(load16(row, 0), load16(row, 1)));
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) fn pack_pairs(rows: &[Row; STEP], pairs: &mut [WordPairs]) {
        // Word i takes half i of the lower, and half i of the upper sixteen.
        let lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        let upper = _mm512_slli_epi32::<16>(_mm512_add_epi32(lanes, _mm512_set1_epi32(16)));
        let words = _mm512_or_si512(lanes, upper);
        for ([low, high], pair) in rows.as_chunks::<2>().0.iter().zip(pairs) {
            for (half, out) in pair.0.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                let both = nearest(load16(low, half), load16(high, half));
                store(out, _mm512_permutexvar_epi16(words, both));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bf16::tests::numbers;
    use crate::factor::Matrix;
    use crate::factor::tests::view;
    use crate::matrix::{self, Output};

    /// By instructions, if there are any, and by plain Rust.
    fn both() -> Vec<Option<Amx>> {
        Amx::detect().map(Some).into_iter().chain([None]).collect()
    }

    const SIZES: [[usize; 3]; 7] = [
        [1, 1, 1],
        [2, 32, 32],
        [33, 31, 33],
        [17, 300, 64],
        [70, 530, 40],
        [3, 1100, 300],
        [MOST_ROWS + 5, 20, 3],
    ];

    /// The product of the rounded factors, whose f32 sums may be off by their rounding alone.
    #[test]
    fn a_product_is_that_of_the_rounded_factors() {
        let factor = |x: f32| f64::from(half::bf16::from_f32(x).to_f32());
        for amx in both() {
            for [m, k, n] in SIZES {
                for turned in [[false, false], [false, true], [true, false], [true, true]] {
                    let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
                    let (a, b) = (view(&a, m, k, turned[0]), view(&b, k, n, turned[1]));
                    // The output is some columns of a wider matrix.
                    let mut wide = numbers(m * (n + 5), 3);
                    let before = wide.clone();
                    let out = matrix::rows_mut(&mut wide, m, n + 5).subcols_mut(2, n);
                    let finish = Finish { output: Output::Add, alpha: 0.5, bias: None };
                    product(amx, out, finish, a, &Matrix(b));
                    for i in (0..m).step_by(1 + m / 40) {
                        for (column, place) in (i * (n + 5)..(i + 1) * (n + 5)).enumerate() {
                            let sum = match column.checked_sub(2).filter(|j| *j < n) {
                                Some(j) => {
                                    (0..k).map(|p| factor(a[(i, p)]) * factor(b[(p, j)])).sum()
                                }
                                None => 0.0,
                            };
                            let now = f64::from(wide[place]) - f64::from(before[place]);
                            let off = (now - 0.5 * sum).abs();
                            assert!(
                                off < 3e-7 * (1.0 + 0.25 * k as f64),
                                "{amx:?} {m} {k} {n} {turned:?}: ({i}, {column}) is off by {off}"
                            );
                        }
                    }
                }
            }
        }
    }

    fn of(amx: Option<Amx>, [m, k, n]: [usize; 3], a: &[f32], b: &[f32]) -> Vec<f32> {
        let mut out = vec![f32::NAN; m * n];
        let to = matrix::rows_mut(&mut out, m, n);
        let finish = Finish { output: Output::Replace, alpha: 1.0, bias: None };
        product(amx, to, finish, view(a, m, k, false), &Matrix(view(b, k, n, true)));
        out
    }

    /// Of all kinds of numbers, those too small to be normal and those that are none among them.
    #[test]
    fn instructions_give_the_bits_of_plain_rust() {
        let odd =
            [0.0, -0.0, 1e-41, -1e-41, f32::MIN_POSITIVE, 3e-38, 1e-34, 1e30, -7.25, 1.0 / 3.0];
        for sizes in SIZES {
            let [m, k, n] = sizes;
            let mut a = numbers(m * k, 5);
            let mut b = numbers(k * n, 6);
            for (i, x) in odd.iter().cycle().enumerate().take(m * k / 3) {
                a[3 * i] = *x;
            }
            for (i, x) in odd.iter().cycle().enumerate().take(k * n / 7) {
                b[7 * i] = *x;
            }
            if m > 2 {
                (a[k], a[2 * k]) = (f32::NAN, f32::INFINITY);
            }
            let Some(amx) = Amx::detect() else { return };
            let (ours, theirs) = (of(Some(amx), sizes, &a, &b), of(None, sizes, &a, &b));
            for (i, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
                let same = ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan();
                assert!(same, "{sizes:?}: {i} is {ours:e}, not {theirs:e}");
            }
        }
    }

    #[test]
    fn threads_and_neighbours_do_not_change_a_bit() {
        let [m, k, n] = [MOST_ROWS + 40, 300, 300];
        let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
        let amx = Amx::detect();
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| of(amx, [m, k, n], &a, &b))
        };
        let all = with(1);
        assert_eq!(all, with(3));
        for i in (0..m).step_by(61) {
            assert_eq!(of(amx, [1, k, n], &a[i * k..], &b), all[i * n..(i + 1) * n], "row {i}");
        }
    }
}

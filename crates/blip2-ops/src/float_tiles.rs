//! Large products of f32 factors by the kernels of `tile.rs`.
//!
//! Rows of a are packed in tiles, b in panels. An output is a sum over k in one order, whatever the
//! threads and the other rows.

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use crate::factor::{Factor, chunks, lengthen, pieces, write};
use crate::host;
use crate::matrix::{Finish, Rows, RowsMut, line};
use crate::tile::{self, COLUMNS, Floats, Isa, Row, part_of};

/// Positions along k that are worked on together: floats of x and of a panel that fit the second-level cache.
const CHUNK: usize = 512;

/// Positions along k that a line of memory holds in f32.
const PER_LINE: usize = 16;

/// Most rows of a that are packed together: panels of b are packed once for them.
const MOST_ROWS: usize = 2304;
/// And most of their numbers, 32 MB, unless that were too few rows.
const MOST_NUMBERS: usize = 8 << 20;

/// Tiles of a that are multiplied with all panels of a task before the next: a chunk of them fits the second-level cache.
const TILES: usize = 16;

/// `out (m,n) [+]= alpha * a (m,k) · b (k,n) + bias`; a has a contiguous dimension, out's is its columns.
pub(crate) fn product(out: RowsMut<'_>, finish: Finish<'_>, a: Rows<'_>, b: &impl Factor) {
    let most_rows = (MOST_NUMBERS / a.ncols()).clamp(TILES * TILES, MOST_ROWS);
    let mut rest = out;
    for rows in tiles(a.nrows(), most_rows) {
        let (out, below) = rest.split_at_row_mut(rows.len());
        let a = FloatRows::new(a.subrows(rows.start, rows.len()), Isa::best());
        pieces(out).into_par_iter().for_each(|(panels, out)| {
            let mut scratch = SCRATCH.take();
            let first = panels.start * COLUMNS;
            scratch.sum(&a, b, panels);
            write(out, first, finish, &scratch.sums, a.n);
            SCRATCH.set(scratch);
        });
        rest = below;
    }
}

/// Room for what a task works on.
#[derive(Default)]
struct Scratch {
    /// A chunk of b: `[panel][k]`.
    weights: Vec<Row>,
    /// `[panel][row]`.
    sums: Vec<Row>,
}

impl Scratch {
    /// Sums of all rows of a with `panels` of b.
    fn sum(&mut self, a: &FloatRows, b: &impl Factor, panels: Range<usize>) {
        let (isa, Self { weights, sums }) = (Isa::best(), self);
        lengthen(weights, panels.len() * CHUNK, [0.0; COLUMNS]);
        lengthen(sums, panels.len() * a.n, [0.0; COLUMNS]);
        sums[..panels.len() * a.n].fill([0.0; COLUMNS]);
        for k in &a.chunks {
            let places = panels.clone().zip(weights.chunks_exact_mut(CHUNK));
            let weights: Vec<_> = places
                .map(|(panel, place)| b.rows(panel, k.clone(), &mut place[..k.len()]))
                .collect();
            for tiles in a.tiles.chunks(TILES) {
                for (weights, sums) in weights.iter().zip(sums.chunks_exact_mut(a.n)) {
                    let weights = Floats::F32(weights);
                    for rows in tiles {
                        let sums = &mut sums[rows.clone()];
                        tile::floats(isa, a.part(k, rows), weights, Floats::NONE, sums);
                    }
                }
            }
        }
    }
}

/// `n` rows in tiles of at most `most`, as equal as can be.
pub(crate) fn tiles(n: usize, most: usize) -> Vec<Range<usize>> {
    let count = n.div_ceil(most);
    (0..count).map(|i| part_of(n, i, count)).collect()
}

/// The part of a buffer, with one number for `per` positions of a row, that belongs to a chunk and a tile.
pub(crate) fn place(n: usize, k: &Range<usize>, rows: &Range<usize>, per: usize) -> Range<usize> {
    let start = (k.start * n + rows.start * k.len()) / per;
    start..start + rows.len() * k.len() / per
}

/// Cuts `all` into the places of every chunk and tile, in their order.
pub(crate) fn cut<'a, T>(
    mut all: &'a mut [T],
    chunks: &[Range<usize>],
    tiles: &[Range<usize>],
    per: usize,
) -> Vec<&'a mut [T]> {
    let mut cut = Vec::with_capacity(chunks.len() * tiles.len());
    for k in chunks {
        for rows in tiles {
            let (head, rest) = all.split_at_mut(rows.len() * k.len() / per);
            cut.push(head);
            all = rest;
        }
    }
    cut
}

thread_local! {
    /// Where the rows of the last product lay, for those of the next: a new place would be cleared before it is filled.
    static ROOM: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// The same for what tasks work on.
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// Rows of x in tiles: `[chunk][tile][k][row]`, and behind them what is left of larger ones.
pub(crate) struct FloatRows {
    room: Vec<f32>,
    /// How many numbers of `room` are theirs.
    len: usize,
    /// How many rows.
    pub(crate) n: usize,
    chunks: Vec<Range<usize>>,
    tiles: Vec<Range<usize>>,
}

impl FloatRows {
    pub(crate) fn new(x: Rows<'_>, isa: Isa) -> Self {
        let (n, width) = (x.nrows(), x.ncols());
        let (chunks, tiles) = (chunks(width, CHUNK), tiles(n, isa.float_rows()));
        let len = n * width;
        let mut room = ROOM.take();
        lengthen(&mut room, len, 0.0);
        if n == 1
            && let Some(row) = x.row(0).try_as_row_major()
        {
            room[..len].copy_from_slice(row.as_slice());
            return Self { room, len, n, chunks, tiles };
        }
        let places = cut(&mut room[..len], &chunks, &tiles, 1);
        let tasks = chunks.iter().flat_map(|k| tiles.iter().map(move |rows| (k, rows)));
        let fill_one = |(place, (k, rows)): (&mut [f32], (&Range<usize>, &Range<usize>))| {
            fill(x.get(rows.clone(), k.clone()), place);
        };
        let tasks: Vec<_> = places.into_iter().zip(tasks).collect();
        if len < 4 * host::GRAIN {
            tasks.into_iter().for_each(fill_one);
        } else {
            tasks.into_par_iter().for_each(fill_one);
        }
        Self { room, len, n, chunks, tiles }
    }

    pub(crate) fn values(&self) -> &[f32] {
        &self.room[..self.len]
    }

    /// What belongs to a chunk and a tile.
    fn part(&self, k: &Range<usize>, rows: &Range<usize>) -> &[f32] {
        &self.values()[place(self.n, k, rows, 1)]
    }

    /// Adds the products with the panels of `group` to their sums in `out`; `weights` gives those of a panel for a chunk.
    /// Meanwhile the weights that come next are asked for, at last those of the panel `behind`.
    pub(crate) fn times<'w>(
        &self,
        isa: Isa,
        group: Range<usize>,
        behind: Option<usize>,
        weights: impl Fn(usize, Range<usize>) -> Floats<'w>,
        out: &mut [Row],
    ) {
        let panels = || group.clone().zip(0..);
        let parts = self.chunks.iter().flat_map(|k| panels().map(move |panel| (k, panel)));
        let mut parts = parts.peekable();
        while let Some((k, (panel, i))) = parts.next() {
            let here = weights(panel, k.clone());
            let next = match (parts.peek(), behind) {
                (Some((k, (panel, _))), _) => weights(*panel, (*k).clone()),
                (None, Some(panel)) => weights(panel, self.chunks[0].clone()),
                (None, None) => Floats::NONE,
            };
            let out = &mut out[i * self.n..][..self.n];
            for (t, rows) in self.tiles.iter().enumerate() {
                let next = next.part(t, self.tiles.len());
                tile::floats(isa, self.part(k, rows), here, next, &mut out[rows.clone()]);
            }
        }
    }
}

/// Numbers of a tile's rows, position by position.
fn fill(rows: Rows<'_>, out: &mut [f32]) {
    let n = rows.nrows();
    if rows.row_stride() == 1 {
        // What many rows are cut into: a copy of known length is no call.
        return match n {
            13 => fill_columns::<13>(rows, out),
            14 => fill_columns::<14>(rows, out),
            _ => {
                for (out, column) in out.chunks_exact_mut(n).zip(rows.transpose().row_iter()) {
                    out.copy_from_slice(line(column));
                }
            }
        };
    }
    // Strip by strip: rows are read side by side, so that their lines arrive together.
    for (strip, out) in out.chunks_mut(PER_LINE * n).enumerate() {
        for (r, row) in rows.row_iter().enumerate() {
            let row = &line(row)[strip * PER_LINE..];
            for (out, x) in out.chunks_exact_mut(n).zip(row) {
                out[r] = *x;
            }
        }
    }
}

/// [`fill`] for N rows whose numbers of a position lie together.
fn fill_columns<const N: usize>(rows: Rows<'_>, out: &mut [f32]) {
    for (out, column) in out.as_chunks_mut::<N>().0.iter_mut().zip(rows.transpose().row_iter()) {
        let Some(column) = line(column).as_array() else { unreachable!("{N} rows") };
        *out = *column;
    }
}

impl Drop for FloatRows {
    fn drop(&mut self) {
        ROOM.set(std::mem::take(&mut self.room));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bf16::tests::numbers;
    use crate::factor::Matrix;
    use crate::factor::tests::view;
    use crate::host::simd;
    use crate::matrix;

    /// The sum in the order of k, which no other row, thread or chunk changes.
    fn sum(a: Rows<'_>, b: Rows<'_>, i: usize, j: usize) -> f32 {
        simd(
            #[inline(always)]
            |f| (0..a.ncols()).fold(0.0, |sum, k| f.of(a[(i, k)], b[(k, j)], sum)),
        )
    }

    #[test]
    fn products_are_sums_in_the_order_of_k() {
        for [m, k, n] in [[1, 1, 1], [2, 33, 32], [33, 31, 33], [17, 600, 64], [340, 530, 300]] {
            for turned in [[false, false], [false, true], [true, false], [true, true]] {
                let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
                let (a, b) = (view(&a, m, k, turned[0]), view(&b, k, n, turned[1]));
                // The output is some columns of a wider matrix.
                let before = numbers(m * (n + 5), 3);
                let mut wide = before.clone();
                let out = matrix::rows_mut(&mut wide, m, n + 5).subcols_mut(2, n);
                product(out, Finish::ADD.times(0.5), a, &Matrix(b));
                for i in (0..m).step_by(1 + m / 40) {
                    for j in 0..n + 5 {
                        let inside = j.checked_sub(2).filter(|j| *j < n);
                        let added = inside.map_or(0.0, |j| 0.5 * sum(a, b, i, j));
                        let place = i * (n + 5) + j;
                        assert_eq!(
                            wide[place].to_bits(),
                            (before[place] + added).to_bits(),
                            "{m} {k} {n} {turned:?}: ({i}, {j})"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn many_rows_are_packed_in_parts() {
        let [m, k, n] = [2 * MOST_ROWS + 3, 20, 17];
        let (a, b) = (numbers(m * k, 4), numbers(k * n, 5));
        let (a, b) = (view(&a, m, k, false), view(&b, k, n, true));
        let mut out = vec![f32::NAN; m * n];
        let to = matrix::rows_mut(&mut out, m, n);
        product(to, Finish::REPLACE, a, &Matrix(b));
        for i in (0..m).step_by(97).chain([m - 1]) {
            for j in 0..n {
                assert_eq!(out[i * n + j].to_bits(), sum(a, b, i, j).to_bits(), "({i}, {j})");
            }
        }
    }

    #[test]
    fn tiles_are_as_equal_as_can_be() {
        let heights = |n, most| tiles(n, most).into_iter().map(|t| t.len()).collect::<Vec<_>>();
        assert_eq!(heights(5, 6), [5]);
        assert_eq!(heights(7, 6), [3, 4]);
        assert_eq!(heights(13, 6), [4, 4, 5]);
    }
}

//! What products by tiles share (`float_tiles.rs`, `bf16_tiles.rs`): the right factor, which comes as panels of 32 columns, how columns are
//! shared out, and how sums are written.

use std::ops::Range;

use crate::amx::STEP;
use crate::matrix::{Finish, Output, Rows, RowsMut, line, line_mut};
use crate::tile::{COLUMNS, Row, part_of};

/// Panels of b that a task multiplies with rows of a before the next.
const PANELS: usize = 4;

/// The right factor of a product: k positions of so many columns.
pub(crate) trait Factor: Sync {
    /// Steps that are asked for together: 1, or all of a chunk.
    fn grain(&self) -> usize {
        1
    }

    /// Positions `k` of panel `panel`, in the calling thread: a row of columns each, those that are missing 0. They are written to `memory`, which has as
    /// many, unless they lie so.
    fn rows<'m>(&'m self, panel: usize, k: Range<usize>, memory: &'m mut [Row]) -> &'m [Row];
}

/// The columns of `out` by tasks, each with its panels: as equal as can be, and as many tasks for each thread.
pub(crate) fn pieces(out: RowsMut<'_>) -> Vec<(Range<usize>, RowsMut<'_>)> {
    let panels = out.ncols().div_ceil(COLUMNS);
    let threads = rayon::current_num_threads();
    let count = panels.min(panels.div_ceil(PANELS).max(4 * threads).next_multiple_of(threads));
    let mut pieces = Vec::with_capacity(count);
    let mut rest = out;
    for i in 0..count {
        let panels = part_of(panels, i, count);
        let columns = (panels.len() * COLUMNS).min(rest.ncols());
        let (out, right) = rest.split_at_col_mut(columns);
        pieces.push((panels, out));
        rest = right;
    }
    pieces
}

/// `width` positions along k in chunks.
pub(crate) fn chunks(width: usize, chunk: usize) -> Vec<Range<usize>> {
    (0..width).step_by(chunk).map(|k| k..width.min(k + chunk)).collect()
}

/// Makes `place` at least so long; what it holds stays, or is `empty`.
pub(crate) fn lengthen<T: Copy>(place: &mut Vec<T>, length: usize, empty: T) {
    if place.len() < length {
        place.clear();
        place.resize(length, empty);
    }
}

/// Writes sums, so many rows of each panel, to `out`, whose first column is column `first` of the whole.
pub(crate) fn write(out: RowsMut<'_>, first: usize, finish: Finish<'_>, sums: &[Row], rows: usize) {
    let Finish { output, alpha, bias } = finish;
    let bias = bias.map(|bias| &bias[first..]);
    for (row, out) in out.row_iter_mut().enumerate() {
        let sums = sums[row..].iter().step_by(rows);
        for (i, (out, sums)) in line_mut(out).chunks_mut(COLUMNS).zip(sums).enumerate() {
            let places = out.iter_mut().zip(sums);
            match (output, bias) {
                (Output::Add, _) => places.for_each(|(out, sum)| *out += alpha * sum),
                (Output::Replace, None) => places.for_each(|(out, sum)| *out = alpha * sum),
                (Output::Replace, Some(bias)) => {
                    let places = places.zip(&bias[i * COLUMNS..]);
                    places.for_each(|((out, sum), bias)| *out = alpha * sum + bias);
                }
            }
        }
    }
}

/// A matrix of k rows, one of whose dimensions is contiguous.
pub(crate) struct Matrix<'a>(pub(crate) Rows<'a>);

impl Factor for Matrix<'_> {
    fn rows<'m>(&'m self, panel: usize, k: Range<usize>, memory: &'m mut [Row]) -> &'m [Row] {
        let first = panel * COLUMNS;
        let block = self.0.get(k, first..self.0.ncols().min(first + COLUMNS));
        if block.col_stride() == 1 {
            copy_lines(block, memory);
            return memory;
        }
        for (i, memory) in memory.chunks_mut(STEP).enumerate() {
            turn_lines(block.subrows(i * STEP, memory.len()).transpose(), memory);
        }
        memory
    }
}

/// A row of `out` for each row of a matrix, which are contiguous; what a row lacks is 0.
pub(crate) fn copy_lines(matrix: Rows<'_>, out: &mut [Row]) {
    for (out, row) in out.iter_mut().zip(matrix.row_iter()) {
        let row = line(row);
        match row.as_array() {
            Some(full) => *out = *full,
            None => {
                let (numbers, rest) = out.split_at_mut(row.len());
                numbers.copy_from_slice(row);
                rest.fill(0.0);
            }
        }
    }
}

/// A row of `out` for each column of a matrix, whose rows are contiguous; what a column lacks is 0.
pub(crate) fn turn_lines(matrix: Rows<'_>, out: &mut [Row]) {
    let mut lines = [[0f32; COLUMNS]; STEP];
    copy_lines(matrix, &mut lines);
    let turned = turn(&lines);
    out.copy_from_slice(&turned[..out.len()]);
}

/// Rows and columns exchanged.
pub(crate) fn turn(block: &[Row; STEP]) -> [Row; STEP] {
    let mut out = [[0f32; COLUMNS]; STEP];
    for (c, out) in out.iter_mut().enumerate() {
        for (out, row) in out.iter_mut().zip(block) {
            *out = row[c];
        }
    }
    out
}

#[cfg(test)]
pub(crate) mod tests {
    use crate::matrix::{self, Rows};

    /// `data` as a matrix whose rows, or if `turned` whose columns, are contiguous.
    pub(crate) fn view(data: &[f32], rows: usize, cols: usize, turned: bool) -> Rows<'_> {
        match turned {
            true => matrix::rows(data, cols, rows).transpose(),
            false => matrix::rows(data, rows, cols),
        }
    }
}

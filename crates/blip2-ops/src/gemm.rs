//! The f32 matrix product, on row-major slices: safe wrappers over faer; in mixed precision the large ones go to `bf16`.
//!
//! A [`Rows`] is a `(rows, cols)` view with a row stride, so one head of a `(t, heads*d)` matrix is
//! multiplied in place, without a transposed copy.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use crate::{bf16, work};

/// A row-major matrix, maybe some columns of a wider one.
pub(crate) type Rows<'a> = MatRef<'a, f32>;
/// A mutable row-major matrix, maybe some columns of a wider one.
pub(crate) type RowsMut<'a> = MatMut<'a, f32>;

/// Products below this many multiplications are done by the calling thread.
const PARALLEL_FROM: usize = 64 * 64 * 64;

/// Who computes a product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    /// All threads of the rayon pool, if the product is large enough.
    All,
    /// The calling thread: inside loops that are parallel already.
    One,
}

/// Whether a product replaces what the output holds or is added to it.
#[derive(Clone, Copy)]
pub(crate) enum Output {
    Replace,
    Add,
}

/// `data` as a `(rows, cols)` matrix.
pub(crate) fn rows(data: &[f32], rows: usize, cols: usize) -> Rows<'_> {
    MatRef::from_row_major_slice(&data[..rows * cols], rows, cols)
}

/// Columns `first..first+cols` of `data` as a `(rows, width)` matrix.
pub(crate) fn columns(
    data: &[f32],
    rows: usize,
    width: usize,
    first: usize,
    cols: usize,
) -> Rows<'_> {
    MatRef::from_row_major_slice(&data[..rows * width], rows, width).subcols(first, cols)
}

/// `data` as a mutable `(rows, cols)` matrix.
pub(crate) fn rows_mut(data: &mut [f32], rows: usize, cols: usize) -> RowsMut<'_> {
    MatMut::from_row_major_slice_mut(&mut data[..rows * cols], rows, cols)
}

/// Cuts `matrix` into neighbouring blocks of `cols` columns.
pub(crate) fn split_columns(matrix: RowsMut<'_>, cols: usize) -> Vec<RowsMut<'_>> {
    let mut blocks = Vec::new();
    let mut rest = matrix;
    while rest.ncols() > 0 {
        let at = cols.min(rest.ncols()).max(1);
        let (block, right) = rest.split_at_col_mut(at);
        blocks.push(block);
        rest = right;
    }
    blocks
}

/// `out (m,n) [+]= alpha * a (m,k) · b (k,n)`; pass `.transpose()` views as needed.
pub(crate) fn product(
    out: RowsMut<'_>,
    output: Output,
    alpha: f32,
    a: Rows<'_>,
    b: Rows<'_>,
    threads: Threads,
) {
    if out.nrows() == 0 || out.ncols() == 0 {
        return;
    }
    if a.ncols() == 0 {
        if matches!(output, Output::Replace) {
            let mut out = out;
            out.fill(0.0);
        }
        return;
    }
    if threads == Threads::All && bf16::is_on() && bf16::suits(&out, a, b) {
        work::product(out.nrows(), a.ncols(), out.ncols());
        bf16::product(out, output, alpha, a, b);
        return;
    }
    let work = out.nrows() * out.ncols() * a.ncols();
    work::product(out.nrows(), a.ncols(), out.ncols());
    let par = match threads {
        Threads::All if work >= PARALLEL_FROM && rayon::current_num_threads() > 1 => Par::rayon(0),
        _ => Par::Seq,
    };
    let accum = match output {
        Output::Replace => Accum::Replace,
        Output::Add => Accum::Add,
    };
    matmul(out, accum, a, b, alpha, par);
}

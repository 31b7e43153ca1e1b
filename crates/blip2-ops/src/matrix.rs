//! Row-major slices as matrices.
//!
//! A [`Rows`] is a `(rows, cols)` view with a row stride, so one head of a `(t, heads*d)` matrix is
//! multiplied in place, without a transposed copy.

use faer::{MatMut, MatRef, RowMut, RowRef};

/// Columns of a panel, which lie together: two vectors of AVX-512.
pub(crate) const COLUMNS: usize = 32;

/// One number of each of them.
pub(crate) type Row = [f32; COLUMNS];

/// What callers have made sure of.
const STRIDES: &str = "the numbers of a row lie together";

/// A row-major matrix, maybe some columns of a wider one.
pub(crate) type Rows<'a> = MatRef<'a, f32>;
/// A mutable row-major matrix, maybe some columns of a wider one.
pub(crate) type RowsMut<'a> = MatMut<'a, f32>;

/// Whether a product replaces what the output holds or is added to it.
#[derive(Clone, Copy)]
pub(crate) enum Output {
    Replace,
    Add,
}

/// What becomes of the sums of a product.
#[derive(Clone, Copy)]
pub(crate) struct Finish<'a> {
    pub(crate) output: Output,
    /// They are multiplied with.
    pub(crate) alpha: f32,
    /// Added to each row; only where they replace what was there.
    pub(crate) bias: Option<&'a [f32]>,
}

impl Finish<'_> {
    /// They replace what was there.
    pub(crate) const REPLACE: Self = Self { output: Output::Replace, alpha: 1.0, bias: None };
    /// They are added to it.
    pub(crate) const ADD: Self = Self { output: Output::Add, ..Self::REPLACE };

    /// After multiplication with `alpha`.
    pub(crate) fn times(self, alpha: f32) -> Self {
        Self { alpha, ..self }
    }
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

/// The numbers of a row that the caller has made sure lie together.
pub(crate) fn line(row: RowRef<'_, f32>) -> &[f32] {
    let Some(row) = row.try_as_row_major() else { unreachable!("{STRIDES}") };
    row.as_slice()
}

/// The same to write to.
pub(crate) fn line_mut(row: RowMut<'_, f32>) -> &mut [f32] {
    let Some(row) = row.try_as_row_major_mut() else { unreachable!("{STRIDES}") };
    row.as_slice_mut()
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

//! The matrix product. Large ones go to `float_tiles` where there is AVX-512, in mixed precision to `bf16_tiles` or `bf16`; all others are
//! faer's.

use faer::linalg::matmul::matmul;
use faer::{Accum, Par};

use crate::amx::Amx;
use crate::factor::Matrix;
use crate::matrix::line_mut;
pub(crate) use crate::matrix::{
    Finish, Output, Rows, RowsMut, columns, rows, rows_mut, split_columns,
};
use crate::tile::Isa;
use crate::{bf16, bf16_tiles, float_tiles, work};

/// Products below this many multiplications are done by the calling thread.
const PARALLEL_FROM: usize = 64 * 64 * 64;
/// Thinner products are not worth the packing.
const THINNEST: usize = 16;

/// Who computes a product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    /// All threads of the rayon pool, if the product is large enough.
    All,
    /// The calling thread: inside loops that are parallel already.
    One,
}

/// How a product is computed that all threads share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// In f32.
    Floats,
    /// In mixed precision, by tile instructions.
    Tiles(Amx),
    /// In mixed precision, by vector instructions.
    Vectors,
}

impl Way {
    /// That of a product of `m` × `k` with `k` × `n` numbers.
    pub(crate) fn of(m: usize, k: usize, n: usize) -> Self {
        if !bf16::MixedPrecision::is_on() || !is_thick(m, k, n) {
            return Self::Floats;
        }
        Amx::detect().map_or(Self::Vectors, Self::Tiles)
    }
}

/// Whether packing the factors is worth it.
fn is_thick(m: usize, k: usize, n: usize) -> bool {
    m.min(k).min(n) >= THINNEST
}

/// Whether threads share the work of such a product.
fn is_large(m: usize, k: usize, n: usize) -> bool {
    m * k * n >= PARALLEL_FROM
}

/// Whether all threads together are fastest by tiles of floats.
pub(crate) fn has_float_tiles(m: usize, k: usize, n: usize) -> bool {
    is_large(m, k, n) && is_thick(m, k, n) && Isa::best().has_wide_tiles()
}

/// `out (m,n) [+]= alpha * a (m,k) · b (k,n) + bias`; pass `.transpose()` views as needed. With a bias the columns of out are contiguous.
pub(crate) fn product(
    out: RowsMut<'_>,
    finish: Finish<'_>,
    a: Rows<'_>,
    b: Rows<'_>,
    threads: Threads,
) {
    if out.nrows() == 0 || out.ncols() == 0 {
        return;
    }
    if a.ncols() == 0 {
        return without_terms(out, finish);
    }
    let (m, k, n) = (out.nrows(), a.ncols(), out.ncols());
    work::product(m, k, n);
    let parallel = threads == Threads::All && is_large(m, k, n);
    if threads == Threads::All && lie_well(&out, a, b) {
        match Way::of(m, k, n) {
            Way::Floats if has_float_tiles(m, k, n) => {
                return float_tiles::product(out, finish, a, &Matrix(b));
            }
            Way::Tiles(amx) => return bf16_tiles::product(Some(amx), out, finish, a, &Matrix(b)),
            Way::Vectors => {
                let (out, output) = biased(out, finish);
                return bf16::product(out, output, finish.alpha, a, b);
            }
            Way::Floats => {}
        }
    }
    let (out, output) = biased(out, finish);
    let par = if parallel && rayon::current_num_threads() > 1 { Par::rayon(0) } else { Par::Seq };
    let accum = match output {
        Output::Replace => Accum::Replace,
        Output::Add => Accum::Add,
    };
    matmul(out, accum, a, b, finish.alpha, par);
}

/// What is left of a product if nothing is summed.
fn without_terms(out: RowsMut<'_>, finish: Finish<'_>) {
    if let (mut out, Output::Replace) = biased(out, finish) {
        out.fill(0.0);
    }
}

/// For products that know no bias: it is put to its place, and the product is added to it.
pub(crate) fn biased<'a>(mut out: RowsMut<'a>, finish: Finish<'_>) -> (RowsMut<'a>, Output) {
    let (Some(bias), Output::Replace) = (finish.bias, finish.output) else {
        return (out, finish.output);
    };
    for row in out.as_mut().row_iter_mut() {
        line_mut(row).copy_from_slice(bias);
    }
    (out, Output::Add)
}

/// Whether all matrices have a contiguous dimension, as packing wants it.
fn lie_well(out: &RowsMut<'_>, a: Rows<'_>, b: Rows<'_>) -> bool {
    let lies_well = |matrix: Rows<'_>| matrix.col_stride() == 1 || matrix.row_stride() == 1;
    out.col_stride() == 1 && lies_well(a) && lies_well(b)
}

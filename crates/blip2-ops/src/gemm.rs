//! The f32 matrix product: a safe wrapper over faer; in mixed precision the large ones go to `bf16`.

use faer::linalg::matmul::matmul;
use faer::{Accum, Par};

pub(crate) use crate::matrix::{Output, Rows, RowsMut, columns, rows, rows_mut, split_columns};
use crate::{bf16, work};

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
    work::product(out.nrows(), a.ncols(), out.ncols());
    if threads == Threads::All && bf16::MixedPrecision::is_on() && bf16::suits(&out, a, b) {
        return bf16::product(out, output, alpha, a, b);
    }
    let work = out.nrows() * out.ncols() * a.ncols();
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

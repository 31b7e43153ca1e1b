//! `cached_attention`: one query per row over keys and values that were written piece by piece.
//!
//! A decoder's cache is a list of what was written; rows point into it. When beams change places, or a prompt becomes
//! several beams, only the pointers move: no key is ever copied.
//!
//! Letters: b rows, h heads, d width of a head, n rows of a segment, t its positions.

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use crate::attention::{Bias, Dims, Heads, add_bias, soft_max};
use crate::host::{self, Fma, Host};
use crate::work;

const NAME: &str = "cached_attention";

/// Into how many parts the heads are cut for each thread, at least: so that they end together.
const TASKS_PER_THREAD: usize = 4;

/// Multiplications below which one thread does everything.
const PARALLEL_FROM: usize = 64 * 1024;

/// Keys and values of some positions, which stand behind those of the segment before.
#[derive(Clone, Debug)]
pub struct Segment {
    /// (n, t, kv_heads·d)
    pub k: Tensor,
    /// Of the same shape.
    pub v: Tensor,
    /// For each row of queries the row of `k` and `v` that belongs to it.
    pub rows: Vec<u32>,
}

/// A segment, borrowed.
struct Piece<'a> {
    k: Host<'a>,
    v: Host<'a>,
    rows: &'a [u32],
    t: usize,
}

/// [`crate::attention`] for queries `q (b, 1, heads*d)` over the positions of all `segments`, in their order; `bias`
/// broadcasts to `(b, heads, 1, positions)`. Of no positions zeros. Forward only.
///
/// # Errors
/// Shapes that do not fit, a row that is not there, or a tracked argument, whose gradient would stop here.
pub fn cached_attention(
    q: &Tensor,
    segments: &[Segment],
    bias: Option<&Tensor>,
    heads: Heads,
) -> Result<Tensor> {
    let dims = check(q, segments, heads)?;
    let bias = bias.map(|bias| Bias::new(NAME, bias, &dims)).transpose()?;
    if q.elem_count() == 0 || dims.tk == 0 {
        return q.zeros_like();
    }
    let q_host = Host::new(NAME, q)?;
    let pieces = segments
        .iter()
        .map(|s| {
            let t = s.k.dim(1)?;
            Ok(Piece { k: Host::new(NAME, &s.k)?, v: Host::new(NAME, &s.v)?, rows: &s.rows, t })
        })
        .collect::<Result<Vec<_>>>()?;
    let bias_host = bias.as_ref().map(|bias| Host::new(NAME, &bias.values)).transpose()?;
    let call = Call {
        dims,
        scale: heads.scale,
        q: &q_host,
        pieces: &pieces,
        bias: bias.as_ref().zip(bias_host.as_deref()).map(|(b, values)| (values, b.strides)),
    };
    let mut y = vec![0f32; q.elem_count()];
    let products = dims.b * dims.h * dims.tk * dims.d;
    work::product(2 * dims.b * dims.h, dims.tk, dims.d);
    // What several rows point to is read from memory once.
    work::read(pieces.iter().map(|piece| size_of_val(&*piece.k) + size_of_val(&*piece.v)).sum());
    let tasks = cut(&mut y, dims);
    let run = |scores: &mut Vec<f32>, (row, first, y): (usize, usize, &mut [f32])| {
        scores.resize(y.len() / dims.d * dims.tk, 0.0);
        pulp::Arch::new().dispatch(RowHeads { call: &call, row, first, scores, y });
    };
    if products < PARALLEL_FROM {
        let mut scores = Vec::new();
        tasks.into_iter().for_each(|task| run(&mut scores, task));
    } else {
        tasks.into_par_iter().for_each_init(Vec::new, run);
    }
    host::tensor(y, q.shape())
}

/// What a thread does at a time, (row, first head, place of their results): heads that lie side by side, so that keys and values are
/// read in long stretches, as many of a row as leave some tasks to each thread.
fn cut(y: &mut [f32], Dims { b, h, d, .. }: Dims) -> Vec<(usize, usize, &mut [f32])> {
    let per_row = (TASKS_PER_THREAD * rayon::current_num_threads()).div_ceil(b);
    let count = h.div_ceil(per_row);
    let rows = y.chunks_exact_mut(h * d).enumerate();
    rows.flat_map(|(row, y)| {
        let parts = y.chunks_mut(count * d).enumerate();
        parts.map(move |(i, y)| (row, i * count, y))
    })
    .collect()
}

fn check(q: &Tensor, segments: &[Segment], heads: Heads) -> Result<Dims> {
    host::check(NAME, &[q])?;
    let Some(first) = segments.first() else { bail!("{NAME}: no keys and values") };
    let mut positions = 0;
    for Segment { k, v, rows } in segments {
        host::check(NAME, &[k, v])?;
        if q.track_op() || k.track_op() || v.track_op() {
            bail!("{NAME}: has no gradient; q {:?} and k {:?} are tracked", q.shape(), k.shape());
        }
        let (n, t, width) = k.dims3()?;
        if k.dims() != v.dims() || width != first.k.dim(2)? || rows.len() != q.dim(0)? {
            bail!(
                "{NAME}: k {:?}, v {:?} and {} rows do not fit q {:?}",
                k.shape(),
                v.shape(),
                rows.len(),
                q.shape()
            );
        }
        if let Some(row) = rows.iter().find(|row| **row as usize >= n) {
            bail!("{NAME}: row {row} of k {:?}", k.shape());
        }
        positions += t;
    }
    let (b, one, _) = q.dims3()?;
    if one != 1 {
        bail!("{NAME}: q {:?} has more than one position a row", q.shape());
    }
    Dims::of(NAME, q.dims(), [b, positions, first.k.dim(2)?], heads)
}

/// One call, borrowed.
struct Call<'a> {
    dims: Dims,
    scale: f32,
    q: &'a [f32],
    pieces: &'a [Piece<'a>],
    bias: Option<(&'a [f32], [usize; 4])>,
}

/// Heads `first..` of a row of queries, whose results are `y (heads, d)`, with `scores (heads, tk)`.
struct RowHeads<'a> {
    call: &'a Call<'a>,
    row: usize,
    first: usize,
    scores: &'a mut [f32],
    y: &'a mut [f32],
}

impl pulp::WithSimd for RowHeads<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) {
        let Self { call, row, first, scores, y } = self;
        let Dims { h, d, tk, .. } = call.dims;
        let group = call.dims.group();
        let q = &call.q[(row * h + first) * d..][..y.len()];
        for (position, k) in call.positions(row, |piece| &piece.k).enumerate() {
            for (i, q) in q.chunks_exact(d).enumerate() {
                let k = &k[(first + i) / group * d..][..d];
                scores[i * tk + position] = call.scale * host::dot_of_vectors(simd, q, k);
            }
        }
        for (i, scores) in scores.chunks_exact_mut(tk).enumerate() {
            if let Some((bias, strides)) = call.bias {
                add_bias(bias, strides, [row, first + i, 0], scores);
            }
            soft_max(Fma::with::<S>(), scores);
        }
        for (position, v) in call.positions(row, |piece| &piece.v).enumerate() {
            for (i, y) in y.chunks_exact_mut(d).enumerate() {
                let v = &v[(first + i) / group * d..][..d];
                host::add_scaled(simd, scores[i * tk + position], v, y);
            }
        }
    }
}

impl Call<'_> {
    /// Keys or values of a row of queries, position by position.
    #[inline(always)]
    fn positions<'a>(
        &'a self,
        row: usize,
        part: impl Fn(&'a Piece<'a>) -> &'a [f32],
    ) -> impl Iterator<Item = &'a [f32]> {
        let width = self.dims.kv * self.dims.d;
        self.pieces.iter().flat_map(move |piece| {
            let size = piece.t * width;
            part(piece)[piece.rows[row] as usize * size..][..size].chunks_exact(width)
        })
    }
}

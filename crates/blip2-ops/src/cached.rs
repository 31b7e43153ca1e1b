//! `cached_attention`: one query per row over keys and values that were written piece by piece.
//!
//! A decoder's cache is a list of what was written; rows point into it. When beams change places, or a prompt becomes
//! several beams, only the pointers move: no key is ever copied.
//!
//! Letters: b rows, h heads, d width of a head, n rows of a segment, t its positions.

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use crate::attention::{Bias, Dims, Heads, soft_max};
use crate::host::{self, Host, simd};
use crate::work;

const NAME: &str = "cached_attention";

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
/// broadcasts to `(b, heads, 1, positions)`. Forward only.
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
    if q.elem_count() == 0 {
        return Ok(q.clone());
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
    let heads = y.chunks_exact_mut(dims.d).enumerate();
    if products < PARALLEL_FROM {
        let mut scores = vec![0f32; dims.tk];
        heads.for_each(|(i, y)| call.head(i, &mut scores, y));
    } else {
        let heads: Vec<_> = heads.collect();
        // Long enough stretches that sharing out is not the larger part of the work.
        heads
            .into_par_iter()
            .with_min_len(4)
            .for_each_init(|| vec![0f32; dims.tk], |scores, (i, y)| call.head(i, scores, y));
    }
    host::tensor(y, q.shape())
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

impl Call<'_> {
    /// Head `i`, counted over all rows, to `y (d)`.
    fn head(&self, i: usize, scores: &mut [f32], y: &mut [f32]) {
        let Dims { h, kv, d, .. } = self.dims;
        let (row, head) = (i / h, i % h);
        let first = head / self.dims.group() * d;
        let q = &self.q[i * d..(i + 1) * d];
        simd(
            #[inline(always)]
            |f| {
                let mut position = 0;
                for piece in self.pieces {
                    let k = piece.of(&piece.k, row, kv * d);
                    for k in k.chunks_exact(kv * d) {
                        scores[position] = self.scale * host::dot(f, q, &k[first..first + d]);
                        position += 1;
                    }
                }
                if let Some((bias, strides)) = self.bias {
                    let at = row * strides[0] + head * strides[1];
                    for (j, score) in scores.iter_mut().enumerate() {
                        *score += bias[at + j * strides[3]];
                    }
                }
                soft_max(f, scores);
                let mut position = 0;
                for piece in self.pieces {
                    let v = piece.of(&piece.v, row, kv * d);
                    for v in v.chunks_exact(kv * d) {
                        for (y, v) in y.iter_mut().zip(&v[first..first + d]) {
                            *y = f.of(scores[position], *v, *y);
                        }
                        position += 1;
                    }
                }
            },
        );
    }
}

impl Piece<'_> {
    /// What belongs to a row of queries, (t, width).
    fn of<'a>(&self, values: &'a [f32], row: usize, width: usize) -> &'a [f32] {
        let size = self.t * width;
        &values[self.rows[row] as usize * size..][..size]
    }
}

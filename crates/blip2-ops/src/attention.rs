//! `attention`: scaled dot-product attention over heads that lie side by side in the last dimension.
//!
//! No transposed copies: a head is a block of columns of `(t, heads*d)`, and faer multiplies it in
//! place. The probabilities are recomputed in the backward pass, so a graph holds none of them.
//!
//! Letters: b batch, tq/tk queries/keys, h heads, d width of a head.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::dropout::DropoutKey;
use crate::gemm::{self, Finish, RowsMut, Threads, product};
use crate::host::{self, Fma, Host, simd};
use crate::work;

const NAME: &str = "attention";

/// How the last dimension of queries and keys divides into heads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// Heads of the queries.
    pub heads: usize,
    /// Heads of keys and values; each serves `heads / kv_heads` neighbouring query heads.
    pub kv_heads: usize,
    /// Factor of the scores, usually `1/√d`.
    pub scale: f32,
}

/// `softmax(scale q kᵀ + bias) v` per head: `q (b, tq, heads*d)`, `k, v (b, tk, kv_heads*d)` →
/// `(b, tq, heads*d)`.
///
/// `bias` is f32 and broadcasts to `(b, heads, tq, tk)` like in NumPy; it gets no gradient. A query
/// whose every score is -inf yields zeros. `dropout` acts on the probabilities.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    bias: Option<&Tensor>,
    heads: Heads,
    dropout: Option<DropoutKey>,
) -> Result<Tensor> {
    host::check(NAME, &[q, k, v])?;
    let dims = Dims::new(q, k, v, heads)?;
    let bias = bias.map(|bias| Bias::new(NAME, bias, &dims)).transpose()?;
    if let Some(key) = dropout {
        key.check(NAME)?;
    }
    q.apply_op3(k, v, Attention { dims, scale: heads.scale, bias, dropout })
}

/// The sizes of one call.
#[derive(Clone, Copy)]
pub(crate) struct Dims {
    pub(crate) b: usize,
    pub(crate) tq: usize,
    pub(crate) tk: usize,
    pub(crate) h: usize,
    pub(crate) kv: usize,
    pub(crate) d: usize,
}

impl Dims {
    fn new(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads) -> Result<Self> {
        if k.dims() != v.dims() {
            bail!("{NAME}: k {:?} and v {:?} differ in shape", k.shape(), v.shape());
        }
        let &[b, tk, width] = k.dims() else {
            bail!("{NAME}: q {:?} and k {:?} must be (b, t, heads*d)", q.shape(), k.shape());
        };
        Self::of(NAME, q.dims(), [b, tk, width], heads)
    }

    /// Of queries (b, tq, heads*d) and keys (b, tk, kv_heads*d).
    pub(crate) fn of(op: &str, q: &[usize], k: [usize; 3], heads: Heads) -> Result<Self> {
        let Heads { heads: h, kv_heads: kv, .. } = heads;
        let (&[b, tq, wq], [bk, tk, wk]) = (q, k) else {
            bail!("{op}: q {q:?} and k {k:?} must be (b, t, heads*d)");
        };
        if h == 0 || kv == 0 || h % kv != 0 || wq % h != 0 {
            bail!("{op}: {h} heads with {kv} key heads do not divide q {q:?}");
        }
        if b != bk || wk != wq / h * kv {
            bail!("{op}: q {q:?} with {h} heads and k {k:?} with {kv} do not fit");
        }
        Ok(Self { b, tq, tk, h, kv, d: wq / h })
    }

    /// Query heads that share a key head.
    pub(crate) fn group(&self) -> usize {
        self.h / self.kv
    }

    /// Multiplications of one product over all heads.
    fn work(&self) -> usize {
        self.b * self.h * self.tq * self.tk * self.d
    }
}

/// An additive bias: contiguous values, and strides that are 0 where it is broadcast.
pub(crate) struct Bias {
    pub(crate) values: Tensor,
    pub(crate) strides: [usize; 4],
}

impl Bias {
    pub(crate) fn new(op: &str, bias: &Tensor, dims: &Dims) -> Result<Self> {
        host::check(op, &[bias])?;
        let full = [dims.b, dims.h, dims.tq, dims.tk];
        let own = bias.dims();
        let fits = own.len() <= 4
            && own.iter().rev().zip(full.iter().rev()).all(|(&own, &full)| own == 1 || own == full);
        if !fits {
            bail!("{op}: bias {:?} does not broadcast to {full:?}", bias.shape());
        }
        let mut strides = [0; 4];
        let mut step = 1;
        for (back, &size) in own.iter().rev().enumerate() {
            strides[3 - back] = if size == 1 { 0 } else { step };
            step *= size;
        }
        Ok(Self { values: bias.detach().contiguous()?, strides })
    }
}

struct Attention {
    dims: Dims,
    scale: f32,
    bias: Option<Bias>,
    dropout: Option<DropoutKey>,
}

/// The numbers of one call, borrowed.
struct Inputs<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    bias: Option<&'a [f32]>,
}

impl Attention {
    fn q<'a>(&self, data: &'a [f32], b: usize, head: usize) -> gemm::Rows<'a> {
        let Dims { tq, h, d, .. } = self.dims;
        gemm::columns(&data[b * tq * h * d..], tq, h * d, head * d, d)
    }

    fn kv<'a>(&self, data: &'a [f32], b: usize, head: usize) -> gemm::Rows<'a> {
        let Dims { tk, kv, d, .. } = self.dims;
        gemm::columns(&data[b * tk * kv * d..], tk, kv * d, head / self.dims.group() * d, d)
    }

    /// Fills `p (tq, tk)` with the probabilities of one head, before dropout.
    fn probabilities(&self, x: &Inputs<'_>, b: usize, head: usize, p: &mut [f32]) {
        let Dims { tq, tk, .. } = self.dims;
        let (q, k) = (self.q(x.q, b, head), self.kv(x.k, b, head));
        let scores = gemm::rows_mut(p, tq, tk);
        product(scores, Finish::REPLACE.times(self.scale), q, k.transpose(), Threads::One);
        let strides = self.bias.as_ref().map_or([0; 4], |bias| bias.strides);
        simd(
            #[inline(always)]
            |f| {
                for (i, row) in p.chunks_exact_mut(tk).enumerate() {
                    if let Some(bias) = x.bias {
                        add_bias(bias, strides, [b, head, i], row);
                    }
                    soft_max(f, row);
                }
            },
        );
    }

    fn drop_out(&self, b: usize, head: usize, p: &mut [f32]) {
        if let Some(key) = self.dropout {
            let first = (b * self.dims.h + head) * self.dims.tq * self.dims.tk;
            simd(
                #[inline(always)]
                |_| key.mask(first, p),
            );
        }
    }

    /// Runs `task` for each item, with `scratch` numbers of its own per thread.
    fn for_each<T: Send>(
        &self,
        tasks: Vec<T>,
        scratch: usize,
        task: impl Fn(&mut [f32], T) + Sync + Send,
    ) {
        if self.dims.work() < 64 * 1024 {
            let mut scratch = vec![0f32; scratch];
            tasks.into_iter().for_each(|t| task(&mut scratch, t));
        } else {
            tasks.into_par_iter().for_each_init(|| vec![0f32; scratch], |s, t| task(s, t));
        }
    }

    fn forward(&self, x: &Inputs<'_>) -> Vec<f32> {
        let Dims { b, tq, tk, h, d, .. } = self.dims;
        let mut y = host::zeros(b * tq * h * d);
        work::read(size_of_val(x.k) + size_of_val(x.v));
        if tk == 0 {
            return y;
        }
        let tasks = blocks(&mut y, tq, h * d, d);
        self.for_each(tasks, tq * tk, |p, (b, head, out)| {
            self.probabilities(x, b, head, p);
            self.drop_out(b, head, p);
            let v = self.kv(x.v, b, head);
            product(out, Finish::REPLACE, gemm::rows(p, tq, tk), v, Threads::One);
        });
        y
    }

    /// Gradients of q, k, v as far as `want`ed (empty otherwise).
    fn backward(&self, x: &Inputs<'_>, dy: &[f32], want: [bool; 3]) -> [Vec<f32>; 3] {
        let Dims { b, tq, tk, h, kv, d } = self.dims;
        let group = self.dims.group();
        let size = |want: bool, n: usize| host::zeros(if want { n } else { 0 });
        let mut dq = size(want[0], b * tq * h * d);
        let mut dk = size(want[1], b * tk * kv * d);
        let mut dv = size(want[2], b * tk * kv * d);
        if self.dims.work() == 0 {
            return [dq, dk, dv];
        }

        // One task per key head: the query heads of its group add to the same dk and dv.
        let mut q_blocks = blocks(&mut dq, tq, h * d, group * d).into_iter();
        let mut k_blocks = blocks(&mut dk, tk, kv * d, d).into_iter();
        let mut v_blocks = blocks(&mut dv, tk, kv * d, d).into_iter();
        let tasks: Vec<_> = (0..b * kv)
            .map(|i| (i / kv, i % kv, q_blocks.next(), k_blocks.next(), v_blocks.next()))
            .collect();
        self.for_each(tasks, 2 * tq * tk, |scratch, (b, kv_head, dq, dk, dv)| {
            let (p, ds) = scratch.split_at_mut(tq * tk);
            let dq = dq.map(|(_, _, dq)| gemm::split_columns(dq, d)).unwrap_or_default();
            let mut dq = dq.into_iter();
            let mut dk = dk.map(|(_, _, dk)| dk);
            let mut dv = dv.map(|(_, _, dv)| dv);
            for head in kv_head * group..(kv_head + 1) * group {
                let dy = self.q(dy, b, head);
                self.probabilities(x, b, head, p);
                if let Some(dv) = &mut dv {
                    ds.copy_from_slice(p);
                    self.drop_out(b, head, ds);
                    let kept = gemm::rows(ds, tq, tk).transpose();
                    product(dv.as_mut(), Finish::ADD, kept, dy, Threads::One);
                }
                if !want[0] && !want[1] {
                    continue;
                }
                let v = self.kv(x.v, b, head).transpose();
                let out = gemm::rows_mut(ds, tq, tk);
                product(out, Finish::REPLACE, dy, v, Threads::One);
                self.drop_out(b, head, ds);
                soft_max_backward(p, ds, tk);
                let ds = gemm::rows(ds, tq, tk);
                if let Some(dq) = dq.next() {
                    let k = self.kv(x.k, b, head);
                    product(dq, Finish::REPLACE.times(self.scale), ds, k, Threads::One);
                }
                if let Some(dk) = &mut dk {
                    let q = self.q(x.q, b, head);
                    let add = Finish::ADD.times(self.scale);
                    product(dk.as_mut(), add, ds.transpose(), q, Threads::One);
                }
            }
        });
        [dq, dk, dv]
    }
}

/// Blocks of `cols` columns of every `(t, width)` matrix in `data`, as (batch, block, view).
fn blocks(
    data: &mut [f32],
    t: usize,
    width: usize,
    cols: usize,
) -> Vec<(usize, usize, RowsMut<'_>)> {
    if data.is_empty() {
        return Vec::new();
    }
    let mut all = Vec::new();
    for (b, matrix) in data.chunks_exact_mut(t * width).enumerate() {
        let views = gemm::split_columns(gemm::rows_mut(matrix, t, width), cols);
        all.extend(views.into_iter().enumerate().map(|(i, view)| (b, i, view)));
    }
    all
}

/// Adds what a [`Bias`] of these values and strides holds for `[batch, head, query]`.
#[inline(always)]
pub(crate) fn add_bias(bias: &[f32], strides: [usize; 4], place: [usize; 3], scores: &mut [f32]) {
    let at = place[0] * strides[0] + place[1] * strides[1] + place[2] * strides[2];
    if strides[3] == 0 {
        for score in scores.iter_mut() {
            *score += bias[at];
        }
    } else {
        let along = at..at + scores.len();
        for (score, b) in scores.iter_mut().zip(&bias[along]) {
            *score += b;
        }
    }
}

/// Soft-max of one row in place; a row of only -inf becomes zeros.
#[inline(always)]
pub(crate) fn soft_max(f: Fma, row: &mut [f32]) {
    let top = host::max(row);
    if top == f32::NEG_INFINITY {
        row.fill(0.0);
        return;
    }
    for s in row.iter_mut() {
        *s = host::exp(f, *s - top);
    }
    let scale = 1.0 / host::sum(row);
    for s in row.iter_mut() {
        *s *= scale;
    }
}

/// Turns gradients of probabilities into gradients of scores: `p (dp - Σ p dp)`.
fn soft_max_backward(p: &[f32], dp: &mut [f32], tk: usize) {
    simd(
        #[inline(always)]
        |f| {
            for (p, dp) in p.chunks_exact(tk).zip(dp.chunks_exact_mut(tk)) {
                let along = host::dot(f, p, dp);
                for (dp, p) in dp.iter_mut().zip(p) {
                    *dp = p * (*dp - along);
                }
            }
        },
    );
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let q = host::values(NAME, s1, l1)?;
        let k = host::values(NAME, s2, l2)?;
        let v = host::values(NAME, s3, l3)?;
        let bias = self.bias.as_ref().map(|bias| Host::new(NAME, &bias.values)).transpose()?;
        let y = self.forward(&Inputs { q: &q, k: &k, v: &v, bias: bias.as_deref() });
        Ok((CpuStorage::F32(y), l1.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let want = [q.track_op(), k.track_op(), v.track_op()];
        let [dq, dk, dv] = {
            let (q, k, v) = (Host::new(NAME, q)?, Host::new(NAME, k)?, Host::new(NAME, v)?);
            let bias = self.bias.as_ref().map(|bias| Host::new(NAME, &bias.values)).transpose()?;
            let inputs = Inputs { q: &q, k: &k, v: &v, bias: bias.as_deref() };
            self.backward(&inputs, &Host::new(NAME, grad)?, want)
        };
        let take = |wanted: bool, values: Vec<f32>, like: &Tensor| {
            wanted.then(|| host::tensor(values, like.shape())).transpose()
        };
        Ok((take(want[0], dq, q)?, take(want[1], dk, k)?, take(want[2], dv, v)?))
    }
}

//! Normalisation over the last dimension: `layer_norm`, `rms_norm`, `l2_normalize`.
//!
//! Means and variances are recomputed in the backward pass: reading a row twice is cheaper than
//! keeping them in the graph.

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail,
};
use rayon::prelude::*;

use crate::host::{self, Fma, Host, simd};

const LAYER_NORM: &str = "layer_norm";
const RMS_NORM: &str = "rms_norm";
const L2_NORMALIZE: &str = "l2_normalize";

/// PyTorch's `F.normalize` divides by no less than this.
const L2_FLOOR: f32 = 1e-12;

/// `(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension d; weight and bias `(d)`.
///
/// The variance is the biased one. Gradients of weight and bias are computed only if tracked.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    host::check(LAYER_NORM, &[x, weight, bias])?;
    let d = host::last_dim(LAYER_NORM, x)?;
    if weight.dims() != [d] || bias.dims() != [d] {
        bail!(
            "{LAYER_NORM}: x {:?} does not fit weight {:?} and bias {:?}",
            x.shape(),
            weight.shape(),
            bias.shape()
        );
    }
    x.apply_op3(weight, bias, LayerNorm { eps: eps as f32 })
}

/// `x / sqrt(mean(x²) + eps) * weight` over the last dimension d; weight `(d)`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    host::check(RMS_NORM, &[x, weight])?;
    let d = host::last_dim(RMS_NORM, x)?;
    if weight.dims() != [d] {
        bail!("{RMS_NORM}: x {:?} does not fit weight {:?}", x.shape(), weight.shape());
    }
    x.apply_op2(weight, RmsNorm { eps: eps as f32 })
}

/// `x / max(|x|, 1e-12)` over the last dimension, as PyTorch's `F.normalize`.
pub fn l2_normalize(x: &Tensor) -> Result<Tensor> {
    host::check(L2_NORMALIZE, &[x])?;
    host::last_dim(L2_NORMALIZE, x)?;
    x.apply_op1(L2Normalize)
}

/// Calls `f(first element, rows)` on pieces of whole rows.
fn for_rows(y: &mut [f32], d: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    host::for_pieces(y, host::rows_per_piece(d) * d, f);
}

#[inline(always)]
fn mean_rstd(f: Fma, x: &[f32], eps: f32) -> (f32, f32) {
    let d = x.len() as f32;
    let mean = host::sum(x) / d;
    let var = host::sum_squares(f, x, mean) / d;
    (mean, 1.0 / (var + eps).sqrt())
}

struct LayerNorm {
    eps: f32,
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        LAYER_NORM
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
        let x = host::values(LAYER_NORM, s1, l1)?;
        let w = host::values(LAYER_NORM, s2, l2)?;
        let b = host::values(LAYER_NORM, s3, l3)?;
        let (x, w, b, d, eps) = (&*x, &*w, &*b, w.len(), self.eps);
        let mut y = host::zeros(x.len());
        for_rows(&mut y, d, |start, y| {
            simd(
                #[inline(always)]
                |f| {
                    let x = &x[start..start + y.len()];
                    for (x, y) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)) {
                        let (mean, rstd) = mean_rstd(f, x, eps);
                        for (((y, x), w), b) in y.iter_mut().zip(x).zip(w).zip(b) {
                            *y = (x - mean) * rstd * w + b;
                        }
                    }
                },
            );
        });
        Ok((CpuStorage::F32(y), l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let eps = self.eps;
        let (dx, sums) = norm_backward(
            LAYER_NORM,
            x,
            weight,
            grad,
            [weight.track_op(), bias.track_op()],
            #[inline(always)]
            |f, x| mean_rstd(f, x, eps),
            true,
        )?;
        let [dw, db] = sums;
        Ok((dx, dw, db))
    }
}

struct RmsNorm {
    eps: f32,
}

#[inline(always)]
fn rms_rstd(f: Fma, x: &[f32], eps: f32) -> f32 {
    1.0 / (host::dot(f, x, x) / x.len() as f32 + eps).sqrt()
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        RMS_NORM
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = host::values(RMS_NORM, s1, l1)?;
        let w = host::values(RMS_NORM, s2, l2)?;
        let (x, w, d, eps) = (&*x, &*w, w.len(), self.eps);
        let mut y = host::zeros(x.len());
        for_rows(&mut y, d, |start, y| {
            simd(
                #[inline(always)]
                |f| {
                    let x = &x[start..start + y.len()];
                    for (x, y) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)) {
                        let rstd = rms_rstd(f, x, eps);
                        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                            *y = x * rstd * w;
                        }
                    }
                },
            );
        });
        Ok((CpuStorage::F32(y), l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let eps = self.eps;
        let (dx, [dw, _]) = norm_backward(
            RMS_NORM,
            x,
            weight,
            grad,
            [weight.track_op(), false],
            #[inline(always)]
            |f, x| (0.0, rms_rstd(f, x, eps)),
            false,
        )?;
        Ok((dx, dw))
    }
}

/// Gradients of x, weight and bias of a norm `y = x̂ w + b`, `x̂ = (x - mean) rstd`.
///
/// With g = dy·w: dx = rstd (g - [mean(g)] - x̂ mean(g x̂)), the bracket for centred norms only.
/// Sums for weight and bias are taken per piece of rows and added in the order of the pieces.
fn norm_backward(
    op: &str,
    x: &Tensor,
    weight: &Tensor,
    grad: &Tensor,
    want: [bool; 2],
    stats: impl Fn(Fma, &[f32]) -> (f32, f32) + Sync,
    centred: bool,
) -> Result<(Option<Tensor>, [Option<Tensor>; 2])> {
    let (xs, ws, gs) = (Host::new(op, x)?, Host::new(op, weight)?, Host::new(op, grad)?);
    let (xs, ws, gs, d) = (&*xs, &*ws, &*gs, weight.elem_count());
    let want_dx = x.track_op();
    let want_sums = want[0] || want[1];
    let piece = host::rows_per_piece(d) * d;
    let mut dx = host::zeros(if want_dx { xs.len() } else { 0 });
    let mut sums = vec![0f32; if want_sums { xs.len().div_ceil(piece.max(1)) * 2 * d } else { 0 }];

    let kernel = |start: usize, mut dx: &mut [f32], sums: &mut [f32]| {
        simd(
            #[inline(always)]
            |f| {
                let len = piece.min(xs.len() - start);
                let (xs, gs) = (&xs[start..start + len], &gs[start..start + len]);
                for (x, g) in xs.chunks_exact(d).zip(gs.chunks_exact(d)) {
                    let (mean, rstd) = stats(f, x);
                    if want_sums {
                        let (dw, db) = sums.split_at_mut(d);
                        for (((dw, db), x), g) in dw.iter_mut().zip(db).zip(x).zip(g) {
                            *dw += g * ((x - mean) * rstd);
                            *db += g;
                        }
                    }
                    if want_dx {
                        let (row, rest) = std::mem::take(&mut dx).split_at_mut(d);
                        dx = rest;
                        for ((r, g), w) in row.iter_mut().zip(g).zip(ws) {
                            *r = g * w;
                        }
                        let mean_g = if centred { host::sum(row) / d as f32 } else { 0.0 };
                        let along = host::dot_centred(f, x, mean, row) * rstd / d as f32;
                        let (a, b) = (along * rstd * rstd, mean_g * rstd);
                        for (r, x) in row.iter_mut().zip(x) {
                            *r = *r * rstd - (x - mean) * a - b;
                        }
                    }
                }
            },
        );
    };
    let pieces = xs.len().div_ceil(piece.max(1));
    if pieces <= 1 {
        if pieces == 1 {
            kernel(0, &mut dx, &mut sums);
        }
    } else {
        let mut dx_pieces: Vec<&mut [f32]> = dx.chunks_mut(piece).collect();
        dx_pieces.resize_with(pieces, Default::default);
        let mut sum_pieces: Vec<&mut [f32]> = sums.chunks_mut(2 * d).collect();
        sum_pieces.resize_with(pieces, Default::default);
        dx_pieces
            .into_par_iter()
            .zip(sum_pieces)
            .enumerate()
            .for_each(|(i, (dx, sums))| kernel(i * piece, dx, sums));
    }

    let total = host::column_sums(&sums, 2 * d);
    let take = |wanted: bool, from: usize| {
        wanted.then(|| host::tensor(total[from..from + d].to_vec(), d)).transpose()
    };
    let (dw, db) = (take(want[0], 0)?, take(want[1], d)?);
    let dx = want_dx.then(|| host::tensor(dx, x.shape())).transpose()?;
    Ok((dx, [dw, db]))
}

struct L2Normalize;

impl CustomOp1 for L2Normalize {
    fn name(&self) -> &'static str {
        L2_NORMALIZE
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = host::values(L2_NORMALIZE, storage, layout)?;
        let (x, d) = (&*x, layout.dims()[layout.dims().len() - 1]);
        let mut y = host::zeros(x.len());
        for_rows(&mut y, d, |start, y| {
            simd(
                #[inline(always)]
                |f| {
                    let x = &x[start..start + y.len()];
                    for (x, y) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)) {
                        let norm = host::dot(f, x, x).sqrt().max(L2_FLOOR);
                        for (y, x) in y.iter_mut().zip(x) {
                            *y = x / norm;
                        }
                    }
                },
            );
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (xs, gs) = (Host::new(L2_NORMALIZE, x)?, Host::new(L2_NORMALIZE, grad)?);
        let (xs, gs, d) = (&*xs, &*gs, host::last_dim(L2_NORMALIZE, x)?);
        let mut dx = host::zeros(xs.len());
        for_rows(&mut dx, d, |start, dx| {
            simd(
                #[inline(always)]
                |f| {
                    let end = start + dx.len();
                    let (xs, gs) = (&xs[start..end], &gs[start..end]);
                    let rows = xs.chunks_exact(d).zip(gs.chunks_exact(d));
                    for ((x, g), dx) in rows.zip(dx.chunks_exact_mut(d)) {
                        let norm = host::dot(f, x, x).sqrt();
                        // Below the floor the divisor is a constant.
                        let along =
                            if norm > L2_FLOOR { host::dot(f, x, g) / (norm * norm) } else { 0.0 };
                        let norm = norm.max(L2_FLOOR);
                        for ((dx, x), g) in dx.iter_mut().zip(x).zip(g) {
                            *dx = (g - x * along) / norm;
                        }
                    }
                },
            );
        });
        Ok(Some(host::tensor(dx, x.shape())?))
    }
}

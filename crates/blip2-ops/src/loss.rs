//! Losses over classes: `cross_entropy` (hard targets) and `soft_cross_entropy` (distributions).
//!
//! The soft-max is never stored: the forward pass keeps one number per row, its log-sum-exp, and
//! the backward pass makes the gradient from the logits in one sweep.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::host::{self, Fma, Host, simd};

const HARD: &str = "cross_entropy";
const SOFT: &str = "soft_cross_entropy";

/// The target of a row that does not count.
pub const IGNORE: u32 = u32::MAX;

/// Mean over the rows that are not [`IGNORE`]d of the cross-entropy of `logits (n, c)` → scalar.
///
/// With smoothing e the target is `1 - e` on the class plus `e / c` on every class, as in PyTorch.
/// Errors: a target outside `0..c`, no row that counts, smoothing outside `[0, 1]`.
pub fn cross_entropy(logits: &Tensor, targets: &[u32], label_smoothing: f32) -> Result<Tensor> {
    let (n, c) = dims(HARD, logits)?;
    if targets.len() != n {
        bail!("{HARD}: {} targets for logits {:?}", targets.len(), logits.shape());
    }
    if !(0.0..=1.0).contains(&label_smoothing) {
        bail!("{HARD}: label smoothing {label_smoothing} is not in [0, 1]");
    }
    let outside = |t: &u32| *t != IGNORE && *t as usize >= c;
    if let Some(row) = targets.iter().position(outside) {
        bail!("{HARD}: target {} of row {row} is not one of {c} classes", targets[row]);
    }
    let valid = targets.iter().filter(|&&t| t != IGNORE).count();
    if valid == 0 {
        bail!("{HARD}: no row counts: all {n} targets are IGNORE");
    }
    let targets = Targets::Hard { classes: targets.to_vec(), smoothing: label_smoothing };
    logits.apply_op1(CrossEntropy { name: HARD, targets, valid, log_sums: OnceLock::new() })
}

/// Mean over rows of `-Σ targets · log_softmax(logits)`, both `(n, c)` → scalar.
///
/// Targets are constants: no gradient goes to them. Errors: shapes that differ, no rows.
pub fn soft_cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (n, _) = dims(SOFT, logits)?;
    host::check(SOFT, &[targets])?;
    if targets.dims() != logits.dims() {
        bail!("{SOFT}: logits {:?} and targets {:?} differ", logits.shape(), targets.shape());
    }
    if n == 0 {
        bail!("{SOFT}: no rows: logits {:?}", logits.shape());
    }
    let targets = Targets::Soft(targets.detach());
    logits.apply_op1(CrossEntropy { name: SOFT, targets, valid: n, log_sums: OnceLock::new() })
}

fn dims(op: &str, logits: &Tensor) -> Result<(usize, usize)> {
    host::check(op, &[logits])?;
    match logits.dims() {
        &[n, c] => Ok((n, c)),
        _ => bail!("{op}: logits {:?} are not (n, c)", logits.shape()),
    }
}

enum Targets {
    Hard { classes: Vec<u32>, smoothing: f32 },
    Soft(Tensor),
}

struct CrossEntropy {
    name: &'static str,
    targets: Targets,
    valid: usize,
    log_sums: OnceLock<Vec<f32>>,
}

/// `ln Σ exp(x)`; -∞ of nothing.
#[must_use]
pub fn log_sum_exp(x: &[f32]) -> f32 {
    simd(
        #[inline(always)]
        |f| log_sum_exp_with(f, x),
    )
}

/// Partial sums of a thousand terms in f32, their sum in f64: a vocabulary is long.
#[inline(always)]
fn log_sum_exp_with(f: Fma, x: &[f32]) -> f32 {
    let top = host::max(x);
    if top == f32::NEG_INFINITY {
        return top;
    }
    let mut sum = 0f64;
    for x in x.chunks(1024) {
        sum += f64::from(host::sum_exp(f, x, top));
    }
    top + sum.ln() as f32
}

impl CrossEntropy {
    /// (log-sum-exp, loss) of each row.
    fn rows(&self, x: &[f32], n: usize, c: usize) -> Result<Vec<(f32, f32)>> {
        let soft = match &self.targets {
            Targets::Soft(t) => Some(Host::new(self.name, t)?),
            Targets::Hard { .. } => None,
        };
        let soft = soft.as_deref();
        let row = |i: usize| {
            simd(
                #[inline(always)]
                |f| {
                    let x = &x[i * c..(i + 1) * c];
                    match (&self.targets, soft) {
                        (Targets::Hard { classes, smoothing }, _) => {
                            if classes[i] == IGNORE {
                                return (0.0, 0.0);
                            }
                            let lse = log_sum_exp_with(f, x);
                            let mut loss = lse - x[classes[i] as usize];
                            if *smoothing > 0.0 {
                                let even = lse - host::sum(x) / c as f32;
                                loss = (1.0 - smoothing) * loss + smoothing * even;
                            }
                            (lse, loss)
                        }
                        (Targets::Soft(_), soft) => {
                            let t = soft.map_or(&[][..], |t| &t[i * c..(i + 1) * c]);
                            let lse = log_sum_exp_with(f, x);
                            // -Σ t (x - lse)
                            (lse, -host::dot_centred(f, x, lse, t))
                        }
                    }
                },
            )
        };
        Ok((0..n).into_par_iter().with_min_len(host::rows_per_piece(c)).map(row).collect())
    }
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = host::values(self.name, storage, layout)?;
        let (n, c) = layout.shape().dims2()?;
        let rows = self.rows(&x, n, c)?;
        let total: f64 = rows.iter().map(|&(_, loss)| f64::from(loss)).sum();
        let _ = self.log_sums.set(rows.into_iter().map(|(lse, _)| lse).collect());
        Ok((CpuStorage::F32(vec![(total / self.valid as f64) as f32]), Shape::from(())))
    }

    fn bwd(&self, logits: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let x = Host::new(self.name, logits)?;
        let (x, (_, c)) = (&*x, logits.dims2()?);
        let scale = grad.to_scalar::<f32>()? / self.valid as f32;
        let Some(log_sums) = self.log_sums.get() else {
            bail!("{}: backward before forward", self.name);
        };
        let soft = match &self.targets {
            Targets::Soft(t) => Some(Host::new(self.name, t)?),
            Targets::Hard { .. } => None,
        };
        let soft = soft.as_deref();
        let mut dx = host::zeros(x.len());
        host::for_pieces(&mut dx, host::rows_per_piece(c) * c, |start, dx| {
            simd(
                #[inline(always)]
                |f| {
                    for (r, dx) in dx.chunks_exact_mut(c).enumerate() {
                        let i = start / c + r;
                        let (x, lse) = (&x[i * c..(i + 1) * c], log_sums[i]);
                        match (&self.targets, soft) {
                            (Targets::Hard { classes, smoothing }, _) => {
                                if classes[i] == IGNORE {
                                    continue;
                                }
                                let even = smoothing / c as f32;
                                for (d, x) in dx.iter_mut().zip(x) {
                                    *d = (host::exp(f, x - lse) - even) * scale;
                                }
                                dx[classes[i] as usize] -= (1.0 - smoothing) * scale;
                            }
                            (Targets::Soft(_), soft) => {
                                let t = soft.map_or(&[][..], |t| &t[i * c..(i + 1) * c]);
                                let mass = host::sum(t);
                                for ((d, x), t) in dx.iter_mut().zip(x).zip(t) {
                                    *d = (host::exp(f, x - lse) * mass - t) * scale;
                                }
                            }
                        }
                    }
                },
            );
        });
        Ok(Some(host::tensor(dx, logits.shape())?))
    }
}

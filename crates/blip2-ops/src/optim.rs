//! `adamw_step`: one pass over parameter, gradient and both moments, updating in place.
//!
//! Not an optimiser: which parameters, what learning rate, and when, is the trainer's business.

use std::cell::RefCell;

use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Tensor, bail};
use rayon::prelude::*;

use crate::host::{self, GRAIN, Host, simd};

const NAME: &str = "adamw_step";

/// The numbers of one AdamW step, as in `torch.optim.AdamW`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step and parameter group.
    pub lr: f64,
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the root of the mean of squares.
    pub eps: f64,
    /// Decoupled: the parameter shrinks by `lr * weight_decay` first.
    pub weight_decay: f64,
    /// Number of this step, counted from 1.
    pub step: u64,
    /// The gradient is multiplied by this first (clipping, averaging); 1 leaves it alone.
    pub grad_scale: f32,
}

/// Updates `param` (a contiguous `Var`) and its moments `m`, `v` from `grad`.
///
/// Errors: sizes that differ, a parameter that is strided or not f32 on the CPU, step 0.
pub fn adamw_step(
    param: &Tensor,
    grad: &Tensor,
    m: &mut [f32],
    v: &mut [f32],
    numbers: &AdamW,
) -> Result<()> {
    host::check(NAME, &[param, grad])?;
    let n = param.elem_count();
    if grad.dims() != param.dims() || m.len() != n || v.len() != n {
        bail!(
            "{NAME}: parameter {:?}, gradient {:?}, moments of {} and {} elements do not fit",
            param.shape(),
            grad.shape(),
            m.len(),
            v.len()
        );
    }
    if numbers.step == 0 {
        bail!("{NAME}: steps are counted from 1");
    }
    // Gathered here if strided, so that the kernel sees slices only.
    let grad = grad.contiguous()?;
    param.inplace_op2(&grad, &Step { numbers: *numbers, moments: RefCell::new((m, v)) })
}

/// Sum of squares of all elements of `x`, in f64 and in a fixed order (for gradient norms).
pub fn sum_of_squares(x: &Tensor) -> Result<f64> {
    let x = Host::new("sum_of_squares", x)?;
    let partial: Vec<f32> = x
        .par_chunks(GRAIN)
        .map(|x| {
            simd(
                #[inline(always)]
                |f| host::dot(f, x, x),
            )
        })
        .collect();
    Ok(partial.iter().map(|&p| f64::from(p)).sum())
}

struct Step<'a> {
    numbers: AdamW,
    moments: RefCell<(&'a mut [f32], &'a mut [f32])>,
}

impl InplaceOp2 for Step<'_> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        param: &mut CpuStorage,
        layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<()> {
        let g = host::values(NAME, grad, grad_layout)?;
        let CpuStorage::F32(all) = param else {
            bail!("{NAME}: works on f32 parameters only");
        };
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("{NAME}: the parameter {:?} must be contiguous", layout.shape());
        };
        let p = &mut all[start..end];
        let mut moments = self.moments.borrow_mut();
        let (m, v) = &mut *moments;

        let a = &self.numbers;
        let correction1 = 1.0 - a.beta1.powf(a.step as f64);
        let correction2 = 1.0 - a.beta2.powf(a.step as f64);
        let keep = (1.0 - a.lr * a.weight_decay) as f32;
        let step_size = (a.lr / correction1) as f32;
        let root = correction2.sqrt() as f32;
        let (b1, b2, eps) = (a.beta1 as f32, a.beta2 as f32, a.eps as f32);
        let (c1, c2) = ((1.0 - a.beta1) as f32, (1.0 - a.beta2) as f32);
        let scale = a.grad_scale;
        p.par_chunks_mut(GRAIN)
            .zip(m.par_chunks_mut(GRAIN))
            .zip(v.par_chunks_mut(GRAIN))
            .zip(g.par_chunks(GRAIN))
            .for_each(|(((p, m), v), g)| {
                simd(
                    #[inline(always)]
                    |_| {
                        for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(g) {
                            let g = g * scale;
                            *m = b1 * *m + c1 * g;
                            *v = b2 * *v + c2 * g * g;
                            *p = *p * keep - step_size * *m / (v.sqrt() / root + eps);
                        }
                    },
                );
            });
        Ok(())
    }
}

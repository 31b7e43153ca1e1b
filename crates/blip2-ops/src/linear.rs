//! `linear`: x (…, in) times a trained weight (out, in), plus bias (out).

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};

use crate::gemm::{self, Finish, Threads, product};
use crate::gradients;
use crate::host::{self, Host};
use crate::work;

const NAME: &str = "linear";

/// `x (…, in) · weightᵀ (in, out) + bias (out)` → `(…, out)`.
///
/// Gradients go to each argument that is tracked. Errors: shapes that do not fit, other types than
/// f32 on the CPU.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    host::check(NAME, &[x, weight])?;
    if weight.rank() != 2 || x.dims().last() != weight.dims().last() {
        bail!("{NAME}: x {:?} does not fit weight {:?} (out, in)", x.shape(), weight.shape());
    }
    match bias {
        None => x.apply_op2(weight, Linear),
        Some(bias) => {
            check_bias(NAME, bias, weight.dims()[0])?;
            x.apply_op3(weight, bias, Linear)
        }
    }
}

/// Refuses a bias that is not `(out)`.
pub(crate) fn check_bias(op: &str, bias: &Tensor, out: usize) -> Result<()> {
    host::check(op, &[bias])?;
    if bias.dims() != [out] {
        bail!("{op}: bias {:?} does not fit {out} outputs", bias.shape());
    }
    Ok(())
}

/// The shape `(…, out)` of `x (…, in)` after a linear map.
pub(crate) fn out_shape(x: &Shape, out: usize) -> Shape {
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = out;
    }
    Shape::from(dims)
}

struct Linear;

impl Linear {
    fn forward(
        &self,
        x: &[f32],
        w: &[f32],
        bias: Option<&[f32]>,
        d_out: usize,
        n: usize,
    ) -> Vec<f32> {
        let d_in = w.len().checked_div(d_out).unwrap_or(0);
        work::read(size_of_val(w));
        let mut y = host::zeros(n * d_out);
        let (x, w) = (gemm::rows(x, n, d_in), gemm::rows(w, d_out, d_in));
        let finish = Finish { bias, ..Finish::REPLACE };
        product(gemm::rows_mut(&mut y, n, d_out), finish, x, w.transpose(), Threads::All);
        y
    }

    fn backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (d_out, d_in) = weight.dims2()?;
        let n: usize = x.dims()[..x.rank() - 1].iter().product();
        let dy = Host::new(NAME, grad)?;
        let dy = gemm::rows(&dy, n, d_out);
        let dx = if x.track_op() {
            let w = Host::new(NAME, weight)?;
            let mut dx = host::zeros(n * d_in);
            let out = gemm::rows_mut(&mut dx, n, d_in);
            product(out, Finish::REPLACE, dy, gemm::rows(&w, d_out, d_in), Threads::All);
            Some(host::tensor(dx, x.shape())?)
        } else {
            None
        };
        let dw = if weight.track_op() {
            let x = Host::new(NAME, x)?;
            gradients::of_weight(weight, |dw, output, share| {
                let out = gemm::rows_mut(dw, d_out, d_in);
                let x = gemm::rows(&x, n, d_in);
                let finish = Finish { output, alpha: share, bias: None };
                product(out, finish, dy.transpose(), x, Threads::All);
            })?
        } else {
            None
        };
        Ok((dx, dw))
    }
}

fn rows_of(shape: &Shape) -> usize {
    shape.dims()[..shape.rank() - 1].iter().product()
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (host::values(NAME, s1, l1)?, host::values(NAME, s2, l2)?);
        let d_out = l2.dims()[0];
        let y = self.forward(&x, &w, None, d_out, rows_of(l1.shape()));
        Ok((CpuStorage::F32(y), out_shape(l1.shape(), d_out)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        self.backward(x, weight, grad)
    }
}

impl CustomOp3 for Linear {
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
        let (x, w) = (host::values(NAME, s1, l1)?, host::values(NAME, s2, l2)?);
        let bias = host::values(NAME, s3, l3)?;
        let d_out = l2.dims()[0];
        let y = self.forward(&x, &w, Some(&bias), d_out, rows_of(l1.shape()));
        Ok((CpuStorage::F32(y), out_shape(l1.shape(), d_out)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (dx, dw) = self.backward(x, weight, grad)?;
        let db = if bias.track_op() {
            let d_out = bias.elem_count();
            Some(host::tensor(host::column_sums(&Host::new(NAME, grad)?, d_out), d_out)?)
        } else {
            None
        };
        Ok((dx, dw, db))
    }
}

//! What the program needs of a group of processes, and a gather that gradients flow through.
//!
//! Only the single process is here; NCCL and MPI will implement the same trait.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use crate::host;

const NAME: &str = "all_gather";

/// A group of processes that all call the same methods in the same order.
pub trait Communicator: Send + Sync {
    /// The number of this process, `0..world()`.
    fn rank(&self) -> usize;
    /// How many processes there are.
    fn world(&self) -> usize;
    /// The tensors of all ranks (equal shapes), concatenated along dimension 0 in rank order.
    fn all_gather(&self, x: &Tensor) -> Result<Tensor>;
    /// The element-wise sum over ranks, added in rank order.
    fn all_reduce_sum(&self, x: &Tensor) -> Result<Tensor>;
}

/// The group of one.
#[derive(Clone, Copy, Debug, Default)]
pub struct SingleProcess;

impl Communicator for SingleProcess {
    fn rank(&self) -> usize {
        0
    }

    fn world(&self) -> usize {
        1
    }

    fn all_gather(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.clone())
    }

    fn all_reduce_sum(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.clone())
    }
}

/// `x (n, …)` of every rank → `(world*n, …)`.
///
/// Backward: every rank's gradient of the gathered tensor is summed over ranks, and each takes its
/// own slice. Forward and backward are collective calls.
pub fn all_gather(x: &Tensor, comm: &Arc<dyn Communicator>) -> Result<Tensor> {
    host::check(NAME, &[x])?;
    if x.rank() == 0 {
        bail!("{NAME}: needs at least one dimension, got a scalar");
    }
    x.apply_op1(AllGather { comm: Arc::clone(comm) })
}

struct AllGather {
    comm: Arc<dyn Communicator>,
}

impl CustomOp1 for AllGather {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let own = host::values(NAME, storage, layout)?.into_owned();
        let all = self.comm.all_gather(&host::tensor(own, layout.shape())?)?;
        let mut dims = layout.dims().to_vec();
        dims[0] *= self.comm.world();
        if all.dims() != dims {
            bail!("{NAME}: gathered {:?} where {dims:?} was expected", all.shape());
        }
        Ok((CpuStorage::F32(host::Host::new(NAME, &all)?.to_vec()), Shape::from(dims)))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let n = x.dims()[0];
        let total = self.comm.all_reduce_sum(&grad.contiguous()?)?;
        Ok(Some(total.narrow(0, self.comm.rank() * n, n)?.contiguous()?))
    }
}

//! `embedding`: rows of a trained table. (Rows of a frozen one: `FrozenWeight::rows`.)

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};

use crate::gemm::Output;
use crate::gradients;
use crate::host::{self, Host};

const NAME: &str = "embedding";

/// Rows `ids` (u32, any shape) of `table (vocab, d)` → `(ids…, d)`.
///
/// The gradient is a dense `(vocab, d)` table, or added to one ([`crate::FlatGradients`]). Errors: an id outside the table, ids not u32.
pub fn embedding(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    host::check(NAME, &[table])?;
    if table.rank() != 2 {
        bail!("{NAME}: table {:?} is not (vocab, d)", table.shape());
    }
    if ids.dtype() != DType::U32 {
        bail!("{NAME}: ids must be u32, got {:?} of shape {:?}", ids.dtype(), ids.shape());
    }
    let (vocab, d) = table.dims2()?;
    let mut shape = ids.dims().to_vec();
    shape.push(d);
    let ids = ids.flatten_all()?.to_vec1::<u32>()?;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        bail!("{NAME}: id {id} is outside the table of {vocab} rows");
    }
    table.apply_op1(Embedding { ids, shape: Shape::from(shape) })
}

struct Embedding {
    ids: Vec<u32>,
    shape: Shape,
}

impl CustomOp1 for Embedding {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let table = host::values(NAME, storage, layout)?;
        let d = layout.dims()[1];
        let mut y = Vec::with_capacity(self.ids.len() * d);
        for &id in &self.ids {
            let at = id as usize * d;
            y.extend_from_slice(&table[at..at + d]);
        }
        Ok((CpuStorage::F32(y), self.shape.clone()))
    }

    fn bwd(&self, table: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let g = Host::new(NAME, grad)?;
        let d = table.dims()[1];
        gradients::of_weight(table, |sums, output, share| {
            if matches!(output, Output::Replace) {
                sums.fill(0.0);
            }
            // In the order of the ids: the same sum whatever the threads do.
            for (i, &id) in self.ids.iter().enumerate() {
                let row = &mut sums[id as usize * d..][..d];
                for (r, g) in row.iter_mut().zip(&g[i * d..][..d]) {
                    *r += share * g;
                }
            }
        })
    }
}

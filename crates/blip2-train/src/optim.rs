//! AdamW with the reference's parameter groups, and the flat gradient it works on.
//!
//! Everything lies flat, in the order of the parameters' names: one gradient buffer (one bucket for all ranks, one
//! pass for the norm) and the two averages. Weight decay acts on every parameter except vectors and biases; the learned
//! queries (3 dimensions) and the temperature (none) do decay, as in the reference. The state is open, so a run can be
//! resumed to the bit. It knows no schedule: the caller brings the learning rate.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use blip2::params::ParamStore;
use blip2_ops::Communicator;
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Storage, Tensor};
use rayon::prelude::*;

use crate::{Error, Result};

/// Elements per parallel piece; fixed, so that sums do not depend on the number of threads.
const PIECE: usize = 1 << 15;

/// Whether weight decay acts on the parameter `name` with dimensions `dims`.
#[must_use]
pub fn decays(name: &str, dims: &[usize]) -> bool {
    dims.len() != 1 && name != "bias" && !name.ends_with(".bias")
}

/// Where one parameter lies in the flat buffers.
#[derive(Debug, Clone)]
struct Slot {
    name: String,
    dims: Vec<usize>,
    start: usize,
    len: usize,
}

fn slots(params: &ParamStore) -> Vec<Slot> {
    let mut start = 0;
    let slot = |(name, var): (&str, &candle_core::Var)| {
        let len = var.elem_count();
        start += len;
        Slot { name: name.to_owned(), dims: var.dims().to_vec(), start: start - len, len }
    };
    params.vars().map(slot).collect()
}

/// The gradients of all parameters in one flat buffer, summed over micro-batches and ranks.
#[derive(Debug)]
pub struct Gradients {
    slots: Vec<Slot>,
    /// The gradients, then the loss: it travels with them, so that all ranks judge the same number.
    flat: Vec<f32>,
}

impl Gradients {
    /// Zeros.
    #[must_use]
    pub fn new(params: &ParamStore) -> Self {
        let slots = slots(params);
        let flat = vec![0.0; slots.iter().map(|slot| slot.len).sum::<usize>() + 1];
        Self { slots, flat }
    }

    /// Back to zeros.
    pub fn clear(&mut self) {
        self.flat.fill(0.0);
    }

    /// Adds `share` of a micro-batch: its `loss` and the gradients that its backward pass left in `grads`.
    ///
    /// # Errors
    /// If a parameter got no gradient: it would silently stay untrained.
    pub fn add(
        &mut self,
        params: &ParamStore,
        grads: &GradStore,
        loss: f32,
        share: f32,
    ) -> Result<()> {
        for (slot, (name, var)) in self.slots.iter().zip(params.vars()) {
            let grad = grads.get(var).ok_or_else(|| {
                Error::Training(format!("the trained parameter {name} got no gradient"))
            })?;
            let grad = grad.contiguous()?;
            let (storage, layout) = grad.storage_and_layout();
            let Storage::Cpu(storage) = &*storage else {
                return Err(Error::Training("gradients must be on the CPU".into()));
            };
            let from = &storage.as_slice::<f32>()?[layout.start_offset()..][..slot.len];
            let into = &mut self.flat[slot.start..slot.start + slot.len];
            into.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE)).for_each(|(into, from)| {
                for (a, b) in into.iter_mut().zip(from) {
                    *a += share * b;
                }
            });
        }
        self.add_loss(loss, share);
        Ok(())
    }

    /// Adds only a loss: of a micro-batch that was not finite and has no backward pass.
    pub fn add_loss(&mut self, loss: f32, share: f32) {
        if let Some(last) = self.flat.last_mut() {
            *last += share * loss;
        }
    }

    /// Averages over all ranks: one message for everything.
    ///
    /// # Errors
    /// If the ranks can't reach each other.
    pub fn average(&mut self, ranks: &Arc<dyn Communicator>) -> Result<()> {
        let world = ranks.world();
        if world > 1 {
            let bucket = Tensor::from_slice(&self.flat, self.flat.len(), &Device::Cpu)?;
            self.flat = (ranks.all_reduce_sum(&bucket)? / world as f64)?.to_vec1()?;
        }
        Ok(())
    }

    /// The averaged loss.
    #[must_use]
    pub fn loss(&self) -> f32 {
        self.flat.last().copied().unwrap_or(f32::NAN)
    }

    /// The global norm of the gradients. Not finite if any gradient is not.
    #[must_use]
    pub fn norm(&self) -> f64 {
        let sums: Vec<f64> = self
            .grads()
            .par_chunks(PIECE)
            .map(|piece| piece.iter().map(|&g| f64::from(g) * f64::from(g)).sum())
            .collect();
        sums.iter().sum::<f64>().sqrt()
    }

    /// The flat gradients, in the order of the parameters' names.
    #[must_use]
    pub fn grads(&self) -> &[f32] {
        &self.flat[..self.flat.len() - 1]
    }
}

/// The factor that brings a gradient of norm `norm` down to `clip`; 1 if it is below, or if `clip` is 0 (none).
#[must_use]
pub fn clip_factor(norm: f64, clip: f64) -> f32 {
    // PyTorch's clip_grad_norm_ has the same 1e-6.
    if clip > 0.0 { (clip / (norm + 1e-6)).min(1.0) as f32 } else { 1.0 }
}

/// AdamW's numbers, apart from the learning rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the averages of the gradient and of its square.
    pub betas: [f64; 2],
    /// Added to the root of the squares' average.
    pub eps: f64,
    /// Weight decay, decoupled from the gradient.
    pub weight_decay: f64,
}

/// AdamW (Loshchilov and Hutter, 2019), equal to PyTorch's.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    slots: Vec<Slot>,
    m: Vec<f32>,
    v: Vec<f32>,
    steps: u64,
}

impl AdamW {
    /// A fresh optimiser for `params`.
    #[must_use]
    pub fn new(params: &ParamStore, config: AdamWConfig) -> Self {
        let slots = slots(params);
        let len = slots.iter().map(|slot| slot.len).sum();
        Self { config, slots, m: vec![0.0; len], v: vec![0.0; len], steps: 0 }
    }

    /// Updates made so far.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// One update of every parameter with learning rate `lr`; the gradients are multiplied by `scale` on the way.
    ///
    /// # Errors
    /// If `params` is not what this optimiser was made for.
    pub fn step(
        &mut self,
        params: &ParamStore,
        gradients: &Gradients,
        lr: f64,
        scale: f32,
    ) -> Result<()> {
        self.steps += 1;
        let grads = gradients.grads();
        let (mut m, mut v) = (self.m.as_mut_slice(), self.v.as_mut_slice());
        for (slot, (name, var)) in self.slots.iter().zip(params.vars()) {
            if slot.name != name || slot.dims != var.dims() {
                return Err(Error::Training(format!(
                    "the optimiser was made for {} {:?}, not for {name} {:?}",
                    slot.name,
                    slot.dims,
                    var.dims()
                )));
            }
            let (m_here, m_rest) = m.split_at_mut(slot.len);
            let (v_here, v_rest) = v.split_at_mut(slot.len);
            (m, v) = (m_rest, v_rest);
            let decay = if decays(name, &slot.dims) { self.config.weight_decay } else { 0.0 };
            let update = Update {
                grads: &grads[slot.start..slot.start + slot.len],
                averages: RefCell::new((m_here, v_here)),
                numbers: Numbers::new(&self.config, lr, decay, scale, self.steps),
            };
            var.as_tensor().inplace_op1(&update)?;
        }
        Ok(())
    }

    /// The averages as tensors `m.NAME` and `v.NAME`, for a checkpoint.
    ///
    /// # Errors
    /// Only if memory can't be had.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for (key, flat) in [("m", &self.m), ("v", &self.v)] {
            for slot in &self.slots {
                let values = &flat[slot.start..slot.start + slot.len];
                let tensor = Tensor::from_slice(values, slot.dims.as_slice(), &Device::Cpu)?;
                state.insert(format!("{key}.{}", slot.name), tensor);
            }
        }
        Ok(state)
    }

    /// Goes on from a checkpoint's [`AdamW::state`] after `steps` updates.
    ///
    /// # Errors
    /// If a tensor is missing, unknown or has another shape.
    pub fn restore(&mut self, state: &BTreeMap<String, Tensor>, steps: u64) -> Result<()> {
        if state.len() != 2 * self.slots.len() {
            return Err(Error::Checkpoint(format!(
                "the optimiser's state has {} tensors, expected {}",
                state.len(),
                2 * self.slots.len()
            )));
        }
        for (key, flat) in [("m", &mut self.m), ("v", &mut self.v)] {
            for slot in &self.slots {
                let name = format!("{key}.{}", slot.name);
                let tensor = state.get(&name).ok_or_else(|| {
                    Error::Checkpoint(format!("the optimiser's state lacks {name}"))
                })?;
                if tensor.dims() != slot.dims {
                    return Err(Error::Checkpoint(format!(
                        "{name} has shape {:?}, expected {:?}",
                        tensor.dims(),
                        slot.dims
                    )));
                }
                let values = tensor.flatten_all()?.to_vec1::<f32>()?;
                flat[slot.start..slot.start + slot.len].copy_from_slice(&values);
            }
        }
        self.steps = steps;
        Ok(())
    }
}

/// The numbers of one update, ready for the inner loop.
#[derive(Clone, Copy)]
struct Numbers {
    /// What weight decay leaves of a weight.
    keep: f32,
    beta1: f32,
    beta2: f32,
    step_size: f32,
    /// Root of the second average's bias correction.
    root: f32,
    eps: f32,
    scale: f32,
}

impl Numbers {
    fn new(config: &AdamWConfig, lr: f64, decay: f64, scale: f32, steps: u64) -> Self {
        let [beta1, beta2] = config.betas;
        let correction = |beta: f64| 1.0 - beta.powf(steps as f64);
        Self {
            keep: (1.0 - lr * decay) as f32,
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            step_size: (lr / correction(beta1)) as f32,
            root: correction(beta2).sqrt() as f32,
            eps: config.eps as f32,
            scale,
        }
    }

    fn apply(self, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            let g = g * self.scale;
            *m += (1.0 - self.beta1) * (g - *m);
            *v = self.beta2 * *v + (1.0 - self.beta2) * g * g;
            *p = *p * self.keep - self.step_size * *m / (v.sqrt() / self.root + self.eps);
        }
    }
}

/// One parameter's update, in place.
struct Update<'a> {
    grads: &'a [f32],
    averages: RefCell<(&'a mut [f32], &'a mut [f32])>,
    numbers: Numbers,
}

impl InplaceOp1 for Update<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let CpuStorage::F32(values) = storage else {
            candle_core::bail!("adamw: parameters must be f32");
        };
        let start = layout.start_offset();
        let p = &mut values[start..start + self.grads.len()];
        let (m, v) = &mut *self.averages.borrow_mut();
        p.par_chunks_mut(PIECE)
            .zip(self.grads.par_chunks(PIECE))
            .zip(m.par_chunks_mut(PIECE))
            .zip(v.par_chunks_mut(PIECE))
            .for_each(|(((p, g), m), v)| self.numbers.apply(p, g, m, v));
        Ok(())
    }
}

//! AdamW with the reference's parameter groups, and the flat gradient it works on.
//!
//! Everything lies flat, in the order of the parameters' names: one gradient buffer (one bucket for all ranks, one
//! pass for the norm) and the two averages. Weight decay acts on every parameter except vectors and biases; the learned
//! queries (3 dimensions) and the temperature (none) do decay, as in the reference. The state is open, so a run can be
//! resumed to the bit. It knows no schedule: the caller brings the learning rate.

use std::collections::BTreeMap;
use std::sync::Arc;

use blip2::params::ParamStore;
use blip2_ops::{Communicator, FlatGradients, adamw_step, sum_of_squares};
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor};

use crate::{Error, Result};

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

/// The gradients of all parameters in one flat buffer, averaged over micro-batches and ranks, with the loss.
#[derive(Debug)]
pub struct Gradients {
    flat: FlatGradients,
    loss: f32,
    empty: bool,
}

impl Gradients {
    /// Room for the gradients of `params`.
    ///
    /// # Errors
    /// Only if memory can't be had.
    pub fn new(params: &ParamStore) -> Result<Self> {
        let flat = FlatGradients::new(params.vars().map(|(_, var)| var.as_tensor()))?;
        Ok(Self { flat, loss: 0.0, empty: true })
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.flat.clear();
        self.empty = true;
        self.loss = 0.0;
    }

    /// Runs `step`, of a micro-batch, whose backward pass adds `share` of most gradients right here. The others, which `step` has to
    /// bring out, come by [`Self::add`] after it.
    pub fn collect<R>(&mut self, share: f32, step: impl FnOnce() -> R) -> R {
        self.flat.collect(share, step)
    }

    /// Adds `share` of a micro-batch: the gradients that its backward pass left in `grads`.
    ///
    /// # Errors
    /// If a parameter got no gradient, there or in [`Self::collect`]: it would silently stay untrained. If that had another share.
    pub fn add(&mut self, params: &ParamStore, grads: &GradStore, share: f32) -> Result<()> {
        for (name, var) in params.vars() {
            let is_given = self.flat.take_given(var);
            let collected = self.flat.share();
            if is_given && collected.to_bits() != share.to_bits() {
                return Err(Error::Training(format!(
                    "{share} of a micro-batch of which {collected} has been collected"
                )));
            }
            match grads.get(var) {
                Some(grad) => self.flat.add(var, grad, share)?,
                None if is_given => {}
                None => {
                    return Err(Error::Training(format!(
                        "the trained parameter {name} got no gradient"
                    )));
                }
            }
        }
        self.empty = false;
        Ok(())
    }

    /// Adds `share` of a micro-batch's loss.
    pub fn add_loss(&mut self, loss: f32, share: f32) {
        self.loss += share * loss;
    }

    /// Averages over all ranks: one message for all gradients, one for the loss, so that all ranks judge and do the
    /// same.
    ///
    /// # Errors
    /// If the ranks can't reach each other.
    pub fn average(&mut self, ranks: &Arc<dyn Communicator>) -> Result<()> {
        let world = ranks.world();
        if world > 1 {
            self.flat.set((ranks.all_reduce_sum(self.flat())? / world as f64)?)?;
            let loss = ranks.all_reduce_sum(&Tensor::new(&[self.loss], &Device::Cpu)?)?;
            self.loss = loss.to_vec1::<f32>()?.iter().sum::<f32>() / world as f32;
        }
        Ok(())
    }

    /// The averaged loss.
    #[must_use]
    pub fn loss(&self) -> f32 {
        self.loss
    }

    /// The global norm of the gradients. Not finite if any gradient is not.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn norm(&self) -> Result<f64> {
        Ok(if self.empty { 0.0 } else { sum_of_squares(self.flat())?.sqrt() })
    }

    /// The flat gradients, in the order of the parameters' names.
    #[must_use]
    pub fn flat(&self) -> &Tensor {
        self.flat.flat()
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
    /// The learning rate of a layer of the image encoder, as a share of the layer behind it; 1: all learn alike.
    pub layer_decay: f64,
}

/// The prefix of the image encoder's parameters, where it is trained.
pub const VISION: &str = "vision.";

/// The share of the learning rate that the parameter `name` gets: each block of an image encoder of `depth` blocks learns
/// `decay` times as fast as the one behind it, what stands before the first block slowest, everything else at full rate.
#[must_use]
pub fn lr_scale(name: &str, depth: usize, decay: f64) -> f64 {
    let Some(rest) = name.strip_prefix(VISION) else { return 1.0 };
    let layer = block(rest).map_or(0, |block| block + 1);
    decay.powi((depth + 1).saturating_sub(layer) as i32)
}

/// The number of a `blocks.N.…`.
fn block(name: &str) -> Option<usize> {
    name.strip_prefix("blocks.")?.split('.').next()?.parse().ok()
}

/// AdamW (Loshchilov and Hutter, 2019), equal to PyTorch's.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    slots: Vec<Slot>,
    /// Blocks of the image encoder, if it is trained.
    depth: usize,
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
        let blocks = slots.iter().filter_map(|slot| block(slot.name.strip_prefix(VISION)?));
        let depth = blocks.max().map_or(0, |last| last + 1);
        Self { config, depth, slots, m: vec![0.0; len], v: vec![0.0; len], steps: 0 }
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
        let [beta1, beta2] = self.config.betas;
        let mut numbers = blip2_ops::AdamW {
            lr,
            beta1,
            beta2,
            eps: self.config.eps,
            weight_decay: 0.0,
            step: self.steps,
            grad_scale: scale,
        };
        for (slot, (name, var)) in self.slots.iter().zip(params.vars()) {
            if slot.name != name || slot.dims != var.dims() {
                return Err(Error::Training(format!(
                    "the optimiser was made for {} {:?}, not for {name} {:?}",
                    slot.name,
                    slot.dims,
                    var.dims()
                )));
            }
            let range = slot.start..slot.start + slot.len;
            let grad = gradients.flat.of(var)?;
            let decay = decays(name, &slot.dims);
            numbers.weight_decay = if decay { self.config.weight_decay } else { 0.0 };
            numbers.lr = lr * lr_scale(name, self.depth, self.config.layer_decay);
            let (m, v) = (&mut self.m[range.clone()], &mut self.v[range]);
            adamw_step(var, &grad, m, v, &numbers)?;
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

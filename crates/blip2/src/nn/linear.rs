//! `y = x·Wᵀ + b`, trained or frozen; the caller can't tell which.

use blip2_ops::FrozenWeight;
use candle_core::Tensor;

use super::LayerNorm;
use crate::Result;

/// A linear map from `in` to `out` features that hides where its weight comes from and how it is stored.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
}

#[derive(Debug, Clone)]
enum Weight {
    /// Receives a gradient; shape (out, in).
    Trained(Tensor),
    /// Lends no parameter to anybody; any weight format.
    Frozen(FrozenWeight),
}

impl Linear {
    /// A map whose `weight` (out, in) and `bias` (out) receive gradients.
    #[must_use]
    pub fn trained(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight: Weight::Trained(weight), bias }
    }

    /// A map that lets gradients through to its input only.
    #[must_use]
    pub fn frozen(weight: FrozenWeight, bias: Option<Tensor>) -> Self {
        Self { weight: Weight::Frozen(weight), bias }
    }

    /// `x` (…, in) → (…, out).
    ///
    /// # Errors
    /// If the last dimension of `x` is not `in`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let bias = self.bias.as_ref();
        Ok(match &self.weight {
            Weight::Trained(weight) => blip2_ops::linear(x, weight, bias)?,
            Weight::Frozen(weight) => blip2_ops::frozen_linear(x, weight, bias)?,
        })
    }

    /// `forward(norm.forward(x))` for the `x` that [`LayerNorm::standardise`] made. Scale and shift of `norm` go into the weight
    /// (out, in) and the bias (out) instead of into every row of `x`, so that their gradients are made of this map's own. Only worth
    /// it in training, and where `x` is constant.
    ///
    /// # Errors
    /// If the last dimension of `x` is not `in`.
    pub fn forward_standardised(&self, x: &Tensor, norm: &LayerNorm) -> Result<Tensor> {
        let (scale, shift) = norm.scale_and_shift();
        let Weight::Trained(weight) = &self.weight else {
            return self.forward(&x.broadcast_mul(scale)?.broadcast_add(shift)?);
        };
        let bias = blip2_ops::linear(&shift.unsqueeze(0)?, weight, self.bias.as_ref())?;
        Ok(blip2_ops::linear(x, &weight.broadcast_mul(scale)?, Some(&bias.squeeze(0)?))?)
    }
}

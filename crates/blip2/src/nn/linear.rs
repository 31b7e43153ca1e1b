//! `y = x·Wᵀ + b`, trained or frozen; the caller can't tell which.

use blip2_ops::FrozenWeight;
use candle_core::Tensor;

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
}

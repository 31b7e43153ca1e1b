//! Normalisations over the last dimension.

use candle_core::Tensor;

use crate::Result;

/// `(x − mean) / √(variance + eps) · weight + bias`.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// `weight` and `bias` are (width).
    #[must_use]
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self { weight, bias, eps }
    }

    /// `x` (…, width) → same shape.
    ///
    /// # Errors
    /// If the last dimension of `x` is not the width.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(blip2_ops::layer_norm(x, &self.weight, &self.bias, self.eps)?)
    }
}

/// `x / √(mean(x²) + eps) · weight`.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    /// `weight` is (width).
    #[must_use]
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self { weight, eps }
    }

    /// `x` (…, width) → same shape.
    ///
    /// # Errors
    /// If the last dimension of `x` is not the width.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(blip2_ops::rms_norm(x, &self.weight, self.eps)?)
    }
}

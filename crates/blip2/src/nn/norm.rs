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

    /// `(x − mean) / √(variance + eps)` alone, for [`super::Linear::forward_standardised`].
    ///
    /// # Errors
    /// If the last dimension of `x` is not the width.
    pub fn standardise(&self, x: &Tensor) -> Result<Tensor> {
        let (one, zero) = (self.weight.ones_like()?, self.bias.zeros_like()?);
        Ok(blip2_ops::layer_norm(x, &one, &zero, self.eps)?)
    }

    /// Whether its scale and shift receive gradients.
    #[must_use]
    pub fn is_trained(&self) -> bool {
        self.weight.track_op()
    }

    /// Scale and shift, (width) each.
    #[must_use]
    pub fn scale_and_shift(&self) -> (&Tensor, &Tensor) {
        (&self.weight, &self.bias)
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

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::nn::Linear;

    #[test]
    fn scale_and_shift_inside_of_a_projection() {
        let random = |shape: &[usize]| Var::randn(0.5f32, 1.0, shape, &Device::Cpu).unwrap();
        let (scale, shift, weight, bias) =
            (random(&[5]), random(&[5]), random(&[3, 5]), random(&[3]));
        let x = random(&[2, 4, 5]).detach();
        let norm = LayerNorm::new(scale.as_tensor().clone(), shift.as_tensor().clone(), 1e-5);
        let linear = Linear::trained(weight.as_tensor().clone(), Some(bias.as_tensor().clone()));
        let outer = linear.forward(&norm.forward(&x).unwrap()).unwrap();
        let inner = linear.forward_standardised(&norm.standardise(&x).unwrap(), &norm).unwrap();
        let differ = |a: &Tensor, b: &Tensor| {
            let most = (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
            most.to_scalar::<f32>().unwrap()
        };
        assert!(differ(&outer, &inner) < 1e-5);
        // Not the plain sum, whose gradient is the same in every place.
        let grads = |y: &Tensor| y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let (outer, inner) = (grads(&outer), grads(&inner));
        for var in [&scale, &shift, &weight, &bias] {
            let (a, b) = (outer.get(var).unwrap(), inner.get(var).unwrap());
            assert!(differ(a, b) < 1e-3, "{a} {b}");
        }
    }
}

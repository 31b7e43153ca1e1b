//! Two linear maps with a non-linearity between them.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::Linear;
use crate::Result;
use crate::params::Params;

/// The non-linearity of a feed-forward network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x·Φ(x)` with the exact error function.
    Gelu,
    /// `x·σ(1.702·x)`, CLIP's approximation.
    QuickGelu,
    /// GELU by way of a hyperbolic tangent, T5's.
    GeluNew,
    /// `max(x, 0)`.
    Relu,
}

impl Activation {
    /// Element by element; any shape.
    ///
    /// # Errors
    /// If `x` is not f32.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Gelu => blip2_ops::gelu(x)?,
            Self::QuickGelu => blip2_ops::quick_gelu(x)?,
            Self::GeluNew => blip2_ops::gelu_tanh(x)?,
            Self::Relu => blip2_ops::relu(x)?,
        })
    }
}

/// `fc2(act(fc1(x)))`.
#[derive(Debug, Clone)]
pub struct Mlp {
    fc1: Linear,
    fc2: Linear,
    act: Activation,
}

impl Mlp {
    /// Reads `fc1` (hidden, width) and `fc2` (width, hidden), both with bias.
    ///
    /// # Errors
    /// If a weight can't be stored in the wanted format.
    pub fn new(params: &Params, width: usize, hidden: usize, act: Activation) -> Result<Self> {
        Ok(Self {
            fc1: params.pp("fc1").linear(width, hidden, true)?,
            fc2: params.pp("fc2").linear(hidden, width, true)?,
            act,
        })
    }

    /// `x` (…, width) → same shape.
    ///
    /// # Errors
    /// If the last dimension of `x` is not the width.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.fc2.forward(&self.act.forward(&self.fc1.forward(x)?)?)
    }
}

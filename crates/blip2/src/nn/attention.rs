//! Multi-head attention: the one that every model uses.
//!
//! Shapes: b batch, t queries, s keys, d width. What differs between models inside attention is data: which biases
//! exist, the scale, the key width, an additive bias (masks and relative positions alike), a cache.

use blip2_ops::{Dropout, Heads};
use candle_core::Tensor;

use super::{KvCache, LayerNorm, Linear};
use crate::Result;
use crate::params::Params;

/// The shape of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Features of what asks, and of the result.
    pub width: usize,
    /// Features of what is looked at.
    pub key_width: usize,
    /// Features of queries, keys and values, all heads together.
    pub inner: usize,
    /// Heads.
    pub num_heads: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// Whether the projections have biases.
    pub bias: bool,
    /// Probability of dropping an attention weight, in training.
    pub dropout: f32,
}

/// Projections `q`, `k`, `v`, `out` around scaled dot-product attention.
#[derive(Debug, Clone)]
pub struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    heads: Heads,
    /// Probability of dropping an attention weight, in training.
    dropout: f32,
}

impl Attention {
    /// Reads `q` (d, d), `k` and `v` (d, `key_width`) and `out` (d, d), all with bias; `num_heads` must divide d.
    ///
    /// # Errors
    /// If the heads don't divide the width.
    pub fn new(
        params: &Params,
        width: usize,
        key_width: usize,
        num_heads: usize,
        dropout: f32,
    ) -> Result<Self> {
        let scale = 1.0 / ((width / num_heads.max(1)) as f32).sqrt();
        let inner = width;
        Self::of_shape(
            params,
            &AttentionShape { width, key_width, inner, num_heads, scale, bias: true, dropout },
        )
    }

    /// Reads `q` (inner, width), `k` and `v` (inner, `key_width`) and `out` (width, inner); the heads must divide inner.
    ///
    /// # Errors
    /// If the heads don't divide the inner width.
    pub fn of_shape(params: &Params, shape: &AttentionShape) -> Result<Self> {
        let &AttentionShape { width, key_width, inner, num_heads, scale, bias, dropout } = shape;
        if num_heads == 0 || !inner.is_multiple_of(num_heads) {
            return Err(crate::Error::Config(format!(
                "{num_heads} heads do not divide the width {inner}"
            )));
        }
        Ok(Self {
            q: params.pp("q").linear(width, inner, bias)?,
            k: params.pp("k").linear(key_width, inner, bias)?,
            v: params.pp("v").linear(key_width, inner, bias)?,
            out: params.pp("out").linear(inner, width, bias)?,
            heads: Heads { heads: num_heads, kv_heads: num_heads, scale },
            dropout,
        })
    }

    /// Self-attention. `x` (b, t, d) → (b, t, d); `bias` broadcasts to (b, heads, t, t).
    ///
    /// # Errors
    /// If shapes don't fit.
    pub fn attend(&self, x: &Tensor, bias: Option<&Tensor>, dropout: &Dropout) -> Result<Tensor> {
        let (k, v) = self.project(x)?;
        self.attend_projected(x, &k, &v, bias, dropout)
    }

    /// Self-attention over everything the cache has seen, and `x` (b, t, d) which is added to it;
    /// `bias` broadcasts to (b, heads, t, cached + t).
    ///
    /// # Errors
    /// If shapes don't fit.
    pub fn attend_cached(
        &self,
        x: &Tensor,
        cache: &mut KvCache,
        bias: Option<&Tensor>,
        dropout: &Dropout,
    ) -> Result<Tensor> {
        let (k, v) = self.project(x)?;
        cache.append(k, v)?;
        self.attend_to(x, cache, bias, dropout)
    }

    /// Attention of `x` (b, t, d) to what the cache holds, and nothing else.
    ///
    /// # Errors
    /// If shapes don't fit.
    pub fn attend_to(
        &self,
        x: &Tensor,
        cache: &KvCache,
        bias: Option<&Tensor>,
        dropout: &Dropout,
    ) -> Result<Tensor> {
        let q = self.q.forward(x)?;
        self.out.forward(&cache.attend(&q, bias, self.heads, dropout.key(self.dropout))?)
    }

    /// Keys and values (b, s, d) of `x` (b, s, `key_width`), for [`Self::attend_projected`].
    ///
    /// # Errors
    /// If the last dimension is not the key width.
    pub fn project(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        Ok((self.k.forward(x)?, self.v.forward(x)?))
    }

    /// [`Self::project`] of `norm.forward(x)` for the `x` that [`LayerNorm::standardise`] made: see
    /// [`Linear::forward_standardised`].
    ///
    /// # Errors
    /// If the last dimension is not the key width.
    pub fn project_standardised(&self, x: &Tensor, norm: &LayerNorm) -> Result<(Tensor, Tensor)> {
        Ok((self.k.forward_standardised(x, norm)?, self.v.forward_standardised(x, norm)?))
    }

    /// Attention of `x` (b, t, d) to keys and values (b, s, d) that are already projected: cross-attention to a picture
    /// projects it once, however many passes read it.
    ///
    /// # Errors
    /// If shapes don't fit.
    pub fn attend_projected(
        &self,
        x: &Tensor,
        k: &Tensor,
        v: &Tensor,
        bias: Option<&Tensor>,
        dropout: &Dropout,
    ) -> Result<Tensor> {
        let q = self.q.forward(x)?;
        let mixed = blip2_ops::attention(&q, k, v, bias, self.heads, dropout.key(self.dropout))?;
        self.out.forward(&mixed)
    }
}

//! The attention masks, as additive biases: 0 where a position may look, −∞ where it may not.
//!
//! The Q-Former's three masks (paper, figure 2), Q = queries, T = text, columns are what a row may see:
//!
//! ```text
//! unimodal (ITC)      bidirectional (ITM)   multimodal causal (ITG)
//!     Q  T                Q  T                  Q  T
//! Q [ 1  0 ]          Q [ 1  1 ]            Q [ 1  0 ]
//! T [ 0  1 ]          T [ 1  1 ]            T [ 1  ◣ ]
//! ```
//!
//! Unimodal needs no mask: queries and text are two passes that never meet. Padding hides columns in all three.

use candle_core::{DType, Device, Tensor};

use crate::{Error, Result};

const HIDDEN: f32 = f32::NEG_INFINITY;

/// Hides padding: `mask` (b, t) of 1 = a token, 0 = padding → bias (b, 1, 1, `before` + t), whose first `before` columns are visible.
///
/// # Errors
/// If `mask` is not (b, t).
pub fn padding(mask: &Tensor, before: usize) -> Result<Tensor> {
    let rows = rows(mask)?;
    let columns = before + rows.first().map_or(0, Vec::len);
    let mut bias = Vec::with_capacity(rows.len() * columns);
    for row in &rows {
        bias.extend(std::iter::repeat_n(0.0, before));
        bias.extend(row.iter().map(|&seen| if seen == 0 { HIDDEN } else { 0.0 }));
    }
    Ok(Tensor::from_vec(bias, (rows.len(), 1, 1, columns), &Device::Cpu)?)
}

/// Multimodal causal with the queries cached: text row i sees all `before` cached columns and text columns ≤ i that
/// are no padding. `mask` (b, t) → bias (b, 1, t, `before` + t).
///
/// # Errors
/// If `mask` is not (b, t).
pub fn multimodal_causal(mask: &Tensor, before: usize) -> Result<Tensor> {
    let rows = rows(mask)?;
    let t = rows.first().map_or(0, Vec::len);
    let mut bias = Vec::with_capacity(rows.len() * t * (before + t));
    for row in &rows {
        for i in 0..t {
            bias.extend(std::iter::repeat_n(0.0, before));
            bias.extend((0..t).map(|j| if j <= i && row[j] != 0 { 0.0 } else { HIDDEN }));
        }
    }
    Ok(Tensor::from_vec(bias, (rows.len(), 1, t, before + t), &Device::Cpu)?)
}

fn rows(mask: &Tensor) -> Result<Vec<Vec<u8>>> {
    mask.to_dtype(DType::U8).and_then(|mask| mask.to_vec2::<u8>()).map_err(|_| {
        Error::Config(format!(
            "a mask must be (batch, tokens), not {:?} {:?}",
            mask.dims(),
            mask.dtype()
        ))
    })
}

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

use candle_core::{D, DType, Device, Tensor};

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

/// Causal, for a language model of which only the last `t` positions are new: each sees the visible ones up to itself.
/// `visible`, b rows of s positions → bias (b or 1, 1, t, s); none if one query per row sees everything.
///
/// ```text
///         cached   new
/// t 0   [ 0 1 1 │ 1 0 ]     column 0 is padding on the left
///   1   [ 0 1 1 │ 1 1 ]
/// ```
///
/// The rows are equally long, and at least `t`.
fn causal(visible: &[Vec<bool>], t: usize) -> Result<Option<Tensor>> {
    let s = visible.first().map_or(0, Vec::len);
    let padded = visible.iter().flatten().any(|seen| !seen);
    if t <= 1 && !padded {
        return Ok(None);
    }
    let rows = if padded { visible.len() } else { 1 };
    let mut bias = Vec::with_capacity(rows * t * s);
    for row in &visible[..rows] {
        for last in s - t..s {
            bias.extend((0..s).map(|j| if j <= last && row[j] { 0.0 } else { HIDDEN }));
        }
    }
    Ok(Some(Tensor::from_vec(bias, (rows, 1, t, s), &Device::Cpu)?))
}

/// The position of each of the last `t` columns, row after row: how many visible ones stand before it.
fn positions(visible: &[Vec<bool>], t: usize) -> Vec<u32> {
    let mut positions = Vec::with_capacity(visible.len() * t);
    for row in visible {
        let mut before = 0;
        for (i, seen) in row.iter().enumerate() {
            if i + t >= row.len() {
                positions.push(before);
            }
            before += u32::from(*seen);
        }
    }
    positions
}

/// Where the new positions of a batch stand, and what each may see: all that a language model has to know of its rows
/// besides their embeddings.
#[derive(Debug, Clone)]
pub struct Layout {
    /// The position of each new column, row after row.
    pub positions: Vec<u32>,
    /// (b or 1, 1, t, s), or none if everything is seen.
    pub bias: Option<Tensor>,
    /// Positions in use, cached ones included.
    pub reach: usize,
}

impl Layout {
    /// New positions `x` (b, t, …) behind `cached` ones. `visible` has a row of cached + t per row of `x`: whether each
    /// position holds something. Positions count from 0 over what is visible, so padding may stand on either side or
    /// in between.
    ///
    /// # Errors
    /// If `visible` has another shape.
    pub fn causal(x: &Tensor, visible: &[Vec<bool>], cached: usize) -> Result<Self> {
        let (b, t, _) = x.dims3()?;
        let s = cached + t;
        if visible.len() != b || visible.iter().any(|row| row.len() != s) {
            return Err(Error::Config(format!(
                "a mask of {} rows of {} for {b} rows of {s} positions",
                visible.len(),
                visible.first().map_or(0, Vec::len)
            )));
        }
        Ok(Self { positions: positions(visible, t), bias: causal(visible, t)?, reach: s })
    }

    /// Rows `x` (b, t, …) in which several texts go on from one stem: each text is as if it stood alone.
    ///
    /// # Errors
    /// If `branches` has another shape than `x`.
    pub fn branching(x: &Tensor, branches: &[Vec<Branch>]) -> Result<Self> {
        let (b, t, _) = x.dims3()?;
        if branches.len() != b || branches.iter().any(|row| row.len() != t) {
            return Err(Error::Config(format!(
                "branches of {} rows of {} for {b} rows of {t} positions",
                branches.len(),
                branches.first().map_or(0, Vec::len)
            )));
        }
        let (bias, positions) = branching(branches)?;
        let reach = positions.iter().max().map_or(0, |last| *last as usize + 1);
        Ok(Self { positions, bias: Some(bias), reach })
    }

    /// Whether embeddings `x` fit a model of this width that knows `max_len` positions.
    ///
    /// # Errors
    /// If they don't; the message has the numbers.
    pub fn check(&self, x: &Tensor, width: usize, max_len: usize) -> Result<()> {
        let d = x.dim(D::Minus1)?;
        if d != width {
            return Err(Error::Config(format!(
                "embeddings of width {d} for a language model of width {width}"
            )));
        }
        if self.reach > max_len {
            return Err(Error::Config(format!(
                "{} positions; this language model knows {max_len}",
                self.reach
            )));
        }
        Ok(())
    }
}

/// What a position of a row belongs to, where several texts go on from one stem, and several stems may share a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Branch {
    /// The stem of this number, the beginning that its texts share.
    Stem(usize),
    /// Of this stem the text of this number.
    Text(usize, usize),
    /// Nothing.
    Padding,
}

impl Branch {
    /// Whether a position of this branch sees an earlier one of the `other`.
    fn sees(self, other: Self) -> bool {
        match (self, other) {
            (Self::Padding, _) | (_, Self::Padding) => false,
            (Self::Text(own, _), Self::Stem(stem)) => own == stem,
            _ => self == other,
        }
    }
}

/// Causal, for texts that share a stem and don't see each other: each position sees its stem, and its own text, up to
/// itself. b rows of t → bias (b, 1, t, t), and the position of each column, row after row: texts count on from their stem.
///
/// ```text
///        stem  1   2
/// stem [ 1 0 │ 0 │ 0 0 ]     positions 0 1 │ 2 │ 2 3
///      [ 1 1 │ 0 │ 0 0 ]
/// 1    [ 1 1 │ 1 │ 0 0 ]
/// 2    [ 1 1 │ 0 │ 1 0 ]
///      [ 1 1 │ 0 │ 1 1 ]
/// ```
///
/// The rows are equally long.
fn branching(rows: &[Vec<Branch>]) -> Result<(Tensor, Vec<u32>)> {
    let t = rows.first().map_or(0, Vec::len);
    let mut bias = Vec::with_capacity(rows.len() * t * t);
    let mut positions = Vec::with_capacity(rows.len() * t);
    for row in rows {
        for (i, own) in row.iter().enumerate() {
            let sees = |j: usize| j <= i && own.sees(row[j]);
            positions.push((0..i).filter(|&j| sees(j)).count() as u32);
            bias.extend((0..t).map(|j| if sees(j) { 0.0 } else { HIDDEN }));
        }
    }
    Ok((Tensor::from_vec(bias, (rows.len(), 1, t, t), &Device::Cpu)?, positions))
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

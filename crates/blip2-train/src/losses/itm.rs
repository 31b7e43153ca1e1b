//! Image–text matching (paper §3.2): do this picture and this text belong together? The wrong pairs are hard: drawn
//! in proportion to how similar the contrastive loss thinks they are.

use candle_core::Tensor;

use crate::rng::Rng;
use crate::{Error, Result};

/// For each row of `sims` (b, n), one column drawn with probability soft-max(row), never one that `same` says shows
/// the same picture: `same(row, column)`.
///
/// # Errors
/// If a row has no other picture to draw from: hard negatives need at least two different ones.
pub fn hard_negatives(
    sims: &Tensor,
    same: impl Fn(usize, usize) -> bool,
    rng: &mut Rng,
) -> Result<Vec<u32>> {
    let rows = sims.to_vec2::<f32>()?;
    rows.iter().enumerate().map(|(i, row)| draw(row, |j| same(i, j), rng)).collect()
}

fn draw(row: &[f32], same: impl Fn(usize) -> bool, rng: &mut Rng) -> Result<u32> {
    let others = || row.iter().enumerate().filter(|(j, _)| !same(*j));
    let max = others().map(|(_, &s)| s).fold(f32::NEG_INFINITY, f32::max);
    let weight = |s: f32| f64::from(s - max).exp();
    let total: f64 = others().map(|(_, &s)| weight(s)).sum();
    let mut left = rng.uniform() * total;
    let mut last = None;
    for (j, &s) in others() {
        last = Some(j as u32);
        left -= weight(s);
        if left < 0.0 {
            break;
        }
    }
    last.ok_or_else(|| {
        Error::Training("image–text matching needs two different pictures in a batch".into())
    })
}

/// Cross-entropy of `logits` (3b, 2): the first b are right pairs, the rest are wrong ones.
///
/// # Errors
/// If the rows are no multiple of three.
pub fn itm(logits: &Tensor) -> Result<Tensor> {
    let rows = logits.dim(0)?;
    if !rows.is_multiple_of(3) {
        return Err(Error::Training(format!("image–text matching wants 3·b rows, got {rows}")));
    }
    let targets: Vec<u32> = (0..rows).map(|i| u32::from(i < rows / 3)).collect();
    Ok(blip2_ops::cross_entropy(logits, &targets, 0.0)?)
}

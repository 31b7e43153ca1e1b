//! Image–text contrast (paper §3.2): a picture should be closest to its own text among all, and the reverse.
//!
//! Shapes: b local pairs, n = b·world global pairs, q queries, e common space.

use blip2::stage1::similarity;
use candle_core::{Device, Tensor};

use crate::Result;

/// The features of all ranks, in rank order. From other ranks they carry no gradient, and then the local ones among them
/// don't either; a single process passes its own features, gradient and all, as the reference does.
pub struct Gathered<'a> {
    /// Pictures (n, q, e).
    pub images: &'a Tensor,
    /// Texts (n, e).
    pub texts: &'a Tensor,
    /// The index of this rank's first pair among all.
    pub first: usize,
    /// Which picture each text and picture belongs to, if several pairs may share one; n numbers.
    pub image_ids: Option<&'a [i64]>,
}

/// The loss, and the similarities that choose ITM's hard negatives.
pub struct Itc {
    /// Mean of both directions, a scalar.
    pub loss: Tensor,
    /// Local pictures to all texts (b, n), divided by the temperature, without gradient.
    pub sim_i2t: Tensor,
    /// Local texts to all pictures (b, n), divided by the temperature, without gradient.
    pub sim_t2i: Tensor,
}

/// `images` (b, q, e) and `texts` (b, e) are normalised and carry gradients; `temp` is a scalar that divides.
///
/// # Errors
/// If shapes don't fit.
pub fn itc(
    images: &Tensor,
    texts: &Tensor,
    all: &Gathered<'_>,
    temp: &Tensor,
    smoothing: f32,
) -> Result<Itc> {
    let sim_i2t = similarity(images, all.texts)?.broadcast_div(temp)?;
    let sim_t2i = similarity(all.images, texts)?.t()?.broadcast_div(temp)?;
    let b = images.dim(0)?;
    let both = match all.image_ids {
        None => {
            let targets: Vec<u32> = (all.first..all.first + b).map(|i| i as u32).collect();
            (blip2_ops::cross_entropy(&sim_i2t, &targets, smoothing)?
                + blip2_ops::cross_entropy(&sim_t2i, &targets, smoothing)?)?
        }
        Some(ids) => {
            let targets = shared_targets(ids, all.first, b, smoothing)?;
            (blip2_ops::soft_cross_entropy(&sim_i2t, &targets)?
                + blip2_ops::soft_cross_entropy(&sim_t2i, &targets)?)?
        }
    };
    Ok(Itc { loss: (both * 0.5)?, sim_i2t: sim_i2t.detach(), sim_t2i: sim_t2i.detach() })
}

/// Every pair of the same picture is right, in equal parts; smoothed over all.
fn shared_targets(ids: &[i64], first: usize, b: usize, smoothing: f32) -> Result<Tensor> {
    let n = ids.len();
    let mut rows = Vec::with_capacity(b * n);
    for id in &ids[first..first + b] {
        let same = ids.iter().filter(|&other| other == id).count() as f32;
        rows.extend(ids.iter().map(|other| {
            let share = if other == id { 1.0 / same } else { 0.0 };
            (1.0 - smoothing) * share + smoothing / n as f32
        }));
    }
    Ok(Tensor::from_vec(rows, (b, n), &Device::Cpu)?)
}

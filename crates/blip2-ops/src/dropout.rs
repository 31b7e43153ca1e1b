//! Seeded dropout. Whether element i is kept is a hash of (seed, i): the same on every machine and
//! with any number of threads, and recomputed in the backward pass instead of stored.

use std::cell::Cell;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use crate::host::{self, GRAIN, Host, simd};

const NAME: &str = "dropout";

/// One application of dropout: with probability `p` an element becomes 0, else it is divided by
/// `1 - p`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DropoutKey {
    /// Probability of dropping an element, `0 <= p < 1`.
    pub p: f32,
    /// Which random mask.
    pub seed: u64,
}

impl DropoutKey {
    /// Refuses a probability outside `[0, 1)`.
    pub(crate) fn check(&self, op: &str) -> Result<()> {
        if !(0.0..1.0).contains(&self.p) {
            bail!("{op}: dropout probability {} is not in [0, 1)", self.p);
        }
        Ok(())
    }

    /// Multiplies elements `first..first + x.len()` of a tensor by their mask.
    #[inline(always)]
    pub(crate) fn mask(&self, first: usize, x: &mut [f32]) {
        let scale = 1.0 / (1.0 - self.p);
        // An element is dropped when its 24 random bits are below p · 2^24.
        let threshold = (self.p * 16_777_216.0) as u32;
        let mut start = first;
        let mut rest = x;
        while !rest.is_empty() {
            // The counter is 32 bits wide; its high part goes into the key.
            let low = start as u32;
            let until_wrap = (u32::MAX - low) as usize + 1;
            let (now, later) = rest.split_at_mut(until_wrap.min(rest.len()));
            let (k0, k1) = self.words((start >> 32) as u64);
            for (i, x) in now.iter_mut().enumerate() {
                let h = scramble(scramble(low.wrapping_add(i as u32) ^ k0) ^ k1) >> 8;
                *x = if h < threshold { 0.0 } else { *x * scale };
            }
            start += now.len();
            rest = later;
        }
    }

    fn words(&self, high: u64) -> (u32, u32) {
        let k = mix(self.seed ^ mix(high.wrapping_add(0x5851_F42D_4C95_7F2D)));
        (k as u32, (k >> 32) as u32)
    }
}

/// A bijection of 32 bits without visible structure (multiply and xor-shift, twice).
#[inline(always)]
fn scramble(x: u32) -> u32 {
    let x = (x ^ (x >> 16)).wrapping_mul(0x21F0_AAAD);
    let x = (x ^ (x >> 15)).wrapping_mul(0x735A_2D97);
    x ^ (x >> 15)
}

/// A bijection of 64 bits (the finaliser of splitmix64).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// A stream of keys for one step: the n-th call of [`Dropout::key`] gets the n-th key of the seed.
#[derive(Debug)]
pub struct Dropout {
    seed: Option<u64>,
    used: Cell<u64>,
}

impl Dropout {
    /// No dropout: evaluation and inference.
    pub fn off() -> Self {
        Self { seed: None, used: Cell::new(0) }
    }

    /// The stream of `seed`; use another seed for every step (and rank).
    pub fn new(seed: u64) -> Self {
        Self { seed: Some(seed), used: Cell::new(0) }
    }

    /// The next key, or `None` where nothing is dropped. Counts up even when `p` is 0, so that
    /// changing one probability leaves the other masks alone.
    pub fn key(&self, p: f32) -> Option<DropoutKey> {
        let seed = self.seed?;
        let n = self.used.get();
        self.used.set(n.wrapping_add(1));
        (p != 0.0).then(|| DropoutKey { p, seed: mix(seed ^ mix(n)) })
    }

    /// [`dropout`] with the next key, or `x` itself where nothing is dropped.
    pub fn apply(&self, x: &Tensor, p: f32) -> Result<Tensor> {
        match self.key(p) {
            Some(key) => dropout(x, key),
            None => Ok(x.clone()),
        }
    }
}

/// Drops elements of `x` (any shape) as `key` says.
pub fn dropout(x: &Tensor, key: DropoutKey) -> Result<Tensor> {
    host::check(NAME, &[x])?;
    key.check(NAME)?;
    x.apply_op1(DropoutOp { key })
}

struct DropoutOp {
    key: DropoutKey,
}

impl DropoutOp {
    fn masked(&self, x: &[f32]) -> Vec<f32> {
        let mut y = host::zeros(x.len());
        host::for_pieces(&mut y, GRAIN, |start, y| {
            simd(
                #[inline(always)]
                |_| {
                    y.copy_from_slice(&x[start..start + y.len()]);
                    self.key.mask(start, y);
                },
            );
        });
        y
    }
}

impl CustomOp1 for DropoutOp {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = host::values(NAME, storage, layout)?;
        Ok((CpuStorage::F32(self.masked(&x)), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(host::tensor(self.masked(&Host::new(NAME, grad)?), x.shape())?))
    }
}

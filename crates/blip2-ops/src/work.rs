//! How much was computed and read, counted by the ops themselves.
//!
//! For benchmarks: what a part of a model cost is the difference of two readings, so no table of costs has to follow
//! the models. Counting is an addition a product, far below what can be measured.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

static FLOPS: AtomicU64 = AtomicU64::new(0);
static BYTES: AtomicU64 = AtomicU64::new(0);

/// What all ops of this process have done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Multiplications and additions of matrix products.
    pub flops: u64,
    /// Bytes of weights, keys and values that products read, each product by itself.
    pub bytes: u64,
}

impl Work {
    /// The reading now.
    #[must_use]
    pub fn so_far() -> Self {
        Self { flops: FLOPS.load(Relaxed), bytes: BYTES.load(Relaxed) }
    }

    /// What was done between `earlier` and this reading.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            flops: self.flops.saturating_sub(earlier.flops),
            bytes: self.bytes.saturating_sub(earlier.bytes),
        }
    }
}

/// Notes a product of `m` × `k` with `k` × `n` numbers.
pub(crate) fn product(m: usize, k: usize, n: usize) {
    FLOPS.fetch_add(2 * (m as u64) * (k as u64) * (n as u64), Relaxed);
}

/// Notes weights, keys or values that a product reads.
pub(crate) fn read(bytes: usize) {
    BYTES.fetch_add(bytes as u64, Relaxed);
}

//! Random numbers that depend on a seed and a purpose, never on threads or on what was drawn before elsewhere.
//!
//! SplitMix64 (Steele, Lea, Flood 2014): its state is a counter, so a stream can be opened anywhere for free. A run opens
//! one per purpose and step; resuming is opening the same one again.

/// A stream of random numbers.
#[derive(Debug, Clone)]
pub struct Rng {
    state: u64,
}

impl Rng {
    /// The stream of `seed` for the purpose and place that `path` names, e.g. `&[CROPS, epoch, sample]`.
    #[must_use]
    pub fn new(seed: u64, path: &[u64]) -> Self {
        let mut state = mix(seed ^ 0x6a09_e667_f3bc_c909);
        for part in path {
            state = mix(state.wrapping_add(0x9e37_79b9_7f4a_7c15) ^ mix(*part));
        }
        Self { state }
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.state)
    }

    /// A number in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A whole number in [0, n); n must not be 0.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.bits()) * n as u128) >> 64) as usize
    }

    /// A normally distributed number, mean 0, deviation 1 (Box–Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// The numbers 0..n in random order (Fisher–Yates).
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

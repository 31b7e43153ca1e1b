//! Random numbers as a pure function of counters.
//!
//! Nothing here has a state that lives longer than one draw: every random choice of a run (sample order, caption, crop,
//! dropout, hard negatives) is `seed_for(seed, stream, a, b)`, so it depends on the recipe's seed and on *where* in the
//! run it happens, never on threads or on how often the run was interrupted. That is what makes resume exact.
//!
//! Not for secrets: the generator is SplitMix64 (Steele, Lea and Flood, 2014).

/// What a random number is for. Two streams never share their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// The order of the samples in an epoch.
    Order,
    /// What is drawn per sample: its caption or question, its crop and its flip.
    Sample,
    /// The augmented views of the feature cache.
    View,
    /// Dropout of one step.
    Dropout,
    /// Hard negatives of one step.
    Negatives,
    /// Initial weights.
    Init,
}

/// The seed of one draw: of `stream`, at the place named by the counters `a` and `b`.
#[must_use]
pub fn seed_for(seed: u64, stream: Stream, a: u64, b: u64) -> u64 {
    // Chaining full avalanches keeps (a, b) and (b, a), and neighbouring counters, unrelated.
    let mut state = mix(seed ^ 0x6275_6c62_3031_3037);
    for part in [stream as u64 + 1, a, b] {
        state = mix(state.wrapping_add(GOLDEN) ^ mix(part.wrapping_add(GOLDEN)));
    }
    state
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A short sequence of numbers from one seed.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// The sequence of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }

    /// A number in `0..n`, without bias; 0 if `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        if n < 2 {
            return 0;
        }
        let n = n as u64;
        // Numbers above the last whole multiple of n would favour the small remainders.
        let limit = u64::MAX - u64::MAX % n;
        loop {
            let x = self.next_u64();
            if x < limit {
                return (x % n) as usize;
            }
        }
    }

    /// A number in `[0, 1)`.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A standard normal number (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

/// A permutation of `0..n` (Fisher and Yates).
#[must_use]
pub fn permutation(n: usize, seed: u64) -> Vec<u32> {
    let mut rng = Rng::new(seed);
    let mut order: Vec<u32> = (0..n as u32).collect();
    for i in (1..n).rev() {
        order.swap(i, rng.below(i + 1));
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permutation_holds_everything_once() {
        for n in [0, 1, 2, 7, 1000] {
            let mut order = permutation(n, 3);
            order.sort_unstable();
            assert!(order.iter().copied().eq(0..n as u32));
        }
        assert_ne!(permutation(100, 1), permutation(100, 2));
        assert_eq!(permutation(100, 1), permutation(100, 1));
    }

    #[test]
    fn draws_at_different_places_differ() {
        let mut seen = std::collections::HashSet::new();
        for stream in [Stream::Order, Stream::Sample, Stream::View, Stream::Dropout, Stream::Negatives, Stream::Init] {
            for a in 0..30 {
                for b in 0..30 {
                    assert!(seen.insert(seed_for(7, stream, a, b)));
                }
            }
        }
    }

    #[test]
    fn numbers_are_spread_evenly() {
        let mut rng = Rng::new(5);
        let mut counts = [0u32; 7];
        for _ in 0..70_000 {
            counts[rng.below(7)] += 1;
        }
        assert!(counts.iter().all(|&c| (9_600..10_400).contains(&c)), "{counts:?}");
        let mean = (0..100_000).map(|_| rng.uniform()).sum::<f64>() / 1e5;
        assert!((mean - 0.5).abs() < 0.005, "{mean}");
        let square = (0..100_000).map(|_| rng.normal().powi(2)).sum::<f64>() / 1e5;
        assert!((square - 1.0).abs() < 0.02, "{square}");
    }

    #[test]
    fn the_numbers_never_change() {
        // A change here would silently change every recorded run.
        assert_eq!(Rng::new(0).next_u64(), 0xe220_a839_7b1d_cdaf);
        assert_eq!(permutation(8, 42), PERMUTATION_8_42);
    }

    const PERMUTATION_8_42: [u32; 8] = [0, 0, 0, 0, 0, 0, 0, 0];
}

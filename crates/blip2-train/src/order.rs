//! Which samples each step sees: a pure function of seed and step, so that resuming needs no state.
//!
//! An epoch is a random order of all samples, cut into steps of `batch · accumulate · ranks` samples; what does not fill
//! a step is left out of that epoch (another part each time). A step's samples go to its micro-batches in order, and
//! within a micro-batch rank r gets the r-th part. It knows numbers, not pictures.

use crate::recipe::Length;
use crate::rng::Rng;
use crate::schedule::Position;
use crate::{Error, Result};

/// What a stream of random numbers is for: the first part of [`Rng::new`]'s path.
pub mod purpose {
    /// The order of the samples in an epoch.
    pub const ORDER: u64 = 1;
    /// What is drawn per sample: its caption or question, its crop and flip.
    pub const SAMPLE: u64 = 2;
    /// The augmented views of the feature cache.
    pub const VIEW: u64 = 3;
    /// Dropout of a step.
    pub const DROPOUT: u64 = 4;
    /// Hard negatives of a step.
    pub const NEGATIVES: u64 = 5;
    /// Initial weights.
    pub const INIT: u64 = 6;
}

/// The numbers that decide the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    /// The run's seed.
    pub seed: u64,
    /// Samples in the data.
    pub samples: usize,
    /// Samples per micro-batch and rank.
    pub batch: usize,
    /// Micro-batches per step.
    pub accumulate: usize,
    /// Processes.
    pub world: usize,
    /// This process.
    pub rank: usize,
}

/// One micro-batch to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchPlan {
    /// The step it belongs to.
    pub step: u64,
    /// Its number within the step.
    pub micro: usize,
    /// The epoch of that step.
    pub epoch: u64,
    /// The run's seed.
    pub seed: u64,
    /// The samples, by their index in the data.
    pub samples: Vec<usize>,
}

impl BatchPlan {
    /// The random numbers of one of its samples: the same whenever this sample comes up in this epoch.
    #[must_use]
    pub fn rng(&self, sample: usize) -> Rng {
        Rng::new(self.seed, &[purpose::SAMPLE, self.epoch, sample as u64])
    }
}

impl Order {
    /// Checks that an epoch has at least one step.
    ///
    /// # Errors
    /// If there are fewer samples than one step takes.
    pub fn check(self) -> Result<Self> {
        if self.samples < self.per_step() {
            return Err(Error::Data(format!(
                "{} training samples, but one step takes {} (batch_size {} × accumulate {} × {} processes)",
                self.samples,
                self.per_step(),
                self.batch,
                self.accumulate,
                self.world
            )));
        }
        Ok(self)
    }

    /// Samples per step, all ranks together.
    #[must_use]
    pub fn per_step(&self) -> usize {
        self.batch * self.accumulate * self.world
    }

    /// Steps per epoch.
    #[must_use]
    pub fn steps_per_epoch(&self) -> u64 {
        (self.samples / self.per_step()).max(1) as u64
    }

    /// Steps of a run of this length.
    #[must_use]
    pub fn total_steps(&self, length: Length) -> u64 {
        match length {
            Length::Steps(steps) => steps,
            Length::Epochs(epochs) => epochs * self.steps_per_epoch(),
        }
    }

    /// Where step `step` is.
    #[must_use]
    pub fn position(&self, step: u64) -> Position {
        let per_epoch = self.steps_per_epoch();
        Position { step, epoch: step / per_epoch, step_in_epoch: step % per_epoch }
    }
}

/// Walks through an [`Order`], keeping the permutation of the present epoch.
#[derive(Debug)]
pub struct Walk {
    order: Order,
    epoch: Option<u64>,
    permutation: Vec<usize>,
}

impl Walk {
    /// Starts anywhere.
    #[must_use]
    pub fn new(order: Order) -> Self {
        Self { order, epoch: None, permutation: Vec::new() }
    }

    /// This rank's part of micro-batch `micro` of step `step`.
    pub fn plan(&mut self, step: u64, micro: usize) -> BatchPlan {
        let order = self.order;
        let at = order.position(step);
        if self.epoch != Some(at.epoch) {
            self.permutation =
                Rng::new(order.seed, &[purpose::ORDER, at.epoch]).permutation(order.samples);
            self.epoch = Some(at.epoch);
        }
        let batch_of_epoch = at.step_in_epoch as usize * order.accumulate + micro;
        let start = (batch_of_epoch * order.world + order.rank) * order.batch;
        let samples = self.permutation[start..start + order.batch].to_vec();
        BatchPlan { step, micro, epoch: at.epoch, seed: order.seed, samples }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(rank: usize) -> Order {
        Order { seed: 3, samples: 103, batch: 4, accumulate: 3, world: 2, rank }
    }

    #[test]
    fn an_epoch_shows_no_sample_twice_and_ranks_share_none() {
        let mut seen = std::collections::BTreeSet::new();
        for rank in 0..2 {
            let mut walk = Walk::new(order(rank));
            for step in 0..order(rank).steps_per_epoch() {
                for micro in 0..3 {
                    for sample in walk.plan(step, micro).samples {
                        assert!(seen.insert(sample));
                    }
                }
            }
        }
        assert_eq!(seen.len(), 96);
    }

    #[test]
    fn a_walk_begun_anywhere_sees_the_same() {
        let mut all = Walk::new(order(1));
        let plans: Vec<_> = (0..20).map(|step| all.plan(step, 1)).collect();
        for (step, plan) in plans.iter().enumerate().rev() {
            assert_eq!(&Walk::new(order(1)).plan(step as u64, 1), plan);
        }
        assert_ne!(plans[0].samples, plans[4].samples, "epochs differ");
    }

    #[test]
    fn more_ranks_with_smaller_batches_see_the_same_samples_per_step() {
        let one = Order { seed: 3, samples: 103, batch: 8, accumulate: 3, world: 1, rank: 0 };
        let whole = Walk::new(one).plan(2, 1).samples;
        let parts = [0, 1].map(|rank| Walk::new(order(rank)).plan(2, 1).samples).concat();
        assert_eq!(whole, parts);
    }

    #[test]
    fn too_little_data_is_refused_with_numbers() {
        let err = Order { samples: 23, ..order(0) }.check().unwrap_err().to_string();
        assert!(err.contains("23 training samples") && err.contains("24"), "{err}");
    }
}

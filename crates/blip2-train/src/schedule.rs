//! The learning rate of each step: a pure function of where the step is.
//!
//! `paper` is what the paper describes: linear warm-up, then one cosine down to the minimum, both per step.
//! `lavis` is what the released code does (reference implementation's quirk): the warm-up happens inside epoch 0 only,
//! and from epoch 1 on the rate is constant within an epoch and follows a cosine over epochs. A warm-up longer than an
//! epoch therefore ends in a jump. It exists to repeat published runs.

use serde::{Deserialize, Serialize};

/// Which rule gives the learning rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Per-step linear warm-up, then per-step cosine to `min_lr`.
    Paper,
    /// Warm-up within epoch 0, then a cosine that steps once per epoch.
    Lavis,
}

/// A schedule with its numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Which rule.
    pub kind: ScheduleKind,
    /// The highest rate.
    pub lr: f64,
    /// Where the cosine ends.
    pub min_lr: f64,
    /// Where the warm-up starts.
    pub warmup_lr: f64,
    /// Length of the warm-up: optimiser steps for `paper`, micro-batches of epoch 0 for `lavis`. 0 is none.
    pub warmup_steps: u64,
    /// Length of the run in optimiser steps.
    pub total_steps: u64,
    /// Length of the run in epochs, a begun one counted.
    pub total_epochs: u64,
    /// Micro-batches per optimiser step.
    pub accumulate: u64,
}

/// Where a step is: counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Optimiser steps before this one.
    pub step: u64,
    /// Epochs before this one.
    pub epoch: u64,
    /// Optimiser steps of this epoch before this one.
    pub step_in_epoch: u64,
}

impl Schedule {
    /// The learning rate to use in the step at `at`.
    #[must_use]
    pub fn lr(&self, at: Position) -> f64 {
        match self.kind {
            ScheduleKind::Paper if at.step < self.warmup_steps => self.warmup(at.step),
            ScheduleKind::Paper => {
                let done = at.step - self.warmup_steps;
                let all = self.total_steps.saturating_sub(self.warmup_steps).max(1);
                self.cosine(done as f64 / all as f64)
            }
            ScheduleKind::Lavis if at.epoch == 0 => {
                // The reference sets the rate before every micro-batch, so the optimiser sees the last one's.
                self.warmup((at.step_in_epoch + 1) * self.accumulate - 1)
            }
            ScheduleKind::Lavis => self.cosine(at.epoch as f64 / self.total_epochs.max(1) as f64),
        }
    }

    fn warmup(&self, step: u64) -> f64 {
        let share = step as f64 / self.warmup_steps.max(1) as f64;
        (self.warmup_lr + (self.lr - self.warmup_lr) * share).min(self.lr)
    }

    fn cosine(&self, share: f64) -> f64 {
        let share = share.min(1.0);
        self.min_lr + 0.5 * (self.lr - self.min_lr) * (1.0 + (std::f64::consts::PI * share).cos())
    }
}

//! Losses are pure functions of tensors: features in, a scalar out. They know no model and no device count; what was
//! gathered from other ranks comes in as an argument.

mod itc;
mod itm;
mod lm;

pub use itc::{Gathered, Itc, itc};
pub use itm::{hard_negatives, itm};
pub use lm::{Targets, lm};

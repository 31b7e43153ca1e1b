//! Make a BLIP-2 model: data, losses, the training of both stages, evaluation.

pub mod augment;
pub mod budget;
pub mod checkpoint;
pub mod data;
mod encoder;
mod error;
pub mod eval;
pub mod evaluate;
pub mod features;
pub mod init;
pub mod log;
pub mod losses;
pub mod monitor;
pub mod optim;
pub mod order;
mod packed;
pub mod parts;
pub mod recipe;
pub mod rng;
pub mod schedule;
pub mod steps;
pub mod tasks;
pub mod tensorboard;
pub mod trainer;

pub use error::{Error, Result};

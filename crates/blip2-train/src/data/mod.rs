//! Picture–caption data: what a sample is, tar shards of samples, the packages pictures come from,
//! and the mini set built of them.
//!
//! Pictures stay encoded until somebody looks at them; nothing is ever unpacked to disk.

pub mod caltech;
pub mod cifar;
pub mod filter;
pub mod mini;
pub mod package;
pub mod paint;
pub mod sample;
pub mod scenes;
pub mod shards;
pub mod sources;
pub mod text;

pub use sample::{Meta, QuestionAnswer, Sample};
pub use shards::{Dataset, Fault, ShardReader, ShardWriter, Tally};

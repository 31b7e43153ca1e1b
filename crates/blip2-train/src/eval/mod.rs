//! Measuring a model: pure functions from texts and scores to numbers, and the report made of them.
//!
//! In order of use: [`ptb`] cuts captions into words, [`metrics`] scores captions, [`answers`] scores answers and
//! nouns, [`retrieval`] ranks, [`report`] writes text, JSON and a page, [`curves`] draws a training log.
//! Nothing here runs a model or reads a data set.

pub mod answers;
pub mod curves;
pub mod metrics;
pub mod ptb;
pub mod report;
pub mod retrieval;

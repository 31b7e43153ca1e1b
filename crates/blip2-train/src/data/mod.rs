//! Samples, shards and the mini set.

//! Losses are pure functions of tensors.

//! Every op against PyTorch (golden/ops.safetensors) and against finite differences, on strided and
//! empty inputs, and with shapes that do not fit.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;
mod finite_difference;
mod frozen;
mod golden;
mod laws;

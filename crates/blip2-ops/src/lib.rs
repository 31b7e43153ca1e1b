//! Differentiable tensor ops and weight formats on top of candle: everything a trained model calls,
//! and no model.
//!
//! Candle's own layers are either forward-only (gradients stop without a word) or compute gradients
//! of frozen weights. Here every op is a candle custom op with a hand-written backward pass, f32 on
//! the CPU; products with frozen panels are our own, where there is AVX-512 large ones of trained weights, too; others are faer's. In a backward
//! pass the gradient of an argument is computed only if that argument is tracked.
//!
//! | file | what it holds |
//! |---|---|
//! | `linear.rs` | [`linear`]: product with a trained weight |
//! | `frozen.rs`, `gguf_read.rs`, `gguf_write.rs` | [`FrozenWeight`] in f32, f16 or GGUF blocks, [`frozen_linear`] |
//! | `panel.rs`, `blocks.rs`, `tile.rs` | how frozen weights lie in memory, quantised blocks of them, and the innermost products |
//! | `int_tiles.rs` | products of quantised weights with many rows, by tile instructions |
//! | `float_tiles.rs`, `factor.rs` | large products of any two factors; what those share with `bf16_tiles.rs` |
//! | `attention.rs` | [`attention`]: grouped heads, additive bias, dropout on probabilities |
//! | `cached.rs` | [`cached_attention`]: a decoder's step, forward only |
//! | `norm.rs` | [`layer_norm`], [`rms_norm`], [`l2_normalize`] |
//! | `activation.rs` | [`gelu`], [`gelu_tanh`], [`quick_gelu`], [`relu`], [`silu_gate`], [`add`] |
//! | `rope.rs`, `embedding.rs` | [`rope`], [`embedding`] |
//! | `gradients.rs` | [`FlatGradients`]: where gradients of trained weights are summed |
//! | `loss.rs` | [`cross_entropy`], [`soft_cross_entropy`] |
//! | `dropout.rs` | [`dropout`], and [`Dropout`], the stream of its keys |
//! | `comm.rs` | [`Communicator`], [`all_gather`] |
//! | `optim.rs` | [`adamw_step`], [`sum_of_squares`] |
//! | `work.rs` | [`Work`]: what the ops computed and read, for benchmarks |
//! | `bf16.rs`, `bf16_tiles.rs` | [`MixedPrecision`]: products of factors rounded to bf16 |
//! | `amx.rs` | tile instructions, for bf16 and for bytes |
//! | `matrix.rs`, `gemm.rs`, `host.rs` | views of slices, the matrix product; borrowing tensors, threads, SIMD, `exp` |
//!
//! What holds for every op:
//! - tensors are f32 on the CPU; anything else is an error that names the op and the type;
//! - strided and empty tensors work; a shape that does not fit is an error that shows both shapes;
//! - SIMD is chosen at run time;
//! - results do not depend on how threads are scheduled, and random masks not on their number.

mod activation;
mod amx;
mod attention;
mod bf16;
mod bf16_tiles;
mod blocks;
mod cached;
mod comm;
mod dropout;
mod embedding;
mod factor;
mod float_tiles;
mod frozen;
mod gemm;
mod gguf_read;
mod gguf_write;
mod gradients;
mod host;
mod int_tiles;
mod linear;
mod loss;
mod matrix;
mod norm;
mod optim;
mod panel;
mod rope;
mod tile;
mod work;

pub use activation::{add, gelu, gelu_tanh, quick_gelu, relu, silu_gate};
pub use attention::{Heads, attention};
pub use bf16::MixedPrecision;
pub use cached::{Segment, cached_attention};
pub use comm::{Communicator, SingleProcess, all_gather};
pub use dropout::{Dropout, DropoutKey, dropout};
pub use embedding::embedding;
pub use frozen::{FrozenWeight, WeightFormat, frozen_linear, is_finite};
pub use gradients::FlatGradients;
pub use host::on_computing_thread;
pub use linear::linear;
pub use loss::{IGNORE, cross_entropy, log_sum_exp, soft_cross_entropy};
pub use norm::{l2_normalize, layer_norm, rms_norm};
pub use optim::{AdamW, adamw_step, sum_of_squares};
pub use rope::{RopeStyle, rope};
pub use work::Work;

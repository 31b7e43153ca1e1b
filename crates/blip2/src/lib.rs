//! Use a BLIP-2 model: picture and text in, text, scores and embeddings out.
//!
//! ```text
//! bytes ──image──▶ pixels ──vit──▶ patches ──qformer──▶ queries ──llm_proj, llm──▶ logits ──generate──▶ ids ──tokenizer──▶ text
//! ```
//!
//! One model is one file; models never import each other; [`stage1`] and [`stage2`] put them together.

pub mod assets;
pub mod checkpoint;
pub mod choice;
pub mod convert;
mod error;
pub mod generate;
pub mod hf;
pub mod hub;
pub mod image;
pub mod lavis;
pub mod llama;
pub mod llm;
pub mod mini;
pub mod model;
pub mod nn;
pub mod onnx;
pub mod opt;
pub mod pack;
pub mod params;
mod pickle;
pub mod pth;
pub mod qformer;
pub mod shards;
pub mod stage1;
pub mod stage2;
pub mod stored;
pub mod t5;
pub mod tokenizer;
pub mod vit;
mod vit_onnx;
mod weights_out;

pub use error::{Error, Result};

//! Leaves shared by all models. They know no model; blocks are written out in each model's own file.

mod attention;
mod kv_cache;
mod linear;
pub mod mask;
mod mlp;
mod norm;
mod positions;

pub use attention::{Attention, AttentionShape};
pub use kv_cache::{KvCache, KvCaches};
pub use linear::Linear;
pub use mlp::{Activation, Mlp};
pub use norm::{LayerNorm, RmsNorm};
pub use positions::fit_positions;

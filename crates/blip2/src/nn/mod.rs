//! Leaves shared by all models. They know no model; blocks are written out in each model's own file.

mod attention;
mod kv_cache;
mod linear;
pub mod mask;
mod mlp;
mod norm;
mod positions;

use crate::{Error, Result};

/// Refuses sizes of a configuration that are 0 or far above every model: their products must not overflow. `model` names
/// whose they are.
///
/// # Errors
/// For the first one out of range, with its name and number.
pub fn check_sizes(model: &str, sizes: &[(&str, usize)]) -> Result<()> {
    const MOST: usize = 1 << 24;
    match sizes.iter().find(|(_, n)| *n == 0 || *n > MOST) {
        Some((name, size)) => {
            Err(Error::Config(format!("{model} configuration: {name} {size} is not in 1..={MOST}")))
        }
        None => Ok(()),
    }
}

pub use attention::{Attention, AttentionShape};
pub use kv_cache::{KvCache, KvCaches};
pub use linear::Linear;
pub use mlp::{Activation, Mlp};
pub use norm::{LayerNorm, RmsNorm};
pub use positions::{Corners, fit_positions};

//! Keys and values of one attention layer, owned by the caller.

use candle_core::Tensor;

use crate::Result;

/// The keys and values one layer has seen, each (b, t, width). Empty at first.
///
/// Gradients flow through it: stage 1's text generation (ITG) trains the queries through their cached keys and values.
#[derive(Debug, Clone, Default)]
pub struct KvCache {
    held: Option<(Tensor, Tensor)>,
}

impl KvCache {
    /// Adds keys and values (b, t, width) of new positions and returns all of them, oldest first.
    ///
    /// # Errors
    /// If batch or width differ from what is held.
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let all = match &self.held {
            None => (k.clone(), v.clone()),
            Some((old_k, old_v)) => (Tensor::cat(&[old_k, k], 1)?, Tensor::cat(&[old_v, v], 1)?),
        };
        self.held = Some(all.clone());
        Ok(all)
    }

    /// The number of positions held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.held.as_ref().map_or(0, |(k, _)| k.dims()[1])
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Row `i` becomes what row `rows[i]` was: beams change places, or one row becomes several.
    ///
    /// # Errors
    /// If a row is out of range.
    pub fn reorder(&mut self, rows: &[u32]) -> Result<()> {
        if let Some((k, v)) = &mut self.held {
            let index = Tensor::new(rows, k.device())?;
            *k = k.index_select(&index, 0)?;
            *v = v.index_select(&index, 0)?;
        }
        Ok(())
    }
}

/// Keys and values of every layer of a model for the positions seen so far; owned by the caller.
#[derive(Debug, Clone)]
pub struct KvCaches(Vec<KvCache>);

impl KvCaches {
    /// Nothing seen yet, for a model of `layers`.
    #[must_use]
    pub fn new(layers: usize) -> Self {
        Self(vec![KvCache::default(); layers])
    }

    /// The cache of layer `index`, which the model has.
    pub fn layer(&mut self, index: usize) -> &mut KvCache {
        &mut self.0[index]
    }

    /// Number of positions held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.first().map_or(0, KvCache::len)
    }

    /// Whether no position has been seen yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Makes row `i` a copy of the present row `rows[i]`; beams change places.
    ///
    /// # Errors
    /// A row that isn't there.
    pub fn reorder(&mut self, rows: &[u32]) -> Result<()> {
        self.0.iter_mut().try_for_each(|cache| cache.reorder(rows))
    }
}

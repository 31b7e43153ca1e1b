//! Keys and values of one attention layer, owned by the caller.

use std::borrow::Cow;

use blip2_ops::{DropoutKey, Heads, Segment, attention, cached_attention};
use candle_core::Tensor;

use crate::{Error, Result};

/// The keys and values one layer has seen, each (b, t, width): a list of what was written, into which rows point. Beams
/// that change places move pointers, and a prompt that several beams go on from is held once. Empty at first.
///
/// Gradients flow through it: stage 1's text generation (ITG) trains the queries through their cached keys and values.
#[derive(Debug, Clone, Default)]
pub struct KvCache {
    segments: Vec<Segment>,
}

impl KvCache {
    /// A cache that holds keys and values (b, t, width).
    ///
    /// # Errors
    /// If they are no such tensors.
    pub fn holding(k: Tensor, v: Tensor) -> Result<Self> {
        let mut cache = Self::default();
        cache.append(k, v)?;
        Ok(cache)
    }

    /// Adds keys and values (b, t, width) of new positions.
    ///
    /// # Errors
    /// If there are not as many rows as before.
    pub fn append(&mut self, k: Tensor, v: Tensor) -> Result<()> {
        let (b, _, _) = k.dims3()?;
        if self.segments.first().is_some_and(|held| held.rows.len() != b) {
            return Err(Error::Config(format!(
                "{b} rows of keys behind {} rows in the cache",
                self.rows()
            )));
        }
        self.segments.push(Segment { k, v, rows: (0..b as u32).collect() });
        Ok(())
    }

    /// Attention of `q` (b, t, heads·d) to everything held; `bias` broadcasts to (b, heads, t, held).
    ///
    /// # Errors
    /// If shapes don't fit, or nothing is held.
    pub fn attend(
        &self,
        q: &Tensor,
        bias: Option<&Tensor>,
        heads: Heads,
        dropout: Option<DropoutKey>,
    ) -> Result<Tensor> {
        let tracked = self.segments.iter().any(|s| s.k.track_op() || s.v.track_op());
        if q.dim(1)? == 1 && dropout.is_none() && !tracked && !q.track_op() {
            return Ok(cached_attention(q, &self.segments, bias, heads)?);
        }
        let (k, v) = (self.joined(|s| &s.k)?, self.joined(|s| &s.v)?);
        Ok(attention(q, &k, &v, bias, heads, dropout)?)
    }

    /// Everything held as one tensor (b, t, width).
    fn joined(&self, part: impl Fn(&Segment) -> &Tensor) -> Result<Tensor> {
        let parts = self
            .segments
            .iter()
            .map(|s| match is_identity(s) {
                true => Ok(Cow::Borrowed(part(s))),
                false => {
                    let rows = Tensor::new(&*s.rows, part(s).device())?;
                    Ok(Cow::Owned(part(s).index_select(&rows, 0)?))
                }
            })
            .collect::<Result<Vec<_>>>()?;
        match &*parts {
            [only] => Ok(only.as_ref().clone()),
            several => Ok(Tensor::cat(several, 1)?),
        }
    }

    /// The number of positions held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.segments.iter().map(|s| s.k.dims()[1]).sum()
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The number of rows; 0 if nothing is held.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.segments.first().map_or(0, |s| s.rows.len())
    }

    /// Row `i` becomes what row `rows[i]` was: beams change places, or one row becomes several.
    ///
    /// # Errors
    /// If a row is out of range.
    pub fn reorder(&mut self, rows: &[u32]) -> Result<()> {
        for segment in &mut self.segments {
            let held = |row: &u32| segment.rows.get(*row as usize).copied();
            segment.rows = rows.iter().map(held).collect::<Option<_>>().ok_or_else(|| {
                Error::Config(format!("rows {rows:?} of a cache of {}", segment.rows.len()))
            })?;
        }
        Ok(())
    }
}

/// Whether every row points to the row of its own number, and each is pointed to.
fn is_identity(segment: &Segment) -> bool {
    segment.rows.len() == segment.k.dims()[0]
        && segment.rows.iter().enumerate().all(|(i, row)| i == *row as usize)
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

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    const HEADS: Heads = Heads { heads: 4, kv_heads: 2, scale: 0.7 };

    fn numbers(seed: f32, shape: &[usize]) -> Tensor {
        let n: usize = shape.iter().product();
        let values: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37 + seed).sin()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// Two prompts, of which one becomes two beams, then beams that change places: as if everything had been copied.
    #[test]
    fn pointers_equal_copies() {
        let mut cache =
            KvCache::holding(numbers(1.0, &[2, 3, 6]), numbers(2.0, &[2, 3, 6])).unwrap();
        let mut copies = (numbers(1.0, &[2, 3, 6]), numbers(2.0, &[2, 3, 6]));
        for (step, rows) in [[1u32, 1, 0], [0, 2, 1], [2, 2, 0], [1, 0, 0]].iter().enumerate() {
            cache.reorder(rows).unwrap();
            let index = Tensor::new(rows, &Device::Cpu).unwrap();
            let (k, v) =
                (numbers(step as f32 + 3.0, &[3, 1, 6]), numbers(step as f32 + 9.0, &[3, 1, 6]));
            let grow = |held: &Tensor, new: &Tensor| {
                Tensor::cat(&[&held.index_select(&index, 0).unwrap(), new], 1).unwrap()
            };
            copies = (grow(&copies.0, &k), grow(&copies.1, &v));
            cache.append(k, v).unwrap();
            assert_eq!((cache.len(), cache.rows()), (4 + step, 3));
            let q = numbers(step as f32 + 5.0, &[3, 1, 12]);
            for bias in [None, Some(numbers(0.3, &[3, 1, 1, 4 + step]))] {
                let found = cache.attend(&q, bias.as_ref(), HEADS, None).unwrap();
                let expected =
                    attention(&q, &copies.0, &copies.1, bias.as_ref(), HEADS, None).unwrap();
                let worst = (found - expected).unwrap().abs().unwrap().max_all().unwrap();
                assert!(worst.to_scalar::<f32>().unwrap() < 1e-6);
            }
        }
        // Several new positions at a time, the way prompts are read.
        let q = numbers(7.0, &[3, 2, 12]);
        let found = cache.attend(&q, None, HEADS, None).unwrap();
        let expected = attention(&q, &copies.0, &copies.1, None, HEADS, None).unwrap();
        let worst = (found - expected).unwrap().abs().unwrap().max_all().unwrap();
        assert!(worst.to_scalar::<f32>().unwrap() < 1e-6);
    }

    #[test]
    fn rows_that_are_not_there_are_refused() {
        let mut cache =
            KvCache::holding(numbers(1.0, &[2, 3, 6]), numbers(2.0, &[2, 3, 6])).unwrap();
        let error = cache.reorder(&[0, 2]).unwrap_err().to_string();
        assert!(error.contains("[0, 2]") && error.contains("of 2"), "{error}");
        let error = cache.append(numbers(1.0, &[3, 1, 6]), numbers(1.0, &[3, 1, 6])).unwrap_err();
        assert!(error.to_string().contains("3 rows of keys behind 2 rows"), "{error}");
        assert!(KvCache::default().attend(&numbers(1.0, &[1, 1, 12]), None, HEADS, None).is_err());
    }
}

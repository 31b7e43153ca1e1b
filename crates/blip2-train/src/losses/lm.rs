//! The language-model loss: each token is predicted from those before it. Stage 1's text generation (ITG) and stage 2.

use candle_core::{Device, Tensor};

use crate::{Error, Result};

/// Which rows of the hidden states predict a token, and which token: padding and prompt are left out before the
/// vocabulary product, not after it.
#[derive(Debug, Clone, Default)]
pub struct Targets {
    rows: Vec<u32>,
    tokens: Vec<u32>,
}

impl Targets {
    /// From labels, one row per text, `None` where nothing is to be predicted. The label at position t is predicted from
    /// the hidden state at t − 1, so the first label of a row is never used.
    #[must_use]
    pub fn shifted(labels: &[Vec<Option<u32>>]) -> Self {
        let mut targets = Self::default();
        let mut start = 0;
        for row in labels {
            for (t, label) in row.iter().enumerate().skip(1) {
                if let Some(token) = label {
                    targets.push(start + t - 1, *token);
                }
            }
            start += row.len();
        }
        targets
    }

    /// One more token, to be predicted from row `row` of the hidden states, all texts' rows counted through.
    pub fn push(&mut self, row: usize, token: u32) {
        self.rows.push(row as u32);
        self.tokens.push(token);
    }

    /// The tokens to predict, one for each selected row.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The predicting rows of `hidden` (b, t, w): (m, w), m = number of targets.
    ///
    /// # Errors
    /// If there is no target at all.
    pub fn select(&self, hidden: &Tensor) -> Result<Tensor> {
        if self.rows.is_empty() {
            return Err(Error::Data("a batch holds no token to predict".into()));
        }
        let (b, t, w) = hidden.dims3()?;
        let rows = Tensor::new(self.rows.as_slice(), &Device::Cpu)?;
        Ok(hidden.reshape((b * t, w))?.index_select(&rows, 0)?)
    }
}

/// Mean cross-entropy of `logits` (m, vocabulary) for the m tokens to predict.
///
/// # Errors
/// If the number of rows is another.
pub fn lm(logits: &Tensor, tokens: &[u32], smoothing: f32) -> Result<Tensor> {
    Ok(blip2_ops::cross_entropy(logits, tokens, smoothing)?)
}

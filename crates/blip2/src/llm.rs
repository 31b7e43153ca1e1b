//! The frozen language model behind one enum, and its decoding step by step.
//!
//! Stage 2 sees no family: it embeds ids, puts projected queries in front, and asks for hidden states
//! and logits. A new family is a new variant here; the compiler then lists what it has to do. Models
//! that read the prompt with an encoder of their own fit as well: only [`LlmDecoder`] knows whether
//! the prompt fills a decoder's cache or an encoder.

use std::path::Path;

use blip2_ops::WeightFormat;
use candle_core::{Device, Tensor};

use crate::generate::StepModel;
use crate::llama::{Gguf, KvCaches, Llama, LlamaConfig};
use crate::nn::mask::Branch;
use crate::tokenizer::{SpecialIds, Tokenizer};
use crate::{Error, Result, params};

/// A frozen language model.
#[derive(Clone)]
pub enum Llm {
    /// LLaMA family: SmolLM2, Vicuna, …
    Llama(Llama),
}

impl Llm {
    /// Opens a language model by what `path` is: a GGUF file, which carries its tokenizer, or a folder
    /// in Hugging Face layout (`config.json`, `model.safetensors`, `tokenizer.json`). Without a
    /// `format` the matrices of a GGUF file stay as stored, those of a folder are kept in f32.
    ///
    /// # Errors
    /// A file that is missing, broken, or of a family not known here; see [`Llama::from_gguf`],
    /// [`Llama::from_hf`] and [`Tokenizer`].
    pub fn open(path: &Path, format: Option<WeightFormat>) -> Result<(Self, Tokenizer)> {
        let (llama, tokenizer) = if path.is_dir() {
            open_folder(path, format.unwrap_or(WeightFormat::F32))?
        } else {
            let gguf = Gguf::open(path)?;
            let tokenizer = Tokenizer::from_gguf(gguf.metadata())
                .map_err(|e| Error::file(path, e.to_string()))?;
            (Llama::from_gguf(&gguf, format)?, tokenizer)
        };
        let (ids, rows) = (tokenizer.vocab_size(), llama.config().vocab_size);
        if ids > rows {
            return Err(Error::file(path, format!("{ids} token ids but {rows} embeddings")));
        }
        Ok((Self::Llama(llama), tokenizer))
    }

    /// Width of a token's embedding, `d`.
    pub fn width(&self) -> usize {
        match self {
            Self::Llama(llama) => llama.config().width,
        }
    }

    /// Number of logits per position, `v`.
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Llama(llama) => llama.config().vocab_size,
        }
    }

    /// Most positions, prompt and generated text together.
    pub fn max_len(&self) -> usize {
        match self {
            Self::Llama(llama) => llama.config().max_len,
        }
    }

    /// Id that starts a text, if the model has one.
    pub fn bos(&self) -> Option<u32> {
        match self {
            Self::Llama(llama) => llama.config().bos,
        }
    }

    /// Id that ends a text.
    pub fn eos(&self) -> u32 {
        match self {
            Self::Llama(llama) => llama.config().eos,
        }
    }

    /// Bytes held by the matrices.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Llama(llama) => llama.bytes(),
        }
    }

    /// An empty cache for [`Self::hidden`].
    pub fn new_cache(&self) -> KvCaches {
        match self {
            Self::Llama(llama) => llama.new_cache(),
        }
    }

    /// Ids `(b, t)` u32 to embeddings `(b, t, d)`; no gradient.
    ///
    /// # Errors
    /// An id outside the vocabulary.
    pub fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        match self {
            Self::Llama(llama) => llama.embed(ids),
        }
    }

    /// Embeddings `(b, t, d)` to hidden states `(b, t, d)`, see [`Llama::forward_embeds`]. The
    /// gradient flows to `x`.
    ///
    /// # Errors
    /// Shapes that don't fit, or more positions than the model knows.
    pub fn hidden(
        &self,
        x: &Tensor,
        mask: &[Vec<bool>],
        cache: Option<&mut KvCaches>,
    ) -> Result<Tensor> {
        match self {
            Self::Llama(llama) => llama.forward_embeds(x, mask, cache),
        }
    }

    /// [`Self::hidden`] of rows in which several texts share a beginning, see [`Llama::forward_branches`].
    ///
    /// # Errors
    /// Shapes that don't fit, or more positions than the model knows.
    pub fn hidden_branches(&self, x: &Tensor, branches: &[Vec<Branch>]) -> Result<Tensor> {
        match self {
            Self::Llama(llama) => llama.forward_branches(x, branches),
        }
    }

    /// Root mean square of the embeddings' elements: how large a soft word should be to look like a word.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn embedding_rms(&self) -> Result<f64> {
        let Self::Llama(llama) = self;
        llama.embedding_rms()
    }

    /// Hidden states `(…, d)` to logits `(…, v)`. Select the positions that matter first.
    ///
    /// # Errors
    /// Another width than the model's.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        match self {
            Self::Llama(llama) => llama.logits(hidden),
        }
    }
}

/// A LLaMA in Hugging Face layout.
fn open_folder(folder: &Path, format: WeightFormat) -> Result<(Llama, Tokenizer)> {
    let [config, json, weights] =
        ["config.json", "tokenizer.json", "model.safetensors"].map(|name| folder.join(name));
    let text = std::fs::read_to_string(&config).map_err(Error::io(&config))?;
    let shape = LlamaConfig::from_hf(&text).map_err(|e| Error::file(&config, e.to_string()))?;
    let bytes = std::fs::read(&json).map_err(Error::io(&json))?;
    let special = SpecialIds { bos: shape.bos, eos: shape.eos, pad: shape.eos };
    let tokenizer =
        Tokenizer::from_json(&bytes, special).map_err(|e| Error::file(&json, e.to_string()))?;
    let llama = Llama::from_hf(shape, &params::read_file(&weights)?, format)
        .map_err(|e| Error::file(&weights, e.to_string()))?;
    Ok((llama, tokenizer))
}

/// Decodes what follows a prompt of embeddings. The prompt is computed once per row; beams and
/// samples copy its keys and values.
pub struct LlmDecoder<'a> {
    llm: &'a Llm,
    prompt: Tensor,
    mask: Vec<Vec<bool>>,
    cache: KvCaches,
}

impl<'a> LlmDecoder<'a> {
    /// `prompt` `(b, t, d)`, `mask` `b` rows of `t`: true where the prompt holds something. Padding
    /// may be anywhere; each row needs one position that is not.
    ///
    /// # Errors
    /// A mask of another shape than the prompt, or a row of padding only.
    pub fn new(llm: &'a Llm, prompt: Tensor, mask: Vec<Vec<bool>>) -> Result<Self> {
        let (b, t, _) = prompt.dims3()?;
        if mask.len() != b || mask.iter().any(|row| row.len() != t) {
            return Err(Error::Config(format!(
                "a mask of {} rows of {} for a prompt of {b} rows of {t}",
                mask.len(),
                mask.first().map_or(0, Vec::len)
            )));
        }
        if let Some(row) = mask.iter().position(|row| !row.contains(&true)) {
            return Err(Error::Config(format!("row {row} of the prompt is empty")));
        }
        Ok(Self { llm, prompt, mask, cache: llm.new_cache() })
    }
}

impl StepModel for LlmDecoder<'_> {
    fn start(&mut self) -> Result<Tensor> {
        self.cache = self.llm.new_cache();
        // Decoding needs no gradient; with a tracked prompt the cache would keep the graph alive.
        let prompt = self.prompt.detach();
        let hidden = self.llm.hidden(&prompt, &self.mask, Some(&mut self.cache))?;
        let (b, t, d) = hidden.dims3()?;
        // The last position that holds something; with left padding that is the last column.
        let last = |row: &Vec<bool>| row.iter().rposition(|visible| *visible).unwrap_or(t - 1);
        let rows: Vec<u32> =
            self.mask.iter().enumerate().map(|(i, row)| (i * t + last(row)) as u32).collect();
        let rows = Tensor::from_vec(rows, b, &Device::Cpu)?;
        self.llm.logits(&hidden.reshape((b * t, d))?.index_select(&rows, 0)?)
    }

    fn step(&mut self, ids: &[u32]) -> Result<Tensor> {
        let ids = Tensor::from_slice(ids, (ids.len(), 1), &Device::Cpu)?;
        for row in &mut self.mask {
            row.push(true);
        }
        let x = self.llm.embed(&ids)?;
        let hidden = self.llm.hidden(&x, &self.mask, Some(&mut self.cache))?; // (rows, 1, d)
        self.llm.logits(&hidden.squeeze(1)?)
    }

    fn reorder(&mut self, rows: &[usize]) -> Result<()> {
        if let Some(row) = rows.iter().find(|row| **row >= self.mask.len()) {
            return Err(Error::Config(format!("row {row} of {} asked for", self.mask.len())));
        }
        self.mask = rows.iter().map(|row| self.mask[*row].clone()).collect();
        let rows: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
        self.cache.reorder(&rows)
    }
}

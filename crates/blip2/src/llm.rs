//! The frozen language model behind one enum, and its decoding step by step.
//!
//! Stage 2 sees no family: it embeds ids, puts projected queries in front, and asks for hidden states
//! and logits. A new family is a new variant here; the compiler then lists what it has to do. Models
//! that read the prompt with an encoder of their own fit as well: only [`LlmDecoder`] knows whether
//! the prompt fills a decoder's cache or an encoder.

use std::collections::BTreeMap;
use std::path::Path;

use blip2_ops::{FrozenWeight, WeightFormat};
use candle_core::{Device, Tensor};
use serde::Deserialize as _;

use crate::generate::StepModel;
use crate::llama::{Gguf, Llama, LlamaConfig};
use crate::nn::KvCaches;
use crate::nn::mask::{Branch, Layout};
use crate::opt::{Opt, OptConfig};
use crate::params::Params;
use crate::stored::Stored;
use crate::t5::{Memory, T5, T5Config};
use crate::tokenizer::{SpecialIds, Tokenizer};
use crate::{Error, Result, checkpoint, shards};

/// A frozen language model.
pub enum Llm {
    /// LLaMA family: SmolLM2, Vicuna, …
    Llama(Llama),
    /// OPT.
    Opt(Opt),
    /// T5 v1.1, FlanT5.
    T5(T5),
}

impl Llm {
    /// Opens a language model by what `path` is: a GGUF file, which carries its tokenizer, or a folder
    /// in Hugging Face layout (`config.json`, weights in one or several safetensors files, `tokenizer.json`). Without a
    /// `format` the matrices of a GGUF file stay as stored, those of a folder keep their values: f16 as f16, others as f32.
    ///
    /// # Errors
    /// A file that is missing, broken, or of a family not known here; see [`Llama::from_gguf`], [`Self::from_hf`] and
    /// [`Tokenizer`].
    pub fn open(path: &Path, format: Option<WeightFormat>) -> Result<(Self, Tokenizer)> {
        let (llm, tokenizer) = if path.is_dir() {
            open_folder(path, format)?
        } else {
            let gguf = Gguf::open(path)?;
            let tokenizer = Tokenizer::from_gguf(gguf.metadata())
                .map_err(|e| Error::file(path, e.to_string()))?;
            (Self::Llama(Llama::from_gguf(&gguf, format)?), tokenizer)
        };
        llm.check_tokenizer(&tokenizer, path)?;
        Ok((llm, tokenizer))
    }

    /// Builds the model that a Hugging Face `config.json` (of the language model alone) describes from tensors under
    /// transformers' names; `origin` is named in errors.
    ///
    /// # Errors
    /// A family not known here, a configuration out of range, or tensors that don't fit.
    pub fn from_hf(
        config: &serde_json::Value,
        tensors: BTreeMap<String, Stored>,
        format: impl Into<Option<WeightFormat>>,
        origin: &Path,
    ) -> Result<Self> {
        let format = format.into();
        let wrong = |e: Error| Error::file(origin, e.to_string());
        match config["model_type"].as_str() {
            Some("llama") => {
                let shape = LlamaConfig::from_hf(&config.to_string()).map_err(wrong)?;
                Ok(Self::Llama(Llama::from_hf(shape, &tensors, format).map_err(wrong)?))
            }
            Some("opt") => {
                let shape = OptConfig::deserialize(config)
                    .map_err(|e| wrong(Error::Config(e.to_string())))?;
                let tensors = checkpoint::from_hf_opt(tensors).map_err(wrong)?;
                let opt = Params::build(tensors, format, &origin.to_string_lossy(), |p| {
                    Opt::new(p, &shape)
                })?;
                Ok(Self::Opt(opt))
            }
            Some("t5") => {
                let shape = T5Config::deserialize(config)
                    .map_err(|e| wrong(Error::Config(e.to_string())))?;
                let tensors = checkpoint::from_hf_t5(tensors).map_err(wrong)?;
                let t5 = Params::build(tensors, format, &origin.to_string_lossy(), |p| {
                    T5::new(p, &shape)
                })?;
                Ok(Self::T5(t5))
            }
            other => Err(wrong(Error::Config(format!(
                "a language model of the family {other:?}; known are llama, opt and t5"
            )))),
        }
    }

    /// Refuses a tokenizer that has ids without an embedding.
    ///
    /// # Errors
    /// If it has.
    pub fn check_tokenizer(&self, tokenizer: &Tokenizer, origin: &Path) -> Result<()> {
        let (ids, rows) = (tokenizer.vocab_size(), self.words().shape().0);
        if ids > rows {
            return Err(Error::file(origin, format!("{ids} token ids but {rows} embeddings")));
        }
        Ok(())
    }

    fn words(&self) -> &FrozenWeight {
        match self {
            Self::Llama(llama) => llama.words(),
            Self::Opt(opt) => opt.words(),
            Self::T5(t5) => t5.words(),
        }
    }

    /// Width of a token as the blocks see it, `d`.
    pub fn width(&self) -> usize {
        match self {
            Self::Llama(llama) => llama.config().width,
            Self::Opt(opt) => opt.config().hidden_size,
            Self::T5(t5) => t5.config().d_model,
        }
    }

    /// Number of logits per position, `v`.
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Llama(llama) => llama.config().vocab_size,
            Self::Opt(opt) => opt.num_logits(),
            Self::T5(t5) => t5.num_logits(),
        }
    }

    /// Whether an encoder reads the prompt, end token included, and a decoder writes.
    pub fn has_encoder(&self) -> bool {
        matches!(self, Self::T5(_))
    }

    /// Id that starts a text, if the model has one.
    pub fn bos(&self) -> Option<u32> {
        match self {
            Self::Llama(llama) => llama.config().bos,
            Self::Opt(opt) => Some(opt.config().bos_token_id),
            Self::T5(_) => None,
        }
    }

    /// Id that ends a text.
    pub fn eos(&self) -> u32 {
        match self {
            Self::Llama(llama) => llama.config().eos,
            Self::Opt(opt) => opt.config().eos_token_id,
            Self::T5(t5) => t5.config().eos_token_id,
        }
    }

    /// Bytes of the keys and values that the decoder keeps of a token, its own or one of the prompt.
    pub fn cache_bytes(&self) -> usize {
        let (layers, width) = match self {
            Self::Llama(llama) => {
                let config = llama.config();
                (config.depth, config.num_kv_heads * config.head_width)
            }
            Self::Opt(opt) => (opt.config().num_hidden_layers, opt.config().hidden_size),
            Self::T5(t5) => {
                let config = t5.config();
                let layers = config.num_decoder_layers.unwrap_or(config.num_layers);
                (layers, config.num_heads * config.d_kv)
            }
        };
        2 * layers * width * size_of::<f32>()
    }

    /// An empty cache for [`Self::hidden`].
    pub fn new_cache(&self) -> KvCaches {
        match self {
            Self::Llama(llama) => llama.new_cache(),
            Self::Opt(opt) => opt.new_cache(),
            Self::T5(_) => KvCaches::new(0),
        }
    }

    /// Ids `(b, t)` u32 to embeddings `(b, t, d)`; no gradient.
    ///
    /// # Errors
    /// An id outside the vocabulary.
    pub fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        let (b, t) = ids.dims2()?;
        let flat: Vec<u32> = ids.flatten_all()?.to_vec1()?;
        let (vocab, width) = self.words().shape();
        if let Some(id) = flat.iter().find(|id| **id as usize >= vocab) {
            return Err(Error::Config(format!(
                "token id {id} is outside the vocabulary of {vocab}"
            )));
        }
        let words = self.words().rows(&flat)?.reshape((b, t, width))?;
        match self {
            Self::Llama(_) | Self::T5(_) => Ok(words),
            Self::Opt(opt) => opt.widen(words),
        }
    }

    /// Root mean square of the word embeddings' elements: how large a soft word should be to look like a word.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn embedding_rms(&self) -> Result<f64> {
        // In pieces: the whole table in f32 may be larger than all that is loaded.
        const PIECE: u32 = 4096;
        let (rows, width) = self.words().shape();
        let mut sum = 0.0;
        for first in (0..rows as u32).step_by(PIECE as usize) {
            let ids: Vec<u32> = (first..rows as u32).take(PIECE as usize).collect();
            let values = self.words().rows(&ids)?.flatten_all()?.to_vec1::<f32>()?;
            sum += values.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>();
        }
        Ok((sum / (rows * width) as f64).sqrt())
    }

    /// Embeddings `(b, t, d)` to hidden states `(b, t, d)` after the last norm. The gradient flows to `x`.
    ///
    /// `visible` has a row of `s` per row of `x`: whether each position, cached ones first, holds something; see
    /// [`Layout::causal`]. What comes out at padding means nothing.
    ///
    /// # Errors
    /// Shapes that don't fit, or more positions than the model knows.
    pub fn hidden(
        &self,
        x: &Tensor,
        visible: &[Vec<bool>],
        cache: Option<&mut KvCaches>,
    ) -> Result<Tensor> {
        let cached = cache.as_ref().map_or(0, |cache| cache.len());
        self.run(x, &Layout::causal(x, visible, cached)?, cache)
    }

    /// [`Self::hidden`] of rows in which several texts go on from one stem, see [`Layout::branching`].
    ///
    /// # Errors
    /// Shapes that don't fit, or more positions than the model knows.
    pub fn hidden_branches(&self, x: &Tensor, branches: &[Vec<Branch>]) -> Result<Tensor> {
        self.run(x, &Layout::branching(x, branches)?, None)
    }

    fn run(&self, x: &Tensor, layout: &Layout, cache: Option<&mut KvCaches>) -> Result<Tensor> {
        match self {
            Self::Llama(llama) => llama.forward(x, layout, cache),
            Self::Opt(opt) => opt.forward(x, layout, cache),
            Self::T5(_) => Err(Error::Config(
                "T5 reads with an encoder and writes with a decoder, not both in one row".into(),
            )),
        }
    }

    /// Hidden states `(…, d)` to logits `(…, v)`. Select the positions that matter first.
    ///
    /// # Errors
    /// Another width than the model's.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        match self {
            Self::Llama(llama) => llama.logits(hidden),
            Self::Opt(opt) => opt.logits(hidden),
            Self::T5(t5) => t5.logits(hidden),
        }
    }
}

/// A language model in Hugging Face layout.
fn open_folder(folder: &Path, format: Option<WeightFormat>) -> Result<(Llm, Tokenizer)> {
    let config = folder.join("config.json");
    let text = std::fs::read(&config).map_err(Error::io(&config))?;
    let value: serde_json::Value =
        serde_json::from_slice(&text).map_err(|e| Error::file(&config, e.to_string()))?;
    let llm = Llm::from_hf(&value, shards::open(folder)?, format, folder)?;
    let tokenizer = tokenizer_of(folder, &value)?;
    Ok((llm, tokenizer))
}

/// The tokenizer of a language model in Hugging Face layout, whose `config.json` holds `config`.
///
/// # Errors
/// If there is neither a `tokenizer.json` nor OPT's `vocab.json` and `merges.txt`, they are broken, or a special id is
/// not in them.
pub fn tokenizer_of(folder: &Path, config: &serde_json::Value) -> Result<Tokenizer> {
    let path = folder.join("tokenizer.json");
    let special = special_ids(config).map_err(|err| Error::file(&path, err.to_string()))?;
    let read = |path: &Path| std::fs::read(path).map_err(Error::io(path));
    let vocab = folder.join("vocab.json");
    if config["model_type"] == "opt" && !path.exists() && vocab.exists() {
        let merges = folder.join("merges.txt");
        let text = String::from_utf8_lossy(&read(&merges)?).into_owned();
        let made = Tokenizer::from_gpt2(&read(&vocab)?, &text, special);
        let made = made.map_err(|err| Error::file(&vocab, err.to_string()))?;
        return ending_with_a_line(made, config);
    }
    let made = Tokenizer::from_json(&read(&path)?, special);
    ending_with_a_line(made.map_err(|err| Error::file(&path, err.to_string()))?, config)
}

/// OPT as it was published ends a text with the very token that starts one. BLIP-2's ends it with a newline, and so it is
/// trained here, too.
fn ending_with_a_line(tokenizer: Tokenizer, config: &serde_json::Value) -> Result<Tokenizer> {
    let special = tokenizer.special();
    if config["model_type"] != "opt" || special.bos != Some(special.eos) {
        return Ok(tokenizer);
    }
    match tokenizer.encode("\n", false)?[..] {
        [newline] => Ok(tokenizer.with_eos(newline)),
        _ => Ok(tokenizer),
    }
}

/// Ids that end a text of the language model in `folder`, whose tokenizer is `tokenizer`: all that its
/// `generation_config.json` or `config.json` names, if those are several.
///
/// # Errors
/// If one of them can't be read.
pub fn end_ids(folder: &Path, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    for name in ["generation_config.json", "config.json"] {
        let path = folder.join(name);
        if !path.is_file() {
            continue;
        }
        let text = std::fs::read(&path).map_err(Error::io(&path))?;
        let config: serde_json::Value =
            serde_json::from_slice(&text).map_err(|e| Error::file(&path, e.to_string()))?;
        if let Some(ids) = config["eos_token_id"].as_array().filter(|ids| ids.len() > 1) {
            let id = |id: &serde_json::Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
            let found: Option<Vec<u32>> = ids.iter().map(id).collect();
            let wrong = || Error::file(&path, "eos_token_id holds what is no token id");
            return found.ok_or_else(wrong);
        }
    }
    Ok(vec![tokenizer.special().eos])
}

fn special_ids(config: &serde_json::Value) -> Result<SpecialIds> {
    // Models may end with any of several tokens; the first is what training puts there.
    let id = |name: &str| -> Result<Option<u32>> {
        let value = &config[name];
        let id = value.get(0).unwrap_or(value);
        if id.is_null() {
            return Ok(None);
        }
        let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
        let wrong = || Error::Config(format!("config.json: {name} is {id}, which is no token id"));
        number.map(Some).ok_or_else(wrong)
    };
    let (bos, eos, pad) = match config["model_type"].as_str() {
        Some("opt") => (Some(2), Some(2), Some(1)),
        Some("t5") => (None, Some(1), Some(0)),
        Some("llama") => (Some(1), Some(2), None),
        _ => (None, None, None),
    };
    let eos = id("eos_token_id")?.or(eos);
    let eos = eos.ok_or_else(|| Error::Config("config.json names no eos_token_id".into()))?;
    let is_t5 = config["model_type"] == "t5";
    Ok(SpecialIds {
        bos: if is_t5 { None } else { id("bos_token_id")?.or(bos) },
        eos,
        pad: id("pad_token_id")?.or(pad).unwrap_or(eos),
    })
}

/// Decodes what follows a prompt of embeddings. The prompt is computed once per row; beams and
/// samples copy its keys and values.
pub struct LlmDecoder<'a> {
    llm: &'a Llm,
    prompt: Tensor,
    mask: Vec<Vec<bool>>,
    seen: Seen,
    /// Per row, what the decoder has before the first new id.
    prompt_ids: Vec<Vec<u32>>,
}

/// What has been read and written so far.
enum Seen {
    /// One cache holds prompt and text.
    Cache(KvCaches),
    /// An encoder has read the prompt; none before the start.
    Memory(Option<Memory>),
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
        let (seen, start_ids) = match llm {
            Llm::T5(t5) => (Seen::Memory(None), vec![t5.config().decoder_start_token_id]),
            Llm::Llama(_) | Llm::Opt(_) => (Seen::Cache(llm.new_cache()), Vec::new()),
        };
        Ok(Self { llm, prompt, mask, seen, prompt_ids: vec![start_ids; b] })
    }

    /// Says which ids the embeddings of each row's prompt stand for: to a decoder without encoder they are part of the text
    /// that the repetition penalty looks at.
    #[must_use]
    pub fn with_prompt_ids(self, ids: Vec<Vec<u32>>) -> Self {
        if self.llm.has_encoder() { self } else { Self { prompt_ids: ids, ..self } }
    }

    /// A decoder reads the prompt: logits behind the last position of each row that holds something.
    fn read_prompt(&mut self) -> Result<Tensor> {
        let mut cache = self.llm.new_cache();
        // Decoding needs no gradient; with a tracked prompt the cache would keep the graph alive.
        let prompt = self.prompt.detach();
        let hidden = self.llm.hidden(&prompt, &self.mask, Some(&mut cache))?;
        self.seen = Seen::Cache(cache);
        let (b, t, d) = hidden.dims3()?;
        // With left padding that is the last column.
        let last = |row: &Vec<bool>| row.iter().rposition(|visible| *visible).unwrap_or(t - 1);
        let rows: Vec<u32> =
            self.mask.iter().enumerate().map(|(i, row)| (i * t + last(row)) as u32).collect();
        let rows = Tensor::from_vec(rows, b, &Device::Cpu)?;
        self.llm.logits(&hidden.reshape((b * t, d))?.index_select(&rows, 0)?)
    }
}

impl StepModel for LlmDecoder<'_> {
    fn start(&mut self) -> Result<Tensor> {
        let Llm::T5(t5) = self.llm else { return self.read_prompt() };
        let mut memory = t5.encode(&self.prompt.detach(), &self.mask)?;
        let starts = vec![t5.config().decoder_start_token_id; memory.rows()];
        let logits = t5.decode(&starts, &mut memory)?;
        self.seen = Seen::Memory(Some(memory));
        Ok(logits)
    }

    fn step(&mut self, ids: &[u32]) -> Result<Tensor> {
        match (self.llm, &mut self.seen) {
            (Llm::T5(t5), Seen::Memory(Some(memory))) => t5.decode(ids, memory),
            (llm, Seen::Cache(cache)) => {
                let ids = Tensor::from_slice(ids, (ids.len(), 1), &Device::Cpu)?;
                for row in &mut self.mask {
                    row.push(true);
                }
                let hidden = llm.hidden(&llm.embed(&ids)?, &self.mask, Some(cache))?; // (rows, 1, d)
                llm.logits(&hidden.squeeze(1)?)
            }
            _ => Err(Error::Config("a step before the start".into())),
        }
    }

    fn reorder(&mut self, rows: &[usize]) -> Result<()> {
        if let Some(row) = rows.iter().find(|row| **row >= self.mask.len()) {
            return Err(Error::Config(format!("row {row} of {} asked for", self.mask.len())));
        }
        self.mask = rows.iter().map(|row| self.mask[*row].clone()).collect();
        let rows: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
        match &mut self.seen {
            Seen::Cache(cache) => cache.reorder(&rows),
            Seen::Memory(memory) => memory.as_mut().map_or(Ok(()), |memory| memory.reorder(&rows)),
        }
    }

    fn prompt_ids(&self, item: usize) -> &[u32] {
        self.prompt_ids.get(item).map_or(&[], Vec::as_slice)
    }
}

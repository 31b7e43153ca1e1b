//! Text to ids and back.
//!
//! One [`Tokenizer`] for the three kinds of vocabulary in use: BERT's WordPiece (the Q-Former), the
//! byte-level BPE inside a GGUF file (LLaMA family) and any `tokenizer.json`. It knows the special
//! ids a model needs, and pads batches; it knows no model and no prompt format.
//!
//! Special tokens written out in a text (`[SEP]`, `<|im_end|>`) are read as such, as the tokenizers
//! of Python do.

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value;
use candle_core::{Device, Tensor};
use serde_json::{Value as Json, json};
use tokenizers::decoders::wordpiece::WordPiece as WordPieceDecoder;
use tokenizers::models::bpe::BPE;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::{BertNormalizer, Precompiled};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, ModelWrapper, PostProcessorWrapper};

use crate::{Error, Result};

/// Longest text accepted, in characters: far beyond any caption, question or prompt.
pub const MAX_CHARS: usize = 65_536;

/// Text to ids and back.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// What `add_special` puts in front of and behind every text.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    special: SpecialIds,
    /// Whether spaces before punctuation are removed from decoded text.
    clean_up: bool,
}

/// The ids that a model gives a meaning to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpecialIds {
    /// Starts a text to be written; some vocabularies have none.
    pub bos: Option<u32>,
    /// Ends a text.
    pub eos: u32,
    /// Fills the shorter rows of a batch; always masked.
    pub pad: u32,
}

/// Which side of a short row is filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Text first: training.
    Right,
    /// Text last: generation, where the next token follows the last column.
    Left,
}

/// How wide a batch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// As wide as its longest row.
    Longest,
    /// Always the maximal length.
    Max,
}

/// How texts become a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Padding {
    /// Longest row, special tokens among it; the end of a longer text is cut, its suffix kept.
    pub max_len: usize,
    /// Which side is filled.
    pub side: Side,
    /// How wide the batch is.
    pub width: Width,
}

/// Token ids of several texts, padded to one width.
#[derive(Clone, Debug)]
pub struct TextBatch {
    /// `(b, t)` u32.
    pub ids: Tensor,
    /// `b` rows of `t`: true where there is a token, false where there is padding.
    pub mask: Vec<Vec<bool>>,
}

impl TextBatch {
    /// Rows of ids, padded with `pad` to the longest (or to `width`, if that is longer).
    ///
    /// # Errors
    /// No rows at all, or all of them empty.
    pub fn new(rows: &[Vec<u32>], pad: u32, side: Side, width: usize) -> Result<Self> {
        let t = rows.iter().map(Vec::len).max().unwrap_or(0).max(width);
        if t == 0 {
            return Err(Error::Tokenizer("a batch without a single token".into()));
        }
        let mut ids = Vec::with_capacity(rows.len() * t);
        let mut mask = Vec::with_capacity(rows.len());
        for row in rows {
            let fill = t - row.len();
            let before = if side == Side::Left { fill } else { 0 };
            ids.extend(std::iter::repeat_n(pad, before));
            ids.extend(row);
            ids.extend(std::iter::repeat_n(pad, fill - before));
            mask.push((0..t).map(|i| i >= before && i < before + row.len()).collect());
        }
        Ok(Self { ids: Tensor::from_vec(ids, (rows.len(), t), &Device::Cpu)?, mask })
    }

    /// The mask as a `(b, t)` u8 tensor of ones and zeros.
    ///
    /// # Errors
    /// None that a caller can cause.
    pub fn mask_tensor(&self) -> Result<Tensor> {
        let flat: Vec<u8> = self.mask.iter().flatten().map(|m| u8::from(*m)).collect();
        Ok(Tensor::from_vec(flat, self.ids.shape(), &Device::Cpu)?)
    }
}

impl Tokenizer {
    /// BERT's uncased WordPiece from the lines of a `vocab.txt`, with BLIP-2's `[DEC]` added behind
    /// it: `bos` is `[DEC]`, `eos` `[SEP]`. Special tokens around a text: `[CLS]` … `[SEP]`.
    ///
    /// # Errors
    /// Bytes that are not UTF-8, or a vocabulary that lacks one of BERT's special tokens.
    pub fn from_wordpiece_vocab(vocab: &[u8]) -> Result<Self> {
        let vocab = WordPiece::read_bytes(vocab).map_err(|e| refuse("vocab.txt", &e))?;
        let id = |token: &str| {
            vocab.get(token).copied().ok_or_else(|| {
                Error::Tokenizer(format!("vocab.txt ({} lines) has no {token}", vocab.len()))
            })
        };
        let (cls, sep, pad) = (id("[CLS]")?, id("[SEP]")?, id("[PAD]")?);
        id("[UNK]")?;
        id("[MASK]")?;
        let model =
            WordPiece::builder().vocab(vocab).build().map_err(|e| refuse("vocab.txt", &e))?;

        let mut inner = tokenizers::Tokenizer::new(model);
        let normalizer = BertNormalizer::new(true, true, None, true);
        inner.with_normalizer(Some(normalizer)).map_err(|e| refuse("vocab.txt", &e))?;
        inner.with_pre_tokenizer(Some(BertPreTokenizer));
        inner.with_decoder(Some(WordPieceDecoder::new("##".into(), false)));
        add_special(&mut inner, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"])?;
        let special = SpecialIds { bos: inner.token_to_id("[DEC]"), eos: sep, pad };
        Ok(Self { inner, prefix: vec![cls], suffix: vec![sep], special, clean_up: true })
    }

    /// The tokenizer inside a GGUF file: byte-level BPE (`tokenizer.ggml.model` = `gpt2`) with the
    /// splitting rules named by `tokenizer.ggml.pre`. Special tokens around a text: those that
    /// `add_bos_token` and `add_eos_token` ask for.
    ///
    /// # Errors
    /// A kind of tokenizer or a splitting rule not known here, missing or broken metadata.
    pub fn from_gguf(metadata: &HashMap<String, Value>) -> Result<Self> {
        let meta = Metadata(metadata);
        let model = meta.string("tokenizer.ggml.model")?;
        if model != "gpt2" {
            return Err(Error::Tokenizer(format!(
                "tokenizer.ggml.model is {model}; of the kinds in GGUF files only gpt2 is known"
            )));
        }
        let pre: PreTokenizerWrapper = match meta.string("tokenizer.ggml.pre")? {
            // Digits one by one, then GPT-2's own pattern.
            "smollm" => Sequence::new(vec![Digits::new(true).into(), byte_level().into()]).into(),
            "gpt-2" | "default" => byte_level().into(),
            other => {
                return Err(Error::Tokenizer(format!(
                    "tokenizer.ggml.pre is {other}; known are smollm and gpt-2"
                )));
            }
        };
        let tokens = meta.strings("tokenizer.ggml.tokens")?;
        let mut inner = tokenizers::Tokenizer::new(byte_pair_model(&meta, &tokens)?);
        inner.with_pre_tokenizer(Some(pre));
        inner.with_decoder(Some(byte_level()));
        let control = meta.control_tokens(&tokens)?;
        add_special(&mut inner, control)?;

        let size = tokens.len();
        let eos = meta.id("tokenizer.ggml.eos_token_id", size)?.ok_or_else(|| {
            Error::Tokenizer("the GGUF file names no tokenizer.ggml.eos_token_id".into())
        })?;
        let bos = meta.id("tokenizer.ggml.bos_token_id", size)?;
        let pad = meta.id("tokenizer.ggml.padding_token_id", size)?.unwrap_or(eos);
        let prefix = if meta.flag("tokenizer.ggml.add_bos_token") { bos } else { None };
        let suffix = meta.flag("tokenizer.ggml.add_eos_token").then_some(eos);
        Ok(Self {
            inner,
            prefix: prefix.into_iter().collect(),
            suffix: suffix.into_iter().collect(),
            special: SpecialIds { bos, eos, pad },
            clean_up: false,
        })
    }

    /// A Hugging Face `tokenizer.json`. The special tokens around a text are those of its
    /// post-processor; what the special ids mean is not in that file, so the caller says it.
    ///
    /// # Errors
    /// Not a `tokenizer.json`, or a special id that the vocabulary doesn't have.
    pub fn from_json(json: &[u8], special: SpecialIds) -> Result<Self> {
        let refuse = |e: &tokenizers::Error| refuse("tokenizer.json", e);
        let broken = |why: String| Error::Tokenizer(format!("tokenizer.json: {why}"));
        let value: Json = serde_json::from_slice(json).map_err(|e| broken(e.to_string()))?;
        check_normalizer(&value["normalizer"]).map_err(broken)?;
        check_post_processor(&value["post_processor"]).map_err(broken)?;
        let mut inner =
            guarded(|| tokenizers::Tokenizer::from_bytes(json)).map_err(|e| refuse(&e))?;
        // Truncation and padding are ours to do.
        inner.with_truncation(None).map_err(|e| refuse(&e))?;
        inner.with_padding(None);
        check_special(&inner, special, "tokenizer.json")?;
        let (prefix, suffix) = guarded(|| surroundings(&inner)).map_err(|e| refuse(&e))?;
        Ok(Self { inner, prefix, suffix, special, clean_up: false })
    }

    /// GPT-2's byte-level BPE from the texts of a `vocab.json` and a `merges.txt`, as OPT's folders have it: without a
    /// `tokenizer.json`, and with the start token in front of a text. The tokens written `<…>` or `</…>` whose ids are
    /// below four are special.
    ///
    /// # Errors
    /// Not such files, or a special id that the vocabulary doesn't have.
    pub fn from_gpt2(vocab: &[u8], merges_txt: &str, special: SpecialIds) -> Result<Self> {
        let vocab: HashMap<String, u32> = serde_json::from_slice(vocab)
            .map_err(|e| Error::Tokenizer(format!("vocab.json: {e}")))?;
        let lines =
            merges_txt.lines().filter(|line| !line.is_empty() && !line.starts_with("#version"));
        let merges = merges(lines, |token| vocab.contains_key(token))?;
        let control: Vec<String> = vocab
            .iter()
            .filter(|(token, id)| **id < 4 && token.starts_with('<') && token.ends_with('>'))
            .map(|(token, _)| token.clone())
            .collect();
        let mut inner = tokenizers::Tokenizer::new(BPE::new(vocab.into_iter().collect(), merges));
        inner.with_pre_tokenizer(Some(byte_level()));
        inner.with_decoder(Some(byte_level()));
        add_special(&mut inner, control)?;
        check_special(&inner, special, "vocab.json")?;
        let prefix = special.bos.into_iter().collect();
        Ok(Self { inner, prefix, suffix: Vec::new(), special, clean_up: false })
    }

    /// This tokenizer, with another token that ends a text.
    #[must_use]
    pub fn with_eos(self, eos: u32) -> Self {
        Self { special: SpecialIds { eos, ..self.special }, ..self }
    }

    /// The ids of `text`, with the model's special tokens around them if `special` says so.
    ///
    /// # Errors
    /// A text of more than [`MAX_CHARS`] characters.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let chars = text.chars().count();
        if chars > MAX_CHARS {
            return Err(Error::Tokenizer(format!(
                "a text of {chars} characters; at most {MAX_CHARS} are accepted"
            )));
        }
        let encoding = guarded(|| self.inner.encode_fast(text, false))
            .map_err(|e| Error::Tokenizer(format!("can't encode a text: {e}")))?;
        let ids = encoding.get_ids();
        if !special {
            return Ok(ids.to_vec());
        }
        Ok([&self.prefix, ids, &self.suffix].concat())
    }

    /// The ids of several texts as one padded batch, see [`Padding`].
    ///
    /// # Errors
    /// No text at all, a text of more than [`MAX_CHARS`] characters, or a `max_len` that leaves no
    /// room beside the special tokens.
    pub fn encode_batch<S: AsRef<str>>(
        &self,
        texts: &[S],
        special: bool,
        padding: Padding,
    ) -> Result<TextBatch> {
        let around = if special { self.prefix.len() + self.suffix.len() } else { 0 };
        if padding.max_len <= around {
            return Err(Error::Tokenizer(format!(
                "max_len {} leaves no room beside {around} special tokens",
                padding.max_len
            )));
        }
        let mut rows = Vec::with_capacity(texts.len());
        for text in texts {
            let mut ids = self.encode(text.as_ref(), false)?;
            ids.truncate(padding.max_len - around);
            rows.push(if special { [&self.prefix, &ids, &self.suffix[..]].concat() } else { ids });
        }
        let width = match padding.width {
            Width::Longest => 0,
            Width::Max => padding.max_len,
        };
        TextBatch::new(&rows, self.special.pad, padding.side, width)
    }

    /// The text of `ids`. Ids outside the vocabulary are left out; bytes that are not UTF-8 become
    /// replacement characters.
    ///
    /// # Errors
    /// A decoder that fails; none of ours does.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let text = guarded(|| self.inner.decode(ids, skip_special))
            .map_err(|e| Error::Tokenizer(format!("can't decode {} ids: {e}", ids.len())))?;
        Ok(if self.clean_up { clean_up(&text) } else { text })
    }

    /// As a `tokenizer.json`, its post-processor putting the special tokens around a text.
    ///
    /// # Errors
    /// None that a caller can cause.
    pub fn to_json(&self) -> Result<String> {
        let broken = |e: &dyn std::fmt::Display| Error::Tokenizer(format!("can't be written: {e}"));
        let json = self.inner.to_string(false).map_err(|e| broken(&e))?;
        if self.inner.get_post_processor().is_some() {
            return Ok(json);
        }
        let mut value: Json = serde_json::from_str(&json).map_err(|e| broken(&e))?;
        value["post_processor"] = self.template();
        Ok(value.to_string())
    }

    /// The same tokenizer with `prefix` in front of every text, and nothing behind it.
    #[must_use]
    pub fn with_prefix(&self, prefix: Vec<u32>) -> Self {
        let mut inner = self.inner.clone();
        inner.with_post_processor(None::<PostProcessorWrapper>);
        Self { inner, prefix, suffix: Vec::new(), ..self.clone() }
    }

    /// What puts the special tokens around a text, as `tokenizer.json` says it.
    fn template(&self) -> Json {
        let name = |id: &u32| self.inner.id_to_token(*id).unwrap_or_default();
        let special =
            |kind: u8| move |id: &u32| json!({"SpecialToken": {"id": name(id), "type_id": kind}});
        let text = |id: &str, kind: u8| {
            let (prefix, suffix) = (self.prefix.iter(), self.suffix.iter().map(special(kind)));
            let prefix: Vec<Json> =
                if kind == 0 { prefix.map(special(0)).collect() } else { Vec::new() };
            let sequence = json!({"Sequence": {"id": id, "type_id": kind}});
            prefix.into_iter().chain([sequence]).chain(suffix).collect::<Vec<_>>()
        };
        let tokens = self
            .prefix
            .iter()
            .chain(&self.suffix)
            .map(|id| (name(id), json!({"id": name(id), "ids": [id], "tokens": [name(id)]})));
        let single = text("A", 0);
        let pair = [single.clone(), text("B", 1)].concat();
        json!({
            "type": "TemplateProcessing",
            "single": single,
            "pair": pair,
            "special_tokens": tokens.collect::<serde_json::Map<_, _>>(),
        })
    }

    /// The special tokens with their ids, in the order of these.
    #[must_use]
    pub fn special_tokens(&self) -> Vec<(u32, String)> {
        let added = self.inner.get_added_tokens_decoder();
        let mut special: Vec<_> = added
            .into_iter()
            .filter(|(_, token)| token.special)
            .map(|(id, token)| (id, token.content))
            .collect();
        special.sort_unstable();
        special
    }

    /// The ids that a model gives a meaning to.
    pub fn special(&self) -> SpecialIds {
        self.special
    }

    /// Number of ids, added tokens among them.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The id of a token spelled as in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The vocabulary's spelling of an id.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }
}

fn refuse(what: &str, error: &tokenizers::Error) -> Error {
    Error::Tokenizer(format!("{what}: {error}"))
}

/// GPT-2's byte alphabet and splitting pattern, no space invented in front.
fn byte_level() -> ByteLevel {
    ByteLevel::new(false, false, true)
}

fn add_special<S: Into<String>>(
    inner: &mut tokenizers::Tokenizer,
    tokens: impl IntoIterator<Item = S>,
) -> Result<()> {
    let tokens: Vec<AddedToken> =
        tokens.into_iter().map(|token| AddedToken::from(token, true)).collect();
    inner
        .add_special_tokens(tokens)
        .map_err(|e| Error::Tokenizer(format!("can't add special tokens: {e}")))?;
    Ok(())
}

/// Runs the library on what a `tokenizer.json` says. Its tables of characters are a compiled automaton, which the library
/// follows without looking where it leads; nothing is changed that a panic could leave half done.
fn guarded<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(run))
        .unwrap_or_else(|_| Err("its tables are damaged".into()))
}

/// Refuses tables of characters that the library would panic on when it reads them.
fn check_normalizer(normalizer: &Json) -> std::result::Result<(), String> {
    if normalizer["type"] == "Precompiled" {
        // From a text, as the library does: it borrows.
        let read = serde_json::from_str::<Precompiled>(&normalizer.to_string()).map(drop);
        return read.map_err(|err| format!("normalizer: {err}"));
    }
    let several = normalizer["normalizers"].as_array();
    several.into_iter().flatten().try_for_each(check_normalizer)
}

/// Refuses templates that the library would panic on when it uses them: a special token that is not described, or a second
/// text around a single one.
fn check_post_processor(processor: &Json) -> std::result::Result<(), String> {
    let special = &processor["special_tokens"];
    for kind in ["single", "pair"] {
        for piece in processor[kind].as_array().into_iter().flatten() {
            let (name, text) = (&piece["SpecialToken"]["id"], &piece["Sequence"]["id"]);
            let described = |name: &str| {
                let len = |field: &str| special[name][field].as_array().map(Vec::len);
                len("ids").is_some() && len("ids") == len("tokens")
            };
            if name.as_str().is_some_and(|name| !described(name)) {
                return Err(format!("post_processor: {kind} has {name}, not in special_tokens"));
            }
            if kind == "single" && text == "B" {
                return Err("post_processor: single has a second text".into());
            }
        }
    }
    let several = processor["processors"].as_array();
    several.into_iter().flatten().try_for_each(check_post_processor)
}

fn check_special(inner: &tokenizers::Tokenizer, special: SpecialIds, file: &str) -> Result<()> {
    for id in [special.bos, Some(special.eos), Some(special.pad)].into_iter().flatten() {
        if inner.id_to_token(id).is_none() {
            return Err(Error::Tokenizer(format!("{file} has no token of id {id}")));
        }
    }
    Ok(())
}

/// What the post-processor puts in front of and behind a text, found by trying it on one.
fn surroundings(inner: &tokenizers::Tokenizer) -> tokenizers::Result<(Vec<u32>, Vec<u32>)> {
    let bare = inner.encode_fast("a", false)?;
    let full = inner.encode_fast("a", true)?;
    let (bare, full) = (bare.get_ids(), full.get_ids());
    let extra = full.len().saturating_sub(bare.len());
    for before in 0..=extra {
        if full[before..].starts_with(bare) {
            return Ok((full[..before].to_vec(), full[before + bare.len()..].to_vec()));
        }
    }
    Err("its post-processor changes the tokens of a text".into())
}

/// The byte-pair model of a GGUF file, its merges checked first: the library would panic on some.
fn byte_pair_model(meta: &Metadata<'_>, tokens: &[&str]) -> Result<ModelWrapper> {
    let mut ids = HashMap::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        if let Some(other) = ids.insert(*token, id) {
            return Err(Error::Tokenizer(format!("token {token:?} has the ids {other} and {id}")));
        }
    }
    let merges = merges(meta.strings("tokenizer.ggml.merges")?, |token| ids.contains_key(token))?;
    let vocab = tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), id as u32));
    Ok(BPE::new(vocab.collect(), merges).into())
}

/// Pairs of tokens from lines `a b`; each must join two known tokens to a third.
fn merges<'a>(
    lines: impl IntoIterator<Item = &'a str>,
    known: impl Fn(&str) -> bool,
) -> Result<Vec<(String, String)>> {
    let mut merges = Vec::new();
    for line in lines {
        let pair = line.split_once(' ');
        let Some((a, b)) = pair.filter(|(a, b)| known(a) && known(b) && known(&format!("{a}{b}")))
        else {
            return Err(Error::Tokenizer(format!(
                "merge {} is {line:?}, which does not join two tokens to a third",
                merges.len()
            )));
        };
        merges.push((a.to_owned(), b.to_owned()));
    }
    Ok(merges)
}

/// Named values of a GGUF header.
struct Metadata<'a>(&'a HashMap<String, Value>);

impl<'a> Metadata<'a> {
    fn get(&self, key: &str) -> Result<&'a Value> {
        self.0.get(key).ok_or_else(|| Error::Tokenizer(format!("the GGUF file has no {key}")))
    }

    fn string(&self, key: &str) -> Result<&'a str> {
        match self.get(key)? {
            Value::String(text) => Ok(text),
            other => Err(wrong_kind(key, other, "a string")),
        }
    }

    fn strings(&self, key: &str) -> Result<Vec<&'a str>> {
        let value = self.get(key)?;
        let Value::Array(values) = value else {
            return Err(wrong_kind(key, value, "an array"));
        };
        let string = |value: &'a Value| match value {
            Value::String(text) => Ok(text.as_str()),
            other => Err(wrong_kind(key, other, "strings")),
        };
        values.iter().map(string).collect()
    }

    /// An optional id, which has to be one of the vocabulary.
    fn id(&self, key: &str, vocab: usize) -> Result<Option<u32>> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        let id = value.to_u32().map_err(|_| wrong_kind(key, value, "a u32"))?;
        if id as usize >= vocab {
            return Err(Error::Tokenizer(format!("{key} is {id}, the vocabulary has {vocab}")));
        }
        Ok(Some(id))
    }

    fn flag(&self, key: &str) -> bool {
        matches!(self.0.get(key), Some(Value::Bool(true)))
    }

    /// The tokens whose type is 3 (control); without types there are none.
    fn control_tokens(&self, tokens: &[&'a str]) -> Result<Vec<&'a str>> {
        let key = "tokenizer.ggml.token_type";
        let Some(value) = self.0.get(key) else { return Ok(Vec::new()) };
        let Value::Array(types) = value else {
            return Err(wrong_kind(key, value, "an array"));
        };
        if types.len() != tokens.len() {
            return Err(Error::Tokenizer(format!(
                "{} values in {key} for {} tokens",
                types.len(),
                tokens.len()
            )));
        }
        let control = |kind: &Value| matches!(kind, Value::I32(3) | Value::U32(3));
        Ok(tokens.iter().zip(types).filter(|(_, kind)| control(kind)).map(|(t, _)| *t).collect())
    }
}

fn wrong_kind(key: &str, value: &Value, expected: &str) -> Error {
    Error::Tokenizer(format!("{key} is of type {:?}, expected {expected}", value.value_type()))
}

/// Closes the gaps that splitting at punctuation leaves: "a dog ' s bone ." → "a dog's bone.".
fn clean_up(text: &str) -> String {
    const CLOSED: [(&str, &str); 10] = [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ];
    CLOSED.iter().fold(text.to_owned(), |text, (open, closed)| text.replace(open, closed))
}

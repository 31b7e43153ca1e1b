//! A BLIP-2 in Hugging Face layout: configuration, names and files, turned into ours.
//!
//! ```text
//! config.json               shapes of image encoder, Q-Former, language model
//! model.safetensors         or model.safetensors.index.json and its shards: f32, f16 or bf16, mapped, not read
//! preprocessor_config.json  size, mean and deviation of pixels
//! tokenizer.json            the language model's
//! generation_config.json    end tokens; optional
//! ```
//!
//! Fields that a file leaves out have the defaults of transformers' configuration classes. Tensors decide where a
//! configuration and the tensors may disagree (a head tied to the words, or not).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::image::Normalize;
use crate::nn::Activation;
use crate::qformer::QFormerConfig;
use crate::stage1::Stage1Config;
use crate::stage2::Stage2Config;
use crate::stored::Stored;
use crate::tokenizer::{SpecialIds, Tokenizer};
use crate::vit::VitConfig;
use crate::{Error, Result, checkpoint, shards};

/// The name of the configuration inside a folder.
pub const CONFIG: &str = "config.json";

/// A folder whose configuration is read and whose tensors are mapped.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    folder: PathBuf,
    kind: Kind,
    config: Config,
    pixels: Preprocessor,
    generation: GenerationConfig,
    tensors: BTreeMap<String, Stored>,
}

#[derive(Debug, Clone, Deserialize)]
struct Config {
    model_type: String,
    #[serde(default)]
    architectures: Vec<String>,
    #[serde(default)]
    vision_config: VisionConfig,
    #[serde(default)]
    qformer_config: QformerConfig,
    #[serde(default)]
    text_config: Value,
    #[serde(default = "thirty_two")]
    num_query_tokens: usize,
    #[serde(default = "two_hundred_fifty_six")]
    image_text_hidden_size: usize,
    #[serde(default)]
    image_token_index: Option<u32>,
    /// What this program adds when it writes such a folder: transformers has no place for prompts.
    #[serde(default)]
    blip2: Option<Prompts>,
}

#[derive(Debug, Clone, Deserialize)]
struct Prompts {
    caption_prompt: String,
    question_prompt: String,
}

impl Config {
    fn text_ids(&self) -> serde_json::Result<TextIds> {
        let text = &self.text_config;
        if text.is_null() { Ok(TextIds::default()) } else { TextIds::deserialize(text) }
    }
}

fn thirty_two() -> usize {
    32
}

fn two_hundred_fifty_six() -> usize {
    256
}

/// What a checkpoint can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `Blip2ForConditionalGeneration`: captions and answers.
    Generates,
    /// `Blip2ForImageTextRetrieval`: matches and embeds.
    Matches,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
struct VisionConfig {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    image_size: usize,
    patch_size: usize,
    hidden_act: String,
    layer_norm_eps: f64,
    qkv_bias: bool,
}

impl Default for VisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 1408,
            intermediate_size: 6144,
            num_hidden_layers: 39,
            num_attention_heads: 16,
            image_size: 224,
            patch_size: 14,
            hidden_act: "gelu".into(),
            layer_norm_eps: 1e-6,
            qkv_bias: true,
        }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
struct QformerConfig {
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    hidden_act: String,
    max_position_embeddings: usize,
    layer_norm_eps: f64,
    position_embedding_type: String,
    cross_attention_frequency: usize,
}

impl Default for QformerConfig {
    fn default() -> Self {
        Self {
            vocab_size: 30522,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: "gelu".into(),
            max_position_embeddings: 512,
            layer_norm_eps: 1e-12,
            position_embedding_type: "absolute".into(),
            cross_attention_frequency: 2,
        }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
struct Preprocessor {
    size: Value,
    resample: u32,
    image_mean: [f32; 3],
    image_std: [f32; 3],
    rescale_factor: f64,
    do_resize: bool,
    do_rescale: bool,
    do_normalize: bool,
}

impl Default for Preprocessor {
    fn default() -> Self {
        Self {
            size: Value::Null,
            resample: 3,
            image_mean: Normalize::CLIP.mean,
            image_std: Normalize::CLIP.std,
            rescale_factor: 1.0 / 255.0,
            do_resize: true,
            do_rescale: true,
            do_normalize: true,
        }
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct GenerationConfig {
    eos_token_id: Option<OneOrMany>,
    bos_token_id: Option<u32>,
    pad_token_id: Option<u32>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

/// The fields of a language model's configuration that generation looks at.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct TextIds {
    model_type: Option<String>,
    bos_token_id: Option<u32>,
    eos_token_id: Option<OneOrMany>,
    pad_token_id: Option<u32>,
}

impl OneOrMany {
    fn list(&self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![*id],
            Self::Many(ids) => ids.clone(),
        }
    }
}

/// Whether `folder` looks like a Hugging Face checkpoint, of whatever model.
#[must_use]
pub fn is_checkpoint(folder: &Path) -> bool {
    folder.join(CONFIG).is_file()
}

impl Checkpoint {
    /// Reads the configuration of `folder` and maps its weights.
    ///
    /// # Errors
    /// A file that is missing or broken, a field of a kind or value not known here; file and field are named.
    pub fn open(folder: &Path) -> Result<Self> {
        let config: Config = read(&folder.join(CONFIG))?;
        let wrong = |what: String| Err(Error::file(folder.join(CONFIG), what));
        if config.model_type != "blip-2" {
            return wrong(format!("model_type is {:?}, expected \"blip-2\"", config.model_type));
        }
        let kind = match config.architectures.first().map(String::as_str) {
            None | Some("Blip2ForConditionalGeneration") => Kind::Generates,
            Some("Blip2ForImageTextRetrieval") => Kind::Matches,
            Some(other) => {
                return wrong(format!(
                    "architecture {other}: known are Blip2ForConditionalGeneration and \
                     Blip2ForImageTextRetrieval"
                ));
            }
        };
        let (vision, qformer) = (&config.vision_config, &config.qformer_config);
        let known = [
            ("vision_config.hidden_act", vision.hidden_act.as_str(), "gelu"),
            ("qformer_config.hidden_act", &qformer.hidden_act, "gelu"),
            (
                "qformer_config.position_embedding_type",
                &qformer.position_embedding_type,
                "absolute",
            ),
        ];
        if let Some((field, found, wanted)) = known.into_iter().find(|(_, f, w)| f != w) {
            return wrong(format!("{field} is {found:?}; only {wanted:?} is known"));
        }
        if !vision.qkv_bias {
            return wrong("vision_config.qkv_bias is false; only true is known".into());
        }
        let text = &config.text_config;
        if !(text.is_object() || text.is_null()) {
            return wrong(format!("text_config is {text}, not a configuration"));
        }
        if let Err(err) = config.text_ids() {
            return wrong(format!("text_config: {err}"));
        }
        let (pixels, path) = Preprocessor::read(folder)?;
        pixels.check(vision.image_size).map_err(|e| Error::file(path, e.to_string()))?;
        let path = folder.join("generation_config.json");
        let generation = if path.is_file() { read(&path)? } else { GenerationConfig::default() };
        let tensors = shards::open(folder)?;
        let made = Self { folder: folder.to_path_buf(), kind, config, pixels, generation, tensors };
        // Before any of these numbers is multiplied.
        made.vision_config()
            .check()
            .map_err(|err| Error::file(folder.join(CONFIG), err.to_string()))?;
        Ok(made)
    }

    /// What it can do.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The shape of the image encoder.
    #[must_use]
    pub fn vision_config(&self) -> VitConfig {
        let c = &self.config.vision_config;
        VitConfig {
            image_size: c.image_size,
            patch_size: c.patch_size,
            width: c.hidden_size,
            depth: c.num_hidden_layers,
            num_heads: c.num_attention_heads,
            mlp_width: c.intermediate_size,
            activation: Activation::Gelu,
            layer_norm_eps: c.layer_norm_eps,
            patch_bias: true,
            pre_norm: false,
            layer_scale: false,
        }
    }

    /// What pixels are normalised with.
    #[must_use]
    pub fn normalize(&self) -> Normalize {
        Normalize { mean: self.pixels.image_mean, std: self.pixels.image_std }
    }

    fn qformer_config(&self) -> QFormerConfig {
        let q = &self.config.qformer_config;
        QFormerConfig {
            width: q.hidden_size,
            depth: q.num_hidden_layers,
            num_heads: q.num_attention_heads,
            mlp_width: q.intermediate_size,
            cross_attention_freq: q.cross_attention_frequency,
            encoder_width: self.config.vision_config.hidden_size,
            num_queries: self.config.num_query_tokens,
            vocab_size: q.vocab_size,
            max_positions: q.max_position_embeddings,
            layer_norm_eps: q.layer_norm_eps,
            dropout: 0.0,
        }
    }

    /// The shape of the bridge of a model that matches.
    #[must_use]
    pub fn stage1_config(&self) -> Stage1Config {
        Stage1Config {
            qformer: self.qformer_config(),
            embed_dim: self.config.image_text_hidden_size,
            ln_vision_eps: self.config.vision_config.layer_norm_eps,
            matching_only: true,
        }
    }

    /// The shape of the bridge of a model that generates.
    #[must_use]
    pub fn stage2_config(&self) -> Stage2Config {
        Stage2Config {
            qformer: self.qformer_config(),
            llm_width: self
                .tensors
                .get("language_projection.bias")
                .map_or(0, |bias| bias.dims().first().copied().unwrap_or(0)),
            // transformers uses the encoder's epsilon here, LAVIS 1e-5.
            ln_vision_eps: self.config.vision_config.layer_norm_eps,
            reads_questions: false,
        }
    }

    /// The configuration of the language model, its `model_type` filled in.
    #[must_use]
    pub fn text_config(&self) -> Value {
        let mut config = self.config.text_config.clone();
        if config["model_type"].is_null() {
            config["model_type"] = "opt".into();
        }
        config
    }

    /// Text before a caption, and before an answer (`{}` stands for the question): what this program wrote down, else what
    /// the paper used with this family.
    #[must_use]
    pub fn prompts(&self) -> (&str, &str) {
        if let Some(prompts) = &self.config.blip2 {
            return (&prompts.caption_prompt, &prompts.question_prompt);
        }
        let question =
            if self.is_t5() { "Question: {} Short answer:" } else { "Question: {} Answer:" };
        ("", question)
    }

    fn is_t5(&self) -> bool {
        self.ids().model_type.as_deref() == Some("t5")
    }

    fn ids(&self) -> TextIds {
        // Opening has refused what can't be read.
        self.config.text_ids().unwrap_or_default()
    }

    /// Ids that end a text: those of `generation_config.json`, else of the language model's configuration.
    #[must_use]
    pub fn end_ids(&self) -> Vec<u32> {
        let ids = self.generation.eos_token_id.clone().or_else(|| self.ids().eos_token_id);
        ids.map_or_else(|| vec![if self.is_t5() { 1 } else { 2 }], |ids| ids.list())
    }

    /// The id that stands for a picture in the prompts of transformers, if this folder is of a version that has one.
    #[must_use]
    pub fn image_token(&self) -> Option<u32> {
        self.config.image_token_index
    }

    /// The language model's tokenizer.
    ///
    /// # Errors
    /// If `tokenizer.json` is missing, broken, or lacks a special id.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let path = self.folder.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        let ids = self.ids();
        let eos = self.end_ids().first().copied().unwrap_or(2);
        let special = if self.is_t5() {
            SpecialIds { bos: None, eos, pad: ids.pad_token_id.unwrap_or(0) }
        } else {
            SpecialIds {
                // transformers' defaults, of LLaMA and of OPT.
                bos: self
                    .generation
                    .bos_token_id
                    .or(ids.bos_token_id)
                    .or(Some(if ids.model_type.as_deref() == Some("llama") { 1 } else { 2 })),
                eos,
                pad: self.generation.pad_token_id.or(ids.pad_token_id).unwrap_or(1),
            }
        };
        Tokenizer::from_json(&bytes, special).map_err(|e| Error::file(&path, e.to_string()))
    }

    /// The tokenizer of a model that matches: BERT's.
    ///
    /// # Errors
    /// If `tokenizer.json` is missing or broken, or names no `[SEP]` and `[PAD]`.
    pub fn matching_tokenizer(&self) -> Result<Tokenizer> {
        #[derive(Deserialize)]
        struct Added {
            id: u32,
            content: String,
        }
        #[derive(Deserialize)]
        struct Json {
            added_tokens: Vec<Added>,
        }
        let path = self.folder.join("tokenizer.json");
        let json: Json = read(&path)?;
        let id = |token: &str| {
            let found = json.added_tokens.iter().find(|added| added.content == token);
            found.map(|added| added.id).ok_or_else(|| Error::file(&path, format!("has no {token}")))
        };
        let special = SpecialIds { bos: None, eos: id("[SEP]")?, pad: id("[PAD]")? };
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        Tokenizer::from_json(&bytes, special).map_err(|e| Error::file(&path, e.to_string()))
    }

    /// The image encoder's tensors under our names, its fused projections taken apart.
    ///
    /// # Errors
    /// If there is a tensor that is none of the encoder's.
    pub fn vision_tensors(&self) -> Result<BTreeMap<String, Stored>> {
        let c = &self.config.vision_config;
        let mut tensors = BTreeMap::new();
        for (name, stored) in self.below("vision_model.") {
            if name.starts_with("post_layernorm.") {
                continue;
            }
            if name == "embeddings.patch_embedding.weight" {
                let flat = stored.reshaped(&[c.hidden_size, 3 * c.patch_size.pow(2)]);
                tensors.insert(name.to_owned(), flat);
            } else if let Some((block, kind)) = name.split_once(".qkv.") {
                for (i, part) in ["q", "k", "v"].into_iter().enumerate() {
                    let rows = stored.rows(i * c.hidden_size, c.hidden_size);
                    tensors.insert(format!("{block}.{part}.{kind}"), rows);
                }
            } else {
                tensors.insert(name.to_owned(), stored.clone());
            }
        }
        checkpoint::from_hf_vision(tensors).map_err(|e| self.wrong(&e))
    }

    /// The bridge's tensors, under our names.
    ///
    /// # Errors
    /// If there is a tensor that is no part of a BLIP-2.
    pub fn bridge_tensors(&self) -> Result<BTreeMap<String, Stored>> {
        let own = |name: &str| {
            !name.starts_with("language_model.")
                && (!name.starts_with("vision_model.")
                    || name.starts_with("vision_model.post_layernorm."))
        };
        let tensors =
            self.tensors.iter().filter(|(name, _)| own(name)).map(|(n, t)| (n.clone(), t.clone()));
        checkpoint::from_hf_bridge(tensors.collect()).map_err(|e| self.wrong(&e))
    }

    /// The language model's tensors under transformers' names.
    #[must_use]
    pub fn language_tensors(&self) -> BTreeMap<String, Stored> {
        self.below("language_model.").map(|(name, t)| (name.to_owned(), t.clone())).collect()
    }

    fn below<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a Stored)> {
        self.tensors.iter().filter_map(move |(name, t)| Some((name.strip_prefix(prefix)?, t)))
    }

    fn wrong(&self, err: &Error) -> Error {
        Error::file(&self.folder, err.to_string())
    }
}

impl Preprocessor {
    /// From `preprocessor_config.json`, or, as transformers 5 writes it, from a part of `processor_config.json`. Gives the
    /// file's path, too.
    fn read(folder: &Path) -> Result<(Self, PathBuf)> {
        #[derive(Deserialize)]
        struct Processor {
            image_processor: Option<Preprocessor>,
        }
        let own = folder.join("preprocessor_config.json");
        let shared = folder.join("processor_config.json");
        if !own.is_file() && shared.is_file() {
            let Processor { image_processor } = read(&shared)?;
            if let Some(pixels) = image_processor {
                return Ok((pixels, shared));
            }
        }
        Ok((read(&own)?, own))
    }

    /// Refuses pixels that would be made in another way than ours.
    fn check(&self, image_size: usize) -> Result<()> {
        let refuse = |what: String| Err(Error::Config(what));
        let side = |name: &str| self.size[name].as_u64();
        if !(self.do_resize && self.do_rescale && self.do_normalize) {
            return refuse("do_resize, do_rescale and do_normalize must be true".into());
        }
        if self.resample != 3 {
            return refuse(format!("resample is {}; only 3, bicubic, is known", self.resample));
        }
        if (self.rescale_factor - 1.0 / 255.0).abs() > 1e-9 {
            return refuse(format!("rescale_factor is {}, expected 1/255", self.rescale_factor));
        }
        // Beyond these a pixel becomes infinite.
        for (name, values, least) in
            [("image_mean", self.image_mean, -1e3), ("image_std", self.image_std, 1e-3)]
        {
            if !values.iter().all(|x| (least..1e3).contains(x)) {
                return refuse(format!("{name} is {values:?}, expected {least}..1000"));
            }
        }
        if side("height") != Some(image_size as u64) || side("width") != Some(image_size as u64) {
            return refuse(format!(
                "size is {}, but the image encoder of config.json looks at {image_size}x{image_size}",
                self.size
            ));
        }
        Ok(())
    }
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&text).map_err(|err| Error::file(path, err.to_string()))
}

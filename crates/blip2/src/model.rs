//! A whole model, ready to use: [`Captioner`] (stage 2) and [`Matcher`] (stage 1).
//!
//! A model is a folder with a `model.json` (a [`Manifest`]) that says which parts there are, their shapes and the files they
//! are in. The frozen parts may be *shared*: fetched once into the cache, the same for every bridge trained on them.
//! A folder in Hugging Face layout is a model, too: its description is made from its configuration ([`crate::hf`]).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use blip2_ops::{Dropout, WeightFormat, on_computing_thread};
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::assets::{self, Check, Progress};
use crate::generate::{self, Hypothesis};
use crate::hf::{self, Checkpoint, Kind};
use crate::image::{self, Normalize, Rgb};
use crate::llm::{self, Llm, LlmDecoder};
use crate::nn;
use crate::params::{self, Params};
use crate::shards;
use crate::stage1::{self, ImageFeatures, ItgDecoder, Stage1, Stage1Config};
use crate::stage2::{Stage2, Stage2Config};
use crate::stored::Stored;
use crate::tokenizer::{Padding, Side, TextBatch, Tokenizer, Width};
use crate::vit::{Vit, VitConfig};
use crate::{Error, Result};

/// The name of the description inside a model's folder.
pub const MANIFEST: &str = "model.json";

/// What a model is made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// For people.
    pub name: String,
    /// The frozen image encoder.
    pub vision: VisionPart,
    /// The frozen language model; not needed for matching.
    pub llm: Option<LlmPart>,
    /// Matching and embedding.
    pub stage1: Option<Stage1Part>,
    /// Captions and answers.
    pub stage2: Option<Stage2Part>,
    /// Who writes captions unless told otherwise.
    #[serde(default, skip_serializing_if = "CaptionStage::is_second")]
    pub caption_stage: CaptionStage,
}

impl Manifest {
    /// Whether there is a first stage with a head that writes captions: some only match.
    #[must_use]
    pub fn first_stage_writes(&self) -> bool {
        self.stage1.as_ref().is_some_and(|part| !part.config.matching_only)
    }
}

/// Who writes captions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CaptionStage {
    /// The first stage, by its own head.
    #[serde(rename = "1")]
    First,
    /// The second stage, with the language model.
    #[default]
    #[serde(rename = "2")]
    Second,
    /// Both, and the first stage chooses ([`crate::choice`]).
    #[serde(rename = "both")]
    Both,
}

impl CaptionStage {
    /// As the description and the command line spell it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::First => "1",
            Self::Second => "2",
            Self::Both => "both",
        }
    }

    fn is_second(&self) -> bool {
        *self == Self::Second
    }
}

/// The frozen image encoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VisionPart {
    /// Its shape.
    pub config: VitConfig,
    /// Where its weights are.
    pub weights: PartFile,
    /// What its pixels are normalised with.
    pub normalize: Normalize,
}

/// The frozen language model: a GGUF file, or safetensors with a `tokenizer.json` beside it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LlmPart {
    /// Where its weights are.
    pub weights: PartFile,
}

/// The bridge after stage 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage1Part {
    /// Its shape.
    pub config: Stage1Config,
    /// File of its weights, safetensors or GGUF.
    pub weights: String,
    /// File of its word pieces, one a line.
    pub vocab: String,
    /// Longest text in tokens.
    pub max_text_len: usize,
}

/// The bridge after stage 2.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage2Part {
    /// Its shape.
    pub config: Stage2Config,
    /// File of its weights, safetensors or GGUF.
    pub weights: String,
    /// Text before a caption.
    pub caption_prompt: String,
    /// Text before an answer; `{}` stands for the question.
    pub question_prompt: String,
    /// File of the bridge's word pieces, if it reads questions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vocab: Option<String>,
}

/// Longest question that a bridge reads, in word pieces.
pub const MAX_QUESTION_LEN: usize = 32;

/// Where a frozen part is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PartFile {
    /// The mini model's, in the cache.
    Mini,
    /// A file in the model's folder.
    File(String),
    /// A file or folder outside the model's folder, by its absolute path: what a recipe named, too large to copy for every run.
    Path(PathBuf),
    /// In the Hugging Face checkpoint that the description was made from.
    Checkpoint,
}

/// Where a model's own files are.
#[derive(Debug, Clone)]
pub enum Files {
    /// A folder.
    Folder(PathBuf),
    /// Inside this program: (name, bytes).
    Builtin(&'static [(&'static str, &'static [u8])]),
    /// A folder in Hugging Face layout.
    HuggingFace(Box<Checkpoint>),
}

impl Files {
    /// The bytes of the file called `name`.
    ///
    /// # Errors
    /// If it is not there or can't be read; the message names it.
    pub fn read(&self, name: &str) -> Result<Cow<'static, [u8]>> {
        match self {
            Self::Folder(_) | Self::HuggingFace(_) => {
                let path = self.path(name)?;
                Ok(std::fs::read(&path).map_err(Error::io(&path))?.into())
            }
            Self::Builtin(files) => files
                .iter()
                .find(|(file, _)| *file == name)
                .map(|(_, bytes)| Cow::Borrowed(*bytes))
                .ok_or_else(|| Error::file(name, "not among the files built into this program")),
        }
    }

    /// Where the file called `name` is. Names come out of files that somebody else may have written.
    fn path(&self, name: &str) -> Result<PathBuf> {
        let path = self.describe(name);
        let inside = Path::new(name).components().all(|c| matches!(c, Component::Normal(_)));
        if !inside || name.is_empty() {
            return Err(Error::file(&path, "is not a name inside the model's folder"));
        }
        Ok(path)
    }

    /// How errors name the file called `name`.
    #[must_use]
    pub fn describe(&self, name: &str) -> PathBuf {
        match self {
            Self::Folder(folder) => folder.join(name),
            Self::HuggingFace(checkpoint) => checkpoint.folder().join(name),
            Self::Builtin(_) => Path::new("(built in)").join(name),
        }
    }
}

/// A model's folder, its description read and nothing else.
#[derive(Debug, Clone)]
pub struct Model {
    /// The description.
    pub manifest: Manifest,
    files: Files,
}

impl Model {
    /// Opens a folder with a `model.json`, or one in Hugging Face layout.
    ///
    /// # Errors
    /// If it is neither, or a field of its description is missing, unknown or of the wrong kind.
    pub fn open_folder(folder: &Path) -> Result<Self> {
        if folder.join(MANIFEST).is_file() {
            return Self::open(Files::Folder(folder.to_path_buf()));
        }
        if !hf::is_checkpoint(folder) {
            let reason = format!("has neither a {MANIFEST} nor a {}", hf::CONFIG);
            return Err(Error::file(folder, reason));
        }
        let checkpoint = Checkpoint::open(folder)?;
        let (caption_prompt, question_prompt) = checkpoint.prompts();
        let generates = checkpoint.kind() == Kind::Generates;
        let name =
            folder.file_name().map_or_else(|| "blip-2".into(), std::ffi::OsStr::to_string_lossy);
        let manifest = Manifest {
            name: name.into_owned(),
            vision: VisionPart {
                config: checkpoint.vision_config(),
                weights: PartFile::Checkpoint,
                normalize: checkpoint.normalize(),
            },
            llm: generates.then_some(LlmPart { weights: PartFile::Checkpoint }),
            stage1: (!generates).then(|| Stage1Part {
                config: checkpoint.stage1_config(),
                weights: hf::CONFIG.into(),
                vocab: "tokenizer.json".into(),
                max_text_len: checkpoint.stage1_config().qformer.max_positions,
            }),
            stage2: generates.then(|| Stage2Part {
                config: checkpoint.stage2_config(),
                weights: hf::CONFIG.into(),
                caption_prompt: caption_prompt.into(),
                question_prompt: question_prompt.into(),
                vocab: None,
            }),
            caption_stage: CaptionStage::default(),
        };
        Ok(Self { manifest, files: Files::HuggingFace(Box::new(checkpoint)) })
    }

    /// Reads the description.
    ///
    /// # Errors
    /// If there is no `model.json`, or a field of it is missing, unknown or of the wrong kind.
    pub fn open(files: Files) -> Result<Self> {
        let bytes = files.read(MANIFEST)?;
        let manifest = serde_json::from_slice(&bytes)
            .map_err(|err| Error::file(files.describe(MANIFEST), err.to_string()))?;
        let model = Self { manifest, files };
        model.check_caption_stage()?;
        Ok(model)
    }

    /// Who is said to write captions must be there.
    fn check_caption_stage(&self) -> Result<()> {
        let Manifest { stage2, caption_stage, .. } = &self.manifest;
        let lacking = match caption_stage {
            CaptionStage::First | CaptionStage::Both if !self.manifest.first_stage_writes() => {
                "stage 1 that writes"
            }
            CaptionStage::Both if stage2.is_none() => "stage 2",
            _ => return Ok(()),
        };
        let reason = format!("caption_stage {}: there is no {lacking}", caption_stage.as_str());
        Err(Error::file(self.files.describe(MANIFEST), reason))
    }

    /// Where the model's own files are.
    #[must_use]
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// Names of the model's own files that hold frozen parts.
    #[must_use]
    pub fn frozen_files(&self) -> Vec<String> {
        let mut names = Vec::new();
        if let PartFile::File(name) = &self.manifest.vision.weights {
            names.push(name.clone());
        }
        if let Some(LlmPart { weights: PartFile::File(name) }) = &self.manifest.llm {
            match std::fs::read_dir(self.files.describe(name)) {
                // A folder: its configuration, its tokenizer, its weights in however many files.
                Ok(entries) => {
                    let files =
                        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
                    let mut files: Vec<_> = files.map(|file| format!("{name}/{file}")).collect();
                    files.sort_unstable();
                    names.extend(files);
                }
                Err(_) => names.push(name.clone()),
            }
        }
        names
    }

    /// Loads the frozen image encoder; without a `format` no weight changes its value.
    ///
    /// # Errors
    /// If its weights can't be found or don't fit.
    pub fn vision(
        &self,
        format: impl Into<Option<WeightFormat>>,
        progress: Progress<'_>,
    ) -> Result<Vision> {
        let part = &self.manifest.vision;
        let origin = self.vision_origin();
        let tensors = self.fitted_vision(progress)?;
        let vit = Params::build(tensors, format, &origin.to_string_lossy(), |p| {
            Vit::new(p, &part.config)
        })?;
        Ok(Vision { vit, normalize: part.normalize })
    }

    /// Loads the frozen language model with its tokenizer; `format` `None` keeps weights as they are stored.
    ///
    /// # Errors
    /// If there is none, or its weights can't be found or don't fit.
    pub fn llm(
        &self,
        format: Option<WeightFormat>,
        progress: Progress<'_>,
    ) -> Result<(Llm, Tokenizer)> {
        let Files::HuggingFace(checkpoint) = &self.files else {
            return Llm::open(&self.llm_path(progress)?, format);
        };
        let folder = checkpoint.folder();
        let llm =
            Llm::from_hf(&checkpoint.text_config(), checkpoint.language_tensors(), format, folder)?;
        let tokenizer = checkpoint.tokenizer()?;
        llm.check_tokenizer(&tokenizer, folder)?;
        Ok((llm, tokenizer))
    }

    /// Loads what captions and answers.
    ///
    /// # Errors
    /// If the model has no stage-2 part, or weights don't fit.
    pub fn captioner(
        &self,
        format: Option<WeightFormat>,
        progress: Progress<'_>,
    ) -> Result<Captioner> {
        let part = self.stage2()?;
        let vision = Arc::new(self.vision(format, &mut *progress)?);
        self.captioner_with(part, vision, format, progress)
    }

    /// Loads both stages; there is one image encoder, which they share.
    ///
    /// # Errors
    /// As [`Self::captioner`] and [`Self::matcher`].
    pub fn both(
        &self,
        format: Option<WeightFormat>,
        progress: Progress<'_>,
    ) -> Result<(Captioner, Matcher)> {
        let (first, second) = (self.stage1()?, self.stage2()?);
        if !self.manifest.first_stage_writes() {
            return Err(self.lacks("first stage that writes captions: it only matches"));
        }
        let vision = Arc::new(self.vision(format, &mut *progress)?);
        let matcher = self.matcher_with(&first, Arc::clone(&vision), format)?;
        Ok((self.captioner_with(second, vision, format, progress)?, matcher))
    }

    fn stage2(&self) -> Result<Stage2Part> {
        self.manifest.stage2.clone().ok_or_else(|| {
            self.lacks("stage-2 part (captions, answers); train one, or give --model")
        })
    }

    fn captioner_with(
        &self,
        part: Stage2Part,
        vision: Arc<Vision>,
        format: Option<WeightFormat>,
        progress: Progress<'_>,
    ) -> Result<Captioner> {
        let (llm, tokenizer) = self.llm(format, progress)?;
        let bridge = self.build(&part.weights, format, |p| Stage2::new(p, &part.config))?;
        self.check_joint(
            &part.weights,
            "image encoder",
            vision.config().width,
            part.config.qformer.encoder_width,
        )?;
        self.check_joint(&part.weights, "language model", llm.width(), part.config.llm_width)?;
        let vocab = part.vocab.as_ref().filter(|_| part.config.reads_questions);
        let word_pieces = vocab
            .map(|name| Tokenizer::from_wordpiece_vocab(&self.files.read(name)?))
            .transpose()?;
        if part.config.reads_questions && word_pieces.is_none() {
            return Err(self.lacks("vocabulary for the questions that its bridge reads"));
        }
        let (end_ids, image_token) = match &self.files {
            Files::HuggingFace(checkpoint) => (checkpoint.end_ids(), checkpoint.image_token()),
            _ => {
                let path = self.llm_path(&mut |_, _, _| {})?;
                let end_ids = match path.is_dir() {
                    true => llm::end_ids(&path, &tokenizer)?,
                    false => vec![tokenizer.special().eos],
                };
                (end_ids, None)
            }
        };
        Ok(Captioner { vision, bridge, llm, tokenizer, part, end_ids, image_token, word_pieces })
    }

    /// Loads what matches and embeds.
    ///
    /// # Errors
    /// If the model has no stage-1 part, or weights don't fit.
    pub fn matcher(&self, format: Option<WeightFormat>, progress: Progress<'_>) -> Result<Matcher> {
        let part = self.stage1()?;
        self.matcher_with(&part, Arc::new(self.vision(format, progress)?), format)
    }

    fn stage1(&self) -> Result<Stage1Part> {
        self.manifest.stage1.clone().ok_or_else(|| self.lacks("stage-1 part (match, embed)"))
    }

    fn matcher_with(
        &self,
        part: &Stage1Part,
        vision: Arc<Vision>,
        format: Option<WeightFormat>,
    ) -> Result<Matcher> {
        let bridge = self.build(&part.weights, format, |p| Stage1::new(p, &part.config))?;
        self.check_joint(
            &part.weights,
            "image encoder",
            vision.config().width,
            part.config.qformer.encoder_width,
        )?;
        let tokenizer = match &self.files {
            Files::HuggingFace(checkpoint) => checkpoint.matching_tokenizer()?,
            files => Tokenizer::from_wordpiece_vocab(&files.read(&part.vocab)?)?,
        };
        Ok(Matcher { vision, bridge, tokenizer, max_text_len: part.max_text_len })
    }

    /// How errors name the image encoder's weights.
    fn vision_origin(&self) -> PathBuf {
        match &self.manifest.vision.weights {
            PartFile::Mini => "image encoder of mini".into(),
            PartFile::File(name) => self.files.describe(name),
            PartFile::Path(path) => path.clone(),
            PartFile::Checkpoint => self.files.describe(""),
        }
    }

    /// The tensors of the image encoder, its positions those of the pictures that the model looks at.
    ///
    /// # Errors
    /// If its weights can't be found or are damaged, or the positions fit no square of patches.
    pub fn fitted_vision(&self, progress: Progress<'_>) -> Result<BTreeMap<String, Stored>> {
        let config = &self.manifest.vision.config;
        let wrong = |err: Error| Error::file(self.vision_origin(), err.to_string());
        config.check().map_err(wrong)?;
        let mut tensors = self.vision_tensors(progress)?;
        if let Some(positions) = tensors.get_mut("pos_embed") {
            let side = config.image_size / config.patch_size;
            let stored = positions.load()?.to_dtype(DType::F32)?;
            *positions = nn::fit_positions(&stored, side, config.corners()).map_err(wrong)?.into();
        }
        Ok(tensors)
    }

    /// The tensors of the image encoder, unread by any model.
    ///
    /// # Errors
    /// If its weights can't be found or are damaged.
    pub fn vision_tensors(&self, progress: Progress<'_>) -> Result<BTreeMap<String, Stored>> {
        let path = match (&self.manifest.vision.weights, &self.files) {
            (PartFile::Checkpoint, Files::HuggingFace(checkpoint)) => {
                return checkpoint.vision_tensors();
            }
            (PartFile::File(name), _) => return self.weights(name),
            (PartFile::Path(path), _) => return shards::open_file(path),
            (PartFile::Mini, _) => assets::mini_vit(Check::Quick, progress)?,
            (PartFile::Checkpoint, _) => return Err(self.lacks("checkpoint to read from")),
        };
        params::read_file(&path).map(in_memory)
    }

    /// The file of the language model.
    ///
    /// # Errors
    /// If there is none, or it can't be fetched.
    pub fn llm_path(&self, progress: Progress<'_>) -> Result<PathBuf> {
        let part = self.manifest.llm.as_ref().ok_or_else(|| self.lacks("language model"))?;
        Ok(match &part.weights {
            PartFile::Mini => assets::mini_llm(Check::Quick, progress)?,
            PartFile::File(name) => self.files.describe(name),
            PartFile::Path(path) => path.clone(),
            PartFile::Checkpoint => self.files.describe(""),
        })
    }

    /// The names and shapes of the language model's tensors, without reading them.
    ///
    /// # Errors
    /// If there is none, or it can't be fetched or read.
    pub fn language_shapes(&self, progress: Progress<'_>) -> Result<BTreeMap<String, Vec<usize>>> {
        match &self.files {
            Files::HuggingFace(checkpoint) => {
                let tensors = checkpoint.language_tensors();
                Ok(tensors.into_iter().map(|(name, tensor)| (name, tensor.dims())).collect())
            }
            _ => {
                let path = self.llm_path(progress)?;
                if !path.is_dir() {
                    return params::shapes(&path);
                }
                let tensors = shards::open(&path)?;
                Ok(tensors.into_iter().map(|(name, tensor)| (name, tensor.dims())).collect())
            }
        }
    }

    /// The tensors of one of the model's own weight files; of a Hugging Face checkpoint, those of the bridge.
    ///
    /// # Errors
    /// If the file is missing or damaged; the message names it.
    pub fn weights(&self, name: &str) -> Result<BTreeMap<String, Stored>> {
        match &self.files {
            Files::HuggingFace(checkpoint) => checkpoint.bridge_tensors(),
            Files::Folder(_) if name.ends_with(".safetensors") => {
                shards::open_file(&self.files.path(name)?)
            }
            files => params::read_weights(&files.read(name)?, &files.describe(name)).map(in_memory),
        }
    }

    /// sha256, in hex, of the model's own weights and description: what was trained, not what it stands on.
    ///
    /// # Errors
    /// If a file can't be read.
    pub fn hash(&self) -> Result<String> {
        let mut sha = Sha256::new();
        let stages = [
            self.manifest.stage1.as_ref().map(|s| &s.weights),
            self.manifest.stage2.as_ref().map(|s| &s.weights),
        ];
        for name in [Some(&MANIFEST.to_owned())].into_iter().chain(stages).flatten() {
            sha.update(self.files.read(name)?);
        }
        Ok(sha.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    fn build<T>(
        &self,
        weights: &str,
        format: Option<WeightFormat>,
        make: impl FnOnce(&Params) -> Result<T>,
    ) -> Result<T> {
        let origin = self.files.describe(weights);
        Params::build(self.weights(weights)?, format, &origin.to_string_lossy(), make)
    }

    /// Refuses a bridge between parts of other widths.
    fn check_joint(&self, weights: &str, part: &str, width: usize, bridge: usize) -> Result<()> {
        if width == bridge {
            return Ok(());
        }
        let reason = format!("the {part} has the width {width}, its side of the bridge {bridge}");
        Err(Error::file(self.files.describe(weights), reason))
    }

    fn lacks(&self, what: &str) -> Error {
        Error::Config(format!("model {} has no {what}", self.manifest.name))
    }
}

fn in_memory(tensors: BTreeMap<String, Tensor>) -> BTreeMap<String, Stored> {
    tensors.into_iter().map(|(name, tensor)| (name, tensor.into())).collect()
}

/// The image encoder with what prepares its pixels.
pub struct Vision {
    vit: Vit,
    normalize: Normalize,
}

impl Vision {
    /// An encoder, built, and what it wants its pixels to be.
    #[must_use]
    pub fn new(vit: Vit, normalize: Normalize) -> Self {
        Self { vit, normalize }
    }

    /// The encoder.
    #[must_use]
    pub fn vit(&self) -> &Vit {
        &self.vit
    }

    /// Pictures of any size → features (b, tokens, width).
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn encode(&self, pictures: &[Rgb]) -> Result<Tensor> {
        self.features(&self.pixels(pictures)?)
    }

    /// Normalised pixels (b, 3, size, size) → features (b, tokens, width), the same whatever b is.
    ///
    /// # Errors
    /// If the size is another.
    pub fn features(&self, pixels: &Tensor) -> Result<Tensor> {
        on_computing_thread(|| in_parts(pixels, self.together(), |part| self.vit.forward(part)))
    }

    /// Pictures that go through the encoder together: as many as a cache holds the widest activations of. More would go to
    /// memory and back between any two operations, a twelfth of the time of a large encoder.
    fn together(&self) -> usize {
        const CACHE: usize = 8 << 20;
        let VitConfig { width, mlp_width, .. } = *self.vit.config();
        let widest = self.vit.config().num_tokens() * mlp_width.max(width) * size_of::<f32>();
        (CACHE / widest.max(1)).max(1)
    }

    /// Bytes of a picture's features.
    fn features_bytes(&self) -> usize {
        self.config().num_tokens() * self.config().width * size_of::<f32>()
    }

    /// Pictures of any size → normalised pixels (b, 3, size, size), resized as PIL does.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn pixels(&self, pictures: &[Rgb]) -> Result<Tensor> {
        use rayon::prelude::*;
        let size = self.vit.config().image_size;
        let each: Vec<Tensor> = pictures
            .par_iter()
            .map(|picture| image::preprocess(picture, size, &self.normalize))
            .collect::<Result<_>>()?;
        Ok(Tensor::stack(&each, 0)?)
    }

    /// The encoder's shape.
    #[must_use]
    pub fn config(&self) -> &VitConfig {
        self.vit.config()
    }
}

/// `work` of `x` (b, …), of which it is given `most` at a time.
fn in_parts(x: &Tensor, most: usize, work: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let b = x.dim(0)?;
    if b <= most {
        return work(x);
    }
    let parts = (0..b).step_by(most).map(|first| work(&x.narrow(0, first, most.min(b - first))?));
    Ok(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?)
}

/// Captions pictures and answers questions about them.
pub struct Captioner {
    vision: Arc<Vision>,
    bridge: Stage2,
    llm: Llm,
    tokenizer: Tokenizer,
    part: Stage2Part,
    /// Ids that end a text.
    end_ids: Vec<u32>,
    /// The id that stands for a picture in the prompts of transformers.
    image_token: Option<u32>,
    /// Of a bridge that reads questions.
    word_pieces: Option<Tokenizer>,
}

impl Captioner {
    /// About as many bytes as each picture of a batch takes beside the weights: its features, what the bridge makes of them, what the
    /// language model keeps of its queries, of the prompt and of the tokens it writes, and the scores of the next ones.
    #[must_use]
    pub fn picture_bytes(&self, prompt: &str, options: &generate::Options) -> usize {
        // A word has a byte at least for each of its tokens.
        let before = self.bridge.config().qformer.num_queries + prompt.len();
        let tokens = before + options.rows() * options.max_new_tokens;
        let scores = 2 * options.rows() * self.llm.vocab_size() * size_of::<f32>();
        let bridge = self.bridge.config().qformer.picture_bytes(self.vision.config().num_tokens());
        self.vision.features_bytes() + bridge + tokens * self.llm.cache_bytes() + scores
    }

    /// The text that a caption goes on from.
    #[must_use]
    pub fn caption_prompt(&self) -> &str {
        &self.part.caption_prompt
    }

    /// The text that the answer to `question` goes on from, after the earlier turns (question, answer).
    #[must_use]
    pub fn question_prompt(&self, history: &[(&str, &str)], question: &str) -> String {
        let ask = |question: &str| self.part.question_prompt.replacen("{}", question.trim(), 1);
        let turns = history
            .iter()
            .map(|(question, answer)| format!("{} {}. ", ask(question), answer.trim()));
        turns.collect::<String>() + &ask(question)
    }

    /// For each picture with its prompt, the best texts.
    ///
    /// # Errors
    /// If there are not as many prompts as pictures, or an option is out of range.
    pub fn generate(
        &self,
        pictures: &[Rgb],
        prompts: &[&str],
        options: &generate::Options,
    ) -> Result<Vec<Vec<Hypothesis>>> {
        self.generate_from(&self.vision.encode(pictures)?, prompts, options)
    }

    /// [`Self::generate`] for questions; `prompts` hold them, too, for the language model.
    ///
    /// # Errors
    /// As [`Self::generate`].
    pub fn answer(
        &self,
        pictures: &[Rgb],
        questions: &[&str],
        prompts: &[&str],
        options: &generate::Options,
    ) -> Result<Vec<Vec<Hypothesis>>> {
        self.answer_from(&self.vision.encode(pictures)?, questions, prompts, options)
    }

    /// [`Self::generate`] for pictures that are encoded already: `patches` (b, tokens, width).
    ///
    /// # Errors
    /// As [`Self::generate`].
    pub fn generate_from(
        &self,
        patches: &Tensor,
        prompts: &[&str],
        options: &generate::Options,
    ) -> Result<Vec<Vec<Hypothesis>>> {
        self.answer_from(patches, prompts, prompts, options)
    }

    /// [`Self::answer`] for pictures that are encoded already. A bridge that reads no questions leaves `questions` alone.
    ///
    /// # Errors
    /// As [`Self::generate`].
    pub fn answer_from(
        &self,
        patches: &Tensor,
        questions: &[&str],
        prompts: &[&str],
        options: &generate::Options,
    ) -> Result<Vec<Vec<Hypothesis>>> {
        self.generate_after(&self.soft_words(patches, questions)?, prompts, options)
    }

    /// Encoded pictures `patches` (b, tokens, width) → what the language model reads of them, soft words (b, queries, l). A
    /// bridge that reads no questions leaves `questions` alone.
    ///
    /// # Errors
    /// If there are not as many questions as pictures.
    pub fn soft_words(&self, patches: &Tensor, questions: &[&str]) -> Result<Tensor> {
        let b = patches.dim(0)?;
        if questions.len() != b {
            return Err(Error::Config(format!("{} questions for {b} pictures", questions.len())));
        }
        let Some(word_pieces) = &self.word_pieces else {
            return on_computing_thread(|| self.bridge.soft_words(patches, &Dropout::off()));
        };
        let padding =
            Padding { max_len: MAX_QUESTION_LEN, side: Side::Right, width: Width::Longest };
        let batch = word_pieces.encode_batch(questions, true, padding)?;
        let rows: Vec<u32> = (0..b as u32).collect();
        let text = (&batch.ids, &batch.mask_tensor()?);
        self.bridge.soft_words_asked(patches, &rows, text, &Dropout::off())
    }

    /// For each picture, as its soft words (b, queries, l), and its prompt, the best texts.
    ///
    /// # Errors
    /// As [`Self::generate`].
    pub fn generate_after(
        &self,
        soft: &Tensor,
        prompts: &[&str],
        options: &generate::Options,
    ) -> Result<Vec<Vec<Hypothesis>>> {
        let b = soft.dim(0)?;
        if prompts.len() != b {
            return Err(Error::Config(format!("{} prompts for {b} pictures", prompts.len())));
        }
        let ids = prompts
            .iter()
            .map(|prompt| match self.llm.has_encoder() {
                // An encoder reads whole texts, which end.
                true => self.tokenizer.encode(prompt, true),
                false => prompt_ids(&self.tokenizer, prompt),
            })
            .collect::<Result<Vec<_>>>()?;
        let (embeds, mask) = join_left_padded(soft, &ids, &self.llm)?;
        let mut options = options.clone();
        if options.eos.is_empty() {
            options.eos = self.end_ids.clone();
        }
        let before = ids.into_iter().map(|ids| self.image_token.into_iter().chain(ids).collect());
        let mut decoder =
            LlmDecoder::new(&self.llm, embeds, mask)?.with_prompt_ids(before.collect());
        generate::generate(&mut decoder, b, &options)
    }

    /// The text of a hypothesis, without special tokens and outer spaces.
    ///
    /// # Errors
    /// If an id is no token.
    pub fn text(&self, hypothesis: &Hypothesis) -> Result<String> {
        // The reference strips with Python, to which the four ASCII separators are spaces, too.
        let outer = |c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c);
        Ok(self.tokenizer.decode(&hypothesis.tokens, true)?.trim_matches(outer).to_owned())
    }

    /// The image encoder, for callers that keep its output.
    #[must_use]
    pub fn vision(&self) -> &Vision {
        &self.vision
    }
}

/// The ids of a prompt as stage 2 reads it: the start token, if the language model has one, and the text.
///
/// # Errors
/// If the text is too long for the tokenizer.
pub fn prompt_ids(tokenizer: &Tokenizer, prompt: &str) -> Result<Vec<u32>> {
    let mut ids: Vec<u32> = tokenizer.special().bos.into_iter().collect();
    ids.extend(tokenizer.encode(prompt, false)?);
    Ok(ids)
}

/// Soft words (b, q, l) in front of each row's prompt, padded on the left: embeddings (b, t, l) and which are real.
fn join_left_padded(
    soft: &Tensor,
    prompts: &[Vec<u32>],
    llm: &Llm,
) -> Result<(Tensor, Vec<Vec<bool>>)> {
    let (_, q, width) = soft.dims3()?;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let (mut rows, mut mask) = (Vec::new(), Vec::new());
    for (i, ids) in prompts.iter().enumerate() {
        let padding = longest - ids.len();
        let mut parts = vec![soft.narrow(0, i, 1)?];
        if padding > 0 {
            parts.insert(0, Tensor::zeros((1, padding, width), soft.dtype(), &Device::Cpu)?);
        }
        if !ids.is_empty() {
            parts.push(llm.embed(&Tensor::new(ids.as_slice(), &Device::Cpu)?.unsqueeze(0)?)?);
        }
        rows.push(Tensor::cat(&parts, 1)?);
        mask.push((0..longest + q).map(|column| column >= padding).collect());
    }
    Ok((Tensor::cat(&rows, 0)?, mask))
}

/// How a text fits a picture.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// Probability that they match, by the ITM head.
    pub itm: f32,
    /// Cosine in the common space, the best of the queries.
    pub itc: f32,
}

/// Texts as the first stage compares them: ids and mask (n, t), and in the common space (n, e).
pub(crate) struct Texts {
    ids: Tensor,
    tokens: Tensor,
    embeds: Tensor,
}

/// Matches pictures with texts and embeds both.
pub struct Matcher {
    vision: Arc<Vision>,
    bridge: Stage1,
    tokenizer: Tokenizer,
    max_text_len: usize,
}

impl Matcher {
    /// About as many bytes as each picture of a batch takes beside the weights: its features, and what the bridge makes of
    /// them.
    #[must_use]
    pub fn picture_bytes(&self) -> usize {
        self.vision.features_bytes()
            + self.bridge.config().qformer.picture_bytes(self.vision.config().num_tokens())
    }

    /// The same where captions are written: what the bridge keeps of its queries and of the tokens, and the scores of the next ones.
    #[must_use]
    pub fn caption_bytes(&self, options: &generate::Options) -> usize {
        let config = &self.bridge.config().qformer;
        let tokens = config.num_queries + options.rows() * options.max_new_tokens;
        let cache = 2 * config.depth * config.width * size_of::<f32>();
        let scores = 2 * options.rows() * config.vocab_size * size_of::<f32>();
        self.picture_bytes() + tokens * cache + scores
    }

    /// For each picture the score of each text.
    ///
    /// # Errors
    /// If a text is too long for the tokenizer.
    pub fn score(&self, pictures: &[Rgb], texts: &[&str]) -> Result<Vec<Vec<Score>>> {
        let texts = self.texts(texts)?;
        let image = self.bridge.image(&self.vision.encode(pictures)?, &Dropout::off())?;
        (0..pictures.len()).map(|row| self.score_row(&image, row, &texts)).collect()
    }

    /// Texts, ready to be compared with pictures.
    pub(crate) fn texts(&self, texts: &[&str]) -> Result<Texts> {
        let batch = self.tokenize(texts)?;
        let tokens = batch.mask_tensor()?;
        let embeds = self.bridge.text(&batch.ids, &tokens, &Dropout::off())?;
        Ok(Texts { ids: batch.ids, tokens, embeds })
    }

    /// The scores of `texts` for picture `row` of `image`.
    pub(crate) fn score_row(
        &self,
        image: &ImageFeatures,
        row: usize,
        texts: &Texts,
    ) -> Result<Vec<Score>> {
        let Texts { ids, tokens, embeds } = texts;
        let cosines = stage1::similarity(&image.embeds.narrow(0, row, 1)?, embeds)?;
        // One picture with every text: each row of the batch is the same picture.
        let picture = image.picture.select(&vec![row as u32; ids.dim(0)?])?;
        let logits = self.bridge.itm(&picture, ids, tokens, &Dropout::off())?;
        let matched = stage1::match_probability(&logits)?.into_iter();
        let scores = matched.zip(cosines.flatten_all()?.to_vec1()?);
        Ok(scores.map(|(itm, itc)| Score { itm, itc }).collect())
    }

    /// Pictures → (b, queries, e), normalised.
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn embed_images(&self, pictures: &[Rgb]) -> Result<Tensor> {
        Ok(self.bridge.image(&self.vision.encode(pictures)?, &Dropout::off())?.embeds)
    }

    /// Texts → (b, e), normalised.
    ///
    /// # Errors
    /// If a text is too long for the tokenizer.
    pub fn embed_texts(&self, texts: &[&str]) -> Result<Tensor> {
        let batch = self.tokenize(texts)?;
        self.bridge.text(&batch.ids, &batch.mask_tensor()?, &Dropout::off())
    }

    /// The queries' output before its projection: pictures → (b, queries, w).
    ///
    /// # Errors
    /// Only if a tensor operation fails.
    pub fn image_features(&self, pictures: &[Rgb]) -> Result<Tensor> {
        Ok(self.bridge.image(&self.vision.encode(pictures)?, &Dropout::off())?.queries)
    }

    /// One text → hidden states (t, w), `[CLS]` first.
    ///
    /// # Errors
    /// If the text is too long for the tokenizer.
    pub fn text_features(&self, text: &str) -> Result<Tensor> {
        let batch = self.tokenize(&[text])?;
        let tokens = batch.mask_tensor()?;
        Ok(self.bridge.qformer().text(&batch.ids, &tokens, &Dropout::off())?.squeeze(0)?)
    }

    /// What the queries see of each picture and of `text` together: (b, queries, w).
    ///
    /// # Errors
    /// If the text is too long for the tokenizer.
    pub fn multimodal_features(&self, pictures: &[Rgb], text: &str) -> Result<Tensor> {
        let off = Dropout::off();
        let image = self.bridge.image(&self.vision.encode(pictures)?, &off)?;
        let batch = self.tokenize(&vec![text; pictures.len()])?;
        self.bridge.qformer().pair(&image.picture, &batch.ids, &batch.mask_tensor()?, &off)
    }

    /// For each picture the best captions that the first stage writes by itself (ITG).
    ///
    /// # Errors
    /// If the checkpoint brought no language-model head, or an option is out of range.
    pub fn caption(
        &self,
        pictures: &[Rgb],
        options: &generate::Options,
    ) -> Result<Vec<Vec<Hypothesis>>> {
        let patches = self.vision.encode(pictures)?;
        self.caption_after(self.bridge.image(&patches, &Dropout::off())?, options)
    }

    /// [`Self::caption`] of pictures whose queries have been computed.
    ///
    /// # Errors
    /// As [`Self::caption`].
    pub fn caption_after(
        &self,
        image: ImageFeatures,
        options: &generate::Options,
    ) -> Result<Vec<Vec<Hypothesis>>> {
        let mut options = options.clone();
        if options.eos.is_empty() {
            options.eos = vec![self.tokenizer.special().eos];
        }
        let rows = image.queries.dim(0)?;
        generate::generate(&mut ItgDecoder::new(&self.bridge, image)?, rows, &options)
    }

    /// The text of a hypothesis, without special tokens.
    ///
    /// # Errors
    /// If an id is no token.
    pub fn text(&self, hypothesis: &Hypothesis) -> Result<String> {
        Ok(self.tokenizer.decode(&hypothesis.tokens, true)?.trim().to_owned())
    }

    /// Texts as the bridge reads them: `[CLS]` … `[SEP]`, cut at the longest it was trained on.
    ///
    /// # Errors
    /// If a text is too long for the tokenizer.
    pub fn tokenize(&self, texts: &[&str]) -> Result<TextBatch> {
        let padding =
            Padding { max_len: self.max_text_len, side: Side::Right, width: Width::Longest };
        self.tokenizer.encode_batch(texts, true, padding)
    }

    /// The stage-1 bridge, for callers that keep features.
    #[must_use]
    pub fn bridge(&self) -> &Stage1 {
        &self.bridge
    }

    /// The image encoder, for callers that keep its output.
    #[must_use]
    pub fn vision(&self) -> &Vision {
        &self.vision
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_put_together_in_order() {
        let x = Tensor::arange(0f32, 10.0, &Device::Cpu).unwrap().reshape((5, 2)).unwrap();
        for (most, parts) in [(1, vec![1; 5]), (2, vec![2, 2, 1]), (5, vec![5]), (9, vec![5])] {
            let seen = std::cell::RefCell::new(Vec::new());
            let same = in_parts(&x, most, |part| {
                seen.borrow_mut().push(part.dim(0)?);
                Ok(part.clone())
            });
            assert_eq!(same.unwrap().to_vec2::<f32>().unwrap(), x.to_vec2::<f32>().unwrap());
            assert_eq!(*seen.borrow(), parts);
        }
        let none = in_parts(&x.narrow(0, 0, 0).unwrap(), 2, |part| Ok(part.clone())).unwrap();
        assert_eq!(none.dims(), [0, 2]);
    }
}

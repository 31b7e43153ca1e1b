//! Recipes: what was written in the TOML file ([`RecipeFile`]), then what it means ([`Recipe`], one per stage).
//!
//! A recipe is complete: every field is written out, there are no hidden defaults and no inheritance. Unknown fields and
//! values out of range are refused with the field's name. `--set key=value` changes a field before any check, so a
//! changed recipe is held to the same rules.

use std::path::{Path, PathBuf};

use blip2_ops::{MixedPrecision, WeightFormat};
use serde::{Deserialize, Serialize};

use crate::checkpoint::sha256;
use crate::schedule::ScheduleKind;
use crate::{Error, Result};

/// Tokens of a random language model: bytes, start, end, picture.
pub(crate) const RANDOM_VOCAB: usize = 259;

/// A recipe file as written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecipeFile {
    /// Name of the run; it writes below `runs/NAME` unless told otherwise.
    pub name: String,
    /// Decides every random choice of the run.
    pub seed: u64,
    /// Where the pictures and captions come from.
    pub data: DataSection,
    /// How training pictures are varied.
    pub augment: AugmentSection,
    /// Whether the frozen image encoder's output is kept on disk.
    pub features: FeatureSection,
    /// The parts of the model.
    pub model: ModelSection,
    /// First stage: representation learning. Left out, it is not trained.
    pub stage1: Option<Stage1Section>,
    /// Second stage: generation through the frozen language model. Left out, it is not trained.
    pub stage2: Option<Stage2Section>,
    /// Logging, checkpoints, threads: nothing that changes the numbers.
    pub runtime: RuntimeSection,
}

/// Where the pictures and captions come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSection {
    /// Which data set `blip2 data` makes in `dir` when it is not there.
    pub build: DataBuild,
    /// Folder with the shards of every split.
    pub dir: PathBuf,
    /// Split to train on.
    pub train: String,
    /// Split to watch and choose by, never trained on. Training does not read it: it says which split to name in an
    /// evaluation (`blip2 eval RECIPE --set data.split=val`). A run with another one counts as another run all the same.
    pub val: String,
    /// Split of the final numbers, never looked at before. Training does not read it either; see `val`.
    pub test: String,
    /// Which of a picture's captions is used.
    pub captions: CaptionChoice,
}

/// A data set that this program can make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataBuild {
    /// Real drawings and photographs with captions, and scenes composed of them; downloads packages.
    Mini,
    /// Drawn shapes with captions; no downloads, seconds.
    Tiny,
    /// The shards exist already.
    None,
}

/// Which of a picture's captions is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CaptionChoice {
    /// The first one.
    First,
    /// One drawn anew in every epoch.
    Random,
}

/// How training pictures are varied.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AugmentSection {
    /// Smallest and largest share of the picture's area that a random crop keeps; `[1.0, 1.0]` with `ratio` 1 to 1
    /// still crops to a square.
    pub scale: [f64; 2],
    /// Narrowest and widest width/height of a random crop.
    pub ratio: [f64; 2],
    /// Probability of mirroring; samples whose caption says left or right are never mirrored.
    pub flip: f64,
}

/// Whether the frozen image encoder's output is kept on disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeatureSection {
    /// Views of each training picture to keep; epoch e uses view e modulo this. View 0 is the plain resized picture,
    /// the others are augmented. 0: encode on the fly, with a new crop every time.
    pub views: u32,
    /// Decides the views' crops and flips, so that both stages can share one cache whatever their own seeds are.
    pub seed: u64,
    /// Folder of the cache; shared by recipes with the same encoder, data, augmentation and `features.seed`.
    pub dir: PathBuf,
    /// Pictures per encoder call.
    pub batch_size: usize,
}

/// The parts of the model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSection {
    /// The frozen image encoder.
    pub vision: VisionSection,
    /// The trained bridge.
    pub qformer: QformerSection,
    /// The frozen language model.
    pub llm: LlmSection,
}

/// The frozen image encoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "lowercase", deny_unknown_fields)]
pub enum VisionSection {
    /// The pretrained ViT-S/14 of mini.
    Mini {
        /// Side of the square input in pixels: a multiple of 14. Positions are resized to it.
        image_size: usize,
    },
    /// That of a model folder of ours, which `blip2 convert` makes of any checkpoint.
    Directory {
        /// The folder.
        path: PathBuf,
        /// What its image encoder must be.
        shape: VisionShape,
        /// Side of the square input in pixels: a multiple of the patches'. Positions are resized to it.
        image_size: usize,
        /// How its matrices are held: `f32`, `f16`, `q8_0`, `q4_k`.
        weights: String,
    },
    /// Random weights of this shape, for tests.
    Random {
        /// Side of the square input in pixels.
        image_size: usize,
        /// Side of a patch in pixels.
        patch_size: usize,
        /// Features per patch.
        width: usize,
        /// Number of blocks.
        depth: usize,
        /// Attention heads per block.
        num_heads: usize,
        /// Hidden width of each feed-forward.
        mlp_width: usize,
    },
}

/// An image encoder's published shape, so that a wrong folder is noticed and costs are known without one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum VisionShape {
    /// EVA-CLIP ViT-g/14 without its last block.
    #[serde(rename = "eva_clip_g")]
    EvaClipG,
    /// CLIP ViT-L/14 without its last block.
    #[serde(rename = "clip_l")]
    ClipL,
    /// Whatever the folder holds.
    #[serde(rename = "any")]
    Any,
}

/// A BERT's published shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BertShape {
    /// bert-base-uncased: 12 layers, width 768.
    #[serde(rename = "bert_base")]
    BertBase,
    /// Whatever the folder holds.
    #[serde(rename = "any")]
    Any,
}

/// A language model's published shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LlmShape {
    /// OPT-2.7B.
    #[serde(rename = "opt-2.7b")]
    Opt2_7b,
    /// OPT-6.7B.
    #[serde(rename = "opt-6.7b")]
    Opt6_7b,
    /// FlanT5-XL.
    #[serde(rename = "flan-t5-xl")]
    FlanT5Xl,
    /// FlanT5-XXL.
    #[serde(rename = "flan-t5-xxl")]
    FlanT5Xxl,
    /// Whatever the folder holds.
    #[serde(rename = "any")]
    Any,
}

/// The trained bridge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QformerSection {
    /// Where the text layers' initial weights and the vocabulary come from.
    pub init: BertSection,
    /// Number of learned queries.
    pub num_queries: usize,
    /// Every how many layers queries attend to the picture, from layer 0.
    pub cross_attention_every: usize,
    /// Width of the shared space of picture and text.
    pub embed_dim: usize,
    /// Probability of dropout on hidden states and attention.
    pub dropout: f32,
}

/// The BERT that the bridge starts from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "lowercase", deny_unknown_fields)]
pub enum BertSection {
    /// The pretrained MiniLM of mini: 6 layers, width 384.
    Mini {},
    /// A folder with `config.json`, `model.safetensors` and `vocab.txt` of a BERT.
    Directory {
        /// The folder.
        path: PathBuf,
        /// What it must be.
        shape: BertShape,
    },
    /// Random weights of this shape and a vocabulary made of the training captions, for tests.
    Random {
        /// Features per token.
        width: usize,
        /// Number of layers.
        depth: usize,
        /// Attention heads per layer.
        num_heads: usize,
        /// Hidden width of each feed-forward.
        ffn_width: usize,
    },
}

/// The frozen language model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "lowercase", deny_unknown_fields)]
pub enum LlmSection {
    /// The pretrained SmolLM2-135M of mini.
    Mini {
        /// How its matrices are held: `f32`, `f16`, `q8_0`, `q4_k`, or `stored` as they are in the file.
        weights: String,
    },
    /// An OPT, T5 or LLaMA in Hugging Face layout, or that of a model folder of ours.
    Directory {
        /// The folder.
        path: PathBuf,
        /// What it must be.
        shape: LlmShape,
        /// How its matrices are held: `f32`, `f16`, `q8_0`, `q4_k`.
        weights: String,
    },
    /// Random weights of this shape and a byte vocabulary, for tests.
    Random {
        /// Features per token.
        width: usize,
        /// Number of blocks.
        depth: usize,
        /// Attention heads per block.
        num_heads: usize,
        /// Heads of keys and values; divides `num_heads`.
        num_kv_heads: usize,
        /// Hidden width of each feed-forward.
        ffn_width: usize,
    },
}

/// First stage: contrast, matching and captioning of picture and text, with equal weight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage1Section {
    /// The bridge to start from: `bert` makes a new one from `model.qformer.init`; else the run folder, `model.safetensors`
    /// or GGUF file of an earlier stage 1.
    pub init: String,
    /// Longest caption in tokens, `[CLS]` and `[SEP]` included; longer ones are cut.
    pub max_text_len: usize,
    /// Label smoothing of the contrastive and the captioning loss.
    pub label_smoothing: f32,
    /// Whether pairs of a batch that have the same caption word for word count as right for each other: the contrastive
    /// loss shares its target among them, and none is a negative of another. Otherwise this holds for pairs with the same
    /// `image_id`, as in the reference.
    pub same_caption_matches: bool,
    /// How many pairs of each batch matching (ITM) learns from, each with its two wrong partners; without it all, as in the
    /// reference. Matching costs two thirds of a step; the wrong partners come from the whole batch either way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub itm_pairs: Option<usize>,
    /// Whether the image encoder is trained as well. It becomes a part of the run's own model.
    pub train_vision: bool,
    /// How long and in what portions.
    pub train: TrainSection,
    /// The optimiser and its schedule.
    pub optimizer: OptimizerSection,
}

/// Second stage: captions and answers through the frozen language model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage2Section {
    /// The first stage's result to start from: its run folder or its `model.safetensors`; `stage1` stands for the first
    /// stage of this same recipe; `none` starts from the bridge's own initial weights. The result of an earlier stage 2 does
    /// as well, and keeps its projection.
    pub init: String,
    /// How large the words that a new projection makes are at first.
    pub proj_init: ProjInit,
    /// Longest text in tokens, prompt included; longer ones are cut.
    pub max_text_len: usize,
    /// Text put before every caption, not trained on; empty for none.
    pub prompt: String,
    /// Text put before every answer, not trained on; `{}` stands for the question.
    pub question_prompt: String,
    /// Texts per picture and step, as far as it has different ones. The queries are computed once for all of them.
    pub texts_per_picture: usize,
    /// Probability that a text is a question and its answer, instead of a caption, where a sample has both left.
    pub questions: f64,
    /// Whether an encoder–decoder is also given the beginning of a caption, up to a place drawn from its first half, and
    /// writes the rest (paper §3.3). A language model that only decodes knows no such thing.
    pub prefix_lm: bool,
    /// Whether the bridge reads the question as well, of a caption its prompt: its queries look for what is asked for (paper,
    /// fine-tuning on VQA). A bridge to start from that reads no text gets the text layers of `model.qformer.init`.
    pub reads_questions: bool,
    /// Whether the image encoder is trained as well. It becomes a part of the run's own model.
    pub train_vision: bool,
    /// How long and in what portions.
    pub train: TrainSection,
    /// The optimiser and its schedule.
    pub optimizer: OptimizerSection,
}

/// How long and in what portions; exactly one of `steps` and `epochs` is given.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainSection {
    /// Optimiser steps of the run.
    pub steps: Option<u64>,
    /// Passes over the data.
    pub epochs: Option<u64>,
    /// Samples per micro-batch and process; the contrastive loss compares within it.
    pub batch_size: usize,
    /// Micro-batches whose gradients are averaged into one step.
    pub accumulate: usize,
    /// Largest global norm of the gradient; beyond it, it is scaled down. 0: no clipping.
    pub clip: f64,
    /// In which numbers products are computed.
    #[serde(default, skip_serializing_if = "Precision::is_f32")]
    pub precision: Precision,
    /// Stop after this many steps in a row had a loss or gradient that is not finite; such a step changes nothing.
    pub stop_after_nonfinite: u64,
}

/// In which numbers a training step computes its products. Weights, optimiser, sums and everything else are f32 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// As they are.
    #[default]
    F32,
    /// Factors rounded to bf16, except in attention: mixed precision, for processors with AVX-512 BF16.
    Bf16,
}

impl Precision {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants a reference")]
    fn is_f32(&self) -> bool {
        *self == Self::F32
    }

    /// Computes so as long as what it returns lives. `stage` is named in errors.
    ///
    /// # Errors
    /// If this processor has no instructions for it.
    pub fn start(self, stage: u32) -> Result<Option<MixedPrecision>> {
        if self == Self::F32 {
            return Ok(None);
        }
        let lacking = || {
            Error::Recipe(format!(
                "stage{stage}.train.precision is bf16: this processor has no instructions for it (AVX-512 BF16), and f32 \
                 takes no longer on it"
            ))
        };
        Ok(Some(MixedPrecision::start().ok_or_else(lacking)?))
    }
}

/// The optimiser (AdamW) and its schedule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerSection {
    /// Rule of the learning rate.
    pub schedule: ScheduleKind,
    /// Highest learning rate.
    pub lr: f64,
    /// Learning rate at the end of the cosine.
    pub min_lr: f64,
    /// Learning rate at the start of the warm-up.
    pub warmup_lr: f64,
    /// Length of the warm-up.
    pub warmup_steps: u64,
    /// Decay of the averages of the gradient and of its square.
    pub betas: [f64; 2],
    /// Added to the root of the squares' average.
    pub eps: f64,
    /// Weight decay of everything but biases and vectors.
    pub weight_decay: f64,
    /// The learning rate of a layer of the image encoder, where it is trained, as a share of the layer behind it. 1: all learn
    /// alike, as in LAVIS, whose code sets shares and never uses them.
    pub layer_decay: f64,
}

/// Logging, checkpoints, threads: nothing that changes the numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuntimeSection {
    /// A line in `metrics.jsonl` and a point in TensorBoard's curves every so many steps, and at the last one.
    pub log_every: u64,
    /// A checkpoint every so many steps, and one at the end.
    pub checkpoint_every: u64,
    /// How many of the newest checkpoints stay.
    pub keep_checkpoints: usize,
    /// Threads for the tensor operations; 0: one per core. Set when training starts, unless the program computes already:
    /// the command line's `--threads` goes before.
    pub threads: usize,
    /// Threads that read and prepare batches.
    pub loaders: usize,
    /// Batches that each of them prepares ahead.
    pub prefetch: usize,
}

/// One of the two stages, with what only it has.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "lowercase", tag = "stage")]
pub enum Stage {
    /// Representation learning.
    One {
        /// See [`Stage1Section::init`].
        init: Stage1Init,
        /// See [`Stage1Section::max_text_len`].
        max_text_len: usize,
        /// See [`Stage1Section::label_smoothing`].
        label_smoothing: f32,
        /// See [`Stage1Section::same_caption_matches`].
        same_caption_matches: bool,
        /// See [`Stage1Section::itm_pairs`].
        #[serde(skip_serializing_if = "Option::is_none")]
        itm_pairs: Option<usize>,
        /// See [`Stage1Section::train_vision`].
        train_vision: bool,
    },
    /// Generation.
    Two {
        /// See [`Stage2Section::init`].
        init: Stage2Init,
        /// See [`Stage2Section::proj_init`].
        proj_init: ProjInit,
        /// See [`Stage2Section::max_text_len`].
        max_text_len: usize,
        /// See [`Stage2Section::prompt`].
        prompt: String,
        /// See [`Stage2Section::question_prompt`].
        question_prompt: String,
        /// See [`Stage2Section::texts_per_picture`].
        texts_per_picture: usize,
        /// See [`Stage2Section::questions`].
        questions: f64,
        /// See [`Stage2Section::prefix_lm`].
        prefix_lm: bool,
        /// See [`Stage2Section::reads_questions`].
        reads_questions: bool,
        /// See [`Stage2Section::train_vision`].
        train_vision: bool,
    },
}

/// What the first stage starts from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage1Init {
    /// A new bridge made from a BERT.
    Bert,
    /// A run folder or a file of weights.
    Path(PathBuf),
}

/// How large the words that a new projection makes for the language model are at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProjInit {
    /// As the reference: a linear layer of PyTorch, uniform within 1/√inputs.
    Uniform,
    /// The same, scaled so that soft words are about as large as the language model's own embeddings.
    Words,
}

/// What the second stage starts from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage2Init {
    /// The first stage of the same recipe.
    Stage1,
    /// The bridge's initial weights.
    None,
    /// A run folder or a safetensors file.
    Path(PathBuf),
}

/// How long a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Length {
    /// Optimiser steps.
    Steps(u64),
    /// Passes over the data.
    Epochs(u64),
}

/// One run of one stage: a checked recipe in which nothing is optional by accident.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recipe {
    /// Name of the run.
    pub name: String,
    /// Decides every random choice.
    pub seed: u64,
    /// The stage, with what only it has.
    pub stage: Stage,
    /// Where the pictures and captions come from.
    pub data: DataSection,
    /// How training pictures are varied.
    pub augment: AugmentSection,
    /// The cache of the frozen encoder's output.
    pub features: FeatureSection,
    /// The parts of the model.
    pub model: ModelSection,
    /// How long.
    pub length: Length,
    /// In what portions; its `steps` and `epochs` are in [`Recipe::length`].
    pub train: TrainSection,
    /// The optimiser and its schedule.
    pub optimizer: OptimizerSection,
    /// Logging, checkpoints, threads.
    pub runtime: RuntimeSection,
}

impl RecipeFile {
    /// Reads a recipe file and applies `changes`, each `key=value` with a dotted key and a TOML value.
    ///
    /// # Errors
    /// If the file can't be read, is no TOML, has an unknown, missing or mistyped field, or a value out of range: the
    /// message names the file and the field.
    pub fn read(path: &Path, changes: &[String]) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        Self::parse(&text, changes).map_err(|err| match err {
            Error::Recipe(reason) => Error::Recipe(format!("{}: {reason}", path.display())),
            other => other,
        })
    }

    /// The same for text.
    ///
    /// # Errors
    /// As [`RecipeFile::read`].
    pub fn parse(text: &str, changes: &[String]) -> Result<Self> {
        let file: Self = parse_toml(text, changes)?;
        file.check()?;
        Ok(file)
    }

    /// One [`Recipe`] per stage that the file has, in order.
    #[must_use]
    pub fn runs(&self) -> Vec<Recipe> {
        let one = self.stage1.iter().map(|s| {
            let stage = Stage::One {
                init: match s.init.as_str() {
                    "bert" => Stage1Init::Bert,
                    path => Stage1Init::Path(path.into()),
                },
                max_text_len: s.max_text_len,
                label_smoothing: s.label_smoothing,
                same_caption_matches: s.same_caption_matches,
                itm_pairs: s.itm_pairs,
                train_vision: s.train_vision,
            };
            self.run(stage, &s.train, &s.optimizer)
        });
        let two = self.stage2.iter().map(|s| {
            let stage = Stage::Two {
                init: match s.init.as_str() {
                    "stage1" => Stage2Init::Stage1,
                    "none" => Stage2Init::None,
                    path => Stage2Init::Path(path.into()),
                },
                proj_init: s.proj_init,
                max_text_len: s.max_text_len,
                prompt: s.prompt.clone(),
                question_prompt: s.question_prompt.clone(),
                texts_per_picture: s.texts_per_picture,
                questions: s.questions,
                prefix_lm: s.prefix_lm,
                reads_questions: s.reads_questions,
                train_vision: s.train_vision,
            };
            self.run(stage, &s.train, &s.optimizer)
        });
        one.chain(two).collect()
    }

    fn run(&self, stage: Stage, train: &TrainSection, optimizer: &OptimizerSection) -> Recipe {
        Recipe {
            name: self.name.clone(),
            seed: self.seed,
            stage,
            data: self.data.clone(),
            augment: self.augment.clone(),
            features: self.features.clone(),
            model: self.model.clone(),
            // `check` made sure that one of them is there.
            length: train.steps.map_or(Length::Epochs(train.epochs.unwrap_or(0)), Length::Steps),
            train: train.clone(),
            optimizer: optimizer.clone(),
            runtime: self.runtime.clone(),
        }
    }

    fn check(&self) -> Result<()> {
        let name_is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        require(
            !self.name.is_empty()
                && self.name.chars().all(name_is_plain)
                && !self.name.starts_with('.'),
            "name",
            &self.name,
            "letters, digits, - _ . and not a dot in front",
        )?;
        require(
            self.stage1.is_some() || self.stage2.is_some(),
            "stage1, stage2",
            "",
            "at least one of them",
        )?;
        self.augment.check()?;
        require(
            self.features.batch_size > 0,
            "features.batch_size",
            self.features.batch_size,
            "at least 1",
        )?;
        self.model.check()?;
        if let Some(stage) = &self.stage1 {
            require(!stage.init.is_empty(), "stage1.init", "\"\"", "a path or bert")?;
            at_least_3("stage1.max_text_len", stage.max_text_len)?;
            share("stage1.label_smoothing", stage.label_smoothing.into(), false)?;
            if let Some(pairs) = stage.itm_pairs {
                require(
                    (1..=stage.train.batch_size).contains(&pairs),
                    "stage1.itm_pairs",
                    pairs,
                    "at least 1, and at most stage1.train.batch_size",
                )?;
            }
            stage.train.check("stage1.train")?;
            stage.optimizer.check("stage1.optimizer", &stage.train)?;
            require(
                stage.train.batch_size > 1,
                "stage1.train.batch_size",
                stage.train.batch_size,
                "at least 2: the first stage compares samples of a batch",
            )?;
        }
        if let Some(stage) = &self.stage2 {
            at_least_3("stage2.max_text_len", stage.max_text_len)?;
            positive("stage2.texts_per_picture", stage.texts_per_picture)?;
            share("stage2.questions", stage.questions, true)?;
            let prompt = &stage.question_prompt;
            require(
                stage.questions == 0.0 || prompt.matches("{}").count() == 1,
                "stage2.question_prompt",
                prompt,
                "a text with one {} for the question",
            )?;
            require(!stage.init.is_empty(), "stage2.init", "\"\"", "a path, stage1 or none")?;
            require(
                stage.init != "stage1" || self.stage1.is_some(),
                "stage2.init",
                &stage.init,
                "a path or none, because this recipe has no stage1",
            )?;
            stage.train.check("stage2.train")?;
            stage.optimizer.check("stage2.optimizer", &stage.train)?;
        }
        let trains = [
            self.stage1.as_ref().is_some_and(|stage| stage.train_vision),
            self.stage2.as_ref().is_some_and(|stage| stage.train_vision),
        ];
        if trains.contains(&true) {
            require(
                self.features.views == 0,
                "features.views",
                self.features.views,
                "0, for what is kept on disk of an image encoder is not true any more once it is trained",
            )?;
            require(
                self.stage1.is_none() || self.stage2.is_none(),
                "train_vision",
                true,
                "a recipe with one stage; the next one names this one's result as its model.vision",
            )?;
        }
        self.runtime.check()
    }
}

impl Recipe {
    /// Whether the image encoder is trained.
    #[must_use]
    pub fn trains_vision(&self) -> bool {
        match self.stage {
            Stage::One { train_vision, .. } | Stage::Two { train_vision, .. } => train_vision,
        }
    }

    /// Hash, in hex, of everything that decides the numbers of the run: all but `runtime`, `name` and the places where
    /// things lie.
    ///
    /// # Errors
    /// Never for a recipe that was read.
    pub fn hash(&self) -> Result<String> {
        Ok(sha256(self.decisive()?.to_string().as_bytes()))
    }

    /// The part of the recipe that [`Recipe::hash`] is about.
    ///
    /// # Errors
    /// Never for a recipe that was read.
    pub fn decisive(&self) -> Result<serde_json::Value> {
        let mut value = serde_json::to_value(self).map_err(|err| Error::Recipe(err.to_string()))?;
        for path in [
            &["name"][..],
            &["runtime"],
            &["data", "dir"],
            &["features", "dir"],
            &["features", "batch_size"],
        ] {
            let (last, parents) = path.split_last().unwrap_or((&"", &[]));
            let parent = parents.iter().try_fold(&mut value, |value, key| value.get_mut(*key));
            if let Some(object) = parent.and_then(serde_json::Value::as_object_mut) {
                object.shift_remove(*last);
            }
        }
        Ok(value)
    }

    /// 1 or 2.
    #[must_use]
    pub fn stage_number(&self) -> u32 {
        match self.stage {
            Stage::One { .. } => 1,
            Stage::Two { .. } => 2,
        }
    }

    /// Longest text in tokens.
    #[must_use]
    pub fn max_text_len(&self) -> usize {
        match self.stage {
            Stage::One { max_text_len, .. } | Stage::Two { max_text_len, .. } => max_text_len,
        }
    }
}

/// The dotted names of the fields in which two values of [`Recipe::decisive`] differ.
#[must_use]
pub fn differences(a: &serde_json::Value, b: &serde_json::Value) -> Vec<String> {
    fn walk(a: &serde_json::Value, b: &serde_json::Value, path: &str, out: &mut Vec<String>) {
        if let (Some(x), Some(y)) = (a.as_object(), b.as_object()) {
            let keys: std::collections::BTreeSet<_> = x.keys().chain(y.keys()).collect();
            for key in keys {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                let missing = serde_json::Value::Null;
                walk(x.get(key).unwrap_or(&missing), y.get(key).unwrap_or(&missing), &path, out);
            }
        } else if a != b {
            out.push(format!("{path} ({a} → {b})"));
        }
    }
    let mut out = Vec::new();
    walk(a, b, "", &mut out);
    out
}

/// Reads TOML after `changes`, each `key=value`.
pub(crate) fn parse_toml<T: serde::de::DeserializeOwned>(
    text: &str,
    changes: &[String],
) -> Result<T> {
    let mut table: toml::Table =
        toml::from_str(text).map_err(|err| Error::Recipe(err.to_string()))?;
    for change in changes {
        set(&mut table, change)?;
    }
    // Reading the text again, not the table, makes errors show the line.
    let text = if changes.is_empty() { text.to_owned() } else { table.to_string() };
    toml::from_str(&text).map_err(|err| Error::Recipe(err.to_string()))
}

/// Applies one `key=value`: a dotted key and a TOML value. What is no TOML value is taken as a string, so that
/// `name=test` needs no quotes inside the shell's quotes.
fn set(table: &mut toml::Table, change: &str) -> Result<()> {
    let wrong = |reason: &str| Error::Recipe(format!("--set {change}: {reason}"));
    let (key, value) = change.split_once('=').ok_or_else(|| wrong("expected key=value"))?;
    let path: Vec<&str> = key.trim().split('.').collect();
    if path.iter().any(|part| part.is_empty()) {
        return Err(wrong("the key has an empty part"));
    }
    let value = value.trim();
    let parsed = toml::from_str::<toml::Table>(&format!("value = {value}"));
    let value = parsed.ok().and_then(|mut t| t.remove("value")).unwrap_or_else(|| value.into());
    let (last, parents) = path.split_last().ok_or_else(|| wrong("the key is empty"))?;
    let mut place = table;
    for part in parents {
        let entry = place.entry(*part).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        place = entry
            .as_table_mut()
            .ok_or_else(|| wrong(&format!("{part} is a value, not a section")))?;
    }
    place.insert((*last).to_owned(), value);
    // `steps` and `epochs` exclude each other; setting one is a clear wish to drop the other.
    match *last {
        "steps" => drop(place.remove("epochs")),
        "epochs" => drop(place.remove("steps")),
        _ => {}
    }
    Ok(())
}

/// Refuses a field's value by name.
pub(crate) fn require(
    ok: bool,
    field: &str,
    value: impl std::fmt::Display,
    wanted: &str,
) -> Result<()> {
    if ok { Ok(()) } else { Err(Error::Recipe(format!("{field} is {value}; it must be {wanted}"))) }
}

fn share(field: &str, value: f64, one_allowed: bool) -> Result<()> {
    let ok = (0.0..1.0).contains(&value) || (one_allowed && value == 1.0);
    require(ok, field, value, if one_allowed { "from 0 to 1" } else { "from 0 to below 1" })
}

fn at_least_3(field: &str, value: usize) -> Result<()> {
    require((3..=512).contains(&value), field, value, "from 3 to 512")
}

/// Refuses 0.
pub(crate) fn positive(field: &str, value: usize) -> Result<()> {
    require(value > 0, field, value, "at least 1")
}

fn divides(part: (&str, usize), whole: (&str, usize)) -> Result<()> {
    positive(part.0, part.1)?;
    positive(whole.0, whole.1)?;
    require(
        whole.1.is_multiple_of(part.1),
        part.0,
        part.1,
        &format!("a divisor of {} = {}", whole.0, whole.1),
    )
}

fn ordered(field: &str, [low, high]: [f64; 2], max: f64) -> Result<()> {
    let ok = low > 0.0 && low <= high && high <= max;
    let wanted = if max.is_finite() {
        format!("two numbers 0 < a ≤ b ≤ {max}")
    } else {
        "two numbers 0 < a ≤ b".into()
    };
    require(ok, field, format!("[{low}, {high}]"), &wanted)
}

impl VisionSection {
    /// How the matrices of the image encoder are held while it is frozen.
    ///
    /// # Errors
    /// If the format is not one of ours; a checked recipe's is.
    pub fn format(&self) -> Result<WeightFormat> {
        match self {
            Self::Directory { weights, .. } => weight_format("model.vision.weights", weights),
            Self::Mini { .. } | Self::Random { .. } => Ok(WeightFormat::F32),
        }
    }
}

impl LlmSection {
    /// How the matrices of the language model are held; `None` keeps what is stored.
    ///
    /// # Errors
    /// If the format is not one of ours; a checked recipe's is.
    pub fn format(&self) -> Result<Option<WeightFormat>> {
        match self {
            Self::Mini { weights } if weights == "stored" => Ok(None),
            Self::Mini { weights } | Self::Directory { weights, .. } => {
                weight_format("model.llm.weights", weights).map(Some)
            }
            Self::Random { .. } => Ok(None),
        }
    }
}

/// How the matrices of a frozen part are held.
fn weight_format(field: &str, value: &str) -> Result<WeightFormat> {
    let format = value.parse();
    require(format.is_ok(), field, value, "f32, f16, q8_0 or q4_k")?;
    Ok(format.unwrap_or(WeightFormat::F32))
}

impl AugmentSection {
    fn check(&self) -> Result<()> {
        ordered("augment.scale", self.scale, 1.0)?;
        ordered("augment.ratio", self.ratio, f64::MAX)?;
        share("augment.flip", self.flip, true)
    }
}

impl ModelSection {
    fn check(&self) -> Result<()> {
        let divides_image = |patch_size, image_size| {
            divides(
                ("model.vision.patch_size", patch_size),
                ("model.vision.image_size", image_size),
            )
        };
        match &self.vision {
            &VisionSection::Mini { image_size } => divides_image(14, image_size)?,
            // Whether it is a multiple of the patches is known when the folder is read.
            VisionSection::Directory { image_size, weights, .. } => {
                positive("model.vision.image_size", *image_size)?;
                weight_format("model.vision.weights", weights)?;
            }
            &VisionSection::Random {
                image_size,
                patch_size,
                width,
                depth,
                num_heads,
                mlp_width,
            } => {
                divides_image(patch_size, image_size)?;
                divides(("model.vision.num_heads", num_heads), ("model.vision.width", width))?;
                positive("model.vision.depth", depth)?;
                positive("model.vision.mlp_width", mlp_width)?;
            }
        }
        if let BertSection::Random { width, depth, num_heads, ffn_width } = self.qformer.init {
            divides(
                ("model.qformer.init.num_heads", num_heads),
                ("model.qformer.init.width", width),
            )?;
            positive("model.qformer.init.depth", depth)?;
            positive("model.qformer.init.ffn_width", ffn_width)?;
        }
        positive("model.qformer.num_queries", self.qformer.num_queries)?;
        positive("model.qformer.cross_attention_every", self.qformer.cross_attention_every)?;
        positive("model.qformer.embed_dim", self.qformer.embed_dim)?;
        share("model.qformer.dropout", self.qformer.dropout.into(), false)?;
        match &self.llm {
            LlmSection::Mini { weights } => require(
                weights == "stored" || weights.parse::<WeightFormat>().is_ok(),
                "model.llm.weights",
                weights,
                "stored, f32, f16, q8_0 or q4_k",
            ),
            LlmSection::Directory { weights, .. } => {
                weight_format("model.llm.weights", weights).map(drop)
            }
            LlmSection::Random { width, depth, num_heads, num_kv_heads, ffn_width } => {
                divides(("model.llm.num_heads", *num_heads), ("model.llm.width", *width))?;
                divides(
                    ("model.llm.num_kv_heads", *num_kv_heads),
                    ("model.llm.num_heads", *num_heads),
                )?;
                require(
                    (width / num_heads).is_multiple_of(2),
                    "model.llm.width",
                    width,
                    "an even number of features per head (rotary positions turn pairs)",
                )?;
                positive("model.llm.depth", *depth)?;
                positive("model.llm.ffn_width", *ffn_width)
            }
        }
    }
}

impl TrainSection {
    fn check(&self, section: &str) -> Result<()> {
        let length = (self.steps, self.epochs);
        require(
            matches!(length, (Some(1..), None) | (None, Some(1..))),
            &format!("{section}.steps, {section}.epochs"),
            format!("{:?}, {:?}", self.steps, self.epochs),
            "one of them given, and at least 1",
        )?;
        positive(&format!("{section}.batch_size"), self.batch_size)?;
        positive(&format!("{section}.accumulate"), self.accumulate)?;
        let clip = self.clip;
        require(
            clip >= 0.0 && clip.is_finite(),
            &format!("{section}.clip"),
            clip,
            "0 (none) or more",
        )?;
        require(
            self.stop_after_nonfinite > 0,
            &format!("{section}.stop_after_nonfinite"),
            self.stop_after_nonfinite,
            "at least 1",
        )
    }
}

impl OptimizerSection {
    fn check(&self, section: &str, train: &TrainSection) -> Result<()> {
        let field = |name: &str| format!("{section}.{name}");
        require(self.lr > 0.0 && self.lr <= 1.0, &field("lr"), self.lr, "above 0 and at most 1")?;
        for (name, value) in [("min_lr", self.min_lr), ("warmup_lr", self.warmup_lr)] {
            let wanted = format!("from 0 to lr = {}", self.lr);
            require((0.0..=self.lr).contains(&value), &field(name), value, &wanted)?;
        }
        for beta in self.betas {
            share(&field("betas"), beta, false)?;
        }
        require(self.eps > 0.0 && self.eps < 1.0, &field("eps"), self.eps, "above 0 and below 1")?;
        share(&field("weight_decay"), self.weight_decay, true)?;
        require(
            self.layer_decay > 0.0 && self.layer_decay <= 1.0,
            &field("layer_decay"),
            self.layer_decay,
            "a number above 0, at most 1",
        )?;
        if let (ScheduleKind::Paper, Some(steps)) = (self.schedule, train.steps) {
            let wanted = format!("less than steps = {steps}");
            require(self.warmup_steps < steps, &field("warmup_steps"), self.warmup_steps, &wanted)?;
        }
        Ok(())
    }
}

impl RuntimeSection {
    fn check(&self) -> Result<()> {
        for (name, value) in
            [("log_every", self.log_every), ("checkpoint_every", self.checkpoint_every)]
        {
            require(value > 0, &format!("runtime.{name}"), value, "at least 1")?;
        }
        positive("runtime.keep_checkpoints", self.keep_checkpoints)?;
        positive("runtime.loaders", self.loaders)?;
        positive("runtime.prefetch", self.prefetch)?;
        require(self.threads <= 4096, "runtime.threads", self.threads, "at most 4096")
    }
}

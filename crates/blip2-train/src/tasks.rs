//! The two stages as [`Task`]s: a recipe's pictures, texts and model, ready for the loop.
//!
//! ```text
//! runs/NAME/model/            the model folder (see [`crate::parts`])
//!           stage1/ stage2/   each stage's run: checkpoints, logs, and in the end model.safetensors and curves.png
//! ```
//!
//! [`train_recipe`] is the whole of `blip2 train`: it opens data and parts, fills the feature cache, trains each stage
//! that the recipe has and puts the results into the model folder.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use blip2::assets::Progress;
use blip2::image::{self, Pixels, Rgb};
use blip2::llm::Llm;
use blip2::model::{MAX_QUESTION_LEN, Vision, prompt_ids};
use blip2::params::ParamStore;
use blip2::stage1::{Stage1, Stage1Config};
use blip2::stage2::{Stage2, Stage2Config};
use blip2::tokenizer::{Padding, Side, Tokenizer, Width};
use blip2_ops::{Communicator, SingleProcess};
use candle_core::{DType, Tensor};
use rayon::prelude::*;
use serde_json::json;

use crate::augment::Augment;
use crate::checkpoint::sha256;
use crate::data::{Dataset, Meta, text::pre_caption};
use crate::encoder::{self, Encoder, Shown};
use crate::features::{Build, FeatureCache, FeatureShape};
use crate::monitor::{CURVES, draw_curves};
use crate::order::{BatchPlan, purpose};
use crate::parts::{Base, read_start};
use crate::recipe::{
    CaptionChoice, ProjInit, Recipe, RecipeFile, Stage, Stage1Init, Stage2Init, VisionSection,
};
use crate::rng::Rng;
use crate::steps::{self, LlmText, Stage1Batch, StepContext, Texts};
use crate::trainer::{
    Draws, MODEL, Monitor, Outcome, Resume, Run, RunFolder, Source, StepOutput, Task, train,
};
use crate::{Error, Result, init};

/// Captions are cut at this many words, as in the reference.
pub const MAX_WORDS: usize = 50;

// ------------------------------------------------------------------------------------------ pictures

/// Training pictures: a split of the data with captions in memory, and its feature cache if the recipe wants one.
pub struct Pictures {
    dataset: Dataset,
    metas: Vec<Meta>,
    augment: Augment,
    cache: Option<FeatureCache>,
    captions: CaptionChoice,
    hash: String,
}

impl Pictures {
    /// Opens a split, reads its captions and hashes them. `note` is told of samples that can't be used.
    ///
    /// # Errors
    /// If the shards can't be read, or too much of them can't be used.
    pub fn open(
        recipe: &Recipe,
        split: &str,
        side: usize,
        note: &mut dyn FnMut(&str),
    ) -> Result<Self> {
        let dataset = Dataset::open_split(&recipe.data.dir, split, note)?;
        let metas = (0..dataset.len()).map(|i| dataset.meta(i)).collect::<Result<Vec<_>>>()?;
        let hash = data_hash(&dataset, &metas, &recipe.data.dir, split)?;
        let [low, high] = recipe.augment.scale;
        let [narrow, wide] = recipe.augment.ratio;
        let augment = Augment {
            side: side as u32,
            scale: (low, high),
            ratio: (narrow, wide),
            flip: recipe.augment.flip,
        };
        Ok(Self { dataset, metas, augment, cache: None, captions: recipe.data.captions, hash })
    }

    /// Every caption, for a vocabulary.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        self.metas.iter().flat_map(Meta::all_captions)
    }

    /// The number of pictures.
    #[must_use]
    pub fn len(&self) -> usize {
        self.metas.len()
    }

    /// Never true: a split without samples can't be opened.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.metas.is_empty()
    }

    /// Fills and opens the feature cache, if the recipe has one. False if it was asked to stop.
    ///
    /// # Errors
    /// If a picture can't be decoded, or the disk fails.
    pub fn encode(
        &mut self,
        recipe: &Recipe,
        base: &Base,
        vision: &Vision,
        progress: &mut dyn FnMut(u64, u64),
        stop: &AtomicBool,
    ) -> Result<bool> {
        let section = &recipe.features;
        if section.views == 0 {
            return Ok(true);
        }
        let shape = FeatureShape {
            samples: self.len(),
            views: section.views,
            tokens: vision.config().num_tokens(),
            width: vision.config().width,
        };
        let key = json!({
            "encoder": base.vision_key, "data": self.hash, "augment": recipe.augment, "seed": section.seed,
        });
        let mut encode = |view: u32, samples: &[usize]| -> Result<Tensor> {
            let pictures = samples
                .par_iter()
                .map(|&sample| self.view(sample, view, section.seed))
                .collect::<Result<Vec<_>>>()?;
            Ok(vision.encode(&pictures)?)
        };
        let mut build = Build { batch: section.batch_size, encode: &mut encode, progress, stop };
        let cache = FeatureCache::open(&section.dir, &key, shape, &mut build)?;
        self.cache = cache;
        Ok(self.cache.is_some())
    }

    /// View 0 is the whole picture, the others are augmented.
    fn view(&self, sample: usize, view: u32, seed: u64) -> Result<Rgb> {
        let picture = self.picture(sample)?;
        if view == 0 {
            return Ok(picture);
        }
        let seed = Rng::new(seed, &[purpose::VIEW]).bits();
        let flip = self.metas[sample].flip;
        self.augment.apply(&picture, seed, view.into(), sample as u64, flip)
    }

    fn picture(&self, sample: usize) -> Result<Rgb> {
        let found = self.dataset.get(sample)?;
        image::decode(&found.image, Pixels::default())
            .map_err(|err| Error::Data(format!("sample {}: {err}", found.key)))
    }

    /// What `plan` shows.
    fn load(&self, plan: &BatchPlan) -> Result<Shown> {
        if let Some(cache) = &self.cache {
            return Ok(Shown::Features(cache.read(cache.view_of(plan.epoch), &plan.samples)?));
        }
        let seed = Rng::new(plan.seed, &[purpose::SAMPLE]).bits();
        let picture = |&sample: &usize| {
            let flip = self.metas[sample].flip;
            self.augment.apply(&self.picture(sample)?, seed, plan.epoch, sample as u64, flip)
        };
        Ok(Shown::Pictures(plan.samples.iter().map(picture).collect::<Result<_>>()?))
    }

    /// The captions that training may draw, as they were written.
    fn captions(&self, sample: usize) -> Vec<&str> {
        let mut all = self.metas[sample].all_captions();
        if self.captions == CaptionChoice::First {
            all.truncate(1);
        }
        all
    }

    fn caption(&self, sample: usize, rng: &mut Rng) -> String {
        let all = self.captions(sample);
        let index = if all.len() == 1 { 0 } else { rng.below(all.len()) };
        pre_caption(all[index], MAX_WORDS)
    }
}

/// Hash of keys, captions and shard sizes. Picture bytes are covered by the shards' sizes only: hashing gigabytes at
/// every start would cost minutes.
/// Names a split by its shards and its samples' texts.
pub(crate) fn data_hash(
    dataset: &Dataset,
    metas: &[Meta],
    dir: &Path,
    split: &str,
) -> Result<String> {
    let mut text = String::new();
    let mut shards: Vec<PathBuf> = std::fs::read_dir(dir)
        .map_err(Error::io(dir))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|ext| ext == "tar"))
        .collect();
    shards.sort();
    for path in shards {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with(&format!("{split}-")) {
            let len = std::fs::metadata(&path).map_err(Error::io(&path))?.len();
            text += &format!("{name} {len}\n");
        }
    }
    for (i, meta) in metas.iter().enumerate() {
        let json = serde_json::to_string(meta).map_err(|err| Error::Data(err.to_string()))?;
        text += &format!("{} {json}\n", dataset.key(i).unwrap_or_default());
    }
    Ok(sha256(text.as_bytes()))
}

// ------------------------------------------------------------------------------------------- stage 1

/// Stage 1: the bridge learns which pictures and texts belong together.
pub struct Stage1Task<'a> {
    source: Stage1Source<'a>,
    encoder: Encoder<'a>,
    params: ParamStore,
    model: Stage1,
    smoothing: f32,
    itm_pairs: Option<usize>,
}

/// Loads pictures with captions.
pub struct Stage1Source<'a> {
    pictures: &'a Pictures,
    tokenizer: Tokenizer,
    padding: Padding,
    same_caption_matches: bool,
    /// Each sample's, if any has an `image_id`.
    picture_numbers: Option<Vec<i64>>,
}

/// A loaded batch of stage 1.
pub struct Stage1Loaded {
    shown: Shown,
    texts: Texts,
    image_ids: Option<Vec<i64>>,
}

impl<'a> Stage1Task<'a> {
    /// Stage 1 of `recipe` from its beginning; a resumed run overwrites the weights. Without `vision` the pictures must
    /// have a feature cache.
    ///
    /// # Errors
    /// If the recipe is not of stage 1, or initial weights can't be read or don't fit.
    pub fn new(
        recipe: &Recipe,
        base: &Base,
        pictures: &'a Pictures,
        config: &Stage1Config,
        vision: Option<&'a Vision>,
    ) -> Result<Self> {
        let Stage::One {
            ref init,
            max_text_len,
            label_smoothing,
            same_caption_matches,
            itm_pairs,
            ..
        } = recipe.stage
        else {
            return Err(Error::Recipe("not a recipe of stage 1".into()));
        };
        let file = match init {
            Stage1Init::Bert => None,
            Stage1Init::Path(path) => Some(weights_file(path)),
        };
        let mut start = match &file {
            None => base.stage1_start(config, recipe.seed)?,
            Some(file) => read_start(file)?,
        };
        let part = encoder::add_to_start(recipe, base, &mut start)?;
        let params = ParamStore::new(start)?;
        let built = params
            .build(|p| Ok((Stage1::new(p, config)?, Encoder::new(p, part.as_ref(), vision)?)));
        let (model, encoder) = built.map_err(|err| of_file(file.as_deref(), err.into()))?;
        let ids: Vec<_> = pictures.metas.iter().map(|meta| meta.image_id).collect();
        let source = Stage1Source {
            pictures,
            tokenizer: base.tokenizer()?,
            padding: Padding { max_len: max_text_len, side: Side::Right, width: Width::Longest },
            same_caption_matches,
            picture_numbers: picture_numbers(&ids),
        };
        Ok(Self { source, encoder, params, model, smoothing: label_smoothing, itm_pairs })
    }
}

impl Source for Stage1Source<'_> {
    type Batch = Stage1Loaded;

    fn samples(&self) -> usize {
        self.pictures.len()
    }

    fn hash(&self) -> String {
        self.pictures.hash.clone()
    }

    fn load(&self, plan: &BatchPlan) -> Result<Stage1Loaded> {
        let captions: Vec<String> =
            plan.samples.iter().map(|&i| self.pictures.caption(i, &mut plan.rng(i))).collect();
        let batch = self.tokenizer.encode_batch(&captions, true, self.padding)?;
        let texts = Texts { tokens: batch.mask_tensor()?.to_dtype(DType::U8)?, ids: batch.ids };
        let image_ids = match &self.picture_numbers {
            _ if self.same_caption_matches => {
                Some(captions.iter().map(|text| text_id(text)).collect())
            }
            Some(numbers) => Some(plan.samples.iter().map(|&i| numbers[i]).collect()),
            None => None,
        };
        Ok(Stage1Loaded { shown: self.pictures.load(plan)?, texts, image_ids })
    }
}

/// A number for each sample's picture: the same for the same `image_id` and for nothing else, the same on every rank. None
/// if no sample has an id.
///
/// An id may be any u64, and the losses compare i64, so different ids are counted through; a picture without an id is like
/// no other and gets a number below zero.
fn picture_numbers(ids: &[Option<u64>]) -> Option<Vec<i64>> {
    let mut known = HashMap::new();
    let number = |(sample, id): (usize, &Option<u64>)| match id {
        Some(id) => {
            let next = known.len() as i64;
            *known.entry(*id).or_insert(next)
        }
        None => -1 - sample as i64,
    };
    let numbers = ids.iter().enumerate().map(number).collect();
    (!known.is_empty()).then_some(numbers)
}

/// A number for a text: the same on every rank, different for different texts.
fn text_id(text: &str) -> i64 {
    let hex = sha256(text.as_bytes());
    i64::from_str_radix(&hex[..15], 16).unwrap_or_default()
}

impl<'a> Task for Stage1Task<'a> {
    type Source = Stage1Source<'a>;

    fn source(&self) -> &Stage1Source<'a> {
        &self.source
    }

    fn params(&self) -> &ParamStore {
        &self.params
    }

    fn step(
        &self,
        batch: &Stage1Loaded,
        draws: Draws,
        ranks: &Arc<dyn Communicator>,
    ) -> Result<StepOutput> {
        let seen = self.encoder.see(&batch.shown)?;
        let pairs = Stage1Batch {
            patches: &seen.patches,
            texts: &batch.texts,
            image_ids: batch.image_ids.as_deref(),
        };
        let dropout = draws.dropout();
        let context = StepContext {
            dropout: &dropout,
            smoothing: self.smoothing,
            itm_pairs: self.itm_pairs,
            rng: draws.negatives(),
            ranks,
        };
        let Some(losses) = steps::stage1(&self.model, &pairs, context)? else {
            let same = if self.source.same_caption_matches { "caption" } else { "image_id" };
            let reason = format!("all pairs of the batch have the same {same}");
            return Ok(StepOutput::nothing(reason));
        };
        let parts = [("itc", &losses.itc), ("itm", &losses.itm), ("itg", &losses.itg)];
        let parts = parts
            .into_iter()
            .map(|(name, loss)| Ok((name, loss.to_scalar()?)))
            .collect::<Result<_>>()?;
        self.encoder.output(seen, &losses.total, parts)
    }
}

// ------------------------------------------------------------------------------------------- stage 2

/// Stage 2: the queries learn to speak to the frozen language model.
pub struct Stage2Task<'a> {
    source: Stage2Source<'a>,
    encoder: Encoder<'a>,
    llm: Llm,
    params: ParamStore,
    model: Stage2,
}

/// Loads pictures with captions, or questions and answers.
pub struct Stage2Source<'a> {
    pictures: &'a Pictures,
    tokenizer: Tokenizer,
    max_text_len: usize,
    prompt: String,
    question_prompt: String,
    texts_per_picture: usize,
    questions: f64,
    prefix_lm: bool,
    /// Whether the language model has an encoder.
    encoder: bool,
    /// Of a bridge that reads questions.
    word_pieces: Option<Tokenizer>,
}

/// A loaded batch of stage 2.
pub struct Stage2Loaded {
    shown: Shown,
    /// Each picture's.
    texts: Vec<Vec<LlmText>>,
}

impl<'a> Stage2Task<'a> {
    /// Stage 2 of `recipe` from its beginning, on top of stage 1's weights in the file `stage1` (or of the bridge's own
    /// start); a resumed run overwrites the weights.
    ///
    /// # Errors
    /// If the recipe is not of stage 2, or weights can't be read or don't fit.
    pub fn new(
        recipe: &Recipe,
        base: &Base,
        pictures: &'a Pictures,
        stage1: (&Stage1Config, Option<&Path>),
        (llm, tokenizer): (Llm, Tokenizer),
        vision: Option<&'a Vision>,
    ) -> Result<Self> {
        let Stage::Two {
            proj_init,
            max_text_len,
            prompt,
            question_prompt,
            texts_per_picture,
            questions,
            prefix_lm,
            reads_questions,
            ..
        } = &recipe.stage
        else {
            return Err(Error::Recipe("not a recipe of stage 2".into()));
        };
        let (stage1_config, weights) = stage1;
        let mut bridge = match weights {
            Some(path) => read_start(path)?,
            None => base.stage1_start(stage1_config, recipe.seed)?,
        };
        let depth = stage1_config.qformer.depth;
        if *reads_questions && !bridge.contains_key("qformer.word_embeddings.weight") {
            // An earlier stage 2 has dropped what reads text; BERT's beginnings take its place.
            let fresh = base.stage1_start(stage1_config, recipe.seed)?;
            bridge.extend(fresh.into_iter().filter(|(name, _)| init::guides_stage2(name, depth)));
        }
        let seed = Rng::new(recipe.seed, &[purpose::INIT, 2]).bits();
        let rms = match proj_init {
            ProjInit::Uniform => None,
            ProjInit::Words => Some(llm.embedding_rms()?),
        };
        let guided = reads_questions.then_some(depth);
        let start = init::stage2(&bridge, llm.width(), rms, seed, guided);
        let mut start = start.map_err(|err| of_file(weights, err))?;
        let part = encoder::add_to_start(recipe, base, &mut start)?;
        let params = ParamStore::new(start)?;
        let config = Stage2Config {
            qformer: stage1_config.qformer.clone(),
            llm_width: llm.width(),
            ln_vision_eps: stage1_config.ln_vision_eps,
            reads_questions: *reads_questions,
        };
        let built = params
            .build(|p| Ok((Stage2::new(p, &config)?, Encoder::new(p, part.as_ref(), vision)?)));
        let (model, encoder) = built.map_err(|err| of_file(weights, err.into()))?;
        let source = Stage2Source {
            pictures,
            tokenizer,
            max_text_len: *max_text_len,
            prompt: prompt.clone(),
            question_prompt: question_prompt.clone(),
            texts_per_picture: *texts_per_picture,
            questions: *questions,
            prefix_lm: *prefix_lm,
            encoder: llm.has_encoder(),
            word_pieces: reads_questions.then(|| base.tokenizer()).transpose()?,
        };
        source.check()?;
        Ok(Self { source, encoder, llm, params, model })
    }

    /// The bridge's shape.
    #[must_use]
    pub fn config(&self) -> &Stage2Config {
        self.model.config()
    }
}

impl Source for Stage2Source<'_> {
    type Batch = Stage2Loaded;

    fn samples(&self) -> usize {
        self.pictures.len()
    }

    fn hash(&self) -> String {
        self.pictures.hash.clone()
    }

    fn load(&self, plan: &BatchPlan) -> Result<Stage2Loaded> {
        let texts = |&sample: &usize| self.texts(sample, &mut plan.rng(sample));
        let texts = plan.samples.iter().map(texts).collect::<Result<_>>()?;
        Ok(Stage2Loaded { shown: self.pictures.load(plan)?, texts })
    }
}

impl Stage2Source<'_> {
    /// Whether every question leaves room for its answer: better known now than after hours.
    fn check(&self) -> Result<()> {
        if self.prefix_lm && !self.encoder {
            return Err(Error::Recipe(
                "stage2.prefix_lm is true, but the language model has no encoder to read a prefix"
                    .into(),
            ));
        }
        if self.questions == 0.0 {
            return Ok(());
        }
        let pairs = self.pictures.metas.par_iter().flat_map_iter(|meta| &meta.qa);
        pairs.try_for_each(|pair| self.answer(&pair.question, &pair.answer).map(drop))
    }

    fn answer(&self, question: &str, answer: &str) -> Result<LlmText> {
        let prompt = self.question_prompt.replacen("{}", question.trim(), 1);
        match self.encoder {
            true => encoder_text(&self.tokenizer, &prompt, answer, self.max_text_len),
            false => llm_text(&self.tokenizer, &prompt, answer, self.max_text_len),
        }
    }

    /// What the bridge reads of a question, or of a caption's prompt, as a captioner gives it.
    fn question(&self, text: &str) -> Result<Vec<u32>> {
        let Some(word_pieces) = &self.word_pieces else { return Ok(Vec::new()) };
        let mut ids = word_pieces.encode(text, true)?;
        if ids.len() > MAX_QUESTION_LEN {
            ids.truncate(MAX_QUESTION_LEN - 1);
            ids.push(word_pieces.special().eos);
        }
        Ok(ids)
    }

    fn caption(&self, caption: &str, rng: &mut Rng) -> Result<LlmText> {
        let max_len = self.max_text_len;
        if !self.encoder {
            return llm_text(&self.tokenizer, &self.prompt, caption, max_len);
        }
        let words: Vec<&str> = caption.split_whitespace().collect();
        if !self.prefix_lm || words.len() < 2 {
            return encoder_text(&self.tokenizer, &self.prompt, caption, max_len);
        }
        let (prefix, rest) = words.split_at(1 + rng.below(words.len() / 2));
        let given = [&[self.prompt.as_str()], prefix].concat().join(" ");
        encoder_text(&self.tokenizer, given.trim_start(), &rest.join(" "), max_len)
    }

    /// Captions behind the prompt and answers behind their questions, as many as the recipe wants and all different, but at
    /// least one.
    fn texts(&self, sample: usize, rng: &mut Rng) -> Result<Vec<LlmText>> {
        let meta = &self.pictures.metas[sample];
        let mut captions = self.pictures.captions(sample);
        let mut pairs: Vec<_> = meta.qa.iter().filter(|_| self.questions > 0.0).collect();
        let mut texts = Vec::with_capacity(self.texts_per_picture);
        while texts.len() < self.texts_per_picture && !(captions.is_empty() && pairs.is_empty()) {
            // Drawn in any case, so that the caption drawn does not depend on whether there are questions.
            let ask = rng.uniform() < self.questions;
            texts.push(if (ask && !pairs.is_empty()) || captions.is_empty() {
                let pair = pairs.swap_remove(rng.below(pairs.len()));
                let text = self.answer(&pair.question, &pair.answer)?;
                LlmText { question: self.question(&pair.question)?, ..text }
            } else {
                let caption = captions.swap_remove(rng.below(captions.len()));
                let text = self.caption(&pre_caption(caption, MAX_WORDS), rng)?;
                LlmText { question: self.question(&self.prompt)?, ..text }
            });
        }
        Ok(texts)
    }
}

/// The ids that stage 2 trains on: what generation would be given for `prompt`, then `text` and the end token.
///
/// # Errors
/// If a text is too long for the tokenizer, or the prompt leaves no room.
pub fn llm_text(
    tokenizer: &Tokenizer,
    prompt: &str,
    text: &str,
    max_len: usize,
) -> Result<LlmText> {
    let mut ids = prompt_ids(tokenizer, prompt)?;
    let prompt_len = if prompt.is_empty() { 0 } else { ids.len() };
    if ids.len() >= max_len {
        return Err(Error::Recipe(format!(
            "max_text_len {max_len} leaves no room behind the prompt {prompt:?} of {} tokens",
            ids.len()
        )));
    }
    // Behind a prompt the text begins with a space, as it would in one sentence.
    let text = if prompt.is_empty() { text.to_owned() } else { format!(" {text}") };
    ids.extend(tokenizer.encode(&text, false)?);
    ids.push(tokenizer.special().eos);
    ids.truncate(max_len);
    Ok(LlmText { ids, prompt_len, question: Vec::new() })
}

/// The ids that stage 2 trains an encoder–decoder on: what the encoder is given, then what the decoder writes. Each ends with
/// the end token, and is cut in front of it if it is longer than `max_len`.
///
/// # Errors
/// If a text is too long for the tokenizer.
pub fn encoder_text(
    tokenizer: &Tokenizer,
    given: &str,
    wanted: &str,
    max_len: usize,
) -> Result<LlmText> {
    let ended = |text: &str| -> Result<Vec<u32>> {
        let mut ids = tokenizer.encode(text, false)?;
        ids.truncate(max_len.saturating_sub(1));
        ids.push(tokenizer.special().eos);
        Ok(ids)
    };
    let mut ids = ended(given)?;
    let prompt_len = ids.len();
    ids.extend(ended(wanted)?);
    Ok(LlmText { ids, prompt_len, question: Vec::new() })
}

impl<'a> Task for Stage2Task<'a> {
    type Source = Stage2Source<'a>;

    fn source(&self) -> &Stage2Source<'a> {
        &self.source
    }

    fn params(&self) -> &ParamStore {
        &self.params
    }

    fn step(
        &self,
        batch: &Stage2Loaded,
        draws: Draws,
        _ranks: &Arc<dyn Communicator>,
    ) -> Result<StepOutput> {
        let seen = self.encoder.see(&batch.shown)?;
        let dropout = draws.dropout();
        let loss = steps::stage2(&self.model, &self.llm, &seen.patches, &batch.texts, &dropout)?;
        let value = loss.to_scalar()?;
        self.encoder.output(seen, &loss, vec![("lm", value)])
    }
}

// -------------------------------------------------------------------------------- the whole recipe

/// What `blip2 train` says and asks besides the recipe.
pub struct Session<'a> {
    /// Folder of the run, `runs/NAME` by habit.
    pub dir: &'a Path,
    /// What to do with checkpoints that are already there.
    pub resume: Resume,
    /// Set it on Ctrl-C.
    pub stop: &'a AtomicBool,
    /// Told of downloads: what, bytes done, bytes in all.
    pub download: Progress<'a>,
    /// Told of the feature cache: pictures done, pictures in all.
    pub encoding: &'a mut dyn FnMut(u64, u64),
    /// Makes the monitor of a stage, given its number, its folder and its recipe.
    pub monitor: &'a mut dyn FnMut(u32, &Path, &Recipe) -> Box<dyn Monitor>,
}

/// How [`train_recipe`] ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Trained {
    /// Every stage is done.
    Finished {
        /// The model folder, for `--model`.
        model: PathBuf,
        /// Each stage's number and how it ended.
        stages: Vec<(u32, Outcome)>,
    },
    /// It was asked to stop and can be resumed.
    Stopped,
}

/// Trains every stage of a recipe whose data is there. A stage that is finished is not trained again when resumed.
///
/// # Errors
/// Whatever data, parts and training run into. A run that may not start, be it for its last stage, is refused before
/// anything is written.
pub fn train_recipe(file: &RecipeFile, session: &mut Session<'_>) -> Result<Trained> {
    let model_dir = session.dir.join("model");
    let runs = file.runs();
    let dirs: Vec<_> = runs.iter().map(|recipe| stage_dir(session.dir, recipe)).collect();
    for (i, recipe) in runs.iter().enumerate() {
        drop(recipe.train.precision.start(recipe.stage_number())?);
        check_start_file(recipe, &dirs[..i])?;
    }
    let claim = |dir: &PathBuf| RunFolder::claim(dir, session.resume);
    let folders = dirs.iter().map(claim).collect::<Result<Vec<_>>>()?;
    let mut stages = Vec::new();
    for (recipe, folder) in runs.iter().zip(&folders) {
        let Some(outcome) = train_stage(recipe, folder, &model_dir, session)? else {
            return Ok(Trained::Stopped);
        };
        if let Outcome::Stopped { .. } = outcome {
            return Ok(Trained::Stopped);
        }
        stages.push((recipe.stage_number(), outcome));
    }
    Ok(Trained::Finished { model: model_dir, stages })
}

fn stage_dir(run: &Path, recipe: &Recipe) -> PathBuf {
    run.join(format!("stage{}", recipe.stage_number()))
}

/// Reads the file that a stage starts from, for its errors alone. What one of the `earlier` stages will write there is not
/// there yet.
fn check_start_file(recipe: &Recipe, earlier: &[PathBuf]) -> Result<()> {
    let (Stage::One { init: Stage1Init::Path(path), .. }
    | Stage::Two { init: Stage2Init::Path(path), .. }) = &recipe.stage
    else {
        return Ok(());
    };
    if earlier.iter().any(|dir| path.starts_with(dir)) {
        return Ok(());
    }
    read_start(&weights_file(path)).map(drop)
}

/// Makes the one pool of threads that all arithmetic shares; 0 leaves it to have one per core. A pool that is there already
/// stays as it is, so that the command line's `--threads` goes before the recipe's. Returns what a person should know if it
/// has another size.
#[must_use]
pub fn use_threads(threads: usize) -> Option<String> {
    if threads == 0 {
        return None;
    }
    let made = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    let present = rayon::current_num_threads();
    (made.is_err() && present != threads).then(|| {
        format!("runtime.threads is {threads}, but this program already computes on {present}")
    })
}

fn train_stage(
    recipe: &Recipe,
    folder: &RunFolder,
    model_dir: &Path,
    session: &mut Session<'_>,
) -> Result<Option<Outcome>> {
    let mut monitor = (session.monitor)(recipe.stage_number(), folder.path(), recipe);
    if let Some(note) = use_threads(recipe.runtime.threads) {
        monitor.note(&note);
    }
    let side = match recipe.model.vision {
        VisionSection::Random { image_size, .. }
        | VisionSection::Directory { image_size, .. }
        | VisionSection::Mini { image_size } => image_size,
    };
    let mut note = |text: &str| monitor.note(text);
    let mut pictures = Pictures::open(recipe, &recipe.data.train, side, &mut note)?;
    let base = Base::prepare(recipe, model_dir, pictures.texts(), &mut *session.download)?;
    let model = base.model()?;
    let config = base.stage1_config(&recipe.model.qformer, model.manifest.vision.config.width)?;
    let mut vision = None;
    if !recipe.trains_vision() {
        let format = recipe.model.vision.format()?;
        let frozen = model.vision(format, &mut *session.download)?;
        if !pictures.encode(recipe, &base, &frozen, &mut *session.encoding, session.stop)? {
            return Ok(None);
        }
        // With a cache the encoder has done its work, and its memory is free for training.
        vision = (recipe.features.views == 0).then_some(frozen);
    }
    let run = Run { folder, stop: session.stop, ranks: Arc::new(SingleProcess) };
    let outcome = match &recipe.stage {
        Stage::One { max_text_len, .. } => {
            let task = Stage1Task::new(recipe, &base, &pictures, &config, vision.as_ref())?;
            let outcome = train(&task, recipe, &run, &mut *monitor)?;
            if let Outcome::Finished { model, .. } = &outcome {
                base.add_stage1(&config, *max_text_len, model)?;
            }
            outcome
        }
        Stage::Two { init, prompt, question_prompt, .. } => {
            let weights = stage1_weights(init, session.dir);
            let llm = base.model()?.llm(recipe.model.llm.format()?, &mut *session.download)?;
            let start = (&config, weights.as_deref());
            let task = Stage2Task::new(recipe, &base, &pictures, start, llm, vision.as_ref())?;
            let outcome = train(&task, recipe, &run, &mut *monitor)?;
            if let Outcome::Finished { model, .. } = &outcome {
                base.add_stage2(task.config(), prompt, question_prompt, model)?;
            }
            outcome
        }
    };
    if let Outcome::Finished { .. } = &outcome {
        let title = format!("{}, stage {}", recipe.name, recipe.stage_number());
        // A run without its picture is a run all the same.
        if let Err(err) = draw_curves(folder.path(), &title) {
            monitor.note(&format!("warning: no {CURVES}: {err}"));
        }
    }
    Ok(Some(outcome))
}

/// The file that stage 2 starts from.
fn stage1_weights(init: &Stage2Init, dir: &Path) -> Option<PathBuf> {
    match init {
        Stage2Init::None => None,
        Stage2Init::Stage1 => Some(dir.join("stage1").join(MODEL)),
        Stage2Init::Path(path) => Some(weights_file(path)),
    }
}

/// The weights that a recipe's `init` names: a file, or the result in a run's folder.
fn weights_file(path: &Path) -> PathBuf {
    if path.is_dir() { path.join(MODEL) } else { path.to_path_buf() }
}

/// Says which `file` it was whose weights don't fit, if they came from one.
fn of_file(file: Option<&Path>, err: Error) -> Error {
    match (file, err) {
        (Some(file), Error::Model(blip2::Error::Weights(reason)) | Error::Recipe(reason)) => {
            blip2::Error::file(file, reason).into()
        }
        (_, err) => err,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_image_id_has_its_own_number_and_each_picture_without_one_too() {
        let ids = [Some(7), None, Some(6), Some(7), Some(u64::MAX), Some(u64::MAX >> 1), None];
        let numbers = picture_numbers(&ids).unwrap();
        for (i, a) in ids.iter().enumerate() {
            for (j, b) in ids.iter().enumerate() {
                let same = i == j || (a.is_some() && a == b);
                assert_eq!(numbers[i] == numbers[j], same, "{a:?} and {b:?}: {numbers:?}");
            }
        }
        assert_eq!(picture_numbers(&[None, None]), None);
    }
}

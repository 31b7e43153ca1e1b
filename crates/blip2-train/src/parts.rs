//! What a recipe's model is made of, as a model folder: the frozen parts, the vocabulary, the bridge's shape and start.
//!
//! ```text
//! runs/NAME/model/model.json          what `--model runs/NAME/model` reads
//!                 vocab.txt           word pieces of the bridge
//!                 vision.safetensors  only for random parts; mini's are shared, in the cache
//!                 llm/                likewise: config.json, model.safetensors, tokenizer.json
//!                 stage1.safetensors  when stage 1 is trained
//!                 stage2.safetensors  when stage 2 is trained
//! ```
//!
//! Random parts are for tests and for the tiny recipe. They know nothing, but everything fits together.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use blip2::assets::{self, Check, Progress};
use blip2::image::Normalize;
use blip2::lavis::{HeadCounts, Lavis};
use blip2::model::{
    CaptionStage, Files, LlmPart, MANIFEST, Manifest, Model, PartFile, Stage1Part, Stage2Part,
    VisionPart,
};
use blip2::nn::Activation;
use blip2::qformer::QFormerConfig;
use blip2::stage1::Stage1Config;
use blip2::stage2::Stage2Config;
use blip2::stored::Stored;
use blip2::tokenizer::Tokenizer;
use blip2::vit::VitConfig;
use blip2::{params, shards};
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use serde_json::json;

use crate::budget::check_llm;
use crate::checkpoint::{save_tensors, sha256, write_atomic};
use crate::init;
use crate::optim;
use crate::order::purpose;
use crate::recipe::{
    BertSection, BertShape, LlmSection, ModelSection, QformerSection, RANDOM_VOCAB, Recipe,
    VisionSection, VisionShape,
};
use crate::rng::Rng;
use crate::{Error, Result};

const VISION: &str = "vision.safetensors";
const LLM: &str = "llm";
const VOCAB: &str = "vocab.txt";
/// File of the stage-1 bridge in a model folder.
pub const STAGE1: &str = "stage1.safetensors";
/// File of the stage-2 bridge in a model folder.
pub const STAGE2: &str = "stage2.safetensors";
/// Epsilon of `ln_vision`, as the reference trains it.
const LN_VISION_EPS: f64 = 1e-5;
/// Longest text of a random part, in tokens.
const RANDOM_POSITIONS: usize = 512;

/// A run's model folder with its frozen parts in place.
#[derive(Debug, Clone)]
pub struct Base {
    /// The folder.
    pub dir: PathBuf,
    /// Describes what decides the image encoder's output; part of the feature cache's key.
    pub vision_key: serde_json::Value,
    bert: Bert,
}

/// What the bridge starts from.
#[derive(Debug, Clone)]
struct Bert {
    width: usize,
    depth: usize,
    num_heads: usize,
    mlp_width: usize,
    max_positions: usize,
    layer_norm_eps: f64,
    /// Empty path: random weights.
    weights: Option<PathBuf>,
    vocab: Vec<u8>,
}

impl Base {
    /// Lays out `dir` for `recipe`. `texts` are the training captions, of which a random BERT makes its vocabulary.
    /// What is already there from an earlier start of the same recipe is written again, the same.
    ///
    /// # Errors
    /// If a part can't be fetched, read or written, or a description that is there can't be read: it may tell of an earlier
    /// stage, and is not overwritten.
    pub fn prepare<'a>(
        recipe: &Recipe,
        dir: &Path,
        texts: impl Iterator<Item = &'a str>,
        progress: Progress<'_>,
    ) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let earlier = earlier_manifest(dir)?;
        let ModelSection { vision, qformer, llm } = &recipe.model;
        let bert = Bert::open(&qformer.init, texts, &mut *progress)?;
        write_atomic(&dir.join(VOCAB), &bert.vocab)?;
        let vision_part = vision_part(vision, recipe.seed, dir)?;
        if let LlmSection::Random { .. } = llm {
            random_llm(llm, recipe.seed, &dir.join(LLM))?;
        }
        let mut base = Self { dir: dir.to_path_buf(), vision_key: json!(null), bert };
        // The earlier stage's parts stay.
        let mut manifest = earlier.unwrap_or_else(|| Manifest {
            name: recipe.name.clone(),
            vision: vision_part.clone(),
            llm: None,
            stage1: None,
            stage2: None,
            caption_stage: CaptionStage::default(),
        });
        manifest.vision = vision_part;
        let weights = match llm {
            LlmSection::Mini { .. } => Some(PartFile::Mini),
            // The first stage reads no language model, and the folder need not be there yet.
            LlmSection::Directory { .. } if recipe.stage_number() == 1 => None,
            LlmSection::Directory { path, .. } => {
                check_llm(llm)?;
                Some(llm_in(path)?)
            }
            LlmSection::Random { .. } => Some(PartFile::File(LLM.into())),
        };
        manifest.llm = weights.map(|weights| LlmPart { weights }).or(manifest.llm);
        base.write(&manifest)?;
        base.vision_key = vision_key(&base.model()?)?;
        Ok(base)
    }

    /// The model as it is now.
    ///
    /// # Errors
    /// If `model.json` can't be read.
    pub fn model(&self) -> Result<Model> {
        Ok(Model::open(Files::Folder(self.dir.clone()))?)
    }

    /// The bridge's tokenizer.
    ///
    /// # Errors
    /// If the vocabulary lacks one of BERT's special tokens.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        Ok(Tokenizer::from_wordpiece_vocab(&self.bert.vocab)?)
    }

    /// The shape of the stage-1 bridge.
    ///
    /// # Errors
    /// If the vocabulary can't be read.
    pub fn stage1_config(
        &self,
        section: &QformerSection,
        encoder_width: usize,
    ) -> Result<Stage1Config> {
        let bert = &self.bert;
        Ok(Stage1Config {
            qformer: QFormerConfig {
                width: bert.width,
                depth: bert.depth,
                num_heads: bert.num_heads,
                mlp_width: bert.mlp_width,
                cross_attention_freq: section.cross_attention_every,
                encoder_width,
                num_queries: section.num_queries,
                vocab_size: self.tokenizer()?.vocab_size(),
                max_positions: bert.max_positions,
                layer_norm_eps: bert.layer_norm_eps,
                dropout: section.dropout,
            },
            embed_dim: section.embed_dim,
            ln_vision_eps: LN_VISION_EPS,
            matching_only: false,
        })
    }

    /// Where stage 1 starts.
    ///
    /// # Errors
    /// If BERT's weights can't be read or don't fit.
    pub fn stage1_start(
        &self,
        config: &Stage1Config,
        seed: u64,
    ) -> Result<BTreeMap<String, Tensor>> {
        let bert = match &self.bert.weights {
            Some(path) => read_start(path)?,
            None => BTreeMap::new(),
        };
        init::stage1(config, bert, Rng::new(seed, &[purpose::INIT]).bits())
    }

    /// Puts trained stage-1 weights (a safetensors file) into the folder.
    ///
    /// # Errors
    /// If a file can't be read or written.
    pub fn add_stage1(
        &self,
        config: &Stage1Config,
        max_text_len: usize,
        weights: &Path,
    ) -> Result<()> {
        let mut manifest = self.manifest()?;
        self.put(weights, STAGE1, &mut manifest)?;
        manifest.stage1 = Some(Stage1Part {
            config: config.clone(),
            weights: STAGE1.into(),
            vocab: VOCAB.into(),
            max_text_len,
        });
        self.write(&manifest)
    }

    /// Puts trained stage-2 weights (a safetensors file) into the folder.
    ///
    /// # Errors
    /// If a file can't be read or written.
    pub fn add_stage2(
        &self,
        config: &Stage2Config,
        prompt: &str,
        question_prompt: &str,
        weights: &Path,
    ) -> Result<()> {
        let mut manifest = self.manifest()?;
        self.put(weights, STAGE2, &mut manifest)?;
        manifest.stage2 = Some(Stage2Part {
            config: config.clone(),
            weights: STAGE2.into(),
            caption_prompt: prompt.into(),
            question_prompt: question_prompt.into(),
            vocab: config.reads_questions.then(|| VOCAB.into()),
        });
        self.write(&manifest)
    }

    /// Puts the trained weights of a run where the model has them: the bridge in the file `name`, an image encoder that was
    /// trained with it in its own.
    fn put(&self, weights: &Path, name: &str, manifest: &mut Manifest) -> Result<()> {
        let all = params::read_file(weights)?;
        let (vision, bridge): (BTreeMap<_, _>, BTreeMap<_, _>) =
            all.into_iter().partition(|(name, _)| name.starts_with(optim::VISION));
        if vision.is_empty() {
            return copy(weights, &self.dir.join(name));
        }
        let plain = |(name, t): (String, Tensor)| (name[optim::VISION.len()..].to_owned(), t);
        save_tensors(&self.dir.join(VISION), &vision.into_iter().map(plain).collect())?;
        save_tensors(&self.dir.join(name), &bridge)?;
        manifest.vision.weights = PartFile::File(VISION.into());
        Ok(())
    }

    fn manifest(&self) -> Result<Manifest> {
        Ok(self.model()?.manifest)
    }

    fn write(&self, manifest: &Manifest) -> Result<()> {
        let json =
            serde_json::to_vec_pretty(manifest).map_err(|err| Error::Recipe(err.to_string()))?;
        write_atomic(&self.dir.join(MANIFEST), &json)
    }
}

/// Describes what decides the output of a model's image encoder; part of the feature cache's key.
///
/// # Errors
/// If the encoder's weights can't be read.
pub fn vision_key(model: &Model) -> Result<serde_json::Value> {
    let part = &model.manifest.vision;
    Ok(match &part.weights {
        PartFile::Mini => {
            json!({"mini": assets::mini_vit_id(), "image_size": part.config.image_size})
        }
        PartFile::File(name) => json!(sha256(&model.files().read(name)?)),
        PartFile::Path(path) => {
            let hash = assets::hash_file(path).map_err(Error::io(path))?;
            json!({"sha256": hash, "image_size": part.config.image_size})
        }
        // No training run makes features of such an encoder yet, so nothing is ever found under this.
        PartFile::Checkpoint => json!({"checkpoint": model.files().describe("")}),
    })
}

/// The description that an earlier stage left in `dir`.
fn earlier_manifest(dir: &Path) -> Result<Option<Manifest>> {
    match Model::open(Files::Folder(dir.to_path_buf())) {
        Ok(model) => Ok(Some(model.manifest)),
        Err(blip2::Error::Io { reason, .. }) if reason.kind() == ErrorKind::NotFound => Ok(None),
        Err(err) => Err(err.into()),
    }
}

/// The tensors of a file that training starts from. One that is not finite would make every step one that is not, and
/// nobody would know why.
///
/// # Errors
/// If the file can't be read, or a tensor holds NaN or infinity; the message names both.
pub(crate) fn read_start(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = match path.extension() {
        Some(ext) if ext == "pth" => {
            let lavis = Lavis::new(shards::open_file(path)?, HeadCounts::default(), path)?;
            let load = |(name, tensor): (String, Stored)| Ok((name, tensor.load()?));
            lavis.bridge.into_iter().map(load).collect::<Result<_>>()?
        }
        _ => params::read_file(path)?,
    };
    // A run that trained its image encoder, too, keeps both in one file; which encoder to use is model.vision's to say.
    tensors.retain(|name, _| !name.starts_with(optim::VISION));
    for (name, tensor) in &tensors {
        let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            return Err(blip2::Error::file(path, format!("{name} holds {value}")).into());
        }
    }
    Ok(tensors)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    write_atomic(to, &std::fs::read(from).map_err(Error::io(from))?)
}

impl Bert {
    fn open<'a>(
        section: &BertSection,
        texts: impl Iterator<Item = &'a str>,
        progress: Progress<'_>,
    ) -> Result<Self> {
        match section {
            BertSection::Mini {} => {
                let parts = assets::bert_minilm(Check::Quick, progress)?;
                Ok(Self {
                    width: 384,
                    depth: 6,
                    num_heads: 12,
                    mlp_width: 1536,
                    max_positions: 512,
                    layer_norm_eps: 1e-12,
                    vocab: read(&parts.vocab)?,
                    weights: Some(parts.weights),
                })
            }
            BertSection::Directory { path, shape } => {
                Self::from_directory(path)?.of_shape(*shape, path)
            }
            &BertSection::Random { width, depth, num_heads, ffn_width } => Ok(Self {
                width,
                depth,
                num_heads,
                mlp_width: ffn_width,
                max_positions: RANDOM_POSITIONS,
                layer_norm_eps: 1e-12,
                weights: None,
                vocab: vocabulary(texts),
            }),
        }
    }

    fn from_directory(dir: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Config {
            hidden_size: usize,
            num_hidden_layers: usize,
            num_attention_heads: usize,
            intermediate_size: usize,
            max_position_embeddings: usize,
            layer_norm_eps: f64,
        }
        let path = dir.join("config.json");
        let config: Config = serde_json::from_slice(&read(&path)?)
            .map_err(|err| Error::Recipe(format!("{}: {err}", path.display())))?;
        Ok(Self {
            width: config.hidden_size,
            depth: config.num_hidden_layers,
            num_heads: config.num_attention_heads,
            mlp_width: config.intermediate_size,
            max_positions: config.max_position_embeddings,
            layer_norm_eps: config.layer_norm_eps,
            weights: Some(dir.join("model.safetensors")),
            vocab: read(&dir.join("vocab.txt"))?,
        })
    }
}

impl Bert {
    fn of_shape(self, shape: BertShape, dir: &Path) -> Result<Self> {
        let found = [self.width, self.depth, self.num_heads, self.mlp_width];
        if shape == BertShape::BertBase && found != [768, 12, 12, 3072] {
            return Err(Error::Recipe(format!(
                "model.qformer.init.shape: {} is no bert_base: width, layers, heads, feed-forward {found:?}",
                dir.display()
            )));
        }
        Ok(self)
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(Error::io(path))
}

/// A WordPiece vocabulary, one piece a line: BERT's special tokens, the printable ASCII characters (so that nothing in
/// English is unknown) and every word of `texts`.
fn vocabulary<'a>(texts: impl Iterator<Item = &'a str>) -> Vec<u8> {
    let mut words = BTreeSet::new();
    for text in texts {
        let lower = text.to_lowercase();
        let split = lower.split(|c: char| !c.is_ascii_alphanumeric());
        words.extend(split.filter(|word| word.len() > 1).map(str::to_owned));
    }
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"].map(str::to_owned);
    let single =
        (b'!'..=b'~').filter(|c| !c.is_ascii_uppercase()).map(|c| char::from(c).to_string());
    let inside = (b'a'..=b'z').chain(b'0'..=b'9').map(|c| format!("##{}", char::from(c)));
    let lines: Vec<String> = special.into_iter().chain(single).chain(inside).chain(words).collect();
    (lines.join("\n") + "\n").into_bytes()
}

fn vision_part(section: &VisionSection, seed: u64, dir: &Path) -> Result<VisionPart> {
    match *section {
        VisionSection::Directory { ref path, shape, image_size, .. } => {
            vision_in(path, shape, image_size)
        }
        VisionSection::Mini { image_size } => Ok(VisionPart {
            config: VitConfig { image_size, ..VitConfig::dino_s() },
            weights: PartFile::Mini,
            normalize: Normalize::IMAGENET,
        }),
        VisionSection::Random { image_size, patch_size, width, depth, num_heads, mlp_width } => {
            let config = VitConfig {
                image_size,
                patch_size,
                width,
                depth,
                num_heads,
                mlp_width,
                activation: Activation::Gelu,
                layer_norm_eps: 1e-6,
                patch_bias: true,
                pre_norm: false,
                layer_scale: false,
            };
            save_tensors(&dir.join(VISION), &random_vit(&config, seed)?)?;
            Ok(VisionPart {
                config,
                weights: PartFile::File(VISION.into()),
                normalize: Normalize::CLIP,
            })
        }
    }
}

/// The image encoder of a model folder of ours, for pictures of another size.
fn vision_in(folder: &Path, shape: VisionShape, image_size: usize) -> Result<VisionPart> {
    let model = Model::open_folder(folder)?;
    let part = model.manifest.vision.clone();
    let published = match shape {
        VisionShape::EvaClipG => Some(VitConfig::eva_clip_g()),
        VisionShape::ClipL => Some(VitConfig::clip_l()),
        VisionShape::Any => None,
    };
    if let Some(published) = published
        && part.config != (VitConfig { image_size: part.config.image_size, ..published })
    {
        return Err(Error::Recipe(format!(
            "model.vision.shape: the image encoder of {} is another one: {:?}",
            folder.display(),
            part.config
        )));
    }
    let patch = part.config.patch_size;
    if patch == 0 || !image_size.is_multiple_of(patch) {
        return Err(Error::Recipe(format!(
            "model.vision.image_size is {image_size}, expected a multiple of {patch}, the side of a patch of {}",
            folder.display()
        )));
    }
    let weights = outside(&model, folder, &part.weights)?;
    Ok(VisionPart { config: VitConfig { image_size, ..part.config }, weights, ..part })
}

/// A language model's folder, or that of the language model in a model folder of ours.
fn llm_in(folder: &Path) -> Result<PartFile> {
    if !folder.join(MANIFEST).is_file() {
        return absolute(folder);
    }
    let model = Model::open_folder(folder)?;
    match &model.manifest.llm {
        Some(part) => outside(&model, folder, &part.weights),
        None => Err(Error::Recipe(format!(
            "model.llm.path: {} has no language model",
            folder.display()
        ))),
    }
}

/// How a model in another folder names a part of the model in `folder`.
fn outside(model: &Model, folder: &Path, weights: &PartFile) -> Result<PartFile> {
    match weights {
        PartFile::Mini => Ok(PartFile::Mini),
        PartFile::File(name) => absolute(&model.files().describe(name)),
        PartFile::Path(path) => Ok(PartFile::Path(path.clone())),
        PartFile::Checkpoint => Err(Error::Recipe(format!(
            "{} is in Hugging Face layout; training starts from ours: blip2 convert {} DIR",
            folder.display(),
            folder.display()
        ))),
    }
}

fn absolute(path: &Path) -> Result<PartFile> {
    Ok(PartFile::Path(std::path::absolute(path).map_err(Error::io(path))?))
}

/// Draws tensors that keep the size of what passes through them, so that a random network still tells pictures apart.
struct Draw {
    seed: u64,
    tensors: BTreeMap<String, Tensor>,
}

impl Draw {
    fn new(seed: u64) -> Self {
        Self { seed, tensors: BTreeMap::new() }
    }

    fn normal(&mut self, name: &str, shape: &[usize], std: f64) -> Result<()> {
        let hash =
            sha256(name.as_bytes()).bytes().fold(0u64, |h, b| h.rotate_left(5) ^ u64::from(b));
        let mut rng = Rng::new(self.seed, &[purpose::INIT, hash]);
        let values: Vec<f32> =
            (0..shape.iter().product()).map(|_| (rng.normal() * std) as f32).collect();
        self.tensors.insert(name.to_owned(), Tensor::from_vec(values, shape, &Device::Cpu)?);
        Ok(())
    }

    fn matrix(&mut self, name: &str, rows: usize, columns: usize) -> Result<()> {
        self.normal(&format!("{name}.weight"), &[rows, columns], 1.0 / (columns as f64).sqrt())
    }

    fn linear(&mut self, name: &str, rows: usize, columns: usize) -> Result<()> {
        self.constant(&format!("{name}.bias"), rows, 0.0)?;
        self.matrix(name, rows, columns)
    }

    fn layer_norm(&mut self, name: &str, width: usize) -> Result<()> {
        self.constant(&format!("{name}.bias"), width, 0.0)?;
        self.constant(&format!("{name}.weight"), width, 1.0)
    }

    fn constant(&mut self, name: &str, width: usize, value: f32) -> Result<()> {
        self.tensors.insert(name.to_owned(), Tensor::full(value, width, &Device::Cpu)?);
        Ok(())
    }
}

fn random_vit(config: &VitConfig, seed: u64) -> Result<BTreeMap<String, Tensor>> {
    let w = config.width;
    let mut draw = Draw::new(seed);
    draw.linear("patch_embed", w, 3 * config.patch_size.pow(2))?;
    draw.normal("cls_token", &[1, 1, w], 0.1)?;
    draw.normal("pos_embed", &[1, config.num_tokens(), w], 0.5)?;
    for i in 0..config.depth {
        let block = format!("blocks.{i}");
        draw.layer_norm(&format!("{block}.norm1"), w)?;
        draw.layer_norm(&format!("{block}.norm2"), w)?;
        for part in ["q", "k", "v", "out"] {
            draw.linear(&format!("{block}.attn.{part}"), w, w)?;
        }
        draw.linear(&format!("{block}.mlp.fc1"), config.mlp_width, w)?;
        draw.linear(&format!("{block}.mlp.fc2"), w, config.mlp_width)?;
    }
    Ok(draw.tensors)
}

/// A random LLaMA in Hugging Face layout, with a vocabulary of the 256 bytes and three tokens with a meaning.
fn random_llm(section: &LlmSection, seed: u64, dir: &Path) -> Result<()> {
    let &LlmSection::Random { width, depth, num_heads, num_kv_heads, ffn_width } = section else {
        return Ok(());
    };
    std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let (bos, eos) = (256, 257);
    let config = json!({
        "model_type": "llama", "vocab_size": RANDOM_VOCAB, "hidden_size": width, "intermediate_size": ffn_width,
        "num_hidden_layers": depth, "num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": RANDOM_POSITIONS,
        "tie_word_embeddings": true, "hidden_act": "silu", "bos_token_id": bos, "eos_token_id": eos,
    });
    write_atomic(&dir.join("config.json"), config.to_string().as_bytes())?;
    write_atomic(&dir.join("tokenizer.json"), byte_tokenizer().to_string().as_bytes())?;
    let mut draw = Draw::new(seed);
    let kv = width / num_heads * num_kv_heads;
    draw.normal("model.embed_tokens.weight", &[RANDOM_VOCAB, width], 1.0 / (width as f64).sqrt())?;
    draw.constant("model.norm.weight", width, 1.0)?;
    for i in 0..depth {
        let block = format!("model.layers.{i}");
        draw.constant(&format!("{block}.input_layernorm.weight"), width, 1.0)?;
        draw.constant(&format!("{block}.post_attention_layernorm.weight"), width, 1.0)?;
        for (part, rows) in [("q_proj", width), ("k_proj", kv), ("v_proj", kv), ("o_proj", width)] {
            draw.matrix(&format!("{block}.self_attn.{part}"), rows, width)?;
        }
        for part in ["gate_proj", "up_proj"] {
            draw.matrix(&format!("{block}.mlp.{part}"), ffn_width, width)?;
        }
        draw.matrix(&format!("{block}.mlp.down_proj"), width, ffn_width)?;
    }
    save_tensors(&dir.join("model.safetensors"), &draw.tensors)?;
    Ok(())
}

/// A `tokenizer.json` whose tokens are single bytes, under the printable names that GPT-2 gives them.
fn byte_tokenizer() -> serde_json::Value {
    let mut spare = 256u32..;
    let mut vocab = serde_json::Map::new();
    for byte in 0..=255u8 {
        let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let name =
            if printable { Some(char::from(byte)) } else { spare.next().and_then(char::from_u32) };
        vocab.insert(name.unwrap_or_default().to_string(), byte.into());
    }
    // The last one is where transformers puts a picture.
    let special = ["<|start|>", "<|end|>", "<image>"].into_iter().zip(256u32..).map(|(content, id)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    });
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": special.collect::<Vec<_>>(),
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": []},
    })
}

//! A model taken apart and written in another layout.
//!
//! ```text
//! our folder ───┐             ┌─▶ Hugging Face folder of one stage, which transformers loads
//! Hugging Face ─┼─▶ [`Parts`] ┤
//! LAVIS .pth ───┘             └─▶ our folder, which every verb and training start from
//! ```
//!
//! Nothing is computed but what a layout needs: queries, keys and values side by side, layer scale multiplied into the
//! projections it scales, a quantised language model unpacked. Tensors go through memory one at a time.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::DType;
use serde_json::{Value, json};

use crate::assets::Progress;
use crate::image::Normalize;
use crate::lavis::{self, HeadCounts, Lavis, Stage, Tensors};
use crate::llama::Gguf;
use crate::model::{
    CaptionStage, Files, LlmPart, MANIFEST, Manifest, Model, PartFile, Stage1Part, Stage2Part,
    VisionPart,
};
use crate::nn::Activation;
use crate::stage1::Stage1Config;
use crate::stage2::Stage2Config;
use crate::stored::Stored;
use crate::tokenizer::Tokenizer;
use crate::vit::VitConfig;
use crate::weights_out::{self, SHARD, Source};
use crate::{Error, Result, checkpoint, llm, shards};

/// BERT's uncased word pieces: every published stage 1 reads them, and no checkpoint brings them.
const BERT_VOCAB: &[u8] = include_bytes!("../../../models/mini/vocab.txt");
/// What transformers' processor calls a picture's place in a prompt.
const IMAGE_TOKEN: &str = "<image>";
/// Files of a language model's folder that belong to its tokenizer.
const TOKENIZER_FILES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "chat_template.jinja",
];

/// A model in parts.
pub struct Parts {
    name: String,
    vision: (VitConfig, Normalize, Tensors),
    llm: Option<Language>,
    stage1: Option<One>,
    stage2: Option<Two>,
    caption_stage: CaptionStage,
}

struct One {
    config: Stage1Config,
    tensors: Tensors,
    vocabulary: Vocabulary,
    max_text_len: usize,
}

/// Where a stage-1 model's word pieces come from.
enum Vocabulary {
    /// One a line.
    WordPieces(Vec<u8>),
    /// A `tokenizer.json` and its companions in a folder.
    Folder(PathBuf),
}

struct Two {
    config: Stage2Config,
    tensors: Tensors,
    caption_prompt: String,
    question_prompt: String,
    /// Word pieces, if the bridge reads questions.
    vocab: Option<Vec<u8>>,
}

/// A language model in Hugging Face terms.
struct Language {
    config: Value,
    tensors: Tensors,
    tokenizer: Tokenizer,
    /// Ids that end a text.
    end_ids: Vec<u32>,
    /// Where the tokenizer's files lie; `None`: they are made from the tokenizer.
    files: Option<PathBuf>,
}

/// Which stage a Hugging Face folder holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// `Blip2ForImageTextRetrieval`.
    Matches,
    /// `Blip2ForConditionalGeneration`.
    Generates,
}

/// Where a LAVIS checkpoint's frozen parts are.
#[derive(Debug, Clone, Default)]
pub struct FrozenFiles {
    /// `eva_vit_g.pth`, `clip_vit_L.pth`; not needed if the checkpoint holds a fine-tuned encoder.
    pub vision: Option<PathBuf>,
    /// A folder with the language model in Hugging Face layout, for stage 2.
    pub llm: Option<PathBuf>,
    /// Heads, where the published widths don't hold.
    pub heads: HeadCounts,
}

impl Parts {
    /// The parts of a model in our layout or Hugging Face's.
    ///
    /// # Errors
    /// If a part can't be found, fetched or read.
    pub fn of_model(model: &Model, progress: Progress<'_>) -> Result<Self> {
        let Manifest { name, vision, llm, stage1, stage2, caption_stage } = model.manifest.clone();
        let vision = (vision.config, vision.normalize, model.vision_tensors(&mut *progress)?);
        let llm = match (llm, &stage2) {
            (Some(_), Some(_)) => Some(Language::of_model(model, progress)?),
            _ => None,
        };
        let stage1 = stage1.map(|part| -> Result<One> {
            let vocabulary = match model.files() {
                Files::HuggingFace(checkpoint) => {
                    Vocabulary::Folder(checkpoint.folder().to_path_buf())
                }
                files => Vocabulary::WordPieces(files.read(&part.vocab)?.into_owned()),
            };
            Ok(One {
                tensors: model.weights(&part.weights)?,
                config: part.config,
                vocabulary,
                max_text_len: part.max_text_len,
            })
        });
        let stage2 = stage2.map(|part| -> Result<Two> {
            Ok(Two {
                tensors: model.weights(&part.weights)?,
                config: part.config,
                caption_prompt: part.caption_prompt,
                question_prompt: part.question_prompt,
                vocab: part
                    .vocab
                    .map(|name| model.files().read(&name).map(std::borrow::Cow::into_owned))
                    .transpose()?,
            })
        });
        let (stage1, stage2) = (stage1.transpose()?, stage2.transpose()?);
        Ok(Self { name, vision, llm, stage1, stage2, caption_stage })
    }

    /// The parts of a LAVIS checkpoint.
    ///
    /// # Errors
    /// If a frozen part is not given, a file can't be read, or a tensor is unknown.
    pub fn of_lavis(path: &Path, frozen: &FrozenFiles) -> Result<Self> {
        let lavis = Lavis::new(shards::open_file(path)?, frozen.heads, path)?;
        // Stage 2 is trained with its image encoder to caption, and then behind these words.
        let caption_prompt = if lavis.vision.is_some() { "a photo of" } else { "" };
        let vision = match (lavis.vision, &frozen.vision) {
            (Some(tensors), _) => lavis::vision(tensors, frozen.heads, path)?,
            (None, Some(file)) => lavis::vision(shards::open_file(file)?, frozen.heads, file)?,
            (None, None) => {
                let reason =
                    "holds no image encoder: give its file (eva_vit_g.pth or clip_vit_L.pth)";
                return Err(Error::file(path, reason));
            }
        };
        let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
        let mut parts = Self {
            name: name.unwrap_or_default(),
            vision: (vision.0, Normalize::CLIP, vision.1),
            llm: None,
            stage1: None,
            stage2: None,
            caption_stage: CaptionStage::default(),
        };
        match lavis.stage {
            Stage::One(config) => {
                parts.stage1 = Some(One {
                    config,
                    tensors: lavis.bridge,
                    vocabulary: Vocabulary::WordPieces(BERT_VOCAB.to_vec()),
                    max_text_len: lavis::MAX_TEXT_LEN,
                });
            }
            Stage::Two(config) => {
                let folder = frozen.llm.as_ref().ok_or_else(|| {
                    Error::file(
                        path,
                        "holds no language model: give its folder (OPT's or FlanT5's)",
                    )
                })?;
                let llm = Language::of_lavis(folder)?;
                let question =
                    if llm.is_t5() { "Question: {} Short answer:" } else { "Question: {} Answer:" };
                parts.llm = Some(llm);
                parts.stage2 = Some(Two {
                    config,
                    tensors: lavis.bridge,
                    caption_prompt: caption_prompt.into(),
                    question_prompt: question.into(),
                    vocab: None,
                });
            }
        }
        Ok(parts)
    }

    /// The halves that there are.
    #[must_use]
    pub fn halves(&self) -> Vec<Half> {
        let one = self.stage1.is_some().then_some(Half::Matches);
        let two = self.stage2.is_some().then_some(Half::Generates);
        one.into_iter().chain(two).collect()
    }

    /// What a Hugging Face folder of one half does not hold, or holds otherwise: a person should know.
    #[must_use]
    pub fn lost(&self, half: Half) -> Vec<String> {
        let encoder_eps = self.vision.0.layer_norm_eps;
        let (eps, mut lost) = match (half, &self.stage1, &self.stage2) {
            (Half::Matches, Some(one), _) if !one.config.matching_only => {
                let parts = "the temperature and the head that writes captions have no place in it";
                (one.config.ln_vision_eps, vec![parts.to_owned()])
            }
            (Half::Matches, Some(one), _) => (one.config.ln_vision_eps, Vec::new()),
            (_, _, Some(two)) => (two.config.ln_vision_eps, Vec::new()),
            _ => return Vec::new(),
        };
        if eps != encoder_eps {
            lost.push(format!(
                "ln_vision has the epsilon {eps:e} and will have that of the image encoder, {encoder_eps:e}"
            ));
        }
        if self.caption_stage != CaptionStage::Second {
            lost.push("captions will be those of its one stage, without a choice".into());
        }
        if self
            .stage2
            .as_ref()
            .is_some_and(|two| half == Half::Generates && !two.caption_prompt.is_empty())
        {
            lost.push(
                "its prompts are kept for this program alone, transformers does not read them"
                    .into(),
            );
        }
        lost
    }

    /// Writes one half as a Hugging Face folder, its weights in `dtype` or as they are. Returns the bytes of the weights.
    ///
    /// # Errors
    /// If the half is not there, transformers has no such model, or a file can't be written.
    pub fn write_hf(&self, half: Half, dtype: Option<DType>, folder: &Path) -> Result<u64> {
        let mut tensors = self.hf_vision()?;
        let missing = || Error::Config(format!("model {} has no such stage", self.name));
        let (qformer, bridge) = match half {
            Half::Matches => {
                let one = self.stage1.as_ref().ok_or_else(missing)?;
                (&one.config.qformer, &one.tensors)
            }
            Half::Generates => {
                let two = self.stage2.as_ref().ok_or_else(missing)?;
                (&two.config.qformer, &two.tensors)
            }
        };
        for (name, tensor) in bridge {
            match checkpoint::to_hf_bridge(name) {
                Some(theirs) => drop(tensors.insert(theirs, tensor.clone().into())),
                // transformers' retrieval model has no temperature and writes no captions.
                None if name == "temp" || name.starts_with("qformer.lm_head.") => {}
                None => return Err(Error::Weights(format!("{name} has no place in transformers"))),
            }
        }
        let (vision, normalize, _) = &self.vision;
        let mut config = json!({
            "model_type": "blip-2",
            "num_query_tokens": qformer.num_queries,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "vision_config": {
                "model_type": "blip_2_vision_model",
                "hidden_size": vision.width, "intermediate_size": vision.mlp_width,
                "num_hidden_layers": vision.depth, "num_attention_heads": vision.num_heads,
                "image_size": vision.image_size, "patch_size": vision.patch_size,
                "hidden_act": "gelu", "layer_norm_eps": vision.layer_norm_eps, "qkv_bias": true,
            },
            "qformer_config": {
                "model_type": "blip_2_qformer",
                "hidden_size": qformer.width, "num_hidden_layers": qformer.depth,
                "num_attention_heads": qformer.num_heads, "intermediate_size": qformer.mlp_width,
                "cross_attention_frequency": qformer.cross_attention_freq,
                "encoder_hidden_size": qformer.encoder_width, "vocab_size": qformer.vocab_size,
                "max_position_embeddings": qformer.max_positions, "layer_norm_eps": qformer.layer_norm_eps,
                "hidden_act": "gelu", "position_embedding_type": "absolute",
                "use_qformer_text_input": half == Half::Matches,
            },
        });
        match half {
            Half::Matches => self.add_hf_matching(&mut config, folder)?,
            Half::Generates => self.add_hf_language(&mut config, &mut tensors, folder)?,
        }
        write_json(&folder.join("config.json"), &config)?;
        write_json(
            &folder.join("preprocessor_config.json"),
            &preprocessor(vision.image_size, normalize),
        )?;
        let processor =
            json!({"processor_class": "Blip2Processor", "num_query_tokens": qformer.num_queries});
        write_json(&folder.join("processor_config.json"), &processor)?;
        self.write_weights(&tensors, dtype, SHARD, folder)
    }

    fn add_hf_matching(&self, config: &mut Value, folder: &Path) -> Result<()> {
        let Some(one) = &self.stage1 else { return Ok(()) };
        config["architectures"] = json!(["Blip2ForImageTextRetrieval"]);
        config["image_text_hidden_size"] = one.config.embed_dim.into();
        // transformers wants a language model's configuration even where there is none.
        config["text_config"] = json!({"model_type": "opt"});
        match &one.vocabulary {
            Vocabulary::Folder(from) => copy_tokenizer(from, folder),
            Vocabulary::WordPieces(lines) => {
                let path = folder.join("tokenizer.json");
                let json = Tokenizer::from_wordpiece_vocab(lines)?.to_json()?;
                std::fs::write(&path, json).map_err(Error::io(&path))?;
                let about = json!({
                    "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": one.config.qformer.max_positions,
                    "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]",
                    "mask_token": "[MASK]", "bos_token": "[DEC]", "clean_up_tokenization_spaces": true,
                });
                write_json(&folder.join("tokenizer_config.json"), &about)
            }
        }
    }

    fn add_hf_language(
        &self,
        config: &mut Value,
        tensors: &mut BTreeMap<String, Source>,
        folder: &Path,
    ) -> Result<()> {
        let llm = self.llm.as_ref().ok_or_else(|| {
            Error::Config(format!("model {} has no language model to write", self.name))
        })?;
        if self.stage2.as_ref().is_some_and(|two| two.config.reads_questions) {
            return Err(Error::Config(
                "transformers' Blip2 has no Q-Former that reads questions; our own layout holds this model".into(),
            ));
        }
        let image = llm.image_token()?;
        config["architectures"] = json!(["Blip2ForConditionalGeneration"]);
        if let Some(two) = &self.stage2 {
            config["blip2"] = json!({
                "caption_prompt": two.caption_prompt, "question_prompt": two.question_prompt,
            });
        }
        config["use_decoder_only_language_model"] = (!llm.is_t5()).into();
        config["image_token_index"] = image.id.into();
        let mut text = llm.config.clone();
        text["eos_token_id"] = llm.eos_json();
        config["text_config"] = text;
        for (name, tensor) in llm.hf_tensors() {
            tensors.insert(format!("language_model.{name}"), tensor.into());
        }
        let special = llm.tokenizer.special();
        let mut generation = json!({
            "eos_token_id": config["text_config"]["eos_token_id"], "pad_token_id": special.pad,
        });
        if let Some(bos) = special.bos {
            generation["bos_token_id"] = bos.into();
        }
        if llm.is_t5() {
            generation["decoder_start_token_id"] =
                llm.config.get("decoder_start_token_id").cloned().unwrap_or(json!(0));
        }
        write_json(&folder.join("generation_config.json"), &generation)?;
        llm.write_tokenizer(&image, folder)
    }

    /// The image encoder under transformers' names.
    fn hf_vision(&self) -> Result<BTreeMap<String, Source>> {
        let (config, _, tensors) = &self.vision;
        if config.pre_norm || config.activation != Activation::Gelu || !config.patch_bias {
            return Err(Error::Config(
                "transformers' Blip2VisionModel has no norm before its blocks, no QuickGELU and always a bias of \
                 patches: this image encoder (CLIP) does not fit it; our own layout holds it"
                    .into(),
            ));
        }
        let p = config.patch_size;
        let mut out = BTreeMap::new();
        let factor = |name: &str| -> Option<Stored> {
            let (block, part) = name.split_once(".attn.out.").map_or_else(
                || name.split_once(".mlp.fc2.").map(|(block, _)| (block, "scale2")),
                |(block, _)| Some((block, "scale1")),
            )?;
            tensors.get(&format!("{block}.{part}")).cloned()
        };
        for (name, tensor) in tensors {
            if name.ends_with(".scale1") || name.ends_with(".scale2") {
                continue;
            }
            if let Some((block, kind)) = name.split_once(".attn.q.") {
                let fused = ["q", "k", "v"].map(|part| {
                    let name = format!("{block}.attn.{part}.{kind}");
                    let part = tensors.get(&name).cloned();
                    part.ok_or_else(|| Error::Weights(format!("no tensor {name}")))
                });
                let fused = fused.into_iter().collect::<Result<Vec<_>>>()?;
                let index = block.strip_prefix("blocks.").unwrap_or(block);
                let theirs = format!("vision_model.encoder.layers.{index}.self_attn.qkv.{kind}");
                out.insert(theirs, Source::Rows(fused));
                continue;
            }
            if name.contains(".attn.k.") || name.contains(".attn.v.") {
                continue;
            }
            let theirs = checkpoint::to_hf_vision(name)
                .ok_or_else(|| Error::Weights(format!("{name} has no place in transformers")))?;
            let source = match factor(name) {
                Some(factors) => Source::Scaled(tensor.clone(), factors),
                None if name == "patch_embed.weight" => {
                    tensor.reshaped(&[config.width, 3, p, p]).into()
                }
                None if name == "pos_embed" => self.fitted_positions(tensor)?.into(),
                None => tensor.clone().into(),
            };
            out.insert(theirs, source);
        }
        Ok(out)
    }

    /// Writes tensors; what is wrong with one is said with the model's name.
    fn write_weights(
        &self,
        sources: &BTreeMap<String, Source>,
        dtype: Option<DType>,
        shard: usize,
        folder: &Path,
    ) -> Result<u64> {
        weights_out::write(sources, dtype, shard, folder).map_err(|err| match err {
            Error::Weights(reason) => Error::Weights(format!("{}: {reason}", self.name)),
            other => other,
        })
    }

    /// Positions for the size of picture that the model looks at.
    fn fitted_positions(&self, tensor: &Stored) -> Result<Stored> {
        let config = &self.vision.0;
        let side = config.image_size / config.patch_size.max(1);
        if tensor.dims().get(1) == Some(&(side * side + 1)) {
            return Ok(tensor.clone());
        }
        let tensor = tensor.load()?.to_dtype(DType::F32)?;
        Ok(crate::nn::fit_positions(&tensor, side, config.corners())?.into())
    }

    /// Writes everything as a folder of ours, its weights in `dtype` or as they are. Returns the bytes of the weights.
    ///
    /// # Errors
    /// If a file can't be read or written.
    pub fn write_folder(&self, dtype: Option<DType>, folder: &Path) -> Result<u64> {
        let mut bytes = 0;
        let mut put = |name: &str, tensors: &Tensors| -> Result<String> {
            let sources = tensors.iter().map(|(n, t)| (n.clone(), t.clone().into())).collect();
            let part = tempfile::tempdir_in(folder).map_err(Error::io(folder))?;
            bytes += self.write_weights(&sources, dtype, usize::MAX, part.path())?;
            let (from, file) =
                (part.path().join("model.safetensors"), format!("{name}.safetensors"));
            std::fs::rename(&from, folder.join(&file)).map_err(Error::io(&from))?;
            Ok(file)
        };
        let (config, normalize, tensors) = &self.vision;
        let mut tensors = tensors.clone();
        if let Some(positions) = tensors.get_mut("pos_embed") {
            *positions = self.fitted_positions(positions)?;
        }
        let vision = VisionPart {
            config: config.clone(),
            weights: PartFile::File(put("vision", &tensors)?),
            normalize: *normalize,
        };
        let stage1 = self.stage1.as_ref().map(|one| -> Result<Stage1Part> {
            let vocab = match &one.vocabulary {
                Vocabulary::WordPieces(lines) => lines.clone(),
                Vocabulary::Folder(from) => word_pieces(&from.join("tokenizer.json"))?,
            };
            let path = folder.join("vocab.txt");
            std::fs::write(&path, vocab).map_err(Error::io(&path))?;
            Ok(Stage1Part {
                config: one.config.clone(),
                weights: put("stage1", &one.tensors)?,
                vocab: "vocab.txt".into(),
                max_text_len: one.max_text_len,
            })
        });
        let stage1 = stage1.transpose()?;
        let stage2 = self.stage2.as_ref().map(|two| -> Result<Stage2Part> {
            Ok(Stage2Part {
                config: two.config.clone(),
                weights: put("stage2", &two.tensors)?,
                caption_prompt: two.caption_prompt.clone(),
                question_prompt: two.question_prompt.clone(),
                vocab: two
                    .vocab
                    .as_ref()
                    .map(|lines| {
                        let path = folder.join("vocab.txt");
                        std::fs::write(&path, lines).map_err(Error::io(&path))?;
                        Ok::<_, Error>("vocab.txt".to_owned())
                    })
                    .transpose()?,
            })
        });
        let stage2 = stage2.transpose()?;
        if let Some(llm) = &self.llm {
            let inner = folder.join("llm");
            std::fs::create_dir_all(&inner).map_err(Error::io(&inner))?;
            let mut config = llm.config.clone();
            config["eos_token_id"] = llm.end_ids.first().copied().unwrap_or(2).into();
            write_json(&inner.join("config.json"), &config)?;
            if llm.end_ids.len() > 1 {
                let all = json!({"eos_token_id": llm.end_ids});
                write_json(&inner.join("generation_config.json"), &all)?;
            }
            let sources = llm.hf_tensors().into_iter().map(|(n, t)| (n, t.into())).collect();
            bytes += self.write_weights(&sources, dtype, SHARD, &inner)?;
            let path = inner.join("tokenizer.json");
            std::fs::write(&path, llm.tokenizer.to_json()?).map_err(Error::io(&path))?;
        }
        let llm = self.llm.as_ref().map(|_| LlmPart { weights: PartFile::File("llm".into()) });
        let (name, caption_stage) = (self.name.clone(), self.caption_stage);
        let manifest = Manifest { name, vision, llm, stage1, stage2, caption_stage };
        let value = serde_json::to_value(&manifest).map_err(|e| Error::Config(e.to_string()))?;
        write_json(&folder.join(MANIFEST), &value)?;
        Ok(bytes)
    }
}

/// The token that stands for a picture in transformers' prompts.
struct ImageToken {
    id: u32,
    /// What the tokenizer calls it, if that is another token, to be renamed.
    text: Option<String>,
}

impl Language {
    fn of_model(model: &Model, progress: Progress<'_>) -> Result<Self> {
        if let Files::HuggingFace(checkpoint) = model.files() {
            return Ok(Self {
                config: checkpoint.text_config(),
                tensors: checkpoint.language_tensors(),
                tokenizer: checkpoint.tokenizer()?,
                end_ids: checkpoint.end_ids(),
                files: Some(checkpoint.folder().to_path_buf()),
            });
        }
        let path = model.llm_path(progress)?;
        if path.is_dir() {
            return Self::of_folder(&path);
        }
        let gguf = Gguf::open(&path)?;
        let tokenizer = Tokenizer::from_gguf(gguf.metadata())
            .map_err(|err| Error::file(&path, err.to_string()))?;
        let (config, tensors) = gguf.to_hf()?;
        let end_ids = vec![tokenizer.special().eos];
        let tensors = tensors.into_iter().map(|(name, t)| (name, t.into())).collect();
        Ok(Self { config, tensors, tokenizer, end_ids, files: None })
    }

    fn of_folder(folder: &Path) -> Result<Self> {
        let config = read_json(&folder.join("config.json"))?;
        let tokenizer = llm::tokenizer_of(folder, &config)?;
        let end_ids = llm::end_ids(folder, &tokenizer)?;
        let tensors = shards::open(folder)?;
        Ok(Self { config, tensors, tokenizer, end_ids, files: Some(folder.to_path_buf()) })
    }

    /// A language model as LAVIS uses it: OPT ends a text with a line, T5 has the error-function GELU.
    fn of_lavis(folder: &Path) -> Result<Self> {
        let mut llm = Self::of_folder(folder)?;
        if llm.is_t5() {
            llm.config["dense_act_fn"] = "gelu".into();
            llm.config["bos_token_id"] = 1.into();
        } else if llm.config["model_type"] == "opt" {
            match llm.tokenizer.encode("\n", false)?[..] {
                [newline] => llm.end_ids = vec![newline],
                ref ids => {
                    let reason =
                        format!("its tokenizer makes {} tokens of a newline, not one", ids.len());
                    return Err(Error::file(folder, reason));
                }
            }
        }
        Ok(llm)
    }

    fn is_t5(&self) -> bool {
        self.config["model_type"] == "t5"
    }

    /// The ids that end a text, as configurations have them.
    fn eos_json(&self) -> Value {
        match self.end_ids[..] {
            [one] => one.into(),
            _ => json!(self.end_ids),
        }
    }

    fn words(&self) -> Option<&Stored> {
        [
            "shared.weight",
            "model.embed_tokens.weight",
            "model.decoder.embed_tokens.weight",
            "decoder.embed_tokens.weight",
        ]
        .iter()
        .find_map(|name| self.tensors.get(*name))
    }

    /// The tensors as transformers' model with a head names them, none of them twice.
    fn hf_tensors(&self) -> Tensors {
        let tied = match self.config["tie_word_embeddings"].as_bool() {
            Some(tied) => tied,
            None => self.config["model_type"] == "opt",
        };
        let is_opt = self.config["model_type"] == "opt";
        let twice = |name: &str| {
            (tied && !self.is_t5() && name == "lm_head.weight")
                || (self.is_t5()
                    && matches!(
                        name,
                        "encoder.embed_tokens.weight" | "decoder.embed_tokens.weight"
                    ))
        };
        let full = |name: &String| {
            if is_opt && name.starts_with("decoder.") {
                format!("model.{name}")
            } else {
                name.clone()
            }
        };
        let kept = self.tensors.iter().filter(|(name, _)| !twice(name));
        kept.map(|(name, tensor)| (full(name), tensor.clone())).collect()
    }

    /// A token that no text uses and that has an embedding: `<image>` itself, the first row behind the tokenizer's ids, or a
    /// special token that means nothing.
    fn image_token(&self) -> Result<ImageToken> {
        if let Some(id) = self.tokenizer.token_to_id(IMAGE_TOKEN) {
            return Ok(ImageToken { id, text: None });
        }
        let ids = self.tokenizer.vocab_size();
        let rows = self.words().map_or(0, |words| words.dims().first().copied().unwrap_or(0));
        if ids < rows {
            return Ok(ImageToken { id: ids as u32, text: None });
        }
        let special = self.tokenizer.special();
        let used =
            |id: u32| [special.bos, Some(special.eos), Some(special.pad)].contains(&Some(id));
        let spare = self.tokenizer.special_tokens().into_iter().rfind(|(id, _)| !used(*id));
        let (id, text) = spare.ok_or_else(|| {
            Error::Config(format!(
                "transformers marks a picture's place by a token of its own, and all {rows} embeddings have another meaning"
            ))
        })?;
        Ok(ImageToken { id, text: Some(text) })
    }

    fn write_tokenizer(&self, image: &ImageToken, folder: &Path) -> Result<()> {
        let special = self.tokenizer.special();
        let name = |id: u32| self.tokenizer.id_to_token(id).unwrap_or_default();
        let own = self.files.as_ref().filter(|from| from.join("tokenizer_config.json").is_file());
        if let Some(from) = own {
            copy_tokenizer(from, folder)?;
        }
        let path = folder.join("tokenizer.json");
        if !path.exists() {
            let json = match special.bos {
                // Our prompts begin with it, so transformers' shall.
                Some(bos) if !self.is_t5() => self.tokenizer.with_prefix(vec![bos]).to_json()?,
                _ => self.tokenizer.to_json()?,
            };
            std::fs::write(&path, json).map_err(Error::io(&path))?;
        }
        if let Some(text) = &image.text {
            rename_token(&path, image.id, text, IMAGE_TOKEN)?;
        }
        if own.is_some() {
            return Ok(());
        }
        let mut about = json!({
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false,
            "eos_token": name(special.eos), "pad_token": name(special.pad), "padding_side": "left",
        });
        if let Some(bos) = special.bos {
            about["bos_token"] = name(bos).into();
        }
        write_json(&folder.join("tokenizer_config.json"), &about)
    }
}

/// Gives a token of a `tokenizer.json` another text; its id stays.
fn rename_token(path: &Path, id: u32, from: &str, to: &str) -> Result<()> {
    let mut json = read_json(path)?;
    for added in json["added_tokens"].as_array_mut().into_iter().flatten() {
        if added["id"] == id {
            added["content"] = to.into();
        }
    }
    let vocab = json.get_mut("model").and_then(|model| model.get_mut("vocab"));
    if let Some(vocab) = vocab.and_then(Value::as_object_mut)
        && vocab.get(from).is_some_and(|found| *found == id)
    {
        vocab.remove(from);
        vocab.insert(to.into(), id.into());
    }
    write_json(path, &json)
}

fn preprocessor(size: usize, normalize: &Normalize) -> Value {
    // Shortest decimal numbers, as the published files have them.
    let plain = |values: [f32; 3]| values.map(|x| x.to_string().parse::<f64>().unwrap_or_default());
    json!({
        "image_processor_type": "BlipImageProcessor", "processor_class": "Blip2Processor",
        "do_convert_rgb": true, "do_resize": true, "size": {"height": size, "width": size}, "resample": 3,
        "do_rescale": true, "rescale_factor": 1.0 / 255.0, "do_normalize": true,
        "image_mean": plain(normalize.mean), "image_std": plain(normalize.std),
    })
}

fn copy_tokenizer(from: &Path, to: &Path) -> Result<()> {
    for name in TOKENIZER_FILES {
        let path = from.join(name);
        if path.is_file() {
            std::fs::copy(&path, to.join(name)).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}

/// The word pieces of a `tokenizer.json`, one a line in the order of their ids; `[DEC]`, the last, is added when they are read.
fn word_pieces(path: &Path) -> Result<Vec<u8>> {
    let json = read_json(path)?;
    let wrong = || Error::file(path, "holds no WordPiece vocabulary");
    let vocab = json["model"]["vocab"].as_object().ok_or_else(wrong)?;
    let mut lines: Vec<(u64, &str)> = Vec::new();
    for (piece, id) in vocab {
        lines.push((id.as_u64().ok_or_else(wrong)?, piece));
    }
    lines.sort_unstable();
    Ok(lines.iter().flat_map(|(_, piece)| [piece.as_bytes(), b"\n"].concat()).collect())
}

fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&text).map_err(|err| Error::file(path, err.to_string()))
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    std::fs::write(path, format!("{value:#}\n")).map_err(Error::io(path))
}

//! What a recipe costs before anything is fetched or trained: parameters, memory, arithmetic of one step.
//!
//! Parameters are exact. Arithmetic counts matrix products, two operations a multiplication, and leaves out what is small
//! beside them. Memory is an estimate: weights, gradients and optimiser exactly, and of the activations those that the
//! backward pass reads.

use std::path::Path;

use blip2::llama::LlamaConfig;
use blip2::model::{MANIFEST, Model};
use blip2::opt::OptConfig;
use blip2::qformer::QFormerConfig;
use blip2::stage1::Stage1Config;
use blip2::t5::T5Config;
use blip2::vit::VitConfig;
use blip2_ops::WeightFormat;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::init;
use crate::recipe::{
    BertSection, BertShape, LlmSection, LlmShape, RANDOM_VOCAB, Recipe, Stage, VisionSection,
    VisionShape,
};
use crate::{Error, Result};

/// Bytes of a trained parameter: weight, gradient and AdamW's two averages, in f32.
const TRAINED_BYTES: u64 = 16;
/// Word pieces of BERT with `[DEC]`.
const WORD_PIECES: usize = 30_523;
/// Words of a caption, for the arithmetic: COCO's are about that long.
const CAPTION_TOKENS: usize = 16;

/// The cost of one stage of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Budget {
    /// Number of the stage.
    pub stage: u32,
    /// Parameters that are trained.
    pub trained: u64,
    /// How many of them are `ln_vision`'s, which some counts leave out.
    pub ln_vision: u64,
    /// Parameters of the image encoder, frozen or not.
    pub vision: u64,
    /// Parameters of the frozen language model; none in stage 1.
    pub llm: u64,
    /// Pictures of one optimiser step.
    pub pictures: u64,
    /// Bytes of the frozen weights.
    pub frozen_bytes: u64,
    /// Bytes of trained weights, their gradients and the optimiser's state.
    pub trained_bytes: u64,
    /// Bytes of activations of one micro-batch, about.
    pub activation_bytes: u64,
    /// Operations of one optimiser step: image encoder, bridge, language model.
    pub flops: [f64; 3],
}

/// A transformer's size, as far as costs go.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Stack {
    layers: usize,
    /// Weights of a layer's products.
    weights: usize,
    width: usize,
    mlp: usize,
    heads: usize,
}

/// A language model's size.
#[derive(Debug, Clone, PartialEq)]
struct LlmSize {
    width: usize,
    vocab: usize,
    params: u64,
    /// Reads queries and given text.
    encoder: Option<Stack>,
    /// Reads everything, or writes what an encoder has not read.
    decoder: Stack,
}

impl Budget {
    /// The cost of `recipe`. Published shapes are known by name; of others the folders are opened.
    ///
    /// # Errors
    /// If a folder of an unnamed shape can't be read.
    pub fn of(recipe: &Recipe) -> Result<Self> {
        let vit = vit_config(&recipe.model.vision)?;
        let stage1 = stage1_config(recipe, vit.width)?;
        let per_step = (recipe.train.batch_size * recipe.train.accumulate) as u64;
        let shapes = init::shapes(&stage1);
        let count = |shape: &Vec<usize>| shape.iter().product::<usize>() as u64;
        let vision = vit_params(&vit);
        let mut budget = Self {
            stage: recipe.stage_number(),
            trained: 0,
            ln_vision: 2 * vit.width as u64,
            vision,
            llm: 0,
            pictures: per_step,
            frozen_bytes: bytes(vision, Some(recipe.model.vision.format()?)),
            trained_bytes: 0,
            activation_bytes: 0,
            flops: [0.0; 3],
        };
        let q = &stage1.qformer;
        let tokens = vit.num_tokens();
        let pictures = per_step as f64;
        budget.flops[0] = pictures * vit_stack(&vit).flops(tokens, tokens);
        let batch = recipe.train.batch_size as f64;
        let floats = match &recipe.stage {
            Stage::One { max_text_len, itm_pairs, .. } => {
                budget.trained = shapes.values().map(count).sum();
                let t = *max_text_len;
                let matched = itm_pairs.map_or(1.0, |pairs| (pairs as f64 / batch).min(1.0));
                budget.flops[1] =
                    3.0 * pictures * stage1_flops(q, tokens, t.min(CAPTION_TOKENS + 2), matched);
                let floats =
                    |rows: usize| q_stack(q).floats(rows * (q.num_queries + t), q.num_queries + t);
                floats(2) + matched * floats(3) + (t * q.vocab_size) as f64
            }
            Stage::Two { texts_per_picture, max_text_len, reads_questions, .. } => {
                let llm = llm_size(&recipe.model.llm)?;
                let kept = shapes.iter().filter(|(name, _)| {
                    init::in_stage2(name)
                        || (*reads_questions && init::guides_stage2(name, q.depth))
                });
                let projection = (llm.width * q.width + llm.width) as u64;
                budget.trained = kept.map(|(_, shape)| count(shape)).sum::<u64>() + projection;
                budget.llm = llm.params;
                budget.frozen_bytes += bytes(llm.params, recipe.model.llm.format()?);
                budget.flops[1] = 3.0 * pictures * query_flops(q, tokens);
                let text = (CAPTION_TOKENS + 2).min(*max_text_len) * texts_per_picture;
                // Forward, and backward to what it read.
                budget.flops[2] = 2.0 * pictures * llm.flops(q.num_queries, text);
                q_stack(q).floats(q.num_queries, q.num_queries) + llm.floats(q.num_queries, text)
            }
        };
        if recipe.trains_vision() {
            budget.trained += vision;
            budget.frozen_bytes -= bytes(vision, Some(recipe.model.vision.format()?));
            // Forward, again in the backward pass, and that.
            budget.flops[0] *= 4.0;
        }
        budget.trained_bytes = budget.trained * TRAINED_BYTES;
        budget.activation_bytes = (4.0 * batch * floats) as u64;
        Ok(budget)
    }
}

impl Stack {
    /// Operations of a forward pass over `rows` positions that each see `keys`.
    fn flops(&self, rows: usize, keys: usize) -> f64 {
        let products = self.weights as f64 * rows as f64;
        let attention = 2.0 * rows as f64 * keys as f64 * self.width as f64;
        2.0 * self.layers as f64 * (products + attention)
    }

    /// Numbers that the backward pass reads: inputs of products, normed inputs, attention's weights.
    fn floats(&self, rows: usize, keys: usize) -> f64 {
        let row = 8 * self.width + 2 * self.mlp + self.heads * keys;
        (self.layers * rows * row) as f64
    }
}

impl LlmSize {
    fn flops(&self, queries: usize, text: usize) -> f64 {
        let head = 2.0 * (self.width * self.vocab * text) as f64;
        head + match &self.encoder {
            Some(encoder) => {
                let read = queries + 1;
                encoder.flops(read, read) + self.decoder.flops(text, text + read)
            }
            None => self.decoder.flops(queries + text, queries + text),
        }
    }

    fn floats(&self, queries: usize, text: usize) -> f64 {
        let head = (self.vocab * text) as f64;
        head + match &self.encoder {
            Some(encoder) => {
                let read = queries + 1;
                encoder.floats(read, read) + self.decoder.floats(text, text + read)
            }
            None => self.decoder.floats(queries + text, queries + text),
        }
    }
}

fn bytes(params: u64, format: Option<WeightFormat>) -> u64 {
    let bits = match format {
        Some(WeightFormat::F32) => 32.0,
        Some(WeightFormat::F16) => 16.0,
        Some(WeightFormat::Q8_0) => 8.5,
        // What is stored in a GGUF file here has about as many.
        Some(WeightFormat::Q4K) | None => 4.5,
    };
    (params as f64 * bits / 8.0) as u64
}

// ---- the bridge ---------------------------------------------------------------------------------

fn q_stack(q: &QFormerConfig) -> Stack {
    let weights = 4 * q.width * q.width + 2 * q.width * q.mlp_width;
    Stack { layers: q.depth, weights, width: q.width, mlp: q.mlp_width, heads: q.num_heads }
}

/// Cross-attention of the queries with keys and values that are there.
fn cross_flops(q: &QFormerConfig, tokens: usize) -> f64 {
    let layers = (0..q.depth).filter(|i| q.has_cross_attention(*i)).count() as f64;
    let (w, n) = (q.width as f64, q.num_queries as f64);
    2.0 * layers * (2.0 * w * w * n + 2.0 * n * tokens as f64 * w)
}

/// Keys and values of a picture, once for all passes.
fn key_flops(q: &QFormerConfig, tokens: usize) -> f64 {
    let layers = (0..q.depth).filter(|i| q.has_cross_attention(*i)).count();
    2.0 * (layers * 2 * q.width * q.encoder_width * tokens) as f64
}

fn query_flops(q: &QFormerConfig, tokens: usize) -> f64 {
    let n = q.num_queries;
    key_flops(q, tokens) + cross_flops(q, tokens) + q_stack(q).flops(n, n)
}

/// A pair in stage 1: the query pass, the text pass, three of matching for the share of pairs that is `matched`, one of
/// captioning.
fn stage1_flops(q: &QFormerConfig, tokens: usize, text: usize, matched: f64) -> f64 {
    let (stack, n) = (q_stack(q), q.num_queries);
    let matching = stack.flops(n + text, n + text) + cross_flops(q, tokens);
    let head = 2.0 * (text * q.width * (q.width + q.vocab_size)) as f64;
    query_flops(q, tokens)
        + stack.flops(text, text)
        + 3.0 * matched * matching
        + stack.flops(text, n + text)
        + head
}

fn stage1_config(recipe: &Recipe, encoder_width: usize) -> Result<Stage1Config> {
    let section = &recipe.model.qformer;
    let (width, depth, num_heads, mlp_width, vocab_size) = match &section.init {
        BertSection::Mini {} => (384, 6, 12, 1536, WORD_PIECES),
        BertSection::Directory { shape: BertShape::BertBase, .. } => {
            (768, 12, 12, 3072, WORD_PIECES)
        }
        BertSection::Directory { path, shape: BertShape::Any } => {
            let config = read_json(&path.join("config.json"))?;
            let field = |name: &str| {
                let found = config[name].as_u64().map(|n| n as usize);
                found.ok_or_else(|| Error::Recipe(format!("{}: no {name}", path.display())))
            };
            let heads = field("num_attention_heads")?;
            let (width, depth) = (field("hidden_size")?, field("num_hidden_layers")?);
            (width, depth, heads, field("intermediate_size")?, field("vocab_size")? + 1)
        }
        // Its vocabulary is made of the captions; a few hundred words.
        &BertSection::Random { width, depth, num_heads, ffn_width } => {
            (width, depth, num_heads, ffn_width, 500)
        }
    };
    Ok(Stage1Config {
        qformer: QFormerConfig {
            width,
            depth,
            num_heads,
            mlp_width,
            cross_attention_freq: section.cross_attention_every,
            encoder_width,
            num_queries: section.num_queries,
            vocab_size,
            max_positions: 512,
            layer_norm_eps: 1e-12,
            dropout: section.dropout,
        },
        embed_dim: section.embed_dim,
        ln_vision_eps: 1e-5,
        matching_only: false,
    })
}

// ---- the frozen parts ---------------------------------------------------------------------------

fn vit_config(section: &VisionSection) -> Result<VitConfig> {
    Ok(match *section {
        VisionSection::Mini { image_size } => VitConfig { image_size, ..VitConfig::dino_s() },
        VisionSection::Directory { shape: VisionShape::EvaClipG, image_size, .. } => {
            VitConfig { image_size, ..VitConfig::eva_clip_g() }
        }
        VisionSection::Directory { shape: VisionShape::ClipL, image_size, .. } => {
            VitConfig { image_size, ..VitConfig::clip_l() }
        }
        VisionSection::Directory { ref path, image_size, .. } => {
            VitConfig { image_size, ..Model::open_folder(path)?.manifest.vision.config }
        }
        VisionSection::Random { image_size, patch_size, width, depth, num_heads, mlp_width } => {
            VitConfig {
                image_size,
                patch_size,
                width,
                depth,
                num_heads,
                mlp_width,
                ..VitConfig::eva_clip_g()
            }
        }
    })
}

fn vit_stack(c: &VitConfig) -> Stack {
    let weights = 4 * c.width * c.width + 2 * c.width * c.mlp_width;
    Stack { layers: c.depth, weights, width: c.width, mlp: c.mlp_width, heads: c.num_heads }
}

fn vit_params(c: &VitConfig) -> u64 {
    let (w, m) = (c.width, c.mlp_width);
    let scales = if c.layer_scale { 2 * w } else { 0 };
    let block = 4 * w * (w + 1) + w * m + m + m * w + w + 4 * w + scales;
    let patches = 3 * c.patch_size.pow(2) * w + if c.patch_bias { w } else { 0 };
    let pre_norm = if c.pre_norm { 2 * w } else { 0 };
    (c.depth * block + patches + w + c.num_tokens() * w + pre_norm) as u64
}

fn llm_size(section: &LlmSection) -> Result<LlmSize> {
    let opt = |hidden_size: usize, layers: usize, heads: usize| {
        let json = json!({
            "vocab_size": 50272, "hidden_size": hidden_size, "ffn_dim": 4 * hidden_size, "num_hidden_layers": layers,
            "num_attention_heads": heads, "max_position_embeddings": 2048,
        });
        of_opt(&json)
    };
    let t5 = |d_model: usize, d_ff: usize, heads: usize| {
        let json = json!({
            "vocab_size": 32128, "d_model": d_model, "d_kv": 64, "d_ff": d_ff, "num_layers": 24, "num_heads": heads,
            "feed_forward_proj": "gated-gelu",
        });
        of_t5(&json)
    };
    match section {
        LlmSection::Mini { .. } => Ok(llama_size(49_152, 576, 30, [9 * 64, 3 * 64], 1536, true, 9)),
        LlmSection::Directory { shape, path, .. } => match shape {
            LlmShape::Opt2_7b => opt(2560, 32, 32),
            LlmShape::Opt6_7b => opt(4096, 32, 32),
            LlmShape::FlanT5Xl => t5(2048, 5120, 32),
            LlmShape::FlanT5Xxl => t5(4096, 10_240, 64),
            LlmShape::Any => of_folder(path),
        },
        &LlmSection::Random { width, depth, num_heads, num_kv_heads, ffn_width } => {
            let kv = width / num_heads * num_kv_heads;
            Ok(llama_size(RANDOM_VOCAB, width, depth, [width, kv], ffn_width, true, num_heads))
        }
    }
}

/// Refuses a folder that holds another language model than the recipe says.
///
/// # Errors
/// If it does, or can't be read.
pub(crate) fn check_llm(section: &LlmSection) -> Result<()> {
    let LlmSection::Directory { path, shape, .. } = section else { return Ok(()) };
    if *shape == LlmShape::Any {
        return Ok(());
    }
    let (wanted, found) = (llm_size(section)?, of_folder(path)?);
    // Vocabularies are padded and enlarged.
    if (wanted.width, &wanted.encoder, wanted.decoder)
        == (found.width, &found.encoder, found.decoder)
    {
        return Ok(());
    }
    Err(Error::Recipe(format!(
        "model.llm.shape: the language model of {} is another one: width {}, {:?}",
        path.display(),
        found.width,
        found.decoder
    )))
}

fn of_folder(folder: &Path) -> Result<LlmSize> {
    // That of a folder of ours lies in a folder below it.
    let below = folder.join("llm");
    let folder = if folder.join(MANIFEST).is_file() { &below } else { folder };
    let path = folder.join("config.json");
    let config = read_json(&path)?;
    match config["model_type"].as_str() {
        Some("opt") => of_opt(&config),
        Some("t5") => of_t5(&config),
        Some("llama") => {
            let c = LlamaConfig::from_hf(&config.to_string())?;
            let widths = [c.num_heads * c.head_width, c.num_kv_heads * c.head_width];
            Ok(llama_size(c.vocab_size, c.width, c.depth, widths, c.ffn_width, c.tied, c.num_heads))
        }
        other => Err(Error::Recipe(format!(
            "{}: a language model of the family {other:?}; known are llama, opt and t5",
            path.display()
        ))),
    }
}

fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&text).map_err(|e| Error::Recipe(format!("{}: {e}", path.display())))
}

fn of_opt(json: &Value) -> Result<LlmSize> {
    let c = OptConfig::deserialize(json).map_err(|e| Error::Recipe(e.to_string()))?;
    let (w, f) = (c.hidden_size, c.ffn_dim);
    let words = c.word_embed_proj_dim.unwrap_or(w);
    let projections = if words == w { 0 } else { 2 * words * w };
    let block = 4 * w * (w + 1) + 2 * w * f + f + w + 4 * w;
    let params = c.vocab_size * words
        + projections
        + (c.max_position_embeddings + 2) * w
        + c.num_hidden_layers * block
        + 2 * w;
    let decoder = Stack {
        layers: c.num_hidden_layers,
        weights: 4 * w * w + 2 * w * f,
        width: w,
        mlp: f,
        heads: c.num_attention_heads,
    };
    Ok(LlmSize { width: w, vocab: c.vocab_size, params: params as u64, encoder: None, decoder })
}

fn of_t5(json: &Value) -> Result<LlmSize> {
    let c = T5Config::deserialize(json).map_err(|e| Error::Recipe(e.to_string()))?;
    let (w, inner) = (c.d_model, c.num_heads * c.d_kv);
    let gated = c.feed_forward_proj.starts_with("gated-");
    let ffn = if gated { 3 } else { 2 } * w * c.d_ff;
    let decoder_layers = c.num_decoder_layers.unwrap_or(c.num_layers);
    let params = 2 * c.vocab_size * w
        + c.num_layers * (4 * w * inner + ffn + 2 * w)
        + decoder_layers * (8 * w * inner + ffn + 3 * w)
        + 2 * w
        + 2 * c.relative_attention_num_buckets * c.num_heads;
    let stack = |layers: usize, attentions: usize| Stack {
        layers,
        weights: attentions * 4 * w * inner + ffn,
        width: inner,
        mlp: c.d_ff,
        heads: c.num_heads,
    };
    Ok(LlmSize {
        width: w,
        vocab: c.vocab_size,
        params: params as u64,
        encoder: Some(stack(c.num_layers, 1)),
        decoder: stack(decoder_layers, 2),
    })
}

fn llama_size(
    vocab: usize,
    width: usize,
    layers: usize,
    [queries, keys]: [usize; 2],
    ffn: usize,
    tied: bool,
    heads: usize,
) -> LlmSize {
    let weights = 2 * width * queries + 2 * width * keys + 3 * width * ffn;
    let words = vocab * width * if tied { 1 } else { 2 };
    let params = words + layers * (weights + 2 * width) + width;
    let decoder = Stack { layers, weights, width: queries, mlp: ffn, heads };
    LlmSize { width, vocab, params: params as u64, encoder: None, decoder }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::RecipeFile;

    fn budget(recipe: &str) -> Budget {
        changed(recipe, &[])
    }

    fn changed(recipe: &str, changes: &[String]) -> Budget {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes").join(recipe);
        let file = RecipeFile::read(&path.with_extension("toml"), changes).unwrap();
        Budget::of(&file.runs()[0]).unwrap()
    }

    /// Matching is most of a pair's cost, so a quarter of the pairs is less than half of the whole.
    #[test]
    fn matching_fewer_pairs_costs_less() {
        let of = |pairs| changed("mini_stage1", &[format!("stage1.itm_pairs={pairs}")]);
        let (some, all) = (of(16), of(64));
        assert!(some.flops[1] < 0.7 * all.flops[1], "{} of {}", some.flops[1], all.flops[1]);
        assert!(some.activation_bytes < all.activation_bytes);
        assert_eq!(some.trained, all.trained);
    }

    /// Counted in LAVIS's models; the paper rounds them (Tables 1 and 2). The counts of stage 1 are made without `ln_vision`,
    /// which is trained as well.
    #[test]
    fn trained_parameters_are_the_published_models() {
        let expected = [
            ("stage1_vitl", 183_163_710),
            ("stage1_vitg", 186_702_654),
            ("stage2_vitl_opt2.7b.", 103_593_984),
            ("stage2_vitl_flant5xl", 103_200_256),
            ("stage2_vitg_opt2.7b.", 107_133_696),
            ("stage2_vitg_opt6.7b.", 108_314_880),
            ("stage2_vitg_flant5xl", 106_739_968),
            ("stage2_vitg_flant5xxl", 108_314_880),
        ];
        for (recipe, trained) in expected {
            let budget = budget(recipe);
            let apart = if budget.stage == 1 { budget.ln_vision } else { 0 };
            assert_eq!(budget.trained - apart, trained, "{recipe}");
        }
    }

    /// Counted in transformers' models; the image encoder without its last norm, which is the bridge's.
    #[test]
    fn frozen_parameters_are_the_published_models() {
        assert_eq!(budget("stage1_vitg").llm, 0);
        assert_eq!(budget("stage1_vitg").vision, 985_949_440);
        for (recipe, llm) in [
            ("stage2_vitg_opt2.7b.", 2_651_596_800),
            ("stage2_vitg_opt6.7b.", 6_658_473_984),
            ("stage2_vitg_flant5xl", 2_849_757_184),
            ("stage2_vitg_flant5xxl", 11_135_332_352),
        ] {
            assert_eq!(budget(recipe).llm, llm, "{recipe}");
        }
    }
}

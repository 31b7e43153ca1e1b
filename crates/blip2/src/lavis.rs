//! Checkpoints of LAVIS: what their tensors say, since they come without a configuration.
//!
//! ```text
//! blip2_pretrained*.pth, blip2_finetune*.pth   stage 1: everything trained; fine-tuned ones hold the image encoder, too
//! blip2_pretrained_opt*.pth, …_flant5*.pth     stage 2: ln_vision, queries, Q-Former, opt_proj or t5_proj
//! eva_vit_g.pth, clip_vit_L.pth                the frozen image encoder
//! ```
//!
//! The frozen parts are not in the first two: they come from files of their own.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use crate::qformer::QFormerConfig;
use crate::stage1::Stage1Config;
use crate::stage2::Stage2Config;
use crate::stored::Stored;
use crate::vit::VitConfig;
use crate::{Error, Result, checkpoint};

/// Epsilon of LAVIS's `ln_vision`.
const LN_VISION_EPS: f64 = 1e-5;
/// Longest text its stage 1 was trained with, in tokens.
pub const MAX_TEXT_LEN: usize = 32;
const VISION: &str = "visual_encoder.";

/// Tensors by name.
pub type Tensors = BTreeMap<String, Stored>;

/// Head counts, which tensors don't tell: `None` takes the published models' widths of a head.
#[derive(Debug, Clone, Copy, Default)]
pub struct HeadCounts {
    /// Of the image encoder; else heads of 88 (EVA-CLIP) or 64 (CLIP) features.
    pub vision: Option<usize>,
    /// Of the Q-Former; else heads of 64 features.
    pub qformer: Option<usize>,
}

/// What a checkpoint holds.
#[derive(Debug)]
pub enum Stage {
    /// Stage 1.
    One(Stage1Config),
    /// Stage 2, in front of an OPT or a T5.
    Two(Stage2Config),
}

/// A LAVIS checkpoint, its tensors under our names.
#[derive(Debug)]
pub struct Lavis {
    /// What it was trained for, with its shape.
    pub stage: Stage,
    /// The bridge.
    pub bridge: Tensors,
    /// The image encoder, if it was trained, too; under LAVIS's names, for [`vision`].
    pub vision: Option<Tensors>,
}

impl Lavis {
    /// Reads the tensors of a checkpoint; `path` is named in errors.
    ///
    /// # Errors
    /// If a tensor is unknown, or one that tells a shape is missing.
    pub fn new(tensors: Tensors, heads: HeadCounts, path: &Path) -> Result<Self> {
        let wrong = |err: &Error| Error::file(path, err.to_string());
        let (mut bridge, mut vision) = (Tensors::new(), Tensors::new());
        for (name, tensor) in tensors {
            match name.strip_prefix(VISION) {
                Some(rest) => vision.insert(rest.to_owned(), tensor),
                None => bridge.insert(name, tensor),
            };
        }
        let bridge = checkpoint::from_lavis(bridge).map_err(|err| wrong(&err))?;
        let stage = stage(&bridge, heads).map_err(|err| wrong(&err))?;
        Ok(Self { stage, bridge, vision: (!vision.is_empty()).then_some(vision) })
    }
}

fn stage(bridge: &Tensors, heads: HeadCounts) -> Result<Stage> {
    let qformer = qformer_config(bridge, heads)?;
    if bridge.contains_key("llm_proj.weight") {
        let llm_width = dims(bridge, "llm_proj.weight")?[0];
        return Ok(Stage::Two(Stage2Config {
            qformer,
            llm_width,
            ln_vision_eps: LN_VISION_EPS,
            reads_questions: false,
        }));
    }
    Ok(Stage::One(Stage1Config {
        embed_dim: dims(bridge, "vision_proj.weight")?[0],
        qformer,
        ln_vision_eps: LN_VISION_EPS,
        matching_only: false,
    }))
}

fn qformer_config(bridge: &Tensors, heads: HeadCounts) -> Result<QFormerConfig> {
    let queries = dims(bridge, "query_tokens")?;
    let &[1, num_queries, width] = queries.as_slice() else {
        return Err(Error::Weights(format!("query_tokens has shape {queries:?}")));
    };
    let layer = |i: usize, name: &str| format!("qformer.layers.{i}.{name}.weight");
    let depth = (0..).take_while(|i| bridge.contains_key(&layer(*i, "self_attn.q"))).count();
    let cross: Vec<usize> =
        (0..depth).filter(|i| bridge.contains_key(&layer(*i, "cross_attn.q"))).collect();
    // Layers 0, n, 2n, …: with one of them, n is anything beyond the depth.
    let cross_attention_freq = cross.get(1).copied().unwrap_or(depth.max(1));
    let text = |name: &str, absent: usize| {
        bridge.get(name).map_or(absent, |t| t.dims().first().copied().unwrap_or(absent))
    };
    Ok(QFormerConfig {
        width,
        depth,
        num_heads: head_count("the Q-Former", heads.qformer, width, 64)?,
        mlp_width: dims(bridge, &layer(0, "ffn_query.fc1"))?[0],
        cross_attention_freq,
        encoder_width: dims(bridge, "ln_vision.weight")?[0],
        num_queries,
        vocab_size: text("qformer.word_embeddings.weight", 30523),
        max_positions: text("qformer.position_embeddings.weight", 512),
        layer_norm_eps: 1e-12,
        dropout: 0.1,
    })
}

/// The image encoder of tensors under LAVIS's names (without `visual_encoder.`): an EVA-CLIP or a CLIP, told apart by what is
/// there. A file of the published widths may hold the last block and the head that BLIP-2 leaves out.
///
/// # Errors
/// If it is neither, or a tensor is unknown or of a strange shape.
pub fn vision(tensors: Tensors, heads: HeadCounts, path: &Path) -> Result<(VitConfig, Tensors)> {
    let made = if tensors.contains_key("patch_embed.proj.weight") {
        eva(tensors, heads)
    } else {
        let plain = |name: String| name.strip_prefix("visual.").map_or(name.clone(), str::to_owned);
        clip(tensors.into_iter().map(|(name, t)| (plain(name), t)).collect(), heads)
    };
    made.map_err(|err| Error::file(path, err.to_string()))
}

fn eva(tensors: Tensors, heads: HeadCounts) -> Result<(VitConfig, Tensors)> {
    let (width, patch_size) = patches(&tensors, "patch_embed.proj.weight")?;
    let published = VitConfig::eva_clip_g();
    let depth = depth(&tensors, "blocks.", (width == published.width).then_some(published.depth));
    let config = VitConfig {
        image_size: patch_size * grid(&tensors, "pos_embed")?,
        patch_size,
        width,
        depth,
        num_heads: head_count("the image encoder", heads.vision, width, 88)?,
        mlp_width: dims(&tensors, "blocks.0.mlp.fc1.weight")?[0],
        ..published
    };
    let mut ours = Tensors::new();
    for (name, tensor) in tensors {
        let (block, rest) = in_block(&name, "blocks.");
        match (block, rest) {
            (Some(i), _) if i >= depth => {}
            (Some(i), "attn.qkv.weight") => {
                split(&mut ours, &format!("blocks.{i}.attn"), "weight", &tensor, width);
            }
            (Some(i), "attn.q_bias") => {
                ours.insert(format!("blocks.{i}.attn.q.bias"), tensor);
                // EVA's keys have no bias; ours have one of zeros.
                let zeros = Tensor::zeros(width, DType::F32, &Device::Cpu)?;
                ours.insert(format!("blocks.{i}.attn.k.bias"), zeros.into());
            }
            (Some(i), "attn.v_bias") => {
                drop(ours.insert(format!("blocks.{i}.attn.v.bias"), tensor));
            }
            (Some(i), rest) => {
                drop(ours.insert(
                    format!("blocks.{i}.{}", rest.replace("attn.proj", "attn.out")),
                    tensor,
                ));
            }
            (None, "cls_token" | "pos_embed") => drop(ours.insert(name, tensor)),
            (None, "patch_embed.proj.weight") => {
                drop(ours.insert("patch_embed.weight".into(), flat(&tensor, width)));
            }
            (None, "patch_embed.proj.bias") => drop(ours.insert("patch_embed.bias".into(), tensor)),
            // The classifier's, which BLIP-2 has no place for.
            (None, rest)
                if ["norm.", "fc_norm.", "head.", "mask_token"]
                    .iter()
                    .any(|p| rest.starts_with(p)) => {}
            (None, _) => return Err(Error::Weights(format!("unexpected tensor {name}"))),
        }
    }
    Ok((config, ours))
}

fn clip(tensors: Tensors, heads: HeadCounts) -> Result<(VitConfig, Tensors)> {
    const PARTS: [(&str, &str); 4] =
        [("ln_1", "norm1"), ("ln_2", "norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")];
    const BLOCKS: &str = "transformer.resblocks.";
    let (width, patch_size) = patches(&tensors, "conv1.weight")?;
    let published = VitConfig::clip_l();
    let depth = depth(&tensors, BLOCKS, (width == published.width).then_some(published.depth));
    let config = VitConfig {
        image_size: patch_size * grid(&tensors, "positional_embedding")?,
        patch_size,
        width,
        depth,
        num_heads: head_count("the image encoder", heads.vision, width, 64)?,
        mlp_width: dims(&tensors, &format!("{BLOCKS}0.mlp.c_fc.weight"))?[0],
        ..published
    };
    let mut ours = Tensors::new();
    for (name, tensor) in tensors {
        let (block, rest) = in_block(&name, BLOCKS);
        match (block, rest) {
            (Some(i), _) if i >= depth => {}
            (Some(i), "attn.in_proj_weight") => {
                split(&mut ours, &format!("blocks.{i}.attn"), "weight", &tensor, width);
            }
            (Some(i), "attn.in_proj_bias") => {
                split(&mut ours, &format!("blocks.{i}.attn"), "bias", &tensor, width);
            }
            (Some(i), rest) => {
                let (part, kind) = rest.rsplit_once('.').unwrap_or((rest, ""));
                let part = match PARTS.iter().find(|(theirs, _)| *theirs == part) {
                    Some((_, ours)) => ours,
                    None if part == "attn.out_proj" => "attn.out",
                    None => return Err(Error::Weights(format!("unexpected tensor {name}"))),
                };
                ours.insert(format!("blocks.{i}.{part}.{kind}"), tensor);
            }
            (None, "class_embedding") => {
                drop(ours.insert("cls_token".into(), tensor.reshaped(&[1, 1, width])));
            }
            (None, "positional_embedding") => {
                let rows = tensor.dims().first().copied().unwrap_or(0);
                ours.insert("pos_embed".into(), tensor.reshaped(&[1, rows, width]));
            }
            (None, "conv1.weight") => {
                drop(ours.insert("patch_embed.weight".into(), flat(&tensor, width)));
            }
            (None, "ln_pre.weight" | "ln_pre.bias") => {
                drop(ours.insert(name.replace("ln_pre", "norm_pre"), tensor));
            }
            (None, "ln_post.weight" | "ln_post.bias" | "proj") => {}
            (None, _) => return Err(Error::Weights(format!("unexpected tensor {name}"))),
        }
    }
    Ok((config, ours))
}

/// The heads that were given, else as many of the published width as there are.
fn head_count(what: &str, given: Option<usize>, width: usize, head: usize) -> Result<usize> {
    let count = given.unwrap_or(if width.is_multiple_of(head) { width / head } else { 0 });
    if count == 0 || !width.is_multiple_of(count) {
        return Err(Error::Config(match given {
            Some(given) => format!("{what} is {width} wide, which {given} heads do not divide"),
            None => format!(
                "{what} is {width} wide, not a multiple of {head}: say how many heads it has"
            ),
        }));
    }
    Ok(count)
}

/// The block's number, and what follows; no number: the whole name.
fn in_block<'a>(name: &'a str, blocks: &str) -> (Option<usize>, &'a str) {
    let found = name.strip_prefix(blocks).and_then(|rest| rest.split_once('.'));
    match found.and_then(|(number, rest)| Some((number.parse().ok()?, rest))) {
        Some((number, rest)) => (Some(number), rest),
        None => (None, name),
    }
}

fn depth(tensors: &Tensors, blocks: &str, published: Option<usize>) -> usize {
    let numbers = tensors.keys().filter_map(|name| in_block(name, blocks).0);
    let found = numbers.max().map_or(0, |last| last.saturating_add(1));
    published.map_or(found, |published| published.min(found))
}

/// Takes a fused (3·w, …) projection apart.
fn split(ours: &mut Tensors, attn: &str, kind: &str, fused: &Stored, width: usize) {
    for (i, part) in ["q", "k", "v"].into_iter().enumerate() {
        ours.insert(format!("{attn}.{part}.{kind}"), fused.rows(i * width, width));
    }
}

fn flat(kernel: &Stored, width: usize) -> Stored {
    kernel.reshaped(&[width, kernel.dims().iter().skip(1).product()])
}

/// Width and patch size, of a (w, 3, p, p) kernel.
fn patches(tensors: &Tensors, name: &str) -> Result<(usize, usize)> {
    match dims(tensors, name)?.as_slice() {
        &[width, 3, p, q] if p == q && p > 0 && width > 0 => Ok((width, p)),
        other => Err(Error::Weights(format!("{name} has shape {other:?}, expected (w, 3, p, p)"))),
    }
}

/// Side of the square of patches that positions (…, 1 + n², w) are for.
fn grid(tensors: &Tensors, name: &str) -> Result<usize> {
    let dims = dims(tensors, name)?;
    let tokens = dims.len().checked_sub(2).map_or(0, |i| dims[i]);
    let side = tokens.saturating_sub(1).isqrt();
    if side == 0 || side * side + 1 != tokens {
        return Err(Error::Weights(format!(
            "{name} has shape {dims:?}: no class token and square"
        )));
    }
    Ok(side)
}

fn dims(tensors: &Tensors, name: &str) -> Result<Vec<usize>> {
    let dims = tensors.get(name).map(Stored::dims).filter(|dims| !dims.is_empty());
    dims.ok_or_else(|| Error::Weights(format!("no tensor {name}")))
}

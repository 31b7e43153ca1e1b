//! Weight names of other programs, mapped to ours by tables.
//!
//! A table row is (theirs, ours); `{}` stands for a layer number. Renaming is strict: a name that no row knows is
//! an error, unless a row says that it is left out (ours is empty).

use std::collections::BTreeMap;

use candle_core::Tensor;

use crate::{Error, Result};

/// One row: their name, our name or "" for "left out".
type Row = (&'static str, &'static str);

/// A BERT encoder, as `bert-base-uncased` names it (with or without a leading `bert.`).
const BERT: &[Row] = &[
    ("embeddings.word_embeddings.weight", "qformer.word_embeddings.weight"),
    ("embeddings.position_embeddings.weight", "qformer.position_embeddings.weight"),
    ("embeddings.LayerNorm", "qformer.embed_norm"),
    ("embeddings.token_type_embeddings.weight", ""),
    ("embeddings.position_ids", ""),
    ("encoder.layer.{}.attention.self.query", "qformer.layers.{}.self_attn.q"),
    ("encoder.layer.{}.attention.self.key", "qformer.layers.{}.self_attn.k"),
    ("encoder.layer.{}.attention.self.value", "qformer.layers.{}.self_attn.v"),
    ("encoder.layer.{}.attention.output.dense", "qformer.layers.{}.self_attn.out"),
    ("encoder.layer.{}.attention.output.LayerNorm", "qformer.layers.{}.self_attn_norm"),
    ("encoder.layer.{}.intermediate.dense", "qformer.layers.{}.ffn_text.fc1"),
    ("encoder.layer.{}.output.dense", "qformer.layers.{}.ffn_text.fc2"),
    ("encoder.layer.{}.output.LayerNorm", "qformer.layers.{}.ffn_text.norm"),
];

/// What a Q-Former has beyond BERT, as LAVIS names it behind `Qformer.bert.`.
const LAVIS_QFORMER: &[Row] = &[
    ("encoder.layer.{}.crossattention.self.query", "qformer.layers.{}.cross_attn.q"),
    ("encoder.layer.{}.crossattention.self.key", "qformer.layers.{}.cross_attn.k"),
    ("encoder.layer.{}.crossattention.self.value", "qformer.layers.{}.cross_attn.v"),
    ("encoder.layer.{}.crossattention.output.dense", "qformer.layers.{}.cross_attn.out"),
    ("encoder.layer.{}.crossattention.output.LayerNorm", "qformer.layers.{}.cross_attn_norm"),
    ("encoder.layer.{}.intermediate_query.dense", "qformer.layers.{}.ffn_query.fc1"),
    ("encoder.layer.{}.output_query.dense", "qformer.layers.{}.ffn_query.fc2"),
    ("encoder.layer.{}.output_query.LayerNorm", "qformer.layers.{}.ffn_query.norm"),
];

/// The rest of LAVIS's stage-1 and stage-2 models.
const LAVIS: &[Row] = &[
    ("query_tokens", "query_tokens"),
    ("temp", "temp"),
    ("ln_vision", "ln_vision"),
    ("vision_proj", "vision_proj"),
    ("text_proj", "text_proj"),
    ("itm_head", "itm_head"),
    ("opt_proj", "llm_proj"),
    ("t5_proj", "llm_proj"),
    ("Qformer.cls.predictions.bias", "qformer.lm_head.bias"),
    ("Qformer.cls.predictions.transform.dense", "qformer.lm_head.dense"),
    ("Qformer.cls.predictions.transform.LayerNorm", "qformer.lm_head.norm"),
    // Tied: the word embeddings and the bias above.
    ("Qformer.cls.predictions.decoder.weight", ""),
    ("Qformer.cls.predictions.decoder.bias", ""),
];

/// The image encoder of a Hugging Face BLIP-2, behind `vision_model.`; its fused `qkv` is taken apart before.
const HF_VISION: &[Row] = &[
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding", "patch_embed"),
    ("encoder.layers.{}.layer_norm1", "blocks.{}.norm1"),
    ("encoder.layers.{}.layer_norm2", "blocks.{}.norm2"),
    ("encoder.layers.{}.self_attn.q", "blocks.{}.attn.q"),
    ("encoder.layers.{}.self_attn.k", "blocks.{}.attn.k"),
    ("encoder.layers.{}.self_attn.v", "blocks.{}.attn.v"),
    ("encoder.layers.{}.self_attn.projection", "blocks.{}.attn.out"),
    ("encoder.layers.{}.mlp.fc1", "blocks.{}.mlp.fc1"),
    ("encoder.layers.{}.mlp.fc2", "blocks.{}.mlp.fc2"),
];

/// Its Q-Former, behind `qformer.`.
const HF_QFORMER: &[Row] = &[
    ("layernorm", "qformer.embed_norm"),
    ("encoder.layer.{}.attention.attention.query", "qformer.layers.{}.self_attn.q"),
    ("encoder.layer.{}.attention.attention.key", "qformer.layers.{}.self_attn.k"),
    ("encoder.layer.{}.attention.attention.value", "qformer.layers.{}.self_attn.v"),
    ("encoder.layer.{}.attention.output.dense", "qformer.layers.{}.self_attn.out"),
    ("encoder.layer.{}.attention.output.LayerNorm", "qformer.layers.{}.self_attn_norm"),
    ("encoder.layer.{}.crossattention.attention.query", "qformer.layers.{}.cross_attn.q"),
    ("encoder.layer.{}.crossattention.attention.key", "qformer.layers.{}.cross_attn.k"),
    ("encoder.layer.{}.crossattention.attention.value", "qformer.layers.{}.cross_attn.v"),
    ("encoder.layer.{}.crossattention.output.dense", "qformer.layers.{}.cross_attn.out"),
    ("encoder.layer.{}.crossattention.output.LayerNorm", "qformer.layers.{}.cross_attn_norm"),
    ("encoder.layer.{}.intermediate_query.dense", "qformer.layers.{}.ffn_query.fc1"),
    ("encoder.layer.{}.output_query.dense", "qformer.layers.{}.ffn_query.fc2"),
    ("encoder.layer.{}.output_query.LayerNorm", "qformer.layers.{}.ffn_query.norm"),
    ("encoder.layer.{}.intermediate.dense", "qformer.layers.{}.ffn_text.fc1"),
    ("encoder.layer.{}.output.dense", "qformer.layers.{}.ffn_text.fc2"),
    ("encoder.layer.{}.output.LayerNorm", "qformer.layers.{}.ffn_text.norm"),
];

/// What stands around it, in a model that generates and in one that matches.
const HF_BRIDGE: &[Row] = &[
    ("query_tokens", "query_tokens"),
    ("vision_model.post_layernorm", "ln_vision"),
    ("language_projection", "llm_proj"),
    ("embeddings.word_embeddings", "qformer.word_embeddings"),
    ("embeddings.position_embeddings", "qformer.position_embeddings"),
    ("embeddings.position_ids", ""),
    ("vision_projection", "vision_proj"),
    ("text_projection", "text_proj"),
    ("itm_head", "itm_head"),
];

/// An OPT, as transformers names it (with or without a leading `model.`).
const HF_OPT: &[Row] = &[
    ("decoder.embed_tokens", "embed_tokens"),
    ("decoder.embed_positions", "embed_positions"),
    ("decoder.project_in", "project_in"),
    ("decoder.project_out", "project_out"),
    ("decoder.layers.{}.self_attn.q_proj", "blocks.{}.attn.q"),
    ("decoder.layers.{}.self_attn.k_proj", "blocks.{}.attn.k"),
    ("decoder.layers.{}.self_attn.v_proj", "blocks.{}.attn.v"),
    ("decoder.layers.{}.self_attn.out_proj", "blocks.{}.attn.out"),
    ("decoder.layers.{}.self_attn_layer_norm", "blocks.{}.attn_norm"),
    ("decoder.layers.{}.fc1", "blocks.{}.mlp.fc1"),
    ("decoder.layers.{}.fc2", "blocks.{}.mlp.fc2"),
    ("decoder.layers.{}.final_layer_norm", "blocks.{}.mlp_norm"),
    ("decoder.final_layer_norm", "final_norm"),
    ("lm_head", "lm_head"),
];

/// A T5 v1.1, as transformers names it.
const HF_T5: &[Row] = &[
    ("shared", "words"),
    // The same table again.
    ("encoder.embed_tokens", ""),
    ("decoder.embed_tokens", ""),
    ("encoder.block.{}.layer.0.SelfAttention.q", "encoder.blocks.{}.attn.q"),
    ("encoder.block.{}.layer.0.SelfAttention.k", "encoder.blocks.{}.attn.k"),
    ("encoder.block.{}.layer.0.SelfAttention.v", "encoder.blocks.{}.attn.v"),
    ("encoder.block.{}.layer.0.SelfAttention.o", "encoder.blocks.{}.attn.out"),
    (
        "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias",
        "encoder.blocks.{}.relative_bias",
    ),
    ("encoder.block.{}.layer.0.layer_norm", "encoder.blocks.{}.attn_norm"),
    ("encoder.block.{}.layer.1.DenseReluDense.wi_0", "encoder.blocks.{}.ffn.gate"),
    ("encoder.block.{}.layer.1.DenseReluDense.wi_1", "encoder.blocks.{}.ffn.up"),
    ("encoder.block.{}.layer.1.DenseReluDense.wi", "encoder.blocks.{}.ffn.up"),
    ("encoder.block.{}.layer.1.DenseReluDense.wo", "encoder.blocks.{}.ffn.down"),
    ("encoder.block.{}.layer.1.layer_norm", "encoder.blocks.{}.ffn_norm"),
    ("encoder.final_layer_norm", "encoder.final_norm"),
    ("decoder.block.{}.layer.0.SelfAttention.q", "decoder.blocks.{}.attn.q"),
    ("decoder.block.{}.layer.0.SelfAttention.k", "decoder.blocks.{}.attn.k"),
    ("decoder.block.{}.layer.0.SelfAttention.v", "decoder.blocks.{}.attn.v"),
    ("decoder.block.{}.layer.0.SelfAttention.o", "decoder.blocks.{}.attn.out"),
    (
        "decoder.block.{}.layer.0.SelfAttention.relative_attention_bias",
        "decoder.blocks.{}.relative_bias",
    ),
    ("decoder.block.{}.layer.0.layer_norm", "decoder.blocks.{}.attn_norm"),
    ("decoder.block.{}.layer.1.EncDecAttention.q", "decoder.blocks.{}.cross.q"),
    ("decoder.block.{}.layer.1.EncDecAttention.k", "decoder.blocks.{}.cross.k"),
    ("decoder.block.{}.layer.1.EncDecAttention.v", "decoder.blocks.{}.cross.v"),
    ("decoder.block.{}.layer.1.EncDecAttention.o", "decoder.blocks.{}.cross.out"),
    ("decoder.block.{}.layer.1.layer_norm", "decoder.blocks.{}.cross_norm"),
    ("decoder.block.{}.layer.2.DenseReluDense.wi_0", "decoder.blocks.{}.ffn.gate"),
    ("decoder.block.{}.layer.2.DenseReluDense.wi_1", "decoder.blocks.{}.ffn.up"),
    ("decoder.block.{}.layer.2.DenseReluDense.wi", "decoder.blocks.{}.ffn.up"),
    ("decoder.block.{}.layer.2.DenseReluDense.wo", "decoder.blocks.{}.ffn.down"),
    ("decoder.block.{}.layer.2.layer_norm", "decoder.blocks.{}.ffn_norm"),
    ("decoder.final_layer_norm", "decoder.final_norm"),
    ("lm_head", "lm_head"),
];

/// Renames the tensors of a T5.
///
/// # Errors
/// If a tensor is none of T5's.
pub fn from_hf_t5<T>(tensors: BTreeMap<String, T>) -> Result<BTreeMap<String, T>> {
    rename(tensors, |name| look_up(HF_T5, name))
}

/// Renames the image encoder of a Hugging Face BLIP-2; names lack their leading `vision_model.`.
///
/// # Errors
/// If a tensor is none of the encoder's.
pub fn from_hf_vision<T>(tensors: BTreeMap<String, T>) -> Result<BTreeMap<String, T>> {
    rename(tensors, |name| look_up(HF_VISION, name))
}

/// Renames the bridge of a Hugging Face BLIP-2, which generates or matches.
///
/// # Errors
/// If a tensor is none of the bridge's.
pub fn from_hf_bridge<T>(tensors: BTreeMap<String, T>) -> Result<BTreeMap<String, T>> {
    rename(tensors, |name| match name.strip_prefix("qformer.") {
        Some(rest) => look_up(HF_QFORMER, rest),
        None => look_up(HF_BRIDGE, name),
    })
}

/// Renames the tensors of an OPT.
///
/// # Errors
/// If a tensor is none of OPT's.
pub fn from_hf_opt<T>(tensors: BTreeMap<String, T>) -> Result<BTreeMap<String, T>> {
    rename(tensors, |name| look_up(HF_OPT, name.strip_prefix("model.").unwrap_or(name)))
}

/// Renames a BERT encoder's tensors; pooler and pre-training heads are left out.
///
/// # Errors
/// If a tensor is none of BERT's.
pub fn from_bert(tensors: BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Tensor>> {
    rename(tensors, |name| {
        let name = name.strip_prefix("bert.").unwrap_or(name);
        if name.starts_with("pooler.") || name.starts_with("cls.") {
            return Some(String::new());
        }
        // The first BERTs, still so on the hub.
        let name = match name.rsplit_once('.') {
            Some((norm, "gamma")) => format!("{norm}.weight"),
            Some((norm, "beta")) => format!("{norm}.bias"),
            _ => name.to_owned(),
        };
        look_up(BERT, &name)
    })
}

/// Renames the trained parts of a LAVIS checkpoint (no image encoder). A run of LAVIS saves what it trains by the names of
/// its parameters, and of a tied one's names only the first counts: single tensors of the frozen language model are left
/// in its files. They are passed over.
///
/// # Errors
/// If a tensor is none of LAVIS's.
pub fn from_lavis<T>(tensors: BTreeMap<String, T>) -> Result<BTreeMap<String, T>> {
    rename(tensors, |name| match name.strip_prefix("Qformer.bert.") {
        Some(rest) => look_up(BERT, rest).or_else(|| look_up(LAVIS_QFORMER, rest)),
        None if name.starts_with("opt_model.") || name.starts_with("t5_model.") => {
            Some(String::new())
        }
        None => look_up(LAVIS, name),
    })
}

/// Under which name a Hugging Face BLIP-2 keeps our bridge's tensor called `name`; `None`: it has no place for it.
#[must_use]
pub fn to_hf_bridge(name: &str) -> Option<String> {
    look_up_ours(HF_BRIDGE, name)
        .or_else(|| look_up_ours(HF_QFORMER, name).map(|theirs| format!("qformer.{theirs}")))
}

/// Under which name a Hugging Face BLIP-2 keeps our image encoder's tensor called `name`. Its queries, keys and values are
/// rows of one tensor there, which is the caller's to put together.
#[must_use]
pub fn to_hf_vision(name: &str) -> Option<String> {
    look_up_ours(HF_VISION, name).map(|theirs| format!("vision_model.{theirs}"))
}

fn look_up_ours(table: &[Row], name: &str) -> Option<String> {
    let inverse: Vec<Row> = table.iter().map(|(theirs, ours)| (*ours, *theirs)).collect();
    look_up(&inverse, name).filter(|theirs| !theirs.is_empty())
}

fn rename<T>(
    tensors: BTreeMap<String, T>,
    new_name: impl Fn(&str) -> Option<String>,
) -> Result<BTreeMap<String, T>> {
    let mut renamed = BTreeMap::new();
    let mut unknown = Vec::new();
    for (name, tensor) in tensors {
        match new_name(&name) {
            Some(ours) if ours.is_empty() => {}
            Some(ours) => {
                renamed.insert(ours, tensor);
            }
            None => unknown.push(name),
        }
    }
    if unknown.is_empty() {
        Ok(renamed)
    } else {
        Err(Error::Weights(format!("unexpected tensors {unknown:?}")))
    }
}

/// A row names a tensor, or a module whose `weight` and `bias` follow.
fn look_up(table: &[Row], name: &str) -> Option<String> {
    let named = table.iter().filter(|(theirs, _)| !theirs.is_empty());
    named.into_iter().find_map(|(theirs, ours)| {
        let (number, rest) = match theirs.split_once("{}") {
            None => ("", name.strip_prefix(theirs)?),
            Some((before, after)) => {
                let behind = name.strip_prefix(before)?;
                let digits = behind.bytes().take_while(u8::is_ascii_digit).count();
                let (number, behind) = behind.split_at(digits);
                (number, behind.strip_prefix(after)?)
            }
        };
        if !matches!(rest, "" | ".weight" | ".bias") {
            return None;
        }
        if ours.is_empty() {
            return Some(String::new());
        }
        Some(ours.replacen("{}", number, 1) + rest)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_looked_up_whole() {
        let found = |name| look_up(LAVIS_QFORMER, name).or_else(|| look_up(BERT, name));
        assert_eq!(
            found("encoder.layer.10.crossattention.self.key.bias").as_deref(),
            Some("qformer.layers.10.cross_attn.k.bias")
        );
        assert_eq!(
            found("embeddings.LayerNorm.weight").as_deref(),
            Some("qformer.embed_norm.weight")
        );
        assert_eq!(found("embeddings.position_ids").as_deref(), Some(""));
        assert_eq!(found("encoder.layer.1.attention.self.query_weight"), None);
    }

    /// The norms of bert-base-uncased, and what a run of LAVIS leaves of a tied head.
    #[test]
    fn old_names_and_remains_are_known() {
        let one = |name: &str| {
            let zero =
                Tensor::zeros(1, candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
            BTreeMap::from([(name.to_owned(), zero)])
        };
        let names = |found: BTreeMap<String, Tensor>| found.into_keys().collect::<Vec<_>>();
        let found = from_bert(one("bert.encoder.layer.1.output.LayerNorm.gamma")).unwrap();
        assert_eq!(names(found), ["qformer.layers.1.ffn_text.norm.weight"]);
        let found = from_bert(one("bert.embeddings.LayerNorm.beta")).unwrap();
        assert_eq!(names(found), ["qformer.embed_norm.bias"]);
        assert!(from_lavis(one("opt_model.lm_head.weight")).unwrap().is_empty());
        assert!(from_lavis(one("llm.lm_head.weight")).is_err());
    }
}

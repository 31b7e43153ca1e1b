//! Stage 2's sequence, loss and gradients against LAVIS (golden/stage2.py), with and without a prompt.

#![expect(clippy::unwrap_used, reason = "a test that can't go on should stop")]

mod common;

use std::path::Path;

use blip2::checkpoint::from_lavis;
use blip2::llama::{Llama, LlamaConfig};
use blip2::llm::Llm;
use blip2::params::ParamStore;
use blip2::stage2::{Stage2, Stage2Config};
use blip2_ops::{Dropout, WeightFormat};
use blip2_train::init::in_stage2;
use blip2_train::steps::{LlmText, stage2};
use candle_core::backprop::GradStore;
use candle_core::{DType, IndexOp as _, Tensor};
use common::{Tensors, assert_close, config, golden, numbers, weights};

fn llm() -> Llm {
    let json = serde_json::json!({
        "model_type": "llama", "vocab_size": 67, "hidden_size": 40, "intermediate_size": 56,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2,
    });
    let config = LlamaConfig::from_hf(&json.to_string()).unwrap();
    let tensors = golden("llama_tiny.safetensors")
        .into_iter()
        .filter_map(|(name, tensor)| Some((name.strip_prefix("small.")?.to_owned(), tensor)))
        .collect();
    Llm::Llama(Llama::from_hf(config, &tensors, WeightFormat::F32).unwrap())
}

fn bridge(golden: &Tensors) -> (ParamStore, Stage2) {
    bridge_of(golden, 40)
}

fn bridge_of(golden: &Tensors, llm_width: usize) -> (ParamStore, Stage2) {
    let mut tensors = weights();
    tensors.retain(|name, _| in_stage2(name));
    for name in ["llm_proj.weight", "llm_proj.bias"] {
        tensors.insert(name.into(), golden[name].clone());
    }
    let store = ParamStore::new(tensors).unwrap();
    let config = Stage2Config {
        qformer: config().qformer,
        llm_width,
        ln_vision_eps: config().ln_vision_eps,
        reads_questions: false,
    };
    let model = store.build(|p| Stage2::new(p, &config)).unwrap();
    (store, model)
}

/// The texts as rows of ids without padding; the first `prompt_len` ids of each are given.
fn texts(golden: &Tensors, case: &str, queries: usize, prompt_len: usize) -> Vec<Vec<LlmText>> {
    let rows = |name: &str| {
        golden[&format!("{case}.{name}")].to_dtype(DType::U32).unwrap().to_vec2::<u32>().unwrap()
    };
    let row = |(ids, mask): (Vec<u32>, Vec<u32>)| {
        let real = mask[queries..].iter().filter(|m| **m == 1).count();
        vec![LlmText { ids: ids[..real].to_vec(), prompt_len, question: Vec::new() }]
    };
    rows("ids").into_iter().zip(rows("mask")).map(row).collect()
}

#[test]
fn loss_and_every_gradient_equal_lavis() {
    let golden = golden("stage2.safetensors");
    let (store, model) = bridge(&golden);
    let llm = llm();
    // The prompt of two words and the start token are given; without a prompt, even the start token is predicted.
    for (case, prompt_len) in [("plain", 0), ("prompt", 3)] {
        let texts = texts(&golden, case, 5, prompt_len);
        let loss = stage2(&model, &llm, &golden["image"], &texts, &Dropout::off()).unwrap();
        assert_close(&format!("{case} loss"), &loss, &golden[&format!("{case}.loss")], 1e-4);

        let prefix = format!("{case}.grad.");
        assert_gradients(&golden, &prefix, &store, &loss.backward().unwrap());
    }
}

/// Every trained parameter has the gradient that `golden` holds under `prefix` and LAVIS's name.
fn assert_gradients(golden: &Tensors, prefix: &str, store: &ParamStore, grads: &GradStore) {
    let theirs = golden.iter().filter_map(|(name, grad)| Some((name.strip_prefix(prefix)?, grad)));
    let (ours, theirs): (Tensors, Tensors) = theirs
        .map(|(name, grad)| (name.to_owned(), grad.clone()))
        .partition(|(name, _)| name.starts_with("llm_proj."));
    let mut expected = from_lavis(theirs).unwrap();
    expected.extend(ours);
    assert_eq!(expected.len(), store.vars().count());
    for (name, var) in store.vars() {
        let grad: &Tensor = grads.get(var).unwrap_or_else(|| panic!("{name} got no gradient"));
        if name.ends_with("attn.k.bias") {
            // Analytically zero: it shifts every score of a row alike.
            assert!(numbers(grad).iter().all(|g| g.abs() < 1e-5), "{name} is not zero");
            continue;
        }
        assert!(numbers(grad).iter().any(|g| *g != 0.0), "{name} got a zero gradient");
        assert_close(&format!("{prefix}{name}"), grad, &expected[name], 1e-3);
    }
}

/// Texts of one picture that share its queries give the loss and the gradients of one row per text.
#[test]
fn texts_that_share_a_picture_are_as_if_each_stood_alone() {
    let golden = golden("stage2.safetensors");
    let (store, model) = bridge(&golden);
    let llm = llm();
    let one = |case, prompt_len| texts(&golden, case, 5, prompt_len);
    // Three texts for one picture, one for the other: with a prompt and without, and of different lengths.
    let (plain, prompted) = (one("plain", 0), one("prompt", 3));
    let shared = vec![[&plain[0][..], &prompted[1], &plain[1]].concat(), prompted[0].clone()];
    let alone: Vec<Vec<LlmText>> = shared.iter().flatten().map(|text| vec![text.clone()]).collect();
    let image = golden["image"].i(..2).unwrap();
    let rows = Tensor::new(&[0u32, 0, 0, 1], image.device()).unwrap();
    let repeated = image.index_select(&rows, 0).unwrap();

    let run = |image: &Tensor, texts: &[Vec<LlmText>]| {
        let loss = stage2(&model, &llm, image, texts, &Dropout::off()).unwrap();
        let grads = loss.backward().unwrap();
        (loss, grads)
    };
    let (loss, grads) = run(&image, &shared);
    let (loss_alone, grads_alone) = run(&repeated, &alone);
    assert_close("loss", &loss, &loss_alone, 1e-5);
    for (name, var) in store.vars().filter(|(name, _)| !name.ends_with("attn.k.bias")) {
        assert_close(name, grads.get(var).unwrap(), grads_alone.get(var).unwrap(), 1e-4);
    }
}

#[test]
fn every_picture_wants_its_texts() {
    let golden = golden("stage2.safetensors");
    let (_, model) = bridge(&golden);
    let pictures = golden["image"].dim(0).unwrap();
    let texts = texts(&golden, "plain", 5, 0);
    for wrong in [[&texts[..], &texts[..1]].concat(), texts[1..].to_vec()] {
        let refusal = stage2(&model, &llm(), &golden["image"], &wrong, &Dropout::off());
        let refusal = refusal.unwrap_err().to_string();
        assert!(refusal.contains(&format!("{} pictures for {pictures}", wrong.len())), "{refusal}");
    }
}

/// LAVIS's Blip2T5 (golden/stage2_t5.py): texts given to the encoder and texts that the decoder writes, of many lengths.
#[test]
fn loss_and_every_gradient_through_an_encoder_decoder_equal_lavis() {
    let golden = golden("stage2_t5.safetensors");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/lavis/t5");
    let (llm, _) = Llm::open(&folder, None).unwrap();
    let (store, model) = bridge_of(&golden, llm.width());
    let ids = |name: &str| {
        golden[name].to_dtype(DType::U32).unwrap().to_vec2::<u32>().unwrap().into_iter().map(
            |row| {
                let end = row.iter().position(|id| *id == 1).unwrap();
                row[..=end].to_vec()
            },
        )
    };
    let texts: Vec<_> = ids("given.ids")
        .zip(ids("wanted.ids"))
        .map(|(given, wanted)| {
            vec![LlmText {
                prompt_len: given.len(),
                ids: [given, wanted].concat(),
                question: Vec::new(),
            }]
        })
        .collect();
    let loss = stage2(&model, &llm, &golden["image"], &texts, &Dropout::off()).unwrap();
    assert_close("loss", &loss, &golden["loss"], 1e-4);
    assert_gradients(&golden, "grad.", &store, &loss.backward().unwrap());
}

//! The Q-Former's passes and stage 1's losses, gradients and first ten steps, against LAVIS (golden/{qformer,stage1,
//! stage1_curve}.py): odd sizes, cross-attention every third layer, five queries.

#![allow(clippy::unwrap_used, reason = "helpers of tests, too, are tests")]
#![expect(clippy::unwrap_used, reason = "a test that can't go on should stop")]

mod common;

use std::sync::Arc;

use blip2::checkpoint::from_lavis;
use blip2::params::{ParamStore, Params};
use blip2::stage1::{Stage1, similarity};
use blip2_ops::{Communicator, Dropout, SingleProcess, WeightFormat};
use blip2_train::optim::{AdamW, AdamWConfig, Gradients};
use blip2_train::rng::Rng;
use blip2_train::steps::{
    Negatives, Stage1Batch, Stage1Losses, StepContext, Texts, stage1, stage1_with,
};
use candle_core::{DType, Tensor};
use common::{Tensors, assert_close, config, golden, numbers, weights};

/// The tiny model, not to be trained.
fn model() -> Stage1 {
    Params::build(weights(), WeightFormat::F32, "blip2_tiny", |p| Stage1::new(p, &config()))
        .unwrap()
}

fn texts(golden: &Tensors, prefix: &str) -> Texts {
    let ids = golden[&format!("{prefix}ids")].to_dtype(DType::U32).unwrap();
    let tokens = golden[&format!("{prefix}mask")].to_dtype(DType::U8).unwrap();
    Texts { ids, tokens }
}

/// Rows of real tokens only: what stands at padding means nothing.
fn real_rows(hidden: &Tensor, tokens: &Tensor) -> Tensor {
    let rows: Vec<u32> = numbers(tokens)
        .iter()
        .enumerate()
        .filter(|(_, m)| **m > 0.0)
        .map(|(i, _)| i as u32)
        .collect();
    hidden
        .flatten(0, 1)
        .unwrap()
        .index_select(&Tensor::new(rows, hidden.device()).unwrap(), 0)
        .unwrap()
}

#[test]
fn the_three_passes_of_the_qformer_equal_lavis() {
    let golden = golden("qformer.safetensors");
    let model = model();
    let off = Dropout::off();
    let Texts { ids, tokens } = texts(&golden, "");

    let image = model.image(&golden["image"], &off).unwrap();
    assert_close("queries", &image.queries, &golden["query.hidden.4"], 1e-4);
    assert_close("image features", &image.embeds, &golden["image_features"], 1e-4);

    let text = model.qformer().text(&ids, &tokens, &off).unwrap();
    assert_close(
        "text",
        &real_rows(&text, &tokens),
        &real_rows(&golden["text.hidden.4"], &tokens),
        1e-4,
    );
    let features = model.text(&ids, &tokens, &off).unwrap();
    assert_close("text features", &features, &golden["text_features"], 1e-4);

    let pair = model.qformer().pair(&image.picture, &ids, &tokens, &off).unwrap();
    assert_close("pair", &pair, &golden["joint.hidden.4"].narrow(1, 0, 5).unwrap(), 1e-4);
    let logits = model.itm(&image.picture, &ids, &tokens, &off).unwrap();
    assert_close("itm logits", &logits, &golden["itm.logits"], 1e-4);

    let itg_ids = golden["itg_inputs"].to_dtype(DType::U32).unwrap();
    let hidden = model.itg(&image.caches, &itg_ids, &tokens, &off).unwrap();
    assert_close(
        "itg",
        &real_rows(&hidden, &tokens),
        &real_rows(&golden["itg.hidden.4"], &tokens),
        1e-4,
    );
    let logits = model.qformer().lm_logits(&hidden).unwrap();
    assert_close(
        "itg logits",
        &real_rows(&logits, &tokens),
        &real_rows(&golden["itg.logits"], &tokens),
        1e-4,
    );
}

fn draws(golden: &Tensors, row: Option<usize>) -> Negatives {
    let draw = |name: &str| {
        let all = golden[name].to_dtype(DType::U32).unwrap();
        row.map_or(all.clone(), |row| all.get(row).unwrap()).to_vec1::<u32>().unwrap()
    };
    Negatives { images: draw("draws_image"), texts: draw("draws_text") }
}

fn losses(
    model: &Stage1,
    image: &Tensor,
    texts: &Texts,
    image_ids: Option<&[i64]>,
    negatives: Negatives,
) -> Stage1Losses {
    losses_of(model, image, texts, image_ids, negatives, None)
}

fn losses_of(
    model: &Stage1,
    image: &Tensor,
    texts: &Texts,
    image_ids: Option<&[i64]>,
    negatives: Negatives,
    itm_pairs: Option<usize>,
) -> Stage1Losses {
    let ranks: Arc<dyn Communicator> = Arc::new(SingleProcess);
    let off = Dropout::off();
    let rng = Rng::new(0, &[]);
    let mut context = StepContext { dropout: &off, smoothing: 0.1, itm_pairs, rng, ranks: &ranks };
    let batch = Stage1Batch { patches: image, texts, image_ids };
    stage1_with(model, &batch, &mut context, |_, _, _, _| Ok(negatives)).unwrap()
}

#[test]
fn stage_1_losses_and_every_gradient_equal_lavis() {
    let golden = golden("stage1.safetensors");
    let store = ParamStore::new(weights()).unwrap();
    let model = store.build(|p| Stage1::new(p, &config())).unwrap();
    let texts = texts(&golden, "");

    let found = losses(&model, &golden["image"], &texts, None, draws(&golden, None));
    for (name, loss) in [
        ("loss", &found.total),
        ("loss_itc", &found.itc),
        ("loss_itm", &found.itm),
        ("loss_lm", &found.itg),
    ] {
        assert_close(name, loss, &golden[name], 1e-4);
    }

    let grads = found.total.backward().unwrap();
    let expected: Tensors = golden
        .iter()
        .filter_map(|(name, tensor)| Some((name.strip_prefix("grad.")?.to_owned(), tensor.clone())))
        .collect();
    let expected = from_lavis(expected).unwrap();
    assert_eq!(expected.len(), store.vars().count());
    for (name, var) in store.vars() {
        let grad = grads.get(var).unwrap_or_else(|| panic!("{name} got no gradient"));
        // The bias of attention's keys shifts every score alike: its true gradient is zero, and both sides hold noise.
        if name.ends_with("attn.k.bias") {
            assert!(numbers(grad).iter().all(|g| g.abs() < 1e-5), "{name} is not zero");
            continue;
        }
        assert!(numbers(grad).iter().any(|g| *g != 0.0), "{name} got a zero gradient");
        assert_close(&format!("gradient of {name}"), grad, &expected[name], 1e-3);
    }
}

#[test]
fn matching_learns_from_as_many_pairs_as_it_is_told() {
    let golden = golden("stage1.safetensors");
    let model = model();
    let texts = texts(&golden, "");
    let with = |pairs| {
        let draws = draws(&golden, None);
        let found = losses_of(&model, &golden["image"], &texts, None, draws, pairs);
        [&found.itc, &found.itg, &found.itm].map(|loss| loss.to_scalar::<f32>().unwrap())
    };
    let all = with(None);
    assert_eq!(with(Some(100)), all, "no more than there are");

    let some = with(Some(2));
    assert_eq!(some[..2], all[..2], "the other losses don't care");
    // The first two pairs, then each with its wrong picture, then each with its wrong text.
    let Negatives { images, texts: others } = draws(&golden, None);
    let pictures = [0, 1, images[0], images[1], 0, 1];
    let rows = Tensor::new(&[0, 1, 0, 1, others[0], others[1]], golden["image"].device()).unwrap();
    let picture = model.image(&golden["image"], &Dropout::off()).unwrap().picture;
    let of = |tensor: &Tensor| tensor.index_select(&rows, 0).unwrap();
    let (ids, tokens) = (of(&texts.ids), of(&texts.tokens));
    let logits =
        model.itm(&picture.select(&pictures).unwrap(), &ids, &tokens, &Dropout::off()).unwrap();
    let expected = blip2_train::losses::itm(&logits).unwrap().to_scalar::<f32>().unwrap();
    assert!((some[2] - expected).abs() < 1e-5, "{} instead of {expected}", some[2]);
    assert!((all[2] - expected).abs() > 1e-3, "the other pairs count for something");
}

#[test]
fn similarities_and_shared_pictures_equal_lavis() {
    let golden = golden("stage1.safetensors");
    let model = model();
    let (off, texts) = (Dropout::off(), texts(&golden, ""));
    let image = model.image(&golden["image"], &off).unwrap();
    let text = model.text(&texts.ids, &texts.tokens, &off).unwrap();
    let sim =
        similarity(&image.embeds, &text).unwrap().broadcast_div(model.temp().unwrap()).unwrap();
    assert_close("sim_i2t", &sim, &golden["sim_i2t"], 1e-4);
    assert_close("sim_t2i", &sim.t().unwrap(), &golden["sim_t2i"], 1e-4);

    let ids = golden["image_id"].to_vec1::<i64>().unwrap();
    let draw = |name: &str| golden[name].to_dtype(DType::U32).unwrap().to_vec1::<u32>().unwrap();
    let negatives =
        Negatives { images: draw("image_id.draws_image"), texts: draw("image_id.draws_text") };
    let found = losses(&model, &golden["image"], &texts, Some(&ids), negatives);
    for (name, loss) in [
        ("loss", &found.total),
        ("loss_itc", &found.itc),
        ("loss_itm", &found.itm),
        ("loss_lm", &found.itg),
    ] {
        assert_close(name, loss, &golden[&format!("image_id.{name}")], 1e-4);
    }
}

#[test]
fn pairs_of_one_picture_have_nothing_to_tell_apart() {
    let golden = golden("stage1.safetensors");
    let model = model();
    let (off, texts) = (Dropout::off(), texts(&golden, ""));
    let ranks: Arc<dyn Communicator> = Arc::new(SingleProcess);
    let run = |ids: &[i64]| {
        let rng = Rng::new(0, &[]);
        let context =
            StepContext { dropout: &off, smoothing: 0.1, itm_pairs: None, rng, ranks: &ranks };
        let batch = Stage1Batch { patches: &golden["image"], texts: &texts, image_ids: Some(ids) };
        stage1(&model, &batch, context).unwrap()
    };
    let mut ids = vec![7; golden["image"].dim(0).unwrap()];
    assert!(run(&ids).is_none());
    // One other picture is enough for all: it is everybody's negative.
    ids[1] = 8;
    assert!(run(&ids).unwrap().total.to_scalar::<f32>().unwrap().is_finite());
}

#[test]
fn ten_steps_of_stage_1_equal_lavis() {
    let golden = golden("stage1_curve.safetensors");
    let store = ParamStore::new(weights()).unwrap();
    let model = store.build(|p| Stage1::new(p, &config())).unwrap();
    let config =
        AdamWConfig { betas: [0.9, 0.98], eps: 1e-8, weight_decay: 0.05, layer_decay: 1.0 };
    let mut optimizer = AdamW::new(&store, config);
    let mut gradients = Gradients::new(&store).unwrap();
    let expected = golden["losses"].to_vec2::<f32>().unwrap();
    for (step, expected) in expected.iter().enumerate() {
        let prefix = format!("batch.{}.", step % 4);
        let batch = texts(&golden, &prefix);
        let image = &golden[&format!("{prefix}image")];
        let found = losses(&model, image, &batch, None, draws(&golden, Some(step)));
        for (loss, expected) in
            [&found.total, &found.itc, &found.itm, &found.itg].into_iter().zip(expected)
        {
            let loss = loss.to_scalar::<f32>().unwrap();
            assert!(
                (loss - expected).abs() <= 1e-4 * expected.abs(),
                "step {step}: {loss} instead of {expected}"
            );
        }
        gradients.clear();
        let grads = gradients.collect(1.0, || found.total.backward().unwrap());
        gradients.add(&store, &grads, 1.0).unwrap();
        optimizer.step(&store, &gradients, 1e-3, 1.0).unwrap();
    }
    let norms: Tensors = golden
        .iter()
        .filter_map(|(name, norm)| Some((name.strip_prefix("norm.")?.to_owned(), norm.clone())))
        .collect();
    for (name, norm) in from_lavis(norms).unwrap() {
        let found = numbers(store.get(&name).unwrap().as_tensor())
            .iter()
            .map(|x| x * x)
            .sum::<f32>()
            .sqrt();
        let expected = norm.to_scalar::<f32>().unwrap();
        assert!(
            (found - expected).abs() <= 1e-4 * expected.max(1e-3),
            "{name}: norm {found} instead of {expected}"
        );
    }
}

//! An image encoder that is trained with the bridge: its gradients, both stages from end to end, and what becomes of it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use blip2::generate::Options;
use blip2::image::Rgb;
use blip2::lavis::{self, HeadCounts};
use blip2::model::Model;
use blip2::params::{ParamStore, read_file};
use blip2::shards;
use blip2::vit::Vit;
use blip2_train::Result;
use blip2_train::data::mini::{MiniConfig, build};
use blip2_train::log::StepRecord;
use blip2_train::optim::{Gradients, lr_scale};
use blip2_train::recipe::{Recipe, RecipeFile};
use blip2_train::tasks::{Session, Trained, train_recipe};
use blip2_train::trainer::{Monitor, Outcome, Resume, Start};
use candle_core::{Tensor, Var};
use common::{assert_close, golden};

/// EVA and CLIP as LAVIS has them, tiny: block by block the gradients are those of the whole graph.
#[test]
fn gradients_block_by_block_are_those_of_the_whole_graph() {
    let pixels = golden("lavis_files.safetensors")["pixels"].clone();
    for name in ["eva", "clip"] {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../golden/lavis/{name}.pth"));
        let heads = HeadCounts { vision: Some(2), qformer: None };
        let (config, stored) =
            lavis::vision(shards::open_file(&path).unwrap(), heads, &path).unwrap();
        let tensors: BTreeMap<String, Tensor> =
            stored.into_iter().map(|(name, tensor)| (name, tensor.load().unwrap())).collect();
        let store = ParamStore::new(tensors).unwrap();
        let vit = store.build(|p| Vit::new(p, &config)).unwrap();

        let whole = vit.forward(&pixels).unwrap();
        let weights = (whole.detach() * 0.3).unwrap().sin().unwrap();
        let expected = (&whole * &weights).unwrap().sum_all().unwrap().backward().unwrap();

        let (features, _) = vit.forward_taped(&pixels).unwrap();
        assert_close(name, &features, &whole, 1e-6);
        let by_blocks = || {
            let (features, tape) = vit.forward_taped(&pixels).unwrap();
            let leaf = Var::from_tensor(&features).unwrap();
            let mut grads =
                (leaf.as_tensor() * &weights).unwrap().sum_all().unwrap().backward().unwrap();
            let grad = grads.remove(leaf.as_tensor()).unwrap();
            vit.backward_taped(tape, &grad, &mut |more| Ok(grads.extend(more)?)).unwrap();
            grads
        };
        let grads = by_blocks();
        for (parameter, var) in store.vars().filter(|(name, _)| !name.ends_with("attn.k.bias")) {
            let what = format!("{name}: gradient of {parameter}");
            assert_close(&what, grads.get(var).unwrap(), expected.get(var).unwrap(), 1e-4);
        }

        // As the trainer does it.
        let mut flat = Gradients::new(&store).unwrap();
        let grads = flat.collect(1.0, by_blocks);
        flat.add(&store, &grads, 1.0).unwrap();
        let mut start = 0;
        for (parameter, var) in store.vars() {
            let collected = flat.flat().narrow(0, start, var.elem_count()).unwrap();
            start += var.elem_count();
            if !parameter.ends_with("attn.k.bias") {
                let expected = expected.get(var).unwrap().flatten_all().unwrap();
                assert_close(
                    &format!("{name}: {parameter}, collected"),
                    &collected,
                    &expected,
                    1e-4,
                );
            }
        }
    }
}

#[test]
fn layers_learn_slower_the_further_they_are_from_the_bridge() {
    let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
    close(lr_scale("vision.blocks.38.mlp.fc1.weight", 39, 0.95), 0.95);
    close(lr_scale("vision.blocks.0.norm1.bias", 39, 0.95), 0.95f64.powi(39));
    close(lr_scale("vision.pos_embed", 39, 0.95), 0.95f64.powi(40));
    close(lr_scale("vision.patch_embed.weight", 39, 1.0), 1.0);
    close(lr_scale("qformer.layers.0.self_attn.q.weight", 39, 0.95), 1.0);
}

struct Silent;

impl Monitor for Silent {
    fn start(&mut self, _: &Start) -> Result<()> {
        Ok(())
    }

    fn step(&mut self, _: &StepRecord, _: f64) -> Result<()> {
        Ok(())
    }

    fn note(&mut self, _: &str) {}
}

/// The tiny recipe with one stage, pictures encoded in every step, the encoder trained.
fn recipe(root: &Path, stage: u32, changes: &[String]) -> RecipeFile {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/tiny_cpu.toml");
    let text = std::fs::read_to_string(path).unwrap();
    let place = |section: &str| text.find(section).unwrap();
    let (one, two, end) = (place("\n[stage1]"), place("\n[stage2]"), place("\n[runtime]"));
    let text = match stage {
        1 => text[..two].to_owned() + &text[end..],
        _ => text[..one].to_owned() + &text[two..],
    };
    let root = root.display();
    let mut all = vec![
        format!("data.dir=\"{root}/data\""),
        "features.views=0".into(),
        format!("stage{stage}.train_vision=true"),
        format!("stage{stage}.train.batch_size=4"),
        format!("stage{stage}.train.steps=6"),
        format!("stage{stage}.optimizer.warmup_steps=1"),
        format!("stage{stage}.optimizer.layer_decay=0.5"),
        "runtime.checkpoint_every=2".into(),
    ];
    all.extend_from_slice(changes);
    RecipeFile::parse(&text, &all).unwrap()
}

fn run(file: &RecipeFile, dir: &Path) -> String {
    let mut session = Session {
        dir,
        resume: Resume::Yes,
        stop: &AtomicBool::new(false),
        download: &mut |_, _, _| {},
        encoding: &mut |_, _| {},
        monitor: &mut |_, _: &Path, _: &Recipe| -> Box<dyn Monitor> { Box::new(Silent) },
    };
    let Trained::Finished { stages, .. } = train_recipe(file, &mut session).unwrap() else {
        panic!("not finished")
    };
    match &stages[0].1 {
        Outcome::Finished { sha256, .. } => sha256.clone(),
        Outcome::Stopped { step } => panic!("stopped at {step}"),
    }
}

/// Every tensor of the encoder in `after` is another than in `before`.
fn assert_trained(before: &Path, after: &Path) {
    let (before, after) = (read_file(before).unwrap(), read_file(after).unwrap());
    assert_eq!(before.len(), after.len());
    for (name, tensor) in &before {
        let moved = (tensor - &after[name]).unwrap().abs().unwrap().max_all().unwrap();
        assert!(moved.to_scalar::<f32>().unwrap() > 0.0, "{name} has not learnt");
    }
}

#[test]
fn both_stages_train_the_encoder_and_keep_it() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    build(&MiniConfig::tiny(&root.join("data"), 24), &|_| {}).unwrap();

    // The frozen start of the same seed, for comparison.
    let frozen =
        recipe(root, 1, &["stage1.train_vision=false".into(), "stage1.train.steps=2".into()]);
    run(&frozen, &root.join("frozen"));
    let one = root.join("one");
    let hash = run(&recipe(root, 1, &[]), &one);
    assert_trained(
        &root.join("frozen/model/vision.safetensors"),
        &one.join("model/vision.safetensors"),
    );
    assert_eq!(run(&recipe(root, 1, &[]), &root.join("again")), hash, "the same bits again");

    let model = Model::open_folder(&one.join("model")).unwrap();
    let matcher = model.matcher(None, &mut |_, _, _| {}).unwrap();
    let picture = Rgb { width: 9, height: 5, data: (0..135).collect() };
    let score = matcher.score(std::slice::from_ref(&picture), &["a circle"]).unwrap()[0][0];
    assert!(score.itm.is_finite() && score.itc.is_finite());

    // The second stage goes on from both: the bridge by its init, the encoder as a folder's.
    let path = |name: &str| one.join(name).display().to_string();
    let vision = format!(
        "model.vision={{from=\"directory\", path=\"{}\", shape=\"any\", image_size=56, weights=\"f32\"}}",
        path("model")
    );
    let init = format!("stage2.init=\"{}\"", path("stage1"));
    let two = root.join("two");
    run(&recipe(root, 2, &[vision, init]), &two);
    assert_trained(&one.join("model/vision.safetensors"), &two.join("model/vision.safetensors"));
    let model = Model::open_folder(&two.join("model")).unwrap();
    let captioner = model.captioner(None, &mut |_, _, _| {}).unwrap();
    let options = Options { max_new_tokens: 2, ..Options::default() };
    assert!(!captioner.generate(&[picture], &["a"], &options).unwrap()[0][0].tokens.is_empty());
}

/// What can't be true together is refused, by the field's name.
#[test]
fn a_cache_of_features_and_a_trained_encoder_exclude_each_other() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/tiny_cpu.toml");
    let refused = |change: &[&str]| {
        let changes: Vec<String> = change.iter().map(|c| (*c).to_owned()).collect();
        RecipeFile::read(&path, &changes).unwrap_err().to_string()
    };
    let said = refused(&["stage1.train_vision=true"]);
    assert!(said.contains("features.views"), "{said}");
    let said = refused(&["stage1.train_vision=true", "features.views=0"]);
    assert!(said.contains("train_vision"), "{said}");
    let said = refused(&["stage1.optimizer.layer_decay=0"]);
    assert!(said.contains("layer_decay"), "{said}");
}

//! A bridge whose queries read the question: against LAVIS's Q-Former, and from training to an answer.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::Path;
use std::sync::atomic::AtomicBool;

use blip2::convert::{Half, Parts};
use blip2::generate::Options;
use blip2::image::Rgb;
use blip2::lavis::{HeadCounts, Lavis};
use blip2::model::Model;
use blip2::pack::{Bits, Packing, pack};
use blip2::params::ParamStore;
use blip2::shards;
use blip2::stage2::{Stage2, Stage2Config};
use blip2_ops::Dropout;
use blip2_train::Result;
use blip2_train::data::mini::{MiniConfig, build};
use blip2_train::init;
use blip2_train::log::StepRecord;
use blip2_train::recipe::{Recipe, RecipeFile};
use blip2_train::tasks::{Session, Trained, train_recipe};
use blip2_train::trainer::{Monitor, Resume, Start};
use candle_core::DType;
use common::{Tensors, assert_close, config, golden};

/// The queries' output for picture and text together (LAVIS's multimodal features), through the projection.
#[test]
fn soft_words_of_a_question_are_made_of_lavis_multimodal_features() {
    let golden = golden("lavis_files.safetensors");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/lavis/stage1.pth");
    let heads = HeadCounts { vision: None, qformer: Some(4) };
    let lavis = Lavis::new(shards::open_file(&path).unwrap(), heads, &path).unwrap();
    let bridge: Tensors =
        lavis.bridge.into_iter().map(|(name, tensor)| (name, tensor.load().unwrap())).collect();
    let store = ParamStore::new(init::stage2(&bridge, 6, None, 1, Some(4)).unwrap()).unwrap();
    let config = Stage2Config {
        qformer: config().qformer,
        llm_width: 6,
        ln_vision_eps: 1e-5,
        reads_questions: true,
    };
    let model = store.build(|p| Stage2::new(p, &config)).unwrap();
    let ids = golden["ids"].to_dtype(DType::U32).unwrap();
    let tokens = ids.ne(&ids.zeros_like().unwrap()).unwrap();
    let off = Dropout::off();
    let ours = model.soft_words_asked(&golden["eva"], &[0, 1], (&ids, &tokens), &off).unwrap();
    let get = |name: &str| store.get(name).unwrap().as_tensor().clone();
    let (b, q, w) = golden["multimodal"].dims3().unwrap();
    let rows = golden["multimodal"].reshape((b * q, w)).unwrap();
    let expected = rows.matmul(&get("llm_proj.weight").t().unwrap()).unwrap();
    let expected = expected.broadcast_add(&get("llm_proj.bias")).unwrap();
    assert_close("soft words", &ours, &expected.reshape((b, q, 6)).unwrap(), 1e-4);
    // Without a question to read there is no such bridge.
    let plain = ParamStore::new(init::stage2(&bridge, 6, None, 1, None).unwrap()).unwrap();
    assert!(plain.build(|p| Stage2::new(p, &config)).is_err());
}

struct Silent;

impl Monitor for Silent {
    fn start(&mut self, _: &Start) -> Result<()> {
        Ok(())
    }

    fn step(&mut self, record: &StepRecord, _: f64) -> Result<()> {
        assert!(record.loss.is_finite() && !record.skipped);
        Ok(())
    }

    fn note(&mut self, _: &str) {}
}

/// Both stages at toy size. That every parameter gets a gradient is the trainer's to see.
fn trained(root: &Path, changes: &[&str]) -> Model {
    build(&MiniConfig::tiny(&root.join("data"), 24), &|_| {}).unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/tiny_cpu.toml");
    let place = root.display();
    let mut all = vec![
        format!("data.dir=\"{place}/data\""),
        format!("features.dir=\"{place}/features\""),
        "stage2.reads_questions=true".into(),
        "stage2.questions=0.8".into(),
    ];
    for stage in ["stage1", "stage2"] {
        all.push(format!("{stage}.train.batch_size=4"));
        all.push(format!("{stage}.train.steps=4"));
        all.push(format!("{stage}.optimizer.warmup_steps=1"));
    }
    all.extend(changes.iter().map(|change| (*change).to_owned()));
    let file = RecipeFile::read(&path, &all).unwrap();
    let mut session = Session {
        dir: &root.join("run"),
        resume: Resume::No,
        stop: &AtomicBool::new(false),
        download: &mut |_, _, _| {},
        encoding: &mut |_, _| {},
        monitor: &mut |_, _: &Path, _: &Recipe| -> Box<dyn Monitor> { Box::new(Silent) },
    };
    match train_recipe(&file, &mut session).unwrap() {
        Trained::Finished { model, .. } => Model::open_folder(&model).unwrap(),
        Trained::Stopped => panic!("stopped"),
    }
}

/// The score of an answer of three tokens behind the same prompt.
fn score(model: &Model, question: &str) -> f32 {
    let captioner = model.captioner(None, &mut |_, _, _| {}).unwrap();
    let picture = Rgb { width: 9, height: 5, data: (0..135).collect() };
    let options = Options { max_new_tokens: 3, ..Options::default() };
    captioner.answer(&[picture], &[question], &["a"], &options).unwrap()[0][0].score
}

#[test]
fn a_bridge_learns_to_read_questions_and_keeps_it_in_every_layout() {
    let root = tempfile::tempdir().unwrap();
    let model = trained(root.path(), &[]);
    assert!(model.manifest.stage2.as_ref().unwrap().config.reads_questions);
    let (one, other) = (score(&model, "what colour is it?"), score(&model, "how many are there?"));
    assert!(one != other, "the queries look at the question: {one}");

    let packed = root.path().join("packed");
    let packing = Packing { matrices: Bits::Q8, embeddings: Bits::Q8 };
    pack(&model, packing, &packed).unwrap();
    assert!(score(&Model::open_folder(&packed).unwrap(), "what colour is it?").is_finite());
    let again = root.path().join("again");
    std::fs::create_dir(&again).unwrap();
    let parts = Parts::of_model(&model, &mut |_, _, _| {}).unwrap();
    parts.write_folder(None, &again).unwrap();
    assert_eq!(score(&Model::open_folder(&again).unwrap(), "what colour is it?"), one);
    let refused = parts.write_hf(Half::Generates, None, &packed).unwrap_err().to_string();
    assert!(refused.contains("questions"), "{refused}");
}

/// An earlier stage 2 has dropped the text layers; the recipe's BERT gives new ones.
#[test]
fn a_bridge_without_text_layers_gets_those_of_bert() {
    let root = tempfile::tempdir().unwrap();
    let model = trained(root.path(), &["stage2.init=\"none\""]);
    assert!(score(&model, "what is it?").is_finite());
}

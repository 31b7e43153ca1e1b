//! Checkpoints of LAVIS against LAVIS (`golden/lavis_files.py`): image encoders, both stages, and what becomes of them in
//! the other two layouts.

#![allow(clippy::unwrap_used, reason = "helpers of tests, too, are tests")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use blip2::convert::{FrozenFiles, Half, Parts};
use blip2::generate::{Beam, Options, Strategy, generate};
use blip2::lavis::{self, HeadCounts};
use blip2::llm::Llm;
use blip2::model::Model;
use blip2::params::{Params, read_file};
use blip2::shards;
use blip2::stage1::{ItgDecoder, Stage1};
use blip2::vit::Vit;
use blip2_ops::{Dropout, WeightFormat};
use candle_core::{DType, IndexOp, Tensor};
use serde_json::Value;

const HEADS: HeadCounts = HeadCounts { vision: Some(2), qformer: Some(4) };

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(name)
}

fn file(name: &str) -> PathBuf {
    golden("lavis").join(name)
}

fn tensors() -> BTreeMap<String, Tensor> {
    read_file(&golden("lavis_files.safetensors")).unwrap()
}

fn quiet(_: &str, _: u64, _: u64) {}

/// Greatest difference, relative to the greatest value.
fn assert_close(name: &str, ours: &Tensor, theirs: &Tensor) {
    let max = |t: &Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    assert_eq!(ours.dims(), theirs.dims(), "{name}");
    let error = max(&(ours - theirs).unwrap()) / max(theirs);
    assert!(error < 1e-4, "{name}: relative difference {error:.1e}");
}

fn frozen(vision: &str, llm: Option<&str>) -> FrozenFiles {
    FrozenFiles { vision: Some(file(vision)), llm: llm.map(file), heads: HEADS }
}

/// Writes one half as Hugging Face has it, or all in our layout, and opens it again.
fn written(parts: &Parts, half: Option<Half>) -> (tempfile::TempDir, Model) {
    let dir = tempfile::tempdir().unwrap();
    match half {
        Some(half) => parts.write_hf(half, None, dir.path()).unwrap(),
        None => parts.write_folder(None, dir.path()).unwrap(),
    };
    let model = Model::open_folder(dir.path()).unwrap();
    (dir, model)
}

#[test]
fn image_encoders_are_those_of_lavis() {
    let golden = tensors();
    for name in ["eva", "clip"] {
        let path = file(&format!("{name}.pth"));
        let (config, weights) =
            lavis::vision(shards::open_file(&path).unwrap(), HEADS, &path).unwrap();
        let vit =
            Params::build(weights, WeightFormat::F32, name, |p| Vit::new(p, &config)).unwrap();
        assert_close(name, &vit.forward(&golden["pixels"]).unwrap(), &golden[name]);
    }
}

#[test]
fn both_stage_1_checkpoints_embed_and_match_as_lavis() {
    let golden = tensors();
    // The second was trained with its image encoder: it needs no other file.
    let fine_tuned = FrozenFiles { heads: HEADS, ..FrozenFiles::default() };
    let tested = [("stage1.pth", frozen("eva.pth", None)), ("stage1_finetuned.pth", fine_tuned)];
    for (name, frozen) in tested {
        let parts = Parts::of_lavis(&file(name), &frozen).unwrap();
        assert_eq!(parts.halves(), [Half::Matches]);
        let (_dir, model) = written(&parts, None);
        let part = model.manifest.stage1.clone().unwrap();
        let weights = model.weights(&part.weights).unwrap();
        let bridge =
            Params::build(weights, WeightFormat::F32, name, |p| Stage1::new(p, &part.config))
                .unwrap();
        let encoder = model.vision_tensors(&mut quiet).unwrap();
        let vit = Params::build(encoder, WeightFormat::F32, name, |p| {
            Vit::new(p, &model.manifest.vision.config)
        });
        let patches = vit.unwrap().forward(&golden["pixels"]).unwrap();
        let off = Dropout::off();
        let image = bridge.image(&patches, &off).unwrap();
        let ids = golden["ids"].to_dtype(DType::U32).unwrap();
        let tokens = ids.ne(&ids.zeros_like().unwrap()).unwrap();
        // LAVIS keeps the logit of a match.
        let itm = bridge.itm(&image.picture, &ids, &tokens, &off).unwrap().i((.., 1)).unwrap();
        let text = bridge.text(&ids, &tokens, &off).unwrap();
        assert_close("image", &image.embeds, &golden["image_embeds"]);
        assert_close("text", &text, &golden["text_embeds"]);
        assert_close("itm", &itm, &golden["itm"]);
        let qformer = bridge.qformer();
        assert_close("queries", &image.queries, &golden["image_hidden"]);
        let hidden = qformer.text(&ids, &tokens, &off).unwrap();
        // What stands at padding means nothing.
        let first = |t: &Tensor| t.narrow(1, 0, 3).unwrap();
        assert_close("text states", &first(&hidden), &first(&golden["text_hidden"]));
        let both = qformer.pair(&image.picture, &ids, &tokens, &off).unwrap();
        assert_close("multimodal", &both, &golden["multimodal"]);
        captions_are_those_of_lavis(&bridge, &patches);
    }
}

/// The first stage's own head, greedy and with beams; the model of the golden's tiny vocabulary.
fn captions_are_those_of_lavis(bridge: &Stage1, patches: &Tensor) {
    let text = std::fs::read(golden("lavis_files.json")).unwrap();
    let expected: Value = serde_json::from_slice(&text).unwrap();
    for beams in [1, 3] {
        let image = bridge.image(patches, &Dropout::off()).unwrap();
        let mut decoder = ItgDecoder::new(bridge, image).unwrap();
        let options = Options { eos: vec![2], max_new_tokens: 10, ..options(beams) };
        let found = generate(&mut decoder, 2, &options).unwrap();
        for caption in expected["captions"].as_array().unwrap() {
            if caption["beams"] == beams {
                let picture = caption["picture"].as_u64().unwrap() as usize;
                let tokens: Vec<u32> = serde_json::from_value(caption["tokens"].clone()).unwrap();
                assert_eq!(found[picture][0].tokens, tokens, "{caption}");
            }
        }
    }
}

fn options(beams: u64) -> Options {
    let strategy = match beams {
        1 => Strategy::Greedy,
        num_beams => Strategy::Beam(Beam {
            num_beams: num_beams as usize,
            length_penalty: 0.0,
            ..Beam::default()
        }),
    };
    // `min_length=1` is met by the start token that transformers 4.33 counts.
    Options { strategy, max_new_tokens: 8, min_new_tokens: 0, ..Options::default() }
}

/// Tokens of every search, from the checkpoint converted to Hugging Face's layout, to ours, and from each to the other.
#[test]
fn stage_2_checkpoints_caption_as_lavis_in_every_layout() {
    let golden_tensors = tensors();
    let text = std::fs::read(golden("lavis_files.json")).unwrap();
    let searches: Value = serde_json::from_slice(&text).unwrap();
    for llm in ["opt", "t5"] {
        let checkpoint = file(&format!("stage2_{llm}.pth"));
        let parts = Parts::of_lavis(&checkpoint, &frozen("eva.pth", Some(llm))).unwrap();
        let (_a, hf) = written(&parts, Some(Half::Generates));
        let (_b, ours) = written(&parts, None);
        let again = Parts::of_model(&hf, &mut quiet).unwrap();
        let (_c, ours_of_hf) = written(&again, None);
        let again = Parts::of_model(&ours, &mut quiet).unwrap();
        let (_d, hf_of_ours) = written(&again, Some(Half::Generates));
        for (layout, model) in
            [("hf", hf), ("ours", ours), ("hf → ours", ours_of_hf), ("ours → hf", hf_of_ours)]
        {
            let captioner = model.captioner(None, &mut quiet).unwrap();
            let part = model.manifest.stage2.clone().unwrap();
            assert_eq!(part.config.qformer.num_heads, 4);
            for search in searches["searches"].as_array().unwrap() {
                if search["llm"] != llm {
                    continue;
                }
                let picture = search["picture"].as_u64().unwrap() as usize;
                let patches = golden_tensors["eva"].narrow(0, picture, 1).unwrap();
                let found = captioner
                    .generate_from(
                        &patches,
                        &[search["prompt"].as_str().unwrap()],
                        &options(search["beams"].as_u64().unwrap()),
                    )
                    .unwrap();
                let expected: Vec<u32> = serde_json::from_value(search["tokens"].clone()).unwrap();
                assert_eq!(found[0][0].tokens, expected, "{layout}: {search}");
            }
        }
    }
}

/// Nothing is computed on the way, so nothing may change: every tensor of a folder that went from Hugging Face's layout to
/// ours and back is the same to the bit.
#[test]
fn a_folder_that_went_there_and_back_is_the_same() {
    for case in ["opt_f32", "opt_bf16_untied", "t5_f16_tied", "t5_bf16"] {
        let source = golden("hf").join(case);
        let model = Model::open_folder(&source).unwrap();
        let (_a, ours) = written(&Parts::of_model(&model, &mut quiet).unwrap(), None);
        let back = Parts::of_model(&ours, &mut quiet).unwrap();
        let dir = tempfile::tempdir().unwrap();
        back.write_hf(Half::Generates, None, dir.path()).unwrap();
        let (before, after) = (shards::open(&source).unwrap(), shards::open(dir.path()).unwrap());
        let names = |t: &lavis::Tensors| t.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&before), names(&after), "{case}");
        for (name, tensor) in &before {
            assert_eq!(tensor.dtype(), after[name].dtype(), "{case}: {name}");
            let values = |t: Tensor| t.flatten_all().unwrap().to_dtype(DType::F32).unwrap();
            let (a, b) = (tensor.load().unwrap(), after[name].load().unwrap());
            assert_eq!(a.dims(), b.dims(), "{case}: {name}");
            let same = values(a).to_vec1::<f32>().unwrap() == values(b).to_vec1::<f32>().unwrap();
            assert!(same, "{case}: {name}");
        }
    }
}

#[test]
fn what_is_missing_or_wrong_is_named() {
    let refused = |name: &str, frozen: &FrozenFiles| {
        Parts::of_lavis(&file(name), frozen).err().unwrap().to_string()
    };
    let none = FrozenFiles { heads: HEADS, ..FrozenFiles::default() };
    assert!(refused("stage1.pth", &none).contains("stage1.pth: holds no image encoder"));
    let no_llm = frozen("eva.pth", None);
    assert!(refused("stage2_opt.pth", &no_llm).contains("holds no language model"));
    let swapped = frozen("stage1.pth", Some("opt"));
    let message = refused("stage2_opt.pth", &swapped);
    assert!(
        message.contains("stage1.pth") && message.contains("no tensor conv1.weight"),
        "{message}"
    );
    assert!(refused("eva.pth", &none).contains("eva.pth"));
    // No published width: how many heads there are is not to be guessed.
    let unknown = FrozenFiles { heads: HeadCounts::default(), ..frozen("eva.pth", Some("opt")) };
    let said = refused("stage2_opt.pth", &unknown);
    assert!(said.contains("36 wide") && said.contains("heads"), "{said}");
    let five = HeadCounts { vision: Some(5), ..HEADS };
    let unknown = FrozenFiles { heads: five, ..frozen("eva.pth", Some("opt")) };
    assert!(refused("stage2_opt.pth", &unknown).contains("5 heads"));
    // transformers' image encoder has no place for CLIP's.
    let clip = Parts::of_lavis(&file("stage2_opt.pth"), &frozen("clip.pth", Some("opt"))).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let refused = clip.write_hf(Half::Generates, None, dir.path()).unwrap_err().to_string();
    assert!(refused.contains("CLIP"), "{refused}");
    let (_dir, model) = written(&clip, None);
    assert!(model.captioner(None, &mut quiet).is_ok(), "our layout holds it");
}

/// OPT as published names one token for both ends of a text; stage 2 is trained, and stops, at a newline.
#[test]
fn opt_ends_with_a_line() {
    let (_, tokenizer) = Llm::open(&file("opt"), None).unwrap();
    assert_eq!(tokenizer.special().bos, Some(2));
    assert_eq!(vec![tokenizer.special().eos], tokenizer.encode("\n", false).unwrap());
}

/// Several tokens that end a text are still several in the other layout, and prompts are kept.
#[test]
fn what_only_a_configuration_says_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden("hf/opt_f32")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = dir.path().join("generation_config.json");
    std::fs::write(&path, r#"{"bos_token_id": 2, "eos_token_id": [202, 146], "pad_token_id": 1}"#)
        .unwrap();
    let model = Model::open_folder(dir.path()).unwrap();
    let (folder, mut ours) = written(&Parts::of_model(&model, &mut quiet).unwrap(), None);
    let patches = Tensor::ones((1, 10, 20), DType::F32, &candle_core::Device::Cpu).unwrap();
    let options = Options { max_new_tokens: 12, ..options(1) };
    let tokens = |model: &Model| {
        let captioner = model.captioner(None, &mut quiet).unwrap();
        captioner.generate_from(&patches, &[""], &options).unwrap()[0][0].tokens.clone()
    };
    assert_eq!(tokens(&model), tokens(&ours));

    ours.manifest.stage2.as_mut().unwrap().caption_prompt = "a photo of".into();
    let text = serde_json::to_vec(&ours.manifest).unwrap();
    std::fs::write(folder.path().join("model.json"), text).unwrap();
    let ours = Model::open_folder(folder.path()).unwrap();
    let parts = Parts::of_model(&ours, &mut quiet).unwrap();
    assert!(parts.lost(Half::Generates).iter().any(|lost| lost.contains("prompts")));
    let (_dir, hf) = written(&parts, Some(Half::Generates));
    assert_eq!(hf.manifest.stage2.unwrap().caption_prompt, "a photo of");
}

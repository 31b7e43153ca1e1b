//! BLIP-2 in Hugging Face layout against transformers (`golden/blip2_hf.py`, `golden/opt_tiny.py`): pixels, soft words,
//! logits, tokens exactly, scores.

#![allow(clippy::unwrap_used, reason = "helpers of tests, too, are tests")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use blip2::generate::{Beam, Options, Strategy};
use blip2::image::Rgb;
use blip2::llm::Llm;
use blip2::model::Model;
use blip2::params::{Params, read_file};
use blip2::stage2::Stage2;
use blip2::stored::Stored;
use blip2_ops::{Dropout, WeightFormat};
use candle_core::{DType, Tensor};
use serde_json::{Value, json};

const CASES: [&str; 7] = [
    "opt_f32",
    "opt_f16_sharded",
    "opt_bf16_untied",
    "llama_f16",
    "t5_bf16",
    "t5_f16_tied",
    "t5_f16_tanh",
];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(name)
}

fn quiet(_: &str, _: u64, _: u64) {}

fn open(case: &str) -> Model {
    Model::open_folder(&golden("hf").join(case)).unwrap()
}

fn picture(tensors: &BTreeMap<String, Tensor>) -> Rgb {
    let (height, width, _) = tensors["picture"].dims3().unwrap();
    let data = tensors["picture"].flatten_all().unwrap().to_vec1::<u8>().unwrap();
    Rgb { width: width as u32, height: height as u32, data }
}

/// Greatest difference, relative to the greatest value.
fn assert_close(name: &str, ours: &Tensor, theirs: &Tensor, tolerance: f32) {
    let max = |t: &Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    assert_eq!(ours.dims(), theirs.dims(), "{name}");
    let error = max(&(ours - theirs).unwrap()) / max(theirs);
    assert!(error < tolerance, "{name}: relative difference {error:.1e}");
}

#[test]
fn pixels_and_soft_words_are_transformers() {
    let tensors = read_file(&golden("blip2_hf.safetensors")).unwrap();
    let picture = picture(&tensors);
    for case in CASES {
        let model = open(case);
        let vision = model.vision(WeightFormat::F32, &mut quiet).unwrap();
        let pixels = vision.pixels(std::slice::from_ref(&picture)).unwrap();
        assert_close("pixels", &pixels, &tensors[&format!("{case}.pixels")], 1e-6);
        let part = model.manifest.stage2.clone().unwrap();
        let bridge =
            Params::build(model.weights(&part.weights).unwrap(), WeightFormat::F32, case, |p| {
                Stage2::new(p, &part.config)
            })
            .unwrap();
        let patches = vision.encode(std::slice::from_ref(&picture)).unwrap();
        let soft = bridge.soft_words(&patches, &Dropout::off()).unwrap();
        assert_close(case, &soft, &tensors[&format!("{case}.soft_words")], 1e-4);
    }
}

fn options(search: &Value) -> Options {
    let given = &search["options"];
    let number = |name: &str| given[name].as_u64().unwrap_or(0) as usize;
    let strategy = match number("num_beams") {
        1 => Strategy::Greedy,
        num_beams => {
            let length_penalty = given["length_penalty"].as_f64().unwrap_or(1.0) as f32;
            Strategy::Beam(Beam { num_beams, length_penalty, ..Beam::default() })
        }
    };
    Options {
        strategy,
        max_new_tokens: number("max_new_tokens"),
        min_new_tokens: number("min_new_tokens"),
        repetition_penalty: given["repetition_penalty"].as_f64().unwrap_or(1.0) as f32,
        ..Options::default()
    }
}

#[test]
fn tokens_and_scores_are_transformers() {
    let tensors = read_file(&golden("blip2_hf.safetensors")).unwrap();
    let picture = picture(&tensors);
    let text = std::fs::read(golden("blip2_hf.json")).unwrap();
    let searches: Value = serde_json::from_slice(&text).unwrap();
    for case in CASES {
        let captioner = open(case).captioner(None, &mut quiet).unwrap();
        let own = searches["searches"].as_array().unwrap().iter().filter(|s| s["case"] == case);
        for search in own {
            let prompt = search["prompt"].as_str().unwrap();
            let found = captioner
                .generate(std::slice::from_ref(&picture), &[prompt], &options(search))
                .unwrap()
                .remove(0)
                .remove(0);
            let name = format!("{case}, {prompt:?}, {}", search["search"]);
            let expected: Vec<u32> = serde_json::from_value(search["tokens"].clone()).unwrap();
            assert_eq!(found.tokens, expected, "{name}");
            let score = search["score"].as_f64().unwrap() as f32;
            assert!((found.score - score).abs() < 1e-3, "{name}: {} and {score}", found.score);
            assert_eq!(captioner.text(&found).unwrap(), search["text"].as_str().unwrap(), "{name}");
        }
        // Prompts of different lengths in one batch: each as if alone.
        let prompts: Vec<&str> =
            searches["prompts"].as_array().unwrap().iter().map(|p| p.as_str().unwrap()).collect();
        let pictures = vec![picture.clone(); prompts.len()];
        let options = Options { max_new_tokens: 8, ..Options::default() };
        let together = captioner.generate(&pictures, &prompts, &options).unwrap();
        for (prompt, found) in prompts.iter().zip(together) {
            let alone = captioner.generate(&pictures[..1], &[prompt], &options).unwrap();
            assert_eq!(found[0].tokens, alone[0][0].tokens, "{case}, {prompt:?}");
        }
    }
}

/// `Blip2ForImageTextRetrieval`: both scores of a picture with each of several texts, together and alone.
#[test]
fn matching_is_transformers() {
    let tensors = read_file(&golden("blip2_itm.safetensors")).unwrap();
    let picture = picture(&read_file(&golden("blip2_hf.safetensors")).unwrap());
    let texts = ["a photo of a dog.", "Two cats!", "a", "a dog and two cats on a photo"];
    let matcher = open("itm_f16").matcher(None, &mut quiet).unwrap();
    let together = matcher.score(std::slice::from_ref(&picture), &texts).unwrap().remove(0);
    for (i, (text, together)) in texts.iter().zip(together).enumerate() {
        let logits = tensors[&format!("itm.{i}")].to_vec1::<f32>().unwrap();
        let itm = 1.0 / (1.0 + (logits[0] - logits[1]).exp());
        let itc = tensors[&format!("itc.{i}")].to_vec1::<f32>().unwrap()[0];
        let alone = matcher.score(std::slice::from_ref(&picture), &[text]).unwrap()[0][0];
        for score in [together, alone] {
            assert!((score.itm - itm).abs() < 1e-4, "{text}: {} and {itm}", score.itm);
            assert!((score.itc - itc).abs() < 1e-4, "{text}: {} and {itc}", score.itc);
        }
        let embedded = matcher.embed_texts(&[text]).unwrap().squeeze(0).unwrap();
        assert_close(text, &embedded, &tensors[&format!("text.{i}")], 1e-4);
    }
    let image = matcher.embed_images(&[picture]).unwrap().squeeze(0).unwrap();
    assert_close("image", &image, &tensors["image"], 1e-4);
    assert!(
        open("itm_f16")
            .captioner(None, &mut quiet)
            .is_err_and(|e| e.to_string().contains("stage-2"))
    );
}

/// Both kinds of OPT, with padding on the left; the head is tied to the words.
#[test]
fn opt_is_transformers() {
    let tensors = read_file(&golden("opt_tiny.safetensors")).unwrap();
    for (name, pre_norm, words) in [("pre", true, 27), ("post", false, 14)] {
        let config = json!({
            "model_type": "opt", "vocab_size": 53, "hidden_size": 27, "ffn_dim": 40, "num_hidden_layers": 3,
            "num_attention_heads": 3, "max_position_embeddings": 30, "do_layer_norm_before": pre_norm,
            "word_embed_proj_dim": words,
        });
        let own = |(key, t): (&String, &Tensor)| {
            Some((key.strip_prefix(&format!("{name}."))?.to_owned(), Stored::from(t.clone())))
        };
        let weights: BTreeMap<String, Stored> = tensors.iter().filter_map(own).collect();
        let llm = Llm::from_hf(&config, weights, WeightFormat::F32, Path::new(name)).unwrap();
        let get = |part: &str| &tensors[&format!("forward.{name}.{part}")];
        let mask = get("mask").to_vec2::<i64>().unwrap();
        let visible: Vec<Vec<bool>> =
            mask.iter().map(|row| row.iter().map(|m| *m == 1).collect()).collect();
        let x = llm.embed(&get("ids").to_dtype(DType::U32).unwrap()).unwrap();
        let logits = llm.logits(&llm.hidden(&x, &visible, None).unwrap()).unwrap();
        for (row, visible) in visible.iter().enumerate() {
            let first = visible.iter().position(|v| *v).unwrap();
            let part =
                |t: &Tensor| t.get(row).unwrap().narrow(0, first, visible.len() - first).unwrap();
            assert_close(name, &part(&logits), &part(get("logits")), 1e-5);
        }

        // Word by word with a cache: the same.
        let mut cache = llm.new_cache();
        let row = x.narrow(0, 0, 1).unwrap();
        for t in 0..row.dim(1).unwrap() {
            let one = row.narrow(1, t, 1).unwrap();
            let hidden = llm.hidden(&one, &[vec![true; t + 1]], Some(&mut cache)).unwrap();
            let whole = logits.narrow(0, 0, 1).unwrap().narrow(1, t, 1).unwrap();
            assert_close("cached", &llm.logits(&hidden).unwrap(), &whole, 1e-5);
        }
    }
}

/// transformers 5 puts the image processor's settings into `processor_config.json`, the ids that start and end a text into
/// `text_config` (no other place names them here), and says of T5 that its head is tied when it is not.
#[test]
fn a_folder_of_transformers_5_gives_the_same() {
    let tensors = read_file(&golden("blip2_hf.safetensors")).unwrap();
    let picture = picture(&tensors);
    for case in ["opt_f32", "t5_bf16"] {
        let dir = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(golden("hf").join(case)).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
        let json = |name: &str| -> Value {
            serde_json::from_slice(&std::fs::read(dir.path().join(name)).unwrap()).unwrap()
        };
        let write = |name: &str, value: &Value| {
            std::fs::write(dir.path().join(name), value.to_string()).unwrap();
        };
        let mut pixels = json("preprocessor_config.json");
        pixels.as_object_mut().unwrap().remove("processor_class");
        write(
            "processor_config.json",
            &json!({"image_processor": pixels, "num_query_tokens": 5, "processor_class": "Blip2Processor"}),
        );
        let mut config = json("config.json");
        config["text_config"]["tie_word_embeddings"] = true.into();
        config["text_config"]["eos_token_id"] =
            json("generation_config.json")["eos_token_id"].clone();
        write("config.json", &config);
        for name in ["preprocessor_config.json", "generation_config.json"] {
            std::fs::remove_file(dir.path().join(name)).unwrap();
        }
        let caption = |model: Model| {
            let captioner = model.captioner(None, &mut quiet).unwrap();
            let options = Options { max_new_tokens: 8, ..Options::default() };
            captioner.generate(std::slice::from_ref(&picture), &["a photo of"], &options).unwrap()
        };
        assert_eq!(caption(Model::open_folder(dir.path()).unwrap()), caption(open(case)), "{case}");
    }
}

/// A copy of a case, with one thing done to it; the error says what is wrong and where.
#[test]
fn what_is_wrong_with_a_folder_is_named() {
    let refused = |change: &dyn Fn(&Path)| {
        let dir = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(golden("hf/opt_f16_sharded")).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
        change(dir.path());
        let model = Model::open_folder(dir.path());
        model.and_then(|model| model.captioner(None, &mut quiet).map(drop)).unwrap_err().to_string()
    };
    let edit = |name: &'static str, from: &'static str, to: &'static str| {
        move |dir: &Path| {
            let path = dir.join(name);
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.contains(from), "{name} has no {from}");
            std::fs::write(&path, text.replace(from, to)).unwrap();
        }
    };
    let remove =
        |name: &'static str| move |dir: &Path| std::fs::remove_file(dir.join(name)).unwrap();
    type Change<'a> = &'a dyn Fn(&Path);
    let cases: [(Change<'_>, &[&str]); 10] = [
        (&remove("tokenizer.json"), &["tokenizer.json"]),
        (&remove("preprocessor_config.json"), &["preprocessor_config.json"]),
        (&remove("model-00002-of-00006.safetensors"), &["model-00002-of-00006.safetensors"]),
        (&edit("preprocessor_config.json", "\"height\": 42", "\"height\": 56"), &["size", "42"]),
        (&edit("config.json", "\"model_type\": \"opt\"", "\"model_type\": \"bloom\""), &["bloom"]),
        (&edit("config.json", "\"relu\"", "\"tanh\""), &["activation_function", "tanh"]),
        (&edit("config.json", "\"ffn_dim\": 40", "\"ffn_dim\": 41"), &["fc1", "41"]),
        (
            &edit("config.json", "\"num_query_tokens\": 5", "\"num_query_tokens\": 6"),
            &["query_tokens"],
        ),
        (
            &edit("config.json", "\"intermediate_size\": 36", "\"intermediate_size\": 37"),
            &["mlp.fc1", "37"],
        ),
        (&edit("config.json", "{\n", "{{\n"), &["config.json"]),
    ];
    for (change, words) in cases {
        let message = refused(change);
        for word in words {
            assert!(message.contains(word), "{word} is not in: {message}");
        }
    }
}

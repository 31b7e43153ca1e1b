//! The program as a user meets it: arguments, environment and files in; lines, messages and an exit code out.
//!
//! One test trains a tiny random model (6 steps a stage, seconds) and has every verb use it: what it says means nothing,
//! the form of it is what is tested. The others need no model, and show that none is asked for.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Cursor;
use std::process::{Command, Stdio};

use image::{DynamicImage, ImageFormat, RgbImage};
use serde_json::{Value, json};
use tempfile::TempDir;

const RECIPE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../recipes/tiny_cpu.toml");
const EVAL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../recipes/mini_eval.toml");

/// The tiny recipe, cut to seconds.
const CHANGES: [&str; 12] = [
    "data.dir=data",
    "features.dir=features",
    "features.views=0",
    "stage1.max_text_len=24",
    "stage1.train.steps=6",
    "stage1.train.batch_size=8",
    "stage1.optimizer.warmup_steps=2",
    "stage2.train.steps=6",
    "stage2.train.batch_size=8",
    "stage2.optimizer.warmup_steps=2",
    "runtime.checkpoint_every=100",
    "runtime.log_every=1",
];

// ---- running the program -----------------------------------------------------------------------

/// A folder to work in. Names in commands are relative to it.
struct World {
    root: TempDir,
}

/// What the program left.
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl World {
    fn new() -> Self {
        Self { root: tempfile::tempdir().unwrap() }
    }

    /// The program with the words of `line`, in an environment that is empty but for the model.
    fn program(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
        command.current_dir(self.root.path()).env_clear().env("BLIP2_MODEL", "run/model");
        command.args(line.split_whitespace());
        command
    }

    fn run(&self, line: &str) -> Ran {
        run(&mut self.program(line))
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        let path = self.root.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.root.path().join(name)).unwrap()
    }

    /// The names in a folder.
    fn names(&self, folder: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.root.path().join(folder)).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

fn run(command: &mut Command) -> Ran {
    let output = command.stdin(Stdio::null()).output().unwrap();
    Ran {
        code: output.status.code(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

impl Ran {
    #[track_caller]
    fn exits(self, code: i32) -> Self {
        let Self { out, err, .. } = &self;
        assert_eq!(self.code, Some(code), "standard output:\n{out}\nstandard error:\n{err}");
        assert!(!err.contains("panicked"), "{err}");
        self
    }

    /// Standard output, one JSON object a line.
    #[track_caller]
    fn rows(&self) -> Vec<Value> {
        self.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

// ---- pictures ----------------------------------------------------------------------------------

const FORMATS: [(&str, ImageFormat); 5] = [
    ("png", ImageFormat::Png),
    ("jpg", ImageFormat::Jpeg),
    ("gif", ImageFormat::Gif),
    ("bmp", ImageFormat::Bmp),
    ("webp", ImageFormat::WebP),
];

/// Picture `i`: its size, colours and format depend on `i`.
fn picture(i: usize) -> Vec<u8> {
    let shade = i as u32;
    let colour = |x: u32, y: u32| image::Rgb([x * 11, y * 9, shade * 5 + x * y].map(|v| v as u8));
    let picture = RgbImage::from_fn(20 + shade % 7, 24 + shade % 5, colour);
    let mut bytes = Cursor::new(Vec::new());
    let format = FORMATS[i % FORMATS.len()].1;
    DynamicImage::ImageRgb8(picture).write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn name(i: usize) -> String {
    format!("pictures/{i:03}.{}", FORMATS[i % FORMATS.len()].0)
}

/// Ten of 200, two of each format: one cut in half, the other empty or no picture at all.
fn is_damaged(i: usize) -> bool {
    i.is_multiple_of(21)
}

fn damaged(i: usize) -> Vec<u8> {
    match picture(i) {
        whole if i < 100 => whole[..whole.len() / 2].to_vec(),
        _ if i.is_multiple_of(2) => Vec::new(),
        _ => b"<html>no such picture</html>".to_vec(),
    }
}

// ---- what results look like --------------------------------------------------------------------

#[track_caller]
fn check_text(row: &Value, text: &str, most_tokens: usize) {
    assert!(row[text].is_string(), "{row}");
    let tokens = row["tokens"].as_array().unwrap();
    assert!((1..=most_tokens).contains(&tokens.len()), "{row}");
    assert!(tokens.iter().all(Value::is_u64), "{row}");
    assert!(row["score"].as_f64().unwrap() <= 0.0, "{row}");
}

/// A row of `caption` with `count` captions.
#[track_caller]
fn check_captions(row: &Value, image: &str, count: usize, most_tokens: usize) {
    assert_eq!(row["image"], image, "{row}");
    assert_eq!(row.as_object().unwrap().len(), 2, "{row}");
    let captions = row["captions"].as_array().unwrap();
    assert_eq!(captions.len(), count, "{row}");
    captions.iter().for_each(|caption| check_text(caption, "text", most_tokens));
}

#[track_caller]
fn check_error(row: &Value, image: &str) {
    assert_eq!(row["image"], image, "{row}");
    assert!(row["error"].as_str().unwrap().contains(image), "{row}");
    assert_eq!(row.as_object().unwrap().len(), 2, "{row}");
}

/// The row's pictures, `!` before those with an error.
fn images(rows: &[Value]) -> Vec<String> {
    let image = |row: &Value| {
        let mark = if row["error"].is_null() { "" } else { "!" };
        format!("{mark}{}", row["image"].as_str().unwrap())
    };
    rows.iter().map(image).collect()
}

#[track_caller]
fn check_is_normalised(vector: &Value) {
    let values: Vec<f64> = vector.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    let norm = values.iter().map(|v| v * v).sum::<f64>().sqrt();
    assert_eq!(values.len(), 32);
    assert!((norm - 1.0).abs() < 1e-3, "{norm}");
}

// ---- with a model ------------------------------------------------------------------------------

#[test]
fn a_tiny_model_serves_every_verb() {
    let world = World::new();
    makes_data(&world);
    trains(&world);
    captions_two_hundred_pictures(&world);
    says_the_same_in_any_batch(&world);
    finds_pictures(&world);
    reads_the_environment(&world);
    samples_alike_with_the_same_seed(&world);
    asks(&world);
    matches(&world);
    embeds(&world);
    measures_itself(&world);
    inspects(&world);
    converts(&world);
    changes_its_layout(&world);
    uses_the_first_stage(&world);
    evaluates(&world);
    chooses_from_both_stages(&world);
    survives_a_closed_pipe(&world);
}

fn makes_data(world: &World) {
    let rows = world.run("data mini --tiny 32 --out data --format jsonl").exits(0).rows();
    assert!(rows.contains(&json!({"split": "train", "pictures": 32})), "{rows:?}");
    assert!(rows.contains(&json!({"split": "test", "pictures": 4})), "{rows:?}");
    assert_eq!(rows.last().unwrap(), &json!({"file": "data/mini.json"}));
    assert_eq!(world.names("."), ["data"], "nothing is left beside it");
    world.run("data mini --tiny 32 --out data").exits(1);

    let check = "data check data/train-00000.tar --format jsonl";
    assert_eq!(world.run(check).exits(0).rows(), [json!({"samples": 32, "faults": 0})]);
    let whole = world.read("data/train-00000.tar");
    // Not at the end of a block, where a cut could look like an end.
    world.write("cut.tar", &whole[..whole.len() / 2 + 100]);
    let rows = world.run("data check cut.tar --format jsonl").exits(1).rows();
    assert!(rows[0]["faults"].as_u64().unwrap() > 0, "{rows:?}");
}

fn train(world: &World) -> Command {
    let mut command = world.program("train --out run --format jsonl");
    command.arg(RECIPE);
    for change in CHANGES {
        command.args(["--set", change]);
    }
    command
}

fn trains(world: &World) {
    let model = [json!({"model": "run/model"})];
    assert_eq!(run(&mut train(world)).exits(0).rows(), model);
    let none = world.run("train none.toml").exits(1);
    assert_eq!(none.err.matches("os error 2").count(), 1, "said once: {}", none.err);
    // What is there is neither overwritten nor trained again.
    run(&mut train(world)).exits(1);
    run(train(world).env("BLIP2_RESUME", "no")).exits(1);
    assert_eq!(run(train(world).env("BLIP2_RESUME", "yes")).exits(0).rows(), model);
}

fn captions_two_hundred_pictures(world: &World) {
    for i in 0..200 {
        world.write(&name(i), &if is_damaged(i) { damaged(i) } else { picture(i) });
    }
    let line = "caption pictures --num-beams 2 --max-new-tokens 3 --format jsonl";
    let rows = world.run(line).exits(1).rows();
    assert_eq!(rows.len(), 200);
    for (i, row) in rows.iter().enumerate() {
        if is_damaged(i) {
            check_error(row, &name(i));
        } else {
            check_captions(row, &name(i), 1, 3);
        }
    }
    assert_eq!(rows.iter().filter(|row| row["error"].is_string()).count(), 10);

    // For people: captions on one stream, errors on the other.
    let ran = world.run("caption pictures/000.png pictures/001.jpg --max-new-tokens 1").exits(1);
    assert!(ran.out.starts_with("pictures/001.jpg: "), "{}", ran.out);
    assert!(ran.err.contains("pictures/000.png"), "{}", ran.err);
}

fn says_the_same_in_any_batch(world: &World) {
    for line in [
        "caption pictures/02* --num-beams 2 --max-new-tokens 4",
        "caption pictures/02* --stage both --max-new-tokens 4",
        "match pictures/02* --text a --text b",
        "embed --image pictures/02*",
    ] {
        let rows = |more: &str| world.run(&format!("{line} --format jsonl {more}")).exits(1).rows();
        let by_itself = rows("");
        assert!(by_itself.len() >= 10, "{line}");
        for batch in ["--batch-size 1", "--batch-size 3"] {
            let rows = rows(batch);
            assert_eq!(rows.len(), by_itself.len(), "{line} {batch}");
            let differ = by_itself.iter().zip(&rows).find(|(a, b)| !alike(a, b));
            assert_eq!(differ, None, "{line} {batch}");
        }
    }
}

/// Equal, numbers to a hundred-thousandth.
fn alike(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => {
            (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-5
        }
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| alike(a, b))
        }
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| alike(a, b)))
        }
        _ => a == b,
    }
}

fn finds_pictures(world: &World) {
    world.write("nested/a/one.png", &picture(5));
    world.write("nested/b/two.jpg", &picture(6));
    world.write("nested/b/note.txt", b"no picture");
    std::fs::create_dir(world.root.path().join("nested/empty")).unwrap();
    let (one, two) = ("nested/a/one.png", "nested/b/two.jpg");
    for (typed, code, expected) in [
        ("nested", 0, &[one, two][..]),
        ("nested/*/*.png nested/b", 0, &[one, two]),
        ("nest*", 0, &[one, two]),
        ("nested/?", 0, &[one, two]),
        ("gone.png nested/b", 1, &["!gone.png", two]),
        ("nested/empty nested/a", 1, &["!nested/empty", one]),
        ("gone[1].png nested/a", 1, &["!gone[1].png", one]),
        ("gone[.png nested/a", 1, &["!gone[.png", one]),
        ("nested/a nested/none*", 1, &[one, "!nested/none*"]),
    ] {
        let line = format!("caption {typed} --max-new-tokens 1 --format jsonl");
        assert_eq!(images(&world.run(&line).exits(code).rows()), expected, "{typed}");
    }
}

fn reads_the_environment(world: &World) {
    let mut command = world.program("caption nested");
    command.env("BLIP2_FORMAT", "jsonl").env("BLIP2_MAX_NEW_TOKENS", "2");
    command.env("BLIP2_NUM_BEAMS", "3").env("BLIP2_NUM_CAPTIONS", "3");
    let rows = run(&mut command).exits(0).rows();
    check_captions(&rows[0], "nested/a/one.png", 3, 2);
    // What is typed goes before; what a flag may not be, its variable may not be either.
    command.args(["--num-captions", "1"]);
    check_captions(&run(&mut command).exits(0).rows()[1], "nested/b/two.jpg", 1, 2);
    run(command.env("BLIP2_NUM_BEAMS", "0")).exits(2);
    run(world.program("caption nested").env("BLIP2_TOP_P", "2")).exits(2);

    let embed = |key: &str, value: &str| {
        let mut command = world.program("embed --format jsonl");
        run(command.env("BLIP2_IMAGE", "nested/a/one.png").env(key, value)).exits(0).rows()
    };
    let plain = embed("BLIP2_HF_PIXELS", "0");
    assert_eq!(plain.len(), 1);
    for (key, value) in [
        ("BLIP2_HF_PIXELS", "false"),
        ("BLIP2_HF_PIXELS", "no"),
        // This picture has the same pixels either way.
        ("BLIP2_HF_PIXELS", "yes"),
        ("BLIP2_BATCH_SIZE", "1"),
    ] {
        assert_eq!(embed(key, value), plain, "{key}={value}");
    }
    assert_eq!(embed("BLIP2_TEXT", "a red circle")[0]["text"], "a red circle");
}

fn samples_alike_with_the_same_seed(world: &World) {
    let sample = |more: &str| {
        let line = "caption nested --num-captions 3 --top-p 0.9 --max-new-tokens 8 --format jsonl";
        world.run(&format!("{line} {more}")).exits(0).rows()
    };
    let seventh = sample("--seed 7");
    check_captions(&seventh[0], "nested/a/one.png", 3, 8);
    assert_eq!(sample("--seed 7"), seventh);
    assert_ne!(sample("--seed 8"), seventh);
    assert_eq!(sample("--seed 0"), sample(""));
}

fn asks(world: &World) {
    let ask = |history: &[&str]| {
        let mut command = world.program("ask nested/a/one.png --max-new-tokens 4 --format jsonl");
        command.arg("what is it?");
        for turn in history {
            command.args(["--history", turn]);
        }
        run(&mut command).exits(0).rows()
    };
    let alone = ask(&[]);
    assert_eq!(alone.len(), 1);
    assert_eq!(alone[0]["image"], "nested/a/one.png");
    assert_eq!(alone[0]["question"], "what is it?");
    check_text(&alone[0], "answer", 4);
    let later = ask(&["is it red?=yes", "how many are there?=two"]);
    check_text(&later[0], "answer", 4);
    assert_ne!(later[0]["score"], alone[0]["score"], "earlier turns are read");
    let swapped = ask(&["how many are there?=two", "is it red?=yes"]);
    assert_ne!(later[0]["score"], swapped[0]["score"], "in their order");
}

fn matches(world: &World) {
    let mut command = world.program("match nested gone.png --format jsonl");
    command.args(["--text", "a red circle", "--text", "A red circle!", "--text", "two boats"]);
    let rows = run(&mut command).exits(1).rows();
    let (one, two) = ("nested/a/one.png", "nested/b/two.jpg");
    assert_eq!(images(&rows), [one, one, one, two, two, two, "!gone.png"]);
    for (row, text) in rows.iter().zip(["a red circle", "A red circle!", "two boats"].repeat(2)) {
        assert_eq!(row["text"], text);
        assert!((0.0..=1.0).contains(&row["itm"].as_f64().unwrap()), "{row}");
        assert!((-1.001..=1.001).contains(&row["itc"].as_f64().unwrap()), "{row}");
    }
    // Training saw captions in lower case without punctuation.
    for score in ["itm", "itc"] {
        let value = |row: usize| rows[row][score].as_f64().unwrap();
        assert!((value(0) - value(1)).abs() < 1e-5, "{score}: {} and {}", value(0), value(1));
        assert_ne!(value(0), value(2), "{score}");
    }
}

fn embeds(world: &World) {
    let mut command = world.program("embed --image nested/a --image gone.png --format jsonl");
    let rows = run(command.args(["--text", "a red circle"])).exits(1).rows();
    assert_eq!(rows.len(), 3);
    assert_eq!(rows[0]["text"], "a red circle");
    check_is_normalised(&rows[0]["embedding"]);
    assert_eq!(rows[1]["image"], "nested/a/one.png");
    let queries = rows[1]["embedding"].as_array().unwrap();
    assert_eq!(queries.len(), 8);
    queries.iter().for_each(check_is_normalised);
    check_error(&rows[2], "gone.png");

    // The letter is a token in any vocabulary; the bridge puts one before and one behind the text.
    let embed = |letters: usize| {
        let text = vec!["a"; letters].join(" ");
        run(world.program("embed --format jsonl").args(["--text", text.as_str()])).exits(0)
    };
    let fits = embed(22);
    assert!(!fits.err.contains("cut"), "{}", fits.err);
    let cut = embed(23);
    assert!(cut.err.contains("has 25 tokens and the model reads 24"), "{}", cut.err);
    assert_eq!(cut.rows()[0]["embedding"], fits.rows()[0]["embedding"]);
}

fn measures_itself(world: &World) {
    let line = "bench nested/a/one.png --num-beams 2 --max-new-tokens 3 --batch-size 2 --repeat 1";
    let rows = world.run(&format!("{line} --json")).exits(0).rows();
    assert_eq!(rows.len(), 1);
    let parts = rows[0]["parts"].as_array().unwrap();
    let names: Vec<&str> = parts.iter().map(|part| part["part"].as_str().unwrap()).collect();
    let (first, rest) = names.split_first().unwrap();
    assert_eq!(*first, "decode + resize");
    let models = ["image encoder", "q-former", "prefill", "decode, a token", "whole caption"];
    assert_eq!(rest, models);
    for part in &parts[1..] {
        assert!(part["flops"].as_f64().unwrap() > 0.0, "{part}");
        assert!(part["bytes"].as_f64().unwrap() > 0.0, "{part}");
    }
    // Exactly so many tokens, and those of the same search by `caption`.
    let line = "caption nested/a/one.png --num-beams 2 --format jsonl";
    let captions =
        world.run(&format!("{line} --max-new-tokens 3 --min-new-tokens 3")).exits(0).rows();
    for caption in rows[0]["captions"].as_array().unwrap() {
        assert_eq!(caption["tokens"], captions[0]["captions"][0]["tokens"]);
    }
    let text = world.run("bench --max-new-tokens 1 --repeat 1").exits(0).out;
    assert!(text.starts_with("tiny_cpu, ") && !text.contains("decode"), "{text}");
    assert!(text.ends_with("pictures a second\n"), "{text}");
    let gone = world.run("bench gone.png").exits(1);
    assert!(gone.err.contains("gone.png"), "{}", gone.err);
}

fn inspects(world: &World) {
    let rows = world.run("inspect --format jsonl").exits(0).rows();
    assert_eq!(rows.len(), 1);
    let parts = rows[0]["parts"].as_array().unwrap();
    let names: Vec<&str> = parts.iter().map(|part| part["part"].as_str().unwrap()).collect();
    assert_eq!(names, ["vision", "llm", "stage1", "stage2"]);
    for part in parts {
        let [f32, f16, q8_0, q4_k] = ["f32", "f16", "q8_0", "q4_k"]
            .map(|format| part["memory_bytes"][format].as_u64().unwrap());
        assert_eq!(f32, part["parameters"].as_u64().unwrap() * 4, "{}", part["part"]);
        assert!(f32 > f16 && f16 > q8_0, "{}", part["part"]);
        // No row of the tiny model is a multiple of 256 wide, as q4_k would need.
        assert_eq!(q4_k, q8_0, "{}", part["part"]);
    }
    assert!(world.run("inspect run/model").exits(0).out.starts_with("tiny_cpu\n"));
}

/// The model, packed, captions and matches.
fn converts(world: &World) {
    let rows = world.run("convert run/model packs/q8 --matrices q8 --format jsonl").exits(0).rows();
    assert_eq!(rows[0]["model"], "packs/q8");
    let bytes = ["stage1", "stage2"].map(|s| world.read(&format!("packs/q8/{s}.gguf")).len());
    assert_eq!(rows[0]["bytes"], bytes.iter().sum::<usize>());
    assert_eq!(world.names("packs"), ["q8"], "nothing is left beside it");
    let line = "caption nested/a --model packs/q8 --max-new-tokens 2 --format jsonl";
    check_captions(&world.run(line).exits(0).rows()[0], "nested/a/one.png", 1, 2);
    let line = "match nested/a/one.png --text circle --model packs/q8 --format jsonl";
    assert_eq!(world.run(line).exits(0).rows().len(), 1);

    // A folder that is there is not overwritten; a conversion that fails leaves nothing.
    world.run("convert run/model packs/q8 --matrices q8").exits(1);
    let mut manifest: Value = serde_json::from_slice(&world.read("packs/q8/model.json")).unwrap();
    manifest["stage2"]["weights"] = "../model.json".into();
    world.write("bad/model.json", manifest.to_string().as_bytes());
    world.run("convert bad packs/again").exits(1);
    assert_eq!(world.names("packs"), ["q8"]);
}

/// The model in Hugging Face's layout, stage by stage, and from there in ours: the same tokens and scores all the way.
fn changes_its_layout(world: &World) {
    let ran = |line: &str| world.run(&format!("{line} --format jsonl")).exits(0).rows();
    let caption = |model: &str| {
        ran(&format!("caption nested/a --prompt picture --max-new-tokens 4 --model {model}"))[0]["captions"][0]["tokens"]
            .clone()
    };
    let score = |model: &str| {
        ran(&format!("match nested/a/one.png --text circle --model {model}"))[0]["itm"].clone()
    };
    ran("convert run/model layouts/hf");
    let names = world.names("layouts/hf");
    for name in [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
    ] {
        assert!(names.iter().any(|n| n == name), "{name} is not among {names:?}");
    }
    assert_eq!(caption("layouts/hf"), caption("run/model"));
    ran("convert layouts/hf layouts/back");
    assert_eq!(ran("inspect layouts/back")[0]["parts"].as_array().unwrap().len(), 3);
    assert_eq!(caption("layouts/back"), caption("run/model"));
    ran("convert run/model layouts/matching --stage 1");
    let (there, here) = (score("layouts/matching"), score("run/model"));
    assert!((there.as_f64().unwrap() - here.as_f64().unwrap()).abs() < 1e-5, "{there} {here}");
    let refused = world.run("caption nested/a --model layouts/matching").exits(1);
    assert!(refused.err.contains("stage-2"), "{}", refused.err);
    world.run("convert layouts/hf layouts/half --stage 1 --layout hf").exits(1);
}

/// The first stage's own captions, and vectors from before the common space.
fn uses_the_first_stage(world: &World) {
    let ran = |line: &str| world.run(&format!("{line} --format jsonl")).exits(0).rows();
    let rows = ran("caption nested/a --stage 1 --max-new-tokens 3");
    check_captions(&rows[0], "nested/a/one.png", 1, 3);
    world.run("caption nested/a --stage 1 --prompt a").exits(1);
    let width = |row: &Value| row["embedding"][0].as_array().unwrap().len();
    let rows = ran("embed --image nested/a --text circle --features hidden");
    assert_eq!((rows.len(), width(&rows[0])), (2, width(&rows[1])));
    let rows = ran("embed --image nested/a --text circle --text square --features multimodal");
    let texts: Vec<_> = rows.iter().map(|row| row["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["circle", "square"]);
    assert_ne!(rows[0]["embedding"], rows[1]["embedding"]);
    world.run("embed --image nested/a --features multimodal").exits(1);
}

fn evaluates(world: &World) {
    let rows = evaluation(world);
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0]["model"], "tiny_cpu");
    assert_eq!(rows[0]["counts"]["pictures"], 2);
    let file: Value = serde_json::from_slice(&world.read("report/report.json")).unwrap();
    assert_eq!(file, rows[0]);
}

fn evaluation(world: &World) -> Vec<Value> {
    let mut command = world.program("eval --format jsonl");
    command.arg(EVAL);
    for change in [
        "out=report",
        "data.build=none",
        "data.dir=data",
        "data.features=features",
        "data.pictures=2",
        "data.train_pictures=4",
        "data.questions=1",
        "decode.num_beams=1",
        "decode.max_new_tokens=2",
        "retrieval.pairs=0",
    ] {
        command.args(["--set", change]);
    }
    run(&mut command).exits(0).rows()
}

/// Captions of both stages, the best first; a model's description may say that this is its way.
fn chooses_from_both_stages(world: &World) {
    let ran = |line: &str| world.run(&format!("{line} --format jsonl")).exits(0).rows();
    const SEARCH: &str = "--max-new-tokens 3 --num-beams 2 --num-captions 2";
    let each = |stage: &str| ran(&format!("caption nested --stage {stage} {SEARCH}"));
    let captions = |row: &Value| row["captions"].as_array().unwrap().clone();
    let text = |caption: &Value| caption["text"].as_str().unwrap().to_owned();
    let (first, second, both) = (each("1"), each("2"), each("both"));
    for ((first, second), both) in first.iter().zip(&second).zip(&both) {
        // How every caption fits, as `match` tells it; two beams' scores are log-probabilities a token.
        let written: Vec<Value> = [captions(first), captions(second)].concat();
        let candidates: Vec<_> = written.iter().map(text).collect();
        let mut command = world.program("match --format jsonl");
        command.arg(both["image"].as_str().unwrap());
        candidates.iter().for_each(|candidate| {
            command.arg("--text").arg(candidate);
        });
        let matched = run(&mut command).exits(0).rows();
        let of = |row: &Value, field: &str| row[field].as_f64().unwrap();
        let ranks = written.iter().zip(&matched).map(|(caption, row)| {
            let itm = of(row, "itm");
            of(caption, "score") + 0.5 * (itm / (1.0 - itm)).ln() + 5.0 * of(row, "itc")
        });
        let best = ranks.fold(f64::MIN, f64::max);
        let chosen = captions(both);
        let rank = |i: usize| of(&chosen[i], "rank");
        assert!((rank(0) - best).abs() < 1e-4, "{both}, not {best}");
        assert!(rank(0) >= rank(1), "{both}");
        for caption in &chosen {
            let stage = if caption["stage"] == 1 { first } else { second };
            let written: Vec<_> = captions(stage).iter().map(text).collect();
            assert!(written.contains(&text(caption)), "{caption} of {written:?}");
        }
    }
    world.run("caption nested --stage both --prompt a").exits(1);
    world.run("caption nested --stage 3").exits(2);

    let described = world.read("run/model/model.json");
    let mut manifest: Value = serde_json::from_slice(&described).unwrap();
    manifest["caption_stage"] = "both".into();
    world.write("run/model/model.json", manifest.to_string().as_bytes());
    assert_eq!(ran(&format!("caption nested {SEARCH}")), both);
    let alone = ran(&format!("caption nested {SEARCH} --batch-size 1"));
    let texts = |row: &Value| captions(row).iter().map(text).collect::<Vec<_>>();
    assert!(alone.iter().map(texts).eq(both.iter().map(texts)), "{alone:?} {both:?}");
    assert!(ran("caption nested --prompt a")[0]["captions"][0]["itm"].is_null());
    let rows = evaluation(world);
    let systems = rows[0]["systems"].as_array().unwrap().iter();
    let systems: Vec<_> = systems.map(|each| each["system"].as_str().unwrap()).collect();
    assert_eq!(systems, ["model", "second_stage", "first_stage", "nearest_neighbour", "blind"]);
    ran("convert run/model packs/both --layout blip2");
    let kept: Value = serde_json::from_slice(&world.read("packs/both/model.json")).unwrap();
    assert_eq!(kept["caption_stage"], "both");
    world.write("run/model/model.json", &described);

    // A description may not name who is not there.
    manifest["stage2"] = Value::Null;
    world.write("bad/model.json", manifest.to_string().as_bytes());
    let refused = world.run("caption nested --model bad").exits(1);
    assert!(refused.err.contains("caption_stage both"), "{}", refused.err);
}

/// As before `| head`: a reader that goes away is no failure.
fn survives_a_closed_pipe(world: &World) {
    for line in ["inspect", "caption nested --format jsonl --max-new-tokens 1"] {
        let mut command = world.program(line);
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = child.spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && !err.contains("panicked"), "{line}: {err}");
    }
}

// ---- without a model ---------------------------------------------------------------------------

#[test]
fn wrong_usage_exits_with_2_and_asks_for_no_model() {
    let world = World::new();
    for line in [
        "",
        "draw",
        "caption",
        "caption a.png --temperature 0",
        "caption a.png --top-p 0",
        "caption a.png --top-p 1.5",
        "caption a.png --length-penalty nan",
        "caption a.png --min-new-tokens 9 --max-new-tokens 8",
        "caption a.png --num-captions 6",
        "caption a.png --num-beams 3 --top-p 0.9",
        "caption a.png --length-penalty 2 --temperature 0.9",
        "caption a.png --seed 3",
        "caption a.png --top-k 0",
        "caption a.png --num-beams 3 --top-k 5",
        "ask a.png what --history odd",
        "match a.png",
        "embed",
        "inspect --device cuda",
        "inspect --weights q3",
        "pull foo",
        "convert a",
        "train",
        "train a.toml --resume=maybe",
    ] {
        let ran = world.run(line).exits(2);
        assert_eq!(ran.out, "", "{line}");
        assert!(ran.err.contains("Usage") || ran.err.contains("--help"), "{line}: {}", ran.err);
    }
    for line in ["--help", "--version", "help caption", "eval --help"] {
        assert!(!world.run(line).exits(0).out.is_empty(), "{line}");
    }
}

#[test]
fn where_nothing_typed_exists_no_model_is_asked_for() {
    let world = World::new();
    std::fs::create_dir(world.root.path().join("empty")).unwrap();
    // Loading the model would fail and name it.
    let without_model = |ran: &Ran| assert!(!ran.err.contains("--model"), "{}", ran.err);
    for verb in ["caption", "match --text a", "embed --image"] {
        let ran = world.run(&format!("{verb} gone.png --format jsonl")).exits(1);
        assert_eq!(images(&ran.rows()), ["!gone.png"], "{verb}");
        without_model(&ran);
    }
    let ran = world.run("ask gone.png what --format jsonl").exits(1);
    check_error(&ran.rows()[0], "gone.png");
    without_model(&ran);
    let ran = world.run("caption gone.png none* empty --format jsonl").exits(1);
    assert_eq!(images(&ran.rows()), ["!gone.png", "!none*", "!empty"]);
    without_model(&ran);
    let ran = world.run("caption gone.png").exits(1);
    assert_eq!(ran.out, "");
    assert!(ran.err.contains("gone.png"), "{}", ran.err);

    world.write("there.png", &picture(0));
    assert!(world.run("caption there.png").exits(1).err.contains("--model run/model"));
}

#[test]
fn what_can_not_be_made_leaves_nothing() {
    let world = World::new();
    world.run("data mini --out sets/mini --packages gone").exits(1);
    assert_eq!(world.names("sets"), [""; 0]);
    world.run("convert gone packed").exits(1);
    assert!(!world.root.path().join("packed").exists());
    world.run("train gone.toml").exits(1);
    world.run("eval gone.toml").exits(1);
}

#[cfg(unix)]
#[test]
fn ctrl_c_leaves_nothing_and_the_next_run_works() {
    let world = World::new();
    // Long enough to be stopped on any machine.
    let mut command = world.program("data mini --tiny 200000 --out sets/mini");
    let silent = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = silent.spawn().unwrap();
    wait_for_a_shard(&world.root.path().join("sets"));
    let kill = format!("kill -INT {}", child.id());
    assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(world.names("sets"), [""; 0]);
    world.run("data mini --tiny 8 --out sets/mini").exits(0);
    assert_eq!(world.names("sets"), ["mini"]);
}

/// Until the draft of a data set below `sets` has a file.
#[cfg(unix)]
fn wait_for_a_shard(sets: &std::path::Path) {
    for _ in 0..6000 {
        let drafts = std::fs::read_dir(sets).into_iter().flatten().flatten();
        let folders = drafts.filter_map(|draft| std::fs::read_dir(draft.path().join("whole")).ok());
        if folders.flatten().next().is_some() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("no draft of a shard in {} after a minute", sets.display());
}

//! Damaged model files of every kind. Each ends in an error that says where and what is wrong, within two seconds, without a
//! panic, and whatever a file asks to be run is not run.
//!
//! The named cases are what is known to go wrong; behind them 12 000 files are changed at random, from a fixed seed, and
//! whatever still opens is loaded and used.

#![allow(clippy::unwrap_used, reason = "helpers of tests, too, are tests")]

use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blip2::convert::{FrozenFiles, Parts};
use blip2::generate::{self, Options};
use blip2::image::Rgb;
use blip2::lavis::{self, HeadCounts};
use blip2::llm::{Llm, LlmDecoder};
use blip2::model::Model;
use blip2::params::{Params, read_file};
use blip2::shards;
use blip2::vit::Vit;
use blip2_ops::WeightFormat;
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

const HEADS: HeadCounts = HeadCounts { vision: Some(2), qformer: Some(4) };
/// Longer, and a file has been read in a way that it can make as slow as it likes.
const LIMIT: Duration = Duration::from_secs(2);

fn quiet(_: &str, _: u64, _: u64) {}

/// A copy of a folder of `golden/`, to be damaged.
struct Copy {
    dir: tempfile::TempDir,
}

impl Copy {
    fn of(golden: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(golden);
        copy_folder(&from, dir.path());
        Self { dir }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    fn read(&self, file: &str) -> Vec<u8> {
        std::fs::read(self.path(file)).unwrap_or_else(|err| panic!("{file}: {err}"))
    }

    fn write(&self, file: &str, bytes: &[u8]) {
        // Removed first: an old mapping of it must not change.
        let _ = std::fs::remove_file(self.path(file));
        std::fs::write(self.path(file), bytes).unwrap();
    }

    fn json(&self, file: &str) -> Value {
        serde_json::from_slice(&self.read(file)).unwrap()
    }

    /// What the folder's model does with a picture.
    fn used(&self) -> blip2::Result<()> {
        use_folder(self.dir.path())
    }
}

fn copy_folder(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let copy = to.join(path.file_name().unwrap());
        if path.is_dir() {
            std::fs::create_dir(&copy).unwrap();
            copy_folder(&path, &copy);
        } else {
            std::fs::copy(&path, copy).unwrap();
        }
    }
}

fn picture() -> Rgb {
    Rgb { width: 9, height: 7, data: (0..9 * 7 * 3).map(|i| (i * 37 % 256) as u8).collect() }
}

/// Opens a model, loads it whole, and lets it look at a picture.
fn use_folder(folder: &Path) -> blip2::Result<()> {
    let model = Model::open_folder(folder)?;
    let pictures = [picture()];
    if model.manifest.stage1.is_some() {
        let matcher = model.matcher(None, &mut quiet)?;
        matcher.score(&pictures, &["a photo of two cats.", "a dog"])?;
    }
    if model.manifest.stage2.is_some() {
        let captioner = model.captioner(None, &mut quiet)?;
        let found = captioner.generate(&pictures, &["a photo of"], &two_tokens())?;
        captioner.text(&found[0][0])?;
    }
    Ok(())
}

fn two_tokens() -> Options {
    Options { max_new_tokens: 2, ..Options::default() }
}

fn use_llm(folder: &Path) -> blip2::Result<()> {
    let (llm, tokenizer) = Llm::open(folder, None)?;
    let ids = tokenizer.encode("a photo of", true)?;
    let prompt = llm.embed(&Tensor::new(ids.as_slice(), &Device::Cpu)?.unsqueeze(0)?)?;
    let mut decoder = LlmDecoder::new(&llm, prompt, vec![vec![true; ids.len()]])?;
    generate::generate(&mut decoder, 1, &two_tokens()).map(drop)
}

fn use_encoder(path: &Path) -> blip2::Result<()> {
    let (config, weights) = lavis::vision(shards::open_file(path)?, HEADS, path)?;
    let vit = Params::build(weights, WeightFormat::F32, &path.to_string_lossy(), |p| {
        Vit::new(p, &config)
    })?;
    let side = config.image_size;
    vit.forward(&Tensor::zeros((1, 3, side, side), DType::F32, &Device::Cpu)?).map(drop)
}

/// Converts a LAVIS checkpoint to our layout, and uses that.
fn use_lavis(path: &Path, llm: Option<&str>) -> blip2::Result<()> {
    let folder = path.parent().unwrap();
    let vision = Some(folder.join("eva.pth"));
    let frozen = FrozenFiles { vision, llm: llm.map(|llm| folder.join(llm)), heads: HEADS };
    let parts = Parts::of_lavis(path, &frozen)?;
    let converted = tempfile::tempdir().unwrap();
    parts.write_folder(None, converted.path())?;
    use_folder(converted.path())
}

/// Runs `read`; it must give an error in time, and each of the words must be in its message.
fn assert_refused(what: &str, words: &[&str], read: impl FnOnce() -> blip2::Result<()>) {
    let start = Instant::now();
    let message = match read() {
        Ok(()) => panic!("{what}: nothing was refused"),
        Err(err) => err.to_string(),
    };
    assert!(start.elapsed() < LIMIT, "{what}: took {:?}", start.elapsed());
    for word in words {
        assert!(message.contains(word), "{what}: {word:?} is not in: {message}");
    }
    assert!(message.len() < 4000, "{what}: a message of {} bytes", message.len());
}

// ---- named cases: safetensors --------------------------------------------------------------------

/// The file with another header in front of the same data.
fn with_header(file: &[u8], change: &dyn Fn(&mut Value)) -> Vec<u8> {
    let len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&file[8..8 + len]).unwrap();
    change(&mut header);
    let text = header.to_string();
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &file[8 + len..]].concat()
}

/// One tensor of `opt_f32`, f32.
const TENSOR: &str = "vision_model.encoder.layers.0.mlp.fc1.weight";

#[test]
fn broken_safetensors_are_refused() {
    type Change<'a> = &'a dyn Fn(&[u8]) -> Vec<u8>;
    let length = |n: u64| move |file: &[u8]| [&n.to_le_bytes()[..], &file[8..]].concat();
    let header = |change: &'static dyn Fn(&mut Value)| move |file: &[u8]| with_header(file, change);
    let cases: [(&str, Change<'_>, &[&str]); 15] = [
        ("empty", &|_| Vec::new(), &["shorter than the length"]),
        ("no safetensors at all", &|_| b"<html>not found</html>".to_vec(), &["a header of"]),
        ("a header beyond all numbers", &length(u64::MAX), &["a header of 18446744073709551615"]),
        ("a header of 90 MB", &length(90_000_000), &["a header of 90000000"]),
        ("a header that ends early", &length(1000), &["its header"]),
        ("cut in the middle", &|file| file[..file.len() / 2].to_vec(), &["of the"]),
        ("cut by one byte", &|file| file[..file.len() - 1].to_vec(), &["of the"]),
        (
            "overlapping tensors",
            &header(&|header| {
                let len = &header[TENSOR]["data_offsets"];
                let len = len[1].as_u64().unwrap() - len[0].as_u64().unwrap();
                header[TENSOR]["data_offsets"] = json!([0, len]);
            }),
            &["invalid offset"],
        ),
        (
            "an offset behind the file",
            &header(&|header| header[TENSOR]["data_offsets"][1] = json!(1_000_000_000_000u64)),
            &[TENSOR, "1000000000000"],
        ),
        (
            "offsets that go backwards",
            &header(&|header| header[TENSOR]["data_offsets"] = json!([400, 4])),
            &[TENSOR, "400..4"],
        ),
        (
            "sizes whose sum overflows",
            &header(&|header| {
                *header = json!({});
                let size = (1u64 << 61) - 1;
                for i in 0..8 {
                    header[format!("t{i}")] = json!({"dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]});
                }
            }),
            &["tensor t0"],
        ),
        (
            "a zero in front of dimensions whose product overflows",
            &header(&|header| {
                let shape = [0u64, 1 << 40, 1 << 40];
                header["vision_model.embeddings.position_embedding"] =
                    json!({"dtype": "F32", "shape": shape, "data_offsets": [0, 0]});
            }),
            &["position_embedding", "too large to count"],
        ),
        (
            "a shape that needs other bytes",
            &header(&|header| header[TENSOR]["shape"] = json!([36, 21])),
            &["not a readable safetensors file"],
        ),
        (
            "a type of other bytes",
            &header(&|header| header[TENSOR]["dtype"] = json!("F16")),
            &["not a readable safetensors file"],
        ),
        (
            "whole numbers for weights",
            &header(&|header| header[TENSOR]["dtype"] = json!("I32")),
            &[TENSOR, "is I32; only F32, F16 and BF16 are weights"],
        ),
    ];
    for (what, change, words) in cases {
        let copy = Copy::of("hf/opt_f32");
        copy.write("model.safetensors", &change(&copy.read("model.safetensors")));
        let file = copy.path("model.safetensors");
        let words = [&[file.to_str().unwrap()], words].concat();
        assert_refused(what, &words, || copy.used());
    }
}

#[test]
fn weights_that_are_no_numbers_are_refused() {
    for (what, bits) in [("NaN", f32::NAN), ("infinity", f32::INFINITY)] {
        let copy = Copy::of("hf/opt_f32");
        let mut file = copy.read("model.safetensors");
        let last = file.len() - 4;
        file[last..].copy_from_slice(&bits.to_le_bytes());
        copy.write("model.safetensors", &file);
        let folder = copy.dir.path().to_str().unwrap();
        assert_refused(what, &[folder, "holds NaN or infinity"], || copy.used());
    }
}

#[test]
fn broken_sets_of_shards_are_refused() {
    const INDEX: &str = "model.safetensors.index.json";
    const SHARD: &str = "model-00002-of-00006.safetensors";
    let case = |what: &str, words: &[&str], damage: &dyn Fn(&Copy)| {
        let copy = Copy::of("hf/opt_f16_sharded");
        damage(&copy);
        assert_refused(what, words, || copy.used());
    };
    case("a missing shard", &[SHARD], &|copy| std::fs::remove_file(copy.path(SHARD)).unwrap());
    case("an empty shard", &[SHARD, "shorter"], &|copy| copy.write(SHARD, b""));
    case("one shard twice", &[INDEX, "is not in"], &|copy| {
        copy.write(SHARD, &copy.read("model-00001-of-00006.safetensors"));
    });
    case("an index cut short", &[INDEX, "EOF"], &|copy| {
        copy.write(INDEX, &copy.read(INDEX)[..5000]);
    });
    case("an index without a map", &[INDEX, "weight_map"], &|copy| copy.write(INDEX, b"{}"));
    case("a shard elsewhere", &[INDEX, "../../etc/passwd"], &|copy| {
        copy.write(INDEX, br#"{"weight_map": {"a": "../../etc/passwd"}}"#);
    });
    case("a configuration for a shard", &["config.json", "safetensors"], &|copy| {
        copy.write(INDEX, br#"{"weight_map": {"a": "config.json"}}"#);
    });
    case("no weights at all", &["has neither model.safetensors"], &|copy| {
        std::fs::remove_file(copy.path(INDEX)).unwrap();
    });
}

// ---- named cases: configurations -----------------------------------------------------------------

/// A field of one of a folder's files, what it becomes, and what the error says besides the folder.
type Field = (&'static str, &'static str, fn() -> Value, &'static [&'static str]);

const CONFIG: &str = "config.json";
const PIXELS: &str = "preprocessor_config.json";

#[test]
fn configurations_that_disagree_with_the_weights_are_refused() {
    let fields: &[Field] = &[
        (
            CONFIG,
            "/vision_config/hidden_size",
            || json!(22),
            &["patch_embedding", "[20, 3, 14, 14]", "[22, 588]"],
        ),
        (CONFIG, "/vision_config/intermediate_size", || json!(37), &["mlp.fc1", "37"]),
        (CONFIG, "/vision_config/num_hidden_layers", || json!(3), &["missing blocks.2"]),
        (CONFIG, "/vision_config/num_hidden_layers", || json!(1), &["unexpected blocks.1"]),
        (CONFIG, "/vision_config/patch_size", || json!(21), &["patch_embedding", "1323"]),
        (CONFIG, "/qformer_config/num_hidden_layers", || json!(6), &["missing qformer.layers.4"]),
        (CONFIG, "/qformer_config/cross_attention_frequency", || json!(2), &["cross_attn"]),
        (CONFIG, "/qformer_config/hidden_size", || json!(27), &["query_tokens", "27"]),
        (CONFIG, "/num_query_tokens", || json!(6), &["query_tokens", "6"]),
        (CONFIG, "/text_config/hidden_size", || json!(30), &["30"]),
        (CONFIG, "/text_config/vocab_size", || json!(273), &["embed_tokens", "273"]),
        (CONFIG, "/text_config/num_hidden_layers", || json!(5), &["missing blocks.2"]),
        (CONFIG, "/text_config/model_type", || json!("t5"), &["unexpected tensors"]),
        (PIXELS, "/size/height", || json!(56), &[PIXELS, "56", "42"]),
    ];
    check_fields(fields);
    // Two halves that fit their configurations, but not each other.
    let copy = Copy::of("hf/opt_f32");
    let file = copy.path("model.safetensors");
    let mut tensors = read_file(&file).unwrap();
    for name in ["language_projection.weight", "language_projection.bias"] {
        let narrow = tensors[name].narrow(0, 0, 13).unwrap();
        tensors.insert(name.into(), narrow);
    }
    candle_core::safetensors::save(&tensors.into_iter().collect(), file).unwrap();
    assert_refused("two widths", &["language model has the width 27", "bridge 13"], || copy.used());
}

#[test]
fn configurations_out_of_range_are_refused_before_anything_is_allocated() {
    let fields: &[Field] = &[
        (CONFIG, "/model_type", || json!("blip"), &[CONFIG, "model_type"]),
        (CONFIG, "/vision_config", || json!([]), &[CONFIG]),
        (CONFIG, "/vision_config/hidden_size", || json!(-1), &[CONFIG, "-1"]),
        (CONFIG, "/vision_config/hidden_size", || json!(1u64 << 63), &[CONFIG, "width"]),
        (CONFIG, "/vision_config/hidden_size", || json!("wide"), &[CONFIG, "wide"]),
        (CONFIG, "/vision_config/num_hidden_layers", || json!(1_000_000_000), &[CONFIG, "depth"]),
        (CONFIG, "/vision_config/num_hidden_layers", || json!(16_000_000), &["blocks.2"]),
        (CONFIG, "/vision_config/num_attention_heads", || json!(0), &[CONFIG, "num_heads"]),
        (CONFIG, "/vision_config/num_attention_heads", || json!(3), &["3 heads"]),
        (CONFIG, "/vision_config/patch_size", || json!(0), &[CONFIG, "patch_size 0"]),
        (CONFIG, "/vision_config/patch_size", || json!(u64::MAX), &[CONFIG, "patch_size"]),
        (CONFIG, "/vision_config/layer_norm_eps", || json!(-1.0), &["epsilon -1"]),
        (CONFIG, "/vision_config/layer_norm_eps", || json!(1e300), &["epsilon"]),
        (CONFIG, "/qformer_config/num_hidden_layers", || json!(u64::MAX), &["Q-Former", "depth"]),
        (
            CONFIG,
            "/qformer_config/hidden_size",
            || json!(1u64 << 62),
            &["width", "4611686018427387904"],
        ),
        (CONFIG, "/qformer_config/num_attention_heads", || json!(0), &["num_heads 0"]),
        (CONFIG, "/num_query_tokens", || json!(1u64 << 62), &["num_queries"]),
        (CONFIG, "/text_config", || json!(5), &[CONFIG, "text_config is 5"]),
        (CONFIG, "/text_config/num_hidden_layers", || json!(1_000_000_000), &["num_hidden_layers"]),
        (CONFIG, "/text_config/num_hidden_layers", || json!(16_000_000), &["missing blocks.2"]),
        (CONFIG, "/text_config/vocab_size", || json!(1u64 << 60), &["vocab_size"]),
        (CONFIG, "/text_config/max_position_embeddings", || json!(u64::MAX), &["max_position"]),
        (CONFIG, "/text_config/eos_token_id", || json!("</s>"), &[CONFIG, "text_config"]),
        (PIXELS, "/image_std", || json!([0.0, 1.0, 1.0]), &[PIXELS, "image_std"]),
        (PIXELS, "/image_mean", || json!([0.0, 1e300, 1.0]), &[PIXELS, "image_mean"]),
        (PIXELS, "/image_std", || json!([1.0, 1e-45, 1.0]), &[PIXELS, "image_std"]),
        (PIXELS, "/image_std", || json!([1.0]), &[PIXELS]),
        ("generation_config.json", "/pad_token_id", || json!(1u64 << 32), &["generation_config"]),
        ("generation_config.json", "/eos_token_id", || json!(4_000_000), &["no token of id"]),
        ("tokenizer.json", "/model", || json!({}), &["tokenizer.json"]),
        ("tokenizer.json", "/model/merges/0", || json!("x y"), &["tokenizer.json"]),
    ];
    check_fields(fields);
    // A picture of a million pixels a side: the weights say nothing about its size.
    let copy = Copy::of("hf/opt_f32");
    let (mut config, mut pixels) = (copy.json(CONFIG), copy.json(PIXELS));
    config["vision_config"]["image_size"] = json!(1_400_000);
    pixels["size"] = json!({"height": 1_400_000, "width": 1_400_000});
    copy.write(CONFIG, config.to_string().as_bytes());
    copy.write(PIXELS, pixels.to_string().as_bytes());
    assert_refused("a huge picture", &[CONFIG, "image_size 1400000"], || copy.used());
}

fn check_fields(fields: &[Field]) {
    for (file, pointer, value, words) in fields {
        let copy = Copy::of("hf/opt_f32");
        let mut json = copy.json(file);
        *json.pointer_mut(pointer).unwrap() = value();
        copy.write(file, json.to_string().as_bytes());
        let words = [&[copy.dir.path().to_str().unwrap()], *words].concat();
        assert_refused(&format!("{file}{pointer} = {}", value()), &words, || copy.used());
    }
}

#[test]
fn text_that_is_no_json_is_refused() {
    for file in [CONFIG, PIXELS, "generation_config.json", "tokenizer.json"] {
        let whole = Copy::of("hf/opt_f32").read(file);
        let deep = [b"{\"a\":".repeat(100_000), b"1".to_vec()].concat();
        let texts = [Vec::new(), b"\xff\xfe".to_vec(), whole[..whole.len() / 2].to_vec(), deep];
        for text in texts {
            let copy = Copy::of("hf/opt_f32");
            copy.write(file, &text);
            assert_refused(file, &[copy.path(file).to_str().unwrap()], || copy.used());
        }
    }
}

/// What the library behind `tokenizer.json` takes for granted.
#[test]
fn tokenizers_that_contradict_themselves_are_refused() {
    let precompiled = |map: &str| json!({"type": "Precompiled", "precompiled_charsmap": map});
    let cases: [(&str, Value, &str); 6] = [
        ("/normalizer", precompiled("not base64!"), "normalizer"),
        ("/normalizer", json!({"type": "Precompiled"}), "normalizer"),
        ("/normalizer", precompiled("AA=="), "tokenizer.json"),
        // A trie of one node that leads to the 4 194 303rd.
        ("/normalizer", precompiled("BAAAAP///38A"), "tables are damaged"),
        ("/post_processor/special_tokens", json!({}), "not in special_tokens"),
        (
            "/post_processor/single",
            json!([{"Sequence": {"id": "B", "type_id": 0}}]),
            "a second text",
        ),
    ];
    for (pointer, value, word) in cases {
        let copy = Copy::of("hf/t5_f16_tied");
        let mut json = copy.json("tokenizer.json");
        *json.pointer_mut(pointer).unwrap() = value;
        copy.write("tokenizer.json", json.to_string().as_bytes());
        let file = copy.path("tokenizer.json");
        assert_refused(pointer, &[file.to_str().unwrap(), word], || copy.used());
    }
    // Tables that change no character are read.
    let copy = Copy::of("hf/t5_f16_tied");
    let mut json = copy.json("tokenizer.json");
    json["normalizer"] = precompiled(&format!("ABAA{}AAA=", "AAAA".repeat(1365)));
    copy.write("tokenizer.json", json.to_string().as_bytes());
    copy.used().unwrap();

    let text = String::from_utf8(copy.read("tokenizer.json")).unwrap();
    // Half of a character, where the library parses a part for the second time.
    copy.write("tokenizer.json", text.replace('\u{2581}', "\\ud800").as_bytes());
    let file = copy.path("tokenizer.json");
    assert_refused("half a character", &[file.to_str().unwrap()], || copy.used());
}

// ---- named cases: PyTorch's files ----------------------------------------------------------------

/// A zip as `torch.save` writes it, with this pickle and a storage of 16 bytes called `0`.
fn torch_zip(pickle: &[u8]) -> Vec<u8> {
    torch_zip_of(pickle, &[0; 16])
}

fn torch_zip_of(pickle: &[u8], storage: &[u8]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let stored =
        zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in [("x/data.pkl", pickle), ("x/data/0", storage)] {
        zip.start_file(name, stored).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn opened(file: &Path) -> blip2::Result<()> {
    shards::open_file(file)?.values().try_for_each(|tensor| tensor.load().map(drop))
}

/// Programs that Python would run while it reads them. None of their names may be read, so nothing can be called; what they
/// would write is not there afterwards, and this process has no children.
#[test]
fn a_pickle_that_tries_to_run_a_command_runs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let marker = dir.path().join("it-ran");
    let touch = format!("touch {}", marker.display());
    let open = format!("open({:?}, 'w')", marker.display().to_string());
    let short =
        |text: &str| [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    let stacked = |module: &str, name: &str, argument: &str| {
        [
            b"\x80\x04".to_vec(),
            short(module),
            short(name),
            b"\x93".to_vec(),
            short(argument),
            b"\x85R.".to_vec(),
        ]
        .concat()
    };
    let programs: [(&str, Vec<u8>); 8] = [
        ("posix.system", format!("cposix\nsystem\n(S'{touch}'\ntR.").into_bytes()),
        ("os.system", format!("(S'{touch}'\nios\nsystem\n.").into_bytes()),
        ("subprocess.Popen", stacked("subprocess", "Popen", &touch)),
        ("builtins.eval", stacked("builtins", "eval", &open)),
        ("builtins.exec", format!("(cbuiltins\nexec\nS'{open}'\no.").into_bytes()),
        ("builtins.getattr", b"\x80\x02cbuiltins\ngetattr\nccollections\nOrderedDict\nX\x08\x00\x00\x00__init__\x86R.".to_vec()),
        ("torch.hub.load", stacked("torch.hub", "load", "somebody/anything")),
        ("torch.storage._load_from_bytes", stacked("torch.storage", "_load_from_bytes", "x")),
    ];
    for (name, program) in programs {
        for (layout, bytes) in [("bare", program.clone()), ("zip", torch_zip(&program))] {
            let file = dir.path().join(format!("{layout}.pth"));
            std::fs::write(&file, bytes).unwrap();
            let words = [file.to_str().unwrap(), name, "nothing of it was run"];
            assert_refused(name, &words, || opened(&file));
        }
    }
    assert!(!marker.exists());
    assert_eq!(children(), 0);
}

/// Processes whose parent is this one.
fn children() -> usize {
    let own = std::process::id().to_string();
    let Ok(processes) = std::fs::read_dir("/proc") else { return 0 };
    let stats =
        processes.flatten().filter_map(|p| std::fs::read_to_string(p.path().join("stat")).ok());
    // `pid (name) state parent …`
    stats
        .filter(|stat| {
            let behind = stat.rsplit(')').next().unwrap_or("");
            behind.split_whitespace().nth(1) == Some(&own)
        })
        .count()
}

#[test]
fn truncated_files_of_pytorch_are_refused() {
    let copy = Copy::of("lavis");
    // A zip, and pickles one behind the other.
    for name in ["eva.pth", "stage2_opt.pth"] {
        let whole = copy.read(name);
        for cut in 1..40 {
            copy.write(name, &whole[..whole.len() * cut / 40]);
            let file = copy.path(name);
            let words = [file.to_str().unwrap(), "not a readable file of PyTorch"];
            assert_refused(&format!("{cut}/40 of {name}"), &words, || opened(&file));
        }
        copy.write(name, &whole);
    }
    // A whole zip around part of a pickle.
    let pickle = tensor_pickle("FloatStorage", 0, &[2, 2], &[2, 1]);
    let file = copy.path("cut.pth");
    copy.write("cut.pth", &torch_zip(&pickle));
    opened(&file).unwrap();
    for len in 0..pickle.len() {
        copy.write("cut.pth", &torch_zip(&pickle[..len]));
        assert_refused("a cut pickle", &[file.to_str().unwrap()], || opened(&file));
    }
}

/// A dictionary with one tensor called `a`, as PyTorch pickles it.
fn tensor_pickle(class: &str, offset: i64, shape: &[i64], stride: &[i64]) -> Vec<u8> {
    let int = |n: &i64| [&[0x8a, 8], &n.to_le_bytes()[..]].concat();
    let tuple = |numbers: &[i64]| {
        [b"(".to_vec(), numbers.iter().flat_map(int).collect(), b"t".to_vec()].concat()
    };
    [
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
            .to_vec(),
        format!("ctorch\n{class}\n").into_bytes(),
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ".to_vec(),
        int(&offset),
        tuple(shape),
        tuple(stride),
        b"\x89ccollections\nOrderedDict\n)RtRs.".to_vec(),
    ]
    .concat()
}

/// What is wrong, the tensor's offset, shape and strides, and the reason given.
type Misplaced<'a> = (&'a str, i64, &'a [i64], &'a [i64], &'a str);

#[test]
fn tensors_of_pytorch_that_are_not_in_their_storage_are_refused() {
    const HUGE: i64 = i64::MAX;
    let cases: [Misplaced<'_>; 12] = [
        ("one element too many", 0, &[5], &[1], "reach out of the 4 elements"),
        ("one element too far", 1, &[4], &[1], "reach out"),
        ("behind the end", 4, &[1], &[1], "reach out"),
        ("a negative offset", -1, &[1], &[1], "has no offset"),
        ("a negative dimension", 0, &[-1], &[1], "has no shape"),
        ("strides of another number", 0, &[2, 2], &[1], "has no strides"),
        ("strides that overflow", 0, &[2, 2], &[HUGE, HUGE], "reach out"),
        ("elements that repeat", 0, &[1 << 40], &[0], "reach out"),
        ("a product that overflows", 0, &[1 << 40, 1 << 40], &[0, 0], "reach out"),
        ("nothing, far away", HUGE, &[0], &[1], "reach out"),
        (
            "nothing, of dimensions that overflow",
            0,
            &[0, 1 << 40, 1 << 40],
            &[1, 1, 1],
            "reach out",
        ),
        ("a hundred dimensions", 0, &[1; 100], &[1; 100], "has no shape"),
    ];
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.pth");
    let words = |reason| [file.to_str().unwrap(), "tensor a", reason];
    for (what, offset, shape, stride, reason) in cases {
        let pickle = tensor_pickle("FloatStorage", offset, shape, stride);
        std::fs::write(&file, torch_zip(&pickle)).unwrap();
        assert_refused(what, &words(reason), || opened(&file));
    }
    std::fs::write(&file, torch_zip(&tensor_pickle("LongStorage", 0, &[2], &[1]))).unwrap();
    assert_refused("whole numbers", &words("is Long; only"), || opened(&file));
}

/// A file of 1 MB whose 20 000 tensors are all the same transposed one, each of which would be copied.
#[test]
fn a_small_file_is_not_copied_thousands_of_times() {
    let mut pickle = tensor_pickle("FloatStorage", 0, &[512, 512], &[1, 512]);
    // Before the tensor becomes the dictionary's entry it is kept, and then made an entry again and again.
    pickle.truncate(pickle.len() - 2);
    pickle.extend(b"q\x01s");
    pickle.extend(b"X\x01\x00\x00\x00ah\x01s".repeat(20_000));
    pickle.push(b'.');
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.pth");
    std::fs::write(&file, torch_zip_of(&pickle, &vec![0; 512 * 512 * 4])).unwrap();
    let words = [file.to_str().unwrap(), "more elements than the file"];
    assert_refused("one tensor 20 000 times", &words, || opened(&file));
}

#[test]
fn a_block_of_the_largest_number_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("eva.safetensors");
    let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
    let tensors = [
        ("patch_embed.proj.weight".to_owned(), ones(&[4, 3, 2, 2])),
        ("pos_embed".to_owned(), ones(&[1, 5, 4])),
        ("blocks.0.mlp.fc1.weight".to_owned(), ones(&[8, 4])),
        (format!("blocks.{}.attn.proj.weight", usize::MAX), ones(&[4, 4])),
    ];
    candle_core::safetensors::save(&tensors.into_iter().collect(), &file).unwrap();
    assert_refused("a block", &[file.to_str().unwrap(), "depth"], || use_encoder(&file));
}

// ---- 12 000 files changed at random ----------------------------------------------------------------

/// Random numbers of a seed (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    fn of<T: Clone>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())].clone()
    }
}

/// How a folder's files are read.
#[derive(Clone, Copy, Debug)]
enum Reader {
    /// As a model in Hugging Face layout.
    Folder,
    /// As a language model in a subfolder.
    Llm(&'static str),
    /// As an image encoder of LAVIS.
    Encoder,
    /// As a checkpoint of LAVIS in front of this language model.
    Lavis(Option<&'static str>),
}

/// A folder of `golden/`, one of its files, how it is read, and how often it is damaged.
type Subject = (&'static str, &'static str, Reader, usize);

const SUBJECTS: [Subject; 28] = [
    ("hf/opt_f16_sharded", "model-00001-of-00006.safetensors", Reader::Folder, 700),
    ("hf/opt_f16_sharded", "model-00003-of-00006.safetensors", Reader::Folder, 700),
    ("hf/opt_f16_sharded", "model-00006-of-00006.safetensors", Reader::Folder, 600),
    ("hf/t5_f16_tied", "model-00003-of-00003.safetensors", Reader::Folder, 1000),
    ("hf/itm_f16", "model.safetensors", Reader::Folder, 1000),
    ("hf/opt_f16_sharded", "config.json", Reader::Folder, 1200),
    ("hf/t5_f16_tied", "config.json", Reader::Folder, 1200),
    ("hf/itm_f16", "config.json", Reader::Folder, 800),
    ("hf/llama_f16", "model.safetensors", Reader::Folder, 400),
    ("hf/llama_f16", "config.json", Reader::Folder, 600),
    ("hf/opt_f16_sharded", "preprocessor_config.json", Reader::Folder, 300),
    ("hf/opt_f16_sharded", "generation_config.json", Reader::Folder, 200),
    ("hf/t5_f16_tied", "generation_config.json", Reader::Folder, 200),
    ("hf/opt_f16_sharded", "tokenizer.json", Reader::Folder, 500),
    ("hf/t5_f16_tied", "tokenizer.json", Reader::Folder, 500),
    ("hf/itm_f16", "tokenizer.json", Reader::Folder, 500),
    ("hf/opt_f16_sharded", "model.safetensors.index.json", Reader::Folder, 200),
    ("hf/t5_f16_tied", "model.safetensors.index.json", Reader::Folder, 200),
    ("lavis", "eva.pth", Reader::Encoder, 600),
    ("lavis", "clip.pth", Reader::Encoder, 400),
    ("lavis", "opt/pytorch_model.bin", Reader::Llm("opt"), 400),
    ("lavis", "opt/config.json", Reader::Llm("opt"), 200),
    ("lavis", "opt/vocab.json", Reader::Llm("opt"), 100),
    ("lavis", "t5/pytorch_model-00003-of-00003.bin", Reader::Llm("t5"), 300),
    ("lavis", "t5/pytorch_model.bin.index.json", Reader::Llm("t5"), 100),
    ("lavis", "stage1_finetuned.pth", Reader::Lavis(None), 100),
    ("lavis", "stage2_opt.pth", Reader::Lavis(Some("opt")), 100),
    ("lavis", "stage2_t5.pth", Reader::Lavis(Some("t5")), 100),
];

impl Reader {
    fn read(self, folder: &Path, file: &str) -> blip2::Result<()> {
        match self {
            Self::Folder => use_folder(folder),
            Self::Llm(inner) => use_llm(&folder.join(inner)),
            Self::Encoder => use_encoder(&folder.join(file)),
            Self::Lavis(llm) => use_lavis(&folder.join(file), llm),
        }
    }
}

/// What became of a damaged file.
struct Outcome {
    subject: Subject,
    number: usize,
    took: Duration,
    end: std::thread::Result<blip2::Result<()>>,
}

impl Outcome {
    fn describe(&self) -> String {
        let end = match &self.end {
            Ok(Ok(())) => "it was read".into(),
            Ok(Err(err)) => err.to_string(),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or(panic.downcast_ref::<&str>().copied());
                format!("PANIC: {}", text.unwrap_or("?"))
            }
        };
        let (folder, file, ..) = self.subject;
        format!("{folder}/{file}, number {}, {:?}: {end}", self.number, self.took)
    }
}

#[test]
fn twelve_thousand_damaged_files_end_in_time_and_without_a_panic() {
    assert!(SUBJECTS.iter().map(|subject| subject.3).sum::<usize>() >= 12_000);
    let threads = std::thread::available_parallelism().map_or(2, usize::from).min(4);
    let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
        let workers: Vec<_> =
            (0..threads).map(|own| scope.spawn(move || damage(own, threads))).collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    });
    let refused = outcomes.iter().filter(|o| matches!(o.end, Ok(Err(_)))).count();
    let bad: Vec<String> = outcomes
        .iter()
        .filter(|o| o.end.is_err() || o.took > LIMIT)
        .map(Outcome::describe)
        .collect();
    assert!(bad.is_empty(), "{} of {}:\n{}", bad.len(), outcomes.len(), bad.join("\n"));
    // Neither is everything harmless, nor does the first check refuse all.
    let read = outcomes.len() - refused;
    assert!(refused > 6000 && read > 1000, "{refused} were refused, {read} were read");
    assert_eq!(children(), 0);
}

/// Every `step`th damaged file, from the one of number `first` on.
fn damage(first: usize, step: usize) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    let mut copy = ("", None);
    for (i, subject) in SUBJECTS.into_iter().enumerate() {
        let (golden, file, reader, count) = subject;
        if copy.0 != golden {
            copy = (golden, Some(Copy::of(golden)));
        }
        let Some(folder) = &copy.1 else { continue };
        let whole = folder.read(file);
        for number in (first..count).step_by(step) {
            let mut random = Random((i as u64) << 32 | number as u64);
            folder.write(file, &changed(&whole, file, &mut random));
            let start = Instant::now();
            let end = catch_unwind(AssertUnwindSafe(|| reader.read(folder.dir.path(), file)));
            outcomes.push(Outcome { subject, number, took: start.elapsed(), end });
        }
        folder.write(file, &whole);
    }
    outcomes
}

fn changed(whole: &[u8], file: &str, random: &mut Random) -> Vec<u8> {
    if file.ends_with(".json") && random.below(4) > 0 {
        let mut value = serde_json::from_slice(whole).unwrap();
        for _ in 0..1 + random.below(2) {
            change_value(&mut value, random);
        }
        return value.to_string().into_bytes();
    }
    let mut bytes = whole.to_vec();
    for _ in 0..1 + random.below(3) {
        change_bytes(&mut bytes, random);
    }
    bytes
}

/// A place in the file: mostly where it says what there is, which is in front, and in a zip at the end, too.
fn place(bytes: &[u8], random: &mut Random) -> usize {
    let len = bytes.len();
    let header = match bytes.first_chunk::<8>() {
        Some(n) if bytes.get(8) == Some(&b'{') => 8 + u64::from_le_bytes(*n).min(1 << 20) as usize,
        _ => len / 4,
    };
    match random.below(8) {
        0 => random.below(len),
        1 => random.below(16.min(len)),
        2 | 3 if bytes.starts_with(b"PK") => len - 1 - random.below(len.div_ceil(4)),
        _ => random.below(header.min(len)),
    }
}

fn change_bytes(bytes: &mut Vec<u8>, random: &mut Random) {
    const NUMBERS: [&str; 9] =
        ["0", "1", "-1", "1e18", "9223372036854775808", "18446744073709551615", "65536", "1.5", ""];
    const WORDS: [u64; 8] =
        [0, 1, u64::MAX, 1 << 63, 1 << 40, 0x7fc0_0000, 0x7f80_0000, 0xffff_ffff];
    if bytes.is_empty() {
        return;
    }
    let at = place(bytes, random);
    let end = (at + 1 + random.below(64)).min(bytes.len());
    match random.below(10) {
        0 => bytes[at] = random.next() as u8,
        1 => bytes[at] ^= 1 << random.below(8),
        2 => bytes.truncate(at),
        3 => {
            let new: Vec<u8> = (0..1 + random.below(16)).map(|_| random.next() as u8).collect();
            bytes.splice(at..at, new);
        }
        4 => drop(bytes.drain(at..end)),
        5 => {
            let range = bytes[at..end].to_vec();
            bytes.splice(at..at, range);
        }
        6 => {
            let (a, b) = (at, place(bytes, random));
            for i in 0..(end - at).min(bytes.len() - b) {
                bytes.swap(a + i, b + i);
            }
        }
        7 => {
            let word = random.of(&WORDS).to_le_bytes();
            let len = random.of(&[1, 2, 4, 8]).min(bytes.len() - at);
            bytes[at..at + len].copy_from_slice(&word[..len]);
        }
        _ => {
            // The next number that is written out becomes another.
            let from = bytes[at..].iter().position(u8::is_ascii_digit).map_or(at, |i| at + i);
            let digits = bytes[from..].iter().take_while(|b| b.is_ascii_digit()).count();
            bytes.splice(from..from + digits, random.of(&NUMBERS).bytes());
        }
    }
}

fn change_value(value: &mut Value, random: &mut Random) {
    let mut places = vec![String::new()];
    list_places(value, "", &mut places);
    let pointer = random.of(&places);
    if random.below(6) == 0 {
        remove(value, &pointer);
        return;
    }
    let new = [
        json!(0),
        json!(-1),
        json!(1),
        json!(2),
        json!(3),
        json!(64),
        json!(65_536),
        json!(1 << 24),
        json!(1_000_000_000),
        json!(1_000_000_000_000_000_000u64),
        json!(1u64 << 63),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(0.5),
        json!(-0.5),
        json!(1e-45),
        json!(1e18),
        json!(1e300),
        json!(""),
        json!("x"),
        json!("\u{0}"),
        json!("[UNK]"),
        json!(null),
        json!(true),
        json!(false),
        json!([]),
        json!({}),
        json!([1, 2]),
        json!([[0, 1]]),
        json!({"type": "x"}),
    ];
    if let Some(place) = value.pointer_mut(&pointer) {
        *place = match place.as_u64() {
            // One more or less is as wrong as a billion, and less easily seen.
            Some(n) if random.below(4) == 0 => {
                json!(n.saturating_add(2).saturating_sub(random.of(&[1, 3])))
            }
            _ => random.of(&new),
        };
    }
}

/// JSON pointers of every value within `value`.
fn list_places(value: &Value, pointer: &str, places: &mut Vec<String>) {
    let mut enter = |key: &str, inner: &Value| {
        let pointer = format!("{pointer}/{}", key.replace('~', "~0").replace('/', "~1"));
        list_places(inner, &pointer, places);
        places.push(pointer);
    };
    match value {
        Value::Object(map) => map.iter().for_each(|(key, inner)| enter(key, inner)),
        Value::Array(list) => {
            list.iter().enumerate().for_each(|(i, inner)| enter(&i.to_string(), inner));
        }
        _ => {}
    }
}

fn remove(value: &mut Value, pointer: &str) {
    let Some((parent, key)) = pointer.rsplit_once('/') else { return };
    let key = key.replace("~1", "/").replace("~0", "~");
    match value.pointer_mut(parent) {
        Some(Value::Object(map)) => drop(map.shift_remove(&key)),
        Some(Value::Array(list)) => {
            if let Some(i) = key.parse().ok().filter(|i| *i < list.len()) {
                list.remove(i);
            }
        }
        _ => {}
    }
}

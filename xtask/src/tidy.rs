//! The rules of this repository that no compiler, formatter or linter knows. Each says what it is for when it fails.
//!
//! [`violations`] is a pure function of the files, so every rule is tested on made-up ones below. Strings that must
//! not appear anywhere, this file included, are put together from pieces.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// A file of the repository.
struct File {
    /// From the root, with `/`.
    path: String,
    size: u64,
    /// `None` if it is not UTF-8.
    text: Option<String>,
}

const MIB: u64 = 1 << 20;

/// Which module of the library may use which others, lowest first. Models never import each other, `nn` knows no
/// model, `generate` knows ids but neither pictures nor text. `params` hands out `nn`'s layers and `nn` reads
/// `params`: the two are one layer.
const LIBRARY_ORDER: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("stored", &["error"]),
    ("pickle", &[]),
    ("pth", &["error", "pickle", "stored"]),
    ("shards", &["error", "pth", "stored"]),
    ("params", &["error", "nn", "stored"]),
    ("nn", &["error", "params"]),
    ("onnx", &["error"]),
    ("vit_onnx", &["error", "onnx"]),
    ("assets", &["error", "vit_onnx"]),
    ("checkpoint", &["error", "params"]),
    ("image", &["error"]),
    ("tokenizer", &["error"]),
    ("vit", &["error", "nn", "params"]),
    ("qformer", &["error", "nn", "params"]),
    ("llama", &["error", "nn", "params", "stored"]),
    ("opt", &["error", "nn", "params"]),
    ("t5", &["error", "nn", "params"]),
    ("generate", &["error"]),
    (
        "llm",
        &[
            "error",
            "nn",
            "stored",
            "shards",
            "params",
            "checkpoint",
            "tokenizer",
            "llama",
            "opt",
            "t5",
            "generate",
        ],
    ),
    ("stage1", &["error", "generate", "nn", "params", "qformer"]),
    ("stage2", &["error", "nn", "params", "qformer"]),
    (
        "hf",
        &[
            "error",
            "nn",
            "stored",
            "shards",
            "checkpoint",
            "image",
            "tokenizer",
            "vit",
            "qformer",
            "stage1",
            "stage2",
        ],
    ),
    (
        "model",
        &[
            "error",
            "nn",
            "stored",
            "shards",
            "params",
            "hf",
            "assets",
            "image",
            "tokenizer",
            "vit",
            "generate",
            "llm",
            "stage1",
            "stage2",
        ],
    ),
    ("choice", &["error", "generate", "model", "stage1"]),
    ("mini", &["error", "model"]),
    ("pack", &["error", "params", "stored", "model"]),
    // A cache of folders by name; what is in them is nothing to it.
    ("hub", &["assets", "error", "shards"]),
    ("lavis", &["error", "stored", "checkpoint", "vit", "qformer", "stage1", "stage2"]),
    ("weights_out", &["error", "stored"]),
    (
        "convert",
        &[
            "error",
            "nn",
            "stored",
            "shards",
            "checkpoint",
            "assets",
            "image",
            "tokenizer",
            "vit",
            "llama",
            "llm",
            "stage1",
            "stage2",
            "lavis",
            "model",
            "weights_out",
        ],
    ),
];

/// The same for those modules of `blip2-train` that must stay apart; the others need only be free of cycles.
const TRAIN_ORDER: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("rng", &[]),
    // Losses are pure functions of tensors.
    ("losses", &["error", "rng"]),
    ("packed", &["error", "losses"]),
    ("steps", &["error", "rng", "losses", "packed"]),
    ("data", &["error", "rng"]),
    ("optim", &["error"]),
    ("schedule", &["error"]),
    ("log", &["error"]),
    // The loop knows neither models nor data nor evaluation: it is given steps.
    ("trainer", &["error", "checkpoint", "log", "optim", "order", "recipe", "rng", "schedule"]),
];

/// Text that must not appear.
struct Ban {
    needle: String,
    /// Files it is looked for in.
    within: fn(&str) -> bool,
    /// Whether comments are free to name it.
    code_only: bool,
    why: &'static str,
}

fn bans() -> Vec<Ban> {
    let rust: fn(&str) -> bool = |path| path.ends_with(".rs");
    let code = |needle: &str, within, why| Ban {
        needle: needle.replace('|', ""),
        within,
        code_only: true,
        why,
    };
    let anywhere = |needle: String, why| Ban {
        needle,
        within: |path| path != "Cargo.lock",
        code_only: false,
        why,
    };
    let mut all = vec![
        code("candle|_nn", rust, "many of its functions stop gradients silently: use blip2_ops"),
        code("candle|_transformers", rust, "its models can't be trained: write our own"),
        code("softmax|_last_dim", library, "forward only: use blip2_ops"),
        code("_no|_bwd", library, "forward only: gradients would stop there silently"),
        code("QMat|Mul", library, "forward only: use blip2_ops::frozen_linear"),
        code(
            ".mat|mul(",
            |path| library(path) && !path.starts_with("crates/blip2-ops/"),
            "its backward pass computes gradients of frozen weights too: use blip2_ops::linear or frozen_linear",
        ),
        code("thread|_rng", rust, "a run is a function of its seed: pass a generator"),
        code("rand::|rng", rust, "a run is a function of its seed: pass a generator"),
        code("to|do!", rust, "finish it or leave it out"),
        code("unimpl|emented!", rust, "finish it or leave it out"),
        code("db|g!(", rust, "left over from debugging"),
        code("#[ig|nore", rust, "a test runs, or says aloud that it skips"),
        code(
            "env::|var",
            |path| {
                library(path)
                    && path != "crates/blip2/src/assets.rs"
                    && !path.starts_with("crates/blip2-cli/")
            },
            "a library takes arguments; only the program and the cache read the environment",
        ),
    ];
    for dir in ["root", "home", "work", "tmp", "Users"] {
        all.push(anywhere(format!("/{dir}/"), "a path of one machine"));
    }
    let hosts: [&[&str]; 7] = [
        &["pypi", "org"],
        &["pythonhosted", "org"],
        &["crates", "io"],
        &["npmjs", "com"],
        &["npmjs", "org"],
        &["deb", "debian", "org"],
        &["registry", "yarnpkg", "com"],
    ];
    for host in hosts {
        all.push(anywhere(
            host.join("."),
            "packages come through their clients, set up by the user",
        ));
    }
    for mark in ["<", ">"] {
        all.push(anywhere(format!("\n{} ", mark.repeat(7)), "an unsolved merge"));
    }
    all
}

/// Whether `path` is source of the libraries or the program, not a test or tool.
fn library(path: &str) -> bool {
    path.starts_with("crates/") && path.contains("/src/") && path.ends_with(".rs")
}

/// Checks the repository at `root`.
pub(crate) fn run(root: &Path) -> Result<()> {
    let files = read(root)?;
    let found = violations(&files);
    for line in &found {
        eprintln!("{line}");
    }
    if !found.is_empty() {
        bail!("{} violations in {} files", found.len(), files.len());
    }
    eprintln!("{} files", files.len());
    Ok(())
}

/// Every file that git tracks or would add.
fn read(root: &Path) -> Result<Vec<File>> {
    let output = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()
        .context("git can't be started")?;
    if !output.status.success() {
        bail!("git ls-files: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let names = String::from_utf8(output.stdout).context("a file name is not UTF-8")?;
    let mut files = Vec::new();
    for path in names.split('\0').filter(|name| !name.is_empty()) {
        // Deleted, but not yet in a commit; or a link that leads nowhere.
        let Ok(bytes) = std::fs::read(root.join(path)) else { continue };
        let size = bytes.len() as u64;
        files.push(File { path: path.into(), size, text: String::from_utf8(bytes).ok() });
    }
    Ok(files)
}

/// What is wrong, one line each.
fn violations(files: &[File]) -> Vec<String> {
    let mut found = Vec::new();
    let bans = bans();
    for file in files {
        banned_text(file, &bans, &mut found);
        opening(file, &mut found);
        size(file, &mut found);
    }
    dependencies(files, &mut found);
    total_size(files, &mut found);
    order(files, "blip2", LIBRARY_ORDER, true, &mut found);
    order(files, "blip2-train", TRAIN_ORDER, false, &mut found);
    order(files, "blip2-ops", &[], false, &mut found);
    found
}

fn banned_text(file: &File, bans: &[Ban], found: &mut Vec<String>) {
    let Some(text) = &file.text else { return };
    let code = if file.path.ends_with(".rs") { without_comments(text) } else { text.clone() };
    for ban in bans.iter().filter(|ban| (ban.within)(&file.path)) {
        let text = if ban.code_only { &code } else { text };
        for (at, _) in text.match_indices(&ban.needle) {
            // A folder at the root means a path of a machine only where a path begins.
            let before = text[..at].chars().next_back().unwrap_or(' ');
            if ban.needle.starts_with('/')
                && (before.is_alphanumeric() || "._~}-/".contains(before))
            {
                continue;
            }
            let line = 1 + text[..at].matches('\n').count();
            let needle = ban.needle.trim();
            found.push(format!("{}:{line}: {needle}: {}", file.path, ban.why));
        }
    }
}

/// The code with `//` comments blanked; line numbers stay. A `//` in a string cuts that line short, which can only
/// hide something, and hides nothing that clippy does not see.
fn without_comments(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or_default().to_owned() + "\n").collect()
}

/// Every source file opens with what it is.
fn opening(file: &File, found: &mut Vec<String>) {
    let Some(text) = &file.text else { return };
    let (is_right, wanted) = match file.path.rsplit_once('.').map(|(_, ext)| ext) {
        Some("rs") => (text.starts_with("//!"), "`//!` and what it is"),
        Some("py") => (text.starts_with("\"\"\"") || text.starts_with("#!"), "a doc string"),
        Some("toml") if file.path.starts_with("recipes/") => {
            (text.starts_with('#'), "a comment: its command, cost and result")
        }
        _ => return,
    };
    if !is_right {
        found.push(format!("{}:1: should open with {wanted}", file.path));
    }
}

fn size(file: &File, found: &mut Vec<String>) {
    let limit = match file.path.split('/').next() {
        Some("golden") => MIB,
        Some("models") => 32 * MIB,
        _ => 4 * MIB,
    };
    if file.size > limit {
        found.push(format!("{}: {} bytes, at most {limit}", file.path, file.size));
    }
}

fn total_size(files: &[File], found: &mut Vec<String>) {
    for (folder, limit) in [("models/", 32 * MIB), ("golden/", 6 * MIB)] {
        let total: u64 = files.iter().filter(|f| f.path.starts_with(folder)).map(|f| f.size).sum();
        if total > limit {
            found.push(format!("{folder}: {total} bytes in all, at most {limit}"));
        }
    }
}

/// Crates that must not come in, not even through others.
fn dependencies(files: &[File], found: &mut Vec<String>) {
    let Some(lock) = files.iter().find(|f| f.path == "Cargo.lock") else { return };
    for name in ["candle-nn", "candle-transformers"] {
        if lock.text.iter().any(|text| text.contains(&format!("name = \"{name}\""))) {
            found.push(format!("Cargo.lock: {name}: its layers stop gradients silently"));
        }
    }
}

/// The order of the modules of one crate: those in `table` use only what it says, and there are no cycles.
/// With `complete`, every module must be in the table.
fn order(
    files: &[File],
    krate: &str,
    table: &[(&str, &[&str])],
    complete: bool,
    found: &mut Vec<String>,
) {
    let base = format!("crates/{krate}/src/");
    let mut graph = BTreeMap::<String, BTreeSet<String>>::new();
    for file in files.iter().filter(|f| f.path.starts_with(&base) && f.path.ends_with(".rs")) {
        let inside = &file.path[base.len()..];
        let module = inside.split('/').next().unwrap_or(inside).trim_end_matches(".rs");
        if module == "lib" {
            continue;
        }
        let uses = uses(file.text.as_deref().unwrap_or_default());
        let Some((_, may)) = table.iter().find(|(name, _)| *name == module) else {
            if complete {
                found.push(format!(
                    "{}: module {module} has no place in the order of xtask/src/tidy.rs",
                    file.path
                ));
            }
            graph.entry(module.into()).or_default().extend(uses);
            continue;
        };
        for used in uses.iter().filter(|used| *used != module && !may.contains(&used.as_str())) {
            found.push(format!("{}: {module} must not use {used}", file.path));
        }
        graph.entry(module.into()).or_default().extend(uses);
    }
    // The one pair that is one layer.
    if let Some(params) = graph.get_mut("params") {
        params.remove("nn");
    }
    if let Some(cycle) = cycle(&graph) {
        found.push(format!("{base}: modules use each other in a circle: {}", cycle.join(" → ")));
    }
}

/// The first-level modules of its own crate that the code in `text` uses; tests at its end may use what they like.
fn uses(text: &str) -> BTreeSet<String> {
    let code = without_comments(text);
    let code = code.split("#[cfg(test)]").next().unwrap_or_default();
    let mut all = BTreeSet::new();
    for (at, pattern) in code.match_indices("crate::") {
        let before = code[..at].chars().next_back().unwrap_or(' ');
        if before.is_alphanumeric() || before == '_' {
            continue;
        }
        let rest = &code[at + pattern.len()..];
        match rest.strip_prefix('{') {
            None => all.extend(module_of(rest)),
            Some(group) => all.extend(group_items(group).iter().filter_map(|i| module_of(i))),
        }
    }
    all
}

/// What stands between commas up to the brace that closes the group, braces within left alone.
fn group_items(group: &str) -> Vec<String> {
    let (mut depth, mut items) = (0, vec![String::new()]);
    for c in group.chars() {
        match c {
            '}' if depth == 0 => break,
            ',' if depth == 0 => {
                items.push(String::new());
                continue;
            }
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if let Some(item) = items.last_mut() {
            item.push(c);
        }
    }
    items
}

/// The module that a path within the crate goes through. What the root re-exports is from `error`.
fn module_of(path: &str) -> Option<String> {
    let path = path.trim_start();
    let end = path.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(path.len());
    let name = &path[..end];
    let first = name.chars().next()?;
    Some(if first.is_uppercase() { "error".into() } else { name.into() })
}

/// A circle of modules, the first one repeated at the end.
fn cycle(graph: &BTreeMap<String, BTreeSet<String>>) -> Option<Vec<String>> {
    fn visit<'a>(
        node: &'a str,
        graph: &'a BTreeMap<String, BTreeSet<String>>,
        path: &mut Vec<&'a str>,
        done: &mut BTreeSet<&'a str>,
    ) -> Option<Vec<String>> {
        if let Some(start) = path.iter().position(|p| *p == node) {
            return Some(path[start..].iter().chain([&node]).map(|s| (*s).to_owned()).collect());
        }
        if !done.contains(node) {
            path.push(node);
            for next in graph.get(node).into_iter().flatten().filter(|next| *next != node) {
                let found = visit(next, graph, path, done);
                if found.is_some() {
                    return found;
                }
            }
            path.pop();
            done.insert(node);
        }
        None
    }
    let mut done = BTreeSet::new();
    graph.keys().find_map(|node| visit(node, graph, &mut Vec::new(), &mut done))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: &str) -> File {
        File { path: path.into(), size: text.len() as u64, text: Some(text.into()) }
    }

    /// The violations of one file, `|` taken out of its text.
    fn check(path: &str, text: &str) -> Vec<String> {
        violations(&[file(path, &text.replace('|', ""))])
    }

    const MODEL: &str = "crates/blip2/src/vit.rs";

    #[test]
    fn a_tidy_file_passes() {
        let text = "//! The encoder.\nuse crate::{Error, Result, nn::{Linear, Mlp}};\nuse crate::params::Params;\n";
        assert_eq!(check(MODEL, text), [""; 0]);
    }

    #[test]
    fn forbidden_calls_are_found_with_their_line() {
        for code in [
            "candle|_nn::ops::softmax(x)",
            "candle|_transformers::models::bert::x()",
            "softmax|_last_dim(x)",
            "x.apply_op1_no|_bwd(&op)",
            "QMat|Mul::from_qtensor(w)",
            "x.mat|mul(&y)",
            "rand::thread|_rng()",
            "rand::|rng()",
            "to|do!()",
            "unimpl|emented!()",
            "db|g!(x)",
            "std::env::|var(\"HOME\")",
            "std::env::|var_os(\"HOME\")",
        ] {
            let found = check(MODEL, &format!("//! Model.\n\nfn f() {{ {code} }}\n"));
            assert!(!found.is_empty(), "{code}");
            assert!(found[0].starts_with("crates/blip2/src/vit.rs:3: "), "{found:?}");
        }
        let found = check("crates/blip2/tests/a.rs", "//! Laws.\n#[test]\n#[ig|nore]\nfn f() {}\n");
        assert_eq!(found.len(), 1, "{found:?}");
    }

    #[test]
    fn comments_may_name_what_code_may_not() {
        assert_eq!(check(MODEL, "//! Not `candle|_nn`, and no `mat|mul(`.\n"), [""; 0]);
    }

    #[test]
    fn some_places_may_do_what_others_may_not() {
        assert_eq!(check("crates/blip2-ops/src/linear.rs", "//! Op.\nx.mat|mul(y)\n"), [""; 0]);
        assert_eq!(check("crates/blip2-cli/src/main.rs", "//! It.\nenv::|var(\"A\")\n"), [""; 0]);
        assert_eq!(check("crates/blip2/src/assets.rs", "//! It.\nenv::|var(\"A\")\n"), [""; 0]);
        assert_eq!(check("crates/blip2/tests/a.rs", "//! It.\nenv::|var(\"A\")\n"), [""; 0]);
    }

    #[test]
    fn machine_paths_and_hosts_are_found_in_any_text() {
        for text in [
            "see /ro|ot/x",
            "\"/ho|me/me/a\"",
            "cd /wo|rk/main",
            "=/t|mp/a",
            "https://py|pi.org/simple",
            "index.crates|.io",
            "registry.npm|js.org",
            "http://deb|.debian.org/debian",
        ] {
            assert_eq!(check("README.md", text).len(), 1, "{text}");
        }
        for text in ["buildings/ho|me/house", "$HOME/wo|rk/x", "~/t|mp/x", "homework"] {
            assert_eq!(check("README.md", text), [""; 0], "{text}");
        }
        assert_eq!(check("Cargo.lock", "registry+https://x/crates|.io-index"), [""; 0]);
    }

    #[test]
    fn unsolved_merges_are_found() {
        assert_eq!(check("README.md", "a\n<<<|<<<< HEAD\nb\n").len(), 1);
    }

    #[test]
    fn files_open_with_what_they_are() {
        assert_eq!(check("xtask/src/x.rs", "use std::fs;\n").len(), 1);
        assert_eq!(check("golden/x.py", "import torch\n").len(), 1);
        assert_eq!(check("golden/x.py", "\"\"\"Golden.\"\"\"\n"), [""; 0]);
        assert_eq!(check("recipes/x.toml", "[model]\n").len(), 1);
        assert_eq!(check("recipes/x.toml", "# blip2 train recipes/x.toml\n"), [""; 0]);
    }

    #[test]
    fn sizes_have_limits() {
        let sized = |path: &str, size| File { path: path.into(), size, text: None };
        let count = |files: &[File]| violations(files).len();
        assert_eq!(count(&[sized("examples/a.jpg", 4 * MIB)]), 0);
        assert_eq!(count(&[sized("examples/a.jpg", 4 * MIB + 1)]), 1);
        assert_eq!(count(&[sized("golden/a.safetensors", MIB + 1)]), 1);
        assert_eq!(count(&[sized("models/mini/a.gguf", 16 * MIB)]), 0);
        let two = [sized("models/mini/a.gguf", 16 * MIB), sized("models/mini/b.gguf", 17 * MIB)];
        assert_eq!(count(&two), 1, "32 MiB in all");
        let many: Vec<_> = (0..7).map(|i| sized(&format!("golden/{i}"), MIB)).collect();
        assert_eq!(count(&many), 1, "6 MiB in all");
    }

    #[test]
    fn banned_crates_are_found_behind_others() {
        let lock = "[[package]]\nname = \"candle-nn\"\nversion = \"0.11.1\"\n";
        assert_eq!(check("Cargo.lock", lock).len(), 1);
        assert_eq!(check("Cargo.lock", &lock.replace("-nn", "-core")), [""; 0]);
    }

    #[test]
    fn modules_keep_their_order() {
        for (path, line, bad) in [
            (MODEL, "use crate::qformer::QFormer;", "vit must not use qformer"),
            (MODEL, "let x = crate::llama::Llama::new();", "vit must not use llama"),
            ("crates/blip2/src/nn/mask.rs", "use crate::vit::Vit;", "nn must not use vit"),
            (
                "crates/blip2/src/generate.rs",
                "use crate::{Result, tokenizer::Tokenizer};",
                "generate must not use tokenizer",
            ),
            (
                "crates/blip2/src/generate.rs",
                "use crate::{nn::{A, B}, vit};",
                "generate must not use vit",
            ),
            (
                "crates/blip2-train/src/losses/itc.rs",
                "use crate::data::Sample;",
                "losses must not use data",
            ),
            (
                "crates/blip2-train/src/trainer.rs",
                "use crate::eval::Report;",
                "trainer must not use eval",
            ),
        ] {
            let found = check(path, &format!("//! It.\n{line}\n"));
            assert!(found.iter().any(|f| f == &format!("{path}: {bad}")), "{line}: {found:?}");
        }
    }

    #[test]
    fn tests_and_comments_may_use_anything() {
        let text =
            "//! See [`crate::qformer`].\n#[cfg(test)]\nmod tests {\n use crate::llama::X;\n}\n";
        assert_eq!(check(MODEL, text), [""; 0]);
    }

    #[test]
    fn a_module_without_a_place_is_found() {
        let found = check("crates/blip2/src/blob.rs", "//! It.\n");
        assert!(found[0].contains("blob has no place"), "{found:?}");
    }

    #[test]
    fn circles_are_found() {
        let a = file("crates/blip2-train/src/a.rs", "//! A.\nuse crate::b::B;\n");
        let b = file("crates/blip2-train/src/b/mod.rs", "//! B.\nuse crate::c::C;\n");
        let c = file("crates/blip2-train/src/c.rs", "//! C.\nuse crate::{Error, a};\n");
        let found = violations(&[a, b, c]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].ends_with("a → b → c → a"), "{found:?}");
    }
}

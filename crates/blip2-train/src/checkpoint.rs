//! Training checkpoints that are either whole or not there.
//!
//! ```text
//! checkpoints/step-00001234/weights.safetensors     the trained tensors
//!                           optimizer.safetensors   AdamW's averages
//!                           state.json              counters: everything else a run needs to go on
//!                           manifest.json           size and sha256 of the three
//! ```
//!
//! A checkpoint is written to a hidden folder, every file and the folder are flushed to the disk, and one rename makes
//! it visible: a reader, or a run started after `kill -9`, sees a whole checkpoint or none. Loading checks every byte
//! against the manifest and falls back, with a warning, to the newest checkpoint that is sound. This file knows bytes
//! and folders; what the tensors mean is the trainer's business.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use blip2::pack::make_readable;
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// The trained tensors' file inside a checkpoint.
pub const WEIGHTS: &str = "weights.safetensors";
/// The optimiser's file inside a checkpoint.
pub const OPTIMIZER: &str = "optimizer.safetensors";
/// The counters' file inside a checkpoint.
pub const STATE: &str = "state.json";
const MANIFEST: &str = "manifest.json";
const FORMAT: u32 = 1;

/// Everything of a run that is not a tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainState {
    /// Steps done; the next step has this number.
    pub step: u64,
    /// The epoch of the next step.
    pub epoch: u64,
    /// The data position: samples of that epoch already used, all ranks together.
    pub samples_in_epoch: u64,
    /// Updates the optimiser made: steps without the skipped ones.
    pub optimizer_steps: u64,
    /// Steps skipped because a loss or a gradient was not finite.
    pub skipped: u64,
    /// How many of the last steps in a row were skipped.
    pub skipped_in_row: u64,
    /// The seed; with `step` it is the state of every random number generator, because all of them are counters.
    pub seed: u64,
    /// Processes that trained together.
    pub world: usize,
    /// Hash of the part of the recipe that decides the numbers.
    pub recipe_hash: String,
    /// The recipe itself, to tell what differs.
    pub recipe: serde_json::Value,
    /// Hash of the training data.
    pub data_hash: String,
}

/// A checkpoint that passed every check.
#[derive(Debug)]
pub struct Loaded {
    /// Its folder.
    pub path: PathBuf,
    /// The counters.
    pub state: TrainState,
    /// The trained tensors.
    pub weights: BTreeMap<String, Tensor>,
    /// The optimiser's tensors.
    pub optimizer: BTreeMap<String, Tensor>,
}

/// What [`Checkpoints::latest`] found.
#[derive(Debug, Default)]
pub struct Found {
    /// The newest sound checkpoint.
    pub newest: Option<Loaded>,
    /// Newer ones that are damaged, with the reason.
    pub damaged: Vec<(PathBuf, String)>,
}

/// The folder that holds the checkpoints of one run.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    dir: PathBuf,
    keep: usize,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    format: u32,
    files: BTreeMap<String, Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    bytes: u64,
    sha256: String,
}

impl Checkpoints {
    /// The checkpoints in `dir`, of which the newest `keep` (at least one) stay. Touches nothing yet.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>, keep: usize) -> Self {
        Self { dir: dir.into(), keep: keep.max(1) }
    }

    /// Writes a checkpoint and then removes the ones beyond the newest `keep`.
    ///
    /// # Errors
    /// If anything can't be written (a full disk, say). The checkpoints that were there are untouched then.
    pub fn save(
        &self,
        state: &TrainState,
        weights: &BTreeMap<String, Tensor>,
        optimizer: &BTreeMap<String, Tensor>,
    ) -> Result<PathBuf> {
        let json =
            serde_json::to_vec_pretty(state).map_err(|err| Error::Checkpoint(err.to_string()))?;
        let files =
            [(WEIGHTS, serialize(weights)?), (OPTIMIZER, serialize(optimizer)?), (STATE, json)];
        let path = self.save_files(state.step, &files, Write::write_all)?;
        self.prune(state.step);
        Ok(path)
    }

    /// `write` is the one place where bytes go to the disk, so that a test can make it fail.
    fn save_files(
        &self,
        step: u64,
        files: &[(&str, Vec<u8>)],
        write: impl Fn(&mut File, &[u8]) -> std::io::Result<()>,
    ) -> Result<PathBuf> {
        fs::create_dir_all(&self.dir).map_err(Error::io(&self.dir))?;
        self.sweep();
        let hidden = self.dir.join(format!(".writing-{}", folder_name(step)));
        let result = write_folder(&hidden, files, write).and_then(|()| self.publish(step, &hidden));
        if result.is_err() {
            // Best effort: what stays is hidden and the next save sweeps it.
            let _ = fs::remove_dir_all(&hidden);
        }
        result
    }

    fn publish(&self, step: u64, hidden: &Path) -> Result<PathBuf> {
        let path = self.dir.join(folder_name(step));
        if path.exists() {
            // Written again after a resume from an older one; a rename can't replace a folder that is not empty.
            let old = self.dir.join(format!(".removing-{}", folder_name(step)));
            fs::rename(&path, &old).map_err(Error::io(&path))?;
        }
        fs::rename(hidden, &path).map_err(Error::io(&path))?;
        sync_folder(&self.dir)?;
        self.sweep();
        Ok(path)
    }

    /// The newest checkpoint whose every byte is as its manifest says, and the newer ones that are not.
    ///
    /// # Errors
    /// If the folder exists but can't be listed. A damaged checkpoint is not an error.
    pub fn latest(&self) -> Result<Found> {
        let mut found = Found::default();
        for (step, path) in self.list()?.into_iter().rev() {
            match load(&path, step) {
                Ok(loaded) => {
                    found.newest = Some(loaded);
                    break;
                }
                Err(err) => found.damaged.push((path, err.to_string())),
            }
        }
        Ok(found)
    }

    /// Moves a damaged checkpoint out of the numbered ones, for a person to look at; returns where it is now.
    ///
    /// # Errors
    /// If it can't be renamed.
    pub fn set_aside(&self, path: &Path) -> Result<PathBuf> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let aside = self.dir.join(format!("damaged-{name}"));
        let _ = fs::remove_dir_all(&aside);
        fs::rename(path, &aside).map_err(Error::io(path))?;
        sync_folder(&self.dir)?;
        Ok(aside)
    }

    /// The visible checkpoints, oldest first, sound or not.
    ///
    /// # Errors
    /// If the folder exists but can't be listed.
    pub fn list(&self) -> Result<Vec<(u64, PathBuf)>> {
        if !self.dir.exists() {
            return Ok(Vec::new());
        }
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(Error::io(&self.dir))? {
            let path = entry.map_err(Error::io(&self.dir))?.path();
            let step = path
                .file_name()
                .and_then(|name| name.to_str()?.strip_prefix("step-")?.parse().ok());
            if let Some(step) = step {
                all.push((step, path));
            }
        }
        all.sort();
        Ok(all)
    }

    /// Removes checkpoints older than the newest `keep`, counted from `newest` down: a damaged one that claims a
    /// later step must not push out a sound one.
    fn prune(&self, newest: u64) {
        let Ok(all) = self.list() else { return };
        let mut older: Vec<_> = all.into_iter().filter(|(step, _)| *step <= newest).collect();
        older.truncate(older.len().saturating_sub(self.keep));
        for (step, path) in older {
            // Hidden before it is deleted, so that no half-deleted checkpoint is ever seen.
            let hidden = self.dir.join(format!(".removing-{}", folder_name(step)));
            if fs::rename(&path, &hidden).is_ok() {
                let _ = fs::remove_dir_all(&hidden);
            }
        }
    }

    /// Removes what an interrupted save left behind.
    fn sweep(&self) {
        let Ok(entries) = fs::read_dir(&self.dir) else { return };
        for path in entries.flatten().map(|entry| entry.path()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with(".writing-step-") || name.starts_with(".removing-step-") {
                let _ = fs::remove_dir_all(&path);
            }
        }
    }
}

/// Reads the checkpoint in `path`, which claims to be of `step`, and checks every byte.
fn load(path: &Path, step: u64) -> Result<Loaded> {
    let damaged = |reason: String| Error::Checkpoint(reason);
    let read = |name: &str| {
        let file = path.join(name);
        fs::read(&file).map_err(Error::io(&file))
    };
    let manifest: Manifest = serde_json::from_slice(&read(MANIFEST)?)
        .map_err(|err| damaged(format!("{MANIFEST} can't be read: {err}")))?;
    if manifest.format != FORMAT {
        return Err(damaged(format!(
            "{MANIFEST} has format {}, this program reads {FORMAT}",
            manifest.format
        )));
    }
    let checked = |name: &str| -> Result<Vec<u8>> {
        let entry = manifest
            .files
            .get(name)
            .ok_or_else(|| damaged(format!("{MANIFEST} does not list {name}")))?;
        let bytes = read(name)?;
        if bytes.len() as u64 != entry.bytes {
            return Err(damaged(format!(
                "{name} has {} bytes instead of {}",
                bytes.len(),
                entry.bytes
            )));
        }
        if sha256(&bytes) != entry.sha256 {
            return Err(damaged(format!("the sha256 of {name} is not the manifest's")));
        }
        Ok(bytes)
    };
    let state: TrainState = serde_json::from_slice(&checked(STATE)?)
        .map_err(|err| damaged(format!("{STATE} can't be read: {err}")))?;
    if state.step != step {
        return Err(damaged(format!(
            "{STATE} is of step {}, the folder's name says {step}",
            state.step
        )));
    }
    let tensors = |name: &str| -> Result<BTreeMap<String, Tensor>> {
        let tensors = candle_core::safetensors::load_buffer(&checked(name)?, &Device::Cpu)?;
        Ok(tensors.into_iter().collect())
    };
    Ok(Loaded {
        path: path.to_path_buf(),
        state,
        weights: tensors(WEIGHTS)?,
        optimizer: tensors(OPTIMIZER)?,
    })
}

/// Writes `tensors` as one safetensors file that appears whole or not at all; returns its sha256 in hex.
///
/// # Errors
/// If it can't be written; a file that was there before is untouched then.
pub fn save_tensors(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<String> {
    let bytes = serialize(tensors)?;
    write_atomic(path, &bytes)?;
    Ok(sha256(&bytes))
}

/// Writes `bytes` to `path`: a temporary file beside it, flushed to the disk, then one rename. Everybody who may see the
/// folder may read it.
///
/// # Errors
/// If it can't be written; a file that was there before is untouched then.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(Error::io(dir))?;
    file.write_all(bytes).and_then(|()| file.as_file().sync_all()).map_err(Error::io(path))?;
    make_readable(file.as_file()).map_err(Error::io(path))?;
    file.persist(path).map_err(|err| Error::Io { path: path.to_path_buf(), reason: err.error })?;
    sync_folder(dir)
}

/// The sha256 of `bytes` in hex.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn folder_name(step: u64) -> String {
    format!("step-{step:08}")
}

fn serialize(tensors: &BTreeMap<String, Tensor>) -> Result<Vec<u8>> {
    safetensors::serialize(tensors, None).map_err(|err| Error::Checkpoint(err.to_string()))
}

fn write_folder(
    dir: &Path,
    files: &[(&str, Vec<u8>)],
    write: impl Fn(&mut File, &[u8]) -> std::io::Result<()>,
) -> Result<()> {
    fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let mut manifest = Manifest { format: FORMAT, files: BTreeMap::new() };
    let put = |name: &str, bytes: &[u8]| -> Result<()> {
        let path = dir.join(name);
        let mut file = File::create(&path).map_err(Error::io(&path))?;
        write(&mut file, bytes).and_then(|()| file.sync_all()).map_err(Error::io(&path))
    };
    for (name, bytes) in files {
        put(name, bytes)?;
        let entry = Entry { bytes: bytes.len() as u64, sha256: sha256(bytes) };
        manifest.files.insert((*name).to_owned(), entry);
    }
    let json =
        serde_json::to_vec_pretty(&manifest).map_err(|err| Error::Checkpoint(err.to_string()))?;
    put(MANIFEST, &json)?;
    sync_folder(dir)
}

/// Flushes the folder's own entry list; without it a rename may be lost in a power cut.
fn sync_folder(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(Error::io(dir))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(step: u64) -> TrainState {
        TrainState {
            step,
            epoch: 0,
            samples_in_epoch: 0,
            optimizer_steps: step,
            skipped: 0,
            skipped_in_row: 0,
            seed: 1,
            world: 1,
            recipe_hash: "r".into(),
            recipe: serde_json::Value::Null,
            data_hash: "d".into(),
        }
    }

    fn tensors(value: f32) -> BTreeMap<String, Tensor> {
        BTreeMap::from([(
            "a.weight".to_owned(),
            Tensor::full(value, (2, 3), &Device::Cpu).unwrap(),
        )])
    }

    #[test]
    fn a_full_disk_leaves_the_old_ones_and_no_trace() {
        let dir = tempfile::tempdir().unwrap();
        let store = Checkpoints::new(dir.path(), 2);
        store.save(&state(1), &tensors(1.0), &tensors(0.5)).unwrap();
        for failing in 0..4 {
            let count = std::cell::Cell::new(0);
            let files = [(WEIGHTS, vec![1; 10]), (OPTIMIZER, vec![2; 10]), (STATE, vec![3; 10])];
            let err = store
                .save_files(1, &files, |file, bytes| {
                    count.set(count.get() + 1);
                    if count.get() <= failing {
                        return file.write_all(bytes);
                    }
                    file.write_all(&bytes[..bytes.len() / 2])?;
                    Err(std::io::ErrorKind::StorageFull.into())
                })
                .unwrap_err();
            assert!(matches!(err, Error::Io { .. }), "{err}");
            let names: Vec<_> = fs::read_dir(dir.path())
                .unwrap()
                .map(|e| e.unwrap().file_name().into_string().unwrap())
                .collect();
            assert_eq!(names, ["step-00000001"]);
            assert_eq!(store.latest().unwrap().newest.unwrap().state, state(1));
        }
    }

    #[test]
    fn what_a_killed_save_left_is_invisible_and_swept() {
        let dir = tempfile::tempdir().unwrap();
        let store = Checkpoints::new(dir.path(), 2);
        store.save(&state(1), &tensors(1.0), &tensors(0.5)).unwrap();
        let half = dir.path().join(".writing-step-00000002");
        fs::create_dir(&half).unwrap();
        fs::write(half.join(WEIGHTS), b"half").unwrap();
        assert_eq!(store.list().unwrap().len(), 1);
        store.save(&state(3), &tensors(3.0), &tensors(0.5)).unwrap();
        assert!(!half.exists());
        assert_eq!(store.list().unwrap().len(), 2);
    }

    #[cfg(unix)]
    #[test]
    fn what_is_written_can_be_read_by_others() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/report.txt");
        write_atomic(&path, b"x").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
    }

    #[test]
    fn a_tensor_file_is_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let first = save_tensors(&path, &tensors(1.0)).unwrap();
        let second = save_tensors(&path, &tensors(2.0)).unwrap();
        assert_ne!(first, second);
        assert_eq!(sha256(&fs::read(&path).unwrap()), second);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}

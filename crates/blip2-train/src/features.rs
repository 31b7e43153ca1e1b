//! A cache on disk of what the frozen image encoder makes of every picture.
//!
//! The encoder never changes, so its output is computed once per picture and view and read ever after. View 0 is the
//! plain resized picture, which evaluation uses; views 1… are augmented; epoch e trains on view e modulo their number.
//!
//! ```text
//! DIR/KEY/key.json        what decides the content: encoder, data, augmentation, seed; KEY is its sha256, shortened
//!         view-000.f16    record i = sample i: tokens × width f16, little endian, then the record's crc32
//! ```
//!
//! A view is built as `view-000.part`; every so often it is flushed and `view-000.done` says how many records are safe,
//! so that an interrupted build goes on there; one rename makes a whole view visible. This file knows no encoder: it is
//! handed one.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Device, Tensor};
use half::f16;

use crate::checkpoint::{sha256, write_atomic};
use crate::{Error, Result};

/// Records between two flushes of a view that is being built.
const FLUSH_EVERY: usize = 512;
const CRC_BYTES: usize = 4;

/// The size of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeatureShape {
    /// Pictures.
    pub samples: usize,
    /// Views of each.
    pub views: u32,
    /// Tokens per picture.
    pub tokens: usize,
    /// Features per token.
    pub width: usize,
}

impl FeatureShape {
    fn values(&self) -> usize {
        self.tokens * self.width
    }

    fn record(&self) -> usize {
        self.values() * 2 + CRC_BYTES
    }

    /// Bytes on disk when complete.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.samples as u64 * u64::from(self.views) * self.record() as u64
    }
}

/// A complete cache. Threads may share it.
#[derive(Debug)]
pub struct FeatureCache {
    shape: FeatureShape,
    views: Vec<(PathBuf, Mutex<File>)>,
}

/// How to build what is missing.
pub struct Build<'a> {
    /// Pictures per call of the encoder.
    pub batch: usize,
    /// (view, samples) → encoder output (b, tokens, width).
    pub encode: &'a mut dyn FnMut(u32, &[usize]) -> Result<Tensor>,
    /// Told how many of how many records are there, after every batch.
    pub progress: &'a mut dyn FnMut(u64, u64),
    /// Set it, and the build stops after the present batch; what is done is kept.
    pub stop: &'a AtomicBool,
}

impl FeatureCache {
    /// Opens the cache below `dir` for what `key` describes, first building the views that are missing. `None` if it
    /// was asked to stop.
    ///
    /// `key` must hold everything that decides the content (hashes of encoder and data, augmentation, seed), but not
    /// the number of views: a cache with more views serves recipes with fewer.
    ///
    /// # Errors
    /// If the disk can't be read or written, another process is building the same cache, or the encoder fails or gives
    /// another shape or values beyond f16.
    pub fn open(
        dir: &Path,
        key: &serde_json::Value,
        shape: FeatureShape,
        build: &mut Build<'_>,
    ) -> Result<Option<Self>> {
        let key = format!("{key} {}x{}x{}", shape.samples, shape.tokens, shape.width);
        let dir = dir.join(&sha256(key.as_bytes())[..16]);
        fs::create_dir_all(&dir).map_err(Error::io(&dir))?;
        let paths: Vec<_> =
            (0..shape.views).map(|view| dir.join(format!("view-{view:03}.f16"))).collect();
        // A whole cache is only read: any number of runs may do that at once.
        let whole = paths.iter().all(|path| path.exists());
        let _lock = if whole { None } else { Some(lock(&dir)?) };
        let key_path = dir.join("key.json");
        if !key_path.exists() {
            write_atomic(&key_path, key.as_bytes())?;
        }
        let mut views = Vec::new();
        for (view, path) in (0..shape.views).zip(paths) {
            if !path.exists() && !build_view(&path, view, shape, build)? {
                return Ok(None);
            }
            let file = Mutex::new(open_view(&path, shape)?);
            views.push((path, file));
        }
        Ok(Some(Self { shape, views }))
    }

    /// A cache below `dir` that holds the plain pictures of `data` (a hash) as `encoder` sees them, left by a training run
    /// with whatever augmentation; view 0 alone is opened. `None` if there is none.
    ///
    /// # Errors
    /// If the disk can't be read.
    pub fn find_plain(
        dir: &Path,
        encoder: &serde_json::Value,
        data: &str,
        shape: FeatureShape,
    ) -> Result<Option<Self>> {
        let shape = FeatureShape { views: 1, ..shape };
        let Ok(entries) = fs::read_dir(dir) else { return Ok(None) };
        for entry in entries {
            let dir = entry.map_err(Error::io(dir))?.path();
            let path = dir.join("view-000.f16");
            let Ok(key) = fs::read_to_string(dir.join("key.json")) else { continue };
            // The description is followed by the size.
            let described = serde_json::Deserializer::from_str(&key).into_iter().next();
            let Some(Ok(serde_json::Value::Object(key))) = described else { continue };
            let fits = key.get("encoder") == Some(encoder)
                && key.get("data").and_then(serde_json::Value::as_str) == Some(data);
            if fits && path.exists() {
                let view = Mutex::new(open_view(&path, shape)?);
                return Ok(Some(Self { shape, views: vec![(path, view)] }));
            }
        }
        Ok(None)
    }

    /// The cache's size.
    #[must_use]
    pub fn shape(&self) -> FeatureShape {
        self.shape
    }

    /// The view that epoch `epoch` trains on.
    #[must_use]
    pub fn view_of(&self, epoch: u64) -> u32 {
        (epoch % u64::from(self.shape.views.max(1))) as u32
    }

    /// The features of `samples` in `view`: (b, tokens, width) f32.
    ///
    /// # Errors
    /// If there is no such view or sample, or a record is damaged.
    pub fn read(&self, view: u32, samples: &[usize]) -> Result<Tensor> {
        let Some((path, file)) = self.views.get(view as usize) else {
            return Err(Error::Data(format!("no view {view}: {} are kept", self.views.len())));
        };
        let shape = self.shape;
        let mut record = vec![0; shape.record()];
        let mut values = Vec::with_capacity(samples.len() * shape.values());
        for &sample in samples {
            if sample >= shape.samples {
                return Err(Error::Data(format!("no sample {sample} of {}", shape.samples)));
            }
            read_record(file, sample, &mut record).map_err(Error::io(path))?;
            let (data, crc) = record.split_at(shape.values() * 2);
            if crc32fast::hash(data).to_le_bytes() != crc {
                return Err(Error::Data(format!(
                    "{}: record {sample} is damaged; delete the file, and it will be made again",
                    path.display()
                )));
            }
            values.extend(data.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()));
        }
        Ok(Tensor::from_vec(values, (samples.len(), shape.tokens, shape.width), &Device::Cpu)?)
    }
}

/// Keeps a second process from building in `dir`, until the file is dropped.
fn lock(dir: &Path) -> Result<File> {
    let path = dir.join(".lock");
    let file = File::create(&path).map_err(Error::io(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Data(format!(
            "the feature cache {} is being built by another process; wait for it, or stop it and go on there",
            dir.display()
        ))),
        Err(TryLockError::Error(err)) => Err(Error::io(&path)(err)),
    }
}

fn read_record(file: &Mutex<File>, index: usize, record: &mut [u8]) -> std::io::Result<()> {
    let mut file = file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    file.seek(SeekFrom::Start(index as u64 * record.len() as u64))?;
    file.read_exact(record)
}

fn open_view(path: &Path, shape: FeatureShape) -> Result<File> {
    let file = File::open(path).map_err(Error::io(path))?;
    let len = file.metadata().map_err(Error::io(path))?.len();
    let expected = shape.samples as u64 * shape.record() as u64;
    if len != expected {
        return Err(Error::Data(format!(
            "{} has {len} bytes instead of {expected}; delete it, and it will be made again",
            path.display()
        )));
    }
    Ok(file)
}

/// Builds one view, from where an earlier build was interrupted; false if it was asked to stop.
fn build_view(path: &Path, view: u32, shape: FeatureShape, build: &mut Build<'_>) -> Result<bool> {
    let (part, done_path) = (path.with_extension("part"), path.with_extension("done"));
    let mut done = safe_records(&part, &done_path, shape);
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&part);
    let mut file = file.map_err(Error::io(&part))?;
    // What stands behind the last flush may be torn.
    let start = done as u64 * shape.record() as u64;
    file.set_len(start)
        .and_then(|()| file.seek(SeekFrom::Start(start)))
        .map_err(Error::io(&part))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut flushed = done;
    let total = shape.samples as u64 * u64::from(shape.views);
    while done < shape.samples {
        let stopping = build.stop.load(Ordering::Relaxed);
        if stopping || done - flushed >= FLUSH_EVERY {
            flush(&mut out, &part)?;
            write_atomic(&done_path, done.to_string().as_bytes())?;
            flushed = done;
        }
        if stopping {
            return Ok(false);
        }
        let samples: Vec<usize> = (done..(done + build.batch).min(shape.samples)).collect();
        let features = (build.encode)(view, &samples)?;
        write_records(&mut out, &part, &features, view, &samples, shape)?;
        done += samples.len();
        (build.progress)(u64::from(view) * shape.samples as u64 + done as u64, total);
    }
    flush(&mut out, &part)?;
    fs::rename(&part, path).map_err(Error::io(path))?;
    let _ = fs::remove_file(&done_path);
    Ok(true)
}

/// How many records of an interrupted build were flushed.
fn safe_records(part: &Path, done: &Path, shape: FeatureShape) -> usize {
    let claimed: usize =
        fs::read_to_string(done).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    let len = fs::metadata(part).map_or(0, |meta| meta.len());
    claimed.min((len / shape.record() as u64) as usize).min(shape.samples)
}

fn flush(out: &mut BufWriter<File>, path: &Path) -> Result<()> {
    out.flush().and_then(|()| out.get_ref().sync_all()).map_err(Error::io(path))
}

fn write_records(
    out: &mut impl Write,
    path: &Path,
    features: &Tensor,
    view: u32,
    samples: &[usize],
    shape: FeatureShape,
) -> Result<()> {
    let expected = [samples.len(), shape.tokens, shape.width];
    if features.dims() != expected {
        return Err(Error::Data(format!(
            "the image encoder gave {:?}, expected {expected:?}",
            features.dims()
        )));
    }
    let values = features.flatten_all()?.to_vec1::<f32>()?;
    for (record, sample) in values.chunks_exact(shape.values()).zip(samples) {
        let mut bytes = Vec::with_capacity(shape.record());
        for &value in record {
            let half = f16::from_f32(value);
            if !half.is_finite() {
                return Err(Error::Data(format!(
                    "sample {sample}, view {view}: the image encoder gave {value}, beyond f16"
                )));
            }
            bytes.extend(half.to_le_bytes());
        }
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        out.write_all(&bytes).map_err(Error::io(path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: FeatureShape = FeatureShape { samples: 1300, views: 2, tokens: 2, width: 3 };

    fn value(view: u32, sample: usize) -> f32 {
        view as f32 * 0.5 + (sample % 100) as f32
    }

    fn encode(view: u32, samples: &[usize]) -> Result<Tensor> {
        let rows: Vec<f32> = samples.iter().flat_map(|&s| [value(view, s); 6]).collect();
        Ok(Tensor::from_vec(rows, (samples.len(), 2, 3), &Device::Cpu)?)
    }

    /// Opens the cache, interrupted after `calls` calls of the encoder; also says how many it took.
    fn open(dir: &Path, calls: usize) -> (Result<Option<FeatureCache>>, usize) {
        let stop = AtomicBool::new(calls == 0);
        let mut count = 0;
        let mut counting = |view, samples: &[usize]| {
            count += 1;
            stop.store(count >= calls, Ordering::Relaxed);
            encode(view, samples)
        };
        let mut build =
            Build { batch: 7, encode: &mut counting, progress: &mut |_, _| {}, stop: &stop };
        let cache = FeatureCache::open(dir, &serde_json::json!({"a": 1}), SHAPE, &mut build);
        (cache, count)
    }

    fn check(cache: &FeatureCache) {
        for view in 0..2 {
            let samples = [0, 1299, 512, 3];
            let read = cache.read(view, &samples).unwrap();
            let expected = encode(view, &samples).unwrap();
            assert_eq!(read.to_vec3::<f32>().unwrap(), expected.to_vec3::<f32>().unwrap());
        }
    }

    #[test]
    fn what_is_written_is_read_and_nothing_is_made_twice() {
        let dir = tempfile::tempdir().unwrap();
        let (cache, calls) = open(dir.path(), usize::MAX);
        check(&cache.unwrap().unwrap());
        assert_eq!(calls, 2 * 1300usize.div_ceil(7));
        let (cache, calls) = open(dir.path(), usize::MAX);
        assert_eq!(calls, 0);
        let cache = cache.unwrap().unwrap();
        assert_eq!((0..5).map(|epoch| cache.view_of(epoch)).collect::<Vec<_>>(), [0, 1, 0, 1, 0]);
        let size: u64 = ["view-000.f16", "view-001.f16"]
            .iter()
            .map(|name| fs::metadata(folder(dir.path()).join(name)).unwrap().len())
            .sum();
        assert_eq!(size, SHAPE.bytes());
    }

    fn folder(dir: &Path) -> PathBuf {
        fs::read_dir(dir).unwrap().next().unwrap().unwrap().path()
    }

    #[test]
    fn plain_pictures_are_found_whatever_the_augmentation() {
        let dir = tempfile::tempdir().unwrap();
        let stop = AtomicBool::new(false);
        let key = serde_json::json!({"encoder": {"e": 1}, "data": "d", "augment": 5});
        let mut build =
            Build { batch: 7, encode: &mut encode, progress: &mut |_, _| {}, stop: &stop };
        FeatureCache::open(dir.path(), &key, SHAPE, &mut build).unwrap().unwrap();
        let find = |encoder: serde_json::Value, data: &str| {
            FeatureCache::find_plain(dir.path(), &encoder, data, SHAPE).unwrap()
        };
        let found = find(serde_json::json!({"e": 1}), "d").unwrap();
        let read = found.read(0, &[3, 9]).unwrap().to_vec3::<f32>().unwrap();
        assert_eq!(read, encode(0, &[3, 9]).unwrap().to_vec3::<f32>().unwrap());
        assert!(find(serde_json::json!({"e": 2}), "d").is_none());
        assert!(find(serde_json::json!({"e": 1}), "other").is_none());
    }

    #[test]
    fn an_interrupted_build_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let mut calls = 0;
        for part in [100, 50, 70] {
            let (cache, count) = open(dir.path(), part);
            assert!(cache.unwrap().is_none());
            calls += count;
        }
        let (cache, count) = open(dir.path(), usize::MAX);
        check(&cache.unwrap().unwrap());
        assert_eq!(calls + count, 2 * 1300usize.div_ceil(7));
    }

    #[test]
    fn one_process_builds_and_many_read() {
        let dir = tempfile::tempdir().unwrap();
        assert!(open(dir.path(), 1).0.unwrap().is_none());
        let folder = folder(dir.path());
        let other = File::create(folder.join(".lock")).unwrap();
        other.lock().unwrap();
        let (refused, calls) = open(dir.path(), usize::MAX);
        let err = refused.unwrap_err().to_string();
        assert!(err.contains("built by another process"), "{err}");
        assert!(err.contains(&folder.display().to_string()), "{err}");
        assert_eq!(calls, 0);
        drop(other);
        check(&open(dir.path(), usize::MAX).0.unwrap().unwrap());
        let other = File::create(folder.join(".lock")).unwrap();
        other.lock().unwrap();
        check(&open(dir.path(), usize::MAX).0.unwrap().unwrap());
    }

    #[test]
    fn a_torn_tail_is_made_again() {
        let dir = tempfile::tempdir().unwrap();
        assert!(open(dir.path(), 100).0.unwrap().is_none());
        let part = folder(dir.path()).join("view-000.part");
        let bytes = fs::read(&part).unwrap();
        // Killed between two flushes: rubbish behind the safe records, and the safe ones cut short.
        fs::write(&part, [&bytes[..], &[9; 31]].concat()).unwrap();
        assert!(open(dir.path(), 1).0.unwrap().is_none());
        fs::write(&part, &bytes[..bytes.len() / 2]).unwrap();
        check(&open(dir.path(), usize::MAX).0.unwrap().unwrap());
    }

    #[test]
    fn damage_is_found_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path(), usize::MAX).0.unwrap().unwrap();
        let path = folder(dir.path()).join("view-001.f16");
        let mut bytes = fs::read(&path).unwrap();
        bytes[SHAPE.record() * 3 + 5] ^= 4;
        fs::write(&path, &bytes).unwrap();
        let err = cache.read(1, &[2, 3]).unwrap_err().to_string();
        assert!(err.contains("record 3 is damaged"), "{err}");
        fs::write(&path, &bytes[1..]).unwrap();
        assert!(open(dir.path(), usize::MAX).0.unwrap_err().to_string().contains("bytes instead"));
    }

    #[test]
    fn a_shape_or_value_that_does_not_fit_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let stop = AtomicBool::new(false);
        for (rows, reason) in [(1, "gave [1, 2, 3]"), (7, "beyond f16")] {
            let mut bad = |_, _: &[usize]| Ok(Tensor::full(1e6f32, (rows, 2, 3), &Device::Cpu)?);
            let mut build =
                Build { batch: 7, encode: &mut bad, progress: &mut |_, _| {}, stop: &stop };
            let err = FeatureCache::open(dir.path(), &serde_json::Value::Null, SHAPE, &mut build);
            let err = err.unwrap_err().to_string();
            assert!(err.contains(reason), "{err}");
        }
    }
}

//! What a training run writes about itself: `metrics.jsonl` and the live line.
//!
//! `metrics.jsonl` has one line per step, flushed as it is written, so that it can be followed with `tail -f` and
//! survives a kill. A run that resumes after step n first drops the lines behind n (and a torn last one), so the file
//! always tells one consistent run. The live line goes to standard error. No tensors here.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blip2::pack::make_readable;
use serde::{Deserialize, Deserializer, Serialize};

use crate::{Error, Result};

/// One step as it is logged. Numbers that are not finite become `null` and come back as NaN.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// The optimiser step, the first is 1.
    pub step: u64,
    /// Passes over the data so far, in fractions.
    #[serde(deserialize_with = "number_or_nan")]
    pub epoch: f64,
    /// The summed loss.
    #[serde(deserialize_with = "number_or_nan")]
    pub loss: f64,
    /// Its parts by name: `itc`, `itm`, `itg` or `lm`.
    #[serde(default, deserialize_with = "parts_or_nan")]
    pub parts: BTreeMap<String, f64>,
    /// Learning rate of the step.
    #[serde(deserialize_with = "number_or_nan")]
    pub lr: f64,
    /// Pictures per second, this step alone.
    #[serde(deserialize_with = "number_or_nan")]
    pub images_per_s: f64,
    /// Norm of the gradient before clipping.
    #[serde(deserialize_with = "number_or_nan")]
    pub grad_norm: f64,
    /// The step was not taken: its loss or gradient was not finite.
    #[serde(default)]
    pub skipped: bool,
}

fn number_or_nan<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(from)?.unwrap_or(f64::NAN))
}

fn parts_or_nan<'de, D: Deserializer<'de>>(
    from: D,
) -> std::result::Result<BTreeMap<String, f64>, D::Error> {
    let parts = BTreeMap::<String, Option<f64>>::deserialize(from)?;
    Ok(parts.into_iter().map(|(name, value)| (name, value.unwrap_or(f64::NAN))).collect())
}

/// Appends to a `metrics.jsonl`.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: BufWriter<File>,
}

impl MetricsLog {
    /// Opens the log of a run that goes on after `last_step`: later lines and a torn last one are dropped. With 0
    /// the log begins anew. The shortened file replaces the old one atomically.
    ///
    /// # Errors
    /// [`Error::Io`] if a file can't be read, written or replaced.
    pub fn open(path: &Path, last_step: u64) -> Result<Self> {
        let kept = match File::open(path) {
            Ok(file) => lines_up_to(path, file, last_step)?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(Error::io(path)(e)),
        };
        replace_file(path, &kept)?;
        let file = OpenOptions::new().append(true).open(path).map_err(Error::io(path))?;
        Ok(Self { path: path.to_path_buf(), file: BufWriter::new(file) })
    }

    /// Writes and flushes one line.
    ///
    /// # Errors
    /// [`Error::Io`] if the file can't be written.
    pub fn write(&mut self, record: &StepRecord) -> Result<()> {
        let mut line = serde_json::to_vec(record).map_err(|e| Error::io(&self.path)(e.into()))?;
        line.push(b'\n');
        self.file.write_all(&line).and_then(|()| self.file.flush()).map_err(Error::io(&self.path))
    }
}

/// The whole lines whose step is at most `last_step`, as they stand.
fn lines_up_to(path: &Path, file: File, last_step: u64) -> Result<Vec<u8>> {
    #[derive(Deserialize)]
    struct Step {
        step: u64,
    }
    let mut kept = Vec::new();
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line).map_err(Error::io(path))? > 0 {
        let known =
            line.ends_with(b"\n").then(|| serde_json::from_slice::<Step>(&line).ok()).flatten();
        if known.is_some_and(|s| s.step <= last_step) {
            kept.extend_from_slice(&line);
        }
        line.clear();
    }
    Ok(kept)
}

/// Temporary file beside it → fsync → rename → fsync of the folder. Others may read it, as if it were made in place.
fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(Error::io(folder))?;
    file.write_all(bytes).and_then(|()| file.as_file().sync_all()).map_err(Error::io(path))?;
    make_readable(file.as_file()).map_err(Error::io(path))?;
    file.persist(path).map_err(|e| Error::io(path)(e.error))?;
    if cfg!(unix) {
        File::open(folder).and_then(|f| f.sync_all()).map_err(Error::io(folder))?;
    }
    Ok(())
}

/// Reads a `metrics.jsonl`; a torn last line is left out.
///
/// # Errors
/// [`Error::Io`] if it can't be read, [`Error::Data`] (with the line's number) for a line that is no record.
pub fn read_metrics(path: &Path) -> Result<Vec<StepRecord>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let parse = |(number, line): (usize, &str)| {
        serde_json::from_str(line)
            .map_err(|e| Error::Data(format!("{}, line {}: {e}", path.display(), number + 1)))
    };
    whole.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(parse).collect()
}

/// The live line of a run: rewritten in place on a terminal, else one plain line every few seconds.
#[derive(Debug)]
pub struct Progress<W: Write> {
    out: W,
    terminal: bool,
    every: Duration,
    last_step: u64,
    started: Option<(u64, Instant)>,
    shown: Option<Instant>,
    images_per_s: f64,
}

impl<W: Write> Progress<W> {
    /// A line to `out` for a run that ends with `last_step`. `terminal`: rewrite it in place (at most ten times a
    /// second); otherwise print one line every `every`.
    pub fn new(out: W, terminal: bool, every: Duration, last_step: u64) -> Self {
        Self { out, terminal, every, last_step, started: None, shown: None, images_per_s: f64::NAN }
    }

    /// Shows a step, if it is time to. A closed or full output is not an error: training goes on.
    pub fn update(&mut self, record: &StepRecord, now: Instant) {
        // The first step pays for warming up, so the clock starts behind it.
        let (first, start) = *self.started.get_or_insert((record.step, now));
        let smoothed = 0.9 * self.images_per_s + 0.1 * record.images_per_s;
        self.images_per_s =
            if self.images_per_s.is_finite() { smoothed } else { record.images_per_s };
        let pause = if self.terminal { Duration::from_millis(100) } else { self.every };
        let last = record.step >= self.last_step;
        if !last && self.shown.is_some_and(|shown| now.duration_since(shown) < pause) {
            return;
        }
        self.shown = Some(now);
        let done = record.step - first.min(record.step);
        let left = self.last_step.saturating_sub(record.step);
        let eta = (done > 0).then(|| now.duration_since(start).mul_f64(left as f64 / done as f64));
        let line = progress_line(record, self.last_step, self.images_per_s, eta);
        let shown = if self.terminal {
            write!(self.out, "\r\x1b[2K{line}")
        } else {
            writeln!(self.out, "{line}")
        };
        shown.and_then(|()| self.out.flush()).ok();
    }

    /// Ends the line on a terminal, so that what follows starts on its own.
    pub fn finish(&mut self) {
        if self.terminal && self.shown.is_some() {
            writeln!(self.out).ok();
        }
    }
}

/// `step 120/4000  epoch 0.31  loss 4.512 (itc 2.010 itg 2.101 itm 0.401)  lr 1.0e-4  38.2 images/s  ETA 0:12:41`
pub fn progress_line(
    record: &StepRecord,
    last_step: u64,
    images_per_s: f64,
    eta: Option<Duration>,
) -> String {
    let parts: Vec<String> =
        record.parts.iter().map(|(name, value)| format!("{name} {value:.3}")).collect();
    let parts = if parts.len() > 1 { format!(" ({})", parts.join(" ")) } else { String::new() };
    let eta = eta.map_or("-:--:--".to_string(), clock);
    let skipped = if record.skipped { "  SKIPPED" } else { "" };
    format!(
        "step {}/{last_step}  epoch {:.2}  loss {:.3}{parts}  lr {:.1e}  {images_per_s:.1} images/s  ETA {eta}{skipped}",
        record.step, record.epoch, record.loss, record.lr
    )
}

fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

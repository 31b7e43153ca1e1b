//! Everything a run says about itself, in one [`Monitor`]: `metrics.jsonl`, TensorBoard's curves and the live line; and the
//! picture drawn of it at the end.

use std::io::{IsTerminal, Stderr, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::Result;
use crate::eval::curves::write_losses;
use crate::log::{MetricsLog, Progress, StepRecord, read_metrics};
use crate::tensorboard::EventWriter;
use crate::trainer::{Monitor, Start};

/// The file of a run's numbers, in its folder.
pub const METRICS: &str = "metrics.jsonl";
/// The picture of a finished run's losses, in its folder.
pub const CURVES: &str = "curves.png";
/// The folder of TensorBoard's event files, in the run's folder.
pub const EVENTS: &str = "tensorboard";

/// Between two plain lines where the output is no terminal.
const PLAIN_EVERY: Duration = Duration::from_secs(30);

/// Writes the logs of one run.
pub struct RunLog {
    dir: PathBuf,
    log_every: u64,
    open: Option<Open>,
}

struct Open {
    metrics: MetricsLog,
    events: EventWriter,
    progress: Progress<Stderr>,
    last_step: u64,
}

impl RunLog {
    /// The logs of the run in `dir`, with a record every `log_every` steps. Nothing is written before the run begins.
    #[must_use]
    pub fn new(dir: &Path, log_every: u64) -> Self {
        Self { dir: dir.to_path_buf(), log_every: log_every.max(1), open: None }
    }
}

impl Monitor for RunLog {
    fn start(&mut self, start: &Start) -> Result<()> {
        self.note(&format!(
            "{} parameters, {} samples, {} steps of {} samples; from step {}",
            start.parameters, start.samples, start.total_steps, start.samples_per_step, start.step
        ));
        let terminal = std::io::stderr().is_terminal();
        self.open = Some(Open {
            metrics: MetricsLog::open(&self.dir.join(METRICS), start.step)?,
            events: EventWriter::create(
                &self.dir.join(EVENTS),
                (start.step > 0).then_some(start.step + 1),
            )?,
            progress: Progress::new(std::io::stderr(), terminal, PLAIN_EVERY, start.total_steps),
            last_step: start.total_steps,
        });
        Ok(())
    }

    fn step(&mut self, record: &StepRecord, waiting: f64) -> Result<()> {
        let Some(open) = &mut self.open else { return Ok(()) };
        open.progress.update(record, Instant::now());
        let last = record.step == open.last_step;
        if last {
            open.progress.finish();
        }
        if last || record.step.is_multiple_of(self.log_every) {
            open.metrics.write(record)?;
            open.events.scalars(record.step, &scalars(record, waiting))?;
        }
        Ok(())
    }

    fn note(&mut self, text: &str) {
        if let Some(open) = &mut self.open {
            open.progress.finish();
        }
        // Nobody to tell is no reason to stop a run.
        let _ = writeln!(std::io::stderr(), "{text}");
    }
}

/// Draws the losses in the [`METRICS`] of the run in `dir` as [`CURVES`] beside it. A run with a monitor that keeps no such
/// file has no picture either.
///
/// # Errors
/// If a file can't be read or written, or fewer than two of the logged steps have a finite loss.
pub fn draw_curves(dir: &Path, title: &str) -> Result<()> {
    let metrics = dir.join(METRICS);
    if !metrics.exists() {
        return Ok(());
    }
    write_losses(&dir.join(CURVES), title, &read_metrics(&metrics)?)
}

fn scalars(record: &StepRecord, waiting: f64) -> Vec<(&str, f32)> {
    let mut scalars = vec![
        ("loss", record.loss as f32),
        ("lr", record.lr as f32),
        ("grad_norm", record.grad_norm as f32),
        ("images_per_s", record.images_per_s as f32),
        ("waiting", waiting as f32),
    ];
    if record.parts.len() > 1 {
        scalars.extend(record.parts.iter().map(|(name, value)| (name.as_str(), *value as f32)));
    }
    scalars
}

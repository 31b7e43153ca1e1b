//! The training loop of both stages: load, step, update, log, checkpoint, go on.
//!
//! A run is a pure function of recipe, data and seed. Every random choice is drawn from counters, loaders hand over
//! batches by number and not by who is first, and a checkpoint holds every number that the next step depends on: a run
//! that was killed at any moment and resumed ends with the same bits as one that was not. The loop knows neither
//! pictures nor models; they come in as a [`Task`].

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::Scope;
use std::time::{Duration, Instant};

use blip2::params::ParamStore;
use blip2_ops::{Communicator, Dropout, on_computing_thread};
use candle_core::Tensor;
use candle_core::backprop::GradStore;

use crate::checkpoint::{Checkpoints, TrainState, save_tensors, write_atomic};
use crate::log::StepRecord;
use crate::optim::{AdamW, AdamWConfig, Gradients, clip_factor};
use crate::order::{BatchPlan, Order, Walk, purpose};
use crate::recipe::{Recipe, differences};
use crate::rng::Rng;
use crate::schedule::Schedule;
use crate::{Error, Result};

/// The trained weights' file in the run's folder, written when the run is finished.
pub const MODEL: &str = "model.safetensors";

/// Where batches come from. Loader threads share it.
pub trait Source: Sync {
    /// A loaded micro-batch.
    type Batch: Send + Sync;

    /// The number of samples.
    fn samples(&self) -> usize;

    /// A hash of the data, so that a run is not resumed on other data.
    fn hash(&self) -> String;

    /// Loads the samples of `plan`. It must depend on nothing else: use [`BatchPlan::rng`] for every random choice.
    ///
    /// # Errors
    /// If a sample can't be read; the run stops.
    fn load(&self, plan: &BatchPlan) -> Result<Self::Batch>;
}

/// What is trained: a source of batches, a model, a loss.
pub trait Task: Sync {
    /// Where batches come from.
    type Source: Source;

    /// The source.
    fn source(&self) -> &Self::Source;

    /// The trained parameters.
    fn params(&self) -> &ParamStore;

    /// The loss of one micro-batch and its gradients, as far as the backward pass leaves them here. They must depend on nothing but weights, batch and draws.
    ///
    /// # Errors
    /// If a tensor operation fails.
    fn step(
        &self,
        batch: &<Self::Source as Source>::Batch,
        draws: Draws,
        ranks: &Arc<dyn Communicator>,
    ) -> Result<StepOutput>;
}

/// The random numbers of one micro-batch on one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draws {
    seed: u64,
    step: u64,
    micro: u64,
    rank: u64,
}

impl Draws {
    /// The draws of micro-batch `micro` of step `step` on rank `rank`.
    #[must_use]
    pub fn new(seed: u64, step: u64, micro: usize, rank: usize) -> Self {
        Self { seed, step, micro: micro as u64, rank: rank as u64 }
    }

    /// Dropout.
    #[must_use]
    pub fn dropout(&self) -> Dropout {
        Dropout::new(self.stream(purpose::DROPOUT).bits())
    }

    /// Hard negatives.
    #[must_use]
    pub fn negatives(&self) -> Rng {
        self.stream(purpose::NEGATIVES)
    }

    fn stream(&self, purpose: u64) -> Rng {
        Rng::new(self.seed, &[purpose, self.step, self.micro, self.rank])
    }
}

/// What a micro-batch gave.
pub struct StepOutput {
    /// The loss to minimise.
    pub loss: f32,
    /// Of every trained parameter that `linear` and `embedding` of `blip2-ops` have not given to the trainer in the backward pass itself
    /// ([`Gradients::collect`]); none if the loss is not finite.
    pub grads: Option<GradStore>,
    /// Its named parts, for the log.
    pub parts: Vec<(&'static str, f32)>,
    /// Why there was nothing to learn, if the loss is not finite for a known reason.
    pub reason: Option<String>,
}

impl StepOutput {
    /// Of a loss, a scalar that carries gradients, and its named parts.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn new(loss: &Tensor, parts: Vec<(&'static str, f32)>) -> Result<Self> {
        let value = loss.to_scalar::<f32>()?;
        let grads = value.is_finite().then(|| loss.backward()).transpose()?;
        Ok(Self { loss: value, grads, parts, reason: None })
    }

    /// Of a micro-batch that holds nothing to learn: its step is skipped and counted like any whose loss is not finite, so
    /// that one odd batch ends no run, and a run of nothing else ends.
    #[must_use]
    pub fn nothing(reason: impl Into<String>) -> Self {
        Self { loss: f32::NAN, grads: None, parts: Vec::new(), reason: Some(reason.into()) }
    }
}

/// What to do with checkpoints that are already there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resume {
    /// Refuse to start: nothing is overwritten by mistake.
    No,
    /// Go on from the newest sound one; start afresh if there is none.
    Yes,
    /// The same, even if the recipe differs from the checkpoint's; the differences are reported.
    WithChanges,
}

/// A run's folder (checkpoints, logs and the result) that no other process trains in while this lives.
#[derive(Debug)]
pub struct RunFolder {
    dir: PathBuf,
    resume: Resume,
    _lock: File,
}

impl RunFolder {
    /// Claims `dir`, which is made if absent; nothing else is written. It comes before all other work, so that a run that
    /// may not start costs nothing and overwrites nothing.
    ///
    /// # Errors
    /// If another process trains there, or there are checkpoints and `resume` is [`Resume::No`].
    pub fn claim(dir: &Path, resume: Resume) -> Result<Self> {
        let lock = lock(dir)?;
        let folder = Self { dir: dir.to_path_buf(), resume, _lock: lock };
        if resume == Resume::No
            && let Some((step, path)) = folder.checkpoints(1).list()?.pop()
        {
            return Err(Error::Training(format!(
                "{} holds a run at step {step}; go on with it (--resume), or write to another folder (--out)",
                path.display()
            )));
        }
        Ok(folder)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.dir
    }

    fn checkpoints(&self, keep: usize) -> Checkpoints {
        Checkpoints::new(self.dir.join("checkpoints"), keep)
    }
}

/// Everything about a run that does not change its numbers.
pub struct Run<'a> {
    /// Its folder.
    pub folder: &'a RunFolder,
    /// Set it (on Ctrl-C, say), and the run writes a checkpoint after the present step and returns.
    pub stop: &'a AtomicBool,
    /// The processes that train together.
    pub ranks: Arc<dyn Communicator>,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// All steps are done.
    Finished {
        /// Steps of the run.
        steps: u64,
        /// The trained weights.
        model: PathBuf,
        /// Their file's sha256 in hex.
        sha256: String,
    },
    /// It was asked to stop; a checkpoint is written.
    Stopped {
        /// Steps done.
        step: u64,
    },
}

/// What a run is about to do.
#[derive(Debug, Clone, PartialEq)]
pub struct Start {
    /// The first step.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Steps of an epoch.
    pub steps_per_epoch: u64,
    /// Training samples.
    pub samples: usize,
    /// Trained parameters.
    pub parameters: usize,
    /// Samples per step, all ranks together.
    pub samples_per_step: usize,
}

/// Who is told what happens. Progress bars, `metrics.jsonl` and TensorBoard hang here.
pub trait Monitor {
    /// The run begins or goes on. What was logged of step `start.step` and later is void: it will be done again.
    ///
    /// # Errors
    /// If a log can't be written; the run stops.
    fn start(&mut self, start: &Start) -> Result<()>;

    /// After every step. `waiting` is the share of its time spent waiting for data.
    ///
    /// # Errors
    /// If a log can't be written; the run stops.
    fn step(&mut self, record: &StepRecord, waiting: f64) -> Result<()>;

    /// Something a person should read.
    fn note(&mut self, text: &str);
}

/// Trains `task` after `recipe` until it is done or asked to stop.
///
/// # Errors
/// If the run's folder holds another run, the data is too small, a batch can't be loaded, too many steps in a row are not
/// finite, or the last checkpoint can't be written.
pub fn train<T: Task>(
    task: &T,
    recipe: &Recipe,
    run: &Run<'_>,
    monitor: &mut dyn Monitor,
) -> Result<Outcome> {
    let mut trainer = Trainer::new(task, recipe, run)?;
    trainer.begin(monitor)?;
    let outcome = trainer.run(monitor)?;
    Ok(outcome)
}

/// Keeps a second process out of the run's folder, until the file is dropped.
fn lock(dir: &Path) -> Result<File> {
    std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let path = dir.join(".lock");
    let file = File::create(&path).map_err(Error::io(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => {
            Err(Error::Training(format!("{} is in use by another run", dir.display())))
        }
        Err(std::fs::TryLockError::Error(err)) => Err(Error::io(&path)(err)),
    }
}

struct Trainer<'a, T: Task> {
    task: &'a T,
    recipe: &'a Recipe,
    run: &'a Run<'a>,
    order: Order,
    schedule: Schedule,
    total_steps: u64,
    checkpoints: Checkpoints,
    gradients: Gradients,
    optimizer: AdamW,
    step: u64,
    skipped: u64,
    skipped_in_row: u64,
    data_hash: String,
    saved: Option<u64>,
}

impl<'a, T: Task> Trainer<'a, T> {
    fn new(task: &'a T, recipe: &'a Recipe, run: &'a Run<'a>) -> Result<Self> {
        let (train, optimizer) = (&recipe.train, &recipe.optimizer);
        let order = Order {
            seed: recipe.seed,
            samples: task.source().samples(),
            batch: train.batch_size,
            accumulate: train.accumulate,
            world: run.ranks.world(),
            rank: run.ranks.rank(),
        }
        .check()?;
        let total_steps = order.total_steps(recipe.length);
        let config = AdamWConfig {
            betas: optimizer.betas,
            eps: optimizer.eps,
            weight_decay: optimizer.weight_decay,
            layer_decay: optimizer.layer_decay,
        };
        Ok(Self {
            task,
            recipe,
            run,
            order,
            schedule: Schedule {
                kind: optimizer.schedule,
                lr: optimizer.lr,
                min_lr: optimizer.min_lr,
                warmup_lr: optimizer.warmup_lr,
                warmup_steps: optimizer.warmup_steps,
                total_steps,
                total_epochs: total_steps.div_ceil(order.steps_per_epoch()),
                accumulate: train.accumulate as u64,
            },
            total_steps,
            checkpoints: run.folder.checkpoints(recipe.runtime.keep_checkpoints),
            gradients: Gradients::new(task.params())?,
            optimizer: AdamW::new(task.params(), config),
            step: 0,
            skipped: 0,
            skipped_in_row: 0,
            data_hash: task.source().hash(),
            saved: None,
        })
    }

    /// Goes back to the newest checkpoint, if there is one, and tells the monitor where the run begins.
    fn begin(&mut self, monitor: &mut dyn Monitor) -> Result<()> {
        if self.run.folder.resume != Resume::No {
            self.resume(monitor)?;
        }
        let json =
            serde_json::to_vec_pretty(self.recipe).map_err(|err| Error::Recipe(err.to_string()))?;
        if self.is_writer() {
            write_atomic(&self.run.folder.dir.join("recipe.json"), &json)?;
        }
        monitor.start(&Start {
            step: self.step,
            total_steps: self.total_steps,
            steps_per_epoch: self.order.steps_per_epoch(),
            samples: self.order.samples,
            parameters: self.task.params().count(),
            samples_per_step: self.order.per_step(),
        })
    }

    fn resume(&mut self, monitor: &mut dyn Monitor) -> Result<()> {
        let found = self.checkpoints.latest()?;
        for (path, reason) in &found.damaged {
            monitor.note(&format!("warning: damaged checkpoint {}: {reason}", path.display()));
            if self.is_writer() {
                let aside = self.checkpoints.set_aside(path)?;
                monitor.note(&format!("warning: moved it to {}", aside.display()));
            }
        }
        let Some(loaded) = found.newest else {
            if !found.damaged.is_empty() {
                monitor.note("warning: no sound checkpoint is left, starting from step 0");
            }
            return Ok(());
        };
        let state = loaded.state;
        self.compare(&state, monitor)?;
        self.task.params().set(&loaded.weights)?;
        self.optimizer.restore(&loaded.optimizer, state.optimizer_steps)?;
        self.step = state.step;
        self.skipped = state.skipped;
        self.skipped_in_row = state.skipped_in_row;
        self.saved = Some(state.step);
        monitor.note(&format!("resumed from {}", loaded.path.display()));
        Ok(())
    }

    /// Refuses to mix two different runs.
    fn compare(&self, state: &TrainState, monitor: &mut dyn Monitor) -> Result<()> {
        let mut changes = Vec::new();
        if state.recipe_hash != self.recipe.hash()? {
            changes = differences(&state.recipe, &self.recipe.decisive()?);
        }
        if state.data_hash != self.data_hash {
            changes.push(format!("data ({} → {})", state.data_hash, self.data_hash));
        }
        if state.world != self.order.world {
            changes.push(format!("processes ({} → {})", state.world, self.order.world));
        }
        if changes.is_empty() {
            return Ok(());
        }
        let changes = changes.join(", ");
        if self.run.folder.resume == Resume::WithChanges {
            monitor.note(&format!("warning: resumed with changes: {changes}"));
            return Ok(());
        }
        Err(Error::Training(format!(
            "{} holds another run; these differ: {changes}",
            self.run.folder.dir.display()
        )))
    }

    fn run(&mut self, monitor: &mut dyn Monitor) -> Result<Outcome> {
        let _mixed = self.recipe.train.precision.start(self.recipe.stage_number())?;
        let (source, order, runtime) = (self.task.source(), self.order, &self.recipe.runtime);
        let range = self.step..self.total_steps;
        let finished = std::thread::scope(|scope| {
            let mut batches =
                Batches::spawn(scope, source, order, range, runtime.loaders, runtime.prefetch);
            while self.step < self.total_steps {
                // A rank that stops alone would leave the others waiting, so that one process decides for all.
                if self.run.stop.load(Ordering::Relaxed) {
                    return Ok(false);
                }
                self.one_step(&mut batches, monitor)?;
                let last = self.step == self.total_steps;
                if !last && self.step.is_multiple_of(runtime.checkpoint_every) {
                    // A full disk should not end a run of days: the older checkpoints are still there.
                    if let Err(err) = self.save() {
                        monitor
                            .note(&format!("warning: no checkpoint at step {}: {err}", self.step));
                    }
                }
            }
            Ok::<_, Error>(true)
        })?;
        self.save()?;
        if !finished {
            return Ok(Outcome::Stopped { step: self.step });
        }
        let model = self.run.folder.dir.join(MODEL);
        let sha256 = match self.is_writer() {
            true => save_tensors(&model, &self.task.params().to_tensors())?,
            false => String::new(),
        };
        Ok(Outcome::Finished { steps: self.step, model, sha256 })
    }

    /// One optimiser step, and what is logged of it.
    fn one_step(
        &mut self,
        batches: &mut Batches<<T::Source as Source>::Batch>,
        monitor: &mut dyn Monitor,
    ) -> Result<()> {
        let begin = Instant::now();
        let accumulate = self.recipe.train.accumulate;
        let share = 1.0 / accumulate as f32;
        let mut parts: Vec<(&'static str, f64)> = Vec::new();
        let mut waited = Duration::ZERO;
        let mut reason = None;
        self.gradients.clear();
        for micro in 0..accumulate {
            let before = Instant::now();
            let batch = batches.next()?;
            waited += before.elapsed();
            let draws = Draws::new(self.recipe.seed, self.step, micro, self.order.rank);
            let (task, ranks) = (&self.task, &self.run.ranks);
            let mut step = || self.gradients.collect(share, || task.step(&batch, draws, ranks));
            // Ranks wait for each other, and where several are in one process, they must not fill all threads with that.
            let alone = self.run.ranks.world() == 1;
            let output = if alone { on_computing_thread(step) } else { step() }?;
            self.gradients.add_loss(output.loss, share);
            if let Some(grads) = &output.grads {
                self.gradients.add(self.task.params(), grads, share)?;
            }
            add_parts(&mut parts, &output.parts, f64::from(share));
            reason = reason.or(output.reason);
        }
        self.gradients.average(&self.run.ranks)?;
        let loss = self.gradients.loss();
        let norm = self.gradients.norm()?;
        let lr = self.schedule.lr(self.order.position(self.step));
        let finite = loss.is_finite() && norm.is_finite();
        if finite {
            let scale = clip_factor(norm, self.recipe.train.clip);
            self.optimizer.step(self.task.params(), &self.gradients, lr, scale)?;
            self.skipped_in_row = 0;
        } else {
            self.skip(loss, norm, &parts, reason.as_deref(), monitor)?;
        }
        self.step += 1;
        let seconds = begin.elapsed().as_secs_f64();
        let record = StepRecord {
            step: self.step,
            epoch: self.step as f64 / self.order.steps_per_epoch() as f64,
            loss: loss.into(),
            parts: parts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
            lr,
            images_per_s: self.order.per_step() as f64 / seconds,
            grad_norm: norm,
            skipped: !finite,
        };
        monitor.step(&record, waited.as_secs_f64() / seconds)
    }

    /// Notes a step whose loss or gradient is not finite; weights and optimiser stay as they are.
    fn skip(
        &mut self,
        loss: f32,
        norm: f64,
        parts: &[(&'static str, f64)],
        reason: Option<&str>,
        monitor: &mut dyn Monitor,
    ) -> Result<()> {
        self.skipped += 1;
        self.skipped_in_row += 1;
        let reason = reason.map(|reason| format!(": {reason}")).unwrap_or_default();
        let text = format!(
            "step {}: loss {loss}, gradient norm {norm}, parts {parts:?}{reason}",
            self.step
        );
        if self.skipped_in_row >= self.recipe.train.stop_after_nonfinite {
            return Err(Error::Training(format!(
                "{} steps in a row were not finite; the last: {text}",
                self.skipped_in_row
            )));
        }
        monitor.note(&format!("warning: skipped {text}"));
        Ok(())
    }

    fn save(&mut self) -> Result<()> {
        if self.saved == Some(self.step) || !self.is_writer() {
            return Ok(());
        }
        let at = self.order.position(self.step);
        let state = TrainState {
            step: self.step,
            epoch: at.epoch,
            samples_in_epoch: at.step_in_epoch * self.order.per_step() as u64,
            optimizer_steps: self.optimizer.steps(),
            skipped: self.skipped,
            skipped_in_row: self.skipped_in_row,
            seed: self.recipe.seed,
            world: self.order.world,
            recipe_hash: self.recipe.hash()?,
            recipe: self.recipe.decisive()?,
            data_hash: self.data_hash.clone(),
        };
        let weights = self.task.params().to_tensors();
        self.checkpoints.save(&state, &weights, &self.optimizer.state()?)?;
        self.saved = Some(self.step);
        Ok(())
    }

    /// One process writes for all.
    fn is_writer(&self) -> bool {
        self.order.rank == 0
    }
}

fn add_parts(into: &mut Vec<(&'static str, f64)>, parts: &[(&'static str, f32)], share: f64) {
    for &(name, value) in parts {
        match into.iter_mut().find(|(known, _)| *known == name) {
            Some((_, sum)) => *sum += share * f64::from(value),
            None => into.push((name, share * f64::from(value))),
        }
    }
}

/// Micro-batches in order, loaded ahead by threads: thread i loads every n-th from i on, so the order never depends on
/// which is faster.
struct Batches<B> {
    loaders: Vec<Receiver<Result<B>>>,
    next: usize,
}

impl<B: Send> Batches<B> {
    fn spawn<'scope, S: Source<Batch = B>>(
        scope: &'scope Scope<'scope, '_>,
        source: &'scope S,
        order: Order,
        steps: std::ops::Range<u64>,
        loaders: usize,
        prefetch: usize,
    ) -> Self
    where
        B: 'scope,
    {
        let accumulate = order.accumulate as u64;
        let micros = steps.start * accumulate..steps.end * accumulate;
        let spawn = |loader: usize| {
            let (sender, receiver) = sync_channel(prefetch);
            let numbers = micros.clone().skip(loader).step_by(loaders);
            scope.spawn(move || {
                let mut walk = Walk::new(order);
                for number in numbers {
                    let plan = walk.plan(number / accumulate, (number % accumulate) as usize);
                    let batch = source.load(&plan);
                    let failed = batch.is_err();
                    // The receiver is gone when training has stopped.
                    if sender.send(batch).is_err() || failed {
                        return;
                    }
                }
            });
            receiver
        };
        Self { loaders: (0..loaders).map(spawn).collect(), next: 0 }
    }

    fn next(&mut self) -> Result<B> {
        let receiver = &self.loaders[self.next];
        self.next = (self.next + 1) % self.loaders.len();
        receiver.recv().map_err(|_| Error::Training("a loader thread ended early".into()))?
    }
}

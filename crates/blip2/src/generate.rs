//! Greedy search, beam search and sampling over token ids.
//!
//! Knows ids, never text, and no model: whatever can give the next token's logits for a few rows
//! ([`StepModel`]) can be decoded, be it a decoder-only language model, an encoder–decoder or the
//! Q-Former. The semantics are those of transformers 4.57: lengths count generated tokens only, the
//! end token is part of a hypothesis and of its length, and beams are scored by
//! `sum of log-probabilities / length^length_penalty`.
//!
//! A picture's text depends on neither its neighbours nor its place in the batch: every picture is
//! searched on its own state, finished rows leave the batch, and the random numbers of sampling are
//! a function of (seed, sample, step) alone.
//!
//! Letters: `batch` pictures, `rows` sequences now being extended, `v` vocabulary.

use blip2_ops::{log_sum_exp, on_computing_thread};
use candle_core::Tensor;
use rayon::prelude::*;

use crate::{Error, Result};

/// A model that extends a few rows of ids by one token at a time.
pub trait StepModel: Send {
    /// Reads the prompt. Gives the logits `(batch, v)` of the token that follows it.
    fn start(&mut self) -> Result<Tensor>;
    /// Appends one id to each row. Gives the logits `(rows, v)` of the token that follows.
    fn step(&mut self, ids: &[u32]) -> Result<Tensor>;
    /// Makes row `i` a copy of the present row `rows[i]`. The number of rows may grow (one prompt,
    /// several beams) and shrink (finished rows leave).
    fn reorder(&mut self, rows: &[usize]) -> Result<()>;
    /// Ids that stand before the first generated one of picture `item` (a start token, the prompt, placeholders of the
    /// picture). Only the repetition penalty looks at them.
    fn prompt_ids(&self, item: usize) -> &[u32] {
        let _ = item;
        &[]
    }
}

/// What to generate, and when to stop.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// How the next token is chosen.
    pub strategy: Strategy,
    /// Most tokens generated, the end token among them.
    pub max_new_tokens: usize,
    /// No end token before this many tokens.
    pub min_new_tokens: usize,
    /// Divides positive and multiplies negative scores of ids that were there before; 1 is off.
    pub repetition_penalty: f32,
    /// Where "before" begins.
    pub repetition_scope: RepetitionScope,
    /// Hypotheses returned per picture: the best beams, or so many samples. 1 for greedy search.
    pub num_return: usize,
    /// End tokens; none means that every row runs to `max_new_tokens`.
    pub eos: Vec<u32>,
}

impl Options {
    /// Sequences computed per picture: beams, or samples.
    #[must_use]
    pub fn rows(&self) -> usize {
        match self.strategy {
            Strategy::Beam(beam) | Strategy::BeamSample(beam, _) => beam.num_beams,
            Strategy::Greedy | Strategy::Sample(_) => self.num_return,
        }
    }
}

/// Which ids the repetition penalty counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RepetitionScope {
    /// Those of the prompt, too, as transformers has done since it gives them to the language model.
    #[default]
    All,
    /// Generated ones only, as LAVIS did.
    New,
}

/// How the next token is chosen.
#[derive(Clone, Debug, PartialEq)]
pub enum Strategy {
    /// The likeliest token, every time.
    Greedy,
    /// The likeliest sequence, as far as a beam can see.
    Beam(Beam),
    /// A token drawn from the (trimmed) distribution.
    Sample(Sampling),
    /// Beam search whose candidates are drawn instead of taken from the top.
    BeamSample(Beam, Sampling),
}

/// The settings of beam search.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Beam {
    /// Sequences kept per picture; 1 is greedy search.
    pub num_beams: usize,
    /// Exponent of the length a score is divided by: above 0 favours long, below 0 short texts.
    pub length_penalty: f32,
    /// When a picture with `num_beams` finished hypotheses is done.
    pub early_stopping: EarlyStopping,
}

/// When a picture with `num_beams` finished hypotheses is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EarlyStopping {
    /// When the best running beam, scored as if it ended now, is no better than the worst finished
    /// one (`early_stopping=False`).
    #[default]
    Heuristic,
    /// At once (`early_stopping=True`).
    Always,
    /// When no running beam can become better, at whatever length (`early_stopping="never"`).
    Never,
}

/// The settings of sampling. Applied in this order: temperature, `top_k`, `top_p`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; above 0.
    pub temperature: f32,
    /// Keeps the k likeliest tokens; 0 keeps all. (transformers uses 50 unless told otherwise.)
    pub top_k: usize,
    /// Keeps the likeliest tokens that together hold this probability; 1 keeps all.
    pub top_p: f32,
    /// The same seed gives the same text, whatever else is in the batch.
    pub seed: u64,
}

impl Default for Options {
    /// Greedy, 30 tokens at most, no end token.
    fn default() -> Self {
        Self {
            strategy: Strategy::Greedy,
            max_new_tokens: 30,
            min_new_tokens: 0,
            repetition_penalty: 1.0,
            repetition_scope: RepetitionScope::All,
            num_return: 1,
            eos: Vec::new(),
        }
    }
}

impl Default for Beam {
    /// Five beams, length penalty 1.
    fn default() -> Self {
        Self { num_beams: 5, length_penalty: 1.0, early_stopping: EarlyStopping::Heuristic }
    }
}

impl Default for Sampling {
    /// Temperature 1, top 50, 90 % of the probability, seed 0.
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 50, top_p: 0.9, seed: 0 }
    }
}

/// One generated sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Hypothesis {
    /// The generated ids, with the end token if one was reached, without prompt and padding.
    pub tokens: Vec<u32>,
    /// Beam search: summed log-probability (after the penalties) over length^penalty. Else the
    /// summed log-probability the model itself gave the tokens.
    pub score: f32,
}

impl Hypothesis {
    /// The mean log-probability of its tokens, given the options it was found with.
    #[must_use]
    pub fn log_probability_a_token(&self, options: &Options) -> f32 {
        let length = self.tokens.len().max(1) as f32;
        match options.strategy {
            Strategy::Beam(beam) | Strategy::BeamSample(beam, _) => {
                self.score * length.powf(beam.length_penalty - 1.0)
            }
            Strategy::Greedy | Strategy::Sample(_) => self.score / length,
        }
    }
}

/// Extends each of the `batch` prompts of `model`; per prompt `num_return` hypotheses, best first
/// (samples: in order of their number).
///
/// # Errors
/// An option out of range, a model that gives other shapes than it should, or logits that are not
/// numbers.
pub fn generate(
    model: &mut dyn StepModel,
    batch: usize,
    options: &Options,
) -> Result<Vec<Vec<Hypothesis>>> {
    check(options)?;
    if batch == 0 {
        return Ok(Vec::new());
    }
    on_computing_thread(|| search(model, batch, options))
}

fn search(
    model: &mut dyn StepModel,
    batch: usize,
    options: &Options,
) -> Result<Vec<Vec<Hypothesis>>> {
    let logits = Logits::new(&model.start()?, batch)?;
    match &options.strategy {
        Strategy::Greedy => one_by_one(model, logits, options, None),
        Strategy::Sample(sampling) => one_by_one(model, logits, options, Some(sampling)),
        Strategy::Beam(beam) if beam.num_beams == 1 => one_by_one(model, logits, options, None),
        Strategy::Beam(beam) => beam_search(model, logits, options, beam, None),
        Strategy::BeamSample(beam, sampling) => {
            beam_search(model, logits, options, beam, Some(sampling))
        }
    }
}

fn check(options: &Options) -> Result<()> {
    let refuse = |what: String| Err(Error::Config(format!("generation: {what}")));
    let Options { max_new_tokens, min_new_tokens, repetition_penalty, num_return, .. } = options;
    if *max_new_tokens == 0 {
        return refuse("max_new_tokens is 0, nothing would be generated".into());
    }
    if min_new_tokens > max_new_tokens {
        return refuse(format!(
            "min_new_tokens {min_new_tokens} is above max_new_tokens {max_new_tokens}"
        ));
    }
    if !(repetition_penalty.is_finite() && *repetition_penalty > 0.0) {
        return refuse(format!("repetition_penalty {repetition_penalty} is not above 0"));
    }
    if *num_return == 0 {
        return refuse("num_return is 0".into());
    }
    let (beam, sampling) = match &options.strategy {
        Strategy::Greedy => (None, None),
        Strategy::Beam(beam) => (Some(beam), None),
        Strategy::Sample(sampling) => (None, Some(sampling)),
        Strategy::BeamSample(beam, sampling) => (Some(beam), Some(sampling)),
    };
    if let Some(beam) = beam {
        if beam.num_beams == 0 {
            return refuse("num_beams is 0".into());
        }
        if !beam.length_penalty.is_finite() {
            return refuse(format!("length_penalty {} is not a number", beam.length_penalty));
        }
    }
    if let Some(Sampling { temperature, top_p, .. }) = sampling {
        if !(temperature.is_finite() && *temperature > 0.0) {
            return refuse(format!("temperature {temperature} is not above 0"));
        }
        if !(*top_p > 0.0 && *top_p <= 1.0) {
            return refuse(format!("top_p {top_p} is not in (0, 1]"));
        }
    }
    let most = match (beam, sampling) {
        (None, None) => 1,
        (Some(beam), _) => beam.num_beams,
        (None, Some(_)) => usize::MAX,
    };
    if *num_return > most {
        return refuse(format!("num_return {num_return} is above the {most} there can be"));
    }
    Ok(())
}

/// The next token's logits of each row, on the host.
struct Logits {
    values: Vec<f32>,
    vocab: usize,
}

impl Logits {
    fn new(logits: &Tensor, rows: usize) -> Result<Self> {
        let (n, vocab) = logits.dims2()?;
        if n != rows || vocab == 0 {
            return Err(Error::Config(format!(
                "generation: the model gave logits of shape ({n}, {vocab}) for {rows} rows"
            )));
        }
        let values: Vec<f32> = logits.flatten_all()?.to_vec1()?;
        if values.par_iter().any(|x| x.is_nan() || *x == f32::INFINITY) {
            return Err(Error::Config(
                "generation: the model gave logits that are NaN or ∞".into(),
            ));
        }
        Ok(Self { values, vocab })
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.vocab..][..self.vocab]
    }
}

// ---- greedy and sampling -------------------------------------------------------------------------

/// A sequence being extended, of picture `item`; `sample` numbers the sequences of one picture.
struct Sequence {
    item: usize,
    sample: usize,
    tokens: Vec<u32>,
    score: f32,
}

fn one_by_one(
    model: &mut dyn StepModel,
    first: Logits,
    options: &Options,
    sampling: Option<&Sampling>,
) -> Result<Vec<Vec<Hypothesis>>> {
    let batch = first.values.len() / first.vocab;
    let copies = options.num_return;
    let prompts = prompts(model, batch, options);
    let mut alive: Vec<Sequence> = (0..batch * copies)
        .map(|i| Sequence { item: i / copies, sample: i % copies, tokens: vec![], score: 0.0 })
        .collect();
    // Until the first step every copy reads the logits of its picture's only row.
    let mut row_of: Vec<usize> = alive.iter().map(|s| s.item).collect();
    let mut logits = first;
    let mut done: Vec<Vec<(usize, Hypothesis)>> = (0..batch).map(|_| Vec::new()).collect();
    loop {
        alive.par_iter_mut().zip(&row_of).for_each(|(sequence, row)| {
            let prompt = &prompts[sequence.item];
            extend(sequence, logits.row(*row), prompt, options, sampling);
        });
        let mut rows = Vec::with_capacity(alive.len());
        let mut still = Vec::with_capacity(alive.len());
        for (sequence, row) in alive.into_iter().zip(row_of) {
            if ended(&sequence.tokens, options) {
                let Sequence { item, sample, tokens, score } = sequence;
                done[item].push((sample, Hypothesis { tokens, score }));
            } else {
                rows.push(row);
                still.push(sequence);
            }
        }
        alive = still;
        if alive.is_empty() {
            break;
        }
        let unchanged = logits.values.len() / logits.vocab;
        if rows.len() != unchanged || rows.iter().enumerate().any(|(i, row)| i != *row) {
            model.reorder(&rows)?;
        }
        let ids: Vec<u32> = alive.iter().map(|s| s.tokens[s.tokens.len() - 1]).collect();
        logits = Logits::new(&model.step(&ids)?, ids.len())?;
        row_of = (0..ids.len()).collect();
    }
    Ok(done
        .into_iter()
        .map(|mut samples| {
            samples.sort_by_key(|(sample, _)| *sample);
            samples.into_iter().map(|(_, hypothesis)| hypothesis).collect()
        })
        .collect())
}

/// The ids that the repetition penalty counts before the first new one, of each picture.
fn prompts(model: &dyn StepModel, batch: usize, options: &Options) -> Vec<Vec<u32>> {
    let of = |item| match options.repetition_scope {
        RepetitionScope::All => model.prompt_ids(item).to_vec(),
        RepetitionScope::New => Vec::new(),
    };
    (0..batch).map(of).collect()
}

fn ended(tokens: &[u32], options: &Options) -> bool {
    tokens.len() >= options.max_new_tokens || tokens.last().is_some_and(|t| options.eos.contains(t))
}

fn extend(
    sequence: &mut Sequence,
    logits: &[f32],
    prompt: &[u32],
    options: &Options,
    sampling: Option<&Sampling>,
) {
    let mut scores = logits.to_vec();
    penalise(&mut scores, prompt, &sequence.tokens, options);
    let token = match sampling {
        None => argmax(&scores),
        Some(sampling) => {
            trim(&mut scores, sampling, 1);
            let u = uniform(sampling.seed, sequence.sample as u64, sequence.tokens.len() as u64);
            draw(&scores, u)
        }
    };
    sequence.score += logits[token] - log_sum_exp(logits);
    sequence.tokens.push(token as u32);
}

/// Repetition penalty, then no end token before `min_new_tokens`.
fn penalise(scores: &mut [f32], prompt: &[u32], tokens: &[u32], options: &Options) {
    let penalty = options.repetition_penalty;
    if penalty != 1.0 {
        let mut seen: Vec<u32> = prompt.iter().chain(tokens).copied().collect();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            if let Some(score) = scores.get_mut(id as usize) {
                *score = if *score < 0.0 { *score * penalty } else { *score / penalty };
            }
        }
    }
    if tokens.len() < options.min_new_tokens {
        for id in &options.eos {
            if let Some(score) = scores.get_mut(*id as usize) {
                *score = f32::NEG_INFINITY;
            }
        }
    }
}

fn argmax(scores: &[f32]) -> usize {
    let mut best = 0;
    for (i, score) in scores.iter().enumerate() {
        if *score > scores[best] {
            best = i;
        }
    }
    best
}

/// Temperature, then `top_k`, then `top_p`; what is cut becomes −∞. At least `keep` tokens stay.
fn trim(scores: &mut [f32], sampling: &Sampling, keep: usize) {
    if sampling.temperature != 1.0 {
        for score in scores.iter_mut() {
            *score /= sampling.temperature;
        }
    }
    let descending = |a: &f32, b: &f32| b.total_cmp(a);
    let k = sampling.top_k.max(keep);
    if sampling.top_k > 0 && k < scores.len() {
        let mut sorted = scores.to_vec();
        let least = *sorted.select_nth_unstable_by(k - 1, descending).1;
        for score in scores.iter_mut().filter(|score| **score < least) {
            *score = f32::NEG_INFINITY;
        }
    }
    if sampling.top_p < 1.0 {
        let total = log_sum_exp(scores);
        let mut order: Vec<usize> =
            (0..scores.len()).filter(|i| scores[*i] > f32::NEG_INFINITY).collect();
        // A token stays while the likelier ones hold less than top_p; of equals the last comes first,
        // as in transformers.
        order.sort_by(|a, b| descending(&scores[*a], &scores[*b]).then(b.cmp(a)));
        let mut likelier = 0.0;
        for (rank, i) in order.into_iter().enumerate() {
            let probability = f64::from((scores[i] - total).exp());
            if rank >= keep && likelier >= f64::from(sampling.top_p) {
                scores[i] = f32::NEG_INFINITY;
            }
            likelier += probability;
        }
    }
}

/// The token at which the cumulated probability passes `u` in [0, 1).
fn draw(scores: &[f32], u: f64) -> usize {
    let max = scores.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    let weight = |score: f32| f64::from((score - max).exp());
    let total: f64 = scores.iter().map(|s| weight(*s)).sum();
    let mut left = u * total;
    let mut last = argmax(scores);
    for (i, score) in scores.iter().enumerate() {
        let w = weight(*score);
        if w > 0.0 {
            last = i;
            if left < w {
                break;
            }
            left -= w;
        }
    }
    last
}

/// A number in [0, 1) that depends on its arguments alone: three rounds of the splitmix64 finaliser.
fn uniform(seed: u64, stream: u64, counter: u64) -> f64 {
    let mut z = mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15));
    z = mix(z ^ stream.wrapping_mul(0xd1b5_4a32_d192_ed03));
    z = mix(z ^ counter.wrapping_mul(0x8cb9_2ba7_2f3d_8dd7));
    (z >> 11) as f64 / (1u64 << 53) as f64
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

// ---- beam search ---------------------------------------------------------------------------------

/// The score of what must not be chosen: far below any real one, yet finite so that sums of it order.
const NEVER: f32 = -1e9;

/// A beam: its tokens, its summed log-probability, and the model row it reads.
struct Running {
    tokens: Vec<u32>,
    score: f32,
    row: usize,
}

/// The search of one picture.
struct Search {
    item: usize,
    running: Vec<Running>,
    /// At most `num_beams`, best first.
    finished: Vec<Hypothesis>,
    done: bool,
}

/// A way to extend a beam by one token. `rank` orders the candidates: the score, or with sampling
/// the score plus Gumbel noise, whose order is a draw without replacement.
#[derive(Clone, Copy)]
struct Candidate {
    rank: f32,
    score: f32,
    beam: usize,
    token: usize,
}

fn beam_search(
    model: &mut dyn StepModel,
    first: Logits,
    options: &Options,
    beam: &Beam,
    sampling: Option<&Sampling>,
) -> Result<Vec<Vec<Hypothesis>>> {
    let batch = first.values.len() / first.vocab;
    let prompts = prompts(model, batch, options);
    let mut searches: Vec<Search> = (0..batch).map(|item| Search::new(item, beam)).collect();
    let mut results: Vec<Vec<Hypothesis>> = (0..batch).map(|_| Vec::new()).collect();
    let mut logits = first;
    loop {
        searches.par_iter_mut().for_each(|search| {
            let prompt = &prompts[search.item];
            search.advance(&logits, prompt, options, beam, sampling);
        });
        let (done, open): (Vec<_>, Vec<_>) = searches.into_iter().partition(|s| s.done);
        for mut search in done {
            search.finished.truncate(options.num_return);
            results[search.item] = search.finished;
        }
        searches = open;
        if searches.is_empty() {
            break;
        }
        let beams = || searches.iter().flat_map(|s| &s.running);
        let rows: Vec<usize> = beams().map(|r| r.row).collect();
        let ids: Vec<u32> = beams().map(|r| r.tokens[r.tokens.len() - 1]).collect();
        model.reorder(&rows)?;
        logits = Logits::new(&model.step(&ids)?, ids.len())?;
        let running = searches.iter_mut().flat_map(|s| &mut s.running);
        running.enumerate().for_each(|(row, beam)| beam.row = row);
    }
    Ok(results)
}

impl Search {
    fn new(item: usize, beam: &Beam) -> Self {
        // All beams start as the same sequence, so only the first may be extended.
        let running = (0..beam.num_beams)
            .map(|i| Running {
                tokens: Vec::new(),
                score: if i == 0 { 0.0 } else { NEVER },
                row: item,
            })
            .collect();
        Self { item, running, finished: Vec::new(), done: false }
    }

    /// One step: the best candidates go on as beams, or finish.
    fn advance(
        &mut self,
        logits: &Logits,
        prompt: &[u32],
        options: &Options,
        beam: &Beam,
        sampling: Option<&Sampling>,
    ) {
        let n = beam.num_beams;
        let keep = 2.max(1 + options.eos.len()) * n;
        let candidates = self.candidates(logits, prompt, options, sampling, keep);
        let length = self.running[0].tokens.len() + 1;
        let at_end = length >= options.max_new_tokens;
        let stops = |c: &Candidate| at_end || options.eos.contains(&(c.token as u32));

        let divisor = f64::from(length as u32).powf(f64::from(beam.length_penalty)) as f32;
        for candidate in candidates.iter().take(n).filter(|c| stops(c)) {
            let tokens = self.extended(candidate);
            self.finished.push(Hypothesis { tokens, score: candidate.score / divisor });
        }
        // Stable: of equals, the one that finished first stays first.
        self.finished.sort_by(|a, b| b.score.total_cmp(&a.score));
        self.finished.truncate(n);

        let mut next: Vec<Candidate> = candidates.clone();
        for candidate in next.iter_mut().filter(|c| stops(c)) {
            candidate.score += NEVER;
        }
        next.sort_by(|a, b| b.score.total_cmp(&a.score));
        next.truncate(n);
        let running = next
            .iter()
            .map(|c| Running {
                tokens: self.extended(c),
                score: c.score,
                row: self.running[c.beam].row,
            })
            .collect();
        self.running = running;
        self.done = candidates.iter().all(stops) || self.is_settled(length, options, beam);
    }

    /// Whether the finished hypotheses can't be improved, as far as `early_stopping` cares.
    fn is_settled(&self, length: usize, options: &Options, beam: &Beam) -> bool {
        if self.finished.len() < beam.num_beams {
            return false;
        }
        let best_length = match beam.early_stopping {
            EarlyStopping::Always => return true,
            EarlyStopping::Never if beam.length_penalty > 0.0 => options.max_new_tokens,
            EarlyStopping::Never | EarlyStopping::Heuristic => length,
        };
        let divisor = f64::from(best_length as u32).powf(f64::from(beam.length_penalty)) as f32;
        self.running[0].score / divisor <= self.finished[self.finished.len() - 1].score
    }

    fn extended(&self, candidate: &Candidate) -> Vec<u32> {
        let mut tokens = self.running[candidate.beam].tokens.clone();
        tokens.push(candidate.token as u32);
        tokens
    }

    /// The `keep` best extensions of all beams, best (or first drawn) first.
    fn candidates(
        &self,
        logits: &Logits,
        prompt: &[u32],
        options: &Options,
        sampling: Option<&Sampling>,
        keep: usize,
    ) -> Vec<Candidate> {
        let of_beam = |(beam, running): (usize, &Running)| {
            let mut best = Best::new(keep);
            let mut scores = logits.row(running.row).to_vec();
            let total = log_sum_exp(&scores);
            for score in &mut scores {
                *score -= total;
            }
            penalise(&mut scores, prompt, &running.tokens, options);
            if let Some(sampling) = sampling {
                trim(&mut scores, sampling, 1 + options.eos.len());
            }
            for (token, score) in scores.into_iter().enumerate() {
                let score = score + running.score;
                let rank = match sampling {
                    Some(sampling) if score > f32::NEG_INFINITY => {
                        let step = running.tokens.len() as u64;
                        score + gumbel(sampling.seed, step, (beam * logits.vocab + token) as u64)
                    }
                    _ => score,
                };
                best.offer(Candidate { rank, score, beam, token });
            }
            best.sorted
        };
        let beams: Vec<Vec<Candidate>> = self.running.par_iter().enumerate().map(of_beam).collect();
        // In the order of the beams: of equals the earlier wins.
        let mut best = Best::new(keep);
        beams.into_iter().flatten().for_each(|candidate| best.offer(candidate));
        best.sorted
    }
}

/// Standard Gumbel noise.
fn gumbel(seed: u64, stream: u64, counter: u64) -> f32 {
    let u = uniform(seed, stream, counter).max(f64::MIN_POSITIVE);
    -(-u.ln()).ln() as f32
}

/// The `keep` highest-ranking candidates so far, best first; of equals the earlier wins.
struct Best {
    sorted: Vec<Candidate>,
    keep: usize,
}

impl Best {
    fn new(keep: usize) -> Self {
        Self { sorted: Vec::with_capacity(keep + 1), keep }
    }

    fn offer(&mut self, candidate: Candidate) {
        if self.sorted.len() == self.keep && candidate.rank <= self.sorted[self.keep - 1].rank {
            return;
        }
        let at = self.sorted.partition_point(|c| c.rank >= candidate.rank);
        self.sorted.insert(at, candidate);
        self.sorted.truncate(self.keep);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    /// `penalise` and `trim` against transformers' logits processors.
    #[test]
    fn processed_logits_are_transformers() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../golden/generate.safetensors");
        let golden = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        let ids = golden["ids"].to_dtype(DType::U32).unwrap().to_vec2::<u32>().unwrap();
        let logits = golden["logits"].to_vec2::<f32>().unwrap();
        let off = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 0 };
        let none = Options::default();
        let repetition = Options { repetition_penalty: 1.3, ..none.clone() };
        let minimum = Options { min_new_tokens: 8, eos: vec![2, 11], ..none.clone() };
        let top_p = |top_p| Sampling { top_p, ..off };
        let cases = [
            ("temperature_0.7", &none, Sampling { temperature: 0.7, ..off }, 1),
            ("temperature_1.5", &none, Sampling { temperature: 1.5, ..off }, 1),
            ("top_k_5", &none, Sampling { top_k: 5, ..off }, 1),
            ("top_k_500", &none, Sampling { top_k: 500, ..off }, 1),
            ("top_k_1_keep_2", &none, Sampling { top_k: 1, ..off }, 2),
            ("top_p_0.9", &none, top_p(0.9), 1),
            ("top_p_0.5", &none, top_p(0.5), 1),
            ("top_p_0.05", &none, top_p(0.05), 1),
            ("top_p_0.9_keep_2", &none, top_p(0.9), 2),
            ("top_p_0.5_keep_2", &none, top_p(0.5), 2),
            ("top_p_0.05_keep_2", &none, top_p(0.05), 2),
            ("repetition_1.3", &repetition, off, 1),
            ("min_new_8", &minimum, off, 1),
            ("all", &repetition, Sampling { temperature: 0.7, top_k: 20, top_p: 0.9, seed: 0 }, 1),
        ];
        for (name, options, sampling, keep) in cases {
            let expected = golden[&format!("processed.{name}")].to_vec2::<f32>().unwrap();
            for (row, expected) in expected.iter().enumerate() {
                let mut found = logits[row].clone();
                penalise(&mut found, &[], &ids[row], options);
                trim(&mut found, &sampling, keep);
                for (token, (found, expected)) in found.iter().zip(expected).enumerate() {
                    let equal = found == expected || (found - expected).abs() < 1e-5;
                    assert!(equal, "{name}, row {row}, token {token}: {found} for {expected}");
                }
            }
        }
    }
}

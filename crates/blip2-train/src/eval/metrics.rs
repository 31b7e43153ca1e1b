//! Caption scores: BLEU-1..4, ROUGE-L and CIDEr-D, numerically those of `pycocoevalcap` 1.2 on its own tokens.
//!
//! - BLEU (Papineni 2002): clipped n-gram precisions, brevity penalty against the closest reference, tiny constants
//!   where a count is zero; for the whole list and for each item.
//! - ROUGE-L (Lin 2004): longest common subsequence, β = 1.2, best precision and best recall over the references taken
//!   separately; mean over items.
//! - CIDEr-D (Vedantam 2015): tf-idf n-gram cosine with counts clipped to the reference and a Gaussian penalty on
//!   length (σ = 6), document frequencies from **the references given**, ×10; mean over items. It is therefore 0 on
//!   one item, and numbers on different splits can't be compared.
//!
//! No METEOR and no SPICE. Scores are fractions as the Python returns them; papers print them ×100.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::ptb;
use crate::{Error, Result};

/// n-grams are counted up to this length.
const LONGEST: usize = 4;

/// One picture's caption and what it is compared with, as words.
#[derive(Debug, Clone)]
pub struct Item {
    /// The words of the caption to score; may be none.
    pub candidate: Vec<String>,
    /// The words of each reference; at least one reference.
    pub references: Vec<Vec<String>>,
}

impl Item {
    /// Cuts the caption and its references into words with [`ptb::words`].
    pub fn new<S: AsRef<str>>(candidate: &str, references: &[S]) -> Self {
        Self {
            candidate: ptb::words(candidate),
            references: references.iter().map(|r| ptb::words(r.as_ref())).collect(),
        }
    }
}

/// Scores of one item, or their corpus-level counterparts.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Scores {
    /// BLEU-1 to BLEU-4, 0 to 1.
    pub bleu: [f64; LONGEST],
    /// ROUGE-L, 0 to 1.
    pub rouge_l: f64,
    /// CIDEr-D, 0 to 10.
    pub cider_d: f64,
}

/// The scores of a list of captions.
#[derive(Debug, Clone)]
pub struct CaptionScores {
    /// Of the whole list: BLEU from summed counts, the others means over items.
    pub corpus: Scores,
    /// One per item, in their order.
    pub items: Vec<Scores>,
}

/// All three scores of a list of captions.
///
/// # Errors
/// [`Error::Data`] if the list is empty or an item (named by its place) has no reference.
pub fn score_captions(items: &[Item]) -> Result<CaptionScores> {
    if items.is_empty() {
        return Err(Error::Data("no captions to score".into()));
    }
    if let Some(index) = items.iter().position(|item| item.references.is_empty()) {
        return Err(Error::Data(format!("caption {index} has no reference to score it by")));
    }
    let (bleu, bleus) = bleu(items);
    let rouges: Vec<f64> = items.iter().map(rouge_l).collect();
    let ciders = cider_d(items);
    let corpus = Scores { bleu, rouge_l: mean(&rouges), cider_d: mean(&ciders) };
    let items = (0..items.len())
        .map(|i| Scores { bleu: bleus[i], rouge_l: rouges[i], cider_d: ciders[i] })
        .collect();
    Ok(CaptionScores { corpus, items })
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

// ---- n-grams ---------------------------------------------------------------------------------

/// An n-gram of word numbers, unused places `u32::MAX`: ordered, so that sums run in a fixed order.
type Gram = [u32; LONGEST];

/// Numbers for words. BLEU and CIDEr split at every blank, the no-break ones inside a token included.
#[derive(Default)]
struct Vocabulary<'a>(HashMap<&'a str, u32>);

impl<'a> Vocabulary<'a> {
    fn number(&mut self, words: &'a [String]) -> Vec<u32> {
        let parts = words.iter().flat_map(|w| w.split_whitespace());
        parts
            .map(|w| {
                let next = self.0.len() as u32;
                *self.0.entry(w).or_insert(next)
            })
            .collect()
    }
}

/// How often each n-gram of 1 to 4 words occurs; `[n - 1]`.
fn count_grams(words: &[u32]) -> [BTreeMap<Gram, f64>; LONGEST] {
    std::array::from_fn(|n| {
        let mut counts = BTreeMap::new();
        for window in words.windows(n + 1) {
            let mut gram = [u32::MAX; LONGEST];
            gram[..=n].copy_from_slice(window);
            *counts.entry(gram).or_insert(0.0) += 1.0;
        }
        counts
    })
}

// ---- BLEU ------------------------------------------------------------------------------------

/// What BLEU sums over items.
#[derive(Default, Clone, Copy)]
struct BleuCounts {
    guessed: [f64; LONGEST],
    correct: [f64; LONGEST],
    length: f64,
    reference_length: f64,
}

impl BleuCounts {
    fn add(&mut self, other: &Self) {
        for n in 0..LONGEST {
            self.guessed[n] += other.guessed[n];
            self.correct[n] += other.correct[n];
        }
        self.length += other.length;
        self.reference_length += other.reference_length;
    }

    fn score(&self) -> [f64; LONGEST] {
        const TINY: f64 = 1e-15;
        const SMALL: f64 = 1e-9;
        let ratio = (self.length + TINY) / (self.reference_length + SMALL);
        let brevity = if ratio < 1.0 { (1.0 - 1.0 / ratio).exp() } else { 1.0 };
        let mut product = 1.0;
        std::array::from_fn(|n| {
            product *= (self.correct[n] + TINY) / (self.guessed[n] + SMALL);
            product.powf(1.0 / (n as f64 + 1.0)) * brevity
        })
    }
}

/// BLEU of the whole list, and of each item.
fn bleu(items: &[Item]) -> ([f64; LONGEST], Vec<[f64; LONGEST]>) {
    let mut total = BleuCounts::default();
    let mut each = Vec::with_capacity(items.len());
    for item in items {
        let counts = bleu_counts(item);
        total.add(&counts);
        each.push(counts.score());
    }
    (total.score(), each)
}

fn bleu_counts(item: &Item) -> BleuCounts {
    let mut vocabulary = Vocabulary::default();
    let candidate = vocabulary.number(&item.candidate);
    let references: Vec<Vec<u32>> = item.references.iter().map(|r| vocabulary.number(r)).collect();
    let length = candidate.len();
    let closest = references.iter().map(Vec::len).min_by_key(|&r| (r.abs_diff(length), r));
    let mut counts = BleuCounts {
        length: length as f64,
        reference_length: closest.unwrap_or(0) as f64,
        ..BleuCounts::default()
    };
    let references: Vec<_> = references.iter().map(|r| count_grams(r)).collect();
    for (n, grams) in count_grams(&candidate).iter().enumerate() {
        counts.guessed[n] = length.saturating_sub(n) as f64;
        for (gram, &count) in grams {
            let most =
                references.iter().filter_map(|r| r[n].get(gram)).fold(0.0, |a: f64, &b| a.max(b));
            counts.correct[n] += count.min(most);
        }
    }
    counts
}

// ---- ROUGE-L ---------------------------------------------------------------------------------

fn rouge_l(item: &Item) -> f64 {
    const BETA_SQUARED: f64 = 1.2 * 1.2;
    // Python splits the empty text into one empty word, which an empty reference matches.
    let empty = [String::new()];
    let or_empty =
        |words: &'_ [String]| if words.is_empty() { empty.to_vec() } else { words.to_vec() };
    let candidate = or_empty(&item.candidate);
    let (mut precision, mut recall) = (0.0f64, 0.0f64);
    for reference in &item.references {
        let reference = or_empty(reference);
        let common = longest_common(&candidate, &reference) as f64;
        precision = precision.max(common / candidate.len() as f64);
        recall = recall.max(common / reference.len() as f64);
    }
    if precision == 0.0 || recall == 0.0 {
        return 0.0;
    }
    (1.0 + BETA_SQUARED) * precision * recall / (recall + BETA_SQUARED * precision)
}

/// Length of the longest common subsequence.
fn longest_common(a: &[String], b: &[String]) -> usize {
    let mut row = vec![0; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()]
}

// ---- CIDEr-D ---------------------------------------------------------------------------------

/// tf-idf weights of one text.
struct Weighted {
    weights: [BTreeMap<Gram, f64>; LONGEST],
    norms: [f64; LONGEST],
    /// The Python measures length by counting bigrams.
    bigrams: f64,
}

fn cider_d(items: &[Item]) -> Vec<f64> {
    let mut vocabulary = Vocabulary::default();
    let candidates: Vec<_> =
        items.iter().map(|i| count_grams(&vocabulary.number(&i.candidate))).collect();
    let references: Vec<Vec<_>> = items
        .iter()
        .map(|i| i.references.iter().map(|r| count_grams(&vocabulary.number(r))).collect())
        .collect();
    // In how many items some reference holds the n-gram.
    let mut frequency: BTreeMap<Gram, f64> = BTreeMap::new();
    for item in &references {
        let grams: BTreeSet<Gram> = item.iter().flatten().flat_map(|g| g.keys().copied()).collect();
        for gram in grams {
            *frequency.entry(gram).or_insert(0.0) += 1.0;
        }
    }
    let log_items = (items.len() as f64).ln();
    let weigh = |counts: &[BTreeMap<Gram, f64>; LONGEST]| {
        let weights = counts.each_ref().map(|grams| {
            let weight =
                |gram: &Gram| log_items - frequency.get(gram).copied().unwrap_or(0.0).max(1.0).ln();
            grams
                .iter()
                .map(|(gram, count)| (*gram, count * weight(gram)))
                .collect::<BTreeMap<_, _>>()
        });
        let norms = weights.each_ref().map(|w| w.values().map(|v| v * v).sum::<f64>().sqrt());
        Weighted { weights, norms, bigrams: counts[1].values().sum() }
    };
    let score = |candidate, references: &Vec<_>| {
        let candidate = weigh(candidate);
        let total: f64 = references.iter().map(|r| similarity(&candidate, &weigh(r))).sum();
        10.0 * total / references.len() as f64
    };
    candidates.iter().zip(&references).map(|(c, r)| score(c, r)).collect()
}

/// Clipped cosine, mean over n, times the length penalty.
fn similarity(candidate: &Weighted, reference: &Weighted) -> f64 {
    const SIGMA: f64 = 6.0;
    let delta = candidate.bigrams - reference.bigrams;
    let penalty = (-delta * delta / (2.0 * SIGMA * SIGMA)).exp();
    let mut total = 0.0;
    for n in 0..LONGEST {
        let theirs = &reference.weights[n];
        let ours = candidate.weights[n].iter();
        let product: f64 = ours.filter_map(|(g, w)| theirs.get(g).map(|r| w.min(*r) * r)).sum();
        let norms = candidate.norms[n] * reference.norms[n];
        total += if norms == 0.0 { 0.0 } else { product / norms };
    }
    total / LONGEST as f64 * penalty
}

//! Captions of both stages, and the choice among them.
//!
//! The second stage writes with its language model, the first by its own head (ITG). All that their beams end with are
//! candidates, and the first stage judges how they fit, by ITM and ITC, as it does what retrieval finds; that and how likely its
//! writer found a caption decide. A bridge that is young knows more than it can yet tell the language model; this is how it is
//! heard.

use std::collections::BTreeSet;

use blip2_ops::{Dropout, on_computing_thread};
use candle_core::Tensor;

use crate::Result;
use crate::generate::{Hypothesis, Options};
use crate::model::{Captioner, Matcher, Score};
use crate::stage1::ImageFeatures;

/// A caption, and how well it fits its picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Without special tokens.
    pub text: String,
    /// As it was generated: tokens of its stage's tokenizer.
    pub hypothesis: Hypothesis,
    /// Who wrote it: 1 or 2.
    pub stage: u8,
    /// The mean log-probability of its tokens, by who wrote it.
    pub log_probability: f32,
    /// How the text fits its picture, by the first stage.
    pub fit: Score,
}

impl Candidate {
    /// What decides: log-probability a token + half the log-odds of ITM + 5 times ITC's cosine. Each alone says less: the likeliest
    /// caption is often the blandest, and what fits best a slip of the pen. The weights were found on mini's validation
    /// pictures, where those from a third to once of ITM's and from none to twice of ITC's differ by less than three points of CIDEr-D.
    #[must_use]
    pub fn rank(&self) -> f32 {
        const ITM: f32 = 0.5;
        const ITC: f32 = 5.0;
        let itm = self.fit.itm.clamp(1e-6, 1.0 - 1e-6);
        self.log_probability + ITM * (itm / (1.0 - itm)).ln() + ITC * self.fit.itc
    }
}

/// All that was written about one picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidates {
    /// By the first stage, likeliest first.
    pub first: Vec<Candidate>,
    /// By the second stage, likeliest first.
    pub second: Vec<Candidate>,
}

impl Candidates {
    /// The best, `count` at most: highest [`Candidate::rank`] first, no text twice.
    #[must_use]
    pub fn best(self, count: usize) -> Vec<Candidate> {
        let mut all: Vec<Candidate> = self.second.into_iter().chain(self.first).collect();
        all.sort_by(|a, b| b.rank().total_cmp(&a.rank()));
        let mut seen = BTreeSet::new();
        all.retain(|candidate| seen.insert(candidate.text.clone()));
        all.truncate(count);
        all
    }
}

/// Both stages' captions of encoded pictures `patches` (b, tokens, width), which both models' encoder made. Each stage gives
/// as many as it has beams (samples: as many as `options` ask for).
///
/// # Errors
/// If the first stage has no head to write with, or an option is out of range.
pub fn candidates(
    captioner: &Captioner,
    matcher: &Matcher,
    patches: &Tensor,
    options: &Options,
) -> Result<Vec<Candidates>> {
    let options = Options { num_return: options.rows(), ..options.clone() };
    let image = on_computing_thread(|| matcher.bridge().image(patches, &Dropout::off()))?;
    let first = matcher.caption_after(image.clone(), &options)?;
    let prompts = vec![captioner.caption_prompt(); first.len()];
    let second = captioner.generate_from(patches, &prompts, &options)?;
    let mut all = Vec::with_capacity(first.len());
    for (row, (first, second)) in first.into_iter().zip(second).enumerate() {
        let first = written(1, first, &options, |hypothesis| matcher.text(hypothesis))?;
        let second = written(2, second, &options, |hypothesis| captioner.text(hypothesis))?;
        let mut candidates = Candidates { first, second };
        on_computing_thread(|| judge(matcher, &image, row, &mut candidates))?;
        all.push(candidates);
    }
    Ok(all)
}

/// Candidates that nobody has judged yet.
fn written(
    stage: u8,
    hypotheses: Vec<Hypothesis>,
    options: &Options,
    text: impl Fn(&Hypothesis) -> Result<String>,
) -> Result<Vec<Candidate>> {
    let candidate = |hypothesis: Hypothesis| {
        let fit = Score { itm: 0.0, itc: 0.0 };
        let log_probability = hypothesis.log_probability_a_token(options);
        Ok(Candidate { text: text(&hypothesis)?, hypothesis, stage, log_probability, fit })
    };
    hypotheses.into_iter().map(candidate).collect()
}

/// Compares each text with its picture, `row` of `image`.
fn judge(
    matcher: &Matcher,
    image: &ImageFeatures,
    row: usize,
    candidates: &mut Candidates,
) -> Result<()> {
    let Candidates { first, second } = candidates;
    let all: Vec<&mut Candidate> = first.iter_mut().chain(second).collect();
    let texts: Vec<&str> = all.iter().map(|candidate| candidate.text.as_str()).collect();
    let scores = matcher.score_row(image, row, &matcher.texts(&texts)?)?;
    all.into_iter().zip(scores).for_each(|(candidate, score)| candidate.fit = score);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::{Beam, Strategy};

    fn candidate(stage: u8, text: &str, itm: f32) -> Candidate {
        let hypothesis = Hypothesis { tokens: Vec::new(), score: 0.0 };
        let fit = Score { itm, itc: 0.0 };
        Candidate { text: text.into(), hypothesis, stage, log_probability: 0.0, fit }
    }

    #[test]
    fn all_three_decide() {
        let plain = candidate(1, "a dog", 0.5);
        assert_eq!(plain.rank(), 0.0);
        let fits = Candidate { fit: Score { itm: 0.9, itc: 0.2 }, ..plain.clone() };
        assert!((fits.rank() - (0.5 * 9f32.ln() + 1.0)).abs() < 1e-5, "{}", fits.rank());
        let unlikely = Candidate { log_probability: -2.5, ..fits };
        assert!((unlikely.rank() - (0.5 * 9f32.ln() - 1.5)).abs() < 1e-5, "{}", unlikely.rank());
        // Certainty has no infinite say.
        for itm in [0.0, 1.0] {
            assert!(candidate(1, "a dog", itm).rank().abs() < 7.0);
        }
    }

    #[test]
    fn a_tokens_share_of_a_score() {
        let hypothesis = Hypothesis { tokens: vec![1, 2, 3, 4], score: -2.0 };
        let of = |strategy| {
            let options = Options { strategy, ..Options::default() };
            hypothesis.log_probability_a_token(&options)
        };
        let beam = |length_penalty| Strategy::Beam(Beam { length_penalty, ..Beam::default() });
        // The sums of log-probabilities are -2, -2, -4 and -8.
        assert_eq!(of(Strategy::Greedy), -0.5);
        assert_eq!(of(beam(0.0)), -0.5);
        assert_eq!(of(beam(0.5)), -1.0);
        assert_eq!(of(beam(1.0)), -2.0);
    }

    #[test]
    fn the_best_comes_first_and_no_text_twice() {
        let all = Candidates {
            first: vec![candidate(1, "a dog", 0.5), candidate(1, "a wolf", 0.4)],
            second: vec![candidate(2, "a dog", 0.5), candidate(2, "a fox", 0.45)],
        };
        let told = |count: usize| -> Vec<(u8, String)> {
            all.clone().best(count).into_iter().map(|c| (c.stage, c.text)).collect()
        };
        // Of equal texts the language model's stays.
        let ranked = [(2, "a dog".to_owned()), (2, "a fox".into()), (1, "a wolf".into())];
        assert_eq!(told(9), ranked);
        assert_eq!(told(1), ranked[..1]);
        assert!(told(0).is_empty());
    }
}

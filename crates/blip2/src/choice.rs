//! Captions of both stages, and the choice among them.
//!
//! The second stage writes with its language model, the first by its own head (ITG). All that their beams end with are
//! candidates, and the first stage judges them: by ITM, as it re-ranks what retrieval finds. A bridge that is young knows more
//! than it can yet tell the language model; this is how it is heard.

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
    /// How the text fits its picture, by the first stage.
    pub fit: Score,
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
    /// Those that fit best, `count` at most: highest ITM first, no text twice.
    #[must_use]
    pub fn best(self, count: usize) -> Vec<Candidate> {
        let mut all: Vec<Candidate> = self.second.into_iter().chain(self.first).collect();
        all.sort_by(|a, b| b.fit.itm.total_cmp(&a.fit.itm));
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
        let first = written(1, first, |hypothesis| matcher.text(hypothesis))?;
        let second = written(2, second, |hypothesis| captioner.text(hypothesis))?;
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
    text: impl Fn(&Hypothesis) -> Result<String>,
) -> Result<Vec<Candidate>> {
    let candidate = |hypothesis: Hypothesis| {
        let fit = Score { itm: 0.0, itc: 0.0 };
        Ok(Candidate { text: text(&hypothesis)?, hypothesis, stage, fit })
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

    fn candidate(stage: u8, text: &str, itm: f32) -> Candidate {
        let hypothesis = Hypothesis { tokens: Vec::new(), score: 0.0 };
        Candidate { text: text.into(), hypothesis, stage, fit: Score { itm, itc: 0.0 } }
    }

    #[test]
    fn the_best_fit_comes_first_and_no_text_twice() {
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

//! Image–text retrieval: ranks, recalls, re-ranking, chance.
//!
//! A [`ScoreMatrix`] holds one row per query and one column per candidate. Both directions may have several right
//! candidates per query (five captions to a picture); the best of them counts, as in the reference evaluation.
//! Ties count against the model: a matrix of equal scores finds nothing but at the last rank.

use crate::{Error, Result};

/// Scores, one row per query, one column per candidate; higher is better.
#[derive(Debug, Clone)]
pub struct ScoreMatrix {
    queries: usize,
    candidates: usize,
    scores: Vec<f32>,
}

impl ScoreMatrix {
    /// A matrix from its rows laid end to end.
    ///
    /// # Errors
    /// [`Error::Data`] if the count is not queries × candidates, if either is 0, or if a score is NaN.
    pub fn new(queries: usize, candidates: usize, scores: Vec<f32>) -> Result<Self> {
        if queries == 0 || candidates == 0 || scores.len() != queries * candidates {
            let found = scores.len();
            return Err(Error::Data(format!(
                "{found} scores for {queries} queries × {candidates} candidates"
            )));
        }
        if let Some(bad) = scores.iter().position(|s| s.is_nan()) {
            let (q, c) = (bad / candidates, bad % candidates);
            return Err(Error::Data(format!(
                "the score of query {q} and candidate {c} is not a number"
            )));
        }
        Ok(Self { queries, candidates, scores })
    }

    /// Rows and columns exchanged: text→image from image→text.
    pub fn transposed(&self) -> Self {
        let scores = (0..self.candidates)
            .flat_map(|c| (0..self.queries).map(move |q| self.scores[q * self.candidates + c]));
        Self { queries: self.candidates, candidates: self.queries, scores: scores.collect() }
    }

    /// The number of rows.
    pub fn queries(&self) -> usize {
        self.queries
    }

    /// The number of columns.
    pub fn candidates(&self) -> usize {
        self.candidates
    }

    /// The scores of one query. Panics beyond the last row.
    pub fn row(&self, query: usize) -> &[f32] {
        &self.scores[query * self.candidates..][..self.candidates]
    }

    /// The `k` best candidates of a query, best first; ties in order of column.
    pub fn top(&self, query: usize, k: usize) -> Vec<usize> {
        let row = self.row(query);
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        order.truncate(k);
        order
    }
}

/// Scores the `k` best candidates of every query anew: matching score + similarity for these, −100 for the rest.
///
/// `matching(query, candidates)` gives one score per candidate: for BLIP-2 the raw image–text-matching logit,
/// averaged over the queries. The sum with the similarity is the reference's.
///
/// # Errors
/// Those of `matching`; [`Error::Data`] if it returns another number of scores than candidates, or a NaN.
pub fn rerank(
    similarities: &ScoreMatrix,
    k: usize,
    mut matching: impl FnMut(usize, &[usize]) -> Result<Vec<f32>>,
) -> Result<ScoreMatrix> {
    const NOT_RANKED: f32 = -100.0;
    let mut scores = vec![NOT_RANKED; similarities.scores.len()];
    for query in 0..similarities.queries {
        let candidates = similarities.top(query, k);
        let found = matching(query, &candidates)?;
        if found.len() != candidates.len() {
            let (n, m) = (found.len(), candidates.len());
            return Err(Error::Data(format!(
                "{n} matching scores for {m} candidates of query {query}"
            )));
        }
        for (&candidate, score) in candidates.iter().zip(found) {
            let place = query * similarities.candidates + candidate;
            scores[place] = score + similarities.scores[place];
        }
    }
    ScoreMatrix::new(similarities.queries, similarities.candidates, scores)
}

/// How well one direction does. Recalls are fractions, ranks begin at 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Recalls {
    /// Queries whose best right candidate is first.
    pub r1: f64,
    /// … among the first five.
    pub r5: f64,
    /// … among the first ten.
    pub r10: f64,
    /// Mean rank of the best right candidate.
    pub mean_rank: f64,
    /// Median of the same; the lower one of an even number.
    pub median_rank: f64,
}

/// Both directions.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Retrieval {
    /// A picture looks for its texts.
    pub image_to_text: Recalls,
    /// A text looks for its picture.
    pub text_to_image: Recalls,
}

/// Recalls and ranks of both directions.
///
/// `image_to_text` has a row per picture, `text_to_image` a row per text (with similarities alone, its transpose);
/// `image_of_text[t]` is the picture that text `t` describes.
///
/// # Errors
/// [`Error::Data`] if the shapes don't fit each other, a text names a picture that is not there, or a picture has
/// no text.
pub fn evaluate(
    image_to_text: &ScoreMatrix,
    text_to_image: &ScoreMatrix,
    image_of_text: &[usize],
) -> Result<Retrieval> {
    let (images, texts) = (image_to_text.queries, image_to_text.candidates);
    if (text_to_image.queries, text_to_image.candidates, image_of_text.len())
        != (texts, images, texts)
    {
        let (q, c, n) = (text_to_image.queries, text_to_image.candidates, image_of_text.len());
        return Err(Error::Data(format!(
            "{images} images × {texts} texts, but {q} × {c} backwards and {n} text owners"
        )));
    }
    let texts_of = texts_of_images(image_of_text, images)?;
    let owner = |text: usize| vec![image_of_text[text]];
    Ok(Retrieval {
        image_to_text: recalls(image_to_text, |image| texts_of[image].clone()),
        text_to_image: recalls(text_to_image, owner),
    })
}

/// What blind guessing gets on average, by the same measures.
///
/// # Errors
/// [`Error::Data`] as [`evaluate`].
pub fn chance(images: usize, image_of_text: &[usize]) -> Result<Retrieval> {
    let texts_of = texts_of_images(image_of_text, images)?;
    let texts = image_of_text.len();
    let right: Vec<usize> = texts_of.iter().map(Vec::len).collect();
    Ok(Retrieval {
        image_to_text: chance_recalls(texts, &right),
        text_to_image: chance_recalls(images, &[1]),
    })
}

fn texts_of_images(image_of_text: &[usize], images: usize) -> Result<Vec<Vec<usize>>> {
    let mut texts_of = vec![Vec::new(); images];
    for (text, &image) in image_of_text.iter().enumerate() {
        let list = texts_of.get_mut(image);
        list.ok_or_else(|| {
            Error::Data(format!("text {text} belongs to picture {image} of {images}"))
        })?
        .push(text);
    }
    match texts_of.iter().position(Vec::is_empty) {
        Some(image) => Err(Error::Data(format!("picture {image} has no text"))),
        None if images == 0 => Err(Error::Data("no pictures to retrieve".into())),
        None => Ok(texts_of),
    }
}

fn recalls(matrix: &ScoreMatrix, right: impl Fn(usize) -> Vec<usize>) -> Recalls {
    let mut ranks: Vec<usize> =
        (0..matrix.queries).map(|q| best_rank(matrix.row(q), &right(q))).collect();
    ranks.sort_unstable();
    let count = ranks.len() as f64;
    let within = |k: usize| ranks.iter().filter(|&&r| r <= k).count() as f64 / count;
    Recalls {
        r1: within(1),
        r5: within(5),
        r10: within(10),
        mean_rank: ranks.iter().sum::<usize>() as f64 / count,
        median_rank: ranks[(ranks.len() - 1) / 2] as f64,
    }
}

/// Rank of the best right candidate; wrong ones of the same score stand before it.
fn best_rank(row: &[f32], right: &[usize]) -> usize {
    let best = right.iter().map(|&c| row[c]).fold(f32::NEG_INFINITY, f32::max);
    let at_least = row.iter().filter(|&&s| s >= best).count();
    let own = right.iter().filter(|&&c| row[c] >= best).count();
    at_least - own + 1
}

/// Expectation over random orders of `candidates`, of which `right[q]` are right for query q.
fn chance_recalls(candidates: usize, right: &[usize]) -> Recalls {
    let queries = right.len() as f64;
    let missed = |r: usize, k: usize| {
        (0..r)
            .map(|i| (candidates.saturating_sub(k + i)) as f64 / (candidates - i) as f64)
            .product::<f64>()
    };
    let within = |k: usize| right.iter().map(|&r| 1.0 - missed(r, k)).sum::<f64>() / queries;
    let mean_rank =
        right.iter().map(|&r| (candidates + 1) as f64 / (r + 1) as f64).sum::<f64>() / queries;
    // Median: the first rank within which half of the queries are expected.
    let median = (1..=candidates).find(|&k| within(k) >= 0.5).unwrap_or(candidates);
    Recalls { r1: within(1), r5: within(5), r10: within(10), mean_rank, median_rank: median as f64 }
}

//! Pictures with their texts in rows for a decoder. Their lengths differ, and padded to the longest a third of all
//! positions would be padding: so a row holds several pictures, one behind the other, that don't see each other.
//!
//! ```text
//! row 0   queries 0 │ text │ text ║ queries 3 │ text │ ·
//! row 1   queries 2 │ text ║ queries 1 │ text │ text
//! ```

use blip2::llm::Llm;
use blip2::nn::mask::Branch;
use candle_core::{Device, Tensor};

use crate::losses::Targets;
use crate::{Error, Result};

/// One text of stage 2, start and end tokens included. Where the language model has an encoder, that reads the given ids, an
/// end token behind them, and the decoder predicts the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LlmText {
    /// Token ids.
    pub ids: Vec<u32>,
    /// The first so many ids are given, not predicted. LAVIS counts the start token among them only if there is a prompt:
    /// with an empty one it is 0, and the start token is predicted from the last query.
    pub prompt_len: usize,
    /// What a bridge that reads questions reads: word pieces from `[CLS]` to `[SEP]`. Empty for any other bridge.
    pub question: Vec<u32>,
}

/// A row is at most so many times as long as the longest picture with its texts: longer ones fit better, but attention
/// compares all of a row.
const LONGEST: usize = 2;

/// What a decoder reads of a batch, and what it is to predict.
pub(crate) struct Packed {
    /// (rows, t, l).
    pub(crate) embeds: Tensor,
    /// What each position belongs to.
    pub(crate) branches: Vec<Vec<Branch>>,
    /// Every token behind a prompt, predicted from the one before it in its text, or from its picture's last query.
    pub(crate) targets: Targets,
}

impl Packed {
    /// Soft words (b, q, l) and each picture's texts.
    ///
    /// # Errors
    /// If there are not as many pictures as lists of texts, or an id has no embedding.
    pub(crate) fn new(llm: &Llm, soft: &Tensor, texts: &[Vec<LlmText>]) -> Result<Self> {
        let (b, q, l) = soft.dims3()?;
        if texts.len() != b {
            return Err(Error::Training(format!("texts of {} pictures for {b}", texts.len())));
        }
        let tokens = |texts: &Vec<LlmText>| texts.iter().map(|text| text.ids.len()).sum::<usize>();
        let lengths: Vec<usize> = texts.iter().map(|texts| q + tokens(texts)).collect();
        let rows = pack(&lengths);
        let filled = |row: &Vec<usize>| row.iter().map(|&picture| lengths[picture]).sum();
        let width = rows.iter().map(filled).max().unwrap_or(0);

        // Positions are drawn from one table: all soft words, then the words as they come.
        let (mut ids, mut places) = (Vec::<u32>::new(), Vec::<u32>::new());
        let (mut branches, mut targets) = (Vec::with_capacity(rows.len()), Targets::default());
        for (r, row) in rows.iter().enumerate() {
            let mut owners = Vec::with_capacity(width);
            for &picture in row {
                let queries = r * width + owners.len();
                places.extend((picture * q..(picture + 1) * q).map(|i| i as u32));
                owners.extend(std::iter::repeat_n(Branch::Stem(picture), q));
                for (i, text) in texts[picture].iter().enumerate() {
                    let start = r * width + owners.len();
                    for (t, id) in text.ids.iter().enumerate().skip(text.prompt_len) {
                        targets.push(if t == 0 { queries + q } else { start + t } - 1, *id);
                    }
                    places.extend((0..text.ids.len()).map(|t| (b * q + ids.len() + t) as u32));
                    ids.extend(&text.ids);
                    owners.extend(std::iter::repeat_n(Branch::Text(picture, i), text.ids.len()));
                }
            }
            places.resize((r + 1) * width, 0);
            owners.resize(width, Branch::Padding);
            branches.push(owners);
        }
        let mut table = soft.reshape((b * q, l))?;
        if !ids.is_empty() {
            let words = llm.embed(&Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?)?;
            table = Tensor::cat(&[table, words.squeeze(0)?], 0)?;
        }
        let embeds = table.index_select(&Tensor::new(places, &Device::Cpu)?, 0)?;
        Ok(Self { embeds: embeds.reshape((rows.len(), width, l))?, branches, targets })
    }
}

/// Rows of pictures with these lengths: the longest first, each into the fullest row that has room for it. A row for each,
/// if that takes no more positions.
fn pack(lengths: &[usize]) -> Vec<Vec<usize>> {
    let longest = lengths.iter().max().copied().unwrap_or(0);
    let rows = fill(lengths, LONGEST * longest);
    let width = rows.iter().map(|(filled, _)| *filled).max().unwrap_or(0);
    if rows.len() * width < lengths.len() * longest {
        return rows.into_iter().map(|(_, row)| row).collect();
    }
    (0..lengths.len()).map(|picture| vec![picture]).collect()
}

/// Rows with room for so much, and how much each holds.
fn fill(lengths: &[usize], room: usize) -> Vec<(usize, Vec<usize>)> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&picture| std::cmp::Reverse(lengths[picture]));
    let mut rows: Vec<(usize, Vec<usize>)> = Vec::new();
    for picture in order {
        let length = lengths[picture];
        let fitting = rows.iter_mut().filter(|(filled, _)| filled + length <= room);
        match fitting.max_by_key(|(filled, _)| *filled) {
            Some((filled, row)) => {
                *filled += length;
                row.push(picture);
            }
            None => rows.push((length, vec![picture])),
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_picture_has_one_place_and_rows_are_full() {
        let lengths: Vec<usize> = (0..40).map(|i| 20 + i * 37 % 61).collect();
        let rows = pack(&lengths);
        let mut all: Vec<usize> = rows.concat();
        all.sort_unstable();
        assert_eq!(all, (0..40).collect::<Vec<_>>());
        let longest = lengths.iter().max().unwrap();
        let filled: Vec<usize> =
            rows.iter().map(|row| row.iter().map(|&i| lengths[i]).sum()).collect();
        let most = filled.iter().max().unwrap();
        assert!(*most <= LONGEST * longest);
        let padding = most * rows.len() - lengths.iter().sum::<usize>();
        assert!(padding * 10 < most * rows.len(), "{padding} of {}", most * rows.len());
        assert_eq!(pack(&[7]), [[0]]);
        // Equal lengths gain nothing, and three of them would leave a hole.
        assert_eq!(pack(&[5, 5, 5]), [[0], [1], [2]]);
        assert_eq!(pack(&[5, 5]), [[0], [1]]);
        assert!(pack(&[]).is_empty());
    }
}

//! One training step of each stage: a model and a batch in, the losses out. The loop around it is the trainer.

use std::collections::BTreeMap;
use std::sync::Arc;

use blip2::llm::Llm;
use blip2::nn::KvCache;
use blip2::qformer::Picture;
use blip2::stage1::Stage1;
use blip2::stage2::Stage2;
use blip2::t5::T5;
use blip2::tokenizer::{Side, TextBatch};
use blip2_ops::{Communicator, Dropout, all_gather};
use candle_core::{DType, Device, Tensor};

use crate::Result;
use crate::losses::{self, Gathered, Targets};
pub use crate::packed::LlmText;
use crate::packed::Packed;
use crate::rng::Rng;

/// Texts as token ids, padded on the right.
#[derive(Debug, Clone)]
pub struct Texts {
    /// (b, t) u32.
    pub ids: Tensor,
    /// (b, t) u8, 1 = a token, 0 = padding.
    pub tokens: Tensor,
}

/// What stage 1 learns from: b pairs.
pub struct Stage1Batch<'a> {
    /// Image-encoder output (b, p, encoder width).
    pub patches: &'a Tensor,
    /// Texts starting with `[CLS]` and ending with `[SEP]`.
    pub texts: &'a Texts,
    /// Which pictures are the same, if several pairs may share one.
    pub image_ids: Option<&'a [i64]>,
}

/// The four numbers of stage 1, scalars.
pub struct Stage1Losses {
    /// Their sum, equal weights: what is minimised.
    pub total: Tensor,
    /// Image–text contrast.
    pub itc: Tensor,
    /// Image–text matching.
    pub itm: Tensor,
    /// Image-grounded text generation.
    pub itg: Tensor,
}

/// Everything a step draws or shares, apart from batch and weights.
pub struct StepContext<'a> {
    /// Dropout of this step.
    pub dropout: &'a Dropout,
    /// Label smoothing of ITC and ITG.
    pub smoothing: f32,
    /// How many of the batch's pairs ITM learns from, the first ones, at least 1; `None`: all.
    pub itm_pairs: Option<usize>,
    /// Draws the hard negatives.
    pub rng: Rng,
    /// The other ranks.
    pub ranks: &'a Arc<dyn Communicator>,
}

/// Hard negatives of a batch of b pairs, as indices into the pairs of all ranks.
pub struct Negatives {
    /// For text i, a picture that is not its own.
    pub images: Vec<u32>,
    /// For picture i, a text that is not its own.
    pub texts: Vec<u32>,
}

/// Stage 1 (paper §3.2): ITC + ITM + ITG. `None` if all pairs of all ranks show the same picture: then no pair has a wrong
/// partner, and there is nothing to tell apart.
///
/// # Errors
/// If shapes don't fit.
pub fn stage1(
    model: &Stage1,
    batch: &Stage1Batch<'_>,
    mut context: StepContext<'_>,
) -> Result<Option<Stage1Losses>> {
    if is_one_picture(batch, context.ranks)? {
        return Ok(None);
    }
    let losses = stage1_with(model, batch, &mut context, |rng, sims_t2i, sims_i2t, same| {
        Ok(Negatives {
            images: losses::hard_negatives(sims_t2i, same, rng)?,
            texts: losses::hard_negatives(sims_i2t, same, rng)?,
        })
    })?;
    Ok(Some(losses))
}

/// Whether no pair has another picture beside it. Being the same goes both ways, so this holds for all pairs of all ranks
/// or for none: the ranks agree, and none waits for another.
fn is_one_picture(batch: &Stage1Batch<'_>, ranks: &Arc<dyn Communicator>) -> Result<bool> {
    match batch.image_ids {
        Some(ids) => Ok(gather_ids(ids, ranks)?.windows(2).all(|pair| pair[0] == pair[1])),
        None => Ok(batch.patches.dim(0)? * ranks.world() < 2),
    }
}

/// [`stage1`] with the choice of hard negatives given: the goldens fix the draw.
///
/// `choose` gets the similarities texts→pictures and pictures→texts (b, n) and a test for "shows the same picture".
///
/// # Errors
/// If shapes don't fit, or `choose` fails: all pairs that show the same picture have no negatives.
pub fn stage1_with(
    model: &Stage1,
    batch: &Stage1Batch<'_>,
    context: &mut StepContext<'_>,
    choose: impl FnOnce(&mut Rng, &Tensor, &Tensor, &dyn Fn(usize, usize) -> bool) -> Result<Negatives>,
) -> Result<Stage1Losses> {
    let (dropout, ranks) = (context.dropout, context.ranks);
    let b = batch.patches.dim(0)?;
    let first = ranks.rank() * b;
    let Texts { ids, tokens } = batch.texts;

    let everyones = Texts { ids: ranks.all_gather(ids)?, tokens: ranks.all_gather(tokens)? };
    let reader = Reader::new(model, &everyones.ids)?;

    let image = model.image(batch.patches, dropout)?;
    let parts = ByLength::new(&batch.texts.lengths()?);
    let text = texts_by_length(&reader, batch.texts, &parts, dropout)?;
    let all_ids = batch.image_ids.map(|ids| gather_ids(ids, ranks)).transpose()?;
    let all_images = gather_features(&image.embeds, ranks)?;
    let all_texts = gather_features(&text, ranks)?;
    let gathered =
        Gathered { images: &all_images, texts: &all_texts, first, image_ids: all_ids.as_deref() };
    let itc = losses::itc(&image.embeds, &text, &gathered, model.temp()?, context.smoothing)?;

    let same = |row: usize, column: usize| match &all_ids {
        Some(ids) => ids[first + row] == ids[column],
        None => first + row == column,
    };
    let negatives = choose(&mut context.rng, &itc.sim_t2i, &itc.sim_i2t, &same)?;
    let n = context.itm_pairs.map_or(b, |pairs| pairs.clamp(1, b));
    let own: Vec<u32> = (first as u32..(first + n) as u32).collect();
    // Right pairs, then each text with a wrong picture, then each picture with a wrong text.
    let pictures = [own.as_slice(), &negatives.images[..n], &own].concat();
    let texts = [own.as_slice(), &own, &negatives.texts[..n]].concat();
    let all_pictures = image.picture.map(|kv| all_gather(kv, ranks))?;
    let (pictures, texts) = ((&all_pictures, &pictures[..]), (&everyones, &texts[..]));
    let logits = itm_by_length(&reader, pictures, texts, dropout)?;
    let itm = losses::itm(&logits)?;

    let (hidden, wanted) = itg_by_length(&reader, &image.caches, batch.texts, &parts, dropout)?;
    let itg = losses::lm(&model.qformer().lm_logits(&hidden)?, &wanted, context.smoothing)?;

    let total = ((&itc.loss + &itm)? + &itg)?;
    Ok(Stage1Losses { total, itc: itc.loss, itm, itg })
}

/// Rows of a batch in a few parts, short texts apart from long ones: padded to the longest of the batch, half of all text
/// positions would be padding.
struct ByLength {
    /// Rows, and the length of the longest.
    parts: Vec<(Vec<u32>, usize)>,
}

impl ByLength {
    const PARTS: usize = 3;

    /// Parts are worth their while only if they save a fifth of the positions: each reads all weights again.
    fn new(lengths: &[usize]) -> Self {
        let length = |row: u32| lengths[row as usize];
        let mut order: Vec<u32> = (0..lengths.len() as u32).collect();
        order.sort_by_key(|&row| length(row));
        let part = |rows: &[u32]| (rows.to_vec(), rows.last().map_or(1, |&row| length(row)));
        let parts = |count: usize| -> Vec<_> {
            order.chunks(order.len().div_ceil(count).max(1)).map(part).collect()
        };
        let positions = |parts: &[(Vec<u32>, usize)]| -> usize {
            parts.iter().map(|(rows, longest)| rows.len() * longest).sum()
        };
        let (few, one) = (parts(Self::PARTS), parts(1));
        Self { parts: if 5 * positions(&few) <= 4 * positions(&one) { few } else { one } }
    }

    /// What `f` makes of the rows of each part, in the rows' order.
    fn compute(&self, f: impl Fn(&[u32], usize) -> Result<Tensor>) -> Result<Tensor> {
        let computed: Vec<_> =
            self.parts.iter().map(|(rows, longest)| f(rows, *longest)).collect::<Result<_>>()?;
        let order: Vec<u32> = self.parts.iter().flat_map(|(rows, _)| rows).copied().collect();
        let mut places = vec![0; order.len()];
        for (place, row) in (0..).zip(order) {
            places[row as usize] = place;
        }
        select(&Tensor::cat(&computed, 0)?, &places)
    }
}

impl Texts {
    /// Tokens of each text, padding not counted.
    fn lengths(&self) -> Result<Vec<usize>> {
        let length = |row: &Vec<u8>| row.iter().rposition(|seen| *seen != 0).map_or(1, |i| i + 1);
        Ok(self.tokens.to_vec2::<u8>()?.iter().map(length).collect())
    }

    /// The texts of `rows`, cut behind `longest` tokens.
    fn part(&self, rows: &[u32], longest: usize) -> Result<Self> {
        let cut = |all: &Tensor| select(&all.narrow(1, 0, longest)?.contiguous()?, rows);
        Ok(Self { ids: cut(&self.ids)?, tokens: cut(&self.tokens)? })
    }
}

/// The model with the words of one step's texts alone in its table: nine passes look them up, and each would make a gradient
/// of the whole table.
struct Reader {
    model: Stage1,
    /// Word → its row.
    rows: BTreeMap<u32, u32>,
}

impl Reader {
    fn new(model: &Stage1, ids: &Tensor) -> Result<Self> {
        let mut words = ids.flatten_all()?.to_vec1::<u32>()?;
        words.push(model.config().qformer.dec());
        words.sort_unstable();
        words.dedup();
        let rows = words.iter().copied().zip(0..).collect();
        Ok(Self { model: model.with_words(&Tensor::new(words, &Device::Cpu)?)?, rows })
    }

    /// Each word's row.
    fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        let rows: Vec<u32> =
            ids.flatten_all()?.to_vec1::<u32>()?.iter().map(|id| self.rows[id]).collect();
        Ok(Tensor::from_vec(rows, ids.shape(), &Device::Cpu)?)
    }
}

/// [`Stage1::text`].
fn texts_by_length(
    reader: &Reader,
    texts: &Texts,
    parts: &ByLength,
    dropout: &Dropout,
) -> Result<Tensor> {
    parts.compute(|rows, longest| {
        let Texts { ids, tokens } = texts.part(rows, longest)?;
        Ok(reader.model.text(&reader.rows(&ids)?, &tokens, dropout)?)
    })
}

/// Matching logits of pairs, given as rows of pictures and of texts, in their order.
fn itm_by_length(
    reader: &Reader,
    (pictures, picture_rows): (&Picture, &[u32]),
    (texts, text_rows): (&Texts, &[u32]),
    dropout: &Dropout,
) -> Result<Tensor> {
    let lengths = texts.lengths()?;
    let lengths: Vec<usize> = text_rows.iter().map(|&row| lengths[row as usize]).collect();
    ByLength::new(&lengths).compute(|pairs, longest| {
        let rows = |of: &[u32]| pairs.iter().map(|&pair| of[pair as usize]).collect::<Vec<_>>();
        let Texts { ids, tokens } = texts.part(&rows(text_rows), longest)?;
        let pictures = pictures.select(&rows(picture_rows))?;
        Ok(reader.model.itm(&pictures, &reader.rows(&ids)?, &tokens, dropout)?)
    })
}

/// The hidden states that predict a token, and the tokens. ITG reads the same texts with `[DEC]` in the place of `[CLS]` and
/// predicts every token behind it.
fn itg_by_length(
    reader: &Reader,
    caches: &[KvCache],
    texts: &Texts,
    parts: &ByLength,
    dropout: &Dropout,
) -> Result<(Tensor, Vec<u32>)> {
    let dec = reader.model.config().qformer.dec();
    let (mut hidden, mut wanted) = (Vec::new(), Vec::new());
    for (rows, longest) in &parts.parts {
        let texts = texts.part(rows, *longest)?;
        let (ids, targets) = itg_inputs(&texts, dec)?;
        let mut caches = caches.to_vec();
        caches.iter_mut().try_for_each(|cache| cache.reorder(rows))?;
        let states = reader.model.itg(&caches, &reader.rows(&ids)?, &texts.tokens, dropout)?;
        hidden.push(targets.select(&states)?);
        wanted.extend(targets.tokens());
    }
    Ok((Tensor::cat(&hidden, 0)?, wanted))
}

fn itg_inputs(texts: &Texts, dec: u32) -> Result<(Tensor, Targets)> {
    let mut rows = texts.ids.to_vec2::<u32>()?;
    let labels: Vec<Vec<Option<u32>>> = rows
        .iter()
        .zip(texts.tokens.to_vec2::<u8>()?)
        .map(|(row, seen)| {
            row.iter().zip(seen).map(|(&id, seen)| (seen != 0).then_some(id)).collect()
        })
        .collect();
    for row in &mut rows {
        row[0] = dec;
    }
    Ok((Tensor::new(rows, &Device::Cpu)?, Targets::shifted(&labels)))
}

fn select(rows: &Tensor, index: &[u32]) -> Result<Tensor> {
    Ok(rows.index_select(&Tensor::new(index, &Device::Cpu)?, 0)?)
}

/// All ranks' features. The reference gathers without gradient, except in a single process, where there is nothing to
/// gather and both sides of every similarity learn.
fn gather_features(local: &Tensor, ranks: &Arc<dyn Communicator>) -> Result<Tensor> {
    if ranks.world() == 1 { Ok(local.clone()) } else { Ok(ranks.all_gather(&local.detach())?) }
}

fn gather_ids(ids: &[i64], ranks: &Arc<dyn Communicator>) -> Result<Vec<i64>> {
    let local = Tensor::new(ids, &Device::Cpu)?;
    Ok(ranks.all_gather(&local)?.to_dtype(DType::I64)?.to_vec1::<i64>()?)
}

/// Stage 2 (paper §3.3): the language model reads queries and given text; the loss is on the other text alone.
///
/// `patches` (b, p, encoder width), any number of texts each, that don't see each other.
///
/// # Errors
/// If shapes don't fit, or no text has a token to predict.
pub fn stage2(
    bridge: &Stage2,
    llm: &Llm,
    patches: &Tensor,
    texts: &[Vec<LlmText>],
    dropout: &Dropout,
) -> Result<Tensor> {
    if !bridge.config().reads_questions {
        return behind(llm, &bridge.soft_words(patches, dropout)?, texts);
    }
    // The queries of each text are its own: a row a text.
    let numbered = (0..).zip(texts).flat_map(|(i, row)| row.iter().map(move |text| (i, text)));
    let (pictures, texts): (Vec<u32>, Vec<&LlmText>) = numbered.unzip();
    let questions: Vec<Vec<u32>> = texts.iter().map(|text| text.question.clone()).collect();
    let batch = TextBatch::new(&questions, 0, Side::Right, 0)?;
    let read = (&batch.ids, &batch.mask_tensor()?);
    let soft = bridge.soft_words_asked(patches, &pictures, read, dropout)?;
    let rows: Vec<Vec<LlmText>> = texts.into_iter().map(|text| vec![text.clone()]).collect();
    behind(llm, &soft, &rows)
}

/// The loss of texts behind soft words.
fn behind(llm: &Llm, soft: &Tensor, texts: &[Vec<LlmText>]) -> Result<Tensor> {
    match llm {
        Llm::T5(t5) => encoder_decoder(t5, llm, soft, texts),
        Llm::Llama(_) | Llm::Opt(_) => decoder(llm, soft, texts),
    }
}

/// The texts of a picture share its queries, which the language model reads once, and pictures share rows: the loss is that
/// of one row per text, at a fraction of its cost.
fn decoder(llm: &Llm, soft: &Tensor, texts: &[Vec<LlmText>]) -> Result<Tensor> {
    let Packed { embeds, branches, targets } = Packed::new(llm, soft, texts)?;
    let hidden = llm.hidden_branches(&embeds, &branches)?;
    let logits = llm.logits(&targets.select(&hidden)?)?;
    losses::lm(&logits, targets.tokens(), 0.0)
}

/// The encoder reads queries and given text, a row per text; the decoder predicts the rest from its start token on.
fn encoder_decoder(t5: &T5, llm: &Llm, soft: &Tensor, texts: &[Vec<LlmText>]) -> Result<Tensor> {
    let pad = t5.config().pad_token_id;
    let texts: Vec<(u32, &LlmText)> =
        (0..).zip(texts).flat_map(|(i, row)| row.iter().map(move |text| (i, text))).collect();
    let pictures: Vec<u32> = texts.iter().map(|(picture, _)| *picture).collect();
    let (given, wanted): (Vec<_>, Vec<_>) =
        texts.iter().map(|(_, text)| text.ids.split_at(text.prompt_len)).unzip();
    let batch = |rows: &[Vec<u32>]| TextBatch::new(rows, pad, Side::Right, 0);

    let given = batch(&given.iter().map(|ids| ids.to_vec()).collect::<Vec<_>>())?;
    let embeds = Tensor::cat(&[&select(soft, &pictures)?, &llm.embed(&given.ids)?], 1)?;
    let queries = vec![true; soft.dim(1)?];
    let visible: Vec<_> = given.mask.iter().map(|row| [&queries[..], row].concat()).collect();
    let mut memory = t5.encode(&embeds, &visible)?;

    let start = t5.config().decoder_start_token_id;
    let shifted = |ids: &&[u32]| [&[start], &ids[..ids.len().saturating_sub(1)]].concat();
    let inputs = batch(&wanted.iter().map(shifted).collect::<Vec<_>>())?;
    let hidden = t5.read(&inputs.ids, &mut memory)?;
    let width = hidden.dim(1)?;
    let mut targets = Targets::default();
    for (row, ids) in wanted.iter().enumerate() {
        ids.iter().enumerate().for_each(|(t, id)| targets.push(row * width + t, *id));
    }
    losses::lm(&t5.logits(&targets.select(&hidden)?)?, targets.tokens(), 0.0)
}

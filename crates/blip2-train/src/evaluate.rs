//! Runs a model over a held-out split and measures it, beside two baselines on the same pictures: the *nearest neighbour*
//! (caption and answers of the training picture that the frozen encoder finds closest) and *blind* (the same model shown
//! a blank picture). A model that does not beat both has not learnt to look. Where the model's first stage has a head that
//! writes, its captions stand there, too: what the second stage loses is its own; where captions are a choice from both
//! stages', so do the second's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use blip2::choice::{Candidate, Candidates, candidates};
use blip2::generate::{Beam, Hypothesis, Options, Strategy};
use blip2::image::{self, Pixels, Rgb};
use blip2::model::{CaptionStage, Captioner, Matcher, Vision};
use blip2::stage1::similarity;
use blip2_ops::{Dropout, l2_normalize};
use candle_core::{Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::data::{Dataset, Meta, Sample};
use crate::eval::answers::{answers_match, names_noun};
use crate::eval::metrics::{Item, Scores, score_captions};
use crate::eval::report::{
    Accuracy, CaptionRow, Counts, PictureRow, QuestionRow, Report, RetrievalReport, System,
    SystemScores, thumbnail,
};
use crate::eval::retrieval::{self, ScoreMatrix};
use crate::features::{FeatureCache, FeatureShape};
use crate::recipe::{DataBuild, parse_toml, positive, require};
use crate::tasks::data_hash;
use crate::{Error, Result};

/// A recipe of an evaluation, as written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalFile {
    /// Folder that gets `report.json`, `report.txt` and `report.html`.
    pub out: PathBuf,
    /// What is looked at.
    pub data: EvalData,
    /// How captions and answers are searched.
    pub decode: DecodeSection,
    /// Pictures and texts that look for each other.
    pub retrieval: RetrievalSection,
}

/// What is looked at.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalData {
    /// Which data set `blip2 data` makes in `dir` when it is not there.
    pub build: DataBuild,
    /// Folder with the shards of every split.
    pub dir: PathBuf,
    /// The split that is measured.
    pub split: String,
    /// The split that the nearest neighbour looks in.
    pub train: String,
    /// At most so many pictures of the measured split; 0: all.
    pub pictures: usize,
    /// At most so many training pictures for the nearest neighbour; 0: all.
    pub train_pictures: usize,
    /// Folder of training's feature caches: where one fits, the nearest neighbour reads the training pictures' features
    /// there instead of encoding them anew.
    pub features: PathBuf,
    /// At most so many questions per picture.
    pub questions: usize,
    /// Pictures computed together.
    pub batch_size: usize,
}

/// How captions and answers are searched.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecodeSection {
    /// Beams; 1 is greedy.
    pub num_beams: usize,
    /// Longest text, in tokens.
    pub max_new_tokens: usize,
    /// Shortest text, in tokens.
    pub min_new_tokens: usize,
    /// Exponent of the length that beam scores are divided by.
    pub length_penalty: f32,
}

/// Pictures and texts that look for each other.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetrievalSection {
    /// So many pairs with captions that differ; 0: no retrieval.
    pub pairs: usize,
    /// So many best candidates are re-ranked by image–text matching; 0: none.
    pub k_test: usize,
}

impl EvalFile {
    /// Reads the recipe and applies `changes`, each `key=value`.
    ///
    /// # Errors
    /// If the file can't be read, a field is unknown, missing or out of range; the message names file and field.
    pub fn read(path: &Path, changes: &[String]) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        let file = parse_toml(&text, changes).and_then(|file: Self| {
            positive("data.batch_size", file.data.batch_size)?;
            file.decode.check()?;
            Ok(file)
        });
        file.map_err(|err| match err {
            Error::Recipe(reason) => Error::Recipe(format!("{}: {reason}", path.display())),
            other => other,
        })
    }
}

impl DecodeSection {
    /// Better known now than after the pictures are encoded.
    fn check(self) -> Result<()> {
        positive("decode.num_beams", self.num_beams)?;
        positive("decode.max_new_tokens", self.max_new_tokens)?;
        require(
            self.min_new_tokens <= self.max_new_tokens,
            "decode.min_new_tokens",
            self.min_new_tokens,
            &format!("at most max_new_tokens = {}", self.max_new_tokens),
        )?;
        let penalty = self.length_penalty;
        require(penalty.is_finite(), "decode.length_penalty", penalty, "a finite number")
    }

    fn options(self) -> Options {
        let strategy = if self.num_beams == 1 {
            Strategy::Greedy
        } else {
            let length_penalty = self.length_penalty;
            Strategy::Beam(Beam { num_beams: self.num_beams, length_penalty, ..Beam::default() })
        };
        Options {
            strategy,
            max_new_tokens: self.max_new_tokens,
            min_new_tokens: self.min_new_tokens,
            ..Options::default()
        }
    }
}

/// A model as evaluation wants it.
pub struct Subject<'a> {
    /// Its name.
    pub name: &'a str,
    /// Hash of its trained weights.
    pub hash: String,
    /// See [`crate::parts::vision_key`].
    pub vision_key: serde_json::Value,
    /// Who writes its captions.
    pub caption_stage: CaptionStage,
    /// Captions and answers.
    pub captioner: &'a Captioner,
    /// Retrieval; none where the model has no stage 1.
    pub matcher: Option<&'a Matcher>,
}

impl Subject<'_> {
    /// The first stage, if it has a head that writes.
    fn writer(&self) -> Option<&Matcher> {
        self.matcher.filter(|matcher| !matcher.bridge().config().matching_only)
    }
}

/// What one system said about one picture.
struct Said {
    caption: String,
    answers: Vec<String>,
}

/// A question and its right answer.
type Question = (String, String);

/// A picture under test.
struct Exam {
    sample: Sample,
    picture: Rgb,
    /// Questions asked.
    questions: Vec<Question>,
}

/// Runs the whole evaluation; `say` is told what is going on: what, done, of how many.
///
/// # Errors
/// If the data can't be read or a model does not fit.
pub fn evaluate(
    subject: &Subject<'_>,
    file: &EvalFile,
    say: &mut dyn FnMut(&str, u64, u64),
) -> Result<Report> {
    let begin = Instant::now();
    let mut notes = Vec::new();
    let mut open = |split: &str| {
        Dataset::open_split(&file.data.dir, split, &mut |note| notes.push(note.to_owned()))
    };
    let (test, train) = (open(&file.data.split)?, open(&file.data.train)?);
    let exams = read_exams(&test, &file.data)?;
    let metas = (0..test.len()).map(|i| test.meta(i)).collect::<Result<Vec<_>>>()?;

    let vision = subject.captioner.vision();
    let (patches, classes) = encode_exams(vision, &exams, file.data.batch_size, say)?;
    let model = ask_model(subject, &exams, &patches, file, say)?;
    let nearest = {
        let (features, metas) = training_pictures(subject, &train, &file.data, say)?;
        let cosines = blip2_ops::linear(&classes, &features, None)?.to_vec2::<f32>()?;
        exams.iter().zip(cosines).map(|(exam, row)| say_as_nearest(exam, &row, &metas)).collect()
    };
    let blind = ask_blind(subject, &exams, file, say)?;
    let retrieval = match subject.matcher {
        Some(matcher) if file.retrieval.pairs > 0 => {
            Some(retrieve(matcher, &exams, &patches, file.retrieval, say)?)
        }
        _ => None,
    };

    let said = model
        .into_iter()
        .chain([(System::NearestNeighbour, nearest), (System::Blind, blind)])
        .collect::<Vec<_>>();
    let mut pictures = exams.iter().map(picture_row).collect::<Result<Vec<_>>>()?;
    let systems = said
        .iter()
        .map(|(system, said)| score(*system, said, &exams, &mut pictures))
        .collect::<Result<Vec<_>>>()?;
    Ok(Report {
        model: subject.name.to_owned(),
        model_hash: subject.hash.clone(),
        split: file.data.split.clone(),
        data_hash: data_hash(&test, &metas, &file.data.dir, &file.data.split)?,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        counts: Counts {
            pictures: exams.len(),
            references: exams.iter().map(|exam| exam.sample.meta.all_captions().len()).sum(),
            nouns: exams.iter().filter(|exam| exam.sample.meta.noun.is_some()).count(),
            questions: exams.iter().map(|exam| exam.questions.len()).sum(),
        },
        decode: decode_settings(file)?,
        notes,
        systems,
        retrieval,
        seconds: begin.elapsed().as_secs_f64(),
        pictures,
    })
}

fn decode_settings(file: &EvalFile) -> Result<BTreeMap<String, serde_json::Value>> {
    let value = serde_json::to_value(file.decode).map_err(|err| Error::Recipe(err.to_string()))?;
    Ok(value.as_object().into_iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect())
}

/// `count` of `len` things, spread evenly; 0 means all.
fn spread(len: usize, count: usize) -> Vec<usize> {
    if count == 0 || count >= len {
        return (0..len).collect();
    }
    (0..count).map(|i| i * len / count).collect()
}

fn read_exams(test: &Dataset, data: &EvalData) -> Result<Vec<Exam>> {
    spread(test.len(), data.pictures)
        .into_par_iter()
        .map(|i| {
            let sample = test.get(i)?;
            let picture = image::decode(&sample.image, Pixels::Default)
                .map_err(|err| Error::Data(format!("{}: {err}", sample.key)))?;
            let questions = sample.meta.qa.iter().take(data.questions);
            let questions = questions.map(|qa| (qa.question.clone(), qa.answer.clone())).collect();
            Ok(Exam { sample, picture, questions })
        })
        .collect()
}

/// The encoder's output per batch of pictures, and each picture's normalised class token (n, width).
fn encode_exams(
    vision: &Vision,
    exams: &[Exam],
    batch: usize,
    say: &mut dyn FnMut(&str, u64, u64),
) -> Result<(Vec<Tensor>, Tensor)> {
    let mut all = Vec::new();
    for (i, part) in exams.chunks(batch).enumerate() {
        say("encoding pictures", (i * batch) as u64, exams.len() as u64);
        let pictures: Vec<Rgb> = part.iter().map(|exam| exam.picture.clone()).collect();
        all.push(vision.encode(&pictures)?);
    }
    let classes = all.iter().map(class_tokens).collect::<Result<Vec<_>>>()?;
    Ok((all, Tensor::cat(&classes, 0)?))
}

fn class_tokens(patches: &Tensor) -> Result<Tensor> {
    Ok(l2_normalize(&patches.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?)?)
}

/// What the model says, and what each of its stages alone would have said, as far as that is something else.
fn ask_model(
    subject: &Subject<'_>,
    exams: &[Exam],
    patches: &[Tensor],
    file: &EvalFile,
    say: &mut dyn FnMut(&str, u64, u64),
) -> Result<BTreeMap<System, Vec<Said>>> {
    let mut said: BTreeMap<System, Vec<Said>> = BTreeMap::new();
    let mut done = 0;
    for (part, patches) in exams.chunks(file.data.batch_size).zip(patches) {
        say("captions and answers", done, exams.len() as u64);
        done += part.len() as u64;
        let questions: Vec<&[Question]> =
            part.iter().map(|exam| exam.questions.as_slice()).collect();
        let mut answers = answer(subject.captioner, &questions, patches, file)?;
        for (system, captions) in caption(subject, patches, file)? {
            // The stages alone are asked for captions only.
            let answers = match system {
                System::Model => std::mem::take(&mut answers),
                _ => vec![Vec::new(); part.len()],
            };
            let each = captions.into_iter().zip(answers);
            let each = each.map(|(caption, answers)| Said { caption, answers });
            said.entry(system).or_default().extend(each);
        }
    }
    Ok(said)
}

/// The captions of a batch of encoded pictures: the model's as it gives them by default, and those of each stage that would
/// be others.
fn caption(
    subject: &Subject<'_>,
    patches: &Tensor,
    file: &EvalFile,
) -> Result<Vec<(System, Vec<String>)>> {
    let Subject { captioner, caption_stage, .. } = *subject;
    let options = file.decode.options();
    let Some(matcher) = subject.writer() else {
        let prompts = vec![captioner.caption_prompt(); patches.dim(0)?];
        let found = captioner.generate_from(patches, &prompts, &options)?;
        return Ok(vec![(System::Model, likeliest(captioner, found)?)]);
    };
    let all = candidates(captioner, matcher, patches, &options)?;
    let texts = |of: &dyn Fn(&Candidates) -> Option<Candidate>| -> Vec<String> {
        all.iter().map(|each| of(each).map(|best| best.text).unwrap_or_default()).collect()
    };
    let first = texts(&|each| each.first.first().cloned());
    let second = texts(&|each| each.second.first().cloned());
    Ok(match caption_stage {
        CaptionStage::First => vec![(System::Model, first), (System::SecondStage, second)],
        CaptionStage::Second => vec![(System::Model, second), (System::FirstStage, first)],
        CaptionStage::Both => {
            let best = texts(&|each| each.clone().best(1).pop());
            let alone = [(System::SecondStage, second), (System::FirstStage, first)];
            [(System::Model, best)].into_iter().chain(alone).collect()
        }
    })
}

/// The likeliest text for each.
fn likeliest(captioner: &Captioner, found: Vec<Vec<Hypothesis>>) -> Result<Vec<String>> {
    let text = |each: Vec<Hypothesis>| match each.first() {
        Some(hypothesis) => Ok(captioner.text(hypothesis)?),
        None => Ok(String::new()),
    };
    found.into_iter().map(text).collect()
}

/// Its answers to the questions about each picture.
fn answer(
    captioner: &Captioner,
    asked: &[&[Question]],
    patches: &Tensor,
    file: &EvalFile,
) -> Result<Vec<Vec<String>>> {
    let options = file.decode.options();
    let mut said = vec![Vec::new(); asked.len()];
    let mut rows = Vec::new();
    let mut prompts = Vec::new();
    let mut all: Vec<&str> = Vec::new();
    for (i, questions) in asked.iter().enumerate() {
        for (question, _) in *questions {
            rows.push(i as u32);
            all.push(question);
            prompts.push(captioner.question_prompt(&[], question));
        }
    }
    let size = file.data.batch_size;
    for ((rows, prompts), questions) in
        rows.chunks(size).zip(prompts.chunks(size)).zip(all.chunks(size))
    {
        let patches = patches.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)?;
        let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
        let answers = captioner.answer_from(&patches, questions, &prompts, &options)?;
        for (row, answer) in rows.iter().zip(likeliest(captioner, answers)?) {
            said[*row as usize].push(answer);
        }
    }
    Ok(said)
}

/// The same model, shown white paper: what it knows without looking. The picture never changes, so each question is asked
/// once, however many pictures it is about.
fn ask_blind(
    subject: &Subject<'_>,
    exams: &[Exam],
    file: &EvalFile,
    say: &mut dyn FnMut(&str, u64, u64),
) -> Result<Vec<Said>> {
    /// Questions between two words of progress.
    const PART: usize = 64;
    let captioner = subject.captioner;
    let side = captioner.vision().config().image_size as u32;
    let blank = Rgb { width: side, height: side, data: vec![255; (side * side * 3) as usize] };
    let blank = captioner.vision().encode(&[blank])?;
    let all = exams.iter().flat_map(|exam| &exam.questions);
    let distinct: BTreeMap<&str, &Question> = all.map(|asked| (asked.0.as_str(), asked)).collect();
    let asked: Vec<Question> = distinct.into_values().cloned().collect();
    let mut answers: BTreeMap<&str, String> = BTreeMap::new();
    let captions = caption(subject, &blank, file)?;
    let model = captions.into_iter().find(|(system, _)| *system == System::Model);
    let caption = model.and_then(|(_, mut captions)| captions.pop()).unwrap_or_default();
    for (i, part) in asked.chunks(PART).enumerate() {
        say("blind", (i * PART) as u64, asked.len() as u64);
        let found = self::answer(captioner, &[part], &blank, file)?.pop().unwrap_or_default();
        answers.extend(part.iter().map(|(question, _)| question.as_str()).zip(found));
    }
    let answer =
        |(question, _): &Question| answers.get(question.as_str()).cloned().unwrap_or_default();
    let said = |exam: &Exam| Said {
        caption: caption.clone(),
        answers: exam.questions.iter().map(answer).collect(),
    };
    Ok(exams.iter().map(said).collect())
}

/// The training pictures among which the nearest neighbour looks: normalised class tokens (n, width), and what is said of
/// each.
fn training_pictures(
    subject: &Subject<'_>,
    train: &Dataset,
    data: &EvalData,
    say: &mut dyn FnMut(&str, u64, u64),
) -> Result<(Tensor, Vec<Meta>)> {
    let vision = subject.captioner.vision();
    let chosen = spread(train.len(), data.train_pictures);
    let metas = (0..train.len()).map(|i| train.meta(i)).collect::<Result<Vec<_>>>()?;
    let shape = FeatureShape {
        samples: train.len(),
        views: 1,
        tokens: vision.config().num_tokens(),
        width: vision.config().width,
    };
    let hash = data_hash(train, &metas, &data.dir, &data.train)?;
    let cache = FeatureCache::find_plain(&data.features, &subject.vision_key, &hash, shape)?;
    let mut features = Vec::new();
    for (i, part) in chosen.chunks(data.batch_size).enumerate() {
        let done = (i * data.batch_size) as u64;
        say("training pictures for the nearest neighbour", done, chosen.len() as u64);
        let patches = match &cache {
            Some(cache) => cache.read(0, part)?,
            None => vision.encode(&read_pictures(train, part)?)?,
        };
        features.push(class_tokens(&patches)?);
    }
    let metas = chosen.iter().map(|&i| metas[i].clone()).collect();
    Ok((Tensor::cat(&features, 0)?, metas))
}

fn read_pictures(data: &Dataset, indices: &[usize]) -> Result<Vec<Rgb>> {
    let read = |&i: &usize| {
        let sample = data.get(i)?;
        image::decode(&sample.image, Pixels::Default)
            .map_err(|err| Error::Data(format!("{}: {err}", sample.key)))
    };
    indices.par_iter().map(read).collect()
}

/// What the training data says about the closest training picture. A question is answered by the closest picture that was
/// asked the same.
fn say_as_nearest(exam: &Exam, cosines: &[f32], metas: &[Meta]) -> Said {
    let mut order: Vec<usize> = (0..cosines.len()).collect();
    order.sort_by(|&a, &b| cosines[b].total_cmp(&cosines[a]));
    let answer = |question: &str| {
        let asked = order.iter().flat_map(|&i| &metas[i].qa).find(|qa| qa.question == question);
        asked.map(|qa| qa.answer.clone()).unwrap_or_default()
    };
    Said {
        caption: order.first().map(|&i| metas[i].caption.clone()).unwrap_or_default(),
        answers: exam.questions.iter().map(|(question, _)| answer(question)).collect(),
    }
}

/// What a question asks for, told from its words.
fn kind_of(question: &str) -> &'static str {
    const KINDS: [(&str, &str); 8] = [
        ("how many", "count"),
        ("what color", "color"),
        ("is there", "presence"),
        ("what is to the", "place"),
        ("what is above", "place"),
        ("what is below", "place"),
        ("which", "choice"),
        ("what is", "thing"),
    ];
    KINDS.iter().find(|(start, _)| question.starts_with(start)).map_or("other", |(_, kind)| kind)
}

fn picture_row(exam: &Exam) -> Result<PictureRow> {
    const SIDE: u32 = 160;
    let Rgb { width, height, data } = &exam.picture;
    let picture = ::image::RgbImage::from_raw(*width, *height, data.clone())
        .ok_or_else(|| Error::Data(format!("{}: a picture of impossible size", exam.sample.key)))?;
    let meta = &exam.sample.meta;
    Ok(PictureRow {
        key: exam.sample.key.clone(),
        thumbnail: Some(thumbnail(&picture, SIDE)?),
        references: meta.all_captions().into_iter().map(str::to_owned).collect(),
        noun: meta.noun.clone(),
        captions: BTreeMap::new(),
        questions: exam
            .questions
            .iter()
            .map(|(question, truth)| QuestionRow {
                question: question.clone(),
                kind: kind_of(question).to_owned(),
                truth: truth.clone(),
                answers: BTreeMap::new(),
            })
            .collect(),
    })
}

/// The numbers of one system; what it said is written into the pictures' rows.
fn score(
    system: System,
    said: &[Said],
    exams: &[Exam],
    pictures: &mut [PictureRow],
) -> Result<SystemScores> {
    let items: Vec<Item> = said
        .iter()
        .zip(exams)
        .map(|(said, exam)| Item::new(&said.caption, &exam.sample.meta.all_captions()))
        .collect();
    let scores = score_captions(&items)?;
    let mut nouns = Accuracy::default();
    let mut questions = Accuracy::default();
    let mut kinds: BTreeMap<String, Accuracy> = BTreeMap::new();
    for ((said, scores), row) in said.iter().zip(&scores.items).zip(pictures) {
        let named = row.noun.as_ref().map(|noun| names_noun(&said.caption, noun));
        named.into_iter().for_each(|named| nouns.add(named));
        let Scores { cider_d, rouge_l, .. } = *scores;
        let caption =
            CaptionRow { text: said.caption.clone(), cider: cider_d, rouge_l, names_noun: named };
        row.captions.insert(system, caption);
        for (question, answer) in row.questions.iter_mut().zip(&said.answers) {
            let right = answers_match(answer, &question.truth);
            questions.add(right);
            kinds.entry(question.kind.clone()).or_default().add(right);
            question.answers.insert(system, (answer.clone(), right));
        }
    }
    Ok(SystemScores {
        system,
        cider: scores.corpus.cider_d,
        bleu4: scores.corpus.bleu[3],
        rouge_l: scores.corpus.rouge_l,
        noun_accuracy: nouns,
        question_accuracy: questions,
        question_kinds: kinds,
    })
}

/// Pictures and their first captions look for each other, one picture for each distinct caption.
fn retrieve(
    matcher: &Matcher,
    exams: &[Exam],
    patches: &[Tensor],
    section: RetrievalSection,
    say: &mut dyn FnMut(&str, u64, u64),
) -> Result<RetrievalReport> {
    let off = Dropout::off();
    let mut seen = std::collections::BTreeSet::new();
    let distinct = (0..exams.len()).filter(|&i| seen.insert(exams[i].sample.meta.caption.as_str()));
    let rows: Vec<usize> = distinct.take(section.pairs).collect();
    let index: Vec<u32> = rows.iter().map(|&i| i as u32).collect();
    let patches = Tensor::cat(patches, 0)?.index_select(&Tensor::new(index, &Device::Cpu)?, 0)?;
    let captions: Vec<&str> = rows.iter().map(|&i| exams[i].sample.meta.caption.as_str()).collect();
    let texts = matcher.tokenize(&captions)?;
    let tokens = texts.mask_tensor()?;

    say("retrieval", 0, rows.len() as u64);
    let image = matcher.bridge().image(&patches, &off)?;
    let text = matcher.bridge().text(&texts.ids, &tokens, &off)?;
    let n = rows.len();
    let sims = similarity(&image.embeds, &text)?.flatten_all()?.to_vec1::<f32>()?;
    let i2t = ScoreMatrix::new(n, n, sims)?;
    let t2i = i2t.transposed();
    let own: Vec<usize> = (0..n).collect();

    // Logit of "matched" for pairs of rows, as the reference ranks.
    let itm = |pictures: &[u32], of: &[u32]| -> Result<Vec<f32>> {
        let of = Tensor::new(of, &Device::Cpu)?;
        let (ids, tokens) = (texts.ids.index_select(&of, 0)?, tokens.index_select(&of, 0)?);
        let logits = matcher.bridge().itm(&image.picture.select(pictures)?, &ids, &tokens, &off)?;
        Ok(logits.narrow(1, 1, 1)?.flatten_all()?.to_vec1()?)
    };
    let numbers = |list: &[usize]| list.iter().map(|&i| i as u32).collect::<Vec<_>>();
    let mut done = 0;
    let itc_itm = if section.k_test == 0 {
        None
    } else {
        let by_image = retrieval::rerank(&i2t, section.k_test, |image, candidates| {
            done += 1;
            say("retrieval", done, 2 * n as u64);
            itm(&vec![image as u32; candidates.len()], &numbers(candidates))
        })?;
        let by_text = retrieval::rerank(&t2i, section.k_test, |text, candidates| {
            done += 1;
            say("retrieval", done, 2 * n as u64);
            itm(&numbers(candidates), &vec![text as u32; candidates.len()])
        })?;
        Some(retrieval::evaluate(&by_image, &by_text, &own)?)
    };
    Ok(RetrievalReport {
        pictures: n,
        texts: n,
        itc: retrieval::evaluate(&i2t, &t2i, &own)?,
        itc_itm,
        k_test: section.k_test,
        chance: retrieval::chance(n, &own)?,
    })
}

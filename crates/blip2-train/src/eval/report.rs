//! The report of an evaluation: text for the terminal, JSON for programs, one HTML page for people.
//!
//! A [`Report`] is plain data that the driver fills. Scores are fractions in JSON (CIDEr-D 0 to 10, as `pycocoevalcap`
//! returns them) and ×100 in text and HTML, as papers print them. The page holds its pictures and needs nothing else;
//! every text that comes from data or models is escaped.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use base64::Engine as _;
use serde::{Deserialize, Serialize};

use super::retrieval::{Recalls, Retrieval};
use crate::{Error, Result};

/// Who captioned and answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum System {
    /// The model under test, captioning as it does by default.
    Model,
    /// Its second stage alone, where it does not write by itself.
    SecondStage,
    /// Its first stage alone, where it does not write by itself: what the second could have told the language model.
    FirstStage,
    /// Baseline: caption and answers of the training picture nearest in the frozen encoder's features.
    NearestNeighbour,
    /// Baseline: the same model shown a blank picture.
    Blind,
}

impl System {
    /// The name for people.
    pub fn label(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::SecondStage => "second stage",
            Self::FirstStage => "first stage",
            Self::NearestNeighbour => "nearest neighbour",
            Self::Blind => "blind",
        }
    }
}

/// How many of how many.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accuracy {
    /// Right ones.
    pub right: usize,
    /// All that were asked.
    pub total: usize,
}

impl Accuracy {
    /// Counts one more.
    pub fn add(&mut self, right: bool) {
        self.right += usize::from(right);
        self.total += 1;
    }

    /// The share of right ones, 0 to 1; `None` if nothing was asked.
    pub fn fraction(self) -> Option<f64> {
        (self.total > 0).then(|| self.right as f64 / self.total as f64)
    }
}

/// What the split holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Pictures captioned.
    pub pictures: usize,
    /// Reference captions of them.
    pub references: usize,
    /// Pictures with a head noun.
    pub nouns: usize,
    /// Questions asked.
    pub questions: usize,
}

/// The scores of one system.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SystemScores {
    /// Whose.
    pub system: System,
    /// CIDEr-D, 0 to 10.
    pub cider: f64,
    /// BLEU-4 of the whole split, 0 to 1.
    pub bleu4: f64,
    /// ROUGE-L, 0 to 1.
    pub rouge_l: f64,
    /// Captions that name the head noun.
    pub noun_accuracy: Accuracy,
    /// Answers that match.
    pub question_accuracy: Accuracy,
    /// The same per kind of question.
    pub question_kinds: BTreeMap<String, Accuracy>,
}

/// Retrieval of one split.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RetrievalReport {
    /// Pictures searched.
    pub pictures: usize,
    /// Texts searched.
    pub texts: usize,
    /// By the contrastive similarity alone.
    pub itc: Retrieval,
    /// Re-ranked by image–text matching.
    pub itc_itm: Option<Retrieval>,
    /// How many candidates were re-ranked.
    pub k_test: usize,
    /// What guessing gets.
    pub chance: Retrieval,
}

/// One question about a picture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuestionRow {
    /// The question.
    pub question: String,
    /// Its kind: `count`, `colour`…
    pub kind: String,
    /// The right answer.
    pub truth: String,
    /// Each system's answer, and whether it is right.
    pub answers: BTreeMap<System, (String, bool)>,
}

/// One caption of one picture with its scores.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CaptionRow {
    /// The caption.
    pub text: String,
    /// CIDEr-D of this picture.
    pub cider: f64,
    /// ROUGE-L of this picture.
    pub rouge_l: f64,
    /// Does it name the head noun? `None` where the picture has none.
    pub names_noun: Option<bool>,
}

/// One picture of the split.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PictureRow {
    /// The sample's key.
    pub key: String,
    /// A small version as a data URL ([`thumbnail`]); in the page only.
    #[serde(skip)]
    pub thumbnail: Option<String>,
    /// The reference captions.
    pub references: Vec<String>,
    /// The head noun.
    pub noun: Option<String>,
    /// Each system's caption.
    pub captions: BTreeMap<System, CaptionRow>,
    /// The questions about it.
    pub questions: Vec<QuestionRow>,
}

/// The result of `blip2 eval`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The model's name.
    pub model: String,
    /// sha256 of its trained weights.
    pub model_hash: String,
    /// The split: `test`, `val`…
    pub split: String,
    /// sha256 of the split's shards.
    pub data_hash: String,
    /// The version of the program.
    pub version: String,
    /// What the split holds.
    pub counts: Counts,
    /// How captions were decoded, setting by setting.
    pub decode: BTreeMap<String, serde_json::Value>,
    /// What a reader of the numbers should know: samples that could not be used, say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// The model first, then its stages as far as they alone would have said something else, then the baselines.
    pub systems: Vec<SystemScores>,
    /// Retrieval, where it was measured.
    pub retrieval: Option<RetrievalReport>,
    /// How long the evaluation took.
    pub seconds: f64,
    /// The pictures, or as many as the report is to show.
    pub pictures: Vec<PictureRow>,
}

/// A picture as a JPEG data URL, its longer side at most `side` pixels (at least 1).
///
/// # Errors
/// [`Error::Data`] if the encoder fails.
pub fn thumbnail(picture: &image::RgbImage, side: u32) -> Result<String> {
    let longer = picture.width().max(picture.height()).max(1);
    let scaled =
        |length: u32| (u64::from(length) * u64::from(side) / u64::from(longer)).max(1) as u32;
    let small = if longer > side {
        image::imageops::thumbnail(picture, scaled(picture.width()), scaled(picture.height()))
    } else {
        picture.clone()
    };
    let mut bytes = Vec::new();
    let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, 82);
    small.write_with_encoder(encoder).map_err(|e| Error::Data(format!("thumbnail: {e}")))?;
    Ok(format!(
        "data:image/jpeg;base64,{}",
        base64::engine::general_purpose::STANDARD.encode(bytes)
    ))
}

// ---- numbers as people read them -------------------------------------------------------------

fn percent(value: f64) -> String {
    format!("{:.1}", 100.0 * value)
}

fn accuracy(value: Accuracy) -> String {
    value.fraction().map_or_else(|| "-".into(), percent)
}

/// The table of systems: heading, then one row each, all as text.
fn system_table(report: &Report) -> Vec<Vec<String>> {
    let heading = ["", "CIDEr-D", "BLEU-4", "ROUGE-L", "noun %", "answers %"];
    let mut rows = vec![heading.map(String::from).to_vec()];
    for s in &report.systems {
        rows.push(vec![
            s.system.label().into(),
            percent(s.cider),
            percent(s.bleu4),
            percent(s.rouge_l),
            accuracy(s.noun_accuracy),
            accuracy(s.question_accuracy),
        ]);
    }
    rows
}

/// The table of question kinds, or nothing if no question was asked.
fn kind_table(report: &Report) -> Vec<Vec<String>> {
    let mut kinds: Vec<&String> =
        report.systems.iter().flat_map(|s| s.question_kinds.keys()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    if kinds.is_empty() {
        return Vec::new();
    }
    let asked: Vec<_> = report.systems.iter().filter(|s| !s.question_kinds.is_empty()).collect();
    let mut heading = vec!["answers %".to_string(), "questions".into()];
    heading.extend(asked.iter().map(|s| s.system.label().to_string()));
    let mut rows = vec![heading];
    for kind in kinds {
        let of = |s: &SystemScores| s.question_kinds.get(kind).copied().unwrap_or_default();
        let total = asked.iter().map(|s| of(s).total).max().unwrap_or(0);
        let mut row = vec![kind.clone(), total.to_string()];
        row.extend(asked.iter().map(|s| accuracy(of(s))));
        rows.push(row);
    }
    rows
}

/// The table of retrieval, or nothing if it was not measured.
fn retrieval_table(report: &Report) -> Vec<Vec<String>> {
    let Some(r) = &report.retrieval else { return Vec::new() };
    let heading = ["retrieval", "", "R@1", "R@5", "R@10", "mean rank", "× chance"];
    let mut rows = vec![heading.map(String::from).to_vec()];
    let systems =
        [("ITC", Some(&r.itc)), ("ITC + ITM", r.itc_itm.as_ref()), ("chance", Some(&r.chance))];
    for (name, found) in systems.iter().filter_map(|(name, found)| Some((*name, (*found)?))) {
        let directions = [
            ("image → text", found.image_to_text, r.chance.image_to_text),
            ("text → image", found.text_to_image, r.chance.text_to_image),
        ];
        for (direction, recalls, chance) in directions {
            rows.push(recall_row(name, direction, recalls, chance));
        }
    }
    rows
}

fn recall_row(name: &str, direction: &str, recalls: Recalls, chance: Recalls) -> Vec<String> {
    let times = recalls.r1 / chance.r1.max(f64::MIN_POSITIVE);
    vec![
        name.into(),
        direction.into(),
        percent(recalls.r1),
        percent(recalls.r5),
        percent(recalls.r10),
        format!("{:.1}", recalls.mean_rank),
        format!("{times:.1}"),
    ]
}

/// What was measured, in a few words each.
fn facts(report: &Report) -> Vec<(&'static str, String)> {
    let c = report.counts;
    let decode: Vec<String> =
        report.decode.iter().map(|(k, v)| format!("{k} {}", plain(v))).collect();
    let mut facts = vec![
        ("model", format!("{} ({})", report.model, short(&report.model_hash))),
        ("data", format!("{} ({})", report.split, short(&report.data_hash))),
        (
            "counts",
            format!(
                "{} pictures, {} references, {} nouns, {} questions",
                c.pictures, c.references, c.nouns, c.questions
            ),
        ),
        ("decoding", decode.join(", ")),
        ("program", format!("blip2 {}, {:.0} s", report.version, report.seconds)),
    ];
    if let Some(r) = &report.retrieval {
        facts.push((
            "retrieval",
            format!("{} pictures × {} texts, top {} re-ranked", r.pictures, r.texts, r.k_test),
        ));
    }
    facts.extend(report.notes.iter().map(|note| ("note", note.clone())));
    facts
}

fn plain(value: &serde_json::Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), |s| format!("“{s}”"))
}

fn short(hash: &str) -> String {
    hash.chars().take(12).collect()
}

// ---- text and JSON ---------------------------------------------------------------------------

impl Report {
    /// The tables for a terminal.
    pub fn to_text(&self) -> String {
        let mut out = String::new();
        for (name, value) in facts(self) {
            // Writing to a String can't fail.
            writeln!(out, "{name:<10} {value}").ok();
        }
        for table in [system_table(self), kind_table(self), retrieval_table(self)] {
            if !table.is_empty() {
                out.push('\n');
                text_table(&table, &mut out);
            }
        }
        out
    }

    /// The whole report but the thumbnails, indented.
    ///
    /// # Errors
    /// [`Error::Data`] if a number can't be written.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string_pretty(self).map_err(|e| Error::Data(format!("report: {e}")))
    }

    /// The page, complete in itself.
    pub fn to_html(&self) -> String {
        html_page(self)
    }
}

/// Columns padded to their widest cell; the first left, numbers right.
fn text_table(rows: &[Vec<String>], out: &mut String) {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| {
        rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for row in rows {
        let mut line = String::new();
        for (c, cell) in row.iter().enumerate() {
            let pad = " ".repeat(widths[c] - cell.chars().count());
            let number = rows.last().and_then(|r| r.get(c)).is_some_and(|s| is_number(s));
            let cell = if number { format!("{pad}{cell}") } else { format!("{cell}{pad}") };
            line.push_str(&cell);
            line.push_str("  ");
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
}

fn is_number(text: &str) -> bool {
    text == "-" || text.parse::<f64>().is_ok()
}

// ---- HTML ------------------------------------------------------------------------------------

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1d2127; --soft: #69717d; --line: #dfe3e8; --page: #ffffff; --card: #f7f8fa;
  --good: #157347; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e8ec; --soft: #9aa3af; --line: #343a42; --page: #15181c;
  --card: #1d2126; --good: #5cc78f; --bad: #f2867e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; font: 15px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--page); }
h1 { font-size: 1.5rem; margin: 0 0 .75rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0; }
dt, .soft { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin-top: 1rem; white-space: nowrap; }
table { border-collapse: collapse; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { border-bottom-width: 2px; font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
article { display: grid; grid-template-columns: 11rem minmax(0, 1fr); gap: 1rem; padding: 1rem; margin: .75rem 0;
  background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
article img { width: 100%; max-height: 11rem; object-fit: contain; background: #fff; border-radius: .25rem; }
article table { width: 100%; }
article th { font-weight: 400; color: var(--soft); white-space: nowrap; width: 9rem; }
article td, article th { padding: .2rem .6rem .2rem 0; overflow-wrap: anywhere; }
article tr:last-child > * { border-bottom: 0; }
figure { margin: 0; }
figcaption { font-size: .8rem; color: var(--soft); overflow-wrap: anywhere; }
.good { color: var(--good); }
.bad { color: var(--bad); }
@media (max-width: 40rem) { article { grid-template-columns: 1fr; } article th { width: 6rem; white-space: normal; }
  article .number { white-space: normal; width: 7rem; } }
";

/// Text made safe to stand in HTML, also inside double quotes.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

fn html_page(report: &Report) -> String {
    let title = escape(&format!("{} on {}", report.model, report.split));
    let facts: String =
        facts(report).iter().map(|(k, v)| format!("<dt>{k}</dt><dd>{}</dd>", escape(v))).collect();
    let tables: String = [system_table(report), kind_table(report), retrieval_table(report)]
        .iter()
        .map(|t| html_table(t))
        .collect();
    let pictures: String = report.pictures.iter().map(html_picture).collect();
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n\
         <style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n<dl>{facts}</dl>\n\
         <h2>Scores</h2>\n<p class=\"soft\">All but ranks and ratios ×100, as papers print them.</p>\n{tables}\
         <h2>Pictures</h2>\n{pictures}</body>\n</html>\n"
    )
}

fn html_table(rows: &[Vec<String>]) -> String {
    let Some((heading, body)) = rows.split_first() else { return String::new() };
    let number = |c: usize| body.iter().all(|r| r.get(c).is_some_and(|s| is_number(s)));
    let class = |c: usize| if number(c) { " class=\"number\"" } else { "" };
    let cells = |row: &[String], tag: &str| -> String {
        row.iter()
            .enumerate()
            .map(|(c, s)| format!("<{tag}{}>{}</{tag}>", class(c), escape(s)))
            .collect()
    };
    let lines: String = body.iter().map(|r| format!("<tr>{}</tr>\n", cells(r, "td"))).collect();
    format!(
        "<div class=\"scroll\"><table>\n<thead><tr>{}</tr></thead>\n<tbody>\n{lines}</tbody>\n</table></div>\n",
        cells(heading, "th")
    )
}

fn html_picture(row: &PictureRow) -> String {
    let image = row.thumbnail.as_ref().map_or_else(String::new, |url| {
        format!("<img src=\"{}\" alt=\"\" loading=\"lazy\">", escape(url))
    });
    let mut lines = String::new();
    let references = escape(&row.references.join(" / "));
    line(&mut lines, "reference", &references, "");
    for (system, caption) in &row.captions {
        let score =
            format!("CIDEr-D {} · ROUGE-L {}", percent(caption.cider), percent(caption.rouge_l));
        let text = marked(&caption.text, caption.names_noun);
        line(&mut lines, system.label(), &text, &score);
    }
    if let Some(noun) = &row.noun {
        line(&mut lines, "noun", &escape(noun), "");
    }
    for asked in &row.questions {
        line(
            &mut lines,
            &escape(&asked.kind),
            &format!("{} <b>{}</b>", escape(&asked.question), escape(&asked.truth)),
            "",
        );
        let answers = asked.answers.iter().map(|(system, (text, right))| {
            format!("{}: {}", system.label(), marked(text, Some(*right)))
        });
        line(&mut lines, "", &answers.collect::<Vec<_>>().join(" · "), "");
    }
    let key = escape(&row.key);
    format!(
        "<article><figure>{image}<figcaption>{key}</figcaption></figure>\n<div><table>\n{lines}</table></div></article>\n"
    )
}

/// One line of a picture's table; `text` is HTML already.
fn line(out: &mut String, name: &str, text: &str, score: &str) {
    let cells = if score.is_empty() {
        format!("<td colspan=\"2\">{text}</td>")
    } else {
        format!("<td>{text}</td><td class=\"number soft\">{score}</td>")
    };
    writeln!(out, "<tr><th>{name}</th>{cells}</tr>").ok();
}

/// A text with a mark in front, and in colour, where it is known to be right or wrong.
fn marked(text: &str, right: Option<bool>) -> String {
    let text = if text.trim().is_empty() { "<i>(nothing)</i>".into() } else { escape(text) };
    match right {
        Some(true) => format!("<span class=\"good\">✓</span> {text}"),
        Some(false) => format!("<span class=\"bad\">✗</span> {text}"),
        None => text,
    }
}

//! Where single pictures come from: Tux Paint stamps, Open Clip Art, three drawings of every emoji (photographs: `cifar.rs`, `caltech.rs`).
//!
//! Each reader yields pictures as they lie in the package, with one caption phrase, and counts what it
//! leaves out and why. Corrections by hand stand in `captions/*.tsv`: `name TAB phrase`, an empty phrase
//! leaves the picture out, a `*` ends a prefix.
//!
//! Emoji are named from emoji-data's own table (MIT) and our corrections, not from OpenMoji's
//! annotations, whose package is CC-BY-SA.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use serde::Deserialize;

use super::package::{self, Source, members};
use super::text;
use crate::{Error, Result};

/// What kind of picture a package holds; decides how captions may put it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Style {
    /// Mostly cut-out photographs.
    Photo,
    /// Whole photographs: things in their surroundings.
    Snapshot,
    /// Drawings.
    Drawing,
    /// Emoji.
    Emoji,
}

/// A picture and what it shows.
#[derive(Clone, Debug)]
pub struct Picture {
    /// Whose it is.
    pub source: &'static Source,
    /// Its name there; unique within the source.
    pub name: String,
    /// The file.
    pub bytes: Vec<u8>,
    /// A lower-case phrase with its article.
    pub phrase: String,
    /// Its kind.
    pub style: Style,
}

/// Pictures left out, by reason.
pub type LeftOut = BTreeMap<&'static str, usize>;

static TUX: Source = package::TUX_PAINT.source;
static CLIP: Source = package::CLIP_ART_PNG.source;
static FLUENT: Source = package::FLUENT.source;
static NOTO: Source = package::NOTO.source;
static TWEMOJI: Source = package::TWEMOJI.source;

fn table(tsv: &'static str) -> HashMap<&'static str, &'static str> {
    tsv.lines().filter_map(|line| line.split_once('\t')).collect()
}

/// The correction for a picture: its whole name or last part matches, exactly or up to a `*`; the
/// longest pattern wins.
fn correction<'a>(fixes: &[(&'a str, &'a str)], name: &str) -> Option<&'a str> {
    let base = name.rsplit('/').next().unwrap_or(name);
    let matches = |pattern: &str| {
        let against = if pattern.contains('/') { name } else { base };
        match pattern.strip_suffix('*') {
            Some(prefix) => against.starts_with(prefix),
            None => against == pattern,
        }
    };
    let fitting = fixes.iter().filter(|(pattern, _)| matches(pattern));
    fitting.max_by_key(|(pattern, _)| pattern.len()).map(|(_, phrase)| *phrase)
}

pub(super) fn count(left_out: &mut LeftOut, why: &'static str) {
    *left_out.entry(why).or_default() += 1;
}

// ---------------------------------------------------------------------------------------------
// Tux Paint

/// Tux Paint's stamps: PNG with a text file whose first line is the English caption.
///
/// # Errors
/// The archive can't be read.
pub fn tux_paint(deb: &Path, left_out: &mut LeftOut) -> Result<Vec<Picture>> {
    const ROOT: &str = "usr/share/tuxpaint/stamps/";
    let fixes = table(include_str!("captions/tuxpaint.tsv"));
    let mut pictures: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut captions: BTreeMap<String, String> = BTreeMap::new();
    members(deb, &|name| name.starts_with(ROOT), &mut |name, bytes| {
        let name = &name[ROOT.len()..];
        if let Some(stem) = name.strip_suffix(".png") {
            pictures.insert(stem.to_owned(), bytes);
        } else if let Some(stem) = name.strip_suffix(".txt") {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            captions.insert(stem.to_owned(), text.lines().next().unwrap_or_default().to_owned());
        }
        Ok(())
    })?;
    let mut out = Vec::new();
    for (name, bytes) in pictures {
        if name.starts_with("symbols/") || name.ends_with("_mirror") || name.ends_with("_flip") {
            count(left_out, "symbols and mirrored stamps");
            continue;
        }
        let phrase = match fixes.get(name.as_str()) {
            Some(fix) => Some((*fix).to_owned()).filter(|f| !f.is_empty()),
            None => captions.get(&name).and_then(|c| stamp_phrase(c)),
        };
        match phrase {
            Some(phrase) => {
                let style = if name.contains("cartoon") { Style::Drawing } else { Style::Photo };
                out.push(Picture { source: &TUX, name, bytes, phrase, style });
            }
            None => count(left_out, "stamps without a usable caption"),
        }
    }
    Ok(out)
}

/// "A laptop computer.  Tap. Tap." → "a laptop computer".
fn stamp_phrase(caption: &str) -> Option<String> {
    let lower = caption.trim().to_lowercase().replace('’', "'");
    let lower = lower.replace(['“', '”', '"'], "");
    let end = lower.find(['.', '!', '?', '(', '—', ';', ',']).unwrap_or(lower.len());
    let mut phrase = lower[..end].trim().to_owned();
    // A candy cane *is* a traditional treat…
    for verb in
        [" is ", " are ", " has ", " lets ", " means ", " stands ", " carry ", " resembles "]
    {
        if let Some(at) = phrase.find(verb) {
            phrase.truncate(at);
        }
    }
    let phrase = phrase.strip_prefix("another ").map_or(phrase.clone(), text::with_article);
    let phrase = phrase.strip_prefix("an hippo").map_or(phrase.clone(), |p| format!("a hippo{p}"));
    let phrase = phrase.strip_prefix("our ").map_or(phrase.clone(), |p| format!("the {p}"));
    let words = phrase.split(' ').count();
    let english = phrase.chars().all(|c| c.is_ascii_lowercase() || " -'".contains(c));
    (english && words <= 9 && phrase.len() >= 3).then(|| text::with_article(&phrase))
}

// ---------------------------------------------------------------------------------------------
// Open Clip Art

/// Folders with pictures of things; the rest are maps, flags, buttons, patterns, icons, playing cards.
const CLIP_FOLDERS: [&str; 17] = [
    "animals/",
    "buildings/",
    "containers/",
    "education/",
    "electronics/",
    "food/",
    "office/",
    "people/",
    "plants/",
    "recreation/",
    "science/",
    "tools/",
    "transportation/",
    "computer/hardware/",
    "signs_and_symbols/weather/",
    "geography/astronomy/",
    "unsorted/",
];
const CLIP_NOT: [&str; 5] = [
    "recreation/games/cards",
    "transportation/aiga",
    "transportation/roadsigns",
    "people/clothing/pantyhose",
    "tools/weapons/bullet_hole",
];

/// Curated Open Clip Art: PNG, titled by the `dc:title` of the SVG at the same place.
///
/// # Errors
/// An archive can't be read.
pub fn open_clip_art(png: &Path, svg: &Path, left_out: &mut LeftOut) -> Result<Vec<Picture>> {
    const PNG: &str = "usr/share/openclipart/png/";
    const SVG: &str = "usr/share/openclipart/svg/";
    let fixes: Vec<(&str, &str)> = include_str!("captions/openclipart.tsv")
        .lines()
        .filter_map(|l| l.split_once('\t'))
        .collect();
    let wanted = |name: &str| {
        CLIP_FOLDERS.iter().any(|f| name.starts_with(f))
            && !CLIP_NOT.iter().any(|f| name.starts_with(f))
    };
    let mut titles: BTreeMap<String, String> = BTreeMap::new();
    let is_svg = |name: &str| name.strip_prefix(SVG).is_some_and(wanted) && name.ends_with(".svg");
    members(svg, &is_svg, &mut |name, bytes| {
        if let Some(title) = svg_title(&String::from_utf8_lossy(&bytes)) {
            titles.insert(name[SVG.len()..name.len() - 4].to_owned(), title);
        }
        Ok(())
    })?;
    // A title that many different files have is the name of a set.
    let mut stems: HashMap<&str, BTreeSet<String>> = HashMap::new();
    for (name, title) in &titles {
        stems.entry(title).or_default().insert(stem(name));
    }
    let repeated: BTreeSet<&str> =
        stems.iter().filter(|(_, names)| names.len() > 4).map(|(title, _)| *title).collect();

    let mut out = Vec::new();
    let is_png = |name: &str| name.strip_prefix(PNG).is_some_and(wanted) && name.ends_with(".png");
    members(png, &is_png, &mut |name, bytes| {
        let name = name[PNG.len()..name.len() - 4].to_owned();
        if let Some(fix) = correction(&fixes, &name) {
            if fix.is_empty() {
                count(left_out, "clip art left out by hand");
            } else {
                let phrase = (*fix).to_owned();
                out.push(Picture { source: &CLIP, name, bytes, phrase, style: Style::Drawing });
            }
            return Ok(());
        }
        let title = titles.get(&name).filter(|t| !repeated.contains(t.as_str()));
        let phrase = title.and_then(|t| text::clean_title(t));
        let Some(phrase) = phrase else {
            count(left_out, "clip art with a set name, credit, address or number for a title");
            return Ok(());
        };
        let phrase = text::with_article(&phrase);
        out.push(Picture { source: &CLIP, name, bytes, phrase, style: Style::Drawing });
        Ok(())
    })?;
    out.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(out)
}

/// The file's name without folder and trailing numbers.
fn stem(name: &str) -> String {
    let base = name.rsplit('/').next().unwrap_or(name);
    base.trim_end_matches(|c: char| c.is_ascii_digit() || c == '_').to_owned()
}

/// The text of the first `dc:title` of an SVG. No XML parser: one element's text is wanted, and
/// whatever is odd about it (markup inside, entities other than XML's five) makes it unusable anyway.
fn svg_title(svg: &str) -> Option<String> {
    let open = svg.find("<dc:title")?;
    let start = open + svg[open..].find('>')? + 1;
    let end = start + svg[start..].find("</dc:title")?;
    let raw = &svg[start..end];
    let text = raw
        .replace("&amp;", "&")
        .replace("&apos;", "'")
        .replace("&quot;", "\"")
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&#39;", "'");
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    (!text.is_empty() && text.len() < 200 && !text.contains('<')).then_some(text)
}

// ---------------------------------------------------------------------------------------------
// Emoji

/// What is used of emoji-data's `emoji.json`.
#[derive(Deserialize)]
struct Emoji {
    name: String,
    short_name: String,
    unified: String,
    image: String,
    category: String,
    subcategory: String,
}

/// Kinds that show no thing, or show it unrecognisably.
const EMOJI_NOT: [&str; 8] = [
    "country-flag",
    "subdivision-flag",
    "family",
    "time",
    "skin-tone",
    "keycap",
    "alphanum",
    "arrow",
];

/// The phrase of an emoji, `None` when it is left out.
fn emoji_phrase(emoji: &Emoji, fixes: &HashMap<&str, &str>) -> Option<String> {
    if let Some(fix) = fixes.get(emoji.short_name.as_str()) {
        return Some((*fix).to_owned()).filter(|f| !f.is_empty());
    }
    let watches = ["hourglass", "watch", "alarm_clock", "stopwatch"];
    if watches.contains(&emoji.short_name.as_str()) {
        return Some(text::with_article(&emoji.name.to_lowercase()));
    }
    let symbol = emoji.category == "Symbols" || emoji.category == "Component";
    let name = emoji.name.to_lowercase().replace('’', "'");
    if symbol || EMOJI_NOT.contains(&emoji.subcategory.as_str()) || name.contains("facing ") {
        return None;
    }
    let name = name.replace(" symbol", "").replace(" sign", "");
    let name = name.strip_prefix("black ").filter(|_| emoji.category == "Objects").unwrap_or(&name);
    let fine = name.chars().all(|c| c.is_ascii_lowercase() || " -'".contains(c));
    fine.then(|| text::with_article(name))
}

/// Three drawings of every emoji that shows a thing.
///
/// # Errors
/// An archive or its table can't be read.
pub fn emoji(
    fluent: &Path,
    noto: &Path,
    twemoji: &Path,
    left_out: &mut LeftOut,
) -> Result<Vec<Picture>> {
    let fixes = table(include_str!("captions/emoji.tsv"));
    let mut names: Vec<Emoji> = Vec::new();
    let mut noto_files: HashMap<String, Vec<u8>> = HashMap::new();
    let folder = "package/img/google/64/";
    let want = |n: &str| n == "package/emoji.json" || n.starts_with(folder);
    members(noto, &want, &mut |name, bytes| {
        if let Some(file) = name.strip_prefix(folder) {
            noto_files.insert(file.to_owned(), bytes);
        } else {
            names = serde_json::from_slice(&bytes)
                .map_err(|e| Error::Data(format!("{}: {name}: {e}", noto.display())))?;
        }
        Ok(())
    })?;
    let mut twemoji_files: HashMap<String, Vec<u8>> = HashMap::new();
    let folder = "package/img/twitter/64/";
    members(twemoji, &|n| n.starts_with(folder), &mut |name, bytes| {
        twemoji_files.insert(name[folder.len()..].to_owned(), bytes);
        Ok(())
    })?;
    let mut fluent_files: HashMap<String, Vec<u8>> = HashMap::new();
    let folder = "package/assets/";
    members(fluent, &|n| n.starts_with(folder) && n.ends_with(".webp"), &mut |name, bytes| {
        fluent_files.insert(bare_code(&name[folder.len()..name.len() - 5]), bytes);
        Ok(())
    })?;
    names.sort_by(|a, b| a.unified.cmp(&b.unified));
    let mut out = Vec::new();
    for emoji in &names {
        let Some(phrase) = emoji_phrase(emoji, &fixes) else {
            count(left_out, "emoji of symbols, flags, clocks, families, mirrored");
            continue;
        };
        let code = emoji.unified.to_lowercase();
        let drawings = [
            (&FLUENT, fluent_files.remove(&bare_code(&code))),
            (&NOTO, noto_files.remove(&emoji.image)),
            (&TWEMOJI, twemoji_files.remove(&emoji.image)),
        ];
        for (source, bytes) in drawings {
            let Some(bytes) = bytes else {
                count(left_out, "emoji that a set does not draw");
                continue;
            };
            let (name, phrase) = (code.clone(), phrase.clone());
            out.push(Picture { source, name, bytes, phrase, style: Style::Emoji });
        }
    }
    Ok(out)
}

/// Code points without the variation selector, which some sets write and others don't.
fn bare_code(code: &str) -> String {
    code.split('-').filter(|c| *c != "fe0f").collect::<Vec<_>>().join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps() {
        let cases = [
            ("A laptop computer.  Tap. Tap. Tap.", Some("a laptop computer")),
            ("A peacock (a male peafowl).", Some("a peacock")),
            ("An hippopotamus.", Some("a hippopotamus")),
            (
                "A candy cane is a traditional Christmas treat in the United States.",
                Some("a candy cane"),
            ),
            ("A “Fuji” apple.", Some("a fuji apple")),
            ("Räuchermännchen", None),
        ];
        for (from, to) in cases {
            assert_eq!(stamp_phrase(from).as_deref(), to);
        }
    }

    #[test]
    fn titles() {
        let svg = "<svg><dc:title>Cat &amp;\n Dog</dc:title><dc:title>x</dc:title></svg>";
        assert_eq!(svg_title(svg).as_deref(), Some("Cat & Dog"));
        assert_eq!(svg_title("<svg><dc:title><b>x</b></dc:title></svg>"), None);
        assert_eq!(svg_title("<svg><dc:title>unclosed"), None);
    }
}

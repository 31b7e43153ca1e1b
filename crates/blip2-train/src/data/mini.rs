//! The mini set: single pictures from packages and scenes composed of them, in three splits.
//!
//! packages → pictures with phrases → duplicates out → splits by concept (added photographs join train) → singles and scenes →
//! shards.
//! A function of (archives, config): threads only change how long it takes. Needs about 1.5 GB of memory, 2.3 with Caltech-101;
//! [`MiniConfig::tiny`] needs neither packages nor memory, its scenes are plain shapes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use blip2::pack::make_readable;
use image::{RgbImage, RgbaImage};
use rayon::prelude::*;
use serde::Serialize;

use super::caltech;
use super::cifar;
use super::filter::{self, Look, Split};
use super::package::{self, Origin, Package, Source};
use super::paint::{self, Background, Shape};
use super::sample::{Meta, QuestionAnswer, Sample};
use super::scenes::{self, Pool, Sprite};
use super::shards::{ShardWriter, Written};
use super::sources::{self, LeftOut, Picture, Style};
use super::text;
use crate::rng::{Rng, hash_str};
use crate::{Error, Result};

/// What to build.
#[derive(Clone, Debug)]
pub struct MiniConfig {
    /// The folder that gets the shards and `mini.json`.
    pub out: PathBuf,
    /// Where packages come from; `None` builds scenes of plain shapes only.
    pub packages: Option<Origin>,
    /// CIFAR-100 as its authors give it (`cifar-100-binary.tar.gz`): a hundred kinds of photographs more, to train on.
    pub cifar_100: Option<PathBuf>,
    /// Caltech-101 as its authors give it (`101_ObjectCategories.tar.gz`): larger photographs of some ninety kinds, to train on.
    pub caltech_101: Option<PathBuf>,
    /// Decides splits, scenes, backgrounds.
    pub seed: u64,
    /// Scenes per split: train, val, test.
    pub scenes: [usize; 3],
    /// Side of the square pictures, longer side of whole photographs, pixels.
    pub side: u32,
    /// Samples per shard.
    pub per_shard: usize,
}

impl MiniConfig {
    /// The set that the mini model is trained on.
    pub fn full(out: &Path, packages: Origin) -> Self {
        Self {
            out: out.to_path_buf(),
            packages: Some(packages),
            cifar_100: None,
            caltech_101: None,
            seed: 1,
            scenes: [12_000, 300, 800],
            side: 256,
            per_shard: 2048,
        }
    }

    /// `n` training samples of plain shapes, an eighth as many to validate and to test: no packages.
    pub fn tiny(out: &Path, n: usize) -> Self {
        let part = (n / 8).max(1);
        let scenes = [n, part, part];
        Self {
            out: out.to_path_buf(),
            packages: None,
            cifar_100: None,
            caltech_101: None,
            seed: 1,
            scenes,
            side: 128,
            per_shard: 256,
        }
    }
}

/// A package that went in.
#[derive(Clone, Debug, Serialize)]
pub struct PackageReport {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// SHA-256 of the archive; of CIFAR-100's and Caltech-101's pictures, whichever archive they came in.
    pub sha256: String,
    /// The licence of its pictures.
    pub licence: String,
    /// Whom to name.
    pub attribution: String,
}

/// One shard.
#[derive(Clone, Debug, Serialize)]
pub struct ShardReport {
    /// File name.
    pub name: String,
    /// Samples in it.
    pub samples: usize,
    /// Bytes.
    pub bytes: u64,
    /// SHA-256.
    pub sha256: String,
}

/// What was built: `mini.json`.
#[derive(Clone, Debug, Serialize)]
pub struct MiniReport {
    /// The seed.
    pub seed: u64,
    /// Split → source → samples.
    pub counts: BTreeMap<String, BTreeMap<String, usize>>,
    /// Split → concepts of its single pictures.
    pub concepts: BTreeMap<String, usize>,
    /// Split → share of its single pictures whose head noun is in the captions of train's.
    pub known_nouns: BTreeMap<String, f64>,
    /// Split → captions that differ.
    pub distinct_captions: BTreeMap<String, usize>,
    /// Pictures left out, by reason.
    pub left_out: BTreeMap<String, usize>,
    /// Packages, licences, whom to name.
    pub packages: Vec<PackageReport>,
    /// The shards.
    pub shards: Vec<ShardReport>,
}

/// A picture, ready to be composed.
struct Ready {
    key: String,
    phrase: String,
    concept: String,
    noun: String,
    source: &'static Source,
    style: Style,
    /// Trimmed, at most [`CUTOUT`] px, a whole photograph the set's side.
    cutout: RgbaImage,
    /// Opaque in a rectangle: a photograph or drawing with its own background.
    framed: bool,
    colour: Option<&'static str>,
    look: Look,
}

/// The longer side of a cut-out that is kept in memory.
const CUTOUT: u32 = 208;

/// Builds the set. `say` is told what goes on.
///
/// # Errors
/// A package that can't be had or read (named, with the remedy); the disk.
pub fn build(config: &MiniConfig, say: &dyn Fn(&str)) -> Result<MiniReport> {
    if config.side < 32 || config.side > 1024 {
        return Err(Error::Data(format!("side {} is not in 32..=1024", config.side)));
    }
    let mut left_out = LeftOut::new();
    // First, for they are what a user hands in.
    let photographs = load_added(config, &mut left_out, say)?;
    let ready = match &config.packages {
        Some(origin) => prepare(load(origin, &mut left_out, say)?, config.side, &mut left_out, say),
        None => Vec::new(),
    };
    let (mut ready, near) = drop_duplicates(ready, &mut left_out);
    let items: Vec<filter::Item<'_>> = ready.iter().map(item_of).collect();
    let mut splits = filter::split(&items, &near, config.seed);
    if !photographs.is_empty() {
        let photographs = prepare(photographs, config.side, &mut left_out, say);
        ready.extend(not_held_out(photographs, &ready, &splits, &mut left_out));
        splits.resize(ready.len(), Split::Train);
    }

    let mut report = MiniReport {
        seed: config.seed,
        counts: BTreeMap::new(),
        concepts: BTreeMap::new(),
        known_nouns: BTreeMap::new(),
        distinct_captions: BTreeMap::new(),
        left_out: left_out.iter().map(|(why, n)| ((*why).to_owned(), *n)).collect(),
        packages: Vec::new(),
        shards: Vec::new(),
    };
    if config.packages.is_some() {
        report.packages = package::PACKAGES.iter().map(package_report).collect();
    }
    if config.cifar_100.is_some() {
        report.packages.push(source_report(&cifar::CIFAR_100, cifar::FINE_SHA256));
    }
    if config.caltech_101.is_some() {
        report.packages.push(source_report(&caltech::CALTECH_101, caltech::TAKEN_SHA256));
    }
    let known: BTreeSet<&str> =
        of_split(&ready, &splits, Split::Train).map(|r| r.noun.as_str()).collect();
    let mut homes: BTreeMap<String, Split> = BTreeMap::new();
    for split in Split::ALL {
        say(&format!("{}: composing", split.name()));
        write_split(config, split, &ready, &splits, &known, &mut homes, &mut report)?;
    }
    let json =
        serde_json::to_vec_pretty(&report).map_err(|e| Error::Data(format!("report: {e}")))?;
    write_whole(&config.out, "mini.json", &json)?;
    Ok(report)
}

fn item_of(r: &Ready) -> filter::Item<'_> {
    // Whole photographs are rare and of few concepts: all are needed for training.
    let train_only = r.style == Style::Snapshot;
    filter::Item { concept: &r.concept, noun: &r.noun, train_only }
}

/// Of pictures that come when the splits stand, those to train on: of no concept of val and test, and not one of their pictures. A
/// concept is a whole phrase, here as everywhere: "keyboard" is another than "computer keyboard".
fn not_held_out(
    more: Vec<Ready>,
    ready: &[Ready],
    splits: &[Split],
    left_out: &mut LeftOut,
) -> Vec<Ready> {
    let held_out: Vec<&Ready> = [Split::Val, Split::Test]
        .into_iter()
        .flat_map(|split| of_split(ready, splits, split))
        .collect();
    let concepts: BTreeSet<&str> = held_out.iter().map(|r| r.concept.as_str()).collect();
    let before = more.len();
    let kept: Vec<Ready> = more
        .into_par_iter()
        .filter(|r| !concepts.contains(r.concept.as_str()))
        .filter(|r| held_out.iter().all(|other| !other.look.same(&r.look)))
        .collect();
    if kept.len() < before {
        *left_out.entry("photographs of what is held out").or_default() += before - kept.len();
    }
    kept
}

fn of_split<'a>(
    ready: &'a [Ready],
    splits: &'a [Split],
    split: Split,
) -> impl Iterator<Item = &'a Ready> {
    ready.iter().zip(splits).filter(move |(_, s)| **s == split).map(|(r, _)| r)
}

fn package_report(package: &Package) -> PackageReport {
    source_report(&package.source, package.sha256)
}

fn source_report(source: &Source, sha256: &str) -> PackageReport {
    PackageReport {
        name: source.name.into(),
        version: source.version.into(),
        sha256: sha256.into(),
        licence: source.licence.into(),
        attribution: source.attribution.into(),
    }
}

/// Writes a file whole or not at all.
fn write_whole(folder: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    use std::io::Write as _;
    let path = folder.join(name);
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(Error::io(folder))?;
    file.write_all(bytes).map_err(Error::io(&path))?;
    file.as_file().sync_all().map_err(Error::io(&path))?;
    make_readable(file.as_file()).map_err(Error::io(&path))?;
    file.persist(&path).map_err(|e| e.error).map_err(Error::io(&path))?;
    Ok(())
}

// ---------------------------------------------------------------------------------------------
// Pictures

fn load(origin: &Origin, left_out: &mut LeftOut, say: &dyn Fn(&str)) -> Result<Vec<Picture>> {
    let mut paths = Vec::new();
    for package in &package::PACKAGES {
        paths.push(package::archive(package, origin, say)?);
    }
    let [tux, png, svg, fluent, noto, twemoji, cifar] = paths.as_slice() else {
        return Err(Error::Data("seven packages are needed".into()));
    };
    say("reading Tux Paint stamps");
    let mut pictures = sources::tux_paint(tux, left_out)?;
    say("reading Open Clip Art");
    pictures.extend(sources::open_clip_art(png, svg, left_out)?);
    say("reading emoji");
    pictures.extend(sources::emoji(fluent, noto, twemoji, left_out)?);
    say("reading CIFAR-10");
    pictures.extend(cifar::cifar_10(cifar, left_out)?);
    Ok(pictures)
}

/// The photographs that no package has.
fn load_added(
    config: &MiniConfig,
    left_out: &mut LeftOut,
    say: &dyn Fn(&str),
) -> Result<Vec<Picture>> {
    let mut pictures = Vec::new();
    if let Some(archive) = &config.cifar_100 {
        say("reading CIFAR-100");
        pictures.extend(cifar::cifar_100(archive)?);
    }
    if let Some(archive) = &config.caltech_101 {
        say("reading Caltech-101");
        pictures.extend(caltech::caltech_101(archive, left_out)?);
    }
    Ok(pictures)
}

fn prepare(
    pictures: Vec<Picture>,
    side: u32,
    left_out: &mut LeftOut,
    say: &dyn Fn(&str),
) -> Vec<Ready> {
    say(&format!("decoding {} pictures", pictures.len()));
    let made: Vec<std::result::Result<Ready, &'static str>> =
        pictures.into_par_iter().map(|p| prepare_one(&p, side)).collect();
    let mut ready = Vec::new();
    for item in made {
        match item {
            Ok(r) => ready.push(r),
            Err(why) => *left_out.entry(why).or_default() += 1,
        }
    }
    ready
}

fn prepare_one(picture: &Picture, side: u32) -> std::result::Result<Ready, &'static str> {
    let decoded = paint::decode(&picture.bytes).map_err(|_| "pictures that can't be decoded")?;
    let trimmed = paint::trim(&decoded).ok_or("blank pictures")?;
    let (w, h) = trimmed.dimensions();
    if w.max(h) < 24 || w.max(h) > 8 * w.min(h) {
        return Err("tiny pictures and long strips");
    }
    let most = if picture.style == Style::Snapshot { side } else { CUTOUT };
    let cutout = if w.max(h) > most { paint::fit(&trimmed, most) } else { trimmed };
    let covered = paint::coverage(&cutout);
    if covered < 0.02 {
        return Err("blank pictures");
    }
    let phrase = text::pre_caption(&picture.phrase, 20).replace("grey", "gray");
    Ok(Ready {
        key: format!("{}-{:016x}", picture.source.short, hash_str(&picture.name)),
        concept: text::concept(&phrase),
        noun: text::head_noun(&phrase),
        phrase,
        source: picture.source,
        style: picture.style,
        framed: covered > 0.97,
        // Of a whole photograph it would be the surroundings'.
        colour: paint::dominant_colour(&cutout).filter(|_| picture.style != Style::Snapshot),
        look: filter::look(&cutout),
        cutout,
    })
}

/// Drops pictures that are there already; lists pairs of those left that look alike.
fn drop_duplicates(ready: Vec<Ready>, left_out: &mut LeftOut) -> (Vec<Ready>, Vec<(usize, usize)>) {
    let same_of: Vec<Option<usize>> = ready
        .par_iter()
        .enumerate()
        .map(|(i, r)| ready[..i].iter().position(|earlier| earlier.look.same(&r.look)))
        .collect();
    let mut kept = Vec::new();
    for (r, same) in ready.into_iter().zip(same_of) {
        if same.is_some() {
            *left_out.entry("the same picture again").or_default() += 1;
        } else {
            kept.push(r);
        }
    }
    let near: Vec<(usize, usize)> = kept
        .par_iter()
        .enumerate()
        .flat_map_iter(|(i, r)| {
            let earlier = kept[..i].iter().enumerate();
            earlier
                .filter(|(_, e)| e.look.near(&r.look))
                .map(move |(j, _)| (j, i))
                .collect::<Vec<_>>()
        })
        .collect();
    (kept, near)
}

// ---------------------------------------------------------------------------------------------
// Samples

/// Concept → its split, of single pictures.
type Homes<'a> = BTreeMap<&'a str, Split>;

/// Colours and shapes of a split: combinations, so that each colour and each shape is in train. A
/// combination that is also a picture ("a red heart") goes where the picture went.
fn shapes_of(split: Split, homes: &Homes<'_>) -> Vec<(&'static str, Shape)> {
    let mut out = Vec::new();
    for (c, (colour, _)) in paint::COLOURS.iter().enumerate() {
        for (s, shape) in Shape::ALL.into_iter().enumerate() {
            let home = match (c + 3 * s) % 8 {
                0 => Split::Test,
                4 => Split::Val,
                _ => Split::Train,
            };
            let name = format!("{colour} {}", shape.name());
            let home = homes.get(name.as_str()).copied().unwrap_or(home);
            // White on white is no scene.
            if home == split && *colour != "white" {
                out.push((*colour, shape));
            }
        }
    }
    out
}

fn pool_of(ready: &[Ready], splits: &[Split], split: Split) -> Pool {
    let homes: Homes<'_> =
        ready.iter().zip(splits).map(|(r, s)| (r.concept.as_str(), *s)).collect();
    let sprites = of_split(ready, splits, split)
        .filter(|r| text::is_plain_thing(&r.phrase) && !r.framed)
        .filter(|r| !r.noun.ends_with("face") && r.cutout.width().max(r.cutout.height()) >= 48)
        .filter(|r| paint::coverage(&r.cutout) > 0.2)
        .map(|r| {
            let says_colour =
                r.concept.split(' ').any(|w| paint::COLOURS.iter().any(|(n, _)| *n == w));
            // A green balloon of train must not be called one if that is a concept of test.
            let elsewhere = |colour: &str| {
                let name = format!("{colour} {}", r.concept);
                homes.get(name.as_str()).is_some_and(|home| *home != split)
            };
            Sprite {
                name: r.concept.clone(),
                colour: r.colour.filter(|c| !says_colour && !elsewhere(c)),
                cutout: r.cutout.clone(),
                licence: r.source.licence,
            }
        })
        .collect();
    let textures = of_split(ready, splits, split)
        .filter(|r| r.style == Style::Photo)
        .filter_map(|r| {
            let mut rng = Rng::new(hash_str(&r.key), &[4]);
            Some((paint::texture(&r.cutout, &mut rng)?, r.source.licence))
        })
        .collect();
    Pool::new(sprites, shapes_of(split, &homes), textures)
}

/// One sample to make.
#[derive(Clone, Copy)]
enum Job {
    /// Picture `usize`, on white, or as it is if it is a whole photograph.
    Single(usize),
    /// Picture `usize`, on a background.
    Placed(usize),
    /// Scene number `usize`.
    Scene(usize),
}

fn jobs(config: &MiniConfig, ready: &[Ready], splits: &[Split], split: Split) -> Vec<Job> {
    let mut jobs = Vec::new();
    for (i, r) in ready.iter().enumerate().filter(|(i, _)| splits[*i] == split) {
        // Outside train a picture comes once, mostly as it is.
        let placed = !r.framed && hash_str(&r.key) % 10 < 3;
        match split {
            Split::Train => {
                jobs.push(Job::Single(i));
                // Faces and persons are a third of all emoji: once is enough.
                let often = ["face", "man", "woman", "person"].contains(&r.noun.as_str());
                if !r.framed && !often {
                    jobs.push(Job::Placed(i));
                }
            }
            _ if placed => jobs.push(Job::Placed(i)),
            _ => jobs.push(Job::Single(i)),
        }
    }
    jobs.extend((0..config.scenes[split as usize]).map(Job::Scene));
    Rng::new(config.seed, &[split as u64, 0x6f72_6465_7200]).shuffle(&mut jobs);
    jobs
}

fn write_split(
    config: &MiniConfig,
    split: Split,
    ready: &[Ready],
    splits: &[Split],
    known: &BTreeSet<&str>,
    homes: &mut BTreeMap<String, Split>,
    report: &mut MiniReport,
) -> Result<()> {
    let pool = pool_of(ready, splits, split);
    let jobs = jobs(config, ready, splits, split);
    if jobs.is_empty() {
        return Err(Error::Data(format!("{}: nothing to write", split.name())));
    }
    let mut writer = ShardWriter::new(&config.out, split.name(), config.per_shard)?;
    let counts = report.counts.entry(split.name().into()).or_default();
    let mut captions = BTreeSet::new();
    for chunk in jobs.chunks(256) {
        // Made in parallel, written in order.
        let samples: Vec<Result<Sample>> =
            chunk.par_iter().map(|job| make(config, split, *job, ready, &pool)).collect();
        for sample in samples {
            let sample = sample?;
            writer.write(&sample)?;
            for concept in sample.meta.concept.split(" + ") {
                let home = *homes.entry(concept.to_owned()).or_insert(split);
                if home != split {
                    let (home, split) = (home.name(), split.name());
                    return Err(Error::Data(format!("{concept:?} is in {home} and in {split}")));
                }
            }
            *counts.entry(sample.meta.source.clone()).or_default() += 1;
            captions.insert(sample.meta.caption);
        }
    }
    let shard = |w: Written| ShardReport {
        name: w.name,
        samples: w.samples,
        bytes: w.bytes,
        sha256: w.sha256,
    };
    report.shards.extend(writer.finish()?.into_iter().map(shard));
    let concepts: BTreeSet<&str> =
        of_split(ready, splits, split).map(|r| r.concept.as_str()).collect();
    let all = of_split(ready, splits, split).count().max(1);
    let knows = of_split(ready, splits, split).filter(|r| known.contains(r.noun.as_str())).count();
    report.concepts.insert(split.name().into(), concepts.len());
    report.known_nouns.insert(split.name().into(), knows as f64 / all as f64);
    report.distinct_captions.insert(split.name().into(), captions.len());
    Ok(())
}

fn make(
    config: &MiniConfig,
    split: Split,
    job: Job,
    ready: &[Ready],
    pool: &Pool,
) -> Result<Sample> {
    let (key, canvas, meta) = match job {
        Job::Single(i) => {
            let r = &ready[i];
            // A whole photograph keeps its shape, what is cut out has a margin.
            let canvas = match r.style {
                Style::Snapshot => flattened(&paint::fit(&r.cutout, config.side)),
                _ => on_white(&r.cutout, config.side, config.side * 15 / 16),
            };
            (r.key.clone(), canvas, single_meta(r, None))
        }
        Job::Placed(i) => {
            let r = &ready[i];
            let mut rng = Rng::new(config.seed, &[hash_str(&r.key), 2]);
            let (canvas, background, licence) =
                on_background(&r.cutout, pool, config.side, &mut rng);
            let mut meta = single_meta(r, Some(background));
            if let Some(licence) = licence.filter(|l| *l != meta.licence) {
                meta.licence = format!("{} AND {licence}", meta.licence);
            }
            (format!("{}-b", r.key), canvas, meta)
        }
        Job::Scene(n) => {
            let rng = Rng::new(config.seed, &[split as u64, n as u64, 3]);
            let scene = scenes::compose(rng, pool, config.side);
            (format!("scene-{}-{n:06}", split.name()), scene.canvas, scene.meta)
        }
    };
    let image = paint::jpeg(&canvas)?;
    Ok(Sample { key, extension: "jpg".into(), image, meta })
}

/// The whole picture, what is transparent white.
fn flattened(picture: &RgbaImage) -> RgbImage {
    let mut canvas = RgbImage::from_pixel(picture.width(), picture.height(), image::Rgb([255; 3]));
    paint::paste(&mut canvas, picture, 0, 0);
    canvas
}

/// The whole picture, its longer side `long`, centred on a white square.
fn on_white(cutout: &RgbaImage, side: u32, long: u32) -> RgbImage {
    let mut canvas = RgbImage::from_pixel(side, side, image::Rgb([255; 3]));
    let fitted = paint::fit(cutout, long);
    let (x, y) = ((side - fitted.width()) / 2, (side - fitted.height()) / 2);
    paint::paste(&mut canvas, &fitted, i64::from(x), i64::from(y));
    canvas
}

/// Somewhere on a background that it stands out from.
fn on_background(
    cutout: &RgbaImage,
    pool: &Pool,
    side: u32,
    rng: &mut Rng,
) -> (RgbImage, Background, Option<&'static str>) {
    let mean = paint::mean_colour(cutout);
    let mut background = Background::Blur;
    for _ in 0..6 {
        let candidate = Background::draw(rng);
        let clear = match candidate {
            Background::Plain("white") => false,
            Background::Plain(name) => paint::COLOURS.iter().any(|(n, v)| {
                *n == name && (0..3).map(|c| (mean[c] - f64::from(v[c])).abs()).sum::<f64>() > 110.0
            }),
            _ => true,
        };
        if clear {
            background = candidate;
            break;
        }
    }
    let (mut canvas, licence) = pool.ground(background, side, rng);
    let long = (rng.range(0.55, 0.9) * f64::from(side)) as u32;
    let fitted = paint::fit(cutout, long);
    let (free_x, free_y) = (side - fitted.width(), side - fitted.height());
    let x = (f64::from(free_x) * rng.range(0.2, 0.8)) as i64;
    let y = (f64::from(free_y) * rng.range(0.3, 0.9)) as i64;
    paint::paste(&mut canvas, &fitted, x, y);
    (canvas, background, licence)
}

/// Captions of a single picture: the phrase, and with the place. Its style is not said: a third of all captions would begin with
/// "an emoji of", and a model begins so whenever it is unsure.
fn single_meta(r: &Ready, background: Option<Background>) -> Meta {
    let place = background.and_then(Background::phrase);
    let mut captions = Vec::new();
    if let Some(place) = &place {
        captions.push(format!("{} {place}", r.phrase));
    }
    captions.push(r.phrase.clone());
    let answer = r.phrase.clone();
    let mut qa = vec![QuestionAnswer { question: "what is this?".into(), answer }];
    if let (Some(place), Some(Background::Plain(colour))) = (&place, background) {
        let question = "what color is the background?".into();
        debug_assert!(place.contains(colour));
        qa.push(QuestionAnswer { question, answer: colour.into() });
    }
    let says_colour = r.concept.split(' ').any(|w| paint::COLOURS.iter().any(|(n, _)| *n == w));
    if let Some(colour) = r.colour.filter(|_| !says_colour && r.noun != "face") {
        let thing = if text::is_plain_thing(&r.phrase) { &r.concept } else { &r.noun };
        let verb = if text::is_plural(&r.noun) { "are" } else { "is" };
        let question = format!("what color {verb} the {thing}?");
        qa.push(QuestionAnswer { question, answer: colour.into() });
    }
    let words = |side: &str| r.phrase.split(' ').any(|w| w == side);
    Meta {
        caption: captions[0].clone(),
        captions,
        qa,
        concept: r.concept.clone(),
        source: r.source.name.into(),
        licence: r.source.licence.into(),
        // Pictures of one concept share captions: they are positives of one another, not negatives.
        image_id: Some(hash_str(&r.concept) >> 12),
        noun: Some(r.noun.clone()),
        flip: !(words("left") || words("right")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A picture of a phrase, of one colour but for a corner.
    fn ready(phrase: &str, red: u8) -> Ready {
        let corner = |x: u32, y: u32| [red, if x + y < 20 { 200 } else { 30 }, red / 2];
        let pixels: Vec<u8> =
            (0..32).flat_map(|y| (0..32).flat_map(move |x| corner(x, y))).collect();
        let (bytes, name) = (paint::png(&pixels, 32).unwrap(), format!("{phrase}/{red}"));
        let source = &cifar::CIFAR_100;
        let picture =
            Picture { source, name, bytes, phrase: phrase.into(), style: Style::Snapshot };
        prepare_one(&picture, 256).unwrap()
    }

    #[test]
    fn photographs_keep_their_shape_and_square_ones_fill_a_square() {
        let config = MiniConfig::full(Path::new("nowhere"), Origin::Folder("nowhere".into()));
        let single = |width, height, style| {
            let cutout =
                RgbaImage::from_fn(width, height, |x, y| image::Rgba([x as u8, y as u8, 7, 255]));
            let ready = [Ready { cutout, style, ..ready("a dog", 1) }];
            let pool = Pool::new(Vec::new(), Vec::new(), Vec::new());
            let made = make(&config, Split::Train, Job::Single(0), &ready, &pool).unwrap();
            (image::load_from_memory(&made.image).unwrap().to_rgb8(), made.image)
        };
        assert_eq!(single(300, 200, Style::Snapshot).0.dimensions(), (256, 171));
        assert_eq!(single(300, 200, Style::Photo).0.dimensions(), (256, 256));
        let square = RgbaImage::from_fn(32, 32, |x, y| image::Rgba([x as u8, y as u8, 7, 255]));
        let on_square = paint::jpeg(&on_white(&square, 256, 256)).unwrap();
        assert_eq!(single(32, 32, Style::Snapshot).1, on_square);
    }

    #[test]
    fn added_photographs_are_of_nothing_that_is_held_out() {
        let standing = [ready("a dog", 10), ready("a cat", 60), ready("a cow", 110)];
        let splits = [Split::Train, Split::Val, Split::Test];
        let more = [
            ("a dog", 160),
            // A held-out concept, a held-out picture under another name, and one of train's.
            ("a cow", 210),
            ("an ox", 110),
            ("a wolf", 10),
            ("a black cat", 250),
        ];
        let more = more.map(|(phrase, red)| ready(phrase, red)).into();
        let mut left_out = LeftOut::new();
        let kept = not_held_out(more, &standing, &splits, &mut left_out);
        let kept: Vec<&str> = kept.iter().map(|r| r.phrase.as_str()).collect();
        assert_eq!(kept, ["a dog", "a wolf", "a black cat"]);
        assert_eq!(left_out.into_values().collect::<Vec<_>>(), [2]);
    }
}

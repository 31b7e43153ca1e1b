//! Photographs of some ninety kinds of things: Caltech-101, from the archive that its authors give.
//!
//! No registry has it, so nothing here fetches it; whoever has the archive may add it. All its pictures of the wanted folders are
//! held, 113 MB.

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
    attribution: "Caltech 101, Fei-Fei Li, Marco Andreetto, Marc'Aurelio Ranzato and Pietro Perona, doi.org/10.22002/D1.20086; photographs from the web, resized",
};
const ROOT: &str = "101_ObjectCategories/";
/// Pictures taken of a folder, the first ones by name: of a few it has hundreds.
const PER_FOLDER: usize = 100;
/// Bytes of pictures that are held at most; there are 113 million.
const MOST_BYTES: usize = 200_000_000;
/// SHA-256 of the taken pictures' names and SHA-256s, in the order of the names: whichever archive holds them.
/// Made from a public copy of the unpacked pictures; the authors' archive itself has not been read yet.
pub const TAKEN_SHA256: &str = "98e9c523616a25765e4d37c888db4afd554ab028f9f20f5d58e6374322b6b1ca";
/// Folder: what its pictures show, as one would say it. A bird is called one where few could say which,
/// a dalmatian a dog. Not here are the clutter, two comic figures, the yin and yang, and the faces that are there twice.
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
    read(archive, TAKEN_SHA256, left_out)
}

fn read(archive: &Path, expected_sha256: &str, left_out: &mut LeftOut) -> Result<Vec<Picture>> {
    let bad = |what: String| Error::Data(format!("{}: {what}", archive.display()));
    if archive.extension().is_some_and(|end| end == "zip" || end == "tar") {
        return Err(bad(
            "101_ObjectCategories.tar.gz is wanted; caltech-101.zip has it inside".into()
        ));
    }
    let (mut found, mut bytes_held) = (BTreeMap::new(), 0);
    members(archive, &|name| wanted(name).is_some(), &mut |name, bytes| {
        bytes_held += bytes.len();
        if bytes_held > MOST_BYTES {
            return Err(bad(format!("more than {MOST_BYTES} bytes of pictures")));
        }
        match found.insert(name.to_owned(), bytes) {
            Some(_) => Err(bad(format!("{name} is in it twice"))),
            None => Ok(()),
        }
    })?;
    if found.is_empty() {
        return Err(bad(format!("no pictures in {ROOT}")));
    }
    let pictures = first_of_each(found, left_out);
    let sha256 = sha256_of(&pictures);
    if sha256 != expected_sha256 {
        return Err(bad(format!("its pictures have SHA-256 {sha256}, not {expected_sha256}")));
    }
    Ok(pictures)
}

/// Folder of the archive's member `name` and what it shows, if it is a picture that is wanted.
fn wanted(name: &str) -> Option<(&'static str, &'static str)> {
    let (folder, file) = name.strip_prefix(ROOT)?.split_once('/')?;
    let is_picture = file.ends_with(".jpg") && !file.starts_with('.') && !file.contains('/');
    FOLDERS.iter().find(|(name, _)| *name == folder && is_picture).copied()
}

fn first_of_each(found: BTreeMap<String, Vec<u8>>, left_out: &mut LeftOut) -> Vec<Picture> {
    let mut taken: BTreeMap<&str, usize> = BTreeMap::new();
    let mut out = Vec::new();
    for (name, bytes) in found {
        let Some((folder, thing)) = wanted(&name) else { continue };
        let taken = taken.entry(folder).or_default();
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

/// Of names and contents, in the order of the names.
fn sha256_of(pictures: &[Picture]) -> String {
    let mut hash = Sha256::new();
    for picture in pictures {
        hash.update(&picture.name);
        hash.update([0]);
        hash.update(Sha256::digest(&picture.bytes));
    }
    hex(&hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::package::write_archive;

    fn name(folder: &str, i: usize) -> String {
        format!("{ROOT}{folder}/image_{i:04}.jpg")
    }

    #[test]
    fn the_first_of_each_folder() {
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
        let of = |name: &str| wanted(&format!("{ROOT}{name}")).map(|(_, thing)| thing);
        assert_eq!(of("car_side/image_0001.jpg"), Some("car"));
        for other in [
            "BACKGROUND_Google/image_0001.jpg",
            "car_side/tmp",
            "car_side/more/image_0001.jpg",
            "car_side/._image_0001.jpg",
            "image_0001.jpg",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
        assert_eq!(wanted("Annotations/car_side/image_0001.jpg"), None);
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
    fn the_order_of_an_archive_does_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("101_ObjectCategories.tar.gz");
        let (emu, crab) = (name("emu", 1), name("crab", 1));
        let dotted = format!("./{emu}");
        let read = |members: &[(&str, &[u8])], sha256: &str| {
            write_archive(&path, members);
            read(&path, sha256, &mut LeftOut::new())
        };
        let refused = read(&[(&emu, b"1"), (&crab, b"2")], "another").unwrap_err().to_string();
        let sha256 =
            refused.split(' ').find(|word| word.len() == 65).unwrap().trim_end_matches(',');
        for members in [[(&*crab, &b"2"[..]), (&*emu, b"1")], [(&*dotted, b"1"), (&*crab, b"2")]] {
            let found = read(&members, sha256).unwrap();
            let found: Vec<(&str, &[u8])> =
                found.iter().map(|p| (p.phrase.as_str(), p.bytes.as_slice())).collect();
            assert_eq!(found, [("a crab", &b"2"[..]), ("a bird", b"1")]);
        }
        // The same contents under each other's names.
        assert!(read(&[(&emu, b"2"), (&crab, b"1")], sha256).is_err());
        let twice = read(&[(&emu, b"1"), (&emu, b"1")], sha256).unwrap_err().to_string();
        assert!(twice.contains("twice"), "{twice}");
    }

    #[test]
    fn another_archive_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("101_ObjectCategories.tar.gz");
        let refused = |path: &Path| caltech_101(path, &mut LeftOut::new()).unwrap_err().to_string();
        write_archive(&path, &[("101/emu/image_0001.jpg", b"x")]);
        assert!(refused(&path).contains("no pictures in 101_"));
        write_archive(&path, &[("101_ObjectCategories/emu/image_0001.jpg", b"x")]);
        let other = refused(&path);
        assert!(other.contains("SHA-256") && other.contains("tar.gz"), "{other}");
        std::fs::write(&path, b"no archive").unwrap();
        assert!(refused(&path).contains("101_ObjectCategories.tar.gz"));
        assert!(refused(Path::new("caltech-101.zip")).contains("has it inside"));
        let larger = vec![0; MOST_BYTES / 4 + 1];
        let names: Vec<String> = (1..=4).map(|i| name("emu", i)).collect();
        write_archive(
            &path,
            &names.iter().map(|n| (n.as_str(), larger.as_slice())).collect::<Vec<_>>(),
        );
        assert!(refused(&path).contains("bytes of pictures"));
    }
}

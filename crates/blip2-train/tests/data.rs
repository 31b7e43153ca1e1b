//! Data from end to end: shards that were written come back, hostile shards do no harm and are counted,
//! the tiny set is the same for the same seed, and no concept is in two splits.

#![allow(clippy::unwrap_used, reason = "helpers of tests, too, are tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use blip2_train::data::mini::{MiniConfig, build};
use blip2_train::data::package::{self, Client, Origin, Package, Source};
use blip2_train::data::{Dataset, Fault, Meta, Sample, ShardReader, ShardWriter, Tally};

fn meta(caption: &str) -> Meta {
    Meta::parse(format!(r#"{{"caption":"{caption}"}}"#).as_bytes()).unwrap()
}

fn sample(key: &str, image: &[u8]) -> Sample {
    Sample { key: key.into(), extension: "jpg".into(), image: image.into(), meta: meta("a cat") }
}

/// A raw tar member: header and padded data. `size` may lie.
fn member(name: &[u8], kind: u8, size: u64, data: &[u8]) -> Vec<u8> {
    let mut header = [0u8; 512];
    header[..name.len().min(100)].copy_from_slice(&name[..name.len().min(100)]);
    header[100..107].copy_from_slice(b"0000644");
    header[108..115].copy_from_slice(b"0000000");
    header[116..123].copy_from_slice(b"0000000");
    header[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    header[136..147].copy_from_slice(b"00000000000");
    header[156] = kind;
    header[257..265].copy_from_slice(b"ustar\x0000");
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    let mut out = header.to_vec();
    out.extend_from_slice(data);
    out.resize(out.len().div_ceil(512) * 512, 0);
    out
}

fn file(name: &str, data: &[u8]) -> Vec<u8> {
    member(name.as_bytes(), b'0', data.len() as u64, data)
}

fn pair(key: &str) -> Vec<u8> {
    [
        file(&format!("{key}.jpg"), b"picture"),
        file(&format!("{key}.json"), br#"{"caption":"a cat"}"#),
    ]
    .concat()
}

fn pax(records: &[(&str, &str)]) -> Vec<u8> {
    let mut body = Vec::new();
    for (key, value) in records {
        let mut length = key.len() + value.len() + 3;
        while length.to_string().len() + key.len() + value.len() + 3 != length {
            length += 1;
        }
        body.extend_from_slice(format!("{length} {key}={value}\n").as_bytes());
    }
    member(b"pax", b'x', body.len() as u64, &body)
}

/// A split of which everything can be used.
fn whole_split(folder: &Path, split: &str) -> Dataset {
    Dataset::open_split(folder, split, &mut |note| panic!("{note}")).unwrap()
}

/// Writes a shard, reads it both ways: keys that came through, and faults.
fn read(parts: &[Vec<u8>]) -> (Vec<String>, BTreeMap<Fault, u64>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.tar");
    std::fs::write(&path, parts.concat()).unwrap();
    let (mut keys, mut tally) = (Vec::new(), Tally::default());
    for item in ShardReader::open(&path).unwrap() {
        match item {
            Ok(sample) => keys.push(sample.key),
            Err(bad) => tally.add(&bad),
        }
    }
    // The index pass must find the same, and nothing may have been written beside the shard.
    match Dataset::open(&[path]) {
        Ok(set) => {
            let indexed: Vec<&str> = (0..set.len()).filter_map(|i| set.key(i)).collect();
            assert_eq!(indexed, keys);
            assert_eq!(set.tally().faults, tally.faults);
            for i in 0..set.len() {
                set.get(i).unwrap();
            }
        }
        Err(_) => assert!(keys.is_empty()),
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    (keys, tally.faults)
}

#[test]
fn what_was_written_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = ShardWriter::new(folder.path(), "train", 2).unwrap();
    for i in 0..5u8 {
        writer.write(&sample(&format!("key-{i}"), &[i; 700])).unwrap();
    }
    let written = writer.finish().unwrap();
    let names: Vec<&str> = written.iter().map(|w| w.name.as_str()).collect();
    assert_eq!(names, ["train-00000.tar", "train-00001.tar", "train-00002.tar"]);
    let set = whole_split(folder.path(), "train");
    assert_eq!(set.len(), 5);
    for i in 0..5 {
        assert_eq!(set.get(i).unwrap(), sample(&format!("key-{i}"), &[i as u8; 700]));
        assert_eq!(set.meta(i).unwrap(), meta("a cat"));
    }
    assert!(set.get(5).is_err());
    assert_eq!(set.tally().bad(), 0);
    let streamed: Vec<Sample> = ShardReader::open(&folder.path().join("train-00001.tar"))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert_eq!(streamed, [sample("key-2", &[2; 700]), sample("key-3", &[3; 700])]);
}

#[test]
fn an_epoch_is_a_permutation_that_depends_on_seed_and_epoch() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = ShardWriter::new(folder.path(), "train", 100).unwrap();
    for i in 0..50 {
        writer.write(&sample(&format!("k{i}"), b"x")).unwrap();
    }
    writer.finish().unwrap();
    let set = whole_split(folder.path(), "train");
    let order = set.order(1, 0);
    assert_eq!(order.iter().collect::<BTreeSet<_>>().len(), 50);
    assert_eq!(order, set.order(1, 0));
    assert_ne!(order, set.order(1, 1));
    assert_ne!(order, set.order(2, 0));
}

#[test]
fn fewer_shards_leave_no_old_ones_behind() {
    let folder = tempfile::tempdir().unwrap();
    for n in [5, 2] {
        let mut writer = ShardWriter::new(folder.path(), "val", 1).unwrap();
        for i in 0..n {
            writer.write(&sample(&format!("k{i}"), b"x")).unwrap();
        }
        writer.finish().unwrap();
    }
    assert_eq!(whole_split(folder.path(), "val").len(), 2);
}

#[test]
fn keys_must_be_plain_and_new() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = ShardWriter::new(folder.path(), "x", 10).unwrap();
    writer.write(&sample("fine", b"x")).unwrap();
    for key in ["fine", "", "/etc/x", "a.b", "ä", "../x"] {
        assert!(writer.write(&sample(key, b"x")).is_err(), "{key:?}");
    }
}

#[test]
fn names_are_labels_not_paths() {
    let (keys, faults) = read(&[pair("../../evil"), pair("/etc/evil"), pair("a/b/c"), pair("./d")]);
    assert_eq!(keys, ["../../evil", "/etc/evil", "a/b/c", "d"]);
    assert!(faults.is_empty());
}

#[test]
fn links_and_devices_are_skipped_and_counted() {
    let parts: Vec<Vec<u8>> = [b'1', b'2', b'3', b'4', b'6']
        .iter()
        .map(|kind| member(b"link.jpg", *kind, 0, b""))
        .chain([pair("good"), member(b"folder/", b'5', 0, b"")])
        .collect();
    let (keys, faults) = read(&parts);
    assert_eq!(keys, ["good"]);
    assert_eq!(faults, BTreeMap::from([(Fault::NotAFile, 5)]));
}

#[test]
fn sparse_files_end_the_shard() {
    let (keys, faults) = read(&[pair("good"), member(b"s.jpg", b'S', 3, b"abc"), pair("lost")]);
    assert_eq!(keys, ["good"]);
    assert_eq!(faults[&Fault::Sparse], 1);
    let sparse = pax(&[("GNU.sparse.major", "1")]);
    let (keys, faults) = read(&[pair("good"), sparse, file("s.jpg", b"abc")]);
    assert_eq!(keys, ["good"]);
    assert_eq!(faults[&Fault::Sparse], 1);
}

#[test]
fn sizes_that_lie_take_no_memory() {
    // 8 GiB announced in a shard of a few kilobytes; then a size in base 256 near 2^63.
    let (keys, faults) = read(&[pair("good"), member(b"x.jpg", b'0', (8 << 30) - 1, b"tiny")]);
    assert_eq!(keys, ["good"]);
    assert_eq!(faults[&Fault::TooBig], 1);
    let mut huge = member(b"x.jpg", b'0', 0, b"tiny");
    huge[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0x7f, 255, 255, 255, 255, 255, 255, 255]);
    huge[148..156].fill(b' ');
    let sum: u32 = huge[..512].iter().map(|b| u32::from(*b)).sum();
    huge[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    let (keys, faults) = read(&[pair("good"), huge]);
    assert_eq!(keys, ["good"]);
    assert_eq!(faults.values().sum::<u64>(), 1);
}

#[test]
fn json_is_limited() {
    let big = file("big.json", &vec![b' '; (1 << 20) + 1]);
    let (keys, faults) = read(&[file("big.jpg", b"x"), big, pair("good")]);
    assert_eq!(keys, ["good"]);
    assert_eq!(faults, BTreeMap::from([(Fault::TooBig, 1)]));
}

#[test]
fn pax_sizes_and_names_are_honoured() {
    // The header says 0 bytes, PAX says 7; a reader that believes the header reads data as a header.
    let name = format!("{}.jpg", "n".repeat(150));
    let picture =
        [pax(&[("size", "7"), ("path", &name)]), member(b"short.jpg", b'0', 0, b"picture")]
            .concat();
    let json = br#"{"caption":"a cat"}"#;
    let json_name = format!("{}.json", "n".repeat(150));
    let json = [pax(&[("path", &json_name)]), file("short.json", json)].concat();
    let (keys, faults) = read(&[picture, json, pair("good")]);
    assert_eq!(keys, ["n".repeat(150), "good".to_owned()]);
    assert!(faults.is_empty());
    let (_, faults) = read(&[pair("good"), pax(&[("size", "99999999999999999999")]), pair("b")]);
    assert_eq!(faults[&Fault::BadHeader], 1);
    let (_, faults) = read(&[pair("good"), pax(&[("size", "99999999999")]), pair("b")]);
    assert_eq!(faults[&Fault::TooBig], 1);
}

#[test]
fn extension_headers_are_limited() {
    let long = member(b"././@LongLink", b'L', 200_000, &vec![b'a'; 200_000]);
    let (keys, faults) = read(&[pair("good"), long, pair("b")]);
    assert_eq!(keys, ["good"]);
    assert_eq!(faults[&Fault::TooBig], 1);
    let many: Vec<Vec<u8>> = (0..50).map(|_| pax(&[("comment", "x")])).collect();
    let (keys, faults) = read(&[pair("good"), many.concat(), pair("b")]);
    assert_eq!(keys, ["good"]);
    assert_eq!(faults[&Fault::TooBig], 1);
}

#[test]
fn every_fault_has_its_class() {
    let (keys, faults) = read(&[
        pair("a"),
        file("only.jpg", b"x"),
        file("alone.json", br#"{"caption":"x"}"#),
        pair("a"),
        file("bad.jpg", b"x"),
        file("bad.json", b"{no json"),
        file("empty.jpg", b"x"),
        file("empty.json", br#"{"caption":" "}"#),
        file("readme.txt", b"x"),
        file("noextension", b"x"),
        member(b"\xff\xfe.jpg", b'0', 1, b"x"),
        file("two.jpg", b"x"),
        file("two.png", b"x"),
        file("two.json", br#"{"caption":"x"}"#),
        pair("z"),
    ]);
    assert_eq!(keys, ["a", "two", "z"]);
    assert_eq!(
        faults,
        BTreeMap::from([
            (Fault::BadName, 2),
            (Fault::Unknown, 1),
            (Fault::DuplicateKey, 2),
            (Fault::MissingJson, 1),
            (Fault::MissingPicture, 1),
            (Fault::BadJson, 2),
        ])
    );
}

#[test]
fn a_cut_at_any_byte_loses_only_what_was_cut() {
    let whole = [pair("a"), pair("b"), vec![0; 1024]].concat();
    for cut in (0..whole.len()).step_by(31) {
        let (keys, faults) = read(&[whole[..cut].to_vec()]);
        // A sample: picture header, picture, json header, 19 bytes of json, padding.
        let (at, inside) = (cut / 2048, cut % 2048);
        let whole_samples = if inside >= 1536 + 19 { at + 1 } else { at };
        assert_eq!(keys.len(), whole_samples.min(2), "{cut}");
        if at < 2 && (1..1536 + 19).contains(&inside) {
            assert!(faults.values().sum::<u64>() > 0, "{cut}");
        }
    }
}

#[test]
fn noise_is_no_shard() {
    let noise: Vec<u8> =
        (0..100_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let (keys, faults) = read(&[noise]);
    assert!(keys.is_empty());
    assert_eq!(faults, BTreeMap::from([(Fault::BadHeader, 1)]));
}

#[test]
fn a_flipped_byte_never_panics() {
    let whole = [pair("a"), pax(&[("path", "b.jpg")]), file("x", b"x"), pair("c")].concat();
    for at in (0..whole.len()).step_by(5) {
        let mut bent = whole.clone();
        bent[at] ^= 0x41;
        read(&[bent]);
    }
}

#[test]
fn a_tally_stops_what_is_too_bad() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.tar");
    std::fs::write(&path, [pair("a"), file("b.jpg", b"x")].concat()).unwrap();
    let set = Dataset::open(&[path]).unwrap();
    assert!(set.tally().check(0.6).is_ok());
    let said = set.tally().check(0.1).unwrap_err().to_string();
    assert!(said.contains("MissingJson") && said.contains("x.tar"), "{said}");
}

/// Opens the one shard of a split that consists of `parts`; also says what was noted.
fn open_one(parts: &[Vec<u8>]) -> (blip2_train::Result<Dataset>, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("train-00000.tar"), parts.concat()).unwrap();
    let mut notes = Vec::new();
    let mut note = |text: &str| notes.push(text.to_owned());
    let set = Dataset::open_split(folder.path(), "train", &mut note);
    (set, notes)
}

fn pairs(count: usize) -> Vec<Vec<u8>> {
    (0..count).map(|i| pair(&format!("k{i}"))).collect()
}

#[test]
fn one_bad_sample_of_many_is_said_and_one_of_few_is_refused() {
    let bad = [file("bad.jpg", b"x"), file("bad.json", b"{no json")].concat();
    let (set, notes) = open_one(&[pairs(150), vec![bad.clone()]].concat());
    assert_eq!(set.unwrap().len(), 150);
    assert_eq!(notes.len(), 1);
    for part in ["warning", "train", "150 samples", "1 BadJson", "train-00000.tar"] {
        assert!(notes[0].contains(part), "{part}: {}", notes[0]);
    }
    let (set, notes) = open_one(&[pairs(50), vec![bad]].concat());
    let said = set.err().unwrap().to_string();
    assert!(said.contains("too much can't be used") && said.contains("1 BadJson"), "{said}");
    assert!(notes.is_empty());
}

#[test]
fn a_cut_shard_is_refused_however_many_samples_are_left() {
    let whole = pairs(300).concat();
    let (set, notes) = open_one(&[whole[..whole.len() - 2000].to_vec()]);
    let said = set.err().unwrap().to_string();
    assert!(said.contains("cut or damaged") && said.contains("299 samples"), "{said}");
    assert!(said.contains("Truncated") && said.contains("train-00000.tar"), "{said}");
    assert!(notes.is_empty());
    // A header that is none loses all samples behind it, one fault though it is.
    let (set, _) = open_one(&[pairs(200), vec![vec![7; 512]], vec![pair("lost")]].concat());
    assert!(set.err().unwrap().to_string().contains("cut or damaged"));
}

#[test]
fn what_others_keep_beside_each_sample_costs_none() {
    let parts: Vec<_> =
        (0..20).flat_map(|i| [pair(&format!("k{i}")), file(&format!("k{i}.txt"), b"x")]).collect();
    let (set, notes) = open_one(&parts);
    assert_eq!(set.unwrap().len(), 20);
    assert!(notes[0].contains("20 Unknown"), "{}", notes[0]);
}

fn shards(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|p: PathBuf| {
            (p.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(p).unwrap())
        })
        .collect()
}

#[test]
fn the_tiny_set_is_a_function_of_its_seed() {
    let made = |seed, threads| {
        let folder = tempfile::tempdir().unwrap();
        let mut config = MiniConfig::tiny(folder.path(), 40);
        config.seed = seed;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| build(&config, &|_| ())).unwrap();
        shards(folder.path())
    };
    let one = made(1, 1);
    assert_eq!(
        one.keys().collect::<Vec<_>>(),
        ["mini.json", "test-00000.tar", "train-00000.tar", "val-00000.tar"]
    );
    assert_eq!(one, made(1, 3));
    assert_ne!(one["train-00000.tar"], made(2, 1)["train-00000.tar"]);
}

#[test]
fn no_concept_is_in_two_splits_and_scenes_tell_the_truth() {
    let folder = tempfile::tempdir().unwrap();
    build(&MiniConfig::tiny(folder.path(), 160), &|_| ()).unwrap();
    let mut things: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
    let mut answers: BTreeMap<String, usize> = BTreeMap::new();
    for split in ["train", "val", "test"] {
        let set = whole_split(folder.path(), split);
        for i in 0..set.len() {
            let sample = set.get(i).unwrap();
            let meta = &sample.meta;
            for thing in meta.concept.split(" + ") {
                things.entry(thing.to_owned()).or_default().insert(split);
            }
            assert_eq!(meta.captions[0], meta.caption);
            assert_eq!(meta.caption, meta.caption.to_lowercase());
            let sides = meta.captions.iter().any(|c| c.contains(" left ") || c.contains(" right "));
            assert!(!(sides && meta.flip), "{meta:?}");
            assert!(!meta.qa.is_empty());
            for qa in &meta.qa {
                assert!(qa.question.ends_with('?') && !qa.answer.is_empty());
                *answers.entry(qa.answer.clone()).or_default() += 1;
                // What is asked about with yes is in the captions, with no it is not.
                if let Some(name) = qa.question.strip_prefix("is there ") {
                    let name = name.trim_end_matches('?').split_once(' ').unwrap().1;
                    let said = meta.concept.contains(name);
                    assert_eq!(said, qa.answer == "yes", "{meta:?}");
                }
            }
            let picture = image::load_from_memory(&sample.image).unwrap();
            assert_eq!((picture.width(), picture.height()), (128, 128));
        }
    }
    for (thing, splits) in &things {
        assert_eq!(splits.len(), 1, "{thing} is in {splits:?}");
    }
    let (yes, no) = (answers["yes"] as f64, answers["no"] as f64);
    assert!((0.7..1.4).contains(&(yes / no)), "{yes} yes, {no} no");
}

const NOWHERE: Package = Package {
    source: Source {
        name: "no-such-package",
        short: "none",
        version: "1.0",
        licence: "none",
        attribution: "nobody",
    },
    client: Client::Npm,
    file: "no-such-package-1.0.tgz",
    sha256: "00",
    bytes: 1,
};

#[test]
fn package_errors_name_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let origin = Origin::Folder(folder.path().to_path_buf());
    let said = package::archive(&NOWHERE, &origin, &|_| ()).unwrap_err().to_string();
    assert!(said.contains("no-such-package") && said.contains("npm pack"), "{said}");
    std::fs::write(folder.path().join(NOWHERE.file), b"x").unwrap();
    let said = package::archive(&NOWHERE, &origin, &|_| ()).unwrap_err().to_string();
    assert!(said.contains("sha256") && said.contains("expected 00"), "{said}");
}

#[test]
fn packages_are_walked_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let tar = [
        file("package/../../evil.png", b"picture"),
        member(b"l.png", b'2', 0, b""),
        file("b.txt", b"t"),
    ];
    let tar = [tar.concat(), vec![0; 1024]].concat();
    let tgz = folder.path().join("x.tgz");
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(&tar).unwrap();
    std::fs::write(&tgz, gz.finish().unwrap()).unwrap();
    let mut data = Vec::new();
    lzma_rs::xz_compress(&mut tar.as_slice(), &mut data).unwrap();
    let deb = folder.path().join("x.deb");
    let mut archive = ar::Builder::new(Vec::new());
    for (name, bytes) in [("debian-binary", b"2.0\n".to_vec()), ("data.tar.xz", data)] {
        archive
            .append(&ar::Header::new(name.into(), bytes.len() as u64), bytes.as_slice())
            .unwrap();
    }
    std::fs::write(&deb, archive.into_inner().unwrap()).unwrap();
    for path in [tgz, deb] {
        let mut seen = Vec::new();
        package::members(&path, &|n| n.ends_with(".png"), &mut |name, bytes| {
            seen.push((name.to_owned(), bytes));
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, [("package/../../evil.png".to_owned(), b"picture".to_vec())]);
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
}

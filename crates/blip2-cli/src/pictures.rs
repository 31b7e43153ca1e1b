//! From what was typed to pictures: files, folders, patterns; read in batches, bad ones set aside.
//!
//! What is wrong with one picture, or with one of the things typed, never stops the others: it becomes a [`Bad`] that
//! keeps its place in the order. Of a batch only what the image encoder looks at is kept, a square of a few hundred
//! pixels a side, so that sixteen pictures of 100 megapixels need no more memory than sixteen small ones.

use std::collections::HashSet;
use std::fs::DirEntry;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, sync_channel};

use blip2::image::{self, Pixels, Rgb};
use blip2::{Error, Result};
use rayon::prelude::*;

use crate::Outcome;
use crate::cli::{Format, PictureArgs};
use crate::memory;
use crate::output::{self, Row};

/// What counts as a picture when a folder is searched.
const ENDINGS: [&str; 9] = ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jfif"];

/// Largest file that is read. The largest picture allowed, 100 megapixels of 16-bit RGBA, has 0.8 GB unpacked.
const MAX_BYTES: u64 = 1 << 30;

/// A file to read, or what stands in its place.
type Each = std::result::Result<PathBuf, Bad>;

/// Something typed or found that is no picture to read.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Bad {
    image: PathBuf,
    /// With the path in front.
    reason: String,
}

impl Bad {
    fn new(image: &Path, error: &Error) -> Self {
        Self { image: image.to_path_buf(), reason: error.to_string() }
    }

    fn because(image: &Path, reason: impl Into<String>) -> Self {
        Self::new(image, &Error::file(image, reason))
    }
}

/// What was typed, found on the disk.
pub(crate) struct Found(Vec<Each>);

impl Found {
    /// The files that `typed` stands for, in the order typed, folders and patterns sorted by name.
    pub(crate) fn new(typed: &[PathBuf]) -> Self {
        let mut found = Vec::new();
        for path in typed {
            let text = path.to_string_lossy();
            if path.is_dir() {
                folder(path, &mut found);
            } else if !path.exists() && text.contains(['*', '?', '[']) {
                pattern(&text, &mut found);
            } else {
                found.push(check_file(path).map(|()| path.clone()));
            }
        }
        Self(found)
    }

    /// Whether there is not one file: then loading a model, or even downloading it, would be in vain.
    pub(crate) fn is_hopeless(&self) -> bool {
        self.0.iter().all(std::result::Result::is_err)
    }

    /// Reports what is wrong where nothing can be read.
    pub(crate) fn report(&self, format: Format) -> anyhow::Result<Outcome> {
        for bad in self.0.iter().filter_map(|each| each.as_ref().err()) {
            output::failure(format, &bad.image, &bad.reason)?;
        }
        Ok(Outcome::SomeFailed)
    }

    /// Reads the pictures batch by batch, resized to `side` × `side` pixels, and hands the good ones to `work`, which
    /// gives the rows of each. A batch is as large as was asked for, or has room if each picture takes `bytes`; the first is a
    /// quarter of that: a model need not wait long for it, nor whoever waits for the first row. Rows and failures are
    /// written in the order of the pictures. The next batch is read while
    /// one is worked on: disks and decoders need not wait for the model, nor it for them.
    pub(crate) fn for_each_batch(
        &self,
        args: &PictureArgs,
        side: usize,
        bytes: usize,
        format: Format,
        work: impl FnMut(&[&Path], &[Rgb]) -> anyhow::Result<Vec<Vec<Row>>>,
    ) -> anyhow::Result<Outcome> {
        let pixels = pixels(args.hf_pixels);
        let at_once = args.batch_size.map_or_else(|| memory::pictures_at_once(bytes), usize::from);
        // No room: a batch is handed over when the one before is done, so that one at a time is read ahead.
        let (ahead, batches) = sync_channel(0);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let (first, rest) = self.0.split_at(at_once.div_ceil(4).min(self.0.len()));
                for batch in std::iter::once(first).chain(rest.chunks(at_once)) {
                    let read: Vec<_> =
                        batch.par_iter().map(|each| read(each, pixels, side as u32)).collect();
                    // Nobody listens any more when `work` has failed.
                    if ahead.send(read).is_err() {
                        return;
                    }
                }
            });
            each_batch(batches, format, work)
        })
    }
}

/// How pictures are read, by the flag --hf-pixels.
pub(crate) fn pixels(hf_pixels: bool) -> Pixels {
    if hf_pixels { Pixels::Hf } else { Pixels::Default }
}

/// Reads one picture, resized to `side` × `side` pixels.
pub(crate) fn read_one(path: &Path, pixels: Pixels, side: usize) -> anyhow::Result<Rgb> {
    match read(&Ok(path.to_path_buf()), pixels, side as u32) {
        Ok((_, picture)) => Ok(picture),
        Err(bad) => anyhow::bail!(bad.reason),
    }
}

/// A picture that was read, or why it was not.
type Read<'a> = std::result::Result<(&'a Path, Rgb), Bad>;

/// Works on batches as they come.
fn each_batch(
    batches: Receiver<Vec<Read<'_>>>,
    format: Format,
    mut work: impl FnMut(&[&Path], &[Rgb]) -> anyhow::Result<Vec<Vec<Row>>>,
) -> anyhow::Result<Outcome> {
    let mut outcome = Outcome::AllFine;
    for read in batches {
        let (mut paths, mut pictures, mut failures) = (Vec::new(), Vec::new(), Vec::new());
        for each in read {
            match each {
                Ok((path, picture)) => {
                    paths.push(path);
                    pictures.push(picture);
                    failures.push(None);
                }
                Err(bad) => failures.push(Some(bad)),
            }
        }
        let rows = if paths.is_empty() { Vec::new() } else { work(&paths, &pictures)? };
        if write(failures, rows, format)? > 0 {
            outcome = Outcome::SomeFailed;
        }
    }
    Ok(outcome)
}

/// Writes a batch in its order: for each picture its failure, or else the next of `rows`. Returns the number of failures.
fn write(failures: Vec<Option<Bad>>, rows: Vec<Vec<Row>>, format: Format) -> anyhow::Result<usize> {
    let mut rows = rows.into_iter();
    let mut failed = 0;
    for failure in failures {
        if let Some(bad) = failure {
            output::failure(format, &bad.image, &bad.reason)?;
            failed += 1;
            continue;
        }
        for row in rows.next().unwrap_or_default() {
            output::line(format, &row.json, &row.text)?;
        }
    }
    Ok(failed)
}

/// Decodes a picture and resizes it as the model would: to do that once more changes nothing.
fn read(each: &Each, pixels: Pixels, side: u32) -> std::result::Result<(&Path, Rgb), Bad> {
    let path = each.as_ref().map_err(Clone::clone)?.as_path();
    check_file(path)?;
    let picture = image::open(path, pixels).map_err(|err| Bad::new(path, &err))?;
    Ok((path, picture.resize_bicubic(side, side)))
}

/// Refuses, before it is opened, what reading would wait on for ever or fill the memory with.
fn check_file(path: &Path) -> std::result::Result<(), Bad> {
    let check = || -> Result<()> {
        let meta = std::fs::metadata(path).map_err(Error::io(path))?;
        if !meta.is_file() {
            return Err(Error::file(path, "not a regular file"));
        }
        if meta.len() > MAX_BYTES {
            let reason = format!("{} bytes; a picture may have {MAX_BYTES}", meta.len());
            return Err(Error::file(path, reason));
        }
        Ok(())
    };
    check().map_err(|err| Bad::new(path, &err))
}

/// The pictures in a folder and below it.
fn folder(folder: &Path, found: &mut Vec<Each>) {
    let before = found.len();
    search(folder, found);
    if found.len() == before {
        let reason = format!("no pictures in this folder ({})", ENDINGS.join(", "));
        found.push(Err(Bad::because(folder, reason)));
    }
}

/// Follows no link to a folder, so that a loop can't trap it.
fn search(folder: &Path, found: &mut Vec<Each>) {
    let read = || std::fs::read_dir(folder)?.collect::<std::io::Result<Vec<_>>>();
    let mut entries = match read() {
        Ok(entries) => entries,
        Err(err) => return found.push(Err(Bad::new(folder, &Error::io(folder)(err)))),
    };
    entries.sort_by_key(DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            search(&path, found);
        } else if has_picture_ending(&path) {
            found.push(Ok(path));
        }
    }
}

fn has_picture_ending(path: &Path) -> bool {
    let ending = path.extension().map(|e| e.to_string_lossy().to_lowercase());
    ending.is_some_and(|e| ENDINGS.contains(&e.as_str()))
}

/// What a pattern stands for. Each file comes once, although `**` finds a folder as well as what is in it.
fn pattern(text: &str, found: &mut Vec<Each>) {
    let itself = Path::new(text);
    let paths = match glob::glob(text) {
        Ok(paths) => paths,
        Err(err) => {
            let reason = format!("no such file, and as a pattern it is wrong: {err}");
            return found.push(Err(Bad::because(itself, reason)));
        }
    };
    let mut matches = Vec::new();
    for path in paths {
        match path {
            Ok(path) if path.is_dir() => folder(&path, &mut matches),
            Ok(path) => matches.push(Ok(path)),
            Err(err) => {
                let reason = format!("can't be searched: {}", err.error());
                matches.push(Err(Bad::because(err.path(), reason)));
            }
        }
    }
    if matches.is_empty() {
        matches.push(Err(Bad::because(itself, "no such file, and as a pattern it matches none")));
    }
    let mut seen = HashSet::new();
    matches.retain(|each| match each {
        Ok(path) => seen.insert(path.clone()),
        Err(bad) => seen.insert(bad.image.clone()),
    });
    found.append(&mut matches);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `|`-separated paths in `root`, found: paths from there, `!` before what is bad.
    fn found(root: &Path, typed: &str) -> Vec<String> {
        let typed: Vec<PathBuf> = typed.split('|').map(|path| root.join(path)).collect();
        let name = |path: &Path| path.strip_prefix(root).unwrap().display().to_string();
        let each = |each: &Each| match each {
            Ok(path) => name(path),
            Err(bad) => format!("!{}", name(&bad.image)),
        };
        Found::new(&typed).0.iter().map(each).collect()
    }

    fn files(names: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for name in names {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        root
    }

    #[test]
    fn what_is_bad_keeps_its_place_and_stops_nothing() {
        let root =
            files(&["a/2.png", "a/1.JPG", "a/note.txt", "a/deep/3.gif", "b/x.png", "y[1].png"]);
        std::fs::create_dir(root.path().join("empty")).unwrap();
        for (typed, expected) in [
            ("a", &["a/1.JPG", "a/2.png", "a/deep/3.gif"][..]),
            ("gone.png|b/x.png", &["!gone.png", "b/x.png"]),
            ("empty|b", &["!empty", "b/x.png"]),
            ("y[1].png", &["y[1].png"]),
            ("z[1].png|b", &["!z[1].png", "b/x.png"]),
            ("z[.png|b", &["!z[.png", "b/x.png"]),
            ("a/*.png", &["a/2.png"]),
            ("?", &["a/1.JPG", "a/2.png", "a/deep/3.gif", "b/x.png"]),
            ("b/*|none*|b/x.png", &["b/x.png", "!none*", "b/x.png"]),
        ] {
            assert_eq!(found(root.path(), typed), expected, "{typed}");
        }
    }

    #[test]
    fn a_pattern_gives_each_file_once() {
        let root = files(&["a/1.png", "a/b/2.png"]);
        assert_eq!(found(root.path(), "**/*"), ["a/1.png", "a/b/2.png"]);
    }

    #[test]
    fn without_one_file_there_is_no_hope() {
        let root = files(&["a.png"]);
        let typed = |names: &[&str]| names.iter().map(|n| root.path().join(n)).collect::<Vec<_>>();
        assert!(Found::new(&typed(&["gone.png", "none*", "["])).is_hopeless());
        assert!(!Found::new(&typed(&["gone.png", "a.png"])).is_hopeless());
    }

    #[cfg(unix)]
    #[test]
    fn what_is_no_regular_file_is_not_opened() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("socket.png");
        let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let bad = read(&Ok(path.clone()), Pixels::Default, 8).unwrap_err();
        assert_eq!(bad, Bad::because(&path, "not a regular file"));
    }

    #[test]
    fn a_file_beyond_the_limit_is_not_read() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("large.png");
        // Takes no room on the disk: it is one hole.
        std::fs::File::create(&path).unwrap().set_len(MAX_BYTES + 1).unwrap();
        let bad = check_file(&path).unwrap_err();
        assert!(bad.reason.ends_with("1073741825 bytes; a picture may have 1073741824"), "{bad:?}");
    }

    /// What [`read`] relies on: the model resizes the picture once more, to the same size.
    #[test]
    fn a_second_resize_changes_nothing() {
        let data = (0..31 * 17 * 3).map(|i: u32| (i * 97 % 251) as u8).collect();
        let picture = Rgb { width: 31, height: 17, data };
        for side in [8, 17, 31, 56] {
            let once = picture.resize_bicubic(side, side);
            assert_eq!(once.resize_bicubic(side, side), once);
        }
    }
}

//! Tar shards of samples (webdataset layout): `KEY.jpg|png|webp|…` next to `KEY.json`.
//!
//! Three ways in and out: [`ShardWriter`] writes (same samples, same bytes), [`ShardReader`] streams
//! one shard from front to back, [`Dataset`] indexes shards once and then reads sample *i* directly.
//! A shard may come from anywhere, so nothing in it is trusted: member names are labels and never
//! paths, nothing is unpacked, sizes are capped before memory is taken, and whatever can't be used is
//! counted by [`Fault`] and reported, never passed over in silence.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{BufReader, BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use blip2::pack::make_readable;

use super::sample::{Meta, Sample};
use crate::rng::Rng;
use crate::{Error, Result};

const BLOCK: u64 = 512;
/// The largest picture a shard may hold.
pub const MAX_PICTURE: u64 = 64 << 20;
/// The largest JSON a shard may hold.
pub const MAX_JSON: u64 = 1 << 20;
/// The largest extension header (PAX, GNU long name) that is read.
const MAX_EXTENSION: u64 = 64 << 10;
/// The longest key.
const MAX_KEY: usize = 1024;
/// The largest share of a split that may be unusable.
const MAX_LOST: f64 = 0.01;
const PICTURES: [&str; 8] = ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"];

/// Why something in a shard was not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// The shard ends inside a member, or without its end mark being complete.
    Truncated,
    /// A header that is no tar header; the rest of the shard can't be read.
    BadHeader,
    /// A link, device, pipe: no file.
    NotAFile,
    /// A sparse file.
    Sparse,
    /// Larger than the limits, or larger than the shard itself.
    TooBig,
    /// A name that is empty, too long or not UTF-8.
    BadName,
    /// An extension that is neither picture nor JSON.
    Unknown,
    /// The key was seen before.
    DuplicateKey,
    /// A picture without JSON.
    MissingJson,
    /// JSON without a picture.
    MissingPicture,
    /// JSON that can't be used.
    BadJson,
    /// The shard could not be read at all.
    Unreadable,
}

/// Something in a shard that was not used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bad {
    /// The shard.
    pub shard: PathBuf,
    /// The sample's key or the member's name; empty when there is none.
    pub key: String,
    /// The class.
    pub fault: Fault,
    /// What exactly.
    pub detail: String,
}

impl std::fmt::Display for Bad {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {:?}: {:?}: {}", self.shard.display(), self.key, self.fault, self.detail)
    }
}

impl From<Bad> for Error {
    fn from(bad: Bad) -> Self {
        Self::Data(bad.to_string())
    }
}

/// How many of each [`Fault`], with the first few in words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Samples that were fine.
    pub good: u64,
    /// Count per class.
    pub faults: BTreeMap<Fault, u64>,
    /// The first eight, in words.
    pub examples: Vec<String>,
    /// Shards that could not be read to their end; how many samples they lost, nobody knows.
    pub cut: u64,
}

impl Tally {
    /// Counts one.
    pub fn add(&mut self, bad: &Bad) {
        *self.faults.entry(bad.fault).or_default() += 1;
        if self.examples.len() < 8 {
            self.examples.push(bad.to_string());
        }
    }

    /// All faults together.
    pub fn bad(&self) -> u64 {
        self.faults.values().sum()
    }

    /// Refuses data with a shard that could not be read to its end, or of which more than `share` (0..=1) can't be used.
    ///
    /// # Errors
    /// Names counts per class and the first examples.
    pub fn check(&self, share: f64) -> Result<()> {
        if self.cut > 0 {
            return Err(Error::Data(format!("{} shards are cut or damaged: {self}", self.cut)));
        }
        let (lost, all) = (self.lost(), self.good + self.lost());
        if all > 0 && lost as f64 / all as f64 > share {
            return Err(Error::Data(format!("too much can't be used: {self}")));
        }
        Ok(())
    }

    /// Faults that cost a sample: other tools put further files (a `.txt`, say) beside every sample, which cost none.
    fn lost(&self) -> u64 {
        self.bad() - self.faults.get(&Fault::Unknown).copied().unwrap_or_default()
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} samples", self.good)?;
        for (fault, n) in &self.faults {
            write!(f, ", {n} {fault:?}")?;
        }
        for example in &self.examples {
            write!(f, "\n  {example}")?;
        }
        Ok(())
    }
}

// ---------------------------------------------------------------------------------------------
// Walking a tar file

/// Where a member's bytes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    offset: u64,
    size: u64,
}

/// A regular file in a shard.
struct Member {
    name: String,
    span: Span,
}

/// What the next header is.
enum Step {
    Member(Member),
    Skipped { name: String, fault: Fault, detail: String },
}

/// Walks the headers of a tar file. Positions are absolute; the caller may read a member's bytes
/// before asking for the next one.
struct Walk<R> {
    file: R,
    next: u64,
    len: u64,
    done: bool,
    /// It ended before the file did.
    cut: bool,
}

fn step_error(fault: Fault, name: String, detail: impl Into<String>) -> Step {
    Step::Skipped { name, fault, detail: detail.into() }
}

impl<R: Read + Seek> Walk<R> {
    fn new(mut file: R) -> std::io::Result<Self> {
        let len = file.seek(SeekFrom::End(0))?;
        file.seek(SeekFrom::Start(0))?;
        Ok(Self { file, next: 0, len, done: false, cut: false })
    }

    fn read_at(&mut self, span: Span) -> std::io::Result<Vec<u8>> {
        self.file.seek(SeekFrom::Start(span.offset))?;
        let mut bytes = vec![0; span.size as usize];
        self.file.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Ends the walk with a fault.
    fn stop(&mut self, fault: Fault, name: String, detail: impl Into<String>) -> Option<Step> {
        (self.done, self.cut) = (true, true);
        Some(step_error(fault, name, detail))
    }

    /// The next member, `None` at the end. After a fault that loses the place, the end.
    fn step(&mut self) -> Option<Step> {
        let mut long_name: Option<Vec<u8>> = None;
        let mut pax_size: Option<u64> = None;
        let mut extensions = 0;
        while !self.done {
            if self.next == self.len {
                // Many writers leave out the end mark; a cut exactly here can't be told from it,
                // unless headers announced a member.
                if extensions > 0 {
                    return self.stop(Fault::Truncated, String::new(), "ends after a header");
                }
                self.done = true;
                return None;
            }
            if self.next + BLOCK > self.len {
                return self.stop(Fault::Truncated, String::new(), "ends inside a header");
            }
            let block = match self.read_at(Span { offset: self.next, size: BLOCK }) {
                Ok(block) => block,
                Err(e) => return self.stop(Fault::Unreadable, String::new(), e.to_string()),
            };
            if block.iter().all(|&b| b == 0) {
                self.done = true;
                return None;
            }
            let header = tar::Header::from_byte_slice(&block);
            let sum: u32 = block
                .iter()
                .enumerate()
                .map(|(i, &b)| if (148..156).contains(&i) { 32 } else { u32::from(b) })
                .sum();
            if header.cksum().ok() != Some(sum) {
                return self.stop(Fault::BadHeader, String::new(), "checksum of the header");
            }
            let kind = header.entry_type();
            let mut name = long_name.clone().unwrap_or_else(|| header.path_bytes().into_owned());
            let shown = || String::from_utf8_lossy(&name[..name.len().min(200)]).into_owned();
            let Ok(mut size) = header.entry_size() else {
                return self.stop(Fault::BadHeader, shown(), "size field");
            };
            let extension = kind.is_gnu_longname()
                || kind.is_gnu_longlink()
                || kind.is_pax_local_extensions()
                || kind.is_pax_global_extensions();
            if !extension && let Some(pax) = pax_size {
                size = pax;
            }
            let span = Span { offset: self.next + BLOCK, size };
            let fits = span.offset.checked_add(size).is_some_and(|end| end <= self.len);
            if !fits {
                // A size that the shard can't hold is either a lie or a cut: the place is lost.
                let fault = if size > self.len { Fault::TooBig } else { Fault::Truncated };
                return self.stop(fault, shown(), format!("{size} bytes announced"));
            }
            self.next = (span.offset + size.div_ceil(BLOCK) * BLOCK).min(self.len);

            if extension {
                extensions += 1;
                if size > MAX_EXTENSION || extensions > 8 {
                    let detail = format!("extension header of {size} bytes");
                    return self.stop(Fault::TooBig, shown(), detail);
                }
                let bytes = match self.read_at(span) {
                    Ok(bytes) => bytes,
                    Err(e) => return self.stop(Fault::Unreadable, shown(), e.to_string()),
                };
                if kind.is_gnu_longname() {
                    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
                    long_name = Some(bytes[..end].to_vec());
                } else if kind.is_pax_local_extensions() {
                    for item in tar::PaxExtensions::new(&bytes) {
                        let Ok(item) = item else {
                            return self.stop(Fault::BadHeader, shown(), "PAX header");
                        };
                        match item.key_bytes() {
                            b"path" => long_name = Some(item.value_bytes().to_vec()),
                            b"size" => {
                                let value = item.value().ok().and_then(|v| v.parse().ok());
                                let Some(value) = value else {
                                    return self.stop(Fault::BadHeader, shown(), "PAX size");
                                };
                                pax_size = Some(value);
                            }
                            key if key.starts_with(b"GNU.sparse") => {
                                let detail = "PAX sparse file";
                                return self.stop(Fault::Sparse, shown(), detail);
                            }
                            _ => {}
                        }
                    }
                }
                continue;
            }
            if kind.is_dir() {
                (long_name, pax_size, extensions) = (None, None, 0);
                continue;
            }
            if kind.is_gnu_sparse() {
                // Its map may go on in further blocks: the place is lost.
                return self.stop(Fault::Sparse, shown(), "sparse file");
            }
            if !(kind.is_file() || kind.is_contiguous()) {
                let detail = format!("tar entry type {:?}", kind.as_byte() as char);
                return Some(step_error(Fault::NotAFile, shown(), detail));
            }
            if name.starts_with(b"./") {
                name.drain(..2);
            }
            return Some(match String::from_utf8(name) {
                Ok(name) if !name.is_empty() && name.len() <= MAX_KEY => {
                    Step::Member(Member { name, span })
                }
                Ok(name) => {
                    let shown = name.chars().take(80).collect();
                    step_error(Fault::BadName, shown, format!("a name of {} bytes", name.len()))
                }
                Err(e) => {
                    let shown = String::from_utf8_lossy(e.as_bytes()).chars().take(80).collect();
                    step_error(Fault::BadName, shown, "not UTF-8")
                }
            });
        }
        None
    }
}

/// `a/b.c.json` → (`a/b`, `c.json`): the key ends at the first dot of the last part.
fn split_name(name: &str) -> Option<(&str, &str)> {
    let base = name.rfind('/').map_or(0, |i| i + 1);
    let dot = base + name[base..].find('.')?;
    (dot > base).then(|| (&name[..dot], &name[dot + 1..]))
}

// ---------------------------------------------------------------------------------------------
// Grouping members to samples

/// A sample's place in a shard.
#[derive(Clone, Debug)]
struct Place {
    key: String,
    extension: String,
    picture: Span,
    json: Span,
}

#[derive(Default)]
struct Group {
    key: String,
    picture: Option<(String, Span)>,
    json: Option<Span>,
    dropped: bool,
}

/// Groups neighbouring members of one key, as webdataset does.
struct Places<R> {
    walk: Walk<R>,
    shard: PathBuf,
    group: Group,
    seen: HashSet<String>,
    queue: std::collections::VecDeque<std::result::Result<Place, Bad>>,
    ended: bool,
}

impl<R: Read + Seek> Places<R> {
    fn new(file: R, shard: PathBuf) -> std::io::Result<Self> {
        Ok(Self {
            walk: Walk::new(file)?,
            shard,
            group: Group::default(),
            seen: HashSet::new(),
            queue: std::collections::VecDeque::new(),
            ended: false,
        })
    }

    fn bad(&mut self, key: String, fault: Fault, detail: impl Into<String>) {
        let detail = detail.into();
        self.queue.push_back(Err(Bad { shard: self.shard.clone(), key, fault, detail }));
    }

    fn finish_group(&mut self) {
        let group = std::mem::take(&mut self.group);
        if group.key.is_empty() || group.dropped {
            return;
        }
        match (group.picture, group.json) {
            (Some((extension, picture)), Some(json)) => {
                self.queue.push_back(Ok(Place { key: group.key, extension, picture, json }));
            }
            (Some(_), None) => self.bad(group.key, Fault::MissingJson, "a picture without json"),
            (None, Some(_)) => self.bad(group.key, Fault::MissingPicture, "json without a picture"),
            (None, None) => {}
        }
    }

    fn take(&mut self, member: Member) {
        let Some((key, extension)) = split_name(&member.name) else {
            return self.bad(member.name, Fault::BadName, "no KEY.EXTENSION");
        };
        let extension = extension.to_ascii_lowercase();
        let is_json = extension == "json";
        if !is_json && !PICTURES.contains(&extension.as_str()) {
            let detail = "neither a picture nor json";
            return self.bad(member.name, Fault::Unknown, detail);
        }
        if self.group.key != key {
            self.finish_group();
            let fresh = self.seen.insert(key.to_owned());
            self.group = Group { key: key.to_owned(), dropped: !fresh, ..Group::default() };
            if !fresh {
                self.bad(key.to_owned(), Fault::DuplicateKey, "this key was there before");
            }
        }
        if self.group.dropped {
            return;
        }
        let limit = if is_json { MAX_JSON } else { MAX_PICTURE };
        if member.span.size > limit {
            self.group.dropped = true;
            let detail = format!("{} bytes, the limit is {limit}", member.span.size);
            return self.bad(member.name, Fault::TooBig, detail);
        }
        let again = if is_json { self.group.json.is_some() } else { self.group.picture.is_some() };
        if again {
            let detail = "a second picture or json of one key";
            return self.bad(member.name, Fault::DuplicateKey, detail);
        }
        if is_json {
            self.group.json = Some(member.span);
        } else {
            self.group.picture = Some((extension, member.span));
        }
    }

    fn next_place(&mut self) -> Option<std::result::Result<Place, Bad>> {
        loop {
            if let Some(item) = self.queue.pop_front() {
                return Some(item);
            }
            if self.ended {
                return None;
            }
            match self.walk.step() {
                Some(Step::Member(member)) => self.take(member),
                Some(Step::Skipped { name, fault, detail }) => {
                    // A cut shard: the group at the cut is incomplete because of it, one fault.
                    if self.walk.done && fault == Fault::Truncated {
                        let complete = self.group.picture.is_some() && self.group.json.is_some();
                        self.group.dropped |= !complete;
                    }
                    self.bad(name, fault, detail);
                }
                None => {
                    self.finish_group();
                    self.ended = true;
                }
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Reading

/// Streams the samples of one shard, front to back, with one sample in memory.
pub struct ShardReader {
    places: Places<BufReader<File>>,
}

impl ShardReader {
    /// Opens a shard.
    ///
    /// # Errors
    /// The file can't be opened.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        let places =
            Places::new(BufReader::new(file), path.to_path_buf()).map_err(Error::io(path))?;
        Ok(Self { places })
    }
}

impl Iterator for ShardReader {
    type Item = std::result::Result<Sample, Bad>;

    fn next(&mut self) -> Option<Self::Item> {
        let place = match self.places.next_place()? {
            Ok(place) => place,
            Err(bad) => return Some(Err(bad)),
        };
        let shard = self.places.shard.clone();
        let bad = |fault, detail| Bad { shard, key: place.key.clone(), fault, detail };
        let walk = &mut self.places.walk;
        let read =
            walk.read_at(place.json).and_then(|json| Ok((json, walk.read_at(place.picture)?)));
        let (json, image) = match read {
            Ok(bytes) => bytes,
            Err(e) => return Some(Err(bad(Fault::Unreadable, e.to_string()))),
        };
        Some(match Meta::parse(&json) {
            Ok(meta) => Ok(Sample { key: place.key, extension: place.extension, image, meta }),
            Err(e) => Err(bad(Fault::BadJson, e.to_string())),
        })
    }
}

/// Shards, indexed: sample *i* is read when asked for, and only then.
///
/// The index holds a key and two places per sample; pictures and JSON stay in the shards.
pub struct Dataset {
    files: Vec<(PathBuf, Mutex<File>)>,
    places: Vec<(u32, Place)>,
    tally: Tally,
}

impl Dataset {
    /// Indexes `shards` in the given order. What can't be used is left out and counted in
    /// [`Dataset::tally`]; JSON is parsed here once, so that a broken one never stops training.
    ///
    /// # Errors
    /// A shard can't be opened, or there is not one sample.
    pub fn open(shards: &[PathBuf]) -> Result<Self> {
        let mut tally = Tally::default();
        let (mut files, mut index) = (Vec::new(), Vec::new());
        let mut keys: HashSet<String> = HashSet::new();
        for (n, path) in shards.iter().enumerate() {
            let file = File::open(path).map_err(Error::io(path))?;
            let reader = BufReader::new(file.try_clone().map_err(Error::io(path))?);
            let mut places = Places::new(reader, path.clone()).map_err(Error::io(path))?;
            while let Some(item) = places.next_place() {
                let item = item.and_then(|place| {
                    let bad = |fault, detail: String| Bad {
                        shard: path.clone(),
                        key: place.key.clone(),
                        fault,
                        detail,
                    };
                    let json = places.walk.read_at(place.json);
                    let json = json.map_err(|e| bad(Fault::Unreadable, e.to_string()))?;
                    Meta::parse(&json).map_err(|e| bad(Fault::BadJson, e.to_string()))?;
                    if !keys.insert(place.key.clone()) {
                        return Err(bad(Fault::DuplicateKey, "in an earlier shard".into()));
                    }
                    Ok(place)
                });
                match item {
                    Ok(place) => index.push((n as u32, place)),
                    Err(bad) => tally.add(&bad),
                }
            }
            tally.cut += u64::from(places.walk.cut);
            files.push((path.clone(), Mutex::new(file)));
        }
        tally.good = index.len() as u64;
        if index.is_empty() {
            return Err(Error::Data(format!("no samples in {} shards: {tally}", shards.len())));
        }
        Ok(Self { files, places: index, tally })
    }

    /// All shards `SPLIT-*.tar` of a folder, in the order of their names. `note` is told of samples that can't be used.
    ///
    /// # Errors
    /// The folder can't be read or has no such shard, a shard is cut, or more than 1 % of the samples can't be used; see
    /// also [`Dataset::open`].
    pub fn open_split(folder: &Path, split: &str, note: &mut dyn FnMut(&str)) -> Result<Self> {
        let mut shards = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
            let entry = entry.map_err(Error::io(folder))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(&format!("{split}-")) && name.ends_with(".tar") {
                shards.push(entry.path());
            }
        }
        shards.sort();
        if shards.is_empty() {
            let folder = folder.display();
            return Err(Error::Data(format!("{folder}: no {split}-*.tar")));
        }
        let dataset = Self::open(&shards)?;
        dataset.tally.check(MAX_LOST)?;
        if dataset.tally.bad() > 0 {
            let (folder, tally) = (folder.display(), &dataset.tally);
            note(&format!("warning: {folder}, {split}: not all can be used: {tally}"));
        }
        Ok(dataset)
    }

    /// The number of samples.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Never true: [`Dataset::open`] refuses empty sets.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// What the index pass found.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// The key of sample `i`, e.g. for reports.
    pub fn key(&self, i: usize) -> Option<&str> {
        self.places.get(i).map(|(_, place)| place.key.as_str())
    }

    /// Reads sample `i`.
    ///
    /// # Errors
    /// `i` is out of range, or the shard changed under us; names shard and key.
    pub fn get(&self, i: usize) -> Result<Sample> {
        let (place, json) = self.read(i, |p| p.json)?;
        let (_, image) = self.read(i, |p| p.picture)?;
        let meta = self.parse(i, &json)?;
        let (key, extension) = (place.key.clone(), place.extension.clone());
        Ok(Sample { key, extension, image, meta })
    }

    /// Reads captions and the rest of sample `i`, not its picture.
    ///
    /// # Errors
    /// As [`Dataset::get`].
    pub fn meta(&self, i: usize) -> Result<Meta> {
        let (_, json) = self.read(i, |p| p.json)?;
        self.parse(i, &json)
    }

    fn parse(&self, i: usize, json: &[u8]) -> Result<Meta> {
        let (shard, place) = &self.places[i];
        let path = &self.files[*shard as usize].0;
        Meta::parse(json)
            .map_err(|e| Error::Data(format!("{}: {}: {e}", path.display(), place.key)))
    }

    fn read(&self, i: usize, part: impl Fn(&Place) -> Span) -> Result<(&Place, Vec<u8>)> {
        let (shard, place) = self.places.get(i).ok_or_else(|| {
            Error::Data(format!("sample {i} of {}: out of range", self.places.len()))
        })?;
        let (path, file) = &self.files[*shard as usize];
        let span = part(place);
        let mut bytes = vec![0; span.size as usize];
        let mut file = file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        file.seek(SeekFrom::Start(span.offset)).map_err(Error::io(path))?;
        file.read_exact(&mut bytes).map_err(|e| {
            let path = path.display();
            Error::Data(format!("{path}: {}: the shard changed under us: {e}", place.key))
        })?;
        Ok((place, bytes))
    }

    /// The order of epoch `epoch`: a permutation of all samples that depends on (seed, epoch) only.
    pub fn order(&self, seed: u64, epoch: u64) -> Vec<u32> {
        let mut order: Vec<u32> = (0..self.len() as u32).collect();
        Rng::new(seed, &[epoch, 0x0073_6875_6666_6c65]).shuffle(&mut order);
        order
    }
}

// ---------------------------------------------------------------------------------------------
// Writing

/// A shard that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// `train-00000.tar`…
    pub name: String,
    /// Samples in it.
    pub samples: usize,
    /// Its size in bytes.
    pub bytes: u64,
    /// SHA-256, hexadecimal.
    pub sha256: String,
}

/// Writes `PREFIX-00000.tar`, `PREFIX-00001.tar`…, each whole or not at all.
pub struct ShardWriter {
    folder: PathBuf,
    prefix: String,
    per_shard: usize,
    open: Option<Open>,
    written: Vec<Written>,
    keys: HashSet<String>,
}

struct Open {
    tar: tar::Builder<Hashed<BufWriter<tempfile::NamedTempFile>>>,
    samples: usize,
}

/// Hashes what goes through.
struct Hashed<W> {
    inner: W,
    hash: sha2::Sha256,
    bytes: u64,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        use sha2::Digest as _;
        let n = self.inner.write(buf)?;
        self.hash.update(&buf[..n]);
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}

impl ShardWriter {
    /// Shards of `per_shard` samples in `folder`, which is made if absent.
    ///
    /// # Errors
    /// The folder can't be made.
    pub fn new(folder: &Path, prefix: &str, per_shard: usize) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        Ok(Self {
            folder: folder.to_path_buf(),
            prefix: prefix.to_owned(),
            per_shard: per_shard.max(1),
            open: None,
            written: Vec::new(),
            keys: HashSet::new(),
        })
    }

    /// Appends a sample.
    ///
    /// # Errors
    /// A key that is no plain label or came before; the disk.
    pub fn write(&mut self, sample: &Sample) -> Result<()> {
        let fine = |c: char| c.is_ascii_alphanumeric() || "-_/".contains(c);
        let key = &sample.key;
        if key.is_empty() || key.len() > 90 || !key.chars().all(fine) || key.starts_with('/') {
            return Err(Error::Data(format!("{key:?} can't be a key")));
        }
        if !self.keys.insert(key.clone()) {
            return Err(Error::Data(format!("{key:?}: this key was written before")));
        }
        let json = serde_json::to_vec(&sample.meta)
            .map_err(|e| Error::Data(format!("{key}: json: {e}")))?;
        let folder = self.folder.clone();
        if self.open.is_none() {
            let file = tempfile::Builder::new()
                .prefix(&format!(".{}-", self.prefix))
                .tempfile_in(&folder)
                .map_err(Error::io(&folder))?;
            let inner = BufWriter::with_capacity(1 << 20, file);
            let hashed = Hashed { inner, hash: sha2::Digest::new(), bytes: 0 };
            self.open = Some(Open { tar: tar::Builder::new(hashed), samples: 0 });
        }
        if let Some(open) = self.open.as_mut() {
            append(&mut open.tar, &format!("{key}.{}", sample.extension), &sample.image)
                .and_then(|()| append(&mut open.tar, &format!("{key}.json"), &json))
                .map_err(Error::io(&folder))?;
            open.samples += 1;
            if open.samples >= self.per_shard {
                self.close()?;
            }
        }
        Ok(())
    }

    fn close(&mut self) -> Result<()> {
        let Some(open) = self.open.take() else { return Ok(()) };
        let folder = self.folder.clone();
        let name = format!("{}-{:05}.tar", self.prefix, self.written.len());
        let path = folder.join(&name);
        let hashed = open.tar.into_inner().map_err(Error::io(&path))?;
        let digest = sha2::Digest::finalize(hashed.hash);
        let bytes = hashed.bytes;
        let file = hashed
            .inner
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error)
            .map_err(Error::io(&path))?;
        file.as_file().sync_all().map_err(Error::io(&path))?;
        make_readable(file.as_file()).map_err(Error::io(&path))?;
        file.persist(&path).map_err(|e| e.error).map_err(Error::io(&path))?;
        sync_folder(&folder);
        self.written.push(Written { name, samples: open.samples, bytes, sha256: hex(&digest) });
        Ok(())
    }

    /// Writes the last shard and takes away older shards of this prefix that were not rewritten.
    ///
    /// # Errors
    /// The disk.
    pub fn finish(mut self) -> Result<Vec<Written>> {
        self.close()?;
        for n in self.written.len().. {
            let path = self.folder.join(format!("{}-{n:05}.tar", self.prefix));
            match std::fs::remove_file(&path) {
                Ok(()) => {}
                Err(e) if e.kind() == ErrorKind::NotFound => break,
                Err(e) => return Err(Error::io(&path)(e)),
            }
        }
        Ok(self.written)
    }
}

/// Makes a rename durable; not every file system can, and then nothing is lost but durability.
fn sync_folder(folder: &Path) {
    if let Ok(handle) = File::open(folder) {
        let _ = handle.sync_all();
    }
}

/// Same name and bytes, same tar bytes: no times, no owners.
fn append<W: Write>(tar: &mut tar::Builder<W>, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_path(name)?;
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_cksum();
    tar.append(&header, bytes)
}

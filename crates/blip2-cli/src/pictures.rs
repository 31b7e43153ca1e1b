//! From what was typed to pictures: files, folders, patterns; read in batches, bad ones set aside.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use blip2::image::{self, Pixels, Rgb};
use rayon::prelude::*;

use crate::Outcome;
use crate::cli::{Format, PictureArgs};
use crate::output;

/// What counts as a picture when a folder is searched.
const ENDINGS: [&str; 9] = ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jfif"];

/// The files that `typed` stands for, in the order typed, folders and patterns sorted by name.
pub(crate) fn expand(typed: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in typed {
        let text = path.to_string_lossy();
        if path.is_dir() {
            let before = files.len();
            search(path, &mut files)?;
            if files.len() == before {
                anyhow::bail!(
                    "{}: no pictures in this folder ({})",
                    path.display(),
                    ENDINGS.join(", ")
                );
            }
        } else if !path.exists() && text.contains(['*', '?', '[']) {
            let before = files.len();
            for found in glob::glob(&text).with_context(|| format!("pattern {text}"))? {
                files.push(found?);
            }
            if files.len() == before {
                anyhow::bail!("{text}: no file has such a name");
            }
        } else {
            // A missing file is this picture's own error, later.
            files.push(path.clone());
        }
    }
    Ok(files)
}

/// Follows no link to a folder, so that a loop can't trap it.
fn search(folder: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let read = || folder.display().to_string();
    let mut entries = std::fs::read_dir(folder)
        .with_context(read)?
        .collect::<Result<Vec<_>, _>>()
        .with_context(read)?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        if entry.file_type().with_context(read)?.is_dir() {
            search(&path, files)?;
        } else if has_picture_ending(&path) {
            files.push(path);
        }
    }
    Ok(())
}

fn has_picture_ending(path: &Path) -> bool {
    let ending = path.extension().map(|e| e.to_string_lossy().to_lowercase());
    ending.is_some_and(|e| ENDINGS.contains(&e.as_str()))
}

/// Reads the pictures `typed` batch by batch and hands the good ones to `work`; a bad one is reported and the rest go on.
pub(crate) fn for_each_batch(
    typed: &[PathBuf],
    args: &PictureArgs,
    format: Format,
    mut work: impl FnMut(&[&Path], &[Rgb]) -> anyhow::Result<()>,
) -> anyhow::Result<Outcome> {
    let pixels = if args.hf_pixels { Pixels::Hf } else { Pixels::Default };
    let mut outcome = Outcome::AllFine;
    for batch in expand(typed)?.chunks(args.batch_size.into()) {
        let read: Vec<_> = batch.par_iter().map(|path| image::open(path, pixels)).collect();
        let (mut paths, mut pictures) = (Vec::new(), Vec::new());
        for (path, picture) in batch.iter().zip(read) {
            match picture {
                Ok(picture) => {
                    paths.push(path.as_path());
                    pictures.push(picture);
                }
                Err(err) => {
                    outcome = Outcome::SomeFailed;
                    output::failure(format, path, &err)?;
                }
            }
        }
        if !pictures.is_empty() {
            work(&paths, &pictures)?;
        }
    }
    Ok(outcome)
}

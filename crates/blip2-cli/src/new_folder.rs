//! A folder that appears whole or not at all: it is filled beside its place, then renamed into it.
//!
//! Whatever stops the program before that, an error or Ctrl-C, takes the draft away, so that the same command can be
//! given again.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use tempfile::TempDir;

/// Makes the folder `to`, which must be absent or empty, of what `fill` writes into the folder it is given. What is in the
/// files is `fill`'s to sync. To be called once: a process has one handler of Ctrl-C.
pub(crate) fn write<T>(
    to: &Path,
    fill: impl FnOnce(&Path) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let draft = Draft::new(to)?;
    draft.remove_on_signal()?;
    draft.finish(fill)
}

/// A folder in the making.
struct Draft {
    to: PathBuf,
    parent: PathBuf,
    /// Beside `to`, so that a rename stays within one file system; goes away when dropped.
    temporary: TempDir,
    /// Whoever holds it decides what becomes of the draft: it is put into its place, or taken away.
    turn: Arc<Mutex<()>>,
}

impl Draft {
    fn new(to: &Path) -> anyhow::Result<Self> {
        check_is_new(to)?;
        let named = || to.display().to_string();
        // The rename needs the folder itself, not a link to it or a name like `.`.
        let to = if to.exists() { fs::canonicalize(to).with_context(named)? } else { to.into() };
        let parent = match to.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        fs::create_dir_all(&parent).with_context(|| parent.display().to_string())?;
        let temporary = tempfile::Builder::new().prefix(".blip2-").tempdir_in(&parent);
        let temporary = temporary.with_context(|| parent.display().to_string())?;
        Ok(Self { to, parent, temporary, turn: Arc::default() })
    }

    /// Ctrl-C, or a request to terminate, takes the draft away and ends the program.
    fn remove_on_signal(&self) -> anyhow::Result<()> {
        let (turn, folder) = (self.turn.clone(), self.temporary.path().to_path_buf());
        ctrlc::set_handler(move || {
            let _mine = lock(&turn);
            remove(&folder);
            // Ctrl-C means it; nothing half-written is left.
            std::process::exit(130);
        })?;
        Ok(())
    }

    /// Has the draft filled, and puts it into its place.
    fn finish<T>(self, fill: impl FnOnce(&Path) -> anyhow::Result<T>) -> anyhow::Result<T> {
        // Temporary folders are for their owner alone; this one inside it is as readable as any new folder.
        let folder = self.temporary.path().join("whole");
        fs::create_dir(&folder).with_context(|| folder.display().to_string())?;
        let made = fill(&folder);
        // Where Ctrl-C made `fill` fail, this waits for the handler to end the program.
        let _mine = lock(&self.turn);
        let made = made?;
        sync_folders(&folder);
        let named = || self.to.display().to_string();
        if self.to.is_dir() {
            fs::remove_dir(&self.to).with_context(named)?;
        }
        fs::rename(&folder, &self.to).with_context(named)?;
        sync_folder(&self.parent);
        Ok(made)
    }
}

fn check_is_new(to: &Path) -> anyhow::Result<()> {
    if !to.exists() {
        return Ok(());
    }
    if !to.is_dir() {
        anyhow::bail!("{}: this is a file, not a folder", to.display());
    }
    if to.read_dir().with_context(|| to.display().to_string())?.next().is_some() {
        anyhow::bail!("{}: this folder is not empty", to.display());
    }
    Ok(())
}

/// Takes a folder away while another thread may still be writing into it, which makes single tries fail.
fn remove(folder: &Path) {
    for _ in 0..100 {
        if fs::remove_dir_all(folder).is_ok() || !folder.exists() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Makes the names in `folder` and below it durable.
fn sync_folders(folder: &Path) {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.path().is_dir()) {
        sync_folders(&entry.path());
    }
    sync_folder(folder);
}

/// Not every file system can do this, and then nothing is lost but durability.
fn sync_folder(folder: &Path) {
    if let Ok(handle) = File::open(folder) {
        let _ = handle.sync_all();
    }
}

fn lock(turn: &Mutex<()>) -> MutexGuard<'_, ()> {
    // There is nothing in it that a panic could have left half-done.
    turn.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything below `folder`, sorted.
    fn below(folder: &Path) -> Vec<String> {
        let mut names = Vec::new();
        for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let name = entry.file_name().into_string().unwrap();
            if entry.path().is_dir() {
                let inner = below(&entry.path());
                names.extend(inner.iter().map(|inner| format!("{name}/{inner}")));
            }
            names.push(name);
        }
        names.sort();
        names
    }

    fn fill(folder: &Path) -> anyhow::Result<u32> {
        fs::create_dir(folder.join("deep"))?;
        fs::write(folder.join("deep/file"), "x")?;
        Ok(7)
    }

    #[test]
    fn it_appears_whole_with_nothing_beside_it() {
        let root = tempfile::tempdir().unwrap();
        for to in ["absent", "parents/too", "empty"] {
            fs::create_dir_all(root.path().join("empty")).unwrap();
            let made = Draft::new(&root.path().join(to)).unwrap().finish(fill).unwrap();
            assert_eq!(made, 7);
            assert!(below(root.path()).contains(&format!("{to}/deep/file")));
        }
        assert!(below(root.path()).iter().all(|name| !name.contains(".blip2-")));
    }

    #[test]
    fn an_error_leaves_nothing_and_the_next_try_works() {
        let root = tempfile::tempdir().unwrap();
        let to = root.path().join("new");
        let failing = |folder: &Path| -> anyhow::Result<u32> {
            fill(folder)?;
            anyhow::bail!("the disk is full")
        };
        assert!(Draft::new(&to).unwrap().finish(failing).is_err());
        assert_eq!(below(root.path()), [""; 0]);
        Draft::new(&to).unwrap().finish(fill).unwrap();
        assert_eq!(below(root.path()), ["new", "new/deep", "new/deep/file"]);
    }

    #[test]
    fn what_is_there_is_not_overwritten() {
        let root = tempfile::tempdir().unwrap();
        let to = root.path().join("full");
        fs::create_dir(&to).unwrap();
        fs::write(to.join("file"), "x").unwrap();
        let refused = |to: &Path| Draft::new(to).err().unwrap().to_string();
        assert!(refused(&to).ends_with("full: this folder is not empty"), "{}", refused(&to));
        assert!(refused(&to.join("file")).ends_with("this is a file, not a folder"));
    }
}

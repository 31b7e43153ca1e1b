//! The one error type of the library. Every message names the file, tensor, field or number it is about.

use std::path::{Path, PathBuf};

/// What can go wrong while loading or using a model.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {reason}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        reason: std::io::Error,
    },
    /// A file was read but what it holds is not what it should be.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, with names and numbers.
        reason: String,
    },
    /// A picture that can't be decoded or is beyond the limits.
    #[error("picture: {0}")]
    Image(String),
    /// The weights don't fit the model: missing, unexpected, mis-shaped or non-finite tensors.
    #[error("weights: {0}")]
    Weights(String),
    /// Text that can't be turned into token ids, or a broken vocabulary.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// An argument or a configuration field out of range.
    #[error("{0}")]
    Config(String),
    /// A part of a model could not be fetched.
    #[error("fetching the {part}: {reason}")]
    Fetch {
        /// What was to be fetched, with package and version.
        part: String,
        /// Why it failed and what can be done.
        reason: String,
    },
    /// A tensor operation failed: a mismatch of shapes or types.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// The library's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An [`Error::Io`] about `path`; made for `map_err`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |reason| Self::Io { path, reason }
    }

    /// An [`Error::File`] about `path`.
    pub fn file(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Self::File { path: path.as_ref().to_path_buf(), reason: reason.into() }
    }
}

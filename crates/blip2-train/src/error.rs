//! The error type of data, training and evaluation.

use std::path::{Path, PathBuf};

/// What can go wrong while making or measuring a model.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The library's own error: models, pictures, weights.
    #[error(transparent)]
    Model(#[from] blip2::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// A file could not be read or written.
    #[error("{}: {reason}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        reason: std::io::Error,
    },
    /// A recipe that does not make sense; names the field.
    #[error("recipe: {0}")]
    Recipe(String),
    /// Training data that can't be used; names the file and the sample.
    #[error("data: {0}")]
    Data(String),
    /// A training checkpoint that can't be used.
    #[error("checkpoint: {0}")]
    Checkpoint(String),
    /// Training had to stop.
    #[error("training: {0}")]
    Training(String),
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An [`Error::Io`] about `path`; made for `map_err`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |reason| Self::Io { path, reason }
    }
}

//! A trained bridge made small: GGUF with matrices and embeddings in a few bits, vectors untouched.
//!
//! Every reader of a model folder unpacks it again ([`crate::params::read_weights`]); what is lost is the rounding.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;

use candle_core::Tensor;
use candle_core::quantized::{GgmlDType, QTensor, gguf_file};

use crate::model::{Files, MANIFEST, Manifest, Model};
use crate::stored::Stored;
use crate::{Error, Result};

/// In how many bits a packed bridge is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bits {
    /// 16-bit floating point.
    F16,
    /// 8.5 bits a weight.
    Q8,
    /// 5.5 bits a weight.
    Q5,
    /// 4.5 bits a weight.
    Q4,
}

impl Bits {
    fn dtype(self) -> GgmlDType {
        match self {
            Self::F16 => GgmlDType::F16,
            Self::Q8 => GgmlDType::Q8_0,
            Self::Q5 => GgmlDType::Q5_0,
            Self::Q4 => GgmlDType::Q4_0,
        }
    }
}

/// What a packed bridge is kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    /// Matrices.
    pub matrices: Bits,
    /// Word and position embeddings.
    pub embeddings: Bits,
}

/// Writes `model` into the folder `to`, its bridge packed. Frozen parts in files of its own are copied as they are.
/// Returns the bytes of the packed weights.
///
/// # Errors
/// If a file can't be read or written.
pub fn pack(model: &Model, packing: Packing, to: &Path) -> Result<u64> {
    if let Files::HuggingFace(checkpoint) = model.files() {
        let reason = "is in Hugging Face layout; so far only our own model folders can be packed";
        return Err(Error::file(checkpoint.folder(), reason));
    }
    std::fs::create_dir_all(to).map_err(Error::io(to))?;
    let mut manifest: Manifest = model.manifest.clone();
    let mut bytes = 0;
    if let Some(part) = &mut manifest.stage1 {
        bytes += write(&model.weights(&part.weights)?, packing, &to.join("stage1.gguf"))?;
        part.weights = "stage1.gguf".into();
        copy(model.files(), &part.vocab, to)?;
    }
    if let Some(part) = &mut manifest.stage2 {
        bytes += write(&model.weights(&part.weights)?, packing, &to.join("stage2.gguf"))?;
        part.weights = "stage2.gguf".into();
        if let Some(vocab) = &part.vocab {
            copy(model.files(), vocab, to)?;
        }
    }
    for name in model.frozen_files() {
        copy(model.files(), &name, to)?;
    }
    let path = to.join(MANIFEST);
    let json =
        serde_json::to_vec_pretty(&manifest).map_err(|err| Error::file(&path, err.to_string()))?;
    atomically(&path, |file| file.write_all(&json))?;
    Ok(bytes)
}

fn write(tensors: &BTreeMap<String, Stored>, packing: Packing, path: &Path) -> Result<u64> {
    let packed = tensors
        .iter()
        .map(|(name, stored)| {
            let tensor = stored.load()?;
            // GGUF has no scalars; the reader turns the temperature back into one.
            let tensor = if tensor.rank() == 0 { tensor.reshape(1)? } else { tensor };
            Ok((name.as_str(), QTensor::quantize(&tensor, dtype(name, &tensor, packing))?))
        })
        .collect::<Result<Vec<_>>>()?;
    let list: Vec<(&str, &QTensor)> = packed.iter().map(|(name, tensor)| (*name, tensor)).collect();
    atomically(path, |file| gguf_file::write(file, &[], &list).map_err(std::io::Error::other))?;
    Ok(std::fs::metadata(path).map_err(Error::io(path))?.len())
}

fn dtype(name: &str, tensor: &Tensor, packing: Packing) -> GgmlDType {
    let wanted =
        if name.contains("_embeddings.") { packing.embeddings } else { packing.matrices }.dtype();
    let rows_fit =
        tensor.dims().last().is_some_and(|last| last.is_multiple_of(wanted.block_size()));
    match tensor.dims().len() {
        2 if rows_fit => wanted,
        2 => GgmlDType::F16,
        _ => GgmlDType::F32,
    }
}

fn copy(files: &Files, name: &str, to: &Path) -> Result<()> {
    let bytes = files.read(name)?;
    let path = to.join(name);
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    }
    atomically(&path, |file| file.write_all(&bytes))
}

/// A file that is there whole or not at all, and that everybody who may see the folder may read.
fn atomically(
    path: &Path,
    fill: impl FnOnce(&mut std::fs::File) -> std::io::Result<()>,
) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut temporary = tempfile::NamedTempFile::new_in(folder).map_err(Error::io(folder))?;
    fill(temporary.as_file_mut()).map_err(Error::io(path))?;
    temporary.as_file().sync_all().map_err(Error::io(path))?;
    make_readable(temporary.as_file()).map_err(Error::io(path))?;
    temporary.persist(path).map_err(|err| Error::io(path)(err.error))?;
    Ok(())
}

/// Lets everybody read a file that began as a temporary one, which is made for its owner alone (0600): results are for
/// all who may see their folder.
///
/// # Errors
/// If the file system refuses.
#[cfg(unix)]
pub fn make_readable(file: &std::fs::File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    file.set_permissions(std::fs::Permissions::from_mode(0o644))
}

/// Elsewhere than on Unix a temporary file can be read by others as it is.
///
/// # Errors
/// Never.
#[cfg(not(unix))]
pub fn make_readable(_: &std::fs::File) -> std::io::Result<()> {
    Ok(())
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn packed_files_can_be_read_by_others() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stage2.gguf");
        atomically(&path, |file| file.set_len(3)).unwrap();
        let found = std::fs::metadata(&path).unwrap();
        assert_eq!((found.permissions().mode() & 0o777, found.len()), (0o644, 3));
    }
}

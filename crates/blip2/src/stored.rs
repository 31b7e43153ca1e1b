//! Tensors that stay in their file until they are asked for.
//!
//! A checkpoint of several gigabytes is mapped, not read: a model takes one tensor after the other, converts it to the
//! format it keeps, and lets it go. Headers are checked before anything else: sizes, overlaps and ends of the file.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, Metadata};
use serde::Deserialize;

use crate::{Error, Result};

/// A tensor of a checkpoint, in memory or still in its file.
#[derive(Debug, Clone)]
pub struct Stored {
    place: Place,
    /// First and number of rows taken of the leading dimension.
    rows: Option<(usize, usize)>,
    /// Another shape for the same elements.
    shape: Option<Vec<usize>>,
}

#[derive(Debug, Clone)]
enum Place {
    Memory(Tensor),
    File(Arc<Shard>, String),
}

/// One mapped safetensors file.
struct Shard {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    /// Where the tensors' bytes begin.
    start: usize,
}

impl std::fmt::Debug for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shard({})", self.path.display())
    }
}

impl From<Tensor> for Stored {
    fn from(tensor: Tensor) -> Self {
        Self { place: Place::Memory(tensor), rows: None, shape: None }
    }
}

impl Stored {
    /// The shape it has when loaded.
    #[must_use]
    pub fn dims(&self) -> Vec<usize> {
        if let Some(shape) = &self.shape {
            return shape.clone();
        }
        let mut dims = self.whole();
        if let (Some((_, rows)), Some(first)) = (self.rows, dims.first_mut()) {
            *first = rows;
        }
        dims
    }

    fn whole(&self) -> Vec<usize> {
        match &self.place {
            Place::Memory(tensor) => tensor.dims().to_vec(),
            Place::File(shard, name) => {
                shard.metadata.info(name).map_or_else(Vec::new, |info| info.shape.clone())
            }
        }
    }

    /// Rows `first..first + rows` of the leading dimension. To be called before [`Self::reshaped`].
    #[must_use]
    pub fn rows(&self, first: usize, rows: usize) -> Self {
        Self { rows: Some((first, rows)), ..self.clone() }
    }

    /// The same elements in another shape.
    #[must_use]
    pub fn reshaped(&self, shape: &[usize]) -> Self {
        Self { shape: Some(shape.to_vec()), ..self.clone() }
    }

    /// Reads it, in the type it is stored in.
    ///
    /// # Errors
    /// A type that is not f32, f16 or bf16, or rows or a shape that the tensor does not have.
    pub fn load(&self) -> Result<Tensor> {
        let tensor = match &self.place {
            Place::Memory(tensor) => match self.rows {
                Some((first, rows)) => tensor.narrow(0, first, rows)?,
                None => tensor.clone(),
            },
            Place::File(shard, name) => shard.read(name, self.rows)?,
        };
        Ok(match &self.shape {
            Some(shape) => tensor.reshape(shape.as_slice())?,
            None => tensor,
        })
    }
}

impl Shard {
    fn open(path: &Path) -> Result<Arc<Self>> {
        let file = File::open(path).map_err(Error::io(path))?;
        #[expect(unsafe_code, reason = "a checkpoint larger than memory can only be mapped")]
        // SAFETY: the file is only read. Whoever cuts it while a model is loading ends the program, as with any mapped file.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        let broken = |reason: String| {
            Error::file(path, format!("not a readable safetensors file: {reason}"))
        };
        let (header, metadata) =
            SafeTensors::read_metadata(&map).map_err(|err| broken(err.to_string()))?;
        Ok(Arc::new(Self { path: path.to_path_buf(), start: header + 8, map, metadata }))
    }

    fn read(&self, name: &str, rows: Option<(usize, usize)>) -> Result<Tensor> {
        let bad = |reason: String| Error::file(&self.path, format!("tensor {name}: {reason}"));
        let info = self.metadata.info(name).ok_or_else(|| bad("is not there".into()))?;
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => return Err(bad(format!("is {other:?}; only F32, F16 and BF16 are weights"))),
        };
        // The header was checked: the bytes are there, as many as the shape says.
        let bytes = &self.map[self.start + info.data_offsets.0..self.start + info.data_offsets.1];
        let Some((first, count)) = rows else {
            return Ok(Tensor::from_raw_buffer(bytes, dtype, &info.shape, &Device::Cpu)?);
        };
        let all = info.shape.first().copied().unwrap_or(0);
        if first + count > all {
            return Err(bad(format!("has {all} rows, not {}", first + count)));
        }
        let row = bytes.len().checked_div(all).unwrap_or(0);
        let mut shape = info.shape.clone();
        shape[0] = count;
        let bytes = &bytes[first * row..(first + count) * row];
        Ok(Tensor::from_raw_buffer(bytes, dtype, &shape, &Device::Cpu)?)
    }
}

/// Every tensor of a folder in Hugging Face layout: `model.safetensors`, or the shards that
/// `model.safetensors.index.json` lists.
///
/// # Errors
/// Neither file is there, a shard is missing or broken, or the index names a tensor that its shard does not have.
pub fn open_folder(folder: &Path) -> Result<BTreeMap<String, Stored>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let single = folder.join("model.safetensors");
    let index_path = folder.join("model.safetensors.index.json");
    if single.is_file() {
        return open_file(&single);
    }
    let text = std::fs::read(&index_path).map_err(|_| {
        Error::file(folder, "has neither model.safetensors nor model.safetensors.index.json")
    })?;
    let index: Index =
        serde_json::from_slice(&text).map_err(|err| Error::file(&index_path, err.to_string()))?;
    let files: BTreeSet<&String> = index.weight_map.values().collect();
    let mut tensors = BTreeMap::new();
    for file in files {
        let plain = Path::new(file).file_name().is_some_and(|name| name == file.as_str());
        if !plain {
            return Err(Error::file(&index_path, format!("{file:?} is not the name of a shard")));
        }
        tensors.extend(open_file(&folder.join(file))?);
    }
    if let Some((name, file)) =
        index.weight_map.iter().find(|(name, _)| !tensors.contains_key(*name))
    {
        return Err(Error::file(&index_path, format!("tensor {name} is not in {file}")));
    }
    Ok(tensors)
}

/// Every tensor of one safetensors file.
///
/// # Errors
/// If the file can't be read or its header is broken.
pub fn open_file(path: &Path) -> Result<BTreeMap<String, Stored>> {
    let shard = Shard::open(path)?;
    let stored = |name: String| {
        let place = Place::File(shard.clone(), name.clone());
        (name, Stored { place, rows: None, shape: None })
    };
    Ok(shard.metadata.offset_keys().into_iter().map(stored).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, tensors: &[(&str, Tensor)]) {
        let map: std::collections::HashMap<String, Tensor> =
            tensors.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())).collect();
        candle_core::safetensors::save(&map, path).unwrap();
    }

    fn numbers(tensor: &Tensor) -> Vec<f32> {
        tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn rows_and_shapes_are_those_of_the_tensor_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let tensor = Tensor::arange(0f32, 24.0, &Device::Cpu).unwrap().reshape((6, 4)).unwrap();
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let tensor = tensor.to_dtype(dtype).unwrap();
            write(&dir.path().join("model.safetensors"), &[("x", tensor.clone())]);
            let mapped = open_folder(dir.path()).unwrap().remove("x").unwrap();
            for stored in [mapped, Stored::from(tensor)] {
                assert_eq!(stored.dims(), [6, 4]);
                let part = stored.rows(2, 3);
                assert_eq!(part.dims(), [3, 4]);
                let loaded = part.load().unwrap();
                assert_eq!((loaded.dims(), loaded.dtype()), (&[3, 4][..], dtype));
                assert_eq!(numbers(&loaded), (8..20).map(|i| i as f32).collect::<Vec<_>>());
                let flat = part.reshaped(&[2, 6]);
                assert_eq!(flat.dims(), [2, 6]);
                assert_eq!(numbers(&flat.load().unwrap()), numbers(&loaded));
                assert!(stored.rows(4, 3).load().is_err());
            }
        }
    }

    #[test]
    fn shards_are_joined_and_what_is_wrong_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let error = || open_folder(dir.path()).unwrap_err().to_string();
        assert!(error().contains("neither model.safetensors"));
        let one = Tensor::ones(2, DType::F32, &Device::Cpu).unwrap();
        write(&path("a.safetensors"), &[("a", one.clone())]);
        let index = |b: &str| {
            let json = format!(r#"{{"weight_map": {{"a": "a.safetensors", "b": "{b}"}}}}"#);
            std::fs::write(path("model.safetensors.index.json"), json).unwrap();
        };
        index("b.safetensors");
        assert!(error().contains("b.safetensors"), "{}", error());
        write(&path("b.safetensors"), &[("c", one.clone())]);
        assert!(error().contains("tensor b is not in b.safetensors"), "{}", error());
        index("../b.safetensors");
        assert!(error().contains("not the name of a shard"), "{}", error());
        index("b.safetensors");
        write(&path("b.safetensors"), &[("b", one)]);
        assert_eq!(open_folder(dir.path()).unwrap().into_keys().collect::<Vec<_>>(), ["a", "b"]);
        let bytes = std::fs::read(path("b.safetensors")).unwrap();
        std::fs::write(path("b.safetensors"), &bytes[..bytes.len() - 1]).unwrap();
        assert!(error().contains("not a readable safetensors file"), "{}", error());
    }
}

//! The weights of a folder in Hugging Face layout, in one file or in several.
//!
//! ```text
//! model.safetensors, or model.safetensors.index.json and its shards
//! pytorch_model.bin, or pytorch_model.bin.index.json and its shards: where there are no safetensors
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;

use crate::stored::{self, Stored};
use crate::{Error, Result, pth};

/// What a folder's weights may be called, the better ones first.
pub(crate) const NAMES: [&str; 2] = ["model.safetensors", "pytorch_model.bin"];

/// Every tensor of `folder`.
///
/// # Errors
/// It has no weights, a shard is missing or broken, or the index names a tensor that its shard does not have.
pub fn open(folder: &Path) -> Result<BTreeMap<String, Stored>> {
    for name in NAMES {
        let (single, index) = (folder.join(name), folder.join(format!("{name}.index.json")));
        if single.is_file() {
            return open_file(&single);
        }
        if index.is_file() {
            return open_shards(folder, &index);
        }
    }
    Err(Error::file(folder, "has neither model.safetensors nor model.safetensors.index.json"))
}

/// Every tensor of one file: safetensors, or PyTorch's.
///
/// # Errors
/// If the file can't be read or is broken.
pub fn open_file(path: &Path) -> Result<BTreeMap<String, Stored>> {
    let is_torch = path
        .extension()
        .is_some_and(|ext| ["bin", "pth", "pt"].iter().any(|e| ext.eq_ignore_ascii_case(e)));
    if is_torch { pth::open(path) } else { stored::open_file(path) }
}

/// In which file an index says that each tensor is.
pub(crate) fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read(path).map_err(Error::io(path))?;
    let index: Index =
        serde_json::from_slice(&text).map_err(|err| Error::file(path, err.to_string()))?;
    Ok(index.weight_map)
}

fn open_shards(folder: &Path, index_path: &Path) -> Result<BTreeMap<String, Stored>> {
    let weight_map = read_index(index_path)?;
    let files: BTreeSet<&String> = weight_map.values().collect();
    let mut tensors = BTreeMap::new();
    for file in files {
        let plain = Path::new(file).file_name().is_some_and(|name| name == file.as_str());
        if !plain {
            return Err(Error::file(index_path, format!("{file:?} is not the name of a shard")));
        }
        tensors.extend(open_file(&folder.join(file))?);
    }
    if let Some((name, file)) = weight_map.iter().find(|(name, _)| !tensors.contains_key(*name)) {
        return Err(Error::file(index_path, format!("tensor {name} is not in {file}")));
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::*;

    fn write(path: &Path, tensors: &[(&str, Tensor)]) {
        let map: std::collections::HashMap<String, Tensor> =
            tensors.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())).collect();
        candle_core::safetensors::save(&map, path).unwrap();
    }

    #[test]
    fn shards_are_joined_and_what_is_wrong_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let error = || open(dir.path()).unwrap_err().to_string();
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
        assert_eq!(open(dir.path()).unwrap().into_keys().collect::<Vec<_>>(), ["a", "b"]);
        let bytes = std::fs::read(path("b.safetensors")).unwrap();
        std::fs::write(path("b.safetensors"), &bytes[..bytes.len() - 1]).unwrap();
        assert!(error().contains("not a readable safetensors file"), "{}", error());
    }
}

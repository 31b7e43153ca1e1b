//! Safetensors written tensor by tensor: a model larger than memory goes from one file to another.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufWriter, Write};
use std::path::Path;

use candle_core::{DType, Storage, Tensor};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde_json::json;

use crate::stored::Stored;
use crate::{Error, Result};

/// Largest shard, in bytes, as other programs write them.
pub(crate) const SHARD: usize = 5_000_000_000;

/// A tensor to be written, made when its turn comes.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    /// As it is.
    Plain(Stored),
    /// One below the other.
    Rows(Vec<Stored>),
    /// Each row (or element) times its factor.
    Scaled(Stored, Stored),
}

impl From<Stored> for Source {
    fn from(stored: Stored) -> Self {
        Self::Plain(stored)
    }
}

impl Source {
    fn dims(&self) -> Vec<usize> {
        match self {
            Self::Plain(stored) | Self::Scaled(stored, _) => stored.dims(),
            Self::Rows(parts) => {
                let mut dims = parts.first().map(Stored::dims).unwrap_or_default();
                let rows = parts.iter().map(|part| part.dims().first().copied().unwrap_or(0)).sum();
                if let Some(first) = dims.first_mut() {
                    *first = rows;
                }
                dims
            }
        }
    }

    fn dtype(&self) -> DType {
        let stored = match self {
            Self::Plain(stored) => Some(stored),
            // A product is kept as exactly as can be.
            Self::Scaled(..) => None,
            Self::Rows(parts) => parts.first(),
        };
        stored.and_then(Stored::dtype).unwrap_or(DType::F32)
    }

    fn load(&self, dtype: DType) -> Result<Tensor> {
        let tensor = match self {
            Self::Plain(stored) => stored.load()?,
            Self::Rows(parts) => {
                let parts = parts.iter().map(|part| Ok(part.load()?.to_dtype(dtype)?));
                Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?
            }
            Self::Scaled(stored, factors) => {
                let (tensor, factors) =
                    (stored.load()?.to_dtype(DType::F32)?, factors.load()?.to_dtype(DType::F32)?);
                let column = if tensor.rank() == 2 { factors.unsqueeze(1)? } else { factors };
                tensor.broadcast_mul(&column)?
            }
        };
        Ok(tensor.to_dtype(dtype)?.contiguous()?)
    }
}

/// Writes `tensors` into `folder` as `model.safetensors`, or as shards of at most `shard` bytes with their index; in `dtype`,
/// or each as it is. Returns the bytes of the weights.
///
/// # Errors
/// If a tensor can't be read, is not finite, or a file can't be written.
pub(crate) fn write(
    tensors: &BTreeMap<String, Source>,
    dtype: Option<DType>,
    shard: usize,
    folder: &Path,
) -> Result<u64> {
    let size = |source: &Source| {
        let dtype = dtype.unwrap_or_else(|| source.dtype());
        (dtype, source.dims().iter().product::<usize>() * dtype.size_in_bytes())
    };
    let mut shards: Vec<Vec<(&str, &Source, DType, usize)>> = vec![Vec::new()];
    let mut filled = 0;
    for (name, source) in tensors {
        let (dtype, bytes) = size(source);
        if filled > 0 && filled + bytes > shard {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(last) = shards.last_mut() {
            last.push((name, source, dtype, bytes));
        }
    }
    let (count, mut total) = (shards.len(), 0);
    let mut map = BTreeMap::new();
    for (i, shard) in shards.iter().enumerate() {
        let name = match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        write_shard(shard, &folder.join(&name))?;
        total += shard.iter().map(|tensor| tensor.3 as u64).sum::<u64>();
        map.extend(shard.iter().map(|(tensor, ..)| (*tensor, name.clone())));
    }
    if count > 1 {
        let path = folder.join("model.safetensors.index.json");
        let index = json!({"metadata": {"total_size": total}, "weight_map": map});
        std::fs::write(&path, format!("{index:#}\n")).map_err(Error::io(&path))?;
    }
    Ok(total)
}

fn write_shard(tensors: &[(&str, &Source, DType, usize)], path: &Path) -> Result<()> {
    let mut end = 0;
    let infos = tensors.iter().map(|(name, source, dtype, bytes)| {
        let start = end;
        end += bytes;
        let info = TensorInfo {
            dtype: match dtype {
                DType::F16 => Dtype::F16,
                DType::BF16 => Dtype::BF16,
                _ => Dtype::F32,
            },
            shape: source.dims(),
            data_offsets: (start, end),
        };
        ((*name).to_owned(), info)
    });
    // transformers refuses files that don't say so.
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let broken = |reason: String| Error::file(path, reason);
    let metadata =
        Metadata::new(Some(format), infos.collect()).map_err(|e| broken(e.to_string()))?;
    let mut header = serde_json::to_vec(&metadata).map_err(|e| broken(e.to_string()))?;
    header.resize(header.len().next_multiple_of(8), b' ');

    let file = std::fs::File::create(path).map_err(Error::io(path))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(&(header.len() as u64).to_le_bytes()).map_err(Error::io(path))?;
    out.write_all(&header).map_err(Error::io(path))?;
    for (name, source, dtype, _) in tensors {
        let tensor = source.load(*dtype)?;
        if !blip2_ops::is_finite(&tensor)? {
            return Err(Error::Weights(format!("{name} holds NaN or infinity")));
        }
        out.write_all(&bytes(&tensor)?).map_err(Error::io(path))?;
    }
    let file = out.into_inner().map_err(|err| Error::io(path)(err.into_error()))?;
    file.sync_all().map_err(Error::io(path))
}

fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(cpu) = &*storage else {
        return Err(Error::Config("weights to be written are not in main memory".into()));
    };
    let (start, len) = (layout.start_offset(), tensor.elem_count());
    Ok(match tensor.dtype() {
        DType::F16 => {
            let values = &cpu.as_slice::<half::f16>()?[start..start + len];
            values.iter().flat_map(|x| x.to_le_bytes()).collect()
        }
        DType::BF16 => {
            let values = &cpu.as_slice::<half::bf16>()?[start..start + len];
            values.iter().flat_map(|x| x.to_le_bytes()).collect()
        }
        _ => {
            let values = &cpu.as_slice::<f32>()?[start..start + len];
            values.iter().flat_map(|x| x.to_le_bytes()).collect()
        }
    })
}

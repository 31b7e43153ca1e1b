//! Tensors that stay in their file until they are asked for.
//!
//! A checkpoint of several gigabytes is mapped, not read: a model takes one tensor after the other, converts it to the
//! format it keeps, and lets it go. Headers are checked before anything else: sizes, overlaps and ends of the file.
//! Files of PyTorch are opened by [`crate::pth`], which finds out where their tensors lie.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;

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
    File(Arc<Extent>),
}

/// A file in memory as far as it is looked at.
pub(crate) struct Mapped {
    pub(crate) path: PathBuf,
    pub(crate) bytes: Mmap,
}

/// Where one tensor lies in a mapped file, row-major and whole.
#[derive(Debug)]
pub(crate) struct Extent {
    pub(crate) file: Arc<Mapped>,
    pub(crate) name: String,
    /// The element type, or what the file calls one that is no weight's.
    pub(crate) dtype: std::result::Result<DType, String>,
    pub(crate) shape: Vec<usize>,
    /// First byte; with the shape's bytes behind it this is inside the file, whoever makes an extent checks it.
    pub(crate) start: usize,
    pub(crate) len: usize,
}

impl std::fmt::Debug for Mapped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mapped({})", self.path.display())
    }
}

impl From<Tensor> for Stored {
    fn from(tensor: Tensor) -> Self {
        Self { place: Place::Memory(tensor), rows: None, shape: None }
    }
}

impl From<Extent> for Stored {
    fn from(extent: Extent) -> Self {
        Self { place: Place::File(Arc::new(extent)), rows: None, shape: None }
    }
}

impl Stored {
    /// The shape it has when loaded.
    #[must_use]
    pub fn dims(&self) -> Vec<usize> {
        if let Some(shape) = &self.shape {
            return shape.clone();
        }
        let mut dims = match &self.place {
            Place::Memory(tensor) => tensor.dims().to_vec(),
            Place::File(extent) => extent.shape.clone(),
        };
        if let (Some((_, rows)), Some(first)) = (self.rows, dims.first_mut()) {
            *first = rows;
        }
        dims
    }

    /// Its element type, if that is one of weights.
    #[must_use]
    pub fn dtype(&self) -> Option<DType> {
        match &self.place {
            Place::Memory(tensor) => Some(tensor.dtype()),
            Place::File(extent) => extent.dtype.as_ref().ok().copied(),
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

    fn wrong(&self, reason: &str) -> Error {
        match &self.place {
            Place::Memory(_) => Error::Weights(reason.into()),
            Place::File(extent) => extent.wrong(reason),
        }
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
            Place::File(extent) => extent.read(self.rows)?,
        };
        let Some(shape) = &self.shape else { return Ok(tensor) };
        let wanted = shape.iter().try_fold(1usize, |count, n| count.checked_mul(*n));
        if wanted != Some(tensor.elem_count()) {
            let reason = format!("its shape {:?} is not one of {shape:?}", tensor.dims());
            return Err(self.wrong(&reason));
        }
        Ok(tensor.reshape(shape.as_slice())?)
    }
}

impl Mapped {
    pub(crate) fn open(path: &Path) -> Result<Arc<Self>> {
        let file = File::open(path).map_err(Error::io(path))?;
        #[expect(unsafe_code, reason = "a checkpoint larger than memory can only be mapped")]
        // SAFETY: the file is only read. Whoever cuts it while a model is loading ends the program, as with any mapped file.
        let bytes = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        Ok(Arc::new(Self { path: path.to_path_buf(), bytes }))
    }

    /// Gives the memory of bytes that were copied back: whoever loads a large model would else hold it twice. They are read
    /// from the file again if anybody looks.
    fn forget(&self, start: usize, len: usize) {
        #[cfg(unix)]
        #[expect(
            unsafe_code,
            reason = "advice on a mapping is unsafe where it is private and written to"
        )]
        // SAFETY: the mapping is of a file and never written to, so every byte can be read again.
        let _ = unsafe {
            self.bytes.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, len)
        };
        #[cfg(not(unix))]
        let _ = (start, len);
    }
}

impl Extent {
    fn wrong(&self, reason: &str) -> Error {
        Error::file(&self.file.path, format!("tensor {}: {reason}", self.name))
    }

    fn read(&self, rows: Option<(usize, usize)>) -> Result<Tensor> {
        let dtype = match &self.dtype {
            Ok(dtype) => *dtype,
            Err(other) => {
                return Err(self.wrong(&format!("is {other}; only F32, F16 and BF16 are weights")));
            }
        };
        let bytes = &self.file.bytes[self.start..self.start + self.len];
        let Some((first, count)) = rows else {
            let tensor = Tensor::from_raw_buffer(bytes, dtype, &self.shape, &Device::Cpu)?;
            self.file.forget(self.start, self.len);
            return Ok(tensor);
        };
        let all = self.shape.first().copied().unwrap_or(0);
        let wanted = first.saturating_add(count);
        if wanted > all {
            return Err(self.wrong(&format!("has {all} rows, not {wanted}")));
        }
        let row = bytes.len().checked_div(all).unwrap_or(0);
        let mut shape = self.shape.clone();
        if let Some(rows) = shape.first_mut() {
            *rows = count;
        }
        let bytes = &bytes[first * row..(first + count) * row];
        let tensor = Tensor::from_raw_buffer(bytes, dtype, &shape, &Device::Cpu)?;
        self.file.forget(self.start + first * row, bytes.len());
        Ok(tensor)
    }
}

/// Every tensor of one safetensors file.
///
/// # Errors
/// If the file can't be read or its header is broken.
pub fn open_file(path: &Path) -> Result<BTreeMap<String, Stored>> {
    let file = Mapped::open(path)?;
    let unreadable =
        |reason: String| Error::file(path, format!("not a readable safetensors file: {reason}"));
    check_header(&file.bytes).map_err(unreadable)?;
    let (header, metadata) =
        SafeTensors::read_metadata(&file.bytes).map_err(|err| unreadable(err.to_string()))?;
    // The header was checked: the bytes are there, as many as the shapes say.
    let extent = |name: String, info: &safetensors::tensor::TensorInfo| Extent {
        file: file.clone(),
        name,
        dtype: match info.dtype {
            Dtype::F32 => Ok(DType::F32),
            Dtype::F16 => Ok(DType::F16),
            Dtype::BF16 => Ok(DType::BF16),
            other => Err(format!("{other:?}")),
        },
        shape: info.shape.clone(),
        start: header + 8 + info.data_offsets.0,
        len: info.data_offsets.1 - info.data_offsets.0,
    };
    Ok(metadata
        .tensors()
        .into_iter()
        .map(|(name, info)| (name.clone(), extent(name, info).into()))
        .collect())
}

/// Refuses what the readers of safetensors would add and multiply until it overflows: offsets behind the file, and shapes
/// that are too large even without their zeros.
pub(crate) fn check_header(bytes: &[u8]) -> std::result::Result<(), String> {
    #[derive(serde::Deserialize)]
    struct Entry {
        shape: Option<Vec<u64>>,
        data_offsets: Option<(u64, u64)>,
    }
    let Some((len, rest)) = bytes.split_first_chunk::<8>() else {
        return Err("it is shorter than the length of a header".into());
    };
    let len = u64::from_le_bytes(*len);
    let header = usize::try_from(len).ok().and_then(|len| rest.get(..len));
    let header = header.ok_or_else(|| {
        format!("a header of {len} bytes in a file of {} bytes behind its length", rest.len())
    })?;
    let entries: BTreeMap<String, Entry> =
        serde_json::from_slice(header).map_err(|err| format!("its header: {err}"))?;
    let left = (rest.len() - header.len()) as u64;
    for (name, Entry { shape, data_offsets }) in entries {
        if let Some((start, end)) = data_offsets
            && (start > end || end > left)
        {
            return Err(format!(
                "tensor {name} is at {start}..{end} of the {left} bytes that there are"
            ));
        }
        if !is_countable(shape.iter().flatten().copied()) {
            return Err(format!("tensor {name} has a shape too large to count"));
        }
    }
    Ok(())
}

/// Whether the product of `dims` fits a number, zeros counted as ones: strides are made of the dimensions behind a zero, too.
pub(crate) fn is_countable(dims: impl IntoIterator<Item = u64>) -> bool {
    dims.into_iter().try_fold(1u64, |count, n| count.checked_mul(n.max(1))).is_some()
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
            let mapped =
                open_file(&dir.path().join("model.safetensors")).unwrap().remove("x").unwrap();
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
}

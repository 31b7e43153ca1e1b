//! Files of PyTorch's `torch.save`, read without running anything (`pickle.rs`).
//!
//! ```text
//! since 1.6   a zip: NAME/data.pkl says what there is, NAME/data/KEY are the elements, not compressed
//! before      pickles one after the other (magic, version, system, what there is, keys), then each storage: count, elements
//! ```
//!
//! Elements stay in the file until they are asked for, as those of safetensors do ([`crate::stored`]).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::pickle::{Id, Node, Pickle};
use crate::stored::{Extent, Mapped, Stored, is_countable};
use crate::{Error, Result};

/// Globals that a file of weights may name.
const ALLOWED: [&str; 6] = [
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.Size",
    "torch.device",
    "builtins.set",
];
/// What a file from before version 1.6 begins with, as a number.
const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
/// Under which names a training checkpoint keeps its weights.
const WEIGHTS: [&str; 2] = ["model", "state_dict"];

/// Most dimensions of a tensor; a convolution's kernel has four.
const MOST_DIMS: usize = 8;

/// Where the elements of a storage lie.
#[derive(Debug, Clone, Copy)]
struct Storage {
    start: usize,
    bytes: usize,
}

/// Every tensor of the file at `path`: of the dictionary it holds, or of the one called `model` or `state_dict` in it.
///
/// # Errors
/// A file that is none of PyTorch's, damaged, compressed, or that names anything a file of weights has no need of.
pub fn open(path: &Path) -> Result<BTreeMap<String, Stored>> {
    let file = Mapped::open(path)?;
    let opened = if file.bytes.starts_with(b"PK") { open_zip(&file) } else { open_legacy(&file) };
    opened.map_err(|reason| Error::file(path, format!("not a readable file of PyTorch: {reason}")))
}

type Reason<T> = std::result::Result<T, String>;

fn open_zip(file: &Arc<Mapped>) -> Reason<BTreeMap<String, Stored>> {
    let bytes: &[u8] = &file.bytes;
    let mut zip =
        zip::ZipArchive::new(std::io::Cursor::new(bytes)).map_err(|err| err.to_string())?;
    let (mut pickle, mut byte_order) = (None, None);
    let mut storages = HashMap::new();
    for i in 0..zip.len() {
        let entry = zip.by_index_raw(i).map_err(|err| err.to_string())?;
        let name = entry.name().map_err(|err| err.to_string())?;
        let Some((_, name)) = name.split_once('/') else { continue };
        let name = name.to_owned();
        let key = name.strip_prefix("data/");
        if key.is_none() && name != "data.pkl" && name != "byteorder" {
            continue;
        }
        if entry.compression() != zip::CompressionMethod::Stored {
            return Err(format!("{name} is compressed; torch.save compresses nothing"));
        }
        let start = entry.data_start().ok_or_else(|| format!("{name} has no start"))?;
        let whole = usize::try_from(start)
            .ok()
            .zip(usize::try_from(entry.size()).ok())
            .filter(|(start, len)| start.checked_add(*len).is_some_and(|end| end <= bytes.len()));
        let (start, len) = whole.ok_or_else(|| format!("{name} ends behind the file"))?;
        match key {
            Some(key) => drop(storages.insert(key.to_owned(), Storage { start, bytes: len })),
            None if name == "data.pkl" => pickle = Some(&bytes[start..start + len]),
            None => byte_order = Some(&bytes[start..start + len]),
        }
    }
    if byte_order.is_some_and(|order| order != b"little") {
        return Err("its numbers are big-endian".into());
    }
    let pickle = read(pickle.ok_or("it has no data.pkl")?)?;
    tensors(&pickle, file, &storages)
}

fn open_legacy(file: &Arc<Mapped>) -> Reason<BTreeMap<String, Stored>> {
    let bytes: &[u8] = &file.bytes;
    let mut at = 0;
    let mut next = |what: &str| {
        let pickle = read(&bytes[at..]).map_err(|why| format!("{what}: {why}"))?;
        at += pickle.len;
        Ok::<_, String>((pickle, at))
    };
    let (magic, _) = next("it is no zip, and no pickle")
        .map_err(|why| why.chars().take(300).collect::<String>())?;
    if !matches!(magic.get(magic.root()), Node::BigInt(number) if number[..] == MAGIC) {
        return Err("it is neither a zip nor does it begin with PyTorch's number".into());
    }
    next("version")?;
    next("system")?;
    let (pickle, _) = next("what there is")?;
    let (keys, at) = next("keys")?;
    let Node::List(keys_list) = keys.get(keys.root()) else {
        return Err("there is no list of storages".into());
    };
    let sizes = element_sizes(&pickle);
    let mut storages = HashMap::new();
    let mut at = at;
    for key in keys_list {
        let key = keys.str(*key).ok_or("a storage without a name")?;
        let size =
            *sizes.get(key).ok_or_else(|| format!("nothing says what storage {key} holds"))?;
        let count = bytes.get(at..at + 8).ok_or_else(|| format!("storage {key} is cut off"))?;
        let count = u64::from_le_bytes(count.try_into().unwrap_or_default());
        let len = usize::try_from(count).ok().and_then(|count| count.checked_mul(size));
        let start = at + 8;
        let len = len
            .filter(|len| *len <= bytes.len() - start)
            .ok_or_else(|| format!("storage {key} is cut off: {count} elements of {size} bytes"))?;
        storages.insert(key.to_owned(), Storage { start, bytes: len });
        at = start + len;
    }
    tensors(&pickle, file, &storages)
}

fn read(bytes: &[u8]) -> Reason<Pickle> {
    Pickle::read(bytes, |name| {
        ALLOWED.contains(&name)
            || element(name).is_some()
            || name.strip_prefix("torch.").is_some_and(is_plain_dtype)
    })
}

/// `torch.float32` and its like: harmless constants.
fn is_plain_dtype(name: &str) -> bool {
    ["float", "int", "uint", "bfloat", "bool"].iter().any(|kind| {
        name.strip_prefix(kind).is_some_and(|bits| bits.bytes().all(|b| b.is_ascii_digit()))
    })
}

/// The element type of a storage class, or its plain name for one that is no weight's, and its size in bytes.
fn element(storage: &str) -> Option<(std::result::Result<DType, String>, usize)> {
    let kind = storage.strip_prefix("torch.")?.strip_suffix("Storage")?;
    Some(match kind {
        "Float" => (Ok(DType::F32), 4),
        "Half" => (Ok(DType::F16), 2),
        "BFloat16" => (Ok(DType::BF16), 2),
        "Double" => (Ok(DType::F64), 8),
        "Long" | "Int" | "Short" | "Char" | "Byte" | "Bool" => {
            let size = match kind {
                "Long" => 8,
                "Int" => 4,
                "Short" => 2,
                _ => 1,
            };
            (Err(kind.to_owned()), size)
        }
        _ => return None,
    })
}

/// `("storage", class, key, place, count)` of a tensor's storage.
fn storage_of(pickle: &Pickle, id: Id) -> Option<(&str, &str)> {
    let Node::Persistent(id) = pickle.get(id) else { return None };
    let parts = pickle.tuple(*id)?;
    let [kind, class, key, ..] = parts else { return None };
    (pickle.str(*kind) == Some("storage")).then_some(())?;
    Some((pickle.global(*class)?, pickle.str(*key)?))
}

/// Bytes per element of every storage that tensors refer to.
fn element_sizes(pickle: &Pickle) -> HashMap<&str, usize> {
    (0..pickle.count())
        .filter_map(|id| {
            let (class, key) = storage_of(pickle, id)?;
            Some((key, element(class)?.1))
        })
        .collect()
}

fn tensors(
    pickle: &Pickle,
    file: &Arc<Mapped>,
    storages: &HashMap<String, Storage>,
) -> Reason<BTreeMap<String, Stored>> {
    let entries = |id| pickle.entries(id);
    let root = entries(pickle.root()).ok_or("it holds no dictionary")?;
    let inner = WEIGHTS.iter().find_map(|name| {
        let (_, value) = root.iter().find(|(key, _)| pickle.str(*key) == Some(name))?;
        entries(*value)
    });
    let mut found = BTreeMap::new();
    let mut gathered = 0;
    for (key, value) in inner.unwrap_or(root) {
        let name = pickle.str(*key).ok_or("a tensor without a name")?;
        let tensor = tensor(pickle, *value, name, file, storages, &mut gathered)
            .map_err(|why| format!("tensor {name}: {why}"))?;
        found.insert(name.to_owned(), tensor);
    }
    Ok(found)
}

fn tensor(
    pickle: &Pickle,
    id: Id,
    name: &str,
    file: &Arc<Mapped>,
    storages: &HashMap<String, Storage>,
    gathered: &mut usize,
) -> Reason<Stored> {
    let (callable, args) = pickle.call(id).ok_or("is no tensor")?;
    let args = match (callable, args) {
        ("torch._utils._rebuild_parameter", [data, ..]) => {
            let (inner, args) = pickle.call(*data).ok_or("is no tensor")?;
            (inner == "torch._utils._rebuild_tensor_v2").then_some(args)
        }
        ("torch._utils._rebuild_tensor_v2", args) => Some(args),
        _ => None,
    };
    let Some([storage, offset, size, stride, ..]) = args else {
        return Err("is no tensor".into());
    };
    let (class, key) = storage_of(pickle, *storage).ok_or("has no storage")?;
    let (dtype, bytes_each) = element(class).ok_or("has a storage of an unknown kind")?;
    let storage = storages.get(key).ok_or_else(|| format!("storage {key} is missing"))?;
    let numbers = |id| -> Option<Vec<usize>> {
        // One tuple of a million numbers could be the shape of a million tensors.
        let numbers = pickle.tuple(id).filter(|tuple| tuple.len() <= MOST_DIMS)?.iter();
        numbers.map(|number| usize::try_from(pickle.int(*number)?).ok()).collect()
    };
    let shape = numbers(*size).ok_or("has no shape")?;
    let stride = numbers(*stride).filter(|s| s.len() == shape.len()).ok_or("has no strides")?;
    let offset =
        pickle.int(*offset).and_then(|o| usize::try_from(o).ok()).ok_or("has no offset")?;
    let available = storage.bytes / bytes_each;
    let count = shape.iter().try_fold(1usize, |count, n| count.checked_mul(*n));
    let last = shape.iter().zip(&stride).try_fold(offset, |last, (n, stride)| {
        last.checked_add(n.saturating_sub(1).checked_mul(*stride)?)
    });
    // A tensor that repeats elements could be larger than memory; weights never do. One without elements lies somewhere, too.
    let inside = count.is_some_and(|count| count <= available)
        && last.is_some_and(|last| last < available || count == Some(0))
        && offset <= available
        && is_countable(shape.iter().map(|n| *n as u64));
    if !inside {
        return Err(format!(
            "shape {shape:?}, strides {stride:?} from element {offset} reach out of the {available} elements of storage {key}"
        ));
    }
    let start = storage.start + offset * bytes_each;
    let count = count.unwrap_or(0);
    if is_row_major(&shape, &stride) {
        let extent =
            |len| Extent { file: file.clone(), name: name.to_owned(), dtype, shape, start, len };
        return Ok(extent(count * bytes_each).into());
    }
    let dtype = dtype.map_err(|kind| format!("is {kind} and not row-major"))?;
    // Weights are in a file once, tied ones twice: a small file may not ask for its elements a million times.
    *gathered += count * bytes_each;
    if *gathered > 2 * file.bytes.len() {
        return Err("the tensors that are not row-major have more elements than the file".into());
    }
    let bytes = gather(&file.bytes[start..], &shape, &stride, bytes_each);
    let tensor = Tensor::from_raw_buffer(&bytes, dtype, &shape, &Device::Cpu);
    Ok(tensor.map_err(|err| err.to_string())?.into())
}

fn is_row_major(shape: &[usize], stride: &[usize]) -> bool {
    let mut expected = 1;
    shape.iter().zip(stride).rev().all(|(n, stride)| {
        let fits = *n <= 1 || *stride == expected;
        expected *= n;
        fits
    })
}

/// The elements of a strided tensor, row-major.
fn gather(bytes: &[u8], shape: &[usize], stride: &[usize], each: usize) -> Vec<u8> {
    let count: usize = shape.iter().product();
    let mut out = Vec::with_capacity(count * each);
    for i in 0..count {
        let (mut rest, mut at) = (i, 0);
        for (n, stride) in shape.iter().zip(stride).rev() {
            at += rest % n * stride;
            rest /= n;
        }
        out.extend_from_slice(&bytes[at * each..(at + 1) * each]);
    }
    out
}

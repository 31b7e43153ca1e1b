//! Named tensors of one checkpoint, read strictly.
//!
//! A model's constructor asks [`Params`] for every tensor by name and shape. Whatever is missing, mis-shaped,
//! non-finite or left over is collected, and [`Params::build`] refuses the checkpoint with the whole list:
//! a model that loaded is a model whose every weight came from the file.
//!
//! The same constructor serves training and inference. From a [`ParamStore`] it gets trained tensors, which
//! receive gradients; from a plain map it gets frozen ones, whose matrices are kept in a [`WeightFormat`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};

use blip2_ops::{FrozenWeight, WeightFormat};
use candle_core::quantized::gguf_file;
use candle_core::{DType, Device, Tensor, Var};

use crate::nn::{LayerNorm, Linear};
use crate::stored::{self, Stored};
use crate::{Error, Result};

/// How many problems an error message lists before it only counts them.
const LISTED: usize = 12;
/// With so many problems nothing fits, and looking for more would take as long as a configuration of a billion layers says.
const MOST_PROBLEMS: usize = 1000;

/// The trained tensors of a model, by name, in the order of their names.
///
/// The order is the order of the optimiser's state and of the gradient bucket, so it must not depend on anything
/// but the names.
#[derive(Debug, Clone)]
pub struct ParamStore {
    vars: BTreeMap<String, Var>,
}

impl ParamStore {
    /// Takes initial values, in f32.
    ///
    /// # Errors
    /// If a tensor can't be converted to f32.
    pub fn new(tensors: BTreeMap<String, Tensor>) -> Result<Self> {
        let vars = tensors
            .into_iter()
            .map(|(name, tensor)| {
                Ok((name, Var::from_tensor(&tensor.to_dtype(DType::F32)?.contiguous()?)?))
            })
            .collect::<Result<_>>()?;
        Ok(Self { vars })
    }

    /// Every trained tensor with its name, sorted by name.
    pub fn vars(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.vars.iter().map(|(name, var)| (name.as_str(), var))
    }

    /// The trained tensor called `name`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Var> {
        self.vars.get(name)
    }

    /// The present values; they share storage with the variables.
    #[must_use]
    pub fn to_tensors(&self) -> BTreeMap<String, Tensor> {
        self.vars.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect()
    }

    /// Overwrites every value, strictly: the names and shapes must be the same.
    ///
    /// # Errors
    /// If a name is missing or unknown or a shape differs.
    pub fn set(&self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        let unknown: Vec<_> =
            tensors.keys().filter(|name| !self.vars.contains_key(*name)).collect();
        if !unknown.is_empty() {
            return Err(Error::Weights(format!("unexpected tensors {unknown:?}")));
        }
        for (name, var) in &self.vars {
            let Some(tensor) = tensors.get(name) else {
                return Err(Error::Weights(format!("missing tensor {name}")));
            };
            if tensor.shape() != var.shape() {
                return Err(Error::Weights(format!(
                    "{name} has shape {:?}, expected {:?}",
                    tensor.dims(),
                    var.dims()
                )));
            }
            var.set(&tensor.to_dtype(DType::F32)?.contiguous()?)?;
        }
        Ok(())
    }

    /// The number of trained parameters.
    #[must_use]
    pub fn count(&self) -> usize {
        self.vars.values().map(|var| var.elem_count()).sum()
    }

    /// Builds a model whose tensors are the variables of this store.
    ///
    /// # Errors
    /// If the model asks for a tensor that the store has not, or leaves one unused.
    pub fn build<T>(&self, make: impl FnOnce(&Params) -> Result<T>) -> Result<T> {
        let tensors = self
            .vars
            .iter()
            .map(|(name, var)| (name.clone(), var.as_tensor().clone().into()))
            .collect();
        Params::root(tensors, Kind::Trained, "trained weights").build_with(make)
    }
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Trained,
    /// Without a format halves stay halves, and everything else is f32: no weight changes its value.
    Frozen(Option<WeightFormat>),
}

#[derive(Debug)]
struct Source {
    tensors: BTreeMap<String, Stored>,
    kind: Kind,
    origin: String,
    taken: Mutex<BTreeSet<String>>,
    problems: Mutex<Vec<String>>,
}

impl Source {
    /// Every problem found, or the first of them and how many more there are.
    fn refused(&self, problems: &[String]) -> Error {
        let more = problems.len().saturating_sub(LISTED);
        let mut list = problems[..problems.len() - more].join("; ");
        if more > 0 {
            list += &format!("; and {more} more");
        }
        Error::Weights(format!("{}: {list}", self.origin))
    }

    /// An error of a constructor, which knows no file, with the name of what it was built from.
    fn named(&self, err: Error) -> Error {
        match err {
            Error::Config(_) | Error::Tensor(_) => Error::Config(format!("{}: {err}", self.origin)),
            other => other,
        }
    }

    /// An error of the tensor library, with the tensor's name.
    fn named_tensor(&self, path: &str, err: Error) -> Error {
        match err {
            Error::Tensor(err) => Error::Weights(format!("{}: {path}: {err}", self.origin)),
            other => other,
        }
    }

    /// Notes a problem.
    fn note(&self, problem: String) -> Result<()> {
        let mut problems = lock(&self.problems);
        problems.push(problem);
        if problems.len() < MOST_PROBLEMS { Ok(()) } else { Err(self.refused(&problems)) }
    }
}

/// A place in the tree of names: `params.pp("layers").pp(3)` stands for `layers.3`.
#[derive(Debug, Clone)]
pub struct Params {
    source: Arc<Source>,
    prefix: String,
}

impl Params {
    fn root(tensors: BTreeMap<String, Stored>, kind: Kind, origin: &str) -> Self {
        let source = Source {
            tensors,
            kind,
            origin: origin.into(),
            taken: Mutex::default(),
            problems: Mutex::default(),
        };
        Self { source: Arc::new(source), prefix: String::new() }
    }

    /// Builds a frozen model from `tensors`, in memory or still in their files, which are read one after the other;
    /// `origin` (a file, say) is named in errors. Without a `format` weights keep their values: f16 stays f16, other types
    /// become f32.
    ///
    /// # Errors
    /// With the list of missing, unexpected, mis-shaped and non-finite tensors, if there is any.
    pub fn build<S: Into<Stored>, T>(
        tensors: BTreeMap<String, S>,
        format: impl Into<Option<WeightFormat>>,
        origin: &str,
        make: impl FnOnce(&Params) -> Result<T>,
    ) -> Result<T> {
        let tensors = tensors.into_iter().map(|(name, tensor)| (name, tensor.into())).collect();
        Self::root(tensors, Kind::Frozen(format.into()), origin).build_with(make)
    }

    fn build_with<T>(self, make: impl FnOnce(&Params) -> Result<T>) -> Result<T> {
        let model = make(&self).map_err(|err| self.source.named(err))?;
        let taken = lock(&self.source.taken);
        let mut problems = std::mem::take(&mut *lock(&self.source.problems));
        problems.extend(
            self.source
                .tensors
                .keys()
                .filter(|name| !taken.contains(*name))
                .map(|name| format!("unexpected {name}")),
        );
        if problems.is_empty() {
            return Ok(model);
        }
        Err(self.source.refused(&problems))
    }

    /// The child called `name`.
    #[must_use]
    pub fn pp(&self, name: impl std::fmt::Display) -> Self {
        let prefix = if self.prefix.is_empty() {
            name.to_string()
        } else {
            format!("{}.{name}", self.prefix)
        };
        Self { source: self.source.clone(), prefix }
    }

    /// Whether there is a tensor called `name` here.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.source.tensors.contains_key(&self.path(name))
    }

    /// The tensor called `name`, in f32. A missing or wrong one is noted for [`Params::build`]'s error and
    /// replaced by one without elements, so that one run lists every problem. (The wanted shape may be larger than memory.)
    ///
    /// # Errors
    /// If it can't be read, or there are too many problems already.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.read(name, shape, |tensor| Ok(tensor.to_dtype(DType::F32)?.contiguous()?))
    }

    /// [`Self::tensor`], `converted`: a large matrix stays in the type it is stored in, and in memory once, until it has the
    /// format it is kept in.
    fn read(
        &self,
        name: &str,
        shape: &[usize],
        converted: impl Fn(Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let path = self.path(name);
        let problem = match self.source.tensors.get(&path) {
            None => format!("missing {path} {shape:?}"),
            Some(stored) => {
                lock(&self.source.taken).insert(path.clone());
                let dims = stored.dims();
                if dims != shape {
                    format!("{path} has shape {dims:?}, expected {shape:?}")
                } else if matches!(self.source.kind, Kind::Trained) {
                    // Converting would cut the tie to the variable; the store already holds f32.
                    return stored.load();
                } else {
                    let load = || converted(stored.load()?);
                    let tensor =
                        load().map_err(|err: Error| self.source.named_tensor(&path, err))?;
                    let finite = blip2_ops::is_finite(&tensor).map_err(Error::from);
                    if finite.map_err(|err| self.source.named_tensor(&path, err))? {
                        return Ok(tensor);
                    }
                    format!("{path} holds NaN or infinity")
                }
            }
        };
        self.source.note(problem)?;
        Ok(Tensor::zeros(vec![0; shape.len()], DType::F32, &Device::Cpu)?)
    }

    /// A linear map `weight` (out, in), with `bias` (out) if asked for.
    ///
    /// # Errors
    /// If the weight can't be stored in the wanted format.
    pub fn linear(&self, input: usize, output: usize, bias: bool) -> Result<Linear> {
        let bias = if bias { Some(self.tensor("bias", &[output])?) } else { None };
        match self.source.kind {
            Kind::Trained => Ok(Linear::trained(self.tensor("weight", &[output, input])?, bias)),
            Kind::Frozen(_) => Ok(Linear::frozen(self.matrix("weight", output, input)?, bias)),
        }
    }

    /// The frozen matrix called `name` (rows, columns): a table of embeddings, say.
    ///
    /// # Errors
    /// If it can't be stored in the wanted format, or these are trained weights, of which it would be a copy.
    pub fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<FrozenWeight> {
        let weight = self.read(name, &[rows, columns], Ok)?;
        match self.source.kind {
            Kind::Frozen(format) => Ok(FrozenWeight::kept(&weight, format)?),
            Kind::Trained => {
                let path = self.path(name);
                Err(Error::Config(format!("{path}: a frozen matrix among trained weights")))
            }
        }
    }

    /// The shape of the tensor called `name`, if there is one.
    #[must_use]
    pub fn dims(&self, name: &str) -> Option<Vec<usize>> {
        self.source.tensors.get(&self.path(name)).map(Stored::dims)
    }

    /// A layer normalisation over `width`; an `eps` that would make it give no numbers is a problem, too.
    ///
    /// # Errors
    /// As [`Self::tensor`].
    pub fn layer_norm(&self, width: usize, eps: f64) -> Result<LayerNorm> {
        if !(0.0..1.0).contains(&eps) {
            self.source.note(format!("{} has the epsilon {eps}, not one in 0..1", self.prefix))?;
        }
        Ok(LayerNorm::new(self.tensor("weight", &[width])?, self.tensor("bias", &[width])?, eps))
    }

    fn path(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }
}

/// Reads every tensor of a safetensors or GGUF file.
///
/// # Errors
/// If the file can't be read or is damaged; the message names it.
pub fn read_file(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    read_weights(&std::fs::read(path).map_err(Error::io(path))?, path)
}

/// Every tensor in the bytes of a safetensors or GGUF file; quantised ones are unpacked to f32. `path` is for errors.
///
/// # Errors
/// If the bytes are neither, or damaged.
pub fn read_weights(bytes: &[u8], path: &Path) -> Result<BTreeMap<String, Tensor>> {
    if bytes.starts_with(b"GGUF") {
        return read_gguf(bytes)
            .map_err(|err| Error::file(path, format!("not a readable GGUF file: {err}")));
    }
    let unreadable =
        |reason: String| Error::file(path, format!("not a readable safetensors file: {reason}"));
    stored::check_header(bytes).map_err(unreadable)?;
    let tensors = candle_core::safetensors::load_buffer(bytes, &Device::Cpu)
        .map_err(|err| unreadable(err.to_string()))?;
    Ok(tensors.into_iter().collect())
}

/// The names and shapes in a GGUF or safetensors file, without reading any weight.
///
/// # Errors
/// If the file can't be read or is damaged; the message names it.
pub fn shapes(path: &Path) -> Result<BTreeMap<String, Vec<usize>>> {
    let file = std::fs::File::open(path).map_err(Error::io(path))?;
    let mut reader = std::io::BufReader::new(file);
    let mut magic = [0; 4];
    std::io::Read::read_exact(&mut reader, &mut magic).map_err(Error::io(path))?;
    if &magic != b"GGUF" {
        let tensors = stored::open_file(path)?;
        return Ok(tensors.into_iter().map(|(name, tensor)| (name, tensor.dims())).collect());
    }
    std::io::Seek::rewind(&mut reader).map_err(Error::io(path))?;
    let content = gguf_file::Content::read(&mut reader)
        .map_err(|err| Error::file(path, format!("not a readable GGUF file: {err}")))?;
    Ok(content
        .tensor_infos
        .iter()
        .map(|(name, info)| (name.clone(), info.shape.dims().to_vec()))
        .collect())
}

fn read_gguf(bytes: &[u8]) -> candle_core::Result<BTreeMap<String, Tensor>> {
    let mut reader = std::io::Cursor::new(bytes);
    let content = gguf_file::Content::read(&mut reader)?;
    let names: Vec<_> = content.tensor_infos.keys().cloned().collect();
    names
        .into_iter()
        .map(|name| {
            let tensor =
                content.tensor(&mut reader, &name, &Device::Cpu)?.dequantize(&Device::Cpu)?;
            // GGUF has no scalars; the temperature is the only one of ours.
            let scalar = name == "temp" && tensor.dims() == [1];
            Ok((name, if scalar { tensor.reshape(())? } else { tensor }))
        })
        .collect()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A poisoned list of names is still a list of names.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

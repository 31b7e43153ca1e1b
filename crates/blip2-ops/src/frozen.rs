//! Weights that are used but never trained, in a small format, and the product with them.
//!
//! A product equals the f32 product with the dequantised weight up to the order of sums, unless the weight was told to be
//! fast ([`FrozenWeight::fast`]). There is no gradient for a frozen weight, and no memory for one.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{
    CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Storage, Tensor, WithDType, bail,
};
use half::f16;
use half::slice::HalfFloatSliceExt as _;
use rayon::prelude::*;

use crate::bf16::{self, FrozenPanels};
use crate::bf16_tiles;
use crate::blocks::IntKind;
use crate::float_tiles;
use crate::gemm::{self, Finish, Rows, RowsMut, Threads, Way, product};
use crate::host::{self, Host};
use crate::linear::{check_bias, out_shape};
use crate::panel::{Arithmetic, Panels, Turned};
use crate::tile::{COLUMNS, Row};
use crate::{gguf_read, gguf_write, work};

const NAME: &str = "frozen_linear";

/// Weights that are unpacked together for a gradient, or for a product in a format without panels.
const UNPACKED: usize = 1 << 20;
/// Up to this many rows of x, each weight row of such a format is unpacked once and multiplied on the spot.
const FEW_ROWS: usize = 8;

/// How a frozen weight is kept in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// 4 bytes per weight, exact.
    F32,
    /// 2 bytes per weight.
    F16,
    /// 34 bytes per 32 weights.
    Q8_0,
    /// 144 bytes per 256 weights.
    Q4K,
}

impl WeightFormat {
    /// All formats, best first.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Q8_0, Self::Q4K];

    /// The name used on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Q8_0 => "q8_0",
            Self::Q4K => "q4_k",
        }
    }

    /// The smallest format in which no weight of this type, of at most 32 bits, changes its value.
    fn exact(dtype: DType) -> Self {
        if dtype == DType::F16 { Self::F16 } else { Self::F32 }
    }

    /// The format used for rows of `width` weights: quantised blocks must divide a row, so Q4_K
    /// falls back to Q8_0 and that to F16.
    pub fn for_width(self, width: usize) -> Self {
        match self {
            Self::Q4K if !width.is_multiple_of(256) => Self::Q8_0.for_width(width),
            Self::Q8_0 if !width.is_multiple_of(32) => Self::F16,
            other => other,
        }
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for WeightFormat {
    /// What is wrong, for whoever typed it.
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        let found = Self::ALL.into_iter().find(|format| format.as_str() == name);
        found
            .ok_or_else(|| format!("unknown weight format {name:?}: choose f32, f16, q8_0 or q4_k"))
    }
}

/// A frozen weight `(out, in)`; cloning shares the memory.
#[derive(Clone)]
pub struct FrozenWeight {
    inner: Arc<Inner>,
    fast: bool,
}

struct Inner {
    store: Store,
    out: usize,
    width: usize,
}

enum Store {
    Panels(Panels),
    /// GGUF formats that have no kernel of their own.
    Blocks(Arc<QTensor>),
}

impl fmt::Debug for FrozenWeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FrozenWeight[{}, {}; {}]", self.inner.out, self.inner.width, self.format_name())
    }
}

impl FrozenWeight {
    /// Stores `weight (out, in)`, of any float type, as `format` (or what
    /// [`WeightFormat::for_width`] makes of it).
    pub fn new(weight: &Tensor, format: WeightFormat) -> Result<Self> {
        let &[out, width] = weight.dims() else {
            bail!("frozen weight: {:?} is not (out, in)", weight.shape());
        };
        if !weight.device().is_cpu() {
            bail!("frozen weight: works on the CPU only, got {:?}", weight.device().location());
        }
        if !weight.dtype().is_float() {
            bail!("frozen weight: {:?} is not a float type", weight.dtype());
        }
        let weight = weight.detach();
        // Nothing needs no blocks.
        let format = if out * width == 0 { WeightFormat::F32 } else { format.for_width(width) };
        let panels = match format {
            WeightFormat::F32 => floats(&weight, out, width)?,
            WeightFormat::F16 => {
                let weight = weight.to_dtype(DType::F16)?.contiguous()?;
                let (storage, layout) = weight.storage_and_layout();
                let halves: &[u16] = slice::<f16>(&storage, layout)?.reinterpret_cast();
                Panels::f16(out, width, |i, to| to.copy_from_slice(&halves[i..][..to.len()]))
            }
            WeightFormat::Q8_0 => quantised(&weight, IntKind::Q8_0, gguf_write::q8_0)?,
            WeightFormat::Q4K => quantised(&weight, IntKind::Q4K, gguf_write::q4_k)?,
        };
        Ok(Self::of(Store::Panels(panels), out, width))
    }

    /// A weight as a model keeps it: in the `format` that somebody asked for, and then fast; without one in the smallest
    /// format that changes no value, and exact.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn kept(weight: &Tensor, format: Option<WeightFormat>) -> Result<Self> {
        match format {
            Some(format) => Ok(Self::new(weight, format)?.fast()),
            None => Self::new(weight, WeightFormat::exact(weight.dtype())),
        }
    }

    fn of(store: Store, out: usize, width: usize) -> Self {
        Self { inner: Arc::new(Inner { store, out, width }), fast: false }
    }

    /// The same weight for products that only have to be fast, not to have gradients: where it is quantised and x is not
    /// tracked, x has 16 bits with a scale for every 32. That takes half the time, and is off by 2e-5 of the result, a
    /// hundredth of what eight bits have cost the weight. Other formats know no faster way.
    #[must_use]
    pub fn fast(self) -> Self {
        Self { fast: true, ..self }
    }

    /// Keeps a tensor read from a GGUF file in the format it has there.
    pub fn from_qtensor(tensor: Arc<QTensor>) -> Result<Self> {
        let &[out, width] = tensor.shape().dims() else {
            bail!("frozen weight: {:?} is not (out, in)", tensor.shape());
        };
        if !tensor.device().is_cpu() {
            bail!("frozen weight: works on the CPU only, got {:?}", tensor.device().location());
        }
        let kind = match tensor.dtype() {
            GgmlDType::F32 => {
                return Self::new(&tensor.dequantize(&Device::Cpu)?, WeightFormat::F32);
            }
            GgmlDType::F16 => {
                let bytes = tensor.data()?;
                let halves = bytes.as_chunks::<2>().0;
                let panels = Panels::f16(out, width, |i, to| {
                    for (to, half) in to.iter_mut().zip(&halves[i..]) {
                        *to = u16::from_le_bytes(*half);
                    }
                });
                let store = Store::Panels(panels);
                return Ok(Self::of(store, out, width));
            }
            GgmlDType::Q8_0 => IntKind::Q8_0,
            GgmlDType::Q4_0 => IntKind::Q4_0,
            GgmlDType::Q4_1 => IntKind::Q4_1,
            GgmlDType::Q4K => IntKind::Q4K,
            _ => {
                let store = Store::Blocks(tensor);
                return Ok(Self::of(store, out, width));
            }
        };
        let (bytes, per_row) = (tensor.data()?, kind.row_bytes(width));
        let panels = Panels::ints(kind, out, width, |rows, out| {
            out.copy_from_slice(&bytes[rows.start * per_row..rows.end * per_row]);
            Ok::<_, candle_core::Error>(())
        })?;
        Ok(Self::of(Store::Panels(panels), out, width))
    }

    /// `(out, in)`.
    pub fn shape(&self) -> (usize, usize) {
        (self.inner.out, self.inner.width)
    }

    /// The format in memory: `f32`, `f16`, `q8_0`, `q4_k`, or another GGUF name in lower case.
    pub fn format_name(&self) -> &'static str {
        match &self.inner.store {
            Store::Panels(panels) => panels.name(),
            Store::Blocks(q) => match q.dtype() {
                GgmlDType::F32 => "f32",
                GgmlDType::F16 => "f16",
                GgmlDType::BF16 => "bf16",
                GgmlDType::Q4_0 => "q4_0",
                GgmlDType::Q4_1 => "q4_1",
                GgmlDType::Q5_0 => "q5_0",
                GgmlDType::Q5_1 => "q5_1",
                GgmlDType::Q8_0 => "q8_0",
                GgmlDType::Q8_1 => "q8_1",
                GgmlDType::Q2K => "q2_k",
                GgmlDType::Q3K => "q3_k",
                GgmlDType::Q4K => "q4_k",
                GgmlDType::Q5K => "q5_k",
                GgmlDType::Q6K => "q6_k",
                GgmlDType::Q8K => "q8_k",
            },
        }
    }

    /// Bytes of memory the weights take, without the padding of the last 32 rows.
    pub fn bytes(&self) -> usize {
        match &self.inner.store {
            Store::Panels(panels) => panels.bytes(),
            Store::Blocks(q) => q.storage_size_in_bytes(),
        }
    }

    /// The whole weight `(out, in)` in f32.
    pub fn dequantize(&self) -> Result<Tensor> {
        let Inner { out, width, .. } = &*self.inner;
        let mut all = vec![0f32; out * width];
        Reader::new(self)?.fill(0, &mut all);
        host::tensor(all, (*out, *width))
    }

    /// Rows `ids` in f32, `(n, in)`: an embedding table that stays in its format.
    pub fn rows(&self, ids: &[u32]) -> Result<Tensor> {
        let Inner { out, width, .. } = &*self.inner;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= *out) {
            bail!("frozen weight: row {id} is outside the table of {out} rows");
        }
        let reader = Reader::new(self)?;
        let mut all = vec![0f32; ids.len() * width];
        host::for_pieces(&mut all, *width, |start, row| {
            reader.row(ids[start / width] as usize, row);
        });
        host::tensor(all, (ids.len(), *width))
    }
}

/// f32 panels of a weight of any float type, without a copy of it in between if it is [`readable`] as it is.
fn floats(weight: &Tensor, out: usize, width: usize) -> Result<Panels> {
    let weight = readable(weight)?;
    let (storage, layout) = weight.storage_and_layout();
    let numbers = Numbers::of(&storage, layout)?;
    Ok(Panels::f32(out, width, |first, to| numbers.read(first, to)))
}

/// Those of a [`readable`] tensor.
#[derive(Clone, Copy)]
enum Numbers<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [half::bf16]),
}

impl<'a> Numbers<'a> {
    fn of(storage: &'a Storage, layout: &Layout) -> Result<Self> {
        Ok(match storage.dtype() {
            DType::F16 => Self::F16(slice(storage, layout)?),
            DType::BF16 => Self::Bf16(slice(storage, layout)?),
            _ => Self::F32(slice(storage, layout)?),
        })
    }

    /// Fills `to` with the numbers from `first` on.
    fn read(self, first: usize, to: &mut [f32]) {
        let places = first..first + to.len();
        match self {
            Self::F32(all) => to.copy_from_slice(&all[places]),
            Self::F16(all) => all[places].convert_to_f32_slice(to),
            Self::Bf16(all) => all[places].convert_to_f32_slice(to),
        }
    }
}

/// The same numbers in a row, and in one of the types that are read here.
fn readable(tensor: &Tensor) -> Result<Tensor> {
    match tensor.dtype() {
        DType::F32 | DType::F16 | DType::BF16 => tensor.contiguous(),
        _ => tensor.to_dtype(DType::F32)?.contiguous(),
    }
}

/// The numbers of a contiguous tensor.
fn slice<'a, T: WithDType>(storage: &'a Storage, layout: &Layout) -> Result<&'a [T]> {
    let (Storage::Cpu(storage), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
        bail!("frozen weight: works on contiguous tensors on the CPU only");
    };
    Ok(&storage.as_slice::<T>()?[start..end])
}

/// Whether every number of `tensor`, of a float type on the CPU, is finite.
///
/// # Errors
/// If it is of another type.
pub fn is_finite(tensor: &Tensor) -> Result<bool> {
    if !tensor.dtype().is_float() {
        bail!("is_finite: {:?} is not a float type", tensor.dtype());
    }
    let tensor = readable(tensor)?;
    let (storage, layout) = tensor.storage_and_layout();
    Ok(match Numbers::of(&storage, layout)? {
        Numbers::F32(numbers) => all(numbers, f32::is_finite),
        Numbers::F16(numbers) => all(numbers, f16::is_finite),
        Numbers::Bf16(numbers) => all(numbers, half::bf16::is_finite),
    })
}

/// Whether all `numbers` are `fine`. Each piece is read to its end: a loop without exits is vectorised.
fn all<T: Copy + Sync>(numbers: &[T], fine: impl Fn(T) -> bool + Sync) -> bool {
    const PIECE: usize = 1 << 16;
    numbers.par_chunks(PIECE).all(|part| part.iter().fold(true, |all, x| all & fine(*x)))
}

/// Quantises 32 rows at a time: of a weight that is [`readable`] as it is no copy in f32 is made.
fn quantised(weight: &Tensor, kind: IntKind, pack: fn(&[f32], &mut [u8])) -> Result<Panels> {
    let (out, width) = weight.dims2()?;
    let weight = readable(weight)?;
    let (storage, layout) = weight.storage_and_layout();
    let numbers = Numbers::of(&storage, layout)?;
    Panels::ints(kind, out, width, |rows, bytes| {
        let mut floats = vec![0f32; rows.len() * width];
        numbers.read(rows.start * width, &mut floats);
        pack(&floats, bytes);
        Ok(())
    })
}

/// Reads weight rows as f32.
struct Reader<'a> {
    source: Source<'a>,
    width: usize,
}

enum Source<'a> {
    Panels(&'a Panels),
    Bytes { dtype: GgmlDType, bytes: std::borrow::Cow<'a, [u8]>, per_row: usize },
    Candle(&'a QTensor),
}

impl<'a> Reader<'a> {
    fn new(weight: &'a FrozenWeight) -> Result<Self> {
        let Inner { store, width, .. } = &*weight.inner;
        let source = match store {
            Store::Panels(panels) => Source::Panels(panels),
            Store::Blocks(q) if gguf_read::known(q.dtype()) => {
                let dtype = q.dtype();
                let per_row = width / dtype.block_size() * dtype.type_size();
                Source::Bytes { dtype, bytes: q.data()?, per_row }
            }
            Store::Blocks(q) => Source::Candle(q),
        };
        Ok(Self { source, width: *width })
    }

    /// Fills `out` with row `index`.
    fn row(&self, index: usize, out: &mut [f32]) {
        match &self.source {
            Source::Panels(panels) => panels.row(index, out),
            Source::Bytes { dtype, bytes, per_row } => {
                let bytes = &bytes[index * per_row..(index + 1) * per_row];
                gguf_read::dequantize(*dtype, bytes, out);
            }
            Source::Candle(q) => {
                let row = Tensor::new(&[index as u32], &Device::Cpu)
                    .and_then(|ids| q.embedding(&ids)?.flatten_all()?.to_vec1::<f32>());
                // Rows and shape were checked when the weight was made.
                match row {
                    Ok(row) => out.copy_from_slice(&row),
                    Err(_) => out.fill(f32::NAN),
                }
            }
        }
    }

    /// Fills `out` with whole rows from row `first` on, a multiple of [`COLUMNS`].
    fn fill(&self, first: usize, out: &mut [f32]) {
        let width = self.width;
        host::for_pieces(out, COLUMNS * width, |start, rows| match &self.source {
            Source::Panels(panels) => panels.rows_of((first + start / width) / COLUMNS, rows),
            _ => {
                for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                    self.row(first + start / width + i, row);
                }
            }
        });
    }

    /// Rows that are unpacked together.
    fn step(&self) -> usize {
        (UNPACKED / self.width.max(1)).max(1).next_multiple_of(COLUMNS)
    }
}

/// `x (…, in) · weightᵀ + bias (out)` → `(…, out)`.
///
/// Backward gives the gradient of x only; a tracked `bias` would be an error in the model, so it is
/// treated as a constant. If x is not tracked nothing is recorded.
pub fn frozen_linear(x: &Tensor, weight: &FrozenWeight, bias: Option<&Tensor>) -> Result<Tensor> {
    host::check(NAME, &[x])?;
    let (out, width) = weight.shape();
    if x.dims().last() != Some(&width) {
        bail!("{NAME}: x {:?} does not fit weight [{out}, {width}] (out, in)", x.shape());
    }
    if let Some(bias) = bias {
        check_bias(NAME, bias, out)?;
    }
    let arithmetic = match weight.fast && !x.track_op() {
        true => Arithmetic::Integers,
        false => Arithmetic::Floats,
    };
    let bias = bias.map(Tensor::detach);
    let rows = x.elem_count() / width.max(1);
    let way = if x.track_op() { Way::of(rows, width, out) } else { Way::Floats };
    x.apply_op1(FrozenLinear { weight: weight.clone(), bias, arithmetic, way })
}

struct FrozenLinear {
    weight: FrozenWeight,
    bias: Option<Tensor>,
    arithmetic: Arithmetic,
    way: Way,
}

impl FrozenLinear {
    fn forward(&self, x: &[f32], n: usize) -> Result<Vec<f32>> {
        let (out, width) = self.weight.shape();
        work::read(self.weight.bytes());
        let bias = self.bias.as_ref().map(|b| Host::new(NAME, b)).transpose()?;
        let bias = bias.as_deref();
        if let Store::Panels(panels) = &self.weight.inner.store
            && self.way != Way::Vectors
        {
            work::product(n, width, out);
            let Way::Tiles(amx) = self.way else {
                return Ok(panels.product(x, n, bias, self.arithmetic));
            };
            let mut y = host::zeros(n * out);
            let y_rows = gemm::rows_mut(&mut y, n, out);
            let finish = Finish { bias, ..Finish::REPLACE };
            bf16_tiles::product(Some(amx), y_rows, finish, gemm::rows(x, n, width), panels);
            return Ok(y);
        }
        let mut blocks = Blocks::new(&self.weight, n)?;
        if n <= FEW_ROWS {
            return Ok(few_rows(&blocks.reader, x, n, out, bias));
        }
        let mut y = host::zeros(n * out);
        let (x, step) = (gemm::rows(x, n, width), blocks.step());
        let columns = gemm::split_columns(gemm::rows_mut(&mut y, n, out), step);
        for (i, y) in columns.into_iter().enumerate() {
            let bias = bias.map(|bias| &bias[i * step..][..y.ncols()]);
            blocks.forward(y, Finish { bias, ..Finish::REPLACE }, x, i * step);
        }
        Ok(y)
    }

    fn backward(&self, dy: &[f32], n: usize) -> Result<Vec<f32>> {
        let (out, width) = self.weight.shape();
        work::read(self.weight.bytes());
        let mut dx = host::zeros(n * width);
        if let Store::Panels(panels) = &self.weight.inner.store {
            let (dx_rows, dy) = (gemm::rows_mut(&mut dx, n, width), gemm::rows(dy, n, out));
            match Way::of(n, out, width) {
                Way::Tiles(amx) => {
                    work::product(n, out, width);
                    bf16_tiles::product(Some(amx), dx_rows, Finish::REPLACE, dy, &Turned(panels));
                    return Ok(dx);
                }
                Way::Floats if panels.are_floats() && gemm::has_float_tiles(n, out, width) => {
                    work::product(n, out, width);
                    float_tiles::product(dx_rows, Finish::REPLACE, dy, &Turned(panels));
                    return Ok(dx);
                }
                Way::Floats | Way::Vectors => {}
            }
        }
        let mut blocks = Blocks::new(&self.weight, n)?;
        let step = blocks.step();
        for first in (0..out).step_by(step) {
            let dy = gemm::columns(dy, n, out, first, step.min(out - first));
            let finish = if first == 0 { Finish::REPLACE } else { Finish::ADD };
            blocks.backward(gemm::rows_mut(&mut dx, n, width), finish, dy, first);
        }
        Ok(dx)
    }
}

/// A weight's rows, some at a time, as they are multiplied with n rows of x.
struct Blocks<'a> {
    reader: Reader<'a>,
    /// Its panels, if the product is one of mixed precision: they need not be turned into rows first.
    mixed: Option<&'a Panels>,
    rows: Vec<f32>,
    floats: Vec<Row>,
}

impl<'a> Blocks<'a> {
    fn new(weight: &'a FrozenWeight, n: usize) -> Result<Self> {
        let reader = Reader::new(weight)?;
        let (out, width) = weight.shape();
        let mixed = match &weight.inner.store {
            Store::Panels(panels) if Way::of(n, out, width) == Way::Vectors => Some(panels),
            _ => None,
        };
        Ok(Self { reader, mixed, rows: Vec::new(), floats: Vec::new() })
    }

    /// Rows that are multiplied together; in mixed precision so many that a gradient is summed as if all of them were.
    fn step(&self) -> usize {
        let step = self.reader.step();
        if self.mixed.is_some() { step.next_multiple_of(bf16::CHUNK) } else { step }
    }

    /// `y [+]= x · wᵀ + bias`, w the rows from row `first` on, one for each column of y.
    fn forward(&mut self, y: RowsMut<'_>, finish: Finish<'_>, x: Rows<'_>, first: usize) {
        let count = y.ncols();
        match self.panels(first, count) {
            Some(panels) => {
                let (y, output) = gemm::biased(y, finish);
                panels.forward(y, output, x);
            }
            None => product(y, finish, x, self.rows(first, count).transpose(), Threads::All),
        }
    }

    /// `dx [+]= dy · w`, w the rows from row `first` on, one for each column of dy.
    fn backward(&mut self, dx: RowsMut<'_>, finish: Finish<'_>, dy: Rows<'_>, first: usize) {
        let count = dy.ncols();
        match self.panels(first, count) {
            Some(panels) => panels.backward(dx, finish.output, dy),
            None => product(dx, finish, dy, self.rows(first, count), Threads::All),
        }
    }

    /// The panels of `count` rows from `first` on, which begins one, if they are to be multiplied so.
    fn panels(&mut self, first: usize, count: usize) -> Option<FrozenPanels<'_>> {
        let range = first / COLUMNS..(first + count).div_ceil(COLUMNS);
        let floats = self.mixed?.floats(range, &mut self.floats);
        Some(FrozenPanels { floats, width: self.reader.width })
    }

    /// `count` rows from `first` on.
    fn rows(&mut self, first: usize, count: usize) -> Rows<'_> {
        let width = self.reader.width;
        self.rows.resize(count * width, 0.0);
        self.reader.fill(first, &mut self.rows);
        gemm::rows(&self.rows, count, width)
    }
}

/// Dot products of every weight row with each of a few rows of x.
fn few_rows(
    reader: &Reader<'_>,
    x: &[f32],
    n: usize,
    out: usize,
    bias: Option<&[f32]>,
) -> Vec<f32> {
    let width = reader.width;
    work::product(n, width, out);
    // (out, n): the results of one weight row lie together, and are turned round at the end.
    let mut turned = vec![0f32; out * n];
    if turned.is_empty() {
        return turned;
    }
    let per_piece = host::rows_per_piece(width);
    let work = |(piece, y): (usize, &mut [f32])| {
        let mut scratch = vec![0f32; width];
        for (r, y) in y.chunks_exact_mut(n).enumerate() {
            let o = piece * per_piece + r;
            reader.row(o, &mut scratch);
            host::dots(x, &scratch, y);
            if let Some(bias) = bias {
                y.iter_mut().for_each(|y| *y += bias[o]);
            }
        }
    };
    turned.par_chunks_mut(per_piece * n).enumerate().for_each(work);
    if n == 1 {
        return turned;
    }
    let mut y = host::zeros(n * out);
    for (o, values) in turned.chunks_exact(n).enumerate() {
        for (i, value) in values.iter().enumerate() {
            y[i * out + o] = *value;
        }
    }
    y
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = host::values(NAME, storage, layout)?;
        let dims = layout.dims();
        let n = dims[..dims.len() - 1].iter().product();
        let shape = out_shape(layout.shape(), self.weight.shape().0);
        Ok((CpuStorage::F32(self.forward(&x, n)?), shape))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let n = x.dims()[..x.rank() - 1].iter().product();
        let dx = self.backward(&Host::new(NAME, grad)?, n)?;
        Ok(Some(host::tensor(dx, x.shape())?))
    }
}

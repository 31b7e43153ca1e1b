//! Access to CPU f32 tensors, and the loops every kernel is built from.
//!
//! Not an op: the other files use it to borrow a tensor's numbers (gathering them only when they
//! are strided), to split work over threads, to write results once, and to choose SIMD at run time.
//!
//! Results never depend on how threads are scheduled: work is split into pieces of fixed size that
//! write disjoint outputs, and partial sums are added in the order of the pieces.

use std::borrow::Cow;
use std::mem::MaybeUninit;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{CpuStorage, Device, Layout, Result, Storage, StorageRef, Tensor, bail};
use rayon::prelude::*;

/// Elements per piece of an element-wise loop: large enough to hide the cost of a rayon job, small
/// enough to stay in the second-level cache.
pub(crate) const GRAIN: usize = 16 * 1024;

/// Whether this machine multiplies and adds in one instruction; known when the kernel is compiled.
#[derive(Clone, Copy)]
pub(crate) struct Fma(bool);

impl Fma {
    /// Of what a kernel is compiled for.
    #[inline(always)]
    pub(crate) fn with<S: pulp::Simd>() -> Self {
        Self(!S::IS_SCALAR)
    }

    /// `a * b + c`
    #[inline(always)]
    pub(crate) fn of(self, a: f32, b: f32, c: f32) -> f32 {
        // Without the instruction, `mul_add` would be a slow library call.
        if self.0 { a.mul_add(b, c) } else { a * b + c }
    }
}

struct Kernel<F>(F);

impl<R, F: FnOnce(Fma) -> R> pulp::WithSimd for Kernel<F> {
    type Output = R;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> R {
        (self.0)(Fma::with::<S>())
    }
}

/// Runs `f` compiled for the widest SIMD this machine has (`f` must be `#[inline(always)]`).
#[inline(always)]
pub(crate) fn simd<R>(f: impl FnOnce(Fma) -> R) -> R {
    pulp::Arch::new().dispatch(Kernel(f))
}

/// The numbers of a CPU f32 tensor in row-major order: borrowed when contiguous, else gathered.
pub(crate) struct Host<'a> {
    storage: StorageRef<'a>,
    span: (usize, usize),
    gathered: Option<Vec<f32>>,
}

impl<'a> Host<'a> {
    /// Borrows `tensor`, or explains that `op` cannot work on it.
    pub(crate) fn new(op: &str, tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let (span, gathered) = match &*storage {
            Storage::Cpu(CpuStorage::F32(all)) => match layout.contiguous_offsets() {
                Some(span) => (span, None),
                None => ((0, 0), Some(gather(all, layout))),
            },
            Storage::Cpu(_) => bail!("{op}: works on f32 tensors only, got {:?}", tensor.dtype()),
            _ => bail!("{op}: works on the CPU only, got {:?}", tensor.device().location()),
        };
        Ok(Self { storage, span, gathered })
    }
}

impl Deref for Host<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match (&self.gathered, &*self.storage) {
            (Some(values), _) => values,
            (None, Storage::Cpu(CpuStorage::F32(all))) => &all[self.span.0..self.span.1],
            _ => &[],
        }
    }
}

/// The numbers of one argument of a candle custom op in row-major order.
pub(crate) fn values<'a>(
    op: &str,
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<Cow<'a, [f32]>> {
    let CpuStorage::F32(all) = storage else {
        use candle_core::backend::BackendStorage;
        bail!("{op}: works on f32 tensors only, got {:?}", storage.dtype())
    };
    Ok(match layout.contiguous_offsets() {
        Some((start, end)) => Cow::Borrowed(&all[start..end]),
        None => Cow::Owned(gather(all, layout)),
    })
}

/// The elements of a strided view in row-major order.
fn gather(all: &[f32], layout: &Layout) -> Vec<f32> {
    let (dims, strides) = (layout.dims(), layout.stride());
    let mut out = Vec::with_capacity(layout.shape().elem_count());
    let (Some((&inner, outer)), Some(&step)) = (dims.split_last(), strides.last()) else {
        return vec![all[layout.start_offset()]];
    };
    if layout.shape().elem_count() == 0 {
        return out;
    }
    // An odometer over all dimensions but the last.
    let mut at = vec![0usize; outer.len()];
    let mut offset = layout.start_offset();
    loop {
        match step {
            1 => out.extend_from_slice(&all[offset..offset + inner]),
            _ => out.extend((0..inner).map(|i| all[offset + i * step])),
        }
        let Some(axis) = (0..outer.len()).rev().find(|&axis| at[axis] + 1 < outer[axis]) else {
            return out;
        };
        for wrapped in axis + 1..outer.len() {
            offset -= at[wrapped] * strides[wrapped];
            at[wrapped] = 0;
        }
        at[axis] += 1;
        offset += strides[axis];
    }
}

/// Refuses tensors that are not f32 on the CPU, naming the op.
pub(crate) fn check(op: &str, tensors: &[&Tensor]) -> Result<()> {
    for tensor in tensors {
        if !tensor.device().is_cpu() {
            bail!("{op}: works on the CPU only, got {:?}", tensor.device().location());
        }
        if tensor.dtype() != candle_core::DType::F32 {
            bail!("{op}: works on f32 tensors only, got {:?}", tensor.dtype());
        }
    }
    Ok(())
}

/// The last dimension of `x`, or an error that names the op for a scalar.
pub(crate) fn last_dim(op: &str, x: &Tensor) -> Result<usize> {
    match x.dims().last() {
        Some(&d) => Ok(d),
        None => bail!("{op}: needs at least one dimension, got a scalar"),
    }
}

/// A CPU tensor that owns `values` (no copy).
pub(crate) fn tensor(values: Vec<f32>, shape: impl Into<candle_core::Shape>) -> Result<Tensor> {
    Tensor::from_vec(values, shape.into(), &Device::Cpu)
}

/// Runs `f` on one of the threads that compute. An operation that begins there shares its work out at once; from any other
/// thread it would wake a computing one and fall asleep, and of the small operations of a decoder's step that is half the
/// time. Nothing in `f` may wait for other threads.
///
/// While another caller has the place, `f` runs where it was called: a computing thread that waits for a piece of work takes
/// up whatever comes next, and a whole caption would stand between it and its own.
pub fn on_computing_thread<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    struct Place;
    impl Drop for Place {
        fn drop(&mut self) {
            TAKEN.store(false, Ordering::Release);
        }
    }
    if rayon::current_thread_index().is_some() || TAKEN.swap(true, Ordering::Acquire) {
        return f();
    }
    let _place = Place;
    rayon::scope(|_| f())
}

/// `n` zeros. Many are written by all threads: one alone would keep the others waiting.
pub(crate) fn zeros(n: usize) -> Vec<f32> {
    if n < 4 * GRAIN {
        return vec![0.0; n];
    }
    make(n, |_, piece| piece.fill(MaybeUninit::new(0.0)))
}

/// `g` of every number of `x`; what it calls must be `#[inline(always)]`, as it must be itself.
#[inline(always)]
pub(crate) fn map(x: &[f32], g: impl Fn(Fma, f32) -> f32 + Sync) -> Vec<f32> {
    make(x.len(), |start, piece| {
        simd(
            #[inline(always)]
            |f| {
                for (y, x) in piece.iter_mut().zip(&x[start..]) {
                    y.write(g(f, *x));
                }
            },
        );
    })
}

/// The same of two numbers; `b` is as long as `a`.
#[inline(always)]
pub(crate) fn map2(a: &[f32], b: &[f32], g: impl Fn(Fma, f32, f32) -> f32 + Sync) -> Vec<f32> {
    assert_eq!(a.len(), b.len(), "numbers of two tensors of one shape");
    make(a.len(), |start, piece| {
        simd(
            #[inline(always)]
            |f| {
                for ((y, a), b) in piece.iter_mut().zip(&a[start..]).zip(&b[start..]) {
                    y.write(g(f, *a, *b));
                }
            },
        );
    })
}

/// `n` numbers. `write(start, piece)` must write all of a piece.
#[inline(always)]
fn make(n: usize, write: impl Fn(usize, &mut [MaybeUninit<f32>]) + Sync) -> Vec<f32> {
    let mut all = Vec::with_capacity(n);
    for_pieces(&mut all.spare_capacity_mut()[..n], GRAIN, write);
    // SAFETY: there is room for n, and the callers, all of this file, write all of every piece.
    #[expect(unsafe_code, reason = "numbers that are written at once need not be zero before")]
    unsafe {
        all.set_len(n);
    }
    all
}

/// Calls `f(start, piece)` on pieces of `chunk` elements of `out`, in parallel if there are several.
pub(crate) fn for_pieces<T: Send>(out: &mut [T], chunk: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    let chunk = chunk.max(1);
    if out.len() <= chunk {
        if !out.is_empty() {
            f(0, out);
        }
        return;
    }
    out.par_chunks_mut(chunk).enumerate().for_each(|(i, piece)| f(i * chunk, piece));
}

/// Rows of `width` elements that make up one piece of about [`GRAIN`] elements.
pub(crate) fn rows_per_piece(width: usize) -> usize {
    (GRAIN / width.max(1)).max(1)
}

/// Sum of the columns of a row-major `(rows, width)` matrix; rows are added first to last.
pub(crate) fn column_sums(matrix: &[f32], width: usize) -> Vec<f32> {
    const COLUMNS: usize = 256;
    let mut sums = vec![0f32; width];
    if matrix.is_empty() {
        return sums;
    }
    let add = |start: usize, piece: &mut [f32]| {
        simd(
            #[inline(always)]
            |_| {
                for row in matrix.chunks_exact(width) {
                    let row = &row[start..start + piece.len()];
                    for (s, r) in piece.iter_mut().zip(row) {
                        *s += r;
                    }
                }
            },
        );
    };
    if matrix.len() < GRAIN {
        add(0, &mut sums);
    } else {
        for_pieces(&mut sums, COLUMNS, add);
    }
    sums
}

/// Lanes of the partial sums of a reduction. Fixed, so that the rounding is the same on every machine with fused multiply-adds
/// (but that of [`dots`] and [`dot_of_vectors`], which have those of its vectors).
const LANES: usize = 32;

/// Sum in [`LANES`] partial sums.
#[inline(always)]
pub(crate) fn sum(x: &[f32]) -> f32 {
    reduce(
        x,
        #[inline(always)]
        |s, x| s + x,
    )
}

/// Sum of squares of `x - mean`.
#[inline(always)]
pub(crate) fn sum_squares(f: Fma, x: &[f32], mean: f32) -> f32 {
    reduce(
        x,
        #[inline(always)]
        |s, x| f.of(x - mean, x - mean, s),
    )
}

#[inline(always)]
fn reduce(x: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut acc = [0f32; LANES];
    let (blocks, rest) = x.as_chunks::<LANES>();
    for block in blocks {
        for (a, x) in acc.iter_mut().zip(block) {
            *a = f(*a, *x);
        }
    }
    let mut tail = 0f32;
    for &x in rest {
        tail = f(tail, x);
    }
    fold(acc) + tail
}

/// Dot product in [`LANES`] partial sums.
#[inline(always)]
pub(crate) fn dot(f: Fma, x: &[f32], y: &[f32]) -> f32 {
    let n = x.len().min(y.len());
    let mut acc = [0f32; LANES];
    let (xs, x_rest) = x[..n].as_chunks::<LANES>();
    let (ys, y_rest) = y[..n].as_chunks::<LANES>();
    for (x, y) in xs.iter().zip(ys) {
        for l in 0..LANES {
            acc[l] = f.of(x[l], y[l], acc[l]);
        }
    }
    let mut tail = 0f32;
    for (x, y) in x_rest.iter().zip(y_rest) {
        tail = f.of(*x, *y, tail);
    }
    fold(acc) + tail
}

/// Dot products of `w` with each row of `x`; `w` is loaded once for four rows.
pub(crate) fn dots(x: &[f32], w: &[f32], out: &mut [f32]) {
    let width = w.len();
    let row = |r: usize| &x[r * width..][..width];
    let (fours, rest) = out.as_chunks_mut::<4>();
    let done = fours.len() * 4;
    for (i, out) in fours.iter_mut().enumerate() {
        let x = [row(4 * i), row(4 * i + 1), row(4 * i + 2), row(4 * i + 3)];
        *out = pulp::Arch::new().dispatch(Dot4 { x, w });
    }
    for (i, out) in rest.iter_mut().enumerate() {
        *out = pulp::Arch::new().dispatch(Dot { x: row(done + i), w });
    }
}

/// Dot product of few numbers, in a partial sum for each lane of the machine's vectors: many of them are in flight together.
#[inline(always)]
pub(crate) fn dot_of_vectors<S: pulp::Simd>(simd: S, x: &[f32], y: &[f32]) -> f32 {
    debug_assert_eq!(x.len(), y.len());
    let ((xs, x_rest), (ys, y_rest)) = (S::as_simd_f32s(x), S::as_simd_f32s(y));
    let mut sum = simd.splat_f32s(0.0);
    for (x, y) in xs.iter().zip(ys) {
        sum = simd.mul_add_e_f32s(*x, *y, sum);
    }
    let tail: f32 = x_rest.iter().zip(y_rest).map(|(x, y)| x * y).sum();
    simd.reduce_sum_f32s(sum) + tail
}

/// `y += factor x`, where a vector is full in one rounding if the machine can.
#[inline(always)]
pub(crate) fn add_scaled<S: pulp::Simd>(simd: S, factor: f32, x: &[f32], y: &mut [f32]) {
    debug_assert_eq!(x.len(), y.len());
    let ((xs, x_rest), (ys, y_rest)) = (S::as_simd_f32s(x), S::as_mut_simd_f32s(y));
    let all = simd.splat_f32s(factor);
    for (x, y) in xs.iter().zip(ys) {
        *y = simd.mul_add_e_f32s(all, *x, *y);
    }
    for (x, y) in x_rest.iter().zip(y_rest) {
        *y += factor * x;
    }
}

struct Dot<'a> {
    x: &'a [f32],
    w: &'a [f32],
}

impl pulp::WithSimd for Dot<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) -> f32 {
        let (x, x_rest) = S::as_simd_f32s(self.x);
        let (w, w_rest) = S::as_simd_f32s(self.w);
        let mut sums = [simd.splat_f32s(0.0); 4];
        let (xs, x_few) = x.as_chunks::<4>();
        let (ws, w_few) = w.as_chunks::<4>();
        for (x, w) in xs.iter().zip(ws) {
            sums[0] = simd.mul_add_e_f32s(x[0], w[0], sums[0]);
            sums[1] = simd.mul_add_e_f32s(x[1], w[1], sums[1]);
            sums[2] = simd.mul_add_e_f32s(x[2], w[2], sums[2]);
            sums[3] = simd.mul_add_e_f32s(x[3], w[3], sums[3]);
        }
        for (x, w) in x_few.iter().zip(w_few) {
            sums[0] = simd.mul_add_e_f32s(*x, *w, sums[0]);
        }
        let sum = simd.add_f32s(simd.add_f32s(sums[0], sums[1]), simd.add_f32s(sums[2], sums[3]));
        let tail: f32 = x_rest.iter().zip(w_rest).map(|(x, w)| x * w).sum();
        simd.reduce_sum_f32s(sum) + tail
    }
}

/// Written with explicit vectors: the compiler does not keep eight sums in registers by itself.
struct Dot4<'a> {
    x: [&'a [f32]; 4],
    w: &'a [f32],
}

impl pulp::WithSimd for Dot4<'_> {
    type Output = [f32; 4];

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) -> [f32; 4] {
        let (w, w_rest) = S::as_simd_f32s(self.w);
        let [a, b, c, d] = self.x.map(S::as_simd_f32s);
        let n = w.len();
        let (a, b, c, d) = ((&a.0[..n], a.1), (&b.0[..n], b.1), (&c.0[..n], c.1), (&d.0[..n], d.1));
        let mut sums = [simd.splat_f32s(0.0); 8];
        let mut i = 0;
        while i + 1 < n {
            let (v, u) = (w[i], w[i + 1]);
            sums[0] = simd.mul_add_e_f32s(a.0[i], v, sums[0]);
            sums[1] = simd.mul_add_e_f32s(b.0[i], v, sums[1]);
            sums[2] = simd.mul_add_e_f32s(c.0[i], v, sums[2]);
            sums[3] = simd.mul_add_e_f32s(d.0[i], v, sums[3]);
            sums[4] = simd.mul_add_e_f32s(a.0[i + 1], u, sums[4]);
            sums[5] = simd.mul_add_e_f32s(b.0[i + 1], u, sums[5]);
            sums[6] = simd.mul_add_e_f32s(c.0[i + 1], u, sums[6]);
            sums[7] = simd.mul_add_e_f32s(d.0[i + 1], u, sums[7]);
            i += 2;
        }
        if i < n {
            sums[0] = simd.mul_add_e_f32s(a.0[i], w[i], sums[0]);
            sums[1] = simd.mul_add_e_f32s(b.0[i], w[i], sums[1]);
            sums[2] = simd.mul_add_e_f32s(c.0[i], w[i], sums[2]);
            sums[3] = simd.mul_add_e_f32s(d.0[i], w[i], sums[3]);
        }
        let rest = [a.1, b.1, c.1, d.1];
        std::array::from_fn(|r| {
            let tail: f32 = rest[r].iter().zip(w_rest).map(|(x, w)| x * w).sum();
            simd.reduce_sum_f32s(simd.add_f32s(sums[r], sums[r + 4])) + tail
        })
    }
}

/// Sum of `(x - mean) * y` in [`LANES`] partial sums.
#[inline(always)]
pub(crate) fn dot_centred(f: Fma, x: &[f32], mean: f32, y: &[f32]) -> f32 {
    let n = x.len().min(y.len());
    let mut acc = [0f32; LANES];
    let (xs, x_rest) = x[..n].as_chunks::<LANES>();
    let (ys, y_rest) = y[..n].as_chunks::<LANES>();
    for (x, y) in xs.iter().zip(ys) {
        for l in 0..LANES {
            acc[l] = f.of(x[l] - mean, y[l], acc[l]);
        }
    }
    let mut tail = 0f32;
    for (x, y) in x_rest.iter().zip(y_rest) {
        tail = f.of(x - mean, *y, tail);
    }
    fold(acc) + tail
}

/// Largest element, negative infinity if there is none.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let mut acc = [f32::NEG_INFINITY; LANES];
    let (blocks, rest) = x.as_chunks::<LANES>();
    for block in blocks {
        for (a, x) in acc.iter_mut().zip(block) {
            *a = if *x > *a { *x } else { *a };
        }
    }
    let mut top = f32::NEG_INFINITY;
    for &x in acc.iter().chain(rest) {
        top = if x > top { x } else { top };
    }
    top
}

/// Sum of `exp(x - top)` in [`LANES`] partial sums.
#[inline(always)]
pub(crate) fn sum_exp(f: Fma, x: &[f32], top: f32) -> f32 {
    reduce(
        x,
        #[inline(always)]
        |s, x| s + exp(f, x - top),
    )
}

#[inline(always)]
fn fold(mut acc: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for l in 0..half {
            acc[l] += acc[l + half];
        }
        half /= 2;
    }
    acc[0]
}

/// 1.5 * 2^23: a number added to it becomes the nearest integer, ties to even, which is left in the low bits.
pub(crate) const TO_INTEGER: f32 = 12_582_912.0;

/// e^x to about 2 units in the last place; 0 below the smallest normal number.
#[inline(always)]
pub(crate) fn exp(f: Fma, x: f32) -> f32 {
    // ln 2 in two parts; the product of the first with any exponent is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let shifted = f.of(x.clamp(-87.3, 88.7), std::f32::consts::LOG2_E, TO_INTEGER);
    let n = shifted - TO_INTEGER;
    let r = f.of(n, -LN2_LOW, f.of(n, -LN2_HIGH, x));
    // Taylor's series to r^7 leaves 2e-9 on |r| <= ln(2)/2.
    let p = f.of(1.0 / 5040.0, r, 1.0 / 720.0);
    let p = f.of(p, r, 1.0 / 120.0);
    let p = f.of(p, r, 1.0 / 24.0);
    let p = f.of(p, r, 1.0 / 6.0);
    let p = f.of(p, r, 0.5);
    let p = f.of(p, r, 1.0);
    let p = f.of(p, r, 1.0);
    // 2^n, as 2 times 2^(n-1): n = 128 has no f32.
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(126 << 23));
    let y = p * power * 2.0;
    // Outside the range r is not small, so y is nonsense there; a NaN passes through r.
    let y = if x < -87.3 { 0.0 } else { y };
    if x > 88.7 { f32::INFINITY } else { y }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_zero_however_many() {
        for n in [0, 1, 4 * GRAIN - 1, 4 * GRAIN + 1, 9 * GRAIN] {
            // What they are made of has been something else before.
            drop(vec![1f32; n]);
            let zeros = zeros(n);
            assert_eq!(zeros.len(), n);
            assert!(zeros.iter().all(|x| x.to_bits() == 0));
        }
    }
}

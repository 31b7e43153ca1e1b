//! `rope`: rotary position embedding of queries and keys, in place of learned positions.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use crate::host::{self, Host, simd};

const NAME: &str = "rope";

/// Which elements of a head of width d form the pair that turns together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// `(2i, 2i + 1)`: GGUF files of the LLaMA family.
    Interleaved,
    /// `(i, i + d/2)`: Hugging Face checkpoints.
    HalfSplit,
}

/// Turns pair i of every head by `position / base^(2i/d)`; `x (b, t, heads*d)`, one position per
/// row of x (`b*t`), d even.
pub fn rope(
    x: &Tensor,
    positions: &[u32],
    heads: usize,
    base: f32,
    style: RopeStyle,
) -> Result<Tensor> {
    host::check(NAME, &[x])?;
    let &[b, t, width] = x.dims() else {
        bail!("{NAME}: x {:?} is not (b, t, heads*d)", x.shape());
    };
    if heads == 0 || !width.is_multiple_of(heads) || !(width / heads).is_multiple_of(2) {
        bail!("{NAME}: width {width} of x {:?} is not {heads} heads of even size", x.shape());
    }
    if positions.len() != b * t {
        bail!("{NAME}: {} positions for x {:?}", positions.len(), x.shape());
    }
    let d = width / heads;
    // The angle is rounded to f32 before its cosine is taken, as the checkpoints were trained.
    let rates: Vec<f32> =
        (0..d / 2).map(|i| f64::from(base).powf(-2.0 * i as f64 / d as f64) as f32).collect();
    let turns = positions
        .iter()
        .flat_map(|&p| rates.iter().map(move |rate| (p as f32 * rate).sin_cos()))
        .map(|(sin, cos)| (cos, sin))
        .collect();
    x.apply_op1(Rope { turns, width, d, style })
}

struct Rope {
    /// (cos, sin) for each row of x and each pair of a head.
    turns: Vec<(f32, f32)>,
    width: usize,
    d: usize,
    style: RopeStyle,
}

impl Rope {
    fn turn(&self, x: &[f32], sign: f32) -> Vec<f32> {
        let (width, d, half) = (self.width, self.d, self.d / 2);
        let mut y = host::zeros(x.len());
        host::for_pieces(&mut y, host::rows_per_piece(width) * width, |start, y| {
            simd(
                #[inline(always)]
                |_| {
                    let x = &x[start..start + y.len()];
                    for (r, (x, y)) in
                        x.chunks_exact(width).zip(y.chunks_exact_mut(width)).enumerate()
                    {
                        let row = start / width + r;
                        let turns = &self.turns[row * half..(row + 1) * half];
                        for (x, y) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)) {
                            match self.style {
                                RopeStyle::Interleaved => {
                                    let pairs = x.as_chunks::<2>().0.iter();
                                    let out = y.as_chunks_mut::<2>().0.iter_mut();
                                    for ((y, x), (cos, sin)) in out.zip(pairs).zip(turns) {
                                        let sin = sin * sign;
                                        *y = [x[0] * cos - x[1] * sin, x[1] * cos + x[0] * sin];
                                    }
                                }
                                RopeStyle::HalfSplit => {
                                    let (x0, x1) = x.split_at(half);
                                    let (y0, y1) = y.split_at_mut(half);
                                    let out = y0.iter_mut().zip(y1);
                                    for (((y0, y1), (x0, x1)), (cos, sin)) in
                                        out.zip(x0.iter().zip(x1)).zip(turns)
                                    {
                                        let sin = sin * sign;
                                        *y0 = x0 * cos - x1 * sin;
                                        *y1 = x1 * cos + x0 * sin;
                                    }
                                }
                            }
                        }
                    }
                },
            );
        });
        y
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = host::values(NAME, storage, layout)?;
        Ok((CpuStorage::F32(self.turn(&x, 1.0)), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        // A rotation's transpose turns back.
        Ok(Some(host::tensor(self.turn(&Host::new(NAME, grad)?, -1.0), x.shape())?))
    }
}

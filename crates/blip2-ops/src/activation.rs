//! Element by element: `gelu` (the erf form), `gelu_tanh`, `quick_gelu`, `relu`, `silu_gate`, and `add`.

use std::marker::PhantomData;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};

use crate::host::{self, Fma, GRAIN, Host, simd};

const ADD: &str = "add";
const SILU_GATE: &str = "silu_gate";

/// `x Φ(x)` with the exact normal distribution function (erf), not its tanh approximation.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    apply::<Gelu>(x)
}

/// `x σ(1.702 x)`, the approximation CLIP was trained with.
pub fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    apply::<GatedBySigmoid<false>>(x)
}

/// `x Φ(x)` by way of a hyperbolic tangent: what T5 calls `gelu_new`.
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    apply::<GatedBySigmoid<true>>(x)
}

/// `max(x, 0)`; the gradient at 0 is 0.
pub fn relu(x: &Tensor) -> Result<Tensor> {
    apply::<Relu>(x)
}

/// `x + y`, both of the same shape.
pub fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    host::check(ADD, &[x, y])?;
    if x.dims() != y.dims() {
        bail!("{ADD}: {:?} and {:?} differ in shape", x.shape(), y.shape());
    }
    x.apply_op2(y, Add)
}

/// `silu(gate) · up` with `silu(x) = x σ(x)`; both of the same shape.
pub fn silu_gate(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    host::check(SILU_GATE, &[gate, up])?;
    if gate.dims() != up.dims() {
        bail!("{SILU_GATE}: gate {:?} and up {:?} differ in shape", gate.shape(), up.shape());
    }
    gate.apply_op2(up, SiluGate)
}

/// The normal distribution function at x, and `exp(-x²/2)`.
///
/// `Φ(-|x|) = exp(-x²/2) t p(t) / 2` with `t = 1 / (1 + 0.35 |x|/√2)`; p is a minimax fit whose
/// relative error is 5e-7, so that gelu is within 3e-7 of the truth everywhere.
#[inline(always)]
fn normal_cdf(f: Fma, x: f32) -> (f32, f32) {
    let t = 1.0 / (1.0 + 0.35 * std::f32::consts::FRAC_1_SQRT_2 * x.abs());
    let p = -0.075_763_29;
    let p = f.of(p, t, 0.162_547_35);
    let p = f.of(p, t, 0.051_340_424);
    let p = f.of(p, t, 0.103_309_68);
    let p = f.of(p, t, 0.185_449_48);
    let p = f.of(p, t, 0.176_906_4);
    let p = f.of(p, t, 0.198_827_22);
    let p = f.of(p, t, 0.197_382_23);
    let bell = host::exp(f, -0.5 * x * x);
    let tail = 0.5 * p * t * bell;
    (if x < 0.0 { tail } else { 1.0 - tail }, bell)
}

#[inline(always)]
fn sigmoid(f: Fma, x: f32) -> f32 {
    1.0 / (1.0 + host::exp(f, -x))
}

/// A function of one number, and what it makes of a gradient. Both must be `#[inline(always)]`.
trait Pointwise {
    const NAME: &'static str;
    fn value(f: Fma, x: f32) -> f32;
    fn gradient(f: Fma, x: f32, g: f32) -> f32;
}

/// The op of a [`Pointwise`] function.
struct Map<P>(PhantomData<fn() -> P>);

fn apply<P: Pointwise + 'static>(x: &Tensor) -> Result<Tensor> {
    host::check(P::NAME, &[x])?;
    x.apply_op1(Map::<P>(PhantomData))
}

impl<P: Pointwise> CustomOp1 for Map<P> {
    fn name(&self) -> &'static str {
        P::NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = host::values(P::NAME, storage, layout)?;
        let y = host::map(
            &x,
            #[inline(always)]
            |f, x| P::value(f, x),
        );
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (xs, gs) = (Host::new(P::NAME, x)?, Host::new(P::NAME, grad)?);
        let dx = host::map2(
            &xs,
            &gs,
            #[inline(always)]
            |f, x, g| P::gradient(f, x, g),
        );
        Ok(Some(host::tensor(dx, x.shape())?))
    }
}

struct Gelu;

impl Pointwise for Gelu {
    const NAME: &'static str = "gelu";

    #[inline(always)]
    fn value(f: Fma, x: f32) -> f32 {
        x * normal_cdf(f, x).0
    }

    #[inline(always)]
    fn gradient(f: Fma, x: f32, g: f32) -> f32 {
        const DENSITY: f32 = 0.398_942_3; // 1 / √(2π)
        let (cdf, bell) = normal_cdf(f, x);
        g * (cdf + x * bell * DENSITY)
    }
}

/// `x σ(z)`: GELU's approximations differ in z. `(1 + tanh u) / 2` is `σ(2u)`.
struct GatedBySigmoid<const TANH: bool>;

impl<const TANH: bool> GatedBySigmoid<TANH> {
    /// z, and its derivative.
    #[inline(always)]
    fn z(x: f32) -> (f32, f32) {
        /// The slope inside the sigmoid.
        const QUICK: f32 = 1.702;
        /// 2 √(2/π), and the weight of the cube.
        const SLOPE: f32 = 1.595_769;
        const CUBE: f32 = 0.044_715;
        if TANH {
            (SLOPE * (x + CUBE * x * x * x), SLOPE * (1.0 + 3.0 * CUBE * x * x))
        } else {
            (QUICK * x, QUICK)
        }
    }
}

impl<const TANH: bool> Pointwise for GatedBySigmoid<TANH> {
    const NAME: &'static str = if TANH { "gelu_tanh" } else { "quick_gelu" };

    #[inline(always)]
    fn value(f: Fma, x: f32) -> f32 {
        x * sigmoid(f, Self::z(x).0)
    }

    #[inline(always)]
    fn gradient(f: Fma, x: f32, g: f32) -> f32 {
        let (z, slope) = Self::z(x);
        let s = sigmoid(f, z);
        g * (s + slope * x * s * (1.0 - s))
    }
}

struct Relu;

impl Pointwise for Relu {
    const NAME: &'static str = "relu";

    #[inline(always)]
    fn value(_: Fma, x: f32) -> f32 {
        // A comparison, so that NaN stays what it is.
        if x < 0.0 { 0.0 } else { x }
    }

    #[inline(always)]
    fn gradient(_: Fma, x: f32, g: f32) -> f32 {
        if x > 0.0 { g } else { 0.0 }
    }
}

struct Add;

impl CustomOp2 for Add {
    fn name(&self) -> &'static str {
        ADD
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, y) = (host::values(ADD, s1, l1)?, host::values(ADD, s2, l2)?);
        let sum = host::map2(
            &x,
            &y,
            #[inline(always)]
            |_, x, y| x + y,
        );
        Ok((CpuStorage::F32(sum), l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let take = |tracked: bool| tracked.then(|| grad.clone());
        Ok((take(x.track_op()), take(y.track_op())))
    }
}

struct SiluGate;

impl CustomOp2 for SiluGate {
    fn name(&self) -> &'static str {
        SILU_GATE
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let gate = host::values(SILU_GATE, s1, l1)?;
        let up = host::values(SILU_GATE, s2, l2)?;
        let y = host::map2(
            &gate,
            &up,
            #[inline(always)]
            |f, gate, up| gate * sigmoid(f, gate) * up,
        );
        Ok((CpuStorage::F32(y), l1.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let gates = Host::new(SILU_GATE, gate)?;
        let (ups, gs) = (Host::new(SILU_GATE, up)?, Host::new(SILU_GATE, grad)?);
        let (gates, ups, gs) = (&*gates, &*ups, &*gs);
        let mut d_gate = host::zeros(if gate.track_op() { gs.len() } else { 0 });
        host::for_pieces(&mut d_gate, GRAIN, |start, d_gate| {
            simd(
                #[inline(always)]
                |f| {
                    let inputs = gates[start..].iter().zip(&ups[start..]).zip(&gs[start..]);
                    for (d, ((x, up), g)) in d_gate.iter_mut().zip(inputs) {
                        let s = sigmoid(f, *x);
                        *d = g * up * (s + x * s * (1.0 - s));
                    }
                },
            );
        });
        let d_up = up.track_op().then(|| {
            host::map2(
                gates,
                gs,
                #[inline(always)]
                |f, gate, g| g * gate * sigmoid(f, gate),
            )
        });
        let d_gate = gate.track_op().then(|| host::tensor(d_gate, gate.shape())).transpose()?;
        let d_up = d_up.map(|d| host::tensor(d, up.shape())).transpose()?;
        Ok((d_gate, d_up))
    }
}

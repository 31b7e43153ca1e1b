//! How long the ops take, forward and with gradients, for shapes of the mini model.
//!
//! Run with: `RAYON_NUM_THREADS=2 cargo run --release -p blip2-ops --example bench_ops [NAME]`
//! The same in PyTorch: `python benches/ops_pytorch.py`.

use std::time::{Duration, Instant};

use blip2_ops::{
    AdamW, DropoutKey, FrozenWeight, Heads, WeightFormat, adamw_step, attention, cross_entropy,
    dropout, frozen_linear, gelu, layer_norm, linear,
};
use candle_core::{Device, Result, Tensor, Var};

fn best(name: &str, mut step: impl FnMut() -> Result<()>) -> Result<()> {
    if std::env::args().nth(1).is_some_and(|filter| !name.contains(&filter)) {
        return Ok(());
    }
    step()?;
    step()?;
    let end = Instant::now() + Duration::from_millis(1500);
    let mut times = Vec::new();
    while Instant::now() < end || times.len() < 5 {
        let start = Instant::now();
        step()?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    println!("{name:32} {:8.3} ms   median {:8.3}", times[0], times[times.len() / 2]);
    Ok(())
}

fn normal(shape: &[usize]) -> Result<Tensor> {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu)
}

/// Times `op` without and with gradients of all inputs.
fn train(name: &str, shapes: &[&[usize]], op: impl Fn(&[Tensor]) -> Result<Tensor>) -> Result<()> {
    let fixed: Vec<Tensor> = shapes.iter().map(|s| normal(s)).collect::<Result<_>>()?;
    best(&format!("{name} fwd"), || op(&fixed).map(drop))?;
    let vars: Vec<Var> = fixed.iter().map(Var::from_tensor).collect::<Result<_>>()?;
    let inputs: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let dy = normal(op(&inputs)?.dims())?;
    best(&format!("{name} fwd+bwd"), || {
        // The upstream gradient enters as the gradient of a constant product: one pass more than
        // PyTorch's `backward(dy)` has.
        (op(&inputs)? * &dy)?.sum_all()?.backward().map(drop)
    })
}

fn main() -> Result<()> {
    train("linear 1024x384x1536", &[&[1024, 384], &[1536, 384], &[1536]], |a| {
        linear(&a[0], &a[1], Some(&a[2]))
    })?;
    train("linear 1536x384x384", &[&[1536, 384], &[384, 384], &[384]], |a| {
        linear(&a[0], &a[1], Some(&a[2]))
    })?;
    let heads = Heads { heads: 12, kv_heads: 12, scale: 32f32.powf(-0.5) };
    train("attention 32x48x12x32", &[&[32, 48, 384][..]; 3], |a| {
        attention(&a[0], &a[1], &a[2], None, heads, None)
    })?;
    let key = DropoutKey { p: 0.1, seed: 1 };
    train("attention 32x48x12x32 dropout", &[&[32, 48, 384][..]; 3], |a| {
        attention(&a[0], &a[1], &a[2], None, heads, Some(key))
    })?;
    train("layer_norm 1536x384", &[&[1536, 384], &[384], &[384]], |a| {
        layer_norm(&a[0], &a[1], &a[2], 1e-5)
    })?;
    train("gelu 1536x1536", &[&[1536, 1536]], |a| gelu(&a[0]))?;
    train("dropout 1536x384", &[&[1536, 384]], |a| dropout(&a[0], key))?;
    let targets: Vec<u32> = (0..512).map(|i| i * 59).collect();
    train("ce 512x30523", &[&[512, 30523]], |a| cross_entropy(&a[0], &targets, 0.1))?;

    let p = Var::from_tensor(&normal(&[30523, 384])?)?;
    let grad = normal(&[30523, 384])?;
    let (mut m, mut v) = (vec![0f32; p.elem_count()], vec![0f32; p.elem_count()]);
    let mut numbers = AdamW {
        lr: 1e-4,
        beta1: 0.9,
        beta2: 0.98,
        eps: 1e-8,
        weight_decay: 0.05,
        step: 0,
        grad_scale: 1.0,
    };
    best("adamw 11.7M", || {
        numbers.step += 1;
        adamw_step(&p, &grad, &mut m, &mut v, &numbers)
    })?;

    for format in WeightFormat::ALL {
        let weight = FrozenWeight::new(&normal(&[1536, 576])?, format)?;
        for n in [1, 5, 64, 1024] {
            let x = normal(&[n, 576])?;
            let name = format!("{} {n}x576x1536", weight.format_name());
            best(&name, || frozen_linear(&x, &weight, None).map(drop))?;
        }
        let x = Var::from_tensor(&normal(&[1024, 576])?)?;
        let dy = normal(&[1024, 1536])?;
        best(&format!("{} 1024 fwd+dx", weight.format_name()), || {
            (frozen_linear(&x, &weight, None)? * &dy)?.sum_all()?.backward().map(drop)
        })?;
    }
    Ok(())
}

//! How long the ops take, forward and with gradients, for shapes of the mini model.
//!
//! Run with: `RAYON_NUM_THREADS=2 cargo run --release -p blip2-ops --example bench_ops [NAME]`
//! The same in PyTorch: `python benches/ops_pytorch.py`.

#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

use std::time::{Duration, Instant};

use blip2_ops::{
    AdamW, DropoutKey, FrozenWeight, Heads, WeightFormat, adamw_step, attention, cross_entropy,
    dropout, frozen_linear, gelu, layer_norm, linear,
};
use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor, Var};

/// Processor time of all threads so far: unlike the clock, it does not count other programs. 0 where
/// the system does not tell.
fn cpu_seconds() -> f64 {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return 0.0 };
    let one = |task: std::fs::DirEntry| {
        let stat = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        stat.split(' ').next()?.parse::<f64>().ok()
    };
    tasks.flatten().filter_map(one).sum::<f64>() / 1e9
}

/// How long each is repeated: the second argument in seconds, 1.5 if there is none.
fn seconds() -> Duration {
    let given = std::env::args().nth(2).and_then(|s| s.parse().ok());
    Duration::from_secs_f64(given.unwrap_or(1.5))
}

/// Whether the benchmark's name contains the first argument.
fn chosen(name: &str) -> bool {
    std::env::args().nth(1).is_none_or(|filter| name.contains(&filter))
}

fn best(name: &str, mut step: impl FnMut() -> Result<()>) -> Result<()> {
    if !chosen(name) {
        return Ok(());
    }
    step()?;
    step()?;
    let end = Instant::now() + seconds();
    let mut times = Vec::new();
    let cpu = cpu_seconds();
    while Instant::now() < end || times.len() < 5 {
        let start = Instant::now();
        step()?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let cpu = (cpu_seconds() - cpu) * 1e3 / times.len() as f64;
    times.sort_by(f64::total_cmp);
    let (best, median) = (times[0], times[times.len() / 2]);
    println!("{name:32} best {best:8.3} ms   median {median:8.3}   cpu {cpu:8.3}");
    Ok(())
}

/// A scalar whose gradient is `dy`: what `y.backward(dy)` is in PyTorch.
struct Upstream(Tensor);

impl CustomOp1 for Upstream {
    fn name(&self) -> &'static str {
        "upstream"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

fn normal(shape: &[usize]) -> Result<Tensor> {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu)
}

/// Times `op` without and with gradients of all inputs.
fn train(name: &str, shapes: &[&[usize]], op: impl Fn(&[Tensor]) -> Result<Tensor>) -> Result<()> {
    if !chosen(&format!("{name} fwd")) && !chosen(&format!("{name} fwd+bwd")) {
        return Ok(());
    }
    let fixed: Vec<Tensor> = shapes.iter().map(|s| normal(s)).collect::<Result<_>>()?;
    best(&format!("{name} fwd"), || op(&fixed).map(drop))?;
    let vars: Vec<Var> = fixed.iter().map(Var::from_tensor).collect::<Result<_>>()?;
    let inputs: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let dy = normal(op(&inputs)?.dims())?;
    best(&format!("{name} fwd+bwd"), || {
        op(&inputs)?.apply_op1(Upstream(dy.clone()))?.backward().map(drop)
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
            let y = frozen_linear(&x, &weight, None)?;
            y.apply_op1(Upstream(dy.clone()))?.backward().map(drop)
        })?;
    }
    Ok(())
}

//! `blip2 bench`: how long each part of a caption takes on this machine, beside what the machine could do.
//!
//! The floor of a part is the longer of two times: its arithmetic at the rate of a large product with weights in the same
//! format, and its weights and keys at the rate memory is read, both measured in the same run. What a part computes and
//! reads is counted while it runs.

use std::time::Instant;

use blip2::generate::{Beam, Hypothesis, Options, Strategy};
use blip2::image::Rgb;
use blip2::model::Captioner;
use blip2_ops::{FrozenWeight, WeightFormat, Work, frozen_linear};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::cli::{BenchArgs, Format, Global};
use crate::pictures::{self, pixels};
use crate::{Outcome, caption, memory, model, output};

pub(crate) fn run(global: &Global, args: &BenchArgs) -> anyhow::Result<Outcome> {
    let opened = model::open(&global.model)?;
    // A picture that can't be read shows before minutes are spent on the model.
    let side = opened.manifest.vision.config.image_size;
    args.image
        .as_deref()
        .map(|path| pictures::read_one(path, pixels(args.hf_pixels), side))
        .transpose()?;
    let start = Instant::now();
    let captioner = model::captioner(global, &opened)?;
    let loading = start.elapsed().as_secs_f64();
    let prompt = args.prompt.as_deref().unwrap_or_else(|| captioner.caption_prompt());
    let (parts, captions) = Bench { captioner: &captioner, args, prompt, side }.parts()?;
    let report = Report {
        model: opened.manifest.name.clone(),
        weights: global.weights.0.map_or("auto", WeightFormat::as_str),
        args,
        loading,
        // Before memory is taken to measure the machine.
        peak_bytes: memory::peak(),
        limits: Limits::measure(global.weights.0.unwrap_or(WeightFormat::F32))?,
        parts,
        captions,
    };
    let format = if args.json { Format::Jsonl } else { global.format };
    output::line(format, &report.json(&captioner)?, &report.text())?;
    Ok(Outcome::AllFine)
}

/// What this machine can do, with the threads that were asked for.
struct Limits {
    /// Operations a second, in a product large enough to keep every thread busy.
    flops: f64,
    /// Bytes read a second, from more memory than most caches hold.
    bytes: f64,
}

impl Limits {
    fn measure(format: WeightFormat) -> anyhow::Result<Self> {
        const TRIES: usize = 5;
        let (n, width, out) = (512, 1024, 4096);
        let weight = Tensor::ones((out, width), DType::F32, &Device::Cpu)?;
        let weight = FrozenWeight::new(&weight, format)?.fast();
        let x = Tensor::ones((n, width), DType::F32, &Device::Cpu)?;
        let product = best(TRIES, || Ok(frozen_linear(&x, &weight, None).map(drop)?))?;
        let memory = vec![1u64; 64 << 20];
        let reading = best(TRIES, || {
            let sums = memory.par_chunks(1 << 18).map(|part| part.iter().fold(0, |a, b| a ^ b));
            std::hint::black_box(sums.reduce(|| 0, |a, b| a ^ b));
            Ok(())
        })?;
        Ok(Self {
            flops: (2 * n * width * out) as f64 / product,
            bytes: size_of_val(&*memory) as f64 / reading,
        })
    }

    /// The least seconds that `cost` can take here.
    fn floor(&self, cost: Cost) -> f64 {
        (cost.flops / self.flops).max(cost.bytes / self.bytes)
    }
}

/// The shortest of several runs, in seconds.
fn best(tries: usize, mut work: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let mut shortest = f64::INFINITY;
    for _ in 0..tries {
        let start = Instant::now();
        work()?;
        shortest = shortest.min(start.elapsed().as_secs_f64());
    }
    Ok(shortest)
}

/// What something took.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cost {
    seconds: f64,
    flops: f64,
    bytes: f64,
}

impl Cost {
    /// The median time of `repeat` runs, behind one that warms up and is counted, and what the last of them gave.
    fn of<T>(
        repeat: u16,
        mut work: impl FnMut() -> anyhow::Result<T>,
    ) -> anyhow::Result<(Self, T)> {
        let before = Work::so_far();
        let mut result = work()?;
        let done = Work::so_far().since(before);
        let mut times = Vec::new();
        for _ in 0..repeat {
            let start = Instant::now();
            let latest = work()?;
            times.push(start.elapsed().as_secs_f64());
            result = latest;
        }
        let cost =
            Self { seconds: median(times), flops: done.flops as f64, bytes: done.bytes as f64 };
        Ok((cost, result))
    }

    /// What each of `n` further steps took, if `self` did them and `less` did not.
    fn step(self, less: Self, n: f64) -> Self {
        let each = |all: f64, less: f64| (all - less).max(0.0) / n;
        Self {
            seconds: each(self.seconds, less.seconds),
            flops: each(self.flops, less.flops),
            bytes: each(self.bytes, less.bytes),
        }
    }
}

/// The middle one, or the mean of the two in the middle.
fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    let (low, high) = ((times.len() - 1) / 2, times.len() / 2);
    f64::midpoint(times[low], times[high])
}

/// A part of the way from a file to its caption.
struct Part {
    name: &'static str,
    cost: Cost,
}

/// What is measured.
struct Bench<'a> {
    captioner: &'a Captioner,
    args: &'a BenchArgs,
    prompt: &'a str,
    side: usize,
}

impl Bench<'_> {
    /// Every part, and the captions of the last run.
    fn parts(&self) -> anyhow::Result<(Vec<Part>, Vec<Vec<Hypothesis>>)> {
        let Self { captioner, args, .. } = *self;
        let prompts = vec![self.prompt; args.batch_size.into()];
        let mut parts = Vec::new();
        let (cost, pixels) =
            Cost::of(args.repeat, || Ok(captioner.vision().pixels(&self.pictures()?)?))?;
        if args.image.is_some() {
            parts.push(Part { name: "decode + resize", cost });
        }
        let (cost, patches) =
            Cost::of(args.repeat, || Ok(captioner.vision().features(&pixels)?))?;
        parts.push(Part { name: "image encoder", cost });
        let (cost, soft) = Cost::of(args.repeat, || Ok(captioner.soft_words(&patches, &prompts)?))?;
        parts.push(Part { name: "q-former", cost });

        let search = |tokens| {
            let options = self.options(tokens);
            Cost::of(args.repeat, || Ok(captioner.generate_after(&soft, &prompts, &options)?))
        };
        let (one, _) = search(1)?;
        let (all, _) = search(args.max_new_tokens)?;
        parts.push(Part { name: "prefill", cost: one });
        let further = f64::from(args.max_new_tokens - 1);
        if further > 0.0 {
            parts.push(Part { name: "decode, a token", cost: all.step(one, further) });
        }
        let options = self.options(args.max_new_tokens);
        let (cost, captions) = Cost::of(args.repeat, || {
            Ok(captioner.generate(&self.pictures()?, &prompts, &options)?)
        })?;
        parts.push(Part { name: "whole caption", cost });
        Ok((parts, captions))
    }

    /// The file as often as there are pictures in a batch, else grey noise.
    fn pictures(&self) -> anyhow::Result<Vec<Rgb>> {
        let batch: usize = self.args.batch_size.into();
        if let Some(path) = &self.args.image {
            let pixels = pixels(self.args.hf_pixels);
            let read = |_| pictures::read_one(path, pixels, self.side);
            return (0..batch).into_par_iter().map(read).collect();
        }
        let side = self.side as u32;
        let noise = |i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8;
        let picture = |b: usize| Rgb {
            width: side,
            height: side,
            data: (0..side * side * 3).map(|i| noise(i + b as u32)).collect(),
        };
        Ok((0..batch).map(picture).collect())
    }

    /// Exactly so many tokens: what is measured must not depend on what the model says.
    fn options(&self, tokens: u16) -> Options {
        let num_beams = self.args.num_beams.into();
        Options {
            strategy: Strategy::Beam(Beam { num_beams, ..Beam::default() }),
            max_new_tokens: tokens.into(),
            min_new_tokens: tokens.into(),
            ..Options::default()
        }
    }
}

/// What was found.
struct Report<'a> {
    model: String,
    weights: &'static str,
    args: &'a BenchArgs,
    loading: f64,
    peak_bytes: Option<u64>,
    limits: Limits,
    parts: Vec<Part>,
    captions: Vec<Vec<Hypothesis>>,
}

impl Report<'_> {
    fn json(&self, captioner: &Captioner) -> anyhow::Result<Value> {
        let parts = self.parts.iter().map(|Part { name, cost }| {
            json!({
                "part": name,
                "seconds": cost.seconds,
                "flops": cost.flops,
                "bytes": cost.bytes,
                "floor_seconds": self.limits.floor(*cost),
            })
        });
        let best = |captions: &Vec<Hypothesis>| -> anyhow::Result<Option<Value>> {
            let first = captions.first();
            first.map(|c| Ok(caption::describe(&captioner.text(c)?, c))).transpose()
        };
        let captions = self.captions.iter().map(best).collect::<anyhow::Result<Vec<_>>>()?;
        Ok(json!({
            "model": self.model,
            "weights": self.weights,
            "threads": rayon::current_num_threads(),
            "batch_size": self.args.batch_size,
            "num_beams": self.args.num_beams,
            "max_new_tokens": self.args.max_new_tokens,
            "repeat": self.args.repeat,
            "loading_seconds": self.loading,
            "peak_bytes": self.peak_bytes,
            "limits": {"flops_per_second": self.limits.flops, "bytes_per_second": self.limits.bytes},
            "parts": parts.collect::<Vec<_>>(),
            "captions": captions,
        }))
    }

    fn text(&self) -> String {
        let Self { model, weights, args, limits, .. } = self;
        let plural = |n: u16, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        let peak = self.peak_bytes.map_or_else(String::new, |bytes| {
            format!(", most memory {:.2} GB", bytes as f64 / 1e9)
        });
        let mut lines = vec![
            format!(
                "{model}, weights {weights}: {}, {}, {}; median of {}",
                plural(args.batch_size, "picture"),
                plural(args.num_beams, "beam"),
                plural(args.max_new_tokens, "token"),
                plural(args.repeat, "run"),
            ),
            format!("loaded in {:.1} s{peak}", self.loading),
            format!(
                "{}: {:.0} GFLOP/s in a large product, {:.1} GB/s read\n",
                plural(rayon::current_num_threads() as u16, "thread"),
                limits.flops / 1e9,
                limits.bytes / 1e9
            ),
            format!(
                "{:<16}{:>11}{:>9}{:>10}{:>9}{:>8}{:>11}{:>10}",
                "part", "ms", "GFLOP", "GFLOP/s", "GB read", "GB/s", "floor ms", "of floor"
            ),
        ];
        for Part { name, cost } in &self.parts {
            let Cost { seconds, flops, bytes } = *cost;
            let mut line = format!("{name:<16}{:>11.2}", seconds * 1e3);
            // Pictures are no products: there is no floor to compare with.
            if flops > 0.0 {
                let floor = limits.floor(*cost);
                line += &format!(
                    "{:>9.2}{:>10.1}{:>9.3}{:>8.1}{:>11.2}{:>9.0}%",
                    flops / 1e9,
                    flops / seconds / 1e9,
                    bytes / 1e9,
                    bytes / seconds / 1e9,
                    floor * 1e3,
                    floor / seconds * 100.0
                );
            }
            lines.push(line);
        }
        if let Some(whole) = self.parts.last() {
            let rate = f64::from(args.batch_size) / whole.cost.seconds;
            lines.push(format!("\n{rate:.2} pictures a second"));
        }
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_the_difference_shared_out() {
        let one = Cost { seconds: 1.0, flops: 10.0, bytes: 4.0 };
        let all = Cost { seconds: 4.0, flops: 40.0, bytes: 4.0 };
        assert_eq!(all.step(one, 3.0), Cost { seconds: 1.0, flops: 10.0, bytes: 0.0 });
        assert_eq!(one.step(all, 3.0).seconds, 0.0, "noise must not give negative times");
    }

    #[test]
    fn the_floor_is_the_slower_of_arithmetic_and_memory() {
        let limits = Limits { flops: 100.0, bytes: 10.0 };
        assert_eq!(limits.floor(Cost { seconds: 9.0, flops: 200.0, bytes: 10.0 }), 2.0);
        assert_eq!(limits.floor(Cost { seconds: 9.0, flops: 200.0, bytes: 50.0 }), 5.0);
    }

    #[test]
    fn the_cost_is_of_one_run() {
        let weight = Tensor::ones((8, 4), DType::F32, &Device::Cpu).unwrap();
        let weight = FrozenWeight::new(&weight, WeightFormat::F32).unwrap();
        let x = Tensor::ones((3, 4), DType::F32, &Device::Cpu).unwrap();
        let (cost, y) = Cost::of(5, || Ok(frozen_linear(&x, &weight, None)?)).unwrap();
        // Other tests of this process may run at the same time and only add to it.
        assert!(cost.flops >= 2.0 * 3.0 * 4.0 * 8.0 && cost.bytes >= 128.0);
        assert_eq!(y.dims(), [3, 8]);
    }
}

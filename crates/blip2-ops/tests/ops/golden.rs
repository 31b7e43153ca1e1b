//! Forward and gradients equal PyTorch's.

use std::collections::HashMap;

use blip2_ops::{
    AdamW, Heads, IGNORE, RopeStyle, adamw_step, attention, cross_entropy, embedding, gelu,
    l2_normalize, layer_norm, linear, quick_gelu, rms_norm, rope, silu_gate, soft_cross_entropy,
};
use candle_core::{Device, Result, Tensor, Var};

use crate::common::{close, strided, var};

const FORWARD: f32 = 1e-5;
const GRADIENT: f32 = 5e-5;

struct Golden(HashMap<String, Tensor>);

impl Golden {
    fn load() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../golden/ops.safetensors");
        Self(candle_core::safetensors::load(path, &Device::Cpu).unwrap())
    }

    fn get(&self, name: &str) -> &Tensor {
        self.0.get(name).unwrap_or_else(|| panic!("golden/ops.safetensors lacks {name}"))
    }

    /// Runs `op` on the inputs named `args`, once as they are and once strided.
    fn check(&self, case: &str, args: &[&str], op: impl Fn(&[Tensor]) -> Result<Tensor>) {
        for lay in [false, true] {
            let vars: Vec<Var> =
                args.iter().map(|a| var(self.get(&format!("{case}.in.{a}")))).collect();
            let inputs: Vec<Tensor> = vars
                .iter()
                .map(|v| match lay {
                    false => v.as_tensor().clone(),
                    true => strided(v),
                })
                .collect();
            let y = op(&inputs).unwrap();
            close(&format!("{case}.y"), &y, self.get(&format!("{case}.y")), FORWARD);
            let dy = self.get(&format!("{case}.dy"));
            let grads = (&y * dy).unwrap().sum_all().unwrap().backward().unwrap();
            for (arg, v) in args.iter().zip(&vars) {
                let name = format!("{case}.d.{arg}");
                let grad = grads.get(v).unwrap_or_else(|| panic!("no {name}"));
                close(&name, grad, self.get(&name), GRADIENT);
            }
        }
    }
}

#[test]
fn linear_and_norms() {
    let golden = Golden::load();
    golden.check("linear", &["x", "weight", "bias"], |a| linear(&a[0], &a[1], Some(&a[2])));
    golden.check("layer_norm", &["x", "weight", "bias"], |a| layer_norm(&a[0], &a[1], &a[2], 1e-6));
    golden.check("rms_norm", &["x", "weight"], |a| rms_norm(&a[0], &a[1], 1e-5));
    golden.check("l2_normalize", &["x"], |a| l2_normalize(&a[0]));
}

#[test]
fn activations() {
    let golden = Golden::load();
    golden.check("gelu", &["x"], |a| gelu(&a[0]));
    golden.check("quick_gelu", &["x"], |a| quick_gelu(&a[0]));
    golden.check("silu_gate", &["gate", "up"], |a| silu_gate(&a[0], &a[1]));
}

#[test]
fn attention_in_three_regimes() {
    let golden = Golden::load();
    let cases = [
        ("attention_padding", 4, 4, 5f32.powf(-0.5)),
        ("attention_grouped", 6, 2, 8f32.powf(-0.5)),
        ("attention_bias", 3, 3, 1.0),
    ];
    for (case, heads, kv_heads, scale) in cases {
        let bias = golden.get(&format!("{case}.in.bias"));
        golden.check(case, &["q", "k", "v"], |a| {
            let heads = Heads { heads, kv_heads, scale };
            attention(&a[0], &a[1], &a[2], Some(bias), heads, None)
        });
    }
}

#[test]
fn rope_and_embedding() {
    let golden = Golden::load();
    let positions = [0, 1, 2, 3, 4, 3, 3, 5, 17, 40];
    let styles =
        [("rope_interleaved", RopeStyle::Interleaved), ("rope_half_split", RopeStyle::HalfSplit)];
    for (case, style) in styles {
        golden.check(case, &["x"], |a| rope(&a[0], &positions, 3, 10_000.0, style));
    }
    let ids = Tensor::new(&[[3u32, 0, 3], [10, 3, 7]], &Device::Cpu).unwrap();
    golden.check("embedding", &["table"], |a| embedding(&a[0], &ids));
}

#[test]
fn losses() {
    let golden = Golden::load();
    let targets = [4, IGNORE, 0, 36, 4, IGNORE, 11];
    golden.check("cross_entropy", &["logits"], |a| cross_entropy(&a[0], &targets, 0.0));
    golden.check("cross_entropy_smooth", &["logits"], |a| cross_entropy(&a[0], &targets, 0.1));
    let soft = golden.get("soft_cross_entropy.in.targets");
    golden.check("soft_cross_entropy", &["logits"], |a| soft_cross_entropy(&a[0], soft));
}

#[test]
fn five_adamw_steps() {
    let golden = Golden::load();
    let param = var(golden.get("adamw.start"));
    let n = param.elem_count();
    let (mut m, mut v) = (vec![0f32; n], vec![0f32; n]);
    for i in 0..5 {
        let numbers = AdamW {
            lr: 1e-2 * (i + 1) as f64,
            beta1: 0.9,
            beta2: 0.98,
            eps: 1e-8,
            weight_decay: 0.05,
            step: i as u64 + 1,
            grad_scale: 0.5,
        };
        let grad = (golden.get("adamw.grads").get(i).unwrap() * 2.0).unwrap();
        adamw_step(&param, &strided(&grad), &mut m, &mut v, &numbers).unwrap();
        close("adamw", &param, &golden.get("adamw.steps").get(i).unwrap(), 1e-6);
    }
}

//! Hand-written gradients equal differences of the forward pass, also for strided inputs.

use blip2_ops::{
    DropoutKey, FrozenWeight, Heads, IGNORE, RopeStyle, SingleProcess, WeightFormat, add,
    all_gather, attention, cross_entropy, dropout, embedding, frozen_linear, gelu, gelu_tanh,
    l2_normalize, layer_norm, linear, quick_gelu, relu, rms_norm, rope, silu_gate,
    soft_cross_entropy,
};
use candle_core::{Device, Result, Tensor, Var};

use crate::common::{list, numbers, strided};

/// Checks the gradient of `Σ dy · op(inputs)` in every element of every input.
fn check(name: &str, inputs: &[Tensor], op: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let dy = numbers(99, op(inputs).unwrap().dims());
    for lay in [false, true] {
        let vars: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
        let arrange = |t: &Tensor| if lay { strided(t) } else { t.clone() };
        let args: Vec<Tensor> = vars.iter().map(|v| arrange(v)).collect();
        let y = op(&args).unwrap();
        let dy_arg = arrange(&dy);
        let grads = (&y * &dy_arg).unwrap().sum_all().unwrap().backward().unwrap();

        let loss = |which: usize, element: usize, shift: f32| -> f64 {
            let mut moved = inputs.to_vec();
            let mut values = list(&inputs[which]);
            values[element] += shift;
            moved[which] = Tensor::from_vec(values, inputs[which].dims(), &Device::Cpu).unwrap();
            let y = list(&op(&moved).unwrap());
            y.iter().zip(list(&dy)).map(|(y, d)| f64::from(*y) * f64::from(d)).sum()
        };
        for (which, v) in vars.iter().enumerate() {
            let grad = list(grads.get(v).unwrap_or_else(|| panic!("{name}: input {which}: none")));
            let size = grad.iter().fold(1f32, |a, g| a.max(g.abs()));
            for (element, grad) in grad.iter().enumerate() {
                // Five points: the error is of fourth order in the step, far below f32's rounding.
                let h = 0.02;
                let near = loss(which, element, h) - loss(which, element, -h);
                let far = loss(which, element, 2.0 * h) - loss(which, element, -2.0 * h);
                let slope = ((8.0 * near - far) / (12.0 * f64::from(h))) as f32;
                assert!(
                    (slope - grad).abs() <= 3e-4 * size,
                    "{name}: input {which}, element {element}: gradient {grad}, slope {slope}"
                );
            }
        }
    }
}

#[test]
fn linear_ops() {
    let (x, w, b) = (numbers(1, &[2, 3, 7]), numbers(2, &[5, 7]), numbers(3, &[5]));
    check("linear", &[x.clone(), w.clone(), b.clone()], |a| linear(&a[0], &a[1], Some(&a[2])));
    check("linear without bias", &[x.clone(), w.clone()], |a| linear(&a[0], &a[1], None));
    for format in WeightFormat::ALL {
        let weight = FrozenWeight::new(&numbers(4, &[5, 32]), format).unwrap();
        for rows in [3, 13] {
            let x = numbers(5, &[rows, 32]);
            check(&format!("frozen_linear {format}"), &[x], |a| {
                frozen_linear(&a[0], &weight, Some(&b))
            });
        }
    }
}

#[test]
fn norms() {
    let (x, w, b) = (numbers(1, &[3, 11]), numbers(2, &[11]), numbers(3, &[11]));
    check("layer_norm", &[x.clone(), w.clone(), b], |a| layer_norm(&a[0], &a[1], &a[2], 1e-5));
    check("rms_norm", &[x.clone(), w], |a| rms_norm(&a[0], &a[1], 1e-5));
    check("l2_normalize", &[x], |a| l2_normalize(&a[0]));
}

#[test]
fn activations() {
    let (x, up) = (numbers(1, &[3, 17]), numbers(2, &[3, 17]));
    check("gelu", std::slice::from_ref(&x), |a| gelu(&a[0]));
    check("quick_gelu", std::slice::from_ref(&x), |a| quick_gelu(&a[0]));
    check("gelu_tanh", std::slice::from_ref(&x), |a| gelu_tanh(&a[0]));
    check("add", &[x.clone(), up.clone()], |a| add(&a[0], &a[1]));
    // Away from the kink at 0, where there is no slope.
    let away: Vec<f32> = list(&x).iter().map(|x| x + 0.1 * x.signum()).collect();
    let away = Tensor::from_vec(away, x.shape(), &Device::Cpu).unwrap();
    check("relu", &[away], |a| relu(&a[0]));
    check("silu_gate", &[x, up], |a| silu_gate(&a[0], &a[1]));
}

#[test]
fn attention_with_bias_and_dropout() {
    let heads = Heads { heads: 4, kv_heads: 2, scale: 0.7 };
    let (q, k, v) = (numbers(1, &[2, 3, 12]), numbers(2, &[2, 5, 6]), numbers(3, &[2, 5, 6]));
    let bias = numbers(4, &[2, 1, 3, 5]);
    for dropout in [None, Some(DropoutKey { p: 0.3, seed: 5 })] {
        check("attention", &[q.clone(), k.clone(), v.clone()], |a| {
            attention(&a[0], &a[1], &a[2], Some(&bias), heads, dropout)
        });
    }
}

#[test]
fn positions_and_tables() {
    for style in [RopeStyle::Interleaved, RopeStyle::HalfSplit] {
        check("rope", &[numbers(1, &[1, 3, 12])], |a| rope(&a[0], &[0, 4, 9], 3, 100.0, style));
    }
    let ids = Tensor::new(&[2u32, 0, 2], &Device::Cpu).unwrap();
    check("embedding", &[numbers(2, &[4, 5])], |a| embedding(&a[0], &ids));
}

#[test]
fn losses() {
    let logits = numbers(1, &[4, 9]);
    let targets = [3, IGNORE, 8, 0];
    for smoothing in [0.0, 0.1] {
        check("cross_entropy", std::slice::from_ref(&logits), |a| {
            cross_entropy(&a[0], &targets, smoothing)
        });
    }
    // Targets that do not sum to one, as a sum over several positives would not.
    let soft = numbers(2, &[4, 9]).abs().unwrap();
    check("soft_cross_entropy", &[logits], |a| soft_cross_entropy(&a[0], &soft));
}

#[test]
fn dropout_and_gather() {
    let x = numbers(1, &[5, 7]);
    let key = DropoutKey { p: 0.4, seed: 3 };
    check("dropout", std::slice::from_ref(&x), |a| dropout(&a[0], key));
    let comm: std::sync::Arc<dyn blip2_ops::Communicator> = std::sync::Arc::new(SingleProcess);
    check("all_gather", &[x], |a| all_gather(&a[0], &comm));
}

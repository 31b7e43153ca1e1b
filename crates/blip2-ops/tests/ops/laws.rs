//! What must hold whatever the numbers: tracking, empty tensors, errors, masks, determinism.

use std::sync::Arc;

use blip2_ops::{
    AdamW, Communicator, Dropout, DropoutKey, Heads, IGNORE, RopeStyle, Segment, SingleProcess,
    adamw_step, add, all_gather, attention, cached_attention, cross_entropy, dropout, embedding,
    gelu, gelu_tanh, is_finite, l2_normalize, layer_norm, linear, log_sum_exp, quick_gelu, relu,
    rms_norm, rope, silu_gate, soft_cross_entropy, sum_of_squares,
};
use candle_core::{DType, Device, Result, Tensor};

use crate::common::{close, list, numbers, var};

const HEADS: Heads = Heads { heads: 2, kv_heads: 2, scale: 0.5 };

fn fails(result: Result<Tensor>, parts: &[&str]) {
    let error = result.unwrap_err().to_string();
    for part in parts {
        assert!(error.contains(part), "{error:?} does not mention {part:?}");
    }
}

#[test]
fn only_tracked_arguments_get_gradients() {
    let x = var(&numbers(1, &[4, 6]));
    let w = numbers(2, &[6, 6]);
    let y = linear(&x, &w, Some(&numbers(3, &[6]))).unwrap();
    let y = layer_norm(&y, &numbers(4, &[6]), &numbers(5, &[6]), 1e-5).unwrap();
    let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&x).is_some());
    assert!(grads.get(&w).is_none());
    // Nothing tracked: nothing recorded.
    assert!(!linear(&numbers(1, &[4, 6]), &w, None).unwrap().track_op());
    // Only the weight tracked.
    let w = var(&w);
    let y = linear(&numbers(1, &[4, 6]), &w, None).unwrap();
    assert!(y.sum_all().unwrap().backward().unwrap().get(&w).is_some());
    // Only values tracked.
    let v = var(&numbers(1, &[1, 3, 4]));
    let k = numbers(2, &[1, 3, 4]);
    let y = attention(&k, &k, &v, None, HEADS, None).unwrap();
    let grads = y.sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&v).is_some() && grads.get(&k).is_none());
}

#[test]
fn empty_tensors_work() {
    let empty = |shape: &[usize]| var(&numbers(1, shape));
    let backward = |y: Tensor| y.sum_all().unwrap().backward().unwrap();
    let w = var(&numbers(1, &[5, 4]));
    let bias = var(&numbers(1, &[5]));
    let y = linear(&empty(&[0, 4]), &w, Some(&bias)).unwrap();
    assert_eq!(y.dims(), [0, 5]);
    let grads = backward(y);
    assert_eq!(list(grads.get(&w).unwrap()), [0.0; 20]);
    assert_eq!(list(grads.get(&bias).unwrap()), [0.0; 5]);
    let y = linear(&numbers(1, &[3, 0]), &empty(&[5, 0]), Some(&bias)).unwrap();
    assert_eq!(list(&y.get(2).unwrap()), list(&bias));
    assert_eq!(linear(&numbers(1, &[3, 4]), &empty(&[0, 4]), None).unwrap().dims(), [3, 0]);
    let ops: [fn(&Tensor) -> Result<Tensor>; 3] = [gelu_tanh, relu, |x| add(x, x)];
    for op in ops {
        assert_eq!(op(&empty(&[0, 3])).unwrap().dims(), [0, 3]);
    }
    let none = numbers(1, &[2, 1, 0]);
    let segment = Segment { k: none.clone(), v: none.clone(), rows: vec![0, 1] };
    assert_eq!(cached_attention(&none, &[segment], None, HEADS).unwrap().dims(), [2, 1, 0]);

    let d4 = var(&numbers(1, &[4]));
    for shape in [&[0, 4][..], &[2, 0, 4]] {
        let x = empty(shape);
        for y in [
            layer_norm(&x, &d4, &d4, 1e-5),
            rms_norm(&x, &d4, 1e-5),
            l2_normalize(&x),
            gelu(&x),
            quick_gelu(&x),
            silu_gate(&x, &x),
            dropout(&x, DropoutKey { p: 0.5, seed: 1 }),
        ] {
            let y = y.unwrap();
            assert_eq!(y.dims(), shape);
            assert_eq!(backward(y).get(&x).unwrap().dims(), shape);
        }
    }
    let none = empty(&[3, 0]);
    let d0 = numbers(1, &[0]);
    assert_eq!(layer_norm(&none, &d0, &d0, 1e-5).unwrap().dims(), [3, 0]);
    assert_eq!(rms_norm(&none, &d0, 1e-5).unwrap().dims(), [3, 0]);
    assert_eq!(l2_normalize(&none).unwrap().dims(), [3, 0]);

    // No batch, no queries, no keys, heads of no width.
    for (q, k) in [([0, 3, 4], [0, 2, 4]), ([2, 0, 4], [2, 3, 4]), ([2, 3, 0], [2, 3, 0])] {
        let (q, k) = (empty(&q), empty(&k));
        let y = attention(&q, &k, &k, None, HEADS, None).unwrap();
        assert_eq!(y.dims(), q.dims());
        backward(y);
    }
    let (q, k) = (empty(&[2, 3, 4]), empty(&[2, 0, 4]));
    let y = attention(&q, &k, &k, None, HEADS, None).unwrap();
    assert_eq!(list(&y), [0.0; 24]);
    assert_eq!(list(backward(y).get(&q).unwrap()), [0.0; 24]);

    let x = empty(&[0, 3, 4]);
    assert_eq!(rope(&x, &[], 2, 10.0, RopeStyle::HalfSplit).unwrap().dims(), [0, 3, 4]);
    let ids = Tensor::zeros((2, 0), DType::U32, &Device::Cpu).unwrap();
    assert_eq!(embedding(&w, &ids).unwrap().dims(), [2, 0, 4]);
    assert_eq!(sum_of_squares(&x).unwrap(), 0.0);
}

#[test]
fn shape_errors_name_the_op_and_both_shapes() {
    let t = |shape: &[usize]| numbers(1, shape);
    fails(linear(&t(&[2, 3]), &t(&[5, 4]), None), &["linear", "[2, 3]", "[5, 4]"]);
    fails(linear(&t(&[2, 4]), &t(&[5, 4]), Some(&t(&[4]))), &["linear", "[4]", "5"]);
    fails(layer_norm(&t(&[2, 3]), &t(&[4]), &t(&[3]), 1e-5), &["layer_norm", "[2, 3]", "[4]"]);
    fails(rms_norm(&t(&[2, 3]), &t(&[4]), 1e-5), &["rms_norm", "[2, 3]", "[4]"]);
    fails(silu_gate(&t(&[2, 3]), &t(&[3, 2])), &["silu_gate", "[2, 3]", "[3, 2]"]);
    fails(l2_normalize(&t(&[])), &["l2_normalize"]);
    let (q, k) = (t(&[2, 3, 4]), t(&[2, 5, 6]));
    fails(attention(&q, &k, &k, None, HEADS, None), &["attention", "[2, 3, 4]", "[2, 5, 6]"]);
    let bias = t(&[2, 1, 3, 4]);
    fails(attention(&q, &q, &q, Some(&bias), HEADS, None), &["[2, 1, 3, 4]", "[2, 2, 3, 3]"]);
    let odd = Heads { heads: 3, ..HEADS };
    fails(attention(&q, &q, &q, None, odd, None), &["3 heads", "[2, 3, 4]"]);
    let style = RopeStyle::HalfSplit;
    fails(rope(&t(&[1, 2, 8]), &[0], 2, 10.0, style), &["rope", "1 positions", "[1, 2, 8]"]);
    fails(rope(&t(&[1, 2, 6]), &[0, 1], 2, 10.0, style), &["rope", "even"]);
    let ids = Tensor::new(&[1u32, 7], &Device::Cpu).unwrap();
    fails(embedding(&t(&[7, 2]), &ids), &["embedding", "id 7", "7 rows"]);
    fails(embedding(&t(&[7, 2]), &t(&[2])), &["embedding", "u32", "F32"]);
    fails(cross_entropy(&t(&[2, 3]), &[0], 0.0), &["cross_entropy", "1 targets", "[2, 3]"]);
    fails(cross_entropy(&t(&[2, 3]), &[0, 3], 0.0), &["target 3", "row 1", "3 classes"]);
    fails(cross_entropy(&t(&[2, 3]), &[IGNORE; 2], 0.0), &["cross_entropy", "IGNORE"]);
    fails(cross_entropy(&t(&[0, 3]), &[], 0.0), &["cross_entropy", "IGNORE"]);
    fails(cross_entropy(&t(&[1, 3]), &[0], 1.5), &["1.5"]);
    fails(soft_cross_entropy(&t(&[2, 3]), &t(&[2, 4])), &["[2, 3]", "[2, 4]"]);
    fails(soft_cross_entropy(&t(&[0, 3]), &t(&[0, 3])), &["soft_cross_entropy", "no rows"]);
    fails(dropout(&t(&[2]), DropoutKey { p: 1.0, seed: 0 }), &["dropout", "1"]);
    fails(gelu(&t(&[2]).to_dtype(DType::F64).unwrap()), &["gelu", "F64"]);
    fails(linear(&t(&[2, 3]), &t(&[4, 3]).to_dtype(DType::F16).unwrap(), None), &["linear", "F16"]);
}

#[test]
fn attention_without_any_allowed_key_is_zero() {
    let (q, k, v) =
        (var(&numbers(1, &[1, 3, 4])), var(&numbers(2, &[1, 5, 4])), numbers(3, &[1, 5, 4]));
    let v = var(&v);
    let mut bias = vec![0f32; 15];
    bias[5..10].fill(f32::NEG_INFINITY);
    let bias = Tensor::from_vec(bias, (1, 1, 3, 5), &Device::Cpu).unwrap();
    let y = attention(&q, &k, &v, Some(&bias), HEADS, None).unwrap();
    let rows = y.squeeze(0).unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(rows[1], [0.0; 4]);
    assert!(rows[0].iter().all(|y| *y != 0.0));
    let grads = y.sum_all().unwrap().backward().unwrap();
    for v in [&q, &k, &v] {
        assert!(list(grads.get(v).unwrap()).iter().all(|g| g.is_finite()));
    }
    assert_eq!(list(&grads.get(&q).unwrap().narrow(1, 1, 1).unwrap()), [0.0; 4]);
}

#[test]
fn a_masked_key_might_as_well_be_absent() {
    let (q, k, v) = (numbers(1, &[2, 3, 4]), numbers(2, &[2, 6, 4]), numbers(3, &[2, 6, 4]));
    let mut bias = vec![0f32; 6];
    bias[4..].fill(f32::NEG_INFINITY);
    let bias = Tensor::from_vec(bias, 6, &Device::Cpu).unwrap();
    let masked = attention(&q, &k, &v, Some(&bias), HEADS, None).unwrap();
    let cut = |t: &Tensor| t.narrow(1, 0, 4).unwrap();
    let absent = attention(&q, &cut(&k), &cut(&v), None, HEADS, None).unwrap();
    close("masked", &masked, &absent, 1e-6);
}

#[test]
fn each_bias_shape_broadcasts() {
    let (q, k) = (numbers(1, &[2, 3, 4]), numbers(2, &[2, 5, 4]));
    for shape in [&[5][..], &[1, 5], &[3, 1], &[2, 1, 1, 5], &[1, 2, 3, 5], &[2, 2, 3, 1], &[1; 4]]
    {
        let bias = numbers(3, shape);
        let full = bias.broadcast_as((2, 2, 3, 5)).unwrap();
        let a = attention(&q, &k, &k, Some(&bias), HEADS, None).unwrap();
        for b in [full.clone(), full.contiguous().unwrap()] {
            let b = attention(&q, &k, &k, Some(&b), HEADS, None).unwrap();
            assert_eq!(list(&a), list(&b), "{shape:?}");
        }
    }
}

#[test]
fn dropout_depends_on_the_seed_only() {
    let ones = Tensor::ones((300, 401), DType::F32, &Device::Cpu).unwrap();
    let key = DropoutKey { p: 0.1, seed: 7 };
    let y = list(&dropout(&ones, key).unwrap());
    let dropped = y.iter().filter(|y| **y == 0.0).count() as f32 / y.len() as f32;
    assert!((dropped - 0.1).abs() < 0.005, "dropped {dropped}");
    assert!(y.iter().all(|y| *y == 0.0 || *y == 1.0 / 0.9));
    assert_eq!(y, list(&dropout(&ones, key).unwrap()));
    assert_ne!(y, list(&dropout(&ones, DropoutKey { seed: 8, ..key }).unwrap()));
    // A prefix has the same mask: it depends on the element's number, not on the size.
    let part = list(&dropout(&ones.narrow(0, 0, 1).unwrap(), key).unwrap());
    assert_eq!(part, y[..401]);

    let stream = Dropout::new(3);
    let (a, b) = (stream.key(0.1).unwrap(), stream.key(0.1).unwrap());
    assert_ne!(a.seed, b.seed);
    let again = Dropout::new(3);
    assert_eq!(again.key(0.0), None);
    assert_eq!(again.key(0.1), Some(b));
    assert_eq!(Dropout::off().key(0.5), None);
    assert_eq!(list(&Dropout::off().apply(&ones, 0.5).unwrap()), list(&ones));
}

#[test]
fn results_do_not_depend_on_threads() {
    let run = || {
        let x = var(&numbers(1, &[300, 96]));
        let (w, b) = (var(&numbers(2, &[128, 96])), var(&numbers(3, &[128])));
        let y = linear(&x, &w, Some(&b)).unwrap();
        let y = layer_norm(&y, &b, &b, 1e-5).unwrap();
        let y = gelu(&y).unwrap().reshape((3, 100, 128)).unwrap();
        let key = DropoutKey { p: 0.1, seed: 1 };
        let heads = Heads { heads: 8, kv_heads: 8, scale: 0.25 };
        let y = attention(&y, &y, &y, None, heads, Some(key)).unwrap();
        let loss = cross_entropy(&y.reshape((300, 128)).unwrap(), &[5; 300], 0.1).unwrap();
        let grads = loss.backward().unwrap();
        let mut all = list(&loss);
        for v in [&x, &w, &b] {
            all.extend(list(grads.get(v).unwrap()));
        }
        all
    };
    let first = run();
    for threads in [1, 2, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        for _ in 0..3 {
            assert_eq!(first, pool.install(run), "{threads} threads");
        }
    }
}

/// Enough numbers for several threads, and a last piece that is not full.
#[test]
fn numbers_that_threads_write_lie_where_they_belong() {
    const MANY: usize = 100_003;
    let (a, b) = (numbers(1, &[MANY]), numbers(2, &[MANY]));
    let all = [gelu(&a).unwrap(), add(&a, &b).unwrap(), silu_gate(&a, &b).unwrap()];
    for first in [0, 16_383, 65_536, MANY - 7] {
        let part = |t: &Tensor| t.narrow(0, first, 7).unwrap();
        let (a, b) = (part(&a), part(&b));
        let expected = [gelu(&a).unwrap(), add(&a, &b).unwrap(), silu_gate(&a, &b).unwrap()];
        for (all, expected) in all.iter().zip(&expected) {
            close("a part", &part(all), expected, 1e-6);
        }
    }
}

/// By one thread, by all threads of a library, by tiles where there are some.
#[test]
fn a_bias_is_added_to_every_row_once() {
    for [n, width, out] in [[3, 5, 7], [8, 600, 64], [70, 64, 90], [300, 96, 128]] {
        let (x, w, b) = (numbers(1, &[n, width]), numbers(2, &[out, width]), numbers(3, &[out]));
        let y = linear(&x, &w, Some(&b)).unwrap();
        let expected = linear(&x, &w, None).unwrap().broadcast_add(&b).unwrap();
        close(&format!("{n}x{width}->{out}"), &y, &expected, 1e-5);
    }
}

/// Pretends to be rank 1 of 2, where rank 0 holds the same numbers doubled.
struct Second;

impl Communicator for Second {
    fn rank(&self) -> usize {
        1
    }
    fn world(&self) -> usize {
        2
    }
    fn all_gather(&self, x: &Tensor) -> Result<Tensor> {
        Tensor::cat(&[&(x * 2.0)?, x], 0)
    }
    fn all_reduce_sum(&self, x: &Tensor) -> Result<Tensor> {
        x * 3.0
    }
}

#[test]
fn gather_gives_back_the_summed_gradient_of_its_slice() {
    let comm: Arc<dyn Communicator> = Arc::new(Second);
    let x = var(&numbers(1, &[2, 3]));
    let all = all_gather(&x, &comm).unwrap();
    assert_eq!(all.dims(), [4, 3]);
    assert_eq!(list(&all.narrow(0, 2, 2).unwrap()), list(&x));
    let dy = numbers(2, &[4, 3]);
    let grads = (&all * &dy).unwrap().sum_all().unwrap().backward().unwrap();
    let expected = (dy.narrow(0, 2, 2).unwrap() * 3.0).unwrap();
    assert_eq!(list(grads.get(&x).unwrap()), list(&expected));
    let single: Arc<dyn Communicator> = Arc::new(SingleProcess);
    assert_eq!(list(&all_gather(&x, &single).unwrap()), list(&x));
}

#[test]
fn extremes_of_losses_and_activations() {
    let big = Tensor::new(&[[1e4f32, -1e4, 0.0]], &Device::Cpu).unwrap();
    let loss = |t| cross_entropy(&big, &[t], 0.0).unwrap().to_scalar::<f32>().unwrap();
    assert_eq!((loss(0), loss(1)), (0.0, 2e4));
    let x = Tensor::new(&[-1e4f32, -30.0, 0.0, 30.0, 1e4], &Device::Cpu).unwrap();
    assert_eq!(list(&gelu(&x).unwrap())[2..], [0.0, 30.0, 1e4]);
    assert_eq!(list(&gelu(&x).unwrap())[0], 0.0);
    assert_eq!(list(&quick_gelu(&x).unwrap())[3..], [30.0, 1e4]);
    let zero = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
    assert_eq!(list(&l2_normalize(&zero).unwrap()), [0.0; 6]);
    let nan = Tensor::new(&[f32::NAN, 1.0], &Device::Cpu).unwrap();
    assert!(list(&gelu(&nan).unwrap())[0].is_nan());
    assert!(
        cross_entropy(&nan.unsqueeze(0).unwrap(), &[1], 0.0)
            .unwrap()
            .to_scalar::<f32>()
            .unwrap()
            .is_nan()
    );
}

#[test]
fn gelu_is_within_a_millionth_of_the_erf_form() {
    // erf by its series in f64, which converges well for |x| <= 4.
    let erf = |x: f64| {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    };
    let xs: Vec<f32> = (-5000..=5000).map(|i| i as f32 / 1000.0).collect();
    let ys = list(&gelu(&Tensor::new(xs.as_slice(), &Device::Cpu).unwrap()).unwrap());
    for (x, y) in xs.iter().zip(ys) {
        let x64 = f64::from(*x);
        let truth = 0.5 * x64 * (1.0 + erf(x64 / std::f64::consts::SQRT_2));
        assert!((f64::from(y) - truth).abs() < 5e-7, "gelu({x}) = {y}, not {truth}");
    }
}

#[test]
fn gelu_tanh_and_relu_are_what_they_are_called() {
    let xs: Vec<f32> = (-6000..=6000).map(|i| i as f32 / 1000.0).collect();
    let x = Tensor::new(xs.as_slice(), &Device::Cpu).unwrap();
    let (gelus, relus) = (list(&gelu_tanh(&x).unwrap()), list(&relu(&x).unwrap()));
    for ((x, gelu), relu) in xs.iter().zip(gelus).zip(relus) {
        let x64 = f64::from(*x);
        let u = (2.0 / std::f64::consts::PI).sqrt() * (x64 + 0.044715 * x64.powi(3));
        let truth = 0.5 * x64 * (1.0 + u.tanh());
        assert!((f64::from(gelu) - truth).abs() < 1e-6, "gelu_tanh({x}) = {gelu}, not {truth}");
        assert_eq!(relu, x.max(0.0));
    }
    assert!(list(&relu(&Tensor::new(&[f32::NAN], &Device::Cpu).unwrap()).unwrap())[0].is_nan());
}

#[test]
fn log_sum_exp_of_a_long_row_is_exact_enough() {
    let xs: Vec<f32> = (0..50_000).map(|i| (i as f32 * 0.37).sin() * 12.0).collect();
    let truth = xs.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
    assert!((f64::from(log_sum_exp(&xs)) - truth).abs() < 2e-6);
    assert_eq!(log_sum_exp(&[]), f32::NEG_INFINITY);
    assert_eq!(log_sum_exp(&[f32::NEG_INFINITY; 3]), f32::NEG_INFINITY);
}

#[test]
fn a_cached_step_is_attention_and_refuses_what_it_cannot_do() {
    let (q, k, v) = (numbers(1, &[3, 1, 4]), numbers(2, &[2, 5, 4]), numbers(3, &[2, 5, 4]));
    let segment = |rows: &[u32]| Segment { k: k.clone(), v: v.clone(), rows: rows.to_vec() };
    let rows = Tensor::new(&[1u32, 0, 1], &Device::Cpu).unwrap();
    let copy = |t: &Tensor| t.index_select(&rows, 0).unwrap();
    let y = cached_attention(&q, &[segment(&[1, 0, 1])], None, HEADS).unwrap();
    close("cached", &y, &attention(&q, &copy(&k), &copy(&v), None, HEADS, None).unwrap(), 1e-6);
    let name = "cached_attention";
    fails(cached_attention(&q, &[], None, HEADS), &[name, "no keys"]);
    fails(cached_attention(&q, &[segment(&[1, 2, 0])], None, HEADS), &[name, "row 2", "[2, 5, 4]"]);
    fails(cached_attention(&q, &[segment(&[1])], None, HEADS), &[name, "1 rows", "[3, 1, 4]"]);
    let long = numbers(1, &[3, 2, 4]);
    fails(cached_attention(&long, &[segment(&[0, 1, 0])], None, HEADS), &["more than one"]);
    let tracked = var(&q);
    fails(cached_attention(&tracked, &[segment(&[0, 1, 0])], None, HEADS), &["no gradient"]);
}

/// Heads are shared out in stretches, whose number depends on that of the rows.
#[test]
fn a_cached_row_is_attention_whatever_the_shape_and_its_neighbours() {
    for (b, heads, kv_heads, d) in [(1, 12, 12, 80), (16, 12, 4, 64), (3, 8, 2, 20), (2, 3, 3, 7)] {
        let heads = Heads { heads, kv_heads, scale: 0.3 };
        let width = kv_heads * d;
        let q = numbers(1, &[b, 1, heads.heads * d]);
        let segments: Vec<_> = [33, 1, 0, 2]
            .into_iter()
            .enumerate()
            .map(|(i, t)| Segment {
                k: numbers(2 + i as u64, &[b, t, width]),
                v: numbers(20 + i as u64, &[b, t, width]),
                // Beams change places.
                rows: (0..b).map(|row| ((row + i) % b) as u32).collect(),
            })
            .collect();
        let all = |part: fn(&Segment) -> &Tensor| {
            let parts = segments.iter().map(|segment| {
                let rows = Tensor::new(segment.rows.as_slice(), &Device::Cpu).unwrap();
                part(segment).index_select(&rows, 0).unwrap()
            });
            Tensor::cat(&parts.collect::<Vec<_>>(), 1).unwrap()
        };
        let (k, v) = (all(|segment| &segment.k), all(|segment| &segment.v));
        for shape in [[1, 1, 1, 36], [b, 1, 1, 1], [b, heads.heads, 1, 36]] {
            let bias = Some(numbers(39, &shape));
            let y = cached_attention(&q, &segments, bias.as_ref(), heads).unwrap();
            close("cached", &y, &attention(&q, &k, &v, bias.as_ref(), heads, None).unwrap(), 1e-5);
        }

        let bias = numbers(40, &[b, heads.heads, 1, 36]);
        let step = || list(&cached_attention(&q, &segments, Some(&bias), heads).unwrap());
        let y = step();
        for threads in [1, 2, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(y, pool.install(step), "{threads} threads");
        }

        for (row, y) in y.chunks(y.len() / b).enumerate() {
            let one =
                |segment: &Segment| Segment { rows: vec![segment.rows[row]], ..segment.clone() };
            let segments: Vec<_> = segments.iter().map(one).collect();
            let [q, bias] = [&q, &bias].map(|tensor| tensor.narrow(0, row, 1).unwrap());
            let alone = cached_attention(&q, &segments, Some(&bias), heads).unwrap();
            assert_eq!(list(&alone), y, "row {row} of {b}");
        }
        let nothing = cached_attention(&q, &segments[2..3], None, heads).unwrap();
        assert_eq!(nothing.dims(), q.dims());
        assert!(list(&nothing).iter().all(|y| *y == 0.0));
    }
}

#[test]
fn what_is_not_finite_is_found_in_every_type() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = vec![1.5f32; 70_000];
            let tensor = |values: &[f32]| {
                Tensor::new(values, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
            };
            assert!(is_finite(&tensor(&values)).unwrap());
            values[69_999] = bad;
            assert!(!is_finite(&tensor(&values)).unwrap(), "{dtype:?} {bad}");
        }
    }
    assert!(is_finite(&Tensor::new(&[1u32], &Device::Cpu).unwrap()).is_err());
}

#[test]
fn adamw_refuses_what_does_not_fit() {
    let numbers_of = |step| AdamW {
        lr: 0.1,
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        weight_decay: 0.0,
        step,
        grad_scale: 1.0,
    };
    let p = var(&numbers(1, &[2, 3]));
    let grad = numbers(2, &[2, 3]);
    let mut m = [0f32; 6];
    let mut v = [0f32; 5];
    let error = adamw_step(&p, &grad, &mut m, &mut v, &numbers_of(1)).unwrap_err().to_string();
    assert!(error.contains("adamw_step") && error.contains("5 elements"), "{error}");
    let mut v = [0f32; 6];
    let error = adamw_step(&p, &grad, &mut m, &mut v, &numbers_of(0)).unwrap_err().to_string();
    assert!(error.contains("counted from 1"), "{error}");
    let before = list(&p);
    adamw_step(&p, &grad, &mut m, &mut v, &numbers_of(1)).unwrap();
    assert_ne!(before, list(&p));
    let wide = numbers(3, &[200, 300]);
    let expected: f64 = list(&wide).iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    assert!((sum_of_squares(&wide).unwrap() / expected - 1.0).abs() < 1e-6);
}

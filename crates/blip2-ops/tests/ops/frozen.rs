//! Frozen weights: every format, both kinds of product, no gradient.

use std::sync::Arc;

use blip2_ops::{FrozenWeight, WeightFormat, frozen_linear, linear};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};

use crate::common::{close, list, numbers, strided, var};

const DTYPES: [GgmlDType; 13] = [
    GgmlDType::F32,
    GgmlDType::F16,
    GgmlDType::BF16,
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

#[test]
fn products_equal_those_with_the_dequantised_weight() {
    let dense = numbers(1, &[301, 512]);
    for dtype in DTYPES {
        let q = Arc::new(QTensor::quantize(&dense, dtype).unwrap());
        let weight = FrozenWeight::from_qtensor(Arc::clone(&q)).unwrap();
        // Bit for bit what candle unpacks.
        let full = weight.dequantize().unwrap();
        assert_eq!(list(&full), list(&q.dequantize(&Device::Cpu).unwrap()), "{dtype:?}");
        let bias = numbers(2, &[301]);
        for rows in [1, 5, 8, 9, 40] {
            let x = numbers(3, &[rows, 512]);
            for x in [x.clone(), strided(&x)] {
                let name = format!("{dtype:?}, {rows} rows");
                let xv = var(&x);
                let y = frozen_linear(&xv, &weight, Some(&bias)).unwrap();
                close(&name, &y, &linear(&x, &full, Some(&bias)).unwrap(), 2e-5);
                let dy = numbers(4, y.dims());
                let grads = (&y * &dy).unwrap().sum_all().unwrap().backward().unwrap();
                let expected = dy.matmul(&full).unwrap();
                close(&name, grads.get(&xv).unwrap(), &expected, 2e-5);
            }
        }
    }
}

/// However the numbers lie, and whatever type they have.
#[test]
fn weights_are_quantised_as_by_the_reference() {
    // The last panel is not full.
    let dense = numbers(1, &[150, 512]);
    let of_type = |dtype| dense.to_dtype(dtype).unwrap();
    let transposed = dense.t().unwrap().contiguous().unwrap();
    let narrowed = numbers(2, &[400, 512]).narrow(0, 77, 150).unwrap();
    let mut weights = [DType::F32, DType::F16, DType::BF16, DType::F64].map(of_type).to_vec();
    weights.extend([transposed.t().unwrap(), narrowed]);
    for (format, dtype) in
        [(WeightFormat::Q8_0, GgmlDType::Q8_0), (WeightFormat::Q4K, GgmlDType::Q4K)]
    {
        for (i, weight) in weights.iter().enumerate() {
            let copy = weight.to_dtype(DType::F32).unwrap().force_contiguous().unwrap();
            let expected = QTensor::quantize(&copy, dtype).unwrap();
            let kept = FrozenWeight::new(weight, format).unwrap().dequantize().unwrap();
            let expected = expected.dequantize(&Device::Cpu).unwrap();
            assert_eq!(list(&kept), list(&expected), "{format}, weight {i}");
        }
    }
}

/// More outputs than a chunk of the backward product has, more rows than are packed at once, and widths that are no multiple of a
/// panel's.
#[test]
fn gradients_through_frozen_floats_are_those_of_the_product() {
    for (rows, out, width) in [(40, 1301, 70), (2310, 40, 33), (17, 600, 512)] {
        let dense = (numbers(1, &[out, width]) * 0.1).unwrap();
        for format in [WeightFormat::F32, WeightFormat::F16] {
            let weight = FrozenWeight::new(&dense, format).unwrap();
            let x = var(&numbers(3, &[rows, width]));
            let y = frozen_linear(&x, &weight, None).unwrap();
            let dy = numbers(4, y.dims());
            let grads = (&y * &dy).unwrap().sum_all().unwrap().backward().unwrap();
            let expected = dy.matmul(&weight.dequantize().unwrap()).unwrap();
            let name = format!("{format}, {rows} {out} {width}");
            close(&name, grads.get(&x).unwrap(), &expected, 2e-5);
        }
    }
}

/// x as products of integers see it: 16 bits with a scale for every 32.
fn rounded(x: &Tensor) -> Tensor {
    let block = |block: &[f32]| {
        let largest = block.iter().fold(0f32, |a, b| a.max(b.abs()));
        let (scale, factor) = (f64::from(largest / 32767.0), 32767.0 / largest);
        let round = |x: &f32| (f64::from((x * factor).round_ties_even()) * scale) as f32;
        block.iter().map(round).collect::<Vec<_>>()
    };
    let values: Vec<f32> = list(x).chunks(32).flat_map(block).collect();
    Tensor::from_vec(values, x.shape(), &Device::Cpu).unwrap()
}

#[test]
fn fast_products_are_those_of_x_in_sixteen_bits() {
    let dense = numbers(1, &[301, 512]);
    let x = numbers(3, &[40, 512]);
    for (x, rounded) in list(&x).chunks(32).zip(list(&rounded(&x)).chunks(32)) {
        let largest = x.iter().fold(0f32, |a, b| a.max(b.abs()));
        for (x, rounded) in x.iter().zip(rounded) {
            assert!((x - rounded).abs() <= largest / 65_000.0, "{x} became {rounded}");
        }
    }
    for dtype in DTYPES {
        let q = Arc::new(QTensor::quantize(&dense, dtype).unwrap());
        let exact = FrozenWeight::from_qtensor(q).unwrap();
        let (fast, full) = (exact.clone().fast(), exact.dequantize().unwrap());
        let integers = [GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q8_0, GgmlDType::Q4K];
        for rows in [1, 5, 40] {
            let x = x.narrow(0, 0, rows).unwrap();
            let name = format!("{dtype:?}, {rows} rows");
            let y = frozen_linear(&x, &fast, None).unwrap();
            let seen = if integers.contains(&dtype) { rounded(&x) } else { x.clone() };
            close(&name, &y, &linear(&seen, &full, None).unwrap(), 2e-5);
            // With a gradient it is not fast but exact.
            let tracked = frozen_linear(&var(&x), &fast, None).unwrap();
            assert_eq!(list(&tracked), list(&frozen_linear(&x, &exact, None).unwrap()), "{name}");
        }
    }
}

/// What the rounding of x changes is a hundredth of what eight bits change in the weights.
#[test]
fn rounding_x_matters_less_than_rounding_weights() {
    let dense = numbers(1, &[256, 512]);
    let weight = FrozenWeight::new(&dense, WeightFormat::Q8_0).unwrap().fast();
    let x = numbers(3, &[64, 512]);
    let y = frozen_linear(&x, &weight, None).unwrap();
    let off = |other: &Tensor| {
        let other = linear(&x, other, None).unwrap();
        list(&(&y - other).unwrap().sqr().unwrap()).iter().sum::<f32>().sqrt()
    };
    let (of_x, of_weights) = (off(&weight.dequantize().unwrap()), off(&dense));
    assert!(of_x * 100.0 < of_weights, "{of_x} {of_weights}");
    // Half a step of 1/127 of the largest, at most.
    assert!(of_weights < 0.02 * list(&y.sqr().unwrap()).iter().sum::<f32>().sqrt());
}

/// Every row of every type, also behind the first rows and in a view of something larger.
#[test]
fn what_is_kept_is_near_what_was_given() {
    let whole = numbers(1, &[170, 512]);
    let dense = whole.narrow(0, 20, 150).unwrap();
    for (format, limit) in WeightFormat::ALL.into_iter().zip([0.0, 1e-3, 1e-2, 0.25]) {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let given = dense.to_dtype(dtype).unwrap();
            for given in [given.clone(), strided(&given)] {
                let kept = FrozenWeight::new(&given, format).unwrap().dequantize().unwrap();
                let given = list(&given.to_dtype(DType::F32).unwrap());
                for (i, (kept, given)) in list(&kept).iter().zip(given).enumerate() {
                    let off = (kept - given).abs();
                    assert!(off <= limit, "{format}, {dtype:?}: {i} is {kept}, was {given}");
                }
            }
        }
    }
}

#[test]
fn rows_are_those_of_the_whole() {
    for format in WeightFormat::ALL {
        let weight = FrozenWeight::new(&strided(&numbers(1, &[9, 256])), format).unwrap();
        let full = weight.dequantize().unwrap();
        let ids = [8u32, 0, 8, 3];
        let expected = full.index_select(&Tensor::new(&ids, &Device::Cpu).unwrap(), 0).unwrap();
        assert_eq!(list(&weight.rows(&ids).unwrap()), list(&expected));
        assert_eq!(weight.rows(&[]).unwrap().dims(), [0, 256]);
        let error = weight.rows(&[9]).unwrap_err().to_string();
        assert!(error.contains("row 9") && error.contains("9 rows"), "{error}");
    }
}

#[test]
fn formats_names_and_sizes() {
    let dense = numbers(1, &[4, 256]);
    let sizes = [("f32", 4096), ("f16", 2048), ("q8_0", 4 * 8 * 34), ("q4_k", 4 * 144)];
    for (format, (name, bytes)) in WeightFormat::ALL.into_iter().zip(sizes) {
        assert_eq!(name.parse::<WeightFormat>().unwrap(), format);
        let weight = FrozenWeight::new(&dense, format).unwrap();
        assert_eq!((weight.format_name(), weight.bytes()), (name, bytes));
        assert_eq!(weight.shape(), (4, 256));
    }
    // Rows that blocks do not divide fall back to a finer format.
    let name =
        |width, format| FrozenWeight::new(&numbers(1, &[3, width]), format).unwrap().format_name();
    assert_eq!(name(576, WeightFormat::Q4K), "q8_0");
    assert_eq!(name(30, WeightFormat::Q4K), "f16");
    assert_eq!(name(30, WeightFormat::Q8_0), "f16");
    assert!("q5".parse::<WeightFormat>().unwrap_err().to_string().contains("q5"));
}

#[test]
fn nothing_is_recorded_for_a_frozen_weight() {
    let bias = var(&numbers(3, &[6]));
    let dense = var(&numbers(1, &[6, 32]));
    let weight = FrozenWeight::new(&dense, WeightFormat::F32).unwrap();
    let x = numbers(2, &[4, 32]);
    // An untracked input: the result is a constant.
    assert!(!frozen_linear(&x, &weight, None).unwrap().track_op());
    // A tracked one: its gradient only.
    let x = var(&x);
    let y = frozen_linear(&x, &weight, Some(&bias)).unwrap();
    let grads = y.sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&x).is_some());
    assert!(grads.get(&dense).is_none() && grads.get(&bias).is_none());
}

#[test]
fn empty_weights_and_inputs() {
    for format in WeightFormat::ALL {
        let weight = FrozenWeight::new(&numbers(1, &[6, 32]), format).unwrap();
        let x = var(&numbers(2, &[0, 3, 32]));
        let y = frozen_linear(&x, &weight, None).unwrap();
        assert_eq!(y.dims(), [0, 3, 6]);
        let grads = y.sum_all().unwrap().backward().unwrap();
        assert_eq!(grads.get(&x).unwrap().dims(), [0, 3, 32]);
        let none = FrozenWeight::new(&numbers(1, &[0, 32]), format).unwrap();
        let y = frozen_linear(&numbers(2, &[9, 32]), &none, None).unwrap();
        assert_eq!(y.dims(), [9, 0]);
    }
    let weight = FrozenWeight::new(&numbers(1, &[6, 32]), WeightFormat::Q8_0).unwrap();
    let error = frozen_linear(&numbers(2, &[9, 31]), &weight, None).unwrap_err().to_string();
    for part in ["frozen_linear", "[9, 31]", "[6, 32]"] {
        assert!(error.contains(part), "{error}");
    }
}

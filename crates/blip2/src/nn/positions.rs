//! Position embeddings of square pictures, brought to another number of patches.

use candle_core::{Device, Tensor};

use crate::{Error, Result};

/// Which points of two grids lie on each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Corners {
    /// The outer edges of the outer patches: EVA-CLIP, DINOv2.
    Edges,
    /// The centres of the outer patches (`align_corners`): how LAVIS fits CLIP.
    Centres,
}

/// Position embeddings (1, 1 + from², w), class token first, for pictures of `side` × `side` patches: (1, 1 + side², w).
///
/// Bicubic as PyTorch's: coefficient −0.75, edges repeated, no smoothing. The class token's
/// position stays, and nothing changes when the grid has that size already.
///
/// # Errors
/// If the embeddings are not those of a class token and a square of patches.
pub fn fit_positions(positions: &Tensor, side: usize, corners: Corners) -> Result<Tensor> {
    let &[1, tokens, w] = positions.dims() else { return Err(not_square(positions)) };
    let from = tokens.saturating_sub(1).isqrt();
    if from == 0 || 1 + from * from != tokens {
        return Err(not_square(positions));
    }
    if from == side {
        return Ok(positions.clone());
    }
    let values = positions.flatten_all()?.to_vec1::<f32>()?;
    let (class, grid) = values.split_at(w);
    let mut out = class.to_vec();
    out.extend(resize_grid(grid, from, side, w, corners));
    Ok(Tensor::from_vec(out, (1, 1 + side * side, w), &Device::Cpu)?)
}

fn not_square(positions: &Tensor) -> Error {
    Error::Config(format!(
        "pos_embed {:?} is not (1, 1 + n², width): one class token and a square of patches",
        positions.dims()
    ))
}

/// A square grid (from, from, w) resized to (to, to, w), both row-major. Sums are taken in f64.
fn resize_grid(grid: &[f32], from: usize, to: usize, w: usize, corners: Corners) -> Vec<f32> {
    let taps: Vec<_> = (0..to).map(|o| cubic_taps(o, from, to, corners)).collect();
    let mut out = Vec::with_capacity(to * to * w);
    for rows in &taps {
        for columns in &taps {
            out.extend((0..w).map(|c| {
                let mut sum = 0.0f64;
                for &(y, wy) in rows {
                    for &(x, wx) in columns {
                        sum += wy * wx * f64::from(grid[(y * from + x) * w + c]);
                    }
                }
                sum as f32
            }));
        }
    }
    out
}

/// The four input positions, and their weights, that make output `o` along one axis.
fn cubic_taps(o: usize, from: usize, to: usize, corners: Corners) -> [(usize, f64); 4] {
    const A: f64 = -0.75;
    let near = |s: f64| ((A + 2.0) * s - (A + 3.0)) * s * s + 1.0;
    let far = |s: f64| ((A * s - 5.0 * A) * s + 8.0 * A) * s - 4.0 * A;
    let source = match corners {
        Corners::Edges => (o as f64 + 0.5) * (from as f64 / to as f64) - 0.5,
        // A single point is the first one, as PyTorch has it.
        Corners::Centres if to < 2 => 0.0,
        Corners::Centres => o as f64 * ((from - 1) as f64 / (to - 1) as f64),
    };
    let t = source - source.floor();
    let weights = [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)];
    std::array::from_fn(|i| {
        let at = source.floor() as i64 + i as i64 - 1;
        (at.clamp(0, from as i64 - 1) as usize, weights[i])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_size_changes_nothing() {
        let grid: Vec<f32> = (0..5 * 5 * 2).map(|i| (i as f32 * 0.7).sin()).collect();
        assert_eq!(resize_grid(&grid, 5, 5, 2, Corners::Edges), grid);
    }

    #[test]
    fn weights_sum_to_one_and_edges_repeat() {
        for o in 0..16 {
            let taps = cubic_taps(o, 37, 16, Corners::Edges);
            let sum: f64 = taps.iter().map(|t| t.1).sum();
            assert!((sum - 1.0).abs() < 1e-12, "output {o}: {sum}");
        }
        // Output 0 of 16 lies at input 0.65625, output 15 at 35.34375.
        assert_eq!(cubic_taps(0, 37, 16, Corners::Edges).map(|t| t.0), [0, 0, 1, 2]);
        assert_eq!(cubic_taps(15, 37, 16, Corners::Edges).map(|t| t.0), [34, 35, 36, 36]);
    }

    #[test]
    fn aligned_corners_are_kept() {
        let grid: Vec<f32> = (0..9).map(|i| (i as f32 * 1.3).cos()).collect();
        let fitted = resize_grid(&grid, 3, 5, 1, Corners::Centres);
        for (at, from) in [(0, 0), (2, 1), (4, 2), (10, 3), (12, 4), (24, 8)] {
            assert!((fitted[at] - grid[from]).abs() < 1e-6, "{at}");
        }
    }

    /// Made with `torch.nn.functional.interpolate(mode="bicubic")` of torch 2.8, `align_corners` false (EVA) and true (CLIP).
    #[test]
    fn grids_are_resized_as_torch_does() {
        let grid = [0.3, -1.2, 2.0, 0.7, 1.5, -0.4, -2.1, 0.9, 0.2];
        let edges = [
            0.3908, -1.18556, -0.29169, 2.42823, 0.88289, 0.71176, 0.49333, 0.385, -0.3975, 1.1382,
            1.05242, -0.59302, -2.52764, -0.21358, 0.98266, 0.199,
        ];
        let centres = [
            0.3, -1.08333, -0.35926, 2.0, 0.88519, 0.81725, 0.56327, 0.28889, -0.13704, 1.29287,
            1.14774, -0.47778, -2.1, 0.03333, 1.01296, 0.2,
        ];
        let smaller = [[0.17936, 0.94437, -0.82601, 0.33129], [0.3, 2.0, -2.1, 0.2]];
        for (corners, larger, smaller) in
            [(Corners::Edges, edges, smaller[0]), (Corners::Centres, centres, smaller[1])]
        {
            for (side, expected) in [(4, larger.as_slice()), (2, smaller.as_slice())] {
                let found = resize_grid(&grid, 3, side, 1, corners);
                for (found, expected) in found.iter().zip(expected) {
                    assert!(
                        (found - expected).abs() < 2e-5,
                        "{corners:?} {side}: {found} {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn the_class_token_stays_and_constants_too() {
        let mut values = vec![7.0f32, 8.0];
        values.extend([3.0, 4.0].repeat(9));
        let positions = Tensor::from_vec(values, (1, 10, 2), &Device::Cpu).unwrap();
        let fitted = fit_positions(&positions, 5, Corners::Edges).unwrap();
        assert_eq!(fitted.dims(), [1, 26, 2]);
        let rows = fitted.squeeze(0).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(rows[0], [7.0, 8.0]);
        assert!(rows[1..].iter().all(|row| (row[0] - 3.0).abs() + (row[1] - 4.0).abs() < 1e-6));
    }

    #[test]
    fn what_is_no_square_is_refused() {
        for shape in [vec![1, 11, 2], vec![10, 2], vec![1, 1, 2], vec![1, 0, 2]] {
            let positions = Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
            assert!(
                fit_positions(&positions, 3, Corners::Centres)
                    .unwrap_err()
                    .to_string()
                    .contains("pos_embed")
            );
        }
    }
}

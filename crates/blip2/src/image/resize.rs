//! Bicubic resizing, bit for bit PIL's `Image.resize(size, BICUBIC)` of an RGB picture.
//!
//! What fixes the bits: the cubic kernel with a = −0.5, stretched when shrinking so that every
//! source pixel counts; weights rounded to 22 fractional bits; a horizontal pass to 8-bit pixels
//! first (only over the rows the second pass will read), then a vertical pass; a pass that would
//! change nothing is left out. This is Pillow up to version 12; 13.0 swaps the passes for pictures
//! whose height shrinks much more than their width, where a few pixels then differ by some levels.
//!
//! ```text
//! (h, w, 3) ─horizontal─▶ (rows needed, w', 3) ─vertical─▶ (h', w', 3)
//! ```

use rayon::prelude::*;

use super::{Rgb, simd};

/// Fractional bits of a weight: 32 less 8 for the pixel less 2 for the overshoot of the kernel.
const BITS: u32 = 32 - 8 - 2;
const HALF: i32 = 1 << (BITS - 1);
/// Rows that one thread works on at a time.
const STRIP: usize = 32;
/// Taps are worked on in groups of eight, so that a group of RGB pixels fills three registers.
const GROUP: usize = 8;

/// The source pixels that make one output pixel.
struct Window {
    first: usize,
    /// Fixed-point weights, at least one.
    weights: Vec<i32>,
}

pub(super) fn bicubic(source: &Rgb, width: usize, height: usize) -> Rgb {
    let (from_width, from_height) = (source.width as usize, source.height as usize);
    let across = (width != from_width).then(|| windows(from_width, width));
    let down = (height != from_height).then(|| windows(from_height, height));
    // Rows that the vertical pass reads.
    let (top, bottom) = match &down {
        Some(down) => (
            down.iter().map(|w| w.first).min().unwrap_or(0),
            down.iter().map(|w| w.first + w.weights.len()).max().unwrap_or(0),
        ),
        None => (0, from_height),
    };
    let rows = &source.data[top * from_width * 3..bottom * from_width * 3];
    let narrowed = across.map(|windows| narrow(rows, from_width, &windows));
    let rows = narrowed.as_deref().unwrap_or(rows);
    let data = match down {
        Some(down) => shorten(rows, width * 3, top, &down),
        None => rows.to_vec(),
    };
    Rgb { width: width as u32, height: height as u32, data }
}

/// The cubic convolution kernel with a = −0.5.
fn kernel(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

/// Which of `from` pixels make each of `to`, and with what weights.
fn windows(from: usize, to: usize) -> Vec<Window> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let support = 2.0 * stretch;
    let window = |i: usize| {
        let center = (i as f64 + 0.5) * scale;
        let first = (center - support + 0.5).max(0.0) as usize;
        let end = ((center + support + 0.5) as usize).min(from);
        let weight = |x: usize| kernel((x as f64 - center + 0.5) * (1.0 / stretch));
        let weights: Vec<f64> = (first..end).map(weight).collect();
        let mut sum = 0.0;
        for w in &weights {
            sum += w;
        }
        let fixed = |w: f64| {
            let scaled = if sum == 0.0 { w } else { w / sum } * f64::from(1 << BITS);
            (scaled + if scaled < 0.0 { -0.5 } else { 0.5 }) as i32
        };
        Window { first, weights: weights.into_iter().map(fixed).collect() }
    };
    (0..to).map(window).collect()
}

/// A rounded sum of weighted pixels as a pixel.
#[inline(always)]
fn pixel(sum: i32) -> u8 {
    (sum >> BITS).clamp(0, 255) as u8
}

/// Every row of `rows` (`width` pixels each) to one pixel a window.
fn narrow(rows: &[u8], width: usize, windows: &[Window]) -> Vec<u8> {
    // Each weight three times, one for each colour, padded with zeros to whole groups.
    let most = windows.iter().map(|w| w.weights.len()).max().unwrap_or(0).div_ceil(GROUP);
    let mut spread = vec![[[0i32; 8]; 3]; windows.len() * most];
    for (window, groups) in windows.iter().zip(spread.chunks_exact_mut(most)) {
        let lanes = groups.as_flattened_mut().as_flattened_mut();
        for (lanes, &weight) in lanes.chunks_exact_mut(3).zip(&window.weights) {
            lanes.fill(weight);
        }
    }
    let mut out = vec![0u8; rows.len() / (width * 3) * windows.len() * 3];
    let strips = out.par_chunks_mut(STRIP * windows.len() * 3);
    strips.zip(rows.par_chunks(STRIP * width * 3)).for_each(|(out, rows)| {
        simd(
            #[inline(always)]
            || horizontal(rows, width, windows, &spread, out),
        );
    });
    out
}

/// [`narrow`] of a few rows; `spread` has as many groups of weights for each window.
#[inline(always)]
fn horizontal(
    rows: &[u8],
    width: usize,
    windows: &[Window],
    spread: &[[[i32; 8]; 3]],
    out: &mut [u8],
) {
    let most = spread.len() / windows.len();
    let mut line = vec![0u8; (width + GROUP) * 3];
    for (row, out) in rows.chunks_exact(width * 3).zip(out.chunks_exact_mut(windows.len() * 3)) {
        line[..width * 3].copy_from_slice(row);
        let targets = out.as_chunks_mut::<3>().0.iter_mut().zip(windows);
        for ((out, window), groups) in targets.zip(spread.chunks_exact(most)) {
            let pixels = line[window.first * 3..].as_chunks::<8>().0.as_chunks::<3>().0;
            let groups = &groups[..window.weights.len().div_ceil(GROUP)];
            // By name, not in a loop: sums that are indexed live in memory.
            let [mut a, mut b, mut c] = [[0i32; 8]; 3];
            for (pixels, weights) in pixels.iter().zip(groups) {
                a = multiplied(a, &pixels[0], &weights[0]);
                b = multiplied(b, &pixels[1], &weights[1]);
                c = multiplied(c, &pixels[2], &weights[2]);
            }
            let sums = [a, b, c];
            let sums = sums.as_flattened();
            for (colour, out) in out.iter_mut().enumerate() {
                let taps = sums[colour..].iter().step_by(3);
                *out = pixel(taps.fold(HALF, |sum, &tap| sum.wrapping_add(tap)));
            }
        }
    }
}

/// One row a window, out of rows of `line` bytes of which the first is row `top` of the source.
fn shorten(rows: &[u8], line: usize, top: usize, windows: &[Window]) -> Vec<u8> {
    let mut out = vec![0u8; windows.len() * line];
    let strips = out.par_chunks_mut(STRIP * line).zip(windows.par_chunks(STRIP));
    strips.for_each(|(out, windows)| {
        simd(
            #[inline(always)]
            || vertical(rows, line, top, windows, out),
        );
    });
    out
}

/// [`shorten`] for a few windows.
#[inline(always)]
fn vertical(rows: &[u8], line: usize, top: usize, windows: &[Window], out: &mut [u8]) {
    /// Registers' worth of eight sums worked on at once.
    const WIDE: usize = 4;
    for (window, out) in windows.iter().zip(out.chunks_exact_mut(line)) {
        let rows = &rows[(window.first - top) * line..];
        let (eights, rest) = out.as_chunks_mut::<8>();
        let done = eights.len() * 8;
        let (blocks, singles) = eights.as_chunks_mut::<WIDE>();
        for (b, block) in blocks.iter_mut().enumerate() {
            *block = weighed(rows, line, b * WIDE * 8, &window.weights);
        }
        let start = blocks.len() * WIDE * 8;
        for (b, single) in singles.iter_mut().enumerate() {
            [*single] = weighed(rows, line, start + b * 8, &window.weights);
        }
        for (i, out) in rest.iter_mut().enumerate() {
            let mut sum = HALF;
            for (row, &weight) in rows.chunks_exact(line).zip(&window.weights) {
                sum = sum.wrapping_add(i32::from(row[done + i]).wrapping_mul(weight));
            }
            *out = pixel(sum);
        }
    }
}

/// `N` times eight weighted columns from column `at` on.
#[inline(always)]
fn weighed<const N: usize>(rows: &[u8], line: usize, at: usize, weights: &[i32]) -> [[u8; 8]; N] {
    let mut sums = [[HALF; 8]; N];
    for (row, &weight) in rows.chunks_exact(line).zip(weights) {
        let Some(row) = row[at..].as_chunks::<8>().0.first_chunk::<N>() else { continue };
        for n in 0..N {
            sums[n] = multiplied(sums[n], &row[n], &[weight; 8]);
        }
    }
    let mut out = [[0; 8]; N];
    for n in 0..N {
        for i in 0..8 {
            out[n][i] = pixel(sums[n][i]);
        }
    }
    out
}

/// Eight sums with eight weighted values added.
#[inline(always)]
fn multiplied(mut sums: [i32; 8], values: &[u8; 8], weights: &[i32; 8]) -> [i32; 8] {
    for i in 0..8 {
        sums[i] = sums[i].wrapping_add(i32::from(values[i]).wrapping_mul(weights[i]));
    }
    sums
}

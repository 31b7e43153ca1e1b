//! Painting: decode and trim cut-outs, name their colour, draw backgrounds and plain shapes, compose.
//!
//! Pixels are 8-bit sRGB; cut-outs are `RgbaImage` (alpha not multiplied in), canvases `RgbImage`.
//! Everything random comes from the [`Rng`] that is passed in.

use image::{ImageEncoder as _, Rgb, RgbImage, Rgba, RgbaImage};

use crate::rng::Rng;
use crate::{Error, Result};

/// The colours that captions name, with a typical value.
pub const COLOURS: [(&str, [u8; 3]); 11] = [
    ("red", [214, 38, 38]),
    ("orange", [245, 140, 25]),
    ("yellow", [248, 222, 40]),
    ("green", [50, 160, 60]),
    ("blue", [45, 95, 215]),
    ("purple", [130, 60, 175]),
    ("pink", [248, 140, 185]),
    ("brown", [125, 78, 40]),
    ("gray", [140, 140, 140]),
    ("black", [20, 20, 20]),
    ("white", [252, 252, 252]),
];

fn value(name: &str) -> [u8; 3] {
    COLOURS.iter().find(|(n, _)| *n == name).map_or([128; 3], |(_, v)| *v)
}

fn jitter(rgb: [u8; 3], amount: f64, rng: &mut Rng) -> [u8; 3] {
    let light = rng.range(-amount, amount);
    rgb.map(|c| (f64::from(c) + light + rng.range(-amount, amount) * 0.4).clamp(0.0, 255.0) as u8)
}

/// Decodes a picture of at most 4096 px a side, with its transparency.
///
/// # Errors
/// Not a picture, or too large.
pub fn decode(bytes: &[u8]) -> Result<RgbaImage> {
    let bad = |e: &dyn std::fmt::Display| Error::Data(format!("picture: {e}"));
    let mut reader = image::ImageReader::new(std::io::Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|e| bad(&e))?;
    let mut limits = image::Limits::default();
    (limits.max_image_width, limits.max_image_height) = (Some(4096), Some(4096));
    reader.limits(limits);
    Ok(reader.decode().map_err(|e| bad(&e))?.into_rgba8())
}

/// Cuts away transparent borders; `None` when nothing is left.
pub fn trim(picture: &RgbaImage) -> Option<RgbaImage> {
    let (w, h) = picture.dimensions();
    let (mut x0, mut y0, mut x1, mut y1) = (w, h, 0, 0);
    for (x, y, p) in picture.enumerate_pixels() {
        if p.0[3] > 12 {
            (x0, y0) = (x0.min(x), y0.min(y));
            (x1, y1) = (x1.max(x + 1), y1.max(y + 1));
        }
    }
    (x1 > x0 && y1 > y0)
        .then(|| image::imageops::crop_imm(picture, x0, y0, x1 - x0, y1 - y0).to_image())
}

/// The share of pixels that are opaque, 0..=1.
pub fn coverage(picture: &RgbaImage) -> f64 {
    let opaque = picture.pixels().filter(|p| p.0[3] > 127).count();
    opaque as f64 / f64::from((picture.width() * picture.height()).max(1))
}

/// Resizes so that the longer side is `side`; transparent pixels' colours don't bleed in.
pub fn fit(picture: &RgbaImage, side: u32) -> RgbaImage {
    let (w, h) = picture.dimensions();
    let scale = f64::from(side) / f64::from(w.max(h).max(1));
    let to = |v: u32| ((f64::from(v) * scale).round() as u32).max(1);
    let mut multiplied = picture.clone();
    for p in multiplied.pixels_mut() {
        let a = u32::from(p.0[3]);
        for c in 0..3 {
            p.0[c] = ((u32::from(p.0[c]) * a + 127) / 255) as u8;
        }
    }
    let filter = image::imageops::FilterType::CatmullRom;
    let mut out = image::imageops::resize(&multiplied, to(w), to(h), filter);
    for p in out.pixels_mut() {
        let a = u32::from(p.0[3]);
        for c in 0..3 {
            p.0[c] = (u32::from(p.0[c]) * 255).checked_div(a).unwrap_or(0).min(255) as u8;
        }
    }
    out
}

/// Lays `cutout` on `canvas` with its top left corner at (x, y); what hangs over is cut off.
pub fn paste(canvas: &mut RgbImage, cutout: &RgbaImage, x: i64, y: i64) {
    let (w, h) = (i64::from(canvas.width()), i64::from(canvas.height()));
    for (cx, cy, p) in cutout.enumerate_pixels() {
        let (tx, ty) = (x + i64::from(cx), y + i64::from(cy));
        if tx < 0 || ty < 0 || tx >= w || ty >= h {
            continue;
        }
        let a = u32::from(p.0[3]);
        let under = canvas.get_pixel_mut(tx as u32, ty as u32);
        for c in 0..3 {
            under.0[c] =
                ((u32::from(p.0[c]) * a + u32::from(under.0[c]) * (255 - a) + 127) / 255) as u8;
        }
    }
}

/// JPEG bytes, quality 90.
///
/// # Errors
/// Never for canvases of this module; the encoder's word.
pub fn jpeg(canvas: &RgbImage) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    image::codecs::jpeg::JpegEncoder::new_with_quality(&mut out, 90)
        .encode_image(canvas)
        .map_err(|e| Error::Data(format!("jpeg: {e}")))?;
    Ok(out)
}

/// PNG bytes of a square picture: `pixels` is RGB, row by row.
///
/// # Errors
/// Not `side`×`side` pixels.
pub fn png(pixels: &[u8], side: u32) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    let encoder = image::codecs::png::PngEncoder::new(&mut out);
    encoder
        .write_image(pixels, side, side, image::ExtendedColorType::Rgb8)
        .map_err(|e| Error::Data(format!("png: {e}")))?;
    Ok(out)
}

/// The largest of some random squares that are opaque throughout, at least 40 px: a piece of the
/// photographed surface (fur, leaves, metal), for backgrounds.
pub fn texture(cutout: &RgbaImage, rng: &mut Rng) -> Option<RgbImage> {
    let (w, h) = cutout.dimensions();
    let most = w.min(h);
    for attempt in 0..40 {
        let side = f64::from(most) * (0.9 - 0.014 * f64::from(attempt));
        let side = side as u32;
        if side < 40 {
            return None;
        }
        let x = rng.below((w - side + 1) as usize) as u32;
        let y = rng.below((h - side + 1) as usize) as u32;
        let square = image::imageops::crop_imm(cutout, x, y, side, side).to_image();
        if square.pixels().all(|p| p.0[3] > 250) {
            return Some(RgbImage::from_fn(side, side, |x, y| {
                let p = square.get_pixel(x, y).0;
                Rgb([p[0], p[1], p[2]])
            }));
        }
    }
    None
}

/// A background from a texture: a part of it, enlarged until it is as soft as what lies behind a
/// photographed thing.
pub fn from_texture(texture: &RgbImage, side: u32, rng: &mut Rng) -> RgbImage {
    let most = texture.width().min(texture.height());
    let part = ((f64::from(most) * rng.range(0.4, 1.0)) as u32).max(1);
    let x = rng.below((texture.width() - part + 1) as usize) as u32;
    let y = rng.below((texture.height() - part + 1) as usize) as u32;
    let piece = image::imageops::crop_imm(texture, x, y, part, part).to_image();
    let mut out =
        image::imageops::resize(&piece, side, side, image::imageops::FilterType::CatmullRom);
    if rng.chance(0.5) {
        image::imageops::flip_horizontal_in_place(&mut out);
    }
    out
}

// ---------------------------------------------------------------------------------------------
// Colour names

/// The name of a pixel's colour where people would agree on it.
fn name_of(rgb: [u8; 3]) -> Option<&'static str> {
    let [r, g, b] = rgb.map(|c| f32::from(c) / 255.0);
    let (max, min) = (r.max(g).max(b), r.min(g).min(b));
    let delta = max - min;
    let saturation = if max > 0.0 { delta / max } else { 0.0 };
    if max < 0.2 {
        return Some("black");
    }
    if saturation < 0.1 {
        return match max {
            m if m > 0.9 => Some("white"),
            m if m > 0.35 && m < 0.8 => Some("gray"),
            _ => None,
        };
    }
    if saturation < 0.3 {
        return None;
    }
    let hue = if max == r {
        60.0 * ((g - b) / delta).rem_euclid(6.0)
    } else if max == g {
        60.0 * ((b - r) / delta + 2.0)
    } else {
        60.0 * ((r - g) / delta + 4.0)
    };
    match hue {
        h if !(12.0..345.0).contains(&h) && saturation > 0.6 && max > 0.45 => Some("red"),
        h if (12.0..42.0).contains(&h) && max < 0.66 => Some("brown"),
        h if (18.0..42.0).contains(&h) && saturation > 0.65 && max > 0.85 => Some("orange"),
        h if (44.0..66.0).contains(&h) && saturation > 0.45 && max > 0.75 => Some("yellow"),
        h if (75.0..160.0).contains(&h) => Some("green"),
        h if (190.0..250.0).contains(&h) && saturation > 0.4 => Some("blue"),
        h if (262.0..300.0).contains(&h) && saturation > 0.35 => Some("purple"),
        h if (305.0..350.0).contains(&h) && max > 0.75 && saturation < 0.75 => Some("pink"),
        _ => None,
    }
}

/// The one colour a cut-out has, `None` unless it is plain to see: most opaque pixels, and no other
/// colour (but outlines) anywhere near.
pub fn dominant_colour(cutout: &RgbaImage) -> Option<&'static str> {
    let mut counts: std::collections::BTreeMap<&'static str, usize> = Default::default();
    let (mut all, mut unnamed) = (0usize, 0usize);
    for p in cutout.pixels().filter(|p| p.0[3] > 200) {
        all += 1;
        match name_of([p.0[0], p.0[1], p.0[2]]) {
            Some(name) => *counts.entry(name).or_default() += 1,
            None => unnamed += 1,
        }
    }
    let (name, most) = counts.iter().max_by_key(|(name, n)| (**n, **name))?;
    let second = counts.iter().filter(|(n, _)| n != &name).map(|(_, c)| *c).max().unwrap_or(0);
    let share = |n: usize| n as f64 / all.max(1) as f64;
    (all > 200 && share(*most) > 0.6 && share(second) < 0.17 && share(unnamed) < 0.3)
        .then_some(name)
}

/// Mean colour of the opaque part.
pub fn mean_colour(cutout: &RgbaImage) -> [f64; 3] {
    let (mut sum, mut n) = ([0f64; 3], 0f64);
    for p in cutout.pixels().filter(|p| p.0[3] > 127) {
        for c in 0..3 {
            sum[c] += f64::from(p.0[c]);
        }
        n += 1.0;
    }
    sum.map(|s| s / n.max(1.0))
}

// ---------------------------------------------------------------------------------------------
// Backgrounds

/// What a scene stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Background {
    /// One of [`COLOURS`].
    Plain(&'static str),
    /// A slow change between two colours; has no name.
    Gradient,
    /// Soft blotches, like an out-of-focus photograph; has no name.
    Blur,
    /// Green blades below, sky above.
    Grass,
    /// Pale ripples.
    Sand,
    /// Boards.
    Wood,
    /// White ground, pale sky.
    Snow,
    /// Dark sky with stars.
    Night,
    /// Waves under the sky.
    Sea,
    /// Blue with clouds.
    Sky,
    /// Bricks.
    Bricks,
    /// Squares of two colours.
    Checked,
}

impl Background {
    /// How a caption ends, e.g. "on grass"; `None` when nobody would mention it.
    pub fn phrase(self) -> Option<String> {
        Some(match self {
            Self::Plain("white") | Self::Gradient | Self::Blur => return None,
            Self::Plain(colour) => {
                let article = super::text::article(colour);
                format!("on {article} {colour} background")
            }
            Self::Grass => "on grass".into(),
            Self::Sand => "on sand".into(),
            Self::Wood => "on a wooden table".into(),
            Self::Snow => "in the snow".into(),
            Self::Night => "under a starry sky".into(),
            Self::Sea => "at the sea".into(),
            Self::Sky => "in the sky".into(),
            Self::Bricks => "in front of a brick wall".into(),
            Self::Checked => "on a checkered background".into(),
        })
    }

    /// A random one.
    pub fn draw(rng: &mut Rng) -> Self {
        const NATURE: [Background; 8] = [
            Background::Grass,
            Background::Sand,
            Background::Wood,
            Background::Snow,
            Background::Night,
            Background::Sea,
            Background::Sky,
            Background::Bricks,
        ];
        match rng.uniform() {
            u if u < 0.14 => Self::Plain("white"),
            u if u < 0.42 => Self::Plain(COLOURS[rng.below(COLOURS.len() - 1)].0),
            u if u < 0.52 => Self::Gradient,
            u if u < 0.66 => Self::Blur,
            u if u < 0.97 => NATURE[rng.below(NATURE.len())],
            _ => Self::Checked,
        }
    }

    /// Paints it on a square of `side` pixels.
    pub fn paint(self, side: u32, rng: &mut Rng) -> RgbImage {
        let s = f64::from(side);
        match self {
            Self::Plain(name) => {
                let spread = if name == "white" { 0.0 } else { 10.0 };
                RgbImage::from_pixel(side, side, Rgb(jitter(value(name), spread, rng)))
            }
            Self::Gradient => {
                let any = |rng: &mut Rng| [0; 3].map(|_: i32| rng.range(40.0, 250.0));
                let (from, to) = (any(rng), any(rng));
                let angle = rng.range(0.0, std::f64::consts::TAU);
                let (dx, dy) = (angle.cos(), angle.sin());
                RgbImage::from_fn(side, side, |x, y| {
                    let t = (f64::from(x) / s - 0.5) * dx + (f64::from(y) / s - 0.5) * dy + 0.5;
                    mix(from, to, t)
                })
            }
            Self::Blur => {
                let (a, b) = (Noise::new(rng, 3), Noise::new(rng, 5));
                // Muted, as most of what is out of focus in photographs.
                let tone = |rng: &mut Rng| {
                    let light = rng.range(40.0, 225.0);
                    [0; 3].map(|_: i32| (light + rng.range(-45.0, 45.0)).clamp(0.0, 255.0))
                };
                let (dark, mid, light) = (tone(rng), tone(rng), tone(rng));
                RgbImage::from_fn(side, side, |x, y| {
                    let (u, v) = (f64::from(x) / s, f64::from(y) / s);
                    let first = mix_f(dark, mid, smooth(a.at(u, v)));
                    mix(first, light, smooth(b.at(u, v)) * 0.8)
                })
            }
            Self::Grass => {
                let horizon = rng.range(0.15, 0.45) * s;
                let (fine, rough) = (Noise::new(rng, 90), Noise::new(rng, 7));
                let sky = [rng.range(120.0, 180.0), rng.range(185.0, 220.0), 245.0];
                let green = [rng.range(50.0, 95.0), rng.range(135.0, 170.0), rng.range(30.0, 60.0)];
                RgbImage::from_fn(side, side, |x, y| {
                    let (u, v) = (f64::from(x) / s, f64::from(y) / s);
                    if f64::from(y) < horizon {
                        return mix(sky, [235.0, 245.0, 252.0], f64::from(y) / horizon);
                    }
                    // Blades: noise stretched upwards.
                    let blade = fine.at(u, v * 0.25) * 0.7 + rough.at(u, v) * 0.3;
                    mix(green.map(|c| c * 0.62), green.map(|c| (c * 1.25).min(255.0)), blade)
                })
            }
            Self::Sand => {
                let (ripple, grain) = (Noise::new(rng, 6), Noise::new(rng, 120));
                let tilt = rng.range(-0.6, 0.6);
                RgbImage::from_fn(side, side, |x, y| {
                    let (u, v) = (f64::from(x) / s, f64::from(y) / s);
                    let wave = ((v + tilt * u) * 60.0 + ripple.at(u, v) * 12.0).sin() * 0.25 + 0.5;
                    let t = wave * 0.6 + grain.at(u, v) * 0.4;
                    mix([196.0, 164.0, 112.0], [240.0, 216.0, 166.0], t)
                })
            }
            Self::Wood => {
                let (grain, tone) = (Noise::new(rng, 5), Noise::new(rng, 4));
                let board = s / rng.range(2.5, 5.5);
                let base = [rng.range(130.0, 190.0), rng.range(88.0, 125.0), rng.range(45.0, 75.0)];
                RgbImage::from_fn(side, side, |x, y| {
                    let (u, v) = (f64::from(x) / s, f64::from(y) / s);
                    let n = (f64::from(y) / board).floor();
                    let edge = f64::from(y) - n * board < 1.6;
                    let line =
                        ((v * 130.0 + grain.at(u + n * 0.37, v) * 14.0).sin() * 0.5 + 0.5) * 0.35;
                    let t = line + tone.at((n * 0.31).fract(), 0.5) * 0.5;
                    let dark = if edge { 0.45 } else { 0.78 };
                    mix(base.map(|c| c * dark), base.map(|c| (c * 1.2).min(255.0)), t)
                })
            }
            Self::Snow => {
                let (drift, horizon) = (Noise::new(rng, 4), rng.range(0.25, 0.5) * s);
                let mut canvas = RgbImage::from_fn(side, side, |x, y| {
                    let (u, v) = (f64::from(x) / s, f64::from(y) / s);
                    let edge = horizon + (drift.at(u, 0.2) - 0.5) * 0.2 * s;
                    if f64::from(y) < edge {
                        mix([150.0, 178.0, 208.0], [205.0, 220.0, 236.0], f64::from(y) / s * 2.0)
                    } else {
                        mix([222.0, 231.0, 243.0], [253.0, 254.0, 255.0], drift.at(u, v))
                    }
                });
                for _ in 0..60 {
                    dot(&mut canvas, rng, [255; 3], 1.0, 2.6);
                }
                canvas
            }
            Self::Night => {
                let mut canvas = RgbImage::from_fn(side, side, |_, y| {
                    mix([8.0, 10.0, 34.0], [32.0, 40.0, 86.0], f64::from(y) / s)
                });
                for _ in 0..70 {
                    dot(&mut canvas, rng, [250, 248, 225], 0.6, 1.7);
                }
                canvas
            }
            Self::Sea => {
                let horizon = rng.range(0.25, 0.45) * s;
                let waves = Noise::new(rng, 50);
                RgbImage::from_fn(side, side, |x, y| {
                    let (u, v) = (f64::from(x) / s, f64::from(y) / s);
                    if f64::from(y) < horizon {
                        return mix(
                            [150.0, 200.0, 245.0],
                            [230.0, 243.0, 253.0],
                            f64::from(y) / horizon,
                        );
                    }
                    let t = waves.at(u * 0.35, v) * 0.7 + 0.3 * (1.0 - v);
                    mix([12.0, 72.0, 132.0], [80.0, 165.0, 205.0], t)
                })
            }
            Self::Sky => {
                let clouds = Noise::new(rng, 7);
                let detail = Noise::new(rng, 17);
                RgbImage::from_fn(side, side, |x, y| {
                    let (u, v) = (f64::from(x) / s, f64::from(y) / s);
                    let cloud = clouds.at(u * 0.6, v) * 0.7 + detail.at(u * 0.6, v) * 0.3;
                    let blue = mix_f([70.0, 140.0, 225.0], [165.0, 208.0, 247.0], v);
                    mix(blue, [252.0, 253.0, 255.0], ((cloud - 0.5) * 4.0).clamp(0.0, 1.0))
                })
            }
            Self::Bricks => {
                let tone = Noise::new(rng, 23);
                let h = s / rng.range(8.0, 13.0);
                let w = h * 2.2;
                RgbImage::from_fn(side, side, |x, y| {
                    let row = (f64::from(y) / h).floor();
                    let shift = if row as i64 % 2 == 0 { 0.0 } else { w / 2.0 };
                    let column = ((f64::from(x) + shift) / w).floor();
                    let inside_x = (f64::from(x) + shift) - column * w > 2.0;
                    let inside_y = f64::from(y) - row * h > 2.0;
                    if !(inside_x && inside_y) {
                        return Rgb([205, 198, 188]);
                    }
                    let t = tone.at((column * 0.173).fract(), (row * 0.291).fract());
                    mix([140.0, 62.0, 44.0], [190.0, 98.0, 70.0], t)
                })
            }
            Self::Checked => {
                let cell = s / rng.range(5.0, 9.0);
                let dark = COLOURS[rng.below(8)].1;
                RgbImage::from_fn(side, side, |x, y| {
                    let n = (f64::from(x) / cell) as u32 + (f64::from(y) / cell) as u32;
                    Rgb(if n.is_multiple_of(2) { [246; 3] } else { dark })
                })
            }
        }
    }
}

fn mix_f(a: [f64; 3], b: [f64; 3], t: f64) -> [f64; 3] {
    let t = t.clamp(0.0, 1.0);
    [0, 1, 2].map(|c| a[c] + (b[c] - a[c]) * t)
}

fn mix(a: [f64; 3], b: [f64; 3], t: f64) -> Rgb<u8> {
    Rgb(mix_f(a, b, t).map(|c| c.round().clamp(0.0, 255.0) as u8))
}

fn smooth(t: f64) -> f64 {
    let t = ((t - 0.25) * 2.0).clamp(0.0, 1.0);
    t * t * (3.0 - 2.0 * t)
}

fn dot(canvas: &mut RgbImage, rng: &mut Rng, colour: [u8; 3], small: f64, large: f64) {
    let side = f64::from(canvas.width());
    let (cx, cy, r) = (rng.range(0.0, side), rng.range(0.0, side), rng.range(small, large));
    let shape = Shape::Circle.draw(colour, (r * 2.0).ceil() as u32 + 1);
    paste(canvas, &shape, (cx - r) as i64, (cy - r) as i64);
}

/// Value noise on an n×n lattice, 0..=1.
struct Noise {
    n: usize,
    values: Vec<f64>,
}

impl Noise {
    fn new(rng: &mut Rng, n: usize) -> Self {
        let values = (0..(n + 1) * (n + 1)).map(|_| rng.uniform()).collect();
        Self { n, values }
    }

    fn at(&self, u: f64, v: f64) -> f64 {
        let n = self.n as f64;
        let (x, y) = ((u.rem_euclid(1.0)) * n, (v.rem_euclid(1.0)) * n);
        let (xi, yi) = ((x as usize).min(self.n - 1), (y as usize).min(self.n - 1));
        let (fx, fy) = (x - xi as f64, y - yi as f64);
        let (sx, sy) = (fx * fx * (3.0 - 2.0 * fx), fy * fy * (3.0 - 2.0 * fy));
        let get = |i: usize, j: usize| self.values[j * (self.n + 1) + i];
        let top = get(xi, yi) + (get(xi + 1, yi) - get(xi, yi)) * sx;
        let low = get(xi, yi + 1) + (get(xi + 1, yi + 1) - get(xi, yi + 1)) * sx;
        top + (low - top) * sy
    }
}

// ---------------------------------------------------------------------------------------------
// Shapes

/// A plain shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A disc.
    Circle,
    /// A square.
    Square,
    /// Base down.
    Triangle,
    /// Five points.
    Star,
    /// A heart.
    Heart,
    /// A square on its corner.
    Diamond,
    /// A plus.
    Cross,
    /// A ring.
    Ring,
}

impl Shape {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Circle,
        Self::Square,
        Self::Triangle,
        Self::Star,
        Self::Heart,
        Self::Diamond,
        Self::Cross,
        Self::Ring,
    ];

    /// Its noun.
    pub fn name(self) -> &'static str {
        match self {
            Self::Circle => "circle",
            Self::Square => "square",
            Self::Triangle => "triangle",
            Self::Star => "star",
            Self::Heart => "heart",
            Self::Diamond => "diamond",
            Self::Cross => "cross",
            Self::Ring => "ring",
        }
    }

    /// Is (x, y) in -1..=1, y downwards, inside?
    fn contains(self, x: f64, y: f64) -> bool {
        let r = x.hypot(y);
        match self {
            Self::Circle => r <= 1.0,
            Self::Square => x.abs() <= 0.92 && y.abs() <= 0.92,
            Self::Triangle => (-0.9..=0.85).contains(&y) && x.abs() <= (y + 0.9) / 1.75,
            Self::Diamond => x.abs() * 1.25 + y.abs() <= 1.0,
            Self::Cross => {
                (x.abs() <= 0.32 && y.abs() <= 0.95) || (y.abs() <= 0.32 && x.abs() <= 0.95)
            }
            Self::Ring => (0.58..=1.0).contains(&r),
            Self::Heart => {
                let (x, y) = (x * 1.2, -y * 1.2 + 0.15);
                (x * x + y * y - 1.0).powi(3) - x * x * y.powi(3) <= 0.0
            }
            Self::Star => {
                let fifth = std::f64::consts::TAU / 5.0;
                let angle = (x.atan2(-y)).rem_euclid(fifth);
                let half = (angle - fifth / 2.0).abs();
                // The edge from a tip (radius 1) to a notch (radius 0.42), in polar form.
                let (tip, notch) = (1.0, 0.42);
                let t = fifth / 2.0 - half;
                let (px, py) = (r * t.cos(), r * t.sin());
                let (nx, ny) = (notch * (fifth / 2.0).cos(), notch * (fifth / 2.0).sin());
                (nx - tip) * py - ny * (px - tip) >= 0.0
            }
        }
    }

    /// Draws it `side` pixels wide, with smooth edges.
    pub fn draw(self, colour: [u8; 3], side: u32) -> RgbaImage {
        const SUB: u32 = 4;
        RgbaImage::from_fn(side, side, |px, py| {
            let mut hits = 0u32;
            for i in 0..SUB * SUB {
                let at = |p: u32, k: u32| {
                    (f64::from(p) + (f64::from(k) + 0.5) / f64::from(SUB)) / f64::from(side) * 2.0
                        - 1.0
                };
                hits += u32::from(self.contains(at(px, i % SUB), at(py, i / SUB)));
            }
            let [r, g, b] = colour;
            Rgba([r, g, b, (hits * 255 / (SUB * SUB)) as u8])
        })
    }

    /// Draws it in a shade of the named colour.
    pub fn draw_named(self, colour: &str, side: u32, rng: &mut Rng) -> RgbaImage {
        self.draw(jitter(value(colour), 12.0, rng), side)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_of_shapes_are_named() {
        for (name, _) in COLOURS {
            let mut rng = Rng::new(3, &[]);
            let heart = Shape::Heart.draw_named(name, 60, &mut rng);
            assert_eq!(dominant_colour(&heart), Some(name));
        }
    }

    #[test]
    fn two_colours_are_no_colour() {
        let red = value("red");
        let flag = RgbaImage::from_fn(40, 40, |_, y| {
            let [r, g, b] = if y < 20 { red } else { value("blue") };
            Rgba([r, g, b, 255])
        });
        assert_eq!(dominant_colour(&flag), None);
    }

    #[test]
    fn shapes_fill_their_box() {
        for shape in Shape::ALL {
            let share = coverage(&shape.draw([0; 3], 80));
            assert!((0.25..0.95).contains(&share), "{shape:?} {share}");
        }
    }

    #[test]
    fn fit_keeps_colours_of_cutouts() {
        let mut cutout = RgbaImage::from_pixel(20, 10, Rgba([0, 0, 0, 0]));
        for x in 5..15 {
            for y in 2..8 {
                cutout.put_pixel(x, y, Rgba([200, 10, 10, 255]));
            }
        }
        let big = fit(&cutout, 80);
        assert_eq!(big.dimensions(), (80, 40));
        assert!(big.pixels().filter(|p| p.0[3] > 100).all(|p| p.0[0] > 180));
        let trimmed = trim(&cutout);
        assert_eq!(trimmed.map(|t| t.dimensions()), Some((10, 6)));
    }

    #[test]
    fn backgrounds_depend_on_the_key_only() {
        for kind in [Background::Grass, Background::Blur, Background::Wood, Background::Checked] {
            let a = kind.paint(32, &mut Rng::new(1, &[]));
            assert_eq!(a, kind.paint(32, &mut Rng::new(1, &[])));
        }
    }
}

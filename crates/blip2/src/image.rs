//! Bytes to pixels, and pixels to what a vision model wants to see.
//!
//! Decodes JPEG, PNG, WebP, GIF (its first frame), BMP and TIFF to 8-bit RGB; resizes; makes the
//! input tensor. It knows nothing about augmentation and nothing about models but their input size.
//!
//! ```text
//! bytes ─decode─▶ Rgb (h, w, 3) u8 ─resize_bicubic─▶ (size, size, 3) u8 ─to_tensor─▶ (3, size, size) f32
//! ```
//!
//! What comes in is not to be trusted: sizes are checked against [`MAX_PIXELS`] and [`MAX_SIDE`]
//! before anything is allocated, every decoder is memory-safe Rust, and whatever is damaged or cut
//! short is an [`Error::Image`], never a half-grey picture.
//!
//! JPEG, TIFF and BMP have readers of their own below, because the pixels must be those of PIL to
//! the last bit; for PNG, GIF and WebP the well-known crates unpack the file, which leaves no room
//! for difference (lossy WebP was measured to be equal to libwebp's).

mod bmp;
mod gif;
mod jpeg;
mod png;
mod resize;
mod tiff;
mod webp;

use std::panic::catch_unwind;
use std::path::Path;

use candle_core::{Device, Tensor};

use crate::{Error, Result};

/// Most pixels a picture may have.
pub const MAX_PIXELS: u64 = 100_000_000;
/// Most pixels along one side of a picture.
pub const MAX_SIDE: u32 = 65_535;

/// Inside the readers a failure is its reason; [`decode`] puts the format before it.
type Fallible<T> = std::result::Result<T, String>;

/// How stored samples become the pixels that the model sees.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Pixels {
    /// What a person looking at the picture sees: EXIF orientation applied, transparency laid on
    /// white, 16-bit samples scaled to eight.
    #[default]
    Default,
    /// To the bit what transformers' PIL image processor makes of the file: EXIF orientation
    /// ignored (but TIFF's own applied), transparency laid on white by PIL's arithmetic, 16-bit
    /// grey clipped at 255, 16-bit colour cut to its high byte.
    Hf,
}

/// A picture of 8-bit RGB pixels.
///
/// Pictures from this module have at least one pixel and `width * height * 3` bytes of data.
#[derive(Clone, PartialEq, Eq)]
pub struct Rgb {
    /// Pixels across.
    pub width: u32,
    /// Pixels down.
    pub height: u32,
    /// Red, green, blue of each pixel; row after row from the top.
    pub data: Vec<u8>,
}

impl std::fmt::Debug for Rgb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rgb({}x{})", self.width, self.height)
    }
}

/// Decodes the picture in the file at `path`.
///
/// # Errors
/// [`Error::Io`] or [`Error::File`], both naming the file; for the reasons see [`decode`].
pub fn open(path: &Path, pixels: Pixels) -> Result<Rgb> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    decode_guarded(&bytes, pixels).map_err(|reason| Error::file(path, reason))
}

/// Decodes a picture from the bytes of its file; the format is told by the bytes alone.
///
/// # Errors
/// [`Error::Image`] when the bytes are no picture in one of the six formats, use a feature of it
/// that is not supported, are damaged or cut short, or hold a picture beyond [`MAX_PIXELS`] or
/// [`MAX_SIDE`].
pub fn decode(bytes: &[u8], pixels: Pixels) -> Result<Rgb> {
    decode_guarded(bytes, pixels).map_err(Error::Image)
}

/// The shape `(3, size, size)` f32 tensor of a picture: resized, scaled and normalised. The
/// picture's proportions are not kept, as in the original.
///
/// # Errors
/// Only when the tensor cannot be made.
pub fn preprocess(picture: &Rgb, size: usize, normalize: &Normalize) -> Result<Tensor> {
    let side = size as u32;
    to_tensor(&picture.resize_bicubic(side, side), normalize)
}

/// Mean and standard deviation of each colour, in units of full white.
#[derive(Clone, Copy, PartialEq, Debug, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Normalize {
    /// Subtracted from the colours scaled to 0..=1.
    pub mean: [f32; 3],
    /// Then divided by.
    pub std: [f32; 3],
}

impl Normalize {
    /// Of the pictures CLIP was trained on; EVA and the original BLIP-2 use it too.
    pub const CLIP: Self = Self {
        mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
        std: [0.268_629_54, 0.261_302_58, 0.275_777_11],
    };
    /// Of ImageNet; DINOv2 uses it.
    pub const IMAGENET: Self = Self { mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225] };
}

/// The picture as an f32 tensor of shape `(3, height, width)`: `(value / 255 − mean) / std`.
///
/// The value is scaled in f64 and rounded to f32, then normalised in f32, which is the order and
/// the precision of transformers.
///
/// # Errors
/// Only when the tensor cannot be made, as when `data` is not `width * height * 3` bytes.
pub fn to_tensor(picture: &Rgb, normalize: &Normalize) -> Result<Tensor> {
    let (width, height) = (picture.width as usize, picture.height as usize);
    let pixels = picture.data.as_chunks::<3>().0;
    let mut planes = Vec::with_capacity(3 * pixels.len());
    for c in 0..3 {
        let mut table = [0f32; 256];
        for (value, entry) in table.iter_mut().enumerate() {
            let scaled = (value as f64 * (1.0 / 255.0)) as f32;
            *entry = (scaled - normalize.mean[c]) / normalize.std[c];
        }
        planes.extend(pixels.iter().map(|p| table[usize::from(p[c])]));
    }
    Ok(Tensor::from_vec(planes, (3, height, width), &Device::Cpu)?)
}

impl Rgb {
    /// The picture resized to `width` × `height` pixels (zero is taken as one), to the bit as PIL's
    /// `Image.resize((width, height), BICUBIC)` does it.
    #[must_use]
    pub fn resize_bicubic(&self, width: u32, height: u32) -> Self {
        resize::bicubic(self, width.max(1) as usize, height.max(1) as usize)
    }

    /// The part `width` × `height` pixels large whose upper left corner is at `(x, y)`; whatever
    /// of it lies outside the picture is left out.
    #[must_use]
    pub fn crop(&self, x: u32, y: u32, width: u32, height: u32) -> Self {
        let (x, y) = (x.min(self.width), y.min(self.height));
        let (width, height) = (width.min(self.width - x), height.min(self.height - y));
        let line = self.width as usize * 3;
        let span = x as usize * 3..(x + width) as usize * 3;
        let rows = self.data.chunks_exact(line.max(1)).skip(y as usize).take(height as usize);
        let data = rows.flat_map(|row| &row[span.clone()]).copied().collect();
        Self { width, height, data }
    }

    /// The picture with left and right exchanged.
    #[must_use]
    pub fn flip_horizontal(&self) -> Self {
        let mut data = self.data.clone();
        for row in data.chunks_exact_mut((self.width as usize * 3).max(1)) {
            row.as_chunks_mut::<3>().0.reverse();
        }
        Self { data, ..*self }
    }

    fn flip_vertical(&self) -> Self {
        let line = (self.width as usize * 3).max(1);
        let data = self.data.chunks_exact(line).rev().flatten().copied().collect();
        Self { data, ..*self }
    }

    /// Rows become columns.
    fn transpose(&self) -> Self {
        let (width, height) = (self.width as usize, self.height as usize);
        let pixels = self.data.as_chunks::<3>().0;
        let mut data = Vec::with_capacity(self.data.len());
        for x in 0..width {
            data.extend((0..height).flat_map(|y| pixels[y * width + x]));
        }
        Self { width: self.height, height: self.width, data }
    }

    /// The picture upright, given its EXIF orientation (1 to 8; anything else is upright).
    fn upright(self, orientation: u16) -> Self {
        match orientation {
            2 => self.flip_horizontal(),
            3 => self.flip_horizontal().flip_vertical(),
            4 => self.flip_vertical(),
            5 => self.transpose(),
            6 => self.transpose().flip_horizontal(),
            7 => self.transpose().flip_horizontal().flip_vertical(),
            8 => self.transpose().flip_vertical(),
            _ => self,
        }
    }
}

// ---------------------------------------------------------------- from any format

/// A mistake in a decoder, ours or another's, costs one picture and not the whole run.
fn decode_guarded(bytes: &[u8], pixels: Pixels) -> Fallible<Rgb> {
    let caught = catch_unwind(|| decode_any(bytes, pixels));
    caught.unwrap_or_else(|_| Err("the decoder failed on a malformed file".into()))
}

fn decode_any(bytes: &[u8], pixels: Pixels) -> Fallible<Rgb> {
    let says = |format: &'static str| move |reason: String| format!("{format}: {reason}");
    match bytes {
        [] => Err("an empty file".into()),
        [0xFF, 0xD8, 0xFF, ..] => from_jpeg(bytes, pixels).map_err(says("JPEG")),
        [0x89, b'P', b'N', b'G', ..] => from_png(bytes, pixels).map_err(says("PNG")),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => {
            from_webp(bytes, pixels).map_err(says("WebP"))
        }
        [b'G', b'I', b'F', b'8', ..] => {
            gif::decode(bytes, pixels).map(Raw::into_rgb).map_err(says("GIF"))
        }
        [b'B', b'M', ..] => bmp::decode(bytes).map(Raw::into_rgb).map_err(says("BMP")),
        [b'I', b'I', 42, 0, ..] | [b'M', b'M', 0, 42, ..] => {
            from_tiff(bytes, pixels).map_err(says("TIFF"))
        }
        _ if bytes.trim_ascii_start().starts_with(b"<") => {
            Err("not a picture: it reads like HTML or XML".into())
        }
        _ => Err("not a picture in a known format (JPEG, PNG, WebP, GIF, BMP, TIFF)".into()),
    }
}

fn from_jpeg(bytes: &[u8], pixels: Pixels) -> Fallible<Rgb> {
    let header = jpeg::header(bytes)?;
    checked(header.width, header.height)?;
    let orientation = oriented(header.exif, pixels);
    let samples = jpeg::decode(bytes, None, None)?;
    let sides = Sides { width: samples.width, height: samples.height };
    let (kind, mut data) = match samples.channels {
        1 => (Kind::Grey, samples.data),
        3 => (Kind::Rgb, samples.data),
        _ => (Kind::Cmyk, samples.data),
    };
    if kind == Kind::Cmyk {
        // Programs that write CMYK JPEG follow Adobe, who stored ink as light; PIL assumes so too.
        data.iter_mut().for_each(|v| *v = !*v);
    }
    Ok(Raw { sides, kind, data }.into_rgb().upright(orientation))
}

fn from_png(bytes: &[u8], pixels: Pixels) -> Fallible<Rgb> {
    let (raw, exif) = png::decode(bytes, pixels)?;
    Ok(raw.into_rgb().upright(oriented(exif.as_deref(), pixels)))
}

fn from_tiff(bytes: &[u8], pixels: Pixels) -> Fallible<Rgb> {
    // The orientation belongs to the format here, and PIL applies it.
    let orientation = tiff::orientation(bytes).unwrap_or(1);
    Ok(tiff::decode(bytes, pixels)?.into_rgb().upright(orientation))
}

fn from_webp(bytes: &[u8], pixels: Pixels) -> Fallible<Rgb> {
    let (raw, exif) = webp::decode(bytes, pixels)?;
    Ok(raw.into_rgb().upright(oriented(exif, pixels)))
}

/// The orientation to undo.
fn oriented(exif: Option<&[u8]>, pixels: Pixels) -> u16 {
    match pixels {
        Pixels::Default => exif.and_then(tiff::orientation).unwrap_or(1),
        Pixels::Hf => 1,
    }
}

// ---------------------------------------------------------------- samples

/// Runs `f` compiled for the widest SIMD this machine has (`f` must be `#[inline(always)]`).
#[inline(always)]
fn simd<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// Width and height that passed [`checked`].
#[derive(Clone, Copy)]
struct Sides {
    width: usize,
    height: usize,
}

impl Sides {
    fn pixels(self) -> usize {
        self.width * self.height
    }
}

/// The size of a picture, unless it is beyond the limits.
fn checked(width: usize, height: usize) -> Fallible<Sides> {
    if width == 0 || height == 0 {
        return Err(format!("a picture of {width}x{height} pixels"));
    }
    if width > MAX_SIDE as usize || height > MAX_SIDE as usize {
        return Err(format!("{width}x{height} pixels; a side may have {MAX_SIDE}"));
    }
    if width as u64 * height as u64 > MAX_PIXELS {
        let megapixels = MAX_PIXELS / 1_000_000;
        return Err(format!("{width}x{height} pixels; the limit is {megapixels} megapixels"));
    }
    Ok(Sides { width, height })
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Grey,
    GreyAlpha,
    Rgb,
    RgbAlpha,
    /// Ink: 255 is full cyan, magenta, yellow or black.
    Cmyk,
}

/// Decoded 8-bit samples, interleaved.
struct Raw {
    sides: Sides,
    kind: Kind,
    data: Vec<u8>,
}

impl Raw {
    /// Colours on white.
    fn into_rgb(self) -> Rgb {
        let data = self.data;
        let data = match self.kind {
            Kind::Rgb => data,
            Kind::Grey => data.iter().flat_map(|&v| [v; 3]).collect(),
            Kind::GreyAlpha => {
                data.as_chunks::<2>().0.iter().flat_map(|&[v, a]| [on_white(v, a); 3]).collect()
            }
            Kind::RgbAlpha => {
                let pixels = data.as_chunks::<4>().0.iter();
                pixels.flat_map(|&[r, g, b, a]| [r, g, b].map(|v| on_white(v, a))).collect()
            }
            Kind::Cmyk => {
                let pixels = data.as_chunks::<4>().0.iter();
                pixels.flat_map(|&[c, m, y, k]| [c, m, y].map(|v| product(!v, !k))).collect()
            }
        };
        Rgb { width: self.sides.width as u32, height: self.sides.height as u32, data }
    }
}

/// `a * b / 255`, rounded to the nearest.
fn product(a: u8, b: u8) -> u8 {
    ((u32::from(a) * u32::from(b) + 127) / 255) as u8
}

/// A colour of opacity `alpha` before white, rounded to the nearest; PIL's `alpha_composite` gives
/// the same for all 65 536 pairs.
fn on_white(value: u8, alpha: u8) -> u8 {
    let (value, alpha) = (u32::from(value), u32::from(alpha));
    ((value * alpha + 255 * (255 - alpha) + 127) / 255) as u8
}

/// Sixteen-bit samples as eight.
fn narrowed(kind: Kind, wide: &[u16], pixels: Pixels) -> Vec<u8> {
    match (pixels, kind) {
        (Pixels::Default, _) => {
            wide.iter().map(|&w| ((u32::from(w) * 255 + 32767) / 65535) as u8).collect()
        }
        (Pixels::Hf, Kind::Grey) => wide.iter().map(|&w| w.min(255) as u8).collect(),
        (Pixels::Hf, _) => wide.iter().map(|&w| (w >> 8) as u8).collect(),
    }
}

/// One value a byte out of rows of `line` bytes holding values of 1, 2, 4 or 8 bits.
fn unpacked(data: &[u8], line: usize, sides: Sides, bits: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(sides.pixels());
    let per_byte = 8 / bits;
    let mask = (0xFFu16 >> (8 - bits)) as u8;
    for row in data.chunks_exact(line.max(1)).take(sides.height) {
        let value = |x: usize| {
            let shift = 8 - bits - x % per_byte * bits;
            row[x / per_byte] >> shift & mask
        };
        out.extend((0..sides.width).map(value));
    }
    out
}

//! WebP to samples.
//!
//! Decoding is the `image` crate's, of stills only: the first frame of an animation is taken out
//! and made a still, which spares the decoder its least tested part.

use std::io::Cursor;

use image::codecs::webp::WebPDecoder;
use image::{ColorType, ImageDecoder};

use super::{Fallible, Kind, Pixels, Raw, Sides, checked};

/// Flags of the `VP8X` chunk.
const ANIMATED: u8 = 0x02;
const ALPHA: u8 = 0x10;

/// The samples and the EXIF data.
pub(super) fn decode(bytes: &[u8], pixels: Pixels) -> Fallible<(Raw, Option<&[u8]>)> {
    let chunks = || Chunks(bytes.get(12..).unwrap_or_default());
    let exif = chunks().find(|(name, _)| name == b"EXIF").map(|(_, body)| body);
    let extended = chunks().next().filter(|(name, _)| name == b"VP8X");
    let Some((_, &[flags, _, _, _, ref size @ ..])) = extended else {
        return Ok((still(bytes)?, exif));
    };
    if flags & ANIMATED == 0 {
        return Ok((still(bytes)?, exif));
    }
    let canvas = checked(three(size, 0)? + 1, three(size, 3)? + 1)?;
    let (_, frame) =
        chunks().find(|(name, _)| name == b"ANMF").ok_or("the file is cut: no frame")?;
    let corner = (three(frame, 0)? * 2, three(frame, 3)? * 2);
    let inner = checked(three(frame, 6)? + 1, three(frame, 9)? + 1)?;
    if corner.0 + inner.width > canvas.width || corner.1 + inner.height > canvas.height {
        return Err("the first frame lies outside the picture".into());
    }
    let raw = still(&as_still(frame.get(16..).unwrap_or_default(), inner))?;
    if raw.sides.width != inner.width || raw.sides.height != inner.height {
        return Err("the first frame is not as large as it says".into());
    }
    if inner.width == canvas.width && inner.height == canvas.height {
        return Ok((raw, exif));
    }
    // Around the frame a viewer sees nothing; PIL sees black when the file says it is opaque.
    let outside = match pixels {
        Pixels::Hf if flags & ALPHA == 0 => [0, 0, 0, 255],
        _ => [0; 4],
    };
    let mut data = vec![outside; canvas.pixels()];
    let channels = raw.data.len() / inner.pixels();
    for (y, row) in raw.data.chunks_exact(inner.width * channels).enumerate() {
        let at = (corner.1 + y) * canvas.width + corner.0;
        for (to, pixel) in data[at..].iter_mut().zip(row.chunks_exact(channels)) {
            to[3] = 255;
            to[..channels].copy_from_slice(pixel);
        }
    }
    Ok((Raw { sides: canvas, kind: Kind::RgbAlpha, data: data.into_flattened() }, exif))
}

fn still(bytes: &[u8]) -> Fallible<Raw> {
    let decoder = WebPDecoder::new(Cursor::new(bytes)).map_err(|e| e.to_string())?;
    let (width, height) = decoder.dimensions();
    let sides = checked(width as usize, height as usize)?;
    let kind = match decoder.color_type() {
        ColorType::Rgb8 => Kind::Rgb,
        ColorType::Rgba8 => Kind::RgbAlpha,
        other => return Err(format!("pixels of type {other:?} are not supported")),
    };
    let channels = if kind == Kind::Rgb { 3 } else { 4 };
    let mut data = vec![0; sides.pixels() * channels];
    decoder.read_image(&mut data).map_err(|e| e.to_string())?;
    Ok(Raw { sides, kind, data })
}

/// A file of its own around the chunks of one frame.
fn as_still(frame: &[u8], sides: Sides) -> Vec<u8> {
    let mut body = b"WEBP".to_vec();
    if frame.starts_with(b"ALPH") {
        body.extend(b"VP8X\x0a\0\0\0");
        body.extend([ALPHA, 0, 0, 0]);
        for side in [sides.width, sides.height] {
            body.extend(&(side as u32 - 1).to_le_bytes()[..3]);
        }
    }
    body.extend(frame);
    [b"RIFF".as_slice(), &(body.len() as u32).to_le_bytes(), &body].concat()
}

fn three(bytes: &[u8], at: usize) -> Fallible<usize> {
    match bytes.get(at..at + 3) {
        Some(&[a, b, c]) => Ok(u32::from_le_bytes([a, b, c, 0]) as usize),
        _ => Err("the file is cut".into()),
    }
}

/// Name and body of each chunk that is wholly there.
struct Chunks<'a>(&'a [u8]);

impl<'a> Iterator for Chunks<'a> {
    type Item = ([u8; 4], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (name, rest) = self.0.split_first_chunk::<4>()?;
        let (size, rest) = rest.split_first_chunk::<4>()?;
        let size = u32::from_le_bytes(*size) as usize;
        let body = rest.get(..size)?;
        self.0 = rest.get(size.next_multiple_of(2)..).unwrap_or_default();
        Some((*name, body))
    }
}

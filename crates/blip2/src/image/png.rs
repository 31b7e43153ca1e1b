//! PNG to samples, with the transparency rules of PIL beside the proper ones.
//!
//! Unfiltering and inflating are the `png` crate's; what is ours is what the samples mean: palettes,
//! depths below eight bits, and the `tRNS` chunk, which PIL reads in ways of its own.

use std::io::Cursor;

use png::{BitDepth, ColorType, Limits};

use super::{Fallible, Kind, Pixels, Raw, Sides, checked, narrowed, unpacked};

pub(super) fn decode(bytes: &[u8], pixels: Pixels) -> Fallible<(Raw, Option<Vec<u8>>)> {
    let limits = Limits { bytes: 64 << 20 };
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), limits);
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    let head = decoder.read_header_info().map_err(|e| plain(&e))?;
    let sides = checked(head.width as usize, head.height as usize)?;
    let mut reader = decoder.read_info().map_err(|e| plain(&e))?;
    let size = reader.output_buffer_size().ok_or("the picture is too large")?;
    let mut data = vec![0; size];
    let line = reader.next_frame(&mut data).map_err(|e| plain(&e))?.line_size;
    let info = reader.info();
    let exif = info.exif_metadata.as_ref().map(|e| e.to_vec());
    let transparent = info.trns.as_deref();
    let depth = info.bit_depth;
    let raw = match info.color_type {
        ColorType::Indexed => {
            let palette = info.palette.as_deref().ok_or("the palette is missing")?;
            let indices = unpacked(&data, line, sides, depth as usize);
            with_palette(sides, &indices, palette, transparent)
        }
        ColorType::Grayscale if depth != BitDepth::Sixteen => {
            let values = unpacked(&data, line, sides, depth as usize);
            grey(sides, &values, depth as u8, transparent, pixels)
        }
        color => {
            let kind = match color {
                ColorType::Grayscale => Kind::Grey,
                ColorType::GrayscaleAlpha => Kind::GreyAlpha,
                ColorType::Rgba => Kind::RgbAlpha,
                _ => Kind::Rgb,
            };
            match depth {
                BitDepth::Sixteen => {
                    let pairs = data.as_chunks::<2>().0;
                    let wide: Vec<u16> = pairs.iter().map(|&p| u16::from_be_bytes(p)).collect();
                    keyed_sixteen(sides, kind, &wide, transparent, pixels)
                }
                _ => keyed_eight(sides, kind, data, transparent),
            }
        }
    };
    Ok((raw, exif))
}

/// An error of the decoder in words: it prints chunks as Rust's structures, `ChunkType { type: IHDR, … }`.
fn plain(error: &png::DecodingError) -> String {
    let text = error.to_string();
    let named = || {
        let (before, rest) = text.split_once("ChunkType {")?;
        let (fields, after) = rest.split_once('}')?;
        let name = fields.split_once("type: ")?.1.split(',').next()?;
        Some(format!("{before}{}{after}", name.trim()))
    };
    named().unwrap_or_else(|| text.clone())
}

fn with_palette(sides: Sides, indices: &[u8], palette: &[u8], alpha: Option<&[u8]>) -> Raw {
    // An index beyond the palette is black and opaque.
    let mut table = [[0, 0, 0, 255u8]; 256];
    let colours = palette.as_chunks::<3>().0;
    for (entry, colour) in table.iter_mut().zip(colours) {
        entry[..3].copy_from_slice(colour);
    }
    let Some(alpha) = alpha else {
        let data = indices.iter().flat_map(|&i| {
            let [r, g, b, _] = table[usize::from(i)];
            [r, g, b]
        });
        return Raw { sides, kind: Kind::Rgb, data: data.collect() };
    };
    for (entry, &alpha) in table.iter_mut().zip(alpha).take(colours.len()) {
        entry[3] = alpha;
    }
    let data = indices.iter().flat_map(|&i| table[usize::from(i)]);
    Raw { sides, kind: Kind::RgbAlpha, data: data.collect() }
}

/// Grey of eight bits or fewer: scaled so that the largest value is white.
fn grey(sides: Sides, values: &[u8], bits: u8, key: Option<&[u8]>, pixels: Pixels) -> Raw {
    let scale = 255 / ((1u16 << bits) - 1) as u8;
    // Below 16 bits the `png` crate keeps the low byte only.
    let Some(&key) = key.and_then(<[u8]>::first) else {
        let data = values.iter().map(|&v| v * scale).collect();
        return Raw { sides, kind: Kind::Grey, data };
    };
    // The transparent value after scaling. PIL compares the stored key with the scaled pixels,
    // save for one bit, where any key but zero means white.
    let key = match (pixels, bits) {
        (Pixels::Hf, 1) => Some(if key == 0 { 0 } else { 255 }),
        (Pixels::Hf, _) => Some(key),
        (Pixels::Default, _) => key.checked_mul(scale),
    };
    let data = values.iter().map(|&v| v * scale);
    let data = data.flat_map(|v| [v, if Some(v) == key { 0 } else { 255 }]);
    Raw { sides, kind: Kind::GreyAlpha, data: data.collect() }
}

/// Eight-bit samples; an RGB picture may have one transparent colour.
fn keyed_eight(sides: Sides, kind: Kind, data: Vec<u8>, key: Option<&[u8]>) -> Raw {
    let (Kind::Rgb, Some(key)) = (kind, key.and_then(|k| k.first_chunk::<3>())) else {
        return Raw { sides, kind, data };
    };
    let alpha = |p: &[u8; 3]| [p[0], p[1], p[2], if p == key { 0 } else { 255 }];
    let data = data.as_chunks::<3>().0.iter().flat_map(alpha).collect();
    Raw { sides, kind: Kind::RgbAlpha, data }
}

/// Sixteen-bit samples, big-endian in the file. PIL makes them eight bits before it looks for the
/// transparent colour, of which it takes the low bytes.
fn keyed_sixteen(sides: Sides, kind: Kind, wide: &[u16], key: Option<&[u8]>, p: Pixels) -> Raw {
    let data = narrowed(kind, wide, p);
    let key: Vec<u16> =
        key.unwrap_or_default().as_chunks::<2>().0.iter().map(|&k| u16::from_be_bytes(k)).collect();
    let (channels, opaque_kind) = match (kind, key.len()) {
        (Kind::Grey, 1..) => (1, Kind::GreyAlpha),
        (Kind::Rgb, 3..) => (3, Kind::RgbAlpha),
        _ => return Raw { sides, kind, data },
    };
    let key = &key[..channels];
    let clear = |narrow: &[u8], wide: &[u16]| match p {
        Pixels::Hf => narrow.iter().zip(key).all(|(&v, &k)| v == k as u8),
        Pixels::Default => wide == key,
    };
    let mut out = Vec::with_capacity(data.len() / channels * (channels + 1));
    for (narrow, wide) in data.chunks_exact(channels).zip(wide.chunks_exact(channels)) {
        out.extend_from_slice(narrow);
        out.push(if clear(narrow, wide) { 0 } else { 255 });
    }
    Raw { sides, kind: opaque_kind, data: out }
}

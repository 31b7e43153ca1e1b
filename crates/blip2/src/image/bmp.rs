//! BMP to samples, as PIL reads it.
//!
//! OS/2 and Windows headers; palettes of 1, 4 and 8 bits with and without run lengths; 16, 24 and
//! 32 bits with any colour masks. Pixels that run lengths leave out are of palette entry 0.

use super::{Fallible, Kind, Raw, Sides, checked, unpacked};

const CUT: &str = "the file is cut";

struct Header {
    sides: Sides,
    bottom_up: bool,
    bits: usize,
    compression: u32,
    /// Where the pixels start.
    data: usize,
    palette: Vec<[u8; 3]>,
    /// Red, green, blue, opacity.
    masks: [u32; 4],
}

pub(super) fn decode(bytes: &[u8]) -> Fallible<Raw> {
    let header = Header::read(bytes)?;
    let sides = header.sides;
    let data = bytes.get(header.data..).ok_or(CUT)?;
    let line = (sides.width * header.bits).div_ceil(32) * 4;
    let rows = || data.get(..line * sides.height).ok_or(CUT);
    let (kind, top_down) = match (header.bits, header.compression) {
        (1 | 4 | 8, 0) => {
            let indices = unpacked(rows()?, line, sides, header.bits);
            (Kind::Rgb, header.coloured(&indices))
        }
        (4, 2) | (8, 1) => {
            let indices = run_lengths(bytes, header.data, sides, header.bits == 4)?;
            (Kind::Rgb, header.coloured(&indices))
        }
        (16 | 24 | 32, 0 | 3) => header.direct(rows()?, line),
        (bits, compression) => {
            return Err(format!("compression {compression} of {bits} bits is not supported"));
        }
    };
    let mut data = top_down;
    if header.bottom_up {
        let line = data.len() / sides.height;
        data = data.chunks_exact(line).rev().flatten().copied().collect();
    }
    Ok(Raw { sides, kind, data })
}

impl Header {
    fn read(bytes: &[u8]) -> Fallible<Self> {
        let short = |at: usize| match bytes.get(at..at + 2) {
            Some(&[a, b]) => Ok(u32::from(u16::from_le_bytes([a, b]))),
            _ => Err(CUT.to_string()),
        };
        let wide = |at: usize| match bytes.get(at..at + 4) {
            Some(&[a, b, c, d]) => Ok(u32::from_le_bytes([a, b, c, d])),
            _ => Err(CUT.to_string()),
        };
        let size = wide(14)?;
        let old = match size {
            12 => true,
            40 | 52 | 56 | 64 | 108 | 124 => false,
            _ => return Err(format!("a header of {size} bytes")),
        };
        let (width, height) = match old {
            true => (short(18)?, short(20)?.cast_signed()),
            false => (wide(18)?, wide(22)?.cast_signed()),
        };
        let sides = checked(width as usize, height.unsigned_abs() as usize)?;
        let bits = if old { short(24)? } else { short(28)? } as usize;
        let compression = if old { 0 } else { wide(30)? };
        let mut colours = 14 + size as usize;
        let masks = match (compression, bits) {
            (3, _) => {
                let alpha = if size >= 56 { wide(66)? } else { 0 };
                if size == 40 {
                    colours += 12;
                }
                match [wide(54)?, wide(58)?, wide(62)?, alpha] {
                    [0, 0, 0, 0] => [0xFF_0000, 0xFF00, 0xFF, 0xFF00_0000],
                    masks => masks,
                }
            }
            (_, 16) => [0x7C00, 0x3E0, 0x1F, 0],
            _ => [0xFF_0000, 0xFF00, 0xFF, 0],
        };
        let mut palette = Vec::new();
        let mut data = wide(10)? as usize;
        if bits <= 8 {
            let count = match if old { 0 } else { wide(46)? } {
                0 => 1 << bits,
                count => (count as usize).min(256),
            };
            let step = if old { 3 } else { 4 };
            if data == colours {
                // The offset forgot the palette.
                data += count * step;
            }
            let entries = bytes.get(colours..).unwrap_or_default().chunks_exact(step).take(count);
            palette.extend(entries.map(|e| [e[2], e[1], e[0]]));
        }
        Ok(Self { sides, bottom_up: old || height > 0, bits, compression, data, palette, masks })
    }

    fn coloured(&self, indices: &[u8]) -> Vec<u8> {
        let colour = |&i: &u8| self.palette.get(usize::from(i)).copied().unwrap_or_default();
        indices.iter().flat_map(colour).collect()
    }

    /// Pixels that hold their colour: 2, 3 or 4 bytes each, little-endian.
    fn direct(&self, rows: &[u8], line: usize) -> (Kind, Vec<u8>) {
        let step = self.bits / 8;
        let (kind, channels) = match self.masks[3] {
            0 => (Kind::Rgb, 3),
            _ => (Kind::RgbAlpha, 4),
        };
        let mut out = Vec::with_capacity(self.sides.pixels() * channels);
        for row in rows.chunks_exact(line) {
            for pixel in row.chunks_exact(step).take(self.sides.width) {
                let value = pixel.iter().rev().fold(0, |v, &b| v << 8 | u32::from(b));
                out.extend(self.masks[..channels].iter().map(|&mask| masked(value, mask)));
            }
        }
        (kind, out)
    }
}

/// The bits of `value` under `mask`, scaled so that all ones are 255; a fraction is dropped.
fn masked(value: u32, mask: u32) -> u8 {
    if mask == 0 {
        return 0;
    }
    let shift = mask.trailing_zeros();
    (u64::from((value & mask) >> shift) * 255 / u64::from(mask >> shift)) as u8
}

/// Run-length coded palette indices; `at` is their place in the file, to whose even offsets
/// literal runs are padded.
fn run_lengths(bytes: &[u8], mut at: usize, sides: Sides, nibbles: bool) -> Fallible<Vec<u8>> {
    let total = sides.pixels();
    let mut out: Vec<u8> = Vec::new();
    let mut x = 0;
    let value = |byte: u8, i: usize| match (nibbles, i % 2) {
        (false, _) => byte,
        (true, 0) => byte >> 4,
        (true, _) => byte & 15,
    };
    while out.len() < total {
        let Some(&[count, what]) = bytes.get(at..at + 2) else { return Err(CUT.into()) };
        at += 2;
        match (count, what) {
            (0, 0) => {
                out.resize(out.len().next_multiple_of(sides.width), 0);
                x = 0;
            }
            (0, 1) => break,
            (0, 2) => {
                let Some(&[right, up]) = bytes.get(at..at + 2) else { return Err(CUT.into()) };
                at += 2;
                let skipped = usize::from(right) + usize::from(up) * sides.width;
                out.resize((out.len() + skipped).min(total), 0);
                x = out.len() % sides.width;
            }
            (0, count) => {
                let count = usize::from(count).min(total - out.len());
                let size = if nibbles { count.div_ceil(2) } else { count };
                let run = bytes.get(at..at + size).ok_or(CUT)?;
                let per_byte = if nibbles { 2 } else { 1 };
                out.extend((0..count).map(|i| value(run[i / per_byte], i)));
                at = (at + size).next_multiple_of(2);
                x += usize::from(what);
            }
            (count, byte) => {
                let count = usize::from(count).min(sides.width.saturating_sub(x));
                out.extend((0..count).map(|i| value(byte, i)));
                x += count;
            }
        }
    }
    match out.len() {
        n if n < total => Err(format!("run lengths of {n} pixels instead of {total}")),
        _ => {
            out.truncate(total);
            Ok(out)
        }
    }
}

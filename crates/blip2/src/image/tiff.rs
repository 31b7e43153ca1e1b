//! TIFF to samples: the first picture of a file, as PIL reads it.
//!
//! Classic TIFF of either byte order, in strips or tiles, interleaved or in planes; uncompressed,
//! PackBits, LZW, Deflate or JPEG; grey and palette of 1, 2, 4 and 8 bits, grey, RGB and their
//! opacity of 8 and 16 bits, CMYK of 8 bits. Fax codes, floating point and BigTIFF are refused.
//!
//! The same directory format is what EXIF data consists of, so [`orientation`] lives here too.

use std::io::Read;

use super::{Fallible, Kind, Pixels, Raw, Sides, checked, jpeg, narrowed, unpacked};

/// The orientation (1 to 8) in a TIFF file or in EXIF data, if there is one.
pub(super) fn orientation(bytes: &[u8]) -> Option<u16> {
    // WebP and some PNG writers keep the prefix that belongs to JPEG.
    let bytes = bytes.strip_prefix(b"Exif\0\0").unwrap_or(bytes);
    let value = Directory::read(bytes).ok()?.number(ORIENTATION).ok()??;
    u16::try_from(value).ok().filter(|o| (1..=8).contains(o))
}

/// Decodes the first picture of the file.
pub(super) fn decode(bytes: &[u8], pixels: Pixels) -> Fallible<Raw> {
    let directory = Directory::read(bytes)?;
    let layout = Layout::read(&directory)?;
    let samples = layout.samples(&directory)?;
    layout.meaning(&directory, &samples, pixels)
}

const WIDTH: u16 = 256;
const HEIGHT: u16 = 257;
const BITS: u16 = 258;
const COMPRESSION: u16 = 259;
const PHOTOMETRIC: u16 = 262;
const FILL_ORDER: u16 = 266;
const STRIP_OFFSETS: u16 = 273;
const ORIENTATION: u16 = 274;
const SAMPLES: u16 = 277;
const ROWS_PER_STRIP: u16 = 278;
const STRIP_BYTES: u16 = 279;
const PLANAR: u16 = 284;
const PREDICTOR: u16 = 317;
const COLOUR_MAP: u16 = 320;
const TILE_WIDTH: u16 = 322;
const TILE_HEIGHT: u16 = 323;
const TILE_OFFSETS: u16 = 324;
const TILE_BYTES: u16 = 325;
const EXTRA_SAMPLES: u16 = 338;
const SAMPLE_FORMAT: u16 = 339;
const JPEG_TABLES: u16 = 347;

/// Rows of the highest unit of a JPEG, four blocks of eight: writers may round a strip up to whole units.
const MCU_ROWS: usize = 32;

// ---------------------------------------------------------------- directory

/// The first image file directory: its bytes and the order of theirs.
struct Directory<'a> {
    bytes: &'a [u8],
    little: bool,
    entries: &'a [[u8; 12]],
}

impl<'a> Directory<'a> {
    fn read(bytes: &'a [u8]) -> Fallible<Self> {
        let little = match bytes {
            [b'I', b'I', 42, 0, ..] => true,
            [b'M', b'M', 0, 42, ..] => false,
            _ => return Err("no TIFF header".into()),
        };
        let mut directory = Self { bytes, little, entries: &[] };
        let at = directory.wide(bytes.get(4..8)) as usize;
        let count = bytes.get(at..).and_then(|b| b.get(..2)).ok_or("the directory is missing")?;
        let size = usize::from(directory.short(count)) * 12;
        let entries = bytes.get(at + 2..).and_then(|b| b.get(..size));
        directory.entries = entries.ok_or("the directory is cut")?.as_chunks::<12>().0;
        Ok(directory)
    }

    fn short(&self, b: &[u8]) -> u16 {
        match b.first_chunk::<2>() {
            Some(&b) if self.little => u16::from_le_bytes(b),
            Some(&b) => u16::from_be_bytes(b),
            None => 0,
        }
    }

    fn wide(&self, b: Option<&[u8]>) -> u32 {
        match b.and_then(|b| b.first_chunk::<4>()) {
            Some(&b) if self.little => u32::from_le_bytes(b),
            Some(&b) => u32::from_be_bytes(b),
            None => 0,
        }
    }

    /// The bytes of a tag's value, their type and their number.
    fn value(&self, tag: u16) -> Fallible<Option<(&'a [u8], u16, usize)>> {
        let Some(entry) = self.entries.iter().find(|e| self.short(&e[..2]) == tag) else {
            return Ok(None);
        };
        let kind = self.short(&entry[2..]);
        let count = self.wide(Some(&entry[4..])) as usize;
        let size = match kind {
            1 | 2 | 6 | 7 => 1,
            3 | 8 => 2,
            4 | 9 => 4,
            _ => return Err(format!("tag {tag} has type {kind}")),
        };
        let size = count.checked_mul(size).ok_or_else(|| format!("tag {tag} is too large"))?;
        let bytes: Option<&[u8]> = match size {
            0..=4 => Some(&entry[8..8 + size]),
            _ => {
                self.bytes.get(self.wide(Some(&entry[8..])) as usize..).and_then(|b| b.get(..size))
            }
        };
        let bytes = bytes.ok_or_else(|| format!("the file is cut: tag {tag} lies outside"))?;
        Ok(Some((bytes, kind, count)))
    }

    fn numbers(&self, tag: u16) -> Fallible<Option<Vec<u32>>> {
        let Some((bytes, kind, _)) = self.value(tag)? else { return Ok(None) };
        Ok(Some(match kind {
            3 | 8 => bytes.chunks_exact(2).map(|b| u32::from(self.short(b))).collect(),
            4 | 9 => bytes.chunks_exact(4).map(|b| self.wide(Some(b))).collect(),
            _ => bytes.iter().map(|&b| u32::from(b)).collect(),
        }))
    }

    fn number(&self, tag: u16) -> Fallible<Option<u32>> {
        Ok(self.numbers(tag)?.and_then(|n| n.first().copied()))
    }

    fn number_or(&self, tag: u16, default: usize) -> Fallible<usize> {
        Ok(self.number(tag)?.map_or(default, |n| n as usize))
    }
}

// ---------------------------------------------------------------- layout

/// Where the samples are and how they are packed.
struct Layout {
    sides: Sides,
    bits: usize,
    channels: usize,
    compression: usize,
    photometric: usize,
    /// Channels in one plane: all of them, or one when planes are kept apart.
    together: usize,
    predictor: usize,
    reversed_bits: bool,
    /// Size of a strip or tile.
    chunk: Sides,
    tiled: bool,
    offsets: Vec<u32>,
    lengths: Vec<u32>,
}

impl Layout {
    fn read(directory: &Directory<'_>) -> Fallible<Self> {
        let width = directory.number_or(WIDTH, 0)?;
        let sides = checked(width, directory.number_or(HEIGHT, 0)?)?;
        let channels = directory.number_or(SAMPLES, 1)?;
        let all_bits = directory.numbers(BITS)?.unwrap_or_else(|| vec![1]);
        let bits = all_bits.first().map_or(0, |&b| b as usize);
        if all_bits.iter().any(|&b| b as usize != bits) || !matches!(bits, 1 | 2 | 4 | 8 | 16) {
            return Err(format!("samples of {all_bits:?} bits are not supported"));
        }
        if !(1..=5).contains(&channels) || (bits < 8 && channels > 1) {
            return Err(format!("{channels} samples of {bits} bits are not supported"));
        }
        let format = directory.number_or(SAMPLE_FORMAT, 1)?;
        if format != 1 {
            return Err(format!("samples of format {format} (not unsigned) are not supported"));
        }
        let photometric = directory.number(PHOTOMETRIC)?.ok_or("no photometric interpretation")?;
        let apart = directory.number_or(PLANAR, 1)? == 2;
        let tiled = directory.number(TILE_WIDTH)?.is_some();
        let (offsets, lengths, chunk) = match tiled {
            true => {
                let width = directory.number_or(TILE_WIDTH, 0)?;
                let chunk = checked(width, directory.number_or(TILE_HEIGHT, 0)?)?;
                (TILE_OFFSETS, TILE_BYTES, chunk)
            }
            false => {
                let rows = directory.number_or(ROWS_PER_STRIP, sides.height)?;
                let rows = rows.clamp(1, sides.height);
                (STRIP_OFFSETS, STRIP_BYTES, Sides { width, height: rows })
            }
        };
        let offsets = directory.numbers(offsets)?.ok_or("no strips or tiles")?;
        let lengths = directory.numbers(lengths)?.ok_or("no strip or tile sizes")?;
        let layout = Self {
            sides,
            bits,
            channels,
            compression: directory.number_or(COMPRESSION, 1)?,
            photometric: photometric as usize,
            together: if apart { 1 } else { channels },
            predictor: directory.number_or(PREDICTOR, 1)?,
            reversed_bits: directory.number_or(FILL_ORDER, 1)? == 2,
            chunk,
            tiled,
            offsets,
            lengths,
        };
        let needed = layout.across() * layout.down() * (channels / layout.together);
        if layout.offsets.len() < needed || layout.lengths.len() < needed {
            return Err(format!("{} strips or tiles of {needed}", layout.offsets.len()));
        }
        Ok(layout)
    }

    fn across(&self) -> usize {
        self.sides.width.div_ceil(self.chunk.width)
    }

    fn down(&self) -> usize {
        self.sides.height.div_ceil(self.chunk.height)
    }

    /// All samples, interleaved, one value each: bytes below 16 bits, else native 16 bits.
    fn samples(&self, directory: &Directory<'_>) -> Fallible<Samples> {
        let tables = directory.value(JPEG_TABLES)?.map(|(bytes, ..)| bytes);
        let total = self.sides.pixels() * self.channels;
        let mut out = match self.bits {
            16 => Samples::Wide(vec![0; total]),
            _ => Samples::Bytes(vec![0; total]),
        };
        let mut chunks = self.offsets.iter().zip(&self.lengths);
        for plane in 0..self.channels / self.together {
            for cy in 0..self.down() {
                for cx in 0..self.across() {
                    let Some((&offset, &length)) = chunks.next() else { continue };
                    let stored = directory.bytes.get(offset as usize..);
                    let stored = stored.and_then(|b| b.get(..length as usize));
                    let stored = stored.ok_or("the file is cut: a strip lies outside")?;
                    let left = self.sides.height - cy * self.chunk.height;
                    let rows = match self.tiled {
                        true => self.chunk.height,
                        false => self.chunk.height.min(left),
                    };
                    let corner = (cx * self.chunk.width, cy * self.chunk.height);
                    self.chunk(stored, tables, rows, corner, plane, directory.little, &mut out)?;
                }
            }
        }
        Ok(out)
    }

    /// Unpacks one strip or tile of `rows` rows and puts it where it belongs.
    fn chunk(
        &self,
        stored: &[u8],
        tables: Option<&[u8]>,
        rows: usize,
        corner: (usize, usize),
        plane: usize,
        little: bool,
        out: &mut Samples,
    ) -> Fallible<()> {
        let values = self.chunk.width * self.together;
        let line = (values * self.bits).div_ceil(8);
        let size = line * rows;
        let mut reversed = Vec::new();
        let stored = match self.reversed_bits && self.compression != 7 {
            true => {
                reversed.extend(stored.iter().map(|b| b.reverse_bits()));
                reversed.as_slice()
            }
            false => stored,
        };
        let mut data = match self.compression {
            1 => stored.get(..size).map(<[u8]>::to_vec).ok_or("the file is cut: a short strip")?,
            5 => lzw(stored, size)?,
            7 => self.jpeg(stored, tables, rows)?,
            8 | 32946 => {
                let mut data = Vec::with_capacity(size.min(stored.len().saturating_mul(1024)));
                let mut inflate = flate2::read::ZlibDecoder::new(stored).take(size as u64);
                inflate.read_to_end(&mut data).map_err(|e| format!("Deflate: {e}"))?;
                data
            }
            32773 => packbits(stored, size),
            other => return Err(format!("compression {other} is not supported")),
        };
        if data.len() < size {
            return Err(format!("a strip or tile of {} bytes instead of {size}", data.len()));
        }
        data.truncate(size);
        self.predict(&mut data, line, little)?;
        let width = self.chunk.width.min(self.sides.width - corner.0);
        let height = rows.min(self.sides.height - corner.1);
        let sides = Sides { width: self.chunk.width * self.together, height: rows };
        let step = self.channels;
        let first = |y: usize| ((corner.1 + y) * self.sides.width + corner.0) * step + plane;
        match out {
            Samples::Bytes(out) => {
                let data =
                    if self.bits < 8 { unpacked(&data, line, sides, self.bits) } else { data };
                for (y, row) in data.chunks_exact(values).take(height).enumerate() {
                    place(&row[..width * self.together], &mut out[first(y)..], self.together, step);
                }
            }
            Samples::Wide(out) => {
                let native = |&b: &[u8; 2]| match little {
                    true => u16::from_le_bytes(b),
                    false => u16::from_be_bytes(b),
                };
                let data: Vec<u16> = data.as_chunks::<2>().0.iter().map(native).collect();
                for (y, row) in data.chunks_exact(values).take(height).enumerate() {
                    place(&row[..width * self.together], &mut out[first(y)..], self.together, step);
                }
            }
        }
        Ok(())
    }

    /// A JPEG says its own size, and memory is taken for that: it is held to the chunk's, not only the picture's.
    fn jpeg(&self, stored: &[u8], tables: Option<&[u8]>, rows: usize) -> Fallible<Vec<u8>> {
        let header = jpeg::header(stored)?;
        checked(header.width, header.height)?;
        let highest = self.chunk.height.next_multiple_of(MCU_ROWS);
        let fits = header.width == self.chunk.width && (rows..=highest).contains(&header.height);
        if self.bits != 8 || !fits {
            let Sides { width, height } = self.chunk;
            return Err(format!(
                "a JPEG of {}x{} in a strip or tile of {width}x{height} with {} bits",
                header.width, header.height, self.bits
            ));
        }
        let colour = match self.photometric {
            6 => jpeg::Colour::Ycc,
            _ => jpeg::Colour::Plain,
        };
        let samples = jpeg::decode(stored, tables, Some(colour))?;
        if samples.channels != self.together {
            return Err(format!("a JPEG strip of {} components", samples.channels));
        }
        Ok(samples.data)
    }

    /// Undoes horizontal differencing.
    fn predict(&self, data: &mut [u8], line: usize, little: bool) -> Fallible<()> {
        let step = self.together;
        match (self.predictor, self.bits, self.compression) {
            (_, _, 1 | 7 | 32773) | (0 | 1, ..) => Ok(()),
            (2, 8, _) => {
                for row in data.chunks_exact_mut(line) {
                    for i in step..line {
                        row[i] = row[i].wrapping_add(row[i - step]);
                    }
                }
                Ok(())
            }
            (2, 16, _) => {
                for row in data.chunks_exact_mut(line) {
                    let row = row.as_chunks_mut::<2>().0;
                    for i in step..row.len() {
                        let (a, b) = (row[i], row[i - step]);
                        row[i] = match little {
                            true => u16::from_le_bytes(a)
                                .wrapping_add(u16::from_le_bytes(b))
                                .to_le_bytes(),
                            false => u16::from_be_bytes(a)
                                .wrapping_add(u16::from_be_bytes(b))
                                .to_be_bytes(),
                        };
                    }
                }
                Ok(())
            }
            (predictor, bits, _) => {
                Err(format!("predictor {predictor} for {bits} bits is not supported"))
            }
        }
    }

    /// What the samples stand for.
    fn meaning(
        &self,
        directory: &Directory<'_>,
        samples: &Samples,
        pixels: Pixels,
    ) -> Fallible<Raw> {
        let sides = self.sides;
        let base = match self.photometric {
            0 | 1 | 3 => 1,
            2 | 6 => 3,
            5 => 4,
            other => return Err(format!("photometric interpretation {other} is not supported")),
        };
        if self.channels < base || (self.photometric == 6 && self.compression != 7) {
            let (p, n) = (self.photometric, self.channels);
            return Err(format!("photometric interpretation {p} of {n} samples is not supported"));
        }
        let extra = directory.numbers(EXTRA_SAMPLES)?.and_then(|e| e.first().copied());
        // What one sample more is: nothing, premultiplied or plain opacity. RGB with a fourth
        // sample and no word about it is taken to have opacity, as PIL does.
        let opacity = match (self.channels - base, extra) {
            (0, _) | (_, Some(0)) => None,
            (1, Some(1)) => Some(true),
            (1, Some(_)) => Some(false),
            (1, None) if base == 3 => Some(false),
            _ => None,
        };
        let (kind, keep) = match (base, opacity) {
            (1, Some(_)) => (Kind::GreyAlpha, 2),
            (1, None) => (Kind::Grey, 1),
            (3, Some(_)) => (Kind::RgbAlpha, 4),
            (3, None) => (Kind::Rgb, 3),
            _ => (Kind::Cmyk, 4),
        };
        let mut data = match samples {
            Samples::Bytes(bytes) => kept(bytes, self.channels, keep),
            Samples::Wide(wide) => narrowed(kind, &kept(wide, self.channels, keep), pixels),
        };
        if self.photometric == 3 {
            let map = directory.numbers(COLOUR_MAP)?.ok_or("the palette is missing")?;
            return palette(sides, &data, &map, self.bits, keep);
        }
        if self.bits < 8 {
            let scale = 255 / ((1u16 << self.bits) - 1) as u8;
            data.iter_mut().for_each(|v| *v *= scale);
        }
        // White is zero; PIL forgets that when there are 16 bits.
        if self.photometric == 0 && !(self.bits == 16 && pixels == Pixels::Hf) {
            data.chunks_exact_mut(keep).for_each(|p| p[0] = !p[0]);
        }
        if opacity == Some(true) {
            for pixel in data.chunks_exact_mut(keep) {
                let Some((&mut alpha, colours)) = pixel.split_last_mut() else { continue };
                for v in colours.iter_mut().filter(|_| alpha > 0) {
                    *v = (u32::from(*v) * 255 / u32::from(alpha)).min(255) as u8;
                }
            }
        }
        Ok(Raw { sides, kind, data })
    }
}

enum Samples {
    Bytes(Vec<u8>),
    Wide(Vec<u16>),
}

/// The first `keep` of every `channels` values.
fn kept<T: Copy>(values: &[T], channels: usize, keep: usize) -> Vec<T> {
    values.chunks_exact(channels).flat_map(|p| &p[..keep]).copied().collect()
}

/// Copies a row of one plane into a row that holds `step` values a pixel.
fn place<T: Copy>(from: &[T], to: &mut [T], together: usize, step: usize) {
    if together == step {
        to[..from.len()].copy_from_slice(from);
        return;
    }
    for (i, &v) in from.iter().enumerate() {
        to[i * step] = v;
    }
}

fn palette(sides: Sides, data: &[u8], map: &[u32], bits: usize, keep: usize) -> Fallible<Raw> {
    let n = 1 << bits;
    if bits > 8 || map.len() < 3 * n {
        return Err(format!("a palette of {} numbers for {bits} bits", map.len()));
    }
    let colour = |p: &[u8]| {
        let i = usize::from(p[0]);
        [map[i], map[n + i], map[2 * n + i]].map(|v| (v >> 8) as u8)
    };
    let data = data.chunks_exact(keep).flat_map(colour).collect();
    Ok(Raw { sides, kind: Kind::Rgb, data })
}

fn lzw(stored: &[u8], size: usize) -> Fallible<Vec<u8>> {
    let mut decoder = weezl::decode::Decoder::with_tiff_size_switch(weezl::BitOrder::Msb, 8);
    let mut data = vec![0; size];
    let (mut read, mut written) = (0, 0);
    while written < size {
        let result = decoder.decode_bytes(&stored[read..], &mut data[written..]);
        read += result.consumed_in;
        written += result.consumed_out;
        match result.status.map_err(|e| format!("LZW: {e}"))? {
            weezl::LzwStatus::Ok if result.consumed_in + result.consumed_out > 0 => {}
            _ => break,
        }
    }
    data.truncate(written);
    Ok(data)
}

fn packbits(stored: &[u8], size: usize) -> Vec<u8> {
    let mut data = Vec::with_capacity(size.min(stored.len().saturating_mul(128)));
    let mut rest = stored;
    while let Some((&head, tail)) = rest.split_first() {
        if data.len() >= size {
            break;
        }
        rest = match head {
            0..=127 => {
                let n = (usize::from(head) + 1).min(tail.len());
                data.extend_from_slice(&tail[..n]);
                &tail[n..]
            }
            128 => tail,
            _ => {
                let Some((&value, tail)) = tail.split_first() else { break };
                data.resize(data.len() + 257 - usize::from(head), value);
                tail
            }
        };
    }
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A grey picture of one strip that holds a JPEG of another size: its frame header and no more.
    fn jpeg_in_tiff(picture: (u16, u16), jpeg: (u16, u16)) -> Vec<u8> {
        let ([h0, h1], [w0, w1]) = (jpeg.1.to_be_bytes(), jpeg.0.to_be_bytes());
        let strip = [0xFF, 0xD8, 0xFF, 0xC0, 0, 11, 8, h0, h1, w0, w1, 1, 1, 0x11, 0];
        let entries = [
            (WIDTH, u32::from(picture.0)),
            (HEIGHT, u32::from(picture.1)),
            (BITS, 8),
            (COMPRESSION, 7),
            (PHOTOMETRIC, 1),
            (STRIP_OFFSETS, 8 + 2 + 7 * 12),
            (STRIP_BYTES, strip.len() as u32),
        ];
        let mut file = b"II*\0\x08\0\0\0\x07\0".to_vec();
        for (tag, value) in entries {
            file.extend(tag.to_le_bytes());
            file.extend([4, 0, 1, 0, 0, 0]);
            file.extend(value.to_le_bytes());
        }
        file.extend(strip);
        file
    }

    #[test]
    fn a_jpeg_beyond_its_strip_is_refused_by_its_header() {
        for (picture, jpeg, reason) in [
            ((65_535, 1), (65_535, 65_535), "limit is 100 megapixels"),
            ((10_000, 10_000), (10_000, 10_016), "limit is 100 megapixels"),
            ((64, 8), (64, 65_535), "a JPEG of 64x65535 in a strip or tile of 64x8"),
            ((64, 8), (64, 33), "a JPEG of 64x33"),
            ((64, 8), (64, 7), "a JPEG of 64x7"),
            ((64, 8), (65, 8), "a JPEG of 65x8"),
            // Sizes that fit get as far as the data, of which there is none.
            ((64, 8), (64, 8), "cut"),
            ((64, 8), (64, 32), "cut"),
        ] {
            let file = jpeg_in_tiff(picture, jpeg);
            let said = decode(&file, Pixels::Default).err().unwrap_or_default();
            assert!(said.contains(reason), "{jpeg:?} in {picture:?}: {said}");
        }
    }
}

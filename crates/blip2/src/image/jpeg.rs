//! JPEG to samples, bit for bit what libjpeg-turbo (and so PIL) makes of the same file.
//!
//! Why not a decoder off the shelf: the memory-safe ones round the inverse DCT and interpolate the
//! chroma differently from libjpeg (up to 5 of 255, one sample in five of a 4:2:0 picture), and
//! libjpeg itself is C. What makes the pixels the same here: the 13-bit integer inverse DCT of
//! Loeffler, Ligtenberg and Moschytz, the triangle filter for chroma that is halved, plain
//! repetition for other ratios, and 16-bit fixed-point colour conversion.
//!
//! Reads Huffman-coded files of 8 bits: sequential and progressive, 1, 3 or 4 components. Arithmetic
//! coding, lossless and 12-bit files are refused. Damaged or cut entropy data is an error, never
//! grey filling. Files whose progressive scans never reach full precision are shown as they are;
//! libjpeg would smooth them.
//!
//! ```text
//! bytes ─markers, Huffman─▶ coefficients (i16, 64 a block) ─dequantise, IDCT─▶ one plane a component ─upsample, colour─▶ rows
//! ```

use rayon::prelude::*;

use super::{Fallible, simd};

/// Samples of one picture, row-major and interleaved.
pub(super) struct Samples {
    pub(super) width: usize,
    pub(super) height: usize,
    /// 1: grey, 3: red green blue, 4: cyan magenta yellow black as libjpeg hands them out.
    pub(super) channels: usize,
    pub(super) data: Vec<u8>,
}

/// What the three or four components mean.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Colour {
    /// As stored: grey, RGB or CMYK.
    Plain,
    /// Luma and two chromas, with black as it is when there are four components.
    Ycc,
}

/// The header's facts, read without touching the entropy data.
pub(super) struct Header<'a> {
    pub(super) width: usize,
    pub(super) height: usize,
    /// The TIFF structure inside the EXIF segment.
    pub(super) exif: Option<&'a [u8]>,
}

/// Rows that threads take at a time: of MCUs when transforming, of pixels when colouring.
const STRIP: usize = 16;

/// Scans of one file; more is an attempt to keep us busy (ordinary progressive files have ten).
const MAX_SCANS: usize = 300;

/// Natural position of the k-th coefficient in file order.
const ZIGZAG: [u8; 64] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20,
    13, 6, 7, 14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59,
    52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
];

/// Size and EXIF of a JPEG file.
///
/// # Errors
/// When there is no frame header or it is one we don't read.
pub(super) fn header(bytes: &[u8]) -> Fallible<Header<'_>> {
    let mut reader = Reader::new(bytes);
    reader.start()?;
    loop {
        match reader.segment()? {
            (0xC0..=0xC2, body) => {
                let frame = Frame::parse(0xC0, body)?;
                let exif = reader.exif;
                return Ok(Header { width: frame.width, height: frame.height, exif });
            }
            (marker, body) => reader.table(marker, body)?,
        }
    }
}

/// Decodes a whole file. `tables` is an abbreviated stream read first (TIFF keeps its tables
/// apart); `colour` overrides what the file's own markers say.
///
/// # Errors
/// Anything that keeps a sample from being what the encoder meant.
pub(super) fn decode(
    bytes: &[u8],
    tables: Option<&[u8]>,
    colour: Option<Colour>,
) -> Fallible<Samples> {
    let mut reader = Reader::new(bytes);
    if let Some(tables) = tables {
        reader.abbreviated(tables)?;
    }
    reader.start()?;
    let mut picture: Option<Picture> = None;
    let mut scans = 0;
    loop {
        match reader.segment() {
            Ok((marker @ 0xC0..=0xC2, body)) => {
                if picture.is_some() {
                    return Err("a second frame header".into());
                }
                picture = Some(Picture::new(Frame::parse(marker, body)?));
            }
            Ok((0xDA, body)) => {
                let picture = picture.as_mut().ok_or("a scan before the frame header")?;
                scans += 1;
                if scans > MAX_SCANS {
                    return Err(format!("more than {MAX_SCANS} scans"));
                }
                picture.scan(&mut reader, body)?;
            }
            Ok((0xD9, _)) => break,
            Ok((marker, body)) => reader.table(marker, body)?,
            // A sequential file is whole once its last block is; only the end marker is lost.
            Err(_) if picture.as_ref().is_some_and(Picture::sequential_and_whole) => break,
            Err(reason) => return Err(reason),
        }
    }
    let picture = picture.ok_or("no frame header")?;
    let colour = colour.unwrap_or_else(|| reader.colour(&picture.frame));
    picture.finish(colour)
}

// ---------------------------------------------------------------- markers

struct Reader<'a> {
    data: &'a [u8],
    at: usize,
    exif: Option<&'a [u8]>,
    jfif: bool,
    adobe: Option<u8>,
    restart: usize,
    quant: [Option<[u16; 64]>; 4],
    dc: [Option<Box<Huffman>>; 4],
    ac: [Option<Box<Huffman>>; 4],
}

impl<'a> Reader<'a> {
    fn new(data: &'a [u8]) -> Self {
        Self {
            data,
            at: 0,
            exif: None,
            jfif: false,
            adobe: None,
            restart: 0,
            quant: [None; 4],
            dc: [const { None }; 4],
            ac: [const { None }; 4],
        }
    }

    fn start(&mut self) -> Fallible<()> {
        if !self.data.starts_with(&[0xFF, 0xD8]) {
            return Err("no start-of-image marker".into());
        }
        self.at = 2;
        Ok(())
    }

    /// Reads the tables of an abbreviated stream and forgets the stream.
    fn abbreviated(&mut self, tables: &'a [u8]) -> Fallible<()> {
        let data = std::mem::replace(&mut self.data, tables);
        self.start()?;
        loop {
            match self.segment()? {
                (0xD9, _) => break,
                (marker, body) => self.table(marker, body)?,
            }
        }
        self.data = data;
        Ok(())
    }

    /// The next marker and its body, skipping fill bytes and stray data as libjpeg does.
    fn segment(&mut self) -> Fallible<(u8, &'a [u8])> {
        const CUT: &str = "the file is cut: it ends before the end-of-image marker";
        loop {
            let rest = self.data.get(self.at..).ok_or(CUT)?;
            let skip = rest.iter().position(|&b| b == 0xFF).ok_or(CUT)?;
            self.at += skip + 1;
            let Some(&marker) = self.data.get(self.at) else { return Err(CUT.into()) };
            match marker {
                0xFF => {}
                0x00 | 0x01 | 0xD0..=0xD7 => self.at += 1,
                0xD8 => return Err("a second start-of-image marker".into()),
                0xD9 => {
                    self.at += 1;
                    return Ok((marker, &[]));
                }
                _ => {
                    let length = self.data.get(self.at + 1..self.at + 3).ok_or(CUT)?;
                    let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
                    if length < 2 {
                        return Err(format!("segment {marker:#04x} has length {length}"));
                    }
                    let body = self.data.get(self.at + 3..self.at + 1 + length).ok_or(CUT)?;
                    self.at += 1 + length;
                    return Ok((marker, body));
                }
            }
        }
    }

    /// Takes in every segment that is neither frame, scan nor end.
    fn table(&mut self, marker: u8, body: &'a [u8]) -> Fallible<()> {
        match marker {
            0xDB => self.quantisation(body),
            0xC4 => self.huffman(body),
            0xDD => {
                let value = body.get(..2).ok_or("restart interval too short")?;
                self.restart = usize::from(u16::from_be_bytes([value[0], value[1]]));
                Ok(())
            }
            0xE0 => {
                self.jfif |= body.starts_with(b"JFIF\0");
                Ok(())
            }
            0xE1 => {
                if self.exif.is_none() {
                    self.exif = body.strip_prefix(b"Exif\0\0");
                }
                Ok(())
            }
            0xEE => {
                if body.len() >= 12 && body.starts_with(b"Adobe") {
                    self.adobe = Some(body[11]);
                }
                Ok(())
            }
            0xC9..=0xCB | 0xCD..=0xCF => Err("arithmetic coding is not supported".into()),
            0xC3 | 0xC5..=0xC7 => Err("lossless and hierarchical JPEG are not supported".into()),
            0xD9 => Err("no picture before the end-of-image marker".into()),
            0xDA => Err("a scan before the frame header".into()),
            _ => Ok(()),
        }
    }

    fn quantisation(&mut self, mut body: &[u8]) -> Fallible<()> {
        while let Some((&kind, rest)) = body.split_first() {
            let (wide, slot) = (kind >> 4, usize::from(kind & 15));
            if wide > 1 || slot > 3 {
                return Err(format!("quantisation table {kind:#04x} does not exist"));
            }
            let size = if wide == 1 { 128 } else { 64 };
            let values = rest.get(..size).ok_or("quantisation table is cut")?;
            let mut table = [0u16; 64];
            for (k, &natural) in ZIGZAG.iter().enumerate() {
                table[usize::from(natural)] = match wide {
                    0 => u16::from(values[k]),
                    _ => u16::from_be_bytes([values[2 * k], values[2 * k + 1]]),
                };
            }
            self.quant[slot] = Some(table);
            body = &rest[size..];
        }
        Ok(())
    }

    fn huffman(&mut self, mut body: &[u8]) -> Fallible<()> {
        while let Some((&kind, rest)) = body.split_first() {
            let (class, slot) = (kind >> 4, usize::from(kind & 15));
            if class > 1 || slot > 3 {
                return Err(format!("Huffman table {kind:#04x} does not exist"));
            }
            let counts = rest.first_chunk::<16>().ok_or("Huffman table is cut")?;
            let total = counts.iter().map(|&n| usize::from(n)).sum::<usize>();
            let symbols = rest.get(16..16 + total).ok_or("Huffman table is cut")?;
            let table = Some(Box::new(Huffman::new(counts, symbols)?));
            if class == 0 {
                if symbols.iter().any(|&s| s > 15) {
                    return Err("a DC Huffman table holds a symbol above 15".into());
                }
                self.dc[slot] = table;
            } else {
                self.ac[slot] = table;
            }
            body = &rest[16 + total..];
        }
        Ok(())
    }

    /// libjpeg's guess at the colour space from the markers and component names.
    fn colour(&self, frame: &Frame) -> Colour {
        let names: Vec<u8> = frame.components.iter().map(|c| c.name).collect();
        match (names.len(), self.adobe) {
            (3, _) if self.jfif => Colour::Ycc,
            (3, Some(0)) => Colour::Plain,
            (3, None) if names == *b"RGB" => Colour::Plain,
            (3, _) => Colour::Ycc,
            (4, Some(transform)) if transform != 0 => Colour::Ycc,
            _ => Colour::Plain,
        }
    }
}

// ---------------------------------------------------------------- frame and planes

struct Component {
    name: u8,
    /// Sampling factors: blocks a MCU, across and down.
    h: usize,
    v: usize,
    quant: usize,
    /// Samples that belong to the picture.
    width: usize,
    height: usize,
    /// Blocks held, padded to whole MCUs.
    across: usize,
    down: usize,
}

struct Frame {
    width: usize,
    height: usize,
    progressive: bool,
    h_max: usize,
    v_max: usize,
    components: Vec<Component>,
}

impl Frame {
    fn parse(marker: u8, body: &[u8]) -> Fallible<Self> {
        let head = body.first_chunk::<6>().ok_or("frame header is cut")?;
        if head[0] != 8 {
            return Err(format!("{} bits a sample; only 8 are supported", head[0]));
        }
        let height = usize::from(u16::from_be_bytes([head[1], head[2]]));
        let width = usize::from(u16::from_be_bytes([head[3], head[4]]));
        if width == 0 || height == 0 {
            return Err(format!("a picture of {width}x{height} pixels"));
        }
        let count = usize::from(head[5]);
        if !matches!(count, 1 | 3 | 4) {
            return Err(format!("{count} components; 1, 3 or 4 are supported"));
        }
        let list = body.get(6..6 + 3 * count).ok_or("frame header is cut")?;
        let mut components = Vec::with_capacity(count);
        for c in list.chunks_exact(3) {
            let (h, v) = (usize::from(c[1] >> 4), usize::from(c[1] & 15));
            if !(1..=4).contains(&h) || !(1..=4).contains(&v) || c[2] > 3 {
                return Err(format!("component {} has sampling {h}x{v}, table {}", c[0], c[2]));
            }
            let quant = usize::from(c[2]);
            components.push(Component {
                name: c[0],
                h,
                v,
                quant,
                width: 0,
                height: 0,
                across: 0,
                down: 0,
            });
        }
        let h_max = components.iter().map(|c| c.h).max().unwrap_or(1);
        let v_max = components.iter().map(|c| c.v).max().unwrap_or(1);
        for c in &mut components {
            c.width = (width * c.h).div_ceil(h_max);
            c.height = (height * c.v).div_ceil(v_max);
            c.across = width.div_ceil(8 * h_max) * c.h;
            c.down = height.div_ceil(8 * v_max) * c.v;
            if h_max % c.h != 0 || v_max % c.v != 0 {
                return Err(format!("component {} is sampled {}:{h_max}", c.name, c.h));
            }
        }
        Ok(Self { width, height, progressive: marker == 0xC2, h_max, v_max, components })
    }
}

struct Picture {
    frame: Frame,
    /// One plane a component, `across * 8` samples a row.
    planes: Vec<Vec<u8>>,
    /// Coefficients of the whole picture; progressive files only.
    coefficients: Vec<Vec<i16>>,
    quant: Vec<Option<[u16; 64]>>,
    seen: Vec<bool>,
}

/// One component's part in a scan.
struct Part<'a> {
    index: usize,
    dc: Option<&'a Huffman>,
    ac: Option<&'a Huffman>,
    prediction: i32,
}

/// A [`Part`] of a sequential scan, with what its blocks need.
struct Lane<'s, 'a> {
    dc: &'a Huffman,
    ac: &'a Huffman,
    prediction: &'s mut i32,
    /// Blocks a row of the component, and in one MCU across and down.
    stride: usize,
    h: usize,
    v: usize,
}

impl<'s, 'a> Lane<'s, 'a> {
    fn new(part: &'s mut Part<'a>, stride: usize, h: usize, v: usize) -> Fallible<Self> {
        let dc = part.dc.ok_or("a DC Huffman table is missing")?;
        let ac = part.ac.ok_or("an AC Huffman table is missing")?;
        Ok(Self { dc, ac, prediction: &mut part.prediction, stride, h, v })
    }

    /// Coefficients in a row of MCUs.
    fn row(&self) -> usize {
        self.stride * self.v * 64
    }
}

/// The blocks of a sequential scan, in the file's order.
struct Entropy<'s, 'a> {
    bits: &'s mut Bits<'a>,
    lanes: Vec<Lane<'s, 'a>>,
    /// MCUs a row.
    across: usize,
    restarts: Restarts,
}

impl Entropy<'_, '_> {
    /// Reads the next `count` rows of MCUs into one buffer a lane.
    fn strip(&mut self, strips: &mut [Vec<i16>], count: usize) -> Fallible<()> {
        for (lane, strip) in self.lanes.iter().zip(&mut *strips) {
            strip[..count * lane.row()].fill(0);
        }
        for my in 0..count {
            for mx in 0..self.across {
                if self.restarts.due(self.bits)? {
                    self.lanes.iter_mut().for_each(|lane| *lane.prediction = 0);
                }
                for (lane, strip) in self.lanes.iter_mut().zip(&mut *strips) {
                    for y in 0..lane.v {
                        for x in 0..lane.h {
                            let at = ((my * lane.v + y) * lane.stride + mx * lane.h + x) * 64;
                            let block = strip[at..].first_chunk_mut::<64>();
                            let block = block.ok_or("a block outside the picture")?;
                            sequential_block(self.bits, lane.dc, lane.ac, lane.prediction, block)?;
                        }
                    }
                }
                self.bits.check()?;
            }
        }
        Ok(())
    }
}

/// The restart markers of a scan.
struct Restarts {
    /// MCUs from one to the next; 0: there are none.
    every: usize,
    left: usize,
}

impl Restarts {
    fn new(every: usize) -> Self {
        Self { every, left: every }
    }

    /// Before each MCU: steps over a marker that is due. Whether it was: predictions begin anew.
    fn due(&mut self, bits: &mut Bits<'_>) -> Fallible<bool> {
        let due = self.every > 0 && self.left == 0;
        if due {
            bits.restart()?;
            self.left = self.every;
        }
        self.left = self.left.saturating_sub(1);
        Ok(due)
    }
}

/// Spectral band and precision of a progressive scan.
#[derive(Clone, Copy)]
struct Band {
    first: usize,
    last: usize,
    refine: bool,
    low: u32,
}

impl Picture {
    fn new(frame: Frame) -> Self {
        let n = frame.components.len();
        // Zeroed memory is only given pages when it is written, so a lying header costs nothing.
        let planes = frame.components.iter().map(|c| vec![0; c.across * c.down * 64]).collect();
        let coefficients = match frame.progressive {
            true => frame.components.iter().map(|c| vec![0; c.across * c.down * 64]).collect(),
            false => Vec::new(),
        };
        Self { frame, planes, coefficients, quant: vec![None; n], seen: vec![false; n] }
    }

    fn sequential_and_whole(&self) -> bool {
        !self.frame.progressive && self.seen.iter().all(|&s| s)
    }

    fn scan(&mut self, reader: &mut Reader<'_>, body: &[u8]) -> Fallible<()> {
        let count = usize::from(*body.first().ok_or("scan header is cut")?);
        let list = body.get(1..1 + 2 * count).ok_or("scan header is cut")?;
        let tail = body.get(1 + 2 * count..4 + 2 * count).ok_or("scan header is cut")?;
        let band = Band {
            first: usize::from(tail[0]),
            last: usize::from(tail[1]),
            refine: tail[2] >> 4 != 0,
            low: u32::from(tail[2] & 15),
        };
        let mut parts: Vec<Part<'_>> = Vec::with_capacity(count);
        for entry in list.chunks_exact(2) {
            let named = |c: &Component| c.name == entry[0];
            let index = self.frame.components.iter().position(named);
            let index = index.ok_or_else(|| format!("scan of unknown component {}", entry[0]))?;
            if parts.iter().any(|p| p.index == index) {
                return Err(format!("component {} twice in a scan", entry[0]));
            }
            let (dc, ac) = (usize::from(entry[1] >> 4), usize::from(entry[1] & 15));
            let dc = reader.dc.get(dc).and_then(|t| t.as_deref());
            let ac = reader.ac.get(ac).and_then(|t| t.as_deref());
            parts.push(Part { index, dc, ac, prediction: 0 });
        }
        if parts.is_empty() || parts.len() > 4 {
            return Err(format!("a scan of {} components", parts.len()));
        }
        if self.frame.progressive {
            let one = parts.len() == 1;
            let ok = match band.first {
                0 => band.last == 0,
                first => first <= band.last && band.last < 64 && one,
            };
            if !ok || band.low > 13 {
                return Err(format!("a scan of coefficients {} to {}", band.first, band.last));
            }
        }
        for part in &parts {
            // libjpeg fixes a component's quantisation when its first scan starts.
            if self.quant[part.index].is_none() {
                let slot = self.frame.components[part.index].quant;
                let table = reader.quant[slot];
                self.quant[part.index] =
                    Some(table.ok_or_else(|| format!("quantisation table {slot} is missing"))?);
            }
            if band.first == 0 && !band.refine {
                self.seen[part.index] = true;
            }
        }
        let mut bits = Bits::new(reader.data, reader.at);
        if self.frame.progressive {
            self.scan_progressive(&mut bits, &mut parts, band, reader.restart)?;
        } else {
            self.scan_sequential(&mut bits, &mut parts, reader.restart)?;
        }
        reader.at = bits.at;
        Ok(())
    }

    /// MCUs across and down of a scan, and the blocks of each part in one MCU.
    fn layout(&self, parts: &[Part<'_>]) -> (usize, usize, Vec<(usize, usize)>) {
        let frame = &self.frame;
        if let [part] = parts {
            // A scan of one component counts single blocks and leaves the padding out.
            let c = &frame.components[part.index];
            return (c.width.div_ceil(8), c.height.div_ceil(8), vec![(1, 1)]);
        }
        let across = frame.width.div_ceil(8 * frame.h_max);
        let down = frame.height.div_ceil(8 * frame.v_max);
        let blocks = parts.iter().map(|p| &frame.components[p.index]).map(|c| (c.h, c.v));
        (across, down, blocks.collect())
    }

    /// Entropy data is read by one thread, a strip ahead of the strip that all others transform.
    fn scan_sequential<'a>(
        &mut self,
        bits: &mut Bits<'a>,
        parts: &mut [Part<'a>],
        restart: usize,
    ) -> Fallible<()> {
        let (across, down, blocks) = self.layout(parts);
        let indices: Vec<usize> = parts.iter().map(|part| part.index).collect();
        let mut lanes = Vec::with_capacity(parts.len());
        for (part, (h, v)) in parts.iter_mut().zip(blocks) {
            let stride = self.frame.components[part.index].across;
            lanes.push(Lane::new(part, stride, h, v)?);
        }
        let strip = || -> Vec<Vec<i16>> {
            lanes.iter().map(|lane| vec![0; STRIP.min(down) * lane.row()]).collect()
        };
        let (mut ahead, mut ready) = (strip(), strip());
        let rows: Vec<usize> = lanes.iter().map(Lane::row).collect();
        let mut entropy = Entropy { bits, lanes, across, restarts: Restarts::new(restart) };
        // What is transformed in a round was read in the one before.
        let mut waiting = 0;
        for first in (0..down + STRIP).step_by(STRIP) {
            let count = STRIP.min(down.saturating_sub(first));
            let (read, transformed) = rayon::join(
                || entropy.strip(&mut ahead, count),
                || {
                    let mut strips = indices.iter().zip(&rows).zip(&ready);
                    let start = first.saturating_sub(STRIP);
                    strips.try_for_each(|((&index, row), strip)| {
                        self.inverse(index, &strip[..waiting * row], start * row)
                    })
                },
            );
            read?;
            transformed?;
            std::mem::swap(&mut ahead, &mut ready);
            waiting = count;
        }
        Ok(())
    }

    /// Transforms whole rows of blocks of component `index` into its plane, from sample `first` on.
    fn inverse(&mut self, index: usize, coefficients: &[i16], first: usize) -> Fallible<()> {
        let quant = self.quant[index].as_ref().ok_or("no quantisation table")?;
        let stride = self.frame.components[index].across;
        let plane = &mut self.planes[index][first..first + coefficients.len()];
        let rows = plane.par_chunks_mut(stride * 64).zip(coefficients.par_chunks(stride * 64));
        rows.for_each(|(plane, coefficients)| {
            simd(
                #[inline(always)]
                || inverse_rows(coefficients, quant, stride, plane),
            );
        });
        Ok(())
    }

    fn scan_progressive(
        &mut self,
        bits: &mut Bits<'_>,
        parts: &mut [Part<'_>],
        band: Band,
        restart: usize,
    ) -> Fallible<()> {
        let (across, down, blocks) = self.layout(parts);
        let mut restarts = Restarts::new(restart);
        // Blocks left in which the band is all zero (or, when refining, gets no new coefficient).
        let mut zero_run = 0u32;
        for my in 0..down {
            for mx in 0..across {
                if restarts.due(bits)? {
                    parts.iter_mut().for_each(|p| p.prediction = 0);
                    zero_run = 0;
                }
                for (part, &(h, v)) in parts.iter_mut().zip(&blocks) {
                    let stride = self.frame.components[part.index].across;
                    for y in 0..v {
                        for x in 0..h {
                            let at = ((my * v + y) * stride + mx * h + x) * 64;
                            let block = self.coefficients[part.index][at..].first_chunk_mut::<64>();
                            let block = block.ok_or("a block outside the picture")?;
                            progressive_block(bits, part, band, &mut zero_run, block)?;
                        }
                    }
                }
                bits.check()?;
            }
        }
        Ok(())
    }

    fn finish(mut self, colour: Colour) -> Fallible<Samples> {
        if let Some(missing) = self.seen.iter().position(|&s| !s) {
            return Err(format!("no data for component {missing}"));
        }
        for (i, coefficients) in std::mem::take(&mut self.coefficients).into_iter().enumerate() {
            self.inverse(i, &coefficients, 0)?;
        }
        let (width, height) = (self.frame.width, self.frame.height);
        let channels = self.planes.len();
        let mut data = vec![0u8; width * height * channels];
        data.par_chunks_mut(STRIP * width * channels).enumerate().for_each(|(i, out)| {
            simd(
                #[inline(always)]
                || self.rows(colour, i * STRIP, out),
            );
        });
        Ok(Samples { width, height, channels, data })
    }

    /// The picture's rows from row `first` on: upsampled, in the colours they are handed out in.
    #[inline(always)]
    fn rows(&self, colour: Colour, first: usize, out: &mut [u8]) {
        let (width, channels) = (self.frame.width, self.planes.len());
        let mut up = Upsampler::new(&self.frame);
        let mut packed = vec![0u32; width];
        for (y, out) in (first..).zip(out.chunks_exact_mut(width * channels)) {
            up.row(&self.frame, &self.planes, y);
            let line = |i| up.line(&self.frame, &self.planes, i, y);
            if channels == 1 {
                out.copy_from_slice(line(0));
                continue;
            }
            let three = [line(0), line(1), line(2)];
            match (channels, colour) {
                (_, Colour::Plain) => pack(three, &mut packed),
                (3, Colour::Ycc) => pack_ycc(three, &mut packed, 0),
                (_, Colour::Ycc) => pack_ycc(three, &mut packed, 0xFF_FFFF),
            }
            match channels {
                3 => spread_three(&packed, out),
                _ => spread_four(&packed, line(3), out),
            }
        }
    }
}

// ---------------------------------------------------------------- entropy data

/// Codes up to this many bits are found by one table look-up.
const LOOK: u32 = 10;

struct Huffman {
    /// `length << 8 | symbol` by the next `LOOK` bits; length 0: the code is longer.
    look: [u16; 1 << LOOK],
    /// By code length: one past the last code, left-aligned to 16 bits.
    limit: [u32; 17],
    /// By code length: what to add to a code to find its symbol.
    offset: [i32; 17],
    symbols: Vec<u8>,
}

impl Huffman {
    fn new(counts: &[u8; 16], symbols: &[u8]) -> Fallible<Self> {
        let mut table = Self {
            look: [0; 1 << LOOK],
            limit: [0; 17],
            offset: [0; 17],
            symbols: symbols.to_vec(),
        };
        let (mut code, mut index) = (0u32, 0usize);
        for length in 1..=16u32 {
            let count = u32::from(counts[length as usize - 1]);
            if code + count > 1 << length || symbols.len() > 256 {
                return Err("a Huffman table has more codes than fit".into());
            }
            table.offset[length as usize] = index as i32 - code as i32;
            for _ in 0..count {
                if length <= LOOK {
                    let from = (code << (LOOK - length)) as usize;
                    let entry = (length as u16) << 8 | u16::from(symbols[index]);
                    table.look[from..from + (1 << (LOOK - length))].fill(entry);
                }
                code += 1;
                index += 1;
            }
            table.limit[length as usize] = code << (16 - length);
            code <<= 1;
        }
        Ok(table)
    }
}

/// The entropy-coded bits of one scan, most significant first. Past a marker or the end of the
/// file it delivers zeros and counts them; [`Bits::check`] turns any that were used into an error.
struct Bits<'a> {
    data: &'a [u8],
    at: usize,
    /// Left-aligned.
    held: u64,
    count: u32,
    padding: u32,
}

impl<'a> Bits<'a> {
    fn new(data: &'a [u8], at: usize) -> Self {
        Self { data, at, held: 0, count: 0, padding: 0 }
    }

    /// Makes sure of 56 bits at least.
    #[inline(always)]
    fn fill(&mut self) {
        if let Some(next) = self.data.get(self.at..).and_then(|d| d.first_chunk::<8>()) {
            let next = u64::from_be_bytes(*next);
            let ones = !next;
            // No byte of `next` is 0xFF: nothing is stuffed and no marker is near.
            if ones.wrapping_sub(0x0101_0101_0101_0101) & next & 0x8080_8080_8080_8080 == 0 {
                self.held |= next.checked_shr(self.count).unwrap_or(0);
                self.at += ((63 - self.count) >> 3) as usize;
                self.count |= 56;
                return;
            }
        }
        self.fill_by_byte();
    }

    #[cold]
    fn fill_by_byte(&mut self) {
        while self.count <= 56 {
            let mut byte = 0;
            match (self.data.get(self.at), self.data.get(self.at + 1)) {
                (Some(0xFF), Some(0)) => {
                    byte = 0xFF;
                    self.at += 2;
                }
                (Some(0xFF) | None, _) => self.padding += 8,
                (Some(&plain), _) => {
                    byte = plain;
                    self.at += 1;
                }
            }
            let shift = 56 - self.count;
            // What lies below the counted bits is a copy of these very bits, or nothing.
            self.held = self.held & !(0xFF << shift) | u64::from(byte) << shift;
            self.count += 8;
        }
    }

    #[inline(always)]
    fn take(&mut self, n: u32) -> u32 {
        let value = (self.held >> 1 >> (63 - n)) as u32;
        self.held <<= n;
        self.count -= n;
        value
    }

    /// One bit, filling first when there is none.
    #[inline(always)]
    fn bit(&mut self) -> bool {
        if self.count == 0 {
            self.fill();
        }
        self.take(1) == 1
    }

    /// A symbol; afterwards at least 16 bits are still there.
    #[inline(always)]
    fn symbol(&mut self, table: &Huffman) -> Fallible<u32> {
        if self.count < 32 {
            self.fill();
        }
        let entry = table.look[(self.held >> (64 - LOOK)) as usize];
        if entry != 0 {
            self.take(u32::from(entry >> 8));
            return Ok(u32::from(entry & 0xFF));
        }
        let code = (self.held >> 48) as u32;
        for length in LOOK + 1..=16 {
            if code < table.limit[length as usize] {
                let code = self.take(length) as i32;
                let index = (code + table.offset[length as usize]) as usize;
                return Ok(u32::from(*table.symbols.get(index).ok_or("a bad Huffman code")?));
            }
        }
        Err("the entropy-coded data is damaged: a bad Huffman code".into())
    }

    /// A signed value of `n` bits (n up to 16) in the standard's form.
    #[inline(always)]
    fn value(&mut self, n: u32) -> i32 {
        let value = self.take(n) as i32;
        let half = (1 << n) >> 1;
        if value < half { value - (1 << n) + 1 } else { value }
    }

    /// Whether bits were used that the file does not have.
    #[inline(always)]
    fn check(&self) -> Fallible<()> {
        if self.padding > self.count {
            return Err(match self.at >= self.data.len() {
                true => "the file is cut: the entropy-coded data ends early".into(),
                false => "the entropy-coded data is damaged: it ends early".into(),
            });
        }
        Ok(())
    }

    /// Steps over a restart marker.
    fn restart(&mut self) -> Fallible<()> {
        self.check()?;
        (self.held, self.count, self.padding) = (0, 0, 0);
        loop {
            match self.data.get(self.at..self.at + 2) {
                Some([0xFF, 0xD0..=0xD7]) => {
                    self.at += 2;
                    return Ok(());
                }
                Some([0xFF, 0xFF | 0]) => self.at += 1,
                Some([0xFF, marker]) => {
                    return Err(format!("marker {marker:#04x} where a restart marker belongs"));
                }
                Some(_) => self.at += 1,
                None => return Err("the file is cut: a restart marker is missing".into()),
            }
        }
    }
}

#[inline(always)]
fn sequential_block(
    bits: &mut Bits<'_>,
    dc: &Huffman,
    ac: &Huffman,
    prediction: &mut i32,
    block: &mut [i16; 64],
) -> Fallible<()> {
    let size = bits.symbol(dc)?;
    *prediction = prediction.wrapping_add(bits.value(size));
    block[0] = *prediction as i16;
    let mut k = 1;
    while k < 64 {
        let symbol = bits.symbol(ac)?;
        let (run, size) = ((symbol >> 4) as usize, symbol & 15);
        if size == 0 {
            if run != 15 {
                break;
            }
            k += 16;
            continue;
        }
        k += run;
        if k > 63 {
            return Err("the entropy-coded data is damaged: a 65th coefficient".into());
        }
        block[usize::from(ZIGZAG[k])] = bits.value(size) as i16;
        k += 1;
    }
    Ok(())
}

#[inline(always)]
fn progressive_block(
    bits: &mut Bits<'_>,
    part: &mut Part<'_>,
    band: Band,
    zero_run: &mut u32,
    block: &mut [i16; 64],
) -> Fallible<()> {
    match (band.first, band.refine) {
        (0, false) => {
            let size = bits.symbol(part.dc.ok_or("a DC Huffman table is missing")?)?;
            part.prediction = part.prediction.wrapping_add(bits.value(size));
            block[0] = part.prediction.wrapping_shl(band.low) as i16;
            Ok(())
        }
        (0, true) => {
            block[0] |= i16::from(bits.bit()) << band.low;
            Ok(())
        }
        (_, refine) => {
            let table = part.ac.ok_or("an AC Huffman table is missing")?;
            match refine {
                false => first_band(bits, table, band, zero_run, block),
                true => refine_band(bits, table, band, zero_run, block),
            }
        }
    }
}

/// The first bits of a band of coefficients.
fn first_band(
    bits: &mut Bits<'_>,
    table: &Huffman,
    band: Band,
    zero_run: &mut u32,
    block: &mut [i16; 64],
) -> Fallible<()> {
    if *zero_run > 0 {
        *zero_run -= 1;
        return Ok(());
    }
    let mut k = band.first;
    while k <= band.last {
        let symbol = bits.symbol(table)?;
        let (run, size) = (symbol >> 4, symbol & 15);
        if size == 0 {
            if run != 15 {
                *zero_run = (1 << run) - 1 + bits.take(run);
                break;
            }
            k += 16;
            continue;
        }
        k += run as usize;
        if k > band.last {
            return Err("the entropy-coded data is damaged: a coefficient outside its band".into());
        }
        block[usize::from(ZIGZAG[k])] = bits.value(size).wrapping_shl(band.low) as i16;
        k += 1;
    }
    Ok(())
}

/// One more bit for a band: known coefficients get a correction bit each as they are passed,
/// and new ones of magnitude one are put between them.
fn refine_band(
    bits: &mut Bits<'_>,
    table: &Huffman,
    band: Band,
    zero_run: &mut u32,
    block: &mut [i16; 64],
) -> Fallible<()> {
    let one = 1i16 << band.low;
    let mut k = band.first;
    while *zero_run == 0 && k <= band.last {
        let symbol = bits.symbol(table)?;
        let (mut run, size) = (symbol >> 4, symbol & 15);
        let mut fresh = 0;
        if size == 0 {
            if run != 15 {
                *zero_run = (1 << run) + bits.take(run);
                break;
            }
        } else {
            fresh = if bits.take(1) == 1 { one } else { -one };
        }
        // Pass `run` zeros, correcting what is not zero on the way.
        loop {
            if k > band.last {
                if fresh != 0 {
                    return Err("the entropy-coded data is damaged: no room in the band".into());
                }
                break;
            }
            let coefficient = &mut block[usize::from(ZIGZAG[k])];
            k += 1;
            if *coefficient != 0 {
                correct(bits, coefficient, one);
            } else if run == 0 {
                *coefficient = fresh;
                break;
            } else {
                run -= 1;
            }
        }
    }
    if *zero_run > 0 {
        *zero_run -= 1;
        for &natural in &ZIGZAG[k..=band.last] {
            let coefficient = &mut block[usize::from(natural)];
            if *coefficient != 0 {
                correct(bits, coefficient, one);
            }
        }
    }
    Ok(())
}

#[inline(always)]
fn correct(bits: &mut Bits<'_>, coefficient: &mut i16, one: i16) {
    if bits.bit() && *coefficient & one == 0 {
        let step = if *coefficient > 0 { one } else { -one };
        *coefficient = coefficient.wrapping_add(step);
    }
}

// ---------------------------------------------------------------- inverse DCT

/// Factors of the 8-point inverse DCT in 13-bit fixed point, named by their value.
const F0_298631336: i32 = 2446;
const F0_390180644: i32 = 3196;
const F0_541196100: i32 = 4433;
const F0_765366865: i32 = 6270;
const F0_899976223: i32 = 7373;
const F1_175875602: i32 = 9633;
const F1_501321110: i32 = 12299;
const F1_847759065: i32 = 15137;
const F1_961570560: i32 = 16069;
const F2_053119869: i32 = 16819;
const F2_562915447: i32 = 20995;
const F3_072711026: i32 = 25172;

/// One-dimensional inverse DCT, rounded and shifted right by `SHIFT`. The rounding happens nowhere
/// else, so this fixes every bit.
#[inline(always)]
fn inverse_1d<const SHIFT: u32>(x: [i32; 8]) -> [i32; 8] {
    let times = i32::wrapping_mul;
    let add = i32::wrapping_add;
    let sub = i32::wrapping_sub;
    let z = times(add(x[2], x[6]), F0_541196100);
    let (e2, e3) = (sub(z, times(x[6], F1_847759065)), add(z, times(x[2], F0_765366865)));
    let (e0, e1) = (times(add(x[0], x[4]), 1 << 13), times(sub(x[0], x[4]), 1 << 13));

    let (z3, z4) = (add(x[7], x[3]), add(x[5], x[1]));
    let z5 = times(add(z3, z4), F1_175875602);
    let z1 = times(add(x[7], x[1]), F0_899976223);
    let z2 = times(add(x[5], x[3]), F2_562915447);
    let z3 = sub(z5, times(z3, F1_961570560));
    let z4 = sub(z5, times(z4, F0_390180644));
    let o0 = add(sub(times(x[1], F1_501321110), z1), z4);
    let o1 = add(sub(times(x[3], F3_072711026), z2), z3);
    let o2 = add(sub(times(x[5], F2_053119869), z2), z4);
    let o3 = add(sub(times(x[7], F0_298631336), z1), z3);

    let half = 1 << (SHIFT - 1);
    let (e0, e1, e2, e3) = (
        add(add(e0, e3), half),
        add(add(e1, e2), half),
        add(sub(e1, e2), half),
        add(sub(e0, e3), half),
    );
    [
        add(e0, o0) >> SHIFT,
        add(e1, o1) >> SHIFT,
        add(e2, o2) >> SHIFT,
        add(e3, o3) >> SHIFT,
        sub(e3, o3) >> SHIFT,
        sub(e2, o2) >> SHIFT,
        sub(e1, o1) >> SHIFT,
        sub(e0, o0) >> SHIFT,
    ]
}

/// Inverse DCT of one block: first the columns, keeping two extra bits, then the rows, which also
/// drop the eights of both.
#[inline(always)]
fn inverse_block(block: &[i16; 64], quant: &[i32; 64]) -> [[u8; 8]; 8] {
    let mut lines = [[0i32; 8]; 8];
    for k in 0..8 {
        for i in 0..8 {
            lines[k][i] = i32::from(block[8 * k + i]).wrapping_mul(quant[8 * k + i]);
        }
    }
    let lines = turned(inverse_lines::<18>(turned(inverse_lines::<11>(lines))));
    let mut pixels = [[0; 8]; 8];
    for y in 0..8 {
        for x in 0..8 {
            pixels[y][x] = lines[y][x].wrapping_add(128).clamp(0, 255) as u8;
        }
    }
    pixels
}

/// [`inverse_1d`] down each of eight columns. One body over eight independent lines is the form that
/// the compiler turns into vectors.
#[inline(always)]
fn inverse_lines<const SHIFT: u32>(lines: [[i32; 8]; 8]) -> [[i32; 8]; 8] {
    let mut out = [[0; 8]; 8];
    for i in 0..8 {
        let at = |k: usize| lines[k][i];
        let column = [at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)];
        let column = inverse_1d::<SHIFT>(column);
        for k in 0..8 {
            out[k][i] = column[k];
        }
    }
    out
}

/// Rows for columns: neighbours change places, then pairs, then halves, each of which is one
/// instruction on two lines.
#[inline(always)]
fn turned([a, b, c, d, e, f, g, h]: [[i32; 8]; 8]) -> [[i32; 8]; 8] {
    type Line = [i32; 8];
    let low = |x: Line, y: Line| [x[0], y[0], x[1], y[1], x[4], y[4], x[5], y[5]];
    let high = |x: Line, y: Line| [x[2], y[2], x[3], y[3], x[6], y[6], x[7], y[7]];
    let [a, b, c, d] = [low(a, b), high(a, b), low(c, d), high(c, d)];
    let [e, f, g, h] = [low(e, f), high(e, f), low(g, h), high(g, h)];
    let low = |x: Line, y: Line| [x[0], x[1], y[0], y[1], x[4], x[5], y[4], y[5]];
    let high = |x: Line, y: Line| [x[2], x[3], y[2], y[3], x[6], x[7], y[6], y[7]];
    let [a, b, c, d] = [low(a, c), high(a, c), low(b, d), high(b, d)];
    let [e, f, g, h] = [low(e, g), high(e, g), low(f, h), high(f, h)];
    let low = |x: Line, y: Line| [x[0], x[1], x[2], x[3], y[0], y[1], y[2], y[3]];
    let high = |x: Line, y: Line| [x[4], x[5], x[6], x[7], y[4], y[5], y[6], y[7]];
    let [i, j, k, l] = [low(a, e), low(b, f), low(c, g), low(d, h)];
    [i, j, k, l, high(a, e), high(b, f), high(c, g), high(d, h)]
}

/// Dequantises and transforms whole rows of blocks, `stride` blocks each, into a plane of
/// `stride * 8` samples a row.
#[inline(always)]
fn inverse_rows(coefficients: &[i16], quant: &[u16; 64], stride: usize, plane: &mut [u8]) {
    let line = stride * 8;
    let quant = quant.map(i32::from);
    for (row, out) in coefficients.chunks_exact(stride * 64).zip(plane.chunks_exact_mut(line * 8)) {
        for (bx, block) in row.chunks_exact(64).enumerate() {
            let Some(block) = block.first_chunk::<64>() else { continue };
            if block[1..].iter().fold(0, |all, &c| all | c) == 0 {
                // Only the mean: both passes reduce to this.
                let level = (i32::from(block[0]).wrapping_mul(quant[0]) + 4) >> 3;
                let level = (level + 128).clamp(0, 255) as u8;
                for y in 0..8 {
                    out[y * line + bx * 8..][..8].fill(level);
                }
                continue;
            }
            for (y, row) in inverse_block(block, &quant).iter().enumerate() {
                out[y * line + bx * 8..][..8].copy_from_slice(row);
            }
        }
    }
}

// ---------------------------------------------------------------- upsampling and colour

/// How a component's samples become one a pixel.
#[derive(Clone, Copy)]
enum Upsample {
    Full,
    /// Across by two: three parts the nearer sample, one part the farther.
    Across,
    /// Down by two, likewise.
    Down,
    /// Both at once, rounded once.
    Both,
    /// Any other whole ratio: repeated.
    Repeat(usize, usize),
}

struct Upsampler {
    ways: Vec<Upsample>,
    /// One picture row a component, a little longer than the picture is wide.
    rows: Vec<Vec<u8>>,
    /// Sums of two rows, three parts to one.
    sums: Vec<u16>,
}

impl Upsampler {
    fn new(frame: &Frame) -> Self {
        let ways = frame.components.iter().map(|c| {
            // libjpeg repeats instead when there is hardly anything to interpolate across.
            let wide = c.width > 2;
            match (frame.h_max / c.h, frame.v_max / c.v) {
                (1, 1) => Upsample::Full,
                (2, 1) if wide => Upsample::Across,
                (1, 2) => Upsample::Down,
                (2, 2) if wide => Upsample::Both,
                (x, y) => Upsample::Repeat(x, y),
            }
        });
        let row = |c: &Component| vec![0; c.width * (frame.h_max / c.h)];
        Self {
            ways: ways.collect(),
            rows: frame.components.iter().map(row).collect(),
            sums: vec![0; frame.width],
        }
    }

    /// Row `y` of component `i`, as wide as the picture; [`Upsampler::row`] made it.
    #[inline(always)]
    fn line<'a>(&'a self, frame: &Frame, planes: &'a [Vec<u8>], i: usize, y: usize) -> &'a [u8] {
        match self.ways[i] {
            Upsample::Full => &planes[i][y * frame.components[i].across * 8..][..frame.width],
            _ => &self.rows[i][..frame.width],
        }
    }

    /// Fills `rows` with row `y` of the picture, where it is not as stored.
    #[inline(always)]
    fn row(&mut self, frame: &Frame, planes: &[Vec<u8>], y: usize) {
        for (i, c) in frame.components.iter().enumerate() {
            let line = |at: usize| &planes[i][at * c.across * 8..][..c.width];
            // The nearer and the farther row of a component with half the rows; the picture's
            // first and last rows stand for those beyond them.
            let near = (y / 2).min(c.height - 1);
            let far = if y.is_multiple_of(2) { near.saturating_sub(1) } else { near + 1 };
            let far = far.min(c.height - 1);
            let out = &mut self.rows[i];
            match self.ways[i] {
                Upsample::Full => {}
                Upsample::Across => double_across(line(y), out),
                Upsample::Down => {
                    let bias = if y.is_multiple_of(2) { 1 } else { 2 };
                    for ((o, &n), &f) in out.iter_mut().zip(line(near)).zip(line(far)) {
                        *o = ((u16::from(n) * 3 + u16::from(f) + bias) >> 2) as u8;
                    }
                }
                Upsample::Both => {
                    let sums = &mut self.sums[..c.width];
                    for ((s, &n), &f) in sums.iter_mut().zip(line(near)).zip(line(far)) {
                        *s = u16::from(n) * 3 + u16::from(f);
                    }
                    double_sums(sums, out);
                }
                Upsample::Repeat(x, v) => {
                    for (o, &s) in out.chunks_exact_mut(x).zip(line(y / v)) {
                        o.fill(s);
                    }
                }
            }
        }
    }
}

/// Twice as many samples; the outer ones are copies.
#[inline(always)]
fn double_across(from: &[u8], to: &mut [u8]) {
    let n = from.len();
    to[0] = from[0];
    for ((o, &a), &b) in
        to[1..2 * n - 1].as_chunks_mut::<2>().0.iter_mut().zip(from).zip(&from[1..])
    {
        let (a, b) = (u16::from(a), u16::from(b));
        *o = [((a * 3 + b + 2) >> 2) as u8, ((b * 3 + a + 1) >> 2) as u8];
    }
    to[2 * n - 1] = from[n - 1];
}

/// As [`double_across`] over sums that are four times too large.
#[inline(always)]
fn double_sums(from: &[u16], to: &mut [u8]) {
    let n = from.len();
    to[0] = ((from[0] * 4 + 8) >> 4) as u8;
    for ((o, &a), &b) in
        to[1..2 * n - 1].as_chunks_mut::<2>().0.iter_mut().zip(from).zip(&from[1..])
    {
        let (left, right) = (a.wrapping_mul(3).wrapping_add(b), b.wrapping_mul(3).wrapping_add(a));
        *o = [(left.wrapping_add(7) >> 4) as u8, (right.wrapping_add(8) >> 4) as u8];
    }
    to[2 * n - 1] = ((from[n - 1] * 4 + 7) >> 4) as u8;
}

/// Three samples a pixel into one number, the first lowest.
#[inline(always)]
fn pack([a, b, c]: [&[u8]; 3], packed: &mut [u32]) {
    for (((p, &a), &b), &c) in packed.iter_mut().zip(a).zip(b).zip(c) {
        *p = u32::from(a) | u32::from(b) << 8 | u32::from(c) << 16;
    }
}

/// Luma and chroma to packed red, green and blue, in 16-bit fixed point. All bits of `flip` are
/// set when the result shall be cyan, magenta and yellow instead.
#[inline(always)]
fn pack_ycc([y, cb, cr]: [&[u8]; 3], packed: &mut [u32], flip: u32) {
    for (((p, &y), &cb), &cr) in packed.iter_mut().zip(y).zip(cb).zip(cr) {
        let luma = i32::from(y);
        let (blue, red) = (i32::from(cb) - 128, i32::from(cr) - 128);
        let green = 32768i32
            .wrapping_sub(22554i32.wrapping_mul(blue))
            .wrapping_sub(46802i32.wrapping_mul(red));
        let red = 91881i32.wrapping_mul(red).wrapping_add(32768);
        let blue = 116_130i32.wrapping_mul(blue).wrapping_add(32768);
        let red = luma.wrapping_add(red >> 16).clamp(0, 255) as u32;
        let green = luma.wrapping_add(green >> 16).clamp(0, 255) as u32;
        let blue = luma.wrapping_add(blue >> 16).clamp(0, 255) as u32;
        *p = (red | green << 8 | blue << 16) ^ flip;
    }
}

/// Packed pixels as three bytes each: four of them make three words.
#[inline(always)]
fn spread_three(packed: &[u32], out: &mut [u8]) {
    let (fours, rest) = packed.as_chunks::<4>();
    let (twelves, tail) = out.as_chunks_mut::<12>();
    for (&[p, q, r, s], out) in fours.iter().zip(twelves) {
        let words = [p | q << 24, q >> 8 | r << 16, r >> 16 | s << 8];
        for (word, out) in words.iter().zip(out.as_chunks_mut::<4>().0) {
            *out = word.to_le_bytes();
        }
    }
    for (pixel, out) in rest.iter().zip(tail.as_chunks_mut::<3>().0) {
        let [a, b, c, _] = pixel.to_le_bytes();
        *out = [a, b, c];
    }
}

/// Packed pixels with a fourth sample.
#[inline(always)]
fn spread_four(packed: &[u32], fourth: &[u8], out: &mut [u8]) {
    for ((p, &k), out) in packed.iter().zip(fourth).zip(out.as_chunks_mut::<4>().0) {
        *out = (p | u32::from(k) << 24).to_le_bytes();
    }
}

//! Frozen weights as panels: 32 output columns side by side, so that a product reads memory once, some panels at a time,
//! and a column is a lane.
//!
//! ```text
//! f32, f16     [panel][k][32 columns]
//! quantised    [panel][block][two bytes of the block][32 columns]
//! ```
//!
//! A quantised block of the GGUF formats is an even number of bytes, scales first; a panel has the first two bytes of its
//! 32 columns, then the next two, and so on. Nothing is lost or added: a panel is as large as the rows it was made of.
//!
//! Products are those of f32 with the unpacked weights. Where quantised weights only have to give texts, not gradients
//! ([`Arithmetic::Integers`]), x becomes 16-bit integers with a scale for every 32: half the time, and off by at most
//! 1/65 534 of the block's largest, a hundredth of what eight bits have cost the weights. Many rows are multiplied by tile instructions
//! where there are some (`int_tiles.rs`), with the same results.

use std::borrow::Cow;
use std::ops::Range;

use bytemuck::Zeroable;
use bytemuck::allocation::zeroed_vec;
use rayon::prelude::*;

use crate::amx::STEP;
use crate::blocks::{
    Blocks, INT_CHUNK, IntKind, Kept, Places, halves, q4_k_scales, quantise, units_of,
};
use crate::factor::{self, Factor, chunks};
use crate::float_tiles::{FloatRows, place, tiles};
use crate::gguf_read::half_to_f32;
use crate::host::{self, simd};
use crate::int_tiles::{self, ByteRows};
use crate::matrix::{self, Finish, RowsMut, split_columns};
use crate::tile::{
    self, BLOCK, COLUMNS, Floats, IntRows, Ints, Isa, Lies, PAIRS, Packed, PackedIsa, Pairs,
    Q4_K_HEAD, Row, Unit,
};

/// Rows of x that are worked on together: a chunk of them fits the second-level cache.
const ROWS: usize = 320;

/// Panels that are worked on together, so that a chunk of x is read from the second-level cache for all of them. One or two
/// rows stay in the nearest cache, and read their weights from front to back.
const GROUP: usize = 4;

/// What products with quantised weights are made of; those with floats are always made of floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arithmetic {
    /// Unpacked weights and x as it is.
    Floats,
    /// Weights as they are and x in 16 bits.
    Integers,
}

/// A weight `(out, in)`.
pub(crate) struct Panels {
    store: Store,
    out: usize,
    width: usize,
}

enum Store {
    F32(Vec<Row>),
    F16(Vec<[u16; COLUMNS]>),
    Ints(IntKind, Vec<Unit>),
}

impl Panels {
    /// Of f32 weights: `read` gives those from a place on, counted row by row, a row or a part of one.
    pub(crate) fn f32(out: usize, width: usize, read: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        Self { store: Store::F32(interleave(out, width, read)), out, width }
    }

    /// Of the bits of halves, likewise.
    pub(crate) fn f16(out: usize, width: usize, read: impl Fn(usize, &mut [u16]) + Sync) -> Self {
        Self { store: Store::F16(interleave(out, width, read)), out, width }
    }

    /// Of quantised rows: `fill` writes the bytes of the rows it is asked for, 32 or fewer.
    ///
    /// # Errors
    /// Those of `fill`.
    pub(crate) fn ints<E: Send>(
        kind: IntKind,
        out: usize,
        width: usize,
        fill: impl Fn(Range<usize>, &mut [u8]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        let per_row = kind.row_bytes(width);
        let mut units: Vec<Unit> = zeroed_vec(out.div_ceil(COLUMNS) * (per_row / 2));
        units.par_chunks_mut((per_row / 2).max(1)).enumerate().try_for_each_init(
            || vec![0u8; COLUMNS * per_row],
            |rows, (panel, units)| {
                let range = panel * COLUMNS..out.min((panel + 1) * COLUMNS);
                let rows = &mut rows[..range.len() * per_row];
                fill(range, rows)?;
                for (c, row) in rows.chunks_exact(per_row).enumerate() {
                    for (unit, two) in units.iter_mut().zip(row.as_chunks::<2>().0) {
                        unit[2 * c] = two[0];
                        unit[2 * c + 1] = two[1];
                    }
                }
                Ok(())
            },
        )?;
        Ok(Self { store: Store::Ints(kind, units), out, width })
    }

    /// Bytes of the weights; the padding of the last panel, fewer than 32 columns, is not counted.
    pub(crate) fn bytes(&self) -> usize {
        let row = match &self.store {
            Store::F32(_) => 4 * self.width,
            Store::F16(_) => 2 * self.width,
            Store::Ints(kind, _) => kind.row_bytes(self.width),
        };
        self.out * row
    }

    /// Whether a position can be read without the rest of its block.
    pub(crate) fn are_floats(&self) -> bool {
        !matches!(self.store, Store::Ints(..))
    }

    /// What weights are kept in, by its GGUF name.
    pub(crate) fn name(&self) -> &'static str {
        match &self.store {
            Store::F32(_) => "f32",
            Store::F16(_) => "f16",
            Store::Ints(IntKind::Q8_0, _) => "q8_0",
            Store::Ints(IntKind::Q4_0, _) => "q4_0",
            Store::Ints(IntKind::Q4_1, _) => "q4_1",
            Store::Ints(IntKind::Q4K, _) => "q4_k",
        }
    }

    /// Row `row` in f32: `width` numbers.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        let (panel, c, width) = (row / COLUMNS, row % COLUMNS, self.width);
        match &self.store {
            Store::F32(rows) => {
                for (out, weights) in out.iter_mut().zip(&rows[panel * width..]) {
                    *out = weights[c];
                }
            }
            Store::F16(rows) => {
                for (out, weights) in out.iter_mut().zip(&rows[panel * width..]) {
                    *out = half_to_f32(weights[c]);
                }
            }
            Store::Ints(..) => {
                for (out, weights) in out.iter_mut().zip(&*self.unpacked(panel)) {
                    *out = weights[c];
                }
            }
        }
    }

    /// The rows of `panel` in f32, one after the other, as many as `out` has room for.
    pub(crate) fn rows_of(&self, panel: usize, out: &mut [f32]) {
        // A few k at a time: a row's weights lie far apart, and what lies between them should not be read again for each row.
        const FEW: usize = 32;
        let unpacked = self.unpacked(panel);
        for (i, part) in unpacked.chunks(FEW).enumerate() {
            for (c, row) in out.chunks_exact_mut(self.width).enumerate() {
                for (out, weights) in row[i * FEW..].iter_mut().zip(part) {
                    *out = weights[c];
                }
            }
        }
    }

    /// Panels `range` in f32, one after the other: a row of columns for each k. They are unpacked to `memory`, unless they
    /// lie so.
    pub(crate) fn floats<'a>(&'a self, range: Range<usize>, memory: &'a mut Vec<Row>) -> &'a [Row] {
        if let Store::F32(rows) = &self.store {
            return &rows[range.start * self.width..range.end * self.width];
        }
        memory.resize(range.len() * self.width, [0.0; COLUMNS]);
        let panels = memory.par_chunks_mut(self.width.max(1)).zip(range);
        panels.for_each(|(rows, panel)| {
            self.positions(panel, 0..self.width, rows);
        });
        memory
    }

    /// Positions `k` of a panel in f32, whole blocks, written to `memory`, which has as many, unless they lie so.
    fn positions<'m>(&'m self, panel: usize, k: Range<usize>, memory: &'m mut [Row]) -> &'m [Row] {
        let first = panel * self.width + k.start;
        match &self.store {
            Store::F32(rows) => return &rows[first..][..k.len()],
            Store::F16(rows) => halves_of(&rows[first..][..k.len()], memory),
            Store::Ints(kind, units) => {
                let units = units_of_panel(*kind, self.width, units, panel);
                unpack_floats(Isa::best(), *kind, &units[units_of(*kind, k.start)..], memory);
            }
        }
        memory
    }

    /// A panel in f32: a row of columns for each k.
    fn unpacked(&self, panel: usize) -> Cow<'_, [Row]> {
        if let Store::F32(rows) = &self.store {
            return Cow::Borrowed(&rows[panel * self.width..(panel + 1) * self.width]);
        }
        let mut unpacked = vec![[0f32; COLUMNS]; self.width];
        self.positions(panel, 0..self.width, &mut unpacked);
        Cow::Owned(unpacked)
    }

    /// `x (n, in) · weightᵀ + bias (out)` → `(n, out)`.
    pub(crate) fn product(
        &self,
        x: &[f32],
        n: usize,
        bias: Option<&[f32]>,
        arithmetic: Arithmetic,
    ) -> Vec<f32> {
        self.product_by(Isa::best(), x, n, bias, arithmetic)
    }

    fn product_by(
        &self,
        isa: Isa,
        x: &[f32],
        n: usize,
        bias: Option<&[f32]>,
        arithmetic: Arithmetic,
    ) -> Vec<f32> {
        let Self { out, width, .. } = *self;
        if n * out == 0 {
            return Vec::new();
        }
        let mut y = host::zeros(n * out);
        for (i, y) in y.chunks_mut(ROWS * out).enumerate() {
            let rows = y.len() / out;
            let x = &x[i * ROWS * width..][..rows * width];
            self.rows_times(isa, x, matrix::rows_mut(y, rows, out), bias, arithmetic);
        }
        y
    }

    /// The product of some rows to `y`: every task writes some columns.
    fn rows_times(
        &self,
        isa: Isa,
        x: &[f32],
        y: RowsMut<'_>,
        bias: Option<&[f32]>,
        arithmetic: Arithmetic,
    ) {
        let (n, panels) = (y.nrows(), self.out.div_ceil(COLUMNS));
        let x = match (&self.store, arithmetic) {
            (Store::Ints(..), Arithmetic::Integers) => match isa.byte_tiles(n) {
                Some(tiles) => Prepared::Bytes(ByteRows::new(tiles, x, n, self.width)),
                None => Prepared::Integers(QuantisedRows::new(x, n, self.width, isa)),
            },
            _ => Prepared::Floats(FloatRows::new(matrix::rows(x, n, self.width), isa)),
        };
        let finish = Finish { bias, ..Finish::REPLACE };
        let tasks = (8 * rayon::current_num_threads()).min(panels);
        let per_task = panels.div_ceil(tasks);
        let together = if n <= 2 { 1 } else { per_task.min(GROUP) };
        let pieces = split_columns(y, per_task * COLUMNS);
        pieces.into_par_iter().enumerate().for_each_init(
            || Room::new(n * together),
            |room, (i, y)| {
                for (j, y) in split_columns(y, together * COLUMNS).into_iter().enumerate() {
                    let first = i * per_task + j * together;
                    let group = first..first + y.ncols().div_ceil(COLUMNS);
                    room.sums.fill([0.0; COLUMNS]);
                    self.group_times(isa, &x, group, room);
                    factor::write(y, first * COLUMNS, finish, &room.sums, n);
                }
            },
        );
    }

    /// Adds the products with the panels of `group` to the sums of `room`.
    fn group_times(&self, isa: Isa, x: &Prepared, group: Range<usize>, room: &mut Room) {
        let (width, behind) = (self.width, self.behind(group.end));
        match (&self.store, x) {
            (Store::F32(rows), Prepared::Floats(x)) => {
                let weights = |panel, k| Floats::F32(&rows[panel * width..][..width][k]);
                x.times(isa, group, behind, weights, &mut room.sums);
            }
            (Store::F16(rows), Prepared::Floats(x)) => {
                let weights = |panel, k| Floats::F16(&rows[panel * width..][..width][k]);
                x.times(isa, group, behind, weights, &mut room.sums);
            }
            (Store::Ints(kind, units), Prepared::Floats(x)) => {
                for (panel, sums) in group.zip(room.sums.chunks_exact_mut(x.n)) {
                    let units = units_of_panel(*kind, width, units, panel);
                    x.times_unpacked(isa, *kind, units, &mut room.weights, sums);
                }
            }
            (Store::Ints(kind, units), Prepared::Integers(x)) => {
                let blocks = room.blocks.get_or_insert_default();
                for (panel, sums) in group.zip(room.sums.chunks_exact_mut(x.n)) {
                    let units = units_of_panel(*kind, width, units, panel);
                    x.times(isa, *kind, units, blocks, sums);
                }
            }
            (Store::Ints(kind, units), Prepared::Bytes(x)) => {
                let of_bytes = room.of_bytes.get_or_insert_default();
                for (panel, sums) in group.zip(room.sums.chunks_exact_mut(x.n)) {
                    let units = &units[panel * units_of(*kind, width)..];
                    x.times(isa, *kind, units, of_bytes, sums);
                }
            }
            (_, Prepared::Integers(_) | Prepared::Bytes(_)) => {
                unreachable!("integers of x for floats")
            }
        }
    }

    /// `panel`, if there is one.
    fn behind(&self, panel: usize) -> Option<usize> {
        (panel * COLUMNS < self.out).then_some(panel)
    }
}

/// Rows of x as the innermost products read them.
enum Prepared {
    Floats(FloatRows),
    Integers(QuantisedRows),
    Bytes(ByteRows),
}

/// What tasks work with, one after the other.
struct Room {
    /// Of each panel of a group the sums of each row.
    sums: Vec<Row>,
    /// A panel's weights in f32, where they have to be unpacked.
    weights: Vec<Row>,
    /// The same as integers, a chunk at a time.
    blocks: Option<Blocks<Pairs>>,
    /// What tiles of bytes need.
    of_bytes: Option<int_tiles::Room>,
}

impl Room {
    fn new(sums: usize) -> Self {
        Self { sums: vec![[0.0; COLUMNS]; sums], weights: Vec::new(), blocks: None, of_bytes: None }
    }
}

impl Factor for Panels {
    fn grain(&self) -> usize {
        match self.store {
            Store::Ints(..) => INT_CHUNK / STEP,
            Store::F32(_) | Store::F16(_) => 1,
        }
    }

    fn rows<'m>(&'m self, panel: usize, k: Range<usize>, memory: &'m mut [Row]) -> &'m [Row] {
        self.positions(panel, k, memory)
    }
}

/// The turned weight of panels, to multiply gradients with: k counts outputs, and columns are the weight's.
pub(crate) struct Turned<'a>(pub(crate) &'a Panels);

impl Factor for Turned<'_> {
    fn rows<'m>(&'m self, panel: usize, k: Range<usize>, memory: &'m mut [Row]) -> &'m [Row] {
        for (k, memory) in k.step_by(STEP).zip(memory.chunks_mut(STEP)) {
            self.step(panel, k / COLUMNS, memory);
        }
        memory
    }
}

impl Turned<'_> {
    /// As many positions as `memory` has room for: those of panel `of` that is turned.
    fn step(&self, panel: usize, of: usize, memory: &mut [Row]) {
        let first = panel * COLUMNS;
        let lanes = first..self.0.width.min(first + COLUMNS);
        let mut lines = [[0f32; COLUMNS]; STEP];
        // Where blocks are longer than a step, all of the block is unpacked for a part of it.
        let (block, step) = match self.0.store {
            Store::Ints(kind, _) => (first / kind.positions() * kind.positions(), kind.positions()),
            Store::F32(_) | Store::F16(_) => (first, STEP),
        };
        let positions = block..self.0.width.min(block + step);
        let mut few = [[0f32; COLUMNS]; STEP];
        let mut more;
        let room = if positions.len() <= STEP {
            &mut few[..positions.len()]
        } else {
            more = vec![[0f32; COLUMNS]; positions.len()];
            &mut more
        };
        let rows = self.0.positions(of, positions, room);
        lines[..lanes.len()].copy_from_slice(&rows[first - block..][..lanes.len()]);
        memory.copy_from_slice(&factor::turn(&lines)[..memory.len()]);
    }
}

/// Halves as floats.
fn halves_of(rows: &[[u16; COLUMNS]], out: &mut [Row]) {
    simd(
        #[inline(always)]
        |_| {
            for (out, half) in out.as_flattened_mut().iter_mut().zip(rows.as_flattened()) {
                *out = half_to_f32(*half);
            }
        },
    );
}

/// The panel that `units` begin with in f32, a row of columns for each of its positions.
fn unpack_floats(isa: Isa, kind: IntKind, units: &[Unit], out: &mut [Row]) {
    let mut blocks = Blocks::<Pairs>::default();
    let units = units.chunks(units_of(kind, INT_CHUNK));
    for (out, units) in out.chunks_mut(INT_CHUNK).zip(units) {
        let units = &units[..units_of(kind, out.len())];
        let blocks = blocks.unpack(isa, kind, units);
        for (out, block) in out.as_chunks_mut::<BLOCK>().0.iter_mut().zip(blocks) {
            floats_of(block, kind.has_offset(), out);
        }
    }
}

/// `weights (out, width)` as `(panels, width, 32)`; columns that are missing in the last panel are zero.
fn interleave<T: Zeroable + Copy + Send>(
    out: usize,
    width: usize,
    read: impl Fn(usize, &mut [T]) + Sync,
) -> Vec<[T; COLUMNS]> {
    /// Positions along k for which 32 rows fit the first-level cache.
    const STRIP: usize = 64;
    // `vec!` would write the zeros, with one thread.
    let mut panels: Vec<[T; COLUMNS]> = zeroed_vec(out.div_ceil(COLUMNS) * width);
    panels.par_chunks_mut(width.max(1)).enumerate().for_each(|(panel, rows)| {
        let columns = panel * COLUMNS..out.min((panel + 1) * COLUMNS);
        let mut lines = [[T::zeroed(); STRIP]; COLUMNS];
        for (strip, rows) in rows.chunks_mut(STRIP).enumerate() {
            for (line, column) in lines.iter_mut().zip(columns.clone()) {
                read(column * width + strip * STRIP, &mut line[..rows.len()]);
            }
            for (k, row) in rows.iter_mut().enumerate() {
                for (weight, line) in row.iter_mut().zip(&lines) {
                    *weight = line[k];
                }
            }
        }
    });
    panels
}

impl FloatRows {
    /// Adds the product with the panel of `units` to `out`. `weights` is room for it in f32.
    fn times_unpacked(
        &self,
        isa: Isa,
        kind: IntKind,
        units: &[Unit],
        weights: &mut Vec<Row>,
        out: &mut [Row],
    ) {
        if let Some(packed) = isa.packed(self.n) {
            isa.compile(
                #[inline(always)]
                || self.times_packed(packed, kind, units, out),
            );
            return;
        }
        weights.resize(self.values().len() / self.n, [0.0; COLUMNS]);
        unpack_floats(isa, kind, units, weights);
        self.times(isa, 0..1, None, |_, k| Floats::F32(&weights[k]), out);
    }

    /// [`Self::times`] without unpacking first, for so few rows that they are one tile: the same to the bit.
    #[inline(always)]
    fn times_packed(&self, isa: PackedIsa, kind: IntKind, units: &[Unit], out: &mut [Row]) {
        let blocks = units.chunks_exact(kind.bytes() / 2);
        for (x, units) in self.values().chunks_exact(kind.positions() * self.n).zip(blocks) {
            let mut block = |positions: Range<usize>, units, lies, scale, offset| {
                let x = &x[positions.start * self.n..positions.end * self.n];
                tile::floats_of_packed(isa, x, &Packed { units, lies, scale, offset }, out);
            };
            match kind {
                IntKind::Q8_0 => block(0..32, &units[1..], Lies::Bytes, &halves(&units[0]), None),
                IntKind::Q4_0 => {
                    let scale = &halves(&units[0]);
                    block(0..16, &units[1..], Lies::Low, scale, None);
                    block(16..32, &units[1..], Lies::High, scale, None);
                }
                IntKind::Q4_1 => {
                    let (scale, offset) = (&halves(&units[0]), &halves(&units[1]));
                    block(0..16, &units[2..], Lies::Low, scale, Some(offset));
                    block(16..32, &units[2..], Lies::High, scale, Some(offset));
                }
                IntKind::Q4K => {
                    let mut scales = [[[0.0; COLUMNS]; 2]; 8];
                    q4_k_scales(units, &mut scales);
                    for (i, [scale, offset]) in scales.iter().enumerate() {
                        let units = &units[Q4_K_HEAD + i / 2 * PAIRS..][..PAIRS];
                        let lies = if i % 2 == 0 { Lies::Low } else { Lies::High };
                        block(i * BLOCK..(i + 1) * BLOCK, units, lies, scale, Some(offset));
                    }
                }
            }
        }
    }
}

/// Rows of x as integers in tiles: `[chunk][tile][block][pair][row]`, scales and sums `[chunk][tile][block][row]`.
struct QuantisedRows {
    pairs: Vec<i32>,
    scales: Vec<f32>,
    sums: Vec<f32>,
    n: usize,
    chunks: Vec<Range<usize>>,
    tiles: Vec<Range<usize>>,
}

impl QuantisedRows {
    fn new(x: &[f32], n: usize, width: usize, isa: Isa) -> Self {
        let (chunks, tiles) = (chunks(width, INT_CHUNK), tiles(n, isa.int_rows()));
        let mut pairs = vec![0i32; n * width / 2];
        let mut scales = vec![0f32; n * width / BLOCK];
        let mut sums = scales.clone();
        let places = Places { integers: &mut pairs, scales: &mut scales, sums: &mut sums };
        quantise(x, width, &chunks, &tiles, places);
        Self { pairs, scales, sums, n, chunks, tiles }
    }

    /// What belongs to a chunk and a tile.
    fn part(&self, k: &Range<usize>, rows: &Range<usize>) -> IntRows<'_> {
        let scales = place(self.n, k, rows, BLOCK);
        IntRows {
            pairs: &self.pairs[place(self.n, k, rows, 2)],
            scales: &self.scales[scales.clone()],
            sums: &self.sums[scales],
        }
    }

    /// Adds the product with the panel that `units` begin with to `out`.
    fn times(
        &self,
        isa: Isa,
        kind: IntKind,
        units: &[Unit],
        blocks: &mut Blocks<Pairs>,
        out: &mut [Row],
    ) {
        let mut rest = units;
        for k in &self.chunks {
            let (units, behind) = rest.split_at(units_of(kind, k.len()));
            rest = behind;
            if let [rows] = &*self.tiles
                && straight(isa, kind, self.part(k, rows), units, out)
            {
                continue;
            }
            let blocks = blocks.unpack(isa, kind, units);
            for rows in &self.tiles {
                let x = self.part(k, rows);
                tile::ints(isa, x, blocks, kind.has_offset(), &mut out[rows.clone()]);
            }
        }
    }
}

/// The product of a few rows without unpacking first, where there is a kernel for it; false where there is none.
fn straight(isa: Isa, kind: IntKind, x: IntRows<'_>, units: &[Unit], out: &mut [Row]) -> bool {
    let Some(packed) = isa.packed(out.len()) else { return false };
    match kind {
        IntKind::Q8_0 => tile::ints_of_bytes(packed, x, units, out),
        IntKind::Q4K => {
            let mut scales = [[[0.0; COLUMNS]; 2]; 8];
            isa.compile(
                #[inline(always)]
                || q4_k_scales(units, &mut scales),
            );
            tile::ints_of_nibbles(packed, x, &units[Q4_K_HEAD..], &scales, out);
        }
        IntKind::Q4_0 | IntKind::Q4_1 => return false,
    }
    true
}

/// Pairs of positions: `[block][pair][row]`.
impl Kept for i32 {
    const POSITIONS: usize = 2;

    #[inline(always)]
    fn keep(integers: &[i16; BLOCK], place: &mut [Self], height: usize, block: usize, row: usize) {
        let out = place[block * PAIRS * height..].iter_mut().skip(row).step_by(height);
        for (out, pair) in out.zip(integers.as_chunks::<2>().0) {
            *out = Self::from(pair[0]) & 0xFFFF | Self::from(pair[1]) << 16;
        }
    }
}

/// Those of a panel `width` long.
fn units_of_panel(kind: IntKind, width: usize, units: &[Unit], panel: usize) -> &[Unit] {
    let per_panel = units_of(kind, width);
    &units[panel * per_panel..][..per_panel]
}

/// A block's weights: a row of columns for each of its positions.
fn floats_of(block: &Ints, offsets: bool, out: &mut [Row; BLOCK]) {
    simd(
        #[inline(always)]
        |_| {
            for (out, q) in out.as_chunks_mut::<2>().0.iter_mut().zip(&block.q) {
                for (c, q) in q.as_chunks::<2>().0.iter().enumerate() {
                    for side in 0..2 {
                        let scaled = f32::from(q[side]) * block.scale[c];
                        out[side][c] = if offsets { scaled + block.offset[c] } else { scaled };
                    }
                }
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bits without a pattern.
    fn bits(seed: u32) -> impl Iterator<Item = u32> {
        std::iter::successors(Some(seed | 1), |x| {
            let x = x ^ x << 13;
            let x = x ^ x >> 17;
            Some(x ^ x << 5)
        })
    }

    fn numbers(seed: u32, n: usize) -> Vec<f32> {
        bits(seed).map(|x| x as f32 / u32::MAX as f32 - 0.5).take(n).collect()
    }

    /// Of every kind one, with an odd number of columns and with chunks that are not full.
    fn all() -> Vec<Panels> {
        all_with(70)
    }

    fn all_with(out: usize) -> Vec<Panels> {
        let width = 601;
        let dense = numbers(1, out * width);
        let halves: Vec<u16> = dense.iter().map(|x| half::f16::from_f32(*x).to_bits()).collect();
        let ints = |kind: IntKind, width: usize, scales: usize| {
            let fill = |rows: Range<usize>, bytes: &mut [u8]| {
                for (byte, bits) in bytes.iter_mut().zip(bits(rows.start as u32 + 7).skip(9)) {
                    *byte = (bits >> 8) as u8;
                }
                for block in bytes.chunks_exact_mut(kind.bytes()) {
                    for scale in block[..2 * scales].as_chunks_mut::<2>().0 {
                        // 0.0078 to 0.0156, so that every bit of it is in use.
                        scale[1] = 0x20 | scale[1] & 3;
                    }
                }
                Ok::<_, ()>(())
            };
            Panels::ints(kind, out, width, fill).unwrap()
        };
        vec![
            Panels::f32(out, width, |i, to| to.copy_from_slice(&dense[i..][..to.len()])),
            Panels::f16(out, width, |i, to| to.copy_from_slice(&halves[i..][..to.len()])),
            ints(IntKind::Q8_0, 608, 1),
            ints(IntKind::Q4_0, 608, 1),
            ints(IntKind::Q4_1, 608, 2),
            ints(IntKind::Q4K, 768, 2),
        ]
    }

    const BOTH: [Arithmetic; 2] = [Arithmetic::Floats, Arithmetic::Integers];

    fn same_bits(name: &str, a: &[f32], b: &[f32]) {
        assert_eq!(a.len(), b.len());
        let differ = a.iter().zip(b).position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(differ, None, "{name}");
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        for panels in all() {
            for n in (1..=17).chain([21, 33]) {
                let x = numbers(3, n * panels.width);
                let bias = numbers(4, panels.out);
                for arithmetic in BOTH {
                    let y = panels.product(&x, n, Some(&bias), arithmetic);
                    for isa in Isa::available() {
                        let name = format!("{} {arithmetic:?} {isa:?}, {n} rows", panels.name());
                        let other = panels.product_by(isa, &x, n, Some(&bias), arithmetic);
                        same_bits(&name, &y, &other);
                    }
                }
            }
        }
    }

    /// One thread has groups of four panels and of one, the last of them not full; more threads have smaller ones.
    #[test]
    fn groups_of_panels_give_the_bits_of_single_ones() {
        let out = 39 * COLUMNS + 6;
        for panels in all_with(out) {
            let x = numbers(3, 17 * panels.width);
            let bias = numbers(4, out);
            for arithmetic in BOTH {
                let with = |threads: usize| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                    pool.unwrap().install(|| panels.product(&x, 17, Some(&bias), arithmetic))
                };
                let single = with(50);
                for threads in [1, 3] {
                    let name = format!("{} {arithmetic:?}, {threads} threads", panels.name());
                    same_bits(&name, &with(threads), &single);
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_neighbours() {
        for panels in all() {
            let n = ROWS + 21;
            let x = numbers(5, n * panels.width);
            for arithmetic in BOTH {
                let all = panels.product(&x, n, None, arithmetic);
                for (i, y) in all.chunks_exact(panels.out).enumerate().step_by(17) {
                    let row = &x[i * panels.width..][..panels.width];
                    let alone = panels.product(row, 1, None, arithmetic);
                    same_bits(&format!("{}, row {i}", panels.name()), y, &alone);
                }
            }
        }
    }

    #[test]
    fn products_are_those_with_the_rows() {
        for panels in all() {
            let Panels { out, width, .. } = panels;
            let x = numbers(6, 3 * width);
            let products = BOTH.map(|arithmetic| panels.product(&x, 3, None, arithmetic));
            let mut row = vec![0f32; width];
            let mut rows = vec![0f32; COLUMNS * width];
            for o in 0..out {
                panels.row(o, &mut row);
                let count = COLUMNS.min(out - o / COLUMNS * COLUMNS);
                panels.rows_of(o / COLUMNS, &mut rows[..count * width]);
                assert_eq!(row, rows[o % COLUMNS * width..][..width]);
                let mut memory = Vec::new();
                let floats = panels.floats(o / COLUMNS..out.div_ceil(COLUMNS), &mut memory);
                assert!(row.iter().zip(floats).all(|(w, floats)| *w == floats[o % COLUMNS]));
                for (i, x) in x.chunks_exact(width).enumerate() {
                    let terms = x.iter().zip(&row).map(|(x, w)| f64::from(*x) * f64::from(*w));
                    let size: f64 = terms.clone().map(f64::abs).sum();
                    let truth = terms.sum::<f64>();
                    for (y, limit) in products.iter().zip([3e-7, 1e-5]) {
                        let error = (f64::from(y[i * out + o]) - truth).abs();
                        assert!(error < limit * size, "{}: {error} of {size}", panels.name());
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_shows_in_its_row_and_in_no_other() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for panels in all() {
                for (n, arithmetic) in [(3, BOTH[0]), (3, BOTH[1]), (21, BOTH[0]), (21, BOTH[1])] {
                    let mut x = numbers(8, n * panels.width);
                    x[panels.width + 40] = bad;
                    let y = panels.product(&x, n, None, arithmetic);
                    for (i, y) in y.chunks_exact(panels.out).enumerate() {
                        let finite = y.iter().filter(|y| y.is_finite()).count();
                        // A weight of exactly zero makes NaN of infinity, too.
                        let expected = if i == 1 { 0 } else { panels.out };
                        assert_eq!(finite, expected, "{} {arithmetic:?} {bad}", panels.name());
                    }
                }
            }
        }
    }

    #[test]
    fn rows_lie_where_larger_ones_lay() {
        let count = |i, to: &mut [f32]| to.iter_mut().zip(i..).for_each(|(to, i)| *to = i as f32);
        let narrow = Panels::f32(40, 35, count);
        for panels in all().into_iter().chain([narrow]) {
            for (n, arithmetic) in [(1, BOTH[0]), (2, BOTH[0]), (15, BOTH[0]), (15, BOTH[1])] {
                let x = numbers(5, n * panels.width);
                let product = || panels.product(&x, n, None, arithmetic);
                let alone = std::thread::scope(|scope| scope.spawn(product).join().unwrap());
                panels.product(&numbers(6, 40 * panels.width), 40, None, arithmetic);
                same_bits("after larger rows", &product(), &alone);
            }
        }
    }
}

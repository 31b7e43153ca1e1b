//! The tile instructions of a processor (AMX): how a thread gets its tiles, and products of bf16, sixteen times as many a cycle as of f32.
//! Products of integers are in `int_tiles.rs`.
//!
//! A group of up to 32 rows of a is multiplied with 32 columns of b: two tiles of each, four of results. Sums are f32, in an
//! order that the manual lays down (Intel's Architecture Instruction Set Extensions Reference, `TDPBF16PS`), so that
//! [`Multiplier`] in plain Rust gives the same bits. How large products are made of such groups is in `bf16_tiles.rs`.

use std::ops::Range;

pub(crate) use bytes::ByteTiles;

use crate::matrix::{COLUMNS, Row};

/// Positions along k that one instruction goes through.
pub(crate) const STEP: usize = 32;
/// Rows of a that are multiplied together, at most.
pub(crate) const ROWS: usize = 32;
/// Pairs of a step.
pub(crate) const PAIRS: usize = STEP / 2;

/// A step of a row of a: words of two bf16, that of the lower k in the lower half. What an instruction reads begins with a
/// line of the cache.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(align(64))]
pub(crate) struct Line(pub(crate) [u32; PAIRS]);

/// Two neighbouring positions along k of each column of b: such words, too.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(align(64))]
pub(crate) struct WordPairs(pub(crate) [u32; COLUMNS]);

/// The instructions for bf16, on a machine that has them and a system that lets this process use them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Amx(());

impl Amx {
    /// Asks the processor and the system, once.
    pub(crate) fn detect() -> Option<Self> {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        {
            static FOUND: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
            FOUND.get_or_init(x86::has_bf16).then_some(Self(()))
        }
        #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
        None
    }
}

mod bytes {
    /// The instructions for bytes, likewise; only [`ByteTiles::detect`] makes one.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct ByteTiles(Set);

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Set {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        Amx,
    }

    impl ByteTiles {
        pub(crate) fn detect() -> Option<Self> {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            return (is_x86_feature_detected!("avx512f") && super::x86::has_bytes())
                .then_some(Self(Set::Amx));
            #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
            None
        }

        /// What there is to do on a machine for which there is none.
        #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
        pub(crate) fn never(self) {
            match self.0 {}
        }
    }
}

/// Multiplies groups of rows with panels of columns; when it goes its thread's tiles are given back.
pub(crate) struct Multiplier {
    #[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), expect(dead_code))]
    amx: Option<Amx>,
    /// Tiles belong to a thread.
    _of_this_thread: std::marker::PhantomData<*const ()>,
}

impl Multiplier {
    /// Without `amx` the same bits come from plain Rust, far slower: for tests.
    pub(crate) fn new(amx: Option<Amx>) -> Self {
        Self { amx, _of_this_thread: std::marker::PhantomData }
    }

    /// `out (rows, 32) += a · b`, of some steps along k: of a `[step][row]`, of b 16 pairs each. From 2 to [`ROWS`] rows.
    pub(crate) fn add(&self, a: &[Line], b: &[WordPairs], out: &mut [Row]) {
        let rows = out.len();
        assert!((2..=ROWS).contains(&rows), "{rows} rows of tiles");
        let steps = a.len() / rows;
        assert!(steps > 0 && a.len() == rows * steps && b.len() == PAIRS * steps);
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if let Some(Amx(())) = self.amx {
            // SAFETY: an `Amx` is only made where the tile instructions may be used; the tiles are set up for these rows, and the
            // lengths have been looked at.
            #[expect(unsafe_code, reason = "instructions chosen at run time")]
            unsafe {
                x86::set_up(x86::for_bf16(rows));
                x86::add(steps, a, b, out);
            }
            return;
        }
        plain(a, b, out);
    }
}

impl Drop for Multiplier {
    fn drop(&mut self) {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        x86::give_back();
    }
}

/// `n` rows in groups of at most [`ROWS`], as equal as can be, the larger ones first: tiles are seldom set up anew.
pub(crate) fn groups(n: usize) -> Vec<Range<usize>> {
    let count = n.div_ceil(ROWS);
    let mut start = 0;
    let mut group = |i: usize| {
        let rows = n / count + usize::from(i < n % count);
        start += rows;
        start - rows..start
    };
    (0..count).map(&mut group).collect()
}

/// What the instructions compute.
fn plain(a: &[Line], b: &[WordPairs], out: &mut [Row]) {
    let halves = |word: u32| [word << 16, word & 0xffff_0000].map(f32::from_bits);
    for (a, b) in a.chunks_exact(out.len()).zip(b.chunks_exact(PAIRS)) {
        for (line, out) in a.iter().zip(&mut *out) {
            let mut sums = [[0f32; 2]; COLUMNS];
            for (word, b) in line.0.iter().zip(b) {
                let x = halves(*word);
                for (sums, w) in sums.iter_mut().zip(&b.0) {
                    let w = halves(*w);
                    for side in 0..2 {
                        sums[side] = flushed(x[side].mul_add(w[side], sums[side]));
                    }
                }
            }
            for (out, [even, odd]) in out.iter_mut().zip(sums) {
                *out = flushed(*out + flushed(even + odd));
            }
        }
    }
}

/// Numbers too small to be normal are zero, with their sign.
#[inline(always)]
pub(crate) fn flushed(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::__cpuid_count;
    use std::cell::Cell;
    use std::sync::OnceLock;

    use super::{Line, PAIRS, WordPairs};
    use crate::matrix::Row;

    /// Rows of a tile, at most.
    const TILE: usize = 16;
    // What `add` says in numbers.
    const _: () = assert!(size_of::<Line>() == 64 && size_of::<WordPairs>() == 128);
    const _: () = assert!(size_of::<Row>() == 128 && PAIRS == TILE);
    const _: () = assert!(size_of::<Configuration>() == 64);

    /// Whether tiles of bf16 can be multiplied.
    pub(super) fn has_bf16() -> bool {
        let vectors = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bf16");
        vectors && feature(22) && permitted()
    }

    /// Whether tiles of bytes can be multiplied.
    pub(super) fn has_bytes() -> bool {
        feature(25) && permitted()
    }

    /// A feature that the standard library does not know yet.
    fn feature(bit: u32) -> bool {
        __cpuid_count(7, 0).edx >> bit & 1 == 1
    }

    /// Whether there are tiles, and the system keeps them for this process' threads, as it has to be asked to. From then on what it saves
    /// for a signal takes 11 KB, so that a stack for signals must have room for it.
    fn permitted() -> bool {
        /// `ARCH_REQ_XCOMP_PERM` of Linux, and the state it is asked for.
        const REQUEST: libc::c_int = 0x1023;
        const TILE_DATA: libc::c_ulong = 18;
        static PERMITTED: OnceLock<bool> = OnceLock::new();
        *PERMITTED.get_or_init(|| {
            // SAFETY: it takes two numbers and touches no memory of ours.
            #[expect(unsafe_code, reason = "a call of the system")]
            let refused = || unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) };
            feature(24) && refused() == 0
        })
    }

    /// How many rows, and bytes of a row, each of the eight tiles has.
    pub(crate) type Tiles = [[u8; 2]; 8];

    thread_local! {
        /// How this thread's tiles are set up, if they are.
        static SET_UP: Cell<Option<Tiles>> = const { Cell::new(None) };
    }

    /// How many rows and bytes of a row each tile has, as `LDTILECFG` reads it.
    #[repr(C, align(64))]
    struct Configuration {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        bytes: [u16; 16],
        rows: [u8; 16],
    }

    /// Sets up this thread's tiles, unless they are so already.
    ///
    /// # Safety
    /// Only where tiles are permitted: [`has_bf16`] or [`has_bytes`]. At most [`TILE`] rows and 64 bytes; a tile with none of
    /// either must not be used.
    #[expect(unsafe_code, reason = "tiles are set up by an instruction")]
    pub(crate) unsafe fn set_up(tiles: Tiles) {
        if SET_UP.replace(Some(tiles)) == Some(tiles) {
            return;
        }
        let mut configuration = Configuration {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            bytes: [0; 16],
            rows: [0; 16],
        };
        for (i, [rows, bytes]) in tiles.into_iter().enumerate() {
            configuration.rows[i] = rows;
            configuration.bytes[i] = u16::from(bytes);
        }
        // SAFETY: it reads the 64 bytes of `configuration`.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, readonly));
        }
    }

    /// Gives this thread's tiles back, if it has set some up.
    pub(crate) fn give_back() {
        if SET_UP.take().is_some() {
            // SAFETY: where tiles are set up there is the instruction; nothing is kept in them any longer.
            #[expect(unsafe_code, reason = "tiles are given back by an instruction")]
            unsafe {
                asm!("tilerelease", options(nostack, nomem));
            }
        }
    }

    /// Rows of the first of a group's two tiles.
    fn first(rows: usize) -> usize {
        rows.div_ceil(2)
    }

    /// Tiles 0 to 3 for results, 4 and 5 for 2 to 32 rows of a, 6 and 7 for columns of b.
    pub(super) fn for_bf16(rows: usize) -> Tiles {
        let upper = first(rows) as u8;
        let lower = (rows - first(rows)) as u8;
        let rows = [upper, upper, lower, lower, upper, lower, TILE as u8, TILE as u8];
        rows.map(|rows| [rows, 64])
    }

    /// `out += a · b`.
    ///
    /// # Safety
    /// Only after [`set_up`] [`for_bf16`] with as many rows as `out` has; `a` and `b` hold `steps` steps of them, at least one.
    #[expect(unsafe_code, reason = "tiles are read and written through pointers")]
    pub(super) unsafe fn add(steps: usize, a: &[Line], b: &[WordPairs], out: &mut [Row]) {
        let rows = out.len();
        let upper = first(rows);
        let out = out.as_mut_ptr();
        // SAFETY: tiles 0 to 3 are the rows of `out`, loaded and stored once; each step reads the next `rows` lines of `a` and the
        // next 16 pairs of `b`, as far as there are steps.
        unsafe {
            asm!(
                "tileloadd tmm0, [{out} + {row}]",
                "tileloadd tmm1, [{out} + {row} + 64]",
                "tileloadd tmm2, [{below} + {row}]",
                "tileloadd tmm3, [{below} + {row} + 64]",
                "2:",
                "tileloadd tmm4, [{a} + {line}]",
                "tileloadd tmm6, [{b} + {row}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {row} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{lower} + {line}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, {step}",
                "add {lower}, {step}",
                "add {b}, 2048",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{out} + {row}], tmm0",
                "tilestored [{out} + {row} + 64], tmm1",
                "tilestored [{below} + {row}], tmm2",
                "tilestored [{below} + {row} + 64], tmm3",
                out = in(reg) out,
                below = in(reg) out.add(upper),
                a = inout(reg) a.as_ptr() => _,
                lower = inout(reg) a.as_ptr().add(upper) => _,
                b = inout(reg) b.as_ptr() => _,
                steps = inout(reg) steps => _,
                step = in(reg) rows * size_of::<Line>(),
                line = in(reg) size_of::<Line>(),
                row = in(reg) size_of::<WordPairs>(),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

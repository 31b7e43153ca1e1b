//! How long the allocator keeps memory that is free before the system gets it back.
//!
//! Its default is a second. That is too long while a model is loaded, tensor by tensor, each through several hands: the
//! remains would be as large as the model. And it is too short for computing: every step of a training run would have its
//! gigabytes taken away, given back and cleared by the kernel, a quarter of its time.

/// For loading, and for everything that is no arithmetic.
pub(crate) fn give_back_at_once() {
    set_purge_delay(0);
}

/// For computing: half a minute.
pub(crate) fn keep() {
    set_purge_delay(30_000);
}

/// The most memory this process has held so far, in bytes; None where the system does not tell.
pub(crate) fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kilobytes * 1024)
}

fn set_purge_delay(milliseconds: i64) {
    /// `mi_option_purge_delay` of mimalloc.h.
    const PURGE_DELAY: i32 = 15;
    #[expect(unsafe_code, reason = "the allocator has no safe call for its options")]
    // SAFETY: it stores a number, atomically.
    unsafe {
        libmimalloc_sys::mi_option_set(PURGE_DELAY, milliseconds as _);
    }
}

//! How much memory pictures may take, and how long the allocator keeps what is free before the system gets it back.
//!
//! The allocator's default is a second. That is too long while a model is loaded, tensor by tensor, each through several hands: the
//! remains would be as large as the model. And it is too short for computing: every step of a training run would have its
//! gigabytes taken away, given back and cleared by the kernel, a quarter of its time.

/// For loading, and for everything that is no arithmetic: a hundredth of a second. At once would be too soon: memory that the next
/// tensor takes again has to be cleared by the kernel first, which was two thirds of loading a small model.
pub(crate) fn give_back_soon() {
    set_purge_delay(10);
}

/// For computing: half a minute.
pub(crate) fn keep() {
    set_purge_delay(30_000);
}

/// The most memory this process has held so far, in bytes; None where the system does not tell.
pub(crate) fn peak() -> Option<u64> {
    status("VmHWM:")
}

/// Pictures of `bytes` each that are computed together: as many as a tenth of what the process holds has room for, its model
/// that is, or 256 MB if that is more; 16 at most, where a small model's gain has become less than what two runs differ by.
pub(crate) fn pictures_at_once(bytes: usize) -> usize {
    const MOST: usize = 16;
    let room = status("VmRSS:").map_or(0, |held| held / 10).max(256 << 20);
    usize::try_from(room / bytes.max(1) as u64).map_or(MOST, |fitting| fitting.clamp(1, MOST))
}

/// A field of what the system tells of this process, in bytes.
fn status(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_pictures_come_in_sixteens_and_huge_ones_alone() {
        assert_eq!(pictures_at_once(0), 16);
        assert_eq!(pictures_at_once(1 << 20), 16);
        assert_eq!(pictures_at_once(usize::MAX), 1);
        // A test holds less than 2.5 GB, so that 256 MB count.
        assert_eq!(pictures_at_once(64 << 20), 4);
    }
}

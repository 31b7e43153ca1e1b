//! How many pools of threads there are.

/// Large element-wise operations of the tensor library go to a pool of its own, whose threads spin while they wait for
/// the next: beside the pool that computes our products, twice as many threads as cores get in each other's way, which
/// costs a caption about a tenth of its time. What is large is done by our own operations anyway. For `main`'s first line.
pub(crate) fn one_pool() {
    #[expect(unsafe_code, reason = "the library has no other setting")]
    // SAFETY: no other thread runs yet that could read the environment.
    unsafe {
        std::env::set_var("CANDLE_NUM_THREADS", "1");
    }
}

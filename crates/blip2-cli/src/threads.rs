//! How many pools of threads there are.

const VARIABLE: &str = "CANDLE_NUM_THREADS";

/// Large element-wise operations of the tensor library go to a pool of its own, whose threads spin while they wait for
/// the next one. Beside the pool that computes our products that is twice as many threads as cores: a seventh of a
/// caption's time was spent waiting and changing threads. Most of what is large is done by operations of our own; what
/// is left (sums of gradients in training, above all) is done by one thread, which took no longer. For `main`'s first
/// line; whoever has set the variable is not overruled.
pub(crate) fn one_pool() {
    if std::env::var_os(VARIABLE).is_some() {
        return;
    }
    #[expect(unsafe_code, reason = "the library has no other setting")]
    // SAFETY: no other thread runs yet that could read the environment.
    unsafe {
        std::env::set_var(VARIABLE, "1");
    }
}

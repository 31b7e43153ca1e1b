//! A recipe's number of threads: a process of its own, because it has one pool for good.

use blip2_train::tasks::use_threads;

#[test]
fn a_recipes_threads_make_the_pool_and_never_change_one() {
    assert_eq!(use_threads(0), None);
    assert_eq!(use_threads(3), None);
    assert_eq!(rayon::current_num_threads(), 3);
    // The second stage of the same recipe asks for the same.
    assert_eq!(use_threads(3), None);
    let said = use_threads(2).unwrap_or_default();
    assert!(said.contains("runtime.threads is 2") && said.contains("on 3"), "{said}");
    assert_eq!(rayon::current_num_threads(), 3);
    assert_eq!(use_threads(0), None);
}

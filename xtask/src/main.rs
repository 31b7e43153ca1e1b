//! blip2
fn main() {}

//! The `blockplane` binary.
fn main() {}

//! Work for a GPU that is not a transfer.

pub(crate) mod matmul;

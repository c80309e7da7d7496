//! Blocks as small tensors: arrangements of a KV cache, and the plan of a copy that rearranges.
//!
//! [`KvBlockLayout`] and [`KvSlice`] are what callers say. Of each side they make a [`TensorSet`],
//! of both sides a [`TensorPair`]: the nest of loops that is left when everything that is contiguous
//! on both sides has become part of a run.

mod layout;
mod nest;
mod order;
mod pair;
mod set;
mod slice;
#[cfg(test)]
mod tests;
mod walk;

pub use layout::KvBlockLayout;
pub use order::{Axis, KvAxis, KvOrder, KvShape};
pub use slice::KvSlice;

pub(crate) use pair::{FROM, TO, TensorPair};
pub(crate) use set::TensorSet;
pub(crate) use walk::{Row, Strided};

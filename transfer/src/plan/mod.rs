//! Planning: pure arithmetic over layouts and ids. No I/O, no clock, no pointers.

mod compress;
mod layout;
mod set;
mod split;

pub use layout::{BlockLayout, LayoutError};

pub(crate) use compress::{DescriptorPair, compress};
pub(crate) use set::{BlockSet, IDS_MAX, Order, Segments, for_each_segment, segment_count};
pub(crate) use split::{part_range, parts_of, stripes};

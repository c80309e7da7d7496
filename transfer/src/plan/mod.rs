//! Planning: pure arithmetic over layouts and ids. No I/O, no clock, no pointers.

mod compress;
mod cut;
mod ids;
mod layout;
mod set;
mod split;
mod table;
mod tensor;
mod walk;

pub use ids::BlockIds;
pub use layout::{BlockLayout, LayoutError};
pub use tensor::{Axis, KvAxis, KvBlockLayout, KvOrder, KvShape, KvSlice};

pub(crate) use compress::{DescriptorList, DescriptorPair};
pub(crate) use cut::{cuts, turn, turns};
pub(crate) use ids::joins_in;
pub(crate) use set::{BlockSet, IDS_MAX, INNER_MAX, Order};
pub(crate) use split::{part_range, parts_of, stripes};
pub(crate) use table::Table;
pub(crate) use tensor::{FROM, Row, TO, TensorPair, TensorSet};
pub(crate) use walk::{Segments, for_each_segment, segment_count};

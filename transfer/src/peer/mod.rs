//! What agents tell each other about themselves.

mod codec;
mod metadata;

pub use metadata::{Metadata, RegionInfo};

pub(crate) use codec::{Reader, Short, Writer};
pub(crate) use metadata::{Addresses, access_code, access_from};

//! What agents tell each other about themselves.

mod codec;
mod file;
mod metadata;
mod store;

pub use file::MetadataFileError;
pub use metadata::{Metadata, MetadataContent, RegionInfo};
pub use store::{FolderStore, MemoryStore, MetadataStore, StoreError};

pub(crate) use codec::{Reader, Short, Writer};
pub(crate) use metadata::{Addresses, METADATA_BYTES_MAX, access_code, access_from};

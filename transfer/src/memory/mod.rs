//! Memory: regions that operations name, and where their bytes live.
//!
//! # Memory model
//!
//! Bytes of a region may be written at any time by a peer: by another process through a shared
//! mapping, by the kernel on behalf of a socket, or by a copy worker. This crate therefore never
//! forms a reference to them. All access goes through raw pointers, `ptr::copy` and system calls
//! that take raw `iovec`s. Ordering comes from what follows the bytes: a completion (a mutex in
//! this process) or a notification (a socket), never from the bytes themselves.

mod arena;
mod checksum;
mod copy;
mod foreign;
mod mapping;
mod region;

pub use checksum::Checksum;
pub use region::{HostMemory, HugePageUse, RegionBusy, RegionId, RegionKind, Registration};

pub(crate) use arena::{advise_huge_pages, map_arena, small_file};
pub(crate) use copy::{Stores, copy_bytes, copy_piece, copy_row, publish};
pub(crate) use foreign::{Batch, PeerProcess, address_of};
pub(crate) use mapping::Mapping;
pub(crate) use region::{Region, RegionOwner};

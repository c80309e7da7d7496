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
mod mapping;
mod region;

pub use region::{HostMemory, HugePageUse, RegionId, RegionKind, Registration};

pub(crate) use arena::map_arena;
pub(crate) use mapping::Mapping;
pub(crate) use region::{Region, RegionOwner};

/// Moves bytes between two places that this agent keeps alive.
///
/// # Safety
/// `from..from + bytes` must be mapped readable and `to..to + bytes` mapped writable for the whole
/// call. The ranges may overlap. Nobody holds a reference into either of them.
pub(crate) unsafe fn copy_bytes(from: *const u8, to: *mut u8, bytes: usize) {
    // SAFETY: mapped by the caller's contract; `copy` allows overlap and u8 needs no alignment. A
    // peer that writes the source or the destination at the same time makes the copied bytes
    // unspecified, which is what the protocol above (windows, completions) rules out.
    unsafe { std::ptr::copy(from, to, bytes) }
}

//! Looking at blocks of a peer where they lie, instead of copying them.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use super::check::{check_layout, check_window};
use super::prepare::{Questions, session_of};
use super::request::{Op, RemoteBlocks};
use crate::agent::{Core, MappedMemory, RemoteMemory, RemoteRegion, Session};
use crate::error::{MapError, PeerLost, PrepareError, Side};
use crate::memory::copy_bytes;
use crate::plan::{BlockSet, LayoutError};
use crate::window::Grant;

/// Blocks of a peer in memory that is mapped here: a READ without a copy.
///
/// While this lives, the memory stays mapped, and a window that it was made through does not close
/// ([`Window::close`](crate::Window::close) of the owner waits): with a window, the owner has
/// promised to leave the blocks as they are. Without one (an open region) the owner may write them
/// at any time. Look at [`MappedBlocks::revoked`] from time to time and let go when it says so.
///
/// The bytes belong to another process. They are reached by raw pointer or copied out; whoever
/// forms a reference must know that nobody writes them meanwhile.
pub struct MappedBlocks {
    session: Arc<Session>,
    region: Arc<RemoteRegion>,
    set: BlockSet,
    grant: Option<Arc<Grant>>,
}

impl fmt::Debug for MappedBlocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MappedBlocks")
            .field("region", &self.region.id)
            .field("blocks", &self.blocks())
            .field("layers", &self.layers())
            .finish_non_exhaustive()
    }
}

impl MappedBlocks {
    /// Number of blocks: the ids that were asked for, in their order.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.set.ids.len()
    }

    /// Number of layers.
    #[must_use]
    pub const fn layers(&self) -> u32 {
        self.set.layers.end - self.set.layers.start
    }

    /// Contiguous bytes of one block in one layer.
    #[must_use]
    pub const fn run_bytes(&self) -> u64 {
        self.set.layout.run_bytes
    }

    /// First of [`Self::run_bytes`] bytes of the `block`-th block in the `layer`-th layer, or
    /// `None` when there is no such block or layer. Valid as long as `self`.
    #[must_use]
    pub fn run(&self, block: usize, layer: u32) -> Option<NonNull<u8>> {
        if block >= self.blocks() || layer >= self.layers() {
            return None;
        }
        let id = self.set.ids.at(block);
        let offset = self
            .set
            .layout
            .run_offset(id, self.set.layers.start + layer)?;
        let RemoteMemory::Mapped(memory) = &self.region.memory else {
            return None;
        };
        let offset = usize::try_from(offset).ok()?;
        // SAFETY: the set was validated against this mapping, which `self` keeps.
        NonNull::new(unsafe { memory.base().add(offset) })
    }

    /// Copies the beginning of a run, as much as `into` takes.
    ///
    /// # Errors
    /// No such block or layer, or `into` is longer than a run.
    pub fn read(&self, block: usize, layer: u32, into: &mut [u8]) -> Result<(), LayoutError> {
        let end = into.len() as u64;
        if end > self.run_bytes() {
            return Err(LayoutError::OutOfRegion {
                end,
                region_bytes: self.run_bytes(),
            });
        }
        let from = self.run(block, layer).ok_or_else(|| LayoutError::BlockId {
            id: u32::try_from(block).unwrap_or(u32::MAX),
            blocks: u32::try_from(self.blocks()).unwrap_or(u32::MAX),
        })?;
        // SAFETY: a whole run lies in the mapping that `self` keeps; `into` is a slice of its own.
        unsafe { copy_bytes(from.as_ptr(), into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Whether the owner wants the blocks back (it closes the window or has released the region),
    /// or is lost. Drop this then; what was read before is good.
    #[must_use]
    pub fn revoked(&self) -> bool {
        self.lost().is_some()
            || self.region.released()
            || self
                .grant
                .as_ref()
                .is_some_and(|grant| grant.usage.revoked())
    }

    /// Why the owner is lost, if it is.
    #[must_use]
    pub fn lost(&self) -> Option<PeerLost> {
        self.session.lost()
    }
}

impl Drop for MappedBlocks {
    fn drop(&mut self) {
        if let Some(grant) = &self.grant {
            grant.usage.end();
        }
    }
}

/// Maps blocks of a peer.
pub(crate) fn map_blocks(
    core: &Arc<Core>,
    remote: RemoteBlocks<'_>,
) -> Result<MappedBlocks, MapError> {
    let session = session_of(core, remote.peer)?;
    let questions = Questions::new(core, &session);
    let region = questions.region(remote.region)?;
    let not_mapped = |reason: &str| MapError::NotMapped {
        region: region.id,
        lane: session.lane().lane,
        reason: reason.to_owned(),
    };
    match &region.memory {
        RemoteMemory::Mapped(MappedMemory::InProcess(_) | MappedMemory::Shared(_)) => {}
        RemoteMemory::Foreign(_) => return Err(not_mapped("it is not an arena")),
        RemoteMemory::Rdma(_) => return Err(not_mapped("it is reached by RDMA")),
        RemoteMemory::Streamed(why) => return Err(not_mapped(why)),
        RemoteMemory::Stored => return Err(not_mapped("it is storage")),
        RemoteMemory::Unreachable(why) => return Err(not_mapped(why)),
        RemoteMemory::Device(_) => return Err(not_mapped("it is device memory")),
    }
    let set = BlockSet::new(remote.layout, remote.ids, remote.layers);
    check_layout(Side::Remote, &set, region.len)?;
    let grant = remote
        .window
        .map(|window| questions.window(window))
        .transpose()?;
    check_window(&session, &region, Op::Read, grant.as_deref(), |scope| {
        scope.covers(&set)
    })?;
    if let Some(grant) = &grant
        && !grant.usage.begin()
    {
        let closed = PrepareError::WindowClosed {
            peer: remote.peer.name().to_owned(),
            window: grant.id,
        };
        return Err(session.lost().map_or(closed, PrepareError::PeerLost).into());
    }
    Ok(MappedBlocks {
        session: session.clone(),
        region,
        set,
        grant,
    })
}

//! Blocks that nobody may use yet because a peer may still write into them.

use blockplane_protocol::BlockId;

use super::{Lease, MutableBlock};

/// Blocks set aside by [`BlockPool::quarantine`](crate::BlockPool::quarantine). They count as
/// quarantined until this is dropped (they are free then) or taken back.
#[derive(Debug)]
#[must_use = "dropping the quarantine frees its blocks"]
pub struct Quarantine {
    blocks: Vec<MutableBlock>,
}

impl Quarantine {
    /// Blocks that the pool has counted as quarantined already.
    pub(crate) fn counted(blocks: Vec<MutableBlock>) -> Self {
        Self { blocks }
    }

    /// How many blocks are set aside.
    #[must_use]
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// The blocks.
    pub fn ids(&self) -> impl ExactSizeIterator<Item = BlockId> + '_ {
        self.blocks.iter().map(MutableBlock::id)
    }

    /// Frees the blocks: no byte can land in them any more. The same as dropping.
    pub fn release(self) {
        drop(self);
    }

    /// Takes the blocks back to fill them: no byte can land in them any more.
    #[must_use = "dropping the blocks frees them"]
    pub fn take_back(mut self) -> Vec<MutableBlock> {
        let leases = std::mem::take(&mut self.blocks)
            .into_iter()
            .map(MutableBlock::into_lease)
            .collect::<Vec<Lease>>();
        if let Some(first) = leases.first() {
            let ids = leases.iter().map(Lease::id);
            first.pool().lift_quarantine(ids);
        }
        leases.into_iter().map(MutableBlock::new).collect()
    }
}

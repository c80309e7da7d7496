//! What is asked of a store, and what became of it.

use std::fmt;

use blockplane_protocol::{SequenceHash, TokenBlock};
use blockplane_transfer::{AccessError, BlockLayout, Checksum, LayoutError, Registration};

use super::disk::Piece;

/// Memory that blocks are read into or written from: host memory of the agent that opened the store.
#[derive(Clone, Copy, Debug)]
pub struct StoreMemory<'a> {
    /// The region.
    pub registration: &'a Registration,
    /// How blocks lie in it.
    pub layout: BlockLayout,
}

/// A block to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotWrite {
    /// Where to. Nobody else reads or writes this slot.
    pub slot: u32,
    /// Its id in the memory.
    pub block: u32,
    /// Its name.
    pub name: TokenBlock,
    /// Name of the block before it in its sequence.
    pub parent: Option<SequenceHash>,
}

/// A block to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotRead {
    /// Where it lies. Nobody writes this slot.
    pub slot: u32,
    /// Its id in the memory.
    pub block: u32,
    /// Its name.
    pub name: TokenBlock,
}

/// A block that was found when the store was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecoveredSlot {
    /// Where it lies.
    pub slot: u32,
    /// Its name.
    pub name: TokenBlock,
    /// Name of the block before it in its sequence.
    pub parent: Option<SequenceHash>,
}

/// What became of one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockOutcome {
    /// Every byte is in place, and is what was stored under the name.
    Moved,
    /// What was found under the name is not what was stored.
    Invalid(Invalid),
    /// Not moved. It may work another time.
    Failed(String),
    /// Not moved, and the slot will never work again: it is taken out of use.
    Bad(String),
}

/// Why stored contents cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Invalid {
    /// The bytes differ from those that were stored.
    Checksum,
    /// They are of another model, layout or format.
    Fingerprint,
    /// They are not there, or are those of another name.
    Missing,
}

/// Bytes that may still be moved after a deadline (a device hangs): waits until that is over.
pub struct Pending(Box<dyn FnOnce() + Send>);

/// What became of a batch.
#[derive(Debug)]
pub struct StoreReport {
    /// One for each block, in order.
    pub outcomes: Vec<BlockOutcome>,
    /// Present while bytes of blocks that were not moved may still land or be read: their memory and
    /// their slots must be left alone until it is over.
    pub pending: Option<Pending>,
}

impl StoreReport {
    /// No block was moved, for one reason, and nothing moves any more.
    pub(super) fn failed(blocks: usize, reason: &str) -> Self {
        Self {
            outcomes: vec![BlockOutcome::Failed(reason.to_owned()); blocks],
            pending: None,
        }
    }
}

impl Pending {
    /// Ends when both have.
    pub(super) fn both(one: Option<Self>, other: Option<Self>) -> Option<Self> {
        match (one, other) {
            (Some(one), Some(other)) => Some(Self::new(move || {
                one.wait();
                other.wait();
            })),
            (one, other) => one.or(other),
        }
    }

    /// `wait` returns when no byte moves any more.
    #[must_use]
    pub fn new(wait: impl FnOnce() + Send + 'static) -> Self {
        Self(Box::new(wait))
    }

    /// Blocks until no byte moves any more, however long that takes.
    pub fn wait(self) {
        (self.0)();
    }
}

impl fmt::Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pending").finish_non_exhaustive()
    }
}

impl<'a> StoreMemory<'a> {
    /// One block that takes the whole region.
    pub(super) const fn whole(registration: &'a Registration, block_bytes: u64) -> Self {
        Self {
            registration,
            layout: BlockLayout::contiguous(1, block_bytes),
        }
    }

    /// Why it cannot hold blocks of `block_bytes`.
    pub(super) fn check(&self, block_bytes: u64) -> Result<(), String> {
        let layout = &self.layout;
        let bytes = u64::from(layout.layers).saturating_mul(layout.run_bytes);
        if bytes != block_bytes {
            return Err(format!(
                "blocks of the memory have {bytes} bytes, those of the store {block_bytes}"
            ));
        }
        if self.registration.device().is_some() {
            return Err("the memory is that of a device; accepted: host memory".to_owned());
        }
        layout
            .validate(self.registration.len() as u64)
            .map_err(|error| error.to_string())
    }

    /// The ranges of a block and their lengths, in the order in which they lie in a slot.
    pub(super) fn runs(&self, block: u32) -> impl Iterator<Item = (u64, u64)> + use<> {
        let layout = self.layout;
        let together = layout.layer_stride == layout.run_bytes;
        let (count, bytes) = if together {
            (1, u64::from(layout.layers) * layout.run_bytes)
        } else {
            (layout.layers, layout.run_bytes)
        };
        (0..count)
            .filter_map(move |layer| layout.run_offset(block, layer))
            .map(move |offset| (offset, bytes))
    }

    /// The same as pieces to move to or from `at` in the file.
    pub(super) fn pieces(&self, block: u32, at: u64) -> impl Iterator<Item = Piece<'a>> + use<'a> {
        let memory = self.registration;
        self.runs(block).scan(at, move |at, (offset, bytes)| {
            let piece = Piece {
                memory,
                offset,
                at: *at,
                bytes,
            };
            *at += bytes;
            Some(piece)
        })
    }

    /// xxh3-64 of the bytes of a block, layer by layer, as headers of slots hold it.
    ///
    /// # Errors
    /// The block is not in the memory, or the memory cannot be read.
    pub fn checksum(&self, block: u32, seed: u64) -> Result<u64, AccessError> {
        let blocks = self.layout.blocks;
        if block >= blocks {
            return Err(LayoutError::BlockId { id: block, blocks }.into());
        }
        let mut sum = Checksum::with_seed(seed);
        for (offset, bytes) in self.runs(block) {
            // Longer than memory is not in it either.
            let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
            sum.update(self.registration, offset, bytes)?;
        }
        Ok(sum.finish())
    }
}

//! Blocks of one slot, and the most naive copy between two of them.

use std::ops::Range;
use std::sync::Arc;

use blockplane_transfer::{
    BlockLayout, LocalBlocks, Peer, RegionId, Registration, RemoteBlocks, WindowId,
};

use crate::pattern::ids;
use crate::random::Random;
use crate::{BLOCK, BLOCKS, SLOT, SLOTS};

#[derive(Clone, Debug)]
pub(crate) struct Blocks {
    /// First byte of the slot in its region.
    base: u64,
    layout: BlockLayout,
    ids: Arc<[u32]>,
    layers: Range<u32>,
}

/// Blocks of a slot here and of one there: the same runs, in different places and orders.
///
/// A window over blocks is only for the layout that it was opened with: `as_window`.
pub(crate) fn pair(
    random: &mut Random,
    local_slot: usize,
    remote_slot: usize,
    as_window: bool,
) -> (Blocks, Blocks) {
    let (blocks, layers, run) = match random.below(4) {
        _ if as_window => (BLOCKS, 1, BLOCK),
        0 => (BLOCKS, 1, BLOCK),
        1 => (BLOCKS / 4, 4, BLOCK),
        2 => (BLOCKS * 4, 1, BLOCK / 4),
        _ => (3, 1, BLOCK * u64::from(BLOCKS) / 3),
    };
    let count = 1 + random.below(u64::from(blocks)) as u32;
    let mut side = |slot: usize| {
        let layer_first = layers > 1 && random.chance(50);
        let (block_stride, layer_stride) = if layer_first {
            (run, run * u64::from(blocks))
        } else {
            (run * u64::from(layers), run)
        };
        let base = (slot * SLOT) as u64;
        Blocks {
            base,
            layout: BlockLayout {
                offset: base,
                blocks,
                block_stride,
                layers,
                layer_stride,
                run_bytes: run,
            },
            ids: ids(random, blocks, count).into(),
            layers: 0..layers,
        }
    };
    let (here, mut there) = (side(local_slot), side(remote_slot));
    if as_window {
        there.layout = window_layout();
        let first = remote_slot as u32 * BLOCKS;
        there.ids = there.ids.iter().map(|id| first + id).collect();
    }
    (here, there)
}

/// The layout of windows over blocks.
pub(crate) const fn window_layout() -> BlockLayout {
    BlockLayout::contiguous(BLOCKS * SLOTS as u32, BLOCK)
}

impl Blocks {
    /// All of a region of one slot.
    pub(crate) fn whole() -> Self {
        Self {
            base: 0,
            layout: BlockLayout::contiguous(BLOCKS, BLOCK),
            ids: (0..BLOCKS).collect(),
            layers: 0..1,
        }
    }

    pub(crate) fn local<'a>(&self, registration: &'a Registration) -> LocalBlocks<'a> {
        LocalBlocks {
            registration,
            layout: self.layout,
            ids: self.ids.clone().into(),
            layers: self.layers.clone(),
        }
    }

    pub(crate) fn remote<'a>(
        &self,
        peer: &'a Peer,
        region: RegionId,
        window: Option<WindowId>,
    ) -> RemoteBlocks<'a> {
        RemoteBlocks {
            peer,
            region,
            layout: self.layout,
            ids: self.ids.clone().into(),
            layers: self.layers.clone(),
            window,
        }
    }

    fn run(&self, id: u32, layer: u32) -> Range<usize> {
        let start = self.layout.run_offset(id, layer).unwrap() - self.base;
        start as usize..(start + self.layout.run_bytes) as usize
    }
}

/// Copies between the bytes of two slots.
pub(crate) fn copy(from: &[u8], a: &Blocks, to: &mut [u8], b: &Blocks) {
    for (&x, &y) in a.ids.iter().zip(b.ids.iter()) {
        for (i, k) in a.layers.clone().zip(b.layers.clone()) {
            to[b.run(y, k)].copy_from_slice(&from[a.run(x, i)]);
        }
    }
}

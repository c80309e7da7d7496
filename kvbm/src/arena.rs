//! The memory of a pool: one registered region cut into blocks.

use std::{fmt, ptr::NonNull, sync::Arc};

use blockplane_protocol::{BlockId, KvLayout, LayerIndex, LayoutError};
use blockplane_transfer::{
    Agent, ArenaConfig, Axis, BlockLayout, DeviceArenaConfig, KvBlockLayout, PinConfig,
    RegisterError, Registration, RemoteAccess,
};
use thiserror::Error;

/// Memory for the KV of `blocks` blocks, registered so that peers can transfer into and out of it.
pub struct KvArena {
    layout: KvLayout,
    blocks: u32,
    registration: Registration,
}

/// Which memory an arena is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ArenaPlace {
    /// Memory of the host: G1 of an engine on processors, or G2 where there is no device.
    #[default]
    Host,
    /// Memory of the host that devices copy from and to at full speed, next to this one: G2 beside
    /// devices. It is pinned in the background, piece by piece, and can be used meanwhile.
    Pinned {
        /// The device, as this process numbers it.
        near: u32,
    },
    /// Memory of this device: G1.
    Device(u32),
}

/// Why an arena could not be made.
#[derive(Debug, Error)]
pub enum ArenaError {
    /// The layout is not valid, or too large for this many blocks.
    #[error("KV layout of arena '{label}' with {blocks} blocks: {source}")]
    Layout {
        /// The arena's name.
        label: String,
        /// Blocks asked for.
        blocks: u32,
        /// What is wrong.
        source: LayoutError,
    },
    /// The memory could not be had.
    #[error("{bytes} bytes for arena '{label}': {source}")]
    Memory {
        /// The arena's name.
        label: String,
        /// Its size.
        bytes: usize,
        /// What is wrong.
        source: Box<RegisterError>,
    },
}

impl KvArena {
    /// Allocates and registers host memory for `blocks` blocks. Peers can map it on this host, and
    /// access it only through windows that are open.
    ///
    /// # Errors
    /// When the layout is not valid or the memory cannot be had.
    pub fn allocate(
        agent: &Agent,
        layout: KvLayout,
        blocks: u32,
        label: &str,
    ) -> Result<Arc<Self>, ArenaError> {
        Self::allocate_in(agent, layout, blocks, label, ArenaPlace::Host)
    }

    /// The same in memory of another kind.
    ///
    /// # Errors
    /// When the layout is not valid, the memory cannot be had, or there is no such device.
    pub fn allocate_in(
        agent: &Agent,
        layout: KvLayout,
        blocks: u32,
        label: &str,
        place: ArenaPlace,
    ) -> Result<Arc<Self>, ArenaError> {
        layout
            .validate(blocks)
            .map_err(|source| ArenaError::Layout {
                label: label.to_owned(),
                blocks,
                source,
            })?;
        let bytes = layout.pool_bytes(blocks);
        let access = RemoteAccess::WindowOnly;
        let host = || ArenaConfig::new(bytes, label).with_access(access);
        let registration = match place {
            ArenaPlace::Host => agent.allocate(host()),
            ArenaPlace::Pinned { near } => agent.allocate(host().pinned(PinConfig::near(near))),
            ArenaPlace::Device(device) => {
                let config = DeviceArenaConfig::new(device, bytes, label);
                agent.allocate_device(config.with_access(access))
            }
        };
        let registration = registration.map_err(|source| ArenaError::Memory {
            label: label.to_owned(),
            bytes,
            source: Box::new(source),
        })?;
        Ok(Arc::new(Self {
            layout,
            blocks,
            registration,
        }))
    }

    /// Shape of the blocks.
    #[must_use]
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// Number of blocks.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// The region, as the transfer layer knows it.
    #[must_use]
    pub fn registration(&self) -> &Registration {
        &self.registration
    }

    /// The layout in the terms of the transfer layer: bytes and strides.
    #[must_use]
    pub fn transfer_layout(&self) -> BlockLayout {
        BlockLayout {
            offset: 0,
            blocks: self.blocks,
            block_stride: self.layout.block_stride() as u64,
            layers: self.layout.layers,
            layer_stride: self.layout.layer_stride(self.blocks) as u64,
            run_bytes: self.layout.layer_bytes() as u64,
        }
    }

    /// The layout down to the heads, for transfers that rearrange blocks or move a part of them
    /// ([`Agent::prepare_tensors`]): to another order of tokens and heads, or to and from ranks
    /// that hold other heads.
    #[must_use]
    pub fn tensor_layout(&self) -> KvBlockLayout {
        let layout = &self.layout;
        let axis = |count, stride: usize| Axis {
            count,
            stride: stride as u64,
        };
        // `[plane][head][token][dim]` in each layer of each block.
        let head = layout.head_dim as usize * layout.dtype.bytes();
        KvBlockLayout {
            offset: 0,
            blocks: axis(self.blocks, layout.block_stride()),
            layers: axis(layout.layers, layout.layer_stride(self.blocks)),
            planes: axis(layout.planes, layout.plane_bytes()),
            tokens: axis(layout.block_tokens, head),
            heads: axis(layout.kv_heads, head * layout.block_tokens as usize),
            head_bytes: head as u64,
        }
    }

    /// Start of one layer of one block: `[plane][head][token][dim]`, `layout().layer_bytes()` long.
    ///
    /// Reading or writing through it is `unsafe` and up to the caller: write only as the holder of
    /// the [`MutableBlock`](crate::MutableBlock) of this id, read as a holder of any handle.
    ///
    /// In an arena on a device it is an address there, not to be followed on the host.
    ///
    /// # Panics
    /// When the block or the layer is out of range.
    #[must_use]
    pub fn run_ptr(&self, block: BlockId, layer: LayerIndex) -> NonNull<u8> {
        assert!(
            block.0 < self.blocks && layer.0 < self.layout.layers,
            "block {} layer {} of an arena of {} blocks and {} layers",
            block.0,
            layer.0,
            self.blocks,
            self.layout.layers
        );
        let offset = block.index() * self.layout.block_stride()
            + layer.index() * self.layout.layer_stride(self.blocks);
        let start = self.registration.base_ptr().as_ptr().wrapping_add(offset);
        NonNull::new(start).expect("an address inside the region is not null")
    }
}

impl fmt::Debug for KvArena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvArena")
            .field("blocks", &self.blocks)
            .field("layout", &self.layout)
            .finish_non_exhaustive()
    }
}

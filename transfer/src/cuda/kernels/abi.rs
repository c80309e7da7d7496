//! What the host passes to the kernels: the structs of `abi.cuh`, field by field. Pointers are
//! addresses as the device sees them.

/// In place of an index into the id table: the ids are consecutive.
pub(crate) const CONSECUTIVE: u32 = u32::MAX;
/// Set in the flag of a launch that was called off and touched nothing.
pub(crate) const CALLED_OFF: u32 = 0x8000_0000;
/// Axes of a permuting copy, at most.
pub(crate) const AXES_MAX: usize = 6;

/// A pair of block sets of one shape.
///
/// Its chunks are numbered from `first_chunk`: chunk `c` of the set is piece `c / chunks_per_piece`
/// at offset `(c % chunks_per_piece) * chunk_bytes`, the last one of a piece shorter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct BpSet {
    /// Address of block 0, first layer of the range, where bytes come from.
    pub(crate) src: u64,
    /// The same where bytes go to.
    pub(crate) dst: u64,
    /// Bytes from block to block.
    pub(crate) src_block: u64,
    pub(crate) dst_block: u64,
    /// Bytes from layer to layer.
    pub(crate) src_layer: u64,
    pub(crate) dst_layer: u64,
    /// Contiguous bytes of one piece, on both sides.
    pub(crate) piece_bytes: u64,
    /// Index of the first id in the id table, or [`CONSECUTIVE`].
    pub(crate) src_ids: u32,
    pub(crate) dst_ids: u32,
    /// The first id when ids are consecutive.
    pub(crate) src_first: u32,
    pub(crate) dst_first: u32,
    /// There are `blocks * layers` pieces.
    pub(crate) blocks: u32,
    pub(crate) layers: u32,
    /// 0: layers are innermost, piece `p` is layer `p % layers`. 1: blocks are.
    pub(crate) layer_major: u32,
    /// `piece_bytes / chunk_bytes`, rounded up.
    pub(crate) chunks_per_piece: u32,
    /// Number of the set's first chunk in the operation.
    pub(crate) first_chunk: u32,
    /// 0.
    pub(crate) reserved: u32,
}

/// How the end of a launch becomes known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct BpDone {
    /// Two device words of this slot: the CTAs at their end, 0 before the launch and after it, and
    /// what CTA 0 of a guarded launch agreed with the host, 0 before the first.
    pub(crate) arrived: u64,
    /// Pinned host word. The last CTA stores `ticket`, or `ticket | CALLED_OFF`, after all bytes,
    /// in the order of the whole system.
    pub(crate) flag: u64,
    /// Two pinned host words: abort (the host stores 1) and started (a guarded kernel stores
    /// `ticket`).
    pub(crate) word: u64,
    /// Below [`CALLED_OFF`], not 0, and another one than at the last launch of this slot.
    pub(crate) ticket: u32,
    /// 1: CTA 0 stores `started` and reads `abort` after a full fence, and no CTA touches a byte
    /// before. A host that stores `abort`, fences, and reads `started` as something else than
    /// `ticket` knows that this launch is not going to touch one. All CTAs must fit on the device
    /// at once.
    pub(crate) guarded: u32,
}

/// The parameter of `bp_copy_bulk` and `bp_copy_lanes`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct BpCopy {
    /// The set when `set_count` is 1.
    pub(crate) one: BpSet,
    /// Array of `set_count` sets in device memory, ascending by `first_chunk`; unused when it is 1.
    pub(crate) sets: u64,
    /// The id table: `u32`s that the device can read.
    pub(crate) ids: u64,
    /// At least 1.
    pub(crate) set_count: u32,
    /// Bytes of a chunk. For `bp_copy_bulk` a multiple of 16 and the bytes of a stage.
    pub(crate) chunk_bytes: u32,
    /// This launch copies the chunks `chunk_begin..chunk_end` of the operation.
    pub(crate) chunk_begin: u32,
    pub(crate) chunk_end: u32,
    /// How the end becomes known.
    pub(crate) done: BpDone,
}

/// One axis of a permuting copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct BpAxis {
    /// Bytes from index to index, where bytes come from.
    pub(crate) src_stride: u64,
    /// The same where bytes go to.
    pub(crate) dst_stride: u64,
    /// At least 1.
    pub(crate) count: u32,
    /// 0.
    pub(crate) reserved: u32,
}

/// The parameter of `bp_permute`.
///
/// Its units are runs of contiguous bytes: for each pair of blocks, each index tuple over the axes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct BpPermute {
    /// Address of block 0 where bytes come from.
    pub(crate) src: u64,
    /// The same where bytes go to.
    pub(crate) dst: u64,
    /// Bytes from block to block.
    pub(crate) src_block: u64,
    pub(crate) dst_block: u64,
    /// As in [`BpSet`].
    pub(crate) src_ids: u32,
    pub(crate) dst_ids: u32,
    pub(crate) src_first: u32,
    pub(crate) dst_first: u32,
    /// Pairs of blocks.
    pub(crate) blocks: u32,
    /// Axes in use, 1 to [`AXES_MAX`].
    pub(crate) axes: u32,
    /// Outermost first. Ordered by `dst_stride`, writes leave as whole lines.
    pub(crate) axis: [BpAxis; AXES_MAX],
    /// Contiguous bytes of one unit. A warp copies 32 units at a time, so runs of more than a few
    /// KiB are better made an axis.
    pub(crate) run_bytes: u32,
    /// 16, 8, 4, 2 or 1: divides addresses, strides and `run_bytes`.
    pub(crate) vector_bytes: u32,
    /// The id table: `u32`s that the device can read.
    pub(crate) ids: u64,
    /// This launch copies the units `unit_begin..unit_end`.
    pub(crate) unit_begin: u64,
    pub(crate) unit_end: u64,
    /// How the end becomes known.
    pub(crate) done: BpDone,
}

const _: () = {
    assert!(size_of::<BpSet>() == 96);
    assert!(size_of::<BpDone>() == 32);
    assert!(size_of::<BpCopy>() == 160);
    assert!(size_of::<BpAxis>() == 24);
    assert!(size_of::<BpPermute>() == 264);
};

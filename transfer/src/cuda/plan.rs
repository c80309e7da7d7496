//! Planning a copy on a device: pure arithmetic from block sets to what the kernels are given.

use std::collections::HashMap;

use super::kernels::abi::{BpSet, CONSECUTIVE};
use super::kernels::shape;
use crate::plan::{BlockIds, BlockLayout, Order};

/// Bytes of one launch: what can be called off is what has not been launched or has not started.
const LAUNCH_BYTES_MAX: u64 = 1 << 30;

/// Blocks at addresses that the device reaches.
pub(super) struct Blocks<'a> {
    /// Address of the region.
    pub(super) region: u64,
    pub(super) layout: BlockLayout,
    pub(super) ids: &'a BlockIds,
    pub(super) first_layer: u32,
}

/// A pair of block sets of one shape.
pub(super) struct Pair<'a> {
    pub(super) src: Blocks<'a>,
    pub(super) dst: Blocks<'a>,
    pub(super) layers: u32,
    pub(super) order: Order,
}

/// A copy as the kernels take it.
#[derive(Debug)]
pub(super) struct Copies {
    pub(super) sets: Vec<BpSet>,
    pub(super) ids: Vec<u32>,
    pub(super) chunk_bytes: u32,
    pub(super) chunks: u32,
    /// Pieces that are contiguous on both sides, after merging.
    pub(super) pieces: u64,
    pub(super) piece_bytes_max: u64,
    pub(super) piece_bytes_min: u64,
    /// 16 divides every address, stride and length.
    pub(super) aligned: bool,
}

/// More chunks than the kernels can number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TooManyChunks(pub(super) u64);

/// Lays out a copy for about `sms` multiprocessors.
pub(super) fn lay_out(pairs: &[Pair<'_>], sms: u32) -> Result<Copies, TooManyChunks> {
    let mut ids = IdTable::default();
    let mut sets: Vec<_> = pairs.iter().map(|pair| merged(pair, &mut ids)).collect();
    let pieces = |set: &BpSet| u64::from(set.blocks) * u64::from(set.layers);
    let bytes: u64 = sets.iter().map(|set| pieces(set) * set.piece_bytes).sum();
    let piece_bytes_max = sets.iter().map(|set| set.piece_bytes).max().unwrap_or(0);
    let chunk_bytes = shape::chunk_bytes(bytes, piece_bytes_max, sms);
    let mut chunks = 0u64;
    for set in &mut sets {
        let per_piece = set.piece_bytes.div_ceil(chunk_bytes);
        set.first_chunk = narrow(chunks);
        set.chunks_per_piece = narrow(per_piece);
        chunks = chunks.saturating_add(pieces(set).saturating_mul(per_piece));
    }
    // The grid steps beyond the last chunk by less than this.
    if chunks >= u64::from(u32::MAX) {
        return Err(TooManyChunks(chunks));
    }
    let aligned = sets.iter().all(|set| {
        let step = |count: u32, stride: u64| if count > 1 { stride } else { 0 };
        let fields = [
            set.src,
            set.dst,
            set.src_block,
            set.dst_block,
            step(set.layers, set.src_layer),
            step(set.layers, set.dst_layer),
            set.piece_bytes,
        ];
        fields.into_iter().fold(0, |all, field| all | field) % 16 == 0
    });
    Ok(Copies {
        chunk_bytes: narrow(chunk_bytes),
        chunks: narrow(chunks),
        pieces: sets.iter().map(pieces).sum(),
        piece_bytes_max,
        piece_bytes_min: sets.iter().map(|set| set.piece_bytes).min().unwrap_or(0),
        aligned,
        sets,
        ids: ids.ids,
    })
}

impl Copies {
    pub(super) fn bytes(&self) -> u64 {
        let pieces = |set: &BpSet| u64::from(set.blocks) * u64::from(set.layers);
        let bytes = self.sets.iter().map(|set| pieces(set) * set.piece_bytes);
        bytes.sum()
    }

    /// Where each piece comes from, where it goes to, and its length.
    pub(super) fn each_piece(&self) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
        self.sets.iter().flat_map(move |set| {
            (0..set.blocks).flat_map(move |block| {
                (0..set.layers).map(move |layer| {
                    let from = u64::from(self.id(set.src_ids, set.src_first, block));
                    let to = u64::from(self.id(set.dst_ids, set.dst_first, block));
                    let layer = u64::from(layer);
                    (
                        set.src + from * set.src_block + layer * set.src_layer,
                        set.dst + to * set.dst_block + layer * set.dst_layer,
                        set.piece_bytes,
                    )
                })
            })
        })
    }

    /// The id of a block, as the kernels look it up.
    fn id(&self, table: u32, first: u32, block: u32) -> u32 {
        match table {
            CONSECUTIVE => first + block,
            table => self.ids[(table + block) as usize],
        }
    }

    /// Ranges of chunks, each one launch.
    pub(super) fn launches(&self) -> impl ExactSizeIterator<Item = std::ops::Range<u32>> + use<> {
        let each = narrow(LAUNCH_BYTES_MAX / u64::from(self.chunk_bytes));
        let chunks = self.chunks;
        (0..chunks.div_ceil(each)).map(move |launch| {
            let start = launch * each;
            start..chunks.min(start.saturating_add(each))
        })
    }
}

/// Lists of ids, each once.
#[derive(Default)]
pub(super) struct IdTable {
    pub(super) ids: Vec<u32>,
    known: HashMap<(usize, usize), u32>,
}

impl IdTable {
    /// Where the list begins and its first id; or that ids are consecutive.
    pub(super) fn add(&mut self, ids: &BlockIds) -> (u32, u32) {
        let Some(list) = ids.list() else {
            return (CONSECUTIVE, ids.as_span().map_or(0, |(first, _)| first));
        };
        let at = *self
            .known
            .entry((list.as_ptr() as usize, list.len()))
            .or_insert_with(|| {
                let at = narrow(self.ids.len() as u64);
                self.ids.extend_from_slice(list);
                at
            });
        (at, 0)
    }
}

/// A set of pieces that are as long as both sides allow.
fn merged(pair: &Pair<'_>, table: &mut IdTable) -> BpSet {
    let Pair {
        src, dst, layers, ..
    } = pair;
    let run = src.layout.run_bytes;
    let start = |blocks: &Blocks<'_>| {
        let skipped = u64::from(blocks.first_layer) * blocks.layout.layer_stride;
        blocks.region + blocks.layout.offset + skipped
    };
    let count = u32::try_from(src.ids.len()).unwrap_or(u32::MAX);
    let both = |test: fn(&BlockLayout, u64) -> bool, bytes| {
        test(&src.layout, bytes) && test(&dst.layout, bytes)
    };
    let spans = src.ids.as_span().is_some() && dst.ids.as_span().is_some();
    let (mut piece_bytes, mut layers, mut blocks) = (run, *layers, count);
    if layers > 1 && both(|layout, bytes| layout.layer_stride == bytes, run) {
        piece_bytes *= u64::from(layers);
        layers = 1;
    }
    if spans && both(|layout, bytes| layout.block_stride == bytes, piece_bytes) {
        piece_bytes *= u64::from(blocks);
        blocks = 1;
    }
    let (src_ids, src_first) = table.add(src.ids);
    let (dst_ids, dst_first) = table.add(dst.ids);
    BpSet {
        src: start(src),
        dst: start(dst),
        src_block: src.layout.block_stride,
        dst_block: dst.layout.block_stride,
        src_layer: src.layout.layer_stride,
        dst_layer: dst.layout.layer_stride,
        piece_bytes,
        src_ids,
        dst_ids,
        src_first,
        dst_first,
        blocks,
        layers,
        layer_major: u32::from(pair.order == Order::LayerMajor),
        ..BpSet::default()
    }
}

/// Values that were checked to fit.
pub(super) fn narrow(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

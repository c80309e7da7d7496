//! What the bytes of a stored block mean: which model, which shape, which share of it.
//!
//! Stored blocks outlive the process, so everything that has to be equal for their bytes to be of use
//! is stored with them. Blocks of one fingerprint may be exchanged between processes, blocks of
//! two never.

use std::fmt;

use blockplane_protocol::{AttentionKind, DType, KvLayout};
use xxhash_rust::xxh3::xxh3_64;

/// How blocks are named and laid out in a slot: raised when either changes, so that older stores are
/// not misread.
pub const ENCODING: u32 = 1;

/// Everything that two processes must agree on to read each other's stored blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fingerprint {
    /// Fingerprint of the model: its weights and configuration.
    pub model: u64,
    /// xxh3-64 of the shape of the KV, see [`Fingerprint::of`].
    pub layout: u64,
    /// Tokens per block.
    pub block_tokens: u32,
    /// Which share of the heads, of `tp_size`.
    pub tp_rank: u32,
    /// Ranks that share the heads of the model.
    pub tp_size: u32,
    /// [`ENCODING`] of who wrote it.
    pub encoding: u32,
}

impl Fingerprint {
    /// Bytes of [`Fingerprint::encode`].
    pub const BYTES: usize = 32;

    /// The fingerprint of blocks of `layout`, of rank `tp_rank` of `tp_size`, written by this version.
    ///
    /// The order of layers and blocks in memory does not count: a slot holds a block layer by
    /// layer in any case.
    #[must_use]
    pub fn of(model: u64, layout: &KvLayout, tp_rank: u32, tp_size: u32) -> Self {
        Self {
            model,
            layout: layout_hash(layout),
            block_tokens: layout.block_tokens,
            tp_rank,
            tp_size,
            encoding: ENCODING,
        }
    }

    /// One number for all of it: in names of files and in the headers of slots.
    #[must_use]
    pub fn digest(&self) -> u64 {
        xxh3_64(&self.encode())
    }

    /// Fields in the order of their declaration, little-endian.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.model.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.layout.to_le_bytes());
        let small = [self.block_tokens, self.tp_rank, self.tp_size, self.encoding];
        for (to, value) in bytes[16..].chunks_exact_mut(4).zip(small) {
            to.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    /// The reverse of [`Fingerprint::encode`].
    #[must_use]
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Self {
        let long = |at: usize| {
            let mut value = [0; 8];
            value.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(value)
        };
        let short = |at: usize| {
            let mut value = [0; 4];
            value.copy_from_slice(&bytes[at..at + 4]);
            u32::from_le_bytes(value)
        };
        Self {
            model: long(0),
            layout: long(8),
            block_tokens: short(16),
            tp_rank: short(20),
            tp_size: short(24),
            encoding: short(28),
        }
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "model {:016x}, layout {:016x}, {} tokens a block, rank {} of {}, encoding {}",
            self.model, self.layout, self.block_tokens, self.tp_rank, self.tp_size, self.encoding
        )
    }
}

/// xxh3-64 of `layers, kv_heads, head_dim, planes, block_tokens, dtype`, then of each group its kind,
/// window, number of layers and layers; all as 32-bit little-endian words.
fn layout_hash(layout: &KvLayout) -> u64 {
    let dtype = match layout.dtype {
        DType::F32 => 1,
        DType::F16 => 2,
        DType::Bf16 => 3,
    };
    let mut words = vec![
        layout.layers,
        layout.kv_heads,
        layout.head_dim,
        layout.planes,
        layout.block_tokens,
        dtype,
    ];
    for group in &layout.groups {
        let (kind, window) = match group.kind {
            AttentionKind::Full => (1, 0),
            AttentionKind::SlidingWindow { window } => (2, window),
            AttentionKind::Latent => (3, 0),
        };
        // A layout has at most 2^32 layers: they are numbered by 32 bits.
        let layers = u32::try_from(group.layers.len()).unwrap_or(u32::MAX);
        words.extend([kind, window, layers]);
        words.extend(&group.layers);
    }
    let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    xxh3_64(&bytes)
}

#[cfg(test)]
mod tests {
    use blockplane_protocol::LayoutOrder;

    use super::*;

    fn layout() -> KvLayout {
        KvLayout::dense(4, 2, 64, 16, DType::Bf16)
    }

    #[test]
    fn everything_that_matters_changes_it() {
        let base = Fingerprint::of(7, &layout(), 0, 2);
        let mut others = vec![
            Fingerprint::of(8, &layout(), 0, 2),
            Fingerprint::of(7, &layout(), 1, 2),
            Fingerprint::of(7, &layout(), 0, 1),
        ];
        for change in [
            (|l: &mut KvLayout| l.kv_heads = 4) as fn(&mut KvLayout),
            |l| l.head_dim = 32,
            |l| l.planes = 1,
            |l| l.block_tokens = 32,
            |l| l.dtype = DType::F16,
            |l| l.groups[0].kind = AttentionKind::SlidingWindow { window: 128 },
        ] {
            let mut changed = layout();
            change(&mut changed);
            others.push(Fingerprint::of(7, &changed, 0, 2));
        }
        for other in others {
            assert_ne!(other, base);
            assert_ne!(other.digest(), base.digest());
        }
        let mut turned = layout();
        turned.order = match turned.order {
            LayoutOrder::BlockFirst => LayoutOrder::LayerFirst,
            LayoutOrder::LayerFirst => LayoutOrder::BlockFirst,
        };
        assert_eq!(Fingerprint::of(7, &turned, 0, 2), base);
    }

    #[test]
    fn it_comes_back_from_its_bytes() {
        let fingerprint = Fingerprint::of(0x1234_5678_9abc_def0, &layout(), 3, 8);
        assert_eq!(Fingerprint::decode(&fingerprint.encode()), fingerprint);
    }
}

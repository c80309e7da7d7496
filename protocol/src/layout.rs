//! How the KV of a model lies in memory.
//!
//! A worker's pool is one region. Inside it a *block* holds the keys and values of `block_tokens`
//! tokens for all layers. The smallest piece that is always contiguous is one layer of one block:
//! `planes x kv_heads x block_tokens x head_dim` elements (keys first, then values).

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Element type of cached keys and values, and of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

/// Which stride is the larger: from block to block, or from layer to layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayoutOrder {
    /// `[block][layer][plane][head][token][dim]`: one block is one contiguous run.
    BlockFirst,
    /// `[layer][block][plane][head][token][dim]`: one layer of all blocks is one contiguous run.
    LayerFirst,
}

/// What a group of layers attends to; decides which blocks a request still needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttentionKind {
    /// Every earlier token.
    Full,
    /// The last `window` tokens, the current one included.
    SlidingWindow {
        /// Tokens seen.
        window: u32,
    },
    /// Multi-head latent attention: one compressed plane instead of keys and values.
    Latent,
}

/// Layers that share an attention kind.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AttentionGroup {
    /// What the layers attend to.
    pub kind: AttentionKind,
    /// The layers, ascending.
    pub layers: Vec<u32>,
}

/// Shape of a KV pool. Two workers can exchange blocks when their layouts are equal except for
/// `order`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct KvLayout {
    /// Transformer layers.
    pub layers: u32,
    /// Key/value heads per layer held by this worker.
    pub kv_heads: u32,
    /// Elements per head.
    pub head_dim: u32,
    /// 2 for separate keys and values, 1 for a latent plane.
    pub planes: u32,
    /// Tokens per block.
    pub block_tokens: u32,
    /// Element type.
    pub dtype: DType,
    /// Order of the two outer dimensions.
    pub order: LayoutOrder,
    /// Attention groups; together they name every layer once.
    pub groups: Vec<AttentionGroup>,
}

/// Why a [`KvLayout`] is not valid.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LayoutError {
    /// A dimension is zero.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// `planes` is neither 1 nor 2.
    #[error("planes is {0}; accepted: 1 (latent) or 2 (keys and values)")]
    Planes(u32),
    /// The groups do not name every layer exactly once.
    #[error("attention groups must name each of the {layers} layers once; layer {layer} does not")]
    Groups {
        /// Layers of the layout.
        layers: u32,
        /// The first layer named twice, never, or out of range.
        layer: u32,
    },
    /// The sizes overflow 64 bits.
    #[error("a pool of this shape does not fit a 64-bit address space")]
    TooLarge,
}

impl DType {
    /// Bytes of one element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

impl KvLayout {
    /// A block-first layout with keys and values and full attention on all layers.
    #[must_use]
    pub fn dense(
        layers: u32,
        kv_heads: u32,
        head_dim: u32,
        block_tokens: u32,
        dtype: DType,
    ) -> Self {
        let all = (0..layers).collect();
        Self {
            layers,
            kv_heads,
            head_dim,
            planes: 2,
            block_tokens,
            dtype,
            order: LayoutOrder::BlockFirst,
            groups: vec![AttentionGroup {
                kind: AttentionKind::Full,
                layers: all,
            }],
        }
    }

    /// Checks every dimension and the groups, and that `blocks` of them can be addressed.
    ///
    /// # Errors
    /// A [`LayoutError`] that names the first fault.
    pub fn validate(&self, blocks: u32) -> Result<(), LayoutError> {
        for (name, value) in [
            ("layers", self.layers),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("block_tokens", self.block_tokens),
        ] {
            if value == 0 {
                return Err(LayoutError::Zero(name));
            }
        }
        if !(1..=2).contains(&self.planes) {
            return Err(LayoutError::Planes(self.planes));
        }
        self.checked_pool_bytes(blocks)
            .ok_or(LayoutError::TooLarge)?;
        let mut named: Vec<u32> = self.groups.iter().flat_map(|g| g.layers.clone()).collect();
        named.sort_unstable();
        for layer in 0..self
            .layers
            .max(u32::try_from(named.len()).unwrap_or(u32::MAX))
        {
            if layer >= self.layers || named.get(layer as usize) != Some(&layer) {
                return Err(LayoutError::Groups {
                    layers: self.layers,
                    layer,
                });
            }
        }
        Ok(())
    }

    /// Bytes of one plane of one layer of one block (all heads and tokens).
    #[must_use]
    pub const fn plane_bytes(&self) -> usize {
        self.kv_heads as usize
            * self.block_tokens as usize
            * self.head_dim as usize
            * self.dtype.bytes()
    }

    /// Bytes of one layer of one block: the contiguous run that a transfer moves at least.
    #[must_use]
    pub const fn layer_bytes(&self) -> usize {
        self.planes as usize * self.plane_bytes()
    }

    /// Bytes of one block over all layers.
    #[must_use]
    pub const fn block_bytes(&self) -> usize {
        self.layers as usize * self.layer_bytes()
    }

    /// Bytes from a block to the next one of the same layer.
    #[must_use]
    pub const fn block_stride(&self) -> usize {
        match self.order {
            LayoutOrder::BlockFirst => self.block_bytes(),
            LayoutOrder::LayerFirst => self.layer_bytes(),
        }
    }

    /// Bytes from a layer to the next one of the same block, in a pool of `blocks` blocks.
    #[must_use]
    pub const fn layer_stride(&self, blocks: u32) -> usize {
        match self.order {
            LayoutOrder::BlockFirst => self.layer_bytes(),
            LayoutOrder::LayerFirst => self.layer_bytes() * blocks as usize,
        }
    }

    /// Bytes of a pool of `blocks` blocks.
    #[must_use]
    pub const fn pool_bytes(&self, blocks: u32) -> usize {
        self.block_bytes() * blocks as usize
    }

    /// Whether blocks of the two pools hold the same data in the same inner order.
    #[must_use]
    pub fn exchangeable_with(&self, other: &Self) -> bool {
        Self {
            order: other.order,
            ..self.clone()
        } == *other
    }

    fn checked_pool_bytes(&self, blocks: u32) -> Option<u64> {
        [
            self.planes,
            self.kv_heads,
            self.block_tokens,
            self.head_dim,
            self.layers,
            blocks,
        ]
        .into_iter()
        .try_fold(self.dtype.bytes() as u64, |bytes, n| {
            bytes.checked_mul(u64::from(n))
        })
        .filter(|&bytes| isize::try_from(bytes).is_ok())
    }
}

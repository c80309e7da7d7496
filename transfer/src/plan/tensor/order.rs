//! The axes of a KV cache, and the orders in which they lie.

use std::fmt;

use crate::plan::LayoutError;

/// An axis of a KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvAxis {
    /// Blocks (pages) of the cache.
    Blocks,
    /// Layers of the model.
    Layers,
    /// Keys and values: 2, or 1 for a latent cache (MLA).
    Planes,
    /// Tokens of a block.
    Tokens,
    /// Key/value heads held by this worker.
    Heads,
}

impl KvAxis {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Blocks,
        Self::Layers,
        Self::Planes,
        Self::Tokens,
        Self::Heads,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Blocks => "blocks",
            Self::Layers => "layers",
            Self::Planes => "planes",
            Self::Tokens => "tokens",
            Self::Heads => "heads",
        }
    }
}

impl fmt::Display for KvAxis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How many there are along an axis, and how far apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Axis {
    /// How many, at least 1.
    pub count: u32,
    /// Bytes from one to the next. Means nothing where `count` is 1.
    pub stride: u64,
}

/// The sizes of a KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvShape {
    /// Blocks.
    pub blocks: u32,
    /// Layers.
    pub layers: u32,
    /// 2 for keys and values, 1 for a latent cache (MLA).
    pub planes: u32,
    /// Tokens of a block.
    pub tokens: u32,
    /// Key/value heads held by this worker; 1 for a latent cache.
    pub heads: u32,
    /// Bytes of one head of one token: head size times bytes of an element.
    pub head_bytes: u64,
}

impl KvShape {
    pub(crate) const fn count(&self, axis: KvAxis) -> u32 {
        match axis {
            KvAxis::Blocks => self.blocks,
            KvAxis::Layers => self.layers,
            KvAxis::Planes => self.planes,
            KvAxis::Tokens => self.tokens,
            KvAxis::Heads => self.heads,
        }
    }
}

/// The axes of a dense array from the outermost to the innermost; the bytes of one head of one
/// token follow behind the last.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KvOrder([KvAxis; 5]);

impl KvOrder {
    /// `[layer][plane][block][token][head]`: for each layer one tensor of the shape `(2, blocks,
    /// tokens, heads, head size)`, keys and values apart.
    pub const LAYER_FIRST_NHD: Self = Self([
        KvAxis::Layers,
        KvAxis::Planes,
        KvAxis::Blocks,
        KvAxis::Tokens,
        KvAxis::Heads,
    ]);
    /// `[layer][plane][block][head][token]`.
    pub const LAYER_FIRST_HND: Self = Self([
        KvAxis::Layers,
        KvAxis::Planes,
        KvAxis::Blocks,
        KvAxis::Heads,
        KvAxis::Tokens,
    ]);
    /// `[layer][block][plane][token][head]`: for each layer one tensor of the shape `(blocks, 2,
    /// tokens, heads, head size)`, keys and values of a block together.
    pub const LAYER_FIRST_PAIRED_NHD: Self = Self([
        KvAxis::Layers,
        KvAxis::Blocks,
        KvAxis::Planes,
        KvAxis::Tokens,
        KvAxis::Heads,
    ]);
    /// `[layer][block][plane][head][token]`.
    pub const LAYER_FIRST_PAIRED_HND: Self = Self([
        KvAxis::Layers,
        KvAxis::Blocks,
        KvAxis::Planes,
        KvAxis::Heads,
        KvAxis::Tokens,
    ]);
    /// `[block][layer][plane][token][head]`: all layers of a block together.
    pub const BLOCK_FIRST_NHD: Self = Self([
        KvAxis::Blocks,
        KvAxis::Layers,
        KvAxis::Planes,
        KvAxis::Tokens,
        KvAxis::Heads,
    ]);
    /// `[block][layer][plane][head][token]`.
    pub const BLOCK_FIRST_HND: Self = Self([
        KvAxis::Blocks,
        KvAxis::Layers,
        KvAxis::Planes,
        KvAxis::Heads,
        KvAxis::Tokens,
    ]);

    /// Any order, outermost first.
    ///
    /// # Errors
    /// An axis is named twice.
    pub fn new(axes: [KvAxis; 5]) -> Result<Self, LayoutError> {
        for (at, axis) in axes.iter().enumerate() {
            if axes[..at].contains(axis) {
                return Err(LayoutError::AxisTwice { axis: *axis });
            }
        }
        Ok(Self(axes))
    }

    /// The axes, outermost first.
    #[must_use]
    pub const fn axes(&self) -> &[KvAxis; 5] {
        &self.0
    }
}

impl fmt::Debug for KvOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for axis in &self.0 {
            write!(f, "[{axis}]")?;
        }
        Ok(())
    }
}

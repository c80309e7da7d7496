//! Which part of each block an operation moves.

use std::ops::Range;

use super::order::KvAxis;

/// A part of every block: a range along each axis, or all of it.
///
/// ```
/// use blockplane_transfer::KvSlice;
///
/// // The second half of the heads of layers 0 to 11.
/// let slice = KvSlice::ALL.heads(4..8).layers(0..12);
/// assert_eq!(slice.heads, Some(4..8));
/// assert_eq!(slice.tokens, None);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct KvSlice {
    /// Layers; `None` is all of them.
    pub layers: Option<Range<u32>>,
    /// Planes (keys are plane 0, values plane 1); `None` is all of them.
    pub planes: Option<Range<u32>>,
    /// Tokens; `None` is all of them.
    pub tokens: Option<Range<u32>>,
    /// Heads; `None` is all of them.
    pub heads: Option<Range<u32>>,
}

impl KvSlice {
    /// Whole blocks.
    pub const ALL: Self = Self {
        layers: None,
        planes: None,
        tokens: None,
        heads: None,
    };

    /// The same with these layers only.
    #[must_use]
    pub fn layers(mut self, range: Range<u32>) -> Self {
        self.layers = Some(range);
        self
    }

    /// The same with these planes only.
    #[must_use]
    pub fn planes(mut self, range: Range<u32>) -> Self {
        self.planes = Some(range);
        self
    }

    /// The same with these tokens of each block only.
    #[must_use]
    pub fn tokens(mut self, range: Range<u32>) -> Self {
        self.tokens = Some(range);
        self
    }

    /// The same with these heads only.
    #[must_use]
    pub fn heads(mut self, range: Range<u32>) -> Self {
        self.heads = Some(range);
        self
    }

    /// The range along an axis of `count`; blocks are chosen by their ids.
    pub(super) fn range(&self, axis: KvAxis, count: u32) -> Range<u32> {
        let range = match axis {
            KvAxis::Blocks => &None,
            KvAxis::Layers => &self.layers,
            KvAxis::Planes => &self.planes,
            KvAxis::Tokens => &self.tokens,
            KvAxis::Heads => &self.heads,
        };
        range.clone().unwrap_or(0..count)
    }
}

//! Block ids: a run of consecutive ids stays two numbers from the caller to the wire.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Block ids in the order in which they pair up.
///
/// Made from a range (nothing is written out), or from a list: `[2, 5].into()`, `(0..512).into()`,
/// or an `Arc<[u32]>` (shared, not copied). A list of consecutive ids is recognised and kept as a
/// range.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct BlockIds(Repr);

/// Consecutive ids are always a `Span`, so that equal sequences are equal values.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Repr {
    /// `first, first + 1, ...`; the last one fits 32 bits.
    Span {
        first: u32,
        count: u32,
    },
    List(Arc<[u32]>),
}

impl BlockIds {
    /// `count` ids from `first` on, or `None` when the last one does not fit 32 bits.
    #[must_use]
    pub const fn span(first: u32, count: u32) -> Option<Self> {
        match count {
            0 => Some(Self(Repr::Span { first: 0, count: 0 })),
            _ if first.checked_add(count - 1).is_none() => None,
            _ => Some(Self(Repr::Span { first, count })),
        }
    }

    /// Number of ids.
    #[must_use]
    pub fn len(&self) -> usize {
        match &self.0 {
            Repr::Span { count, .. } => *count as usize,
            Repr::List(ids) => ids.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The first id and the number of ids, if they are consecutive.
    #[must_use]
    pub const fn as_span(&self) -> Option<(u32, u32)> {
        match self.0 {
            Repr::Span { first, count } => Some((first, count)),
            Repr::List(_) => None,
        }
    }

    /// The ids one by one.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = u32> + '_ {
        let list = self.list();
        let first = self.as_span().map_or(0, |(first, _)| first);
        (0..self.len()).map(move |index| match list {
            // Below `count`, which is 32 bits wide.
            None => first + u32::try_from(index).unwrap_or(u32::MAX),
            Some(list) => list[index],
        })
    }

    /// The largest id.
    #[must_use]
    pub fn max(&self) -> Option<u32> {
        match &self.0 {
            Repr::Span { count: 0, .. } => None,
            Repr::Span { first, count } => Some(first + (count - 1)),
            Repr::List(ids) => Some(ids.iter().copied().fold(0, u32::max)),
        }
    }

    /// The ids as a slice, when they are not consecutive.
    pub(crate) fn list(&self) -> Option<&[u32]> {
        match &self.0 {
            Repr::Span { .. } => None,
            Repr::List(ids) => Some(ids),
        }
    }

    /// Some of them; the range is not beyond the length.
    pub(crate) fn part(&self, range: Range<usize>) -> Self {
        match &self.0 {
            Repr::Span { first, .. } => {
                let [start, end] =
                    [range.start, range.end].map(|at| u32::try_from(at).unwrap_or(u32::MAX));
                Self::span(first.wrapping_add(start), end.saturating_sub(start))
                    .unwrap_or(Self(Repr::Span { first: 0, count: 0 }))
            }
            Repr::List(ids) if range == (0..ids.len()) => self.clone(),
            Repr::List(ids) => ids.get(range).unwrap_or_default().into(),
        }
    }

    /// Id number `index`, which is below the length.
    #[inline]
    pub(crate) fn at(&self, index: usize) -> u32 {
        match &self.0 {
            Repr::Span { first, .. } => first.wrapping_add(u32::try_from(index).unwrap_or(0)),
            Repr::List(ids) => ids[index],
        }
    }
}

/// The first id of a list of consecutive ids.
fn consecutive(ids: &[u32]) -> Option<u32> {
    let (&first, rest) = ids.split_first()?;
    // Looks at a few before it looks at all: most lists that are not consecutive show it at once.
    let head = &rest[..rest.len().min(8)];
    let matches = |ids: &[u32], from: u32| {
        let steps = ids.iter().zip(0u32..);
        steps.fold(true, |all, (&id, step)| {
            all & (id.wrapping_sub(from) == step)
        })
    };
    let from = first.wrapping_add(1);
    // The last one does not wrap around if it is at least the first.
    (matches(head, from) && matches(rest, from) && ids.last() >= Some(&first)).then_some(first)
}

/// A span for ids that are consecutive, or empty.
fn spanned(ids: &[u32]) -> Option<BlockIds> {
    if ids.is_empty() {
        return BlockIds::span(0, 0);
    }
    let first = consecutive(ids)?;
    BlockIds::span(first, u32::try_from(ids.len()).ok()?)
}

impl From<Arc<[u32]>> for BlockIds {
    fn from(ids: Arc<[u32]>) -> Self {
        spanned(&ids).unwrap_or(Self(Repr::List(ids)))
    }
}

impl From<&[u32]> for BlockIds {
    fn from(ids: &[u32]) -> Self {
        spanned(ids).unwrap_or_else(|| Self(Repr::List(ids.into())))
    }
}

impl<const N: usize> From<[u32; N]> for BlockIds {
    fn from(ids: [u32; N]) -> Self {
        ids.as_slice().into()
    }
}

impl<const N: usize> From<&[u32; N]> for BlockIds {
    fn from(ids: &[u32; N]) -> Self {
        ids.as_slice().into()
    }
}

impl From<Vec<u32>> for BlockIds {
    fn from(ids: Vec<u32>) -> Self {
        ids.as_slice().into()
    }
}

impl From<Range<u32>> for BlockIds {
    fn from(ids: Range<u32>) -> Self {
        let count = ids.end.saturating_sub(ids.start);
        let first = if count == 0 { 0 } else { ids.start };
        Self(Repr::Span { first, count })
    }
}

impl FromIterator<u32> for BlockIds {
    fn from_iter<I: IntoIterator<Item = u32>>(ids: I) -> Self {
        ids.into_iter().collect::<Vec<_>>().into()
    }
}

impl fmt::Debug for BlockIds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Repr::Span { first, count } => write!(f, "{first}..+{count}"),
            Repr::List(ids) => ids.fmt(f),
        }
    }
}

/// In how many places both the next id here is `step_a` further and the next id there `step_b`.
/// Both have the same length, at most 2^32 - 1.
pub(super) fn joins(a: &BlockIds, step_a: u32, b: &BlockIds, step_b: u32) -> u64 {
    let gaps = a.len().min(b.len()).saturating_sub(1);
    match (a.list(), b.list()) {
        (None, None) if step_a == 1 && step_b == 1 => gaps as u64,
        (None, Some(list)) if step_a == 1 => joins_in(list, step_b),
        (Some(list), None) if step_b == 1 => joins_in(list, step_a),
        (None, _) | (_, None) => 0,
        (Some(a), Some(b)) => {
            let (a0, a1) = (&a[..gaps], &a[1..=gaps]);
            let (b0, b1) = (&b[..gaps], &b[1..=gaps]);
            let mut count = 0u32;
            for i in 0..gaps {
                let here = a1[i].wrapping_sub(a0[i]) == step_a;
                let there = b1[i].wrapping_sub(b0[i]) == step_b;
                count += u32::from(here & there);
            }
            u64::from(count)
        }
    }
}

/// In how many places the next id is `step` further.
pub(crate) fn joins_in(ids: &[u32], step: u32) -> u64 {
    let gaps = ids.len().saturating_sub(1);
    let (now, next) = (&ids[..gaps], &ids[ids.len() - gaps..]);
    let joined = now
        .iter()
        .zip(next)
        .map(|(now, next)| u32::from(next.wrapping_sub(*now) == step));
    u64::from(joined.sum::<u32>())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn consecutive_ids_are_two_numbers_however_they_come() {
        let range = BlockIds::from(5..905);
        let list: Vec<u32> = (5..905).collect();
        assert_eq!(range, BlockIds::from(list.as_slice()));
        assert_eq!(range, BlockIds::from(Arc::from(list)));
        assert_eq!(range.as_span(), Some((5, 900)));
        assert_eq!(BlockIds::from([7]).as_span(), Some((7, 1)));
        assert_eq!(BlockIds::from([0u32; 0]), BlockIds::from(9..9));
        assert_eq!(BlockIds::from([u32::MAX, 0]).as_span(), None);
        assert_eq!(BlockIds::span(u32::MAX, 2), None);
        let last = BlockIds::span(u32::MAX - 1, 2).unwrap();
        assert_eq!(last.iter().collect::<Vec<_>>(), [u32::MAX - 1, u32::MAX]);
        assert_eq!(last, BlockIds::from([u32::MAX - 1, u32::MAX]));
        assert_eq!(last.max(), Some(u32::MAX));
    }

    proptest! {
        #[test]
        fn ids_are_what_went_in(
            ids in proptest::collection::vec(0u32..5, 0..40),
            other in proptest::collection::vec(0u32..5, 40),
            step_a in 0u32..3,
            step_b in 0u32..3,
        ) {
            let a = BlockIds::from(ids.as_slice());
            prop_assert!(a.iter().eq(ids.iter().copied()));
            prop_assert_eq!(a.len(), ids.len());
            prop_assert_eq!(a.max(), ids.iter().copied().max());
            for (index, id) in ids.iter().enumerate() {
                prop_assert_eq!(a.at(index), *id);
            }
            let b = BlockIds::from(&other[..ids.len()]);
            let expected = ids
                .windows(2)
                .zip(other.windows(2))
                .filter(|(x, y)| {
                    x[0].checked_add(step_a) == Some(x[1]) && y[0].checked_add(step_b) == Some(y[1])
                })
                .count();
            prop_assert_eq!(joins(&a, step_a, &b, step_b), expected as u64);
        }
    }
}

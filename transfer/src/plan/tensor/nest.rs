//! Nests of loops over `N` sides, and how they become shallower.

/// One loop: how often, and how far each side goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Loop<const N: usize> {
    pub(crate) count: u64,
    pub(crate) strides: [u64; N],
}

/// Orders loops by the stride of the last side, outermost first, and joins what is contiguous on
/// all sides, up to 32 bits of turns. Returns the length of a run, which was `run` before. Loops of
/// one turn disappear.
pub(super) fn simplify<const N: usize>(loops: &mut Vec<Loop<N>>, mut run: u64) -> u64 {
    loops.retain(|one| one.count > 1);
    loops.sort_by(|a, b| b.strides.iter().rev().cmp(a.strides.iter().rev()));
    while let Some(inner) = loops.pop_if(|inner| inner.strides == [run; N]) {
        run *= inner.count;
    }
    let mut at = loops.len();
    while at > 1 {
        at -= 1;
        let (outer, inner) = (loops[at - 1], loops[at]);
        let joins =
            |side: usize| Some(outer.strides[side]) == inner.strides[side].checked_mul(inner.count);
        let fits = u32::try_from(outer.count.saturating_mul(inner.count)).is_ok();
        if fits && (0..N).all(joins) {
            loops[at].count *= outer.count;
            loops.remove(at - 1);
        }
    }
    run
}

/// Calls `f` with the offsets of every turn of the nest, the innermost loop fastest, until it says
/// no. Returns whether it never did.
pub(super) fn every_turn<const N: usize>(
    loops: &[Loop<N>],
    at: [u64; N],
    f: &mut impl FnMut([u64; N]) -> bool,
) -> bool {
    let Some((outer, inner)) = loops.split_first() else {
        return f(at);
    };
    let mut at = at;
    for _ in 0..outer.count {
        if !every_turn(inner, at, f) {
            return false;
        }
        for (offset, stride) in at.iter_mut().zip(outer.strides) {
            *offset = offset.wrapping_add(stride);
        }
    }
    true
}

/// Turns of the whole nest.
pub(super) fn turns<const N: usize>(loops: &[Loop<N>]) -> u64 {
    loops
        .iter()
        .fold(1, |turns, one| turns.saturating_mul(one.count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_contiguous_on_all_sides_becomes_one() {
        let nest = |loops: &[(u64, [u64; 2])], run| {
            let mut loops: Vec<_> = loops
                .iter()
                .map(|&(count, strides)| Loop { count, strides })
                .collect();
            let run = simplify(&mut loops, run);
            let loops: Vec<_> = loops.iter().map(|one| (one.count, one.strides)).collect();
            (loops, run)
        };
        // Dense on both sides.
        assert_eq!(nest(&[(4, [30, 30]), (3, [10, 10])], 10), (vec![], 120));
        // Apart on one side only: neither joins the run.
        assert_eq!(
            nest(&[(4, [30, 10]), (3, [10, 40])], 10),
            (vec![(3, [10, 40]), (4, [30, 10])], 10)
        );
        // Two loops that go on alike are one.
        assert_eq!(
            nest(&[(2, [300, 600]), (3, [100, 200]), (1, [7, 7])], 10),
            (vec![(6, [100, 200])], 10)
        );
    }
}

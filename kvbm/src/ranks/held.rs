//! What a rank has in its G2. The leader's books outlive a rank that dies; the memory of the rank does
//! not. So each rank notes what came into its G2, and gives nothing else away.

use std::collections::HashMap;

use blockplane_protocol::SequenceHash;
use parking_lot::Mutex;

use crate::tier::{BlockOutcome, Invalid, MoveKind, MoveReport, MoveSpec, Mover};

/// Names by the id of the block that holds them.
#[derive(Default)]
pub(super) struct Held(Mutex<HashMap<u32, SequenceHash>>);

impl Held {
    /// Does a move with `mover`. Blocks that shall leave G2 and did not come into it in this life of the
    /// rank under their name are [`Invalid::Missing`]; only the others are copied.
    pub(super) fn run(&self, mover: &dyn Mover, spec: &MoveSpec) -> MoveReport {
        match spec.kind {
            MoveKind::DeviceToHost | MoveKind::DiskToHost | MoveKind::RemoteToHost => {
                self.fill(mover, spec)
            }
            MoveKind::HostToDevice | MoveKind::HostToDisk | MoveKind::HostToRemote => {
                self.give(mover, spec)
            }
        }
    }

    fn fill(&self, mover: &dyn Mover, spec: &MoveSpec) -> MoveReport {
        {
            let mut held = self.0.lock();
            for block in &spec.blocks {
                held.remove(&block.to);
            }
        }
        let report = mover.run(spec);
        let mut held = self.0.lock();
        for (block, outcome) in spec.blocks.iter().zip(&report.outcomes) {
            if *outcome == BlockOutcome::Moved {
                held.insert(block.to, block.name.sequence);
            }
        }
        report
    }

    fn give(&self, mover: &dyn Mover, spec: &MoveSpec) -> MoveReport {
        let has: Vec<bool> = {
            let held = self.0.lock();
            let blocks = spec.blocks.iter();
            blocks
                .map(|block| held.get(&block.from) == Some(&block.name.sequence))
                .collect()
        };
        if has.iter().all(|has| *has) {
            return mover.run(spec);
        }
        let mut rest = spec.clone();
        let mut keep = has.iter();
        rest.blocks.retain(|_| keep.next() == Some(&true));
        let mut report = if rest.blocks.is_empty() {
            MoveReport::moved(0, 0)
        } else {
            mover.run(&rest)
        };
        let mut outcomes = std::mem::take(&mut report.outcomes).into_iter();
        report.outcomes = has
            .into_iter()
            .map(|has| {
                if has {
                    let none = || BlockOutcome::Failed("the mover did not say".to_owned());
                    outcomes.next().unwrap_or_else(none)
                } else {
                    BlockOutcome::Invalid(Invalid::Missing)
                }
            })
            .collect();
        report
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use blockplane_protocol::{DpRank, SaltHash, TokenSequence};

    use super::*;
    use crate::tier::{MoveId, MovedBlock};

    /// Moves everything but blocks into id 13; remembers how many it was asked for.
    #[derive(Default)]
    struct Counting(Mutex<Vec<usize>>);

    impl Mover for Counting {
        fn run(&self, spec: &MoveSpec) -> MoveReport {
            self.0.lock().push(spec.blocks.len());
            let mut report = MoveReport::moved(spec.blocks.len(), 0);
            for (outcome, block) in report.outcomes.iter_mut().zip(&spec.blocks) {
                if block.to == 13 {
                    *outcome = BlockOutcome::Failed("unlucky".to_owned());
                }
            }
            report
        }
    }

    fn spec(kind: MoveKind, ids: &[(u32, u32)]) -> MoveSpec {
        let tokens: Vec<u32> = (0..16).collect();
        let names = TokenSequence::from_tokens(&tokens, 4, SaltHash::default());
        let blocks = ids.iter().zip(names.blocks());
        MoveSpec {
            id: MoveId(0),
            kind,
            rank: DpRank(0),
            blocks: blocks
                .map(|(&(from, to), &name)| MovedBlock {
                    from,
                    to,
                    name,
                    parent: None,
                })
                .collect(),
            time: Duration::from_secs(1),
        }
    }

    #[test]
    fn only_what_came_in_goes_out() {
        let (held, mover) = (Held::default(), Counting::default());
        let missing = BlockOutcome::Invalid(Invalid::Missing);
        let out = |ids: &[(u32, u32)]| held.run(&mover, &spec(MoveKind::HostToDisk, ids)).outcomes;
        assert_eq!(out(&[(1, 0), (2, 1)]), [missing.clone(), missing.clone()]);
        assert!(mover.0.lock().is_empty(), "nothing was copied");

        let into = |ids: &[(u32, u32)]| held.run(&mover, &spec(MoveKind::DeviceToHost, ids));
        into(&[(0, 1), (1, 13), (2, 3)]);
        let (moved, failed) = (BlockOutcome::Moved, missing);
        assert_eq!(
            out(&[(1, 0), (13, 1), (3, 13)]),
            [
                moved.clone(),
                failed.clone(),
                BlockOutcome::Failed("unlucky".to_owned())
            ]
        );
        assert_eq!(mover.0.lock().last(), Some(&2), "the others are copied");
        // Another name is in the block now.
        into(&[(0, 3)]);
        assert_eq!(
            out(&[(1, 0), (2, 1), (3, 2)]),
            [moved, failed.clone(), failed]
        );
    }
}

//! Peers and objects as one remote tier.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use blockplane_protocol::SequenceHash;

use super::{ObjectTier, PeerTier};
use crate::tier::{BlockOutcome, MoveKind, MoveReport, MoveSpec, MovedBlock, Mover, RemoteIndex};

/// G4 of two kinds: blocks are read from peers that have them, and else from an object store. Only
/// the object store is written to.
#[derive(Debug)]
pub struct Remotes {
    peers: Arc<PeerTier>,
    objects: Arc<ObjectTier>,
}

impl Remotes {
    /// Joins the two. Both move blocks of the same G2.
    #[must_use]
    pub fn new(peers: Arc<PeerTier>, objects: Arc<ObjectTier>) -> Self {
        Self { peers, objects }
    }

    fn read(&self, spec: &MoveSpec) -> MoveReport {
        let until = Instant::now() + spec.time;
        let stored = |block: &MovedBlock| self.objects.contains(block.name.sequence);
        // Peers must not take the time that the objects need.
        let share = if spec.blocks.iter().any(stored) { 2 } else { 1 };
        let first = MoveSpec {
            time: spec.time / share,
            ..spec.clone()
        };
        let mut report = self.peers.run(&first);
        let left: Duration = until.saturating_duration_since(Instant::now());
        let moving = report.pending.is_some();
        let again = |outcome: &BlockOutcome| match outcome {
            BlockOutcome::Moved => false,
            BlockOutcome::Invalid(_) => true,
            // Its bytes may still land.
            BlockOutcome::Failed(_) | BlockOutcome::Bad(_) => !moving,
        };
        let places: Vec<usize> = (0..spec.blocks.len())
            .filter(|at| report.outcomes.get(*at).is_none_or(again) && stored(&spec.blocks[*at]))
            .collect();
        if places.is_empty() || left.is_zero() {
            return report;
        }
        let rest = MoveSpec {
            blocks: places.iter().map(|at| spec.blocks[*at]).collect(),
            time: left,
            ..spec.clone()
        };
        // An object tier leaves nothing pending: its bytes pass through memory of its own.
        let second = self.objects.run(&rest);
        for (at, outcome) in places.iter().zip(second.outcomes) {
            if let Some(slot) = report.outcomes.get_mut(*at) {
                *slot = outcome;
            }
        }
        report.bytes += second.bytes;
        report.fault = report.fault.or(second.fault);
        report
    }
}

impl Mover for Remotes {
    fn run(&self, spec: &MoveSpec) -> MoveReport {
        match spec.kind {
            MoveKind::RemoteToHost => self.read(spec),
            _ => self.objects.run(spec),
        }
    }
}

impl RemoteIndex for Remotes {
    fn contains(&self, name: SequenceHash) -> bool {
        self.peers.contains(name) || self.objects.contains(name)
    }

    fn keeps(&self, name: SequenceHash) -> bool {
        self.objects.keeps(name)
    }

    fn len(&self) -> usize {
        self.peers.len() + self.objects.len()
    }
}

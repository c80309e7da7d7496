//! Moves under way, and what happens where they land.

use std::{sync::Arc, time::Duration};

use blockplane_protocol::{BlockId, DpRank, Tier};

use super::{
    moves::{BlockOutcome, MoveKind, MovedBlock},
    onboard::NotLoaded,
    stats::{Dropped, Evicted},
    tiers::Tiers,
};
use crate::{
    block::{CompleteBlock, ImmutableBlock, MutableBlock, Quarantine},
    pool::BlockPool,
};

/// A move under way: it holds what is copied and what is copied to.
pub(super) struct Flight {
    pub(super) kind: MoveKind,
    pub(super) rank: DpRank,
    pub(super) started: Duration,
    pub(super) time: Duration,
    pub(super) blocks: Vec<MovedBlock>,
    pub(super) job: Job,
}

pub(super) enum Job {
    Offload {
        rank: usize,
        priority: u32,
        sources: Vec<ImmutableBlock>,
        targets: Vec<MutableBlock>,
    },
    /// Into targets that the onboard's owner holds.
    Load {
        onboard: u64,
        at: Vec<u32>,
        sources: Vec<Source>,
    },
    Read {
        reads: Vec<u64>,
        /// Empty when it is from G4.
        sources: Vec<ImmutableBlock>,
        targets: Vec<MutableBlock>,
    },
    Write {
        sources: Vec<ImmutableBlock>,
        /// Empty when it is to G4.
        targets: Vec<MutableBlock>,
        /// The sources leave G2 when they are written.
        demote: bool,
    },
}

/// A block of host memory to copy into G1.
#[derive(Clone)]
pub(super) enum Source {
    Shared(ImmutableBlock),
    /// Not registered: it is free when all who wait for it have it.
    Bounce(Arc<CompleteBlock>),
}

/// What a move that is not quiet keeps out of use.
pub(super) struct Parked {
    pub(super) tier: Tier,
    rank: Option<usize>,
    load: Option<(u64, Vec<u32>)>,
    sources: Vec<ImmutableBlock>,
    bounces: Vec<Source>,
    targets: Option<Quarantine>,
}

impl Source {
    pub(super) fn id(&self) -> BlockId {
        match self {
            Self::Shared(block) => block.id(),
            Self::Bounce(block) => block.id(),
        }
    }
}

impl Tiers {
    /// Takes blocks that arrived into the books, and lets go of the others; unless bytes may still
    /// move, then what they concern is returned.
    pub(super) fn land(
        &mut self,
        now: Duration,
        flight: Flight,
        outcomes: &[BlockOutcome],
        quiet: bool,
    ) -> Option<Parked> {
        let tier = flight.kind.tier();
        let mut parked = Parked {
            tier,
            rank: None,
            load: None,
            sources: Vec::new(),
            bounces: Vec::new(),
            targets: None,
        };
        match flight.job {
            Job::Offload {
                rank,
                priority,
                sources,
                targets,
            } => {
                let (complete, rest) = sort(&flight.blocks, targets, outcomes);
                self.dropped(Dropped::Failed, rest.len());
                self.stored(now, rank, priority, BlockPool::register(complete));
                if quiet {
                    self.ranks[rank].held -= sources.len();
                } else {
                    parked.rank = Some(rank);
                    parked.sources = sources;
                    parked.targets = Some(self.host.quarantine(rest));
                }
            }
            Job::Load {
                onboard,
                at,
                sources,
            } => {
                for (at, outcome) in at.iter().zip(outcomes) {
                    if *outcome == BlockOutcome::Moved {
                        self.block_loaded(onboard, *at);
                    } else {
                        self.block_failed(onboard, *at, NotLoaded::Failed);
                    }
                }
                if quiet {
                    self.copies_ended(now, onboard, at.len());
                } else {
                    parked.load = Some((onboard, at));
                    parked.bounces = sources;
                }
            }
            Job::Read {
                reads,
                sources,
                targets,
            } => {
                for (i, outcome) in outcomes.iter().enumerate() {
                    if let BlockOutcome::Invalid(_) | BlockOutcome::Bad(_) = outcome
                        && let Some(disk) = self.disk.as_ref().filter(|_| tier == Tier::Disk)
                    {
                        disk.pool.forget(flight.blocks[i].name.sequence);
                    }
                }
                let rest = self.read_ended(now, &flight.blocks, &reads, targets, outcomes);
                if quiet {
                    drop(rest);
                    self.set_aside(sources, outcomes);
                } else {
                    parked.sources = sources;
                    parked.targets = Some(self.host.quarantine(rest));
                }
            }
            Job::Write {
                sources,
                targets,
                demote,
            } => {
                let moved = |outcome: &&BlockOutcome| **outcome == BlockOutcome::Moved;
                let written = outcomes.iter().filter(moved).count();
                self.dropped(Dropped::Failed, outcomes.len() - written);
                if tier == Tier::Disk {
                    self.stats.disk_bytes_written += written as u64 * self.block_bytes;
                    let (complete, rest) = sort(&flight.blocks, targets, outcomes);
                    drop(BlockPool::register(complete));
                    if quiet {
                        self.retire_bad(rest, outcomes);
                    } else if let Some(disk) = &self.disk {
                        parked.targets = Some(disk.pool.quarantine(rest));
                    }
                }
                if !quiet {
                    parked.sources = sources;
                } else if demote {
                    for (source, outcome) in sources.into_iter().zip(outcomes) {
                        if *outcome == BlockOutcome::Moved {
                            source.forget_unshared();
                        }
                    }
                    self.host_evicted(Evicted::Demoted, written);
                }
            }
        }
        (!quiet).then_some(parked)
    }

    /// Lets go of what was kept out of use.
    pub(super) fn unpark(&mut self, now: Duration, parked: Parked) {
        if let Some(rank) = parked.rank {
            self.ranks[rank].held -= parked.sources.len();
        }
        if let Some((onboard, at)) = parked.load {
            drop(parked.bounces);
            self.copies_ended(now, onboard, at.len());
        }
    }

    /// Slots whose contents were wrong are not written again in this run, as far as that leaves
    /// enough of them; those that cannot be read are never used again.
    fn set_aside(&mut self, sources: Vec<ImmutableBlock>, outcomes: &[BlockOutcome]) {
        let Some(disk) = &mut self.disk else {
            return;
        };
        let mut lost = 0;
        for (source, outcome) in sources.into_iter().zip(outcomes) {
            match outcome {
                BlockOutcome::Invalid(_) => disk.set_aside(source),
                BlockOutcome::Bad(_) => {
                    source.retire();
                    lost += 1;
                }
                BlockOutcome::Moved | BlockOutcome::Failed(_) => {}
            }
        }
        self.lost_slots(lost);
    }

    /// Takes the targets that can never be written out of use.
    fn retire_bad(&mut self, rest: Vec<MutableBlock>, outcomes: &[BlockOutcome]) {
        let failed = outcomes.iter().filter(|o| **o != BlockOutcome::Moved);
        let mut lost = 0;
        for (target, outcome) in rest.into_iter().zip(failed) {
            if let BlockOutcome::Bad(_) = outcome {
                target.retire();
                lost += 1;
            }
        }
        self.lost_slots(lost);
    }

    fn lost_slots(&mut self, slots: usize) {
        self.stats.disk_bad_blocks += slots as u64;
        let Some(disk) = &mut self.disk else {
            return;
        };
        let first = (0..slots).fold(false, |first, _| disk.health.lost_block() || first);
        if first {
            self.state_changed(Tier::Disk);
        }
    }
}

/// Completes the targets that were filled; the others are returned.
pub(super) fn sort(
    blocks: &[MovedBlock],
    targets: Vec<MutableBlock>,
    outcomes: &[BlockOutcome],
) -> (Vec<CompleteBlock>, Vec<MutableBlock>) {
    let mut complete = Vec::with_capacity(targets.len());
    let mut rest = Vec::new();
    for ((block, target), outcome) in blocks.iter().zip(targets).zip(outcomes) {
        if *outcome == BlockOutcome::Moved {
            complete.push(target.complete(block.name, block.parent));
        } else {
            rest.push(target);
        }
    }
    (complete, rest)
}

//! Moves under way, and what happens where they land.

use std::{sync::Arc, time::Duration};

use blockplane_protocol::{BlockId, DpRank, SequenceHash, Tier, TokenBlock};

use super::{
    moves::{BlockOutcome, MoveKind},
    onboard::NotLoaded,
    stats::{Dropped, Evicted},
    tiers::Tiers,
};
use crate::block::{CompleteBlock, HeldBlocks, ImmutableBlock, LeasedBlocks, Quarantine};

/// A move under way: it holds what is copied and what is copied to.
pub(super) struct Flight {
    pub(super) kind: MoveKind,
    pub(super) rank: DpRank,
    pub(super) started: Duration,
    pub(super) time: Duration,
    /// Blocks that are moved.
    pub(super) count: usize,
    pub(super) job: Job,
}

pub(super) enum Job {
    Offload {
        rank: usize,
        priority: u32,
        sources: HeldBlocks,
        targets: LeasedBlocks,
    },
    /// From blocks that another engine holds.
    Save {
        save: u64,
        rank: usize,
        priority: u32,
        /// The name of each, and that of its parent.
        names: Vec<(TokenBlock, Option<SequenceHash>)>,
        targets: LeasedBlocks,
    },
    /// Into targets that the onboard's owner holds.
    Load {
        onboard: u64,
        at: Vec<u32>,
        sources: Vec<Source>,
    },
    Read {
        reads: Vec<u64>,
        /// The name of each, and that of its parent.
        names: Vec<(TokenBlock, Option<SequenceHash>)>,
        /// `None` when it is from G4.
        sources: Option<HeldBlocks>,
        targets: LeasedBlocks,
    },
    Write {
        sources: HeldBlocks,
        /// `None` when it is to G4.
        targets: Option<LeasedBlocks>,
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
    save: Option<(u64, usize)>,
    sources: Option<HeldBlocks>,
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
            save: None,
            sources: None,
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
                let rest = self.offloaded(now, rank, priority, &sources, targets, outcomes);
                self.dropped(Dropped::Failed, rest.len());
                if quiet {
                    self.ranks[rank].held -= sources.len();
                } else {
                    parked.rank = Some(rank);
                    parked.sources = Some(sources);
                    parked.targets = Some(self.host.quarantine(rest.into_each()));
                }
            }
            Job::Save {
                save,
                rank,
                priority,
                names,
                targets,
            } => {
                let rest = self.save_landed(now, rank, priority, &names, targets, outcomes);
                let moved = names.len() - rest.len();
                self.dropped(Dropped::Failed, rest.len());
                self.saves.landed(save, moved, rest.len());
                if quiet {
                    drop(rest);
                    self.saves.quiet(save, names.len());
                } else {
                    parked.save = Some((save, names.len()));
                    parked.targets = Some(self.host.quarantine(rest.into_each()));
                }
            }
            Job::Load {
                onboard,
                at,
                sources,
            } => {
                for ((at, outcome), source) in at.iter().zip(outcomes).zip(&sources) {
                    match outcome {
                        BlockOutcome::Moved => self.block_loaded(onboard, *at),
                        BlockOutcome::Invalid(_) => {
                            if let Source::Shared(block) = source {
                                self.lost_in_host(block.hash());
                            }
                            self.block_failed(onboard, *at, NotLoaded::Invalid);
                        }
                        BlockOutcome::Failed(_) | BlockOutcome::Bad(_) => {
                            self.block_failed(onboard, *at, NotLoaded::Failed);
                        }
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
                names,
                sources,
                targets,
            } => {
                for (i, outcome) in outcomes.iter().enumerate() {
                    if let BlockOutcome::Invalid(_) | BlockOutcome::Bad(_) = outcome
                        && let Some(disk) = self.disk.as_ref().filter(|_| tier == Tier::Disk)
                    {
                        disk.pool.forget(names[i].0.sequence);
                    }
                }
                let rest = self.read_ended(now, &names, &reads, targets, outcomes);
                if quiet {
                    drop(rest);
                    self.set_aside(sources, outcomes);
                } else {
                    parked.sources = sources;
                    parked.targets = Some(self.host.quarantine(rest.into_each()));
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
                for (name, outcome) in sources.names().zip(outcomes) {
                    if let BlockOutcome::Invalid(_) = outcome {
                        self.lost_in_host(name.sequence);
                    }
                }
                if let Some(mut targets) = targets {
                    self.stats.disk_bytes_written += written as u64 * self.block_bytes;
                    targets.register_copies(&sources, |at| outcomes[at] == BlockOutcome::Moved);
                    if quiet {
                        self.retire_bad(targets, outcomes);
                    } else if let Some(disk) = &self.disk {
                        parked.targets = Some(disk.pool.quarantine(targets.into_each()));
                    }
                }
                if !quiet {
                    parked.sources = Some(sources);
                } else if demote {
                    for (source, outcome) in sources.into_each().into_iter().zip(outcomes) {
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

    /// G2 does not have what the books say: a rank that started anew lost it.
    fn lost_in_host(&self, name: SequenceHash) {
        self.host.forget(name);
    }

    /// Blocks came into G2, or what stands in for it, from G1. Returns the targets that were not
    /// filled.
    fn offloaded(
        &mut self,
        now: Duration,
        rank: usize,
        priority: u32,
        sources: &HeldBlocks,
        mut targets: LeasedBlocks,
        outcomes: &[BlockOutcome],
    ) -> LeasedBlocks {
        let moved = |at: usize| outcomes[at] == BlockOutcome::Moved;
        if self.listed {
            targets.register_copies(sources, moved);
            let names = sources.names().enumerate().filter(|(at, _)| moved(*at));
            let names: Vec<TokenBlock> = names.map(|(_, name)| name).collect();
            self.offer_stored(now, rank, priority, &names);
            return targets;
        }
        let (filled, rest) = targets.split(moved);
        let found = sources.found().iter().enumerate();
        let names = found.filter(|(at, _)| moved(*at));
        let names = names.map(|(_, found)| (found.hashes, found.parent));
        let blocks = filled.register(names).into_each();
        self.bounced(now, rank, priority, blocks);
        rest
    }

    /// Lets go of what was kept out of use.
    pub(super) fn unpark(&mut self, now: Duration, parked: Parked) {
        if let Some(rank) = parked.rank {
            self.ranks[rank].held -= parked.sources.as_ref().map_or(0, HeldBlocks::len);
        }
        if let Some((save, blocks)) = parked.save {
            self.saves.quiet(save, blocks);
        }
        if let Some((onboard, at)) = parked.load {
            drop(parked.bounces);
            self.copies_ended(now, onboard, at.len());
        }
    }

    /// Slots whose contents were wrong are not written again in this run, as far as that leaves
    /// enough of them; those that cannot be read are never used again.
    fn set_aside(&mut self, sources: Option<HeldBlocks>, outcomes: &[BlockOutcome]) {
        let wrong = |o: &BlockOutcome| matches!(o, BlockOutcome::Invalid(_) | BlockOutcome::Bad(_));
        let (Some(disk), Some(sources)) = (&mut self.disk, sources) else {
            return;
        };
        if !outcomes.iter().any(wrong) {
            return;
        }
        let mut lost = 0;
        for (source, outcome) in sources.into_each().into_iter().zip(outcomes) {
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
    fn retire_bad(&mut self, rest: LeasedBlocks, outcomes: &[BlockOutcome]) {
        if rest.is_empty() {
            return;
        }
        let failed = outcomes.iter().filter(|o| **o != BlockOutcome::Moved);
        let mut lost = 0;
        for (target, outcome) in rest.into_each().into_iter().zip(failed) {
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

impl Job {
    /// Whether a block of this name is on its way to another tier. Loads into G1 do not count.
    pub(super) fn brings(&self, name: SequenceHash) -> bool {
        let has = |blocks: &HeldBlocks| blocks.names().any(|block| block.sequence == name);
        match self {
            Self::Offload { sources, .. } | Self::Write { sources, .. } => has(sources),
            Self::Read { names, .. } | Self::Save { names, .. } => {
                names.iter().any(|(block, _)| block.sequence == name)
            }
            Self::Load { .. } => false,
        }
    }
}

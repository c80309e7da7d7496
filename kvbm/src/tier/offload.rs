//! Away from G1: blocks that were computed go to G2.

use std::time::Duration;

use blockplane_protocol::{DpRank, SequenceHash, TokenBlock};

use super::{
    flight::{Flight, Job},
    moves::{MoveKind, MoveSpec, MovedBlock},
    queue::PRIORITY_DEFAULT,
    stats::Dropped,
    tiers::{Rank, Tiers},
};

impl Tiers {
    /// Has consecutive blocks of one sequence, which are registered in G1, copied to G2; those that
    /// are there already are not. They are not held: what is overwritten before its turn comes is
    /// dropped.
    ///
    /// False when the priority is too low: later blocks of the same request must not be offered
    /// either.
    pub fn offload(
        &mut self,
        now: Duration,
        rank: DpRank,
        names: &[TokenBlock],
        priority: Option<u32>,
    ) -> bool {
        if priority.is_some_and(|priority| priority < self.config.host_min_priority) {
            self.dropped(Dropped::Priority, names.len());
            return false;
        }
        let Some(rank) = self.rank_index(rank) else {
            return true;
        };
        let priority = priority.unwrap_or(PRIORITY_DEFAULT);
        let missing = self.without_present(now, rank, priority, names.to_vec());
        let over = self.offloads.push(now, rank, priority, missing);
        self.dropped(Dropped::QueueFull, over);
        true
    }

    /// A batch of blocks from G1 to G2.
    pub(super) fn start_offload(&mut self, now: Duration) -> Option<MoveSpec> {
        while !self.offloads.is_empty() && self.lane_open(now, MoveKind::DeviceToHost) {
            let room = self.offload_room();
            if room == 0 {
                self.blocked = true;
                return None;
            }
            let (rank, priority, names) = self.next_offloads(now, room)?;
            let names = self.without_present(now, rank, priority, names);
            let mut sources = self.ranks[rank].pool.hold(&names);
            self.dropped(Dropped::Overwritten, names.len() - sources.len());
            if sources.is_empty() {
                continue;
            }
            let targets = self.host_room(sources.len());
            self.dropped(Dropped::NoRoom, sources.len() - targets.len());
            sources.truncate(targets.len());
            if sources.is_empty() {
                continue;
            }
            let mut blocks = Vec::with_capacity(sources.len());
            for (source, target) in sources.found().iter().zip(targets.ids()) {
                blocks.push(MovedBlock::new(source, target.0));
            }
            self.ranks[rank].held += sources.len();
            let flight = Flight {
                kind: MoveKind::DeviceToHost,
                rank: self.ranks[rank].rank,
                started: now,
                time: self.config.queues.offload_time,
                count: blocks.len(),
                job: Job::Offload {
                    rank,
                    priority,
                    sources,
                    targets,
                },
            };
            return Some(self.start(flight, blocks));
        }
        None
    }

    /// The next names of one rank and priority, at most a batch.
    fn next_offloads(
        &mut self,
        now: Duration,
        room: usize,
    ) -> Option<(usize, u32, Vec<TokenBlock>)> {
        let mut batch: Option<(usize, u32)> = None;
        let mut names: Vec<TokenBlock> = Vec::new();
        let mut late = 0;
        let max = room.min(self.batch_max());
        while names.len() < max {
            let ranks = &self.ranks;
            let accept = |rank: usize, priority: u32| {
                ranks[rank].held + names.len() < ranks[rank].held_max
                    && batch.is_none_or(|batch| batch == (rank, priority))
            };
            let room = |rank: &Rank| rank.held_max - rank.held;
            // Before the rank is known, what every one of those that have room may hold.
            let left = match batch {
                Some((rank, _)) => room(&ranks[rank]).saturating_sub(names.len()),
                None => ranks
                    .iter()
                    .map(room)
                    .filter(|room| *room > 0)
                    .min()
                    .unwrap_or(1),
            };
            let Some(next) = self.offloads.take(left.min(max - names.len()), accept) else {
                break;
            };
            if now.saturating_sub(next.since) > self.config.queues.offload_time {
                late += next.items.len();
                continue;
            }
            batch = Some((next.rank, next.priority));
            let mut new = next.items;
            new.retain(|name| !self.arriving(MoveKind::into_host, name.sequence));
            if names.is_empty() {
                names = new;
            } else {
                names.append(&mut new);
            }
        }
        self.dropped(Dropped::Late, late);
        batch.map(|(rank, priority)| (rank, priority, names))
    }

    /// Blocks of G2 that offloads may take. Where there is no G2, half of what stands in for it is
    /// left to onboards.
    pub(super) fn offload_room(&self) -> usize {
        let host = self.host.stats();
        if self.listed {
            host.free + host.cached
        } else {
            (host.free + host.cached).saturating_sub(host.total / 2)
        }
    }

    /// The names that are not in G2 (where there is none, in any lower tier). The others are as if
    /// written again.
    pub(super) fn without_present(
        &mut self,
        now: Duration,
        rank: usize,
        priority: u32,
        mut names: Vec<TokenBlock>,
    ) -> Vec<TokenBlock> {
        if !self.listed {
            return self.worth_a_bounce(now, &names);
        }
        let present = self.host.split_present(&mut names);
        if !present.is_empty() {
            self.host.touch(sequences(&present));
            self.offer_stored(now, rank, priority, &present);
        }
        names
    }
}

pub(super) fn sequences(names: &[TokenBlock]) -> impl Iterator<Item = SequenceHash> + Clone + '_ {
    names.iter().map(|name| name.sequence)
}

//! Away from G2: blocks that are worth it go to G3 and G4.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use blockplane_protocol::{BlockId, DpRank, SequenceHash, Tier, TokenBlock};

use super::{
    config::{DiskConfig, RemoteConfig, TierConfigError},
    flight::{Flight, Job},
    found::{Place, TierMatch},
    health::Health,
    moves::{MoveKind, MoveSpec, MovedBlock},
    offload::sequences,
    queue::{PRIORITY_DEFAULT, RunQueue},
    stats::{Dropped, Evicted},
    tiers::{RemoteIndex, Tiers},
};
use crate::{
    admit::{Admission, AdmissionKind, Offer, Offered, WriteBudget},
    block::{HeldBlocks, ImmutableBlock, LeasedBlocks},
    pool::BlockPool,
};

/// G3.
pub(super) struct Disk {
    pub(super) pool: BlockPool,
    pub(super) writes: RunQueue<Queued>,
    pub(super) health: Health,
    admission: Admission,
    budget: WriteBudget,
    /// Blocks are written when G2 is about to overwrite them.
    on_evict: bool,
    on_hit: bool,
    /// Slots whose contents were wrong, oldest first. They have no name any more.
    wrong: VecDeque<ImmutableBlock>,
}

/// G4.
pub(super) struct Remote {
    pub(super) index: Arc<dyn RemoteIndex>,
    pub(super) writes: RunQueue<Queued>,
    pub(super) health: Health,
    write_through: bool,
}

/// A block that waits to be written.
pub(super) enum Queued {
    /// It is found in G2 by its name when its turn comes, if it is still there.
    Named(TokenBlock),
    /// It is nowhere else: there is no G2.
    Held(ImmutableBlock),
}

/// Share of the slots that are set aside for wrong contents: one in this many.
const WRONG_SHARE: usize = 64;

impl Queued {
    fn name(&self) -> SequenceHash {
        match self {
            Self::Named(name) => name.sequence,
            Self::Held(block) => block.hash(),
        }
    }
}

impl Disk {
    pub(super) fn new(
        config: &DiskConfig,
        pool: BlockPool,
        queue_max: usize,
    ) -> Result<Self, TierConfigError> {
        let kind = config.admission.kind;
        Ok(Self {
            pool,
            writes: RunQueue::new(queue_max),
            health: Health::new(),
            admission: Admission::new(&config.admission),
            budget: WriteBudget::new(&config.budget)?,
            on_evict: kind == AdmissionKind::OnEvict,
            on_hit: matches!(
                kind,
                AdmissionKind::FrequencyHits
                    | AdmissionKind::SeenK { .. }
                    | AdmissionKind::Tail { .. }
            ),
            wrong: VecDeque::new(),
        })
    }

    pub(super) fn referenced(&mut self, names: &[TokenBlock]) {
        self.admission.referenced(sequences(names));
    }

    /// Keeps a slot whose contents were wrong from being used again, as long as these are few.
    pub(super) fn set_aside(&mut self, slot: ImmutableBlock) {
        self.wrong.push_back(slot);
        if self.wrong.len() > (self.pool.stats().total / WRONG_SHARE).max(1) {
            self.wrong.pop_front();
        }
    }

    pub(super) fn quarantined(&self) -> usize {
        self.wrong.len()
    }

    /// Whether nothing is admitted for this reason.
    fn never(&self, offer: Offer) -> bool {
        offer == Offer::Stored && self.on_evict
    }

    fn admits(&mut self, now: Duration, name: TokenBlock, offer: Offer) -> bool {
        let block = Offered {
            name: name.sequence,
        };
        self.admission.offer(now, &block, offer)
    }
}

impl Remote {
    pub(super) fn new(config: RemoteConfig, index: Arc<dyn RemoteIndex>, queue_max: usize) -> Self {
        Self {
            index,
            writes: RunQueue::new(queue_max),
            health: Health::new(),
            write_through: config.write_through,
        }
    }
}

impl Tiers {
    /// Blocks came from G1 into what stands in for G2. That keeps nothing: whoever writes the block
    /// holds it. It was admitted before it was copied.
    pub(super) fn bounced(
        &mut self,
        now: Duration,
        rank: usize,
        priority: u32,
        blocks: Vec<ImmutableBlock>,
    ) {
        let names: Vec<TokenBlock> = blocks.iter().map(ImmutableBlock::name).collect();
        if let Some(disk) = self.disk.as_mut().filter(|d| d.health.writable(now)) {
            let here = disk.pool.contains_each(sequences(&names));
            let held = blocks.iter().zip(here).filter(|(_, here)| !here);
            let held = held.map(|(block, _)| Queued::Held(block.clone())).collect();
            let over = disk.writes.push(now, rank, priority, held);
            self.dropped(Dropped::QueueFull, over);
        }
        if let Some(remote) = self.remote_writes(now) {
            let index = Arc::clone(&remote.index);
            let held = blocks.into_iter().filter(|b| !index.keeps(b.hash()));
            let held = held.map(Queued::Held).collect();
            let over = remote.writes.push(now, rank, priority, held);
            self.dropped(Dropped::QueueFull, over);
        }
    }

    /// Blocks in G2 were written, for the first time or again.
    pub(super) fn offer_stored(
        &mut self,
        now: Duration,
        rank: usize,
        priority: u32,
        names: &[TokenBlock],
    ) {
        self.offer(now, rank, priority, names, Offer::Stored);
        if let Some(remote) = self.remote_writes(now) {
            let missing = |name: &&TokenBlock| !remote.index.keeps(name.sequence);
            let queued = names.iter().filter(missing).copied().map(Queued::Named);
            let queued = queued.collect();
            let over = remote.writes.push(now, rank, priority, queued);
            self.dropped(Dropped::QueueFull, over);
        }
    }

    /// A request found blocks in G2.
    pub(super) fn offer_hits(&mut self, now: Duration, found: &TierMatch) {
        if self.listed && self.disk.as_ref().is_some_and(|disk| disk.on_hit) {
            let names: Vec<TokenBlock> = found
                .found()
                .filter(|found| matches!(found.place, Place::Host(_)))
                .map(|found| found.name)
                .collect();
            let rank = self.rank_index(found.rank()).unwrap_or_default();
            self.offer(now, rank, PRIORITY_DEFAULT, &names, Offer::Hit);
        }
    }

    /// The names for which it is worth to copy a block out of G1 although there is no G2.
    pub(super) fn worth_a_bounce(
        &mut self,
        now: Duration,
        names: &[TokenBlock],
    ) -> Vec<TokenBlock> {
        let mut worth = vec![false; names.len()];
        if let Some(disk) = self.disk.as_mut().filter(|d| d.health.writable(now)) {
            let here = disk.pool.contains_each(sequences(names));
            for ((worth, name), here) in worth.iter_mut().zip(names).zip(here) {
                *worth = !here && disk.admits(now, *name, Offer::Stored);
            }
        }
        if let Some(remote) = self.remote_writes(now) {
            for (worth, name) in worth.iter_mut().zip(names) {
                *worth |= !remote.index.keeps(name.sequence);
            }
        }
        let kept = names.iter().zip(worth).filter(|(_, worth)| *worth);
        kept.map(|(name, _)| *name).collect()
    }

    /// Writes blocks that G2 would overwrite next, or lets them go, so that there is room before it
    /// is needed.
    pub(super) fn start_demotion(&mut self, now: Duration) -> Option<MoveSpec> {
        if !self.listed || !self.disk.as_ref().is_some_and(|disk| disk.on_evict) {
            return None;
        }
        let kind = MoveKind::HostToDisk;
        loop {
            let host = self.host.stats();
            let wanted = self.room_wanted(host.total).saturating_sub(host.free);
            if wanted == 0 || host.cached == 0 || !self.lane_open(now, kind) {
                return None;
            }
            let victims = self.host.victims(wanted.min(self.batch_max()));
            if victims.is_empty() {
                return None;
            }
            let taken = victims.len();
            let names: Vec<TokenBlock> = victims.iter().map(ImmutableBlock::name).collect();
            let moving = names
                .iter()
                .map(|name| self.arriving(is_write, name.sequence));
            let moving: Vec<bool> = moving.collect();
            let disk = self.disk.as_mut()?;
            let here = disk.pool.contains_each(sequences(&names));
            let here = here
                .into_iter()
                .zip(moving)
                .map(|(here, moving)| here || moving);
            let mut sources = Vec::with_capacity(taken);
            for ((victim, name), here) in victims.into_iter().zip(names).zip(here) {
                if !here
                    && disk.admits(now, name, Offer::Evicting)
                    && disk.budget.take(now, self.block_bytes)
                {
                    sources.push(victim);
                } else {
                    victim.forget_unshared();
                }
            }
            self.host_evicted(Evicted::NotAdmitted, taken - sources.len());
            if !sources.is_empty() {
                // Without a slot to write to, they go when room is needed.
                return self.write_to_disk(now, HeldBlocks::gather(sources), true);
            }
        }
    }

    /// A batch of blocks from G2 to G3 or G4.
    pub(super) fn start_write(&mut self, now: Duration, tier: Tier) -> Option<MoveSpec> {
        let kind = match tier {
            Tier::Remote => MoveKind::HostToRemote,
            Tier::Device | Tier::Host | Tier::Disk => MoveKind::HostToDisk,
        };
        loop {
            let empty = match tier {
                Tier::Remote => self.remote.as_ref().is_none_or(|r| r.writes.is_empty()),
                _ => self.disk.as_ref().is_none_or(|d| d.writes.is_empty()),
            };
            if empty || !self.lane_open(now, kind) {
                return None;
            }
            let (named, held) = self.next_writes(now, tier);
            // Either there is a G2 to find blocks in, or they are held.
            let mut sources = if held.is_empty() {
                self.host.hold(&named)
            } else {
                HeldBlocks::gather(held)
            };
            let wanted = named.len().max(sources.len());
            self.dropped(Dropped::Overwritten, wanted - sources.len());
            if tier == Tier::Remote {
                if !sources.is_empty() {
                    return Some(self.write_to_remote(now, sources));
                }
                continue;
            }
            if let Some(disk) = &mut self.disk {
                let before = sources.len();
                sources.retain(|_| disk.budget.take(now, self.block_bytes));
                let refused = before - sources.len();
                self.dropped(Dropped::Budget, refused);
            }
            if let Some(started) = self.write_to_disk(now, sources, false) {
                return Some(started);
            }
        }
    }

    /// Takes the next blocks from a queue, without those that are there already or on the way.
    fn next_writes(&mut self, now: Duration, tier: Tier) -> (Vec<TokenBlock>, Vec<ImmutableBlock>) {
        let (mut named, mut held, mut late) = (Vec::new(), Vec::new(), 0);
        let max = self.batch_max();
        let time = self.config.queues.offload_time;
        while named.len() + held.len() < max {
            let left = max - named.len() - held.len();
            let next = match tier {
                Tier::Remote => self.remote.as_mut().map(|remote| &mut remote.writes),
                _ => self.disk.as_mut().map(|disk| &mut disk.writes),
            };
            let Some(next) = next.and_then(|queue| queue.take(left, |_, _| true)) else {
                break;
            };
            if now.saturating_sub(next.since) > time {
                late += next.items.len();
                continue;
            }
            let there = match (&self.disk, &self.remote) {
                (_, Some(remote)) if tier == Tier::Remote => next
                    .items
                    .iter()
                    .map(|item| remote.index.keeps(item.name()))
                    .collect(),
                (Some(disk), _) => disk.pool.contains_each(next.items.iter().map(Queued::name)),
                _ => Vec::new(),
            };
            for (item, there) in next.items.into_iter().zip(there) {
                let moving = |kind: MoveKind| kind.tier() == tier && !kind.into_host();
                if there || self.arriving(moving, item.name()) {
                    continue;
                }
                match item {
                    Queued::Named(name) if !named.contains(&name) => named.push(name),
                    Queued::Named(_) => {}
                    Queued::Held(block) => held.push(block),
                }
            }
        }
        self.dropped(Dropped::Late, late);
        (named, held)
    }

    fn write_to_disk(
        &mut self,
        now: Duration,
        mut sources: HeldBlocks,
        demote: bool,
    ) -> Option<MoveSpec> {
        let disk = self.disk.as_ref()?;
        let (targets, _) = disk.pool.lease_up_to(sources.len());
        let dropped = sources.len() - targets.len();
        sources.truncate(targets.len());
        self.dropped(Dropped::NoRoom, dropped);
        if sources.is_empty() {
            return None;
        }
        Some(self.write(now, MoveKind::HostToDisk, sources, Some(targets), demote))
    }

    fn write_to_remote(&mut self, now: Duration, sources: HeldBlocks) -> MoveSpec {
        self.write(now, MoveKind::HostToRemote, sources, None, false)
    }

    /// Starts to write `sources`: into `targets`, one for each, where the tier below has slots.
    fn write(
        &mut self,
        now: Duration,
        kind: MoveKind,
        sources: HeldBlocks,
        targets: Option<LeasedBlocks>,
        demote: bool,
    ) -> MoveSpec {
        let mut slots = targets.iter().flat_map(LeasedBlocks::ids);
        let to = |slot: Option<&BlockId>| slot.map_or(u32::MAX, |slot| slot.0);
        let found = sources.found().iter();
        let blocks: Vec<MovedBlock> = found
            .map(|source| MovedBlock::new(source, to(slots.next())))
            .collect();
        let flight = Flight {
            kind,
            rank: DpRank::default(),
            started: now,
            time: self.config.queues.offload_time,
            count: blocks.len(),
            job: Job::Write {
                sources,
                targets,
                demote,
            },
        };
        self.start(flight, blocks)
    }

    /// Asks whether blocks are to be written to G3, and queues those that are.
    fn offer(
        &mut self,
        now: Duration,
        rank: usize,
        priority: u32,
        names: &[TokenBlock],
        offer: Offer,
    ) {
        let Some(disk) = self.disk.as_mut().filter(|d| d.health.writable(now)) else {
            return;
        };
        if disk.never(offer) {
            return;
        }
        let mut missing = names.to_vec();
        disk.pool.split_present(&mut missing);
        missing.retain(|name| disk.admits(now, *name, offer));
        if missing.is_empty() {
            return;
        }
        let admitted = missing.into_iter().map(Queued::Named).collect();
        let over = disk.writes.push(now, rank, priority, admitted);
        self.dropped(Dropped::QueueFull, over);
    }

    fn remote_writes(&mut self, now: Duration) -> Option<&mut Remote> {
        let remote = self.remote.as_mut()?;
        (remote.write_through && remote.health.writable(now)).then_some(remote)
    }

    /// Blocks of G2 that are to be free: some batches, or what is waited for.
    fn room_wanted(&self, host_blocks: usize) -> usize {
        let batches = 2 * self.batch_max();
        if self.config.demote_ahead {
            return batches.min(host_blocks / 8).max(1);
        }
        let reads = self.disk_reads.len() + self.remote_reads.len();
        reads.max(self.offloads.len()).min(self.batch_max())
    }
}

fn is_write(kind: MoveKind) -> bool {
    kind == MoveKind::HostToDisk
}

//! Plays a trace against the books of all tiers, as an engine and its movers would, in virtual time.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
    time::Duration,
};

use anyhow::{Context, bail};
use blockplane_kvbm::{
    BlockPool, HeldBlocks, ImmutableBlock, LeasedBlocks,
    tier::{MoveId, MoveReport, MoveSpec, OnboardId, Onboarded, PerTier, Tiers},
};
use blockplane_protocol::{DpRank, TokenBlock};

use super::{
    outcome::{Outcome, Queues},
    trace::{Asked, Trace},
    world::World,
};

const RANK: DpRank = DpRank(0);

/// A replay under way.
pub(super) struct Driver<'a, W> {
    trace: &'a Trace,
    device: BlockPool,
    /// The tiers below G1, if there are any.
    tiers: Option<Tiers>,
    world: W,
    /// Time that a request waits for blocks from below.
    onboard_time: Duration,
    now: Duration,
    /// Moves under way, by when they end.
    moving: BinaryHeap<Reverse<(Duration, MoveId)>>,
    specs: HashMap<MoveId, MoveSpec>,
    loading: HashMap<OnboardId, Loading>,
    /// Requests that wait for room in G1.
    waiting: VecDeque<usize>,
    hits: PerTier<u64>,
    failed_loads: u64,
    queues: Queues,
}

/// A request whose blocks are being loaded.
struct Loading {
    request: usize,
    /// One for each block found; `None` where it lay below G1.
    found: Vec<Option<ImmutableBlock>>,
    /// For the blocks that lay below, and then for those that must be computed.
    targets: LeasedBlocks,
}

impl<'a, W: World> Driver<'a, W> {
    pub(super) fn new(
        trace: &'a Trace,
        device: BlockPool,
        mut tiers: Option<Tiers>,
        world: W,
        onboard_time: Duration,
    ) -> Self {
        if let Some(tiers) = &mut tiers {
            tiers.attach(RANK, device.clone());
        }
        Self {
            trace,
            device,
            tiers,
            world,
            onboard_time,
            now: Duration::ZERO,
            moving: BinaryHeap::new(),
            specs: HashMap::new(),
            loading: HashMap::new(),
            waiting: VecDeque::new(),
            hits: PerTier::default(),
            failed_loads: 0,
            queues: Queues::default(),
        }
    }

    /// Plays all requests and lets everything settle.
    pub(super) fn run(mut self) -> anyhow::Result<Outcome> {
        let began = thread_time();
        for (number, asked) in self.trace.requests().enumerate() {
            self.advance(asked.at)?;
            if let Some(tiers) = &mut self.tiers {
                tiers.referenced(asked.blocks);
            }
            if !self.waiting.is_empty() || !self.start(number, &asked)? {
                self.waiting.push_back(number);
            }
            self.pump()?;
            self.queues.waiting_max = self.queues.waiting_max.max(self.waiting.len());
        }
        self.advance(Duration::MAX)?;
        if !self.waiting.is_empty() || !self.loading.is_empty() {
            bail!(
                "{} requests never got room in G1 and {} never their blocks",
                self.waiting.len(),
                self.loading.len()
            );
        }
        Ok(Outcome {
            requests: self.trace.requests().len(),
            block_refs: self.trace.block_refs(),
            hits: self.hits,
            failed_loads: self.failed_loads,
            device: self.device.stats(),
            tiers: self.tiers.as_ref().map(Tiers::stats).unwrap_or_default(),
            queues: self.queues,
            ended: self.now,
            took: thread_time().saturating_sub(began),
        })
    }

    /// Lets time pass, with all that happens until then.
    fn advance(&mut self, to: Duration) -> anyhow::Result<()> {
        loop {
            let next_move = self.moving.peek().map(|Reverse((end, _))| *end);
            let busy = !self.loading.is_empty() || next_move.is_some();
            let tick = match &mut self.tiers {
                Some(tiers) if busy => tiers.tick(self.now),
                _ => None,
            };
            let tick = tick.filter(|at| *at > self.now);
            let Some(next) = next_move.into_iter().chain(tick).min() else {
                break;
            };
            if next > to {
                break;
            }
            self.now = next;
            while let Some(Reverse((end, id))) = self.moving.peek().copied()
                && end <= self.now
            {
                self.moving.pop();
                self.end_move(id)?;
            }
            if let Some(tiers) = &mut self.tiers {
                tiers.tick(self.now);
            }
            self.pump()?;
        }
        if to < Duration::MAX {
            self.now = self.now.max(to);
        }
        Ok(())
    }

    /// Begins a request. False when G1 has no room for it now.
    fn start(&mut self, number: usize, asked: &Asked<'_>) -> anyhow::Result<bool> {
        let (now, names) = (self.now, asked.blocks);
        self.world.step();
        let Some(tiers) = &mut self.tiers else {
            let found = self.device.match_prefix(names);
            let Ok(targets) = self.device.lease(names.len() - found.len()) else {
                return self.too_long(asked);
            };
            self.hits.device += found.len() as u64;
            let found = found.into_iter().map(Some).collect();
            drop(self.compute(names, found, targets, 0)?);
            return Ok(true);
        };
        let mut found = tiers.find(now, RANK, names);
        let lower = found.lower();
        let Ok(targets) = self.device.lease(names.len() - found.device()) else {
            drop(found);
            return self.too_long(asked);
        };
        if lower == 0 {
            let found: Vec<_> = found.into_device().into_iter().map(Some).collect();
            self.hits.device += found.len() as u64;
            let here = found.len();
            self.finish(names, found, targets, here)?;
        } else {
            let ids = targets.ids()[..lower].to_vec();
            let loading = Loading {
                request: number,
                found: found.take_device(),
                targets,
            };
            let deadline = now.saturating_add(self.onboard_time);
            let id = tiers.onboard(now, RANK, found, ids, deadline);
            self.loading.insert(id, loading);
        }
        Ok(true)
    }

    /// Whether a request that did not fit can wait.
    fn too_long(&self, asked: &Asked<'_>) -> anyhow::Result<bool> {
        let total = self.device.stats().total;
        if asked.blocks.len() > total {
            bail!(
                "line {}: {} blocks do not fit into the {total} of G1",
                asked.line,
                asked.blocks.len()
            );
        }
        Ok(false)
    }

    /// Starts all moves that can start, and goes on with the requests that waited for what ended.
    fn pump(&mut self) -> anyhow::Result<()> {
        loop {
            self.start_moves();
            let Some(tiers) = &mut self.tiers else {
                return Ok(());
            };
            let ended = tiers.finished();
            if ended.is_empty() && !self.retry()? {
                return Ok(());
            }
            for (id, onboarded) in ended {
                self.end_load(id, &onboarded)?;
            }
        }
    }

    /// Starts all moves that can start. Those that take no time have ended on return.
    fn start_moves(&mut self) {
        let Some(tiers) = &mut self.tiers else {
            return;
        };
        while let Some(spec) = tiers.next_move(self.now) {
            let end = self.world.end(self.now, &spec);
            if end > self.now {
                self.moving.push(Reverse((end, spec.id)));
                self.specs.insert(spec.id, spec);
            } else {
                let report = self.world.carry(&spec);
                report_move(tiers, self.now, spec.id, report);
            }
        }
        if !self.moving.is_empty() {
            self.queues.sample(&tiers.stats());
        }
    }

    /// Begins requests that wait, oldest first.
    fn retry(&mut self) -> anyhow::Result<bool> {
        let Some(&number) = self.waiting.front() else {
            return Ok(false);
        };
        self.waiting.pop_front();
        let started = self.start(number, &self.trace.request(number))?;
        if !started {
            self.waiting.push_front(number);
        }
        Ok(started)
    }

    fn end_move(&mut self, id: MoveId) -> anyhow::Result<()> {
        let spec = self.specs.remove(&id).context("a move without its spec")?;
        let tiers = self.tiers.as_mut().context("a move without tiers")?;
        let report = self.world.carry(&spec);
        report_move(tiers, self.now, id, report);
        Ok(())
    }

    fn end_load(&mut self, id: OnboardId, onboarded: &Onboarded) -> anyhow::Result<()> {
        let Some(loading) = self.loading.remove(&id) else {
            return Ok(());
        };
        let asked = self.trace.request(loading.request);
        self.hits.device += u64::from(onboarded.from.device);
        self.hits.host += u64::from(onboarded.from.host);
        self.hits.disk += u64::from(onboarded.from.disk);
        self.failed_loads += (loading.found.len() - onboarded.loaded) as u64;
        self.finish(
            asked.blocks,
            loading.found,
            loading.targets,
            onboarded.loaded,
        )
    }

    /// The first `loaded` blocks are in G1: computes the others, and offers them to the tiers below.
    fn finish(
        &mut self,
        names: &[TokenBlock],
        found: Vec<Option<ImmutableBlock>>,
        targets: LeasedBlocks,
        loaded: usize,
    ) -> anyhow::Result<()> {
        let held = self.compute(names, found, targets, loaded)?;
        self.world.step();
        if let Some(tiers) = &mut self.tiers
            && loaded < names.len()
        {
            tiers.offload(self.now, RANK, &names[loaded..], None);
            // Copies that take no time are over before the blocks are released.
            self.start_moves();
        }
        drop(held);
        Ok(())
    }

    /// Registers all blocks of a request in G1. Those that were there are given up first.
    fn compute(
        &mut self,
        names: &[TokenBlock],
        mut found: Vec<Option<ImmutableBlock>>,
        targets: LeasedBlocks,
        loaded: usize,
    ) -> anyhow::Result<(Vec<ImmutableBlock>, HeldBlocks)> {
        found.resize_with(names.len(), || None);
        let mut slots = targets.ids().iter();
        for (at, (name, here)) in names.iter().zip(&found).enumerate() {
            match here {
                Some(block) => self.world.loaded(block.id(), *name)?,
                None => {
                    let slot = *slots.next().context("a block without a target")?;
                    if at < loaded {
                        self.world.loaded(slot, *name)?;
                    } else {
                        self.world.computed(slot, *name)?;
                    }
                }
            }
        }
        let parents = names.iter().map(|name| Some(name.sequence));
        let chain = names.iter().zip(std::iter::once(None).chain(parents));
        let new = chain.zip(&found).filter(|(_, here)| here.is_none());
        let new = targets.register(new.map(|((name, parent), _)| (*name, parent)));
        Ok((found.into_iter().flatten().collect(), new))
    }
}

/// Time that this thread has computed.
fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

fn report_move(tiers: &mut Tiers, now: Duration, id: MoveId, report: MoveReport) {
    let quiet = report.pending.is_none();
    tiers.moved(now, id, report.outcomes, quiet);
    if let Some(pending) = report.pending {
        pending.wait();
        tiers.quiet(now, id);
    }
}

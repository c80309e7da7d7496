//! All participants of a benchmark, led from here.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use blockplane_transfer::KernelConfig;

use super::{
    args::{Effective, Prepared},
    beside::{Beside, Shared},
    case::{Case, LaneName, Lot, Memory, OpName, Slice, Turn},
    job::{Job, Ran, Rounds},
    limits::gb_per_s,
    link::{Address, Command, Link, Reply, Settings, unexpected},
    memory::Allocated,
    node::process_cpu,
    ping::Pings,
    scheme::Topology,
};
use crate::report::Samples;

/// Initiators and targets, and over which lane they are connected.
#[derive(Debug)]
pub(super) struct Cluster {
    topology: Topology,
    initiators: Vec<Link>,
    targets: Vec<Link>,
    seed: u64,
}

/// Where the agents of a cluster live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hosts {
    /// In threads of this process.
    Threads,
    /// In processes of their own; a single initiator in this one.
    Processes,
    /// In processes of their own, all of them.
    Apart,
    /// All in one other process.
    Together,
}

/// What agents are started with.
#[derive(Clone, Debug)]
pub(super) struct Places {
    pub(super) lane: LaneName,
    /// Memory of the initiators, in turn.
    pub(super) from: Vec<Memory>,
    /// Memory of the targets, in turn.
    pub(super) to: Vec<Memory>,
    pub(super) bytes: usize,
    pub(super) settings: Settings,
}

/// Figures of one case.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    /// GB/s of all pairs together: of the median transfer where only one is in flight, of the
    /// whole run otherwise.
    pub(super) bandwidth: f64,
    /// GB/s of each transfer, where only one is in flight.
    pub(super) each: Option<Samples>,
    /// Transfers completed.
    pub(super) transfers: u64,
    /// Microseconds of each transfer.
    pub(super) latency: Samples,
    /// Nanoseconds per block to prepare, to post, and of the poster's processor time.
    pub(super) make: Samples,
    pub(super) post: Samples,
    pub(super) post_cpu: Samples,
    /// Microseconds of the poster's processor time for each post.
    pub(super) post_cpu_us: Samples,
    /// Microseconds from each post until its notification was taken, where there is one.
    pub(super) arrival: Samples,
    /// Initiator, target and GB/s of each pair.
    pub(super) pairs: Vec<(usize, usize, f64)>,
    /// How a transfer was planned.
    pub(super) reason: String,
}

/// When contents are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Check {
    /// Never.
    Never,
    /// Before the first measured transfer.
    Once,
    /// And again after the last.
    Twice,
}

/// How a case is run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    pub(super) threads: usize,
    pub(super) depth: usize,
    pub(super) prepared: bool,
    pub(super) per_layer: bool,
    pub(super) check: Check,
    pub(super) post_cpu: bool,
    pub(super) notify: bool,
    pub(super) sms: Option<u32>,
    pub(super) pace: Option<f64>,
    pub(super) warmup: u32,
    pub(super) rounds: Rounds,
}

impl Way {
    /// One transfer at a time by one thread, prepared once, for about so long.
    pub(super) const fn alone(check: Check, rounds: Rounds) -> Self {
        Self {
            threads: 1,
            depth: 1,
            prepared: true,
            per_layer: false,
            check,
            post_cpu: false,
            notify: false,
            sms: None,
            pace: None,
            warmup: 3,
            rounds,
        }
    }

    /// As the options say.
    pub(super) fn new(effective: &Effective) -> Self {
        let args = &effective.args;
        Self {
            threads: args.threads,
            depth: args.depth,
            prepared: args.prepared == Prepared::Yes,
            per_layer: args.per_layer,
            check: if args.no_check {
                Check::Never
            } else {
                Check::Twice
            },
            post_cpu: effective.device().is_some(),
            notify: false,
            sms: None,
            pace: None,
            warmup: args.warmup,
            rounds: effective.rounds(),
        }
    }
}

impl Way {
    fn job(self, op: OpName, lots: Vec<Lot>) -> Job {
        Job {
            op,
            lots,
            threads: self.threads,
            prepared: self.prepared,
            per_layer: self.per_layer,
            post_cpu: self.post_cpu,
            notify: self.notify,
            sms: self.sms,
            pace: self.pace,
            makes: 0,
            warmup: self.warmup,
            rounds: self.rounds,
        }
    }
}

/// A matrix product that runs beside transfers.
#[derive(Clone, Debug)]
pub(super) struct ProductOf {
    pub(super) device: u32,
    pub(super) size: u32,
    /// How long it runs alone.
    pub(super) alone_millis: u64,
    /// Folder of cuBLASLt, instead of the usual places.
    pub(super) library: Option<PathBuf>,
}

impl Cluster {
    /// Starts the processes; the only initiator of a benchmark is this process itself.
    pub(super) fn start(
        topology: Topology,
        hosts: Hosts,
        seed: u64,
        kernels: &KernelConfig,
    ) -> anyhow::Result<Self> {
        let link = || match hosts {
            Hosts::Threads => Link::thread(kernels),
            Hosts::Processes | Hosts::Apart | Hosts::Together => Link::process(),
        };
        let mut targets: Vec<Link> = (0..topology.targets)
            .map(|_| link())
            .collect::<anyhow::Result<_>>()?;
        let mut initiators: Vec<Link> = match (hosts, topology.initiators) {
            (Hosts::Together, _) => targets.iter().map(Link::partner).collect(),
            (Hosts::Threads | Hosts::Processes, 1) => vec![Link::here(kernels)],
            (Hosts::Threads | Hosts::Processes | Hosts::Apart, number) => {
                (0..number).map(|_| link()).collect::<anyhow::Result<_>>()?
            }
        };
        for (kind, links) in [("initiator", &mut initiators), ("target", &mut targets)] {
            for (i, link) in links.iter_mut().enumerate() {
                link.set_label(format!("{kind} {i}"));
            }
        }
        Ok(Self {
            topology,
            initiators,
            targets,
            seed,
        })
    }

    /// Waits for no answer after this moment.
    pub(super) fn set_deadline(&mut self, until: Option<Instant>) {
        for link in self.initiators.iter_mut().chain(&mut self.targets) {
            link.set_deadline(until);
        }
    }

    /// Starts agents that offer one lane and connects them. Returns how to reach the first target
    /// and why the first initiator reaches it over this lane.
    pub(super) fn open(&mut self, places: &Places) -> anyhow::Result<(Address, String)> {
        let start =
            |links: &mut [Link], kind: &str, memory: &[Memory]| -> anyhow::Result<Vec<Address>> {
                let memory = memory.iter().cycle();
                for (i, (link, memory)) in links.iter_mut().zip(memory).enumerate() {
                    link.send(Command::Start {
                        name: format!("bench-{kind}-{i}"),
                        lane: places.lane,
                        memory: memory.clone(),
                        bytes: places.bytes,
                        settings: places.settings.clone(),
                    })?;
                }
                links
                    .iter_mut()
                    .map(|link| match link.answer()? {
                        Reply::Started { address } => Ok(address),
                        other => Err(unexpected(&other)),
                    })
                    .collect()
            };
        let targets = start(&mut self.targets, "target", &places.to)?;
        let initiators = start(&mut self.initiators, "initiator", &places.from)?;
        let topology = self.topology;
        let of = |all: &[Address], some: Vec<usize>| Command::Connect {
            peers: some.into_iter().map(|i| all[i].clone()).collect(),
        };
        let mut reason = None;
        for (i, link) in self.initiators.iter_mut().enumerate() {
            match link.ask(of(&targets, topology.targets_of(i)))? {
                Reply::Connected { reasons } => {
                    reason = reason.or_else(|| reasons.into_iter().next());
                }
                other => return Err(unexpected(&other)),
            }
        }
        for (i, link) in self.targets.iter_mut().enumerate() {
            link.ask(of(&initiators, topology.initiators_of(i)))?;
        }
        let first = targets.into_iter().next().context("there is a target")?;
        Ok((first, reason.unwrap_or_default()))
    }

    /// Asks the first target how to reach it.
    pub(super) fn describe(&self) -> anyhow::Result<Address> {
        match self.targets[0].ask(Command::Describe)? {
            Reply::Started { address } => Ok(address),
            other => Err(unexpected(&other)),
        }
    }

    /// Stops all agents.
    pub(super) fn close(&mut self) -> anyhow::Result<()> {
        for link in self.initiators.iter_mut().chain(&mut self.targets) {
            link.tell(Command::Stop)?;
        }
        Ok(())
    }

    /// Blocks of all transfers that are in flight together, by initiator.
    pub(super) fn lots(&self, case: &Case, way: Way) -> anyhow::Result<Vec<Vec<Lot>>> {
        let Way { threads, depth, .. } = way;
        let mut all = Vec::new();
        let mut seed = self.seed;
        for initiator in 0..self.topology.initiators {
            let targets = self.topology.targets_of(initiator);
            let mut lots = Vec::new();
            for (peer, &target) in targets.iter().enumerate() {
                let sharing = self.topology.initiators_of(target);
                let place = sharing.iter().position(|&other| other == initiator);
                let place = place.context("both sides know of the pair")?;
                for thread in 0..threads {
                    for slot in 0..depth {
                        let slice = |pair: usize, pairs: usize| Slice {
                            index: (pair * threads + thread) * depth + slot,
                            of: pairs * threads * depth,
                        };
                        let local = slice(peer, targets.len());
                        let remote = slice(place, sharing.len());
                        lots.push(case.lot(peer, thread, local, remote, seed)?);
                        seed = seed.wrapping_add(2);
                    }
                }
            }
            all.push(lots);
        }
        Ok(all)
    }

    /// Measures one case and checks that it moves every byte to its place.
    pub(super) fn measure(
        &mut self,
        op: OpName,
        case: &Case,
        way: Way,
    ) -> anyhow::Result<Measured> {
        let lots = self.lots(case, way)?;
        if way.check == Check::Never {
            self.fill(op, &lots)?;
        } else {
            self.check(op, &lots, way)?;
        }

        let notifying = way.per_layer || way.notify;
        if notifying {
            self.drain()?;
        }
        let ran = self.run(op, &lots, way, 20, way.warmup, way.rounds)?;
        let mut taken = Vec::new();
        if notifying {
            taken = self.drained(case, &lots, way, &ran)?;
        }
        if way.check == Check::Twice {
            self.check(op, &lots, way)?;
        }
        Ok(self.summarise(case, &lots, way, ran, &taken))
    }

    /// Runs transfers of the first initiator and a matrix product in its process, each alone and then
    /// both.
    pub(super) fn beside(
        &mut self,
        op: OpName,
        case: &Case,
        way: Way,
        product: &ProductOf,
    ) -> anyhow::Result<Shared> {
        let mut lots = self.lots(case, way)?;
        if way.check == Check::Never {
            self.fill(op, &lots)?;
        } else {
            self.check(op, &lots, way)?;
        }
        let first = self.initiators.first().context("there is an initiator")?;
        first.send(Command::Beside(Beside {
            job: way.job(op, lots.swap_remove(0)),
            device: product.device,
            size: product.size,
            alone_millis: product.alone_millis,
            library: product.library.clone(),
        }))?;
        let alone = Duration::from_millis(product.alone_millis);
        match first.answer_after(alone + way.rounds.bound(way.warmup) * 2)? {
            Reply::Shared(shared) => Ok(shared),
            other => Err(unexpected(&other)),
        }
    }

    /// Lets the first initiator allocate memory some times.
    pub(super) fn allocate(
        &self,
        memory: &Memory,
        bytes: usize,
        times: u32,
        settings: &Settings,
    ) -> anyhow::Result<Allocated> {
        let first = self.initiators.first().context("there is an initiator")?;
        first.send(Command::Allocate {
            memory: memory.clone(),
            bytes,
            times,
            settings: settings.clone(),
        })?;
        match first.answer_after(Duration::from_secs(10) * times)? {
            Reply::Allocated(allocated) => Ok(allocated),
            other => Err(unexpected(&other)),
        }
    }

    fn run(
        &mut self,
        op: OpName,
        lots: &[Vec<Lot>],
        way: Way,
        makes: u32,
        warmup: u32,
        rounds: Rounds,
    ) -> anyhow::Result<Vec<Ran>> {
        for (link, lots) in self.initiators.iter_mut().zip(lots) {
            link.send(Command::Run(Job {
                makes,
                warmup,
                rounds,
                ..way.job(op, lots.clone())
            }))?;
        }
        // Every single transfer has a bound of its own; this is one for all of them.
        let longer = rounds.bound(warmup);
        self.initiators
            .iter_mut()
            .map(|link| match link.answer_after(longer)? {
                Reply::Ran(ran) => Ok(ran),
                other => Err(unexpected(&other)),
            })
            .collect()
    }

    /// Puts contents into all blocks that are going to be read.
    fn fill(&mut self, op: OpName, lots: &[Vec<Lot>]) -> anyhow::Result<()> {
        self.seed = self.seed.wrapping_add(1 << 20);
        let seed = self.seed;
        self.each_lot(lots, |initiator, target, lot, i| {
            let (source, side) = match op {
                OpName::Write => (initiator, lot.local.clone()),
                OpName::Read => (target, lot.remote.clone()),
            };
            let seed = seed.wrapping_add(i);
            source.tell(Command::Fill { side, seed })
        })
    }

    /// Moves fresh contents onto cleared blocks and compares.
    fn check(&mut self, op: OpName, lots: &[Vec<Lot>], way: Way) -> anyhow::Result<()> {
        self.each_lot(lots, |initiator, target, lot, _| {
            let (destination, side) = match op {
                OpName::Write => (target, lot.remote.clone()),
                OpName::Read => (initiator, lot.local.clone()),
            };
            destination.tell(Command::Clear { side })
        })?;
        self.fill(op, lots)?;
        let notifying = way.per_layer || way.notify;
        if notifying {
            self.drain()?;
        }
        self.run(op, lots, way, 0, 0, Rounds::Exactly(1))?;
        if notifying {
            for target in &mut self.targets {
                target.ask(Command::Drained)?;
            }
        }
        let seed = self.seed;
        let mut wrong = 0;
        self.each_lot(lots, |initiator, target, lot, i| {
            let (destination, side) = match op {
                OpName::Write => (target, lot.remote.clone()),
                OpName::Read => (initiator, lot.local.clone()),
            };
            let seed = seed.wrapping_add(i);
            // What the target turns back when it sends comes as the initiator has it.
            let turn = match op {
                OpName::Write => lot.turn,
                OpName::Read => lot.turn.map(Turn::back),
            };
            match destination.ask(Command::Verify { side, seed, turn })? {
                Reply::Mismatches { runs } => wrong += runs,
                other => return Err(unexpected(&other)),
            }
            Ok(())
        })?;
        ensure!(
            wrong == 0,
            "{wrong} blocks have the wrong contents after a {}",
            op.as_str()
        );
        Ok(())
    }

    /// Calls `act(initiator, target, lot, number of the lot)` for every lot.
    fn each_lot(
        &mut self,
        lots: &[Vec<Lot>],
        mut act: impl FnMut(&mut Link, &mut Link, &Lot, u64) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut number = 0;
        for (initiator, lots) in lots.iter().enumerate() {
            let targets = self.topology.targets_of(initiator);
            for lot in lots {
                let target = &mut self.targets[targets[lot.peer]];
                act(&mut self.initiators[initiator], target, lot, number)?;
                number += 1;
            }
        }
        Ok(())
    }

    fn drain(&mut self) -> anyhow::Result<()> {
        for target in &mut self.targets {
            target.tell(Command::Drain)?;
        }
        Ok(())
    }

    /// Every layer of every transfer, or every transfer, must have brought its notification.
    /// Returns when each was taken.
    fn drained(
        &mut self,
        case: &Case,
        lots: &[Vec<Lot>],
        way: Way,
        ran: &[Ran],
    ) -> anyhow::Result<Vec<u64>> {
        let warm: usize = lots.iter().map(Vec::len).sum();
        let measured: u64 = ran.iter().flat_map(|ran| &ran.rounds).sum();
        let transfers = measured + warm as u64 * u64::from(way.warmup);
        let each = if way.per_layer { case.shape.layers } else { 1 };
        let expected = transfers * u64::from(each);
        let mut taken = Vec::new();
        for target in &mut self.targets {
            match target.ask(Command::Drained)? {
                Reply::Notifications { nanos } => taken.extend(nanos),
                other => return Err(unexpected(&other)),
            }
        }
        let arrived = taken.len() as u64;
        ensure!(
            arrived == expected,
            "{arrived} notifications arrived of {expected}"
        );
        Ok(taken)
    }

    fn summarise(
        &self,
        case: &Case,
        lots: &[Vec<Lot>],
        way: Way,
        ran: Vec<Ran>,
        taken: &[u64],
    ) -> Measured {
        let bytes = u64::from(case.count) * case.shape.block_bytes();
        let blocks = f64::from(case.count);
        let per_block = |of: fn(&Ran) -> &Vec<f64>| -> Samples {
            let times = ran.iter().flat_map(of);
            times.map(|micros| micros * 1e3 / blocks).collect()
        };
        let mut pairs = Vec::new();
        for (initiator, ran) in ran.iter().enumerate() {
            let targets = self.topology.targets_of(initiator);
            for (target, &rounds) in targets.into_iter().zip(&ran.rounds) {
                let rate = gb_per_s(bytes * rounds, ran.took().as_secs_f64());
                pairs.push((initiator, target, rate));
            }
        }
        let latency: Samples = ran.iter().flat_map(|ran| &ran.transfer).copied().collect();
        let transfers = ran.iter().flat_map(|ran| &ran.rounds).sum();
        let began = ran.iter().map(|ran| ran.start_nanos).min().unwrap_or(0);
        let ended = ran.iter().map(|ran| ran.end_nanos).max().unwrap_or(0);
        let whole = Duration::from_nanos(ended.saturating_sub(began)).as_secs_f64();
        let alone = lots.iter().map(Vec::len).sum::<usize>() == 1;
        let each: Option<Samples> = alone.then(|| {
            let rates = ran.iter().flat_map(|ran| &ran.transfer);
            rates.map(|micros| gb_per_s(bytes, micros / 1e6)).collect()
        });
        let bandwidth = match &each {
            Some(each) => each.median(),
            None => gb_per_s(bytes * transfers, whole),
        };
        let post_cpu = if way.post_cpu {
            per_block(|ran| &ran.post_cpu)
        } else {
            Samples::default()
        };
        // Of a single lot, notifications come in the order of the posts; those of the warm-up first.
        let measured = taken.iter().skip(way.warmup as usize);
        let posted = ran.iter().flat_map(|ran| &ran.posted_nanos);
        let arrival = measured
            .zip(posted)
            .filter(|_| alone && way.notify)
            .map(|(taken, posted)| taken.saturating_sub(*posted) as f64 / 1e3)
            .collect();
        let post_cpu_us = ran.iter().flat_map(|ran| &ran.post_cpu).copied().collect();
        Measured {
            bandwidth,
            post_cpu_us,
            arrival,
            each,
            transfers,
            latency,
            make: per_block(|ran| &ran.make),
            post: per_block(|ran| &ran.post),
            post_cpu,
            pairs,
            reason: ran
                .into_iter()
                .next()
                .map_or_else(String::new, |r| r.reason),
        }
    }

    /// One-way latency of notifications between the first two, in microseconds.
    pub(super) fn ping(&self, pings: &Pings) -> anyhow::Result<Samples> {
        self.targets[0].send(Command::Echo(pings.clone()))?;
        let reply = self.initiators[0].ask(Command::Ping(pings.clone()))?;
        match self.targets[0].answer()? {
            Reply::Done => {}
            other => return Err(unexpected(&other)),
        }
        match reply {
            Reply::RoundTrips { micros } => Ok(micros.into_iter().collect()),
            other => Err(unexpected(&other)),
        }
    }

    /// Processor time of this process and of the first target while connected and idle, in percent
    /// of one core.
    pub(super) fn idle_cpu(&self, time: Duration) -> anyhow::Result<[f64; 2]> {
        let target = &self.targets[0];
        let remote_before = remote_cpu(target)?;
        let local_before = process_cpu();
        let start = Instant::now();
        // Nobody sends: this parks the thread for the whole time.
        while let Some(left) = time
            .checked_sub(start.elapsed())
            .filter(|left| !left.is_zero())
        {
            std::thread::park_timeout(left);
        }
        let elapsed = start.elapsed().as_secs_f64();
        let local = process_cpu() - local_before;
        let remote = remote_cpu(target)?.saturating_sub(remote_before);
        Ok([local, remote].map(|used| used.as_secs_f64() / elapsed * 100.0))
    }
}

fn remote_cpu(link: &Link) -> anyhow::Result<Duration> {
    match link.ask(Command::Cpu)? {
        Reply::Cpu { nanos } => Ok(Duration::from_nanos(nanos)),
        other => Err(unexpected(&other)),
    }
}

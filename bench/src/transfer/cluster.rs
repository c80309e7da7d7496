//! All participants of a benchmark, led from here.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::{
    args::{Effective, Prepared},
    case::{Case, LaneName, Lot, Memory, OpName, Slice},
    job::{Job, Ran, Rounds},
    limits::gb_per_s,
    link::{Address, Command, Link, Reply, unexpected},
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
    /// Initiator, target and GB/s of each pair.
    pub(super) pairs: Vec<(usize, usize, f64)>,
    /// How a transfer was planned.
    pub(super) reason: String,
}

/// How a case is run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    pub(super) threads: usize,
    pub(super) depth: usize,
    pub(super) prepared: bool,
    pub(super) per_layer: bool,
    pub(super) check: bool,
    pub(super) post_cpu: bool,
    pub(super) warmup: u32,
    pub(super) rounds: Rounds,
}

impl Way {
    /// As the options say.
    pub(super) fn new(effective: &Effective) -> Self {
        let args = &effective.args;
        Self {
            threads: args.threads,
            depth: args.depth,
            prepared: args.prepared == Prepared::Yes,
            per_layer: args.per_layer,
            check: !args.no_check,
            post_cpu: false,
            warmup: args.warmup,
            rounds: effective.rounds(),
        }
    }
}

impl Cluster {
    /// Starts the processes; the only initiator of a benchmark is this process itself.
    pub(super) fn start(effective: &Effective) -> anyhow::Result<Self> {
        let topology = effective.topology;
        let link = || {
            if effective.args.in_process {
                Link::thread()
            } else {
                Link::process()
            }
        };
        let targets = (0..topology.targets)
            .map(|_| link())
            .collect::<anyhow::Result<_>>()?;
        let initiators = if topology.initiators == 1 {
            vec![Link::here()]
        } else {
            (0..topology.initiators)
                .map(|_| link())
                .collect::<anyhow::Result<_>>()?
        };
        Ok(Self {
            topology,
            initiators,
            targets,
            seed: effective.args.seed,
        })
    }

    /// Starts agents that offer one lane and connects them. Returns how to reach the first target
    /// and why the first initiator reaches it over this lane.
    pub(super) fn open(
        &mut self,
        lane: LaneName,
        effective: &Effective,
    ) -> anyhow::Result<(Address, String)> {
        let start =
            |links: &mut [Link], kind: &str, memory: &Memory| -> anyhow::Result<Vec<Address>> {
                for (i, link) in links.iter_mut().enumerate() {
                    link.send(Command::Start {
                        name: format!("bench-{kind}-{i}"),
                        lane,
                        memory: memory.clone(),
                        bytes: effective.bytes(),
                        settings: effective.settings,
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
        let targets = start(&mut self.targets, "target", &effective.args.to)?;
        let initiators = start(&mut self.initiators, "initiator", &effective.args.from)?;
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
    pub(super) fn describe(&mut self) -> anyhow::Result<Address> {
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

    /// Measures one case and checks that it moves every byte to its place, before the first run
    /// and after the last.
    pub(super) fn measure(
        &mut self,
        op: OpName,
        case: &Case,
        way: Way,
    ) -> anyhow::Result<Measured> {
        let lots = self.lots(case, way)?;
        if way.check {
            self.check(op, &lots, way)?;
        } else {
            self.fill(op, &lots)?;
        }

        if way.per_layer {
            self.drain()?;
        }
        let ran = self.run(op, &lots, way, 20, way.warmup, way.rounds)?;
        if way.per_layer {
            self.drained(case, &lots, way, &ran)?;
        }
        if way.check {
            self.check(op, &lots, way)?;
        }
        Ok(self.summarise(case, &lots, way, ran))
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
                op,
                lots: lots.clone(),
                threads: way.threads,
                prepared: way.prepared,
                per_layer: way.per_layer,
                post_cpu: way.post_cpu,
                makes,
                warmup,
                rounds,
            }))?;
        }
        // Every single transfer has a bound of its own; this is one for all of them.
        let longer = match rounds {
            Rounds::Exactly(rounds) => Duration::from_secs(1) * (rounds + warmup),
            Rounds::Within(micros) => Duration::from_micros(micros) * 8,
        };
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
        if way.per_layer {
            self.drain()?;
        }
        self.run(op, lots, way, 0, 0, Rounds::Exactly(1))?;
        if way.per_layer {
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
            match destination.ask(Command::Verify { side, seed })? {
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

    /// Every layer of every transfer must have brought its notification.
    fn drained(
        &mut self,
        case: &Case,
        lots: &[Vec<Lot>],
        way: Way,
        ran: &[Ran],
    ) -> anyhow::Result<()> {
        let warm: usize = lots.iter().map(Vec::len).sum();
        let measured: u64 = ran.iter().flat_map(|ran| &ran.rounds).sum();
        let transfers = measured + warm as u64 * u64::from(way.warmup);
        let expected = transfers * u64::from(case.shape.layers);
        let mut arrived = 0;
        for target in &mut self.targets {
            match target.ask(Command::Drained)? {
                Reply::Notifications { count } => arrived += count,
                other => return Err(unexpected(&other)),
            }
        }
        ensure!(
            arrived == expected,
            "{arrived} notifications arrived of {expected}"
        );
        Ok(())
    }

    fn summarise(&self, case: &Case, lots: &[Vec<Lot>], way: Way, ran: Vec<Ran>) -> Measured {
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
        Measured {
            bandwidth,
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
    pub(super) fn ping(&mut self, pings: &Pings) -> anyhow::Result<Samples> {
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
    pub(super) fn idle_cpu(&mut self, time: Duration) -> anyhow::Result<[f64; 2]> {
        let target = &mut self.targets[0];
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

fn remote_cpu(link: &mut Link) -> anyhow::Result<Duration> {
    match link.ask(Command::Cpu)? {
        Reply::Cpu { nanos } => Ok(Duration::from_nanos(nanos)),
        other => Err(unexpected(&other)),
    }
}

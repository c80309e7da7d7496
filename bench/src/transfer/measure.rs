//! Measuring one connection: bandwidth and latency of block transfers, notifications, idling.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use blockplane_transfer::{
    Agent, ArenaConfig, LocalBlocks, Notifications, Op, Peer, PostOptions, Prepared, RegionId,
    Registration, RemoteBlocks,
};

use super::{
    case::{Blocks, LaneName, OpName},
    limits::{another, gb_per_s},
    memory,
    peer::{self, Command, Link, PATIENCE, Reply, Settings},
};
use crate::report::Samples;

/// Our end of a connection over one lane.
#[derive(Debug)]
pub(super) struct Connection {
    agent: Agent,
    notifications: Notifications,
    arena: Registration,
    peer: Peer,
    region: RegionId,
    seed: u64,
}

/// Figures of one case.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    /// GB/s of each run.
    pub(super) bandwidth: Samples,
    /// Microseconds from post to completion of each run.
    pub(super) latency: Samples,
    /// Nanoseconds per block to prepare.
    pub(super) make: Samples,
    /// Nanoseconds per block to post.
    pub(super) post: Samples,
}

impl Connection {
    pub(super) fn open(
        link: &mut Link,
        lane: LaneName,
        arena_bytes: usize,
        settings: Settings,
        seed: u64,
    ) -> anyhow::Result<Self> {
        let reply = link.ask(Command::Start {
            lane,
            arena_bytes,
            settings,
        })?;
        let (metadata, region) = peer::started(&reply)?;
        let agent = peer::agent("bench-initiator", lane, settings)?;
        let arena = agent.allocate(ArenaConfig::new(arena_bytes, "bench-initiator"))?;
        let peer = agent
            .connect(&metadata, PATIENCE)
            .with_context(|| format!("cannot connect over {}", lane.as_str()))?;
        ensure!(
            peer.lane().lane == lane.lane(),
            "asked for {}, got {}: {}",
            lane.as_str(),
            peer.lane().lane,
            peer.lane().reason
        );
        link.tell(Command::Connect {
            metadata: peer::to_hex(&agent.metadata().to_bytes()),
        })?;
        Ok(Self {
            notifications: agent.notifications(),
            agent,
            arena,
            peer,
            region,
            seed,
        })
    }

    /// Why this way was chosen, for people.
    pub(super) fn reason(&self) -> String {
        self.peer.lane().reason
    }

    /// Measures one case and checks that it moves every byte to its place, before the first run
    /// and after the last.
    pub(super) fn measure(
        &mut self,
        link: &mut Link,
        op: OpName,
        blocks: &Blocks,
        budget: Duration,
    ) -> anyhow::Result<Measured> {
        let mut make = Samples::default();
        let mut prepared = None;
        for _ in 0..5 {
            let start = Instant::now();
            prepared = Some(self.prepare(op.op(), blocks)?);
            make.push(per_block(start.elapsed(), blocks));
        }
        let prepared = prepared.context("prepared five times")?;
        self.check(link, op, blocks, &prepared)?;

        let mut measured = Measured {
            bandwidth: Samples::default(),
            latency: Samples::default(),
            make,
            post: Samples::default(),
        };
        run(&prepared)?;
        let start = Instant::now();
        while another(start.elapsed(), budget, measured.latency.len()) {
            let (posted, took) = run(&prepared)?;
            measured.post.push(per_block(posted, blocks));
            measured.latency.push(took.as_secs_f64() * 1e6);
            measured.bandwidth.push(gb_per_s(blocks.bytes(), took));
        }
        self.check(link, op, blocks, &prepared)?;
        Ok(measured)
    }

    /// One-way latency of notifications in microseconds: half of a round trip. With `blocks`, each
    /// one follows a write of these.
    pub(super) fn notifications(
        &self,
        link: &mut Link,
        blocks: Option<&Blocks>,
        count: u32,
    ) -> anyhow::Result<Samples> {
        let prepared = blocks
            .map(|blocks| self.prepare(Op::Write, blocks))
            .transpose()?;
        let mut samples = Samples::default();
        let warmup = count / 10;
        link.send(Command::Echo {
            count: count + warmup,
        })?;
        for i in 0..count + warmup {
            let payload = i.to_le_bytes().to_vec();
            let start = Instant::now();
            let transfer = match &prepared {
                None => self.agent.notify(&self.peer, payload, PATIENCE)?,
                Some(prepared) => prepared.post(PostOptions::within(PATIENCE).notify(payload))?,
            };
            let pong = self.notifications.recv_timeout(PATIENCE)?;
            let round_trip = start.elapsed();
            ensure!(
                *pong.payload == i.to_le_bytes(),
                "notifications out of order"
            );
            transfer.wait(PATIENCE)?;
            if i >= warmup {
                samples.push(round_trip.as_secs_f64() * 1e6 / 2.0);
            }
        }
        let done = link.answer()?;
        ensure!(matches!(done, Reply::Done), "unexpected answer {done:?}");
        Ok(samples)
    }

    /// Processor time of this and of the other process while connected and idle, in percent of one
    /// core.
    pub(super) fn idle_cpu(&self, link: &mut Link, time: Duration) -> anyhow::Result<[f64; 2]> {
        let remote_before = remote_cpu(link)?;
        let local_before = peer::process_cpu();
        let start = Instant::now();
        // Nobody sends: this parks the thread for the whole time.
        ensure!(
            self.notifications.recv_timeout(time).is_err(),
            "a notification that nobody sent"
        );
        let elapsed = start.elapsed().as_secs_f64();
        let local = peer::process_cpu() - local_before;
        let remote = remote_cpu(link)?.saturating_sub(remote_before);
        Ok([local, remote].map(|used| used.as_secs_f64() / elapsed * 100.0))
    }

    fn prepare(&self, op: Op, blocks: &Blocks) -> anyhow::Result<Prepared> {
        Ok(self.agent.prepare(
            op,
            LocalBlocks {
                registration: &self.arena,
                layout: blocks.layout(),
                ids: blocks.local.clone().into(),
                layers: 0..1,
            },
            RemoteBlocks {
                peer: &self.peer,
                region: self.region,
                layout: blocks.layout(),
                ids: blocks.remote.clone().into(),
                layers: 0..1,
                window: None,
            },
        )?)
    }

    /// Moves a fresh pattern onto cleared blocks and compares.
    fn check(
        &mut self,
        link: &mut Link,
        op: OpName,
        blocks: &Blocks,
        prepared: &Prepared,
    ) -> anyhow::Result<()> {
        self.seed = self.seed.wrapping_add(1);
        let seed = self.seed;
        let block_bytes = blocks.block_bytes as usize;
        let ids = blocks.remote.to_vec();
        let wrong = match op {
            OpName::Write => {
                link.tell(Command::Clear {
                    block_bytes,
                    ids: ids.clone(),
                })?;
                memory::fill(&self.arena, block_bytes, &blocks.local, seed);
                run(prepared)?;
                let reply = link.ask(Command::Verify {
                    block_bytes,
                    ids,
                    seed,
                })?;
                let Reply::Mismatches { blocks } = reply else {
                    anyhow::bail!("unexpected answer {reply:?}");
                };
                blocks
            }
            OpName::Read => {
                link.tell(Command::Fill {
                    block_bytes,
                    ids,
                    seed,
                })?;
                memory::clear(&self.arena, block_bytes, &blocks.local);
                run(prepared)?;
                memory::mismatches(&self.arena, block_bytes, &blocks.local, seed)
            }
        };
        ensure!(
            wrong == 0,
            "{wrong} of {} blocks have the wrong contents after a {}",
            blocks.count(),
            op.as_str()
        );
        Ok(())
    }
}

/// Posts and waits; returns the time until posted and until complete.
fn run(prepared: &Prepared) -> anyhow::Result<(Duration, Duration)> {
    let start = Instant::now();
    let transfer = prepared.post(PostOptions::within(PATIENCE))?;
    let posted = start.elapsed();
    transfer.wait(PATIENCE)?;
    Ok((posted, start.elapsed()))
}

fn remote_cpu(link: &mut Link) -> anyhow::Result<Duration> {
    match link.ask(Command::Cpu)? {
        Reply::Cpu { nanos } => Ok(Duration::from_nanos(nanos)),
        other => anyhow::bail!("unexpected answer {other:?}"),
    }
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53 blocks")]
fn per_block(took: Duration, blocks: &Blocks) -> f64 {
    took.as_secs_f64() * 1e9 / blocks.count() as f64
}

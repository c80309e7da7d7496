//! Many transfers at once, from several threads: ended, cancelled and dropped in any order, and regions
//! closed under them.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail, ensure};
use blockplane_transfer::{
    Agent, BlockLayout, CancelOutcome, CompletionQueue, Descriptor, LocalBlocks, Op, Peer,
    PostOptions, Prepared, RegionId, Registration, RemoteBlocks, RemoteDescriptor, Transfer,
    TransferError,
};

use super::{
    case,
    link::{Command, Link},
    node::Node,
    place::Place,
    random::{Random, contents},
    world::{Outcome, PEER_LOSS, Pair, Processes, WAIT, World},
};

const SOURCE: u32 = 8;
const TARGET: u32 = 9;
const THREADS: usize = 8;
/// In flight at one time, of each thread.
const EACH: usize = 25;
const ROUNDS: usize = 4;
/// A transfer has its own part of the regions; what it does not use of it is to stay as it was.
const SLOT: usize = 256 << 10;
const ROOM: usize = SLOT * THREADS * EACH;

/// What becomes of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Waited,
    Queued,
    Cancelled,
    Dropped,
}

/// A transfer in flight.
struct Flight {
    fate: Fate,
    transfer: Option<Transfer>,
    /// Where it writes.
    start: usize,
    bytes: usize,
    token: u64,
}

/// What a thread works with.
struct Bench<'a> {
    agent: &'a Agent,
    peer: &'a Peer,
    source: &'a Registration,
    target: &'a Registration,
    region: RegionId,
}

/// Eight threads with 25 transfers each in flight.
pub(super) fn at_once(
    world: &World,
    name: &str,
    (local, remote): (Place, Place),
) -> anyhow::Result<Outcome> {
    let last = local.device().max(remote.device());
    if let Some(skipped) = world.lacks(last.map_or(0, |device| device + 1)) {
        return Ok(skipped);
    }
    let teller = world.teller.clone();
    let mut pair = world.fresh_pair(Processes::One, PEER_LOSS, &[])?;
    pair.me.make(SOURCE, local, ROOM)?;
    let region = RegionId(pair.other.make(TARGET, remote, ROOM)?);
    let source = pair.me.fill(SOURCE, world.seed)?;
    let mut done = 0;
    {
        let Link::Here(other) = &pair.other else {
            bail!("the other side is to be in this process");
        };
        let bench = Bench {
            agent: pair.me.agent()?,
            peer: &pair.peer,
            source: pair.me.region(SOURCE)?,
            target: other.region(TARGET)?,
            region,
        };
        for round in 0..ROUNDS {
            teller.doing(format!("round {round} of {ROUNDS}"));
            other.fill(TARGET, world.seed + 1 + round as u64)?;
            let results: Vec<_> = thread::scope(|scope| {
                let threads: Vec<_> = (0..THREADS)
                    .map(|index| {
                        let random = Random::new(world.seed, &format!("{name} {round} {index}"));
                        let (bench, source) = (&bench, &source);
                        let before = contents(
                            world.seed + 1 + round as u64,
                            (index * EACH * SLOT) as u64,
                            EACH * SLOT,
                        );
                        scope.spawn(move || bench.thread(index, random, source, before))
                    })
                    .collect();
                threads
                    .into_iter()
                    .map(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?)
                    .collect()
            });
            for result in results {
                done += result?;
            }
        }
    }
    teller.doing("close regions");
    pair.me.remove(SOURCE)?;
    pair.other.tell(Command::Remove { key: TARGET })?;
    Ok(Outcome::Passed(format!(
        "{done} of {} ended well",
        THREADS * EACH * ROUNDS
    )))
}

impl Bench<'_> {
    /// One round of one thread, with its part of the regions. Returns how many transfers ended well.
    fn thread(
        &self,
        index: usize,
        mut random: Random,
        source: &[u8],
        mut expected: Vec<u8>,
    ) -> anyhow::Result<usize> {
        let base = index * EACH * SLOT;
        let queue = self.agent.completion_queue(EACH)?;
        let mut flights = Vec::new();
        for slot in 0..EACH {
            flights.push(self.post(&mut random, base + slot * SLOT, slot as u64, &queue)?);
        }
        let mut well = 0;
        // Bytes that may be either the old or the new ones.
        let mut open = Vec::new();
        let mut tokens = Vec::new();
        for mut flight in flights {
            let range = flight.start..flight.start + flight.bytes;
            let mine = range.start - base..range.end - base;
            let ended = match (flight.fate, flight.transfer.take()) {
                (Fate::Waited, Some(transfer)) => {
                    transfer.wait(WAIT)?;
                    true
                }
                (Fate::Cancelled, Some(transfer)) => {
                    let began = Instant::now();
                    let outcome = transfer.cancel();
                    let took = began.elapsed();
                    ensure!(took < Duration::from_secs(2), "cancelling took {took:?}");
                    match outcome {
                        CancelOutcome::Completed => {}
                        CancelOutcome::Cancelled => {
                            // The blocks are free: what is put there now stays.
                            let canary = contents(random.next(), 0, flight.bytes);
                            self.target.write_at(range.start as u64, &canary)?;
                            expected[mine.clone()].copy_from_slice(&canary);
                            continue;
                        }
                        CancelOutcome::Failed(error) => return Err(error.into()),
                    }
                    true
                }
                (Fate::Queued | Fate::Dropped, transfer) => {
                    if flight.fate == Fate::Queued
                        && let Some(transfer) = transfer
                    {
                        transfer.detach();
                    }
                    tokens.push((flight.token, flight.fate, range.clone()));
                    false
                }
                (fate, None) => bail!("{fate:?}: no transfer"),
            };
            if ended {
                well += 1;
                expected[mine].copy_from_slice(&source[range]);
            }
        }
        for _ in 0..tokens.len() {
            let ended = queue.wait_timeout(WAIT).context("nothing ended")?;
            let found = tokens.iter().find(|(token, ..)| *token == ended.token);
            let (_, fate, range) = found.context("an end of nothing")?;
            let mine = range.start - base..range.end - base;
            match (fate, ended.outcome) {
                (_, Ok(())) => {
                    well += 1;
                    expected[mine].copy_from_slice(&source[range.clone()]);
                }
                (Fate::Dropped, Err(TransferError::Cancelled)) => open.push(mine),
                (fate, Err(error)) => return Err(error).with_context(|| format!("{fate:?}")),
            }
        }
        let mut found = vec![0; EACH * SLOT];
        self.target.read_at(base as u64, &mut found)?;
        for mine in open {
            found[mine.clone()].copy_from_slice(&expected[mine]);
        }
        match case::difference(&expected, &found, &[]) {
            Some(text) => bail!("thread {index}, from {base} on: {text}"),
            None => Ok(well),
        }
    }

    fn post(
        &self,
        random: &mut Random,
        slot: usize,
        token: u64,
        queue: &CompletionQueue,
    ) -> anyhow::Result<Flight> {
        let unit = if random.chance(50) { 1 } else { 16 };
        let bytes = (random.between(16, SLOT as u64 - 64) / unit * unit).max(1);
        let start = slot as u64 + random.between(0, SLOT as u64 - bytes) / unit * unit;
        let fate = match random.next() % 5 {
            0 | 1 => Fate::Waited,
            2 => Fate::Queued,
            3 => Fate::Cancelled,
            _ => Fate::Dropped,
        };
        let prepared = self.prepare(start, bytes)?;
        let mut options = PostOptions::within(WAIT);
        if matches!(fate, Fate::Queued | Fate::Dropped) {
            options = options.complete_to(queue, token);
        }
        let transfer = prepared.post(options)?;
        let transfer = match fate {
            Fate::Dropped => {
                drop(transfer);
                None
            }
            Fate::Waited | Fate::Queued | Fate::Cancelled => Some(transfer),
        };
        Ok(Flight {
            fate,
            transfer,
            start: usize::try_from(start)?,
            bytes: usize::try_from(bytes)?,
            token,
        })
    }

    /// The same bytes on both sides.
    fn prepare(&self, offset: u64, bytes: u64) -> anyhow::Result<Prepared> {
        let local = Descriptor {
            registration: self.source,
            offset,
            bytes,
        };
        let remote = RemoteDescriptor {
            region: self.region,
            offset,
            window: None,
        };
        Ok(self
            .agent
            .prepare_descriptors(Op::Write, &[local], self.peer, &[remote])?)
    }
}

/// Regions are closed while transfers that name them run: they end, and the memory goes when nobody uses it.
pub(super) fn closed_under(
    world: &World,
    (local, remote): (Place, Place),
) -> anyhow::Result<Outcome> {
    const BYTES: usize = 64 << 20;
    const TIMES: usize = 20;
    const IN_FLIGHT: usize = 4;
    let last = local.device().max(remote.device());
    if let Some(skipped) = world.lacks(last.map_or(0, |device| device + 1)) {
        return Ok(skipped);
    }
    let teller = world.teller.clone();
    let mut pair = world.fresh_pair(Processes::One, PEER_LOSS, &[])?;
    let mut whole = 0;
    for time in 0..TIMES {
        teller.doing(format!("time {time} of {TIMES}"));
        pair.me.make(SOURCE, local, BYTES)?;
        let region = RegionId(pair.other.make(TARGET, remote, BYTES)?);
        let Pair { peer, me, other } = &mut pair;
        // Handles would keep the regions.
        let queue = me.agent()?.completion_queue(IN_FLIGHT)?;
        for token in 0..IN_FLIGHT {
            slow(me, peer, region, BYTES, (&queue, token as u64))?;
        }
        // The owner of either side first.
        if time.is_multiple_of(2) {
            me.remove(SOURCE).context("the source")?;
            other
                .tell(Command::Remove { key: TARGET })
                .context("the target")?;
        } else {
            other
                .tell(Command::Remove { key: TARGET })
                .context("the target")?;
            me.remove(SOURCE).context("the source")?;
        }
        for _ in 0..IN_FLIGHT {
            match queue.wait_timeout(WAIT).context("nothing ended")?.outcome {
                Ok(()) => whole += 1,
                // The owner took it away.
                Err(TransferError::Rejected(_) | TransferError::Inaccessible { .. }) => {}
                Err(error) => return Err(error).context("a transfer whose region was closed"),
            }
        }
    }
    Ok(Outcome::Passed(format!(
        "{whole} of {} transfers ended well",
        IN_FLIGHT * TIMES
    )))
}

/// A WRITE of everything on one multiprocessor.
fn slow(
    node: &Node,
    peer: &Peer,
    region: RegionId,
    bytes: usize,
    (queue, token): (&CompletionQueue, u64),
) -> anyhow::Result<()> {
    let blocks = u32::try_from(bytes / 65536)?;
    let layout = BlockLayout::contiguous(blocks, 65536);
    let ids: std::sync::Arc<[u32]> = (0..blocks).rev().collect();
    let local = LocalBlocks {
        registration: node.region(SOURCE)?,
        layout,
        ids: ids.into(),
        layers: 0..1,
    };
    let ids: std::sync::Arc<[u32]> = (0..blocks).rev().map(|id| id ^ 1).collect();
    let remote = RemoteBlocks {
        peer,
        region,
        layout,
        ids: ids.into(),
        layers: 0..1,
        window: None,
    };
    let prepared = node.agent()?.prepare(Op::Write, local, remote)?;
    let options = PostOptions::within(WAIT).sms(1);
    prepared.post(options.complete_to(queue, token))?.detach();
    Ok(())
}

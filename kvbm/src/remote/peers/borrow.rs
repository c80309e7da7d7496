//! The reader: asks for leases, reads, verifies, gives back.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use blockplane_protocol::TokenBlock;
use blockplane_transfer::{LocalBlocks, Op, Peer, PostOptions, RemoteBlocks, TransferError};

use super::{
    super::format::payload_seed,
    Core,
    codec::{Hello, LEASE_MAX, Lease, Message},
    count, link,
};
use crate::{
    store::StoreMemory,
    tier::{BlockOutcome, Invalid, MoveKind, MoveReport, MoveSpec, MovedBlock, Pending},
};

/// How often a request is repeated.
const REPEAT: Duration = Duration::from_millis(100);
/// How much longer than its time a read may take to be called off before it counts as pending.
const CALL_OFF: Duration = Duration::from_millis(200);

/// What comes back for a request.
pub(super) enum Reply {
    Lease(Lease),
    Refused(String),
}

/// A request, from when it is sent until its lease is given back. Its reply is taken once.
pub(super) struct Asked {
    pub(super) peer: Arc<str>,
    pub(super) to: Option<Sender<Reply>>,
}

/// The blocks of a move that one peer is asked for.
struct Group {
    name: Arc<str>,
    link: Peer,
    data: Peer,
    hello: Arc<Hello>,
    id: u64,
    /// Their places in the move.
    places: Vec<usize>,
    blocks: Vec<MovedBlock>,
    replies: Receiver<Reply>,
    reader: Option<Reader>,
}

/// A thread that reads what was leased.
struct Reader {
    thread: JoinHandle<()>,
    outcomes: Receiver<Vec<BlockOutcome>>,
    stop: Arc<AtomicBool>,
}

impl Core {
    /// Hands a reply to the move that waits for it. False when there is no such move.
    pub(super) fn reply(&self, peer: &Arc<str>, id: u64, reply: Reply) -> bool {
        let mut asks = self.asks.lock();
        let Some(asked) = asks.get_mut(&id).filter(|asked| asked.peer == *peer) else {
            return false;
        };
        if let Some(to) = asked.to.take() {
            // It gives the lease back if it does not want it any more.
            let _ = to.send(reply);
        }
        true
    }
}

pub(super) fn run(core: &Arc<Core>, spec: &MoveSpec) -> MoveReport {
    if spec.kind != MoveKind::RemoteToHost {
        let reason = format!("a peer tier does no moves {}", spec.kind);
        return MoveReport::failed(spec.blocks.len(), &reason);
    }
    let started = Instant::now();
    let deadline = started + spec.time;
    let mut outcomes: Vec<Option<BlockOutcome>> = vec![None; spec.blocks.len()];
    let mut groups = groups(core, &spec.blocks, &mut outcomes);
    let ask_until = deadline.min(Instant::now() + core.config.lease_wait);
    ask(core, &mut groups, ask_until, deadline, &mut outcomes);
    let mut pending = Vec::new();
    for group in groups {
        let Some(reader) = group.reader else { continue };
        let left = deadline.saturating_duration_since(Instant::now()) + CALL_OFF;
        match reader.outcomes.recv_timeout(left) {
            Ok(found) => {
                for (place, outcome) in group.places.iter().zip(found) {
                    outcomes[*place] = Some(outcome);
                }
            }
            Err(_) => {
                reader.stop.store(true, Ordering::Relaxed);
                pending.push(reader.thread);
            }
        }
    }
    let late = || BlockOutcome::Failed(format!("peers: not done within {:?}", spec.time));
    let outcomes: Vec<BlockOutcome> = outcomes
        .into_iter()
        .map(|outcome| outcome.unwrap_or_else(late))
        .collect();
    core.counters.read_times.lock().record(started.elapsed());
    let mut moved = 0;
    for (block, outcome) in spec.blocks.iter().zip(&outcomes) {
        let counters = &core.counters;
        match outcome {
            BlockOutcome::Moved => {
                moved += 1;
                count(&counters.read);
            }
            BlockOutcome::Invalid(Invalid::Missing) => count(&counters.missing),
            BlockOutcome::Invalid(invalid) => {
                count(&counters.invalid);
                let name = format_args!("{:016x}", block.name.sequence.0);
                tracing::warn!(%name, reason = ?invalid, "a block of a peer is not what it was said to be");
            }
            BlockOutcome::Failed(_) | BlockOutcome::Bad(_) => count(&counters.failed),
        }
    }
    let pending = (!pending.is_empty()).then(|| {
        Pending::new(move || {
            for thread in pending {
                // A reader that panicked reads no more.
                let _ = thread.join();
            }
        })
    });
    MoveReport {
        outcomes,
        pending,
        bytes: moved * core.host.layout().block_bytes() as u64,
        fault: None,
    }
}

/// Who is asked for what: as few peers as the blocks allow, found greedily.
fn groups(core: &Core, blocks: &[MovedBlock], outcomes: &mut [Option<BlockOutcome>]) -> Vec<Group> {
    let state = core.state.lock();
    let mut groups: Vec<Group> = Vec::new();
    let mut left: Vec<usize> = (0..blocks.len()).collect();
    while let Some(first) = left.first().copied() {
        let has = |name: &Arc<str>, place: usize| {
            let known = state.peers.get(name);
            known.is_some_and(|known| known.inbox.contains(blocks[place].name.sequence))
        };
        let best = state
            .peers
            .iter()
            .filter_map(|(name, known)| Some((name, known.usable()?)))
            .filter(|(name, _)| has(name, first))
            .max_by_key(|(name, _)| left.iter().filter(|place| has(name, **place)).count());
        let Some((name, (link, data, hello))) = best else {
            outcomes[first] = Some(BlockOutcome::Invalid(Invalid::Missing));
            left.remove(0);
            continue;
        };
        let mut places = Vec::new();
        left.retain(|place| {
            let takes = places.len() < LEASE_MAX && has(name, *place);
            if takes {
                places.push(*place);
            }
            !takes
        });
        let (to, replies) = channel();
        let id = core.next_ask.fetch_add(1, Ordering::Relaxed);
        let asked = Asked {
            peer: Arc::clone(name),
            to: Some(to),
        };
        core.asks.lock().insert(id, asked);
        groups.push(Group {
            name: Arc::clone(name),
            link: link.clone(),
            data: data.clone(),
            hello: Arc::new(hello.clone()),
            id,
            blocks: places.iter().map(|place| blocks[*place]).collect(),
            places,
            replies,
            reader: None,
        });
    }
    groups
}

/// Asks all peers at once and starts to read from each that answers.
fn ask(
    core: &Arc<Core>,
    groups: &mut [Group],
    until: Instant,
    deadline: Instant,
    outcomes: &mut [Option<BlockOutcome>],
) {
    let mut open: Vec<&mut Group> = groups.iter_mut().collect();
    let mut repeat_at = Instant::now();
    while !open.is_empty() {
        let now = Instant::now();
        if now >= repeat_at {
            repeat_at = now + REPEAT;
            let requests = open.iter().map(|group| {
                let left = deadline.saturating_duration_since(now) + CALL_OFF;
                let names: Vec<TokenBlock> = group.blocks.iter().map(|block| block.name).collect();
                let ask = Message::Ask {
                    id: group.id,
                    time_ms: u32::try_from(left.as_millis()).unwrap_or(u32::MAX),
                    names,
                };
                (group.link.clone(), ask)
            });
            link::send(core, requests.collect());
        }
        // The one that was asked first is waited for; others may have answered meanwhile.
        let wait = repeat_at
            .min(until)
            .saturating_duration_since(Instant::now());
        let mut wait = Some(wait.min(Duration::from_millis(if open.len() > 1 { 2 } else { 100 })));
        open.retain_mut(|group| {
            let reply = match group.replies.recv_timeout(wait.take().unwrap_or_default()) {
                Ok(reply) => reply,
                Err(RecvTimeoutError::Timeout) if Instant::now() < until => return true,
                Err(_) => {
                    give_up(core, group);
                    fail(group, outcomes, "no lease in time");
                    return false;
                }
            };
            match reply {
                Reply::Lease(lease) => {
                    if let Err(reason) = start(core, group, lease, deadline) {
                        release(core, &group.link, group.id);
                        fail(group, outcomes, &reason);
                    }
                }
                Reply::Refused(reason) => {
                    core.asks.lock().remove(&group.id);
                    fail(group, outcomes, &reason);
                }
            }
            false
        });
    }
}

fn fail(group: &Group, outcomes: &mut [Option<BlockOutcome>], reason: &str) {
    for place in &group.places {
        let reason = format!("peer '{}': {reason}", group.name);
        outcomes[*place] = Some(BlockOutcome::Failed(reason));
    }
}

/// A peer did not answer: it is not asked again before it has said something.
fn give_up(core: &Core, group: &Group) {
    release(core, &group.link, group.id);
    if let Some(known) = core.state.lock().peers.get_mut(&group.name) {
        known.silent = true;
    }
    core.wake();
}

fn release(core: &Core, link: &Peer, id: u64) {
    core.asks.lock().remove(&id);
    link::send(core, vec![(link.clone(), Message::Release { id })]);
}

/// Starts to read what was leased.
fn start(
    core: &Arc<Core>,
    group: &mut Group,
    lease: Lease,
    deadline: Instant,
) -> Result<(), String> {
    if lease.blocks.len() != group.blocks.len() {
        return Err(format!(
            "its lease has {} blocks; {} were asked for",
            lease.blocks.len(),
            group.blocks.len()
        ));
    }
    let (to, outcomes) = channel();
    let stop = Arc::new(AtomicBool::new(false));
    let job = Job {
        core: Arc::clone(core),
        name: Arc::clone(&group.name),
        link: group.link.clone(),
        data: group.data.clone(),
        hello: Arc::clone(&group.hello),
        blocks: group.blocks.clone(),
        deadline: deadline.min(Instant::now() + Duration::from_millis(lease.time_ms.into())),
        lease,
        stop: Arc::clone(&stop),
    };
    // Asking the peer about its window cannot be called off: that is not this thread's to wait for.
    let thread = thread::Builder::new()
        .name("kvbm-peers-read".to_owned())
        .spawn(move || job.run(&to))
        .map_err(|error| format!("cannot start a thread: {error}"))?;
    group.reader = Some(Reader {
        thread,
        outcomes,
        stop,
    });
    Ok(())
}

/// One lease that is being read.
struct Job {
    core: Arc<Core>,
    name: Arc<str>,
    link: Peer,
    data: Peer,
    hello: Arc<Hello>,
    blocks: Vec<MovedBlock>,
    lease: Lease,
    deadline: Instant,
    stop: Arc<AtomicBool>,
}

impl Job {
    fn run(self, to: &Sender<Vec<BlockOutcome>>) {
        let there = self.lease.blocks.iter().any(Option::is_some);
        let read = if there { self.read() } else { Ok(()) };
        release(&self.core, &self.link, self.lease.id);
        let memory = StoreMemory {
            registration: self.core.host.registration(),
            layout: self.core.host.transfer_layout(),
        };
        let outcomes = self
            .blocks
            .iter()
            .zip(&self.lease.blocks)
            .map(|(block, lent)| {
                let Some(lent) = lent else {
                    return BlockOutcome::Invalid(Invalid::Missing);
                };
                if let Err(reason) = &read {
                    return BlockOutcome::Failed(format!("peer '{}': {reason}", self.name));
                }
                let seed = payload_seed(block.name, &self.core.fingerprint);
                match memory.checksum(block.to, seed) {
                    Ok(found) if found == lent.checksum => BlockOutcome::Moved,
                    Ok(_) => BlockOutcome::Invalid(Invalid::Checksum),
                    Err(error) => BlockOutcome::Failed(error.to_string()),
                }
            });
        let outcomes: Vec<BlockOutcome> = outcomes.collect();
        let mut state = self.core.state.lock();
        if let Some(known) = state.peers.get_mut(&self.name) {
            for (block, outcome) in self.blocks.iter().zip(&outcomes) {
                if matches!(outcome, BlockOutcome::Invalid(_)) {
                    known.inbox.forget(block.name.sequence);
                }
            }
        }
        drop(state);
        // Nobody waits any more after the deadline.
        let _ = to.send(outcomes);
    }

    /// Copies what is leased; when it returns no byte of it moves any more.
    fn read(&self) -> Result<(), String> {
        let pairs = self.blocks.iter().zip(&self.lease.blocks);
        let (to, from): (Vec<u32>, Vec<u32>) = pairs
            .filter_map(|(block, lent)| Some((block.to, (*lent)?.block)))
            .unzip();
        let layout = self.core.host.transfer_layout();
        let layers = 0..layout.layers;
        let local = LocalBlocks {
            registration: self.core.host.registration(),
            layout,
            ids: to.into(),
            layers: layers.clone(),
        };
        let remote = RemoteBlocks {
            peer: &self.data,
            region: self.hello.region,
            layout: self.hello.layout,
            ids: from.into(),
            layers,
            window: Some(self.lease.window),
        };
        let prepared = self.core.agent.prepare(Op::Read, local, remote);
        let prepared = prepared.map_err(|error| error.to_string())?;
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || self.stop.load(Ordering::Relaxed) {
            return Err("no time is left to read".to_owned());
        }
        let transfer = prepared.post(PostOptions::within(left));
        let transfer = transfer.map_err(|error| error.to_string())?;
        match transfer.wait(left + CALL_OFF) {
            Err(error @ TransferError::StillInFlight { .. }) => {
                transfer.cancel();
                Err(error.to_string())
            }
            ended => ended.map_err(|error| error.to_string()),
        }
    }
}

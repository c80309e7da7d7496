//! Notifications come after the bytes: the process that gets one finds the end of the transfer in place.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use blockplane_transfer::{Descriptor, Notifications, Op, PostOptions, RegionId, RemoteDescriptor};

use super::{
    link::{Command, to_hex},
    node::Node,
    place::Place,
    random::{Random, contents},
    world::{Outcome, Pair, Processes, WAIT, World},
};

const SOURCE: u32 = 3;
const TARGET: u32 = 4;
/// Places on each side.
const SLOTS: u32 = 16;
/// Transfers in flight.
const DEPTH: usize = 4;
/// Bytes at the end of a transfer that are looked at.
const TAIL: usize = 64;
/// The answer to a notification takes no longer.
const ANSWER: Duration = Duration::from_secs(5);

/// How many transfers, and how large.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) count: u32,
    pub(super) slot_bytes: usize,
}

/// One transfer, as its notification tells it.
#[derive(Clone, Copy, Debug)]
struct Note {
    source: u32,
    target: u32,
    bytes: u32,
}

/// WRITEs into another process, which looks at each when it hears of it.
pub(super) fn check(
    world: &mut World,
    name: &str,
    (local, remote): (Place, Place),
    load: Load,
) -> anyhow::Result<Outcome> {
    let devices = local
        .device()
        .max(remote.device())
        .map_or(0, |device| device + 1);
    if let Some(skipped) = world.lacks(devices) {
        return Ok(skipped);
    }
    let mut random = Random::new(world.seed, name);
    let teller = world.teller.clone();
    let pair = world.pair(Processes::Two)?;
    teller.doing("make regions");
    let room = load.slot_bytes * SLOTS as usize;
    pair.me.make(SOURCE, local, room)?;
    let region = RegionId(pair.other.make(TARGET, remote, room)?);
    let seed = random.next();
    pair.me.fill(SOURCE, seed)?;
    let metadata = to_hex(&pair.me.agent()?.metadata().to_bytes());
    pair.other.tell(Command::Connect { metadata })?;
    pair.other.other()?.send(&Command::Watch {
        key: TARGET,
        slot_bytes: load.slot_bytes,
        seed,
        count: load.count,
    })?;
    teller.doing(format!("{} transfers", load.count));
    let answers = pair.me.agent()?.notifications();
    if let Err(error) = send_all(pair, &answers, region, load, &mut random) {
        // What the other side says is more to the point, if it says anything.
        let said = pair.other.other()?.answer(Duration::from_secs(1));
        let said = said.map_or_else(|error| format!("{error:#}"), |reply| format!("{reply:?}"));
        return Err(error.context(said));
    }
    pair.other.other()?.answer(ANSWER)?;
    teller.doing("close regions");
    pair.me.remove(SOURCE)?;
    pair.other.tell(Command::Remove { key: TARGET })?;
    Ok(Outcome::Passed(format!("{} transfers", load.count)))
}

fn send_all(
    pair: &Pair,
    answers: &Notifications,
    region: RegionId,
    load: Load,
    random: &mut Random,
) -> anyhow::Result<()> {
    let agent = pair.me.agent()?;
    let registration = pair.me.region(SOURCE)?;
    // What each place there has, so that it gets something else.
    let mut there = vec![SLOTS; SLOTS as usize];
    let mut in_flight = std::collections::VecDeque::new();
    for index in 0..load.count {
        if in_flight.len() == DEPTH {
            answered(answers, &mut in_flight)?;
        }
        let target = index % SLOTS;
        let mut source = random.count(0, SLOTS);
        if there[target as usize] == source {
            source = (source + 1) % SLOTS;
        }
        there[target as usize] = source;
        let bytes = random.between(1, load.slot_bytes as u64 + 1);
        let at = |slot: u32| u64::from(slot) * load.slot_bytes as u64;
        let local = Descriptor {
            registration,
            offset: at(source),
            bytes,
        };
        let remote = RemoteDescriptor {
            region,
            offset: at(target),
            window: None,
        };
        let note = Note {
            source,
            target,
            bytes: u32::try_from(bytes)?,
        };
        let prepared = agent.prepare_descriptors(Op::Write, &[local], &pair.peer, &[remote])?;
        let options = PostOptions::within(WAIT).notify(note.to_bytes());
        in_flight.push_back((index, prepared.post(options)?));
    }
    while !in_flight.is_empty() {
        answered(answers, &mut in_flight)?;
    }
    Ok(())
}

fn answered(
    answers: &Notifications,
    in_flight: &mut std::collections::VecDeque<(u32, blockplane_transfer::Transfer)>,
) -> anyhow::Result<()> {
    let answer = answers.recv_timeout(ANSWER);
    let (index, transfer) = in_flight.pop_front().context("nothing is in flight")?;
    answer.with_context(|| {
        format!(
            "no answer to transfer {index} within {ANSWER:?}, which is {:?}",
            transfer.status()
        )
    })?;
    transfer
        .wait(WAIT)
        .with_context(|| format!("transfer {index}, which was answered"))
}

/// The other side of it.
pub(super) fn watch(
    node: &Node,
    key: u32,
    slot_bytes: usize,
    seed: u64,
    count: u32,
) -> anyhow::Result<()> {
    let region = node.region(key)?;
    let agent = node.agent()?;
    let peer = node.peer.as_ref().context("not connected")?;
    let notes = agent.notifications();
    for index in 0..count {
        let note = notes
            .recv_timeout(WAIT)
            .with_context(|| format!("notification {index}"))?;
        let note = Note::from_bytes(&note.payload)?;
        let bytes = note.bytes as usize;
        let tail = bytes.min(TAIL);
        let start = bytes - tail;
        let from = note.source as usize * slot_bytes + start;
        // Contents are made from multiples of 8.
        let skip = from % 8;
        let expected = &contents(seed, (from - skip) as u64, tail + skip)[skip..];
        let at = (note.target as usize * slot_bytes + start) as u64;
        let mut found = vec![0; tail];
        region.read_at(at, &mut found)?;
        if found != expected {
            let early = to_hex(&found);
            std::thread::park_timeout(Duration::from_millis(100));
            region.read_at(at, &mut found)?;
            let later = if found == expected {
                "they were there 0.1 s later"
            } else {
                "nor 0.1 s later"
            };
            bail!(
                "notification {index} of {count} ({note:?}) came, its last {tail} bytes were not there, {later}: {early} instead of {}",
                to_hex(expected)
            );
        }
        agent
            .notify(peer, index.to_le_bytes().to_vec(), WAIT)?
            .detach();
    }
    Ok(())
}

impl Note {
    fn to_bytes(self) -> Vec<u8> {
        [self.source, self.target, self.bytes]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect()
    }

    fn from_bytes(bytes: &[u8]) -> anyhow::Result<Self> {
        let (words, rest) = bytes.as_chunks::<4>();
        ensure!(
            words.len() == 3 && rest.is_empty(),
            "a strange notification: {bytes:?}"
        );
        let word = |index: usize| u32::from_le_bytes(words[index]);
        Ok(Self {
            source: word(0),
            target: word(1),
            bytes: word(2),
        })
    }
}

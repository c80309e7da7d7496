//! What is left behind: device memory, descriptors, and work that nobody asked for.

use std::time::Duration;

use anyhow::{Context, ensure};
use blockplane_transfer::{Descriptor, Op, PostOptions, RegionId, RemoteDescriptor};

use super::{
    link::Command,
    place::Place,
    raw::free_bytes,
    world::{Outcome, PEER_LOSS, Pair, Processes, WAIT, World},
};

const SOURCE: u32 = 10;
const TARGET: u32 = 20;
const BYTES: usize = 4 << 20;
/// Rounds before anything is counted: contexts, kernels, streams and tables stay.
const WARM: usize = 10;

/// What this process and the devices hold.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Holds {
    free: Vec<u64>,
    descriptors: usize,
    threads: usize,
}

impl Holds {
    fn now(world: &World) -> anyhow::Result<Self> {
        let count = |what: &str| -> anyhow::Result<usize> {
            Ok(std::fs::read_dir(format!("/proc/self/{what}"))?.count())
        };
        let free = world
            .devices
            .iter()
            .map(|device| free_bytes(device.ordinal));
        Ok(Self {
            free: free.collect::<anyhow::Result<_>>()?,
            descriptors: count("fd")?,
            threads: count("task")?,
        })
    }

    /// What there is less or more of than before; nothing when everything is back.
    fn lost_since(&self, before: &Self) -> Option<String> {
        // The driver allocates for itself in units of 2 MiB. What leaks in every round is far more.
        const SLACK: u64 = 8 << 20;
        let mut text = String::new();
        for (device, (now, before)) in self.free.iter().zip(&before.free).enumerate() {
            let lost = before.saturating_sub(*now);
            if lost > SLACK {
                text.push_str(&format!("{lost} bytes of cuda:{device}; "));
            }
        }
        let more = [
            ("descriptors", self.descriptors, before.descriptors),
            ("threads", self.threads, before.threads),
        ];
        for (what, now, before) in more {
            if now > before {
                text.push_str(&format!("{} {what}; ", now - before));
            }
        }
        (!text.is_empty()).then_some(text)
    }
}

/// Rounds of making, connecting, moving and closing, after which everything is back.
pub(super) fn rounds(world: &World, processes: Processes, times: usize) -> anyhow::Result<Outcome> {
    let teller = world.teller.clone();
    let second = u32::from(world.devices.len() > 1);
    let places = [
        Place::File(0),
        Place::Handle(0),
        Place::Foreign(second),
        Place::File(second),
        Place::Pinned,
    ];
    // One process for all rounds: that it ends gives everything back is the system's work.
    let mut pair = world.fresh_pair(processes, PEER_LOSS, &[])?;
    let mut before = None;
    for time in 0..WARM + times {
        if time == WARM {
            before = Some(Holds::now(world)?);
        }
        teller.doing(format!("round {time} of {}", WARM + times));
        round(&mut pair, &places, time).with_context(|| format!("round {time}"))?;
    }
    let before = before.context("no rounds")?;
    teller.doing("wait until everything is back");
    let mut lost = None;
    for _ in 0..50 {
        lost = Holds::now(world)?.lost_since(&before);
        if lost.is_none() {
            return Ok(Outcome::Passed(format!("{times} rounds")));
        }
        // Threads that were told to end do so at their leisure.
        std::thread::park_timeout(Duration::from_millis(50));
    }
    ensure!(
        lost.is_none(),
        "after {times} rounds there are lost or left: {}",
        lost.unwrap_or_default()
    );
    Ok(Outcome::Passed(format!("{times} rounds")))
}

fn round(pair: &mut Pair, places: &[Place], time: usize) -> anyhow::Result<()> {
    let name = format!("selftest-leaks-{}-{time}", std::process::id());
    pair.me.start(&name, PEER_LOSS, false)?;
    pair.other.tell(Command::Start {
        name: format!("{name}-other"),
        peer_loss_ms: u64::try_from(PEER_LOSS.as_millis())?,
        pull: false,
    })?;
    pair.peer = pair.me.agent()?.connect(&pair.other.describe()?, WAIT)?;
    for (key, &place) in (0..).zip(places) {
        pair.me.make(SOURCE + key, place, BYTES)?;
    }
    for (key, &place) in (0..).zip(places.iter().rev()) {
        let region = RegionId(pair.other.make(TARGET + key, place, BYTES)?);
        let registration = pair.me.region(SOURCE + key)?;
        if registration.device().is_none() && place.device().is_none() {
            continue;
        }
        for op in [Op::Write, Op::Read] {
            let local = Descriptor {
                registration,
                offset: 16,
                bytes: 100_000,
            };
            let remote = RemoteDescriptor {
                region,
                offset: 32,
                window: None,
            };
            let agent = pair.me.agent()?;
            let prepared = agent.prepare_descriptors(op, &[local], &pair.peer, &[remote])?;
            prepared.post(PostOptions::within(WAIT))?.wait(WAIT)?;
        }
    }
    // By turns: the owner of the remote memory goes first, or the one who used it.
    for (key, _) in (0..).zip(places) {
        if time.is_multiple_of(2) {
            pair.other.tell(Command::Remove { key: TARGET + key })?;
            pair.me.remove(SOURCE + key)?;
        } else {
            pair.me.remove(SOURCE + key)?;
            pair.other.tell(Command::Remove { key: TARGET + key })?;
        }
    }
    pair.peer.disconnect();
    Ok(())
}

/// Agents with regions on devices and without work use no processor.
pub(super) fn idle(world: &mut World) -> anyhow::Result<Outcome> {
    const TIME: Duration = Duration::from_secs(2);
    /// One per cent of a core, for heartbeats and the driver's own threads.
    const MOST: Duration = Duration::from_millis(20);
    let teller = world.teller.clone();
    world.reset();
    let mut pair = world.fresh_pair(Processes::One, PEER_LOSS, &[])?;
    let second = u32::from(world.devices.len() > 1);
    round_once(
        &mut pair,
        &[Place::File(0), Place::Handle(second), Place::Pinned],
    )?;
    teller.doing("be idle");
    // What follows a transfer is over soon.
    std::thread::park_timeout(Duration::from_millis(300));
    let before = process_cpu();
    std::thread::park_timeout(TIME);
    let used = process_cpu().saturating_sub(before);
    ensure!(
        used < MOST,
        "{used:?} of processor time in {TIME:?} without work"
    );
    Ok(Outcome::Passed(format!("{used:?} in {TIME:?}")))
}

/// Makes regions, uses them once, and leaves them there.
fn round_once(pair: &mut Pair, places: &[Place]) -> anyhow::Result<()> {
    for (key, &place) in (0..).zip(places) {
        pair.me.make(SOURCE + key, place, BYTES)?;
        let region = RegionId(pair.other.make(TARGET + key, Place::File(0), BYTES)?);
        let local = Descriptor {
            registration: pair.me.region(SOURCE + key)?,
            offset: 0,
            bytes: BYTES as u64,
        };
        let remote = RemoteDescriptor {
            region,
            offset: 0,
            window: None,
        };
        let agent = pair.me.agent()?;
        let prepared = agent.prepare_descriptors(Op::Write, &[local], &pair.peer, &[remote])?;
        prepared.post(PostOptions::within(WAIT))?.wait(WAIT)?;
    }
    Ok(())
}

fn process_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

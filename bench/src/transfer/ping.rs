//! Round trips of notifications, alone or each behind a write, between two processes.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use blockplane_transfer::{Notification, Op, PostOptions, Prepared, Transfer};
use serde::{Deserialize, Serialize};

use super::{
    case::Lot,
    link::PATIENCE,
    node::{Active, Remote},
};

/// What both sides of a ping-pong are told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Pings {
    /// Measured round trips.
    pub(super) count: u32,
    /// Unmeasured ones before.
    pub(super) warmup: u32,
    /// How receivers wait.
    pub(super) receiver: Receiver,
    /// Each notification follows a write of this.
    pub(super) write: Option<Lot>,
}

/// How a receiver waits for the next notification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Receiver {
    /// It looks again and again.
    Spinning,
    /// It waits with a deadline, and the next notification comes at once: how long it looks before
    /// it sleeps has adapted.
    Waiting,
    /// Likewise, with so long a pause before each round trip that both sides are asleep.
    Asleep,
}

impl Receiver {
    pub(super) const ALL: [Self; 3] = [Self::Spinning, Self::Waiting, Self::Asleep];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Spinning => "spinning",
            Self::Waiting => "waiting",
            Self::Asleep => "asleep",
        }
    }

    const fn pause(self) -> Duration {
        match self {
            Self::Spinning | Self::Waiting => Duration::ZERO,
            Self::Asleep => Duration::from_millis(3),
        }
    }
}

/// Half of each round trip, in microseconds.
pub(super) fn ping(node: &Active, pings: &Pings) -> anyhow::Result<Vec<f64>> {
    let side = Side::new(node, pings)?;
    let mut micros = Vec::new();
    for i in 0..pings.count + pings.warmup {
        let until = Instant::now() + pings.receiver.pause();
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            std::thread::park_timeout(left);
        }
        let start = Instant::now();
        let sent = side.send(i.to_le_bytes().to_vec())?;
        let pong = side.receive()?;
        let round_trip = start.elapsed();
        ensure!(
            *pong.payload == i.to_le_bytes(),
            "notifications out of order"
        );
        sent.wait(PATIENCE)?;
        if i >= pings.warmup {
            micros.push(round_trip.as_secs_f64() * 1e6 / 2.0);
        }
    }
    Ok(micros)
}

/// Answers each notification in kind.
pub(super) fn echo(node: &Active, pings: &Pings) -> anyhow::Result<()> {
    let side = Side::new(node, pings)?;
    let mut last: Option<Transfer> = None;
    for _ in 0..pings.count + pings.warmup {
        let ping = side.receive()?;
        let sent = side.send(ping.payload.to_vec())?;
        // The earlier answer was received long ago: its successor was asked for.
        if let Some(earlier) = last.replace(sent) {
            earlier.wait(PATIENCE)?;
        }
    }
    if let Some(last) = last {
        last.wait(PATIENCE)?;
    }
    Ok(())
}

struct Side<'a> {
    node: &'a Active,
    remote: &'a Remote,
    prepared: Option<Prepared>,
    receiver: Receiver,
}

impl<'a> Side<'a> {
    fn new(node: &'a Active, pings: &Pings) -> anyhow::Result<Self> {
        let prepared = pings
            .write
            .as_ref()
            .map(|lot| node.prepare(Op::Write, lot, 0..lot.local.shape.layers))
            .transpose()?;
        Ok(Self {
            node,
            remote: node.peers.first().context("not connected")?,
            prepared,
            receiver: pings.receiver,
        })
    }

    fn send(&self, payload: Vec<u8>) -> anyhow::Result<Transfer> {
        Ok(match &self.prepared {
            None => self
                .node
                .agent
                .notify(&self.remote.peer, payload, PATIENCE)?,
            Some(prepared) => prepared.post(PostOptions::within(PATIENCE).notify(payload))?,
        })
    }

    fn receive(&self) -> anyhow::Result<Notification> {
        if self.receiver != Receiver::Spinning {
            return Ok(self.node.notifications.recv_timeout(PATIENCE)?);
        }
        // The clock is looked at only now and then. Whoever is late lets other threads run, which
        // may be those that bring the notification.
        const LOOKS: u32 = 1024;
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            for _ in 0..LOOKS {
                if let Some(notification) = self.node.notifications.try_recv()? {
                    return Ok(notification);
                }
                std::hint::spin_loop();
            }
            std::thread::yield_now();
        }
        bail!("no notification in {PATIENCE:?}")
    }
}

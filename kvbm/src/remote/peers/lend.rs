//! The lender: holds blocks of G2 and a window over them until the reader is done, late or lost.

use std::{
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use blockplane_protocol::TokenBlock;
use blockplane_transfer::{Window, WindowAccess, WindowBusy, WindowId, WindowScope};

use super::{
    super::format::payload_seed,
    Core,
    codec::{Lease, Lent as LentBlock, Message},
    count, link,
};
use crate::{block::ImmutableBlock, store::StoreMemory};

/// Leases of one peer at a time.
const LEASES_PER_PEER: usize = 64;
/// How often it is tried again to end a lease whose blocks may still be read.
const QUIET_EVERY: Duration = Duration::from_millis(20);

pub(super) enum Command {
    Ask {
        peer: Arc<str>,
        id: u64,
        time_ms: u32,
        names: Vec<TokenBlock>,
    },
    Release {
        peer: Arc<str>,
        id: u64,
    },
    /// Its leases end.
    Lost(Arc<str>),
    /// The tier was dropped.
    Stop,
}

/// A lease in force, or one that ends.
struct Open {
    peer: Arc<str>,
    lease: Lease,
    until: Instant,
    window: Option<Window>,
    /// Held until no read can be under way.
    blocks: Vec<ImmutableBlock>,
    ended: bool,
}

/// Serves requests until the tier is dropped.
pub(super) fn lend(core: &Core, commands: &Receiver<Command>) {
    let mut open: Vec<Open> = Vec::new();
    let mut stopping = false;
    loop {
        let now = Instant::now();
        let next = open.iter().map(|lease| match lease.ended {
            true => now + QUIET_EVERY,
            false => lease.until,
        });
        let command = match next.min() {
            None if stopping => return,
            None => commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(at) => commands.recv_timeout(at.saturating_duration_since(now)),
        };
        match command {
            Ok(Command::Ask {
                peer,
                id,
                time_ms,
                names,
            }) => {
                let answer = grant(core, &mut open, &peer, id, time_ms, &names);
                let answer = answer.unwrap_or_else(|reason| {
                    count(&core.counters.refused);
                    Message::Refused { id, reason }
                });
                let link = core
                    .state
                    .lock()
                    .peers
                    .get(&peer)
                    .and_then(|known| known.link.clone());
                link::send(core, link.map(|link| (link, answer)).into_iter().collect());
            }
            Ok(Command::Release { peer, id }) => {
                let its = |lease: &&mut Open| lease.peer == peer && lease.lease.id == id;
                open.iter_mut()
                    .filter(its)
                    .for_each(|lease| lease.ended = true);
            }
            Ok(Command::Lost(peer)) => {
                let its = |lease: &&mut Open| lease.peer == peer;
                open.iter_mut()
                    .filter(its)
                    .for_each(|lease| lease.ended = true);
            }
            Ok(Command::Stop) | Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
            }
        }
        stopping |= core.state.lock().stopping;
        let now = Instant::now();
        open.retain_mut(|lease| {
            if !lease.ended && now >= lease.until {
                count(&core.counters.expired);
                tracing::debug!(peer = %lease.peer, id = lease.lease.id, "a lease of KV blocks ends by its time");
                lease.ended = true;
            }
            lease.ended |= stopping;
            !(lease.ended && quiet(lease))
        });
        let lent = Lent::of(open.iter());
        let held = (lent.in_force + lent.overdue) as u64;
        core.counters.held.store(held, Ordering::Relaxed);
        let overdue = lent.overdue as u64;
        core.counters.overdue.store(overdue, Ordering::Relaxed);
    }
}

/// Blocks that are lent, to one peer or to all.
#[derive(Clone, Copy, Debug, Default)]
struct Lent {
    in_force: usize,
    /// Of leases that have ended, and that somebody may still be reading.
    overdue: usize,
}

impl Lent {
    fn of<'a>(open: impl Iterator<Item = &'a Open>) -> Self {
        let mut lent = Self::default();
        for lease in open {
            match lease.ended {
                false => lent.in_force += lease.blocks.len(),
                true => lent.overdue += lease.blocks.len(),
            }
        }
        lent
    }

    /// Whether a peer that has `its` of what is lent may have `more`: all it has may be as much as is
    /// left then, a dynamic threshold as in Choudhury and Hahne, "Dynamic queue length thresholds for
    /// shared-memory packet switches", 1998. So nobody can take everything. What is overdue counts
    /// for who keeps it, and not against others before it is `max` more.
    fn allows(self, max: usize, its: Self, more: usize) -> Result<(), String> {
        let (lent, has) = (self.in_force, its.in_force + its.overdue);
        let left = max.saturating_sub(lent + its.overdue + more);
        if has + more > left {
            return Err(format!(
                "{lent} blocks are lent, {has} to this peer; with {more} more it has more than the {left} \
                 that are left then, of {max} that can be lent"
            ));
        }
        if self.overdue + lent + more > 2 * max {
            return Err(format!(
                "readers that do not go on keep {} blocks beyond their time; at most {max} can be",
                self.overdue
            ));
        }
        Ok(())
    }
}

/// Closes the window of a lease. True when nobody reads its blocks any more.
fn quiet(lease: &mut Open) -> bool {
    let Some(window) = lease.window.take() else {
        return true;
    };
    match window.close(Duration::ZERO) {
        Ok(()) => true,
        Err(WindowBusy { window }) => {
            lease.window = Some(window);
            false
        }
    }
}

/// The lease that is asked for, or why there is none.
fn grant(
    core: &Core,
    open: &mut Vec<Open>,
    peer: &Arc<str>,
    id: u64,
    time_ms: u32,
    names: &[TokenBlock],
) -> Result<Message, String> {
    let mut its = open.iter().filter(|lease| lease.peer == *peer);
    if let Some(known) = its.clone().find(|lease| lease.lease.id == id) {
        // It is asked for again. One that has ended is not given twice.
        return match known.ended {
            false => Ok(Message::Lease(known.lease.clone())),
            true => Err("the lease has ended".to_owned()),
        };
    }
    if its.by_ref().count() >= LEASES_PER_PEER {
        return Err(format!("{LEASES_PER_PEER} leases are in force"));
    }
    let its = Lent::of(open.iter().filter(|lease| lease.peer == *peer));
    Lent::of(open.iter()).allows(core.config.lent_blocks_max, its, names.len())?;
    let pool = core.state.lock().own.as_ref().map(|(pool, _)| pool.clone());
    let pool = pool.ok_or("nothing is lent")?;
    let memory = StoreMemory {
        registration: core.host.registration(),
        layout: core.host.transfer_layout(),
    };
    let mut blocks = Vec::new();
    let mut lent = Vec::with_capacity(names.len());
    for (name, found) in names.iter().zip(pool.scan(names)) {
        // Another block may have the same sequence hash.
        let found = found.filter(|block| block.name() == *name);
        lent.push(match found {
            None => None,
            Some(block) => {
                let seed = payload_seed(*name, &core.fingerprint);
                let checksum = memory.checksum(block.id().0, seed);
                let checksum = checksum.map_err(|error| error.to_string())?;
                let id = block.id().0;
                blocks.push(block);
                Some(LentBlock {
                    block: id,
                    checksum,
                })
            }
        });
    }
    let time = Duration::from_millis(time_ms.into()).min(core.config.lease_time);
    let mut lease = Lease {
        id,
        window: WindowId(0),
        time_ms: u32::try_from(time.as_millis()).unwrap_or(u32::MAX),
        blocks: lent,
    };
    if blocks.is_empty() {
        return Ok(Message::Lease(lease));
    }
    let scope = WindowScope::Blocks {
        layout: memory.layout,
        ids: blocks.iter().map(|block| block.id().0).collect(),
    };
    let window = core
        .agent
        .open_window(memory.registration, scope, WindowAccess::Read)
        .map_err(|error| error.to_string())?;
    lease.window = window.id();
    core.counters
        .lent
        .fetch_add(blocks.len() as u64, Ordering::Relaxed);
    open.push(Open {
        peer: Arc::clone(peer),
        lease: lease.clone(),
        until: Instant::now() + time,
        window: Some(window),
        blocks,
        ended: false,
    });
    Ok(Message::Lease(lease))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of 100, where all others have `in_force` and `overdue`, and one has `its`.
    fn allows(others: [usize; 2], its: [usize; 2], more: usize) -> bool {
        let lent = |[in_force, overdue]: [usize; 2]| Lent { in_force, overdue };
        let all = lent([others[0] + its[0], others[1] + its[1]]);
        all.allows(100, lent(its), more).is_ok()
    }

    #[test]
    fn nobody_can_take_everything() {
        assert!(allows([0, 0], [0, 0], 50) && !allows([0, 0], [0, 0], 51));
        assert!(allows([0, 0], [30, 0], 20) && !allows([0, 0], [30, 0], 21));
        // Who comes second gets half of the rest, and a third when the first one is content with that.
        assert!(allows([50, 0], [0, 0], 25) && !allows([50, 0], [0, 0], 26));
        assert!(allows([33, 0], [0, 0], 33) && !allows([33, 0], [0, 0], 34));
        let mut shares = Vec::new();
        for _ in 0..6 {
            let lent = shares.iter().sum();
            let share = (0..100).rev().find(|more| allows([lent, 0], [0, 0], *more));
            shares.push(share.unwrap());
        }
        assert_eq!(shares, [50, 25, 12, 6, 3, 2]);
    }

    #[test]
    fn who_does_not_go_on_takes_from_its_own_share_only() {
        assert!(!allows([0, 0], [0, 50], 1), "the one that stopped");
        assert!(allows([0, 50], [0, 0], 50), "another one");
        // It is bounded nevertheless.
        assert!(allows([0, 150], [0, 0], 50) && !allows([0, 151], [0, 0], 50));
    }
}

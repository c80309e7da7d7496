//! Ends of operations, and canaries: bytes that must stay where an operation has ended.

use std::time::{Duration, Instant};

use blockplane_transfer::{
    CancelOutcome, Lane, Op, Prepared, RegionId, Rejection, Transfer, TransferError, WindowId,
};

use crate::actor::{Actor, Slot};
use crate::link::Gone;
use crate::owner::GUARDED;
use crate::pattern::pattern;
use crate::{SLOT, WAIT};

/// A posted operation, once or twice, and what it is going to have done.
pub(crate) struct Flight {
    pub(crate) op: Op,
    pub(crate) transfers: Vec<Transfer>,
    /// Kept or dropped: the operation does not depend on it.
    pub(crate) prepared: Option<Prepared>,
    pub(crate) local: (usize, usize),
    pub(crate) remote: (usize, usize),
    pub(crate) local_after: Vec<u8>,
    pub(crate) remote_before: Vec<u8>,
    pub(crate) remote_after: Vec<u8>,
    pub(crate) window: Option<WindowId>,
    /// Number of a notification behind which the other side checks the bytes.
    pub(crate) note: Option<u64>,
    pub(crate) notifies: bool,
    /// It may miss its deadline.
    pub(crate) hurried: bool,
    /// The owner closed the window at the request of this side and filled the slot.
    pub(crate) refilled: Option<u64>,
    /// The owner has closed the window without being asked.
    pub(crate) taken: bool,
}

/// Bytes that must stay: what a slot was filled with after its operation had ended.
pub(crate) struct Canary {
    due: u64,
    pub(crate) remote: bool,
    region: usize,
    slot: usize,
    tag: u64,
}

/// How a flight ended.
pub(crate) struct End {
    /// Every posting: the bytes are in place.
    whole: bool,
    /// Bytes of a lost connection may be on their way to the owner, who places them himself.
    loose: bool,
    /// Every posting ended well, notification included.
    told: bool,
}

impl Actor {
    /// Sorts the end of a transfer; what cannot be explained is a failed test.
    pub(crate) fn ended(
        &mut self,
        outcome: Result<(), TransferError>,
        hurried: bool,
        notifies: bool,
        released: Option<RegionId>,
    ) -> Result<(), TransferError> {
        let explained = match &outcome {
            Ok(()) => true,
            Err(TransferError::PeerLost(lost)) => {
                self.peer.lost().is_some_and(|known| known == *lost)
            }
            Err(TransferError::DeadlineExceeded { .. }) => hurried,
            Err(TransferError::Rejected(Rejection::NotificationQueueFull)) => notifies,
            Err(TransferError::Rejected(Rejection::UnknownRegion)) => released.is_some(),
            // Sorted by the caller, who knows whether it asked for that.
            Err(TransferError::Cancelled | TransferError::WindowClosed { .. }) => true,
            Err(_) => false,
        };
        assert!(explained, "unexpected end: {outcome:?}");
        match &outcome {
            Ok(()) => self.completed += 1,
            Err(_) => self.failed += 1,
        }
        outcome
    }

    pub(crate) fn wait_one(&mut self) -> Result<(), Gone> {
        if self.flights.is_empty() {
            return Ok(());
        }
        let index = self.random.index(self.flights.len());
        let mut flight = self.flights.swap_remove(index);
        let outcomes = std::mem::take(&mut flight.transfers)
            .into_iter()
            .map(|transfer| transfer.wait(WAIT))
            .collect();
        self.end(flight, outcomes, false)
    }

    /// Waits for everything that is in flight.
    pub(crate) fn land(&mut self) -> Result<(), Gone> {
        while !self.flights.is_empty() {
            self.wait_one()?;
        }
        Ok(())
    }

    pub(crate) fn cancel_one(&mut self) -> Result<(), Gone> {
        if self.flights.is_empty() {
            return Ok(());
        }
        let index = self.random.index(self.flights.len());
        if self.flights[index].note.is_some() {
            return self.wait_one();
        }
        let mut flight = self.flights.swap_remove(index);
        let spin = Duration::from_micros(self.random.below(300));
        let started = Instant::now();
        while started.elapsed() < spin {
            std::hint::spin_loop();
        }
        let outcomes = std::mem::take(&mut flight.transfers)
            .into_iter()
            .map(cancel)
            .collect();
        self.end(flight, outcomes, true)
    }

    /// Drops the handle of an operation, which cancels it: nobody hears of its end. Both slots are
    /// out of use until the connection is over.
    pub(crate) fn drop_one(&mut self) -> Result<(), Gone> {
        let Some(index) = self
            .flights
            .iter()
            .position(|flight| flight.note.is_none() && flight.window.is_none())
        else {
            return Ok(());
        };
        let flight = self.flights.swap_remove(index);
        let (region, slot) = flight.remote;
        self.slots[region][slot] = match flight.op {
            Op::Write => Slot::Dead,
            Op::Read => Slot::Known(flight.remote_before),
        };
        Ok(())
    }

    /// Closes a window, under an operation if there is one.
    pub(crate) fn close_one(&mut self) -> Result<(), Gone> {
        let busy = self
            .flights
            .iter()
            .find(|flight| {
                self.windows[flight.remote.1].is_some()
                    && flight.window.is_some()
                    && flight.note.is_none()
            })
            .map(|flight| flight.remote.1);
        let idle = || {
            self.windows
                .iter()
                .zip(&self.slots[GUARDED])
                .position(|(window, slot)| window.is_some() && matches!(slot, Slot::Known(_)))
        };
        let Some(slot) = busy.or_else(idle) else {
            return Ok(());
        };
        let (window, _) = self.windows[slot].take().unwrap();
        self.close(slot, window)
    }

    /// Closes the window of a slot: from then on nothing may land there.
    pub(crate) fn close(&mut self, slot: usize, window: WindowId) -> Result<(), Gone> {
        let tag = self.tag();
        let flight = self
            .flights
            .iter_mut()
            .find(|flight| flight.window == Some(window));
        let answer = self.link.ask(&format!("close {} {tag}", window.0))?;
        if answer == "reclaimed" {
            self.slots[GUARDED][slot] = Slot::Dead;
            if let Some(flight) = flight {
                flight.taken = true;
            }
        } else if let Some(flight) = flight {
            flight.refilled = Some(tag);
        } else {
            // The owner has written over a canary that was there.
            self.canaries
                .retain(|c| !(c.remote && c.region == GUARDED && c.slot == slot));
            self.slots[GUARDED][slot] = Slot::Busy;
            self.guard(true, GUARDED, slot, tag);
        }
        Ok(())
    }

    fn end(
        &mut self,
        mut flight: Flight,
        outcomes: Vec<Result<(), TransferError>>,
        cancelled: bool,
    ) -> Result<(), Gone> {
        let end = self.end_here(&mut flight, outcomes, cancelled);
        self.end_there(flight, &end)
    }

    /// Ends everything without the other side, who does not answer: some by waiting, some by
    /// cancelling.
    pub(crate) fn bury(&mut self) -> Vec<(Flight, End)> {
        let flights = std::mem::take(&mut self.flights);
        let mut buried = Vec::new();
        for mut flight in flights {
            let cancels = flight.note.is_none() && self.random.chance(40);
            let outcomes = std::mem::take(&mut flight.transfers)
                .into_iter()
                .map(|transfer| {
                    if cancels {
                        cancel(transfer)
                    } else {
                        transfer.wait(WAIT)
                    }
                })
                .collect();
            let end = self.end_here(&mut flight, outcomes, cancels);
            buried.push((flight, end));
        }
        buried
    }

    /// This side of a flight that has ended.
    fn end_here(
        &mut self,
        flight: &mut Flight,
        outcomes: Vec<Result<(), TransferError>>,
        cancelled: bool,
    ) -> End {
        let mut end = End {
            whole: true,
            loose: false,
            told: true,
        };
        for outcome in outcomes {
            match self.ended(outcome, flight.hurried, flight.notifies, None) {
                Ok(()) => {}
                // The bytes are in place.
                Err(TransferError::Rejected(Rejection::NotificationQueueFull)) => end.told = false,
                Err(error) => {
                    end.whole = false;
                    end.told = false;
                    match error {
                        TransferError::PeerLost(_) => end.loose = true,
                        TransferError::WindowClosed { window } => {
                            assert_eq!(Some(window), flight.window);
                            flight.taken |= flight.refilled.is_none();
                        }
                        TransferError::Cancelled => assert!(cancelled, "cancelled by nobody"),
                        _ => {}
                    }
                }
            }
        }
        self.end_local(flight, end.whole);
        end
    }

    fn end_local(&mut self, flight: &Flight, whole: bool) {
        let (region, slot) = flight.local;
        if whole {
            let differs = self.read_local(region, slot) != flight.local_after;
            assert!(!differs, "local bytes differ after {:?}", flight.op);
            self.local_busy[region][slot] = false;
        } else {
            // Memory of a failed operation is ours at once.
            let tag = self.tag();
            self.write_local(region, slot, &pattern(tag, SLOT));
            self.guard(false, region, slot, tag);
        }
    }

    /// The other side of a flight that has ended.
    pub(crate) fn end_there(&mut self, flight: Flight, end: &End) -> Result<(), Gone> {
        if let (true, Some(note)) = (end.told, flight.note) {
            self.seen(note)?;
        }
        let (region, slot) = flight.remote;
        let write = flight.op == Op::Write;
        if let Some(tag) = flight.refilled {
            self.slots[region][slot] = Slot::Busy;
            self.guard(true, region, slot, tag);
            return Ok(());
        }
        if flight.taken {
            return self.taken_back(slot);
        }
        if end.whole || !write {
            let bytes = if end.whole {
                flight.remote_after
            } else {
                flight.remote_before
            };
            // Reading back would use what is tested: the owner looks for itself.
            let sum = crc32c::crc32c(&bytes);
            let question = format!("check {region} {slot} {sum}");
            self.slots[region][slot] = match self.link.ask(&question)?.as_str() {
                "ok" => Slot::Known(bytes),
                "reclaimed" => Slot::Dead,
                other => panic!("after {:?} (whole: {}): {other}", flight.op, end.whole),
            };
            return Ok(());
        }
        if end.loose && (flight.note.is_some() || self.owner_places(region)) {
            self.slots[region][slot] = Slot::Dead;
            // The notification may still come: what it promises must not be replaced.
            if region == GUARDED && flight.note.is_some() {
                self.windows[slot] = None;
            }
            return Ok(());
        }
        let tag = self.tag();
        let answer = self.link.ask(&format!("fill {region} {slot} {tag}"))?;
        if answer == "reclaimed" {
            self.slots[region][slot] = Slot::Dead;
        } else {
            self.slots[region][slot] = Slot::Busy;
            self.guard(true, region, slot, tag);
        }
        Ok(())
    }

    /// Whether the owner's own threads place the bytes of a WRITE.
    fn owner_places(&self, region: usize) -> bool {
        match self.peer.lane().lane {
            Lane::Loopback => false,
            // Ordinary memory goes through the socket.
            Lane::Shm => region == 2,
            _ => true,
        }
    }

    fn guard(&mut self, remote: bool, region: usize, slot: usize, tag: u64) {
        let due = self.steps + 5 + self.random.below(20);
        self.canaries.push(Canary {
            due,
            remote,
            region,
            slot,
            tag,
        });
    }

    /// Looks after canaries whose time has come, or all of them.
    pub(crate) fn check_canaries(&mut self, all: bool) -> Result<(), Gone> {
        let now = self.steps;
        let canaries = std::mem::take(&mut self.canaries);
        let (due, rest): (Vec<_>, _) = canaries.into_iter().partition(|c| all || c.due <= now);
        self.canaries = rest;
        for canary in due {
            let (region, slot) = (canary.region, canary.slot);
            let expected = pattern(canary.tag, SLOT);
            if canary.remote {
                let sum = crc32c::crc32c(&expected);
                let answer = self.link.ask(&format!("check {region} {slot} {sum}"))?;
                self.slots[region][slot] = match answer.as_str() {
                    "ok" => Slot::Known(expected),
                    "reclaimed" => Slot::Dead,
                    other => panic!("a late byte landed there: {other}"),
                };
            } else {
                let differs = self.read_local(region, slot) != expected;
                assert!(!differs, "a late byte landed here");
                self.local_busy[region][slot] = false;
            }
        }
        Ok(())
    }
}

fn cancel(transfer: Transfer) -> Result<(), TransferError> {
    match transfer.cancel() {
        CancelOutcome::Completed => Ok(()),
        CancelOutcome::Cancelled => Err(TransferError::Cancelled),
        CancelOutcome::Failed(error) => Err(error),
    }
}

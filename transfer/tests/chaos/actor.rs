//! The initiator's side of a world: a random schedule of operations.

use std::sync::Arc;
use std::time::Duration;

use blockplane_transfer::{
    Agent, ArenaConfig, ConnectError, LossCause, Metadata, Op, Peer, PostError, PostOptions,
    PrepareError, RegionId, Registration, RemoteAccess, WindowId,
};

use crate::blocks::{self, Blocks, copy};
use crate::flight::{Canary, Flight};
use crate::link::{Gone, Link};
use crate::owner::{GUARDED, REGIONS, from_hex};
use crate::pattern::pattern;
use crate::random::Random;
use crate::{SLOT, SLOTS, WAIT};

const LOCAL_SLOTS: usize = 12;
const FLIGHTS_MAX: usize = 8;

/// What the oracle knows of a slot of the other side.
///
/// A slot is used by one operation at a time. What it holds is known after a success; after a
/// failure the owner fills it with other bytes, and looks later whether they are still there.
pub(crate) enum Slot {
    Known(Vec<u8>),
    /// An operation uses it, or it holds a canary.
    Busy,
    /// Bytes of a lost connection may still arrive there; nobody looks at it any more.
    Dead,
}

pub(crate) struct Actor {
    pub(crate) agent: Agent,
    pub(crate) link: Arc<Link>,
    /// Nothing happens to either process: connections end only when this side ends them.
    strict: bool,
    pub(crate) random: Random,
    pub(crate) peer: Peer,
    pub(crate) connection: u64,
    pub(crate) regions: [RegionId; REGIONS],
    pub(crate) slots: Vec<Vec<Slot>>,
    /// Windows over the guarded slots, and whether they are over blocks.
    pub(crate) windows: Vec<Option<(WindowId, bool)>>,
    pub(crate) local: [Registration; 2],
    pub(crate) local_busy: [[bool; LOCAL_SLOTS]; 2],
    pub(crate) flights: Vec<Flight>,
    pub(crate) canaries: Vec<Canary>,
    pub(crate) steps: u64,
    tags: u64,
    notes: u64,
    /// Connections that were lost without this side asking for it.
    pub(crate) losses: Vec<LossCause>,
    pub(crate) completed: u64,
    pub(crate) failed: u64,
}

/// Connects. A handshake may break only where a process is stopped in the middle of it.
fn connect(agent: &Agent, link: &Link, strict: bool) -> Result<Peer, Gone> {
    let metadata = Metadata::from_bytes(&from_hex(&link.ask("metadata")?)).unwrap();
    for _ in 0..10 {
        match agent.connect(&metadata, WAIT) {
            Ok(peer) => return Ok(peer),
            Err(error @ ConnectError::NoLane { .. }) if !strict => assert!(error.retryable()),
            Err(error) => panic!("connect: {error}"),
        }
    }
    panic!("ten handshakes in a row have failed");
}

impl Actor {
    pub(crate) fn start(
        agent: &Agent,
        link: &Arc<Link>,
        seed: u64,
        strict: bool,
    ) -> Result<Self, Gone> {
        let peer = connect(agent, link, strict)?;
        let bytes = LOCAL_SLOTS * SLOT;
        let local = [
            agent.allocate(ArenaConfig::new(bytes, "own")).unwrap(),
            agent.register(vec![0; bytes], RemoteAccess::None).unwrap(),
        ];
        let mut actor = Self {
            agent: agent.clone(),
            link: link.clone(),
            strict,
            random: Random::new(seed),
            peer,
            connection: 1,
            regions: [RegionId(0); REGIONS],
            slots: Vec::new(),
            windows: Vec::new(),
            local,
            local_busy: [[false; LOCAL_SLOTS]; 2],
            flights: Vec::new(),
            canaries: Vec::new(),
            steps: 0,
            tags: seed << 20,
            notes: 0,
            losses: Vec::new(),
            completed: 0,
            failed: 0,
        };
        actor.meet()?;
        Ok(actor)
    }

    /// Learns what a new life of the other side has; all its bytes are zero.
    fn meet(&mut self) -> Result<(), Gone> {
        let regions = self.link.ask("regions")?;
        for (known, id) in self.regions.iter_mut().zip(regions.split(' ')) {
            *known = RegionId(id.parse().unwrap());
        }
        self.slots = (0..REGIONS)
            .map(|_| (0..SLOTS).map(|_| Slot::Known(vec![0; SLOT])).collect())
            .collect();
        self.windows = vec![None; SLOTS];
        Ok(())
    }

    /// The other side has died and lives again, behind another link.
    pub(crate) fn meet_again(&mut self, link: &Arc<Link>) -> Result<(), Gone> {
        self.link = link.clone();
        self.canaries.retain(|canary| !canary.remote);
        let old = self.peer.clone();
        self.peer = connect(&self.agent, link, self.strict)?;
        self.connection += 1;
        assert_ne!(old.epoch(), self.peer.epoch());
        assert!(
            matches!(
                self.agent.notify(&old, "to the dead", WAIT),
                Err(PostError::PeerLost(_))
            ),
            "the handle of an old life works"
        );
        self.meet()
    }

    pub(crate) fn tag(&mut self) -> u64 {
        self.tags += 1;
        self.tags
    }

    /// One random step.
    pub(crate) fn step(&mut self) -> Result<(), Gone> {
        self.steps += 1;
        if let Some(lost) = self.peer.lost() {
            self.losses.push(lost.cause);
            return self.reconnect();
        }
        match self.random.below(100) {
            0..42 => self.post(),
            42..60 => self.wait_one(),
            60..72 => self.cancel_one(),
            72..80 => self.close_one(),
            80..83 => self.notify_many(20),
            83..86 => self.flood(),
            86..91 => self.release_under_way(),
            91..94 => self.drop_one(),
            94..96 => self.disconnect(),
            _ => self.check_canaries(false),
        }
    }

    /// Waits for everything and checks everything.
    pub(crate) fn finish(&mut self) -> Result<(), Gone> {
        self.land()?;
        if self.peer.lost().is_some() {
            self.reconnect()?;
        }
        // Whatever was in a socket has been read when this is answered.
        self.notify_many(2)?;
        self.check_canaries(true)?;
        let wrong = self.link.ask("wrong")?;
        assert!(wrong.is_empty() || wrong == "ok", "{wrong}");
        Ok(())
    }

    fn post(&mut self) -> Result<(), Gone> {
        if self.flights.len() >= FLIGHTS_MAX {
            return self.wait_one();
        }
        let (region, slot) = (self.random.index(REGIONS), self.random.index(SLOTS));
        let Slot::Known(before) = &self.slots[region][slot] else {
            return Ok(());
        };
        let remote_before = before.clone();
        let local_region = self.random.index(2);
        let free = self.local_busy[local_region].iter().position(|busy| !busy);
        let Some(local_slot) = free else {
            return self.wait_one();
        };
        let window = match region {
            GUARDED => Some(self.window(slot)?),
            _ => None,
        };
        let as_window = window.is_some_and(|(_, over_blocks)| over_blocks);
        let (here, there) = blocks::pair(&mut self.random, local_slot, slot, as_window);
        let op = if self.random.chance(50) {
            Op::Write
        } else {
            Op::Read
        };
        let local_before = pattern(self.tag(), SLOT);
        self.write_local(local_region, local_slot, &local_before);
        let prepared = self.agent.prepare(
            op,
            here.local(&self.local[local_region]),
            there.remote(&self.peer, self.regions[region], window.map(|(id, _)| id)),
        );
        let prepared = match prepared {
            Ok(prepared) => prepared,
            Err(PrepareError::PeerLost(_)) => return Ok(()),
            // Its owner took it back without being asked: this process was stopped.
            Err(PrepareError::WindowClosed { .. }) => return self.taken_back(slot),
            Err(error) => panic!("prepare: {error}"),
        };
        let mut flight = Flight {
            op,
            transfers: Vec::new(),
            prepared: None,
            local: (local_region, local_slot),
            remote: (region, slot),
            local_after: local_before.clone(),
            remote_before: remote_before.clone(),
            remote_after: remote_before.clone(),
            window: window.map(|(id, _)| id),
            note: None,
            notifies: false,
            hurried: self.random.chance(15),
            refilled: None,
            taken: false,
        };
        match op {
            Op::Write => copy(&local_before, &here, &mut flight.remote_after, &there),
            Op::Read => copy(&remote_before, &there, &mut flight.local_after, &here),
        }
        let posts = if self.random.chance(10) { 2 } else { 1 };
        for _ in 0..posts {
            let options = self.options(&mut flight);
            match prepared.post(options) {
                Ok(transfer) => flight.transfers.push(transfer),
                Err(PostError::PeerLost(_)) => {}
                Err(PostError::WindowClosed { .. }) => {
                    flight.note = None;
                    if flight.transfers.is_empty() {
                        return self.taken_back(slot);
                    }
                }
                Err(error) => panic!("post: {error}"),
            }
        }
        if flight.transfers.is_empty() {
            return Ok(());
        }
        if self.random.chance(50) {
            flight.prepared = Some(prepared);
        }
        self.slots[region][slot] = Slot::Busy;
        self.local_busy[local_region][local_slot] = true;
        self.flights.push(flight);
        Ok(())
    }

    /// The owner has closed a window without being asked, and the slot has another meaning.
    pub(crate) fn taken_back(&mut self, slot: usize) -> Result<(), Gone> {
        self.slots[GUARDED][slot] = Slot::Dead;
        if let Some((window, _)) = self.windows[slot].take() {
            let answer = self.link.ask(&format!("close {} 0", window.0))?;
            assert_eq!(answer, "reclaimed", "{window} is closed without a reason");
        }
        Ok(())
    }

    /// Deadline and notification of one posting.
    fn options(&mut self, flight: &mut Flight) -> PostOptions {
        let deadline = if flight.hurried {
            Duration::from_micros(self.random.below(1500))
        } else {
            WAIT * 2
        };
        let options = PostOptions::within(deadline);
        if !self.random.chance(40) {
            return options;
        }
        flight.notifies = true;
        let (connection, number) = (self.connection, self.note());
        // One that may be called off may also arrive after its bytes were replaced.
        if flight.op == Op::Write && !flight.hurried && flight.transfers.is_empty() {
            flight.note = Some(number);
            let (region, slot) = flight.remote;
            let sum = crc32c::crc32c(&flight.remote_after);
            options.notify(format!("{connection} {number} {region} {slot} {sum}"))
        } else {
            options.notify(format!("{connection} {number}"))
        }
    }

    fn note(&mut self) -> u64 {
        self.notes += 1;
        self.notes
    }

    fn window(&mut self, slot: usize) -> Result<(WindowId, bool), Gone> {
        if let Some(window) = self.windows[slot] {
            return Ok(window);
        }
        let over_blocks = self.random.chance(50);
        let question = format!("open {slot} {}", u8::from(over_blocks));
        let window = WindowId(self.link.ask(&question)?.parse().unwrap());
        self.windows[slot] = Some((window, over_blocks));
        Ok((window, over_blocks))
    }

    /// Standalone notifications: in order, and delivered when they say so.
    fn notify_many(&mut self, count: u64) -> Result<(), Gone> {
        let mut posted = Vec::new();
        for _ in 0..count {
            let number = self.note();
            let payload = format!("{} {number}", self.connection);
            match self.agent.notify(&self.peer, payload, WAIT * 2) {
                Ok(transfer) => posted.push((number, transfer)),
                Err(PostError::PeerLost(_)) => {}
                Err(error) => panic!("notify: {error}"),
            }
        }
        for (number, transfer) in posted {
            if self.ended(transfer.wait(WAIT), false, true, None).is_ok() {
                self.seen(number)?;
            }
        }
        Ok(())
    }

    /// Far more notifications than the queue of the other side takes, while nobody empties it.
    fn flood(&mut self) -> Result<(), Gone> {
        self.link.ask("hold")?;
        let mut posted = Vec::new();
        for _ in 0..crate::NOTIFICATIONS_MAX * 2 {
            let number = self.note();
            // Enough to fill a socket as well.
            let mut payload = format!("{} {number}", self.connection);
            payload.push_str(&" ".repeat(2000));
            match self.agent.notify(&self.peer, payload, WAIT * 2) {
                Ok(transfer) => posted.push((number, transfer)),
                Err(PostError::PeerLost(_) | PostError::TooManyInFlight { .. }) => {}
                Err(error) => panic!("notify: {error}"),
            }
        }
        let mut delivered = Vec::new();
        for (number, transfer) in posted {
            if self.ended(transfer.wait(WAIT), false, true, None).is_ok() {
                delivered.push(number);
            }
        }
        self.link.ask("resume")?;
        delivered
            .into_iter()
            .try_for_each(|number| self.seen(number))
    }

    pub(crate) fn seen(&self, number: u64) -> Result<(), Gone> {
        let question = format!("seen {} {} {number}", self.agent.epoch(), self.connection);
        let answer = self.link.ask(&question)?;
        assert_eq!(answer, "ok");
        Ok(())
    }

    /// Memory of either side is released while operations use it.
    fn release_under_way(&mut self) -> Result<(), Gone> {
        let kind = self.random.below(2);
        let there = self.link.ask(&format!("temporary {kind}"))?;
        let here = if self.random.chance(50) {
            let config = ArenaConfig::new(SLOT, "temporary");
            self.agent.allocate(config).unwrap()
        } else {
            let memory = vec![0; SLOT];
            self.agent.register(memory, RemoteAccess::None).unwrap()
        };
        let op = if self.random.chance(50) {
            Op::Write
        } else {
            Op::Read
        };
        let region = RegionId(there.parse().unwrap());
        let whole = Blocks::whole();
        let prepared = self.agent.prepare(
            op,
            whole.local(&here),
            whole.remote(&self.peer, region, None),
        );
        let mut posted = Vec::new();
        match prepared {
            Ok(prepared) => {
                for _ in 0..3 {
                    match prepared.post(PostOptions::within(WAIT * 2)) {
                        Ok(transfer) => posted.push(transfer),
                        Err(PostError::PeerLost(_)) => {}
                        Err(error) => panic!("post: {error}"),
                    }
                }
            }
            Err(PrepareError::PeerLost(_)) => {}
            Err(error) => panic!("prepare: {error}"),
        }
        drop(here);
        self.link.ask(&format!("release {there}"))?;
        if self.random.chance(50) {
            return Ok(());
        }
        for transfer in posted {
            // It may have ended well before the release, and not after it.
            let _ = self.ended(transfer.wait(WAIT), false, false, Some(region));
        }
        Ok(())
    }

    fn disconnect(&mut self) -> Result<(), Gone> {
        self.peer.disconnect();
        self.reconnect()
    }

    /// The connection is over: everything ends, and a new one works.
    fn reconnect(&mut self) -> Result<(), Gone> {
        self.land()?;
        self.peer = connect(&self.agent, &self.link, self.strict)?;
        self.connection += 1;
        // Where the owner places bytes by itself, what it had received may still arrive until it
        // closes the window.
        for slot in 0..SLOTS {
            if let Some((window, _)) = self.windows[slot].take() {
                self.close(slot, window)?;
            }
        }
        Ok(())
    }

    pub(crate) fn write_local(&self, region: usize, slot: usize, bytes: &[u8]) {
        self.local[region]
            .write_at((slot * SLOT) as u64, bytes)
            .unwrap();
    }

    pub(crate) fn read_local(&self, region: usize, slot: usize) -> Vec<u8> {
        let mut bytes = vec![0; SLOT];
        self.local[region]
            .read_at((slot * SLOT) as u64, &mut bytes)
            .unwrap();
        bytes
    }
}

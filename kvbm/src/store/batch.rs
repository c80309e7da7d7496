//! The part of the store that one batch of writes holds, and the changes of headers.
//!
//! A batch ends in one of two ways: quiet, and everything is given back; or with requests that hang,
//! and everything stays reserved until they do not.

use std::{sync::Arc, time::Instant};

use blockplane_transfer::Op;

use super::{
    BATCH, Core,
    disk::{DiskError, Flight, Piece},
    format::{Geometry, HEADER, HEADERS_PER_PAGE, PAGE, PAGE_BYTES, SlotState},
    report::Pending,
    slots::Known,
};

/// A request is still under way after its deadline.
pub(super) struct Hung;

/// A slot that the batch overwrites.
pub(super) struct Claim {
    pub(super) slot: u32,
    pub(super) generation: u64,
    /// It was in quarantine before.
    pub(super) quarantined: bool,
    /// Its new state is known to readers.
    pub(super) settled: bool,
}

/// Scratch memory with its page of intents, pages of headers, slots.
pub(super) struct Batch {
    pub(super) core: Arc<Core>,
    lane: u32,
    /// Which of the two pages of intents of the lane is written next. The other one
    /// is whole, should this one be torn.
    turn: u32,
    /// Ascending.
    pages: Vec<u32>,
    pub(super) claims: Vec<Claim>,
    /// The pages, on their way into scratch memory.
    reading: Option<Result<Flight, DiskError>>,
    /// Requests that may still be under way.
    hanging: Vec<Flight>,
}

impl Batch {
    /// Scratch memory and the pages of the headers of `slots`, at most [`BATCH`] of them.
    pub(super) fn take(
        core: &Arc<Core>,
        slots: impl Iterator<Item = u32>,
        until: Instant,
    ) -> Result<Self, String> {
        let mut pages: Vec<u32> = slots.map(|slot| slot / HEADERS_PER_PAGE).collect();
        pages.sort_unstable();
        pages.dedup();
        debug_assert!(pages.len() <= BATCH, "more slots than scratch memory");
        let (lane, turn) = core
            .lanes
            .take(until)
            .ok_or_else(|| "too many batches are under way".to_owned())?;
        if !core.pages.take(&pages, until) {
            core.lanes.give(lane, turn);
            return Err("headers are in use by batches that do not end".to_owned());
        }
        Ok(Self {
            core: core.clone(),
            lane,
            turn,
            pages,
            claims: Vec::new(),
            reading: None,
            hanging: Vec::new(),
        })
    }

    /// Waits for a request of this batch.
    pub(super) fn wait(
        &mut self,
        flight: Result<Flight, DiskError>,
        until: Instant,
    ) -> Result<Result<(), DiskError>, Hung> {
        let mut flight = match flight {
            Ok(flight) => flight,
            Err(error) => return Ok(Err(error)),
        };
        if let Some(result) = flight.wait(until) {
            return Ok(result);
        }
        self.hanging.push(flight);
        Err(Hung)
    }

    /// Starts to write.
    pub(super) fn write(&self, pieces: &[Piece<'_>], until: Instant) -> Result<Flight, DiskError> {
        self.core.count_written(pieces);
        self.core.disk.start(Op::Write, pieces, until)
    }

    /// Starts to write the page of intents.
    pub(super) fn write_intents(
        &self,
        entries: &[(u32, u64)],
        until: Instant,
    ) -> Result<Flight, DiskError> {
        let core = &self.core;
        let page = super::format::encode_intents(core.id, entries);
        let offset = self.scratch(0);
        core.scratch_write(offset, &page)?;
        let piece = Piece {
            memory: &core.scratch,
            offset,
            at: Geometry::intent_page(2 * self.lane + self.turn),
            bytes: PAGE_BYTES,
        };
        self.write(&[piece], until)
    }

    /// The page of intents is whole: the next batch writes the other one.
    pub(super) const fn intents_written(&mut self) {
        self.turn ^= 1;
    }

    /// Starts to read the pages of headers.
    pub(super) fn read_headers(&mut self, until: Instant) {
        let pieces = self.header_pieces(&self.core);
        let reading = self.core.disk.start(Op::Read, &pieces, until);
        self.reading = Some(reading);
    }

    /// Changes headers and writes them. `edit` gets a header as it is on the disk. Slots whose headers
    /// could not be written come back with the reason.
    pub(super) fn write_headers(
        &mut self,
        slots: &[u32],
        mut edit: impl FnMut(u32, &mut [u8; HEADER]),
        until: Instant,
    ) -> Result<Vec<(u32, DiskError)>, Hung> {
        let mut failed = self.headers_arrived(until)?;
        for (index, &page) in self.pages.iter().enumerate() {
            let here = slots
                .iter()
                .copied()
                .filter(|slot| slot / HEADERS_PER_PAGE == page);
            if let Err(error) = self.edit_page(index, here, &mut edit) {
                failed.push((page, error));
            }
        }
        let sound = |failed: &[(u32, DiskError)], piece: &Piece<'_>| {
            !failed
                .iter()
                .any(|&(page, _)| Geometry::header_page(page) == piece.at)
        };
        let core = self.core.clone();
        let all = self.header_pieces(&core);
        let pieces: Vec<Piece<'_>> = all
            .iter()
            .copied()
            .filter(|piece| sound(&failed, piece))
            .collect();
        if !pieces.is_empty() {
            let flight = self.write(&pieces, until);
            if self.wait(flight, until)?.is_err() {
                let pages = self.pages.clone();
                for (page, piece) in pages.into_iter().zip(all) {
                    if !sound(&failed, &piece) {
                        continue;
                    }
                    let flight = self.write(&[piece], until);
                    if let Err(error) = self.wait(flight, until)? {
                        failed.push((page, error));
                    }
                }
            }
        }
        let of = |slot: u32| {
            let page = slot / HEADERS_PER_PAGE;
            let (_, error) = failed.iter().find(|(failed, _)| *failed == page)?;
            Some((slot, error.clone()))
        };
        Ok(slots.iter().copied().filter_map(of).collect())
    }

    /// Waits for the pages of headers; those that cannot be read come back.
    fn headers_arrived(&mut self, until: Instant) -> Result<Vec<(u32, DiskError)>, Hung> {
        let Some(reading) = self.reading.take() else {
            return Ok(Vec::new());
        };
        let mut failed = Vec::new();
        if self.wait(reading, until)?.is_err() {
            let core = self.core.clone();
            let pages = self.pages.clone();
            for (page, piece) in pages.into_iter().zip(self.header_pieces(&core)) {
                let flight = core.disk.start(Op::Read, &[piece], until);
                if let Err(error) = self.wait(flight, until)? {
                    failed.push((page, error));
                }
            }
        }
        Ok(failed)
    }

    fn edit_page(
        &self,
        index: usize,
        slots: impl Iterator<Item = u32>,
        edit: &mut impl FnMut(u32, &mut [u8; HEADER]),
    ) -> Result<(), DiskError> {
        let mut page = [0; PAGE];
        let offset = self.scratch(1 + index);
        self.core.scratch_read(offset, &mut page)?;
        let (headers, _) = page.as_chunks_mut::<HEADER>();
        for slot in slots {
            edit(slot, &mut headers[(slot % HEADERS_PER_PAGE) as usize]);
        }
        self.core.scratch_write(offset, &page)
    }

    fn header_pieces<'c>(&self, core: &'c Core) -> Vec<Piece<'c>> {
        let piece = |(index, &page): (usize, &u32)| Piece {
            memory: &core.scratch,
            offset: self.scratch(1 + index),
            at: Geometry::header_page(page),
            bytes: PAGE_BYTES,
        };
        self.pages.iter().enumerate().map(piece).collect()
    }

    /// First byte of a page of this batch's scratch memory.
    fn scratch(&self, page: usize) -> u64 {
        (self.lane as usize * (1 + BATCH) + page) as u64 * PAGE_BYTES
    }
}

impl Batch {
    /// Takes a slot in order to overwrite it; false when there is none, or somebody writes it.
    pub(super) fn claim(&mut self, slot: u32) -> bool {
        let Some(quarantined) = self.core.slots.claim(slot) else {
            return false;
        };
        self.claims.push(Claim {
            slot,
            generation: self.core.next_generation(),
            quarantined,
            settled: false,
        });
        true
    }

    /// Says what a claimed slot is from now on.
    pub(super) fn settle(&mut self, index: usize, state: SlotState, known: Known) {
        let claim = &mut self.claims[index];
        claim.settled = true;
        self.core.slots.set(claim.slot, state, known);
        self.core.unsettled.lock().remove(&claim.slot);
    }

    /// Ends the batch if nothing of it is under way any more, by `until`; else leaves everything
    /// reserved, for whoever waits.
    pub(super) fn end(mut self, until: Instant) -> Option<Pending> {
        if let Some(Ok(reading)) = self.reading.take() {
            // Its result does not matter any more.
            let _ = self.wait(Ok(reading), until);
        }
        if self.hanging.is_empty() {
            return None;
        }
        Some(Pending::new(move || {
            for flight in std::mem::take(&mut self.hanging) {
                flight.quiet();
            }
        }))
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        // A request that nobody waited for may still write: its memory, slots and pages are not given
        // to anybody else in this life of the store.
        if !self.hanging.is_empty() || matches!(self.reading, Some(Ok(_))) {
            return;
        }
        let core = &self.core;
        for claim in self.claims.iter().filter(|claim| !claim.settled) {
            // What lies there is unknown. Later intents name it until it is overwritten.
            let state = match claim.quarantined {
                true => SlotState::Quarantined,
                false => SlotState::Empty,
            };
            core.unsettled.lock().insert(claim.slot, claim.generation);
            core.slots
                .set(claim.slot, state, Known::at(claim.generation));
        }
        core.pages.give(&self.pages);
        core.lanes.give(self.lane, self.turn);
    }
}

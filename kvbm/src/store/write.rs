//! Writing blocks: intent, payload, header, in this order.
//!
//! While the page of intents is on its way, the pages of headers come in; while the payload is on its
//! way, the calling thread computes checksums.

use std::{sync::Arc, time::Instant};

use blockplane_transfer::{AccessError, Op};

use super::{
    BATCH, Core,
    batch::{Batch, Hung},
    disk::{DiskError, DiskErrorKind, Piece},
    format::{HEADER, Header, INTENTS_PER_PAGE, SlotState, payload_seed},
    report::{BlockOutcome, Pending, SlotWrite, StoreMemory, StoreReport},
    slots::Known,
};

const LATE: &str = "not written in time";

/// What became of a claimed slot so far.
enum Fate {
    Sound(Header),
    /// The media fails here: the slot goes into quarantine.
    Media(DiskError),
    /// Anything else.
    Failed(DiskError),
}

pub(super) fn write(
    core: &Arc<Core>,
    from: &StoreMemory<'_>,
    blocks: &[SlotWrite],
    until: Instant,
) -> StoreReport {
    core.look_at_file();
    let refusal = core
        .health
        .no_writes()
        .or_else(|| from.check(core.geometry.block_bytes).err());
    if let Some(reason) = refusal {
        return StoreReport::failed(blocks.len(), &reason);
    }
    let mut report = StoreReport {
        outcomes: Vec::with_capacity(blocks.len()),
        pending: None,
    };
    for blocks in blocks.chunks(BATCH) {
        let failed = if report.pending.is_some() {
            Some(LATE.to_owned())
        } else {
            core.health.no_writes()
        };
        if let Some(reason) = failed {
            let failed = StoreReport::failed(blocks.len(), &reason);
            report.outcomes.extend(failed.outcomes);
            continue;
        }
        let (outcomes, pending) = write_batch(core, from, blocks, until);
        report.outcomes.extend(outcomes);
        report.pending = pending;
    }
    report
}

fn write_batch(
    core: &Arc<Core>,
    from: &StoreMemory<'_>,
    blocks: &[SlotWrite],
    until: Instant,
) -> (Vec<BlockOutcome>, Option<Pending>) {
    let slots = blocks.iter().map(|block| block.slot);
    let mut outcomes = vec![BlockOutcome::Failed(LATE.to_owned()); blocks.len()];
    let mut batch = match Batch::take(core, slots, until) {
        Ok(batch) => batch,
        Err(reason) => return (StoreReport::failed(blocks.len(), &reason).outcomes, None),
    };
    // The i-th claim is that of `claimed[i]`.
    let mut claimed = Vec::with_capacity(blocks.len());
    for (index, block) in blocks.iter().enumerate() {
        let reason = if block.block >= from.layout.blocks {
            format!("the memory has no block {}", block.block)
        } else if !batch.claim(block.slot) {
            format!("slot {} is being written or does not exist", block.slot)
        } else {
            claimed.push(index);
            continue;
        };
        outcomes[index] = BlockOutcome::Failed(reason);
    }
    if !claimed.is_empty() {
        let mut job = Job {
            core,
            from,
            batch: &mut batch,
            blocks: claimed.iter().map(|&index| blocks[index]).collect(),
            until,
        };
        if let Ok(fates) = job.run() {
            for (&index, fate) in claimed.iter().zip(fates) {
                outcomes[index] = fate;
            }
        }
    }
    (outcomes, batch.end(until))
}

/// A batch being written.
struct Job<'a> {
    core: &'a Arc<Core>,
    from: &'a StoreMemory<'a>,
    batch: &'a mut Batch,
    /// One for each claim.
    blocks: Vec<SlotWrite>,
    until: Instant,
}

impl Job<'_> {
    fn run(&mut self) -> Result<Vec<BlockOutcome>, Hung> {
        let until = self.until;
        let intents = self.batch.write_intents(&self.intents(), until);
        self.batch.read_headers(until);
        let fates = match self.batch.wait(intents, until)? {
            Ok(()) => {
                self.batch.intents_written();
                self.payloads()?
            }
            Err(error) => {
                self.core.health.write_failed(&error);
                let failed = |_: &SlotWrite| Fate::Failed(error.clone());
                self.blocks.iter().map(failed).collect()
            }
        };
        let fates = self.check_quarantined(fates)?;
        self.headers(fates)
    }

    /// Slots of this batch, and those whose contents are unknown since an earlier one.
    fn intents(&self) -> Vec<(u32, u64)> {
        let own = self.batch.claims.iter();
        let mut entries: Vec<(u32, u64)> =
            own.map(|claim| (claim.slot, claim.generation)).collect();
        let room = INTENTS_PER_PAGE - entries.len();
        let unsettled = self.core.unsettled.lock();
        entries.extend(unsettled.iter().map(|(&slot, &at)| (slot, at)).take(room));
        entries
    }

    /// Writes all payloads.
    fn payloads(&mut self) -> Result<Vec<Fate>, Hung> {
        let (core, until) = (self.core, self.until);
        let pieces: Vec<Piece<'_>> = self
            .blocks
            .iter()
            .flat_map(|block| self.payload(block))
            .collect();
        let flight = self.batch.write(&pieces, until);
        let sums: Vec<Result<Header, AccessError>> = (0..self.blocks.len())
            .map(|index| self.header(index))
            .collect();
        let together = self.batch.wait(flight, until)?;
        let one_by_one = match &together {
            Ok(()) => None,
            // Those that failed are found by trying each.
            Err(error) => match error.kind {
                DiskErrorKind::Full | DiskErrorKind::Media | DiskErrorKind::Other => Some(()),
                DiskErrorKind::ReadOnly | DiskErrorKind::TimedOut => None,
            },
        };
        let mut fates = Vec::with_capacity(sums.len());
        for (block, header) in self.blocks.clone().iter().zip(sums) {
            let written = match one_by_one {
                Some(()) => {
                    let pieces: Vec<Piece<'_>> = self.payload(block).collect();
                    let flight = self.batch.write(&pieces, until);
                    self.batch.wait(flight, until)?
                }
                None => together.clone(),
            };
            fates.push(match (written, header) {
                (Ok(()), Ok(header)) => Fate::Sound(header),
                (Ok(()), Err(error)) => Fate::Failed(DiskError::other(error)),
                (Err(error), _) => {
                    core.health.write_failed(&error);
                    if error.kind == DiskErrorKind::Media {
                        Fate::Media(error)
                    } else {
                        Fate::Failed(error)
                    }
                }
            });
        }
        Ok(fates)
    }

    fn payload(&self, block: &SlotWrite) -> impl Iterator<Item = Piece<'_>> + use<'_> {
        let at = self.core.geometry.payload_of(block.slot);
        self.from.pieces(block.block, at)
    }

    fn header(&self, index: usize) -> Result<Header, AccessError> {
        let block = &self.blocks[index];
        let (fingerprint, length) = (self.core.fingerprint, self.core.geometry.block_bytes);
        let generation = self.batch.claims[index].generation;
        let seed = payload_seed(fingerprint, block.name, generation, length);
        Ok(Header {
            state: SlotState::Valid,
            slot: block.slot,
            name: block.name,
            parent: block.parent,
            fingerprint,
            generation,
            length,
            checksum: self.from.checksum(block.block, seed)?,
        })
    }

    /// Reads back what was written into slots in quarantine.
    fn check_quarantined(&mut self, fates: Vec<Fate>) -> Result<Vec<Fate>, Hung> {
        let mut checked = Vec::with_capacity(fates.len());
        for (index, fate) in fates.into_iter().enumerate() {
            checked.push(match fate {
                Fate::Sound(header) if self.batch.claims[index].quarantined => {
                    match self.read_back(&header)? {
                        Ok(()) => Fate::Sound(header),
                        Err(error) => Fate::Media(error),
                    }
                }
                fate => fate,
            });
        }
        Ok(checked)
    }

    fn read_back(&mut self, header: &Header) -> Result<Result<(), DiskError>, Hung> {
        let bytes = self.core.geometry.block_bytes;
        let memory = usize::try_from(bytes).map_err(|error| error.to_string());
        let memory = memory.map_err(DiskError::other);
        let memory = match memory.and_then(|bytes| self.core.disk.memory(bytes)) {
            Ok(memory) => memory,
            Err(error) => return Ok(Err(error)),
        };
        let piece = Piece {
            memory: &memory,
            offset: 0,
            at: self.core.geometry.payload_of(header.slot),
            bytes,
        };
        let flight = self.core.disk.start(Op::Read, &[piece], self.until);
        if let Err(error) = self.batch.wait(flight, self.until)? {
            return Ok(Err(error));
        }
        let seed = payload_seed(header.fingerprint, header.name, header.generation, bytes);
        let read = StoreMemory::whole(&memory, bytes).checksum(0, seed);
        Ok(match read {
            Ok(sum) if sum == header.checksum => Ok(()),
            Ok(_) => Err(DiskError {
                kind: DiskErrorKind::Media,
                message: "what was written there does not read back".to_owned(),
            }),
            Err(error) => Err(DiskError::other(error)),
        })
    }

    /// Writes the headers: of new blocks, and of slots that hold none any more.
    fn headers(&mut self, fates: Vec<Fate>) -> Result<Vec<BlockOutcome>, Hung> {
        let core = self.core;
        let headers: Vec<Header> = fates
            .iter()
            .enumerate()
            .map(|(index, fate)| match fate {
                Fate::Sound(header) => *header,
                Fate::Media(_) => self.without_block(index, true),
                Fate::Failed(_) => self.without_block(index, self.batch.claims[index].quarantined),
            })
            .collect();
        let slots: Vec<u32> = headers.iter().map(|header| header.slot).collect();
        let edit = |slot: u32, bytes: &mut [u8; HEADER]| {
            if let Some(header) = headers.iter().find(|header| header.slot == slot) {
                *bytes = header.encode(core.id);
            }
        };
        let failed = self.batch.write_headers(&slots, edit, self.until)?;
        let mut outcomes = Vec::with_capacity(fates.len());
        for (index, (fate, header)) in fates.into_iter().zip(&headers).enumerate() {
            let failure = failed.iter().find(|(slot, _)| *slot == header.slot);
            let known = Known {
                sequence: header.name.sequence.0,
                checksum: header.checksum,
                generation: header.generation,
            };
            if failure.is_none() {
                self.batch.settle(index, header.state, known);
            }
            outcomes.push(match (fate, failure) {
                (Fate::Sound(_), None) => {
                    core.health.wrote();
                    BlockOutcome::Moved
                }
                (Fate::Sound(_), Some((_, error))) => {
                    core.health.write_failed(error);
                    self.lost(error)
                }
                (Fate::Media(error) | Fate::Failed(error), _) => self.lost(&error),
            });
        }
        Ok(outcomes)
    }

    fn without_block(&self, index: usize, quarantined: bool) -> Header {
        let block = &self.blocks[index];
        Header {
            state: match quarantined {
                true => SlotState::Quarantined,
                false => SlotState::Empty,
            },
            slot: block.slot,
            name: block.name,
            parent: None,
            fingerprint: self.core.fingerprint,
            generation: self.batch.claims[index].generation,
            length: 0,
            checksum: 0,
        }
    }

    /// The outcome of a block that could not be written.
    fn lost(&self, error: &DiskError) -> BlockOutcome {
        match error.kind {
            DiskErrorKind::Full | DiskErrorKind::Media => {
                self.core.health.lose(1, &error.message);
                BlockOutcome::Bad(error.message.clone())
            }
            DiskErrorKind::ReadOnly | DiskErrorKind::TimedOut | DiskErrorKind::Other => {
                BlockOutcome::Failed(error.message.clone())
            }
        }
    }
}

//! Reading blocks: one request each, and nothing is believed that does not have its checksum.

use std::{sync::Arc, time::Instant};

use blockplane_transfer::Op;

use super::{
    BATCH, Core,
    batch::Batch,
    disk::{DiskError, DiskErrorKind, Flight, Piece},
    format::{HEADER, Header, SlotState, payload_seed},
    report::{BlockOutcome, Invalid, Pending, SlotRead, StoreMemory, StoreReport},
    slots::Known,
};

/// Blocks are checked in groups of about this many bytes, while later ones still arrive.
const GROUP_BYTES: u64 = 1 << 20;

/// A block to read, and what is known of it.
struct Wanted {
    index: usize,
    block: SlotRead,
    known: Known,
}

pub(super) fn read(
    core: &Arc<Core>,
    into: &StoreMemory<'_>,
    blocks: &[SlotRead],
    until: Instant,
) -> StoreReport {
    let block_bytes = core.geometry.block_bytes;
    let refusal = core
        .health
        .no_reads()
        .or_else(|| into.check(block_bytes).err());
    if let Some(reason) = refusal {
        return StoreReport::failed(blocks.len(), &reason);
    }
    let mut report = StoreReport::failed(blocks.len(), "not read in time");
    let mut wanted = Vec::with_capacity(blocks.len());
    for (index, &block) in blocks.iter().enumerate() {
        let known = core.slots.valid(block.slot);
        match known.filter(|known| known.sequence == block.name.sequence.0) {
            None => report.outcomes[index] = BlockOutcome::Invalid(Invalid::Missing),
            Some(_) if block.block >= into.layout.blocks => {
                let reason = format!("the memory has no block {}", block.block);
                report.outcomes[index] = BlockOutcome::Failed(reason);
            }
            Some(known) => wanted.push(Wanted {
                index,
                block,
                known,
            }),
        }
    }
    let group = usize::try_from(GROUP_BYTES / block_bytes)
        .unwrap_or(1)
        .max(1);
    let start = |wanted: &[Wanted]| {
        let pieces: Vec<Piece<'_>> = wanted
            .iter()
            .flat_map(|wanted| into.pieces(wanted.block.block, core.payload_of(wanted.block.slot)))
            .collect();
        core.disk.start(Op::Read, &pieces, until)
    };
    let flights: Vec<_> = wanted.chunks(group).map(start).collect();
    let mut late: Vec<Flight> = Vec::new();
    let mut spoilt = Vec::new();
    for (wanted, flight) in wanted.chunks(group).zip(flights) {
        let Some(result) = wait(flight, until, &mut late) else {
            continue;
        };
        let together = match result {
            Ok(()) => true,
            Err(error) if error.kind == DiskErrorKind::TimedOut => continue,
            // Those that failed are found by trying each.
            Err(_) => false,
        };
        for one in wanted {
            let result = if together {
                Some(Ok(()))
            } else {
                wait(start(std::slice::from_ref(one)), until, &mut late)
            };
            if let Some(result) = result {
                report.outcomes[one.index] = judge(core, into, one, result, &mut spoilt);
            }
        }
    }
    report.pending =
        (!late.is_empty()).then(|| Pending::new(move || late.into_iter().for_each(Flight::quiet)));
    if !spoilt.is_empty() {
        core.to_mark.lock().extend(spoilt);
        let pending = mark_quarantined(core, until);
        report.pending = Pending::both(report.pending, pending);
    }
    report
}

/// The end of a request; none when it hangs.
fn wait(
    flight: Result<Flight, DiskError>,
    until: Instant,
    late: &mut Vec<Flight>,
) -> Option<Result<(), DiskError>> {
    match flight {
        Err(error) => Some(Err(error)),
        Ok(mut flight) => {
            let result = flight.wait(until);
            if result.is_none() {
                late.push(flight);
            }
            result
        }
    }
}

/// What a block that has arrived, or has not, is worth.
fn judge(
    core: &Core,
    into: &StoreMemory<'_>,
    wanted: &Wanted,
    result: Result<(), DiskError>,
    spoilt: &mut Vec<u32>,
) -> BlockOutcome {
    let Wanted { block, known, .. } = wanted;
    let quarantine = |spoilt: &mut Vec<u32>| {
        if core.slots.quarantine(block.slot, known.generation) {
            spoilt.push(block.slot);
        }
    };
    if let Err(error) = result {
        core.look_at_file();
        core.health.read_failed(&error);
        if error.kind == DiskErrorKind::Media {
            quarantine(spoilt);
        }
        return BlockOutcome::Failed(error.message);
    }
    core.health.read();
    let length = core.geometry.block_bytes;
    let seed = payload_seed(core.fingerprint, block.name, known.generation, length);
    match into.checksum(block.block, seed) {
        Ok(sum) if sum == known.checksum => BlockOutcome::Moved,
        Ok(_) => {
            quarantine(spoilt);
            core.count_invalid();
            tracing::warn!(
                store = %core.path.display(),
                slot = block.slot,
                name = %block.name.sequence,
                "a stored block has a wrong checksum: its slot is in quarantine"
            );
            BlockOutcome::Invalid(Invalid::Checksum)
        }
        Err(error) => BlockOutcome::Failed(error.to_string()),
    }
}

/// Writes down which slots are in quarantine. What cannot be written now is tried again with the next
/// flush; a slot that is not written down is found spoilt again in the next life.
pub(super) fn mark_quarantined(core: &Arc<Core>, until: Instant) -> Option<Pending> {
    let mut pending = None;
    loop {
        let slots: Vec<u32> = {
            let mut to_mark = core.to_mark.lock();
            let some: Vec<u32> = to_mark.iter().copied().take(BATCH).collect();
            for slot in &some {
                to_mark.remove(slot);
            }
            some
        };
        if slots.is_empty() || core.health.no_writes().is_some() {
            return pending;
        }
        let (failed, hung) = mark(core, &slots, until);
        pending = Pending::both(pending, hung);
        if !failed.is_empty() {
            core.to_mark.lock().extend(failed);
            return pending;
        }
    }
}

/// Slots that could not be written down, and what hangs.
fn mark(core: &Arc<Core>, slots: &[u32], until: Instant) -> (Vec<u32>, Option<Pending>) {
    let Ok(mut batch) = Batch::take(core, slots.iter().copied(), until) else {
        return (slots.to_vec(), None);
    };
    // Those overwritten since have other headers now, and while the pages are held none can get one.
    let slots: Vec<u32> = slots
        .iter()
        .copied()
        .filter(|&slot| core.slots.is_quarantined(slot))
        .collect();
    let edit = |slot: u32, bytes: &mut [u8; HEADER]| {
        if let Some(header) = Header::decode(bytes, core.id, slot) {
            let header = Header {
                state: SlotState::Quarantined,
                ..header
            };
            *bytes = header.encode(core.id);
        }
    };
    batch.read_headers(until);
    let failed = match batch.write_headers(&slots, edit, until) {
        Ok(failed) => failed.into_iter().map(|(slot, _)| slot).collect(),
        Err(_) => slots,
    };
    (failed, batch.end(until))
}

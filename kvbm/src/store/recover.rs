//! Opening: is there a store, what is in it, in which order do the books hear of it.

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, Instant},
};

use blockplane_protocol::{SequenceHash, TokenBlock};
use blockplane_transfer::{Op, Registration};

use super::{
    config::{Recovery, StoreError},
    disk::{Disk, DiskError, Piece},
    format::{
        Geometry, HEADER, HEADERS_PER_PAGE, Header, INTENT_PAGES, NoSuperblock, PAGE, PAGE_BYTES,
        Page, SlotState, Superblock, VERSION, decode_intents,
    },
    report::RecoveredSlot,
    slots::{Known, Slots},
};
use crate::fingerprint::Fingerprint;

/// Pages of headers that are read at a time; twice as many are in memory.
const CHUNK_PAGES: u32 = 512;

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) fingerprint: Fingerprint,
    pub(super) geometry: Geometry,
    /// The file is ours by its name, whatever is in it.
    pub(super) owned: bool,
}

/// What is done with what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plan {
    /// Begin anew; the next superblock has this number.
    Fresh { sequence: u64 },
    /// Go on with it.
    Reopen(Superblock),
}

/// What a store has in it.
pub(super) struct Contents {
    pub(super) slots: Slots,
    pub(super) recovered: Vec<RecoveredSlot>,
    pub(super) recovery: Recovery,
    /// Slots whose contents are unknown, with the generation of the intent.
    pub(super) unsettled: BTreeMap<u32, u64>,
    /// Higher than all that are there.
    pub(super) generation: u64,
}

/// Looks at the superblocks and decides.
pub(super) fn plan(
    disk: &dyn Disk,
    path: &Path,
    wanted: &Wanted,
    time: Duration,
) -> Result<Plan, StoreError> {
    let failed = |error: DiskError| failed("read", path, &error);
    let length = disk.length().map_err(failed)?;
    let copies = if length >= 2 * PAGE_BYTES {
        let memory = disk.memory(2 * PAGE).map_err(failed)?;
        let copy = |copy: u64| match read_page(disk, &memory, copy * PAGE_BYTES, time) {
            Ok(page) => Superblock::decode(&page),
            Err(error) => {
                tracing::warn!(store = %path.display(), copy, error = %error.message, "superblock is unreadable");
                Err(NoSuperblock::Damaged)
            }
        };
        [copy(0), copy(1)]
    } else if length == 0 {
        [Err(NoSuperblock::Blank); 2]
    } else {
        [Err(NoSuperblock::Other); 2]
    };
    decide(copies, path, wanted)
}

fn decide(
    copies: [Result<Superblock, NoSuperblock>; 2],
    path: &Path,
    wanted: &Wanted,
) -> Result<Plan, StoreError> {
    let newest = copies.iter().flatten().max_by_key(|copy| copy.sequence);
    if let Some(&superblock) = newest {
        let found = superblock.geometry;
        let describe =
            |fingerprint: &Fingerprint, bytes: u64| format!("{fingerprint}, {bytes} bytes a block");
        if superblock.fingerprint != wanted.fingerprint
            || found.block_bytes != wanted.geometry.block_bytes
        {
            return Err(StoreError::Foreign {
                path: path.to_owned(),
                got: describe(&superblock.fingerprint, found.block_bytes),
                wanted: describe(&wanted.fingerprint, wanted.geometry.block_bytes),
            });
        }
        if wanted.geometry.slots > found.slots {
            tracing::info!(
                store = %path.display(),
                had = found.slots,
                wanted = wanted.geometry.slots,
                "KV store has fewer slots than asked for: it begins anew"
            );
            return Ok(Plan::Fresh {
                sequence: superblock.sequence + 1,
            });
        }
        return Ok(Plan::Reopen(superblock));
    }
    let version = copies.iter().find_map(|copy| match copy {
        Err(NoSuperblock::Version(got)) => Some(*got),
        _ => None,
    });
    if let Some(got) = version {
        return Err(StoreError::Version {
            path: path.to_owned(),
            got,
            accepted: VERSION,
        });
    }
    let blank = copies == [Err(NoSuperblock::Blank); 2];
    let damaged = copies.contains(&Err(NoSuperblock::Damaged));
    if !blank && !damaged && !wanted.owned {
        return Err(StoreError::NotAStore {
            path: path.to_owned(),
        });
    }
    if !blank {
        tracing::warn!(store = %path.display(), "KV store is damaged beyond recovery: it begins anew");
    }
    Ok(Plan::Fresh { sequence: 1 })
}

/// Reads all headers and intents of a store.
pub(super) fn contents(
    disk: &dyn Disk,
    path: &Path,
    superblock: &Superblock,
    capacity: u32,
    time: Duration,
) -> Result<Contents, StoreError> {
    let failed = |error: DiskError| failed("read the index of", path, &error);
    let memory = disk
        .memory(2 * CHUNK_PAGES as usize * PAGE)
        .map_err(failed)?;
    let intents = read_intents(disk, &memory, superblock.id, time);
    let slots = Slots::new(capacity);
    let mut found = Found {
        superblock,
        capacity,
        slots: &slots,
        intents: &intents,
        blocks: Vec::new(),
        generation: superblock.generation,
        recovery: Recovery {
            existed: true,
            clean: superblock.clean,
            ..Recovery::default()
        },
        unsettled: BTreeMap::new(),
    };
    let last = intents.values().copied().max().unwrap_or(0);
    found.generation = found.generation.max(last + 1);
    found.read(disk, &memory, time).map_err(failed)?;
    let Found {
        blocks,
        generation,
        mut recovery,
        unsettled,
        ..
    } = found;
    let recovered = order(&slots, blocks, &mut recovery);
    Ok(Contents {
        slots,
        recovered,
        recovery,
        unsettled,
        generation,
    })
}

/// A block in a slot.
#[derive(Clone, Copy)]
struct Block {
    slot: u32,
    name: TokenBlock,
    parent: Option<SequenceHash>,
    generation: u64,
}

/// What has been read so far.
struct Found<'a> {
    superblock: &'a Superblock,
    capacity: u32,
    slots: &'a Slots,
    intents: &'a BTreeMap<u32, u64>,
    blocks: Vec<Block>,
    generation: u64,
    recovery: Recovery,
    unsettled: BTreeMap<u32, u64>,
}

impl Found<'_> {
    /// Reads the headers; while those of one chunk are looked at, the next ones come in.
    fn read(
        &mut self,
        disk: &dyn Disk,
        memory: &Registration,
        time: Duration,
    ) -> Result<(), DiskError> {
        let pages = self.capacity.div_ceil(HEADERS_PER_PAGE);
        let piece = |first: u32| {
            let half = u64::from(first / CHUNK_PAGES % 2);
            let count = CHUNK_PAGES.min(pages - first);
            Piece {
                memory,
                offset: half * u64::from(CHUNK_PAGES) * PAGE_BYTES,
                at: Geometry::header_page(first),
                bytes: u64::from(count) * PAGE_BYTES,
            }
        };
        let start = |first: u32| {
            let until = Instant::now() + time;
            (until, disk.start(Op::Read, &[piece(first)], until))
        };
        let mut next = Some(start(0));
        for first in (0..pages).step_by(CHUNK_PAGES as usize) {
            let Some((until, flight)) = next.take() else {
                break;
            };
            let result = flight.and_then(|flight| flight.finish(until));
            next = pages
                .checked_sub(first + CHUNK_PAGES)
                .filter(|&left| left > 0)
                .map(|_| start(first + CHUNK_PAGES));
            let here = piece(first);
            for index in 0..CHUNK_PAGES.min(pages - first) {
                let offset = here.offset + u64::from(index) * PAGE_BYTES;
                let one = Piece {
                    offset,
                    at: here.at + u64::from(index) * PAGE_BYTES,
                    bytes: PAGE_BYTES,
                    ..here
                };
                // Those that cannot be read are found by trying each.
                let until = Instant::now() + time;
                if result.is_err() && disk.run(Op::Read, &[one], until).is_err() {
                    let slots = self.slots_of(first + index).count();
                    self.recovery.damaged += u32::try_from(slots).unwrap_or(u32::MAX);
                    continue;
                }
                let mut page = [0; PAGE];
                memory
                    .read_at(offset, &mut page)
                    .map_err(DiskError::other)?;
                self.page(first + index, &page);
            }
        }
        Ok(())
    }

    fn slots_of(&self, page: u32) -> std::ops::Range<u32> {
        let first = page * HEADERS_PER_PAGE;
        first..self.capacity.min(first + HEADERS_PER_PAGE)
    }

    fn page(&mut self, page: u32, bytes: &Page) {
        let (headers, _) = bytes.as_chunks::<HEADER>();
        for (slot, header) in self.slots_of(page).zip(headers) {
            self.slot(slot, header);
        }
    }

    fn slot(&mut self, slot: u32, bytes: &[u8; HEADER]) {
        let header = Header::decode(bytes, self.superblock.id, slot);
        let intent = self.intents.get(&slot).copied();
        let open = |generation: u64| intent.filter(|&intent| intent > generation);
        let Some(header) = header else {
            if bytes.iter().any(|&byte| byte != 0) {
                self.recovery.damaged += 1;
            }
            if let Some(generation) = intent {
                self.unsettled.insert(slot, generation);
            }
            return;
        };
        self.generation = self.generation.max(header.generation + 1);
        if let Some(generation) = open(header.generation) {
            self.unsettled.insert(slot, generation);
        }
        let known = Known {
            sequence: header.name.sequence.0,
            checksum: header.checksum,
            generation: header.generation,
        };
        match header.state {
            SlotState::Empty => {}
            SlotState::Quarantined => {
                self.recovery.quarantined += 1;
                self.slots.set(slot, SlotState::Quarantined, known);
            }
            SlotState::Valid if open(header.generation).is_some() => self.recovery.interrupted += 1,
            SlotState::Valid
                if header.fingerprint != self.superblock.fingerprint.digest()
                    || header.length != self.superblock.geometry.block_bytes =>
            {
                self.recovery.damaged += 1;
            }
            SlotState::Valid => {
                self.slots.set(slot, SlotState::Valid, known);
                self.blocks.push(Block {
                    slot,
                    name: header.name,
                    parent: header.parent,
                    generation: header.generation,
                });
            }
        }
    }
}

/// The highest intent of each slot. Pages that cannot be read say nothing: what they would say is found
/// by the checksum of the payload.
fn read_intents(
    disk: &dyn Disk,
    memory: &Registration,
    id: u64,
    time: Duration,
) -> BTreeMap<u32, u64> {
    let mut intents = BTreeMap::new();
    let all = Piece {
        memory,
        offset: 0,
        at: Geometry::INTENTS,
        bytes: u64::from(INTENT_PAGES) * PAGE_BYTES,
    };
    let together = disk.run(Op::Read, &[all], Instant::now() + time).is_ok();
    for index in 0..INTENT_PAGES {
        let offset = u64::from(index) * PAGE_BYTES;
        let mut page = [0; PAGE];
        let page = if together {
            memory.read_at(offset, &mut page).ok().map(|()| page)
        } else {
            read_page(disk, memory, Geometry::intent_page(index), time).ok()
        };
        for (slot, generation) in page.iter().flat_map(|page| decode_intents(id, page)) {
            let highest = intents.entry(slot).or_insert(generation);
            *highest = generation.max(*highest);
        }
    }
    intents
}

/// Reads one page by way of the first page of `memory`.
fn read_page(
    disk: &dyn Disk,
    memory: &Registration,
    at: u64,
    time: Duration,
) -> Result<Page, DiskError> {
    let piece = Piece {
        memory,
        offset: 0,
        at,
        bytes: PAGE_BYTES,
    };
    disk.run(Op::Read, &[piece], Instant::now() + time)?;
    let mut page = [0; PAGE];
    memory.read_at(0, &mut page).map_err(DiskError::other)?;
    Ok(page)
}

/// Of blocks with one name the newest; older before newer, but a parent before its children.
fn order(slots: &Slots, mut blocks: Vec<Block>, recovery: &mut Recovery) -> Vec<RecoveredSlot> {
    blocks.sort_unstable_by_key(|block| (block.name.sequence.0, u64::MAX - block.generation));
    let before = blocks.len();
    blocks.dedup_by(|later, kept| {
        let same = later.name.sequence == kept.name.sequence;
        if same {
            slots.set(later.slot, SlotState::Empty, Known::at(later.generation));
        }
        same
    });
    recovery.duplicates = count(before - blocks.len());
    recovery.blocks = count(blocks.len());
    let place = |name: SequenceHash| {
        blocks
            .binary_search_by_key(&name, |block| block.name.sequence)
            .ok()
    };
    let mut by_age: Vec<usize> = (0..blocks.len()).collect();
    by_age.sort_unstable_by_key(|&index| blocks[index].generation);
    let mut done = vec![false; blocks.len()];
    let mut recovered = Vec::with_capacity(blocks.len());
    let mut chain = Vec::new();
    for index in by_age {
        let mut at = Some(index);
        while let Some(index) = at.filter(|&index| !done[index]) {
            // Set on the way up, so that even names that chase each other end.
            done[index] = true;
            chain.push(index);
            at = blocks[index].parent.and_then(place);
        }
        recovered.extend(chain.drain(..).rev().map(|index| {
            let Block {
                slot, name, parent, ..
            } = blocks[index];
            RecoveredSlot { slot, name, parent }
        }));
    }
    recovered
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

pub(super) fn failed(what: &'static str, path: &Path, error: &DiskError) -> StoreError {
    StoreError::Disk {
        what,
        path: path.to_owned(),
        reason: error.message.clone(),
    }
}

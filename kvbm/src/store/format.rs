//! Bytes on the disk: superblock, intents, headers. docs/kv-store.md describes them byte by byte.
//!
//! Pure functions. Everything is little-endian and protected by an xxh3-64; decoding accepts what
//! encoding made and nothing else.

use blockplane_protocol::{BlockHash, SequenceHash, TokenBlock};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::fingerprint::Fingerprint;

/// Unit of all reads and writes outside of payloads.
pub(super) const PAGE: usize = 4096;
/// [`PAGE`] as an offset.
pub(super) const PAGE_BYTES: u64 = PAGE as u64;
/// [`PAGE`] as it is written down.
const PAGE_WORD: u32 = 4096;
/// Version of this format.
pub(super) const VERSION: u32 = 1;
/// Bytes of a header.
pub(super) const HEADER: usize = 128;
/// Headers in a page.
pub(super) const HEADERS_PER_PAGE: u32 = 32;
const _: () = assert!(HEADERS_PER_PAGE as usize * HEADER == PAGE);
/// Pages for intents: batches of writes under way, at most.
pub(super) const INTENT_PAGES: u32 = 64;
/// Entries of an intent page.
pub(super) const INTENTS_PER_PAGE: usize = 336;

/// The first bytes of a store.
pub(super) const MAGIC: [u8; 8] = *b"BPKVSLOT";
const HEADER_MAGIC: [u8; 4] = *b"BPKH";
const INTENT_MAGIC: [u8; 4] = *b"BPKI";
const CLEAN: u32 = 1;
const HAS_PARENT: u32 = 1;
/// Payloads begin at a multiple of it, which suits every device.
const PAYLOAD_ALIGN: u64 = 1 << 20;

/// A page in memory.
pub(super) type Page = [u8; PAGE];

/// Where everything lies in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) slots: u32,
    pub(super) block_bytes: u64,
    /// Bytes from one slot to the next: whole pages.
    pub(super) stride: u64,
    pub(super) payload: u64,
}

impl Geometry {
    /// First byte of the intents.
    pub(super) const INTENTS: u64 = 2 * PAGE_BYTES;
    /// First byte of the headers.
    pub(super) const HEADERS: u64 = Self::INTENTS + INTENT_PAGES as u64 * PAGE_BYTES;

    /// None when the file would not have a length that can be expressed.
    pub(super) fn new(slots: u32, block_bytes: u64) -> Option<Self> {
        let stride = block_bytes.checked_next_multiple_of(PAGE_BYTES)?;
        let headers = u64::from(slots.div_ceil(HEADERS_PER_PAGE)) * PAGE_BYTES;
        let geometry = Self {
            slots,
            block_bytes,
            stride,
            payload: (Self::HEADERS + headers).next_multiple_of(PAYLOAD_ALIGN),
        };
        let end = u64::from(slots)
            .checked_mul(stride)?
            .checked_add(geometry.payload)?;
        (slots > 0 && block_bytes > 0 && end <= i64::MAX.unsigned_abs()).then_some(geometry)
    }

    /// Length of a file with `slots` slots of this geometry.
    pub(super) fn length(&self, slots: u32) -> u64 {
        self.payload + u64::from(slots) * self.stride
    }

    /// Slots that a file of `length` bytes has room for.
    pub(super) fn fits(&self, length: u64) -> u32 {
        let slots = length.saturating_sub(self.payload) / self.stride;
        u32::try_from(slots).unwrap_or(u32::MAX).min(self.slots)
    }

    /// First byte of a payload.
    pub(super) fn payload_of(&self, slot: u32) -> u64 {
        self.payload + u64::from(slot) * self.stride
    }

    /// First byte of a page of headers.
    pub(super) fn header_page(page: u32) -> u64 {
        Self::HEADERS + u64::from(page) * PAGE_BYTES
    }

    /// First byte of a page of intents.
    pub(super) fn intent_page(page: u32) -> u64 {
        Self::INTENTS + u64::from(page) * PAGE_BYTES
    }
}

/// Length of a file with room for `slots` blocks of `block_bytes` bytes; `None` when it would have none
/// that can be expressed.
#[must_use]
pub fn file_bytes(slots: u32, block_bytes: u64) -> Option<u64> {
    Geometry::new(slots, block_bytes).map(|geometry| geometry.length(slots))
}

/// What a store says of itself. Two copies, written in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Superblock {
    /// Higher is newer.
    pub(super) sequence: u64,
    /// Random; bound into the checksums of headers and intents, so that those of an earlier store in
    /// the same place are not taken for those of this one.
    pub(super) id: u64,
    pub(super) geometry: Geometry,
    pub(super) fingerprint: Fingerprint,
    /// It was closed, and nothing was written since.
    pub(super) clean: bool,
    /// Of the next write of a slot.
    pub(super) generation: u64,
    pub(super) bytes_written: u64,
    pub(super) opens: u64,
    /// When it was made, seconds since the epoch of Unix.
    pub(super) since: u64,
}

/// Why a page is no superblock of this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoSuperblock {
    /// All zeros.
    Blank,
    /// It begins as one, and is damaged.
    Damaged,
    /// Sound, and of another version of the format.
    Version(u32),
    /// Something else.
    Other,
}

impl Superblock {
    pub(super) fn encode(&self) -> Page {
        let mut page = [0; PAGE];
        let mut put = Put(&mut page, 0);
        put.bytes(&MAGIC);
        put.u32(VERSION);
        put.u32(PAGE_WORD);
        put.u64(self.sequence);
        put.u64(self.id);
        put.u32(self.geometry.slots);
        put.u32(if self.clean { CLEAN } else { 0 });
        put.u64(self.geometry.block_bytes);
        put.u64(self.geometry.stride);
        put.u64(self.geometry.payload);
        put.bytes(&self.fingerprint.encode());
        put.u64(self.generation);
        put.u64(self.bytes_written);
        put.u64(self.opens);
        put.u64(self.since);
        seal(&mut page, 0);
        page
    }

    pub(super) fn decode(page: &Page) -> Result<Self, NoSuperblock> {
        if page.iter().all(|&byte| byte == 0) {
            return Err(NoSuperblock::Blank);
        }
        let mut take = Take(page, 0);
        if take.bytes::<8>() != MAGIC {
            return Err(NoSuperblock::Other);
        }
        if !sealed(page, 0) {
            return Err(NoSuperblock::Damaged);
        }
        let version = take.u32();
        if version != VERSION || take.u32() != PAGE_WORD {
            return Err(NoSuperblock::Version(version));
        }
        let (sequence, id) = (take.u64(), take.u64());
        let (slots, flags) = (take.u32(), take.u32());
        let (block_bytes, stride, payload) = (take.u64(), take.u64(), take.u64());
        let geometry = Geometry::new(slots, block_bytes)
            .filter(|geometry| geometry.stride == stride && geometry.payload == payload)
            .ok_or(NoSuperblock::Damaged)?;
        Ok(Self {
            sequence,
            id,
            geometry,
            fingerprint: Fingerprint::decode(&take.bytes()),
            clean: flags & CLEAN != 0,
            generation: take.u64(),
            bytes_written: take.u64(),
            opens: take.u64(),
            since: take.u64(),
        })
    }
}

/// What is in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SlotState {
    /// Nothing that may be read.
    Empty,
    /// A block.
    Valid,
    /// Bytes were not what had been written: a block is believed here only after it was read back.
    Quarantined,
}

/// Header of one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) state: SlotState,
    pub(super) slot: u32,
    pub(super) name: TokenBlock,
    pub(super) parent: Option<SequenceHash>,
    /// [`Fingerprint::digest`].
    pub(super) fingerprint: u64,
    pub(super) generation: u64,
    pub(super) length: u64,
    /// Of the payload, see [`payload_seed`].
    pub(super) checksum: u64,
}

impl Header {
    /// `id` is that of the store.
    pub(super) fn encode(&self, id: u64) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut put = Put(&mut bytes, 0);
        put.bytes(&HEADER_MAGIC);
        put.u32(VERSION);
        put.u32(match self.state {
            SlotState::Empty => 0,
            SlotState::Valid => 1,
            SlotState::Quarantined => 2,
        });
        put.u32(if self.parent.is_some() { HAS_PARENT } else { 0 });
        put.u32(self.slot);
        put.u32(0);
        put.u64(self.name.sequence.0);
        put.u64(self.name.block.0);
        put.u64(self.parent.map_or(0, |parent| parent.0));
        put.u64(self.fingerprint);
        put.u64(self.generation);
        put.u64(self.length);
        put.u64(self.checksum);
        seal(&mut bytes, id);
        bytes
    }

    /// None when it is not a header of this store and this slot, or is damaged.
    pub(super) fn decode(bytes: &[u8; HEADER], id: u64, slot: u32) -> Option<Self> {
        let mut take = Take(bytes, 0);
        if take.bytes::<4>() != HEADER_MAGIC || !sealed(bytes, id) || take.u32() != VERSION {
            return None;
        }
        let state = match take.u32() {
            0 => SlotState::Empty,
            1 => SlotState::Valid,
            2 => SlotState::Quarantined,
            _ => return None,
        };
        let has_parent = take.u32() & HAS_PARENT != 0;
        let own = take.u32();
        take.u32();
        let sequence = SequenceHash(take.u64());
        let block = BlockHash(take.u64());
        let parent = SequenceHash(take.u64());
        (own == slot).then(|| Self {
            state,
            slot,
            name: TokenBlock { block, sequence },
            parent: has_parent.then_some(parent),
            fingerprint: take.u64(),
            generation: take.u64(),
            length: take.u64(),
            checksum: take.u64(),
        })
    }
}

/// Seed of the checksum of a payload: everything that has to be right besides its bytes.
pub(super) fn payload_seed(
    fingerprint: u64,
    name: TokenBlock,
    generation: u64,
    length: u64,
) -> u64 {
    let mut bytes = [0; 40];
    let mut put = Put(&mut bytes, 0);
    put.u64(fingerprint);
    put.u64(name.sequence.0);
    put.u64(name.block.0);
    put.u64(generation);
    put.u64(length);
    xxh3_64(&bytes)
}

/// Slots that are being overwritten, with the generation that they are going to have.
pub(super) fn encode_intents(id: u64, entries: &[(u32, u64)]) -> Page {
    let mut page = [0; PAGE];
    let mut put = Put(&mut page, 0);
    let entries = &entries[..entries.len().min(INTENTS_PER_PAGE)];
    // At most [`INTENTS_PER_PAGE`].
    let count = u32::try_from(entries.len()).unwrap_or(u32::MAX);
    put.bytes(&INTENT_MAGIC);
    put.u32(VERSION);
    put.u32(count);
    put.u32(0);
    for &(slot, generation) in entries {
        put.u32(slot);
        put.u64(generation);
    }
    seal(&mut page, id);
    page
}

/// The reverse of [`encode_intents`]; nothing when the page is not one of this store, or is damaged.
pub(super) fn decode_intents(id: u64, page: &Page) -> Vec<(u32, u64)> {
    let mut take = Take(page, 0);
    if take.bytes::<4>() != INTENT_MAGIC || !sealed(page, id) || take.u32() != VERSION {
        return Vec::new();
    }
    let count = (take.u32() as usize).min(INTENTS_PER_PAGE);
    take.u32();
    (0..count).map(|_| (take.u32(), take.u64())).collect()
}

/// Writes the checksum of all other bytes into the last eight.
fn seal(bytes: &mut [u8], seed: u64) {
    let at = bytes.len() - 8;
    let sum = xxh3_64_with_seed(&bytes[..at], seed);
    bytes[at..].copy_from_slice(&sum.to_le_bytes());
}

fn sealed(bytes: &[u8], seed: u64) -> bool {
    let at = bytes.len() - 8;
    xxh3_64_with_seed(&bytes[..at], seed).to_le_bytes() == bytes[at..]
}

/// Writes fields one after the other.
struct Put<'a>(&'a mut [u8], usize);

impl Put<'_> {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0[self.1..self.1 + bytes.len()].copy_from_slice(bytes);
        self.1 += bytes.len();
    }

    fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }
}

/// Reads fields one after the other.
struct Take<'a>(&'a [u8], usize);

impl Take<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.0[self.1..self.1 + N]);
        self.1 += N;
        bytes
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header() -> impl Strategy<Value = Header> {
        let state = prop_oneof![
            Just(SlotState::Empty),
            Just(SlotState::Valid),
            Just(SlotState::Quarantined)
        ];
        let numbers = any::<[u64; 6]>();
        (state, any::<u32>(), numbers, any::<Option<u64>>()).prop_map(
            |(
                state,
                slot,
                [block, sequence, fingerprint, generation, length, checksum],
                parent,
            )| {
                Header {
                    state,
                    slot,
                    name: TokenBlock {
                        block: BlockHash(block),
                        sequence: SequenceHash(sequence),
                    },
                    parent: parent.map(SequenceHash),
                    fingerprint,
                    generation,
                    length,
                    checksum,
                }
            },
        )
    }

    fn superblock() -> impl Strategy<Value = Superblock> {
        let words = any::<[u32; 4]>();
        (
            1..1u32 << 24,
            1..1u64 << 24,
            any::<[u64; 8]>(),
            words,
            any::<bool>(),
        )
            .prop_map(
                |(slots, block_bytes, [a, b, c, d, e, f, g, h], [i, j, k, l], clean)| Superblock {
                    sequence: a,
                    id: b,
                    geometry: Geometry::new(slots, block_bytes).unwrap(),
                    fingerprint: Fingerprint {
                        model: c,
                        layout: d,
                        block_tokens: i,
                        tp_rank: j,
                        tp_size: k,
                        encoding: l,
                    },
                    clean,
                    generation: e,
                    bytes_written: f,
                    opens: g,
                    since: h,
                },
            )
    }

    proptest! {
        #[test]
        fn headers_come_back(header in header(), id: u64) {
            let bytes = header.encode(id);
            prop_assert_eq!(Header::decode(&bytes, id, header.slot), Some(header));
            prop_assert_eq!(Header::decode(&bytes, id, header.slot ^ 1), None);
            prop_assert_eq!(Header::decode(&bytes, id ^ 1, header.slot), None);
        }

        #[test]
        fn spoilt_headers_are_none(header in header(), id: u64, at in 0..HEADER, by in 1..=255u8) {
            let mut bytes = header.encode(id);
            bytes[at] ^= by;
            prop_assert_eq!(Header::decode(&bytes, id, header.slot), None);
        }

        #[test]
        fn superblocks_come_back(superblock in superblock()) {
            prop_assert_eq!(Superblock::decode(&superblock.encode()), Ok(superblock));
        }

        #[test]
        fn spoilt_superblocks_are_none(superblock in superblock(), at in 0..PAGE, by in 1..=255u8) {
            let mut page = superblock.encode();
            page[at] ^= by;
            prop_assert!(Superblock::decode(&page).is_err());
        }

        #[test]
        fn intents_come_back(
            id: u64,
            entries in prop::collection::vec(any::<(u32, u64)>(), 0..=INTENTS_PER_PAGE),
            at in 0..PAGE,
            by in 1..=255u8,
        ) {
            let mut page = encode_intents(id, &entries);
            prop_assert_eq!(decode_intents(id, &page), entries);
            prop_assert!(decode_intents(id ^ 1, &page).is_empty());
            page[at] ^= by;
            prop_assert!(decode_intents(id, &page).is_empty());
        }

        #[test]
        fn any_bytes_are_looked_at(
            bytes in prop::collection::vec(any::<u8>(), HEADER),
            magic in 0..4usize,
            id: u64,
            slot: u32,
        ) {
            let mut header = [0; HEADER];
            header.copy_from_slice(&bytes);
            let mut page = [0; PAGE];
            page[..HEADER].copy_from_slice(&bytes);
            match magic {
                0 => page[..8].copy_from_slice(&MAGIC),
                1 => page[..4].copy_from_slice(&INTENT_MAGIC),
                2 => header[..4].copy_from_slice(&HEADER_MAGIC),
                _ => {}
            }
            prop_assert_eq!(Header::decode(&header, id, slot), None);
            prop_assert!(Superblock::decode(&page).is_err());
            prop_assert!(decode_intents(id, &page).is_empty());
        }
    }

    #[test]
    fn another_version_is_named() {
        let geometry = Geometry::new(1, 1).unwrap();
        let superblock = Superblock {
            sequence: 1,
            id: 2,
            geometry,
            fingerprint: Fingerprint::decode(&[0; Fingerprint::BYTES]),
            clean: false,
            generation: 1,
            bytes_written: 0,
            opens: 0,
            since: 0,
        };
        let mut page = superblock.encode();
        page[8] = 2;
        seal(&mut page, 0);
        assert_eq!(Superblock::decode(&page), Err(NoSuperblock::Version(2)));
        assert_eq!(Superblock::decode(&[0; PAGE]), Err(NoSuperblock::Blank));
        assert_eq!(Superblock::decode(&[7; PAGE]), Err(NoSuperblock::Other));
    }

    #[test]
    fn places_do_not_overlap() {
        for (slots, bytes) in [(1, 1), (33, 4096), (1_000_000, 65_536), (7, 4097)] {
            let geometry = Geometry::new(slots, bytes).unwrap();
            let last = Geometry::header_page((slots - 1) / HEADERS_PER_PAGE);
            assert!(last + PAGE_BYTES <= geometry.payload);
            assert!(Geometry::intent_page(INTENT_PAGES - 1) + PAGE_BYTES <= Geometry::HEADERS);
            assert_eq!(geometry.fits(geometry.length(slots)), slots);
            assert_eq!(geometry.fits(geometry.length(slots) - 1), slots - 1);
        }
        for (slots, bytes) in [(0, 1), (1, 0), (u32::MAX, u64::MAX >> 16), (2, u64::MAX)] {
            assert_eq!(Geometry::new(slots, bytes), None);
        }
    }
}

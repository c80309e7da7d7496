//! A ring of notifications: a page of header, then records.
//!
//! A record is its length (u32), four zero bytes, and the payload, filled up to eight bytes.
//! Records wrap around at the end of the data.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;

use super::positions::Positions;
use crate::memory::{Mapping, copy_bytes, map_arena, small_file};
use crate::sync::{AtomicU64, Ordering};

const MAGIC: u32 = u32::from_le_bytes(*b"BPRG");
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 4096;
const RECORD_HEADER: u64 = 8;
/// Smallest data part: many small notifications.
const CAPACITY_MIN: u64 = 1 << 20;

// Places in the header. Fields that are written often have a cache line for each writer.
/// Magic in the lower half, version in the upper one.
const AT_MAGIC: usize = 0;
const AT_CAPACITY: usize = 8;
const AT_MESSAGES_MAX: usize = 16;
const AT_PAYLOAD_MAX: usize = 24;
const AT_HEAD: usize = 64;
const AT_SENT: usize = 72;
const AT_REFUSED: usize = 80;
const AT_TAIL: usize = 128;
const AT_TAKEN: usize = 136;

/// What a peer wrote into its ring makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the notification ring is corrupt: {0}")]
pub(crate) struct Corrupt(pub(super) &'static str);

/// Why a notification was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SendError {
    Full,
    TooLarge,
}

/// The mapping of a ring, and the numbers that its owner gave it. They are read once: the other
/// side can write the header.
#[derive(Debug)]
struct Shared {
    mapping: Mapping,
    capacity: u64,
    messages_max: u64,
    payload_max: u64,
}

impl Shared {
    fn word(&self, at: usize) -> &AtomicU64 {
        debug_assert!(at.is_multiple_of(8) && at < HEADER_BYTES);
        // SAFETY: `at` lies in the header page, which is mapped as long as `self`.
        let word = unsafe { self.mapping.base().as_ptr().add(at) };
        // SAFETY: aligned to 8 in a mapped page; every access by anybody is atomic.
        unsafe { &*word.cast::<AtomicU64>() }
    }

    fn positions(&self) -> Positions<'_> {
        Positions {
            head: self.word(AT_HEAD),
            tail: self.word(AT_TAIL),
            capacity: self.capacity,
        }
    }

    /// The two pieces of the data in which `bytes` bytes from `position` lie.
    fn pieces(&self, position: u64, bytes: usize) -> [(*mut u8, usize); 2] {
        // Both are below the capacity, which is the size of a mapping.
        let at = usize::try_from(position % self.capacity).unwrap_or(0);
        let capacity = usize::try_from(self.capacity).unwrap_or(0);
        let first = bytes.min(capacity - at);
        // SAFETY: the data begins behind the header page, inside the mapping.
        let data = unsafe { self.mapping.base().as_ptr().add(HEADER_BYTES) };
        // SAFETY: `at` is below the capacity.
        let place = unsafe { data.add(at) };
        [(place, first), (data, bytes - first)]
    }

    fn copy_in(&self, position: u64, from: &[u8]) {
        let mut from = from;
        for (place, bytes) in self.pieces(position, from.len()) {
            let (now, rest) = from.split_at(bytes);
            // SAFETY: the piece lies in the mapping, and `now` is a slice of this process.
            unsafe { copy_bytes(now.as_ptr(), place, bytes) };
            from = rest;
        }
    }

    fn copy_out(&self, position: u64, into: &mut [u8]) {
        let mut into = into;
        for (place, bytes) in self.pieces(position, into.len()) {
            let (now, rest) = into.split_at_mut(bytes);
            // SAFETY: the piece lies in the mapping, and `now` is a slice of this process.
            unsafe { copy_bytes(place, now.as_mut_ptr(), bytes) };
            into = rest;
        }
    }
}

const fn record_bytes(payload: u64) -> u64 {
    RECORD_HEADER + payload.next_multiple_of(8)
}

/// The receiving end, in the process that owns the ring.
#[derive(Debug)]
pub(crate) struct Reader {
    shared: Shared,
    tail: u64,
    taken: u64,
    given_up: bool,
}

impl Reader {
    /// A ring for at most `messages_max` notifications of at most `payload_max` bytes, and the
    /// file that the writer maps. Four of the largest fit.
    pub(crate) fn new(messages_max: usize, payload_max: usize) -> io::Result<(Self, Arc<OwnedFd>)> {
        let payload_max = payload_max as u64;
        let capacity = (record_bytes(payload_max) * 4)
            .max(CAPACITY_MIN)
            .next_power_of_two();
        let bytes = HEADER_BYTES + usize::try_from(capacity).map_err(io::Error::other)?;
        let (file, mapping) = small_file("notifications", bytes)?;
        let shared = Shared {
            mapping,
            capacity,
            messages_max: messages_max as u64,
            payload_max,
        };
        let start = u64::from(VERSION) << 32 | u64::from(MAGIC);
        shared.word(AT_MAGIC).store(start, Ordering::Relaxed);
        shared.word(AT_CAPACITY).store(capacity, Ordering::Relaxed);
        shared
            .word(AT_MESSAGES_MAX)
            .store(shared.messages_max, Ordering::Relaxed);
        shared
            .word(AT_PAYLOAD_MAX)
            .store(payload_max, Ordering::Release);
        let reader = Self {
            shared,
            tail: 0,
            taken: 0,
            given_up: false,
        };
        Ok((reader, Arc::new(file)))
    }

    /// The next notification.
    pub(crate) fn pop(&mut self) -> Result<Option<Vec<u8>>, Corrupt> {
        if self.given_up {
            return Ok(None);
        }
        let filled = self.shared.positions().filled(self.tail)?;
        if filled == 0 {
            return Ok(None);
        }
        if filled < RECORD_HEADER {
            return Err(Corrupt("a record is cut off"));
        }
        let mut header = [0; 4];
        self.shared.copy_out(self.tail, &mut header);
        let len = u64::from(u32::from_le_bytes(header));
        if len > self.shared.payload_max {
            return Err(Corrupt("a notification is longer than allowed"));
        }
        let whole = record_bytes(len);
        if whole > filled {
            return Err(Corrupt("a record reaches beyond the write position"));
        }
        let mut payload = vec![0; usize::try_from(len).unwrap_or(0)];
        self.shared
            .copy_out(self.tail + RECORD_HEADER, &mut payload);
        self.tail += whole;
        self.taken += 1;
        self.shared.positions().release(self.tail);
        self.shared
            .word(AT_TAKEN)
            .store(self.taken, Ordering::Release);
        Ok(Some(payload))
    }

    /// How many notifications the writer says it has queued, and how many it could not queue.
    pub(crate) fn counts(&self) -> (u64, u64) {
        let count = |at| self.shared.word(at).load(Ordering::Relaxed);
        (count(AT_SENT), count(AT_REFUSED))
    }

    /// Nothing more is read: the writer has broken the format.
    pub(crate) fn give_up(&mut self) {
        self.given_up = true;
    }

    /// Whether something is waiting; nonsense counts, for [`Self::pop`] to report it.
    pub(crate) fn has_more(&self) -> bool {
        !self.given_up && self.shared.positions().filled(self.tail) != Ok(0)
    }
}

/// The sending end, in the process of the peer.
#[derive(Debug)]
pub(crate) struct Writer {
    shared: Shared,
    state: Mutex<Sent>,
}

#[derive(Debug, Default)]
struct Sent {
    head: u64,
    messages: u64,
    refused: u64,
    /// What the reader has taken, as far as we have looked. Looking costs a cache miss.
    taken: u64,
    /// Bytes behind `head` that are known to be free.
    room: u64,
}

impl Writer {
    /// Maps the ring that a peer has handed over.
    pub(crate) fn map(file: &OwnedFd) -> io::Result<Self> {
        let mapping = map_arena(file, HEADER_BYTES as u64)?;
        let mut shared = Shared {
            mapping,
            capacity: 0,
            messages_max: 0,
            payload_max: 0,
        };
        let start = shared.word(AT_MAGIC).load(Ordering::Acquire);
        if start != u64::from(VERSION) << 32 | u64::from(MAGIC) {
            return Err(io::Error::other("not a notification ring of this version"));
        }
        let capacity = shared.word(AT_CAPACITY).load(Ordering::Acquire);
        let mapped = (shared.mapping.bytes() - HEADER_BYTES) as u64;
        if !capacity.is_power_of_two() || capacity > mapped {
            return Err(io::Error::other(format!(
                "a notification ring of {capacity} bytes in {mapped}"
            )));
        }
        shared.messages_max = shared.word(AT_MESSAGES_MAX).load(Ordering::Acquire);
        shared.payload_max = shared.word(AT_PAYLOAD_MAX).load(Ordering::Acquire);
        shared.capacity = capacity;
        Ok(Self {
            shared,
            state: Mutex::default(),
        })
    }

    /// Queues one notification.
    pub(crate) fn send(&self, payload: &[u8]) -> Result<(), SendError> {
        let len = payload.len() as u64;
        let whole = record_bytes(len);
        if len > self.shared.payload_max || whole > self.shared.capacity {
            return Err(SendError::TooLarge);
        }
        // At most the capacity of a ring.
        let len = u32::try_from(len).map_err(|_| SendError::TooLarge)?;
        let positions = self.shared.positions();
        let mut sent = self.state.lock();
        let full = |sent: &Sent| {
            sent.messages.wrapping_sub(sent.taken) >= self.shared.messages_max || sent.room < whole
        };
        if full(&sent) {
            sent.taken = self.shared.word(AT_TAKEN).load(Ordering::Acquire);
            sent.room = positions.room(sent.head);
        }
        if full(&sent) {
            sent.refused += 1;
            self.shared
                .word(AT_REFUSED)
                .store(sent.refused, Ordering::Relaxed);
            return Err(SendError::Full);
        }
        let header = u64::from(len).to_le_bytes();
        self.shared.copy_in(sent.head, &header);
        self.shared.copy_in(sent.head + RECORD_HEADER, payload);
        sent.head += whole;
        sent.room -= whole;
        sent.messages += 1;
        self.shared
            .word(AT_SENT)
            .store(sent.messages, Ordering::Relaxed);
        positions.publish(sent.head);
        Ok(())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pair(messages: usize, payload: usize) -> (Reader, Writer) {
        let (reader, file) = Reader::new(messages, payload).expect("a ring");
        let writer = Writer::map(&file).expect("the same ring");
        (reader, writer)
    }

    #[test]
    fn a_ring_takes_so_many_and_says_when_it_is_full() {
        let (mut reader, writer) = pair(3, 100);
        assert_eq!(reader.pop(), Ok(None));
        assert_eq!(writer.send(&[0; 101]), Err(SendError::TooLarge));
        for i in 0..3 {
            writer.send(&[i; 100]).unwrap();
        }
        assert_eq!(writer.send(b"more"), Err(SendError::Full));
        assert_eq!(reader.pop(), Ok(Some(vec![0; 100])));
        writer.send(b"").unwrap();
        assert!(reader.has_more());
        for expected in [vec![1; 100], vec![2; 100], Vec::new()] {
            assert_eq!(reader.pop(), Ok(Some(expected)));
        }
        assert!(!reader.has_more());
    }

    #[test]
    fn what_a_peer_may_write_there_is_an_error_and_not_more() {
        type Spoil = fn(&Writer);
        let spoils: [Spoil; 4] = [
            |w| w.shared.word(AT_HEAD).store(u64::MAX, Ordering::Release),
            |w| w.shared.word(AT_HEAD).store(4, Ordering::Release),
            |w| {
                w.shared.copy_in(0, &u64::MAX.to_le_bytes());
                w.shared.word(AT_HEAD).store(64, Ordering::Release);
            },
            |w| {
                w.shared.copy_in(0, &90u64.to_le_bytes());
                w.shared.word(AT_HEAD).store(64, Ordering::Release);
            },
        ];
        for spoil in spoils {
            let (mut reader, writer) = pair(3, 100);
            spoil(&writer);
            assert!(reader.has_more());
            assert!(reader.pop().is_err());
        }
        // Other header fields are read once and never again.
        let (mut reader, writer) = pair(3, 100);
        for at in [AT_MAGIC, AT_CAPACITY, AT_MESSAGES_MAX, AT_PAYLOAD_MAX] {
            writer.shared.word(at).store(u64::MAX, Ordering::Release);
        }
        writer.send(b"x").unwrap();
        assert_eq!(reader.pop(), Ok(Some(b"x".to_vec())));
        let (_reader, writer) = pair(3, 100);
        // A reader that claims to be ahead of its writer gets nothing more.
        writer
            .shared
            .word(AT_TAIL)
            .store(1 << 20, Ordering::Release);
        assert_eq!(writer.send(b"y"), Err(SendError::Full));
    }

    proptest! {
        #[test]
        fn everything_comes_out_in_order(
            lengths in proptest::collection::vec(0usize..150_000, 1..120),
            batch in 1usize..5
        ) {
            let (mut reader, writer) = pair(1000, 150_000);
            let mut expected = std::collections::VecDeque::new();
            for (round, length) in lengths.into_iter().enumerate() {
                let payload: Vec<u8> = (0..=250).cycle().skip(round % 251).take(length).collect();
                while writer.send(&payload) == Err(SendError::Full) {
                    prop_assert_eq!(reader.pop(), Ok(expected.pop_front()));
                }
                expected.push_back(payload);
                if round % batch == 0 {
                    prop_assert_eq!(reader.pop(), Ok(expected.pop_front()));
                }
            }
            for payload in expected {
                prop_assert_eq!(reader.pop(), Ok(Some(payload)));
            }
            prop_assert_eq!(reader.pop(), Ok(None));
        }
    }
}

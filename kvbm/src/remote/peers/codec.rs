//! Messages between workers. Little-endian; everything is checked before it is believed, and nothing
//! is allocated beyond what the message itself is long. docs/kv-peers.md describes them byte by byte.

use blockplane_protocol::{BlockHash, SequenceHash, TokenBlock};
use blockplane_transfer::{BlockLayout, RegionId, WindowId};

use crate::{
    fingerprint::Fingerprint,
    wire::{Out, Take},
};

const MAGIC: [u8; 4] = *b"BPKP";
const VERSION: u8 = 1;
/// Names in one part of an announcement.
pub(super) const NAMES_MAX: usize = 8192;
/// Blocks of one lease.
pub(super) const LEASE_MAX: usize = 1024;
/// Longest text of a reason; the rest is cut off.
const TEXT_MAX: usize = 256;
/// Longest address of an agent.
const ADDRESS_MAX: usize = 128 << 10;
const MISSING: u32 = u32::MAX;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    Hello(Hello),
    /// What changed in the sender's G2.
    Announce(Part),
    /// What the sender knows of the receiver's G2.
    Have(Position),
    /// Lend me these.
    Ask {
        id: u64,
        /// For so long, in milliseconds.
        time_ms: u32,
        names: Vec<TokenBlock>,
    },
    Lease(Lease),
    /// There is no lease of that number.
    Refused {
        id: u64,
        reason: String,
    },
    /// The lease is not used any more.
    Release {
        id: u64,
    },
}

/// Who the sender is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    /// Of the sender's agent.
    pub(super) epoch: u64,
    /// Whether the sender waits for the receiver's.
    pub(super) answer: bool,
    pub(super) fingerprint: Fingerprint,
    /// G2, in the memory of the agent of `address`.
    pub(super) region: RegionId,
    pub(super) layout: BlockLayout,
    /// Metadata of that agent.
    pub(super) address: Vec<u8>,
}

/// One part of a batch of changes. The order within a batch does not count: it names no block twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Number of the change that comes before the batch; none for a snapshot.
    pub(super) before: Option<u64>,
    /// Number of the last change in the batch.
    pub(super) last: u64,
    pub(super) part: u32,
    /// At least 1.
    pub(super) parts: u32,
    pub(super) stored: Vec<SequenceHash>,
    pub(super) removed: Vec<SequenceHash>,
}

/// How far somebody follows the changes of another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Position {
    /// It needs a snapshot.
    #[default]
    Unknown,
    /// It has everything up to this change.
    At(u64),
    /// It has the parts before `next` of a batch.
    Within {
        before: Option<u64>,
        last: u64,
        next: u32,
    },
}

/// Blocks that may be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lease {
    pub(super) id: u64,
    /// Through this window.
    pub(super) window: WindowId,
    /// For so long, in milliseconds.
    pub(super) time_ms: u32,
    /// One for each name asked for.
    pub(super) blocks: Vec<Option<Lent>>,
}

/// One block of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lent {
    pub(super) block: u32,
    pub(super) checksum: u64,
}

impl Message {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Out(Vec::with_capacity(128));
        out.0.extend(MAGIC);
        out.0.push(VERSION);
        match self {
            Self::Hello(hello) => {
                out.0.push(1);
                out.u64(hello.epoch);
                out.0.push(u8::from(hello.answer));
                out.0.extend(hello.fingerprint.encode());
                out.u64(hello.region.0);
                let layout = &hello.layout;
                out.u64(layout.offset);
                out.u32(layout.blocks);
                out.u64(layout.block_stride);
                out.u32(layout.layers);
                out.u64(layout.layer_stride);
                out.u64(layout.run_bytes);
                out.0.extend(&hello.address);
            }
            Self::Announce(part) => {
                out.0.push(2);
                out.number(part.before);
                out.u64(part.last);
                out.u32(part.part);
                out.u32(part.parts);
                out.u32(count(part.stored.len()));
                for name in part.stored.iter().chain(&part.removed) {
                    out.u64(name.0);
                }
            }
            Self::Have(position) => {
                out.0.push(3);
                match *position {
                    Position::Unknown => out.0.push(0),
                    Position::At(last) => {
                        out.0.push(1);
                        out.u64(last);
                    }
                    Position::Within { before, last, next } => {
                        out.0.push(2);
                        out.number(before);
                        out.u64(last);
                        out.u32(next);
                    }
                }
            }
            Self::Ask { id, time_ms, names } => {
                out.0.push(4);
                out.u64(*id);
                out.u32(*time_ms);
                for name in names {
                    out.u64(name.block.0);
                    out.u64(name.sequence.0);
                }
            }
            Self::Lease(lease) => {
                out.0.push(5);
                out.u64(lease.id);
                out.u64(lease.window.0);
                out.u32(lease.time_ms);
                for lent in &lease.blocks {
                    out.u32(lent.map_or(MISSING, |lent| lent.block));
                    out.u64(lent.map_or(0, |lent| lent.checksum));
                }
            }
            Self::Refused { id, reason } => {
                out.0.push(6);
                out.u64(*id);
                let reason = &reason[..reason.floor_char_boundary(TEXT_MAX)];
                out.0.extend(reason.as_bytes());
            }
            Self::Release { id } => {
                out.0.push(7);
                out.u64(*id);
            }
        }
        out.0
    }

    /// None for anything that [`Message::encode`] does not make.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut take = Take(bytes);
        if take.bytes::<4>()? != MAGIC || take.u8()? != VERSION {
            return None;
        }
        let message = match take.u8()? {
            1 => Self::Hello(take.hello()?),
            2 => Self::Announce(take.part()?),
            3 => Self::Have(match take.u8()? {
                0 => Position::Unknown,
                1 => Position::At(take.u64()?),
                2 => Position::Within {
                    before: take.number()?,
                    last: take.u64()?,
                    next: take.u32()?,
                },
                _ => return None,
            }),
            4 => {
                let (id, time_ms) = (take.u64()?, take.u32()?);
                let names = take.items(16, LEASE_MAX, |take| {
                    Some(TokenBlock {
                        block: BlockHash(take.u64()?),
                        sequence: SequenceHash(take.u64()?),
                    })
                })?;
                Self::Ask { id, time_ms, names }
            }
            5 => Self::Lease(Lease {
                id: take.u64()?,
                window: WindowId(take.u64()?),
                time_ms: take.u32()?,
                blocks: take.items(12, LEASE_MAX, |take| {
                    let (block, checksum) = (take.u32()?, take.u64()?);
                    match (block, checksum) {
                        (MISSING, 0) => Some(None),
                        (MISSING, _) => None,
                        _ => Some(Some(Lent { block, checksum })),
                    }
                })?,
            }),
            6 => {
                let id = take.u64()?;
                let text = std::mem::take(&mut take.0);
                if text.len() > TEXT_MAX {
                    return None;
                }
                let reason = String::from_utf8(text.to_vec()).ok()?;
                Self::Refused { id, reason }
            }
            7 => Self::Release { id: take.u64()? },
            _ => return None,
        };
        take.0.is_empty().then_some(message)
    }
}

fn count(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

impl Out {
    fn number(&mut self, value: Option<u64>) {
        self.0.push(u8::from(value.is_some()));
        self.u64(value.unwrap_or(0));
    }
}

impl Take<'_> {
    fn number(&mut self) -> Option<Option<u64>> {
        match (self.flag()?, self.u64()?) {
            (false, 0) => Some(None),
            (false, _) => None,
            (true, number) => Some(Some(number)),
        }
    }

    /// Items of `bytes` up to the end, at most `max`.
    fn items<T>(
        &mut self,
        bytes: usize,
        max: usize,
        mut item: impl FnMut(&mut Self) -> Option<T>,
    ) -> Option<Vec<T>> {
        let count = self.0.len() / bytes;
        if count > max || !self.0.len().is_multiple_of(bytes) {
            return None;
        }
        (0..count).map(|_| item(self)).collect()
    }

    fn hello(&mut self) -> Option<Hello> {
        let hello = Hello {
            epoch: self.u64()?,
            answer: self.flag()?,
            fingerprint: Fingerprint::decode(&self.bytes()?),
            region: RegionId(self.u64()?),
            layout: BlockLayout {
                offset: self.u64()?,
                blocks: self.u32()?,
                block_stride: self.u64()?,
                layers: self.u32()?,
                layer_stride: self.u64()?,
                run_bytes: self.u64()?,
            },
            address: std::mem::take(&mut self.0).to_vec(),
        };
        (hello.address.len() <= ADDRESS_MAX).then_some(hello)
    }

    fn part(&mut self) -> Option<Part> {
        let (before, last) = (self.number()?, self.u64()?);
        let (part, parts) = (self.u32()?, self.u32()?);
        let stored = self.u32()? as usize;
        let mut names = self.items(8, NAMES_MAX, |take| take.u64().map(SequenceHash))?;
        let fits = stored <= names.len() && part < parts;
        let order = before.is_none_or(|before| before < last);
        if !fits || !order || (before.is_none() && stored != names.len()) {
            return None;
        }
        let removed = names.split_off(stored);
        Some(Part {
            before,
            last,
            part,
            parts,
            stored: names,
            removed,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages() -> Vec<Message> {
        let names = |names: &[u64]| names.iter().copied().map(SequenceHash).collect::<Vec<_>>();
        let part = Part {
            before: Some(4),
            last: 9,
            part: 1,
            parts: 3,
            stored: names(&[1, u64::MAX]),
            removed: names(&[7]),
        };
        let within = Position::Within {
            before: None,
            last: 8,
            next: 2,
        };
        vec![
            Message::Hello(Hello {
                epoch: 5,
                answer: true,
                fingerprint: Fingerprint::decode(&[7; Fingerprint::BYTES]),
                region: RegionId(3),
                layout: BlockLayout::contiguous(9, 4096),
                address: vec![1, 2, 3],
            }),
            Message::Announce(part.clone()),
            Message::Announce(Part {
                before: None,
                removed: Vec::new(),
                ..part
            }),
            Message::Have(Position::Unknown),
            Message::Have(Position::At(7)),
            Message::Have(within),
            Message::Ask {
                id: 1,
                time_ms: 20,
                names: vec![TokenBlock {
                    block: BlockHash(1),
                    sequence: SequenceHash(2),
                }],
            },
            Message::Lease(Lease {
                id: 1,
                window: WindowId(4),
                time_ms: 9,
                blocks: vec![
                    None,
                    Some(Lent {
                        block: 3,
                        checksum: 77,
                    }),
                ],
            }),
            Message::Refused {
                id: 3,
                reason: "because".to_owned(),
            },
            Message::Release { id: 4 },
        ]
    }

    #[test]
    fn messages_come_back() {
        for message in messages() {
            assert_eq!(Message::decode(&message.encode()), Some(message));
        }
    }

    #[test]
    fn damaged_messages_do_no_harm() {
        for message in messages() {
            let bytes = message.encode();
            for end in 0..bytes.len() {
                assert_ne!(Message::decode(&bytes[..end]), Some(message.clone()));
            }
            for bit in 0..bytes.len() * 8 {
                let mut wrong = bytes.clone();
                wrong[bit / 8] ^= 1 << (bit % 8);
                if let Some(other) = Message::decode(&wrong) {
                    assert_eq!(other.encode(), wrong, "nothing is lost or made up");
                }
            }
        }
    }

    #[test]
    fn what_is_too_long_is_refused() {
        let names = vec![SequenceHash(1); NAMES_MAX + 1];
        let mut part = Part {
            before: None,
            last: 1,
            part: 0,
            parts: 1,
            stored: names,
            removed: Vec::new(),
        };
        assert_eq!(
            Message::decode(&Message::Announce(part.clone()).encode()),
            None
        );
        part.stored.pop();
        assert!(Message::decode(&Message::Announce(part).encode()).is_some());
        let long = Message::Refused {
            id: 1,
            reason: "ä".repeat(400),
        };
        let Some(Message::Refused { reason, .. }) = Message::decode(&long.encode()) else {
            panic!("not understood");
        };
        assert_eq!(reason, "ä".repeat(TEXT_MAX / 2));
    }
}

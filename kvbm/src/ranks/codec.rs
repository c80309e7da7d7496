//! Messages between leader and ranks. Little-endian; everything is checked before it is believed, and
//! nothing is allocated beyond what the message itself is long.

use std::time::Duration;

use blockplane_protocol::{BlockHash, DpRank, SequenceHash, TokenBlock};

use crate::{
    fingerprint::Fingerprint,
    tier::{BlockOutcome, Invalid, MoveId, MoveKind, MoveSpec, MovedBlock, TierFault},
    wire::{Out, Take},
};

const MAGIC: [u8; 4] = *b"BPKR";
const VERSION: u8 = 1;
/// Longest text of a reason; the rest is cut off.
const TEXT_MAX: usize = 256;
/// Bytes of one block of a move.
const BLOCK_BYTES: usize = 33;

/// What leader and ranks must agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RankShape {
    /// Fingerprint of the blocks of this rank; of rank 0 for the leader.
    pub fingerprint: Fingerprint,
    /// Blocks of G1.
    pub device_blocks: u32,
    /// Blocks of G2.
    pub host_blocks: u32,
    /// Slots of G3.
    pub disk_blocks: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// A rank wants to take part. `attempt` grows with every try of one `epoch`.
    Hello {
        epoch: u64,
        attempt: u64,
        shape: RankShape,
        /// How the rank is reached, for the transport.
        address: Vec<u8>,
    },
    /// The leader takes it.
    Welcome {
        epoch: u64,
        attempt: u64,
        session: u64,
    },
    /// The leader does not.
    Refused { epoch: u64, reason: String },
    /// Do this.
    Run {
        session: u64,
        id: u64,
        spec: MoveSpec,
    },
    /// What became of it? If it has not begun, it must not.
    Ask { session: u64, id: u64 },
    /// What became of it.
    Done(Done),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) rank: u32,
    pub(super) session: u64,
    pub(super) id: u64,
    /// No byte of it moves any more.
    pub(super) quiet: bool,
    pub(super) bytes: u64,
    pub(super) fault: Option<TierFault>,
    pub(super) outcomes: Vec<BlockOutcome>,
}

impl Message {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Out(Vec::with_capacity(64));
        out.0.extend(MAGIC);
        out.0.push(VERSION);
        match self {
            Self::Hello {
                epoch,
                attempt,
                shape,
                address,
            } => {
                out.0.push(1);
                out.u64(*epoch);
                out.u64(*attempt);
                out.0.extend(shape.fingerprint.encode());
                out.u32(shape.device_blocks);
                out.u32(shape.host_blocks);
                out.u32(shape.disk_blocks);
                out.0.extend(address);
            }
            Self::Welcome {
                epoch,
                attempt,
                session,
            } => {
                out.0.push(2);
                out.u64(*epoch);
                out.u64(*attempt);
                out.u64(*session);
            }
            Self::Refused { epoch, reason } => {
                out.0.push(3);
                out.u64(*epoch);
                out.text(reason);
            }
            Self::Run { session, id, spec } => {
                out.0.push(4);
                out.u64(*session);
                out.u64(*id);
                out.u64(spec.id.0);
                let kind = MoveKind::ALL.iter().position(|kind| *kind == spec.kind);
                out.0.push(
                    kind.and_then(|kind| u8::try_from(kind).ok())
                        .unwrap_or(u8::MAX),
                );
                out.u32(spec.rank.0);
                out.u64(u64::try_from(spec.time.as_nanos()).unwrap_or(u64::MAX));
                for block in &spec.blocks {
                    out.u32(block.from);
                    out.u32(block.to);
                    out.u64(block.name.block.0);
                    out.u64(block.name.sequence.0);
                    out.0.push(u8::from(block.parent.is_some()));
                    out.u64(block.parent.map_or(0, |parent| parent.0));
                }
            }
            Self::Ask { session, id } => {
                out.0.push(5);
                out.u64(*session);
                out.u64(*id);
            }
            Self::Done(done) => {
                out.0.push(6);
                out.u32(done.rank);
                out.u64(done.session);
                out.u64(done.id);
                out.0.push(u8::from(done.quiet));
                out.u64(done.bytes);
                let (fault, reason) = match &done.fault {
                    None => (0, ""),
                    Some(TierFault::ReadOnly(reason)) => (1, reason.as_str()),
                    Some(TierFault::Off(reason)) => (2, reason.as_str()),
                };
                out.0.push(fault);
                out.text(reason);
                for outcome in &done.outcomes {
                    match outcome {
                        BlockOutcome::Moved => out.0.push(0),
                        BlockOutcome::Invalid(Invalid::Checksum) => out.0.push(1),
                        BlockOutcome::Invalid(Invalid::Fingerprint) => out.0.push(2),
                        BlockOutcome::Invalid(Invalid::Missing) => out.0.push(3),
                        BlockOutcome::Failed(reason) => {
                            out.0.push(4);
                            out.text(reason);
                        }
                        BlockOutcome::Bad(reason) => {
                            out.0.push(5);
                            out.text(reason);
                        }
                    }
                }
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
            1 => Self::Hello {
                epoch: take.u64()?,
                attempt: take.u64()?,
                shape: RankShape {
                    fingerprint: Fingerprint::decode(&take.bytes()?),
                    device_blocks: take.u32()?,
                    host_blocks: take.u32()?,
                    disk_blocks: take.u32()?,
                },
                address: std::mem::take(&mut take.0).to_vec(),
            },
            2 => Self::Welcome {
                epoch: take.u64()?,
                attempt: take.u64()?,
                session: take.u64()?,
            },
            3 => Self::Refused {
                epoch: take.u64()?,
                reason: take.text()?,
            },
            4 => {
                let (session, id) = (take.u64()?, take.u64()?);
                let spec = MoveSpec {
                    id: MoveId(take.u64()?),
                    kind: *MoveKind::ALL.get(usize::from(take.u8()?))?,
                    rank: DpRank(take.u32()?),
                    time: Duration::from_nanos(take.u64()?),
                    blocks: take.blocks()?,
                };
                Self::Run { session, id, spec }
            }
            5 => Self::Ask {
                session: take.u64()?,
                id: take.u64()?,
            },
            6 => {
                let (rank, session, id) = (take.u32()?, take.u64()?, take.u64()?);
                let (quiet, bytes) = (take.flag()?, take.u64()?);
                let fault = match (take.u8()?, take.text()?) {
                    (0, reason) if reason.is_empty() => None,
                    (1, reason) => Some(TierFault::ReadOnly(reason)),
                    (2, reason) => Some(TierFault::Off(reason)),
                    _ => return None,
                };
                Self::Done(Done {
                    rank,
                    session,
                    id,
                    quiet,
                    bytes,
                    fault,
                    outcomes: take.outcomes()?,
                })
            }
            _ => return None,
        };
        take.0.is_empty().then_some(message)
    }
}

impl Out {
    fn text(&mut self, text: &str) {
        let text = &text[..text.floor_char_boundary(TEXT_MAX)];
        self.u32(u32::try_from(text.len()).unwrap_or(0));
        self.0.extend(text.as_bytes());
    }
}

impl Take<'_> {
    fn text(&mut self) -> Option<String> {
        let length = self.u32()? as usize;
        if length > TEXT_MAX {
            return None;
        }
        let (text, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        String::from_utf8(text.to_vec()).ok()
    }

    fn blocks(&mut self) -> Option<Vec<MovedBlock>> {
        if !self.0.len().is_multiple_of(BLOCK_BYTES) {
            return None;
        }
        let mut blocks = Vec::with_capacity(self.0.len() / BLOCK_BYTES);
        while !self.0.is_empty() {
            let (from, to) = (self.u32()?, self.u32()?);
            let name = TokenBlock {
                block: BlockHash(self.u64()?),
                sequence: SequenceHash(self.u64()?),
            };
            let (flag, parent) = (self.flag()?, self.u64()?);
            if !flag && parent != 0 {
                return None;
            }
            blocks.push(MovedBlock {
                from,
                to,
                name,
                parent: flag.then_some(SequenceHash(parent)),
            });
        }
        Some(blocks)
    }

    fn outcomes(&mut self) -> Option<Vec<BlockOutcome>> {
        let mut outcomes = Vec::new();
        while !self.0.is_empty() {
            outcomes.push(match self.u8()? {
                0 => BlockOutcome::Moved,
                1 => BlockOutcome::Invalid(Invalid::Checksum),
                2 => BlockOutcome::Invalid(Invalid::Fingerprint),
                3 => BlockOutcome::Invalid(Invalid::Missing),
                4 => BlockOutcome::Failed(self.text()?),
                5 => BlockOutcome::Bad(self.text()?),
                _ => return None,
            });
        }
        Some(outcomes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages() -> Vec<Message> {
        let block = |parent| MovedBlock {
            from: 3,
            to: 9,
            name: TokenBlock {
                block: BlockHash(1),
                sequence: SequenceHash(2),
            },
            parent,
        };
        let mut messages = vec![
            Message::Hello {
                epoch: 1,
                attempt: 2,
                shape: RankShape {
                    fingerprint: Fingerprint::decode(&[7; Fingerprint::BYTES]),
                    device_blocks: 1,
                    host_blocks: 2,
                    disk_blocks: 3,
                },
                address: vec![1, 2, 3],
            },
            Message::Welcome {
                epoch: 1,
                attempt: 2,
                session: 3,
            },
            Message::Refused {
                epoch: 1,
                reason: "because".to_owned(),
            },
            Message::Ask { session: 1, id: 2 },
            Message::Done(Done {
                rank: 1,
                session: 2,
                id: 3,
                quiet: false,
                bytes: 4,
                fault: Some(TierFault::Off("gone".to_owned())),
                outcomes: vec![
                    BlockOutcome::Moved,
                    BlockOutcome::Invalid(Invalid::Missing),
                    BlockOutcome::Failed("late".to_owned()),
                    BlockOutcome::Bad("worn".to_owned()),
                ],
            }),
        ];
        for kind in MoveKind::ALL {
            messages.push(Message::Run {
                session: 1,
                id: 2,
                spec: MoveSpec {
                    id: MoveId(3),
                    kind,
                    rank: DpRank(1),
                    blocks: vec![block(None), block(Some(SequenceHash(0)))],
                    time: Duration::from_millis(7),
                },
            });
        }
        messages
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
                // Cut somewhere else it may be another message; it must not be this one.
                assert_ne!(Message::decode(&bytes[..end]), Some(message.clone()));
            }
            for at in 0..bytes.len() {
                for value in [0, 0x7f, 0xff] {
                    let mut wrong = bytes.clone();
                    wrong[at] = value;
                    if let Some(other) = Message::decode(&wrong) {
                        assert_eq!(other.encode(), wrong, "nothing is lost or made up");
                    }
                }
            }
        }
    }

    #[test]
    fn long_reasons_are_cut() {
        let long = Message::Refused {
            epoch: 1,
            reason: "ä".repeat(400),
        };
        let Some(Message::Refused { reason, .. }) = Message::decode(&long.encode()) else {
            panic!("not understood");
        };
        assert_eq!(reason, "ä".repeat(TEXT_MAX / 2));
    }
}

//! Questions and answers as bytes, little-endian. A length of four bytes goes before each; whoever
//! sends anything else is not talked to any more.

use std::io::{self, Read, Write};

use blockplane_protocol::{BlockHash, SequenceHash, TokenBlock};

use super::rank::{Lookup, LookupRequest};
use crate::{
    tier::PerTier,
    wire::{Out, Take},
};

/// Names of one question, at most: 16 million tokens in blocks of 16.
pub(super) const NAMES_MAX: usize = 1 << 20;
/// Bytes before the names of a question.
const HEAD: usize = 27;
const NAME: usize = 16;
const ANSWER: usize = 20;
const VERSION: u8 = 1;

pub(super) fn encode(request: &LookupRequest) -> Vec<u8> {
    let names = &request.names[..request.names.len().min(NAMES_MAX)];
    let mut out = Out(Vec::with_capacity(HEAD + names.len() * NAME));
    out.0.push(VERSION);
    out.u64(request.replaces);
    out.0.push(request.first.into());
    out.0.push(request.parent.is_some().into());
    out.u64(request.parent.map_or(0, |parent| parent.0));
    out.u64(names.len() as u64);
    for name in names {
        out.u64(name.block.0);
        out.u64(name.sequence.0);
    }
    out.0
}

pub(super) fn decode(bytes: &[u8]) -> Option<LookupRequest> {
    let mut take = Take(bytes);
    if take.u8()? != VERSION {
        return None;
    }
    let replaces = take.u64()?;
    let first = take.flag()?;
    let parent = take.flag()?;
    let before = take.u64()?;
    let count = usize::try_from(take.u64()?).ok()?;
    if take.0.len() != count.checked_mul(NAME)? {
        return None;
    }
    let names = take.0.chunks_exact(NAME).map(|bytes| {
        let mut name = Take(bytes);
        Some(TokenBlock {
            block: BlockHash(name.u64()?),
            sequence: SequenceHash(name.u64()?),
        })
    });
    Some(LookupRequest {
        replaces,
        first,
        parent: parent.then_some(SequenceHash(before)),
        names: names.collect::<Option<_>>()?,
    })
}

pub(super) fn encode_answer(answer: &Lookup) -> Vec<u8> {
    let mut out = Out(Vec::with_capacity(ANSWER));
    out.u64(answer.hold);
    out.u32(answer.from.host);
    out.u32(answer.from.disk);
    out.u32(answer.from.remote);
    out.0
}

pub(super) fn decode_answer(bytes: &[u8]) -> Option<Lookup> {
    let mut take = Take(bytes);
    let answer = Lookup {
        hold: take.u64()?,
        from: PerTier {
            device: 0,
            host: take.u32()?,
            disk: take.u32()?,
            remote: take.u32()?,
        },
    };
    take.0.is_empty().then_some(answer)
}

/// Longest question.
pub(super) const REQUEST_MAX: usize = HEAD + NAMES_MAX * NAME;
/// Length of an answer.
pub(super) const ANSWER_MAX: usize = ANSWER;

pub(super) fn send(mut to: impl Write, message: &[u8]) -> io::Result<()> {
    let length = u32::try_from(message.len()).map_err(io::Error::other)?;
    let mut framed = Vec::with_capacity(message.len() + 4);
    framed.extend(length.to_le_bytes());
    framed.extend(message);
    to.write_all(&framed)
}

/// The next message; `None` at the end.
pub(super) fn receive(mut from: impl Read, max: usize) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 4];
    let first = from.read(&mut length)?;
    if first == 0 {
        return Ok(None);
    }
    from.read_exact(&mut length[first..])?;
    let length = u32::from_le_bytes(length) as usize;
    if length > max {
        let error = format!("a message of {length} bytes; at most {max} are accepted");
        return Err(io::Error::new(io::ErrorKind::InvalidData, error));
    }
    let mut message = vec![0; length];
    from.read_exact(&mut message)?;
    Ok(Some(message))
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    proptest! {
        #[test]
        fn a_question_comes_back(
            replaces: u64,
            first: bool,
            parent: Option<u64>,
            names in vec((any::<u64>(), any::<u64>()), 0..20),
        ) {
            let name = |(block, sequence)| TokenBlock {
                block: BlockHash(block),
                sequence: SequenceHash(sequence),
            };
            let request = LookupRequest {
                replaces,
                first,
                parent: parent.map(SequenceHash),
                names: names.into_iter().map(name).collect(),
            };
            let bytes = encode(&request);
            prop_assert_eq!(decode(&bytes), Some(request));
            for cut in 0..bytes.len() {
                prop_assert_eq!(decode(&bytes[..cut]), None);
            }
        }

        #[test]
        fn any_bytes_are_read_without_harm(bytes in vec(any::<u8>(), 0..80)) {
            let _ = (decode(&bytes), decode_answer(&bytes), receive(&bytes[..], 64));
        }
    }

    #[test]
    fn an_answer_comes_back_and_lengths_are_bounded() {
        let answer = Lookup {
            hold: 7,
            from: PerTier {
                device: 0,
                host: 1,
                disk: 2,
                remote: 3,
            },
        };
        assert_eq!(decode_answer(&encode_answer(&answer)), Some(answer));
        let mut framed = Vec::new();
        send(&mut framed, b"hello").expect("into memory");
        assert_eq!(
            receive(&framed[..], 5).expect("it is whole"),
            Some(b"hello".to_vec())
        );
        receive(&framed[..], 4).expect_err("too long");
        receive(&framed[..7], 5).expect_err("cut");
        assert_eq!(receive(&framed[..0], 5).expect("the end"), None);
    }
}

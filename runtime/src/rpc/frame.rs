//! The messages on the wire. Their bytes are documented in `docs/protocol.md`, section "RPC frames".

use blockplane_protocol::{ErrorKind, GenerateError};
use bytes::Bytes;
use prost::{Message, Oneof};

/// Path of the one method; the version of the frames is part of it.
pub(crate) const METHOD_PATH: &str = "/blockplane.rpc.v1.Peer/Connect";

/// Largest payload of one frame; a longer message travels as several, so that frames of other calls
/// get in between.
pub(crate) const FRAGMENT_BYTES_MAX: usize = 128 << 10;

/// Largest batch that is accepted from a peer.
pub(crate) const BATCH_BYTES_MAX: usize = 4 << 20;

/// What a frame costs besides its payload, in credits and in outbox space. It bounds the number of
/// tiny frames by the same budget as the bytes of large ones.
pub(crate) const FRAME_COST: u32 = 128;

/// Payloads below this are copied out of the receive buffer, so that a small message that waits for
/// its consumer does not keep a large buffer alive.
const COPY_BELOW_BYTES: usize = 4 << 10;

/// One gRPC message: the frames that were ready together.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Batch {
    #[prost(message, repeated, tag = "1")]
    pub(crate) frames: Vec<Frame>,
}

/// One step of one call.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Frame {
    #[prost(uint64, tag = "1")]
    pub(crate) call: u64,
    #[prost(oneof = "Kind", tags = "2, 3, 4, 5, 6, 7")]
    pub(crate) kind: Option<Kind>,
}

#[derive(Clone, PartialEq, Oneof)]
pub(crate) enum Kind {
    /// Client: start the call.
    #[prost(message, tag = "2")]
    Open(Open),
    /// Client: rest of the request. Server: (part of) one response message.
    #[prost(message, tag = "3")]
    Data(Data),
    /// Server: all responses were sent.
    #[prost(message, tag = "4")]
    End(End),
    /// Server: the call failed.
    #[prost(message, tag = "5")]
    Error(ErrorFrame),
    /// Client: stop the call; nothing is answered.
    #[prost(message, tag = "6")]
    Cancel(Cancel),
    /// Client: the server may send this much more.
    #[prost(uint32, tag = "7")]
    Credit(u32),
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Open {
    #[prost(string, tag = "1")]
    pub(crate) endpoint: String,
    #[prost(string, tag = "2")]
    pub(crate) request_id: String,
    /// Time left, counted from receipt.
    #[prost(uint64, tag = "3")]
    pub(crate) deadline_us: u64,
    /// First credit of the responses.
    #[prost(uint32, tag = "4")]
    pub(crate) window: u32,
    #[prost(message, optional, tag = "5")]
    pub(crate) data: Option<Data>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Data {
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) payload: Bytes,
    /// The message goes on in the next `Data` of this call.
    #[prost(bool, tag = "2")]
    pub(crate) more: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct End {}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct Cancel {}

#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct ErrorFrame {
    #[prost(uint32, tag = "1")]
    pub(crate) kind: u32,
    #[prost(string, tag = "2")]
    pub(crate) message: String,
}

impl Frame {
    pub(crate) const fn new(call: u64, kind: Kind) -> Self {
        Self {
            call,
            kind: Some(kind),
        }
    }
}

impl Data {
    /// The payload without the receive buffer around it.
    pub(crate) fn into_payload(self) -> Bytes {
        if self.payload.len() < COPY_BELOW_BYTES {
            Bytes::copy_from_slice(&self.payload)
        } else {
            self.payload
        }
    }

    /// What it costs in credits.
    pub(crate) fn cost(&self) -> u32 {
        payload_cost(self.payload.len())
    }
}

/// Cost of a frame with this payload.
pub(crate) fn payload_cost(payload_bytes: usize) -> u32 {
    u32::try_from(payload_bytes)
        .unwrap_or(u32::MAX)
        .saturating_add(FRAME_COST)
}

/// Cuts a message into frames' worth of data; an empty message is one empty piece.
pub(crate) fn fragments(mut message: Bytes) -> impl Iterator<Item = Data> {
    let mut done = false;
    std::iter::from_fn(move || {
        if done {
            return None;
        }
        let payload = message.split_to(message.len().min(FRAGMENT_BYTES_MAX));
        done = message.is_empty();
        Some(Data {
            payload,
            more: !done,
        })
    })
}

const fn kind_number(kind: ErrorKind) -> u32 {
    match kind {
        ErrorKind::InvalidRequest => 1,
        ErrorKind::Overloaded => 2,
        ErrorKind::Unavailable => 3,
        ErrorKind::WorkerLost => 4,
        ErrorKind::DeadlineExceeded => 5,
        ErrorKind::Cancelled => 6,
        ErrorKind::Internal => 7,
    }
}

impl From<GenerateError> for ErrorFrame {
    fn from(error: GenerateError) -> Self {
        Self {
            kind: kind_number(error.kind),
            message: error.message,
        }
    }
}

impl From<ErrorFrame> for GenerateError {
    /// A number that this build does not know is an internal error of the peer.
    fn from(frame: ErrorFrame) -> Self {
        let kind = [
            ErrorKind::InvalidRequest,
            ErrorKind::Overloaded,
            ErrorKind::Unavailable,
            ErrorKind::WorkerLost,
            ErrorKind::DeadlineExceeded,
            ErrorKind::Cancelled,
        ]
        .into_iter()
        .find(|&kind| kind_number(kind) == frame.kind)
        .unwrap_or(ErrorKind::Internal);
        Self::new(kind, frame.message)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_frame_has_the_documented_bytes() {
        let batch = Batch {
            frames: vec![Frame::new(
                5,
                Kind::Open(Open {
                    endpoint: "generate".to_owned(),
                    request_id: "r1".to_owned(),
                    deadline_us: 300,
                    window: 1,
                    data: Some(Data {
                        payload: Bytes::from_static(b"hi"),
                        more: false,
                    }),
                }),
            )],
        };
        let mut expected = vec![0x0a, 29, 0x08, 5, 0x12, 25];
        expected
            .extend_from_slice(b"\x0a\x08generate\x12\x02r1\x18\xac\x02\x20\x01\x2a\x04\x0a\x02hi");
        assert_eq!(batch.encode_to_vec(), expected);
        assert_eq!(Batch::decode(&expected[..]).unwrap(), batch);
    }

    #[test]
    fn every_error_kind_crosses_the_wire() {
        for kind in [
            ErrorKind::InvalidRequest,
            ErrorKind::Overloaded,
            ErrorKind::Unavailable,
            ErrorKind::WorkerLost,
            ErrorKind::DeadlineExceeded,
            ErrorKind::Cancelled,
            ErrorKind::Internal,
        ] {
            let error = GenerateError::new(kind, "why");
            assert_eq!(GenerateError::from(ErrorFrame::from(error.clone())), error);
        }
        let unknown = ErrorFrame {
            kind: 99,
            message: "new".to_owned(),
        };
        assert_eq!(GenerateError::from(unknown).kind, ErrorKind::Internal);
    }

    proptest! {
        #[test]
        fn fragments_are_the_message(bytes in 0usize..400_000) {
            let message: Bytes = (0..bytes).map(|i| u8::try_from(i % 251).unwrap()).collect();
            let parts: Vec<Data> = fragments(message.clone()).collect();
            prop_assert!(parts.iter().all(|part| part.payload.len() <= FRAGMENT_BYTES_MAX));
            prop_assert!(parts[..parts.len() - 1].iter().all(|part| part.more));
            prop_assert!(!parts[parts.len() - 1].more);
            let joined: Vec<u8> = parts.iter().flat_map(|part| part.payload.to_vec()).collect();
            prop_assert_eq!(joined, message.to_vec());
        }

        #[test]
        fn any_bytes_decode_or_fail_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(batch) = Batch::decode(&bytes[..]) {
                prop_assert_eq!(Batch::decode(&batch.encode_to_vec()[..]).unwrap(), batch);
            }
        }
    }
}

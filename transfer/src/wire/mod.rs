//! The protocol over sockets, shared by the tcp lane and the shm lane: control frames on one
//! connection, payload on others, all served by a few parked threads.
//!
//! A connection has an initiator, which posts operations, and a target, which owns the memory they
//! name. Two agents that write to each other have two connections.

mod ask;
#[cfg(test)]
mod ask_tests;
mod channel;
mod client;
mod control;
mod data;
mod frame;
mod handshake;
#[cfg(test)]
mod hostile;
mod incoming;
mod listen;
mod rdma;
mod reactor;
mod socket;
mod tls;
mod tuning;
mod watch;

pub(crate) use ask::ask_metadata;
pub(crate) use channel::NotificationChannel;
pub(crate) use client::{ConnectedWire, WireClient};
pub(crate) use handshake::{HandshakeFailure, Hello, HelloRole, Until, Welcome, greet};
pub(crate) use incoming::Incoming;
pub(crate) use listen::Listeners;
pub(crate) use rdma::offer_queue_pair;
pub(crate) use reactor::{Reactors, Wanted};
pub(crate) use socket::Socket;
pub(crate) use tls::TlsContext;
pub(crate) use tuning::{tune, tune_data};
pub(crate) use watch::process_of;

/// Decodes a frame as every kind that has a body; for fuzz targets.
#[cfg(fuzzing)]
pub(crate) fn fuzz_frames(data: &[u8]) {
    use crate::plan::{Segments, TensorSet};

    const REGION: u64 = 1 << 30;
    let Some((header, body)) = data.split_first_chunk() else {
        return;
    };
    if let Some(header) = frame::Header::decode(header) {
        assert_eq!(frame::Header::decode(&header.encode()), Some(header));
    }
    if let Some(stripe) = frame::StripeSpec::decode(body) {
        // What is accepted is checked against a region before it is used.
        if stripe.set.validate(REGION).is_ok() {
            let range = 0..stripe.set.bytes();
            for (offset, bytes) in Segments::new(&stripe.set, stripe.order, range).take(64) {
                assert!(bytes > 0 && offset + bytes <= REGION);
            }
            let _ = TensorSet::from(&stripe.set).stretches().count();
        }
    }
    let _ = frame::RegionAnswer::decode(body);
    let _ = frame::decode_grant(body);
    let _ = Hello::decode(body);
}

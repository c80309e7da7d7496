//! The verbs lane: RDMA into and out of the peer's registered memory, by this agent.
//!
//! A TCP connection carries the handshake, control frames and notifications, and tells when the peer
//! is gone.

use std::sync::Arc;
use std::time::Instant;

use super::{LaneFailure, Opened, greeting, tcp};
use crate::agent::Core;
use crate::peer::Metadata;
use crate::rdma::{Link, QueuePair};
use crate::wire::{ConnectedWire, HelloRole, WireClient, offer_queue_pair};

pub(super) fn open(
    core: &Arc<Core>,
    metadata: &Metadata,
    until: Instant,
) -> Result<Opened, LaneFailure> {
    let adapter = core
        .rdma
        .as_ref()
        .ok_or_else(|| LaneFailure::unusable("this agent was made without the lane verbs"))?;
    let address = metadata.addresses().tcp.as_deref().ok_or_else(|| {
        LaneFailure::unusable("the peer does not listen on TCP, where queue pairs are set up")
    })?;
    let pair = QueuePair::initiator(adapter).map_err(|error| {
        LaneFailure::unusable(format_args!("cannot make a queue pair: {error}"))
    })?;
    let hello = greeting(core, metadata, HelloRole::Control);
    let (control, welcome) = tcp::enter(core, address, &hello, until)?;
    let theirs = offer_queue_pair(&control, &pair.endpoint(), until)?
        .ok_or_else(|| LaneFailure::unusable("the peer does not offer RDMA"))?;
    let patience = core.config.peer_loss_timeout;
    let link = pair
        .receive_from(&theirs)
        .and_then(|()| pair.send_to(&theirs, patience))
        .and_then(|()| Link::new(adapter, pair))
        .map_err(|error| {
            LaneFailure::unusable(format_args!("cannot connect queue pairs: {error}"))
        })?;
    let wire = ConnectedWire {
        control,
        data: Vec::new(),
        peer_loss_timeout: welcome.loss_timeout,
        reads_max: welcome.reads_max,
        process: None,
        unmapped: "the peer has not registered it for RDMA",
        notifications: None,
        rdma: Some(Arc::new(link)),
    };
    let client = WireClient::new(core, &core.reactors, wire);
    let reason = format!(
        "RDMA from {}, set up over TCP to {address}",
        adapter.describe()
    );
    Ok((client, reason, 1))
}

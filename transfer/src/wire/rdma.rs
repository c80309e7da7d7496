//! What the verbs lane has on sockets: the exchange of queue pairs, and the descriptor that tells of
//! completions.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Weak};
use std::time::Instant;

use super::channel::receive_frame;
use super::client::WireClient;
use super::frame::{Code, Header, Kind};
use super::handshake::HandshakeFailure;
use super::reactor::{Event, Flow, Source};
use super::socket::Socket;
use crate::rdma::{Endpoint, Link};

/// Tells the target of our queue pair and waits for its own; `None` when it has none for us.
pub(crate) fn offer_queue_pair(
    socket: &Socket,
    ours: &Endpoint,
    until: Instant,
) -> Result<Option<Endpoint>, HandshakeFailure> {
    let frame = Header::new(Kind::OfferQueuePair, 0, 0).with_body(&ours.encode());
    // Among the first bytes on a fresh socket: they fit.
    if socket.send_bytes(&frame, None)? != frame.len() {
        return Err(HandshakeFailure::Malformed);
    }
    loop {
        let (header, body, _) = receive_frame(socket, until)?;
        match (header.kind, Code::from(header.code)) {
            // A heartbeat may come in between.
            (Kind::Ping, _) => {}
            (Kind::QueuePair, Some(Code::Ok)) => {
                let theirs = Endpoint::decode(&body).ok_or(HandshakeFailure::Malformed)?;
                return Ok(Some(theirs));
            }
            (Kind::QueuePair, Some(_)) => return Ok(None),
            _ => return Err(HandshakeFailure::Malformed),
        }
    }
}

/// Completions of a link.
pub(super) struct Completions {
    link: Arc<Link>,
    client: Weak<WireClient>,
}

impl Completions {
    pub(super) const fn new(link: Arc<Link>, client: Weak<WireClient>) -> Self {
        Self { link, client }
    }
}

impl Source for Completions {
    fn fd(&self) -> BorrowedFd<'_> {
        self.link.events()
    }

    fn ready(&mut self, _event: Event) -> Flow {
        match self.client.upgrade() {
            Some(client) => {
                client.rdma_ready();
                Flow::Keep
            }
            None => Flow::Drop,
        }
    }
}

//! The shm lane: the peer's arenas are mapped here, a transfer is a copy by this agent.
//!
//! Memory files travel over a Unix socket, which also carries control frames and notifications and
//! tells when the peer is gone. Regions that are not arenas are streamed over a second Unix socket
//! with the same protocol as over TCP; the plan of an operation says so.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::{LaneFailure, Opened, greeting};
use crate::agent::Core;
use crate::peer::Metadata;
use crate::wire::{
    ConnectedWire, HandshakeFailure, HelloRole, NotificationChannel, Socket, Until, WireClient,
    greet, process_of,
};

pub(super) fn open(
    core: &Arc<Core>,
    metadata: &Metadata,
    until: Instant,
) -> Result<Opened, LaneFailure> {
    let addresses = metadata.addresses();
    let path = addresses
        .shm
        .as_deref()
        .ok_or_else(|| LaneFailure::unusable("the peer does not offer shared memory"))?;
    if addresses.host != core.host() {
        return Err(LaneFailure::unusable("the peer is on another host"));
    }
    let mut control = Until::new(connect(path)?, until);
    let process = process_of(std::os::fd::AsFd::as_fd(&control.socket));
    let hello = greeting(core, metadata, HelloRole::Control);
    let welcome = greet(&mut control, &hello)?;
    let mut data = Until::new(connect(path)?, until);
    let role = HelloRole::Data {
        nonce: welcome.nonce,
    };
    greet(&mut data, &greeting(core, metadata, role))?;
    let control = Socket::new(control.socket.into()).map_err(HandshakeFailure::Io)?;
    let notifications = NotificationChannel::receive(&control, until)?;
    let wire = ConnectedWire {
        control,
        data: vec![Socket::new(data.socket.into()).map_err(HandshakeFailure::Io)?],
        peer_loss_timeout: welcome.loss_timeout,
        reads_max: welcome.reads_max,
        process,
        unmapped: "the region is not an arena, it goes over the Unix socket",
        notifications,
        rdma: None,
    };
    let client = WireClient::new(core, &core.reactors, wire);
    Ok((
        client,
        format!("the peer is on this host, its arenas are mapped ({path})"),
        1,
    ))
}

/// Connects without ever blocking on a peer that does not accept.
pub(crate) fn connect(path: &str) -> Result<UnixStream, LaneFailure> {
    let cannot = |error: rustix::io::Errno| {
        LaneFailure::unusable(format_args!("cannot connect to {path}: {error}"))
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(cannot)?;
    let address = SocketAddrUnix::new(path).map_err(cannot)?;
    rustix::net::connect(&socket, &address).map_err(cannot)?;
    rustix::io::ioctl_fionbio(&socket, false).map_err(cannot)?;
    Ok(UnixStream::from(socket))
}

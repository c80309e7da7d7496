//! The tcp lane: payload from and into registered memory over several connections.

use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use super::{LaneFailure, Opened, greeting, time_left};
use crate::agent::Core;
use crate::peer::Metadata;
use crate::wire::{
    ConnectedWire, HandshakeFailure, Hello, HelloRole, Socket, Until, Welcome, WireClient, greet,
    tune, tune_data,
};

pub(super) fn open(
    core: &Arc<Core>,
    metadata: &Metadata,
    until: Instant,
) -> Result<Opened, LaneFailure> {
    let address = metadata
        .addresses()
        .tcp
        .as_deref()
        .ok_or_else(|| LaneFailure::unusable("the peer does not listen on TCP"))?;
    let hello = greeting(core, metadata, HelloRole::Control);
    let (control, welcome) = enter(core, address, &hello, until)?;
    let mut data = Vec::with_capacity(core.config.tcp_streams);
    for _ in 0..core.config.tcp_streams {
        let role = HelloRole::Data {
            nonce: welcome.nonce,
        };
        let hello = greeting(core, metadata, role);
        data.push(enter(core, address, &hello, until)?.0);
    }
    let streams = data.len();
    let secure = if control.is_secure() { " with TLS" } else { "" };
    let wire = ConnectedWire {
        control,
        data,
        peer_loss_timeout: welcome.loss_timeout,
        reads_max: welcome.reads_max,
        process: None,
        unmapped: "the connection is TCP",
        notifications: None,
        rdma: None,
    };
    let client = WireClient::new(core, &core.reactors, wire);
    Ok((client, format!("TCP to {address}{secure}"), streams))
}

/// Connects and says hello.
pub(super) fn enter(
    core: &Core,
    address: &str,
    hello: &Hello,
    until: Instant,
) -> Result<(Socket, Welcome), LaneFailure> {
    let mut stream = Until::new(connect(core, address, until)?, until);
    if matches!(hello.role, HelloRole::Data { .. }) {
        tune_data(stream.socket.as_fd(), &core.config).map_err(HandshakeFailure::Io)?;
    }
    let (welcome, session) = match &core.tls {
        None => (greet(&mut stream, hello)?, None),
        Some(tls) => {
            let (welcome, session) = tls.greet(&mut stream, address, hello)?;
            (welcome, Some(session))
        }
    };
    let socket = Socket::new(stream.socket.into()).map_err(HandshakeFailure::Io)?;
    if let Some(session) = session {
        socket.secure(session);
    }
    Ok((socket, welcome))
}

pub(crate) fn connect(
    core: &Core,
    address: &str,
    until: Instant,
) -> Result<TcpStream, LaneFailure> {
    let resolved = address
        .to_socket_addrs()
        .map_err(|e| LaneFailure::unusable(format_args!("cannot resolve {address}: {e}")))?;
    let mut failure = LaneFailure::unusable(format_args!("{address} has no address"));
    for address in resolved {
        match TcpStream::connect_timeout(&address, time_left(until)?) {
            Ok(stream) => {
                tune(stream.as_fd(), &core.config).map_err(HandshakeFailure::Io)?;
                return Ok(stream);
            }
            Err(error) => {
                failure =
                    LaneFailure::unusable(format_args!("cannot connect to {address}: {error}"));
            }
        }
    }
    Err(failure)
}

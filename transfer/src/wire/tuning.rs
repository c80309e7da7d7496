//! Options of TCP sockets.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use rustix::net::sockopt;

use crate::config::AgentConfig;

/// Kernel buffers of a stream within one host, where data waits for the other thread and not for a
/// network. The send buffer keeps what is under way within the processor's caches; the larger
/// receive buffer keeps the window open while the receiver copies.
const LOCAL_SEND_BYTES: usize = 256 << 10;
const LOCAL_RECEIVE_BYTES: usize = 1 << 20;

/// Sets what every connection needs: no delay, and an end when the host of the peer is gone.
///
/// Heartbeats notice that within `peer_loss_timeout`. The kernel does it on its own a little later,
/// for sockets that nobody writes to or reads from any more.
pub(crate) fn tune(socket: BorrowedFd<'_>, config: &AgentConfig) -> io::Result<()> {
    let loss = config.peer_loss_timeout.max(Duration::from_secs(1));
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, loss)?;
    sockopt::set_tcp_keepintvl(socket, (loss / 4).max(Duration::from_secs(1)))?;
    sockopt::set_tcp_keepcnt(socket, 4)?;
    let patience = u32::try_from((loss * 2).as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(socket, patience)?;
    Ok(())
}

/// Sets what a stream of payload needs on top: sizes of the kernel's buffers, and pacing.
pub(crate) fn tune_data(socket: BorrowedFd<'_>, config: &AgentConfig) -> io::Result<()> {
    let local = within_host(socket);
    let default = |bytes| local.then_some(bytes);
    let send = config.tcp_send_buffer_bytes;
    if let Some(bytes) = send.or_else(|| default(LOCAL_SEND_BYTES)) {
        sockopt::set_socket_send_buffer_size(socket, bytes)?;
    }
    let receive = config.tcp_receive_buffer_bytes;
    if let Some(bytes) = receive.or_else(|| default(LOCAL_RECEIVE_BYTES)) {
        sockopt::set_socket_recv_buffer_size(socket, bytes)?;
    }
    if let Some(rate) = config.tcp_pacing_bytes_per_s {
        pace(socket, rate)?;
    }
    Ok(())
}

/// Both ends are on this host.
fn within_host(socket: BorrowedFd<'_>) -> bool {
    let address = |any: rustix::net::SocketAddrAny| {
        let any = std::net::SocketAddr::try_from(any).ok()?;
        Some(any.ip().to_canonical())
    };
    let here = rustix::net::getsockname(socket).ok().and_then(address);
    let there = rustix::net::getpeername(socket)
        .ok()
        .flatten()
        .and_then(address);
    here.is_some() && here == there || there.is_some_and(|ip: IpAddr| ip.is_loopback())
}

/// Limits the rate at which the kernel sends.
fn pace(socket: BorrowedFd<'_>, bytes_per_s: u64) -> io::Result<()> {
    // SAFETY: `bytes_per_s` is valid for reads of the stated size during the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MAX_PACING_RATE,
            (&raw const bytes_per_s).cast(),
            8,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    use super::*;

    fn pacing(socket: BorrowedFd<'_>) -> u64 {
        let (mut rate, mut len) = (0u64, 8);
        // SAFETY: both are valid for writes of the stated size.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_MAX_PACING_RATE,
                (&raw mut rate).cast(),
                &raw mut len,
            )
        };
        assert_eq!((result, len), (0, 8));
        rate
    }

    #[test]
    fn options_are_in_force() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let socket = stream.as_fd();
        let mut config = AgentConfig::new("a");
        config.peer_loss_timeout = Duration::from_secs(3);
        config.tcp_pacing_bytes_per_s = Some(10_000_000_000);
        tune(socket, &config).unwrap();
        tune_data(socket, &config).unwrap();
        assert!(stream.nodelay().unwrap());
        assert!(sockopt::socket_keepalive(socket).unwrap());
        assert_eq!(
            sockopt::tcp_keepidle(socket).unwrap(),
            Duration::from_secs(3)
        );
        assert_eq!(sockopt::tcp_user_timeout(socket).unwrap(), 6000);
        assert_eq!(pacing(socket), 10_000_000_000);
        // The kernel books twice what was asked for.
        let bytes = sockopt::socket_send_buffer_size(socket).unwrap();
        assert_eq!(bytes, LOCAL_SEND_BYTES * 2);
        config.tcp_send_buffer_bytes = Some(100_000);
        tune_data(socket, &config).unwrap();
        let bytes = sockopt::socket_send_buffer_size(socket).unwrap();
        assert_eq!(bytes, 200_000);
    }
}

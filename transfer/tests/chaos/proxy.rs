//! A TCP proxy on loopback that breaks the connections it forwards.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::pipe::pipe;

pub(crate) struct Proxy {
    port: u16,
    /// Write ends of pipes; closing one resets its connection.
    open: Arc<Mutex<Vec<OwnedFd>>>,
}

impl Proxy {
    /// Where the proxy listens.
    pub(crate) const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);
    /// Where it forwards to, at the same port.
    pub(crate) const BEHIND: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind((Self::ADDRESS, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let open: Arc<Mutex<Vec<OwnedFd>>> = Arc::default();
        let accepted = open.clone();
        // Ends with the test process.
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let Ok(client) = client else { continue };
                let Ok(server) = TcpStream::connect((Self::BEHIND, port)) else {
                    continue;
                };
                let (end, held) = pipe().unwrap();
                accepted.lock().push(held);
                std::thread::spawn(move || {
                    // A broken connection is what this is for.
                    let _ = forward(&client, &server, &end);
                    for socket in [&client, &server] {
                        let _ =
                            rustix::net::sockopt::set_socket_linger(socket, Some(Duration::ZERO));
                    }
                });
            }
        });
        Self { port, open }
    }

    pub(crate) const fn port(&self) -> u16 {
        self.port
    }

    /// Resets every connection: both ends get RST.
    pub(crate) fn reset(&self) {
        self.open.lock().clear();
    }
}

/// Bytes on their way in one direction.
#[derive(Default)]
struct Half {
    buffer: Vec<u8>,
    ended: bool,
}

/// Forwards in both directions until both have ended, one is broken, or `end` is closed.
fn forward(client: &TcpStream, server: &TcpStream, end: &OwnedFd) -> io::Result<()> {
    for socket in [client, server] {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
    }
    let mut halves = [Half::default(), Half::default()];
    let ways = [(client, server), (server, client)];
    let mut scratch = vec![0; 64 << 10];
    loop {
        let mut ready = [
            PollFd::from_borrowed_fd(client.as_fd(), interest(&halves, 0)),
            PollFd::from_borrowed_fd(server.as_fd(), interest(&halves, 1)),
            PollFd::from_borrowed_fd(end.as_fd(), PollFlags::IN),
        ];
        poll(&mut ready, None)?;
        if !ready[2].revents().is_empty() {
            return Ok(());
        }
        for (half, (mut from, mut to)) in halves.iter_mut().zip(ways) {
            if half.buffer.is_empty() && !half.ended {
                match from.read(&mut scratch) {
                    Ok(0) => {
                        half.ended = true;
                        to.shutdown(std::net::Shutdown::Write)?;
                    }
                    Ok(count) => half.buffer.extend_from_slice(&scratch[..count]),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
            if !half.buffer.is_empty() {
                match to.write(&half.buffer) {
                    Ok(count) => {
                        half.buffer.drain(..count);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
        }
        if halves.iter().all(|half| half.ended) {
            return Ok(());
        }
    }
}

/// What to wait for on socket `index`: to read for its own half, to write for the other one.
fn interest(halves: &[Half; 2], index: usize) -> PollFlags {
    let mut flags = PollFlags::empty();
    if halves[index].buffer.is_empty() && !halves[index].ended {
        flags |= PollFlags::IN;
    }
    if !halves[1 - index].buffer.is_empty() {
        flags |= PollFlags::OUT;
    }
    flags
}

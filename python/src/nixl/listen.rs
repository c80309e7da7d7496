//! Metadata by an address: a listener that takes and gives metadata, and what calls it.
//!
//! A call is one connection: `"BPNL"`, kind u8 (1: take this metadata, 2: give yours, 3: forget this
//! agent), length u32 little-endian, as many bytes (metadata, or a name). The answer is a length u32
//! and as many bytes: metadata, or nothing.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::core::Core;
use super::error::Fault;
use super::metadata::BYTES_MAX;

const MAGIC: &[u8; 4] = b"BPNL";
const TAKE: u8 = 1;
const GIVE: u8 = 2;
const FORGET: u8 = 3;
const HEADER_BYTES: usize = 9;

/// Bound on one call, at both ends.
const CALL_MAX: Duration = Duration::from_secs(2);

/// Serves calls until it is dropped.
pub(super) struct Listener {
    address: SocketAddr,
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    /// Listens at a port (0: one that the kernel chooses) of this host, or of the interface that other
    /// hosts connect to.
    pub(super) fn start(core: &Arc<Core>, port: u16) -> Result<Self, Fault> {
        let host = core.options.host.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        let trouble = |error: io::Error| {
            Fault::Backend(format!(
                "cannot listen for metadata at {host}:{port}: {error}"
            ))
        };
        let socket = TcpListener::bind((host, port)).map_err(trouble)?;
        let address = socket.local_addr().map_err(trouble)?;
        let stopped = Arc::new(AtomicBool::new(false));
        let (stop, core) = (stopped.clone(), Arc::downgrade(core));
        let thread = std::thread::Builder::new()
            .name("nixl-listen".to_owned())
            .spawn(move || serve(&socket, &core, &stop))
            .map_err(trouble)?;
        Ok(Self {
            address,
            stopped,
            thread: Some(thread),
        })
    }

    pub(super) const fn port(&self) -> u16 {
        self.address.port()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Release);
        // Wakes the thread, which may be in the middle of a call; that has a bound.
        let mut address = self.address;
        if address.ip().is_unspecified() {
            address.set_ip(IpAddr::V4(Ipv4Addr::LOCALHOST));
        }
        let woken = TcpStream::connect_timeout(&address, CALL_MAX).is_ok();
        if let Some(thread) = self.thread.take().filter(|_| woken) {
            let _ = thread.join();
        }
    }
}

fn serve(socket: &TcpListener, core: &Weak<Core>, stopped: &AtomicBool) {
    while let Ok((stream, from)) = socket.accept() {
        let Some(core) = core.upgrade().filter(|_| !stopped.load(Ordering::Acquire)) else {
            return;
        };
        if let Err(error) = answer(stream, &core) {
            tracing::info!(%from, %error, "a call for metadata was refused");
        }
    }
}

fn answer(stream: TcpStream, core: &Core) -> Result<(), Fault> {
    let mut call = Call::new(stream);
    let header: [u8; HEADER_BYTES] = call.array()?;
    if &header[..4] != MAGIC {
        return Err(Fault::Mismatch("no call of this package".to_owned()));
    }
    let payload = call.counted([header[5], header[6], header[7], header[8]])?;
    let reply = match header[4] {
        TAKE => {
            core.load(&payload)?;
            Vec::new()
        }
        // Whoever asks by a wrong name gets nothing.
        GIVE if payload == core.agent.name().as_bytes() => core.metadata(None)?.to_bytes(),
        GIVE => Vec::new(),
        FORGET => {
            core.unload(&String::from_utf8_lossy(&payload));
            Vec::new()
        }
        kind => return Err(Fault::Mismatch(format!("call of kind {kind}"))),
    };
    call.send(&[&length(&reply), &reply])
}

/// Gives metadata to the listener at an address.
pub(super) fn push(host: &str, port: u16, blob: &[u8]) -> Result<(), Fault> {
    call(host, port, TAKE, blob).map(drop)
}

/// Gets metadata of the agent that listens at an address, if it has that name.
pub(super) fn fetch(host: &str, port: u16, name: &str) -> Result<Vec<u8>, Fault> {
    let blob = call(host, port, GIVE, name.as_bytes())?;
    if blob.is_empty() {
        return Err(Fault::NotFound(format!(
            "the agent that listens at {host}:{port} is not {name:?}"
        )));
    }
    Ok(blob)
}

/// Asks the listener at an address to forget an agent.
pub(super) fn invalidate(host: &str, port: u16, name: &str) -> Result<(), Fault> {
    call(host, port, FORGET, name.as_bytes()).map(drop)
}

fn call(host: &str, port: u16, kind: u8, payload: &[u8]) -> Result<Vec<u8>, Fault> {
    let addresses = (host, port).to_socket_addrs();
    let addresses = addresses.map_err(|error| unreachable_at(host, port, &error))?;
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in addresses {
        match TcpStream::connect_timeout(&address, CALL_MAX) {
            Ok(stream) => {
                let mut call = Call::new(stream);
                call.send(&[MAGIC, &[kind], &length(payload), payload])?;
                let count = call.array()?;
                return call.counted(count);
            }
            Err(error) => last = error,
        }
    }
    Err(unreachable_at(host, port, &last))
}

fn unreachable_at(host: &str, port: u16, error: &io::Error) -> Fault {
    Fault::Disconnected(format!(
        "no listener for metadata at {host}:{port}: {error}"
    ))
}

fn length(payload: &[u8]) -> [u8; 4] {
    u32::try_from(payload.len())
        .unwrap_or(u32::MAX)
        .to_le_bytes()
}

/// A connection with a bound on all of it together.
struct Call {
    stream: TcpStream,
    until: Instant,
}

impl Call {
    fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            until: Instant::now() + CALL_MAX,
        }
    }

    /// Time that is left, which a socket takes as a timeout.
    fn left(&self) -> io::Result<Duration> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(left)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let mut bytes = [0; N];
        self.fill(&mut bytes).map_err(|error| cut_off(&error))?;
        Ok(bytes)
    }

    fn counted(&mut self, count: [u8; 4]) -> Result<Vec<u8>, Fault> {
        let count = usize::try_from(u32::from_le_bytes(count)).unwrap_or(usize::MAX);
        if count > BYTES_MAX {
            return Err(Fault::Mismatch(format!(
                "{count} bytes; accepted: up to {BYTES_MAX}"
            )));
        }
        // Grows with what really comes.
        let mut bytes = Vec::new();
        while bytes.len() < count {
            let have = bytes.len();
            bytes.resize(count.min(have + (64 << 10)), 0);
            self.fill(&mut bytes[have..])
                .map_err(|error| cut_off(&error))?;
        }
        Ok(bytes)
    }

    fn fill(&mut self, mut to: &mut [u8]) -> io::Result<()> {
        while !to.is_empty() {
            self.stream.set_read_timeout(Some(self.left()?))?;
            match self.stream.read(to) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(got) => to = &mut to[got..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn send(&mut self, parts: &[&[u8]]) -> Result<(), Fault> {
        let left = self
            .left()
            .and_then(|left| self.stream.set_write_timeout(Some(left)));
        left.and_then(|()| self.stream.write_all(&parts.concat()))
            .map_err(|error| cut_off(&error))
    }
}

fn cut_off(error: &io::Error) -> Fault {
    Fault::Disconnected(format!("the call for metadata was cut off: {error}"))
}

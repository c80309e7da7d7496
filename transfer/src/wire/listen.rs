//! Listening sockets, and connections that have not said hello yet.

use std::collections::VecDeque;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::ask::{Answer, check_question};
use super::data::{DataStream, Role};
use super::frame::{Code, HEADER_BYTES, Header, Kind};
use super::handshake::{HELLO_BYTES_MAX, Hello, HelloRole, Welcome};
use super::incoming::{Incoming, IncomingControl};
use super::reactor::{Event, Flow, Reactors, Source};
use super::socket::Socket;
use super::tls::TLS_FIRST_BYTE;
use super::tuning::{tune, tune_data};
use super::watch::{ProcessWatch, process_of};
use crate::agent::{Core, random_u64};
use crate::config::{AgentConfig, Lane};
use crate::error::{AgentError, LossCause};
use crate::peer::Addresses;

/// Connections that may wait for their hello at one time.
const WAITING_MAX: usize = 128;

/// Bound sockets of one agent.
#[derive(Debug)]
pub(crate) struct Listeners {
    tcp: Option<TcpListener>,
    unix: Option<BoundUnix>,
    pub(crate) addresses: Addresses,
}

/// A Unix listener and its file, which goes with it.
#[derive(Debug)]
struct BoundUnix {
    listener: UnixListener,
    path: PathBuf,
}

impl Drop for BoundUnix {
    fn drop(&mut self) {
        // Somebody may have removed it already.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Listeners {
    /// Binds what the lanes need.
    pub(crate) fn bind(config: &AgentConfig, epoch: u64) -> Result<Self, AgentError> {
        let mut addresses = Addresses {
            host: host_id(),
            ..Addresses::default()
        };
        let mut tcp = None;
        if config.lanes.contains(&Lane::Tcp) || config.lanes.contains(&Lane::Verbs) {
            let what = format!("listen on {}", config.tcp_bind);
            let io = |source| AgentError::Io {
                what: what.clone(),
                source,
            };
            let listener = TcpListener::bind(config.tcp_bind).map_err(io)?;
            listener.set_nonblocking(true).map_err(io)?;
            let bound = listener.local_addr().map_err(io)?;
            addresses.tcp = Some(match &config.advertise_host {
                Some(host) if host.contains(':') => format!("[{host}]:{}", bound.port()),
                Some(host) => format!("{host}:{}", bound.port()),
                None => bound.to_string(),
            });
            tcp = Some(listener);
        }
        let mut unix = None;
        if config.lanes.contains(&Lane::Shm) {
            remove_orphans(&config.socket_dir);
            let path = config
                .socket_dir
                .join(format!("blockplane-{epoch:016x}.sock"));
            let what = format!("listen on {}", path.display());
            let io = |source| AgentError::Io {
                what: what.clone(),
                source,
            };
            let listener = UnixListener::bind(&path).map_err(io)?;
            let bound = BoundUnix { listener, path };
            let private = std::fs::Permissions::from_mode(0o600);
            std::fs::set_permissions(&bound.path, private).map_err(io)?;
            bound.listener.set_nonblocking(true).map_err(io)?;
            addresses.shm = bound.path.to_str().map(str::to_owned);
            unix = Some(bound);
        }
        Ok(Self {
            tcp,
            unix,
            addresses,
        })
    }

    /// Starts accepting.
    pub(crate) fn serve(self, core: &Arc<Core>, reactors: &Arc<Reactors>) {
        let waiting = Arc::new(AtomicUsize::new(0));
        let Self { tcp, unix, .. } = self;
        let sockets = [tcp.map(Bound::Tcp), unix.map(Bound::Unix)];
        for socket in sockets.into_iter().flatten() {
            let listener = Listener {
                socket,
                core: Arc::downgrade(core),
                reactors: reactors.clone(),
                waiting: waiting.clone(),
            };
            reactors.add(reactors.place_control(), Box::new(listener));
        }
    }
}

/// Files that are looked at, and how old one must be to count as left behind.
const ORPHANS_MAX: usize = 256;
const ORPHAN_AGE: Duration = Duration::from_secs(60);

/// Removes sockets of agents that were killed: a file that has been there for a while and refuses
/// connections has no listener. What cannot be looked at or removed is left alone.
fn remove_orphans(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    let ours = |entry: &std::fs::DirEntry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name.starts_with("blockplane-") && name.ends_with(".sock")
    };
    for entry in entries.flatten().filter(ours).take(ORPHANS_MAX) {
        let age = entry
            .metadata()
            .and_then(|data| data.modified())
            .map(|at| at.elapsed());
        if !matches!(age, Ok(Ok(age)) if age > ORPHAN_AGE) {
            continue;
        }
        if refuses(&entry.path()) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Whether nobody listens on a socket file; never waits.
fn refuses(path: &Path) -> bool {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    match (socket, SocketAddrUnix::new(path)) {
        (Ok(socket), Ok(address)) => {
            rustix::net::connect(&socket, &address) == Err(rustix::io::Errno::CONNREFUSED)
        }
        _ => false,
    }
}

/// The running kernel, and the namespaces within which processes can meet on a Unix socket do not
/// matter here: whether the socket can be reached is tried.
fn host_id() -> [u8; 16] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let mut id = [0; 16];
    let digits = text.bytes().filter(u8::is_ascii_hexdigit);
    for (index, digit) in digits.take(32).enumerate() {
        let value = char::from(digit)
            .to_digit(16)
            .and_then(|v| u8::try_from(v).ok());
        id[index / 2] = (id[index / 2] << 4) | value.unwrap_or(0);
    }
    id
}

enum Bound {
    Tcp(TcpListener),
    Unix(BoundUnix),
}

struct Listener {
    socket: Bound,
    core: Weak<Core>,
    reactors: Arc<Reactors>,
    waiting: Arc<AtomicUsize>,
}

impl Listener {
    fn accept(&self) -> io::Result<(OwnedFd, bool)> {
        match &self.socket {
            Bound::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                if let Some(core) = self.core.upgrade() {
                    tune(stream.as_fd(), &core.config)?;
                }
                Ok((stream.into(), false))
            }
            Bound::Unix(bound) => Ok((bound.listener.accept()?.0.into(), true)),
        }
    }

    fn welcome(&self, fd: OwnedFd, unix: bool) {
        let Some(core) = self.core.upgrade().filter(|core| !core.is_stopped()) else {
            return;
        };
        let Some(slot) = Slot::take(&self.waiting) else {
            tracing::warn!("too many connections wait for their hello; one is closed");
            return;
        };
        let Ok(socket) = Socket::new(fd) else { return };
        let guest = Guest {
            socket: Arc::new(socket),
            unix,
            core: self.core.clone(),
            reactors: self.reactors.clone(),
            frame: Vec::new(),
            known: unix,
            slot,
        };
        let at = self.reactors.place_control();
        self.reactors.add(at, Box::new(guest));
        let (reactors, until) = (
            self.reactors.clone(),
            Instant::now() + core.config.connect_timeout,
        );
        core.timers.call(until, move || reactors.remove(at));
    }
}

/// One of the connections that may wait for their hello.
struct Slot(Arc<AtomicUsize>);

impl Slot {
    fn take(waiting: &Arc<AtomicUsize>) -> Option<Self> {
        let slot = Self(waiting.clone());
        (waiting.fetch_add(1, Ordering::AcqRel) < WAITING_MAX).then_some(slot)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Source for Listener {
    fn fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Bound::Tcp(listener) => listener.as_fd(),
            Bound::Unix(bound) => bound.listener.as_fd(),
        }
    }

    fn ready(&mut self, _event: Event) -> Flow {
        loop {
            match self.accept() {
                Ok((fd, unix)) => self.welcome(fd, unix),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Flow::Keep,
                Err(error) => {
                    // Out of descriptors, mostly: the next connection tries again.
                    tracing::warn!(%error, "cannot accept a connection");
                    return Flow::Keep;
                }
            }
        }
    }
}

/// A connection that has not said hello yet.
struct Guest {
    socket: Arc<Socket>,
    unix: bool,
    core: Weak<Core>,
    reactors: Arc<Reactors>,
    frame: Vec<u8>,
    /// It is clear whether it speaks TLS.
    known: bool,
    slot: Slot,
}

impl Guest {
    /// Looks at the first byte of a TCP connection; what to refuse it with if that is not what this
    /// agent speaks. `None` when nothing has arrived.
    fn meet(&mut self) -> io::Result<Option<Result<(), Code>>> {
        let Some(first) = self.socket.first_byte()? else {
            return Ok(None);
        };
        self.known = true;
        let core = self.core.upgrade();
        let tls = core.as_ref().and_then(|core| core.tls.as_ref());
        Ok(Some(match (tls, first == TLS_FIRST_BYTE) {
            (None, false) => Ok(()),
            (None, true) => Err(Code::NoTls),
            (Some(_), false) => Err(Code::TlsRequired),
            (Some(tls), true) => {
                self.socket.secure(tls.accept()?);
                Ok(())
            }
        }))
    }

    /// Reads up to the end of the hello, never beyond it; `Ok(true)` when it is complete.
    fn read(&mut self) -> io::Result<bool> {
        loop {
            let whole = match self.frame.first_chunk::<HEADER_BYTES>() {
                None => HEADER_BYTES,
                Some(header) => {
                    let header = Header::decode(header).filter(|header| {
                        matches!(header.kind, Kind::Hello | Kind::AskMetadata)
                            && header.len as usize <= HELLO_BYTES_MAX
                    });
                    let header = header.ok_or(io::ErrorKind::InvalidData)?;
                    HEADER_BYTES + header.len as usize
                }
            };
            let got = self.frame.len();
            if got == whole && whole > HEADER_BYTES {
                return Ok(true);
            }
            self.frame.resize(whole, 0);
            // Guests send no files; any that come are closed with the queue.
            let mut files = VecDeque::new();
            let received = self.socket.recv_bytes(&mut self.frame[got..], &mut files);
            self.frame.truncate(got + *received.as_ref().unwrap_or(&0));
            match received {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads what has arrived: closing over unread bytes would take the answer along.
    fn swallow(&self) {
        let (mut bytes, mut files) = ([0; 2048], VecDeque::new());
        let read = self.socket.recv_bytes(&mut bytes, &mut files);
        tracing::trace!(?read, "bytes thrown away");
    }

    fn refuse(&self, code: Code) -> Flow {
        // A courtesy: the connection closes either way.
        let frame = Header::new(Kind::Refuse, 0, 0).code(code).encode();
        let _ = self.socket.send_bytes(&frame, None);
        Flow::Drop
    }

    /// The first frame is whole.
    fn enter(&self) -> Flow {
        let header = self.frame.first_chunk().and_then(Header::decode);
        if header.is_some_and(|header| header.kind == Kind::AskMetadata) {
            return self.answer_metadata();
        }
        let hello = match Hello::decode(&self.frame[HEADER_BYTES..]) {
            Some(Ok(hello)) => hello,
            Some(Err(code)) => return self.refuse(code),
            None => return Flow::Drop,
        };
        let Some(core) = self.core.upgrade().filter(|core| !core.is_stopped()) else {
            return self.refuse(Code::Stopping);
        };
        if *hello.to != *core.name || hello.to_epoch != core.epoch {
            return self.refuse(Code::Stale);
        }
        match hello.role {
            HelloRole::Control => self.enter_control(&core, &hello),
            HelloRole::Data { nonce } => self.enter_data(&core, &hello, nonce),
        }
    }

    fn answer_metadata(&self) -> Flow {
        match check_question(&self.frame[HEADER_BYTES..]) {
            Some(Ok(())) => {}
            Some(Err(code)) => return self.refuse(code),
            None => return Flow::Drop,
        }
        let Some(core) = self.core.upgrade().filter(|core| !core.is_stopped()) else {
            return self.refuse(Code::Stopping);
        };
        if !core.config.serve_metadata {
            return self.refuse(Code::AccessDenied);
        }
        let Some(slot) = Slot::take(&self.slot.0) else {
            return self.refuse(Code::Busy);
        };
        let at = self.reactors.place_control();
        let (reactors, until) = (
            self.reactors.clone(),
            Instant::now() + core.config.connect_timeout,
        );
        core.timers.call(until, move || reactors.remove(at));
        let metadata = core.metadata().to_bytes();
        Flow::Become(
            at,
            Box::new(Answer::new(self.socket.clone(), &metadata, slot)),
        )
    }

    fn enter_control(&self, core: &Arc<Core>, hello: &Hello) -> Flow {
        let Ok(nonce) = random_u64() else {
            return self.refuse(Code::Busy);
        };
        let incoming = Incoming::new(
            core,
            &self.reactors,
            self.socket.clone(),
            hello,
            nonce,
            self.unix,
        );
        if !core.add_incoming(&incoming) {
            return self.refuse(Code::Busy);
        }
        if self.unix
            && let Some(process) = process_of(self.socket.as_fd())
        {
            let at = self.reactors.place_control();
            let gone = Arc::downgrade(&incoming);
            let watch = ProcessWatch::new(process, move || {
                if let Some(incoming) = gone.upgrade() {
                    incoming.end(&LossCause::ProcessExited);
                }
            });
            if incoming.add_place(at, false) {
                self.reactors.add(at, Box::new(watch));
            }
        }
        let welcome = Welcome {
            nonce,
            loss_timeout: core.config.peer_loss_timeout,
            reads_max: core.config.peer_reads_max,
        };
        incoming.send(welcome.encode());
        if self.unix {
            incoming.offer_ring();
        }
        incoming.tick();
        let source = IncomingControl::new(self.socket.clone(), incoming);
        Flow::Become(self.reactors.place_control(), Box::new(source))
    }

    fn enter_data(&self, core: &Core, hello: &Hello, nonce: u64) -> Flow {
        if !self.unix && !core.config.lanes.contains(&Lane::Tcp) {
            return self.refuse(Code::Unsupported);
        }
        let Some(incoming) = core
            .incoming(nonce)
            .filter(|i| i.epoch() == hello.from_epoch)
        else {
            return self.refuse(Code::Stale);
        };
        if !self.unix
            && let Err(error) = tune_data(self.socket.as_fd(), &core.config)
        {
            tracing::warn!(%error, "cannot set the options of a stream");
            return self.refuse(Code::Busy);
        }
        let at = self.reactors.place_data();
        if !incoming.add_place(at, true) {
            return self.refuse(Code::Busy);
        }
        let welcome = Welcome {
            nonce,
            loss_timeout: core.config.peer_loss_timeout,
            reads_max: core.config.peer_reads_max,
        };
        // The first bytes on a fresh socket: they fit.
        if self.socket.send_bytes(&welcome.encode(), None).is_err() {
            return Flow::Drop;
        }
        let chunk_bytes = core.config.stream_chunk_bytes;
        let stream = DataStream::new(self.socket.clone(), Role::Target(incoming), chunk_bytes);
        Flow::Become(at, Box::new(stream))
    }
}

impl Source for Guest {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn ready(&mut self, _event: Event) -> Flow {
        if !self.known {
            match self.meet() {
                Ok(Some(Ok(()))) => {}
                Ok(Some(Err(code))) => {
                    tracing::info!(?code, "a connection is refused");
                    self.swallow();
                    return self.refuse(code);
                }
                Ok(None) => return Flow::Keep,
                Err(_) => return Flow::Drop,
            }
        }
        match self.read() {
            Ok(true) => self.enter(),
            Ok(false) => Flow::Keep,
            Err(error) => {
                tracing::debug!(%error, "a connection ended before its hello");
                Flow::Drop
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_the_dead_are_removed_and_of_the_living_kept() {
        let folder = std::env::temp_dir().join(format!("bp-orphans-{:x}", random_u64().unwrap()));
        std::fs::create_dir(&folder).unwrap();
        let old = std::time::SystemTime::now() - ORPHAN_AGE * 2;
        let path = |name: &str| folder.join(format!("blockplane-{name}.sock"));
        let age = |path: &Path| {
            let path = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
            let seconds = old.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
            let at = rustix::fs::Timespec {
                tv_sec: seconds.cast_signed(),
                tv_nsec: 0,
            };
            let times = rustix::fs::Timestamps {
                last_access: at,
                last_modification: at,
            };
            let flags = rustix::fs::AtFlags::empty();
            rustix::fs::utimensat(rustix::fs::CWD, &path, &times, flags).unwrap();
        };
        let alive = UnixListener::bind(path("alive")).unwrap();
        drop(UnixListener::bind(path("dead")).unwrap());
        drop(UnixListener::bind(path("young")).unwrap());
        std::fs::write(folder.join("other.sock"), "").unwrap();
        age(&path("alive"));
        age(&path("dead"));
        age(&folder.join("other.sock"));
        remove_orphans(&folder);
        assert!(path("alive").exists() && path("young").exists());
        assert!(folder.join("other.sock").exists());
        assert!(!path("dead").exists());
        drop(alive);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}

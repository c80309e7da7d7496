//! The target's end of a connection.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use parking_lot::Mutex;

use super::control::{ControlRx, ControlTx, Frame, Violation};
use super::frame::{Code, DeviceAnswer, Header, Kind, RegionAnswer, StripeSpec, encode_grant};
use super::handshake::Hello;
use super::reactor::{Event, Flow, Placement, Reactors, Source};
use super::socket::Socket;
use super::watch::Pulse;
use crate::agent::{Core, next_session_key};
use crate::clock::after;
use crate::config::RemoteAccess;
use crate::cuda::{DeviceRange, Share};
use crate::error::LossCause;
use crate::memory::{Region, RegionId};
use crate::op::Notification;
use crate::plan::{BlockSet, Order};
use crate::rdma::{Endpoint, QueuePair};
use crate::window::{GrantSpec, Holder, OpenWindow, WindowId};

/// Data connections that one initiator may open.
const STREAMS_MAX: usize = 16;

/// A connection that an initiator made to this agent.
pub(crate) struct Incoming {
    me: Weak<Self>,
    /// Names this connection as a holder of windows.
    key: u64,
    /// Names it to the initiator, for its data connections.
    nonce: u64,
    core: Arc<Core>,
    reactors: Arc<Reactors>,
    control: ControlTx,
    from: Arc<str>,
    epoch: u64,
    /// The initiator maps our arenas: its windows are quiet only when it says so or is gone.
    maps: bool,
    pulse: Pulse,
    lost: AtomicBool,
    /// It maps device memory of ours.
    on_devices: AtomicBool,
    /// It has said that nothing of it moves any more.
    bye: AtomicBool,
    /// Its connection is gone, and its process is being waited for.
    fading: AtomicBool,
    /// Raised after bytes were placed and read before a notification is delivered: orders the two
    /// for readers in this process, whichever threads served the sockets.
    placed: AtomicU64,
    /// Lets the initiator reach into our memory. Locked before nothing else.
    rdma: Mutex<Option<QueuePair>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    places: Vec<Placement>,
    streams: usize,
    windows: HashMap<WindowId, Arc<OpenWindow>>,
    regions: HashSet<RegionId>,
    /// Memory that the initiator may copy into through the kernel.
    held: HashMap<RegionId, Arc<Region>>,
    /// The ring through which its notifications come.
    ring: Option<usize>,
}

/// A stripe that was checked: its set fits the region and the window.
pub(crate) struct Admitted {
    pub(crate) region: Arc<Region>,
    pub(crate) window: Option<Arc<OpenWindow>>,
    pub(crate) set: BlockSet,
    pub(crate) order: Order,
    /// What is left of it.
    pub(crate) range: Range<u64>,
}

impl Admitted {
    /// Why it may not go on.
    pub(crate) fn refusal(&self) -> Option<Code> {
        if self.region.released() {
            Some(Code::UnknownRegion)
        } else if self
            .window
            .as_ref()
            .is_some_and(|window| window.enter().is_none())
        {
            Some(Code::WindowClosed)
        } else {
            None
        }
    }
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming")
            .field("from", &self.from)
            .finish_non_exhaustive()
    }
}

impl Incoming {
    pub(crate) fn new(
        core: &Arc<Core>,
        reactors: &Arc<Reactors>,
        socket: Arc<Socket>,
        hello: &Hello,
        nonce: u64,
        maps: bool,
    ) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            key: next_session_key(),
            nonce,
            core: core.clone(),
            reactors: reactors.clone(),
            control: ControlTx::new(socket),
            from: hello.from.as_str().into(),
            epoch: hello.from_epoch,
            maps,
            pulse: Pulse::new(core.config.peer_loss_timeout, hello.loss_timeout),
            lost: AtomicBool::new(false),
            on_devices: AtomicBool::new(false),
            bye: AtomicBool::new(false),
            fading: AtomicBool::new(false),
            placed: AtomicU64::new(0),
            rdma: Mutex::default(),
            state: Mutex::default(),
        })
    }

    pub(crate) const fn nonce(&self) -> u64 {
        self.nonce
    }

    pub(crate) const fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(crate) fn send(&self, frame: Vec<u8>) {
        self.control.send(frame, None);
    }

    pub(super) fn heard(&self) {
        self.pulse.heard();
    }

    pub(super) fn reads_max(&self) -> usize {
        usize::try_from(self.core.config.peer_reads_max).unwrap_or(usize::MAX)
    }

    /// Gives an initiator on this host a ring for its notifications. Without one they come as
    /// frames.
    pub(crate) fn offer_ring(&self) {
        let payload_max = self.core.config.notification_bytes_max;
        let opened = self
            .core
            .notifications
            .open_ring(self.from.clone(), self.epoch, payload_max);
        let (ring, bell) = (Header::new(Kind::Ring, 0, 0), Header::new(Kind::Bell, 0, 0));
        match opened {
            Ok(opened) => {
                self.state.lock().ring = Some(opened.index);
                self.control.send(ring.encode().to_vec(), Some(opened.ring));
                let index = (opened.index as u64).to_le_bytes();
                self.control.send(bell.with_body(&index), Some(opened.bell));
            }
            Err(error) => {
                tracing::warn!(from = %self.from, %error, "no shared ring for notifications");
                self.control.header(ring.code(Code::Busy));
            }
        }
    }

    /// Remembers a place that goes with this connection; false when there are too many streams or
    /// the connection is over.
    pub(crate) fn add_place(&self, at: Placement, stream: bool) -> bool {
        let mut state = self.state.lock();
        if self.lost.load(Ordering::Acquire) || stream && state.streams >= STREAMS_MAX {
            return false;
        }
        state.streams += usize::from(stream);
        state.places.push(at);
        true
    }

    /// Sends heartbeats and, over TCP, notices silence.
    ///
    /// An initiator that maps our memory is not given up for being silent: it may be stopped in the
    /// middle of a copy and go on later. It holds its windows until it answers or is dead.
    pub(crate) fn tick(&self) {
        let me = self.me.clone();
        self.core.timers.call(self.pulse.next_tick(), move || {
            let Some(incoming) = me.upgrade() else { return };
            if incoming.lost.load(Ordering::Acquire) {
                return;
            }
            match incoming.pulse.tick() {
                Some(silent) if !incoming.maps => incoming.end(&LossCause::Silent(silent)),
                _ => {
                    incoming.control.beat();
                    incoming.tick();
                }
            }
        });
    }

    /// A data connection broke. Over TCP the whole connection goes; an initiator that maps our
    /// memory closes its control connection when it is quiet.
    pub(super) fn lost(&self, cause: &LossCause) {
        if self.maps {
            tracing::debug!(from = %self.from, %cause, "data connection ended");
        } else {
            self.end(cause);
        }
    }

    /// The control connection is gone.
    ///
    /// The kernel closes the sockets of a process that was killed before it tears down what the process
    /// has running on a device. So an initiator that has device memory mapped and has not said
    /// goodbye counts as quiet when its process has ended, or at the latest after the loss timeout.
    fn closed(&self, cause: LossCause) {
        let mapped = self.on_devices.load(Ordering::Acquire);
        if !mapped || self.bye.load(Ordering::Acquire) {
            return self.end(&cause);
        }
        self.fading.store(true, Ordering::Release);
        let Some(incoming) = self.me.upgrade() else {
            return;
        };
        let until = after(self.core.config.peer_loss_timeout);
        self.core.timers.call(until, move || incoming.end(&cause));
    }

    /// The connection is over and nothing of it can move any more.
    pub(crate) fn end(&self, cause: &LossCause) {
        if self.lost.swap(true, Ordering::AcqRel) {
            return;
        }
        tracing::debug!(from = %self.from, epoch = self.epoch, %cause, "incoming connection ended");
        // First: nothing of it lands any more when windows count as quiet.
        let pair = self.rdma.lock().take();
        drop(pair);
        self.close_streams();
        self.control.close();
        let mut state = self.state.lock();
        let windows = std::mem::take(&mut state.windows);
        let held = std::mem::take(&mut state.held);
        let ring = state.ring.take();
        drop(state);
        drop(held);
        if let Some(ring) = ring {
            self.core.notifications.close_ring(ring);
        }
        for window in windows.into_values() {
            window.acknowledge(self.key);
        }
        self.core.forget_incoming(self.nonce);
    }

    /// The initiator wants to reach into our memory by RDMA.
    fn answer_offer(&self, body: &[u8]) -> Result<(), Violation> {
        let theirs = Endpoint::decode(body).ok_or(Violation("malformed OFFER_QUEUE_PAIR"))?;
        let header = Header::new(Kind::QueuePair, 0, 0);
        let mut slot = self.rdma.lock();
        if slot.is_some() {
            return Err(Violation("a second queue pair"));
        }
        let Some(adapter) = &self.core.rdma else {
            self.control.header(header.code(Code::Unsupported));
            return Ok(());
        };
        let made = QueuePair::target(adapter).and_then(|pair| {
            pair.receive_from(&theirs)?;
            Ok(pair)
        });
        match made {
            Ok(pair) => {
                let ours = pair.endpoint();
                // An end that came meanwhile waits for the lock and takes it out again, or has been here.
                if !self.lost.load(Ordering::Acquire) {
                    *slot = Some(pair);
                    self.control.send(header.with_body(&ours.encode()), None);
                }
            }
            Err(error) => {
                tracing::warn!(from = %self.from, %error, "no queue pair for a peer");
                self.control.header(header.code(Code::Busy));
            }
        }
        Ok(())
    }

    /// It reaches into our memory without us: through mappings or by RDMA.
    fn reaches(&self) -> bool {
        self.maps || self.rdma.lock().is_some()
    }

    fn close_streams(&self) {
        let places = std::mem::take(&mut self.state.lock().places);
        for place in places {
            self.reactors.remove(place);
        }
    }

    pub(crate) fn region_gone(&self, region: RegionId) {
        if self.state.lock().regions.remove(&region) {
            self.control
                .header(Header::new(Kind::RegionGone, region.0, 0));
        }
    }

    // ---- stripes ----

    /// Bytes of a stripe were placed, and no more will be.
    pub(super) fn placed(&self) {
        self.placed.fetch_add(1, Ordering::Release);
    }

    /// Checks what an initiator wants to write or read. It may have done so itself; it may lie.
    pub(super) fn admit(&self, spec: StripeSpec, write: bool) -> Result<Admitted, Code> {
        let StripeSpec {
            region,
            window,
            order,
            set,
            range,
        } = spec;
        let region = self.core.region(region).ok_or(Code::UnknownRegion)?;
        let window = match window {
            Some(id) => Some(self.core.window(id).ok_or(Code::WindowClosed)?),
            None => None,
        };
        if region.device().is_some() {
            // No socket thread touches device memory.
            return Err(Code::AccessDenied);
        }
        let allowed = match region.access {
            RemoteAccess::Open => true,
            RemoteAccess::WindowOnly => window.is_some(),
            RemoteAccess::None => false,
        };
        if !allowed {
            return Err(Code::AccessDenied);
        }
        set.validate(region.len as u64)
            .map_err(|_| Code::OutOfBounds)?;
        if range.start >= range.end || range.end > set.bytes() {
            return Err(Code::OutOfBounds);
        }
        if let Some(window) = &window {
            window
                .permits(&region, &set, write)
                .map_err(|_| Code::OutOfBounds)?;
        }
        Ok(Admitted {
            region,
            window,
            set,
            order,
            range,
        })
    }

    // ---- control frames ----

    fn frame(&self, frame: Frame<'_>) -> Result<(), Violation> {
        let Frame {
            header,
            body,
            files,
        } = frame;
        // Initiators send no files.
        files.clear();
        match header.kind {
            Kind::Ping => {}
            Kind::AskRegion => self.tell_region(RegionId(header.id), header.part),
            Kind::AskWindow => self.tell_window(WindowId(header.id), header.part),
            Kind::WindowQuiet => {
                let window = self.state.lock().windows.remove(&WindowId(header.id));
                if let Some(window) = window {
                    window.acknowledge(self.key);
                }
            }
            Kind::RegionQuiet => {
                let region = self.state.lock().held.remove(&RegionId(header.id));
                drop(region);
            }
            Kind::Bye => self.bye.store(true, Ordering::Release),
            Kind::OfferQueuePair => self.answer_offer(body)?,
            Kind::Rang => self.core.notifications.wake_tasks(),
            Kind::Notify => {
                let code = self.deliver(body);
                self.control
                    .header(Header::new(Kind::Notified, header.id, 0).code(code));
            }
            Kind::Hello
            | Kind::Welcome
            | Kind::Refuse
            | Kind::AskMetadata
            | Kind::Metadata
            | Kind::Region
            | Kind::Window
            | Kind::WindowClose
            | Kind::RegionGone
            | Kind::Notified
            | Kind::StripeDone
            | Kind::Ring
            | Kind::Bell
            | Kind::QueuePair
            | Kind::Write
            | Kind::WriteAbort
            | Kind::Read
            | Kind::ReadCancel
            | Kind::Data
            | Kind::ReadDone => return Err(Violation("a frame that initiators do not send")),
        }
        Ok(())
    }

    pub(super) fn deliver(&self, payload: &[u8]) -> Code {
        if payload.len() > self.core.config.notification_bytes_max {
            return Code::TooLarge;
        }
        // The initiator sends this after our answer for its stripes: with the stream threads'
        // release this makes their bytes visible to whoever takes the notification.
        self.placed.load(Ordering::Acquire);
        let notification = Notification {
            from: self.from.clone(),
            epoch: self.epoch,
            payload: Bytes::copy_from_slice(payload),
        };
        if self.core.receive(notification) {
            Code::Ok
        } else {
            Code::QueueFull
        }
    }

    fn tell_region(&self, id: RegionId, number: u32) {
        let header = Header::new(Kind::Region, id.0, number);
        // Booked before it is looked up: a release in between is not missed.
        self.state.lock().regions.insert(id);
        let region = self
            .core
            .region(id)
            .filter(|region| region.access != RemoteAccess::None);
        let Some(region) = region else {
            self.state.lock().regions.remove(&id);
            let code = match self.core.region(id) {
                Some(_) => Code::AccessDenied,
                None => Code::UnknownRegion,
            };
            self.control.header(header.code(code));
            return;
        };
        let mut file = region.file().filter(|_| self.maps).cloned();
        let device = region
            .device()
            .map(|range| self.share_device(&region, range, &mut file));
        let by_kernel = self.maps && file.is_none() && device.is_none();
        let rdma = region
            .rdma()
            .filter(|_| self.rdma.lock().is_some())
            .map(|key| key.remote);
        let by_handle = device.is_some_and(|device| device.handle.is_some());
        if by_kernel || by_handle || rdma.is_some() {
            // The memory stays until the initiator says that it does not copy there any more.
            self.state.lock().held.insert(id, region.clone());
        }
        let answer = RegionAnswer {
            len: region.len as u64,
            access: region.access,
            file: file.is_some(),
            address: if by_kernel || rdma.is_some() {
                region.address()
            } else {
                0
            },
            rdma,
            device,
        };
        self.control.send(header.with_body(&answer.encode()), file);
    }

    /// What an initiator on this host needs to map device memory.
    fn share_device(
        &self,
        region: &Region,
        range: &DeviceRange,
        file: &mut Option<Arc<OwnedFd>>,
    ) -> DeviceAnswer {
        let mut answer = DeviceAnswer {
            uuid: range.device.info.uuid,
            pull: self.core.config.cuda.peers_pull,
            handle: None,
        };
        if self.maps {
            match range.share() {
                Ok(share) => {
                    self.on_devices.store(true, Ordering::Release);
                    match share {
                        Share::File(descriptor) => *file = Some(Arc::new(descriptor)),
                        Share::Handle(handle) => answer.handle = Some(handle),
                    }
                }
                Err(error) => {
                    let id = region.id;
                    tracing::warn!(region = %id, %error, "device memory is not shared with a peer");
                }
            }
        }
        answer
    }

    fn tell_window(&self, id: WindowId, number: u32) {
        let header = Header::new(Kind::Window, id.0, number);
        let told = self.core.window(id).and_then(|window| {
            let spec = GrantSpec {
                region: window.region.id,
                scope: window.scope.clone(),
                access: window.access,
            };
            let body = encode_grant(&spec)?;
            self.state.lock().windows.insert(id, window.clone());
            let holder: Weak<dyn Holder> = self.me.clone();
            if window.add_holder(self.key, holder, self.reaches()) {
                Some(body)
            } else {
                self.state.lock().windows.remove(&id);
                None
            }
        });
        match told {
            Some(body) => self.control.send(header.with_body(&body), None),
            None => self.control.header(header.code(Code::WindowClosed)),
        }
    }
}

impl Holder for Incoming {
    fn revoke(&self, window: &Arc<OpenWindow>) {
        if self.lost.load(Ordering::Acquire) {
            window.acknowledge(self.key);
        } else {
            self.control
                .header(Header::new(Kind::WindowClose, window.id.0, 0));
        }
    }
}

/// Control frames of an initiator.
pub(crate) struct IncomingControl {
    rx: ControlRx,
    incoming: Arc<Incoming>,
    /// It broke the protocol while it maps our memory: wait for it to close, hear nothing.
    condemned: bool,
}

impl IncomingControl {
    pub(crate) fn new(socket: Arc<Socket>, incoming: Arc<Incoming>) -> Self {
        Self {
            rx: ControlRx::new(socket),
            incoming,
            condemned: false,
        }
    }
}

impl Source for IncomingControl {
    fn fd(&self) -> BorrowedFd<'_> {
        self.rx.socket().as_fd()
    }

    fn ready(&mut self, event: Event) -> Flow {
        let incoming = &self.incoming;
        if event.writable {
            incoming.control.flush();
        }
        if self.condemned {
            return match self.rx.drain() {
                Ok(()) => Flow::Keep,
                Err(cause) => {
                    incoming.closed(cause);
                    Flow::Drop
                }
            };
        }
        let result = self.rx.read(|frame| {
            incoming.heard();
            incoming.frame(frame)
        });
        match result {
            Ok(false) => Flow::Keep,
            Ok(true) => Flow::Again,
            Err(cause @ LossCause::Protocol(_)) if incoming.maps => {
                tracing::warn!(from = %incoming.from, %cause, "peer condemned");
                incoming.close_streams();
                self.condemned = true;
                Flow::Again
            }
            Err(cause) => {
                incoming.closed(cause);
                Flow::Drop
            }
        }
    }
}

impl Drop for IncomingControl {
    fn drop(&mut self) {
        if !self.incoming.fading.load(Ordering::Acquire) {
            self.incoming.end(&LossCause::Disconnected);
        }
    }
}

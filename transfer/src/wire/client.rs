//! The initiator's end of a connection.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};

use super::channel::{NotificationChannel, Sent};
use super::control::{ControlRx, ControlTx, Frame, Violation};
use super::data::{DataCommand, DataStream, Key, Role};
use super::frame::{Code, Header, Kind, RegionAnswer, decode_grant};
use super::rdma::Completions;
use super::reactor::{Event, Flow, Placement, Reactors, Source};
use super::socket::Socket;
use super::watch::{ProcessWatch, Pulse};
use crate::agent::{
    Core, DeviceOfPeer, ForeignMemory, MappedMemory, PeerDeviceMemory, RdmaMemory, RemoteMemory,
    RemoteRegion, Session, Timers,
};
use crate::backend::{Backend, Refusal};
use crate::config::RemoteAccess;
use crate::cuda::{CudaDevice, Imported, device_with};
use crate::error::{LossCause, Rejection, TransferError};
use crate::memory::{PeerProcess, RegionId, map_arena};
use crate::op::{Op, Path, Stripe, TransferState, Work};
use crate::rdma::Link;
use crate::ring::SendError;
use crate::window::{Grant, Usage, WindowId};

/// Larger notifications do not go along with the bytes of a WRITE.
const RIDER_BYTES_MAX: usize = 4096;

/// Connected sockets, ready to be served.
#[derive(Debug)]
pub(crate) struct ConnectedWire {
    pub(crate) control: Socket,
    pub(crate) data: Vec<Socket>,
    /// After which silence the peer gives us up.
    pub(crate) peer_loss_timeout: Duration,
    /// READs that the peer holds open on one data connection.
    pub(crate) reads_max: u32,
    /// Becomes readable when the peer's process ends, where that can be watched.
    pub(crate) process: Option<OwnedFd>,
    /// Why regions are not mapped, when they are not.
    pub(crate) unmapped: &'static str,
    /// How notifications go, when not as frames.
    pub(crate) notifications: Option<NotificationChannel>,
    /// By which payload goes, when not over `data`.
    pub(crate) rdma: Option<Arc<Link>>,
}

pub(crate) struct WireClient {
    me: Weak<Self>,
    control: ControlTx,
    reactors: Arc<Reactors>,
    timers: Arc<Timers>,
    session: OnceLock<Weak<Session>>,
    control_at: Placement,
    process_at: Placement,
    data_at: Vec<Placement>,
    /// Sockets that wait to be served; taken by `attach`.
    waiting: Mutex<Option<Waiting>>,
    questions: Mutex<Questions>,
    answered: Condvar,
    /// Notifications on the control connection that are not answered.
    notifying: AtomicUsize,
    parts: Mutex<Parts>,
    pulse: Pulse,
    reads_max: usize,
    unmapped: &'static str,
    notifications: Option<NotificationChannel>,
    rdma: Option<Arc<Link>>,
    rdma_at: Placement,
    /// The peer's process, for copies through the kernel; none once the connection is closed.
    process: Mutex<Option<Arc<PeerProcess>>>,
}

struct Waiting {
    control: Arc<Socket>,
    data: Vec<Socket>,
    process: Option<OwnedFd>,
    chunk_bytes: u32,
}

#[derive(Default)]
struct Questions {
    next: u32,
    /// Asked and not taken back: the answer, once it is there.
    open: HashMap<u32, Option<Answer>>,
    lost: bool,
}

enum Answer {
    Region(RegionAnswer, Option<OwnedFd>),
    Granted(Arc<Grant>),
    Refused(Code),
}

/// Parts that streams work on.
#[derive(Default)]
struct Parts {
    open: HashMap<Key, OpenPart>,
    streams: usize,
}

struct OpenPart {
    transfer: Arc<TransferState>,
    /// A WRITE is over when this side does not read its bytes any more and the target has
    /// answered.
    sent: bool,
    answered: bool,
}

impl fmt::Debug for WireClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WireClient").finish_non_exhaustive()
    }
}

impl WireClient {
    pub(crate) fn new(core: &Core, reactors: &Arc<Reactors>, wire: ConnectedWire) -> Arc<Self> {
        let control = Arc::new(wire.control);
        let watch = wire.process.as_ref();
        let process = watch.and_then(|watch| PeerProcess::of(control.as_fd(), watch));
        let process = Mutex::new(process.map(Arc::new));
        Arc::new_cyclic(|me: &Weak<Self>| Self {
            me: me.clone(),
            control: ControlTx::new(control.clone()),
            reactors: reactors.clone(),
            timers: core.timers.clone(),
            session: OnceLock::new(),
            control_at: reactors.place_control(),
            process_at: reactors.place_control(),
            data_at: wire.data.iter().map(|_| reactors.place_data()).collect(),
            parts: Mutex::new(Parts {
                streams: wire.data.len(),
                ..Parts::default()
            }),
            waiting: Mutex::new(Some(Waiting {
                control,
                data: wire.data,
                process: wire.process,
                chunk_bytes: core.config.stream_chunk_bytes,
            })),
            questions: Mutex::default(),
            answered: Condvar::new(),
            notifying: AtomicUsize::new(0),
            pulse: Pulse::new(core.config.peer_loss_timeout, wire.peer_loss_timeout),
            reads_max: usize::try_from(wire.reads_max).unwrap_or(usize::MAX),
            unmapped: wire.unmapped,
            notifications: wire.notifications,
            rdma: wire.rdma,
            rdma_at: reactors.place_data(),
            process,
        })
    }

    fn session(&self) -> Option<Arc<Session>> {
        self.session.get().and_then(Weak::upgrade)
    }

    /// READs that may be open on one data connection.
    pub(super) const fn reads_max(&self) -> usize {
        self.reads_max
    }

    pub(super) fn heard(&self) {
        self.pulse.heard();
    }

    /// The connection is gone.
    pub(super) fn lost(&self, cause: LossCause) {
        if let Some(session) = self.session() {
            session.lose(cause);
        }
    }

    /// Sends heartbeats and notices silence.
    fn tick(&self) {
        let me = self.me.clone();
        self.timers.call(self.pulse.next_tick(), move || {
            let Some(client) = me.upgrade() else { return };
            if client
                .session()
                .is_none_or(|session| session.lost().is_some())
            {
                return;
            }
            if let Some(silent) = client.pulse.tick() {
                client.lost(LossCause::Silent(silent));
            } else {
                client.control.beat();
                client.tick();
            }
        });
    }

    // ---- parts ----

    fn open_part(&self, key: Key, transfer: &Arc<TransferState>) -> bool {
        let mut parts = self.parts.lock();
        if parts.streams == 0 {
            return false;
        }
        let part = OpenPart {
            transfer: transfer.clone(),
            sent: false,
            answered: false,
        };
        parts.open.insert(key, part);
        true
    }

    /// Nothing of this part moves any more, whatever was said about it.
    pub(super) fn give_back(&self, key: Key) {
        let part = self.parts.lock().open.remove(&key);
        if let Some(part) = part {
            part.transfer.part_done();
        }
    }

    /// The stream does not read bytes of this part any more.
    pub(super) fn sent(&self, key: Key) {
        self.settle(key, |part| part.sent = true);
    }

    /// The target has answered for this part.
    pub(super) fn stripe_answered(&self, key: Key, code: Code) {
        let transfer = self
            .parts
            .lock()
            .open
            .get(&key)
            .map(|part| part.transfer.clone());
        let Some(transfer) = transfer else { return };
        if code != Code::Ok {
            fail(&transfer, code);
        }
        self.settle(key, |part| part.answered = true);
    }

    fn settle(&self, key: Key, book: impl FnOnce(&mut OpenPart)) {
        let mut parts = self.parts.lock();
        let Some(part) = parts.open.get_mut(&key) else {
            return;
        };
        book(part);
        if part.sent && part.answered {
            let part = parts.open.remove(&key);
            drop(parts);
            if let Some(part) = part {
                part.transfer.part_done();
            }
        }
    }

    /// The target has answered for a notification.
    pub(super) fn notified(&self, id: u64, code: Code) {
        let transfer = self.session().and_then(|session| session.operation(id));
        if let Some(transfer) = transfer {
            transfer.notified(&code.outcome(None));
        }
    }

    /// Whether the notification of a WRITE goes along with its bytes: when they go as one stripe,
    /// and nothing that has to arrive before it goes another way.
    fn may_ride(&self, transfer: &Arc<TransferState>, work: &Work, stripes: &[Stripe]) -> bool {
        let small = |payload: &Bytes| payload.len() <= RIDER_BYTES_MAX;
        stripes.len() == 1
            && work.op == Op::Write
            && self.notifications.is_none()
            && transfer.notification.as_ref().is_some_and(small)
            && transfer
                .session
                .claim_ride(transfer, || self.notifying.load(Ordering::Acquire) == 0)
    }

    /// The target has sent the last byte of a READ, or says why not.
    pub(super) fn read_done(&self, transfer: &Arc<TransferState>, key: Key, code: Code) {
        if code != Code::Ok {
            fail(transfer, code);
        }
        self.give_back(key);
    }

    /// A data connection is not served any more; after the last one nothing moves.
    pub(super) fn stream_closed(&self) {
        let mut parts = self.parts.lock();
        parts.streams = parts.streams.saturating_sub(1);
        if parts.streams > 0 {
            return;
        }
        let open = std::mem::take(&mut parts.open);
        drop(parts);
        let lost = self.session().and_then(|session| session.lost());
        for part in open.into_values() {
            // Whoever notices the loss first may not have told every operation yet.
            if let Some(lost) = &lost {
                part.transfer.stop(TransferError::PeerLost(lost.clone()));
            }
            part.transfer.part_done();
        }
    }

    // ---- questions ----

    fn ask(&self, kind: Kind, id: u64, until: Instant) -> Result<Answer, Refusal> {
        let mut questions = self.questions.lock();
        if questions.lost {
            return Err(Refusal::Lost);
        }
        questions.next = questions.next.wrapping_add(1);
        let number = questions.next;
        questions.open.insert(number, None);
        drop(questions);
        self.control.header(Header::new(kind, id, number));
        let mut questions = self.questions.lock();
        loop {
            if questions.open.get(&number).is_some_and(Option::is_some) {
                return questions
                    .open
                    .remove(&number)
                    .flatten()
                    .ok_or(Refusal::Lost);
            }
            if questions.lost {
                questions.open.remove(&number);
                return Err(Refusal::Lost);
            }
            if self.answered.wait_until(&mut questions, until).timed_out() {
                return questions
                    .open
                    .remove(&number)
                    .flatten()
                    .ok_or(Refusal::TimedOut);
            }
        }
    }

    fn is_asked(&self, number: u32) -> bool {
        matches!(self.questions.lock().open.get(&number), Some(None))
    }

    fn answer(&self, number: u32, answer: Answer) {
        let mut questions = self.questions.lock();
        // Nobody waits any more for an answer that comes too late.
        if let Some(slot) = questions.open.get_mut(&number) {
            *slot = Some(answer);
            drop(questions);
            self.answered.notify_all();
        }
    }

    // ---- control frames ----

    fn frame(&self, frame: Frame<'_>) -> Result<(), Violation> {
        let Frame {
            header,
            body,
            files,
        } = frame;
        let Some(session) = self.session() else {
            return Ok(());
        };
        let code = Code::from(header.code).ok_or(Violation("unknown answer"))?;
        match header.kind {
            Kind::Ping => {}
            Kind::Region if code == Code::Ok => {
                let answer = RegionAnswer::decode(body).ok_or(Violation("malformed REGION"))?;
                let file = if answer.file {
                    Some(
                        files
                            .pop_front()
                            .ok_or(Violation("REGION without its file"))?,
                    )
                } else {
                    None
                };
                self.answer(header.part, Answer::Region(answer, file));
            }
            // Nobody waits for it any more, or nobody has asked: a WINDOW_CLOSE is answered all the
            // same.
            Kind::Window if !self.is_asked(header.part) => {}
            Kind::Window if code == Code::Ok => {
                let spec = decode_grant(body).ok_or(Violation("malformed WINDOW"))?;
                let id = WindowId(header.id);
                let client = self.me.clone();
                // Installed here, before a WINDOW_CLOSE behind it can be read.
                let grant = session.install_grant(
                    id,
                    spec,
                    Box::new(move || {
                        if let Some(client) = client.upgrade() {
                            client.window_quiet(id);
                        }
                    }),
                );
                self.answer(header.part, Answer::Granted(grant));
            }
            Kind::Region | Kind::Window => self.answer(header.part, Answer::Refused(code)),
            Kind::WindowClose => {
                if !session.revoke(WindowId(header.id)) {
                    self.window_quiet(WindowId(header.id));
                }
            }
            Kind::RegionGone => session.forget_region(RegionId(header.id)),
            Kind::Notified => {
                if self.notifying.load(Ordering::Acquire) == 0 {
                    return Err(Violation("an answer that nobody asked for"));
                }
                self.notifying.fetch_sub(1, Ordering::AcqRel);
                self.notified(header.id, code);
            }
            Kind::Hello
            | Kind::Welcome
            | Kind::Refuse
            | Kind::AskMetadata
            | Kind::Metadata
            | Kind::AskRegion
            | Kind::AskWindow
            | Kind::WindowQuiet
            | Kind::Notify
            | Kind::Rang
            | Kind::RegionQuiet
            | Kind::Bye
            | Kind::OfferQueuePair
            | Kind::QueuePair
            | Kind::Ring
            | Kind::Bell
            | Kind::StripeDone
            | Kind::Write
            | Kind::WriteAbort
            | Kind::Read
            | Kind::ReadCancel
            | Kind::Data
            | Kind::ReadDone => return Err(Violation("a frame that targets do not send")),
        }
        Ok(())
    }

    /// Memory of the peer that is not an arena: the kernel copies there if it lets us.
    fn foreign(&self, id: RegionId, base: u64) -> RemoteMemory {
        let quiet = || self.control.header(Header::new(Kind::RegionQuiet, id.0, 0));
        let refused = |why: String| {
            // We will not touch it; the peer need not keep it for us.
            quiet();
            tracing::warn!(region = %id, %why, "memory of a peer on this host goes over the socket");
            RemoteMemory::Streamed(why.into())
        };
        let Some(process) = self.process.lock().clone() else {
            return refused(
                "the region is not an arena and the peer's process is not visible".into(),
            );
        };
        if let Err(error) = process.probe(base) {
            return refused(format!(
                "the region is not an arena and the kernel does not copy there: {error}"
            ));
        }
        let client = self.me.clone();
        RemoteMemory::Foreign(ForeignMemory {
            process,
            base,
            usage: Usage::new(Box::new(move || {
                if let Some(client) = client.upgrade() {
                    client
                        .control
                        .header(Header::new(Kind::RegionQuiet, id.0, 0));
                }
            })),
        })
    }

    /// Memory that the peer has registered for RDMA.
    fn rdma_memory(&self, id: RegionId, address: u64, key: u32) -> RemoteMemory {
        let client = self.me.clone();
        let quiet = move || {
            let shut = |link: &Arc<Link>| link.is_shut();
            if let Some(client) = client.upgrade()
                && !client.rdma.as_ref().is_some_and(shut)
            {
                client
                    .control
                    .header(Header::new(Kind::RegionQuiet, id.0, 0));
            }
        };
        RemoteMemory::Rdma(RdmaMemory {
            address,
            key,
            usage: Usage::new(Box::new(quiet)),
        })
    }

    /// Takes what the RDMA device has completed.
    pub(super) fn rdma_ready(&self) {
        if let Some(link) = &self.rdma
            && let Err(cause) = link.progress()
        {
            self.lost(cause);
        }
    }

    /// Memory of a device: mapped for ours, if the peer shares it and we see that device.
    fn device_memory(
        &self,
        id: RegionId,
        answer: &RegionAnswer,
        file: Option<&OwnedFd>,
    ) -> RemoteMemory {
        let client = self.me.clone();
        let quiet = move || {
            if let Some(client) = client.upgrade() {
                client
                    .control
                    .header(Header::new(Kind::RegionQuiet, id.0, 0));
            }
        };
        let handle = answer.device.and_then(|device| device.handle);
        match map_device(answer, file) {
            Ok((owner, pull, imported)) => RemoteMemory::Device(DeviceOfPeer {
                owner,
                pull,
                memory: PeerDeviceMemory::Imported(imported),
                usage: handle.map(|_| Usage::new(Box::new(quiet))),
            }),
            Err(why) => {
                if handle.is_some() {
                    quiet();
                }
                RemoteMemory::Unreachable(why.into())
            }
        }
    }

    fn window_quiet(&self, window: WindowId) {
        // What was on its way may still land. The peer shuts us out before it counts us as quiet.
        if self.rdma.as_ref().is_some_and(|link| link.is_shut()) {
            return;
        }
        self.control
            .header(Header::new(Kind::WindowQuiet, window.0, 0));
    }
}

/// Maps device memory of the peer, or says why it cannot be.
fn map_device(
    answer: &RegionAnswer,
    file: Option<&OwnedFd>,
) -> Result<(&'static CudaDevice, bool, Imported), String> {
    let Some(device) = answer.device else {
        return Err("it is not device memory".to_owned());
    };
    let owner = || {
        let owner = device_with(&device.uuid).map_err(|error| error.to_string())?;
        owner.ok_or_else(|| {
            let uuid = device.uuid.map(|byte| format!("{byte:02x}")).concat();
            format!("it lies on GPU {uuid}, which this process does not see (CUDA_VISIBLE_DEVICES)")
        })
    };
    let (owner, imported) = match (file, device.handle) {
        (Some(file), _) => {
            let owner = owner()?;
            let mapped = Imported::mapped(owner, file, answer.len);
            (owner, mapped.map_err(|error| error.to_string())?)
        }
        (None, Some(share)) => (owner()?, Imported::handle(share)),
        (None, None) => {
            return Err(
                "it is device memory, which the peer does not share over this lane; host memory \
                 of the peer is reached through staging memory"
                    .to_owned(),
            );
        }
    };
    Ok((owner, device.pull, imported))
}

/// Stops a transfer that the target has answered with an error.
fn fail(transfer: &Arc<TransferState>, code: Code) {
    let window = transfer
        .work
        .as_ref()
        .and_then(|work| work.grant.as_ref())
        .map(|g| g.id);
    if let Err(error) = code.outcome(window) {
        transfer.stop(error);
    }
}

impl Backend for WireClient {
    fn attach(&self, session: &Arc<Session>) {
        let (Some(me), Some(waiting)) = (self.me.upgrade(), self.waiting.lock().take()) else {
            return;
        };
        // Set once: the sockets are taken once.
        let _ = self.session.set(Arc::downgrade(session));
        let Waiting {
            control,
            data,
            process,
            chunk_bytes,
        } = waiting;
        for (socket, &at) in data.into_iter().zip(&self.data_at) {
            let stream =
                DataStream::new(Arc::new(socket), Role::Initiator(me.clone()), chunk_bytes);
            self.reactors.add(at, Box::new(stream));
        }
        if let Some(process) = process {
            let client = self.me.clone();
            let watch = ProcessWatch::new(process, move || {
                if let Some(client) = client.upgrade() {
                    client.lost(LossCause::ProcessExited);
                }
            });
            self.reactors.add(self.process_at, Box::new(watch));
        }
        if let Some(link) = &self.rdma {
            let events = Completions::new(link.clone(), self.me.clone());
            self.reactors.add(self.rdma_at, Box::new(events));
        }
        let rx = ControlRx::new(control);
        self.reactors
            .add(self.control_at, Box::new(ClientControl { rx, client: me }));
        self.tick();
    }

    fn region(&self, id: RegionId, until: Instant) -> Result<RemoteRegion, Refusal> {
        let (answer, file) = match self.ask(Kind::AskRegion, id.0, until)? {
            Answer::Region(answer, file) => (answer, file),
            Answer::Refused(Code::AccessDenied) => return Err(Refusal::Denied),
            Answer::Refused(_) | Answer::Granted(_) => return Err(Refusal::Unknown),
        };
        if answer.access == RemoteAccess::None {
            return Err(Refusal::Denied);
        }
        let memory = match file {
            _ if answer.rdma.is_some() && self.rdma.is_some() => {
                self.rdma_memory(id, answer.address, answer.rdma.unwrap_or_default())
            }
            _ if answer.device.is_some() => self.device_memory(id, &answer, file.as_ref()),
            None if answer.address != 0 => self.foreign(id, answer.address),
            None if self.rdma.is_some() => RemoteMemory::Unreachable(self.unmapped.into()),
            None => RemoteMemory::Streamed(self.unmapped.into()),
            Some(file) => match map_arena(&file, answer.len) {
                Ok(mapping) => RemoteMemory::Mapped(MappedMemory::Shared(mapping)),
                Err(error) => {
                    tracing::warn!(region = %id, %error, "cannot map the peer's arena");
                    RemoteMemory::Streamed("its arena cannot be mapped here".into())
                }
            },
        };
        Ok(RemoteRegion::new(id, answer.len, answer.access, memory))
    }

    fn window(
        &self,
        _session: &Arc<Session>,
        id: WindowId,
        until: Instant,
    ) -> Result<Arc<Grant>, Refusal> {
        match self.ask(Kind::AskWindow, id.0, until)? {
            Answer::Granted(grant) => Ok(grant),
            Answer::Refused(_) | Answer::Region(..) => Err(Refusal::Unknown),
        }
    }

    fn start(&self, transfer: &Arc<TransferState>) {
        let Some(work) = &transfer.work else { return };
        if let (Path::Rdma { .. }, Some(link)) = (&work.path, &self.rdma) {
            if let Err(cause) = link.start(transfer) {
                self.lost(cause);
            }
            return;
        }
        let Path::Stream { stripes } = &work.path else {
            transfer.start_here();
            return;
        };
        self.may_ride(transfer, work, stripes);
        while let Some(part) = transfer.claim_part() {
            let stream = stripes.get(part as usize).map_or(0, |stripe| stripe.stream);
            if self.open_part((transfer.id, part), transfer) {
                let command = DataCommand::Start {
                    transfer: transfer.clone(),
                    part,
                };
                self.reactors.data(self.data_at[stream], command);
            } else {
                transfer.part_done();
            }
        }
    }

    fn stop(&self, transfer: &Arc<TransferState>) {
        if let Some(work) = &transfer.work
            && let Path::Stream { .. } = work.path
        {
            for &at in &self.data_at {
                self.reactors
                    .data(at, DataCommand::Stop { id: transfer.id });
            }
        } else {
            // What a device has been given of it completes by itself.
            transfer.stop_here();
        }
    }

    fn notify(&self, transfer: &Arc<TransferState>) -> Option<Result<(), TransferError>> {
        let payload = transfer.notification.as_ref()?;
        if let Some(channel) = &self.notifications {
            let rejected = |rejection| Err(TransferError::Rejected(rejection));
            return Some(match channel.send(payload) {
                Ok(Sent::Queued) => Ok(()),
                Ok(Sent::QueuedForTask) => {
                    self.control.header(Header::new(Kind::Rang, 0, 0));
                    Ok(())
                }
                Err(SendError::Full) => rejected(Rejection::NotificationQueueFull),
                Err(SendError::TooLarge) => rejected(Rejection::NotificationTooLarge),
            });
        }
        self.notifying.fetch_add(1, Ordering::AcqRel);
        let frame = Header::new(Kind::Notify, transfer.id, 0).with_body(payload);
        self.control.send(frame, None);
        None
    }

    fn help(&self, transfer: &Arc<TransferState>, until: Instant) {
        let stripes = match transfer.work.as_ref().map(|work| &work.path) {
            Some(Path::Rdma { .. }) => return self.reactors.help(self.rdma_at, until, &**transfer),
            Some(Path::Stream { stripes }) => &stripes[..],
            // Only the answer to the notification is missing.
            None => &[],
            Some(_) => return,
        };
        let at = stripes.first().map(|stripe| self.data_at[stripe.stream]);
        let at = at.unwrap_or(self.control_at);
        self.reactors.help(at, until, &**transfer);
    }

    fn wake_helpers(&self) {
        for &at in self.data_at.iter().chain([&self.control_at, &self.rdma_at]) {
            self.reactors.wake(at);
        }
    }

    fn abandon(&self) {
        // The session knows by now why the peer is lost: whoever waits for an answer can say so.
        self.questions.lock().lost = true;
        self.answered.notify_all();
        for &at in &self.data_at {
            self.reactors.remove(at);
        }
        self.reactors.remove(self.process_at);
        if let Some(link) = &self.rdma {
            link.shut();
            self.reactors.remove(self.rdma_at);
        }
    }

    fn close(&self) {
        // Nothing of ours moves any more, and the peer may know.
        self.control.header(Header::new(Kind::Bye, 0, 0));
        self.control.close();
        self.reactors.remove(self.control_at);
        let process = self.process.lock().take();
        drop(process);
    }
}

/// Control frames of the target.
struct ClientControl {
    rx: ControlRx,
    client: Arc<WireClient>,
}

impl Source for ClientControl {
    fn fd(&self) -> BorrowedFd<'_> {
        self.rx.socket().as_fd()
    }

    fn ready(&mut self, event: Event) -> Flow {
        if event.writable {
            self.client.control.flush();
        }
        let client = &self.client;
        let result = self.rx.read(|frame| {
            client.heard();
            client.frame(frame)
        });
        match result {
            Ok(false) => Flow::Keep,
            Ok(true) => Flow::Again,
            Err(cause) => {
                client.lost(cause);
                Flow::Drop
            }
        }
    }
}

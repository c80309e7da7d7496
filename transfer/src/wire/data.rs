//! A data connection: payload straight from and into registered memory.
//!
//! Both ends run this state machine. Payload comes in DATA frames; a frame belongs to a stripe that
//! a WRITE or READ announced. Nothing is copied: the pieces of a chunk are computed from block ids
//! and handed to the kernel.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::client::WireClient;
use super::frame::{BODY_BYTES_MAX, Code, HEADER_BYTES, Header, Kind, StripeSpec};
use super::incoming::{Admitted, Incoming};
use super::reactor::{Flow, Source};
use super::socket::{Pieces, Socket};
use crate::error::LossCause;
use crate::memory::Region;
use crate::op::{Path, TransferState};
use crate::plan::{BlockSet, Order, Segments};

/// Bytes moved in one direction before other connections get their turn.
const BYTES_PER_TURN: usize = 8 << 20;
/// Frames handled before other connections get their turn.
const FRAMES_PER_TURN: usize = 1024;
const SCRATCH_BYTES: usize = 64 << 10;
/// Stand-in for bytes that may not be read any more.
static ZEROS: [u8; SCRATCH_BYTES] = [0; SCRATCH_BYTES];

/// A stripe: operation and part.
pub(crate) type Key = (u64, u32);

/// What other threads ask of a data connection of the initiator.
pub(crate) enum DataCommand {
    /// Moves a claimed part.
    Start {
        transfer: Arc<TransferState>,
        part: u32,
    },
    /// Gives parts of a called-off operation back.
    Stop { id: u64 },
}

/// Whose end of the connection this is.
pub(crate) enum Role {
    Initiator(Arc<WireClient>),
    Target(Arc<Incoming>),
}

pub(crate) struct DataStream {
    socket: Arc<Socket>,
    role: Role,
    chunk_bytes: u32,
    rx: Rx,
    tx: Tx,
    readable: bool,
    writable: bool,
    pieces: Pieces,
}

struct Rx {
    header: [u8; HEADER_BYTES],
    header_got: usize,
    state: RxState,
    /// Target: the stripe that DATA frames fill.
    placing: Option<Placing>,
    /// Initiator: where DATA frames go.
    sinks: HashMap<Key, Sink>,
    scratch: Vec<u8>,
}

enum RxState {
    Header,
    Body { header: Header, body: Vec<u8> },
    Payload { key: Key, left: u32, discard: bool },
}

struct Placing {
    key: Key,
    /// None when it was refused or stopped: the rest is thrown away, the initiator knows.
    stripe: Option<Admitted>,
}

struct Sink {
    transfer: Arc<TransferState>,
    set: usize,
    range: Range<u64>,
}

struct Tx {
    queue: VecDeque<Out>,
}

enum Out {
    Frame { bytes: Vec<u8>, sent: usize },
    Stripe(OutStripe),
}

struct OutStripe {
    key: Key,
    origin: Origin,
    /// The announcing frame, and how much of it is sent.
    prologue: Vec<u8>,
    prologue_sent: usize,
    range: Range<u64>,
    chunk: Option<Chunk>,
}

struct Chunk {
    header: [u8; HEADER_BYTES],
    header_sent: usize,
    end: u64,
    /// The bytes may not be read any more; zeros fill the frame and a failure follows.
    blank: bool,
}

/// Where outgoing payload comes from.
enum Origin {
    /// A WRITE of this agent.
    Own {
        transfer: Arc<TransferState>,
        set: usize,
    },
    /// A READ of the peer.
    Served(Admitted),
}

/// How a turn ended.
enum Turn {
    WouldBlock,
    Over,
}

impl DataStream {
    pub(crate) fn new(socket: Arc<Socket>, role: Role, chunk_bytes: u32) -> Self {
        Self {
            socket,
            role,
            chunk_bytes,
            rx: Rx {
                header: [0; HEADER_BYTES],
                header_got: 0,
                state: RxState::Header,
                placing: None,
                sinks: HashMap::new(),
                scratch: Vec::new(),
            },
            tx: Tx {
                queue: VecDeque::new(),
            },
            readable: true,
            writable: true,
            pieces: Pieces::new(),
        }
    }

    fn turn(&mut self) -> Flow {
        let mut again = false;
        if self.readable {
            match self.receive() {
                Ok(Turn::WouldBlock) => self.readable = false,
                Ok(Turn::Over) => again = true,
                Err(cause) => return self.lose(cause),
            }
        }
        if self.writable {
            match self.transmit() {
                Ok(Turn::WouldBlock) => {}
                Ok(Turn::Over) => again = true,
                Err(cause) => return self.lose(cause),
            }
        }
        if again { Flow::Again } else { Flow::Keep }
    }

    fn lose(&self, cause: LossCause) -> Flow {
        match &self.role {
            Role::Initiator(client) => client.lost(cause),
            Role::Target(incoming) => incoming.lost(&cause),
        }
        Flow::Drop
    }

    // ---- receiving ----

    fn receive(&mut self) -> Result<Turn, LossCause> {
        let (mut bytes, mut frames) = (0, 0);
        while bytes < BYTES_PER_TURN && frames < FRAMES_PER_TURN {
            let received = match &self.rx.state {
                RxState::Header if self.rx.header_got == HEADER_BYTES => {
                    self.rx.header_got = 0;
                    frames += 1;
                    let header = Header::decode(&self.rx.header).ok_or_else(|| {
                        LossCause::Protocol("unknown frame on a data connection".to_owned())
                    })?;
                    self.begin_frame(header)?;
                    continue;
                }
                RxState::Header => self.receive_header(),
                RxState::Body { header, body } if body.len() == header.len as usize => {
                    let RxState::Body { header, body } =
                        std::mem::replace(&mut self.rx.state, RxState::Header)
                    else {
                        continue;
                    };
                    self.frame_with_body(header, &body)?;
                    continue;
                }
                RxState::Body { .. } => self.receive_body(),
                RxState::Payload { left: 0, .. } => {
                    self.end_payload();
                    continue;
                }
                RxState::Payload { key, left, discard } => {
                    let (key, left, discard) = (*key, *left, *discard);
                    self.receive_payload(key, left, discard)
                }
            };
            match received {
                Ok(0) => return Err(LossCause::Closed),
                Ok(count) => bytes += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.heard(bytes);
                    return Ok(Turn::WouldBlock);
                }
                Err(error) => return Err(LossCause::Broken(error.to_string())),
            }
        }
        self.heard(bytes);
        Ok(Turn::Over)
    }

    fn heard(&self, bytes: usize) {
        if bytes > 0 {
            match &self.role {
                Role::Initiator(client) => client.heard(),
                Role::Target(incoming) => incoming.heard(),
            }
        }
    }

    fn receive_header(&mut self) -> io::Result<usize> {
        self.pieces.clear();
        push_rest(&mut self.pieces, &mut self.rx.header, self.rx.header_got);
        // SAFETY: the piece lies in `self.rx.header`, exclusively borrowed.
        let received = unsafe { self.socket.recv(&mut self.pieces) }?;
        self.rx.header_got += received;
        Ok(received)
    }

    fn receive_body(&mut self) -> io::Result<usize> {
        let RxState::Body { header, body } = &mut self.rx.state else {
            return Ok(0);
        };
        // The buffer grows as bytes arrive, whatever the header promises.
        let got = body.len();
        let more = (header.len as usize - got).min(SCRATCH_BYTES);
        body.resize(got + more, 0);
        self.pieces.clear();
        push_rest(&mut self.pieces, body, got);
        // SAFETY: the piece lies in `body`, exclusively borrowed.
        let received = unsafe { self.socket.recv(&mut self.pieces) };
        body.truncate(got + *received.as_ref().unwrap_or(&0));
        received
    }

    fn receive_payload(&mut self, key: Key, left: u32, discard: bool) -> io::Result<usize> {
        self.pieces.clear();
        let received = if discard {
            self.receive_scratch(left)
        } else {
            match &self.role {
                Role::Target(_) => self.receive_placed(left),
                Role::Initiator(_) => self.receive_sink(key, left),
            }
        }?;
        // What is beyond the payload is the next header.
        let payload = received.min(left as usize);
        if let RxState::Payload { left, .. } = &mut self.rx.state {
            *left -= u32::try_from(payload).unwrap_or(*left);
            if *left == 0 {
                self.rx.header_got = received - payload;
            }
        }
        Ok(received)
    }

    fn receive_scratch(&mut self, left: u32) -> io::Result<usize> {
        self.rx.scratch.resize(SCRATCH_BYTES, 0);
        let count = self.rx.scratch.len().min(left as usize);
        self.pieces.push(self.rx.scratch.as_mut_ptr(), count);
        // SAFETY: the piece lies in the scratch buffer, exclusively borrowed.
        unsafe { self.socket.recv(&mut self.pieces) }
    }

    /// Target: bytes of a WRITE into their blocks.
    fn receive_placed(&mut self, left: u32) -> io::Result<usize> {
        let Role::Target(incoming) = &self.role else {
            return Ok(0);
        };
        let Some(placing) = &mut self.rx.placing else {
            return Ok(0);
        };
        let Some(stripe) = &mut placing.stripe else {
            return Ok(0);
        };
        let open = stripe.window.as_ref().map(|window| window.enter());
        let refused = match &open {
            Some(None) => Some(Code::WindowClosed),
            _ if stripe.region.released() => Some(Code::UnknownRegion),
            _ => None,
        };
        if let Some(code) = refused {
            incoming.stripe_done(placing.key, code);
            drop(open);
            placing.stripe = None;
            if let RxState::Payload { discard, .. } = &mut self.rx.state {
                *discard = true;
            }
            return self.receive_scratch(left);
        }
        let end = stripe.range.start + u64::from(left);
        let range = stripe.range.start..end;
        fill(
            &mut self.pieces,
            &stripe.region,
            &stripe.set,
            stripe.order,
            range,
        );
        if self.pieces.bytes() == left as usize && !self.pieces.full() {
            push_rest(&mut self.pieces, &mut self.rx.header, 0);
        }
        // SAFETY: the pieces come from a set that was validated against a region that `stripe`
        // keeps alive, or lie in `self.rx.header`; region memory has no references.
        let received = unsafe { self.socket.recv(&mut self.pieces) }?;
        stripe.range.start += (received as u64).min(u64::from(left));
        Ok(received)
    }

    /// Initiator: bytes of a READ into local blocks.
    fn receive_sink(&mut self, key: Key, left: u32) -> io::Result<usize> {
        let Role::Initiator(client) = &self.role else {
            return Ok(0);
        };
        let Some(sink) = self.rx.sinks.get_mut(&key) else {
            return Ok(0);
        };
        if sink.transfer.called_off() {
            self.rx.sinks.remove(&key);
            client.give_back(key);
            if let RxState::Payload { discard, .. } = &mut self.rx.state {
                *discard = true;
            }
            return self.receive_scratch(left);
        }
        let Some(set) = sink
            .transfer
            .work
            .as_ref()
            .and_then(|work| work.sets.get(sink.set))
        else {
            return Ok(0);
        };
        let range = sink.range.start..sink.range.start + u64::from(left);
        fill(
            &mut self.pieces,
            &set.local_region,
            &set.local,
            set.order,
            range,
        );
        if self.pieces.bytes() == left as usize && !self.pieces.full() {
            push_rest(&mut self.pieces, &mut self.rx.header, 0);
        }
        // SAFETY: the pieces come from a set that was validated against a region that the transfer
        // keeps alive, or lie in `self.rx.header`; region memory has no references.
        let received = unsafe { self.socket.recv(&mut self.pieces) }?;
        sink.range.start += (received as u64).min(u64::from(left));
        Ok(received)
    }

    fn begin_frame(&mut self, header: Header) -> Result<(), LossCause> {
        let protocol = |what: &str| Err(LossCause::Protocol(what.to_owned()));
        let key = (header.id, header.part);
        match (header.kind, &self.role) {
            (Kind::Write | Kind::Read, Role::Target(_)) => {
                if header.len as usize > BODY_BYTES_MAX {
                    return protocol("stripe description too long");
                }
                self.rx.state = RxState::Body {
                    header,
                    body: Vec::new(),
                };
                return Ok(());
            }
            (Kind::Data, Role::Target(_)) => {
                let Some(placing) = self
                    .rx
                    .placing
                    .as_ref()
                    .filter(|placing| placing.key == key)
                else {
                    return protocol("DATA without WRITE");
                };
                let left = placing
                    .stripe
                    .as_ref()
                    .map(|stripe| stripe.range.end - stripe.range.start);
                if left.is_some_and(|left| u64::from(header.len) > left) {
                    return protocol("DATA beyond its stripe");
                }
                let discard = left.is_none();
                self.rx.state = RxState::Payload {
                    key,
                    left: header.len,
                    discard,
                };
                return Ok(());
            }
            (Kind::Data, Role::Initiator(_)) => {
                let sink = self.rx.sinks.get(&key);
                if sink.is_some_and(|s| u64::from(header.len) > s.range.end - s.range.start) {
                    return protocol("DATA beyond its stripe");
                }
                // Bytes of a READ that was called off are thrown away.
                let discard = sink.is_none();
                self.rx.state = RxState::Payload {
                    key,
                    left: header.len,
                    discard,
                };
                return Ok(());
            }
            (Kind::WriteAbort, Role::Target(incoming)) if header.len == 0 => {
                if let Some(placing) = self.rx.placing.take_if(|placing| placing.key == key)
                    && placing.stripe.is_some()
                {
                    incoming.stripe_done(key, Code::Aborted);
                }
            }
            (Kind::ReadCancel, Role::Target(_)) if header.len == 0 => self.drop_served(key),
            (Kind::ReadDone, Role::Initiator(client)) if header.len == 0 => {
                if let Some(sink) = self.rx.sinks.remove(&key) {
                    let code = Code::from(header.code).unwrap_or(Code::Unsupported);
                    if code == Code::Ok && !sink.range.is_empty() {
                        return protocol("READ done before its last byte");
                    }
                    client.read_done(&sink.transfer, key, code);
                }
            }
            _ => return protocol("a frame that does not belong here"),
        }
        Ok(())
    }

    /// Target: WRITE and READ with their stripe.
    fn frame_with_body(&mut self, header: Header, body: &[u8]) -> Result<(), LossCause> {
        let Role::Target(incoming) = &self.role else {
            return Ok(());
        };
        let key = (header.id, header.part);
        let spec = StripeSpec::decode(body)
            .ok_or_else(|| LossCause::Protocol("malformed stripe description".to_owned()))?;
        let write = header.kind == Kind::Write;
        match incoming.admit(spec, write) {
            Ok(stripe) if write => {
                self.rx.placing = Some(Placing {
                    key,
                    stripe: Some(stripe),
                });
                self.complete_placed();
            }
            Ok(stripe) => {
                if self.tx.queue.len() >= incoming.reads_max() {
                    self.push_read_done(key, Code::Busy);
                } else {
                    let range = stripe.range.clone();
                    self.tx.queue.push_back(Out::Stripe(OutStripe {
                        key,
                        origin: Origin::Served(stripe),
                        prologue: Vec::new(),
                        prologue_sent: 0,
                        range,
                        chunk: None,
                    }));
                }
            }
            Err(code) if write => {
                incoming.stripe_done(key, code);
                // The payload is on its way: it is thrown away.
                self.rx.placing = Some(Placing { key, stripe: None });
            }
            Err(code) => self.push_read_done(key, code),
        }
        Ok(())
    }

    fn end_payload(&mut self) {
        self.rx.state = RxState::Header;
        // A READ is complete when the target says so, after the last byte.
        self.complete_placed();
    }

    /// Target: answers a stripe when all its bytes are in place.
    fn complete_placed(&mut self) {
        let Role::Target(incoming) = &self.role else {
            return;
        };
        let whole = |placing: &mut Placing| {
            placing
                .stripe
                .as_ref()
                .is_some_and(|stripe| stripe.range.is_empty())
        };
        if let Some(placing) = self.rx.placing.take_if(whole) {
            incoming.stripe_done(placing.key, Code::Ok);
        }
    }

    // ---- transmitting ----

    fn transmit(&mut self) -> Result<Turn, LossCause> {
        let mut bytes = 0;
        while bytes < BYTES_PER_TURN {
            self.pieces.clear();
            let (chunk_bytes, pieces) = (self.chunk_bytes, &mut self.pieces);
            let Some(front) = self.tx.queue.front_mut() else {
                return Ok(Turn::WouldBlock);
            };
            let mut guard = None;
            let sent = match front {
                Out::Frame { bytes, sent } => {
                    push_rest(pieces, bytes, *sent);
                    // SAFETY: the piece lies in `bytes`, exclusively borrowed.
                    unsafe { self.socket.send(pieces) }
                }
                Out::Stripe(stripe) => match stripe.next_pieces(pieces, chunk_bytes, &mut guard) {
                    // SAFETY: the pieces lie in buffers of `stripe` or in regions that it keeps
                    // alive; a window guard is held for memory that is served to the peer.
                    Next::Send => unsafe { self.socket.send(pieces) },
                    Next::Finished => {
                        drop(guard);
                        self.stripe_out();
                        continue;
                    }
                },
            };
            drop(guard);
            match sent {
                Ok(count) => {
                    bytes += count;
                    let over = match front {
                        Out::Frame { bytes, sent } => {
                            *sent += count;
                            *sent == bytes.len()
                        }
                        Out::Stripe(stripe) => {
                            stripe.advance(count as u64);
                            false
                        }
                    };
                    if over {
                        self.tx.queue.pop_front();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.writable = false;
                    return Ok(Turn::WouldBlock);
                }
                Err(error) => return Err(LossCause::Broken(error.to_string())),
            }
        }
        Ok(Turn::Over)
    }

    /// The front stripe needs no more payload: it is complete or called off.
    fn stripe_out(&mut self) {
        let Some(Out::Stripe(stripe)) = self.tx.queue.pop_front() else {
            return;
        };
        let (id, part) = stripe.key;
        match (&stripe.origin, &self.role) {
            (Origin::Own { .. }, Role::Initiator(client)) => {
                if stripe.range.is_empty() {
                    client.sent(stripe.key);
                } else if stripe.prologue_sent == 0 {
                    client.give_back(stripe.key);
                } else {
                    client.sent(stripe.key);
                    let abort = Header::new(Kind::WriteAbort, id, part).encode();
                    self.tx.queue.push_front(Out::Frame {
                        bytes: abort.to_vec(),
                        sent: 0,
                    });
                }
            }
            (Origin::Served(_), _) => {
                let done = Header::new(Kind::ReadDone, id, part)
                    .code(stripe.served())
                    .encode();
                self.tx.queue.push_front(Out::Frame {
                    bytes: done.to_vec(),
                    sent: 0,
                });
            }
            (Origin::Own { .. }, Role::Target(_)) => {}
        }
    }

    fn push_read_done(&mut self, (id, part): Key, code: Code) {
        let bytes = Header::new(Kind::ReadDone, id, part)
            .code(code)
            .encode()
            .to_vec();
        self.tx.queue.push_back(Out::Frame { bytes, sent: 0 });
    }

    /// Target: the initiator does not want the rest of a READ.
    fn drop_served(&mut self, key: Key) {
        for out in &mut self.tx.queue {
            if let Out::Stripe(stripe) = out
                && stripe.key == key
            {
                // A chunk under way is finished, nothing follows it.
                let end = stripe
                    .chunk
                    .as_ref()
                    .map_or(stripe.range.start, |chunk| chunk.end);
                stripe.range.end = end;
            }
        }
    }

    fn start(&mut self, transfer: Arc<TransferState>, part: u32) {
        let Role::Initiator(client) = &self.role else {
            return;
        };
        let key = (transfer.id, part);
        let Some(work) = transfer.work.clone() else {
            return;
        };
        let Path::Stream { stripes } = &work.path else {
            return;
        };
        let Some(stripe) = stripes.get(part as usize) else {
            return;
        };
        if transfer.called_off() {
            client.give_back(key);
            return;
        }
        let set = &work.sets[stripe.set];
        let window = work.grant.as_ref().map(|grant| grant.id);
        let body = StripeSpec::encode(
            set.remote_region.id,
            window,
            set.order,
            &set.remote,
            &stripe.range,
        );
        match work.op {
            crate::op::Op::Write => {
                let prologue = Header::new(Kind::Write, key.0, part).with_body(&body);
                self.tx.queue.push_back(Out::Stripe(OutStripe {
                    key,
                    origin: Origin::Own {
                        transfer,
                        set: stripe.set,
                    },
                    prologue,
                    prologue_sent: 0,
                    range: stripe.range.clone(),
                    chunk: None,
                }));
            }
            crate::op::Op::Read => {
                let sink = Sink {
                    transfer,
                    set: stripe.set,
                    range: stripe.range.clone(),
                };
                self.rx.sinks.insert(key, sink);
                let bytes = Header::new(Kind::Read, key.0, part).with_body(&body);
                self.tx.queue.push_back(Out::Frame { bytes, sent: 0 });
            }
        }
    }

    fn stop(&mut self, id: u64) {
        let Role::Initiator(client) = &self.role else {
            return;
        };
        let keys: Vec<Key> = self
            .rx
            .sinks
            .keys()
            .filter(|key| key.0 == id)
            .copied()
            .collect();
        for key in keys {
            self.rx.sinks.remove(&key);
            if let RxState::Payload {
                key: current,
                discard,
                ..
            } = &mut self.rx.state
                && *current == key
            {
                *discard = true;
            }
            let bytes = Header::new(Kind::ReadCancel, key.0, key.1)
                .encode()
                .to_vec();
            self.tx.queue.push_back(Out::Frame { bytes, sent: 0 });
            client.give_back(key);
        }
        // Stripes that have not begun go now; one that has begun ends at its chunk.
        self.tx.queue.retain(|out| match out {
            Out::Stripe(stripe) if stripe.key.0 == id && stripe.prologue_sent == 0 => {
                client.give_back(stripe.key);
                false
            }
            Out::Stripe(_) | Out::Frame { .. } => true,
        });
    }
}

enum Next {
    Send,
    Finished,
}

type Guard<'a> = Option<parking_lot::RwLockReadGuard<'a, bool>>;

impl OutStripe {
    /// The next pieces to send, or the end of the stripe.
    fn next_pieces<'a>(
        &'a mut self,
        pieces: &mut Pieces,
        chunk_bytes: u32,
        guard: &mut Guard<'a>,
    ) -> Next {
        let at_boundary = self
            .chunk
            .as_ref()
            .is_none_or(|chunk| chunk.end == self.range.start);
        if at_boundary {
            let called_off = match &self.origin {
                Origin::Own { transfer, .. } => transfer.called_off(),
                Origin::Served(stripe) => stripe.refusal().is_some(),
            };
            let prologue_left = self.prologue_sent < self.prologue.len() && self.prologue_sent > 0;
            if self.range.is_empty() && self.prologue_sent == self.prologue.len()
                || called_off && !prologue_left
                || self.chunk.as_ref().is_some_and(|chunk| chunk.blank)
            {
                return Next::Finished;
            }
            if !called_off && !self.range.is_empty() {
                let left = self.range.end - self.range.start;
                let len = u32::try_from(left.min(u64::from(chunk_bytes))).unwrap_or(chunk_bytes);
                let mut header = Header::new(Kind::Data, self.key.0, self.key.1);
                header.len = len;
                self.chunk = Some(Chunk {
                    header: header.encode(),
                    header_sent: 0,
                    end: self.range.start + u64::from(len),
                    blank: false,
                });
            }
        }
        push_rest(pieces, &mut self.prologue, self.prologue_sent);
        let Some(chunk) = &mut self.chunk else {
            return Next::Send;
        };
        push_rest(pieces, &mut chunk.header, chunk.header_sent);
        let range = self.range.start..chunk.end;
        match &self.origin {
            Origin::Own { transfer, set } => {
                if let Some(set) = transfer.work.as_ref().and_then(|work| work.sets.get(*set)) {
                    fill(pieces, &set.local_region, &set.local, set.order, range);
                }
            }
            Origin::Served(stripe) => {
                match stripe.window.as_ref().map(|window| window.enter()) {
                    Some(None) => chunk.blank = true,
                    Some(held) => *guard = held,
                    None => {}
                }
                if chunk.blank {
                    let count = (range.end - range.start).min(SCRATCH_BYTES as u64);
                    let count = usize::try_from(count).unwrap_or(SCRATCH_BYTES);
                    pieces.push(ZEROS.as_ptr().cast_mut(), count);
                } else {
                    fill(pieces, &stripe.region, &stripe.set, stripe.order, range);
                }
            }
        }
        Next::Send
    }

    /// Books `count` sent bytes: prologue, chunk header, payload.
    fn advance(&mut self, count: u64) {
        let mut count = count;
        let mut book = |sent: &mut usize, whole: usize| {
            let taken = count.min((whole - *sent) as u64);
            *sent += usize::try_from(taken).unwrap_or(0);
            count -= taken;
        };
        book(&mut self.prologue_sent, self.prologue.len());
        if let Some(chunk) = &mut self.chunk {
            book(&mut chunk.header_sent, HEADER_BYTES);
            self.range.start += count;
        }
    }

    /// How a READ of the peer ended.
    fn served(&self) -> Code {
        let refusal = match &self.origin {
            Origin::Served(_) if self.chunk.as_ref().is_some_and(|chunk| chunk.blank) => {
                return Code::WindowClosed;
            }
            Origin::Served(stripe) => stripe.refusal(),
            Origin::Own { .. } => None,
        };
        if self.range.is_empty() {
            Code::Ok
        } else {
            refusal.unwrap_or(Code::Aborted)
        }
    }
}

/// Adds the rest of a small buffer.
fn push_rest(pieces: &mut Pieces, buffer: &mut [u8], done: usize) {
    if done < buffer.len() {
        let rest = &mut buffer[done..];
        pieces.push(rest.as_mut_ptr(), rest.len());
    }
}

/// Adds the pieces of a logical range, as many as one system call takes.
fn fill(pieces: &mut Pieces, region: &Region, set: &BlockSet, order: Order, range: Range<u64>) {
    for (offset, bytes) in Segments::new(set, order, range) {
        if pieces.full() {
            break;
        }
        // Offsets lie inside the region, whose length is a usize.
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        // SAFETY: the set was validated against this region: the offset is inside.
        let base = unsafe { region.base().add(offset) };
        pieces.push(base, usize::try_from(bytes).unwrap_or(usize::MAX));
    }
}

impl Source for DataStream {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn ready(&mut self, readable: bool, writable: bool) -> Flow {
        self.readable |= readable;
        self.writable |= writable;
        self.turn()
    }

    fn command(&mut self, command: DataCommand) -> Flow {
        match command {
            DataCommand::Start { transfer, part } => self.start(transfer, part),
            DataCommand::Stop { id } => self.stop(id),
        }
        self.turn()
    }
}

impl Drop for DataStream {
    fn drop(&mut self) {
        self.socket.shutdown();
        if let Role::Initiator(client) = &self.role {
            client.stream_closed();
        }
    }
}

//! A data connection: payload straight from and into registered memory.
//!
//! Both ends run this state machine. Payload comes in DATA frames; a frame belongs to a stripe that
//! a WRITE or READ announced. The pieces of a chunk are computed from block ids and handed to the
//! kernel; only short ones are copied together first, because the kernel is slow with them.

mod receive;
mod transmit;

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::client::WireClient;
use super::frame::{HEADER_BYTES, Header, Kind, StripeSpec};
use super::incoming::{Admitted, Incoming};
use super::reactor::{Event, Flow, Source};
use super::socket::{Pieces, Socket};
use crate::error::LossCause;
use crate::memory::{Region, Stores, copy_row, publish};
use crate::op::{Path, TransferState};
use crate::plan::{BlockSet, Order, Row, Segments};

/// Bytes moved in one direction before other connections get their turn.
const BYTES_PER_TURN: usize = 2 << 20;
/// The same for a command: it may run on the thread that posts, which has better things to do than
/// to send a large operation.
const BYTES_PER_COMMAND: usize = 128 << 10;
/// Room for bytes that are received ahead. What belongs to blocks is copied out of it, so it is
/// small; enough for the headers of a few frames and a block of 4 KiB.
const AHEAD_BYTES: usize = 4608;
/// Bytes of id lists of a peer's READs that may wait before nothing more is received from it.
const ID_BYTES_MAX: usize = 64 << 20;
/// Longest stretch whose pieces are looked for at a time. Many tiny runs can be one piece.
const FILL_BYTES_MAX: u64 = 8 << 20;
/// Frames handled before other connections get their turn.
const FRAMES_PER_TURN: usize = 1024;
/// Answers that may wait for an initiator that does not read them.
const ANSWERS_MAX: usize = 1 << 18;
/// Pieces up to this length are copied into one on their way into and out of the kernel.
const SHORT_BYTES: u64 = 1024;
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
    /// The other side is gone: read until the end shows.
    ended: bool,
    pieces: Pieces,
}

struct Rx {
    ahead: Ahead,
    state: RxState,
    /// Target: the stripe that DATA frames fill.
    placing: Option<Placing>,
    /// Target: the operation whose stripe was the last to arrive whole, and nothing after it.
    whole: Option<u64>,
    /// Initiator: where DATA frames go.
    sinks: HashMap<Key, Sink>,
    /// Initiator: READs that the target has not ended, and those that wait for one of them.
    reads_open: usize,
    reads_waiting: VecDeque<(Arc<TransferState>, u32)>,
    scratch: Vec<u8>,
}

/// Bytes that came along with what was asked for: the next headers, or a small frame.
struct Ahead {
    bytes: Box<[u8; AHEAD_BYTES]>,
    start: usize,
    end: usize,
}

impl Ahead {
    fn new() -> Self {
        Self {
            bytes: Box::new([0; AHEAD_BYTES]),
            start: 0,
            end: 0,
        }
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    fn take(&mut self, count: usize) {
        self.start += count;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Adds the free room behind the waiting bytes to `pieces`.
    fn offer(&mut self, pieces: &mut Pieces) {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let end = self.end;
        push_rest(pieces, &mut self.bytes[..], end);
    }
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
    /// Answers to stripes of the peer, which do not wait for what is queued.
    answers: Vec<Out>,
    /// Answers at the front of the queue.
    answers_first: usize,
    /// Target: READs whose end is not sent.
    reads_open: usize,
    /// Target: bytes of the id lists of queued READs.
    id_bytes: usize,
}

enum Out {
    Frame { bytes: Vec<u8>, sent: usize },
    Stripe(Box<OutStripe>),
}

/// A stripe on its way out: the announcing frame, chunks of payload, a closing frame.
struct OutStripe {
    key: Key,
    origin: Origin,
    prologue: Small,
    range: Range<u64>,
    chunk: Option<Chunk>,
    /// Goes out behind the last byte, and only then.
    epilogue: Small,
}

/// A frame that goes out with payload, and how much of it is sent.
struct Small {
    bytes: Vec<u8>,
    sent: usize,
}

impl Small {
    const fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, sent: 0 }
    }

    fn begun(&self) -> bool {
        self.sent > 0
    }

    fn over(&self) -> bool {
        self.sent == self.bytes.len()
    }

    fn push(&mut self, pieces: &mut Pieces) {
        push_rest(pieces, &mut self.bytes, self.sent);
    }

    /// Books sent bytes; what is left of `count` belongs to what follows.
    fn book(&mut self, count: u64) -> u64 {
        let taken = count.min((self.bytes.len() - self.sent) as u64);
        self.sent += usize::try_from(taken).unwrap_or(0);
        count - taken
    }
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
    /// More has to be sent before anything is received.
    Full,
}

impl DataStream {
    pub(crate) fn new(socket: Arc<Socket>, role: Role, chunk_bytes: u32) -> Self {
        Self {
            socket,
            role,
            chunk_bytes,
            rx: Rx {
                ahead: Ahead::new(),
                state: RxState::Header,
                placing: None,
                whole: None,
                sinks: HashMap::new(),
                reads_open: 0,
                reads_waiting: VecDeque::new(),
                scratch: Vec::new(),
            },
            tx: Tx {
                queue: VecDeque::new(),
                answers: Vec::new(),
                answers_first: 0,
                reads_open: 0,
                id_bytes: 0,
            },
            readable: true,
            writable: true,
            ended: false,
            pieces: Pieces::new(),
        }
    }

    /// Receives and sends until both would block or a share of `bytes` is moved.
    fn turn(&mut self, bytes: usize) -> Flow {
        let mut again = false;
        if self.readable {
            match self.receive(bytes) {
                Ok(Turn::WouldBlock) => self.readable = false,
                Ok(Turn::Over) => again = true,
                // Goes on when the peer has taken some of what waits for it.
                Ok(Turn::Full) => {}
                Err(cause) => return self.lose(cause),
            }
        }
        let full = self.full();
        if self.writable {
            match self.transmit(bytes) {
                Ok(Turn::WouldBlock | Turn::Full) => {}
                Ok(Turn::Over) => again = true,
                Err(cause) => return self.lose(cause),
            }
        }
        again |= full && !self.full();
        if again { Flow::Again } else { Flow::Keep }
    }

    /// Target: such long lists wait to be served that nothing more is received. Few bytes can name
    /// many blocks, and a peer that does not fetch what it asks for gets no further.
    const fn full(&self) -> bool {
        self.tx.id_bytes > ID_BYTES_MAX
    }

    fn lose(&self, cause: LossCause) -> Flow {
        match &self.role {
            Role::Initiator(client) => client.lost(cause),
            Role::Target(incoming) => incoming.lost(&cause),
        }
        Flow::Drop
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
                let rider = transfer.notification.as_ref();
                let rider = rider.filter(|_| transfer.rides()).map(|payload| {
                    let header = Header::new(Kind::Notify, key.0, 0);
                    header.with_body(payload)
                });
                self.tx.queue.push_back(Out::Stripe(Box::new(OutStripe {
                    key,
                    origin: Origin::Own {
                        transfer,
                        set: stripe.set,
                    },
                    prologue: Small::new(prologue),
                    range: stripe.range.clone(),
                    chunk: None,
                    epilogue: Small::new(rider.unwrap_or_default()),
                })));
            }
            crate::op::Op::Read if self.rx.reads_open >= client.reads_max() => {
                self.rx.reads_waiting.push_back((transfer, part));
            }
            crate::op::Op::Read => {
                self.rx.reads_open += 1;
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

    /// The target has ended a READ: the next one may begin. False when none was open.
    fn read_ended(&mut self) -> bool {
        let Role::Initiator(client) = &self.role else {
            return false;
        };
        let (limit, open) = (client.reads_max(), self.rx.reads_open > 0);
        self.rx.reads_open -= usize::from(open);
        // One that was called off meanwhile does not begin, and leaves its place to the next.
        while self.rx.reads_open < limit
            && let Some((transfer, part)) = self.rx.reads_waiting.pop_front()
        {
            self.start(transfer, part);
        }
        open
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
        self.rx.reads_waiting.retain(|(transfer, part)| {
            if transfer.id == id {
                client.give_back((id, *part));
            }
            transfer.id != id
        });
        // Stripes that have not begun go now; one that has begun ends at its chunk.
        self.tx.queue.retain(|out| match out {
            Out::Stripe(stripe) if stripe.key.0 == id && !stripe.prologue.begun() => {
                client.give_back(stripe.key);
                false
            }
            Out::Stripe(_) | Out::Frame { .. } => true,
        });
    }
}

/// Adds the rest of a small buffer.
fn push_rest(pieces: &mut Pieces, buffer: &mut [u8], done: usize) {
    if done < buffer.len() {
        let rest = &mut buffer[done..];
        pieces.push(rest.as_mut_ptr(), rest.len());
    }
}

/// Bytes of blocks: the logical range of a set that lies in a region.
struct Payload<'a> {
    region: &'a Region,
    set: &'a BlockSet,
    order: Order,
    range: Range<u64>,
}

impl Payload<'_> {
    /// Adds its pieces, as many as one system call takes. Short ones are copied if `copy_short`.
    fn fill(self, pieces: &mut Pieces, copy_short: bool) {
        let Range { start, end } = self.range;
        let range = start..end.min(start.saturating_add(FILL_BYTES_MAX));
        for (offset, bytes) in Segments::new(self.set, self.order, range) {
            if pieces.full() {
                break;
            }
            // Offsets lie inside the region, whose length is a usize.
            let offset = usize::try_from(offset).unwrap_or(usize::MAX);
            // SAFETY: the set was validated against this region: the offset is inside.
            let base = unsafe { self.region.base().add(offset) };
            if copy_short && bytes <= SHORT_BYTES {
                // SAFETY: a piece of that region, which its owner keeps alive during the call; the
                // crate forms no references into regions.
                if !unsafe { pieces.push_copy(base, usize::try_from(bytes).unwrap_or(0)) } {
                    break;
                }
            } else {
                pieces.push(base, usize::try_from(bytes).unwrap_or(usize::MAX));
            }
        }
    }

    /// Whether it begins with short pieces.
    fn is_short(&self) -> bool {
        const LOOKED_AT: usize = 4;
        let range = self.range.clone();
        let mut pieces = Segments::new(self.set, self.order, range).take(LOOKED_AT);
        let all = pieces.try_fold(0, |count, (_, bytes)| {
            (bytes <= SHORT_BYTES).then_some(count + 1)
        });
        all == Some(LOOKED_AT)
    }
}

/// Copies bytes that were received elsewhere to the begin of a logical range.
fn place(region: &Region, set: &BlockSet, order: Order, range: Range<u64>, mut bytes: &[u8]) {
    let stores = Stores::for_transfer(set.bytes());
    for (offset, count) in Segments::new(set, order, range) {
        let (now, rest) = bytes.split_at(usize::try_from(count).unwrap_or(0).min(bytes.len()));
        let row = Row {
            from: 0,
            to: offset,
            count: 1,
            from_step: 0,
            to_step: 0,
            bytes: now.len() as u64,
        };
        // SAFETY: the piece lies inside the region, against which the set was validated and which
        // its owner keeps alive during the call; `now` is memory of this connection and nothing
        // references the region's.
        unsafe { copy_row(now.as_ptr(), region.base(), row, stores) };
        bytes = rest;
    }
    publish(stores);
}

impl Source for DataStream {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn ready(&mut self, event: Event) -> Flow {
        self.readable |= event.readable;
        self.writable |= event.writable;
        self.ended |= event.ended;
        self.turn(BYTES_PER_TURN)
    }

    fn command(&mut self, command: DataCommand) -> Flow {
        match command {
            DataCommand::Start { transfer, part } => self.start(transfer, part),
            DataCommand::Stop { id } => self.stop(id),
        }
        self.turn(BYTES_PER_COMMAND)
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

//! A data connection: payload straight from and into registered memory.
//!
//! Both ends run this state machine. Payload comes in DATA frames; a frame belongs to a stripe that
//! a WRITE or READ announced. Nothing is copied: the pieces of a chunk are computed from block ids
//! and handed to the kernel.

mod receive;
mod transmit;

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::client::WireClient;
use super::frame::{HEADER_BYTES, Header, Kind, StripeSpec};
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

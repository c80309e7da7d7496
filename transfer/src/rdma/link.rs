//! The initiator's end of a connection over verbs: posts requests, waits for their completions.
//!
//! Requests of one queue pair complete in the order in which they were posted, so only the last of
//! each batch asks for a completion. A transfer's parts are posted when there is room; a part is
//! done when its last request has completed. Any error ends the connection: the queue pair is
//! destroyed, after which the device touches no memory of it.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blockplane_rdma_sys::verbs;
use blockplane_rdma_sys::verbs::{
    IBV_SEND_SIGNALED, IBV_WC_SUCCESS, IBV_WR_RDMA_READ, IBV_WR_RDMA_WRITE, ibv_send_wr, ibv_sge,
    ibv_wc,
};
use parking_lot::Mutex;

use super::adapter::{Adapter, Key};
use super::queue::QueuePair;
use crate::agent::RemoteMemory;
use crate::error::LossCause;
use crate::op::{Op, TransferState, Work};

/// Requests handed over by one call.
const BATCH: usize = 32;
/// Completions taken by one call.
const POLLED: usize = 32;
/// Bytes that are read back to push earlier writes out.
const FLUSH_BYTES: u64 = 8;

/// One side of a queue pair that transfers run over.
pub(crate) struct Link {
    adapter: Arc<Adapter>,
    state: Mutex<State>,
    shut: AtomicBool,
    events: OwnedFd,
    /// Where the bytes of flushes go. Never read. Before the memory.
    sink: Key,
    sink_memory: Box<AtomicU64>,
}

struct State {
    /// None once the connection is over.
    pair: Option<QueuePair>,
    /// Requests that the queue still takes.
    room: usize,
    /// Transfers with parts to hand out.
    waiting: VecDeque<Arc<TransferState>>,
    /// The part that is being posted.
    posting: Option<Posting>,
    /// Batches on their way, oldest first.
    posted: VecDeque<Batch>,
    next: u64,
}

/// Requests of one part, and how many of them were posted.
struct Posting {
    transfer: Arc<TransferState>,
    requests: Vec<Request>,
    pieces: Vec<ibv_sge>,
    done: usize,
}

/// One RDMA operation: contiguous on the other side, in pieces on this one.
struct Request {
    read: bool,
    remote: u64,
    remote_key: u32,
    first: usize,
    count: usize,
}

/// Requests of which the last one asks for a completion.
struct Batch {
    id: u64,
    requests: usize,
    /// The part that is done with them.
    part: Option<Arc<TransferState>>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("adapter", &self.adapter)
            .finish_non_exhaustive()
    }
}

impl Link {
    pub(crate) fn new(adapter: &Arc<Adapter>, pair: QueuePair) -> io::Result<Self> {
        let events = pair.event_fd()?;
        let sink_memory = Box::new(AtomicU64::new(0));
        let at = sink_memory.as_ptr().cast();
        // SAFETY: the key is dropped before the memory, and nobody looks at it.
        let sink = unsafe { adapter.register(at, size_of::<u64>(), false) }?;
        Ok(Self {
            adapter: adapter.clone(),
            state: Mutex::new(State {
                room: adapter.limits.requests as usize,
                pair: Some(pair),
                waiting: VecDeque::new(),
                posting: None,
                posted: VecDeque::new(),
                next: 0,
            }),
            shut: AtomicBool::new(false),
            events,
            sink,
            sink_memory,
        })
    }

    /// Becomes readable when something has completed.
    pub(crate) fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// The connection is over: what was on its way may still land at the peer, until the peer
    /// closes its side.
    pub(crate) fn is_shut(&self) -> bool {
        self.shut.load(Ordering::Acquire)
    }

    /// Posts as much of a transfer as there is room for.
    pub(crate) fn start(&self, transfer: &Arc<TransferState>) -> Result<(), LossCause> {
        let mut state = self.state.lock();
        if state.pair.is_some() {
            state.waiting.push_back(transfer.clone());
            self.pump(&mut state)?;
        }
        Ok(())
    }

    /// Takes what has completed, and posts what there is room for then.
    pub(crate) fn progress(&self) -> Result<(), LossCause> {
        let mut finished = Vec::new();
        let result = self.collect(&mut finished);
        // Not under the lock: whoever is told may post again.
        for transfer in finished {
            transfer.part_done();
        }
        result
    }

    fn collect(&self, finished: &mut Vec<Arc<TransferState>>) -> Result<(), LossCause> {
        let mut state = self.state.lock();
        let Some(pair) = &state.pair else {
            return Ok(());
        };
        pair.take_events();
        let mut asked = false;
        loop {
            let Some(pair) = &state.pair else {
                return Ok(());
            };
            let mut taken = [ibv_wc::default(); POLLED];
            let got = pair.poll(&mut taken).map_err(|error| self.broken(&error))?;
            if got == 0 {
                if asked {
                    return Ok(());
                }
                // One more look after asking: what came in between makes no event.
                pair.ask_for_event().map_err(|error| self.broken(&error))?;
                asked = true;
                continue;
            }
            for completion in &taken[..got] {
                if completion.status != IBV_WC_SUCCESS {
                    return Err(self.failed(completion));
                }
                let Some(batch) = state.posted.pop_front() else {
                    return Err(self.broken(&"a completion that nobody asked for"));
                };
                if batch.id != completion.wr_id {
                    return Err(self.broken(&"completions out of order"));
                }
                state.room += batch.requests;
                finished.extend(batch.part);
            }
            self.pump(&mut state)?;
        }
    }

    /// Ends the connection; the device touches no memory of it afterwards.
    pub(crate) fn shut(&self) {
        self.shut.store(true, Ordering::Release);
        let mut state = self.state.lock();
        let pair = state.pair.take();
        // Destroyed before any part is given back.
        drop(pair);
        let posted = std::mem::take(&mut state.posted);
        let posting = state.posting.take();
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        let posting = posting.map(|posting| posting.transfer);
        let parts = posted.into_iter().filter_map(|batch| batch.part);
        for transfer in parts.chain(posting) {
            transfer.part_done();
        }
        drop(waiting);
    }

    fn broken(&self, what: &dyn fmt::Display) -> LossCause {
        LossCause::Rdma {
            device: self.adapter.name.clone(),
            reason: what.to_string(),
        }
    }

    fn failed(&self, completion: &ibv_wc) -> LossCause {
        self.broken(&reason(completion.status))
    }

    /// Posts while there is room.
    fn pump(&self, state: &mut State) -> Result<(), LossCause> {
        loop {
            if state.posting.is_none() {
                let Some(transfer) = state.waiting.front() else {
                    return Ok(());
                };
                let part = transfer.claim_part();
                let (Some(part), Some(work)) = (part, &transfer.work) else {
                    state.waiting.pop_front();
                    continue;
                };
                state.posting = Some(self.plan(transfer, work, part));
            }
            let Some(posting) = &mut state.posting else {
                return Ok(());
            };
            let count = (posting.requests.len() - posting.done)
                .min(BATCH)
                .min(state.room);
            let Some(pair) = &state.pair else {
                return Ok(());
            };
            if count == 0 {
                return Ok(());
            }
            let id = state.next;
            // SAFETY: pieces lie in regions that the transfer keeps, and stays with the books until they
            // have completed or the pair is gone.
            unsafe { posting.post(pair, count, id) }.map_err(|error| self.broken(&error))?;
            state.next += 1;
            state.room -= count;
            posting.done += count;
            let whole = posting.done == posting.requests.len();
            let part = if whole { state.posting.take() } else { None };
            state.posted.push_back(Batch {
                id,
                requests: count,
                part: part.map(|posting| posting.transfer),
            });
        }
    }

    /// The requests of a part.
    fn plan(&self, transfer: &Arc<TransferState>, work: &Work, part: u32) -> Posting {
        let mut posting = Posting {
            transfer: transfer.clone(),
            requests: Vec::new(),
            pieces: Vec::new(),
            done: 0,
        };
        let pieces_max = self.adapter.limits.pieces as usize;
        let read = work.op == Op::Read;
        work.for_each_piece(part, |local, remote, l, r, bytes| {
            // Planned for these: both are registered.
            let (Some(key), RemoteMemory::Rdma(memory)) = (local.rdma(), &remote.memory) else {
                return;
            };
            let at = local.address() + l;
            posting.add(
                read,
                pieces_max,
                (at, key.local),
                (memory.address + r, memory.key),
                bytes,
            );
        });
        // A completed WRITE is on the other side's device; a READ behind it comes from memory and
        // pushes it there. Only who is told by other means than the data needs that.
        let flushes = !read && (transfer.notification.is_some() || transfer.is_half());
        if flushes
            && part + 1 == work.parts
            && let Some(last) = posting.requests.last()
        {
            let (remote, key) = (last.remote, last.remote_key);
            let bytes = posting.pieces[last.first..][..last.count]
                .iter()
                .map(|piece| u64::from(piece.length))
                .sum::<u64>()
                .min(FLUSH_BYTES);
            let at = self.sink_memory.as_ptr() as u64;
            posting.add(true, 1, (at, self.sink.local), (remote, key), bytes);
        }
        posting
    }
}

impl Posting {
    /// Adds a piece: to the last request where it goes on there, as a new one else.
    fn add(
        &mut self,
        read: bool,
        pieces_max: usize,
        (at, key): (u64, u32),
        (remote, remote_key): (u64, u32),
        bytes: u64,
    ) {
        // A part is far below 4 GiB, and so are its pieces.
        let length = u32::try_from(bytes).unwrap_or(u32::MAX);
        let piece = ibv_sge {
            addr: at,
            length,
            lkey: key,
        };
        if let Some(last) = self.requests.last_mut()
            && last.read == read
            && last.remote_key == remote_key
        {
            let so_far: u64 = self.pieces[last.first..]
                .iter()
                .map(|piece| u64::from(piece.length))
                .sum();
            if last.remote + so_far == remote && last.count < pieces_max {
                last.count += 1;
                self.pieces.push(piece);
                return;
            }
        }
        self.requests.push(Request {
            read,
            remote,
            remote_key,
            first: self.pieces.len(),
            count: 1,
        });
        self.pieces.push(piece);
    }

    /// Hands the next `count` requests over; the last one asks for a completion.
    ///
    /// # Safety
    /// The pieces stay registered memory until the requests have completed or the pair is gone.
    unsafe fn post(&mut self, pair: &QueuePair, count: usize, id: u64) -> io::Result<()> {
        let mut list = [ibv_send_wr::default(); BATCH];
        let requests = &self.requests[self.done..self.done + count];
        for (entry, request) in list.iter_mut().zip(requests) {
            entry.wr_id = id;
            entry.sg_list = self.pieces[request.first..].as_mut_ptr();
            entry.num_sge = i32::try_from(request.count).unwrap_or(i32::MAX);
            entry.opcode = if request.read {
                IBV_WR_RDMA_READ
            } else {
                IBV_WR_RDMA_WRITE
            };
            entry.wr.rdma = verbs::ibv_send_wr__bindgen_ty_2__bindgen_ty_1 {
                remote_addr: request.remote,
                rkey: request.remote_key,
            };
        }
        let start = list.as_mut_ptr();
        for index in 0..count {
            let last = index + 1 == count;
            let next = if last {
                null_mut()
            } else {
                start.wrapping_add(index + 1)
            };
            let entry = start.wrapping_add(index);
            // SAFETY: an entry of the list, of which no reference is live.
            unsafe { (*entry).next = next };
            if last {
                // SAFETY: as above.
                unsafe { (*entry).send_flags = IBV_SEND_SIGNALED };
            }
        }
        // SAFETY: the list is whole and ends with null; its memory is the caller's promise.
        unsafe { pair.post(start) }
    }
}

/// What a failed completion says.
fn reason(status: u32) -> String {
    let words = match status {
        verbs::IBV_WC_RETRY_EXC_ERR => "transport retry counter exceeded: the peer does not answer",
        verbs::IBV_WC_RNR_RETRY_EXC_ERR => "receiver-not-ready retry counter exceeded",
        verbs::IBV_WC_REM_ACCESS_ERR => "remote access error: the peer refuses the memory",
        verbs::IBV_WC_REM_INV_REQ_ERR => "remote invalid request error",
        verbs::IBV_WC_REM_OP_ERR => "remote operation error",
        verbs::IBV_WC_LOC_PROT_ERR => "local protection error",
        verbs::IBV_WC_LOC_LEN_ERR => "local length error",
        verbs::IBV_WC_LOC_QP_OP_ERR => "local queue pair operation error",
        verbs::IBV_WC_WR_FLUSH_ERR => "the queue pair is in error",
        verbs::IBV_WC_FATAL_ERR => "fatal device error",
        other => return format!("completion status {other}"),
    };
    words.to_owned()
}

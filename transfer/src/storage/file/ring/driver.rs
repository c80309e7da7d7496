//! The ring thread: claims parts, submits them, reaps them.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};

use super::super::plan::{Segment, Via};
use super::super::threads::gather;
use super::super::work::{FileWork, Step};
use super::mailbox::{Command, Mailbox};
use super::tables::{Buffers, Files};
use crate::error::TransferError;
use crate::op::{Op, TransferState, Work};
use crate::storage::StorageConfig;

/// Completions of the eventfd read carry this.
const WAKE: u64 = u64::MAX;

/// Completions of cancel requests carry this.
const CANCEL: u64 = u64::MAX - 1;

/// Tickets below those of `WAKE` and `CANCEL`.
const GENERATIONS: u32 = u32::MAX >> 1;

/// Requests that one transfer gets before the next one has its turn, and their bytes. Transfers
/// that are small beside this end one after the other, so that whoever waits for the first can
/// post the next while the device still has work.
const TURN: u32 = 256;
const TURN_BYTES: u64 = 8 << 20;

/// Requests that the kernel interrupts for no fault of theirs are submitted again this often.
const RETRIES_MAX: u8 = 8;

/// A transfer with parts to claim or in flight.
#[derive(Debug)]
struct Job {
    transfer: Arc<TransferState>,
    work: Arc<Work>,
    /// Parts up to here were claimed.
    claimed: Cell<u32>,
    /// Requests that are finished.
    done: Cell<u32>,
}

impl Job {
    fn file(&self) -> Option<&FileWork> {
        self.work.file()
    }
}

/// A request that the kernel has.
#[derive(Debug)]
struct Flight {
    job: Rc<Job>,
    /// What its completion carries: generation and place.
    ticket: u64,
    part: u32,
    /// Bytes of it that earlier submissions have moved.
    moved: u32,
    retries: u8,
    iovecs: Vec<libc::iovec>,
}

/// What the kernel may use until it says otherwise.
#[derive(Debug)]
struct Lent {
    flights: Vec<Option<Flight>>,
    /// The eventfd's count goes here.
    wake_word: Box<u64>,
}

pub(super) struct Driver {
    ring: IoUring,
    mailbox: Arc<Mailbox>,
    files: Files,
    buffers: Buffers,
    lent: ManuallyDrop<Lent>,
    free: Vec<u32>,
    /// Tells a reused place from its earlier use.
    generation: u32,
    flying: usize,
    wake_armed: bool,
    jobs: VecDeque<Rc<Job>>,
    quitting: bool,
    vectored_fixed: bool,
    depth: usize,
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.flying == 0 && !self.wake_armed {
            // SAFETY: dropped once, here; the kernel has nothing of it.
            unsafe { ManuallyDrop::drop(&mut self.lent) };
        } else {
            // A panic: what the kernel still uses is leaked rather than freed under it.
            tracing::error!(flying = self.flying, "the ring thread ended early");
        }
    }
}

impl Driver {
    pub(super) fn new(mailbox: Arc<Mailbox>, config: &StorageConfig) -> io::Result<Self> {
        let depth = config.file_queue_depth;
        let entries = depth.next_power_of_two().max(64);
        let ring = Self::ring(entries)?;
        let mut probe = Probe::new();
        let probed = ring.submitter().register_probe(&mut probe).is_ok();
        let files = Files::new(&ring);
        let buffers = Buffers::new(&ring, config.file_registered_bytes_max);
        Ok(Self {
            files,
            buffers,
            ring,
            mailbox,
            lent: ManuallyDrop::new(Lent {
                flights: (0..depth).map(|_| None).collect(),
                wake_word: Box::new(0),
            }),
            free: (0..depth).rev().collect(),
            generation: 0,
            flying: 0,
            wake_armed: false,
            jobs: VecDeque::new(),
            quitting: false,
            vectored_fixed: probed && probe.is_supported(opcode::ReadvFixed::CODE),
            depth: depth as usize,
        })
    }

    fn ring(entries: u32) -> io::Result<IoUring> {
        // Completions are handled when this thread asks for them, not by interrupting it.
        IoUring::builder()
            .setup_clamp()
            .setup_cqsize(entries * 4)
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(entries)
            .or_else(|error| match error.raw_os_error() {
                // Kernels before 6.1.
                Some(libc::EINVAL) => IoUring::builder()
                    .setup_clamp()
                    .setup_cqsize(entries * 4)
                    .build(entries),
                _ => Err(error),
            })
    }

    pub(super) fn describe(&self) -> String {
        let with = |usable: bool| if usable { "registered" } else { "unregistered" };
        format!(
            "io_uring, {} in flight at most, {} memory, {} files",
            self.depth,
            with(self.buffers.usable()),
            with(self.files.usable())
        )
    }

    pub(super) fn run(mut self) {
        let mut commands = Vec::new();
        loop {
            self.mailbox.take(&mut commands);
            for command in commands.drain(..) {
                self.obey(command);
            }
            self.fill();
            if self.quitting && self.flying == 0 {
                break;
            }
            self.arm_wake();
            let parked = self.mailbox.park();
            self.wait(parked);
            self.reap();
        }
        // The last read of the eventfd is outstanding: let it complete.
        while self.wake_armed {
            self.mailbox.wake();
            self.wait(true);
            self.reap();
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Start(transfer) => {
                let Some(work) = transfer.work.clone() else {
                    return;
                };
                self.jobs.push_back(Rc::new(Job {
                    transfer,
                    work,
                    claimed: Cell::new(0),
                    done: Cell::new(0),
                }));
            }
            Command::Stop(transfer) => {
                self.jobs
                    .retain(|job| !Arc::ptr_eq(&job.transfer, &transfer));
                let requests: Vec<u64> = self
                    .lent
                    .flights
                    .iter()
                    .flatten()
                    .filter(|flight| Arc::ptr_eq(&flight.job.transfer, &transfer))
                    .map(|flight| flight.ticket)
                    .collect();
                for request in requests {
                    let cancel = opcode::AsyncCancel::new(request).build().user_data(CANCEL);
                    self.push(&cancel);
                }
            }
            Command::ForgetRegion(region) => self.buffers.forget(&self.ring, region),
            Command::ForgetFile(file) => self.files.forget(&self.ring, file),
            Command::Quit => self.quitting = true,
        }
    }

    /// Gives the kernel as much as it may have at a time.
    fn fill(&mut self) {
        let (mut turn, mut turn_bytes) = (0, 0);
        while let Some(place) = self.free.last().copied() {
            let Some(job) = self.jobs.front().cloned() else {
                return;
            };
            match next_part(&job) {
                Some(part) => {
                    self.free.pop();
                    self.generation = self.generation.wrapping_add(1) & GENERATIONS;
                    let ticket = u64::from(self.generation) << 32 | u64::from(place);
                    self.flying += 1;
                    turn += 1;
                    turn_bytes += bytes_of(&job, part);
                    self.launch(Flight {
                        job,
                        ticket,
                        part,
                        moved: 0,
                        retries: 0,
                        iovecs: Vec::new(),
                    });
                    if turn >= TURN || turn_bytes >= TURN_BYTES {
                        (turn, turn_bytes) = (0, 0);
                        self.jobs.rotate_left(1);
                    }
                }
                None => {
                    (turn, turn_bytes) = (0, 0);
                    self.jobs.pop_front();
                }
            }
        }
    }

    /// Submits what is left of a request; its place is taken already.
    fn launch(&mut self, mut flight: Flight) {
        let Some(file) = flight.job.work.file() else {
            return;
        };
        let place = place_of(flight.ticket);
        let request = file.requests.get(flight.part);
        let via = request.map_or(Via::Buffered, |request| request.via);
        let plain = file.file.fd(via);
        let registered = self.files.place(&self.ring, file.file.id, via, plain);
        let (fd, flags) = match registered.and_then(|place| i32::try_from(place).ok()) {
            Some(place) => (types::Fd(place), squeue::Flags::FIXED_FILE),
            None => (types::Fd(plain), squeue::Flags::empty()),
        };
        let entry = match request {
            None => opcode::Fsync::new(fd)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Some(request) => {
                let segments = file.requests.segments(request);
                flight.iovecs.clear();
                gather(&flight.job.work, segments, flight.moved, &mut flight.iovecs);
                let fixed = self.registered(&flight.job.work, segments);
                let offset = request.offset + u64::from(flight.moved);
                read_or_write(flight.job.work.op, fd, offset, &flight.iovecs, fixed)
            }
        }
        .flags(flags);
        let entry = entry.user_data(flight.ticket);
        if let Some(slot) = self.lent.flights.get_mut(place) {
            *slot = Some(flight);
        }
        self.push(&entry);
    }

    /// The place of registered memory in which all of the segments lie.
    fn registered(&mut self, work: &Work, segments: &[Segment]) -> Option<u16> {
        if segments.len() > 1 && !self.vectored_fixed {
            return None;
        }
        let mut all = None;
        for segment in segments {
            let set = work.sets.get(segment.set as usize)?;
            let place = self.buffers.place(
                &self.ring,
                &set.local_region,
                segment.offset,
                u64::from(segment.bytes),
            )?;
            if *all.get_or_insert(place) != place {
                return None;
            }
        }
        all
    }

    fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: descriptors and memory that the entry names are in `lent`, or owned by what
            // is there, until its completion is reaped.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            // Full: the kernel takes what is there, which frees it.
            self.enter(0);
        }
    }

    fn arm_wake(&mut self) {
        if self.wake_armed || self.quitting {
            return;
        }
        let word: *mut u64 = &mut *self.lent.wake_word;
        let read = opcode::Read::new(types::Fd(self.mailbox.wake_fd()), word.cast(), 8)
            .build()
            .user_data(WAKE);
        self.wake_armed = true;
        self.push(&read);
    }

    /// Submits, and waits for a completion if nothing has come in. While this thread is busy more
    /// of them gather by themselves: waiting for several was measured and gains nothing.
    fn wait(&self, parked: bool) {
        self.enter(usize::from(parked));
    }

    fn enter(&self, want: usize) {
        let entered = self.ring.submit_and_wait(want);
        match entered.map_err(|error| (error.raw_os_error(), error)) {
            // A signal, or completions have to be reaped first.
            Ok(_) | Err((Some(libc::EINTR | libc::EBUSY), _)) => {}
            Err((_, error)) => {
                // The kernel is short of memory: what is in flight goes on meanwhile.
                tracing::warn!(%error, "the ring refuses submissions");
                std::thread::park_timeout(Duration::from_millis(1));
            }
        }
    }

    fn reap(&mut self) {
        loop {
            let Some(completion) = self.ring.completion().next() else {
                return;
            };
            match completion.user_data() {
                WAKE => self.wake_armed = false,
                CANCEL => {}
                ticket => self.landed(ticket, &completion),
            }
        }
    }

    /// The kernel is done with a submission.
    fn landed(&mut self, ticket: u64, completion: &cqueue::Entry) {
        let place = place_of(ticket);
        let slot = self.lent.flights.get_mut(place);
        let Some(mut flight) = slot.and_then(Option::take) else {
            tracing::error!(ticket, "a completion that nobody waits for");
            return;
        };
        debug_assert_eq!(flight.ticket, ticket);
        let job = flight.job.clone();
        let result = u32::try_from(completion.result()).map_err(|_| -completion.result());
        let step = match job.file() {
            Some(file) => file.after(job.work.op, flight.part, flight.moved, result),
            None => Step::Done,
        };
        let again = match step {
            Step::Done => false,
            Step::Failed(error) => {
                job.transfer.stop(TransferError::Storage(error));
                false
            }
            Step::Again { .. } | Step::Interrupted if job.transfer.called_off() => false,
            Step::Again { moved } => {
                flight.moved = moved;
                flight.retries = 0;
                true
            }
            Step::Interrupted if flight.retries < RETRIES_MAX => {
                flight.retries += 1;
                true
            }
            Step::Interrupted => {
                let errno = result.err().unwrap_or(libc::EINTR);
                if let Some(file) = job.file() {
                    let error = file.gave_up(job.work.op, flight.part, flight.moved, errno);
                    job.transfer.stop(TransferError::Storage(error));
                }
                false
            }
        };
        if again {
            self.launch(flight);
            return;
        }
        self.flying -= 1;
        // Places are below 4096.
        self.free.push(u32::try_from(place).unwrap_or(u32::MAX));
        drop(flight);
        job.done.set(job.done.get() + 1);
        if job
            .file()
            .is_some_and(|file| file.durable && job.done.get() == file.requests())
        {
            // Its sync can go now.
            self.jobs.push_back(job.clone());
        }
        job.transfer.part_done();
    }
}

/// Claims the next part of a job; `None` when there is none, or none yet.
fn next_part(job: &Job) -> Option<u32> {
    let file = job.file()?;
    let requests = file.requests();
    if job.claimed.get() >= requests && job.done.get() < requests {
        // Only its sync is left, and that waits for the requests.
        return None;
    }
    let part = job.transfer.claim_part()?;
    job.claimed.set(part + 1);
    Some(part)
}

fn bytes_of(job: &Job, part: u32) -> u64 {
    let request = job.file().and_then(|file| file.requests.get(part));
    request.map_or(0, |request| request.bytes.into())
}

fn place_of(ticket: u64) -> usize {
    // The lower half fits.
    usize::try_from(ticket & u64::from(u32::MAX)).unwrap_or(usize::MAX)
}

/// A read or a write of contiguous or scattered, registered or plain memory.
fn read_or_write(
    op: Op,
    fd: types::Fd,
    offset: u64,
    iovecs: &[libc::iovec],
    fixed: Option<u16>,
) -> squeue::Entry {
    // Requests are at most 64 MiB in at most 256 pieces.
    let count = u32::try_from(iovecs.len()).unwrap_or(u32::MAX);
    if let [one] = iovecs {
        let len = u32::try_from(one.iov_len).unwrap_or(u32::MAX);
        let base = one.iov_base.cast::<u8>();
        return match (op, fixed) {
            (Op::Read, Some(place)) => opcode::ReadFixed::new(fd, base, len, place)
                .offset(offset)
                .build(),
            (Op::Read, None) => opcode::Read::new(fd, base, len).offset(offset).build(),
            (Op::Write, Some(place)) => opcode::WriteFixed::new(fd, base, len, place)
                .offset(offset)
                .build(),
            (Op::Write, None) => opcode::Write::new(fd, base, len).offset(offset).build(),
        };
    }
    let list = iovecs.as_ptr();
    match (op, fixed) {
        (Op::Read, Some(place)) => opcode::ReadvFixed::new(fd, list, count, place)
            .offset(offset)
            .build(),
        (Op::Read, None) => opcode::Readv::new(fd, list, count).offset(offset).build(),
        (Op::Write, Some(place)) => opcode::WritevFixed::new(fd, list, count, place)
            .offset(offset)
            .build(),
        (Op::Write, None) => opcode::Writev::new(fd, list, count).offset(offset).build(),
    }
}

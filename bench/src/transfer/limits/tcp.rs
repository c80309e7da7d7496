//! Raw sockets over loopback: vectored calls straight from and into the blocks.

use std::{
    hint::spin_loop,
    io::{IoSlice, IoSliceMut, Read, Write},
    net::{TcpListener, TcpStream},
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use super::gb_per_s;
use crate::transfer::{
    case::{Lot, OpName, Side},
    link::PATIENCE,
};

/// Slices of one vectored call (the kernel's bound).
const SLICES_MAX: usize = 1024;

/// Memory and connections, each served by a thread at its other end.
#[derive(Debug)]
pub(super) struct RawTcp {
    bytes: usize,
    streams: Vec<Stream>,
}

#[derive(Debug)]
struct Stream {
    socket: TcpStream,
    memory: Vec<u8>,
    jobs: SyncSender<Job>,
    ready: Receiver<()>,
}

/// What one connection moves.
#[derive(Clone, Debug)]
struct Job {
    op: OpName,
    side: Side,
}

impl RawTcp {
    pub(super) const fn new(bytes: usize) -> anyhow::Result<Self> {
        Ok(Self {
            bytes,
            streams: Vec::new(),
        })
    }

    /// GB/s from the first call to the word that all blocks are in place, the blocks shared out to
    /// `streams` connections.
    pub(super) fn rate(
        &mut self,
        op: OpName,
        lot: &Lot,
        streams: usize,
        budget: Duration,
    ) -> anyhow::Result<f64> {
        while self.streams.len() < streams {
            self.streams.push(Stream::open(self.bytes)?);
        }
        let jobs = shares(op, lot, streams);
        let seconds = super::times(budget, || self.transfer(&jobs))?;
        Ok(gb_per_s(lot.local.bytes(), seconds.median()))
    }

    fn transfer(&mut self, jobs: &[(Job, Job)]) -> anyhow::Result<Duration> {
        for (stream, (_, theirs)) in self.streams.iter().zip(jobs) {
            stream.announce(theirs)?;
        }
        let [first, rest @ ..] = &mut self.streams[..jobs.len()] else {
            return Ok(Duration::ZERO);
        };
        let start = Start::new(jobs.len());
        let times = thread::scope(|scope| {
            let others: Vec<_> = rest
                .iter_mut()
                .zip(&jobs[1..])
                .map(|(stream, (mine, _))| scope.spawn(|| stream.run(mine, &start)))
                .collect();
            let mut times = vec![first.run(&jobs[0].0, &start)?];
            for other in others {
                times.push(other.join().ok().context("a raw stream failed")??);
            }
            anyhow::Ok(times)
        })?;
        let began = times.iter().map(|time| time.start).min();
        let ended = times.iter().map(|time| time.end).max();
        Ok(ended
            .zip(began)
            .map_or(Duration::ZERO, |(end, start)| end - start))
    }
}

/// Lets the threads of one transfer begin together, without a wake-up.
struct Start {
    threads: usize,
    arrived: AtomicUsize,
}

impl Start {
    const fn new(threads: usize) -> Self {
        Self {
            threads,
            arrived: AtomicUsize::new(0),
        }
    }

    fn together(&self) -> anyhow::Result<()> {
        self.arrived.fetch_add(1, Ordering::AcqRel);
        let begin = Instant::now();
        while self.arrived.load(Ordering::Acquire) < self.threads {
            ensure!(begin.elapsed() < PATIENCE, "a raw stream did not start");
            spin_loop();
        }
        Ok(())
    }
}

/// Splits a lot into one pair of jobs for each stream: ours and that of the other end.
fn shares(op: OpName, lot: &Lot, streams: usize) -> Vec<(Job, Job)> {
    let count = lot.local.ids.len();
    let each = count.div_ceil(streams).max(1);
    let part = |side: &Side, at: usize| Job {
        op,
        side: Side {
            shape: side.shape,
            ids: Arc::from(&side.ids[at..(at + each).min(count)]),
            range: side.range,
        },
    };
    (0..count)
        .step_by(each)
        .map(|at| (part(&lot.local, at), part(&lot.remote, at)))
        .collect()
}

impl Stream {
    fn open(bytes: usize) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let socket = TcpStream::connect(listener.local_addr()?)?;
        let (accepted, _) = listener.accept()?;
        for end in [&socket, &accepted] {
            end.set_nodelay(true)?;
            end.set_read_timeout(Some(PATIENCE))?;
            end.set_write_timeout(Some(PATIENCE))?;
        }
        let (jobs, inbox) = sync_channel::<Job>(1);
        let (announce, ready) = sync_channel(1);
        let mut end = accepted;
        thread::Builder::new()
            .name("bench-raw-tcp".to_owned())
            .spawn(move || {
                let mut memory = vec![1; bytes];
                for job in inbox {
                    let ready = || Ok(announce.send(())?);
                    // An error closes the socket, which the other end reports.
                    if serve(&mut end, &mut memory, &job, ready).is_err() {
                        return;
                    }
                }
            })?;
        Ok(Self {
            socket,
            memory: vec![1; bytes],
            jobs,
            ready,
        })
    }

    fn announce(&self, job: &Job) -> anyhow::Result<()> {
        self.jobs
            .send(job.clone())
            .ok()
            .context("the other end of a raw socket failed")?;
        self.ready
            .recv()
            .context("the other end of a raw socket failed")
    }

    fn run(&mut self, job: &Job, start: &Start) -> anyhow::Result<Range<Instant>> {
        let began;
        match job.op {
            OpName::Write => {
                let mut slices = slices(&self.memory, &job.side)?;
                start.together()?;
                began = Instant::now();
                send(&mut self.socket, &mut slices)?;
                self.socket.read_exact(&mut [0])?;
            }
            OpName::Read => {
                let mut places = places(&mut self.memory, &job.side)?;
                start.together()?;
                began = Instant::now();
                self.socket.write_all(&[1])?;
                receive(&mut self.socket, &mut places)?;
            }
        }
        Ok(began..Instant::now())
    }
}

/// The other end of one transfer.
fn serve(
    socket: &mut TcpStream,
    memory: &mut [u8],
    job: &Job,
    ready: impl Fn() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    match job.op {
        OpName::Write => {
            let mut places = places(memory, &job.side)?;
            ready()?;
            receive(socket, &mut places)?;
            socket.write_all(&[1])?;
        }
        OpName::Read => {
            let mut slices = slices(memory, &job.side)?;
            ready()?;
            socket.read_exact(&mut [0])?;
            send(socket, &mut slices)?;
        }
    }
    Ok(())
}

fn slices<'a>(memory: &'a [u8], side: &Side) -> anyhow::Result<Vec<IoSlice<'a>>> {
    let bytes = usize::try_from(side.shape.run_bytes)?;
    side.runs()
        .map(|at| {
            let at = usize::try_from(at)?;
            let run = memory.get(at..at + bytes).context("outside of memory")?;
            Ok(IoSlice::new(run))
        })
        .collect()
}

fn send(socket: &mut TcpStream, mut rest: &mut [IoSlice<'_>]) -> anyhow::Result<()> {
    while !rest.is_empty() {
        let now = rest.len().min(SLICES_MAX);
        let written = socket.write_vectored(&rest[..now])?;
        ensure!(written > 0, "the raw socket closed");
        IoSlice::advance_slices(&mut rest, written);
    }
    Ok(())
}

/// The runs of a side as slices in its own order.
fn places<'a>(memory: &'a mut [u8], side: &Side) -> anyhow::Result<Vec<IoSliceMut<'a>>> {
    let bytes = usize::try_from(side.shape.run_bytes)?;
    let mut pieces: Vec<Option<&mut [u8]>> = memory.chunks_exact_mut(bytes).map(Some).collect();
    side.runs()
        .map(|at| {
            let place = usize::try_from(at)? / bytes;
            let piece = pieces.get_mut(place).and_then(Option::take);
            Ok(IoSliceMut::new(piece.context("runs are distinct places")?))
        })
        .collect()
}

fn receive(socket: &mut TcpStream, mut rest: &mut [IoSliceMut<'_>]) -> anyhow::Result<()> {
    while !rest.is_empty() {
        let now = rest.len().min(SLICES_MAX);
        let read = socket.read_vectored(&mut rest[..now])?;
        ensure!(read > 0, "the raw socket closed");
        IoSliceMut::advance_slices(&mut rest, read);
    }
    Ok(())
}

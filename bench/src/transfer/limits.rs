//! What the machine allows in this very run: a copy by one thread, and a raw socket.

use std::{
    io::{IoSlice, IoSliceMut, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use blockplane_transfer::Registration;

use super::{case::Blocks, memory};
use crate::report::Samples;

/// Slices of one vectored call (the kernel's bound).
const SLICES_MAX: usize = 1024;

/// GB/s of a memcpy by one thread over the same blocks.
pub(super) fn memcpy(
    from: &Registration,
    to: &Registration,
    blocks: &Blocks,
    budget: Duration,
) -> f64 {
    let copy = || {
        memory::copy(
            from,
            &blocks.local,
            to,
            &blocks.remote,
            blocks.block_bytes as usize,
        );
    };
    copy();
    median_rate(blocks, budget, || {
        let start = Instant::now();
        copy();
        Ok(start.elapsed())
    })
    .unwrap_or(f64::NAN)
}

/// A pair of connected sockets and their memory, for raw transfers over loopback.
#[derive(Debug)]
pub(super) struct RawTcp {
    stream: TcpStream,
    source: Vec<u8>,
    jobs: SyncSender<Job>,
    ready: Receiver<()>,
}

#[derive(Debug)]
struct Job {
    block_bytes: usize,
    ids: Arc<[u32]>,
}

impl RawTcp {
    pub(super) fn new(arena_bytes: usize) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let stream = TcpStream::connect(listener.local_addr()?)?;
        let (accepted, _) = listener.accept()?;
        for end in [&stream, &accepted] {
            end.set_nodelay(true)?;
            end.set_read_timeout(Some(super::peer::PATIENCE))?;
            end.set_write_timeout(Some(super::peer::PATIENCE))?;
        }
        let (jobs, inbox) = sync_channel(1);
        let (announce, ready) = sync_channel(1);
        thread::Builder::new()
            .name("bench-raw-tcp".to_owned())
            .spawn(move || receive(accepted, arena_bytes, &inbox, &announce))?;
        Ok(Self {
            stream,
            source: vec![1; arena_bytes],
            jobs,
            ready,
        })
    }

    /// GB/s from the first write to the receiver's word that all blocks are in place.
    pub(super) fn rate(&mut self, blocks: &Blocks, budget: Duration) -> anyhow::Result<f64> {
        self.transfer(blocks)?;
        median_rate(blocks, budget, || self.transfer(blocks))
    }

    fn transfer(&mut self, blocks: &Blocks) -> anyhow::Result<Duration> {
        let block_bytes = blocks.block_bytes as usize;
        self.jobs
            .send(Job {
                block_bytes,
                ids: Arc::clone(&blocks.remote),
            })
            .ok()
            .context("the receiver of the raw socket ended")?;
        self.ready.recv().context("the receiver ended")?;
        let mut slices: Vec<IoSlice<'_>> = blocks
            .local
            .iter()
            .map(|&id| {
                let start = id as usize * block_bytes;
                IoSlice::new(&self.source[start..start + block_bytes])
            })
            .collect();
        let start = Instant::now();
        let mut rest = &mut slices[..];
        while !rest.is_empty() {
            let now = rest.len().min(SLICES_MAX);
            let written = self.stream.write_vectored(&rest[..now])?;
            ensure!(written > 0, "the raw socket closed");
            IoSlice::advance_slices(&mut rest, written);
        }
        self.stream.read_exact(&mut [0])?;
        Ok(start.elapsed())
    }
}

fn receive(
    mut stream: TcpStream,
    arena_bytes: usize,
    jobs: &Receiver<Job>,
    ready: &SyncSender<()>,
) {
    let mut memory = vec![0u8; arena_bytes];
    while let Ok(job) = jobs.recv() {
        // An error closes the socket, which the sender reports.
        if receive_one(&mut stream, &mut memory, &job, ready).is_err() {
            return;
        }
    }
}

fn receive_one(
    stream: &mut TcpStream,
    memory: &mut [u8],
    job: &Job,
    ready: &SyncSender<()>,
) -> anyhow::Result<()> {
    let mut places: Vec<Option<&mut [u8]>> =
        memory.chunks_exact_mut(job.block_bytes).map(Some).collect();
    let mut slices = Vec::with_capacity(job.ids.len());
    for &id in job.ids.iter() {
        let place = places.get_mut(id as usize).and_then(Option::take);
        slices.push(IoSliceMut::new(place.context("ids are distinct places")?));
    }
    ready.send(())?;
    let mut rest = &mut slices[..];
    while !rest.is_empty() {
        let now = rest.len().min(SLICES_MAX);
        let read = stream.read_vectored(&mut rest[..now])?;
        ensure!(read > 0, "the raw socket closed");
        IoSliceMut::advance_slices(&mut rest, read);
    }
    stream.write_all(&[1])?;
    Ok(())
}

/// Median GB/s of a repeated action that says how long it took.
fn median_rate(
    blocks: &Blocks,
    budget: Duration,
    mut action: impl FnMut() -> anyhow::Result<Duration>,
) -> anyhow::Result<f64> {
    let mut rates = Samples::default();
    let start = Instant::now();
    while another(start.elapsed(), budget, rates.len()) {
        rates.push(gb_per_s(blocks.bytes(), action()?));
    }
    Ok(rates.median())
}

/// Whether to run a case once more: at least five times unless that takes four times its budget,
/// at most 10,000 times.
pub(super) fn another(elapsed: Duration, budget: Duration, runs: usize) -> bool {
    match runs {
        0 => true,
        1..5 => elapsed < budget * 4,
        5..10_000 => elapsed < budget,
        _ => false,
    }
}

/// 10^9 bytes per second.
#[expect(clippy::cast_precision_loss, reason = "far below 2^53 bytes")]
pub(super) fn gb_per_s(bytes: usize, took: Duration) -> f64 {
    bytes as f64 / took.as_secs_f64().max(1e-9) / 1e9
}

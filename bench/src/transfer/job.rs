//! The measured loop of an initiator: several threads, each with several transfers in flight.

use std::{
    collections::VecDeque,
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow};
use blockplane_transfer::{PostOptions, Prepared, Transfer};
use serde::{Deserialize, Serialize};

use super::{
    case::{Lot, OpName},
    link::PATIENCE,
    node::{Active, shared_clock_nanos, thread_cpu},
};

/// Times kept by one thread; later ones are not measured one by one.
const SAMPLES_MAX: usize = 10_000;
/// What an initiator is to post.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Job {
    pub(super) op: OpName,
    /// Transfers in flight at the same time; each is posted again when it is complete.
    pub(super) lots: Vec<Lot>,
    pub(super) threads: usize,
    /// Prepare each lot once, or again for each posting.
    pub(super) prepared: bool,
    /// One transfer with a notification for each layer instead of one for all.
    pub(super) per_layer: bool,
    /// Also take the processor time of each post, which costs as much as a short post itself.
    pub(super) post_cpu: bool,
    /// A notification with each lot.
    pub(super) notify: bool,
    /// Multiprocessors of each transfer, instead of the agent's.
    pub(super) sms: Option<u32>,
    /// Posts no faster than this many GB/s, all threads together.
    pub(super) pace: Option<f64>,
    /// How often the first lot is prepared before, to see how long that takes.
    pub(super) makes: u32,
    /// Unmeasured rounds before.
    pub(super) warmup: u32,
    /// Rounds of each lot.
    pub(super) rounds: Rounds,
}

/// How long to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Rounds {
    /// So often.
    Exactly(u32),
    /// About this many microseconds: at least five rounds unless they take four times as long, at
    /// most 10,000.
    Within(u64),
}

impl Rounds {
    /// Longer than they take, with some to warm up; every single transfer has a bound of its own.
    pub(super) fn bound(self, warmup: u32) -> Duration {
        match self {
            Self::Exactly(rounds) => Duration::from_secs(1) * (rounds + warmup),
            Self::Within(micros) => Duration::from_micros(micros) * 8,
        }
    }
}

/// What came of a job.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Ran {
    /// First post and last completion, by the clock that all processes share.
    pub(super) start_nanos: u64,
    pub(super) end_nanos: u64,
    /// Completed rounds to each peer.
    pub(super) rounds: Vec<u64>,
    /// Microseconds to prepare one lot.
    pub(super) make: Vec<f64>,
    /// Microseconds to post one lot, by the clock and of the thread's processor time.
    pub(super) post: Vec<f64>,
    pub(super) post_cpu: Vec<f64>,
    /// Microseconds from the first post of a lot to the completion of all of it; with the
    /// preparation where that is part of every round.
    pub(super) transfer: Vec<f64>,
    /// When each lot was posted, by the clock that all processes share.
    pub(super) posted_nanos: Vec<u64>,
    /// How the first lot was planned.
    pub(super) reason: String,
    /// Contiguous pieces of the first lot after merging.
    pub(super) pieces: u64,
}

/// A lot in flight.
struct Flight {
    lot: usize,
    start: Instant,
    transfers: Vec<Transfer>,
}

/// Posts and waits until the job is done.
pub(super) fn run(node: &Active, job: &Job) -> anyhow::Result<Ran> {
    let start = Barrier::new(job.threads);
    let results: Vec<anyhow::Result<Ran>> = thread::scope(|scope| {
        let workers: Vec<_> = (1..job.threads)
            .map(|thread| {
                let start = &start;
                scope.spawn(move || Thread::new(node, job, thread).run(start))
            })
            .collect();
        let mine = Thread::new(node, job, 0).run(&start);
        let others = workers.into_iter().map(|worker| {
            worker
                .join()
                .unwrap_or_else(|_| Err(anyhow!("a posting thread failed")))
        });
        std::iter::once(mine).chain(others).collect()
    });
    let mut all = Ran {
        start_nanos: u64::MAX,
        rounds: vec![0; node.peers.len()],
        ..Ran::default()
    };
    for result in results {
        all.add(result?);
    }
    Ok(all)
}

impl Ran {
    fn add(&mut self, other: Self) {
        self.start_nanos = self.start_nanos.min(other.start_nanos);
        self.end_nanos = self.end_nanos.max(other.end_nanos);
        for (sum, rounds) in self.rounds.iter_mut().zip(other.rounds) {
            *sum += rounds;
        }
        self.make.extend(other.make);
        self.post.extend(other.post);
        self.post_cpu.extend(other.post_cpu);
        self.transfer.extend(other.transfer);
        self.posted_nanos.extend(other.posted_nanos);
        if self.reason.is_empty() {
            self.reason = other.reason;
            self.pieces = other.pieces;
        }
    }

    /// From the first post to the last completion.
    pub(super) const fn took(&self) -> Duration {
        Duration::from_nanos(self.end_nanos.saturating_sub(self.start_nanos))
    }
}

/// One posting thread.
struct Thread<'a> {
    node: &'a Active,
    job: &'a Job,
    lots: Vec<&'a Lot>,
    prepared: Vec<Vec<Prepared>>,
    flights: VecDeque<Flight>,
    ran: Ran,
}

impl<'a> Thread<'a> {
    fn new(node: &'a Active, job: &'a Job, thread: usize) -> Self {
        let lots = job.lots.iter().filter(|lot| lot.thread == thread).collect();
        let ran = Ran {
            rounds: vec![0; node.peers.len()],
            ..Ran::default()
        };
        Self {
            node,
            job,
            lots,
            prepared: Vec::new(),
            flights: VecDeque::new(),
            ran,
        }
    }

    fn run(mut self, start: &Barrier) -> anyhow::Result<Ran> {
        let ready = self.prepare_all();
        // Everybody passes, also one whose preparation failed.
        start.wait();
        ready?;
        if self.lots.is_empty() {
            return Ok(self.ran);
        }
        self.rounds(Rounds::Exactly(self.job.warmup))?;
        let made = std::mem::take(&mut self.ran.make);
        self.ran = Ran {
            rounds: vec![0; self.ran.rounds.len()],
            make: if self.job.prepared { made } else { Vec::new() },
            reason: self.ran.reason,
            pieces: self.ran.pieces,
            ..Ran::default()
        };
        self.ran.start_nanos = shared_clock_nanos();
        self.rounds(self.job.rounds)?;
        self.ran.end_nanos = shared_clock_nanos();
        Ok(self.ran)
    }

    /// Prepares every lot, the first one several times for the sake of the figures.
    fn prepare_all(&mut self) -> anyhow::Result<()> {
        for lot in self.lots.clone() {
            let steps = self.prepare(lot)?;
            self.prepared.push(steps);
        }
        let Some(&lot) = self.lots.first() else {
            return Ok(());
        };
        let plan = self.prepared[0][0].plan();
        self.ran.reason = plan.reason.clone();
        self.ran.pieces = plan.pieces;
        // The first time of each lot asked the peer for its region.
        self.ran.make.clear();
        for _ in 0..self.job.makes {
            self.prepared[0] = self.prepare(lot)?;
        }
        Ok(())
    }

    fn prepare(&mut self, lot: &Lot) -> anyhow::Result<Vec<Prepared>> {
        let layers = lot.local.shape.layers;
        let op = self.job.op.op();
        let start = Instant::now();
        let steps = if self.job.per_layer {
            (0..layers)
                .map(|layer| self.node.prepare(op, lot, layer..layer + 1))
                .collect::<anyhow::Result<_>>()?
        } else {
            vec![self.node.prepare(op, lot, 0..layers)?]
        };
        push(&mut self.ran.make, micros(start.elapsed()));
        Ok(steps)
    }

    /// Keeps all lots in flight until it is time to end, then waits for the rest.
    fn rounds(&mut self, rounds: Rounds) -> anyhow::Result<()> {
        if rounds == Rounds::Exactly(0) {
            return Ok(());
        }
        let start = Instant::now();
        let lots = self.lots.len();
        for lot in 0..lots {
            self.post(lot)?;
        }
        let mut posted = lots;
        // When the next one is due.
        let gap = self.gap();
        let mut due = start + gap * u32::try_from(lots).unwrap_or(u32::MAX);
        while let Some(lot) = self.finish()? {
            let again = match rounds {
                Rounds::Exactly(rounds) => posted < rounds as usize * lots,
                Rounds::Within(micros) => {
                    another(start.elapsed(), Duration::from_micros(micros), posted)
                }
            };
            if again {
                while Instant::now() < due {
                    std::hint::spin_loop();
                }
                // Time that was lost is not made up for.
                due = due.max(Instant::now() - gap) + gap;
                self.post(lot)?;
                posted += 1;
            }
        }
        Ok(())
    }

    /// Time between the posts of this thread.
    fn gap(&self) -> Duration {
        let (Some(rate), Some(lot)) = (self.job.pace, self.lots.first()) else {
            return Duration::ZERO;
        };
        let share = rate / self.job.threads as f64;
        Duration::from_secs_f64(lot.local.bytes() as f64 / 1e9 / share)
    }

    fn post(&mut self, lot: usize) -> anyhow::Result<()> {
        let start = Instant::now();
        if self.job.notify && self.ran.posted_nanos.len() < SAMPLES_MAX {
            self.ran.posted_nanos.push(shared_clock_nanos());
        }
        if !self.job.prepared {
            self.prepared[lot] = self.prepare(self.lots[lot])?;
        }
        let steps = &self.prepared[lot];
        let mut transfers = Vec::with_capacity(steps.len());
        let cpu = self.job.post_cpu.then(thread_cpu);
        let posting = Instant::now();
        for step in steps {
            let mut options = PostOptions::within(PATIENCE);
            if self.job.per_layer {
                options = options.notify("layer");
            } else if self.job.notify {
                options = options.notify("all");
            }
            if let Some(sms) = self.job.sms {
                options = options.sms(sms);
            }
            transfers.push(step.post(options)?);
        }
        push(&mut self.ran.post, micros(posting.elapsed()));
        if let Some(cpu) = cpu {
            push(&mut self.ran.post_cpu, micros(thread_cpu() - cpu));
        }
        self.flights.push_back(Flight {
            lot,
            start,
            transfers,
        });
        Ok(())
    }

    /// Waits for the oldest lot in flight; `None` when there is none.
    fn finish(&mut self) -> anyhow::Result<Option<usize>> {
        let Some(flight) = self.flights.pop_front() else {
            return Ok(None);
        };
        for transfer in &flight.transfers {
            transfer
                .wait(PATIENCE)
                .context("a transfer did not complete")?;
        }
        push(&mut self.ran.transfer, micros(flight.start.elapsed()));
        self.ran.rounds[self.lots[flight.lot].peer] += 1;
        Ok(Some(flight.lot))
    }
}

/// Whether to run a case once more: at least five times unless that takes four times its budget,
/// at most 10,000 times.
pub(super) fn another(elapsed: Duration, budget: Duration, runs: usize) -> bool {
    match runs {
        0 => true,
        1..5 => elapsed < budget * 4,
        5..SAMPLES_MAX => elapsed < budget,
        _ => false,
    }
}

fn push(samples: &mut Vec<f64>, value: f64) {
    if samples.len() < SAMPLES_MAX {
        samples.push(value);
    }
}

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

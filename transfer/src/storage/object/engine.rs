//! The thread for objects: a small runtime that is parked while nothing is under way.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;

use super::super::backend::Moves;
use super::ObjectWork;
use super::moving;
use crate::error::TransferError;
use crate::op::{Op, TransferState, Work};

/// What is not a transfer: a question about objects.
type Job = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Questions that wait at one time; they hold the threads that ask them.
const JOBS_MAX: usize = 1024;

enum Command {
    Start(Arc<TransferState>),
    Stop(u64),
    Run(Job),
    Done(u64),
}

#[derive(Default)]
struct Mail {
    commands: VecDeque<Command>,
    jobs: usize,
    quit: bool,
}

struct Shared {
    mail: Mutex<Mail>,
    arrived: Notify,
}

/// Handle of the thread. Commands are bounded by operations in flight and by `JOBS_MAX`.
pub(crate) struct Engine {
    shared: Arc<Shared>,
    requests: Arc<Semaphore>,
    concurrency: usize,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("concurrency", &self.concurrency)
            .finish_non_exhaustive()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.mail.lock().quit = true;
        self.shared.arrived.notify_one();
    }
}

impl Shared {
    fn send(&self, command: Command) {
        self.mail.lock().commands.push_back(command);
        self.arrived.notify_one();
    }
}

impl Moves for Engine {
    fn transfer(&self, transfer: &Arc<TransferState>) {
        self.shared.send(Command::Start(transfer.clone()));
    }

    fn stop(&self, transfer: &Arc<TransferState>) {
        self.shared.send(Command::Stop(transfer.id));
    }
}

impl Engine {
    pub(crate) fn start(concurrency: usize) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(concurrency.min(16))
            .thread_name("bp-object-file")
            .build()?;
        let shared = Arc::new(Shared {
            mail: Mutex::default(),
            arrived: Notify::new(),
        });
        let requests = Arc::new(Semaphore::new(concurrency));
        let mail = shared.clone();
        let room = requests.clone();
        std::thread::Builder::new()
            .name("bp-object".to_owned())
            .spawn(move || {
                runtime.block_on(serve(&mail, &room));
                // Threads that still read or write a folder end by themselves.
                runtime.shutdown_background();
            })?;
        Ok(Self {
            shared,
            requests,
            concurrency,
        })
    }

    pub(crate) const fn concurrency(&self) -> usize {
        self.concurrency
    }

    /// Runs a question for each of `items`, a few at a time, and waits for the answers; `None` when
    /// `timeout` passes first or too many questions wait.
    pub(super) fn ask<I, T, F>(
        &self,
        items: Vec<I>,
        timeout: Duration,
        question: impl Fn(I) -> F + Send + Sync + 'static,
    ) -> Option<Vec<T>>
    where
        I: Send + 'static,
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let (answer, answers) = mpsc::sync_channel(1);
        let requests = self.requests.clone();
        let job = async move {
            let all = futures::stream::iter(items.into_iter().map(|item| {
                let question = question(item);
                let requests = &requests;
                async move {
                    // Never closed.
                    let _permit = requests.acquire().await;
                    question.await
                }
            }));
            let all = futures::StreamExt::buffered(all, 16);
            let all: Vec<T> = futures::StreamExt::collect(all).await;
            // Nobody waits any more after the timeout.
            let _ = answer.send(all);
        };
        let job = async move {
            // Whoever asked is gone by then.
            let _ = tokio::time::timeout(timeout, job).await;
        };
        {
            let mut mail = self.shared.mail.lock();
            if mail.jobs >= JOBS_MAX {
                return None;
            }
            mail.jobs += 1;
            mail.commands.push_back(Command::Run(Box::pin(job)));
        }
        self.shared.arrived.notify_one();
        answers.recv_timeout(timeout).ok()
    }
}

/// Transfers under way and how they are called off.
type Stops = HashMap<u64, watch::Sender<bool>>;

async fn serve(shared: &Arc<Shared>, requests: &Arc<Semaphore>) {
    let mut stops = Stops::new();
    let mut jobs: JoinSet<()> = JoinSet::new();
    loop {
        let (commands, quit) = {
            let mut mail = shared.mail.lock();
            (std::mem::take(&mut mail.commands), mail.quit)
        };
        if quit && commands.is_empty() && stops.is_empty() {
            return;
        }
        for command in commands {
            match command {
                Command::Start(transfer) => {
                    let (stop, stopped) = watch::channel(false);
                    stops.insert(transfer.id, stop);
                    let (shared, requests) = (shared.clone(), requests.clone());
                    jobs.spawn(async move {
                        let id = transfer.id;
                        run(transfer, requests, stopped).await;
                        shared.send(Command::Done(id));
                    });
                }
                Command::Stop(id) => {
                    if let Some(stop) = stops.get(&id) {
                        stop.send_replace(true);
                    }
                }
                Command::Run(job) => {
                    let shared = shared.clone();
                    jobs.spawn(async move {
                        job.await;
                        shared.mail.lock().jobs -= 1;
                    });
                }
                Command::Done(id) => {
                    stops.remove(&id);
                }
            }
        }
        while jobs.try_join_next().is_some() {}
        shared.arrived.notified().await;
    }
}

/// A claimed part: reported when it goes, however its task ends.
struct Part {
    transfer: Arc<TransferState>,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Part {
    fn drop(&mut self) {
        self.transfer.part_done();
    }
}

/// Claims the parts of a transfer as there is room, until there is none left.
async fn run(
    transfer: Arc<TransferState>,
    requests: Arc<Semaphore>,
    mut stopped: watch::Receiver<bool>,
) {
    let Some(work) = transfer.work.clone() else {
        return;
    };
    let Some(objects) = work.objects().cloned() else {
        return;
    };
    let mut parts = JoinSet::new();
    loop {
        let permit = tokio::select! {
            biased;
            _ = stopped.wait_for(|stopped| *stopped) => break,
            Some(_) = parts.join_next(), if !parts.is_empty() => continue,
            permit = requests.clone().acquire_owned() => permit,
        };
        let (Ok(permit), Some(index)) = (permit, transfer.claim_part()) else {
            break;
        };
        let part = Part {
            transfer: transfer.clone(),
            _permit: permit,
        };
        parts.spawn(one(
            part,
            index,
            work.clone(),
            objects.clone(),
            requests.clone(),
            stopped.clone(),
        ));
    }
    while parts.join_next().await.is_some() {}
}

/// Moves one object. Where requests leave the process, and for all reads, being called off ends it
/// at once: bytes are moved by this thread alone. A write into a folder is short and runs to its
/// end on a thread of its own, which could not be called back.
async fn one(
    part: Part,
    index: u32,
    work: Arc<Work>,
    objects: Arc<ObjectWork>,
    requests: Arc<Semaphore>,
    mut stopped: watch::Receiver<bool>,
) {
    let moved = async {
        match work.op {
            Op::Read => moving::read(&work, &objects, index).await,
            Op::Write => moving::write(&work, &objects, index, &requests).await,
        }
    };
    let moved = if work.op == Op::Read || objects.client.remote {
        tokio::select! {
            biased;
            _ = stopped.wait_for(|stopped| *stopped) => return,
            moved = moved => moved,
        }
    } else {
        moved.await
    };
    if let Err(error) = moved {
        part.transfer.stop(TransferError::Storage(error));
    }
    drop(part);
}

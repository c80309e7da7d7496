//! Traffic that runs beside a test.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Result, anyhow, ensure};
use serde_json::Value;

use crate::{
    client::{Client, Completion, Outcome},
    wait,
};

/// Longest time of one request of a test, unless it says otherwise.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Clients that send one request after the other until they are stopped.
#[derive(Debug)]
pub struct Traffic {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    clients: Vec<JoinHandle<Vec<Outcome>>>,
}

impl Traffic {
    /// Starts `clients` clients. `body(client, n)` makes the n-th request of a client.
    pub fn start(
        client: &Client,
        clients: u64,
        body: impl Fn(u64, u64) -> Value + Send + Sync + 'static,
    ) -> Self {
        let body = Arc::new(body);
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicUsize::new(0));
        let clients = (0..clients)
            .map(|number| {
                let (client, body) = (client.clone(), Arc::clone(&body));
                let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
                std::thread::spawn(move || {
                    let mut outcomes = Vec::new();
                    while !stop.load(Ordering::Relaxed) {
                        let request = body(number, outcomes.len() as u64);
                        outcomes.push(client.run("/v1/completions", &request, LIMIT));
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                    outcomes
                })
            })
            .collect();
        Self {
            stop,
            done,
            clients,
        }
    }

    /// Waits until `more` further requests have ended.
    ///
    /// # Errors
    /// They have not within `limit`.
    pub fn wait_for(&self, more: usize, limit: Duration) -> Result<()> {
        let wanted = self.done.load(Ordering::Relaxed) + more;
        wait::until("further requests to end", limit, || {
            match self.done.load(Ordering::Relaxed) {
                done if done >= wanted => Ok(()),
                done => Err(format!("{done} of {wanted}")),
            }
        })
    }

    /// Lets each client finish its request and returns how all of them ended.
    ///
    /// # Errors
    /// A client panicked.
    pub fn stop(self) -> Result<Vec<Outcome>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut outcomes = Vec::new();
        for client in self.clients {
            outcomes.extend(client.join().map_err(|_| anyhow!("a client panicked"))?);
        }
        Ok(outcomes)
    }
}

/// Sends `requests` with at most `clients` in flight and returns their ends in the order of the
/// requests.
///
/// # Errors
/// A client panicked.
pub fn send_all(client: &Client, clients: usize, requests: &[Value]) -> Result<Vec<Outcome>> {
    let next = AtomicUsize::new(0);
    let mut outcomes = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..clients)
            .map(|_| {
                scope.spawn(|| {
                    let mut mine = Vec::new();
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(request) = requests.get(index) else {
                            return mine;
                        };
                        mine.push((index, client.run("/v1/completions", request, LIMIT)));
                    }
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().map_err(|_| anyhow!("a client panicked")))
            .collect::<Result<Vec<_>>>()
    })?
    .concat();
    outcomes.sort_by_key(|(index, _)| *index);
    Ok(outcomes.into_iter().map(|(_, outcome)| outcome).collect())
}

/// The completions of requests that all have to be served.
///
/// # Errors
/// One was not; the message says which and how it ended.
pub fn all_done(outcomes: Vec<Outcome>) -> Result<Vec<Completion>> {
    ensure!(!outcomes.is_empty(), "no request was sent");
    outcomes
        .into_iter()
        .enumerate()
        .map(|(index, outcome)| {
            outcome
                .done()
                .map_err(|error| error.context(format!("request {index}")))
        })
        .collect()
}

/// Asserts that every request ended in tokens or in an error that its client can read.
///
/// # Errors
/// One did not.
pub fn all_clear(outcomes: &[Outcome]) -> Result<()> {
    ensure!(!outcomes.is_empty(), "no request was sent");
    for (index, outcome) in outcomes.iter().enumerate() {
        ensure!(outcome.is_clear(), "request {index} ended in {outcome:?}");
    }
    Ok(())
}

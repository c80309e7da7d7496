//! Sends the workload and collects what comes back.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{sync::Semaphore, task::JoinSet};

use super::{
    ServeArgs,
    client::{Answer, Client, Failure},
    workload::Workload,
};
use crate::report::Histogram;

/// Everything that was measured.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) model: String,
    /// From the first start to the last end.
    pub(super) elapsed: Duration,
    pub(super) ttft: Histogram,
    pub(super) itl: Histogram,
    pub(super) tpot: Histogram,
    pub(super) total: Histogram,
    /// How late requests started in an open loop.
    pub(super) lag: Histogram,
    pub(super) input_tokens: u64,
    pub(super) output_tokens: u64,
    pub(super) cached_tokens: u64,
    pub(super) failures: BTreeMap<Failure, u64>,
}

struct Sent {
    lag: Duration,
    result: Result<Answer, Failure>,
}

pub(super) async fn run(
    args: &ServeArgs,
    client: Client,
    workload: Workload,
) -> anyhow::Result<Outcome> {
    for i in 0..args.warmup {
        let (prompt, output_tokens) = workload.request(workload.len() + i);
        // A failure shows in the measurement as well.
        let _ = client
            .generate(&prompt, output_tokens, Instant::now())
            .await;
    }
    let mut outcome = Outcome::new(client.model());
    let start = Instant::now();
    let bound = Duration::from_secs_f64(args.duration);
    match workload.arrivals() {
        None => {
            let loops = closed(args, &client, &workload, start + bound);
            outcome.collect(loops).await?;
        }
        Some(arrivals) => {
            open(
                args,
                &client,
                &workload,
                &arrivals,
                start,
                bound,
                &mut outcome,
            )
            .await?;
        }
    }
    outcome.elapsed = start.elapsed();
    Ok(outcome)
}

fn closed(
    args: &ServeArgs,
    client: &Client,
    workload: &Workload,
    deadline: Instant,
) -> JoinSet<Vec<Sent>> {
    let next = Arc::new(AtomicUsize::new(0));
    let mut loops = JoinSet::new();
    for _ in 0..args.concurrency.min(workload.len()) {
        let (client, workload, next) = (client.clone(), workload.clone(), Arc::clone(&next));
        loops.spawn(async move {
            let mut sent = Vec::new();
            while Instant::now() < deadline {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= workload.len() {
                    break;
                }
                let (prompt, output_tokens) = workload.request(number);
                let result = client
                    .generate(&prompt, output_tokens, Instant::now())
                    .await;
                sent.push(Sent {
                    lag: Duration::ZERO,
                    result,
                });
            }
            sent
        });
    }
    loops
}

async fn open(
    args: &ServeArgs,
    client: &Client,
    workload: &Workload,
    arrivals: &[Duration],
    start: Instant,
    bound: Duration,
    outcome: &mut Outcome,
) -> anyhow::Result<()> {
    let places = Arc::new(Semaphore::new(args.in_flight_max));
    let mut requests: JoinSet<Vec<Sent>> = JoinSet::new();
    for (number, &at) in arrivals
        .iter()
        .enumerate()
        .take_while(|(_, at)| **at < bound)
    {
        // Made before its time, so that long prompts do not delay their own start.
        let (prompt, output_tokens) = workload.request(number);
        tokio::time::sleep_until((start + at).into()).await;
        while let Some(done) = requests.try_join_next() {
            outcome.add(done?);
        }
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            *outcome.failures.entry(Failure::NotSent).or_default() += 1;
            continue;
        };
        let client = client.clone();
        requests.spawn(async move {
            let scheduled = start + at;
            let lag = scheduled.elapsed();
            let result = client.generate(&prompt, output_tokens, scheduled).await;
            drop(place);
            vec![Sent { lag, result }]
        });
    }
    outcome.collect(requests).await
}

impl Outcome {
    fn new(model: &str) -> Self {
        Self {
            model: model.to_owned(),
            elapsed: Duration::ZERO,
            ttft: Histogram::new(),
            itl: Histogram::new(),
            tpot: Histogram::new(),
            total: Histogram::new(),
            lag: Histogram::new(),
            input_tokens: 0,
            output_tokens: 0,
            cached_tokens: 0,
            failures: BTreeMap::new(),
        }
    }

    pub(super) fn succeeded(&self) -> u64 {
        self.total.len()
    }

    pub(super) fn failed(&self) -> u64 {
        self.failures.values().sum()
    }

    pub(super) fn failures_text(&self) -> String {
        let kinds: Vec<String> = self
            .failures
            .iter()
            .map(|(failure, count)| format!("{} {count}", failure.name()))
            .collect();
        if kinds.is_empty() {
            "none was sent".to_owned()
        } else {
            kinds.join(", ")
        }
    }

    async fn collect(&mut self, mut tasks: JoinSet<Vec<Sent>>) -> anyhow::Result<()> {
        while let Some(done) = tasks.join_next().await {
            self.add(done?);
        }
        Ok(())
    }

    fn add(&mut self, sent: Vec<Sent>) {
        for Sent { lag, result } in sent {
            self.lag.record(lag);
            match result {
                Err(failure) => *self.failures.entry(failure).or_default() += 1,
                Ok(answer) => self.add_answer(&answer),
            }
        }
    }

    fn add_answer(&mut self, answer: &Answer) {
        self.ttft.record(answer.ttft);
        self.total.record(answer.total);
        for &gap in &answer.gaps {
            self.itl.record(gap);
        }
        let usage = answer.usage;
        if usage.completion_tokens > 1 {
            let decoding = answer.total.saturating_sub(answer.ttft);
            self.tpot.record(decoding / (usage.completion_tokens - 1));
        }
        self.input_tokens += u64::from(usage.prompt_tokens);
        self.output_tokens += u64::from(usage.completion_tokens);
        self.cached_tokens += usage
            .prompt_tokens_details
            .map_or(0, |details| u64::from(details.cached_tokens));
    }
}

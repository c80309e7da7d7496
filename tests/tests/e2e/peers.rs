//! Blocks from the host memory of another worker: the same tokens, nothing computed twice, and a lender
//! that stops or dies costs time and nothing else.

use std::{
    net::Ipv4Addr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use blockplane_protocol::LoadReport;
use blockplane_tests::{
    Client, Cluster, ClusterBuilder, Role,
    client::Completion,
    cluster::free_port,
    fixtures,
    health::{self, Health},
    process::{self, Signal},
    prompts::Random,
    requests,
    traffic::LIMIT,
    wait,
};

/// The checkpoint of these tests.
const MODEL: &str = "qwen3";
/// Tokens of a prompt: 25 blocks, of which 24 can be found again.
const PROMPT_TOKENS: u64 = 400;
const PROMPT_BLOCKS: f64 = 25.0;
const CACHED_TOKENS: u64 = 384;
/// Tokens of a prompt that has no full block.
const SHORT_TOKENS: u64 = 5;
/// After this long every worker has reported what it did: they do within 250 ms.
const REPORTED: Duration = Duration::from_millis(600);
/// Longest time for one transfer towards the engine.
const ONBOARD_MS: u64 = 1500;
/// What a request takes at most whose lender stops in the middle: a lease is waited for half a second,
/// a transfer for its time, then the prompt is computed, on a busy machine.
const IN_TIME: Duration = Duration::from_millis(4 * ONBOARD_MS);

/// A worker, its metrics and its id.
struct Member {
    pid: u32,
    id: String,
    metrics: Client,
}

/// Workers that exchange blocks, behind a frontend that takes them in turn.
struct Scene {
    cluster: Cluster,
    client: Client,
    members: Vec<Member>,
    prompts: Random,
}

impl Scene {
    fn new(roles: &[Role]) -> Result<Self> {
        let mut cluster = ClusterBuilder::new()
            .checkpoint(&fixtures::checkpoint(MODEL)?)
            .worker_arguments(&["--threads", "1", "--blocks", "120"])
            .frontend_arguments(&["--router-mode", "round-robin"])
            .variable("DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS", &600)
            .variable("DYN_KVBM_PEERS_ENABLED", &true)
            .variable("DYN_KVBM_ONBOARD_TIMEOUT_MS", &ONBOARD_MS)
            .variable("DYN_KVBM_METRICS", &true)
            .empty()?;
        cluster.start_frontend()?;
        let client = cluster.client();
        let mut scene = Self {
            cluster,
            client,
            members: Vec::new(),
            prompts: Random::new(17),
        };
        for role in roles {
            let member = scene.start(*role)?;
            scene.members.push(member);
        }
        scene.meet()?;
        Ok(scene)
    }

    /// Starts a worker and waits until the frontend knows it.
    fn start(&mut self, role: Role) -> Result<Member> {
        let port = free_port()?;
        let arguments = ["--kvbm-metrics-port", &port.to_string()];
        let pid = self.cluster.start_worker_with(role, &arguments)?;
        let known: Vec<String> = self.members.iter().map(|m| m.id.clone()).collect();
        let id = wait::until("the worker to be known", LIMIT, || {
            let health = Health::read(&self.client).map_err(|error| format!("{error:#}"))?;
            let mut ready = health.workers.iter().filter(|w| w.state == "ready");
            let new = ready.find(|worker| !known.contains(&worker.id));
            new.map(|worker| worker.id.clone())
                .ok_or_else(|| format!("{health:?}"))
        })?;
        let metrics = Client::new((Ipv4Addr::LOCALHOST, port).into());
        Ok(Member { pid, id, metrics })
    }

    /// Waits until all can read each other's blocks.
    fn meet(&self) -> Result<()> {
        let others = self.members.len() as f64 - 1.0;
        for member in &self.members {
            member.wait_metric("kvbm_peers{state=\"usable\"}", |n| n == others)?;
        }
        Ok(())
    }

    fn prompt(&mut self) -> Vec<u64> {
        self.prompts.tokens(PROMPT_TOKENS, requests::VOCABULARY)
    }

    fn load(&self, member: usize) -> Result<LoadReport> {
        let health = Health::read(&self.client)?;
        let id = &self.members[member].id;
        let worker = health.workers.iter().find(|worker| worker.id == *id);
        let load = worker.and_then(|worker| worker.load.first());
        load.copied().with_context(|| format!("{id} in {health:?}"))
    }

    /// Waits for what a worker says of itself. Its reports are up to 250 ms old.
    fn wait_load(
        &self,
        member: usize,
        what: &str,
        holds: impl Fn(&LoadReport) -> bool,
    ) -> Result<LoadReport> {
        wait::until(what, Duration::from_secs(5), || {
            let load = self.load(member).map_err(|error| format!("{error:#}"))?;
            if holds(&load) {
                Ok(load)
            } else {
                Err(format!("{load:?}"))
            }
        })
    }

    /// Asks short prompts until it is the turn of one of two workers.
    fn aim(&mut self, member: usize) -> Result<()> {
        for _ in 0..8 {
            wait::pass(REPORTED);
            let before = [self.load(0)?, self.load(1)?].map(|load| load.prefill_tokens_total);
            let short = self.prompts.tokens(SHORT_TOKENS, requests::VOCABULARY);
            ask(&self.client, &short)?;
            let took = wait::until("somebody to have served it", LIMIT, || {
                let changed = |at: usize| -> Result<bool, String> {
                    let load = self.load(at).map_err(|error| format!("{error:#}"))?;
                    Ok(load.prefill_tokens_total > before[at])
                };
                match [changed(0), changed(1)] {
                    [Ok(true), _] => Ok(0),
                    [_, Ok(true)] => Ok(1),
                    other => Err(format!("{other:?}")),
                }
            })?;
            if took != member {
                return Ok(());
            }
        }
        anyhow::bail!("it is never the turn of worker {member}");
    }

    /// A prompt with its answer, which one of two workers has computed and the other one knows of.
    fn computed_on(&mut self, member: usize) -> Result<(Vec<u64>, Completion)> {
        let reader = &self.members[1 - member].metrics;
        let before = metric(reader, "kvbm_peer_known_blocks")?;
        let prompt = self.prompt();
        self.aim(member)?;
        let (answer, cached) = ask(&self.client, &prompt)?;
        ensure!(cached == 0, "{cached} tokens of a new prompt were cached");
        let wanted = before + PROMPT_BLOCKS;
        self.members[1 - member].wait_metric("kvbm_peer_known_blocks", |n| n >= wanted)?;
        Ok((prompt, answer))
    }

    /// Asks worker 1 for a prompt whose blocks worker 0 has, and does something to worker 0 after `delay`.
    fn disturbed(
        &mut self,
        delay: Duration,
        disturb: impl FnOnce(&mut Cluster, u32) -> Result<()>,
    ) -> Result<Vec<u64>> {
        let (prompt, answer) = self.computed_on(0)?;
        self.aim(1)?;
        let (client, pid) = (self.client.clone(), self.members[0].pid);
        let asked = prompt.clone();
        let running = thread::spawn(move || {
            let started = Instant::now();
            ask(&client, &asked).map(|(answer, _)| (answer, started.elapsed()))
        });
        wait::pass(delay);
        disturb(&mut self.cluster, pid)?;
        let joined = running.join().ok().context("the client has panicked")?;
        let (again, took) = joined.context("the request fails")?;
        ensure!(again == answer, "{again:?} is not {answer:?}");
        ensure!(took < IN_TIME, "it took {took:?}");
        Ok(prompt)
    }

    fn end(self) -> Result<()> {
        health::wait_idle(&self.client, LIMIT)?;
        self.cluster.stop()
    }
}

impl Member {
    fn wait_metric(&self, series: &str, holds: impl Fn(f64) -> bool) -> Result<f64> {
        wait::until(series, LIMIT, || {
            let value = metric(&self.metrics, series).map_err(|error| format!("{error:#}"))?;
            if holds(value) {
                Ok(value)
            } else {
                Err(format!("{value}"))
            }
        })
    }
}

/// The answer, and the tokens of the prompt that were cached.
fn ask(client: &Client, prompt: &[u64]) -> Result<(Completion, u64)> {
    let body = requests::completion(MODEL, prompt, 8);
    let mut completion = client.run("/v1/completions", &body, LIMIT).done()?;
    let usage = completion.usage.take().context("an answer has its usage")?;
    let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64();
    Ok((completion, cached.context("usage says what was cached")?))
}

/// One series of the metrics of a worker, by its name and labels.
fn metric(metrics: &Client, series: &str) -> Result<f64> {
    let text = metrics.get("/metrics", LIMIT)?.body;
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    let value = value.with_context(|| format!("{series} in {text}"))?;
    Ok(value.parse()?)
}

#[test]
fn what_one_worker_has_computed_another_one_reads() -> Result<()> {
    let mut scene = Scene::new(&[Role::Aggregated, Role::Aggregated])?;
    for _ in 0..2 {
        let (prompt, answer) = scene.computed_on(0)?;
        scene.aim(1)?;
        let before = scene.load(1)?;
        let read = "kvbm_peer_read_blocks_total{outcome=\"read\"}";
        let blocks = metric(&scene.members[1].metrics, read)?;
        let (again, cached) = ask(&scene.client, &prompt)?;
        ensure!(again == answer, "{again:?} is not {answer:?}");
        ensure!(cached == CACHED_TOKENS, "{cached} tokens were cached");
        scene.wait_load(1, "its blocks to come from the other one", |load| {
            load.cached_remote_tokens_total == before.cached_remote_tokens_total + CACHED_TOKENS
                && load.prefill_tokens_total
                    == before.prefill_tokens_total + PROMPT_TOKENS - CACHED_TOKENS
        })?;
        let reader = &scene.members[1];
        reader.wait_metric(read, |n| n >= blocks + 24.0)?;
        for outcome in ["missing", "invalid", "failed"] {
            let series = format!("kvbm_peer_read_blocks_total{{outcome=\"{outcome}\"}}");
            ensure!(metric(&reader.metrics, &series)? == 0.0, "{outcome}");
        }
        ensure!(metric(&reader.metrics, "kvbm_onboard_blocks_o2d")? >= blocks + 24.0);
        let lender = &scene.members[0];
        lender.wait_metric("kvbm_peer_lent_blocks_total", |n| n >= blocks + 24.0)?;
        lender.wait_metric("kvbm_peer_held_blocks{state=\"lent\"}", |n| n == 0.0)?;
    }
    scene.end()
}

#[test]
fn a_lender_that_stops_or_dies_costs_time_only_and_comes_back() -> Result<()> {
    let mut scene = Scene::new(&[Role::Aggregated, Role::Aggregated])?;
    // In the middle of something, somewhere else each time; the first one before it.
    for delay in [0, 2, 5, 9] {
        let delay = Duration::from_millis(delay);
        scene.disturbed(delay, |_, pid| process::send(pid, Signal::STOP))?;
        process::send(scene.members[0].pid, Signal::CONT)?;
        scene.cluster.wait_ready("the stopped worker", |health| {
            health.count("aggregated") == 2
        })?;
        scene.meet()?;
    }
    for delay in [0, 4] {
        let delay = Duration::from_millis(delay);
        let prompt = scene.disturbed(delay, Cluster::kill)?;
        // Another life of it reads from the survivor what it has lost.
        wait::until("the frontend to miss it", LIMIT, || {
            match Health::read(&scene.client) {
                Ok(health) if health.count("aggregated") == 1 => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })?;
        let answer = ask(&scene.client, &prompt)?.0;
        scene.members[0] = scene.start(Role::Aggregated)?;
        scene.meet()?;
        scene.members[0].wait_metric("kvbm_peer_known_blocks", |n| n >= PROMPT_BLOCKS)?;
        scene.aim(0)?;
        let (again, cached) = ask(&scene.client, &prompt)?;
        ensure!(again == answer, "{again:?} is not {answer:?}");
        ensure!(cached == CACHED_TOKENS, "{cached} tokens were cached");
        scene.wait_load(0, "its blocks to come from the survivor", |load| {
            load.cached_remote_tokens_total == CACHED_TOKENS
        })?;
    }
    scene.end()
}

/// A decode worker reads what a prefill worker and another decode worker have made together.
#[test]
fn roles_read_from_each_other() -> Result<()> {
    let mut scene = Scene::new(&[Role::Decode, Role::Decode, Role::Prefill])?;
    let prompt = scene.prompt();
    let (answer, cached) = ask(&scene.client, &prompt)?;
    ensure!(cached == 0, "{cached} tokens of a new prompt were cached");
    let computed = scene.wait_load(2, "the prompt to be prefilled", |load| {
        load.prefill_tokens_total >= CACHED_TOKENS
    })?;
    // Each of them is told by a decode worker and by the prefill worker, and counts once.
    for member in &scene.members {
        member.wait_metric("kvbm_peer_known_blocks", |n| n >= PROMPT_BLOCKS - 1.0)?;
    }
    let (again, cached) = ask(&scene.client, &prompt)?;
    ensure!(again == answer, "{again:?} is not {answer:?}");
    ensure!(cached == CACHED_TOKENS, "{cached} tokens were cached");
    wait::until("its blocks to come from others", LIMIT, || {
        let remote = |at: usize| scene.load(at).map(|load| load.cached_remote_tokens_total);
        match [remote(0), remote(1)] {
            [Ok(one), Ok(other)] if one + other == CACHED_TOKENS => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })?;
    let after = scene.load(2)?.prefill_tokens_total;
    ensure!(
        after - computed.prefill_tokens_total <= PROMPT_TOKENS - CACHED_TOKENS,
        "{after} tokens were prefilled, {} before",
        computed.prefill_tokens_total
    );
    scene.end()
}

//! The tiers below the pool of a real worker: what left the pool comes back the same, from host
//! memory, from disk, after a crash; and is computed again where it is damaged.

use std::{
    fs::{File, OpenOptions},
    net::Ipv4Addr,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
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
    prompts::Random,
    requests,
    traffic::LIMIT,
    wait,
};

/// The checkpoint of these tests.
const MODEL: &str = "qwen3";
/// Tokens of a prompt: 25 blocks, of which 24 can be found again.
const PROMPT_TOKENS: u64 = 400;
pub(crate) const CACHED_TOKENS: u64 = 384;
/// Blocks of the pool: little more than one request needs.
const POOL_BLOCKS: &str = "40";
/// How long copies to lower tiers may take.
const COPIES: Duration = Duration::from_secs(20);
/// A worker that writes nothing for this long has written everything.
const QUIET: Duration = Duration::from_millis(700);

/// A worker with tiers below its pool, and a frontend.
pub(crate) struct Scene {
    pub(crate) cluster: Cluster,
    pub(crate) client: Client,
    worker: u32,
    prompts: Random,
}

impl Scene {
    /// Starts both, with so many blocks in host memory and on disk (0: without).
    fn new(disk: &Path, host_blocks: u32, disk_blocks: u32) -> Result<Self> {
        Self::with(ClusterBuilder::new(), disk, host_blocks, disk_blocks)
    }

    pub(crate) fn with(
        builder: ClusterBuilder,
        disk: &Path,
        host_blocks: u32,
        disk_blocks: u32,
    ) -> Result<Self> {
        let mut builder = builder
            .checkpoint(&fixtures::checkpoint(MODEL)?)
            .worker_arguments(&["--threads", "1", "--blocks", POOL_BLOCKS])
            .variable("DYN_KVBM_DISK_CACHE_DIR", &disk.display())
            .variable("DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER", &true);
        if host_blocks > 0 {
            builder = builder.variable("DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS", &host_blocks);
        }
        if disk_blocks > 0 {
            builder = builder.variable("DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS", &disk_blocks);
        }
        let mut cluster = builder.by_hand(&[Role::Aggregated])?;
        let client = cluster.client();
        health::wait_idle(&client, LIMIT)?;
        let worker = cluster.pid(Role::Aggregated)?;
        // Fails if the worker has ended meanwhile.
        cluster.member(worker)?;
        Ok(Self {
            cluster,
            client,
            worker,
            prompts: Random::new(11),
        })
    }

    pub(crate) fn prompt(&mut self) -> Vec<u64> {
        self.prompts.tokens(PROMPT_TOKENS, requests::VOCABULARY)
    }

    /// The answer, and the tokens of the prompt that were cached.
    pub(crate) fn ask(&self, prompt: &[u64]) -> Result<(Completion, u64)> {
        self.send(&requests::completion(MODEL, prompt, 8))
    }

    /// The same with a priority.
    fn ask_with_priority(&self, prompt: &[u64], priority: u32) -> Result<(Completion, u64)> {
        let mut body = requests::completion(MODEL, prompt, 8);
        body["nvext"] = serde_json::json!({"agent_hints": {"priority": priority}});
        self.send(&body)
    }

    fn send(&self, body: &serde_json::Value) -> Result<(Completion, u64)> {
        let mut completion = self.client.run("/v1/completions", body, LIMIT).done()?;
        let usage = completion.usage.take().context("an answer has its usage")?;
        let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64();
        Ok((completion, cached.context("usage says what was cached")?))
    }

    /// Asks so many other prompts that nothing of earlier ones is left in `blocks` blocks.
    fn push_out_of(&mut self, blocks: usize) -> Result<()> {
        for _ in 0..=blocks.div_ceil(24) {
            let other = self.prompt();
            self.ask(&other)?;
        }
        Ok(())
    }

    /// What the worker says of itself. Its reports are up to 250 ms old.
    pub(crate) fn wait_load(
        &self,
        what: &str,
        holds: impl Fn(&LoadReport) -> bool,
    ) -> Result<LoadReport> {
        wait::until(what, Duration::from_secs(5), || {
            let health = Health::read(&self.client).map_err(|error| format!("{error:#}"))?;
            // One that was killed is listed, with its last report, until its lease ends.
            let mut loads = health.workers.iter().filter_map(|w| w.load.first());
            match loads.find(|load| holds(load)) {
                Some(load) => Ok(*load),
                None => Err(format!("{:?}", health.workers)),
            }
        })
    }

    /// Waits until the worker has written to disk what it was going to.
    fn wait_written(&self) -> Result<()> {
        let path = format!("/proc/{}/io", self.worker);
        let written = || -> Result<String> {
            let text = std::fs::read_to_string(&path)?;
            let line = text.lines().find(|line| line.starts_with("write_bytes"));
            Ok(line.context("the kernel counts writes")?.to_owned())
        };
        let end = Instant::now() + COPIES;
        let mut last = written()?;
        loop {
            wait::pass(QUIET);
            let now = written()?;
            if now == last {
                return Ok(());
            }
            ensure!(Instant::now() < end, "it still writes after {COPIES:?}");
            last = now;
        }
    }

    /// Kills the worker as a crash would, calls `between`, and starts it again.
    pub(crate) fn crash(&mut self, between: impl FnOnce() -> Result<()>) -> Result<()> {
        self.cluster.kill(self.worker)?;
        wait::until(
            "the frontend to miss the worker",
            LIMIT,
            || match Health::read(&self.client) {
                Ok(health) if health.count("aggregated") == 0 => Ok(()),
                other => Err(format!("{other:?}")),
            },
        )?;
        between()?;
        self.worker = self.cluster.start_worker(Role::Aggregated)?;
        let pid = self.worker;
        self.cluster.wait_ready("the worker is back", |health| {
            health.count("aggregated") == 1
        })?;
        ensure!(self.cluster.pid(Role::Aggregated)? == pid, "another worker");
        Ok(())
    }
}

/// The worker's file for G3.
pub(crate) fn store_file(folder: &Path) -> Result<PathBuf> {
    let mut files = std::fs::read_dir(folder)?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>>>()?;
    files.retain(|path| path.is_file());
    files.sort_by_key(|path| path.metadata().map_or(0, |data| data.len()));
    files.pop().context("G3 has a file")
}

#[test]
fn what_left_the_pool_comes_back_from_host_memory_and_from_disk() -> Result<()> {
    for (host_blocks, disk_blocks) in [(400, 0), (60, 600), (0, 600)] {
        eprintln!("{host_blocks} blocks in host memory, {disk_blocks} on disk");
        let folder = tempfile::tempdir()?;
        let mut scene = Scene::new(folder.path(), host_blocks, disk_blocks)?;
        let prompt = scene.prompt();
        let (first, cached) = scene.ask(&prompt)?;
        ensure!(cached == 0, "{cached} tokens of a new prompt were cached");
        let (again, cached) = scene.ask(&prompt)?;
        ensure!(
            again == first && cached == CACHED_TOKENS,
            "from the pool: {cached}"
        );
        scene.wait_written()?;
        scene.push_out_of(if disk_blocks > 0 { 100 } else { 40 })?;
        let (again, cached) = scene.ask(&prompt)?;
        ensure!(again == first, "{again:?} is not {first:?}");
        ensure!(cached == CACHED_TOKENS, "{cached} tokens were cached");
        let load = scene.wait_load("what was loaded", |load| {
            load.cached_host_tokens_total + load.cached_disk_tokens_total > 0
        })?;
        let from_disk = disk_blocks > 0;
        ensure!(
            (load.cached_disk_tokens_total >= CACHED_TOKENS) == from_disk,
            "{load:?}"
        );
        health::wait_idle(&scene.client, LIMIT)?;
        scene.cluster.stop()?;
    }
    Ok(())
}

#[test]
fn blocks_of_a_request_below_the_threshold_stay_in_the_pool() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let builder = ClusterBuilder::new().variable("DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY", &50);
    let mut scene = Scene::with(builder, folder.path(), 400, 0)?;
    for (priority, found) in [(49, 0), (50, CACHED_TOKENS)] {
        let prompt = scene.prompt();
        let (first, _) = scene.ask_with_priority(&prompt, priority)?;
        let (again, cached) = scene.ask_with_priority(&prompt, priority)?;
        ensure!(again == first && cached == CACHED_TOKENS, "{cached}");
        // Requests without a priority do go to host memory.
        scene.push_out_of(40)?;
        let (again, cached) = scene.ask_with_priority(&prompt, priority)?;
        ensure!(again == first, "{again:?} is not {first:?}");
        ensure!(cached == found, "priority {priority}: {cached} cached");
    }
    health::wait_idle(&scene.client, LIMIT)?;
    scene.cluster.stop()
}

/// A crash loses nothing that was written; what is damaged afterwards is computed again.
#[test]
fn the_disk_tier_outlives_a_crash_and_damage_to_its_file() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut scene = Scene::new(folder.path(), 60, 600)?;
    let prompts = [scene.prompt(), scene.prompt()];
    let first = scene.ask(&prompts[0])?.0;
    let second = scene.ask(&prompts[1])?.0;
    scene.wait_written()?;

    scene.crash(|| Ok(()))?;
    let (again, cached) = scene.ask(&prompts[0])?;
    ensure!(again == first, "{again:?} is not {first:?}");
    ensure!(
        cached == CACHED_TOKENS,
        "{cached} tokens were there after the crash"
    );
    scene.wait_load("what was loaded", |load| {
        load.cached_disk_tokens_total == CACHED_TOKENS
    })?;

    let file = store_file(folder.path())?;
    scene.crash(|| flip_bits(&file))?;
    let (again, _) = scene.ask(&prompts[1])?;
    ensure!(again == second, "{again:?} is not {second:?}");
    let (again, _) = scene.ask(&prompts[0])?;
    ensure!(again == first, "{again:?} is not {first:?}");
    scene.wait_load("the damage to be noticed", |load| {
        load.onboard_failures_total > 0
    })?;
    health::wait_idle(&scene.client, LIMIT)?;
    scene.cluster.stop()
}

/// Damages a bit every few pages in the last nine tenths of a file: mostly payloads.
fn flip_bits(path: &Path) -> Result<()> {
    let file: File = OpenOptions::new().read(true).write(true).open(path)?;
    let len = file.metadata()?.len();
    let mut byte = [0];
    let mut at = len / 10;
    while at < len {
        file.read_exact_at(&mut byte, at)?;
        file.write_all_at(&[byte[0] ^ 0x10], at)?;
        at += 4096 * 3 + 17;
    }
    Ok(())
}

/// A sample of the metrics of the tiers: the sum over its labels.
pub(crate) fn sample(text: &str, name: &str) -> f64 {
    let value = |line: &str| -> Option<f64> {
        let rest = line.strip_prefix(name)?;
        if !rest.starts_with(['{', ' ']) {
            return None;
        }
        rest.rsplit(' ').next()?.parse().ok()
    };
    text.lines().filter_map(value).sum()
}

#[test]
fn metrics_and_the_record_tell_what_happened() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let record = folder.path().join("record.jsonl");
    let port = free_port()?;
    let builder = ClusterBuilder::new()
        .variable("DYN_KVBM_METRICS", &true)
        .variable("DYN_KVBM_METRICS_PORT", &port)
        .variable("DYN_KVBM_ENABLE_RECORD", &1)
        .variable("DYN_KVBM_RECORD_PATH", &record.display());
    let disk = folder.path().join("disk");
    std::fs::create_dir(&disk)?;
    let mut scene = Scene::with(builder, &disk, 60, 600)?;
    let prompt = scene.prompt();
    let (first, _) = scene.ask(&prompt)?;
    scene.wait_written()?;
    scene.push_out_of(100)?;
    let (again, cached) = scene.ask(&prompt)?;
    ensure!(again == first && cached == CACHED_TOKENS, "{cached} cached");
    let metrics = Client::new((Ipv4Addr::LOCALHOST, port).into());
    let text = metrics.get("/metrics", LIMIT)?.body;
    for (name, least) in [
        ("kvbm_matched_tokens", 384.0),
        ("kvbm_offload_blocks_d2h", 24.0),
        ("kvbm_offload_blocks_h2d", 24.0),
        ("kvbm_onboard_blocks_d2d", 24.0),
        ("kvbm_transfer_bytes_total", 1.0),
        ("kvbm_disk_written_bytes_total", 1.0),
    ] {
        ensure!(sample(&text, name) >= least, "{name}:\n{text}");
    }
    ensure!(sample(&text, "kvbm_invalid_blocks_total") == 0.0, "{text}");

    // What is recorded is written after a second without requests.
    let requests = 8;
    wait::until("the record to be written", LIMIT, || {
        let text = std::fs::read_to_string(&record).map_err(|error| error.to_string())?;
        let lines = text.lines().count();
        let outputs = text.matches("\"output_length\":8,").count();
        if lines >= requests && outputs == lines {
            Ok(())
        } else {
            Err(format!("{lines} lines, {outputs} with 8 tokens of output"))
        }
    })?;

    // What is damaged is counted, too.
    let file = store_file(&disk)?;
    scene.crash(|| flip_bits(&file))?;
    let (again, _) = scene.ask(&prompt)?;
    ensure!(again == first, "{again:?} is not {first:?}");
    wait::until("the damage to be counted", LIMIT, || {
        let text = metrics
            .get("/metrics", LIMIT)
            .map_err(|e| format!("{e:#}"))?;
        if sample(&text.body, "kvbm_invalid_blocks_total") > 0.0 {
            Ok(())
        } else {
            Err(text.body)
        }
    })?;
    // The record is a trace.
    let arguments = ["kvbm", "replay", "--g1-blocks", "40", "--json"].map(str::to_owned);
    let arguments = [&arguments[..], &[record.display().to_string()]].concat();
    let mut replay = scene.cluster.start("replay", &arguments)?;
    let status = replay.wait(LIMIT)?;
    let log = replay.log();
    ensure!(status.success(), "{log:?}");
    let last: serde_json::Value = serde_json::from_str(log.last().context("a line")?)?;
    ensure!(last["hit_percent"].is_number(), "{last}");
    scene.cluster.stop()
}

#[test]
fn config_says_where_each_setting_comes_from_and_fails_for_what_cannot_work() -> Result<()> {
    let cluster = ClusterBuilder::new()
        .variable("DYN_KVBM_CPU_CACHE_GB", &"0.5")
        .variable("DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER", &"false")
        .empty()?;
    let run = |more: &[&str]| -> Result<(bool, String)> {
        let arguments = [&["kvbm", "config", "--block-bytes", "1000000"], more].concat();
        let arguments: Vec<String> = arguments.into_iter().map(str::to_owned).collect();
        let mut config = cluster.start("config", &arguments)?;
        let status = config.wait(LIMIT)?;
        Ok((status.success(), config.log().join("\n")))
    };
    let (fine, text) = run(&[])?;
    let row = |name: &str| text.lines().find(|line| line.starts_with(name));
    let cpu = row("DYN_KVBM_CPU_CACHE_GB").context("a row for each setting")?;
    ensure!(fine, "{text}");
    ensure!(cpu.contains("0.5") && cpu.contains("variable"), "{cpu}");
    ensure!(text.contains("500"), "500 blocks of 1 MB: {text}");
    let (_, json) = run(&["--kvbm-cpu-cache-gb", "0.25", "--json"])?;
    let report: serde_json::Value = serde_json::from_str(&json).with_context(|| json.clone())?;
    ensure!(report["sizes"]["host_blocks"] == 250, "{report}");
    // More memory than any machine has.
    let (fine, text) = run(&["--kvbm-cpu-cache-gb", "900000"])?;
    ensure!(!fine && text.contains("error: "), "{text}");
    Ok(())
}

#[test]
fn a_setting_that_is_not_known_ends_the_worker_with_the_nearest_name() -> Result<()> {
    let cluster = ClusterBuilder::new()
        .checkpoint(&fixtures::checkpoint(MODEL)?)
        .variable("DYN_KVBM_CPU_CACHE_GIB", &1)
        .empty()?;
    let arguments = [
        "worker".to_owned(),
        "--discovery".to_owned(),
        cluster.discovery(),
        "--model".to_owned(),
        fixtures::checkpoint(MODEL)?.display().to_string(),
    ];
    let mut worker = cluster.start("worker", &arguments)?;
    let status = worker.wait(LIMIT)?;
    ensure!(!status.success(), "it started");
    let log = worker.log().join("\n");
    ensure!(
        log.contains("DYN_KVBM_CPU_CACHE_GIB") && log.contains("DYN_KVBM_CPU_CACHE_GB"),
        "{log}"
    );
    Ok(())
}

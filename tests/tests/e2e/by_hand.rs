//! Frontend and workers started one by one, joining and leaving while requests run.

use std::time::Duration;

use anyhow::{Result, ensure};
use blockplane_tests::{
    Cluster, ClusterBuilder, Role,
    cluster::STOP,
    fixtures, health,
    process::Signal,
    prompts::Random,
    requests,
    traffic::{LIMIT, Traffic, all_done},
    wait,
};

const MODEL: &str = "qwen3";

fn builder() -> Result<ClusterBuilder> {
    Ok(ClusterBuilder::new()
        .checkpoint(&fixtures::checkpoint(MODEL)?)
        .worker_arguments(&["--threads", "1", "--blocks", "512"]))
}

/// Traffic whose prompts share nothing, long enough to be prefilled remotely.
fn traffic(cluster: &Cluster, clients: u64) -> Traffic {
    Traffic::start(&cluster.client(), clients, |client, number| {
        let mut random = Random::new(client << 32 | number);
        requests::streamed(MODEL, &random.tokens(150, requests::VOCABULARY), 8)
    })
}

/// Workers may come before or after the frontend; `--is-prefill-worker` is `--role prefill`.
#[test]
fn processes_find_each_other_in_any_order() -> Result<()> {
    let mut cluster = builder()?.empty()?;
    cluster.start_worker(Role::Decode)?;
    cluster.start_frontend()?;
    cluster.wait_ready("a decode worker", |health| health.count("decode") == 1)?;
    let body = requests::completion(MODEL, &[9; 64], 8);
    let alone = cluster
        .client()
        .run("/v1/completions", &body, LIMIT)
        .done()?;

    let arguments = [
        "worker",
        "--is-prefill-worker",
        "--endpoint",
        "dyn://test.prefill.generate",
        "--discovery",
        &cluster.discovery(),
        "--model",
        &fixtures::checkpoint(MODEL)?.display().to_string(),
        "--threads",
        "1",
        "--blocks",
        "512",
    ]
    .map(str::to_owned);
    let prefill = cluster.start("prefill-alias", &arguments)?;
    cluster.adopt(Role::Prefill, prefill);
    cluster.wait_ready("the prefill worker too", |health| {
        health.count("prefill") == 1
    })?;
    let body = requests::completion(MODEL, &[9; 64], 8);
    let together = cluster
        .client()
        .run("/v1/completions", &body, LIMIT)
        .done()?;
    ensure!(alone.tokens == together.tokens, "{alone:?} {together:?}");
    cluster.stop()
}

/// A second worker of a role is used without a restart; the first one leaves on SIGTERM without an
/// error to any client.
#[test]
fn workers_join_and_leave_under_traffic() -> Result<()> {
    for role in [Role::Prefill, Role::Decode] {
        eprintln!("role {role:?}");
        let mut cluster = builder()?.by_hand(&[Role::Prefill, Role::Decode])?;
        let first = cluster.pid(role)?;
        let traffic = traffic(&cluster, 4);
        traffic.wait_for(8, LIMIT)?;

        cluster.start_worker(role)?;
        let client = cluster.client();
        wait::until("the second worker to be used", LIMIT, || {
            let health = health::Health::read(&client).map_err(|error| error.to_string())?;
            let used = health
                .workers
                .iter()
                .filter(|worker| worker.role == role.name())
                .filter(|worker| {
                    worker
                        .load
                        .iter()
                        .any(|load| load.prefill_tokens_total + load.decode_tokens_total > 0)
                })
                .count();
            if used == 2 {
                Ok(())
            } else {
                Err(format!("{health:?}"))
            }
        })?;

        let leaving = cluster.member(first)?;
        leaving.signal(Signal::TERM)?;
        let status = leaving.wait(STOP)?;
        ensure!(status.success(), "the leaving worker ended with {status}");
        cluster.wait_ready("the worker to be gone", |health| {
            health.count(role.name()) == 1
        })?;
        traffic.wait_for(8, LIMIT)?;
        let completions = all_done(traffic.stop()?)?;
        eprintln!("{} requests, none failed", completions.len());
        health::wait_idle(&client, LIMIT)?;
        cluster.stop()?;
    }
    Ok(())
}

/// Invariant 6: with the discovery directory gone, what runs goes on running.
#[test]
fn losing_the_discovery_directory_loses_nothing_that_runs() -> Result<()> {
    let cluster = builder()?.by_hand(&[Role::Prefill, Role::Decode])?;
    let traffic = traffic(&cluster, 2);
    traffic.wait_for(4, LIMIT)?;
    std::fs::remove_dir_all(cluster.folder().join("discovery"))?;
    // Longer than the lease (10 s by default) plus a renewal: an expired worker would show by now.
    let lease = Duration::from_secs(15);
    let since = std::time::Instant::now();
    while since.elapsed() < lease {
        traffic.wait_for(10, LIMIT)?;
    }
    all_done(traffic.stop()?)?;
    cluster.stop()
}

/// A frontend without workers says so, in `/health` and to a client.
#[test]
fn a_frontend_without_workers_is_not_ready() -> Result<()> {
    let mut cluster = builder()?.empty()?;
    cluster.start_frontend()?;
    let client = cluster.client();
    wait::until("the frontend to answer", LIMIT, || {
        client
            .get("/live", LIMIT)
            .map_err(|error| error.to_string())
    })?;
    let health = client.get("/health", LIMIT)?;
    ensure!(health.status == 503, "{health:?}");
    let body = requests::completion(MODEL, &[1], 1).to_string();
    let answer = client.post("/v1/completions", body.as_bytes(), LIMIT)?;
    ensure!(answer.status == 404 || answer.status == 503, "{answer:?}");
    answer.error()?;
    cluster.stop()
}

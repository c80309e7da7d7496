//! Workers whose engine is a vLLM server, here one that `tests/python/vllm_stand_in.py` plays: it dies,
//! hangs and answers nonsense when told to.

use std::{
    net::{Ipv4Addr, SocketAddr},
    ops::ControlFlow,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use blockplane_tests::{
    Client, Cluster, ClusterBuilder, Outcome, Role, fixtures, proc_table,
    process::{self, Signal},
    requests, wait,
};
use serde_json::{Value, json};

/// The checkpoint whose tokenizer the frontend uses.
const MODEL: &str = "qwen3";
/// For anything that has to happen.
const LIMIT: Duration = Duration::from_secs(30);

/// Frontend and workers, each with a server of its own.
struct Scene {
    cluster: Cluster,
    client: Client,
}

/// One played server.
#[derive(Clone, Debug)]
struct Server {
    pid: u32,
    client: Client,
}

impl Scene {
    fn new(workers: &[Role], more: &[&str]) -> Result<Self> {
        let program = fixtures::repository().join("tests/python/vllm_stand_in.py");
        let program = program.display().to_string();
        let mut arguments = vec!["--engine", "vllm", "--vllm-program", &program];
        arguments.extend(["--remote-prefill-min-tokens", "1"]);
        arguments.extend(more);
        let cluster = ClusterBuilder::new()
            .checkpoint(&fixtures::checkpoint(MODEL)?)
            .frontend_arguments(&[
                "--remote-prefill-min-tokens",
                "1",
                "--router-mode",
                "round-robin",
            ])
            .worker_arguments(&arguments)
            .by_hand(workers)?;
        let client = cluster.client();
        Ok(Self { cluster, client })
    }

    /// The server of the last life of a worker, from what it wrote.
    fn server(&mut self, worker: u32) -> Result<Server> {
        let log = self.cluster.member(worker)?.log();
        let line = log
            .iter()
            .rev()
            .find_map(|line| line.strip_prefix("[vllm] stand-in pid "))
            .context("the server says where it is")?;
        let (pid, port) = line.split_once(" port ").context("pid and port")?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port.parse()?));
        Ok(Server {
            pid: pid.parse()?,
            client: Client::new(address),
        })
    }

    fn servers(&mut self, role: Role) -> Result<Vec<(u32, Server)>> {
        let pids: Vec<u32> = self.cluster.processes(role).iter().map(|e| e.pid).collect();
        pids.into_iter()
            .map(|pid| Ok((pid, self.server(pid)?)))
            .collect()
    }

    fn run(&self, body: &Value) -> Outcome {
        self.client.run("/v1/completions", body, LIMIT)
    }

    fn wait_workers(&mut self, role: Role, count: usize) -> Result<()> {
        let what = format!("{count} {} workers", role.name());
        self.cluster
            .wait_ready(&what, |health| health.count(role.name()) == count)?;
        Ok(())
    }

    /// Everything ends cleanly, and nothing of any server is left.
    fn end(self) -> Result<()> {
        self.cluster.stop()
    }
}

impl Server {
    fn control(&self, order: &Value) -> Result<()> {
        let sent = self
            .client
            .post("/control", order.to_string().as_bytes(), LIMIT);
        // One that was told to die does not answer.
        ensure!(
            sent.is_ok_and(|answer| answer.status == 200) || order.get("die").is_some(),
            "{order} was not taken"
        );
        Ok(())
    }

    fn counters(&self) -> Result<Value> {
        self.client.get("/counters", LIMIT)?.json()
    }

    fn wait_counter(&self, name: &str, at_least: u64) -> Result<()> {
        wait::until(&format!("{at_least} {name}"), LIMIT, || {
            let counters = self.counters().map_err(|error| format!("{error:#}"))?;
            let reached = counters[name].as_u64().is_some_and(|n| n >= at_least);
            if reached {
                Ok(())
            } else {
                Err(counters.to_string())
            }
        })
    }
}

fn prompt(seed: u64, tokens: u64) -> Vec<u64> {
    (0..tokens)
        .map(|i| 10 + (i * 13 + seed * 101) % 400)
        .collect()
}

fn gone(pid: u32) -> Result<()> {
    wait::until(
        &format!("the end of process {pid}"),
        LIMIT,
        || match proc_table::entry(pid).filter(|entry| entry.state != 'Z') {
            None => Ok(()),
            Some(entry) => Err(format!("{entry:?}")),
        },
    )
}

/// Tokens, log-probabilities, usage and ranks through one server, and a restart of everything.
#[test]
fn a_request_gets_what_the_server_says() -> Result<()> {
    let mut scene = Scene::new(&[Role::Aggregated], &["--data-parallel-size", "2"])?;
    let body = requests::completion(MODEL, &prompt(1, 40), 8);
    let plain = scene.run(&body).done()?;
    ensure!(plain.tokens.len() == 8 && plain.finish_reason.as_deref() == Some("length"));
    let streamed = requests::streamed(MODEL, &prompt(1, 40), 8);
    let streamed = scene.run(&streamed).done()?;
    ensure!(streamed.tokens == plain.tokens, "{streamed:?} {plain:?}");
    let usage = plain.usage.context("usage")?;
    ensure!(
        usage["prompt_tokens"] == 40 && usage["completion_tokens"] == 8,
        "{usage}"
    );
    let (_, server) = scene.servers(Role::Aggregated)?.remove(0);
    let last = &server.counters()?["last"];
    ensure!(last["rank"] == "0" || last["rank"] == "1", "{last}");
    ensure!(
        last["body"]["sampling_params"]["detokenize"] == false,
        "{last}"
    );

    server.control(&json!({"status": 400}))?;
    match scene.run(&body) {
        Outcome::Refused { status: 400, error } => {
            ensure!(error.message.contains("told to refuse"), "{error:?}");
        }
        other => anyhow::bail!("{other:?}"),
    }
    server.control(&json!({"status": null}))?;
    scene.run(&body).done()?;
    scene.end()
}

/// A client that goes away takes its request with it, in prefill and in decode.
#[test]
fn a_client_that_leaves_aborts_in_vllm() -> Result<()> {
    let mut scene = Scene::new(&[Role::Aggregated], &[])?;
    let (_, server) = scene.servers(Role::Aggregated)?.remove(0);
    server.control(&json!({"token_ms": 20}))?;
    let body = requests::streamed(MODEL, &prompt(2, 20), 500);
    let left = scene
        .client
        .run_with("/v1/completions", &body, LIMIT, &mut |so_far| {
            if so_far.chunks < 3 {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        });
    ensure!(matches!(left, Outcome::Left(_)), "{left:?}");
    server.wait_counter("aborts", 1)?;

    server.control(&json!({"prefill_ms": 60_000}))?;
    let hung = scene
        .client
        .run("/v1/completions", &body, Duration::from_millis(500));
    ensure!(matches!(hung, Outcome::Hung(_)), "{hung:?}");
    server.wait_counter("aborts", 2)?;
    ensure!(server.counters()?["active"] == 0);
    server.control(&json!({"prefill_ms": 0, "token_ms": 0}))?;
    scene.end()
}

/// kill -9 of vLLM with requests in it: they go on elsewhere, and it comes back.
#[test]
fn a_killed_server_loses_no_request() -> Result<()> {
    let mut scene = Scene::new(&[Role::Aggregated, Role::Aggregated], &[])?;
    let servers = scene.servers(Role::Aggregated)?;
    let bodies: Vec<Value> = (0..6)
        .map(|i| requests::streamed(MODEL, &prompt(i, 30), 60))
        .collect();
    let expected: Vec<Vec<String>> = bodies
        .iter()
        .map(|body| Ok(scene.run(body).done()?.tokens))
        .collect::<Result<_>>()?;
    for (_, server) in &servers {
        server.control(&json!({"token_ms": 20}))?;
    }
    let threads: Vec<_> = bodies
        .iter()
        .map(|body| {
            let (client, body) = (scene.client.clone(), body.clone());
            std::thread::spawn(move || client.run("/v1/completions", &body, LIMIT))
        })
        .collect();
    let (worker, victim) = servers[0].clone();
    wait::until("requests in the server", LIMIT, || {
        let counters = victim.counters().map_err(|error| format!("{error:#}"))?;
        let busy = counters["active"].as_u64() >= Some(2);
        if busy {
            Ok(())
        } else {
            Err(counters.to_string())
        }
    })?;
    process::send(victim.pid, Signal::KILL)?;
    for (thread, expected) in threads.into_iter().zip(&expected) {
        let outcome = thread.join().expect("a client does not panic");
        let tokens = outcome.done()?.tokens;
        ensure!(tokens == *expected, "{tokens:?} {expected:?}");
    }
    scene.wait_workers(Role::Aggregated, 2)?;
    let again = scene.server(worker)?;
    ensure!(again.pid != victim.pid, "it was started again");
    for body in &bodies[..2] {
        scene.run(body).done()?;
    }
    scene.end()
}

/// A server that answers /health and generates nothing is found out by the canary.
#[test]
fn a_hung_server_is_started_again() -> Result<()> {
    let more = ["--canary-wait", "0.5", "--canary-timeout", "1"];
    let mut scene = Scene::new(&[Role::Aggregated, Role::Aggregated], &more)?;
    let (worker, victim) = scene.servers(Role::Aggregated)?.remove(0);
    victim.control(&json!({"hang": true}))?;
    // One of them goes to the server that hangs, and from there to the other one.
    for i in 0..2 {
        let body = requests::streamed(MODEL, &prompt(i, 30), 5);
        scene.run(&body).done()?;
    }
    gone(victim.pid)?;
    let line = "rank 0 hangs with";
    scene.cluster.member(worker)?.wait_for_line(line, LIMIT)?;
    scene.wait_workers(Role::Aggregated, 2)?;
    scene.end()
}

/// However a worker ends, its server ends with it.
#[test]
fn a_killed_worker_takes_its_server_with_it() -> Result<()> {
    let mut scene = Scene::new(&[Role::Aggregated, Role::Aggregated], &[])?;
    let (worker, server) = scene.servers(Role::Aggregated)?.remove(0);
    scene.cluster.kill(worker)?;
    gone(server.pid)?;
    scene.wait_workers(Role::Aggregated, 1)?;
    scene
        .run(&requests::completion(MODEL, &prompt(3, 20), 4))
        .done()?;
    scene.end()
}

/// Prefill on one server, decode on another, and what becomes of it when the first one fails.
#[test]
fn a_failed_prefill_ends_in_a_local_one() -> Result<()> {
    let mut scene = Scene::new(&[Role::Prefill, Role::Decode], &[])?;
    let body = requests::streamed(MODEL, &prompt(4, 200), 12);
    let (prefill_worker, prefill) = scene.servers(Role::Prefill)?.remove(0);
    let (_, decode) = scene.servers(Role::Decode)?.remove(0);
    let expected = scene.run(&body).done()?.tokens;
    ensure!(
        prefill.counters()?["prefills"] == 1,
        "{}",
        prefill.counters()?
    );
    ensure!(decode.counters()?["pulls"] == 1, "{}", decode.counters()?);
    ensure!(
        prefill.counters()?["held"] == 0,
        "what was handed over is not held"
    );

    // Refused, and nonsense: the decode server computes the prompt itself.
    for fault in [
        json!({"status": 500}),
        json!({"status": null, "prefill_ms": 0}),
    ] {
        prefill.control(&fault)?;
        ensure!(scene.run(&body).done()?.tokens == expected, "{fault}");
    }
    // Killed while the decode server pulls.
    decode.control(&json!({"pull_ms": 1_000}))?;
    let pulls = decode.counters()?["pulls"].clone();
    let prefills = prefill.counters()?["prefills"].as_u64().unwrap_or(0);
    let (client, sent) = (scene.client.clone(), body.clone());
    let running = std::thread::spawn(move || client.run("/v1/completions", &sent, LIMIT));
    prefill.wait_counter("prefills", prefills + 1)?;
    scene.cluster.kill(prefill_worker)?;
    let tokens = running
        .join()
        .expect("a client does not panic")
        .done()?
        .tokens;
    ensure!(tokens == expected, "{tokens:?} {expected:?}");
    ensure!(
        decode.counters()?["pulls"] == pulls,
        "there was nothing to pull"
    );
    gone(prefill.pid)?;
    ensure!(scene.run(&body).done()?.tokens == expected);
    scene.end()
}

/// A prefill server that fails is followed by the next one, before the decode server does it itself.
#[test]
fn another_prefill_worker_is_tried_first() -> Result<()> {
    let mut scene = Scene::new(&[Role::Prefill, Role::Prefill, Role::Decode], &[])?;
    let prefill = scene.servers(Role::Prefill)?;
    let (_, decode) = scene.servers(Role::Decode)?.remove(0);
    prefill[0].1.control(&json!({"status": 500}))?;
    for i in 0..4 {
        let body = requests::streamed(MODEL, &prompt(10 + i, 200), 4);
        scene.run(&body).done()?;
    }
    let (failed, served) = (prefill[0].1.counters()?, prefill[1].1.counters()?);
    ensure!(failed["prefills"] == 0, "{failed}");
    ensure!(served["prefills"] == 4, "{served}");
    ensure!(decode.counters()?["pulls"] == 4, "{}", decode.counters()?);
    scene.end()
}

/// A client that leaves takes its prefill with it.
#[test]
fn a_client_that_leaves_aborts_a_prefill() -> Result<()> {
    let mut scene = Scene::new(&[Role::Prefill, Role::Decode], &[])?;
    let (_, prefill) = scene.servers(Role::Prefill)?.remove(0);
    prefill.control(&json!({"prefill_ms": 60_000}))?;
    let body = requests::streamed(MODEL, &prompt(20, 200), 4);
    let hung = scene
        .client
        .run("/v1/completions", &body, Duration::from_millis(500));
    ensure!(matches!(hung, Outcome::Hung(_)), "{hung:?}");
    prefill.wait_counter("aborts", 1)?;
    prefill.control(&json!({"prefill_ms": 0}))?;
    scene.run(&body).done()?;
    scene.end()
}

/// Two versions of vLLM do not exchange KV.
#[test]
fn unlike_servers_do_not_exchange_kv() -> Result<()> {
    let mut scene = Scene::new(&[Role::Decode], &[])?;
    let older = ["--", "--stand-in-version", "0.31.0"];
    scene.cluster.start_worker_with(Role::Prefill, &older)?;
    scene.wait_workers(Role::Prefill, 1)?;
    let body = requests::streamed(MODEL, &prompt(5, 200), 6);
    scene.run(&body).done()?;
    let (worker, decode) = scene.servers(Role::Decode)?.remove(0);
    ensure!(decode.counters()?["pulls"] == 0);
    let line = "the decode worker has vLLM 0.32.0";
    let line = scene.cluster.member(worker)?.wait_for_line(line, LIMIT)?;
    ensure!(
        line.contains("this prefill worker has vLLM 0.31.0"),
        "{line}"
    );
    scene.end()
}

/// Mistakes are said before anything is served.
#[test]
fn what_cannot_work_is_refused_at_once() -> Result<()> {
    let program = fixtures::repository().join("tests/python/vllm_stand_in.py");
    let program = program.display().to_string();
    let cluster = ClusterBuilder::new().empty()?;
    let checkpoint = fixtures::checkpoint(MODEL)?.display().to_string();
    let discovery = cluster.discovery();
    for (more, expected) in [
        (&["--", "--port", "1"][..], "the worker takes a free port"),
        (&["--threads", "2"], "--threads is not for --engine vllm"),
        (
            &["--block-size", "32", "--", "--block-size", "16"],
            "say it once",
        ),
        (
            &["--", "--fail", "no such device"],
            "stand-in: no such device",
        ),
        (&["--attach", "http://127.0.0.1:9"], "out of reach"),
    ] {
        let mut arguments: Vec<String> = ["worker", "--engine", "vllm", "--vllm-program", &program]
            .map(str::to_owned)
            .into();
        arguments.extend(["--model", &checkpoint, "--discovery", &discovery].map(str::to_owned));
        arguments.extend(more.iter().map(|&word| word.to_owned()));
        let mut worker = cluster.start("worker", &arguments)?;
        let status = worker.wait(LIMIT)?;
        let log = worker.log().join("\n");
        ensure!(
            !status.success() && log.contains(expected),
            "{more:?}: {status}\n{log}"
        );
    }
    cluster.wait_gone(LIMIT)?;
    Ok(())
}

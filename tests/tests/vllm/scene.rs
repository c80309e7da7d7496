//! Deployments of vLLM workers, and a look at the servers behind them.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use blockplane_tests::{
    Client, Cluster, ClusterBuilder, Outcome, Role, client::Completion, fixtures, health,
    proc_table, traffic::LIMIT, wait,
};
use serde_json::{Value, json};

/// Name of the model, after its folder.
pub(crate) const MODEL: &str = "blockplane-tiny";
/// For two servers to start at a time, on two busy cores.
pub(crate) const START: Duration = Duration::from_secs(600);

/// Frontend and vLLM workers, started by hand.
pub(crate) struct Scene {
    pub(crate) cluster: Cluster,
    pub(crate) client: Client,
}

impl Scene {
    /// With this many aggregated workers.
    pub(crate) fn new(workers: usize) -> Result<Self> {
        let program = fixtures::vllm()?.display().to_string();
        let cluster = ClusterBuilder::new()
            .checkpoint(&fixtures::bundled())
            .start_within(START)
            .variable("OMP_NUM_THREADS", &1)
            .variable("OMP_WAIT_POLICY", &"PASSIVE")
            .variable("VLLM_CPU_OMP_THREADS_BIND", &"nobind")
            .variable("VLLM_CPU_KVCACHE_SPACE", &1)
            .variable("TORCHDYNAMO_DISABLE", &1)
            .variable("HF_HUB_OFFLINE", &1)
            .variable("VLLM_NO_USAGE_STATS", &1)
            .variable("VLLM_SERVER_DEV_MODE", &1)
            .frontend_arguments(&["--router-mode", "kv", "--migration-limit", "2"])
            .worker_arguments(&[
                "--engine",
                "vllm",
                "--vllm-program",
                &program,
                "--block-size",
                "32",
                "--",
            ])
            // Small steps, so that a long prompt takes many of them.
            .worker_arguments(&[
                "--enforce-eager",
                "--max-model-len",
                "4096",
                "--max-num-batched-tokens",
                "128",
            ])
            .worker_arguments(&[
                "--max-num-seqs",
                "16",
                "--distributed-executor-backend",
                "uni",
            ])
            .by_hand(&vec![Role::Aggregated; workers])?;
        let client = cluster.client();
        Ok(Self { cluster, client })
    }

    /// A client of the vLLM behind each worker, in the order of the workers' ids.
    pub(crate) fn servers(&self) -> Result<Vec<Server>> {
        let all = self.cluster.all_processes();
        let workers = self.cluster.processes(Role::Aggregated);
        let server = |worker: &proc_table::Entry| {
            let port = all
                .iter()
                .filter(|entry| descends(&all, entry, worker.pid))
                .filter(|entry| entry.arguments.iter().any(|word| word == "serve"))
                .filter(|entry| {
                    entry
                        .arguments
                        .first()
                        .is_some_and(|word| word.contains("python"))
                })
                .find_map(|entry| option(entry, "--port"))
                .with_context(|| format!("no vLLM below worker {}: {all:?}", worker.pid))?;
            Ok(Server {
                client: Client::new(SocketAddr::from((Ipv4Addr::LOCALHOST, port))),
            })
        };
        workers.iter().map(server).collect()
    }

    /// Waits until nothing runs.
    pub(crate) fn wait_idle(&self) -> Result<()> {
        health::wait_idle(&self.client, LIMIT)?;
        Ok(())
    }

    /// Asserts that all ends as it should.
    pub(crate) fn end(self) -> Result<()> {
        self.wait_idle()?;
        self.cluster.stop()
    }
}

/// One vLLM.
pub(crate) struct Server {
    pub(crate) client: Client,
}

impl Server {
    /// Sum of a metric over its labels.
    pub(crate) fn metric(&self, name: &str) -> Result<f64> {
        let text = self.client.get("/metrics", LIMIT)?.body;
        let values = text.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let value = rest
                .starts_with(['{', ' '])
                .then(|| rest.rsplit(' ').next())??;
            value.parse::<f64>().ok()
        });
        let values: Vec<f64> = values.collect();
        ensure!(!values.is_empty(), "vLLM has no metric {name}");
        Ok(values.iter().sum())
    }

    /// Empties its prefix cache, so that the next request is computed as the first one was.
    pub(crate) fn forget(&self) -> Result<()> {
        wait::until("an empty prefix cache", LIMIT, || {
            let answer = self.client.post("/reset_prefix_cache", b"{}", LIMIT);
            match answer {
                Ok(answer) if answer.status == 200 => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
    }
}

/// The completion of a request that has to succeed.
pub(crate) fn done(outcome: Outcome) -> Result<Completion> {
    match outcome {
        Outcome::Done(completion) => Ok(completion),
        other => anyhow::bail!("it was not served to its end: {other:?}"),
    }
}

/// A number in a completion's usage.
pub(crate) fn usage(completion: &Completion, path: &[&str]) -> u64 {
    let usage = completion.usage.as_ref().unwrap_or(&Value::Null);
    let value = path.iter().fold(usage, |value, name| &value[*name]);
    value.as_u64().unwrap_or(0)
}

/// The body in the form that vLLM answers as OpenAI's API does: tokens spelled out.
pub(crate) fn for_vllm(mut body: Value) -> Value {
    body["return_tokens_as_token_ids"] = json!(false);
    body
}

fn descends(all: &[proc_table::Entry], entry: &proc_table::Entry, ancestor: u32) -> bool {
    let mut parent = entry.parent;
    for _ in 0..8 {
        if parent == ancestor {
            return true;
        }
        let Some(above) = all.iter().find(|other| other.pid == parent) else {
            return false;
        };
        parent = above.parent;
    }
    false
}

fn option(entry: &proc_table::Entry, flag: &str) -> Option<u16> {
    let place = entry.arguments.iter().position(|word| word == flag)?;
    entry.arguments.get(place + 1)?.parse().ok()
}

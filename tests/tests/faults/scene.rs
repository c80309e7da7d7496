//! The deployment that faults are played on, and what must hold of it afterwards.

use std::{sync::mpsc, thread::JoinHandle, time::Duration};

use anyhow::{Result, anyhow, ensure};
use blockplane_tests::{
    Client, Cluster, ClusterBuilder, Outcome, Role,
    client::Completion,
    fixtures,
    health::{self, Health, Pools},
    prompts::Random,
    requests,
    traffic::{LIMIT, all_done, send_all},
    wait,
};
use serde_json::Value;

/// The checkpoint of these tests.
pub(crate) const MODEL: &str = "qwen3";
/// What each request is given to end.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);
/// When a request without any end counts as hung: its deadline and what a busy machine may add.
pub(crate) const HUNG: Duration = Duration::from_secs(30);

/// Frontend and workers started by hand, so that nothing is restarted behind the test's back.
#[derive(Debug)]
pub(crate) struct Scene {
    pub(crate) cluster: Cluster,
    pub(crate) client: Client,
    pub(crate) pools: Pools,
}

/// Streams that run in threads of their own.
#[derive(Debug)]
pub(crate) struct Streams {
    threads: Vec<JoinHandle<Outcome>>,
    begun: mpsc::Receiver<()>,
    bodies: Vec<Value>,
}

/// How streams ended, in the order of their bodies.
#[derive(Debug)]
pub(crate) struct Ends(Vec<Outcome>);

impl Scene {
    pub(crate) fn new(workers: &[Role], lane: &str) -> Result<Self> {
        let cluster = ClusterBuilder::new()
            .checkpoint(&fixtures::checkpoint(MODEL)?)
            .frontend_arguments(&["--remote-prefill-min-tokens", "1"])
            .worker_arguments(&[
                "--threads",
                "1",
                "--blocks",
                "4096",
                "--lane",
                lane,
                "--remote-prefill-min-tokens",
                "1",
                // Small steps, so that a long prompt takes many of them.
                "--max-num-batched-tokens",
                "32",
                "--max-num-seqs",
                "16",
            ])
            .by_hand(workers)?;
        let client = cluster.client().deadline(DEADLINE);
        let pools = health::wait_idle(&client, LIMIT)?;
        Ok(Self {
            cluster,
            client,
            pools,
        })
    }

    /// Starts a stream for each body.
    pub(crate) fn start(&self, bodies: Vec<Value>) -> Streams {
        let (sender, begun) = mpsc::channel();
        let threads = bodies
            .iter()
            .map(|body| {
                let (client, body, sender) = (self.client.clone(), body.clone(), sender.clone());
                std::thread::spawn(move || {
                    client.run_with("/v1/completions", &body, HUNG, &mut |so_far| {
                        // Tokens that are ready together come in one chunk, so the first may be the
                        // only one. The test may have stopped listening.
                        if so_far.chunks == 1 {
                            sender.send(()).ok();
                        }
                        std::ops::ControlFlow::Continue(())
                    })
                })
            })
            .collect();
        Streams {
            threads,
            begun,
            bodies,
        }
    }

    /// Waits until the frontend knows this many workers of a role.
    pub(crate) fn wait_workers(&mut self, role: Role, count: usize) -> Result<Health> {
        self.cluster
            .wait_ready(&format!("{count} {} workers", role.name()), |health| {
                health.count(role.name()) == count
            })
    }

    /// Waits until some worker of this role holds at least one request or block.
    pub(crate) fn wait_busy(&self, role: Role) -> Result<()> {
        wait::until("a request to reach a worker", LIMIT, || {
            let health = Health::read(&self.client).map_err(|error| error.to_string())?;
            let busy = health
                .workers
                .iter()
                .filter(|worker| worker.role == role.name())
                .flat_map(|worker| &worker.load)
                .any(|load| load.requests_running + load.requests_waiting + load.blocks_active > 0);
            if busy {
                Ok(())
            } else {
                Err(format!("{health:?}"))
            }
        })
    }

    /// Asserts that the deployment serves, that no worker that was there at the start and still is
    /// has lost a block, and that it ends cleanly.
    pub(crate) fn end(mut self) -> Result<()> {
        self.serves()?;
        let pools = health::wait_idle(&self.client, LIMIT)?;
        for (rank, blocks) in &pools {
            let start = self.pools.get(rank).unwrap_or(blocks);
            ensure!(
                blocks == start,
                "the pool of {rank:?} had {start} blocks, has {blocks}"
            );
        }
        // What was killed on purpose is known to have ended; everything else must end by itself.
        self.cluster.leader()?;
        self.cluster.stop()
    }

    /// Asserts that new requests are served.
    pub(crate) fn serves(&self) -> Result<()> {
        let mut random = Random::new(99);
        let bodies: Vec<Value> = (0..4)
            .map(|_| requests::completion(MODEL, &random.tokens(80, requests::VOCABULARY), 4))
            .collect();
        all_done(send_all(&self.client, 2, &bodies)?)?;
        Ok(())
    }

    /// What the requests of these streams give when nothing is done to the deployment.
    pub(crate) fn reference(&self, bodies: &[Value]) -> Result<Vec<Completion>> {
        all_done(send_all(&self.client, 2, bodies)?)
    }
}

/// `count` streams of `max_tokens` tokens with prompts of `prompt_tokens` tokens that share nothing.
pub(crate) fn streams(seed: u64, count: usize, prompt_tokens: u64, max_tokens: u32) -> Vec<Value> {
    let mut random = Random::new(seed);
    (0..count)
        .map(|_| {
            let prompt = random.tokens(prompt_tokens, requests::VOCABULARY);
            requests::streamed(MODEL, &prompt, max_tokens)
        })
        .collect()
}

impl Streams {
    /// Waits until every stream has given its first tokens.
    pub(crate) fn wait_begun(&self) -> Result<()> {
        for _ in &self.bodies {
            self.begun.recv_timeout(LIMIT)?;
        }
        Ok(())
    }

    /// Waits until `count` streams have given their first tokens.
    pub(crate) fn wait_some_begun(&self, count: usize) -> Result<()> {
        for _ in 0..count {
            self.begun.recv_timeout(LIMIT)?;
        }
        Ok(())
    }

    /// Waits for the end of every stream.
    pub(crate) fn finish(self) -> Result<Ends> {
        let ends = self.threads.into_iter().map(JoinHandle::join);
        let ends: Result<Vec<Outcome>, _> = ends.collect();
        Ok(Ends(ends.map_err(|_| anyhow!("a client panicked"))?))
    }

    /// Waits for the end of every stream and looks at it as [`Ends::check`] does.
    pub(crate) fn check(self, reference: &[Completion]) -> Result<usize> {
        self.finish()?.check(reference)
    }
}

impl Ends {
    /// Asserts that each stream ended clearly, that the tokens of those that were served are those of
    /// `reference`, and that those that failed had given a part of them. Returns how many were served.
    pub(crate) fn check(self, reference: &[Completion]) -> Result<usize> {
        let count = self.0.len();
        let mut served = 0;
        for (index, outcome) in self.0.into_iter().enumerate() {
            let expected = &reference[index].tokens;
            match outcome {
                Outcome::Done(completion) => {
                    let got = &completion.tokens;
                    ensure!(
                        got == expected,
                        "stream {index} gave {got:?}, expected {expected:?}"
                    );
                    served += 1;
                }
                Outcome::Failed { error, so_far } => {
                    eprintln!("stream {index} failed: {error:?}");
                    let got = &so_far.tokens;
                    ensure!(
                        expected.starts_with(got),
                        "stream {index} gave {got:?} of {expected:?}"
                    );
                }
                Outcome::Refused { status, error } => {
                    eprintln!("stream {index} was refused: {status} {error:?}");
                }
                Outcome::Left(_) | Outcome::Broken(_) | Outcome::Hung(_) => {
                    anyhow::bail!("stream {index} ended in {outcome:?}")
                }
            }
        }
        eprintln!("{served} of {count} streams were served to their end");
        Ok(served)
    }

    /// Asserts that no stream ended in an error that names no cause, or not at all: what is left to a
    /// client whose server was killed is a cut connection.
    pub(crate) fn assert_cut(&self) -> Result<()> {
        for (index, outcome) in self.0.iter().enumerate() {
            ensure!(!matches!(outcome, Outcome::Hung(_)), "stream {index} hung");
        }
        Ok(())
    }
}

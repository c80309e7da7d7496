//! KV events of a real vLLM.
//!
//! `tests/run vllm` installs it and runs these; `BLOCKPLANE_VLLM` names its `vllm`. One server is used
//! for all that does not kill it, because it takes half a minute to start.

mod proxy;
mod server;

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use blockplane_engine::vllm::events::{
    Confidence, Endpoint, EventsConfig, EventsStatus, VllmEvents,
};
use blockplane_kvbm::{EventFeed, EventSubscription, KvBatch};
use blockplane_protocol::{
    DpRank, KvEventData, SaltHash, SequenceHash, Tier, TokenId, TokenSequence,
};
use proxy::Proxy;
use serde_json::{Value, json};
use server::{BLOCK, Server};
use tokio::runtime::Handle;

/// For an event to arrive. It takes milliseconds; a machine can be busy.
const SOON: Duration = Duration::from_secs(20);

/// What a router knows after following a feed.
struct View {
    subscription: EventSubscription,
    blocks: BTreeSet<SequenceHash>,
}

impl View {
    fn of(feed: &EventFeed) -> Self {
        Self {
            subscription: feed.subscribe(None),
            blocks: BTreeSet::new(),
        }
    }

    /// Takes in what comes for at most a moment.
    fn follow(&mut self) {
        while let Ok(Some(batch)) = self.subscription.recv_timeout(Duration::from_millis(20)) {
            match batch {
                KvBatch::Snapshot(snapshot) => {
                    let blocks = snapshot.blocks.iter();
                    self.blocks = blocks.map(|entry| entry.block.sequence).collect();
                }
                KvBatch::Events(events) => {
                    for event in events {
                        self.apply(event.data);
                    }
                }
            }
        }
    }

    fn apply(&mut self, data: KvEventData) {
        match data {
            KvEventData::Stored { blocks, tier, .. } => {
                assert_eq!(tier, Tier::Device);
                self.blocks
                    .extend(blocks.iter().map(|block| block.sequence));
            }
            KvEventData::Removed { hashes, .. } => {
                for hash in hashes {
                    self.blocks.remove(&hash);
                }
            }
            KvEventData::Cleared => self.blocks.clear(),
        }
    }

    /// Waits until exactly these blocks are known.
    fn wait(&mut self, events: &VllmEvents, expected: &BTreeSet<SequenceHash>) -> Result<()> {
        let end = Instant::now() + SOON;
        loop {
            self.follow();
            if self.blocks == *expected {
                return Ok(());
            }
            ensure!(
                Instant::now() < end,
                "{} blocks are known and {} expected, {} of them known; {:?}",
                self.blocks.len(),
                expected.len(),
                self.blocks.intersection(expected).count(),
                events.status()
            );
        }
    }
}

/// Waits until the status is as it should be.
fn until(events: &VllmEvents, what: &str, is: impl Fn(&EventsStatus) -> bool) -> Result<()> {
    let end = Instant::now() + SOON;
    while !is(&events.status()) {
        ensure!(Instant::now() < end, "{what}: {:?}", events.status());
        pause();
    }
    Ok(())
}

#[expect(
    clippy::disallowed_methods,
    reason = "the status of a follower gives no event to wait for"
)]
fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}

/// The blocks of a sequence of which vLLM has computed all but the last token.
fn blocks(tokens: &[TokenId], salt: SaltHash) -> BTreeSet<SequenceHash> {
    let computed = &tokens[..tokens.len() - 1];
    let sequence = TokenSequence::from_tokens(computed, BLOCK as usize, salt);
    let blocks = sequence.blocks().iter();
    blocks.map(|block| block.sequence).collect()
}

fn prompt(seed: u32, tokens: u32) -> Vec<TokenId> {
    (0..tokens)
        .map(|i| 10 + (seed * 977 + i * 31) % 3_000)
        .collect()
}

fn follow(server: &Server, endpoint: Endpoint, rank: u32, block_tokens: u32) -> Result<VllmEvents> {
    let config = EventsConfig {
        endpoint,
        replay: Some(server.replay.clone()),
        topic: "kv".into(),
        rank: DpRank(rank),
        block_tokens,
        blocks_max: 100_000,
        events_max: 10_000,
    };
    Ok(VllmEvents::start(config, &Handle::current())?)
}

/// Everything that one server can show: names, salts, a late start, lost messages, cut connections, a
/// wrong block size, a reset; and in the end `kill -9` and another server in its place.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a vLLM: tests/run vllm"]
async fn a_real_vllm_is_followed() -> Result<()> {
    let mut server = Server::start(&[])?;
    let mut held = BTreeSet::new();
    // Before anybody follows.
    for seed in 0..3 {
        held.extend(server.generate(&prompt(seed, 100), 40, &json!({}))?);
    }
    let events = follow(&server, server.endpoint.clone(), 0, BLOCK)?;
    let mut view = View::of(&events.feed());
    view.wait(&events, &held).context("what came before")?;
    until(&events, "complete", |status| {
        status.confidence == Confidence::Complete
    })?;
    ensure!(events.status().block_tokens_received == Some(BLOCK));

    // A salt, a prompt that is cached to its last token, and one that begins like another.
    let salt = json!({"cache_salt": "tenant"});
    held.extend(server.generate(&prompt(0, 100), 40, &salt)?);
    for _ in 0..2 {
        held.extend(server.generate(&prompt(1, 96), 2, &json!({}))?);
    }
    let continued = [prompt(1, 64), prompt(9, 64)].concat();
    held.extend(server.generate(&continued, 2, &json!({}))?);
    view.wait(&events, &held)
        .context("salts and shared beginnings")?;
    drop(events);

    // Through a wire that loses messages, and is cut.
    let proxy = Proxy::start(&server.endpoint).await?;
    let events = follow(&server, proxy.endpoint.clone(), 0, BLOCK)?;
    let mut view = View::of(&events.feed());
    view.wait(&events, &held)?;
    proxy.lose(3);
    for seed in 20..24 {
        held.extend(server.generate(&prompt(seed, 70), 2, &json!({}))?);
    }
    view.wait(&events, &held).context("after lost messages")?;
    let status = events.status();
    ensure!(
        status.counters.gaps > 0 && status.counters.replayed > 0,
        "{status:?}"
    );
    ensure!(status.counters.resyncs == 0, "{status:?}");
    // The last message before a pause: nothing follows that would show its loss.
    proxy.lose(1_000);
    held.extend(server.generate(&prompt(30, 70), 2, &json!({}))?);
    view.wait(&events, &held)
        .context("after the loss of the last message")?;
    proxy.lose(0);
    proxy.cut();
    held.extend(server.generate(&prompt(31, 70), 2, &json!({}))?);
    view.wait(&events, &held).context("after a cut")?;
    let status = events.status();
    ensure!(status.counters.resyncs == 0, "{status:?}");
    ensure!(status.confidence == Confidence::Complete, "{status:?}");

    let wrong = follow(&server, server.endpoint.clone(), 0, 16)?;
    until(&wrong, "the wrong block size is seen", |status| {
        let expected = Confidence::WrongBlockSize {
            registered: 16,
            received: BLOCK,
        };
        status.confidence == expected && status.blocks == 0
    })?;
    ensure!(wrong.status().to_string().contains("--block-size 32"));
    drop(wrong);

    server.post("/reset_prefix_cache", &json!({}))?;
    held = server.generate(&prompt(40, 70), 2, &json!({}))?;
    view.wait(&events, &held).context("after a reset")?;

    server.kill_and_start_again()?;
    held = server.generate(&prompt(50, 100), 40, &json!({}))?;
    view.wait(&events, &held).context("after a restart")?;
    let status = events.status();
    ensure!(status.counters.resyncs > 0, "{status:?}");
    ensure!(status.confidence == Confidence::Complete, "{status:?}");
    Ok(())
}

/// Blocks that leave a small cache are no longer known: what is told is what vLLM finds.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a vLLM: tests/run vllm"]
async fn ranks_are_followed_one_by_one_while_blocks_are_evicted() -> Result<()> {
    // 40 blocks for each of two ranks.
    let server = Server::start(&[
        "--data-parallel-size",
        "2",
        "--num-gpu-blocks-override",
        "40",
    ])?;
    let follow = |rank| follow(&server, server.endpoint.clone(), rank, BLOCK);
    let events = [follow(0)?, follow(1)?];
    let mut views = events.each_ref().map(|events| View::of(&events.feed()));
    let mut last = [BTreeSet::new(), BTreeSet::new()];
    for seed in 0..16 {
        let rank = usize::from(seed % 2 == 1);
        let header = format!("X-data-parallel-rank: {rank}");
        last[rank] = server.generate_with(&prompt(seed, 300), 4, &json!({}), &header)?;
    }
    for ((rank, view), events) in (0..).zip(&mut views).zip(&events) {
        let end = Instant::now() + SOON;
        while !view.blocks.is_superset(&last[rank]) {
            ensure!(Instant::now() < end, "rank {rank}: {:?}", events.status());
            view.follow();
        }
        let others = last[1 - rank].intersection(&view.blocks).count();
        ensure!(others == 0, "rank {rank} tells blocks of the other");
        let status = events.status();
        // The null block is never cached.
        ensure!(
            view.blocks.len() < 40,
            "{} blocks of rank {rank}",
            view.blocks.len()
        );
        ensure!(
            status.counters.orphans == 0 && status.counters.resyncs == 0,
            "{status:?}"
        );
        ensure!(status.confidence == Confidence::Complete, "{status:?}");
    }
    Ok(())
}

impl Server {
    /// Generates, and returns the blocks that vLLM holds of it afterwards.
    fn generate(
        &self,
        prompt: &[TokenId],
        tokens: u32,
        more: &Value,
    ) -> Result<BTreeSet<SequenceHash>> {
        self.generate_with(prompt, tokens, more, "X-Nothing: 0")
    }

    fn generate_with(
        &self,
        prompt: &[TokenId],
        tokens: u32,
        more: &Value,
        header: &str,
    ) -> Result<BTreeSet<SequenceHash>> {
        let mut body = json!({
            "model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": true,
            "return_token_ids": true,
        });
        for (name, value) in more.as_object().context("a map")? {
            body[name] = value.clone();
        }
        let answer = self.post_with("/v1/completions", &body, header)?;
        let answer: Value = serde_json::from_str(&answer)?;
        let ids = answer["choices"][0]["token_ids"]
            .as_array()
            .context("no token ids")?;
        let ids = ids
            .iter()
            .map(|id| Ok(u32::try_from(id.as_u64().context("an id")?)?));
        let generated = ids.collect::<Result<Vec<TokenId>>>()?;
        ensure!(generated.len() == tokens as usize, "{answer}");
        let salt = SaltHash::new(more["cache_salt"].as_str(), None);
        Ok(blocks(&[prompt, &generated].concat(), salt))
    }
}

//! What all tests of the events use: batches in vLLM's encoding, and a subscriber's view.

mod chain;
mod follow;
mod publisher;
mod socket;
mod wire;

use std::collections::BTreeSet;

use blockplane_kvbm::{EventFeed, EventSubscription, KvBatch};
use blockplane_protocol::{KvEventData, SaltHash, SequenceHash, Tier, TokenId, TokenSequence};
use serde_json::{Value, json};

/// Tokens per block in these tests.
const BLOCK: u32 = 4;

/// What a router knows after following a feed to its end.
#[derive(Debug)]
struct View {
    subscription: EventSubscription,
    blocks: BTreeSet<(SequenceHash, Tier)>,
}

impl View {
    fn of(feed: &EventFeed) -> Self {
        Self {
            subscription: feed.subscribe(None),
            blocks: BTreeSet::new(),
        }
    }

    fn now(&mut self) -> &BTreeSet<(SequenceHash, Tier)> {
        while let Ok(Some(batch)) = self.subscription.try_recv() {
            match batch {
                KvBatch::Snapshot(snapshot) => {
                    let entries = snapshot.blocks.iter();
                    self.blocks = entries
                        .map(|entry| (entry.block.sequence, entry.tier))
                        .collect();
                }
                KvBatch::Events(events) => {
                    events.into_iter().for_each(|event| self.apply(event.data))
                }
            }
        }
        &self.blocks
    }

    fn apply(&mut self, data: KvEventData) {
        match data {
            KvEventData::Stored { blocks, tier, .. } => {
                self.blocks
                    .extend(blocks.iter().map(|block| (block.sequence, tier)));
            }
            KvEventData::Removed { hashes, tier } => {
                for hash in hashes {
                    self.blocks.remove(&(hash, tier));
                }
            }
            KvEventData::Cleared => self.blocks.clear(),
        }
    }
}

/// The names that the frontend gives to the full blocks of a prompt.
fn names(tokens: &[TokenId], salt: SaltHash) -> Vec<SequenceHash> {
    let sequence = TokenSequence::from_tokens(tokens, BLOCK as usize, salt);
    let blocks = sequence.blocks().iter();
    blocks.map(|block| block.sequence).collect()
}

/// The same, on the device.
fn on_device(tokens: &[TokenId]) -> BTreeSet<(SequenceHash, Tier)> {
    let names = names(tokens, SaltHash::default());
    names.into_iter().map(|name| (name, Tier::Device)).collect()
}

/// A `BlockStored` as vLLM 0.32 writes it.
fn stored(hashes: &[u64], parent: Option<u64>, tokens: &[TokenId]) -> Value {
    json!({
        "type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent,
        "token_ids": tokens, "block_size": BLOCK, "lora_id": null, "medium": "GPU",
        "lora_name": null, "extra_keys": vec![Value::Null; hashes.len()], "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    })
}

fn removed(hashes: &[u64]) -> Value {
    json!({"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU", "group_idx": 0})
}

fn cleared() -> Value {
    json!({"type": "AllBlocksCleared"})
}

/// The event with other values of some fields.
fn with(mut event: Value, fields: &Value) -> Value {
    for (name, value) in fields.as_object().expect("a map") {
        event[name] = value.clone();
    }
    event
}

/// A payload.
fn batch(events: &[Value]) -> Vec<u8> {
    rmp_serde::to_vec(&json!([1.5, events, 0])).expect("it can be encoded")
}

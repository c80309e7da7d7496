//! What a worker says of itself when it registers.

use serde::{Deserialize, Serialize};

use crate::layout::KvLayout;

/// What part of a request a worker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkerRole {
    /// Prefill and decode in one.
    Aggregated,
    /// Computes prompts and writes their KV into a decode worker's blocks.
    Prefill,
    /// Generates tokens; prefills itself what is cheaper to prefill here.
    Decode,
}

/// The model a worker serves, with what the frontend needs to prepare requests for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelCard {
    /// Name in the OpenAI API.
    pub name: String,
    /// Checkpoint directory, readable by the frontend (tokenizer, chat template).
    pub path: String,
    /// Longest sequence, prompt and output together.
    pub context_tokens_max: u32,
    /// Vocabulary size (rows of the embedding).
    pub vocab_size: u32,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<u32>,
    /// Shape of its KV.
    pub kv_layout: KvLayout,
    /// Blocks of the pool of each rank.
    pub blocks: u32,
    /// Data-parallel ranks behind this worker.
    pub dp_size: u32,
    /// What it does.
    pub role: WorkerRole,
}

impl WorkerRole {
    /// The role's name as it is written on the command line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Aggregated => "aggregated",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

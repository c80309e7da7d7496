//! A request to generate tokens, and what comes back.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    hash::SaltHash,
    id::{DpRank, RequestId, WorkerId},
    token::TokenId,
};

/// Highest [`GenerateRequest::priority`].
pub const PRIORITY_MAX: u32 = 100;

/// A tokenised request, as it goes from the frontend to a worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GenerateRequest {
    /// Its name on every process.
    pub request_id: RequestId,
    /// The model's name.
    pub model: String,
    /// The prompt.
    pub token_ids: Vec<TokenId>,
    /// How to choose tokens.
    #[serde(default)]
    pub sampling: SamplingParams,
    /// When to stop.
    #[serde(default)]
    pub stop: StopConditions,
    /// Report the log-probability of each token, and of this many alternatives (0 to 20).
    #[serde(default)]
    pub logprobs: Option<u32>,
    /// Separates the caches of tenants.
    #[serde(default)]
    pub cache_salt: Option<String>,
    /// `LoRA` adapter.
    #[serde(default)]
    pub lora_name: Option<String>,
    /// How much its KV is worth keeping below the worker's own pool, 0 to [`PRIORITY_MAX`]; higher is
    /// more. `None` is not concerned by any threshold. Absent on the wire then, and in messages of
    /// peers that do not know it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u32>,
    /// Time left to finish, in milliseconds, counted from receipt. Every hop passes on what is left.
    pub deadline_ms: u64,
    /// What the router decided.
    #[serde(default)]
    pub route: RouteHints,
}

/// What the router tells the worker it picked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteHints {
    /// Rank of the worker that shall run the request.
    #[serde(default)]
    pub rank: DpRank,
    /// Prefill workers, best first; empty means prefill locally.
    #[serde(default)]
    pub prefill: Vec<PrefillHint>,
}

/// A prefill worker the router proposes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrefillHint {
    /// The worker.
    pub worker: WorkerId,
    /// Its rank.
    pub rank: DpRank,
    /// Prompt blocks it already has, by the router's index.
    pub overlap_blocks: u32,
}

/// How to choose the next token. The defaults choose the likeliest (greedy).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the likeliest tokens that together reach this probability; 1 keeps all.
    pub top_p: f32,
    /// Keep this many of the likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep tokens at least this likely relative to the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Seed of this request's random numbers; chosen by the worker when absent.
    pub seed: Option<u64>,
    /// Subtracted once from the logit of each token already generated.
    pub presence_penalty: f32,
    /// Subtracted from the logit of each token for each time it was generated.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
}

/// When to stop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StopConditions {
    /// Most tokens to generate.
    pub max_tokens: u32,
    /// No stop token is honoured before this many tokens.
    pub min_tokens: u32,
    /// Tokens that end the generation besides the model's own end tokens.
    pub stop_token_ids: Vec<TokenId>,
    /// Go on past the model's end tokens.
    pub ignore_eos: bool,
}

/// One or more generated tokens of a stream, or its end, or both.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TokenFrame {
    /// The tokens, in order.
    pub tokens: Vec<TokenOutput>,
    /// Set on the last frame.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finish: Option<FinishReason>,
    /// Set on the last frame; with the first token too, for whoever does not read to the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// One generated token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenOutput {
    /// The token.
    pub id: TokenId,
    /// Natural log of its probability before penalties, temperature and filters, if asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprob: Option<f32>,
    /// The likeliest alternatives, best first, if asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub top: Vec<TokenLogprob>,
}

/// A token and the natural log of its probability.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// The token.
    pub id: TokenId,
    /// Natural log of its probability.
    pub logprob: f32,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end token or a stop condition.
    Stop,
    /// `max_tokens` or the context length.
    Length,
    /// Cancelled by the client.
    Cancelled,
}

/// What a request cost.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens generated.
    pub completion_tokens: u32,
    /// Prompt tokens whose KV was already there (on the worker that decoded), in any tier.
    pub cached_tokens: u32,
    /// Those of them that were loaded from host memory (G2).
    pub cached_host_tokens: u32,
    /// Those that were loaded from disk (G3).
    pub cached_disk_tokens: u32,
    /// Those that were loaded from an object store or another worker (G4).
    pub cached_remote_tokens: u32,
    /// Prompt tokens computed by a remote prefill worker.
    pub remote_prefill_tokens: u32,
    /// KV blocks received from a prefill worker.
    pub transfer_blocks: u32,
    /// KV bytes received from a prefill worker.
    pub transfer_bytes: u64,
    /// Those of them that were in place before the prefill worker had computed the prompt's last
    /// layer: their way was hidden behind the computation.
    pub overlapped_bytes: u64,
    /// The lane that carried them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lane: Option<String>,
}

/// A failed request, as it crosses processes. `kind` decides what a caller does next.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct GenerateError {
    /// Class of the failure.
    pub kind: ErrorKind,
    /// What went wrong, where, and what would be accepted.
    pub message: String,
}

/// Class of a [`GenerateError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request cannot be served by any worker.
    InvalidRequest,
    /// No worker has room now; try again later.
    Overloaded,
    /// No worker is there.
    Unavailable,
    /// The worker was lost or is leaving; another one may serve the request.
    WorkerLost,
    /// The deadline passed.
    DeadlineExceeded,
    /// The request was cancelled.
    Cancelled,
    /// A fault of ours.
    Internal,
}

impl GenerateRequest {
    /// Seed of this request's block hashes.
    #[must_use]
    pub fn salt(&self) -> SaltHash {
        SaltHash::new(self.cache_salt.as_deref(), self.lora_name.as_deref())
    }
}

impl GenerateError {
    /// An error of this kind.
    #[must_use]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }
}

impl ErrorKind {
    /// Whether the same request may succeed on another worker.
    #[must_use]
    pub const fn retryable(self) -> bool {
        matches!(
            self,
            Self::Overloaded | Self::WorkerLost | Self::Unavailable
        )
    }
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: None,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
        }
    }
}

impl Default for StopConditions {
    fn default() -> Self {
        Self {
            max_tokens: 16,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
        }
    }
}

//! The contract between a worker and what computes its tokens.

use std::{fmt, time::Duration};

use blockplane_kvbm::EventFeed;
use blockplane_protocol::{
    DpRank, GenerateError, GenerateRequest, KvLayout, LoadReport, PrefillHint, PrefillJob,
    PrefillReply, TokenId, WorkerRole,
};
use futures::future::BoxFuture;

use crate::stream::{PrefillTicket, TokenStream};

/// Computes tokens for requests. One engine serves one model on one or more data-parallel ranks.
///
/// Methods do not block: work happens on the engine's own threads.
pub trait Engine: Send + Sync + fmt::Debug {
    /// What it serves and with what capacity. Constant for the life of the engine.
    fn info(&self) -> &EngineInfo;

    /// Starts a request on rank `request.route.rank`.
    ///
    /// The stream yields frames of generated tokens and ends after the frame that carries
    /// `finish`, or after an error. A token that ended the generation (an end token, a stop token)
    /// is the last token of the last frame. Dropping the stream cancels the request and frees its
    /// blocks.
    ///
    /// # Errors
    /// When the request is not valid for this engine, or the engine is full or leaving.
    fn generate(&self, request: GenerateRequest) -> Result<TokenStream, GenerateError>;

    /// Computes a prompt and writes its KV to the decode worker named in the job.
    ///
    /// Dropping the ticket cancels the job; memory stays untouched until no byte of it can move
    /// any more.
    ///
    /// # Errors
    /// As for [`Engine::generate`]; also when this engine does not prefill for others, or the KV
    /// of the two workers cannot be exchanged.
    fn prefill(&self, job: PrefillJob) -> Result<PrefillTicket, GenerateError>;

    /// The load of each rank, in rank order.
    fn load(&self) -> Vec<LoadReport>;

    /// The KV events of a rank; `None` when there is no such rank.
    fn events(&self, rank: DpRank) -> Option<EventFeed>;

    /// Stops accepting requests, lets the running ones finish within `grace` and cancels the rest.
    /// Work starts with the call, not with the first poll of the future.
    fn drain(&self, grace: Duration) -> BoxFuture<'static, ()>;

    /// Whether a request sent now would be served.
    fn health(&self) -> Health;
}

/// What an engine serves, and with what capacity.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineInfo {
    /// Name of the model.
    pub model: String,
    /// Identity of the model's KV; workers with different ones do not exchange blocks.
    pub model_fingerprint: u64,
    /// What part of a request it does.
    pub role: WorkerRole,
    /// Shape of the pool of each rank.
    pub layout: KvLayout,
    /// Blocks of the pool of each rank.
    pub blocks: u32,
    /// Data-parallel ranks.
    pub dp_size: u32,
    /// Longest sequence, prompt and output together: the model's context length, or what the pool
    /// holds if that is less.
    pub context_tokens_max: u32,
    /// Rows of the embedding; token ids are below it.
    pub vocab_size: u32,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<TokenId>,
}

/// Whether an engine serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// A request sent now is served.
    Ready,
    /// It finishes what runs and takes nothing new.
    Draining,
    /// It has finished what ran when it was told to leave.
    Stopped,
    /// It should work and does not.
    Unhealthy {
        /// What is wrong.
        reason: String,
    },
}

impl Health {
    /// Whether a request sent now would be served.
    #[must_use]
    pub const fn is_ready(&self) -> bool {
        matches!(self, Self::Ready)
    }
}

/// The way from a decode worker to the prefill workers.
pub trait RemotePrefill: Send + Sync + fmt::Debug {
    /// Whether any prefill worker is there now.
    fn available(&self) -> bool;

    /// Sends `job` to one of `hints`, best first, and returns its reply. The implementation sets
    /// `job.request.route.rank` to the rank it picks, and may pick a worker of its own when `hints`
    /// is empty. One call is one attempt: the caller retries. Dropping the future cancels the job
    /// on the prefill worker.
    fn prefill(
        &self,
        hints: Vec<PrefillHint>,
        job: PrefillJob,
    ) -> BoxFuture<'static, Result<PrefillReply, GenerateError>>;
}

// Both are used behind `dyn`.
const _: Option<(&dyn Engine, &dyn RemotePrefill)> = None;

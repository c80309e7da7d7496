//! Why an engine does not take a request.

use blockplane_protocol::{
    ErrorKind, GenerateError, GenerateRequest, LayoutError, PRIORITY_MAX, SamplingParams, TokenId,
    WorkerRole,
};
use thiserror::Error;

use crate::{engine::EngineInfo, model::LoadError};

/// Alternatives that may be asked for per token.
pub const LOGPROBS_MAX: u32 = 20;

/// Why a request is not taken.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum RequestError {
    /// Another model.
    #[error("this engine serves model '{served}', not '{requested}'")]
    Model {
        /// The name in the request.
        requested: String,
        /// The name of the engine's model.
        served: String,
    },
    /// No token at all.
    #[error("the prompt is empty; it needs at least 1 token")]
    EmptyPrompt,
    /// No room for a generated token.
    #[error(
        "the prompt has {tokens} tokens; at most {limit} fit the context of {context} tokens with one \
         token to generate"
    )]
    PromptTooLong {
        /// Its length.
        tokens: usize,
        /// The longest one accepted.
        limit: u32,
        /// Longest sequence.
        context: u32,
    },
    /// Nothing to generate.
    #[error("max_tokens is 0; it must be at least 1")]
    NothingToGenerate,
    /// A token that the model does not know.
    #[error("token id {token} at {place} is out of the vocabulary of {vocab} tokens")]
    UnknownToken {
        /// The id.
        token: TokenId,
        /// Where it was found.
        place: String,
        /// Rows of the embedding.
        vocab: u32,
    },
    /// A sampling parameter out of its range.
    #[error("{name} is {value}; accepted: {accepted}")]
    Sampling {
        /// The parameter.
        name: &'static str,
        /// Its value.
        value: f32,
        /// What it may be.
        accepted: &'static str,
    },
    /// Too many alternatives.
    #[error("logprobs asks for {asked} alternatives; accepted: 0 to {LOGPROBS_MAX}")]
    Logprobs {
        /// How many.
        asked: u32,
    },
    /// `LoRA` is not served.
    #[error("LoRA adapter '{name}' is not served by this engine")]
    Lora {
        /// The adapter.
        name: String,
    },
    /// A priority out of its range.
    #[error("priority is {asked}; accepted: 0 to {PRIORITY_MAX}")]
    Priority {
        /// What was asked for.
        asked: u32,
    },
    /// A rank that does not exist.
    #[error("there is no data-parallel rank {rank}; this engine has {dp_size}")]
    Rank {
        /// The rank asked for.
        rank: u32,
        /// How many there are.
        dp_size: u32,
    },
    /// A cache salt that is too long.
    #[error("cache_salt has {chars} characters; accepted: up to {limit}")]
    CacheSalt {
        /// Its length.
        chars: usize,
        /// The longest one accepted.
        limit: usize,
    },
    /// No time left.
    #[error("the request arrived with no time left (deadline_ms is 0)")]
    NoTimeLeft,
    /// Too many requests are in the engine.
    #[error("{limit} requests run or wait on this rank, which is its limit; try again later")]
    QueueFull {
        /// The limit.
        limit: usize,
    },
    /// The engine is leaving.
    #[error("this worker is leaving and takes no new requests")]
    Draining,
    /// The engine does not work.
    #[error("this worker's engine does not run: {reason}")]
    Unhealthy {
        /// Why.
        reason: String,
    },
    /// A role that does not do this.
    #[error("a worker with role '{}' does not {what}", role.as_str())]
    Role {
        /// Its role.
        role: WorkerRole,
        /// The operation.
        what: &'static str,
    },
    /// KV cannot be exchanged.
    #[error("the KV of the two workers cannot be exchanged: {reason}")]
    Incompatible {
        /// What differs.
        reason: String,
    },
    /// A job that contradicts itself.
    #[error("malformed prefill job: {reason}")]
    MalformedJob {
        /// What is wrong.
        reason: String,
    },
}

impl RequestError {
    /// The class of the failure.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        match self {
            Self::QueueFull { .. } => ErrorKind::Overloaded,
            Self::Draining | Self::Unhealthy { .. } => ErrorKind::WorkerLost,
            Self::NoTimeLeft => ErrorKind::DeadlineExceeded,
            Self::Model { .. }
            | Self::EmptyPrompt
            | Self::PromptTooLong { .. }
            | Self::NothingToGenerate
            | Self::UnknownToken { .. }
            | Self::Sampling { .. }
            | Self::Logprobs { .. }
            | Self::Lora { .. }
            | Self::Priority { .. }
            | Self::Rank { .. }
            | Self::CacheSalt { .. }
            | Self::Role { .. }
            | Self::Incompatible { .. }
            | Self::MalformedJob { .. } => ErrorKind::InvalidRequest,
        }
    }

    /// Whether the same request may succeed on another worker or later.
    #[must_use]
    pub const fn retryable(&self) -> bool {
        self.kind().retryable()
    }
}

impl From<RequestError> for GenerateError {
    fn from(error: RequestError) -> Self {
        Self::new(error.kind(), error.to_string())
    }
}

/// Checks everything about a request that does not depend on the engine's load.
///
/// # Errors
/// A [`RequestError`] that names the first fault.
pub fn validate(request: &GenerateRequest, info: &EngineInfo) -> Result<(), RequestError> {
    if let Some(name) = request.lora_name.clone().filter(|name| !name.is_empty()) {
        return Err(RequestError::Lora { name });
    }
    validate_parameters(request, info)
}

/// The same for an engine that may serve `LoRA` adapters.
///
/// # Errors
/// A [`RequestError`] that names the first fault.
pub fn validate_parameters(
    request: &GenerateRequest,
    info: &EngineInfo,
) -> Result<(), RequestError> {
    if request.model != info.model {
        return Err(RequestError::Model {
            requested: request.model.clone(),
            served: info.model.clone(),
        });
    }
    if let Some(asked) = request.priority.filter(|&p| p > PRIORITY_MAX) {
        return Err(RequestError::Priority { asked });
    }
    if request.route.rank.0 >= info.dp_size {
        return Err(RequestError::Rank {
            rank: request.route.rank.0,
            dp_size: info.dp_size,
        });
    }
    if request.token_ids.is_empty() {
        return Err(RequestError::EmptyPrompt);
    }
    let limit = info.context_tokens_max - 1;
    if request.token_ids.len() > limit as usize {
        return Err(RequestError::PromptTooLong {
            tokens: request.token_ids.len(),
            limit,
            context: info.context_tokens_max,
        });
    }
    if request.stop.max_tokens == 0 {
        return Err(RequestError::NothingToGenerate);
    }
    if request.deadline_ms == 0 {
        return Err(RequestError::NoTimeLeft);
    }
    if let Some(asked) = request.logprobs.filter(|&n| n > LOGPROBS_MAX) {
        return Err(RequestError::Logprobs { asked });
    }
    known_tokens(&request.token_ids, "prompt", info.vocab_size)?;
    known_tokens(
        &request.stop.stop_token_ids,
        "stop_token_ids",
        info.vocab_size,
    )?;
    let biased: Vec<TokenId> = request.sampling.logit_bias.iter().map(|b| b.0).collect();
    known_tokens(&biased, "logit_bias", info.vocab_size)?;
    validate_sampling(&request.sampling)
}

fn known_tokens(tokens: &[TokenId], list: &str, vocab: u32) -> Result<(), RequestError> {
    match tokens.iter().position(|&token| token >= vocab) {
        None => Ok(()),
        Some(index) => Err(RequestError::UnknownToken {
            token: tokens[index],
            place: format!("{list}[{index}]"),
            vocab,
        }),
    }
}

fn validate_sampling(sampling: &SamplingParams) -> Result<(), RequestError> {
    let check = |ok: bool, name, value: f32, accepted| {
        if ok && value.is_finite() {
            Ok(())
        } else {
            Err(RequestError::Sampling {
                name,
                value,
                accepted,
            })
        }
    };
    let s = sampling;
    check(
        s.temperature >= 0.0,
        "temperature",
        s.temperature,
        "0 or more",
    )?;
    check(
        s.top_p > 0.0 && s.top_p <= 1.0,
        "top_p",
        s.top_p,
        "more than 0, at most 1",
    )?;
    check((0.0..=1.0).contains(&s.min_p), "min_p", s.min_p, "0 to 1")?;
    check(
        s.repetition_penalty > 0.0,
        "repetition_penalty",
        s.repetition_penalty,
        "more than 0",
    )?;
    let penalty = "-2 to 2";
    check(
        (-2.0..=2.0).contains(&s.presence_penalty),
        "presence_penalty",
        s.presence_penalty,
        penalty,
    )?;
    check(
        (-2.0..=2.0).contains(&s.frequency_penalty),
        "frequency_penalty",
        s.frequency_penalty,
        penalty,
    )?;
    for &(_, bias) in &s.logit_bias {
        check(
            (-100.0..=100.0).contains(&bias),
            "logit_bias",
            bias,
            "-100 to 100",
        )?;
    }
    Ok(())
}

/// Why an engine does not start.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StartError {
    /// A configuration value out of its range.
    #[error("{name} is {value}; accepted: {accepted}")]
    Config {
        /// The setting.
        name: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        accepted: String,
    },
    /// The KV layout of the model with these blocks is not valid.
    #[error("the KV pool cannot be laid out: {0}")]
    Layout(#[from] LayoutError),
    /// The KV pool was not allocated.
    #[error("the KV pool of rank {rank} was not allocated: {reason}")]
    Arena {
        /// The rank.
        rank: u32,
        /// Why.
        reason: String,
    },
    /// A rank was not put above the lower tiers.
    #[error("rank {rank} does not get the tiers below its pool: {reason}")]
    Tiers {
        /// The rank.
        rank: u32,
        /// Why.
        reason: String,
    },
    /// The model's working memory was not allocated.
    #[error(transparent)]
    Model(#[from] LoadError),
    /// A thread was not started.
    #[error("thread '{name}' was not started: {source}")]
    Thread {
        /// Its name.
        name: String,
        /// Why.
        source: std::io::Error,
    },
}

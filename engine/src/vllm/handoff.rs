//! A prompt computed by one vLLM server and generated from on another, by vLLM's own connector.
//!
//! The prefill server is asked for one token and to keep the KV (`do_remote_decode`); it answers with
//! `kv_transfer_params`, which say where the KV is. The decode server gets them with the request,
//! unchanged, fetches the KV, and computes the first token again from the prompt's last one. So the
//! tokens are those of one server alone.
//!
//! **Failure.** Whatever fails before a token was sent on leads to the next prefill worker, and then to
//! a prefill on the own server. vLLM frees the KV that it keeps when the decode server has fetched it,
//! when a request with its parameters is aborted there, or when its lease is over.

use std::{fmt, sync::Arc, time::Duration};

use blockplane_protocol::{
    ConnectorTarget, ErrorKind, GenerateError, GenerateRequest, PrefillJob, PrefillReply,
    PrefillTarget,
};
use serde_json::value::RawValue;
use tokio::time::{Instant, timeout_at};

use super::{
    Shared, answer,
    client::{self, HttpError},
    load::Entry,
    request::{self, Purpose},
    run::{Generation, Stopped},
};
use crate::{engine::RemotePrefill, error::RequestError};

/// How a decode server gets its prompts computed elsewhere.
#[derive(Clone)]
pub struct RemotePrefillConfig {
    /// The way to the prefill workers.
    pub workers: Arc<dyn RemotePrefill>,
    /// Shorter prompts are computed on the own server. Default 64; never less than a block, because
    /// connectors move whole blocks.
    pub tokens_min: u32,
    /// Prefill workers tried for a request before the own server computes its prompt. Default 2.
    pub attempts_max: u32,
    /// Longest time from sending a job to its reply. Default 30 s.
    pub attempt_timeout: Duration,
    /// Longest time from that to the first token, waiting in the own server's queue included: vLLM
    /// notices by itself what it cannot load. Default 120 s.
    pub first_token_timeout: Duration,
}

/// KV on a prefill server.
struct Remote {
    params: Box<RawValue>,
    computed_tokens: u32,
}

impl RemotePrefillConfig {
    /// The defaults for these workers.
    #[must_use]
    pub fn new(workers: Arc<dyn RemotePrefill>) -> Self {
        Self {
            workers,
            tokens_min: 64,
            attempts_max: 2,
            attempt_timeout: Duration::from_secs(30),
            first_token_timeout: Duration::from_secs(120),
        }
    }
}

impl fmt::Debug for RemotePrefillConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemotePrefillConfig")
            .field("tokens_min", &self.tokens_min)
            .finish_non_exhaustive()
    }
}

/// Refuses a job that this server cannot do.
pub(super) fn check(target: &PrefillTarget, own: &str) -> Result<(), RequestError> {
    let reason = match target {
        PrefillTarget::Connector(target) if target.identity == own => return Ok(()),
        PrefillTarget::Connector(target) => format!(
            "the decode worker has {}; this prefill worker has {own}",
            target.identity
        ),
        PrefillTarget::Blocks(_) => {
            "the decode worker wants KV in blocks of ours; vLLM hands it over by its own connector"
                .to_owned()
        }
    };
    Err(RequestError::Incompatible { reason })
}

/// Computes a prompt for another server. The server gives it up when the future is dropped.
pub(super) async fn prefill(
    shared: &Shared,
    request: &GenerateRequest,
    mut entry: Entry,
) -> Result<PrefillReply, GenerateError> {
    let target = shared.target();
    let path = target.route.path();
    let body = request::body(request, &target, Purpose::Prefill);
    let headers = shared.headers(request);
    let exchange = async {
        let response = shared.http.post(path, &headers, body).await?;
        shared.http.body(response).await
    };
    let limit = Duration::from_millis(request.deadline_ms);
    let body = shared.http.within(path, limit, exchange).await?;
    let done: answer::Prefilled = client::parse(&body)?;
    entry.tokens(1);
    let prompt = u32::try_from(request.token_ids.len()).unwrap_or(u32::MAX);
    let cached = done.usage.unwrap_or_default().cached_tokens();
    entry.cached(cached);
    Ok(PrefillReply {
        computed_tokens: prompt.saturating_sub(cached),
        cached_blocks: cached / shared.info.layout.block_tokens,
        kv_transfer_params: done
            .kv_transfer_params
            .map(|params| params.get().to_owned()),
        ..PrefillReply::default()
    })
}

/// Generates over KV that a prefill worker computes. Gives the request back when it is left to the own
/// server.
pub(super) async fn generate(
    shared: &Shared,
    config: &RemotePrefillConfig,
    mut generation: Generation,
) -> Option<Generation> {
    let mut hints = generation.request.route.prefill.clone();
    for attempt in 0..config.attempts_max {
        if hints.is_empty() || !config.workers.available() {
            break;
        }
        let call = config
            .workers
            .prefill(hints.clone(), job(shared, &generation));
        let until = generation
            .deadline
            .min(Instant::now() + config.attempt_timeout);
        let reply = timeout_at(until, call).await.unwrap_or_else(|_| {
            let message = "the prefill worker did not finish in time";
            Err(GenerateError::new(ErrorKind::WorkerLost, message))
        });
        let failed = match reply.and_then(remote) {
            // Nothing to fetch: the prompt is too short for the connector.
            Ok(None) => break,
            Ok(Some(remote)) => {
                generation.remote_tokens = remote.computed_tokens;
                let first_by = Instant::now() + config.first_token_timeout;
                let ended = generation
                    .attempt(shared, Some(&remote.params), first_by)
                    .await;
                match ended {
                    Err(stopped) if may_go_on(&stopped, &generation) => format!("{stopped:?}"),
                    ended => {
                        generation.end(ended);
                        return None;
                    }
                }
            }
            Err(error) => error.to_string(),
        };
        tracing::info!(
            request = %generation.request.request_id,
            attempt,
            failed,
            "remote prefill failed"
        );
        generation.remote_tokens = 0;
        hints.remove(0);
    }
    Some(generation)
}

/// Whether a request is worth being computed elsewhere.
pub(super) fn wanted(shared: &Shared, request: &GenerateRequest) -> bool {
    let min = shared
        .remote
        .as_ref()
        .map(|remote| remote.tokens_min.max(shared.info.layout.block_tokens));
    min.is_some_and(|min| request.token_ids.len() >= min as usize)
        && !request.route.prefill.is_empty()
}

/// A server that is out of reach is not asked again; a request that was refused is not either.
fn may_go_on(stopped: &Stopped, generation: &Generation) -> bool {
    let own_fault = match stopped {
        Stopped::Late => true,
        Stopped::Failed(HttpError::Status { status, .. }) => *status >= 500,
        Stopped::Failed(_) => false,
    };
    own_fault && generation.untouched() && Instant::now() < generation.deadline
}

fn job(shared: &Shared, generation: &Generation) -> PrefillJob {
    let left = generation
        .deadline
        .saturating_duration_since(Instant::now());
    let mut request = generation.request.clone();
    request.deadline_ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
    request.route.prefill.clear();
    PrefillJob {
        request,
        target: PrefillTarget::Connector(ConnectorTarget {
            identity: shared.identity.clone(),
        }),
    }
}

fn remote(reply: PrefillReply) -> Result<Option<Remote>, GenerateError> {
    let Some(text) = reply.kv_transfer_params else {
        return Ok(None);
    };
    let params = RawValue::from_string(text).map_err(|error| {
        let message = format!("the prefill worker's kv_transfer_params are not JSON: {error}");
        GenerateError::new(ErrorKind::Internal, message)
    })?;
    Ok(Some(Remote {
        params,
        computed_tokens: reply.computed_tokens,
    }))
}

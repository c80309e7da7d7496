//! One request on its way through a vLLM server.

use std::{sync::Arc, time::Duration};

use blockplane_protocol::{ErrorKind, FinishReason, GenerateError, GenerateRequest, Usage};
use http_body_util::BodyExt;
use serde_json::value::RawValue;
use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};

use super::{
    Shared,
    answer::{self, Events, Said, WireUsage},
    client::{HttpError, malformed},
    handoff,
    load::Entry,
    request::{self, Purpose},
};
use crate::stream::TokenSender;

/// Ends a request from outside.
#[derive(Clone, Debug, Default)]
pub(super) struct Cancel(Arc<Notify>);

/// What the tokens of one attempt become.
pub(super) struct Generation {
    pub(super) request: GenerateRequest,
    pub(super) sender: TokenSender,
    pub(super) entry: Entry,
    pub(super) deadline: Instant,
    /// Tokens that were sent on.
    produced: u32,
    /// KV that another server computed.
    pub(super) remote_tokens: u32,
}

/// Why an attempt is over before the request is.
#[derive(Debug)]
pub(super) enum Stopped {
    /// The server said no, broke, or stopped.
    Failed(HttpError),
    /// The time of the attempt is over.
    Late,
}

impl Cancel {
    pub(super) fn cancel(&self) {
        self.0.notify_one();
    }

    pub(super) async fn cancelled(&self) {
        self.0.notified().await;
    }
}

impl Generation {
    pub(super) fn new(request: GenerateRequest, sender: TokenSender, entry: Entry) -> Self {
        Self {
            deadline: Instant::now() + Duration::from_millis(request.deadline_ms),
            request,
            sender,
            entry,
            produced: 0,
            remote_tokens: 0,
        }
    }

    /// Whether nothing was sent on yet, so that another attempt may start from the beginning.
    pub(super) const fn untouched(&self) -> bool {
        self.produced == 0
    }

    /// Has the server generate, over KV of another server if there are parameters of its. The first
    /// token has to be there at `first_by`. The server gives the request up when this is dropped.
    pub(super) async fn attempt(
        &mut self,
        shared: &Shared,
        kv: Option<&RawValue>,
        first_by: Instant,
    ) -> Result<(FinishReason, Usage), Stopped> {
        let limit = first_by.min(self.deadline);
        let answer = self.open(shared, kv);
        let mut body = timeout_at(limit, answer)
            .await
            .map_err(|_| Stopped::Late)??;
        let top = self.request.logprobs.unwrap_or(0) as usize;
        let mut events = Events::default();
        let mut finish = None;
        let mut usage = None;
        loop {
            let until = if self.untouched() {
                limit
            } else {
                self.deadline
            };
            let frame = timeout_at(until, body.frame())
                .await
                .map_err(|_| Stopped::Late)?;
            let Some(frame) = frame else {
                let broken = &"it closed the connection in the middle of an answer";
                return Err(Stopped::Failed(shared.http.unreachable(broken)));
            };
            let frame = frame.map_err(|error| shared.http.unreachable(&error))?;
            let Some(bytes) = frame.data_ref() else {
                continue;
            };
            events.push(bytes)?;
            while let Some(data) = events.next() {
                let Some(said) = answer::read(data, top)? else {
                    let reason = finish.ok_or_else(|| malformed("an end without a finish"))?;
                    return Ok((reason, self.usage(usage)));
                };
                self.take(said, &mut finish, &mut usage)?;
            }
        }
    }

    async fn open(
        &self,
        shared: &Shared,
        kv: Option<&RawValue>,
    ) -> Result<hyper::body::Incoming, HttpError> {
        let target = shared.target();
        let body = request::body(&self.request, &target, Purpose::Generate { kv });
        let headers = shared.headers(&self.request);
        let response = shared
            .http
            .post(target.route.path(), &headers, body)
            .await?;
        Ok(response.into_body())
    }

    fn take(
        &mut self,
        said: Said,
        finish: &mut Option<FinishReason>,
        usage: &mut Option<WireUsage>,
    ) -> Result<(), HttpError> {
        if !said.tokens.is_empty() {
            self.entry.tokens(said.tokens.len());
        }
        for token in said.tokens {
            self.produced += 1;
            // Nobody may want it any more: then this task is about to be dropped.
            self.sender.token(token);
        }
        if let Some(reason) = said.finish {
            *finish = Some(finish_reason(&reason)?);
        }
        *usage = said.usage.or(*usage);
        Ok(())
    }

    fn usage(&self, told: Option<WireUsage>) -> Usage {
        let prompt = u32::try_from(self.request.token_ids.len()).unwrap_or(u32::MAX);
        let told = told.unwrap_or_default();
        // vLLM counts what came from another server as cached.
        let cached = told.cached_tokens().saturating_sub(self.remote_tokens);
        self.entry.cached(cached);
        Usage {
            prompt_tokens: prompt,
            completion_tokens: self.produced,
            cached_tokens: cached,
            remote_prefill_tokens: self.remote_tokens,
            ..Usage::default()
        }
    }

    /// Tells the client how it ended.
    pub(super) fn end(self, ended: Result<(FinishReason, Usage), Stopped>) {
        match ended {
            Ok((reason, usage)) => self.sender.finish(reason, usage),
            Err(Stopped::Late) => self.sender.fail(GenerateError::new(
                ErrorKind::DeadlineExceeded,
                "the request's deadline passed while vLLM worked on it",
            )),
            Err(Stopped::Failed(error)) => self.sender.fail(error.into()),
        }
    }
}

impl From<HttpError> for Stopped {
    fn from(error: HttpError) -> Self {
        Self::Failed(error)
    }
}

fn finish_reason(reason: &str) -> Result<FinishReason, HttpError> {
    match reason {
        // Repetition is only looked for where a request asks for it.
        "stop" | "repetition" => Ok(FinishReason::Stop),
        "length" => Ok(FinishReason::Length),
        // Not by us, or nobody would read it: the server is leaving, or KV could not be loaded.
        "abort" | "error" => Err(HttpError::Status {
            status: 500,
            message: format!("it ended the request itself ({reason})"),
        }),
        other => Err(malformed(&format_args!("finish_reason '{other}'"))),
    }
}

/// Generates to the end.
pub(super) async fn run(shared: &Shared, mut generation: Generation) {
    if let Some(remote) = &shared.remote
        && handoff::wanted(shared, &generation.request)
    {
        match handoff::generate(shared, remote, generation).await {
            Some(left) => generation = left,
            None => return,
        }
    }
    let deadline = generation.deadline;
    let ended = generation.attempt(shared, None, deadline).await;
    if let Err(Stopped::Failed(
        HttpError::Unreachable { .. } | HttpError::Status { status: 500.., .. },
    )) = &ended
    {
        shared.look_now.notify_one();
    }
    generation.end(ended);
}

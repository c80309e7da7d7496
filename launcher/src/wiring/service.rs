//! Requests from HTTP to workers: route, send, and continue elsewhere when a worker is lost.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use blockplane_frontend::{FrameStream, ModelService, ServiceStatus, WorkerStatus};
use blockplane_protocol::{
    ErrorKind, GenerateError, GenerateRequest, ModelCard, TokenFrame, TokenId, TokenSequence,
    WorkerId, codec,
};
use blockplane_router::{Reservation, RouteRequest};
use blockplane_runtime::rpc::{CallOptions, Responses};
use bytes::Bytes;
use futures::{StreamExt, stream};
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::time::Instant;

use super::{
    descriptor::GENERATE,
    fleet::{Fleet, MemberState, ModelGroup},
    handlers::millis,
};

/// The fleet as the frontend sees it.
#[derive(Debug)]
pub(crate) struct RoutedService {
    fleet: Arc<Fleet>,
    migration_limit: u32,
    random: Mutex<StdRng>,
}

impl RoutedService {
    /// Routes requests over `fleet`; `seed` makes the router's random choices repeatable.
    pub(crate) fn new(fleet: Arc<Fleet>, migration_limit: u32, seed: Option<u64>) -> Self {
        let seed = seed.unwrap_or_else(rand::random);
        Self {
            fleet,
            migration_limit,
            random: Mutex::new(StdRng::seed_from_u64(seed)),
        }
    }
}

#[async_trait]
impl ModelService for RoutedService {
    fn models(&self) -> Vec<Arc<ModelCard>> {
        self.fleet.models()
    }

    /// Returns with the first frame, so that an error before it decides the HTTP status.
    async fn generate(&self, mut request: GenerateRequest) -> Result<FrameStream, GenerateError> {
        let group = self.fleet.model(&request.model).ok_or_else(|| {
            let message = format!("no worker serves model '{}' now", request.model);
            GenerateError::new(ErrorKind::Unavailable, message)
        })?;
        let draw = {
            let mut random = self.random.lock();
            request
                .sampling
                .seed
                .get_or_insert_with(|| random.next_u64());
            random.next_u64()
        };
        let deadline = Instant::now() + Duration::from_millis(request.deadline_ms);
        let mut run = Run {
            fleet: Arc::clone(&self.fleet),
            group,
            request,
            deadline,
            draw,
            migrations_left: self.migration_limit,
            excluded: Vec::new(),
            produced: Vec::new(),
            leg: None,
            lost: None,
            ended: false,
        };
        let first = run.next().await.unwrap_or_else(|| Err(ended_early()))?;
        let rest = stream::unfold(run, |mut run| async {
            let item = run.next().await?;
            Some((item, run))
        });
        Ok(Box::pin(stream::iter([Ok(first)]).chain(rest)))
    }

    fn status(&self) -> ServiceStatus {
        let ready = !self.fleet.models().is_empty();
        let reason = if ready {
            ""
        } else {
            "no worker that generates tokens is connected"
        };
        let members = self.fleet.members();
        let workers = members.iter().map(|member| {
            let state = match member.state() {
                MemberState::Connecting => "connecting".to_owned(),
                MemberState::Ready => "ready".to_owned(),
                MemberState::Lost(reason) => format!("lost: {reason}"),
                MemberState::Refused(reason) => format!("refused: {reason}"),
            };
            WorkerStatus {
                id: member.id,
                name: member.descriptor.name.clone(),
                role: member.descriptor.card.role,
                address: member.address.clone(),
                state,
                load: member.loads(),
            }
        });
        ServiceStatus {
            ready,
            reason: reason.to_owned(),
            workers: workers.collect(),
        }
    }
}

/// One request on its way, over as many workers as it takes.
struct Run {
    fleet: Arc<Fleet>,
    group: Arc<ModelGroup>,
    request: GenerateRequest,
    deadline: Instant,
    draw: u64,
    migrations_left: u32,
    excluded: Vec<WorkerId>,
    /// Tokens that went to the client.
    produced: Vec<TokenId>,
    leg: Option<Leg>,
    /// Why the last worker does not have the request any more.
    lost: Option<GenerateError>,
    ended: bool,
}

/// The request on one worker. Dropping it cancels it there.
struct Leg {
    worker: WorkerId,
    responses: Responses,
    reservation: Reservation,
    /// Tokens that earlier workers produced.
    produced_before: usize,
}

impl Run {
    async fn next(&mut self) -> Option<Result<TokenFrame, GenerateError>> {
        if self.ended {
            return None;
        }
        loop {
            match self.step().await {
                Ok(frame) => {
                    self.ended = frame.finish.is_some();
                    if self.ended {
                        self.leg = None;
                    }
                    return Some(Ok(frame));
                }
                Err((None, error)) if let Some(lost) = self.lost.take() => {
                    self.ended = true;
                    let message = format!("{lost}; no other worker takes the request: {error}");
                    return Some(Err(GenerateError::new(lost.kind, message)));
                }
                Err((failed, error)) => {
                    self.leg = None;
                    if !self.may_go_on(&error) {
                        self.ended = true;
                        return Some(Err(error));
                    }
                    tracing::info!(
                        request = %self.request.request_id,
                        tokens = self.produced.len(),
                        %error,
                        "request goes on with another worker"
                    );
                    self.migrations_left -= 1;
                    self.excluded.extend(failed);
                    self.lost = Some(error);
                }
            }
        }
    }

    fn may_go_on(&self, error: &GenerateError) -> bool {
        let generated = u32::try_from(self.produced.len()).unwrap_or(u32::MAX);
        error.kind.retryable()
            && self.migrations_left > 0
            && Instant::now() < self.deadline
            && generated < self.request.stop.max_tokens
    }

    /// The next frame of the current worker, or of one chosen now.
    async fn step(&mut self) -> Result<TokenFrame, (Option<WorkerId>, GenerateError)> {
        if self.leg.is_none() {
            self.leg = Some(self.dispatch().await?);
        }
        let leg = self.leg.as_mut().expect("set above");
        let failed = |error: GenerateError| (Some(leg.worker), error);
        let message = match leg.responses.next().await {
            Some(Ok(message)) => message,
            Some(Err(error)) => return Err(failed(error.into())),
            None => return Err(failed(ended_early())),
        };
        let mut frame: TokenFrame = codec::decode(&message)
            .map_err(|error| failed(GenerateError::new(ErrorKind::Internal, error.to_string())))?;
        self.account(&mut frame);
        Ok(frame)
    }

    fn account(&mut self, frame: &mut TokenFrame) {
        let leg = self.leg.as_ref().expect("a frame comes from a leg");
        let now = self.fleet.now();
        let block = self.group.card.kv_layout.block_tokens as usize;
        let before = self.produced.len();
        self.produced
            .extend(frame.tokens.iter().map(|token| token.id));
        if before == leg.produced_before && before < self.produced.len() {
            leg.reservation.prefill_done(now);
        }
        let filled = self.produced.len() / block - before / block;
        if filled > 0 {
            leg.reservation.output_blocks(filled as u64, now);
        }
        if let Some(usage) = &mut frame.usage {
            let earlier = u32::try_from(leg.produced_before).unwrap_or(u32::MAX);
            usage.prompt_tokens = usage.prompt_tokens.saturating_sub(earlier);
            usage.completion_tokens = usage.completion_tokens.saturating_add(earlier);
        }
    }

    /// Chooses a worker and sends the request, continued after the tokens already produced.
    async fn dispatch(&self) -> Result<Leg, (Option<WorkerId>, GenerateError)> {
        let remaining = self.deadline.saturating_duration_since(Instant::now());
        if remaining.is_zero() {
            let message = "the request's deadline passed before a worker could take it";
            return Err((
                None,
                GenerateError::new(ErrorKind::DeadlineExceeded, message),
            ));
        }
        let produced = self.produced.len();
        let mut request = self.request.clone();
        request.token_ids.extend_from_slice(&self.produced);
        let generated = u32::try_from(produced).unwrap_or(u32::MAX);
        request.stop.max_tokens = request.stop.max_tokens.saturating_sub(generated);
        request.stop.min_tokens = request.stop.min_tokens.saturating_sub(generated);
        request.deadline_ms = millis(remaining);

        let block_tokens = self.group.card.kv_layout.block_tokens as usize;
        let prompt = TokenSequence::from_tokens(&request.token_ids, block_tokens, request.salt());
        let mut route = RouteRequest::from_sequence(&prompt);
        route.excluded.clone_from(&self.excluded);
        let routed = self
            .group
            .router
            .plan(&route, self.fleet.now(), self.draw)
            .map_err(|error| (None, error.into()))?;
        let target = routed.plan.decode.target;
        request.route = routed.plan.route_hints();
        tracing::debug!(
            request = %request.request_id,
            worker = %target,
            cached_blocks = routed.plan.decode.cached_blocks,
            prefill = ?request.route.prefill,
            "routed"
        );
        let worker = target.worker;
        let address = self.fleet.address(worker).ok_or_else(|| {
            let message = format!("worker {worker} left while the request was routed to it");
            (
                Some(worker),
                GenerateError::new(ErrorKind::WorkerLost, message),
            )
        })?;
        let options = CallOptions::new(remaining).request_id(request.request_id.clone());
        let payload = Bytes::from(codec::encode(&request));
        let responses = self
            .fleet
            .client()
            .call(&address, GENERATE, payload, options)
            .await
            .map_err(|error| (Some(worker), error.into()))?;
        Ok(Leg {
            worker,
            responses,
            reservation: routed.reservation,
            produced_before: produced,
        })
    }
}

fn ended_early() -> GenerateError {
    GenerateError::new(
        ErrorKind::WorkerLost,
        "the worker ended the request before its last token",
    )
}

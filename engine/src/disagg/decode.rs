//! The decode side: has a prompt computed elsewhere, into its own blocks.

use std::{sync::Arc, time::Duration};

use blockplane_protocol::{
    BlockId, ErrorKind, GenerateError, GenerateRequest, KvTarget, PrefillDone, PrefillHint,
    PrefillJob, PrefillReply, PrefillTarget,
};
use blockplane_transfer::{Window, WindowAccess, WindowScope};
use futures::future::BoxFuture;
use tokio::{
    sync::oneshot,
    time::{Instant, sleep_until, timeout},
};
use tracing::debug;

use super::{Handoff, HandoffEvent, notices::Expected};
use crate::{
    engine::RemotePrefill,
    native::{Command, HeldBlocks, KvPool, RankShared},
    scheduler::{Sequence, SequenceId},
};

/// The engine thread's end of a remote prefill.
#[derive(Debug)]
pub(crate) struct RemoteRun {
    give: oneshot::Sender<HeldBlocks>,
}

impl RemoteRun {
    /// The request does not want the KV any more: the task keeps the blocks until no byte can land
    /// in them, and frees them.
    pub(crate) fn give_up(self, blocks: HeldBlocks) {
        // When the task has ended, nothing can land any more, and the blocks are freed right here.
        let _ = self.give.send(blocks);
    }
}

/// One request's way through its attempts.
struct Task {
    handoff: Arc<Handoff>,
    client: Arc<dyn RemotePrefill>,
    shared: Arc<RankShared>,
    id: SequenceId,
    request: GenerateRequest,
    model_fingerprint: u64,
    block_ids: Vec<BlockId>,
    cached_blocks: u32,
    deadline: Instant,
    given_up: oneshot::Receiver<HeldBlocks>,
}

/// The grants of one attempt.
struct Windows {
    fill: Window,
    cached: Option<Window>,
}

/// How an attempt ended.
enum Attempt {
    Done {
        done: Box<PrefillDone>,
        /// The call, if its reply is still to come.
        call: Option<BoxFuture<'static, Result<PrefillReply, GenerateError>>>,
        windows: Windows,
    },
    Failed {
        error: GenerateError,
        windows: Option<Windows>,
    },
    /// The engine thread gave the blocks away.
    GivenUp {
        blocks: HeldBlocks,
        windows: Windows,
    },
}

impl Handoff {
    /// Starts to have the prompt of a sequence, which holds all its blocks, computed elsewhere.
    pub(crate) fn prefill_remotely(
        self: &Arc<Self>,
        shared: &Arc<RankShared>,
        id: SequenceId,
        request: &GenerateRequest,
        sequence: &Sequence<KvPool>,
    ) -> Result<RemoteRun, GenerateError> {
        let client = self
            .config
            .remote_prefill
            .clone()
            .filter(|client| client.available())
            .ok_or_else(no_prefill_worker)?;
        let block_tokens = sequence.token_sequence().block_tokens();
        let cached = sequence.computed_tokens() / block_tokens;
        let (give, given_up) = oneshot::channel();
        let left = sequence.deadline().saturating_sub(shared.now());
        let task = Task {
            handoff: Arc::clone(self),
            client,
            shared: Arc::clone(shared),
            id,
            request: request.clone(),
            model_fingerprint: self.model_fingerprint,
            block_ids: sequence.block_ids().to_vec(),
            cached_blocks: u32::try_from(cached).expect("block ids are 32 bits"),
            deadline: Instant::now() + left,
            given_up,
        };
        self.config.runtime.spawn(task.run());
        Ok(RemoteRun { give })
    }
}

impl Task {
    async fn run(mut self) {
        let mut hints = self.request.route.prefill.clone();
        let mut last_error = no_prefill_worker();
        for attempt in 0..self.handoff.config.attempts_max {
            if hints.is_empty() || !self.client.available() {
                break;
            }
            match self.attempt(&hints).await {
                Attempt::Done {
                    done,
                    call,
                    windows,
                } => {
                    self.post(HandoffEvent::Prefilled(done));
                    // From here on the engine thread frees the blocks itself. What it gave away at
                    // this very moment is freed here.
                    self.given_up.close();
                    drop(self.given_up.try_recv());
                    // Let the prefill worker finish its side: dropping the call would cancel it.
                    if let Some(call) = call {
                        let _ = timeout(self.handoff.config.notification_timeout, call).await;
                    }
                    // Every write was in place before the notification: nothing is left to wait
                    // for.
                    drop(windows);
                    return;
                }
                Attempt::Failed { error, windows } => {
                    debug!(request = %self.request.request_id, attempt, %error, "remote prefill failed");
                    if let Some(windows) = windows
                        && !windows
                            .closed_within(self.handoff.config.window_close_timeout)
                            .await
                    {
                        self.stuck(error, windows).await;
                        return;
                    }
                    last_error = error;
                    hints.remove(0);
                }
                Attempt::GivenUp { blocks, windows } => {
                    windows.keep_until_closed(blocks).await;
                    return;
                }
            }
        }
        self.post(HandoffEvent::PrefillFailed(last_error));
    }

    /// One attempt. When it returns, the call is over or dropped; the windows are still open.
    async fn attempt(&mut self, hints: &[PrefillHint]) -> Attempt {
        let windows = match self.open_windows() {
            Ok(windows) => windows,
            Err(error) => {
                return Attempt::Failed {
                    error,
                    windows: None,
                };
            }
        };
        let window = windows.fill.id().0;
        let mut expected: Expected = self.handoff.notices.expect(window);
        let mut call = Some(self.client.prefill(hints.to_vec(), self.job(&windows)));
        let mut until = self
            .deadline
            .min(Instant::now() + self.handoff.config.attempt_timeout);
        loop {
            tokio::select! {
                done = expected.done() => {
                    if done.request_id != self.request.request_id {
                        let error = lost("the prefill worker answered for another request");
                        return Attempt::Failed { error, windows: Some(windows) };
                    }
                    let done = Box::new(done);
                    return Attempt::Done { done, call, windows };
                }
                reply = async { call.as_mut().expect("only polled while there is one").await },
                    if call.is_some() =>
                {
                    if let Err(error) = reply {
                        return Attempt::Failed { error, windows: Some(windows) };
                    }
                    call = None;
                    until = until.min(Instant::now() + self.handoff.config.notification_timeout);
                }
                blocks = &mut self.given_up => {
                    return match blocks {
                        Ok(blocks) => Attempt::GivenUp { blocks, windows },
                        Err(_) => Attempt::Failed {
                            error: lost("the engine ended"),
                            windows: Some(windows),
                        },
                    };
                }
                () = sleep_until(until) => {
                    let error = lost("the prefill worker did not finish in time");
                    return Attempt::Failed { error, windows: Some(windows) };
                }
            }
        }
    }

    fn open_windows(&self) -> Result<Windows, GenerateError> {
        let open = |ids: &[BlockId], access| {
            let scope = WindowScope::Blocks {
                layout: self.shared.arena.transfer_layout(),
                ids: ids.iter().map(|id| id.0).collect(),
            };
            self.handoff
                .agent
                .open_window(self.shared.arena.registration(), scope, access)
                .map_err(|error| GenerateError::new(ErrorKind::Internal, error.to_string()))
        };
        let (cached, fill) = self.block_ids.split_at(self.cached_blocks as usize);
        Ok(Windows {
            fill: open(fill, WindowAccess::Write)?,
            cached: if cached.is_empty() {
                None
            } else {
                Some(open(cached, WindowAccess::Read)?)
            },
        })
    }

    fn job(&self, windows: &Windows) -> PrefillJob {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let mut request = self.request.clone();
        request.deadline_ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
        request.route.prefill.clear();
        PrefillJob {
            request,
            target: PrefillTarget::Blocks(KvTarget {
                agent: self.handoff.agent.metadata().to_bytes().into(),
                region: self.shared.arena.registration().id().0,
                window: windows.fill.id().0,
                layout: self.shared.arena.layout().clone(),
                pool_blocks: self.shared.arena.blocks(),
                model_fingerprint: self.model_fingerprint,
                block_ids: self.block_ids.clone(),
                cached_blocks: self.cached_blocks,
                cached_window: windows.cached.as_ref().map(|window| window.id().0),
            }),
        }
    }

    /// A peer that maps our memory does not answer: the request goes on in other blocks, and these
    /// wait here.
    async fn stuck(self, error: GenerateError, windows: Windows) {
        self.post(HandoffEvent::PrefillStuck(error));
        if let Ok(blocks) = self.given_up.await {
            windows.keep_until_closed(blocks).await;
        }
    }

    fn post(&self, event: HandoffEvent) {
        self.shared.mailbox.post(Command::Handoff(self.id, event));
    }
}

impl Windows {
    /// Closes both; ready when no byte can move through them any more.
    async fn closed(&self) {
        // Closing starts with the call, for both at once.
        let fill = self.fill.closed();
        let cached = self.cached.as_ref().map(Window::closed);
        fill.await;
        if let Some(cached) = cached {
            cached.await;
        }
    }

    async fn closed_within(&self, time: Duration) -> bool {
        timeout(time, self.closed()).await.is_ok()
    }

    /// Frees `blocks` when no byte can move any more, which a peer's acknowledgement or its loss
    /// brings about. They count as quarantined until then.
    async fn keep_until_closed(self, blocks: HeldBlocks) {
        if self.closed_within(Duration::ZERO).await {
            return;
        }
        let quarantine = blocks.quarantine();
        self.closed().await;
        drop(quarantine);
    }
}

fn no_prefill_worker() -> GenerateError {
    GenerateError::new(ErrorKind::Unavailable, "no prefill worker is there")
}

fn lost(message: &str) -> GenerateError {
    GenerateError::new(ErrorKind::WorkerLost, message)
}

//! Disaggregation: one worker computes a prompt, another one generates from it.
//!
//! ```text
//! decode worker                                   prefill worker
//! allocate blocks, match own cache
//! open windows over the blocks
//! RemotePrefill::prefill(PrefillJob) -----------> connect, match own cache, allocate
//!                                    <- READ ---- blocks that only the decode side has
//!                                    <- WRITE --- blocks that only the prefill side has
//!                                                 for each chunk, for each layer:
//!                                    <- WRITE ---   the layer's KV, while the next one computes
//!                                    <- WRITE ---   the last layer of the last chunk, sent when
//! notification: PrefillDone <---------- bound to    all others are in place
//! register the blocks (invariant 1), go on
//! with the first token and the sampler's state
//! ```
//!
//! * `decode` runs the left side, `prefill` the right side, one task per request; the engine thread
//!   is never held up by either.
//! * **Failure.** Whatever fails before the notification leads to another attempt within a budget,
//!   then to a prefill on the decode worker. Before blocks get another meaning, their windows are
//!   closed; while a peer that maps the memory has not acknowledged that, the blocks are set aside
//!   (quarantined), and the request goes on in others.
//! * **Source blocks.** The prefill side keeps a finished prompt's blocks until no transfer reads
//!   them, then they stay in its prefix cache like those of any request.

mod decode;
mod notices;
mod prefill;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use blockplane_protocol::{GenerateError, PrefillDone};
use blockplane_transfer::{Agent, TransferError};
use tokio::{runtime, sync::oneshot};

pub(crate) use decode::RemoteRun;
use notices::Notices;
pub(crate) use prefill::{PrefillRun, validate_target};

use crate::engine::RemotePrefill;

/// How a native engine hands KV to, or gets it from, other workers.
#[derive(Clone, Debug)]
pub struct HandoffConfig {
    /// Where the tasks of hand-offs run. Needs time and, for `remote_prefill`, whatever that uses.
    pub runtime: runtime::Handle,
    /// The way to the prefill workers; without it a decode worker prefills everything itself.
    /// Default none.
    pub remote_prefill: Option<Arc<dyn RemotePrefill>>,
    /// Prompts with fewer uncached tokens than this are prefilled on the decode worker: the round
    /// trip would cost more than it saves. Default 64.
    pub remote_prefill_min_tokens: u32,
    /// Remote attempts per request before the decode worker prefills itself. Default 2.
    pub attempts_max: u32,
    /// Longest time from sending a job to its notification, waiting in the prefill worker's queue
    /// included. Default 30 s.
    pub attempt_timeout: Duration,
    /// How long the notification may come after the reply. Default 2 s.
    pub notification_timeout: Duration,
    /// How long a request waits for a peer to let go of its blocks before they are set aside and it
    /// goes on in others. Default 100 ms.
    pub window_close_timeout: Duration,
    /// Longest time of one transfer. Default 10 s.
    pub transfer_timeout: Duration,
    /// Longest time to connect to a decode worker. Default 2 s.
    pub connect_timeout: Duration,
}

/// What the tasks of hand-offs share.
pub(crate) struct Handoff {
    config: HandoffConfig,
    agent: Agent,
    model_fingerprint: u64,
    notices: Arc<Notices>,
    /// Ends the task that receives notifications when the engine is gone.
    _listener: oneshot::Sender<()>,
}

/// News for the engine thread.
#[derive(Debug)]
pub(crate) enum HandoffEvent {
    /// The KV of the prompt is in place.
    Prefilled(Box<PrefillDone>),
    /// It will not come, and nobody writes the blocks any more.
    PrefillFailed(GenerateError),
    /// It will not come, and somebody may still write the blocks.
    PrefillStuck(GenerateError),
    /// The blocks that the decode side has were read, or not.
    Loaded(Result<(), TransferError>),
}

/// KV exchanged with other workers since start.
#[derive(Debug, Default)]
pub(crate) struct Transferred {
    blocks: AtomicU64,
    bytes: AtomicU64,
}

/// A reading of [`Transferred`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct TransferredTotals {
    pub(crate) blocks: u64,
    pub(crate) bytes: u64,
}

impl HandoffConfig {
    /// The defaults, with tasks on `runtime`.
    #[must_use]
    pub fn new(runtime: runtime::Handle) -> Self {
        Self {
            runtime,
            remote_prefill: None,
            remote_prefill_min_tokens: 64,
            attempts_max: 2,
            attempt_timeout: Duration::from_secs(30),
            notification_timeout: Duration::from_secs(2),
            window_close_timeout: Duration::from_millis(100),
            transfer_timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(2),
        }
    }
}

impl Handoff {
    /// Starts receiving the agent's notifications.
    pub(crate) fn start(config: HandoffConfig, agent: Agent, model_fingerprint: u64) -> Arc<Self> {
        let notices = Arc::new(Notices::default());
        let (listener, ended) = oneshot::channel();
        config.runtime.spawn(notices::listen(
            agent.notifications(),
            Arc::clone(&notices),
            ended,
        ));
        Arc::new(Self {
            config,
            agent,
            model_fingerprint,
            notices,
            _listener: listener,
        })
    }

    pub(crate) fn config(&self) -> &HandoffConfig {
        &self.config
    }

    pub(crate) fn agent(&self) -> &Agent {
        &self.agent
    }

    pub(crate) fn remote_prefill_min_tokens(&self) -> u32 {
        self.config.remote_prefill_min_tokens
    }

    /// Whether prompts may be computed elsewhere at all.
    pub(crate) fn prefills_remotely(&self) -> bool {
        self.config.remote_prefill.is_some() && self.config.attempts_max > 0
    }
}

impl fmt::Debug for Handoff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handoff")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Transferred {
    pub(crate) fn add(&self, blocks: u64, bytes: u64) {
        self.blocks.fetch_add(blocks, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> TransferredTotals {
        TransferredTotals {
            blocks: self.blocks.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
        }
    }
}

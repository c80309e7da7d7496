//! The prefill side: computes a prompt and puts its KV into a decode worker's blocks.

use std::{
    fmt,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use blockplane_kvbm::KvArena;
use blockplane_protocol::{
    BlockId, ErrorKind, GenerateError, GenerateRequest, KvTarget, LayerIndex, PrefillDone,
    PrefillReply, SamplerState, TokenOutput, codec,
};
use blockplane_transfer::{
    BlockLayout, LocalBlocks, Metadata, Op, Peer, PostOptions, Prepared, RegionId, RemoteBlocks,
    Transfer, TransferError, TransferStatus, WindowId,
};
use tokio::sync::oneshot;
use tracing::debug;

use super::{Handoff, HandoffEvent};
use crate::{
    engine::EngineInfo,
    error::RequestError,
    native::{Command, HeldBlocks, KvPool, Live, RankShared},
    scheduler::{Sequence, SequenceId, Slice},
    stream::PrefillSender,
};

/// One job on the engine thread: posts transfers as the KV comes into being.
pub(crate) struct PrefillRun {
    handoff: Arc<Handoff>,
    shared: Arc<RankShared>,
    peer: Peer,
    target: KvTarget,
    layout: BlockLayout,
    until: Instant,
    /// Writes under way, with their bytes. Those that are done are forgotten.
    transfers: Vec<(Transfer, u64)>,
    /// The chunk being computed.
    chunk: Option<Chunk>,
    /// The last layer of the last chunk, sent when all others are in place, and its bytes.
    last: Option<(Prepared, u64)>,
    /// While blocks are read from the peer: the way to give the blocks to the task that waits.
    loading: Option<Loading>,
    failed: Option<GenerateError>,
    reply: PrefillReply,
}

#[derive(Debug)]
struct Loading {
    give: oneshot::Sender<HeldBlocks>,
    /// Tokens in place when it succeeds.
    tokens: usize,
    blocks: u32,
}

/// Blocks that a chunk fills, here and there.
#[derive(Debug)]
struct Chunk {
    local: Arc<[u32]>,
    remote: Arc<[u32]>,
    last: bool,
}

/// Checks that a job's target fits this engine and itself.
pub(crate) fn validate_target(
    target: &KvTarget,
    prompt_tokens: usize,
    info: &EngineInfo,
) -> Result<(), RequestError> {
    if target.model_fingerprint != info.model_fingerprint {
        return Err(RequestError::Incompatible {
            reason: format!(
                "the model's fingerprint is {:016x} there and {:016x} here",
                target.model_fingerprint, info.model_fingerprint
            ),
        });
    }
    if !target.layout.exchangeable_with(&info.layout) {
        return Err(RequestError::Incompatible {
            reason: format!(
                "the KV layout is {:?} there and {:?} here",
                target.layout, info.layout
            ),
        });
    }
    let malformed = |reason: String| Err(RequestError::MalformedJob { reason });
    let block_tokens = info.layout.block_tokens as usize;
    let blocks = prompt_tokens.div_ceil(block_tokens);
    if target.block_ids.len() != blocks {
        return malformed(format!(
            "{} block ids for {prompt_tokens} tokens; {blocks} are needed",
            target.block_ids.len()
        ));
    }
    if target.cached_blocks as usize > (prompt_tokens - 1) / block_tokens {
        return malformed(format!(
            "{} blocks are cached of a prompt of {prompt_tokens} tokens; its last token is never",
            target.cached_blocks
        ));
    }
    if (target.cached_blocks > 0) != target.cached_window.is_some() {
        return malformed("cached blocks come with a window to read them".to_owned());
    }
    if let Some(id) = target
        .block_ids
        .iter()
        .find(|id| id.0 >= target.pool_blocks)
    {
        return malformed(format!(
            "block {} of a pool of {} blocks",
            id.0, target.pool_blocks
        ));
    }
    match target.layout.validate(target.pool_blocks) {
        Ok(()) => Ok(()),
        Err(error) => malformed(error.to_string()),
    }
}

impl PrefillRun {
    /// Connects to the decode worker and checks its grants. Blocks for at most the connect timeout
    /// and the agent's own; not for an engine thread.
    pub(crate) fn connect(
        handoff: Arc<Handoff>,
        shared: Arc<RankShared>,
        target: KvTarget,
        time_left: Duration,
    ) -> Result<Self, GenerateError> {
        let metadata = Metadata::from_bytes(&target.agent).map_err(|error| {
            GenerateError::from(RequestError::MalformedJob {
                reason: format!("agent metadata: {error}"),
            })
        })?;
        let timeout = handoff.config().connect_timeout;
        let peer = handoff
            .agent()
            .connect(&metadata, timeout)
            .map_err(|error| unreachable_peer(&error))?;
        let blocks = target.pool_blocks;
        let layout = BlockLayout {
            offset: 0,
            blocks,
            block_stride: target.layout.block_stride() as u64,
            layers: target.layout.layers,
            layer_stride: target.layout.layer_stride(blocks) as u64,
            run_bytes: target.layout.layer_bytes() as u64,
        };
        let run = Self {
            handoff,
            shared,
            peer,
            target,
            layout,
            until: Instant::now() + time_left,
            transfers: Vec::new(),
            chunk: None,
            last: None,
            loading: None,
            failed: None,
            reply: PrefillReply::default(),
        };
        run.ask_for_grants()?;
        Ok(run)
    }

    /// Blocks of the prompt that the decode worker has.
    pub(crate) fn peer_cached_blocks(&self) -> u32 {
        self.target.cached_blocks
    }

    /// Reads blocks that the decode worker has and this one has not.
    pub(crate) fn load(
        &mut self,
        id: SequenceId,
        sequence: &Sequence<KvPool>,
        blocks: Range<u32>,
    ) -> Result<(), GenerateError> {
        let range = blocks.start as usize..blocks.end as usize;
        let local = raw_ids(&sequence.block_ids()[range.clone()]);
        let remote = raw_ids(&self.target.block_ids[range.clone()]);
        let prepared = self.prepare(Op::Read, local, remote, self.all_layers())?;
        let transfer = prepared
            .post(PostOptions::within(self.time_of_a_transfer()))
            .map_err(|error| lost_peer(&error))?;
        let (give, given_up) = oneshot::channel();
        self.loading = Some(Loading {
            give,
            tokens: range.end * sequence.token_sequence().block_tokens(),
            blocks: blocks.end - blocks.start,
        });
        let task = wait_for_load(transfer, given_up, Arc::clone(&self.shared), id);
        self.handoff.config().runtime.spawn(task);
        Ok(())
    }

    /// Takes the result of [`PrefillRun::load`]: the tokens whose KV is in place now, 0 when they
    /// have to be computed after all.
    pub(crate) fn loaded(
        &mut self,
        result: Result<(), TransferError>,
    ) -> Result<usize, GenerateError> {
        let Some(loading) = self.loading.take() else {
            return Ok(0);
        };
        match result {
            Ok(()) => {
                self.reply.read_blocks = loading.blocks;
                let bytes = self.block_bytes() * u64::from(loading.blocks);
                self.shared
                    .transferred
                    .add(u64::from(loading.blocks), bytes);
                Ok(loading.tokens)
            }
            // Nobody waits for the KV any more.
            Err(error @ (TransferError::PeerLost(_) | TransferError::WindowClosed { .. })) => {
                Err(lost_peer(&error))
            }
            Err(error) => {
                debug!(%error, "blocks of the decode worker were not read; computing them");
                Ok(0)
            }
        }
    }

    /// Writes the blocks that only this worker's cache has.
    pub(crate) fn send_cached(&mut self, sequence: &Sequence<KvPool>) -> Result<(), GenerateError> {
        let block_tokens = sequence.token_sequence().block_tokens();
        let first = self.target.cached_blocks as usize;
        let end = sequence.computed_tokens() / block_tokens;
        if first >= end {
            return Ok(());
        }
        let local = raw_ids(&sequence.block_ids()[first..end]);
        let remote = raw_ids(&self.target.block_ids[first..end]);
        let bytes = self.block_bytes() * local.len() as u64;
        let prepared = self.prepare(Op::Write, local, remote, self.all_layers())?;
        self.post(&prepared, bytes)
    }

    /// The engine is about to compute a slice of the prompt.
    pub(crate) fn begin_chunk(&mut self, slice: &Slice, sequence: &Sequence<KvPool>) {
        self.reply.computed_tokens +=
            u32::try_from(slice.len).expect("prompts are below 2^32 tokens");
        let block_tokens = sequence.token_sequence().block_tokens();
        let first = (slice.start / block_tokens).max(self.target.cached_blocks as usize);
        let end = (slice.start + slice.len).div_ceil(block_tokens);
        self.chunk = (first < end).then(|| Chunk {
            local: raw_ids(&sequence.block_ids()[first..end]),
            remote: raw_ids(&self.target.block_ids[first..end]),
            last: slice.sample,
        });
    }

    /// Whether the step that runs computes a part of this prompt.
    pub(crate) fn in_chunk(&self) -> bool {
        self.chunk.is_some() && self.failed.is_none()
    }

    /// The chunk's KV of this layer is in the arena: sends it while the next layer is computed.
    pub(crate) fn layer_computed(&mut self, layer: LayerIndex) {
        let Some(chunk) = &self.chunk else {
            return;
        };
        if self.failed.is_some() {
            return;
        }
        let last_layer = layer.0 + 1 == self.layout.layers;
        let (local, remote) = (Arc::clone(&chunk.local), Arc::clone(&chunk.remote));
        let keep = chunk.last && last_layer;
        let bytes = self.layout.run_bytes * local.len() as u64;
        let posted = self
            .prepare(Op::Write, local, remote, layer.0..layer.0 + 1)
            .and_then(|prepared| {
                if keep {
                    self.last = Some((prepared, bytes));
                    Ok(())
                } else {
                    self.post(&prepared, bytes)
                }
            });
        if last_layer {
            self.chunk = None;
        }
        self.failed = posted.err();
    }

    /// Why the job cannot succeed any more, if so. Forgets the writes that are done.
    pub(crate) fn failure(&mut self) -> Option<GenerateError> {
        let mut failed = self.failed.take();
        self.transfers
            .retain(|(transfer, _)| match transfer.status() {
                TransferStatus::InFlight => true,
                TransferStatus::Done => false,
                TransferStatus::Failed(error) => {
                    failed.get_or_insert_with(|| lost_peer(&error));
                    false
                }
            });
        failed
    }

    /// The prompt is computed and its first token chosen: sends the rest, and answers when it is in
    /// place.
    #[expect(
        clippy::too_many_arguments,
        reason = "everything that is left of the request"
    )]
    pub(crate) fn finish(
        mut self,
        request: &GenerateRequest,
        first: TokenOutput,
        sampler: SamplerState,
        cached_tokens: u32,
        blocks: HeldBlocks,
        sender: PrefillSender,
        live: Live,
    ) {
        self.reply.cached_blocks = cached_tokens / self.target.layout.block_tokens;
        let written = self.target.block_ids.len() - self.target.cached_blocks as usize;
        self.reply.written_blocks = u32::try_from(written).expect("block ids are 32 bits");
        self.reply.written_bytes = self.block_bytes() * u64::from(self.reply.written_blocks);
        self.reply.overlapped_bytes = self.reply.written_bytes.saturating_sub(self.bytes_left());
        self.reply.lane = Some(self.peer.lane().lane.to_string());
        let done = PrefillDone {
            request_id: request.request_id.clone(),
            window: self.target.window,
            first,
            sampler,
            reply: self.reply.clone(),
        };
        let runtime = self.handoff.config().runtime.clone();
        runtime.spawn(async move {
            let result = self.send_rest(done).await;
            let reply = std::mem::take(&mut self.reply);
            self.quiesce().await;
            drop(blocks);
            drop(live);
            sender.finish(result.map(|()| reply));
        });
    }

    /// The job ends early. Its blocks are freed when no transfer reads or writes them any more.
    pub(crate) fn abort(
        mut self,
        blocks: Option<HeldBlocks>,
        sender: PrefillSender,
        live: Live,
        error: GenerateError,
    ) {
        if let Some(loading) = self.loading.take() {
            if let Some(blocks) = blocks {
                // When the task has ended, the blocks are freed right here.
                let _ = loading.give.send(blocks);
            }
            sender.finish(Err(error));
            return;
        }
        if self.transfers.is_empty() {
            sender.finish(Err(error));
            return;
        }
        let runtime = self.handoff.config().runtime.clone();
        runtime.spawn(async move {
            self.quiesce().await;
            drop(blocks);
            drop(live);
            sender.finish(Err(error));
        });
    }

    /// Sends what was kept back when all other writes are in place: the notification that goes with
    /// it says that everything is.
    async fn send_rest(&mut self, done: PrefillDone) -> Result<(), GenerateError> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        while let Some((transfer, _)) = self.transfers.pop() {
            transfer.await.map_err(|error| lost_peer(&error))?;
        }
        let (last, _) = self.last.take().ok_or_else(|| {
            GenerateError::new(ErrorKind::Internal, "the last layer was not computed")
        })?;
        let options = PostOptions::within(self.time_of_a_transfer()).notify(codec::encode(&done));
        let transfer = last.post(options).map_err(|error| lost_peer(&error))?;
        transfer.await.map_err(|error| lost_peer(&error))?;
        self.shared.transferred.add(
            u64::from(self.reply.written_blocks),
            self.reply.written_bytes,
        );
        Ok(())
    }

    /// Cancels the writes under way and waits until none reads memory any more.
    async fn quiesce(&mut self) {
        for (transfer, _) in &self.transfers {
            transfer.request_cancel();
        }
        for (transfer, _) in self.transfers.drain(..) {
            // How it ended does not matter any more.
            let _ = transfer.await;
        }
    }

    /// Prepares all of the job's accesses once, with any local blocks: asks the peer for its grants
    /// here, where waiting is allowed, and finds a contradiction before blocks are spent.
    fn ask_for_grants(&self) -> Result<(), GenerateError> {
        let (cached, fill) = self
            .target
            .block_ids
            .split_at(self.target.cached_blocks as usize);
        for (op, remote) in [(Op::Read, cached), (Op::Write, fill)] {
            if remote.is_empty() {
                continue;
            }
            let local = (0..).take(remote.len()).collect();
            self.prepare(op, local, raw_ids(remote), self.all_layers())?;
        }
        Ok(())
    }

    fn prepare(
        &self,
        op: Op,
        local: Arc<[u32]>,
        remote: Arc<[u32]>,
        layers: Range<u32>,
    ) -> Result<Prepared, GenerateError> {
        let arena: &KvArena = &self.shared.arena;
        let window = match op {
            Op::Read => self.target.cached_window,
            Op::Write => Some(self.target.window),
        };
        let local = LocalBlocks {
            registration: arena.registration(),
            layout: arena.transfer_layout(),
            ids: local.into(),
            layers: layers.clone(),
        };
        let remote = RemoteBlocks {
            peer: &self.peer,
            region: RegionId(self.target.region),
            layout: self.layout,
            ids: remote.into(),
            layers,
            window: window.map(WindowId),
        };
        self.handoff
            .agent()
            .prepare(op, local, remote)
            .map_err(|error| lost_peer(&error))
    }

    fn post(&mut self, prepared: &Prepared, bytes: u64) -> Result<(), GenerateError> {
        let options = PostOptions::within(self.time_of_a_transfer());
        let transfer = prepared.post(options).map_err(|error| lost_peer(&error))?;
        self.transfers.push((transfer, bytes));
        Ok(())
    }

    /// Bytes that are not in place yet.
    fn bytes_left(&self) -> u64 {
        let moving = self.transfers.iter();
        let moving = moving.filter(|(transfer, _)| transfer.status() == TransferStatus::InFlight);
        let kept = self.last.as_ref().map_or(0, |(_, bytes)| *bytes);
        moving.map(|(_, bytes)| bytes).sum::<u64>() + kept
    }

    fn time_of_a_transfer(&self) -> Duration {
        let left = self.until.saturating_duration_since(Instant::now());
        self.handoff.config().transfer_timeout.min(left)
    }

    fn all_layers(&self) -> Range<u32> {
        0..self.layout.layers
    }

    fn block_bytes(&self) -> u64 {
        self.target.layout.block_bytes() as u64
    }
}

impl fmt::Debug for PrefillRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PrefillRun")
            .field("peer", &self.peer.name())
            .field("reply", &self.reply)
            .finish_non_exhaustive()
    }
}

/// Waits for blocks to be read; keeps them while they may still be written when nobody wants them.
async fn wait_for_load(
    mut transfer: Transfer,
    mut given_up: oneshot::Receiver<HeldBlocks>,
    shared: Arc<RankShared>,
    id: SequenceId,
) {
    tokio::select! {
        result = &mut transfer => {
            shared.mailbox.post(Command::Handoff(id, HandoffEvent::Loaded(result)));
        }
        Ok(blocks) = &mut given_up => {
            transfer.request_cancel();
            // How it ended does not matter: nothing moves any more.
            let _ = transfer.await;
            drop(blocks);
        }
    }
}

fn raw_ids(ids: &[BlockId]) -> Arc<[u32]> {
    ids.iter().map(|id| id.0).collect()
}

fn unreachable_peer(error: &dyn std::error::Error) -> GenerateError {
    let message = format!("the decode worker is not reached for its KV: {error}");
    GenerateError::new(ErrorKind::Unavailable, message)
}

fn lost_peer(error: &dyn std::error::Error) -> GenerateError {
    let message = format!("KV was not exchanged with the decode worker: {error}");
    GenerateError::new(ErrorKind::WorkerLost, message)
}

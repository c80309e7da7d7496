//! The engine thread of one rank: takes commands, runs steps, sends tokens, sleeps.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use blockplane_kvbm::metrics::{Recording, RequestHits};
use blockplane_protocol::{
    ErrorKind, FinishReason, GenerateError, GenerateRequest, LoadReport, TokenId, TokenOutput,
    Usage,
};
use tokio::sync::oneshot;
use tracing::{debug, warn};

use super::{
    below::{Loaded, LoadedFrom, Loading, Lower},
    forward::Forward,
    pool::KvPool,
    shared::{HeldBlocks, Live, RankShared},
};
use crate::{
    disagg::{Handoff, HandoffEvent, PrefillRun, RemoteRun},
    error::RequestError,
    model::{ForwardError, SequenceSlice},
    sampler::Sampler,
    scheduler::{
        Admitted, Gate, Scheduler, Sequence, SequenceId, SequenceKind, SequenceSpec, Slice,
    },
    stream::{PrefillSender, TokenSender},
};

/// How often an engine that has nothing to compute looks for blocks that copies let go of.
const RETRY: Duration = Duration::from_millis(2);

/// What an engine thread is told.
#[derive(Debug)]
pub(crate) enum Command {
    /// A request to generate tokens for.
    Generate(Box<GenerateTask>),
    /// A prompt to compute for a peer.
    Prefill(Box<PrefillTask>),
    /// News of a sequence whose KV another worker handles.
    Handoff(SequenceId, HandoffEvent),
    /// What became of the blocks that a sequence loads from lower tiers.
    Onboarded(SequenceId, Loaded),
    /// Take nothing new; answer when nothing is left, which is at `until` at the latest.
    Drain {
        /// When the rest is cancelled.
        until: Instant,
        /// The answer.
        done: oneshot::Sender<()>,
    },
    /// End the thread.
    Stop,
}

/// A validated request.
#[derive(Debug)]
pub(crate) struct GenerateTask {
    pub(crate) request: GenerateRequest,
    pub(crate) sender: TokenSender,
    pub(crate) deadline: Duration,
    pub(crate) live: Live,
}

/// A validated prefill job whose peer is connected.
#[derive(Debug)]
pub(crate) struct PrefillTask {
    pub(crate) run: Box<PrefillRun>,
    pub(crate) request: GenerateRequest,
    pub(crate) sender: PrefillSender,
    pub(crate) deadline: Duration,
    pub(crate) live: Live,
}

/// The state of an engine thread.
pub(crate) struct Rank {
    shared: Arc<RankShared>,
    scheduler: Scheduler<KvPool>,
    forward: Box<dyn Forward>,
    handoff: Option<Arc<Handoff>>,
    remote_prefill_min_tokens: u32,
    entries: HashMap<SequenceId, Entry>,
    draining: Option<(Instant, oneshot::Sender<()>)>,
    leaving: bool,
    stopped: bool,
    totals: LoadReport,
}

/// One request on the engine thread.
struct Entry {
    request: GenerateRequest,
    sampler: Sampler,
    usage: Usage,
    /// While blocks are loaded from lower tiers.
    loading: Option<Box<dyn Loading>>,
    /// Blocks loaded before the prompt was first seated.
    loaded: LoadedFrom,
    /// Takes the length of the output, if requests are recorded.
    recording: Option<Recording>,
    kind: Kind,
    live: Live,
}

enum Kind {
    Generate {
        sender: TokenSender,
        /// While another worker computes the prompt.
        remote: Option<RemoteRun>,
    },
    Prefill {
        sender: PrefillSender,
        run: Box<PrefillRun>,
    },
}

impl Rank {
    pub(crate) fn new(
        shared: Arc<RankShared>,
        scheduler: Scheduler<KvPool>,
        forward: Box<dyn Forward>,
        handoff: Option<Arc<Handoff>>,
    ) -> Self {
        Self {
            shared,
            scheduler,
            forward,
            remote_prefill_min_tokens: handoff
                .as_ref()
                .map_or(u32::MAX, |handoff| handoff.remote_prefill_min_tokens()),
            handoff,
            entries: HashMap::new(),
            draining: None,
            leaving: false,
            stopped: false,
            totals: LoadReport::default(),
        }
    }

    /// Runs until [`Command::Stop`]. Sleeps whenever there is nothing to compute.
    pub(crate) fn run(mut self) {
        loop {
            let (commands, woken) = self.shared.mailbox.take();
            for command in commands {
                self.command(command);
            }
            if woken {
                self.sweep_cancelled();
            }
            self.sweep_expired();
            if self.stopped {
                return;
            }
            self.admit();
            let busy = self.step();
            self.publish();
            self.answer_drain();
            if !busy {
                let timeout = self.sleep_timeout();
                self.shared.mailbox.wait(timeout);
            }
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Generate(task) => self.generate(*task),
            Command::Prefill(task) => self.prefill(*task),
            Command::Handoff(id, event) => self.handoff_event(id, event),
            Command::Onboarded(id, loaded) => self.onboarded(id, loaded),
            Command::Drain { until, done } => {
                self.leaving = true;
                self.draining = Some((until, done));
            }
            Command::Stop => {
                self.end_all(&leaving());
                self.stopped = true;
            }
        }
    }

    fn generate(&mut self, task: GenerateTask) {
        let GenerateTask {
            request,
            sender,
            deadline,
            live,
        } = task;
        let remote = self.handoff.as_ref().is_some_and(|h| h.prefills_remotely())
            && !request.route.prefill.is_empty();
        let kind = if remote {
            SequenceKind::Remote {
                uncached_tokens_min: self.remote_prefill_min_tokens,
            }
        } else {
            SequenceKind::Local
        };
        match self.submit(&request, deadline, kind) {
            Ok(id) => {
                let kind = Kind::Generate {
                    sender,
                    remote: None,
                };
                let entry = Entry::new(request, kind, live, self.scheduler.eos());
                self.entries.insert(id, entry);
            }
            Err(error) => sender.fail(error),
        }
    }

    fn prefill(&mut self, task: PrefillTask) {
        let PrefillTask {
            run,
            request,
            sender,
            deadline,
            live,
        } = task;
        let kind = SequenceKind::ForPeer {
            peer_cached_blocks: run.peer_cached_blocks(),
        };
        match self.submit(&request, deadline, kind) {
            Ok(id) => {
                let kind = Kind::Prefill { sender, run };
                let entry = Entry::new(request, kind, live, self.scheduler.eos());
                self.entries.insert(id, entry);
            }
            Err(error) => sender.finish(Err(error)),
        }
    }

    fn submit(
        &mut self,
        request: &GenerateRequest,
        deadline: Duration,
        kind: SequenceKind,
    ) -> Result<SequenceId, GenerateError> {
        if self.leaving {
            return Err(RequestError::Draining.into());
        }
        let spec = SequenceSpec {
            prompt: request.token_ids.clone(),
            salt: request.salt(),
            stop: request.stop.clone(),
            priority: request.priority,
            deadline,
            kind,
        };
        let id = self.scheduler.submit(spec).map_err(|full| {
            let limit = full.limit;
            RequestError::QueueFull { limit }
        })?;
        let sequence = self.scheduler.sequence(id).expect("just submitted");
        let names = sequence.token_sequence().blocks();
        self.scheduler.pool().referenced(names);
        Ok(id)
    }

    fn admit(&mut self) {
        for admitted in self.scheduler.admit() {
            self.admitted(admitted);
        }
    }

    fn admitted(&mut self, admitted: Admitted<KvPool>) {
        let Admitted {
            id,
            cached_tokens,
            again,
            gate,
            lower,
        } = admitted;
        if let Some(lower) = lower {
            self.load(id, lower);
            return;
        }
        let block_tokens = self.shared.arena.layout().block_tokens;
        let entry = self.entries.get_mut(&id).expect("every sequence has one");
        if !again {
            let usage = &mut entry.usage;
            usage.cached_tokens = count(cached_tokens);
            let mut left = usage.cached_tokens;
            let mut share = |blocks: u32| {
                // What was loaded may have been evicted before it was needed.
                let tokens = blocks.saturating_mul(block_tokens).min(left);
                left -= tokens;
                tokens
            };
            usage.cached_host_tokens = share(entry.loaded.host);
            usage.cached_disk_tokens = share(entry.loaded.disk);
            usage.cached_remote_tokens = share(entry.loaded.remote);
            let totals = &mut self.totals;
            totals.cached_tokens_total += cached_tokens as u64;
            totals.cached_host_tokens_total += u64::from(usage.cached_host_tokens);
            totals.cached_disk_tokens_total += u64::from(usage.cached_disk_tokens);
            totals.cached_remote_tokens_total += u64::from(usage.cached_remote_tokens);
        }
        let sequence = self.scheduler.sequence(id).expect("just admitted");
        if let Some(watch) = self.shared.watch.as_ref().filter(|_| !again) {
            let usage = &entry.usage;
            let blocks = |tokens: u32| tokens / block_tokens;
            let (host, disk, remote) = (
                blocks(usage.cached_host_tokens),
                blocks(usage.cached_disk_tokens),
                blocks(usage.cached_remote_tokens),
            );
            let prompt = sequence.prompt_tokens();
            let full = prompt / block_tokens as usize;
            let hits = RequestHits {
                blocks: count(full),
                device: blocks(usage.cached_tokens).saturating_sub(host + disk + remote),
                host,
                disk,
                remote,
                block_tokens,
            };
            let names = sequence.token_sequence().blocks();
            entry.recording = watch.request(&names[..full.min(names.len())], count(prompt), hits);
        }
        let Some(handoff) = &self.handoff else {
            return;
        };
        let result = match (&mut entry.kind, gate) {
            (Kind::Generate { remote, .. }, Some(Gate::RemotePrefill)) => {
                let run = handoff.prefill_remotely(&self.shared, id, &entry.request, sequence);
                run.map(|run| *remote = Some(run))
            }
            (Kind::Prefill { run, .. }, Some(Gate::Load { first, end })) => {
                run.load(id, sequence, first..end)
            }
            (Kind::Prefill { run, .. }, _) => run.send_cached(sequence),
            (Kind::Generate { .. }, _) => Ok(()),
        };
        if let Err(error) = result {
            let request = &entry.request.request_id;
            warn!(%request, %error, "hand-off not started");
            self.without_handoff(id, gate, error);
        }
    }

    /// Has blocks that lower tiers hold copied into those of a sequence that was just admitted.
    fn load(&mut self, id: SequenceId, lower: Box<dyn Lower>) {
        let sequence = self.scheduler.sequence(id).expect("just admitted");
        let left = sequence.deadline().saturating_sub(self.shared.now());
        let shared = Arc::clone(&self.shared);
        let done = move |loaded| shared.mailbox.post(Command::Onboarded(id, loaded));
        let loading = lower.load(sequence.load_targets(), left, Box::new(done));
        let entry = self.entries.get_mut(&id).expect("every sequence has one");
        entry.loading = Some(loading);
    }

    fn onboarded(&mut self, id: SequenceId, loaded: Loaded) {
        let Some(entry) = self.entries.get_mut(&id) else {
            return;
        };
        entry.loading = None;
        entry.loaded.add(loaded.from);
        if let Some(admitted) = self.scheduler.onboarded(id, loaded.leading) {
            self.admitted(admitted);
        } else {
            let request = &entry.request.request_id;
            self.totals.onboard_failures_total += 1;
            debug!(%request, blocks = loaded.leading, "not all blocks were loaded; computing the rest");
        }
    }

    /// Goes on without what could not be started: a request prefills here, a job for a peer ends.
    fn without_handoff(&mut self, id: SequenceId, gate: Option<Gate>, error: GenerateError) {
        if gate == Some(Gate::RemotePrefill) {
            self.scheduler.open_gate(id, 0);
        } else {
            self.end(id, Err(error));
        }
    }

    fn handoff_event(&mut self, id: SequenceId, event: HandoffEvent) {
        let Some(entry) = self.entries.get_mut(&id) else {
            return;
        };
        let request = &entry.request.request_id;
        match event {
            HandoffEvent::Prefilled(done) => {
                let sequence = self.scheduler.sequence(id).expect("every entry has one");
                let (prompt, cached) = (sequence.prompt_tokens(), sequence.computed_tokens());
                let block_tokens = sequence.token_sequence().block_tokens();
                let blocks = sequence.block_ids().len() - cached / block_tokens;
                entry.usage.remote_prefill_tokens = done.reply.computed_tokens;
                entry.usage.transfer_blocks = count(blocks);
                entry.usage.transfer_bytes =
                    (blocks * self.shared.arena.layout().block_bytes()) as u64;
                entry.usage.overlapped_bytes = done.reply.overlapped_bytes;
                entry.usage.lane = done.reply.lane;
                let usage = &entry.usage;
                self.shared
                    .transferred
                    .add(u64::from(usage.transfer_blocks), usage.transfer_bytes);
                if let Kind::Generate { remote, .. } = &mut entry.kind {
                    *remote = None;
                }
                entry.sampler.resume(done.sampler, &[done.first.id]);
                // Every byte of the prompt is in place only now (invariant 1).
                self.scheduler.open_gate(id, prompt);
                self.deliver(id, done.first);
            }
            HandoffEvent::PrefillFailed(error) => {
                warn!(%request, %error, "remote prefill failed; prefilling here");
                if let Kind::Generate { remote, .. } = &mut entry.kind {
                    *remote = None;
                }
                self.scheduler.open_gate(id, 0);
            }
            HandoffEvent::PrefillStuck(error) => {
                warn!(%request, %error, "remote prefill failed and may still write; prefilling here in other blocks");
                if let Kind::Generate { remote, .. } = &mut entry.kind
                    && let Some(run) = remote.take()
                    && let Some(blocks) = self.scheduler.requeue(id)
                {
                    run.give_up(HeldBlocks::new(blocks, Arc::clone(&self.shared)));
                }
            }
            HandoffEvent::Loaded(result) => {
                let Kind::Prefill { run, .. } = &mut entry.kind else {
                    return;
                };
                match run.loaded(result) {
                    Ok(tokens) => self.scheduler.open_gate(id, tokens),
                    Err(error) => self.end(id, Err(error)),
                }
            }
        }
    }

    /// Runs one step. Returns whether there was anything to compute.
    fn step(&mut self) -> bool {
        let slices = self.scheduler.step();
        if slices.is_empty() {
            return false;
        }
        self.shared.step_begins();
        match self.compute(&slices) {
            Ok(tokens) => self.take_tokens(&slices, tokens),
            Err(error) => {
                // The KV of these slices is not in place; everything else is as it was.
                let message = format!("the model could not be computed: {error}");
                let error = GenerateError::new(ErrorKind::Internal, message);
                warn!(%error, "step failed");
                for slice in &slices {
                    self.end(slice.id, Err(error.clone()));
                }
            }
        }
        self.shared.step_ends();
        true
    }

    fn take_tokens(&mut self, slices: &[Slice], tokens: Vec<TokenOutput>) {
        let mut tokens = tokens.into_iter();
        for slice in slices {
            self.scheduler.advance(slice);
            let sequence = self.scheduler.sequence(slice.id).expect("just computed");
            let prompt = sequence.prompt_tokens();
            let computed = (slice.start + slice.len)
                .min(prompt)
                .saturating_sub(slice.start);
            self.totals.prefill_tokens_total += computed as u64;
            if slice.sample {
                let token = tokens.next().expect("one for each slice that samples");
                self.totals.decode_tokens_total += 1;
                self.deliver(slice.id, token);
            }
        }
        self.end_failed_prefills(slices);
    }

    /// Computes the slices; returns the next token of each one that samples.
    fn compute(&mut self, slices: &[Slice]) -> Result<Vec<TokenOutput>, ForwardError> {
        let Self {
            scheduler,
            forward,
            entries,
            shared,
            ..
        } = self;
        let block_tokens = shared.arena.layout().block_tokens as usize;
        let mut views = Vec::with_capacity(slices.len());
        for slice in slices {
            let sequence = scheduler.sequence(slice.id).expect("scheduled");
            let end = slice.start + slice.len;
            views.push(SequenceSlice {
                tokens: &sequence.tokens()[slice.start..end],
                position: count(slice.start),
                blocks: &sequence.block_ids()[..end.div_ceil(block_tokens)],
                logits: slice.sample,
            });
            if let Some(run) = entries.get_mut(&slice.id).and_then(Entry::prefill_run) {
                run.begin_chunk(slice, sequence);
            }
        }
        let mut runs: Vec<&mut PrefillRun> = Vec::new();
        let mut samplers: HashMap<SequenceId, &mut Sampler> = HashMap::new();
        for (&id, entry) in entries {
            samplers.insert(id, &mut entry.sampler);
            if let Kind::Prefill { run, .. } = &mut entry.kind
                && run.in_chunk()
            {
                runs.push(run);
            }
        }
        let sampled: Vec<SequenceId> = slices.iter().filter(|s| s.sample).map(|s| s.id).collect();
        let mut tokens = Vec::with_capacity(sampled.len());
        forward.forward(
            &views,
            &shared.arena,
            &mut |layer| {
                for run in &mut runs {
                    run.layer_computed(layer);
                }
            },
            &mut |row, logits| {
                let sampler = samplers
                    .get_mut(&sampled[row])
                    .expect("every sequence has one");
                tokens.push(sampler.sample(logits));
            },
        )?;
        Ok(tokens)
    }

    /// Sends a token on, or ends the request with it.
    fn deliver(&mut self, id: SequenceId, token: TokenOutput) {
        let finish = self.scheduler.push(id, token.id);
        let generated = self
            .scheduler
            .sequence(id)
            .map_or(0, |sequence| sequence.generated().len());
        let Some(entry) = self.entries.get_mut(&id) else {
            return;
        };
        match &entry.kind {
            Kind::Generate { sender, .. } => {
                sender.token(token);
                if finish.is_none() && generated == 1 {
                    // Whoever stops early, at a stop string, knows by then what was reused.
                    sender.usage(entry.usage(generated));
                }
                if let Some(reason) = finish {
                    self.end(id, Ok(reason));
                }
            }
            Kind::Prefill { .. } => self.finish_prefill(id, token),
        }
    }

    /// The prompt of a job is computed: what is left is to wait for its bytes.
    fn finish_prefill(&mut self, id: SequenceId, first: TokenOutput) {
        let sequence = self.scheduler.retire(id).expect("just computed");
        let Some(Entry {
            request,
            sampler,
            kind: Kind::Prefill { sender, run },
            live,
            recording,
            ..
        }) = self.entries.remove(&id)
        else {
            return;
        };
        if let Some(recording) = recording {
            recording.finish(count(sequence.generated().len()));
        }
        debug!(request = %request.request_id, "prefill computed");
        let cached = count(sequence.cached_tokens());
        let blocks = self.held(sequence);
        run.finish(
            &request,
            first,
            sampler.state(),
            cached,
            blocks,
            sender,
            live,
        );
    }

    fn end_failed_prefills(&mut self, slices: &[Slice]) {
        for slice in slices {
            let run = self.entries.get_mut(&slice.id).and_then(Entry::prefill_run);
            let failure = run.and_then(PrefillRun::failure);
            if let Some(error) = failure {
                self.end(slice.id, Err(error));
            }
        }
    }

    fn sweep_cancelled(&mut self) {
        let cancelled = |entry: &Entry| match &entry.kind {
            Kind::Generate { sender, .. } => sender.is_cancelled(),
            Kind::Prefill { sender, .. } => sender.is_cancelled(),
        };
        let ids: Vec<SequenceId> = self
            .entries
            .iter()
            .filter(|(_, entry)| cancelled(entry))
            .map(|(&id, _)| id)
            .collect();
        for id in ids {
            let error = GenerateError::new(ErrorKind::Cancelled, "cancelled by the client");
            self.end(id, Err(error));
        }
    }

    fn sweep_expired(&mut self) {
        for id in self.scheduler.expired(self.shared.now()) {
            let error = GenerateError::new(
                ErrorKind::DeadlineExceeded,
                "the request's deadline passed before it was finished",
            );
            self.end(id, Err(error));
        }
    }

    /// Ends a request and frees its blocks, or leaves them to whoever waits until no byte can move.
    fn end(&mut self, id: SequenceId, result: Result<FinishReason, GenerateError>) {
        let sequence = self.scheduler.retire(id);
        let Some(entry) = self.entries.remove(&id) else {
            return;
        };
        let generated = sequence.as_ref().map_or(0, |s| s.generated().len());
        let usage = entry.usage(generated);
        if let Some(recording) = entry.recording {
            recording.finish(count(generated));
        }
        let mut blocks = sequence.map(|sequence| self.held(sequence));
        if let Some(loading) = entry.loading
            && let Some(blocks) = blocks.take()
        {
            loading.give_up(Box::new(blocks));
        }
        match entry.kind {
            Kind::Generate { sender, remote } => {
                if let (Some(run), Some(blocks)) = (remote, blocks) {
                    run.give_up(blocks);
                }
                match result {
                    Ok(reason) => sender.finish(reason, usage),
                    Err(error) => sender.fail(error),
                }
            }
            Kind::Prefill { sender, run } => {
                let error = result.err().unwrap_or_else(leaving);
                run.abort(blocks, sender, entry.live, error);
            }
        }
    }

    fn end_all(&mut self, error: &GenerateError) {
        let ids: Vec<SequenceId> = self.entries.keys().copied().collect();
        for id in ids {
            self.end(id, Err(error.clone()));
        }
    }

    fn held(&self, sequence: Sequence<KvPool>) -> HeldBlocks {
        HeldBlocks::new(sequence.into_blocks(), Arc::clone(&self.shared))
    }

    fn answer_drain(&mut self) {
        let Some((until, _)) = &self.draining else {
            return;
        };
        let late = Instant::now() >= *until;
        if late && !self.entries.is_empty() {
            self.end_all(&leaving());
        }
        if (late || self.shared.live() == 0)
            && let Some((_, done)) = self.draining.take()
        {
            // Nobody may wait for the answer any more.
            let _ = done.send(());
        }
    }

    fn sleep_timeout(&self) -> Option<Duration> {
        let deadline = self
            .scheduler
            .next_deadline()
            .map(|deadline| deadline.saturating_sub(self.shared.now()));
        let drain = self
            .draining
            .as_ref()
            .map(|(until, _)| until.saturating_duration_since(Instant::now()));
        // Copies to lower tiers hold blocks for a moment and tell nobody when they let go of them.
        let starved = self.scheduler.pool().has_lower_tiers() && self.scheduler.waits_for_blocks();
        let retry = starved.then_some(RETRY);
        [deadline, drain, retry].into_iter().flatten().min()
    }

    fn publish(&self) {
        let stats = self.scheduler.stats();
        self.shared.publish(LoadReport {
            requests_running: count(stats.running),
            requests_waiting: count(stats.waiting),
            prefill_tokens_queued: stats.prefill_tokens_queued as u64,
            preemptions_total: stats.preemptions,
            ..self.totals
        });
    }
}

impl Entry {
    fn new(request: GenerateRequest, kind: Kind, live: Live, eos: &[TokenId]) -> Self {
        let seed = request.sampling.seed.unwrap_or_default();
        let sampler = Sampler::new(
            &request.sampling,
            request.logprobs,
            seed,
            &request.token_ids,
        )
        .with_min_tokens(&request.stop, eos);
        Self {
            request,
            sampler,
            usage: Usage::default(),
            loading: None,
            loaded: LoadedFrom::default(),
            recording: None,
            kind,
            live,
        }
    }

    /// What the request has cost by the time it has so many tokens.
    fn usage(&self, generated: usize) -> Usage {
        Usage {
            prompt_tokens: count(self.request.token_ids.len()),
            completion_tokens: count(generated),
            ..self.usage.clone()
        }
    }

    fn prefill_run(&mut self) -> Option<&mut PrefillRun> {
        match &mut self.kind {
            Kind::Prefill { run, .. } => Some(run),
            Kind::Generate { .. } => None,
        }
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        self.shared.set_ended();
        self.shared.mailbox.close();
    }
}

fn leaving() -> GenerateError {
    RequestError::Draining.into()
}

/// Counts inside one request and one pool are 32 bits: both are validated against it.
fn count(n: usize) -> u32 {
    u32::try_from(n).expect("sequences and pools are below 2^32")
}

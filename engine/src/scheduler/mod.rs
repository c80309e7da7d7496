//! What to compute next: a state machine without clock, threads or I/O.
//!
//! ```text
//! submit -> waiting --admit--> running --step, advance, push--> ... --retire--> blocks back
//!              ^                  |  \__ gated: blocks held, KV comes from elsewhere (open_gate)
//!              '---- preempted ---'
//! ```
//!
//! * **Continuous batching.** Each step takes one token of every decoding sequence and fills the
//!   rest of the token budget with chunks of prompts, oldest first. Chunks end at block boundaries.
//! * **Admission** is first come, first served: the oldest waiting sequence gets the blocks of all
//!   its tokens at once, less those found in the prefix cache, or nobody is admitted. One block per
//!   running sequence stays in reserve, so that admitting one does not preempt another at once.
//! * **Preemption.** When a decoding sequence needs a block and there is none, the youngest one
//!   gives all of its blocks back and waits to be computed again (its full blocks usually still are
//!   in the prefix cache). The oldest one is never the victim, so every sequence ends.
//! * **Gates.** A gated sequence holds its blocks while their KV comes from lower tiers or from
//!   another worker. It is not computed, and not preempted, because bytes may still arrive; others
//!   are computed meanwhile.
//! * **Lower tiers** are a cache like the pool: what they do not give in time is computed. A sequence
//!   that did not get all it was promised keeps what came, waits for its turn again, and does not
//!   ask them a second time.
//!
//! Whoever takes a sequence out ([`Scheduler::retire`]) gets its blocks with it: dropping them
//! returns them to the pool, and a caller whose blocks may still be read or written by a peer keeps
//! them until that is over.

mod blocks;
mod sequence;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, time::Duration};

use blockplane_protocol::{FinishReason, TokenId};
use thiserror::Error;

pub use self::{
    blocks::{Found, KvBlocks},
    sequence::{Gate, Sequence, SequenceBlocks, SequenceId, SequenceKind, SequenceSpec},
};

/// Limits of a scheduler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Most sequences that hold blocks. Default 64.
    pub max_running: usize,
    /// Most sequences that wait for blocks; beyond them a request is refused. Default 256.
    pub max_waiting: usize,
    /// Most tokens computed in one step. More is faster for prompts and makes decoding sequences
    /// wait longer for each other. At least `max_running` + one block. Default 512.
    pub max_batch_tokens: usize,
    /// Most tokens of one prompt in one step, so that a short prompt need not wait for all of a
    /// long one. At least one block. Default 256.
    pub prefill_chunk_tokens: usize,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            max_running: 64,
            max_waiting: 256,
            max_batch_tokens: 512,
            prefill_chunk_tokens: 256,
        }
    }
}

/// Why a [`SchedulerConfig`] is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{name} is {value}; accepted: {at_least} or more")]
pub struct SchedulerConfigError {
    /// The setting.
    pub name: &'static str,
    /// Its value.
    pub value: usize,
    /// The least it may be.
    pub at_least: usize,
}

/// Why a sequence is not taken: the waiting queue is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{limit} requests already wait")]
pub struct QueueFull {
    /// Length of the queue.
    pub limit: usize,
}

/// A sequence that was given its blocks.
#[derive(Debug)]
pub struct Admitted<B: KvBlocks> {
    /// The sequence.
    pub id: SequenceId,
    /// Tokens found in the prefix cache this time; with [`Gate::Onboard`], those before the first
    /// one to load.
    pub cached_tokens: usize,
    /// Whether it was admitted before and preempted since.
    pub again: bool,
    /// What it waits for; the caller opens it with [`Scheduler::open_gate`], or with
    /// [`Scheduler::onboarded`].
    pub gate: Option<Gate>,
    /// What lower tiers hold for it; present with [`Gate::Onboard`].
    pub lower: Option<B::Lower>,
}

/// Part of a step: compute the KV of tokens `start..start + len` of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The sequence.
    pub id: SequenceId,
    /// First token.
    pub start: usize,
    /// Tokens.
    pub len: usize,
    /// The last of them is the last token of the sequence: sample the next one.
    pub sample: bool,
}

/// What a scheduler holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedulerStats {
    /// Sequences with blocks.
    pub running: usize,
    /// Sequences without.
    pub waiting: usize,
    /// Prompt tokens not computed yet, gated sequences excepted.
    pub prefill_tokens_queued: usize,
    /// Preemptions since start.
    pub preemptions: u64,
}

/// The state machine. See the module documentation.
#[derive(Debug)]
pub struct Scheduler<B: KvBlocks> {
    config: SchedulerConfig,
    pool: B,
    block_tokens: usize,
    tokens_max: usize,
    eos: Vec<TokenId>,
    next_id: u64,
    waiting: BTreeMap<SequenceId, Sequence<B>>,
    running: BTreeMap<SequenceId, Sequence<B>>,
    /// A running sequence needs a block and nobody can give one: admit nobody meanwhile.
    stalled: bool,
    preemptions: u64,
}

impl SchedulerConfig {
    /// Checks the limits against each other.
    ///
    /// # Errors
    /// A [`SchedulerConfigError`] that names the first setting that is too small.
    pub fn validate(&self, block_tokens: usize) -> Result<(), SchedulerConfigError> {
        let chunk = self.max_running.saturating_add(block_tokens);
        for (name, value, at_least) in [
            ("max_running", self.max_running, 1),
            ("max_waiting", self.max_waiting, 1),
            ("max_batch_tokens", self.max_batch_tokens, chunk),
            (
                "prefill_chunk_tokens",
                self.prefill_chunk_tokens,
                block_tokens,
            ),
        ] {
            if value < at_least {
                return Err(SchedulerConfigError {
                    name,
                    value,
                    at_least,
                });
            }
        }
        Ok(())
    }
}

impl<B: KvBlocks> Scheduler<B> {
    /// A scheduler over `pool`, for sequences of at most `tokens_max` tokens; one that also fits
    /// the pool is never refused for want of blocks.
    ///
    /// # Errors
    /// When the limits contradict each other.
    pub fn new(
        config: SchedulerConfig,
        pool: B,
        block_tokens: usize,
        tokens_max: usize,
        eos: Vec<TokenId>,
    ) -> Result<Self, SchedulerConfigError> {
        config.validate(block_tokens)?;
        let tokens_max = tokens_max.min(pool.total().saturating_mul(block_tokens));
        Ok(Self {
            config,
            pool,
            block_tokens,
            tokens_max,
            eos,
            next_id: 0,
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            stalled: false,
            preemptions: 0,
        })
    }

    /// Longest sequence, prompt and output together.
    #[must_use]
    pub fn tokens_max(&self) -> usize {
        self.tokens_max
    }

    /// Tokens that end a sequence.
    #[must_use]
    pub fn eos(&self) -> &[TokenId] {
        &self.eos
    }

    /// The pool.
    pub fn pool(&self) -> &B {
        &self.pool
    }

    /// Puts a sequence at the end of the waiting queue.
    ///
    /// # Errors
    /// When the queue is full.
    ///
    /// # Panics
    /// When the prompt is empty or leaves no room for a token: requests are validated before.
    pub fn submit(&mut self, spec: SequenceSpec) -> Result<SequenceId, QueueFull> {
        assert!(
            (1..self.tokens_max).contains(&spec.prompt.len()),
            "prompts are validated before they are scheduled"
        );
        if self.waiting.len() >= self.config.max_waiting {
            return Err(QueueFull {
                limit: self.config.max_waiting,
            });
        }
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let sequence = Sequence::new(spec, self.block_tokens, self.tokens_max);
        self.waiting.insert(id, sequence);
        Ok(id)
    }

    /// Gives blocks to waiting sequences, oldest first, as far as they go.
    pub fn admit(&mut self) -> Vec<Admitted<B>> {
        let mut admitted = Vec::new();
        while !self.stalled && self.running.len() < self.config.max_running {
            let Some(entry) = self.waiting.first_entry() else {
                break;
            };
            let sequence = entry.get();
            // At least one token is computed: its logits give the next one.
            let matchable = (sequence.tokens().len() - 1) / self.block_tokens;
            let names = &sequence.token_sequence().blocks()[..matchable];
            let prefix = self.pool.match_prefix(names);
            let all = sequence.token_sequence().blocks_needed();
            let needed = all - prefix.len();
            if self.pool.available() < needed + self.running.len() && !self.running.is_empty() {
                break;
            }
            let found = if sequence.lower_failed || prefix.len() == names.len() {
                Found::readable(prefix)
            } else {
                self.pool.extend_prefix(prefix, names)
            };
            let Some(fresh) = self
                .pool
                .allocate(all - found.blocks.iter().flatten().count())
            else {
                break;
            };
            let (id, mut sequence) = entry.remove_entry();
            let end = u32::try_from(found.blocks.len()).expect("block counts are 32 bits");
            sequence.seat(found.blocks, fresh);
            admitted.push(match found.lower {
                None => self.seated(id, &mut sequence),
                Some(lower) => {
                    sequence.gate = Some(Gate::Onboard { end });
                    Admitted {
                        id,
                        cached_tokens: sequence.computed,
                        again: sequence.cached.is_some(),
                        gate: sequence.gate,
                        lower: Some(lower),
                    }
                }
            });
            self.running.insert(id, sequence);
        }
        admitted
    }

    /// Takes the end of a load from lower tiers: the first `loaded` blocks of the sequence are in
    /// place, and no byte lands in any other any more. They become readable. When that is all there
    /// was to load, the sequence goes on: what it waits for next is in the result. If not, it is
    /// put back into the waiting queue, and will not ask lower tiers again; or the sequence is gone:
    /// the result is `None`.
    ///
    /// # Panics
    /// When the sequence does not wait for this, or `loaded` is not within what it waits for.
    pub fn onboarded(&mut self, id: SequenceId, loaded: usize) -> Option<Admitted<B>> {
        let mut sequence = self.running.remove(&id)?;
        let Some(Gate::Onboard { end }) = sequence.gate.take() else {
            panic!("only a sequence that waits for lower tiers is told of them");
        };
        assert!(loaded <= end as usize, "no more is loaded than was asked");
        let computed = (loaded * self.block_tokens).max(sequence.computed);
        sequence.set_computed(computed, true, &self.pool);
        if loaded == end as usize {
            let admitted = self.seated(id, &mut sequence);
            self.running.insert(id, sequence);
            return Some(admitted);
        }
        sequence.lower_failed = true;
        // Nothing lands in these blocks any more: dropping them returns them.
        drop(sequence.unseat());
        self.waiting.insert(id, sequence);
        None
    }

    /// Lets a gated sequence be computed here from token `computed` on: what comes before it is in
    /// place, and its full blocks become readable. Does nothing when the sequence is gone.
    ///
    /// # Panics
    /// When the sequence is not gated, or `computed` is beyond its tokens.
    pub fn open_gate(&mut self, id: SequenceId, computed: usize) {
        if let Some(sequence) = self.running.get_mut(&id) {
            let gate = sequence.gate.take();
            assert!(gate.is_some(), "only a gated sequence has a gate to open");
            sequence.set_computed(computed.max(sequence.computed), false, &self.pool);
        }
    }

    /// Puts a running sequence back into the waiting queue, to be computed here in other blocks, and
    /// hands out the ones it had. `None` when it is not running.
    pub fn requeue(&mut self, id: SequenceId) -> Option<SequenceBlocks<B>> {
        let mut sequence = self.running.remove(&id)?;
        let blocks = sequence.unseat();
        self.waiting.insert(id, sequence);
        Some(blocks)
    }

    /// Chooses the slices of the next step, oldest sequence first and decoding before prompts.
    /// Each sequence has the blocks for its slice. Empty when there is nothing to compute.
    pub fn step(&mut self) -> Vec<Slice> {
        self.provide_blocks();
        let mut budget = self.config.max_batch_tokens;
        let mut slices = Vec::new();
        let ready = |s: &Sequence<B>| s.gate.is_none() && s.blocks_missing() == 0;
        for (&id, sequence) in &self.running {
            if ready(sequence) && sequence.remaining() == 1 && budget > 0 {
                budget -= 1;
                slices.push(slice(id, sequence, 1));
            }
        }
        for (&id, sequence) in &self.running {
            if !ready(sequence) || sequence.remaining() <= 1 {
                continue;
            }
            let len = self.chunk(sequence, budget);
            if len == 0 {
                continue;
            }
            budget -= len;
            slices.push(slice(id, sequence, len));
        }
        slices
    }

    /// Notes that a slice was computed; the blocks that it filled become readable.
    ///
    /// # Panics
    /// When the slice is not the next one of its sequence.
    pub fn advance(&mut self, slice: &Slice) {
        if let Some(sequence) = self.running.get_mut(&slice.id) {
            assert_eq!(sequence.computed, slice.start, "slices are done in order");
            sequence.set_computed(slice.start + slice.len, false, &self.pool);
        }
    }

    /// Appends the token that was chosen after the last slice; says whether the sequence ends with
    /// it, in which case the caller retires it.
    pub fn push(&mut self, id: SequenceId, token: TokenId) -> Option<FinishReason> {
        let sequence = self.running.get_mut(&id)?;
        sequence.push(token, &self.eos)
    }

    /// Takes a sequence out, wherever it is, with its blocks.
    pub fn retire(&mut self, id: SequenceId) -> Option<Sequence<B>> {
        self.running
            .remove(&id)
            .or_else(|| self.waiting.remove(&id))
    }

    /// A sequence, wherever it is.
    #[must_use]
    pub fn sequence(&self, id: SequenceId) -> Option<&Sequence<B>> {
        self.running.get(&id).or_else(|| self.waiting.get(&id))
    }

    /// Sequences whose deadline is `now` or earlier; the caller retires them.
    #[must_use]
    pub fn expired(&self, now: Duration) -> Vec<SequenceId> {
        let mut expired: Vec<_> = self
            .all()
            .filter(|(_, sequence)| sequence.deadline <= now)
            .map(|(id, _)| id)
            .collect();
        expired.sort_unstable();
        expired
    }

    /// The next moment at which [`Scheduler::expired`] changes by itself.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        self.all().map(|(_, sequence)| sequence.deadline).min()
    }

    /// Whether a sequence waits for blocks that somebody else holds.
    #[must_use]
    pub fn waits_for_blocks(&self) -> bool {
        self.stalled || !self.waiting.is_empty()
    }

    /// Whether no sequence is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// What it holds now.
    #[must_use]
    pub fn stats(&self) -> SchedulerStats {
        let queued = |s: &Sequence<B>| match s.gate {
            Some(Gate::RemotePrefill) => 0,
            Some(Gate::Onboard { end }) => {
                let loaded = end as usize * self.block_tokens;
                s.prompt_tokens().saturating_sub(loaded)
            }
            Some(Gate::Load { .. }) | None => s.prompt_tokens().saturating_sub(s.computed),
        };
        SchedulerStats {
            running: self.running.len(),
            waiting: self.waiting.len(),
            prefill_tokens_queued: self.all().map(|(_, sequence)| queued(sequence)).sum(),
            preemptions: self.preemptions,
        }
    }

    /// A sequence that has all that the cache gives; its gate is set.
    fn seated(&self, id: SequenceId, sequence: &mut Sequence<B>) -> Admitted<B> {
        let again = sequence.cached.is_some();
        sequence.cached.get_or_insert(sequence.computed);
        sequence.gate = gate(sequence, sequence.computed / self.block_tokens, again);
        Admitted {
            id,
            cached_tokens: sequence.computed,
            again,
            gate: sequence.gate,
            lower: None,
        }
    }

    fn all(&self) -> impl Iterator<Item = (SequenceId, &Sequence<B>)> {
        self.running
            .iter()
            .chain(&self.waiting)
            .map(|(&id, sequence)| (id, sequence))
    }

    /// Gives each decoding sequence the block for its next token, preempting the youngest ones
    /// where the pool is exhausted.
    fn provide_blocks(&mut self) {
        self.stalled = false;
        let ids: Vec<SequenceId> = self.running.keys().copied().collect();
        for id in ids {
            while let Some(missing) = self.running.get(&id).map(Sequence::blocks_missing)
                && missing > 0
            {
                if let Some(blocks) = self.pool.allocate(missing) {
                    let sequence = self.running.get_mut(&id).expect("looked up above");
                    sequence.append(blocks);
                } else if !self.preempt_one_younger_than(id) {
                    // Whoever else holds blocks is gated or prefills for a peer: it ends by itself.
                    self.stalled = true;
                    break;
                }
            }
        }
    }

    /// Preempts the youngest sequence after `id` that can be.
    fn preempt_one_younger_than(&mut self, id: SequenceId) -> bool {
        let victim = self
            .running
            .range(id..)
            .rev()
            .find(|&(&other, sequence)| other != id && sequence.preemptible())
            .map(|(&other, _)| other);
        let Some(victim) = victim else {
            return false;
        };
        // Dropping the blocks returns them.
        let _ = self.requeue(victim);
        self.preemptions += 1;
        true
    }

    /// Tokens of the next chunk of a prompt: within the limits, and up to a block boundary or the
    /// end of the prompt.
    fn chunk(&self, sequence: &Sequence<B>, budget: usize) -> usize {
        let limit = budget.min(self.config.prefill_chunk_tokens);
        if sequence.remaining() <= limit {
            return sequence.remaining();
        }
        let end = (sequence.computed + limit) / self.block_tokens * self.block_tokens;
        end.saturating_sub(sequence.computed)
    }
}

fn slice<B: KvBlocks>(id: SequenceId, sequence: &Sequence<B>, len: usize) -> Slice {
    Slice {
        id,
        start: sequence.computed,
        len,
        sample: len == sequence.remaining(),
    }
}

/// What a sequence that was just given its blocks waits for.
fn gate<B: KvBlocks>(sequence: &Sequence<B>, matched: usize, again: bool) -> Option<Gate> {
    match sequence.kind {
        SequenceKind::Local => None,
        SequenceKind::Remote {
            uncached_tokens_min,
        } => {
            let uncached = sequence.remaining();
            (!again && uncached >= uncached_tokens_min as usize).then_some(Gate::RemotePrefill)
        }
        SequenceKind::ForPeer { peer_cached_blocks } => {
            let first = u32::try_from(matched).expect("block counts are 32 bits");
            (first < peer_cached_blocks).then_some(Gate::Load {
                first,
                end: peer_cached_blocks,
            })
        }
    }
}

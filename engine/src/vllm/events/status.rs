//! How well a vLLM is followed, for health, logs and metrics.

use std::fmt;

use blockplane_protocol::{DpRank, EventsReport};

/// How far what is told of vLLM's cache can be trusted. What is told is always there; there may be
/// more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Confidence {
    /// Nothing has been heard of it.
    #[default]
    NoEvents,
    /// Everything it holds is known.
    Complete,
    /// It may hold blocks from before what is known: it was followed late, or events were lost for
    /// good. It becomes complete when vLLM clears its cache, or starts again.
    Partial,
    /// Its blocks have another size than the worker registered, so none of them can be told.
    WrongBlockSize {
        /// Tokens per block that the worker registered.
        registered: u32,
        /// Tokens per block that vLLM has.
        received: u32,
    },
}

/// The state of one rank's events.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventsStatus {
    /// The rank.
    pub rank: DpRank,
    /// Whether vLLM's events come at this moment.
    pub connected: bool,
    /// How far what is told can be trusted.
    pub confidence: Confidence,
    /// Tokens per block, as the worker registered it.
    pub block_tokens: u32,
    /// Tokens per block, as vLLM said with the first block; `None` before it.
    pub block_tokens_received: Option<u32>,
    /// vLLM's number of the last batch that was taken in.
    pub last_sequence: Option<u64>,
    /// Blocks that are told now.
    pub blocks: usize,
    /// The last thing that went wrong, if any.
    pub error: Option<String>,
    /// Since start.
    pub counters: EventsCounters,
}

/// What happened since start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventsCounters {
    /// Connections to vLLM's publisher.
    pub connections: u64,
    /// Batches taken in.
    pub batches: u64,
    /// Events in them.
    pub events: u64,
    /// Times that numbers were missing.
    pub gaps: u64,
    /// Times that the replay endpoint was asked.
    pub replays: u64,
    /// Times that it did not answer.
    pub replays_failed: u64,
    /// Batches that came in its answers.
    pub replayed: u64,
    /// Times that all was forgotten and learned anew.
    pub resyncs: u64,
    /// Batches or events that could not be read.
    pub undecodable: u64,
    /// Stored events whose beginning is not known.
    pub orphans: u64,
    /// Blocks that their tokens do not name: images, embeddings, adapters without a name.
    pub unnamed: u64,
    /// Events that name no prefix: of other groups, of parts of blocks, of unknown kinds.
    pub ignored: u64,
    /// Removed blocks that were not known.
    pub unknown_removed: u64,
}

impl Confidence {
    /// Whether a person has to do something.
    #[must_use]
    pub const fn is_error(self) -> bool {
        matches!(self, Self::WrongBlockSize { .. })
    }
}

impl EventsStatus {
    /// What is wrong, for the worker's report of its load.
    #[must_use]
    pub fn report(&self) -> EventsReport {
        EventsReport {
            disconnected: !self.connected,
            partial: self.confidence == Confidence::Partial,
            wrong_block_size: self.confidence.is_error(),
            gaps_total: self.counters.gaps,
            resyncs_total: self.counters.resyncs,
            orphans_total: self.counters.orphans,
        }
    }

    /// vLLM said that its cache is empty.
    pub(super) fn cleared(&mut self) {
        if !self.confidence.is_error() {
            self.confidence = Confidence::Complete;
        }
    }

    pub(super) fn right_block_size(&mut self, received: u32) {
        if self.block_tokens_received.replace(received).is_none() {
            tracing::info!(
                rank = self.rank.0,
                block_tokens = received,
                "KV events of vLLM come"
            );
        }
        if self.confidence.is_error() {
            // Blocks of the wrong size were left out in the meantime.
            self.confidence = Confidence::Partial;
        }
    }

    pub(super) fn wrong_block_size(&mut self, received: u32) {
        self.counters.undecodable += 1;
        let wrong = Confidence::WrongBlockSize {
            registered: self.block_tokens,
            received,
        };
        if self.confidence != wrong {
            self.confidence = wrong;
            self.block_tokens_received = Some(received);
            let error = self.to_string();
            tracing::error!(rank = self.rank.0, "{error}");
            self.error = Some(error);
        }
    }
}

impl fmt::Display for EventsStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rank = self.rank.0;
        match self.confidence {
            Confidence::WrongBlockSize {
                registered,
                received,
            } => write!(
                f,
                "vLLM's blocks have {received} tokens and this worker registered {registered}: no \
                 block of rank {rank} can be told to routers; start the worker with \
                 --block-size {received}, or vLLM with --block-size {registered}"
            ),
            Confidence::NoEvents => write!(f, "no KV event of rank {rank} has come yet"),
            Confidence::Complete => {
                write!(
                    f,
                    "rank {rank}: all {} blocks of vLLM are known",
                    self.blocks
                )
            }
            Confidence::Partial => {
                write!(
                    f,
                    "rank {rank}: {} blocks of vLLM are known, and there may be more",
                    self.blocks
                )
            }
        }?;
        if !self.connected && self.confidence != Confidence::NoEvents {
            write!(f, "; not connected")?;
        }
        Ok(())
    }
}

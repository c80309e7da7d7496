//! The tiers below a rank's pool, as an engine thread uses them. Nothing here waits.

use std::{fmt, time::Duration};

use blockplane_kvbm::ImmutableBlock;
use blockplane_protocol::{BlockId, TokenBlock};

use super::pool::KvPool;
use crate::scheduler::Found;

/// The tiers below the pool of one rank.
pub(crate) trait Below: Send + Sync + fmt::Debug {
    /// Continues `prefix`, the readable beginning of `blocks`, over all tiers. See
    /// [`KvBlocks::extend_prefix`](crate::scheduler::KvBlocks::extend_prefix).
    fn extend_prefix(&self, prefix: Vec<ImmutableBlock>, blocks: &[TokenBlock]) -> Found<KvPool>;

    /// Notes that a request asks for these blocks, from the first of its prompt on. To be told once
    /// for each request.
    fn referenced(&self, blocks: &[TokenBlock]);

    /// Offers readable blocks, consecutive ones of one sequence, to be copied. They are not held for
    /// it: what is overwritten before its turn comes is not copied. False when their priority is too
    /// low: later blocks of the same request are not to be offered either.
    fn offload(&self, blocks: &[TokenBlock], priority: Option<u32>) -> bool;
}

/// Blocks held in lower tiers for one sequence, until they are loaded or this is dropped.
pub(crate) trait Lower: Send + fmt::Debug {
    /// Copies the blocks into `targets`, blocks of the pool, one for each that is not readable
    /// there, in order. `done` is called once, at the latest soon after `within`, when no byte lands
    /// in them any more; not after [`Loading::give_up`].
    fn load(
        self: Box<Self>,
        targets: Vec<BlockId>,
        within: Duration,
        done: Box<dyn FnOnce(Loaded) + Send>,
    ) -> Box<dyn Loading>;
}

/// A load under way.
pub(crate) trait Loading: Send {
    /// Nobody wants the blocks any more: drops `keep`, which holds the targets, as soon as no byte
    /// lands in them.
    fn give_up(self: Box<Self>, keep: Box<dyn Send>);
}

/// How a load ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Loaded {
    /// Leading blocks of what was found that are in place, those included that were readable
    /// before.
    pub(crate) leading: usize,
    /// Where the loaded ones came from.
    pub(crate) from: LoadedFrom,
}

/// Blocks by the tier that they were loaded from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LoadedFrom {
    /// Host memory.
    pub(crate) host: u32,
    /// Disk.
    pub(crate) disk: u32,
    /// Object store or another worker.
    pub(crate) remote: u32,
}

impl LoadedFrom {
    /// Adds what another load brought.
    pub(crate) fn add(&mut self, other: Self) {
        self.host += other.host;
        self.disk += other.disk;
        self.remote += other.remote;
    }
}

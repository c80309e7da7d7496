//! What callers say: which blocks, which direction, how long.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::completion::CompletionQueue;
use crate::agent::Peer;
use crate::config::Lane;
use crate::cuda::DeviceEvent;
use crate::memory::{RegionId, Registration};
use crate::plan::{BlockIds, BlockLayout, KvBlockLayout, KvSlice};
use crate::window::WindowId;

/// Direction of an operation, seen from the agent that posts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Local bytes into the peer's memory.
    Write,
    /// The peer's bytes into local memory.
    Read,
}

impl Op {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Read => "read",
        }
    }
}

/// Blocks of this agent's memory.
#[derive(Clone, Debug)]
pub struct LocalBlocks<'a> {
    /// The region.
    pub registration: &'a Registration,
    /// How blocks lie in it.
    pub layout: BlockLayout,
    /// Block ids; the i-th pairs with the i-th remote id.
    pub ids: BlockIds,
    /// Layers; the k-th pairs with the k-th remote layer.
    pub layers: Range<u32>,
}

/// Blocks of a peer's memory.
#[derive(Clone, Debug)]
pub struct RemoteBlocks<'a> {
    /// The peer.
    pub peer: &'a Peer,
    /// The region, as the peer names it.
    pub region: RegionId,
    /// How blocks lie in it.
    pub layout: BlockLayout,
    /// Block ids.
    pub ids: BlockIds,
    /// Layers.
    pub layers: Range<u32>,
    /// The window through which the blocks are accessed, if the region needs one.
    pub window: Option<WindowId>,
}

/// A part of the blocks of a KV cache in this agent's memory.
#[derive(Clone, Debug)]
pub struct LocalTensor<'a> {
    /// The region.
    pub registration: &'a Registration,
    /// How the cache lies in it.
    pub layout: KvBlockLayout,
    /// Block ids; the i-th pairs with the i-th remote id.
    pub ids: BlockIds,
    /// The part of each block; the i-th layer, plane, token and head of it pair with the i-th of the
    /// remote part.
    pub slice: KvSlice,
}

/// A part of the blocks of a KV cache in a peer's memory.
#[derive(Clone, Debug)]
pub struct RemoteTensor<'a> {
    /// The peer.
    pub peer: &'a Peer,
    /// The region, as the peer names it.
    pub region: RegionId,
    /// How the cache lies in it.
    pub layout: KvBlockLayout,
    /// Block ids.
    pub ids: BlockIds,
    /// The part of each block.
    pub slice: KvSlice,
    /// The window through which the blocks are accessed, if the region needs one.
    pub window: Option<WindowId>,
}

/// A piece of this agent's memory.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor<'a> {
    /// The region.
    pub registration: &'a Registration,
    /// First byte in it.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// A piece of a peer's memory. Its length is that of the local descriptor it pairs with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteDescriptor {
    /// The region, as the peer names it.
    pub region: RegionId,
    /// First byte in it.
    pub offset: u64,
    /// The window through which it is accessed; the same for all descriptors of an operation.
    pub window: Option<WindowId>,
}

/// How an operation is going to run.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Plan {
    /// Direction.
    pub op: Op,
    /// Bytes moved.
    pub bytes: u64,
    /// Runs named by the caller.
    pub runs: u64,
    /// Pieces that are contiguous on both sides, after merging.
    pub pieces: u64,
    /// Pairs of block sets; a regular list is one. A copy that rearranges counts as one for each
    /// nest of loops.
    pub sets: usize,
    /// Parts of a copy, stripes over streams, or launches on a device.
    pub parts: u32,
    /// The lane.
    pub lane: Lane,
    /// Why this lane and this way.
    pub reason: String,
}

/// How one posting of a prepared operation goes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PostOptions {
    /// The transfer fails with `DeadlineExceeded` after this time. Default 30 s.
    pub deadline: Duration,
    /// Delivered to the peer after all bytes are in place. Default none.
    pub notification: Option<Bytes>,
    /// Where the end is reported, and with which number. Default none.
    pub completion: Option<(CompletionQueue, u64)>,
    /// Names the request that the transfer serves, in traces and telemetry. Default none.
    pub request_id: Option<Arc<str>>,
    /// The transfer touches no byte before the work behind which this event was recorded is done. For
    /// operations with device memory. Default none.
    pub after: Option<DeviceEvent>,
    /// Multiprocessors that the transfer may occupy, up to all that the device has; a staged one may
    /// have copies of several parts under way, each with as many. For operations with device memory.
    /// Default: [`CudaConfig::sms`](crate::CudaConfig::sms).
    pub sms: Option<u32>,
}

impl Default for PostOptions {
    fn default() -> Self {
        Self::within(Duration::from_secs(30))
    }
}

impl PostOptions {
    /// A deadline and nothing else.
    #[must_use]
    pub const fn within(deadline: Duration) -> Self {
        Self {
            deadline,
            notification: None,
            completion: None,
            request_id: None,
            after: None,
            sms: None,
        }
    }

    /// The same with a notification.
    #[must_use]
    pub fn notify(mut self, payload: impl Into<Bytes>) -> Self {
        self.notification = Some(payload.into());
        self
    }

    /// The same with its end reported to a queue, under a number of the caller's.
    #[must_use]
    pub fn complete_to(mut self, queue: &CompletionQueue, token: u64) -> Self {
        self.completion = Some((queue.clone(), token));
        self
    }

    /// The same, after an event of the caller's.
    #[must_use]
    pub const fn after(mut self, event: DeviceEvent) -> Self {
        self.after = Some(event);
        self
    }

    /// The same with another budget of multiprocessors.
    #[must_use]
    pub const fn sms(mut self, sms: u32) -> Self {
        self.sms = Some(sms);
        self
    }

    /// The same for a request: traces and telemetry carry its name.
    #[must_use]
    pub fn request_id(mut self, id: impl Into<Arc<str>>) -> Self {
        self.request_id = Some(id.into());
        self
    }
}

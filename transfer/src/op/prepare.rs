//! Preparing an operation: everything is checked and planned once, posting is cheap.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::state::TransferState;
use super::transfer::Transfer;
use crate::agent::{Core, Peer, RemoteMemory, RemoteRegion, Session};
use crate::backend::Refusal;
use crate::config::{Lane, RemoteAccess};
use crate::error::{PostError, PrepareError, Side};
use crate::memory::{Region, RegionId, Registration, copy_bytes};
use crate::plan::{
    BlockLayout, BlockSet, DescriptorPair, Order, compress, for_each_segment, part_range, parts_of,
    segment_count, stripes,
};
use crate::window::{Grant, WindowId};

/// Most pairs of block sets in one operation.
const SETS_MAX: usize = 1 << 20;
/// A stream gets no stripe below this size.
const STRIPE_BYTES_MIN: u64 = 64 << 10;

/// Direction of an operation, seen from the agent that posts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Local bytes into the peer's memory.
    Write,
    /// The peer's bytes into local memory.
    Read,
}

/// Blocks of this agent's memory.
#[derive(Clone, Debug)]
pub struct LocalBlocks<'a> {
    /// The region.
    pub registration: &'a Registration,
    /// How blocks lie in it.
    pub layout: BlockLayout,
    /// Block ids; the i-th pairs with the i-th remote id.
    pub ids: Arc<[u32]>,
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
    pub ids: Arc<[u32]>,
    /// Layers.
    pub layers: Range<u32>,
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
    /// Pairs of block sets; a regular list is one.
    pub sets: usize,
    /// Parts of a copy, or stripes over streams.
    pub parts: u32,
    /// The lane.
    pub lane: Lane,
    /// Why this lane and this way.
    pub reason: String,
}

/// How one posting of a prepared operation goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PostOptions {
    /// The transfer fails with `DeadlineExceeded` after this time. Default 30 s.
    pub deadline: Duration,
    /// Delivered to the peer after all bytes are in place. Default none.
    pub notification: Option<Bytes>,
}

impl Default for PostOptions {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(30),
            notification: None,
        }
    }
}

impl PostOptions {
    /// A deadline and no notification.
    #[must_use]
    pub const fn within(deadline: Duration) -> Self {
        Self {
            deadline,
            notification: None,
        }
    }

    /// The same with a notification.
    #[must_use]
    pub fn notify(mut self, payload: impl Into<Bytes>) -> Self {
        self.notification = Some(payload.into());
        self
    }
}

/// How the bytes move.
#[derive(Clone, Debug)]
pub(crate) enum Path {
    /// Both sides are mapped here: copy in parts of this many bytes.
    Copy { part_bytes: u64 },
    /// Through the streams of the connection.
    Stream { stripes: Vec<Stripe> },
}

/// A stretch of one pair of sets, to go over one stream.
#[derive(Clone, Debug)]
pub(crate) struct Stripe {
    pub(crate) stream: usize,
    pub(crate) set: usize,
    pub(crate) range: Range<u64>,
}

/// A pair of validated block sets of one shape.
#[derive(Debug)]
pub(crate) struct SetPair {
    pub(crate) local_region: Arc<Region>,
    pub(crate) local: BlockSet,
    pub(crate) remote_region: Arc<RemoteRegion>,
    pub(crate) remote: BlockSet,
    pub(crate) order: Order,
}

/// What a posted operation does; shared by all postings.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) op: Op,
    pub(crate) sets: Vec<SetPair>,
    /// Logical offset at which each set begins.
    starts: Vec<u64>,
    pub(crate) path: Path,
    pub(crate) parts: u32,
    pub(crate) grant: Option<Arc<Grant>>,
    pub(crate) plan: Plan,
}

impl Work {
    /// Copies part `part`; both sides are mapped.
    pub(crate) fn copy_part(&self, part: u32) {
        let Path::Copy { part_bytes } = self.path else {
            return;
        };
        let range = part_range(self.plan.bytes, part_bytes, u64::from(part));
        let first = self.starts.partition_point(|start| *start <= range.start) - 1;
        for (set, &start) in self.sets[first..].iter().zip(&self.starts[first..]) {
            if start >= range.end {
                break;
            }
            let within =
                range.start.saturating_sub(start)..(range.end - start).min(set.local.bytes());
            let RemoteMemory::Mapped(remote) = &set.remote_region.memory else {
                continue;
            };
            let local = set.local_region.base();
            let remote = remote.base();
            for_each_segment(&set.local, &set.remote, set.order, within, |l, r, bytes| {
                // Offsets lie inside regions, whose lengths are usize.
                let [l, r, bytes] = [l, r, bytes].map(|v| usize::try_from(v).unwrap_or(usize::MAX));
                // SAFETY: the local set is validated against this region, which `set` keeps alive.
                let l = unsafe { local.add(l) };
                // SAFETY: the remote set is validated against this mapping, which `set` keeps.
                let r = unsafe { remote.add(r) };
                let (from, to) = match self.op {
                    Op::Write => (l.cast_const(), r),
                    Op::Read => (r.cast_const(), l),
                };
                // SAFETY: both ranges are inside live mappings; the crate forms no references.
                unsafe { copy_bytes(from, to, bytes) };
            });
        }
    }
}

/// A checked and planned operation; can be posted any number of times, also concurrently.
#[derive(Clone, Debug)]
pub struct Prepared {
    core: Arc<Core>,
    session: Arc<Session>,
    work: Arc<Work>,
}

impl Prepared {
    /// How the operation is going to run.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.work.plan
    }

    /// Starts the operation.
    ///
    /// # Errors
    /// Nothing was started; the error says why.
    pub fn post(&self, options: PostOptions) -> Result<Transfer, PostError> {
        let PostOptions {
            deadline,
            notification,
        } = options;
        post(
            &self.core,
            &self.session,
            Some(&self.work),
            notification,
            deadline,
        )
    }
}

/// Posts an operation or a standalone notification.
pub(crate) fn post(
    core: &Arc<Core>,
    session: &Arc<Session>,
    work: Option<&Arc<Work>>,
    notification: Option<Bytes>,
    deadline: Duration,
) -> Result<Transfer, PostError> {
    if let Some(bytes) = notification.as_ref().map(Bytes::len) {
        let limit = core.config.notification_bytes_max;
        if bytes > limit {
            return Err(PostError::NotificationTooLarge { bytes, limit });
        }
    }
    let grant = work.and_then(|work| work.grant.as_ref());
    if let Some(work) = work
        && let Some(set) = work.sets.iter().find(|set| set.remote_region.released())
    {
        return Err(PostError::RegionReleased {
            region: set.remote_region.id,
        });
    }
    if let Some(grant) = grant
        && !grant.begin()
    {
        return Err(PostError::WindowClosed { window: grant.id });
    }
    let state = TransferState::new(
        core.clone(),
        session.clone(),
        work.cloned(),
        notification,
        deadline,
    );
    if let Err(error) = session.admit(&state) {
        if let Some(grant) = grant {
            grant.end();
        }
        return Err(error);
    }
    let until = Instant::now() + deadline;
    state.set_timer(core.timers.deadline(until, &state));
    if work.is_some() {
        session.backend().start(&state);
    } else {
        state.bytes_quiet();
    }
    Ok(Transfer::new(state))
}

pub(crate) fn prepare_blocks(
    core: &Arc<Core>,
    op: Op,
    local: LocalBlocks<'_>,
    remote: RemoteBlocks<'_>,
) -> Result<Prepared, PrepareError> {
    let session = core
        .session_of(remote.peer)
        .ok_or_else(|| PrepareError::ForeignPeer {
            peer: remote.peer.name().to_owned(),
        })?;
    let questions = Questions::new(core, session);
    let local_region = own(core, local.registration)?;
    let layout = |side, source| PrepareError::Layout { side, source };
    local
        .layout
        .validate(local_region.len as u64)
        .map_err(|e| layout(Side::Local, e))?;
    let remote_region = questions.region(remote.region)?;
    remote
        .layout
        .validate(remote_region.len)
        .map_err(|e| layout(Side::Remote, e))?;
    let local = BlockSet {
        layout: local.layout,
        ids: local.ids,
        layers: local.layers,
    };
    let set = BlockSet {
        layout: remote.layout,
        ids: remote.ids,
        layers: remote.layers,
    };
    let pair = SetPair {
        order: local.best_order(&set),
        local_region,
        local,
        remote_region,
        remote: set,
    };
    finish(
        core,
        session.clone(),
        &questions,
        op,
        vec![pair],
        remote.window,
    )
}

pub(crate) fn prepare_descriptors(
    core: &Arc<Core>,
    op: Op,
    local: &[Descriptor<'_>],
    peer: &Peer,
    remote: &[RemoteDescriptor],
) -> Result<Prepared, PrepareError> {
    let session = core
        .session_of(peer)
        .ok_or_else(|| PrepareError::ForeignPeer {
            peer: peer.name().to_owned(),
        })?;
    if local.len() != remote.len() {
        return Err(PrepareError::Mismatch {
            what: "number of descriptors",
            local: local.len() as u64,
            remote: remote.len() as u64,
        });
    }
    let questions = Questions::new(core, session);
    let mut local_regions: Vec<Arc<Region>> = Vec::new();
    let mut remote_regions: Vec<Arc<RemoteRegion>> = Vec::new();
    let mut pairs = Vec::with_capacity(local.len());
    let window = remote.first().and_then(|first| first.window);
    for (l, r) in local.iter().zip(remote) {
        if r.window != window {
            return Err(PrepareError::Mismatch {
                what: "windows of one operation",
                local: window.map_or(0, |window| window.0),
                remote: r.window.map_or(0, |window| window.0),
            });
        }
        let local_region = match local_regions
            .iter()
            .rposition(|region| Arc::ptr_eq(region, l.registration.region()))
        {
            Some(known) => known,
            None => {
                local_regions.push(own(core, l.registration)?);
                local_regions.len() - 1
            }
        };
        let remote_region = match remote_regions
            .iter()
            .rposition(|region| region.id == r.region)
        {
            Some(known) => known,
            None => {
                remote_regions.push(questions.region(r.region)?);
                remote_regions.len() - 1
            }
        };
        check_range(
            Side::Local,
            l.offset,
            l.bytes,
            local_regions[local_region].len as u64,
        )?;
        check_range(
            Side::Remote,
            r.offset,
            l.bytes,
            remote_regions[remote_region].len,
        )?;
        pairs.push(DescriptorPair {
            local_region,
            local_offset: l.offset,
            remote_region,
            remote_offset: r.offset,
            bytes: l.bytes,
        });
    }
    let sets = compress(&pairs)
        .into_iter()
        .map(|set| SetPair {
            local_region: local_regions[set.local_region].clone(),
            local: set.local,
            remote_region: remote_regions[set.remote_region].clone(),
            remote: set.remote,
            order: Order::BlockMajor,
        })
        .collect();
    finish(core, session.clone(), &questions, op, sets, window)
}

fn check_range(side: Side, offset: u64, bytes: u64, region_bytes: u64) -> Result<(), PrepareError> {
    use crate::plan::LayoutError;
    let end = offset.saturating_add(bytes);
    let source = if bytes == 0 {
        LayoutError::EmptyRange { start: offset, end }
    } else if end > region_bytes {
        LayoutError::OutOfRegion { end, region_bytes }
    } else {
        return Ok(());
    };
    Err(PrepareError::Layout { side, source })
}

fn own(core: &Arc<Core>, registration: &Registration) -> Result<Arc<Region>, PrepareError> {
    if registration.owned_by(Arc::as_ptr(core).cast()) {
        Ok(registration.region().clone())
    } else {
        Err(PrepareError::ForeignRegistration {
            region: registration.id(),
        })
    }
}

/// Questions to the peer while preparing, all before one deadline.
struct Questions<'a> {
    core: &'a Core,
    session: &'a Arc<Session>,
    until: Instant,
}

impl<'a> Questions<'a> {
    fn new(core: &'a Core, session: &'a Arc<Session>) -> Self {
        Self {
            core,
            session,
            until: Instant::now() + core.config.connect_timeout,
        }
    }

    fn region(&self, region: RegionId) -> Result<Arc<RemoteRegion>, PrepareError> {
        let peer = || self.session.peer_name().to_owned();
        self.session
            .region(region, self.until)
            .map_err(|refusal| match refusal {
                Refusal::Unknown => PrepareError::UnknownRegion {
                    peer: peer(),
                    region,
                },
                Refusal::Denied => PrepareError::AccessDenied {
                    peer: peer(),
                    region,
                },
                other => self.trouble(other),
            })
    }

    fn window(&self, window: WindowId) -> Result<Arc<Grant>, PrepareError> {
        let peer = || self.session.peer_name().to_owned();
        self.session
            .grant(window, self.until)
            .map_err(|refusal| match refusal {
                Refusal::Unknown | Refusal::Denied => PrepareError::WindowClosed {
                    peer: peer(),
                    window,
                },
                other => self.trouble(other),
            })
    }

    fn trouble(&self, refusal: Refusal) -> PrepareError {
        match (refusal, self.session.lost()) {
            (_, Some(lost)) => PrepareError::PeerLost(lost),
            _ => PrepareError::TimedOut {
                peer: self.session.peer_name().to_owned(),
                timeout: self.core.config.connect_timeout,
            },
        }
    }
}

/// The checks and the planning that block sets and descriptor lists share.
fn finish(
    core: &Arc<Core>,
    session: Arc<Session>,
    questions: &Questions<'_>,
    op: Op,
    sets: Vec<SetPair>,
    window: Option<WindowId>,
) -> Result<Prepared, PrepareError> {
    if sets.is_empty()
        || sets
            .iter()
            .any(|set| set.local.ids.is_empty() && set.remote.ids.is_empty())
    {
        return Err(PrepareError::Empty);
    }
    let too_large = |what, got: u64, limit: u64| PrepareError::TooLarge { what, got, limit };
    if sets.len() > SETS_MAX {
        return Err(too_large(
            "number of sets",
            sets.len() as u64,
            SETS_MAX as u64,
        ));
    }
    let grant = window.map(|window| questions.window(window)).transpose()?;
    let mut starts = Vec::with_capacity(sets.len());
    let (mut bytes, mut runs, mut pieces) = (0u64, 0, 0);
    for set in &sets {
        check_set(set)?;
        check_window(&session, set, op, grant.as_deref())?;
        starts.push(bytes);
        bytes = bytes.saturating_add(set.local.bytes());
        runs += set.local.runs();
        pieces += segment_count(&set.local, &set.remote, set.order);
    }
    if bytes > i64::MAX.unsigned_abs() {
        return Err(too_large("number of bytes", bytes, i64::MAX.unsigned_abs()));
    }
    check_overlap(op, &sets)?;

    let lane = session.lane().lane;
    let mapped = sets
        .iter()
        .all(|set| matches!(set.remote_region.memory, RemoteMemory::Mapped(_)));
    let (path, parts, reason) = if mapped {
        // 2^30 parts at most, far above what a 48-bit address space needs at the default size.
        let part_bytes = core
            .config
            .copy_part_bytes
            .max((bytes >> 30).next_multiple_of(64));
        let parts = u32::try_from(parts_of(bytes, part_bytes)).unwrap_or(u32::MAX);
        (
            Path::Copy { part_bytes },
            parts,
            format!("{}; copied", session.lane().reason),
        )
    } else {
        let stripes = stripe_sets(&sets, bytes, session.streams());
        let parts = u32::try_from(stripes.len()).unwrap_or(u32::MAX);
        let reason = match sets.iter().find_map(|set| match &set.remote_region.memory {
            RemoteMemory::Streamed(why) => Some(*why),
            RemoteMemory::Mapped(_) => None,
        }) {
            Some(why) => format!("{}; streamed: {why}", session.lane().reason),
            None => session.lane().reason.clone(),
        };
        (Path::Stream { stripes }, parts, reason)
    };
    let plan = Plan {
        op,
        bytes,
        runs,
        pieces,
        sets: sets.len(),
        parts,
        lane,
        reason,
    };
    let work = Arc::new(Work {
        op,
        sets,
        starts,
        path,
        parts,
        grant,
        plan,
    });
    Ok(Prepared {
        core: core.clone(),
        session,
        work,
    })
}

fn check_set(set: &SetPair) -> Result<(), PrepareError> {
    let SetPair { local, remote, .. } = set;
    for (what, l, r) in [
        (
            "number of blocks",
            local.ids.len() as u64,
            remote.ids.len() as u64,
        ),
        ("number of layers", layers(local), layers(remote)),
        (
            "bytes per run",
            local.layout.run_bytes,
            remote.layout.run_bytes,
        ),
    ] {
        if l != r {
            return Err(PrepareError::Mismatch {
                what,
                local: l,
                remote: r,
            });
        }
    }
    let limit = crate::plan::IDS_MAX;
    if local.ids.len() > limit {
        return Err(PrepareError::TooLarge {
            what: "number of blocks",
            got: local.ids.len() as u64,
            limit: limit as u64,
        });
    }
    let layout = |side, source| PrepareError::Layout { side, source };
    local
        .validate(set.local_region.len as u64)
        .map_err(|e| layout(Side::Local, e))?;
    remote
        .validate(set.remote_region.len)
        .map_err(|e| layout(Side::Remote, e))
}

fn layers(set: &BlockSet) -> u64 {
    u64::from(set.layers.end.saturating_sub(set.layers.start))
}

fn check_window(
    session: &Session,
    set: &SetPair,
    op: Op,
    grant: Option<&Grant>,
) -> Result<(), PrepareError> {
    let region = set.remote_region.id;
    match grant {
        None => match set.remote_region.access {
            RemoteAccess::Open => Ok(()),
            RemoteAccess::WindowOnly => {
                let peer = session.peer_name().to_owned();
                Err(PrepareError::WindowRequired { peer, region })
            }
            RemoteAccess::None => {
                let peer = session.peer_name().to_owned();
                Err(PrepareError::AccessDenied { peer, region })
            }
        },
        Some(grant) => {
            let outside = |reason| PrepareError::OutsideWindow {
                window: grant.id,
                reason,
            };
            if grant.spec.region != region {
                return Err(outside(format!("region {region} is not the window's")));
            }
            if !grant.spec.access.allows(op == Op::Write) {
                return Err(outside(format!("it is open for {:?}", grant.spec.access)));
            }
            grant.spec.scope.covers(&set.remote).map_err(outside)
        }
    }
}

/// No destination byte may be named twice, nor be a source byte at another place.
fn check_overlap(op: Op, sets: &[SetPair]) -> Result<(), PrepareError> {
    // One set of a layout without overlap needs its ids to differ, nothing more.
    if let [set] = sets {
        let to = if op == Op::Write {
            &set.remote
        } else {
            &set.local
        };
        let disjoint_layout = to.layout.block_stride >= to.layout.run_bytes;
        if disjoint_layout && !self_copy(set) {
            let mut seen = vec![0u64; (to.layout.blocks as usize).div_ceil(64)];
            for &id in to.ids.iter() {
                let (word, bit) = (id as usize / 64, 1u64 << (id % 64));
                if seen[word] & bit != 0 {
                    let offset = to
                        .layout
                        .run_offset(id, to.layers.start)
                        .unwrap_or_default();
                    return Err(PrepareError::Overlap { offset });
                }
                seen[word] |= bit;
            }
            return Ok(());
        }
    }
    // The general case: sort the pieces of the destination and of the source. A piece is (address
    // space, address, bytes, offset in its region); space 0 is this process.
    let mut to = Vec::new();
    let mut from = Vec::new();
    for set in sets {
        let local = set.local_region.base() as u64;
        let (space, remote) = match &set.remote_region.memory {
            RemoteMemory::Mapped(mapped) => (0, mapped.base() as u64),
            RemoteMemory::Streamed(_) => (set.remote_region.id.0.wrapping_add(1), 0),
        };
        for_each_segment(
            &set.local,
            &set.remote,
            set.order,
            0..set.local.bytes(),
            |l, r, bytes| {
                let l = (0, local.wrapping_add(l), bytes, l);
                let r = (space, remote.wrapping_add(r), bytes, r);
                let (source, destination) = if op == Op::Write { (l, r) } else { (r, l) };
                to.push(destination);
                from.push(source);
            },
        );
    }
    let end = |piece: &(u64, u64, u64, u64)| (piece.0, piece.1.saturating_add(piece.2));
    to.sort_unstable();
    for pair in to.windows(2) {
        if end(&pair[0]) > (pair[1].0, pair[1].1) {
            return Err(PrepareError::Overlap { offset: pair[1].3 });
        }
    }
    from.sort_unstable();
    let mut sources = from.iter().peekable();
    for piece in &to {
        while sources
            .next_if(|source| end(source) <= (piece.0, piece.1))
            .is_some()
        {}
        if sources
            .peek()
            .is_some_and(|source| (source.0, source.1) < end(piece))
        {
            return Err(PrepareError::Overlap { offset: piece.3 });
        }
    }
    Ok(())
}

/// Whether both sides of a set lie in the same memory of this process.
fn self_copy(set: &SetPair) -> bool {
    match &set.remote_region.memory {
        RemoteMemory::Mapped(mapped) => {
            let local = set.local_region.base() as usize;
            let remote = mapped.base() as usize;
            let remote_len = usize::try_from(set.remote_region.len).unwrap_or(usize::MAX);
            local < remote.saturating_add(remote_len)
                && remote < local.saturating_add(set.local_region.len)
        }
        RemoteMemory::Streamed(_) => false,
    }
}

/// Spreads the sets over the streams: one set is striped, several are dealt out by bytes.
fn stripe_sets(sets: &[SetPair], bytes: u64, streams: usize) -> Vec<Stripe> {
    let mut out = Vec::new();
    let per_stream = bytes.div_ceil(streams.max(1) as u64).max(STRIPE_BYTES_MIN);
    let mut filled = 0u64;
    for (index, set) in sets.iter().enumerate() {
        if set.local.bytes() > per_stream {
            for (k, range) in stripes(set.local.bytes(), streams, STRIPE_BYTES_MIN).enumerate() {
                out.push(Stripe {
                    stream: k % streams.max(1),
                    set: index,
                    range,
                });
            }
        } else {
            let stream = usize::try_from(filled / per_stream).unwrap_or(0) % streams.max(1);
            out.push(Stripe {
                stream,
                set: index,
                range: 0..set.local.bytes(),
            });
            filled += set.local.bytes();
        }
    }
    out
}

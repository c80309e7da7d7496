//! Preparing an operation: everything is checked and planned once, posting is cheap.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use super::check::{check_range, check_set, check_window};
use super::overlap::check_overlap;
use super::request::{
    Descriptor, LocalBlocks, Op, Plan, PostOptions, RemoteBlocks, RemoteDescriptor,
};
use super::state::TransferState;
use super::transfer::Transfer;
use super::work::{Path, SetPair, TensorCopy, Work, stripe_sets};
use crate::agent::{Core, NoSession, Peer, RemoteMemory, RemoteRegion, Session};
use crate::backend::Refusal;
use crate::clock::{after, after_instant};
use crate::config::Lane;
use crate::cuda::DeviceWork;
use crate::error::{PostError, PrepareError, Side};
use crate::memory::{Region, RegionId, Registration};
use crate::plan::{
    BlockSet, DescriptorList, DescriptorPair, Order, Table, parts_of, segment_count, turn, turns,
};
use crate::stage::{Far, Staged};
use crate::stats::CostEstimate;
use crate::window::{Grant, WindowId};

/// Most pairs of block sets in one operation.
pub(crate) const SETS_MAX: usize = 1 << 20;

/// A checked and planned operation; can be posted any number of times, also concurrently.
#[derive(Clone, Debug)]
pub struct Prepared {
    core: Arc<Core>,
    session: Arc<Session>,
    work: Arc<Work>,
}

impl Prepared {
    pub(crate) const fn new(core: Arc<Core>, session: Arc<Session>, work: Arc<Work>) -> Self {
        Self {
            core,
            session,
            work,
        }
    }

    /// How the operation is going to run.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.work.plan
    }

    /// How long it is going to take, from post to end, as far as this connection has shown.
    #[must_use]
    pub fn estimate(&self) -> CostEstimate {
        let plan = &self.work.plan;
        self.session
            .meter()
            .estimate(plan.op, plan.bytes, plan.lane)
    }

    /// Starts the operation.
    ///
    /// # Errors
    /// Nothing was started; the error says why.
    pub fn post(&self, options: PostOptions) -> Result<Transfer, PostError> {
        post(&self.core, &self.session, Some(&self.work), options)
    }
}

/// Posts an operation or a standalone notification.
pub(crate) fn post(
    core: &Arc<Core>,
    session: &Arc<Session>,
    work: Option<&Arc<Work>>,
    options: PostOptions,
) -> Result<Transfer, PostError> {
    if let Some(bytes) = options.notification.as_ref().map(Bytes::len) {
        let limit = core.config.notification_bytes_max;
        if bytes > limit {
            return Err(PostError::NotificationTooLarge { bytes, limit });
        }
    }
    let on_device = work.is_some_and(|work| work.device().is_some() || work.staged().is_some());
    let device_option = match (&options.after, &options.sms) {
        (Some(_), _) => Some("an event"),
        (None, Some(_)) => Some("a budget of multiprocessors"),
        (None, None) => None,
    };
    if let Some(option) = device_option.filter(|_| !on_device) {
        let lane = work.map_or_else(|| session.lane().lane, |work| work.plan.lane);
        return Err(PostError::NotOnDevice { option, lane });
    }
    if let Some((queue, _)) = &options.completion
        && !queue.reserve()
    {
        let limit = queue.capacity();
        return Err(PostError::CompletionQueueFull { limit });
    }
    let queue = options.completion.as_ref().map(|(queue, _)| queue.clone());
    let refuse = |error| {
        if let Some(queue) = &queue {
            queue.release();
        }
        Err(error)
    };
    if let Some(work) = work
        && let Err(error) = work.begin_use()
    {
        // With the connection go its windows: the loss is the reason, and can be mended.
        return refuse(session.lost().map_or(error, PostError::PeerLost));
    }
    let posted = Instant::now();
    let until = after_instant(posted, options.deadline);
    let state = TransferState::new(
        core.clone(),
        session.clone(),
        work.cloned(),
        posted,
        options,
    );
    if let Err(error) = session.admit(&state) {
        if let Some(work) = work {
            work.end_use();
        }
        return refuse(error);
    }
    if work.is_some() {
        state.start();
    } else {
        state.bytes_quiet();
    }
    state.set_deadline(until);
    Ok(Transfer::new(state))
}

pub(crate) fn prepare_blocks(
    core: &Arc<Core>,
    op: Op,
    local: LocalBlocks<'_>,
    remote: RemoteBlocks<'_>,
) -> Result<Prepared, PrepareError> {
    let session = session_of(core, remote.peer)?;
    let questions = Questions::new(core, &session);
    let set = BlockSet::new(remote.layout, remote.ids, remote.layers);
    let region = || questions.region(remote.region);
    let pair = pair_blocks(core, local, region, set)?;
    finish(
        core,
        session.clone(),
        &questions,
        op,
        vec![pair],
        remote.window,
    )
}

/// Several pairs of block sets of one peer as one operation.
pub(crate) fn prepare_sets<'a>(
    core: &Arc<Core>,
    op: Op,
    sets: impl IntoIterator<Item = (LocalBlocks<'a>, RemoteBlocks<'a>)>,
) -> Result<Prepared, PrepareError> {
    let mut sets = sets.into_iter();
    let Some(first) = sets.next() else {
        return Err(PrepareError::Empty);
    };
    let (peer, window) = (first.1.peer, first.1.window);
    let session = session_of(core, peer)?;
    let questions = Questions::new(core, &session);
    let rest = sets.size_hint().0;
    let mut pairs = Vec::with_capacity(rest.saturating_add(1).min(SETS_MAX));
    for (local, remote) in std::iter::once(first).chain(sets) {
        let other = !std::ptr::eq(remote.peer, peer)
            && !Arc::ptr_eq(&session_of(core, remote.peer)?, &session);
        for (differ, what, here, there) in [
            (
                other,
                "peers of one operation",
                peer.epoch(),
                remote.peer.epoch(),
            ),
            (
                remote.window != window,
                "windows of one operation",
                window.map_or(0, |window| window.0),
                remote.window.map_or(0, |window| window.0),
            ),
        ] {
            if differ {
                return Err(PrepareError::Mismatch {
                    what,
                    local: here,
                    remote: there,
                });
            }
        }
        let set = BlockSet::new(remote.layout, remote.ids, remote.layers);
        let region = || questions.region(remote.region);
        pairs.push(pair_blocks(core, local, region, set)?);
    }
    finish(core, session.clone(), &questions, op, pairs, window)
}

/// Blocks of this agent and blocks elsewhere, both of layouts that fit where they lie. The remote
/// region is looked up after the local side was found good.
pub(crate) fn pair_blocks(
    core: &Arc<Core>,
    local: LocalBlocks<'_>,
    remote_region: impl FnOnce() -> Result<Arc<RemoteRegion>, PrepareError>,
    remote: BlockSet,
) -> Result<SetPair, PrepareError> {
    let layout = |side, source| PrepareError::Layout { side, source };
    let local_region = own(core, local.registration)?;
    let local = BlockSet::new(local.layout, local.ids, local.layers);
    local
        .layout
        .validate(local_region.len as u64)
        .map_err(|e| layout(Side::Local, e))?;
    let remote_region = remote_region()?;
    remote
        .layout
        .validate(remote_region.len)
        .map_err(|e| layout(Side::Remote, e))?;
    Ok(SetPair {
        order: local.best_order(&remote),
        local_region,
        local,
        remote_region,
        remote,
    })
}

pub(crate) fn prepare_descriptors(
    core: &Arc<Core>,
    op: Op,
    local: &[Descriptor<'_>],
    peer: &Peer,
    remote: &[RemoteDescriptor],
) -> Result<Prepared, PrepareError> {
    let session = session_of(core, peer)?;
    if local.len() != remote.len() {
        return Err(PrepareError::Mismatch {
            what: "number of descriptors",
            local: local.len() as u64,
            remote: remote.len() as u64,
        });
    }
    let questions = Questions::new(core, &session);
    let mut local_regions: Vec<Arc<Region>> = Vec::new();
    let mut remote_regions: Vec<Arc<RemoteRegion>> = Vec::new();
    let (mut known_local, mut known_remote) = (Table::with_capacity(64), Table::with_capacity(64));
    let mut pairs = DescriptorList::with_capacity(local.len());
    let window = remote.first().and_then(|first| first.window);
    for (l, r) in local.iter().zip(remote) {
        if r.window != window {
            return Err(PrepareError::Mismatch {
                what: "windows of one operation",
                local: window.map_or(0, |window| window.0),
                remote: r.window.map_or(0, |window| window.0),
            });
        }
        let registration = l.registration.region();
        let local_region = known_local.number_of([Arc::as_ptr(registration) as u64]);
        if local_region == local_regions.len() {
            local_regions.push(own(core, l.registration)?);
        }
        let remote_region = known_remote.number_of([r.region.0]);
        if remote_region == remote_regions.len() {
            remote_regions.push(questions.region(r.region)?);
        }
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
    let sets = pairs.compress(|set| SetPair {
        local_region: local_regions[set.local_region].clone(),
        local: set.local,
        remote_region: remote_regions[set.remote_region].clone(),
        remote: set.remote,
        order: Order::BlockMajor,
    });
    finish(core, session.clone(), &questions, op, sets, window)
}

pub(super) fn session_of(core: &Arc<Core>, peer: &Peer) -> Result<Arc<Session>, PrepareError> {
    core.session_of(peer).map_err(|trouble| match trouble {
        NoSession::Foreign(peer) => PrepareError::ForeignPeer { peer },
        NoSession::Connect(error) => PrepareError::Connect(error),
    })
}

pub(crate) fn own(
    core: &Arc<Core>,
    registration: &Registration,
) -> Result<Arc<Region>, PrepareError> {
    if registration.owned_by(Arc::as_ptr(core).cast()) {
        Ok(registration.region().clone())
    } else {
        Err(PrepareError::ForeignRegistration {
            region: registration.id(),
        })
    }
}

/// Questions to the peer while preparing, all before one deadline.
pub(super) struct Questions<'a> {
    core: &'a Core,
    session: &'a Arc<Session>,
    until: Instant,
}

impl<'a> Questions<'a> {
    pub(super) fn new(core: &'a Core, session: &'a Arc<Session>) -> Self {
        Self {
            core,
            session,
            until: after(core.config.connect_timeout),
        }
    }

    pub(super) fn region(&self, region: RegionId) -> Result<Arc<RemoteRegion>, PrepareError> {
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

    pub(super) fn window(&self, window: WindowId) -> Result<Arc<Grant>, PrepareError> {
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
pub(super) fn finish(
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
    if sets.len() > SETS_MAX {
        return Err(PrepareError::TooLarge {
            what: "number of sets",
            got: sets.len() as u64,
            limit: SETS_MAX as u64,
        });
    }
    let grant = window.map(|window| questions.window(window)).transpose()?;
    let mut checked = Checked {
        starts: Vec::with_capacity(sets.len()),
        grant,
        ..Checked::default()
    };
    for set in &sets {
        check_set(set)?;
        let grant = checked.grant.as_deref();
        check_window(&session, &set.remote_region, op, grant, |scope| {
            scope.covers(&set.remote)
        })?;
        checked.starts.push(checked.bytes);
        checked.bytes = checked.bytes.saturating_add(set.local.bytes());
        checked.runs += set.local.runs();
        checked.pieces += segment_count(&set.local, &set.remote, set.order);
    }
    check_bytes(checked.bytes)?;
    check_overlap(op, &sets)?;
    checked.sets = sets;
    checked.plan(core, session, op)
}

pub(super) fn check_bytes(bytes: u64) -> Result<(), PrepareError> {
    let limit = i64::MAX.unsigned_abs();
    if bytes > limit {
        return Err(PrepareError::TooLarge {
            what: "number of bytes",
            got: bytes,
            limit,
        });
    }
    Ok(())
}

/// An operation that may run.
#[derive(Debug, Default)]
pub(super) struct Checked {
    /// Pairs of block sets, or `tensors`.
    pub(super) sets: Vec<SetPair>,
    /// Copies that rearrange; none of their memory is streamed.
    pub(super) tensors: Vec<TensorCopy>,
    /// Logical offset at which each of them begins.
    pub(super) starts: Vec<u64>,
    pub(super) bytes: u64,
    pub(super) runs: u64,
    pub(super) pieces: u64,
    pub(super) grant: Option<Arc<Grant>>,
    /// How the bytes are rearranged.
    pub(super) rearranged: Option<String>,
}

impl Checked {
    /// Writes inner loops out, one pair of sets for each of their turns: streams walk them, devices do
    /// not.
    fn unroll(&mut self) -> Result<(), PrepareError> {
        if self.sets.iter().all(|set| set.local.inner.is_empty()) {
            return Ok(());
        }
        let counts = self.sets.iter().map(|set| turns(&set.local));
        let got = counts.fold(0, u64::saturating_add);
        let limit = SETS_MAX as u64;
        if got > limit {
            return Err(PrepareError::TooLarge {
                what: "number of block sets that the rearrangement comes to in staging memory",
                got,
                limit,
            });
        }
        let mut sets = Vec::new();
        for set in &self.sets {
            sets.extend((0..turns(&set.local)).map(|index| SetPair {
                local_region: set.local_region.clone(),
                local: turn(&set.local, index),
                remote_region: set.remote_region.clone(),
                remote: turn(&set.remote, index),
                order: set.order,
            }));
        }
        let mut end = 0;
        let begin = |set: &SetPair| {
            let start = end;
            end += set.local.bytes();
            start
        };
        self.starts = sets.iter().map(begin).collect();
        self.sets = sets;
        Ok(())
    }

    /// Chooses how the bytes move.
    pub(super) fn plan(
        mut self,
        core: &Arc<Core>,
        session: Arc<Session>,
        op: Op,
    ) -> Result<Prepared, PrepareError> {
        let near = core.stage.takes(&self.sets)?;
        if near {
            self.unroll()?;
        }
        let Self { sets, tensors, .. } = &self;
        let ends = || {
            let tensors = tensors.iter().map(TensorCopy::ends);
            tensors.chain(sets.iter().map(SetPair::ends))
        };
        let memories = || ends().map(|(_, remote)| &remote.memory);
        for (_, remote) in ends() {
            if let RemoteMemory::Unreachable(why) = &remote.memory {
                return Err(PrepareError::Unreachable {
                    region: remote.id,
                    reason: why.as_ref().to_owned(),
                });
            }
        }
        let beyond = memories().find_map(|memory| match memory {
            RemoteMemory::Streamed(why) => Some((true, why.as_ref())),
            RemoteMemory::Foreign(_) => Some((
                false,
                "the other side is memory of another process that is not an arena",
            )),
            RemoteMemory::Mapped(_)
            | RemoteMemory::Device(_)
            | RemoteMemory::Rdma(_)
            | RemoteMemory::Stored
            | RemoteMemory::Unreachable(_) => None,
        });
        let by_rdma = ends().find_map(|(local, remote)| {
            matches!(remote.memory, RemoteMemory::Rdma(_)).then_some((local, remote))
        });
        if by_rdma.is_some()
            && let Some((local, remote)) = ends().find(|(local, remote)| {
                local.rdma().is_none() || !matches!(remote.memory, RemoteMemory::Rdma(_))
            })
        {
            let reason = format!(
                "region {} of this agent is not registered for RDMA, which takes host memory only",
                local.id
            );
            return Err(PrepareError::Unreachable {
                region: remote.id,
                reason,
            });
        }
        let by_peer = memories().any(|memory| matches!(memory, RemoteMemory::Device(_)));
        let staged = beyond.filter(|_| near && !by_peer);
        let on_device = ends().any(|(local, remote)| {
            local.device().is_some() || matches!(remote.memory, RemoteMemory::Device(_))
        });
        let mut lane = session.lane().lane;
        let mut reason = session.lane().reason.clone();
        let (path, parts) = if let Some((streamed, why)) = staged {
            let why = format!("no device reaches the other side ({why})");
            let staged = Staged {
                op,
                sets,
                starts: &self.starts,
                bytes: self.bytes,
                why: &why,
            };
            let (work, how) = core.stage.plan(core, &staged, Far::Peer { streamed })?;
            reason.push_str("; ");
            reason.push_str(&how);
            let parts = work.parts();
            (Path::Staged(Arc::new(work)), parts)
        } else if by_rdma.is_some() {
            // 2^30 parts at most.
            let least = (self.bytes >> 30).next_multiple_of(64);
            let part_bytes = core.config.rdma.part_bytes.max(least);
            let parts = u32::try_from(parts_of(self.bytes, part_bytes)).unwrap_or(u32::MAX);
            (Path::Rdma { part_bytes }, parts)
        } else if on_device {
            let (work, how) = DeviceWork::prepare(core, op, sets, tensors)?;
            lane = Lane::Cuda;
            reason.push_str("; ");
            reason.push_str(&how);
            let parts = work.parts();
            (Path::Device(Arc::new(work)), parts)
        } else {
            match beyond {
                Some((true, why)) => {
                    reason.push_str("; streamed: ");
                    reason.push_str(why);
                }
                Some((false, _)) => reason.push_str("; copied by the kernel (process_vm)"),
                None => reason.push_str("; copied"),
            }
            let unit = tensors.first().map(|copy| copy.pair.run_bytes);
            let streamed = matches!(beyond, Some((true, _)));
            by_host(core, &session, sets, streamed, self.bytes, unit)
        };
        if let Some(how) = &self.rearranged {
            reason.push_str("; ");
            reason.push_str(how);
        }
        let plan = Plan {
            op,
            bytes: self.bytes,
            runs: self.runs,
            pieces: self.pieces,
            sets: sets.len() + tensors.len(),
            parts,
            lane,
            reason,
        };
        let work = Arc::new(Work {
            op,
            sets: self.sets,
            tensors: self.tensors,
            starts: self.starts,
            path,
            parts,
            grant: self.grant,
            plan,
        });
        Ok(Prepared::new(core.clone(), session, work))
    }
}

/// The path of bytes that no device moves, and its parts; copies are cut between units.
fn by_host(
    core: &Core,
    session: &Session,
    sets: &[SetPair],
    streamed: bool,
    bytes: u64,
    unit: Option<u64>,
) -> (Path, u32) {
    if streamed {
        let stripes = stripe_sets(sets, bytes, session.streams());
        let parts = u32::try_from(stripes.len()).unwrap_or(u32::MAX);
        return (Path::Stream { stripes }, parts);
    }
    // 2^30 parts at most, far above what a 48-bit address space needs at the default size.
    let least = (bytes >> 30).next_multiple_of(64);
    let mut part_bytes = core.config.copy_part_bytes.max(least);
    if let Some(unit) = unit.filter(|&unit| unit < part_bytes) {
        part_bytes = part_bytes.next_multiple_of(unit);
    }
    let parts = u32::try_from(parts_of(bytes, part_bytes)).unwrap_or(u32::MAX);
    (Path::Copy { part_bytes }, parts)
}

/// The path of a part of a checked operation, between host memory and a peer.
pub(crate) fn route(
    core: &Core,
    session: &Session,
    sets: &[SetPair],
    streamed: bool,
) -> (Path, u32) {
    let bytes = sets.iter().map(|set| set.local.bytes()).sum();
    by_host(core, session, sets, streamed, bytes, None)
}

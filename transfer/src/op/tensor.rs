//! Preparing copies that rearrange KV blocks.

use std::sync::Arc;

use super::check::check_window;
use super::overlap::check_tensor_overlap;
use super::prepare::{Checked, Prepared, Questions, check_bytes, finish, own, session_of};
use super::request::{LocalTensor, Op, RemoteTensor};
use super::work::{SetPair, TensorCopy};
use crate::agent::{Core, RemoteMemory, RemoteRegion, Session};
use crate::error::{PrepareError, Side};
use crate::memory::Region;
use crate::plan::{IDS_MAX, KvAxis, LayoutError, TensorPair, TensorSet};
use crate::window::WindowId;

pub(crate) fn prepare_tensors(
    core: &Arc<Core>,
    op: Op,
    local: LocalTensor<'_>,
    remote: RemoteTensor<'_>,
) -> Result<Prepared, PrepareError> {
    let session = session_of(core, remote.peer)?;
    let questions = Questions::new(core, &session);
    let of = |side| move |source: LayoutError| PrepareError::Layout { side, source };
    let local_region = own(core, local.registration)?;
    local
        .layout
        .validate(local_region.len as u64)
        .map_err(of(Side::Local))?;
    let here = local
        .layout
        .select(&local.slice, local.ids)
        .map_err(of(Side::Local))?;
    let remote_region = questions.region(remote.region)?;
    remote
        .layout
        .validate(remote_region.len)
        .map_err(of(Side::Remote))?;
    let there = remote
        .layout
        .select(&remote.slice, remote.ids)
        .map_err(of(Side::Remote))?;
    let whole_tokens =
        here.tokens() == local.layout.tokens.count && there.tokens() == remote.layout.tokens.count;
    check_shapes(&here, &there, whole_tokens)?;
    let sides = Sides {
        op,
        local_region,
        here,
        remote_region,
        there,
    };
    let pairs = sides.pairs();
    if pairs.iter().all(TensorPair::is_plain) {
        return sides.finish_plain(core, session.clone(), &questions, &pairs, remote.window);
    }
    sides.finish(core, session.clone(), &questions, pairs, remote.window)
}

/// Whether both sides name equally many of everything, or blocks of a multiple of the tokens.
fn check_shapes(
    here: &TensorSet,
    there: &TensorSet,
    whole_tokens: bool,
) -> Result<(), PrepareError> {
    let mismatch = |what, local, remote| PrepareError::Mismatch {
        what,
        local,
        remote,
    };
    if here.run_bytes != there.run_bytes {
        return Err(mismatch("bytes per head", here.run_bytes, there.run_bytes));
    }
    let grouped = whole_tokens && groups(here, there).is_some();
    for ((axis, l), (_, r)) in here.named().zip(there.named()) {
        if l.count != r.count && !(axis == KvAxis::Tokens && grouped) {
            let what = match axis {
                KvAxis::Blocks => "number of blocks",
                KvAxis::Layers => "number of layers",
                KvAxis::Planes => "number of planes",
                KvAxis::Tokens => "number of tokens per block",
                KvAxis::Heads => "number of heads",
            };
            return Err(mismatch(what, l.count.into(), r.count.into()));
        }
    }
    let (l, r) = (here.ids.len(), there.ids.len());
    if l == 0 && r == 0 {
        return Err(PrepareError::Empty);
    }
    // As many blocks of the coarser side as the finer side fills.
    let fits = match (groups(here, there), here.tokens() < there.tokens()) {
        (Some(of), true) => l.div_ceil(of) == r,
        (Some(of), false) => r.div_ceil(of) == l,
        (None, _) => l == r,
    };
    if !fits {
        return Err(mismatch("number of blocks", l as u64, r as u64));
    }
    if l.max(r) > IDS_MAX {
        return Err(PrepareError::TooLarge {
            what: "number of blocks",
            got: l.max(r) as u64,
            limit: IDS_MAX as u64,
        });
    }
    Ok(())
}

/// How many blocks of the finer side fill one of the coarser side.
fn groups(here: &TensorSet, there: &TensorSet) -> Option<usize> {
    let (fine, coarse) = match (here.tokens(), there.tokens()) {
        (l, r) if l <= r => (l, r),
        (l, r) => (r, l),
    };
    coarse
        .is_multiple_of(fine)
        .then(|| usize::try_from(coarse / fine).ok())
        .flatten()
}

/// Both sides of an operation, each good for itself.
struct Sides {
    op: Op,
    local_region: Arc<Region>,
    here: TensorSet,
    remote_region: Arc<RemoteRegion>,
    there: TensorSet,
}

impl Sides {
    /// The copies: one, or one for each place in a coarser block where a finer one goes.
    fn pairs(&self) -> Vec<TensorPair> {
        let (from, to) = match self.op {
            Op::Write => (&self.here, &self.there),
            Op::Read => (&self.there, &self.here),
        };
        let fine = from.tokens().min(to.tokens());
        let of = groups(from, to).unwrap_or(1);
        if of == 1 {
            return vec![TensorPair::new(from, to)];
        }
        // The last coarse block may have no fine one for its last places.
        let part = |set: &TensorSet, place: usize, blocks: usize| {
            if set.tokens() == fine {
                set.clone().every(of, place)
            } else {
                let first = u32::try_from(place).unwrap_or(u32::MAX) * fine;
                set.clone().first(blocks).with_tokens(first, fine)
            }
        };
        let fine_blocks = from.ids.len().max(to.ids.len());
        (0..of.min(fine_blocks))
            .map(|place| {
                let blocks = (fine_blocks - place).div_ceil(of);
                TensorPair::new(&part(from, place, blocks), &part(to, place, blocks))
            })
            .collect()
    }

    /// Nothing is rearranged that block sets do not say: the ways of `prepare`.
    fn finish_plain(
        &self,
        core: &Arc<Core>,
        session: Arc<Session>,
        questions: &Questions<'_>,
        pairs: &[TensorPair],
        window: Option<WindowId>,
    ) -> Result<Prepared, PrepareError> {
        let mut sets: Vec<_> = pairs.iter().map(|pair| self.sets(pair)).collect();
        for set in &mut sets {
            set.order = set.local.best_order(&set.remote);
        }
        finish(core, session, questions, self.op, sets, window)
    }

    fn finish(
        &self,
        core: &Arc<Core>,
        session: Arc<Session>,
        questions: &Questions<'_>,
        pairs: Vec<TensorPair>,
        window: Option<WindowId>,
    ) -> Result<Prepared, PrepareError> {
        let grant = window.map(|window| questions.window(window)).transpose()?;
        let region = &self.remote_region;
        check_window(&session, region, self.op, grant.as_deref(), |scope| {
            scope.covers_parts(&self.there)
        })?;
        check_tensor_overlap(
            self.op,
            (&self.local_region, &self.here),
            (region, &self.there),
        )?;
        let sum = |of: fn(&TensorPair) -> u64| pairs.iter().map(of).fold(0, u64::saturating_add);
        let bytes = sum(TensorPair::bytes);
        check_bytes(bytes)?;
        let run_bytes = pairs.first().map_or(0, |pair| pair.run_bytes);
        let mut checked = Checked {
            bytes,
            runs: bytes / self.here.run_bytes,
            pieces: sum(TensorPair::runs),
            grant,
            rearranged: Some(format!("rearranged in pieces of {run_bytes} bytes")),
            ..Checked::default()
        };
        let mut end = 0;
        for pair in &pairs {
            checked.starts.push(end);
            end += pair.bytes();
        }
        let by_sets = match region.memory {
            RemoteMemory::Streamed(_) => true,
            RemoteMemory::Foreign(_) => core.stage.is_near(&self.local_region),
            RemoteMemory::Mapped(_)
            | RemoteMemory::Device(_)
            | RemoteMemory::Rdma(_)
            | RemoteMemory::Stored
            | RemoteMemory::Unreachable(_) => false,
        };
        if by_sets {
            checked.sets = pairs.iter().map(|pair| self.sets(pair)).collect();
        } else {
            let copy = |pair| TensorCopy {
                local_region: self.local_region.clone(),
                remote_region: region.clone(),
                pair,
            };
            checked.tensors = pairs.into_iter().map(copy).collect();
        }
        checked.plan(core, session, self.op)
    }

    /// The copy as block sets, which is what streams carry.
    fn sets(&self, pair: &TensorPair) -> SetPair {
        let (from, to, order) = pair.sets();
        let (local, remote) = match self.op {
            Op::Write => (from, to),
            Op::Read => (to, from),
        };
        SetPair {
            local_region: self.local_region.clone(),
            local,
            remote_region: self.remote_region.clone(),
            remote,
            order,
        }
    }
}

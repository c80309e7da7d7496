//! The checks and sums that operations on files and on objects share.

use crate::config::Lane;
use crate::error::PrepareError;
use crate::op::{Op, Path, Plan, SETS_MAX, SetPair, Work, check_overlap, check_set};
use crate::plan::segment_count;

/// What an operation comes to.
#[derive(Debug, Default)]
pub(super) struct Measured {
    /// Logical offset at which each set begins.
    pub(super) starts: Vec<u64>,
    pub(super) bytes: u64,
    pub(super) runs: u64,
    /// Pieces that are contiguous on both sides.
    pub(super) pieces: u64,
}

impl Measured {
    /// The operation on `sets` that takes `path` in so many parts.
    pub(super) fn work(
        self,
        op: Op,
        sets: Vec<SetPair>,
        lane: Lane,
        (path, parts): (Path, u32),
        reason: String,
    ) -> Work {
        let plan = Plan {
            op,
            bytes: self.bytes,
            runs: self.runs,
            pieces: self.pieces,
            sets: sets.len(),
            parts,
            lane,
            reason,
        };
        Work {
            op,
            sets,
            tensors: Vec::new(),
            starts: self.starts,
            path,
            parts,
            grant: None,
            plan,
        }
    }
}

pub(super) fn measure(op: Op, sets: &[SetPair]) -> Result<Measured, PrepareError> {
    let nothing = |set: &SetPair| set.local.ids.is_empty() && set.remote.ids.is_empty();
    if sets.is_empty() || sets.iter().any(nothing) {
        return Err(PrepareError::Empty);
    }
    let too_large = |what, got: u64, limit: u64| PrepareError::TooLarge { what, got, limit };
    let limit = SETS_MAX as u64;
    if sets.len() as u64 > limit {
        return Err(too_large("number of sets", sets.len() as u64, limit));
    }
    let mut measured = Measured {
        starts: Vec::with_capacity(sets.len()),
        ..Measured::default()
    };
    for set in sets {
        check_set(set)?;
        measured.starts.push(measured.bytes);
        measured.bytes = measured.bytes.saturating_add(set.local.bytes());
        measured.runs += set.local.runs();
        measured.pieces += segment_count(&set.local, &set.remote, set.order);
    }
    let limit = i64::MAX.unsigned_abs();
    if measured.bytes > limit {
        return Err(too_large("number of bytes", measured.bytes, limit));
    }
    check_overlap(op, sets)?;
    Ok(measured)
}

//! Prepared descriptor lists: resolved once to regions, kept as the regular runs that they are made
//! of, and paired by indices without writing a descriptor out.
//!
//! The list of an engine's KV cache is one descriptor for each block of each layer: a few runs of
//! equally long descriptors at equal distances. A run is one [`BlockLayout`], an index into it a block
//! id. Lists without such runs are kept descriptor by descriptor.

use std::collections::HashMap;

use super::error::Fault;
use super::input::Row;
use super::kinds::Memory;
use super::rows::{Strided, written_out};
use super::table::Table;

/// Descriptors at equal distances in one section.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    /// Index of the first one in the list.
    pub(super) first: u32,
    pub(super) count: u32,
    /// Number of the section in the list's own table of targets.
    pub(super) target: u32,
    /// Of the first one in its section.
    pub(super) offset: u64,
    /// From one to the next; at least `bytes`.
    pub(super) step: u64,
    pub(super) bytes: u64,
}

/// One descriptor, resolved.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) target: u32,
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

#[derive(Debug)]
enum Shape {
    Runs(Vec<Run>),
    Pieces(Vec<Piece>),
}

/// A resolved list. `T` names sections in the layer below.
#[derive(Debug)]
pub(super) struct List<T> {
    shape: Shape,
    len: u32,
    pub(super) targets: Vec<T>,
}

/// Runs that are shorter than this on average are kept as pieces.
const RUN_MIN: usize = 4;

impl<T: Clone> List<T> {
    /// Resolves descriptors.
    pub(super) fn of_rows(
        memory: Memory,
        rows: &[Row],
        table: &Table<T>,
        owner: &str,
    ) -> Result<Self, Fault> {
        let mut builder = Builder::new(memory, table, owner);
        let mut rest = rows;
        while let Some((row, behind)) = rest.split_first() {
            builder.push(*row)?;
            let more = builder.extend(behind)?;
            rest = &behind[more..];
        }
        builder.finish()
    }

    /// Resolves what rows come to. A run need not lie in one region as a whole, only each row of it.
    pub(super) fn of_runs(
        memory: Memory,
        runs: &[Strided],
        table: &Table<T>,
        owner: &str,
    ) -> Result<Self, Fault> {
        let mut builder = Builder::new(memory, table, owner);
        for run in runs {
            let [address, bytes, device, stride, count] = *run;
            let sweep = stride
                .checked_mul(count.saturating_sub(1))
                .and_then(|sweep| sweep.checked_add(bytes));
            if sweep.is_some_and(|sweep| table.find(memory, device, address, sweep).is_some()) {
                builder.push_run(*run)?;
            } else {
                for row in written_out(run) {
                    builder.push(row)?;
                }
            }
        }
        builder.finish()
    }

    /// Resolves rows of (address, length, device, stride, count).
    pub(super) fn of_strided(
        memory: Memory,
        rows: &[Strided],
        table: &Table<T>,
        owner: &str,
    ) -> Result<Self, Fault> {
        let mut builder = Builder::new(memory, table, owner);
        for row in rows {
            builder.push_run(*row)?;
        }
        builder.finish()
    }
}

impl<T> List<T> {
    /// The same list with other names of its sections.
    pub(super) fn map<U>(self, rename: impl FnMut(T) -> U) -> List<U> {
        List {
            shape: self.shape,
            len: self.len,
            targets: self.targets.into_iter().map(rename).collect(),
        }
    }

    pub(super) const fn len(&self) -> usize {
        self.len as usize
    }

    /// How many runs it is kept as; none when it is kept descriptor by descriptor.
    pub(super) const fn runs(&self) -> Option<usize> {
        match &self.shape {
            Shape::Runs(runs) => Some(runs.len()),
            Shape::Pieces(_) => None,
        }
    }

    fn piece(&self, index: u32) -> Piece {
        match &self.shape {
            Shape::Pieces(pieces) => pieces[index as usize],
            Shape::Runs(runs) => {
                let run = runs[run_of(runs, index, 0)];
                Piece {
                    target: run.target,
                    offset: run.offset + u64::from(index - run.first) * run.step,
                    bytes: run.bytes,
                }
            }
        }
    }
}

/// Finds the runs of a list while it is resolved.
struct Builder<'a, T> {
    memory: Memory,
    table: &'a Table<T>,
    owner: &'a str,
    runs: Vec<Run>,
    len: u32,
    targets: Vec<T>,
    /// Number of each section of the table among the targets.
    known: HashMap<usize, u32>,
    /// Section and target of the last descriptor.
    last: Option<(usize, u32)>,
}

impl<'a, T: Clone> Builder<'a, T> {
    fn new(memory: Memory, table: &'a Table<T>, owner: &'a str) -> Self {
        Self {
            memory,
            table,
            owner,
            runs: Vec::new(),
            len: 0,
            targets: Vec::new(),
            known: HashMap::new(),
            last: None,
        }
    }

    /// The target of a range, and where that begins.
    fn resolve(&mut self, [address, bytes, device]: Row) -> Result<(u32, u64), Fault> {
        if let Some((at, target)) = self.last {
            let section = &self.table.sections()[at];
            if section.holds(self.memory, device, address, bytes) {
                return Ok((target, section.start));
            }
        }
        if bytes == 0 {
            let at = self.len;
            return Err(Fault::Invalid(format!("descriptor {at} has no bytes")));
        }
        let Some(at) = self.table.find(self.memory, device, address, bytes) else {
            return Err(Fault::NotFound(format!(
                "descriptor {}: {bytes} bytes at {address:#x} of {} device {device} are in no memory \
                 that {} has registered{}",
                self.len,
                self.memory.label(),
                self.owner,
                if self.owner == "this agent" {
                    ""
                } else {
                    " and told by its metadata"
                },
            )));
        };
        let target = *self.known.entry(at).or_insert_with(|| {
            self.targets.push(self.table.sections()[at].target.clone());
            u32::try_from(self.targets.len() - 1).unwrap_or(u32::MAX)
        });
        self.last = Some((at, target));
        Ok((target, self.table.sections()[at].start))
    }

    fn count(&mut self, more: u64) -> Result<u32, Fault> {
        let first = self.len;
        let len = u64::from(self.len).saturating_add(more);
        // Indices are 32 bits with a sign.
        self.len = u32::try_from(len)
            .ok()
            .filter(|&len| len < i32::MAX.cast_unsigned())
            .ok_or_else(|| {
                Fault::Invalid(format!("{len} descriptors; accepted: up to 2^31 - 2"))
            })?;
        Ok(first)
    }

    fn push(&mut self, row: Row) -> Result<(), Fault> {
        let (target, start) = self.resolve(row)?;
        let offset = row[0] - start;
        let bytes = row[1];
        if bytes == 0 {
            let at = self.len;
            return Err(Fault::Invalid(format!("descriptor {at} has no bytes")));
        }
        let first = self.count(1)?;
        if let Some(run) = self.runs.last_mut()
            && run.target == target
            && run.bytes == bytes
        {
            if run.count == 1 && offset >= run.offset.saturating_add(bytes) {
                run.step = offset - run.offset;
                run.count = 2;
                return Ok(());
            }
            if run.count > 1 && Some(offset) == next(run) {
                run.count += 1;
                return Ok(());
            }
        }
        self.runs.push(Run {
            first,
            count: 1,
            target,
            offset,
            step: bytes,
            bytes,
        });
        Ok(())
    }

    /// Takes as many rows as go on with the last run, and says how many: one comparison each.
    fn extend(&mut self, rows: &[Row]) -> Result<usize, Fault> {
        let (Some((at, target)), Some(run)) = (self.last, self.runs.last()) else {
            return Ok(0);
        };
        let section = &self.table.sections()[at];
        if run.count < 2 || run.target != target {
            return Ok(0);
        }
        let Some(offset) = next(run) else {
            return Ok(0);
        };
        let (bytes, step) = (run.bytes, run.step);
        // Those that lie in the section as a whole.
        let room = section
            .bytes
            .checked_sub(bytes)
            .and_then(|last| last.checked_sub(offset))
            .map_or(0, |left| left / step + 1);
        let most = usize::try_from(room).map_or(rows.len(), |room| room.min(rows.len()));
        let mut address = section.start + offset;
        let goes_on = |row: &&Row| {
            let expected = [address, bytes, section.device];
            address = address.wrapping_add(step);
            **row == expected
        };
        let more = rows[..most].iter().take_while(goes_on).count();
        self.count(more as u64)?;
        if let Some(run) = self.runs.last_mut() {
            run.count += u32::try_from(more).unwrap_or(u32::MAX);
        }
        Ok(more)
    }

    fn push_run(&mut self, [address, bytes, device, stride, count]: Strided) -> Result<(), Fault> {
        let at = self.len;
        let sweep = stride
            .checked_mul(count.saturating_sub(1))
            .and_then(|sweep| sweep.checked_add(bytes));
        let Some(sweep) =
            sweep.filter(|_| count > 0 && bytes > 0 && (stride >= bytes || count == 1))
        else {
            return Err(Fault::Invalid(format!(
                "descriptor {at}: {count} blocks of {bytes} bytes at a stride of {stride}; accepted: \
                 blocks that have bytes and do not overlap"
            )));
        };
        let (target, start) = self.resolve([address, sweep, device])?;
        let first = self.count(count)?;
        self.runs.push(Run {
            first,
            count: self.len - first,
            target,
            offset: address - start,
            step: stride.max(bytes),
            bytes,
        });
        Ok(())
    }

    fn finish(self) -> Result<List<T>, Fault> {
        if self.len == 0 {
            return Err(Fault::Invalid("the list has no descriptors".to_owned()));
        }
        let many = self.runs.len() > 64 && self.runs.len() * RUN_MIN > self.len as usize;
        let shape = if many {
            let mut pieces = Vec::with_capacity(self.len as usize);
            for run in &self.runs {
                pieces.extend((0..u64::from(run.count)).map(|at| Piece {
                    target: run.target,
                    offset: run.offset + at * run.step,
                    bytes: run.bytes,
                }));
            }
            Shape::Pieces(pieces)
        } else {
            Shape::Runs(self.runs)
        };
        Ok(List {
            shape,
            len: self.len,
            targets: self.targets,
        })
    }
}

fn next(run: &Run) -> Option<u64> {
    run.step
        .checked_mul(run.count.into())
        .and_then(|sweep| run.offset.checked_add(sweep))
}

/// Descriptors of two lists that pair up.
#[derive(Debug)]
pub(super) enum Paired {
    /// Ids into pairs of runs.
    Sets(Vec<SetPair>),
    /// One by one.
    Pieces(Vec<(Piece, Piece)>),
}

/// A run of each side, and the ids in it.
#[derive(Debug)]
pub(super) struct SetPair {
    pub(super) local: Run,
    pub(super) local_ids: Vec<u32>,
    pub(super) remote: Run,
    pub(super) remote_ids: Vec<u32>,
}

/// A pairing, and what it adds up to.
#[derive(Debug)]
pub(super) struct Pairing {
    pub(super) paired: Paired,
    pub(super) count: u64,
    pub(super) bytes: u64,
}

/// Pairs the descriptors of two lists by their indices.
pub(super) fn pair<L, R>(
    local: &List<L>,
    local_indices: &[u32],
    remote: &List<R>,
    remote_indices: &[u32],
) -> Result<Pairing, Fault> {
    let count = local_indices.len();
    if count != remote_indices.len() || count == 0 {
        return Err(Fault::Invalid(format!(
            "{count} local and {} remote indices; accepted: equally many, at least one",
            remote_indices.len()
        )));
    }
    for (side, indices, len) in [
        ("local", local_indices, local.len),
        ("remote", remote_indices, remote.len),
    ] {
        let largest = indices.iter().fold(0, |max, &index| index.max(max));
        if largest >= len {
            let at = indices.iter().position(|&index| index >= len).unwrap_or(0);
            return Err(Fault::Invalid(format!(
                "{side} index {} at position {at} is out of range; the list has {len} descriptors",
                indices[at]
            )));
        }
    }
    let (paired, bytes) = match (&local.shape, &remote.shape) {
        (Shape::Runs(here), Shape::Runs(there)) => {
            by_runs(here, local_indices, there, remote_indices)?
        }
        _ => {
            let pairs = local_indices.iter().zip(remote_indices);
            let pairs = pairs.map(|(&l, &r)| (local.piece(l), remote.piece(r)));
            one_by_one(pairs, count)?
        }
    };
    Ok(Pairing {
        paired,
        count: count as u64,
        bytes,
    })
}

/// Pairs all descriptors of two lists in order.
pub(super) fn pair_all<L, R>(local: &List<L>, remote: &List<R>) -> Result<Pairing, Fault> {
    if local.len != remote.len {
        return Err(Fault::Invalid(format!(
            "{} local and {} remote descriptors; accepted: equally many",
            local.len, remote.len
        )));
    }
    let all: Vec<u32> = (0..local.len).collect();
    pair(local, &all, remote, &all)
}

fn one_by_one(
    pairs: impl Iterator<Item = (Piece, Piece)>,
    count: usize,
) -> Result<(Paired, u64), Fault> {
    let mut pieces = Vec::with_capacity(count);
    let mut bytes = 0u64;
    for (at, (l, r)) in pairs.enumerate() {
        same_length(at, l.bytes, r.bytes)?;
        bytes = bytes.saturating_add(l.bytes);
        pieces.push((l, r));
    }
    Ok((Paired::Pieces(pieces), bytes))
}

fn same_length(at: usize, local: u64, remote: u64) -> Result<(), Fault> {
    if local == remote {
        return Ok(());
    }
    Err(Fault::Invalid(format!(
        "pair {at}: the local descriptor has {local} bytes, the remote one {remote}"
    )))
}

fn by_runs(
    here: &[Run],
    local_indices: &[u32],
    there: &[Run],
    remote_indices: &[u32],
) -> Result<(Paired, u64), Fault> {
    let mut sets: Vec<SetPair> = Vec::new();
    let mut numbers = Numbers::new(here.len(), there.len());
    let mut bytes = 0u64;
    let (mut l, mut r) = (0, 0);
    let mut at = 0;
    while at < local_indices.len() {
        l = run_of(here, local_indices[at], l);
        r = run_of(there, remote_indices[at], r);
        let (local, remote) = (here[l], there[r]);
        let number = numbers.of(l, r);
        if number == sets.len() {
            same_length(at, local.bytes, remote.bytes)?;
            sets.push(SetPair {
                local,
                local_ids: Vec::new(),
                remote,
                remote_ids: Vec::new(),
            });
        }
        let set = &mut sets[number];
        // As far as both sides stay in their runs.
        let within = |run: &Run, index: u32| index.wrapping_sub(run.first) < run.count;
        let pairs = local_indices[at..].iter().zip(&remote_indices[at..]);
        let before = set.local_ids.len();
        for (&x, &y) in pairs {
            if !within(&local, x) || !within(&remote, y) {
                break;
            }
            set.local_ids.push(x - local.first);
            set.remote_ids.push(y - remote.first);
        }
        let stretch = set.local_ids.len() - before;
        bytes = bytes.saturating_add(local.bytes.saturating_mul(stretch as u64));
        at += stretch;
    }
    Ok((Paired::Sets(sets), bytes))
}

/// The run of an index that is below the length of the list. Most often it is the one of the index
/// before, or the next: lists are named layer by layer, or all layers of block after block.
fn run_of(runs: &[Run], index: u32, last: usize) -> usize {
    let within = |at: usize| index.wrapping_sub(runs[at].first) < runs[at].count;
    if within(last) {
        return last;
    }
    let next = if last + 1 < runs.len() { last + 1 } else { 0 };
    if within(next) {
        return next;
    }
    runs.partition_point(|run| run.first <= index) - 1
}

/// Numbers pairs of runs in the order in which they appear.
enum Numbers {
    /// A table of all pairs.
    Table(usize, Vec<u32>, u32),
    Map(HashMap<(usize, usize), usize>),
}

impl Numbers {
    /// Pairs of a table that is worth clearing for each request: 36 layers on both sides.
    const TABLE_MAX: usize = 4096;

    fn new(local: usize, remote: usize) -> Self {
        match local.saturating_mul(remote) {
            pairs @ 0..=Self::TABLE_MAX => Self::Table(remote, vec![u32::MAX; pairs], 0),
            _ => Self::Map(HashMap::new()),
        }
    }

    fn of(&mut self, local: usize, remote: usize) -> usize {
        match self {
            Self::Table(width, numbers, used) => {
                let number = &mut numbers[local * *width + remote];
                if *number == u32::MAX {
                    *number = *used;
                    *used += 1;
                }
                *number as usize
            }
            Self::Map(known) => {
                let next = known.len();
                *known.entry((local, remote)).or_insert(next)
            }
        }
    }
}

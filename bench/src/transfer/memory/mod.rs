//! Patterned blocks in registered memory.
//!
//! Registered memory can be written by peers at any time, so it is reached through raw pointers.
//! The benchmarks order their accesses by completions and by the messages between the two sides.

mod device;

use std::{
    ptr::NonNull,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail, ensure};
use blockplane_transfer::{
    Agent, ArenaConfig, DeviceArenaConfig, DeviceSharing, HostMemory, PinConfig, Registration,
    RemoteAccess,
};
use rustix::mm::{Advice, madvise};
use serde::{Deserialize, Serialize};

use super::{
    case::{Memory, Side, Turn},
    link::Sharing,
};

/// Longest that a host arena may take to be pinned.
const PINNING: Duration = Duration::from_secs(60);

/// Registers memory of a kind with an agent.
///
/// # Errors
/// There is not that much of it, the device or its driver refuses, or pinning fails.
pub(super) fn register(
    agent: &Agent,
    kind: &Memory,
    bytes: usize,
    sharing: Sharing,
) -> anyhow::Result<Registration> {
    match kind {
        Memory::Arena => Ok(agent.allocate(ArenaConfig::new(bytes, "bench"))?),
        Memory::Host => Ok(agent.register(host(bytes)?, RemoteAccess::Open)?),
        Memory::Pinned(device) => {
            let config = ArenaConfig::new(bytes, "bench").pinned(PinConfig::near(*device));
            let memory = agent.allocate(config)?;
            wait_pinned(&memory, |_| {})?;
            Ok(memory)
        }
        Memory::Device(device) => {
            let sharing = match sharing {
                Sharing::FileDescriptor => DeviceSharing::FileDescriptor,
                Sharing::Handle => DeviceSharing::Handle,
            };
            let config = DeviceArenaConfig::new(*device, bytes, "bench").shared_by(sharing);
            Ok(agent.allocate_device(config)?)
        }
        Memory::File(path) => bail!("{} is a file, not memory", path.display()),
    }
}

/// Waits until all of an arena is pinned; tells `progress` the bytes that are, each time it looks.
pub(super) fn wait_pinned(
    memory: &Registration,
    mut progress: impl FnMut(u64),
) -> anyhow::Result<()> {
    const LOOK: Duration = Duration::from_micros(200);
    let start = Instant::now();
    loop {
        let pinned = memory.pinned().context("the arena is not being pinned")?;
        if let Some(error) = pinned.failed {
            return Err(error).context("cannot pin the arena");
        }
        progress(pinned.pinned_bytes);
        if pinned.pinned_bytes == pinned.total_bytes {
            return Ok(());
        }
        ensure!(
            start.elapsed() < PINNING,
            "{} of {} bytes are pinned after {PINNING:?}",
            pinned.pinned_bytes,
            pinned.total_bytes
        );
        thread::park_timeout(LOOK);
    }
}

/// How long memory takes to be had.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Allocated {
    /// Milliseconds of each allocation with its registration.
    pub(super) millis: Vec<f64>,
    /// Milliseconds from the start of each until its first and its last byte were pinned.
    pub(super) first_pinned: Vec<f64>,
    pub(super) all_pinned: Vec<f64>,
}

/// Allocates memory some times and lets go of it again.
pub(super) fn allocate(
    agent: &Agent,
    kind: &Memory,
    bytes: usize,
    times: u32,
    sharing: Sharing,
) -> anyhow::Result<Allocated> {
    let mut found = Allocated::default();
    for _ in 0..times {
        let start = Instant::now();
        let millis = || start.elapsed().as_secs_f64() * 1e3;
        let memory = match kind {
            Memory::Pinned(device) => {
                let config = ArenaConfig::new(bytes, "bench").pinned(PinConfig::near(*device));
                agent.allocate(config)?
            }
            other => register(agent, other, bytes, sharing)?,
        };
        found.millis.push(millis());
        if memory.pinned().is_some() {
            let mut first = None;
            wait_pinned(&memory, |pinned| {
                if pinned > 0 {
                    first.get_or_insert_with(millis);
                }
            })?;
            found.all_pinned.push(millis());
            found.first_pinned.extend(first);
        }
        memory
            .close(Duration::from_secs(5))
            .map_err(|busy| anyhow!("region {} is still in use", busy.region))?;
    }
    Ok(found)
}

/// Memory of this process with all its pages in place, huge ones where the kernel has them.
pub(super) fn host(bytes: usize) -> anyhow::Result<HostMemory> {
    const HUGE: usize = 2 << 20;
    const PAGE: usize = 4096;
    let mut memory = vec![0u8; bytes];
    let start = memory.as_mut_ptr();
    let skip = start.align_offset(HUGE);
    let advised = (bytes.saturating_sub(skip)) / HUGE * HUGE;
    if advised > 0 {
        // SAFETY: `skip + advised` is at most the length of the vector.
        let from = unsafe { start.add(skip) };
        // SAFETY: the range lies inside the vector, and this advice changes no contents.
        unsafe { madvise(from.cast(), advised, Advice::LinuxHugepage) }
            .context("madvise(MADV_HUGEPAGE)")?;
    }
    for page in memory.iter_mut().step_by(PAGE) {
        *page = 1;
    }
    Ok(memory.into())
}

/// Fills block `ids[i]` with bytes that follow from `seed` and `i`.
pub(super) fn fill(memory: &Registration, side: &Side, seed: u64) -> anyhow::Result<()> {
    if memory.device().is_some() {
        return device::fill(memory, side, seed);
    }
    let bytes = run_bytes(side);
    let mut block = vec![0; bytes];
    for (i, at) in side.runs().enumerate() {
        pattern(&mut block, seed, i);
        let to = run_ptr(memory, at, bytes);
        // SAFETY: `to` points at `bytes` bytes of the region, and `block` is elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(block.as_ptr(), to, bytes) };
    }
    Ok(())
}

/// Sets blocks to zero.
pub(super) fn clear(memory: &Registration, side: &Side) -> anyhow::Result<()> {
    if memory.device().is_some() {
        return device::clear(memory, side);
    }
    let bytes = run_bytes(side);
    for at in side.runs() {
        let to = run_ptr(memory, at, bytes);
        // SAFETY: `to` points at `bytes` bytes of the region.
        unsafe { std::ptr::write_bytes(to, 0, bytes) };
    }
    Ok(())
}

/// Number of runs that do not hold what [`fill`] puts there, turned if it was on the way.
pub(super) fn mismatches(
    memory: &Registration,
    side: &Side,
    seed: u64,
    turn: Option<Turn>,
) -> anyhow::Result<usize> {
    let bytes = run_bytes(side);
    let (mut plain, mut turned) = (vec![0; bytes], vec![0; bytes]);
    let mut differs = |i: usize, found: &[u8]| {
        pattern(&mut plain, seed, i);
        match turn {
            None => plain != found,
            Some(turn) => {
                turn.apply(&plain, &mut turned);
                turned != found
            }
        }
    };
    if memory.device().is_some() {
        return device::count(memory, side, differs);
    }
    let mut found = vec![0; bytes];
    let mut wrong = 0;
    for (i, at) in side.runs().enumerate() {
        let from = run_ptr(memory, at, bytes);
        // SAFETY: `from` points at `bytes` bytes of the region, and `found` is elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(from, found.as_mut_ptr(), bytes) };
        wrong += usize::from(differs(i, &found));
    }
    Ok(wrong)
}

/// Addresses and lengths of a prepared copy: what a transfer through mapped memory cannot beat.
#[derive(Debug)]
pub(super) struct Copies(Vec<(NonNull<u8>, NonNull<u8>, usize)>);

// SAFETY: plain addresses; whoever runs the copy answers for the memory.
unsafe impl Send for Copies {}
// SAFETY: as above.
unsafe impl Sync for Copies {}

impl Copies {
    /// Copies from one region onto another; runs that touch on both sides are one copy.
    pub(super) fn new(
        (from, source): (&Registration, &Side),
        (to, target): (&Registration, &Side),
    ) -> Self {
        let bytes = run_bytes(source);
        assert_eq!(bytes, run_bytes(target), "both sides have equal runs");
        let mut copies: Vec<(NonNull<u8>, NonNull<u8>, usize)> = Vec::new();
        for (x, y) in source.runs().zip(target.runs()) {
            let (x, y) = (run_ptr(from, x, bytes), run_ptr(to, y, bytes));
            if let Some((px, py, length)) = copies.last_mut()
                && px.as_ptr().wrapping_add(*length) == x
                && py.as_ptr().wrapping_add(*length) == y
            {
                *length += bytes;
                continue;
            }
            if let (Some(x), Some(y)) = (NonNull::new(x), NonNull::new(y)) {
                copies.push((x, y, bytes));
            }
        }
        Self(copies)
    }

    /// The same copies in two halves of about the same size.
    pub(super) fn halves(&self) -> [Self; 2] {
        if let [(x, y, bytes)] = self.0[..] {
            let first = bytes / 2;
            // SAFETY: `first` is below the length of the run at `x`.
            let x2 = unsafe { x.add(first) };
            // SAFETY: as for `x`.
            let y2 = unsafe { y.add(first) };
            return [
                Self(vec![(x, y, first)]),
                Self(vec![(x2, y2, bytes - first)]),
            ];
        }
        let (first, second) = self.0.split_at(self.0.len() / 2);
        [Self(first.to_vec()), Self(second.to_vec())]
    }

    /// Copies everything once.
    ///
    /// # Safety
    /// The regions given to [`Copies::new`] are still registered, and nobody uses the bytes.
    pub(super) unsafe fn run(&self) {
        for &(x, y, bytes) in &self.0 {
            // SAFETY: both point at `bytes` bytes of live regions; `copy` allows overlap.
            unsafe { std::ptr::copy(x.as_ptr(), y.as_ptr(), bytes) };
        }
    }
}

fn run_bytes(side: &Side) -> usize {
    usize::try_from(side.shape.run_bytes).unwrap_or(usize::MAX)
}

fn run_ptr(memory: &Registration, at: u64, bytes: usize) -> *mut u8 {
    let offset = usize::try_from(at).unwrap_or(usize::MAX);
    assert!(
        offset
            .checked_add(bytes)
            .is_some_and(|end| end <= memory.len()),
        "{bytes} bytes at {offset} are outside of {} bytes",
        memory.len()
    );
    // SAFETY: the run was just checked to lie inside the region.
    unsafe { memory.base_ptr().as_ptr().add(offset) }
}

fn pattern(block: &mut [u8], seed: u64, index: usize) {
    let mut state = seed ^ (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for word in block.chunks_mut(8) {
        // splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = state;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word.copy_from_slice(&(bits ^ (bits >> 31)).to_le_bytes()[..word.len()]);
    }
}

#[cfg(test)]
mod tests {
    use blockplane_transfer::AgentConfig;

    use super::*;
    use crate::transfer::case::Shape;

    fn side(ids: &[u32]) -> Side {
        let shape = Shape::plain(4096, 1 << 20);
        let ids = ids.into();
        Side {
            shape,
            ids,
            range: false,
        }
    }

    #[test]
    fn wrong_contents_are_counted_by_block() {
        let agent = Agent::new(AgentConfig::new("memory-test")).unwrap();
        let from = register(&agent, &Memory::Arena, 1 << 20, Sharing::default()).unwrap();
        let to = register(&agent, &Memory::Host, 1 << 20, Sharing::default()).unwrap();
        // The first two touch on both sides.
        let (from_side, to_side) = (side(&[3, 4, 0, 9, 5]), side(&[7, 8, 200, 1, 2]));
        fill(&from, &from_side, 1).unwrap();
        let copies = Copies::new((&from, &from_side), (&to, &to_side));
        assert_eq!(copies.0.len(), 4);
        for half in copies.halves() {
            // SAFETY: both regions live, and no transfer runs.
            unsafe { half.run() };
        }
        let wrong = |side: &Side, seed| mismatches(&to, side, seed, None).unwrap();
        assert_eq!(wrong(&to_side, 1), 0);
        assert_eq!(wrong(&to_side, 2), 5);
        assert_eq!(wrong(&side(&[7, 200, 8, 1, 2]), 1), 2);
        clear(&to, &side(&[7])).unwrap();
        assert_eq!(wrong(&to_side, 1), 1);
    }

    #[test]
    fn one_long_copy_is_halved_by_bytes() {
        let agent = Agent::new(AgentConfig::new("memory-test")).unwrap();
        let memory = register(&agent, &Memory::Arena, 1 << 20, Sharing::default()).unwrap();
        let copies = Copies::new((&memory, &side(&[0, 1])), (&memory, &side(&[4, 5])));
        let lengths = copies
            .halves()
            .map(|half| half.0.iter().map(|&(_, _, bytes)| bytes).sum::<usize>());
        assert_eq!(lengths, [4096, 4096]);
    }

    #[test]
    #[should_panic(expected = "outside")]
    fn a_block_outside_of_the_region_is_refused() {
        let agent = Agent::new(AgentConfig::new("memory-test")).unwrap();
        let memory = register(&agent, &Memory::Arena, 8192, Sharing::default()).unwrap();
        clear(&memory, &side(&[2])).unwrap();
    }
}

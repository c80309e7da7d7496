//! Patterned blocks in registered memory.
//!
//! The only unsafe code of this crate: registered memory can be written by peers at any time, so
//! it is reached through raw pointers. The benchmarks order their accesses by completions and by
//! the messages between the two sides.

use blockplane_transfer::Registration;

/// Fills block `ids[i]` with bytes that follow from `seed` and `i`.
pub(super) fn fill(memory: &Registration, block_bytes: usize, ids: &[u32], seed: u64) {
    let mut block = vec![0; block_bytes];
    for (i, &id) in ids.iter().enumerate() {
        pattern(&mut block, seed, i);
        let to = block_ptr(memory, block_bytes, id);
        // SAFETY: `to` points at `block_bytes` bytes of the region, and `block` is elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(block.as_ptr(), to, block_bytes) };
    }
}

/// Sets blocks to zero.
pub(super) fn clear(memory: &Registration, block_bytes: usize, ids: &[u32]) {
    for &id in ids {
        let to = block_ptr(memory, block_bytes, id);
        // SAFETY: `to` points at `block_bytes` bytes of the region.
        unsafe { std::ptr::write_bytes(to, 0, block_bytes) };
    }
}

/// Number of blocks that do not hold what [`fill`] puts there.
pub(super) fn mismatches(
    memory: &Registration,
    block_bytes: usize,
    ids: &[u32],
    seed: u64,
) -> usize {
    let mut expected = vec![0; block_bytes];
    let mut found = vec![0; block_bytes];
    let differs = |(i, &id): (usize, &u32)| {
        pattern(&mut expected, seed, i);
        let from = block_ptr(memory, block_bytes, id);
        // SAFETY: `from` points at `block_bytes` bytes of the region, and `found` is elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(from, found.as_mut_ptr(), block_bytes) };
        expected != found
    };
    ids.iter().enumerate().map(differs).filter(|&d| d).count()
}

/// Copies block `from_ids[i]` of one region onto block `to_ids[i]` of another: what a transfer
/// through mapped memory cannot beat with one thread.
pub(super) fn copy(
    from: &Registration,
    from_ids: &[u32],
    to: &Registration,
    to_ids: &[u32],
    block_bytes: usize,
) {
    for (&from_id, &to_id) in from_ids.iter().zip(to_ids) {
        let source = block_ptr(from, block_bytes, from_id);
        let target = block_ptr(to, block_bytes, to_id);
        // SAFETY: both point at `block_bytes` bytes; `copy` allows the regions to be the same.
        unsafe { std::ptr::copy(source, target, block_bytes) };
    }
}

fn block_ptr(memory: &Registration, block_bytes: usize, id: u32) -> *mut u8 {
    let offset = id as usize * block_bytes;
    assert!(
        offset + block_bytes <= memory.len(),
        "block {id} of {block_bytes} bytes is outside of {} bytes",
        memory.len()
    );
    // SAFETY: the block was just checked to lie inside the region.
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
    use blockplane_transfer::{Agent, AgentConfig, ArenaConfig};

    use super::*;

    #[test]
    fn wrong_contents_are_counted_by_block() {
        let agent = Agent::new(AgentConfig::new("memory-test")).unwrap();
        let [from, to] =
            ["from", "to"].map(|label| agent.allocate(ArenaConfig::new(1 << 20, label)).unwrap());
        let (from_ids, to_ids) = ([3, 0, 9, 5], [7, 8, 1, 200]);
        fill(&from, 4096, &from_ids, 1);
        copy(&from, &from_ids, &to, &to_ids, 4096);
        assert_eq!(mismatches(&to, 4096, &to_ids, 1), 0);
        assert_eq!(mismatches(&to, 4096, &to_ids, 2), 4);
        assert_eq!(mismatches(&to, 4096, &[7, 1, 8, 200], 1), 2);
        clear(&to, 4096, &to_ids[..1]);
        assert_eq!(mismatches(&to, 4096, &to_ids, 1), 1);
    }

    #[test]
    #[should_panic(expected = "outside")]
    fn a_block_outside_of_the_region_is_refused() {
        let agent = Agent::new(AgentConfig::new("memory-test")).unwrap();
        let memory = agent.allocate(ArenaConfig::new(8192, "small")).unwrap();
        clear(&memory, 4096, &[2]);
    }
}

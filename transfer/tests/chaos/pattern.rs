//! Bytes and ids that are easy to tell apart.

use crate::random::Random;

/// `count` different numbers below `of`, in no order.
pub(crate) fn ids(random: &mut Random, of: u32, count: u32) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..of).collect();
    for at in 0..count as usize {
        let other = at + random.index(ids.len() - at);
        ids.swap(at, other);
    }
    ids.truncate(count as usize);
    ids
}

/// `len` bytes that belong to `tag`; those of two tags differ nearly everywhere.
pub(crate) fn pattern(tag: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(tag.wrapping_mul(0xa076_1d64_78bd_642f));
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend_from_slice(&random.next().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

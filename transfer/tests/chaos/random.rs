//! Numbers from a seed.

/// SplitMix64.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `limit`, which is not zero.
    pub(crate) const fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(crate) fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    /// True in `percent` of the cases.
    pub(crate) const fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// `count` different numbers below `of`, in no order.
    pub(crate) fn ids(&mut self, of: u32, count: u32) -> Vec<u32> {
        let mut ids: Vec<u32> = (0..of).collect();
        for at in 0..count as usize {
            let other = at + self.index(ids.len() - at);
            ids.swap(at, other);
        }
        ids.truncate(count as usize);
        ids
    }
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

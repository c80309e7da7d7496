//! Numbers and bytes from a seed.

/// `SplitMix64`.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    /// Numbers that follow from a seed and a name.
    pub(super) fn new(seed: u64, name: &str) -> Self {
        let of_name = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self(seed ^ of_name)
    }

    pub(super) const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mixed(self.0)
    }

    /// From `low` to below `high`, which is larger.
    pub(super) const fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low)
    }

    pub(super) fn count(&mut self, low: u32, high: u32) -> u32 {
        u32::try_from(self.between(low.into(), high.into())).unwrap_or(low)
    }

    /// True in `percent` of the cases.
    pub(super) const fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }

    /// `count` different ids below `of`, in no order.
    pub(super) fn ids(&mut self, of: u32, count: u32) -> Vec<u32> {
        let mut ids: Vec<u32> = (0..of).collect();
        for at in (1..ids.len()).rev() {
            let other = usize::try_from(self.between(0, at as u64 + 1)).unwrap_or(0);
            ids.swap(at, other);
        }
        ids.truncate(count as usize);
        ids
    }
}

const fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// `bytes` bytes of a seed, those from `offset` on: any part of them can be made alone. `offset` is a
/// multiple of 8.
pub(super) fn contents(seed: u64, offset: u64, bytes: usize) -> Vec<u8> {
    let key = mixed(seed.wrapping_add(0x5851_f42d_4c95_7f2d));
    let mut out = Vec::with_capacity(bytes + 8);
    let mut word = offset / 8;
    while out.len() < bytes {
        out.extend_from_slice(&mixed(key ^ word.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes());
        word += 1;
    }
    out.truncate(bytes);
    out
}

/// A number that hardly ever is the same for different bytes.
pub(super) fn digest(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let fold = |hash: u64, word: u64| {
        (hash ^ word)
            .wrapping_mul(0xff51_afd7_ed55_8ccd)
            .rotate_left(29)
    };
    let hash = words.iter().fold(bytes.len() as u64, |hash, word| {
        fold(hash, u64::from_le_bytes(*word))
    });
    let hash = rest
        .iter()
        .fold(hash, |hash, &byte| fold(hash, byte.into()));
    mixed(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_part_of_the_contents_can_be_made_alone() {
        let whole = contents(7, 0, 1000);
        assert_eq!(contents(7, 16, 500), whole[16..516]);
        assert_ne!(contents(8, 0, 1000), whole);
    }

    #[test]
    fn one_changed_byte_changes_the_digest() {
        let mut bytes = contents(1, 0, 1001);
        let before = digest(&bytes);
        for at in [0, 500, 1000] {
            bytes[at] ^= 1;
            assert_ne!(digest(&bytes), before);
            bytes[at] ^= 1;
        }
        assert_eq!(digest(&bytes), before);
    }

    #[test]
    fn ids_are_different() {
        let mut ids = Random::new(3, "ids").ids(100, 40);
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), 40);
        assert!(ids.iter().all(|&id| id < 100));
    }
}

//! How often names were used lately, counted approximately in a fixed space.

use blockplane_protocol::SequenceHash;

/// A count-min sketch with 4-bit counters that age, as in TinyLFU (Einziger, Friedman, Manes:
/// *TinyLFU: A Highly Efficient Cache Admission Policy*, ACM TOS 2017).
///
/// A name has four counters and its count is the lowest of them, so a count is never too low until
/// the counters are halved, which happens after ten times as many uses as names the sketch is for.
/// Two bytes a name.
#[derive(Debug, Default)]
pub(super) struct Sketch {
    /// 16 counters each; a power of two of them.
    words: Box<[u64]>,
    uses: usize,
    uses_max: usize,
}

/// Counts stop here.
pub(super) const COUNT_MAX: u8 = 15;
/// Odd, from the digits of the golden ratio and of the square roots of 2, 3 and 5.
const ROWS: [u64; 4] = [
    0x9E37_79B9_7F4A_7C15,
    0x6A09_E667_F3BC_C909,
    0xBB67_AE85_84CA_A73B,
    0x3C6E_F372_FE94_F82B,
];

impl Sketch {
    /// For about `names` different names. Rounded up to a power of two; at least 1,024 and at most
    /// 2^21, which takes 4 MiB.
    pub(super) fn new(names: usize) -> Self {
        let names = names.clamp(1 << 10, 1 << 21).next_power_of_two();
        Self {
            words: vec![0; names / 4].into(),
            uses: 0,
            uses_max: 10 * names,
        }
    }

    pub(super) fn used(&mut self, name: SequenceHash) {
        for row in ROWS {
            let (word, shift) = self.place(name, row);
            let count = self.words[word] >> shift & u64::from(COUNT_MAX);
            self.words[word] += u64::from(count < u64::from(COUNT_MAX)) << shift;
        }
        self.uses += 1;
        if self.uses == self.uses_max {
            self.halve();
        }
    }

    pub(super) fn count(&self, name: SequenceHash) -> u8 {
        let counts = ROWS.map(|row| {
            let (word, shift) = self.place(name, row);
            (self.words[word] >> shift).to_le_bytes()[0] & COUNT_MAX
        });
        counts.into_iter().min().expect("there are four rows")
    }

    fn halve(&mut self) {
        for word in &mut self.words {
            *word = *word >> 1 & 0x7777_7777_7777_7777;
        }
        self.uses /= 2;
    }

    /// Word and bit of a name's counter in a row. Names are uniform, so one product spreads them.
    fn place(&self, name: SequenceHash, row: u64) -> (usize, u32) {
        let [.., a, b, c, d] = name.0.wrapping_mul(row).to_le_bytes();
        let index = u32::from_le_bytes([a, b, c, d]) as usize;
        let shift = u32::from(name.0.wrapping_mul(row).to_le_bytes()[3] & 15) * 4;
        (index & (self.words.len() - 1), shift)
    }
}

#[cfg(test)]
mod tests {
    use blockplane_protocol::{BlockHash, SaltHash};

    use super::*;

    fn name(token: u32) -> SequenceHash {
        SequenceHash::root(BlockHash::of(&[token], SaltHash::default()))
    }

    #[test]
    fn counts_are_never_too_low_and_rarely_too_high() {
        let mut sketch = Sketch::new(4_096);
        for token in 0..4_096 {
            (0..=token % 5).for_each(|_| sketch.used(name(token)));
        }
        let wrong = (0..4_096).filter(|&token| {
            let (count, uses) = (
                sketch.count(name(token)),
                u8::try_from(token % 5 + 1).unwrap(),
            );
            assert!(count >= uses, "{token}: {count} of {uses}");
            count > uses
        });
        assert!(wrong.count() < 4_096 / 5);
        assert!(
            (5_000..6_000)
                .filter(|&token| sketch.count(name(token)) > 0)
                .count()
                < 500
        );
    }

    #[test]
    fn counters_stop_and_halve() {
        let mut sketch = Sketch::new(1);
        (0..100).for_each(|_| sketch.used(name(7)));
        assert_eq!(sketch.count(name(7)), COUNT_MAX);
        (100..10 * 1_024).for_each(|_| sketch.used(name(8)));
        assert_eq!((sketch.count(name(7)), sketch.count(name(8))), (7, 7));
        assert_eq!(sketch.uses, 5 * 1_024);
    }
}

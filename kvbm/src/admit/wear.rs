//! What writing does to a drive.

use std::time::Duration;

pub(super) const DAY: Duration = Duration::from_secs(86_400);

/// What a store has written to its drive since the store was made, over all its restarts. Flash
/// drives are sold with a number of whole-drive writes per day that they endure over their
/// warranty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wear {
    /// Bytes written, with headers and logs.
    pub bytes_written: u64,
    /// Blocks written.
    pub blocks_written: u64,
    /// Time that the store was open.
    pub open: Duration,
}

impl Wear {
    /// Bytes of [`Self::encode`].
    pub const BYTES: usize = 24;

    /// Adds a write of `blocks` blocks that took `bytes` on the drive.
    pub const fn add(&mut self, blocks: u64, bytes: u64) {
        self.blocks_written = self.blocks_written.saturating_add(blocks);
        self.bytes_written = self.bytes_written.saturating_add(bytes);
    }

    /// How often a drive of `drive_bytes` was written as a whole.
    #[must_use]
    pub fn drive_writes(&self, drive_bytes: u64) -> f64 {
        ratio(self.bytes_written, drive_bytes)
    }

    /// Whole-drive writes per day of open time; 0 before any time has passed.
    #[must_use]
    pub fn drive_writes_per_day(&self, drive_bytes: u64) -> f64 {
        if self.open.is_zero() {
            return 0.0;
        }
        self.drive_writes(drive_bytes) * (DAY.as_secs_f64() / self.open.as_secs_f64())
    }

    /// How long a drive that endures `endurance_bytes` (its TBW rating) lasts from new at this
    /// rate, in days of open time; infinite while nothing is written.
    #[must_use]
    pub fn life_days(&self, endurance_bytes: u64) -> f64 {
        if self.bytes_written == 0 {
            return f64::INFINITY;
        }
        ratio(endurance_bytes, self.bytes_written) * (self.open.as_secs_f64() / DAY.as_secs_f64())
    }

    /// A fixed-size record: bytes, blocks and milliseconds, each a little-endian u64.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let millis = u64::try_from(self.open.as_millis()).unwrap_or(u64::MAX);
        let mut record = [0; Self::BYTES];
        for (part, value) in
            record
                .chunks_exact_mut(8)
                .zip([self.bytes_written, self.blocks_written, millis])
        {
            part.copy_from_slice(&value.to_le_bytes());
        }
        record
    }

    /// Reads what [`Self::encode`] wrote.
    #[must_use]
    pub fn decode(record: &[u8; Self::BYTES]) -> Self {
        let (words, _) = record.as_chunks::<8>();
        let [bytes_written, blocks_written, millis] =
            [0, 1, 2].map(|word: usize| u64::from_le_bytes(words[word]));
        Self {
            bytes_written,
            blocks_written,
            open: Duration::from_millis(millis),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
fn ratio(part: u64, whole: u64) -> f64 {
    part as f64 / whole as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic() {
        let mut wear = Wear::default();
        assert_eq!(wear.drive_writes_per_day(100), 0.0);
        assert_eq!(wear.life_days(1), f64::INFINITY);
        wear.add(3, 250);
        wear.open = Duration::from_secs(43_200);
        assert_eq!(wear.drive_writes(100), 2.5);
        assert_eq!(wear.drive_writes_per_day(100), 5.0);
        assert_eq!(wear.life_days(1_000), 2.0);
        assert_eq!(Wear::decode(&wear.encode()), wear);
    }
}

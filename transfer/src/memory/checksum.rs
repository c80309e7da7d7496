//! xxh3-64 over registered memory, in place.
//!
//! The algorithm is that of the published specification of xxHash (`doc/xxhash_spec.md`, XXH3): for more than 240
//! bytes, stripes of 64 bytes go into eight lanes, which are scrambled after each block of 16 stripes.
//! Inputs of up to 240 bytes, and all constants, are the crate's `xxhash-rust`. What is here
//! that no crate has: the input is read through raw pointers (see the memory model of this module), with the
//! widest vectors of the processor at hand, and is asked for ahead, because blocks are seldom in a cache.

use std::fmt;
use std::ptr;

use xxhash_rust::const_xxh3::const_custom_default_secret;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::region::Registration;
use crate::error::AccessError;

const STRIPE: usize = 64;
const LANES: usize = 8;
const SECRET: usize = 192;
/// Bytes that the secret moves on from one stripe to the next.
const STEP: usize = 8;
const STRIPES_PER_BLOCK: usize = (SECRET - STRIPE) / STEP;
/// Inputs up to here are hashed in another way.
const SHORT_MAX: u64 = 240;
/// A multiple of stripes, and more than [`SHORT_MAX`].
const BUFFER: usize = 4 * STRIPE;
/// Device memory is fetched in pieces of this many bytes.
const FETCH: usize = 16 << 10;

const PRIME32: [u64; 3] = [0x9E37_79B1, 0x85EB_CA77, 0xC2B2_AE3D];
const PRIME64: [u64; 5] = [
    0x9E37_79B1_85EB_CA87,
    0xC2B2_AE3D_27D4_EB4F,
    0x1656_67B1_9E37_79F9,
    0x85EB_CA77_C2B2_AE63,
    0x27D4_EB2F_1656_67C5,
];

/// A running xxh3-64 of ranges of registered memory, as if they lay one after the other.
///
/// ```
/// use blockplane_transfer::{Agent, AgentConfig, ArenaConfig, Checksum};
///
/// let agent = Agent::new(AgentConfig::new("sums"))?;
/// let memory = agent.allocate(ArenaConfig::new(1 << 20, "blocks"))?;
/// let mut sum = Checksum::with_seed(7);
/// sum.update(&memory, 0, 4096)?;
/// sum.update(&memory, 65_536, 4096)?;
/// println!("{:x}", sum.finish());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Checksum {
    lanes: [u64; LANES],
    seed: u64,
    secret: [u8; SECRET],
    /// The last bytes: at least one, once there was one. What was in front of them stays behind them.
    buffer: [u8; BUFFER],
    buffered: usize,
    /// Stripes of the block so far.
    stripes: usize,
    bytes: u64,
}

impl fmt::Debug for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checksum")
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl Checksum {
    /// Of no bytes yet. Costs about 50 ns.
    #[must_use]
    pub fn with_seed(seed: u64) -> Self {
        Self {
            lanes: [
                PRIME32[2], PRIME64[0], PRIME64[1], PRIME64[2], PRIME64[3], PRIME32[1], PRIME64[4],
                PRIME32[0],
            ],
            seed,
            secret: const_custom_default_secret(seed),
            buffer: [0; BUFFER],
            buffered: 0,
            stripes: 0,
            bytes: 0,
        }
    }

    /// Adds a range of a region. Bytes that a transfer or a peer writes at the same moment make the
    /// result unspecified. Host memory is read in place, that of devices is fetched.
    ///
    /// # Errors
    /// The range is not in the region, or the device fails; nothing was added then, or, for device memory, a
    /// part.
    pub fn update(
        &mut self,
        memory: &Registration,
        offset: u64,
        bytes: usize,
    ) -> Result<(), AccessError> {
        if let Some(from) = memory.host_range(offset, bytes)? {
            // SAFETY: `bytes` bytes from there lie in a host region that `memory` keeps mapped.
            unsafe { self.add(from, bytes) };
            return Ok(());
        }
        let mut fetched = [0; FETCH];
        let mut done = 0;
        while done < bytes {
            let part = &mut fetched[..FETCH.min(bytes - done)];
            memory.read_at(offset + done as u64, part)?;
            // SAFETY: a slice of this function.
            unsafe { self.add(part.as_ptr(), part.len()) };
            done += part.len();
        }
        Ok(())
    }

    /// The xxh3-64 of everything so far.
    #[must_use]
    pub fn finish(&self) -> u64 {
        if self.bytes <= SHORT_MAX {
            return xxh3_64_with_seed(&self.buffer[..self.buffered], self.seed);
        }
        let mut state = self.clone();
        // The last stripe is the last 64 bytes, whatever the place of stripes is there.
        let whole = (self.buffered - 1) / STRIPE;
        // SAFETY: whole stripes of the buffer, which is an array of this function's own.
        unsafe { state.stripes(self.buffer.as_ptr(), whole) };
        let mut last = [0; STRIPE];
        let missing = STRIPE.saturating_sub(self.buffered);
        last[..missing].copy_from_slice(&self.buffer[BUFFER - missing..]);
        last[missing..]
            .copy_from_slice(&self.buffer[(self.buffered + missing) - STRIPE..self.buffered]);
        let secret = &self.secret[SECRET - STRIPE - 7..];
        // SAFETY: a stripe, and more than 64 bytes of the secret.
        unsafe { accumulate(&mut state.lanes, last.as_ptr(), secret.as_ptr()) };
        let start = self.bytes.wrapping_mul(PRIME64[0]);
        let mut sum = start;
        for pair in 0..LANES / 2 {
            let word = |i: usize| {
                let mut word = [0; 8];
                let at = 11 + pair * 16 + i * 8;
                word.copy_from_slice(&self.secret[at..at + 8]);
                u64::from_le_bytes(word) ^ state.lanes[pair * 2 + i]
            };
            let product = u128::from(word(0)) * u128::from(word(1));
            let (low, high) = (product & u128::from(u64::MAX), product >> 64);
            // Both are 64 bits long.
            sum = sum.wrapping_add(u64::try_from(low ^ high).unwrap_or(u64::MAX));
        }
        sum ^= sum >> 37;
        sum = sum.wrapping_mul(0x1656_6791_9E37_79F9);
        sum ^ sum >> 32
    }

    /// # Safety
    /// `from..from + bytes` is mapped readable.
    unsafe fn add(&mut self, from: *const u8, bytes: usize) {
        self.bytes += bytes as u64;
        let room = BUFFER - self.buffered;
        if bytes <= room {
            // SAFETY: by the contract of this function, and `bytes` bytes of the buffer are free.
            unsafe { self.keep(from, bytes) };
            return;
        }
        let (mut from, mut bytes) = (from, bytes);
        if self.buffered > 0 {
            // SAFETY: fewer than `bytes` bytes.
            unsafe { self.keep(from, room) };
            let buffer = self.buffer;
            // SAFETY: an array of this function.
            unsafe { self.stripes(buffer.as_ptr(), BUFFER / STRIPE) };
            // SAFETY: inside the range.
            from = unsafe { from.add(room) };
            bytes -= room;
            self.buffered = 0;
        }
        let whole = (bytes - 1) / BUFFER * BUFFER;
        if whole > 0 {
            // SAFETY: fewer than `bytes` bytes.
            unsafe { self.stripes(from, whole / STRIPE) };
            // SAFETY: inside the range.
            from = unsafe { from.add(whole) };
            bytes -= whole;
            let tail = &mut self.buffer[BUFFER - STRIPE..];
            // SAFETY: at least a stripe of the range lies in front of `from`.
            let last = unsafe { from.sub(STRIPE) };
            // SAFETY: a stripe of the range, and one of the buffer.
            unsafe { ptr::copy(last, tail.as_mut_ptr(), STRIPE) };
        }
        // SAFETY: what is left of the range, at most a buffer.
        unsafe { self.keep(from, bytes) };
    }

    /// # Safety
    /// `from..from + bytes` is mapped readable, and the buffer has room for it.
    unsafe fn keep(&mut self, from: *const u8, bytes: usize) {
        let to = &mut self.buffer[self.buffered..self.buffered + bytes];
        // SAFETY: by the contract of this function; `to` is as long.
        unsafe { ptr::copy(from, to.as_mut_ptr(), bytes) };
        self.buffered += bytes;
    }

    /// # Safety
    /// `count` stripes from `from` are mapped readable.
    unsafe fn stripes(&mut self, from: *const u8, count: usize) {
        let secret = &self.secret;
        // SAFETY: by the contract of this function; the function was chosen for this processor.
        unsafe { wide::long(&mut self.lanes, &mut self.stripes, from, count, secret) };
    }
}

/// Adds stripes, and scrambles at the end of each block.
///
/// # Safety
/// `count` stripes from `from` are mapped readable.
#[inline(always)]
unsafe fn long(
    lanes: &mut [u64; LANES],
    stripes: &mut usize,
    from: *const u8,
    count: usize,
    secret: &[u8; SECRET],
) {
    let mut now = *lanes;
    let mut place = *stripes;
    for stripe in 0..count {
        // SAFETY: the stripe lies in the range.
        let data = unsafe { from.add(stripe * STRIPE) };
        wide::prefetch(data);
        // SAFETY: `place` is below the stripes of a block, so that 64 bytes of the secret follow.
        let key = unsafe { secret.as_ptr().add(place * STEP) };
        // SAFETY: a mapped stripe, and 64 bytes of the secret.
        unsafe { accumulate(&mut now, data, key) };
        place += 1;
        if place == STRIPES_PER_BLOCK {
            place = 0;
            let last = &secret[SECRET - STRIPE..];
            // SAFETY: the last 64 bytes of the secret.
            let key = unsafe { words(last.as_ptr()) };
            for (lane, key) in now.iter_mut().zip(key) {
                *lane = (*lane ^ *lane >> 47 ^ key).wrapping_mul(PRIME32[0]);
            }
        }
    }
    *lanes = now;
    *stripes = place;
}

/// Adds one stripe.
///
/// # Safety
/// 64 bytes from `data` and from `key` are mapped readable.
#[inline(always)]
unsafe fn accumulate(lanes: &mut [u64; LANES], data: *const u8, key: *const u8) {
    // SAFETY: by the contract of this function.
    let data = unsafe { words(data) };
    // SAFETY: as above.
    let key = unsafe { words(key) };
    for i in 0..LANES {
        let mixed = data[i] ^ key[i];
        let product = (mixed & u64::from(u32::MAX)).wrapping_mul(mixed >> 32);
        lanes[i] = lanes[i].wrapping_add(product).wrapping_add(data[i ^ 1]);
    }
}

/// 64 bytes as they are, by value: no reference to them is formed.
///
/// # Safety
/// 64 bytes from `from` are mapped readable.
#[inline(always)]
unsafe fn words(from: *const u8) -> [u64; LANES] {
    // SAFETY: by the contract of this function; the read is unaligned, and all bits are a number.
    let words = unsafe { ptr::read_unaligned(from.cast::<[u64; LANES]>()) };
    words.map(u64::from_le)
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
mod wide {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    use std::sync::LazyLock;

    use super::{LANES, SECRET};

    /// How far ahead memory is asked for: beyond the page that is being read, where the processor does
    /// not look by itself.
    const AHEAD: usize = 8192;

    type Long = unsafe fn(&mut [u64; LANES], &mut usize, *const u8, usize, &[u8; SECRET]);

    static LONG: LazyLock<Long> = LazyLock::new(|| {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512dq") {
            long_512
        } else if is_x86_feature_detected!("avx2") {
            long_256
        } else {
            super::long
        }
    });

    #[inline(always)]
    pub(super) fn prefetch(at: *const u8) {
        // SAFETY: a hint, which never faults, whatever the address is.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast()) };
    }

    /// # Safety
    /// As for [`super::long`].
    pub(super) unsafe fn long(
        lanes: &mut [u64; LANES],
        stripes: &mut usize,
        from: *const u8,
        count: usize,
        secret: &[u8; SECRET],
    ) {
        // SAFETY: by the contract of this function; it was chosen for this processor.
        unsafe { LONG(lanes, stripes, from, count, secret) }
    }

    macro_rules! wide {
        ($name:ident, $features:literal) => {
            /// # Safety
            /// As for [`super::long`], on a processor with these features.
            #[target_feature(enable = $features)]
            unsafe fn $name(
                lanes: &mut [u64; LANES],
                stripes: &mut usize,
                from: *const u8,
                count: usize,
                secret: &[u8; SECRET],
            ) {
                // SAFETY: by the contract of this function.
                unsafe { super::long(lanes, stripes, from, count, secret) }
            }
        };
    }

    wide!(long_512, "avx512f,avx512dq,avx512vl");
    wide!(long_256, "avx2");
}

#[cfg(not(all(target_arch = "x86_64", not(miri))))]
mod wide {
    pub(super) use super::long;

    pub(super) const fn prefetch(_at: *const u8) {}
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use xxhash_rust::xxh3::xxh3_64_with_seed;

    use super::{Checksum, LANES, SECRET};
    use crate::{Agent, AgentConfig, ArenaConfig, Registration};

    const BYTES: usize = 1 << 16;

    fn memory() -> (Registration, Vec<u8>) {
        let agent = Agent::new(AgentConfig::new("sums")).expect("an agent");
        let memory = agent.allocate(ArenaConfig::new(BYTES, "sums"));
        let memory = memory.expect("memory");
        let mut word = 1u64;
        let bytes: Vec<u8> = (0..BYTES)
            .map(|_| {
                word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                word.to_be_bytes()[0]
            })
            .collect();
        memory.write_at(0, &bytes).expect("in bounds");
        (memory, bytes)
    }

    #[test]
    fn every_length_has_the_sum_of_the_specification() {
        let (memory, bytes) = memory();
        for len in (0..3000).chain([4096, 16_384, 65_535, 65_536]) {
            for (seed, offset) in [
                (0, 0),
                (0x0123_4567_89ab_cdef, 0),
                (7, (BYTES - len).min(3)),
            ] {
                let mut sum = Checksum::with_seed(seed);
                sum.update(&memory, offset as u64, len).expect("in bounds");
                let expected = xxh3_64_with_seed(&bytes[offset..offset + len], seed);
                assert_eq!(
                    sum.finish(),
                    expected,
                    "{len} bytes at {offset}, seed {seed}"
                );
            }
        }
    }

    proptest! {
        #[test]
        fn ranges_count_as_if_they_followed_one_another(
            ranges in prop::collection::vec((0..BYTES, 0..3000usize), 0..12),
            seed: u64,
        ) {
            let (memory, bytes) = memory();
            let mut sum = Checksum::with_seed(seed);
            let mut all = Vec::new();
            for (offset, len) in ranges {
                let len = len.min(BYTES - offset);
                sum.update(&memory, offset as u64, len).expect("in bounds");
                all.extend_from_slice(&bytes[offset..offset + len]);
                // Asking changes nothing.
                prop_assert_eq!(sum.finish(), xxh3_64_with_seed(&all, seed));
            }
        }
    }

    #[test]
    fn what_is_not_in_the_region_is_refused() {
        let (memory, _) = memory();
        for (offset, len) in [(BYTES as u64, 1), (0, BYTES + 1), (u64::MAX, 2)] {
            let mut sum = Checksum::with_seed(1);
            assert!(sum.update(&memory, offset, len).is_err());
            assert_eq!(sum.finish(), xxh3_64_with_seed(&[], 1));
        }
    }

    /// Processors without wide vectors take the plain function.
    #[test]
    fn the_plain_function_gives_the_same_sums() {
        let data: Vec<u8> = (0..10_000u32).map(|i| i.to_le_bytes()[0]).collect();
        let secret = [0x5c; SECRET];
        let mut one = [[3; LANES]; 2].map(|lanes| (lanes, 5));
        let stripes = data.len() / 64;
        // SAFETY: whole stripes of a vector.
        unsafe {
            super::long(
                &mut one[0].0,
                &mut one[0].1,
                data.as_ptr(),
                stripes,
                &secret,
            )
        };
        // SAFETY: as above.
        unsafe {
            super::wide::long(
                &mut one[1].0,
                &mut one[1].1,
                data.as_ptr(),
                stripes,
                &secret,
            )
        };
        assert_eq!(one[0], one[1]);
    }
}

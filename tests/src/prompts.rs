//! Repeatable prompts.

/// A small generator of random numbers (`SplitMix64`). Its own code, so that a seed in a regression
/// test means the same numbers for ever.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator that starts at `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is above 0.
    pub const fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// A number of `from..to`.
    pub const fn between(&mut self, from: u64, to: u64) -> u64 {
        from + self.below(to - from)
    }

    /// `count` token ids of `1..vocabulary`.
    pub fn tokens(&mut self, count: u64, vocabulary: u64) -> Vec<u64> {
        (0..count).map(|_| self.between(1, vocabulary)).collect()
    }
}

/// `count` prompts of at most `tokens_max` tokens (and at least 2) that share prefixes: each one
/// takes a random part of an earlier one, or nothing, and goes on with tokens of its own.
#[must_use]
pub fn sharing_prefixes(
    random: &mut Random,
    count: usize,
    tokens_max: u64,
    vocabulary: u64,
) -> Vec<Vec<u64>> {
    let mut prompts: Vec<Vec<u64>> = Vec::with_capacity(count);
    for _ in 0..count {
        let length = random.between(2, tokens_max + 1);
        let mut prompt = Vec::new();
        if !prompts.is_empty() && random.below(4) != 0 {
            let pick = usize::try_from(random.below(prompts.len() as u64)).unwrap_or(0);
            let earlier: &Vec<u64> = &prompts[pick];
            let end = length.min(earlier.len() as u64 + 1);
            let keep = random.below(end).max(random.below(end));
            prompt.extend(earlier.iter().take(usize::try_from(keep).unwrap_or(0)));
        }
        let own = length - prompt.len() as u64;
        prompt.extend(random.tokens(own, vocabulary));
        prompts.push(prompt);
    }
    prompts
}

//! Text of a wanted number of tokens for a server whose tokenizer is not known.

use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::client::Client;

/// Common words: one token each for most large vocabularies.
const WORDS: [&str; 64] = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "government",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "business",
    "issue",
    "side",
    "kind",
    "head",
    "house",
    "service",
    "friend",
    "father",
    "power",
    "hour",
    "game",
    "line",
    "end",
    "city",
    "body",
];

/// What a server makes of our words.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Calibration {
    pub(super) tokens_per_word: f64,
    /// Tokens that every prompt has besides its words, such as those of a chat template.
    pub(super) tokens_fixed: f64,
}

impl Default for Calibration {
    fn default() -> Self {
        Self {
            tokens_per_word: 1.0,
            tokens_fixed: 0.0,
        }
    }
}

/// Sends two short prompts and looks at their token counts. A server that reports none gets one
/// word for each token.
pub(super) async fn calibrate(client: &Client, seed: u64) -> anyhow::Result<Calibration> {
    const SHORT: u32 = 16;
    const LONG: u32 = 112;
    let short = client.count_tokens(&words(seed, u64::MAX, SHORT)).await?;
    let long = client.count_tokens(&words(seed, u64::MAX, LONG)).await?;
    Ok(match (short, long) {
        (Some(short), Some(long)) if long > short => {
            let tokens_per_word = f64::from(long - short) / f64::from(LONG - SHORT);
            Calibration {
                tokens_per_word,
                tokens_fixed: (f64::from(short) - tokens_per_word * f64::from(SHORT)).max(0.0),
            }
        }
        _ => Calibration::default(),
    })
}

impl Calibration {
    /// Words that make about this many tokens.
    pub(super) fn words(&self, tokens: f64) -> u32 {
        whole(tokens / self.tokens_per_word)
    }
}

/// The nearest count of at least 1.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "clamped to the range of the result"
)]
pub(super) fn whole(count: f64) -> u32 {
    count.round().clamp(1.0, f64::from(u32::MAX)) as u32
}

/// `count` words, always the same for the same seed and key.
pub(super) fn words(seed: u64, key: u64, count: u32) -> String {
    let mut rng = StdRng::seed_from_u64(seed ^ key.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut text = String::with_capacity(count as usize * 6);
    for _ in 0..count {
        text.push(' ');
        text.push_str(WORDS[rng.random_range(0..WORDS.len())]);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_depend_on_seed_and_key_only_and_shorter_text_is_a_prefix() {
        let text = words(1, 2, 20);
        assert_eq!(text.split_whitespace().count(), 20);
        assert!(text.starts_with(&words(1, 2, 12)));
        assert_ne!(text, words(2, 2, 20));
        assert_ne!(text, words(1, 3, 20));
    }

    #[test]
    fn a_count_of_tokens_becomes_a_count_of_words() {
        let calibration = Calibration {
            tokens_per_word: 2.5,
            tokens_fixed: 9.0,
        };
        assert_eq!(calibration.words(100.0), 40);
        assert_eq!(calibration.words(0.0), 1);
    }
}

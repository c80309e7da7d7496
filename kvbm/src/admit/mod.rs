//! What is worth writing to a drive: admission to G3, and a budget for its writes.
//!
//! Writing every block that is computed wears a drive out and mostly for nothing: in real traffic
//! three of four blocks are never asked for again. An [`Admission`] decides block by block; a
//! [`WriteBudget`] bounds what it admits. Both are pure: time is an argument.
//!
//! Memory of an admission is bounded by [`AdmissionConfig::entries_max`]: at most 64 bytes for each
//! entry (32 MiB for the default of 1,000,000), allocated as it fills.

mod budget;
mod frequency;
mod recent;
mod table;
mod tail;

use std::{fmt, str::FromStr, time::Duration};

use blockplane_protocol::SequenceHash;
use thiserror::Error;

pub use budget::{WriteBudget, WriteBudgetConfig, WriteBudgetError};
use frequency::Frequency;
use recent::Recent;
use tail::Tail;

/// Which blocks go to G3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AdmissionKind {
    /// Blocks of requests of which at most `tokens` are new, that is, follow the longest prefix that
    /// earlier requests had: conversations that go on, and short prompts. The default, with 6,144
    /// tokens.
    Tail {
        /// Tokens.
        tokens: u32,
    },
    /// KVBM's filter: blocks that are written to G2 a second time before their count has decayed.
    Frequency,
    /// The same, and hits in G2 count like writes.
    FrequencyHits,
    /// Blocks that at least `k` requests have asked for, this one included, among the last names
    /// that the ghost list holds.
    SeenK {
        /// Requests; 1 admits all.
        k: u32,
    },
    /// Blocks that are about to be overwritten in G2.
    OnEvict,
    /// All blocks that are written to G2.
    All,
    /// Nothing.
    None,
}

/// How an [`Admission`] decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdmissionConfig {
    /// The rule.
    pub kind: AdmissionKind,
    /// Names that are remembered. Default 1,000,000, as in KVBM.
    pub entries_max: u32,
    /// Count from which the frequency rules admit. Default 2, as in KVBM.
    pub threshold: u32,
    /// Time after which the frequency rules lower all counts by one. Default 600 s, as in KVBM.
    pub decay: Duration,
    /// Tokens of a block, for the rule about tails. Default 16.
    pub block_tokens: u32,
}

/// Tokens of the longest new tail that is admitted by default; `docs/tuning-kvbm.md` says why.
const TAIL_TOKENS: u32 = 6_144;
/// References are counted up to here.
const K_MAX: u32 = u16::MAX as u32;

/// Why a block comes up for admission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    /// It was written to G2, for the first time or again.
    Stored,
    /// A request found it in G2.
    Hit,
    /// It is about to be overwritten in G2.
    Evicting,
}

/// A block that could be written to G3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offered {
    /// Its name.
    pub name: SequenceHash,
}

/// The books of one rule over one G3.
#[derive(Clone, Debug)]
pub struct Admission {
    rule: Rule,
}

#[derive(Clone, Debug)]
enum Rule {
    Frequency { counts: Frequency, hits: bool },
    Seen { seen: Recent, k: u32 },
    Tail(Tail),
    On(Option<Offer>),
}

/// A name that is no admission rule.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "admission `{0}` is not known; accepted are tail (as in tail-6144, in tokens), frequency, frequency+hits, seen-k (as in seen-2), \
     on-evict, all, none"
)]
pub struct UnknownAdmission(String);

impl Default for AdmissionKind {
    fn default() -> Self {
        Self::Tail {
            tokens: TAIL_TOKENS,
        }
    }
}

impl Default for AdmissionConfig {
    fn default() -> Self {
        Self {
            kind: AdmissionKind::default(),
            entries_max: 1_000_000,
            threshold: 2,
            decay: Duration::from_secs(600),
            block_tokens: 16,
        }
    }
}

impl From<AdmissionKind> for AdmissionConfig {
    fn from(kind: AdmissionKind) -> Self {
        Self {
            kind,
            ..Self::default()
        }
    }
}

impl Admission {
    /// Empty books.
    #[must_use]
    pub fn new(config: &AdmissionConfig) -> Self {
        let entries_max = config.entries_max as usize;
        let frequency = |hits| Rule::Frequency {
            counts: Frequency::new(config.threshold, config.decay, entries_max),
            hits,
        };
        let rule = match config.kind {
            AdmissionKind::Frequency => frequency(false),
            AdmissionKind::FrequencyHits => frequency(true),
            AdmissionKind::SeenK { k } => Rule::Seen {
                seen: Recent::new(entries_max),
                k,
            },
            AdmissionKind::Tail { tokens } => {
                Rule::Tail(Tail::new(tokens, config.block_tokens, entries_max))
            }
            AdmissionKind::OnEvict => Rule::On(Some(Offer::Evicting)),
            AdmissionKind::All => Rule::On(Some(Offer::Stored)),
            AdmissionKind::None => Rule::On(None),
        };
        Self { rule }
    }

    /// A request asked for these blocks, from the first of its prompt on. To be told once for each
    /// request, before its blocks are offered.
    pub fn referenced(&mut self, names: impl Iterator<Item = SequenceHash> + Clone) {
        match &mut self.rule {
            Rule::Seen { seen, .. } => {
                for name in names {
                    seen.update(name.0, |count| count.unwrap_or(0).saturating_add(1));
                }
            }
            Rule::Tail(tail) => tail.refer(names.map(|name| name.0)),
            Rule::Frequency { .. } | Rule::On(_) => {}
        }
    }

    /// Whether `block` is to be written. Blocks that are in G3 already are not offered.
    pub fn offer(&mut self, now: Duration, block: &Offered, offer: Offer) -> bool {
        match &mut self.rule {
            Rule::Frequency { counts, hits } => match offer {
                Offer::Stored => counts.count(now, block.name.0),
                Offer::Hit => *hits && counts.count(now, block.name.0),
                Offer::Evicting => false,
            },
            Rule::Seen { seen, k } => {
                let count = seen.get(block.name.0).unwrap_or(0);
                offer != Offer::Evicting && u32::from(count) >= *k
            }
            Rule::Tail(tail) => offer != Offer::Evicting && tail.admits(block.name.0),
            Rule::On(on) => *on == Some(offer),
        }
    }

    /// Names that are remembered.
    #[must_use]
    pub const fn len(&self) -> usize {
        match &self.rule {
            Rule::Frequency { counts, .. } => counts.len(),
            Rule::Seen { seen, .. } => seen.len(),
            Rule::Tail(tail) => tail.len(),
            Rule::On(_) => 0,
        }
    }

    /// Whether no name is remembered.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that the names take.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.rule {
            Rule::Frequency { counts, .. } => counts.bytes(),
            Rule::Seen { seen, .. } => seen.bytes(),
            Rule::Tail(tail) => tail.bytes(),
            Rule::On(_) => 0,
        }
    }
}

impl FromStr for AdmissionKind {
    type Err = UnknownAdmission;

    fn from_str(text: &str) -> Result<Self, UnknownAdmission> {
        let unknown = || UnknownAdmission(text.to_owned());
        let number = |prefix| {
            let digits = text.strip_prefix(prefix)?;
            digits.parse().ok().filter(|&number| number > 0)
        };
        Ok(match text {
            "tail" => Self::default(),
            "frequency" => Self::Frequency,
            "frequency+hits" => Self::FrequencyHits,
            "seen-k" => Self::SeenK { k: 2 },
            "on-evict" => Self::OnEvict,
            "all" => Self::All,
            "none" => Self::None,
            _ => match (number("tail-"), number("seen-")) {
                (Some(tokens), _) => Self::Tail { tokens },
                (None, Some(k)) if k <= K_MAX => Self::SeenK { k },
                _ => return Err(unknown()),
            },
        })
    }
}

impl fmt::Display for AdmissionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tail { tokens } => write!(f, "tail-{tokens}"),
            Self::Frequency => f.write_str("frequency"),
            Self::FrequencyHits => f.write_str("frequency+hits"),
            Self::SeenK { k } => write!(f, "seen-{k}"),
            Self::OnEvict => f.write_str("on-evict"),
            Self::All => f.write_str("all"),
            Self::None => f.write_str("none"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::ZERO;

    fn admission(kind: &str) -> Admission {
        Admission::new(&AdmissionConfig::from(
            kind.parse::<AdmissionKind>().unwrap(),
        ))
    }

    fn offers(admission: &mut Admission, name: u64) -> [bool; 3] {
        let block = Offered {
            name: SequenceHash(name),
        };
        [Offer::Stored, Offer::Hit, Offer::Evicting]
            .map(|offer| admission.offer(NOW, &block, offer))
    }

    #[test]
    fn each_rule_looks_at_its_offers() {
        let mut frequency = admission("frequency");
        assert_eq!(offers(&mut frequency, 1), [false, false, false]);
        assert_eq!(offers(&mut frequency, 1), [true, false, false]);
        let mut hits = admission("frequency+hits");
        assert_eq!(offers(&mut hits, 1), [false, true, false]);
        assert_eq!(offers(&mut admission("on-evict"), 1), [false, false, true]);
        assert_eq!(offers(&mut admission("all"), 1), [true, false, false]);
        assert_eq!(offers(&mut admission("none"), 1), [false; 3]);
        let mut seen = admission("seen-k");
        seen.referenced([SequenceHash(1)].into_iter());
        assert_eq!(offers(&mut seen, 1), [false; 3]);
        seen.referenced([SequenceHash(1)].into_iter());
        assert_eq!(offers(&mut seen, 1), [true, true, false]);
        assert_eq!((seen.len(), seen.is_empty()), (1, false));
        let mut tail = admission("tail-32");
        tail.referenced([1, 2].map(SequenceHash).into_iter());
        tail.referenced([3, 4, 5].map(SequenceHash).into_iter());
        assert_eq!(offers(&mut tail, 2), [true, true, false]);
        assert_eq!(offers(&mut tail, 3), [false; 3]);
    }

    #[test]
    fn names_of_rules_are_read_and_written() {
        for name in [
            "tail-4096",
            "frequency",
            "frequency+hits",
            "seen-3",
            "on-evict",
            "all",
            "none",
        ] {
            assert_eq!(name.parse::<AdmissionKind>().unwrap().to_string(), name);
        }
        assert_eq!("seen-k".parse(), Ok(AdmissionKind::SeenK { k: 2 }));
        assert_eq!("tail".parse(), Ok(AdmissionKind::default()));
        for name in ["seen-0", "seen-70000", "seen-", "tail-x", "freq", ""] {
            let error = name.parse::<AdmissionKind>().unwrap_err();
            assert!(error.to_string().contains("accepted are"), "{error}");
        }
    }

    #[test]
    fn memory_is_bounded() {
        for kind in ["frequency", "seen-2", "tail"] {
            let config = AdmissionConfig {
                entries_max: 1_000,
                ..kind.parse::<AdmissionKind>().unwrap().into()
            };
            let mut admission = Admission::new(&config);
            for name in 0..100_000 {
                admission.referenced([SequenceHash(name)].into_iter());
                offers(&mut admission, name);
            }
            assert!(admission.len() <= 1_000);
            assert!(admission.bytes() <= 64 * 1_000, "{}", admission.bytes());
        }
    }
}

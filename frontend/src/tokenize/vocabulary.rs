//! What each token of a tokenizer stands for, as bytes, looked up once when it is loaded.
//!
//! The decoders of byte-level and byte-fallback tokenizers map each token to bytes without regard
//! to its neighbours, so text can be produced by joining table entries. Other decoders (such as
//! `WordPiece`) are run through the tokenizer itself.

use std::{collections::HashMap, fmt};

use blockplane_protocol::TokenId;
use serde_json::Value;
use tokenizers::Tokenizer;

/// Stands for a space in `SentencePiece` vocabularies.
const METASPACE: char = '\u{2581}';

/// Bytes and attributes of every token.
pub(crate) struct Vocabulary {
    tokenizer: Tokenizer,
    scheme: Scheme,
    bytes: Vec<u8>,
    /// Entry `i` is `bytes[ends[i - 1]..ends[i]]`.
    ends: Vec<u32>,
    flags: Vec<u8>,
    replaces_each_byte: bool,
    /// Bytes of text that one token stands for at most, where every byte of a text is in a token.
    token_bytes_max: Option<usize>,
}

/// How tokens become text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// Joined table entries, with what is dropped at the start of the text.
    Table(Start),
    /// The tokenizer's own decoder over a sliding window.
    Window,
}

/// What a decoder drops at the start of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// Nothing.
    Keep,
    /// One space, if the text starts with it.
    DropSpace,
    /// Every metaspace of the first token.
    DropMetaspaces,
}

/// How much shorter composing its characters can make a text.
const NORMALISED_SHRINK_MAX: usize = 4;

const KNOWN: u8 = 1;
const SPECIAL: u8 = 2;
/// The entry is one byte that may be part of a character.
const RAW_BYTE: u8 = 4;

impl Vocabulary {
    /// Builds the table of `tokenizer`.
    pub(crate) fn new(tokenizer: Tokenizer) -> Self {
        let plan = DecoderPlan::of(&tokenizer);
        let mut vocabulary = Self {
            scheme: plan
                .as_ref()
                .map_or(Scheme::Window, |plan| Scheme::Table(plan.start)),
            bytes: Vec::new(),
            ends: Vec::new(),
            flags: Vec::new(),
            replaces_each_byte: plan.as_ref().is_some_and(|plan| plan.byte_fallback),
            token_bytes_max: None,
            tokenizer,
        };
        let byte_of_char = byte_of_char();
        let tokens = vocabulary.tokenizer.get_vocab(true);
        let entries = tokens.values().max().map_or(0, |&last| last as usize + 1);
        let mut names: Vec<Option<String>> = vec![None; entries];
        // The id decides: two spellings of one id resolve as the tokenizer resolves them.
        for &id in tokens.values() {
            names[id as usize] = vocabulary.tokenizer.id_to_token(id);
        }
        for name in names {
            let mut flags = 0;
            if let Some(name) = name {
                flags |= KNOWN;
                if vocabulary
                    .tokenizer
                    .get_added_vocabulary()
                    .is_special_token(&name)
                {
                    flags |= SPECIAL;
                }
                match plan.as_ref().map(|plan| plan.entry(&name, &byte_of_char)) {
                    Some(Entry::Text(text)) => vocabulary.bytes.extend_from_slice(&text),
                    Some(Entry::RawByte(byte)) => {
                        flags |= RAW_BYTE;
                        vocabulary.bytes.push(byte);
                    }
                    None => vocabulary.bytes.extend_from_slice(name.as_bytes()),
                }
            }
            let end = u32::try_from(vocabulary.bytes.len())
                .expect("a vocabulary file of more than 4 GiB is not loaded");
            vocabulary.ends.push(end);
            vocabulary.flags.push(flags);
        }
        if plan.is_some_and(|plan| plan.byte_level || plan.byte_fallback) {
            let starts = std::iter::once(0).chain(vocabulary.ends.iter().copied());
            let lengths = vocabulary
                .ends
                .iter()
                .zip(starts)
                .map(|(end, start)| end - start);
            // A normaliser may compose characters, which makes text shorter.
            let shrink = match vocabulary.tokenizer.get_normalizer() {
                None => 1,
                Some(_) => NORMALISED_SHRINK_MAX,
            };
            vocabulary.token_bytes_max = lengths.max().map(|bytes| bytes as usize * shrink);
        }
        vocabulary
    }

    pub(crate) fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Tokens that `text` has at least, without tokenising it.
    pub(crate) fn tokens_min(&self, text: &str) -> usize {
        self.token_bytes_max
            .map_or(0, |bytes| text.len() / bytes.max(1))
    }

    pub(crate) fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Bytes that `token` stands for; empty for an unknown one.
    pub(crate) fn bytes(&self, token: TokenId) -> &[u8] {
        let index = token as usize;
        let Some(&end) = self.ends.get(index) else {
            return &[];
        };
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start as usize..end as usize]
    }

    /// Whether `token` shows in text, given whether special tokens do.
    pub(crate) fn shows(&self, token: TokenId, skip_special: bool) -> bool {
        let flags = self.flags(token);
        flags & KNOWN != 0 && !(skip_special && flags & SPECIAL != 0)
    }

    /// Whether `token` is a single byte of a byte-fallback vocabulary.
    pub(crate) fn is_raw_byte(&self, token: TokenId) -> bool {
        self.flags(token) & RAW_BYTE != 0
    }

    /// Whether ill-formed bytes are shown one replacement character each (byte fallback) instead
    /// of one for each ill-formed sequence (byte level).
    pub(crate) fn replaces_each_byte(&self) -> bool {
        self.replaces_each_byte
    }

    /// `token` as text on its own, with U+FFFD where it is part of a character.
    pub(crate) fn display(&self, token: TokenId) -> String {
        String::from_utf8_lossy(self.bytes(token)).into_owned()
    }

    fn flags(&self, token: TokenId) -> u8 {
        self.flags.get(token as usize).copied().unwrap_or(0)
    }
}

impl fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vocabulary")
            .field("tokens", &self.ends.len())
            .field("scheme", &self.scheme)
            .finish_non_exhaustive()
    }
}

/// A decoder that works token by token.
struct DecoderPlan {
    byte_level: bool,
    byte_fallback: bool,
    /// Replacements applied to each token, in order.
    replace: Vec<(String, String)>,
    start: Start,
}

enum Entry {
    Text(Vec<u8>),
    RawByte(u8),
}

impl DecoderPlan {
    /// The plan of the tokenizer's decoder, or `None` where it does not work token by token.
    fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let decoder = serde_json::to_value(tokenizer.get_decoder()?).ok()?;
        let steps = match decoder["type"].as_str()? {
            "Sequence" => decoder["decoders"].as_array()?.clone(),
            _ => vec![decoder],
        };
        let mut plan = Self {
            byte_level: false,
            byte_fallback: false,
            replace: Vec::new(),
            start: Start::Keep,
        };
        let mut joined = false;
        for step in &steps {
            match (step["type"].as_str()?, joined) {
                ("ByteLevel", false) if !plan.byte_fallback => {
                    plan.byte_level = true;
                    joined = true;
                }
                ("ByteFallback", false) => plan.byte_fallback = true,
                ("Fuse", _) => joined = true,
                ("Replace", false) if !plan.byte_fallback => {
                    let pattern = step["pattern"]["String"].as_str()?;
                    plan.replace
                        .push((pattern.to_owned(), step["content"].as_str()?.to_owned()));
                }
                ("Metaspace", false) if steps.len() == 1 => {
                    let replacement = step["replacement"].as_str()?;
                    plan.replace.push((replacement.to_owned(), " ".to_owned()));
                    if replacement.chars().ne([METASPACE]) {
                        return None;
                    }
                    if step["prepend_scheme"].as_str() != Some("never") {
                        plan.start = Start::DropMetaspaces;
                    }
                }
                ("Strip", true) if !plan.byte_level => {
                    match (&step["content"], &step["start"], &step["stop"]) {
                        (Value::String(content), start, stop)
                            if content == " "
                                && stop.as_u64() == Some(0)
                                && plan.start == Start::Keep =>
                        {
                            match start.as_u64() {
                                Some(0) => {}
                                Some(1) => plan.start = Start::DropSpace,
                                _ => return None,
                            }
                        }
                        _ => return None,
                    }
                }
                _ => return None,
            }
        }
        Some(plan)
    }

    fn entry(&self, name: &str, byte_of_char: &HashMap<char, u8>) -> Entry {
        let mut text = name.to_owned();
        for (from, to) in &self.replace {
            text = text.replace(from, to);
        }
        if self.byte_fallback
            && let Some(hex) = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'))
            && hex.len() == 2
            && let Ok(byte) = u8::from_str_radix(hex, 16)
        {
            return Entry::RawByte(byte);
        }
        if self.byte_level
            && let Some(bytes) = text
                .chars()
                .map(|c| byte_of_char.get(&c).copied())
                .collect::<Option<Vec<u8>>>()
        {
            return Entry::Text(bytes);
        }
        Entry::Text(text.into_bytes())
    }
}

/// The byte-level alphabet: printable Latin-1 characters stand for themselves, the other bytes for
/// characters from U+0100 on.
fn byte_of_char() -> HashMap<char, u8> {
    let mut next = 0x100;
    (0..=u8::MAX)
        .map(|byte| {
            let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
            let c = if printable {
                char::from(byte)
            } else {
                let c = char::from_u32(next).expect("68 code points from U+0100 are characters");
                next += 1;
                c
            };
            (c, byte)
        })
        .collect()
}

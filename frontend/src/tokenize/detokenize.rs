//! Tokens to text as they come, never splitting a character.

use std::{str, sync::Arc};

use blockplane_protocol::TokenId;

use super::vocabulary::{Scheme, Start, Vocabulary};

/// Prompt tokens that a windowed decoder sees before the first generated one.
const WINDOW_PROMPT_TOKENS: usize = 8;

/// Turns the generated tokens of one request into text that continues its prompt.
///
/// The text of all tokens equals what the tokenizer's decoder makes of prompt and output together,
/// less the prompt's text. One case differs on purpose: a run of byte-fallback tokens that is not
/// UTF-8 as a whole keeps its complete characters, where the reference replaces the whole run;
/// text already sent cannot be taken back.
#[derive(Debug)]
pub(crate) struct Detokenizer {
    vocabulary: Arc<Vocabulary>,
    skip_special: bool,
    /// Nothing of the text is out yet, so what a decoder drops at the start is still to be dropped.
    at_start: bool,
    each_byte: bool,
    /// Bytes of a character that is not complete, at most 3.
    partial: Vec<u8>,
    window: Window,
}

/// State of decoders that need neighbours: tokens whose text is out, then tokens whose text is not.
#[derive(Debug, Default)]
struct Window {
    tokens: Vec<TokenId>,
    shown: usize,
}

impl Detokenizer {
    /// Text that continues `prompt`.
    pub(crate) fn new(vocabulary: Arc<Vocabulary>, prompt: &[TokenId], skip_special: bool) -> Self {
        let shows = |&&token: &&TokenId| vocabulary.shows(token, skip_special);
        let mut window = Window::default();
        let at_start = match vocabulary.scheme() {
            Scheme::Table(Start::Keep) => false,
            Scheme::Table(Start::DropMetaspaces) => !prompt.iter().any(|t| shows(&t)),
            Scheme::Table(Start::DropSpace) => !prompt
                .iter()
                .filter(shows)
                .any(|&token| !vocabulary.bytes(token).is_empty()),
            Scheme::Window => {
                let from = prompt.len().saturating_sub(WINDOW_PROMPT_TOKENS);
                window.tokens = prompt[from..].to_vec();
                window.shown = window.tokens.len();
                false
            }
        };
        Self {
            each_byte: vocabulary.replaces_each_byte(),
            vocabulary,
            skip_special,
            at_start,
            partial: Vec::new(),
            window,
        }
    }

    /// Appends to `out` the text that `token` completes.
    pub(crate) fn push(&mut self, token: TokenId, out: &mut String) {
        if !self.vocabulary.shows(token, self.skip_special) {
            return;
        }
        match self.vocabulary.scheme() {
            Scheme::Table(start) => self.push_entry(token, start, out),
            Scheme::Window => {
                self.window.tokens.push(token);
                self.advance_window(false, out);
            }
        }
    }

    /// Appends what was held back: no further token comes.
    pub(crate) fn finish(&mut self, out: &mut String) {
        match self.vocabulary.scheme() {
            Scheme::Table(_) => self.replace_partial(out),
            Scheme::Window => self.advance_window(true, out),
        }
    }

    fn push_entry(&mut self, token: TokenId, start: Start, out: &mut String) {
        let vocabulary = Arc::clone(&self.vocabulary);
        let mut bytes = vocabulary.bytes(token);
        let without_spaces: Vec<u8>;
        if self.at_start {
            match start {
                Start::Keep => {}
                Start::DropSpace => {
                    self.at_start = bytes.is_empty();
                    bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
                }
                Start::DropMetaspaces => {
                    self.at_start = false;
                    let name = vocabulary.tokenizer().id_to_token(token);
                    without_spaces = name
                        .unwrap_or_default()
                        .replace('\u{2581}', "")
                        .into_bytes();
                    bytes = &without_spaces;
                }
            }
        }
        if self.each_byte && !vocabulary.is_raw_byte(token) {
            // A run of byte tokens ends here; what it left incomplete stays so.
            self.replace_partial(out);
        }
        if self.partial.is_empty() {
            self.push_bytes(bytes, out);
        } else {
            let mut joined = std::mem::take(&mut self.partial);
            joined.extend_from_slice(bytes);
            self.push_bytes(&joined, out);
        }
    }

    fn push_bytes(&mut self, mut bytes: &[u8], out: &mut String) {
        loop {
            match str::from_utf8(bytes) {
                Ok(text) => {
                    out.push_str(text);
                    return;
                }
                Err(error) => {
                    let (valid, rest) = bytes.split_at(error.valid_up_to());
                    out.push_str(str::from_utf8(valid).unwrap_or_default());
                    let Some(ill_formed) = error.error_len() else {
                        self.partial = rest.to_vec();
                        return;
                    };
                    let marks = if self.each_byte { ill_formed } else { 1 };
                    out.extend(std::iter::repeat_n(char::REPLACEMENT_CHARACTER, marks));
                    bytes = &rest[ill_formed..];
                }
            }
        }
    }

    fn replace_partial(&mut self, out: &mut String) {
        let marks = if self.each_byte {
            self.partial.len()
        } else {
            usize::from(!self.partial.is_empty())
        };
        out.extend(std::iter::repeat_n(char::REPLACEMENT_CHARACTER, marks));
        self.partial.clear();
    }

    fn advance_window(&mut self, last: bool, out: &mut String) {
        let window = &mut self.window;
        let decode = |tokens: &[TokenId]| {
            self.vocabulary
                .tokenizer()
                .decode(tokens, self.skip_special)
                .unwrap_or_default()
        };
        let before = decode(&window.tokens[..window.shown]);
        let after = decode(&window.tokens);
        let complete = last || !after.ends_with(char::REPLACEMENT_CHARACTER);
        if complete
            && let Some(new) = after.strip_prefix(before.as_str())
            && !new.is_empty()
        {
            out.push_str(new);
            window.tokens.drain(..window.shown);
            window.shown = window.tokens.len();
        }
    }
}

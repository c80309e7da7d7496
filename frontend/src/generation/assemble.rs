//! Frames of tokens to pieces of text. Pure: no I/O, no clock.

use std::{collections::VecDeque, sync::Arc};

use blockplane_protocol::{FinishReason, TokenFrame, TokenId, TokenOutput, Usage};

use super::stop::StopMatcher;
use crate::tokenize::{Detokenizer, Vocabulary};

/// Text that is certain, with the tokens it came from.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Piece {
    pub(crate) text: String,
    /// The tokens, when log-probabilities are wanted.
    pub(crate) tokens: Vec<TokenLog>,
    /// Set on the last piece.
    pub(crate) finish: Option<Finish>,
}

/// A token and where its text starts.
#[derive(Debug, PartialEq)]
pub(crate) struct TokenLog {
    pub(crate) output: TokenOutput,
    /// Characters of the generated text before it.
    pub(crate) offset: usize,
}

/// How a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Finish {
    pub(crate) reason: FinishReason,
    pub(crate) prompt_tokens: u32,
    pub(crate) completion_tokens: u32,
    pub(crate) cached_tokens: u32,
}

/// What the assembler needs to know of a request.
#[derive(Debug)]
pub(crate) struct AssemblerConfig<'a> {
    pub(crate) vocabulary: &'a Arc<Vocabulary>,
    pub(crate) prompt: &'a [TokenId],
    pub(crate) skip_special_tokens: bool,
    pub(crate) stop_strings: Vec<String>,
    /// Tokens that end the generation; they never show.
    pub(crate) end_tokens: Vec<TokenId>,
    pub(crate) logprobs: bool,
}

/// Turns the frames of one request into pieces.
#[derive(Debug)]
pub(crate) struct Assembler {
    detokenizer: Detokenizer,
    stop: StopMatcher,
    end_tokens: Vec<TokenId>,
    logs: Option<LogQueue>,
    prompt_tokens: u32,
    tokens_seen: u32,
    usage: Option<Usage>,
    /// Text of the token at hand; kept for its memory.
    fresh: String,
}

/// Tokens whose text is not out yet.
#[derive(Debug, Default)]
struct LogQueue {
    waiting: VecDeque<TokenLog>,
    /// Characters that the detokenizer gave.
    decoded_chars: usize,
    /// Characters that are out.
    shown_chars: usize,
}

impl Assembler {
    pub(crate) fn new(config: AssemblerConfig<'_>) -> Self {
        Self {
            detokenizer: Detokenizer::new(
                Arc::clone(config.vocabulary),
                config.prompt,
                config.skip_special_tokens,
            ),
            stop: StopMatcher::new(config.stop_strings),
            end_tokens: config.end_tokens,
            logs: config.logprobs.then(LogQueue::default),
            prompt_tokens: u32::try_from(config.prompt.len()).unwrap_or(u32::MAX),
            tokens_seen: 0,
            usage: None,
            fresh: String::new(),
        }
    }

    /// Takes a frame. The piece may be empty. After a piece with a finish nothing may be pushed.
    pub(crate) fn push(&mut self, frame: TokenFrame) -> Piece {
        let mut piece = Piece::default();
        if frame.usage.is_some() {
            self.usage = frame.usage;
        }
        for output in frame.tokens {
            self.tokens_seen = self.tokens_seen.saturating_add(1);
            if self.end_tokens.contains(&output.id) {
                continue;
            }
            self.fresh.clear();
            self.detokenizer.push(output.id, &mut self.fresh);
            if let Some(logs) = &mut self.logs {
                logs.push(output, &self.fresh);
            }
            if self.stop.feed(&self.fresh, &mut piece.text) {
                return self.stopped(piece);
            }
        }
        if let Some(reason) = frame.finish {
            self.fresh.clear();
            self.detokenizer.finish(&mut self.fresh);
            if self.stop.feed(&self.fresh, &mut piece.text) {
                return self.stopped(piece);
            }
            self.stop.finish(&mut piece.text);
            let completion = self.usage.as_ref().map(|usage| usage.completion_tokens);
            piece.finish = Some(self.finish(reason, completion.unwrap_or(self.tokens_seen)));
        }
        if let Some(logs) = &mut self.logs {
            logs.release(&mut piece);
        }
        piece
    }

    /// Tokens taken so far.
    pub(crate) fn tokens_seen(&self) -> u32 {
        self.tokens_seen
    }

    /// What the request has cost, as far as the worker said.
    pub(crate) fn usage(&self) -> Option<&Usage> {
        self.usage.as_ref()
    }

    /// The last piece after a stop string: the tokens of the cut text are not reported.
    fn stopped(&mut self, mut piece: Piece) -> Piece {
        if let Some(logs) = &mut self.logs {
            logs.release(&mut piece);
        }
        piece.finish = Some(self.finish(FinishReason::Stop, self.tokens_seen));
        piece
    }

    fn finish(&self, reason: FinishReason, completion_tokens: u32) -> Finish {
        let cached = self.usage.as_ref().map_or(0, |usage| usage.cached_tokens);
        Finish {
            reason,
            prompt_tokens: self.prompt_tokens,
            completion_tokens,
            cached_tokens: cached.min(self.prompt_tokens),
        }
    }
}

impl LogQueue {
    fn push(&mut self, output: TokenOutput, text: &str) {
        self.waiting.push_back(TokenLog {
            output,
            offset: self.decoded_chars,
        });
        self.decoded_chars += text.chars().count();
    }

    /// Moves the tokens that start in text that is out to `piece`; at a regular end, all.
    fn release(&mut self, piece: &mut Piece) {
        self.shown_chars += piece.text.chars().count();
        while let Some(log) = self
            .waiting
            .pop_front_if(|log| piece.finish.is_some() || log.offset < self.shown_chars)
        {
            piece.tokens.push(log);
        }
    }
}

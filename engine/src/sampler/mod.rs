//! Chooses tokens from logits.
//!
//! The steps and their order are those of vLLM: stop tokens are held back while there are fewer
//! than `min_tokens`, `logit_bias` is added, then come the repetition, frequency and presence
//! penalties; a temperature of 0 takes the likeliest token of what results. Otherwise the logits
//! are divided by the temperature and filtered by `min_p`, `top_k` and `top_p`, in this order, and
//! one random number picks a token. Log-probabilities are those of the model: before any of this.
//!
//! Everything is a function of the request: neither the other requests of a batch nor the worker
//! have an influence, and a [`SamplerState`] takes the random numbers to another process.

mod choose;
mod logprobs;
mod random;
#[cfg(test)]
mod tests;
mod weights;

use std::{borrow::Cow, collections::HashMap};

use blockplane_protocol::{SamplerState, SamplingParams, StopConditions, TokenId, TokenOutput};

use choose::Filters;

/// Temperatures below this are greedy: dividing by them would overflow.
const TEMPERATURE_MIN: f32 = 1e-5;

/// The sampler of one request.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    /// Alternatives to report; `None` reports no log-probability at all.
    logprobs: Option<usize>,
    state: SamplerState,
    generated: u32,
    /// How often each token was generated; empty for tokens of the prompt. Kept only for penalties.
    seen: HashMap<TokenId, u32>,
    /// Stop tokens, held back until so many tokens are generated.
    held_back: Vec<TokenId>,
    min_tokens: u32,
}

impl Sampler {
    /// A sampler at the start of a request with this prompt. `logprobs` asks for the
    /// log-probability of each token and of so many alternatives. `seed` decides all random
    /// numbers: the request's own, or one that the worker chose.
    #[must_use]
    pub fn new(
        params: &SamplingParams,
        logprobs: Option<u32>,
        seed: u64,
        prompt: &[TokenId],
    ) -> Self {
        let mut sampler = Self {
            params: params.clone(),
            logprobs: logprobs.map(|n| n as usize),
            state: SamplerState { seed, draws: 0 },
            generated: 0,
            seen: HashMap::new(),
            held_back: Vec::new(),
            min_tokens: 0,
        };
        if sampler.repeats_matter() {
            sampler.seen = prompt.iter().map(|&token| (token, 0)).collect();
        }
        sampler
    }

    /// Holds the model's end tokens and the request's stop tokens back until `stop.min_tokens`
    /// tokens are generated. The end tokens are held back with `ignore_eos`, too.
    #[must_use]
    pub fn with_min_tokens(mut self, stop: &StopConditions, eos: &[TokenId]) -> Self {
        if stop.min_tokens > 0 {
            self.min_tokens = stop.min_tokens;
            self.held_back = eos.iter().chain(&stop.stop_token_ids).copied().collect();
        }
        self
    }

    /// Goes on where another sampler stopped, which had generated `tokens` since the prompt.
    pub fn resume(&mut self, state: SamplerState, tokens: &[TokenId]) {
        tokens.iter().for_each(|&token| self.record(token));
        self.state = state;
    }

    /// Where the random numbers stand, for [`Sampler::resume`].
    #[must_use]
    pub fn state(&self) -> SamplerState {
        self.state
    }

    /// Chooses the next token. `logits` has one value per token of the vocabulary; one that is not
    /// a number counts as minus infinity. When no token is possible the first one is chosen, and an
    /// error is logged: the model is broken, not the request.
    pub fn sample(&mut self, logits: &[f32]) -> TokenOutput {
        let adjusted = self.adjust(logits);
        let id = if self.params.temperature < TEMPERATURE_MIN {
            choose::likeliest(&adjusted)
        } else {
            let random = random::uniform(self.state);
            choose::at_random(&adjusted, Filters::of(&self.params), random)
        };
        drop(adjusted);
        self.state.draws += 1;
        let id = id.unwrap_or_else(|| {
            tracing::error!("no logit is a finite number; the first token is taken");
            0
        });
        self.record(id);
        match self.logprobs {
            Some(alternatives) => logprobs::output(logits, id, alternatives),
            None => TokenOutput {
                id,
                logprob: None,
                top: Vec::new(),
            },
        }
    }

    /// The logits after stop tokens are held back, the bias and the penalties.
    fn adjust<'a>(&self, logits: &'a [f32]) -> Cow<'a, [f32]> {
        let holds_back = self.generated < self.min_tokens && !self.held_back.is_empty();
        if !holds_back && self.params.logit_bias.is_empty() && self.seen.is_empty() {
            return Cow::Borrowed(logits);
        }
        let mut logits = logits.to_vec();
        for &(token, bias) in &self.params.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        for (&token, &count) in &self.seen {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = self.penalised(*logit, count);
            }
        }
        if holds_back {
            for &token in &self.held_back {
                if let Some(logit) = logits.get_mut(token as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        Cow::Owned(logits)
    }

    /// The logit of a token of the prompt or the output that was generated `count` times.
    fn penalised(&self, logit: f32, count: u32) -> f32 {
        let penalty = self.params.repetition_penalty;
        let logit = if logit > 0.0 {
            logit / penalty
        } else {
            logit * penalty
        };
        if count == 0 {
            return logit;
        }
        #[expect(clippy::cast_precision_loss, reason = "far fewer than 2^24 tokens")]
        let count = count as f32;
        logit - count * self.params.frequency_penalty - self.params.presence_penalty
    }

    fn record(&mut self, token: TokenId) {
        self.generated += 1;
        if self.repeats_matter() {
            *self.seen.entry(token).or_default() += 1;
        }
    }

    #[expect(clippy::float_cmp, reason = "these values are exactly 'off'")]
    fn repeats_matter(&self) -> bool {
        self.params.repetition_penalty != 1.0
            || self.params.frequency_penalty != 0.0
            || self.params.presence_penalty != 0.0
    }
}

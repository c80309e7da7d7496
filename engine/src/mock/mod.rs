//! An engine that computes nothing and takes the time that computing would.
//!
//! Requests, blocks, prefix cache, events, preemption and hand-off are those of the native engine;
//! only the model is replaced. What it writes into a block names the token, its position and
//! everything before it, and it checks that on reading: a block that is missing, late, torn or of
//! another sequence ends the request with an error. Its tokens are a function of the tokens before
//! them ([`MockModel::expected_tokens`]), whatever the sampling, so that a test knows what a
//! request must get after a hand-off or a migration.

mod forward;
mod kv;
#[cfg(test)]
mod tests;
mod timing;

use std::{sync::Arc, time::Duration};

use blockplane_kvbm::EventFeed;
use blockplane_protocol::{
    DpRank, GenerateError, GenerateRequest, KvLayout, LoadReport, PrefillJob, TokenId, WorkerRole,
};
use blockplane_transfer::Agent;
use futures::future::BoxFuture;

use crate::{
    engine::{Engine, EngineInfo, Health},
    error::StartError,
    native::{Forward, ModelFacts, NativeConfig, NativeEngine, PoolSize, RankShared, attach},
    stream::{PrefillTicket, TokenStream},
};
use forward::MockForward;
pub use timing::MockTiming;

/// Configuration of a [`MockEngine`]. Start from [`MockConfig::new`].
#[derive(Clone, Debug)]
pub struct MockConfig {
    /// Everything that does not depend on the model.
    pub engine: NativeConfig,
    /// What the mock pretends to be.
    pub model: MockModel,
    /// How long it takes.
    pub timing: MockTiming,
}

/// What a mock pretends to be. Workers that exchange blocks need the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MockModel {
    /// Layers; each is handed over on its own. A token takes 32 bytes of each. Default 2.
    pub layers: u32,
    /// Size of the vocabulary, at least 1 more than `eos_token_ids`. Default 32,000.
    pub vocab_size: u32,
    /// Longest sequence. Default 131,072.
    pub context_tokens_max: u32,
    /// End tokens. The mock never generates one. Default none.
    pub eos_token_ids: Vec<TokenId>,
    /// Check all KV of a sequence in each step, which takes about 10 ns for each token before and
    /// layer; without it only what the next token is computed from is checked. Default `true`.
    pub verify_kv: bool,
}

/// The engine. See the module documentation.
#[derive(Debug)]
pub struct MockEngine {
    engine: Arc<NativeEngine>,
}

impl MockConfig {
    /// The defaults for this model name, role and agent, with 4,096 blocks per rank.
    #[must_use]
    pub fn new(model_name: impl Into<String>, role: WorkerRole, agent: Agent) -> Self {
        let mut engine = NativeConfig::new(model_name, role, agent);
        engine.pool = PoolSize::Blocks(4_096);
        Self {
            engine,
            model: MockModel::default(),
            timing: MockTiming::default(),
        }
    }
}

impl MockEngine {
    /// Allocates the pools and starts a thread for each rank.
    ///
    /// # Errors
    /// When the configuration contradicts itself, or memory or threads cannot be had.
    pub fn start(config: MockConfig) -> Result<Self, StartError> {
        let MockConfig {
            engine,
            model,
            timing,
        } = config;
        model.validate()?;
        timing.validate()?;
        let facts = ModelFacts {
            layout: model.kv_layout(engine.block_tokens),
            fingerprint: model.kv_fingerprint(&engine.model_name),
            context_tokens_max: model.context_tokens_max,
            vocab_size: model.vocab_size,
            eos_token_ids: model.eos_token_ids.clone(),
        };
        let mut make_forward = || -> Result<Box<dyn Forward>, StartError> {
            Ok(Box::new(MockForward::new(model.clone(), timing)))
        };
        let below = |rank: &RankShared| attach(&engine, rank);
        let engine = NativeEngine::start_with(&engine, facts, &mut make_forward, &below)?;
        Ok(Self { engine })
    }
}

impl MockModel {
    /// The `count` tokens that follow `prompt`.
    #[must_use]
    pub fn expected_tokens(&self, prompt: &[TokenId], count: usize) -> Vec<TokenId> {
        let mut chain = kv::START;
        let mut tokens = prompt.to_vec();
        let mut known = 0;
        for _ in 0..count {
            for (position, &token) in (0..).zip(&tokens).skip(known) {
                chain = kv::extend(chain, position, token);
            }
            known = tokens.len();
            tokens.push(self.next_token(chain));
        }
        tokens.split_off(prompt.len())
    }

    /// The layout of its KV blocks of `block_tokens` tokens.
    #[must_use]
    pub fn kv_layout(&self, block_tokens: u32) -> KvLayout {
        kv::layout(self.layers, block_tokens)
    }

    /// Names what it keeps in its blocks when it is served under `name`.
    #[must_use]
    pub fn kv_fingerprint(&self, name: &str) -> u64 {
        kv::fingerprint(name, self.vocab_size)
    }

    /// The token after everything that `chain` stands for.
    fn next_token(&self, chain: u64) -> TokenId {
        let mut token = chain % u64::from(self.vocab_size);
        loop {
            let id = TokenId::try_from(token).expect("below the vocabulary");
            if !self.eos_token_ids.contains(&id) {
                return id;
            }
            token = (token + 1) % u64::from(self.vocab_size);
        }
    }

    fn validate(&self) -> Result<(), StartError> {
        let fault = |name, value: u32, accepted: String| {
            Err(StartError::Config {
                name,
                value: value.to_string(),
                accepted,
            })
        };
        if self.layers == 0 {
            return fault("layers", self.layers, "1 or more".to_owned());
        }
        if self.vocab_size as usize <= self.eos_token_ids.len() {
            let accepted = format!(
                "more than the {} end tokens, which it never generates",
                self.eos_token_ids.len()
            );
            return fault("vocab_size", self.vocab_size, accepted);
        }
        if self.context_tokens_max < 2 {
            let accepted = "2 or more".to_owned();
            return fault("context_tokens_max", self.context_tokens_max, accepted);
        }
        Ok(())
    }
}

impl Default for MockModel {
    fn default() -> Self {
        Self {
            layers: 2,
            vocab_size: 32_000,
            context_tokens_max: 131_072,
            eos_token_ids: Vec::new(),
            verify_kv: true,
        }
    }
}

impl Engine for MockEngine {
    fn info(&self) -> &EngineInfo {
        self.engine.info()
    }

    fn generate(&self, request: GenerateRequest) -> Result<TokenStream, GenerateError> {
        self.engine.generate(request)
    }

    fn prefill(&self, job: PrefillJob) -> Result<PrefillTicket, GenerateError> {
        self.engine.prefill(job)
    }

    fn load(&self) -> Vec<LoadReport> {
        self.engine.load()
    }

    fn events(&self, rank: DpRank) -> Option<EventFeed> {
        self.engine.events(rank)
    }

    fn drain(&self, grace: Duration) -> BoxFuture<'static, ()> {
        self.engine.drain(grace)
    }

    fn health(&self) -> Health {
        self.engine.health()
    }
}

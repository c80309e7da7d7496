//! Engines: what computes tokens.
//!
//! * [`engine`]: the [`Engine`] trait, the only thing that workers know of an engine, and
//!   [`RemotePrefill`], the only thing that a decode engine knows of prefill workers.
//! * [`native`]: the engine that computes on this machine, and [`disagg`]: how two of them share a
//!   request.
//! * [`mock`]: the same engine with a model that only takes time.
//! * [`vllm`]: a vLLM server as an engine.
//! * [`scheduler`]: what to compute next; [`sampler`]: which token; both pure.
//! * [`model`]: transformers from Hugging Face checkpoints; [`ops`]: what they compute with.
//! * [`stream`]: the two ends of a running request.
//! * [`error`]: why a request is not taken.
//!
//! A worker (`launcher`) starts an engine and serves it over RPC. Nothing here knows about RPC,
//! discovery or text, and nothing serves HTTP: an engine takes token ids and gives token ids.

pub mod disagg;
pub mod engine;
pub mod error;
pub mod mock;
pub mod model;
pub mod native;
pub mod ops;
pub mod sampler;
pub mod scheduler;
pub mod stream;
pub mod vllm;

pub use disagg::HandoffConfig;
pub use engine::{Engine, EngineInfo, Health, RemotePrefill};
pub use error::{RequestError, StartError, validate, validate_parameters};
pub use mock::{MockConfig, MockEngine, MockModel, MockTiming};
pub use native::{NativeConfig, NativeEngine, PoolSize, TierHandle};
pub use scheduler::SchedulerConfig;
pub use stream::{
    PrefillSender, PrefillTicket, TokenSender, TokenStream, prefill_channel, token_channel,
};
pub use vllm::{VllmConfig, VllmEngine, VllmError, VllmSource};

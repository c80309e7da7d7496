//! The shared vocabulary of blockplane: token blocks and their hashes, ids, KV layouts, KV events,
//! requests, load reports, and the codec that puts them on a wire.
//!
//! Every other crate may depend on this one. It may depend on nothing that does I/O, reads a clock,
//! or spawns a task, so that anything built on it can be simulated.
#![forbid(unsafe_code)]

pub mod codec;
pub mod endpoint;
pub mod feed;
pub mod handoff;
pub mod hash;
pub mod id;
pub mod kv_event;
pub mod layout;
pub mod load;
pub mod model;
pub mod request;
pub mod token;

pub use endpoint::{EndpointId, EndpointParseError};
pub use feed::{FeedItem, FeedRequest, SnapshotBlock};
pub use handoff::{
    ConnectorTarget, KvTarget, PrefillDone, PrefillJob, PrefillReply, PrefillTarget, SamplerState,
};
pub use hash::{BlockHash, PositionalHash, SaltHash, SequenceHash};
pub use id::{BlockId, DpRank, LayerIndex, RequestId, WorkerId, WorkerRank};
pub use kv_event::{KvEvent, KvEventData, StoredBlock, Tier};
pub use layout::{AttentionGroup, AttentionKind, DType, KvLayout, LayoutError, LayoutOrder};
pub use load::{EventsReport, LoadReport, LowerTiers};
pub use model::{ModelCard, WorkerRole};
pub use request::{
    ErrorKind, FinishReason, GenerateError, GenerateRequest, PRIORITY_MAX, PrefillHint, RouteHints,
    SamplingParams, StopConditions, TokenFrame, TokenLogprob, TokenOutput, Usage,
};
pub use token::{TokenBlock, TokenId, TokenSequence};

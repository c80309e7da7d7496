//! What a decode worker and a prefill worker tell each other about one request.
//!
//! 1. The decode worker allocates blocks for the prompt, opens a transfer window over the ones to
//!    fill, and sends a [`PrefillJob`] that says where they are.
//! 2. The prefill worker computes, writes the KV into those blocks, and binds a [`PrefillDone`] to
//!    the last write, so that it arrives after every byte.
//! 3. The [`PrefillReply`] on the control connection only reports what was done; the decode worker
//!    goes on as soon as the `PrefillDone` is there.
//!
//! An engine that is a server of its own kind may have a connector that moves KV by itself. Then the
//! job names no blocks but what the servers have to have in common ([`ConnectorTarget`]), the reply
//! carries the connector's own parameters, and the decode worker gives them to its server.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    id::{BlockId, RequestId},
    layout::KvLayout,
    request::{GenerateRequest, TokenOutput},
};

/// A prompt to compute, and where its KV shall go.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrefillJob {
    /// The request as the decode worker received it, with what is left of its deadline, the seed
    /// chosen, and `route.rank` naming the rank of the prefill worker.
    pub request: GenerateRequest,
    /// Where the KV shall go.
    #[serde(flatten)]
    pub target: PrefillTarget,
}

/// How the KV of a [`PrefillJob`] gets to the decode worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum PrefillTarget {
    /// The prefill worker writes it into these blocks.
    #[serde(rename = "target")]
    Blocks(KvTarget),
    /// The decode worker's engine fetches it with a connector of its own.
    #[serde(rename = "connector")]
    Connector(ConnectorTarget),
}

/// The decode worker's side of a connector.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectorTarget {
    /// What two servers need to have the same to hand KV to each other, in words. The prefill worker
    /// refuses a job whose identity is not its own.
    pub identity: String,
}

/// The decode worker's blocks for one prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KvTarget {
    /// Metadata of the decode worker's transfer agent, as it encodes itself.
    pub agent: Bytes,
    /// The registered region that holds the pool.
    pub region: u64,
    /// The grant under which the blocks may be written; also names this attempt in
    /// [`PrefillDone`].
    pub window: u64,
    /// Shape of the pool.
    pub layout: KvLayout,
    /// Blocks of the pool.
    pub pool_blocks: u32,
    /// Identity of the model whose KV this is; KV of another model is refused.
    pub model_fingerprint: u64,
    /// The block of each `layout.block_tokens` tokens of the prompt, the partial last one included.
    pub block_ids: Vec<BlockId>,
    /// This many of the first `block_ids` already hold their KV. They may be read and must not be
    /// written.
    pub cached_blocks: u32,
    /// The grant under which those may be read; present when there are any.
    #[serde(default)]
    pub cached_window: Option<u64>,
}

/// Bound to the last write: the KV of the whole prompt is in place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrefillDone {
    /// The request.
    pub request_id: RequestId,
    /// The attempt: [`KvTarget::window`].
    pub window: u64,
    /// The first generated token, with its log-probabilities if asked for.
    pub first: TokenOutput,
    /// Where the sampler stands after that token.
    pub sampler: SamplerState,
    /// What the prefill worker did.
    pub reply: PrefillReply,
}

/// State of a request's random numbers, so that another process can go on where one stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SamplerState {
    /// The request's seed.
    pub seed: u64,
    /// Tokens drawn so far.
    pub draws: u64,
}

/// What a prefill worker did for a [`PrefillJob`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PrefillReply {
    /// Prompt tokens it computed.
    pub computed_tokens: u32,
    /// Blocks of the prompt it had in its own cache.
    pub cached_blocks: u32,
    /// Blocks it read from the decode worker instead of computing them.
    pub read_blocks: u32,
    /// Blocks it wrote to the decode worker.
    pub written_blocks: u32,
    /// Bytes it wrote to the decode worker.
    pub written_bytes: u64,
    /// Those of them that were in place when the last layer of the prompt was computed.
    pub overlapped_bytes: u64,
    /// The lane that they took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lane: Option<String>,
    /// For a [`ConnectorTarget`]: the parameters by which the decode worker's engine finds the KV, as
    /// JSON of the connector's. `None` where there is nothing to fetch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_transfer_params: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{codec, layout::DType, request::RouteHints};

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct FirstForm {
        request: GenerateRequest,
        target: KvTarget,
    }

    fn request() -> GenerateRequest {
        GenerateRequest {
            request_id: RequestId("r".to_owned()),
            model: "m".to_owned(),
            token_ids: vec![1, 2, 3],
            sampling: crate::request::SamplingParams::default(),
            stop: crate::request::StopConditions::default(),
            logprobs: None,
            cache_salt: None,
            lora_name: None,
            priority: None,
            deadline_ms: 5,
            route: RouteHints::default(),
        }
    }

    #[test]
    fn a_job_with_blocks_is_on_the_wire_what_it_was_before_there_were_connectors() {
        let target = KvTarget {
            agent: Bytes::from_static(&[0, 255, 1]),
            region: u64::MAX,
            window: 7,
            layout: KvLayout::dense(2, 1, 8, 16, DType::Bf16),
            pool_blocks: 9,
            model_fingerprint: u64::MAX - 1,
            block_ids: vec![BlockId(3)],
            cached_blocks: 0,
            cached_window: None,
        };
        let first = FirstForm {
            request: request(),
            target: target.clone(),
        };
        let job = PrefillJob {
            request: request(),
            target: PrefillTarget::Blocks(target),
        };
        assert_eq!(
            codec::decode::<PrefillJob>(&codec::encode(&first)).unwrap(),
            job
        );
        assert_eq!(
            codec::decode::<FirstForm>(&codec::encode(&job)).unwrap(),
            first
        );
    }

    #[test]
    fn a_job_for_a_connector_is_refused_by_those_who_do_not_know_it() {
        let job = PrefillJob {
            request: request(),
            target: PrefillTarget::Connector(ConnectorTarget {
                identity: "vLLM 1".to_owned(),
            }),
        };
        let bytes = codec::encode(&job);
        assert_eq!(codec::decode::<PrefillJob>(&bytes).unwrap(), job);
        assert!(codec::decode::<FirstForm>(&bytes).is_err());
    }
}

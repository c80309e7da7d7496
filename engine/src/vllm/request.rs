//! Our requests in vLLM's words.
//!
//! vLLM takes tokens over two routes: `/inference/v1/generate`, whose parameters are those of its
//! engine, and `/v1/completions` with a prompt of token ids. What is sent is the same but for names.

use std::collections::BTreeMap;

use blockplane_protocol::{GenerateRequest, TokenId};
use serde::Serialize;
use serde_json::value::RawValue;

use super::facts::Route;

/// Longest `cache_salt` that vLLM accepts.
pub(crate) const CACHE_SALT_CHARS_MAX: usize = 1_024;

/// What kind of answer is wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Purpose<'a> {
    /// Tokens as they come, over KV that a prefill server holds if there are parameters of its.
    Generate {
        /// The prefill server's `kv_transfer_params`, as it wrote them.
        kv: Option<&'a RawValue>,
    },
    /// KV for a decode server: one token, which nobody reads, and where the KV is.
    Prefill,
    /// Tokens in one piece, to see whether any come.
    Canary,
}

/// What the server is, as far as a request depends on it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target<'a> {
    /// The way in.
    pub(crate) route: Route,
    /// Its name for the model.
    pub(crate) model: &'a str,
    /// Longest sequence.
    pub(crate) context_tokens_max: u32,
    /// It orders its requests by priority.
    pub(crate) by_priority: bool,
}

#[derive(Serialize)]
struct GenerateBody<'a> {
    model: &'a str,
    token_ids: &'a [TokenId],
    sampling_params: EngineSampling<'a>,
    #[serde(flatten)]
    common: Common<'a>,
}

#[derive(Serialize)]
struct CompletionBody<'a> {
    model: &'a str,
    prompt: &'a [TokenId],
    return_token_ids: bool,
    return_tokens_as_token_ids: bool,
    #[serde(flatten)]
    sampling: Sampling<'a>,
    #[serde(flatten)]
    common: Common<'a>,
}

#[derive(Serialize)]
struct EngineSampling<'a> {
    #[serde(flatten)]
    sampling: Sampling<'a>,
    detokenize: bool,
}

/// Outside the sampling parameters on both routes.
#[derive(Serialize)]
struct Common<'a> {
    stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cache_salt: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    priority: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_transfer_params: Option<KvParams<'a>>,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

/// Everything that has a default of its own in vLLM, or in the model's `generation_config.json`, is
/// said: what is left out would be decided there.
#[derive(Serialize)]
struct Sampling<'a> {
    temperature: f32,
    top_p: f32,
    top_k: u32,
    min_p: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    repetition_penalty: f32,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    logit_bias: BTreeMap<TokenId, f32>,
    max_tokens: u32,
    min_tokens: u32,
    stop_token_ids: &'a [TokenId],
    ignore_eos: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<u32>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum KvParams<'a> {
    Given(&'a RawValue),
    Wanted(RemoteDecode),
}

/// Asks a server to keep the KV of a prompt for another one. Connectors look for every field.
#[derive(Serialize)]
struct RemoteDecode {
    do_remote_decode: bool,
    do_remote_prefill: bool,
    remote_engine_id: Option<()>,
    remote_block_ids: Option<()>,
    remote_host: Option<()>,
    remote_port: Option<()>,
}

/// The body of the request to `target.route`.
pub(crate) fn body(
    request: &GenerateRequest,
    target: &Target<'_>,
    purpose: Purpose<'_>,
) -> Vec<u8> {
    let adapter = request.lora_name.as_deref().filter(|name| !name.is_empty());
    let model = adapter.unwrap_or(target.model);
    let stream = matches!(purpose, Purpose::Generate { .. });
    let common = Common {
        stream,
        stream_options: stream.then_some(StreamOptions {
            include_usage: true,
        }),
        cache_salt: request
            .cache_salt
            .as_deref()
            .filter(|salt| !salt.is_empty()),
        // vLLM takes the lowest first, and refuses any where it does not order by priority.
        priority: request
            .priority
            .filter(|_| target.by_priority)
            .map(|priority| -i64::from(priority)),
        kv_transfer_params: match purpose {
            Purpose::Generate { kv } => kv.map(KvParams::Given),
            Purpose::Canary => None,
            Purpose::Prefill => Some(KvParams::Wanted(RemoteDecode {
                do_remote_decode: true,
                do_remote_prefill: false,
                remote_engine_id: None,
                remote_block_ids: None,
                remote_host: None,
                remote_port: None,
            })),
        },
    };
    let sampling = sampling(request, target, !matches!(purpose, Purpose::Prefill));
    let written = match target.route {
        Route::Generate => serde_json::to_vec(&GenerateBody {
            model,
            token_ids: &request.token_ids,
            sampling_params: EngineSampling {
                sampling,
                detokenize: false,
            },
            common,
        }),
        Route::Completions => serde_json::to_vec(&CompletionBody {
            model,
            prompt: &request.token_ids,
            return_token_ids: true,
            return_tokens_as_token_ids: true,
            sampling,
            common,
        }),
    };
    written.expect("plain data is JSON")
}

/// The headers of a request that vLLM shall call `name`.
pub(crate) fn headers(name: &str, rank: Option<u32>) -> Vec<(&'static str, String)> {
    // Anything that is not a header value would make the whole request fail.
    let name = name.chars().filter(char::is_ascii_graphic).collect();
    let mut headers = vec![("x-request-id", name)];
    headers.extend(rank.map(|rank| ("x-data-parallel-rank", rank.to_string())));
    headers
}

fn sampling<'a>(request: &'a GenerateRequest, target: &Target<'_>, generate: bool) -> Sampling<'a> {
    let (sampling, stop) = (&request.sampling, &request.stop);
    let prompt = u32::try_from(request.token_ids.len()).unwrap_or(u32::MAX);
    // vLLM refuses what does not fit; here it ends the generation with `length`.
    let room = target.context_tokens_max.saturating_sub(prompt).max(1);
    let max_tokens = stop.max_tokens.min(room);
    Sampling {
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        top_k: sampling.top_k,
        min_p: sampling.min_p,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        repetition_penalty: sampling.repetition_penalty,
        // Greedy draws nothing. One of the routes takes signed numbers only.
        seed: sampling
            .seed
            .filter(|_| sampling.temperature > 0.0)
            .map(|seed| seed & i64::MAX.unsigned_abs()),
        logit_bias: sampling.logit_bias.iter().copied().collect(),
        max_tokens: if generate { max_tokens } else { 1 },
        min_tokens: if generate {
            stop.min_tokens.min(max_tokens)
        } else {
            0
        },
        stop_token_ids: if generate { &stop.stop_token_ids } else { &[] },
        // A prefill that ends in an end token would give its blocks back at once.
        ignore_eos: stop.ignore_eos || !generate,
        logprobs: request.logprobs.filter(|_| generate),
    }
}

#[cfg(test)]
mod tests {
    use blockplane_protocol::{RequestId, RouteHints, SamplingParams, StopConditions};
    use serde_json::{Value, json};

    use super::*;

    const TARGET: Target<'_> = Target {
        route: Route::Generate,
        model: "served",
        context_tokens_max: 100,
        by_priority: false,
    };

    fn request() -> GenerateRequest {
        GenerateRequest {
            request_id: RequestId("r".to_owned()),
            model: "ours".to_owned(),
            token_ids: vec![1, 2, 3],
            sampling: SamplingParams {
                temperature: 0.7,
                top_p: 0.9,
                top_k: 40,
                min_p: 0.05,
                seed: Some(u64::MAX),
                presence_penalty: 0.5,
                frequency_penalty: -0.5,
                repetition_penalty: 1.25,
                logit_bias: vec![(7, 1.5), (9, -100.0)],
            },
            stop: StopConditions {
                max_tokens: 12,
                min_tokens: 4,
                stop_token_ids: vec![11],
                ignore_eos: true,
            },
            logprobs: Some(3),
            cache_salt: Some("tenant".to_owned()),
            lora_name: None,
            priority: Some(5),
            deadline_ms: 1_000,
            route: RouteHints::default(),
        }
    }

    fn sent(request: &GenerateRequest, target: &Target<'_>, purpose: Purpose<'_>) -> Value {
        serde_json::from_slice(&body(request, target, purpose)).unwrap()
    }

    #[test]
    fn every_parameter_has_its_place_on_the_generate_route() {
        let purpose = Purpose::Generate { kv: None };
        let body = sent(&request(), &TARGET, purpose);
        assert_eq!(
            body,
            json!({
                "model": "served",
                "token_ids": [1, 2, 3],
                "sampling_params": {
                    "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05,
                    "presence_penalty": 0.5, "frequency_penalty": -0.5,
                    "repetition_penalty": 1.25, "seed": i64::MAX,
                    "logit_bias": {"7": 1.5, "9": -100.0},
                    "max_tokens": 12, "min_tokens": 4, "stop_token_ids": [11],
                    "ignore_eos": true, "logprobs": 3, "detokenize": false,
                },
                "stream": true,
                "stream_options": {"include_usage": true},
                "cache_salt": "tenant",
            })
        );
        let by_priority = Target {
            by_priority: true,
            ..TARGET
        };
        assert_eq!(sent(&request(), &by_priority, purpose)["priority"], -5);
    }

    #[test]
    fn the_completions_route_takes_the_same_beside_the_prompt() {
        let target = Target {
            route: Route::Completions,
            ..TARGET
        };
        let body = sent(&request(), &target, Purpose::Generate { kv: None });
        assert_eq!(body["prompt"], json!([1, 2, 3]));
        assert_eq!(body["return_token_ids"], true);
        assert_eq!(body["return_tokens_as_token_ids"], true);
        assert_eq!(body["temperature"], 0.7);
        assert_eq!(body["stop_token_ids"], json!([11]));
        assert_eq!(body["logprobs"], 3);
        assert!(body.get("sampling_params").is_none() && body.get("detokenize").is_none());
    }

    #[test]
    fn what_does_not_fit_the_context_is_cut_and_not_refused() {
        let mut request = request();
        request.stop.max_tokens = 1_000;
        request.stop.min_tokens = 500;
        let body = sent(&request, &TARGET, Purpose::Generate { kv: None });
        assert_eq!(body["sampling_params"]["max_tokens"], 97);
        assert_eq!(body["sampling_params"]["min_tokens"], 97);
    }

    #[test]
    fn greedy_needs_no_seed_and_an_adapter_is_a_model() {
        let mut request = request();
        request.sampling.temperature = 0.0;
        request.lora_name = Some("adapter".to_owned());
        request.cache_salt = Some(String::new());
        let body = sent(&request, &TARGET, Purpose::Generate { kv: None });
        assert_eq!(body["model"], "adapter");
        assert!(body["sampling_params"].get("seed").is_none());
        assert!(body.get("cache_salt").is_none());
    }

    #[test]
    fn a_prefill_asks_for_one_token_that_cannot_end_it_early() {
        let body = sent(&request(), &TARGET, Purpose::Prefill);
        let sampling = &body["sampling_params"];
        assert_eq!(sampling["max_tokens"], 1);
        assert_eq!(sampling["min_tokens"], 0);
        assert_eq!(sampling["ignore_eos"], true);
        assert_eq!(sampling["stop_token_ids"], json!([]));
        assert!(sampling.get("logprobs").is_none());
        assert_eq!(body["stream"], false);
        let kv = &body["kv_transfer_params"];
        assert_eq!(kv["do_remote_decode"], true);
        assert_eq!(kv["do_remote_prefill"], false);
        assert!(kv["remote_block_ids"].is_null() && kv.get("remote_block_ids").is_some());
    }

    #[test]
    fn parameters_of_a_prefill_server_are_passed_on_as_they_are() {
        let text = r#"{"remote_block_ids":[[1,2]],"expiry":1795231739.1234567,"x":{"b":1,"a":2}}"#;
        let kv: Box<RawValue> = serde_json::from_str(text).unwrap();
        let body = body(&request(), &TARGET, Purpose::Generate { kv: Some(&kv) });
        let body = String::from_utf8(body).unwrap();
        assert!(
            body.contains(&format!("\"kv_transfer_params\":{text}")),
            "{body}"
        );
    }

    #[test]
    fn a_request_id_becomes_a_header_whatever_it_holds() {
        let headers = headers("a\r\nb\u{e9}-1", Some(3));
        assert_eq!(headers[0], ("x-request-id", "ab-1".to_owned()));
        assert_eq!(headers[1], ("x-data-parallel-rank", "3".to_owned()));
    }
}

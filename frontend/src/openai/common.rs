//! Parameters that chat and plain completions share.

use blockplane_protocol::{PRIORITY_MAX, SamplingParams, StopConditions, TokenId};
use serde_json::Value;

use super::params::{Params, boolean};
use crate::{
    error::ApiError,
    generation::stop::{STOP_STRING_BYTES_MAX, STOP_STRINGS_MAX},
};

/// Most alternatives reported for each token.
pub(crate) const TOP_LOGPROBS_MAX: i64 = 20;

/// Most entries of `logit_bias`.
const LOGIT_BIAS_MAX: usize = 1024;

/// Most entries of `stop_token_ids`.
const STOP_TOKEN_IDS_MAX: usize = 128;

/// What a completion request asks for besides its prompt.
#[derive(Debug)]
pub(crate) struct CommonParams {
    pub(crate) model: String,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) sampling: SamplingParams,
    /// `max_tokens` is set once the prompt's length is known.
    pub(crate) stop: StopConditions,
    pub(crate) max_tokens: Option<MaxTokens>,
    pub(crate) stop_strings: Vec<String>,
    pub(crate) logprobs: Option<u32>,
    pub(crate) cache_salt: Option<String>,
    pub(crate) priority: Option<u32>,
    pub(crate) add_special_tokens: Option<bool>,
    pub(crate) skip_special_tokens: bool,
}

/// A limit on the output, with the name under which it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MaxTokens {
    pub(crate) tokens: u32,
    pub(crate) param: &'static str,
}

impl CommonParams {
    /// Reads everything but `max_tokens` and `logprobs`, which differ between the two routes.
    pub(crate) fn read(params: &Params) -> Result<Self, ApiError> {
        let model = params
            .string("model")?
            .filter(|name| !name.is_empty())
            .ok_or_else(|| ApiError::missing("model", "the name of a model; see /v1/models"))?
            .to_owned();
        if let Some(n) = params.get("n").filter(|n| n.as_i64() != Some(1)) {
            return Err(ApiError::value("n", n, "1; send several requests instead"));
        }
        let stream = params.boolean("stream")?.unwrap_or(false);
        if !stream && params.get("stream_options").is_some() {
            return Err(ApiError::invalid(
                "stream_options",
                "stream_options is accepted only when stream is true",
            ));
        }
        let include_usage = boolean(
            "stream_options.include_usage",
            params.nested("stream_options", "include_usage")?,
        )?;
        let cache_salt = match params.string("cache_salt")? {
            Some(salt) => Some(salt.to_owned()),
            None => match params.nested("nvext", "cache_salt")? {
                None => None,
                Some(Value::String(salt)) => Some(salt.clone()),
                Some(other) => return Err(ApiError::value("nvext.cache_salt", other, "a string")),
            },
        };
        reject_unsupported(params)?;
        Ok(Self {
            model,
            stream,
            include_usage: include_usage.unwrap_or(false),
            sampling: sampling(params)?,
            stop: stop_conditions(params)?,
            max_tokens: None,
            stop_strings: stop_strings(params)?,
            logprobs: None,
            cache_salt: cache_salt.filter(|salt| !salt.is_empty()),
            priority: priority(params)?,
            add_special_tokens: params.boolean("add_special_tokens")?,
            skip_special_tokens: params.boolean("skip_special_tokens")?.unwrap_or(true),
        })
    }
}

/// Dynamo's hint: how much the request's KV is worth, higher is more.
fn priority(params: &Params) -> Result<Option<u32>, ApiError> {
    const HINT: &str = "nvext.agent_hints.priority";
    // In vLLM it orders the queue, and lower comes first; 0 is what everybody has.
    if let Some(other) = params.get("priority").filter(|p| p.as_i64() != Some(0)) {
        let accepted = format!("0, or nothing: requests are served in turn. See {HINT}");
        return Err(ApiError::value("priority", other, &accepted));
    }
    let hints = match params.nested("nvext", "agent_hints")? {
        None => return Ok(None),
        Some(Value::Object(hints)) => hints,
        Some(other) => return Err(ApiError::value("nvext.agent_hints", other, "an object")),
    };
    let Some(value) = hints.get("priority").filter(|value| !value.is_null()) else {
        return Ok(None);
    };
    let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
    match number.filter(|number| *number <= PRIORITY_MAX) {
        Some(number) => Ok(Some(number)),
        None => {
            let accepted = format!("an integer from 0 to {PRIORITY_MAX}");
            Err(ApiError::value(HINT, value, &accepted))
        }
    }
}

/// Features whose absence would change the answer are refused rather than ignored.
fn reject_unsupported(params: &Params) -> Result<(), ApiError> {
    if let Some(kind) = params.nested("response_format", "type")?
        && kind != "text"
    {
        return Err(ApiError::unsupported(
            "response_format",
            format!("response_format of type {kind} is not supported here; accepted: \"text\""),
        ));
    }
    for name in [
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "structured_outputs",
    ] {
        if params.get(name).is_some() {
            return Err(ApiError::unsupported(
                name,
                format!("{name} is not supported here; leave it out"),
            ));
        }
    }
    Ok(())
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "values were checked to lie in ranges that f32 holds"
)]
fn sampling(params: &Params) -> Result<SamplingParams, ApiError> {
    let number = |name, accepted, default: f32| -> Result<f32, ApiError> {
        Ok(params.number(name, accepted)?.map_or(default, |n| n as f32))
    };
    // Seeds are 64 bits wide whatever their sign.
    let seed = match params.get("seed") {
        None => None,
        Some(value) => Some(
            value
                .as_u64()
                .or_else(|| value.as_i64().map(i64::cast_unsigned))
                .ok_or_else(|| ApiError::value("seed", value, "an integer of 64 bits"))?,
        ),
    };
    let top_k = params.integer("top_k", -1..=i64::from(u32::MAX))?;
    Ok(SamplingParams {
        temperature: number("temperature", 0.0..=2.0, 1.0)?,
        top_p: number("top_p", 0.0..=1.0, 1.0)?,
        top_k: top_k.and_then(|k| u32::try_from(k).ok()).unwrap_or(0),
        min_p: number("min_p", 0.0..=1.0, 0.0)?,
        seed,
        presence_penalty: number("presence_penalty", -2.0..=2.0, 0.0)?,
        frequency_penalty: number("frequency_penalty", -2.0..=2.0, 0.0)?,
        repetition_penalty: number("repetition_penalty", 0.01..=100.0, 1.0)?,
        logit_bias: logit_bias(params)?,
    })
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "values were checked to lie in a range that f32 holds"
)]
fn logit_bias(params: &Params) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let Some(entries) = params.object("logit_bias")? else {
        return Ok(Vec::new());
    };
    if entries.len() > LOGIT_BIAS_MAX {
        return Err(ApiError::invalid(
            "logit_bias",
            format!(
                "logit_bias has {} entries; accepted: at most {LOGIT_BIAS_MAX}",
                entries.len()
            ),
        ));
    }
    entries
        .iter()
        .map(|(token, bias)| {
            let id = token.parse().map_err(|_| {
                ApiError::invalid(
                    "logit_bias",
                    format!("logit_bias has the key {token:?}; accepted: token ids"),
                )
            })?;
            let bias_accepted = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
            let bias = bias_accepted.ok_or_else(|| {
                ApiError::value(
                    format!("logit_bias.{token}"),
                    bias,
                    "a number from -100 to 100",
                )
            })?;
            Ok((id, bias as f32))
        })
        .collect()
}

fn stop_conditions(params: &Params) -> Result<StopConditions, ApiError> {
    let ignore_eos = match params.boolean("ignore_eos")? {
        Some(flag) => Some(flag),
        None => boolean("nvext.ignore_eos", params.nested("nvext", "ignore_eos")?)?,
    };
    let stop_token_ids = match params.get("stop_token_ids") {
        None => Vec::new(),
        Some(value) => {
            let accepted = format!("a list of at most {STOP_TOKEN_IDS_MAX} token ids");
            let ids = value
                .as_array()
                .filter(|ids| ids.len() <= STOP_TOKEN_IDS_MAX);
            ids.and_then(|ids| ids.iter().map(token_id).collect())
                .ok_or_else(|| ApiError::value("stop_token_ids", value, &accepted))?
        }
    };
    Ok(StopConditions {
        min_tokens: params.count("min_tokens", 0)?.unwrap_or(0),
        stop_token_ids,
        ignore_eos: ignore_eos.unwrap_or(false),
        ..StopConditions::default()
    })
}

fn stop_strings(params: &Params) -> Result<Vec<String>, ApiError> {
    let Some(value) = params.get("stop") else {
        return Ok(Vec::new());
    };
    let list = match value {
        Value::String(_) => std::slice::from_ref(value),
        Value::Array(list) => list.as_slice(),
        other => {
            return Err(ApiError::value(
                "stop",
                other,
                "a string or a list of strings",
            ));
        }
    };
    if list.len() > STOP_STRINGS_MAX {
        return Err(ApiError::invalid(
            "stop",
            format!(
                "stop has {} strings; accepted: at most {STOP_STRINGS_MAX}",
                list.len()
            ),
        ));
    }
    list.iter()
        .map(|stop| match stop {
            Value::String(text) if text.is_empty() => Err(ApiError::value(
                "stop",
                stop,
                "strings of at least one character",
            )),
            Value::String(text) if text.len() > STOP_STRING_BYTES_MAX => Err(ApiError::invalid(
                "stop",
                format!(
                    "a stop string has {} bytes; accepted: at most {STOP_STRING_BYTES_MAX}",
                    text.len()
                ),
            )),
            Value::String(text) => Ok(text.clone()),
            other => Err(ApiError::value(
                "stop",
                other,
                "a string or a list of strings",
            )),
        })
        .collect()
}

/// `value` as a token id.
pub(crate) fn token_id(value: &Value) -> Option<TokenId> {
    value.as_u64().and_then(|id| TokenId::try_from(id).ok())
}

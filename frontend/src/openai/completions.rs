//! Reading a completion request.

use blockplane_protocol::TokenId;
use serde_json::Value;

use super::{
    common::{CommonParams, MaxTokens, TOP_LOGPROBS_MAX, token_id},
    params::Params,
};
use crate::error::ApiError;

const PROMPT_ACCEPTED: &str =
    "a string, a list of one string, a list of token ids, or a list of one such list";

/// A request to `/v1/completions`.
#[derive(Debug)]
pub(crate) struct CompletionRequest {
    pub(crate) common: CommonParams,
    pub(crate) prompt: Prompt,
    pub(crate) echo: bool,
}

/// What to complete.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Prompt {
    /// To be tokenised.
    Text(String),
    /// Tokenised by the client.
    Tokens(Vec<TokenId>),
}

impl CompletionRequest {
    /// Reads and checks the fields.
    pub(crate) fn read(mut params: Params) -> Result<Self, ApiError> {
        let mut common = CommonParams::read(&params)?;
        common.max_tokens = params.count("max_tokens", 1)?.map(|tokens| MaxTokens {
            tokens,
            param: "max_tokens",
        });
        let logprobs = params.integer("logprobs", 0..=TOP_LOGPROBS_MAX)?;
        common.logprobs = logprobs.and_then(|top| u32::try_from(top).ok());
        if let Some(best_of) = params
            .get("best_of")
            .filter(|best| best.as_i64() != Some(1))
        {
            return Err(ApiError::value("best_of", best_of, "1"));
        }
        if params
            .string("suffix")?
            .is_some_and(|text| !text.is_empty())
        {
            return Err(ApiError::unsupported(
                "suffix",
                "suffix is not supported here; leave it out",
            ));
        }
        let echo = params.boolean("echo")?.unwrap_or(false);
        if echo && common.logprobs.is_some() {
            return Err(ApiError::unsupported(
                "logprobs",
                "logprobs of the prompt (echo together with logprobs) are not supported here",
            ));
        }
        Ok(Self {
            common,
            prompt: prompt(params.take("prompt"))?,
            echo,
        })
    }
}

fn prompt(value: Option<Value>) -> Result<Prompt, ApiError> {
    let mut value = value.ok_or_else(|| ApiError::missing("prompt", PROMPT_ACCEPTED))?;
    if let Value::Array(list) = &mut value
        && let [Value::String(_) | Value::Array(_)] = list.as_slice()
    {
        value = list.remove(0);
    }
    match value {
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(ids) if !ids.is_empty() => match ids.iter().map(token_id).collect() {
            Some(tokens) => Ok(Prompt::Tokens(tokens)),
            None => {
                let other = ids.iter().find(|id| token_id(id).is_none());
                Err(ApiError::value(
                    "prompt",
                    other.unwrap_or(&Value::Null),
                    PROMPT_ACCEPTED,
                ))
            }
        },
        other => Err(ApiError::value("prompt", &other, PROMPT_ACCEPTED)),
    }
}

//! Reading a chat completion request.

use serde_json::{Map, Value};

use super::{
    common::{CommonParams, MaxTokens, TOP_LOGPROBS_MAX},
    params::Params,
};
use crate::{error::ApiError, tokenize::ChatInput};

const ROLES: &str = "system, developer, user, assistant, tool";

/// A request to `/v1/chat/completions`.
#[derive(Debug)]
pub(crate) struct ChatRequest {
    pub(crate) common: CommonParams,
    pub(crate) input: ChatInput,
}

impl ChatRequest {
    /// Reads and checks the fields.
    pub(crate) fn read(mut params: Params) -> Result<Self, ApiError> {
        let mut common = CommonParams::read(&params)?;
        common.max_tokens = max_tokens(&params)?;
        common.logprobs = logprobs(&params)?;
        let tools = tools(&mut params)?;
        let add_generation_prompt = params.boolean("add_generation_prompt")?.unwrap_or(true);
        let continue_final_message = params.boolean("continue_final_message")?.unwrap_or(false);
        let kwargs = match params.object("chat_template_kwargs")? {
            Some(kwargs) => kwargs.clone(),
            None => Map::new(),
        };
        if params.get("chat_template").is_some() {
            return Err(ApiError::unsupported(
                "chat_template",
                "chat_template is not accepted in a request; the checkpoint's own is used",
            ));
        }
        let messages = messages(params.take("messages"))?;
        Ok(Self {
            common,
            input: ChatInput {
                messages,
                tools,
                add_generation_prompt,
                continue_final_message,
                kwargs,
            },
        })
    }
}

fn max_tokens(params: &Params) -> Result<Option<MaxTokens>, ApiError> {
    let read = |param: &'static str| -> Result<Option<MaxTokens>, ApiError> {
        Ok(params
            .count(param, 1)?
            .map(|tokens| MaxTokens { tokens, param }))
    };
    match (read("max_completion_tokens")?, read("max_tokens")?) {
        (Some(new), Some(old)) if new.tokens != old.tokens => Err(ApiError::invalid(
            "max_tokens",
            format!(
                "max_tokens is {} and max_completion_tokens is {}; accepted: one of the two",
                old.tokens, new.tokens
            ),
        )),
        (new, old) => Ok(new.or(old)),
    }
}

fn logprobs(params: &Params) -> Result<Option<u32>, ApiError> {
    let wanted = params.boolean("logprobs")?.unwrap_or(false);
    let top = params.integer("top_logprobs", 0..=TOP_LOGPROBS_MAX)?;
    if top.is_some_and(|top| top > 0) && !wanted {
        return Err(ApiError::invalid(
            "top_logprobs",
            "top_logprobs is accepted only when logprobs is true",
        ));
    }
    Ok(wanted.then(|| top.and_then(|top| u32::try_from(top).ok()).unwrap_or(0)))
}

/// The tools, unless the request says that none may be called.
fn tools(params: &mut Params) -> Result<Option<Value>, ApiError> {
    for name in ["functions", "function_call"] {
        if params.get(name).is_some() {
            return Err(ApiError::unsupported(
                name,
                format!("{name} is not supported; use tools"),
            ));
        }
    }
    let offered = match params.get("tool_choice") {
        None => true,
        Some(choice) if choice == "auto" => true,
        Some(choice) if choice == "none" => false,
        Some(choice) => {
            return Err(ApiError::value(
                "tool_choice",
                choice,
                "\"auto\" or \"none\"",
            ));
        }
    };
    match params.take("tools") {
        None => Ok(None),
        Some(Value::Array(tools)) => {
            if let Some(other) = tools.iter().find(|tool| !tool.is_object()) {
                return Err(ApiError::value("tools", other, "a list of objects"));
            }
            Ok((offered && !tools.is_empty()).then_some(Value::Array(tools)))
        }
        Some(other) => Err(ApiError::value("tools", &other, "a list of objects")),
    }
}

fn messages(value: Option<Value>) -> Result<Vec<Value>, ApiError> {
    const ACCEPTED: &str = "a list of at least one message";
    let list = match value {
        None => return Err(ApiError::missing("messages", ACCEPTED)),
        Some(Value::Array(list)) if !list.is_empty() => list,
        Some(other) => return Err(ApiError::value("messages", &other, ACCEPTED)),
    };
    list.into_iter()
        .enumerate()
        .map(|(index, message)| checked_message(index, message))
        .collect()
}

/// The message with a text as its content and tool arguments as objects, as templates expect.
fn checked_message(index: usize, message: Value) -> Result<Value, ApiError> {
    let mut fields = match message {
        Value::Object(fields) => fields,
        other => {
            return Err(ApiError::value(
                format!("messages[{index}]"),
                &other,
                "an object with role and content",
            ));
        }
    };
    let role = fields.get("role").unwrap_or(&Value::Null);
    let role = match role.as_str() {
        Some(role @ ("system" | "developer" | "user" | "assistant" | "tool")) => role.to_owned(),
        _ => {
            return Err(ApiError::value(
                format!("messages[{index}].role"),
                role,
                ROLES,
            ));
        }
    };
    let content = fields.get_mut("content").map_or(Value::Null, Value::take);
    fields.insert("content".to_owned(), text_content(index, &role, content)?);
    if let Some(Value::Array(calls)) = fields.get_mut("tool_calls") {
        calls.iter_mut().for_each(parse_arguments);
    }
    Ok(Value::Object(fields))
}

fn text_content(index: usize, role: &str, content: Value) -> Result<Value, ApiError> {
    let name = || format!("messages[{index}].content");
    match content {
        Value::String(_) => Ok(content),
        // An assistant that only called tools said nothing.
        Value::Null if role == "assistant" => Ok(Value::from("")),
        Value::Array(parts) => {
            let texts = parts.iter().map(|part| match part {
                Value::String(text) => Ok(text.as_str()),
                part => match (part["type"].as_str(), part["text"].as_str()) {
                    (Some("text"), Some(text)) => Ok(text),
                    _ => Err(ApiError::value(
                        name(),
                        part.get("type").unwrap_or(part),
                        "parts of type \"text\" with a text",
                    )),
                },
            });
            Ok(Value::from(
                texts.collect::<Result<Vec<_>, _>>()?.join("\n"),
            ))
        }
        other => Err(ApiError::value(
            name(),
            &other,
            "a string or a list of text parts",
        )),
    }
}

/// Clients send the arguments of a call as JSON text; templates write them as objects.
fn parse_arguments(call: &mut Value) {
    let Some(arguments) = call.pointer_mut("/function/arguments") else {
        return;
    };
    if let Some(text) = arguments.as_str()
        && let Ok(parsed @ Value::Object(_)) = serde_json::from_str(text)
    {
        *arguments = parsed;
    }
}

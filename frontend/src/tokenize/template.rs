//! Chat templates of Hugging Face checkpoints, in the environment that transformers gives them.
//!
//! Known differences: `strftime_now` tells UTC, and `loop.last` stays false in a loop over the
//! characters of a string.

use std::{
    fmt,
    time::{SystemTime, UNIX_EPOCH},
};

use minijinja::{
    Environment, Error, ErrorKind, Value, escape_formatter,
    syntax::SyntaxConfig,
    value::{Kwargs, Rest, ValueKind},
};
use serde_json::Map;
use thiserror::Error as ThisError;

use super::python::{JsonStyle, float, json_dumps, strftime};

const NAME: &str = "chat_template";

/// Instructions that one rendering may execute: a bound against endless loops that leaves room for
/// 100,000 messages.
const FUEL: u64 = 20_000_000;

/// A compiled chat template.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    /// Whether the template knows the role `developer`.
    knows_developer: bool,
}

/// What a template is rendered with.
#[derive(Debug)]
pub(crate) struct ChatInput {
    /// The conversation, checked and with text contents.
    pub(crate) messages: Vec<serde_json::Value>,
    /// Tools as the client gave them.
    pub(crate) tools: Option<serde_json::Value>,
    /// End with the start of an assistant message.
    pub(crate) add_generation_prompt: bool,
    /// Leave the last message open, so that the output continues it.
    pub(crate) continue_final_message: bool,
    /// Further variables.
    pub(crate) kwargs: Map<String, serde_json::Value>,
}

/// Why a conversation could not be rendered.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
pub(crate) enum RenderError {
    /// The template refused the conversation.
    #[error("the model's chat template refuses these messages: {0}")]
    Refused(String),
    /// The template failed.
    #[error("the model's chat template failed: {0}")]
    Failed(String),
    /// The last message is not in the rendered text as it was given.
    #[error(
        "continue_final_message is true, but the model's chat template changes the last message"
    )]
    CannotContinue,
}

/// `raise_exception` was called with this message.
#[derive(Debug, ThisError)]
#[error("{0}")]
struct Raised(String);

impl ChatTemplate {
    /// Compiles `source`; `special_tokens` are variables of every rendering.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub(crate) fn new(source: &str, special_tokens: &[(String, String)]) -> Result<Self, String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|error| describe(&error))?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<Value, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, message.clone())
                    .with_source(Raised(message)))
            },
        );
        environment.add_function("strftime_now", |format: String| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            strftime(now.map_or(0, |now| now.as_secs()), &format)
        });
        environment.add_filter("tojson", tojson);
        // Where minijinja and Jinja differ and templates tell contents apart by it.
        environment.add_test("sequence", |value: &Value| {
            matches!(
                value.kind(),
                ValueKind::String | ValueKind::Seq | ValueKind::Map
            )
        });
        environment.add_test("iterable", |value: &Value| {
            matches!(
                value.kind(),
                ValueKind::String
                    | ValueKind::Seq
                    | ValueKind::Map
                    | ValueKind::Iterable
                    | ValueKind::Undefined
            )
        });
        environment.set_formatter(|out, state, value| {
            if value.kind() == ValueKind::Number && !value.is_integer() {
                let number = f64::try_from(value.clone())?;
                return Ok(out.write_str(&float(number))?);
            }
            escape_formatter(out, state, value)
        });
        for (name, token) in special_tokens {
            environment.add_global(name.clone(), token.clone());
        }
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|error| describe(&error))?;
        Ok(Self {
            environment,
            knows_developer: source.contains("developer"),
        })
    }

    /// The prompt of a conversation.
    pub(crate) fn render(&self, input: &ChatInput) -> Result<String, RenderError> {
        let mut variables: Vec<(String, Value)> = Vec::with_capacity(input.kwargs.len() + 4);
        for (name, value) in &input.kwargs {
            variables.push((name.clone(), to_value(value)));
        }
        let messages = input.messages.iter().map(|message| self.message(message));
        variables.push(("messages".to_owned(), messages.collect()));
        variables.push((
            "tools".to_owned(),
            input
                .tools
                .as_ref()
                .map_or_else(|| Value::from(()), to_value),
        ));
        variables.push(("documents".to_owned(), Value::from(())));
        let generation_prompt = input.add_generation_prompt && !input.continue_final_message;
        variables.push((
            "add_generation_prompt".to_owned(),
            Value::from(generation_prompt),
        ));
        let rendered = self
            .environment
            .get_template(NAME)
            .and_then(|template| template.render(Value::from_pairs(variables)))
            .map_err(|error| match raised(&error) {
                Some(message) => RenderError::Refused(message),
                None => RenderError::Failed(describe(&error)),
            })?;
        if input.continue_final_message {
            return open_last_message(rendered, &input.messages);
        }
        Ok(rendered)
    }

    /// A message as a template value. Templates that do not know the role `developer` get it as
    /// `system`, which is what it replaced; many would drop it otherwise.
    fn message(&self, message: &serde_json::Value) -> Value {
        let value = to_value(message);
        if self.knows_developer || message["role"] != "developer" {
            return value;
        }
        let fields = message.as_object().into_iter().flatten();
        Value::from_pairs(fields.map(|(name, field)| {
            let field = if name == "role" {
                Value::from("system")
            } else {
                to_value(field)
            };
            (name.as_str(), field)
        }))
    }
}

/// `rendered` cut after the text of the last message.
fn open_last_message(
    mut rendered: String,
    messages: &[serde_json::Value],
) -> Result<String, RenderError> {
    let last = messages
        .last()
        .and_then(|message| message["content"].as_str())
        .map(str::trim)
        .filter(|text| !text.is_empty())
        .ok_or(RenderError::CannotContinue)?;
    let at = rendered.rfind(last).ok_or(RenderError::CannotContinue)?;
    rendered.truncate(at + last.len());
    Ok(rendered)
}

/// A JSON value as a template value, order of keys kept.
fn to_value(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(value) => Value::from(*value),
        serde_json::Value::Number(number) => number
            .as_i64()
            .map(Value::from)
            .or_else(|| number.as_u64().map(Value::from))
            .or_else(|| number.as_f64().map(Value::from))
            .unwrap_or_default(),
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(items) => items.iter().map(to_value).collect(),
        serde_json::Value::Object(fields) => Value::from_pairs(
            fields
                .iter()
                .map(|(name, field)| (name.as_str(), to_value(field))),
        ),
    }
}

/// transformers marks the parts that an assistant wrote with `{% generation %}` blocks. They
/// change no text, so they become blocks that are always rendered, with the same white space.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let (before, tag) = rest.split_at(open);
        out.push_str(before);
        let Some(close) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(close + 2);
        match tag[2..close].trim_matches(['-', '+']).trim() {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// `json.dumps` with the arguments that transformers lets templates give.
#[expect(
    clippy::needless_pass_by_value,
    reason = "the signature of a template filter"
)]
fn tojson(value: Value, positional: Rest<Value>, arguments: Kwargs) -> Result<Value, Error> {
    let argument = |index: usize, name: &str| -> Result<Option<Value>, Error> {
        let value = match positional.get(index) {
            Some(value) => Some(value.clone()),
            None => arguments.get(name)?,
        };
        Ok(value.filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let ensure_ascii = argument(0, "ensure_ascii")?.is_some_and(|value| value.is_true());
    let indent = match argument(1, "indent")? {
        None => None,
        Some(value) => Some(match value.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(
                usize::try_from(i64::try_from(value)?.max(0))
                    .unwrap_or(0)
                    .min(64),
            ),
        }),
    };
    let separators = argument(2, "separators")?;
    let sort_keys = argument(3, "sort_keys")?.is_some_and(|value| value.is_true());
    arguments.assert_all_used()?;
    let (item_separator, key_separator) = match separators {
        Some(pair) => (
            pair.get_item_by_index(0)?.to_string(),
            pair.get_item_by_index(1)?.to_string(),
        ),
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let style = JsonStyle {
        indent,
        item_separator,
        key_separator,
        sort_keys,
        ensure_ascii,
    };
    json_dumps(&value, &style).map(Value::from)
}

/// The message given to `raise_exception`, if `error` comes from there.
fn raised(error: &Error) -> Option<String> {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref::<Raised>() {
            return Some(message.clone());
        }
        source = cause.source();
    }
    None
}

/// One line: what is wrong and on which line.
fn describe(error: &Error) -> String {
    struct Described<'a>(&'a Error);
    impl fmt::Display for Described<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "{}", self.0.kind())?;
            if let Some(detail) = self.0.detail() {
                write!(f, ": {detail}")?;
            }
            if let Some(line) = self.0.line() {
                write!(f, " (line {line})")?;
            }
            Ok(())
        }
    }
    Described(error).to_string()
}

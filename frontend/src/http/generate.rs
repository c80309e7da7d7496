//! Chat and plain completions: from request to response.

use std::{
    convert::Infallible,
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use blockplane_protocol::{GenerateRequest, ModelCard, RequestId, RouteHints, TokenId};
use bytes::Bytes;
use futures::Stream;
use http::{HeaderMap, HeaderValue, header, request::Parts};
use tokio::time::timeout_at;
use tracing::Span;

use super::{App, UniqueId, body, id};
use crate::{
    error::ApiError,
    generation::{Assembler, AssemblerConfig, Generation},
    metrics::RequestMeter,
    openai::{
        chat::ChatRequest,
        common::{CommonParams, MaxTokens},
        completions::{CompletionRequest, Prompt},
        params::Params,
        response::{ResponseWriter, Schema, error_event},
    },
    tokenize::{AssetError, ChatInput, ModelAssets, PoolError, RenderError, TemplateError},
};

/// Milliseconds that the client gives the request.
const TIMEOUT_HEADER: &str = "x-request-timeout-ms";

/// Bodies above this size are parsed on the pool, so that no socket waits for them.
const PARSE_INLINE_BYTES_MAX: usize = 64 << 10;

/// Output limit of a completion that names none, as OpenAI documents it. A chat goes on until the
/// context is full.
const COMPLETION_TOKENS_DEFAULT: u32 = 16;

/// Bytes of events after which they are sent although more are ready.
const EVENT_BATCH_BYTES: usize = 16 << 10;

/// A request as it was parsed.
#[derive(Debug)]
struct Parsed {
    common: CommonParams,
    source: Source,
    echo: bool,
    body_bytes: usize,
}

/// What the prompt is made from.
#[derive(Debug)]
enum Source {
    Chat(ChatInput),
    Prompt(Prompt),
}

/// When a request must be done.
#[derive(Clone, Copy, Debug)]
struct Deadline {
    at: tokio::time::Instant,
    timeout: Duration,
}

/// Handles both routes.
pub(super) async fn handle(
    State(app): State<Arc<App>>,
    schema: Schema,
    request: Request,
) -> Response {
    let start = Instant::now();
    let (parts, body) = request.into_parts();
    match generate(&app, schema, start, &parts, body).await {
        Ok(response) => response,
        Err(error) => error.into_response(),
    }
}

async fn generate(
    app: &Arc<App>,
    schema: Schema,
    start: Instant,
    parts: &Parts,
    body: Body,
) -> Result<Response, ApiError> {
    let admitted = admit(app, schema, start, parts, body).await;
    let (parsed, card, served, deadline, mut meter) =
        admitted.inspect_err(|_| app.metrics.rejected(schema))?;
    let unique = parts.extensions.get::<UniqueId>();
    let request = RequestId(format!(
        "{}{}",
        schema.id_prefix(),
        unique.map_or_else(|| app.ids.next(), |unique| unique.0.clone())
    ));
    let (stream, model) = (parsed.common.stream, parsed.common.model.clone());
    let started = timeout_at(
        deadline.at,
        prepare(
            app, schema, parsed, &card, &served, deadline, request, &mut meter,
        ),
    );
    let prepared = match started.await {
        Ok(Ok(prepared)) => prepared,
        Ok(Err(error)) => {
            meter.failed(&error);
            return Err(error);
        }
        Err(_) => {
            let error = ApiError::deadline(deadline.timeout);
            meter.failed(&error);
            return Err(error);
        }
    };
    tracing::debug!(model, stream, "generating");
    let generation = Generation::new(
        prepared.frames,
        prepared.assembler,
        deadline.at,
        deadline.timeout,
        meter,
    );
    if stream {
        respond_with_events(generation, prepared.writer).await
    } else {
        respond_at_once(generation, prepared.writer).await
    }
}

type Admitted = (
    Parsed,
    Arc<ModelCard>,
    Vec<Arc<ModelCard>>,
    Deadline,
    RequestMeter,
);

/// Everything up to the point where the request is known to be for a model that is served.
async fn admit(
    app: &Arc<App>,
    schema: Schema,
    start: Instant,
    parts: &Parts,
    body: Body,
) -> Result<Admitted, ApiError> {
    let permit = Arc::clone(&app.requests).try_acquire_owned().map_err(|_| {
        ApiError::busy(format!(
            "{} requests are in progress, which is the limit",
            app.config.requests_max
        ))
    })?;
    let body = body::read(&app.config, &parts.headers, body).await?;
    body::check_media_type(&parts.headers)?;
    let timeout = request_timeout(app, &parts.headers)?;
    let deadline = Deadline {
        at: tokio::time::Instant::from_std(start) + timeout,
        timeout,
    };
    let parsed = if body.len() <= PARSE_INLINE_BYTES_MAX {
        parse(schema, &body)?
    } else {
        let parsed = app.pool.run(move || parse(schema, &body)).await;
        parsed.map_err(pool_error)??
    };
    let served = app.service.models();
    let wanted = served.iter().find(|card| card.name == parsed.common.model);
    let Some(card) = wanted.cloned() else {
        let names: Vec<&str> = served.iter().map(|card| card.name.as_str()).collect();
        return Err(ApiError::model_not_found(&parsed.common.model, &names));
    };
    let stream = parsed.common.stream;
    let meter = app
        .metrics
        .request(&card.name, schema, stream, start, permit);
    Ok((parsed, card, served, deadline, meter))
}

fn parse(schema: Schema, body: &[u8]) -> Result<Parsed, ApiError> {
    let params = Params::parse(body)?;
    let body_bytes = body.len();
    Ok(match schema {
        Schema::Chat => {
            let request = ChatRequest::read(params)?;
            Parsed {
                common: request.common,
                source: Source::Chat(request.input),
                echo: false,
                body_bytes,
            }
        }
        Schema::Completion => {
            let request = CompletionRequest::read(params)?;
            Parsed {
                common: request.common,
                source: Source::Prompt(request.prompt),
                echo: request.echo,
                body_bytes,
            }
        }
    })
}

fn request_timeout(app: &App, headers: &HeaderMap) -> Result<Duration, ApiError> {
    let Some(value) = headers.get(TIMEOUT_HEADER) else {
        return Ok(app.config.request_timeout);
    };
    let max = app.config.request_timeout_max;
    let text = value.to_str().unwrap_or("not readable");
    let parsed = text.parse().ok().map(Duration::from_millis);
    parsed
        .filter(|timeout| !timeout.is_zero() && *timeout <= max)
        .ok_or_else(|| {
            ApiError::value(
                "X-Request-Timeout-Ms",
                &text.into(),
                &format!("milliseconds from 1 to {}", max.as_millis()),
            )
        })
}

/// A request under way.
struct Prepared {
    frames: crate::FrameStream,
    assembler: Assembler,
    writer: ResponseWriter,
}

#[expect(
    clippy::too_many_arguments,
    reason = "one call; a struct for it would only repeat the names"
)]
async fn prepare(
    app: &Arc<App>,
    schema: Schema,
    parsed: Parsed,
    card: &Arc<ModelCard>,
    served: &[Arc<ModelCard>],
    deadline: Deadline,
    request_id: RequestId,
    meter: &mut RequestMeter,
) -> Result<Prepared, ApiError> {
    let assets = app
        .assets
        .get(card, served)
        .await
        .map_err(|error| match error {
            AssetError::Pool(error) => pool_error(error),
            error => {
                tracing::error!(model = card.name, %error, "cannot load the model's files");
                ApiError::internal(format!("model '{}' cannot be used: {error}", card.name))
            }
        })?;
    let began = Instant::now();
    let Parsed {
        mut common,
        source,
        echo,
        body_bytes,
    } = parsed;
    let preparation = Preparation {
        assets: Arc::clone(&assets),
        card: Arc::clone(card),
        add_special_tokens: common.add_special_tokens,
        echo,
    };
    let (prompt, echo_text) = if body_bytes <= app.config.tokenize_inline_bytes_max {
        preparation.prompt(source)?
    } else {
        let done = app.pool.run(move || preparation.prompt(source)).await;
        done.map_err(pool_error)??
    };
    meter.prepared(&request_id.0, began, prompt.len());
    check_tokens(&common, &prompt, schema, card)?;
    common.stop.max_tokens = output_limit(&common, schema, prompt.len(), card)?;
    let mut end_tokens = common.stop.stop_token_ids.clone();
    if !common.stop.ignore_eos {
        end_tokens.extend_from_slice(&card.eos_token_ids);
    }
    let assembler = Assembler::new(AssemblerConfig {
        vocabulary: assets.vocabulary(),
        prompt: &prompt,
        skip_special_tokens: common.skip_special_tokens,
        stop_strings: common.stop_strings,
        end_tokens,
        logprobs: common.logprobs.is_some(),
    });
    let writer = ResponseWriter::new(
        schema,
        request_id.0.clone(),
        id::unix_seconds(),
        &card.name,
        Arc::clone(assets.vocabulary()),
        common.include_usage,
    )
    .with_echo(echo_text);
    let left = deadline
        .at
        .saturating_duration_since(tokio::time::Instant::now());
    let request = GenerateRequest {
        request_id,
        model: common.model,
        token_ids: prompt,
        sampling: common.sampling,
        stop: common.stop,
        logprobs: common.logprobs,
        cache_salt: common.cache_salt,
        lora_name: None,
        priority: common.priority,
        deadline_ms: u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1),
        route: RouteHints::default(),
    };
    let frames = app.service.generate(request).await?;
    Ok(Prepared {
        frames,
        assembler,
        writer,
    })
}

/// What making a prompt's tokens needs.
struct Preparation {
    assets: Arc<ModelAssets>,
    card: Arc<ModelCard>,
    add_special_tokens: Option<bool>,
    echo: bool,
}

impl Preparation {
    /// The prompt's tokens, and its text where the response repeats it.
    fn prompt(&self, source: Source) -> Result<(Vec<TokenId>, String), ApiError> {
        match source {
            Source::Chat(input) => {
                let rendered = self.assets.render(&input);
                let text = rendered.map_err(|error| template_error(&error))?;
                // Templates write special tokens themselves.
                let add_special = self.add_special_tokens.unwrap_or(false);
                let tokens = self.encode(&text, add_special, Schema::Chat)?;
                Ok((tokens, String::new()))
            }
            Source::Prompt(Prompt::Text(text)) => {
                let add_special = self.add_special_tokens.unwrap_or(true);
                let tokens = self.encode(&text, add_special, Schema::Completion)?;
                Ok((tokens, if self.echo { text } else { String::new() }))
            }
            Source::Prompt(Prompt::Tokens(tokens)) if self.echo => {
                let tokenizer = self.assets.vocabulary().tokenizer();
                let text = tokenizer.decode(&tokens, true);
                let text = text.map_err(|error| ApiError::invalid("prompt", error.to_string()))?;
                Ok((tokens, text))
            }
            Source::Prompt(Prompt::Tokens(tokens)) => Ok((tokens, String::new())),
        }
    }

    fn encode(
        &self,
        text: &str,
        add_special: bool,
        schema: Schema,
    ) -> Result<Vec<TokenId>, ApiError> {
        let least = self.assets.vocabulary().tokens_min(text);
        if least >= self.card.context_tokens_max as usize {
            // Tokenising a text that cannot fit would only hold a thread.
            return Err(prompt_too_long(
                schema,
                &format!("at least {least}"),
                &self.card,
            ));
        }
        self.assets.encode(text, add_special).map_err(|error| {
            let param = prompt_param(schema);
            ApiError::invalid(param, format!("{param} cannot be tokenised: {error}"))
        })
    }
}

fn pool_error(error: PoolError) -> ApiError {
    match error {
        PoolError::Full(_) => ApiError::busy(error.to_string()),
        PoolError::Panicked => ApiError::internal(error.to_string()),
    }
}

fn prompt_too_long(schema: Schema, tokens: &str, card: &ModelCard) -> ApiError {
    let context = card.context_tokens_max;
    ApiError::context_length(
        prompt_param(schema),
        format!(
            "the prompt has {tokens} tokens; accepted: at most {}, since the model's context \
             holds {context} tokens, output included",
            context.saturating_sub(1)
        ),
    )
}

fn template_error(error: &TemplateError) -> ApiError {
    let message = error.to_string();
    match error {
        TemplateError::None => ApiError::unsupported("messages", message),
        TemplateError::Render(RenderError::Refused(_)) => ApiError::invalid("messages", message),
        TemplateError::Render(RenderError::CannotContinue) => {
            ApiError::invalid("continue_final_message", message)
        }
        TemplateError::Broken(_) | TemplateError::Render(RenderError::Failed(_)) => {
            ApiError::internal(message)
        }
    }
}

/// Checks that every token id named in the request exists.
fn check_tokens(
    common: &CommonParams,
    prompt: &[TokenId],
    schema: Schema,
    card: &ModelCard,
) -> Result<(), ApiError> {
    let prompt_param = prompt_param(schema);
    if prompt.is_empty() {
        return Err(ApiError::invalid(
            prompt_param,
            format!("{prompt_param} gives no token; accepted: at least one"),
        ));
    }
    let biased = common.sampling.logit_bias.iter().map(|(token, _)| token);
    let named = [
        (prompt_param, prompt.iter().max()),
        ("logit_bias", biased.max()),
        ("stop_token_ids", common.stop.stop_token_ids.iter().max()),
    ];
    for (param, token) in named {
        if let Some(&token) = token.filter(|&&token| token >= card.vocab_size) {
            return Err(ApiError::invalid(
                param,
                format!(
                    "{param} has the token id {token}; accepted: below {}, the model's vocabulary",
                    card.vocab_size
                ),
            ));
        }
    }
    Ok(())
}

/// Tokens that may be generated.
fn output_limit(
    common: &CommonParams,
    schema: Schema,
    prompt_tokens: usize,
    card: &ModelCard,
) -> Result<u32, ApiError> {
    let context = card.context_tokens_max;
    let room = u32::try_from(prompt_tokens)
        .ok()
        .and_then(|tokens| context.checked_sub(tokens))
        .filter(|&room| room > 0);
    let Some(room) = room else {
        return Err(prompt_too_long(schema, &prompt_tokens.to_string(), card));
    };
    let limit = match common.max_tokens {
        Some(MaxTokens { tokens, param }) if tokens > room => {
            return Err(ApiError::context_length(
                param,
                format!(
                    "{param} is {tokens}; accepted: at most {room}, since the model's context \
                     holds {context} tokens and the prompt has {prompt_tokens}"
                ),
            ));
        }
        Some(MaxTokens { tokens, .. }) => tokens,
        None if schema == Schema::Completion => COMPLETION_TOKENS_DEFAULT.min(room),
        None => room,
    };
    if common.stop.min_tokens > limit {
        return Err(ApiError::invalid(
            "min_tokens",
            format!(
                "min_tokens is {}; accepted: at most {limit}, the limit of the output",
                common.stop.min_tokens
            ),
        ));
    }
    Ok(limit)
}

const fn prompt_param(schema: Schema) -> &'static str {
    match schema {
        Schema::Chat => "messages",
        Schema::Completion => "prompt",
    }
}

async fn respond_at_once(
    mut generation: Generation,
    writer: ResponseWriter,
) -> Result<Response, ApiError> {
    let mut text = String::new();
    let mut tokens = Vec::new();
    while let Some(piece) = generation.next().await {
        let piece = piece?;
        text.push_str(&piece.text);
        tokens.extend(piece.tokens);
        if let Some(finish) = piece.finish {
            let mut response = Response::new(Body::from(writer.body(&text, &tokens, finish)));
            response.headers_mut().insert(
                header::CONTENT_TYPE,
                HeaderValue::from_static("application/json"),
            );
            return Ok(response);
        }
    }
    Err(ApiError::stream_incomplete())
}

/// Answers with events. The status is sent with the first of them, so that a failure before it has
/// a status of its own.
async fn respond_with_events(
    mut generation: Generation,
    mut writer: ResponseWriter,
) -> Result<Response, ApiError> {
    let mut buffer = Vec::with_capacity(1024);
    let first = generation.next().await;
    let piece = first.unwrap_or_else(|| Err(ApiError::stream_incomplete()))?;
    writer.start_events(&mut buffer);
    writer.piece_events(&mut buffer, &piece);
    let events = Events {
        generation,
        writer,
        buffer,
        done: false,
        span: Span::current(),
    };
    let mut response = Response::new(Body::from_stream(events));
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream; charset=utf-8"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Tells reverse proxies not to collect events.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// The events of one response; what is ready together comes as one chunk.
struct Events {
    generation: Generation,
    writer: ResponseWriter,
    buffer: Vec<u8>,
    done: bool,
    span: Span,
}

impl Stream for Events {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let events = self.get_mut();
        let _entered = events.span.enter();
        let mut pending = false;
        while !events.done && !pending && events.buffer.len() < EVENT_BATCH_BYTES {
            match events.generation.poll_next(cx) {
                Poll::Pending => pending = true,
                Poll::Ready(None) => events.done = true,
                Poll::Ready(Some(Ok(piece))) => {
                    events.writer.piece_events(&mut events.buffer, &piece);
                }
                Poll::Ready(Some(Err(error))) => error_event(&mut events.buffer, &error),
            }
        }
        if !events.buffer.is_empty() {
            return Poll::Ready(Some(Ok(mem::take(&mut events.buffer).into())));
        }
        if events.done {
            Poll::Ready(None)
        } else {
            Poll::Pending
        }
    }
}

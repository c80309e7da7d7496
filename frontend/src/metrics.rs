//! Prometheus metrics, under the names that Dynamo's dashboards use where they exist.

use std::{collections::HashMap, fmt, sync::Arc, time::Instant};

use blockplane_protocol::{LoadReport, Usage};
use parking_lot::RwLock;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
    },
    registry::Registry,
};

use crate::{
    error::ApiError,
    generation::Finish,
    openai::response::Schema,
    record::{Recorder, Records},
    service::{ModelService, WorkerStatus},
};

/// Media type of [`Metrics::encode`].
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// All metrics of one frontend.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    families: Families,
    /// Metrics of each model, so that no label is hashed for a token.
    models: RwLock<HashMap<String, Arc<ModelMetrics>>>,
    records: Arc<Records>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ModelLabel {
    model: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RequestLabels {
    model: String,
    endpoint: &'static str,
    request_type: &'static str,
    status: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct WorkerLabels {
    worker: String,
    role: &'static str,
    rank: u32,
}

type HistogramFamily = Family<ModelLabel, Histogram, fn() -> Histogram>;

struct Families {
    requests: Family<RequestLabels, Counter>,
    inflight: Family<ModelLabel, Gauge>,
    duration: HistogramFamily,
    time_to_first_token: HistogramFamily,
    inter_token_latency: HistogramFamily,
    tokenize: HistogramFamily,
    input_tokens: HistogramFamily,
    output_tokens: HistogramFamily,
    output_tokens_total: Family<ModelLabel, Counter>,
    cached_tokens: HistogramFamily,
    disconnected: Gauge,
}

/// The metrics of one model.
struct ModelMetrics {
    model: String,
    inflight: Gauge,
    duration: Histogram,
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    tokenize: Histogram,
    input_tokens: Histogram,
    output_tokens: Histogram,
    output_tokens_total: Counter,
    cached_tokens: Histogram,
    disconnected: Gauge,
    requests: Family<RequestLabels, Counter>,
}

/// Measures one request from its start to its drop.
pub(crate) struct RequestMeter {
    metrics: Arc<ModelMetrics>,
    schema: Schema,
    stream: bool,
    start: Instant,
    last_token: Option<Instant>,
    outcome: Option<Outcome>,
    recorder: Recorder,
    /// Slot of the limit on requests in progress.
    _permit: tokio::sync::OwnedSemaphorePermit,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Success,
    Error,
}

impl Metrics {
    /// Registers everything; gauges of workers are read from `service` when scraped.
    pub(crate) fn new(service: Arc<dyn ModelService>) -> Self {
        let mut registry = Registry::default();
        let families = Families::register(&mut registry);
        registry.register_collector(Box::new(WorkerCollector { service }));
        Self {
            registry,
            families,
            models: RwLock::default(),
            records: Arc::default(),
        }
    }

    /// Starts measuring a request to a model that exists.
    pub(crate) fn request(
        &self,
        model: &str,
        schema: Schema,
        stream: bool,
        start: Instant,
        permit: tokio::sync::OwnedSemaphorePermit,
    ) -> RequestMeter {
        let known = self.models.read().get(model).cloned();
        let metrics = known.unwrap_or_else(|| {
            let mut models = self.models.write();
            let entry = models.entry(model.to_owned());
            Arc::clone(entry.or_insert_with(|| Arc::new(self.families.model(model))))
        });
        metrics.inflight.inc();
        RequestMeter {
            metrics,
            schema,
            stream,
            start,
            last_token: None,
            outcome: None,
            recorder: self.records.begin(model, start),
            _permit: permit,
        }
    }

    /// Counts a request that failed before its model was known.
    pub(crate) fn rejected(&self, schema: Schema) {
        let labels = RequestLabels {
            model: String::new(),
            endpoint: schema.endpoint(),
            request_type: "unknown",
            status: "error",
        };
        self.families.requests.get_or_create(&labels).inc();
    }

    /// The requests that ended last.
    pub(crate) fn records(&self) -> &Records {
        &self.records
    }

    /// The text that Prometheus scrapes.
    pub(crate) fn encode(&self) -> Result<String, fmt::Error> {
        let mut out = String::new();
        text::encode(&mut out, &self.registry)?;
        Ok(out)
    }
}

impl RequestMeter {
    /// The prompt is ready; preparing it took since `began`.
    pub(crate) fn prepared(&mut self, id: &str, began: Instant, prompt_tokens: usize) {
        self.recorder.prepared(id, prompt_tokens);
        self.metrics.tokenize.observe(began.elapsed().as_secs_f64());
        self.metrics.input_tokens.observe(count(prompt_tokens));
    }

    /// `tokens` tokens arrived together.
    pub(crate) fn tokens(&mut self, tokens: u32) {
        if tokens == 0 {
            return;
        }
        let now = Instant::now();
        self.recorder.tokens(tokens, now);
        self.metrics.output_tokens_total.inc_by(tokens.into());
        match self.last_token {
            None => {
                let first = now.duration_since(self.start).as_secs_f64();
                self.metrics.time_to_first_token.observe(first);
            }
            Some(last) => {
                let each = now.duration_since(last).as_secs_f64() / f64::from(tokens);
                for _ in 0..tokens {
                    self.metrics.inter_token_latency.observe(each);
                }
            }
        }
        self.last_token = Some(now);
    }

    /// The generation ended well.
    pub(crate) fn finished(&mut self, finish: &Finish, usage: Option<&Usage>) {
        self.outcome = Some(Outcome::Success);
        self.recorder.finished(finish, usage);
        self.metrics
            .output_tokens
            .observe(finish.completion_tokens.into());
        self.metrics
            .cached_tokens
            .observe(finish.cached_tokens.into());
    }

    /// The request failed.
    pub(crate) fn failed(&mut self, error: &ApiError) {
        tracing::debug!(
            status = error.status.as_u16(),
            error = error.message(),
            "request failed"
        );
        self.outcome = Some(Outcome::Error);
        self.recorder.failed();
    }
}

impl Drop for RequestMeter {
    fn drop(&mut self) {
        let metrics = &self.metrics;
        metrics.inflight.dec();
        metrics.duration.observe(self.start.elapsed().as_secs_f64());
        if self.outcome.is_none() {
            // Dropped with neither end nor error: the client went away.
            metrics.disconnected.inc();
            tracing::debug!("client disconnected");
        }
        let labels = RequestLabels {
            model: metrics.model.clone(),
            endpoint: self.schema.endpoint(),
            request_type: if self.stream { "stream" } else { "unary" },
            status: if self.outcome == Some(Outcome::Success) {
                "success"
            } else {
                "error"
            },
        };
        metrics.requests.get_or_create(&labels).inc();
    }
}

impl Families {
    fn register(registry: &mut Registry) -> Self {
        let seconds: fn() -> Histogram = || Histogram::new(TIMES.iter().copied());
        let short: fn() -> Histogram = || Histogram::new(SHORT_TIMES.iter().copied());
        let tokens: fn() -> Histogram = || Histogram::new(TOKENS.iter().copied());
        let families = Self {
            requests: Family::default(),
            inflight: Family::default(),
            duration: Family::new_with_constructor(seconds),
            time_to_first_token: Family::new_with_constructor(seconds),
            inter_token_latency: Family::new_with_constructor(short),
            tokenize: Family::new_with_constructor(short),
            input_tokens: Family::new_with_constructor(tokens),
            output_tokens: Family::new_with_constructor(tokens),
            output_tokens_total: Family::default(),
            cached_tokens: Family::new_with_constructor(tokens),
            disconnected: Gauge::default(),
        };
        let registry = registry.sub_registry_with_prefix("dynamo_frontend");
        registry.register("requests", "Requests answered", families.requests.clone());
        registry.register(
            "inflight_requests",
            "Requests in progress",
            families.inflight.clone(),
        );
        registry.register(
            "request_duration_seconds",
            "Time from receipt to the end of the response",
            families.duration.clone(),
        );
        registry.register(
            "time_to_first_token_seconds",
            "Time from receipt to the first token",
            families.time_to_first_token.clone(),
        );
        registry.register(
            "inter_token_latency_seconds",
            "Time between tokens",
            families.inter_token_latency.clone(),
        );
        registry.register(
            "tokenize_seconds",
            "Time to render the template and tokenise, waiting included",
            families.tokenize.clone(),
        );
        registry.register(
            "input_sequence_tokens",
            "Tokens of a prompt",
            families.input_tokens.clone(),
        );
        registry.register(
            "output_sequence_tokens",
            "Tokens of a response",
            families.output_tokens.clone(),
        );
        registry.register(
            "output_tokens",
            "Tokens generated",
            families.output_tokens_total.clone(),
        );
        registry.register(
            "cached_tokens",
            "Prompt tokens whose KV was already there",
            families.cached_tokens.clone(),
        );
        registry.register(
            "disconnected_clients",
            "Requests whose client left before the end",
            families.disconnected.clone(),
        );
        families
    }

    fn model(&self, model: &str) -> ModelMetrics {
        let label = ModelLabel {
            model: model.to_owned(),
        };
        let histogram = |family: &HistogramFamily| family.get_or_create_owned(&label);
        ModelMetrics {
            model: model.to_owned(),
            inflight: self.inflight.get_or_create_owned(&label),
            duration: histogram(&self.duration),
            time_to_first_token: histogram(&self.time_to_first_token),
            inter_token_latency: histogram(&self.inter_token_latency),
            tokenize: histogram(&self.tokenize),
            input_tokens: histogram(&self.input_tokens),
            output_tokens: histogram(&self.output_tokens),
            output_tokens_total: self.output_tokens_total.get_or_create_owned(&label),
            cached_tokens: histogram(&self.cached_tokens),
            disconnected: self.disconnected.clone(),
            requests: self.requests.clone(),
        }
    }
}

impl fmt::Debug for Families {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Families").finish_non_exhaustive()
    }
}

impl fmt::Debug for ModelMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelMetrics")
            .field("model", &self.model)
            .finish_non_exhaustive()
    }
}

const TIMES: [f64; 16] = [
    0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0,
];

const SHORT_TIMES: [f64; 14] = [
    0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0,
];

const TOKENS: [f64; 13] = [
    0.0, 16.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16_384.0, 65_536.0,
    262_144.0,
];

/// Gauges of the workers, read when scraped.
#[derive(Debug)]
struct WorkerCollector {
    service: Arc<dyn ModelService>,
}

type LoadGauge = (&'static str, &'static str, fn(&LoadReport) -> u64);

const WORKER_GAUGES: [LoadGauge; 23] = [
    ("blocks_total", "KV blocks of the pool", |load| {
        load.blocks_total.into()
    }),
    (
        "blocks_active",
        "KV blocks held by running requests",
        |load| load.blocks_active.into(),
    ),
    (
        "blocks_cached",
        "Reusable KV blocks held by nobody",
        |load| load.blocks_cached.into(),
    ),
    (
        "blocks_quarantined",
        "KV blocks that a peer may still write to",
        |load| load.blocks_quarantined.into(),
    ),
    ("requests_running", "Requests being computed", |load| {
        load.requests_running.into()
    }),
    ("requests_waiting", "Requests waiting", |load| {
        load.requests_waiting.into()
    }),
    (
        "prefill_tokens_queued",
        "Prompt tokens accepted and not yet computed",
        |load| load.prefill_tokens_queued,
    ),
    (
        "prefill_tokens",
        "Prompt tokens computed since start",
        |load| load.prefill_tokens_total,
    ),
    (
        "cached_tokens",
        "Prompt tokens found in the cache since start",
        |load| load.cached_tokens_total,
    ),
    (
        "cached_host_tokens",
        "Prompt tokens loaded from host memory since start",
        |load| load.cached_host_tokens_total,
    ),
    (
        "cached_disk_tokens",
        "Prompt tokens loaded from disk since start",
        |load| load.cached_disk_tokens_total,
    ),
    (
        "cached_remote_tokens",
        "Prompt tokens loaded from an object store or another worker since start",
        |load| load.cached_remote_tokens_total,
    ),
    (
        "onboard_failures",
        "Requests that lower tiers did not give all they had found since start",
        |load| load.onboard_failures_total,
    ),
    ("decode_tokens", "Tokens generated since start", |load| {
        load.decode_tokens_total
    }),
    (
        "transfer_bytes",
        "KV bytes exchanged with other workers since start",
        |load| load.transfer_bytes_total,
    ),
    (
        "transfer_blocks",
        "KV blocks exchanged with other workers since start",
        |load| load.transfer_blocks_total,
    ),
    ("preemptions", "Requests preempted since start", |load| {
        load.preemptions_total
    }),
    (
        "kv_events_disconnected",
        "1 when the KV events of the worker's engine do not come",
        |load| load.events.disconnected.into(),
    ),
    (
        "kv_events_partial",
        "1 when the worker's engine may hold blocks that are not known",
        |load| load.events.partial.into(),
    ),
    (
        "kv_events_wrong_block_size",
        "1 when the engine's blocks have another size than the worker registered",
        |load| load.events.wrong_block_size.into(),
    ),
    (
        "kv_events_gaps",
        "Times that KV events of the engine were missing since start",
        |load| load.events.gaps_total,
    ),
    (
        "kv_events_resyncs",
        "Times that the engine's KV cache was forgotten and learned anew since start",
        |load| load.events.resyncs_total,
    ),
    (
        "kv_events_orphans",
        "KV events about blocks whose beginning is not known since start",
        |load| load.events.orphans_total,
    ),
];

impl Collector for WorkerCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let status = self.service.status();
        ConstGauge::new(i64::from(status.ready)).encode(encoder.encode_descriptor(
            "blockplane_ready",
            "1 when a request would be served",
            None,
            prometheus_client::metrics::MetricType::Gauge,
        )?)?;
        for (name, help, value) in WORKER_GAUGES {
            let name = format!("blockplane_worker_{name}");
            let gauges: Family<WorkerLabels, Gauge> = Family::default();
            for worker in &status.workers {
                for load in &worker.load {
                    let value = i64::try_from(value(load)).unwrap_or(i64::MAX);
                    gauges.get_or_create(&labels(worker, load)).set(value);
                }
            }
            gauges.encode(encoder.encode_descriptor(
                &name,
                help,
                None,
                prometheus_client::metrics::MetricType::Gauge,
            )?)?;
        }
        Ok(())
    }
}

fn labels(worker: &WorkerStatus, load: &LoadReport) -> WorkerLabels {
    WorkerLabels {
        worker: worker.id.to_string(),
        role: worker.role.as_str(),
        rank: load.rank.0,
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "token counts are far below 2^52"
)]
fn count(tokens: usize) -> f64 {
    tokens as f64
}

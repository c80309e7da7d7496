//! The command line of `vllm serve`: what a person wrote, checked, and what we have to add. Pure.

use blockplane_protocol::WorkerRole;
use serde_json::{Value, json};
use thiserror::Error;

use super::EventsSource;

/// What the arguments are for.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The model, as vLLM finds it.
    pub model: String,
    /// Name under which it is served.
    pub served_model_name: String,
    /// What part of requests the server does.
    pub role: WorkerRole,
    /// Port of the loopback interface to listen on.
    pub port: u16,
    /// Tokens per block, where a person has said it to us.
    pub block_tokens: Option<u32>,
    /// Data-parallel ranks, where a person has said it to us.
    pub dp_size: Option<u32>,
    /// Where rank 0 shall publish KV events, and where it shall answer who missed some.
    pub events: (String, String),
    /// What its KV cache is connected to, where a person has said it to us.
    pub connector: Option<Connector>,
    /// This vLLM offers `/inference/v1/generate` only when it is told to.
    pub scale_out: bool,
}

/// What vLLM's KV cache is connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connector {
    /// Our tiers: host memory, disk, objects.
    Kvbm,
    /// Other vLLMs.
    Nixl,
    /// Both.
    KvbmAndNixl,
}

/// A command line, and what follows from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arguments {
    /// What comes after the program.
    pub argv: Vec<String>,
    /// Where its KV events are; `None` when it publishes none, because of what a person wrote.
    pub events: Option<EventsSource>,
    /// It orders requests by priority.
    pub by_priority: bool,
}

/// Why a command line cannot work.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{argument}: {reason}")]
pub struct ArgumentError {
    /// The argument of vLLM.
    pub argument: String,
    /// Why it cannot be, and what can.
    pub reason: String,
}

/// Connectors by which one vLLM hands KV to another, and that we start where nobody names one.
const CONNECTOR: &str = "NixlConnector";

/// Our connector for vLLM, of the Python package `blockplane`, and where it is.
const TIERS: (&str, &str) = ("BlockplaneConnector", "blockplane.vllm");

/// Arguments that are ours to give, with the reason.
const OURS: [(&str, &str); 9] = [
    (
        "--host",
        "the worker talks to vLLM over the loopback interface; --host before '--' is the address of the worker",
    ),
    (
        "--port",
        "the worker takes a free port of the loopback interface",
    ),
    ("--uds", "the worker talks to vLLM over TCP"),
    (
        "--served-model-name",
        "give --served-model-name before '--': the frontend has to know it",
    ),
    (
        "--model",
        "give --model before '--': the frontend needs its tokenizer",
    ),
    ("--api-key", "nobody but the worker reaches this server"),
    (
        "--ssl-keyfile",
        "the worker talks to vLLM over the loopback interface, without TLS",
    ),
    (
        "--root-path",
        "the worker expects vLLM's API at its usual place",
    ),
    (
        "--headless",
        "a server without HTTP serves no requests; start the other nodes of a model by hand and use --attach",
    ),
];

/// The arguments as written, with one way to look them up.
struct Given<'a>(&'a [String]);

/// Checks what a person wrote and adds what is missing.
///
/// # Errors
/// An [`ArgumentError`] that names the first argument that cannot work.
pub fn arguments(given: &[String], wanted: &Wanted) -> Result<Arguments, ArgumentError> {
    let known = Given(given);
    for (argument, reason) in OURS {
        if known.has(argument) {
            return Err(error(argument, reason));
        }
    }
    let mut argv: Vec<String> = ["serve", &wanted.model].map(str::to_owned).into();
    let mut add = |words: &[&str]| argv.extend(words.iter().map(|&word| word.to_owned()));
    add(&["--host", "127.0.0.1", "--port", &wanted.port.to_string()]);
    add(&["--served-model-name", &wanted.served_model_name]);
    for flag in [
        // Usage tells what was cached; log-probabilities name tokens by id; no log line per request.
        "--enable-prompt-tokens-details",
        "--return-tokens-as-token-ids",
        "--disable-uvicorn-access-log",
    ] {
        if !known.has(flag) {
            add(&[flag]);
        }
    }
    if wanted.scale_out && !known.has("--enable-scale-out") {
        add(&["--enable-scale-out"]);
    }
    for (argument, alias, value) in [
        ("--block-size", "", wanted.block_tokens),
        ("--data-parallel-size", "-dp", wanted.dp_size),
    ] {
        if let Some(value) = agreed(&known, argument, alias, value)? {
            add(&[argument, &value.to_string()]);
        }
    }
    let events = match events(&known, wanted)? {
        Events::Off => None,
        Events::Given(source) => Some(source),
        Events::Added(text, source) => {
            add(&["--kv-events-config", &text]);
            Some(source)
        }
    };
    if let Some(text) = connector(&known, wanted)? {
        add(&["--kv-transfer-config", &text]);
    }
    let policy = known.value("--scheduling-policy");
    argv.extend(given.iter().cloned());
    Ok(Arguments {
        argv,
        events,
        by_priority: policy == Some("priority"),
    })
}

/// A number that may be said to us, to vLLM, or to both, but not differently; what is to be added.
fn agreed(
    known: &Given<'_>,
    argument: &str,
    alias: &str,
    ours: Option<u32>,
) -> Result<Option<u32>, ArgumentError> {
    let theirs = known.value(argument).or_else(|| known.value(alias));
    match (ours, theirs) {
        (Some(ours), Some(theirs)) if theirs.parse() != Ok(ours) => {
            let reason = format!("it is {theirs} behind '--' and {ours} before; say it once");
            Err(error(argument, &reason))
        }
        (_, Some(_)) => Ok(None),
        (ours, None) => Ok(ours),
    }
}

enum Events {
    Off,
    Given(EventsSource),
    Added(String, EventsSource),
}

fn events(known: &Given<'_>, wanted: &Wanted) -> Result<Events, ArgumentError> {
    let argument = "--kv-events-config";
    let Some(config) = known.json(argument)? else {
        if known.has("--no-enable-prefix-caching") {
            return Ok(Events::Off);
        }
        let (endpoint, replay) = &wanted.events;
        let text = json!({
            "enable_kv_cache_events": true,
            "publisher": "zmq",
            "endpoint": endpoint,
            "replay_endpoint": replay,
            "topic": "",
        });
        let source = EventsSource {
            endpoint: endpoint.clone(),
            replay: Some(replay.clone()),
            topic: String::new(),
        };
        return Ok(Events::Added(text.to_string(), source));
    };
    if config["enable_kv_cache_events"] != true {
        return Ok(Events::Off);
    }
    match config["publisher"].as_str() {
        None | Some("zmq") => {}
        Some(other) => {
            let reason = format!("the publisher is '{other}'; the worker listens to 'zmq'");
            return Err(error(argument, &reason));
        }
    }
    let text = |key: &str| config[key].as_str().map(str::to_owned);
    Ok(Events::Given(EventsSource {
        endpoint: text("endpoint").unwrap_or_else(|| "tcp://*:5557".to_owned()),
        replay: text("replay_endpoint"),
        topic: text("topic").unwrap_or_default(),
    }))
}

/// The connector to add: the one that was asked for, and else for the roles that need one.
fn connector(known: &Given<'_>, wanted: &Wanted) -> Result<Option<String>, ArgumentError> {
    let argument = "--kv-transfer-config";
    let config = known.json(argument)?;
    let role = wanted.role;
    if let Some(asked) = wanted.connector {
        if config.is_some() {
            let reason = "--connector before '--' says it already; say it once";
            return Err(error(argument, reason));
        }
        return Ok(Some(asked_for(asked, role)?));
    }
    let (unfit, needs) = match role {
        WorkerRole::Aggregated => return Ok(None),
        WorkerRole::Prefill => ("kv_consumer", "kv_producer"),
        WorkerRole::Decode => ("kv_producer", "kv_consumer"),
    };
    let role = role.as_str();
    let Some(config) = config else {
        return Ok(Some(by_nixl(needs).to_string()));
    };
    if config["kv_connector"].as_str().is_none_or(str::is_empty) {
        let reason = format!(
            "it names no kv_connector; a {role} worker hands KV over by one, for example {CONNECTOR}"
        );
        return Err(error(argument, &reason));
    }
    if config["kv_role"] == unfit {
        let reason = format!("kv_role is {unfit}; a {role} worker needs kv_both or {needs}");
        return Err(error(argument, &reason));
    }
    Ok(None)
}

/// A failed load is computed again: a request is not lost with the worker that had its KV.
fn by_nixl(kv_role: &str) -> Value {
    json!({
        "kv_connector": CONNECTOR,
        "kv_role": kv_role,
        "kv_load_failure_policy": "recompute",
    })
}

fn asked_for(asked: Connector, role: WorkerRole) -> Result<String, ArgumentError> {
    let mode = match asked {
        Connector::Nixl => {
            let kv_role = match role {
                WorkerRole::Aggregated => "kv_both",
                WorkerRole::Prefill => "kv_producer",
                WorkerRole::Decode => "kv_consumer",
            };
            return Ok(by_nixl(kv_role).to_string());
        }
        Connector::Kvbm if role == WorkerRole::Aggregated => "kvbm",
        Connector::Kvbm => {
            let role = role.as_str();
            let reason = format!("a {role} worker hands KV over: it needs --connector kvbm nixl");
            return Err(error("--connector", &reason));
        }
        Connector::KvbmAndNixl => "kvbm+nixl",
    };
    let (name, module) = TIERS;
    let text = json!({
        "kv_connector": name,
        "kv_connector_module_path": module,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": { "mode": mode },
    });
    Ok(text.to_string())
}

impl<'a> Given<'a> {
    fn has(&self, argument: &str) -> bool {
        self.0.iter().any(|word| named(word, argument).is_some())
    }

    /// The value of an argument, which may be a word of its own; the last one counts.
    fn value(&self, argument: &str) -> Option<&'a str> {
        let words = self.0.iter().enumerate().rev();
        words
            .filter_map(|(at, word)| match named(word, argument)? {
                Some(value) => Some(value),
                None => self.0.get(at + 1).map(String::as_str),
            })
            .next()
    }

    /// The value of an argument that is a JSON object.
    fn json(&self, argument: &str) -> Result<Option<Value>, ArgumentError> {
        let dotted = format!("{argument}.");
        if let Some(word) = self.0.iter().find(|word| dashes(word).starts_with(&dotted)) {
            let reason = format!("give the whole of {argument} as one JSON object");
            return Err(error(word, &reason));
        }
        let Some(text) = self.value(argument) else {
            return Ok(None);
        };
        match serde_json::from_str(text) {
            Ok(value @ Value::Object(_)) => Ok(Some(value)),
            Ok(_) | Err(_) => {
                let reason = format!("'{text}' is not a JSON object");
                Err(error(argument, &reason))
            }
        }
    }
}

/// Whether a word is this argument; then with the value behind '=', if there is one.
fn named<'a>(word: &'a str, argument: &str) -> Option<Option<&'a str>> {
    if argument.is_empty() {
        return None;
    }
    let (name, value) = match word.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (word, None),
    };
    (dashes(name) == argument).then_some(value)
}

/// vLLM takes `--block_size` for `--block-size`.
fn dashes(word: &str) -> String {
    match word.strip_prefix("--") {
        Some(name) => format!("--{}", name.replace('_', "-")),
        None => word.to_owned(),
    }
}

fn error(argument: &str, reason: &str) -> ArgumentError {
    ArgumentError {
        argument: argument.to_owned(),
        reason: reason.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(role: WorkerRole) -> Wanted {
        Wanted {
            model: "/m".to_owned(),
            served_model_name: "tiny".to_owned(),
            role,
            port: 8_123,
            block_tokens: None,
            dp_size: None,
            events: ("ipc:///e".to_owned(), "ipc:///r".to_owned()),
            connector: None,
            scale_out: true,
        }
    }

    fn with(given: &[&str], wanted: &Wanted) -> Result<Arguments, ArgumentError> {
        let given: Vec<String> = given.iter().map(|&word| word.to_owned()).collect();
        arguments(&given, wanted)
    }

    #[test]
    fn what_is_needed_is_added_before_what_a_person_wrote() {
        let given = ["--max-model-len", "512", "--enable-prompt-tokens-details"];
        let found = with(&given, &wanted(WorkerRole::Aggregated)).unwrap();
        let line = found.argv.join(" ");
        assert!(
            line.starts_with("serve /m --host 127.0.0.1 --port 8123 --served-model-name tiny "),
            "{line}"
        );
        assert!(line.ends_with(&given.join(" ")), "{line}");
        assert_eq!(line.matches("--enable-prompt-tokens-details").count(), 1);
        assert!(line.contains("--enable-scale-out") && !line.contains("--kv-transfer-config"));
        let events = found.events.unwrap();
        assert_eq!(events.endpoint, "ipc:///e");
        assert_eq!(events.replay.as_deref(), Some("ipc:///r"));
        assert!(line.contains(r#""replay_endpoint":"ipc:///r""#), "{line}");
        let older = Wanted {
            scale_out: false,
            ..wanted(WorkerRole::Aggregated)
        };
        let line = with(&[], &older).unwrap().argv.join(" ");
        assert!(!line.contains("--enable-scale-out"), "{line}");
    }

    #[test]
    fn those_who_hand_kv_over_get_a_connector_unless_they_have_one() {
        for role in [WorkerRole::Prefill, WorkerRole::Decode] {
            let line = with(&[], &wanted(role)).unwrap().argv.join(" ");
            assert!(line.contains(r#""kv_connector":"NixlConnector""#), "{line}");
            let part = if role == WorkerRole::Prefill {
                "producer"
            } else {
                "consumer"
            };
            assert!(
                line.contains(&format!(r#""kv_role":"kv_{part}""#)),
                "{line}"
            );
            assert!(
                line.contains(r#""kv_load_failure_policy":"recompute""#),
                "{line}"
            );
            let own = r#"{"kv_connector":"MyConnector","kv_role":"kv_both"}"#;
            let argv = with(&["--kv_transfer_config", own], &wanted(role))
                .unwrap()
                .argv;
            assert!(!argv.join(" ").contains("NixlConnector"));
        }
    }

    #[test]
    fn a_connector_that_is_asked_for_is_given_to_the_roles_that_it_fits() {
        let asked = |connector, role| Wanted {
            connector: Some(connector),
            ..wanted(role)
        };
        let line = |connector, role| with(&[], &asked(connector, role)).unwrap().argv.join(" ");
        let kvbm = line(Connector::Kvbm, WorkerRole::Aggregated);
        assert!(
            kvbm.contains(r#""kv_connector_module_path":"blockplane.vllm""#),
            "{kvbm}"
        );
        assert!(kvbm.contains(r#"{"mode":"kvbm"}"#), "{kvbm}");
        let both = line(Connector::KvbmAndNixl, WorkerRole::Decode);
        assert!(both.contains(r#"{"mode":"kvbm+nixl"}"#), "{both}");
        let nixl = line(Connector::Nixl, WorkerRole::Aggregated);
        assert!(nixl.contains(r#""kv_connector":"NixlConnector""#), "{nixl}");
        let alone = with(&[], &asked(Connector::Kvbm, WorkerRole::Prefill)).unwrap_err();
        assert!(alone.reason.contains("--connector kvbm nixl"), "{alone}");
        let own = ["--kv-transfer-config", r#"{"kv_connector":"MyConnector"}"#];
        let twice = with(&own, &asked(Connector::Kvbm, WorkerRole::Aggregated)).unwrap_err();
        assert!(twice.reason.contains("say it once"), "{twice}");
    }

    #[test]
    fn events_of_a_persons_own_are_listened_to() {
        let own = r#"--kv-events-config={"enable_kv_cache_events":true,"endpoint":"tcp://*:6000","topic":"t"}"#;
        let found = with(&[own], &wanted(WorkerRole::Aggregated)).unwrap();
        let events = found.events.unwrap();
        assert_eq!(
            (events.endpoint.as_str(), events.topic.as_str()),
            ("tcp://*:6000", "t")
        );
        assert_eq!(events.replay, None);
        for off in [
            r#"--kv-events-config={"enable_kv_cache_events":false}"#,
            "--no-enable-prefix-caching",
        ] {
            assert_eq!(
                with(&[off], &wanted(WorkerRole::Aggregated))
                    .unwrap()
                    .events,
                None
            );
        }
    }

    #[test]
    fn sizes_are_said_once() {
        let ours = Wanted {
            block_tokens: Some(32),
            dp_size: Some(2),
            ..wanted(WorkerRole::Aggregated)
        };
        let line = with(&["-dp", "2"], &ours).unwrap().argv.join(" ");
        assert!(line.contains("--block-size 32") && !line.contains("--data-parallel-size"));
        assert!(with(&["--block_size=32"], &ours).is_ok());
        let error = with(&["--block-size", "16"], &ours)
            .unwrap_err()
            .to_string();
        assert!(error.contains("16 behind '--' and 32 before"), "{error}");
        assert!(with(&["-dp", "4"], &ours).is_err());
    }

    #[test]
    fn what_cannot_work_is_refused_with_the_reason() {
        let consumer = r#"{"kv_connector":"NixlConnector","kv_role":"kv_consumer"}"#;
        for (given, role, reason) in [
            (&["--port", "1"][..], WorkerRole::Aggregated, "free port"),
            (&["--host=0.0.0.0"], WorkerRole::Aggregated, "loopback"),
            (
                &["--served_model_name", "x"],
                WorkerRole::Aggregated,
                "before '--'",
            ),
            (&["--headless"], WorkerRole::Aggregated, "--attach"),
            (
                &["--kv-transfer-config", consumer],
                WorkerRole::Prefill,
                "kv_both or kv_producer",
            ),
            (
                &["--kv-transfer-config", "{}"],
                WorkerRole::Decode,
                "names no kv_connector",
            ),
            (
                &["--kv-transfer-config", "nixl"],
                WorkerRole::Decode,
                "not a JSON object",
            ),
            (
                &["--kv-events-config.endpoint", "x"],
                WorkerRole::Decode,
                "one JSON object",
            ),
            (
                &[
                    "--kv-events-config",
                    r#"{"enable_kv_cache_events":true,"publisher":"null"}"#,
                ],
                WorkerRole::Decode,
                "listens to 'zmq'",
            ),
        ] {
            let error = with(given, &wanted(role)).unwrap_err().to_string();
            assert!(error.contains(reason), "{given:?}: {error}");
        }
    }

    #[test]
    fn the_scheduling_policy_decides_about_priorities() {
        let role = WorkerRole::Aggregated;
        assert!(!with(&[], &wanted(role)).unwrap().by_priority);
        assert!(
            with(&["--scheduling-policy", "priority"], &wanted(role))
                .unwrap()
                .by_priority
        );
    }
}

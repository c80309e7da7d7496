//! A vLLM server behind a worker: from flags to an engine.

mod canary;
pub(crate) mod guard;
mod ports;
mod probe;

use std::{ffi::OsString, path::PathBuf, sync::Arc};

use anyhow::{Context, ensure};
use blockplane_engine::{
    VllmConfig, VllmEngine, VllmSource,
    vllm::{
        EventsSource, HealthConfig, RemotePrefillConfig, ServerCommand,
        arguments::{Arguments, Connector, Wanted, arguments},
    },
};
use blockplane_protocol::WorkerRole;
use rustix::process::{Pid, test_kill_process};

use crate::{
    cli::{GUARD, WorkerArgs},
    output,
    wiring::engines::Settings,
};

/// Folders of sockets, before the process id.
const SOCKETS: &str = "blockplane-vllm-";
/// From SIGTERM to SIGKILL: requests are over by then.
const STOP_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(3);

/// Starts the engine. Takes as long as vLLM does.
pub(crate) fn start(settings: &Settings) -> anyhow::Result<Arc<VllmEngine>> {
    let args = &settings.args;
    ensure!(
        args.model.is_some(),
        "--engine vllm needs --model: the frontend uses its tokenizer and chat template"
    );
    let remote = settings.remote.clone().map(|workers| RemotePrefillConfig {
        tokens_min: args.remote_prefill_min_tokens,
        ..RemotePrefillConfig::new(workers)
    });
    let health = HealthConfig {
        canary_wait: args.vllm.canary_wait,
        canary_timeout: args.vllm.canary_timeout,
        canary: args
            .vllm
            .health_check_payload
            .as_deref()
            .map(canary::read)
            .transpose()?,
        ..HealthConfig::default()
    };
    let (source, events, by_priority) = match &args.vllm.attach {
        Some(url) => {
            let events = attached_events(args, url)?;
            (VllmSource::Attach(url.clone()), events, false)
        }
        None => {
            let (command, planned) = command(settings)?;
            (
                VllmSource::Start(command),
                planned.events,
                planned.by_priority,
            )
        }
    };
    let config = VllmConfig {
        block_tokens: args.block_size,
        events,
        by_priority,
        remote,
        health,
        ..VllmConfig::new(
            settings.model_name.clone(),
            settings.role,
            settings.model_dir.clone(),
            source,
            settings.runtime.clone(),
        )
    };
    let attached = args.vllm.attach.is_some() && config.events.is_none();
    let engine = settings
        .runtime
        .block_on(VllmEngine::start(config))
        .context("the vLLM server cannot be used")?;
    if !engine.facts().prefix_caching {
        tracing::warn!(
            "vLLM was started without prefix caching: requests are routed by load alone"
        );
    } else if attached && engine.events_status().is_empty() {
        tracing::warn!(
            "this vLLM server publishes no KV events: requests are routed by load alone; start it \
             with --kv-events-config, or say where they are with --attach-kv-events"
        );
    }
    Ok(engine)
}

/// The command line of a server of our own.
fn command(settings: &Settings) -> anyhow::Result<(ServerCommand, Arguments)> {
    let args = &settings.args;
    clean_up_after_others();
    let vllm = probe::probe(&args.vllm.vllm_program)?;
    let ranks = args.data_parallel_size.unwrap_or(1);
    let port = ports::free(1)?;
    let url = format!("http://127.0.0.1:{port}");
    let wanted = Wanted {
        model: settings.model_dir.display().to_string(),
        served_model_name: settings.model_name.clone(),
        role: settings.role,
        port,
        block_tokens: args.block_size,
        dp_size: args.data_parallel_size,
        events: ports::events(ranks)?,
        connector: args.vllm.connector(),
        scale_out: vllm.scale_out,
    };
    let planned = arguments(&args.vllm.vllm_args, &wanted)
        .context("these arguments behind '--' cannot work")?;
    let hands_over = settings.role != WorkerRole::Aggregated
        || matches!(
            args.vllm.connector(),
            Some(Connector::Nixl | Connector::KvbmAndNixl)
        );
    let own = std::env::current_exe().context("the path of this program is not known")?;
    let mut argv: Vec<OsString> = vec![vllm.program.into_os_string()];
    argv.extend(planned.argv.iter().map(OsString::from));
    tracing::info!(version = vllm.version, command = ?argv, "starting vLLM");
    let command = ServerCommand {
        guard: vec![own.into_os_string(), GUARD.into(), "--".into()],
        argv,
        variables: variables(hands_over, &args.host, ranks)?,
        url,
        start_timeout: args.vllm.vllm_start_timeout,
        stop_timeout: STOP_TIMEOUT,
        on_log: Arc::new(|line: &str| output::diagnostic(&format!("[vllm] {line}"))),
    };
    Ok((command, planned))
}

/// Two servers of one machine would take the same port for the hand-over of KV.
fn variables(hands_over: bool, host: &str, ranks: u32) -> anyhow::Result<Vec<(String, String)>> {
    if !hands_over {
        return Ok(Vec::new());
    }
    let port = ports::free(ranks)?.to_string();
    let wanted = [
        ("VLLM_NIXL_SIDE_CHANNEL_HOST", host.to_owned()),
        ("VLLM_NIXL_SIDE_CHANNEL_PORT", port),
    ];
    let missing = wanted.into_iter().filter(|(name, _)| !is_set(name));
    Ok(missing
        .map(|(name, value)| (name.to_owned(), value))
        .collect())
}

#[expect(
    clippy::disallowed_methods,
    reason = "what a person sets for vLLM is left as it is"
)]
fn is_set(name: &str) -> bool {
    std::env::var_os(name).is_some()
}

/// Where a server that somebody else started publishes its events.
fn attached_events(args: &WorkerArgs, url: &str) -> anyhow::Result<Option<EventsSource>> {
    let Some(text) = &args.vllm.attach_kv_events else {
        return probe::events(url);
    };
    let (endpoint, replay) = match text.split_once(',') {
        Some((endpoint, replay)) => (endpoint, Some(replay.to_owned())),
        None => (text.as_str(), None),
    };
    Ok(Some(EventsSource {
        endpoint: endpoint.to_owned(),
        replay,
        topic: String::new(),
    }))
}

/// Where sockets of this process lie.
fn socket_dir() -> PathBuf {
    std::env::temp_dir().join(format!("{SOCKETS}{}", std::process::id()))
}

/// Removes the sockets of workers that were killed.
fn clean_up_after_others() {
    let Ok(entries) = std::fs::read_dir(std::env::temp_dir()) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(SOCKETS));
        let dead = pid
            .and_then(|pid| pid.parse::<i32>().ok())
            .and_then(Pid::from_raw)
            .is_some_and(|pid| test_kill_process(pid) == Err(rustix::io::Errno::SRCH));
        if dead {
            // Those of another user stay.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// Removes what a server of this process left behind.
pub(crate) fn clean_up() {
    let dir = socket_dir();
    if dir.exists()
        && let Err(error) = std::fs::remove_dir_all(&dir)
    {
        tracing::warn!(dir = %dir.display(), %error, "sockets of vLLM were left behind");
    }
}

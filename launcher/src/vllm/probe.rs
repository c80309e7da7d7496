//! What can be known of vLLM without starting it, which takes long.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, bail};
use blockplane_bench::client::Server;
use blockplane_engine::vllm::EventsSource;
use serde::Deserialize;

/// Looks at the package without importing it: that would load torch.
const SCRIPT: &str = r#"
import importlib.metadata, importlib.util, json, pathlib
spec = importlib.util.find_spec("vllm")
root = pathlib.Path(spec.origin).parent / "entrypoints"
files = [*root.glob("**/cli_args.py")]
scale_out = any("enable_scale_out" in file.read_text() for file in files)
print(json.dumps({"version": importlib.metadata.version("vllm"), "scale_out": scale_out}))
"#;

/// What is known of a program.
#[derive(Clone, Debug)]
pub(super) struct Probed {
    /// Where it is.
    pub(super) program: PathBuf,
    /// Its version, as far as it is known.
    pub(super) version: String,
    /// It has `--enable-scale-out`, without which there is no route for tokens.
    pub(super) scale_out: bool,
}

#[derive(Deserialize)]
struct Package {
    version: String,
    scale_out: bool,
}

/// One rank of `/kv_event_sources`.
#[derive(Deserialize)]
struct Source {
    endpoint: String,
    #[serde(default)]
    replay_endpoint: Option<String>,
    #[serde(default)]
    topic: String,
}

/// Finds a program and what it is.
pub(super) fn probe(program: &Path) -> anyhow::Result<Probed> {
    let found = find(program, &search_path()).with_context(|| {
        format!(
            "'{}' is not found; install vLLM (pip install vllm), or say where it is with \
             --vllm-program",
            program.display()
        )
    })?;
    let package = interpreter(&found).and_then(|python| {
        let output = Command::new(python).args(["-c", SCRIPT]).output().ok()?;
        serde_json::from_slice::<Package>(&output.stdout).ok()
    });
    Ok(match package {
        Some(package) => Probed {
            program: found,
            version: package.version,
            scale_out: package.scale_out,
        },
        // Not a script of a Python environment: it is taken as it is.
        None => Probed {
            program: found,
            version: "unknown".to_owned(),
            scale_out: false,
        },
    })
}

/// Where a server that runs says that its events are.
pub(super) fn events(url: &str) -> anyhow::Result<Option<EventsSource>> {
    let server = Server::new(url, Duration::from_secs(10))?;
    let asked = async { server.get("/kv_event_sources").await };
    let Ok(answer) = tokio::runtime::Handle::current().block_on(asked) else {
        // Servers before 0.30 do not tell.
        return Ok(None);
    };
    let sources: BTreeMap<String, Source> = serde_json::from_value(answer)
        .context("what the server says of its KV events is not understood")?;
    let Some(first) = sources.into_iter().find(|(rank, _)| rank == "0") else {
        return Ok(None);
    };
    let host = url
        .trim_start_matches("http://")
        .split([':', '/'])
        .next()
        .unwrap_or("127.0.0.1");
    // It says what it binds to; from here that is its host.
    let reach = |endpoint: String| endpoint.replace("//*:", &format!("//{host}:"));
    Ok(Some(EventsSource {
        endpoint: reach(first.1.endpoint),
        replay: first.1.replay_endpoint.map(reach),
        topic: first.1.topic,
    }))
}

/// The file of a program: as it is when it names a folder, else in the search path.
fn find(program: &Path, search_path: &std::ffi::OsStr) -> anyhow::Result<PathBuf> {
    if program.components().count() > 1 {
        if !program.is_file() {
            bail!("there is no such file");
        }
        return Ok(program.to_owned());
    }
    std::env::split_paths(search_path)
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
        .context("it is in no folder of PATH")
}

/// The Python of a script: its first line names it.
fn interpreter(script: &Path) -> Option<PathBuf> {
    let text = std::fs::read(script).ok()?;
    let line = text
        .strip_prefix(b"#!")?
        .split(|&byte| byte == b'\n')
        .next()?;
    let path = std::str::from_utf8(line).ok()?.trim();
    let named_python = Path::new(path)
        .file_name()?
        .to_string_lossy()
        .starts_with("python");
    named_python.then(|| PathBuf::from(path))
}

#[expect(
    clippy::disallowed_methods,
    reason = "programs are found as a shell finds them"
)]
fn search_path() -> std::ffi::OsString {
    std::env::var_os("PATH").unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_found_as_a_shell_finds_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("vllm");
        std::fs::write(&file, "#!/opt/x/bin/python3.12\nimport vllm\n").unwrap();
        let path = folder.path().as_os_str();
        assert_eq!(find(Path::new("vllm"), path).unwrap(), file);
        assert_eq!(find(&file, "".as_ref()).unwrap(), file);
        assert!(find(Path::new("other"), path).is_err());
        assert!(find(&folder.path().join("other"), path).is_err());
        let python = interpreter(&file).unwrap();
        assert_eq!(python, Path::new("/opt/x/bin/python3.12"));
        std::fs::write(&file, "#!/bin/sh\n").unwrap();
        assert_eq!(interpreter(&file), None);
        let probed = probe(&file).unwrap();
        assert!(!probed.scale_out && probed.version == "unknown");
    }
}

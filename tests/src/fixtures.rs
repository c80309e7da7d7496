//! Where the binary and the checkpoints under test are.
//!
//! This is the one module of the harness that reads the environment: a test executable has no other
//! way to be told where things are.

use std::{
    env,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail};

/// Path of the `blockplane` binary under test.
const BINARY: &str = "BLOCKPLANE_BIN";
/// Folder of generated checkpoints.
const FIXTURES: &str = "BLOCKPLANE_FIXTURES";
/// Program of a vLLM.
const VLLM: &str = "BLOCKPLANE_VLLM";
/// Seed of the random parts of a run.
const SEED: &str = "BLOCKPLANE_TEST_SEED";

/// The `blockplane` binary: `BLOCKPLANE_BIN`, or the one cargo built into the same profile folder
/// as this test executable.
///
/// # Errors
/// Neither is there; the message says how to build it.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = variable(BINARY) {
        let path = PathBuf::from(path);
        if !path.is_file() {
            bail!("{BINARY} names {}, which is not a file", path.display());
        }
        return Ok(path);
    }
    let test = env::current_exe().context("path of the test executable")?;
    let beside = test
        .parent()
        .and_then(Path::parent)
        .context("a test executable lies in <target>/<profile>/deps")?
        .join("blockplane");
    if !beside.is_file() {
        bail!(
            "no blockplane binary at {}: build it with `cargo build --release -p blockplane` (the \
             profile of the tests), or name one in {BINARY}",
            beside.display()
        );
    }
    Ok(beside)
}

/// The checkpoint called `name`: from `BLOCKPLANE_FIXTURES`, or committed under `tests/fixtures`.
///
/// # Errors
/// It is in neither place.
pub fn checkpoint(name: &str) -> Result<PathBuf> {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let generated = variable(FIXTURES).map(PathBuf::from);
    generated
        .iter()
        .chain([&committed])
        .map(|folder| folder.join(name))
        .find(|folder| folder.join("config.json").is_file())
        .with_context(|| {
            format!(
                "no checkpoint {name} under {} or {FIXTURES}; make it with \
                 `tests/fixtures/make_fixtures.py OUT {name}`",
                committed.display()
            )
        })
}

/// The `vllm` of an installation, as `tests/run vllm` makes one.
///
/// # Errors
/// None is named.
pub fn vllm() -> Result<PathBuf> {
    let program = variable(VLLM).map(PathBuf::from);
    program.with_context(|| {
        format!("{VLLM} has to name a `vllm`; `tests/run vllm` and tests/vllm_env.py install one")
    })
}

/// The folder of the checkpoint that the binary carries.
#[must_use]
pub fn bundled() -> PathBuf {
    repository().join("models/blockplane-tiny")
}

/// Seed of this run: `BLOCKPLANE_TEST_SEED`, or the time. Printed, so that a failure can be repeated.
#[must_use]
pub fn seed() -> u64 {
    let seed = variable(SEED)
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(|| {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(1, |since| since.as_secs())
        });
    eprintln!("seed: {SEED}={seed}");
    seed
}

/// Root of the repository.
#[must_use]
pub fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

#[expect(
    clippy::disallowed_methods,
    reason = "a test executable is configured by its environment only"
)]
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

//! Other processes of a benchmark or a self-test: this program again, told by its standard input.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, sync_channel},
    thread,
};

use anyhow::Context;
use serde::de::DeserializeOwned;

/// A child, and what it answers: one JSON value a line.
pub(crate) type Started<R> = (Child, Receiver<anyhow::Result<R>>);

/// Starts this program with `arguments` and further environment `variables`.
///
/// # Errors
/// The system starts no process or thread.
pub(crate) fn start<R>(arguments: &[&str], variables: &[(&str, &str)]) -> anyhow::Result<Started<R>>
where
    R: DeserializeOwned + Send + 'static,
{
    let program = std::env::current_exe().context("the path of this program is not known")?;
    let mut child = Command::new(&program)
        .args(arguments)
        .envs(variables.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let output = child.stdout.take().context("the child has no output")?;
    let (sender, replies) = sync_channel(1);
    thread::Builder::new()
        .name("bench-replies".to_owned())
        .spawn(move || {
            for line in BufReader::new(output).lines() {
                let reply = line
                    .map_err(anyhow::Error::from)
                    .and_then(|line| Ok(serde_json::from_str(&line)?));
                if sender.send(reply).is_err() {
                    return;
                }
            }
        })?;
    Ok((child, replies))
}

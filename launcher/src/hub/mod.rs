//! Models by name: a directory, or an id of the Hugging Face hub, whose files come from the cache that
//! the hub's own tools use, or are downloaded into it.

mod fetch;
mod files;
mod progress;
mod verify;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, ensure};

use self::fetch::Hub;
use crate::{
    cli::{FetchArgs, HubArgs, ModelCommand},
    output,
};

/// A model that is on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LocalModel {
    /// Its files.
    pub(crate) dir: PathBuf,
    /// Its id, if it was named by one: its name in the API unless another is given.
    pub(crate) id: Option<String>,
}

/// Finds or downloads a model.
pub(crate) fn resolve(name: &Path, args: &HubArgs) -> anyhow::Result<LocalModel> {
    if name.is_dir() {
        let dir = name
            .canonicalize()
            .with_context(|| format!("model directory {} cannot be opened", name.display()))?;
        return Ok(LocalModel { dir, id: None });
    }
    let id = name.to_str().filter(|name| is_id(name)).with_context(|| {
        format!(
            "model directory {} cannot be opened: there is none, and it is no id of a hub either; \
             accepted: a directory, or ORGANISATION/NAME",
            name.display()
        )
    })?;
    let dir = Hub::open(id, args)?.model()?;
    Ok(LocalModel {
        dir,
        id: Some(id.to_owned()),
    })
}

/// `blockplane model`.
pub(crate) fn run(command: ModelCommand) -> anyhow::Result<ExitCode> {
    let ModelCommand::Fetch(FetchArgs { id, to, hub }) = command;
    ensure!(
        is_id(&id),
        "'{id}' is no id of a model; accepted: ORGANISATION/NAME"
    );
    let hub = Hub::open(&id, &hub)?;
    let dir = hub.model()?;
    let dir = match to {
        None => dir,
        Some(to) => files::place(&dir, &to)?,
    };
    output::line(&format!("{id} is in {}", dir.display()));
    Ok(ExitCode::SUCCESS)
}

/// Whether a name can be an id: `organisation/name`, each of letters, digits, `-`, `_` and `.`.
fn is_id(name: &str) -> bool {
    let part = |part: &str| {
        (1..=96).contains(&part.len())
            && part
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
            && !part.starts_with(['.', '-'])
            && !part.ends_with(['.', '-'])
            && !part.contains("..")
            && !part.contains("--")
    };
    name.split_once('/')
        .is_some_and(|(organisation, name)| part(organisation) && part(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_told_from_paths() {
        for id in ["Qwen/Qwen3-0.6B", "a/b", "meta-llama/Llama-3.2_1B"] {
            assert!(is_id(id), "{id}");
        }
        for path in [
            "", "a", "/a", "a/", "./a", "../a", "a/../b", "a/b/c", "a/.b", "a b/c", "a/b-",
            "a/b--c",
        ] {
            assert!(!is_id(path), "{path}");
        }
    }

    #[test]
    fn a_directory_wins_and_what_is_neither_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let found = resolve(dir.path(), &HubArgs::default()).unwrap();
        assert_eq!((found.dir.is_dir(), found.id), (true, None));
        let error = resolve(Path::new("/no/such/model"), &HubArgs::default()).unwrap_err();
        assert!(error.to_string().contains("ORGANISATION/NAME"), "{error}");
    }
}

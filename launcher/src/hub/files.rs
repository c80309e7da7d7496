//! Which files a model is made of.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

/// Lists the shards of weights that are in several files.
const INDEX: &str = "model.safetensors.index.json";
/// Weights in one file.
const WEIGHTS: &str = "model.safetensors";
/// Files without which no model is served.
const NEEDED: [&str; 2] = ["config.json", "tokenizer.json"];
/// Files that are taken where they are.
const TAKEN: [&str; 6] = [
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// The files to download of those that a model has on the hub.
pub(super) fn wanted(id: &str, all: &[String]) -> anyhow::Result<Vec<String>> {
    let has = |name: &str| all.iter().any(|file| file == name);
    for name in NEEDED {
        ensure!(
            has(name),
            "{id} has no {name}; accepted: models in Hugging Face form with {}",
            NEEDED.join(", ")
        );
    }
    let is_weights = |file: &str| file.ends_with(".safetensors") && !file.contains('/');
    ensure!(
        all.iter().any(|file| is_weights(file)),
        "{id} has no weights as safetensors, only {}",
        all.join(", ")
    );
    let wanted = all.iter().filter(|file| {
        let file = file.as_str();
        NEEDED.contains(&file) || TAKEN.contains(&file) || file == INDEX || is_weights(file)
    });
    Ok(wanted.cloned().collect())
}

/// Whether a folder has all files of a model; the error names the first that is missing.
pub(super) fn check_complete(dir: &Path) -> anyhow::Result<()> {
    for name in NEEDED {
        ensure!(dir.join(name).exists(), "{name} is missing");
    }
    if dir.join(WEIGHTS).exists() {
        return Ok(());
    }
    let index = dir.join(INDEX);
    let Ok(text) = fs::read_to_string(&index) else {
        bail!("{WEIGHTS} is missing");
    };
    let index: Value = serde_json::from_str(&text)
        .with_context(|| format!("{} cannot be read", index.display()))?;
    let shards: BTreeSet<&str> = index["weight_map"]
        .as_object()
        .into_iter()
        .flat_map(|map| map.values().filter_map(Value::as_str))
        .collect();
    ensure!(!shards.is_empty(), "{INDEX} names no file");
    for shard in shards {
        ensure!(dir.join(shard).exists(), "{shard} is missing");
    }
    Ok(())
}

/// Puts the files of a snapshot into a folder as files of its own: hard links where that is possible,
/// else copies.
pub(super) fn place(snapshot: &Path, to: &Path) -> anyhow::Result<PathBuf> {
    let failed = || format!("{} cannot be written", to.display());
    fs::create_dir_all(to).with_context(failed)?;
    for entry in fs::read_dir(snapshot).with_context(failed)? {
        let entry = entry?;
        let source = entry.path().canonicalize()?;
        if !source.is_file() {
            continue;
        }
        let target = to.join(entry.file_name());
        let partial = to.join(format!(".{}.part", entry.file_name().to_string_lossy()));
        // What an earlier try left behind.
        let _ = fs::remove_file(&partial);
        if fs::hard_link(&source, &partial).is_err() {
            fs::copy(&source, &partial)
                .with_context(|| format!("{} cannot be written", target.display()))?;
        }
        fs::rename(&partial, &target)
            .with_context(|| format!("{} cannot be written", target.display()))?;
    }
    to.canonicalize().with_context(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn only_what_serving_needs_is_taken() {
        let all = names(&[
            "README.md",
            "config.json",
            "tokenizer.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            INDEX,
            "pytorch_model.bin",
            "original/model.safetensors",
            "chat_template.jinja",
        ]);
        let expected = names(&[
            "config.json",
            "tokenizer.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            INDEX,
            "chat_template.jinja",
        ]);
        assert_eq!(wanted("a/b", &all).unwrap(), expected);
        let error = wanted("a/b", &names(&["config.json", "tokenizer.json", "x.bin"])).unwrap_err();
        assert!(error.to_string().contains("x.bin"), "{error}");
        let error = wanted("a/b", &names(&["config.json"])).unwrap_err();
        assert!(
            error.to_string().contains("has no tokenizer.json"),
            "{error}"
        );
    }

    #[test]
    fn a_missing_shard_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        let missing = || check_complete(dir.path()).unwrap_err().to_string();
        assert_eq!(missing(), "config.json is missing");
        write("config.json", "{}");
        write("tokenizer.json", "{}");
        assert_eq!(missing(), "model.safetensors is missing");
        write(
            INDEX,
            r#"{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#,
        );
        write("one.safetensors", "");
        assert_eq!(missing(), "two.safetensors is missing");
        write("two.safetensors", "");
        check_complete(dir.path()).unwrap();
    }

    #[test]
    fn placed_files_are_no_links_into_the_cache() {
        let dir = tempfile::tempdir().unwrap();
        let (blobs, snapshot) = (dir.path().join("blobs"), dir.path().join("snapshot"));
        fs::create_dir_all(&blobs).unwrap();
        fs::create_dir_all(&snapshot).unwrap();
        fs::write(blobs.join("1234"), "text").unwrap();
        std::os::unix::fs::symlink(blobs.join("1234"), snapshot.join("config.json")).unwrap();
        let to = place(&snapshot, &dir.path().join("to")).unwrap();
        let file = to.join("config.json");
        assert!(!fs::symlink_metadata(&file).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(file).unwrap(), "text");
        // Again, over what is there.
        place(&snapshot, &to).unwrap();
    }
}

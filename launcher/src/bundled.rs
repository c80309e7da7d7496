//! The small checkpoint that the binary carries, so that it serves something with no download.

use std::path::{Path, PathBuf};

use anyhow::Context;

/// Name of the bundled checkpoint's directory, and so of the model in the API.
const NAME: &str = "blockplane-tiny";

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_bytes!(concat!("../../models/blockplane-tiny/", $name)).as_slice())),*]
    };
}

const FILES: &[(&str, &[u8])] = files![
    "NOTICE",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// Writes the checkpoint under `parent` and returns its directory.
///
/// Several processes may do this at once: each file appears whole, by a rename.
pub(crate) fn unpack(parent: &Path) -> anyhow::Result<PathBuf> {
    let dir = parent.join(NAME);
    std::fs::create_dir_all(&dir)
        .with_context(|| format!("model directory {} cannot be made", dir.display()))?;
    for (name, bytes) in FILES {
        let path = dir.join(name);
        // Another version of the binary may have left files of the same size there.
        if std::fs::read(&path).is_ok_and(|there| there == *bytes) {
            continue;
        }
        let partial = dir.join(format!(".{name}.{}", std::process::id()));
        std::fs::write(&partial, bytes)
            .and_then(|()| std::fs::rename(&partial, &path))
            .with_context(|| format!("bundled model file {} cannot be written", path.display()))?;
    }
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_another_version_are_replaced() {
        let parent = tempfile::tempdir().unwrap();
        let dir = unpack(parent.path()).unwrap();
        let (name, bytes) = FILES[0];
        let path = dir.join(name);
        std::fs::write(&path, vec![b'x'; bytes.len()]).unwrap();
        assert_eq!(unpack(parent.path()).unwrap(), dir);
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }
}

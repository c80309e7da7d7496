//! Where agents find the compiler of GPU kernels, and where they keep what it made.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use blockplane_transfer::KernelConfig;

/// What the environment of this process says about kernels; every agent that this binary starts gets it.
pub(crate) fn config() -> KernelConfig {
    from_variables(variable)
}

#[expect(
    clippy::disallowed_methods,
    reason = "the launcher is where the environment is read"
)]
fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> KernelConfig {
    let folder = |name: &str| variable(name).map(PathBuf::from);
    let mut config = KernelConfig::default();
    for name in ["CUDA_HOME", "CUDA_PATH"] {
        config.nvrtc_folders.extend(folder(name));
    }
    for name in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        if let Some(environment) = folder(name) {
            config.nvrtc_folders.extend(site_packages(&environment));
        }
    }
    let absolute = |path: &PathBuf| path.is_absolute();
    let cache = folder("XDG_CACHE_HOME").filter(absolute);
    let cache = cache.or_else(|| {
        folder("HOME")
            .filter(absolute)
            .map(|home| home.join(".cache"))
    });
    config.cache_folder = cache.map(|cache| cache.join("blockplane/kernels"));
    config
}

/// The folders of packages of a Python environment, of each Python in it.
fn site_packages(environment: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(environment.join("lib")) else {
        return Vec::new();
    };
    let mut found: Vec<_> = entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("python3"))
        .map(|entry| entry.path().join("site-packages"))
        .filter(|path| path.is_dir())
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_come_from_the_environment() {
        let root = tempfile::tempdir().unwrap();
        let packages = root.path().join("lib/python3.12/site-packages");
        std::fs::create_dir_all(&packages).unwrap();
        std::fs::create_dir_all(root.path().join("lib/tcl")).unwrap();
        let config = from_variables(|name| match name {
            "CUDA_HOME" => Some("/opt/cuda".into()),
            "VIRTUAL_ENV" => Some(root.path().into()),
            "HOME" => Some("/home/somebody".into()),
            _ => None,
        });
        assert_eq!(config.nvrtc_folders, [PathBuf::from("/opt/cuda"), packages]);
        let cache = Path::new("/home/somebody/.cache/blockplane/kernels");
        assert_eq!(config.cache_folder.as_deref(), Some(cache));
    }

    #[test]
    fn relative_cache_folders_are_no_folders() {
        let config = from_variables(|name| match name {
            "XDG_CACHE_HOME" => Some("cache".into()),
            "HOME" => Some("/root".into()),
            _ => None,
        });
        let cache = Path::new("/root/.cache/blockplane/kernels");
        assert_eq!(config.cache_folder.as_deref(), Some(cache));
        let config = from_variables(|_| None);
        assert_eq!((config.cache_folder, config.nvrtc_folders.len()), (None, 0));
    }
}

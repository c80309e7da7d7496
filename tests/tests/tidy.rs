//! The shape of the repository, held by a machine: dependency directions, file sizes, module docs,
//! who reads the environment, and that the documents name what is there.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use blockplane_tests::fixtures::repository;
use serde_json::Value;

/// Crate folders, and the crate folders each may depend on.
const ARROWS: &[(&str, &[&str])] = &[
    ("protocol", &[]),
    ("rdma-sys", &[]),
    ("transfer", &["rdma-sys"]),
    ("kvbm", &["protocol", "transfer"]),
    ("router", &["protocol"]),
    ("runtime", &["protocol"]),
    ("engine", &["protocol", "transfer", "kvbm"]),
    ("frontend", &["protocol"]),
    ("bench", &["protocol", "transfer", "kvbm", "engine"]),
    (
        "launcher",
        &[
            "protocol", "transfer", "kvbm", "router", "runtime", "engine", "frontend", "bench",
        ],
    ),
    ("python", &["protocol", "transfer", "kvbm"]),
    // A leaf: it may look at anything, and nothing may look at it.
    (
        "tests",
        &[
            "protocol", "transfer", "kvbm", "router", "runtime", "engine", "frontend", "bench",
        ],
    ),
];

/// Crates that have no reason for `unsafe`.
const SAFE: &[&str] = &[
    "protocol", "router", "runtime", "frontend", "launcher", "tests",
];

/// Files outside the launcher that may read the environment, and why.
const READS_ENVIRONMENT: &[(&str, &str)] = &[
    (
        "engine/tests/common/mod.rs",
        "is told by `tests/run` where the generated checkpoints are",
    ),
    (
        "engine/tests/vllm_events/server.rs",
        "is told by `tests/run` where vLLM is",
    ),
    (
        "tests/src/fixtures.rs",
        "a test executable is configured by its environment only",
    ),
    (
        "transfer/tests/chaos/main.rs",
        "a seed to repeat is named there, and nowhere else can it be",
    ),
    (
        "transfer/tests/kernels/main.rs",
        "is told by `tests/run` where the compiler of the kernels is",
    ),
    (
        "rdma-sys/tests/layout.rs",
        "is told by `tests/run` where the headers are",
    ),
    ("tests/tests/tidy.rs", "names the calls it looks for"),
];

/// Written by a program, which is beside them.
const GENERATED: &[&str] = &["rdma-sys/src/verbs.rs", "rdma-sys/src/ucp.rs"];

/// Most lines of one source file.
const LINES_MAX: usize = 1_000;

/// Folders that are not sources of ours.
const SKIPPED: &[&str] = &["target", ".git", ".cache", "node_modules", "__pycache__"];

#[test]
fn dependencies_point_downwards() -> Result<()> {
    let allowed: BTreeMap<&str, &[&str]> = ARROWS.iter().copied().collect();
    let members = members()?;
    let folders: BTreeMap<&str, &str> = members
        .iter()
        .map(|member| (member.name.as_str(), member.folder.as_str()))
        .collect();
    for member in &members {
        let may = allowed.get(member.folder.as_str()).with_context(|| {
            format!(
                "{} is not in the list of dependency directions",
                member.folder
            )
        })?;
        for dependency in &member.dependencies {
            let Some(&folder) = folders.get(dependency.as_str()) else {
                continue;
            };
            ensure!(
                may.contains(&folder),
                "{} must not depend on {folder}; it may depend on {may:?}",
                member.folder
            );
        }
    }
    let known: BTreeSet<&str> = members.iter().map(|m| m.folder.as_str()).collect();
    let listed: BTreeSet<&str> = allowed.keys().copied().collect();
    ensure!(known == listed, "members {known:?}, listed {listed:?}");
    Ok(())
}

#[test]
fn every_crate_takes_the_lints_of_the_workspace() -> Result<()> {
    for member in members()? {
        let manifest = repository().join(&member.folder).join("Cargo.toml");
        let text = fs::read_to_string(&manifest)?;
        ensure!(
            text.contains("[lints]\nworkspace = true"),
            "{} has no `[lints] workspace = true`",
            manifest.display()
        );
    }
    Ok(())
}

#[test]
fn crates_without_need_forbid_unsafe() -> Result<()> {
    for folder in SAFE {
        let source = repository().join(folder).join("src");
        let root = ["lib.rs", "main.rs"]
            .iter()
            .map(|name| source.join(name))
            .find(|path| path.is_file())
            .with_context(|| format!("{folder} has no crate root"))?;
        ensure!(
            fs::read_to_string(&root)?.contains("#![forbid(unsafe_code)]"),
            "{} lacks #![forbid(unsafe_code)]",
            root.display()
        );
    }
    Ok(())
}

#[test]
fn no_source_file_is_too_long() -> Result<()> {
    for (path, text) in sources("rs")? {
        if GENERATED.contains(&path.as_str()) {
            continue;
        }
        let lines = text.lines().count();
        ensure!(
            lines <= LINES_MAX,
            "{path} has {lines} lines, more than {LINES_MAX}: split it by meaning"
        );
    }
    Ok(())
}

#[test]
fn every_module_says_what_it_is() -> Result<()> {
    for (path, text) in sources("rs")? {
        ensure!(
            text.starts_with("//!"),
            "{path} does not begin with a module doc (`//!`)"
        );
    }
    Ok(())
}

#[test]
fn only_the_launcher_reads_the_environment() -> Result<()> {
    let excused: BTreeMap<&str, &str> = READS_ENVIRONMENT.iter().copied().collect();
    let mut readers = BTreeSet::new();
    for (path, text) in sources("rs")? {
        if path.starts_with("launcher/") {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or(line);
            if !code.contains("env::var") {
                continue;
            }
            ensure!(
                excused.contains_key(path.as_str()),
                "{path}:{} reads the environment: {line}\nonly the launcher does; take a typed value",
                number + 1
            );
            readers.insert(path.clone());
        }
    }
    for path in excused.keys() {
        ensure!(
            readers.contains(*path),
            "{path} no longer reads the environment: strike it from the list"
        );
    }
    Ok(())
}

#[test]
fn nothing_is_left_for_later_in_a_comment() -> Result<()> {
    // Written in two parts so that this file does not hold them.
    let marks = [concat!("TO", "DO"), concat!("FIX", "ME")];
    for extension in ["rs", "toml", "md", "py", "sh", "yml", ""] {
        for (path, text) in sources(extension)? {
            for (number, line) in text.lines().enumerate() {
                ensure!(
                    !marks.iter().any(|mark| line.contains(mark)),
                    "{path}:{}: {line}\ndo it, or open an issue",
                    number + 1
                );
            }
        }
    }
    Ok(())
}

#[test]
fn readme_names_every_crate() -> Result<()> {
    let readme = fs::read_to_string(repository().join("README.md"))?;
    let named: BTreeSet<String> = readme
        .lines()
        .skip_while(|line| !first_cell(line).is_some_and(|cell| cell.eq_ignore_ascii_case("crate")))
        .skip(2)
        .map_while(first_cell)
        .map(|cell| {
            let name = cell.split('`').nth(1).unwrap_or(cell);
            name.trim_end_matches('/').to_owned()
        })
        .collect();
    let members: BTreeSet<String> = members()?.into_iter().map(|m| m.folder).collect();
    ensure!(
        named == members,
        "the table of README.md whose first column is called `crate` names {named:?}; the workspace \
         has {members:?}"
    );
    Ok(())
}

#[test]
fn every_decision_record_is_linked() -> Result<()> {
    let documents = sources("md")?;
    for (path, text) in &documents {
        let Some(name) = path.strip_prefix("docs/adr/").filter(|n| *n != "README.md") else {
            continue;
        };
        ensure!(
            documents
                .iter()
                .any(|(other, text)| other != path && text.contains(name)),
            "no document links {path}"
        );
        for part in ["## Context", "## Decision", "## Consequences"] {
            ensure!(text.contains(part), "{path} has no section {part:?}");
        }
    }
    Ok(())
}

#[test]
fn links_between_documents_lead_somewhere() -> Result<()> {
    for (path, text) in sources("md")? {
        let folder = repository().join(&path);
        let folder = folder.parent().context("a file is in a folder")?;
        for link in text.split("](").skip(1) {
            let target = link.split([')', '#']).next().unwrap_or_default();
            if target.is_empty() || target.contains("://") || target.contains(' ') {
                continue;
            }
            ensure!(
                folder.join(target).exists(),
                "{path} links {target}, which is not there"
            );
        }
    }
    Ok(())
}

struct Member {
    name: String,
    folder: String,
    dependencies: Vec<String>,
}

fn members() -> Result<Vec<Member>> {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--no-deps",
            "--offline",
            "--format-version",
            "1",
        ])
        .current_dir(repository())
        .output()
        .context("run cargo metadata")?;
    ensure!(
        output.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().context("packages")?;
    packages
        .iter()
        .map(|package| {
            let manifest = package["manifest_path"].as_str().context("manifest_path")?;
            let folder = Path::new(manifest)
                .parent()
                .and_then(Path::file_name)
                .and_then(|name| name.to_str())
                .context("folder of a manifest")?;
            let dependencies = package["dependencies"].as_array().context("dependencies")?;
            Ok(Member {
                name: package["name"].as_str().context("name")?.to_owned(),
                folder: folder.to_owned(),
                dependencies: dependencies
                    .iter()
                    .filter_map(|dependency| dependency["name"].as_str())
                    .map(str::to_owned)
                    .collect(),
            })
        })
        .collect()
}

/// Files of the repository with this extension (none for `""`), as (path from the root, text).
fn sources(extension: &str) -> Result<Vec<(String, String)>> {
    let mut paths = Vec::new();
    walk(repository(), &mut paths)?;
    let mut files = Vec::new();
    for path in paths {
        let has = path.extension().and_then(|e| e.to_str()).unwrap_or("");
        if has != extension {
            continue;
        }
        // Files without extension may be anything; only text is looked at.
        let Ok(text) = fs::read_to_string(&path) else {
            continue;
        };
        let name = path.strip_prefix(repository())?.display().to_string();
        files.push((name, text));
    }
    ensure!(
        extension.is_empty() || !files.is_empty() || extension == "sh" || extension == "yml",
        "no *.{extension} found under {}",
        repository().display()
    );
    files.sort();
    Ok(files)
}

fn walk(folder: &Path, paths: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
        if path.is_symlink() {
            continue;
        }
        if path.is_dir() {
            if !SKIPPED.contains(&name) {
                walk(&path, paths)?;
            }
        } else {
            paths.push(path);
        }
    }
    Ok(())
}

fn first_cell(line: &str) -> Option<&str> {
    Some(line.trim().strip_prefix('|')?.split('|').next()?.trim())
}

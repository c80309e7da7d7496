//! Checkpoints that cannot be served. What the worker reads ends the worker with one clear error; what
//! the frontend reads (tokenizer, template) keeps it from being ready, with the reason in `/health`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use blockplane_tests::{
    Cluster, ClusterBuilder,
    cluster::{START, STOP},
    fixtures,
    health::Health,
    requests,
    traffic::LIMIT,
    wait,
};
use serde_json::{Value, json};

/// A change to a good checkpoint, and words that the error has to hold.
type Case = (
    &'static str,
    fn(&Path) -> Result<()>,
    &'static [&'static str],
);

const CASES: &[Case] = &[
    (
        "no weights",
        |folder| remove(folder, "model.safetensors"),
        &["safetensors"],
    ),
    (
        "no config",
        |folder| remove(folder, "config.json"),
        &["config.json"],
    ),
    (
        "truncated weights",
        truncate_weights,
        &["model.safetensors"],
    ),
    (
        "empty weights",
        |folder| write(folder, "model.safetensors", b""),
        &["model.safetensors"],
    ),
    (
        "weights of another dtype",
        |folder| in_header(folder, "\"BF16\"", "\"I16\" "),
        &["I16"],
    ),
    (
        "config is not JSON",
        |folder| write(folder, "config.json", b"{"),
        &["config.json"],
    ),
    (
        "config is not UTF-8",
        |folder| write(folder, "config.json", b"\xff\xfe"),
        &["config.json"],
    ),
    (
        "unknown architecture",
        |folder| {
            in_config(folder, "architectures", &json!(["NobodyForCausalLM"]))?;
            in_config(folder, "model_type", &json!("nobody"))
        },
        &["NobodyForCausalLM"],
    ),
    (
        "weights of another shape",
        |folder| in_config(folder, "intermediate_size", &json!(320)),
        &["320"],
    ),
    (
        "a layer too many",
        |folder| {
            in_config(folder, "num_hidden_layers", &json!(3))?;
            in_config(folder, "layer_types", &json!(vec!["full_attention"; 3]))
        },
        &["layers.2"],
    ),
    (
        "a dimension of zero",
        |folder| in_config(folder, "num_key_value_heads", &json!(0)),
        &["num_key_value_heads"],
    ),
];

#[test]
fn each_bad_checkpoint_is_one_clear_error() -> Result<()> {
    let mut wrong = Vec::new();
    for (name, spoil, words) in CASES {
        let cluster = ClusterBuilder::new().empty()?;
        let folder = copy(&fixtures::checkpoint("qwen3")?, &cluster)?;
        spoil(&folder).with_context(|| format!("spoil the checkpoint: {name}"))?;
        match refused(&cluster, &folder, words) {
            Ok(line) => eprintln!("{name}: {line}"),
            Err(error) => wrong.push(format!("{name}: {error:#}")),
        }
        cluster.stop()?;
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// The same error reaches a person who runs `up`, as the reason of the restart.
#[test]
fn up_shows_why_a_worker_does_not_start() -> Result<()> {
    let mut cluster = ClusterBuilder::new().empty()?;
    let folder = copy(&fixtures::checkpoint("qwen3")?, &cluster)?;
    remove(&folder, "model.safetensors")?;
    let arguments = [
        "up",
        "--mode",
        "agg",
        "--model",
        &folder.display().to_string(),
        "--http-port",
        &cluster.port().to_string(),
        "--run-dir",
        &cluster.run_dir().display().to_string(),
    ]
    .map(str::to_owned);
    let up = cluster.start("up", &arguments)?;
    let line = up.wait_for_line("restarting", STOP)?;
    ensure!(line.contains("safetensors"), "{line}");
    cluster.adopt(blockplane_tests::Role::Frontend, up);
    cluster.stop()
}

/// A tokenizer that cannot be used: not ready, and both places that are asked say why.
#[test]
fn a_bad_tokenizer_is_the_reason_for_not_being_ready() -> Result<()> {
    let broken: &[u8] = b"{\"model\": {}}";
    for text in [None, Some(broken), Some(b"\xff\xfe"), Some(b"")] {
        let mut cluster = ClusterBuilder::new().empty()?;
        let folder = copy(&fixtures::checkpoint("qwen3")?, &cluster)?;
        match text {
            None => remove(&folder, "tokenizer.json")?,
            Some(text) => write(&folder, "tokenizer.json", text)?,
        }
        start(&mut cluster, &folder)?;
        let client = cluster.client();
        let health = wait::until(
            "the frontend to know the worker",
            START,
            || match Health::read(&client) {
                Ok(health) if health.count("aggregated") == 1 => Ok(health),
                Ok(health) => Err(format!("{health:?}")),
                Err(error) => Err(format!("{error:#}")),
            },
        )?;
        ensure!(!health.ready, "{health:?}");
        ensure!(health.reasons.contains("tokenizer.json"), "{health:?}");
        let body = requests::completion("checkpoint", &[1, 2, 3], 4).to_string();
        let answer = client.post("/v1/completions", body.as_bytes(), LIMIT)?;
        let error = answer.error()?;
        ensure!(answer.status >= 500, "{answer:?}");
        ensure!(error.message.contains("tokenizer.json"), "{error:?}");
        cluster.stop()?;
    }
    Ok(())
}

/// A template that does not compile costs the chat route only.
#[test]
fn a_broken_template_is_an_error_of_chat_requests() -> Result<()> {
    let mut cluster = ClusterBuilder::new().empty()?;
    let folder = copy(&fixtures::checkpoint("qwen3")?, &cluster)?;
    break_template(&folder)?;
    start(&mut cluster, &folder)?;
    cluster.wait_ready("the worker", |health| health.count("aggregated") == 1)?;
    let client = cluster.client();
    let body = requests::chat("checkpoint", "hi", 4).to_string();
    let answer = client.post("/v1/chat/completions", body.as_bytes(), LIMIT)?;
    ensure!(answer.status >= 400, "{answer:?}");
    ensure!(answer.error()?.message.contains("template"), "{answer:?}");
    let body = requests::completion("checkpoint", &[1, 2, 3], 4);
    client.run("/v1/completions", &body, LIMIT).done()?;
    cluster.stop()
}

fn start(cluster: &mut Cluster, folder: &Path) -> Result<()> {
    cluster.start_frontend()?;
    let arguments = [
        "worker",
        "--endpoint",
        "dyn://test.aggregated.generate",
        "--model",
        &folder.display().to_string(),
        "--discovery",
        &cluster.discovery(),
        "--blocks",
        "64",
        "--threads",
        "1",
    ]
    .map(str::to_owned);
    let worker = cluster.start("worker", &arguments)?;
    cluster.adopt(blockplane_tests::Role::Aggregated, worker);
    Ok(())
}

fn refused(cluster: &Cluster, folder: &Path, words: &[&str]) -> Result<String> {
    let arguments = [
        "worker",
        "--model",
        &folder.display().to_string(),
        "--discovery",
        &cluster.discovery(),
        "--blocks",
        "64",
        "--threads",
        "1",
    ]
    .map(str::to_owned);
    let mut worker = cluster.start("worker", &arguments)?;
    let status = worker.wait(STOP)?;
    let log = worker.log();
    let text = log.join("\n");
    ensure!(status.code() == Some(1), "{status}:\n{text}");
    ensure!(!text.contains("panicked"), "{text}");
    let errors: Vec<&String> = log
        .iter()
        .filter(|l| l.starts_with("blockplane: "))
        .collect();
    let [error] = errors.as_slice() else {
        anyhow::bail!("{} error lines, wanted one:\n{text}", errors.len());
    };
    for word in words {
        ensure!(error.contains(word), "no word {word:?} in {error:?}");
    }
    Ok((*error).clone())
}

fn copy(from: &Path, cluster: &Cluster) -> Result<PathBuf> {
    let to = cluster.folder().join("checkpoint");
    fs::create_dir(&to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(to)
}

fn remove(folder: &Path, name: &str) -> Result<()> {
    Ok(fs::remove_file(folder.join(name))?)
}

fn write(folder: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    Ok(fs::write(folder.join(name), bytes)?)
}

fn truncate_weights(folder: &Path) -> Result<()> {
    let file = fs::File::options()
        .write(true)
        .open(folder.join("model.safetensors"))?;
    let bytes = file.metadata()?.len();
    Ok(file.set_len(bytes / 2)?)
}

/// Replaces text of the safetensors header by text of the same length.
fn in_header(folder: &Path, from: &str, to: &str) -> Result<()> {
    let path = folder.join("model.safetensors");
    let mut bytes = fs::read(&path)?;
    let end = 8 + usize::try_from(u64::from_le_bytes(bytes[..8].try_into()?))?;
    let header = std::str::from_utf8(&bytes[8..end])?.replace(from, to);
    ensure!(header.len() == end - 8 && header.contains(to));
    bytes[8..end].copy_from_slice(header.as_bytes());
    Ok(fs::write(&path, bytes)?)
}

fn in_config(folder: &Path, key: &str, value: &Value) -> Result<()> {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
    config[key] = value.clone();
    Ok(fs::write(&path, config.to_string())?)
}

fn break_template(folder: &Path) -> Result<()> {
    let broken = "{% for message in messages %}{{ message.content }";
    let file = folder.join("chat_template.jinja");
    if file.is_file() {
        fs::write(&file, broken)?;
    }
    let path = folder.join("tokenizer_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
    config["chat_template"] = json!(broken);
    Ok(fs::write(&path, config.to_string())?)
}

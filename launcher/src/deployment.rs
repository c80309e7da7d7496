//! Deployment files: which roles run on which node.
//!
//! ```toml
//! namespace = "demo"
//! discovery = "file:/srv/blockplane/discovery"
//! model = "/models/Qwen3-0.6B"
//!
//! [nodes.a]
//! run_dir = "/run/blockplane"
//!
//! [[nodes.a.roles]]
//! role = "frontend"
//! http_port = 8000
//!
//! [[nodes.a.roles]]
//! role = "prefill"
//! count = 2
//! args = ["--max-num-batched-tokens", "1024"]
//! ```
//!
//! The fields of a role become the flags of `blockplane frontend` or `blockplane worker`; `args` takes
//! any further flag. Everything is checked before anything is started.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use anyhow::{Context, bail, ensure};
use blockplane_kvbm::settings::{FileValues, KvbmFile, KvbmTable};
use blockplane_protocol::EndpointId;
use clap::{Parser, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::cli::{
    Cli, Command, ComputeArg, EngineArg, LaneArg, RouterModeArg, TABLE_FLAG, settings_of_file,
};

/// A whole deployment.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Deployment {
    /// Workers and frontends of one namespace find each other.
    #[serde(default = "default_namespace")]
    pub(crate) namespace: String,
    /// `file:DIR`, the same directory for all nodes.
    #[serde(default)]
    pub(crate) discovery: Option<String>,
    /// Checkpoint directory of every role that does not name its own.
    #[serde(default)]
    pub(crate) model: Option<PathBuf>,
    /// Name in the OpenAI API.
    #[serde(default)]
    pub(crate) served_model_name: Option<String>,
    /// Settings of the KV tiers of all workers, as listed by `blockplane kvbm config`.
    #[serde(default)]
    pub(crate) kvbm: FileValues,
    /// The machines by name.
    pub(crate) nodes: BTreeMap<String, Node>,
    /// The file, for messages.
    #[serde(skip)]
    pub(crate) source: String,
}

/// What one machine runs.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Node {
    /// Directory for logs and sockets.
    #[serde(default)]
    pub(crate) run_dir: Option<PathBuf>,
    /// Address that other nodes reach this one at.
    #[serde(default)]
    pub(crate) host: Option<String>,
    /// Time for running requests to finish on shutdown, in seconds; default 5.
    #[serde(default)]
    pub(crate) grace_secs: Option<f64>,
    /// A role whose health check fails for this long is killed and started again; default 30.
    #[serde(default)]
    pub(crate) unhealthy_secs: Option<f64>,
    /// The roles.
    #[serde(default)]
    pub(crate) roles: Vec<Role>,
}

/// One role, `count` times.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Role {
    pub(crate) role: RoleKind,
    #[serde(default = "one")]
    pub(crate) count: u32,
    /// Name in logs and status, followed by `-INDEX`; the role when absent.
    #[serde(default)]
    pub(crate) name: Option<String>,
    #[serde(default)]
    pub(crate) model: Option<PathBuf>,
    #[serde(default)]
    pub(crate) engine: Option<EngineArg>,
    #[serde(default)]
    pub(crate) compute: Option<ComputeArg>,
    #[serde(default)]
    pub(crate) threads: Option<usize>,
    #[serde(default)]
    pub(crate) block_size: Option<u32>,
    #[serde(default)]
    pub(crate) blocks: Option<u32>,
    #[serde(default)]
    pub(crate) data_parallel_size: Option<u32>,
    #[serde(default)]
    pub(crate) lanes: Vec<LaneArg>,
    #[serde(default)]
    pub(crate) http_host: Option<String>,
    #[serde(default)]
    pub(crate) http_port: Option<u16>,
    #[serde(default)]
    pub(crate) router_mode: Option<RouterModeArg>,
    #[serde(default)]
    pub(crate) seed: Option<u64>,
    /// Settings of the KV tiers of this role, before those of all workers.
    #[serde(default)]
    pub(crate) kvbm: FileValues,
    /// Further flags of the role's subcommand.
    #[serde(default)]
    pub(crate) args: Vec<String>,
    /// Program of a vLLM engine.
    #[serde(default)]
    pub(crate) vllm_program: Option<PathBuf>,
    /// Arguments of `vllm serve`, for a worker whose engine that is.
    #[serde(default)]
    pub(crate) vllm_args: Vec<String>,
    /// Variables of the processes, such as `CUDA_VISIBLE_DEVICES`.
    #[serde(default)]
    pub(crate) variables: BTreeMap<String, String>,
}

/// What a role is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RoleKind {
    Frontend,
    Prefill,
    Decode,
    Aggregated,
}

/// One process to run.
#[derive(Clone, Debug)]
pub(crate) struct ProcessSpec {
    /// Name in logs and status.
    pub(crate) name: String,
    /// What it is.
    pub(crate) kind: RoleKind,
    /// Arguments of the `blockplane` binary.
    pub(crate) argv: Vec<String>,
    /// Added to its environment.
    pub(crate) variables: BTreeMap<String, String>,
}

/// Everything the launcher needs to run one node.
#[derive(Clone, Debug)]
pub(crate) struct NodePlan {
    pub(crate) processes: Vec<ProcessSpec>,
    pub(crate) run_dir: Option<PathBuf>,
    pub(crate) grace: Duration,
    pub(crate) unhealthy_after: Duration,
}

impl Deployment {
    /// Reads a deployment file.
    pub(crate) fn read(path: &std::path::Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("deployment file {} cannot be read", path.display()))?;
        let deployment: Self = toml::from_str(&text)
            .with_context(|| format!("deployment file {} is not valid", path.display()))?;
        Ok(Self {
            source: path.display().to_string(),
            ..deployment
        })
    }

    /// What the file says about the KV tiers of a role; of no role, what it says for all.
    pub(crate) fn kvbm(&self, role: Option<&Role>) -> KvbmFile {
        let table = |place: &str, values: &FileValues| KvbmTable {
            source: format!("{} {place}", self.source).trim_start().to_owned(),
            values: values.clone(),
        };
        let mut tables = vec![table("[kvbm]", &self.kvbm)];
        tables.extend(role.map(|role| {
            let place = format!("[nodes.*.roles.kvbm] of '{}'", role.base_name());
            table(&place, &role.kvbm)
        }));
        tables.retain(|table| !table.values.is_empty());
        KvbmFile(tables)
    }

    /// What `node` has to run.
    pub(crate) fn plan(&self, node: &str) -> anyhow::Result<NodePlan> {
        let names: Vec<&str> = self.nodes.keys().map(String::as_str).collect();
        let spec = self.nodes.get(node).with_context(|| {
            format!(
                "node '{node}' is not in the deployment file; it has: {}",
                names.join(", ")
            )
        })?;
        ensure!(
            !spec.roles.is_empty(),
            "node '{node}' has no roles; add [[nodes.{node}.roles]]"
        );
        let mut processes = Vec::new();
        for role in &spec.roles {
            self.expand(spec, role, &mut processes)
                .with_context(|| format!("role '{}' of node '{node}'", role.kind_name()))?;
        }
        let mut seen = std::collections::BTreeSet::new();
        for process in &processes {
            ensure!(
                seen.insert(&process.name),
                "node '{node}' has two processes named '{}'; give the roles different names",
                process.name
            );
        }
        Ok(NodePlan {
            processes,
            run_dir: spec.run_dir.clone(),
            grace: duration("grace_secs", spec.grace_secs, 5.0)?,
            unhealthy_after: duration("unhealthy_secs", spec.unhealthy_secs, 30.0)?,
        })
    }

    fn expand(&self, node: &Node, role: &Role, out: &mut Vec<ProcessSpec>) -> anyhow::Result<()> {
        let base = role.base_name();
        if role.role == RoleKind::Frontend && role.count > 1 && role.http_port != Some(0) {
            bail!(
                "{} frontends cannot share one port; give each its own role entry",
                role.count
            );
        }
        for index in 0..role.count {
            let name = format!("{base}-{index}");
            let mut argv = match role.role {
                RoleKind::Frontend => self.frontend_argv(role)?,
                RoleKind::Prefill | RoleKind::Decode | RoleKind::Aggregated => {
                    self.worker_argv(node, role, &name)?
                }
            };
            argv.extend(role.args.iter().cloned());
            if !role.vllm_args.is_empty() {
                argv.push("--".to_owned());
                argv.extend(role.vllm_args.iter().cloned());
            }
            let line = std::iter::once("blockplane".to_owned()).chain(argv.clone());
            let parsed = Cli::try_parse_from(line)
                .map_err(|error| anyhow::anyhow!("{}", first_paragraph(&error.to_string())))?;
            if let Command::Worker(worker) = parsed.command {
                worker.check_engine()?;
            }
            out.push(ProcessSpec {
                name,
                kind: role.role,
                argv,
                variables: role.variables.clone(),
            });
        }
        Ok(())
    }

    fn frontend_argv(&self, role: &Role) -> anyhow::Result<Vec<String>> {
        let worker_only = [
            ("model", role.model.is_some()),
            ("engine", role.engine.is_some()),
            ("compute", role.compute.is_some()),
            ("threads", role.threads.is_some()),
            ("block_size", role.block_size.is_some()),
            ("blocks", role.blocks.is_some()),
            ("data_parallel_size", role.data_parallel_size.is_some()),
            ("lanes", !role.lanes.is_empty()),
            ("kvbm", !role.kvbm.is_empty()),
            ("vllm_program", role.vllm_program.is_some()),
            ("vllm_args", !role.vllm_args.is_empty()),
        ];
        refuse(&worker_only, "is a worker's setting, not a frontend's")?;
        let mut argv = vec!["frontend".to_owned()];
        flag(&mut argv, "--namespace", Some(&self.namespace));
        flag(&mut argv, "--discovery", self.discovery.as_ref());
        flag(&mut argv, "--http-host", role.http_host.as_ref());
        flag(&mut argv, "--http-port", role.http_port.as_ref());
        flag(
            &mut argv,
            "--router-mode",
            role.router_mode.as_ref().map(value_name).as_ref(),
        );
        flag(&mut argv, "--seed", role.seed.as_ref());
        Ok(argv)
    }

    fn worker_argv(&self, node: &Node, role: &Role, name: &str) -> anyhow::Result<Vec<String>> {
        let frontend_only = [
            ("http_host", role.http_host.is_some()),
            ("http_port", role.http_port.is_some()),
            ("router_mode", role.router_mode.is_some()),
            ("seed", role.seed.is_some()),
        ];
        refuse(&frontend_only, "is a frontend's setting, not a worker's")?;
        let kind = role.kind_name();
        let endpoint = EndpointId::new(&self.namespace, kind, "generate")?;
        let model = role
            .model
            .as_ref()
            .or(self.model.as_ref())
            .map(|path| path.display());
        let lanes: Vec<String> = role.lanes.iter().map(value_name).collect();
        let mut argv = vec!["worker".to_owned()];
        flag(&mut argv, "--role", Some(&kind));
        flag(&mut argv, "--endpoint", Some(&endpoint));
        flag(&mut argv, "--name", Some(&name));
        flag(&mut argv, "--discovery", self.discovery.as_ref());
        flag(&mut argv, "--model", model.as_ref());
        flag(
            &mut argv,
            "--served-model-name",
            self.served_model_name.as_ref(),
        );
        flag(
            &mut argv,
            "--engine",
            role.engine.as_ref().map(value_name).as_ref(),
        );
        let program = role.vllm_program.as_ref().map(|path| path.display());
        flag(&mut argv, "--vllm-program", program.as_ref());
        flag(
            &mut argv,
            "--compute",
            role.compute.as_ref().map(value_name).as_ref(),
        );
        flag(&mut argv, "--threads", role.threads.as_ref());
        flag(&mut argv, "--block-size", role.block_size.as_ref());
        flag(&mut argv, "--blocks", role.blocks.as_ref());
        flag(
            &mut argv,
            "--data-parallel-size",
            role.data_parallel_size.as_ref(),
        );
        flag(
            &mut argv,
            "--lane",
            (!lanes.is_empty()).then(|| lanes.join(",")).as_ref(),
        );
        flag(&mut argv, "--host", node.host.as_ref());
        let kvbm = self.kvbm(Some(role));
        settings_of_file(&kvbm)?;
        for table in &kvbm.0 {
            // The whole table, so that the worker can tell it from flags, and variables win over it.
            let table = serde_json::to_string(table).context("a [kvbm] table is not plain data")?;
            flag(&mut argv, &format!("--{TABLE_FLAG}"), Some(&table));
        }
        Ok(argv)
    }
}

impl Role {
    /// A role with nothing but defaults.
    pub(crate) fn new(role: RoleKind) -> Self {
        Self {
            role,
            count: 1,
            name: None,
            model: None,
            engine: None,
            compute: None,
            threads: None,
            block_size: None,
            blocks: None,
            data_parallel_size: None,
            lanes: Vec::new(),
            http_host: None,
            http_port: None,
            router_mode: None,
            seed: None,
            kvbm: FileValues::new(),
            args: Vec::new(),
            vllm_program: None,
            vllm_args: Vec::new(),
            variables: BTreeMap::new(),
        }
    }

    /// Name in logs and status, before the index.
    fn base_name(&self) -> &str {
        self.name.as_deref().unwrap_or_else(|| self.kind_name())
    }

    const fn kind_name(&self) -> &'static str {
        match self.role {
            RoleKind::Frontend => "frontend",
            RoleKind::Prefill => "prefill",
            RoleKind::Decode => "decode",
            RoleKind::Aggregated => "aggregated",
        }
    }
}

fn flag<T: ToString>(argv: &mut Vec<String>, name: &str, value: Option<&T>) {
    if let Some(value) = value {
        argv.push(name.to_owned());
        argv.push(value.to_string());
    }
}

/// The name of a value on the command line.
fn value_name<T: ValueEnum>(value: &T) -> String {
    value
        .to_possible_value()
        .map(|value| value.get_name().to_owned())
        .expect("no variant of these enums is skipped")
}

fn refuse(fields: &[(&str, bool)], why: &str) -> anyhow::Result<()> {
    for (name, given) in fields {
        ensure!(!given, "'{name}' {why}");
    }
    Ok(())
}

fn duration(name: &str, given: Option<f64>, default: f64) -> anyhow::Result<Duration> {
    let secs = given.unwrap_or(default);
    Duration::try_from_secs_f64(secs)
        .map_err(|_| anyhow::anyhow!("{name} is {secs}; accepted: seconds, 0 or more"))
}

fn first_paragraph(text: &str) -> &str {
    text.trim_start_matches("error: ")
        .split("\n\n")
        .next()
        .unwrap_or(text)
        .trim()
}

fn default_namespace() -> String {
    "blockplane".to_owned()
}

const fn one() -> u32 {
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO_NODES: &str = r#"
        namespace = "demo"
        discovery = "file:/srv/discovery"
        model = "/models/m"
        [nodes.a]
        [[nodes.a.roles]]
        role = "frontend"
        http_port = 8001
        router_mode = "round-robin"
        [[nodes.a.roles]]
        role = "prefill"
        count = 2
        lanes = ["tcp"]
        [nodes.b]
        host = "10.0.0.2"
        [[nodes.b.roles]]
        role = "decode"
        args = ["--max-num-seqs", "8"]
    "#;

    fn plan(text: &str, node: &str) -> anyhow::Result<NodePlan> {
        toml::from_str::<Deployment>(text)?.plan(node)
    }

    #[test]
    fn a_node_runs_its_own_roles_with_their_flags() {
        let a = plan(TWO_NODES, "a").unwrap();
        let names: Vec<&str> = a.processes.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(names, ["frontend-0", "prefill-0", "prefill-1"]);
        let frontend = a.processes[0].argv.join(" ");
        assert!(
            frontend.contains("--namespace demo --discovery file:/srv/discovery"),
            "{frontend}"
        );
        assert!(
            frontend.contains("--http-port 8001 --router-mode round-robin"),
            "{frontend}"
        );
        let prefill = a.processes[2].argv.join(" ");
        assert!(prefill.contains("--endpoint dyn://demo.prefill.generate --name prefill-1"));
        assert!(prefill.contains("--model /models/m") && prefill.contains("--lane tcp"));
        let b = plan(TWO_NODES, "b")
            .unwrap()
            .processes
            .remove(0)
            .argv
            .join(" ");
        assert!(
            b.contains("--host 10.0.0.2") && b.ends_with("--max-num-seqs 8"),
            "{b}"
        );
    }

    #[test]
    fn tables_of_tiers_reach_the_workers_they_are_for() {
        let text = r#"
            [kvbm]
            cpu_cache_gb = 4
            metrics = true
            [[nodes.a.roles]]
            role = "frontend"
            [[nodes.a.roles]]
            role = "prefill"
            [nodes.a.roles.kvbm]
            cpu_cache_gb = 0.5
        "#;
        let mut deployment: Deployment = toml::from_str(text).unwrap();
        deployment.source = "d.toml".to_owned();
        let plan = deployment.plan("a").unwrap();
        assert!(
            !plan.processes[0]
                .argv
                .iter()
                .any(|arg| arg.contains("kvbm"))
        );
        let argv =
            std::iter::once("blockplane").chain(plan.processes[1].argv.iter().map(String::as_str));
        let Command::Worker(worker) = Cli::try_parse_from(argv).unwrap().command else {
            panic!("a prefill role is a worker");
        };
        let settings = worker.kvbm.settings_without_variables().unwrap();
        assert_eq!(settings.cpu_cache_gb.value, 0.5);
        let origin = settings.cpu_cache_gb.origin.to_string();
        assert_eq!(origin, "file d.toml [nodes.*.roles.kvbm] of 'prefill'");
        assert_eq!(settings.metrics.origin.to_string(), "file d.toml [kvbm]");
    }

    #[test]
    fn arguments_of_vllm_come_last_and_variables_come_along() {
        let text = r#"
            model = "/models/m"
            [[nodes.a.roles]]
            role = "decode"
            engine = "vllm"
            vllm_program = "/opt/vllm/bin/vllm"
            vllm_args = ["--max-model-len", "4096"]
            variables = { CUDA_VISIBLE_DEVICES = "1" }
            args = ["--canary-wait", "5"]
        "#;
        let decode = plan(text, "a").unwrap().processes.remove(0);
        let line = decode.argv.join(" ");
        assert!(
            line.ends_with("--canary-wait 5 -- --max-model-len 4096"),
            "{line}"
        );
        assert!(
            line.contains("--engine vllm --vllm-program /opt/vllm/bin/vllm"),
            "{line}"
        );
        assert_eq!(decode.variables["CUDA_VISIBLE_DEVICES"], "1");
    }

    #[test]
    fn every_mistake_is_named_before_anything_starts() {
        let role = |text: &str| format!("[nodes.a]\n[[nodes.a.roles]]\n{text}");
        for (text, node, expected) in [
            (
                TWO_NODES.to_owned(),
                "c",
                "node 'c' is not in the deployment file; it has: a, b",
            ),
            (role("role = 'prefil'"), "a", "unknown variant `prefil`"),
            (
                role("role = 'prefill'\nhttp_port = 1"),
                "a",
                "'http_port' is a frontend's setting",
            ),
            (
                role("role = 'frontend'\nblocks = 1"),
                "a",
                "'blocks' is a worker's setting",
            ),
            (
                role("role = 'prefill'\nargs = ['--max-num-seq', '8']"),
                "a",
                "--max-num-seq",
            ),
            (
                role("role = 'prefill'\nblock_size = 0"),
                "a",
                "0 is not in 1..=1024",
            ),
            (
                role("role = 'prefill'\nkvbm = { cpu_gb = 1 }"),
                "a",
                "key 'cpu_gb' of [nodes.*.roles.kvbm] of 'prefill' is not known; the nearest is 'cpu_cache_gb'",
            ),
            (
                role("role = 'decode'\nengine = 'vllm'\nthreads = 2"),
                "a",
                "--threads is not for --engine vllm",
            ),
            (
                role("role = 'decode'\nvllm_args = ['-O3']"),
                "a",
                "behind '--' is for --engine vllm",
            ),
            (
                role("role = 'frontend'\nkvbm = { cpu_cache_gb = 1 }"),
                "a",
                "'kvbm' is a worker's setting",
            ),
            (
                role("role = 'prefill'\ncolour = 1"),
                "a",
                "unknown field `colour`",
            ),
            (
                "[nodes.a]\ngrace_secs = -1\n[[nodes.a.roles]]\nrole='decode'".to_owned(),
                "a",
                "grace_secs is -1",
            ),
            ("[nodes.a]".to_owned(), "a", "has no roles"),
        ] {
            let error = plan(&text, node).map(|_| ()).unwrap_err();
            assert!(
                format!("{error:#}").contains(expected),
                "{expected}: {error:#}"
            );
        }
    }
}

//! `blockplane kvbm config`.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use blockplane_engine::model::ModelConfig;
use blockplane_kvbm::{open::facts, settings::Report};
use blockplane_protocol::DType;
use clap::Args;

use crate::{
    cli::{ComputeArg, KvbmArgs},
    deployment::Deployment,
    output,
};

#[derive(Clone, Debug, Args)]
pub(crate) struct ConfigArgs {
    /// Checkpoint directory in Hugging Face form, which the size of a block follows from.
    #[arg(long, value_name = "DIR", conflicts_with = "block_bytes")]
    model: Option<PathBuf>,
    /// Bytes of a block on each rank.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    block_bytes: Option<u64>,
    /// Tokens per KV block of the model.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1024))]
    block_size: u32,
    /// Arithmetic of the model.
    #[arg(long, value_enum, default_value_t)]
    compute: ComputeArg,
    /// Ranks that each hold a part of every block (tensor parallelism).
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    ranks: u32,
    /// Blocks of the engine's own pools, to compare with.
    #[arg(long, value_name = "N")]
    blocks: Option<u32>,
    /// Host memory is pinned for a GPU, and counts against the limit on locked memory.
    #[arg(long)]
    pinned: bool,
    /// Deployment file whose `[kvbm]` table counts, below variables and flags.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    kvbm: KvbmArgs,
}

/// Prints the report. The exit status is 1 if a worker would refuse these settings.
pub(super) fn run(args: &ConfigArgs) -> anyhow::Result<ExitCode> {
    let file = match &args.file {
        Some(path) => Some(Deployment::read(path)?.kvbm(None)),
        None => None,
    };
    let settings = match args.kvbm.resolve(file.as_ref()) {
        Ok(settings) => settings,
        Err(errors) => {
            let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
            if args.json {
                output::line(&serde_json::json!({ "errors": errors }).to_string());
            } else {
                for error in &errors {
                    output::line(&format!("error: {error}"));
                }
            }
            return Ok(ExitCode::FAILURE);
        }
    };
    let block_bytes = match (&args.model, args.block_bytes) {
        (Some(dir), _) => {
            let model = ModelConfig::read(dir)
                .with_context(|| format!("the model in {}", dir.display()))?;
            let dtype = match args.compute {
                ComputeArg::Bf16 => DType::Bf16,
                ComputeArg::F32 => DType::F32,
            };
            let layout = model.kv_layout(args.block_size, dtype);
            Some(layout.pool_bytes(1) as u64)
        }
        (None, bytes) => bytes,
    };
    let sizes = block_bytes.map(|bytes| settings.sizes(bytes, args.ranks));
    let findings = sizes.map_or_else(Vec::new, |sizes| {
        settings.check(&sizes, &facts(&settings, args.pinned, args.blocks))
    });
    let report = Report::new(&settings, sizes, findings);
    if args.json {
        output::line(&serde_json::to_string(&report)?);
    } else {
        output::line(report.text().trim_end());
    }
    Ok(if report.failed() {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

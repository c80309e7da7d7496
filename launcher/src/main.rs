//! The `blockplane` binary: subcommands, the per-node launcher, and the one place where the parts
//! are wired together and the environment is read.
#![forbid(unsafe_code)]

mod bundled;
mod chat;
mod cli;
mod deployment;
mod doctor;
mod hub;
mod kernels;
mod kvbm;
mod node;
mod output;
mod role;
mod supervise;
mod telemetry;
mod view;
mod vllm;
mod wiring;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = telemetry::init(&cli.log).and_then(|()| run(cli.command));
    match outcome {
        Ok(code) => code,
        Err(error) => {
            output::error(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Up(args) => node::up(*args),
        Command::Launch(args) => node::launch(&args),
        Command::Frontend(args) => role::frontend::run(args),
        Command::Worker(args) => role::worker::run(*args),
        Command::Chat(args) => chat::run(args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Bench(args) => {
            blockplane_bench::run(args, &kernels::config()).map(|()| ExitCode::SUCCESS)
        }
        Command::Model(command) => hub::run(command),
        Command::Kvbm(command) => kvbm::run(command),
        Command::VllmGuard(args) => vllm::guard::run(args),
        Command::Completions(args) => Ok(cli::docs::completions(&args)),
        Command::Man(args) => cli::docs::man(&args),
        Command::Selftest(args) => blockplane_bench::selftest::run(args, kernels::config()),
    }
}

//! The process in which checks run, one after the other.

use std::{
    io::{self, BufRead},
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
};

use anyhow::Context;
use blockplane_transfer::{CudaReport, KernelConfig, find_nvrtc, probe_cuda};
use rustix::process::{Signal, set_parent_process_death_signal};

use super::{
    GpuWorkerArgs,
    check::{self, Check},
    world::{Event, Outcome, Teller, World},
};

/// The system ends this process when the one that started it ends.
pub(super) fn end_with_parent() -> anyhow::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))
        .context("cannot ask to be ended with the parent")
}

pub(super) fn run(args: GpuWorkerArgs, kernels: KernelConfig) -> anyhow::Result<ExitCode> {
    end_with_parent()?;
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    let wanted: Vec<String> = serde_json::from_str(&line).context("not a list of checks")?;
    let teller = Teller::default();
    let devices = match probe_cuda() {
        Ok(report) => {
            let text = describe(&report, &kernels);
            teller.tell(&Event::Machine { text });
            report.devices
        }
        Err(error) => {
            let reason = error.to_string();
            teller.tell(&Event::Unavailable { reason });
            Vec::new()
        }
    };
    let on_devices = !devices.is_empty();
    let mut world = World::new(args.seed, kernels, devices, teller.clone());
    let checks = check::all();
    let possible = |check: &&Check| check.control || on_devices;
    let wanted = |check: &&Check| wanted.contains(&check.name);
    for check in checks.iter().filter(wanted).filter(possible) {
        let name = check.name.clone();
        teller.tell(&Event::Begin { name: name.clone() });
        let run = AssertUnwindSafe(|| (check.run)(&mut world, &check.name));
        let outcome = match catch_unwind(run) {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(error)) => Outcome::Failed(format!("{error:#}")),
            Err(_) => Outcome::Failed("it panicked".to_owned()),
        };
        let (outcome, fresh) = match outcome {
            Outcome::Failed(detail) => after_failure(&mut world, detail),
            outcome => (outcome, false),
        };
        teller.tell(&Event::End {
            name,
            outcome,
            fresh,
        });
        if fresh {
            break;
        }
    }
    world.reset();
    Ok(ExitCode::SUCCESS)
}

/// Starts over with new agents, and looks whether this process can go on.
fn after_failure(world: &mut World, detail: String) -> (Outcome, bool) {
    let doing = format!("see whether devices are usable after: {detail}");
    world.teller.doing(doing);
    let usable = catch_unwind(AssertUnwindSafe(|| {
        world.reset();
        world.devices_usable()
    }));
    match usable {
        Ok(Ok(())) => (Outcome::Failed(detail), false),
        Ok(Err(error)) => (Outcome::Failed(format!("{detail}; then: {error:#}")), true),
        Err(_) => (Outcome::Failed(format!("{detail}; then it panicked")), true),
    }
}

/// The machine in a few words.
fn describe(report: &CudaReport, kernels: &KernelConfig) -> String {
    let driver = report.driver_version;
    let compiler = match find_nvrtc(kernels, Some(driver / 1000)) {
        Ok(nvrtc) => format!(
            "NVRTC {}.{} ({})",
            nvrtc.version.0,
            nvrtc.version.1,
            nvrtc.path.display()
        ),
        Err(error) => error.to_string(),
    };
    let devices: Vec<_> = report
        .devices
        .iter()
        .map(|device| format!("cuda:{} {}", device.ordinal, device.name))
        .collect();
    format!(
        "{}; CUDA {}.{}; {compiler}",
        devices.join(", "),
        driver / 1000,
        driver % 1000 / 10
    )
}

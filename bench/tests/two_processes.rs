//! The transfer benchmark with two processes: this program is both of them.

use std::io::{Write, stdout};

use blockplane_bench::{BenchArgs, report::Report, run, transfer};
use blockplane_transfer::KernelConfig;
use clap::Parser;
use serde_json::Value;

#[derive(Debug, Parser)]
enum Cli {
    Bench(BenchArgs),
}

#[derive(Debug, Parser)]
struct Options {
    #[command(flatten)]
    args: transfer::TransferArgs,
}

fn main() -> anyhow::Result<()> {
    // The other process is started as `<this program> bench transfer-peer`.
    if std::env::args().nth(1).as_deref() == Some("bench") {
        let Cli::Bench(args) = Cli::parse();
        return run(args, &KernelConfig::default());
    }
    both_lanes_move_bytes_between_processes()?;
    writeln!(
        stdout(),
        "test both_lanes_move_bytes_between_processes ... ok"
    )?;
    four_processes_move_bytes_between_all_of_them()?;
    writeln!(
        stdout(),
        "test four_processes_move_bytes_between_all_of_them ... ok"
    )?;
    the_qualification_of_gpus_can_be_rehearsed()?;
    writeln!(
        stdout(),
        "test the_qualification_of_gpus_can_be_rehearsed ... ok"
    )?;
    Ok(())
}

/// Every row runs, with host memory in place of devices.
fn the_qualification_of_gpus_can_be_rehearsed() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("rows.jsonl");
    let output = std::process::Command::new(std::env::current_exe()?)
        .args(["bench", "gpu", "--rehearse", "--out"])
        .arg(&file)
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let records: Vec<Value> = std::fs::read_to_string(&file)?
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    for metric in [
        "bandwidth_gb_per_s",
        "arrival_us",
        "latency_us",
        "post_cpu_us",
    ] {
        assert!(
            records.iter().any(|record| record["metric"] == metric),
            "no {metric}"
        );
    }
    let failed: Vec<_> = records.iter().filter(|r| r["metric"] == "failed").collect();
    assert!(failed.is_empty(), "{failed:?}");
    Ok(())
}

fn measure(line: &str) -> anyhow::Result<Vec<Value>> {
    let Options { args } = Options::parse_from(line.split(' '));
    let mut out = Vec::new();
    transfer::run_to(
        &args,
        &KernelConfig::default(),
        &mut Report::new(&mut out, true),
    )?;
    String::from_utf8(out)?
        .lines()
        .map(|line| Ok(serde_json::from_str(line)?))
        .collect()
}

fn four_processes_move_bytes_between_all_of_them() -> anyhow::Result<()> {
    let records = measure(
        "transfer --scheme all-to-all --arena-mib 4 --block-bytes 4k --counts 16 --patterns \
         scattered --iterations 10 --to host",
    )?;
    for lane in ["shm", "tcp"] {
        for op in ["write", "read"] {
            let of = |metric: &str| {
                let all = records.iter().filter(|r| r["metric"] == metric);
                all.filter(|r| r["case"]["lane"] == lane && r["case"]["op"] == op)
                    .count()
            };
            assert_eq!(of("bandwidth_gb_per_s"), 1, "{lane} {op}");
            assert_eq!(of("pair_gb_per_s"), 4, "{lane} {op}");
        }
    }
    assert!(records.iter().all(|r| r["case"]["processes"] == 4));
    Ok(())
}

fn both_lanes_move_bytes_between_processes() -> anyhow::Result<()> {
    let line = "transfer --quick --arena-mib 4 --case-ms 5 --block-bytes 4k,64k --counts 1,32";
    let records = measure(line)?;
    for lane in ["shm", "tcp"] {
        let of = |metric: &str| {
            records
                .iter()
                .filter(|r| r["case"]["lane"] == lane && r["metric"] == metric)
                .count()
        };
        assert_eq!(of("bandwidth_gb_per_s"), 8, "{lane}");
        assert_eq!(of("notify_us"), 3, "{lane}");
        // One figure for each process.
        assert_eq!(of("idle_cpu_percent"), 2, "{lane}");
    }
    assert!(records.iter().all(|r| r["case"]["processes"] == 2));
    Ok(())
}

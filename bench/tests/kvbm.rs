//! The benchmark of the tiers on a small store.

use blockplane_bench::{BenchArgs, BenchCommand};
use clap::Parser;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    bench: BenchArgs,
}

fn run(options: &[&str]) -> anyhow::Result<()> {
    let line = Line::try_parse_from([&["bench", "kvbm"], options].concat())?;
    assert!(matches!(line.bench.command, BenchCommand::Kvbm(_)));
    blockplane_bench::run(line.bench, &blockplane_transfer::KernelConfig::default())
}

#[test]
fn a_quick_run_moves_blocks_and_recovers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let options = "--quick --json --block-bytes 65536 --store-bytes 16777216 --recover-slots 2000";
    let mut options: Vec<&str> = options.split(' ').collect();
    options.extend(["--path", path]);
    run(&options).unwrap();
    assert_eq!(
        std::fs::read_dir(path).unwrap().count(),
        0,
        "nothing is left behind"
    );
}

#[test]
fn options_that_make_no_sense_are_named() {
    for (options, named) in [
        (["--block-bytes", "1000"], "--block-bytes 1000"),
        (["--store-bytes", "65536"], "--store-bytes"),
        (["--threads", "0"], "--threads"),
    ] {
        let error = run(&options).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
}

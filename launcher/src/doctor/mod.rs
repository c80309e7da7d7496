//! `blockplane doctor`: what this machine offers, what is used of it, and what to do about the rest.

mod cuda;
mod host;
mod libraries;

use std::{path::Path, process::ExitCode};

use blockplane_transfer::{RdmaReport, probe_rdma};
use serde::Serialize;

use self::cuda::Cuda;
use crate::{cli::DoctorArgs, output};

/// How good a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// There and used, or there for when it is needed.
    Ok,
    /// It works, and could be better.
    Limited,
    /// Not there; something that needs it is off.
    Absent,
    /// Nothing can be served like this.
    Broken,
}

/// One line of the report.
#[derive(Clone, Debug, Serialize)]
struct Finding {
    /// What was looked at.
    name: &'static str,
    verdict: Verdict,
    /// What was found.
    found: String,
    /// What it is used for, in this version.
    used: String,
    /// What to do; empty when nothing needs doing.
    advice: String,
}

/// The roots that findings are read from, so that a test can put its own machine there.
#[derive(Clone, Debug)]
struct Roots<'a> {
    proc: &'a Path,
    sys: &'a Path,
    dev: &'a Path,
    temp: std::path::PathBuf,
    /// What the CUDA driver of this process shows.
    cuda: Cuda,
    /// What the RDMA libraries of this process show.
    rdma: RdmaReport,
}

/// Runs the checks and prints them. The exit status is 0 unless nothing could be served here.
pub(crate) fn run(args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    let roots = Roots {
        proc: Path::new("/proc"),
        sys: Path::new("/sys"),
        dev: Path::new("/dev"),
        temp: std::env::temp_dir(),
        cuda: Cuda::here(),
        rdma: probe_rdma(),
    };
    let findings = examine(&roots);
    if args.json {
        output::line(&serde_json::to_string(
            &serde_json::json!({ "findings": findings }),
        )?);
    } else {
        for finding in &findings {
            print(finding);
        }
    }
    let broken = findings
        .iter()
        .any(|finding| finding.verdict == Verdict::Broken);
    Ok(if broken {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn examine(roots: &Roots<'_>) -> Vec<Finding> {
    let mut findings = vec![
        host::cores(roots),
        host::instructions(),
        host::memory(roots),
        host::huge_pages(roots),
        host::memlock(),
        host::open_files(),
        host::io_uring(roots),
        host::process_copies(roots),
        host::temporary_directory(roots),
    ];
    findings.extend(host::disks(roots));
    findings.extend(cuda::findings(roots));
    findings.extend(libraries::findings(roots));
    findings
}

fn print(finding: &Finding) {
    let mark = match finding.verdict {
        Verdict::Ok => "ok",
        Verdict::Limited => "limited",
        Verdict::Absent => "absent",
        Verdict::Broken => "BROKEN",
    };
    let Finding {
        name, found, used, ..
    } = finding;
    output::line(&format!("{mark:<8} {name:<16} {found}; used {used}"));
    if !finding.advice.is_empty() {
        output::line(&format!("{:25} do: {}", "", finding.advice));
    }
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    std::fs::read_to_string(path)
        .ok()
        .map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    fn findings(root: &Path) -> Vec<Finding> {
        let (proc, sys, dev) = (root.join("proc"), root.join("sys"), root.join("dev"));
        examine(&Roots {
            proc: &proc,
            sys: &sys,
            dev: &dev,
            temp: root.to_path_buf(),
            cuda: Cuda::none(),
            rdma: libraries::tests::none(),
        })
    }

    fn verdict(findings: &[Finding], name: &str) -> Verdict {
        findings
            .iter()
            .find(|finding| finding.name == name)
            .unwrap()
            .verdict
    }

    #[test]
    fn a_bare_machine_has_everything_explained() {
        let root = machine(&[]);
        let findings = findings(root.path());
        for name in ["CUDA", "UCX", "RDMA verbs"] {
            assert_eq!(verdict(&findings, name), Verdict::Absent, "{name}");
        }
        for finding in &findings {
            assert!(
                !finding.found.is_empty() && !finding.used.is_empty(),
                "{finding:?}"
            );
            if finding.verdict != Verdict::Ok {
                assert!(!finding.advice.is_empty(), "{finding:?}");
            }
        }
    }

    #[test]
    fn what_is_there_is_found() {
        let root = machine(&[
            (
                "proc/meminfo",
                "MemTotal: 1048576 kB\nMemAvailable: 524288 kB\nHugePages_Total: 4\nHugePages_Free: 3\nHugepagesize: 2048 kB\n",
            ),
            (
                "sys/kernel/mm/transparent_hugepage/enabled",
                "[always] madvise never",
            ),
            (
                "sys/kernel/mm/transparent_hugepage/shmem_enabled",
                "always within_size [advise] never deny force",
            ),
            ("proc/sys/kernel/io_uring_disabled", "0"),
            ("proc/sys/kernel/osrelease", "6.1.0-test"),
            ("proc/sys/kernel/yama/ptrace_scope", "1"),
            ("dev/nvidia0", ""),
            (
                "proc/driver/nvidia/version",
                "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.1  x",
            ),
        ]);
        let findings = findings(root.path());
        for name in ["huge pages", "io_uring"] {
            assert_eq!(verdict(&findings, name), Verdict::Ok, "{name}");
        }
        assert_eq!(verdict(&findings, "process copies"), Verdict::Limited);
        for (name, expected) in [
            ("CUDA", "1 device file(s)"),
            ("process copies", "ptrace_scope is 1"),
            ("memory", "0.5 GiB available"),
        ] {
            let finding = findings
                .iter()
                .find(|finding| finding.name == name)
                .unwrap();
            assert!(finding.found.contains(expected), "{finding:?}");
        }
    }

    #[test]
    fn an_unwritable_temporary_directory_is_broken() {
        let root = machine(&[]);
        let missing = root.path().join("missing");
        let roots = Roots {
            proc: root.path(),
            sys: root.path(),
            dev: root.path(),
            temp: missing,
            cuda: Cuda::none(),
            rdma: libraries::tests::none(),
        };
        assert_eq!(host::temporary_directory(&roots).verdict, Verdict::Broken);
    }
}

//! Processor, memory, limits, kernel features and disks.

use std::collections::BTreeMap;

use blockplane_engine::ops::Isa;
use rustix::process::{Resource, getrlimit};

use super::{Finding, Roots, Verdict, read};

const GIB: f64 = (1u64 << 30) as f64;

pub(super) fn cores(roots: &Roots<'_>) -> Finding {
    let count = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let info = read(roots.proc.join("cpuinfo")).unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1))
        .unwrap_or("unknown processor");
    let single = count == 1;
    Finding {
        name: "cores",
        verdict: if single {
            Verdict::Limited
        } else {
            Verdict::Ok
        },
        found: format!("{count} usable, {model}"),
        used: "native engine and KV copies".to_owned(),
        advice: if single {
            "prefill and decode workers share one core; give the process more".to_owned()
        } else {
            String::new()
        },
    }
}

pub(super) fn instructions() -> Finding {
    let best = Isa::best();
    let good = best >= Isa::Avx512;
    Finding {
        name: "instruction set",
        verdict: if good { Verdict::Ok } else { Verdict::Limited },
        found: format!("fastest that the kernels know: {best}"),
        used: "native engine, unless --isa names another".to_owned(),
        advice: if good {
            String::new()
        } else {
            "it runs; a processor with AVX-512 is several times faster".to_owned()
        },
    }
}

fn meminfo(roots: &Roots<'_>) -> BTreeMap<String, u64> {
    let text = read(roots.proc.join("meminfo")).unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let (name, rest) = line.split_once(':')?;
            Some((
                name.to_owned(),
                rest.split_whitespace().next()?.parse().ok()?,
            ))
        })
        .collect()
}

#[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
fn gib(kib: u64) -> f64 {
    kib as f64 * 1024.0 / GIB
}

pub(super) fn memory(roots: &Roots<'_>) -> Finding {
    let info = meminfo(roots);
    let get = |name: &str| info.get(name).copied().unwrap_or(0);
    let (total, available) = (gib(get("MemTotal")), gib(get("MemAvailable")));
    let low = available < 2.0;
    Finding {
        name: "memory",
        verdict: if low { Verdict::Limited } else { Verdict::Ok },
        found: format!("{total:.1} GiB, {available:.1} GiB available"),
        used: "weights, and 1 GB of KV per worker unless --kv-gb or --blocks says otherwise"
            .to_owned(),
        advice: if low {
            "free memory, or lower --kv-gb".to_owned()
        } else {
            String::new()
        },
    }
}

/// The choice in brackets of a sysfs file such as `always [madvise] never`.
fn chosen(text: &str) -> &str {
    text.split('[')
        .nth(1)
        .and_then(|rest| rest.split(']').next())
        .unwrap_or("unknown")
}

pub(super) fn huge_pages(roots: &Roots<'_>) -> Finding {
    let dir = roots.sys.join("kernel/mm/transparent_hugepage");
    let anonymous = read(dir.join("enabled")).unwrap_or_default();
    let shared = read(dir.join("shmem_enabled")).unwrap_or_default();
    let (anonymous, shared) = (chosen(&anonymous), chosen(&shared));
    let info = meminfo(roots);
    let reserved = info.get("HugePages_Total").copied().unwrap_or(0);
    let shared_ok = matches!(shared, "always" | "within_size" | "advise" | "force");
    Finding {
        name: "huge pages",
        verdict: if shared_ok {
            Verdict::Ok
        } else {
            Verdict::Limited
        },
        found: format!("weights: {anonymous}, KV arenas (shmem): {shared}, reserved: {reserved}"),
        used: "asked for with madvise for weights and KV arenas; fewer TLB misses".to_owned(),
        advice: if shared_ok {
            String::new()
        } else {
            "as root: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled".to_owned()
        },
    }
}

pub(super) fn memlock() -> Finding {
    let limit = getrlimit(Resource::Memlock).current;
    let found = limit.map_or_else(
        || "unlimited".to_owned(),
        |bytes| format!("{} KiB may be pinned", bytes / 1024),
    );
    let low = limit.is_some_and(|bytes| bytes < 1 << 30);
    Finding {
        name: "memlock",
        verdict: if low { Verdict::Limited } else { Verdict::Ok },
        found,
        used: "by the file lane, whose registered buffers are pinned; RDMA and GPU arenas have to pin \
               their memory"
            .to_owned(),
        advice: if low {
            "for RDMA, GPUs or files set 'ulimit -l unlimited' (container: --ulimit memlock=-1)"
                .to_owned()
        } else {
            String::new()
        },
    }
}

pub(super) fn open_files() -> Finding {
    let limit = getrlimit(Resource::Nofile).current;
    let low = limit.is_some_and(|files| files < 4096);
    Finding {
        name: "open files",
        verdict: if low { Verdict::Limited } else { Verdict::Ok },
        found: limit.map_or_else(
            || "unlimited".to_owned(),
            |files| format!("{files} per process"),
        ),
        used: "one per client connection, a few per peer".to_owned(),
        advice: if low {
            "raise it: ulimit -n 65536".to_owned()
        } else {
            String::new()
        },
    }
}

pub(super) fn io_uring(roots: &Roots<'_>) -> Finding {
    let kernel =
        read(roots.proc.join("sys/kernel/osrelease")).unwrap_or_else(|| "unknown".to_owned());
    let switch = read(roots.proc.join("sys/kernel/io_uring_disabled"));
    let mut version = kernel
        .split(['.', '-'])
        .map(|part| part.parse::<u32>().unwrap_or(0));
    let (major, minor) = (version.next().unwrap_or(0), version.next().unwrap_or(0));
    let (verdict, found, advice) = match switch.as_deref() {
        Some("1" | "2") => (
            Verdict::Absent,
            format!("kernel {kernel}, switched off by kernel.io_uring_disabled"),
            "as root: sysctl kernel.io_uring_disabled=0",
        ),
        _ if (major, minor) < (5, 11) => (
            Verdict::Absent,
            format!("kernel {kernel} is too old"),
            "use Linux 5.11 or later",
        ),
        _ => (Verdict::Ok, format!("kernel {kernel}"), ""),
    };
    Finding {
        name: "io_uring",
        verdict,
        found,
        used:
            "by the file lane; where it is forbidden (sandboxes do that too) threads take its place"
                .to_owned(),
        advice: advice.to_owned(),
    }
}

/// Whether the kernel may copy between processes of one user, for memory that is not an arena.
pub(super) fn process_copies(roots: &Roots<'_>) -> Finding {
    let scope = read(roots.proc.join("sys/kernel/yama/ptrace_scope"));
    let (verdict, found, advice) = match scope.as_deref() {
        None | Some("0") => (
            Verdict::Ok,
            "the kernel copies between processes of one user".to_owned(),
            "",
        ),
        Some(scope) => (
            Verdict::Limited,
            format!("kernel.yama.ptrace_scope is {scope}"),
            "as root: sysctl kernel.yama.ptrace_scope=0, or allocate blocks as arenas",
        ),
    };
    Finding {
        name: "process copies",
        verdict,
        found,
        used:
            "by the shm lane for memory that is not an arena; else such memory goes over a socket"
                .to_owned(),
        advice: advice.to_owned(),
    }
}

pub(super) fn temporary_directory(roots: &Roots<'_>) -> Finding {
    let probe = roots
        .temp
        .join(format!(".blockplane-doctor-{}", std::process::id()));
    let written = std::fs::write(&probe, b"probe").and_then(|()| std::fs::remove_file(&probe));
    let dir = roots.temp.display();
    let (verdict, found, advice) = match written {
        Ok(()) => (Verdict::Ok, format!("{dir} is writable"), String::new()),
        Err(error) => (
            Verdict::Broken,
            format!("{dir} is not writable: {error}"),
            "set TMPDIR to a writable directory, or give --discovery and --run-dir".to_owned(),
        ),
    };
    Finding {
        name: "temporary files",
        verdict,
        found,
        used: "discovery, sockets and logs where no directory is named".to_owned(),
        advice,
    }
}

pub(super) fn disks(roots: &Roots<'_>) -> Vec<Finding> {
    let mounts = read(roots.proc.join("mounts")).unwrap_or_default();
    let mut seen = std::collections::BTreeSet::new();
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let (device, mount, kind) = (fields.next()?, fields.next()?, fields.next()?);
            (device.starts_with("/dev/") && seen.insert(device.to_owned()))
                .then(|| disk(roots, device, mount, kind))
        })
        .collect()
}

fn disk(roots: &Roots<'_>, device: &str, mount: &str, kind: &str) -> Finding {
    let name = device.trim_start_matches("/dev/");
    let base = name.trim_end_matches(|c: char| c.is_ascii_digit());
    let rotational = [name, base, base.trim_end_matches('p')]
        .iter()
        .find_map(|name| read(roots.sys.join("block").join(name).join("queue/rotational")));
    let medium = match rotational.as_deref() {
        Some("1") => "rotating",
        Some(_) => "solid state",
        None => "unknown medium",
    };
    let space = rustix::fs::statvfs(mount).map_or_else(
        |error| format!("free space unknown: {error}"),
        |fs| {
            format!(
                "{:.0} GiB free",
                gib(fs.f_bavail.saturating_mul(fs.f_frsize) / 1024)
            )
        },
    );
    Finding {
        name: "disk",
        verdict: Verdict::Ok,
        found: format!("{device} on {mount} ({kind}, {medium}), {space}"),
        used: "for checkpoints, and for KV blocks (G3) where DYN_KVBM_DISK_CACHE_DIR names a folder on it"
            .to_owned(),
        advice: String::new(),
    }
}

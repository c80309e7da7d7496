//! Libraries and devices that are opened at run time when they are there.

use super::{Finding, Roots, Verdict};

/// Folders that the dynamic loader searches besides its cache.
const FOLDERS: &[&str] = &[
    "/usr/lib",
    "/usr/lib64",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/local/cuda/lib64",
];

/// Where the loader would find a library whose file name starts with `prefix`.
fn find(roots: &Roots<'_>, prefix: &str) -> Option<String> {
    let named = roots.library_path.split(':').filter(|dir| !dir.is_empty());
    let standard = FOLDERS
        .iter()
        .copied()
        .filter(|_| roots.etc == std::path::Path::new("/etc"));
    for dir in named.chain(standard) {
        let Ok(entries) = std::fs::read_dir(dir) else {
            continue;
        };
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.starts_with(prefix))
            .collect();
        names.sort();
        if let Some(name) = names.first() {
            return Some(format!("{dir}/{name}"));
        }
    }
    let cache = std::fs::read(roots.etc.join("ld.so.cache")).ok()?;
    let start = cache
        .windows(prefix.len())
        .position(|bytes| bytes == prefix.as_bytes())?;
    let end = cache[start..].iter().position(|&byte| byte == 0)? + start;
    Some(String::from_utf8_lossy(&cache[start..end]).into_owned())
}

pub(super) fn ucx(roots: &Roots<'_>) -> Finding {
    let library = find(roots, "libucp.so");
    Finding {
        name: "UCX",
        verdict: if library.is_some() {
            Verdict::Ok
        } else {
            Verdict::Absent
        },
        found: library.clone().unwrap_or_else(|| "no libucp.so".to_owned()),
        used: "not by this version, which moves KV by shared memory and TCP".to_owned(),
        advice: if library.is_some() {
            String::new()
        } else {
            "nothing; shared memory and TCP need no library".to_owned()
        },
    }
}

pub(super) fn verbs(roots: &Roots<'_>) -> Finding {
    let library = find(roots, "libibverbs.so");
    let devices: Vec<String> = std::fs::read_dir(roots.sys.join("class/infiniband"))
        .map(|entries| {
            entries
                .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
                .collect()
        })
        .unwrap_or_default();
    let there = library.is_some() && !devices.is_empty();
    let found = match (&library, devices.is_empty()) {
        (None, true) => "no libibverbs.so and no RDMA device".to_owned(),
        (None, false) => format!("devices {}, but no libibverbs.so", devices.join(", ")),
        (Some(path), true) => format!("{path}, but no RDMA device"),
        (Some(path), false) => format!("{path}, devices {}", devices.join(", ")),
    };
    Finding {
        name: "RDMA verbs",
        verdict: if there { Verdict::Ok } else { Verdict::Absent },
        found,
        used: "not by this version, which moves KV by shared memory and TCP".to_owned(),
        advice: if there {
            String::new()
        } else {
            "nothing on one host; between hosts install rdma-core when there is a NIC".to_owned()
        },
    }
}

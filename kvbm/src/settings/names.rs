//! Names that are no settings: what they were in KVBM, and what somebody who mistyped meant.

use super::table::{PREFIX, SETTINGS};

/// Earlier names of settings, as variables, with the key they stand for.
pub(super) const ALIASES: &[(&str, &str)] = &[
    ("DYN_KVBM_TRANSFER_BATCH_SIZE", "max_transfer_batch_size"),
    ("ENABLE_KVBM_RECORD", "enable_record"),
];

/// Variables of KVBM that have nothing to act on here, and why.
pub(super) const WITHOUT_EFFECT: &[(&str, &str)] = &[
    (
        "DYN_KVBM_NCCL_MLA_MODE",
        "it is a mode of KVBM's TensorRT-LLM worker, and no block moves over NCCL here",
    ),
    ("DYN_KVBM_NCCL_MAX_CTAS", "no block moves over NCCL"),
    (
        "DYN_KVBM_TRTLLM_ZMQ_PORT",
        "events come from this worker's own pools, not from TensorRT-LLM over ZMQ",
    ),
    (
        "DYN_KVBM_ENABLE_NUMA",
        "it is deprecated in KVBM too: pinned memory is taken from the NUMA node next to its device",
    ),
    (
        "DYN_KVBM_DISABLE_WRITE_COMBINED",
        "G2 is never write-combined: checksums read it, and such memory is slow to read",
    ),
    (
        "DYN_MEMORY_DISABLE_NUMA",
        "pinned memory is always taken from the NUMA node next to its device",
    ),
    (
        "DYN_KVBM_G3PB_ADMISSION_POLICY",
        "the peer-backed cache of that branch is not built; what comes to G3 is DYN_KVBM_G3_ADMISSION's",
    ),
    (
        "DYN_RUNTIME_ENABLED_KVBM",
        "there is one runtime, and discovery is the worker's --discovery",
    ),
    (
        "DYN_FATBIN_PATH",
        "kernels are compiled for the device at hand and kept in the cache directory",
    ),
    ("DYN_REGISTRY_ENABLE", REGISTRY),
    ("DYN_REGISTRY_CLIENT_QUERY_ADDR", REGISTRY),
    ("DYN_REGISTRY_CLIENT_REGISTER_ADDR", REGISTRY),
    ("DYN_REGISTRY_CLIENT_LOCAL_CACHE", REGISTRY),
    ("DYN_REGISTRY_HUB_CAPACITY", REGISTRY),
    ("DYN_REGISTRY_HUB_QUERY_ADDR", REGISTRY),
    ("DYN_REGISTRY_HUB_REGISTER_ADDR", REGISTRY),
    ("DYN_REGISTRY_HUB_LEASE_TIMEOUT_SECS", REGISTRY),
];

const REGISTRY: &str =
    "there is no registry process: workers find each other's blocks by discovery and KV events";

/// Switches of NIXL's backends begin with this; what follows is a name of NIXL's.
pub(super) const NIXL_BACKEND: &str = "DYN_KVBM_NIXL_BACKEND_";

/// Whether a variable is ours to judge.
pub(super) fn concerns_us(name: &str) -> bool {
    let upper = name.to_ascii_uppercase();
    upper.starts_with(PREFIX)
        || ALIASES.iter().any(|(alias, _)| *alias == upper)
        || WITHOUT_EFFECT.iter().any(|(known, _)| *known == upper)
        || (upper.starts_with("DYN_") && nearest_variable(&upper).1 <= SLIP)
}

/// Differences up to which a variable with another prefix is taken for a slip of the hand.
const SLIP: usize = 2;

/// The variable most like `name`, and in how many places they differ.
pub(super) fn nearest_variable(name: &str) -> (String, usize) {
    let settings = SETTINGS.iter().map(|setting| setting.variable());
    let others = ALIASES.iter().chain(WITHOUT_EFFECT);
    nearest(
        name,
        settings.chain(others.map(|(name, _)| (*name).to_owned())),
    )
}

/// The key of a file most like `name`.
pub(super) fn nearest_key(name: &str) -> String {
    nearest(name, SETTINGS.iter().map(|setting| setting.key.to_owned())).0
}

fn nearest(name: &str, known: impl Iterator<Item = String>) -> (String, usize) {
    let all = known.map(|candidate| {
        let distance = distance(name.as_bytes(), candidate.as_bytes());
        (candidate, distance)
    });
    all.min_by_key(|(_, distance)| *distance)
        .expect("the table of settings is not empty")
}

/// Letters to insert, to leave out, to replace, or pairs to swap, to get from one to the other
/// (Damerau's and Levenshtein's distance, restricted), whatever the case.
fn distance(a: &[u8], b: &[u8]) -> usize {
    let same = |i: usize, j: usize| a[i].eq_ignore_ascii_case(&b[j]);
    let mut before = Vec::new();
    let mut above: Vec<usize> = (0..=b.len()).collect();
    for i in 0..a.len() {
        let mut row = vec![i + 1];
        for j in 0..b.len() {
            let replaced = above[j] + usize::from(!same(i, j));
            let mut best = replaced.min(above[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && same(i, j - 1) && same(i - 1, j) {
                best = best.min(before[j - 1] + 1);
            }
            row.push(best);
        }
        before = above;
        above = row;
    }
    above[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_those_of_the_definition() {
        for (a, b, expected) in [
            ("", "", 0),
            ("", "abc", 3),
            ("abc", "ABC", 0),
            ("kitten", "sitting", 3),
            ("KVBM", "KVMB", 1),
            ("CPU_CACH_GB", "CPU_CACHE_GB", 1),
        ] {
            assert_eq!(distance(a.as_bytes(), b.as_bytes()), expected, "{a} {b}");
            assert_eq!(distance(b.as_bytes(), a.as_bytes()), expected, "{b} {a}");
        }
    }

    #[test]
    fn other_variables_are_none_of_our_business() {
        for name in [
            "PATH",
            "DYN_LOG",
            "DYN_DISCOVERY",
            "DYN_HTTP_PORT",
            "KVBM_CACHE_X",
        ] {
            assert!(!concerns_us(name), "{name}");
        }
        for name in [
            "DYN_KVBM_X",
            "dyn_kvbm_metrics",
            "DYN_KVMB_METRICS",
            "ENABLE_KVBM_RECORD",
        ] {
            assert!(concerns_us(name), "{name}");
        }
    }
}

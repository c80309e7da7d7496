//! How often threads of this process slept, for tests that have a process of their own.

use std::fs;

/// Threads whose names begin so, and how often they slept so far.
pub(crate) fn switches(names: &str) -> (usize, u64) {
    let (mut threads, mut sum) = (0, 0);
    for task in fs::read_dir("/proc/self/task").unwrap().flatten() {
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if name.starts_with(names) {
            let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
            let key = "voluntary_ctxt_switches:";
            let count = status.lines().find_map(|line| line.strip_prefix(key));
            sum += count.unwrap().trim().parse::<u64>().unwrap();
            threads += 1;
        }
    }
    (threads, sum)
}

//! The processes of one cluster, found in `/proc`.
//!
//! Each cluster puts a mark of its own into the environment of what it starts. Children inherit it,
//! so that every process of the cluster is found, also one whose parent is gone.

use std::{fs, path::Path};

/// Name of the environment variable that carries a cluster's mark.
pub const MARK: &str = "TEST_CLUSTER";

/// A process as `/proc` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Process id.
    pub pid: u32,
    /// Its parent.
    pub parent: u32,
    /// State letter: `R`, `S`, `T` (stopped), `Z` (zombie), ...
    pub state: char,
    /// Its arguments, program first.
    pub arguments: Vec<String>,
}

/// Living processes that carry `mark`, by ascending id. Zombies have ended and are left out.
#[must_use]
pub fn marked(mark: &str) -> Vec<Entry> {
    let needle = format!("{MARK}={mark}");
    let mut found: Vec<Entry> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|folder| folder.file_name().to_str()?.parse().ok())
        .filter(|&pid| carries(pid, &needle))
        .filter_map(entry)
        .filter(|entry| entry.state != 'Z')
        .collect();
    found.sort_by_key(|entry| entry.pid);
    found
}

/// The process with this id, if it is there (a zombie is).
#[must_use]
pub fn entry(pid: u32) -> Option<Entry> {
    let folder = Path::new("/proc").join(pid.to_string());
    let stat = fs::read_to_string(folder.join("stat")).ok()?;
    // `pid (name) state parent ...`; the name may hold anything, so look behind its last bracket.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse().ok()?;
    let arguments = fs::read(folder.join("cmdline")).ok()?;
    Some(Entry {
        pid,
        parent,
        state,
        arguments: arguments
            .split(|&byte| byte == 0)
            .filter(|argument| !argument.is_empty())
            .map(|argument| String::from_utf8_lossy(argument).into_owned())
            .collect(),
    })
}

impl Entry {
    /// Whether `flag value` or `flag=value` is among the arguments.
    #[must_use]
    pub fn has_option(&self, flag: &str, value: &str) -> bool {
        let joined = format!("{flag}={value}");
        self.arguments.contains(&joined)
            || self
                .arguments
                .windows(2)
                .any(|pair| pair[0] == flag && pair[1] == value)
    }
}

fn carries(pid: u32, needle: &str) -> bool {
    fs::read(format!("/proc/{pid}/environ")).is_ok_and(|environment| {
        environment
            .split(|&byte| byte == 0)
            .any(|variable| variable == needle.as_bytes())
    })
}

//! Two hosts: network namespaces with a wire between them that can be cut without a word.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

const PREFIX: &str = "blockplane-";
static PAIRS: AtomicU32 = AtomicU32::new(0);

/// Which of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    A,
    B,
}

impl Side {
    pub(crate) const fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// Its address.
    pub(crate) const fn address(self) -> &'static str {
        match self {
            Self::A => "10.77.0.1",
            Self::B => "10.77.0.2",
        }
    }

    /// Its IPv6 address.
    pub(crate) const fn address6(self) -> &'static str {
        match self {
            Self::A => "fd77::1",
            Self::B => "fd77::2",
        }
    }

    const fn hardware(self) -> &'static str {
        match self {
            Self::A => "02:77:00:00:00:01",
            Self::B => "02:77:00:00:00:02",
        }
    }

    const fn letter(self) -> char {
        match self {
            Self::A => 'a',
            Self::B => 'b',
        }
    }
}

/// Both hosts and the wire; they go when it is dropped.
pub(crate) struct Net {
    name: String,
    /// A folder that each host sees for itself when it is told to.
    pub(crate) folder: PathBuf,
}

impl Net {
    /// Makes the hosts. `None`, and the reason printed, where that is not allowed.
    pub(crate) fn make() -> Option<Self> {
        remove_orphans();
        let number = PAIRS.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}", std::process::id());
        let folder = std::env::temp_dir().join(&name);
        std::fs::create_dir(&folder).unwrap();
        let net = Self { name, folder };
        match net.build() {
            Ok(()) => Some(net),
            Err(reason) => {
                println!("not run: no network namespaces here: {reason}");
                None
            }
        }
    }

    fn build(&self) -> Result<(), String> {
        for side in [Side::A, Side::B] {
            ip(&["netns", "add", &self.namespace(side)])?;
        }
        let (a, b) = (self.namespace(Side::A), self.namespace(Side::B));
        ip(&[
            "link", "add", "wire", "netns", &a, "type", "veth", "peer", "name", "wire", "netns", &b,
        ])?;
        for side in [Side::A, Side::B] {
            let host = self.namespace(side);
            let on = |words: &[&str]| ip(&[&["-n", host.as_str()], words].concat());
            on(&["link", "set", "wire", "address", side.hardware()])?;
            let address = format!("{}/24", side.address());
            on(&["address", "add", &address, "dev", "wire"])?;
            let address6 = format!("{}/64", side.address6());
            on(&["address", "add", &address6, "dev", "wire", "nodad"])?;
            on(&["link", "set", "lo", "up"])?;
            on(&["link", "set", "wire", "up"])?;
        }
        Ok(())
    }

    pub(crate) fn namespace(&self, side: Side) -> String {
        format!("{}-{}", self.name, side.letter())
    }

    /// What `from` sends is lost on the wire from now on, and nobody is told.
    pub(crate) fn cut(&self, from: Side) {
        self.neighbour(from, "02:77:00:00:00:99");
    }

    /// The wire works again.
    pub(crate) fn mend(&self, from: Side) {
        self.neighbour(from, from.other().hardware());
    }

    fn neighbour(&self, from: Side, hardware: &str) {
        let host = self.namespace(from);
        for address in [from.other().address(), from.other().address6()] {
            let words = [
                "-n",
                &host,
                "neighbour",
                "replace",
                address,
                "lladdr",
                hardware,
                "dev",
                "wire",
                "nud",
                "permanent",
            ];
            ip(&words).unwrap();
        }
    }

    /// Lets the wire carry so much and no more, in both directions; false where the kernel cannot.
    pub(crate) fn slow_down(&self, rate: &str) -> bool {
        [Side::A, Side::B].into_iter().all(|side| {
            let words = [
                "netns",
                "exec",
                &self.namespace(side),
                "tc",
                "qdisc",
                "add",
                "dev",
                "wire",
                "root",
                "tbf",
                "rate",
                rate,
                "burst",
                "64kb",
                "latency",
                "200ms",
            ];
            ip(&words).is_ok()
        })
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for side in [Side::A, Side::B] {
            let _ = ip(&["netns", "delete", &self.namespace(side)]);
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Removes what killed tests have left behind.
fn remove_orphans() {
    let Ok(list) = Command::new("ip").args(["netns", "list"]).output() else {
        return;
    };
    for line in String::from_utf8_lossy(&list.stdout).lines() {
        let name = line.split(' ').next().unwrap_or_default();
        let owner = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|pid| !std::path::Path::new("/proc").join(pid).exists()) {
            let _ = ip(&["netns", "delete", name]);
        }
    }
}

fn ip(words: &[&str]) -> Result<(), String> {
    let Output { status, stderr, .. } = Command::new("ip")
        .args(words)
        .output()
        .map_err(|error| format!("ip: {error}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&stderr).trim().to_owned())
    }
}

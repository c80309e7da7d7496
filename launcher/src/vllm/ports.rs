//! Places for the sockets of a vLLM server.

use std::{
    net::{Ipv4Addr, TcpListener},
    os::unix::fs::DirBuilderExt,
};

use anyhow::Context;

/// Attempts to find free ports side by side.
const ATTEMPTS: usize = 64;

/// The first of `count` ports side by side that nobody listens on now.
pub(super) fn free(count: u32) -> anyhow::Result<u16> {
    for _ in 0..ATTEMPTS {
        let first = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .and_then(|listener| listener.local_addr())
            .context("no port of the loopback interface is free")?
            .port();
        let mut others = (1..count).map(|offset| {
            let port = u16::try_from(u32::from(first) + offset).ok()?;
            TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok()
        });
        if others.all(|listener| listener.is_some()) {
            return Ok(first);
        }
    }
    anyhow::bail!("no {count} ports of the loopback interface side by side are free")
}

/// Where KV events are published, and where those who missed some are answered. vLLM takes a socket in
/// the file system for one rank only, and binds a port to one address only for replays.
pub(super) fn events(ranks: u32) -> anyhow::Result<(String, String)> {
    if ranks > 1 {
        let events = free(ranks)?;
        let replay = free(ranks)?;
        return Ok((
            format!("tcp://*:{events}"),
            format!("tcp://127.0.0.1:{replay}"),
        ));
    }
    let dir = super::socket_dir();
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dir)
        .with_context(|| format!("directory {} cannot be made", dir.display()))?;
    let place = |name: &str| format!("ipc://{}", dir.join(name).display());
    Ok((place("events"), place("replay")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_side_by_side_are_free() {
        let first = free(4).unwrap();
        let listeners: Vec<_> = (first..first + 4)
            .map(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)))
            .collect();
        assert!(
            listeners.iter().filter(|l| l.is_ok()).count() >= 3,
            "{listeners:?}"
        );
    }
}

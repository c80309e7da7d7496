//! The loopback lane end to end: the smallest program that moves blocks.

use std::sync::Arc;
use std::time::Duration;

use blockplane_transfer::{
    Agent, AgentConfig, ArenaConfig, BlockLayout, Lane, LocalBlocks, Op, PostOptions, RemoteBlocks,
};

const WAIT: Duration = Duration::from_secs(10);

#[test]
fn an_agent_writes_to_itself_and_to_a_neighbour() {
    let a = Agent::new(AgentConfig::new("a")).unwrap();
    let b = Agent::new(AgentConfig::new("b")).unwrap();
    for target in [&a, &b] {
        let peer = a.connect(&target.metadata(), WAIT).unwrap();
        assert_eq!(peer.lane().lane, Lane::Loopback);
        let layout = BlockLayout::contiguous(8, 4096);
        let local = a.allocate(ArenaConfig::new(8 * 4096, "local")).unwrap();
        let remote = target
            .allocate(ArenaConfig::new(8 * 4096, "remote"))
            .unwrap();
        let bytes: Vec<u8> = (0..8 * 4096u32).map(|i| (i / 4096 + i) as u8).collect();
        local.write_at(0, &bytes).unwrap();
        let ids: Arc<[u32]> = [1, 5, 2].into();
        let to: Arc<[u32]> = [0, 7, 3].into();
        let prepared = a
            .prepare(
                Op::Write,
                LocalBlocks {
                    registration: &local,
                    layout,
                    ids: ids.clone(),
                    layers: 0..1,
                },
                RemoteBlocks {
                    peer: &peer,
                    region: remote.id(),
                    layout,
                    ids: to.clone(),
                    layers: 0..1,
                    window: None,
                },
            )
            .unwrap();
        let transfer = prepared
            .post(PostOptions::within(WAIT).notify(&b"done"[..]))
            .unwrap();
        transfer.wait(WAIT).unwrap();
        let notification = target.notifications().recv_timeout(WAIT).unwrap();
        assert_eq!(
            (&*notification.from, &notification.payload[..]),
            ("a", &b"done"[..])
        );
        for (from, to) in ids.iter().zip(to.iter()) {
            let mut got = vec![0; 4096];
            remote.read_at(u64::from(*to) * 4096, &mut got).unwrap();
            assert_eq!(got, bytes[*from as usize * 4096..][..4096]);
        }
    }
}

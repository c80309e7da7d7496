//! Peers by name: connected at first use, again after a loss, over lanes chosen per connection.

use blockplane_transfer::{
    Agent, ConnectError, ConnectOptions, CostBasis, Lane, LocalBlocks, Op, Peer, PostError,
    PostOptions, PrepareError, Prepared, Registration, RemoteBlocks,
};

use crate::support::{Blocks, Setup, WAIT, arena};

fn write(
    agent: &Agent,
    local: &Registration,
    peer: &Peer,
    remote: &Registration,
) -> Result<Prepared, PrepareError> {
    let blocks = Blocks::flat(16, 4096, &[3, 1, 5]);
    let local = LocalBlocks {
        registration: local,
        layout: blocks.layout,
        ids: [3, 1, 5].into(),
        layers: 0..1,
    };
    let remote = RemoteBlocks {
        peer,
        region: remote.id(),
        layout: blocks.layout,
        ids: [8, 9, 2].into(),
        layers: 0..1,
        window: None,
    };
    agent.prepare(Op::Write, local, remote)
}

pub(crate) fn a_remembered_peer_is_connected_when_it_is_used(setup: &Setup) {
    let a = Agent::new(setup.config("a")).unwrap();
    let b = Agent::new(setup.config("b")).unwrap();
    let (local, remote) = (arena(&a, 65536), arena(&b, 65536));
    let options = || ConnectOptions::within(WAIT);
    let peer = a.remember(&b.metadata(), options()).unwrap();
    assert_eq!((peer.name(), peer.epoch()), ("b", b.epoch()));
    assert!(!peer.is_connected() && peer.lost().is_none());
    assert_eq!(peer.lane().lane, setup.lane);
    assert!(peer.lane().reason.starts_with("not connected yet"));
    assert_eq!(a.stats().peers, 0);

    let prepared = write(&a, &local, &peer, &remote).unwrap();
    assert!(peer.is_connected());
    assert!(!peer.lane().reason.starts_with("not connected yet"));
    prepared
        .post(PostOptions::within(WAIT))
        .unwrap()
        .wait(WAIT)
        .unwrap();
    assert_eq!(peer.stats().transfers_done, 1);
    // The same connection for everybody who asks by name.
    let again = a.peer("b").unwrap();
    a.notify(&again, "hello", WAIT).unwrap().wait(WAIT).unwrap();
    assert_eq!((a.stats().peers, peer.stats().transfers_done), (1, 2));
    assert_eq!(a.peers().len(), 1);

    // A lost connection: what was prepared fails, the next use connects again.
    peer.disconnect();
    let refused = prepared.post(PostOptions::within(WAIT));
    assert!(matches!(refused, Err(PostError::PeerLost(_))));
    write(&a, &local, &peer, &remote).unwrap();

    // The peer restarts under its name: old metadata is stale, new metadata heals the handle.
    let old = b.metadata();
    drop(remote);
    drop(b);
    let b = Agent::new(setup.config("b")).unwrap();
    assert_ne!(old.epoch(), b.epoch());
    let remote = arena(&b, 65536);
    let stale = write(&a, &local, &peer, &remote);
    assert!(matches!(
        stale,
        Err(
            PrepareError::Connect(ConnectError::Stale { .. } | ConnectError::NoLane { .. })
                | PrepareError::PeerLost(_)
                | PrepareError::UnknownRegion { .. }
        )
    ));
    a.remember(&b.metadata(), options()).unwrap();
    write(&a, &local, &peer, &remote)
        .unwrap()
        .post(PostOptions::within(WAIT))
        .unwrap()
        .wait(WAIT)
        .unwrap();
    assert_eq!(peer.epoch(), b.epoch());

    assert!(a.forget("b") && !a.forget("b"));
    let forgotten = write(&a, &local, &peer, &remote);
    let unknown = ConnectError::Unknown { peer: "b".into() };
    assert_eq!(forgotten.err(), Some(PrepareError::Connect(unknown)));
}

pub(crate) fn estimates_come_from_the_connection(setup: &Setup) {
    let pair = setup.pair();
    let (local, remote) = (arena(&pair.a, 65536), arena(&pair.b, 65536));
    let prepared = write(&pair.a, &local, &pair.peer, &remote).unwrap();
    let before = prepared.estimate();
    assert_eq!(before.basis, CostBasis::LaneDefault);
    assert!(before.low <= before.expected && before.expected <= before.high);
    for _ in 0..20 {
        prepared
            .post(PostOptions::within(WAIT))
            .unwrap()
            .wait(WAIT)
            .unwrap();
    }
    let after = prepared.estimate();
    assert_eq!(after.basis, CostBasis::Measured { operations: 20 });
    assert!(after.low <= after.expected && after.expected <= after.high);
}

#[test]
fn lanes_are_chosen_per_connection() {
    let setup = Setup::new(Lane::Shm);
    let all = [Lane::Loopback, Lane::Shm, Lane::Tcp];
    let agent = |name: &str| Agent::new(setup.config(name).with_lanes(all)).unwrap();
    let (a, b) = (agent("a"), agent("b"));
    let metadata = b.metadata();
    let first = a.connect(&metadata, WAIT).unwrap();
    assert_eq!(first.lane().lane, Lane::Loopback);
    let tcp = ConnectOptions::within(WAIT).with_lanes([Lane::Tcp]);
    let second = a.connect_with(&metadata, &tcp).unwrap();
    assert_eq!(second.lane().lane, Lane::Tcp);
    assert!(first.lost().is_some() && second.is_connected());
    // Without a wish the living connection is as good as any.
    let third = a.connect(&metadata, WAIT).unwrap();
    assert_eq!(third.lane().lane, Lane::Tcp);
    assert_eq!(a.peers().len(), 1);
    let none = ConnectOptions::within(WAIT).with_lanes([]);
    assert!(matches!(
        a.connect_with(&metadata, &none),
        Err(ConnectError::NoLane { tried, .. }) if tried.is_empty()
    ));
}

#[test]
fn the_address_book_is_bounded() {
    let setup = Setup::new(Lane::Loopback);
    let mut config = setup.config("a");
    config.peers_max = 1;
    let a = Agent::new(config).unwrap();
    let (b, c) = (
        Agent::new(setup.config("b")).unwrap(),
        Agent::new(setup.config("c")).unwrap(),
    );
    a.remember(&b.metadata(), ConnectOptions::default())
        .unwrap();
    let full = a.remember(&c.metadata(), ConnectOptions::default());
    assert_eq!(full.err(), Some(ConnectError::TooMany { limit: 1 }));
    a.remember(&b.metadata(), ConnectOptions::default())
        .unwrap();
    assert!(a.peer("c").is_none());
}

//! The conformance suite, third part: agents that meet, all at once or one after the other.

use std::sync::{Arc, Barrier};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use blockplane_transfer::{
    Agent, ConnectError, ConnectOptions, LossCause, Op, PostError, PostOptions, WindowAccess,
    WindowScope,
};

use crate::support::{Blocks, Setup, WAIT, arena, bytes, fill_byte};

/// Both sides connect at the same moment, each from several threads.
pub(crate) fn both_connect_at_once(setup: &Setup) {
    const ROUNDS: u8 = 40;
    const THREADS: usize = 2;
    for round in 0..ROUNDS {
        let agents = ["a", "b"].map(|name| Agent::new(setup.config(name)).unwrap());
        let regions = [0, 1].map(|side| arena(&agents[side], 4096));
        let metadata = [0, 1].map(|side: usize| agents[side].metadata());
        let start = Barrier::new(2 * THREADS);
        std::thread::scope(|scope| {
            for side in 0..2 {
                for _ in 0..THREADS {
                    let (agents, regions, metadata, start) = (&agents, &regions, &metadata, &start);
                    scope.spawn(move || {
                        let (me, other) = (&agents[side], 1 - side);
                        let own = arena(me, 4096);
                        fill_byte(&own, round + 1);
                        start.wait();
                        let peer = me.connect(&metadata[other], WAIT).unwrap();
                        let block = Blocks::flat(1, 4096, &[0]);
                        let prepared = me
                            .prepare(
                                Op::Write,
                                block.local(&own),
                                block.remote(&peer, regions[other].id(), None),
                            )
                            .unwrap();
                        let options = PostOptions::within(WAIT).notify("met");
                        prepared.post(options).unwrap().wait(WAIT).unwrap();
                    });
                }
            }
        });
        for (agent, region) in agents.iter().zip(&regions) {
            for _ in 0..THREADS {
                let note = agent.notifications().recv_timeout(WAIT).unwrap();
                assert_eq!(note.payload, "met");
            }
            assert_eq!(agent.notifications().try_recv(), Ok(None));
            assert!(bytes(region).iter().all(|byte| *byte == round + 1));
            assert_eq!(agent.stats().peers, 1, "one connection in each direction");
        }
    }
}

/// Peers that are gone leave room for others, whatever they were called.
pub(crate) fn the_lost_do_not_count_as_peers(setup: &Setup) {
    let mut config = setup.config("hub");
    config.peers_max = 2;
    let hub = Agent::new(config).unwrap();
    let other = |name: &str| Agent::new(setup.config(name)).unwrap();
    for round in 0..6 {
        let guest = other(&format!("guest {round}"));
        let peer = hub.connect(&guest.metadata(), WAIT).unwrap();
        drop(guest);
        let started = Instant::now();
        while peer.is_connected() {
            assert!(started.elapsed() < WAIT, "the loss goes unnoticed");
            std::thread::yield_now();
        }
        assert!(matches!(
            hub.notify(&peer, "x", WAIT),
            Err(PostError::PeerLost(lost)) if lost.cause != LossCause::Disconnected
        ));
    }
    let stay = ["x", "y", "z"].map(other);
    for guest in &stay[..2] {
        hub.connect(&guest.metadata(), WAIT).unwrap();
    }
    let refused = hub.connect(&stay[2].metadata(), Duration::from_secs(1));
    assert!(
        matches!(refused, Err(ConnectError::TooMany { limit: 2 })),
        "{refused:?}"
    );
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Nobody has to look for losses: who asked is woken.
pub(crate) fn a_loss_wakes_who_waits_for_it(setup: &Setup) {
    let agents = ["hub", "guest"].map(|name| Agent::new(setup.config(name)).unwrap());
    let [hub, guest] = agents;
    let peer = hub.connect(&guest.metadata(), WAIT).unwrap();
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let context = Context::from_waker(&waker);
    for _ in 0..3 {
        assert_eq!(peer.poll_lost(&context), Poll::Pending);
    }
    let (started, other) = (Instant::now(), std::thread::spawn(move || drop(guest)));
    let lost = loop {
        match peer.poll_lost(&context) {
            Poll::Ready(lost) => break lost,
            // Far beyond the limit of the test: only a wake-up ends it in time.
            Poll::Pending => std::thread::park_timeout(WAIT * 10),
        }
    };
    assert!(started.elapsed() < WAIT, "{:?}", started.elapsed());
    assert_eq!(lost, peer.lost());
    assert!(lost.is_some_and(|lost| lost.cause != LossCause::Disconnected));
    other.join().unwrap();
    let stranger = Agent::new(setup.config("stranger")).unwrap().metadata();
    let unmet = hub.remember(&stranger, ConnectOptions::within(WAIT));
    assert_eq!(unmet.unwrap().poll_lost(&context), Poll::Ready(None));
}

/// A connection takes its windows along; what is said is that the peer is lost, which reconnecting
/// mends, and not that the window is closed, which nothing does.
pub(crate) fn a_lost_peer_is_named_before_its_windows(setup: &Setup) {
    let pair = setup.pair();
    let (local, remote) = (arena(&pair.a, 4096), arena(&pair.b, 4096));
    let window = pair
        .b
        .open_window(&remote, WindowScope::Region, WindowAccess::ReadWrite)
        .unwrap();
    let block = Blocks::flat(1, 4096, &[0]);
    let sides = ((&local, &block), (&remote, &block));
    let prepared = pair
        .prepare(Op::Write, sides.0, sides.1, Some(window.id()))
        .unwrap();
    pair.peer.disconnect();
    match prepared.post(PostOptions::within(WAIT)) {
        Err(error @ PostError::PeerLost(_)) => assert!(error.retryable()),
        other => panic!("{other:?}"),
    }
}

//! A peer that says what it likes.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use blockplane_protocol::{BlockHash, DType, DpRank, KvLayout, SequenceHash, TokenBlock};
use blockplane_transfer::{Agent, AgentConfig, Peer, Window, WindowAccess, WindowId, WindowScope};

use super::{
    PeerParts, PeerTier, PeerTierConfig,
    codec::{Hello, Lease, Lent, Message, Part},
};
use crate::{
    arena::KvArena,
    fingerprint::Fingerprint,
    tier::{BlockOutcome, Invalid, MoveId, MoveKind, MoveSpec, MovedBlock, Mover, RemoteIndex},
};

const TIME: Duration = Duration::from_millis(400);
const SOON: Duration = Duration::from_secs(10);

struct Liar {
    agent: Agent,
    arena: Arc<KvArena>,
    to: Peer,
    window: Window,
    told: u64,
}

impl Liar {
    fn say(&self, message: &Message) {
        let sent = self.agent.notify(&self.to, message.encode(), SOON);
        sent.unwrap().wait(SOON).unwrap();
    }

    fn hello(&self, fingerprint: Fingerprint) -> Message {
        let metadata = self.agent.metadata_of(&[self.arena.registration()]);
        Message::Hello(Hello {
            epoch: self.agent.epoch(),
            answer: false,
            fingerprint,
            region: self.arena.registration().id(),
            layout: self.arena.transfer_layout(),
            address: metadata.unwrap().to_bytes(),
        })
    }

    /// Says that it has these.
    fn tell(&mut self, names: &[TokenBlock]) {
        self.told += 1;
        self.say(&Message::Announce(Part {
            before: None,
            last: self.told,
            part: 0,
            parts: 1,
            stored: names.iter().map(|name| name.sequence).collect(),
            removed: Vec::new(),
        }));
    }

    /// The number of the next request.
    fn asked(&self) -> u64 {
        let until = Instant::now() + SOON;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let next = self.agent.notifications().recv_timeout(left).unwrap();
            if let Some(Message::Ask { id, .. }) = Message::decode(&next.payload) {
                return id;
            }
        }
    }
}

#[test]
fn a_peer_that_lies_costs_a_miss() {
    let layout = KvLayout::dense(2, 2, 8, 4, DType::F16);
    let fingerprint = Fingerprint::of(1, &layout, 0, 1);
    let honest = Agent::new(AgentConfig::new("honest")).unwrap();
    let host = KvArena::allocate(&honest, layout.clone(), 8, "g2").unwrap();
    let parts = PeerParts {
        control: honest.clone(),
        agent: honest.clone(),
        host,
        fingerprint,
    };
    let tier = PeerTier::start(parts, PeerTierConfig::default()).unwrap();
    let agent = Agent::new(AgentConfig::new("liar")).unwrap();
    let arena = KvArena::allocate(&agent, layout, 8, "g2").unwrap();
    let (scope, access) = (WindowScope::Region, WindowAccess::Read);
    let window = agent.open_window(arena.registration(), scope, access);
    let mut liar = Liar {
        to: agent.connect(&honest.metadata(), SOON).unwrap(),
        window: window.unwrap(),
        agent,
        arena,
        told: 0,
    };
    let name = |number| TokenBlock {
        block: BlockHash(number),
        sequence: SequenceHash(number),
    };
    let names = [name(1), name(2)];
    // What it says before it is a peer, or before it has said who it is, is not heard.
    liar.tell(&names);
    liar.say(&liar.hello(fingerprint));
    let ignored = |count| {
        let until = Instant::now() + SOON;
        while tier.stats().ignored < count {
            assert!(Instant::now() < until, "{:?}", tier.stats());
            std::thread::park_timeout(Duration::from_millis(1));
        }
    };
    ignored(2);
    tier.add_peer(&liar.agent.metadata()).unwrap();
    liar.tell(&names);
    liar.say(&Message::Release { id: 1 });
    ignored(4);
    liar.say(&liar.hello(fingerprint));
    let noise = liar.agent.notify(&liar.to, &b"BPKP\x01\x09noise"[..], SOON);
    noise.unwrap().wait(SOON).unwrap();
    let lent = |block| {
        Some(Lent {
            block,
            checksum: 0xbad,
        })
    };
    let own = liar.window.id();
    let wrong = BlockOutcome::Invalid(Invalid::Checksum);
    let failed = BlockOutcome::Failed(String::new());
    // Its lease (window, time, blocks; none for no answer), and what becomes of the blocks.
    let cases = [
        (Some((own, 9000, vec![lent(0), lent(7)])), [&wrong, &wrong]),
        (Some((own, 9000, vec![lent(0)])), [&failed, &failed]),
        (Some((own, 9000, vec![lent(0); 3])), [&failed, &failed]),
        (
            Some((own, 9000, vec![lent(0), lent(8)])),
            [&failed, &failed],
        ),
        (Some((own, 0, vec![lent(0), lent(1)])), [&failed, &failed]),
        (
            Some((WindowId(u64::MAX), 9000, vec![lent(0), lent(1)])),
            [&failed, &failed],
        ),
        (None, [&failed, &failed]),
        (
            Some((own, 9000, vec![lent(3), None])),
            [&wrong, &BlockOutcome::Invalid(Invalid::Missing)],
        ),
    ];
    for (number, (lie, expected)) in (1..).zip(cases) {
        // Requests of the case before were repeated.
        while liar.agent.notifications().try_recv().unwrap().is_some() {}
        liar.tell(&names);
        let until = Instant::now() + SOON;
        while !names.iter().all(|name| tier.contains(name.sequence)) {
            assert!(Instant::now() < until, "case {number}: it is not heard");
            std::thread::park_timeout(Duration::from_millis(1));
        }
        let blocks = names.iter().zip(2..).map(|(name, to)| MovedBlock {
            from: 0,
            to,
            name: *name,
            parent: None,
        });
        let spec = MoveSpec {
            id: MoveId(number),
            kind: MoveKind::RemoteToHost,
            rank: DpRank(0),
            blocks: blocks.collect(),
            time: TIME,
        };
        let (report, took) = std::thread::scope(|threads| {
            let read = threads.spawn(|| {
                let started = Instant::now();
                (tier.run(&spec), started.elapsed())
            });
            let id = liar.asked();
            if let Some((window, time_ms, blocks)) = lie {
                let lease = Message::Lease(Lease {
                    id,
                    window,
                    time_ms,
                    blocks,
                });
                // Twice: the second one must not end the first.
                liar.say(&lease);
                liar.say(&lease);
            }
            read.join().unwrap()
        });
        assert!(took < TIME * 3, "case {number}: {took:?}");
        assert!(report.pending.is_none());
        for (outcome, expected) in report.outcomes.iter().zip(expected) {
            let same = match (outcome, expected) {
                (BlockOutcome::Failed(_), BlockOutcome::Failed(_)) => true,
                (outcome, expected) => outcome == expected,
            };
            assert!(same, "case {number}: {outcome:?}");
        }
    }
    let stats = tier.stats();
    assert_eq!((stats.read, stats.invalid, stats.missing), (0, 3, 1));
    assert_eq!(stats.ignored, 5);
    assert!(tier.core.asks.lock().is_empty(), "nothing is left behind");
}

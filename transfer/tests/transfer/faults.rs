//! The conformance suite, second half: refusals, ends and losses.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blockplane_transfer::{
    Agent, BlockLayout, CancelOutcome, ConnectError, FaultConfig, LayoutError, LossCause, Op,
    PostError, PostOptions, PrepareError, Rejection, RemoteAccess, Side, TransferError,
    WindowAccess, WindowScope,
};

use crate::suite::{every_size_arrives_whole, notifications_follow_their_bytes_in_order};
use crate::support::{
    Blocks, Setup, WAIT, arena, arena_with, bytes, fill, fill_byte, oracle, scattered,
};

pub(crate) fn a_transfer_ends_at_its_deadline(setup: &Setup) {
    let faults = FaultConfig {
        loss: 1.0,
        ..FaultConfig::seeded(1)
    };
    let pair = Setup {
        faults: Some(faults),
        ..setup.clone()
    }
    .pair();
    let (local, remote) = (arena(&pair.a, 4096), arena(&pair.b, 4096));
    let side = Blocks::flat(1, 4096, &[0]);
    let prepared = pair
        .prepare(Op::Write, (&local, &side), (&remote, &side), None)
        .unwrap();
    let deadline = Duration::from_millis(30);
    let lost = prepared
        .post(PostOptions::within(deadline).notify("never"))
        .unwrap();
    assert_eq!(
        lost.wait(Duration::from_millis(1)),
        Err(TransferError::StillInFlight {
            waited: Duration::from_millis(1)
        })
    );
    assert_eq!(
        lost.wait(WAIT),
        Err(TransferError::DeadlineExceeded { deadline })
    );
    // A notification behind the lost operation does not wait for it any longer.
    pair.a
        .notify(&pair.peer, "next", WAIT)
        .unwrap()
        .wait(WAIT)
        .unwrap();
    assert_eq!(
        pair.b.notifications().recv_timeout(WAIT).unwrap().payload,
        "next"
    );
    assert_eq!(pair.a.stats().transfers_late, 1);
}

pub(crate) fn cancelled_bytes_never_land_later(setup: &Setup) {
    let pair = setup.pair();
    let block = 1 << 16;
    let blocks = 128;
    let (local, remote) = (arena(&pair.a, block * 128), arena(&pair.b, block * 128));
    let (mut completed, mut cancelled) = (0, 0);
    for round in 0..40u64 {
        let op = if round % 2 == 0 { Op::Write } else { Op::Read };
        let l = Blocks {
            ids: scattered(blocks, 120, round),
            ..Blocks::flat(blocks, block, &[])
        };
        let r = Blocks {
            ids: scattered(blocks, 120, round + 99),
            ..l.clone()
        };
        fill_byte(&local, 0xaa);
        fill_byte(&remote, 0xbb);
        let prepared = pair.prepare(op, (&local, &l), (&remote, &r), None).unwrap();
        let transfer = prepared.post(PostOptions::within(WAIT)).unwrap();
        // Let some of it happen: a different amount each time.
        let spin = Instant::now();
        while spin.elapsed() < Duration::from_micros(round * 30) {
            std::hint::spin_loop();
        }
        match transfer.cancel() {
            CancelOutcome::Completed => completed += 1,
            CancelOutcome::Cancelled => cancelled += 1,
            CancelOutcome::Failed(error) => panic!("{error}"),
        }
        // Both buffers are ours again: canaries must survive whatever is still in a socket.
        fill_byte(&local, 0x11);
        fill_byte(&remote, 0x22);
        let probe = Blocks::flat(1, 1, &[0]);
        let tail = pair
            .prepare(Op::Write, (&local, &probe), (&remote, &probe), None)
            .unwrap();
        for _ in 0..4 {
            tail.post(PostOptions::within(WAIT).notify("probe"))
                .unwrap()
                .wait(WAIT)
                .unwrap();
            pair.b.notifications().recv_timeout(WAIT).unwrap();
        }
        assert!(
            bytes(&local).iter().all(|b| *b == 0x11),
            "a late byte landed locally"
        );
        assert!(
            bytes(&remote)[1..].iter().all(|b| *b == 0x22),
            "a late byte landed remotely"
        );
    }
    assert_eq!(completed + cancelled, 40);
    assert!(cancelled > 0, "no cancel came in time to prove anything");
}

pub(crate) fn a_dropped_transfer_is_cancelled_and_keeps_its_memory(setup: &Setup) {
    let pair = setup.pair();
    for _ in 0..20 {
        let (local, remote) = (arena(&pair.a, 1 << 20), arena(&pair.b, 1 << 20));
        let side = Blocks::flat(16, 1 << 16, &scattered(16, 16, 3));
        let prepared = pair
            .prepare(Op::Write, (&local, &side), (&remote, &side), None)
            .unwrap();
        let transfer = prepared.post(PostOptions::within(WAIT)).unwrap();
        drop((transfer, prepared, local, remote));
    }
    let started = Instant::now();
    while pair.a.stats().in_flight > 0 {
        assert!(started.elapsed() < WAIT, "dropped transfers stay in flight");
        std::thread::yield_now();
    }
}

pub(crate) fn windows_open_and_close(setup: &Setup) {
    let pair = setup.pair();
    let block = 1000;
    let local = arena(&pair.a, block * 32);
    let remote = arena_with(&pair.b, block * 32, RemoteAccess::WindowOnly);
    let side = |ids: &[u32]| Blocks::flat(32, block, ids);
    let prepare = |op, ids: &[u32], window| {
        pair.prepare(op, (&local, &side(ids)), (&remote, &side(ids)), window)
    };
    assert!(matches!(
        prepare(Op::Write, &[1], None),
        Err(PrepareError::WindowRequired { .. })
    ));
    let layout = BlockLayout::contiguous(32, block);
    let scope = WindowScope::Blocks {
        layout,
        ids: vec![3, 4, 9, 17],
    };
    let window = pair
        .b
        .open_window(&remote, scope, WindowAccess::Write)
        .unwrap();
    let id = window.id();
    fill(&local, 1);
    fill_byte(&remote, 0);
    let good = prepare(Op::Write, &[9, 3], Some(id)).unwrap();
    good.post(PostOptions::within(WAIT))
        .unwrap()
        .wait(WAIT)
        .unwrap();
    let mut expected = vec![0; remote.len()];
    oracle(
        &bytes(&local),
        &side(&[9, 3]),
        &mut expected,
        &side(&[9, 3]),
    );
    assert_eq!(bytes(&remote), expected);
    for (op, ids) in [(Op::Write, [3, 5]), (Op::Read, [3, 4])] {
        let refused = prepare(op, &ids, Some(id));
        assert!(
            matches!(refused, Err(PrepareError::OutsideWindow { .. })),
            "{refused:?}"
        );
    }
    window.close(WAIT).unwrap();
    let late = good.post(PostOptions::within(WAIT));
    match late {
        Err(PostError::WindowClosed { window }) => assert_eq!(window, id),
        Err(other) => panic!("{other}"),
        // Where closing does not wait for the initiator, it may learn from the answer.
        Ok(transfer) => {
            assert_eq!(
                transfer.wait(WAIT),
                Err(TransferError::WindowClosed { window: id })
            );
        }
    }
    // At the latest now it knows: the news travels in order with notifications.
    pair.a
        .notify(&pair.peer, "sync", WAIT)
        .unwrap()
        .wait(WAIT)
        .unwrap();
    let refused = prepare(Op::Write, &[3], Some(id));
    assert!(
        matches!(refused, Err(PrepareError::WindowClosed { .. })),
        "{refused:?}"
    );
    assert!(matches!(
        good.post(PostOptions::within(WAIT)),
        Err(PostError::WindowClosed { .. })
    ));
    assert_eq!(bytes(&remote), expected);
}

pub(crate) fn nothing_lands_behind_a_closed_window(setup: &Setup) {
    let pair = setup.pair();
    let block = 1 << 16;
    let local = arena(&pair.a, block * 64);
    let remote = arena_with(&pair.b, block * 64, RemoteAccess::WindowOnly);
    fill_byte(&local, 0xee);
    let side = Blocks {
        ids: scattered(64, 64, 7),
        ..Blocks::flat(64, block, &[])
    };
    for round in 0..12u64 {
        let window = pair
            .b
            .open_window(&remote, WindowScope::Region, WindowAccess::ReadWrite)
            .unwrap();
        let id = window.id();
        let prepared = pair
            .prepare(Op::Write, (&local, &side), (&remote, &side), Some(id))
            .unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut errors = Vec::new();
                while !stop.load(Ordering::Acquire) {
                    match prepared.post(PostOptions::within(WAIT)) {
                        Ok(transfer) => errors.extend(transfer.wait(WAIT).err()),
                        Err(PostError::WindowClosed { .. }) => {
                            errors.push(TransferError::WindowClosed { window: id });
                        }
                        Err(error) => panic!("{error}"),
                    }
                    if !errors.is_empty() {
                        break;
                    }
                }
                errors
            });
            let spin = Instant::now();
            while spin.elapsed() < Duration::from_micros(300 * round) {
                std::hint::spin_loop();
            }
            window.close(WAIT).unwrap();
            // The blocks have another owner now.
            fill_byte(&remote, 0x33);
            let errors = writer.join().unwrap();
            stop.store(true, Ordering::Release);
            assert_eq!(errors, [TransferError::WindowClosed { window: id }]);
        });
        pair.a
            .notify(&pair.peer, "behind it", WAIT)
            .unwrap()
            .wait(WAIT)
            .unwrap();
        pair.b.notifications().recv_timeout(WAIT).unwrap();
        assert!(
            bytes(&remote).iter().all(|b| *b == 0x33),
            "a byte landed behind the window"
        );
    }
}

pub(crate) fn bad_requests_are_named(setup: &Setup) {
    let pair = setup.pair();
    let (local, remote) = (arena(&pair.a, 8000), arena(&pair.b, 8000));
    let hidden = arena_with(&pair.b, 8000, RemoteAccess::None);
    let good = Blocks::flat(8, 1000, &[0, 1]);
    let attempt = |l: &Blocks, r: &Blocks| {
        pair.prepare(Op::Write, (&local, l), (&remote, r), None)
            .map(|_| ())
    };
    assert_eq!(attempt(&good, &good), Ok(()));
    assert_eq!(
        attempt(&good, &Blocks::flat(8, 1000, &[0, 8])),
        Err(PrepareError::Layout {
            side: Side::Remote,
            source: LayoutError::BlockId { id: 8, blocks: 8 }
        })
    );
    assert_eq!(
        attempt(&Blocks::flat(9, 1000, &[0, 1]), &good),
        Err(PrepareError::Layout {
            side: Side::Local,
            source: LayoutError::OutOfRegion {
                end: 9000,
                region_bytes: 8000
            }
        })
    );
    assert!(matches!(
        attempt(
            &Blocks {
                layers: 0..2,
                ..good.clone()
            },
            &Blocks {
                layers: 0..2,
                ..good.clone()
            }
        ),
        Err(PrepareError::Layout {
            source: LayoutError::Layers { .. },
            ..
        })
    ));
    assert!(matches!(
        attempt(&good, &Blocks::flat(8, 1000, &[0, 1, 2])),
        Err(PrepareError::Mismatch {
            local: 2,
            remote: 3,
            ..
        })
    ));
    assert!(matches!(
        attempt(&good, &Blocks::flat(8, 999, &[0, 1])),
        Err(PrepareError::Mismatch {
            local: 1000,
            remote: 999,
            ..
        })
    ));
    assert_eq!(
        attempt(&good, &Blocks::flat(8, 1000, &[5, 5])),
        Err(PrepareError::Overlap { offset: 5000 })
    );
    assert_eq!(
        attempt(&Blocks::flat(8, 1000, &[]), &Blocks::flat(8, 1000, &[])),
        Err(PrepareError::Empty)
    );
    assert!(matches!(
        pair.prepare(Op::Write, (&local, &good), (&hidden, &good), None),
        Err(PrepareError::AccessDenied { .. })
    ));
    // A region of `a` that `b` does not have.
    let unknown = pair.prepare(Op::Write, (&local, &good), (&local, &good), None);
    assert!(
        matches!(unknown, Err(PrepareError::UnknownRegion { .. })),
        "{unknown:?}"
    );
    let foreign = pair.prepare(Op::Write, (&remote, &good), (&remote, &good), None);
    assert!(
        matches!(foreign, Err(PrepareError::ForeignRegistration { .. })),
        "{foreign:?}"
    );
    let too_long = vec![0; pair.a_notification_max() + 1];
    assert!(matches!(
        pair.a.notify(&pair.peer, too_long, WAIT),
        Err(PostError::NotificationTooLarge { .. })
    ));
}

impl crate::support::Pair {
    fn a_notification_max(&self) -> usize {
        blockplane_transfer::AgentConfig::new("x").notification_bytes_max
    }
}

pub(crate) fn a_released_region_is_refused(setup: &Setup) {
    let pair = setup.pair();
    let (local, remote) = (arena(&pair.a, 8000), arena(&pair.b, 8000));
    let side = Blocks::flat(8, 1000, &[0, 1]);
    let prepared = pair
        .prepare(Op::Write, (&local, &side), (&remote, &side), None)
        .unwrap();
    prepared
        .post(PostOptions::within(WAIT))
        .unwrap()
        .wait(WAIT)
        .unwrap();
    let gone = remote.id();
    drop(remote);
    // The news travels in order with the answers to questions.
    let other = arena(&pair.b, 8000);
    pair.prepare(Op::Write, (&local, &side), (&other, &side), None)
        .unwrap();
    match prepared.post(PostOptions::within(WAIT)) {
        Err(PostError::RegionReleased { region }) => assert_eq!(region, gone),
        other => panic!("{other:?}"),
    }
    assert!(
        !pair
            .b
            .metadata()
            .regions()
            .iter()
            .any(|region| region.id == gone)
    );
}

pub(crate) fn losing_the_peer_ends_everything(setup: &Setup) {
    let pair = setup.pair();
    let (local, remote) = (arena(&pair.a, 1 << 22), arena(&pair.b, 1 << 22));
    let side = Blocks {
        ids: scattered(64, 64, 1),
        ..Blocks::flat(64, 1 << 16, &[])
    };
    let prepared = pair
        .prepare(Op::Write, (&local, &side), (&remote, &side), None)
        .unwrap();
    let in_flight: Vec<_> = (0..50)
        .map(|_| {
            prepared
                .post(PostOptions::within(WAIT).notify("x"))
                .unwrap()
        })
        .collect();
    let b = pair.b.clone();
    drop((pair.b, b));
    for transfer in in_flight {
        match transfer.wait(WAIT) {
            Ok(()) | Err(TransferError::PeerLost(_)) => {}
            // The peer answered in its last moment.
            Err(TransferError::Rejected(Rejection::Stopping | Rejection::UnknownRegion)) => {}
            Err(error) => panic!("{error}"),
        }
    }
    let started = Instant::now();
    while pair.peer.is_connected() {
        assert!(started.elapsed() < WAIT, "the loss goes unnoticed");
        std::thread::yield_now();
    }
    assert!(matches!(
        prepared.post(PostOptions::within(WAIT)),
        Err(PostError::PeerLost(_) | PostError::RegionReleased { .. })
    ));
    assert!(matches!(
        pair.a.notify(&pair.peer, "x", WAIT),
        Err(PostError::PeerLost(_))
    ));
    let lost = pair.peer.lost().unwrap();
    assert_eq!(lost.peer, "b");
    assert!(
        matches!(lost.cause, LossCause::Closed | LossCause::Broken(_)),
        "{lost}"
    );
}

pub(crate) fn a_new_life_of_a_peer_replaces_the_old_one(setup: &Setup) {
    let pair = setup.pair();
    assert_eq!(
        pair.a.connect(&pair.b.metadata(), WAIT).unwrap().epoch(),
        pair.peer.epoch(),
        "connecting twice is one connection"
    );
    let old = pair.b.metadata();
    let again = Agent::new(setup.config("b")).unwrap();
    let peer = pair.a.connect(&again.metadata(), WAIT).unwrap();
    assert_ne!(peer.epoch(), pair.peer.epoch());
    assert!(matches!(
        pair.a.notify(&pair.peer, "x", WAIT),
        Err(PostError::PeerLost(lost)) if lost.cause == LossCause::Replaced(peer.epoch())
    ));
    pair.a
        .notify(&peer, "to the new one", WAIT)
        .unwrap()
        .wait(WAIT)
        .unwrap();
    assert_eq!(
        again.notifications().recv_timeout(WAIT).unwrap().payload,
        "to the new one"
    );
    drop(pair.b);
    let gone = pair.a.connect(&old, Duration::from_millis(500));
    assert!(
        matches!(
            gone,
            Err(ConnectError::NoLane { .. } | ConnectError::Stale { .. })
        ),
        "{gone:?}"
    );
}

pub(crate) fn full_queues_push_back(setup: &Setup) {
    let pair = setup.pair_with(|config| {
        config.notifications_max = 3;
        config.posts_max = 8;
    });
    for _ in 0..3 {
        pair.a
            .notify(&pair.peer, "x", WAIT)
            .unwrap()
            .wait(WAIT)
            .unwrap();
    }
    let refused = pair
        .a
        .notify(&pair.peer, "x", WAIT)
        .unwrap()
        .wait(WAIT)
        .unwrap_err();
    assert_eq!(
        refused,
        TransferError::Rejected(Rejection::NotificationQueueFull)
    );
    assert!(refused.retryable());
    pair.b.notifications().recv_timeout(WAIT).unwrap();
    pair.a
        .notify(&pair.peer, "x", WAIT)
        .unwrap()
        .wait(WAIT)
        .unwrap();
    assert_eq!(pair.b.stats().notifications_refused, 1);

    let faults = FaultConfig {
        loss: 1.0,
        ..FaultConfig::seeded(1)
    };
    let stuck = Setup {
        faults: Some(faults),
        ..setup.clone()
    }
    .pair_with(|c| c.posts_max = 8);
    let (local, remote) = (arena(&stuck.a, 1000), arena(&stuck.b, 1000));
    let side = Blocks::flat(1, 1000, &[0]);
    let prepared = stuck
        .prepare(Op::Write, (&local, &side), (&remote, &side), None)
        .unwrap();
    let held: Vec<_> = (0..8)
        .map(|_| prepared.post(PostOptions::within(WAIT)).unwrap())
        .collect();
    assert!(matches!(
        prepared.post(PostOptions::within(WAIT)),
        Err(PostError::TooManyInFlight { limit: 8 })
    ));
    drop(held);
    prepared.post(PostOptions::within(WAIT)).unwrap().detach();
}

pub(crate) fn delays_reorder_transfers_but_not_notifications(setup: &Setup) {
    let faults = FaultConfig {
        delay: 0.5,
        delay_max: Duration::from_millis(3),
        ..FaultConfig::seeded(42)
    };
    let setup = Setup {
        faults: Some(faults),
        ..setup.clone()
    };
    notifications_follow_their_bytes_in_order(&setup);
    every_size_arrives_whole(&setup);
}

pub(crate) fn an_injected_disconnect_is_a_lost_peer(setup: &Setup) {
    let faults = FaultConfig {
        disconnect: 0.2,
        ..FaultConfig::seeded(7)
    };
    let pair = Setup {
        faults: Some(faults),
        ..setup.clone()
    }
    .pair();
    let (local, remote) = (arena(&pair.a, 64_000), arena(&pair.b, 64_000));
    let side = Blocks {
        ids: scattered(64, 64, 1),
        ..Blocks::flat(64, 1000, &[])
    };
    let prepared = pair
        .prepare(Op::Write, (&local, &side), (&remote, &side), None)
        .unwrap();
    let cause = loop {
        match prepared
            .post(PostOptions::within(WAIT))
            .map(|transfer| transfer.wait(WAIT))
        {
            Ok(Ok(())) => {}
            Ok(Err(TransferError::PeerLost(lost))) | Err(PostError::PeerLost(lost)) => {
                break lost.cause;
            }
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(cause, LossCause::Injected);
    // The peer itself is well: a new connection works.
    let again = pair.a.connect(&pair.b.metadata(), WAIT).unwrap();
    pair.a
        .notify(&again, "again", WAIT)
        .unwrap()
        .wait(WAIT)
        .unwrap();
}

//! The conformance suite: what every lane does, whatever it is made of.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blockplane_transfer::{
    Agent, BlockLayout, CancelOutcome, ConnectError, Descriptor, FaultConfig, LayoutError,
    LossCause, Op, PostError, PostOptions, PrepareError, Rejection, RemoteAccess, RemoteDescriptor,
    Side, TransferError, TransferStatus, WindowAccess, WindowScope,
};

use crate::support::{
    Blocks, Setup, WAIT, arena, arena_with, block_on, bytes, fill, fill_byte, oracle, scattered,
};

pub(crate) fn every_size_arrives_whole(setup: &Setup) {
    let pair = setup.pair();
    for (block_bytes, blocks) in [
        (1, 9),
        (7, 33),
        (64, 40),
        (4096, 24),
        (65536, 9),
        (300_007, 5),
    ] {
        let local = arena(&pair.a, block_bytes * u64::from(blocks));
        let remote = arena(&pair.b, block_bytes * u64::from(blocks));
        let contiguous: Vec<u32> = (1..blocks - 1).collect();
        let count = blocks - 2;
        for (from, to) in [
            (scattered(blocks, count, 1), scattered(blocks, count, 2)),
            (contiguous.as_slice().into(), scattered(blocks, count, 3)),
            (contiguous.as_slice().into(), contiguous.as_slice().into()),
        ] {
            let l = Blocks {
                ids: from,
                ..Blocks::flat(blocks, block_bytes, &[])
            };
            let r = Blocks {
                ids: to,
                ..Blocks::flat(blocks, block_bytes, &[])
            };
            for op in [Op::Write, Op::Read] {
                pair.check(op, (&local, &l), (&remote, &r));
            }
        }
    }
}

pub(crate) fn layouts_and_layer_ranges_pair_up(setup: &Setup) {
    let pair = setup.pair();
    let (blocks, layers, run) = (11, 5, 1000);
    let block_first = BlockLayout {
        offset: 0,
        blocks,
        block_stride: run * u64::from(layers),
        layers,
        layer_stride: run,
        run_bytes: run,
    };
    let layer_first = BlockLayout {
        offset: 128,
        blocks,
        block_stride: run,
        layers,
        layer_stride: run * u64::from(blocks) + 64,
        run_bytes: run,
    };
    let padded = BlockLayout {
        block_stride: 6000,
        layer_stride: 1024,
        offset: 32,
        ..block_first
    };
    let region = 80_000;
    let (local, remote) = (arena(&pair.a, region), arena(&pair.b, region));
    let layouts = [block_first, layer_first, padded];
    for (i, from) in layouts.into_iter().enumerate() {
        for (k, to) in layouts.into_iter().enumerate() {
            for (mine, theirs) in [(0..5, 0..5), (1..3, 3..5), (4..5, 0..1)] {
                let seed = (i * 3 + k) as u64;
                let l = Blocks {
                    layout: from,
                    ids: scattered(blocks, 7, seed),
                    layers: mine,
                };
                let r = Blocks {
                    layout: to,
                    ids: scattered(blocks, 7, seed + 50),
                    layers: theirs,
                };
                for op in [Op::Write, Op::Read] {
                    pair.check(op, (&local, &l), (&remote, &r));
                }
            }
        }
    }
}

pub(crate) fn ordinary_memory_works_on_both_sides(setup: &Setup) {
    let pair = setup.pair();
    let bytes = 40 * 5000;
    let mine = pair.a.register(vec![0; bytes], RemoteAccess::None).unwrap();
    let theirs = pair.b.register(vec![0; bytes], RemoteAccess::Open).unwrap();
    let arena_b = arena(&pair.b, bytes as u64);
    let l = Blocks {
        ids: scattered(40, 30, 1),
        ..Blocks::flat(40, 5000, &[])
    };
    let r = Blocks {
        ids: scattered(40, 30, 2),
        ..Blocks::flat(40, 5000, &[])
    };
    for op in [Op::Write, Op::Read] {
        pair.check(op, (&mine, &l), (&theirs, &r));
        pair.check(op, (&mine, &l), (&arena_b, &r));
    }
}

pub(crate) fn descriptor_lists_of_any_shape(setup: &Setup) {
    let pair = setup.pair();
    let mine = [arena(&pair.a, 50_000), arena(&pair.a, 50_000)];
    let theirs = [arena(&pair.b, 50_000), arena(&pair.b, 50_000)];
    type Piece = (usize, u64, usize, u64, u64);
    let regular: Vec<Piece> = (0..20)
        .map(|i| (0, i * 1024, 1, (19 - i) * 1500, 1000))
        .collect();
    let contiguous: Vec<Piece> = (0..20)
        .map(|i| (0, i * 1024, 0, 17 + i * 1024, 1024))
        .collect();
    let ragged: Vec<Piece> = vec![
        (0, 3, 1, 777, 1),
        (1, 100, 0, 40_000, 9_000),
        (0, 4, 1, 778, 5),
        (0, 20_000, 1, 13, 600),
        (0, 21_001, 1, 1_013, 600),
    ];
    for (list, sets) in [(regular, 1), (contiguous, 1), (ragged, 4)] {
        for op in [Op::Write, Op::Read] {
            for (i, region) in mine.iter().chain(&theirs).enumerate() {
                fill(region, i as u64 * 1000);
            }
            let mut l: Vec<_> = mine.iter().map(bytes).collect();
            let mut r: Vec<_> = theirs.iter().map(bytes).collect();
            for &(a, x, b, y, len) in &list {
                let (x, y, len) = (x as usize, y as usize, len as usize);
                match op {
                    Op::Write => r[b][y..y + len].copy_from_slice(&l[a][x..x + len]),
                    Op::Read => l[a][x..x + len].copy_from_slice(&r[b][y..y + len]),
                }
            }
            let local: Vec<_> = list
                .iter()
                .map(|p| Descriptor {
                    registration: &mine[p.0],
                    offset: p.1,
                    bytes: p.4,
                })
                .collect();
            let remote: Vec<_> = list
                .iter()
                .map(|p| RemoteDescriptor {
                    region: theirs[p.2].id(),
                    offset: p.3,
                    window: None,
                })
                .collect();
            let prepared = pair
                .a
                .prepare_descriptors(op, &local, &pair.peer, &remote)
                .unwrap();
            assert_eq!(prepared.plan().sets, sets, "{list:?}");
            prepared
                .post(PostOptions::within(WAIT))
                .unwrap()
                .wait(WAIT)
                .unwrap();
            assert!(
                mine.iter().map(bytes).eq(l),
                "local bytes differ after {op:?}"
            );
            assert!(
                theirs.iter().map(bytes).eq(r),
                "remote bytes differ after {op:?}"
            );
        }
    }
}

pub(crate) fn notifications_follow_their_bytes_in_order(setup: &Setup) {
    let pair = setup.pair();
    let block = 20_000u64;
    let blocks = 64u32;
    let local = arena(&pair.a, block * u64::from(blocks));
    let remote = arena(&pair.b, block * u64::from(blocks));
    fill(&local, 5);
    fill_byte(&remote, 0);
    let mut transfers = Vec::new();
    // Large ones in front of small ones: those behind must wait for their turn.
    for i in 0..blocks {
        let count = if i % 4 == 0 { blocks - i } else { 1 };
        let ids: Vec<u32> = (i..i + count).collect();
        let side = Blocks::flat(blocks, block, &ids);
        let prepared = pair
            .prepare(Op::Write, (&local, &side), (&remote, &side), None)
            .unwrap();
        let options = PostOptions::within(WAIT).notify(vec![1, i as u8]);
        transfers.push(prepared.post(options).unwrap());
        transfers.push(pair.a.notify(&pair.peer, vec![2, i as u8], WAIT).unwrap());
    }
    let notifications = pair.b.notifications();
    let expected = bytes(&local);
    for i in 0..blocks {
        for kind in [1, 2] {
            let got = notifications.recv_timeout(WAIT).unwrap();
            assert_eq!(got.payload[..], [kind, i as u8], "out of order");
            assert_eq!((&*got.from, got.epoch), ("a", pair.a.epoch()));
        }
        let mut block_bytes = vec![0; block as usize];
        remote
            .read_at(u64::from(i) * block, &mut block_bytes)
            .unwrap();
        let at = i as usize * block as usize;
        assert!(
            block_bytes == expected[at..at + block as usize],
            "notified before its bytes"
        );
    }
    for transfer in transfers {
        transfer.wait(WAIT).unwrap();
    }
    assert_eq!(notifications.try_recv(), Ok(None));
}

pub(crate) fn transfers_and_notifications_can_be_awaited(setup: &Setup) {
    let pair = setup.pair();
    let (local, remote) = (arena(&pair.a, 100_000), arena(&pair.b, 100_000));
    let side = Blocks::flat(10, 10_000, &[1, 5, 9]);
    let prepared = pair
        .prepare(Op::Write, (&local, &side), (&remote, &side), None)
        .unwrap();
    let transfer = prepared
        .post(PostOptions::within(WAIT).notify("hello"))
        .unwrap();
    block_on(transfer).unwrap();
    let got = block_on(pair.b.notifications().recv()).unwrap();
    assert_eq!(got.payload, "hello");
}

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
    // The news travels in order with notifications.
    pair.a
        .notify(&pair.peer, "sync", WAIT)
        .unwrap()
        .wait(WAIT)
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

pub(crate) fn both_directions_and_the_agent_itself(setup: &Setup) {
    let pair = setup.pair();
    let back = pair.b.connect(&pair.a.metadata(), WAIT).unwrap();
    let own = pair.a.connect(&pair.a.metadata(), WAIT).unwrap();
    pair.b
        .notify(&back, "back", WAIT)
        .unwrap()
        .wait(WAIT)
        .unwrap();
    assert_eq!(
        pair.a.notifications().recv_timeout(WAIT).unwrap().payload,
        "back"
    );
    pair.a
        .notify(&own, "own", WAIT)
        .unwrap()
        .wait(WAIT)
        .unwrap();
    assert_eq!(
        pair.a.notifications().recv_timeout(WAIT).unwrap().payload,
        "own"
    );
    let region = arena(&pair.a, 10_000);
    let itself = crate::support::Pair {
        a: pair.a.clone(),
        b: pair.a,
        peer: own,
    };
    fill(&region, 1);
    let before = bytes(&region);
    let (from, to) = (
        Blocks::flat(10, 1000, &[1, 2]),
        Blocks::flat(10, 1000, &[7, 5]),
    );
    let prepared = itself
        .prepare(Op::Write, (&region, &from), (&region, &to), None)
        .unwrap();
    prepared
        .post(PostOptions::within(WAIT))
        .unwrap()
        .wait(WAIT)
        .unwrap();
    let mut expected = before.clone();
    oracle(&before, &from, &mut expected, &to);
    assert_eq!(bytes(&region), expected);
}

pub(crate) fn a_prepared_transfer_is_posted_again_and_again(setup: &Setup) {
    let pair = setup.pair();
    let (local, remote) = (arena(&pair.a, 64_000), arena(&pair.b, 64_000));
    let l = Blocks {
        ids: scattered(64, 32, 1),
        ..Blocks::flat(64, 1000, &[])
    };
    let r = Blocks {
        ids: scattered(64, 32, 2),
        ..l.clone()
    };
    let prepared = pair
        .prepare(Op::Write, (&local, &l), (&remote, &r), None)
        .unwrap();
    for round in 0..200 {
        fill(&local, round);
        prepared
            .post(PostOptions::within(WAIT))
            .unwrap()
            .wait(WAIT)
            .unwrap();
        let mut expected = bytes(&remote);
        oracle(&bytes(&local), &l, &mut expected, &r);
        assert_eq!(bytes(&remote), expected);
    }
    assert_eq!(pair.a.stats().transfers_done, 200);
}

pub(crate) fn thousands_of_posts_from_several_threads(setup: &Setup) {
    let pair = setup.pair();
    let (local, remote) = (arena(&pair.a, 256_000), arena(&pair.b, 256_000));
    fill(&local, 3);
    let count = 1500u32;
    let received = std::thread::scope(|scope| {
        for thread in 0..4u32 {
            let (pair, local, remote) = (&pair, &local, &remote);
            scope.spawn(move || {
                let mut transfers = Vec::new();
                for i in 0..count {
                    let id = thread * 64 + i % 64;
                    let side = Blocks::flat(256, 1000, &[id]);
                    let prepared = pair
                        .prepare(Op::Write, (local, &side), (remote, &side), None)
                        .unwrap();
                    let payload = [thread.to_le_bytes(), i.to_le_bytes()].concat();
                    let mut options = PostOptions::within(WAIT);
                    if i % 2 == 0 {
                        options = options.notify(payload);
                    }
                    transfers.push(prepared.post(options).unwrap());
                }
                for transfer in transfers {
                    transfer.wait(WAIT).unwrap();
                }
            });
        }
        let mut next = [0u32; 4];
        let notifications = pair.b.notifications();
        for _ in 0..4 * count / 2 {
            let got = notifications.recv_timeout(WAIT).unwrap().payload;
            let word = |at: usize| u32::from_le_bytes(got[at..at + 4].try_into().unwrap());
            let (thread, i) = (word(0) as usize, word(4));
            assert_eq!(i, next[thread], "out of order");
            next[thread] += 2;
        }
        next
    });
    assert_eq!(received, [count; 4]);
    assert_eq!(bytes(&remote), bytes(&local));
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

pub(crate) fn statuses_tell_the_truth(setup: &Setup) {
    let pair = setup.pair();
    let sent = pair.a.notify(&pair.peer, "x", WAIT).unwrap();
    sent.wait(WAIT).unwrap();
    assert_eq!(sent.status(), TransferStatus::Done);
    let stats = (pair.a.stats(), pair.b.stats());
    assert_eq!(
        (stats.0.transfers_done, stats.1.notifications_received),
        (1, 1)
    );
    assert_eq!((stats.0.peers, stats.0.in_flight), (1, 0));
    let metadata = pair.b.metadata();
    let same = blockplane_transfer::Metadata::from_bytes(&metadata.to_bytes()).unwrap();
    assert_eq!(same, metadata);
    let _: Arc<str> = Arc::from(metadata.name());
}

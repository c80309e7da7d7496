//! The conformance suite: what every lane does, whatever it is made of.

use blockplane_transfer::{
    Agent, BlockLayout, Descriptor, LocalBlocks, Op, PostOptions, PrepareError, RemoteAccess,
    RemoteBlocks, RemoteDescriptor, TransferStatus,
};

use crate::support::{
    Blocks, Setup, WAIT, arena, block_on, bytes, fill, fill_byte, oracle, scattered,
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

/// The caches of all layers are regions of their own: one operation moves the same blocks of all.
pub(crate) fn sets_of_several_regions_are_one_operation(setup: &Setup) {
    let pair = setup.pair();
    let (block, blocks) = (3_000u64, 40u32);
    let arenas = |agent: &Agent| -> Vec<_> {
        (0..5)
            .map(|_| arena(agent, block * u64::from(blocks)))
            .collect()
    };
    let (mine, theirs) = (arenas(&pair.a), arenas(&pair.b));
    let here: Vec<_> = (0..5)
        .map(|i| Blocks::flat(blocks, block, &scattered(blocks, 10, i)))
        .collect();
    let there: Vec<_> = (0..5)
        .map(|i| Blocks::flat(blocks, block, &scattered(blocks, 10, 100 + i)))
        .collect();
    for op in [Op::Write, Op::Read] {
        for (i, region) in mine.iter().chain(&theirs).enumerate() {
            fill(region, i as u64 * 1000 + 7);
        }
        let mut l: Vec<_> = mine.iter().map(bytes).collect();
        let mut r: Vec<_> = theirs.iter().map(bytes).collect();
        for i in 0..5 {
            match op {
                Op::Write => oracle(&l[i], &here[i], &mut r[4 - i], &there[i]),
                Op::Read => oracle(&r[4 - i], &there[i], &mut l[i], &here[i]),
            }
        }
        let sets = (0..5).map(|i| {
            let remote = there[i].remote(&pair.peer, theirs[4 - i].id(), None);
            (here[i].local(&mine[i]), remote)
        });
        let prepared = pair.a.prepare_sets(op, sets).unwrap();
        let plan = prepared.plan();
        assert_eq!((plan.sets, plan.runs, plan.bytes), (5, 50, 50 * block));
        let transfer = prepared.post(PostOptions::within(WAIT)).unwrap();
        transfer.wait(WAIT).unwrap();
        assert!(mine.iter().map(bytes).eq(l), "local bytes after {op:?}");
        assert!(theirs.iter().map(bytes).eq(r), "remote bytes after {op:?}");
    }
    // Wrong in one of them is wrong in all.
    let twice = |j: usize| {
        (
            here[0].local(&mine[0]),
            there[j].remote(&pair.peer, theirs[j].id(), None),
        )
    };
    let error = pair.a.prepare_sets(Op::Read, [twice(0), twice(1)]);
    assert!(
        matches!(error, Err(PrepareError::Overlap { .. })),
        "{error:?}"
    );
    let own = pair.a.connect(&pair.a.metadata(), WAIT).unwrap();
    let elsewhere = (
        here[1].local(&mine[1]),
        there[1].remote(&own, mine[2].id(), None),
    );
    let error = pair.a.prepare_sets(Op::Write, [twice(0), elsewhere]);
    assert!(
        matches!(error, Err(PrepareError::Mismatch { .. })),
        "{error:?}"
    );
    let none: [(LocalBlocks<'_>, RemoteBlocks<'_>); 0] = [];
    let error = pair.a.prepare_sets(Op::Write, none);
    assert!(matches!(error, Err(PrepareError::Empty)), "{error:?}");
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

pub(crate) fn statuses_tell_the_truth(setup: &Setup) {
    let pair = setup.pair();
    // A deadline without end is one.
    let sent = pair
        .a
        .notify(&pair.peer, "x", std::time::Duration::MAX)
        .unwrap();
    sent.wait(std::time::Duration::MAX).unwrap();
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
}

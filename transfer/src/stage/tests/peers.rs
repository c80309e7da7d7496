//! Peers over tcp, and memory of processes that no device reaches.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::support::{
    Blocks, GUARD, Mode, StandIn, WAIT, agent_with, broken, bytes, descriptors, device, eventually,
    fill, host, oracle, ragged, run, scattered, shapes,
};
use crate::{
    Agent, AgentConfig, CancelOutcome, FaultConfig, KvBlockLayout, KvOrder, KvShape, KvSlice, Lane,
    LocalTensor, Op, Peer, PostOptions, PrepareError, Prepared, RegionId, Registration,
    RemoteAccess, RemoteBlocks, RemoteDescriptor, RemoteTensor, TransferError, WindowAccess,
    WindowId, WindowScope,
};

/// An agent with devices, and a peer that they do not reach.
struct Pair {
    here: Agent,
    near: Arc<StandIn>,
    there: Agent,
    peer: Peer,
}

impl Pair {
    fn over(lane: Lane) -> Self {
        Self::with(lane, |_| {})
    }

    fn with(lane: Lane, change: impl Fn(&mut AgentConfig)) -> Self {
        let (here, near) = agent_with("here", |config| {
            config.lanes = vec![lane];
            config.stream_chunk_bytes = 16 << 10;
            change(config);
        });
        let there = Agent::new(AgentConfig::new("there").with_lanes([lane])).unwrap();
        let peer = here.connect(&there.metadata(), WAIT).unwrap();
        Self {
            here,
            near,
            there,
            peer,
        }
    }

    /// Memory of the peer that is not an arena.
    fn plain(&self, bytes: usize) -> Registration {
        self.there
            .register(vec![0; bytes], RemoteAccess::Open)
            .unwrap()
    }

    fn prepare(
        &self,
        op: Op,
        (memory, here): (&Registration, &Blocks),
        (region, there): (RegionId, &Blocks),
        window: Option<WindowId>,
    ) -> Result<Prepared, PrepareError> {
        let remote = RemoteBlocks {
            peer: &self.peer,
            region,
            layout: there.layout,
            ids: there.ids.clone(),
            layers: there.layers.clone(),
            window,
        };
        self.here.prepare(op, here.local(memory), remote)
    }

    fn large(&self, op: Op, memory: &Registration, remote: &Registration) -> Prepared {
        self.prepare(op, (memory, &large()), (remote.id(), &large()), None)
            .unwrap()
    }
}

/// 32 blocks of 64 KiB: 32 parts with the slots of these tests.
fn large() -> Blocks {
    Blocks::flat(32, 65536, scattered(32, 32, 9))
}

fn contents(lane: Lane, why: &str) {
    let pair = Pair::over(lane);
    let memory = device(&pair.here, 1 << 21);
    let remote = pair.plain(1 << 21);
    for (here, there) in shapes() {
        for (op, salt) in [(Op::Write, 1), (Op::Read, 3)] {
            let mut inside = fill(&memory, salt);
            let mut outside = fill(&remote, salt + 1);
            let prepared = pair
                .prepare(op, (&memory, &here), (remote.id(), &there), None)
                .unwrap();
            let plan = prepared.plan();
            assert_eq!(plan.lane, lane);
            let staged = "staged through 4 slots of 65536 bytes of pinned memory";
            assert!(plan.reason.contains(staged), "{}", plan.reason);
            assert!(plan.reason.contains(why), "{}", plan.reason);
            run(&prepared).unwrap();
            let options = PostOptions::within(WAIT).notify(vec![u8::try_from(salt).unwrap()]);
            prepared.post(options).unwrap().wait(WAIT).unwrap();
            let note = pair.there.notifications().recv_timeout(WAIT).unwrap();
            assert_eq!(&note.payload[..], [u8::try_from(salt).unwrap()]);
            match op {
                Op::Write => oracle(&inside, &here, &mut outside, &there),
                Op::Read => oracle(&outside, &there, &mut inside, &here),
            }
            assert!(bytes(&memory) == inside, "{op:?} {here:?} {there:?}");
            assert!(bytes(&remote) == outside, "{op:?} {here:?} {there:?}");
        }
    }
    let stats = pair.peer.stats();
    assert_eq!((stats.transfers_done, stats.in_flight), (20, 0));
    assert_eq!(stats.flows.len(), 2, "{:?}", stats.flows);
}

#[test]
fn every_byte_goes_where_it_belongs_over_tcp() {
    contents(Lane::Tcp, "the connection is TCP");
}

#[test]
fn memory_of_another_process_that_is_not_an_arena_is_staged() {
    contents(Lane::Shm, "memory of another process that is not an arena");
}

#[test]
fn descriptors_of_all_lengths_go_over_tcp() {
    let pair = Pair::over(Lane::Tcp);
    let memory = device(&pair.here, 1 << 20);
    let remote = host(&pair.there, 1 << 20);
    let pieces = ragged();
    let there: Vec<_> = pieces
        .iter()
        .map(|&(_, offset, _)| RemoteDescriptor {
            region: remote.id(),
            offset,
            window: None,
        })
        .collect();
    for (op, salt) in [(Op::Write, 1), (Op::Read, 3)] {
        let mut inside = fill(&memory, salt);
        let mut outside = fill(&remote, salt + 1);
        let here = descriptors(&memory, &pieces);
        let prepared = pair.here.prepare_descriptors(op, &here, &pair.peer, &there);
        run(&prepared.unwrap()).unwrap();
        for &(here, there, bytes) in &pieces {
            let [here, there, bytes] = [here, there, bytes].map(|at| usize::try_from(at).unwrap());
            let (here, there) = (here..here + bytes, there..there + bytes);
            match op {
                Op::Write => outside[there].copy_from_slice(&inside[here]),
                Op::Read => inside[here].copy_from_slice(&outside[there]),
            }
        }
        assert!(
            bytes(&memory) == inside && bytes(&remote) == outside,
            "{op:?}"
        );
    }
}

/// The same operation from host memory is the oracle.
#[test]
fn rearranging_copies_are_staged_as_well() {
    let half = KvShape {
        blocks: 12,
        layers: 3,
        planes: 2,
        tokens: 16,
        heads: 4,
        head_bytes: 64,
    };
    let mine = KvBlockLayout::dense(half, KvOrder::LAYER_FIRST_NHD).unwrap();
    let whole = KvShape { heads: 8, ..half };
    let theirs = KvBlockLayout::dense(whole, KvOrder::BLOCK_FIRST_HND).unwrap();
    let bytes_of = |layout: &KvBlockLayout| usize::try_from(layout.end().unwrap()).unwrap();
    for lane in [Lane::Tcp, Lane::Shm] {
        let pair = Pair::over(lane);
        let staged = device(&pair.here, bytes_of(&mine));
        let plain = host(&pair.here, bytes_of(&mine));
        let tensors = |op, memory: &Registration, remote: &Registration| {
            let local = LocalTensor {
                registration: memory,
                layout: mine,
                ids: [7, 1, 2, 11].into(),
                slice: KvSlice::ALL,
            };
            let remote = RemoteTensor {
                peer: &pair.peer,
                region: remote.id(),
                layout: theirs,
                ids: [0, 9, 4, 3].into(),
                slice: KvSlice::ALL.heads(4..8),
                window: None,
            };
            pair.here.prepare_tensors(op, local, remote).unwrap()
        };
        let remotes = [(); 2].map(|()| pair.plain(bytes_of(&theirs)));
        for op in [Op::Write, Op::Read] {
            fill(&staged, 1);
            fill(&plain, 1);
            remotes.iter().for_each(|remote| drop(fill(remote, 2)));
            let through = tensors(op, &staged, &remotes[0]);
            let reason = &through.plan().reason;
            assert!(
                reason.contains("staged") && reason.contains("rearranged"),
                "{reason}"
            );
            run(&through).unwrap();
            let direct = tensors(op, &plain, &remotes[1]);
            assert_eq!(direct.plan().bytes, through.plan().bytes);
            run(&direct).unwrap();
            assert!(bytes(&staged) == bytes(&plain), "{lane} {op:?}");
            assert!(bytes(&remotes[0]) == bytes(&remotes[1]), "{lane} {op:?}");
        }
    }
}

#[test]
fn cancelled_at_any_moment_nothing_lands_later() {
    for lane in [Lane::Tcp, Lane::Shm] {
        let pair = Pair::over(lane);
        pair.near.set(Mode::Slow(Duration::from_micros(200)));
        let (memory, other) = (device(&pair.here, 2 << 20), device(&pair.here, 2 << 20));
        let (remote, elsewhere) = (pair.plain(2 << 20), pair.plain(2 << 20));
        for op in [Op::Write, Op::Read] {
            let prepared = pair.large(op, &memory, &remote);
            let next = pair.large(op, &other, &elsewhere);
            let (mut cancelled, guard) = (0, vec![GUARD; 2 << 20]);
            for round in 0..40u32 {
                fill(&memory, 1);
                fill(&remote, 2);
                let options = PostOptions::within(WAIT).notify("done");
                let transfer = prepared.post(options).unwrap();
                std::thread::park_timeout(Duration::from_micros(100) * (round % 30));
                let outcome = transfer.cancel();
                match outcome {
                    CancelOutcome::Cancelled => cancelled += 1,
                    CancelOutcome::Completed => {}
                    CancelOutcome::Failed(error) => panic!("{error}"),
                }
                // The destination has a new use.
                let to = if op == Op::Write { &remote } else { &memory };
                to.write_at(0, &guard).unwrap();
                run(&next).unwrap();
                assert!(bytes(to) == guard, "{lane} {op:?} round {round}");
                while let Ok(Some(_)) = pair.there.notifications().try_recv() {}
            }
            assert!(cancelled > 5, "{lane} {op:?} {cancelled}");
        }
        assert_eq!(pair.here.stats().in_flight, 0);
    }
}

#[test]
fn deadlines_and_broken_devices_end_a_transfer_and_leave_the_connection() {
    let pair = Pair::over(Lane::Tcp);
    let memory = device(&pair.here, 2 << 20);
    let remote = host(&pair.there, 2 << 20);
    for op in [Op::Write, Op::Read] {
        let prepared = pair.large(op, &memory, &remote);
        pair.near.set(Mode::Stuck);
        let deadline = Duration::from_millis(50);
        let stuck: Vec<_> = (0..3)
            .map(|_| prepared.post(PostOptions::within(deadline)).unwrap())
            .collect();
        let began = Instant::now();
        for transfer in stuck {
            let outcome = transfer.wait(WAIT);
            assert_eq!(outcome, Err(TransferError::DeadlineExceeded { deadline }));
        }
        assert!(began.elapsed() < Duration::from_secs(5));
        for good in [0, 1, 7] {
            pair.near.set(Mode::Fails(good));
            assert_eq!(run(&prepared), Err(TransferError::Device(broken())));
        }
        pair.near.set(Mode::Plain);
        fill(&memory, 5);
        fill(&remote, 6);
        run(&prepared).unwrap();
        assert!(bytes(&memory) == bytes(&remote), "{op:?}");
    }
}

#[test]
fn a_lost_peer_is_the_error_and_others_go_on() {
    for mode in [
        Mode::Plain,
        Mode::Slow(Duration::from_millis(1)),
        Mode::Stuck,
    ] {
        for op in [Op::Write, Op::Read] {
            let pair = Pair::over(Lane::Tcp);
            let other = Agent::new(AgentConfig::new("other").with_lanes([Lane::Tcp])).unwrap();
            let memory = device(&pair.here, 2 << 20);
            let remote = host(&pair.there, 2 << 20);
            let prepared = pair.large(op, &memory, &remote);
            let second = Pair {
                peer: pair.here.connect(&other.metadata(), WAIT).unwrap(),
                here: pair.here.clone(),
                near: pair.near.clone(),
                there: other,
            };
            let safe = host(&second.there, 2 << 20);
            pair.near.set(mode);
            let transfers: Vec<_> = (0..6)
                .map(|_| prepared.post(PostOptions::within(WAIT)).unwrap())
                .collect();
            eventually("it has begun", || pair.near.begun() > 0);
            let Pair { there, .. } = pair;
            drop(there);
            for transfer in transfers {
                match transfer.wait(WAIT) {
                    Ok(()) => assert_ne!(mode, Mode::Stuck),
                    Err(TransferError::PeerLost(lost)) => assert_eq!(lost.peer, "there"),
                    Err(other) => panic!("{other}"),
                }
            }
            // The memory is nobody's but ours, and all slots are free.
            memory.write_at(0, &vec![GUARD; memory.len()]).unwrap();
            second.near.set(Mode::Plain);
            run(&second.large(Op::Write, &memory, &safe)).unwrap();
            assert!(bytes(&safe).iter().all(|&byte| byte == GUARD));
            assert!(bytes(&memory).iter().all(|&byte| byte == GUARD));
        }
    }
}

#[test]
fn closing_a_window_ends_what_goes_through_it() {
    let pair = Pair::over(Lane::Tcp);
    let memory = device(&pair.here, 2 << 20);
    let config = crate::ArenaConfig::new(2 << 20, "guarded").with_access(RemoteAccess::WindowOnly);
    let remote = pair.there.allocate(config).unwrap();
    let target = (remote.id(), &large());
    let refused = pair.prepare(Op::Write, (&memory, &large()), target, None);
    assert!(matches!(refused, Err(PrepareError::WindowRequired { .. })));
    let mut closed = 0;
    for round in 0..12u32 {
        pair.near.set(Mode::Slow(Duration::from_micros(300)));
        let window = pair
            .there
            .open_window(&remote, WindowScope::Region, WindowAccess::ReadWrite)
            .unwrap();
        let id = window.id();
        let write = pair.prepare(Op::Write, (&memory, &large()), target, Some(id));
        let write = write.unwrap();
        fill(&memory, 1);
        let transfer = write.post(PostOptions::within(WAIT)).unwrap();
        std::thread::park_timeout(Duration::from_micros(300) * round);
        window.close(WAIT).unwrap();
        // Closed: no further byte lands.
        remote.write_at(0, &vec![GUARD; remote.len()]).unwrap();
        match transfer.wait(WAIT) {
            Ok(()) => {}
            Err(TransferError::WindowClosed { window }) => {
                assert_eq!(window, id);
                closed += 1;
            }
            Err(other) => panic!("{other}"),
        }
        std::thread::park_timeout(Duration::from_millis(2));
        assert!(
            bytes(&remote).iter().all(|&byte| byte == GUARD),
            "round {round}"
        );
    }
    assert!(closed > 3, "{closed}");
}

#[test]
fn notifications_keep_their_order_among_staged_and_other_transfers() {
    let pair = Pair::over(Lane::Tcp);
    pair.near.set(Mode::Slow(Duration::from_micros(200)));
    let memory = device(&pair.here, 2 << 20);
    let outside = host(&pair.here, 2 << 20);
    let remote = host(&pair.there, 2 << 20);
    let staged = pair.large(Op::Write, &memory, &remote);
    let plain = pair.large(Op::Write, &outside, &remote);
    let transfers: Vec<_> = (0..12u8)
        .map(|number| {
            let prepared = if number % 3 == 0 { &staged } else { &plain };
            let options = PostOptions::within(WAIT).notify(vec![number]);
            prepared.post(options).unwrap()
        })
        .collect();
    for number in 0..12u8 {
        let note = pair.there.notifications().recv_timeout(WAIT).unwrap();
        assert_eq!(&note.payload[..], [number]);
    }
    for transfer in transfers {
        transfer.wait(WAIT).unwrap();
    }
}

#[test]
fn faults_of_the_connection_are_bounded_and_leave_the_slots_usable() {
    for seed in 0..4 {
        let pair = Pair::with(Lane::Tcp, |config| {
            let mut faults = FaultConfig::seeded(seed);
            faults.delay = 0.3;
            faults.delay_max = Duration::from_millis(3);
            faults.loss = 0.02;
            config.faults = Some(faults);
        });
        let memory = device(&pair.here, 2 << 20);
        let remote = host(&pair.there, 2 << 20);
        let read = pair.large(Op::Read, &memory, &remote);
        let sent = fill(&remote, 4);
        let mut late = 0;
        for _ in 0..10 {
            memory.write_at(0, &vec![GUARD; memory.len()]).unwrap();
            let options = PostOptions::within(Duration::from_millis(250));
            match read.post(options).unwrap().wait(WAIT) {
                Ok(()) => assert!(bytes(&memory) == sent),
                Err(TransferError::DeadlineExceeded { .. }) => late += 1,
                Err(other) => panic!("{other}"),
            }
            memory.write_at(0, &vec![GUARD; memory.len()]).unwrap();
            std::thread::park_timeout(Duration::from_millis(4));
            assert!(
                bytes(&memory).iter().all(|&byte| byte == GUARD),
                "seed {seed}"
            );
        }
        assert!(late > 0, "no fault of seed {seed} ever hit");
        assert_eq!(pair.here.stats().in_flight, 0);
    }
}

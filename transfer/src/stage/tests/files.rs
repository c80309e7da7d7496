//! Files.

use std::path::Path as FilePath;
use std::time::{Duration, Instant};

use super::support::{
    Blocks, GUARD, Mode, StandIn, WAIT, agent_with, broken, bytes, descriptors, device, eventually,
    fill, host, oracle, pattern, ragged, run, scattered, shapes,
};
use crate::cuda::DeviceEvent;
use crate::{
    Agent, AgentConfig, CancelOutcome, DirectIo, FaultConfig, FileBlocks, FileConfig, FileEngine,
    FileRanges, FileStore, Lane, Op, PostError, PostOptions, PrepareError, Prepared, Registration,
    StorageErrorKind, TransferError, TransferStatus,
};

const ENGINES: [FileEngine; 2] = [FileEngine::Uring, FileEngine::Threads];
const CACHES: [DirectIo; 2] = [DirectIo::On, DirectIo::Off];

fn agent(engine: FileEngine) -> (Agent, std::sync::Arc<StandIn>) {
    agent_with("store", |config| config.storage.file_engine = engine)
}

fn open(agent: &Agent, path: &FilePath, direct: DirectIo) -> FileStore {
    let config = FileConfig::new(path).create(0).with_direct(direct);
    agent.open_file(config).unwrap()
}

fn blocks<'a>(file: &'a FileStore, blocks: &Blocks, durable: bool) -> FileBlocks<'a> {
    FileBlocks {
        file,
        layout: blocks.layout,
        ids: blocks.ids.clone(),
        layers: blocks.layers.clone(),
        durable,
    }
}

fn prepare(
    agent: &Agent,
    op: Op,
    (memory, here): (&Registration, &Blocks),
    (file, there): (&FileStore, &Blocks),
) -> Prepared {
    let stored = blocks(file, there, false);
    agent.prepare_file(op, here.local(memory), stored).unwrap()
}

/// 32 blocks of 64 KiB: 32 parts with the slots of these tests.
fn large() -> Blocks {
    Blocks::flat(32, 65536, scattered(32, 32, 9))
}

#[test]
fn every_byte_goes_where_it_belongs_and_no_other_one_changes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blocks");
    for engine in ENGINES {
        let (agent, _) = agent(engine);
        let memory = device(&agent, 1 << 21);
        for (direct, (here, there)) in CACHES
            .into_iter()
            .flat_map(|c| shapes().into_iter().map(move |s| (c, s)))
        {
            for (op, salt) in [(Op::Write, 1), (Op::Read, 3)] {
                let mut inside = fill(&memory, salt);
                let mut stored = pattern(1 << 21, salt + 1);
                std::fs::write(&path, &stored).unwrap();
                let file = open(&agent, &path, direct);
                let prepared = prepare(&agent, op, (&memory, &here), (&file, &there));
                // Again over the same slots, which now hold something else.
                run(&prepared).unwrap();
                run(&prepared).unwrap();
                match op {
                    Op::Write => oracle(&inside, &here, &mut stored, &there),
                    Op::Read => oracle(&stored, &there, &mut inside, &here),
                }
                assert!(
                    bytes(&memory) == inside,
                    "{engine:?} {direct:?} {op:?} {here:?} {there:?}"
                );
                let found = std::fs::read(&path).unwrap();
                assert!(
                    found == stored,
                    "{engine:?} {direct:?} {op:?} {here:?} {there:?}"
                );
            }
        }
    }
}

#[test]
fn descriptors_of_all_lengths_go_through_slots() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ranges");
    let pieces = ragged();
    let offsets: Vec<u64> = pieces.iter().map(|piece| piece.1).collect();
    for engine in ENGINES {
        let (agent, _) = agent(engine);
        let memory = device(&agent, 1 << 20);
        for direct in CACHES {
            for (op, salt) in [(Op::Write, 1), (Op::Read, 3)] {
                let mut inside = fill(&memory, salt);
                let mut stored = pattern(1 << 20, salt + 1);
                std::fs::write(&path, &stored).unwrap();
                let file = open(&agent, &path, direct);
                let ranges = FileRanges {
                    file: &file,
                    offsets: &offsets,
                    durable: true,
                };
                let local = descriptors(&memory, &pieces);
                run(&agent.prepare_file_descriptors(op, &local, ranges).unwrap()).unwrap();
                for &(here, there, bytes) in &pieces {
                    let [here, there, bytes] =
                        [here, there, bytes].map(|at| usize::try_from(at).unwrap());
                    let (here, there) = (here..here + bytes, there..there + bytes);
                    match op {
                        Op::Write => stored[there].copy_from_slice(&inside[here]),
                        Op::Read => inside[here].copy_from_slice(&stored[there]),
                    }
                }
                assert!(bytes(&memory) == inside, "{engine:?} {direct:?} {op:?}");
                assert!(
                    std::fs::read(&path).unwrap() == stored,
                    "{engine:?} {direct:?} {op:?}"
                );
            }
        }
    }
}

#[test]
fn a_plan_says_how_it_is_staged_and_a_transfer_counts_once() {
    let folder = tempfile::tempdir().unwrap();
    let (agent, near) = agent(FileEngine::Auto);
    let memory = device(&agent, 2 << 20);
    let file = open(&agent, &folder.path().join("plan"), DirectIo::Off);
    let write = agent
        .prepare_file(
            Op::Write,
            large().local(&memory),
            blocks(&file, &large(), true),
        )
        .unwrap();
    let plan = write.plan();
    assert_eq!(
        (plan.lane, plan.bytes, plan.pieces),
        (Lane::File, 2 << 20, 32)
    );
    assert_eq!(plan.parts, 33, "32 slots full and a sync");
    for part in [
        "staged through 4 slots of 65536 bytes of pinned memory",
        "devices do not reach files",
        "32 parts",
        "a stand-in copies",
        "then fdatasync",
    ] {
        assert!(plan.reason.contains(part), "{}", plan.reason);
    }
    let queue = agent.completion_queue(4).unwrap();
    let options = PostOptions::within(WAIT)
        .notify("stored")
        .request_id("request 7")
        .complete_to(&queue, 5)
        .sms(4);
    let transfer = write.post(options).unwrap();
    let completion = queue.wait_timeout(WAIT).unwrap();
    assert_eq!((completion.token, completion.bytes), (5, 2 << 20));
    assert_eq!(completion.outcome, Ok(()));
    let told = transfer.telemetry().unwrap();
    assert_eq!(
        (told.bytes, told.parts, told.lane),
        (2 << 20, 33, Lane::File)
    );
    assert_eq!(told.request_id.as_deref(), Some("request 7"));
    assert!(told.until_first_part.is_some() && told.bytes_phase <= told.total);
    let note = agent.notifications().recv_timeout(WAIT).unwrap();
    assert_eq!(&note.payload[..], b"stored");
    assert_eq!(near.begun(), 32, "one copy of the device for each part");
    // Halves count nowhere.
    for (done, in_flight, flows) in [
        (
            agent.stats().transfers_done,
            agent.stats().in_flight,
            agent.stats().flows,
        ),
        (
            file.stats().transfers_done,
            file.stats().in_flight,
            file.stats().flows,
        ),
    ] {
        assert_eq!((done, in_flight, flows.len()), (1, 0, 1));
        assert_eq!((flows[0].lane, flows[0].bytes), (Lane::File, 2 << 20));
    }
}

#[test]
fn host_memory_is_not_staged_and_a_mix_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (agent, near) = agent(FileEngine::Auto);
    let (inside, outside) = (device(&agent, 8192), host(&agent, 8192));
    let file = open(&agent, &folder.path().join("mix"), DirectIo::Off);
    let two = Blocks::flat(2, 4096, 0..2);
    let plain = prepare(&agent, Op::Write, (&outside, &two), (&file, &two));
    assert!(
        !plain.plan().reason.contains("staged"),
        "{}",
        plain.plan().reason
    );
    run(&plain).unwrap();
    assert_eq!(near.begun(), 0);
    let error = plain.post(PostOptions::within(WAIT).sms(4)).unwrap_err();
    assert!(matches!(error, PostError::NotOnDevice { .. }), "{error}");
    let mixed: Vec<_> = [&inside, &outside]
        .into_iter()
        .flat_map(|memory| descriptors(memory, &[(0, 0, 100)]))
        .collect();
    let ranges = FileRanges {
        file: &file,
        offsets: &[0, 4096],
        durable: false,
    };
    let error = agent
        .prepare_file_descriptors(Op::Write, &mixed, ranges)
        .unwrap_err();
    assert!(matches!(error, PrepareError::MixedMemory { .. }), "{error}");
}

#[test]
fn cancelled_at_any_moment_nothing_lands_later() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cancel");
    std::fs::write(&path, pattern(2 << 20, 1)).unwrap();
    for engine in ENGINES {
        let (agent, near) = agent(engine);
        near.set(Mode::Slow(Duration::from_micros(300)));
        let memory = device(&agent, 2 << 20);
        let other = device(&agent, 2 << 20);
        let file = open(&agent, &path, DirectIo::Off);
        let read = prepare(&agent, Op::Read, (&memory, &large()), (&file, &large()));
        let next = prepare(&agent, Op::Read, (&other, &large()), (&file, &large()));
        let mut cancelled = 0;
        for round in 0..60u32 {
            let transfer = read.post(PostOptions::within(WAIT)).unwrap();
            std::thread::park_timeout(Duration::from_micros(100) * (round % 40));
            match transfer.cancel() {
                CancelOutcome::Cancelled => cancelled += 1,
                CancelOutcome::Completed => {}
                CancelOutcome::Failed(error) => panic!("{error}"),
            }
            // The memory has a new use.
            memory.write_at(0, &vec![GUARD; memory.len()]).unwrap();
            run(&next).unwrap();
            assert!(
                bytes(&memory).iter().all(|&byte| byte == GUARD),
                "round {round}"
            );
        }
        assert!(cancelled > 5, "{cancelled}");
        assert_eq!(agent.stats().in_flight, 0);
    }
}

#[test]
fn cancelled_writes_leave_the_file_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("quiet");
    for (engine, direct) in ENGINES.into_iter().zip(CACHES) {
        let (agent, near) = agent(engine);
        near.set(Mode::Slow(Duration::from_micros(300)));
        let memory = device(&agent, 2 << 20);
        fill(&memory, 1);
        let file = open(&agent, &path, direct);
        let elsewhere = open(&agent, &folder.path().join("elsewhere"), direct);
        let write = prepare(&agent, Op::Write, (&memory, &large()), (&file, &large()));
        let next = prepare(
            &agent,
            Op::Write,
            (&memory, &large()),
            (&elsewhere, &large()),
        );
        let guard = vec![GUARD; 2 << 20];
        let mut cancelled = 0;
        for round in 0..40u32 {
            let transfer = write.post(PostOptions::within(WAIT)).unwrap();
            std::thread::park_timeout(Duration::from_micros(150) * round);
            cancelled += u32::from(transfer.cancel() == CancelOutcome::Cancelled);
            // The blocks of the file have a new use.
            std::fs::write(&path, &guard).unwrap();
            run(&next).unwrap();
            assert!(std::fs::read(&path).unwrap() == guard, "round {round}");
        }
        assert!(cancelled > 5, "{cancelled}");
    }
}

#[test]
fn a_device_that_is_stuck_costs_one_transfer_its_deadline_and_others_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for engine in ENGINES {
        let (agent, near) = agent(engine);
        let memory = device(&agent, 2 << 20);
        let written = fill(&memory, 1);
        let path = folder.path().join("stuck");
        let file = open(&agent, &path, DirectIo::Off);
        let write = prepare(&agent, Op::Write, (&memory, &large()), (&file, &large()));
        near.set(Mode::Stuck);
        let began = Instant::now();
        let deadline = Duration::from_millis(80);
        let stuck = write.post(PostOptions::within(deadline)).unwrap();
        eventually("its share of the slots is taken", || near.begun() == 2);
        near.set(Mode::Plain);
        // The other half of the slots is free for others.
        run(&write).unwrap();
        assert_eq!(stuck.status(), TransferStatus::InFlight);
        let outcome = stuck.wait(WAIT);
        assert_eq!(outcome, Err(TransferError::DeadlineExceeded { deadline }));
        assert!(began.elapsed() < Duration::from_secs(5));
        // All of them are free again.
        near.set(Mode::Stuck);
        let two: Vec<_> = (0..2)
            .map(|_| write.post(PostOptions::within(WAIT)).unwrap())
            .collect();
        eventually("both have their share", || near.begun() == 4);
        for transfer in two {
            assert_eq!(transfer.cancel(), CancelOutcome::Cancelled);
        }
        near.set(Mode::Plain);
        run(&write).unwrap();
        let mut expected = vec![0; 2 << 20];
        oracle(&written, &large(), &mut expected, &large());
        assert!(std::fs::read(&path).unwrap() == expected);
    }
}

#[test]
fn an_error_of_the_device_is_the_error_of_the_transfer() {
    let folder = tempfile::tempdir().unwrap();
    for engine in ENGINES {
        let (agent, near) = agent(engine);
        let memory = device(&agent, 2 << 20);
        let file = open(&agent, &folder.path().join("fails"), DirectIo::Off);
        let write = prepare(&agent, Op::Write, (&memory, &large()), (&file, &large()));
        run(&write).unwrap();
        let read = prepare(&agent, Op::Read, (&memory, &large()), (&file, &large()));
        for prepared in [&write, &read] {
            for good in [0, 1, 2, 5, 31] {
                near.set(Mode::Fails(good));
                let transfer = prepared
                    .post(PostOptions::within(WAIT).notify("never"))
                    .unwrap();
                assert_eq!(transfer.wait(WAIT), Err(TransferError::Device(broken())));
            }
            near.set(Mode::Plain);
            run(prepared).unwrap();
        }
        assert_eq!(agent.stats().transfers_failed, 10);
        assert_eq!(agent.notifications().try_recv(), Ok(None));
    }
}

#[test]
fn an_error_of_the_file_is_the_error_of_the_transfer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("short");
    std::fs::write(&path, pattern(300_000, 1)).unwrap();
    for engine in ENGINES {
        let (agent, _) = agent(engine);
        let memory = device(&agent, 2 << 20);
        let file = open(&agent, &path, DirectIo::Off);
        let all = Blocks::flat(32, 65536, 0..32);
        let read = prepare(&agent, Op::Read, (&memory, &all), (&file, &all));
        let Err(TransferError::Storage(error)) = run(&read) else {
            panic!("a read behind the end passed");
        };
        assert!(
            matches!(error.kind, StorageErrorKind::EndOfFile { .. }),
            "{error}"
        );
        assert!(error.offset >= 262_144, "{error}");
        let some = Blocks::flat(32, 65536, 0..4);
        run(&prepare(&agent, Op::Read, (&memory, &some), (&file, &some))).unwrap();
        let four = pattern(300_000, 1)[..262_144].to_vec();
        assert!(bytes(&memory)[..262_144] == four);
    }
}

#[test]
fn many_at_once_share_the_slots() {
    let folder = tempfile::tempdir().unwrap();
    for engine in ENGINES {
        let (agent, near) = agent(engine);
        near.set(Mode::Slow(Duration::from_micros(100)));
        let each = Blocks::flat(8, 40_000, scattered(8, 8, 3));
        let all: Vec<_> = (0..24u64)
            .map(|number| {
                let memory = device(&agent, 8 * 40_000);
                let written = fill(&memory, number);
                let path = folder.path().join(format!("many-{number}"));
                let file = open(&agent, &path, DirectIo::Off);
                let write = prepare(&agent, Op::Write, (&memory, &each), (&file, &each));
                let read = prepare(&agent, Op::Read, (&memory, &each), (&file, &each));
                (memory, written, write, read)
            })
            .collect();
        for reads in [false, true] {
            let queue = agent.completion_queue(24).unwrap();
            for ((_, _, write, read), number) in all.iter().zip(0..) {
                let prepared = if reads { read } else { write };
                let options = PostOptions::within(WAIT).complete_to(&queue, number);
                let transfer = prepared.post(options.notify(vec![0; 8])).unwrap();
                transfer.detach();
            }
            let mut tokens: Vec<u64> = (0..24)
                .map(|_| {
                    let completion = queue.wait_timeout(WAIT).unwrap();
                    assert_eq!(completion.outcome, Ok(()));
                    completion.token
                })
                .collect();
            tokens.sort_unstable();
            assert!(tokens.into_iter().eq(0..24));
            for (memory, written, ..) in &all {
                if reads {
                    assert!(&bytes(memory) == written);
                } else {
                    memory.write_at(0, &vec![GUARD; memory.len()]).unwrap();
                }
            }
        }
    }
}

#[test]
fn what_waits_for_an_event_holds_no_slot() {
    let folder = tempfile::tempdir().unwrap();
    let (agent, near) = agent(FileEngine::Auto);
    let memory = device(&agent, 2 << 20);
    let file = open(&agent, &folder.path().join("after"), DirectIo::Off);
    let write = prepare(&agent, Op::Write, (&memory, &large()), (&file, &large()));
    near.set_past(false);
    // SAFETY: the stand-in does not look behind it.
    let event = unsafe { DeviceEvent::from_raw(std::ptr::null_mut()) };
    let after = |within| {
        write
            .post(PostOptions::within(within).after(event))
            .unwrap()
    };
    let waiting: Vec<_> = (0..8).map(|_| after(WAIT)).collect();
    let late = after(Duration::from_millis(30));
    run(&write).unwrap();
    assert_eq!(near.begun(), 32, "only the one without an event");
    assert!(matches!(
        late.wait(WAIT),
        Err(TransferError::DeadlineExceeded { .. })
    ));
    assert_eq!(after(WAIT).cancel(), CancelOutcome::Cancelled);
    assert!(
        waiting
            .iter()
            .all(|transfer| transfer.status() == TransferStatus::InFlight)
    );
    near.set_past(true);
    for transfer in waiting {
        transfer.wait(WAIT).unwrap();
    }
    assert_eq!(near.begun(), 32 * 9);
}

#[test]
fn stopping_the_agent_ends_what_is_under_way() {
    let folder = tempfile::tempdir().unwrap();
    for engine in ENGINES {
        for mode in [
            Mode::Plain,
            Mode::Stuck,
            Mode::Slow(Duration::from_millis(1)),
        ] {
            let (agent, near) = agent(engine);
            near.set(mode);
            let memory = device(&agent, 2 << 20);
            let file = open(&agent, &folder.path().join("stop"), DirectIo::Off);
            let write = prepare(&agent, Op::Write, (&memory, &large()), (&file, &large()));
            let transfers: Vec<_> = (0..6)
                .map(|_| write.post(PostOptions::within(WAIT)).unwrap())
                .collect();
            eventually("it has begun", || near.begun() > 0);
            drop((agent, file));
            for transfer in transfers {
                match transfer.wait(WAIT) {
                    Ok(()) | Err(TransferError::PeerLost(_)) => {}
                    Err(other) => panic!("{other}"),
                }
            }
            let error = write.post(PostOptions::within(WAIT)).unwrap_err();
            assert!(matches!(error, PostError::PeerLost(_)), "{error}");
            // The memory can go: nothing names it any more.
            drop(write);
            memory.close(WAIT).unwrap();
        }
    }
}

#[test]
fn faults_of_the_file_are_bounded_and_leave_the_slots_usable() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("faults");
    std::fs::write(&path, pattern(2 << 20, 1)).unwrap();
    for seed in 0..6 {
        let (agent, _) = agent_with("store", |config: &mut AgentConfig| {
            let mut faults = FaultConfig::seeded(seed);
            faults.delay = 0.3;
            faults.delay_max = Duration::from_millis(3);
            faults.loss = 0.02;
            faults.torn = 0.03;
            config.faults = Some(faults);
        });
        let memory = device(&agent, 2 << 20);
        let file = open(&agent, &path, DirectIo::Off);
        let read = prepare(&agent, Op::Read, (&memory, &large()), (&file, &large()));
        let mut expected = vec![0; 2 << 20];
        oracle(&pattern(2 << 20, 1), &large(), &mut expected, &large());
        let mut ends = [0; 3];
        for _ in 0..12 {
            memory.write_at(0, &vec![GUARD; memory.len()]).unwrap();
            let transfer = read
                .post(PostOptions::within(Duration::from_millis(250)))
                .unwrap();
            let outcome = transfer.wait(WAIT);
            let place = match outcome {
                Ok(()) => {
                    assert!(bytes(&memory) == expected);
                    0
                }
                Err(TransferError::DeadlineExceeded { .. }) => 1,
                Err(TransferError::Injected) => 2,
                Err(other) => panic!("{other}"),
            };
            ends[place] += 1;
            memory.write_at(0, &vec![GUARD; memory.len()]).unwrap();
            std::thread::park_timeout(Duration::from_millis(4));
            assert!(
                bytes(&memory).iter().all(|&byte| byte == GUARD),
                "seed {seed}"
            );
        }
        assert!(ends[0] < 12, "no fault of seed {seed} ever hit: {ends:?}");
        assert_eq!(agent.stats().in_flight, 0);
    }
}

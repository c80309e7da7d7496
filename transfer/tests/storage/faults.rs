//! What can go wrong, and that nothing moves after it was reported.

use std::time::Duration;

use blockplane_transfer::{
    CancelOutcome, DirectIo, FaultConfig, FileAccess, FileConfig, FileEngine, Lane, Op, OpenError,
    PostError, PostOptions, PrepareError, StorageAction, StorageErrorKind, TransferError,
    TransferStatus,
};

use crate::support::{
    Blocks, CACHES, ENGINES, WAIT, agent, agent_with, arena, bytes, disk, eventually, file_bytes,
    fill, open, open_descriptors, pattern, patterned, prepare, run,
};

#[test]
fn reading_behind_the_end_is_an_error() {
    let folder = disk();
    for engine in ENGINES {
        let agent = agent(engine);
        for direct in CACHES {
            let path = patterned(folder.path(), "end", 10_000, 1);
            let file = open(&agent, &path, direct);
            let memory = arena(&agent, 16384);
            let blocks = Blocks::flat(4, 4096, &[0, 1, 2]);
            let read = prepare(&agent, Op::Read, (&memory, &blocks), (&file, &blocks)).unwrap();
            let Err(TransferError::Storage(error)) = run(&read) else {
                panic!("a short read passed");
            };
            assert_eq!(error.action, StorageAction::Read);
            assert_eq!(error.offset, 10_000, "{error}");
            assert_eq!(error.kind, StorageErrorKind::EndOfFile { missing: 2288 });
            assert!(error.to_string().contains("end"), "{error}");

            let beyond = Blocks::flat(8, 4096, &[7]);
            let read = prepare(
                &agent,
                Op::Read,
                (&memory, &Blocks::flat(4, 4096, &[0])),
                (&file, &beyond),
            );
            let Err(TransferError::Storage(error)) = run(&read.unwrap()) else {
                panic!("reading nothing passed");
            };
            assert_eq!(error.kind, StorageErrorKind::EndOfFile { missing: 4096 });
            // The engine goes on.
            let fine = Blocks::flat(2, 4096, &[1, 0]);
            run(&prepare(&agent, Op::Read, (&memory, &fine), (&file, &fine)).unwrap()).unwrap();
        }
    }
}

#[test]
fn a_full_file_system_is_an_error_of_its_own() {
    let folder = disk();
    let mounted = folder.path().join("small");
    std::fs::create_dir(&mounted).unwrap();
    // A thread of its own: it leaves the mounts of this process alone.
    std::thread::spawn(move || {
        if let Err(error) = mount_small(&mounted) {
            println!("skipped: no small file system can be mounted: {error}");
            return;
        }
        for engine in ENGINES {
            let agent = agent(engine);
            let path = mounted.join("full");
            let file = agent.open_file(FileConfig::new(&path).create(0)).unwrap();
            let memory = arena(&agent, 2 << 20);
            let blocks = Blocks::flat(512, 4096, &(0..512).collect::<Vec<_>>());
            let write = prepare(&agent, Op::Write, (&memory, &blocks), (&file, &blocks)).unwrap();
            let Err(TransferError::Storage(error)) = run(&write) else {
                panic!("2 MiB fit into 1 MiB");
            };
            assert_eq!(error.kind, StorageErrorKind::NoSpace, "{error}");
            assert_eq!(error.action, StorageAction::Write);
            drop((write, file));
            std::fs::remove_file(&path).unwrap();

            let mut config = FileConfig::new(&path).create(2 << 20);
            config.preallocate = true;
            let Err(OpenError::Io { source, .. }) = agent.open_file(config) else {
                panic!("2 MiB were allocated in 1 MiB");
            };
            assert_eq!(source.raw_os_error(), Some(libc::ENOSPC));
            std::fs::remove_file(&path).unwrap();
        }
    })
    .join()
    .unwrap();
}

/// Mounts a tmpfs of 1 MiB that only this thread and its children see.
fn mount_small(at: &std::path::Path) -> std::io::Result<()> {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    // SAFETY: new mounts of this thread; no file system state is shared with it by contract.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }?;
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )?;
    mount("none", at, "tmpfs", MountFlags::empty(), c"size=1m")?;
    Ok(())
}

#[test]
fn stores_refuse_what_they_are_not_for() {
    let folder = disk();
    let path = patterned(folder.path(), "refuse", 8192, 1);
    let (agent, other) = (agent(ENGINES[0]), agent(ENGINES[0]));
    let mut config = FileConfig::new(&path);
    config.access = FileAccess::ReadOnly;
    let file = agent.open_file(config).unwrap();
    assert!(file.query().unwrap().read_only);
    let memory = arena(&agent, 8192);
    let blocks = Blocks::flat(2, 4096, &[0]);
    let refused = |agent, op, local: &Blocks, stored: &Blocks| {
        prepare(agent, op, (&memory, local), (&file, stored)).unwrap_err()
    };
    assert!(matches!(
        refused(&agent, Op::Write, &blocks, &blocks),
        PrepareError::ReadOnlyStore { .. }
    ));
    assert!(matches!(
        refused(&other, Op::Read, &blocks, &blocks),
        PrepareError::ForeignStore { .. }
    ));
    let two = Blocks::flat(2, 4096, &[0, 1]);
    assert!(matches!(
        refused(&agent, Op::Read, &blocks, &two),
        PrepareError::Mismatch {
            local: 1,
            remote: 2,
            ..
        }
    ));
    let twice = Blocks::flat(2, 4096, &[1, 1]);
    assert!(matches!(
        refused(&agent, Op::Read, &twice, &two),
        PrepareError::Overlap { .. }
    ));
    let none = Blocks::flat(2, 4096, &[]);
    assert!(matches!(
        refused(&agent, Op::Read, &none, &none),
        PrepareError::Empty
    ));
    let outside = Blocks::flat(3, 4096, &[2]);
    assert!(matches!(
        refused(&agent, Op::Read, &outside, &blocks),
        PrepareError::Layout { .. }
    ));

    let open = |config: FileConfig| agent.open_file(config).unwrap_err();
    let error = open(FileConfig::new(folder.path().join("missing")));
    assert!(error.to_string().contains("No such file"), "{error}");
    let mut folder_read_only = FileConfig::new(folder.path());
    folder_read_only.access = FileAccess::ReadOnly;
    let error = open(folder_read_only);
    assert!(
        matches!(
            error,
            OpenError::NotAFile {
                kind: "directory",
                ..
            }
        ),
        "{error}"
    );
    let mut config = FileConfig::new(&path);
    config.preallocate = true;
    assert!(matches!(open(config), OpenError::InvalidConfig { .. }));

    let mut config = blockplane_transfer::AgentConfig::new("lane");
    config.lanes.push(Lane::File);
    let error = blockplane_transfer::Agent::new(config).unwrap_err();
    assert!(error.to_string().contains("opened"), "{error}");
}

#[test]
fn cancelled_reads_never_land_later() {
    let folder = disk();
    for engine in ENGINES {
        let agent = agent(engine);
        let mut cancelled = 0;
        for direct in CACHES {
            let path = patterned(folder.path(), "cancel", 8 << 20, 1);
            let file = open(&agent, &path, direct);
            let memory = arena(&agent, 8 << 20);
            let blocks = Blocks::flat(128, 65536, &(0..128).collect::<Vec<_>>());
            let read = prepare(&agent, Op::Read, (&memory, &blocks), (&file, &blocks)).unwrap();
            for round in 0..30u32 {
                memory.write_at(0, &vec![0xee; memory.len()]).unwrap();
                let transfer = read.post(PostOptions::within(WAIT)).unwrap();
                // Sooner and later ones: some have started, some have not.
                for _ in 0..round * 20 {
                    std::thread::yield_now();
                }
                match transfer.cancel() {
                    CancelOutcome::Cancelled => cancelled += 1,
                    CancelOutcome::Completed => {}
                    CancelOutcome::Failed(error) => panic!("{error}"),
                }
                // The memory has a new use: nothing may land in it.
                memory.write_at(0, &vec![0xaa; memory.len()]).unwrap();
                let elsewhere = Blocks::flat(128, 65536, &[127]);
                let other = arena(&agent, 65536);
                let one = Blocks::flat(1, 65536, &[0]);
                let after = prepare(&agent, Op::Read, (&other, &one), (&file, &elsewhere));
                run(&after.unwrap()).unwrap();
                assert!(
                    bytes(&memory).iter().all(|&byte| byte == 0xaa),
                    "something landed after the cancel in round {round}"
                );
            }
        }
        // From the page cache all of it may be there at once; from the device not.
        assert!(cancelled > 0, "nothing was ever cancelled in time");
    }
}

#[test]
fn a_dropped_transfer_keeps_its_memory_until_it_is_quiet() {
    let folder = disk();
    for engine in ENGINES {
        for direct in CACHES {
            let path = patterned(folder.path(), "dropped", 4 << 20, 1);
            for _ in 0..10 {
                let agent = agent(engine);
                let file = open(&agent, &path, direct);
                let memory = agent
                    .register(vec![0u8; 4 << 20], blockplane_transfer::RemoteAccess::None)
                    .unwrap();
                let blocks = Blocks::flat(64, 65536, &(0..64).collect::<Vec<_>>());
                let read = prepare(&agent, Op::Read, (&memory, &blocks), (&file, &blocks)).unwrap();
                let transfers: Vec<_> = (0..4)
                    .map(|_| read.post(PostOptions::within(WAIT)).unwrap())
                    .collect();
                // Everything goes at once, in the worst order.
                drop((memory, agent, file, read));
                drop(transfers);
            }
        }
    }
}

#[test]
fn stopping_the_agent_ends_what_is_in_flight() {
    let folder = disk();
    for engine in ENGINES {
        let agent = agent(engine);
        let path = patterned(folder.path(), "stopping", 4 << 20, 1);
        let file = open(&agent, &path, DirectIo::On);
        let memory = arena(&agent, 4 << 20);
        let blocks = Blocks::flat(64, 65536, &(0..64).collect::<Vec<_>>());
        let read = prepare(&agent, Op::Read, (&memory, &blocks), (&file, &blocks)).unwrap();
        let transfers: Vec<_> = (0..20)
            .map(|_| read.post(PostOptions::within(WAIT)).unwrap())
            .collect();
        drop(agent);
        for transfer in transfers {
            match transfer.wait(WAIT) {
                Ok(()) | Err(TransferError::PeerLost(_)) => {}
                Err(other) => panic!("{other}"),
            }
        }
        assert!(matches!(
            read.post(PostOptions::within(WAIT)).unwrap_err(),
            PostError::PeerLost(_)
        ));
    }
}

#[test]
fn a_transfer_ends_at_its_deadline() {
    let folder = disk();
    for engine in ENGINES {
        let agent = agent_with(engine, |config| {
            config.faults = Some(FaultConfig {
                loss: 1.0,
                ..FaultConfig::seeded(1)
            });
        });
        let path = patterned(folder.path(), "deadline", 8192, 1);
        let file = open(&agent, &path, DirectIo::Auto);
        let memory = arena(&agent, 8192);
        let blocks = Blocks::flat(2, 4096, &[0, 1]);
        let read = prepare(&agent, Op::Read, (&memory, &blocks), (&file, &blocks)).unwrap();
        let deadline = Duration::from_millis(20);
        let transfer = read.post(PostOptions::within(deadline)).unwrap();
        assert_eq!(
            transfer.wait(WAIT),
            Err(TransferError::DeadlineExceeded { deadline })
        );
    }
}

#[test]
fn late_transfers_are_quiet_at_their_deadline() {
    let folder = disk();
    for engine in ENGINES {
        let agent = agent(engine);
        let path = patterned(folder.path(), "late", 16 << 20, 1);
        let file = open(&agent, &path, DirectIo::On);
        let memory = arena(&agent, 16 << 20);
        let blocks = Blocks::flat(256, 65536, &(0..256).collect::<Vec<_>>());
        let read = prepare(&agent, Op::Read, (&memory, &blocks), (&file, &blocks)).unwrap();
        for micros in [0, 50, 200, 500, 1000, 2000] {
            let deadline = Duration::from_micros(micros);
            let transfer = read.post(PostOptions::within(deadline)).unwrap();
            match transfer.wait(WAIT) {
                Ok(()) => {}
                Err(TransferError::DeadlineExceeded { .. }) => {
                    memory.write_at(0, &vec![0x55; memory.len()]).unwrap();
                    file.sync(PostOptions::within(WAIT))
                        .unwrap()
                        .wait(WAIT)
                        .unwrap();
                    assert!(bytes(&memory).iter().all(|&byte| byte == 0x55));
                }
                Err(other) => panic!("{other}"),
            }
        }
    }
}

#[test]
fn full_queues_push_back() {
    let folder = disk();
    let agent = agent_with(FileEngine::Auto, |config| {
        config.posts_max = 2;
        config.faults = Some(FaultConfig {
            loss: 1.0,
            ..FaultConfig::seeded(1)
        });
    });
    let path = patterned(folder.path(), "queue", 8192, 1);
    let file = open(&agent, &path, DirectIo::Auto);
    let memory = arena(&agent, 8192);
    let blocks = Blocks::flat(2, 4096, &[0, 1]);
    let read = prepare(&agent, Op::Read, (&memory, &blocks), (&file, &blocks)).unwrap();
    let kept = [
        read.post(PostOptions::within(WAIT)).unwrap(),
        read.post(PostOptions::within(WAIT)).unwrap(),
    ];
    assert_eq!(
        read.post(PostOptions::within(WAIT)).unwrap_err(),
        PostError::TooManyInFlight { limit: 2 }
    );
    for transfer in kept {
        assert_eq!(transfer.status(), TransferStatus::InFlight);
        assert_eq!(transfer.cancel(), CancelOutcome::Cancelled);
    }
}

#[test]
fn delayed_operations_arrive_whole() {
    let folder = disk();
    for engine in ENGINES {
        let agent = agent_with(engine, |config| {
            config.faults = Some(FaultConfig {
                delay: 0.7,
                delay_max: Duration::from_millis(3),
                ..FaultConfig::seeded(7)
            });
        });
        let path = patterned(folder.path(), "delayed", 64 * 4096, 1);
        let file = open(&agent, &path, DirectIo::Auto);
        let memory = arena(&agent, 64 * 4096);
        let written = fill(&memory, 9);
        let transfers: Vec<_> = (0..64)
            .map(|block| {
                let blocks = Blocks::flat(64, 4096, &[block]);
                let write = prepare(&agent, Op::Write, (&memory, &blocks), (&file, &blocks));
                write.unwrap().post(PostOptions::within(WAIT)).unwrap()
            })
            .collect();
        for transfer in transfers {
            transfer.wait(WAIT).unwrap();
        }
        assert!(file_bytes(&path) == written);
    }
}

#[test]
fn torn_writes_fail_and_leave_a_part() {
    let folder = disk();
    for engine in ENGINES {
        let agent = agent_with(engine, |config| {
            config.faults = Some(FaultConfig {
                torn: 1.0,
                delay_max: Duration::from_millis(20),
                ..FaultConfig::seeded(3)
            });
        });
        let mut landed = 0;
        for round in 0..8 {
            let path = folder.path().join(format!("torn-{round}"));
            std::fs::write(&path, vec![0; 64 * 32768]).unwrap();
            let file = open(&agent, &path, DirectIo::On);
            let memory = arena(&agent, 64 * 32768);
            let written = fill(&memory, 9);
            let blocks = Blocks::flat(64, 32768, &(0..64).collect::<Vec<_>>());
            let write = prepare(&agent, Op::Write, (&memory, &blocks), (&file, &blocks)).unwrap();
            assert_eq!(run(&write), Err(TransferError::Injected));
            let content = file_bytes(&path);
            let (mut there, mut missing) = (0, 0);
            for at in (0..content.len()).step_by(32768) {
                let block = &content[at..at + 32768];
                if block == &written[at..at + 32768] {
                    there += 1;
                } else {
                    assert!(block.iter().all(|&byte| byte == 0), "half a request");
                    missing += 1;
                }
            }
            assert!(missing > 0, "all of it landed");
            landed += there;
        }
        assert!(landed > 0, "nothing landed in eight rounds");
    }
}

#[test]
fn released_memory_does_not_stay_registered() {
    let folder = disk();
    let agent = agent(FileEngine::Uring);
    let path = patterned(folder.path(), "released", 1 << 20, 1);
    let file = open(&agent, &path, DirectIo::On);
    // More regions than the table of registered memory has places (4096).
    for round in 0..5000u64 {
        let memory = arena(&agent, 1 << 16);
        let one = Blocks::flat(1, 65536, &[0]);
        let block = Blocks::flat(16, 65536, &[(round % 16) as u32]);
        run(&prepare(&agent, Op::Read, (&memory, &one), (&file, &block)).unwrap()).unwrap();
        if round % 500 == 0 {
            let at = (round % 16) as usize * 65536;
            assert!(bytes(&memory) == pattern(1 << 20, 1)[at..at + 65536]);
        }
    }
    assert_eq!(agent.stats().regions, 0);
}

/// Run by the test below, alone in its process.
#[test]
#[ignore = "started by a_thousand_opens_leak_no_descriptor"]
fn descriptors_alone() {
    let folder = disk();
    let path = patterned(folder.path(), "leak", 8192, 1);
    let before = open_descriptors();
    for engine in ENGINES {
        let agent = agent(engine);
        let memory = arena(&agent, 8192);
        let blocks = Blocks::flat(2, 4096, &[0, 1]);
        let inside = open_descriptors();
        for _ in 0..1000 {
            let file = open(&agent, &path, DirectIo::On);
            run(&prepare(&agent, Op::Read, (&memory, &blocks), (&file, &blocks)).unwrap()).unwrap();
        }
        eventually("files are closed", || {
            open_descriptors() == inside + 2 || open_descriptors() <= inside + 2
        });
    }
    eventually("agents are gone", || open_descriptors() == before);
}

#[test]
fn a_thousand_opens_leak_no_descriptor() {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "faults::descriptors_alone",
            "--ignored",
            "--nocapture",
        ])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

//! Bytes go where they belong: layouts, lists, alignment, many at a time.

use std::os::fd::OwnedFd;
use std::time::Duration;

use blockplane_transfer::{
    BlockLayout, Descriptor, DirectIo, DirectUse, FileAccess, FileConfig, FileCreation, FileRanges,
    Lane, Op, PostOptions, RemoteAccess, Transfer,
};

use crate::support::{
    Blocks, CACHES, ENGINES, WAIT, agent, arena, bytes, check, disk, file_bytes, fill,
    memory_folder, open, pattern, patterned, prepare, run, scattered,
};

#[test]
fn every_size_arrives_whole() {
    let folder = disk();
    for engine in ENGINES {
        let agent = agent(engine);
        for direct in CACHES {
            for block_bytes in [1u64, 511, 512, 4096, 5000, 65536, 300_000, 1 << 20] {
                let blocks = 6;
                let path = patterned(folder.path(), "sizes", (block_bytes * 6) as usize, 1);
                let file = open(&agent, &path, direct);
                let memory = arena(&agent, (block_bytes * 6) as usize);
                check(
                    &agent,
                    (&memory, &Blocks::flat(blocks, block_bytes, &[4, 1, 2, 5])),
                    (
                        &path,
                        &file,
                        &Blocks::flat(blocks, block_bytes, &[0, 3, 4, 2]),
                    ),
                );
            }
        }
    }
}

#[test]
fn layouts_and_layer_ranges_pair_up() {
    let folder = disk();
    let block_first = BlockLayout {
        offset: 4096,
        blocks: 16,
        block_stride: 5 * 4096,
        layers: 4,
        layer_stride: 4096,
        run_bytes: 4096,
    };
    let layer_first = BlockLayout {
        offset: 100,
        blocks: 16,
        block_stride: 4096,
        layers: 6,
        layer_stride: 17 * 4096,
        run_bytes: 4096,
    };
    for engine in ENGINES {
        let agent = agent(engine);
        for direct in CACHES {
            for (local, stored) in [
                (block_first, layer_first),
                (layer_first, block_first),
                (layer_first, layer_first),
            ] {
                let path = patterned(folder.path(), "layouts", 110 * 4096, 2);
                let file = open(&agent, &path, direct);
                let memory = arena(&agent, 110 * 4096);
                let blocks = |layout, seed, layers| Blocks {
                    layout,
                    ids: scattered(16, 9, seed).into(),
                    layers,
                };
                check(
                    &agent,
                    (&memory, &blocks(local, 3, 1..4)),
                    (&path, &file, &blocks(stored, 4, 0..3)),
                );
            }
        }
    }
}

#[test]
fn descriptor_lists_of_any_shape() {
    let folder = disk();
    for engine in ENGINES {
        let agent = agent(engine);
        for direct in CACHES {
            let path = patterned(folder.path(), "lists", 300_000, 5);
            let file = open(&agent, &path, direct);
            let (a, b) = (arena(&agent, 200_000), arena(&agent, 100_000));
            let (mut in_a, mut in_b) = (fill(&a, 6), fill(&b, 7));
            let mut content = pattern(300_000, 5);
            // Neighbours, odd lengths, two regions, backwards in the file.
            let list = [
                (&a, 0usize, 250_000usize, 4096usize),
                (&a, 4096, 254_096, 4096),
                (&b, 1, 100_003, 77_777),
                (&a, 100_000, 0, 100_000),
                (&b, 90_000, 200_000, 1),
            ];
            let local: Vec<_> = list
                .iter()
                .map(|&(registration, offset, _, bytes)| Descriptor {
                    registration,
                    offset: offset as u64,
                    bytes: bytes as u64,
                })
                .collect();
            let offsets: Vec<u64> = list.iter().map(|item| item.2 as u64).collect();
            let ranges = FileRanges {
                file: &file,
                offsets: &offsets,
                durable: false,
            };
            let write = agent
                .prepare_file_descriptors(Op::Write, &local, ranges)
                .unwrap();
            run(&write).unwrap();
            for &(region, offset, at, bytes) in &list {
                let from = if std::ptr::eq(region, &a) {
                    &in_a
                } else {
                    &in_b
                };
                content[at..at + bytes].copy_from_slice(&from[offset..offset + bytes]);
            }
            assert!(file_bytes(&path) == content);

            in_a = fill(&a, 8);
            in_b = fill(&b, 9);
            let read = agent
                .prepare_file_descriptors(Op::Read, &local, ranges)
                .unwrap();
            run(&read).unwrap();
            for &(region, offset, at, bytes) in &list {
                let to = if std::ptr::eq(region, &a) {
                    &mut in_a
                } else {
                    &mut in_b
                };
                to[offset..offset + bytes].copy_from_slice(&content[at..at + bytes]);
            }
            assert!(bytes(&a) == in_a && bytes(&b) == in_b);
        }
    }
}

#[test]
fn memory_of_the_caller_works_whatever_its_alignment() {
    let folder = disk();
    for engine in ENGINES {
        let agent = agent(engine);
        let path = patterned(folder.path(), "caller", 64 * 4096, 1);
        let file = open(&agent, &path, DirectIo::On);
        let memory = agent
            .register(vec![0u8; 64 * 4096 + 1], RemoteAccess::None)
            .unwrap();
        let shifted = Blocks {
            layout: BlockLayout {
                offset: 1,
                ..BlockLayout::contiguous(64, 4096)
            },
            ids: (0..64).collect(),
            layers: 0..1,
        };
        let stored = Blocks::flat(64, 4096, &(0..64).collect::<Vec<_>>());
        check(&agent, (&memory, &shifted), (&path, &file, &stored));
    }
}

#[test]
fn plans_say_how_they_will_run() {
    let folder = disk();
    for engine in ENGINES {
        let agent = agent(engine);
        let path = patterned(folder.path(), "plans", 1 << 20, 1);
        let memory = arena(&agent, 1 << 20);
        let all: Vec<u32> = (0..256).collect();
        let stored = Blocks::flat(256, 4096, &all);
        let file = open(&agent, &path, DirectIo::On);
        let DirectUse::Direct {
            memory_align,
            offset_align,
        } = *file.direct()
        else {
            panic!("asked for direct requests: {:?}", file.direct());
        };
        assert!(memory_align.is_power_of_two() && offset_align.is_power_of_two());

        // All of it is one run in the file: 32 KiB a request.
        let plan = |local: &Blocks| {
            let prepared = prepare(&agent, Op::Write, (&memory, local), (&file, &stored)).unwrap();
            prepared.plan().clone()
        };
        let straight = plan(&stored);
        assert_eq!((straight.lane, straight.parts), (Lane::File, 32));
        assert!(straight.reason.contains("O_DIRECT"), "{}", straight.reason);
        assert!(
            straight.reason.contains("32 requests"),
            "{}",
            straight.reason
        );
        let backwards = plan(&Blocks::flat(
            256,
            4096,
            &all.iter().rev().copied().collect::<Vec<_>>(),
        ));
        assert_eq!((backwards.pieces, backwards.parts), (256, 32));
        assert!(backwards.reason.contains("32 of them vectored"));

        // Unaligned parts are counted, not hidden.
        let odd = Blocks {
            layout: BlockLayout {
                offset: 512,
                ..BlockLayout::contiguous(200, 5000)
            },
            ids: [7].into(),
            layers: 0..1,
        };
        let prepared = prepare(&agent, Op::Write, (&memory, &odd), (&file, &odd)).unwrap();
        let reason = &prepared.plan().reason;
        assert!(reason.contains("not aligned"), "{reason}");

        let buffered = open(&agent, &path, DirectIo::Off);
        assert!(
            buffered
                .lane()
                .reason
                .contains("through the page cache: asked for")
        );
    }
}

#[test]
fn files_in_memory_are_buffered_and_say_so() {
    let Some(folder) = memory_folder() else {
        return;
    };
    for engine in ENGINES {
        let agent = agent(engine);
        let path = patterned(folder.path(), "memory", 100_000, 1);
        let file = open(&agent, &path, DirectIo::Auto);
        let DirectUse::Buffered(why) = file.direct() else {
            panic!("{:?}", file.direct());
        };
        assert!(why.contains("in memory"), "{why}");
        let memory = arena(&agent, 100_000);
        check(
            &agent,
            (&memory, &Blocks::flat(20, 5000, &[3, 1, 2, 19])),
            (&path, &file, &Blocks::flat(20, 5000, &[0, 7, 8, 11])),
        );
    }
}

#[test]
fn many_transfers_at_a_time_on_several_files() {
    let folder = disk();
    for engine in ENGINES {
        let agent = agent(engine);
        let memory = arena(&agent, 64 * 16384);
        let written = fill(&memory, 3);
        let files: Vec<_> = (0..4)
            .map(|i| {
                let path = folder.path().join(format!("many-{i}"));
                let config = FileConfig::new(&path).create(64 * 16384);
                (path, agent.open_file(config).unwrap())
            })
            .collect();
        for op in [Op::Write, Op::Read] {
            if op == Op::Read {
                memory.write_at(0, &vec![0; memory.len()]).unwrap();
            }
            let mut transfers: Vec<Transfer> = Vec::new();
            // Block `b` of the memory belongs to file `b % 4`.
            for block in 0..64u32 {
                let blocks = Blocks::flat(64, 16384, &[block]);
                let file = &files[block as usize % 4].1;
                let prepared = prepare(&agent, op, (&memory, &blocks), (file, &blocks)).unwrap();
                transfers.push(prepared.post(PostOptions::within(WAIT)).unwrap());
            }
            for transfer in transfers {
                transfer.wait(WAIT).unwrap();
            }
        }
        assert!(bytes(&memory) == written);
        for (i, (path, _)) in files.iter().enumerate() {
            let content = file_bytes(path);
            for block in 0..64 {
                let range = block * 16384..(block + 1) * 16384;
                let expected = if block % 4 == i {
                    &written[range.clone()]
                } else {
                    &[0; 16384]
                };
                assert!(&content[range] == expected, "file {i}, block {block}");
            }
        }
        assert_eq!(agent.stats().in_flight, 0);
    }
}

#[test]
fn files_are_made_extended_and_described() {
    let folder = disk();
    let agent = agent(ENGINES[0]);
    let path = folder.path().join("made");
    let file = agent
        .open_file(FileConfig::new(&path).create(1 << 20))
        .unwrap();
    let info = file.query().unwrap();
    assert_eq!((info.length, info.read_only), (1 << 20, false));
    assert_eq!(info.allocated, 0);
    assert!(info.modified > Duration::from_secs(1_000_000_000));

    // Longer stays longer; blocks can be had beforehand.
    let mut config = FileConfig::new(&path).create(65536);
    config.preallocate = true;
    let again = agent.open_file(config).unwrap();
    let info = again.query().unwrap();
    assert_eq!(info.length, 1 << 20);
    assert!(info.allocated >= 65536, "{info:?}");
    assert_eq!(info.inode, file.query().unwrap().inode);

    // A write behind the end makes it longer.
    let memory = arena(&agent, 4096);
    let stored = Blocks {
        layout: BlockLayout {
            offset: 2 << 20,
            ..BlockLayout::contiguous(1, 4096)
        },
        ids: [0].into(),
        layers: 0..1,
    };
    let local = Blocks::flat(1, 4096, &[0]);
    run(&prepare(&agent, Op::Write, (&memory, &local), (&file, &stored)).unwrap()).unwrap();
    assert_eq!(file.query().unwrap().length, (2 << 20) + 4096);

    let mut new = FileConfig::new(&path);
    new.creation = FileCreation::New;
    let error = agent.open_file(new).unwrap_err().to_string();
    assert!(
        error.contains("made") && error.contains("exists"),
        "{error}"
    );
}

#[test]
fn descriptors_are_taken_over() {
    let folder = disk();
    for engine in ENGINES {
        let agent = agent(engine);
        let path = patterned(folder.path(), "descriptor", 40_960, 1);
        // An appending descriptor would put every write at the end of the file.
        let fd: OwnedFd = std::fs::File::options()
            .read(true)
            .append(true)
            .open(&path)
            .unwrap()
            .into();
        let file = agent.open_file(FileConfig::descriptor(fd)).unwrap();
        assert!(file.name().contains("descriptor"), "{}", file.name());
        let memory = arena(&agent, 40_960);
        check(
            &agent,
            (&memory, &Blocks::flat(10, 4096, &[1, 2, 9])),
            (&path, &file, &Blocks::flat(10, 4096, &[0, 5, 4])),
        );

        let fd: OwnedFd = std::fs::File::open(&path).unwrap().into();
        let error = agent.open_file(FileConfig::descriptor(fd)).unwrap_err();
        assert!(error.to_string().contains("reading only"), "{error}");
        let fd: OwnedFd = std::fs::File::open(&path).unwrap().into();
        let mut config = FileConfig::descriptor(fd);
        config.access = FileAccess::ReadOnly;
        agent.open_file(config).unwrap();
    }
}

#[test]
fn notifications_follow_the_bytes_to_this_agent() {
    let folder = disk();
    for engine in ENGINES {
        let agent = agent(engine);
        let path = patterned(folder.path(), "notify", 65536, 1);
        let file = open(&agent, &path, DirectIo::Auto);
        let memory = arena(&agent, 65536);
        let blocks = Blocks::flat(16, 4096, &(0..16).collect::<Vec<_>>());
        let prepared = prepare(&agent, Op::Read, (&memory, &blocks), (&file, &blocks)).unwrap();
        for i in 0u8..20 {
            let options = PostOptions::within(WAIT).notify(vec![i]);
            prepared.post(options).unwrap().detach();
        }
        for i in 0u8..20 {
            let note = agent.notifications().recv_timeout(WAIT).unwrap();
            assert_eq!((&*note.from, &note.payload[..]), ("store", &[i][..]));
            assert_eq!(note.epoch, agent.epoch());
        }
        assert!(bytes(&memory) == pattern(65536, 1));
    }
}

//! Durability: syncs come after the bytes that they are about.

use std::time::Duration;

use blockplane_transfer::{DirectIo, FileBlocks, Op, PostOptions};

use crate::support::{
    Blocks, CACHES, ENGINES, WAIT, agent, arena, disk, file_bytes, fill, open, patterned, run,
};

#[test]
fn a_durable_write_ends_with_a_sync() {
    let folder = disk();
    for engine in ENGINES {
        let agent = agent(engine);
        for direct in CACHES {
            let path = patterned(folder.path(), "durable", 1 << 20, 1);
            let file = open(&agent, &path, direct);
            let memory = arena(&agent, 1 << 20);
            let written = fill(&memory, 2);
            let blocks = Blocks::flat(256, 4096, &(0..256).collect::<Vec<_>>());
            let durable = FileBlocks {
                durable: true,
                ..blocks.file(&file)
            };
            let prepared = agent
                .prepare_file(Op::Write, blocks.local(&memory), durable.clone())
                .unwrap();
            // 32 requests of 32 KiB and the sync.
            assert_eq!(prepared.plan().parts, 33);
            assert!(prepared.plan().reason.ends_with("then fdatasync"));
            for _ in 0..3 {
                run(&prepared).unwrap();
            }
            assert!(file_bytes(&path) == written);

            let read = agent
                .prepare_file(Op::Read, blocks.local(&memory), durable)
                .unwrap();
            assert_eq!(read.plan().parts, 32);
        }
    }
}

#[test]
fn a_file_can_be_synced_on_its_own() {
    let folder = disk();
    for engine in ENGINES {
        let agent = agent(engine);
        let path = patterned(folder.path(), "sync", 8192, 1);
        let file = open(&agent, &path, DirectIo::Off);
        let memory = arena(&agent, 8192);
        fill(&memory, 4);
        let blocks = Blocks::flat(2, 4096, &[1, 0]);
        let write = agent
            .prepare_file(Op::Write, blocks.local(&memory), blocks.file(&file))
            .unwrap();
        write
            .post(PostOptions::within(WAIT))
            .unwrap()
            .wait(WAIT)
            .unwrap();
        file.sync(PostOptions::within(WAIT))
            .unwrap()
            .wait(WAIT)
            .unwrap();
        assert_eq!(agent.stats().transfers_done, 2);
        let late = file
            .sync(PostOptions::within(Duration::ZERO))
            .unwrap()
            .wait(WAIT);
        assert!(late.is_ok() || late.unwrap_err().to_string().contains("not done within"));
    }
}

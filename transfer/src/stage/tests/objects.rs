//! Object stores.

use std::time::Duration;

use super::support::{
    Blocks, GUARD, Mode, WAIT, agent_with, broken, bytes, device, fill, oracle, run, scattered,
};
use crate::{
    Agent, BlockLayout, CancelOutcome, Lane, ObjectBlocks, ObjectConfig, ObjectLocation,
    ObjectStore, Op, PostOptions, PrepareError, StorageErrorKind, TransferError,
};

fn keys(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("block/{i:04}")).collect()
}

fn objects<'a>(store: &'a ObjectStore, keys: &'a [String]) -> ObjectBlocks<'a> {
    ObjectBlocks {
        store,
        keys,
        range: None,
        create_only: false,
    }
}

/// A store in memory and one in a folder.
fn stores(agent: &Agent) -> (Vec<ObjectStore>, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let configs = [
        ObjectConfig::new(ObjectLocation::Memory),
        ObjectConfig::new(ObjectLocation::Folder(folder.path().join("objects"))),
    ];
    let open = |config| agent.open_objects(config).unwrap();
    (configs.iter().map(open).collect(), folder)
}

/// 40 blocks of three layers of 7,000 bytes: three objects a slot.
fn layered() -> Blocks {
    let layout = BlockLayout {
        offset: 100,
        blocks: 50,
        block_stride: 7000,
        layers: 4,
        layer_stride: 400_000,
        run_bytes: 7000,
    };
    Blocks {
        layout,
        ids: scattered(50, 40, 5).into(),
        layers: 1..4,
    }
}

#[test]
fn blocks_come_back_from_objects() {
    let (agent, near) = agent_with("store", |_| {});
    let (stores, _folder) = stores(&agent);
    let memory = device(&agent, 2 << 20);
    let there = layered();
    for store in &stores {
        let written = fill(&memory, 1);
        let keys = keys(40);
        near.set(Mode::Plain);
        let write = agent
            .prepare_objects(Op::Write, there.local(&memory), objects(store, &keys))
            .unwrap();
        let plan = write.plan();
        assert_eq!(
            (plan.lane, plan.parts),
            (Lane::Object, 14),
            "3 of 40 objects a part"
        );
        for part in [
            "staged through 4 slots",
            "devices do not reach objects",
            "40 objects",
        ] {
            assert!(plan.reason.contains(part), "{}", plan.reason);
        }
        run(&write).unwrap();
        assert_eq!(near.begun(), 14);
        let found = store.query(&keys, WAIT).unwrap();
        assert!(
            found
                .iter()
                .all(|info| info.as_ref().is_some_and(|info| info.length == 21_000))
        );

        let mut expected = fill(&memory, 2);
        let read = agent
            .prepare_objects(Op::Read, there.local(&memory), objects(store, &keys))
            .unwrap();
        run(&read).unwrap();
        oracle(&written, &there, &mut expected, &there);
        assert!(bytes(&memory) == expected);

        // A range of each object: the second layer.
        let mut expected = fill(&memory, 3);
        let second = Blocks {
            layers: 2..3,
            ..layered()
        };
        let ranged = ObjectBlocks {
            range: Some(7000..14_000),
            ..objects(store, &keys)
        };
        let read = agent.prepare_objects(Op::Read, second.local(&memory), ranged);
        run(&read.unwrap()).unwrap();
        oracle(&written, &second, &mut expected, &second);
        assert!(bytes(&memory) == expected);
    }
}

#[test]
fn objects_go_whole_or_not_at_all() {
    let (agent, near) = agent_with("store", |_| {});
    let (stores, _folder) = stores(&agent);
    let memory = device(&agent, 2 << 20);
    for store in &stores {
        let large = Blocks::flat(4, 65_537, 0..4);
        let keys = keys(4);
        let write = agent.prepare_objects(Op::Write, large.local(&memory), objects(store, &keys));
        let error = write.unwrap_err();
        let sizes = PrepareError::LargerThanSlot {
            bytes: 65_537,
            slot_bytes: 65_536,
        };
        assert_eq!(error, sizes);
        assert!(
            error.to_string().contains("cuda.staging.slot_bytes"),
            "{error}"
        );

        let fits = Blocks::flat(8, 65_536, 0..4);
        let write = agent
            .prepare_objects(Op::Write, fits.local(&memory), objects(store, &keys))
            .unwrap();
        near.set(Mode::Fails(1));
        assert_eq!(run(&write), Err(TransferError::Device(broken())));
        near.set(Mode::Plain);
        let found = store.query(&keys, WAIT).unwrap();
        assert!(found.iter().flatten().all(|info| info.length == 65_536));
        assert!(found.iter().flatten().count() <= 1);
        // Errors of the store keep their type.
        let read = agent
            .prepare_objects(Op::Read, fits.local(&memory), objects(store, &keys))
            .unwrap();
        let Err(TransferError::Storage(error)) = run(&read) else {
            panic!("objects that are missing were read");
        };
        assert_eq!(error.kind, StorageErrorKind::NotFound, "{error}");
        run(&write).unwrap();
        let fresh = ObjectBlocks {
            create_only: true,
            ..objects(store, &keys)
        };
        let write = agent
            .prepare_objects(Op::Write, fits.local(&memory), fresh)
            .unwrap();
        let Err(TransferError::Storage(error)) = run(&write) else {
            panic!("objects were written twice");
        };
        assert!(
            matches!(error.kind, StorageErrorKind::Precondition(_)),
            "{error}"
        );
    }
}

#[test]
fn cancelled_at_any_moment_nothing_lands_later() {
    let (agent, near) = agent_with("store", |_| {});
    let (stores, _folder) = stores(&agent);
    let (memory, other) = (device(&agent, 2 << 20), device(&agent, 2 << 20));
    let blocks = Blocks::flat(32, 60_000, scattered(32, 32, 1));
    let keys = keys(32);
    for store in &stores {
        near.set(Mode::Plain);
        fill(&memory, 1);
        let prepare = |op, memory| {
            let stored = objects(store, &keys);
            agent
                .prepare_objects(op, blocks.local(memory), stored)
                .unwrap()
        };
        run(&prepare(Op::Write, &memory)).unwrap();
        near.set(Mode::Slow(Duration::from_micros(300)));
        let (read, next) = (prepare(Op::Read, &memory), prepare(Op::Read, &other));
        let mut cancelled = 0;
        for round in 0..20u32 {
            let transfer = read.post(PostOptions::within(WAIT)).unwrap();
            std::thread::park_timeout(Duration::from_micros(200) * round);
            cancelled += u32::from(transfer.cancel() == CancelOutcome::Cancelled);
            memory.write_at(0, &vec![GUARD; memory.len()]).unwrap();
            run(&next).unwrap();
            assert!(
                bytes(&memory).iter().all(|&byte| byte == GUARD),
                "round {round}"
            );
        }
        assert!(cancelled > 3, "{cancelled}");
    }
}

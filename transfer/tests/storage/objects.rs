//! Object stores: memory, folders, and S3 as a stand-in server speaks it.

use std::time::Duration;

use blockplane_transfer::{
    Agent, AgentConfig, BlockLayout, CancelOutcome, Lane, ObjectBlocks, ObjectConfig,
    ObjectLocation, ObjectStore, Op, PostOptions, PrepareError, Registration, S3Config,
    S3Credentials, StorageAction, StorageErrorKind, TransferError,
};
use tempfile::TempDir;

use crate::server::{Fault, Server};
use crate::support::{Blocks, WAIT, arena, bytes, disk, eventually, fill, run, scattered};

fn agent() -> Agent {
    agent_with(|_| {})
}

fn agent_with(change: impl Fn(&mut AgentConfig)) -> Agent {
    let mut config = AgentConfig::new("store").with_lanes([Lane::Loopback]);
    change(&mut config);
    Agent::new(config).unwrap()
}

fn s3(server: &Server) -> ObjectConfig {
    let mut s3 = S3Config::new("bucket");
    s3.endpoint = Some(server.endpoint());
    s3.credentials = S3Credentials::Keys {
        id: "id".to_owned(),
        secret: "secret".into(),
        token: None,
    };
    let mut config = ObjectConfig::new(ObjectLocation::S3(s3)).with_prefix("kv/model");
    config.retry_pause = Duration::from_millis(1);
    config
}

/// One store of each kind, and what they live in.
fn stores(agent: &Agent) -> (Vec<ObjectStore>, TempDir, Server) {
    let (folder, server) = (disk(), Server::start());
    let configs = [
        ObjectConfig::new(ObjectLocation::Memory),
        ObjectConfig::new(ObjectLocation::Folder(folder.path().join("objects")))
            .with_prefix("deep/er"),
        s3(&server),
    ];
    let stores = configs
        .iter()
        .map(|config| agent.open_objects(config).unwrap())
        .collect();
    (stores, folder, server)
}

fn keys(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("block/{i:04}")).collect()
}

fn blocks<'a>(store: &'a ObjectStore, keys: &'a [String]) -> ObjectBlocks<'a> {
    ObjectBlocks {
        store,
        keys,
        range: None,
        create_only: false,
    }
}

/// Posts an operation on whole objects and waits for it.
fn transfer(
    agent: &Agent,
    op: Op,
    (memory, local): (&Registration, &Blocks),
    objects: ObjectBlocks<'_>,
) -> Result<(), TransferError> {
    let prepared = agent
        .prepare_objects(op, local.local(memory), objects)
        .unwrap();
    run(&prepared)
}

fn storage_error(result: Result<(), TransferError>) -> blockplane_transfer::StorageError {
    match result {
        Err(TransferError::Storage(error)) => error,
        other => panic!("not an error of storage: {other:?}"),
    }
}

#[test]
fn blocks_come_back_from_every_store() {
    let agent = agent();
    let (stores, _folder, server) = stores(&agent);
    let layout = BlockLayout {
        offset: 100,
        blocks: 32,
        block_stride: 1000,
        layers: 4,
        layer_stride: 40_000,
        run_bytes: 1000,
    };
    for store in &stores {
        let memory = arena(&agent, 170_000);
        let before = fill(&memory, 7);
        let keys = keys(20);
        let local = Blocks {
            layout,
            ids: scattered(32, 20, 3).into(),
            layers: 1..4,
        };
        let write = agent
            .prepare_objects(Op::Write, local.local(&memory), blocks(store, &keys))
            .unwrap();
        assert_eq!((write.plan().lane, write.plan().parts), (Lane::Object, 20));
        assert_eq!(write.plan().bytes, 20 * 3 * 1000);
        run(&write).unwrap();

        // An object is the layers of its block, one after another.
        if store.name().starts_with("s3://") {
            let object = server.object("/bucket/kv/model/block/0003").unwrap();
            let id = local.ids.iter().nth(3).unwrap();
            let mut expected = Vec::new();
            for layer in 1..4 {
                let at = layout.run_offset(id, layer).unwrap() as usize;
                expected.extend_from_slice(&before[at..at + 1000]);
            }
            assert!(object == expected);
        }

        let mut expected = fill(&memory, 8);
        transfer(&agent, Op::Read, (&memory, &local), blocks(store, &keys)).unwrap();
        for id in local.ids.iter() {
            for layer in 1..4 {
                let at = layout.run_offset(id, layer).unwrap() as usize;
                expected[at..at + 1000].copy_from_slice(&before[at..at + 1000]);
            }
        }
        assert!(bytes(&memory) == expected, "{}", store.name());

        // A range of each object: the second layer only.
        let part = Blocks {
            layers: 2..3,
            ..local.clone()
        };
        let mut expected = fill(&memory, 9);
        let range = ObjectBlocks {
            range: Some(1000..2000),
            ..blocks(store, &keys)
        };
        transfer(&agent, Op::Read, (&memory, &part), range).unwrap();
        for id in part.ids.iter() {
            let at = layout.run_offset(id, 2).unwrap() as usize;
            expected[at..at + 1000].copy_from_slice(&before[at..at + 1000]);
        }
        assert!(bytes(&memory) == expected, "{}", store.name());

        let found = store.query(&keys, WAIT).unwrap();
        assert!(
            found
                .iter()
                .all(|info| info.as_ref().unwrap().length == 3000)
        );
        store.delete(&keys[..5], WAIT).unwrap();
        store.delete(&keys[..5], WAIT).unwrap();
        let found = store.query(&keys, WAIT).unwrap();
        assert!(found[..5].iter().all(Option::is_none));
        assert!(found[5..].iter().all(Option::is_some));
    }
}

#[test]
fn stores_say_what_they_have() {
    let agent = agent();
    let (stores, _folder, server) = stores(&agent);
    server.put("/bucket/kv/model2/block/x", vec![1; 10]);
    for store in &stores {
        let memory = arena(&agent, 16 * 100);
        let local = Blocks::flat(16, 100, &(0..11).collect::<Vec<_>>());
        let mut keys = keys(10);
        keys.push("blocks".to_owned());
        let nothing = store.list(None, 5, WAIT).unwrap();
        assert!(nothing.complete && nothing.objects.is_empty());
        transfer(&agent, Op::Write, (&memory, &local), blocks(store, &keys)).unwrap();

        let mut all = store.list(None, 100, WAIT).unwrap();
        all.objects.sort();
        let named = |keys: &[String]| keys.iter().map(|key| (key.clone(), 100)).collect();
        let expected: Vec<(String, u64)> = named(&keys);
        assert_eq!((all.objects, all.complete), (expected, true));
        let mut below = store.list(Some("block"), 10, WAIT).unwrap();
        below.objects.sort();
        assert_eq!(below.objects, named(&keys[..10]));
        assert!(below.complete, "exactly as many as asked for");
        let some = store.list(Some("block"), 7, WAIT).unwrap();
        assert_eq!((some.objects.len(), some.complete), (7, false));
        let none = store.list(Some("bloc"), 7, WAIT).unwrap();
        assert!(none.complete && none.objects.is_empty());

        let bad = store.list(Some("a//b"), 7, WAIT).unwrap_err();
        assert_eq!(bad.action, StorageAction::List);
    }
    let store = &stores[2];
    server.fail("GET", Fault::Status(403), 1);
    let denied = store.list(Some("block"), 7, WAIT).unwrap_err();
    assert_eq!(denied.kind, StorageErrorKind::Denied);
    assert!(
        denied
            .to_string()
            .starts_with("cannot list s3://bucket/kv/model/block "),
        "{denied}"
    );
    server.fail("GET", Fault::Silence, 1);
    let started = std::time::Instant::now();
    let late = store.list(None, 7, Duration::from_millis(50)).unwrap_err();
    assert_eq!(late.kind, StorageErrorKind::TimedOut);
    assert!(started.elapsed() < WAIT / 2);
}

#[test]
fn large_objects_are_written_in_parts() {
    let agent = agent_with(|config| config.storage.object_part_bytes = 5 << 20);
    let (stores, _folder, server) = stores(&agent);
    for store in &stores {
        let memory = arena(&agent, 2 * (12 << 20));
        let written = fill(&memory, 3);
        let local = Blocks::flat(2, 12 << 20, &[1, 0]);
        let keys = keys(2);
        let write = agent
            .prepare_objects(Op::Write, local.local(&memory), blocks(store, &keys))
            .unwrap();
        assert!(write.plan().reason.contains("each in 3 parts"));
        run(&write).unwrap();
        memory.write_at(0, &vec![0; memory.len()]).unwrap();
        transfer(&agent, Op::Read, (&memory, &local), blocks(store, &keys)).unwrap();
        assert!(bytes(&memory) == written, "{}", store.name());
    }
    assert_eq!(server.seen("partNumber=3"), 2);
    assert_eq!(server.open_uploads(), 0);
}

#[test]
fn an_upload_that_fails_is_called_off() {
    let agent = agent_with(|config| config.storage.object_part_bytes = 5 << 20);
    let server = Server::start();
    let store = agent.open_objects(&s3(&server)).unwrap();
    let memory = arena(&agent, 12 << 20);
    let local = Blocks::flat(1, 12 << 20, &[0]);
    server.fail("PUT", Fault::Status(403), 1);
    let keys = keys(1);
    let failed = transfer(&agent, Op::Write, (&memory, &local), blocks(&store, &keys));
    assert_eq!(storage_error(failed).kind, StorageErrorKind::Denied);
    server.wait_for("DELETE", 1);
    eventually("the upload is gone", || server.open_uploads() == 0);
    assert!(server.object("/bucket/kv/model/block/0000").is_none());
}

#[test]
fn refusals_that_pass_are_tried_again() {
    let agent = agent();
    let server = Server::start();
    let store = agent.open_objects(&s3(&server)).unwrap();
    let memory = arena(&agent, 4096);
    let written = fill(&memory, 1);
    let local = Blocks::flat(1, 4096, &[0]);
    let keys = keys(1);
    server.fail("PUT", Fault::Status(503), 2);
    transfer(&agent, Op::Write, (&memory, &local), blocks(&store, &keys)).unwrap();
    assert_eq!(server.seen("PUT"), 3);
    server.fail("GET", Fault::Status(500), 1);
    memory.write_at(0, &[0; 4096]).unwrap();
    transfer(&agent, Op::Read, (&memory, &local), blocks(&store, &keys)).unwrap();
    assert!(bytes(&memory) == written);
}

#[test]
fn errors_have_their_kind() {
    let agent = agent();
    let server = Server::start();
    let mut config = s3(&server);
    config.retries_max = 1;
    let store = agent.open_objects(&config).unwrap();
    let memory = arena(&agent, 4096);
    let local = Blocks::flat(1, 4096, &[0]);
    let keys = keys(1);
    let read = || {
        storage_error(transfer(
            &agent,
            Op::Read,
            (&memory, &local),
            blocks(&store, &keys),
        ))
    };
    let missing = read();
    assert_eq!(missing.kind, StorageErrorKind::NotFound);
    assert_eq!(missing.action, StorageAction::Read);
    assert_eq!(missing.store, "s3://bucket/kv/model/block/0000");

    server.fail("GET", Fault::Status(403), 1);
    assert_eq!(read().kind, StorageErrorKind::Denied);
    server.fail("GET", Fault::Status(503), 2);
    let throttled = read();
    assert_eq!(throttled.kind, StorageErrorKind::Throttled);
    assert!(throttled.retryable());

    for bytes in [4095usize, 4097] {
        server.put("/bucket/kv/model/block/0000", vec![1; bytes]);
        assert_eq!(
            read().kind,
            StorageErrorKind::Length {
                expected: 4096,
                got: bytes as u64
            }
        );
    }
    // A range that the object does not have whole.
    let range = ObjectBlocks {
        range: Some(100..4196),
        ..blocks(&store, &keys)
    };
    let short = storage_error(transfer(&agent, Op::Read, (&memory, &local), range));
    assert_eq!(
        short.kind,
        StorageErrorKind::Length {
            expected: 4096,
            got: 3997
        }
    );

    let create = ObjectBlocks {
        create_only: true,
        ..blocks(&store, &keys)
    };
    let exists = storage_error(transfer(&agent, Op::Write, (&memory, &local), create));
    assert!(
        matches!(exists.kind, StorageErrorKind::Precondition(_)),
        "{exists}"
    );
    assert_eq!(
        server.object("/bucket/kv/model/block/0000").unwrap(),
        [1; 4097]
    );
}

#[test]
fn local_stores_say_the_same() {
    let agent = agent();
    let (stores, _folder, _server) = stores(&agent);
    let memory = arena(&agent, 4096);
    let local = Blocks::flat(1, 4096, &[0]);
    let keys = keys(1);
    for store in &stores[..2] {
        let read = || transfer(&agent, Op::Read, (&memory, &local), blocks(store, &keys));
        assert_eq!(storage_error(read()).kind, StorageErrorKind::NotFound);
        let half = Blocks::flat(2, 2048, &[1]);
        transfer(&agent, Op::Write, (&memory, &half), blocks(store, &keys)).unwrap();
        assert_eq!(
            storage_error(read()).kind,
            StorageErrorKind::Length {
                expected: 4096,
                got: 2048
            }
        );
        let create = ObjectBlocks {
            create_only: true,
            ..blocks(store, &keys)
        };
        let exists = storage_error(transfer(&agent, Op::Write, (&memory, &local), create));
        assert!(
            matches!(exists.kind, StorageErrorKind::Precondition(_)),
            "{exists}"
        );
    }
}

#[test]
fn a_silent_store_is_an_error_in_time() {
    let agent = agent();
    let server = Server::start();
    let mut config = s3(&server);
    config.retries_max = 0;
    config.request_timeout = Duration::from_millis(50);
    let store = agent.open_objects(&config).unwrap();
    let memory = arena(&agent, 4096);
    let local = Blocks::flat(1, 4096, &[0]);
    let keys = keys(1);
    server.fail("GET", Fault::Silence, 1);
    let late = transfer(&agent, Op::Read, (&memory, &local), blocks(&store, &keys));
    assert_eq!(storage_error(late).kind, StorageErrorKind::TimedOut);
    server.fail("HEAD", Fault::Silence, 1);
    let late = store.query(&keys, WAIT).unwrap_err();
    assert_eq!(
        (late.action, late.kind),
        (StorageAction::Query, StorageErrorKind::TimedOut)
    );
}

#[test]
fn deadlines_and_cancels_end_requests_under_way() {
    let agent = agent();
    let server = Server::start();
    let store = agent.open_objects(&s3(&server)).unwrap();
    let memory = arena(&agent, 8 * 4096);
    let local = Blocks::flat(8, 4096, &(0..8).collect::<Vec<_>>());
    let keys = keys(8);
    for (method, op) in [("GET", Op::Read), ("PUT", Op::Write)] {
        let prepared = agent
            .prepare_objects(op, local.local(&memory), blocks(&store, &keys))
            .unwrap();
        server.fail(method, Fault::Silence, 16);
        let deadline = Duration::from_millis(30);
        let late = prepared.post(PostOptions::within(deadline)).unwrap();
        assert_eq!(
            late.wait(WAIT),
            Err(TransferError::DeadlineExceeded { deadline })
        );
        let seen = server.seen(method);
        let transfer = prepared.post(PostOptions::within(WAIT)).unwrap();
        server.wait_for(method, seen + 1);
        assert_eq!(transfer.cancel(), CancelOutcome::Cancelled);
    }
    assert_eq!(agent.stats().in_flight, 0);
}

#[test]
fn a_body_that_breaks_does_not_pass() {
    let agent = agent();
    let server = Server::start();
    let mut config = s3(&server);
    config.retries_max = 1;
    let store = agent.open_objects(&config).unwrap();
    let memory = arena(&agent, 1 << 20);
    let written = fill(&memory, 1);
    let local = Blocks::flat(1, 1 << 20, &[0]);
    let keys = keys(1);
    transfer(&agent, Op::Write, (&memory, &local), blocks(&store, &keys)).unwrap();
    memory.write_at(0, &vec![0; memory.len()]).unwrap();
    server.fail("GET", Fault::HalfBody, 1);
    match transfer(&agent, Op::Read, (&memory, &local), blocks(&store, &keys)) {
        // The client may have asked for the rest.
        Ok(()) => assert!(bytes(&memory) == written),
        Err(TransferError::Storage(error)) => assert!(error.offset > 0, "{error}"),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn requests_are_bounded() {
    let agent = agent_with(|config| config.storage.object_concurrency = 3);
    let server = Server::start();
    let store = agent.open_objects(&s3(&server)).unwrap();
    let memory = arena(&agent, 64 * 1024);
    let written = fill(&memory, 5);
    let ids: Vec<u32> = (0..64).collect();
    let local = Blocks::flat(64, 1024, &ids);
    let keys = keys(64);
    let write = agent
        .prepare_objects(Op::Write, local.local(&memory), blocks(&store, &keys))
        .unwrap();
    let several: Vec<_> = (0..4)
        .map(|_| write.post(PostOptions::within(WAIT)).unwrap())
        .collect();
    for transfer in several {
        transfer.wait(WAIT).unwrap();
    }
    assert!(server.most_at_a_time() <= 3, "{}", server.most_at_a_time());
    assert_eq!(server.seen("PUT"), 4 * 64);
    memory.write_at(0, &vec![0; memory.len()]).unwrap();
    transfer(&agent, Op::Read, (&memory, &local), blocks(&store, &keys)).unwrap();
    assert!(bytes(&memory) == written);
    assert_eq!(store.stats().transfers_done, 5);
}

#[test]
fn notifications_and_drops_work_as_elsewhere() {
    let agent = agent();
    let server = Server::start();
    let store = agent.open_objects(&s3(&server)).unwrap();
    let memory = arena(&agent, 8 * 4096);
    let local = Blocks::flat(8, 4096, &(0..8).collect::<Vec<_>>());
    let keys = keys(8);
    let write = agent
        .prepare_objects(Op::Write, local.local(&memory), blocks(&store, &keys))
        .unwrap();
    write
        .post(PostOptions::within(WAIT).notify("stored"))
        .unwrap()
        .detach();
    let note = agent.notifications().recv_timeout(WAIT).unwrap();
    assert_eq!((&*note.from, &note.payload[..]), ("store", &b"stored"[..]));
    assert!(server.object("/bucket/kv/model/block/0007").is_some());

    // Everything goes at once while requests hang.
    server.fail("PUT", Fault::Silence, 8);
    let hanging = write.post(PostOptions::within(WAIT)).unwrap();
    server.wait_for("PUT", 9);
    drop((agent, store, memory, write));
    match hanging.wait(WAIT) {
        Err(TransferError::PeerLost(_)) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn bad_requests_are_named() {
    let (agent, other) = (agent(), agent());
    let (stores, _folder, _server) = stores(&agent);
    let store = &stores[0];
    let memory = arena(&agent, 8192);
    let local = Blocks::flat(2, 4096, &[0, 1]);
    let refused = |agent: &Agent, op, objects: ObjectBlocks<'_>| {
        agent
            .prepare_objects(op, local.local(&memory), objects)
            .unwrap_err()
    };
    let good = keys(2);
    assert!(matches!(
        refused(&other, Op::Read, blocks(store, &good)),
        PrepareError::ForeignStore { .. }
    ));
    assert!(matches!(
        refused(&agent, Op::Read, blocks(store, &good[..1])),
        PrepareError::Mismatch {
            local: 2,
            remote: 1,
            ..
        }
    ));
    for bad in ["", "a//b", "../up"] {
        let keys = ["fine".to_owned(), bad.to_owned()];
        let error = refused(&agent, Op::Write, blocks(store, &keys));
        assert!(
            matches!(&error, PrepareError::InvalidKey { key, .. } if key == bad),
            "{error}"
        );
    }
    let twice = ["same".to_owned(), "same".to_owned()];
    assert!(matches!(
        refused(&agent, Op::Write, blocks(store, &twice)),
        PrepareError::InvalidKey { .. }
    ));
    let range = |range| ObjectBlocks {
        range: Some(range),
        ..blocks(store, &good)
    };
    assert_eq!(
        refused(&agent, Op::Write, range(0..4096)),
        PrepareError::RangeOfWrite
    );
    assert!(matches!(
        refused(&agent, Op::Read, range(0..4000)),
        PrepareError::Mismatch { .. }
    ));
    let mut config = ObjectConfig::new(ObjectLocation::Memory);
    config.prefix = Some("a//b".to_owned());
    let error = agent.open_objects(&config).unwrap_err().to_string();
    assert!(error.contains("prefix"), "{error}");
    assert!(!format!("{:?}", s3(&Server::start())).contains("\"secret\""));
}

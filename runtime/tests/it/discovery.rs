//! Discovery: what every store does, and what the file store does when things break.

use std::{fs, path::Path, time::Duration};

use blockplane_protocol::WorkerId;
use blockplane_runtime::discovery::{
    ChangeDetection, Discovery, DiscoveryError, FileDiscovery, FileDiscoveryConfig, Instance,
    InstanceWatch, Instances, Lease, MemoryDiscovery,
};
use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

use crate::{
    PATIENCE,
    role::{Role, listen, say},
};

/// A short lease, yet long enough for a busy machine.
const TTL: Duration = Duration::from_secs(2);

fn instance(worker: u64, address: &str) -> Instance {
    Instance {
        id: WorkerId(worker),
        endpoint: "dyn://test.decode.generate".parse().unwrap(),
        address: address.to_owned(),
        metadata: serde_json::json!({"model": "m", "blocks": 7}),
    }
}

fn files(dir: &Path) -> FileDiscovery {
    FileDiscovery::new(FileDiscoveryConfig {
        lease_ttl: TTL,
        ..FileDiscoveryConfig::new(dir)
    })
    .unwrap()
}

/// Waits until exactly these workers are there, at these addresses.
async fn expect(watch: &mut InstanceWatch, expected: &[(u64, &str)]) {
    let found = |instances: &Instances| -> Vec<(u64, String)> {
        instances
            .values()
            .map(|instance| (instance.id.0, instance.address.clone()))
            .collect()
    };
    let expected: Vec<(u64, String)> = expected
        .iter()
        .map(|&(worker, address)| (worker, address.to_owned()))
        .collect();
    let waited = tokio::time::timeout(
        PATIENCE,
        watch.wait_for(|instances| found(instances) == expected),
    )
    .await;
    assert!(
        waited.is_ok(),
        "expected {expected:?}, found {:?}",
        found(&watch.current())
    );
}

/// Fails when the instances change, to anything, within this time.
async fn expect_unchanged(watch: &InstanceWatch, during: Duration) {
    let mut watch = watch.clone();
    let before = watch.current();
    let changed =
        tokio::time::timeout(during, watch.wait_for(|instances| *instances != *before)).await;
    assert!(changed.is_err(), "changed to {:?}", changed.unwrap());
}

/// What any store does; `theirs` is the store as another process sees it.
async fn conforms(ours: &dyn Discovery, theirs: &dyn Discovery) {
    let mut watch = theirs.watch("test").await.unwrap();
    assert!(watch.current().is_empty());
    let mut other = theirs.watch("other").await.unwrap();

    let first = ours.register(instance(1, "a:1")).await.unwrap();
    expect(&mut watch, &[(1, "a:1")]).await;
    assert_eq!(watch.current()[first.key()], instance(1, "a:1"));
    let second = ours.register(instance(2, "b:1")).await.unwrap();
    expect(&mut watch, &[(1, "a:1"), (2, "b:1")]).await;
    let late = ours.watch("test").await.unwrap();
    assert_eq!(late.current().len(), 2, "the first value is complete");

    // The same key with another value replaces it, and takes the lease over.
    let replaced = ours.register(instance(1, "a:2")).await.unwrap();
    expect(&mut watch, &[(1, "a:2"), (2, "b:1")]).await;
    first.revoke().await.unwrap();
    second.revoke().await.unwrap();
    expect(&mut watch, &[(1, "a:2")]).await;
    drop(replaced);
    expect(&mut watch, &[]).await;

    // So does another process, and the two do not fight for it.
    let ours_again = ours.register(instance(3, "a:3")).await.unwrap();
    expect(&mut watch, &[(3, "a:3")]).await;
    let taken_over = theirs.register(instance(3, "b:3")).await.unwrap();
    expect(&mut watch, &[(3, "b:3")]).await;
    let mut our_watch = ours.watch("test").await.unwrap();
    expect(&mut our_watch, &[(3, "b:3")]).await;
    ours_again.revoke().await.unwrap();
    expect_unchanged(&watch, Duration::from_millis(200)).await;
    taken_over.revoke().await.unwrap();
    expect(&mut watch, &[]).await;

    let mut elsewhere = instance(1, "c:1");
    elsewhere.endpoint = "dyn://other.decode.generate".parse().unwrap();
    let _lease = ours.register(elsewhere).await.unwrap();
    expect(&mut other, &[(1, "c:1")]).await;
    assert!(watch.current().is_empty(), "namespaces are separate");
}

#[tokio::test]
async fn memory_conforms() {
    let store = MemoryDiscovery::new();
    conforms(&store, &store.clone()).await;
}

#[tokio::test]
async fn files_conform() {
    let dir = tempfile::tempdir().unwrap();
    // So long that nothing seen here is the end of a lease.
    let lasting = || {
        FileDiscovery::new(FileDiscoveryConfig {
            lease_ttl: PATIENCE * 20,
            ..FileDiscoveryConfig::new(dir.path())
        })
        .unwrap()
    };
    conforms(&lasting(), &lasting()).await;
}

#[tokio::test]
async fn polled_files_conform() {
    let dir = tempfile::tempdir().unwrap();
    let polled = || {
        FileDiscovery::new(FileDiscoveryConfig {
            lease_ttl: PATIENCE * 20,
            change_detection: ChangeDetection::Poll,
            poll_interval: Duration::from_millis(20),
            ..FileDiscoveryConfig::new(dir.path())
        })
        .unwrap()
    };
    conforms(&polled(), &polled()).await;
}

/// Registers itself until it is told to leave, by a second line of input.
#[test]
#[ignore = "a role that other tests start"]
fn role_worker() {
    let dir = listen();
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let store = files(Path::new(&dir));
        let lease = store.register(instance(9, "child:1")).await.unwrap();
        say("registered");
        tokio::task::spawn_blocking(listen).await.unwrap();
        lease.revoke().await.unwrap();
        say("left");
        tokio::task::spawn_blocking(listen).await.unwrap();
    });
}

fn start_worker(dir: &Path) -> Role {
    let mut role = Role::start("discovery::role_worker", dir.to_str().unwrap());
    assert_eq!(role.heard(), "registered");
    role
}

#[tokio::test]
async fn a_process_appears_leaves_crashes_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = files(dir.path());
    let mut watch = store.watch("test").await.unwrap();
    let mut leaver = start_worker(dir.path());
    expect(&mut watch, &[(9, "child:1")]).await;
    // Its lease is renewed for longer than it lasts.
    expect_unchanged(&watch, TTL + TTL / 2).await;
    leaver.tell("leave");
    assert_eq!(leaver.heard(), "left");
    expect(&mut watch, &[]).await;

    let mut crasher = start_worker(dir.path());
    expect(&mut watch, &[(9, "child:1")]).await;
    crasher.kill();
    assert_eq!(watch.current().len(), 1, "only the end of the lease tells");
    expect(&mut watch, &[]).await;
    // What is left of it is removed in time.
    tokio::time::timeout(PATIENCE, async {
        while fs::read_dir(dir.path()).unwrap().count() > 0 {
            tokio::time::sleep(TTL / 10).await;
        }
    })
    .await
    .expect("files of dead processes stay");

    let _again = start_worker(dir.path());
    expect(&mut watch, &[(9, "child:1")]).await;
}

#[tokio::test]
async fn leftovers_of_an_earlier_run_are_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let mut crasher = start_worker(dir.path());
    crasher.kill();
    let file = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap();
    let old = std::time::SystemTime::now() - TTL * 2;
    fs::File::options()
        .write(true)
        .open(file.path())
        .unwrap()
        .set_modified(old)
        .unwrap();
    let watch = files(dir.path()).watch("test").await.unwrap();
    assert!(watch.current().is_empty());
}

#[tokio::test]
async fn removing_the_directory_loses_nothing_and_it_comes_back() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("store");
    let ours = files(&dir);
    let theirs = files(&dir);
    let _lease = ours.register(instance(1, "a:1")).await.unwrap();
    let mut watch = theirs.watch("test").await.unwrap();
    let worker = start_worker(&dir);
    let both = [(1, "a:1"), (9, "child:1")];
    expect(&mut watch, &both).await;

    fs::remove_dir_all(&dir).unwrap();
    expect_unchanged(&watch, TTL * 2).await;
    assert_eq!(
        fs::read_dir(&dir).unwrap().count(),
        2,
        "both workers wrote their files again"
    );

    // Leases work as before.
    drop(worker);
    expect(&mut watch, &[(1, "a:1")]).await;
}

#[tokio::test]
async fn an_unusable_directory_stops_nothing_that_runs() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("store");
    let ours = files(&dir);
    let theirs = files(&dir);
    let lease = ours.register(instance(1, "a:1")).await.unwrap();
    let mut watch = theirs.watch("test").await.unwrap();
    expect(&mut watch, &[(1, "a:1")]).await;

    // A file in its place can neither be listed nor written, not even by root.
    fs::rename(&dir, parent.path().join("aside")).unwrap();
    fs::write(&dir, "").unwrap();
    expect_unchanged(&watch, TTL * 2).await;
    // What is new fails with a reason.
    let error = ours.register(instance(2, "b:1")).await.unwrap_err();
    assert!(matches!(error, DiscoveryError::Store { .. }), "{error:?}");
    assert!(error.retryable());
    assert!(error.to_string().contains(dir.to_str().unwrap()), "{error}");
    theirs.watch("test").await.unwrap_err();

    fs::remove_file(&dir).unwrap();
    expect_unchanged(&watch, TTL).await;
    let late: Lease = ours.register(instance(2, "b:1")).await.unwrap();
    expect(&mut watch, &[(1, "a:1"), (2, "b:1")]).await;
    expect_unchanged(&watch, TTL * 2).await;
    late.revoke().await.unwrap();
    lease.revoke().await.unwrap();
    expect(&mut watch, &[]).await;
}

/// A directory in which nothing can be created or removed, until this is dropped.
struct ReadOnly(fs::File);

impl ReadOnly {
    /// The immutable flag stops root too; not every file system has it.
    fn new(dir: &Path) -> Result<Self, rustix::io::Errno> {
        let file = fs::File::open(dir).unwrap();
        let flags = ioctl_getflags(&file)?;
        ioctl_setflags(&file, flags | IFlags::IMMUTABLE)?;
        Ok(Self(file))
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        let flags = ioctl_getflags(&self.0).unwrap();
        ioctl_setflags(&self.0, flags - IFlags::IMMUTABLE).unwrap();
    }
}

#[tokio::test]
async fn nothing_expires_while_the_directory_cannot_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let store = files(dir.path());
    let mut watch = store.watch("test").await.unwrap();
    let mut worker = start_worker(dir.path());
    expect(&mut watch, &[(9, "child:1")]).await;
    let read_only = match ReadOnly::new(dir.path()) {
        Ok(read_only) => read_only,
        Err(error) => {
            eprintln!("skipped: a directory cannot be made read-only here: {error}");
            return;
        }
    };
    // Whether it is dead or only cannot renew its lease is not to be known.
    worker.kill();
    expect_unchanged(&watch, TTL * 2).await;
    drop(read_only);
    expect(&mut watch, &[]).await;
}

#[tokio::test]
async fn files_that_make_no_sense_are_ignored_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = files(dir.path());
    let mut watch = store.watch("test").await.unwrap();
    let name = "test.decode.generate.0000000000000005.json";
    fs::write(dir.path().join(name), "{\"version\": 1, \"nonce\"").unwrap();
    fs::write(dir.path().join("README"), "not ours").unwrap();
    fs::write(dir.path().join("x.json"), [0xff; 100]).unwrap();
    fs::write(dir.path().join("large.json"), vec![b' '; 2 << 20]).unwrap();
    fs::create_dir(dir.path().join("folder.json")).unwrap();
    let _lease = store.register(instance(1, "a:1")).await.unwrap();
    expect(&mut watch, &[(1, "a:1")]).await;
    assert!(dir.path().join(name).exists());

    // A registration whose file is damaged mends it.
    let own = dir
        .path()
        .join("test.decode.generate.0000000000000001.json");
    let whole = fs::read(&own).unwrap();
    fs::write(&own, "damaged").unwrap();
    tokio::time::timeout(PATIENCE, async {
        while fs::read(&own).unwrap() != whole {
            tokio::time::sleep(TTL / 100).await;
        }
    })
    .await
    .expect("the file was not mended");
    assert_eq!(watch.current().len(), 1);
}

#[tokio::test]
async fn a_store_that_cannot_be_made_says_so() {
    let parent = tempfile::tempdir().unwrap();
    let file = parent.path().join("file");
    fs::write(&file, "").unwrap();
    let error = FileDiscovery::new(FileDiscoveryConfig::new(file.join("store"))).unwrap_err();
    assert!(error.to_string().contains("cannot write"), "{error}");
}

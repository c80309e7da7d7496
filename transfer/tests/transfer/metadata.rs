//! How agents learn of each other: from themselves, from a file, from a store, in parts.

use std::time::Duration;

use blockplane_transfer::{
    Agent, AgentConfig, ConnectError, FetchError, FolderStore, Lane, LookupError, MemoryStore,
    Metadata, MetadataContent, MetadataError, MetadataFileError, MetadataStore, RemoteAccess,
    TlsConfig, TlsPeerName,
};

use crate::support::{Setup, WAIT, arena, arena_with};
use crate::tls::Authority;

fn agent(name: &str) -> Agent {
    Agent::new(Setup::new(Lane::Shm).config(name)).unwrap()
}

/// A folder that goes with the test.
struct Folder(std::path::PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let name = format!("blockplane-test-{name}-{}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn agents_tell_their_metadata_to_whoever_asks() {
    let all = [Lane::Shm, Lane::Tcp];
    let config = |name: &str| AgentConfig::new(name).with_lanes(all);
    let (a, b) = (
        Agent::new(config("a")).unwrap(),
        Agent::new(config("b")).unwrap(),
    );
    // More than a socket takes at once.
    let regions: Vec<_> = (0..3000)
        .map(|_| b.register(vec![0; 1], RemoteAccess::Open).unwrap())
        .collect();
    let expected = b.metadata();
    assert_eq!(expected.regions().len(), regions.len());
    let tcp = expected.tcp_address().unwrap();
    let unix = expected.unix_socket().unwrap();
    for address in [tcp, unix, &format!("unix:{unix}")] {
        let got = a.fetch_metadata(address, WAIT).unwrap();
        assert_eq!(got, expected, "{address}");
    }
    a.connect(&a.fetch_metadata(tcp, WAIT).unwrap(), WAIT)
        .unwrap();

    let mut quiet = config("quiet");
    quiet.serve_metadata = false;
    let quiet = Agent::new(quiet).unwrap();
    let refused = a.fetch_metadata(quiet.metadata().tcp_address().unwrap(), WAIT);
    assert!(matches!(refused, Err(FetchError::Refused { .. })));
    a.connect(&quiet.metadata(), WAIT).unwrap();
}

#[test]
fn metadata_behind_tls_is_for_those_with_a_certificate() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let agent = |name: &str, tls: Option<TlsConfig>| {
        let mut config = AgentConfig::new(name).with_lanes([Lane::Tcp]);
        config.tls = tls;
        Agent::new(config).unwrap()
    };
    let b = agent("b", Some(authority.local()));
    let regions: Vec<_> = (0..3000)
        .map(|_| b.register(vec![0; 1], RemoteAccess::Open).unwrap())
        .collect();
    let known = b.metadata();
    let address = known.tcp_address().unwrap();
    let a = agent("a", Some(authority.local()));
    let got = a.fetch_metadata(address, WAIT).unwrap();
    assert_eq!((&got, got.regions().len()), (&known, regions.len()));
    for tls in [None, Some(stranger.local())] {
        let got = agent("c", tls).fetch_metadata(address, WAIT);
        assert!(
            matches!(got, Err(FetchError::Unreachable { .. })),
            "{got:?}"
        );
    }
    // The name in the certificate is that of the agent, and nobody knows it yet.
    let mut by_name = authority.local();
    by_name.peer_name = TlsPeerName::Agent;
    let got = agent("d", Some(by_name)).fetch_metadata(address, WAIT);
    assert!(
        matches!(got, Err(FetchError::Unreachable { .. })),
        "{got:?}"
    );
}

#[test]
fn parts_and_deltas_of_metadata() {
    let (a, b) = (agent("a"), agent("b"));
    let (one, two) = (arena(&b, 4096), arena(&b, 8192));
    let part = b.metadata_of(&[&two, &two]).unwrap();
    assert_eq!(part.content(), MetadataContent::Partial);
    assert_eq!(part.regions().len(), 1);
    assert_eq!(
        (part.regions()[0].id, part.regions()[0].len),
        (two.id(), 8192)
    );
    a.connect(&Metadata::from_bytes(&part.to_bytes()).unwrap(), WAIT)
        .unwrap();
    let closed = arena_with(&b, 4096, RemoteAccess::None);
    let foreign = arena(&a, 4096);
    for registration in [&closed, &foreign] {
        let region = registration.id();
        let refused = MetadataError::NotOpen { region };
        assert_eq!(b.metadata_of(&[&one, registration]), Err(refused));
    }

    let mut known = b.metadata();
    assert_eq!(known.content(), MetadataContent::Complete);
    let three = arena(&b, 12_288);
    drop(one);
    let delta = b.metadata_delta(&known).unwrap();
    assert_eq!(delta.regions().len(), 1);
    assert_eq!(
        (delta.regions()[0].id, delta.released().len()),
        (three.id(), 1)
    );
    let delta = Metadata::from_bytes(&delta.to_bytes()).unwrap();
    known.apply(&delta).unwrap();
    assert_eq!(known, b.metadata());
    assert!(matches!(
        known.apply(&delta),
        Err(MetadataError::Base { .. })
    ));
    assert!(matches!(
        a.metadata_delta(&known),
        Err(MetadataError::OtherAgent { .. })
    ));
}

#[test]
fn metadata_goes_through_files() {
    let folder = Folder::new("files");
    let b = agent("b");
    let _region = arena(&b, 4096);
    let path = folder.0.join("b.metadata");
    b.metadata().write_to(&path).unwrap();
    b.metadata().write_to(&path).unwrap();
    assert_eq!(Metadata::read_from(&path).unwrap(), b.metadata());
    assert_eq!(std::fs::read_dir(&folder.0).unwrap().count(), 1);
    let whole = std::fs::read(&path).unwrap();
    for (bytes, expected) in [
        (
            &whole[..whole.len() - 1],
            MetadataError::Truncated {
                at: whole.len() - 1,
            },
        ),
        (b"name = \"b\"", MetadataError::Magic),
    ] {
        std::fs::write(&path, bytes).unwrap();
        match Metadata::read_from(&path) {
            Err(MetadataFileError::Metadata { source, .. }) => assert_eq!(source, expected),
            other => panic!("{other:?}"),
        }
    }
    let missing = Metadata::read_from(folder.0.join("none"));
    assert!(matches!(missing, Err(MetadataFileError::Io { .. })));
    let nowhere = b.metadata().write_to(folder.0.join("none/b"));
    assert!(matches!(nowhere, Err(MetadataFileError::Io { .. })));
}

fn agents_meet_in(store: &dyn MetadataStore) {
    let (a, b) = (agent("a"), agent("b"));
    let missing = a.connect_by_name(store, "b", WAIT);
    assert!(matches!(missing, Err(LookupError::NotFound { .. })));
    a.publish(store, Some(Duration::from_secs(3600))).unwrap();
    b.publish(store, None).unwrap();
    assert_eq!(Agent::published(store).unwrap(), ["a", "b"]);
    let peer = a.connect_by_name(store, "b", WAIT).unwrap();
    assert_eq!((peer.name(), peer.epoch()), ("b", b.epoch()));

    // A new life takes the entry over, and the old one does not take it away.
    let next = agent("b");
    next.publish(store, None).unwrap();
    assert!(!b.withdraw(store).unwrap());
    drop(b);
    let peer = a.connect_by_name(store, "b", WAIT).unwrap();
    assert_eq!(peer.epoch(), next.epoch());
    assert!(next.withdraw(store).unwrap() && !next.withdraw(store).unwrap());
    assert_eq!(Agent::published(store).unwrap(), ["a"]);

    // Entries that are something else.
    let key = "blockplane/agents/b";
    store.put(key, &a.metadata().to_bytes(), None).unwrap();
    let another = a.connect_by_name(store, "b", WAIT);
    let LookupError::Metadata { source, .. } = another.unwrap_err() else {
        panic!("the entry of another agent is taken");
    };
    assert!(matches!(source, MetadataError::OtherAgent { .. }));
    store.put(key, b"noise", None).unwrap();
    let noise = a.connect_by_name(store, "b", WAIT);
    assert!(matches!(noise, Err(LookupError::Metadata { .. })));
    store.put(key, &next.metadata().to_bytes(), None).unwrap();
    peer.disconnect();
    drop(next);
    let gone = a.connect_by_name(store, "b", Duration::from_millis(200));
    assert!(matches!(
        gone,
        Err(LookupError::Connect(
            ConnectError::NoLane { .. } | ConnectError::Stale { .. }
        ))
    ));
}

#[test]
fn agents_meet_in_stores() {
    agents_meet_in(&MemoryStore::default());
    let folder = Folder::new("store");
    agents_meet_in(&FolderStore::new(&folder.0).unwrap());
}

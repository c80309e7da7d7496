//! The sockets, and everything together over them.

use std::{collections::BTreeSet, time::Duration};

use blockplane_protocol::{DpRank, SaltHash, Tier, TokenSequence};
use proptest::{collection::vec, prelude::*};
use tokio::{io::AsyncWriteExt, net::TcpListener, runtime::Handle, time::timeout};

use super::{
    super::{
        Confidence, Endpoint, EventsConfig, VllmEvents,
        socket::{Kind, Socket, SocketError},
    },
    View,
    publisher::{Publisher, endpoint, frame, greeting},
    wire::corpus,
};

#[test]
fn endpoints_are_read_and_ranks_have_their_own() {
    let read = |text: &str| text.parse::<Endpoint>();
    let rank = |text: &str, rank| read(text).unwrap().of_rank(rank).map(|own| own.to_string());
    assert_eq!(rank("tcp://*:5557", 0).unwrap(), "tcp://127.0.0.1:5557");
    assert_eq!(rank("tcp://[::1]:5557", 3).unwrap(), "tcp://[::1]:5560");
    assert_eq!(rank("tcp://host.name:1", 1).unwrap(), "tcp://host.name:2");
    assert_eq!(rank("ipc:///run/kv", 0).unwrap(), "ipc:///run/kv");
    assert!(
        rank("ipc:///run/kv", 1)
            .unwrap_err()
            .to_string()
            .contains("only rank 0")
    );
    assert!(
        rank("tcp://a:65535", 1)
            .unwrap_err()
            .to_string()
            .contains("no port")
    );
    for wrong in [
        "",
        "tcp://",
        "tcp://host",
        "tcp://:1",
        "tcp://host:0",
        "tcp://host:65536",
        "ipc://",
        "inproc://x",
    ] {
        let error = read(wrong).unwrap_err().to_string();
        assert!(
            error.contains("neither tcp://HOST:PORT nor ipc://PATH"),
            "{error}"
        );
    }
}

/// What a socket makes of a peer that sends these bytes.
async fn meet(bytes: Vec<u8>) -> Result<Vec<bytes::Bytes>, SocketError> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let place = endpoint(&listener);
    let peer = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _it_may_have_left = stream.write_all(&bytes).await;
        // Read to the end: a reset would overtake what was written.
        let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    });
    let met = timeout(Duration::from_secs(5), async {
        Socket::connect(&place, Kind::Sub).await?.receive().await
    });
    let met = met.await.expect("it ends by itself");
    peer.abort();
    met
}

#[tokio::test]
async fn what_is_not_a_publisher_is_refused() {
    let refused = async |bytes: Vec<u8>| meet(bytes).await.unwrap_err().to_string();
    let http =
        b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n and more to fill it up".to_vec();
    assert!(refused(http).await.contains("greeting"));
    assert!(refused(greeting(b"REP")).await.contains("another type"));
    let mut curve = greeting(b"PUB");
    curve[12..17].copy_from_slice(b"CURVE");
    assert!(refused(curve).await.contains("security"));
    let mut old = greeting(b"PUB");
    old[10] = 2;
    assert!(refused(old).await.contains("older"));
    let huge = [&greeting(b"PUB")[..], &[2], &u64::MAX.to_be_bytes()].concat();
    assert!(refused(huge).await.contains("more than 67108864"));
    let command = [&greeting(b"PUB")[..], &[6], &5_000_u64.to_be_bytes()].concat();
    assert!(refused(command).await.contains("a command of 5000 bytes"));
    let many = [greeting(b"PUB"), frame(1, b"x").repeat(9)].concat();
    assert!(refused(many).await.contains("a message"));
}

#[tokio::test]
async fn long_frames_and_several_frames_are_one_message() {
    let long = vec![7; 70_000];
    let sent = [greeting(b"XPUB"), frame(1, b"topic"), frame(0, &long)].concat();
    assert_eq!(meet(sent).await.unwrap(), [&b"topic"[..], &long]);
}

/// Over real sockets: replay of what came before, live, a loss that only the next number tells, and a
/// publisher that is gone and comes back as another one.
#[tokio::test(flavor = "multi_thread")]
async fn a_feed_follows_a_publisher() {
    let recorded = corpus();
    let publisher = Publisher::start().await;
    publisher.publish(0, &recorded[0].1, false);
    let config = EventsConfig {
        endpoint: publisher.endpoint.clone(),
        replay: Some(publisher.replay.clone()),
        topic: "kv".into(),
        rank: DpRank(0),
        block_tokens: 32,
        blocks_max: 1_000,
        events_max: 1_000,
    };
    let events = VllmEvents::start(config, &Handle::current()).unwrap();
    let mut view = View::of(&events.feed());
    let prompt: Vec<u32> = (100..180).collect();
    let names = |blocks: usize, salt: SaltHash| {
        let continued = [&prompt[..], &[1921; 20]].concat();
        let sequence = TokenSequence::from_tokens(&continued, 32, salt);
        let blocks = sequence.blocks().iter().take(blocks);
        blocks
            .map(|block| (block.sequence, Tier::Device))
            .collect::<BTreeSet<_>>()
    };
    let plain = SaltHash::default();
    let mut until = async |expected: BTreeSet<_>| {
        let reached = timeout(Duration::from_secs(10), async {
            while *view.now() != expected {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        let reached = reached.await;
        assert!(
            reached.is_ok(),
            "{:?} of {expected:?}; {:?}",
            view.now(),
            events.status()
        );
    };
    until(names(2, plain)).await;
    publisher.publish(1, &recorded[1].1, false);
    until(names(3, plain)).await;
    publisher.publish(2, &recorded[2].1, false);
    publisher.publish(3, &recorded[3].1, true);
    publisher.publish(4, &recorded[4].1, false);
    let tenant = SaltHash::new(Some("tenant"), None);
    let both = &names(3, plain) | &names(3, tenant);
    until(both).await;
    let status = events.status();
    assert_eq!(
        (status.counters.gaps, status.confidence),
        (1, Confidence::Complete)
    );
    assert_eq!((status.blocks, status.last_sequence), (6, Some(4)));
    assert_eq!(status.block_tokens_received, Some(32));

    drop(publisher);
    let gone = timeout(Duration::from_secs(10), async {
        while events.status().connected {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    gone.await.expect("the end of the publisher is seen");
    assert!(events.status().error.is_some());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// After a good greeting, any bytes end in a message or an error.
    #[test]
    fn no_bytes_hang_or_panic(bytes in vec(any::<u8>(), 0..300)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let place = endpoint(&listener);
            let sent = [greeting(b"PUB"), bytes].concat();
            let peer = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _it_may_have_left = stream.write_all(&sent).await;
                let _it_may_have_left = stream.shutdown().await;
            };
            let us = async {
                let Ok(mut socket) = Socket::connect(&place, Kind::Sub).await else {
                    return;
                };
                while socket.receive().await.is_ok() {}
            };
            timeout(Duration::from_secs(5), async { tokio::join!(us, peer) }).await.expect("it ends");
        });
    }
}

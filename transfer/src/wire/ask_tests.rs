//! Questions for metadata from noise, and answers that are noise.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use proptest::prelude::*;

use super::frame::{Code, HEADER_BYTES, Header, Kind};
use super::handshake::preamble;
use crate::{Agent, AgentConfig, FetchError, Lane, MetadataError};

const WAIT: Duration = Duration::from_secs(20);

fn agent(name: &str) -> Agent {
    Agent::new(AgentConfig::new(name).with_lanes([Lane::Tcp])).unwrap()
}

fn address(agent: &Agent) -> String {
    agent.metadata().addresses().tcp.clone().unwrap()
}

/// Everything that an agent answers to `bytes`, up to the end of the connection.
fn answer_to(agent: &Agent, bytes: &[u8]) -> Vec<u8> {
    let mut socket = TcpStream::connect(address(agent)).unwrap();
    socket.set_read_timeout(Some(WAIT)).unwrap();
    socket.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    // With bytes of ours that nobody has read the end is a reset.
    if let Err(error) = socket.read_to_end(&mut answer) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    answer
}

/// An address where every connection gets `answer` and nothing else.
fn false_agent(answer: Vec<u8>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        if let Ok((mut socket, _)) = listener.accept() {
            let _ = socket.write_all(&answer);
            // Open until the other side has had enough.
            let _ = socket.read_to_end(&mut Vec::new());
        }
    });
    address
}

#[test]
fn questions_of_other_versions_and_noise_end_the_connection() {
    let victim = agent("victim");
    let mut later = preamble();
    later[4] = 99;
    let answer = answer_to(
        &victim,
        &Header::new(Kind::AskMetadata, 0, 0).with_body(&later),
    );
    let refused = Header::decode(answer.first_chunk().unwrap()).unwrap();
    assert_eq!(
        (refused.kind, refused.code),
        (Kind::Refuse, Code::Unsupported as u8)
    );
    let mut longer = preamble();
    longer.push(0);
    let mut nothing = Header::new(Kind::AskMetadata, 0, 0);
    nothing.len = 1 << 30;
    for noise in [
        Header::new(Kind::AskMetadata, 0, 0).with_body(&longer),
        Header::new(Kind::AskMetadata, 0, 0).with_body(b"NOPE\x02\0\0\0"),
        Header::new(Kind::Metadata, 0, 0).with_body(&preamble()),
        nothing.encode().to_vec(),
    ] {
        assert_eq!(answer_to(&victim, &noise), b"");
    }
    let found = agent("asker")
        .fetch_metadata(&address(&victim), WAIT)
        .unwrap();
    assert_eq!(found, victim.metadata());
}

#[test]
fn answers_are_checked_and_bounded() {
    let asker = agent("asker");
    let frame = |body: &[u8]| Header::new(Kind::Metadata, 0, 0).with_body(body);
    let blob = asker.metadata().to_bytes();
    let mut damaged = blob.clone();
    damaged[30] ^= 1;
    let mut later = blob.clone();
    later[4] = 99;
    for (answer, expected) in [
        (frame(b"not metadata at all"), MetadataError::Magic),
        (frame(&damaged), MetadataError::Checksum),
        (frame(&blob[..20]), MetadataError::Truncated { at: 20 }),
        (
            frame(&later),
            MetadataError::Version {
                got: 99,
                accepted: 3,
            },
        ),
    ] {
        match asker.fetch_metadata(&false_agent(answer), WAIT) {
            Err(FetchError::Metadata { source, .. }) => assert_eq!(source, expected),
            other => panic!("{other:?}"),
        }
    }
    let mut huge = Header::new(Kind::Metadata, 0, 0);
    huge.len = u32::MAX;
    for answer in [
        huge.encode().to_vec(),
        vec![0xff; 64],
        Header::new(Kind::Ping, 0, 0).encode().to_vec(),
    ] {
        let got = asker.fetch_metadata(&false_agent(answer), WAIT);
        assert!(matches!(got, Err(FetchError::Malformed { .. })), "{got:?}");
    }
    // An answer that announces much and never comes is given up in time, and allocates nothing.
    let mut promised = Header::new(Kind::Metadata, 0, 0);
    promised.len = 16 << 20;
    for answer in [promised.encode().to_vec(), Vec::new()] {
        let got = asker.fetch_metadata(&false_agent(answer), Duration::from_millis(100));
        assert!(matches!(got, Err(FetchError::Io { .. })), "{got:?}");
    }
    for address in [
        "127.0.0.1:1",
        "unix:/nowhere/at/all.sock",
        "/nowhere",
        "no such host",
        "",
    ] {
        let got = asker.fetch_metadata(address, WAIT);
        assert!(
            matches!(got, Err(FetchError::Unreachable { .. })),
            "{got:?}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever answers, asking ends in metadata or an error that says what was wrong.
    #[test]
    fn any_answer_is_survived(noise in proptest::collection::vec(any::<u8>(), 0..200), kind in 0u8..90) {
        let asker = agent("asker");
        let mut answer = noise;
        if answer.len() >= HEADER_BYTES {
            answer[0] = kind;
            let len = u32::try_from(answer.len() - HEADER_BYTES).unwrap();
            answer[4..8].copy_from_slice(&len.to_le_bytes());
        }
        let got = asker.fetch_metadata(&false_agent(answer), Duration::from_millis(50));
        prop_assert!(got.is_err());
    }
}

//! Targets that lie to an honest initiator.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use blockplane_transfer::{
    Agent, AgentConfig, ArenaConfig, BlockLayout, ConnectError, Lane, LocalBlocks, LossCause,
    Metadata, MetadataError, Op, Peer, PostError, PostOptions, PrepareError, RegionId,
    Registration, RemoteBlocks, TransferError, WindowId,
};

use crate::count::peak;
use crate::random::Random;
use crate::wire::*;
use crate::{WAIT, alone};

const MIB: usize = 1 << 20;
const REGION_ID: u64 = 77;
const REGION_BYTES: u64 = 1 << 20;

/// A listener that accepts whatever comes and leaves the answers to `serve`: once for the control
/// connection, once for each data connection.
struct Liar {
    metadata: Metadata,
}

impl Liar {
    fn start(serve: impl Fn(usize, TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let blob = metadata("liar", 5, &address, (REGION_ID, REGION_BYTES));
        let serve = std::sync::Arc::new(serve);
        // Ends with the test process.
        std::thread::spawn(move || {
            for (number, socket) in listener.incoming().enumerate() {
                let Ok(socket) = socket else { return };
                let serve = serve.clone();
                std::thread::spawn(move || serve(number, socket));
            }
        });
        Self {
            metadata: Metadata::from_bytes(&blob).unwrap(),
        }
    }
}

/// Reads a hello and answers it as it should be.
fn greet(socket: &mut TcpStream) {
    let hello = receive(socket).unwrap();
    assert_eq!(hello.kind, HELLO);
    let _ = socket.write_all(&welcome(1));
}

/// Reads until the end.
fn listen(mut socket: TcpStream) {
    while receive(&mut socket).is_ok() {}
}

struct Honest {
    agent: Agent,
    local: Registration,
}

impl Honest {
    fn new() -> Self {
        let mut config = AgentConfig::new("honest").with_lanes([Lane::Tcp]);
        config.tcp_streams = 1;
        config.peer_loss_timeout = Duration::from_secs(2);
        config.connect_timeout = Duration::from_secs(2);
        let agent = Agent::new(config).unwrap();
        let local = agent
            .allocate(ArenaConfig::new(REGION_BYTES as usize, "own"))
            .unwrap();
        Self { agent, local }
    }

    /// A transfer with the liar, as far as it gets: how it ends is the liar's choice, that it ends
    /// is not.
    fn transfer(&self, peer: &Peer, op: Op, window: Option<WindowId>) -> Result<(), String> {
        let layout = BlockLayout::contiguous(16, 64 << 10);
        let local = LocalBlocks {
            registration: &self.local,
            layout,
            ids: (0..16).into(),
            layers: 0..1,
        };
        let remote = RemoteBlocks {
            peer,
            region: RegionId(REGION_ID),
            layout,
            ids: (0..16).into(),
            layers: 0..1,
            window,
        };
        let prepared = match self.agent.prepare(op, local, remote) {
            Ok(prepared) => prepared,
            Err(PrepareError::Empty | PrepareError::Overlap { .. }) => panic!("our own mistake"),
            Err(error) => return Err(error.to_string()),
        };
        let deadline = Duration::from_millis(300);
        match prepared.post(PostOptions::within(deadline).notify("note")) {
            Ok(transfer) => match transfer.wait(WAIT) {
                Err(TransferError::StillInFlight { .. }) => panic!("a transfer hangs"),
                other => other.map_err(|error| error.to_string()),
            },
            Err(PostError::PeerLost(lost)) => Err(lost.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }
}

#[test]
fn a_welcome_that_trickles_does_not_hold_a_connect() {
    let _alone = alone();
    let liar = Liar::start(|_, mut socket| {
        let _ = receive(&mut socket);
        for byte in welcome(1) {
            if socket.write_all(&[byte]).is_err() {
                return;
            }
            std::thread::park_timeout(Duration::from_millis(400));
        }
    });
    let honest = Honest::new();
    let started = Instant::now();
    let refused = honest.agent.connect(&liar.metadata, Duration::from_secs(1));
    assert!(
        matches!(refused, Err(ConnectError::NoLane { .. })),
        "{refused:?}"
    );
    // All of it would take 17 seconds.
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_data_connection_that_is_refused_is_not_another_epoch() {
    let _alone = alone();
    let liar = Liar::start(|number, mut socket| {
        if number.is_multiple_of(2) {
            greet(&mut socket);
            listen(socket);
        } else {
            let _ = receive(&mut socket);
            let _ = socket.write_all(&header(REFUSE, STALE, 0, 0, 0));
        }
    });
    let honest = Honest::new();
    let refused = honest.agent.connect(&liar.metadata, WAIT).unwrap_err();
    assert!(matches!(refused, ConnectError::NoLane { .. }), "{refused}");
    assert!(refused.retryable());
}

#[test]
fn windows_that_nobody_asked_for_are_forgotten() {
    let _alone = alone();
    // Region, write, over a sorted list of 1000 ranges.
    let mut body = REGION_ID.to_le_bytes().to_vec();
    body.extend([0, 1]);
    body.extend(1000u32.to_le_bytes());
    for at in 0..1000u64 {
        body.extend((at * 2).to_le_bytes());
        body.extend((at * 2 + 1).to_le_bytes());
    }
    let (finished, poured) = std::sync::mpsc::channel();
    let finished = std::sync::Mutex::new(finished);
    let liar = Liar::start(move |number, mut socket| {
        greet(&mut socket);
        if number == 0 {
            for window in 0..20_000u64 {
                if socket
                    .write_all(&frame(WINDOW, window, window as u32, &body))
                    .is_err()
                {
                    break;
                }
            }
            let _ = finished.lock().unwrap().send(());
        }
        listen(socket);
    });
    let honest = Honest::new();
    let used = peak(|| {
        let peer = honest.agent.connect(&liar.metadata, WAIT).unwrap();
        poured.recv_timeout(WAIT * 3).unwrap();
        assert!(
            honest
                .transfer(&peer, Op::Write, Some(WindowId(5)))
                .is_err()
        );
    });
    // All of them would be 320 MiB.
    assert!(used < 50 * MIB, "{} MiB", used / MIB);
}

/// Answers of a target, honest ones among them, spoilt like the questions of an initiator.
fn answers(random: &mut Random) -> Vec<u8> {
    let mut out = Vec::new();
    for _ in 0..1 + random.below(5) {
        let id = random.below(40);
        let part = random.below(3) as u32;
        let code = if random.chance(60) {
            0
        } else {
            random.below(20) as u8
        };
        let mut body = Vec::new();
        let kind = match random.below(14) {
            0 => WELCOME,
            1 => {
                body.extend(REGION_BYTES.to_le_bytes());
                body.extend([random.below(4) as u8, random.below(2) as u8]);
                body.extend(random.next().to_le_bytes());
                let device = random.below(4) as u8;
                body.push(device);
                if device > 0 {
                    // An identity, the permission to pull, and perhaps a handle and its offset.
                    body.extend([device; 17]);
                    body.extend([0xa5; 72].iter().take(if device == 2 { 72 } else { 0 }));
                }
                REGION
            }
            2 => {
                body.extend(REGION_ID.to_le_bytes());
                body.extend([2, 0]);
                WINDOW
            }
            3 => WINDOW_CLOSE,
            4 => REGION_GONE,
            5 => NOTIFIED,
            6 | 7 => STRIPE_DONE,
            8 | 9 => READ_DONE,
            10 | 11 => {
                body = vec![3; random.index(70_000)];
                DATA
            }
            12 => random.below(256) as u8,
            _ => PING,
        };
        let lie = if random.chance(10) {
            random.next() as u32
        } else {
            body.len() as u32
        };
        out.extend(header(kind, code, lie, id, part));
        out.extend(body);
    }
    if random.chance(30) {
        let at = random.index(out.len());
        out[at] ^= 1 << random.below(8);
    }
    out
}

#[test]
fn whatever_a_target_answers_every_transfer_ends() {
    const CASES: u64 = 150;
    let _alone = alone();
    let liar = Liar::start(|number, mut socket| {
        let mut random = Random::new(number as u64);
        greet(&mut socket);
        // Some answers before any question, the others each to one.
        if random.chance(30) {
            let _ = socket.write_all(&answers(&mut random));
        }
        while receive(&mut socket).is_ok() {
            if socket.write_all(&answers(&mut random)).is_err() || random.chance(10) {
                return;
            }
        }
    });
    let honest = Honest::new();
    let used = peak(|| {
        for case in 0..CASES {
            let peer = honest.agent.connect(&liar.metadata, WAIT).unwrap();
            let op = if case % 2 == 0 { Op::Read } else { Op::Write };
            let window = (case % 3 == 0).then_some(WindowId(3));
            let _ = honest.transfer(&peer, op, window);
            peer.disconnect();
        }
    });
    assert!(used < 100 * MIB, "{} MiB", used / MIB);
    assert_eq!(honest.agent.stats().in_flight, 0);
}

#[test]
fn a_target_that_stops_reading_is_waited_for_as_long_as_agreed() {
    let _alone = alone();
    let liar = Liar::start(|number, mut socket| {
        greet(&mut socket);
        // Neither is anything read any more, nor is a heartbeat sent.
        if number > 0 {
            std::thread::park_timeout(WAIT * 3);
        }
        std::thread::park_timeout(WAIT * 3);
        drop(socket);
    });
    let honest = Honest::new();
    let peer = honest.agent.connect(&liar.metadata, WAIT).unwrap();
    let ended = honest.transfer(&peer, Op::Write, None);
    assert!(ended.is_err(), "{ended:?}");
    let lost = loop {
        match honest.agent.notify(&peer, "x", WAIT) {
            Ok(transfer) => {
                let _ = transfer.wait(WAIT);
            }
            Err(PostError::PeerLost(lost)) => break lost,
            Err(error) => panic!("{error}"),
        }
    };
    assert!(matches!(lost.cause, LossCause::Silent(_)), "{lost}");
}

#[test]
fn metadata_is_refused_or_read_and_costs_what_it_weighs() {
    let _alone = alone();
    let honest = metadata("somebody", 5, "127.0.0.1:1", (1, 2));
    assert!(Metadata::from_bytes(&honest).is_ok());
    let checked = |bytes: &[u8]| {
        let mut result = None;
        let used = peak(|| result = Some(Metadata::from_bytes(bytes)));
        assert!(
            used <= bytes.len() * 8 + 4096,
            "{used} bytes for {}",
            bytes.len()
        );
        result.unwrap()
    };
    for len in 0..honest.len() {
        assert!(checked(&honest[..len]).is_err(), "{len} bytes");
    }
    for bit in 0..honest.len() * 8 {
        let mut spoilt = honest.clone();
        spoilt[bit / 8] ^= 1 << (bit % 8);
        // Two bytes are reserved and ignored.
        assert!(
            checked(&spoilt).is_err() || (6..8).contains(&(bit / 8)),
            "bit {bit}"
        );
    }
    // With a checksum that fits, anything may be inside.
    for seed in 0..20_000 {
        let mut random = Random::new(seed);
        let mut spoilt = honest.clone();
        for _ in 0..=random.below(3) {
            let at = 16 + random.index(spoilt.len() - 16);
            spoilt[at] = random.next() as u8;
        }
        if random.chance(30) {
            spoilt.truncate(16 + random.index(spoilt.len() - 15));
        }
        let len = (spoilt.len() - 16) as u32;
        spoilt[8..12].copy_from_slice(&len.to_le_bytes());
        let sum = crc32c::crc32c(&spoilt[16..]);
        spoilt[12..16].copy_from_slice(&sum.to_le_bytes());
        match checked(&spoilt) {
            Ok(metadata) => assert_eq!(Metadata::from_bytes(&metadata.to_bytes()), Ok(metadata)),
            Err(MetadataError::Checksum | MetadataError::Magic) => panic!("seed {seed}"),
            Err(_) => {}
        }
    }
}

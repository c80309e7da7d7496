//! Peers that lie: raw sockets against a real agent, and an agent against a false peer.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::frame::{Code, HEADER_BYTES, Header, Kind, StripeSpec};
use super::handshake::{Hello, HelloRole, greet};
use crate::memory::RegionId;
use crate::plan::{Axis, BlockLayout, BlockSet, Order};
use crate::window::WindowId;
use crate::{
    Agent, AgentConfig, ArenaConfig, ConnectError, Lane, Metadata, Registration, RemoteAccess,
    WindowAccess, WindowScope,
};

const WAIT: Duration = Duration::from_secs(20);

/// An agent with one arena that is open and one that needs a window, both full of 7.
struct Victim {
    agent: Agent,
    open: Registration,
    guarded: Registration,
}

impl Victim {
    fn new() -> Self {
        let mut config = AgentConfig::new("victim").with_lanes([Lane::Tcp]);
        config.peer_loss_timeout = Duration::from_secs(20);
        config.notification_bytes_max = 1000;
        config.peer_reads_max = 4;
        let agent = Agent::new(config).unwrap();
        let arena = |access| {
            let arena = ArenaConfig::new(8000, "target").with_access(access);
            let arena = agent.allocate(arena).unwrap();
            arena.write_at(0, &[7; 8000]).unwrap();
            arena
        };
        let (open, guarded) = (arena(RemoteAccess::Open), arena(RemoteAccess::WindowOnly));
        Self {
            agent,
            open,
            guarded,
        }
    }

    fn address(&self) -> String {
        self.agent.metadata().addresses().tcp.clone().unwrap()
    }

    fn dial(&self) -> TcpStream {
        let socket = TcpStream::connect(self.address()).unwrap();
        socket.set_read_timeout(Some(WAIT)).unwrap();
        socket.set_nodelay(true).unwrap();
        socket
    }

    fn hello(&self, role: HelloRole) -> Hello {
        Hello {
            role,
            loss_timeout: Duration::from_secs(20),
            from: "liar".into(),
            from_epoch: 666,
            to: "victim".into(),
            to_epoch: self.agent.epoch(),
        }
    }

    /// A control and a data connection, properly greeted.
    fn enter(&self) -> (TcpStream, TcpStream) {
        let mut control = self.dial();
        let welcome = greet(&mut control, &self.hello(HelloRole::Control)).unwrap();
        let mut data = self.dial();
        greet(
            &mut data,
            &self.hello(HelloRole::Data {
                nonce: welcome.nonce,
            }),
        )
        .unwrap();
        (control, data)
    }

    fn untouched(&self) -> bool {
        [&self.open, &self.guarded].into_iter().all(|arena| {
            let mut bytes = vec![0; 8000];
            arena.read_at(0, &mut bytes).unwrap();
            bytes.iter().all(|byte| *byte == 7)
        })
    }

    /// Whether an honest peer is served.
    fn serves(&self) {
        let friend = Agent::new(AgentConfig::new("friend").with_lanes([Lane::Tcp])).unwrap();
        let peer = friend.connect(&self.agent.metadata(), WAIT).unwrap();
        friend
            .notify(&peer, "hello", WAIT)
            .unwrap()
            .wait(WAIT)
            .unwrap();
        assert_eq!(
            self.agent
                .notifications()
                .recv_timeout(WAIT)
                .unwrap()
                .payload,
            "hello"
        );
    }
}

/// The next frame that is not a heartbeat; `None` at the end of the connection.
fn next_frame(socket: &mut TcpStream) -> Option<(Header, Vec<u8>)> {
    loop {
        let mut header = [0; HEADER_BYTES];
        socket.read_exact(&mut header).ok()?;
        let header = Header::decode(&header)?;
        let mut body = vec![0; header.len as usize];
        socket.read_exact(&mut body).ok()?;
        if header.kind != Kind::Ping {
            return Some((header, body));
        }
    }
}

fn closed(socket: &mut TcpStream) -> bool {
    next_frame(socket).is_none()
}

fn stripe(
    region: RegionId,
    window: Option<WindowId>,
    ids: &[u32],
    layout: BlockLayout,
    range: std::ops::Range<u64>,
) -> Vec<u8> {
    let set = BlockSet::new(layout, ids.into(), 0..1);
    StripeSpec::encode(region, window, Order::BlockMajor, &set, &range)
}

/// Runs of 10 bytes in 8 blocks of 1000, in two loops 500 and 16 bytes apart.
fn looped(region: RegionId, window: Option<WindowId>, counts: [u32; 2]) -> Vec<u8> {
    let layout = BlockLayout {
        run_bytes: 10,
        ..BlockLayout::contiguous(8, 1000)
    };
    let axis = |at: usize, stride| Axis {
        count: counts[at],
        stride,
    };
    let set = BlockSet {
        inner: vec![axis(0, 500), axis(1, 16)],
        ..BlockSet::new(layout, [7].into(), 0..1)
    };
    StripeSpec::encode(region, window, Order::BlockMajor, &set, &(0..10))
}

#[test]
fn stripes_that_lie_are_refused_and_nothing_lands() {
    let victim = Victim::new();
    let (_control, mut data) = victim.enter();
    let layout = BlockLayout::contiguous(8, 1000);
    let window = victim
        .agent
        .open_window(
            &victim.guarded,
            WindowScope::Blocks {
                layout,
                ids: vec![1],
            },
            WindowAccess::Read,
        )
        .unwrap();
    let (open, guarded) = (victim.open.id(), victim.guarded.id());
    let huge = BlockLayout {
        block_stride: u64::MAX / 2,
        ..layout
    };
    let cases = [
        (
            stripe(RegionId(1), None, &[0], layout, 0..1000),
            Code::UnknownRegion,
        ),
        (stripe(open, None, &[8], layout, 0..1000), Code::OutOfBounds),
        (stripe(open, None, &[], layout, 0..1000), Code::OutOfBounds),
        (stripe(open, None, &[0], layout, 0..1001), Code::OutOfBounds),
        (looped(open, None, [2, 65]), Code::OutOfBounds),
        (looped(open, None, [0, 1]), Code::OutOfBounds),
        (looped(open, None, [u32::MAX; 2]), Code::OutOfBounds),
        (
            stripe(open, None, &[0], layout, 500..500),
            Code::OutOfBounds,
        ),
        (stripe(open, None, &[2], huge, 0..1000), Code::OutOfBounds),
        (
            stripe(open, None, &[0], BlockLayout::contiguous(9, 1000), 0..1000),
            Code::Ok,
        ),
        (
            stripe(open, None, &[8], BlockLayout::contiguous(9, 1000), 0..1000),
            Code::OutOfBounds,
        ),
        (
            stripe(guarded, None, &[1], layout, 0..1000),
            Code::AccessDenied,
        ),
        (
            stripe(guarded, Some(WindowId(5)), &[1], layout, 0..1000),
            Code::WindowClosed,
        ),
        // The window is open for reading, and only block 1.
        (
            stripe(guarded, Some(window.id()), &[1], layout, 0..1000),
            Code::OutOfBounds,
        ),
    ];
    for (number, (body, expected)) in cases.into_iter().enumerate() {
        let id = number as u64;
        data.write_all(&Header::new(Kind::Write, id, 0).with_body(&body))
            .unwrap();
        // The payload follows whatever the answer is; 7 leaves no trace where it is accepted.
        let byte = if expected == Code::Ok { 7 } else { 9 };
        data.write_all(&Header::new(Kind::Data, id, 0).with_body(&[byte; 1000]))
            .unwrap();
        let (answer, _) = next_frame(&mut data).unwrap();
        assert_eq!((answer.kind, answer.id), (Kind::StripeDone, id));
        assert_eq!(Code::from(answer.code), Some(expected), "case {number}");
    }
    for read in [
        stripe(guarded, Some(window.id()), &[2], layout, 0..1000),
        looped(guarded, Some(window.id()), [2, 2]),
    ] {
        data.write_all(&Header::new(Kind::Read, 99, 0).with_body(&read))
            .unwrap();
        let (answer, _) = next_frame(&mut data).unwrap();
        assert_eq!(
            (answer.kind, answer.code),
            (Kind::ReadDone, Code::OutOfBounds as u8)
        );
    }
    assert!(victim.untouched());
    victim.serves();
}

#[test]
fn a_window_that_closes_in_the_middle_of_a_chunk_stops_it() {
    let victim = Victim::new();
    let (_control, mut data) = victim.enter();
    let layout = BlockLayout::contiguous(8, 1000);
    let window = victim
        .agent
        .open_window(&victim.guarded, WindowScope::Region, WindowAccess::Write)
        .unwrap();
    let body = stripe(
        victim.guarded.id(),
        Some(window.id()),
        &[0, 1],
        layout,
        0..2000,
    );
    data.write_all(&Header::new(Kind::Write, 1, 0).with_body(&body))
        .unwrap();
    let mut chunk = Header::new(Kind::Data, 1, 0).with_body(&[9; 2000]);
    let rest = chunk.split_off(HEADER_BYTES + 1000);
    data.write_all(&chunk).unwrap();
    // Half of the chunk is in place.
    let started = Instant::now();
    let mut first = [0; 1000];
    while first != [9; 1000] {
        assert!(started.elapsed() < WAIT);
        victim.guarded.read_at(0, &mut first).unwrap();
    }
    window.close(WAIT).unwrap();
    victim.guarded.write_at(0, &[7; 8000]).unwrap();
    data.write_all(&rest).unwrap();
    let (answer, _) = next_frame(&mut data).unwrap();
    assert_eq!(
        (answer.kind, answer.code),
        (Kind::StripeDone, Code::WindowClosed as u8)
    );
    assert!(victim.untouched(), "bytes landed behind the window");
}

#[test]
fn frames_that_do_not_belong_end_the_connection() {
    let victim = Victim::new();
    let layout = BlockLayout::contiguous(8, 1000);
    let write = stripe(victim.open.id(), None, &[0], layout, 0..10);
    let announced = Header::new(Kind::Write, 1, 0).with_body(&write);
    let announced_again = announced.clone();
    let mut oversized = Header::new(Kind::Write, 1, 0);
    oversized.len = u32::MAX;
    let on_data = [
        // Payload that nothing announced.
        Header::new(Kind::Data, 1, 0).with_body(&[9; 10]),
        // More payload than announced.
        [
            announced.clone(),
            Header::new(Kind::Data, 1, 0).with_body(&[9; 11]),
        ]
        .concat(),
        // Payload of another stripe.
        [announced, Header::new(Kind::Data, 2, 0).with_body(&[9; 10])].concat(),
        // A description that is not one.
        Header::new(Kind::Write, 1, 0).with_body(&[1, 2, 3]),
        oversized.encode().to_vec(),
        // A notification that follows no stripe, or another one.
        Header::new(Kind::Notify, 1, 0).with_body(b"x"),
        [
            announced_again,
            Header::new(Kind::Data, 1, 0).with_body(&[7; 10]),
            Header::new(Kind::Notify, 2, 0).with_body(b"x"),
        ]
        .concat(),
        vec![255; HEADER_BYTES],
    ];
    for (number, bytes) in on_data.into_iter().enumerate() {
        let (mut control, mut data) = victim.enter();
        data.write_all(&bytes).unwrap();
        assert!(closed(&mut data), "data case {number}");
        assert!(
            closed(&mut control),
            "control connection of data case {number}"
        );
    }
    let mut oversized = Header::new(Kind::Notify, 1, 0);
    oversized.len = u32::MAX;
    let on_control = [
        oversized.encode().to_vec(),
        Header::new(Kind::StripeDone, 1, 0).encode().to_vec(),
        Header::new(Kind::Hello, 1, 0).encode().to_vec(),
        vec![255; HEADER_BYTES],
    ];
    for (number, bytes) in on_control.into_iter().enumerate() {
        let (mut control, mut data) = victim.enter();
        control.write_all(&bytes).unwrap();
        assert!(closed(&mut control), "control case {number}");
        assert!(
            closed(&mut data),
            "data connection of control case {number}"
        );
    }
    assert!(victim.untouched());
    victim.serves();
}

#[test]
fn reads_beyond_the_credits_end_the_connection() {
    let victim = Victim::new();
    let layout = BlockLayout::contiguous(8, 1000);
    let read = stripe(victim.open.id(), None, &[0, 1], layout, 0..2000);
    let reads = |count: u64| -> Vec<u8> {
        (0..count)
            .flat_map(|id| Header::new(Kind::Read, id, 0).with_body(&read))
            .collect()
    };
    let (_control, mut data) = victim.enter();
    data.write_all(&reads(4)).unwrap();
    let mut ended = 0;
    while ended < 4 {
        let (frame, _) = next_frame(&mut data).unwrap();
        ended += usize::from(frame.kind == Kind::ReadDone);
    }
    // They arrive together, so none of them is over when the fifth is read.
    data.write_all(&reads(5)).unwrap();
    while next_frame(&mut data).is_some() {}
    victim.serves();
}

#[test]
fn a_notification_rides_only_behind_a_stripe_that_arrived() {
    let victim = Victim::new();
    let (_control, mut data) = victim.enter();
    let layout = BlockLayout::contiguous(8, 1000);
    let write = |region, id| {
        let body = stripe(region, None, &[0], layout, 0..10);
        [
            Header::new(Kind::Write, id, 0).with_body(&body),
            Header::new(Kind::Data, id, 0).with_body(&[7; 10]),
            Header::new(Kind::Notify, id, 0).with_body(&[u8::try_from(id).unwrap()]),
        ]
        .concat()
    };
    // Refused, with its notification; then one that is accepted.
    data.write_all(&write(victim.guarded.id(), 1)).unwrap();
    data.write_all(&write(victim.open.id(), 2)).unwrap();
    let answers = [(); 3].map(|()| {
        let (answer, _) = next_frame(&mut data).unwrap();
        (answer.kind, answer.id, answer.code)
    });
    let (denied, ok) = (Code::AccessDenied as u8, Code::Ok as u8);
    assert_eq!(
        answers,
        [
            (Kind::StripeDone, 1, denied),
            (Kind::StripeDone, 2, ok),
            (Kind::Notified, 2, ok)
        ]
    );
    let received = victim.agent.notifications();
    assert_eq!(received.recv_timeout(WAIT).unwrap().payload, &[2][..]);
    assert_eq!(received.try_recv().unwrap(), None);
    // A second notification behind the same stripe.
    let again = Header::new(Kind::Notify, 2, 0).with_body(b"x");
    data.write_all(&again).unwrap();
    assert!(closed(&mut data));
}

#[test]
fn a_notification_beyond_the_limit_is_refused() {
    let victim = Victim::new();
    let (mut control, _data) = victim.enter();
    control
        .write_all(&Header::new(Kind::Notify, 5, 0).with_body(&[1; 1001]))
        .unwrap();
    let (answer, _) = next_frame(&mut control).unwrap();
    assert_eq!(
        (answer.kind, answer.code),
        (Kind::Notified, Code::TooLarge as u8)
    );
    control
        .write_all(&Header::new(Kind::Notify, 6, 0).with_body(&[1; 1000]))
        .unwrap();
    let (answer, _) = next_frame(&mut control).unwrap();
    assert_eq!((answer.id, answer.code), (6, Code::Ok as u8));
}

#[test]
fn a_hello_for_somebody_else_is_refused() {
    let victim = Victim::new();
    let mut other_epoch = victim.hello(HelloRole::Control);
    other_epoch.to_epoch += 1;
    let mut stolen = victim.hello(HelloRole::Data { nonce: 12345 });
    stolen.from_epoch = 1;
    for hello in [other_epoch, stolen] {
        let mut socket = victim.dial();
        socket.write_all(&hello.encode()).unwrap();
        let (answer, _) = next_frame(&mut socket).unwrap();
        assert_eq!(
            (answer.kind, answer.code),
            (Kind::Refuse, Code::Stale as u8)
        );
        assert!(closed(&mut socket));
    }
    let mut oversized = Header::new(Kind::Hello, 0, 0);
    oversized.len = 1 << 30;
    let mut socket = victim.dial();
    socket.write_all(&oversized.encode()).unwrap();
    assert!(closed(&mut socket));
    victim.serves();
}

/// A listener that answers every connection with `answer` and keeps it open.
fn false_peer(answer: &'static [u8]) -> (Metadata, TcpListener) {
    let real = Agent::new(AgentConfig::new("false").with_lanes([Lane::Tcp])).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut addresses = real.metadata().addresses().clone();
    addresses.tcp = Some(listener.local_addr().unwrap().to_string());
    let content = crate::MetadataContent::Complete;
    let (name, epoch) = ("false".into(), real.epoch());
    let metadata = Metadata::new(name, epoch, addresses, content, 0, Vec::new());
    let accepting = listener.try_clone().unwrap();
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        while let Ok((mut socket, _)) = accepting.accept() {
            let _ = socket.write_all(answer);
            kept.push(socket);
            if kept.len() > 4 {
                break;
            }
        }
    });
    (metadata, listener)
}

#[test]
fn false_peers_fail_the_connect_and_nothing_else() {
    let agent = Agent::new(AgentConfig::new("honest").with_lanes([Lane::Tcp])).unwrap();
    for answer in [
        &b""[..],
        &[0; 64],
        &[2; 4000],
        &[2, 0, 0, 0, 255, 255, 255, 255, 0, 0],
    ] {
        let (metadata, _listener) = false_peer(answer);
        let started = Instant::now();
        let refused = agent.connect(&metadata, Duration::from_millis(200));
        assert!(
            matches!(refused, Err(ConnectError::NoLane { .. })),
            "{refused:?}"
        );
        assert!(started.elapsed() < WAIT);
    }
    assert_eq!(agent.stats().peers, 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Noise before and after the handshake, on every kind of connection.
    #[test]
    fn noise_never_hurts(
        noise in proptest::collection::vec(any::<u8>(), 1..300),
        kinds in proptest::collection::vec((0u8..90, 0u8..12, 0u32..64, any::<u64>()), 1..8),
    ) {
        static VICTIM: std::sync::LazyLock<Victim> = std::sync::LazyLock::new(Victim::new);
        let victim = &*VICTIM;
        let _ = victim.dial().write_all(&noise);
        let (mut control, mut data) = victim.enter();
        for (kind, code, len, id) in kinds {
            let mut frame = Header::new(Kind::Ping, id, 0).encode().to_vec();
            (frame[0], frame[1]) = (kind, code);
            frame[4..8].copy_from_slice(&len.to_le_bytes());
            frame.extend(noise.iter().cycle().take(len as usize));
            let _ = control.write_all(&frame);
            let _ = data.write_all(&frame);
        }
        drop((control, data));
        prop_assert!(victim.untouched());
        let (mut control, _data) = victim.enter();
        control.write_all(&Header::new(Kind::AskRegion, victim.open.id().0, 3).encode()).unwrap();
        let (answer, _) = next_frame(&mut control).unwrap();
        prop_assert_eq!((answer.kind, answer.part), (Kind::Region, 3));
    }
}

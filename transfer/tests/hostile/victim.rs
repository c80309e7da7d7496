//! An honest agent, and connections of a liar to it.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use blockplane_transfer::{
    Agent, AgentConfig, ArenaConfig, Lane, Registration, RemoteAccess, Window, WindowAccess,
    WindowScope,
};

use crate::WAIT;
use crate::wire::{Hello, Stripe, WELCOME, nonce_of, receive};

pub(crate) const BYTES: usize = 64 << 10;
/// How long a connection may take to say hello.
pub(crate) const HELLO_WITHIN: Duration = Duration::from_millis(500);

pub(crate) struct Victim {
    pub(crate) agent: Agent,
    /// Open to peers, behind windows, and closed to peers: all full of 7.
    pub(crate) regions: [Registration; 3],
    /// Over the first quarter of the guarded region, for reading.
    pub(crate) window: Window,
    address: String,
}

impl Victim {
    pub(crate) fn new() -> Self {
        let mut config = AgentConfig::new("victim").with_lanes([Lane::Tcp]);
        config.tcp_bind = ([127, 0, 0, 1], free_port()).into();
        config.peer_loss_timeout = WAIT * 2;
        config.connect_timeout = HELLO_WITHIN;
        config.notification_bytes_max = 1000;
        config.notifications_max = 64;
        let address = config.tcp_bind.to_string();
        let agent = Agent::new(config).unwrap();
        let access = [
            RemoteAccess::Open,
            RemoteAccess::WindowOnly,
            RemoteAccess::None,
        ];
        let regions = access.map(|access| {
            let config = ArenaConfig::new(BYTES, "target").with_access(access);
            let region = agent.allocate(config).unwrap();
            region.write_at(0, &[7; BYTES]).unwrap();
            region
        });
        let quarter = std::iter::once(0..BYTES as u64 / 4).collect();
        let scope = WindowScope::Ranges(quarter);
        let window = agent
            .open_window(&regions[1], scope, WindowAccess::Read)
            .unwrap();
        Self {
            agent,
            regions,
            window,
            address,
        }
    }

    pub(crate) fn dial(&self) -> TcpStream {
        let socket = TcpStream::connect(&self.address).unwrap();
        socket.set_read_timeout(Some(WAIT)).unwrap();
        socket.set_nodelay(true).unwrap();
        socket
    }

    pub(crate) fn hello(&self, nonce: Option<u64>) -> Vec<u8> {
        let epoch = self.agent.epoch();
        Hello {
            nonce,
            to: "victim",
            epoch,
        }
        .encode()
    }

    /// A control and a data connection, properly greeted.
    pub(crate) fn enter(&self) -> (TcpStream, TcpStream) {
        let enter = |nonce| {
            let mut socket = self.dial();
            std::io::Write::write_all(&mut socket, &self.hello(nonce)).unwrap();
            let welcome = receive(&mut socket).unwrap();
            assert_eq!(welcome.kind, WELCOME);
            (socket, nonce_of(&welcome.body))
        };
        let (control, nonce) = enter(None);
        (control, enter(Some(nonce)).0)
    }

    /// Blocks of 64 bytes of a region; the first of them.
    pub(crate) fn stripe(&self, region: usize) -> Stripe<'static> {
        Stripe {
            region: self.regions[region].id().0,
            window: None,
            blocks: BYTES as u32 / 64,
            block_stride: 64,
            layers: 1,
            layer_stride: 64,
            run_bytes: 64,
            range: (0, 64),
            inner: &[],
            ids: crate::wire::Ids::List(&[0]),
        }
    }

    /// No byte of what is not open has changed.
    pub(crate) fn is_untouched(&self) -> bool {
        self.regions[1..].iter().all(|region| {
            let mut bytes = vec![0; BYTES];
            region.read_at(0, &mut bytes).unwrap();
            bytes.iter().all(|byte| *byte == 7)
        })
    }

    /// An honest peer is served.
    pub(crate) fn serves(&self) {
        let mut config = AgentConfig::new("friend").with_lanes([Lane::Tcp]);
        config.connect_timeout = WAIT;
        let friend = Agent::new(config).unwrap();
        let connected = || friend.connect(&self.agent.metadata(), WAIT);
        // Those who never say hello may be in the way for as long as they are waited for.
        let started = Instant::now();
        let peer = loop {
            match connected() {
                Ok(peer) => break peer,
                Err(error) => assert!(started.elapsed() < WAIT, "{error}"),
            }
        };
        // A liar may have filled the queue, and go on doing so for a while.
        let notes = self.agent.notifications();
        let told = std::iter::repeat_with(|| {
            while notes.try_recv().unwrap().is_some() {}
            friend.notify(&peer, "hello", WAIT).unwrap().wait(WAIT)
        });
        assert!(told.take(1000).any(|told| told.is_ok()));
        while notes.recv_timeout(WAIT).unwrap().payload != "hello" {}
    }
}

/// A port that nobody uses at this moment.
fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

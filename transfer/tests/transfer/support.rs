//! What the tests share: pairs of agents, patterned memory and an oracle.

use std::future::Future;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::Duration;

use blockplane_transfer::{
    Agent, AgentConfig, ArenaConfig, BlockLayout, FaultConfig, Lane, LocalBlocks, Op, Peer,
    PostOptions, PrepareError, Prepared, RegionId, Registration, RemoteAccess, RemoteBlocks,
    TlsConfig, WindowId,
};

use crate::tls::Authority;

/// Longer than anything takes on a busy machine; a test that gets here has failed.
pub(crate) const WAIT: Duration = Duration::from_secs(20);

/// An initiator `a` and a target `b`, connected.
pub(crate) struct Pair {
    pub(crate) a: Agent,
    pub(crate) b: Agent,
    pub(crate) peer: Peer,
}

/// How a suite makes its agents.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) lane: Lane,
    pub(crate) faults: Option<FaultConfig>,
    pub(crate) tls: Option<TlsConfig>,
}

impl Setup {
    pub(crate) fn new(lane: Lane) -> Self {
        Self {
            lane,
            faults: None,
            tls: None,
        }
    }

    /// TCP with certificates of an authority of its own.
    pub(crate) fn with_tls() -> Self {
        let tls = Some(Authority::new().local());
        Self {
            tls,
            ..Self::new(Lane::Tcp)
        }
    }

    pub(crate) fn config(&self, name: &str) -> AgentConfig {
        let mut config = AgentConfig::new(name).with_lanes([self.lane]);
        // Small parts and chunks: many of them even in small transfers.
        config.copy_part_bytes = 4096;
        config.copy_threads = 2;
        config.copy_bytes_per_thread = 16384;
        config.stream_chunk_bytes = 32768;
        config.io_threads = 2;
        // The suite loads the machine; only tests that are about silence shorten this.
        config.peer_loss_timeout = Duration::from_secs(10);
        // Each of a pair has a device of its own.
        if self.lane == Lane::Verbs {
            config.rdma.device = Some(if name == "a" { "rxe0" } else { "rxe1" }.to_owned());
            config.rdma.part_bytes = 16384;
        }
        config.faults = self.faults.clone();
        config.tls = self.tls.clone();
        config
    }

    pub(crate) fn pair(&self) -> Pair {
        self.pair_with(|_| {})
    }

    pub(crate) fn pair_with(&self, change: impl Fn(&mut AgentConfig)) -> Pair {
        let agent = |name: &str| {
            let mut config = self.config(name);
            change(&mut config);
            Agent::new(config).unwrap()
        };
        let (a, b) = (agent("a"), agent("b"));
        let peer = a.connect(&b.metadata(), WAIT).unwrap();
        assert_eq!(peer.lane().lane, self.lane);
        Pair { a, b, peer }
    }
}

/// One side of an operation.
#[derive(Clone, Debug)]
pub(crate) struct Blocks {
    pub(crate) layout: BlockLayout,
    pub(crate) ids: Arc<[u32]>,
    pub(crate) layers: Range<u32>,
}

impl Blocks {
    pub(crate) fn flat(blocks: u32, block_bytes: u64, ids: &[u32]) -> Self {
        Self {
            layout: BlockLayout::contiguous(blocks, block_bytes),
            ids: ids.into(),
            layers: 0..1,
        }
    }
}

impl Blocks {
    pub(crate) fn local<'a>(&self, registration: &'a Registration) -> LocalBlocks<'a> {
        LocalBlocks {
            registration,
            layout: self.layout,
            ids: self.ids.clone().into(),
            layers: self.layers.clone(),
        }
    }

    pub(crate) fn remote<'a>(
        &self,
        peer: &'a Peer,
        region: RegionId,
        window: Option<WindowId>,
    ) -> RemoteBlocks<'a> {
        RemoteBlocks {
            peer,
            region,
            layout: self.layout,
            ids: self.ids.clone().into(),
            layers: self.layers.clone(),
            window,
        }
    }
}

impl Pair {
    pub(crate) fn prepare(
        &self,
        op: Op,
        local: (&Registration, &Blocks),
        remote: (&Registration, &Blocks),
        window: Option<WindowId>,
    ) -> Result<Prepared, PrepareError> {
        self.a.prepare(
            op,
            LocalBlocks {
                registration: local.0,
                layout: local.1.layout,
                ids: local.1.ids.clone().into(),
                layers: local.1.layers.clone(),
            },
            RemoteBlocks {
                peer: &self.peer,
                region: remote.0.id(),
                layout: remote.1.layout,
                ids: remote.1.ids.clone().into(),
                layers: remote.1.layers.clone(),
                window,
            },
        )
    }

    /// Runs one operation and compares every byte of both regions with the oracle.
    pub(crate) fn check(
        &self,
        op: Op,
        local: (&Registration, &Blocks),
        remote: (&Registration, &Blocks),
    ) {
        fill(local.0, 1);
        fill(remote.0, 2);
        let (mut l, mut r) = (bytes(local.0), bytes(remote.0));
        let prepared = self.prepare(op, local, remote, None).unwrap();
        prepared
            .post(PostOptions::within(WAIT))
            .unwrap()
            .wait(WAIT)
            .unwrap();
        match op {
            Op::Write => oracle(&l, local.1, &mut r, remote.1),
            Op::Read => oracle(&r, remote.1, &mut l, local.1),
        }
        assert!(
            bytes(local.0) == l,
            "local bytes differ: {op:?} {local:?} {remote:?}"
        );
        assert!(
            bytes(remote.0) == r,
            "remote bytes differ: {op:?} {local:?} {remote:?}"
        );
    }
}

/// Copies as naively as possible.
pub(crate) fn oracle(from: &[u8], a: &Blocks, to: &mut [u8], b: &Blocks) {
    for (&x, &y) in a.ids.iter().zip(b.ids.iter()) {
        for (i, k) in a.layers.clone().zip(b.layers.clone()) {
            let x = a.layout.run_offset(x, i).unwrap() as usize;
            let y = b.layout.run_offset(y, k).unwrap() as usize;
            let run = a.layout.run_bytes as usize;
            to[y..y + run].copy_from_slice(&from[x..x + run]);
        }
    }
}

pub(crate) fn arena(agent: &Agent, bytes: u64) -> Registration {
    agent
        .allocate(ArenaConfig::new(bytes as usize, "test"))
        .unwrap()
}

pub(crate) fn arena_with(agent: &Agent, bytes: u64, access: RemoteAccess) -> Registration {
    agent
        .allocate(ArenaConfig::new(bytes as usize, "test").with_access(access))
        .unwrap()
}

/// Fills a region with a pattern in which every position and salt differs from its neighbours.
pub(crate) fn fill(region: &Registration, salt: u64) {
    let pattern: Vec<u8> = (0..region.len() as u64)
        .map(|i| (i.wrapping_add(salt).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
        .collect();
    region.write_at(0, &pattern).unwrap();
}

pub(crate) fn fill_byte(region: &Registration, byte: u8) {
    region.write_at(0, &vec![byte; region.len()]).unwrap();
}

pub(crate) fn bytes(region: &Registration) -> Vec<u8> {
    let mut all = vec![0; region.len()];
    region.read_at(0, &mut all).unwrap();
    all
}

/// `count` of the ids `0..of` in an order that has no runs, the same for the same seed.
pub(crate) fn scattered(of: u32, count: u32, seed: u64) -> Arc<[u32]> {
    let mut ids: Vec<u32> = (0..of).collect();
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    for i in (1..ids.len()).rev() {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ids.swap(i, (state >> 33) as usize % (i + 1));
    }
    ids.truncate(count as usize);
    ids.into()
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// The smallest executor: this thread, parked until it is woken.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::park_timeout(WAIT),
        }
    }
}

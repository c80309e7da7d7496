//! Blocks from the G2 of another worker: leases, one-sided reads and checksums, beside plain reads of the
//! same blocks over the same lane.

use std::{
    io::Write,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::ensure;
use blockplane_kvbm::{
    BlockPool, KvArena, MoveKind, MoveSpec, Mover, PeerParts, PeerTier, PeerTierConfig, PoolConfig,
    tier::{BlockOutcome, MoveId, MovedBlock},
};
use blockplane_protocol::{BlockHash, DType, DpRank, KvLayout, TokenBlock};
use blockplane_transfer::{
    Agent, AgentConfig, Lane, LocalBlocks, Op, Peer, PostOptions, RemoteBlocks, Window,
    WindowAccess, WindowScope,
};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use serde_json::json;

use super::{BENCH, Case, TiersArgs, fingerprint, moves::repeat, name};
use crate::report::{Record, Report, Samples, Table, case};

/// Longer than any batch takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// Measures every size of blocks.
pub(super) fn measure<W: Write>(
    args: &TiersArgs,
    runs: u32,
    time: Duration,
    report: &mut Report<W>,
) -> anyhow::Result<()> {
    let mut table = Table::new(&[
        "from a peer, over shm",
        "blocks/s",
        "GB/s",
        "plain GB/s",
        "ratio",
        "cores",
        "runs",
    ]);
    for &block_bytes in &args.block_bytes {
        let place = Case::new(args, block_bytes)?;
        let pair = Pair::start(place)?;
        pair.check()?;
        let (mut rates, mut cores, mut plain) = <(Samples, Samples, Samples)>::default();
        for round in 0..u64::from(runs) {
            let (rate, used) = repeat(&place, time, round, |thread, slots| {
                pair.borrow(thread, slots)
            })?;
            rates.push(rate);
            cores.push(used);
            plain.push(
                repeat(&place, time, round, |thread, slots| {
                    pair.read(thread, slots)
                })?
                .0,
            );
        }
        let described = case([
            ("from", json!("peer")),
            ("to", json!("g2")),
            ("lane", json!("shm")),
            ("block_bytes", json!(block_bytes)),
            ("batch", json!(place.batch)),
            ("threads", json!(place.threads)),
        ]);
        let of = |metric, unit, samples| {
            Record::of_samples(BENCH, described.clone(), metric, unit, samples)
        };
        let mut bandwidth = of("bandwidth_gb_per_s", "GB/s", &rates);
        let limit = plain.median();
        bandwidth.limit = Some(limit);
        bandwidth.ratio = Some(bandwidth.value / limit);
        report.record(&bandwidth)?;
        report.record(&of("cpu_cores", "cores", &cores))?;
        let per_s = rates.median() * 1e9 / block_bytes as f64;
        let n = rates.len() as u64;
        let described = described.clone();
        let blocks = Record::new(BENCH, described, "blocks_per_s", "1/s", per_s, n);
        report.record(&blocks)?;
        table.row(vec![
            format!(
                "{} KiB, {} x {}",
                block_bytes >> 10,
                place.threads,
                place.batch
            ),
            format!("{per_s:.0}"),
            format!("{:.3}", rates.median()),
            format!("{limit:.3}"),
            format!("{:.2}", rates.median() / limit),
            format!("{:.3}", cores.median()),
            rates.len().to_string(),
        ]);
    }
    report.table(&table)?;
    Ok(())
}

/// The name of a block that begins a prompt: its sequence is itself.
fn first_name(slot: u32) -> TokenBlock {
    let sequence = name(slot, 0).sequence;
    TokenBlock {
        block: BlockHash(sequence.0),
        sequence,
    }
}

/// A worker's G2, and how it exchanges blocks.
struct Worker {
    agent: Agent,
    host: Arc<KvArena>,
    peers: Arc<PeerTier>,
}

/// One that has all blocks, and one that reads them.
struct Pair {
    case: Case,
    reader: Worker,
    lender: Worker,
    /// For plain reads.
    link: Peer,
    window: Window,
}

impl Worker {
    fn start(name: &str, case: &Case, blocks: u32) -> anyhow::Result<Self> {
        let agent = Agent::new(AgentConfig::new(name).with_lanes([Lane::Shm]))?;
        // Two planes of 16 tokens of two bytes.
        let width = u32::try_from(case.block_bytes / 64)?;
        let layout = KvLayout::dense(1, 1, width, 16, DType::F16);
        let host = KvArena::allocate(&agent, layout, blocks, "g2")?;
        let parts = PeerParts {
            control: agent.clone(),
            agent: agent.clone(),
            host: Arc::clone(&host),
            fingerprint: fingerprint(),
        };
        let most = 2 * (case.threads * case.batch) as usize;
        let config = PeerTierConfig {
            lent_blocks_max: most.max(PeerTierConfig::default().lent_blocks_max),
            ..PeerTierConfig::default()
        };
        let peers = PeerTier::start(parts, config)?;
        Ok(Self { agent, host, peers })
    }
}

impl Pair {
    fn start(case: Case) -> anyhow::Result<Self> {
        let lender = Worker::start("bench-lender", &case, case.slots)?;
        let reader = Worker::start("bench-reader", &case, case.threads * case.batch)?;
        let pool = BlockPool::new(Arc::clone(&lender.host), PoolConfig::default());
        let mut random = SmallRng::seed_from_u64(case.seed);
        let mut contents = vec![0; usize::try_from(case.block_bytes)?];
        random.fill(&mut contents[..]);
        for block in pool.allocate(case.slots as usize)? {
            let id = block.id().0;
            contents[..4].copy_from_slice(&id.to_le_bytes());
            let at = u64::from(id) * case.block_bytes;
            lender.host.registration().write_at(at, &contents)?;
            drop(block.complete(first_name(id), None).register());
        }
        lender.peers.lend(pool)?;
        lender.peers.add_peer(&reader.agent.metadata())?;
        reader.peers.add_peer(&lender.agent.metadata())?;
        let until = Instant::now() + PATIENCE;
        while reader.peers.stats().names < u64::from(case.slots) {
            ensure!(Instant::now() < until, "the peers do not meet");
            std::thread::park_timeout(Duration::from_millis(5));
        }
        let link = reader.agent.connect(&lender.agent.metadata(), PATIENCE)?;
        let (scope, access) = (WindowScope::Region, WindowAccess::Read);
        let registration = lender.host.registration();
        let window = lender.agent.open_window(registration, scope, access)?;
        Ok(Self {
            case,
            reader,
            lender,
            link,
            window,
        })
    }

    /// As the tier manager does it.
    fn borrow(&self, thread: u32, slots: &[u32]) -> anyhow::Result<()> {
        let first = thread * self.case.batch;
        let blocks = (first..).zip(slots).map(|(to, &slot)| MovedBlock {
            from: to,
            to,
            name: first_name(slot),
            parent: None,
        });
        let report = self.reader.peers.run(&MoveSpec {
            id: MoveId(0),
            kind: MoveKind::RemoteToHost,
            rank: DpRank(0),
            blocks: blocks.collect(),
            time: PATIENCE,
        });
        let other = report.outcomes.iter().find(|o| **o != BlockOutcome::Moved);
        ensure!(other.is_none(), "a block was not read: {other:?}");
        Ok(())
    }

    /// The bytes alone.
    fn read(&self, thread: u32, slots: &[u32]) -> anyhow::Result<()> {
        let first = thread * self.case.batch;
        let local: Vec<u32> = (first..).take(slots.len()).collect();
        let layout = self.reader.host.transfer_layout();
        let prepared = self.reader.agent.prepare(
            Op::Read,
            LocalBlocks {
                registration: self.reader.host.registration(),
                layout,
                ids: local.into(),
                layers: 0..layout.layers,
            },
            RemoteBlocks {
                peer: &self.link,
                region: self.lender.host.registration().id(),
                layout: self.lender.host.transfer_layout(),
                ids: slots.to_vec().into(),
                layers: 0..layout.layers,
                window: Some(self.window.id()),
            },
        )?;
        prepared
            .post(PostOptions::within(PATIENCE))?
            .wait(PATIENCE)?;
        Ok(())
    }

    /// Reads a batch both ways and compares.
    fn check(&self) -> anyhow::Result<()> {
        let slots: Vec<u32> = (0..self.case.batch)
            .map(|i| i * 3 % self.case.slots)
            .collect();
        let bytes = usize::try_from(u64::from(self.case.batch) * self.case.block_bytes)?;
        let memory = self.reader.host.registration();
        let (mut plain, mut lent) = (vec![0; bytes], vec![0; bytes]);
        self.read(0, &slots)?;
        memory.read_at(0, &mut plain)?;
        memory.write_at(0, &lent)?;
        self.borrow(0, &slots)?;
        memory.read_at(0, &mut lent)?;
        ensure!(plain == lent, "blocks came wrong from the peer");
        Ok(())
    }
}

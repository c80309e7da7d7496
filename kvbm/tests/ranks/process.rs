//! Real processes: a leader here and two ranks that are this binary, started again.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use blockplane_kvbm::{
    KvArena, MoveKind, Mover, RankWorker, RankedMover, SlotStore, SlotStoreConfig,
    ranks::{join_leader, serve_ranks},
    store::StoreLocation,
    tier::{BlockOutcome, Invalid, LocalMover},
};
use blockplane_protocol::DpRank;
use blockplane_transfer::{Agent, AgentConfig, Lane};

use super::{BLOCKS, layout, shape, spec};

const TIME: Duration = Duration::from_secs(10);

fn agent(name: &str) -> Agent {
    let mut config = AgentConfig::new(name).with_lanes([Lane::Loopback, Lane::Shm, Lane::Tcp]);
    config.peer_loss_timeout = Duration::from_secs(1);
    Agent::new(config).unwrap()
}

/// Byte `at` of a layer of a block of a rank.
fn byte(rank: u32, block: u32, layer: u32, at: u64) -> u8 {
    (u64::from(rank) * 101 + u64::from(block) * 13 + u64::from(layer) * 7 + at * 3) as u8
}

fn fill(arena: &KvArena, rank: u32) {
    let layout = arena.transfer_layout();
    for block in 0..BLOCKS {
        for layer in 0..layout.layers {
            let run = (0..layout.run_bytes).map(|at| byte(rank, block, layer, at));
            let run: Vec<u8> = run.collect();
            let at = layout.run_offset(block, layer).unwrap();
            arena.registration().write_at(at, &run).unwrap();
        }
    }
}

/// Whether block `block` has what block `was` was filled with.
fn same(arena: &KvArena, rank: u32, block: u32, was: u32) -> bool {
    let layout = arena.transfer_layout();
    (0..layout.layers).all(|layer| {
        let mut run = vec![0; layout.run_bytes as usize];
        let at = layout.run_offset(block, layer).unwrap();
        arena.registration().read_at(at, &mut run).unwrap();
        (0..)
            .zip(&run)
            .all(|(at, found)| *found == byte(rank, was, layer, at))
    })
}

/// Not a test: a rank. Answers `same BLOCK WAS` until its standard input closes.
#[test]
#[ignore = "started by the test of this file"]
fn rank_process() {
    let stdin = std::io::stdin();
    let mut lines = stdin.lock();
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    let [rank, leader, folder] = line.split_whitespace().collect::<Vec<_>>()[..] else {
        panic!("{line:?}");
    };
    let rank: u32 = rank.parse().unwrap();
    let shape = shape(rank, 2);
    let net = agent(&format!("rank-{rank}-{}", std::process::id()));
    let cache = agent(&format!("cache-{rank}-{}", std::process::id()));
    let device = KvArena::allocate(&net, layout(), BLOCKS, "g1").unwrap();
    let host = KvArena::allocate(&cache, layout(), BLOCKS, "g2").unwrap();
    fill(&device, rank);
    let bytes = host.transfer_layout();
    let location = StoreLocation::Folder(folder.into());
    let bytes = u64::from(bytes.layers) * bytes.run_bytes;
    let config = SlotStoreConfig::new(location, BLOCKS, bytes, shape.fingerprint);
    let (store, _) = SlotStore::open(&cache, &config).unwrap();
    let mover = LocalMover::new(cache, host, Some(store));
    mover.attach(DpRank(0), &net, &device).unwrap();
    let address = net.metadata().to_bytes();
    let worker = RankWorker::start(shape, net.epoch(), address, Arc::new(mover), 2).unwrap();
    let _link = join_leader(&net, leader, &worker, TIME).unwrap();
    println!("rank is ready");
    loop {
        line.clear();
        if lines.read_line(&mut line).unwrap() == 0 {
            return;
        }
        let numbers = line.split_whitespace().filter_map(|word| word.parse().ok());
        let [block, was] = numbers.collect::<Vec<u32>>()[..] else {
            panic!("{line:?}");
        };
        println!("rank says {}", same(&device, rank, block, was));
    }
}

struct RankProcess {
    child: Child,
    stdin: ChildStdin,
    lines: BufReader<ChildStdout>,
}

impl RankProcess {
    fn start(rank: u32, leader: &str, folder: &std::path::Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--ignored",
                "--exact",
                "process::rank_process",
                "--nocapture",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        writeln!(stdin, "{rank} {leader} {}", folder.display()).unwrap();
        let mut process = Self {
            child,
            stdin,
            lines,
        };
        assert_eq!(process.hear(), "ready");
        process
    }

    fn hear(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert!(self.lines.read_line(&mut line).unwrap() > 0, "it ended");
            if let Some((_, said)) = line.split_once("rank ")
                && let Some((_, word)) = said.split_once(' ')
                && !said.starts_with("process")
            {
                return word.trim().to_owned();
            }
        }
    }

    fn same(&mut self, block: u32, was: u32) -> bool {
        writeln!(self.stdin, "{block} {was}").unwrap();
        self.hear() == "true"
    }

    /// Sends a signal and waits until the process is in one of `states`, as /proc calls them.
    fn signal(&self, name: &str, states: &str) {
        let pid = self.child.id().to_string();
        let done = Command::new("kill").args([name, &pid]).status().unwrap();
        assert!(done.success());
        let until = Instant::now() + TIME;
        loop {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            let (_, rest) = stat.rsplit_once(") ").unwrap();
            if rest.starts_with(|state| states.contains(state)) {
                return;
            }
            assert!(Instant::now() < until, "{name}: {rest}");
            std::thread::yield_now();
        }
    }
}

impl Drop for RankProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn moved(leader: &RankedMover, kind: MoveKind, from: u32, to: u32) {
    let report = leader.run(&spec(kind, from, to, 3, TIME));
    let expected = vec![BlockOutcome::Moved; 3];
    assert_eq!(report.outcomes, expected, "{kind}");
}

#[test]
fn ranks_of_other_processes_move_blocks_die_and_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let net = agent(&format!("leader-{}", std::process::id()));
    let leader = RankedMover::new(shape(0, 2), net.epoch());
    let _host = serve_ranks(&net, &leader).unwrap();
    let metadata = net.metadata();
    let address = metadata.tcp_address().unwrap();
    let start = |rank| RankProcess::start(rank, address, folder.path());
    let mut ranks = [start(0), start(1)];
    leader.wait_ready(TIME).unwrap();

    // G1 to G2 to G3 and back to other blocks, on both ranks.
    moved(&leader, MoveKind::DeviceToHost, 0, 5);
    moved(&leader, MoveKind::HostToDisk, 5, 2);
    moved(&leader, MoveKind::DiskToHost, 2, 9);
    moved(&leader, MoveKind::HostToDevice, 9, 12);
    for rank in &mut ranks {
        for at in 0..3 {
            assert!(rank.same(12 + at, at));
        }
        assert!(rank.same(3, 3), "nothing else has changed");
    }

    // A rank that is stopped fails the move within its time; the leader stays well.
    ranks[1].signal("-STOP", "T");
    let started = Instant::now();
    let time = Duration::from_millis(300);
    let report = leader.run(&spec(MoveKind::DeviceToHost, 0, 5, 3, time));
    assert!(
        started.elapsed() < Duration::from_secs(4),
        "{:?}",
        started.elapsed()
    );
    let failed = |o: &BlockOutcome| matches!(o, BlockOutcome::Failed(_));
    assert!(report.outcomes.iter().all(failed), "{:?}", report.outcomes);
    ranks[1].signal("-CONT", "SR");
    if let Some(pending) = report.pending {
        pending.wait();
    }
    leader.wait_ready(TIME).unwrap();
    moved(&leader, MoveKind::DeviceToHost, 0, 5);

    // One that is killed fails moves until another process takes its place, with what is in G3.
    ranks[1].signal("-KILL", "ZX");
    let report = leader.run(&spec(MoveKind::DiskToHost, 2, 9, 3, TIME));
    assert!(report.outcomes.iter().all(failed), "{:?}", report.outcomes);
    ranks[1] = start(1);
    leader.wait_ready(TIME).unwrap();
    if let Some(pending) = report.pending {
        pending.wait();
    }
    // Its memory is new: what only the books have is not given to anybody, on no rank.
    let missing = vec![BlockOutcome::Invalid(Invalid::Missing); 3];
    for kind in [MoveKind::HostToDevice, MoveKind::HostToDisk] {
        let report = leader.run(&spec(kind, 5, 12, 3, TIME));
        assert_eq!(report.outcomes, missing, "{kind}");
    }
    assert!(ranks[1].same(12, 12), "nothing came into its G1");
    let report = leader.run(&spec(MoveKind::DeviceToHost, 0, 5, 3, TIME));
    assert!(report.outcomes.iter().all(failed), "{:?}", report.outcomes);
    moved(&leader, MoveKind::DiskToHost, 2, 9);
    moved(&leader, MoveKind::HostToDevice, 9, 12);
    for rank in &mut ranks {
        for at in 0..3 {
            assert!(rank.same(12 + at, at));
        }
    }
    leader.device_emptied();
    moved(&leader, MoveKind::DeviceToHost, 0, 5);
    assert_eq!(leader.stats().open, 0);
}

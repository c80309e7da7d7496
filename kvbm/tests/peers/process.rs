//! Real processes: the lender is this binary, started again, and is stopped or killed.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use blockplane_kvbm::{Mover, PeerTierConfig, RemoteIndex, tier::BlockOutcome};
use blockplane_transfer::Metadata;

use super::{Worker, eventually, holds, prompt, spec};

const TIME: Duration = Duration::from_millis(700);
/// What a move may take beyond its time: to be called off, on a busy machine.
const SLACK: Duration = Duration::from_millis(800);

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn metadata(line: &str) -> Metadata {
    let digits = line.trim();
    let bytes = (0..digits.len() / 2)
        .map(|at| u8::from_str_radix(&digits[2 * at..2 * at + 2], 16).unwrap());
    Metadata::from_bytes(&bytes.collect::<Vec<_>>()).unwrap()
}

/// Not a test: a lender. Says who it is, hears who its peer is, lends until it is killed or its
/// standard input closes.
#[test]
#[ignore = "started by the tests of this file"]
fn lender_process() {
    let name = format!("lender-{}", std::process::id());
    let worker = Worker::start(&name, 7, PeerTierConfig::default());
    worker.compute(&prompt(9, 8));
    println!("lender {}", hex(&worker.control.metadata().to_bytes()));
    let mut lines = std::io::stdin().lines();
    let peer = lines.next().unwrap().unwrap();
    worker.peers.add_peer(&metadata(&peer)).unwrap();
    while lines.next().is_some() {}
}

/// Not a test: a reader that reads without end what the lender of the other test process has.
#[test]
#[ignore = "started by the tests of this file"]
fn reader_process() {
    let name = format!("reader-{}", std::process::id());
    let worker = Worker::start(&name, 7, PeerTierConfig::default());
    println!("reader {}", hex(&worker.control.metadata().to_bytes()));
    let mut lines = std::io::stdin().lines();
    let peer = lines.next().unwrap().unwrap();
    worker.peers.add_peer(&metadata(&peer)).unwrap();
    // Until it is killed.
    let until = Instant::now() + Duration::from_secs(60);
    while Instant::now() < until {
        // It may be stopped in between.
        if !read_unhurried(&worker).0 {
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }
}

/// The other process.
struct Other {
    child: Child,
}

impl Other {
    fn start(kind: &str, own: &Worker) -> Self {
        let test = format!("process::{kind}_process");
        let arguments = ["--ignored", "--exact", &test, "--nocapture"];
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let word = format!("{kind} ");
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let line = lines
            .map_while(Result::ok)
            .find_map(|line| line.split_once(&word).map(|(_, hex)| hex.to_owned()));
        own.peers.add_peer(&metadata(&line.unwrap())).unwrap();
        let stdin = child.stdin.as_mut().unwrap();
        let address = hex(&own.control.metadata().to_bytes());
        writeln!(stdin, "{address}").unwrap();
        stdin.flush().unwrap();
        Self { child }
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill")
            .args([signal, &self.child.id().to_string()])
            .status();
        assert!(sent.unwrap().success());
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        // It may be dead already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads the lender's prompt: whether all of it came. What came is right, and it takes no longer
/// than it may.
fn read(reader: &Worker) -> bool {
    let (all, took) = read_unhurried(reader);
    assert!(took < TIME + SLACK, "{took:?}");
    all
}

/// The same in any time, and how long the move took. What is pending after it is waited for.
fn read_unhurried(reader: &Worker) -> (bool, Duration) {
    let prompt = prompt(9, 8);
    let started = Instant::now();
    let report = reader.peers.run(&spec(prompt.blocks(), 0, TIME));
    let took = started.elapsed();
    assert_eq!(report.outcomes.len(), 8);
    for ((block, name), outcome) in (0..).zip(prompt.blocks()).zip(&report.outcomes) {
        match outcome {
            BlockOutcome::Moved => assert!(holds(&reader.host, block, *name), "wrong bytes"),
            BlockOutcome::Failed(_) | BlockOutcome::Invalid(_) => {}
            BlockOutcome::Bad(why) => panic!("{why}"),
        }
    }
    let all = report.outcomes.iter().all(|o| *o == BlockOutcome::Moved);
    if let Some(pending) = report.pending {
        assert!(!all);
        pending.wait();
    }
    (all, took)
}

#[test]
fn lenders_that_stop_or_die_cost_the_time_of_a_move() {
    let reader = Worker::start("survivor", 7, PeerTierConfig::default());
    let prompt = prompt(9, 8);
    for round in 0..4_u64 {
        let lender = Other::start("lender", &reader);
        eventually("it is known what the lender has", || reader.knows(&prompt));
        assert!(read(&reader));
        let stops = round % 2 == 0;
        std::thread::scope(|threads| {
            // In the middle of something, somewhere else each time.
            let reads = threads.spawn(|| {
                let until = Instant::now() + Duration::from_secs(1);
                let mut ended = false;
                while Instant::now() < until && !ended {
                    ended = !read(&reader);
                }
                ended
            });
            std::thread::park_timeout(Duration::from_millis(100 + round * 7));
            lender.signal(if stops { "-STOP" } else { "-KILL" });
            assert!(reads.join().unwrap(), "nothing can be read");
        });
        if stops {
            // It is not found, and so costs nothing, until it has said something.
            assert!(!reader.knows(&prompt));
            let started = Instant::now();
            assert!(!read(&reader));
            assert!(started.elapsed() < Duration::from_millis(200));
            lender.signal("-CONT");
            eventually("it is found again", || reader.knows(&prompt));
            assert!(read(&reader));
        }
        drop(lender);
        eventually("its names go with it", || reader.peers.is_empty());
    }
}

/// A reader that stops in the middle keeps what it may still be copying until it goes on or dies: its
/// mapping cannot be taken from it.
#[test]
fn readers_that_stop_or_die_give_everything_back() {
    let own = Worker::start("owner", 7, PeerTierConfig::default());
    own.compute(&prompt(9, 8));
    for round in 0..6_u64 {
        let reader = Other::start("reader", &own);
        let before = own.peers.stats();
        eventually("it reads", || own.peers.stats().lent > before.lent + 80);
        std::thread::park_timeout(Duration::from_micros(300 + round * 1700));
        match round % 3 {
            0 => reader.signal("-KILL"),
            1 => {
                reader.signal("-STOP");
                eventually("it is lost", || own.peers.stats().lost > before.lost);
                reader.signal("-KILL");
            }
            _ => {
                reader.signal("-STOP");
                eventually("it is lost", || own.peers.stats().lost > before.lost);
                reader.signal("-CONT");
                let lent = own.peers.stats().lent;
                eventually("it reads again", || own.peers.stats().lent > lent);
                reader.signal("-KILL");
            }
        }
        eventually("all is given back", || own.peers.stats().held == 0);
        assert_eq!(own.manager.host().stats().active, 0);
        drop(reader);
    }
}

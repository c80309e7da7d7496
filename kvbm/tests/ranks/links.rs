//! In one process: what the leader makes of what the ranks say, over links with faults.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use blockplane_kvbm::{
    MoveKind, MoveReport, MoveSpec, Mover, RankWorker, RankedMover,
    ranks::{RankError, RankLink},
    tier::{BlockOutcome, Invalid, TierFault},
};

use super::{shape, spec};

const TIME: Duration = Duration::from_secs(5);

/// A rank's memory: what is in each block, how often each block was written, and what goes wrong.
#[derive(Default)]
struct Memory {
    blocks: Mutex<HashMap<u32, u64>>,
    script: Mutex<Vec<MoveReport>>,
    runs: AtomicU32,
    pause: Mutex<Duration>,
}

impl Mover for Memory {
    fn run(&self, spec: &MoveSpec) -> MoveReport {
        self.runs.fetch_add(1, Ordering::AcqRel);
        let (wake, woken) = mpsc::channel::<()>();
        let pause = *self.pause.lock().unwrap();
        let _ = woken.recv_timeout(pause);
        drop(wake);
        if let Some(scripted) = self.script.lock().unwrap().pop() {
            return scripted;
        }
        let mut blocks = self.blocks.lock().unwrap();
        for block in &spec.blocks {
            blocks.insert(block.to, spec.id.0);
        }
        MoveReport::moved(spec.blocks.len(), 10)
    }
}

/// Hands messages over at once.
enum Direct {
    ToLeader(RankedMover, Mutex<Option<Arc<dyn RankLink>>>),
    ToRank(Weak<RankWorker>),
}

impl RankLink for Direct {
    fn send(&self, message: Vec<u8>, _: Duration) -> Result<(), String> {
        match self {
            Self::ToLeader(leader, back) => {
                let back = back.lock().unwrap().clone();
                leader.receive(&message, &back.ok_or("no way back")?);
            }
            Self::ToRank(rank) => rank.upgrade().ok_or("the rank is gone")?.receive(&message),
        }
        Ok(())
    }
}

/// Loses, repeats and delays messages, so that they overtake one another.
struct Faulty {
    inner: Arc<dyn RankLink>,
    random: Mutex<u64>,
    late: mpsc::Sender<(Instant, Vec<u8>)>,
}

impl Faulty {
    fn over(inner: Arc<dyn RankLink>, seed: u64) -> Arc<dyn RankLink> {
        let (late, waiting) = mpsc::channel::<(Instant, Vec<u8>)>();
        let deliver = Arc::clone(&inner);
        std::thread::spawn(move || {
            let mut held: Vec<(Instant, Vec<u8>)> = Vec::new();
            loop {
                match waiting.recv_timeout(Duration::from_millis(1)) {
                    Ok(next) => held.push(next),
                    Err(mpsc::RecvTimeoutError::Timeout) => {}
                    Err(mpsc::RecvTimeoutError::Disconnected) => return,
                }
                let now = Instant::now();
                for (_, message) in held.extract_if(.., |(at, _)| *at <= now) {
                    let _ = deliver.send(message, TIME);
                }
            }
        });
        Arc::new(Self {
            inner,
            random: Mutex::new(seed),
            late,
        })
    }

    fn random(&self) -> u64 {
        let mut state = self.random.lock().unwrap();
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed ^ (mixed >> 31)
    }
}

impl RankLink for Faulty {
    fn send(&self, message: Vec<u8>, time: Duration) -> Result<(), String> {
        let late = |millis| {
            let at = Instant::now() + Duration::from_millis(millis);
            self.late.send((at, message.clone())).unwrap();
        };
        match self.random() % 10 {
            0 | 1 => {}
            2 | 3 => {
                late(self.random() % 30);
                late(self.random() % 90);
            }
            4 | 5 => late(self.random() % 60),
            6 => {
                late(self.random() % 60);
                self.inner.send(message, time)?;
            }
            _ => self.inner.send(message, time)?,
        }
        Ok(())
    }
}

struct Rank {
    memory: Arc<Memory>,
    worker: Arc<RankWorker>,
    to_leader: Arc<dyn RankLink>,
}

/// A rank in this process; `wrap` puts faults around a link.
fn rank(
    leader: &RankedMover,
    (number, epoch): (u32, u64),
    wrap: impl Fn(Arc<dyn RankLink>) -> Arc<dyn RankLink>,
) -> Rank {
    let memory = Arc::new(Memory::default());
    let shape = shape(number, leader.size());
    let mover = Arc::clone(&memory) as Arc<dyn Mover>;
    let worker = RankWorker::start(shape, epoch, Vec::new(), mover, 2).unwrap();
    let back: Arc<dyn RankLink> = Arc::new(Direct::ToRank(Arc::downgrade(&worker)));
    let back = Mutex::new(Some(wrap(back)));
    let to_leader = wrap(Arc::new(Direct::ToLeader(leader.clone(), back)));
    Rank {
        memory,
        worker,
        to_leader,
    }
}

fn two() -> (RankedMover, Vec<Rank>) {
    let leader = RankedMover::new(shape(0, 2), 1000);
    let ranks: Vec<Rank> = (0..2)
        .map(|number| rank(&leader, (number, u64::from(number) + 1), |link| link))
        .collect();
    for rank in &ranks {
        rank.worker.join(Arc::clone(&rank.to_leader), TIME).unwrap();
    }
    leader.wait_ready(TIME).unwrap();
    (leader, ranks)
}

#[test]
fn a_block_is_moved_when_all_ranks_moved_it() {
    let (leader, ranks) = two();
    let four = spec(MoveKind::DeviceToHost, 0, 4, 4, TIME);
    let report = leader.run(&four);
    assert_eq!(report.outcomes, vec![BlockOutcome::Moved; 4]);
    assert_eq!((report.bytes, report.pending.is_none()), (20, true));
    for rank in &ranks {
        assert_eq!(rank.memory.blocks.lock().unwrap().len(), 4);
    }

    let failed = || BlockOutcome::Failed("no".to_owned());
    let bad = || BlockOutcome::Bad("worn".to_owned());
    let wrong = || BlockOutcome::Invalid(Invalid::Checksum);
    let say = |rank: usize, outcomes: Vec<BlockOutcome>, fault: Option<TierFault>| {
        ranks[rank].memory.script.lock().unwrap().push(MoveReport {
            fault,
            outcomes,
            ..MoveReport::moved(0, 0)
        });
    };
    let moved = BlockOutcome::Moved;
    let off = TierFault::Off("gone".to_owned());
    say(0, vec![moved.clone(), failed(), wrong(), failed()], None);
    say(
        1,
        vec![failed(), bad(), failed(), moved.clone()],
        Some(off.clone()),
    );
    let report = leader.run(&four);
    assert_eq!(report.outcomes, [failed(), bad(), wrong(), failed()]);
    assert_eq!(report.fault, Some(off));
    // One that says nothing of a block has not moved it.
    say(1, vec![moved.clone()], None);
    let report = leader.run(&four);
    assert_eq!(report.outcomes[0], moved);
    assert!(
        report.outcomes[1..]
            .iter()
            .all(|outcome| matches!(outcome, BlockOutcome::Failed(_)))
    );
    assert_eq!(leader.stats().open, 0);
}

#[test]
fn a_slow_rank_costs_the_time_of_the_move_and_its_blocks_wait() {
    let (leader, ranks) = two();
    *ranks[1].memory.pause.lock().unwrap() = Duration::from_millis(700);
    let started = Instant::now();
    let time = Duration::from_millis(100);
    let report = leader.run(&spec(MoveKind::DeviceToHost, 0, 4, 2, time));
    assert!(started.elapsed() < Duration::from_millis(500));
    let late = |outcome: &BlockOutcome| matches!(outcome, BlockOutcome::Failed(why) if why.contains("rank 1"));
    assert!(report.outcomes.iter().all(late), "{:?}", report.outcomes);
    assert_eq!(leader.stats().open, 1);
    report.pending.expect("rank 1 still copies").wait();
    assert!(started.elapsed() >= Duration::from_millis(700));
    assert_eq!(ranks[1].memory.blocks.lock().unwrap().len(), 2);
    assert_eq!((leader.stats().open, leader.stats().unanswered), (0, 1));
}

#[test]
fn a_rank_that_ended_fails_moves_and_comes_back() {
    let (leader, ranks) = two();
    *ranks[1].memory.pause.lock().unwrap() = TIME;
    let stopped = leader.clone();
    let ending = std::thread::spawn(move || {
        let until = Instant::now() + TIME;
        while stopped.stats().open == 0 && Instant::now() < until {
            std::thread::yield_now();
        }
        stopped.ended(1, 2);
    });
    let started = Instant::now();
    let report = leader.run(&spec(MoveKind::DeviceToHost, 0, 4, 2, TIME));
    ending.join().unwrap();
    assert!(started.elapsed() < TIME / 2, "nobody waits for the dead");
    assert!(report.pending.is_none());
    let later = leader.run(&spec(MoveKind::DeviceToHost, 0, 4, 2, TIME));
    assert!(
        matches!(&later.outcomes[0], BlockOutcome::Failed(why) if why == "rank 1 is not there")
    );
    // Its late greeting is not that of a living rank.
    ranks[1].worker.greet();
    let missing = leader.wait_ready(Duration::from_millis(20)).unwrap_err();
    assert!(matches!(missing, RankError::Missing { missing, .. } if missing == [1]));

    let again = rank(&leader, (1, 77), |link| link);
    again
        .worker
        .join(Arc::clone(&again.to_leader), TIME)
        .unwrap();
    leader.wait_ready(TIME).unwrap();
    // Its G1 is empty, whatever the books say.
    assert!(leader.device_lost());
    let refused = leader.run(&spec(MoveKind::DeviceToHost, 0, 4, 2, TIME));
    assert!(
        matches!(&refused.outcomes[0], BlockOutcome::Failed(why) if why.contains("started anew"))
    );
    assert_eq!(again.memory.runs.load(Ordering::Acquire), 0);
    leader.device_emptied();
    let report = leader.run(&spec(MoveKind::DeviceToHost, 0, 4, 2, TIME));
    assert_eq!(report.outcomes, vec![BlockOutcome::Moved; 2]);
    assert_eq!(again.memory.runs.load(Ordering::Acquire), 1);
}

#[test]
fn ranks_that_do_not_fit_are_refused() {
    let leader = RankedMover::new(shape(0, 2), 1);
    let mut other_model = shape(1, 2);
    other_model.fingerprint.model ^= 1;
    let mut smaller = shape(1, 2);
    smaller.host_blocks -= 1;
    for (shape, why) in [
        (other_model, "model"),
        (smaller, "15 blocks in G2; the leader has 16"),
        (shape(2, 3), "rank 2 of 3"),
    ] {
        let memory = Arc::new(Memory::default());
        let worker = RankWorker::start(shape, 5, Vec::new(), memory, 1).unwrap();
        let back: Arc<dyn RankLink> = Arc::new(Direct::ToRank(Arc::downgrade(&worker)));
        let link = Direct::ToLeader(leader.clone(), Mutex::new(Some(back)));
        let refused = worker.join(Arc::new(link), TIME).unwrap_err();
        let RankError::Refused { reason } = refused else {
            panic!("{refused}");
        };
        assert!(reason.contains(why), "{reason}");
    }
    let none = leader.wait_ready(Duration::from_millis(10)).unwrap_err();
    assert_eq!(
        none.to_string(),
        "ranks [0, 1] of 2 did not join within 10ms"
    );
}

/// Whatever the links do: no move is done twice, a block that is reported as moved is moved on all
/// ranks, and nothing is written after a move is over.
#[test]
fn bad_links_cost_moves_and_nothing_else() {
    let mut moved = 0;
    for seed in 0..12 {
        let leader = RankedMover::new(shape(0, 2), 9);
        let ranks: Vec<Rank> = (0..2)
            .map(|number| {
                let seed = seed * 10 + u64::from(number);
                rank(&leader, (number, seed + 100), |link| {
                    Faulty::over(link, seed)
                })
            })
            .collect();
        for rank in &ranks {
            rank.worker.join(Arc::clone(&rank.to_leader), TIME).unwrap();
        }
        leader.wait_ready(TIME).unwrap();
        let moves = 6;
        for number in 0..moves {
            let time = Duration::from_millis(40);
            let mut next = spec(MoveKind::DeviceToHost, 0, 4, 2, time);
            next.id.0 = number + 1;
            let report = leader.run(&next);
            if let Some(pending) = report.pending {
                pending.wait();
            }
            let over = report.outcomes.iter().all(|o| *o == BlockOutcome::Moved);
            moved += u32::from(over);
            // The books give the blocks to something else now.
            for rank in &ranks {
                let mut blocks = rank.memory.blocks.lock().unwrap();
                if over {
                    assert_eq!(blocks.get(&4), Some(&(number + 1)), "seed {seed}");
                }
                blocks.insert(4, u64::MAX);
            }
        }
        std::thread::park_timeout(Duration::from_millis(100));
        for rank in &ranks {
            let runs = rank.memory.runs.load(Ordering::Acquire);
            assert!(u64::from(runs) <= moves, "seed {seed}: {runs} runs");
            let blocks = rank.memory.blocks.lock().unwrap();
            assert_eq!(blocks.get(&4), Some(&u64::MAX), "seed {seed}: written late");
        }
        assert_eq!(leader.stats().open, 0);
    }
    assert!(moved > 12, "the faults leave some: {moved}");
}

//! The manager in virtual time against a simulator that shares no code with it, on generated traffic
//! with the shape of conversations.

use std::{collections::HashMap, fmt::Write};

use blockplane_bench::kvbm::{
    Outcome, Simulation, StoredConfig, Trace, TraceConfig, simulate, simulate_stored,
};
use blockplane_kvbm::AdmissionKind;

/// Least recently used, by scanning for the oldest.
#[derive(Default)]
struct NaiveLru {
    used: HashMap<u64, u64>,
    order: std::collections::BTreeMap<u64, u64>,
    clock: u64,
    capacity: usize,
}

impl NaiveLru {
    fn new(capacity: usize) -> Self {
        Self {
            capacity,
            ..Self::default()
        }
    }

    fn has(&self, id: u64) -> bool {
        self.used.contains_key(&id)
    }

    /// Inserts or renews; returns what had to go.
    fn put(&mut self, id: u64) -> Option<u64> {
        self.clock += 1;
        if let Some(before) = self.used.insert(id, self.clock) {
            self.order.remove(&before);
        }
        self.order.insert(self.clock, id);
        if self.used.len() <= self.capacity {
            return None;
        }
        let (_, oldest) = self.order.pop_first()?;
        self.used.remove(&oldest);
        Some(oldest)
    }
}

#[derive(Debug, Default, PartialEq)]
struct NaiveOutcome {
    refs: u64,
    hits: [u64; 3],
    g3_writes: u64,
}

/// The conventions of KVBM: a prefix of G1, then of G2, then of G3; what is missing is computed and
/// written through; touched from the end of a prompt to its beginning; no promotion.
fn naive(
    requests: &[(u64, Vec<u64>)],
    sizes: [usize; 3],
    admission: AdmissionKind,
) -> NaiveOutcome {
    let [mut g1, mut g2, mut g3] = sizes.map(NaiveLru::new);
    let mut counts: HashMap<u64, u64> = HashMap::new();
    let mut seen: HashMap<u64, u32> = HashMap::new();
    let mut next_decay = 600_000;
    let mut outcome = NaiveOutcome::default();
    for (millis, ids) in requests {
        while *millis >= next_decay {
            counts.retain(|_, count| {
                *count -= 1;
                *count > 0
            });
            next_decay += 600_000;
        }
        outcome.refs += ids.len() as u64;
        for id in ids {
            *seen.entry(*id).or_default() += 1;
        }
        let k1 = ids.iter().take_while(|id| g1.has(**id)).count();
        let k2 = ids[k1..].iter().take_while(|id| g2.has(**id)).count();
        let k3 = ids[k1 + k2..].iter().take_while(|id| g3.has(**id)).count();
        for (hits, found) in outcome.hits.iter_mut().zip([k1, k2, k3]) {
            *hits += found as u64;
        }
        for id in ids[k1..k1 + k2].iter().rev() {
            g2.put(*id);
            let counted = matches!(admission, AdmissionKind::SeenK { k } if seen[id] >= k);
            if counted && !g3.has(*id) {
                outcome.g3_writes += 1;
                g3.put(*id);
            }
        }
        for id in ids[k1 + k2..k1 + k2 + k3].iter().rev() {
            g3.put(*id);
        }
        for id in ids[k1 + k2 + k3..].iter().rev() {
            let evicted = g2.put(*id);
            let offered = match admission {
                AdmissionKind::OnEvict => evicted,
                _ => Some(*id),
            };
            let Some(offered) = offered.filter(|id| !g3.has(*id)) else {
                continue;
            };
            let admitted = match admission {
                AdmissionKind::Frequency => {
                    let count = counts.get(&offered).map_or(1, |count| count * 2);
                    counts.insert(offered, count);
                    count >= 2
                }
                AdmissionKind::SeenK { k } => seen[&offered] >= k,
                AdmissionKind::None => false,
                _ => true,
            };
            if admitted {
                outcome.g3_writes += 1;
                g3.put(offered);
            }
        }
        for id in ids.iter().rev() {
            g1.put(*id);
        }
    }
    outcome
}

/// Conversations below one system prompt: some go on, most do not.
fn traffic(seed: u64, requests: usize) -> Vec<(u64, Vec<u64>)> {
    let mut state = seed;
    let mut random = move |below: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut next_id = 1;
    let mut open: Vec<Vec<u64>> = Vec::new();
    let mut out = Vec::with_capacity(requests);
    let mut millis = 0;
    for _ in 0..requests {
        millis += random(700);
        let mut prompt = if !open.is_empty() && random(10) < 4 {
            let at = usize::try_from(random(open.len() as u64)).expect("an index");
            open.swap_remove(at)
        } else {
            vec![0]
        };
        let new = 1 + if prompt.len() == 1 {
            random(40)
        } else {
            random(6)
        };
        prompt.extend(next_id..next_id + new);
        next_id += new;
        out.push((millis, prompt.clone()));
        if random(3) > 0 {
            open.push(prompt);
        }
        if open.len() > 400 {
            open.remove(0);
        }
    }
    out
}

fn lines(requests: &[(u64, Vec<u64>)]) -> String {
    let mut text = String::new();
    for (millis, ids) in requests {
        let tokens = ids.len() * 512;
        writeln!(
            text,
            "{{\"timestamp\": {millis}, \"input_length\": {tokens}, \"hash_ids\": {ids:?}}}"
        )
        .expect("a string takes everything");
    }
    text
}

fn played(trace: &Trace, sizes: [u32; 3], admission: AdmissionKind, promote: bool) -> Outcome {
    let simulation = Simulation {
        admission,
        promote,
        ..Simulation::new(sizes[0], sizes[1], sizes[2])
    };
    simulate(trace, &simulation).expect("it fits")
}

fn percent(part: u64, whole: u64) -> f64 {
    part as f64 * 100.0 / whole as f64
}

#[test]
fn the_manager_agrees_with_a_simulator_that_shares_no_code_with_it() {
    for seed in 0..3 {
        let requests = traffic(seed, 3_000);
        let trace = Trace::parse(lines(&requests).as_bytes(), TraceConfig::default()).unwrap();
        for admission in ["frequency", "all", "seen-2", "on-evict", "none"] {
            let admission: AdmissionKind = admission.parse().unwrap();
            let theirs = naive(&requests, [400, 1_000, 8_000], admission);
            for plain in [true, false] {
                let simulation = Simulation {
                    admission,
                    promote: false,
                    plain,
                    ..Simulation::new(400, 1_000, 8_000)
                };
                let ours = simulate(&trace, &simulation).expect("it fits");
                // In its conventions they hardly differ: blocks read from G3 pass through G2, and
                // tiers interleave. Otherwise the manager knows what continues what, and demotes
                // ahead of need.
                let (by, writes_by) = match (plain, admission) {
                    (true, _) => (0.5, 0.01),
                    (false, AdmissionKind::OnEvict) => (2.5, 0.08),
                    (false, _) => (1.0, 0.03),
                };
                compare(
                    &ours,
                    &theirs,
                    by,
                    writes_by,
                    &format!("{admission} {seed} {plain}"),
                );
            }
        }
    }
}

fn compare(ours: &Outcome, theirs: &NaiveOutcome, by: f64, writes_by: f64, case: &str) {
    assert_eq!(ours.block_refs as u64, theirs.refs);
    assert_eq!(ours.failed_loads, 0);
    let case = format!("{case}: {theirs:?} {:?}", ours.hits);
    // G1 is exact.
    assert_eq!(ours.hits.device, theirs.hits[0], "{case}");
    let (mine, all) = (
        ours.hit_percent(),
        percent(theirs.hits.iter().sum(), theirs.refs),
    );
    assert!((mine - all).abs() <= by, "{mine} {all} {case}");
    let (mine, other) = (ours.disk_writes() as f64, theirs.g3_writes as f64);
    assert!(
        (mine - other).abs() <= other * writes_by,
        "{mine} {other} {case}"
    );
}

#[test]
fn short_tails_are_worth_their_writes() {
    let requests = traffic(7, 4_000);
    let trace = Trace::parse(lines(&requests).as_bytes(), TraceConfig::default()).unwrap();
    let sizes = [400, 1_000, 8_000];
    let tail = "tail-4096".parse().unwrap();
    let all = played(&trace, sizes, AdmissionKind::All, true);
    let chosen = played(&trace, sizes, tail, true);
    assert!(chosen.disk_writes() < all.disk_writes());
    assert!(chosen.hit_percent() > played(&trace, sizes, AdmissionKind::None, true).hit_percent());
}

#[test]
fn links_that_take_time_fill_queues_and_budgets_hold() {
    let requests = traffic(3, 1_500);
    let trace = Trace::parse(lines(&requests).as_bytes(), TraceConfig::default()).unwrap();
    let mut simulation = Simulation::new(600, 1_000, 8_000);
    simulation.admission = AdmissionKind::All;
    simulation.block_bytes = 64 << 20;
    simulation.speeds.disk_bytes_per_s = Some(2e9);
    let slow = simulate(&trace, &simulation).unwrap();
    assert!(slow.queues.disk_write_blocks_max > 0, "{:?}", slow.queues);
    assert!(slow.ended > trace.span());
    let free = slow.disk_writes();
    simulation.budget.bytes_per_s = Some(100_000_000);
    let bounded = simulate(&trace, &simulation).unwrap();
    let allowed = bounded.ended.as_secs_f64() * 1e8 + 1e8 + (64 << 20) as f64;
    let written = bounded.disk_writes() * simulation.block_bytes;
    assert!(written as f64 <= allowed, "{written} {allowed}");
    assert!(bounded.disk_writes() < free);
}

#[test]
fn without_lower_tiers_only_g1_hits_and_a_prompt_that_does_not_fit_is_named() {
    let requests = traffic(5, 500);
    let trace = Trace::parse(lines(&requests).as_bytes(), TraceConfig::default()).unwrap();
    let alone = played(&trace, [400, 0, 0], AdmissionKind::All, true);
    assert_eq!(
        alone.hit_blocks(),
        naive(&requests, [400, 0, 0], AdmissionKind::None).hits[0]
    );
    let error = simulate(&trace, &Simulation::new(3, 0, 0)).unwrap_err();
    assert!(
        error.to_string().contains("do not fit into the 3 of G1"),
        "{error}"
    );
}

#[test]
fn real_bytes_make_no_difference_and_come_back_after_a_restart() {
    let requests = traffic(11, 300);
    let trace = Trace::parse(lines(&requests).as_bytes(), TraceConfig::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let simulation = Simulation {
        admission: AdmissionKind::All,
        ..Simulation::new(400, 400, 2_000)
    };
    let stored = StoredConfig {
        folder: folder.path().to_owned(),
        block_bytes: 8_192,
    };
    let (first, bytes) = simulate_stored(&trace, &simulation, &stored).unwrap();
    // Every hit was compared byte by byte, and the books are those of a replay without bytes.
    assert_eq!(bytes.blocks_compared, first.hit_blocks());
    assert_eq!(bytes.blocks_recovered, 0);
    assert!(bytes.bytes_written >= first.disk_writes() * 8_192);
    let without = simulate(&trace, &simulation).unwrap();
    assert_eq!(first.hits, without.hits);
    assert_eq!(first.disk_writes(), without.disk_writes());

    let (second, bytes) = simulate_stored(&trace, &simulation, &stored).unwrap();
    assert!(bytes.blocks_recovered > 0);
    assert!(second.hits.disk > first.hits.disk, "{:?}", second.hits);
    assert_eq!(second.failed_loads, 0);

    let odd = StoredConfig {
        block_bytes: 5_000,
        ..stored
    };
    let error = simulate_stored(&trace, &simulation, &odd).unwrap_err();
    assert!(error.to_string().contains("a multiple of 4096"), "{error}");
}

//! The rows.

use std::path::PathBuf;

use serde_json::{Map, Value, json};

use super::{
    Group,
    sheet::{Figure, Goal, Sheet, Work},
    stage::{Ground, Pair, Stage},
};
use crate::transfer::{
    case::{Case, Memory, OpName, Pattern, Shape},
    cluster::{Check, Hosts, Measured, Way},
    job::Rounds,
    limits::whole,
};

const BOTH: [OpName; 2] = [OpName::Write, OpName::Read];

/// A run of all rows.
pub(super) struct Session {
    pub(super) ground: Ground,
    pub(super) quick: bool,
    pub(super) product: Product,
    pub(super) sheet: Sheet,
    pub(super) stage: Stage,
    /// GB/s of copy engines, by places, direction and bytes.
    engines: Vec<(Memory, Memory, OpName, u64, f64)>,
    /// How transfers of the group were planned.
    plans: Vec<String>,
}

/// The matrix product that runs beside transfers.
pub(super) struct Product {
    pub(super) size: u32,
    pub(super) library: Option<PathBuf>,
}

/// A row of transfers between two agents.
pub(super) struct Transfers {
    pub(super) name: String,
    pub(super) pair: Pair,
    pub(super) op: OpName,
    pub(super) case: Case,
    pub(super) way: Way,
}

impl Session {
    pub(super) const fn new(
        ground: Ground,
        quick: bool,
        product: Product,
        sheet: Sheet,
        stage: Stage,
    ) -> Self {
        Self {
            ground,
            quick,
            product,
            sheet,
            stage,
            engines: Vec::new(),
            plans: Vec::new(),
        }
    }

    /// Runs the rows of a group and prints them.
    ///
    /// # Errors
    /// When the output is closed.
    pub(super) fn group(&mut self, group: Group) -> anyhow::Result<()> {
        self.plans.clear();
        let title = match group {
            Group::Bandwidth => {
                self.bandwidth()?;
                "scattered blocks from one GPU to another, two processes"
            }
            Group::Tokens => {
                self.tokens()?;
                "4,096 tokens of a model like Qwen3-8B, two processes"
            }
            Group::Host => {
                self.host()?;
                "scattered blocks between a GPU and pinned host memory, one process"
            }
            Group::Latency => {
                self.latency()?;
                "single transfers, from post to the end seen by the host"
            }
            Group::Same => {
                self.same()?;
                "scattered blocks inside one GPU, one process (bytes moved, not read plus written)"
            }
            Group::Rearrange => {
                self.rearrange()?;
                "heads and tokens exchanged on the way (32 KiB pieces of 16 tokens x 8 heads), two processes"
            }
            Group::Beside => {
                self.beside()?;
                "transfers beside a matrix product on the GPU that does the work, two processes"
            }
            Group::Setup => {
                self.setup()?;
                "memory: allocated, registered, pinned"
            }
            Group::All => {
                self.all()?;
                "every GPU to every other at the same time, a process each"
            }
        };
        self.sheet.print(title)?;
        for plan in std::mem::take(&mut self.plans) {
            self.sheet
                .note(&format!("planned for the agent's own budget as: {plan}"))?;
        }
        Ok(())
    }

    /// # Errors
    /// Rows failed.
    pub(super) fn finish(mut self) -> anyhow::Result<()> {
        self.stage.clear();
        self.sheet.finish()
    }

    fn bandwidth(&mut self) -> anyhow::Result<()> {
        let Ok([from, to]) = self.ground.pair() else {
            return Ok(self.sheet.left_out("from GPU to GPU", "needs two GPUs")?);
        };
        let bytes = self.large();
        let blocks: &[u32] = if self.quick {
            &[4 << 10, 32 << 10, 1 << 20]
        } else {
            &[4 << 10, 16 << 10, 32 << 10, 128 << 10, 1 << 20]
        };
        for op in BOTH {
            let limit = self.engine(&from, &to, op, bytes)?;
            for &block_bytes in blocks {
                for sms in self.budgets(&[8, 16, 64]) {
                    let goal = match (op, sms) {
                        (OpName::Write, Some(16)) => Some(325.0),
                        (OpName::Write, Some(64)) => Some(355.0),
                        (OpName::Read, Some(8)) => Some(285.0),
                        (OpName::Read, Some(16)) => Some(365.0),
                        _ => None,
                    };
                    let pair = Pair {
                        hosts: Hosts::Apart,
                        from: from.clone(),
                        to: to.clone(),
                        bytes: Ground::room(bytes)?,
                        engine: false,
                        pull_writes: false,
                    };
                    self.scattered(pair, op, block_bytes, bytes, sms, goal, limit)?;
                }
            }
        }
        Ok(())
    }

    fn tokens(&mut self) -> anyhow::Result<()> {
        let Ok([from, to]) = self.ground.pair() else {
            return Ok(self
                .sheet
                .left_out("from GPU to GPU with a notification", "needs two GPUs")?);
        };
        // Keys and values of 36 layers apart; 16 tokens x 8 heads x 128 elements x 2 bytes a piece.
        let (blocks, pool, pieces, run_bytes) = if self.ground.sms.is_some() {
            (256, 320, 72, 32 << 10)
        } else {
            (16, 20, 72, 1 << 10)
        };
        let shape = Shape {
            blocks: pool,
            block_stride: run_bytes,
            layers: pieces,
            layer_stride: run_bytes * u64::from(pool),
            run_bytes,
        };
        let bytes = u64::from(blocks) * shape.block_bytes();
        let limit = self.engine(&from, &to, OpName::Write, bytes)?;
        let limit_us = limit.map(|rate| as_f64(bytes) / rate / 1e3);
        for sms in self.budgets(&[16, 32, 64]) {
            let row = Transfers {
                name: format!(
                    "{} pieces, post to notification{}",
                    blocks * pieces,
                    with(sms)
                ),
                pair: Pair {
                    hosts: Hosts::Apart,
                    from: from.clone(),
                    to: to.clone(),
                    bytes: usize::try_from(u64::from(pool) * shape.block_bytes())?,
                    engine: false,
                    pull_writes: false,
                },
                op: OpName::Write,
                case: Case {
                    pattern: Pattern::Scattered,
                    shape,
                    count: blocks,
                    listed: true,
                    turn: None,
                },
                way: Way {
                    notify: true,
                    post_cpu: true,
                    sms,
                    ..self.way(Rounds::Exactly(if self.quick { 30 } else { 200 }))
                },
            };
            self.transfers(row, |work, measured| {
                vec![
                    work.samples("arrival_us", "us", &measured.arrival)
                        .goal(Some(Goal::AtMost(1_900.0)))
                        .limit(limit_us),
                    work.samples("latency_us", "us", &measured.latency)
                        .limit(limit_us),
                    work.samples("post_cpu_us", "us", &measured.post_cpu_us)
                        .goal(Some(Goal::AtMost(50.0))),
                ]
            })?;
        }
        Ok(())
    }

    fn host(&mut self) -> anyhow::Result<()> {
        let (from, to) = (self.ground.first(), self.ground.host.clone());
        let bytes = self.large() / 2;
        for (op, goal) in [(OpName::Write, 50.0), (OpName::Read, 49.0)] {
            let limit = self.engine(&from, &to, op, bytes)?;
            for block_bytes in [4 << 10, 32 << 10] {
                for sms in self.budgets(&[4, 16]) {
                    let aimed = matches!(
                        (block_bytes, sms),
                        (0x1000, Some(16)) | (0x8000, Some(4 | 16))
                    );
                    let pair = Pair {
                        hosts: Hosts::Together,
                        from: from.clone(),
                        to: to.clone(),
                        bytes: Ground::room(bytes)?,
                        engine: false,
                        pull_writes: false,
                    };
                    let goal = aimed.then_some(goal);
                    self.scattered(pair, op, block_bytes, bytes, sms, goal, limit)?;
                }
            }
        }
        Ok(())
    }

    fn latency(&mut self) -> anyhow::Result<()> {
        let mut places = Vec::new();
        if let Ok([from, to]) = self.ground.pair() {
            places.push((from, to));
        } else {
            self.sheet
                .left_out("single transfers from GPU to GPU", "needs two GPUs")?;
        }
        places.push((self.ground.first(), self.ground.first()));
        places.push((self.ground.first(), self.ground.host.clone()));
        for (from, to) in places {
            for hosts in [Hosts::Together, Hosts::Apart] {
                let mut smallest = None;
                for (block_bytes, goal) in [
                    (16, None),
                    (4 << 10, Some(10.0)),
                    (64 << 10, Some(12.0)),
                    (1 << 20, Some(30.0)),
                ] {
                    let pair = Pair {
                        hosts,
                        from: from.clone(),
                        to: to.clone(),
                        bytes: 8 << 20,
                        engine: false,
                        pull_writes: false,
                    };
                    let row = Transfers {
                        name: format!(
                            "{} one of {}, {}",
                            arrow(&pair, OpName::Write),
                            human(block_bytes),
                            in_processes(hosts)
                        ),
                        pair,
                        op: OpName::Write,
                        case: Case {
                            pattern: Pattern::Contiguous,
                            shape: Shape::plain(block_bytes, 8 << 20),
                            count: 1,
                            listed: false,
                            turn: None,
                        },
                        way: self.way(Rounds::Exactly(if self.quick { 500 } else { 3_000 })),
                    };
                    let mut found = None;
                    self.transfers(row, |work, measured| {
                        found = Some(measured.latency.median());
                        vec![
                            work.samples("latency_us", "us", &measured.latency)
                                .goal(goal.map(Goal::AtMost))
                                .limit(smallest),
                            work.samples("post_ns_per_block", "ns", &measured.post),
                        ]
                    })?;
                    smallest = smallest.or(found);
                }
            }
        }
        Ok(())
    }

    fn same(&mut self) -> anyhow::Result<()> {
        let first = self.ground.first();
        let bytes = self.large();
        let limit = self.engine(&first, &first, OpName::Write, bytes)?;
        let all = self.ground.sms.unwrap_or(1);
        for block_bytes in [4 << 10, 32 << 10] {
            for sms in self.budgets(&[16, 64, all]) {
                let pair = Pair {
                    hosts: Hosts::Together,
                    from: first.clone(),
                    to: first.clone(),
                    bytes: Ground::room(bytes)?,
                    engine: false,
                    pull_writes: false,
                };
                self.scattered(pair, OpName::Write, block_bytes, bytes, sms, None, limit)?;
            }
        }
        Ok(())
    }

    /// A row of scattered blocks.
    #[expect(clippy::too_many_arguments, reason = "each is a column of the table")]
    fn scattered(
        &mut self,
        pair: Pair,
        op: OpName,
        block_bytes: u32,
        bytes: u64,
        sms: Option<u32>,
        goal: Option<f64>,
        limit: Option<f64>,
    ) -> anyhow::Result<()> {
        let row = Transfers {
            name: format!("{} {}{}", arrow(&pair, op), human(block_bytes), with(sms)),
            op,
            case: Case {
                pattern: Pattern::Scattered,
                shape: Shape::plain(block_bytes, pair.bytes as u64),
                count: u32::try_from(bytes / u64::from(block_bytes))?,
                listed: true,
                turn: None,
            },
            way: Way {
                sms,
                ..self.way(self.rounds())
            },
            pair,
        };
        self.transfers(row, |work, measured| {
            vec![
                bandwidth(work, measured)
                    .goal(goal.map(Goal::AtLeast))
                    .limit(limit),
            ]
        })
    }

    /// What the copy engines do with one contiguous copy of so many bytes; none if that failed.
    fn engine(
        &mut self,
        from: &Memory,
        to: &Memory,
        op: OpName,
        bytes: u64,
    ) -> anyhow::Result<Option<f64>> {
        let known = self
            .engines
            .iter()
            .find(|(f, t, o, b, _)| (f, t, *o, *b) == (from, to, op, bytes));
        if let Some(&(.., rate)) = known {
            return Ok(Some(rate));
        }
        let pair = Pair {
            hosts: Hosts::Together,
            from: from.clone(),
            to: to.clone(),
            bytes: usize::try_from(bytes)?,
            engine: true,
            pull_writes: false,
        };
        let row = Transfers {
            name: format!("{} one copy by the copy engine", arrow(&pair, op)),
            case: whole(bytes, pair.bytes)?,
            pair,
            op,
            way: self.way(self.rounds()),
        };
        let mut found = None;
        self.transfers(row, |work, measured| {
            found = Some(measured.bandwidth);
            vec![bandwidth(work, measured)]
        })?;
        if let Some(rate) = found {
            self.engines
                .push((from.clone(), to.clone(), op, bytes, rate));
        }
        Ok(found)
    }

    /// Runs one row of transfers; a failure goes to the sheet and ends the processes.
    pub(super) fn transfers(
        &mut self,
        row: Transfers,
        figures: impl FnOnce(&Work, &Measured) -> Vec<Figure>,
    ) -> anyhow::Result<()> {
        let Transfers {
            name,
            pair,
            op,
            case,
            way,
        } = row;
        let work = Work {
            name,
            case: describe(&pair, op, &case, way),
        };
        let (stage, plans) = (&mut self.stage, &mut self.plans);
        let well = self.sheet.row(&work, |until| {
            let measured = stage.pair(&pair, until)?.measure(op, &case, way)?;
            let plan = short(&measured.reason);
            if !plans.contains(&plan) {
                plans.push(plan);
            }
            Ok(figures(&work, &measured))
        })?;
        if !well {
            self.stage.clear();
        }
        Ok(())
    }

    pub(super) fn large(&self) -> u64 {
        if self.quick {
            self.ground.large.min(256 << 20)
        } else {
            self.ground.large
        }
    }

    pub(super) const fn rounds(&self) -> Rounds {
        Rounds::Within(if self.quick { 40_000 } else { 120_000 })
    }

    pub(super) const fn way(&self, rounds: Rounds) -> Way {
        Way::alone(Check::Once, rounds)
    }

    /// Budgets that the devices have; without devices there is none to give.
    pub(super) fn budgets(&self, wanted: &[u32]) -> Vec<Option<u32>> {
        match self.ground.sms {
            None => vec![None],
            Some(most) => wanted
                .iter()
                .filter(|&&sms| sms <= most)
                .map(|&sms| Some(sms))
                .collect(),
        }
    }
}

pub(super) fn bandwidth(work: &Work, measured: &Measured) -> Figure {
    let mut figure = work.figure(
        "bandwidth_gb_per_s",
        "GB/s",
        measured.bandwidth,
        measured.transfers,
    );
    if let Some(each) = &measured.each {
        // The slow end of a bandwidth is its first percentile.
        figure.record = figure.record.percentiles(each.median(), each.percentile(1));
    }
    figure
}

pub(super) fn describe(pair: &Pair, op: OpName, case: &Case, way: Way) -> Map<String, Value> {
    let lane = if pair.engine { "copy-engine" } else { "cuda" };
    crate::report::case([
        ("lane", json!(lane)),
        ("op", json!(op.as_str())),
        ("block_bytes", json!(case.shape.run_bytes)),
        (
            "count",
            json!(u64::from(case.count) * u64::from(case.shape.layers)),
        ),
        ("from", json!(pair.from.name())),
        ("to", json!(pair.to.name())),
        ("sms", json!(way.sms)),
        ("pattern", json!(case.pattern.as_str())),
        (
            "processes",
            json!(if pair.hosts == Hosts::Apart { 2 } else { 1 }),
        ),
    ])
}

/// A plan without the name of the socket, which differs from run to run.
fn short(plan: &str) -> String {
    match (plan.find(" (/"), plan.find(".sock)")) {
        (Some(start), Some(end)) if start < end => {
            format!("{}{}", &plan[..start], &plan[end + ".sock)".len()..])
        }
        _ => plan.to_owned(),
    }
}

/// Where the bytes go.
pub(super) fn arrow(pair: &Pair, op: OpName) -> String {
    let (from, to) = (pair.from.name(), pair.to.name());
    match op {
        OpName::Write => format!("write {from} -> {to}"),
        OpName::Read => format!("read  {from} <- {to}"),
    }
}

fn in_processes(hosts: Hosts) -> &'static str {
    match hosts {
        Hosts::Threads | Hosts::Together => "one process",
        Hosts::Processes | Hosts::Apart => "two processes",
    }
}

pub(super) fn with(sms: Option<u32>) -> String {
    sms.map_or_else(String::new, |sms| format!(", {sms} SMs"))
}

pub(super) fn human(bytes: u32) -> String {
    match bytes {
        bytes if bytes.is_multiple_of(1 << 20) => format!("{} MiB", bytes >> 20),
        bytes if bytes.is_multiple_of(1 << 10) => format!("{} KiB", bytes >> 10),
        bytes => format!("{bytes} B"),
    }
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53 bytes")]
const fn as_f64(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_are_told_without_their_socket() {
        let plan = "the peer is on this host (/tmp/blockplane-1.sock); cuda:0 copies (it pulls)";
        let told = "the peer is on this host; cuda:0 copies (it pulls)";
        assert_eq!(short(plan), told);
        assert_eq!(short(told), told);
    }
}

//! What the machine allows in this very run: copies by one and two threads, copies into the other
//! process, raw sockets, and the copy engines of devices, each over the same blocks or bytes.

mod cma;
mod engine;
mod memcpy;
mod tcp;

use std::time::{Duration, Instant};

use blockplane_transfer::{Agent, AgentConfig, Registration};

use self::engine::Engine;
pub(super) use self::engine::whole;
use self::tcp::RawTcp;
use super::{
    args::Effective,
    case::{LaneName, Lot, Memory, OpName},
    job::another,
    link::{Address, Sharing},
    memory::{self, Copies},
};
use crate::report::Samples;

/// One bound of a case.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Limit {
    /// Name of the metric.
    pub(super) metric: &'static str,
    /// Title of the column.
    pub(super) title: &'static str,
    /// GB/s.
    pub(super) rate: f64,
}

/// Limits and the memory they need, which is taken when it is needed.
pub(super) struct Limits {
    bytes: usize,
    kinds: [Memory; 2],
    // Keeps the memory's owner alive.
    agent: Agent,
    memory: Option<[Registration; 2]>,
    tcp: Option<RawTcp>,
    /// Where a device takes part.
    engine: Option<Engine>,
}

impl Limits {
    /// For transfers as the options say.
    pub(super) fn new(effective: &Effective) -> anyhow::Result<Self> {
        let args = &effective.args;
        Ok(Self {
            bytes: effective.bytes(),
            kinds: [args.from.clone(), args.to.clone()],
            engine: effective.device().map(|_| Engine::new(effective)),
            agent: Agent::new(AgentConfig::new("bench-limits"))?,
            memory: None,
            tcp: None,
        })
    }

    /// Titles of the limits of a lane.
    pub(super) fn titles(&self, lane: LaneName) -> &'static [&'static str] {
        if self.engine.is_some() {
            return &["engine"];
        }
        match lane {
            LaneName::Tcp => &["raw x1", "raw x2"],
            LaneName::Shm if self.kinds[1] == Memory::Host => &["memcpy x1", "memcpy x2", "cma"],
            LaneName::Loopback | LaneName::Shm => &["memcpy x1", "memcpy x2"],
        }
    }

    /// Measures the limits of a lane.
    pub(super) fn measure(
        &mut self,
        lane: LaneName,
        op: OpName,
        lot: &Lot,
        target: &Address,
        budget: Duration,
    ) -> anyhow::Result<Vec<Limit>> {
        let titles = self.titles(lane);
        if let Some(engine) = &mut self.engine {
            return Ok(vec![Limit {
                metric: "limit_copy_engine_gb_per_s",
                title: "engine",
                rate: engine.rate(op, lot, budget)?,
            }]);
        }
        let budget = budget / u32::try_from(titles.len()).unwrap_or(1);
        let mut found = Vec::new();
        if lane == LaneName::Tcp {
            let tcp = match self.tcp.take() {
                Some(tcp) => tcp,
                None => RawTcp::new(self.bytes)?,
            };
            let tcp = self.tcp.insert(tcp);
            for (streams, metric) in [
                (1, "limit_raw_tcp_x1_gb_per_s"),
                (2, "limit_raw_tcp_x2_gb_per_s"),
            ] {
                let rate = tcp.rate(op, lot, streams, budget)?;
                found.push((metric, rate));
            }
        } else {
            let [from, to] = self.memory()?;
            // Pages that nobody has written yet would be one and the same.
            memory::fill(from, &lot.local, 1)?;
            memory::fill(to, &lot.remote, 1)?;
            let copies = Copies::new((from, &lot.local), (to, &lot.remote));
            // SAFETY: `self` holds both regions, and nobody else knows them.
            let one = unsafe { memcpy::one(&copies, budget) };
            // SAFETY: as above.
            let two = unsafe { memcpy::two(&copies, budget) }?;
            found.push(("limit_memcpy_x1_gb_per_s", rate(lot, &one)));
            found.push(("limit_memcpy_x2_gb_per_s", rate(lot, &two)));
            if titles.len() > 2 {
                let times = cma::times(op, from, lot, target, budget)?;
                found.push(("limit_cma_gb_per_s", rate(lot, &times)));
            }
        }
        let limit = |(&title, (metric, rate))| Limit {
            metric,
            title,
            rate,
        };
        Ok(titles.iter().zip(found).map(limit).collect())
    }

    fn memory(&mut self) -> anyhow::Result<&[Registration; 2]> {
        let memory = match self.memory.take() {
            Some(memory) => memory,
            None => {
                let [from, to] = &self.kinds;
                [
                    memory::register(&self.agent, from, self.bytes, Sharing::default())?,
                    memory::register(&self.agent, to, self.bytes, Sharing::default())?,
                ]
            }
        };
        Ok(self.memory.insert(memory))
    }
}

/// Times of an action that is repeated for about `budget`, after one that does not count.
fn times(
    budget: Duration,
    mut action: impl FnMut() -> anyhow::Result<Duration>,
) -> anyhow::Result<Samples> {
    action()?;
    let mut seconds = Samples::default();
    let start = Instant::now();
    while another(start.elapsed(), budget, seconds.len()) {
        seconds.push(action()?.as_secs_f64());
    }
    Ok(seconds)
}

fn rate(lot: &Lot, seconds: &Samples) -> f64 {
    gb_per_s(lot.local.bytes(), seconds.median())
}

/// 10^9 bytes per second.
#[expect(clippy::cast_precision_loss, reason = "far below 2^53 bytes")]
pub(crate) fn gb_per_s(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 / seconds.max(1e-9) / 1e9
}

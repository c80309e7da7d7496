//! Rows that are more than a transfer between two agents.

use serde_json::json;

use super::{
    rows::{Session, Transfers, arrow, bandwidth, human, with},
    sheet::Work,
    stage::{Ground, Pair},
};
use crate::{
    gpu,
    report::{Samples, case},
    transfer::{
        case::{Case, LaneName, Memory, OpName, Pattern, Shape, Turn},
        cluster::{Check, Hosts, Measured, Places, ProductOf, Way},
        job::Rounds,
        limits::whole,
        scheme::{Scheme, Topology},
    },
};

/// What the transfers beside a matrix product are limited to, in GB/s.
const PACE: f64 = 100.0;

impl Session {
    /// Heads and tokens exchanged, pushed and pulled, beside the same transfer without it.
    pub(super) fn rearrange(&mut self) -> anyhow::Result<()> {
        let (from, to) = match self.ground.pair() {
            Ok([from, to]) => (from, to),
            Err(_) => (self.ground.first(), self.ground.first()),
        };
        // 16 tokens x 8 heads x 128 elements of 2 bytes.
        let turn = Turn {
            outer: 16,
            inner: 8,
            bytes: 256,
        };
        let run_bytes = 16 * 8 * 256;
        let bytes = self.large();
        let pieces = 8;
        let blocks = u32::try_from(bytes / run_bytes / pieces)?;
        let pool = blocks + blocks / 4;
        let shape = Shape {
            blocks: pool,
            block_stride: run_bytes,
            layers: u32::try_from(pieces)?,
            layer_stride: run_bytes * u64::from(pool),
            run_bytes,
        };
        for op in [OpName::Write, OpName::Read] {
            for sms in self.budgets(&[16, 64]) {
                let mut plain = None;
                for turn in [None, Some(turn)] {
                    let pair = Pair {
                        hosts: Hosts::Apart,
                        from: from.clone(),
                        to: to.clone(),
                        bytes: usize::try_from(u64::from(pool) * shape.block_bytes())?,
                        engine: false,
                        pull_writes: false,
                    };
                    let row = Transfers {
                        name: format!(
                            "{} {}{}",
                            arrow(&pair, op),
                            if turn.is_some() {
                                "NHD to HND"
                            } else {
                                "as it is"
                            },
                            with(sms)
                        ),
                        pair,
                        op,
                        case: Case {
                            pattern: Pattern::Scattered,
                            shape,
                            count: blocks,
                            listed: true,
                            turn,
                        },
                        way: Way {
                            sms,
                            ..self.way(self.rounds())
                        },
                    };
                    let mut found = None;
                    self.transfers(row, |work, measured| {
                        found = Some(measured.bandwidth);
                        // The limit of the turned copy is the plain one.
                        vec![bandwidth(work, measured).limit(plain)]
                    })?;
                    plain = plain.or(found);
                }
            }
        }
        Ok(())
    }

    /// Transfers beside a matrix product, at full tilt and at a moderate rate.
    pub(super) fn beside(&mut self) -> anyhow::Result<()> {
        let Memory::Device(device) = self.ground.first() else {
            return Ok(self
                .sheet
                .left_out("transfers beside a matrix product", "needs a GPU")?);
        };
        let (from, to) = match self.ground.pair() {
            Ok([from, to]) => (from, to),
            Err(_) => (self.ground.first(), self.ground.host.clone()),
        };
        let budgets: &[u32] = if self.quick {
            &[16, 64]
        } else {
            &[4, 8, 16, 32, 64]
        };
        let bytes: u64 = 128 << 20;
        let size = self.product.size;
        let product = ProductOf {
            device,
            size,
            alone_millis: if self.quick { 150 } else { 300 },
            library: self.product.library.clone(),
        };
        let pair = Pair {
            hosts: Hosts::Apart,
            from,
            to,
            bytes: Ground::room(2 * bytes)?,
            engine: false,
            pull_writes: false,
        };
        let block_bytes = 32 << 10;
        let wanted = Case {
            pattern: Pattern::Scattered,
            shape: Shape::plain(block_bytes, pair.bytes as u64),
            count: u32::try_from(bytes / u64::from(block_bytes))?,
            listed: true,
            turn: None,
        };
        for pace in [Some(PACE), None] {
            for sms in self.budgets(budgets) {
                let way = Way {
                    depth: 2,
                    sms,
                    pace,
                    ..Way::alone(Check::Once, Rounds::Within(product.alone_millis * 1000))
                };
                let rate = pace.map_or_else(
                    || "at full tilt".to_owned(),
                    |pace| format!("at {pace:.0} GB/s"),
                );
                let mut described = super::rows::describe(&pair, OpName::Write, &wanted, way);
                described.insert("product".to_owned(), json!(size));
                described.insert("pace_gb_per_s".to_owned(), json!(pace));
                let work = Work {
                    name: format!(
                        "{} {} {rate}{}",
                        arrow(&pair, OpName::Write),
                        human(block_bytes),
                        with(sms)
                    ),
                    case: described,
                };
                let stage = &mut self.stage;
                let well = self.sheet.row(&work, |until| {
                    let cluster = stage.pair(&pair, until)?;
                    let shared = cluster.beside(OpName::Write, &wanted, way, &product)?;
                    let samples = |times: &[f64]| -> Samples { times.iter().copied().collect() };
                    let (alone, beside) = (
                        samples(&shared.product_alone),
                        samples(&shared.product_beside),
                    );
                    let tflops = gpu::matmul::tflops(size, beside.median());
                    let most = gpu::matmul::tflops(size, alone.median());
                    let runs = beside.len() as u64;
                    Ok(vec![
                        work.figure(
                            "product_slowdown_percent",
                            "%",
                            shared.product_slowdown(),
                            runs,
                        ),
                        work.figure("product_tflops", "TFLOPS", tflops, runs)
                            .limit(Some(most)),
                        work.figure("bandwidth_gb_per_s", "GB/s", shared.transfer_beside, 1)
                            .limit(Some(shared.transfer_alone)),
                        work.figure(
                            "transfer_slowdown_percent",
                            "%",
                            shared.transfer_slowdown(),
                            1,
                        ),
                    ])
                })?;
                if !well {
                    self.stage.clear();
                }
            }
        }
        Ok(())
    }

    /// Allocating, registering and pinning, the first time in a process and later.
    pub(super) fn setup(&mut self) -> anyhow::Result<()> {
        let gib: usize = if self.ground.sms.is_none() {
            1 << 20
        } else {
            1 << 30
        };
        let pinned = if self.quick { 2 * gib } else { 8 * gib };
        for (memory, bytes, times) in [
            (self.ground.first(), gib, 1),
            (self.ground.first(), gib, 5),
            (self.ground.host.clone(), pinned, 1),
        ] {
            let size = match bytes >> 30 {
                0 => format!("{} MiB", bytes >> 20),
                gib => format!("{gib} GiB"),
            };
            let when = if times == 1 {
                "the first time in a process"
            } else {
                "again"
            };
            let work = Work {
                name: format!("an arena of {size} in {}, {when}", memory.name()),
                case: case([
                    ("memory", json!(memory.name())),
                    ("bytes", json!(bytes)),
                    ("first", json!(times == 1)),
                ]),
            };
            let stage = &self.stage;
            self.sheet.row(&work, |until| {
                let topology = Topology::new(Scheme::Pairwise, None, None)?;
                let cluster = stage.fresh(topology, until)?;
                if times > 1 {
                    cluster.allocate(&memory, bytes, 1, stage.settings())?;
                }
                let found = cluster.allocate(&memory, bytes, times, stage.settings())?;
                let samples = |times: Vec<f64>| -> Samples { times.into_iter().collect() };
                let mut figures = vec![work.samples("allocate_ms", "ms", &samples(found.millis))];
                for (metric, times) in [
                    ("first_chunk_pinned_ms", found.first_pinned),
                    ("all_pinned_ms", found.all_pinned),
                ] {
                    if !times.is_empty() {
                        figures.push(work.samples(metric, "ms", &samples(times)));
                    }
                }
                Ok(figures)
            })?;
        }
        Ok(())
    }

    /// Every GPU writes to every other, by kernels and by copy engines.
    pub(super) fn all(&mut self) -> anyhow::Result<()> {
        let places = self.ground.devices.len();
        if places < 3 && self.ground.sms.is_some() {
            return Ok(self
                .sheet
                .left_out("all GPUs to all", "needs three GPUs or more")?);
        }
        // Their memory is needed.
        self.stage.clear();
        let each = self.ground.large / 4;
        let room = Ground::room(each * (places as u64 - 1).max(1))?;
        let mut engines = None;
        for (engine, sms) in std::iter::once((true, None)).chain(
            self.budgets(&[16, 32, 64])
                .into_iter()
                .map(|sms| (false, sms)),
        ) {
            let block_bytes: u32 = 32 << 10;
            let wanted = if engine {
                whole(each, room)?
            } else {
                Case {
                    pattern: Pattern::Scattered,
                    shape: Shape::plain(block_bytes, room as u64),
                    count: u32::try_from(each / u64::from(block_bytes))?,
                    listed: true,
                    turn: None,
                }
            };
            let how = if engine {
                "one copy by the copy engines".to_owned()
            } else {
                format!("{}{}", human(block_bytes), with(sms))
            };
            let work = Work {
                name: format!("write {places} GPUs -> all others, {how}"),
                case: case([
                    ("lane", json!(if engine { "copy-engine" } else { "cuda" })),
                    ("op", json!("write")),
                    ("scheme", json!("all-to-all")),
                    ("gpus", json!(places)),
                    ("block_bytes", json!(wanted.shape.run_bytes)),
                    ("count", json!(wanted.count)),
                    ("sms", json!(sms)),
                    ("processes", json!(places * 2)),
                ]),
            };
            let (stage, ground, quick) = (&self.stage, &self.ground, self.quick);
            let mut found = None;
            self.sheet.row(&work, |until| {
                let mut cluster = stage.fresh(Topology::between(places), until)?;
                let mut settings = stage.settings().clone();
                settings.device.engine = engine;
                cluster.open(&Places {
                    lane: LaneName::Shm,
                    from: ground.devices.clone(),
                    to: ground.devices.clone(),
                    bytes: room,
                    settings,
                })?;
                let micros = if quick { 100_000 } else { 300_000 };
                let way = Way {
                    sms,
                    ..Way::alone(Check::Once, Rounds::Within(micros))
                };
                let measured = cluster.measure(OpName::Write, &wanted, way)?;
                let rates = per_initiator(&measured, places);
                found = Some(rates.median());
                Ok(vec![
                    work.samples("sent_per_gpu_gb_per_s", "GB/s", &rates)
                        .limit(engines),
                    work.figure(
                        "bandwidth_gb_per_s",
                        "GB/s",
                        measured.bandwidth,
                        measured.transfers,
                    ),
                ])
            })?;
            if engine {
                engines = found;
            }
        }
        Ok(())
    }
}

/// What each initiator sends, in GB/s.
fn per_initiator(measured: &Measured, initiators: usize) -> Samples {
    (0..initiators)
        .map(|initiator| {
            let pairs = measured.pairs.iter();
            pairs
                .filter(|&&(from, ..)| from == initiator)
                .map(|&(.., rate)| rate)
                .sum::<f64>()
        })
        .collect()
}

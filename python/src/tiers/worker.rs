//! The worker's side: memory, tiers, and what is moved between them.

use std::{path::PathBuf, time::Duration};

use blockplane_kvbm::{
    ArenaPlace, EventFeed, ExternalConfig, ExternalRank, Fingerprint, KvBatch, LookupServer,
    TierManager,
    events::EventSubscription,
    external::Ended,
    open::{OpenTiers, TierPlan, facts},
    resolve,
    settings::KvbmFlags,
    tier::{Dropped, ExternalMemory, ExternalSegment, MoveKind},
};
use blockplane_protocol::{BlockId, DType, DpRank, KvEventData, KvLayout};
use blockplane_transfer::{
    Agent, AgentConfig, BlockLayout, DeviceMemory, HostMemory, Lane, Registration, RemoteAccess,
};
use parking_lot::Mutex;
use pyo3::{
    exceptions::{PyOSError, PyRuntimeError, PyValueError},
    prelude::*,
    types::{PyDict, PyList},
};

use super::{lookups::seconds, names::unpack, tier_name};

/// Address, bytes, and the device that has it (`None`: host memory).
type RegionSpec = (u64, usize, Option<u32>);
/// Region, offset, block stride, layers, layer stride, bytes of a run.
type SegmentSpec = (usize, u64, u64, u32, u64, u64);

/// Time for copies to end when it is dropped without `close`.
const DROP_TIME: Duration = Duration::from_secs(2);

/// The tiers below the KV memory of one worker of an engine.
#[pyclass(module = "blockplane._core", frozen)]
pub(crate) struct TierWorker {
    state: Mutex<Option<Open>>,
}

struct Open {
    rank: ExternalRank,
    manager: TierManager,
    events: Option<EventSubscription>,
    server: Option<LookupServer>,
    memory: ExternalMemory,
    agent: Agent,
    block_bytes: u64,
    /// What the memory belongs to.
    keep: Py<PyAny>,
}

#[pymethods]
impl TierWorker {
    /// Opens the tiers that `settings` (the variables `DYN_KVBM_*`) ask for, below `blocks` blocks in
    /// the memory of `keep`; `None` where they ask for none.
    #[staticmethod]
    #[pyo3(signature = (
        settings, *, name, keep, regions, segments, blocks, block_tokens, model, rank=0, ranks=1,
        events_max=65536, hold_time=30.0, load_time=30.0
    ))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python")]
    fn open(
        py: Python<'_>,
        settings: Vec<(String, String)>,
        name: String,
        keep: Py<PyAny>,
        regions: Vec<RegionSpec>,
        segments: Vec<SegmentSpec>,
        blocks: u32,
        block_tokens: u32,
        model: u64,
        rank: u32,
        ranks: u32,
        events_max: usize,
        hold_time: f64,
        load_time: f64,
    ) -> PyResult<Option<Self>> {
        let layout = layout(&segments, block_tokens)?;
        let settings =
            resolve(settings.into_iter(), None, &KvbmFlags::default()).map_err(|errors| {
                let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
                PyValueError::new_err(format!("settings of the KV tiers: {}", lines.join("; ")))
            })?;
        if settings.peers_enabled.value {
            return Err(PyValueError::new_err(
                "DYN_KVBM_PEERS_ENABLED: other workers are found through the discovery of blockplane, \
                 which this engine has no part in; unset it",
            ));
        }
        let near = regions.iter().find_map(|(_, _, device)| *device);
        let plan = TierPlan {
            worker: name.clone(),
            fingerprint: Fingerprint::of(model, &layout, rank, ranks),
            layout,
            sharing: ranks,
            ranks: 1,
            events_max,
            place: near.map_or(ArenaPlace::Host, |near| ArenaPlace::Pinned { near }),
            network: None,
        };
        let external = ExternalConfig {
            hold_time: seconds(hold_time),
            load_time: seconds(load_time),
            ..ExternalConfig::default()
        };
        let opened = py.detach(move || {
            let facts = facts(&settings, near.is_some(), Some(blocks));
            let Some(open) = OpenTiers::open(&settings, &facts, &plan).map_err(runtime)? else {
                return Ok(None);
            };
            let block_bytes = plan.layout.block_bytes() as u64;
            let feed = open.hubs.first().map(blockplane_kvbm::EventHub::feed);
            let manager = open.start(None).map_err(runtime)?;
            let config = AgentConfig::new(name).with_lanes([Lane::Loopback]);
            let agent = Agent::new(config).map_err(runtime)?;
            let memory = register(&agent, &regions, &segments, blocks)?;
            let tiers = manager
                .attach_external(DpRank(0), &agent, &memory)
                .map_err(runtime)?;
            let after = feed.as_ref().map(EventFeed::last_event_id);
            PyResult::Ok(Some(Open {
                rank: ExternalRank::new(tiers, external),
                manager,
                events: feed.map(|feed| feed.subscribe(after)),
                server: None,
                memory,
                agent,
                block_bytes,
                keep,
            }))
        })?;
        Ok(opened.map(|open| Self {
            state: Mutex::new(Some(open)),
        }))
    }

    /// Answers lookups at a socket.
    #[expect(clippy::needless_pass_by_value, reason = "as Python hands it over")]
    fn serve(&self, path: PathBuf) -> PyResult<()> {
        let mut state = self.state.lock();
        let open = state.as_mut().ok_or_else(closed)?;
        let server = LookupServer::start(&path, open.rank.clone());
        open.server = Some(server.map_err(|error| {
            PyOSError::new_err(format!("the socket {}: {error}", path.display()))
        })?);
        Ok(())
    }

    /// Has blocks loaded into `targets`. `names` is of `Names.pack`.
    fn load(
        &self,
        py: Python<'_>,
        key: u64,
        hold: u64,
        names: &[u8],
        targets: Vec<u32>,
    ) -> PyResult<()> {
        let request = unpack(names)?;
        let rank = self.rank()?;
        let targets: Vec<BlockId> = targets.into_iter().map(BlockId).collect();
        self.in_range(&targets)?;
        py.detach(|| rank.load(key, hold, &request, &targets));
        Ok(())
    }

    /// Has computed blocks copied away.
    #[pyo3(signature = (key, names, blocks, priority=None))]
    fn save(
        &self,
        py: Python<'_>,
        key: u64,
        names: &[u8],
        blocks: Vec<u32>,
        priority: Option<u32>,
    ) -> PyResult<()> {
        let request = unpack(names)?;
        if request.names.len() != blocks.len() {
            let names = request.names.len();
            let got = blocks.len();
            return Err(PyValueError::new_err(format!(
                "{names} names for {got} blocks"
            )));
        }
        let ids: Vec<BlockId> = blocks.into_iter().map(BlockId).collect();
        self.in_range(&ids)?;
        let rank = self.rank()?;
        let pairs: Vec<_> = request.names.into_iter().zip(ids).collect();
        py.detach(|| rank.save(key, request.parent, &pairs, priority));
        Ok(())
    }

    /// Lets go of what a lookup holds.
    fn release(&self, hold: u64) -> PyResult<()> {
        self.rank()?.release(hold);
        Ok(())
    }

    /// What ended: `("load", key, loaded, not_loaded, host, disk, remote, bytes, seconds, reason)` and
    /// `("save", key, copied, present, dropped)`. Waits for `timeout` seconds if there is nothing.
    #[pyo3(signature = (timeout=0.0))]
    fn poll<'py>(&self, py: Python<'py>, timeout: f64) -> PyResult<Bound<'py, PyList>> {
        let rank = self.rank()?;
        let timeout = seconds(timeout);
        let ended = if timeout.is_zero() {
            rank.ended()
        } else {
            py.detach(|| rank.wait_ended(timeout))
        };
        let list = PyList::empty(py);
        for ended in ended {
            match ended {
                Ended::Load { key, end } => {
                    let ids: Vec<u32> = end.not_loaded.iter().map(|id| id.0).collect();
                    let from = end.from;
                    let waited = end.waited.as_secs_f64();
                    let reason = end.reason.map(blockplane_kvbm::tier::NotLoaded::name);
                    let (host, disk, remote) = (from.host, from.disk, from.remote);
                    let (loaded, bytes) = (end.loaded, end.bytes);
                    list.append((
                        "load", key, loaded, ids, host, disk, remote, bytes, waited, reason,
                    ))?;
                }
                Ended::Save { key, end } => {
                    list.append(("save", key, end.copied, end.present, end.dropped))?;
                }
            }
        }
        Ok(list)
    }

    /// What came into the tiers and left them since the last call: `("stored", tier, hashes)`,
    /// `("removed", tier, hashes)`, and `("lost", None, [])` where too much happened to be listed.
    fn events<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let list = PyList::empty(py);
        let mut state = self.state.lock();
        let open = state.as_mut().ok_or_else(closed)?;
        let Some(events) = &mut open.events else {
            return Ok(list);
        };
        while let Ok(Some(batch)) = events.try_recv() {
            let KvBatch::Events(events) = batch else {
                list.append(("lost", py.None(), Vec::<u64>::new()))?;
                continue;
            };
            for event in events {
                match event.data {
                    KvEventData::Stored { blocks, tier, .. } => {
                        let names: Vec<u64> = blocks.iter().map(|b| b.sequence.0).collect();
                        list.append(("stored", tier_name(tier), names))?;
                    }
                    KvEventData::Removed { hashes, tier } => {
                        let names: Vec<u64> = hashes.iter().map(|name| name.0).collect();
                        list.append(("removed", tier_name(tier), names))?;
                    }
                    KvEventData::Cleared => {
                        list.append(("lost", py.None(), Vec::<u64>::new()))?;
                    }
                }
            }
        }
        Ok(list)
    }

    /// Counters since the start, and what is held now.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let state = self.state.lock();
        let open = state.as_ref().ok_or_else(closed)?;
        let stats = open.manager.stats();
        let dict = PyDict::new(py);
        dict.set_item("block_bytes", open.block_bytes)?;
        dict.set_item("host_blocks", stats.host.total)?;
        dict.set_item("host_blocks_used", stats.host.cached + stats.host.active)?;
        dict.set_item("disk_blocks", stats.disk.total)?;
        dict.set_item("disk_blocks_used", stats.disk.cached + stats.disk.active)?;
        dict.set_item("remote_blocks", stats.remote_blocks)?;
        for kind in MoveKind::ALL {
            let name = kind.name().replace('-', "_");
            let moves = stats.of(kind);
            dict.set_item(format!("{name}_blocks"), moves.blocks)?;
            dict.set_item(format!("{name}_bytes"), moves.bytes)?;
            dict.set_item(format!("{name}_failed_blocks"), moves.failed_blocks)?;
        }
        dict.set_item(
            "invalid_blocks",
            stats.invalid.host + stats.invalid.disk + stats.invalid.remote,
        )?;
        dict.set_item("dropped_blocks", stats.dropped.iter().sum::<u64>())?;
        dict.set_item("dropped_late_blocks", stats.dropped[Dropped::Late as usize])?;
        dict.set_item("open", open.rank.open())?;
        Ok(dict)
    }

    /// Waits until nothing is on its way and the disk has it. False when that takes longer.
    fn flush(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        let timeout = seconds(timeout);
        py.detach(|| {
            let state = self.state.lock();
            let open = state.as_ref().ok_or_else(closed)?;
            Ok(open.manager.flush(timeout))
        })
    }

    /// Ends everything, and the use of the memory. False when something still uses it after
    /// `timeout`: it is kept then until the process ends.
    fn close(&self, py: Python<'_>, timeout: f64) -> bool {
        let Some(open) = self.state.lock().take() else {
            return true;
        };
        let timeout = seconds(timeout);
        py.detach(move || open.close(timeout))
    }
}

impl TierWorker {
    fn rank(&self) -> PyResult<ExternalRank> {
        let state = self.state.lock();
        Ok(state.as_ref().ok_or_else(closed)?.rank.clone())
    }

    fn in_range(&self, ids: &[BlockId]) -> PyResult<()> {
        let state = self.state.lock();
        let open = state.as_ref().ok_or_else(closed)?;
        let blocks = open.memory.segments.first().map_or(0, |s| s.layout.blocks);
        match ids.iter().find(|id| id.0 >= blocks) {
            None => Ok(()),
            Some(id) => Err(PyValueError::new_err(format!("block {} of {blocks}", id.0))),
        }
    }
}

impl Open {
    fn close(self, timeout: Duration) -> bool {
        let Self {
            rank,
            manager,
            events,
            server,
            memory,
            agent,
            keep,
            ..
        } = self;
        drop(server);
        let half = timeout / 2;
        let flushed = manager.flush(half);
        let stopped = manager.stop(half);
        drop((rank, events, manager));
        let mut regions: Vec<Registration> = Vec::new();
        for ExternalSegment { registration, .. } in memory.segments {
            if regions.iter().all(|known| known.id() != registration.id()) {
                regions.push(registration);
            }
        }
        let mut free = stopped;
        for region in regions {
            free &= region.close(half).is_ok();
        }
        drop(agent);
        if !free {
            // A copy may still read or write: the memory stays.
            let _never_freed = keep.into_ptr();
        }
        flushed && free
    }
}

impl Drop for TierWorker {
    fn drop(&mut self) {
        if let Some(open) = self.state.lock().take() {
            open.close(DROP_TIME);
        }
    }
}

fn register(
    agent: &Agent,
    regions: &[RegionSpec],
    segments: &[SegmentSpec],
    blocks: u32,
) -> PyResult<ExternalMemory> {
    let mut registered = Vec::with_capacity(regions.len());
    for &(address, bytes, device) in regions {
        let region = match device {
            Some(device) => {
                // SAFETY: the caller says that this is memory of `keep`, on this device. `Open` lets
                // go of `keep` only after nothing copies any more.
                let memory = unsafe { DeviceMemory::from_raw(device, address, bytes) };
                agent.register_device(memory, RemoteAccess::WindowOnly)
            }
            None => {
                let start = usize::try_from(address)
                    .ok()
                    .and_then(|address| std::ptr::NonNull::new(address as *mut u8))
                    .ok_or_else(|| PyValueError::new_err("a region begins at address 0"))?;
                // SAFETY: the caller says that these bytes are memory of `keep`. `Open` lets go of
                // `keep` only after nothing copies any more, and the engine leaves blocks that are
                // copied alone.
                let memory = unsafe { HostMemory::from_raw(start, bytes) };
                agent.register(memory, RemoteAccess::WindowOnly)
            }
        };
        registered.push(region.map_err(runtime)?);
    }
    let segments = segments
        .iter()
        .map(|&(region, offset, block, layers, layer, run)| {
            let registration = registered
                .get(region)
                .ok_or_else(|| PyValueError::new_err(format!("there is no region {region}")))?;
            Ok(ExternalSegment {
                registration: registration.clone(),
                layout: BlockLayout {
                    offset,
                    blocks,
                    block_stride: block,
                    layers,
                    layer_stride: layer,
                    run_bytes: run,
                },
            })
        });
    Ok(ExternalMemory {
        segments: segments.collect::<PyResult<_>>()?,
    })
}

/// A layout for the bytes of a block as they are: what they mean is the engine's, and part of the
/// model's fingerprint.
fn layout(segments: &[SegmentSpec], block_tokens: u32) -> PyResult<KvLayout> {
    let runs = segments
        .iter()
        .map(|&(_, _, _, layers, _, run)| run.saturating_mul(layers.into()));
    let bytes = runs.fold(0u64, u64::saturating_add);
    let of_token = u64::from(block_tokens).saturating_mul(DType::F16.bytes() as u64);
    let dim = u32::try_from(bytes / of_token.max(1)).unwrap_or(0);
    if of_token == 0 || dim == 0 || !bytes.is_multiple_of(of_token) {
        return Err(PyValueError::new_err(format!(
            "blocks of {bytes} bytes for {block_tokens} tokens: a multiple of 2 bytes for each token \
             is accepted"
        )));
    }
    Ok(KvLayout {
        planes: 1,
        ..KvLayout::dense(1, 1, dim, block_tokens, DType::F16)
    })
}

fn runtime(error: impl std::fmt::Display) -> PyErr {
    PyRuntimeError::new_err(error.to_string())
}

fn closed() -> PyErr {
    PyRuntimeError::new_err("the tiers are closed")
}

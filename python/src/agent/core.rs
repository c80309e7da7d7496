//! Agents, memory and peers.

use std::{
    ops::Range,
    os::fd::{AsFd, AsRawFd},
    path::PathBuf,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use blockplane_transfer::{
    Agent, AgentConfig, ArenaConfig, BlockIds, BlockLayout, CompletionQueue, DeviceMemory,
    FileBlocks, FileConfig, FileStore, HostMemory, LocalBlocks, Metadata, Op, Peer, PostOptions,
    Prepared, RecvError, RegionId, Registration, RemoteAccess, RemoteBlocks, Window, WindowAccess,
    WindowId, WindowScope,
};
use parking_lot::Mutex;
use pyo3::{prelude::*, types::PyBytes};

use super::{
    fault::{connect, fault, post, prepare},
    transfer::TransferCore,
};
use crate::tiers::seconds;

/// Offset, blocks, block stride, layers, layer stride, bytes of a run.
type Layout = (u64, u32, u64, u32, u64, u64);

/// Ends of transfers that nobody has taken yet, at most.
const ENDS_MAX: usize = 65_536;
/// Time for peers to let go of memory that is given back without `close`.
const DROP_TIME: Duration = Duration::from_secs(2);

/// An agent.
#[pyclass(module = "blockplane._core", frozen)]
pub(crate) struct AgentCore {
    agent: Agent,
    ends: CompletionQueue,
    token: AtomicU64,
}

/// Registered memory.
#[pyclass(module = "blockplane._core", frozen)]
pub(crate) struct RegionCore {
    state: Mutex<Option<(Registration, Option<Py<PyAny>>)>>,
    #[pyo3(get)]
    id: u64,
    #[pyo3(get)]
    nbytes: usize,
    #[pyo3(get)]
    address: usize,
}

/// Another agent.
#[pyclass(module = "blockplane._core", frozen)]
pub(crate) struct PeerCore {
    peer: Peer,
}

/// What peers may do with blocks.
#[pyclass(module = "blockplane._core", frozen)]
pub(crate) struct WindowCore {
    window: Mutex<Option<Window>>,
    #[pyo3(get)]
    id: u64,
}

/// A file.
#[pyclass(module = "blockplane._core", frozen)]
pub(crate) struct FileCore {
    file: Mutex<Option<FileStore>>,
}

#[pymethods]
impl AgentCore {
    #[new]
    #[pyo3(signature = (name, listen=None))]
    fn new(py: Python<'_>, name: String, listen: Option<&str>) -> PyResult<Self> {
        let mut config = AgentConfig::new(name);
        if let Some(address) = listen {
            config.tcp_bind = address.parse().map_err(|error| {
                fault(
                    "invalid",
                    format!("listen {address:?}: {error}; ADDRESS:PORT is accepted"),
                )
            })?;
        }
        py.detach(|| {
            let agent = Agent::new(config).map_err(|error| fault("agent", error))?;
            let ends = agent
                .completion_queue(ENDS_MAX)
                .map_err(|error| fault("agent", error))?;
            Ok(Self {
                agent,
                ends,
                token: AtomicU64::new(1),
            })
        })
    }

    #[getter]
    fn name(&self) -> &str {
        self.agent.name()
    }

    /// Readable while transfers have ended that `ended` has not returned.
    #[getter]
    fn fd(&self) -> i32 {
        self.ends.as_fd().as_raw_fd()
    }

    /// Tokens of transfers that ended since the last call.
    fn ended(&self) -> Vec<u64> {
        let mut ends = Vec::new();
        self.ends.drain(&mut ends);
        ends.into_iter().map(|end| end.token).collect()
    }

    fn metadata<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.agent.metadata().to_bytes())
    }

    /// Memory of `keep`, which stays until nothing uses it any more.
    #[pyo3(signature = (address, bytes, device, keep, windowed=false))]
    fn register(
        &self,
        address: u64,
        bytes: usize,
        device: Option<u32>,
        keep: Py<PyAny>,
        windowed: bool,
    ) -> PyResult<RegionCore> {
        let access = access(windowed);
        let region = match device {
            Some(device) => {
                // SAFETY: the caller says that this is memory of `keep` on this device, and the region
                // lets go of `keep` only when nothing uses the memory any more.
                let memory = unsafe { DeviceMemory::from_raw(device, address, bytes) };
                self.agent.register_device(memory, access)
            }
            None => {
                let base = usize::try_from(address).ok();
                let base = base.and_then(|address| NonNull::new(address as *mut u8));
                let base = base.ok_or_else(|| fault("invalid", "memory at address 0"))?;
                // SAFETY: as above.
                let memory = unsafe { HostMemory::from_raw(base, bytes) };
                self.agent.register(memory, access)
            }
        };
        let region = region.map_err(|error| fault("invalid", error))?;
        Ok(RegionCore::new(region, Some(keep)))
    }

    /// Memory that peers on this host map.
    #[pyo3(signature = (bytes, label, windowed=false))]
    fn allocate(&self, bytes: usize, label: String, windowed: bool) -> PyResult<RegionCore> {
        let config = ArenaConfig::new(bytes, label).with_access(access(windowed));
        let region = self.agent.allocate(config);
        Ok(RegionCore::new(
            region.map_err(|error| fault("invalid", error))?,
            None,
        ))
    }

    #[pyo3(signature = (path, size=None))]
    fn open_file(&self, py: Python<'_>, path: PathBuf, size: Option<u64>) -> PyResult<FileCore> {
        let config = FileConfig::new(path);
        let config = match size {
            Some(size) => config.create(size),
            None => config,
        };
        let file = py.detach(|| self.agent.open_file(config));
        Ok(FileCore {
            file: Mutex::new(Some(file.map_err(|error| fault("storage", error))?)),
        })
    }

    fn connect(&self, py: Python<'_>, metadata: &[u8], timeout: f64) -> PyResult<PeerCore> {
        let metadata = Metadata::from_bytes(metadata).map_err(|error| fault("metadata", error))?;
        let peer = py.detach(|| self.agent.connect(&metadata, seconds(timeout)));
        Ok(PeerCore {
            peer: peer.map_err(|error| connect(&error))?,
        })
    }

    #[expect(clippy::too_many_arguments, reason = "two sides and options")]
    #[pyo3(signature = (write, local, layout, ids, layers, peer, region, remote_layout, remote_ids,
        remote_layers, window, notify, timeout))]
    fn post(
        &self,
        py: Python<'_>,
        write: bool,
        local: &RegionCore,
        layout: Layout,
        ids: Vec<u32>,
        layers: (u32, u32),
        peer: &PeerCore,
        region: u64,
        remote_layout: Layout,
        remote_ids: Vec<u32>,
        remote_layers: (u32, u32),
        window: Option<u64>,
        notify: Option<Vec<u8>>,
        timeout: f64,
    ) -> PyResult<TransferCore> {
        let registration = local.registration()?;
        let op = if write { Op::Write } else { Op::Read };
        py.detach(|| {
            let local = LocalBlocks {
                registration: &registration,
                layout: block_layout(layout),
                ids: BlockIds::from(ids),
                layers: range(layers),
            };
            let remote = RemoteBlocks {
                peer: &peer.peer,
                region: RegionId(region),
                layout: block_layout(remote_layout),
                ids: BlockIds::from(remote_ids),
                layers: range(remote_layers),
                window: window.map(WindowId),
            };
            let prepared = self.agent.prepare(op, local, remote);
            self.start(&prepared.map_err(|error| prepare(&error))?, notify, timeout)
        })
    }

    #[expect(clippy::too_many_arguments, reason = "two sides and options")]
    fn post_file(
        &self,
        py: Python<'_>,
        write: bool,
        local: &RegionCore,
        layout: Layout,
        ids: Vec<u32>,
        layers: (u32, u32),
        file: &FileCore,
        file_layout: Layout,
        file_ids: Vec<u32>,
        file_layers: (u32, u32),
        durable: bool,
        timeout: f64,
    ) -> PyResult<TransferCore> {
        let registration = local.registration()?;
        let file = file.file.lock().clone();
        let file = file.ok_or_else(|| fault("invalid", "the file is closed"))?;
        let op = if write { Op::Write } else { Op::Read };
        py.detach(|| {
            let local = LocalBlocks {
                registration: &registration,
                layout: block_layout(layout),
                ids: BlockIds::from(ids),
                layers: range(layers),
            };
            let remote = FileBlocks {
                file: &file,
                layout: block_layout(file_layout),
                ids: BlockIds::from(file_ids),
                layers: range(file_layers),
                durable,
            };
            let prepared = self.agent.prepare_file(op, local, remote);
            self.start(&prepared.map_err(|error| prepare(&error))?, None, timeout)
        })
    }

    fn notify(&self, peer: &PeerCore, payload: Vec<u8>, timeout: f64) -> PyResult<TransferCore> {
        let (token, options) = self.options(timeout);
        let sent = self.agent.notify_with(&peer.peer, payload, options);
        Ok(TransferCore::new(
            sent.map_err(|error| post(&error))?,
            token,
        ))
    }

    /// The next notification: who sent it, and its bytes.
    fn receive<'py>(
        &self,
        py: Python<'py>,
        timeout: f64,
    ) -> PyResult<Option<(String, Bound<'py, PyBytes>)>> {
        let notifications = self.agent.notifications();
        match py.detach(|| notifications.recv_timeout(seconds(timeout))) {
            Ok(next) => Ok(Some((
                next.from.to_string(),
                PyBytes::new(py, &next.payload),
            ))),
            Err(RecvError::TimedOut) => Ok(None),
            Err(error @ RecvError::Stopped(_)) => Err(fault("agent", error)),
        }
    }

    /// Lets peers read or write blocks of a region.
    #[pyo3(signature = (region, layout, ids, read, write))]
    fn open_window(
        &self,
        region: &RegionCore,
        layout: Layout,
        ids: Option<Vec<u32>>,
        read: bool,
        write: bool,
    ) -> PyResult<WindowCore> {
        let scope = ids.map_or(WindowScope::Region, |ids| WindowScope::Blocks {
            layout: block_layout(layout),
            ids,
        });
        let access = match (read, write) {
            (true, true) => WindowAccess::ReadWrite,
            (true, false) => WindowAccess::Read,
            (false, true) => WindowAccess::Write,
            (false, false) => {
                return Err(fault("invalid", "a window for neither reads nor writes"));
            }
        };
        let window = self
            .agent
            .open_window(&region.registration()?, scope, access);
        let window = window.map_err(|error| fault("invalid", error))?;
        Ok(WindowCore {
            id: window.id().0,
            window: Mutex::new(Some(window)),
        })
    }
}

impl AgentCore {
    fn options(&self, timeout: f64) -> (u64, PostOptions) {
        let token = self.token.fetch_add(1, Ordering::Relaxed);
        let options = PostOptions::within(seconds(timeout)).complete_to(&self.ends, token);
        (token, options)
    }

    fn start(
        &self,
        prepared: &Prepared,
        notify: Option<Vec<u8>>,
        timeout: f64,
    ) -> PyResult<TransferCore> {
        let (token, mut options) = self.options(timeout);
        if let Some(payload) = notify {
            options = options.notify(payload);
        }
        let posted = prepared.post(options).map_err(|error| post(&error))?;
        Ok(TransferCore::new(posted, token))
    }
}

impl RegionCore {
    fn new(registration: Registration, keep: Option<Py<PyAny>>) -> Self {
        Self {
            id: registration.id().0,
            nbytes: registration.len(),
            address: registration.base_ptr().as_ptr() as usize,
            state: Mutex::new(Some((registration, keep))),
        }
    }

    fn registration(&self) -> PyResult<Registration> {
        let state = self.state.lock();
        let known = state.as_ref().map(|(registration, _)| registration.clone());
        known.ok_or_else(|| fault("invalid", "the region is closed"))
    }

    fn end(&self, time: Duration) -> PyResult<()> {
        let Some((registration, keep)) = self.state.lock().take() else {
            return Ok(());
        };
        registration.close(time).map_err(|error| {
            // Somebody may still copy: the memory stays.
            if let Some(keep) = keep {
                let _never_freed = keep.into_ptr();
            }
            fault("busy", error)
        })
    }
}

#[pymethods]
impl RegionCore {
    /// Ends the registration, and waits until nobody uses the memory.
    fn close(&self, py: Python<'_>, timeout: f64) -> PyResult<()> {
        let timeout = seconds(timeout);
        py.detach(|| self.end(timeout))
    }

    fn read_at<'py>(
        &self,
        py: Python<'py>,
        at: u64,
        bytes: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let registration = self.registration()?;
        PyBytes::new_with(py, bytes, |into| {
            let read = registration.read_at(at, into);
            read.map_err(|error| fault("invalid", error))
        })
    }

    fn write_at(&self, at: u64, from: &[u8]) -> PyResult<()> {
        let written = self.registration()?.write_at(at, from);
        written.map_err(|error| fault("invalid", error))
    }
}

impl Drop for RegionCore {
    fn drop(&mut self) {
        // What it says was said by `close`, if anybody called it.
        let _ = self.end(DROP_TIME);
    }
}

#[pymethods]
impl PeerCore {
    #[getter]
    fn name(&self) -> &str {
        self.peer.name()
    }

    #[getter]
    fn connected(&self) -> bool {
        self.peer.is_connected()
    }

    /// How bytes get there, and why so.
    #[getter]
    fn lane(&self) -> String {
        format!("{:?}", self.peer.lane().lane).to_lowercase()
    }

    fn disconnect(&self) {
        self.peer.disconnect();
    }
}

#[pymethods]
impl FileCore {
    fn close(&self, py: Python<'_>) {
        let file = self.file.lock().take();
        py.detach(|| drop(file));
    }
}

#[pymethods]
impl WindowCore {
    /// Ends what it allows; no byte lands through it any more.
    fn close(&self, py: Python<'_>, timeout: f64) -> PyResult<()> {
        let Some(window) = self.window.lock().take() else {
            return Ok(());
        };
        let closed = py.detach(|| window.close(seconds(timeout)));
        closed.map_err(|error| fault("busy", error))
    }
}

const fn access(windowed: bool) -> RemoteAccess {
    if windowed {
        RemoteAccess::WindowOnly
    } else {
        RemoteAccess::Open
    }
}

const fn block_layout(layout: Layout) -> BlockLayout {
    let (offset, blocks, block_stride, layers, layer_stride, run_bytes) = layout;
    BlockLayout {
        offset,
        blocks,
        block_stride,
        layers,
        layer_stride,
        run_bytes,
    }
}

const fn range((start, end): (u32, u32)) -> Range<u32> {
    start..end
}

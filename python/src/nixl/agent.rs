//! `nixlAgent`: NIXL's agent for Python. Converts arguments, lets other threads of Python run while
//! something may wait, and leaves the rest to [`Core`].

#![expect(
    clippy::needless_pass_by_value,
    reason = "arguments are converted from objects of Python"
)]

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};

use super::backend::Backend;
use super::core::{Core, Options};
use super::dlist::{RegList, XferList};
use super::error::Fault;
use super::input::{self, Name};
use super::kinds::{Config, Cost, Direction, Memory, Status, Telemetry};
use super::listen::{self, Listener};
use super::memory::path_of;
use super::metadata::Blob;
use super::rows::Rows as ListRows;
use super::xfer::Rows;

/// Who looks for notifications again within this time, having found none, does nothing else.
const BUSY_POLL: Duration = Duration::from_millis(1);
/// So many times in a row, other threads get to run.
const BUSY_POLLS: u32 = 8;
/// How long other threads may run then. A notification ends it.
const BUSY_POLL_PAUSE: Duration = Duration::from_micros(50);

/// One agent. Its methods have the names and the order of arguments of NIXL's bindings.
#[pyclass(name = "nixlAgent", module = "nixl._bindings", subclass, frozen)]
pub(super) struct Agent {
    /// Before the core, which it calls.
    listener: Option<Listener>,
    core: Arc<Core>,
    /// When somebody last looked for notifications and found none, and how often in a row.
    nothing: Mutex<Option<(Instant, u32)>>,
}

fn seconds(name: &str, value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value)
        .ok()
        .filter(|time| (Duration::from_millis(20)..=Duration::from_secs(86_400)).contains(time))
        .ok_or_else(|| PyValueError::new_err(format!("{name} is {value}; accepted: 0.02 to 86400")))
}

/// Names of kinds of memory, as NIXL's plugins list them.
fn names(memories: &[Memory]) -> Vec<String> {
    memories
        .iter()
        .map(|memory| format!("{}_SEG", memory.label()))
        .collect()
}

type Parameters = (HashMap<String, String>, Vec<String>);

#[pymethods]
impl Agent {
    #[new]
    #[pyo3(signature = (
        name, config, *, host=None, deadline_s=300.0, peer_loss_timeout_s=5.0, connect_timeout_s=5.0,
        nvrtc_folders=Vec::new(), kernel_cache=None, gpu_sms=None
    ))]
    #[expect(
        clippy::too_many_arguments,
        reason = "keywords of a constructor in Python"
    )]
    fn new(
        py: Python<'_>,
        name: Name,
        config: Config,
        host: Option<std::net::IpAddr>,
        deadline_s: f64,
        peer_loss_timeout_s: f64,
        connect_timeout_s: f64,
        nvrtc_folders: Vec<PathBuf>,
        kernel_cache: Option<PathBuf>,
        gpu_sms: Option<u32>,
    ) -> PyResult<Self> {
        if name.is_empty() {
            return Err(PyValueError::new_err("Agent needs a non-empty name"));
        }
        let options = Options {
            host,
            deadline: seconds("deadline_s", deadline_s)?,
            peer_loss_timeout: seconds("peer_loss_timeout_s", peer_loss_timeout_s)?,
            connect_timeout: seconds("connect_timeout_s", connect_timeout_s)?,
            nvrtc_folders,
            kernel_cache,
            gpu_sms,
        };
        let start = || -> Result<Self, Fault> {
            let core = Arc::new(Core::new(&name, config.captureTelemetry, options)?);
            let listener = config
                .useListenThread
                .then(|| Listener::start(&core, config.listenPort))
                .transpose()?;
            Ok(Self {
                listener,
                core,
                nothing: Mutex::new(None),
            })
        };
        Ok(py.detach(start)?)
    }

    #[expect(clippy::unused_self, reason = "a method of the agent in NIXL")]
    #[pyo3(name = "getAvailPlugins")]
    fn plugins(&self) -> Vec<&'static str> {
        Backend::ALL.map(Backend::name).to_vec()
    }

    #[expect(clippy::unused_self, reason = "a method of the agent in NIXL")]
    #[pyo3(name = "getPluginParams")]
    fn plugin_parameters(&self, name: Name) -> PyResult<Parameters> {
        let backend = Backend::from_name(&name)
            .ok_or_else(|| Fault::NotFound(format!("there is no plugin {:?}", &*name)))?;
        Ok((HashMap::new(), names(backend.memories())))
    }

    /// Parameters of NIXL's plugins have no meaning here and are accepted.
    #[pyo3(name = "createBackend", signature = (name, parameters=None))]
    fn create_backend(
        &self,
        name: Name,
        parameters: Option<HashMap<String, String>>,
    ) -> PyResult<u64> {
        drop(parameters);
        Ok(self.core.create_backend(&name)?.handle())
    }

    #[pyo3(name = "getBackendParams")]
    fn backend_parameters(&self, backend: u64) -> PyResult<Parameters> {
        let backends = self.core.backends(&[backend])?;
        let memories = backends
            .iter()
            .flat_map(|backend| names(backend.memories()));
        Ok((HashMap::new(), memories.collect()))
    }

    #[pyo3(name = "registerMem", signature = (descs, backends=Vec::new()))]
    fn register(
        &self,
        py: Python<'_>,
        descs: PyRef<'_, RegList>,
        backends: Vec<u64>,
    ) -> PyResult<Status> {
        let (memory, rows, infos) = (descs.memory, descs.rows.clone(), descs.infos.clone());
        drop(descs);
        py.detach(|| self.core.register(memory, &rows, &infos, &backends))?;
        Ok(Status::Success)
    }

    #[pyo3(name = "deregisterMem", signature = (descs, backends=Vec::new()))]
    fn deregister(
        &self,
        py: Python<'_>,
        descs: PyRef<'_, RegList>,
        backends: Vec<u64>,
    ) -> PyResult<Status> {
        let (memory, rows) = (descs.memory, descs.rows.clone());
        drop(descs);
        py.detach(|| self.core.deregister(memory, &rows, &backends))?;
        Ok(Status::Success)
    }

    /// What a file system tells of files; none for those that are not there.
    #[pyo3(name = "queryMem")]
    fn query(
        &self,
        descs: &RegList,
        backend: u64,
    ) -> PyResult<Vec<Option<HashMap<String, String>>>> {
        let backends = self.core.backends(&[backend])?;
        if descs.memory != Memory::File
            || !backends
                .iter()
                .any(|backend| backend.memories().contains(&Memory::File))
        {
            return Err(Fault::NotSupported(
                "only files can be queried, by POSIX, GDS or GDS_MT".to_owned(),
            )
            .into());
        }
        let rows = descs.rows.iter().zip(&descs.infos);
        Ok(rows.map(|(row, info)| query_file(row[2], info)).collect())
    }

    #[pyo3(name = "makeConnection", signature = (agent, backends=Vec::new()))]
    fn connect(&self, py: Python<'_>, agent: Name, backends: Vec<u64>) -> PyResult<Status> {
        self.core.backends(&backends)?;
        py.detach(|| self.core.peer(&agent))?;
        Ok(Status::Success)
    }

    /// `(agent, list, backends=[])`, `(list, backends=[])` for this agent, or
    /// `(agent, memory, array of N x 5, backends=[])`.
    #[pyo3(name = "prepXferDlist", signature = (*arguments, backend=None))]
    fn prepare_list(
        &self,
        py: Python<'_>,
        arguments: &Bound<'_, pyo3::types::PyTuple>,
        backend: Option<Vec<u64>>,
    ) -> PyResult<u64> {
        let given: Vec<_> = arguments.iter().collect();
        let backends = |at: usize| match (given.get(at), &backend) {
            (Some(listed), _) => listed.extract::<Vec<u64>>(),
            (None, Some(listed)) => Ok(listed.clone()),
            (None, None) => Ok(Vec::new()),
        };
        let (agent, memory, rows, strided, backends) = match &given[..] {
            [list, ..] if list.is_instance_of::<XferList>() => {
                let list = list.cast::<XferList>()?.try_borrow()?;
                (
                    String::new(),
                    list.memory,
                    list.rows.clone(),
                    None,
                    backends(1)?,
                )
            }
            [agent, list, ..] if list.is_instance_of::<XferList>() => {
                let list = list.cast::<XferList>()?.try_borrow()?;
                let rows = list.rows.clone();
                (
                    agent.extract::<Name>()?.0,
                    list.memory,
                    rows,
                    None,
                    backends(2)?,
                )
            }
            [agent, memory, array, ..] => {
                let strided = input::rows_of_array::<5>(array)?;
                let strided = strided.ok_or_else(|| {
                    PyValueError::new_err("strided descriptors are an array of shape (N, 5)")
                })?;
                (
                    agent.extract::<Name>()?.0,
                    memory.extract()?,
                    ListRows::default(),
                    Some(strided),
                    backends(3)?,
                )
            }
            _ => {
                return Err(pyo3::exceptions::PyTypeError::new_err(
                    "accepted: (agent, nixlXferDList), (nixlXferDList), (agent, memory, array)",
                ));
            }
        };
        Ok(py.detach(|| {
            let rows = match (strided.as_deref(), rows.runs()) {
                (Some(strided), _) => Rows::Strided(strided),
                (None, Some(runs)) => Rows::Runs(runs),
                (None, None) => Rows::Plain(&rows),
            };
            let list = self.core.prepare_list(&agent, memory, &rows, &backends)?;
            Ok::<_, Fault>(self.core.add_list(list))
        })?)
    }

    #[pyo3(name = "releasedDlistH")]
    fn release_list(&self, py: Python<'_>, list: u64) -> PyResult<Status> {
        py.detach(|| self.core.drop_list(list))?;
        Ok(Status::Success)
    }

    /// How many regular runs a prepared list is kept as; None when descriptor by descriptor.
    #[pyo3(name = "describeDlist")]
    fn describe_list(&self, list: u64) -> PyResult<(usize, Option<usize>)> {
        Ok(self.core.list(list)?.shape())
    }

    #[pyo3(name = "makeXferReq", signature = (
        operation, local_side, local_indices, remote_side, remote_indices, notif_msg=None,
        backend=Vec::new(), skip_desc_merg=false
    ))]
    #[expect(clippy::too_many_arguments, reason = "the order of NIXL's binding")]
    fn make(
        &self,
        py: Python<'_>,
        operation: Direction,
        local_side: u64,
        local_indices: &Bound<'_, PyAny>,
        remote_side: u64,
        remote_indices: &Bound<'_, PyAny>,
        notif_msg: Option<&Bound<'_, PyAny>>,
        backend: Vec<u64>,
        skip_desc_merg: bool,
    ) -> PyResult<u64> {
        // Neighbours are merged for nothing.
        let _ = skip_desc_merg;
        let message = message(notif_msg)?;
        let local = input::indices(local_indices, "local")?;
        let remote = input::indices(remote_indices, "remote")?;
        Ok(py.detach(|| {
            let (local, remote) = ((local_side, &local[..]), (remote_side, &remote[..]));
            let request = self
                .core
                .make(operation, local, remote, message, &backend)?;
            Ok::<_, Fault>(self.core.add_request(request))
        })?)
    }

    #[pyo3(name = "createXferReq", signature = (
        operation, local_descs, remote_descs, remote_agent, notif_msg=None, backend=Vec::new()
    ))]
    #[expect(clippy::too_many_arguments, reason = "the order of NIXL's binding")]
    fn create(
        &self,
        py: Python<'_>,
        operation: Direction,
        local_descs: &XferList,
        remote_descs: &XferList,
        remote_agent: Name,
        notif_msg: Option<&Bound<'_, PyAny>>,
        backend: Vec<u64>,
    ) -> PyResult<u64> {
        let message = message(notif_msg)?;
        let (local_memory, local) = (local_descs.memory, local_descs.rows.clone());
        let (remote_memory, remote) = (remote_descs.memory, remote_descs.rows.clone());
        Ok(py.detach(|| {
            let local = (local_memory, &local[..]);
            let remote = (remote_memory, &remote[..]);
            let request =
                self.core
                    .create(operation, local, remote, &remote_agent, message, &backend)?;
            Ok::<_, Fault>(self.core.add_request(request))
        })?)
    }

    #[pyo3(name = "postXferReq", signature = (reqh, notif_msg=None))]
    fn post(
        &self,
        py: Python<'_>,
        reqh: u64,
        notif_msg: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Status> {
        let message = message(notif_msg)?;
        Ok(py.detach(|| self.core.post(reqh, message))?)
    }

    /// Waits for nothing, so that Python keeps this thread.
    #[pyo3(name = "getXferStatus")]
    fn status(&self, reqh: u64) -> PyResult<Status> {
        Ok(self.core.status(reqh)?)
    }

    #[pyo3(name = "getXferTelemetry")]
    fn telemetry(&self, reqh: u64) -> PyResult<Telemetry> {
        if !self.core.telemetry {
            return Err(Fault::NoTelemetry.into());
        }
        Ok(self.core.request(reqh)?.telemetry()?)
    }

    #[pyo3(name = "estimateXferCost")]
    fn estimate(&self, req_handle: u64) -> PyResult<(u64, u64, Cost)> {
        let (time, margin) = self.core.request(req_handle)?.estimate();
        Ok((time, margin, Cost::Analytical))
    }

    #[pyo3(name = "queryXferBackend")]
    fn backend_of(&self, reqh: u64) -> PyResult<u64> {
        Ok(self.core.request(reqh)?.backend.handle())
    }

    /// Calls off all requests in flight: the interpreter ends, and memory goes in any order.
    #[pyo3(name = "callOffAll")]
    fn call_off(&self, py: Python<'_>) {
        py.detach(|| self.core.call_off());
    }

    /// How a request runs: lane, pieces, reason.
    #[pyo3(name = "describeXferReq")]
    fn describe(&self, reqh: u64) -> PyResult<Vec<String>> {
        Ok(self.core.request(reqh)?.plans())
    }

    #[pyo3(name = "releaseXferReq")]
    fn release(&self, py: Python<'_>, reqh: u64) -> PyResult<Status> {
        py.detach(|| self.core.drop_request(reqh))?;
        Ok(Status::Success)
    }

    /// Adds what has come to the lists of a dictionary and returns that.
    #[pyo3(name = "getNotifs", signature = (notif_map, backends=Vec::new()))]
    fn notifications<'py>(
        &self,
        notif_map: Bound<'py, PyDict>,
        backends: Vec<u64>,
    ) -> PyResult<Bound<'py, PyDict>> {
        self.core.backends(&backends)?;
        let py = notif_map.py();
        let queue = self.core.agent.notifications();
        let mut next = queue.try_recv().ok().flatten();
        if next.is_none() && self.polled_busily() {
            // A loop around this call would keep the interpreter from threads that bring forward what it
            // waits for, such as the first exchange with a peer.
            next = py.detach(|| queue.recv_timeout(BUSY_POLL_PAUSE)).ok();
        }
        while let Some(note) = next {
            let payload = PyBytes::new(py, &note.payload);
            match notif_map.get_item(&*note.from)? {
                Some(list) => list.cast::<PyList>()?.append(payload)?,
                None => notif_map.set_item(&*note.from, PyList::new(py, [payload])?)?,
            }
            next = queue.try_recv().ok().flatten();
        }
        Ok(notif_map)
    }

    #[pyo3(name = "genNotif", signature = (remote_agent, msg, backends=None))]
    fn notify(
        &self,
        py: Python<'_>,
        remote_agent: Name,
        msg: &Bound<'_, PyAny>,
        backends: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Status> {
        // NIXL's binding takes a list, its own caller passes one number.
        if let Some(given) = backends {
            let listed = given
                .extract::<Vec<u64>>()
                .or_else(|_| Ok::<_, PyErr>(vec![given.extract()?]))?;
            self.core.backends(&listed)?;
        }
        let message = input::message(msg)?;
        py.detach(|| {
            let peer = self.core.peer(&remote_agent)?;
            let deadline = self.core.options.deadline;
            self.core.agent.notify(&peer, message, deadline)?.detach();
            Ok::<_, Fault>(())
        })?;
        Ok(Status::Success)
    }

    #[pyo3(name = "getLocalMD")]
    fn local_metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let blob = py.detach(|| self.core.metadata(None).map(|blob| blob.to_bytes()))?;
        Ok(PyBytes::new(py, &blob))
    }

    #[pyo3(name = "getLocalPartialMD", signature = (descs, inc_conn_info=false, backends=Vec::new()))]
    fn partial_metadata<'py>(
        &self,
        py: Python<'py>,
        descs: &RegList,
        inc_conn_info: bool,
        backends: Vec<u64>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let blob = self.part(descs, inc_conn_info, &backends)?.to_bytes();
        Ok(PyBytes::new(py, &blob))
    }

    #[pyo3(name = "loadRemoteMD")]
    fn load<'py>(
        &self,
        py: Python<'py>,
        metadata: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let blob = input::message(metadata)?;
        let name = py.detach(|| self.core.load(&blob))?;
        Ok(PyBytes::new(py, name.as_bytes()))
    }

    #[pyo3(name = "invalidateRemoteMD")]
    fn unload(&self, py: Python<'_>, agent: Name) -> Status {
        if py.detach(|| self.core.unload(&agent)) {
            Status::Success
        } else {
            Status::NotFound
        }
    }

    #[pyo3(name = "checkRemoteMD")]
    fn knows(&self, agent: Name, descs: &XferList) -> Status {
        if self.core.knows(&agent, descs.memory, &descs.rows) {
            Status::Success
        } else {
            Status::NotFound
        }
    }

    /// Port of the listener for metadata.
    #[pyo3(name = "getListenPort")]
    fn listen_port(&self) -> PyResult<u16> {
        let listener = self.listener.as_ref();
        Ok(listener.map(Listener::port).ok_or_else(|| {
            Fault::NotAllowed("the agent has no listener: enable_listen_thread is off".to_owned())
        })?)
    }

    #[pyo3(name = "sendLocalMD", signature = (ip_addr=Name::none(), port=0))]
    fn send(&self, py: Python<'_>, ip_addr: Name, port: u16) -> PyResult<()> {
        self.call(py, &ip_addr, || {
            listen::push(&ip_addr, port, &self.core.metadata(None)?.to_bytes())
        })
    }

    #[pyo3(name = "sendLocalPartialMD", signature = (
        descs, inc_conn_info=false, backends=Vec::new(), ip_addr=Name::none(), port=0, label=Name::none()
    ))]
    #[expect(clippy::too_many_arguments, reason = "the order of NIXL's binding")]
    fn send_part(
        &self,
        py: Python<'_>,
        descs: &RegList,
        inc_conn_info: bool,
        backends: Vec<u64>,
        ip_addr: Name,
        port: u16,
        label: Name,
    ) -> PyResult<()> {
        let _ = label;
        let blob = self.part(descs, inc_conn_info, &backends)?.to_bytes();
        self.call(py, &ip_addr, || listen::push(&ip_addr, port, &blob))
    }

    #[pyo3(name = "fetchRemoteMD", signature = (remote_agent, ip_addr=Name::none(), port=0, label=Name::none()))]
    fn fetch(
        &self,
        py: Python<'_>,
        remote_agent: Name,
        ip_addr: Name,
        port: u16,
        label: Name,
    ) -> PyResult<()> {
        let _ = label;
        self.call(py, &ip_addr, || {
            let blob = listen::fetch(&ip_addr, port, &remote_agent)?;
            self.core.load(&blob).map(drop)
        })
    }

    #[pyo3(name = "invalidateLocalMD", signature = (ip_addr=Name::none(), port=0))]
    fn withdraw(&self, py: Python<'_>, ip_addr: Name, port: u16) -> PyResult<()> {
        self.call(py, &ip_addr, || {
            listen::invalidate(&ip_addr, port, self.core.agent.name())
        })
    }

    #[expect(clippy::unused_self, reason = "a method of the agent in NIXL")]
    #[pyo3(name = "prepMemView", signature = (dlist, backends=Vec::new()))]
    fn prepare_view(&self, dlist: &Bound<'_, PyAny>, backends: Vec<u64>) -> PyResult<u64> {
        let _ = (dlist, backends);
        Err(no_views().into())
    }

    #[expect(clippy::unused_self, reason = "a method of the agent in NIXL")]
    #[pyo3(name = "releaseMemView")]
    fn release_view(&self, mvh: u64) -> PyResult<()> {
        let _ = mvh;
        Err(no_views().into())
    }
}

impl Agent {
    /// Notes that there was no notification. True when that has been so for a while, in a loop that does
    /// little else, and not because it waits for a transfer, which needs no thread of Python.
    fn polled_busily(&self) -> bool {
        let now = Instant::now();
        let mut nothing = self.nothing.lock();
        let before = nothing.filter(|(at, _)| now.duration_since(*at) < BUSY_POLL);
        let polls = match before {
            Some((_, polls)) if !self.core.has_requests() => polls.saturating_add(1),
            _ => 0,
        };
        *nothing = Some((now, polls));
        polls >= BUSY_POLLS
    }

    fn part(&self, descs: &RegList, connection: bool, backends: &[u64]) -> Result<Blob, Fault> {
        self.core.backends(backends)?;
        self.core
            .metadata(Some((descs.memory, &descs.rows, connection)))
    }

    /// A call to the listener of another agent. As in NIXL, a listener that is not there is logged:
    /// callers look for the other side's metadata until they have it.
    fn call(
        &self,
        py: Python<'_>,
        host: &str,
        call: impl FnOnce() -> Result<(), Fault> + Send,
    ) -> PyResult<()> {
        if host.is_empty() {
            return Err(Fault::NotSupported(
                "metadata through etcd or a TCP store; give the address and port of the other agent, \
                 or carry get_agent_metadata() yourself"
                    .to_owned(),
            )
            .into());
        }
        match py.detach(call) {
            Err(fault @ (Fault::Disconnected(_) | Fault::NotFound(_))) => {
                let name = self.core.agent.name();
                let logger = py
                    .import("logging")?
                    .call_method1("getLogger", ("nixl.bindings",))?;
                logger.call_method1("error", ("agent %s: %s", name, fault.to_string()))?;
                Ok(())
            }
            other => Ok(other?),
        }
    }
}

fn no_views() -> Fault {
    Fault::NotSupported(
        "views of memory for kernels that start transfers by themselves (HAVE_UCX_GPU_DEVICE_API is \
         False)"
            .to_owned(),
    )
}

fn message(given: Option<&Bound<'_, PyAny>>) -> PyResult<Vec<u8>> {
    given.map_or_else(|| Ok(Vec::new()), input::message)
}

/// Size, mode and time of the last change of a file, by its path or its descriptor.
fn query_file(device: u64, info: &[u8]) -> Option<HashMap<String, String>> {
    use std::os::unix::fs::MetadataExt;
    let path = match path_of(info) {
        Some((_, path)) => path,
        None if info.is_empty() => PathBuf::from(format!("/proc/self/fd/{device}")),
        // A path from where the process is.
        None => PathBuf::from(str::from_utf8(info).ok()?),
    };
    let found = std::fs::metadata(path).ok()?;
    Some(HashMap::from([
        ("size".to_owned(), found.size().to_string()),
        ("mode".to_owned(), found.mode().to_string()),
        ("mtime".to_owned(), found.mtime().to_string()),
    ]))
}

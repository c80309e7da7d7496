//! An agent as NIXL's callers see it, without Python: its registered memory, the agents it knows, its
//! prepared lists and its requests.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use blockplane_transfer::{Agent, AgentConfig, ConnectOptions, Peer, RegionId};
use parking_lot::{Mutex, RwLock};

use super::backend::Backend;
use super::error::Fault;
use super::input::Row;
use super::kinds::{Memory, Status};
use super::list::List;
use super::memory::{CLOSE_MAX, Held, ordinal, unsupported};
use super::metadata::Blob;
use super::remote::Remote;
use super::request::Request;
use super::table::{Section, Table};

/// Longest time that releasing a request in flight waits for its bytes to stand still.
const CANCEL_MAX: Duration = Duration::from_millis(250);

/// What the environment says, and what Python knows of its own folders.
#[derive(Clone, Debug)]
pub(super) struct Options {
    /// Interface that other hosts connect to; this host only when there is none.
    pub(super) host: Option<std::net::IpAddr>,
    pub(super) deadline: Duration,
    pub(super) peer_loss_timeout: Duration,
    pub(super) connect_timeout: Duration,
    pub(super) nvrtc_folders: Vec<PathBuf>,
    pub(super) kernel_cache: Option<PathBuf>,
    /// Multiprocessors that a transfer takes; the default of [`CudaConfig`](blockplane_transfer::CudaConfig)
    /// when `None`.
    pub(super) gpu_sms: Option<u32>,
}

pub(super) struct Core {
    pub(super) agent: Agent,
    pub(super) options: Options,
    pub(super) telemetry: bool,
    backends: Mutex<Vec<Backend>>,
    /// Replaced as a whole: who resolves a list keeps the one that it began with.
    memory: RwLock<Arc<Table<Arc<Held>>>>,
    pub(super) remotes: RwLock<HashMap<String, Arc<Remote>>>,
    lists: Mutex<HashMap<u64, Arc<Prepared>>>,
    requests: Mutex<HashMap<u64, Arc<Request>>>,
    own: OnceLock<Peer>,
    handles: AtomicU64,
}

/// A prepared list.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) memory: Memory,
    pub(super) side: Side,
}

/// Whose descriptors it has.
#[derive(Debug)]
pub(super) enum Side {
    /// Ours, as the initiator's side.
    Local(List<Weak<Held>>),
    /// Ours, as the other side.
    Own(List<Weak<Held>>),
    Remote(Arc<Remote>, List<RegionId>),
}

impl Prepared {
    /// Its descriptors, and the regular runs that they are kept as; none when they are kept one by one.
    pub(super) const fn shape(&self) -> (usize, Option<usize>) {
        match &self.side {
            Side::Local(list) | Side::Own(list) => (list.len(), list.runs()),
            Side::Remote(_, list) => (list.len(), list.runs()),
        }
    }
}

impl Core {
    pub(super) fn new(name: &str, telemetry: bool, options: Options) -> Result<Self, Fault> {
        let mut config = AgentConfig::new(name);
        if let Some(host) = options.host {
            config.tcp_bind = (host, 0).into();
        }
        config.peer_loss_timeout = options.peer_loss_timeout;
        config.connect_timeout = options.connect_timeout;
        config
            .cuda
            .kernels
            .nvrtc_folders
            .clone_from(&options.nvrtc_folders);
        config
            .cuda
            .kernels
            .cache_folder
            .clone_from(&options.kernel_cache);
        if let Some(sms) = options.gpu_sms {
            config.cuda.sms = sms;
            config.cuda.sms_total = config.cuda.sms_total.max(sms);
        }
        let agent = Agent::new(config).map_err(|error| Fault::Backend(error.to_string()))?;
        Ok(Self {
            agent,
            options,
            telemetry,
            backends: Mutex::default(),
            memory: RwLock::default(),
            remotes: RwLock::default(),
            lists: Mutex::default(),
            requests: Mutex::default(),
            own: OnceLock::new(),
            // Handles of one agent are not mistaken for handles of another, or for small numbers.
            handles: AtomicU64::new(1 << 32),
        })
    }

    pub(super) fn create_backend(&self, name: &str) -> Result<Backend, Fault> {
        let Some(backend) = Backend::from_name(name) else {
            let known = Backend::ALL.map(Backend::name).join(", ");
            return Err(Fault::NotFound(format!(
                "backend {name:?}; accepted: {known}"
            )));
        };
        let mut created = self.backends.lock();
        if created.contains(&backend) {
            return Err(Fault::Invalid(format!("backend {name:?} is there already")));
        }
        created.push(backend);
        Ok(backend)
    }

    /// The backends of these handles, or all when there are none.
    pub(super) fn backends(&self, handles: &[u64]) -> Result<Vec<Backend>, Fault> {
        let created = self.backends.lock();
        if handles.is_empty() {
            return Ok(created.clone());
        }
        let known = |&handle: &u64| {
            let backend = Backend::from_handle(handle).filter(|known| created.contains(known));
            backend.ok_or_else(|| Fault::Invalid(format!("{handle} is no backend of this agent")))
        };
        handles.iter().map(known).collect()
    }

    /// The first backend that moves bytes between two kinds of memory.
    pub(super) fn backend_for(
        &self,
        handles: &[u64],
        local: Memory,
        remote: Memory,
    ) -> Result<Backend, Fault> {
        let backends = self.backends(handles)?;
        let found = backends.iter().find(|backend| backend.moves(local, remote));
        found.copied().ok_or_else(|| {
            Fault::NotFound(format!(
                "no backend of this agent that moves {} to or from {}; it has {:?}",
                local.label(),
                remote.label(),
                backends
                    .iter()
                    .map(|backend| backend.name())
                    .collect::<Vec<_>>()
            ))
        })
    }

    fn check_backend(&self, handles: &[u64], memory: Memory) -> Result<(), Fault> {
        let backends = self.backends(handles)?;
        if backends
            .iter()
            .any(|backend| backend.memories().contains(&memory))
        {
            return Ok(());
        }
        Err(Fault::NotFound(format!(
            "no backend of this agent for memory of kind {}",
            memory.label()
        )))
    }

    /// Registers all of these, or none.
    pub(super) fn register(
        &self,
        memory: Memory,
        rows: &[Row],
        infos: &[Vec<u8>],
        backends: &[u64],
    ) -> Result<(), Fault> {
        if matches!(memory, Memory::Block | Memory::Object) {
            return Err(unsupported(memory));
        }
        self.check_backend(backends, memory)?;
        if memory == Memory::Vram {
            let mut devices: Vec<u64> = rows.iter().map(|row| row[2]).collect();
            devices.sort_unstable();
            devices.dedup();
            for device in devices {
                // Kernels are compiled now and not while the first request waits.
                self.agent.warm_device(ordinal(device)?)?;
            }
        }
        let mut added = Vec::with_capacity(rows.len());
        for (row, info) in rows.iter().zip(infos) {
            let held = Held::register(&self.agent, memory, *row, info)?;
            added.push(Section {
                memory,
                device: row[2],
                start: row[0],
                bytes: row[1],
                target: Arc::new(held),
            });
        }
        let mut table = self.memory.write();
        let mut sections = table.sections().to_vec();
        sections.append(&mut added);
        *table = Arc::new(Table::new(sections));
        Ok(())
    }

    /// Ends registrations, which are named as they were made.
    pub(super) fn deregister(
        &self,
        memory: Memory,
        rows: &[Row],
        backends: &[u64],
    ) -> Result<(), Fault> {
        self.backends(backends)?;
        let mut table = self.memory.write();
        let mut sections = table.sections().to_vec();
        let mut removed = Vec::with_capacity(rows.len());
        for [address, bytes, device] in rows {
            let named = |section: &Section<Arc<Held>>| {
                (section.memory, section.start, section.bytes, section.device)
                    == (memory, *address, *bytes, *device)
            };
            let Some(at) = sections.iter().position(named) else {
                return Err(Fault::NotFound(format!(
                    "{bytes} bytes at {address:#x} of {} device {device} are not registered",
                    memory.label()
                )));
            };
            removed.push(sections.swap_remove(at).target);
        }
        *table = Arc::new(Table::new(sections));
        drop(table);
        let until = Instant::now() + CLOSE_MAX;
        let requests: Vec<_> = self.requests.lock().values().cloned().collect();
        let mut trouble = Ok(());
        for held in removed {
            if let Some(region) = held.id() {
                requests
                    .iter()
                    .for_each(|request| request.forget(region, until));
            }
            // Somebody who resolves a list at this moment may have it; then it ends with them.
            if let Some(held) = Arc::into_inner(held) {
                let closed = held.close(until);
                trouble = trouble.and(closed);
            }
        }
        trouble
    }

    /// The registered memory at this moment.
    pub(super) fn memory(&self) -> Arc<Table<Arc<Held>>> {
        self.memory.read().clone()
    }

    /// This agent as its own peer.
    pub(super) fn own(&self) -> Result<Peer, Fault> {
        if let Some(own) = self.own.get() {
            return Ok(own.clone());
        }
        let timeout = self.options.connect_timeout;
        let own = self.agent.connect(&self.agent.metadata(), timeout)?;
        Ok(self.own.get_or_init(|| own).clone())
    }

    pub(super) fn remote(&self, name: &str) -> Result<Arc<Remote>, Fault> {
        self.remotes.read().get(name).cloned().ok_or_else(|| {
            Fault::NotFound(format!(
                "no metadata of agent {name:?}; accepted: agents that were added"
            ))
        })
    }

    /// The peer of a name, which may be this agent's own.
    pub(super) fn peer(&self, name: &str) -> Result<Peer, Fault> {
        if name == self.agent.name() {
            return self.own();
        }
        let remote = self.remote(name)?;
        remote.connect(&self.agent, self.options.connect_timeout)?;
        Ok(remote.peer().clone())
    }

    /// Metadata of this agent: all of it, or what `rows` name.
    pub(super) fn metadata(&self, part: Option<(Memory, &[Row], bool)>) -> Result<Blob, Fault> {
        let table = self.memory();
        let open = |section: &Section<Arc<Held>>| {
            Some(Section {
                memory: section.memory,
                device: section.device,
                start: section.start,
                bytes: section.bytes,
                target: section.target.id()?,
            })
        };
        let (connection, sections) = match part {
            None => (true, table.sections().iter().filter_map(open).collect()),
            Some((memory, rows, connection)) => {
                let mut sections = Vec::with_capacity(rows.len());
                for &[address, bytes, device] in rows {
                    let at = table.find(memory, device, address, bytes);
                    let section = at.and_then(|at| open(&table.sections()[at]));
                    sections.push(section.ok_or_else(|| {
                        Fault::NotFound(format!(
                            "{bytes} bytes at {address:#x} of {} device {device} are not registered, \
                             or not for other agents",
                            memory.label()
                        ))
                    })?);
                }
                (connection, sections)
            }
        };
        let agent = if connection {
            // Regions are named below, with their addresses.
            let metadata = self.agent.metadata_of(&[]);
            Some(metadata.map_err(|error| Fault::Backend(error.to_string()))?)
        } else {
            None
        };
        Ok(Blob {
            name: self.agent.name().to_owned(),
            epoch: self.agent.epoch(),
            agent,
            complete: part.is_none(),
            sections,
        })
    }

    /// Takes metadata of another agent; says its name.
    pub(super) fn load(&self, bytes: &[u8]) -> Result<String, Fault> {
        let blob = Blob::from_bytes(bytes)?;
        if blob.name == self.agent.name() {
            return Err(Fault::Invalid(format!(
                "metadata of an agent with this agent's own name, {:?}",
                blob.name
            )));
        }
        let name = blob.name.clone();
        let mut remotes = self.remotes.write();
        if let Some(known) = remotes.get(&name).filter(|known| known.epoch == blob.epoch) {
            known.extend(blob);
            return Ok(name);
        }
        let Some(metadata) = blob.agent.clone() else {
            return Err(Fault::NotFound(format!(
                "partial metadata of agent {name:?} does not say how to connect to it, and nothing \
                 else does"
            )));
        };
        let options = ConnectOptions::within(self.options.connect_timeout);
        let peer = self.agent.remember(&metadata, options)?;
        remotes.insert(name.clone(), Arc::new(Remote::new(peer, metadata, blob)));
        Ok(name)
    }

    /// Forgets another agent and ends the connection to it; false when it was not known.
    pub(super) fn unload(&self, name: &str) -> bool {
        let known = self.remotes.write().remove(name);
        let Some(remote) = known else {
            return false;
        };
        remote.peer().disconnect();
        self.agent.forget(name);
        true
    }

    /// Whether metadata of an agent is there, with these descriptors in it.
    pub(super) fn knows(&self, name: &str, memory: Memory, rows: &[Row]) -> bool {
        let holds = |table: &dyn Fn(Memory, u64, u64, u64) -> bool| {
            rows.iter()
                .all(|&[address, bytes, device]| table(memory, device, address, bytes))
        };
        self.remotes.read().get(name).is_some_and(|remote| {
            let table = remote.table();
            holds(&|memory, device, address, bytes| {
                table.find(memory, device, address, bytes).is_some()
            })
        })
    }

    pub(super) fn add_list(&self, list: Prepared) -> u64 {
        let handle = self.handles.fetch_add(16, Ordering::Relaxed);
        self.lists.lock().insert(handle, Arc::new(list));
        handle
    }

    pub(super) fn list(&self, handle: u64) -> Result<Arc<Prepared>, Fault> {
        let list = self.lists.lock().get(&handle).cloned();
        list.ok_or_else(|| Fault::Invalid(format!("{handle:#x} is no prepared list of this agent")))
    }

    pub(super) fn drop_list(&self, handle: u64) -> Result<(), Fault> {
        self.list(handle)?;
        let removed = self.lists.lock().remove(&handle);
        drop(removed);
        Ok(())
    }

    pub(super) fn add_request(&self, request: Request) -> u64 {
        let handle = self.handles.fetch_add(16, Ordering::Relaxed);
        self.requests.lock().insert(handle, Arc::new(request));
        handle
    }

    pub(super) fn has_requests(&self) -> bool {
        !self.requests.lock().is_empty()
    }

    pub(super) fn request(&self, handle: u64) -> Result<Arc<Request>, Fault> {
        let request = self.requests.lock().get(&handle).cloned();
        request.ok_or_else(|| Fault::Invalid(format!("{handle:#x} is no request of this agent")))
    }

    pub(super) fn post(&self, handle: u64, message: Vec<u8>) -> Result<Status, Fault> {
        let deadline = self.options.deadline;
        let request = self.request(handle)?;
        request.post(message, &self.agent, deadline, || self.own())
    }

    pub(super) fn status(&self, handle: u64) -> Result<Status, Fault> {
        self.request(handle)?
            .status(&self.agent, self.options.deadline)
    }

    /// Gives a request up; one in flight is called off.
    pub(super) fn drop_request(&self, handle: u64) -> Result<(), Fault> {
        let request = self.request(handle)?;
        if !request.cancel(Instant::now() + CANCEL_MAX) {
            return Err(Fault::NotAllowed(format!(
                "the request is called off, but bytes of it may still move after {CANCEL_MAX:?}; keep \
                 its memory and release it again"
            )));
        }
        self.requests.lock().remove(&handle);
        Ok(())
    }
}

impl Core {
    /// Calls off all that is in flight, so that memory may go.
    pub(super) fn call_off(&self) {
        let requests: Vec<_> = self.requests.lock().values().cloned().collect();
        let until = Instant::now() + CANCEL_MAX * 4;
        for request in requests {
            request.cancel(until);
        }
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        // Memory of Python may go right after the agent: its bytes have to stand still by then.
        self.call_off();
    }
}

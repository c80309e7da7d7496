//! What all handles of one agent share.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Weak};

use parking_lot::{Mutex, RwLock};

use super::peer::KnownPeer;
use super::{CopyPool, Session, Timers};
use crate::config::{AgentConfig, ArenaConfig, DeviceArenaConfig, Lane, RemoteAccess};
use crate::cuda::{CudaUnavailable, DeviceMemory, DeviceWork, Mover};
use crate::error::{
    AgentError, LossCause, MetadataError, PrepareError, RegisterError, WindowError,
};
use crate::memory::{HostMemory, Region, RegionId, RegionOwner, Registration};
use crate::op::{Notification, NotificationQueue};
use crate::peer::{Addresses, Metadata, MetadataContent, RegionInfo};
use crate::rdma::Adapter;
use crate::stage::Stage;
use crate::stats::{AgentStats, Counters};
use crate::storage::Storage;
use crate::window::{OpenWindow, Scope, Window, WindowAccess, WindowId, WindowScope};
use crate::wire::{Incoming, Listeners, Reactors, TlsContext};

pub(crate) struct Core {
    pub(crate) name: Arc<str>,
    pub(crate) epoch: u64,
    pub(crate) config: AgentConfig,
    pub(crate) counters: Arc<Counters>,
    pub(crate) timers: Arc<Timers>,
    pub(crate) copies: Arc<CopyPool>,
    pub(crate) mover: Arc<Mover>,
    pub(crate) stage: Arc<Stage>,
    pub(crate) notifications: Arc<NotificationQueue>,
    pub(crate) storage: Storage,
    regions: RwLock<HashMap<RegionId, Weak<Region>>>,
    windows: Mutex<HashMap<WindowId, Arc<OpenWindow>>>,
    /// Connections made by this agent, by name of the peer.
    pub(super) sessions: Mutex<HashMap<String, Arc<Session>>>,
    /// Peers that are connected when they are first needed, by name.
    pub(super) book: Mutex<HashMap<Arc<str>, Arc<KnownPeer>>>,
    /// Connections that agents of this process made to this one.
    in_process: Mutex<Vec<Weak<Session>>>,
    ids: AtomicU64,
    /// Grows with every region that comes or goes; changed under the lock of `regions`.
    revision: AtomicU64,
    stopped: AtomicBool,
    addresses: Addresses,
    pub(crate) reactors: Arc<Reactors>,
    pub(crate) tls: Option<TlsContext>,
    /// The RDMA device of this agent, where it has the lane.
    pub(crate) rdma: Option<Arc<Adapter>>,
    /// Connections that peers made to this agent, by nonce.
    incoming: Mutex<HashMap<u64, Weak<Incoming>>>,
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core")
            .field("name", &self.name)
            .field("epoch", &self.epoch)
            .finish_non_exhaustive()
    }
}

/// Agents of this process, for the loopback lane.
static IN_PROCESS: LazyLock<Mutex<HashMap<u64, Weak<Core>>>> = LazyLock::new(Mutex::default);

/// The agent of this process with that epoch.
pub(crate) fn find_in_process(epoch: u64) -> Option<Arc<Core>> {
    IN_PROCESS.lock().get(&epoch).and_then(Weak::upgrade)
}

impl Core {
    pub(super) fn start(config: AgentConfig) -> Result<Arc<Self>, AgentError> {
        config.validate()?;
        let io = |what: &str, source| AgentError::Io {
            what: what.to_owned(),
            source,
        };
        let tls = config.tls.as_ref().map(TlsContext::new).transpose()?;
        let rdma = config.lanes.contains(&Lane::Verbs);
        let rdma = rdma.then(|| Adapter::open(&config.rdma)).transpose()?;
        let epoch = random_u64().map_err(|e| io("get random bytes", e))?;
        let listeners = Listeners::bind(&config, epoch)?;
        let notifications = NotificationQueue::new(config.notifications_max, config.peers_max)
            .map_err(|e| io("make the notification queue", e))?;
        let notifications = Arc::new(notifications);
        let timers = Timers::start(&config.name).map_err(|e| io("start the timer thread", e))?;
        let copies = CopyPool::start(&config)
            .inspect_err(|_| timers.stop())
            .map_err(|e| io("start a copy thread", e))?;
        let reactors = Reactors::start(config.io_threads, config.io_spin)
            .inspect_err(|_| {
                timers.stop();
                copies.stop();
            })
            .map_err(|e| io("start an i/o thread", e))?;
        let core = Arc::new(Self {
            name: config.name.as_str().into(),
            epoch,
            counters: Arc::default(),
            timers,
            copies,
            mover: Mover::new(&config.cuda),
            stage: Arc::default(),
            notifications,
            storage: Storage::default(),
            regions: RwLock::default(),
            windows: Mutex::default(),
            sessions: Mutex::default(),
            book: Mutex::default(),
            in_process: Mutex::default(),
            ids: AtomicU64::new(1),
            revision: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
            addresses: listeners.addresses.clone(),
            reactors: reactors.clone(),
            tls,
            rdma,
            incoming: Mutex::default(),
            config,
        });
        listeners.serve(&core, &reactors);
        IN_PROCESS.lock().insert(core.epoch, Arc::downgrade(&core));
        tracing::debug!(agent = %core.name, epoch = core.epoch, "agent started");
        Ok(core)
    }

    /// Ends everything that runs for this agent. Called once, when the last handle goes.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        IN_PROCESS.lock().remove(&self.epoch);
        let sessions: Vec<_> = self.sessions.lock().drain().collect();
        for (_, session) in sessions {
            session.lose(LossCause::Disconnected);
        }
        let in_process = std::mem::take(&mut *self.in_process.lock());
        for session in in_process.iter().filter_map(Weak::upgrade) {
            session.lose(LossCause::Closed);
        }
        self.storage.stop();
        self.stage.stop_all();
        self.notifications.stop();
        self.reactors.stop();
        self.copies.stop();
        self.mover.stop_all();
        self.timers.stop();
        tracing::debug!(agent = %self.name, epoch = self.epoch, "agent stopped");
    }

    /// The running kernel, as metadata names it.
    pub(crate) const fn host(&self) -> [u8; 16] {
        self.addresses.host
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Remembers a connection from an agent of this process, to tell it when this one stops.
    pub(crate) fn watch_in_process(&self, session: &Arc<Session>) {
        let mut watched = self.in_process.lock();
        watched.retain(|known| known.strong_count() > 0);
        watched.push(Arc::downgrade(session));
        drop(watched);
        if self.is_stopped() {
            session.lose(LossCause::Closed);
        }
    }

    /// Takes a connection that a peer made into the books; false when there are too many.
    pub(crate) fn add_incoming(&self, incoming: &Arc<Incoming>) -> bool {
        let mut all = self.incoming.lock();
        if all.len() >= self.config.peers_max {
            return false;
        }
        all.insert(incoming.nonce(), Arc::downgrade(incoming));
        true
    }

    pub(crate) fn incoming(&self, nonce: u64) -> Option<Arc<Incoming>> {
        self.incoming.lock().get(&nonce).and_then(Weak::upgrade)
    }

    pub(crate) fn forget_incoming(&self, nonce: u64) {
        self.incoming.lock().remove(&nonce);
    }

    pub(crate) fn next_operation(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    /// A name for a region or window: a part of the epoch and a counter, so that names of other
    /// agents and of other lives are not mistaken for ours.
    pub(crate) fn next_name(&self) -> u64 {
        (self.epoch << 44) | (self.next_operation() & ((1 << 44) - 1))
    }

    pub(super) fn allocate(
        self: &Arc<Self>,
        config: &ArenaConfig,
    ) -> Result<Registration, RegisterError> {
        self.check_regions()?;
        if config.pin.is_some() {
            self.check_cuda(&config.label)?;
        }
        self.add_region(Region::arena(RegionId(self.next_name()), config)?)
    }

    pub(super) fn allocate_device(
        self: &Arc<Self>,
        config: &DeviceArenaConfig,
    ) -> Result<Registration, RegisterError> {
        self.check_regions()?;
        self.check_cuda(&config.label)?;
        self.add_region(Region::device_arena(RegionId(self.next_name()), config)?)
    }

    pub(super) fn register_device(
        self: &Arc<Self>,
        memory: DeviceMemory,
        access: RemoteAccess,
    ) -> Result<Registration, RegisterError> {
        self.check_regions()?;
        self.check_cuda("device")?;
        let id = RegionId(self.next_name());
        self.add_region(Region::device_memory(id, memory, access)?)
    }

    pub(super) fn warm_device(&self, device: u32) -> Result<(), PrepareError> {
        if !self.config.cuda.enabled {
            return Err(CudaUnavailable::Off.into());
        }
        DeviceWork::warm(self, device)
    }

    fn check_cuda(&self, label: &str) -> Result<(), RegisterError> {
        if self.config.cuda.enabled {
            Ok(())
        } else {
            Err(RegisterError::cuda(label, CudaUnavailable::Off))
        }
    }

    pub(super) fn register(
        self: &Arc<Self>,
        memory: HostMemory,
        access: RemoteAccess,
    ) -> Result<Registration, RegisterError> {
        self.check_regions()?;
        self.add_region(Region::host(RegionId(self.next_name()), memory, access)?)
    }

    fn check_regions(&self) -> Result<(), RegisterError> {
        if self.is_stopped() {
            return Err(RegisterError::AgentStopped);
        }
        let limit = self.config.regions_max;
        if self.regions.read().len() >= limit {
            return Err(RegisterError::TooMany { limit });
        }
        Ok(())
    }

    fn add_region(self: &Arc<Self>, region: Region) -> Result<Registration, RegisterError> {
        if let Some(adapter) = &self.rdma {
            region.register_for_rdma(adapter)?;
        }
        let region = Arc::new(region);
        let mut regions = self.regions.write();
        let limit = self.config.regions_max;
        if regions.len() >= limit {
            return Err(RegisterError::TooMany { limit });
        }
        regions.insert(region.id, Arc::downgrade(&region));
        self.revision.fetch_add(1, Ordering::Relaxed);
        drop(regions);
        Ok(Registration::new(region, self.clone()))
    }

    /// A region that peers may ask for.
    pub(crate) fn region(&self, id: RegionId) -> Option<Arc<Region>> {
        let region = self.regions.read().get(&id).and_then(Weak::upgrade)?;
        (!region.released()).then_some(region)
    }

    /// What peers need, with the regions of this moment.
    pub(crate) fn metadata(&self) -> Metadata {
        let known = self.regions.read();
        let revision = self.revision.load(Ordering::Relaxed);
        let regions = known.values().filter_map(Weak::upgrade);
        let mut regions: Vec<_> = regions
            .filter(|region| !region.released() && region.access != RemoteAccess::None)
            .map(|region| RegionInfo::of(&region))
            .collect();
        drop(known);
        regions.sort_unstable_by_key(|region| region.id);
        self.metadata_with(MetadataContent::Complete, revision, regions)
    }

    /// The same with some of the regions only.
    pub(super) fn metadata_of(
        self: &Arc<Self>,
        registrations: &[&Registration],
    ) -> Result<Metadata, MetadataError> {
        let revision = self.revision.load(Ordering::Relaxed);
        let open = |registration: &&Registration| {
            let open = registration.owned_by(Arc::as_ptr(self).cast())
                && registration.access() != RemoteAccess::None;
            if open {
                Ok(RegionInfo::of(registration.region()))
            } else {
                let region = registration.id();
                Err(MetadataError::NotOpen { region })
            }
        };
        let mut regions: Vec<_> = registrations.iter().map(open).collect::<Result<_, _>>()?;
        regions.sort_unstable_by_key(|region| region.id);
        regions.dedup_by_key(|region| region.id);
        Ok(self.metadata_with(MetadataContent::Partial, revision, regions))
    }

    fn metadata_with(
        &self,
        content: MetadataContent,
        revision: u64,
        regions: Vec<RegionInfo>,
    ) -> Metadata {
        Metadata::new(
            self.name.clone(),
            self.epoch,
            self.addresses.clone(),
            content,
            revision,
            regions,
        )
    }

    pub(super) fn open_window(
        self: &Arc<Self>,
        registration: &Registration,
        scope: WindowScope,
        access: WindowAccess,
    ) -> Result<Window, WindowError> {
        if self.is_stopped() {
            return Err(WindowError::AgentStopped);
        }
        let region = registration.id();
        if !registration.owned_by(Arc::as_ptr(self).cast()) {
            return Err(WindowError::ForeignRegistration { region });
        }
        if registration.access() == RemoteAccess::None {
            return Err(WindowError::AccessDenied { region });
        }
        let scope = Scope::new(scope, registration.len() as u64)?;
        let id = WindowId(self.next_name());
        let open = Arc::new(OpenWindow::new(
            id,
            registration.region().clone(),
            scope,
            access,
        ));
        let mut windows = self.windows.lock();
        let limit = self.config.windows_max;
        if windows.len() >= limit {
            return Err(WindowError::TooMany { limit });
        }
        windows.insert(id, open.clone());
        drop(windows);
        Ok(Window {
            open,
            core: Arc::downgrade(self),
        })
    }

    pub(crate) fn window(&self, id: WindowId) -> Option<Arc<OpenWindow>> {
        self.windows.lock().get(&id).cloned()
    }

    pub(crate) fn forget_window(&self, id: WindowId) {
        self.windows.lock().remove(&id);
    }

    /// Queues a notification from a peer; false when the queue is full.
    pub(crate) fn receive(&self, notification: Notification) -> bool {
        let taken = self.notifications.push(notification);
        self.counters.received(taken);
        taken
    }

    pub(super) fn stats(&self) -> AgentStats {
        let sessions = self.sessions();
        let mut stats = self.counters.of_agent();
        let (received, refused) = self.notifications.ring_counts();
        stats.notifications_received = stats.notifications_received.wrapping_add(received);
        stats.notifications_refused = stats.notifications_refused.wrapping_add(refused);
        stats.peers = sessions
            .iter()
            .filter(|session| session.lost().is_none())
            .count();
        stats.regions = self.regions.read().len();
        stats.windows = self.windows.lock().len();
        stats
    }
}

impl RegionOwner for Core {
    fn release(&self, region: &Region) {
        let mut regions = self.regions.write();
        regions.remove(&region.id);
        self.revision.fetch_add(1, Ordering::Relaxed);
        drop(regions);
        self.storage.forget_region(region.id);
        let in_process = self.in_process.lock().clone();
        for session in in_process.iter().filter_map(Weak::upgrade) {
            session.forget_region(region.id);
        }
        let incoming: Vec<_> = self
            .incoming
            .lock()
            .values()
            .filter_map(Weak::upgrade)
            .collect();
        for incoming in incoming {
            incoming.region_gone(region.id);
        }
    }
}

/// A number that nobody else has.
pub(crate) fn random_u64() -> std::io::Result<u64> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u64::from_le_bytes(bytes))
}

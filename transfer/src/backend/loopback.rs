//! The reference backend: the peer is an agent of this process (perhaps the same one).

use std::sync::{Arc, Weak};
use std::time::Instant;

use super::{Backend, LaneFailure, Opened, Refusal};
use crate::agent::{
    Core, DeviceOfPeer, MappedMemory, PeerDeviceMemory, RemoteMemory, RemoteRegion, Session,
    find_in_process,
};
use crate::config::RemoteAccess;
use crate::error::{LossCause, Rejection, TransferError};
use crate::memory::RegionId;
use crate::op::{Notification, TransferState};
use crate::peer::Metadata;
use crate::window::{Grant, GrantSpec, Holder, OpenWindow, WindowId};

#[derive(Debug)]
struct Loopback {
    target: Weak<Core>,
    from: Arc<str>,
    epoch: u64,
}

pub(super) fn open(core: &Arc<Core>, metadata: &Metadata) -> Result<Opened, LaneFailure> {
    let target = find_in_process(metadata.epoch())
        .filter(|target| *target.name == *metadata.name())
        .ok_or_else(|| LaneFailure::Unusable("the peer is not in this process".into()))?;
    let backend = Loopback {
        target: Arc::downgrade(&target),
        from: core.name.clone(),
        epoch: core.epoch,
    };
    let why = if Arc::ptr_eq(&target, core) {
        "the peer is this agent"
    } else {
        "the peer lives in this process"
    };
    Ok((Arc::new(backend), why.to_owned(), 1))
}

impl Loopback {
    fn target(&self) -> Option<Arc<Core>> {
        self.target.upgrade().filter(|target| !target.is_stopped())
    }
}

impl Backend for Loopback {
    fn attach(&self, session: &Arc<Session>) {
        match self.target() {
            Some(target) => target.watch_in_process(session),
            None => session.lose(LossCause::Closed),
        }
    }

    fn region(&self, id: RegionId, _until: Instant) -> Result<RemoteRegion, Refusal> {
        let target = self.target().ok_or(Refusal::Lost)?;
        let region = target.region(id).ok_or(Refusal::Unknown)?;
        if region.access == RemoteAccess::None {
            return Err(Refusal::Denied);
        }
        let (len, access) = (region.len as u64, region.access);
        let memory = match region.device().map(|range| range.device.info) {
            Some(owner) => RemoteMemory::Device(DeviceOfPeer {
                owner,
                pull: target.config.cuda.peers_pull,
                memory: PeerDeviceMemory::InProcess(region),
                usage: None,
            }),
            None => RemoteMemory::Mapped(MappedMemory::InProcess(region)),
        };
        Ok(RemoteRegion::new(id, len, access, memory))
    }

    fn window(
        &self,
        session: &Arc<Session>,
        id: WindowId,
        _until: Instant,
    ) -> Result<Arc<Grant>, Refusal> {
        let target = self.target().ok_or(Refusal::Lost)?;
        let open = target.window(id).ok_or(Refusal::Unknown)?;
        let spec = GrantSpec {
            region: open.region.id,
            scope: open.scope.clone(),
            access: open.access,
        };
        let key = session.key();
        let told = open.clone();
        let grant = session.install_grant(id, spec, Box::new(move || told.acknowledge(key)));
        let holder: Weak<dyn Holder> = Arc::<Session>::downgrade(session);
        if !open.add_holder(key, holder, true) {
            session.revoke(id);
            return Err(Refusal::Unknown);
        }
        if session.lost().is_some() {
            open.acknowledge(key);
            return Err(Refusal::Lost);
        }
        Ok(grant)
    }

    fn start(&self, transfer: &Arc<TransferState>) {
        transfer.start_here();
    }

    fn stop(&self, transfer: &Arc<TransferState>) {
        transfer.stop_here();
    }

    fn notify(&self, transfer: &Arc<TransferState>) -> Option<Result<(), TransferError>> {
        let rejected = |rejection| Some(Err(TransferError::Rejected(rejection)));
        let Some(target) = self.target() else {
            return rejected(Rejection::Stopping);
        };
        let Some(payload) = transfer.notification.clone() else {
            return Some(Ok(()));
        };
        if payload.len() > target.config.notification_bytes_max {
            return rejected(Rejection::NotificationTooLarge);
        }
        let notification = Notification {
            from: self.from.clone(),
            epoch: self.epoch,
            payload,
        };
        if target.receive(notification) {
            Some(Ok(()))
        } else {
            rejected(Rejection::NotificationQueueFull)
        }
    }

    fn abandon(&self) {}

    fn close(&self) {}
}

impl Holder for Session {
    fn revoke(&self, window: &Arc<OpenWindow>) {
        Self::revoke(self, window.id);
    }
}

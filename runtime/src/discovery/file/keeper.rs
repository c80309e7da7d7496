//! The thread of a store: keeps leases alive, looks at the directory, tells watchers.

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant, SystemTime},
};

use super::{
    ChangeDetection, Registration, Shared, Status, WatchReply,
    directory::{Directory, Fault},
    notify::{DirectoryNotify, wait},
    view::{Holder, Now, View},
};
use crate::discovery::{InstanceKey, Watchers};

/// Changes that come within this time are looked at together.
const SETTLE: Duration = Duration::from_millis(10);

#[derive(Debug)]
pub(super) struct Keeper {
    shared: Arc<Shared>,
    directory: Directory,
    notify: Option<DirectoryNotify>,
    view: View,
    watchers: Watchers,
    registrations: BTreeMap<InstanceKey, Arc<Registration>>,
    next_keep_alive: Instant,
    last_look: Instant,
    /// The fault that was logged and has not ended.
    fault: Option<&'static str>,
}

impl Keeper {
    pub(super) fn new(shared: Arc<Shared>, directory: Directory) -> Self {
        let notify = match shared.config.change_detection {
            ChangeDetection::Poll => None,
            ChangeDetection::Auto => DirectoryNotify::new()
                .inspect_err(|error| {
                    tracing::warn!(
                        %error,
                        every = ?shared.config.poll_interval,
                        "no inotify; the discovery store is polled"
                    );
                })
                .ok(),
        };
        let view = View::new(shared.config.lease_ttl);
        Self {
            shared,
            directory,
            notify,
            view,
            watchers: Watchers::default(),
            registrations: BTreeMap::new(),
            next_keep_alive: Instant::now(),
            last_look: Instant::now(),
            fault: None,
        }
    }

    /// Works until nobody needs the store.
    pub(super) fn run(mut self) {
        loop {
            let (new_watches, stop) = self.take_requests();
            self.revoke();
            if stop {
                return;
            }
            // Started before the look, so that no change falls between.
            let notified = self.follow_directory();
            self.keep_alive();
            let looked = self.look();
            self.tell(new_watches, &looked);
            let timeout = self.timeout(notified && looked.is_ok());
            let changed = wait(&self.shared.wake, self.notify.as_mut(), timeout);
            if changed {
                wait(&self.shared.wake, None, Some(SETTLE));
                // What came meanwhile is part of the coming look.
                wait(
                    &self.shared.wake,
                    self.notify.as_mut(),
                    Some(Duration::ZERO),
                );
            }
        }
    }

    fn take_requests(&mut self) -> (Vec<(String, WatchReply)>, bool) {
        let mut state = self.shared.state.lock();
        let new_registrations = std::mem::take(&mut state.new_registrations);
        let new_watches = std::mem::take(&mut state.new_watches);
        let stop = state.stop;
        drop(state);
        for registration in new_registrations {
            self.write_new(registration);
        }
        (new_watches, stop)
    }

    fn write_new(&mut self, registration: Arc<Registration>) {
        match self.directory.write(&registration.record) {
            Ok(()) => {
                registration.status.send_replace(Status::Active);
                let key = registration.record.instance.key();
                if let Some(earlier) = self.registrations.insert(key, registration) {
                    earlier.status.send_replace(Status::Revoked);
                }
            }
            Err(fault) => {
                registration.status.send_replace(Status::Failed(fault));
            }
        }
    }

    fn revoke(&mut self) {
        let directory = &self.directory;
        self.registrations.retain(|_, registration| {
            if !registration.revoke.load(Ordering::Acquire) {
                return true;
            }
            let status = match directory.leave(&registration.record) {
                Ok(()) => Status::Revoked,
                Err(fault) => Status::Failed(fault),
            };
            registration.status.send_replace(status);
            false
        });
    }

    /// Makes sure that changes are reported; returns whether they are.
    fn follow_directory(&mut self) -> bool {
        let identity = self.directory.identity();
        self.notify
            .as_mut()
            .is_some_and(|notify| notify.follow(self.directory.path(), identity))
    }

    fn keep_alive(&mut self) {
        let now = Instant::now();
        if now < self.next_keep_alive {
            return;
        }
        self.next_keep_alive = now + self.shared.config.lease_ttl / 3;
        for registration in self.registrations.values() {
            if let Err(fault) = self.directory.keep_alive(&registration.record) {
                self.began(&fault);
                return;
            }
        }
    }

    /// Looks at the directory, writes own files that are missing, and lets leases expire.
    fn look(&mut self) -> Result<(), Fault> {
        let looked = self.try_look();
        let now = Instant::now();
        match &looked {
            Ok(()) => {
                // A disk that hung, or this process being stopped, also kept renewals from us.
                let missed_renewals = now.saturating_duration_since(self.last_look)
                    > self.shared.config.lease_ttl / 2;
                self.last_look = now;
                let repaired = self.fault.take();
                if let Some(action) = repaired {
                    tracing::info!(
                        path = %self.directory.path().display(),
                        action,
                        "the discovery store works again"
                    );
                }
                if missed_renewals || repaired.is_some() {
                    self.view.renew_all(now);
                }
                for key in self.view.expire(now) {
                    tracing::info!(worker = %key.0, endpoint = %key.1, "its lease has expired");
                }
                for name in self.view.stale_files(now) {
                    self.directory.clean(&name);
                }
            }
            Err(fault) => self.began(fault),
        }
        looked
    }

    fn try_look(&mut self) -> Result<(), Fault> {
        let entries = match self.directory.list() {
            Err(fault) if fault.kind == ErrorKind::NotFound && !self.registrations.is_empty() => {
                tracing::warn!(
                    path = %self.directory.path().display(),
                    "the directory of the discovery store was removed; writing it again"
                );
                for registration in self.registrations.values() {
                    self.directory.write(&registration.record)?;
                }
                self.directory.list()?
            }
            listed => listed?,
        };
        let directory = &self.directory;
        let now = Now {
            instant: Instant::now(),
            system: SystemTime::now(),
        };
        self.view.look(entries, now, &mut |name| {
            directory.read(name).map_err(|error| error.to_string())
        });
        self.yield_to_others();
        for registration in self.registrations.values() {
            if self.view.holder(&registration.record) == Holder::Nobody {
                self.directory.write(&registration.record)?;
            }
        }
        // A store that cannot be written keeps workers from renewing; then nothing expires.
        if self.view.has_expired(now.instant) || self.fault.is_some() {
            self.directory.check_writable()?;
        }
        Ok(())
    }

    /// Gives up registrations that another process has replaced; two that insist would never end.
    fn yield_to_others(&mut self) {
        let view = &self.view;
        self.registrations.retain(|_, registration| {
            let replaced = view.holder(&registration.record) == Holder::Another;
            if replaced {
                tracing::warn!(
                    file = registration.record.alive_name(),
                    "another process has registered under the same name; giving way to it"
                );
                registration.status.send_replace(Status::Revoked);
            }
            !replaced
        });
    }

    fn began(&mut self, fault: &Fault) {
        if self.fault.is_none() {
            tracing::warn!(
                path = %self.directory.path().display(),
                action = fault.action,
                reason = fault.text,
                "the discovery store has a fault; what is known stays, and it will be tried again"
            );
            self.fault = Some(fault.action);
        }
    }

    /// Answers new watchers and tells the others what has changed.
    fn tell(&mut self, new_watches: Vec<(String, WatchReply)>, looked: &Result<(), Fault>) {
        let mut instances = self.view.instances();
        // Own instances are known without the store.
        for (key, registration) in &self.registrations {
            instances.insert(key.clone(), registration.record.instance.clone());
        }
        for (namespace, reply) in new_watches {
            let answer = match looked {
                Ok(()) => Ok(self.watchers.subscribe(&namespace, &instances)),
                Err(fault) => Err(fault.clone()),
            };
            // The caller may have given up.
            let _gone = reply.send(answer);
        }
        self.watchers.publish(&instances);
    }

    /// How long nothing needs to be done unless something happens; `None` is for ever.
    fn timeout(&self, notified: bool) -> Option<Duration> {
        if self.registrations.is_empty() && self.watchers.is_empty() {
            return None;
        }
        let now = Instant::now();
        let config = &self.shared.config;
        let look = if notified {
            // Renewals must be seen before the leases seem to end.
            config.lease_ttl / 4
        } else {
            config.poll_interval
        };
        let expiry = self
            .view
            .next_expiry()
            .map(|until| until.saturating_duration_since(now));
        let keep_alive = self.next_keep_alive.saturating_duration_since(now);
        [
            Some(look),
            Some(keep_alive),
            expiry.filter(|_| self.fault.is_none()),
        ]
        .into_iter()
        .flatten()
        .min()
        .map(|timeout| timeout.max(Duration::from_millis(1)))
    }
}

//! Finding agents: their metadata from themselves or from a store.

use std::time::Duration;

use super::{Agent, Peer};
use crate::backend::{AskFailure, ask};
use crate::clock::after;
use crate::config::ConnectOptions;
use crate::error::{ConnectError, FetchError, LookupError, MetadataError};
use crate::memory::Registration;
use crate::peer::{Metadata, MetadataStore, StoreError};
use crate::wire::HandshakeFailure;

/// Keys of agents in a store: this and the name.
const PREFIX: &str = "blockplane/agents/";

fn key_of(name: &str) -> String {
    format!("{PREFIX}{name}")
}

impl Agent {
    /// What a peer needs to connect: name, epoch, addresses, and the regions of this moment.
    /// Regions that are registered later can be named by peers as well.
    #[must_use]
    pub fn metadata(&self) -> Metadata {
        self.core().metadata()
    }

    /// [`Agent::metadata`] with some of the regions only.
    ///
    /// # Errors
    /// A registration is of another agent, or closed to peers.
    pub fn metadata_of(&self, registrations: &[&Registration]) -> Result<Metadata, MetadataError> {
        self.core().metadata_of(registrations)
    }

    /// What changed since `base`, which a peer has: small, for [`Metadata::apply`].
    ///
    /// # Errors
    /// `base` is not complete metadata of this life of this agent.
    pub fn metadata_delta(&self, base: &Metadata) -> Result<Metadata, MetadataError> {
        self.metadata().delta_since(base)
    }

    /// Asks an agent for its metadata where it listens: `host:port`, or the path of its Unix socket
    /// (with or without `unix:` in front).
    ///
    /// # Errors
    /// Nobody answers within `timeout`, the agent does not serve its metadata
    /// ([`AgentConfig::serve_metadata`](crate::AgentConfig::serve_metadata)), or what answers is
    /// something else.
    pub fn fetch_metadata(&self, address: &str, timeout: Duration) -> Result<Metadata, FetchError> {
        if self.core().is_stopped() {
            return Err(FetchError::AgentStopped);
        }
        let here = || address.to_owned();
        let blob = ask(self.core(), address, after(timeout)).map_err(|failure| match failure {
            AskFailure::Unreachable(reason) => FetchError::Unreachable {
                address: here(),
                reason,
            },
            AskFailure::Handshake(HandshakeFailure::Refused(_)) => {
                FetchError::Refused { address: here() }
            }
            AskFailure::Handshake(
                failure @ (HandshakeFailure::Tls(_)
                | HandshakeFailure::TlsRequired
                | HandshakeFailure::PlaintextPeer),
            ) => FetchError::Unreachable {
                address: here(),
                reason: failure.to_string(),
            },
            AskFailure::Handshake(HandshakeFailure::Io(source)) => FetchError::Io {
                address: here(),
                source,
            },
            AskFailure::Handshake(HandshakeFailure::Malformed | HandshakeFailure::Stale) => {
                FetchError::Malformed { address: here() }
            }
        })?;
        Metadata::from_bytes(&blob).map_err(|source| FetchError::Metadata {
            address: here(),
            source,
        })
    }

    /// Puts this agent's metadata of this moment into a store, under its name. Publish again before
    /// `ttl` is over, and when regions that peers are to learn from the store come or go.
    ///
    /// # Errors
    /// The store failed.
    pub fn publish(
        &self,
        store: &dyn MetadataStore,
        ttl: Option<Duration>,
    ) -> Result<(), StoreError> {
        store.put(&key_of(self.name()), &self.metadata().to_bytes(), ttl)
    }

    /// Takes this agent out of a store; false when another life of it, or nobody, is there.
    ///
    /// # Errors
    /// The store failed.
    pub fn withdraw(&self, store: &dyn MetadataStore) -> Result<bool, StoreError> {
        let key = key_of(self.name());
        let ours = store
            .get(&key)?
            .and_then(|blob| Metadata::from_bytes(&blob).ok())
            .is_some_and(|metadata| metadata.epoch() == self.epoch());
        Ok(ours && store.delete(&key)?)
    }

    /// Names of all agents in a store, sorted.
    ///
    /// # Errors
    /// The store failed.
    pub fn published(store: &dyn MetadataStore) -> Result<Vec<String>, StoreError> {
        let keys = store.list(PREFIX)?.into_iter();
        Ok(keys
            .filter_map(|key| key.strip_prefix(PREFIX).map(str::to_owned))
            .collect())
    }

    /// Connects to an agent that is in a store. When the entry turns out to be of an earlier life,
    /// it is read once more: the agent may just have published itself again.
    ///
    /// # Errors
    /// The agent is not in the store, its entry is damaged or of an earlier life, or no lane works
    /// within `timeout` (the store has its own bounds).
    pub fn connect_by_name(
        &self,
        store: &dyn MetadataStore,
        name: &str,
        timeout: Duration,
    ) -> Result<Peer, LookupError> {
        let until = after(timeout);
        let first = look_up(store, name)?;
        match self.connect(&first, timeout) {
            Ok(peer) => Ok(peer),
            Err(stale @ ConnectError::Stale { .. }) => {
                let second = look_up(store, name)?;
                if second.epoch() == first.epoch() {
                    return Err(stale.into());
                }
                let left = until.saturating_duration_since(std::time::Instant::now());
                Ok(self.connect_with(&second, &ConnectOptions::within(left))?)
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn look_up(store: &dyn MetadataStore, name: &str) -> Result<Metadata, LookupError> {
    let damaged = |source| LookupError::Metadata {
        name: name.to_owned(),
        source,
    };
    let blob = store
        .get(&key_of(name))?
        .ok_or_else(|| LookupError::NotFound {
            name: name.to_owned(),
        })?;
    let metadata = Metadata::from_bytes(&blob).map_err(damaged)?;
    if metadata.name() == name {
        Ok(metadata)
    } else {
        Err(damaged(MetadataError::OtherAgent {
            got: metadata.name().to_owned(),
            accepted: name.to_owned(),
        }))
    }
}

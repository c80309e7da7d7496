//! Readiness as a set of named conditions: ready when all of them are met.

use std::{collections::BTreeMap, fmt, sync::Arc};

use tokio::sync::watch;

/// Whether a request would be served now, and if not, why. Clones share the state.
#[derive(Clone)]
pub struct Readiness {
    conditions: Arc<watch::Sender<BTreeMap<String, Option<String>>>>,
}

/// What [`Readiness`] says at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadinessState {
    /// Every condition is met.
    Ready,
    /// These conditions are not met, each with the reason.
    NotReady(BTreeMap<String, String>),
}

impl ReadinessState {
    /// Whether every condition is met.
    #[must_use]
    pub const fn is_ready(&self) -> bool {
        matches!(self, Self::Ready)
    }
}

impl fmt::Display for ReadinessState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready => f.write_str("ready"),
            Self::NotReady(reasons) => {
                f.write_str("not ready: ")?;
                for (index, (name, reason)) in reasons.iter().enumerate() {
                    let separator = if index == 0 { "" } else { "; " };
                    write!(f, "{separator}{name}: {reason}")?;
                }
                Ok(())
            }
        }
    }
}

impl Readiness {
    /// Without conditions: ready.
    #[must_use]
    pub fn new() -> Self {
        Self {
            conditions: Arc::new(watch::Sender::new(BTreeMap::new())),
        }
    }

    /// Adds a condition that is not met yet, for this reason. It counts until its handle is dropped.
    #[must_use = "dropping the condition removes it"]
    pub fn condition(&self, name: &str, reason: &str) -> Condition {
        let condition = Condition {
            name: name.to_owned(),
            conditions: Arc::clone(&self.conditions),
        };
        condition.unmet(reason);
        condition
    }

    /// What holds now.
    #[must_use]
    pub fn state(&self) -> ReadinessState {
        state_of(&self.conditions.borrow())
    }

    /// Waits until every condition is met. Give it a deadline.
    pub async fn ready(&self) {
        let mut receiver = self.conditions.subscribe();
        // The sender is held by `self`, so that the wait ends only by readiness.
        let _state = receiver
            .wait_for(|conditions| state_of(conditions).is_ready())
            .await;
    }

    /// Waits for the state to differ from `seen` and returns it.
    pub async fn changed_from(&self, seen: &ReadinessState) -> ReadinessState {
        let mut receiver = self.conditions.subscribe();
        receiver
            .wait_for(|conditions| state_of(conditions) != *seen)
            .await
            .map_or_else(|_closed| self.state(), |conditions| state_of(&conditions))
    }
}

impl Default for Readiness {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Readiness").field(&self.state()).finish()
    }
}

fn state_of(conditions: &BTreeMap<String, Option<String>>) -> ReadinessState {
    let unmet: BTreeMap<String, String> = conditions
        .iter()
        .filter_map(|(name, reason)| Some((name.clone(), reason.clone()?)))
        .collect();
    if unmet.is_empty() {
        ReadinessState::Ready
    } else {
        ReadinessState::NotReady(unmet)
    }
}

/// One condition of a [`Readiness`].
pub struct Condition {
    name: String,
    conditions: Arc<watch::Sender<BTreeMap<String, Option<String>>>>,
}

impl Condition {
    /// It is met.
    pub fn met(&self) {
        self.set(None);
    }

    /// It is not met.
    pub fn unmet(&self, reason: &str) {
        self.set(Some(reason.to_owned()));
    }

    fn set(&self, reason: Option<String>) {
        self.conditions.send_if_modified(|conditions| {
            let before = conditions.insert(self.name.clone(), reason.clone());
            before != Some(reason)
        });
    }
}

impl Drop for Condition {
    fn drop(&mut self) {
        self.conditions.send_modify(|conditions| {
            conditions.remove(&self.name);
        });
    }
}

impl fmt::Debug for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Condition").field(&self.name).finish()
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn ready_means_every_condition_is_met() {
        let readiness = Readiness::new();
        assert!(readiness.state().is_ready());
        let model = readiness.condition("model", "loading");
        let workers = readiness.condition("workers", "none found");
        assert_eq!(
            readiness.state().to_string(),
            "not ready: model: loading; workers: none found"
        );
        model.met();
        assert!(readiness.ready().now_or_never().is_none());
        workers.met();
        readiness.ready().await;
        workers.unmet("all left");
        assert_eq!(
            readiness
                .changed_from(&ReadinessState::Ready)
                .await
                .to_string(),
            "not ready: workers: all left"
        );
        drop(workers);
        assert!(readiness.state().is_ready());
    }
}

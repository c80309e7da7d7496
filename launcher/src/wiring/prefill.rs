//! A decode worker's way to the prefill workers: discovery says who they are, RPC carries the jobs.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use blockplane_engine::RemotePrefill;
use blockplane_protocol::{
    DpRank, ErrorKind, GenerateError, PrefillHint, PrefillJob, PrefillReply, WorkerId, WorkerRole,
    codec,
};
use blockplane_runtime::{
    discovery::{InstanceWatch, Instances},
    rpc::{CallOptions, RpcClient},
};
use bytes::Bytes;
use futures::{FutureExt, future::BoxFuture};
use parking_lot::RwLock;

use super::descriptor::{PREFILL, WorkerDescriptor};

/// The prefill workers of one model.
#[derive(Debug)]
pub(crate) struct RpcPrefill {
    client: RpcClient,
    workers: Arc<RwLock<BTreeMap<WorkerId, Known>>>,
    turn: AtomicUsize,
}

#[derive(Clone, Debug)]
struct Known {
    address: String,
    ranks: u32,
}

impl RpcPrefill {
    /// Follows the prefill workers of `model` for as long as the discovery store works.
    pub(crate) fn start(client: RpcClient, mut watch: InstanceWatch, model: String) -> Arc<Self> {
        let workers = Arc::new(RwLock::new(prefill_workers(&watch.current(), &model)));
        let followed = Arc::downgrade(&workers);
        tokio::spawn(async move {
            while let Ok(instances) = watch.changed().await {
                let Some(workers) = followed.upgrade() else {
                    return;
                };
                *workers.write() = prefill_workers(&instances, &model);
            }
        });
        Arc::new(Self {
            client,
            workers,
            turn: AtomicUsize::new(0),
        })
    }

    /// The first hint that is still there, else any worker in turn.
    fn pick(&self, hints: &[PrefillHint]) -> Option<(String, DpRank)> {
        let workers = self.workers.read();
        for hint in hints {
            if let Some(known) = workers.get(&hint.worker)
                && hint.rank.0 < known.ranks
            {
                return Some((known.address.clone(), hint.rank));
            }
        }
        if workers.is_empty() {
            return None;
        }
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let known = workers.values().nth(turn % workers.len())?;
        let rank = (turn / workers.len()) % known.ranks.max(1) as usize;
        Some((
            known.address.clone(),
            DpRank(u32::try_from(rank).unwrap_or(0)),
        ))
    }
}

impl RemotePrefill for RpcPrefill {
    fn available(&self) -> bool {
        !self.workers.read().is_empty()
    }

    fn prefill(
        &self,
        hints: Vec<PrefillHint>,
        mut job: PrefillJob,
    ) -> BoxFuture<'static, Result<PrefillReply, GenerateError>> {
        let Some((address, rank)) = self.pick(&hints) else {
            let error =
                GenerateError::new(ErrorKind::Unavailable, "no prefill worker is registered");
            return async { Err(error) }.boxed();
        };
        job.request.route.rank = rank;
        let options = CallOptions::new(Duration::from_millis(job.request.deadline_ms))
            .request_id(job.request.request_id.clone());
        let client = self.client.clone();
        async move {
            let payload = Bytes::from(codec::encode(&job));
            let reply = client
                .call_unary(&address, PREFILL, payload, options)
                .await?;
            codec::decode(&reply).map_err(|error| {
                let message = format!("prefill worker at {address}: {error}");
                GenerateError::new(ErrorKind::Internal, message)
            })
        }
        .boxed()
    }
}

fn prefill_workers(instances: &Instances, model: &str) -> BTreeMap<WorkerId, Known> {
    instances
        .values()
        .filter_map(|instance| {
            // A worker that does not describe itself is reported by the frontend.
            let card = WorkerDescriptor::of(instance).ok()?.card;
            (card.role == WorkerRole::Prefill && card.name == model).then(|| {
                (
                    instance.id,
                    Known {
                        address: instance.address.clone(),
                        ranks: card.dp_size,
                    },
                )
            })
        })
        .collect()
}

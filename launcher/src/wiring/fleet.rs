//! The workers a frontend knows: found by discovery, followed by their feeds, known to a router.
//!
//! A worker is routed to while its feed is connected. So a worker that dies is dropped when its
//! connection breaks, one that is stopped when it misses its pings, and losing the discovery store
//! changes nothing for the workers that run.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use blockplane_protocol::{
    DpRank, KvEvent, LoadReport, ModelCard, SequenceHash, StoredBlock, Tier, WorkerId, WorkerRank,
    WorkerRole, feed::SnapshotBlock,
};
use blockplane_router::{Applied, RankInfo, Router, RouterConfig};
use blockplane_runtime::{
    discovery::{Instance, InstanceWatch, Instances},
    events::{FeedConfig, FeedSubscriber, FeedUpdate},
    rpc::RpcClient,
};
use parking_lot::{Mutex, RwLock};
use tokio::{sync::watch, task::JoinHandle};

use super::descriptor::{FEED, GENERATE, WorkerDescriptor};

/// All workers of a namespace.
#[derive(Debug)]
pub(crate) struct Fleet {
    shared: Arc<Shared>,
    follower: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    client: RpcClient,
    router_config: RouterConfig,
    origin: Instant,
    models: RwLock<BTreeMap<String, Arc<ModelGroup>>>,
    members: RwLock<BTreeMap<WorkerId, Arc<Member>>>,
    /// Counts changes of what can be served.
    changes: watch::Sender<u64>,
}

/// The workers of one model, and the router over them.
#[derive(Debug)]
pub(crate) struct ModelGroup {
    pub(crate) card: Arc<ModelCard>,
    pub(crate) router: Router,
    /// Workers that can be routed to.
    routable: Mutex<BTreeMap<WorkerId, WorkerRole>>,
}

/// One worker.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) id: WorkerId,
    pub(crate) address: String,
    pub(crate) descriptor: WorkerDescriptor,
    state: Mutex<MemberState>,
    loads: Mutex<BTreeMap<DpRank, LoadReport>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum MemberState {
    Connecting,
    Ready,
    Lost(String),
    Refused(String),
}

impl Fleet {
    /// Follows the workers that `watch` shows.
    pub(crate) fn start(
        client: RpcClient,
        watch: InstanceWatch,
        router_config: RouterConfig,
    ) -> Self {
        let shared = Arc::new(Shared {
            client,
            router_config,
            origin: Instant::now(),
            models: RwLock::default(),
            members: RwLock::default(),
            changes: watch::Sender::new(0),
        });
        let follower = tokio::spawn(Arc::clone(&shared).follow(watch));
        Self { shared, follower }
    }

    /// The group that serves `model`.
    pub(crate) fn model(&self, model: &str) -> Option<Arc<ModelGroup>> {
        self.shared.models.read().get(model).cloned()
    }

    /// Cards of the models that can be served now.
    pub(crate) fn models(&self) -> Vec<Arc<ModelCard>> {
        let models = self.shared.models.read();
        models
            .values()
            .filter(|group| group.can_generate())
            .map(|group| Arc::clone(&group.card))
            .collect()
    }

    /// Every worker that discovery shows.
    pub(crate) fn members(&self) -> Vec<Arc<Member>> {
        self.shared.members.read().values().cloned().collect()
    }

    /// The RPC address of a worker.
    pub(crate) fn address(&self, worker: WorkerId) -> Option<String> {
        Some(self.shared.members.read().get(&worker)?.address.clone())
    }

    /// Time on the router's clock.
    pub(crate) fn now(&self) -> Duration {
        self.shared.now()
    }

    /// Changes each time that what can be served may have changed.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }

    pub(crate) fn client(&self) -> &RpcClient {
        &self.shared.client
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

impl ModelGroup {
    fn can_generate(&self) -> bool {
        self.routable
            .lock()
            .values()
            .any(|role| *role != WorkerRole::Prefill)
    }
}

impl Member {
    pub(crate) fn state(&self) -> MemberState {
        self.state.lock().clone()
    }

    pub(crate) fn loads(&self) -> Vec<LoadReport> {
        self.loads.lock().values().copied().collect()
    }
}

impl Shared {
    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    async fn follow(self: Arc<Self>, mut watch: InstanceWatch) {
        let mut tasks: BTreeMap<WorkerId, (Instance, AbortOnDrop)> = BTreeMap::new();
        let mut reported = BTreeSet::new();
        let mut instances = watch.current();
        loop {
            self.reconcile(&instances, &mut tasks, &mut reported);
            match watch.changed().await {
                Ok(now) => instances = now,
                Err(error) => {
                    tracing::warn!(%error, "workers that start from now on will not be found");
                    // The known ones go on being served.
                    return std::future::pending().await;
                }
            }
        }
    }

    fn reconcile(
        self: &Arc<Self>,
        instances: &Instances,
        tasks: &mut BTreeMap<WorkerId, (Instance, AbortOnDrop)>,
        reported: &mut BTreeSet<WorkerId>,
    ) {
        let workers: BTreeMap<WorkerId, &Instance> = instances
            .values()
            .filter(|instance| instance.endpoint.endpoint() == GENERATE)
            .map(|instance| (instance.id, instance))
            .collect();
        tasks.retain(|id, (known, _)| {
            let stays = workers.get(id).is_some_and(|instance| *instance == known);
            if !stays {
                tracing::info!(worker = %id, "worker left");
            }
            stays
        });
        self.members.write().retain(|id, _| tasks.contains_key(id));
        reported.retain(|id| workers.contains_key(id));
        for (id, instance) in workers {
            if tasks.contains_key(&id) {
                continue;
            }
            match WorkerDescriptor::of(instance) {
                Ok(descriptor) => {
                    let member = Arc::new(Member {
                        id,
                        address: instance.address.clone(),
                        descriptor,
                        state: Mutex::new(MemberState::Connecting),
                        loads: Mutex::default(),
                    });
                    self.members.write().insert(id, Arc::clone(&member));
                    let task = tokio::spawn(Arc::clone(self).follow_worker(member));
                    tasks.insert(id, (instance.clone(), AbortOnDrop(task)));
                }
                Err(error) if reported.insert(id) => {
                    tracing::warn!(worker = %id, "worker is not used: {error:#}");
                }
                Err(_) => {}
            }
        }
        self.changed();
    }

    /// Keeps one worker's feed connected until the task is aborted.
    async fn follow_worker(self: Arc<Self>, member: Arc<Member>) {
        let group = match self.join(&member) {
            Ok(group) => group,
            Err(reason) => {
                tracing::warn!(worker = %member.id, name = member.descriptor.name, reason, "worker is not used");
                *member.state.lock() = MemberState::Refused(reason);
                return;
            }
        };
        let mut feed = FeedSubscriber::new(
            self.client.clone(),
            &member.address,
            FEED,
            member.id,
            FeedConfig::default(),
        );
        loop {
            let reason = self.route_to(&group, &member, &mut feed).await;
            tracing::info!(worker = %member.id, name = member.descriptor.name, reason, "worker is out of reach");
            *member.state.lock() = MemberState::Lost(reason);
            self.changed();
            // The router has forgotten it: the next connection starts with a snapshot.
            for rank in 0..member.descriptor.card.dp_size {
                feed.resync(DpRank(rank));
            }
        }
    }

    /// Routes to a worker from the first word of its feed until the feed is lost; says why it was.
    async fn route_to(
        &self,
        group: &ModelGroup,
        member: &Member,
        feed: &mut FeedSubscriber,
    ) -> String {
        let mut routable = None;
        loop {
            let update = feed.next().await;
            if let FeedUpdate::Lost { reason, .. } = update {
                return reason;
            }
            let routable = routable.get_or_insert_with(|| Routable::admit(self, group, member));
            match update {
                FeedUpdate::Snapshot {
                    rank,
                    last_event_id,
                    blocks,
                } => {
                    routable.load_snapshot(rank, last_event_id, &blocks);
                }
                FeedUpdate::Events(events) => {
                    if let Some(first) = events.first()
                        && !routable.apply_events(&events)
                    {
                        feed.resync(first.rank);
                    }
                }
                FeedUpdate::Load(loads) => routable.report_load(loads),
                FeedUpdate::Fault(fault) => {
                    tracing::warn!(worker = %member.id, ?fault, "KV events were missed");
                }
                FeedUpdate::Lost { .. } => unreachable!("returned above"),
            }
        }
    }

    /// The group of the member's model, made if this is its first worker.
    fn join(&self, member: &Member) -> Result<Arc<ModelGroup>, String> {
        let card = &member.descriptor.card;
        let mut models = self.models.write();
        if let Some(group) = models.get(&card.name) {
            let same = group.card.kv_layout.exchangeable_with(&card.kv_layout);
            let idle = group.routable.lock().is_empty();
            if same {
                return Ok(Arc::clone(group));
            }
            if !idle {
                return Err(format!(
                    "it serves model {} with another KV layout than the workers that are here \
                     ({} tokens per block, {} layers; here {} and {})",
                    card.name,
                    card.kv_layout.block_tokens,
                    card.kv_layout.layers,
                    group.card.kv_layout.block_tokens,
                    group.card.kv_layout.layers,
                ));
            }
        }
        let block_tokens = card.kv_layout.block_tokens;
        let config = RouterConfig {
            block_tokens,
            ..self.router_config.clone()
        };
        let router = Router::new(config).map_err(|error| error.to_string())?;
        let group = Arc::new(ModelGroup {
            card: Arc::new(card.clone()),
            router,
            routable: Mutex::default(),
        });
        models.insert(card.name.clone(), Arc::clone(&group));
        Ok(group)
    }
}

/// A worker while its feed is followed; dropping this takes it out of the router.
struct Routable<'a> {
    shared: &'a Shared,
    group: &'a ModelGroup,
    member: &'a Member,
}

impl<'a> Routable<'a> {
    fn admit(shared: &'a Shared, group: &'a ModelGroup, member: &'a Member) -> Self {
        let card = &member.descriptor.card;
        let info = RankInfo {
            dp_size: card.dp_size,
            blocks: card.blocks,
        };
        group.router.add_worker(member.id, card.role, info);
        group.routable.lock().insert(member.id, card.role);
        *member.state.lock() = MemberState::Ready;
        tracing::info!(
            worker = %member.id,
            name = member.descriptor.name,
            role = card.role.as_str(),
            address = member.address,
            "worker joined"
        );
        shared.changed();
        Self {
            shared,
            group,
            member,
        }
    }

    fn apply_events(&self, events: &[KvEvent]) -> bool {
        events.iter().all(|event| {
            let applied = self.group.router.apply_event(self.member.id, event);
            !matches!(applied, Some(Applied::Gap { .. }))
        })
    }

    fn report_load(&self, loads: Vec<LoadReport>) {
        let now = self.shared.now();
        for load in loads {
            self.group.router.report_load(self.member.id, load, now);
            self.member.loads.lock().insert(load.rank, load);
        }
    }

    fn load_snapshot(&self, rank: DpRank, last_event_id: u64, blocks: &[SnapshotBlock]) {
        let rank = WorkerRank {
            worker: self.member.id,
            rank,
        };
        let blocks: Vec<(Option<SequenceHash>, StoredBlock)> = blocks
            .iter()
            .filter(|block| block.tier == Tier::Device)
            .map(|block| (block.parent, block.block))
            .collect();
        self.group
            .router
            .load_snapshot(rank, last_event_id, Tier::Device, &blocks);
    }
}

impl Drop for Routable<'_> {
    fn drop(&mut self) {
        self.group.router.remove_worker(self.member.id);
        self.group.routable.lock().remove(&self.member.id);
        self.shared.changed();
    }
}

#[derive(Debug)]
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

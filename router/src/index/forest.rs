//! The blocks of the index: a hash table into a slab of nodes linked to their parents, with exact
//! leaf LRU.
//!
//! A node without holders stays only as long as it has children, so that a block that comes back
//! finds its descendants in place; the last child that leaves takes such ancestors with it.
//!
//! Recency is a logical clock. A lookup stamps only the deepest block it reached, through a shared
//! reference; a node that goes hands its stamp up to its parent. The stamp of a leaf is thus the
//! last time that anything at or below it was used. The LRU queue holds at most one entry per slab
//! place and is put in order lazily: an entry whose stamp is out of date is filed again when it
//! comes up.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    sync::atomic::{AtomicU64, Ordering},
};

use blockplane_protocol::SequenceHash;
use hashbrown::HashTable;

use super::holders::Holders;

/// Place of a node in the slab.
pub(super) type NodeId = u32;

const NONE: NodeId = NodeId::MAX;

#[derive(Debug)]
pub(super) struct Node {
    pub(super) holders: Holders,
    hash: SequenceHash,
    used: AtomicU64,
    parent: NodeId,
    children: u32,
    queued: bool,
    live: bool,
}

#[derive(Debug, Default)]
pub(super) struct Forest {
    nodes: Vec<Node>,
    free: Vec<NodeId>,
    by_hash: HashTable<NodeId>,
    /// Candidates for eviction, least recently used first.
    queue: BinaryHeap<Reverse<(u64, NodeId)>>,
    clock: AtomicU64,
    spilled_bytes: usize,
}

impl Forest {
    /// Live nodes.
    pub(super) fn len(&self) -> usize {
        self.by_hash.len()
    }

    /// Bytes that the structure takes, free places included.
    pub(super) fn bytes(&self) -> usize {
        self.nodes.capacity() * size_of::<Node>()
            + self.free.capacity() * size_of::<NodeId>()
            + self.by_hash.allocation_size()
            + self.queue.capacity() * size_of::<Reverse<(u64, NodeId)>>()
            + self.spilled_bytes
    }

    pub(super) fn get(&self, hash: SequenceHash) -> Option<NodeId> {
        self.by_hash
            .find(hash.0, |&id| self.nodes[id as usize].hash == hash)
            .copied()
    }

    /// The node named `hash`, tried first at the place after `previous`: blocks that were stored
    /// together lie together, which saves a walk down a chain most of its cache misses.
    pub(super) fn get_after(&self, previous: NodeId, hash: SequenceHash) -> Option<NodeId> {
        let next = previous.wrapping_add(1);
        match self.nodes.get(next as usize) {
            Some(node) if node.live && node.hash == hash => Some(next),
            _ => self.get(hash),
        }
    }

    pub(super) fn holders(&self, id: NodeId) -> &Holders {
        &self.nodes[id as usize].holders
    }

    /// Marks a block and all before it as used now.
    pub(super) fn touch(&self, id: NodeId) {
        let now = self.clock.fetch_add(1, Ordering::Relaxed) + 1;
        self.nodes[id as usize]
            .used
            .fetch_max(now, Ordering::Relaxed);
    }

    /// The node named `hash`, made if it is not there, linked under `parent`.
    pub(super) fn insert(&mut self, hash: SequenceHash, parent: Option<SequenceHash>) -> NodeId {
        let parent = parent.map(|parent| self.get_or_create(parent));
        let id = self.get_or_create(hash);
        self.touch(id);
        match parent {
            Some(parent)
                if self.nodes[id as usize].parent == NONE && !self.is_ancestor(id, parent) =>
            {
                self.nodes[id as usize].parent = parent;
                self.nodes[parent as usize].children += 1;
            }
            Some(parent) if parent != id => {
                // Known under this parent already, or a malformed feed.
                self.drop_unneeded(parent);
                self.offer(parent);
            }
            _ => {}
        }
        id
    }

    /// Changes the holders of a node and drops the node when nothing needs it any more.
    pub(super) fn change<T>(&mut self, id: NodeId, change: impl FnOnce(&mut Holders) -> T) -> T {
        let holders = &mut self.nodes[id as usize].holders;
        let before = holders.heap_bytes();
        let result = change(holders);
        self.spilled_bytes = self.spilled_bytes + holders.heap_bytes() - before;
        self.drop_unneeded(id);
        result
    }

    /// Puts a node into the LRU queue if it is a leaf.
    pub(super) fn offer(&mut self, id: NodeId) {
        let node = &mut self.nodes[id as usize];
        if node.live && node.children == 0 && !node.queued {
            node.queued = true;
            self.queue
                .push(Reverse((node.used.load(Ordering::Relaxed), id)));
        }
    }

    /// Drops the least recently used leaf, whoever holds it. False when there is none.
    pub(super) fn evict_leaf(&mut self) -> bool {
        while let Some(Reverse((stamp, id))) = self.queue.pop() {
            let node = &mut self.nodes[id as usize];
            let used = node.used.load(Ordering::Relaxed);
            node.queued = false;
            if !node.live || node.children > 0 {
                continue;
            }
            if used != stamp {
                self.offer(id);
                continue;
            }
            self.change(id, |holders| *holders = Holders::default());
            return true;
        }
        false
    }

    /// Live nodes, in slab order.
    pub(super) fn ids(&self) -> impl Iterator<Item = NodeId> + use<> {
        0..NodeId::try_from(self.nodes.len()).expect("the slab is addressed by 32 bits")
    }

    pub(super) fn is_live(&self, id: NodeId) -> bool {
        self.nodes[id as usize].live
    }

    fn get_or_create(&mut self, hash: SequenceHash) -> NodeId {
        if let Some(id) = self.get(hash) {
            return id;
        }
        let id = self.free.pop().unwrap_or_else(|| {
            let id = NodeId::try_from(self.nodes.len())
                .ok()
                .filter(|&id| id != NONE)
                .expect("the configuration caps the index below 2^32 - 1 blocks");
            self.nodes.push(Node::vacant());
            id
        });
        let node = &mut self.nodes[id as usize];
        // `queued` stays: an entry of the place's former node stands for the new one.
        node.hash = hash;
        node.parent = NONE;
        node.children = 0;
        node.live = true;
        *node.used.get_mut() = 0;
        let nodes = &self.nodes;
        self.by_hash
            .insert_unique(hash.0, id, |&id| nodes[id as usize].hash.0);
        id
    }

    fn drop_unneeded(&mut self, mut id: NodeId) {
        loop {
            let node = &mut self.nodes[id as usize];
            if !node.live || node.children > 0 || !node.holders.is_empty() {
                return;
            }
            let (hash, parent) = (node.hash, node.parent);
            let used = *node.used.get_mut();
            node.live = false;
            if let Ok(entry) = self.by_hash.find_entry(hash.0, |&other| other == id) {
                entry.remove();
            }
            self.free.push(id);
            if parent == NONE {
                return;
            }
            let above = &mut self.nodes[parent as usize];
            above.children -= 1;
            let stamp = above.used.get_mut();
            *stamp = used.max(*stamp);
            if !above.holders.is_empty() {
                self.offer(parent);
            }
            id = parent;
        }
    }

    /// Whether `id` is `of` or above it. Only a malformed feed can make this true for a link that
    /// is about to be made.
    fn is_ancestor(&self, id: NodeId, of: NodeId) -> bool {
        if self.nodes[id as usize].children == 0 {
            return id == of;
        }
        let mut at = of;
        while at != NONE {
            if at == id {
                return true;
            }
            at = self.nodes[at as usize].parent;
        }
        false
    }
}

impl Node {
    fn vacant() -> Self {
        Self {
            holders: Holders::default(),
            hash: SequenceHash(0),
            used: AtomicU64::new(0),
            parent: NONE,
            children: 0,
            queued: false,
            live: false,
        }
    }
}

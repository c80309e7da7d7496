//! The eviction policies by the letter, on plain lists of names.

use std::{collections::BTreeMap, fmt::Debug};

use blockplane_kvbm::EvictionKind;
use blockplane_protocol::SequenceHash;

type Name = SequenceHash;

/// What [`blockplane_kvbm::EvictionPolicy`] does, for blocks that are known by their names.
pub(crate) trait Naive: Debug {
    fn used(&mut self, _name: Name) {}
    fn insert(&mut self, name: Name, parent: Option<Name>);
    fn remove(&mut self, name: Name);
    fn evict(&mut self) -> Option<Name>;
    fn forget(&mut self, _name: Name) {}
    fn clear(&mut self);
}

pub(crate) fn naive(kind: EvictionKind, blocks: usize) -> Box<dyn Naive> {
    match kind {
        EvictionKind::Lru => Box::<Lru>::default(),
        EvictionKind::MultiLru => Box::<MultiLru>::default(),
        EvictionKind::S3Fifo => Box::new(S3Fifo {
            small_max: (blocks / 10).max(1),
            ..S3Fifo::default()
        }),
        EvictionKind::Lineage => Box::<Lineage>::default(),
    }
}

/// The next to go first.
#[derive(Debug, Default)]
struct Lru(Vec<Name>);

impl Naive for Lru {
    fn insert(&mut self, name: Name, parent: Option<Name>) {
        let place = self.0.iter().position(|&other| Some(other) == parent);
        self.0.insert(place.unwrap_or(self.0.len()), name);
    }

    fn remove(&mut self, name: Name) {
        self.0.retain(|&other| other != name);
    }

    fn evict(&mut self) -> Option<Name> {
        (!self.0.is_empty()).then(|| self.0.remove(0))
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}

/// Exact counts in the place of the sketch, which has no collision among so few names.
#[derive(Debug, Default)]
struct MultiLru {
    uses: BTreeMap<Name, usize>,
    lists: [Lru; 4],
}

impl Naive for MultiLru {
    fn used(&mut self, name: Name) {
        *self.uses.entry(name).or_default() += 1;
    }

    fn insert(&mut self, name: Name, parent: Option<Name>) {
        let own = match self.uses.get(&name).copied().unwrap_or(0) {
            0..3 => 0,
            3..8 => 1,
            8..15 => 2,
            _ => 3,
        };
        let parents = |list: &Lru| list.0.iter().any(|&other| Some(other) == parent);
        let list = self.lists.iter().position(parents).unwrap_or(3).min(own);
        self.lists[list].insert(name, parent);
    }

    fn remove(&mut self, name: Name) {
        self.lists.iter_mut().for_each(|list| list.remove(name));
    }

    fn evict(&mut self) -> Option<Name> {
        self.lists.iter_mut().find_map(Lru::evict)
    }

    fn clear(&mut self) {
        self.lists.iter_mut().for_each(Lru::clear);
    }
}

#[derive(Clone, Copy, Debug)]
struct Item {
    name: Name,
    uses: usize,
    held: bool,
}

#[derive(Debug, Default)]
struct S3Fifo {
    small: Vec<Item>,
    main: Vec<Item>,
    /// Left a queue while they were held.
    passed: Vec<Name>,
    /// Evicted from the small queue, and not forgotten yet.
    leaving: Vec<Name>,
    /// With the number of the addition.
    ghost: Vec<(usize, Name)>,
    additions: usize,
    newest: Option<Name>,
    small_max: usize,
}

/// Nine blocks without the one of the small queue.
const GHOST_MAX: usize = 8;

impl S3Fifo {
    fn item(&mut self, name: Name) -> Option<&mut Item> {
        let mut items = self.small.iter_mut().chain(&mut self.main);
        items.find(|item| item.name == name)
    }
}

impl Naive for S3Fifo {
    fn used(&mut self, name: Name) {
        if let Some(item) = self.item(name) {
            item.uses = 3.min(item.uses + 1);
        }
    }

    fn insert(&mut self, name: Name, parent: Option<Name>) {
        if let Some(item) = self.item(name) {
            item.held = false;
            return;
        }
        let known = self.passed.contains(&name) || self.leaving.contains(&name);
        let ghostly = !known && self.ghost.iter().any(|(_, other)| *other == name);
        self.passed.retain(|&other| other != name);
        self.leaving.retain(|&other| other != name);
        if ghostly {
            self.ghost.retain(|(_, other)| *other != name);
        }
        let queue = if known || ghostly {
            &mut self.main
        } else {
            &mut self.small
        };
        let after = self.newest.filter(|newest| Some(*newest) == parent);
        let place = queue.iter().position(|item| Some(item.name) == after);
        let item = Item {
            name,
            uses: 0,
            held: false,
        };
        queue.insert(place.unwrap_or(queue.len()), item);
        self.newest = Some(name);
    }

    fn remove(&mut self, name: Name) {
        if let Some(item) = self.item(name) {
            item.held = true;
        }
    }

    fn evict(&mut self) -> Option<Name> {
        if !self.small.iter().chain(&self.main).any(|item| !item.held) {
            return None;
        }
        loop {
            if self.small.len() > self.small_max || self.main.is_empty() {
                let item = self.small.remove(0);
                if item.held {
                    self.passed.push(item.name);
                } else if item.uses >= 2 {
                    self.main.push(Item { uses: 0, ..item });
                } else {
                    self.leaving.push(item.name);
                    return Some(item.name);
                }
            } else {
                let item = self.main.remove(0);
                if item.held {
                    self.passed.push(item.name);
                } else if item.uses >= 1 {
                    let uses = item.uses - 1;
                    self.main.push(Item { uses, ..item });
                } else {
                    return Some(item.name);
                }
            }
        }
    }

    fn forget(&mut self, name: Name) {
        self.small.retain(|item| item.name != name);
        self.main.retain(|item| item.name != name);
        self.passed.retain(|&other| other != name);
        let known = self.ghost.iter().any(|(_, other)| *other == name);
        if self.leaving.contains(&name) && !known {
            self.additions += 1;
            self.ghost.push((self.additions, name));
            let oldest = self.additions.saturating_sub(GHOST_MAX);
            self.ghost.retain(|(number, _)| *number > oldest);
        }
        self.leaving.retain(|&other| other != name);
    }

    fn clear(&mut self) {
        self.small.clear();
        self.main.clear();
        self.passed.clear();
        self.leaving.clear();
        self.newest = None;
    }
}

/// The one used longest ago first, with the block before it.
#[derive(Debug, Default)]
struct Lineage(Vec<(Name, Option<Name>)>);

impl Naive for Lineage {
    fn insert(&mut self, name: Name, parent: Option<Name>) {
        self.0.push((name, parent));
    }

    fn remove(&mut self, name: Name) {
        self.0.retain(|(other, _)| *other != name);
    }

    fn evict(&mut self) -> Option<Name> {
        let continued = |name: Name| self.0.iter().any(|(_, parent)| *parent == Some(name));
        let leaf = self.0.iter().position(|(name, _)| !continued(*name))?;
        Some(self.0.remove(leaf).0)
    }

    /// A block of that name that comes later is another one: none continues it yet.
    fn forget(&mut self, name: Name) {
        let links = self.0.iter_mut().map(|(_, parent)| parent);
        links
            .filter(|parent| **parent == Some(name))
            .for_each(|parent| *parent = None);
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}

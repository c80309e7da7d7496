//! Values under keys that are not used twice.

/// A slab whose keys carry a generation, so that a late key finds nothing.
#[derive(Debug)]
pub(super) struct Slots<T> {
    entries: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
}

impl<T> Slots<T> {
    pub(super) const fn new() -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
        }
    }

    pub(super) fn insert(&mut self, value: T) -> u64 {
        let at = self.free.pop().unwrap_or_else(|| {
            self.entries.push((0, None));
            u32::try_from(self.entries.len() - 1).expect("queues are bounded")
        });
        let (generation, entry) = &mut self.entries[at as usize];
        *entry = Some(value);
        key(*generation, at)
    }

    pub(super) fn get(&self, key: u64) -> Option<&T> {
        let (generation, entry) = self.entries.get(place(key))?;
        entry.as_ref().filter(|_| *generation == epoch(key))
    }

    pub(super) fn get_mut(&mut self, key: u64) -> Option<&mut T> {
        let (generation, entry) = self.entries.get_mut(place(key))?;
        entry.as_mut().filter(|_| *generation == epoch(key))
    }

    pub(super) fn remove(&mut self, key: u64) -> Option<T> {
        let (generation, entry) = self.entries.get_mut(place(key))?;
        if *generation != epoch(key) {
            return None;
        }
        let value = entry.take()?;
        *generation = generation.wrapping_add(1);
        let at = u32::try_from(place(key)).expect("it is half of a key");
        self.free.push(at);
        Some(value)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        (0..)
            .zip(&self.entries)
            .filter_map(|(at, (generation, entry))| Some((key(*generation, at), entry.as_ref()?)))
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }
}

fn key(generation: u32, at: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(at)
}

#[expect(clippy::cast_possible_truncation, reason = "the lower half of the key")]
fn place(key: u64) -> usize {
    key as u32 as usize
}

fn epoch(key: u64) -> u32 {
    (key >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_key_finds_nothing() {
        let mut slots = Slots::new();
        let (a, b) = (slots.insert('a'), slots.insert('b'));
        assert_eq!((slots.remove(a), slots.remove(a)), (Some('a'), None));
        let c = slots.insert('c');
        assert_ne!(a, c);
        let found = [a, b, c].map(|key| slots.get(key).copied());
        assert_eq!(found, [None, Some('b'), Some('c')]);
        assert_eq!(slots.get_mut(a), None);
        assert_eq!(slots.len(), 2);
        assert_eq!(
            slots.iter().map(|(_, value)| *value).collect::<String>(),
            "cb"
        );
    }
}

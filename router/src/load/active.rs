//! Blocks of the requests that run on one rank, shared ones counted once.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
};

use blockplane_protocol::SequenceHash;

/// Reference counts of prompt blocks by sequence hash, and blocks that nobody can share.
#[derive(Debug, Default)]
pub(super) struct ActiveBlocks {
    shared: HashMap<SequenceHash, u32, BuildHasherDefault<Identity>>,
    private: u64,
}

/// Sequence hashes are uniform already.
#[derive(Debug, Default)]
pub(super) struct Identity(u64);

impl ActiveBlocks {
    pub(super) fn len(&self) -> u64 {
        self.shared.len() as u64 + self.private
    }

    pub(super) fn add(&mut self, prompt: &[SequenceHash], private: u64) {
        for &hash in prompt {
            *self.shared.entry(hash).or_insert(0) += 1;
        }
        self.private += private;
    }

    pub(super) fn remove(&mut self, prompt: &[SequenceHash], private: u64) {
        for hash in prompt {
            if let Some(references) = self.shared.get_mut(hash) {
                *references -= 1;
                if *references == 0 {
                    self.shared.remove(hash);
                }
            }
        }
        self.private = self.private.saturating_sub(private);
    }

    /// Leading blocks of a prompt that running requests hold already.
    ///
    /// A request holds all of its prompt's blocks and lets go of all at once, so what is held of
    /// any prompt is a prefix, and its end can be found by bisection.
    pub(super) fn held(&self, prompt: &[SequenceHash]) -> usize {
        match prompt.first() {
            Some(first) if self.shared.contains_key(first) => {
                prompt.partition_point(|hash| self.shared.contains_key(hash))
            }
            _ => 0,
        }
    }
}

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(blocks: u64) -> Vec<SequenceHash> {
        (1..=blocks).map(SequenceHash).collect()
    }

    #[test]
    fn a_shared_prefix_counts_once_until_its_last_holder_leaves() {
        let mut active = ActiveBlocks::default();
        active.add(&prompt(4), 1);
        active.add(&prompt(6), 2);
        assert_eq!(active.len(), 9);
        assert_eq!(active.held(&prompt(8)), 6);
        active.remove(&prompt(6), 2);
        assert_eq!((active.len(), active.held(&prompt(8))), (5, 4));
        active.remove(&prompt(4), 1);
        assert_eq!((active.len(), active.held(&prompt(8))), (0, 0));
    }
}

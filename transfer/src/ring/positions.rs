//! The two positions of a ring with one writer and one reader.
//!
//! Both count bytes since the beginning and never wrap; a position modulo the capacity is a place
//! in the data. The writer owns `head`, the reader owns `tail`, and each reads the other's with
//! acquire: bytes below `head` are written, bytes below `tail` are free again.

use super::records::Corrupt;
use crate::sync::{AtomicU64, Ordering};

#[derive(Clone, Copy, Debug)]
pub(super) struct Positions<'a> {
    pub(super) head: &'a AtomicU64,
    pub(super) tail: &'a AtomicU64,
    pub(super) capacity: u64,
}

impl Positions<'_> {
    /// Bytes that a writer at `head` may write. Nothing, if the reader's position makes no sense.
    pub(super) fn room(&self, head: u64) -> u64 {
        let used = head.wrapping_sub(self.tail.load(Ordering::Acquire));
        self.capacity.saturating_sub(used)
    }

    /// The writer has written everything below `head`.
    pub(super) fn publish(&self, head: u64) {
        self.head.store(head, Ordering::Release);
    }

    /// Bytes that a reader at `tail` may read.
    pub(super) fn filled(&self, tail: u64) -> Result<u64, Corrupt> {
        let filled = self.head.load(Ordering::Acquire).wrapping_sub(tail);
        if filled > self.capacity {
            return Err(Corrupt("the write position is out of range"));
        }
        Ok(filled)
    }

    /// The reader does not need what lies below `tail` any more.
    pub(super) fn release(&self, tail: u64) {
        self.tail.store(tail, Ordering::Release);
    }
}

/// Run with `RUSTFLAGS="--cfg loom" cargo test -p blockplane-transfer --lib --release loom`.
#[cfg(all(test, loom))]
mod loom_tests {
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    use super::*;

    /// Two bytes of data for three that go through.
    struct Shared {
        head: AtomicU64,
        tail: AtomicU64,
        data: [UnsafeCell<u64>; 2],
    }

    impl Shared {
        fn positions(&self) -> Positions<'_> {
            Positions {
                head: &self.head,
                tail: &self.tail,
                capacity: 2,
            }
        }
    }

    #[test]
    fn loom_ring_bytes_have_one_owner() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let shared = Arc::new(Shared {
                head: AtomicU64::new(0),
                tail: AtomicU64::new(0),
                data: [UnsafeCell::new(0), UnsafeCell::new(0)],
            });
            let writer = {
                let shared = shared.clone();
                thread::spawn(move || {
                    let mut head = 0;
                    for _ in 0..3 {
                        if shared.positions().room(head) == 0 {
                            break;
                        }
                        let cell = &shared.data[(head % 2) as usize];
                        // SAFETY: what the model checks: the place is the writer's.
                        cell.with_mut(|value| unsafe { *value = head + 1 });
                        head += 1;
                        shared.positions().publish(head);
                    }
                    head
                })
            };
            let mut tail = 0;
            for _ in 0..3 {
                if shared.positions().filled(tail).unwrap() > 0 {
                    let cell = &shared.data[(tail % 2) as usize];
                    // SAFETY: what the model checks: the place is the reader's.
                    cell.with(|value| assert_eq!(unsafe { *value }, tail + 1));
                    tail += 1;
                    shared.positions().release(tail);
                }
            }
            let head = writer.join().unwrap();
            assert!(tail <= head);
        });
    }
}

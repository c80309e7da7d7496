//! Handles of one block, one type per state of its life.
//!
//! Whoever holds a handle holds the block: dropping the handle gives it back. The states can only
//! be passed in order.
//!
//! A block cannot be found by its hash before it is complete:
//! ```compile_fail,E0599
//! # use blockplane_kvbm::{BlockPool, PoolConfig};
//! # let pool = BlockPool::accounting(1, PoolConfig::default());
//! let block = pool.allocate(1).unwrap().remove(0);
//! block.register();
//! ```
//!
//! Nobody who may still write to a block is left once it is complete:
//! ```compile_fail,E0382
//! # use blockplane_kvbm::{BlockPool, PoolConfig};
//! # use blockplane_protocol::{SaltHash, TokenSequence};
//! # let pool = BlockPool::accounting(1, PoolConfig::default());
//! # let prompt = TokenSequence::from_tokens(&[1, 2], 2, SaltHash::default());
//! let block = pool.allocate(1).unwrap().remove(0);
//! let complete = block.complete(prompt.blocks()[0], None);
//! block.id();
//! ```
//!
//! The right to write to a block is not shared:
//! ```compile_fail,E0599
//! # use blockplane_kvbm::{BlockPool, PoolConfig};
//! # let pool = BlockPool::accounting(1, PoolConfig::default());
//! let block = pool.allocate(1).unwrap().remove(0);
//! let second = block.clone();
//! ```
//!
//! A block that others can find is never writable again through its handle:
//! ```compile_fail,E0599
//! # use blockplane_kvbm::{BlockPool, PoolConfig};
//! # use blockplane_protocol::{SaltHash, TokenSequence};
//! # let pool = BlockPool::accounting(1, PoolConfig::default());
//! # let prompt = TokenSequence::from_tokens(&[1, 2], 2, SaltHash::default());
//! let block = pool.allocate(1).unwrap().remove(0);
//! let registered = block.complete(prompt.blocks()[0], None).register();
//! registered.complete(prompt.blocks()[0], None);
//! ```

mod batch;
mod immutable;
mod mutable;
mod quarantine;

pub use batch::{HeldBlocks, LeasedBlocks};
pub use immutable::ImmutableBlock;
pub(crate) use mutable::Lease;
pub use mutable::{CompleteBlock, MutableBlock};
pub use quarantine::Quarantine;

use blockplane_protocol::{SequenceHash, TokenBlock};

/// Invariant 2: a block is found under the name of its own tokens.
fn assert_named(hashes: TokenBlock, parent: Option<SequenceHash>) {
    assert!(
        SequenceHash::extend(parent, hashes.block) == hashes.sequence,
        "invariant 2: block {} after {parent:?} is not sequence {}",
        hashes.block,
        hashes.sequence,
    );
}

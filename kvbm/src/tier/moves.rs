//! Moves: what the manager asks for, and what became of it.

use std::{fmt, time::Duration};

use blockplane_protocol::{DpRank, SequenceHash, Tier, TokenBlock};

use crate::pool::Found;
pub use crate::store::{BlockOutcome, Invalid, Pending};

/// Names a move while it is under way; not used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MoveId(pub u64);

/// From where to where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum MoveKind {
    /// G1 to G2: offload.
    DeviceToHost,
    /// G2 to G1: the last step of an onboard.
    HostToDevice,
    /// G2 to G3: write-through or demotion.
    HostToDisk,
    /// G3 to G2: promotion.
    DiskToHost,
    /// G2 to G4.
    HostToRemote,
    /// G4 to G2: promotion.
    RemoteToHost,
}

/// One block of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MovedBlock {
    /// Its id in the pool it is copied from. Meaningless when that is G4.
    pub from: u32,
    /// Its id in the pool it is copied to. Meaningless when that is G4.
    pub to: u32,
    /// Its name.
    pub name: TokenBlock,
    /// Name of the block before it in its sequence.
    pub parent: Option<SequenceHash>,
}

/// One batch of blocks to copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MoveSpec {
    /// Names the move.
    pub id: MoveId,
    /// From where to where.
    pub kind: MoveKind,
    /// The rank whose G1 is meant, where G1 is on one side.
    pub rank: DpRank,
    /// The blocks, at least one. Nobody else writes to the targets or overwrites the sources.
    pub blocks: Vec<MovedBlock>,
    /// Time allowed from now on.
    pub time: Duration,
}

/// What a mover says of a move.
#[derive(Debug)]
pub struct MoveReport {
    /// One for each block, in order. A block without one has failed.
    pub outcomes: Vec<BlockOutcome>,
    /// Present while bytes of blocks that did not move may still land or be read.
    pub pending: Option<Pending>,
    /// Bytes that were moved.
    pub bytes: u64,
    /// Present when the lower tier does not work any more as it did.
    pub fault: Option<TierFault>,
}

/// What is wrong with a whole tier, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TierFault {
    /// Blocks are read, none is written any more.
    ReadOnly(String),
    /// It is of no use any more.
    Off(String),
}

/// Copies blocks. Called on a few threads of the manager, for different moves at once.
pub trait Mover: Send + Sync {
    /// Does the move on this thread, within `spec.time` (and what it takes to call it off).
    fn run(&self, spec: &MoveSpec) -> MoveReport;
}

impl MoveKind {
    /// All kinds.
    pub const ALL: [Self; 6] = [
        Self::DeviceToHost,
        Self::HostToDevice,
        Self::HostToDisk,
        Self::DiskToHost,
        Self::HostToRemote,
        Self::RemoteToHost,
    ];

    /// The tier on the other side of G2.
    #[must_use]
    pub const fn tier(self) -> Tier {
        match self {
            Self::DeviceToHost | Self::HostToDevice => Tier::Device,
            Self::HostToDisk | Self::DiskToHost => Tier::Disk,
            Self::HostToRemote | Self::RemoteToHost => Tier::Remote,
        }
    }

    /// Whether G2 is the target.
    #[must_use]
    pub const fn into_host(self) -> bool {
        matches!(
            self,
            Self::DeviceToHost | Self::DiskToHost | Self::RemoteToHost
        )
    }

    /// A name for metrics and logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::DeviceToHost => "device-to-host",
            Self::HostToDevice => "host-to-device",
            Self::HostToDisk => "host-to-disk",
            Self::DiskToHost => "disk-to-host",
            Self::HostToRemote => "host-to-remote",
            Self::RemoteToHost => "remote-to-host",
        }
    }

    pub(super) const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for MoveKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl MovedBlock {
    /// From a block that is held to slot `to` of another tier.
    pub(super) const fn new(source: &Found, to: u32) -> Self {
        Self {
            from: source.id.0,
            to,
            name: source.hashes,
            parent: source.parent,
        }
    }
}

impl MoveReport {
    /// All blocks are in place.
    #[must_use]
    pub fn moved(blocks: usize, bytes: u64) -> Self {
        Self {
            outcomes: vec![BlockOutcome::Moved; blocks],
            pending: None,
            bytes,
            fault: None,
        }
    }

    /// No block was moved, for one reason, and nothing moves any more.
    #[must_use]
    pub fn failed(blocks: usize, reason: &str) -> Self {
        Self {
            outcomes: vec![BlockOutcome::Failed(reason.to_owned()); blocks],
            pending: None,
            bytes: 0,
            fault: None,
        }
    }
}

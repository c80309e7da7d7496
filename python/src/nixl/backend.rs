//! The names under which callers ask for ways to move bytes. One agent does all of it; the names of
//! NIXL's plugins say which kinds of memory are wanted.

use super::kinds::Memory;

/// What a caller can create.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backend {
    Blockplane,
    Gds,
    GdsMt,
    Posix,
    Ucx,
}

const BETWEEN_AGENTS: &[Memory] = &[Memory::Dram, Memory::Vram];
const HOST_AND_FILES: &[Memory] = &[Memory::Dram, Memory::File];
const ALL_AND_FILES: &[Memory] = &[Memory::Dram, Memory::Vram, Memory::File];

impl Backend {
    pub(super) const ALL: [Self; 5] = [
        Self::Blockplane,
        Self::Gds,
        Self::GdsMt,
        Self::Posix,
        Self::Ucx,
    ];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Blockplane => "BLOCKPLANE",
            Self::Gds => "GDS",
            Self::GdsMt => "GDS_MT",
            Self::Posix => "POSIX",
            Self::Ucx => "UCX",
        }
    }

    pub(super) const fn memories(self) -> &'static [Memory] {
        match self {
            Self::Blockplane | Self::Ucx => BETWEEN_AGENTS,
            Self::Posix => HOST_AND_FILES,
            Self::Gds | Self::GdsMt => ALL_AND_FILES,
        }
    }

    pub(super) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|backend| backend.name() == name)
    }

    /// The number that callers hold; never 0.
    pub(super) const fn handle(self) -> u64 {
        match self {
            Self::Blockplane => 1,
            Self::Gds => 2,
            Self::GdsMt => 3,
            Self::Posix => 4,
            Self::Ucx => 5,
        }
    }

    pub(super) fn from_handle(handle: u64) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|backend| backend.handle() == handle)
    }

    /// Whether it moves bytes between these kinds of memory.
    pub(super) fn moves(self, local: Memory, remote: Memory) -> bool {
        let knows = |memory| self.memories().contains(&memory);
        let files = [local, remote].contains(&Memory::File);
        // Files are between one agent and its own disk.
        knows(local) && knows(remote) && (!files || local != remote)
    }
}

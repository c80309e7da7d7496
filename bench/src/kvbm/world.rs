//! What is behind the books of a replay: nothing, or bytes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use blockplane_kvbm::tier::{MoveReport, MoveSpec};
use blockplane_protocol::{BlockId, TokenBlock};

use super::links::{LinkSpeeds, Links};

/// Moves blocks, and fills and checks those of G1.
pub(super) trait World {
    /// When a move that starts at `now` is going to end.
    fn end(&mut self, now: Duration, spec: &MoveSpec) -> Duration;

    /// Does the move.
    fn carry(&mut self, spec: &MoveSpec) -> MoveReport;

    /// A request begins, or has its blocks.
    fn step(&mut self) {}

    /// A block of G1 was computed.
    fn computed(&mut self, block: BlockId, name: TokenBlock) -> anyhow::Result<()>;

    /// A block was found in G1, or loaded into it: checks its contents.
    fn loaded(&mut self, block: BlockId, name: TokenBlock) -> anyhow::Result<()>;
}

/// Books without bytes; moves take the time of virtual links.
#[derive(Debug)]
pub(super) struct Null {
    links: Links,
    block_bytes: u64,
    steps: Option<Arc<AtomicU32>>,
}

impl Null {
    /// `steps` counts the steps of requests.
    pub(super) const fn new(
        speeds: LinkSpeeds,
        block_bytes: u64,
        steps: Option<Arc<AtomicU32>>,
    ) -> Self {
        Self {
            links: Links::new(speeds),
            block_bytes,
            steps,
        }
    }
}

impl World for Null {
    fn end(&mut self, now: Duration, spec: &MoveSpec) -> Duration {
        let bytes = spec.blocks.len() as u64 * self.block_bytes;
        self.links.end(now, spec.kind, bytes)
    }

    fn carry(&mut self, spec: &MoveSpec) -> MoveReport {
        MoveReport::moved(
            spec.blocks.len(),
            spec.blocks.len() as u64 * self.block_bytes,
        )
    }

    fn step(&mut self) {
        if let Some(steps) = &self.steps {
            steps.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn computed(&mut self, _: BlockId, _: TokenBlock) -> anyhow::Result<()> {
        Ok(())
    }

    fn loaded(&mut self, _: BlockId, _: TokenBlock) -> anyhow::Result<()> {
        Ok(())
    }
}

//! What an engine thread needs of a model.

use std::sync::Arc;

use blockplane_kvbm::KvArena;
use blockplane_protocol::LayerIndex;

use crate::{
    error::StartError,
    model::{Executor, ExecutorOptions, ForwardError, Model, SequenceSlice},
    scheduler::SchedulerConfig,
};

/// Computes steps: a model's executor, or a stand-in in tests.
pub(crate) trait Forward: Send {
    /// Computes the new tokens of each slice, writes their KV into the arena's blocks, and calls
    /// `on_layer` as soon as that is done for a layer. Then calls `on_logits` with the place among
    /// the slices that want logits, in order, and its row.
    fn forward(
        &mut self,
        slices: &[SequenceSlice<'_>],
        arena: &KvArena,
        on_layer: &mut dyn FnMut(LayerIndex),
        on_logits: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), ForwardError>;
}

/// An executor that takes the steps of a scheduler with these limits.
pub(super) fn executor(
    model: &Arc<Model>,
    limits: &SchedulerConfig,
) -> Result<Box<dyn Forward>, StartError> {
    let options = ExecutorOptions {
        batch_tokens_max: limits.max_batch_tokens,
        logit_rows_max: limits.max_running,
    };
    Ok(Box::new(Executor::new(Arc::clone(model), options)?))
}

impl Forward for Executor {
    fn forward(
        &mut self,
        slices: &[SequenceSlice<'_>],
        arena: &KvArena,
        on_layer: &mut dyn FnMut(LayerIndex),
        on_logits: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), ForwardError> {
        let logits = Self::forward(self, slices, arena, on_layer)?;
        for row in 0..logits.rows() {
            on_logits(row, logits.row(row));
        }
        Ok(())
    }
}

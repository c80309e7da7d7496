//! The pretended model: steps that take time, write recognisable KV and give known tokens.

use std::{
    thread,
    time::{Duration, Instant},
};

use blockplane_kvbm::KvArena;
use blockplane_protocol::LayerIndex;

use super::{
    MockModel, MockTiming,
    kv::{self, Cells},
};
use crate::{
    model::{ForwardError, SequenceSlice},
    native::Forward,
};

/// The logit of the token that comes next; all others are 0. Penalties, biases and temperatures in
/// the ranges that the `OpenAI` API accepts leave it the only possible one in single precision.
const CERTAIN: f32 = 1e6;

pub(super) struct MockForward {
    model: MockModel,
    timing: MockTiming,
    /// A row of logits, 0 between uses.
    row: Vec<f32>,
}

impl MockForward {
    pub(super) fn new(model: MockModel, timing: MockTiming) -> Self {
        Self {
            row: vec![0.0; model.vocab_size as usize],
            model,
            timing,
        }
    }

    /// The chain after each new token of a slice.
    fn chains(
        &self,
        cells: &Cells<'_>,
        slice: &SequenceSlice<'_>,
    ) -> Result<Vec<u64>, ForwardError> {
        let mut chain = if self.model.verify_kv {
            cells.verified_chain(slice.position)?
        } else {
            cells.last_chain(slice.position)?
        };
        let new = (slice.position..).zip(slice.tokens);
        Ok(new
            .map(|(position, &token)| {
                chain = kv::extend(chain, position, token);
                chain
            })
            .collect())
    }

    fn step_time(&self, slices: &[SequenceSlice<'_>]) -> Duration {
        let (mut prefill, mut decode) = (0, 0);
        for slice in slices {
            match slice.tokens.len() {
                1 if slice.logits => decode += 1,
                tokens => prefill += tokens,
            }
        }
        let count = |n| u32::try_from(n).unwrap_or(u32::MAX);
        self.timing.step_time(count(prefill), count(decode))
    }
}

impl Forward for MockForward {
    fn forward(
        &mut self,
        slices: &[SequenceSlice<'_>],
        arena: &KvArena,
        on_layer: &mut dyn FnMut(LayerIndex),
        on_logits: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), ForwardError> {
        let begin = Instant::now();
        let step_time = self.step_time(slices);
        let mut cells = Vec::with_capacity(slices.len());
        let mut chains = Vec::with_capacity(slices.len());
        for (sequence, slice) in slices.iter().enumerate() {
            let own = Cells::of(arena, sequence, slice)?;
            chains.push(self.chains(&own, slice)?);
            cells.push(own);
        }
        for layer in 0..self.model.layers {
            let share = f64::from(layer + 1) / f64::from(self.model.layers);
            wait_until(begin + step_time.mul_f64(share));
            for ((cells, chains), slice) in cells.iter().zip(&chains).zip(slices) {
                cells.write(layer, slice.position, slice.tokens, chains);
            }
            on_layer(LayerIndex(layer));
        }
        let wanted = slices.iter().zip(&chains).filter(|(slice, _)| slice.logits);
        for (row, chain) in wanted.filter_map(|(_, chains)| chains.last()).enumerate() {
            let token = self.model.next_token(*chain) as usize;
            self.row[token] = CERTAIN;
            on_logits(row, &self.row);
            self.row[token] = 0.0;
        }
        Ok(())
    }
}

/// Parks this thread until the time has come.
fn wait_until(time: Instant) {
    loop {
        let left = time.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        thread::park_timeout(left);
    }
}

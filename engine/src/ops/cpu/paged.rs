//! Operations on the blocks of a KV pool: writing keys and values, and attention over them.

use std::cmp::Reverse;

use blockplane_protocol::LayerIndex;

use super::attention::{Attend, Cached};
use super::buffers::{Matrix, Shared, Vector};
use super::{Compute, CpuOps, SCRATCH};
use crate::ops::{AttentionShape, Batch, HeadNorms, KvView};

/// Query rows of one item of attention: enough to pay for packing the keys.
const ATTENTION_ROWS: usize = 64;

impl CpuOps {
    /// See [`Ops::rope_and_write_kv`](crate::ops::Ops::rope_and_write_kv).
    #[expect(
        clippy::too_many_arguments,
        reason = "one fused pass over what it touches"
    )]
    pub(super) fn turn_and_write(
        &self,
        batch: &Batch,
        layer: LayerIndex,
        shape: AttentionShape,
        norms: Option<HeadNorms<'_, Vector>>,
        qkv: &Matrix,
        rotation: &Matrix,
        queries: &mut Matrix,
        kv: &dyn KvView,
    ) {
        let rows = batch.rows();
        let dim = shape.head_dim;
        let group = shape.heads / shape.kv_heads;
        let block_tokens = kv.layout().block_tokens as usize;
        let plane = shape.kv_heads * block_tokens * dim;
        assert!(
            qkv.columns == (shape.heads + 2 * shape.kv_heads) * dim
                && rotation.columns == dim
                && rows * shape.heads * dim <= queries.data.len(),
            "the buffers were made for the layer and the batch"
        );
        let queries = Shared::new(queries.data.as_mut_ptr());
        let turn =
            |head: &[f32], norm: Option<&Vector>, eps: f32, angles: &[f32], out: &mut [f32]| {
                assert!(
                    head.len() == dim && out.len() == dim && angles.len() == dim,
                    "one head"
                );
                let (cosines, sines) = angles.split_at(dim / 2);
                let mut from = head.as_ptr();
                if let Some(norm) = norm {
                    let weight = &norm.0.as_slice()[..dim];
                    // SAFETY: all have `dim` numbers, and the kernels are those of this processor.
                    unsafe {
                        (self.kernels.rms_norm)(dim, from, weight.as_ptr(), eps, out.as_mut_ptr());
                    }
                    from = out.as_ptr();
                }
                // SAFETY: as above; the angles have half as many.
                unsafe {
                    (self.kernels.rotate)(
                        dim,
                        from,
                        cosines.as_ptr(),
                        sines.as_ptr(),
                        out.as_mut_ptr(),
                    );
                }
            };
        let (query_norm, key_norm, eps) = norms.map_or((None, None, 0.0), |norms| {
            (Some(norms.query), Some(norms.key), norms.eps)
        });
        self.for_rows(rows, qkv.columns, &|of_rows| {
            SCRATCH.with_borrow_mut(|scratch| {
                let turned = scratch.get(dim);
                for row in of_rows {
                    let source = &qkv.data.as_slice()[row * qkv.stride..][..qkv.columns];
                    let angles = &rotation.data.as_slice()[row * rotation.stride..][..dim];
                    let (q, rest) = source.split_at(shape.heads * dim);
                    let (k, v) = rest.split_at(shape.kv_heads * dim);
                    for (head, q) in q.chunks_exact(dim).enumerate() {
                        let at = ((head / group * rows + row) * group + head % group) * dim;
                        // SAFETY: every head of every row is written by one item only.
                        let out = unsafe { queries.slice(at, dim) };
                        turn(q, query_norm, eps, angles, out);
                    }
                    let position = batch.positions[row] as usize;
                    let sequence = &batch.sequences[batch.owners[row] as usize];
                    let block = batch.blocks[sequence.blocks.start + position / block_tokens];
                    let run = kv.run_ptr(block, layer).as_ptr();
                    for head in 0..shape.kv_heads {
                        let at = (head * block_tokens + position % block_tokens) * dim;
                        turn(&k[head * dim..][..dim], key_norm, eps, angles, turned);
                        // SAFETY: inside the run that `KvView` promises, in the slot of this row.
                        unsafe { self.write_kv(turned, run, at) };
                        // SAFETY: as above, in the plane of values.
                        unsafe { self.write_kv(&v[head * dim..][..dim], run, plane + at) };
                    }
                }
            });
        });
    }

    /// Attention with keys and values of type `K`.
    #[expect(clippy::too_many_arguments, reason = "the parts of one operation")]
    pub(super) fn attend<K: Cached + Send + Sync>(
        &self,
        kernel: unsafe fn(&mut Attend<'_, K>),
        batch: &Batch,
        layer: LayerIndex,
        shape: AttentionShape,
        queries: &Matrix,
        kv: &dyn KvView,
        out: &mut Matrix,
    ) {
        let group = shape.heads / shape.kv_heads;
        let tile = (ATTENTION_ROWS / group).max(1);
        let block_tokens = kv.layout().block_tokens as usize;
        let head_elements = block_tokens * shape.head_dim;
        // (sequence, first token of the tile): later tiles first, they are the longest.
        let mut tiles: Vec<(usize, usize)> = Vec::new();
        for (index, sequence) in batch.sequences.iter().enumerate() {
            tiles.extend(
                (0..sequence.rows.len())
                    .step_by(tile)
                    .map(|token| (index, token)),
            );
        }
        tiles.sort_by_key(|&(index, token)| Reverse(batch.sequences[index].position + token));
        let rows = batch.rows();
        let stride = out.stride;
        let out = Shared::new(out.data.as_mut_ptr());
        // Heads of one tile follow each other in memory: take them together if there is enough else
        // to share among the threads.
        let heads_per_item = if tiles.len() >= 4 * self.threads() {
            shape.kv_heads
        } else {
            1
        };
        let items = shape.kv_heads / heads_per_item;
        let keys = |row: usize| batch.positions[row] as usize + 1;
        let operations = (0..rows).map(keys).sum::<usize>() * 2 * shape.heads * shape.head_dim;
        self.pool.run(tiles.len() * items, operations, &|item| {
            let (index, token) = tiles[item / items];
            let sequence = &batch.sequences[index];
            let tokens = tile.min(sequence.rows.len() - token);
            let row = sequence.rows.start + token;
            let blocks = &batch.blocks[sequence.blocks.clone()];
            let heads = item % items * heads_per_item..(item % items + 1) * heads_per_item;
            for head in heads.clone() {
                let key_run = |position: usize| {
                    let run = kv.run_ptr(blocks[position / block_tokens], layer);
                    let token = position % block_tokens;
                    let at = head * head_elements + token * shape.head_dim;
                    let key = run.as_ptr().cast::<K>().cast_const().wrapping_add(at);
                    (key, block_tokens - token)
                };
                let first_query = (head * rows + row) * group * shape.head_dim;
                SCRATCH.with_borrow_mut(|scratch| {
                    let mut attend = Attend {
                        queries: queries.data.as_slice()[first_query..].as_ptr(),
                        group,
                        head_dim: shape.head_dim,
                        tokens,
                        position: sequence.position + token,
                        window: shape.window.map_or(usize::MAX, |window| window as usize),
                        key_run: &key_run,
                        value_offset: shape.kv_heads * head_elements,
                        next_head: if head + 1 < heads.end {
                            head_elements
                        } else {
                            0
                        },
                        out: out.at(row * stride + head * group * shape.head_dim),
                        out_stride: stride,
                        scratch,
                    };
                    // SAFETY: the queries of this head are contiguous and there; the block table
                    // covers every position, and `KvView` promises the runs; this item alone
                    // writes these heads of these rows.
                    unsafe { kernel(&mut attend) };
                });
            }
        });
    }

    /// Writes one head of keys or values, `at` elements after the start of its run.
    ///
    /// # Safety
    /// The elements are inside the run and nobody else touches them.
    unsafe fn write_kv(&self, head: &[f32], run: *mut u8, at: usize) {
        match self.compute {
            Compute::F32 => {
                let to = run.cast::<f32>().wrapping_add(at);
                // SAFETY: the caller's.
                unsafe { std::ptr::copy_nonoverlapping(head.as_ptr(), to, head.len()) };
            }
            Compute::Bf16 => {
                let to = run.cast::<u16>().wrapping_add(at);
                // SAFETY: the caller's, and the kernels are those of this processor.
                unsafe { (self.kernels.narrow_bf16)(head.len(), head.as_ptr(), to) };
            }
        }
    }
}

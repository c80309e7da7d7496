// From the number of a chunk or unit to addresses. Pure functions, the same on the device and, as C11,
// under the host's compiler, where the tests check them.
#ifndef BP_WALK
#define BP_WALK

#include "abi.cuh"

#ifdef __CUDACC__
#define BP_FN static __device__ __forceinline__
#define BP_UNROLL _Pragma("unroll")
#else
#define BP_FN static inline
#define BP_UNROLL
#endif

typedef struct {
    u64 src, dst;
    u32 bytes;
} BpSpan;

// The id of a block: from the table, or consecutive.
BP_FN u32 bp_id(const u32 *ids, u32 table, u32 first, u32 block) {
    return table == BP_CONSECUTIVE ? first + block : ids[table + block];
}

// The set that chunk `chunk` of the operation belongs to: the last one, from `low` on, that begins at or
// before it. Chunks ascend, so the set of the chunk before is a good `low`.
BP_FN u32 bp_find_set(const BpSet *sets, u32 count, u32 low, u32 chunk) {
    u32 high = count;
    if (low + 1 < count && sets[low + 1].first_chunk > chunk) return low;
    while (high - low > 1) {
        u32 middle = low + (high - low) / 2;
        if (sets[middle].first_chunk <= chunk) low = middle;
        else high = middle;
    }
    return low;
}

// Where chunk `chunk` of the operation, which belongs to `set`, comes from and goes to.
BP_FN BpSpan bp_chunk(const BpSet *set, const u32 *ids, u32 chunk_bytes, u32 chunk) {
    u32 piece = chunk - set->first_chunk;
    u64 offset = 0;
    if (set->chunks_per_piece > 1) {
        u32 within = piece % set->chunks_per_piece;
        piece /= set->chunks_per_piece;
        offset = (u64)within * chunk_bytes;
    }
    u32 block = piece, layer = 0;
    if (set->layers > 1) {
        u32 inner = set->layer_major ? set->blocks : set->layers;
        u32 rest = piece % inner;
        piece /= inner;
        block = set->layer_major ? rest : piece;
        layer = set->layer_major ? piece : rest;
    }
    u64 left = set->piece_bytes - offset;
    BpSpan span;
    span.src = set->src + bp_id(ids, set->src_ids, set->src_first, block) * set->src_block + layer * set->src_layer + offset;
    span.dst = set->dst + bp_id(ids, set->dst_ids, set->dst_first, block) * set->dst_block + layer * set->dst_layer + offset;
    span.bytes = left < chunk_bytes ? (u32)left : chunk_bytes;
    return span;
}

// The chunks of a launch that fall to one of the `workers` of each CTA: first, first + step, ... below end.
// Neighbouring chunks go to different CTAs, so that few chunks reach all of them. In 64 bits, because a step
// may go beyond 2^32.
typedef struct {
    u64 first, end;
    u32 step;
} BpShare;

BP_FN BpShare bp_share(u32 begin, u32 end, u32 cta, u32 ctas, u32 worker, u32 workers) {
    BpShare share;
    share.first = (u64)begin + cta + (u64)ctas * worker;
    share.end = end;
    share.step = ctas * workers;
    return share;
}

// A place in a permuting copy: the addresses of a unit and its index tuple.
typedef struct {
    u64 src, dst;
    u32 block;
    u32 inner;                  // index on the last axis
    u32 outer[BP_AXES_MAX - 1]; // indices on the axes before it
} BpPlace;

BP_FN void bp_enter_block(const BpPermute *p, BpPlace *at) {
    at->src = p->src + bp_id(p->ids, p->src_ids, p->src_first, at->block) * p->src_block;
    at->dst = p->dst + bp_id(p->ids, p->dst_ids, p->dst_first, at->block) * p->dst_block;
}

// The place of unit `unit`, by division. There is at least one axis, and no count is 0. A place beyond the
// last unit has no addresses, and nobody may use them.
BP_FN BpPlace bp_unit(const BpPermute *p, u64 unit) {
    u64 per_block = 1;
    for (u32 k = 0; k < p->axes; k++) per_block *= p->axis[k].count;
    BpPlace at;
    at.block = (u32)(unit / per_block);
    u64 rest = unit % per_block;
    at.src = at.dst = 0;
    if (at.block < p->blocks) bp_enter_block(p, &at);
    const BpAxis *last = &p->axis[p->axes - 1];
    at.inner = (u32)(rest % last->count);
    rest /= last->count;
    at.src += at.inner * last->src_stride;
    at.dst += at.inner * last->dst_stride;
    BP_UNROLL
    for (u32 k = BP_AXES_MAX - 1; k-- > 0;) {
        at.outer[k] = 0;
        if (k + 1 < p->axes) {
            at.outer[k] = (u32)(rest % p->axis[k].count);
            rest /= p->axis[k].count;
            at.src += at.outer[k] * p->axis[k].src_stride;
            at.dst += at.outer[k] * p->axis[k].dst_stride;
        }
    }
    return at;
}

// `units` further on: additions, and a carry where the last axis ends.
BP_FN void bp_advance(const BpPermute *p, BpPlace *at, u32 units) {
    const BpAxis *last = &p->axis[p->axes - 1];
    at->inner += units;
    at->src += units * last->src_stride;
    at->dst += units * last->dst_stride;
    while (at->inner >= last->count) {
        at->inner -= last->count;
        u32 carry = 1;
        BP_UNROLL
        for (u32 k = BP_AXES_MAX - 1; k-- > 0;) {
            if (carry && k + 1 < p->axes) {
                at->src += p->axis[k].src_stride;
                at->dst += p->axis[k].dst_stride;
                carry = ++at->outer[k] == p->axis[k].count;
                if (carry) {
                    at->outer[k] = 0;
                    at->src -= p->axis[k].count * p->axis[k].src_stride;
                    at->dst -= p->axis[k].count * p->axis[k].dst_stride;
                }
            }
        }
        at->src -= last->count * last->src_stride;
        at->dst -= last->count * last->dst_stride;
        if (carry) {
            at->block++;
            if (at->block < p->blocks) bp_enter_block(p, at);
            at->src += at->inner * last->src_stride;
            at->dst += at->inner * last->dst_stride;
        }
    }
}

// How many lanes of a warp share one run of `vectors` vectors. Whole lines of 128 bytes (8 vectors of 16)
// per run where it has them, so that no lane is idle and no line is split.
BP_FN u32 bp_run_lanes(u32 vectors) {
    if (vectors % 32 == 0) return 32;
    if (vectors % 16 == 0) return 16;
    if (vectors % 8 == 0) return 8;
    return vectors < 32 ? vectors : 32;
}

#endif

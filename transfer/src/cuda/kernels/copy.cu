// Copies of block sets that keep the order of the bytes.
#include "abi.cuh"
#include "walk.cuh"
#include "done.cuh"
#include "access.cuh"

// Where a chunk of the operation comes from and goes to. `set` is the caller's place in the set table.
static __device__ __forceinline__ BpSpan bp_locate(const BpCopy &p, u32 &set, u32 chunk) {
    if (p.set_count == 1) return bp_chunk(&p.one, p.ids, p.chunk_bytes, chunk);
    set = bp_find_set(p.sets, p.set_count, set, chunk);
    return bp_chunk(p.sets + set, p.ids, p.chunk_bytes, chunk);
}

// The warp copies `bytes`, a multiple of sizeof(V), between addresses that V divides, through registers.
template <typename V> static __device__ __forceinline__ void bp_warp_vectors(u64 src, u64 dst, u32 bytes) {
    const u32 row = 32 * sizeof(V);
#pragma unroll 1
    for (u32 at = threadIdx.x % 32 * sizeof(V); at < bytes; at += BP_IN_FLIGHT * row) {
        V held[BP_IN_FLIGHT];
        BP_UNROLL
        for (u32 k = 0; k < BP_IN_FLIGHT; k++)
            if (at + k * row < bytes) held[k] = bp_load<V>(src + at + k * row);
        BP_UNROLL
        for (u32 k = 0; k < BP_IN_FLIGHT; k++)
            if (at + k * row < bytes) bp_store(dst + at + k * row, held[k]);
    }
}

// The same for vectors of 16 bytes through slots of shared memory.
static __device__ __forceinline__ void bp_warp_slots(u64 src, u64 dst, u32 bytes) {
    u32 slots = bp_my_slots();
#pragma unroll 1
    for (u32 at = threadIdx.x % 32 * 16; at < bytes; at += BP_ROWS * 512) {
        BP_UNROLL
        for (u32 k = 0; k < BP_ROWS; k++)
            if (at + k * 512 < bytes) bp_fetch(slots + k * 512, src + at + k * 512);
        bp_fetched();
        BP_UNROLL
        for (u32 k = 0; k < BP_ROWS; k++)
            if (at + k * 512 < bytes) bp_store(dst + at + k * 512, bp_take(slots + k * 512));
    }
}

// The warp copies any bytes between addresses that are equal modulo sizeof(V): bytes up to the first
// vector and after the last.
template <typename V, bool SLOTS> static __device__ __forceinline__ void bp_warp_copy(u64 src, u64 dst, u32 bytes) {
    u32 lane = threadIdx.x % 32, head = (u32)(-src & (sizeof(V) - 1));
    if (head > bytes) head = bytes;
    u32 body = (bytes - head) & ~(u32)(sizeof(V) - 1), tail = bytes - head - body;
    if (lane < head) bp_store(dst + lane, bp_load<u8>(src + lane));
    if (lane < tail) bp_store(dst + head + body + lane, bp_load<u8>(src + head + body + lane));
    if (SLOTS) bp_warp_slots(src + head, dst + head, body);
    else bp_warp_vectors<V>(src + head, dst + head, body);
}

// The lanes of a warp each find one chunk; then the warp copies these chunks one by one, in the widest
// vectors that the distance between the addresses allows.
template <bool SLOTS> static __device__ __forceinline__ void bp_copy_chunks(const BpCopy &p) {
    u32 lane = threadIdx.x % 32, set = 0;
    BpShare share = bp_share(p.chunk_begin, p.chunk_end, blockIdx.x, gridDim.x, threadIdx.x / 32, blockDim.x / 32);
#pragma unroll 1
    for (u64 base = share.first; base < share.end; base += 32ull * share.step) {
        u64 chunk = base + (u64)lane * share.step;
        BpSpan mine = {0, 0, 0};
        if (chunk < share.end) mine = bp_locate(p, set, (u32)chunk);
#pragma unroll 1
        for (u32 k = 0; k < 32 && base + (u64)k * share.step < share.end; k++) {
            u64 src = __shfl_sync(0xffffffff, mine.src, k), dst = __shfl_sync(0xffffffff, mine.dst, k);
            u32 bytes = __shfl_sync(0xffffffff, mine.bytes, k), apart = (u32)(src - dst);
            if (apart % 16 == 0) bp_warp_copy<Bytes16, SLOTS>(src, dst, bytes);
            else if (apart % 8 == 0) bp_warp_copy<Bytes8, false>(src, dst, bytes);
            else if (apart % 4 == 0) bp_warp_copy<u32, false>(src, dst, bytes);
            else bp_warp_vectors<u8>(src, dst, bytes);
        }
    }
}

// Any alignment, any device. Dynamic shared memory is BP_ROWS rows for each warp.
extern "C" __global__ void __launch_bounds__(768) bp_copy_lanes(const __grid_constant__ BpCopy p) {
    bool go = bp_begin(p.done);
    if (go) bp_copy_chunks<true>(p);
    bp_end(p.done, go);
}

// The same without shared memory, for copies that are over before more could be in flight.
extern "C" __global__ void __launch_bounds__(1024) bp_copy_small(const __grid_constant__ BpCopy p) {
    bool go = bp_begin(p.done);
    if (go) bp_copy_chunks<false>(p);
    bp_end(p.done, go);
}

#if __CUDA_ARCH__ >= 900

#define BP_STAGES_MAX 48
// Lanes of a warp that own a stage. Lanes of one warp wait for each other, warps do not: a few lanes in
// many warps keep loads going while others store.
#define BP_STAGES_PER_WARP 4

static __device__ __forceinline__ void bp_bulk_load(u32 stage, u32 barrier, const BpSpan &span) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(span.bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(stage), "l"(span.src),
                 "r"(span.bytes), "r"(barrier)
                 : "memory");
}

static __device__ __forceinline__ void bp_bulk_wait(u32 barrier, u32 parity) {
    u32 ready;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(ready)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (!ready);
}

static __device__ __forceinline__ void bp_bulk_store(u32 stage, const BpSpan &span) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(span.dst), "r"(stage), "r"(span.bytes) : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Devices with bulk copies; 16 divides all addresses, strides and lengths. Every lane that copies owns a
// stage of shared memory and moves its own chunks through it, finding the next one while the present one
// is under way. Dynamic shared memory is chunk_bytes for each stage.
extern "C" __global__ void __launch_bounds__(32 * BP_STAGES_MAX / BP_STAGES_PER_WARP) bp_copy_bulk(const __grid_constant__ BpCopy p) {
    __shared__ __align__(8) u64 barriers[BP_STAGES_MAX];
    bool go = bp_begin(p.done);
    u32 lane = threadIdx.x % 32, me = threadIdx.x / 32 * BP_STAGES_PER_WARP + lane;
    BpShare share = bp_share(p.chunk_begin, p.chunk_end, blockIdx.x, gridDim.x, me, blockDim.x / 32 * BP_STAGES_PER_WARP);
    u64 chunk = share.first;
    if (go && lane < BP_STAGES_PER_WARP && chunk < share.end) {
        u32 stage = (u32)__cvta_generic_to_shared(bp_shared) + me * p.chunk_bytes;
        u32 barrier = (u32)__cvta_generic_to_shared(barriers + me);
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        u32 set = 0, parity = 0;
        BpSpan span = bp_locate(p, set, (u32)chunk);
        for (;;) {
            bp_bulk_load(stage, barrier, span);
            chunk += share.step;
            BpSpan next = span;
            if (chunk < share.end) next = bp_locate(p, set, (u32)chunk);
            bp_bulk_wait(barrier, parity);
            bp_bulk_store(stage, span);
            if (chunk >= share.end) break;
            parity ^= 1;
            span = next;
            // The stage has been read.
            asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        }
        // All bytes have been written.
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
    bp_end(p.done, go);
}

#endif

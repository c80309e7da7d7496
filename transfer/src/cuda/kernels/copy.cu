// Copies of block sets that keep the order of the bytes.
#include "abi.cuh"
#include "walk.cuh"
#include "done.cuh"
#include "access.cuh"

#ifndef BP_LANES_ORDER
#define BP_LANES_ORDER 3
#endif
#ifndef BP_BULK_ORDER
#define BP_BULK_ORDER 0
#endif

// Where a chunk of the operation comes from and goes to. `set` is the caller's place in the set table.
static __device__ __forceinline__ BpSpan bp_locate(const BpCopy &p, u32 &set, u32 chunk) {
    if (p.set_count == 1) return bp_chunk(&p.one, p.ids, p.chunk_bytes, chunk);
    set = bp_find_set(p.sets, p.set_count, set, chunk);
    return bp_chunk(p.sets + set, p.ids, p.chunk_bytes, chunk);
}

// The warp copies `bytes`, a multiple of sizeof(V), between addresses that V divides.
template <typename V> static __device__ __forceinline__ void bp_warp_vectors(u64 src, u64 dst, u32 bytes, u32 lane) {
    const u32 step = 32 * sizeof(V);
    u64 from = src + lane * sizeof(V), to = dst + lane * sizeof(V);
    V held[BP_IN_FLIGHT];
#pragma unroll 1
    for (; bytes >= BP_IN_FLIGHT * step; bytes -= BP_IN_FLIGHT * step) {
        BP_UNROLL
        for (u32 k = 0; k < BP_IN_FLIGHT; k++) held[k] = bp_load<V>(from + k * step);
        BP_UNROLL
        for (u32 k = 0; k < BP_IN_FLIGHT; k++) bp_store(to + k * step, held[k]);
        from += BP_IN_FLIGHT * step;
        to += BP_IN_FLIGHT * step;
    }
    u32 mine = lane * sizeof(V);
    BP_UNROLL
    for (u32 k = 0; k < BP_IN_FLIGHT; k++)
        if (mine + k * step < bytes) held[k] = bp_load<V>(from + k * step);
    BP_UNROLL
    for (u32 k = 0; k < BP_IN_FLIGHT; k++)
        if (mine + k * step < bytes) bp_store(to + k * step, held[k]);
}

#if BP_ASYNC_DEPTH
template <> __device__ __forceinline__ void bp_warp_vectors<Bytes16>(u64 src, u64 dst, u32 bytes, u32 lane) {
    u32 slots = bp_my_slots();
    for (u32 base = lane * 16; base < bytes; base += BP_ASYNC_DEPTH * 512) {
        BP_UNROLL
        for (u32 k = 0; k < BP_ASYNC_DEPTH; k++)
            if (base + k * 512 < bytes) bp_fetch(slots + k * 512, src + base + k * 512);
        bp_fetched();
        BP_UNROLL
        for (u32 k = 0; k < BP_ASYNC_DEPTH; k++)
            if (base + k * 512 < bytes) bp_store(dst + base + k * 512, bp_take(slots + k * 512));
    }
}
#endif

// The warp copies any bytes between addresses that are equal modulo sizeof(V): bytes up to the first
// vector and after the last.
template <typename V> static __device__ __forceinline__ void bp_warp_copy(u64 src, u64 dst, u32 bytes, u32 lane) {
    u32 head = (u32)(-src & (sizeof(V) - 1));
    if (head > bytes) head = bytes;
    u32 body = (bytes - head) & ~(u32)(sizeof(V) - 1);
    u32 tail = bytes - head - body;
    if (lane < head) bp_store(dst + lane, bp_load<u8>(src + lane));
    if (lane < tail) bp_store(dst + head + body + lane, bp_load<u8>(src + head + body + lane));
    bp_warp_vectors<V>(src + head, dst + head, body, lane);
}

// Any alignment, any device. Lanes of a warp each find one chunk; then the warp copies them one by one.
extern "C" __global__ void __launch_bounds__(BP_THREADS) bp_copy_lanes(const __grid_constant__ BpCopy p) {
    bool go = bp_begin(p.done);
    if (go) {
        u32 lane = threadIdx.x % 32, set = 0;
        BpShare share = bp_share(BP_LANES_ORDER, p.chunk_begin, p.chunk_end, blockIdx.x, gridDim.x, threadIdx.x / 32, blockDim.x / 32);
        for (u64 base = share.first; base < share.end; base += 32ull * share.step) {
            u64 chunk = base + (u64)lane * share.step;
            BpSpan mine = {0, 0, 0};
            if (chunk < share.end) mine = bp_locate(p, set, (u32)chunk);
#pragma unroll 1
            for (u32 k = 0; k < 32 && base + (u64)k * share.step < share.end; k++) {
                u64 src = __shfl_sync(0xffffffff, mine.src, k), dst = __shfl_sync(0xffffffff, mine.dst, k);
                u32 bytes = __shfl_sync(0xffffffff, mine.bytes, k);
                u32 apart = (u32)(src - dst);
                if (apart % 16 == 0) bp_warp_copy<Bytes16>(src, dst, bytes, lane);
                else if (apart % 8 == 0) bp_warp_copy<Bytes8>(src, dst, bytes, lane);
                else if (apart % 4 == 0) bp_warp_copy<u32>(src, dst, bytes, lane);
                else bp_warp_vectors<u8>(src, dst, bytes, lane);
            }
        }
    }
    bp_end(p.done, go);
}

#if __CUDA_ARCH__ >= 900

#define BP_BULK_LANES_MAX 256
#ifndef BP_BULK_STAGES
#define BP_BULK_STAGES 1 // stages a lane
#endif
#ifndef BP_LANES_PER_WARP
#define BP_LANES_PER_WARP 32 // lanes of a warp that copy
#endif

static __device__ __forceinline__ void bp_bulk_load(u32 stage, u32 barrier, const BpSpan &span) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(span.bytes) : "memory");
#ifdef BP_EVICT_FIRST
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(stage),
                 "l"(span.src), "r"(span.bytes), "r"(barrier), "l"(policy)
                 : "memory");
#else
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(stage), "l"(span.src),
                 "r"(span.bytes), "r"(barrier)
                 : "memory");
#endif
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
#ifdef BP_EVICT_FIRST
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(span.dst), "r"(stage), "r"(span.bytes), "l"(policy)
                 : "memory");
#else
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(span.dst), "r"(stage), "r"(span.bytes) : "memory");
#endif
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Devices with bulk copies; 16 divides all addresses, strides and lengths. Every lane owns a stage of
// shared memory and moves its own chunks through it: a CTA keeps as many chunks in flight as it has lanes,
// and the address arithmetic of one lane hides behind the copies of the others. Dynamic shared memory is
// chunk_bytes for each stage.
extern "C" __global__ void __launch_bounds__(512) bp_copy_bulk(const __grid_constant__ BpCopy p) {
    extern __shared__ __align__(128) u8 bp_slots[];
    __shared__ __align__(8) u64 barriers[BP_BULK_LANES_MAX * BP_BULK_STAGES];
    bool go = bp_begin(p.done);
#if BP_LANES_PER_WARP < 32
    u32 me = threadIdx.x / 32 * BP_LANES_PER_WARP + threadIdx.x % 32, lanes = blockDim.x / 32 * BP_LANES_PER_WARP;
    bool copies = threadIdx.x % 32 < BP_LANES_PER_WARP;
#else
    u32 me = threadIdx.x, lanes = blockDim.x;
    const bool copies = true;
#endif
    // In 64 bits: a step of all lanes may go beyond 2^32.
    BpShare share = bp_share(BP_BULK_ORDER, p.chunk_begin, p.chunk_end, blockIdx.x, gridDim.x, me, lanes);
    u64 chunk = share.first;
    if (go && copies && chunk < share.end) {
        u32 stage = (u32)__cvta_generic_to_shared(bp_slots) + me * BP_BULK_STAGES * p.chunk_bytes;
        u32 barrier = (u32)__cvta_generic_to_shared(barriers + me * BP_BULK_STAGES);
        BP_UNROLL
        for (u32 k = 0; k < BP_BULK_STAGES; k++)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier + 8 * k) : "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        u32 set = 0, parity = 0;
        BpSpan span = bp_locate(p, set, (u32)chunk);
#if BP_BULK_STAGES == 1
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
#else
        u32 now = 0;
        bp_bulk_load(stage, barrier, span);
        for (;;) {
            chunk += share.step;
            BpSpan next = span;
            u32 then = now + 1 == BP_BULK_STAGES ? 0 : now + 1;
            if (chunk < share.end) {
                next = bp_locate(p, set, (u32)chunk);
                // The stage that is loaded next has been read.
                asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(BP_BULK_STAGES - 2) : "memory");
                bp_bulk_load(stage + then * p.chunk_bytes, barrier + 8 * then, next);
            }
            bp_bulk_wait(barrier + 8 * now, parity);
            bp_bulk_store(stage + now * p.chunk_bytes, span);
            if (chunk >= share.end) break;
            if (then == 0) parity ^= 1;
            now = then;
            span = next;
        }
#endif
        // All bytes have been written.
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
    bp_end(p.done, go);
}

#endif

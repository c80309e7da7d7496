// Copies that change the order of the bytes: from one layout of keys and values to another.
#include "abi.cuh"
#include "walk.cuh"
#include "done.cuh"
#include "access.cuh"

// What one lane of a warp does with the 32 units that the lanes have found: the vector at `offset` of every
// `groups`th run, from run `group` on. Lanes without a vector are idle; they take part in the exchange of
// addresses all the same.
struct BpLane {
    u32 group, groups, count, offset;
    bool idle;

    __device__ __forceinline__ bool has(u32 run) const { return !idle && run < count; }
};

template <typename V> static __device__ __forceinline__ void bp_runs(const BpPlace &at, const BpLane &lane) {
#pragma unroll 1
    for (u32 low = lane.group; low - lane.group < lane.count; low += BP_IN_FLIGHT * lane.groups) {
        V held[BP_IN_FLIGHT];
        BP_UNROLL
        for (u32 k = 0; k < BP_IN_FLIGHT; k++) {
            u32 run = low + k * lane.groups;
            u64 src = __shfl_sync(0xffffffff, at.src, run);
            if (lane.has(run)) held[k] = bp_load<V>(src + lane.offset);
        }
        BP_UNROLL
        for (u32 k = 0; k < BP_IN_FLIGHT; k++) {
            u32 run = low + k * lane.groups;
            u64 dst = __shfl_sync(0xffffffff, at.dst, run);
            if (lane.has(run)) bp_store(dst + lane.offset, held[k]);
        }
    }
}

template <> __device__ __forceinline__ void bp_runs<Bytes16>(const BpPlace &at, const BpLane &lane) {
    u32 slots = bp_my_slots();
#pragma unroll 1
    for (u32 low = lane.group; low - lane.group < lane.count; low += BP_ROWS * lane.groups) {
        BP_UNROLL
        for (u32 k = 0; k < BP_ROWS; k++) {
            u32 run = low + k * lane.groups;
            u64 src = __shfl_sync(0xffffffff, at.src, run);
            if (lane.has(run)) bp_fetch(slots + k * 512, src + lane.offset);
        }
        bp_fetched();
        BP_UNROLL
        for (u32 k = 0; k < BP_ROWS; k++) {
            u32 run = low + k * lane.groups;
            u64 dst = __shfl_sync(0xffffffff, at.dst, run);
            if (lane.has(run)) bp_store(dst + lane.offset, bp_take(slots + k * 512));
        }
    }
}

// Every warp copies a range of units of its own. Its lanes each find one unit, the first by division and
// the others by addition; then the warp copies these 32 runs, neighbouring lanes neighbouring vectors of a
// run and then neighbouring runs, so that writes leave as whole lines when the host orders the axes by dst.
template <typename V> static __device__ __forceinline__ void bp_permute_vectors(const BpPermute &p) {
    u32 width = bp_run_lanes(p.run_bytes / sizeof(V)), lane = threadIdx.x % 32;
    BpLane me;
    me.groups = 32 / width;
    me.group = lane / width;
    u64 warps = (u64)gridDim.x * (blockDim.x / 32), warp = blockIdx.x + (u64)gridDim.x * (threadIdx.x / 32);
    u64 each = (p.unit_end - p.unit_begin + warps - 1) / warps;
    u64 unit = p.unit_begin + warp * each, end = unit + each < p.unit_end ? unit + each : p.unit_end;
    if (unit >= end) return;
    BpPlace at = bp_unit(&p, unit + lane);
#pragma unroll 1
    while (unit < end) {
        me.count = end - unit < 32 ? (u32)(end - unit) : 32;
#pragma unroll 1
        for (u32 pass = 0; pass < p.run_bytes; pass += width * sizeof(V)) {
            me.offset = pass + lane % width * sizeof(V);
            me.idle = me.group >= me.groups || me.offset >= p.run_bytes;
            bp_runs<V>(at, me);
        }
        unit += 32;
        bp_advance(&p, &at, 32);
    }
}

// vector_bytes divides all addresses, strides and run_bytes. Dynamic shared memory is BP_ROWS rows for each
// warp.
extern "C" __global__ void __launch_bounds__(768) bp_permute(const __grid_constant__ BpPermute p) {
    bool go = bp_begin(p.done);
    if (go) {
        switch (p.vector_bytes) {
        case 16: bp_permute_vectors<Bytes16>(p); break;
        case 8: bp_permute_vectors<Bytes8>(p); break;
        case 4: bp_permute_vectors<u32>(p); break;
        case 2: bp_permute_vectors<u16>(p); break;
        default: bp_permute_vectors<u8>(p);
        }
    }
    bp_end(p.done, go);
}

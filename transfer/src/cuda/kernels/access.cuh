// Loads and stores that stream: every byte is touched once, so nothing is kept in L1.
#ifndef BP_ACCESS
#define BP_ACCESS

// Loads of one thread in flight in registers.
#define BP_IN_FLIGHT 4
// Rows of 512 bytes that a warp fetches into its slots of shared memory at a time: 8 KiB a warp.
#define BP_ROWS 16

struct Bytes16 {
    u32 a, b, c, d;
};
struct Bytes8 {
    u32 a, b;
};

template <typename V> static __device__ __forceinline__ V bp_load(u64 at);
template <> __device__ __forceinline__ Bytes16 bp_load(u64 at) {
    Bytes16 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.a), "=r"(v.b), "=r"(v.c), "=r"(v.d)
                 : "l"(at));
    return v;
}
template <> __device__ __forceinline__ Bytes8 bp_load(u64 at) {
    Bytes8 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.a), "=r"(v.b) : "l"(at));
    return v;
}
template <> __device__ __forceinline__ u32 bp_load(u64 at) {
    u32 v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(at));
    return v;
}
template <> __device__ __forceinline__ u16 bp_load(u64 at) {
    u16 v;
    asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(at));
    return v;
}
template <> __device__ __forceinline__ u8 bp_load(u64 at) {
    u32 v;
    asm volatile("ld.global.nc.L1::no_allocate.u8 %0, [%1];" : "=r"(v) : "l"(at));
    return (u8)v;
}

// Slots of shared memory keep more in flight than registers can: a lane's are 16 bytes each, one per row,
// and only that lane uses them, so that it waits for nobody else.
extern __shared__ __align__(128) u8 bp_shared[];

static __device__ __forceinline__ u32 bp_my_slots() {
    return (u32)__cvta_generic_to_shared(bp_shared) + threadIdx.x / 32 * BP_ROWS * 512 + threadIdx.x % 32 * 16;
}
static __device__ __forceinline__ void bp_fetch(u32 slot, u64 at) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(slot), "l"(at) : "memory");
}
// All that this lane has fetched is there.
static __device__ __forceinline__ void bp_fetched() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}
static __device__ __forceinline__ Bytes16 bp_take(u32 slot) {
    Bytes16 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.a), "=r"(v.b), "=r"(v.c), "=r"(v.d) : "r"(slot) : "memory");
    return v;
}

static __device__ __forceinline__ void bp_store(u64 at, Bytes16 v) {
    asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.a), "r"(v.b), "r"(v.c), "r"(v.d)
                 : "memory");
}
static __device__ __forceinline__ void bp_store(u64 at, Bytes8 v) {
    asm volatile("st.global.L1::no_allocate.v2.u32 [%0], {%1, %2};" ::"l"(at), "r"(v.a), "r"(v.b) : "memory");
}
static __device__ __forceinline__ void bp_store(u64 at, u32 v) {
    asm volatile("st.global.L1::no_allocate.u32 [%0], %1;" ::"l"(at), "r"(v) : "memory");
}
static __device__ __forceinline__ void bp_store(u64 at, u16 v) {
    asm volatile("st.global.L1::no_allocate.u16 [%0], %1;" ::"l"(at), "h"(v) : "memory");
}
static __device__ __forceinline__ void bp_store(u64 at, u8 v) {
    asm volatile("st.global.L1::no_allocate.u8 [%0], %1;" ::"l"(at), "r"((u32)v) : "memory");
}

#endif

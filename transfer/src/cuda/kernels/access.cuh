// Loads and stores that stream: every byte is touched once, so nothing is kept in L1.
#ifndef BP_ACCESS
#define BP_ACCESS

// Threads of a CTA, at most, and loads of one thread in flight: 128 bytes a thread, 64 KiB an SM. A peer's
// memory is 1.2 us away, so this keeps 50 GB/s an SM going.
#ifndef BP_THREADS
#define BP_THREADS 512
#endif
#ifndef BP_ASYNC_DEPTH
#define BP_ASYNC_DEPTH 0
#endif
#ifndef BP_IN_FLIGHT
#define BP_IN_FLIGHT 8
#endif

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

#if BP_ASYNC_DEPTH
extern __shared__ __align__(128) u8 bp_slots[];
// The lane's slots of shared memory: BP_ASYNC_DEPTH of 16 bytes, 512 apart.
static __device__ __forceinline__ u32 bp_my_slots() {
    return (u32)__cvta_generic_to_shared(bp_slots) + threadIdx.x / 32 * BP_ASYNC_DEPTH * 512 + threadIdx.x % 32 * 16;
}
static __device__ __forceinline__ void bp_fetch(u32 slot, u64 at) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(slot), "l"(at) : "memory");
}
static __device__ __forceinline__ void bp_fetched() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}
static __device__ __forceinline__ Bytes16 bp_take(u32 slot) {
    Bytes16 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.a), "=r"(v.b), "=r"(v.c), "=r"(v.d) : "r"(slot) : "memory");
    return v;
}
#endif

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

// The beginning and the end of every kernel: agreeing with the host whether to start, and telling it,
// after all bytes, that the launch is over.
#ifndef BP_DONE
#define BP_DONE

// Whether this CTA may touch memory. Guarded launches and the host each store one word and then read the
// other's, with a full fence between (Dekker): when the host has stored `abort` and then reads `started`
// as 0, no CTA of this launch touches a byte. All threads of the CTA call this.
static __device__ __forceinline__ bool bp_begin(const BpDone &done) {
    if (!done.guarded) return true;
    __shared__ u32 abort;
    if (threadIdx.x == 0) {
        u32 seen;
        asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(done.word + 1), "r"(done.ticket) : "memory");
        asm volatile("fence.sc.sys;" ::: "memory");
        asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(done.word) : "memory");
        abort = seen;
    }
    __syncthreads();
    return abort == 0;
}

// The end of the CTA's part; the last CTA of the launch publishes. All threads of the CTA call this, each
// after its own copies have completed. Bulk copies whose completion a thread has waited for (wait_group,
// not wait_group.read) are followed by an implicit fence between the proxies, so they need no other here:
// the barrier orders them before thread 0, its fences before the flag, for every observer in the system.
static __device__ __forceinline__ void bp_end(const BpDone &done, bool went) {
    __syncthreads();
    if (threadIdx.x != 0) return;
    // The low half counts CTAs, the high half those that touched nothing.
    u32 mine = went ? 1 : 0x10001, before;
    asm volatile("fence.acq_rel.sys;" ::: "memory");
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(done.arrived), "r"(mine) : "memory");
    if ((before & 0xffff) + 1 != gridDim.x) return;
    asm volatile("fence.acq_rel.sys;" ::: "memory");
    u32 value = done.ticket | ((before + mine) >> 16 ? BP_CALLED_OFF : 0);
    asm volatile("st.relaxed.gpu.global.u32 [%0], 0;" ::"l"(done.arrived) : "memory");
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(done.flag), "r"(value) : "memory");
}

#endif

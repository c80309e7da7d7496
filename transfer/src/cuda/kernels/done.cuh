// The beginning and the end of every kernel: agreeing with the host whether to start, and telling it,
// after all bytes, that the launch is over.
#ifndef BP_DONE
#define BP_DONE

// Whether this launch may touch memory. In a guarded launch CTA 0 and the host each store one word and
// then read the other's, with a full fence between (Dekker): when the host has stored `abort` and then
// reads that the launch has not `started`, no CTA of it touches a byte. The other CTAs take the answer of
// CTA 0, tagged with the ticket, from device memory: only one CTA reads over the bus. They may wait for
// it because the CTAs of a launch fit on the device together. All threads of the CTA call this.
static __device__ __forceinline__ bool bp_begin(const BpDone &done) {
    if (!done.guarded) return true;
    __shared__ u32 shared;
    if (threadIdx.x == 0) {
        u32 answer;
        if (blockIdx.x == 0) {
            u32 abort;
            asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(done.word + 1), "r"(done.ticket) : "memory");
            asm volatile("fence.sc.sys;" ::: "memory");
            asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(abort) : "l"(done.word) : "memory");
            answer = done.ticket * 2 + (abort == 0);
            asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(done.arrived + 1), "r"(answer) : "memory");
        } else {
            do {
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(answer) : "l"(done.arrived + 1) : "memory");
            } while (answer / 2 != done.ticket);
        }
        shared = answer & 1;
    }
    __syncthreads();
    return shared != 0;
}

// The end of the CTA's part; the last CTA of the launch publishes. All threads of the CTA call this, each
// after its own copies have completed. Bulk copies whose completion a thread has waited for (wait_group,
// not wait_group.read) are followed by an implicit fence between the proxies, so they need no other here.
// The barrier orders the CTA's bytes before thread 0, the fence and the counter before the last CTA, and
// its release before the flag, for every observer in the system. A single CTA needs no counter.
static __device__ __forceinline__ void bp_end(const BpDone &done, bool went) {
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (gridDim.x > 1) {
        u32 before;
        asm volatile("fence.acq_rel.sys;" ::: "memory");
        asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(done.arrived) : "memory");
        if (before + 1 != gridDim.x) return;
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
        asm volatile("st.relaxed.gpu.global.u32 [%0], 0;" ::"l"(done.arrived) : "memory");
    }
    u32 value = done.ticket | (went ? 0 : BP_CALLED_OFF);
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(done.flag), "r"(value) : "memory");
}

#endif

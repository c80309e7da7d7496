// What the host passes to the kernels. The same structs are in abi.rs; sizes are checked on both sides.
// Plain C11 as well as CUDA C++, so that walk.cuh can be tested with the host's compiler.
#ifndef BP_ABI
#define BP_ABI

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define BP_CONSECUTIVE 0xffffffffu // in place of an index into the id table
#define BP_CALLED_OFF 0x80000000u  // set in the flag when the launch touched nothing
#define BP_AXES_MAX 6

// A pair of block sets of one shape. Its chunks are numbered from `first_chunk`: chunk c of the set is
// piece c / chunks_per_piece at offset (c % chunks_per_piece) * chunk_bytes; the last one may be shorter.
typedef struct {
    u64 src, dst;             // address of block 0, first layer of the range
    u64 src_block, dst_block; // bytes from block to block
    u64 src_layer, dst_layer; // bytes from layer to layer
    u64 piece_bytes;          // contiguous bytes of one piece, on both sides
    u32 src_ids, dst_ids;     // index of the first id in the id table, or BP_CONSECUTIVE
    u32 src_first, dst_first; // the first id when ids are consecutive
    u32 blocks, layers;       // pieces = blocks * layers
    u32 layer_major;          // 0: layers are innermost; 1: blocks are innermost
    u32 chunks_per_piece;     // ceil(piece_bytes / chunk_bytes)
    u32 first_chunk;          // number of the set's first chunk in the operation
    u32 reserved;             // 0
} BpSet;

// How the end of a launch becomes known.
typedef struct {
    u32 *arrived;       // two device words of this slot: [0] CTAs at the end, 0 before and after; [1] the answer to CTA 0
    u32 *flag;          // pinned host word: `ticket`, or with BP_CALLED_OFF, after all bytes
    volatile u32 *word; // pinned host words: [0] abort (the host stores 1), [1] started (the kernel stores ticket)
    u32 ticket;         // below BP_CALLED_OFF, and another one than at the slot's last launch
    u32 guarded;        // 1: agree with the host on the start before a byte is touched
} BpDone;

typedef struct {
    BpSet one;               // used when set_count is 1
    const BpSet *sets;       // ascending by first_chunk; used otherwise
    const u32 *ids;          // the id table
    u32 set_count;
    u32 chunk_bytes;
    u32 chunk_begin, chunk_end; // this launch copies chunks begin..end of the operation
    BpDone done;
} BpCopy;

typedef struct {
    u64 src_stride, dst_stride; // bytes
    u32 count;
    u32 reserved; // 0
} BpAxis;

// A copy that changes the order. Unit u is one run of contiguous bytes: block u / (product of counts), and
// within the block the index tuple of the rest, axis[0] outermost.
typedef struct {
    u64 src, dst;             // address of block 0
    u64 src_block, dst_block; // bytes from block to block
    u32 src_ids, dst_ids, src_first, dst_first; // as in BpSet
    u32 blocks;
    u32 axes;
    BpAxis axis[BP_AXES_MAX];
    u32 run_bytes;
    u32 vector_bytes;         // 16, 8, 4, 2 or 1: divides addresses, strides and run_bytes
    const u32 *ids;
    u64 unit_begin, unit_end; // this launch copies units begin..end
    BpDone done;
} BpPermute;

#ifdef __cplusplus
#define BP_ASSERT(condition) static_assert(condition, #condition)
#else
#define BP_ASSERT(condition) _Static_assert(condition, #condition)
#endif
BP_ASSERT(sizeof(BpSet) == 96);
BP_ASSERT(sizeof(BpDone) == 32);
BP_ASSERT(sizeof(BpCopy) == 160);
BP_ASSERT(sizeof(BpAxis) == 24);
BP_ASSERT(sizeof(BpPermute) == 264);

#endif

//! Memory of a peer on this host: what is not an arena is copied by the kernel and kept by the peer
//! until nobody copies there; what is one can be looked at in place.

use std::ptr::NonNull;
use std::time::Duration;

use blockplane_transfer::{
    BlockLayout, HostMemory, Lane, MapError, Op, PostError, PostOptions, RemoteAccess,
    RemoteBlocks, TransferError, WindowAccess, WindowScope,
};

use crate::support::{Blocks, Setup, WAIT, arena, arena_with, bytes, fill};

#[test]
fn the_kernel_copies_into_memory_that_is_not_an_arena() {
    let pair = Setup::new(Lane::Shm).pair();
    let local = arena(&pair.a, 40 * 5000);
    let remote = pair
        .b
        .register(vec![0; 40 * 5000], RemoteAccess::Open)
        .unwrap();
    fill(&local, 3);
    let ids: Vec<u32> = (0..40).rev().collect();
    let side = Blocks::flat(40, 5000, &ids);
    let prepared = pair
        .prepare(Op::Write, (&local, &side), (&remote, &side), None)
        .unwrap();
    let reason = prepared.plan().reason.clone();
    assert!(reason.contains("process_vm"), "{reason}");
    prepared
        .post(PostOptions::within(WAIT))
        .unwrap()
        .wait(WAIT)
        .unwrap();
    assert_eq!(bytes(&remote), bytes(&local));
}

#[test]
fn memory_stays_until_peers_do_not_copy_there() {
    let pair = Setup::new(Lane::Shm).pair();
    let mut owned = vec![7u8; 8000].into_boxed_slice();
    let base = NonNull::new(owned.as_mut_ptr()).unwrap();
    // SAFETY: `owned` outlives the registration, which is closed below, and is not used before.
    let memory = unsafe { HostMemory::from_raw(base, 8000) };
    let remote = pair.b.register(memory, RemoteAccess::Open).unwrap();
    let local = arena(&pair.a, 8000);
    let side = Blocks::flat(8, 1000, &[0, 1, 2, 3, 4, 5, 6, 7]);
    let prepared = pair
        .prepare(Op::Read, (&local, &side), (&remote, &side), None)
        .unwrap();
    prepared
        .post(PostOptions::within(WAIT))
        .unwrap()
        .wait(WAIT)
        .unwrap();
    assert_eq!(bytes(&local), vec![7; 8000]);
    // Another handle of the registration keeps it.
    let other = remote.clone();
    let busy = remote.close(Duration::from_millis(1)).unwrap_err();
    assert_eq!(busy.region, other.id());
    other.close(WAIT).unwrap();
    busy.wait(Duration::ZERO).unwrap();
    // The prepared operation is still there and cannot touch the memory any more.
    match prepared.post(PostOptions::within(WAIT)) {
        Err(PostError::RegionReleased { .. }) => {}
        posted => panic!("{posted:?}"),
    }
    drop(owned);
}

#[test]
fn memory_goes_although_a_peer_of_this_process_has_used_it() {
    let pair = Setup::new(Lane::Loopback).pair();
    let (local, remote) = (arena(&pair.a, 8000), arena(&pair.b, 8000));
    let side = Blocks::flat(8, 1000, &[0, 3, 1]);
    let prepared = pair
        .prepare(Op::Write, (&local, &side), (&remote, &side), None)
        .unwrap();
    prepared
        .post(PostOptions::within(WAIT))
        .unwrap()
        .wait(WAIT)
        .unwrap();
    drop(prepared);
    remote.close(WAIT).unwrap();
    local.close(WAIT).unwrap();
    assert!(pair.peer.is_connected());
}

#[test]
fn a_hole_in_the_peers_memory_is_an_error_of_the_transfer() {
    let pair = Setup::new(Lane::Shm).pair();
    let bytes = 64 << 10;
    // SAFETY: a fresh mapping at an address that the kernel chooses.
    let base = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            bytes,
            rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
            rustix::mm::MapFlags::PRIVATE,
        )
    }
    .unwrap();
    // SAFETY: the registration is closed before this test ends, and the mapping is never referenced.
    let memory = unsafe { HostMemory::from_raw(NonNull::new(base.cast()).unwrap(), bytes) };
    let remote = pair.b.register(memory, RemoteAccess::Open).unwrap();
    let local = arena(&pair.a, bytes as u64);
    let ids: Vec<u32> = (0..16).collect();
    let side = Blocks::flat(16, 4096, &ids);
    let prepared = pair
        .prepare(Op::Write, (&local, &side), (&remote, &side), None)
        .unwrap();
    let second_half = base.wrapping_byte_add(bytes / 2);
    // SAFETY: the second half of the mapping made above, which nothing references.
    unsafe { rustix::mm::munmap(second_half, bytes / 2) }.unwrap();
    let error = prepared
        .post(PostOptions::within(WAIT))
        .unwrap()
        .wait(WAIT)
        .unwrap_err();
    assert!(
        matches!(error, TransferError::Inaccessible { .. }),
        "{error}"
    );
    assert!(pair.peer.is_connected());
    remote.close(WAIT).unwrap();
    // SAFETY: the rest of the mapping; its registration is closed.
    unsafe { rustix::mm::munmap(base, bytes / 2) }.unwrap();
}

/// What the owner of a region sees is what a peer looks at, and the window waits for it.
fn looked_at_in_place(lane: Lane) {
    let pair = Setup::new(lane).pair();
    let layout = BlockLayout {
        offset: 64,
        blocks: 6,
        block_stride: 1000,
        layers: 3,
        layer_stride: 6000,
        run_bytes: 1000,
    };
    let remote = arena_with(&pair.b, 20_000, RemoteAccess::WindowOnly);
    fill(&remote, 9);
    let window = pair
        .b
        .open_window(&remote, WindowScope::Region, WindowAccess::Read)
        .unwrap();
    let blocks = |ids: &[u32], window| RemoteBlocks {
        peer: &pair.peer,
        region: remote.id(),
        layout,
        ids: ids.into(),
        layers: 1..3,
        window,
    };
    let mapped = pair.a.map(blocks(&[4, 0], Some(window.id()))).unwrap();
    assert_eq!((mapped.blocks(), mapped.layers()), (2, 2));
    let all = bytes(&remote);
    for (block, id) in [(0, 4), (1, 0)] {
        for layer in 0..2 {
            let mut run = vec![0; 1000];
            mapped.read(block, layer, &mut run).unwrap();
            let at = layout.run_offset(id, layer + 1).unwrap() as usize;
            assert_eq!(run, all[at..at + 1000]);
        }
    }
    assert!(mapped.run(2, 0).is_none() && mapped.run(0, 2).is_none());
    assert!(mapped.read(0, 0, &mut [0; 1001]).is_err());
    // What the owner writes is there without anybody moving it.
    remote
        .write_at(layout.run_offset(4, 1).unwrap(), b"new")
        .unwrap();
    let mut new = [0; 3];
    mapped.read(0, 0, &mut new).unwrap();
    assert_eq!(&new, b"new");
    assert!(!mapped.revoked());

    let busy = window.close(Duration::from_millis(50)).unwrap_err();
    wait_for(|| mapped.revoked());
    drop(mapped);
    busy.window.close(WAIT).unwrap();
    for (ids, window) in [(&[0][..], None), (&[6], None), (&[], None)] {
        let refused = pair.a.map(blocks(ids, window)).unwrap_err();
        assert!(matches!(refused, MapError::Blocks(_)), "{refused}");
    }
}

#[test]
fn blocks_are_looked_at_in_place_over_shm() {
    looked_at_in_place(Lane::Shm);
}

#[test]
fn blocks_are_looked_at_in_place_in_one_process() {
    looked_at_in_place(Lane::Loopback);
}

#[test]
fn memory_that_is_not_mapped_is_not_looked_at() {
    for (lane, arena_there) in [(Lane::Tcp, true), (Lane::Shm, false)] {
        let pair = Setup::new(lane).pair();
        let remote = if arena_there {
            arena(&pair.b, 8000)
        } else {
            pair.b.register(vec![0; 8000], RemoteAccess::Open).unwrap()
        };
        let refused = pair.a.map(RemoteBlocks {
            peer: &pair.peer,
            region: remote.id(),
            layout: BlockLayout::contiguous(8, 1000),
            ids: [1].into(),
            layers: 0..1,
            window: None,
        });
        let refused = refused.unwrap_err();
        assert!(matches!(refused, MapError::NotMapped { .. }), "{refused}");
    }
}

/// Waits for something that another thread brings about.
fn wait_for(mut there: impl FnMut() -> bool) {
    let started = std::time::Instant::now();
    while !there() {
        assert!(started.elapsed() < WAIT);
        std::thread::yield_now();
    }
}

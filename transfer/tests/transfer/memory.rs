//! Memory of a peer on this host that is not an arena: the kernel copies there, and the peer keeps
//! the memory until nobody does.

use std::ptr::NonNull;
use std::time::Duration;

use blockplane_transfer::{
    HostMemory, Lane, Op, PostError, PostOptions, RemoteAccess, TransferError,
};

use crate::support::{Blocks, Setup, WAIT, arena, bytes, fill};

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

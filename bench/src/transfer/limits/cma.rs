//! Copies into and out of the other process by the kernel: `process_vm_writev`, as many pieces a
//! call as it takes.

use std::{
    io,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use blockplane_transfer::Registration;

use crate::{
    report::Samples,
    transfer::{
        case::{Lot, OpName, Side},
        link::Address,
    },
};

/// Pieces of one call (the kernel's bound).
const PIECES_MAX: usize = 1024;

/// Seconds to move a lot between a region of this process and the target's.
pub(super) fn times(
    op: OpName,
    local: &Registration,
    lot: &Lot,
    target: &Address,
    budget: Duration,
) -> anyhow::Result<Samples> {
    let process = libc::pid_t::try_from(target.process).context("process id")?;
    let bytes = usize::try_from(lot.local.shape.run_bytes)?;
    let pieces = |base: *mut u8, side: &Side| -> anyhow::Result<Vec<libc::iovec>> {
        side.runs()
            .map(|at| {
                Ok(libc::iovec {
                    iov_base: base.wrapping_add(usize::try_from(at)?).cast(),
                    iov_len: bytes,
                })
            })
            .collect()
    };
    let mine = pieces(local.base_ptr().as_ptr(), &lot.local)?;
    let theirs = pieces(std::ptr::without_provenance_mut(target.base), &lot.remote)?;
    super::times(budget, || {
        let start = Instant::now();
        for (mine, theirs) in mine.chunks(PIECES_MAX).zip(theirs.chunks(PIECES_MAX)) {
            let (near, far) = (mine.as_ptr(), theirs.as_ptr());
            let (near_len, far_len) = (mine.len() as u64, theirs.len() as u64);
            let call = match op {
                OpName::Write => libc::process_vm_writev,
                OpName::Read => libc::process_vm_readv,
            };
            // SAFETY: the local pieces lie in a registered region that `local` keeps; what the
            // remote ones name is checked by the kernel.
            let moved = unsafe { call(process, near, near_len, far, far_len, 0) };
            let whole: usize = mine.iter().map(|piece| piece.iov_len).sum();
            ensure!(
                usize::try_from(moved) == Ok(whole),
                "process_vm_writev moved {moved} of {whole} bytes: {}",
                io::Error::last_os_error()
            );
        }
        Ok(start.elapsed())
    })
}

//! Functions that the header of libibverbs defines inline: they call through the table that the
//! driver of the device has put into its context.

use std::ffi::c_int;

use crate::verbs::{ibv_cq, ibv_qp, ibv_recv_wr, ibv_send_wr, ibv_wc};

/// Hands a list of work requests to a queue pair. Returns 0 or an error number; `bad` then points
/// at the first request that was not taken.
///
/// # Safety
/// `qp` is a live queue pair. `wr` is a list whose requests and gather lists are valid during the
/// call, and the memory that they name stays registered and valid until each has completed or
/// the queue pair is destroyed. `bad` may be written.
pub unsafe fn ibv_post_send(
    qp: *mut ibv_qp,
    wr: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: a live queue pair names its context, which outlives it.
    let context = unsafe { (*qp).context };
    // SAFETY: as above; the table does not change after the device was opened.
    let post = unsafe { (*context).ops.post_send };
    match post {
        // SAFETY: the contract of this function is that of the driver's.
        Some(post) => unsafe { post(qp, wr, bad) },
        None => libc::EOPNOTSUPP,
    }
}

/// Hands a list of receive requests to a queue pair. Returns 0 or an error number.
///
/// # Safety
/// As for [`ibv_post_send`].
pub unsafe fn ibv_post_recv(
    qp: *mut ibv_qp,
    wr: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: a live queue pair names its context, which outlives it.
    let context = unsafe { (*qp).context };
    // SAFETY: as above; the table does not change after the device was opened.
    let post = unsafe { (*context).ops.post_recv };
    match post {
        // SAFETY: the contract of this function is that of the driver's.
        Some(post) => unsafe { post(qp, wr, bad) },
        None => libc::EOPNOTSUPP,
    }
}

/// Takes up to `entries` completions. Returns how many, or a negative number when it fails.
///
/// # Safety
/// `cq` is a live completion queue and `wc` has room for `entries`.
pub unsafe fn ibv_poll_cq(cq: *mut ibv_cq, entries: c_int, wc: *mut ibv_wc) -> c_int {
    // SAFETY: a live completion queue names its context, which outlives it.
    let context = unsafe { (*cq).context };
    // SAFETY: as above; the table does not change after the device was opened.
    let poll = unsafe { (*context).ops.poll_cq };
    match poll {
        // SAFETY: the contract of this function is that of the driver's.
        Some(poll) => unsafe { poll(cq, entries, wc) },
        None => -libc::EOPNOTSUPP,
    }
}

/// Asks for one event on the channel of a completion queue when the next completion arrives.
/// Returns 0 or an error number.
///
/// # Safety
/// `cq` is a live completion queue.
pub unsafe fn ibv_req_notify_cq(cq: *mut ibv_cq, solicited_only: c_int) -> c_int {
    // SAFETY: a live completion queue names its context, which outlives it.
    let context = unsafe { (*cq).context };
    // SAFETY: as above; the table does not change after the device was opened.
    let request = unsafe { (*context).ops.req_notify_cq };
    match request {
        // SAFETY: the contract of this function is that of the driver's.
        Some(request) => unsafe { request(cq, solicited_only) },
        None => libc::EOPNOTSUPP,
    }
}

//! Queue pairs and their completion queues.

use std::ffi::c_int;
use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::{null_mut, without_provenance_mut};
use std::sync::Arc;
use std::time::Duration;

use blockplane_rdma_sys::verbs::{
    IBV_ACCESS_REMOTE_READ, IBV_ACCESS_REMOTE_WRITE, IBV_QP_ACCESS_FLAGS, IBV_QP_AV,
    IBV_QP_DEST_QPN, IBV_QP_MAX_DEST_RD_ATOMIC, IBV_QP_MAX_QP_RD_ATOMIC, IBV_QP_MIN_RNR_TIMER,
    IBV_QP_PATH_MTU, IBV_QP_PKEY_INDEX, IBV_QP_PORT, IBV_QP_RETRY_CNT, IBV_QP_RNR_RETRY,
    IBV_QP_RQ_PSN, IBV_QP_SQ_PSN, IBV_QP_STATE, IBV_QP_TIMEOUT, IBV_QPS_INIT, IBV_QPS_RTR,
    IBV_QPS_RTS, IBV_QPT_RC, ibv_comp_channel, ibv_cq, ibv_qp, ibv_qp_attr, ibv_qp_init_attr,
    ibv_send_wr, ibv_wc,
};
use blockplane_rdma_sys::{ibv_poll_cq, ibv_post_send, ibv_req_notify_cq};

use super::adapter::Adapter;
use crate::agent::random_u64;
use crate::peer::{Reader, Writer};

/// How often a packet is sent again before the queue pair gives up. Not 7, the most there is: Soft-RoCE
/// takes that for "without end".
const RETRIES: u8 = 6;

/// What the other side needs to know of a queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(super) number: u32,
    /// Number of its first packet.
    pub(super) first_packet: u32,
    pub(super) lid: u16,
    pub(super) gid: [u8; 16],
    pub(super) mtu: u8,
    /// READs that it answers at a time.
    pub(super) reads: u8,
}

impl Endpoint {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.u32(self.number);
        out.u32(self.first_packet);
        out.u16(self.lid);
        out.bytes.extend_from_slice(&self.gid);
        out.u8(self.mtu);
        out.u8(self.reads);
        out.bytes
    }

    pub(crate) fn decode(body: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(body);
        let endpoint = Self {
            number: reader.u32().ok()?,
            first_packet: reader.u32().ok()?,
            lid: reader.u16().ok()?,
            gid: reader.array().ok()?,
            mtu: reader.u8().ok()?,
            reads: reader.u8().ok()?,
        };
        let numbers = endpoint.number < 1 << 24 && endpoint.first_packet < 1 << 24;
        let ranges = (1..=5).contains(&endpoint.mtu) && endpoint.reads > 0;
        (numbers && ranges && reader.remaining() == 0).then_some(endpoint)
    }
}

/// A completion queue, with a channel where events are wanted.
struct Completions {
    adapter: Arc<Adapter>,
    queue: *mut ibv_cq,
    channel: *mut ibv_comp_channel,
}

impl Completions {
    fn new(adapter: &Arc<Adapter>, entries: u32, events: bool) -> io::Result<Self> {
        let api = adapter.api;
        let mut made = Self {
            adapter: adapter.clone(),
            queue: null_mut(),
            channel: null_mut(),
        };
        if events {
            // SAFETY: the context is open.
            made.channel = unsafe { api.ibv_create_comp_channel(adapter.context) };
            if made.channel.is_null() {
                return Err(io::Error::last_os_error());
            }
            rustix::io::ioctl_fionbio(made.fd(), true)?;
        }
        let entries = c_int::try_from(entries).unwrap_or(c_int::MAX);
        let context = adapter.context;
        // SAFETY: the context is open and the channel, if any, belongs to it.
        made.queue = unsafe { api.ibv_create_cq(context, entries, null_mut(), made.channel, 0) };
        if made.queue.is_null() {
            return Err(io::Error::last_os_error());
        }
        Ok(made)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: asked for only where a channel was made, which lives as long as `self`.
        let fd: RawFd = unsafe { (*self.channel).fd };
        // SAFETY: open as long as the channel.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }
}

impl Drop for Completions {
    fn drop(&mut self) {
        let api = self.adapter.api;
        if !self.queue.is_null() {
            // SAFETY: its queue pair is destroyed before it, and every event was acknowledged.
            let status = unsafe { api.ibv_destroy_cq(self.queue) };
            if status != 0 {
                tracing::warn!(status, "cannot destroy a completion queue");
            }
        }
        if !self.channel.is_null() {
            // SAFETY: its completion queue is gone.
            unsafe { api.ibv_destroy_comp_channel(self.channel) };
        }
    }
}

/// A reliable queue pair. Destroyed when dropped: nothing of it moves afterwards.
pub(crate) struct QueuePair {
    queue: *mut ibv_qp,
    first_packet: u32,
    /// After `queue`, to go after it: see `Drop`.
    completions: Completions,
}

// SAFETY: libibverbs may be called from any thread.
unsafe impl Send for QueuePair {}
// SAFETY: as above: posting and polling take locks of the driver.
unsafe impl Sync for QueuePair {}

impl fmt::Debug for QueuePair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueuePair").finish_non_exhaustive()
    }
}

impl QueuePair {
    /// A queue pair of an initiator: it posts requests and is told of their completions.
    pub(crate) fn initiator(adapter: &Arc<Adapter>) -> io::Result<Self> {
        Self::new(adapter, true)
    }

    /// A queue pair of a target: it lets requests of one initiator in.
    pub(crate) fn target(adapter: &Arc<Adapter>) -> io::Result<Self> {
        Self::new(adapter, false)
    }

    fn new(adapter: &Arc<Adapter>, initiator: bool) -> io::Result<Self> {
        let requests = if initiator {
            adapter.limits.requests
        } else {
            1
        };
        // An error completes every request, also those that did not ask for it.
        let completions = Completions::new(adapter, requests + 8, initiator)?;
        let mut wanted = ibv_qp_init_attr {
            send_cq: completions.queue,
            recv_cq: completions.queue,
            qp_type: IBV_QPT_RC,
            ..ibv_qp_init_attr::default()
        };
        wanted.cap.max_send_wr = requests;
        wanted.cap.max_recv_wr = 1;
        wanted.cap.max_send_sge = if initiator { adapter.limits.pieces } else { 1 };
        wanted.cap.max_recv_sge = 1;
        // SAFETY: the domain and the completion queue are alive.
        let queue = unsafe { adapter.api.ibv_create_qp(adapter.pd, &raw mut wanted) };
        if queue.is_null() {
            return Err(io::Error::last_os_error());
        }
        let random = random_u64().map_or(0, |random| random & 0xff_ffff);
        let pair = Self {
            queue,
            first_packet: u32::try_from(random).unwrap_or(0),
            completions,
        };
        let access = if initiator {
            0
        } else {
            IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE
        };
        let state = ibv_qp_attr {
            qp_state: IBV_QPS_INIT,
            pkey_index: 0,
            port_num: adapter.port.number,
            qp_access_flags: access,
            ..ibv_qp_attr::default()
        };
        pair.modify(
            state,
            IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS,
        )?;
        if initiator {
            pair.ask_for_event()?;
        }
        Ok(pair)
    }

    fn adapter(&self) -> &Adapter {
        &self.completions.adapter
    }

    pub(crate) fn endpoint(&self) -> Endpoint {
        let port = &self.adapter().port;
        Endpoint {
            // SAFETY: alive as long as `self`; the number never changes.
            number: unsafe { (*self.queue).qp_num },
            first_packet: self.first_packet,
            lid: port.lid,
            gid: port.gid,
            mtu: port.mtu,
            reads: self.adapter().limits.reads_in,
        }
    }

    /// Lets the other side in.
    pub(crate) fn receive_from(&self, peer: &Endpoint) -> io::Result<()> {
        let adapter = self.adapter();
        let port = &adapter.port;
        let mut state = ibv_qp_attr {
            qp_state: IBV_QPS_RTR,
            path_mtu: u32::from(port.mtu.min(peer.mtu)),
            dest_qp_num: peer.number,
            rq_psn: peer.first_packet,
            max_dest_rd_atomic: adapter.limits.reads_in,
            // 0.64 ms; there are no receive requests to wait for.
            min_rnr_timer: 12,
            ..ibv_qp_attr::default()
        };
        let way = &mut state.ah_attr;
        way.dlid = peer.lid;
        way.port_num = port.number;
        way.is_global = u8::from(port.global);
        way.grh.dgid.raw = peer.gid;
        way.grh.sgid_index = port.gid_index;
        way.grh.hop_limit = 64;
        self.modify(
            state,
            IBV_QP_STATE
                | IBV_QP_AV
                | IBV_QP_PATH_MTU
                | IBV_QP_DEST_QPN
                | IBV_QP_RQ_PSN
                | IBV_QP_MAX_DEST_RD_ATOMIC
                | IBV_QP_MIN_RNR_TIMER,
        )
    }

    /// Makes it ready to send. A peer that does not answer is given up after about `patience`.
    pub(crate) fn send_to(&self, peer: &Endpoint, patience: Duration) -> io::Result<()> {
        let reads = self.adapter().limits.reads_out.min(peer.reads);
        let state = ibv_qp_attr {
            qp_state: IBV_QPS_RTS,
            timeout: timeout_code(patience),
            retry_cnt: RETRIES,
            rnr_retry: 7,
            sq_psn: self.first_packet,
            max_rd_atomic: reads,
            ..ibv_qp_attr::default()
        };
        self.modify(
            state,
            IBV_QP_STATE
                | IBV_QP_TIMEOUT
                | IBV_QP_RETRY_CNT
                | IBV_QP_RNR_RETRY
                | IBV_QP_SQ_PSN
                | IBV_QP_MAX_QP_RD_ATOMIC,
        )
    }

    fn modify(&self, mut state: ibv_qp_attr, mask: u32) -> io::Result<()> {
        let mask = c_int::try_from(mask).unwrap_or(0);
        let api = self.adapter().api;
        // SAFETY: the queue pair is alive.
        let status = unsafe { api.ibv_modify_qp(self.queue, &raw mut state, mask) };
        error_number(status)
    }

    /// Hands over a list of requests.
    ///
    /// # Safety
    /// As for `ibv_post_send`: the list is valid, and its memory stays registered until each request has
    /// completed or `self` is dropped.
    pub(super) unsafe fn post(&self, first: *mut ibv_send_wr) -> io::Result<()> {
        let mut bad = null_mut();
        // SAFETY: the caller's promise.
        error_number(unsafe { ibv_post_send(self.queue, first, &raw mut bad) })
    }

    /// Takes completions; how many.
    pub(super) fn poll(&self, into: &mut [ibv_wc]) -> io::Result<usize> {
        let room = c_int::try_from(into.len()).unwrap_or(c_int::MAX);
        // SAFETY: the completion queue is alive, and there is room for so many.
        let got = unsafe { ibv_poll_cq(self.completions.queue, room, into.as_mut_ptr()) };
        usize::try_from(got).map_err(|_| io::Error::from_raw_os_error(got.saturating_neg()))
    }

    /// The next completion makes the descriptor readable.
    pub(super) fn ask_for_event(&self) -> io::Result<()> {
        // SAFETY: the completion queue is alive.
        error_number(unsafe { ibv_req_notify_cq(self.completions.queue, 0) })
    }

    /// Takes the events that make the descriptor readable.
    pub(super) fn take_events(&self) {
        let api = self.adapter().api;
        let (mut queue, mut context) = (null_mut(), without_provenance_mut(0));
        let channel = self.completions.channel;
        // SAFETY: the channel is alive and does not block.
        while unsafe { api.ibv_get_cq_event(channel, &raw mut queue, &raw mut context) } == 0 {
            // SAFETY: the event is of this queue, the only one of the channel.
            unsafe { api.ibv_ack_cq_events(queue, 1) };
        }
    }

    /// Readable when there is a completion. The descriptor is a copy and outlives `self`.
    pub(super) fn event_fd(&self) -> io::Result<std::os::fd::OwnedFd> {
        self.completions.fd().try_clone_to_owned()
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: made by `new` and destroyed once; the completion queue goes after it.
        let status = unsafe { self.adapter().api.ibv_destroy_qp(self.queue) };
        if status != 0 {
            tracing::warn!(status, "cannot destroy a queue pair");
        }
    }
}

fn error_number(status: c_int) -> io::Result<()> {
    match status {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error.abs())),
    }
}

/// The wait for an answer to one packet, 4.096 us times two to this power; all retries together take
/// about `patience`. Devices may wait up to four times as long.
fn timeout_code(patience: Duration) -> u8 {
    let each = patience.as_nanos() / u128::from(RETRIES + 1) / 4096;
    // 67 ms to 1.1 s: below, congestion alone would end connections.
    u8::try_from(each.max(1).ilog2())
        .unwrap_or(18)
        .clamp(14, 18)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_survive_the_wire_and_noise_does_not_pass() {
        let endpoint = Endpoint {
            number: 17,
            first_packet: 0xff_ffff,
            lid: 3,
            gid: [7; 16],
            mtu: 5,
            reads: 16,
        };
        let body = endpoint.encode();
        assert_eq!(Endpoint::decode(&body), Some(endpoint));
        for len in 0..body.len() {
            assert_eq!(Endpoint::decode(&body[..len]), None);
        }
        let wrong = Endpoint { mtu: 9, ..endpoint };
        assert_eq!(Endpoint::decode(&wrong.encode()), None);
    }

    #[test]
    fn patience_is_shared_by_the_retries() {
        assert_eq!(timeout_code(Duration::from_millis(20)), 14);
        assert_eq!(timeout_code(Duration::from_secs(2)), 16);
        assert_eq!(timeout_code(Duration::from_secs(600)), 18);
    }

    /// Two queue pairs of one device: a request with a key that nobody gave out.
    #[test]
    #[ignore = "needs an RDMA device: tests/run rdma"]
    fn a_wrong_key_is_a_remote_access_error() {
        use blockplane_rdma_sys::verbs::{
            IBV_SEND_SIGNALED, IBV_WC_REM_ACCESS_ERR, IBV_WR_RDMA_WRITE, ibv_sge,
        };

        let adapter = Adapter::open(&crate::config::RdmaConfig::default()).unwrap();
        let (here, there) = (
            QueuePair::initiator(&adapter).unwrap(),
            QueuePair::target(&adapter).unwrap(),
        );
        there.receive_from(&here.endpoint()).unwrap();
        here.receive_from(&there.endpoint()).unwrap();
        here.send_to(&there.endpoint(), Duration::from_secs(2))
            .unwrap();
        let mut memory = vec![0u8; 4096];
        // SAFETY: the key goes before the memory.
        let key = unsafe { adapter.register(memory.as_mut_ptr(), 4096, true) }.unwrap();
        let mut piece = ibv_sge {
            addr: memory.as_ptr() as u64,
            length: 64,
            lkey: key.local,
        };
        let mut request = ibv_send_wr {
            sg_list: &raw mut piece,
            num_sge: 1,
            opcode: IBV_WR_RDMA_WRITE,
            send_flags: IBV_SEND_SIGNALED,
            ..ibv_send_wr::default()
        };
        request.wr.rdma.remote_addr = piece.addr;
        request.wr.rdma.rkey = key.remote ^ 0x5500;
        // SAFETY: the memory stays registered until the pair is gone.
        unsafe { here.post(&raw mut request) }.unwrap();
        let mut taken = [ibv_wc::default(); 1];
        let until = std::time::Instant::now() + Duration::from_secs(20);
        while here.poll(&mut taken).unwrap() == 0 {
            assert!(std::time::Instant::now() < until, "no completion");
            std::thread::yield_now();
        }
        assert_eq!(taken[0].status, IBV_WC_REM_ACCESS_ERR);
        drop((here, key));
    }
}

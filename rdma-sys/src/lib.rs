//! libibverbs and libucp, opened at run time, and what they show of this machine.
//!
//! Nothing is linked: a binary builds without headers and starts without the libraries.
//! [`probe_rdma`] is safe and for everybody; [`verbs()`] and [`ucx()`] give the functions as they are in
//! C to those who take responsibility for them. `generate.sh` writes the modules [`mod@verbs`] and
//! [`ucp`] from the headers of rdma-core 44 and UCX 1.13; later versions only add to them.

mod inline;
mod library;
mod probe;
pub mod ucp;
pub mod verbs;

pub use inline::{ibv_poll_cq, ibv_post_recv, ibv_post_send, ibv_req_notify_cq};
pub use library::{LibraryError, Loaded, RdmaLibrary, ucx, verbs};
pub use probe::{
    GidKind, LinkLayer, PortState, RdmaDevice, RdmaGid, RdmaPort, RdmaReport, probe_rdma,
};

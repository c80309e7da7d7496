//! Configuration of the verbs lane.

use crate::error::AgentError;

/// Which RDMA device an agent with [`Lane::Verbs`](crate::Lane::Verbs) uses, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RdmaConfig {
    /// Device, as `ibv_devices` names it. Default none: the first one with an active port.
    pub device: Option<String>,
    /// Entry of the port's GID table. Default none: the first IPv4 address of RoCE v2, else the first
    /// of RoCE v2, else the first. Both sides must reach each other's.
    pub gid_index: Option<u8>,
    /// A transfer is cut into parts of this many bytes, the unit of cancellation. Default 1 MiB; 4 KiB to
    /// 1 GiB, a multiple of 64.
    pub part_bytes: u64,
}

impl Default for RdmaConfig {
    fn default() -> Self {
        Self {
            device: None,
            gid_index: None,
            part_bytes: 1 << 20,
        }
    }
}

impl RdmaConfig {
    pub(super) fn validate(&self) -> Result<(), AgentError> {
        let range = 4096..=1 << 30;
        if range.contains(&self.part_bytes) && self.part_bytes.is_multiple_of(64) {
            return Ok(());
        }
        Err(AgentError::InvalidConfig {
            field: "rdma.part_bytes",
            got: self.part_bytes.to_string(),
            accepted: "4 KiB to 1 GiB, a multiple of 64",
        })
    }
}

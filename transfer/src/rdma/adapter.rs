//! An open device, and memory registered there.

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::mem::zeroed;
use std::sync::Arc;

use blockplane_rdma_sys::verbs::{
    IBV_ACCESS_LOCAL_WRITE, IBV_ACCESS_REMOTE_READ, IBV_ACCESS_REMOTE_WRITE, Verbs, ibv_context,
    ibv_device_attr, ibv_mr, ibv_pd,
};
use blockplane_rdma_sys::{GidKind, PortState, RdmaDevice, RdmaGid, RdmaPort, probe_rdma, verbs};

use crate::config::RdmaConfig;
use crate::error::RdmaError;

/// READs that one queue pair has open at a time, at most.
const READS_MAX: i32 = 16;

/// A device of this host, open for one agent.
pub(crate) struct Adapter {
    pub(super) api: &'static Verbs,
    pub(super) context: *mut ibv_context,
    pub(super) pd: *mut ibv_pd,
    pub(crate) name: String,
    pub(super) port: Port,
    pub(super) limits: Limits,
}

/// The port that is used, and its address.
#[derive(Clone, Copy, Debug)]
pub(super) struct Port {
    pub(super) number: u8,
    pub(super) gid_index: u8,
    pub(super) gid: [u8; 16],
    pub(super) lid: u16,
    /// As the device counts: 1 is 256 bytes, 5 is 4096.
    pub(super) mtu: u8,
    /// Packets carry GIDs: always on Ethernet.
    pub(super) global: bool,
}

/// What a queue pair may ask for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) requests: u32,
    pub(super) pieces: u32,
    /// READs that it answers, and that it has open.
    pub(super) reads_in: u8,
    pub(super) reads_out: u8,
}

// SAFETY: libibverbs may be called from any thread; what must not be called at the same time (closing
// and everything else) is ordered by ownership.
unsafe impl Send for Adapter {}
// SAFETY: as above.
unsafe impl Sync for Adapter {}

impl fmt::Debug for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Adapter")
            .field("name", &self.name)
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}

impl Adapter {
    /// Opens the device that the configuration names, or the first one that has an active port.
    pub(crate) fn open(config: &RdmaConfig) -> Result<Arc<Self>, RdmaError> {
        let loaded = verbs().map_err(|error| RdmaError::Library(error.clone()))?;
        let api = &loaded.api;
        let report = probe_rdma();
        let (name, port) = choose(config, &report.devices)?;
        let failed = |what| {
            let error = io::Error::last_os_error();
            RdmaError::device(&name, what, &error)
        };
        let context = open_device(api, &name).ok_or_else(|| failed("open the device"))?;
        // SAFETY: the context is open.
        let pd = unsafe { api.ibv_alloc_pd(context) };
        if pd.is_null() {
            let error = failed("make a protection domain");
            // SAFETY: nothing was made on it.
            unsafe { api.ibv_close_device(context) };
            return Err(error);
        }
        // From here on dropping it closes what is open.
        let mut adapter = Self {
            api,
            context,
            pd,
            name,
            port,
            limits: Limits {
                requests: 0,
                pieces: 0,
                reads_in: 0,
                reads_out: 0,
            },
        };
        adapter.limits = adapter.query_limits()?;
        Ok(Arc::new(adapter))
    }

    fn query_limits(&self) -> Result<Limits, RdmaError> {
        // SAFETY: plain numbers, for which zero is a value.
        let mut found: ibv_device_attr = unsafe { zeroed() };
        // SAFETY: the context is open.
        let status = unsafe { self.api.ibv_query_device(self.context, &raw mut found) };
        if status != 0 {
            let error = io::Error::from_raw_os_error(status);
            return Err(RdmaError::device(&self.name, "query the device", &error));
        }
        let number = |value: i32, max: u32| u32::try_from(value).unwrap_or(0).clamp(1, max);
        let reads = |value: i32| u8::try_from(value.clamp(1, READS_MAX)).unwrap_or(1);
        Ok(Limits {
            requests: number(found.max_qp_wr, 512),
            pieces: number(found.max_sge, 16),
            reads_in: reads(found.max_qp_rd_atom),
            reads_out: reads(found.max_qp_init_rd_atom),
        })
    }

    /// Where it is reached, for logs and reasons.
    pub(crate) fn describe(&self) -> String {
        let gid = std::net::Ipv6Addr::from(self.port.gid);
        format!("{} port {}, GID {gid}", self.name, self.port.number)
    }

    /// Registers memory.
    ///
    /// # Safety
    /// `address..address + bytes` stays mapped until the key is dropped, and may be written by
    /// peers that know the key if `open`.
    pub(crate) unsafe fn register(
        self: &Arc<Self>,
        address: *mut u8,
        bytes: usize,
        open: bool,
    ) -> io::Result<Key> {
        let mut access = IBV_ACCESS_LOCAL_WRITE;
        if open {
            access |= IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
        }
        let access = i32::try_from(access).unwrap_or(0);
        // SAFETY: the domain is alive; the range is the caller's promise.
        let mr = unsafe { self.api.ibv_reg_mr(self.pd, address.cast(), bytes, access) };
        if mr.is_null() {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: made a moment ago, and not changed by anybody.
        let made = unsafe { &*mr };
        let (local, remote) = (made.lkey, made.rkey);
        Ok(Key {
            adapter: self.clone(),
            mr,
            local,
            remote,
        })
    }
}

impl Drop for Adapter {
    fn drop(&mut self) {
        // SAFETY: keys and queue pairs hold the adapter: none is left.
        let freed = unsafe { self.api.ibv_dealloc_pd(self.pd) };
        // SAFETY: likewise, and the domain is gone.
        let closed = unsafe { self.api.ibv_close_device(self.context) };
        if freed != 0 || closed != 0 {
            tracing::warn!(
                device = self.name,
                freed,
                closed,
                "cannot close an RDMA device"
            );
        }
    }
}

/// Memory registered at a device.
pub(crate) struct Key {
    adapter: Arc<Adapter>,
    mr: *mut ibv_mr,
    /// Names it in requests of this agent.
    pub(crate) local: u32,
    /// Names it to peers.
    pub(crate) remote: u32,
}

// SAFETY: used by the destructor only, which libibverbs allows on any thread.
unsafe impl Send for Key {}
// SAFETY: as above.
unsafe impl Sync for Key {}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key")
            .field("local", &self.local)
            .finish_non_exhaustive()
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        // SAFETY: made by `register` and dropped once. No request of ours names it any more: transfers
        // keep their regions.
        let status = unsafe { self.adapter.api.ibv_dereg_mr(self.mr) };
        if status != 0 {
            tracing::warn!(
                device = self.adapter.name,
                status,
                "cannot unregister memory"
            );
        }
    }
}

fn open_device(api: &Verbs, name: &str) -> Option<*mut ibv_context> {
    let mut count = 0;
    // SAFETY: it writes the number of entries.
    let list = unsafe { api.ibv_get_device_list(&raw mut count) };
    if list.is_null() {
        return None;
    }
    let count = usize::try_from(count).unwrap_or(0);
    // SAFETY: the library says that so many entries are there, until the list is freed.
    let entries = unsafe { std::slice::from_raw_parts(list, count) };
    let named = |device: &&*mut _| {
        // SAFETY: an entry of a live list.
        let found = unsafe { api.ibv_get_device_name(**device) };
        // SAFETY: a string that lives as long as the entry.
        unsafe { CStr::from_ptr(found) }.to_bytes() == name.as_bytes()
    };
    let context = entries
        .iter()
        .find(named)
        // SAFETY: an entry of a live list.
        .map(|&device| unsafe { api.ibv_open_device(device) });
    // SAFETY: an open device does not need the list.
    unsafe { api.ibv_free_device_list(list) };
    context.filter(|context| !context.is_null())
}

/// The device and port to use.
fn choose(config: &RdmaConfig, devices: &[RdmaDevice]) -> Result<(String, Port), RdmaError> {
    let mut seen = Vec::new();
    for device in devices {
        let name = &device.name;
        if config.device.as_ref().is_some_and(|wanted| wanted != name) {
            seen.push(name.clone());
            continue;
        }
        let ports = match &device.ports {
            Ok(ports) => ports,
            Err(reason) => {
                seen.push(reason.clone());
                continue;
            }
        };
        for port in ports {
            let Some(gid) = choose_gid(config, port) else {
                seen.push(format!("{name} port {} has no such GID", port.number));
                continue;
            };
            if port.state == PortState::Active {
                return Ok((name.clone(), port_of(port, gid)));
            }
            seen.push(format!("{name} port {} is {}", port.number, port.state));
        }
    }
    Err(RdmaError::NoDevice {
        wanted: config.device.clone().unwrap_or_else(|| "any".to_owned()),
        found: if seen.is_empty() {
            "none".to_owned()
        } else {
            seen.join(", ")
        },
    })
}

/// The address that the configuration names; else an IPv4 one of RoCE v2, else any of RoCE v2, else the
/// first.
fn choose_gid<'a>(config: &RdmaConfig, port: &'a RdmaPort) -> Option<&'a RdmaGid> {
    let mut gids = port.gids.iter();
    if let Some(index) = config.gid_index {
        return gids.find(|gid| gid.index == u32::from(index));
    }
    let rank = |gid: &&RdmaGid| match (gid.kind, gid.gid.to_ipv4_mapped()) {
        (GidKind::RoceV2, Some(_)) => 0,
        (GidKind::RoceV2, None) => 1,
        _ => 2,
    };
    gids.min_by_key(rank)
}

fn port_of(port: &RdmaPort, gid: &RdmaGid) -> Port {
    Port {
        number: port.number,
        gid_index: u8::try_from(gid.index).unwrap_or(u8::MAX),
        gid: gid.gid.octets(),
        lid: port.lid,
        mtu: match port.mtu {
            ..512 => 1,
            512..1024 => 2,
            1024..2048 => 3,
            2048..4096 => 4,
            4096.. => 5,
        },
        global: port.lid == 0 || gid.kind == GidKind::RoceV2,
    }
}

#[cfg(test)]
mod tests {
    use blockplane_rdma_sys::LinkLayer;

    use super::*;

    fn gid(index: u32, address: &str, kind: GidKind) -> RdmaGid {
        RdmaGid {
            index,
            gid: address.parse().unwrap(),
            kind,
            interface: None,
        }
    }

    fn device(name: &str, state: PortState) -> RdmaDevice {
        RdmaDevice {
            name: name.to_owned(),
            numa_node: None,
            ports: Ok(vec![RdmaPort {
                number: 1,
                state,
                link: LinkLayer::Ethernet,
                mtu: 1024,
                rate_gbps: 100.0,
                lid: 0,
                gids: vec![
                    gid(0, "fe80::1", GidKind::InfiniBandOrRoceV1),
                    gid(1, "fe80::1", GidKind::RoceV2),
                    gid(3, "::ffff:10.0.0.1", GidKind::RoceV2),
                ],
            }]),
        }
    }

    #[test]
    fn an_active_port_with_an_ipv4_address_is_preferred() {
        let devices = [
            device("down", PortState::Down),
            device("up", PortState::Active),
        ];
        let (name, port) = choose(&RdmaConfig::default(), &devices).unwrap();
        assert_eq!((name.as_str(), port.gid_index, port.mtu), ("up", 3, 3));
        let pinned = RdmaConfig {
            gid_index: Some(1),
            ..RdmaConfig::default()
        };
        assert_eq!(choose(&pinned, &devices).unwrap().1.gid_index, 1);
    }

    #[test]
    fn what_is_missing_is_named() {
        let devices = [device("down", PortState::Down)];
        let error = choose(&RdmaConfig::default(), &devices).unwrap_err();
        assert!(error.to_string().contains("down port 1 is down"), "{error}");
        let other = RdmaConfig {
            device: Some("mlx5_0".to_owned()),
            ..RdmaConfig::default()
        };
        let error = choose(&other, &devices).unwrap_err().to_string();
        assert!(
            error.contains("mlx5_0") && error.contains("down"),
            "{error}"
        );
    }
}

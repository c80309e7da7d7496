//! What the libraries show of this machine: devices, ports, addresses.
//!
//! Ports are asked through libibverbs, which is what transfers use; what has no function there
//! (kinds of GIDs, NUMA nodes, rates) is read from `/sys/class/infiniband`.

use std::ffi::{CStr, c_int};
use std::fmt;
use std::io;
use std::mem::zeroed;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};

use crate::library::{LibraryError, RdmaLibrary, ucx, verbs};
use crate::verbs::{self as sys, Verbs, ibv_context, ibv_device};

const SYS: &str = "/sys/class/infiniband";
/// GIDs of one port that are listed.
const GIDS_MAX: u32 = 256;

/// What was found.
#[derive(Clone, Debug)]
pub struct RdmaReport {
    /// libibverbs, or why there is none.
    pub verbs: Result<RdmaLibrary, LibraryError>,
    /// libucp of UCX, or why there is none.
    pub ucx: Result<RdmaLibrary, LibraryError>,
    /// Devices that libibverbs shows.
    pub devices: Vec<RdmaDevice>,
    /// Names of devices that the kernel has and libibverbs does not show: no driver for them in
    /// user space, or no device files in this container.
    pub hidden: Vec<String>,
}

/// An RDMA device.
#[derive(Clone, Debug)]
pub struct RdmaDevice {
    /// Name, as `ibv_devices` prints it.
    pub name: String,
    /// NUMA node of its slot; none when it has none (Soft-RoCE) or the kernel does not say.
    pub numa_node: Option<u32>,
    /// Its ports, or why it cannot be opened.
    pub ports: Result<Vec<RdmaPort>, String>,
}

/// A port of a device.
#[derive(Clone, Debug, PartialEq)]
pub struct RdmaPort {
    /// From 1.
    pub number: u8,
    /// Whether it can be used.
    pub state: PortState,
    /// What it speaks.
    pub link: LinkLayer,
    /// Largest payload of one packet as negotiated, in bytes.
    pub mtu: u32,
    /// Gbit/s; 0 when the kernel does not say.
    pub rate_gbps: f64,
    /// Address on InfiniBand; 0 on Ethernet.
    pub lid: u16,
    /// Its entries of the GID table that are set.
    pub gids: Vec<RdmaGid>,
}

/// One entry of the GID table of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RdmaGid {
    /// Index in the table.
    pub index: u32,
    /// The address.
    pub gid: Ipv6Addr,
    /// What packets from it look like.
    pub kind: GidKind,
    /// Network device that it belongs to, on Ethernet.
    pub interface: Option<String>,
}

/// State of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PortState {
    /// It can be used.
    Active,
    /// No link.
    Down,
    /// On its way up (initialising, armed, deferred).
    Waiting,
}

/// What a port speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LinkLayer {
    /// InfiniBand.
    InfiniBand,
    /// RoCE or iWARP.
    Ethernet,
    /// It does not say.
    Unknown,
}

/// What packets from a GID look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GidKind {
    /// InfiniBand, or RoCE version 1, which the kernel calls by one name.
    InfiniBandOrRoceV1,
    /// RoCE version 2, over UDP.
    RoceV2,
    /// Anything else.
    Other,
}

impl fmt::Display for PortState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Active => "active",
            Self::Down => "down",
            Self::Waiting => "not up yet",
        })
    }
}

impl fmt::Display for LinkLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InfiniBand => "InfiniBand",
            Self::Ethernet => "Ethernet",
            Self::Unknown => "unknown link",
        })
    }
}

/// Looks at this machine. Opens the libraries and every device for a moment; changes nothing.
#[must_use]
pub fn probe_rdma() -> RdmaReport {
    let library = verbs();
    let (devices, of_verbs) = match library {
        Ok(loaded) => (devices(&loaded.api), Ok(loaded.found.clone())),
        Err(error) => (Vec::new(), Err(error.clone())),
    };
    let shown = |name: &String| !devices.iter().any(|device| device.name == *name);
    RdmaReport {
        verbs: of_verbs,
        ucx: ucx()
            .map(|loaded| loaded.found.clone())
            .map_err(Clone::clone),
        hidden: kernel_devices().into_iter().filter(shown).collect(),
        devices,
    }
}

fn kernel_devices() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(SYS) else {
        return Vec::new();
    };
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

fn devices(api: &Verbs) -> Vec<RdmaDevice> {
    let mut count = 0;
    // SAFETY: it writes the number of entries.
    let list = unsafe { api.ibv_get_device_list(&raw mut count) };
    if list.is_null() {
        return Vec::new();
    }
    let count = usize::try_from(count).unwrap_or(0);
    // SAFETY: the library says that so many entries are there, and they stay until the list is freed.
    let entries = unsafe { std::slice::from_raw_parts(list, count) };
    let mut devices: Vec<_> = entries.iter().map(|&entry| device(api, entry)).collect();
    // SAFETY: nothing of the list is used any more: `device` has closed what it opened.
    unsafe { api.ibv_free_device_list(list) };
    devices.sort_by(|a, b| a.name.cmp(&b.name));
    devices
}

fn device(api: &Verbs, device: *mut ibv_device) -> RdmaDevice {
    // SAFETY: an entry of a live list.
    let name = unsafe { api.ibv_get_device_name(device) };
    // SAFETY: a string that lives as long as the entry.
    let name = unsafe { CStr::from_ptr(name) };
    let name = name.to_string_lossy().into_owned();
    let folder = Path::new(SYS).join(&name);
    RdmaDevice {
        numa_node: read(folder.join("device/numa_node")).and_then(|node| node.parse().ok()),
        ports: ports(api, device, &folder)
            .map_err(|error| format!("{name} cannot be opened: {error}")),
        name,
    }
}

fn ports(api: &Verbs, device: *mut ibv_device, folder: &Path) -> io::Result<Vec<RdmaPort>> {
    // SAFETY: an entry of a live list.
    let context = unsafe { api.ibv_open_device(device) };
    if context.is_null() {
        return Err(io::Error::last_os_error());
    }
    let ports = ports_of(api, context, folder);
    // SAFETY: nothing was made on this context.
    unsafe { api.ibv_close_device(context) };
    ports
}

fn ports_of(api: &Verbs, context: *mut ibv_context, folder: &Path) -> io::Result<Vec<RdmaPort>> {
    // SAFETY: plain numbers, for which zero is a value.
    let mut attributes: sys::ibv_device_attr = unsafe { zeroed() };
    // SAFETY: the context is open.
    check(unsafe { api.ibv_query_device(context, &raw mut attributes) })?;
    (1..=attributes.phys_port_cnt)
        .map(|number| port(api, context, number, folder))
        .collect()
}

fn port(api: &Verbs, context: *mut ibv_context, number: u8, folder: &Path) -> io::Result<RdmaPort> {
    // SAFETY: plain numbers, for which zero is a value. Libraries before extended attributes leave the
    // last ones alone.
    let mut found: sys::ibv_port_attr = unsafe { zeroed() };
    // SAFETY: the context is open; the function's type names the first part of this struct, which it
    // fills.
    check(unsafe { api.ibv_query_port(context, number, (&raw mut found).cast()) })?;
    let folder = folder.join(format!("ports/{number}"));
    let entries = u32::try_from(found.gid_tbl_len).unwrap_or(0).min(GIDS_MAX);
    Ok(RdmaPort {
        number,
        state: match found.state {
            sys::IBV_PORT_ACTIVE => PortState::Active,
            sys::IBV_PORT_DOWN | sys::IBV_PORT_NOP => PortState::Down,
            _ => PortState::Waiting,
        },
        link: match u32::from(found.link_layer) {
            sys::IBV_LINK_LAYER_INFINIBAND => LinkLayer::InfiniBand,
            sys::IBV_LINK_LAYER_ETHERNET => LinkLayer::Ethernet,
            _ => LinkLayer::Unknown,
        },
        // The codes are 1 for 256 bytes, 2 for 512, up to 5 for 4096.
        mtu: 128 << found.active_mtu.min(5),
        rate_gbps: rate(read(folder.join("rate")).as_deref()),
        lid: found.lid,
        gids: (0..entries)
            .filter_map(|index| gid(&folder, index))
            .collect(),
    })
}

/// An entry of the GID table; none for an empty one.
fn gid(folder: &Path, index: u32) -> Option<RdmaGid> {
    let text = read(folder.join(format!("gids/{index}")))?;
    let gid: Ipv6Addr = text.parse().ok()?;
    if gid.is_unspecified() {
        return None;
    }
    let attribute = |name: &str| read(folder.join(format!("gid_attrs/{name}/{index}")));
    Some(RdmaGid {
        index,
        gid,
        kind: match attribute("types").as_deref() {
            Some("RoCE v2") => GidKind::RoceV2,
            Some("IB/RoCE v1") => GidKind::InfiniBandOrRoceV1,
            _ => GidKind::Other,
        },
        interface: attribute("ndevs"),
    })
}

/// As in `100 Gb/sec (4X EDR)`.
fn rate(text: Option<&str>) -> f64 {
    let number = text.and_then(|text| text.split_whitespace().next());
    number.and_then(|number| number.parse().ok()).unwrap_or(0.0)
}

fn read(path: PathBuf) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned())
}

/// What a function that returns an error number means.
fn check(status: c_int) -> io::Result<()> {
    match status {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error.abs())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_as_the_kernel_writes_them() {
        assert_eq!(rate(Some("2.5 Gb/sec (1X SDR)")), 2.5);
        assert_eq!(rate(Some("400 Gb/sec (4X NDR)")), 400.0);
        assert_eq!(rate(None), 0.0);
        assert_eq!(rate(Some("unknown")), 0.0);
    }

    #[test]
    fn a_machine_without_a_library_shows_no_devices() {
        let report = probe_rdma();
        match &report.verbs {
            Ok(library) => assert!(library.path.exists()),
            Err(error) => {
                assert!(error.to_string().contains("libibverbs.so.1"), "{error}");
                assert!(report.devices.is_empty());
            }
        }
        if let Err(error) = &report.ucx {
            assert!(error.to_string().contains("libucp.so.0"), "{error}");
        }
    }
}

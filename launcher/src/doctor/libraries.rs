//! RDMA: the libraries that are opened at run time, and the devices they show.

use std::fmt::Write as _;

use blockplane_transfer::{GidKind, PortState, RdmaDevice, RdmaPort, RdmaReport};

use super::{Finding, Roots, Verdict};

const USED: &str = "by the lane verbs of `transfer` where it is configured; not yet by workers";

/// One finding for UCX, one for libibverbs, and one for each device.
pub(super) fn findings(roots: &Roots<'_>) -> Vec<Finding> {
    let mut findings = vec![ucx(&roots.rdma), verbs(&roots.rdma)];
    findings.extend(roots.rdma.devices.iter().map(device));
    findings
}

fn ucx(report: &RdmaReport) -> Finding {
    let (verdict, found, advice) = match &report.ucx {
        Ok(library) => (Verdict::Ok, library.to_string(), ""),
        Err(error) => (
            Verdict::Absent,
            error.to_string(),
            "nothing; shared memory and TCP need no library",
        ),
    };
    Finding {
        name: "UCX",
        verdict,
        found,
        used: "not by this version, which moves KV by shared memory and TCP".to_owned(),
        advice: advice.to_owned(),
    }
}

fn verbs(report: &RdmaReport) -> Finding {
    let mut found = match &report.verbs {
        Ok(library) => format!("{library}, {} device(s)", report.devices.len()),
        Err(error) => error.to_string(),
    };
    if !report.hidden.is_empty() {
        let hidden = report.hidden.join(", ");
        let _ = write!(
            found,
            "; the kernel has {hidden}, which the library does not show"
        );
    }
    let advice = match (&report.verbs, report.hidden.is_empty()) {
        (Ok(_), true) if !report.devices.is_empty() => "",
        (Ok(_), false) => {
            "install the driver of that device for user space (ibverbs-providers, or its vendor's); \
             container: --device /dev/infiniband"
        }
        (Err(_), false) => "install libibverbs1 and ibverbs-providers (rdma-core)",
        (_, true) => "nothing on one host; between hosts install rdma-core when there is a NIC",
    };
    Finding {
        name: "RDMA verbs",
        verdict: if report.devices.is_empty() {
            Verdict::Absent
        } else {
            Verdict::Ok
        },
        found,
        used: USED.to_owned(),
        advice: advice.to_owned(),
    }
}

fn device(device: &RdmaDevice) -> Finding {
    let ports = match &device.ports {
        Ok(ports) => ports,
        Err(reason) => {
            return Finding {
                name: "RDMA device",
                verdict: Verdict::Absent,
                found: reason.clone(),
                used: "not at all".to_owned(),
                advice: "give this user access to /dev/infiniband (container: --device \
                         /dev/infiniband)"
                    .to_owned(),
            };
        }
    };
    let active = ports.iter().any(|port| port.state == PortState::Active);
    let node = device
        .numa_node
        .map_or_else(String::new, |node| format!(", NUMA node {node}"));
    let ports: Vec<_> = ports.iter().map(describe).collect();
    Finding {
        name: "RDMA device",
        verdict: if active {
            Verdict::Ok
        } else {
            Verdict::Limited
        },
        found: format!("{}{node}: {}", device.name, ports.join("; ")),
        used: USED.to_owned(),
        advice: if active {
            String::new()
        } else {
            "no port is active: look at the cable and the link (`rdma link`)".to_owned()
        },
    }
}

fn describe(port: &RdmaPort) -> String {
    let RdmaPort {
        number,
        state,
        link,
        mtu,
        rate_gbps,
        gids,
        ..
    } = port;
    let mut text = format!("port {number} {state}, {link}, {rate_gbps} Gbit/s, MTU {mtu}");
    for gid in gids {
        let kind = match gid.kind {
            GidKind::RoceV2 => " RoCE v2",
            _ => "",
        };
        let interface = gid
            .interface
            .as_ref()
            .map_or_else(String::new, |name| format!(" on {name}"));
        let _ = write!(text, ", GID {} {}{kind}{interface}", gid.index, gid.gid);
    }
    text
}

#[cfg(test)]
pub(super) mod tests {
    use blockplane_transfer::{LibraryError, LinkLayer, RdmaGid, RdmaLibrary};

    use super::*;

    fn missing(name: &'static str) -> LibraryError {
        LibraryError::NotOpened {
            name,
            reason: "no such file".to_owned(),
        }
    }

    /// A machine without any.
    pub(in crate::doctor) fn none() -> RdmaReport {
        RdmaReport {
            verbs: Err(missing("libibverbs.so.1")),
            ucx: Err(missing("libucp.so.0")),
            devices: Vec::new(),
            hidden: Vec::new(),
        }
    }

    fn library() -> RdmaLibrary {
        RdmaLibrary {
            path: "/usr/lib/libibverbs.so.1.14.44.0".into(),
            version: Some("rdma-core 44.0".to_owned()),
        }
    }

    fn nic(ports: Result<Vec<RdmaPort>, String>) -> RdmaDevice {
        RdmaDevice {
            name: "mlx5_0".to_owned(),
            numa_node: Some(1),
            ports,
        }
    }

    #[test]
    fn a_device_is_told_with_its_ports_and_addresses() {
        let port = RdmaPort {
            number: 1,
            state: PortState::Active,
            link: LinkLayer::Ethernet,
            mtu: 4096,
            rate_gbps: 400.0,
            lid: 0,
            gids: vec![RdmaGid {
                index: 3,
                gid: "::ffff:10.0.0.1".parse().unwrap(),
                kind: GidKind::RoceV2,
                interface: Some("eth1".to_owned()),
            }],
        };
        let finding = device(&nic(Ok(vec![port.clone()])));
        assert_eq!(finding.verdict, Verdict::Ok);
        assert_eq!(
            finding.found,
            "mlx5_0, NUMA node 1: port 1 active, Ethernet, 400 Gbit/s, MTU 4096, \
             GID 3 ::ffff:10.0.0.1 RoCE v2 on eth1"
        );
        let down = RdmaPort {
            state: PortState::Down,
            ..port
        };
        assert_eq!(device(&nic(Ok(vec![down]))).verdict, Verdict::Limited);
        let closed = device(&nic(Err("mlx5_0 cannot be opened: EACCES".to_owned())));
        assert!(closed.advice.contains("/dev/infiniband"), "{closed:?}");
    }

    #[test]
    fn what_is_missing_is_told_with_its_cure() {
        let with_nic = RdmaReport {
            hidden: vec!["mlx5_0".to_owned()],
            ..none()
        };
        let finding = verbs(&with_nic);
        assert!(
            finding.found.contains("the kernel has mlx5_0"),
            "{finding:?}"
        );
        assert!(
            finding.advice.contains("install libibverbs1"),
            "{finding:?}"
        );
        let no_driver = RdmaReport {
            verbs: Ok(library()),
            ..with_nic
        };
        assert!(verbs(&no_driver).advice.contains("ibverbs-providers"));
        let whole = RdmaReport {
            devices: vec![nic(Ok(Vec::new()))],
            hidden: Vec::new(),
            ..no_driver
        };
        let finding = verbs(&whole);
        assert_eq!(
            (finding.verdict, finding.advice.as_str()),
            (Verdict::Ok, "")
        );
        assert!(finding.found.contains("rdma-core 44.0"), "{finding:?}");
    }
}

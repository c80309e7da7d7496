//! What is found in a machine that is known to have two Soft-RoCE devices.

use std::net::Ipv6Addr;

use blockplane_rdma_sys::{GidKind, LinkLayer, PortState, probe_rdma};

#[test]
#[ignore = "needs the machine of tests/rdma/vm.py: tests/run rdma"]
fn the_two_devices_of_the_machine_are_found() {
    let report = probe_rdma();
    let verbs = report.verbs.unwrap();
    assert_eq!(verbs.version.as_deref(), Some("rdma-core 44.0"));
    assert!(verbs.path.ends_with("libibverbs.so.1.14.44.0"), "{verbs}");
    assert_eq!(report.ucx.unwrap().version.as_deref(), Some("1.13.1"));
    assert_eq!(report.hidden, Vec::<String>::new());
    let names: Vec<_> = report.devices.iter().map(|device| &*device.name).collect();
    assert_eq!(names, ["rxe0", "rxe1"]);
    for (last, device) in (10..).zip(&report.devices) {
        assert_eq!(device.numa_node, None);
        let [port] = &device.ports.as_ref().unwrap()[..] else {
            panic!("{device:?}");
        };
        assert_eq!((port.number, port.state), (1, PortState::Active));
        assert_eq!(
            (port.link, port.mtu, port.lid),
            (LinkLayer::Ethernet, 4096, 0)
        );
        assert!(port.rate_gbps > 0.0, "{port:?}");
        let [local, ipv4] = &port.gids[..] else {
            panic!("{port:?}");
        };
        assert!(local.gid.is_unicast_link_local());
        let interface = format!("v{}", last - 10);
        let mapped: Ipv6Addr = format!("::ffff:10.9.0.{last}").parse().unwrap();
        assert_eq!((ipv4.gid, ipv4.index), (mapped, 1));
        for gid in [local, ipv4] {
            assert_eq!(gid.kind, GidKind::RoceV2);
            assert_eq!(gid.interface.as_deref(), Some(&*interface));
        }
    }
}

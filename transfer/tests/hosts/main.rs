//! Two hosts: agents in network namespaces, with a wire between them that is cut and mended.
//!
//! It takes the right to make namespaces; without it every test says so and does nothing
//! (`tests/run hosts` counts the group as skipped then).

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "a failed unwrap is a failed test, sizes are small, and a reason is printed"
)]

mod host;
mod net;

use std::time::Duration;

use rustix::process::Signal;

use host::{Folder, Host, two_agents};
use net::{Net, Side};

/// Longer than anything takes on a busy machine.
const WAIT: Duration = Duration::from_secs(30);
/// `peer_loss_timeout` of all agents.
const LOSS: Duration = Duration::from_secs(1);

/// How a host noticed the loss; silence must have been noticed in time.
fn check_lost(answer: &str, allowed: &[&str]) {
    let cause = answer
        .strip_prefix("lost: ")
        .unwrap_or_else(|| panic!("{answer}"));
    assert!(
        allowed.iter().any(|allowed| cause.starts_with(allowed)),
        "{cause}, not one of {allowed:?}"
    );
    if let Some(silent) = cause.strip_prefix("Silent(") {
        let silent = silent.trim_end_matches(')');
        let millis = match silent.strip_suffix("ms") {
            Some(millis) => millis.parse::<f64>().unwrap(),
            None => silent.trim_end_matches('s').parse::<f64>().unwrap() * 1000.0,
        };
        assert!(
            millis <= 2.0 * LOSS.as_millis() as f64,
            "noticed late: {cause}"
        );
    }
}

#[test]
fn bytes_move_both_ways_and_the_lane_is_explained() {
    let Some(net) = Net::make() else { return };
    let (mut hosts, metadata) = two_agents(&net, Folder::Own);
    for (from, to) in [(0, 1), (1, 0)] {
        let lane = hosts[from].ask(&format!("connect {}", metadata[to]));
        // One kernel, so the same host as far as the metadata says; but the socket is not there.
        assert!(lane.starts_with("tcp: TCP to 10.77.0."), "{lane}");
        assert!(lane.contains("not shm: cannot connect to"), "{lane}");
        assert_eq!(hosts[from].ask("move 3"), "moved");
    }
    // Both directions at the same time.
    hosts.iter_mut().for_each(|host| host.say("move 10"));
    hosts
        .iter_mut()
        .for_each(|host| assert_eq!(host.hear(), "moved"));
}

#[test]
fn namespaces_that_share_the_folder_share_memory() {
    let Some(net) = Net::make() else { return };
    let (mut hosts, metadata) = two_agents(&net, Folder::Shared);
    let lane = hosts[0].ask(&format!("connect {}", metadata[1]));
    assert!(lane.starts_with("shm: "), "{lane}");
    assert_eq!(hosts[0].ask("move 3"), "moved");
}

#[test]
fn the_advertised_address_is_the_one_that_is_used() {
    let Some(net) = Net::make() else { return };
    let mut hosts = [Side::A, Side::B].map(|side| Host::start(&net, side, Folder::Own));
    hosts[0].agent(&net, Side::A.address(), "-");
    for (bind, advertise, shown) in [
        ("0.0.0.0", Side::B.address(), "tcp: TCP to 10.77.0.2:"),
        ("::", Side::B.address6(), "tcp: TCP to [fd77::2]:"),
        (Side::B.address6(), "-", "tcp: TCP to [fd77::2]:"),
    ] {
        let metadata = hosts[1].agent(&net, bind, advertise);
        let lane = hosts[0].ask(&format!("connect {metadata}"));
        assert!(lane.starts_with(shown), "{lane}");
        assert_eq!(hosts[0].ask("move 1"), "moved");
    }
    // Without an advertised address a wildcard leads nowhere, and that is said.
    let metadata = hosts[1].agent(&net, "0.0.0.0", "-");
    let refused = hosts[0].ask(&format!("connect {metadata}"));
    assert!(refused.starts_with("error: no lane to agent"), "{refused}");
}

/// The wire is cut in the middle of transfers, in one direction or both, and nobody is told. Both
/// ends notice in time; when the wire is mended, a new connection works.
fn cut_and_mended(cut: &[Side]) {
    let Some(net) = Net::make() else { return };
    let (mut hosts, metadata) = two_agents(&net, Folder::Own);
    for op in ["write", "read"] {
        for (from, to) in [(0, 1), (1, 0)] {
            let lane = hosts[from].ask(&format!("connect {}", metadata[to]));
            assert!(lane.starts_with("tcp: "), "{lane}");
        }
        for host in &mut hosts {
            assert_eq!(host.ask(&format!("lose {op}")), "moving");
        }
        cut.iter().for_each(|side| net.cut(*side));
        for host in &mut hosts {
            // The one that still hears the other learns it from the other's end of the connection.
            check_lost(&host.hear(), &["Silent", "Closed", "Broken"]);
            assert_eq!(host.ask("peers"), "0");
        }
        if cut.len() == 2 {
            let refused = hosts[0].ask(&format!("try {}", metadata[1]));
            assert!(refused.starts_with("error: no lane"), "{refused}");
        }
        cut.iter().for_each(|side| net.mend(*side));
        for (from, to) in [(0, 1), (1, 0)] {
            let lane = hosts[from].ask(&format!("connect {}", metadata[to]));
            assert!(lane.starts_with("tcp: "), "{lane}");
            assert_eq!(hosts[from].ask("move 1"), "moved");
        }
    }
}

#[test]
fn a_wire_cut_in_both_directions_is_noticed_and_mended() {
    cut_and_mended(&[Side::A, Side::B]);
}

#[test]
fn a_wire_cut_in_one_direction_is_noticed_and_mended() {
    cut_and_mended(&[Side::A]);
}

#[test]
fn a_host_that_loses_power_says_nothing() {
    let Some(net) = Net::make() else { return };
    let (mut hosts, metadata) = two_agents(&net, Folder::Own);
    hosts[0].ask(&format!("connect {}", metadata[1]));
    assert_eq!(hosts[0].ask("lose write"), "moving");
    // Nothing of its end gets out.
    net.cut(Side::B);
    hosts[1].signal(Signal::KILL);
    check_lost(&hosts[0].hear(), &["Silent"]);
    net.mend(Side::B);
    // It comes back under the same name; what was known of its last life is of no use.
    hosts[1] = Host::start(&net, Side::B, Folder::Own);
    let again = hosts[1].agent(&net, Side::B.address(), "-");
    let old = hosts[0].ask(&format!("try {}", metadata[1]));
    assert!(old.starts_with("error: "), "{old}");
    let lane = hosts[0].ask(&format!("connect {again}"));
    assert!(lane.starts_with("tcp: "), "{lane}");
    assert_eq!(hosts[0].ask("move 2"), "moved");
}

#[test]
fn a_slow_wire_is_not_a_lost_peer() {
    let Some(net) = Net::make() else { return };
    let (mut hosts, metadata) = two_agents(&net, Folder::Own);
    for (from, to) in [(0, 1), (1, 0)] {
        hosts[from].ask(&format!("connect {}", metadata[to]));
    }
    if !net.slow_down("100mbit") {
        println!("not run: this kernel has no token bucket filter");
        return;
    }
    // 16 MiB each way take longer than the loss timeout.
    hosts.iter_mut().for_each(|host| host.say("move 1"));
    hosts
        .iter_mut()
        .for_each(|host| assert_eq!(host.hear(), "moved"));
    for host in &mut hosts {
        assert_eq!(host.ask("peers"), "1");
    }
}

/// Not a test: an agent on a host.
#[test]
#[ignore = "started by the other tests"]
fn host_process() {
    host::run();
}

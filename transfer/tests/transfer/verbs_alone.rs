//! What is special about the verbs lane. These change the machine for all its processes, or need one
//! that is set up for them: one at a time.

use std::process::Command;
use std::time::{Duration, Instant};

use blockplane_transfer::{
    Agent, AgentConfig, AgentError, ArenaConfig, Lane, LossCause, Op, PostError, PostOptions,
    RdmaError, RegisterError, TlsConfig, TransferError,
};

use crate::support::{Blocks, Setup, WAIT, arena, bytes, fill};
use crate::tls::Authority;

/// Every packet of the second device is lost while this lives.
struct Cut;

impl Cut {
    fn now() -> Self {
        tc(&["replace", "dev", "v1", "root", "netem", "loss", "100%"]);
        Self
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        tc(&["delete", "dev", "v1", "root"]);
    }
}

fn tc(arguments: &[&str]) {
    let status = Command::new("/sbin/tc")
        .arg("qdisc")
        .args(arguments)
        .status();
    assert!(status.unwrap().success());
}

/// The wire of the devices is cut, and the control connection is not.
#[test]
#[ignore = "needs two RDMA devices, alone: tests/run rdma"]
fn a_wire_that_is_cut_is_a_lost_peer_within_the_bound() {
    let loss = Duration::from_secs(2);
    for op in [Op::Write, Op::Read] {
        let pair = Setup::new(Lane::Verbs).pair_with(|config| config.peer_loss_timeout = loss);
        let (local, remote) = (arena(&pair.a, 1 << 20), arena(&pair.b, 1 << 20));
        let side = Blocks::flat(16, 1 << 16, &(0..16).collect::<Vec<_>>());
        let prepared = pair
            .prepare(op, (&local, &side), (&remote, &side), None)
            .unwrap();
        prepared
            .post(PostOptions::within(WAIT))
            .unwrap()
            .wait(WAIT)
            .unwrap();
        let cut = Cut::now();
        let began = Instant::now();
        let error = prepared
            .post(PostOptions::within(WAIT))
            .unwrap()
            .wait(WAIT)
            .unwrap_err();
        // The device may wait four times as long as it is told.
        assert!(
            began.elapsed() < loss * 4 + Duration::from_secs(1),
            "{:?}",
            began.elapsed()
        );
        let TransferError::PeerLost(lost) = &error else {
            panic!("{error}");
        };
        assert!(
            matches!(&lost.cause, LossCause::Rdma { device, reason }
                if device == "rxe0" && reason.contains("retry counter exceeded")),
            "{error}"
        );
        let again = prepared.post(PostOptions::within(WAIT)).unwrap_err();
        assert!(matches!(again, PostError::PeerLost(_)), "{again}");
        drop(cut);
        // The memory is ours, and a new connection works.
        fill(&local, 5);
        let before = bytes(&local);
        let peer = pair.a.connect(&pair.b.metadata(), WAIT).unwrap();
        let local_side = side.local(&local);
        let write = pair
            .a
            .prepare(Op::Write, local_side, side.remote(&peer, remote.id(), None));
        write
            .unwrap()
            .post(PostOptions::within(WAIT))
            .unwrap()
            .wait(WAIT)
            .unwrap();
        assert!(bytes(&local) == before && bytes(&remote) == before);
    }
}

/// Seconds of processor time that this process has used.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(
        time.tv_sec.cast_unsigned(),
        time.tv_nsec.cast_unsigned() as u32,
    )
}

#[test]
#[ignore = "needs two RDMA devices, alone: tests/run rdma"]
fn an_idle_connection_sleeps() {
    let pair = Setup::new(Lane::Verbs).pair();
    let (local, remote) = (arena(&pair.a, 4096), arena(&pair.b, 4096));
    let side = Blocks::flat(1, 4096, &[0]);
    let prepared = pair
        .prepare(Op::Write, (&local, &side), (&remote, &side), None)
        .unwrap();
    prepared
        .post(PostOptions::within(WAIT))
        .unwrap()
        .wait(WAIT)
        .unwrap();
    let quiet = |time| pair.b.notifications().recv_timeout(time).unwrap_err();
    quiet(Duration::from_millis(200));
    let before = processor_time();
    quiet(Duration::from_secs(2));
    let used = processor_time() - before;
    assert!(used < Duration::from_millis(200), "{used:?} in 2 s");
}

/// Run as an ordinary user with a small limit.
#[test]
#[ignore = "needs an RDMA device and a limit of 1 MiB of locked memory: tests/run rdma"]
fn memory_that_may_not_be_locked_names_the_limit() {
    let agent = Agent::new(Setup::new(Lane::Verbs).config("a")).unwrap();
    let error = agent.allocate(ArenaConfig::new(4 << 20, "kv")).unwrap_err();
    let RegisterError::Rdma { bytes, limit, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!((*bytes, *limit), (4 << 20, Some(1 << 20)));
    let text = error.to_string();
    for part in ["\"kv\"", "rxe0", "ulimit -l", "1048576", "4194304"] {
        assert!(text.contains(part), "{text}");
    }
    // What fits works.
    agent.allocate(ArenaConfig::new(64 << 10, "small")).unwrap();
}

#[test]
#[ignore = "needs two RDMA devices: tests/run rdma"]
fn peers_without_the_lane_and_wrong_devices_are_named() {
    let setup = Setup::new(Lane::Verbs);
    let a = Agent::new(setup.config("a")).unwrap();
    let plain = Agent::new(AgentConfig::new("plain").with_lanes([Lane::Tcp])).unwrap();
    let error = a.connect(&plain.metadata(), WAIT).unwrap_err().to_string();
    assert!(error.contains("does not offer RDMA"), "{error}");
    // The next lane is taken, and says why the first was not.
    let both = Agent::new(setup.config("both").with_lanes([Lane::Verbs, Lane::Tcp])).unwrap();
    let peer = both.connect(&plain.metadata(), WAIT).unwrap();
    assert_eq!(peer.lane().lane, Lane::Tcp);
    assert!(
        peer.lane()
            .reason
            .contains("not verbs: the peer does not offer RDMA")
    );
    let mut config = setup.config("a");
    config.rdma.device = Some("mlx5_9".to_owned());
    let error = Agent::new(config).unwrap_err();
    assert!(
        matches!(&error, AgentError::Rdma(RdmaError::NoDevice { .. })),
        "{error}"
    );
    assert!(error.to_string().contains("mlx5_9"), "{error}");
}

#[test]
fn payload_is_not_promised_to_be_secret() {
    let tls: TlsConfig = Authority::new().local();
    let mut config = AgentConfig::new("a").with_lanes([Lane::Verbs]);
    config.tls = Some(tls);
    let error = Agent::new(config).unwrap_err();
    assert!(
        matches!(error, AgentError::InvalidConfig { field: "lanes", .. }),
        "{error}"
    );
}

//! Devices where there are none: an ordinary state, said in words, in which everything else works. Where there
//! is a device these tests say the same of agents that may not use it; `blockplane selftest gpu` does the rest.

use blockplane_transfer::{
    Agent, AgentConfig, AgentError, ArenaConfig, CudaUnavailable, DeviceArenaConfig, DeviceEvent,
    DeviceMemory, DeviceSharing, Lane, Op, PinConfig, PostError, PostOptions, RegisterError,
    RemoteAccess, probe_cuda,
};

use crate::support::{Blocks, Pair, Setup, WAIT, arena, bytes, fill};

fn config(name: &str, enabled: bool) -> AgentConfig {
    let mut config = AgentConfig::new(name);
    config.cuda.enabled = enabled;
    config
}

/// Why an agent cannot have device memory.
fn refusal(agent: &Agent, config: DeviceArenaConfig) -> (String, CudaUnavailable) {
    match agent.allocate_device(config) {
        Err(RegisterError::Cuda { label, source }) => (label, source),
        other => panic!("{other:?}"),
    }
}

#[test]
fn without_a_driver_device_memory_is_refused_with_what_to_do() {
    let Err(missing) = probe_cuda() else {
        // There is a device: what is refused then is one that does not exist.
        let agent = Agent::new(config("a", true)).unwrap();
        let (_, source) = refusal(&agent, DeviceArenaConfig::new(4000, 4096, "none"));
        assert!(matches!(
            source,
            CudaUnavailable::UnknownDevice { device: 4000, .. }
        ));
        return;
    };
    let agent = Agent::new(config("a", true)).unwrap();
    for sharing in [DeviceSharing::FileDescriptor, DeviceSharing::Handle] {
        let config = DeviceArenaConfig::new(0, 4096, "kv").shared_by(sharing);
        assert_eq!(refusal(&agent, config), ("kv".to_owned(), missing.clone()));
    }
    if missing == CudaUnavailable::NoDriver {
        let text = missing.to_string();
        assert!(
            text.contains("libcuda.so.1") && text.contains("install"),
            "{text}"
        );
    }
    let pinned = ArenaConfig::new(4096, "host").pinned(PinConfig::near(0));
    match agent.allocate(pinned) {
        Err(RegisterError::Cuda { source, .. }) => assert_eq!(source, missing),
        other => panic!("{other:?}"),
    }
    // SAFETY: nothing follows the address where there is no device.
    let memory = unsafe { DeviceMemory::from_raw(0, 1 << 40, 4096) };
    match agent.register_device(memory, RemoteAccess::Open) {
        Err(RegisterError::Cuda { source, .. }) => assert_eq!(source, missing),
        other => panic!("{other:?}"),
    }
}

#[test]
fn agents_that_may_not_use_cuda_say_so() {
    let agent = Agent::new(config("a", false)).unwrap();
    let (label, source) = refusal(&agent, DeviceArenaConfig::new(0, 4096, "kv"));
    assert_eq!((&*label, &source), ("kv", &CudaUnavailable::Off));
    assert!(source.to_string().contains("AgentConfig::cuda"), "{source}");
    let pinned = ArenaConfig::new(4096, "host").pinned(PinConfig::near(0));
    match agent.allocate(pinned) {
        Err(RegisterError::Cuda { source, .. }) => assert_eq!(source, CudaUnavailable::Off),
        other => panic!("{other:?}"),
    }
    // SAFETY: nothing follows the address where CUDA is off.
    let memory = unsafe { DeviceMemory::from_raw(0, 1 << 40, 4096) };
    match agent.register_device(memory, RemoteAccess::Open) {
        Err(RegisterError::Cuda { source, .. }) => assert_eq!(source, CudaUnavailable::Off),
        other => panic!("{other:?}"),
    }
}

#[test]
fn settings_that_make_no_sense_are_named() {
    let refused = |change: &dyn Fn(&mut AgentConfig)| {
        let mut config = AgentConfig::new("a");
        change(&mut config);
        match Agent::new(config) {
            Err(AgentError::InvalidConfig { field, .. }) => field,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refused(&|config| config.cuda.sms = 0), "cuda.sms");
    assert_eq!(refused(&|config| config.cuda.streams = 0), "cuda.streams");
    assert_eq!(refused(&|config| config.cuda.streams = 65), "cuda.streams");
    let long = std::time::Duration::from_millis(11);
    assert_eq!(refused(&|config| config.cuda.spin = long), "cuda.spin");
    // Devices are not a way to reach a peer.
    match Agent::new(AgentConfig::new("a").with_lanes([Lane::Shm, Lane::Cuda])) {
        Err(error @ AgentError::InvalidConfig { field: "lanes", .. }) => {
            let text = error.to_string();
            assert!(
                text.contains("cuda") && text.contains("loopback and shm"),
                "{text}"
            );
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn options_for_devices_are_refused_elsewhere() {
    for lane in [Lane::Loopback, Lane::Shm, Lane::Tcp] {
        let pair = Setup::new(lane).pair();
        let (local, remote) = (arena(&pair.a, 8000), arena(&pair.b, 8000));
        let side = Blocks::flat(8, 1000, &[0, 3, 1]);
        let prepared = pair
            .prepare(Op::Write, (&local, &side), (&remote, &side), None)
            .unwrap();
        assert_eq!(prepared.plan().lane, lane);
        // SAFETY: it is refused before anybody looks at the event.
        let event = unsafe { DeviceEvent::from_raw(std::ptr::null_mut()) };
        fill(&remote, 2);
        let before = bytes(&remote);
        for (options, option) in [
            (PostOptions::within(WAIT).after(event), "an event"),
            (
                PostOptions::within(WAIT).sms(4),
                "a budget of multiprocessors",
            ),
        ] {
            let refused = prepared.post(options.notify("never")).unwrap_err();
            assert_eq!(refused, PostError::NotOnDevice { option, lane });
            assert!(!refused.retryable());
        }
        assert!(bytes(&remote) == before);
        // The refused ones have left nothing behind.
        prepared
            .post(PostOptions::within(WAIT).notify("there"))
            .unwrap()
            .wait(WAIT)
            .unwrap();
        let note = pair.b.notifications().recv_timeout(WAIT).unwrap();
        assert_eq!(note.payload, "there");
    }
}

#[test]
fn a_refused_option_gives_its_place_in_the_queue_back() {
    let pair = Setup::new(Lane::Loopback).pair();
    let (local, remote) = (arena(&pair.a, 8000), arena(&pair.b, 8000));
    let side = Blocks::flat(8, 1000, &[0, 3, 1]);
    let prepared = pair
        .prepare(Op::Write, (&local, &side), (&remote, &side), None)
        .unwrap();
    let queue = pair.a.completion_queue(1).unwrap();
    for token in 0..5 {
        let options = PostOptions::within(WAIT).complete_to(&queue, token).sms(1);
        let refused = prepared.post(options).unwrap_err();
        assert!(
            matches!(refused, PostError::NotOnDevice { .. }),
            "{refused}"
        );
    }
    let options = PostOptions::within(WAIT).complete_to(&queue, 7);
    prepared.post(options).unwrap().detach();
    let ended = queue.wait_timeout(WAIT).unwrap();
    assert_eq!((ended.token, ended.outcome), (7, Ok(())));
}

#[test]
fn agents_with_and_without_cuda_understand_each_other() {
    let (a, b) = (
        Agent::new(config("a", true)).unwrap(),
        Agent::new(config("b", false)).unwrap(),
    );
    let blob = b.metadata().to_bytes();
    let metadata = blockplane_transfer::Metadata::from_bytes(&blob).unwrap();
    let peer = a.connect(&metadata, WAIT).unwrap();
    let pair = Pair { a, b, peer };
    let (local, remote) = (arena(&pair.a, 64_000), arena(&pair.b, 64_000));
    let side = Blocks::flat(64, 1000, &[5, 9, 60, 0]);
    for op in [Op::Write, Op::Read] {
        pair.check(op, (&local, &side), (&remote, &side));
    }
    assert_eq!((local.device(), local.pinned()), (None, None));
}

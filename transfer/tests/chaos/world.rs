//! One seed: two agents, what they do to each other, and what happens to them.

use std::fmt;
use std::io::{BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockplane_transfer::{Agent, AgentConfig, Lane, LossCause};
use rustix::process::{Pid, Signal, kill_process};

use crate::actor::Actor;
use crate::link::{Gone, Link};
use crate::owner::{Owner, Reclaimed};
use crate::proxy::Proxy;
use crate::random::Random;
use crate::{NOTIFICATIONS_MAX, WAIT};

/// Where the two agents live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In one process.
    Together,
    /// In a process each.
    Apart,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct World {
    pub(crate) lane: Lane,
    pub(crate) place: Place,
    pub(crate) seed: u64,
}

impl fmt::Display for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match self.place {
            Place::Together => "together",
            Place::Apart => "apart",
        };
        write!(f, "{}:{place}:{}", self.lane, self.seed)
    }
}

/// What a world has seen.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Report {
    pub(crate) completed: u64,
    pub(crate) failed: u64,
    pub(crate) event: usize,
}

/// What happens to the other process in the middle of it all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Nothing,
    Kill,
    Stop,
    StopThenKill,
    Reset,
}

/// Silence that counts as loss in worlds where a process is stopped. Elsewhere it is longer than
/// anything takes, so that what is noticed there is not noticed by silence.
const SILENCE: Duration = Duration::from_millis(400);
const NO_SILENCE: Duration = Duration::from_secs(60);

fn config(name: &str, lane: Lane, silence: Duration) -> AgentConfig {
    let mut config = AgentConfig::new(name).with_lanes([lane]);
    // Small parts and chunks: many of them, and many moments to be interrupted.
    config.copy_part_bytes = 4096;
    config.copy_threads = 2;
    config.copy_bytes_per_thread = 16384;
    config.stream_chunk_bytes = 16384;
    config.io_threads = 2;
    config.notifications_max = NOTIFICATIONS_MAX;
    config.posts_max = 2 * NOTIFICATIONS_MAX;
    config.connect_timeout = WAIT;
    config.peer_loss_timeout = silence;
    config
}

pub(crate) fn run(world: World) -> Report {
    match world.place {
        Place::Together => run_together(world),
        Place::Apart => run_apart(world),
    }
}

fn run_together(world: World) -> Report {
    let World { lane, seed, .. } = world;
    let agents = ["a", "b"].map(|name| Agent::new(config(name, lane, NO_SILENCE)).unwrap());
    let owners = [Owner::start(&agents[0]), Owner::start(&agents[1])];
    let (left, right) = UnixStream::pair().unwrap();
    let hang_up = left.try_clone().unwrap();
    let mut links = Vec::new();
    for (end, owner) in [left, right].into_iter().zip(&owners) {
        let (input, owner) = (BufReader::new(end.try_clone().unwrap()), owner.clone());
        links.push(Link::start(input, end, move |question| {
            owner.serve(question)
        }));
    }
    let mut report = Report::default();
    std::thread::scope(|scope| {
        let other = scope.spawn(|| play(&agents[1], &links[1], seed ^ (1 << 40), true));
        let mut random = Random::new(seed);
        let mut actor = Actor::start(&agents[0], &links[0], random.next(), true).unwrap();
        for _ in 0..steps(&mut random) {
            actor.step().unwrap();
        }
        actor.finish().unwrap();
        assert!(actor.losses.is_empty(), "{:?}", actor.losses);
        report = Report {
            completed: actor.completed,
            failed: actor.failed,
            event: 0,
        };
        other.join().unwrap();
    });
    // Both links end, and with them what they serve.
    hang_up.shutdown(std::net::Shutdown::Both).unwrap();
    report
}

fn steps(random: &mut Random) -> u64 {
    20 + random.below(40)
}

/// A whole schedule of the side that nothing is done to by the test.
fn play(agent: &Agent, link: &Arc<Link>, seed: u64, strict: bool) {
    let mut random = Random::new(seed);
    let played = (|| {
        let mut actor = Actor::start(agent, link, random.next(), strict)?;
        for _ in 0..steps(&mut random) {
            actor.step()?;
        }
        actor.finish()?;
        let explained = |cause: &LossCause| {
            !strict
                && matches!(
                    cause,
                    LossCause::Silent(_) | LossCause::Closed | LossCause::Broken(_)
                )
        };
        assert!(actor.losses.iter().all(explained), "{:?}", actor.losses);
        Ok(())
    })();
    match played {
        Ok(()) => link.say_done(),
        Err(Gone) => panic!("the other side is gone"),
    }
}

// ---- two processes ----

/// The other process.
struct Other {
    child: Child,
    link: Arc<Link>,
    go: std::process::ChildStdin,
}

impl Other {
    fn start(world: World, life: u64, event: Event, owner: &Arc<Owner>, port: u16) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "other_process", "--nocapture"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            // A group of its own: signals to this test's group do not reach it.
            .process_group(0)
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let strict = event != Event::Stop;
        let seed = world.seed ^ (life << 41);
        writeln!(
            input,
            "world {} {seed} {} {} {port}",
            world.lane,
            silence(event).as_millis(),
            u8::from(strict)
        )
        .unwrap();
        let writer = std::fs::File::from(
            std::os::fd::AsFd::as_fd(&input)
                .try_clone_to_owned()
                .unwrap(),
        );
        let owner = owner.clone();
        let link = Link::start(output, writer, move |question| owner.serve(question));
        Self {
            child,
            link,
            go: input,
        }
    }

    /// Lets its own schedule begin.
    fn go(&mut self) {
        writeln!(self.go, "go").unwrap();
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.child.wait().unwrap();
    }

    /// Its schedule has come to its end, and it ends when it is told to.
    fn finish(self) {
        let done = self.link.wait_done();
        assert!(done.is_ok(), "the other process failed");
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const fn silence(event: Event) -> Duration {
    match event {
        Event::Stop | Event::StopThenKill => SILENCE,
        Event::Nothing | Event::Kill | Event::Reset => NO_SILENCE,
    }
}

fn run_apart(world: World) -> Report {
    let World { lane, seed, .. } = world;
    let mut random = Random::new(seed);
    let event = match random.below(10) {
        0..2 => Event::Nothing,
        2..5 => Event::Kill,
        5..7 => Event::Stop,
        7 => Event::StopThenKill,
        _ if lane == Lane::Tcp => Event::Reset,
        _ => Event::Kill,
    };
    let agent = Agent::new(config("a", lane, silence(event))).unwrap();
    let owner = Owner::start(&agent);
    // The other agent says that it is at the address of the proxy.
    let proxy = (event == Event::Reset).then(Proxy::start);
    let port = proxy.as_ref().map_or(0, Proxy::port);
    let mut other = Other::start(world, 0, event, &owner, port);
    let mut actor =
        Actor::start(&agent, &other.link, random.next(), silence(event) > SILENCE).unwrap();
    other.go();
    for _ in 0..steps(&mut random) {
        actor.step().unwrap();
    }
    assert!(
        actor.losses.is_empty() || silence(event) == SILENCE,
        "{:?}",
        actor.losses
    );
    let mut reclaimed = Reclaimed::new(actor.tag());
    match event {
        Event::Nothing => {}
        Event::Kill => {
            other.kill();
            other = new_life(world, &mut actor, &owner, reclaimed, &mut random);
        }
        Event::Stop => stop_and_go_on(&mut actor, &owner, &other, reclaimed, &mut random),
        Event::StopThenKill => {
            other.signal(Signal::STOP);
            drop(bury_stopped(&mut actor));
            owner.reclaim(&mut reclaimed, lane == Lane::Shm);
            other.kill();
            owner.reclaim_rest(&mut reclaimed);
            other = new_life(world, &mut actor, &owner, reclaimed, &mut random);
        }
        Event::Reset => {
            for _ in 0..3 {
                proxy.as_ref().unwrap().reset();
                for _ in 0..10 {
                    actor.step().unwrap();
                }
            }
        }
    }
    actor.finish().unwrap();
    let report = Report {
        completed: actor.completed,
        failed: actor.failed,
        event: event as usize,
    };
    other.finish();
    report
}

/// The other process is dead: everything ends at once, and its next life can be met.
fn new_life(
    world: World,
    actor: &mut Actor,
    owner: &Arc<Owner>,
    mut reclaimed: Reclaimed,
    random: &mut Random,
) -> Other {
    drop(actor.bury());
    lost_within(actor, WAIT);
    // Nothing is left that could use the windows of the dead.
    owner.reclaim(&mut reclaimed, false);
    let dead = actor.peer.epoch();
    let mut other = Other::start(world, 1, Event::Nothing, owner, 0);
    actor.meet_again(&other.link).unwrap();
    for _ in 0..random.below(15) {
        actor.step().unwrap();
    }
    assert!(
        owner.damaged(&reclaimed).is_empty(),
        "the dead have written"
    );
    owner.renew(dead);
    other.go();
    other
}

/// The other process is stopped, given up, and goes on.
fn stop_and_go_on(
    actor: &mut Actor,
    owner: &Owner,
    other: &Other,
    mut reclaimed: Reclaimed,
    random: &mut Random,
) {
    other.signal(Signal::STOP);
    let buried = bury_stopped(actor);
    // One that maps our memory may be in the middle of a copy, and keeps its windows.
    owner.reclaim(&mut reclaimed, actor.peer.lane().lane == Lane::Shm);
    other.signal(Signal::CONT);
    owner.reclaim_rest(&mut reclaimed);
    for (flight, end) in buried {
        actor.end_there(flight, &end).unwrap();
    }
    for _ in 0..random.below(25) {
        actor.step().unwrap();
    }
    actor.finish().unwrap();
    assert!(
        owner.damaged(&reclaimed).is_empty(),
        "a stopped process has written after it was given up"
    );
}

/// Everything ends although the other process says nothing, and it is given up in time.
fn bury_stopped(actor: &mut Actor) -> Vec<(crate::flight::Flight, crate::flight::End)> {
    let buried = actor.bury();
    lost_within(actor, WAIT);
    let cause = actor.peer.lost().unwrap().cause;
    // It may have been given up just before.
    if let LossCause::Silent(silent) = cause {
        assert!(silent <= SILENCE * 4, "noticed after {silent:?}");
    }
    buried
}

fn lost_within(actor: &Actor, bound: Duration) {
    let started = Instant::now();
    while actor.peer.is_connected() {
        assert!(started.elapsed() < bound, "the loss goes unnoticed");
        std::thread::yield_now();
    }
}

/// The body of the other process.
pub(crate) fn other_process() {
    let mut input = BufReader::new(std::io::stdin());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut input, &mut line).unwrap();
    let words: Vec<&str> = line.trim().split(' ').collect();
    let ["world", lane, seed, silence, strict, port] = words[..] else {
        panic!("{line:?}");
    };
    let lane = match lane {
        "shm" => Lane::Shm,
        _ => Lane::Tcp,
    };
    let silence = Duration::from_millis(silence.parse().unwrap());
    let mut config = config("b", lane, silence);
    let port: u16 = port.parse().unwrap();
    if port != 0 {
        config.tcp_bind = SocketAddr::from((Proxy::BEHIND, port));
        config.advertise_host = Some(Proxy::ADDRESS.to_string());
    }
    let agent = Agent::new(config).unwrap();
    let owner = Owner::start(&agent);
    let link = Link::start(input, std::io::stdout(), move |question| {
        owner.serve(question)
    });
    if link.wait_go().is_ok() {
        play(&agent, &link, seed.parse().unwrap(), strict == "1");
    }
    link.wait_gone();
}

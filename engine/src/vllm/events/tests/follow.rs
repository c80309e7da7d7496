//! Gaps, replays, restarts: one by one, and by the thousand against a simulated vLLM.

use std::{
    collections::{BTreeSet, VecDeque},
    time::{Duration, Instant},
};

use blockplane_kvbm::EventWriter;
use blockplane_protocol::{DpRank, SequenceHash, Tier};
use proptest::{collection::vec, prelude::*};
use serde_json::{Value, json};

use super::{
    super::{
        chain::Chain,
        follow::{Ask, Follower},
        status::Confidence,
    },
    BLOCK, View, batch, cleared, on_device, removed, stored, with,
};

/// A vLLM that holds some prompts, with its replay buffer.
struct Server {
    /// First tokens of the prompts it holds, each of two blocks.
    holds: BTreeSet<u32>,
    next: u64,
    buffer: VecDeque<(u64, Vec<u8>)>,
    buffer_max: usize,
}

impl Server {
    fn new(buffer_max: usize) -> Self {
        Self {
            holds: BTreeSet::new(),
            next: 0,
            buffer: VecDeque::new(),
            buffer_max,
        }
    }

    fn publish(&mut self, events: &[Value]) -> (u64, Vec<u8>) {
        let message = (self.next, batch(events));
        self.next += 1;
        self.buffer.push_back(message.clone());
        if self.buffer.len() > self.buffer_max {
            self.buffer.pop_front();
        }
        message
    }

    /// The second block comes in an event of its own, so that it has a parent to be known.
    fn store(&mut self, prompt: u32) -> (u64, Vec<u8>) {
        if !self.holds.insert(prompt) {
            return self.publish(&[]);
        }
        let tokens = tokens(prompt);
        let first = u64::from(prompt) * 2;
        self.publish(&[
            stored(&[first], None, &tokens[..4]),
            stored(&[first + 1], Some(first), &tokens[4..]),
        ])
    }

    fn remove(&mut self, prompt: u32) -> (u64, Vec<u8>) {
        if !self.holds.remove(&prompt) {
            return self.publish(&[]);
        }
        let first = u64::from(prompt) * 2;
        self.publish(&[removed(&[first + 1]), removed(&[first])])
    }

    fn clear(&mut self) -> (u64, Vec<u8>) {
        self.holds.clear();
        self.publish(&[cleared()])
    }

    fn truth(&self) -> BTreeSet<(SequenceHash, Tier)> {
        let prompts = self.holds.iter();
        prompts
            .flat_map(|prompt| on_device(&tokens(*prompt)))
            .collect()
    }
}

fn tokens(prompt: u32) -> Vec<u32> {
    (prompt * 100..).take(2 * BLOCK as usize).collect()
}

struct Scene {
    follower: Follower,
    view: View,
    now: Instant,
}

impl Scene {
    fn new(has_replay: bool) -> Self {
        Self::with_blocks(has_replay, 1_000)
    }

    fn with_blocks(has_replay: bool, blocks_max: usize) -> Self {
        let writer = EventWriter::new(DpRank(0), 1_000);
        let view = View::of(&writer.feed());
        let chain = Chain::new(BLOCK, blocks_max);
        Self {
            follower: Follower::new(DpRank(0), chain, writer, has_replay),
            view,
            now: Instant::now(),
        }
    }

    /// Answers all that is asked for; `lose` says which messages of the answers do not arrive.
    fn answer(&mut self, server: &Server, mut ask: Ask, lose: &mut dyn FnMut() -> bool) {
        let mut asked = 0;
        while let Ask::Replay(from) = ask {
            asked += 1;
            assert!(asked < 50, "it asks for ever");
            ask = Ask::Nothing;
            for (number, payload) in server.buffer.iter().filter(|(number, _)| *number >= from) {
                if lose() {
                    continue;
                }
                ask = self.follower.replayed(*number, payload);
                if ask != Ask::Nothing {
                    break;
                }
            }
            if ask == Ask::Nothing {
                ask = self.follower.replay_ended();
            }
        }
    }

    fn connect(&mut self, server: &Server) {
        let ask = self.follower.connected();
        self.answer(server, ask, &mut || false);
    }

    fn live(&mut self, server: &Server, message: &(u64, Vec<u8>)) {
        let ask = self.follower.live(message.0, &message.1, self.now);
        self.answer(server, ask, &mut || false);
    }

    fn confidence(&self) -> Confidence {
        self.follower.status().confidence
    }
}

#[test]
fn what_came_before_the_connection_is_replayed() {
    let mut server = Server::new(100);
    let mut scene = Scene::new(true);
    assert_eq!(scene.confidence(), Confidence::NoEvents);
    (1..4).for_each(|prompt| drop(server.store(prompt)));
    scene.connect(&server);
    assert_eq!(*scene.view.now(), server.truth());
    assert_eq!(scene.confidence(), Confidence::Complete);
    let message = server.remove(2);
    scene.live(&server, &message);
    assert_eq!(*scene.view.now(), server.truth());
    assert_eq!(scene.follower.status().last_sequence, Some(3));
}

#[test]
fn a_gap_is_repaired_by_the_replay() {
    let mut server = Server::new(100);
    let mut scene = Scene::new(true);
    scene.connect(&server);
    assert_eq!(
        scene.confidence(),
        Confidence::Complete,
        "it is empty, and said so"
    );
    let first = server.store(1);
    scene.live(&server, &first);
    let _lost = [server.store(2), server.remove(1)];
    let last = server.store(3);
    scene.live(&server, &last);
    assert_eq!(*scene.view.now(), server.truth());
    let status = scene.follower.status();
    assert_eq!((status.counters.gaps, status.counters.resyncs), (1, 0));
    assert_eq!(status.confidence, Confidence::Complete);
    // The last one before a pause.
    let _lost = server.remove(3);
    let ask = scene.follower.idle();
    scene.answer(&server, ask, &mut || false);
    assert_eq!(*scene.view.now(), server.truth());
}

#[test]
fn a_gap_that_cannot_be_repaired_means_to_forget() {
    let mut server = Server::new(2);
    let mut scene = Scene::new(true);
    scene.connect(&server);
    let first = server.store(1);
    scene.live(&server, &first);
    let _lost: Vec<_> = (2..6).map(|prompt| server.store(prompt)).collect();
    let last = server.store(6);
    scene.live(&server, &last);
    // The buffer has the last two only.
    let expected: BTreeSet<_> = [5, 6]
        .into_iter()
        .flat_map(|prompt| on_device(&tokens(prompt)))
        .collect();
    assert_eq!(*scene.view.now(), expected);
    assert_eq!(scene.confidence(), Confidence::Partial);
    // A block whose beginning is from before changes nothing, and is counted.
    let orphan = server.publish(&[stored(&[77], Some(4), &[1, 2, 3, 4])]);
    scene.live(&server, &orphan);
    assert_eq!(*scene.view.now(), expected);
    assert_eq!(scene.follower.status().counters.orphans, 1);
    let message = server.clear();
    scene.live(&server, &message);
    assert!(scene.view.now().is_empty());
    assert_eq!(scene.confidence(), Confidence::Complete);
}

#[test]
fn without_a_replay_a_gap_and_a_new_connection_mean_to_forget() {
    let mut server = Server::new(100);
    let mut scene = Scene::new(false);
    scene.connect(&server);
    let messages = [server.store(1), server.store(2), server.store(3)];
    scene.live(&server, &messages[0]);
    assert_eq!(scene.confidence(), Confidence::Complete);
    scene.live(&server, &messages[2]);
    assert_eq!(*scene.view.now(), on_device(&tokens(3)));
    assert_eq!(scene.confidence(), Confidence::Partial);
    scene.follower.disconnected("cut");
    assert!(!scene.follower.status().connected);
    scene.connect(&server);
    assert!(scene.view.now().is_empty());
    let message = server.store(4);
    scene.live(&server, &message);
    assert_eq!(*scene.view.now(), on_device(&tokens(4)));
    assert_eq!(scene.confidence(), Confidence::Partial);
}

#[test]
fn a_lost_connection_to_the_same_vllm_loses_nothing() {
    let mut server = Server::new(100);
    let mut scene = Scene::new(true);
    scene.connect(&server);
    let message = server.store(1);
    scene.live(&server, &message);
    scene.follower.disconnected("cut");
    let _lost = server.store(2);
    scene.connect(&server);
    assert_eq!(*scene.view.now(), server.truth());
    assert_eq!(scene.follower.status().counters.resyncs, 0);
}

/// A new vLLM starts again at 0; by the time of the connection it may have as many batches as the old
/// one had, or more.
#[test]
fn a_restart_is_seen_whatever_the_numbers() {
    for batches in 0..6 {
        let mut old = Server::new(100);
        let mut scene = Scene::new(true);
        scene.connect(&old);
        let message = old.store(1);
        scene.live(&old, &message);
        let message = old.store(2);
        scene.live(&old, &message);
        scene.follower.disconnected("killed");
        let mut new = Server::new(100);
        (10..10 + batches).for_each(|prompt| drop(new.store(prompt)));
        scene.connect(&new);
        assert_eq!(*scene.view.now(), new.truth(), "{batches}");
        assert_eq!(scene.confidence(), Confidence::Complete, "{batches}");
        let message = new.store(30);
        scene.live(&new, &message);
        assert_eq!(*scene.view.now(), new.truth(), "{batches}");
    }
}

#[test]
fn an_unknown_parent_in_a_complete_view_is_looked_into_but_not_for_ever() {
    let mut server = Server::new(100);
    let mut scene = Scene::new(true);
    scene.connect(&server);
    let message = server.store(1);
    scene.live(&server, &message);
    let orphan = |server: &mut Server| server.publish(&[stored(&[99], Some(98), &[1, 2, 3, 4])]);
    let message = orphan(&mut server);
    scene.live(&server, &message);
    assert_eq!(*scene.view.now(), server.truth(), "learned again");
    let resyncs = |scene: &Scene| scene.follower.status().counters.resyncs;
    assert_eq!(
        (resyncs(&scene), scene.confidence()),
        (1, Confidence::Partial)
    );
    let message = orphan(&mut server);
    scene.live(&server, &message);
    assert_eq!(resyncs(&scene), 1, "it did not help before");
    // Complete again; at once it is not asked again, after a while it is.
    for (seconds, expected) in [(0, 1), (2, 2)] {
        let message = server.clear();
        scene.live(&server, &message);
        assert_eq!(scene.confidence(), Confidence::Complete);
        scene.now += Duration::from_secs(seconds);
        let message = orphan(&mut server);
        scene.live(&server, &message);
        assert_eq!(
            (resyncs(&scene), scene.confidence()),
            (expected, Confidence::Partial)
        );
    }
    // A block of a lower tier whose beginning is gone is no sign of a loss.
    let message = server.clear();
    scene.live(&server, &message);
    scene.now += Duration::from_secs(1_000);
    let host = with(
        stored(&[99], Some(98), &[1, 2, 3, 4]),
        &json!({"medium": "CPU"}),
    );
    let message = server.publish(&[host]);
    scene.live(&server, &message);
    assert_eq!(
        (resyncs(&scene), scene.confidence()),
        (2, Confidence::Complete)
    );
    assert_eq!(*scene.view.now(), server.truth());
}

#[test]
fn a_wrong_block_size_is_an_error_until_it_is_right() {
    let mut server = Server::new(100);
    let mut scene = Scene::new(true);
    scene.connect(&server);
    let wrong = with(
        stored(&[1, 2], None, &[1, 2, 3, 4]),
        &json!({"block_size": 2}),
    );
    let message = server.publish(&[wrong]);
    scene.live(&server, &message);
    let status = scene.follower.status();
    assert!(status.confidence.is_error());
    assert!(status.report().wrong_block_size && !status.report().partial);
    assert_eq!(status.block_tokens_received, Some(2));
    assert_eq!(
        status.error.unwrap(),
        "vLLM's blocks have 2 tokens and this worker registered 4: no block of rank 0 can be told to \
         routers; start the worker with --block-size 2, or vLLM with --block-size 4"
    );
    assert!(scene.view.now().is_empty());
    let message = server.store(1);
    scene.live(&server, &message);
    assert_eq!(scene.confidence(), Confidence::Partial);
    assert_eq!(scene.follower.status().block_tokens_received, Some(4));
    assert_eq!(*scene.view.now(), server.truth());
}

#[test]
fn what_cannot_be_read_is_a_loss() {
    let mut server = Server::new(100);
    let mut scene = Scene::new(true);
    scene.connect(&server);
    let message = server.store(1);
    scene.live(&server, &message);
    scene.live(&server, &(1, b"\xC1".to_vec()));
    assert!(scene.view.now().is_empty());
    let status = scene.follower.status();
    assert_eq!(
        (status.confidence, status.counters.undecodable),
        (Confidence::Partial, 1)
    );
    assert!(status.error.unwrap().contains("batch 1 cannot be read"));
}

#[test]
fn more_blocks_than_the_limit_are_forgotten() {
    let mut server = Server::new(100);
    let mut scene = Scene::with_blocks(true, 5);
    scene.connect(&server);
    for prompt in 1..=3 {
        let message = server.store(prompt);
        scene.live(&server, &message);
    }
    let status = scene.follower.status();
    assert!(status.error.unwrap().contains("which is the limit"));
    assert!(status.blocks <= 5);
    assert_eq!(status.confidence, Confidence::Partial);
}

#[derive(Clone, Debug)]
enum Step {
    Store(u32),
    Remove(u32),
    Clear,
    /// Everything that was published and not delivered so far is lost, or is delivered.
    Deliver {
        lost: bool,
    },
    Cut,
    Restart,
    Idle,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (1..9_u32).prop_map(Step::Store),
        6 => (1..9_u32).prop_map(Step::Remove),
        1 => Just(Step::Clear),
        8 => any::<bool>().prop_map(|lost| Step::Deliver { lost }),
        1 => Just(Step::Cut),
        1 => Just(Step::Restart),
        2 => Just(Step::Idle),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Whatever is lost on the way, when it is over nothing is told that is not there; and if the view
    /// calls itself complete, it is.
    #[test]
    fn what_is_told_is_true(
        steps in vec(step(), 1..60), buffer_max in 1..20_usize, has_replay: bool, losses in vec(0..12_u8, 0..80),
    ) {
        let mut server = Server::new(buffer_max);
        let mut scene = Scene::new(has_replay);
        let mut losses = losses.into_iter();
        // Some of the messages of the answers are lost too.
        let mut lose = || losses.next() == Some(0);
        let ask = scene.follower.connected();
        scene.answer(&server, ask, &mut lose);
        let mut on_the_way: Vec<(u64, Vec<u8>)> = Vec::new();
        for step in steps {
            scene.now += Duration::from_millis(700);
            match step {
                Step::Store(prompt) => on_the_way.push(server.store(prompt)),
                Step::Remove(prompt) => on_the_way.push(server.remove(prompt)),
                Step::Clear => on_the_way.push(server.clear()),
                Step::Deliver { lost: true } => on_the_way.clear(),
                Step::Deliver { lost: false } => {
                    for message in on_the_way.drain(..) {
                        let ask = scene.follower.live(message.0, &message.1, scene.now);
                        scene.answer(&server, ask, &mut lose);
                    }
                }
                Step::Cut | Step::Restart => {
                    if matches!(step, Step::Restart) {
                        server = Server::new(buffer_max);
                    }
                    on_the_way.clear();
                    scene.follower.disconnected("cut");
                    let ask = scene.follower.connected();
                    scene.answer(&server, ask, &mut lose);
                }
                Step::Idle => {
                    let ask = scene.follower.idle();
                    scene.answer(&server, ask, &mut lose);
                }
            }
        }
        // The last message arrives, so that every gap is seen.
        let last = server.store(50);
        let ask = scene.follower.live(last.0, &last.1, scene.now);
        scene.answer(&server, ask, &mut || false);
        let truth = server.truth();
        let confidence = scene.confidence();
        let told = scene.view.now();
        prop_assert!(told.is_subset(&truth), "told {told:?} of {truth:?}");
        if confidence == Confidence::Complete {
            prop_assert_eq!(told, &truth);
        }
    }
}

//! Names: ours from vLLM's.

use blockplane_kvbm::EventWriter;
use blockplane_protocol::{DpRank, SaltHash, SequenceHash, Tier};
use serde_json::{Value, json};

use super::{
    super::{
        chain::{Chain, Outcome},
        wire::{Batch, Event},
    },
    BLOCK, View, batch, names, on_device, removed, stored, with,
};

const PROMPT: [u32; 12] = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];

struct Scene {
    chain: Chain,
    writer: EventWriter,
    view: View,
}

impl Scene {
    fn new(blocks_max: usize) -> Self {
        let writer = EventWriter::new(DpRank(0), 1_000);
        Self {
            chain: Chain::new(BLOCK, blocks_max),
            view: View::of(&writer.feed()),
            writer,
        }
    }

    fn stored(&mut self, event: Value) -> Outcome {
        match read(event) {
            Event::Stored(stored) => self.chain.stored(&stored, &mut self.writer),
            other => panic!("{other:?}"),
        }
    }

    /// How many were not known.
    fn removed(&mut self, event: Value) -> usize {
        match read(event) {
            Event::Removed(removed) => self.chain.removed(&removed, &mut self.writer),
            other => panic!("{other:?}"),
        }
    }

    fn told(&mut self) -> Vec<(SequenceHash, Tier)> {
        self.view.now().iter().copied().collect()
    }
}

fn read(event: Value) -> Event {
    Batch::decode(&batch(&[event])).unwrap().events.remove(0)
}

const TAKEN: Outcome = Outcome::Taken { unnamed: 0 };

#[test]
fn blocks_have_the_names_that_the_frontend_asks_for() {
    let mut scene = Scene::new(100);
    assert_eq!(scene.stored(stored(&[70, 71], None, &PROMPT[..8])), TAKEN);
    assert_eq!(scene.stored(stored(&[72], Some(71), &PROMPT[8..])), TAKEN);
    assert_eq!(*scene.view.now(), on_device(&PROMPT));
    assert_eq!(scene.removed(removed(&[71, 99])), 1);
    let left = scene.told();
    let expected = names(&PROMPT, SaltHash::default());
    assert!(
        left.contains(&(expected[0], Tier::Device)) && left.contains(&(expected[2], Tier::Device))
    );
    assert_eq!((left.len(), scene.chain.len()), (2, 2));
}

#[test]
fn salt_and_adapter_go_on_to_the_blocks_that_follow() {
    let mut scene = Scene::new(100);
    let adapter =
        json!({"lora_name": "tuned", "lora_id": 4, "extra_keys": [["tuned", "tenant"], ["tuned"]]});
    assert_eq!(
        scene.stored(with(stored(&[1, 2], None, &PROMPT[..8]), &adapter)),
        TAKEN
    );
    let next = json!({"lora_name": "tuned", "lora_id": 4, "extra_keys": [["tuned"]]});
    assert_eq!(
        scene.stored(with(stored(&[3], Some(2), &PROMPT[8..]), &next)),
        TAKEN
    );
    let salted = json!({"extra_keys": [["other"], null]});
    assert_eq!(
        scene.stored(with(stored(&[4, 5], None, &PROMPT[..8]), &salted)),
        TAKEN
    );
    let mut expected = names(&PROMPT, SaltHash::new(Some("tenant"), Some("tuned")));
    expected.extend(names(&PROMPT[..8], SaltHash::new(Some("other"), None)));
    expected.sort();
    let told: Vec<SequenceHash> = scene.told().into_iter().map(|(name, _)| name).collect();
    assert_eq!(told, expected);
}

#[test]
fn what_tokens_do_not_name_is_not_told_nor_what_follows_it() {
    let mut scene = Scene::new(100);
    let image = json!({"extra_keys": [null, [["image", 0]], null]});
    let outcome = scene.stored(with(stored(&[1, 2, 3], None, &PROMPT), &image));
    assert_eq!(outcome, Outcome::Taken { unnamed: 2 });
    let after = scene.stored(stored(&[4], Some(3), &[1, 2, 3, 4]));
    assert_eq!(after, Outcome::Taken { unnamed: 1 });
    // Adapters by number only, and keys of a kind that is not known.
    let numbered = with(stored(&[5], None, &PROMPT[..4]), &json!({"lora_id": 2}));
    assert_eq!(scene.stored(numbered), Outcome::Taken { unnamed: 1 });
    let strange = json!({"extra_keys": [["salt", "something else"]]});
    let outcome = scene.stored(with(stored(&[6], None, &PROMPT[..4]), &strange));
    assert_eq!(outcome, Outcome::Taken { unnamed: 1 });
    assert_eq!(*scene.view.now(), on_device(&PROMPT[..4]));
    assert_eq!(scene.removed(removed(&[1, 2, 3, 4, 5, 6])), 0);
    assert_eq!((scene.told().len(), scene.chain.len()), (0, 0));
}

/// As in the recording of a real vLLM: a prompt that is cached to its last token has its last block
/// computed again, and both copies are announced and removed.
#[test]
fn a_block_is_gone_with_its_last_copy() {
    let mut scene = Scene::new(100);
    scene.stored(stored(&[1, 2], None, &PROMPT[..8]));
    scene.stored(stored(&[2], Some(1), &PROMPT[4..8]));
    scene.removed(removed(&[2]));
    assert_eq!(*scene.view.now(), on_device(&PROMPT[..8]));
    scene.removed(removed(&[2]));
    assert_eq!(*scene.view.now(), on_device(&PROMPT[..4]));
}

#[test]
fn a_block_is_known_in_each_tier() {
    let mut scene = Scene::new(100);
    scene.stored(stored(&[1], None, &PROMPT[..4]));
    scene.stored(with(
        stored(&[1], None, &PROMPT[..4]),
        &json!({"medium": "CPU"}),
    ));
    // A connector that knows only names.
    let by_name =
        json!({"medium": "STORAGE", "token_ids": [], "block_size": 0, "extra_keys": null});
    assert_eq!(scene.stored(with(stored(&[1], None, &[]), &by_name)), TAKEN);
    assert_eq!(
        scene.stored(with(stored(&[9], None, &[]), &by_name)),
        Outcome::NoTokens
    );
    let name = names(&PROMPT[..4], SaltHash::default())[0];
    let tiers = |tiers: &[Tier]| tiers.iter().map(|tier| (name, *tier)).collect::<Vec<_>>();
    assert_eq!(scene.told(), tiers(&[Tier::Device, Tier::Host, Tier::Disk]));
    scene.removed(removed(&[1]));
    assert_eq!(scene.told(), tiers(&[Tier::Host, Tier::Disk]));
    // What follows it can still be named.
    assert_eq!(scene.stored(stored(&[2], Some(1), &PROMPT[4..8])), TAKEN);
    scene.removed(with(removed(&[1]), &json!({"medium": "CPU"})));
    scene.removed(with(removed(&[1]), &json!({"medium": "STORAGE"})));
    assert_eq!(scene.told().len(), 1);
}

#[test]
fn one_group_names_prefixes() {
    let mut scene = Scene::new(100);
    let group = |group: u32, kind: &str| json!({"group_idx": group, "kv_cache_spec_kind": kind});
    let window = with(stored(&[1], None, &PROMPT), &group(0, "sliding_window"));
    assert_eq!(scene.stored(window), Outcome::OtherGroup);
    let full = with(
        stored(&[1], None, &PROMPT[..4]),
        &group(1, "full_attention"),
    );
    assert_eq!(scene.stored(full), TAKEN);
    let second = with(stored(&[1], None, &PROMPT[..4]), &group(2, "mla_attention"));
    assert_eq!(scene.stored(second), Outcome::OtherGroup);
    scene.removed(with(removed(&[1]), &json!({"group_idx": 0})));
    scene.removed(with(removed(&[1]), &json!({"group_idx": 2})));
    assert_eq!(*scene.view.now(), on_device(&PROMPT[..4]));
    scene.removed(with(removed(&[1]), &json!({"group_idx": 1})));
    assert!(scene.view.now().is_empty());
}

#[test]
fn what_does_not_fit_is_said() {
    let mut scene = Scene::new(3);
    let size = json!({"block_size": 2});
    let other = scene.stored(with(stored(&[1, 2], None, &PROMPT[..4]), &size));
    assert_eq!(other, Outcome::BlockSize(2));
    assert_eq!(
        scene.stored(stored(&[1], Some(9), &PROMPT[..4])),
        Outcome::UnknownParent(Tier::Device)
    );
    let outcome = scene.stored(stored(&[1, 2], None, &PROMPT));
    assert!(matches!(outcome, Outcome::Inconsistent(_)), "{outcome:?}");
    let keys = json!({"extra_keys": [null]});
    let outcome = scene.stored(with(stored(&[1, 2], None, &PROMPT[..8]), &keys));
    assert!(matches!(outcome, Outcome::Inconsistent(_)), "{outcome:?}");
    assert_eq!(scene.stored(stored(&[1, 2, 3], None, &PROMPT)), TAKEN);
    // A part of a block beside whole ones; no room; what is there already needs none.
    assert_eq!(
        scene.stored(with(stored(&[1, 2], None, &PROMPT[..4]), &size)),
        Outcome::PartOfBlock
    );
    assert_eq!(
        scene.stored(stored(&[4], Some(3), &PROMPT[..4])),
        Outcome::Full
    );
    assert_eq!(scene.stored(stored(&[1, 2, 3], None, &PROMPT)), TAKEN);
    assert_eq!(*scene.view.now(), on_device(&PROMPT));
}

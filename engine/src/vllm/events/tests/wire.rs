//! Payloads: both encodings, what other versions have, and bytes that are none.

use blockplane_protocol::Tier;
use proptest::{collection::vec, prelude::*};
use serde_json::{Value, json};

use super::{super::wire::*, batch, stored, with};

fn events(value: &Value) -> Vec<Event> {
    let payload = rmp_serde::to_vec(value).expect("it can be encoded");
    Batch::decode(&payload).expect("it can be read").events
}

fn one(value: &Value) -> Event {
    events(&json!([0, [value]])).remove(0)
}

/// What vLLM 0.32 sent: `(number, batch)`.
pub(super) fn corpus() -> Vec<(u64, Vec<u8>)> {
    let lines = include_str!("vllm-0.32.txt").lines();
    let lines = lines.filter(|line| !line.starts_with('#'));
    let byte = |hex: &[u8]| u8::from_str_radix(str::from_utf8(hex).unwrap(), 16).unwrap();
    lines
        .map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            let number = u64::from_str_radix(fields[1], 16).unwrap();
            (number, fields[2].as_bytes().chunks(2).map(byte).collect())
        })
        .collect()
}

#[test]
fn what_a_real_vllm_sent_is_read() {
    let corpus = corpus();
    assert_eq!(corpus.len(), 8);
    for (due, (number, payload)) in (0..).zip(&corpus) {
        let batch = Batch::decode(payload).unwrap();
        assert_eq!((*number, batch.rank), (due, Some(0)));
        assert!(batch.seconds > 1.0e9, "{batch:?}");
        for event in &batch.events {
            let Event::Stored(stored) = event else {
                assert_eq!(*event, Event::Cleared);
                continue;
            };
            assert_eq!(stored.tokens.len(), stored.hashes.len() * 32);
            assert_eq!(stored.extra_keys.len(), stored.hashes.len());
            assert_eq!((stored.group, stored.kind), (Some(0), GroupKind::Prefix));
        }
    }
    let Event::Stored(salted) = &Batch::decode(&corpus[3].1).unwrap().events[0] else {
        panic!("the fourth is a stored one");
    };
    assert_eq!(salted.extra_keys[0].texts, ["tenant"]);
    assert_eq!(salted.extra_keys[1], Extra::default());
}

#[test]
fn maps_and_arrays_of_all_versions_say_the_same() {
    let map = one(&json!({
        "block_hashes": [7, 8], "type": "BlockStored", "parent_block_hash": 6, "token_ids": [1, 2],
        "block_size": 1, "lora_id": 3, "medium": "CPU", "lora_name": "tuned", "extra_keys": [["tuned"], null],
        "group_idx": 1, "kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 9,
        "locality": "LOCAL", "session_id": {"a": [1, {"b": null}]},
    }));
    let array = one(&json!([
        "BlockStored",
        [7, 8],
        6,
        [1, 2],
        1,
        3,
        "CPU",
        "tuned",
        [["tuned"], null],
        1,
        "sliding_window",
        9,
        "LOCAL",
        null,
        "session"
    ]));
    assert_eq!(map, array);
    let Event::Stored(stored) = map else {
        panic!("it is a stored one")
    };
    assert_eq!(stored.hashes, [EngineHash(7), EngineHash(8)]);
    assert_eq!(
        (stored.kind, stored.medium.tier()),
        (GroupKind::Other, Tier::Host)
    );

    // 0.9: no medium, and a hash of Python may be negative.
    let Event::Stored(old) = one(&json!(["BlockStored", [-2], null, [1], 1, null])) else {
        panic!("it is a stored one")
    };
    assert_eq!(old.hashes, [EngineHash(u64::MAX - 1)]);
    assert_eq!(
        (old.medium, old.kind, old.group),
        (Medium::Device, GroupKind::Prefix, None)
    );
    let removed = one(&json!(["BlockRemoved", [5], "GPU"]));
    assert_eq!(
        removed,
        one(&json!({"type": "BlockRemoved", "block_hashes": [5], "medium": "GPU"}))
    );
    assert_eq!(one(&json!(["AllBlocksCleared"])), Event::Cleared);
    assert_eq!(
        one(&json!({"type": "BlockMoved", "to": [1, 2]})),
        Event::Unknown
    );
}

#[test]
fn a_digest_is_named_as_vllm_shortens_it() {
    let digest: Vec<u8> = (0..32).collect();
    let mut payload = b"\x92\x00\x91\x92\xACBlockRemoved\x91\xC4\x20".to_vec();
    payload.extend_from_slice(&digest);
    let Event::Removed(removed) = &Batch::decode(&payload).unwrap().events[0] else {
        panic!("it is a removed one")
    };
    let expected = u64::from_be_bytes([24, 25, 26, 27, 28, 29, 30, 31]);
    assert_eq!(removed.hashes, [EngineHash(expected)]);
}

#[test]
fn every_medium_is_a_tier() {
    let tier = |name: Value| {
        let event = with(stored(&[1], None, &[1, 2, 3, 4]), &json!({"medium": name}));
        match one(&event) {
            Event::Stored(stored) => stored.medium.tier(),
            other => panic!("{other:?}"),
        }
    };
    let media = [
        (json!(null), Tier::Device),
        (json!("GPU"), Tier::Device),
        (json!("gpu:1"), Tier::Device),
        (json!("CPU"), Tier::Host),
        (json!("STORAGE"), Tier::Disk),
        (json!("FS"), Tier::Disk),
        (json!("OBJ"), Tier::Remote),
        (json!("moon"), Tier::Remote),
    ];
    for (medium, expected) in media {
        assert_eq!(tier(medium.clone()), expected, "{medium}");
    }
}

#[test]
fn embeddings_and_images_are_beyond_tokens() {
    let keys = json!([[["image-1", 0], "salt"], [1.5], ["a", "b"], []]);
    let event = with(
        stored(&[1, 2, 3, 4], None, &[0; 16]),
        &json!({"extra_keys": keys}),
    );
    let Event::Stored(stored) = one(&event) else {
        panic!("it is a stored one")
    };
    let beyond: Vec<bool> = stored
        .extra_keys
        .iter()
        .map(|extra| extra.beyond_tokens)
        .collect();
    assert_eq!(beyond, [true, true, false, false]);
    assert_eq!(stored.extra_keys[0].texts, ["salt"]);
    assert_eq!(stored.extra_keys[2].texts, ["a", "b"]);
}

#[test]
fn what_is_wrong_is_said() {
    let message = |payload: &[u8]| Batch::decode(payload).unwrap_err().to_string();
    let encoded = |value: Value| rmp_serde::to_vec(&value).unwrap();
    assert_eq!(message(&[]), "the message ends in the middle of a value");
    assert_eq!(
        message(&encoded(json!({}))),
        "an array is due and a map came"
    );
    assert_eq!(
        message(&encoded(json!([0, [{"type": "BlockStored"}]]))),
        "block_hashes is due and an event without came"
    );
    assert_eq!(
        message(&encoded(json!([0, [["BlockRemoved", [null]]]]))),
        "a block's name is due and nil came"
    );
    let token = json!([0, [["BlockStored", [1], null, [-1], 1]]]);
    assert_eq!(message(&encoded(token)), "a token is out of range");
    let mut more = batch(&[]);
    more.push(0xC0);
    assert_eq!(
        message(&more),
        "the end of the message is due and more came"
    );
}

/// A claim of four billion events, hashes or bytes allocates nothing.
#[test]
fn claimed_lengths_are_not_believed() {
    for claim in [
        &b"\x92\x00\xDD\xFF\xFF\xFF\xFF"[..],
        b"\x92\x00\x91\x92\xACBlockRemoved\xDD\xFF\xFF\xFF\xFF",
        b"\x92\x00\x91\x92\xACBlockRemoved\x91\xC6\xFF\xFF\xFF\xFF",
        b"\x92\x00\x91\x92\xA1x\xDF\xFF\xFF\xFF\xFF",
    ] {
        assert!(Batch::decode(claim).is_err(), "{claim:?}");
    }
    // A deep nest is passed over without recursion.
    let mut deep = b"\x92\x00\x91\x92\xA1x".to_vec();
    deep.extend(std::iter::repeat_n(0x91, 500_000));
    deep.push(0xC0);
    assert_eq!(Batch::decode(&deep).unwrap().events, [Event::Unknown]);
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in vec(any::<u8>(), 0..200)) {
        let _ = Batch::decode(&bytes);
    }

    /// Bytes that are nearly right reach further than random ones.
    #[test]
    fn no_damage_panics(
        which in 0..8_usize, changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..6), end in any::<prop::sample::Index>(),
    ) {
        let mut payload = corpus().swap_remove(which).1;
        for (place, value) in changes {
            let place = place.index(payload.len());
            payload[place] = value;
        }
        let _ = Batch::decode(&payload);
        payload.truncate(end.index(payload.len()));
        let _ = Batch::decode(&payload);
    }
}

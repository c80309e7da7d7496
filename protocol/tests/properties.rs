//! What holds for every value, not only for those that someone thought of.

use blockplane_protocol::{
    AttentionGroup, AttentionKind, BlockHash, DType, DpRank, EndpointId, FeedItem, GenerateRequest,
    KvEvent, KvEventData, KvLayout, LayoutError, LayoutOrder, LoadReport, PRIORITY_MAX,
    PrefillHint, PrefillJob, RequestId, RouteHints, SaltHash, SamplingParams, SequenceHash,
    StopConditions, StoredBlock, Tier, TokenFrame, TokenLogprob, TokenOutput, TokenSequence,
    WorkerId,
    codec::{self, DecodeError},
};
use proptest::{collection::vec, option, prelude::*};

fn sampling() -> impl Strategy<Value = SamplingParams> {
    let unit = 0f32..=1.0;
    (
        (
            0f32..4.0,
            unit.clone(),
            any::<u32>(),
            unit,
            any::<Option<u64>>(),
        ),
        (-2f32..2.0, -2f32..2.0, 0.1f32..2.0),
        vec((any::<u32>(), -100f32..100.0), 0..4),
    )
        .prop_map(
            |((temperature, top_p, top_k, min_p, seed), penalties, logit_bias)| SamplingParams {
                temperature,
                top_p,
                top_k,
                min_p,
                seed,
                presence_penalty: penalties.0,
                frequency_penalty: penalties.1,
                repetition_penalty: penalties.2,
                logit_bias,
            },
        )
}

fn request() -> impl Strategy<Value = GenerateRequest> {
    let stop = (
        any::<u32>(),
        any::<u32>(),
        vec(any::<u32>(), 0..4),
        any::<bool>(),
    )
        .prop_map(
            |(max_tokens, min_tokens, stop_token_ids, ignore_eos)| StopConditions {
                max_tokens,
                min_tokens,
                stop_token_ids,
                ignore_eos,
            },
        );
    let hint = (any::<u64>(), any::<u32>(), any::<u32>()).prop_map(|(worker, rank, overlap)| {
        PrefillHint {
            worker: WorkerId(worker),
            rank: DpRank(rank),
            overlap_blocks: overlap,
        }
    });
    (
        (".*", ".*", vec(any::<u32>(), 0..40)),
        (sampling(), stop, any::<Option<u32>>()),
        (
            option::of(".*"),
            option::of(".*"),
            any::<u64>(),
            option::of(0..=PRIORITY_MAX),
        ),
        (any::<u32>(), vec(hint, 0..3)),
    )
        .prop_map(|(names, how, rest, route)| GenerateRequest {
            request_id: RequestId(names.0),
            model: names.1,
            token_ids: names.2,
            sampling: how.0,
            stop: how.1,
            logprobs: how.2,
            cache_salt: rest.0,
            lora_name: rest.1,
            deadline_ms: rest.2,
            priority: rest.3,
            route: RouteHints {
                rank: DpRank(route.0),
                prefill: route.1,
            },
        })
}

fn kv_event() -> impl Strategy<Value = KvEvent> {
    let hash = || any::<u64>().prop_map(SequenceHash);
    let tier = prop_oneof![
        Just(Tier::Device),
        Just(Tier::Host),
        Just(Tier::Disk),
        Just(Tier::Remote)
    ];
    let block = (any::<u64>(), hash()).prop_map(|(block, sequence)| StoredBlock {
        block: BlockHash(block),
        sequence,
    });
    let data = prop_oneof![
        (option::of(hash()), vec(block, 0..5), tier.clone()).prop_map(|(parent, blocks, tier)| {
            KvEventData::Stored {
                parent,
                blocks,
                tier,
            }
        }),
        (vec(hash(), 0..5), tier).prop_map(|(hashes, tier)| KvEventData::Removed { hashes, tier }),
        Just(KvEventData::Cleared),
    ];
    (any::<u64>(), any::<u32>(), data).prop_map(|(event_id, rank, data)| KvEvent {
        event_id,
        rank: DpRank(rank),
        data,
    })
}

fn frame() -> impl Strategy<Value = TokenFrame> {
    let logprob = -50f32..=0.0;
    let top =
        (any::<u32>(), logprob.clone()).prop_map(|(id, logprob)| TokenLogprob { id, logprob });
    let token = (any::<u32>(), option::of(logprob), vec(top, 0..4))
        .prop_map(|(id, logprob, top)| TokenOutput { id, logprob, top });
    vec(token, 0..4).prop_map(|tokens| TokenFrame {
        tokens,
        ..TokenFrame::default()
    })
}

fn layout() -> impl Strategy<Value = KvLayout> {
    let dtype = prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::Bf16)];
    let order = prop_oneof![Just(LayoutOrder::BlockFirst), Just(LayoutOrder::LayerFirst)];
    (1..5u32, 1..5u32, 1..9u32, 1..=2u32, 1..5u32, dtype, order).prop_map(
        |(layers, kv_heads, head_dim, planes, block_tokens, dtype, order)| KvLayout {
            planes,
            order,
            ..KvLayout::dense(layers, kv_heads, head_dim, block_tokens, dtype)
        },
    )
}

/// Feeds one byte string to the decoder of every kind of message a peer may send.
fn decode_everything(bytes: &[u8]) {
    let _ = codec::decode::<GenerateRequest>(bytes);
    let _ = codec::decode::<TokenFrame>(bytes);
    let _ = codec::decode::<FeedItem>(bytes);
    let _ = codec::decode::<PrefillJob>(bytes);
    let _ = codec::decode::<LoadReport>(bytes);
    let _ = codec::decode::<KvLayout>(bytes);
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(request in request(), event in kv_event(), frame in frame()) {
        let bytes = codec::encode(&request);
        prop_assert_eq!(codec::decode::<GenerateRequest>(&bytes).unwrap(), request);
        let item = FeedItem::Events(vec![event]);
        prop_assert_eq!(codec::decode::<FeedItem>(&codec::encode(&item)).unwrap(), item);
        prop_assert_eq!(codec::decode::<TokenFrame>(&codec::encode(&frame)).unwrap(), frame);
    }

    #[test]
    fn random_bytes_are_an_error_or_a_message_and_never_a_panic(bytes in vec(any::<u8>(), 0..200)) {
        decode_everything(&bytes);
        let versioned: Vec<u8> = [codec::VERSION].into_iter().chain(bytes).collect();
        decode_everything(&versioned);
    }

    #[test]
    fn damaged_messages_are_an_error_or_a_message_and_never_a_panic(
        request in request(), flips in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        keep in any::<prop::sample::Index>(),
    ) {
        let mut bytes = codec::encode(&request);
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        decode_everything(&bytes);
        bytes.truncate(keep.index(bytes.len()));
        decode_everything(&bytes);
    }

    #[test]
    fn a_cut_message_is_an_error(request in request(), keep in any::<prop::sample::Index>()) {
        let bytes = codec::encode(&request);
        prop_assert!(codec::decode::<GenerateRequest>(&bytes[..keep.index(bytes.len())]).is_err());
    }

    /// Every byte of a pool belongs to exactly one layer of one block.
    #[test]
    fn the_runs_of_a_layout_tile_the_pool(layout in layout(), blocks in 1..5u32) {
        layout.validate(blocks).unwrap();
        let mut owners = vec![0u32; layout.pool_bytes(blocks)];
        for block in 0..blocks as usize {
            for layer in 0..layout.layers as usize {
                let start = block * layout.block_stride() + layer * layout.layer_stride(blocks);
                owners[start..start + layout.layer_bytes()].iter_mut().for_each(|n| *n += 1);
            }
        }
        prop_assert!(owners.iter().all(|&n| n == 1));
    }

    #[test]
    fn attention_groups_must_name_each_layer_once(
        layers in 1..8u32, change in 0..3, at in any::<prop::sample::Index>(),
    ) {
        let mut layout = KvLayout::dense(layers, 1, 1, 1, DType::F32);
        let at = at.index(layers as usize);
        let named = &mut layout.groups[0].layers;
        let wrong = match change {
            0 => named.remove(at),
            1 => { named.push(named[at]); named[at] + 1 }
            _ => { named.push(layers); layers }
        };
        let error = layout.validate(1).unwrap_err();
        prop_assert_eq!(error, LayoutError::Groups { layers, layer: wrong });
    }

    #[test]
    fn groups_may_share_the_layers_in_any_way(owner in vec(0..3usize, 1..10)) {
        let layers = u32::try_from(owner.len()).unwrap();
        let group = |which| AttentionGroup {
            kind: AttentionKind::SlidingWindow { window: 7 },
            layers: (0..layers).filter(|&layer| owner[layer as usize] == which).collect(),
        };
        let layout = KvLayout {
            groups: (0..3).map(group).collect(),
            ..KvLayout::dense(layers, 1, 1, 1, DType::F16)
        };
        prop_assert_eq!(layout.validate(1), Ok(()));
    }

    #[test]
    fn endpoint_names_round_trip(parts in prop::array::uniform3("[a-zA-Z0-9_-]{1,12}")) {
        let id = &EndpointId::new(&parts[0], &parts[1], &parts[2]).unwrap();
        prop_assert_eq!(&id.to_string().parse::<EndpointId>().unwrap(), id);
        let bare = id.to_string().replace("dyn://", "");
        prop_assert_eq!(&bare.parse::<EndpointId>().unwrap(), id);
        prop_assert_eq!([id.namespace(), id.component(), id.endpoint()], parts.each_ref().map(|s| &**s));
    }

    #[test]
    fn what_parses_as_an_endpoint_is_one(input in "(dyn://)?[a-z.:/ é-]{0,12}") {
        if let Ok(id) = input.parse::<EndpointId>() {
            let shown = id.to_string();
            prop_assert_eq!(shown.strip_prefix("dyn://"), input.strip_prefix("dyn://").or(Some(&input)));
        }
    }

    /// Growing token by token, in pieces or at once gives the same hashes, and a prefix of the
    /// tokens has a prefix of the hashes.
    #[test]
    fn hashes_do_not_depend_on_how_a_sequence_grew(
        tokens in vec(any::<u32>(), 0..60), block_tokens in 1..9usize, cut in any::<prop::sample::Index>(),
    ) {
        let salt = SaltHash::default();
        let whole = TokenSequence::from_tokens(&tokens, block_tokens, salt);
        let (head, tail) = tokens.split_at(cut.index(tokens.len() + 1));
        let mut grown = TokenSequence::from_tokens(head, block_tokens, salt);
        prop_assert_eq!(grown.blocks(), &whole.blocks()[..head.len() / block_tokens]);
        for &token in tail {
            grown.push(token);
        }
        prop_assert_eq!(grown.blocks(), whole.blocks());
        prop_assert_eq!(whole.blocks().len(), tokens.len() / block_tokens);
        prop_assert_eq!(whole.blocks_needed(), tokens.len().div_ceil(block_tokens));
    }
}

#[test]
fn each_zero_dimension_is_named() {
    let good = KvLayout::dense(2, 2, 8, 4, DType::Bf16);
    let zeros = [
        (
            "layers",
            KvLayout {
                layers: 0,
                ..good.clone()
            },
        ),
        (
            "kv_heads",
            KvLayout {
                kv_heads: 0,
                ..good.clone()
            },
        ),
        (
            "head_dim",
            KvLayout {
                head_dim: 0,
                ..good.clone()
            },
        ),
        (
            "block_tokens",
            KvLayout {
                block_tokens: 0,
                ..good.clone()
            },
        ),
    ];
    for (name, layout) in zeros {
        assert_eq!(layout.validate(1), Err(LayoutError::Zero(name)));
    }
    for planes in [0, 3] {
        let layout = KvLayout {
            planes,
            ..good.clone()
        };
        assert_eq!(layout.validate(1), Err(LayoutError::Planes(planes)));
    }
}

#[test]
fn a_pool_that_cannot_be_addressed_is_refused() {
    let layout = KvLayout::dense(1, u32::MAX, u32::MAX, 1, DType::F32);
    assert_eq!(layout.validate(1), Err(LayoutError::TooLarge));
}

#[test]
fn blocks_are_exchangeable_across_the_outer_order_only() {
    let ours = KvLayout::dense(2, 2, 8, 4, DType::Bf16);
    let layer_first = KvLayout {
        order: LayoutOrder::LayerFirst,
        ..ours.clone()
    };
    assert!(ours.exchangeable_with(&layer_first));
    assert!(!ours.exchangeable_with(&KvLayout {
        dtype: DType::F16,
        ..ours.clone()
    }));
    assert!(!ours.exchangeable_with(&KvLayout {
        block_tokens: 8,
        ..ours.clone()
    }));
}

#[test]
fn the_envelope_is_checked_before_the_message() {
    assert!(matches!(
        codec::decode::<LoadReport>(&[]),
        Err(DecodeError::Empty)
    ));
    let mut bytes = codec::encode(&LoadReport::default());
    bytes.extend([0xc0, 0xc0]);
    let error = codec::decode::<LoadReport>(&bytes).unwrap_err();
    assert!(
        matches!(error, DecodeError::Trailing { bytes: 2 }),
        "{error}"
    );
    bytes.truncate(bytes.len() - 2);
    bytes[0] = codec::VERSION + 1;
    let error = codec::decode::<LoadReport>(&bytes).unwrap_err();
    assert!(matches!(error, DecodeError::Version { found } if found == codec::VERSION + 1));
    let large = vec![codec::VERSION; codec::MESSAGE_BYTES_MAX + 1];
    let error = codec::decode::<LoadReport>(&large).unwrap_err();
    assert!(matches!(
        error,
        DecodeError::TooLarge {
            limit: codec::MESSAGE_BYTES_MAX,
            ..
        }
    ));
}

/// A newer peer may add fields and leave out optional ones.
#[test]
fn unknown_fields_are_skipped_and_optional_ones_may_be_absent() {
    #[derive(serde::Serialize)]
    struct FromTheFuture {
        request_id: &'static str,
        model: &'static str,
        token_ids: Vec<u32>,
        deadline_ms: u64,
        a_field_of_tomorrow: Vec<&'static str>,
    }
    let bytes = codec::encode(&FromTheFuture {
        request_id: "r",
        model: "m",
        token_ids: vec![1, 2],
        deadline_ms: 5,
        a_field_of_tomorrow: vec!["x"],
    });
    let request: GenerateRequest = codec::decode(&bytes).unwrap();
    assert_eq!((request.token_ids, request.deadline_ms), (vec![1, 2], 5));
    assert_eq!(request.sampling, SamplingParams::default());
}

/// `MessagePack` lengths are taken from the peer: a few bytes must not make us reserve gigabytes.
#[test]
fn a_huge_declared_length_is_an_error() {
    let array_of_4_billion = [
        codec::VERSION,
        0x81,
        0xa6,
        b'E',
        b'v',
        b'e',
        b'n',
        b't',
        b's',
    ];
    for head in [[0xdd], [0xdf], [0xc6]] {
        let bytes = [&array_of_4_billion[..], &head, &[0xff; 4]].concat();
        assert!(codec::decode::<FeedItem>(&bytes).is_err());
    }
    let nested = [&[codec::VERSION][..], &[0x91; 100_000]].concat();
    decode_everything(&nested);
}

/// What peers of before the field send is understood, and they get nothing that they do not know.
#[test]
fn a_request_without_priority_is_what_it_was_before_there_was_one() {
    let mut request = GenerateRequest {
        request_id: RequestId("r".to_owned()),
        model: "m".to_owned(),
        token_ids: vec![1],
        sampling: SamplingParams::default(),
        stop: StopConditions::default(),
        logprobs: None,
        cache_salt: None,
        lora_name: None,
        priority: None,
        deadline_ms: 1,
        route: RouteHints::default(),
    };
    let named = |bytes: &[u8]| bytes.windows(8).any(|window| window == b"priority");
    let bytes = codec::encode(&request);
    assert!(!named(&bytes));
    assert_eq!(codec::decode::<GenerateRequest>(&bytes).unwrap(), request);
    request.priority = Some(7);
    let bytes = codec::encode(&request);
    assert!(named(&bytes));
    assert_eq!(codec::decode::<GenerateRequest>(&bytes).unwrap(), request);
}

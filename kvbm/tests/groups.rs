//! Caches of several attention groups against a naive oracle that goes token by token.

use blockplane_kvbm::{
    EvictionKind, KvArena, KvBatch, PoolConfig,
    groups::{GroupSize, GroupedBlocks, GroupedCache, split},
};
use blockplane_protocol::{
    AttentionGroup, AttentionKind, DType, KvLayout, SaltHash, TokenBlock, TokenSequence,
};
use blockplane_transfer::{Agent, AgentConfig};
use proptest::{collection::vec, prelude::*, sample::select};

const BLOCK_TOKENS: u32 = 4;
/// Blocks of the longest sequence.
const LENGTH: usize = 12;

fn names(seed: u32, blocks: usize) -> Vec<TokenBlock> {
    let end = u32::try_from(blocks).expect("few") * BLOCK_TOKENS;
    // Sequences share their first three blocks.
    let tokens = (0..end).map(|i| if i < 12 { i } else { seed << 8 | i });
    let tokens: Vec<u32> = tokens.collect();
    TokenSequence::from_tokens(&tokens, BLOCK_TOKENS as usize, SaltHash::default())
        .blocks()
        .to_vec()
}

fn layout(kinds: &[AttentionKind]) -> KvLayout {
    let layers = u32::try_from(kinds.len()).expect("few");
    let groups = (0..).zip(kinds).map(|(layer, kind)| AttentionGroup {
        kind: *kind,
        layers: vec![layer],
    });
    KvLayout {
        groups: groups.collect(),
        ..KvLayout::dense(layers, 1, 8, BLOCK_TOKENS, DType::F32)
    }
}

fn cache(kinds: &[AttentionKind], blocks: u32, eviction: EvictionKind) -> GroupedCache {
    let sizes: Vec<GroupSize> = kinds
        .iter()
        .map(|kind| GroupSize {
            kind: *kind,
            layout: layout(&[*kind]),
            blocks,
        })
        .collect();
    GroupedCache::accounting(&sizes, PoolConfig::default(), eviction)
}

/// Whether layers of this kind can compute the token at `position` when `here` says which blocks
/// they have: looks at each token that they attend to.
fn can_compute(kind: AttentionKind, position: usize, here: &[bool]) -> bool {
    let first = match kind {
        AttentionKind::Full | AttentionKind::Latent => 0,
        AttentionKind::SlidingWindow { window } => (position + 1).saturating_sub(window as usize),
    };
    (first..position).all(|token| here[token / BLOCK_TOKENS as usize])
}

/// The longest prefix after which every group can go on.
fn oracle(cache: &GroupedCache, names: &[TokenBlock]) -> usize {
    let fits = |blocks: &usize| {
        cache.pools().all(|(kind, pool)| {
            let here: Vec<bool> = names
                .iter()
                .map(|name| pool.contains(name.sequence))
                .collect();
            can_compute(kind, blocks * BLOCK_TOKENS as usize, &here)
        })
    };
    (0..=names.len())
        .rev()
        .find(fits)
        .expect("nothing is needed for the first token")
}

fn check(cache: &GroupedCache, held: &GroupedBlocks, names: &[TokenBlock]) {
    for (group, (kind, _)) in cache.pools().enumerate() {
        let (first, blocks) = held.group(group);
        let own = names[first..held.len()].iter().copied();
        assert!(
            blocks.iter().map(|block| block.name()).eq(own),
            "up to the end"
        );
        let mut here = vec![false; held.len()];
        here[first..].fill(true);
        let position = held.len() * BLOCK_TOKENS as usize;
        assert!(
            can_compute(kind, position, &here),
            "what attention needs is held"
        );
        if first < held.len() {
            here[first] = false;
            assert!(!can_compute(kind, position, &here), "nothing else is held");
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    /// Matches a sequence and computes the rest, a few blocks at a time.
    Run {
        seed: u32,
        blocks: usize,
        step: usize,
        keep: bool,
    },
    Forget {
        group: usize,
        seed: u32,
        block: usize,
    },
    Finish(usize),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0..3u32, 1..=LENGTH, 1..5usize, any::<bool>())
            .prop_map(|(seed, blocks, step, keep)| Op::Run { seed, blocks, step, keep }),
        4 => (0..4usize, 0..3u32, 0..LENGTH)
            .prop_map(|(group, seed, block)| Op::Forget { group, seed, block }),
        2 => (0..9usize).prop_map(Op::Finish),
    ]
}

fn kind() -> impl Strategy<Value = AttentionKind> {
    prop_oneof![
        Just(AttentionKind::Full),
        Just(AttentionKind::Latent),
        (1..30u32).prop_map(|window| AttentionKind::SlidingWindow { window }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_match_is_the_longest_after_which_all_groups_can_go_on(
        kinds in vec(kind(), 1..4),
        eviction in select(EvictionKind::ALL.to_vec()),
        blocks in 12..30u32,
        ops in vec(op(), 1..60),
    ) {
        let cache = cache(&kinds, blocks, eviction);
        let mut running: Vec<(GroupedBlocks, Vec<TokenBlock>)> = Vec::new();
        for op in ops {
            match op {
                Op::Run { seed, blocks, step, keep } => {
                    let names = names(seed, blocks);
                    let expected = oracle(&cache, &names);
                    prop_assert_eq!(cache.peek_prefix(&names), expected);
                    let mut held = cache.match_prefix(&names);
                    prop_assert_eq!(held.len(), expected);
                    check(&cache, &held, &names);
                    for chunk in names[expected..].chunks(step) {
                        let Ok(fresh) = cache.allocate(chunk.len()) else {
                            break;
                        };
                        cache.append(&mut held, chunk, fresh);
                        check(&cache, &held, &names);
                    }
                    if keep {
                        running.push((held, names));
                    }
                }
                Op::Forget { group, seed, block } => {
                    let group = group % kinds.len();
                    let (_, pool) = cache.pools().nth(group).unwrap();
                    pool.forget(names(seed, LENGTH)[block].sequence);
                }
                Op::Finish(pick) => {
                    if !running.is_empty() {
                        drop(running.swap_remove(pick % running.len()));
                    }
                }
            }
            for (held, names) in &running {
                check(&cache, held, names);
            }
            for seed in 0..3 {
                let names = names(seed, LENGTH);
                prop_assert_eq!(cache.peek_prefix(&names), oracle(&cache, &names));
            }
        }
        running.clear();
        for (_, pool) in cache.pools() {
            prop_assert_eq!(pool.stats().active, 0, "nothing leaks");
        }
    }
}

#[test]
fn a_window_gives_up_what_is_behind_it_first() {
    let window = AttentionKind::SlidingWindow { window: 9 };
    let cache = cache(&[AttentionKind::Full, window], 16, EvictionKind::Lru);
    let names = names(1, 10);
    let mut held = GroupedBlocks::default();
    for name in &names {
        let fresh = cache.allocate(1).unwrap();
        cache.append(&mut held, &[*name], fresh);
    }
    let (_, windowed) = cache.pools().nth(1).unwrap();
    assert_eq!(windowed.stats().active, 2, "released while it runs");
    drop(held);
    // Room for eight others: all but the last two of ten blocks go, in both groups.
    drop(windowed.allocate(14).unwrap());
    assert_eq!(cache.match_prefix(&names).len(), 10);
    let here = windowed.contains_each(names.iter().map(|name| name.sequence));
    assert_eq!(here.iter().filter(|here| **here).count(), 2);
}

#[test]
fn events_are_those_of_the_group_that_keeps_most() {
    let window = AttentionKind::SlidingWindow { window: 5 };
    let cache = cache(&[window, AttentionKind::Latent], 8, EvictionKind::Lru);
    let mut subscription = cache.events().subscribe(Some(0));
    let names = names(1, 2);
    let mut held = GroupedBlocks::default();
    cache.append(&mut held, &names, cache.allocate(2).unwrap());
    let (_, windowed) = cache.pools().next().unwrap();
    drop(held);
    // The window's pool tells nobody.
    windowed.clear();
    let Ok(Some(KvBatch::Events(events))) = subscription.try_recv() else {
        panic!("the blocks are told of");
    };
    assert_eq!(events.len(), 1, "once for all groups");
}

#[test]
fn groups_have_arenas_of_their_own_layers() {
    let window = AttentionKind::SlidingWindow { window: 8 };
    let layout = layout(&[AttentionKind::Full, window, window]);
    let layout = KvLayout {
        groups: vec![
            layout.groups[0].clone(),
            AttentionGroup {
                kind: window,
                layers: vec![1, 2],
            },
        ],
        ..layout
    };
    let agent = Agent::new(AgentConfig::new("groups")).unwrap();
    let sizes = split(&layout, 1 << 20, 64).unwrap();
    let arenas: Vec<_> = sizes
        .iter()
        .map(|size| {
            let arena = KvArena::allocate(&agent, size.layout.clone(), size.blocks, "group");
            (size.kind, arena.unwrap())
        })
        .collect();
    let cache = GroupedCache::over(&arenas, PoolConfig::default(), EvictionKind::Lru);
    for ((_, pool), size) in cache.pools().zip(&sizes) {
        assert_eq!(pool.stats().total, size.blocks as usize);
        let arena = pool.arena().expect("it has memory");
        assert_eq!(arena.registration().len() as u64, size.bytes());
    }
    assert_eq!(sizes[1].layout.layers, 2);
}

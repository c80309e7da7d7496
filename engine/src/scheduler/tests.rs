//! The scheduler against a naive model: a pool that knows what each slot of each block holds, and
//! requests generated one by one without any scheduler.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap, VecDeque},
    rc::Rc,
};

use blockplane_protocol::{
    BlockId, SaltHash, SequenceHash, StopConditions, TokenBlock, TokenSequence,
};
use proptest::prelude::*;

use super::*;

const BLOCK_TOKENS: usize = 4;
const EOS: TokenId = 0;
const VOCAB: u64 = 23;

/// What the KV of the last token of `tokens` depends on.
fn tag(tokens: &[TokenId]) -> u64 {
    tokens.iter().fold(17, |hash: u64, &token| {
        (hash ^ u64::from(token))
            .wrapping_mul(0x9E37_79B9_7F4A_7C15)
            .rotate_left(23)
    })
}

/// The model: the next token is a function of all tokens before it.
fn next_token(tokens: &[TokenId]) -> TokenId {
    TokenId::try_from((tag(tokens) >> 11) % VOCAB).expect("a small vocabulary")
}

#[derive(Debug)]
struct Store {
    free: Vec<u32>,
    readable: HashMap<u64, (u32, usize)>,
    unused: VecDeque<u64>,
    content: Vec<[u64; BLOCK_TOKENS]>,
    owned: Vec<bool>,
    /// Lower tiers: what they hold by name. They take every other block they are told of.
    lower: HashMap<u64, [u64; BLOCK_TOKENS]>,
    /// Blocks that lower tiers were told of.
    offloaded: u64,
    /// Blocks of loads under way, which hold what they load.
    loads: usize,
}

#[derive(Clone, Debug)]
struct Pool(Rc<RefCell<Store>>);

#[derive(Debug)]
struct Owned(u32, Pool);

#[derive(Debug)]
struct Shared(u64, u32, Pool);

/// Contents held in lower tiers.
#[derive(Debug)]
struct Lower(Vec<[u64; BLOCK_TOKENS]>, Pool);

impl Drop for Lower {
    fn drop(&mut self) {
        self.1.0.borrow_mut().loads -= self.0.len();
    }
}

impl Pool {
    fn new(blocks: u32) -> Self {
        Self(Rc::new(RefCell::new(Store {
            free: (0..blocks).rev().collect(),
            readable: HashMap::new(),
            unused: VecDeque::new(),
            content: vec![[0; BLOCK_TOKENS]; blocks as usize],
            owned: vec![false; blocks as usize],
            lower: HashMap::new(),
            offloaded: 0,
            loads: 0,
        })))
    }

    /// Forgets what nobody holds, as if room had been needed.
    fn evict(&self) {
        let mut store = self.0.borrow_mut();
        while let Some(hash) = store.unused.pop_front() {
            let (id, _) = store.readable.remove(&hash).expect("unused is readable");
            store.free.push(id);
        }
    }

    /// Lower tiers evict one in `every` of their blocks.
    fn lose(&self, every: usize) {
        let mut place = 0;
        self.0.borrow_mut().lower.retain(|_, _| {
            place += 1;
            place % every != 0
        });
    }

    fn insert_readable(&self, hash: u64, content: [u64; BLOCK_TOKENS]) {
        let mut store = self.0.borrow_mut();
        let id = store.free.pop().expect("room");
        store.content[id as usize] = content;
        store.readable.insert(hash, (id, 0));
        store.unused.push_back(hash);
    }

    fn hold(&self, hash: u64) -> Option<Shared> {
        let mut store = self.0.borrow_mut();
        let (id, holders) = store.readable.get_mut(&hash)?;
        *holders += 1;
        let id = *id;
        store.unused.retain(|&other| other != hash);
        Some(Shared(hash, id, self.clone()))
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        let mut store = self.1.0.borrow_mut();
        if std::mem::take(&mut store.owned[self.0 as usize]) {
            store.free.push(self.0);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let mut store = self.2.0.borrow_mut();
        let (_, holders) = store.readable.get_mut(&self.0).expect("held");
        *holders -= 1;
        if *holders == 0 {
            store.unused.push_back(self.0);
        }
    }
}

impl KvBlocks for Pool {
    type Shared = Shared;
    type Owned = Owned;
    type Lower = Lower;

    fn total(&self) -> usize {
        self.0.borrow().content.len()
    }

    fn available(&self) -> usize {
        let store = self.0.borrow();
        store.free.len() + store.unused.len()
    }

    fn match_prefix(&self, blocks: &[TokenBlock]) -> Vec<Shared> {
        blocks
            .iter()
            .map_while(|block| self.hold(block.sequence.0))
            .collect()
    }

    fn extend_prefix(&self, prefix: Vec<Shared>, blocks: &[TokenBlock]) -> Found<Self> {
        let mut found = Found::readable(prefix);
        let mut lower = Vec::new();
        for block in &blocks[found.blocks.len()..] {
            let readable = self.hold(block.sequence.0);
            if readable.is_none() {
                let Some(&content) = self.0.borrow().lower.get(&block.sequence.0) else {
                    break;
                };
                lower.push(content);
            }
            found.blocks.push(readable);
        }
        self.0.borrow_mut().loads += lower.len();
        found.lower = (!lower.is_empty()).then(|| Lower(lower, self.clone()));
        found
    }

    fn offload(&self, blocks: &[TokenBlock], priority: Option<u32>) -> bool {
        let mut store = self.0.borrow_mut();
        for block in blocks {
            let (id, holders) = store.readable[&block.sequence.0];
            assert!(holders > 0, "held by the sequence that filled it");
            store.offloaded += 1;
            if store.offloaded.is_multiple_of(2) {
                let content = store.content[id as usize];
                store.lower.insert(block.sequence.0, content);
            }
        }
        priority.is_none()
    }

    fn contains(&self, name: TokenBlock) -> bool {
        self.0.borrow().readable.contains_key(&name.sequence.0)
    }

    fn allocate(&self, count: usize) -> Option<Vec<Owned>> {
        if self.available() < count {
            return None;
        }
        let mut store = self.0.borrow_mut();
        let blocks = (0..count).map(|_| {
            let id = store.free.pop().unwrap_or_else(|| {
                let hash = store.unused.pop_front().expect("counted above");
                store.readable.remove(&hash).expect("unused is readable").0
            });
            store.owned[id as usize] = true;
            Owned(id, self.clone())
        });
        Some(blocks.collect())
    }

    fn register(&self, blocks: Vec<(Owned, TokenBlock, Option<SequenceHash>)>) -> Vec<Shared> {
        let register = |(block, name, _): (Owned, TokenBlock, Option<SequenceHash>)| {
            if !self.contains(name) {
                let mut store = self.0.borrow_mut();
                store.owned[block.0 as usize] = false;
                store.readable.insert(name.sequence.0, (block.0, 0));
            }
            self.hold(name.sequence.0).expect("readable now")
        };
        blocks.into_iter().map(register).collect()
    }

    fn shared_id(block: &Shared) -> BlockId {
        BlockId(block.1)
    }

    fn owned_id(block: &Owned) -> BlockId {
        BlockId(block.0)
    }
}

#[derive(Debug)]
struct Request {
    prompt: Vec<TokenId>,
    stop: StopConditions,
    kind: SequenceKind,
}

impl Request {
    /// What comes out without a scheduler.
    fn expected(&self) -> Vec<TokenId> {
        let mut tokens = self.prompt.clone();
        loop {
            let token = next_token(&tokens);
            tokens.push(token);
            let generated = tokens.len() - self.prompt.len();
            let stopped = token == EOS && generated >= self.stop.min_tokens as usize;
            let one = matches!(self.kind, SequenceKind::ForPeer { .. });
            if one || stopped || generated >= self.stop.max_tokens as usize {
                return tokens.split_off(self.prompt.len());
            }
        }
    }
}

/// A scheduler with an executor that checks every slice, and what came out of it.
struct Bench {
    pool: Pool,
    scheduler: Scheduler<Pool>,
    requests: BTreeMap<SequenceId, Request>,
    outputs: BTreeMap<SequenceId, Vec<TokenId>>,
    gates: Vec<(SequenceId, Gate, Option<Lower>)>,
    /// Blocks that a peer or a lower tier may still write to.
    aside: Vec<(Option<SequenceBlocks<Pool>>, Option<Lower>)>,
    /// Blocks that came from lower tiers.
    loaded: usize,
    /// Sequences that finished, and those that were taken out before.
    finished: usize,
    removed: usize,
}

impl Bench {
    fn new(blocks: u32, config: SchedulerConfig) -> Self {
        let pool = Pool::new(blocks);
        let scheduler =
            Scheduler::new(config, pool.clone(), BLOCK_TOKENS, 64, vec![EOS]).expect("valid");
        Self {
            pool,
            scheduler,
            requests: BTreeMap::new(),
            outputs: BTreeMap::new(),
            gates: Vec::new(),
            aside: Vec::new(),
            loaded: 0,
            finished: 0,
            removed: 0,
        }
    }

    fn submit(&mut self, mut request: Request, deadline: Duration) {
        let spec = SequenceSpec {
            prompt: request.prompt.clone(),
            salt: SaltHash::default(),
            stop: request.stop.clone(),
            priority: None,
            deadline,
            kind: request.kind,
        };
        if let Ok(id) = self.scheduler.submit(spec) {
            let room = self.scheduler.tokens_max() - request.prompt.len();
            request.stop.max_tokens = request.stop.max_tokens.min(u32::try_from(room).unwrap());
            self.requests.insert(id, request);
            self.outputs.insert(id, Vec::new());
        }
    }

    /// Admits and computes one step; returns how many slices it had.
    fn step(&mut self) -> usize {
        for admitted in self.scheduler.admit() {
            self.seated(admitted);
        }
        let slices = self.scheduler.step();
        let mut tokens = 0;
        for slice in &slices {
            tokens += slice.len;
            self.compute(slice.id, slice.start, slice.start + slice.len);
        }
        assert!(tokens <= self.scheduler.config.max_batch_tokens);
        assert!(self.scheduler.running.len() <= self.scheduler.config.max_running);
        for slice in &slices {
            let before = self
                .scheduler
                .sequence(slice.id)
                .unwrap()
                .block_ids()
                .to_vec();
            self.scheduler.advance(slice);
            let sequence = self.scheduler.sequence(slice.id).unwrap();
            if matches!(sequence.kind, SequenceKind::ForPeer { .. }) {
                // A transfer may be reading these very blocks.
                assert_eq!(before, sequence.block_ids());
            }
            if slice.sample {
                self.push_next(slice.id);
            }
        }
        slices.len()
    }

    fn seated(&mut self, admitted: Admitted<Pool>) {
        let Admitted {
            id, gate, lower, ..
        } = admitted;
        assert_eq!(matches!(gate, Some(Gate::Onboard { .. })), lower.is_some());
        self.gates.extend(gate.map(|gate| (id, gate, lower)));
    }

    /// What an executor does: reads all KV before `start`, writes it from there to `end`.
    fn compute(&self, id: SequenceId, start: usize, end: usize) {
        let sequence = self.scheduler.sequence(id).expect("scheduled");
        let table = sequence.block_ids();
        let mut store = self.pool.0.borrow_mut();
        for position in 0..end {
            let block = table[position / BLOCK_TOKENS].index();
            let expected = tag(&sequence.tokens()[..=position]);
            let slot = &mut store.content[block][position % BLOCK_TOKENS];
            if position < start {
                assert_eq!(*slot, expected, "KV of token {position} is not what it was");
            } else {
                *slot = expected;
                assert!(
                    store.owned[block],
                    "a readable block is written (invariant 2)"
                );
            }
        }
    }

    fn push_next(&mut self, id: SequenceId) {
        let sequence = self.scheduler.sequence(id).expect("running");
        let token = next_token(sequence.tokens());
        let one = matches!(self.requests[&id].kind, SequenceKind::ForPeer { .. });
        self.outputs.get_mut(&id).expect("submitted").push(token);
        if self.scheduler.push(id, token).is_some() || one {
            let expected = self.requests[&id].expected();
            assert_eq!(self.outputs[&id], expected, "of {:?}", self.requests[&id]);
            self.scheduler.retire(id).expect("running");
            self.finished += 1;
        }
    }

    /// Ends what the `index`-th gated sequence waits for: well, or not, or not all of it.
    fn resolve_gate(&mut self, index: usize, well: bool) {
        let percent = if well { 100 } else { index * 37 % 100 };
        let (id, gate, lower) = self.gates.swap_remove(index);
        let Some(sequence) = self.scheduler.sequence(id) else {
            return;
        };
        assert!(
            !sequence.block_ids().is_empty(),
            "blocks a peer may write to were taken away"
        );
        let (prompt, cached) = (sequence.prompt_tokens(), sequence.computed_tokens());
        match gate {
            Gate::Onboard { end } => {
                let lower = lower.expect("comes with the gate");
                let loaded = self.load(id, end as usize, &lower.0, percent);
                drop(lower);
                if let Some(admitted) = self.scheduler.onboarded(id, loaded) {
                    assert_eq!(loaded, end as usize);
                    assert_eq!(admitted.cached_tokens, loaded * BLOCK_TOKENS);
                    self.seated(admitted);
                } else {
                    let sequence = self.scheduler.sequence(id).expect("waits again");
                    assert!(loaded < end as usize && sequence.block_ids().is_empty());
                }
            }
            _ if !well => self.scheduler.open_gate(id, cached),
            Gate::RemotePrefill => {
                self.compute(id, cached, prompt);
                self.scheduler.open_gate(id, prompt);
                self.push_next(id);
            }
            Gate::Load { first, end } => {
                assert_eq!(first as usize * BLOCK_TOKENS, cached);
                let end = end as usize * BLOCK_TOKENS;
                self.compute(id, cached, end);
                self.scheduler.open_gate(id, end);
            }
        }
    }

    /// Copies the first `percent` of what lower tiers hold into its blocks and spoils the block
    /// after it; returns the leading blocks of the sequence that are in place.
    fn load(&mut self, id: SequenceId, end: usize, held: &[[u64; 4]], percent: usize) -> usize {
        let sequence = self.scheduler.sequence(id).expect("looked up before");
        let targets = sequence.load_targets();
        assert_eq!(targets.len(), held.len(), "each block has a place");
        let come = held.len() * percent / 100;
        let mut store = self.pool.0.borrow_mut();
        for (at, (target, content)) in targets.iter().zip(held).enumerate() {
            assert!(store.owned[target.index()], "a readable block is loaded");
            match at.cmp(&come) {
                std::cmp::Ordering::Less => store.content[target.index()] = *content,
                std::cmp::Ordering::Equal => store.content[target.index()] = [99; BLOCK_TOKENS],
                std::cmp::Ordering::Greater => {}
            }
        }
        self.loaded += come;
        let table = sequence.block_ids();
        let missing = targets.get(come);
        let place = |id| table.iter().position(|other| other == id);
        missing.map_or(end, |id| place(id).expect("a block of the table"))
    }

    fn remove(&mut self, id: SequenceId) {
        if self.scheduler.retire(id).is_some() {
            self.removed += 1;
        }
    }

    /// Runs until nothing is left. A step may be empty only while something is gated.
    fn finish(&mut self) {
        self.aside.clear();
        while !self.scheduler.is_empty() {
            if self.step() == 0 && !self.scheduler.is_empty() {
                assert!(
                    !self.gates.is_empty(),
                    "nothing to compute, nothing to wait for"
                );
                self.resolve_gate(0, true);
            }
        }
        // What is left here belongs to sequences that were taken out.
        self.gates.clear();
        assert_eq!(self.finished + self.removed, self.requests.len());
        assert_eq!(self.pool.available(), self.pool.total(), "a block leaked");
        let store = self.pool.0.borrow();
        assert!(store.owned.iter().all(|owned| !owned));
        assert_eq!(store.loads, 0, "a lower tier's block is still held");
    }
}

#[derive(Clone, Debug)]
enum Action {
    Submit {
        /// Prompts of one family share their beginning.
        family: u32,
        len: usize,
        max_tokens: u32,
        min_tokens: u32,
        kind: u32,
        lifetime: u64,
    },
    Cancel(usize),
    Gate(usize, bool),
    /// The blocks of a gated sequence cannot be used for now.
    Stuck(usize),
    /// A gated sequence is cancelled while bytes may still land in its blocks.
    GiveUp(usize),
    /// A sequence's readable blocks are evicted: lower tiers may still have them.
    Evict,
    /// Lower tiers lose every so many blocks.
    Lose(usize),
    /// Those blocks can be used again.
    Unstuck,
    Step,
    Tick(u64),
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        3 => (0..3u32, 1..40usize, 1..20u32, 0..4u32, 0..6u32, 1..200u64).prop_map(
            |(family, len, max_tokens, min_tokens, kind, lifetime)| Action::Submit {
                family, len, max_tokens, min_tokens, kind, lifetime,
            }
        ),
        1 => (0..64usize).prop_map(Action::Cancel),
        2 => (0..64usize, any::<bool>()).prop_map(|(i, well)| Action::Gate(i, well)),
        1 => (0..64usize).prop_map(Action::Stuck),
        1 => (0..64usize).prop_map(Action::GiveUp),
        1 => Just(Action::Evict),
        1 => (2..5usize).prop_map(Action::Lose),
        1 => Just(Action::Unstuck),
        6 => Just(Action::Step),
        1 => (0..20u64).prop_map(Action::Tick),
    ]
}

fn request(family: u32, len: usize, max_tokens: u32, min_tokens: u32, kind: u32) -> Request {
    // The last few tokens differ by length, so that prompts share a prefix without being equal.
    let len_token = TokenId::try_from(len).unwrap();
    let shared = len.saturating_sub(3);
    let prompt: Vec<TokenId> = (0..len)
        .map(|i| {
            let i = TokenId::try_from(i).unwrap();
            if (i as usize) < shared {
                family * 7 + i % 5
            } else {
                len_token + i
            }
        })
        .collect();
    let peer_cached = u32::try_from((len - 1) / BLOCK_TOKENS).unwrap();
    Request {
        prompt,
        stop: StopConditions {
            max_tokens,
            min_tokens,
            ..StopConditions::default()
        },
        kind: match kind {
            0 => SequenceKind::Remote {
                uncached_tokens_min: 10,
            },
            1 => SequenceKind::ForPeer {
                peer_cached_blocks: peer_cached / 2,
            },
            _ => SequenceKind::Local,
        },
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Any mix of requests, cancellations, deadlines and hand-offs: each request's tokens are those
    /// of the naive model, every one ends, and every block comes back.
    #[test]
    fn every_request_ends_with_the_right_tokens_and_no_block_leaks(
        actions in prop::collection::vec(action(), 1..120),
        blocks in 12..40u32,
        max_running in 1..6usize,
        chunk in BLOCK_TOKENS..20,
    ) {
        let config = SchedulerConfig {
            max_running,
            max_waiting: 20,
            max_batch_tokens: max_running + chunk,
            prefill_chunk_tokens: chunk,
        };
        let mut bench = Bench::new(blocks, config);
        let mut now = 0;
        for action in actions {
            match action {
                Action::Submit { family, len, max_tokens, min_tokens, kind, lifetime } => {
                    let request = request(family, len, max_tokens, min_tokens, kind);
                    bench.submit(request, Duration::from_millis(now + lifetime));
                }
                Action::Cancel(index) => {
                    let ids: Vec<_> = bench.scheduler.all().map(|(id, _)| id).collect();
                    if !ids.is_empty() {
                        bench.remove(ids[index % ids.len()]);
                    }
                }
                Action::Gate(index, well) => {
                    if !bench.gates.is_empty() {
                        let index = index % bench.gates.len();
                        bench.resolve_gate(index, well);
                    }
                }
                Action::Stuck(index) => {
                    if !bench.gates.is_empty() {
                        let index = index % bench.gates.len();
                        let (id, _, lower) = bench.gates.swap_remove(index);
                        bench.aside.push((bench.scheduler.requeue(id), lower));
                    }
                }
                Action::GiveUp(index) => {
                    if !bench.gates.is_empty() {
                        let index = index % bench.gates.len();
                        let (id, _, lower) = bench.gates.swap_remove(index);
                        if let Some(sequence) = bench.scheduler.retire(id) {
                            bench.removed += 1;
                            bench.aside.push((Some(sequence.into_blocks()), lower));
                        }
                    }
                }
                Action::Evict => bench.pool.evict(),
                Action::Lose(every) => bench.pool.lose(every),
                Action::Unstuck => bench.aside.clear(),
                Action::Step => {
                    bench.step();
                }
                Action::Tick(ms) => {
                    now += ms;
                    let now = Duration::from_millis(now);
                    for id in bench.scheduler.expired(now) {
                        bench.remove(id);
                    }
                    prop_assert!(bench.scheduler.next_deadline().is_none_or(|next| next > now));
                }
            }
        }
        bench.finish();
    }
}

fn local(prompt: usize, max_tokens: u32) -> Request {
    let mut request = request(0, prompt, max_tokens, 0, 5);
    request.stop.ignore_eos = true;
    request.stop.min_tokens = max_tokens;
    request
}

const FOREVER: Duration = Duration::from_secs(3600);

fn config(max_running: usize) -> SchedulerConfig {
    SchedulerConfig {
        max_running,
        max_waiting: 8,
        max_batch_tokens: max_running + 16,
        prefill_chunk_tokens: 8,
    }
}

#[test]
fn chunks_end_at_block_boundaries_and_decoding_goes_first() {
    let mut bench = Bench::new(32, config(4));
    bench.submit(local(3, 8), FOREVER);
    bench.step();
    bench.submit(local(22, 2), FOREVER);
    bench.submit(local(19, 2), FOREVER);
    bench.scheduler.admit();
    let slices = bench.scheduler.step();
    let shape: Vec<_> = slices.iter().map(|s| (s.id.0, s.start, s.len)).collect();
    // 20 tokens: one decodes, two chunks of 8.
    assert_eq!(shape, [(0, 3, 1), (1, 0, 8), (2, 0, 8)]);
    assert_eq!(
        slices.iter().map(|s| s.sample).collect::<Vec<_>>(),
        [true, false, false]
    );
}

#[test]
fn the_youngest_is_preempted_and_finishes_all_the_same() {
    // Two sequences of 4 + 20 tokens need 12 blocks; the pool has 8.
    let mut bench = Bench::new(8, config(4));
    bench.submit(local(4, 20), FOREVER);
    bench.submit(local(5, 20), FOREVER);
    bench.finish();
    assert!(bench.scheduler.stats().preemptions > 0);
    assert_eq!(bench.finished, 2);
}

#[test]
fn a_prompt_seen_before_is_computed_only_from_its_last_block() {
    let mut bench = Bench::new(32, config(4));
    bench.submit(local(16, 1), FOREVER);
    bench.finish();
    bench.submit(local(16, 1), FOREVER);
    let admitted = bench.scheduler.admit();
    // 3 of the 4 full blocks: one token at least is computed.
    assert_eq!(admitted[0].cached_tokens, 12);
    assert_eq!(
        bench.scheduler.step(),
        [Slice {
            id: admitted[0].id,
            start: 12,
            len: 4,
            sample: true
        }]
    );
}

#[test]
fn generated_blocks_are_found_again_too() {
    let mut bench = Bench::new(32, config(4));
    let request = local(5, 12);
    let mut longer = request.prompt.clone();
    longer.extend(request.expected());
    bench.submit(request, FOREVER);
    bench.finish();
    let sequence = TokenSequence::from_tokens(&longer, BLOCK_TOKENS, SaltHash::default());
    // The KV of the last token was never computed: 16 of 17 tokens are there.
    assert_eq!(bench.pool.match_prefix(sequence.blocks()).len(), 4);
}

#[test]
fn blocks_below_are_loaded_while_others_are_computed() {
    let mut bench = Bench::new(32, config(4));
    let names = TokenSequence::from_tokens(&local(16, 1).prompt, BLOCK_TOKENS, SaltHash::default());
    let of = |block: usize| names.blocks()[block].sequence.0;
    let content: Vec<[u64; BLOCK_TOKENS]> = (0..3)
        .map(|block| std::array::from_fn(|i| tag(&names.tokens()[..=block * BLOCK_TOKENS + i])))
        .collect();
    for block in [0, 2] {
        bench
            .pool
            .0
            .borrow_mut()
            .lower
            .insert(of(block), content[block]);
    }
    bench.pool.insert_readable(of(1), content[1]);
    bench.submit(local(16, 1), FOREVER);
    bench.submit(local(3, 4), FOREVER);
    assert_eq!(bench.step(), 1, "the second one is computed meanwhile");
    let [(loading, Gate::Onboard { end: 3 }, Some(_))] = bench.gates[..] else {
        panic!("{:?}", bench.gates);
    };
    let sequence = bench.scheduler.sequence(loading).unwrap();
    assert_eq!(
        sequence.load_targets().len(),
        2,
        "the middle one is readable"
    );
    assert_eq!(sequence.computed_tokens(), 0);
    bench.resolve_gate(0, true);
    let sequence = bench.scheduler.sequence(loading).unwrap();
    assert_eq!(
        (sequence.computed_tokens(), sequence.cached_tokens()),
        (12, 12)
    );
    bench.finish();
    assert_eq!(bench.loaded, 2);
}

#[test]
fn what_lower_tiers_do_not_give_is_computed_and_not_asked_for_again() {
    let mut bench = Bench::new(32, config(4));
    let prompt = local(17, 1).prompt;
    let names = TokenSequence::from_tokens(&prompt, BLOCK_TOKENS, SaltHash::default());
    for (block, name) in names.blocks().iter().enumerate() {
        let content = std::array::from_fn(|i| tag(&prompt[..=block * BLOCK_TOKENS + i]));
        let mut store = bench.pool.0.borrow_mut();
        store.lower.insert(name.sequence.0, content);
    }
    bench.submit(local(17, 1), FOREVER);
    assert_eq!(bench.step(), 0);
    let (id, gate, lower) = bench.gates.pop().expect("it loads");
    assert_eq!(gate, Gate::Onboard { end: 4 });
    let loaded = bench.load(id, 4, &lower.as_ref().unwrap().0, 50);
    drop(lower);
    assert_eq!(loaded, 2);
    assert!(bench.scheduler.onboarded(id, loaded).is_none());
    let admitted = bench.scheduler.admit();
    // What came is found in the pool.
    assert_eq!((admitted[0].cached_tokens, admitted[0].gate), (8, None));
    assert!(!admitted[0].again);
    bench.finish();
}

#[test]
fn lower_tiers_are_asked_before_another_worker_is() {
    let mut bench = Bench::new(32, config(4));
    let remote = |len| request(1, len, 1, 0, 0);
    for len in [12, 24] {
        let prompt = remote(len).prompt;
        let names = TokenSequence::from_tokens(&prompt, BLOCK_TOKENS, SaltHash::default());
        let content = std::array::from_fn(|i| tag(&prompt[..=i]));
        let mut store = bench.pool.0.borrow_mut();
        store.lower.insert(names.blocks()[0].sequence.0, content);
        drop(store);
        bench.submit(remote(len), FOREVER);
    }
    bench.step();
    let kinds = |bench: &Bench| bench.gates.iter().map(|g| g.1).collect::<Vec<_>>();
    assert_eq!(kinds(&bench), [Gate::Onboard { end: 1 }; 2]);
    bench.resolve_gate(0, true);
    bench.resolve_gate(0, true);
    // 8 tokens are left of the short one, which is below its limit.
    assert_eq!(kinds(&bench), [Gate::RemotePrefill]);
    bench.finish();
}

#[test]
fn a_short_remote_prompt_stays_local_and_a_long_one_is_gated() {
    let mut bench = Bench::new(32, config(4));
    for len in [9, 10] {
        bench.submit(request(1, len, 1, 0, 0), FOREVER);
    }
    let gates: Vec<_> = bench.scheduler.admit().iter().map(|a| a.gate).collect();
    assert_eq!(gates, [None, Some(Gate::RemotePrefill)]);
    assert_eq!(
        bench.scheduler.step().len(),
        1,
        "a gated one is not computed"
    );
}

#[test]
fn blocks_that_a_peer_may_write_to_are_not_taken_for_an_older_sequence() {
    let mut bench = Bench::new(8, config(4));
    bench.submit(local(4, 24), FOREVER);
    bench.submit(request(1, 17, 1, 0, 0), FOREVER);
    while bench.step() > 0 {}
    // 3 + 5 blocks are held, and the older one needs a fourth: it waits.
    let [(gated, Gate::RemotePrefill, None)] = bench.gates[..] else {
        panic!("one is gated");
    };
    assert_eq!(
        bench.scheduler.sequence(gated).unwrap().block_ids().len(),
        5
    );
    assert_eq!(bench.scheduler.stats().preemptions, 0);
    bench.resolve_gate(0, true);
    bench.finish();
}

#[test]
fn a_prompt_computed_for_a_peer_stays_in_the_cache_and_in_its_blocks() {
    let mut bench = Bench::new(32, config(4));
    let for_peer = |len| request(1, len, 1, 0, 1);
    // The same prompt twice at once: both compute it, and neither's blocks are exchanged.
    bench.submit(for_peer(13), FOREVER);
    bench.submit(for_peer(13), FOREVER);
    while bench.finished < 2 {
        if bench.step() == 0 {
            bench.resolve_gate(0, false);
        }
    }
    bench.submit(local(17, 1), FOREVER);
    bench.submit(for_peer(14), FOREVER);
    let cached: Vec<_> = bench
        .scheduler
        .admit()
        .iter()
        .map(|a| a.cached_tokens)
        .collect();
    assert_eq!(cached, [0, 8], "other family, same family");
    bench.finish();
}

#[test]
fn the_waiting_queue_is_bounded() {
    let mut bench = Bench::new(8, config(1));
    for _ in 0..8 {
        bench.submit(local(4, 1), FOREVER);
    }
    let spec = SequenceSpec {
        prompt: vec![1],
        salt: SaltHash::default(),
        stop: StopConditions::default(),
        priority: None,
        deadline: FOREVER,
        kind: SequenceKind::Local,
    };
    assert_eq!(bench.scheduler.submit(spec), Err(QueueFull { limit: 8 }));
}

#[test]
fn limits_that_contradict_each_other_are_refused() {
    let small = SchedulerConfig {
        max_running: 8,
        max_batch_tokens: 10,
        ..SchedulerConfig::default()
    };
    let error = small.validate(16).unwrap_err();
    assert_eq!(
        error.to_string(),
        "max_batch_tokens is 10; accepted: 24 or more"
    );
}

//! Fixture checkpoints, their reference outputs, and KV memory for tests of the model.

use std::cell::UnsafeCell;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;

use blockplane_engine::model::{Executor, ExecutorOptions, LoadOptions, Model, SequenceSlice};
use blockplane_engine::ops::{Compute, Isa, KvView};
use blockplane_protocol::{BlockId, KvLayout, LayerIndex, TokenId};
use safetensors::SafeTensors;

/// Small blocks, so that every prompt spans several.
pub(crate) const BLOCK_TOKENS: u32 = 16;
const BLOCKS: u32 = 128;

/// Those in the repository.
pub(crate) const COMMITTED: [&str; 3] = ["llama", "qwen3", "mistral-swa"];
/// Those that `tests/fixtures/make_fixtures.py` makes besides.
pub(crate) const GENERATED: [&str; 10] = [
    "llama-tied",
    "llama-yarn",
    "llama-linear",
    "llama-bias",
    "llama-f16",
    "llama-f32",
    "llama-legacy",
    "qwen2",
    "qwen2-swa",
    "qwen3-sharded",
];

/// What transformers computed.
pub(crate) struct Reference {
    pub(crate) prompts: Vec<Prompt>,
    /// 2,000 random tokens, and the logits of the last few positions.
    pub(crate) long: Prompt,
}

/// One prompt and what follows it.
pub(crate) struct Prompt {
    pub(crate) ids: Vec<TokenId>,
    /// One row per prompt position, or for the last positions only.
    pub(crate) logits: Vec<Vec<f32>>,
    /// What follows, where it was recorded.
    pub(crate) greedy: Vec<TokenId>,
}

pub(crate) fn committed(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures")
        .join(name)
}

/// A fixture that the test run made, if it made any.
#[expect(
    clippy::disallowed_methods,
    reason = "the test run says in this variable where it put the generated fixtures"
)]
#[expect(
    clippy::print_stdout,
    reason = "what is skipped must show, with its reason"
)]
pub(crate) fn generated(name: &str) -> Option<PathBuf> {
    let Some(folder) = std::env::var_os("BLOCKPLANE_FIXTURES") else {
        println!("skipped {name}: BLOCKPLANE_FIXTURES is not set (see tests/fixtures)");
        return None;
    };
    let folder = PathBuf::from(folder).join(name);
    if !folder.join("config.json").exists() {
        println!("skipped {name}: {} has no config.json", folder.display());
        return None;
    }
    Some(folder)
}

/// All fixtures that are there.
pub(crate) fn all_fixtures() -> Vec<(String, PathBuf)> {
    let committed = COMMITTED.map(|name| (name.to_owned(), committed(name)));
    let generated = GENERATED
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), generated(name)?)));
    committed.into_iter().chain(generated).collect()
}

impl Reference {
    pub(crate) fn read(folder: &Path) -> Self {
        let bytes = std::fs::read(folder.join("reference/reference.safetensors"))
            .expect("a fixture has its reference");
        let tensors = SafeTensors::deserialize(&bytes).expect("the reference is whole");
        let words = |name: &str| -> Option<(Vec<[u8; 4]>, Vec<usize>)> {
            let tensor = tensors.tensor(name).ok()?;
            let words = tensor.data().as_chunks::<4>().0.to_vec();
            Some((words, tensor.shape().to_vec()))
        };
        let ids = |name: &str| -> Option<Vec<TokenId>> {
            Some(words(name)?.0.into_iter().map(u32::from_le_bytes).collect())
        };
        let prompt = |name: &str| -> Option<Prompt> {
            let (logits, shape) = words(&format!("{name}.logits"))?;
            let logits: Vec<f32> = logits.into_iter().map(f32::from_le_bytes).collect();
            Some(Prompt {
                ids: ids(&format!("{name}.ids"))?,
                logits: logits.chunks(shape[1]).map(<[f32]>::to_vec).collect(),
                greedy: ids(&format!("{name}.greedy")).unwrap_or_default(),
            })
        };
        let prompts: Vec<_> = (0..)
            .map_while(|index| prompt(&format!("prompt{index}")))
            .collect();
        assert_eq!(prompts.len(), 3, "a fixture has three prompts");
        let long = prompt("long").expect("a fixture has a long prompt");
        Self { prompts, long }
    }
}

/// KV blocks on the heap, and a block table handed out from them out of order.
pub(crate) struct HeapKv {
    layout: KvLayout,
    memory: Box<[UnsafeCell<u64>]>,
}

// SAFETY: plain bytes; the users of the blocks keep apart what they write.
unsafe impl Sync for HeapKv {}

// SAFETY: the memory holds `BLOCKS` blocks of the layout, aligned to 8 bytes, as long as it lives.
unsafe impl KvView for HeapKv {
    fn layout(&self) -> &KvLayout {
        &self.layout
    }

    fn blocks(&self) -> u32 {
        BLOCKS
    }

    fn run_ptr(&self, block: BlockId, layer: LayerIndex) -> NonNull<u8> {
        assert!(block.0 < BLOCKS && layer.0 < self.layout.layers);
        let at = block.index() * self.layout.block_stride()
            + layer.index() * self.layout.layer_stride(BLOCKS);
        let start = self.memory.as_ptr().cast::<u8>().cast_mut();
        NonNull::new(start.wrapping_add(at)).expect("inside an allocation")
    }
}

impl HeapKv {
    /// Filled with NaN: what is read without having been written shows.
    pub(crate) fn new(layout: KvLayout) -> Self {
        let words = layout.pool_bytes(BLOCKS).div_ceil(8);
        Self {
            layout,
            memory: (0..words).map(|_| UnsafeCell::new(u64::MAX)).collect(),
        }
    }

    /// Key and value of one token of one layer, all heads, of a pool in single precision.
    pub(crate) fn slots(&self, block: BlockId, layer: LayerIndex, token: usize) -> [Vec<f32>; 2] {
        let l = &self.layout;
        let (heads, dim) = (l.kv_heads as usize, l.head_dim as usize);
        let run = self.run_ptr(block, layer).as_ptr().cast::<f32>();
        [0, 1].map(|plane| {
            (0..heads)
                .flat_map(|head| {
                    let at = ((plane * heads + head) * l.block_tokens as usize + token) * dim;
                    // SAFETY: inside the run; the test reads between two layers.
                    (0..dim).map(move |d| unsafe { *run.wrapping_add(at + d) })
                })
                .collect()
        })
    }

    /// Blocks `index`, `index + step`, ... for the sequence with this index among `step`.
    pub(crate) fn table(index: u32, step: u32) -> Vec<BlockId> {
        let mut table: Vec<_> = (index..BLOCKS)
            .step_by(step as usize)
            .map(BlockId)
            .collect();
        table.reverse();
        table
    }
}

/// A loaded fixture with memory to run it.
pub(crate) struct Runner {
    pub(crate) executor: Executor,
    pub(crate) kv: HeapKv,
}

impl Runner {
    pub(crate) fn new(folder: &Path, compute: Compute, threads: usize, isa: Option<Isa>) -> Self {
        let mut options = LoadOptions::new(compute, threads);
        options.cpu.isa = isa;
        let model = Model::load(folder, &options).expect("the fixture loads");
        Self::of(model)
    }

    pub(crate) fn of(model: Arc<Model>) -> Self {
        let kv = HeapKv::new(model.kv_layout(BLOCK_TOKENS));
        let executor = Executor::new(model, ExecutorOptions::default()).expect("memory");
        Self { executor, kv }
    }

    /// Logits after the last of `tokens`, which begin at `position`.
    pub(crate) fn step(
        &mut self,
        tokens: &[TokenId],
        position: usize,
        blocks: &[BlockId],
    ) -> Vec<f32> {
        let slice = SequenceSlice {
            tokens,
            position: u32::try_from(position).expect("short"),
            blocks,
            logits: true,
        };
        let logits = self
            .executor
            .forward(&[slice], &self.kv, &mut |_| {})
            .expect("a valid batch");
        logits.row(0).to_vec()
    }

    /// The prompt in chunks of at most `chunk` tokens, then `steps` greedy tokens.
    pub(crate) fn greedy(
        &mut self,
        prompt: &[TokenId],
        chunk: usize,
        steps: usize,
        blocks: &[BlockId],
    ) -> Vec<TokenId> {
        let mut logits = Vec::new();
        let mut position = 0;
        for tokens in prompt.chunks(chunk) {
            logits = self.step(tokens, position, blocks);
            position += tokens.len();
        }
        let mut out = vec![argmax(&logits)];
        while out.len() < steps {
            let last = *out.last().expect("has the first");
            logits = self.step(&[last], position, blocks);
            position += 1;
            out.push(argmax(&logits));
        }
        out
    }
}

/// Index of the greatest, the first of equals.
pub(crate) fn argmax(logits: &[f32]) -> TokenId {
    let best = (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
    TokenId::try_from(best).expect("a token id")
}

/// The greatest absolute difference.
pub(crate) fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        // NaN must not pass for a small difference.
        .fold(0.0, |max, d| if d > max || d.is_nan() { d } else { max })
}

/// Length of the difference relative to the length of `b`.
pub(crate) fn relative_error(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let square = |x: f32| x * x;
    let difference: f32 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    let length: f32 = b.iter().copied().map(square).sum();
    (difference / length).sqrt()
}

//! From text to tokens and back: tokenizer, chat template, bounded pool, incremental decoding.

mod assets;
mod detokenize;
#[cfg(test)]
mod detokenize_tests;
mod pool;
mod python;
mod template;
#[cfg(test)]
mod template_tests;
mod vocabulary;

pub(crate) use assets::{AssetCache, AssetError, ModelAssets, TemplateError};
pub(crate) use detokenize::Detokenizer;
pub(crate) use pool::{PoolError, TokenizePool};
pub(crate) use template::{ChatInput, RenderError};
pub(crate) use vocabulary::Vocabulary;

//! Options that `replay` and `advise` share: the trace, the model, and what a block is.

use std::path::PathBuf;

use anyhow::{Context, bail, ensure};

use super::trace::{MOONCAKE_BLOCK_TOKENS, Trace, TraceConfig};
use crate::transfer::{Cut, DTypeName, Model, Order};

/// A trace and the model that is to serve it.
#[derive(Clone, Debug, clap::Args)]
pub struct TrafficArgs {
    /// Requests to play: a trace in Mooncake's format (JSON lines), or a recording of a worker
    /// (DYN_KVBM_ENABLE_RECORD).
    pub trace: PathBuf,
    /// Tokens of a block of the trace; a recording says it itself.
    #[arg(long, default_value_t = MOONCAKE_BLOCK_TOKENS, value_parser = clap::value_parser!(u32).range(1..))]
    pub block_tokens: u32,
    /// Count last blocks that are not full; a cache does not find them again.
    #[arg(long)]
    pub partial: bool,
    /// config.json of the model, or its folder: tells how large a block is.
    #[arg(long)]
    pub model_config: Option<PathBuf>,
    /// Ranks over which the model is split; sizes are of all ranks together.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub tp: u32,
    /// Type of the cache, where it is not that of the model.
    #[arg(long)]
    pub dtype: Option<DTypeName>,
}

impl TrafficArgs {
    /// Reads the trace.
    pub(super) fn read(&self) -> anyhow::Result<Trace> {
        let config = TraceConfig {
            block_tokens: self.block_tokens,
            partial: self.partial,
        };
        Trace::read(&self.trace, config)
    }

    /// Bytes of one block on all ranks, if the model is known.
    pub(super) fn block_bytes(&self, block_tokens: u32) -> anyhow::Result<Option<u64>> {
        let Some(path) = &self.model_config else {
            return Ok(None);
        };
        let cut = Cut {
            tokens: block_tokens,
            ranks: self.tp,
            dtype: self.dtype,
            block_tokens,
            order: Order::LayerFirst,
        };
        let model = Model::read(path, cut)?;
        Ok(Some(model.bytes() as u64 * u64::from(self.tp)))
    }
}

/// How large a tier is, from a number of blocks or of GB (1e9 bytes).
pub(super) fn blocks(
    tier: &str,
    blocks: Option<u32>,
    gb: Option<f64>,
    block_bytes: Option<u64>,
) -> anyhow::Result<u32> {
    match (blocks, gb) {
        (Some(_), Some(_)) => bail!("give --{tier}-blocks or --{tier}-gb, not both"),
        (Some(blocks), None) => Ok(blocks),
        (None, None) => Ok(0),
        (None, Some(gb)) => {
            let bytes = block_bytes
                .with_context(|| format!("--{tier}-gb needs to know the bytes of a block"))?;
            blocks_of(gb, bytes).with_context(|| format!("--{tier}-gb"))
        }
    }
}

/// Whole blocks in so many GB.
pub(super) fn blocks_of(gb: f64, block_bytes: u64) -> anyhow::Result<u32> {
    ensure!(gb >= 0.0 && gb.is_finite(), "{gb} GB; accepted: 0 and more");
    let blocks = gb * 1e9 / super::outcome::real(block_bytes);
    ensure!(
        blocks < f64::from(u32::MAX - 2),
        "{gb} GB are more than 2^32 blocks of {block_bytes} bytes"
    );
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "checked above"
    )]
    Ok(blocks as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_come_from_blocks_or_bytes() {
        assert_eq!(blocks("g2", Some(7), None, None).unwrap(), 7);
        assert_eq!(blocks("g2", None, None, None).unwrap(), 0);
        assert_eq!(blocks("g2", None, Some(0.1), Some(1 << 20)).unwrap(), 95);
        for (blocks_given, gb, bytes, expected) in [
            (Some(1), Some(1.0), Some(1), "not both"),
            (None, Some(1.0), None, "--g2-gb needs"),
            (None, Some(-1.0), Some(1), "0 and more"),
            (None, Some(1e9), Some(1), "2^32"),
        ] {
            let error = blocks("g2", blocks_given, gb, bytes).unwrap_err();
            assert!(format!("{error:#}").contains(expected), "{error:#}");
        }
    }
}

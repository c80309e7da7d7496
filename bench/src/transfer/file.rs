//! Transfers between memory and a file.

use std::{io::Write, path::Path};

use anyhow::bail;

use super::TransferArgs;
use crate::report::Report;

/// Measures the cases of `args` against the file at `path`.
///
/// # Errors
/// When the file cannot be used, or bytes arrive wrong.
pub(super) fn run<W: Write>(
    _args: &TransferArgs,
    path: &Path,
    _report: &mut Report<W>,
) -> anyhow::Result<()> {
    bail!(
        "--to file:{}: this build has no file lane; accepted: arena, host",
        path.display()
    );
}

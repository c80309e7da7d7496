//! `blockplane completions` and `blockplane man`: what the command line says of itself, for shells and
//! for `man`.

use std::{fs, io::Write, path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::Cli;
use crate::output;

#[derive(Clone, Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell.
    pub(crate) shell: Shell,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct ManArgs {
    /// Write a page for this program and one for each of its commands into this folder, such as
    /// ~/.local/share/man/man1; without it the first goes to standard output.
    #[arg(long, value_name = "DIR")]
    pub(crate) to: Option<PathBuf>,
}

/// Prints the completions of a shell.
pub(crate) fn completions(args: &CompletionsArgs) -> ExitCode {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "blockplane", &mut text);
    print(&text)
}

/// Prints the manual page, or writes all of them.
pub(crate) fn man(args: &ManArgs) -> anyhow::Result<ExitCode> {
    let Some(dir) = &args.to else {
        let mut text = Vec::new();
        clap_mangen::Man::new(Cli::command()).render(&mut text)?;
        return Ok(print(&text));
    };
    fs::create_dir_all(dir).with_context(|| format!("folder {} cannot be made", dir.display()))?;
    clap_mangen::generate_to(Cli::command(), dir)
        .with_context(|| format!("the pages cannot be written to {}", dir.display()))?;
    output::line(&format!("pages are in {}", dir.display()));
    Ok(ExitCode::SUCCESS)
}

fn print(text: &[u8]) -> ExitCode {
    // A reader that went away has no use for the rest.
    let _ = std::io::stdout().lock().write_all(text);
    ExitCode::SUCCESS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shell_and_every_command_is_covered() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "blockplane", &mut text);
            let text = String::from_utf8(text).unwrap();
            assert!(text.contains("served-model-name"), "{shell}");
        }
        let dir = tempfile::tempdir().unwrap();
        man(&ManArgs {
            to: Some(dir.path().to_owned()),
        })
        .unwrap();
        for page in [
            "blockplane.1",
            "blockplane-up.1",
            "blockplane-kvbm-replay.1",
        ] {
            assert!(dir.path().join(page).exists(), "{page}");
        }
    }
}

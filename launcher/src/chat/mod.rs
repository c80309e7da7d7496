//! `blockplane chat`: a conversation with a server, from a terminal or a pipe.

mod session;
mod stats;

use std::{
    io::{self, BufRead, IsTerminal},
    process::ExitCode,
};

use anyhow::Context;
use rustyline::{DefaultEditor, error::ReadlineError};

use self::session::{Ended, Session};
use crate::{cli::ChatArgs, output};

const HELP: &str = "\
/stats         what the last answer cost: prefix reused, blocks moved, bytes, lane, overlap, TTFT, ITL
/new           forget the conversation
/system TEXT   instructions that stand before the conversation; without TEXT none
/model [NAME]  ask another model; without NAME the models of the server
/quit          leave (Ctrl-D too); Ctrl-C stops an answer";

/// Where lines come from.
enum Lines {
    /// A terminal, with editing and history.
    Terminal(Box<DefaultEditor>),
    /// A pipe or a file.
    Pipe(io::StdinLock<'static>),
}

/// Runs the conversation to its end.
pub(crate) fn run(args: ChatArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the async runtime cannot be started")?;
    let prompt = args.prompt.join(" ");
    let stats = args.stats;
    let mut session = runtime.block_on(Session::open(args))?;
    if !prompt.is_empty() {
        let ended = runtime.block_on(session.say(&prompt))?;
        if stats {
            runtime.block_on(show_stats(&session));
        }
        return Ok(ExitCode::from(match ended {
            Ended::Whole => 0,
            // As a shell reports a program that Ctrl-C ended.
            Ended::Stopped => 130,
        }));
    }
    let mut lines = Lines::open()?;
    if matches!(lines, Lines::Terminal(_)) {
        output::line(&format!(
            "{} at {}. /help lists what can be done, Ctrl-D leaves.",
            session.model(),
            session.url()
        ));
    }
    while let Some(line) = lines.next()? {
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        let done = runtime.block_on(async {
            match line.strip_prefix('/') {
                Some(command) => command_line(&mut session, command).await,
                None => session.say(line).await.map(|_| true),
            }
        });
        match done {
            Ok(false) => break,
            Ok(true) if stats && !line.starts_with('/') => runtime.block_on(show_stats(&session)),
            Ok(true) => {}
            // A person can try again; a script has to hear of it.
            Err(error) if matches!(lines, Lines::Terminal(_)) => {
                output::error(&format!("{error:#}"));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Obeys a line that starts with a slash. False to leave.
async fn command_line(session: &mut Session, line: &str) -> anyhow::Result<bool> {
    let (name, rest) = line.split_once(' ').unwrap_or((line, ""));
    let rest = rest.trim();
    match name {
        "stats" => show_stats(session).await,
        "new" => session.forget(),
        "system" => session.instruct(rest),
        "model" if rest.is_empty() => {
            for model in session.models().await? {
                output::line(&model);
            }
        }
        "model" => session.change_model(rest).await?,
        "quit" | "exit" => return Ok(false),
        "help" => output::line(HELP),
        _ => output::line(&format!("/{name} is not known here.\n{HELP}")),
    }
    Ok(true)
}

async fn show_stats(session: &Session) {
    match session.cost().await {
        Ok(text) => output::line(&text),
        Err(error) => output::error(&format!("{error:#}")),
    }
}

impl Lines {
    fn open() -> anyhow::Result<Self> {
        if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
            return Ok(Self::Pipe(io::stdin().lock()));
        }
        let editor = DefaultEditor::new().context("the terminal cannot be used")?;
        Ok(Self::Terminal(Box::new(editor)))
    }

    /// The next line; `None` at the end.
    fn next(&mut self) -> anyhow::Result<Option<String>> {
        match self {
            Self::Terminal(editor) => loop {
                match editor.readline("> ") {
                    Ok(line) => {
                        editor.add_history_entry(&line)?;
                        return Ok(Some(line));
                    }
                    Err(ReadlineError::Eof) => return Ok(None),
                    // Ctrl-C throws the line away.
                    Err(ReadlineError::Interrupted) => {}
                    Err(error) => return Err(error).context("the terminal cannot be read"),
                }
            },
            Self::Pipe(stdin) => {
                let mut line = String::new();
                let read = stdin
                    .read_line(&mut line)
                    .context("standard input cannot be read")?;
                Ok((read > 0).then_some(line))
            }
        }
    }
}

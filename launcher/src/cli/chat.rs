//! `blockplane chat`.

use std::time::Duration;

use clap::Args;

use super::worker::seconds;

#[derive(Clone, Debug, Args)]
pub(crate) struct ChatArgs {
    /// What to say; without it a conversation starts, one line at a time.
    pub(crate) prompt: Vec<String>,
    /// The server: any that speaks OpenAI's API over HTTP.
    #[arg(
        help_heading = "Server",
        long,
        value_name = "URL",
        env = "BLOCKPLANE_URL",
        default_value = "http://127.0.0.1:8000"
    )]
    pub(crate) url: String,
    /// Its model; the first that it lists when absent.
    #[arg(help_heading = "Server", long, value_name = "NAME")]
    pub(crate) model: Option<String>,
    /// Instructions that stand before the conversation.
    #[arg(help_heading = "Answers", long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Tokens of one answer at most; up to the model's context when absent.
    #[arg(help_heading = "Answers", long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_tokens: Option<u32>,
    /// 0 takes the likeliest token each time; higher values vary more.
    #[arg(
        help_heading = "Answers",
        long,
        value_name = "T",
        default_value_t = 0.0
    )]
    pub(crate) temperature: f32,
    /// Show after each answer what it cost, as `/stats` does.
    #[arg(help_heading = "Answers", long)]
    pub(crate) stats: bool,
    /// Longest wait for a connection or for the next piece of an answer, in seconds.
    #[arg(help_heading = "Server", long, value_name = "SECONDS", value_parser = seconds, default_value = "120")]
    pub(crate) timeout: Duration,
}

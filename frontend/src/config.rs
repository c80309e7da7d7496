//! Limits and time-outs of the frontend.

use std::time::Duration;

/// Configuration of a [`Frontend`](crate::Frontend). Every queue and every wait has its bound here.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FrontendConfig {
    /// Time a request may take when it does not say so itself. Default 600 s.
    pub request_timeout: Duration,
    /// Largest time a request may ask for with `X-Request-Timeout-Ms`. Default 3,600 s.
    pub request_timeout_max: Duration,
    /// Largest request body in bytes; larger ones get 413. Default 32 MiB.
    pub body_bytes_max: usize,
    /// Generation requests in progress at once; more get 429. Worst-case memory is this times
    /// `body_bytes_max`. Default 4,096.
    pub requests_max: usize,
    /// Open connections; further ones wait in the listener's backlog. Default 16,384.
    pub connections_max: usize,
    /// Threads that render templates and tokenise. Default: one per core, at most 8.
    pub tokenize_threads: usize,
    /// Prompts waiting for such a thread; more get 429. Default 1,024.
    pub tokenize_queue_max: usize,
    /// Requests with a body of at most this many bytes are tokenised where they are parsed, which
    /// is cheaper than handing them to another thread. Default 1,024.
    pub tokenize_inline_bytes_max: usize,
    /// Time to send a request's head, and time a kept-alive connection may be idle. Default 75 s.
    pub idle_timeout: Duration,
    /// Time to send a request's body. Default 60 s.
    pub body_timeout: Duration,
    /// Time a client may take no byte of a response before it counts as gone. Default 60 s.
    pub stall_timeout: Duration,
    /// Time that requests in progress have to finish after the shutdown signal. Default 5 s.
    pub shutdown_grace: Duration,
}

impl Default for FrontendConfig {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            request_timeout: Duration::from_secs(600),
            request_timeout_max: Duration::from_secs(3600),
            body_bytes_max: 32 << 20,
            requests_max: 4096,
            connections_max: 16_384,
            tokenize_threads: cores.min(8),
            tokenize_queue_max: 1024,
            tokenize_inline_bytes_max: 1024,
            idle_timeout: Duration::from_secs(75),
            body_timeout: Duration::from_secs(60),
            stall_timeout: Duration::from_secs(60),
            shutdown_grace: Duration::from_secs(5),
        }
    }
}

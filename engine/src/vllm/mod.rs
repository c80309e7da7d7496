//! vLLM as an engine: what its servers say, in our terms.
//!
//! * [`events`]: its KV events, as an event feed.

pub mod events;

//! A real vLLM behind our frontend.
//!
//! `tests/run vllm` installs it; without it these tests are ignored. A server takes half a minute and more
//! to start, so each test asks many things of one deployment.

mod aggregated;
mod scene;

//! OpenAI's schema: reading requests, writing responses.

pub(crate) mod chat;
pub(crate) mod common;
pub(crate) mod completions;
pub(crate) mod params;
pub(crate) mod response;

//! NIXL's Python interface: agents, descriptor lists, requests, and the classes and constants beside
//! them. `python/nixl` puts NIXL's module names around them.

mod agent;
mod backend;
mod core;
mod dlist;
mod error;
mod input;
mod kinds;
mod list;
mod listen;
mod memory;
mod metadata;
mod remote;
mod request;
mod rows;
mod table;
mod utils;
mod xfer;

use pyo3::prelude::*;

/// Adds everything to the submodule `blockplane._core.nixl`.
pub(crate) fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    error::add(module)?;
    kinds::add(module)?;
    dlist::add(module)?;
    module.add_class::<agent::Agent>()?;
    utils::add(module)
}

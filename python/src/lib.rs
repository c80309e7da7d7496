//! `blockplane._core`: the compiled half of the Python packages `blockplane` and `nixl`.
//!
//! Depend on the Python packages, not on this crate. It holds what has to be fast or unsafe (tables
//! of descriptors, addresses, transfers); argument forms, documentation and defaults of the public
//! classes are Python.

mod agent;
mod nixl;
mod tiers;

use pyo3::prelude::*;

/// The compiled half of `blockplane` and `nixl`.
#[pymodule]
mod _core {
    use super::*;

    #[pymodule_export]
    use super::agent::{
        AgentCore, CoreFault, FileCore, PeerCore, RegionCore, TransferCore, WindowCore,
    };
    #[pymodule_export]
    use super::tiers::{Lookups, Names, TierWorker};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        let names = PyModule::new(module.py(), "nixl")?;
        nixl::add(&names)?;
        module.add_submodule(&names)
    }
}

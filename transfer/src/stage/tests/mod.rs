//! Staged operations with host memory in the place of device memory: everything but the copies of the
//! device is what runs with one.

mod files;
#[cfg(feature = "object")]
mod objects;
mod peers;
mod support;

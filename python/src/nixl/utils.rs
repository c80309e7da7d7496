//! `nixl._utils`: raw memory for examples and tests.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::HashMap;
use std::sync::LazyLock;

use parking_lot::Mutex;
use pyo3::exceptions::{PyMemoryError, PyValueError};
use pyo3::prelude::*;

/// Alignment of what is allocated: a line of the cache.
const ALIGN: usize = 64;

/// Lengths of what is allocated, by address.
static ALLOCATED: LazyLock<Mutex<HashMap<usize, Layout>>> = LazyLock::new(Mutex::default);

/// Allocates memory and gives its address.
#[pyfunction]
fn malloc_passthru(size: usize) -> PyResult<usize> {
    let layout = Layout::from_size_align(size.max(1), ALIGN);
    let layout = layout.map_err(|_| PyValueError::new_err(format!("{size} bytes")))?;
    // SAFETY: the layout has at least one byte.
    let memory = unsafe { alloc_zeroed(layout) };
    if memory.is_null() {
        return Err(PyMemoryError::new_err(format!("{size} bytes")));
    }
    let address = memory.expose_provenance();
    ALLOCATED.lock().insert(address, layout);
    Ok(address)
}

/// Frees what [`malloc_passthru`] gave.
#[pyfunction]
fn free_passthru(address: usize) -> PyResult<()> {
    let Some(layout) = ALLOCATED.lock().remove(&address) else {
        return Err(PyValueError::new_err(format!(
            "{address:#x} is not from malloc_passthru, or is free already"
        )));
    };
    // SAFETY: allocated above with that layout, and freed once.
    unsafe { dealloc(std::ptr::with_exposed_provenance_mut(address), layout) };
    Ok(())
}

/// The memory of an allocation of ours that a range lies in.
fn known(address: usize, size: usize) -> PyResult<*mut u8> {
    let allocated = ALLOCATED.lock();
    let inside = allocated.iter().any(|(start, layout)| {
        let offset = address.checked_sub(*start);
        let end = offset.and_then(|offset| offset.checked_add(size));
        end.is_some_and(|end| end <= layout.size())
    });
    if inside {
        Ok(std::ptr::with_exposed_provenance_mut(address))
    } else {
        Err(PyValueError::new_err(format!(
            "{size} bytes at {address:#x} are not from malloc_passthru"
        )))
    }
}

/// Fills memory of [`malloc_passthru`] with the byte 0xBA.
#[pyfunction]
fn ba_buf(address: usize, size: usize) -> PyResult<()> {
    let memory = known(address, size)?;
    // SAFETY: within an allocation of ours, which Python keeps.
    unsafe { memory.write_bytes(0xba, size) };
    Ok(())
}

/// Raises if two ranges of memory of [`malloc_passthru`] differ.
#[pyfunction]
fn verify_transfer(address1: usize, address2: usize, size: usize) -> PyResult<()> {
    let (one, other) = (known(address1, size)?, known(address2, size)?);
    let read = |memory: *mut u8, at: usize| {
        // SAFETY: within an allocation of ours, which Python keeps.
        unsafe { memory.wrapping_add(at).read_volatile() }
    };
    for at in 0..size {
        let (a, b) = (read(one, at), read(other, at));
        if a != b {
            return Err(PyValueError::new_err(format!(
                "byte {at} is {a:#x} here and {b:#x} there"
            )));
        }
    }
    Ok(())
}

pub(super) fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(malloc_passthru, module)?)?;
    module.add_function(wrap_pyfunction!(free_passthru, module)?)?;
    module.add_function(wrap_pyfunction!(ba_buf, module)?)?;
    module.add_function(wrap_pyfunction!(verify_transfer, module)?)
}

//! Buffers of activations and parameters.

use std::io;

use super::memory::Zeroed;

/// Single-precision rows are padded to whole panels of every instruction set.
const COLUMNS_MULTIPLE: usize = 64;
/// Bytes of a cache line of every processor here.
pub(super) const CACHE_LINE_BYTES: usize = 64;

/// Single-precision parameters, padded with zeros.
#[derive(Debug)]
pub struct Vector(pub(super) Zeroed<f32>);

/// Rows of single-precision numbers, padded with zeros.
#[derive(Debug)]
pub struct Matrix {
    pub(super) data: Zeroed<f32>,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) stride: usize,
}

/// Rows as matrix products read them.
#[derive(Debug)]
pub struct Input {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) stride: usize,
    pub(super) data: InputData,
}

#[derive(Debug)]
pub(super) enum InputData {
    Wide(Zeroed<f32>),
    Narrow {
        data: Zeroed<u16>,
        /// Inverse of each row's scale; 1 unless the format is half precision.
        scales: Zeroed<f32>,
    },
}

/// A pointer that several threads write through, each to its own part.
#[derive(Clone, Copy)]
pub(super) struct Shared<T>(*mut T);

// SAFETY: only `slice` gives access, and its callers keep the parts apart.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(super) const fn new(pointer: *mut T) -> Self {
        Self(pointer)
    }

    /// # Safety
    /// `at + len` elements are there, and nobody else uses these `len` while the slice lives.
    #[expect(clippy::mut_from_ref, reason = "the callers keep the parts apart")]
    pub(super) unsafe fn slice(&self, at: usize, len: usize) -> &mut [T] {
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts_mut(self.at(at), len) }
    }

    /// A pointer to one element, to be used under the conditions of `slice`.
    pub(super) fn at(&self, at: usize) -> *mut T {
        self.0.wrapping_add(at)
    }
}

impl Vector {
    pub(super) fn new(values: &[f32]) -> io::Result<Self> {
        let mut vector = Zeroed::new(values.len().next_multiple_of(COLUMNS_MULTIPLE))?;
        vector.as_mut_slice()[..values.len()].copy_from_slice(values);
        Ok(Self(vector))
    }
}

impl Matrix {
    pub(super) fn new(rows: usize, columns: usize) -> io::Result<Self> {
        // Whole panels, and an odd number of cache lines: rows then fall into different sets.
        let line = CACHE_LINE_BYTES / size_of::<f32>();
        let stride = columns.next_multiple_of(COLUMNS_MULTIPLE) + line;
        Ok(Self {
            data: Zeroed::new(rows * stride)?,
            rows,
            columns,
            stride,
        })
    }

    /// The columns of one row.
    pub(super) fn row(&self, row: usize) -> &[f32] {
        &self.data.as_slice()[row * self.stride..][..self.columns]
    }
}

impl Input {
    pub(super) fn new(rows: usize, columns: usize, narrow: bool) -> io::Result<Self> {
        // An odd number of cache lines: the rows of a tile then fall into different sets.
        let element = if narrow { 2 } else { 4 };
        let line = CACHE_LINE_BYTES / element;
        let stride = (columns.div_ceil(line) | 1) * line;
        let data = if narrow {
            InputData::Narrow {
                data: Zeroed::new(rows * stride)?,
                scales: Zeroed::new(rows)?,
            }
        } else {
            InputData::Wide(Zeroed::new(rows * stride)?)
        };
        Ok(Self {
            rows,
            columns,
            stride,
            data,
        })
    }
}

//! Zeroed memory for weights and activations, on huge pages where they are to be had.

use std::fmt;
use std::io;
use std::marker::PhantomData;

use memmap2::MmapMut;

/// Size of a huge page, and the smallest allocation that is worth one.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Types for which zero bytes, and any other bytes, are a value.
///
/// # Safety
/// Every bit pattern must be valid, and the type must have no padding and no pointers.
pub(super) unsafe trait Plain: Copy + Send + Sync + 'static {}
// SAFETY: integers have neither invalid bit patterns nor padding.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: every bit pattern is a float, if only NaN.
unsafe impl Plain for f32 {}

/// A zeroed array with its own mapping, aligned to at least a page.
pub(super) struct Zeroed<T> {
    map: MmapMut,
    offset: usize,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Plain> Zeroed<T> {
    /// `len` zeros.
    pub(super) fn new(len: usize) -> io::Result<Self> {
        let bytes = len
            .checked_mul(size_of::<T>())
            .filter(|&bytes| bytes <= isize::MAX as usize - HUGE_PAGE_BYTES)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let huge = bytes >= HUGE_PAGE_BYTES;
        let slack = if huge { HUGE_PAGE_BYTES } else { 0 };
        let map = MmapMut::map_anon((bytes + slack).max(1))?;
        let offset = if huge {
            map.as_ptr().align_offset(HUGE_PAGE_BYTES)
        } else {
            0
        };
        if huge {
            #[cfg(target_os = "linux")]
            if let Err(error) = map.advise(memmap2::Advice::HugePage) {
                // Slower address translation, nothing else.
                tracing::debug!(%error, bytes, "no huge pages");
            }
        }
        Ok(Self {
            map,
            offset,
            len,
            element: PhantomData,
        })
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }

    pub(super) fn as_ptr(&self) -> *const T {
        // `offset` keeps the page alignment of the mapping.
        self.map[self.offset..].as_ptr().cast()
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut T {
        self.map[self.offset..].as_mut_ptr().cast()
    }

    pub(super) fn as_slice(&self) -> &[T] {
        // SAFETY: the mapping holds `len` elements from `offset` on, aligned to a page, and every
        // bit pattern is a `T`.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len) }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr(), self.len) }
    }
}

impl<T> fmt::Debug for Zeroed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Zeroed({} elements)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_zero_and_aligned() {
        for len in [0, 1, 1000, HUGE_PAGE_BYTES / 4, HUGE_PAGE_BYTES] {
            let mut memory = Zeroed::<f32>::new(len).unwrap();
            assert_eq!(memory.as_ptr().align_offset(64), 0);
            assert_eq!(memory.len(), len);
            assert!(memory.as_slice().iter().all(|&x| x == 0.0));
            if let Some(last) = memory.as_mut_slice().last_mut() {
                *last = 1.0;
            }
        }
        assert!(Zeroed::<f32>::new(usize::MAX).is_err());
    }
}

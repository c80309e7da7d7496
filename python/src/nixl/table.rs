//! Registered address ranges: which one a descriptor lies in.

use super::kinds::Memory;

/// A registered range, of memory addresses, bytes of a file, or bytes of an object.
#[derive(Clone, Debug)]
pub(super) struct Section<T> {
    pub(super) memory: Memory,
    pub(super) device: u64,
    pub(super) start: u64,
    pub(super) bytes: u64,
    /// What it is in the layer below.
    pub(super) target: T,
}

impl<T> Section<T> {
    const fn end(&self) -> u64 {
        self.start.saturating_add(self.bytes)
    }

    const fn order(&self) -> (u8, u64, u64) {
        (self.memory.code(), self.device, self.start)
    }

    /// Whether a range lies in it.
    pub(super) fn holds(&self, memory: Memory, device: u64, start: u64, bytes: u64) -> bool {
        self.memory == memory
            && self.device == device
            && start >= self.start
            && start
                .checked_add(bytes)
                .is_some_and(|end| end <= self.end())
    }
}

/// Sections by address. Ranges may overlap and may be there twice.
#[derive(Clone, Debug)]
pub(super) struct Table<T> {
    sections: Vec<Section<T>>,
    /// Furthest end of a section of the same memory and device up to each one.
    reach: Vec<u64>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self {
            sections: Vec::new(),
            reach: Vec::new(),
        }
    }
}

impl<T> Table<T> {
    pub(super) fn new(mut sections: Vec<Section<T>>) -> Self {
        sections.sort_by_key(Section::order);
        let mut reach = Vec::with_capacity(sections.len());
        let mut before: Option<(&Section<T>, u64)> = None;
        for section in &sections {
            let end = match before {
                Some((last, end))
                    if (last.memory, last.device) == (section.memory, section.device) =>
                {
                    end.max(section.end())
                }
                _ => section.end(),
            };
            reach.push(end);
            before = Some((section, end));
        }
        Self { sections, reach }
    }

    pub(super) fn sections(&self) -> &[Section<T>] {
        &self.sections
    }

    /// The number of a section that holds the whole range.
    pub(super) fn find(
        &self,
        memory: Memory,
        device: u64,
        start: u64,
        bytes: u64,
    ) -> Option<usize> {
        let end = start.checked_add(bytes)?;
        let key = (memory.code(), device, start);
        let behind = self
            .sections
            .partition_point(|section| section.order() <= key);
        for at in (0..behind).rev() {
            let section = &self.sections[at];
            if (section.memory, section.device) != (memory, device) || self.reach[at] < end {
                return None;
            }
            if section.end() >= end {
                return Some(at);
            }
        }
        None
    }
}

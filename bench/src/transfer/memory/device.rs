//! Patterned blocks in device memory.
//!
//! A copy to or from the device costs microseconds whatever its length, so that blocks travel in
//! groups, together with what lies between them.

use anyhow::Context;
use blockplane_transfer::Registration;

use super::{pattern, run_bytes};
use crate::transfer::case::Side;

/// Bytes of a group, unless one run is longer.
const GROUP_BYTES: u64 = 64 << 20;

/// Runs that lie close together.
struct Group {
    start: u64,
    bytes: usize,
    /// Number and offset of each run, by offset.
    runs: Vec<(usize, u64)>,
}

impl Group {
    fn covers_all(&self, run_bytes: usize) -> bool {
        self.runs.len() * run_bytes == self.bytes
    }

    /// Where a run lies in the group.
    fn at(&self, offset: u64) -> usize {
        usize::try_from(offset - self.start).unwrap_or(usize::MAX)
    }
}

pub(super) fn fill(memory: &Registration, side: &Side, seed: u64) -> anyhow::Result<()> {
    let bytes = run_bytes(side);
    let mut image = Vec::new();
    for group in groups(side) {
        image.resize(group.bytes, 0);
        if !group.covers_all(bytes) {
            read(memory, &group, &mut image)?;
        }
        for &(i, offset) in &group.runs {
            let at = group.at(offset);
            pattern(&mut image[at..at + bytes], seed, i);
        }
        write(memory, &group, &image)?;
    }
    Ok(())
}

pub(super) fn clear(memory: &Registration, side: &Side) -> anyhow::Result<()> {
    let bytes = run_bytes(side);
    let mut image = Vec::new();
    for group in groups(side) {
        image.resize(group.bytes, 0);
        if !group.covers_all(bytes) {
            read(memory, &group, &mut image)?;
        }
        for &(_, offset) in &group.runs {
            let at = group.at(offset);
            image[at..at + bytes].fill(0);
        }
        write(memory, &group, &image)?;
    }
    Ok(())
}

/// Calls `differs(number of the run, its bytes)` for every run and counts those that do.
pub(super) fn count(
    memory: &Registration,
    side: &Side,
    mut differs: impl FnMut(usize, &[u8]) -> bool,
) -> anyhow::Result<usize> {
    let bytes = run_bytes(side);
    let mut image = Vec::new();
    let mut wrong = 0;
    for group in groups(side) {
        image.resize(group.bytes, 0);
        read(memory, &group, &mut image)?;
        for &(i, offset) in &group.runs {
            let at = group.at(offset);
            wrong += usize::from(differs(i, &image[at..at + bytes]));
        }
    }
    Ok(wrong)
}

fn read(memory: &Registration, group: &Group, image: &mut [u8]) -> anyhow::Result<()> {
    memory
        .read_at(group.start, image)
        .with_context(|| format!("cannot read {} bytes at {}", group.bytes, group.start))
}

fn write(memory: &Registration, group: &Group, image: &[u8]) -> anyhow::Result<()> {
    memory
        .write_at(group.start, image)
        .with_context(|| format!("cannot write {} bytes at {}", group.bytes, group.start))
}

fn groups(side: &Side) -> Vec<Group> {
    let length = side.shape.run_bytes;
    let mut runs: Vec<(usize, u64)> = side.runs().enumerate().collect();
    runs.sort_unstable_by_key(|&(_, offset)| offset);
    let mut groups: Vec<Group> = Vec::new();
    for (i, offset) in runs {
        let end = offset + length;
        match groups.last_mut() {
            Some(group) if end - group.start <= GROUP_BYTES => {
                group.bytes = group.at(end);
                group.runs.push((i, offset));
            }
            _ => groups.push(Group {
                start: offset,
                bytes: run_bytes(side),
                runs: vec![(i, offset)],
            }),
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use blockplane_transfer::{Agent, AgentConfig, ArenaConfig};

    use super::*;
    use crate::transfer::case::Shape;

    /// Host memory is read and written in the same way.
    #[test]
    fn groups_carry_every_run_and_leave_the_rest_alone() {
        let agent = Agent::new(AgentConfig::new("groups")).unwrap();
        let memory = agent.allocate(ArenaConfig::new(1 << 20, "groups")).unwrap();
        let side = |ids: &[u32]| Side {
            shape: Shape::plain(4096, 1 << 20),
            ids: ids.into(),
            range: false,
        };
        let (some, between) = (side(&[200, 3, 5, 90]), side(&[4, 100]));
        fill(&memory, &between, 2).unwrap();
        fill(&memory, &some, 1).unwrap();
        let wrong =
            |side: &Side, seed| super::super::mismatches(&memory, side, seed, None).unwrap();
        assert_eq!((wrong(&some, 1), wrong(&between, 2)), (0, 0));
        assert_eq!(count(&memory, &some, |_, found| found[0] == 0).unwrap(), 0);
        clear(&memory, &side(&[3, 90])).unwrap();
        assert_eq!((wrong(&some, 1), wrong(&between, 2)), (2, 0));
    }

    #[test]
    fn long_distances_part_groups() {
        let side = Side {
            shape: Shape {
                blocks: 2,
                block_stride: 1 << 30,
                layers: 2,
                layer_stride: 4096,
                run_bytes: 4096,
            },
            ids: [1, 0].as_slice().into(),
            range: false,
        };
        let groups = groups(&side);
        let shown: Vec<_> = groups
            .iter()
            .map(|group| (group.start, group.bytes, group.runs.len()))
            .collect();
        assert_eq!(shown, [(0, 8192, 2), (1 << 30, 8192, 2)]);
        assert!(groups.iter().all(|group| group.covers_all(4096)));
    }
}

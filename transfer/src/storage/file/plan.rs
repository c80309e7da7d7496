//! Cutting an operation into requests: pure arithmetic, no I/O.
//!
//! Pieces that are neighbours in the file become one request with several pieces of memory, long ones
//! are cut. Requests keep the order of the operation: devices gain nothing from the order of the file,
//! and some spread work over their parts better without it. Around the page cache go only whole
//! pages whose memory and offsets are aligned; what is left over goes through it. The kernel keeps
//! both views of a file coherent page by page, so a page is never in requests of both kinds.

use crate::plan::{Order, for_each_segment};

use super::super::config::DirectUse;
use crate::op::SetPair;

/// Most requests, and most pieces of memory, of one operation.
pub(crate) const REQUESTS_MAX: usize = 1 << 22;

/// Most pieces of memory in one request (what one bio of the kernel takes).
const SEGMENTS_PER_REQUEST: u32 = 256;

/// Pages of the page cache; a multiple of them is one as well.
const PAGE: u64 = 4096;

/// How requests are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rules {
    /// Alignment of direct requests; `None` when everything goes through the page cache.
    pub(crate) direct: Option<Alignment>,
    /// Longest request.
    pub(crate) request_bytes: u64,
}

/// Alignment that a direct request needs, both powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alignment {
    memory: u64,
    /// Of file offsets and lengths: whole pages, and whole units of the device.
    offset: u64,
}

impl Rules {
    pub(crate) fn new(direct: &DirectUse, request_bytes: u64) -> Self {
        let direct = match *direct {
            DirectUse::Direct {
                memory_align,
                offset_align,
            } => Some(Alignment {
                memory: u64::from(memory_align),
                offset: u64::from(offset_align).max(PAGE),
            }),
            DirectUse::Buffered(_) => None,
        };
        let unit = direct.map_or(1, |align| align.offset);
        Self {
            direct,
            request_bytes: request_bytes.next_multiple_of(unit),
        }
    }
}

/// Which descriptor a request uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Via {
    /// Around the page cache.
    Direct,
    /// Through it.
    Buffered,
}

/// One request: a contiguous range of the file and the memory it moves from or to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// First byte in the file.
    pub(crate) offset: u64,
    /// Length.
    pub(crate) bytes: u32,
    /// First of its pieces of memory.
    first: u32,
    /// Number of them.
    count: u32,
    pub(crate) via: Via,
    /// Place of its first piece in the operation.
    order: u32,
}

/// A contiguous piece of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// The set whose local region it lies in.
    pub(crate) set: u32,
    /// First byte in that region.
    pub(crate) offset: u64,
    /// Length.
    pub(crate) bytes: u32,
}

/// All requests of an operation.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Requests {
    requests: Vec<Request>,
    segments: Vec<Segment>,
}

/// What an operation comes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Summary {
    pub(crate) direct: usize,
    pub(crate) buffered: usize,
    pub(crate) buffered_bytes: u64,
    /// Requests with several pieces of memory.
    pub(crate) vectored: usize,
}

/// The operation would have more requests than the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooMany;

impl Requests {
    pub(crate) fn new(sets: &[SetPair], rules: &Rules) -> Result<Self, TooMany> {
        let mut pieces = Vec::new();
        for (index, set) in sets.iter().enumerate() {
            let index = u32::try_from(index).map_err(|_| TooMany)?;
            let base = set.local_region.base() as u64;
            collect(set, index, base, set.order, &mut pieces)?;
        }
        Self::build(pieces, rules)
    }

    fn build(mut pieces: Vec<Piece>, rules: &Rules) -> Result<Self, TooMany> {
        let sorted = pieces.is_sorted_by_key(|piece| piece.file);
        if !sorted {
            pieces.sort_unstable_by_key(|piece| piece.file);
        }
        let mut out = Self::default();
        for piece in pieces {
            out.add(piece, rules)?;
        }
        if !sorted {
            out.requests
                .sort_unstable_by_key(|request| (request.order, request.offset));
        }
        Ok(out)
    }

    pub(crate) fn len(&self) -> usize {
        self.requests.len()
    }

    pub(crate) fn get(&self, index: u32) -> Option<&Request> {
        self.requests.get(index as usize)
    }

    /// The memory of a request, in the order of the file.
    pub(crate) fn segments(&self, request: &Request) -> &[Segment] {
        let first = request.first as usize;
        self.segments
            .get(first..first + request.count as usize)
            .unwrap_or_default()
    }

    pub(crate) fn summary(&self) -> Summary {
        let mut summary = Summary::default();
        for request in &self.requests {
            match request.via {
                Via::Direct => summary.direct += 1,
                Via::Buffered => {
                    summary.buffered += 1;
                    summary.buffered_bytes += u64::from(request.bytes);
                }
            }
            summary.vectored += usize::from(request.count > 1);
        }
        summary
    }

    /// Adds a piece that lies behind all pieces added so far: its aligned middle and the rest.
    fn add(&mut self, piece: Piece, rules: &Rules) -> Result<(), TooMany> {
        let Some(align) = rules.direct else {
            return self.add_as(piece, Via::Buffered, rules);
        };
        let end = piece.file + piece.bytes;
        let start = piece.file.next_multiple_of(align.offset);
        let stop = end - end % align.offset;
        let aligned_memory = (piece.address + (start - piece.file)).is_multiple_of(align.memory);
        if start >= stop || !aligned_memory {
            return self.add_as(piece, Via::Buffered, rules);
        }
        let (head, rest) = piece.split(start - piece.file);
        let (middle, tail) = rest.split(stop - start);
        for (part, via) in [
            (head, Via::Buffered),
            (middle, Via::Direct),
            (tail, Via::Buffered),
        ] {
            if part.bytes > 0 {
                self.add_as(part, via, rules)?;
            }
        }
        Ok(())
    }

    fn add_as(&mut self, mut piece: Piece, via: Via, rules: &Rules) -> Result<(), TooMany> {
        while piece.bytes > 0 {
            let room = match self.requests.last() {
                Some(last)
                    if last.via == via
                        && last.offset + u64::from(last.bytes) == piece.file
                        && last.count < SEGMENTS_PER_REQUEST =>
                {
                    rules.request_bytes - u64::from(last.bytes)
                }
                _ => 0,
            };
            let (now, rest) = if room > 0 {
                piece.split(room.min(piece.bytes))
            } else {
                piece.split(rules.request_bytes.min(piece.bytes))
            };
            // At most `request_bytes`, which is at most 64 MiB and a unit of alignment.
            let bytes = u32::try_from(now.bytes).map_err(|_| TooMany)?;
            if room == 0 {
                self.requests.push(Request {
                    offset: now.file,
                    bytes: 0,
                    first: u32::try_from(self.segments.len()).map_err(|_| TooMany)?,
                    count: 0,
                    via,
                    order: now.order,
                });
            }
            if self.requests.len() > REQUESTS_MAX || self.segments.len() > REQUESTS_MAX {
                return Err(TooMany);
            }
            let Some(request) = self.requests.last_mut() else {
                return Err(TooMany);
            };
            request.bytes += bytes;
            request.order = request.order.min(now.order);
            match self.segments.last_mut() {
                Some(last)
                    if request.count > 0
                        && last.set == now.set
                        && last.offset + u64::from(last.bytes) == now.local =>
                {
                    last.bytes += bytes;
                }
                _ => {
                    request.count += 1;
                    self.segments.push(Segment {
                        set: now.set,
                        offset: now.local,
                        bytes,
                    });
                }
            }
            piece = rest;
        }
        Ok(())
    }
}

/// A piece that is contiguous in the file and in memory.
#[derive(Clone, Copy, Debug)]
struct Piece {
    file: u64,
    set: u32,
    /// Offset in the local region.
    local: u64,
    /// Its address.
    address: u64,
    bytes: u64,
    /// Place in the operation.
    order: u32,
}

impl Piece {
    const fn split(self, at: u64) -> (Self, Self) {
        (
            Self { bytes: at, ..self },
            Self {
                file: self.file + at,
                local: self.local + at,
                address: self.address.wrapping_add(at),
                bytes: self.bytes - at,
                ..self
            },
        )
    }
}

fn collect(
    set: &SetPair,
    index: u32,
    base: u64,
    order: Order,
    pieces: &mut Vec<Piece>,
) -> Result<(), TooMany> {
    let mut too_many = false;
    for_each_segment(
        &set.local,
        &set.remote,
        order,
        0..set.local.bytes(),
        |local, file, bytes| {
            let order = u32::try_from(pieces.len()).unwrap_or(u32::MAX);
            if pieces.len() < REQUESTS_MAX {
                pieces.push(Piece {
                    file,
                    set: index,
                    local,
                    address: base.wrapping_add(local),
                    bytes,
                    order,
                });
            } else {
                too_many = true;
            }
        },
    );
    if too_many { Err(TooMany) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn piece(file: u64, address: u64, bytes: u64) -> Piece {
        Piece {
            file,
            set: 0,
            local: address,
            address,
            bytes,
            order: 0,
        }
    }

    const DIRECT: DirectUse = DirectUse::Direct {
        memory_align: 512,
        offset_align: 512,
    };

    fn build(pieces: &[Piece], rules: &Rules) -> Vec<(u64, u32, Via, usize)> {
        let numbered = pieces.iter().zip(0..);
        let pieces = numbered.map(|(piece, order)| Piece { order, ..*piece });
        let requests = Requests::build(pieces.collect(), rules).unwrap();
        requests
            .requests
            .iter()
            .map(|r| (r.offset, r.bytes, r.via, requests.segments(r).len()))
            .collect()
    }

    #[test]
    fn neighbours_in_the_file_become_one_request() {
        let rules = Rules::new(&DIRECT, 1 << 20);
        let scattered = [
            piece(8192, 0, 4096),
            piece(0, 65536, 4096),
            piece(4096, 131_072, 4096),
            piece(20480, 8192, 4096),
        ];
        assert_eq!(
            build(&scattered, &rules),
            [(0, 12288, Via::Direct, 3), (20480, 4096, Via::Direct, 1)]
        );
    }

    #[test]
    fn requests_keep_the_order_of_the_operation() {
        let rules = Rules::new(&DIRECT, 1 << 20);
        let pieces = [
            piece(40960, 0, 4096),
            piece(8192, 65536, 4096),
            piece(45056, 131_072, 4096),
            piece(0, 8192, 4096),
        ];
        assert_eq!(
            build(&pieces, &rules),
            [
                (40960, 8192, Via::Direct, 2),
                (8192, 4096, Via::Direct, 1),
                (0, 4096, Via::Direct, 1)
            ]
        );
    }

    #[test]
    fn long_runs_are_cut() {
        let rules = Rules::new(&DIRECT, 65536);
        let cut = build(&[piece(4096, 0, 150_000)], &rules);
        assert_eq!(
            cut,
            [
                (4096, 65536, Via::Direct, 1),
                (69632, 65536, Via::Direct, 1),
                (135_168, 16384, Via::Direct, 1),
                (151_552, 2544, Via::Buffered, 1),
            ]
        );
    }

    #[test]
    fn what_is_not_aligned_goes_through_the_page_cache() {
        let rules = Rules::new(&DIRECT, 1 << 20);
        // Head and tail of the file range.
        assert_eq!(
            build(&[piece(1000, 1000, 20000)], &rules),
            [
                (1000, 3096, Via::Buffered, 1),
                (4096, 16384, Via::Direct, 1),
                (20480, 520, Via::Buffered, 1),
            ]
        );
        // Memory that no shift aligns.
        assert_eq!(
            build(&[piece(4096, 100, 8192)], &rules),
            [(4096, 8192, Via::Buffered, 1)]
        );
        // Smaller than a page, though aligned for the device.
        assert_eq!(
            build(&[piece(512, 512, 512)], &rules),
            [(512, 512, Via::Buffered, 1)]
        );
    }

    proptest! {
        /// Every byte is in one request, no page is in requests of both kinds, and direct requests
        /// are aligned.
        #[test]
        fn each_byte_once_and_no_page_both_ways(
            gaps in proptest::collection::vec((0u64..3 * 4096, 1u64..40_000, 0u64..5000), 1..20),
            direct: bool,
            request_pages in 1u64..9,
        ) {
            let (mut file, mut memory) = (0, 0);
            let mut pieces = Vec::new();
            for (gap, bytes, skip) in gaps {
                // Half of them touch the piece before.
                file += gap.saturating_sub(4096);
                memory += if skip < 2500 { 0 } else { skip };
                pieces.push(piece(file, memory, bytes));
                file += bytes;
                memory += bytes;
            }
            let use_of = if direct { DIRECT } else { DirectUse::Buffered(String::new()) };
            let rules = Rules::new(&use_of, request_pages * 4096);
            let mut shuffled = pieces.clone();
            shuffled.reverse();
            let requests = Requests::build(shuffled, &rules).unwrap();

            let mut expected: Vec<(u64, u64)> = pieces
                .iter()
                .flat_map(|p| (0..p.bytes).map(|i| (p.file + i, p.local + i)))
                .collect();
            expected.sort_unstable();
            let mut got = Vec::new();
            let mut pages = std::collections::HashMap::new();
            for request in &requests.requests {
                prop_assert!(u64::from(request.bytes) <= rules.request_bytes);
                let mut at = request.offset;
                for segment in requests.segments(request) {
                    let bytes = u64::from(segment.bytes);
                    if request.via == Via::Direct {
                        prop_assert!(at.is_multiple_of(4096) && bytes.is_multiple_of(4096));
                        prop_assert!(segment.offset.is_multiple_of(512));
                    }
                    got.extend((0..bytes).map(|i| (at + i, segment.offset + i)));
                    at += bytes;
                }
                prop_assert_eq!(at, request.offset + u64::from(request.bytes));
                for page in request.offset / 4096..=(at - 1) / 4096 {
                    let via = pages.entry(page).or_insert(request.via);
                    prop_assert_eq!(*via, request.via);
                }
            }
            got.sort_unstable();
            prop_assert_eq!(got, expected);
        }
    }
}

//! Frames: a fixed header and a body. The wire document describes them byte by byte.

use std::ops::Range;

use crate::config::RemoteAccess;
use crate::cuda::ShareHandle;
use crate::error::{Rejection, TransferError};
use crate::memory::RegionId;
use crate::peer::{Reader, Short, Writer, access_code, access_from};
use crate::plan::{Axis, BlockIds, BlockLayout, BlockSet, IDS_MAX, INNER_MAX, Order, joins_in};
use crate::window::{GrantSpec, Scope, WindowAccess, WindowId};

pub(crate) const HEADER_BYTES: usize = 24;
/// Largest body of any frame but DATA.
pub(crate) const BODY_BYTES_MAX: usize = (IDS_MAX * 4) + 256;

/// What a frame says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    // Every connection, first.
    Hello = 1,
    Welcome = 2,
    Refuse = 3,
    // Connections that only ask, first and only.
    AskMetadata = 4,
    Metadata = 5,
    // Control connection, both directions.
    Ping = 16,
    // Control connection, from the initiator.
    AskRegion = 32,
    AskWindow = 33,
    WindowQuiet = 34,
    Notify = 35,
    Rang = 36,
    RegionQuiet = 37,
    Bye = 38,
    OfferQueuePair = 39,
    // Control connection, from the target.
    Region = 48,
    Window = 49,
    WindowClose = 50,
    RegionGone = 51,
    Notified = 52,
    StripeDone = 53,
    Ring = 54,
    Bell = 55,
    QueuePair = 56,
    // Data connection, from the initiator.
    Write = 64,
    WriteAbort = 65,
    Read = 66,
    ReadCancel = 67,
    // Data connection, both directions.
    Data = 80,
    // Data connection, from the target.
    ReadDone = 81,
}

impl Kind {
    const fn from(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::Hello,
            2 => Self::Welcome,
            3 => Self::Refuse,
            4 => Self::AskMetadata,
            5 => Self::Metadata,
            16 => Self::Ping,
            32 => Self::AskRegion,
            33 => Self::AskWindow,
            34 => Self::WindowQuiet,
            35 => Self::Notify,
            36 => Self::Rang,
            37 => Self::RegionQuiet,
            38 => Self::Bye,
            39 => Self::OfferQueuePair,
            48 => Self::Region,
            49 => Self::Window,
            50 => Self::WindowClose,
            51 => Self::RegionGone,
            52 => Self::Notified,
            53 => Self::StripeDone,
            54 => Self::Ring,
            55 => Self::Bell,
            56 => Self::QueuePair,
            64 => Self::Write,
            65 => Self::WriteAbort,
            66 => Self::Read,
            67 => Self::ReadCancel,
            80 => Self::Data,
            81 => Self::ReadDone,
            _ => return None,
        })
    }
}

/// Header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    /// A [`Code`] in answers, flags elsewhere.
    pub(crate) code: u8,
    /// Bytes that follow.
    pub(crate) len: u32,
    /// Operation, region or window.
    pub(crate) id: u64,
    /// Stripe of the operation, or number of the question.
    pub(crate) part: u32,
}

impl Header {
    pub(crate) const fn new(kind: Kind, id: u64, part: u32) -> Self {
        Self {
            kind,
            code: 0,
            len: 0,
            id,
            part,
        }
    }

    pub(crate) const fn code(mut self, code: Code) -> Self {
        self.code = code as u8;
        self
    }

    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[0] = self.kind as u8;
        out[1] = self.code;
        out[4..8].copy_from_slice(&self.len.to_le_bytes());
        out[8..16].copy_from_slice(&self.id.to_le_bytes());
        out[16..20].copy_from_slice(&self.part.to_le_bytes());
        out
    }

    /// `None` for a kind that does not exist.
    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        let mut field = || -> Result<Option<Self>, Short> {
            let kind = Kind::from(reader.u8()?);
            let code = reader.u8()?;
            reader.u16()?;
            let (len, id, part) = (reader.u32()?, reader.u64()?, reader.u32()?);
            Ok(kind.map(|kind| Self {
                kind,
                code,
                len,
                id,
                part,
            }))
        };
        field().ok().flatten()
    }

    /// The frame with a body.
    pub(crate) fn with_body(mut self, body: &[u8]) -> Vec<u8> {
        self.len = u32::try_from(body.len()).unwrap_or(u32::MAX);
        let mut out = Vec::with_capacity(HEADER_BYTES + body.len());
        out.extend_from_slice(&self.encode());
        out.extend_from_slice(body);
        out
    }
}

/// Answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Code {
    Ok = 0,
    QueueFull = 1,
    TooLarge = 2,
    UnknownRegion = 3,
    AccessDenied = 4,
    OutOfBounds = 5,
    Busy = 6,
    Stopping = 7,
    WindowClosed = 8,
    Aborted = 9,
    Stale = 10,
    Unsupported = 11,
    TlsRequired = 12,
    NoTls = 13,
}

impl Code {
    pub(crate) const fn from(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::Ok,
            1 => Self::QueueFull,
            2 => Self::TooLarge,
            3 => Self::UnknownRegion,
            4 => Self::AccessDenied,
            5 => Self::OutOfBounds,
            6 => Self::Busy,
            7 => Self::Stopping,
            8 => Self::WindowClosed,
            9 => Self::Aborted,
            10 => Self::Stale,
            11 => Self::Unsupported,
            12 => Self::TlsRequired,
            13 => Self::NoTls,
            _ => return None,
        })
    }

    /// The outcome of an operation that was answered like this.
    pub(crate) fn outcome(self, window: Option<WindowId>) -> Result<(), TransferError> {
        let rejection = match self {
            Self::Ok => return Ok(()),
            Self::Aborted => return Err(TransferError::Cancelled),
            Self::WindowClosed => {
                let window = window.unwrap_or(WindowId(0));
                return Err(TransferError::WindowClosed { window });
            }
            Self::QueueFull => Rejection::NotificationQueueFull,
            Self::TooLarge => Rejection::NotificationTooLarge,
            Self::UnknownRegion => Rejection::UnknownRegion,
            Self::AccessDenied
            | Self::Stale
            | Self::Unsupported
            | Self::TlsRequired
            | Self::NoTls => Rejection::AccessDenied,
            Self::OutOfBounds => Rejection::OutOfBounds,
            Self::Busy => Rejection::Busy,
            Self::Stopping => Rejection::Stopping,
        };
        Err(TransferError::Rejected(rejection))
    }
}

/// Body of WRITE and READ: a stretch of one block set of the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StripeSpec {
    pub(crate) region: RegionId,
    pub(crate) window: Option<WindowId>,
    pub(crate) order: Order,
    pub(crate) set: BlockSet,
    pub(crate) range: Range<u64>,
}

impl StripeSpec {
    pub(crate) fn encode(
        region: RegionId,
        window: Option<WindowId>,
        order: Order,
        set: &BlockSet,
        range: &Range<u64>,
    ) -> Vec<u8> {
        let mut out = Writer {
            bytes: Vec::with_capacity(100 + set.ids.len() * 4),
        };
        out.u64(region.0);
        out.u64(window.map_or(0, |window| window.0));
        out.u8(u8::from(window.is_some()));
        out.u8(match order {
            Order::BlockMajor => 0,
            Order::LayerMajor => 1,
        });
        encode_layout(&mut out, &set.layout);
        out.u32(set.layers.start);
        out.u32(set.layers.end);
        out.u64(range.start);
        out.u64(range.end);
        out.u8(u8::try_from(set.inner.len()).unwrap_or(u8::MAX));
        for axis in &set.inner {
            out.u32(axis.count);
            out.u64(axis.stride);
        }
        encode_ids(&mut out, &set.ids);
        out.bytes
    }

    /// Reads and bounds a body; that it fits the region is for the caller to check.
    pub(crate) fn decode(body: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(body);
        Self::read(&mut reader)
            .ok()
            .flatten()
            .filter(|_| reader.remaining() == 0)
    }

    fn read(reader: &mut Reader<'_>) -> Result<Option<Self>, Short> {
        let region = RegionId(reader.u64()?);
        let window = WindowId(reader.u64()?);
        let window = match reader.u8()? {
            0 => None,
            1 => Some(window),
            _ => return Ok(None),
        };
        let order = match reader.u8()? {
            0 => Order::BlockMajor,
            1 => Order::LayerMajor,
            _ => return Ok(None),
        };
        let layout = decode_layout(reader)?;
        let layers = reader.u32()?..reader.u32()?;
        let range = reader.u64()?..reader.u64()?;
        let count = usize::from(reader.u8()?);
        if count > INNER_MAX {
            return Ok(None);
        }
        let mut inner = Vec::with_capacity(count);
        for _ in 0..count {
            let (count, stride) = (reader.u32()?, reader.u64()?);
            inner.push(Axis { count, stride });
        }
        let Some(ids) = decode_ids(reader)? else {
            return Ok(None);
        };
        let set = BlockSet {
            inner,
            ..BlockSet::new(layout, ids, layers)
        };
        Ok(Some(Self {
            region,
            window,
            order,
            set,
            range,
        }))
    }
}

fn encode_layout(out: &mut Writer, layout: &BlockLayout) {
    out.u64(layout.offset);
    out.u32(layout.blocks);
    out.u64(layout.block_stride);
    out.u32(layout.layers);
    out.u64(layout.layer_stride);
    out.u64(layout.run_bytes);
}

fn decode_layout(reader: &mut Reader<'_>) -> Result<BlockLayout, Short> {
    Ok(BlockLayout {
        offset: reader.u64()?,
        blocks: reader.u32()?,
        block_stride: reader.u64()?,
        layers: reader.u32()?,
        layer_stride: reader.u64()?,
        run_bytes: reader.u64()?,
    })
}

/// Ids as they are, or as (first, count) pairs where that is shorter.
fn encode_ids(out: &mut Writer, ids: &BlockIds) {
    let Some(list) = ids.list() else {
        let (first, count) = ids.as_span().unwrap_or_default();
        let spans = u32::from(count > 0);
        out.u8(1);
        out.u32(spans);
        if count > 0 {
            out.u32(first);
            out.u32(count);
        }
        return;
    };
    let spans = list.len() as u64 - joins_in(list, 1);
    if spans * 2 < list.len() as u64 {
        out.u8(1);
        out.u32(u32::try_from(spans).unwrap_or(u32::MAX));
        for span in list.chunk_by(|id, next| id.wrapping_add(1) == *next) {
            out.u32(span[0]);
            out.u32(u32::try_from(span.len()).unwrap_or(u32::MAX));
        }
    } else {
        out.u8(0);
        out.u32(u32::try_from(list.len()).unwrap_or(u32::MAX));
        for id in list {
            out.u32(*id);
        }
    }
}

fn decode_ids(reader: &mut Reader<'_>) -> Result<Option<BlockIds>, Short> {
    let as_spans = reader.u8()?;
    let count = usize::try_from(reader.u32()?).unwrap_or(usize::MAX);
    match as_spans {
        0 => {
            let raw = reader.take(count.saturating_mul(4))?;
            let ids = raw.as_chunks::<4>().0.iter();
            let ids: BlockIds = ids.map(|id| u32::from_le_bytes(*id)).collect();
            Ok((ids.len() <= IDS_MAX).then_some(ids))
        }
        1 if count == 1 => {
            let (first, count) = (reader.u32()?, reader.u32()?);
            Ok(BlockIds::span(first, count).filter(|ids| ids.len() <= IDS_MAX))
        }
        1 => {
            let mut ids: Vec<u32> = Vec::new();
            for _ in 0..count {
                let (first, count) = (reader.u32()?, reader.u32()?);
                let Some(span) = BlockIds::span(first, count) else {
                    return Ok(None);
                };
                if ids.len().saturating_add(span.len()) > IDS_MAX {
                    return Ok(None);
                }
                ids.extend(span.iter());
            }
            Ok(Some(ids.into()))
        }
        _ => Ok(None),
    }
}

/// Body of REGION.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RegionAnswer {
    pub(crate) len: u64,
    pub(crate) access: RemoteAccess,
    /// The memory file comes with this frame.
    pub(crate) file: bool,
    /// Address of the first byte in the target's process, for an initiator that may copy there
    /// through the kernel; 0 for none.
    pub(crate) address: u64,
    /// Key of the memory for an initiator that reaches it by RDMA, at `address`.
    pub(crate) rdma: Option<u32>,
    /// What it takes to map device memory; the file is that of the memory then, if there is one.
    pub(crate) device: Option<DeviceAnswer>,
}

/// How to map device memory of the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeviceAnswer {
    /// The device that it lies on.
    pub(crate) uuid: [u8; 16],
    /// The initiator may run copies on that device.
    pub(crate) pull: bool,
    /// The driver's handle for it; none if a file comes instead, or if the target cannot share it.
    pub(crate) handle: Option<ShareHandle>,
}

impl RegionAnswer {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.u64(self.len);
        out.u8(access_code(self.access));
        out.u8(u8::from(self.file));
        out.u64(self.address);
        if let Some(key) = self.rdma {
            out.u8(3);
            out.u32(key);
            return out.bytes;
        }
        let Some(device) = &self.device else {
            out.u8(0);
            return out.bytes;
        };
        out.u8(if device.handle.is_some() { 2 } else { 1 });
        out.bytes.extend_from_slice(&device.uuid);
        out.u8(u8::from(device.pull));
        if let Some(share) = &device.handle {
            out.bytes.extend_from_slice(&share.handle);
            out.u64(share.offset);
        }
        out.bytes
    }

    pub(crate) fn decode(body: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(body);
        let mut read = || -> Result<Option<Self>, Short> {
            let len = reader.u64()?;
            let access = access_from(reader.u8()?);
            let file = reader.u8()? != 0;
            let address = reader.u64()?;
            let kind = reader.u8()?;
            let rdma = match kind {
                3 => Some(reader.u32()?),
                _ => None,
            };
            let device = match kind {
                1 | 2 => Some(DeviceAnswer {
                    uuid: reader.array()?,
                    pull: reader.u8()? != 0,
                    handle: match kind {
                        2 => Some(ShareHandle {
                            handle: reader.array()?,
                            offset: reader.u64()?,
                        }),
                        _ => None,
                    },
                }),
                _ => None,
            };
            Ok(access.filter(|_| kind <= 3).map(|access| Self {
                len,
                access,
                file,
                address,
                rdma,
                device,
            }))
        };
        read().ok().flatten().filter(|_| reader.remaining() == 0)
    }
}

/// Body of WINDOW; too large a scope has none.
pub(crate) fn encode_grant(spec: &GrantSpec) -> Option<Vec<u8>> {
    let mut out = Writer::default();
    out.u64(spec.region.0);
    out.u8(match spec.access {
        WindowAccess::Write => 0,
        WindowAccess::Read => 1,
        WindowAccess::ReadWrite => 2,
    });
    match &spec.scope {
        Scope::Region => out.u8(0),
        Scope::Ranges(ranges) => {
            out.u8(1);
            out.u32(u32::try_from(ranges.len()).ok()?);
            for range in ranges {
                out.u64(range.start);
                out.u64(range.end);
            }
        }
        Scope::Blocks(blocks) => {
            out.u8(2);
            encode_layout(&mut out, &blocks.layout);
            encode_ids(&mut out, &blocks.ids);
        }
    }
    (out.bytes.len() <= BODY_BYTES_MAX).then_some(out.bytes)
}

pub(crate) fn decode_grant(body: &[u8]) -> Option<GrantSpec> {
    let mut reader = Reader::new(body);
    read_grant(&mut reader)
        .ok()
        .flatten()
        .filter(|_| reader.remaining() == 0)
}

fn read_grant(reader: &mut Reader<'_>) -> Result<Option<GrantSpec>, Short> {
    let region = RegionId(reader.u64()?);
    let access = match reader.u8()? {
        0 => WindowAccess::Write,
        1 => WindowAccess::Read,
        2 => WindowAccess::ReadWrite,
        _ => return Ok(None),
    };
    let scope = match reader.u8()? {
        0 => Scope::Region,
        1 => {
            let count = usize::try_from(reader.u32()?).unwrap_or(usize::MAX);
            if count > reader.remaining() / 16 {
                return Ok(None);
            }
            let mut ranges = Vec::with_capacity(count);
            for _ in 0..count {
                ranges.push(reader.u64()?..reader.u64()?);
            }
            Scope::Ranges(ranges)
        }
        2 => {
            let layout = decode_layout(reader)?;
            let Some(ids) = decode_ids(reader)? else {
                return Ok(None);
            };
            Scope::blocks(layout, &ids)
        }
        _ => return Ok(None),
    };
    Ok(Some(GrantSpec {
        region,
        scope,
        access,
    }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spec(ids: Vec<u32>) -> StripeSpec {
        StripeSpec {
            region: RegionId(9),
            window: Some(WindowId(4)),
            order: Order::LayerMajor,
            set: BlockSet::new(BlockLayout::contiguous(1 << 20, 16), ids.into(), 0..1),
            range: 0..16,
        }
    }

    fn encode(spec: &StripeSpec) -> Vec<u8> {
        StripeSpec::encode(spec.region, spec.window, spec.order, &spec.set, &spec.range)
    }

    proptest! {
        #[test]
        fn stripes_survive_the_wire(
            ids in proptest::collection::vec(0u32..40, 1..60),
            inner in proptest::collection::vec((any::<u32>(), any::<u64>()), 0..5),
        ) {
            let mut spec = spec(ids);
            spec.set.inner = inner
                .into_iter()
                .map(|(count, stride)| Axis { count, stride })
                .collect();
            let bytes = encode(&spec);
            let expected = (spec.set.inner.len() <= INNER_MAX).then_some(spec);
            prop_assert_eq!(StripeSpec::decode(&bytes), expected);
        }

        #[test]
        fn damage_never_panics(at in 0usize..120, flip in 1u8..=255, cut in 0usize..120) {
            let mut bytes = encode(&spec((0..40).collect()));
            let len = bytes.len();
            bytes[at % len] ^= flip;
            let _ = StripeSpec::decode(&bytes);
            let _ = StripeSpec::decode(&bytes[..cut % len]);
            let _ = decode_grant(&bytes);
            let _ = RegionAnswer::decode(&bytes[..cut % len]);
        }
    }

    #[test]
    fn consecutive_ids_travel_as_spans() {
        assert!(encode(&spec((0..10_000).collect())).len() < 120);
    }

    #[test]
    fn spans_that_would_expand_without_bound_are_refused() {
        let mut bytes = encode(&spec((0..100).collect()));
        let at = bytes.len() - 4;
        bytes[at..].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(StripeSpec::decode(&bytes), None);
    }

    #[test]
    fn grants_survive_the_wire() {
        for scope in [
            Scope::Region,
            Scope::Ranges(vec![1..2, 5..9]),
            Scope::blocks(BlockLayout::contiguous(8, 16), &[1, 2, 7].into()),
        ] {
            let spec = GrantSpec {
                region: RegionId(1),
                scope,
                access: WindowAccess::Write,
            };
            let got = decode_grant(&encode_grant(&spec).unwrap()).unwrap();
            assert_eq!(
                (got.region, got.scope, got.access),
                (spec.region, spec.scope, spec.access)
            );
        }
    }
}

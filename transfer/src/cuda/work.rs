//! What a posted operation does on a device: launches of kernels, or copies by the copy engines.

use std::fmt;
use std::ops::Range;
use std::time::Instant;

use cudarc::driver::sys;

use super::device::{Device, Table};
use super::driver::check;
use super::error::CudaError;
use super::kernels::abi::{BpCopy, BpDone, BpPermute, BpSet};
use super::kernels::shape::{self, CopyBy, Shape};
use super::loaded::{Function, Kernels};
use super::pace::Way;
use super::permute;
use super::pin::{Pin, PinnedSpan, Unpinned};
use super::plan::{Blocks, Copies, IdTable, Pair, TooManyChunks, lay_out};
use super::stream::Lease;
use crate::agent::{Core, DeviceOfPeer, MappedMemory, RemoteMemory, RemoteRegion};
use crate::clock::after;
use crate::config::CudaConfig;
use crate::error::{PrepareError, Side};
use crate::memory::Region;
use crate::op::{Op, SetPair, TensorCopy};
use crate::plan::{BlockSet, FROM, TO};

/// Bytes of one launch that rearranges.
const LAUNCH_BYTES_MAX: u64 = 1 << 30;

/// How the bytes of an operation are moved by a device.
pub(crate) struct DeviceWork {
    /// The device whose multiprocessors or engines do it.
    pub(super) device: &'static Device,
    kernels: Kernels,
    launches: Vec<Launch>,
    /// What all launches that copy share.
    copies: Option<Copies>,
    engine: Vec<EngineCopy>,
    /// The set table and the ids behind it.
    table: Option<Table>,
    pub(super) sms: u32,
    bytes: u64,
    /// Host memory takes part.
    over_the_bus: bool,
}

/// One part of an operation.
#[derive(Clone, Debug)]
enum Launch {
    /// Chunks of the copies.
    Copy(Range<u32>),
    Permute(Box<BpPermute>),
}

/// How one part is launched.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    function: Function,
    shape: Shape,
}

impl Grid {
    /// Multiprocessors that it takes.
    pub(super) const fn ctas(&self) -> u32 {
        self.shape.ctas
    }
}

/// One copy of a copy engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct EngineCopy {
    to: u64,
    from: u64,
    bytes: usize,
}

impl fmt::Debug for DeviceWork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceWork")
            .field("device", &self.device)
            .field("launches", &self.launches.len())
            .field("engine", &self.engine)
            .finish_non_exhaustive()
    }
}

fn kernels_of(
    device: &'static Device,
    config: &CudaConfig,
) -> Result<&'static Kernels, PrepareError> {
    device
        .kernels(config)
        .map_err(|trouble| PrepareError::Kernels {
            device: device.ordinal(),
            reason: trouble.to_string(),
        })
}

impl DeviceWork {
    /// Plans an operation of which at least one side is device memory, and says how and why.
    pub(crate) fn prepare(
        core: &Core,
        op: Op,
        sets: &[SetPair],
        tensors: &[TensorCopy],
    ) -> Result<(Self, String), PrepareError> {
        let config = &core.config.cuda;
        let ends = tensors.iter().map(TensorCopy::ends);
        let ends: Vec<_> = ends.chain(sets.iter().map(SetPair::ends)).collect();
        let (device, why) = executor(core, op, &ends)?;
        let ordinal = device.ordinal();
        let kernels = kernels_of(device, config)?;
        let mut reach = Reach {
            device,
            until: after(core.config.connect_timeout),
            core,
            spans: Vec::new(),
        };
        let sms = config.sms.min(device.info.multiprocessors);
        let mut work = if tensors.is_empty() {
            let pairs = sets.iter().map(|set| reach.pair(op, set));
            let pairs = pairs.collect::<Result<Vec<_>, _>>()?;
            let copies = lay_out(&pairs, sms).map_err(|TooManyChunks(got)| too_large(got))?;
            Self::copying(device, kernels, copies, sms)
        } else {
            Self::permuting(&mut reach, kernels, op, tensors, sms)
        }
        .map_err(|trouble| trouble.on(ordinal))?;
        if let Some(copies) = &work.copies
            && copies.pieces <= u64::from(config.engine_pieces_max)
            && copies.piece_bytes_min >= config.engine_bytes_min
        {
            work.engine = engine_copies(copies, &reach.spans);
        }
        work.over_the_bus = !reach.spans.is_empty();
        let reason = format!("{}; {why}", work.explain());
        Ok((work, reason))
    }

    /// Opens a device and loads its kernels.
    pub(crate) fn warm(core: &Core, ordinal: u32) -> Result<(), PrepareError> {
        let device = Device::open(ordinal)?;
        kernels_of(device, &core.config.cuda).map(drop)
    }

    fn copying(
        device: &'static Device,
        kernels: &Kernels,
        copies: Copies,
        sms: u32,
    ) -> Result<Self, Trouble> {
        let sets: &[BpSet] = if copies.sets.len() > 1 {
            &copies.sets
        } else {
            &[]
        };
        let mut table = Vec::with_capacity(size_of_val(sets) + copies.ids.len() * 4);
        // SAFETY: plain integers without padding; the slice lives as long as the borrow.
        let bytes =
            unsafe { std::slice::from_raw_parts(sets.as_ptr().cast::<u8>(), size_of_val(sets)) };
        table.extend_from_slice(bytes);
        push_ids(&mut table, &copies.ids);
        Ok(Self {
            device,
            kernels: *kernels,
            launches: copies.launches().map(Launch::Copy).collect(),
            engine: Vec::new(),
            table: upload(device, &table)?,
            sms,
            bytes: copies.bytes(),
            over_the_bus: false,
            copies: Some(copies),
        })
    }

    fn permuting(
        reach: &mut Reach<'_>,
        kernels: &Kernels,
        op: Op,
        tensors: &[TensorCopy],
        sms: u32,
    ) -> Result<Self, Trouble> {
        let mut ids = IdTable::default();
        let mut parameters = Vec::new();
        for copy in tensors {
            let pair = &copy.pair;
            let (here, there) = match op {
                Op::Write => (FROM, TO),
                Op::Read => (TO, FROM),
            };
            let local = reach.local(&copy.local_region, pair.touched(here))?;
            let remote = reach.remote(&copy.remote_region, pair.touched(there))?;
            let (src, dst) = match op {
                Op::Write => (local, remote),
                Op::Read => (remote, local),
            };
            let laid_out = permute::lay_out(pair, src, dst, &mut ids);
            parameters.push(laid_out.ok_or_else(|| too_large(u64::MAX))?);
        }
        let mut table = Vec::new();
        push_ids(&mut table, &ids.ids);
        let table = upload(reach.device, &table)?;
        let at = table.as_ref().map_or(0, |table| table.address);
        let mut launches = Vec::new();
        let mut bytes = 0;
        for mut parameter in parameters {
            parameter.ids = at;
            let run = u64::from(parameter.run_bytes);
            bytes += parameter.unit_end * run;
            let step = usize::try_from((LAUNCH_BYTES_MAX / run).max(1)).unwrap_or(usize::MAX);
            for unit_begin in (0..parameter.unit_end).step_by(step) {
                let unit_end = parameter
                    .unit_end
                    .min(unit_begin.saturating_add(step as u64));
                let part = BpPermute {
                    unit_begin,
                    unit_end,
                    ..parameter
                };
                launches.push(Launch::Permute(Box::new(part)));
            }
        }
        Ok(Self {
            device: reach.device,
            kernels: *kernels,
            launches,
            copies: None,
            engine: Vec::new(),
            table,
            sms,
            bytes,
            over_the_bus: false,
        })
    }

    /// Parts of the operation: launches, each called off or done as a whole.
    pub(crate) fn parts(&self) -> u32 {
        u32::try_from(self.launches.len()).unwrap_or(u32::MAX)
    }

    /// What the speed of a launch on so many multiprocessors depends on, and its bytes; 0 for the copy
    /// engines, which take all parts at once.
    pub(super) fn pace(&self, sms: u32) -> (Way, u64) {
        let way = Way {
            over_the_bus: self.over_the_bus,
            sms,
        };
        let parts = if sms == 0 {
            1
        } else {
            self.launches.len().max(1) as u64
        };
        (way, self.bytes / parts)
    }

    /// Whether the copy engines may do it, all parts as one.
    pub(super) const fn by_engine(&self) -> bool {
        !self.engine.is_empty()
    }

    fn explain(&self) -> String {
        let device = self.device;
        let most = device.info.multiprocessors;
        let Some(copies) = &self.copies else {
            let sms = self.sms;
            return format!("{device:?} rearranges with {sms} of {most} SMs");
        };
        let Copies {
            chunk_bytes,
            pieces,
            piece_bytes_max,
            aligned,
            ..
        } = copies;
        if self.by_engine() {
            return format!(
                "{pieces} contiguous pieces of up to {piece_bytes_max} bytes go to the copy engines of {device:?}"
            );
        }
        let (by, Shape { ctas, threads, .. }) = self.copy_shape(copies, 0..copies.chunks, self.sms);
        let how = match by {
            CopyBy::Small => "it is over before more could help".to_owned(),
            CopyBy::Lanes if *aligned => format!("{} warps on each", threads / 32),
            CopyBy::Lanes => "not everything is aligned to 16 bytes".to_owned(),
            CopyBy::Bulk => "bulk copies, because the SMs are few".to_owned(),
        };
        format!(
            "{device:?} copies with {ctas} of {most} SMs in chunks of {chunk_bytes} bytes ({how})"
        )
    }

    fn copy_shape(&self, copies: &Copies, chunks: Range<u32>, sms: u32) -> (CopyBy, Shape) {
        shape::copy(
            self.kernels.limits,
            copies.aligned,
            copies.bytes(),
            copies.chunk_bytes,
            chunks.end - chunks.start,
            sms,
        )
    }

    /// Which kernel does a part, and how it spreads over `sms` multiprocessors, or fewer if it is small.
    pub(super) fn grid(&self, part: u32, sms: u32) -> Grid {
        let Kernels {
            bulk,
            lanes,
            small,
            permute,
            limits,
        } = self.kernels;
        match (self.launches.get(part as usize), &self.copies) {
            (Some(Launch::Permute(parameter)), _) => Grid {
                function: permute,
                shape: shape::permute(limits, parameter.unit_end - parameter.unit_begin, sms),
            },
            (Some(Launch::Copy(range)), Some(copies)) => {
                let (by, shape) = self.copy_shape(copies, range.clone(), sms);
                let function = match by {
                    CopyBy::Small => small,
                    CopyBy::Lanes => lanes,
                    CopyBy::Bulk => bulk.unwrap_or(lanes),
                };
                Grid { function, shape }
            }
            (Some(Launch::Copy(_)) | None, _) => Grid {
                function: small,
                shape: shape::permute(limits, 1, 1),
            },
        }
    }

    /// Puts one part on a stream. The context of the device is current.
    ///
    /// # Safety
    /// What the operation names stays valid until the end of the launch was seen.
    pub(super) unsafe fn launch(
        &self,
        part: u32,
        Grid { function, shape }: Grid,
        lease: &Lease,
        done: BpDone,
    ) -> Result<(), CudaError> {
        match (self.launches.get(part as usize), &self.copies) {
            (Some(Launch::Copy(range)), Some(copies)) => {
                let parameter = parameter(copies, range, self.table.as_ref(), done);
                // SAFETY: the parameter is that of all copy kernels; the rest by the contract.
                unsafe { function.launch(lease.stream.0, shape, &parameter) }
            }
            (Some(Launch::Permute(parameter)), _) => {
                let parameter = BpPermute {
                    done,
                    ..**parameter
                };
                // SAFETY: the parameter is that of the kernel; the rest by the contract.
                unsafe { function.launch(lease.stream.0, shape, &parameter) }
            }
            (Some(Launch::Copy(_)) | None, _) => Ok(()),
        }
    }

    /// Puts the copies of all parts on a stream, and the store of `ticket` to the flag behind them.
    ///
    /// # Safety
    /// As for [`Self::launch`]; `flag` is pinned host memory.
    pub(super) unsafe fn copy_by_engine(
        &self,
        lease: &Lease,
        flag: u64,
        ticket: u32,
    ) -> Result<(), CudaError> {
        for copy in &self.engine {
            // SAFETY: both ranges were checked against their regions and are reached by the device.
            check("copy by an engine", unsafe {
                sys::cuMemcpyAsync(copy.to, copy.from, copy.bytes, lease.stream.0)
            })?;
        }
        // SAFETY: a word of pinned memory of ours.
        check("mark the end of a copy", unsafe {
            sys::cuStreamWriteValue32_v2(lease.stream.0, flag, ticket, 0)
        })
    }
}

/// What the kernels that copy are given for a range of chunks.
fn parameter(copies: &Copies, range: &Range<u32>, table: Option<&Table>, done: BpDone) -> BpCopy {
    let Copies {
        sets, chunk_bytes, ..
    } = copies;
    let at = table.map_or(0, |table| table.address);
    let in_table = if sets.len() > 1 {
        size_of_val(sets.as_slice()) as u64
    } else {
        0
    };
    BpCopy {
        one: sets.first().copied().unwrap_or_default(),
        sets: at,
        ids: at + in_table,
        set_count: u32::try_from(sets.len()).unwrap_or(u32::MAX),
        chunk_bytes: *chunk_bytes,
        chunk_begin: range.start,
        chunk_end: range.end,
        done,
    }
}

/// What stands in the way while planning.
enum Trouble {
    Prepare(PrepareError),
    Device(CudaError),
}

impl Trouble {
    fn on(self, device: u32) -> PrepareError {
        match self {
            Self::Prepare(error) => error,
            Self::Device(error) => PrepareError::Device { device, error },
        }
    }
}

impl From<PrepareError> for Trouble {
    fn from(error: PrepareError) -> Self {
        Self::Prepare(error)
    }
}

impl From<CudaError> for Trouble {
    fn from(error: CudaError) -> Self {
        Self::Device(error)
    }
}

fn too_large(got: u64) -> PrepareError {
    PrepareError::TooLarge {
        what: "number of pieces",
        got,
        limit: u64::from(u32::MAX),
    }
}

fn push_ids(table: &mut Vec<u8>, ids: &[u32]) {
    for id in ids {
        // Devices are little-endian.
        table.extend_from_slice(&id.to_le_bytes());
    }
}

fn upload(device: &'static Device, table: &[u8]) -> Result<Option<Table>, CudaError> {
    (!table.is_empty())
        .then(|| device.upload(table))
        .transpose()
}

/// The two regions of one set or tensor.
type Ends<'a> = (&'a Region, &'a RemoteRegion);

/// Which device does the work, and why it.
fn executor(
    core: &Core,
    op: Op,
    ends: &[Ends<'_>],
) -> Result<(&'static Device, &'static str), PrepareError> {
    let config = &core.config.cuda;
    let mixed = |side| PrepareError::MixedMemory { side };
    let device_of = |region: &Region| region.device().map(|range| range.device);
    let local = ends.first().and_then(|(local, _)| device_of(local));
    let same =
        |region: &Region| device_of(region).map(Device::ordinal) == local.map(Device::ordinal);
    if !ends.iter().all(|(region, _)| same(region)) {
        return Err(mixed(Side::Local));
    }
    let remote = ends.first().and_then(|(_, remote)| peer_of(remote));
    let owner = remote.map(|peer| peer.owner.ordinal);
    if !ends
        .iter()
        .all(|(_, region)| peer_of(region).map(|peer| peer.owner.ordinal) == owner)
    {
        return Err(mixed(Side::Remote));
    }
    Ok(match (local, remote) {
        (Some(local), Some(peer)) if op == Op::Write && local.ordinal() != peer.owner.ordinal => {
            if config.pull_writes && peer.pull {
                let puller = Device::open(peer.owner.ordinal)?;
                (puller, "it pulls, as both sides allow")
            } else {
                (local, "it holds the bytes and pushes them")
            }
        }
        (Some(local), Some(_)) => (local, "it pulls"),
        (Some(local), None) => (local, "the other side is pinned host memory"),
        (None, Some(peer)) => (
            Device::open(peer.owner.ordinal)?,
            "this side is pinned host memory",
        ),
        (None, None) => return Err(mixed(Side::Local)),
    })
}

fn peer_of(region: &RemoteRegion) -> Option<&DeviceOfPeer> {
    match &region.memory {
        RemoteMemory::Device(peer) => Some(peer),
        RemoteMemory::Mapped(_)
        | RemoteMemory::Foreign(_)
        | RemoteMemory::Rdma(_)
        | RemoteMemory::Streamed(_)
        | RemoteMemory::Stored
        | RemoteMemory::Unreachable(_) => None,
    }
}

/// Finds the addresses at which one device reaches regions.
struct Reach<'a> {
    device: &'static Device,
    core: &'a Core,
    until: Instant,
    /// Host memory that takes part.
    spans: Vec<PinnedSpan>,
}

impl Reach<'_> {
    fn pair<'s>(&mut self, op: Op, set: &'s SetPair) -> Result<Pair<'s>, PrepareError> {
        let on = |trouble: Trouble| trouble.on(self.device.ordinal());
        let local = self.local(&set.local_region, set.local.touched());
        let local = local.map_err(on)?;
        let remote = self.remote(&set.remote_region, set.remote.touched());
        let remote = remote.map_err(on)?;
        let (local, remote) = (blocks(local, &set.local), blocks(remote, &set.remote));
        let (src, dst) = match op {
            Op::Write => (local, remote),
            Op::Read => (remote, local),
        };
        Ok(Pair {
            src,
            dst,
            layers: set.local.layers.end - set.local.layers.start,
            order: set.order,
        })
    }

    fn local(&mut self, region: &Region, touched: Range<u64>) -> Result<u64, Trouble> {
        match region.device() {
            Some(range) => Ok(range.address_on(self.device)?),
            None => {
                let pin = region.pin(self.device);
                self.host(Side::Local, region.address(), pin, touched)
            }
        }
    }

    fn remote(&mut self, region: &RemoteRegion, touched: Range<u64>) -> Result<u64, Trouble> {
        let unreachable = |reason: &str| {
            Err(Trouble::Prepare(PrepareError::Unreachable {
                region: region.id,
                reason: reason.to_owned(),
            }))
        };
        match &region.memory {
            RemoteMemory::Device(peer) => Ok(peer.address_on(self.device)?),
            RemoteMemory::Mapped(MappedMemory::InProcess(theirs)) => {
                let pin = theirs.pin(self.device);
                self.host(Side::Remote, theirs.address(), pin, touched)
            }
            RemoteMemory::Mapped(MappedMemory::Shared(mapping)) => {
                let pin = region.pin(self.device, mapping);
                self.host(Side::Remote, mapping.base().as_ptr() as u64, pin, touched)
            }
            RemoteMemory::Foreign(_) => {
                unreachable("it is memory of another process that is not an arena")
            }
            RemoteMemory::Rdma(_) => unreachable("it is reached by RDMA"),
            RemoteMemory::Streamed(why) | RemoteMemory::Unreachable(why) => unreachable(why),
            RemoteMemory::Stored => unreachable("it is storage"),
        }
    }

    /// Waits until the bytes that are touched are pinned.
    fn host(
        &mut self,
        side: Side,
        base: u64,
        pin: &Pin,
        touched: Range<u64>,
    ) -> Result<u64, Trouble> {
        let bytes = touched.end;
        pin.wait(touched, self.until)
            .map_err(|trouble| match trouble {
                Unpinned::Failed(error) => Trouble::Device(error),
                Unpinned::TimedOut => Trouble::Prepare(PrepareError::Unpinned {
                    side,
                    bytes,
                    timeout: self.core.config.connect_timeout,
                }),
            })?;
        self.spans.push(pin.span());
        Ok(base)
    }
}

fn blocks(region: u64, set: &BlockSet) -> Blocks<'_> {
    Blocks {
        region,
        layout: set.layout,
        ids: &set.ids,
        first_layer: set.layers.start,
    }
}

/// The pieces one by one, none across the seam between two pinned chunks.
fn engine_copies(copies: &Copies, pins: &[PinnedSpan]) -> Vec<EngineCopy> {
    let mut out = Vec::new();
    for (mut from, mut to, mut left) in copies.each_piece() {
        while left > 0 {
            let seams = pins
                .iter()
                .flat_map(|pin| [pin.until_seam(from), pin.until_seam(to)]);
            let bytes = seams.flatten().fold(left, u64::min);
            out.push(EngineCopy {
                to,
                from,
                bytes: usize::try_from(bytes).unwrap_or(usize::MAX),
            });
            (from, to, left) = (from + bytes, to + bytes, left - bytes);
        }
    }
    out
}

//! The metadata blob: who an agent is, where it listens, what it has registered.
//!
//! Layout (all integers little-endian): `"BPMD"`, version u16, reserved u16, length of the payload
//! u32, CRC-32C of the payload u32, payload. The wire document describes the payload byte by byte.

use std::sync::Arc;

use super::codec::{Reader, Short, Writer};
use crate::config::RemoteAccess;
use crate::error::MetadataError;
use crate::memory::{Region, RegionId, RegionKind};

const MAGIC: &[u8; 4] = b"BPMD";
const VERSION: u16 = 3;
const HEADER_BYTES: usize = 16;
/// Larger blobs are refused before anything else is looked at.
pub(crate) const METADATA_BYTES_MAX: usize = 16 << 20;
/// Smallest encoding of one region: id, length, access, kind, empty label.
const REGION_BYTES_MIN: usize = 20;

/// Kinds of memory of a region.
const HOST: u8 = 0;
const ARENA: u8 = 1;
const DEVICE: u8 = 2;

/// What a peer needs to connect. Opaque on the wire ([`Metadata::to_bytes`]); carry it with any
/// discovery or message system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    name: Arc<str>,
    epoch: u64,
    addresses: Addresses,
    content: MetadataContent,
    revision: u64,
    regions: Vec<RegionInfo>,
    released: Vec<RegionId>,
}

/// Which regions metadata names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MetadataContent {
    /// All that peers may use.
    Complete,
    /// Some, chosen by the agent.
    Partial,
    /// Those that are new since a revision, and those that were released since.
    Delta {
        /// The revision that the delta belongs to.
        base: u64,
    },
}

/// Where an agent can be reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Addresses {
    /// Identifies the running kernel: peers with the same value share a host.
    pub(crate) host: [u8; 16],
    /// `host:port` of the TCP lane.
    pub(crate) tcp: Option<String>,
    /// Path of the Unix socket of the shm lane.
    pub(crate) shm: Option<String>,
}

/// A region in metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// How to name it in operations.
    pub id: RegionId,
    /// Length in bytes.
    pub len: u64,
    /// What peers may do.
    pub access: RemoteAccess,
    /// Whether peers on the host can map it.
    pub mappable: bool,
    /// The GPU whose memory it is, by the identity that the driver gives it on every host and in every
    /// process; none for host memory.
    pub device: Option<[u8; 16]>,
    /// Name in logs.
    pub label: String,
}

impl RegionInfo {
    pub(crate) fn of(region: &Region) -> Self {
        Self {
            id: region.id,
            len: region.len as u64,
            access: region.access,
            mappable: matches!(region.kind(), RegionKind::Arena { .. }),
            device: region.device().map(|range| range.device.info.uuid),
            label: region.label.as_ref().to_owned(),
        }
    }
}

impl Metadata {
    /// Regions are sorted by id.
    pub(crate) const fn new(
        name: Arc<str>,
        epoch: u64,
        addresses: Addresses,
        content: MetadataContent,
        revision: u64,
        regions: Vec<RegionInfo>,
    ) -> Self {
        Self {
            name,
            epoch,
            addresses,
            content,
            revision,
            regions,
            released: Vec::new(),
        }
    }

    /// Name of the agent.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its epoch: a restarted agent has another one.
    #[must_use]
    pub const fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Regions that were registered, and open to peers, when the metadata was made.
    #[must_use]
    pub fn regions(&self) -> &[RegionInfo] {
        &self.regions
    }

    /// Which regions it names.
    #[must_use]
    pub const fn content(&self) -> MetadataContent {
        self.content
    }

    /// Grows with every region that the agent registers or releases.
    #[must_use]
    pub const fn revision(&self) -> u64 {
        self.revision
    }

    /// In a delta: regions that were released since its base.
    #[must_use]
    pub fn released(&self) -> &[RegionId] {
        &self.released
    }

    /// What changed between `base` and this, both complete: apply it to `base` to get this.
    ///
    /// # Errors
    /// They are of different agents or lives, or one of them is not complete.
    pub fn delta_since(&self, base: &Self) -> Result<Self, MetadataError> {
        self.same_agent(base)?;
        for metadata in [self, base] {
            if metadata.content != MetadataContent::Complete {
                return Err(MetadataError::Field { field: "content" });
            }
        }
        let has = |list: &[RegionInfo], id: RegionId| {
            list.binary_search_by_key(&id, |region| region.id).is_ok()
        };
        let new = self.regions.iter();
        let new = new.filter(|region| !has(&base.regions, region.id));
        let gone = base.regions.iter().map(|region| region.id);
        Ok(Self {
            content: MetadataContent::Delta {
                base: base.revision,
            },
            regions: new.cloned().collect(),
            released: gone.filter(|id| !has(&self.regions, *id)).collect(),
            ..self.clone()
        })
    }

    /// Brings this up to date with a delta.
    ///
    /// # Errors
    /// The delta is of another agent or life, is not a delta, or belongs to another revision; then
    /// nothing changes and the complete metadata is needed.
    pub fn apply(&mut self, delta: &Self) -> Result<(), MetadataError> {
        self.same_agent(delta)?;
        let MetadataContent::Delta { base } = delta.content else {
            return Err(MetadataError::Field { field: "content" });
        };
        if base != self.revision || self.content != MetadataContent::Complete {
            return Err(MetadataError::Base {
                got: base,
                accepted: self.revision,
            });
        }
        self.regions
            .retain(|region| delta.released.binary_search(&region.id).is_err());
        self.regions.extend(delta.regions.iter().cloned());
        self.regions.sort_unstable_by_key(|region| region.id);
        self.revision = delta.revision;
        Ok(())
    }

    fn same_agent(&self, other: &Self) -> Result<(), MetadataError> {
        if self.name == other.name && self.epoch == other.epoch {
            Ok(())
        } else {
            Err(MetadataError::OtherAgent {
                got: other.name.as_ref().to_owned(),
                accepted: self.name.as_ref().to_owned(),
            })
        }
    }

    /// `host:port` where the agent listens on TCP, if it does.
    #[must_use]
    pub fn tcp_address(&self) -> Option<&str> {
        self.addresses.tcp.as_deref()
    }

    /// Path of the Unix socket where the agent listens, if it does.
    #[must_use]
    pub fn unix_socket(&self) -> Option<&str> {
        self.addresses.shm.as_deref()
    }

    pub(crate) const fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// The blob.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut payload = Writer::default();
        payload.u64(self.epoch);
        payload.bytes.extend_from_slice(&self.addresses.host);
        payload.text(&self.name);
        for address in [&self.addresses.tcp, &self.addresses.shm] {
            payload.text(address.as_deref().unwrap_or_default());
        }
        let (content, base) = match self.content {
            MetadataContent::Complete => (0, 0),
            MetadataContent::Partial => (1, 0),
            MetadataContent::Delta { base } => (2, base),
        };
        payload.u8(content);
        payload.u64(self.revision);
        payload.u64(base);
        payload.u32(u32::try_from(self.released.len()).unwrap_or(u32::MAX));
        for id in &self.released {
            payload.u64(id.0);
        }
        payload.u32(u32::try_from(self.regions.len()).unwrap_or(u32::MAX));
        for region in &self.regions {
            payload.u64(region.id.0);
            payload.u64(region.len);
            payload.u8(access_code(region.access));
            payload.u8(match (region.mappable, &region.device) {
                (_, Some(_)) => DEVICE,
                (true, None) => ARENA,
                (false, None) => HOST,
            });
            payload
                .bytes
                .extend_from_slice(region.device.as_ref().map_or(&[], |uuid| &uuid[..]));
            payload.text(&region.label);
        }
        let payload = payload.bytes;
        let mut blob = Writer {
            bytes: Vec::with_capacity(HEADER_BYTES + payload.len()),
        };
        blob.bytes.extend_from_slice(MAGIC);
        blob.u16(VERSION);
        blob.u16(0);
        blob.u32(u32::try_from(payload.len()).unwrap_or(u32::MAX));
        blob.u32(crc32c::crc32c(&payload));
        blob.bytes.extend_from_slice(&payload);
        blob.bytes
    }

    /// Reads a blob. Safe on any input: nothing is allocated beyond a small multiple of its length.
    ///
    /// # Errors
    /// Says what is wrong and where.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, MetadataError> {
        if bytes.len() > METADATA_BYTES_MAX {
            return Err(MetadataError::Field { field: "length" });
        }
        let mut header = Reader::new(bytes);
        if header.take(4)? != MAGIC {
            return Err(MetadataError::Magic);
        }
        let got = header.u16()?;
        if got != VERSION {
            return Err(MetadataError::Version {
                got,
                accepted: VERSION,
            });
        }
        header.u16()?;
        let len = header.u32()?;
        let checksum = header.u32()?;
        let payload = header.take(usize::try_from(len).unwrap_or(usize::MAX))?;
        if header.remaining() > 0 {
            return Err(MetadataError::Field { field: "length" });
        }
        if crc32c::crc32c(payload) != checksum {
            return Err(MetadataError::Checksum);
        }
        Self::payload(&mut Reader::new(payload))
    }

    fn payload(reader: &mut Reader<'_>) -> Result<Self, MetadataError> {
        let invalid = |field| MetadataError::Field { field };
        let epoch = reader.u64()?;
        let mut host = [0; 16];
        host.copy_from_slice(reader.take(16)?);
        let name = reader.text()?.ok_or_else(|| invalid("name"))?;
        if !(1..=255).contains(&name.len()) {
            return Err(invalid("name"));
        }
        let mut address = |field| match reader.text() {
            Ok(Some("")) => Ok(None),
            Ok(Some(text)) if text.len() <= 4096 => Ok(Some(text.to_owned())),
            Ok(_) => Err(invalid(field)),
            Err(short) => Err(short.into()),
        };
        let tcp = address("tcp address")?;
        let shm = address("shm address")?;
        let content = reader.u8()?;
        let (revision, base) = (reader.u64()?, reader.u64()?);
        let content = match content {
            0 => MetadataContent::Complete,
            1 => MetadataContent::Partial,
            2 => MetadataContent::Delta { base },
            _ => return Err(invalid("content")),
        };
        let count = usize::try_from(reader.u32()?).unwrap_or(usize::MAX);
        if count > reader.remaining() / 8 {
            return Err(invalid("released regions"));
        }
        let mut released = Vec::with_capacity(count);
        for _ in 0..count {
            released.push(RegionId(reader.u64()?));
        }
        let count = usize::try_from(reader.u32()?).unwrap_or(usize::MAX);
        if count > reader.remaining() / REGION_BYTES_MIN {
            return Err(invalid("regions"));
        }
        let mut regions = Vec::with_capacity(count);
        for _ in 0..count {
            let (id, len) = (RegionId(reader.u64()?), reader.u64()?);
            let access = access_from(reader.u8()?).ok_or_else(|| invalid("access"))?;
            let memory = reader.u8()?;
            let device = match memory {
                HOST | ARENA => None,
                DEVICE => Some(reader.array()?),
                _ => return Err(invalid("kind of memory")),
            };
            regions.push(RegionInfo {
                id,
                len,
                access,
                mappable: memory == ARENA,
                device,
                label: reader.text()?.ok_or_else(|| invalid("label"))?.to_owned(),
            });
        }
        if reader.remaining() > 0 || !regions.is_sorted_by(|a, b| a.id < b.id) {
            return Err(invalid("regions"));
        }
        if !released.is_sorted_by(|a, b| a < b) {
            return Err(invalid("released regions"));
        }
        Ok(Self {
            name: name.into(),
            epoch,
            addresses: Addresses { host, tcp, shm },
            content,
            revision,
            regions,
            released,
        })
    }
}

impl From<Short> for MetadataError {
    fn from(short: Short) -> Self {
        Self::Truncated { at: short.at }
    }
}

pub(crate) const fn access_code(access: RemoteAccess) -> u8 {
    match access {
        RemoteAccess::Open => 0,
        RemoteAccess::WindowOnly => 1,
        RemoteAccess::None => 2,
    }
}

pub(crate) const fn access_from(code: u8) -> Option<RemoteAccess> {
    match code {
        0 => Some(RemoteAccess::Open),
        1 => Some(RemoteAccess::WindowOnly),
        2 => Some(RemoteAccess::None),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Metadata {
        Metadata::new(
            "decode-0".into(),
            0x1234_5678_9abc_def0,
            Addresses {
                host: [7; 16],
                tcp: Some("127.0.0.1:4000".into()),
                shm: Some("/tmp/x.sock".into()),
            },
            MetadataContent::Complete,
            7,
            vec![RegionInfo {
                id: RegionId(3),
                len: 1 << 30,
                access: RemoteAccess::WindowOnly,
                mappable: true,
                device: None,
                label: "kv".into(),
            }],
        )
    }

    #[test]
    fn survives_the_wire() {
        let mut metadata = sample();
        assert_eq!(
            Metadata::from_bytes(&metadata.to_bytes()),
            Ok(metadata.clone())
        );
        metadata.regions[0].mappable = false;
        metadata.regions[0].device = Some([9; 16]);
        assert_eq!(Metadata::from_bytes(&metadata.to_bytes()), Ok(metadata));
    }

    #[test]
    fn deltas_bring_up_to_date_and_survive_the_wire() {
        let region = |id| RegionInfo {
            id: RegionId(id),
            ..sample().regions[0].clone()
        };
        let old = Metadata {
            regions: vec![region(1), region(3), region(8)],
            ..sample()
        };
        let new = Metadata {
            revision: 12,
            regions: vec![region(2), region(3), region(9)],
            ..sample()
        };
        let delta = new.delta_since(&old).unwrap();
        assert_eq!(delta.content(), MetadataContent::Delta { base: 7 });
        assert_eq!(delta.released(), [RegionId(1), RegionId(8)]);
        assert_eq!(delta.regions().len(), 2);
        let delta = Metadata::from_bytes(&delta.to_bytes()).unwrap();
        let mut known = old.clone();
        known.apply(&delta).unwrap();
        assert_eq!(known, new);
        let wrong_base = MetadataError::Base {
            got: 7,
            accepted: 12,
        };
        assert_eq!(known.apply(&delta), Err(wrong_base));
        let not_a_delta = MetadataError::Field { field: "content" };
        assert_eq!(known.apply(&old), Err(not_a_delta));
        let other = Metadata { epoch: 1, ..old };
        assert!(matches!(
            new.delta_since(&other),
            Err(MetadataError::OtherAgent { .. })
        ));
    }

    #[test]
    fn a_later_version_is_named() {
        let mut bytes = sample().to_bytes();
        bytes[4..6].copy_from_slice(&(VERSION + 1).to_le_bytes());
        let later = MetadataError::Version {
            got: VERSION + 1,
            accepted: VERSION,
        };
        assert_eq!(Metadata::from_bytes(&bytes), Err(later));
        assert_eq!(
            Metadata::from_bytes(b"{\"json\": true}"),
            Err(MetadataError::Magic)
        );
    }

    #[test]
    fn every_truncation_is_refused() {
        let bytes = sample().to_bytes();
        for len in 0..bytes.len() {
            assert!(Metadata::from_bytes(&bytes[..len]).is_err(), "{len} bytes");
        }
        let mut longer = bytes;
        longer.push(0);
        assert!(Metadata::from_bytes(&longer).is_err());
    }

    #[test]
    fn a_huge_count_allocates_nothing() {
        let mut bytes = sample().to_bytes();
        // The count sits in front of the only region: 20 bytes and its label of 2.
        let at = bytes.len() - 22 - 4;
        bytes[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        let checksum = crc32c::crc32c(&bytes[HEADER_BYTES..]);
        bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
        assert_eq!(
            Metadata::from_bytes(&bytes),
            Err(MetadataError::Field { field: "regions" })
        );
    }

    proptest! {
        #[test]
        fn any_damage_is_an_error_and_never_a_panic(at in 0usize..140, flip in 1u8..=255) {
            let mut bytes = sample().to_bytes();
            let at = at % bytes.len();
            bytes[at] ^= flip;
            // Two reserved bytes carry no meaning.
            if !(6..8).contains(&at) {
                prop_assert!(Metadata::from_bytes(&bytes).is_err());
            }
        }

        #[test]
        fn payloads_of_noise_never_panic(noise in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut blob = Writer::default();
            blob.bytes.extend_from_slice(MAGIC);
            blob.u16(VERSION);
            blob.u16(0);
            blob.u32(u32::try_from(noise.len()).unwrap());
            blob.u32(crc32c::crc32c(&noise));
            blob.bytes.extend_from_slice(&noise);
            let _ = Metadata::from_bytes(&blob.bytes);
        }
    }
}

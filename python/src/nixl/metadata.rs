//! What agents give each other: our metadata of the agent, and which addresses its regions have.
//!
//! Layout, all integers little-endian: `"BPNX"`, version u8, contents u8 (1: how to connect, 2: all
//! sections), epoch u64, length of the name u16, name, length of the agent's metadata u32, that
//! metadata, number of sections u32, sections of 33 bytes (kind of memory u8, device u64, first
//! address u64, length u64, region u64), CRC-32C of everything before u32.

use blockplane_transfer::{Metadata, RegionId};

use super::error::Fault;
use super::kinds::Memory;
use super::table::Section;

const MAGIC: &[u8; 4] = b"BPNX";
const VERSION: u8 = 1;
const CONNECTION: u8 = 1;
const COMPLETE: u8 = 2;
const SECTION_BYTES: usize = 33;
/// Larger ones are refused before anything else is looked at.
pub(super) const BYTES_MAX: usize = 32 << 20;

/// Metadata of an agent.
#[derive(Clone, Debug)]
pub(super) struct Blob {
    pub(super) name: String,
    /// The life of the agent that it is of.
    pub(super) epoch: u64,
    /// How to connect, if it says.
    pub(super) agent: Option<Metadata>,
    /// Whether it names all sections that the agent has.
    pub(super) complete: bool,
    pub(super) sections: Vec<Section<RegionId>>,
}

impl Blob {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let agent = self.agent.as_ref().map(Metadata::to_bytes);
        let agent = agent.unwrap_or_default();
        let mut bytes = Vec::with_capacity(64 + agent.len() + self.sections.len() * SECTION_BYTES);
        bytes.extend_from_slice(MAGIC);
        let connection = if self.agent.is_some() { CONNECTION } else { 0 };
        let complete = if self.complete { COMPLETE } else { 0 };
        bytes.extend_from_slice(&[VERSION, connection | complete]);
        bytes.extend_from_slice(&self.epoch.to_le_bytes());
        // Agents have names of up to 255 bytes, and metadata of up to 16 MiB.
        let short = u16::try_from(self.name.len()).unwrap_or(u16::MAX);
        bytes.extend_from_slice(&short.to_le_bytes());
        bytes.extend_from_slice(self.name.as_bytes());
        for (count, content) in [(agent.len(), &agent[..]), (self.sections.len(), &[])] {
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            bytes.extend_from_slice(&count.to_le_bytes());
            bytes.extend_from_slice(content);
        }
        for section in &self.sections {
            bytes.push(section.memory.code());
            for number in [
                section.device,
                section.start,
                section.bytes,
                section.target.0,
            ] {
                bytes.extend_from_slice(&number.to_le_bytes());
            }
        }
        let checksum = crc32c::crc32c(&bytes);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads metadata. Safe on any input: nothing is allocated beyond a small multiple of its length.
    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, Fault> {
        let bad =
            |what: &str| Fault::Mismatch(format!("metadata of {} bytes: {what}", bytes.len()));
        let short = || bad("it is cut off");
        if bytes.len() > BYTES_MAX {
            return Err(bad("accepted: up to 32 MiB"));
        }
        if bytes.get(..4) != Some(MAGIC) {
            return Err(bad(
                "not of this package; both sides need the same one (NIXL's own packages have another format)",
            ));
        }
        let (body, checksum) = bytes.split_last_chunk::<4>().ok_or_else(short)?;
        if crc32c::crc32c(body) != u32::from_le_bytes(*checksum) {
            return Err(bad("its checksum does not fit"));
        }
        let mut reader = Reader(&body[4..]);
        let [version, contents] = reader.array().ok_or_else(short)?;
        if version != VERSION {
            return Err(bad(&format!(
                "version {version}; this build reads {VERSION}"
            )));
        }
        let epoch = u64::from_le_bytes(reader.array().ok_or_else(short)?);
        let name = u16::from_le_bytes(reader.array().ok_or_else(short)?);
        let name = reader.take(name.into()).ok_or_else(short)?;
        let name = str::from_utf8(name).map_err(|_| bad("the name is not text"))?;
        if name.is_empty() || name.len() > 255 {
            return Err(bad("the name has no bytes, or more than 255"));
        }
        let agent = reader.counted().ok_or_else(short)?;
        let agent = if contents & CONNECTION == 0 {
            None
        } else {
            let agent = Metadata::from_bytes(agent).map_err(|error| bad(&error.to_string()))?;
            if agent.name() != name || agent.epoch() != epoch {
                return Err(bad("it is of two agents"));
            }
            Some(agent)
        };
        let count = u32::from_le_bytes(reader.array().ok_or_else(short)?);
        let count = usize::try_from(count).map_err(|_| short())?;
        let (sections, rest) = reader.0.as_chunks::<SECTION_BYTES>();
        if !rest.is_empty() || sections.len() != count {
            return Err(bad("its length is not that of its sections"));
        }
        let sections = sections.iter().map(section).collect::<Option<_>>();
        Ok(Self {
            name: name.to_owned(),
            epoch,
            agent,
            complete: contents & COMPLETE != 0,
            sections: sections
                .ok_or_else(|| bad("a section is of no known kind, or beyond all addresses"))?,
        })
    }
}

fn section(bytes: &[u8; SECTION_BYTES]) -> Option<Section<RegionId>> {
    let (numbers, _) = bytes[1..].as_chunks::<8>();
    let number = |at: usize| u64::from_le_bytes(numbers[at]);
    let section = Section {
        memory: Memory::from_code(bytes[0])?,
        device: number(0),
        start: number(1),
        bytes: number(2),
        target: RegionId(number(3)),
    };
    let real = section.bytes > 0 && section.start.checked_add(section.bytes).is_some();
    real.then_some(section)
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, bytes: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(bytes)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn counted(&mut self) -> Option<&'a [u8]> {
        let count = u32::from_le_bytes(self.array()?);
        self.take(usize::try_from(count).ok()?)
    }
}

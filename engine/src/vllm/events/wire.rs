//! The payload of a KV event message: what vLLM says of its blocks.
//!
//! ```text
//! batch         [ts, [event ...], dp_rank]                     dp_rank may be absent or nil
//! event         {"type": tag, field: value ...}                vLLM 0.26 and later
//!               [tag, value ...]                               before; values in the order below
//! BlockStored   block_hashes parent_block_hash token_ids block_size lora_id medium lora_name
//!               extra_keys group_idx kv_cache_spec_kind
//! BlockRemoved  block_hashes medium group_idx
//! AllBlocksCleared
//! ```
//!
//! Fields that are not known are passed over, and so are events with an unknown tag: a newer vLLM may
//! have more to say. Source: `vllm/distributed/kv_events.py` of 0.10 to 0.32.

use blockplane_protocol::{Tier, TokenId};

use super::msgpack::{FormError, Item, Reader, Sign, wrong};

/// Events in one batch at most.
const EVENTS_MAX: usize = 1 << 18;

/// What vLLM publishes at once: the changes of one step.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Seconds since 1970, by vLLM's clock.
    pub seconds: f64,
    /// The changes, in order.
    pub events: Vec<Event>,
    /// The data-parallel rank that says so, if it does.
    pub rank: Option<u32>,
}

/// One change.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Blocks of one sequence can be reused.
    Stored(Stored),
    /// Blocks are gone.
    Removed(Removed),
    /// The whole prefix cache is gone.
    Cleared,
    /// Something that this version does not know.
    Unknown,
}

/// vLLM's own name of a block: 64 bits, or the last 64 of a longer digest, as vLLM itself shortens it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EngineHash(pub u64);

/// Blocks that follow one another.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stored {
    /// Their names.
    pub hashes: Vec<EngineHash>,
    /// The block before them; `None` at the start of a sequence.
    pub parent: Option<EngineHash>,
    /// Their tokens, one block after another.
    pub tokens: Vec<TokenId>,
    /// Tokens of one block; 0 when the event does not say what is in the block.
    pub block_tokens: u32,
    /// The adapter they were computed with.
    pub lora_name: Option<String>,
    /// An adapter known by its number only, as by vLLM before 0.12.
    pub lora_id: Option<u32>,
    /// Where they are.
    pub medium: Medium,
    /// What else went into the name of each block; empty or as long as `hashes`.
    pub extra_keys: Vec<Extra>,
    /// Which of the model's KV caches they are of.
    pub group: Option<u32>,
    /// How that cache's layers attend.
    pub kind: GroupKind,
}

/// Blocks that are gone from a medium.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Their names.
    pub hashes: Vec<EngineHash>,
    /// Where they were.
    pub medium: Medium,
    /// Which of the model's KV caches they are of.
    pub group: Option<u32>,
}

/// Where vLLM keeps a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Medium {
    /// `GPU`, also of vLLM on a CPU, and what is said of nothing.
    #[default]
    Device,
    /// `CPU`.
    Host,
    /// `STORAGE`, `FS`, `DISK`, `SSD`, `NVME`.
    Disk,
    /// `OBJ` and everything else: it is somewhere, and further away than the rest.
    Remote,
}

/// How the layers of a group attend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum GroupKind {
    /// To every token before: a run of blocks from the start is a prefix that can be used.
    /// Also what older versions, which do not say, have.
    #[default]
    Prefix,
    /// To a window, a state, a chunk, an encoder. Their blocks are usable only together with those of
    /// a [`GroupKind::Prefix`] group, and leave earlier than it.
    Other,
}

/// What went into the name of a block besides its tokens and the block before it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extra {
    /// The texts: the adapter's name first, if there is one, then the cache salt, in the first block.
    pub texts: Vec<String>,
    /// It has content that its tokens do not tell: images, audio, embeddings.
    pub beyond_tokens: bool,
}

impl Batch {
    /// Reads a payload.
    ///
    /// # Errors
    /// When it is not of the form above.
    pub fn decode(payload: &[u8]) -> Result<Self, FormError> {
        let mut reader = Reader::new(payload);
        let fields = reader.array()?;
        if fields < 2 {
            return Err(wrong("an array of time, events and rank", "a shorter one"));
        }
        #[expect(
            clippy::cast_precision_loss,
            reason = "a time in whole seconds is exact in 53 bits"
        )]
        let seconds = match reader.item()? {
            Item::Float(seconds) => seconds,
            Item::Int(seconds, Sign::Positive) => seconds as f64,
            other => return Err(wrong("a time", other.kind())),
        };
        let count = reader.array()?;
        if count > EVENTS_MAX {
            return Err(FormError::Range {
                what: "the number of events",
            });
        }
        let mut events = Vec::with_capacity(reader.at_most(count));
        for _ in 0..count {
            events.push(Event::decode(&mut reader)?);
        }
        let rank = match fields {
            2 => None,
            _ => reader.optional_u32("the data-parallel rank")?,
        };
        for _ in 3..fields {
            reader.skip()?;
        }
        if !reader.is_at_end() {
            return Err(wrong("the end of the message", "more"));
        }
        Ok(Self {
            seconds,
            events,
            rank,
        })
    }
}

impl Medium {
    /// The tier of ours that it is.
    #[must_use]
    pub const fn tier(self) -> Tier {
        match self {
            Self::Device => Tier::Device,
            Self::Host => Tier::Host,
            Self::Disk => Tier::Disk,
            Self::Remote => Tier::Remote,
        }
    }

    fn named(name: Option<&str>) -> Self {
        let Some(name) = name else {
            return Self::Device;
        };
        // LMCache and others write a device's number behind it.
        let family = name.split([':', '_', ' ']).next().unwrap_or(name);
        match family.to_ascii_uppercase().as_str() {
            "GPU" | "XPU" | "HPU" | "TPU" | "NPU" => Self::Device,
            "CPU" => Self::Host,
            "STORAGE" | "FS" | "DISK" | "SSD" | "NVME" => Self::Disk,
            _ => Self::Remote,
        }
    }
}

impl GroupKind {
    fn named(name: Option<&str>) -> Self {
        match name {
            None | Some("full_attention" | "mla_attention" | "sink_full_attention") => Self::Prefix,
            Some(_) => Self::Other,
        }
    }
}

/// The fields of all events, by name, or by place in an array.
#[derive(Clone, Copy)]
enum Field {
    Hashes,
    Parent,
    Tokens,
    BlockTokens,
    LoraId,
    Medium,
    LoraName,
    ExtraKeys,
    Group,
    Kind,
    Unknown,
}

const STORED_IN_ORDER: [Field; 10] = [
    Field::Hashes,
    Field::Parent,
    Field::Tokens,
    Field::BlockTokens,
    Field::LoraId,
    Field::Medium,
    Field::LoraName,
    Field::ExtraKeys,
    Field::Group,
    Field::Kind,
];
const REMOVED_IN_ORDER: [Field; 3] = [Field::Hashes, Field::Medium, Field::Group];

impl Field {
    fn named(name: &str) -> Self {
        match name {
            "block_hashes" => Self::Hashes,
            "parent_block_hash" => Self::Parent,
            "token_ids" => Self::Tokens,
            "block_size" => Self::BlockTokens,
            "lora_id" => Self::LoraId,
            "medium" => Self::Medium,
            "lora_name" => Self::LoraName,
            "extra_keys" => Self::ExtraKeys,
            "group_idx" => Self::Group,
            "kv_cache_spec_kind" => Self::Kind,
            _ => Self::Unknown,
        }
    }
}

impl Event {
    fn decode(reader: &mut Reader<'_>) -> Result<Self, FormError> {
        match reader.item()? {
            Item::Map(len) => Self::from_map(reader, len),
            Item::Array(len) => Self::from_array(reader, len),
            other => Err(wrong("an event", other.kind())),
        }
    }

    /// The tag may come after the fields, so all of them are read into one shape.
    fn from_map(reader: &mut Reader<'_>, len: usize) -> Result<Self, FormError> {
        let mut tag = None;
        let mut fields = Stored::default();
        let mut seen_hashes = false;
        for _ in 0..len {
            match reader.text()? {
                "type" => tag = Some(reader.text()?),
                name => {
                    let field = Field::named(name);
                    seen_hashes |= matches!(field, Field::Hashes);
                    fields.read(reader, field)?;
                }
            }
        }
        let tag = tag.ok_or_else(|| wrong("an event with a type", "one without"))?;
        fields.into_event(tag, seen_hashes)
    }

    fn from_array(reader: &mut Reader<'_>, len: usize) -> Result<Self, FormError> {
        if len == 0 {
            return Err(wrong("an event with a tag", "an empty array"));
        }
        let tag = reader.text()?;
        let order: &[Field] = match tag {
            "BlockStored" => &STORED_IN_ORDER,
            "BlockRemoved" => &REMOVED_IN_ORDER,
            _ => &[],
        };
        let mut fields = Stored::default();
        for place in 0..len - 1 {
            let field = order.get(place).copied().unwrap_or(Field::Unknown);
            fields.read(reader, field)?;
        }
        fields.into_event(tag, len > 1)
    }
}

impl Stored {
    fn read(&mut self, reader: &mut Reader<'_>, field: Field) -> Result<(), FormError> {
        match field {
            Field::Hashes => self.hashes = hashes(reader)?,
            Field::Parent => self.parent = hash(reader.item()?)?,
            Field::Tokens => self.tokens = tokens(reader)?,
            Field::BlockTokens => self.block_tokens = reader.u32("the block size")?,
            Field::LoraId => self.lora_id = reader.optional_u32("the adapter's number")?,
            Field::Medium => self.medium = Medium::named(reader.optional_text()?),
            Field::LoraName => self.lora_name = reader.optional_text()?.map(str::to_owned),
            Field::ExtraKeys => self.extra_keys = extra_keys(reader)?,
            Field::Group => self.group = reader.optional_u32("the group's index")?,
            Field::Kind => self.kind = GroupKind::named(reader.optional_text()?),
            Field::Unknown => reader.skip()?,
        }
        Ok(())
    }

    fn into_event(self, tag: &str, seen_hashes: bool) -> Result<Event, FormError> {
        match tag {
            "BlockStored" | "BlockRemoved" if !seen_hashes => {
                Err(wrong("block_hashes", "an event without"))
            }
            "BlockStored" => Ok(Event::Stored(self)),
            "BlockRemoved" => Ok(Event::Removed(Removed {
                hashes: self.hashes,
                medium: self.medium,
                group: self.group,
            })),
            "AllBlocksCleared" => Ok(Event::Cleared),
            _ => Ok(Event::Unknown),
        }
    }
}

fn hashes(reader: &mut Reader<'_>) -> Result<Vec<EngineHash>, FormError> {
    let count = reader.array()?;
    let mut hashes = Vec::with_capacity(reader.at_most(count));
    for _ in 0..count {
        let hash = hash(reader.item()?)?;
        hashes.push(hash.ok_or_else(|| wrong("a block's name", "nil"))?);
    }
    Ok(hashes)
}

/// Numbers (older ones may be negative) and digests of any length.
fn hash(item: Item<'_>) -> Result<Option<EngineHash>, FormError> {
    match item {
        Item::Nil => Ok(None),
        Item::Int(value, _) => Ok(Some(EngineHash(value))),
        Item::Bin([]) | Item::Str([]) => Err(wrong("a block's name", "an empty one")),
        // Old msgpack writers have only texts.
        Item::Bin(digest) | Item::Str(digest) => {
            let last = &digest[digest.len().saturating_sub(8)..];
            let name = last
                .iter()
                .fold(0, |name, byte| name << 8 | u64::from(*byte));
            Ok(Some(EngineHash(name)))
        }
        other => Err(wrong("a block's name", other.kind())),
    }
}

fn tokens(reader: &mut Reader<'_>) -> Result<Vec<TokenId>, FormError> {
    let count = reader.array()?;
    let mut tokens = Vec::with_capacity(reader.at_most(count));
    for _ in 0..count {
        tokens.push(reader.u32("a token")?);
    }
    Ok(tokens)
}

/// Nil, or for each block nil or an array of what went into its name.
fn extra_keys(reader: &mut Reader<'_>) -> Result<Vec<Extra>, FormError> {
    let count = match reader.item()? {
        Item::Nil => return Ok(Vec::new()),
        Item::Array(count) => count,
        other => return Err(wrong("extra keys", other.kind())),
    };
    let mut blocks = Vec::with_capacity(reader.at_most(count));
    for _ in 0..count {
        blocks.push(extra(reader)?);
    }
    Ok(blocks)
}

/// A bare text is an adapter or a salt; a pair is a multimodal input and its place, and bytes are the
/// digest of embeddings.
fn extra(reader: &mut Reader<'_>) -> Result<Extra, FormError> {
    let mut extra = Extra::default();
    let count = match reader.item()? {
        Item::Nil => return Ok(extra),
        Item::Array(count) => count,
        other => return Err(wrong("the extra keys of a block", other.kind())),
    };
    for _ in 0..count {
        let mut next = reader.clone();
        match next.item()? {
            Item::Str(text) => {
                let text = str::from_utf8(text).map_err(|_| FormError::Utf8)?;
                extra.texts.push(text.to_owned());
            }
            Item::Nil => {}
            _ => extra.beyond_tokens = true,
        }
        reader.skip()?;
    }
    Ok(extra)
}

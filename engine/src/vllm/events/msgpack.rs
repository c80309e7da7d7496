//! `MessagePack`, as far as KV events need it: read in place, without trust in what it says.
//!
//! Format: the `MessagePack` specification. Nothing is allocated for a length that is only claimed,
//! and nothing recurses.

use rmp::Marker;

/// Items that one [`Reader::skip`] passes at most.
const SKIP_ITEMS_MAX: usize = 1 << 20;

/// Why bytes are not `MessagePack`, or not what was wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormError {
    /// They end within a value.
    #[error("the message ends in the middle of a value")]
    Short,
    /// Another type is due at this place.
    #[error("{wanted} is due and {found} came")]
    Type {
        /// What is due.
        wanted: &'static str,
        /// What came.
        found: &'static str,
    },
    /// A number does not fit.
    #[error("{what} is out of range")]
    Range {
        /// Which number.
        what: &'static str,
    },
    /// A text is not UTF-8.
    #[error("a text is not UTF-8")]
    Utf8,
    /// A value has more items than any event needs.
    #[error("a value has more than {SKIP_ITEMS_MAX} items")]
    Large,
}

/// One value; arrays and maps are followed by their items.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Item<'a> {
    Nil,
    Bool,
    /// Signed numbers in two's complement.
    Int(u64, Sign),
    Float(f64),
    Str(&'a [u8]),
    Bin(&'a [u8]),
    Array(usize),
    Map(usize),
    Extension,
}

/// How an [`Item::Int`] is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sign {
    Negative,
    Positive,
}

/// The place in a message.
#[derive(Clone, Debug)]
pub(super) struct Reader<'a> {
    left: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { left: bytes }
    }

    pub(super) fn item(&mut self) -> Result<Item<'a>, FormError> {
        let item = match Marker::from_u8(self.take::<1>()?[0]) {
            Marker::Null => Item::Nil,
            Marker::True | Marker::False => Item::Bool,
            Marker::FixPos(value) => positive(value),
            Marker::U8 => positive(self.take::<1>()?[0]),
            Marker::U16 => positive(u16::from_be_bytes(self.take()?)),
            Marker::U32 => positive(u32::from_be_bytes(self.take()?)),
            Marker::U64 => positive(u64::from_be_bytes(self.take()?)),
            Marker::FixNeg(value) => signed(value),
            Marker::I8 => signed(i8::from_be_bytes(self.take()?)),
            Marker::I16 => signed(i16::from_be_bytes(self.take()?)),
            Marker::I32 => signed(i32::from_be_bytes(self.take()?)),
            Marker::I64 => signed(i64::from_be_bytes(self.take()?)),
            Marker::F32 => Item::Float(f32::from_be_bytes(self.take()?).into()),
            Marker::F64 => Item::Float(f64::from_be_bytes(self.take()?)),
            Marker::FixStr(len) => Item::Str(self.bytes(len.into())?),
            Marker::Str8 => Item::Str(self.counted::<1>()?),
            Marker::Str16 => Item::Str(self.counted::<2>()?),
            Marker::Str32 => Item::Str(self.counted::<4>()?),
            Marker::Bin8 => Item::Bin(self.counted::<1>()?),
            Marker::Bin16 => Item::Bin(self.counted::<2>()?),
            Marker::Bin32 => Item::Bin(self.counted::<4>()?),
            Marker::FixArray(len) => Item::Array(len.into()),
            Marker::Array16 => Item::Array(self.count::<2>()?),
            Marker::Array32 => Item::Array(self.count::<4>()?),
            Marker::FixMap(len) => Item::Map(len.into()),
            Marker::Map16 => Item::Map(self.count::<2>()?),
            Marker::Map32 => Item::Map(self.count::<4>()?),
            Marker::FixExt1 => self.extension(1)?,
            Marker::FixExt2 => self.extension(2)?,
            Marker::FixExt4 => self.extension(4)?,
            Marker::FixExt8 => self.extension(8)?,
            Marker::FixExt16 => self.extension(16)?,
            Marker::Ext8 => self.counted_extension::<1>()?,
            Marker::Ext16 => self.counted_extension::<2>()?,
            Marker::Ext32 => self.counted_extension::<4>()?,
            Marker::Reserved => return Err(wrong("a value", "a byte that starts none")),
        };
        Ok(item)
    }

    /// Passes one value with all that is in it.
    pub(super) fn skip(&mut self) -> Result<(), FormError> {
        let (mut due, mut passed) = (1_usize, 0_usize);
        while due > 0 {
            due -= 1;
            passed += 1;
            due = match self.item()? {
                Item::Array(len) => due.saturating_add(len),
                Item::Map(len) => due.saturating_add(len.saturating_mul(2)),
                _ => due,
            };
            if passed > SKIP_ITEMS_MAX {
                return Err(FormError::Large);
            }
        }
        Ok(())
    }

    pub(super) fn array(&mut self) -> Result<usize, FormError> {
        match self.item()? {
            Item::Array(len) => Ok(len),
            other => Err(wrong("an array", other.kind())),
        }
    }

    pub(super) fn text(&mut self) -> Result<&'a str, FormError> {
        self.optional_text()?.ok_or_else(|| wrong("a text", "nil"))
    }

    pub(super) fn optional_text(&mut self) -> Result<Option<&'a str>, FormError> {
        match self.item()? {
            Item::Nil => Ok(None),
            Item::Str(text) => str::from_utf8(text).map(Some).map_err(|_| FormError::Utf8),
            other => Err(wrong("a text", other.kind())),
        }
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32, FormError> {
        let found = self.optional_u32(what)?;
        found.ok_or_else(|| wrong("a number", "nil"))
    }

    pub(super) fn optional_u32(&mut self, what: &'static str) -> Result<Option<u32>, FormError> {
        match self.item()? {
            Item::Nil => Ok(None),
            Item::Int(value, Sign::Positive) => match u32::try_from(value) {
                Ok(value) => Ok(Some(value)),
                Err(_) => Err(FormError::Range { what }),
            },
            Item::Int(_, Sign::Negative) => Err(FormError::Range { what }),
            other => Err(wrong("a number", other.kind())),
        }
    }

    /// Whether every byte was read.
    pub(super) fn is_at_end(&self) -> bool {
        self.left.is_empty()
    }

    /// A bound of what a claimed number of items can allocate: each takes at least a byte.
    pub(super) fn at_most(&self, claimed: usize) -> usize {
        claimed.min(self.left.len())
    }

    fn bytes(&mut self, len: usize) -> Result<&'a [u8], FormError> {
        let (bytes, left) = self.left.split_at_checked(len).ok_or(FormError::Short)?;
        self.left = left;
        Ok(bytes)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], FormError> {
        let (bytes, left) = self.left.split_first_chunk().ok_or(FormError::Short)?;
        self.left = left;
        Ok(*bytes)
    }

    fn count<const N: usize>(&mut self) -> Result<usize, FormError> {
        let bytes: [u8; N] = self.take()?;
        let count = bytes
            .iter()
            .fold(0_u32, |sum, byte| sum << 8 | u32::from(*byte));
        usize::try_from(count).map_err(|_| FormError::Range { what: "a length" })
    }

    fn counted<const N: usize>(&mut self) -> Result<&'a [u8], FormError> {
        let len = self.count::<N>()?;
        self.bytes(len)
    }

    fn extension(&mut self, len: usize) -> Result<Item<'a>, FormError> {
        self.take::<1>()?;
        self.bytes(len)?;
        Ok(Item::Extension)
    }

    fn counted_extension<const N: usize>(&mut self) -> Result<Item<'a>, FormError> {
        let len = self.count::<N>()?;
        self.extension(len)
    }
}

impl Item<'_> {
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Nil => "nil",
            Self::Bool => "a truth value",
            Self::Int(..) => "a whole number",
            Self::Float(_) => "a fraction",
            Self::Str(_) => "a text",
            Self::Bin(_) => "bytes",
            Self::Array(_) => "an array",
            Self::Map(_) => "a map",
            Self::Extension => "an extension",
        }
    }
}

pub(super) fn wrong(wanted: &'static str, found: &'static str) -> FormError {
    FormError::Type { wanted, found }
}

fn positive<'a>(value: impl Into<u64>) -> Item<'a> {
    Item::Int(value.into(), Sign::Positive)
}

fn signed<'a>(value: impl Into<i64>) -> Item<'a> {
    let value = value.into();
    let sign = if value < 0 {
        Sign::Negative
    } else {
        Sign::Positive
    };
    Item::Int(value.cast_unsigned(), sign)
}

//! What callers hand in: numpy arrays by their array interface, lists of tuples, lists of numbers,
//! text or bytes.

use std::ops::Deref;

use pyo3::Borrowed;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyString, PyTuple};

use super::error::Fault;
use super::rows::Rows;

/// Numbers of a descriptor: address, length, device.
pub(super) type Row = [u64; 3];

/// The memory of an array, valid as long as the array is held and Python is attached.
struct Array {
    data: *const u8,
    rows: usize,
    columns: usize,
    /// Bytes from one row to the next, and from one column to the next.
    strides: (isize, isize),
    item: Item,
}

/// Kinds of whole numbers that are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Item {
    I32,
    U32,
    I64,
    U64,
}

impl Item {
    fn of(typestr: &str) -> Option<Self> {
        // Of this machine's byte order: "<" here, "=" and "|" do not occur for these widths.
        let native = if cfg!(target_endian = "little") {
            '<'
        } else {
            '>'
        };
        match typestr.strip_prefix(native)? {
            "i4" => Some(Self::I32),
            "u4" => Some(Self::U32),
            "i8" => Some(Self::I64),
            "u8" => Some(Self::U64),
            _ => None,
        }
    }

    const fn bytes(self) -> isize {
        match self {
            Self::I32 | Self::U32 => 4,
            Self::I64 | Self::U64 => 8,
        }
    }
}

impl Array {
    /// The array interface of an object; none when it has none.
    fn of(object: &Bound<'_, PyAny>) -> PyResult<Option<Self>> {
        let py = object.py();
        let Some(interface) = object.getattr_opt(pyo3::intern!(py, "__array_interface__"))? else {
            return Ok(None);
        };
        let interface = interface.cast_into::<PyDict>()?;
        let field = |name: &str| {
            interface
                .get_item(name)?
                .ok_or_else(|| PyTypeError::new_err(format!("array interface without {name}")))
        };
        let (address, _): (usize, bool) = field("data")?.extract()?;
        let typestr = field("typestr")?;
        let typestr: &str = &typestr.extract::<std::borrow::Cow<'_, str>>()?;
        let item = Item::of(typestr).ok_or_else(|| {
            PyTypeError::new_err(format!(
                "array of {typestr:?}; accepted: 32-bit and 64-bit whole numbers of this machine"
            ))
        })?;
        let shape: Vec<usize> = field("shape")?.extract()?;
        let (rows, columns) = match shape[..] {
            [rows] => (rows, 1),
            [rows, columns] => (rows, columns),
            _ => {
                let dimensions = shape.len();
                return Err(PyValueError::new_err(format!(
                    "array of {dimensions} dimensions; accepted: 1 or 2"
                )));
            }
        };
        let width = item.bytes();
        let across = isize::try_from(columns).unwrap_or(isize::MAX);
        let strides: Option<Vec<isize>> = match interface.get_item("strides")? {
            Some(strides) => strides.extract()?,
            None => None,
        };
        let strides = match strides.as_deref() {
            None => (across.saturating_mul(width), width),
            Some([row]) => (*row, width),
            Some([row, column]) => (*row, *column),
            Some(_) => return Err(PyValueError::new_err("strides do not fit the shape")),
        };
        Ok(Some(Self {
            data: std::ptr::with_exposed_provenance(address),
            rows,
            columns,
            strides,
            item,
        }))
    }

    /// One number, as 64 bits; negative ones are sign-extended.
    ///
    /// # Safety
    /// Row and column are within the shape, and the array is alive.
    unsafe fn at(&self, row: usize, column: usize) -> u64 {
        let steps = |count: usize, stride: isize| count.cast_signed().wrapping_mul(stride);
        let offset = steps(row, self.strides.0).wrapping_add(steps(column, self.strides.1));
        let at = self.data.wrapping_offset(offset);
        match self.item {
            // SAFETY: an element of a live array; arrays may be unaligned.
            Item::I32 => i64::from(unsafe { at.cast::<i32>().read_unaligned() }).cast_unsigned(),
            // SAFETY: as above.
            Item::U32 => unsafe { at.cast::<u32>().read_unaligned() }.into(),
            // SAFETY: as above.
            Item::I64 | Item::U64 => unsafe { at.cast::<u64>().read_unaligned() },
        }
    }

    /// Elements that lie one after another, as a slice.
    ///
    /// # Safety
    /// `T` is as long as an item, the array is alive and nobody writes to it meanwhile.
    unsafe fn slice<T>(&self) -> Option<&[T]> {
        let width = self.item.bytes();
        let across = self.columns.cast_signed().wrapping_mul(width);
        let dense = (self.columns == 1 || self.strides.1 == width)
            && (self.rows <= 1 || self.strides.0 == across);
        let data = self.data.cast::<T>();
        let empty = self.rows == 0 || self.columns == 0;
        // SAFETY: dense elements of a live array, by the contract of this function.
        (dense && !empty && data.is_aligned())
            .then(|| unsafe { std::slice::from_raw_parts(data, self.rows * self.columns) })
    }
}

/// Descriptors from an array of rows with `N` numbers; none when the object is no array.
pub(super) fn rows_of_array<const N: usize>(
    object: &Bound<'_, PyAny>,
) -> PyResult<Option<Vec<[u64; N]>>> {
    let Some(array) = Array::of(object)? else {
        return Ok(None);
    };
    if array.columns != N && array.rows > 0 {
        let (rows, columns) = (array.rows, array.columns);
        return Err(PyValueError::new_err(format!(
            "array of shape ({rows}, {columns}); accepted: (N, {N})"
        )));
    }
    if matches!(array.item, Item::I64 | Item::U64) {
        // SAFETY: items are 64 bits wide; Python is attached, and `object` holds the array.
        if let Some(numbers) = unsafe { array.slice::<u64>() } {
            return Ok(Some(numbers.as_chunks::<N>().0.to_vec()));
        }
    }
    let row = |row| {
        // SAFETY: within the shape; `object` holds the array.
        std::array::from_fn(|column| unsafe { array.at(row, column) })
    };
    Ok(Some((0..array.rows).map(row).collect()))
}

/// Descriptors of a transfer from an array of rows with three numbers; none when the object is no array.
pub(super) fn shared_rows(object: &Bound<'_, PyAny>) -> PyResult<Option<Rows>> {
    if let Some(array) = Array::of(object)?
        && array.columns == 3
        && matches!(array.item, Item::I64 | Item::U64)
    {
        // SAFETY: items are 64 bits wide; Python is attached, and `object` holds the array.
        if let Some(numbers) = unsafe { array.slice::<u64>() } {
            return Ok(Some(Rows::of_array(numbers.as_chunks::<3>().0)));
        }
    }
    Ok(rows_of_array::<3>(object)?.map(Rows::from))
}

/// Descriptors from a list of tuples of three numbers.
pub(super) fn rows_of_list(list: &Bound<'_, PyList>) -> PyResult<Vec<Row>> {
    let mut rows = Vec::with_capacity(list.len());
    for item in list.iter() {
        rows.push(row_of(&item)?);
    }
    Ok(rows)
}

/// One descriptor of three numbers.
pub(super) fn row_of(item: &Bound<'_, PyAny>) -> PyResult<Row> {
    let tuple = item.cast::<PyTuple>()?;
    if tuple.len() != 3 {
        return Err(PyValueError::new_err(
            "Each descriptor tuple must have exactly 3 elements",
        ));
    }
    let number = |at| tuple.get_borrowed_item(at)?.extract::<u64>();
    Ok([number(0)?, number(1)?, number(2)?])
}

/// One descriptor of three numbers and something at the end.
pub(super) fn row_and_more<'py>(item: &Bound<'py, PyAny>) -> PyResult<(Row, Bound<'py, PyAny>)> {
    let tuple = item.cast::<PyTuple>()?;
    if tuple.len() != 4 {
        return Err(PyValueError::new_err(
            "Each descriptor tuple must have exactly 4 elements",
        ));
    }
    let number = |at| tuple.get_borrowed_item(at)?.extract::<u64>();
    Ok(([number(0)?, number(1)?, number(2)?], tuple.get_item(3)?))
}

/// Indices of descriptors, from an array or any sequence of numbers.
pub(super) fn indices(object: &Bound<'_, PyAny>, side: &str) -> PyResult<Vec<u32>> {
    let bad = |at: usize, value: i64| {
        Fault::Invalid(format!(
            "{side} index {value} at position {at} is out of range"
        ))
    };
    let narrow = |at: usize, value: i64| u32::try_from(value).map_err(|_| bad(at, value));
    if let Ok(list) = object.cast::<PyList>() {
        let mut indices = Vec::with_capacity(list.len());
        for (at, item) in list.iter().enumerate() {
            indices.push(narrow(at, item.extract()?)?);
        }
        return Ok(indices);
    }
    let Some(array) = Array::of(object)? else {
        let mut indices = Vec::new();
        for (at, item) in object.try_iter()?.enumerate() {
            indices.push(narrow(at, item?.extract()?)?);
        }
        return Ok(indices);
    };
    if array.columns != 1 {
        return Err(PyValueError::new_err(format!(
            "{side} indices have 2 dimensions; accepted: 1"
        )));
    }
    let negative = |indices: &[u32]| indices.iter().position(|&index| index > i32::MAX as u32);
    match array.item {
        Item::I32 | Item::U32 => {
            // SAFETY: items are 32 bits wide; Python is attached, and `object` holds the array.
            if let Some(numbers) = unsafe { array.slice::<u32>() } {
                return match negative(numbers) {
                    Some(at) => Err(bad(at, i64::from(numbers[at].cast_signed())).into()),
                    None => Ok(numbers.to_vec()),
                };
            }
        }
        Item::I64 | Item::U64 => {
            // SAFETY: as above, 64 bits.
            if let Some(numbers) = unsafe { array.slice::<i64>() } {
                let all = numbers.iter().fold(0, |all, number| all | number);
                if (0..=i64::from(i32::MAX)).contains(&all) {
                    let narrowed = numbers.iter().map(|&n| u32::try_from(n).unwrap_or(0));
                    return Ok(narrowed.collect());
                }
            }
        }
    }
    // SAFETY: within the shape; `object` holds the array.
    let number = |row| unsafe { array.at(row, 0) }.cast_signed();
    (0..array.rows)
        .map(|at| narrow(at, number(at)).map_err(PyErr::from))
        .collect()
}

/// A name: text, or bytes of it, as agents are named by what `loadRemoteMD` returns.
pub(super) struct Name(pub(super) String);

impl FromPyObject<'_, '_> for Name {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        if let Ok(bytes) = object.cast::<PyBytes>() {
            return Ok(Self(String::from_utf8(bytes.as_bytes().to_vec())?));
        }
        Ok(Self(object.cast::<PyString>()?.to_cow()?.into_owned()))
    }
}

impl Deref for Name {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl Name {
    pub(super) const fn none() -> Self {
        Self(String::new())
    }
}

/// A message: bytes as they are, text as UTF-8.
pub(super) fn message(object: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
    if let Ok(bytes) = object.cast::<PyBytes>() {
        return Ok(bytes.as_bytes().to_vec());
    }
    if let Ok(text) = object.cast::<PyString>() {
        return Ok(text.to_cow()?.as_bytes().to_vec());
    }
    object.extract::<Vec<u8>>()
}

//! The descriptor lists that callers build, index, compare and pickle.

use pyo3::exceptions::{PyIndexError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};

use super::error::Fault;
use super::input::{self, Row};
use super::kinds::Memory;
use super::rows::Rows;

/// Bytes of a row in a pickle.
const ROW_BYTES: usize = 24;

fn encode_row(to: &mut Vec<u8>, row: &Row) {
    for number in row {
        to.extend_from_slice(&number.to_le_bytes());
    }
}

fn decode_row(bytes: &[u8; ROW_BYTES]) -> Row {
    let (numbers, _) = bytes.as_chunks::<8>();
    std::array::from_fn(|at| u64::from_le_bytes(numbers[at]))
}

/// Bytes behind a row, with their number in front.
fn encode_tail(to: &mut Vec<u8>, tail: &[u8]) {
    to.extend_from_slice(&(tail.len() as u64).to_le_bytes());
    to.extend_from_slice(tail);
}

/// A row with bytes behind it.
type Tailed = (Row, Vec<u8>);

/// The kind of memory, and rows with bytes behind each.
fn decode_tailed(state: &[u8]) -> PyResult<(Memory, Vec<Tailed>)> {
    let (code, mut rest) = state.split_first().ok_or_else(no_state)?;
    let memory = Memory::from_code(*code).ok_or_else(no_state)?;
    let mut rows = Vec::new();
    while !rest.is_empty() {
        let (row, after) = rest.split_first_chunk::<ROW_BYTES>().ok_or_else(no_state)?;
        let (len, after) = after.split_first_chunk::<8>().ok_or_else(no_state)?;
        let len = usize::try_from(u64::from_le_bytes(*len)).map_err(|_| no_state())?;
        let (tail, after) = after.split_at_checked(len).ok_or_else(no_state)?;
        rows.push((decode_row(row), tail.to_vec()));
        rest = after;
    }
    Ok((memory, rows))
}

fn no_state() -> PyErr {
    PyValueError::new_err("this is not the state of a descriptor list")
}

fn out_of_range(at: isize, len: usize) -> PyErr {
    PyIndexError::new_err(format!("index {at}; the list has {len} descriptors"))
}

fn within(at: isize, len: usize) -> PyResult<usize> {
    usize::try_from(at)
        .ok()
        .filter(|&at| at < len)
        .ok_or_else(|| out_of_range(at, len))
}

/// The number of empty rows that a list begins with, where the constructor got a number.
fn initial(descs: &Bound<'_, PyAny>) -> PyResult<usize> {
    const ROWS_MAX: usize = 1 << 31;
    let rows: usize = descs.extract().map_err(|_| {
        PyTypeError::new_err("descriptors are a list of tuples or an array of shape (N, 3)")
    })?;
    if rows >= ROWS_MAX {
        return Err(PyValueError::new_err(format!(
            "{rows} descriptors; accepted: below 2^31"
        )));
    }
    Ok(rows)
}

/// Descriptors of a transfer: address, length, device.
#[pyclass(name = "nixlXferDList", module = "nixl._bindings", eq)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct XferList {
    pub(super) memory: Memory,
    pub(super) rows: Rows,
}

#[pymethods]
impl XferList {
    #[new]
    #[pyo3(signature = (r#type=Memory::Dram, descs=None, sorted=false))]
    fn new(r#type: Memory, descs: Option<&Bound<'_, PyAny>>, sorted: bool) -> PyResult<Self> {
        // Of older versions of the interface; order does not matter.
        let _ = sorted;
        let rows = match descs {
            None => Rows::default(),
            Some(descs) => match descs.cast::<PyList>() {
                Ok(list) => input::rows_of_list(list)?.into(),
                Err(_) => match input::shared_rows(descs)? {
                    Some(rows) => rows,
                    None => vec![[0; 3]; initial(descs)?].into(),
                },
            },
        };
        Ok(Self {
            memory: r#type,
            rows,
        })
    }

    #[pyo3(name = "getType")]
    const fn kind(&self) -> Memory {
        self.memory
    }

    #[pyo3(name = "descCount")]
    fn count(&self) -> usize {
        self.rows.len()
    }

    #[pyo3(name = "isEmpty")]
    fn is_empty(&self) -> bool {
        self.rows.len() == 0
    }

    fn __getitem__<'py>(&self, py: Python<'py>, at: isize) -> PyResult<Bound<'py, PyTuple>> {
        let [address, bytes, device] = self.rows[within(at, self.rows.len())?];
        (address, bytes, device).into_pyobject(py)
    }

    fn __setitem__(&mut self, at: isize, desc: &Bound<'_, PyAny>) -> PyResult<()> {
        let at = within(at, self.rows.len())?;
        self.rows.make_mut()[at] = input::row_of(desc)?;
        Ok(())
    }

    #[pyo3(name = "addDesc")]
    fn add(&mut self, desc: &Bound<'_, PyAny>) -> PyResult<()> {
        self.rows.make_mut().push(input::row_of(desc)?);
        Ok(())
    }

    fn append(&mut self, desc: &Bound<'_, PyAny>) -> PyResult<()> {
        self.add(desc)
    }

    fn index(&self, desc: &Bound<'_, PyAny>) -> PyResult<usize> {
        let row = input::row_of(desc)?;
        let found = self.rows.iter().position(|known| *known == row);
        Ok(found.ok_or_else(|| Fault::NotFound(format!("{row:?} is not in the list")))?)
    }

    #[pyo3(name = "remDesc")]
    fn remove(&mut self, at: isize) -> PyResult<()> {
        let at = within(at, self.rows.len())?;
        self.rows.make_mut().remove(at);
        Ok(())
    }

    fn clear(&mut self) {
        self.rows = Rows::default();
    }

    fn print(&self, py: Python<'_>) -> PyResult<()> {
        print(py, &self.__repr__())
    }

    fn __repr__(&self) -> String {
        let rows: Vec<String> = self.rows.iter().take(SHOWN).map(show).collect();
        described("nixlXferDList", self.memory, self.rows.len(), &rows)
    }

    fn __getstate__<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let mut state = Vec::with_capacity(1 + self.rows.len() * ROW_BYTES);
        state.push(self.memory.code());
        self.rows.iter().for_each(|row| encode_row(&mut state, row));
        PyBytes::new(py, &state)
    }

    fn __setstate__(&mut self, state: &[u8]) -> PyResult<()> {
        let (code, rows) = state.split_first().ok_or_else(no_state)?;
        let (rows, rest) = rows.as_chunks::<ROW_BYTES>();
        if !rest.is_empty() {
            return Err(no_state());
        }
        self.memory = Memory::from_code(*code).ok_or_else(no_state)?;
        self.rows = rows.iter().map(decode_row).collect::<Vec<_>>().into();
        Ok(())
    }
}

/// Descriptors of memory to register: address, length, device, and what the owner says about it.
#[pyclass(name = "nixlRegDList", module = "nixl._bindings", eq)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RegList {
    pub(super) memory: Memory,
    pub(super) rows: Vec<Row>,
    /// As long as `rows`.
    pub(super) infos: Vec<Vec<u8>>,
}

/// The information at the end of a tuple; numbers are taken as text.
fn info(object: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
    match input::message(object) {
        Ok(bytes) => Ok(bytes),
        Err(_) => Ok(object.str()?.to_cow()?.as_bytes().to_vec()),
    }
}

#[pymethods]
impl RegList {
    #[new]
    #[pyo3(signature = (r#type=Memory::Dram, descs=None, sorted=false))]
    fn new(r#type: Memory, descs: Option<&Bound<'_, PyAny>>, sorted: bool) -> PyResult<Self> {
        // Of older versions of the interface; order does not matter.
        let _ = sorted;
        let mut list = Self {
            memory: r#type,
            rows: Vec::new(),
            infos: Vec::new(),
        };
        let Some(descs) = descs else {
            return Ok(list);
        };
        if let Ok(tuples) = descs.cast::<PyList>() {
            for item in tuples.iter() {
                list.add(&item)?;
            }
        } else {
            list.rows = match input::rows_of_array::<3>(descs)? {
                Some(rows) => rows,
                None => vec![[0; 3]; initial(descs)?],
            };
            list.infos = vec![Vec::new(); list.rows.len()];
        }
        Ok(list)
    }

    #[pyo3(name = "getType")]
    const fn kind(&self) -> Memory {
        self.memory
    }

    #[pyo3(name = "descCount")]
    const fn count(&self) -> usize {
        self.rows.len()
    }

    #[pyo3(name = "isEmpty")]
    const fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The same descriptors without what the owner says.
    fn trim(&self) -> XferList {
        XferList {
            memory: self.memory,
            rows: self.rows.clone().into(),
        }
    }

    fn __getitem__<'py>(&self, py: Python<'py>, at: isize) -> PyResult<Bound<'py, PyTuple>> {
        let at = within(at, self.rows.len())?;
        let [address, bytes, device] = self.rows[at];
        let info = PyBytes::new(py, &self.infos[at]);
        (address, bytes, device, info).into_pyobject(py)
    }

    fn __setitem__(&mut self, at: isize, desc: &Bound<'_, PyAny>) -> PyResult<()> {
        let at = within(at, self.rows.len())?;
        let (row, more) = input::row_and_more(desc)?;
        self.infos[at] = info(&more)?;
        self.rows[at] = row;
        Ok(())
    }

    #[pyo3(name = "addDesc")]
    fn add(&mut self, desc: &Bound<'_, PyAny>) -> PyResult<()> {
        let (row, more) = input::row_and_more(desc)?;
        self.infos.push(info(&more)?);
        self.rows.push(row);
        Ok(())
    }

    fn append(&mut self, desc: &Bound<'_, PyAny>) -> PyResult<()> {
        self.add(desc)
    }

    fn index(&self, desc: &Bound<'_, PyAny>) -> PyResult<usize> {
        let (row, more) = input::row_and_more(desc)?;
        let info = info(&more)?;
        let mut known = self.rows.iter().zip(&self.infos);
        let found = known.position(|known| known == (&row, &info));
        Ok(found.ok_or_else(|| Fault::NotFound(format!("{row:?} is not in the list")))?)
    }

    #[pyo3(name = "remDesc")]
    fn remove(&mut self, at: isize) -> PyResult<()> {
        let at = within(at, self.rows.len())?;
        self.rows.remove(at);
        self.infos.remove(at);
        Ok(())
    }

    fn clear(&mut self) {
        self.rows.clear();
        self.infos.clear();
    }

    fn print(&self, py: Python<'_>) -> PyResult<()> {
        print(py, &self.__repr__())
    }

    fn __repr__(&self) -> String {
        let rows: Vec<String> = self.rows.iter().take(SHOWN).map(show).collect();
        described("nixlRegDList", self.memory, self.rows.len(), &rows)
    }

    fn __getstate__<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let mut state = vec![self.memory.code()];
        for (row, info) in self.rows.iter().zip(&self.infos) {
            encode_row(&mut state, row);
            encode_tail(&mut state, info);
        }
        PyBytes::new(py, &state)
    }

    fn __setstate__(&mut self, state: &[u8]) -> PyResult<()> {
        let (memory, rows) = decode_tailed(state)?;
        self.memory = memory;
        (self.rows, self.infos) = rows.into_iter().unzip();
        Ok(())
    }
}

/// Descriptors of several remote agents: address, length, device, agent.
#[pyclass(name = "nixlRemoteDList", module = "nixl._bindings", eq)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RemoteList {
    memory: Memory,
    rows: Vec<(Row, String)>,
}

fn remote_row(desc: &Bound<'_, PyAny>) -> PyResult<(Row, String)> {
    let (row, agent) = input::row_and_more(desc)?;
    let agent = String::from_utf8(input::message(&agent)?)?;
    Ok((row, agent))
}

#[pymethods]
impl RemoteList {
    #[new]
    #[pyo3(signature = (r#type=Memory::Dram, descs=None, sorted=false))]
    fn new(r#type: Memory, descs: Option<&Bound<'_, PyAny>>, sorted: bool) -> PyResult<Self> {
        // Of older versions of the interface; order does not matter.
        let _ = sorted;
        let rows = match descs {
            None => Vec::new(),
            Some(descs) => match descs.cast::<PyList>() {
                Ok(list) => list
                    .iter()
                    .map(|item| remote_row(&item))
                    .collect::<PyResult<_>>()?,
                Err(_) => vec![([0; 3], String::new()); initial(descs)?],
            },
        };
        Ok(Self {
            memory: r#type,
            rows,
        })
    }

    #[pyo3(name = "getType")]
    const fn kind(&self) -> Memory {
        self.memory
    }

    #[pyo3(name = "descCount")]
    const fn count(&self) -> usize {
        self.rows.len()
    }

    #[pyo3(name = "isEmpty")]
    const fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    fn __getitem__<'py>(&self, py: Python<'py>, at: isize) -> PyResult<Bound<'py, PyTuple>> {
        let ([address, bytes, device], agent) = &self.rows[within(at, self.rows.len())?];
        (address, bytes, device, agent).into_pyobject(py)
    }

    fn __setitem__(&mut self, at: isize, desc: &Bound<'_, PyAny>) -> PyResult<()> {
        let at = within(at, self.rows.len())?;
        self.rows[at] = remote_row(desc)?;
        Ok(())
    }

    #[pyo3(name = "addDesc")]
    fn add(&mut self, desc: &Bound<'_, PyAny>) -> PyResult<()> {
        self.rows.push(remote_row(desc)?);
        Ok(())
    }

    fn append(&mut self, desc: &Bound<'_, PyAny>) -> PyResult<()> {
        self.add(desc)
    }

    #[pyo3(name = "remDesc")]
    fn remove(&mut self, at: isize) -> PyResult<()> {
        self.rows.remove(within(at, self.rows.len())?);
        Ok(())
    }

    fn clear(&mut self) {
        self.rows.clear();
    }

    fn print(&self, py: Python<'_>) -> PyResult<()> {
        print(py, &self.__repr__())
    }

    fn __repr__(&self) -> String {
        let shown = self.rows.iter().take(SHOWN);
        let rows: Vec<String> = shown
            .map(|(row, agent)| format!("{} of {agent:?}", show(row)))
            .collect();
        described("nixlRemoteDList", self.memory, self.rows.len(), &rows)
    }

    fn __getstate__<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let mut state = vec![self.memory.code()];
        for (row, agent) in &self.rows {
            encode_row(&mut state, row);
            encode_tail(&mut state, agent.as_bytes());
        }
        PyBytes::new(py, &state)
    }

    fn __setstate__(&mut self, state: &[u8]) -> PyResult<()> {
        let (memory, rows) = decode_tailed(state)?;
        let named = rows.into_iter().map(|(row, agent)| {
            let agent = String::from_utf8(agent).map_err(|_| no_state())?;
            Ok((row, agent))
        });
        self.rows = named.collect::<PyResult<_>>()?;
        self.memory = memory;
        Ok(())
    }
}

/// Rows that are shown of a long list.
const SHOWN: usize = 16;

fn show([address, bytes, device]: &Row) -> String {
    format!("{bytes} bytes at {address:#x} on {device}")
}

fn described(name: &str, memory: Memory, len: usize, rows: &[String]) -> String {
    let more = if len > SHOWN { ", ..." } else { "" };
    format!(
        "<{name} {} {len}: {}{more}>",
        memory.label(),
        rows.join(", ")
    )
}

/// By Python's own `print`, so that whoever redirects its output gets this too.
fn print(py: Python<'_>, text: &str) -> PyResult<()> {
    py.import("builtins")?.call_method1("print", (text,))?;
    Ok(())
}

pub(super) fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<XferList>()?;
    module.add_class::<RegList>()?;
    module.add_class::<RemoteList>()
}

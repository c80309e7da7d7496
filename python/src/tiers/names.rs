//! Names of the blocks of one request.

use blockplane_kvbm::LookupRequest;
use blockplane_protocol::{BlockHash, SaltHash, SequenceHash, TokenBlock, TokenSequence};
use pyo3::{exceptions::PyValueError, prelude::*, types::PyBytes};

/// The names of the full blocks of a growing sequence of tokens.
#[pyclass(module = "blockplane._core")]
pub(crate) struct Names {
    sequence: TokenSequence,
}

#[pymethods]
impl Names {
    #[new]
    #[pyo3(signature = (block_tokens, *, cache_salt=None, lora_name=None, generation=0))]
    fn new(
        block_tokens: usize,
        cache_salt: Option<&str>,
        lora_name: Option<&str>,
        generation: u64,
    ) -> PyResult<Self> {
        if block_tokens == 0 {
            return Err(PyValueError::new_err(
                "block_tokens is 0; at least 1 is accepted",
            ));
        }
        let salt = SaltHash::new(cache_salt, lora_name).0;
        let salt = SaltHash(salt.wrapping_add(generation));
        Ok(Self {
            sequence: TokenSequence::new(block_tokens, salt),
        })
    }

    /// Appends tokens.
    #[expect(clippy::needless_pass_by_value, reason = "as Python hands it over")]
    fn extend(&mut self, tokens: Vec<u32>) {
        self.sequence.extend(&tokens);
    }

    /// Tokens so far.
    #[getter]
    fn tokens(&self) -> usize {
        self.sequence.len()
    }

    /// Tokens from `start` to `stop`.
    fn slice(&self, start: usize, stop: usize) -> PyResult<Vec<u32>> {
        let tokens = self.sequence.tokens().get(start..stop);
        tokens.map(<[u32]>::to_vec).ok_or_else(|| {
            let have = self.sequence.len();
            PyValueError::new_err(format!("tokens {start} to {stop} of {have}"))
        })
    }

    /// Full blocks so far.
    fn __len__(&self) -> usize {
        self.sequence.blocks().len()
    }

    /// Sequence hashes of the blocks from `start` to `stop`.
    fn hashes(&self, start: usize, stop: usize) -> PyResult<Vec<u64>> {
        Ok(self
            .range(start, stop)?
            .iter()
            .map(|b| b.sequence.0)
            .collect())
    }

    /// The blocks from `start` to `stop` and the name of the one before them, as bytes for the worker.
    fn pack<'py>(
        &self,
        py: Python<'py>,
        start: usize,
        stop: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let request = self.request(start, stop)?;
        Ok(PyBytes::new(py, &pack(&request)))
    }
}

impl Names {
    fn range(&self, start: usize, stop: usize) -> PyResult<&[TokenBlock]> {
        let blocks = self.sequence.blocks();
        blocks.get(start..stop).ok_or_else(|| {
            let have = blocks.len();
            PyValueError::new_err(format!("blocks {start} to {stop} of a sequence of {have}"))
        })
    }

    pub(super) fn request(&self, start: usize, stop: usize) -> PyResult<LookupRequest> {
        let names = self.range(start, stop)?.to_vec();
        let before = start.checked_sub(1);
        Ok(LookupRequest {
            parent: before.map(|at| self.sequence.blocks()[at].sequence),
            names,
            ..LookupRequest::default()
        })
    }
}

/// A byte that says whether there is a parent, the parent, then each block: its hash and that of the
/// sequence. Little-endian.
fn pack(request: &LookupRequest) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(9 + 16 * request.names.len());
    bytes.push(request.parent.is_some().into());
    bytes.extend(request.parent.map_or(0, |parent| parent.0).to_le_bytes());
    for name in &request.names {
        bytes.extend(name.block.0.to_le_bytes());
        bytes.extend(name.sequence.0.to_le_bytes());
    }
    bytes
}

/// The reverse of [`pack`].
pub(super) fn unpack(bytes: &[u8]) -> PyResult<LookupRequest> {
    let word = |at: usize| {
        let bytes = bytes.get(at..at + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    };
    let read = || {
        let parent = word(1)?;
        let names = bytes.get(9..)?;
        if !names.len().is_multiple_of(16) {
            return None;
        }
        let name = |at| {
            Some(TokenBlock {
                block: BlockHash(word(9 + 16 * at)?),
                sequence: SequenceHash(word(17 + 16 * at)?),
            })
        };
        Some(LookupRequest {
            parent: (bytes[0] == 1).then_some(SequenceHash(parent)),
            names: (0..names.len() / 16).map(name).collect::<Option<_>>()?,
            ..LookupRequest::default()
        })
    };
    read().ok_or_else(|| {
        let got = bytes.len();
        PyValueError::new_err(format!(
            "{got} bytes are not names of blocks made by Names.pack"
        ))
    })
}

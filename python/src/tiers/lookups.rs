//! The scheduler's side: what the tiers of a worker have.

use std::{path::PathBuf, time::Duration};

use blockplane_kvbm::{LookupClient, LookupRequest};
use pyo3::{exceptions::PyConnectionError, prelude::*};

use super::names::Names;

/// Asks the tiers of one worker, through its socket.
#[pyclass(module = "blockplane._core", frozen)]
pub(crate) struct Lookups {
    client: LookupClient,
}

#[pymethods]
impl Lookups {
    #[new]
    #[expect(clippy::needless_pass_by_value, reason = "as Python hands it over")]
    fn new(path: PathBuf) -> Self {
        Self {
            client: LookupClient::new(&path),
        }
    }

    /// The longest run of blocks from `start` on, up to `stop`, that is below G1: what it is held
    /// under, and how many blocks are in host memory, on disk and further away.
    #[pyo3(signature = (names, start, stop, *, replaces=0, first=false, timeout=1.0))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python")]
    fn lookup(
        &self,
        py: Python<'_>,
        names: &Names,
        start: usize,
        stop: usize,
        replaces: u64,
        first: bool,
        timeout: f64,
    ) -> PyResult<(u64, u32, u32, u32)> {
        let request = LookupRequest {
            replaces,
            first,
            ..names.request(start, stop)?
        };
        let timeout = seconds(timeout);
        let answer = py
            .detach(|| self.client.lookup(&request, timeout))
            .map_err(|error| PyConnectionError::new_err(error.to_string()))?;
        let from = answer.from;
        Ok((answer.hold, from.host, from.disk, from.remote))
    }
}

/// Seconds that Python gives: what is no time is none, what is too long is a day.
pub(crate) fn seconds(seconds: f64) -> Duration {
    const DAY: Duration = Duration::from_secs(86_400);
    if seconds.is_nan() || seconds <= 0.0 {
        return Duration::ZERO;
    }
    Duration::try_from_secs_f64(seconds).map_or(DAY, |time| time.min(DAY))
}

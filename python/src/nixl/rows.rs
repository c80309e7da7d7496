//! The rows of a transfer's descriptor list, as short as they can be said.
//!
//! An engine's list of all blocks has a million rows and thirty-six rules behind them. Arrays are
//! read once and kept as these; rows are only written out for whoever asks for them one by one.

use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use super::input::Row;

/// Address, length, device, distance and count of rows in a row.
pub(super) type Strided = [u64; 5];

/// Rows of an array are kept as runs if these are this long on average.
const RUN_MIN: usize = 16;

/// Descriptors, shared by the copies of a list until one of them is changed.
#[derive(Clone, Debug, Default)]
pub(super) struct Rows {
    /// With how many rows they come to. They say the same as `plain` where both are there.
    runs: Option<Arc<(Vec<Strided>, usize)>>,
    plain: OnceLock<Arc<Vec<Row>>>,
}

impl Rows {
    /// The rows of an array.
    pub(super) fn of_array(rows: &[Row]) -> Self {
        runs_of(rows).map_or_else(
            || rows.to_vec().into(),
            |runs| Self {
                runs: Some(Arc::new((runs, rows.len()))),
                plain: OnceLock::new(),
            },
        )
    }

    /// The runs, if they are kept as such.
    pub(super) fn runs(&self) -> Option<&[Strided]> {
        self.runs.as_deref().map(|(runs, _)| runs.as_slice())
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.runs
            .as_deref()
            .map_or_else(|| self.plain().len(), |(_, len)| *len)
    }

    /// To be changed.
    pub(super) fn make_mut(&mut self) -> &mut Vec<Row> {
        let plain = Arc::clone(self.plain());
        self.runs = None;
        self.plain = plain.into();
        let plain = self.plain.get_mut().expect("set above");
        Arc::make_mut(plain)
    }

    fn plain(&self) -> &Arc<Vec<Row>> {
        self.plain.get_or_init(|| {
            let runs = self.runs().unwrap_or_default();
            Arc::new(runs.iter().flat_map(written_out).collect())
        })
    }
}

impl From<Vec<Row>> for Rows {
    fn from(rows: Vec<Row>) -> Self {
        Self {
            runs: None,
            plain: Arc::new(rows).into(),
        }
    }
}

impl Deref for Rows {
    type Target = [Row];

    fn deref(&self) -> &[Row] {
        self.plain()
    }
}

impl PartialEq for Rows {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Rows {}

/// The rows that a run stands for.
pub(super) fn written_out(run: &Strided) -> impl Iterator<Item = Row> + use<> {
    let [address, bytes, device, stride, count] = *run;
    (0..count).map(move |at| [address.wrapping_add(at.wrapping_mul(stride)), bytes, device])
}

/// The runs of rows, if they are few; none where a row has no bytes, which is refused by its number.
fn runs_of(rows: &[Row]) -> Option<Vec<Strided>> {
    let most = rows.len() / RUN_MIN;
    let mut runs: Vec<Strided> = Vec::new();
    let mut rest = rows;
    while let Some((&[address, bytes, device], behind)) = rest.split_first() {
        if bytes == 0 || runs.len() == most {
            return None;
        }
        let stride = match behind.first() {
            Some(&[next, length, other]) if (length, other) == (bytes, device) => {
                next.checked_sub(address).filter(|step| *step >= bytes)
            }
            _ => None,
        };
        let more = stride.map_or(0, |stride| {
            let mut expected = address;
            let goes_on = |row: &&Row| {
                let Some(next) = expected.checked_add(stride) else {
                    return false;
                };
                expected = next;
                **row == [next, bytes, device]
            };
            behind.iter().take_while(goes_on).count()
        });
        runs.push([
            address,
            bytes,
            device,
            stride.unwrap_or(bytes),
            more as u64 + 1,
        ]);
        rest = &behind[more..];
    }
    Some(runs)
}

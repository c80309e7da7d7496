//! What is known of the tiers, as Prometheus reads it, and as replays read it.
//!
//! An [`Observation`] is told of every request. [`KvbmMetrics`] counts them and writes all metrics as
//! text from a [`TierStats`](crate::tier::TierStats); [`MetricsServer`] serves it; [`Recorder`] keeps
//! the names of every request in a file. Metrics of KVBM have its names.

mod exposition;
mod hits;
mod observe;
mod record;
mod serve;

pub use exposition::DiskWear;
pub use hits::{HitRates, KvbmMetrics, RequestHits};
pub use observe::Observation;
pub use record::{RecordError, Recorder, Recording};
pub use serve::{MetricsError, MetricsServer};

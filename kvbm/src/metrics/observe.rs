//! What a worker tells of its requests, whoever wants to know.

use std::sync::Arc;

use blockplane_protocol::TokenBlock;

use super::{DiskWear, KvbmMetrics, RecordError, Recorder, Recording, RequestHits};
use crate::{remote::PeerStats, settings::KvbmSettings, tier::TierStats};

/// Takes the requests of all ranks of a worker, for hit rates and for the record. Nothing here waits.
#[derive(Debug)]
pub struct Observation {
    metrics: KvbmMetrics,
    recorder: Option<Recorder>,
}

impl Observation {
    /// Opens the record if the settings ask for one.
    ///
    /// # Errors
    /// The record cannot be written.
    pub fn start(settings: &KvbmSettings) -> Result<Arc<Self>, RecordError> {
        let recorder = if settings.enable_record.value {
            Some(Recorder::start(&settings.record_path.value)?)
        } else {
            None
        };
        Ok(Arc::new(Self {
            metrics: KvbmMetrics::new(settings.cache_stats_max_requests.value),
            recorder,
        }))
    }

    /// Notes a request for a prompt of `input_tokens` tokens that begins with the full blocks
    /// `blocks`, and what was found of it. To be told once for each request, and of its end by what
    /// is returned if requests are recorded.
    pub fn request(
        &self,
        blocks: &[TokenBlock],
        input_tokens: u32,
        hits: RequestHits,
    ) -> Option<Recording> {
        self.metrics.request(hits);
        let recorder = self.recorder.as_ref()?;
        Some(recorder.request(blocks, input_tokens, hits.block_tokens))
    }

    /// All metrics in Prometheus' text format 0.0.4. Those of a disk, or of other workers that blocks
    /// are exchanged with, are there where they are given.
    #[must_use]
    pub fn text(
        &self,
        stats: &TierStats,
        wear: Option<DiskWear>,
        peers: Option<&PeerStats>,
    ) -> String {
        let recorded = self.recorder.as_ref().map_or([0; 2], Recorder::counts);
        self.metrics.text(stats, wear, peers, recorded)
    }

    /// One line about hit rates, for the log; `None` before the first request.
    #[must_use]
    pub fn line(&self) -> Option<String> {
        (self.metrics.rates().requests > 0).then(|| self.metrics.line())
    }
}

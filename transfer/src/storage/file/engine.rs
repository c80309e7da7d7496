//! What moves the bytes of files: the ring, or threads where it is forbidden.

use std::io;
use std::sync::Arc;

use super::super::backend::Moves;
use super::super::config::{FileEngine, StorageConfig};
use super::super::error::OpenError;
use super::ring::Ring;
use super::threads::Threads;
use crate::memory::RegionId;
use crate::op::TransferState;

/// The engine of one agent, started when the first file is opened.
#[derive(Debug)]
pub(crate) struct Engine {
    kind: Kind,
    describe: String,
}

#[derive(Debug)]
enum Kind {
    Ring(Ring),
    Threads(Threads),
}

impl Moves for Engine {
    fn transfer(&self, transfer: &Arc<TransferState>) {
        match &self.kind {
            Kind::Ring(ring) => ring.transfer(transfer),
            Kind::Threads(threads) => threads.transfer(transfer),
        }
    }

    fn stop(&self, transfer: &Arc<TransferState>) {
        match &self.kind {
            Kind::Ring(ring) => ring.stop(transfer),
            // Each thread notices after the request that it is in.
            Kind::Threads(_) => {}
        }
    }
}

impl Engine {
    pub(crate) fn start(agent: &str, config: &StorageConfig) -> Result<Self, OpenError> {
        let failed = |what, source| OpenError::Io {
            what,
            name: "for files".to_owned(),
            source,
        };
        let threads = |why: String| {
            let threads = Threads::start(config.file_threads)
                .map_err(|error| failed("start threads", error))?;
            Ok(Self {
                describe: format!("{} threads ({why})", config.file_threads),
                kind: Kind::Threads(threads),
            })
        };
        let engine = match config.file_engine {
            FileEngine::Threads => threads("asked for".to_owned())?,
            FileEngine::Uring => Self::ring(config).map_err(|e| failed("set up io_uring", e))?,
            FileEngine::Auto => match Self::ring(config) {
                Ok(engine) => engine,
                Err(error) => {
                    tracing::warn!(agent, %error, "io_uring is not to be had, threads move files");
                    threads(format!("no io_uring: {error}"))?
                }
            },
        };
        tracing::info!(agent, engine = %engine.describe, "file engine started");
        Ok(engine)
    }

    fn ring(config: &StorageConfig) -> io::Result<Self> {
        let ring = Ring::start(config)?;
        Ok(Self {
            describe: ring.describe().to_owned(),
            kind: Kind::Ring(ring),
        })
    }

    pub(crate) fn describe(&self) -> &str {
        &self.describe
    }

    pub(crate) fn forget_region(&self, region: RegionId) {
        if let Kind::Ring(ring) = &self.kind {
            ring.forget_region(region);
        }
    }

    pub(crate) fn forget_file(&self, file: u64) {
        if let Kind::Ring(ring) = &self.kind {
            ring.forget_file(file);
        }
    }
}

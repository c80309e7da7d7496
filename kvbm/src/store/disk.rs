//! The seam between the store and `transfer`: tests put a faulting disk here.

use std::time::{Duration, Instant};

use blockplane_transfer::{
    Agent, ArenaConfig, Descriptor, FileRanges, FileStore, Op, PostOptions, Registration,
    RemoteAccess, StorageErrorKind, Transfer, TransferError,
};

/// What a request gets beyond its deadline to be called off.
const GRACE: Duration = Duration::from_millis(50);
/// A request that may take as long as it wants is looked at this often.
const LOOK: Duration = Duration::from_secs(1);

/// A range of memory and the range of the file that it is moved to or from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece<'a> {
    pub(super) memory: &'a Registration,
    pub(super) offset: u64,
    pub(super) at: u64,
    pub(super) bytes: u64,
}

/// Moves bytes between memory and the store.
pub(super) trait Disk: Send + Sync {
    /// Starts to move the pieces; in which order they arrive is not known.
    fn start(&self, op: Op, pieces: &[Piece<'_>], until: Instant) -> Result<Flight, DiskError>;

    /// Starts to make durable what has arrived.
    fn sync(&self, until: Instant) -> Result<Flight, DiskError>;

    /// Bytes of the file or device.
    fn length(&self) -> Result<u64, DiskError>;

    /// Memory for the store's own pages.
    fn memory(&self, bytes: usize) -> Result<Registration, DiskError>;

    /// [`Disk::start`], and waits for the end. A request that hangs is left to itself.
    fn run(&self, op: Op, pieces: &[Piece<'_>], until: Instant) -> Result<(), DiskError> {
        self.start(op, pieces, until)?.finish(until)
    }
}

/// A request under way.
pub(super) trait InFlight: Send {
    /// Its end, or none when it is still under way then.
    fn wait(&mut self, until: Instant) -> Option<Result<(), DiskError>>;
}

/// A request under way.
pub(super) struct Flight(pub(super) Box<dyn InFlight>);

impl Flight {
    pub(super) fn wait(&mut self, until: Instant) -> Option<Result<(), DiskError>> {
        self.0.wait(until)
    }

    /// Waits until no byte moves any more, however long that takes.
    pub(super) fn quiet(mut self) {
        while self.0.wait(Instant::now() + LOOK).is_none() {}
    }

    /// Waits for the end of a request that has memory of its own, to which it is left if it hangs.
    pub(super) fn finish(mut self, until: Instant) -> Result<(), DiskError> {
        let Some(result) = self.wait(until) else {
            return Err(DiskError::timed_out());
        };
        result
    }
}

/// Why bytes did not move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DiskError {
    pub(super) kind: DiskErrorKind,
    pub(super) message: String,
}

/// What follows from a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DiskErrorKind {
    /// No room for these bytes.
    Full,
    /// No write will work.
    ReadOnly,
    /// The device fails for these bytes.
    Media,
    /// Not done in time.
    TimedOut,
    /// Something else, perhaps passing.
    Other,
}

impl DiskError {
    pub(super) fn timed_out() -> Self {
        Self {
            kind: DiskErrorKind::TimedOut,
            message: "not done in time".to_owned(),
        }
    }

    #[expect(
        clippy::needless_pass_by_value,
        reason = "given to `map_err`, which passes values"
    )]
    pub(super) fn other(error: impl ToString) -> Self {
        Self {
            kind: DiskErrorKind::Other,
            message: error.to_string(),
        }
    }
}

impl From<TransferError> for DiskError {
    fn from(error: TransferError) -> Self {
        let kind = match &error {
            TransferError::Storage(error) => match error.kind {
                StorageErrorKind::NoSpace
                | StorageErrorKind::QuotaExceeded
                | StorageErrorKind::FileTooLarge => DiskErrorKind::Full,
                StorageErrorKind::ReadOnly
                | StorageErrorKind::BadDescriptor
                | StorageErrorKind::Denied => DiskErrorKind::ReadOnly,
                StorageErrorKind::Io | StorageErrorKind::EndOfFile { .. } => DiskErrorKind::Media,
                StorageErrorKind::TimedOut => DiskErrorKind::TimedOut,
                _ => DiskErrorKind::Other,
            },
            TransferError::DeadlineExceeded { .. } | TransferError::StillInFlight { .. } => {
                DiskErrorKind::TimedOut
            }
            _ => DiskErrorKind::Other,
        };
        Self {
            kind,
            message: error.to_string(),
        }
    }
}

/// The real one: a file or device, moved by `transfer`.
pub(super) struct FileDisk {
    pub(super) agent: Agent,
    pub(super) file: FileStore,
}

impl Disk for FileDisk {
    fn start(&self, op: Op, pieces: &[Piece<'_>], until: Instant) -> Result<Flight, DiskError> {
        let local: Vec<Descriptor<'_>> = pieces
            .iter()
            .map(|piece| Descriptor {
                registration: piece.memory,
                offset: piece.offset,
                bytes: piece.bytes,
            })
            .collect();
        let offsets: Vec<u64> = pieces.iter().map(|piece| piece.at).collect();
        let ranges = FileRanges {
            file: &self.file,
            offsets: &offsets,
            durable: false,
        };
        let transfer = self
            .agent
            .prepare_file_descriptors(op, &local, ranges)
            .map_err(DiskError::other)?
            .post(options(until))
            .map_err(DiskError::other)?;
        Ok(Flight(Box::new(transfer)))
    }

    fn sync(&self, until: Instant) -> Result<Flight, DiskError> {
        let transfer = self.file.sync(options(until)).map_err(DiskError::other)?;
        Ok(Flight(Box::new(transfer)))
    }

    fn length(&self) -> Result<u64, DiskError> {
        let info = self.file.query().map_err(DiskError::other)?;
        Ok(info.length)
    }

    fn memory(&self, bytes: usize) -> Result<Registration, DiskError> {
        let config = ArenaConfig::new(bytes, "kv store").with_access(RemoteAccess::WindowOnly);
        self.agent.allocate(config).map_err(DiskError::other)
    }
}

impl InFlight for Transfer {
    fn wait(&mut self, until: Instant) -> Option<Result<(), DiskError>> {
        let time = until.saturating_duration_since(Instant::now()) + GRACE;
        match Self::wait(self, time) {
            Err(TransferError::StillInFlight { .. }) => None,
            result => Some(result.map_err(DiskError::from)),
        }
    }
}

fn options(until: Instant) -> PostOptions {
    PostOptions::within(until.saturating_duration_since(Instant::now()))
}

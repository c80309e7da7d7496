//! NIXL's enumerations and constants, with its numbers, and its configuration and telemetry records.

use pyo3::prelude::*;

/// Port of the listener unless the configuration names one.
pub(super) const PORT: u16 = 8888;

/// Name that stands for this agent as initiator.
pub(super) const INIT_AGENT: &str = "";

macro_rules! enumeration {
    ($(#[$doc:meta])* $rust:ident $python:literal: $($variant:ident $name:literal $value:literal),* $(,)?) => {
        $(#[$doc])*
        #[pyclass(name = $python, module = "nixl._bindings", eq, eq_int, hash, frozen, from_py_object)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(i32)]
        pub(super) enum $rust {
            $(#[pyo3(name = $name)] $variant = $value,)*
        }

        #[pymethods]
        impl $rust {
            #[getter]
            fn value(&self) -> i32 {
                *self as i32
            }

            #[getter]
            fn name(&self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            fn __repr__(&self) -> String {
                format!("<{}.{}: {}>", $python, self.name(), self.value())
            }

            fn __str__(&self) -> String {
                format!("{}.{}", $python, self.name())
            }
        }

        impl $rust {
            fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
                module.add_class::<Self>()?;
                $(module.add($name, Self::$variant)?;)*
                Ok(())
            }
        }
    };
}

enumeration! {
    /// Kinds of memory.
    Memory "nixl_mem_t":
    Dram "DRAM_SEG" 0, Vram "VRAM_SEG" 1, Block "BLK_SEG" 2, Object "OBJ_SEG" 3, File "FILE_SEG" 4,
}

enumeration! {
    /// Directions.
    Direction "nixl_xfer_op_t":
    Read "NIXL_READ" 0, Write "NIXL_WRITE" 1,
}

enumeration! {
    /// Where a request stands. Failures are exceptions.
    Status "nixl_status_t":
    InProgress "NIXL_IN_PROG" 1,
    Success "NIXL_SUCCESS" 0,
    NotPosted "NIXL_ERR_NOT_POSTED" -1,
    InvalidParam "NIXL_ERR_INVALID_PARAM" -2,
    Backend "NIXL_ERR_BACKEND" -3,
    NotFound "NIXL_ERR_NOT_FOUND" -4,
    Mismatch "NIXL_ERR_MISMATCH" -5,
    NotAllowed "NIXL_ERR_NOT_ALLOWED" -6,
    RepostActive "NIXL_ERR_REPOST_ACTIVE" -7,
    Unknown "NIXL_ERR_UNKNOWN" -8,
    NotSupported "NIXL_ERR_NOT_SUPPORTED" -9,
    RemoteDisconnect "NIXL_ERR_REMOTE_DISCONNECT" -10,
    Canceled "NIXL_ERR_CANCELED" -11,
    NoTelemetry "NIXL_ERR_NO_TELEMETRY" -12,
}

enumeration! {
    /// How an estimate was made.
    Cost "nixl_cost_t":
    Analytical "NIXL_COST_ANALYTICAL_BACKEND" 0,
}

enumeration! {
    /// How calls of several threads are kept apart. Every agent here may be used from any thread.
    ThreadSync "nixl_thread_sync_t":
    None "NIXL_THREAD_SYNC_NONE" 0, Strict "NIXL_THREAD_SYNC_STRICT" 1, Rw "NIXL_THREAD_SYNC_RW" 2,
}

impl Memory {
    /// By the number of a serialised list or of metadata.
    pub(super) const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::Dram,
            1 => Self::Vram,
            2 => Self::Block,
            3 => Self::Object,
            4 => Self::File,
            _ => return None,
        })
    }

    pub(super) const fn code(self) -> u8 {
        match self {
            Self::Dram => 0,
            Self::Vram => 1,
            Self::Block => 2,
            Self::Object => 3,
            Self::File => 4,
        }
    }

    pub(super) const fn label(self) -> &'static str {
        match self {
            Self::Dram => "DRAM",
            Self::Vram => "VRAM",
            Self::Block => "BLK",
            Self::Object => "OBJ",
            Self::File => "FILE",
        }
    }
}

/// Configuration of an agent.
#[pyclass(
    name = "nixlAgentConfig",
    module = "nixl._bindings",
    get_all,
    set_all,
    from_py_object
)]
#[derive(Clone, Debug)]
#[expect(non_snake_case, reason = "these are the names that callers set")]
pub(super) struct Config {
    pub(super) useProgThread: bool,
    pub(super) useListenThread: bool,
    pub(super) listenPort: u16,
    pub(super) syncMode: ThreadSync,
    pub(super) pthrDelay: u64,
    pub(super) lthrDelay: u64,
    pub(super) captureTelemetry: bool,
    pub(super) etcdWatchTimeout: u64,
}

#[pymethods]
impl Config {
    #[new]
    #[pyo3(signature = (
        use_prog_thread=false, use_listen_thread=false, port=0, sync_mode=ThreadSync::None,
        num_workers=1, pthr_delay_us=0, lthr_delay_us=100_000, capture_telemetry=false
    ))]
    #[expect(clippy::too_many_arguments, reason = "the order of NIXL's constructor")]
    const fn new(
        use_prog_thread: bool,
        use_listen_thread: bool,
        port: u16,
        sync_mode: ThreadSync,
        num_workers: u32,
        pthr_delay_us: u64,
        lthr_delay_us: u64,
        capture_telemetry: bool,
    ) -> Self {
        // Threads are this agent's own business.
        let _ = num_workers;
        Self {
            useProgThread: use_prog_thread,
            useListenThread: use_listen_thread,
            listenPort: port,
            syncMode: sync_mode,
            pthrDelay: pthr_delay_us,
            lthrDelay: lthr_delay_us,
            captureTelemetry: capture_telemetry,
            etcdWatchTimeout: 5_000_000,
        }
    }
}

/// How a request went. Times are in microseconds.
#[pyclass(
    name = "nixlXferTelemetry",
    module = "nixl._bindings",
    get_all,
    set_all
)]
#[derive(Clone, Debug, Default)]
#[expect(non_snake_case, reason = "these are the names that callers read")]
pub(super) struct Telemetry {
    /// When it was posted, since the beginning of 1970.
    pub(super) startTime: u64,
    /// What posting took the caller.
    pub(super) postDuration: u64,
    /// From the post to the end.
    pub(super) xferDuration: u64,
    pub(super) totalBytes: u64,
    /// Descriptors as the caller named them.
    pub(super) descCount: u64,
    pub(super) backendName: String,
}

#[pymethods]
impl Telemetry {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    fn __repr__(&self) -> String {
        format!(
            "nixlXferTelemetry(startTime={}, postDuration={}, xferDuration={}, totalBytes={}, descCount={})",
            self.startTime, self.postDuration, self.xferDuration, self.totalBytes, self.descCount
        )
    }
}

pub(super) fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    Memory::add(module)?;
    Direction::add(module)?;
    Status::add(module)?;
    Cost::add(module)?;
    ThreadSync::add(module)?;
    module.add("NIXL_THREAD_SYNC_DEFAULT", ThreadSync::None)?;
    module.add("NIXL_INIT_AGENT", INIT_AGENT)?;
    module.add("DEFAULT_COMM_PORT", PORT)?;
    // Transfers that a kernel on a GPU starts by itself are not offered.
    module.add("HAVE_UCX_GPU_DEVICE_API", false)?;
    module.add_class::<Config>()?;
    module.add_class::<Telemetry>()
}

//! The CUDA kernels that copy blocks: their sources, what the host passes to them, and how they are
//! compiled for a device at run time and kept on disk.
//!
//! * `bp_copy_lanes`: any alignment; warps fetch into shared memory and store from there.
//! * `bp_copy_bulk` (compute capability 9.0 and later): bulk copies, with a stage of shared memory for
//!   each lane that copies; 16 divides addresses, strides and lengths.
//! * `bp_copy_small`: like `bp_copy_lanes` through registers, for one CTA.
//! * `bp_permute`: copies that change the order of axes.
//!
//! Which one, in which shape: [`shape`].

mod cache;
mod compile;
mod nvrtc;
#[cfg(test)]
mod walk_tests;

pub(crate) mod abi;
pub(crate) mod shape;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

pub use nvrtc::NvrtcInfo;
use nvrtc::{Nvrtc, Output};

/// The oldest compute capability that the kernels are written for.
pub(crate) const CAPABILITY_MIN: (u32, u32) = (8, 0);
/// The first with bulk copies.
pub(crate) const CAPABILITY_BULK: (u32, u32) = (9, 0);
/// Images that a process keeps; a machine has GPUs of one or two kinds.
const IMAGES_MAX: usize = 16;

/// How the kernels are compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelConfig {
    /// Folders in which the compiler, `libnvrtc`, is looked for before the loader's path and
    /// `/usr/local/cuda*`: a folder with the library, a CUDA toolkit, or the `site-packages` of a
    /// Python environment with `nvidia-cuda-nvrtc`. Default none.
    pub nvrtc_folders: Vec<PathBuf>,
    /// Folder in which compiled kernels are kept, made when it is missing; at most 32 files of some
    /// 150 KB. Whoever can write there decides what runs on the GPU. Default none: every process
    /// compiles once per kind of GPU, for one or two seconds.
    pub cache_folder: Option<PathBuf>,
    /// Further options for the compiler, such as `-lineinfo` for a profiler. Default none.
    pub options: Vec<String>,
    /// Bound on one compilation. Default 60 s.
    pub compile_timeout: Duration,
}

impl Default for KernelConfig {
    fn default() -> Self {
        Self {
            nvrtc_folders: Vec::new(),
            cache_folder: None,
            options: Vec::new(),
            compile_timeout: Duration::from_secs(60),
        }
    }
}

/// Why there are no kernels for a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// No usable compiler was found.
    #[error(
        "no usable NVRTC (libnvrtc.so.12 or later) in {}: {}; install the CUDA toolkit, or \
         `pip install nvidia-cuda-nvrtc` and name its site-packages in `nvrtc_folders`",
        places.join(", "), looked.join("; ")
    )]
    NvrtcMissing {
        /// Where it was looked for.
        places: Vec<String>,
        /// What was found and why it could not be used, or why a name could not be opened.
        looked: Vec<String>,
    },
    /// The device is older than the kernels.
    #[error(
        "compute capability {}.{}; accepted: {}.{} or later",
        capability.0, capability.1, CAPABILITY_MIN.0, CAPABILITY_MIN.1
    )]
    TooOld {
        /// Of the device.
        capability: (u32, u32),
    },
    /// The compiler knows nothing that the device could run.
    #[error(
        "{} (NVRTC {}.{}) makes no code for compute capability {}.{}, only for {:?}; a newer one is \
         needed", nvrtc.path.display(), nvrtc.version.0, nvrtc.version.1, capability.0, capability.1,
        nvrtc.architectures
    )]
    UnknownArchitecture {
        /// Of the device.
        capability: (u32, u32),
        /// The compiler.
        nvrtc: NvrtcInfo,
    },
    /// The compiler refused the source.
    #[error(
        "NVRTC {}.{} ({}) cannot compile the kernels for {output}:\n{log}",
        nvrtc.version.0, nvrtc.version.1, nvrtc.path.display()
    )]
    Compile {
        /// The architecture.
        output: String,
        /// The compiler.
        nvrtc: NvrtcInfo,
        /// What it says.
        log: String,
    },
    /// A call of the compiler failed.
    #[error("{call} failed with {code}: {message}")]
    Nvrtc {
        /// The function.
        call: &'static str,
        /// Its result.
        code: i32,
        /// The result in words, and the log when there is one.
        message: String,
    },
    /// Compiling took longer than allowed.
    #[error("the kernels for {output} were not compiled within {limit:?}, `compile_timeout`")]
    TooSlow {
        /// The architecture.
        output: String,
        /// [`KernelConfig::compile_timeout`].
        limit: Duration,
    },
    /// The thread that compiled ended without a result.
    #[error("compiling the kernels for {output} ended without a result")]
    Crashed {
        /// The architecture.
        output: String,
    },
    /// An image beyond all reason.
    #[error("NVRTC made {bytes} bytes; accepted: up to {limit}")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// An option with a zero byte in it.
    #[error("{text:?} has a zero byte, which an option cannot have")]
    Nul {
        /// Its beginning.
        text: String,
    },
    /// The system gave no thread to compile in.
    #[error("cannot start the thread that compiles: {source}")]
    Thread {
        /// The system's error.
        source: io::Error,
    },
}

/// Compiled kernels for one kind of device.
#[derive(Clone)]
#[non_exhaustive]
pub struct KernelImage {
    /// What the driver loads: machine code, or PTX that ends with NUL.
    pub bytes: Arc<[u8]>,
    /// `sm_90` is machine code of one architecture, `compute_90` portable code.
    pub output: String,
    /// How this process came by it.
    pub origin: ImageOrigin,
    /// The compiler that made it.
    pub nvrtc: NvrtcInfo,
}

/// How a process came by an image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImageOrigin {
    /// Compiled just now.
    Compiled {
        /// How long that took.
        took: Duration,
    },
    /// Read from this file of the cache.
    Cached {
        /// The file.
        path: PathBuf,
    },
    /// Compiled or read before by this process.
    InMemory,
}

impl fmt::Debug for KernelImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelImage")
            .field("bytes", &self.bytes.len())
            .field("output", &self.output)
            .field("origin", &self.origin)
            .field("nvrtc", &self.nvrtc)
            .finish()
    }
}

impl fmt::Display for ImageOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Compiled { took } => write!(f, "compiled in {} ms", took.as_millis()),
            Self::Cached { path } => write!(f, "from {}", path.display()),
            Self::InMemory => f.write_str("compiled before"),
        }
    }
}

/// The compiler that would be used, by the same search; one newer than CUDA version `cuda_major`,
/// when given, is passed over.
pub fn find_nvrtc(
    config: &KernelConfig,
    cuda_major: Option<u32>,
) -> Result<NvrtcInfo, KernelError> {
    Ok(Nvrtc::find(&config.nvrtc_folders, cuda_major)?.info)
}

/// Compiles all kernels for each compute capability, as a device with it would have them. Needs no
/// GPU; uses the cache like a device does.
pub fn compile_kernels(
    config: &KernelConfig,
    capabilities: &[(u32, u32)],
) -> Result<Vec<KernelImage>, KernelError> {
    let load_one = |capability: &(u32, u32)| load(config, *capability, None);
    capabilities.iter().map(load_one).collect()
}

/// The kernels for a device, out of this process's memory, the cache, or the compiler. `cuda_major`
/// is the newest CUDA version that the driver loads images of.
pub(crate) fn load(
    config: &KernelConfig,
    capability: (u32, u32),
    cuda_major: Option<u32>,
) -> Result<KernelImage, KernelError> {
    let nvrtc = Arc::new(Nvrtc::find(&config.nvrtc_folders, cuda_major)?);
    let output = compile::output(capability, &nvrtc.info.architectures, || nvrtc.info.clone())?;
    if let Output::Ptx(_) = output {
        tracing::warn!(
            nvrtc = %nvrtc.info.path.display(), %output, ?capability,
            "this NVRTC does not know the GPU; the driver compiles portable code for it"
        );
    }
    let options = compile::options(output, &config.options);
    let key = compile::key(compile::SOURCE, &options, nvrtc.info.version);
    let mut images = IMAGES.lock();
    let image = |bytes, origin| KernelImage {
        bytes,
        output: output.to_string(),
        origin,
        nvrtc: nvrtc.info.clone(),
    };
    if let Some(bytes) = images.get(&key) {
        return Ok(image(Arc::clone(bytes), ImageOrigin::InMemory));
    }
    let path = config
        .cache_folder
        .as_deref()
        .map(|folder| cache::path(folder, &output.to_string(), key));
    let cached = path
        .as_deref()
        .and_then(|path| match cache::load(path, key) {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "cached kernels cannot be used");
                None
            }
        });
    let image = match (cached, &path) {
        (Some(bytes), Some(path)) => {
            let path = path.clone();
            image(bytes.into(), ImageOrigin::Cached { path })
        }
        _ => {
            let began = Instant::now();
            let bytes = compile::compile(&nvrtc, output, options, config.compile_timeout)?;
            let took = began.elapsed();
            if let Some(path) = &path
                && let Err(error) = cache::store(path, key, &bytes)
            {
                tracing::warn!(path = %path.display(), %error, "compiled kernels cannot be kept");
            }
            image(bytes.into(), ImageOrigin::Compiled { took })
        }
    };
    tracing::info!(
        output = image.output, bytes = image.bytes.len(), origin = %image.origin,
        nvrtc = %nvrtc.info.path.display(), "CUDA kernels"
    );
    if images.len() >= IMAGES_MAX {
        images.pop_first();
    }
    images.insert(key, Arc::clone(&image.bytes));
    Ok(image)
}

/// Images by what they were made from. Held while one is made: several GPUs of a kind, whose agents
/// start at the same time, compile once.
static IMAGES: Mutex<BTreeMap<cache::Key, Arc<[u8]>>> = Mutex::new(BTreeMap::new());

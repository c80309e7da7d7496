//! A large matrix product, again and again: what a transfer shares a GPU with while a model runs.
//!
//! cuBLASLt is opened when it is first needed; the ordinary binary does without it. The product runs in
//! the primary context of the device, as the transfers of this process do, on a stream of its own.

use std::{
    collections::VecDeque,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context, bail, ensure};
use cudarc::{
    cublaslt::{CudaBlasLT, Matmul, MatmulConfig, sys},
    driver::{
        CudaContext, CudaEvent, CudaSlice, CudaStream, DeviceRepr, ValidAsZeroBits,
        sys::CUevent_flags,
    },
};
use rand::{Rng, SeedableRng, rngs::SmallRng};

/// Sizes that are accepted: smaller products say nothing, larger ones last too long.
const SIZES: std::ops::RangeInclusive<u32> = 256..=32_768;
/// Products that are on the stream at one time, so that the device never waits for the host.
const QUEUED: usize = 4;

/// The bits of a bf16 number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(transparent)]
struct Bf16(u16);

// SAFETY: two bytes that the device takes as they are.
unsafe impl DeviceRepr for Bf16 {}
// SAFETY: bits of zero are the number zero.
unsafe impl ValidAsZeroBits for Bf16 {}

impl Matmul<Bf16> for CudaBlasLT {
    fn matrix_type() -> sys::cudaDataType {
        sys::cudaDataType_t::CUDA_R_16BF
    }

    fn compute_type() -> sys::cublasComputeType_t {
        sys::cublasComputeType_t::CUBLAS_COMPUTE_32F
    }
}

/// Two square matrices of random bf16 numbers on a device, and room for their product.
pub(crate) struct Product {
    size: u32,
    blas: CudaBlasLT,
    stream: Arc<CudaStream>,
    left: CudaSlice<Bf16>,
    right: CudaSlice<Bf16>,
    product: CudaSlice<Bf16>,
}

impl std::fmt::Debug for Product {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Product")
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

impl Product {
    /// Prepares products of `size` x `size` matrices on a device. cuBLASLt is looked for in `library`, a
    /// folder, before the usual places.
    ///
    /// # Errors
    /// There is no cuBLASLt, the size is not accepted, or the device refuses.
    pub(crate) fn new(device: u32, size: u32, library: Option<&Path>) -> anyhow::Result<Self> {
        ensure!(
            SIZES.contains(&size),
            "a matrix of {size} x {size}; accepted: {} to {}",
            SIZES.start(),
            SIZES.end()
        );
        open(library)?;
        let device = usize::try_from(device)?;
        let context = CudaContext::new(device).context("the device of the matrix product")?;
        let stream = context.new_stream()?;
        let blas = CudaBlasLT::new(stream.clone()).context("cuBLASLt does not start")?;
        let elements = usize::try_from(u64::from(size) * u64::from(size))?;
        let left = stream.clone_htod(&numbers(elements, 1))?;
        let right = stream.clone_htod(&numbers(elements, 2))?;
        let product = stream.alloc_zeros::<Bf16>(elements)?;
        stream.synchronize()?;
        let mut product = Self {
            size,
            blas,
            stream,
            left,
            right,
            product,
        };
        // The first one loads code.
        product.post()?;
        product.stream.synchronize()?;
        Ok(product)
    }

    pub(crate) const fn size(&self) -> u32 {
        self.size
    }

    /// Multiplies until it is told to stop. Returns how long each product took on the device, in
    /// microseconds.
    ///
    /// # Errors
    /// The library or the device fails.
    pub(crate) fn repeat(&mut self, stop: &AtomicBool) -> anyhow::Result<Vec<f64>> {
        let timed = Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC);
        let mut micros = Vec::new();
        let mut queued: VecDeque<CudaEvent> = VecDeque::new();
        let mut last = self.stream.record_event(timed)?;
        while !stop.load(Ordering::Acquire) {
            self.post()?;
            queued.push_back(self.stream.record_event(timed)?);
            if queued.len() < QUEUED {
                continue;
            }
            if let Some(end) = queued.pop_front() {
                // Both have passed after this.
                end.synchronize()?;
                micros.push(f64::from(last.elapsed_ms(&end)?) * 1e3);
                last = end;
            }
        }
        self.stream.synchronize()?;
        Ok(micros)
    }

    /// Puts one product on the stream.
    fn post(&mut self) -> anyhow::Result<()> {
        let size = u64::from(self.size);
        let stride = i64::from(self.size);
        let config = MatmulConfig {
            transa: true,
            transb: false,
            transc: false,
            m: size,
            n: size,
            k: size,
            alpha: 1.0,
            lda: stride,
            ldb: stride,
            beta: 0.0,
            ldc: stride,
            stride_a: None,
            stride_b: None,
            stride_c: None,
            stride_bias: None,
            batch_size: None,
        };
        // SAFETY: all three matrices have `size` x `size` elements with `size` from one column to the next.
        let posted = unsafe {
            self.blas.matmul(
                config,
                &self.left,
                &self.right,
                &mut self.product,
                None,
                None,
            )
        };
        posted.map_err(|error| anyhow::anyhow!("cuBLASLt refuses the matrix product: {error}"))
    }
}

/// 10^12 operations a second when one product of `size` x `size` matrices takes so many microseconds.
pub(crate) fn tflops(size: u32, micros: f64) -> f64 {
    2.0 * f64::from(size).powi(3) / micros / 1e6
}

/// Numbers of both signs between 1/2 and 1, all bits of their fractions random: a product of zeros would
/// take less power and run faster.
fn numbers(count: usize, seed: u64) -> Vec<Bf16> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut bits = 0u64;
    (0..count)
        .map(|i| {
            if i % 4 == 0 {
                bits = rng.next_u64();
            }
            let [low, high, ..] = bits.to_le_bytes();
            bits >>= 16;
            Bf16(u16::from_le_bytes([low, high]) & 0x807f | 0x3f00)
        })
        .collect()
}

/// Makes cuBLASLt known to the loader, or says where it was looked for.
fn open(folder: Option<&Path>) -> anyhow::Result<()> {
    // Found by its name for as long as it is open.
    static KEPT: Mutex<Vec<libloading::Library>> = Mutex::new(Vec::new());
    const NAMES: [&str; 2] = ["libcublasLt.so.13", "libcublasLt.so.12"];
    // SAFETY: opening the library runs its initialisers, as for every program that links it.
    if folder.is_none() && unsafe { sys::is_culib_present() } {
        return Ok(());
    }
    let folders = match folder {
        Some(folder) => vec![folder.to_owned()],
        None => usual_folders(),
    };
    let mut looked = Vec::new();
    for folder in &folders {
        for name in NAMES {
            let path = folder.join(name);
            if !path.exists() {
                continue;
            }
            // SAFETY: as above.
            match unsafe { libloading::Library::new(&path) } {
                Ok(library) => {
                    KEPT.lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(library);
                    // SAFETY: as above.
                    if unsafe { sys::is_culib_present() } {
                        return Ok(());
                    }
                    looked.push(format!("{}: not found by its name", path.display()));
                }
                Err(error) => looked.push(error.to_string()),
            }
        }
    }
    let places: Vec<_> = folders.iter().map(|f| f.display().to_string()).collect();
    bail!(
        "cuBLASLt ({}) is not on the loader's path nor in {} {}; install the CUDA toolkit, or `pip install \
         nvidia-cublas` and give the folder with the library",
        NAMES.join(" or "),
        places.join(", "),
        looked.join("; ")
    )
}

/// Where toolkits and Python packages put it.
fn usual_folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = vec!["/usr/local/cuda/lib64".into()];
    for toolkit in children(Path::new("/usr/local"), "cuda-") {
        folders.push(toolkit.join("lib64"));
    }
    for prefix in ["/usr/local/lib", "/usr/lib"] {
        for python in children(Path::new(prefix), "python3") {
            for packages in ["dist-packages", "site-packages"] {
                for nvidia in ["nvidia/cu13/lib", "nvidia/cublas/lib"] {
                    folders.push(python.join(packages).join(nvidia));
                }
            }
        }
    }
    folders.retain(|folder| folder.is_dir());
    folders
}

fn children(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_random_and_of_one_size() {
        let numbers = numbers(4096, 1);
        // A bf16 number is the upper half of an f32 one.
        let value = |number: &Bf16| f32::from_bits(u32::from(number.0) << 16);
        let sized = |number: &Bf16| (0.5..1.0).contains(&value(number).abs());
        assert!(numbers.iter().all(sized));
        let negative = numbers.iter().filter(|n| value(n) < 0.0).count();
        assert!((1500..2600).contains(&negative), "{negative}");
        let mut different = numbers;
        different.sort_unstable();
        different.dedup();
        assert!(different.len() > 200, "{}", different.len());
    }

    #[test]
    fn speed_follows_from_size_and_time() {
        assert!((tflops(1000, 1000.0) - 2.0).abs() < 1e-9);
    }

    #[test]
    fn a_missing_library_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = open(Some(folder.path())).unwrap_err().to_string();
        assert!(error.contains("libcublasLt.so.13"), "{error}");
    }
}

//! NVRTC, NVIDIA's compiler as a library: finding it, and calling it.
//!
//! Its functions are looked up here and not through a binding crate: a binding opens whichever
//! library the loader finds under a name, panics when there is none, and gives result codes as a Rust
//! enum, which a code of a newer library would break. Here one file is opened, known by its path.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::{fs, ptr};

use libloading::{Library, Symbol};

use super::KernelError;

/// Sonames on the loader's path, best first.
const SONAMES: [&str; 2] = ["libnvrtc.so.13", "libnvrtc.so.12"];
/// The oldest major version that knows what the kernels use.
const MAJOR_MIN: u32 = 12;
/// Where the library is below a folder of the configuration: the folder itself, a CUDA toolkit, or
/// Python packages.
const BELOW: [&str; 5] = [
    "",
    "lib64",
    "lib",
    "nvidia/cu13/lib",
    "nvidia/cuda_nvrtc/lib",
];
/// Where toolkits are installed.
const TOOLKITS: &str = "/usr/local";
/// Compiler output beyond this is cut off.
const LOG_BYTES_MAX: usize = 64 << 10;
/// Largest image accepted; the kernels are a hundredth of it.
pub(super) const IMAGE_BYTES_MAX: usize = 16 << 20;

const SUCCESS: c_int = 0;
const ERROR_COMPILATION: c_int = 6;

type Program = *mut c_void;
type Text = *const c_char;
type ReadSize = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type ReadBytes = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// An NVRTC library that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NvrtcInfo {
    /// The file.
    pub path: PathBuf,
    /// Its version, major and minor.
    pub version: (u32, u32),
    /// The architectures it compiles for, ascending: 90 is `sm_90`.
    pub architectures: Vec<u32>,
}

/// One open library.
pub(super) struct Nvrtc {
    pub(super) info: NvrtcInfo,
    create:
        unsafe extern "C" fn(*mut Program, Text, Text, c_int, *const Text, *const Text) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const Text) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    log: (ReadSize, ReadBytes),
    cubin: (ReadSize, ReadBytes),
    ptx: (ReadSize, ReadBytes),
    error_string: unsafe extern "C" fn(c_int) -> Text,
    /// Never closed: nobody promises that its threads and static state survive that, and opening it
    /// again is free.
    _library: ManuallyDrop<Library>,
}

impl std::fmt::Debug for Nvrtc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Nvrtc").field(&self.info).finish()
    }
}

/// A source and the headers it can include, by name.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source<'a> {
    pub(super) main: &'a str,
    pub(super) headers: &'a [(&'a str, &'a str)],
}

/// What to make of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Output {
    /// Machine code of one architecture.
    Cubin(u32),
    /// Portable code, which the driver compiles for newer architectures.
    Ptx(u32),
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cubin(number) => write!(f, "sm_{number}"),
            Self::Ptx(number) => write!(f, "compute_{number}"),
        }
    }
}

impl Nvrtc {
    /// The first usable library: below the folders given, on the loader's path, in the toolkits of
    /// this machine. One that is newer than CUDA version `major_max`, when given, is not usable.
    pub(super) fn find(folders: &[PathBuf], major_max: Option<u32>) -> Result<Self, KernelError> {
        let mut looked = Vec::new();
        let toolkits = toolkits();
        let candidates = in_folders(folders)
            .into_iter()
            .chain(SONAMES.map(PathBuf::from))
            .chain(in_folders(&toolkits));
        for candidate in candidates {
            match Self::open(&candidate) {
                Ok(found) => {
                    let (major, minor) = found.info.version;
                    let path = found.info.path.display();
                    if major < MAJOR_MIN {
                        looked.push(format!("{path} is {major}.{minor}, older than {MAJOR_MIN}"));
                    } else if major_max.is_some_and(|most| major > most) {
                        looked.push(format!("{path} is {major}.{minor}, newer than the driver"));
                    } else {
                        return Ok(found);
                    }
                }
                Err(reason) => looked.push(reason),
            }
        }
        let mut places: Vec<String> = folders.iter().map(|f| f.display().to_string()).collect();
        places.push("the loader's path".into());
        places.push(format!("{TOOLKITS}/cuda*/lib64"));
        Err(KernelError::NvrtcMissing { places, looked })
    }

    /// Opens one library, by path or soname; what is wrong with it otherwise.
    fn open(name: &Path) -> Result<Self, String> {
        // SAFETY: this runs the initialisers of a file that is NVRTC by its name, from a folder that
        // the configuration or the system names for it.
        let library = unsafe { Library::new(name) }
            .map_err(|error| format!("{}: {}", name.display(), chain(&error)))?;
        let library = ManuallyDrop::new(library);
        let missing = |error: libloading::Error| format!("{}: {}", name.display(), chain(&error));

        type Two = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;
        type One = unsafe extern "C" fn(*mut c_int) -> c_int;
        let version: Two = symbol(&library, c"nvrtcVersion").map_err(missing)?;
        let arch_count: One = symbol(&library, c"nvrtcGetNumSupportedArchs").map_err(missing)?;
        let archs: One = symbol(&library, c"nvrtcGetSupportedArchs").map_err(missing)?;
        let found = Self {
            info: NvrtcInfo {
                path: file_of(version as *const c_void).unwrap_or_else(|| name.to_path_buf()),
                version: read_version(version).map_err(|code| failed(name, code))?,
                architectures: read_architectures(arch_count, archs)
                    .map_err(|code| failed(name, code))?,
            },
            create: symbol(&library, c"nvrtcCreateProgram").map_err(missing)?,
            compile: symbol(&library, c"nvrtcCompileProgram").map_err(missing)?,
            destroy: symbol(&library, c"nvrtcDestroyProgram").map_err(missing)?,
            log: (
                symbol(&library, c"nvrtcGetProgramLogSize").map_err(missing)?,
                symbol(&library, c"nvrtcGetProgramLog").map_err(missing)?,
            ),
            cubin: (
                symbol(&library, c"nvrtcGetCUBINSize").map_err(missing)?,
                symbol(&library, c"nvrtcGetCUBIN").map_err(missing)?,
            ),
            ptx: (
                symbol(&library, c"nvrtcGetPTXSize").map_err(missing)?,
                symbol(&library, c"nvrtcGetPTX").map_err(missing)?,
            ),
            error_string: symbol(&library, c"nvrtcGetErrorString").map_err(missing)?,
            _library: library,
        };
        Ok(found)
    }

    /// Compiles; takes a second or a few.
    pub(super) fn compile(
        &self,
        source: Source<'_>,
        output: Output,
        options: &[String],
    ) -> Result<Vec<u8>, KernelError> {
        let main = text(source.main)?;
        let bodies = texts(source.headers.iter().map(|(_, body)| *body))?;
        let names = texts(source.headers.iter().map(|(name, _)| *name))?;
        let options = texts(options.iter().map(String::as_str))?;
        let (body_pointers, name_pointers) = (pointers(&bodies), pointers(&names));
        let option_pointers = pointers(&options);
        let count = |texts: &[Text]| c_int::try_from(texts.len()).unwrap_or(c_int::MAX);

        let mut program = ptr::null_mut();
        // SAFETY: all texts end with NUL and live until the end of this function; the two arrays
        // have the length that is given.
        let code = unsafe {
            (self.create)(
                &raw mut program,
                main.as_ptr(),
                c"blockplane.cu".as_ptr(),
                count(&body_pointers),
                body_pointers.as_ptr(),
                name_pointers.as_ptr(),
            )
        };
        self.check("nvrtcCreateProgram", code)?;
        let program = Open {
            nvrtc: self,
            program,
        };

        // SAFETY: the program was created above, and the array has the length that is given.
        let code = unsafe {
            (self.compile)(
                program.program,
                count(&option_pointers),
                option_pointers.as_ptr(),
            )
        };
        if code == ERROR_COMPILATION {
            return Err(KernelError::Compile {
                output: output.to_string(),
                nvrtc: self.info.clone(),
                log: program.log(),
            });
        }
        if code != SUCCESS {
            let log = program.log();
            return Err(self.error("nvrtcCompileProgram", code, &log));
        }
        match output {
            Output::Cubin(_) => program.read("nvrtcGetCUBIN", self.cubin),
            Output::Ptx(_) => program.read("nvrtcGetPTX", self.ptx),
        }
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), KernelError> {
        if code == SUCCESS {
            Ok(())
        } else {
            Err(self.error(call, code, ""))
        }
    }

    fn error(&self, call: &'static str, code: c_int, log: &str) -> KernelError {
        // SAFETY: the function takes any code.
        let text = unsafe { (self.error_string)(code) };
        let mut message = if text.is_null() {
            "unknown".to_owned()
        } else {
            // SAFETY: the library returns constant texts that end with NUL.
            unsafe { CStr::from_ptr(text) }
                .to_string_lossy()
                .into_owned()
        };
        if !log.is_empty() {
            message.push_str(": ");
            message.push_str(log);
        }
        KernelError::Nvrtc {
            call,
            code,
            message,
        }
    }
}

/// A program of the library, destroyed at the end.
struct Open<'a> {
    nvrtc: &'a Nvrtc,
    program: Program,
}

impl Open<'_> {
    /// What the compiler says, up to a limit.
    fn log(&self) -> String {
        match self.read("nvrtcGetProgramLog", self.nvrtc.log) {
            Ok(mut bytes) => {
                while bytes
                    .last()
                    .is_some_and(|byte| *byte == 0 || byte.is_ascii_whitespace())
                {
                    bytes.pop();
                }
                let cut = bytes.len() > LOG_BYTES_MAX;
                bytes.truncate(LOG_BYTES_MAX);
                let mut log = String::from_utf8_lossy(&bytes).into_owned();
                if cut {
                    log.push_str("\n(cut off here)");
                }
                log
            }
            Err(error) => error.to_string(),
        }
    }

    fn read(
        &self,
        call: &'static str,
        (size, bytes): (ReadSize, ReadBytes),
    ) -> Result<Vec<u8>, KernelError> {
        let mut length = 0;
        // SAFETY: the program is alive.
        let code = unsafe { size(self.program, &raw mut length) };
        self.nvrtc.check(call, code)?;
        if length > IMAGE_BYTES_MAX {
            return Err(KernelError::TooLarge {
                bytes: length,
                limit: IMAGE_BYTES_MAX,
            });
        }
        let mut out = vec![0; length];
        // SAFETY: the program is alive, and the library writes as many bytes as it has just said.
        let code = unsafe { bytes(self.program, out.as_mut_ptr().cast()) };
        self.nvrtc.check(call, code)?;
        Ok(out)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        // SAFETY: the program is alive, and nobody uses it after this.
        let code = unsafe { (self.nvrtc.destroy)(&raw mut self.program) };
        if code != SUCCESS {
            tracing::warn!(code, "NVRTC could not free a program");
        }
    }
}

/// The newest library of each folder below the folders given.
fn in_folders(folders: &[PathBuf]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for folder in folders {
        for below in BELOW {
            let Ok(entries) = fs::read_dir(folder.join(below)) else {
                continue;
            };
            found.extend(
                entries
                    .filter_map(|entry| {
                        Some((major(&entry.as_ref().ok()?.path())?, entry.ok()?.path()))
                    })
                    .max()
                    .map(|(_, path)| path),
            );
        }
    }
    found
}

/// The number in `libnvrtc.so.13`.
fn major(path: &Path) -> Option<u32> {
    let name = path.file_name()?.to_str()?;
    name.strip_prefix("libnvrtc.so.")?.parse().ok()
}

/// Toolkits of this machine, newest first.
fn toolkits() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(TOOLKITS)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| name.starts_with("cuda"))
        })
        .collect();
    found.sort_by_key(|path| {
        let digits = path.to_string_lossy();
        let number = digits.rsplit("cuda-").next().unwrap_or_default();
        let mut parts = number
            .split('.')
            .map(|part| part.parse::<u32>().unwrap_or(0));
        std::cmp::Reverse((parts.next(), parts.next()))
    });
    found
}

/// A function of the library.
fn symbol<T: Copy>(library: &Library, name: &CStr) -> Result<T, libloading::Error> {
    // SAFETY: every caller asks for a function of NVRTC's C interface with its documented type, and
    // the library stays open for as long as the process lives.
    let symbol: Symbol<'_, T> = unsafe { library.get(name.to_bytes_with_nul()) }?;
    Ok(*symbol)
}

/// The file that a function came from.
fn file_of(function: *const c_void) -> Option<PathBuf> {
    let mut info = libc::Dl_info {
        dli_fname: ptr::null(),
        dli_fbase: ptr::null_mut(),
        dli_sname: ptr::null(),
        dli_saddr: ptr::null_mut(),
    };
    // SAFETY: any address may be asked for, and the struct is written before it is read.
    let known = unsafe { libc::dladdr(function, &raw mut info) } != 0;
    if !known || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: the loader returns a text that lives as long as the library, which is not closed.
    let name = unsafe { CStr::from_ptr(info.dli_fname) };
    Some(PathBuf::from(name.to_str().ok()?))
}

fn read_version(
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
) -> Result<(u32, u32), c_int> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both point to integers of this function.
    let code = unsafe { version(&raw mut major, &raw mut minor) };
    let number = |value: c_int| u32::try_from(value).unwrap_or(0);
    (code == SUCCESS)
        .then_some((number(major), number(minor)))
        .ok_or(code)
}

fn read_architectures(
    count: unsafe extern "C" fn(*mut c_int) -> c_int,
    list: unsafe extern "C" fn(*mut c_int) -> c_int,
) -> Result<Vec<u32>, c_int> {
    let mut length = 0;
    // SAFETY: it points to an integer of this function.
    let code = unsafe { count(&raw mut length) };
    if code != SUCCESS {
        return Err(code);
    }
    let mut numbers: Vec<c_int> = vec![0; usize::try_from(length).unwrap_or(0)];
    // SAFETY: the array has as many places as the library has just said that there are.
    let code = unsafe { list(numbers.as_mut_ptr()) };
    if code != SUCCESS {
        return Err(code);
    }
    let mut numbers: Vec<u32> = numbers
        .into_iter()
        .filter_map(|n| u32::try_from(n).ok())
        .collect();
    numbers.sort_unstable();
    Ok(numbers)
}

fn text(value: &str) -> Result<CString, KernelError> {
    CString::new(value).map_err(|_| KernelError::Nul {
        text: value.chars().take(80).collect(),
    })
}

fn texts<'a>(values: impl Iterator<Item = &'a str>) -> Result<Vec<CString>, KernelError> {
    values.map(text).collect()
}

fn pointers(values: &[CString]) -> Vec<Text> {
    values.iter().map(|value| value.as_ptr()).collect()
}

fn failed(name: &Path, code: c_int) -> String {
    format!(
        "{}: its version cannot be read, error {code}",
        name.display()
    )
}

/// An error with its causes: the loader's own words are in the cause.
fn chain(error: &dyn std::error::Error) -> String {
    let mut out = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        out.push_str(": ");
        out.push_str(&cause.to_string());
        source = cause.source();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_none_is_passed_over_and_named() {
        let folder = tempfile::tempdir().unwrap();
        let below = folder.path().join("nvidia/cu13/lib");
        fs::create_dir_all(&below).unwrap();
        let (old, new) = (below.join("libnvrtc.so.9"), below.join("libnvrtc.so.13"));
        for path in [
            &old,
            &new,
            &below.join("libnvrtc.so"),
            &below.join("libnvrtc.so.x"),
        ] {
            fs::write(path, "no library").unwrap();
        }
        let folders = [folder.path().to_path_buf()];
        // The highest number, compared as a number.
        assert_eq!(in_folders(&folders), [new.as_path()]);
        let reason = Nvrtc::open(&new).unwrap_err();
        assert!(reason.contains(new.to_str().unwrap()), "{reason}");
        match Nvrtc::find(&folders, None) {
            // This machine has one.
            Ok(found) => assert!(!found.info.path.starts_with(folder.path())),
            Err(error) => {
                let said = error.to_string();
                assert!(said.contains(new.to_str().unwrap()), "{said}");
                assert!(said.contains("pip install nvidia-cuda-nvrtc"), "{said}");
            }
        }
    }

    #[test]
    fn a_library_without_the_functions_is_none() {
        // The loader finds it everywhere, and it has no compiler.
        let reason = Nvrtc::open(Path::new("libc.so.6")).unwrap_err();
        assert!(reason.contains("nvrtcVersion"), "{reason}");
    }

    #[test]
    fn sizes_and_texts_are_checked() {
        assert!(matches!(text("a\0b"), Err(KernelError::Nul { .. })));
        assert_eq!(Output::Cubin(90).to_string(), "sm_90");
        assert_eq!(Output::Ptx(100).to_string(), "compute_100");
    }
}

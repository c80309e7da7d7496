//! Finding and opening the libraries.

use std::ffi::{CStr, c_void};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::Library;

use crate::ucp::Ucp;
use crate::verbs::Verbs;

/// Where a library was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RdmaLibrary {
    /// The file, links followed.
    pub path: PathBuf,
    /// Version of rdma-core or of UCX; none when the library does not tell.
    pub version: Option<String>,
}

impl fmt::Display for RdmaLibrary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.version {
            Some(version) => write!(f, "{} ({version})", self.path.display()),
            None => write!(f, "{}", self.path.display()),
        }
    }
}

/// Why a library cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LibraryError {
    /// The loader does not find or open it.
    #[error("{name} cannot be opened: {reason}")]
    NotOpened {
        /// Name that was asked for.
        name: &'static str,
        /// The loader's words.
        reason: String,
    },
    /// It lacks a function: older than what is needed, or another library.
    #[error("{name} lacks a function: {reason}")]
    TooOld {
        /// Name that was asked for.
        name: &'static str,
        /// The loader's words.
        reason: String,
    },
}

/// An open library.
#[derive(Debug)]
pub struct Loaded<T> {
    /// Its functions.
    pub api: T,
    /// Where it was found.
    pub found: RdmaLibrary,
}

impl fmt::Debug for Verbs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verbs").finish_non_exhaustive()
    }
}

impl fmt::Debug for Ucp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ucp").finish_non_exhaustive()
    }
}

/// libibverbs, opened by the first call and kept open.
///
/// # Errors
/// It is not there, or too old. The answer stays the same for the life of the process.
pub fn verbs() -> Result<&'static Loaded<Verbs>, &'static LibraryError> {
    const NAME: &str = "libibverbs.so.1";
    static LOADED: OnceLock<Result<Loaded<Verbs>, LibraryError>> = OnceLock::new();
    LOADED
        .get_or_init(|| {
            let library = open(NAME)?;
            // SAFETY: the functions have the types of this library's header: its soname is that of
            // the header, and functions keep their types within one soname.
            let api = unsafe { Verbs::from_library(library) };
            let api = api.map_err(|error| too_old(NAME, &error))?;
            let path = file_of(api.ibv_get_device_list as *const c_void);
            let version = path.as_deref().and_then(rdma_core_version);
            Ok(loaded(NAME, api, path, version))
        })
        .as_ref()
}

/// libucp of UCX, opened by the first call and kept open.
///
/// # Errors
/// It is not there, or is not UCX. The answer stays the same for the life of the process.
pub fn ucx() -> Result<&'static Loaded<Ucp>, &'static LibraryError> {
    const NAME: &str = "libucp.so.0";
    static LOADED: OnceLock<Result<Loaded<Ucp>, LibraryError>> = OnceLock::new();
    LOADED
        .get_or_init(|| {
            let library = open(NAME)?;
            // SAFETY: as for libibverbs.
            let api = unsafe { Ucp::from_library(library) };
            let api = api.map_err(|error| too_old(NAME, &error))?;
            let path = file_of(api.ucp_get_version as *const c_void);
            let (mut major, mut minor, mut release) = (0, 0, 0);
            // SAFETY: it writes three numbers and needs no context.
            unsafe { api.ucp_get_version(&raw mut major, &raw mut minor, &raw mut release) };
            let version = format!("{major}.{minor}.{release}");
            Ok(loaded(NAME, api, path, Some(version)))
        })
        .as_ref()
}

fn open(name: &'static str) -> Result<Library, LibraryError> {
    // SAFETY: both libraries may be opened at any time; what their constructors do (read the
    // environment, register forks) is safe beside other threads.
    unsafe { Library::new(name) }.map_err(|error| LibraryError::NotOpened {
        name,
        reason: words(&error),
    })
}

fn too_old(name: &'static str, error: &libloading::Error) -> LibraryError {
    LibraryError::TooOld {
        name,
        reason: words(error),
    }
}

/// What the loader said, which libloading keeps as the source.
fn words(error: &libloading::Error) -> String {
    let source = std::error::Error::source(error);
    source.map_or_else(|| error.to_string(), ToString::to_string)
}

fn loaded<T>(name: &str, api: T, path: Option<PathBuf>, version: Option<String>) -> Loaded<T> {
    let path = path.unwrap_or_else(|| name.into());
    Loaded {
        api,
        found: RdmaLibrary { path, version },
    }
}

/// The file that a function was loaded from.
fn file_of(function: *const c_void) -> Option<PathBuf> {
    // SAFETY: a struct of pointers, for which zero is a value.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: `function` is only compared with the address ranges of loaded objects.
    let known = unsafe { libc::dladdr(function, &raw mut info) } != 0;
    if !known || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: a string of the loader that lives as long as the object, which is never closed.
    let name = unsafe { CStr::from_ptr(info.dli_fname) };
    let path = PathBuf::from(name.to_str().ok()?);
    Some(path.canonicalize().unwrap_or(path))
}

/// rdma-core numbers its libraries SONAME.MINOR.RELEASE, as in `libibverbs.so.1.14.44.0`.
fn rdma_core_version(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let (_, numbers) = name.split_once(".so.")?;
    let mut numbers = numbers.splitn(3, '.');
    let release = numbers.nth(2)?;
    Some(format!("rdma-core {release}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_release_of_rdma_core_is_in_the_name() {
        let version = |name: &str| rdma_core_version(Path::new(name));
        assert_eq!(
            version("/usr/lib/libibverbs.so.1.14.44.0").as_deref(),
            Some("rdma-core 44.0")
        );
        assert_eq!(version("/usr/lib/libibverbs.so.1"), None);
        assert_eq!(version("libibverbs.so"), None);
    }

    #[test]
    fn a_missing_library_is_named() {
        let error = open("libnobody-has-this.so.9").unwrap_err();
        assert!(error.to_string().contains("libnobody-has-this.so.9"));
    }

    #[test]
    fn functions_tell_where_they_come_from() {
        let path = file_of(libc::getpid as *const c_void).unwrap();
        assert!(path.to_string_lossy().contains("lib"), "{path:?}");
        assert!(path.exists());
    }
}

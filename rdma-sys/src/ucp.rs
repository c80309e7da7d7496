//! Declarations of Ucp, written by generate.sh from <ucp/api/ucp.h>.
#![allow(
    clippy::all,
    clippy::pedantic,
    missing_docs,
    nonstandard_style,
    unreachable_pub,
    missing_debug_implementations,
    clippy::allow_attributes,
    clippy::missing_safety_doc,
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    clippy::use_self,
    unused_qualifications,
    trivial_numeric_casts,
    unsafe_op_in_unsafe_fn,
    reason = "generated"
)]

pub const UCP_API_MAJOR: u32 = 1;
pub const UCP_API_MINOR: u32 = 13;
pub struct Ucp {
    __library: ::libloading::Library,
    pub ucp_get_version: unsafe extern "C" fn(
        major_version: *mut ::core::ffi::c_uint,
        minor_version: *mut ::core::ffi::c_uint,
        release_number: *mut ::core::ffi::c_uint,
    ),
    pub ucp_get_version_string: unsafe extern "C" fn() -> *const ::core::ffi::c_char,
}
impl Ucp {
    pub unsafe fn from_library<L>(library: L) -> Result<Self, ::libloading::Error>
    where
        L: Into<::libloading::Library>,
    {
        let __library = library.into();
        let ucp_get_version = __library.get(b"ucp_get_version\0").map(|sym| *sym)?;
        let ucp_get_version_string = __library.get(b"ucp_get_version_string\0").map(|sym| *sym)?;
        Ok(Ucp {
            __library,
            ucp_get_version,
            ucp_get_version_string,
        })
    }
    pub unsafe fn ucp_get_version(
        &self,
        major_version: *mut ::core::ffi::c_uint,
        minor_version: *mut ::core::ffi::c_uint,
        release_number: *mut ::core::ffi::c_uint,
    ) {
        (self.ucp_get_version)(major_version, minor_version, release_number)
    }
    pub unsafe fn ucp_get_version_string(&self) -> *const ::core::ffi::c_char {
        (self.ucp_get_version_string)()
    }
}

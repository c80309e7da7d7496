//! The settings of the tiers below G1, under the names that KVBM's users know.
//!
//! One list ([`SETTINGS`]) says all names, units, defaults and forms. [`resolve`] makes
//! [`KvbmSettings`] of it from a file, variables and flags, later ones winning, and reports all that
//! is wrong at once. [`KvbmSettings::sizes`] says what they come to, [`KvbmSettings::check`] what is
//! wrong with that on a machine, [`Report`] shows it. Nothing here reads the environment or looks at the machine: the caller hands
//! over both.

mod check;
mod form;
mod names;
mod report;
mod resolve;
mod sizes;
mod table;

use std::fmt;

pub use check::{Finding, Folder, HostFacts, Severity};
pub use form::{ConsolidatorMode, DiskAllocator, Plain, Secret};
pub use report::{Report, Row};
pub use resolve::{FileValue, FileValues, KvbmFile, KvbmFlags, KvbmTable, SettingError, resolve};
pub use sizes::Sizes;
pub use table::{Described, KvbmSettings, PREFIX, SETTINGS, Shape};

/// A value, and where it comes from.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting<T> {
    /// The value.
    pub value: T,
    /// Its source.
    pub origin: Origin,
}

/// Where a value comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Origin {
    /// Nobody said anything.
    #[default]
    Default,
    /// A file, and a place in it.
    File(String),
    /// A variable of the environment.
    Variable(String),
    /// A flag of the command line.
    Flag(String),
}

impl<T> Setting<T> {
    /// Whether somebody asked for it.
    #[must_use]
    pub fn given(&self) -> bool {
        self.origin != Origin::Default
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(place) => write!(f, "file {place}"),
            Self::Variable(name) => write!(f, "variable {name}"),
            Self::Flag(name) => write!(f, "flag {name}"),
        }
    }
}

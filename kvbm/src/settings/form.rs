//! How values are written: one parser for each form, used for variables, file and flags alike.

use std::{fmt, path::PathBuf};

use serde::Serialize;

use crate::{
    admit::{AdmissionKind, UnknownAdmission},
    evict::{EvictionKind, UnknownEviction},
};

/// What a parser says of text that it does not take: the accepted form.
pub(super) type Parsed<T> = Result<T, String>;

/// A value that is not shown anywhere.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

/// How the disk tier's file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskAllocator {
    /// Without `O_DIRECT`, which is turned on afterwards.
    Default,
    /// With `O_DIRECT` from the start, for file systems that cannot turn it on later.
    OpenDirect,
}

/// Whether events of several tiers are merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConsolidatorMode {
    /// A block is reported stored when the first tier has it, and removed when the last one lost it.
    Dedup,
    /// Every tier reports for itself.
    Passthrough,
}

/// A value as programs read it.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Plain {
    /// Not set, or not shown.
    None,
    /// A switch.
    Switch(bool),
    /// A whole number.
    Count(u64),
    /// Any number.
    Number(f64),
    /// A word, a path, an address.
    Text(String),
}

/// What the values of settings have in common.
pub(super) trait Shown {
    fn plain(&self) -> Plain;
}

impl Secret {
    /// The value itself, for the one who has to present it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(not shown)")
    }
}

impl fmt::Display for Plain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("-"),
            Self::Switch(value) => value.fmt(f),
            Self::Count(value) => value.fmt(f),
            Self::Number(value) => value.fmt(f),
            Self::Text(value) => value.fmt(f),
        }
    }
}

impl Shown for bool {
    fn plain(&self) -> Plain {
        Plain::Switch(*self)
    }
}

impl Shown for u16 {
    fn plain(&self) -> Plain {
        Plain::Count((*self).into())
    }
}

impl Shown for u32 {
    fn plain(&self) -> Plain {
        Plain::Count((*self).into())
    }
}

impl Shown for u64 {
    fn plain(&self) -> Plain {
        Plain::Count(*self)
    }
}

impl Shown for f64 {
    fn plain(&self) -> Plain {
        Plain::Number(*self)
    }
}

impl Shown for String {
    fn plain(&self) -> Plain {
        Plain::Text(self.clone())
    }
}

impl Shown for PathBuf {
    fn plain(&self) -> Plain {
        Plain::Text(self.display().to_string())
    }
}

impl Shown for Secret {
    fn plain(&self) -> Plain {
        Plain::Text("set, not shown".to_owned())
    }
}

impl Shown for AdmissionKind {
    fn plain(&self) -> Plain {
        Plain::Text(self.to_string())
    }
}

impl Shown for EvictionKind {
    fn plain(&self) -> Plain {
        Plain::Text(self.to_string())
    }
}

impl Shown for DiskAllocator {
    fn plain(&self) -> Plain {
        let word = match self {
            Self::Default => "default",
            Self::OpenDirect => "open-direct",
        };
        Plain::Text(word.to_owned())
    }
}

impl Shown for ConsolidatorMode {
    fn plain(&self) -> Plain {
        let word = match self {
            Self::Dedup => "dedup",
            Self::Passthrough => "passthrough",
        };
        Plain::Text(word.to_owned())
    }
}

impl<T: Shown> Shown for Option<T> {
    fn plain(&self) -> Plain {
        self.as_ref().map_or(Plain::None, Shown::plain)
    }
}

/// A switch. What KVBM takes as "set" although it says no is a no here.
pub(super) fn switch(text: &str) -> Parsed<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "on" | "yes" => Ok(true),
        "false" | "0" | "off" | "no" => Ok(false),
        _ => Err("true, 1, on, yes, or false, 0, off, no".to_owned()),
    }
}

/// A whole number from `MIN` to `MAX`.
pub(super) fn count<T: TryFrom<u64>, const MIN: u64, const MAX: u64>(text: &str) -> Parsed<T> {
    let value = text.parse().ok().filter(|n| (MIN..=MAX).contains(n));
    value
        .and_then(|n| T::try_from(n).ok())
        .ok_or_else(|| format!("a whole number from {MIN} to {MAX}"))
}

/// An amount of memory or disk in GB of 10^9 bytes.
pub(super) fn gigabytes(text: &str) -> Parsed<f64> {
    let value = number(text).filter(|gb| *gb <= 1e9);
    value.ok_or_else(|| {
        "GB of 10^9 bytes, 0 or more, with or without a fraction: 200, 0.5".to_owned()
    })
}

/// A rate that may be a fraction.
pub(super) fn rate(text: &str) -> Parsed<f64> {
    let value = number(text).filter(|rate| *rate <= 1e6);
    value.ok_or_else(|| "a number from 0 to 1000000, with or without a fraction: 1, 0.5".to_owned())
}

/// A path, as it is.
pub(super) fn path(text: &str) -> Parsed<PathBuf> {
    Ok(PathBuf::from(text))
}

/// A path that need not be given.
pub(super) fn path_given(text: &str) -> Parsed<Option<PathBuf>> {
    path(text).map(Some)
}

/// A host name or address without a port.
pub(super) fn host(text: &str) -> Parsed<String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-._:%[]".contains(c);
    if text.chars().all(fits) {
        Ok(text.to_owned())
    } else {
        Err("a host name or an address, without a port: 127.0.0.1, ::1, node-3".to_owned())
    }
}

/// A name that need not be given.
pub(super) fn text_given(text: &str) -> Parsed<Option<String>> {
    Ok(Some(text.to_owned()))
}

/// Name of a bucket; the only template in it is `{worker_id}`.
pub(super) fn bucket(text: &str) -> Parsed<Option<String>> {
    let rest = text.replace(WORKER_ID, "");
    let fits = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    if rest.chars().all(fits) {
        Ok(Some(text.to_owned()))
    } else {
        Err(format!(
            "the name of a bucket (letters, digits, '-', '.', '_'); {WORKER_ID} in it stands for the worker: \
             kv-{WORKER_ID}"
        ))
    }
}

/// The place of a worker's name in a bucket's.
pub(super) const WORKER_ID: &str = "{worker_id}";

/// An address of an object store.
pub(super) fn endpoint(text: &str) -> Parsed<Option<String>> {
    let host = text
        .strip_prefix("http://")
        .or_else(|| text.strip_prefix("https://"));
    match host {
        // What comes before an '@' would be credentials, and this is printed.
        Some(host) if !host.is_empty() && !host.contains('@') => Ok(Some(text.to_owned())),
        _ => Err("http://HOST[:PORT] or https://HOST[:PORT], without credentials".to_owned()),
    }
}

/// Something that is not to be shown.
pub(super) fn secret(text: &str) -> Parsed<Option<Secret>> {
    Ok(Some(Secret(text.to_owned())))
}

pub(super) fn disk_allocator(text: &str) -> Parsed<DiskAllocator> {
    match text {
        "default" => Ok(DiskAllocator::Default),
        "open-direct" => Ok(DiskAllocator::OpenDirect),
        _ => Err("default or open-direct".to_owned()),
    }
}

pub(super) fn consolidator_mode(text: &str) -> Parsed<ConsolidatorMode> {
    match text {
        "dedup" => Ok(ConsolidatorMode::Dedup),
        "passthrough" => Ok(ConsolidatorMode::Passthrough),
        _ => Err("dedup or passthrough".to_owned()),
    }
}

/// What comes to G3.
pub(super) fn admission(text: &str) -> Parsed<AdmissionKind> {
    text.parse().map_err(|_: UnknownAdmission| {
        "tail-N with a number of tokens (tail-6144), frequency, frequency+hits, seen-K with a number of requests \
         (seen-2), on-evict, all, none"
            .to_owned()
    })
}

/// What is overwritten first.
pub(super) fn eviction(text: &str) -> Parsed<EvictionKind> {
    text.parse()
        .map_err(|_: UnknownEviction| "lru, multi-lru, s3-fifo, lineage".to_owned())
}

fn number(text: &str) -> Option<f64> {
    let value: f64 = text.parse().ok()?;
    (value.is_finite() && value >= 0.0).then_some(value)
}

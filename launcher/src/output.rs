//! What people read on standard output and standard error. A closed pipe is not an error here.
//!
//! While a live view is shown, lines appear above it.

use std::io::{Write, stderr, stdout};

use indicatif::MultiProgress;
use parking_lot::Mutex;

static LIVE: Mutex<Option<MultiProgress>> = Mutex::new(None);

/// Prints one line to standard output.
pub(crate) fn line(text: &str) {
    if above_the_view(text) {
        return;
    }
    let mut out = stdout().lock();
    // A reader that went away has no use for the rest.
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// Prints one error line to standard error.
pub(crate) fn error(text: &str) {
    diagnostic(&format!("blockplane: {text}"));
}

/// Prints one line as it is to standard error.
pub(crate) fn diagnostic(text: &str) {
    if !above_the_view(text) {
        let _ = writeln!(stderr().lock(), "{text}");
    }
}

/// From now on lines go above this view; without one they go where they belong.
pub(crate) fn set_view(view: Option<MultiProgress>) {
    *LIVE.lock() = view;
}

fn above_the_view(text: &str) -> bool {
    LIVE.lock()
        .as_ref()
        .is_some_and(|view| view.println(text).is_ok())
}

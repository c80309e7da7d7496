//! What people read on standard output and standard error. A closed pipe is not an error here.

use std::io::{Write, stderr, stdout};

/// Prints one line to standard output.
pub(crate) fn line(text: &str) {
    let mut out = stdout().lock();
    // A reader that went away has no use for the rest.
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// Prints one error line to standard error.
pub(crate) fn error(text: &str) {
    let _ = writeln!(stderr().lock(), "blockplane: {text}");
}

/// Prints one line as it is to standard error.
pub(crate) fn diagnostic(text: &str) {
    let _ = writeln!(stderr().lock(), "{text}");
}

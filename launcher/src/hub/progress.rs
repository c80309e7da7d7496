//! How a download goes: a bar on a terminal, a line for each tenth elsewhere.

use std::{
    io::IsTerminal,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use hf_hub::api::Progress;
use indicatif::{ProgressBar, ProgressStyle};

use crate::output;

/// Files below this are not worth lines, in bytes.
const SMALL: u64 = 16 << 20;

/// Progress of one file.
pub(super) struct Shown {
    /// Bytes that came, for who watches whether any come.
    came: Arc<AtomicU64>,
    bar: Option<ProgressBar>,
    name: String,
    total: u64,
    done: u64,
    tenths: u64,
}

impl Shown {
    pub(super) fn new(came: Arc<AtomicU64>) -> Self {
        Self {
            came,
            bar: None,
            name: String::new(),
            total: 0,
            done: 0,
            tenths: 0,
        }
    }
}

impl Progress for Shown {
    fn init(&mut self, size: usize, filename: &str) {
        filename.clone_into(&mut self.name);
        (self.total, self.done, self.tenths) = (size as u64, 0, 0);
        if std::io::stderr().is_terminal() && self.bar.is_none() {
            let style = "  {msg:<34!} {bar:24} {bytes:>10} of {total_bytes:<10} {bytes_per_sec}";
            let style = ProgressStyle::with_template(style).expect("a constant template");
            let bar = ProgressBar::new(self.total).with_style(style);
            self.bar = Some(bar.with_message(self.name.clone()));
        }
    }

    fn update(&mut self, size: usize) {
        self.came.fetch_add(size as u64, Ordering::Relaxed);
        self.done += size as u64;
        if let Some(bar) = &self.bar {
            bar.set_position(self.done);
            return;
        }
        let tenths = 10 * self.done / self.total.max(1);
        if self.total >= SMALL && tenths > self.tenths {
            self.tenths = tenths;
            let megabytes = |bytes: u64| bytes / 1_000_000;
            output::diagnostic(&format!(
                "  {}: {} of {} MB",
                self.name,
                megabytes(self.done),
                megabytes(self.total)
            ));
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish();
        }
    }
}

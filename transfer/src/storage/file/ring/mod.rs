//! The io_uring engine: one ring and one thread per agent, parked while nothing is in flight.
//!
//! Requests of all files share the ring. A transfer that is called off has its requests cancelled,
//! and its parts are given back when their completions are reaped: until then the kernel may use
//! the memory, and the transfer keeps it.

mod driver;
mod mailbox;
mod tables;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::mpsc;

use self::driver::Driver;
use self::mailbox::{Command, Mailbox};
use crate::memory::RegionId;
use crate::op::TransferState;
use crate::storage::StorageConfig;

/// Handle of the ring thread.
pub(crate) struct Ring {
    mailbox: Arc<Mailbox>,
    describe: String,
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Ring").field(&self.describe).finish()
    }
}

impl Ring {
    /// Sets up the ring on its thread.
    ///
    /// # Errors
    /// What the kernel says: `EPERM` and `ENOSYS` where io_uring is forbidden.
    pub(crate) fn start(config: &StorageConfig) -> io::Result<Self> {
        let mailbox = Arc::new(Mailbox::new()?);
        let (ready, started) = mpsc::sync_channel(1);
        let (mail, config) = (mailbox.clone(), config.clone());
        std::thread::Builder::new()
            .name("bp-uring".to_owned())
            .spawn(move || match Driver::new(mail, &config) {
                Ok(driver) => {
                    // The receiver waits below.
                    let _ = ready.send(Ok(driver.describe()));
                    driver.run();
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            })?;
        let describe = started
            .recv()
            .map_err(|_| io::Error::other("the ring thread ended"))??;
        Ok(Self { mailbox, describe })
    }

    pub(crate) fn describe(&self) -> &str {
        &self.describe
    }

    pub(crate) fn transfer(&self, transfer: &Arc<TransferState>) {
        self.mailbox.send(Command::Start(transfer.clone()));
    }

    pub(crate) fn stop(&self, transfer: &Arc<TransferState>) {
        self.mailbox.send(Command::Stop(transfer.clone()));
    }

    pub(crate) fn forget_region(&self, region: RegionId) {
        self.mailbox.send(Command::ForgetRegion(region));
    }

    pub(crate) fn forget_file(&self, file: u64) {
        self.mailbox.send(Command::ForgetFile(file));
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.mailbox.send(Command::Quit);
    }
}

//! Slots: where the end of a launch shows. A line of pinned host memory that every device reaches,
//! and two words in the memory of each device.

use std::sync::atomic::{AtomicU32, Ordering, fence};

use parking_lot::Mutex;

use super::device::{Device, pinned_bytes};
use super::error::CudaError;
use super::kernels::abi::CALLED_OFF;

/// Launches in flight in this process; further ones wait.
const SLOTS: u32 = 4096;
const LINE_BYTES: usize = 64;
/// Two words of a slot on the device.
const COUNTERS_BYTES: usize = 8;
/// Words of a line. The kernel wants those that agree on the start next to each other.
const FLAG: usize = 0;
const ABORT: usize = 1;
const STARTED: usize = 2;
/// For the host alone: the last ticket.
const TICKET: usize = 3;

/// All slots of the process, made when the first device is used.
pub(super) struct SlotPool {
    lines: *mut u8,
    free: Mutex<Vec<u32>>,
}

// SAFETY: pinned memory that lives until the process ends; its words are used atomically.
unsafe impl Send for SlotPool {}
// SAFETY: as above.
unsafe impl Sync for SlotPool {}

/// One slot, until its launch is over.
pub(super) struct Slot {
    pool: &'static SlotPool,
    index: u32,
    counters: u64,
}

impl SlotPool {
    /// A slot for a launch on `device`; `None` when every slot is taken.
    pub(super) fn slot(device: &'static Device) -> Result<Option<Slot>, CudaError> {
        let &(pool, counters) = match device.slots.get() {
            Some(known) => known,
            None => Self::with_counters(device)?,
        };
        let index = pool.free.lock().pop();
        Ok(index.map(|index| Slot {
            pool,
            index,
            counters,
        }))
    }

    /// The pool, and the address of the counters of `device`.
    fn with_counters(device: &'static Device) -> Result<&'static (&'static Self, u64), CudaError> {
        static POOL: Mutex<Option<&'static SlotPool>> = Mutex::new(None);
        let mut known = POOL.lock();
        let pool = match *known {
            Some(pool) => pool,
            None => {
                let lines = pinned_bytes(device, SLOTS as usize * LINE_BYTES)?;
                *known.insert(Box::leak(Box::new(Self {
                    lines,
                    free: Mutex::new((0..SLOTS).rev().collect()),
                })))
            }
        };
        // Under the lock: nobody else makes counters for this device.
        if let Some(made) = device.slots.get() {
            return Ok(made);
        }
        let bytes = SLOTS as usize * COUNTERS_BYTES;
        let counters = device.allocate(bytes)?;
        device.clear(counters, bytes)?;
        Ok(device.slots.get_or_init(|| (pool, counters)))
    }
}

impl Slot {
    fn address(&self, word: usize) -> *mut u8 {
        let at = self.index as usize * LINE_BYTES + word * size_of::<u32>();
        self.pool.lines.wrapping_add(at)
    }

    fn word(&self, word: usize) -> &AtomicU32 {
        // SAFETY: an aligned word of pinned memory that lives until the process ends; host and
        // devices use it atomically only.
        unsafe { AtomicU32::from_ptr(self.address(word).cast()) }
    }

    /// Makes the slot ready for one launch and returns its ticket, which is not 0.
    pub(super) fn arm(&self) -> u32 {
        let ticket = (self.word(TICKET).load(Ordering::Relaxed) + 1) % CALLED_OFF;
        let ticket = ticket.max(1);
        for (word, value) in [(TICKET, ticket), (FLAG, 0), (ABORT, 0), (STARTED, 0)] {
            self.word(word).store(value, Ordering::Release);
        }
        ticket
    }

    /// Whether the launch is over. Its bytes are visible to this thread then.
    pub(super) fn ended(&self, ticket: u32) -> bool {
        self.word(FLAG).load(Ordering::Acquire) % CALLED_OFF == ticket
    }

    /// Tells the launch not to start; true when it has not, and will not touch a byte.
    pub(super) fn call_off(&self, ticket: u32) -> bool {
        self.word(ABORT).store(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.word(STARTED).load(Ordering::SeqCst) != ticket
    }

    pub(super) fn flag_address(&self) -> u64 {
        self.address(FLAG) as u64
    }

    pub(super) fn words_address(&self) -> u64 {
        self.address(ABORT) as u64
    }

    pub(super) fn counter_address(&self) -> u64 {
        self.counters + u64::from(self.index) * COUNTERS_BYTES as u64
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.pool.free.lock().push(self.index);
    }
}

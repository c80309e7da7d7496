//! What waits to be sent on one connection: a byte-bounded FIFO that the HTTP/2 stream drains in
//! batches.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures::{Stream, task::AtomicWaker};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::frame::{Batch, Data, Frame, Kind, Open, payload_cost};

/// Bytes that may wait; senders beyond that wait for space in the order they came.
const OUTBOX_BYTES: usize = 1 << 20;
/// A batch is closed once it has this many bytes.
const BATCH_BYTES: u32 = 64 << 10;
/// A batch is closed once it has this many frames.
const BATCH_FRAMES: usize = 512;

/// Frames that may wait, those without a payload included. A peer that lets more pile up does not read.
const OUTBOX_FRAMES_MAX: usize = 128 << 10;

/// The connection is closed for sending.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Closed;

#[derive(Debug)]
pub(crate) struct Outbox {
    queue: Mutex<Queue>,
    space: Semaphore,
    waker: AtomicWaker,
}

#[derive(Debug, Default)]
struct Queue {
    /// Each frame with the space it holds.
    frames: VecDeque<(Frame, u32)>,
    closed: bool,
}

impl Outbox {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            queue: Mutex::default(),
            space: Semaphore::new(OUTBOX_BYTES),
            waker: AtomicWaker::new(),
        })
    }

    /// Queues a frame with a payload once there is space.
    pub(crate) async fn send(&self, frame: Frame) -> Result<(), Closed> {
        let cost = match &frame.kind {
            Some(
                Kind::Data(Data { payload, .. })
                | Kind::Open(Open {
                    data: Some(Data { payload, .. }),
                    ..
                }),
            ) => payload_cost(payload.len()),
            _ => payload_cost(0),
        };
        let permit = self
            .space
            .acquire_many(cost)
            .await
            .map_err(|_closed| Closed)?;
        self.enqueue(frame, cost)?;
        // The space comes back when the frame leaves the queue.
        permit.forget();
        Ok(())
    }

    /// Queues a frame without a payload, at once: a credit, a cancel, an end. They keep their place
    /// behind what was queued before. Each call has a few of these at most; should they pile up all
    /// the same, the outbox closes and the connection with it.
    pub(crate) fn push(&self, frame: Frame) -> Result<(), Closed> {
        self.enqueue(frame, 0)
    }

    fn enqueue(&self, frame: Frame, cost: u32) -> Result<(), Closed> {
        {
            let mut queue = self.queue.lock();
            if queue.frames.len() >= OUTBOX_FRAMES_MAX {
                queue.closed = true;
            }
            if queue.closed {
                return Err(Closed);
            }
            queue.frames.push_back((frame, cost));
        }
        self.waker.wake();
        Ok(())
    }

    /// Ends the stream after what is queued; later frames are refused.
    pub(crate) fn close(&self) {
        self.queue.lock().closed = true;
        self.space.close();
        self.waker.wake();
    }
}

/// The receiving end, given to tonic. Dropping it closes the outbox and throws away what is queued.
#[derive(Debug)]
pub(crate) struct OutboxStream(pub(crate) Arc<Outbox>);

impl OutboxStream {
    fn take(&self) -> Option<Poll<Option<Batch>>> {
        let mut queue = self.0.queue.lock();
        if queue.frames.is_empty() {
            return queue.closed.then_some(Poll::Ready(None));
        }
        let mut frames = Vec::with_capacity(queue.frames.len().min(BATCH_FRAMES));
        let mut bytes = 0u32;
        while let Some((frame, cost)) = queue.frames.pop_front() {
            bytes = bytes.saturating_add(cost);
            frames.push(frame);
            if bytes >= BATCH_BYTES || frames.len() == BATCH_FRAMES {
                break;
            }
        }
        drop(queue);
        self.0.space.add_permits(bytes as usize);
        Some(Poll::Ready(Some(Batch { frames })))
    }
}

impl Stream for OutboxStream {
    type Item = Batch;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Batch>> {
        if let Some(ready) = self.take() {
            return ready;
        }
        self.0.waker.register(cx.waker());
        // A frame may have come between the look and the registration.
        self.take().unwrap_or(Poll::Pending)
    }
}

impl Drop for OutboxStream {
    fn drop(&mut self) {
        self.0.close();
        self.0.queue.lock().frames.clear();
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures::{FutureExt, StreamExt};

    use super::*;

    fn data(call: u64, bytes: usize) -> Frame {
        Frame::new(
            call,
            Kind::Data(Data {
                payload: Bytes::from(vec![0; bytes]),
                more: false,
            }),
        )
    }

    #[tokio::test]
    async fn frames_leave_in_order_and_together() {
        let outbox = Outbox::new();
        let mut stream = OutboxStream(Arc::clone(&outbox));
        assert!(stream.next().now_or_never().is_none());
        for call in 0..10 {
            outbox.send(data(call, 10)).await.unwrap();
        }
        outbox.push(Frame::new(10, Kind::Credit(1))).unwrap();
        let batch = stream.next().await.unwrap();
        let calls: Vec<u64> = batch.frames.iter().map(|frame| frame.call).collect();
        assert_eq!(calls, (0..=10).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_full_outbox_makes_senders_wait_and_control_frames_pass() {
        let outbox = Outbox::new();
        let mut stream = OutboxStream(Arc::clone(&outbox));
        let mut queued = 0;
        while outbox.send(data(queued, 100_000)).now_or_never().is_some() {
            queued += 1;
        }
        assert_eq!(queued, 10, "ten times 100,128 bytes fit in 1 MiB");
        outbox.push(Frame::new(99, Kind::Credit(1))).unwrap();
        let waiting = outbox.send(data(100, 100_000));
        futures::pin_mut!(waiting);
        assert!(waiting.as_mut().now_or_never().is_none());
        assert_eq!(stream.next().await.unwrap().frames.len(), 1);
        waiting
            .now_or_never()
            .expect("space was given back")
            .unwrap();
    }

    #[tokio::test]
    async fn close_flushes_then_ends_and_wakes_waiting_senders() {
        let outbox = Outbox::new();
        let mut stream = OutboxStream(Arc::clone(&outbox));
        outbox.send(data(1, 1)).await.unwrap();
        outbox.close();
        assert_eq!(outbox.send(data(2, 1)).await, Err(Closed));
        assert_eq!(outbox.push(Frame::new(3, Kind::Credit(1))), Err(Closed));
        assert_eq!(stream.next().await.unwrap().frames.len(), 1);
        assert!(stream.next().await.is_none());
    }
}

//! One running generation: its token stream, its text, its deadline, its measurements.

mod assemble;
pub(crate) mod stop;

use std::{
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

pub(crate) use assemble::{Assembler, AssemblerConfig, Finish, Piece, TokenLog};
use blockplane_protocol::FinishReason;
use tokio::time::{Instant, Sleep};

use crate::{FrameStream, error::ApiError, metrics::RequestMeter};

/// A running generation. Dropping it cancels it.
pub(crate) struct Generation {
    /// `None` once the generation ended.
    frames: Option<FrameStream>,
    assembler: Assembler,
    deadline: Pin<Box<Sleep>>,
    timeout: Duration,
    meter: RequestMeter,
}

impl Generation {
    /// Follows `frames` until `deadline`, which is `timeout` after the request came in.
    pub(crate) fn new(
        frames: FrameStream,
        assembler: Assembler,
        deadline: Instant,
        timeout: Duration,
        meter: RequestMeter,
    ) -> Self {
        Self {
            frames: Some(frames),
            assembler,
            deadline: Box::pin(tokio::time::sleep_until(deadline)),
            timeout,
            meter,
        }
    }

    /// The next piece that has text or is the last; `None` after the last or an error.
    pub(crate) async fn next(&mut self) -> Option<Result<Piece, ApiError>> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// As [`Self::next`].
    pub(crate) fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Piece, ApiError>>> {
        let Some(frames) = &mut self.frames else {
            return Poll::Ready(None);
        };
        if self.deadline.as_mut().poll(cx).is_ready() {
            return self.fail(ApiError::deadline(self.timeout));
        }
        loop {
            let frame = match frames.as_mut().poll_next(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => return self.fail(ApiError::stream_incomplete()),
                Poll::Ready(Some(Err(error))) => return self.fail(error.into()),
                Poll::Ready(Some(Ok(frame))) => frame,
            };
            let seen = self.assembler.tokens_seen();
            let piece = self.assembler.push(frame);
            self.meter.tokens(self.assembler.tokens_seen() - seen);
            match &piece.finish {
                Some(finish) if finish.reason == FinishReason::Cancelled => {
                    return self.fail(ApiError::cancelled());
                }
                Some(finish) => {
                    // Ends what still runs at once, as after a stop string.
                    self.frames = None;
                    self.meter.finished(finish, self.assembler.usage());
                    return Poll::Ready(Some(Ok(piece)));
                }
                None if piece.text.is_empty() => {}
                None => return Poll::Ready(Some(Ok(piece))),
            }
        }
    }

    fn fail(&mut self, error: ApiError) -> Poll<Option<Result<Piece, ApiError>>> {
        self.frames = None;
        self.meter.failed(&error);
        Poll::Ready(Some(Err(error)))
    }
}

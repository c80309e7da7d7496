//! The two ends of a running request: an engine thread sends, a worker's task receives.
//!
//! A sender never waits for its receiver: frames that are not taken yet are merged into one. The
//! memory of a stream is so bounded by the request's own `max_tokens`, and a slow client holds up
//! nobody else.

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use blockplane_protocol::{
    ErrorKind, FinishReason, GenerateError, PrefillReply, TokenFrame, TokenOutput, Usage,
};
use futures::Stream;
use parking_lot::Mutex;

/// Called once when the receiving end is dropped before the end of the request.
pub type OnCancel = Box<dyn Fn() + Send + Sync>;

/// The frames of a request; see [`Engine::generate`](crate::Engine::generate).
pub struct TokenStream {
    shared: Arc<Shared<TokenFrame>>,
}

/// The sending end of a [`TokenStream`]. Dropping it before the end ends the stream with an error.
pub struct TokenSender {
    shared: Arc<Shared<TokenFrame>>,
}

/// The result of a prefill job; see [`Engine::prefill`](crate::Engine::prefill).
pub struct PrefillTicket {
    shared: Arc<Shared<PrefillReply>>,
}

/// The sending end of a [`PrefillTicket`]. Dropping it without a result is an error to the ticket.
pub struct PrefillSender {
    shared: Arc<Shared<PrefillReply>>,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    on_cancel: OnCancel,
}

struct State<T> {
    value: Option<T>,
    error: Option<GenerateError>,
    /// The sender has said everything.
    ended: bool,
    /// The receiver is gone.
    cancelled: bool,
    waker: Option<Waker>,
}

/// A stream of tokens and its sender. `on_cancel` runs on the thread that drops the stream.
#[must_use]
pub fn token_channel(on_cancel: OnCancel) -> (TokenSender, TokenStream) {
    let shared = Shared::new(on_cancel);
    (
        TokenSender {
            shared: Arc::clone(&shared),
        },
        TokenStream { shared },
    )
}

/// A prefill result to come, and its sender. `on_cancel` runs on the thread that drops the ticket.
#[must_use]
pub fn prefill_channel(on_cancel: OnCancel) -> (PrefillSender, PrefillTicket) {
    let shared = Shared::new(on_cancel);
    (
        PrefillSender {
            shared: Arc::clone(&shared),
        },
        PrefillTicket { shared },
    )
}

impl TokenSender {
    /// Sends one token. Returns whether anybody still wants it.
    pub fn token(&self, token: TokenOutput) -> bool {
        self.shared.update(|state| {
            let frame = state.value.get_or_insert_with(TokenFrame::default);
            frame.tokens.push(token);
        })
    }

    /// Tells what the request has cost so far, with the tokens sent at this moment.
    pub fn usage(&self, usage: Usage) {
        self.shared.update(|state| {
            let frame = state.value.get_or_insert_with(TokenFrame::default);
            frame.usage = Some(usage);
        });
    }

    /// Ends the stream well.
    pub fn finish(self, reason: FinishReason, usage: Usage) {
        self.shared.update(|state| {
            let frame = state.value.get_or_insert_with(TokenFrame::default);
            frame.finish = Some(reason);
            frame.usage = Some(usage);
            state.ended = true;
        });
    }

    /// Ends the stream with an error, after the tokens already sent.
    pub fn fail(self, error: GenerateError) {
        self.shared.fail(error);
    }

    /// Whether the stream was dropped.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.shared.state.lock().cancelled
    }
}

impl PrefillSender {
    /// Delivers the result.
    pub fn finish(self, result: Result<PrefillReply, GenerateError>) {
        match result {
            Ok(reply) => {
                self.shared.update(|state| {
                    state.value = Some(reply);
                    state.ended = true;
                });
            }
            Err(error) => self.shared.fail(error),
        }
    }

    /// Whether the ticket was dropped.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.shared.state.lock().cancelled
    }
}

impl<T> Shared<T> {
    fn new(on_cancel: OnCancel) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                value: None,
                error: None,
                ended: false,
                cancelled: false,
                waker: None,
            }),
            on_cancel,
        })
    }

    /// Applies `change` unless the receiver is gone or the end was said; wakes the receiver.
    fn update(&self, change: impl FnOnce(&mut State<T>)) -> bool {
        let waker = {
            let mut state = self.state.lock();
            if state.cancelled || state.ended {
                return false;
            }
            change(&mut state);
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }

    fn fail(&self, error: GenerateError) {
        self.update(|state| {
            state.error = Some(error);
            state.ended = true;
        });
    }

    /// What a sender that is dropped early leaves behind.
    fn abandon(&self) {
        self.fail(GenerateError::new(
            ErrorKind::WorkerLost,
            "the engine ended before the request did",
        ));
    }

    /// The next value, or the error after the last one, or `None` at the end.
    fn poll_next(&self, context: &Context<'_>) -> Poll<Option<Result<T, GenerateError>>> {
        let mut state = self.state.lock();
        if let Some(value) = state.value.take() {
            return Poll::Ready(Some(Ok(value)));
        }
        if let Some(error) = state.error.take() {
            return Poll::Ready(Some(Err(error)));
        }
        if state.ended {
            return Poll::Ready(None);
        }
        state.waker = Some(context.waker().clone());
        Poll::Pending
    }

    fn cancel(&self) {
        let tell = {
            let mut state = self.state.lock();
            let tell = !state.ended && !state.cancelled;
            state.cancelled = true;
            state.value = None;
            tell
        };
        if tell {
            (self.on_cancel)();
        }
    }
}

impl Stream for TokenStream {
    type Item = Result<TokenFrame, GenerateError>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.shared.poll_next(context)
    }
}

impl Future for PrefillTicket {
    type Output = Result<PrefillReply, GenerateError>;

    /// # Panics
    /// When polled again after it was ready.
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.shared
            .poll_next(context)
            .map(|result| result.expect("a ticket is not polled after it was ready"))
    }
}

impl Drop for TokenStream {
    fn drop(&mut self) {
        self.shared.cancel();
    }
}

impl Drop for PrefillTicket {
    fn drop(&mut self) {
        self.shared.cancel();
    }
}

impl Drop for TokenSender {
    fn drop(&mut self) {
        self.shared.abandon();
    }
}

impl Drop for PrefillSender {
    fn drop(&mut self) {
        self.shared.abandon();
    }
}

macro_rules! debug_by_state {
    ($($name:ident),*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let state = self.shared.state.lock();
                f.debug_struct(stringify!($name))
                    .field("ended", &state.ended)
                    .field("cancelled", &state.cancelled)
                    .finish_non_exhaustive()
            }
        }
    )*};
}
debug_by_state!(TokenStream, TokenSender, PrefillTicket, PrefillSender);

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn token(id: u32) -> TokenOutput {
        TokenOutput {
            id,
            logprob: None,
            top: Vec::new(),
        }
    }

    fn poll(stream: &mut TokenStream) -> Poll<Option<Result<TokenFrame, GenerateError>>> {
        Pin::new(stream).poll_next(&mut Context::from_waker(Waker::noop()))
    }

    fn counted() -> (OnCancel, Arc<AtomicUsize>) {
        let count = Arc::new(AtomicUsize::new(0));
        let inner = Arc::clone(&count);
        let on_cancel = Box::new(move || {
            inner.fetch_add(1, Ordering::Relaxed);
        });
        (on_cancel, count)
    }

    #[test]
    fn frames_not_taken_are_merged() {
        let (on_cancel, cancels) = counted();
        let (sender, mut stream) = token_channel(on_cancel);
        assert!(poll(&mut stream).is_pending());
        assert!(sender.token(token(1)) && sender.token(token(2)));
        let Poll::Ready(Some(Ok(frame))) = poll(&mut stream) else {
            panic!("two tokens wait");
        };
        assert_eq!(frame.tokens, [token(1), token(2)]);
        assert_eq!(frame.finish, None);
        sender.token(token(3));
        sender.finish(FinishReason::Length, Usage::default());
        let Poll::Ready(Some(Ok(frame))) = poll(&mut stream) else {
            panic!("the last frame waits");
        };
        assert_eq!(frame.tokens, [token(3)]);
        assert_eq!(frame.finish, Some(FinishReason::Length));
        assert_eq!(poll(&mut stream), Poll::Ready(None));
        drop(stream);
        assert_eq!(cancels.load(Ordering::Relaxed), 0, "it had ended");
    }

    #[test]
    fn an_error_comes_after_the_tokens() {
        let (sender, mut stream) = token_channel(counted().0);
        sender.token(token(7));
        sender.fail(GenerateError::new(ErrorKind::DeadlineExceeded, "late"));
        assert!(matches!(poll(&mut stream), Poll::Ready(Some(Ok(_)))));
        assert!(
            matches!(poll(&mut stream), Poll::Ready(Some(Err(e))) if e.kind == ErrorKind::DeadlineExceeded)
        );
        assert_eq!(poll(&mut stream), Poll::Ready(None));
    }

    #[test]
    fn dropping_the_stream_cancels_once_and_refuses_tokens() {
        let (on_cancel, cancels) = counted();
        let (sender, stream) = token_channel(on_cancel);
        drop(stream);
        assert_eq!(cancels.load(Ordering::Relaxed), 1);
        assert!(sender.is_cancelled());
        assert!(!sender.token(token(1)));
    }

    #[test]
    fn a_lost_sender_is_an_error_not_an_end() {
        let (sender, mut stream) = token_channel(counted().0);
        drop(sender);
        assert!(
            matches!(poll(&mut stream), Poll::Ready(Some(Err(e))) if e.kind == ErrorKind::WorkerLost)
        );
        let (sender, ticket) = prefill_channel(counted().0);
        drop(sender);
        let mut ticket = std::pin::pin!(ticket);
        let mut context = Context::from_waker(Waker::noop());
        assert!(matches!(
            ticket.as_mut().poll(&mut context),
            Poll::Ready(Err(_))
        ));
    }
}

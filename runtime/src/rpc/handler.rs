//! What a server runs for a call.

use std::{
    fmt,
    future::Future,
    marker::PhantomData,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use blockplane_protocol::{GenerateError, RequestId};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use tokio_util::sync::CancellationToken;

/// Longest deadline; more cannot always be added to the clock.
pub(crate) const CENTURY: Duration = Duration::from_hours(24 * 365 * 100);

/// Messages that a handler sends, in order. An error ends the call.
pub type ResponseStream = Pin<Box<dyn Stream<Item = Result<Bytes, GenerateError>> + Send>>;

/// Serves one endpoint.
///
/// The future and the stream of a call are dropped when the client cancels it or is lost, when its
/// deadline passes, and when the server stops. They must not block the thread.
#[async_trait]
pub trait Handler: Send + Sync {
    /// Starts a call.
    async fn call(
        &self,
        context: CallContext,
        payload: Bytes,
    ) -> Result<ResponseStream, GenerateError>;
}

/// Circumstances of one call.
#[derive(Clone, Debug)]
pub struct CallContext {
    request_id: RequestId,
    deadline: Instant,
    cancellation: CancellationToken,
}

impl CallContext {
    /// A context with this much time left; what a test or an in-process caller uses.
    #[must_use]
    pub fn new(
        request_id: RequestId,
        remaining: Duration,
        cancellation: CancellationToken,
    ) -> Self {
        Self::until(
            request_id,
            Instant::now() + remaining.min(CENTURY),
            cancellation,
        )
    }

    pub(crate) const fn until(
        request_id: RequestId,
        deadline: Instant,
        cancellation: CancellationToken,
    ) -> Self {
        Self {
            request_id,
            deadline,
            cancellation,
        }
    }

    /// Name of the request, for logs.
    #[must_use]
    pub const fn request_id(&self) -> &RequestId {
        &self.request_id
    }

    /// When the call ends at the latest.
    #[must_use]
    pub const fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Time left; zero when the deadline has passed. This is what to pass on to the next hop.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// Is cancelled when the call ends in any way other than by its last response: for work that the
    /// handler has given to somebody else.
    #[must_use]
    pub const fn cancellation(&self) -> &CancellationToken {
        &self.cancellation
    }
}

/// A handler made of an async function.
pub fn handler_fn<F, Fut>(function: F) -> Arc<dyn Handler>
where
    F: Fn(CallContext, Bytes) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<ResponseStream, GenerateError>> + Send + 'static,
{
    Arc::new(FunctionHandler {
        function,
        future: PhantomData,
    })
}

/// A handler that answers with one message, made of an async function.
pub fn unary_fn<F, Fut>(function: F) -> Arc<dyn Handler>
where
    F: Fn(CallContext, Bytes) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Bytes, GenerateError>> + Send + 'static,
{
    handler_fn(move |context, payload| {
        let answer = function(context, payload);
        async move {
            let message = answer.await?;
            Ok(futures::stream::iter([Ok(message)]).boxed())
        }
    })
}

struct FunctionHandler<F, Fut> {
    function: F,
    /// The function makes futures; none is kept here.
    future: PhantomData<fn() -> Fut>,
}

impl<F, Fut> fmt::Debug for FunctionHandler<F, Fut> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FunctionHandler")
    }
}

#[async_trait]
impl<F, Fut> Handler for FunctionHandler<F, Fut>
where
    F: Fn(CallContext, Bytes) -> Fut + Send + Sync,
    Fut: Future<Output = Result<ResponseStream, GenerateError>> + Send,
{
    async fn call(
        &self,
        context: CallContext,
        payload: Bytes,
    ) -> Result<ResponseStream, GenerateError> {
        (self.function)(context, payload).await
    }
}

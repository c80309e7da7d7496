//! What the frontend needs from the rest of the system: models, token streams, a status.

use std::{fmt, pin::Pin, sync::Arc};

use async_trait::async_trait;
use blockplane_protocol::{
    GenerateError, GenerateRequest, LoadReport, ModelCard, TokenFrame, WorkerId, WorkerRole,
};
use futures::Stream;

/// Tokens of one generation as they come. Dropping the stream cancels the generation.
///
/// The last frame carries the finish reason. A stream that ends without one is treated as a lost
/// worker. [`TokenFrame::usage`] may come on any frame, the last one counts; a service that puts
/// it on the first frame as well lets responses that end early (stop string) report cached tokens.
pub type FrameStream = Pin<Box<dyn Stream<Item = Result<TokenFrame, GenerateError>> + Send>>;

/// The system behind the HTTP interface.
#[async_trait]
pub trait ModelService: Send + Sync {
    /// The models that can be asked for now. Called for each request, so it must be cheap.
    fn models(&self) -> Vec<Arc<ModelCard>>;

    /// Starts a generation.
    ///
    /// # Errors
    /// A [`GenerateError`] whose kind decides the HTTP status.
    async fn generate(&self, request: GenerateRequest) -> Result<FrameStream, GenerateError>;

    /// Whether a request would be served now, and by whom. Called for `/health` and `/metrics`.
    fn status(&self) -> ServiceStatus;
}

/// Answer to "would a request be served?".
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ServiceStatus {
    /// A request sent now would be served.
    pub ready: bool,
    /// Why not, or what is degraded; empty when all is well.
    pub reason: String,
    /// The workers known, in any order.
    pub workers: Vec<WorkerStatus>,
}

/// One worker as the service sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerStatus {
    /// Its id.
    pub id: WorkerId,
    /// Name for people.
    pub name: String,
    /// What it does.
    pub role: WorkerRole,
    /// Where it listens.
    pub address: String,
    /// Its state in one word, such as `ready` or `draining`.
    pub state: String,
    /// Latest load of each rank.
    pub load: Vec<LoadReport>,
}

impl fmt::Debug for dyn ModelService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelService").finish_non_exhaustive()
    }
}

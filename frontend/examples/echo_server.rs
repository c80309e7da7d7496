//! A frontend over a service that repeats the prompt token by token: for trying clients and for
//! measuring the frontend alone.
//!
//! ```text
//! cargo run --release -p blockplane-frontend --example echo_server -- CHECKPOINT_DIR [ADDRESS] [paced]
//! ```
//!
//! With `paced` each token comes on its own, so that each event is a write of its own.
#![expect(clippy::print_stdout, reason = "a command-line example")]

use std::{error::Error, fs, path::Path, sync::Arc};

use async_trait::async_trait;
use blockplane_frontend::{FrameStream, Frontend, FrontendConfig, ModelService, ServiceStatus};
use blockplane_protocol::{
    DType, FinishReason, GenerateError, GenerateRequest, KvLayout, ModelCard, TokenFrame,
    TokenLogprob, TokenOutput, Usage, WorkerRole,
};
use futures::{StreamExt as _, stream};
use tokio::net::TcpListener;

/// Repeats the prompt until the limit.
struct Echo {
    card: Arc<ModelCard>,
    paced: bool,
}

#[async_trait]
impl ModelService for Echo {
    fn models(&self) -> Vec<Arc<ModelCard>> {
        vec![Arc::clone(&self.card)]
    }

    async fn generate(&self, request: GenerateRequest) -> Result<FrameStream, GenerateError> {
        let prompt_tokens = u32::try_from(request.token_ids.len()).unwrap_or(u32::MAX);
        let limit = request.stop.max_tokens;
        let mut next = 0;
        let frames = std::iter::from_fn(move || {
            if next == limit {
                return None;
            }
            let id = request.token_ids[(next % prompt_tokens) as usize];
            next += 1;
            let top = request.logprobs.unwrap_or(0).min(2);
            let output = TokenOutput {
                id,
                logprob: request.logprobs.map(|_| -0.25),
                top: (0..top)
                    .map(|rank| TokenLogprob {
                        id: id.saturating_sub(rank),
                        logprob: if rank == 0 { -0.25 } else { -2.5 },
                    })
                    .collect(),
            };
            let last = next == limit;
            Some(Ok(TokenFrame {
                tokens: vec![output],
                finish: last.then_some(FinishReason::Length),
                usage: last.then_some(Usage {
                    prompt_tokens,
                    completion_tokens: limit,
                    ..Usage::default()
                }),
            }))
        });
        let frames = stream::iter(frames);
        if self.paced {
            return Ok(Box::pin(frames.then(async |frame| {
                tokio::task::yield_now().await;
                frame
            })));
        }
        Ok(Box::pin(frames))
    }

    fn status(&self) -> ServiceStatus {
        ServiceStatus {
            ready: true,
            ..ServiceStatus::default()
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments
        .next()
        .ok_or("usage: echo_server CHECKPOINT_DIR [ADDRESS] [paced]")?;
    let address = arguments
        .next()
        .unwrap_or_else(|| "127.0.0.1:8000".to_owned());
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(Path::new(&path).join("config.json"))?)?;
    let number = |name: &str| config[name].as_u64().and_then(|n| u32::try_from(n).ok());
    let name = Path::new(&path).file_name().and_then(|name| name.to_str());
    let card = ModelCard {
        name: name.unwrap_or("model").to_owned(),
        path: path.clone(),
        context_tokens_max: number("max_position_embeddings").unwrap_or(4096),
        vocab_size: number("vocab_size").ok_or("config.json has no vocab_size")?,
        eos_token_ids: Vec::new(),
        kv_layout: KvLayout::dense(1, 1, 64, 16, DType::F32),
        blocks: 1,
        dp_size: 1,
        role: WorkerRole::Aggregated,
    };
    let listener = TcpListener::bind(&address).await?;
    println!("model {} on http://{}", card.name, listener.local_addr()?);
    let service = Arc::new(Echo {
        card: Arc::new(card),
        paced: arguments.next().as_deref() == Some("paced"),
    });
    let stop = async {
        let _ = tokio::signal::ctrl_c().await;
    };
    Frontend::new(FrontendConfig::default(), service)?
        .serve(listener, stop)
        .await?;
    Ok(())
}

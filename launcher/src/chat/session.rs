//! The conversation: what was said, and how the next answer is asked for and shown.

use std::{io::Write, time::Duration};

use anyhow::{Context, bail, ensure};
use blockplane_bench::client::{EventStream, Server, json};
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::stats;
use crate::cli::ChatArgs;

const PATH: &str = "/v1/chat/completions";

/// A conversation with one model of one server.
pub(super) struct Session {
    server: Server,
    model: String,
    system: Option<String>,
    messages: Vec<Value>,
    max_tokens: Option<u32>,
    temperature: f32,
    timeout: Duration,
    /// The id of the last answer.
    last: Option<String>,
}

/// How an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    Whole,
    /// By Ctrl-C.
    Stopped,
}

impl Session {
    /// Finds the server and its model.
    pub(super) async fn open(args: ChatArgs) -> anyhow::Result<Self> {
        let server = Server::new(&args.url, args.timeout)?;
        let models = server.models().await.with_context(|| {
            format!(
                "is a server running? `blockplane up` starts one; --url names another than {}",
                server.base()
            )
        })?;
        let model = match args.model {
            Some(name) => known(&models, &name, &server)?,
            None => models
                .into_iter()
                .next()
                .with_context(|| format!("{} serves no model yet", server.base()))?,
        };
        Ok(Self {
            server,
            model,
            system: args.system,
            messages: Vec::new(),
            max_tokens: args.max_tokens,
            temperature: args.temperature,
            timeout: args.timeout,
            last: None,
        })
    }

    pub(super) fn model(&self) -> &str {
        &self.model
    }

    pub(super) fn url(&self) -> &str {
        self.server.base()
    }

    pub(super) async fn models(&self) -> anyhow::Result<Vec<String>> {
        self.server.models().await
    }

    pub(super) async fn change_model(&mut self, name: &str) -> anyhow::Result<()> {
        let models = self.server.models().await?;
        self.model = known(&models, name, &self.server)?;
        Ok(())
    }

    pub(super) fn forget(&mut self) {
        self.messages.clear();
    }

    pub(super) fn instruct(&mut self, text: &str) {
        self.system = (!text.is_empty()).then(|| text.to_owned());
    }

    /// Says something and prints the answer as it comes. A failed exchange is not remembered.
    pub(super) async fn say(&mut self, text: &str) -> anyhow::Result<Ended> {
        let said = self.messages.len();
        self.messages.push(json!({"role": "user", "content": text}));
        let answered = self.answer().await;
        if answered.is_err() {
            self.messages.truncate(said);
        }
        answered
    }

    async fn answer(&mut self) -> anyhow::Result<Ended> {
        let send = self.server.send(
            http::Method::POST,
            PATH,
            Bytes::from(self.body().to_string()),
        );
        let response = self.patiently(send).await??;
        if response.status() != http::StatusCode::OK {
            json(response).await?;
            bail!("the server answered without an answer");
        }
        let mut events = EventStream::new(response.into_body());
        let mut answer = String::new();
        let mut finished = false;
        let mut stopped = false;
        let outcome = loop {
            let event = tokio::select! {
                event = self.patiently(events.next()) => event,
                stop = tokio::signal::ctrl_c() => {
                    stop.context("Ctrl-C cannot be noticed")?;
                    stopped = true;
                    break Ok(());
                }
            };
            let chunk = match event.and_then(|event| Ok(event?)) {
                Ok(Some(chunk)) => chunk,
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            };
            if let Some(message) = chunk["error"]["message"].as_str() {
                break Err(anyhow::anyhow!("{message}"));
            }
            if let Some(id) = chunk["id"].as_str() {
                self.last = Some(id.to_owned());
            }
            let choice = &chunk["choices"][0];
            finished |= choice["finish_reason"].is_string();
            if let Some(piece) = choice["delta"]["content"].as_str() {
                show(piece);
                answer.push_str(piece);
            }
        };
        show("\n");
        outcome?;
        ensure!(
            finished || stopped,
            "the answer ended before it was complete"
        );
        self.messages
            .push(json!({"role": "assistant", "content": answer}));
        Ok(if stopped {
            Ended::Stopped
        } else {
            Ended::Whole
        })
    }

    fn body(&self) -> Value {
        let system = self.system.iter();
        let system = system.map(|text| json!({"role": "system", "content": text}));
        let messages: Vec<Value> = system.chain(self.messages.iter().cloned()).collect();
        let mut body = json!({
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature,
            "stream": true,
        });
        if let Some(tokens) = self.max_tokens {
            body["max_tokens"] = json!(tokens);
        }
        body
    }

    /// What the last answer cost, for people.
    pub(super) async fn cost(&self) -> anyhow::Result<String> {
        let id = self.last.as_ref().context("nothing was answered yet")?;
        let record = self.server.get(&format!("/blockplane/requests/{id}")).await;
        let record = record.context("this server does not say what a request cost")?;
        Ok(stats::describe(&record))
    }

    async fn patiently<T>(&self, what: impl Future<Output = T>) -> anyhow::Result<T> {
        timeout(self.timeout, what)
            .await
            .with_context(|| format!("the server said nothing for {:?}", self.timeout))
    }
}

fn known(models: &[String], name: &str, server: &Server) -> anyhow::Result<String> {
    ensure!(
        models.iter().any(|model| model == name),
        "{} has no model '{name}'; accepted: {}",
        server.base(),
        models.join(", ")
    );
    Ok(name.to_owned())
}

/// Prints a piece of an answer at once. A reader that went away has no use for the rest.
fn show(piece: &str) {
    let mut out = std::io::stdout().lock();
    let _ = write!(out, "{piece}").and_then(|()| out.flush());
}

//! Ends that nobody planned: clients that leave, workers that fail, deadlines, shutdown.

use std::time::Duration;

use blockplane_frontend::FrontendConfig;
use blockplane_protocol::{ErrorKind, FinishReason, GenerateError, Usage};
use futures::{StreamExt as _, stream};
use serde_json::{Value, json};

use crate::support::{PATIENCE, Server, chat, endless, frame, last, speech, stream_of};

const PATH: &str = "/v1/chat/completions";

fn streaming() -> String {
    chat(&json!({"stream": true})).to_string()
}

#[tokio::test]
async fn a_client_that_leaves_a_stream_cancels_it() {
    let server = Server::saying("").await;
    server.answer(|_| Ok(endless(vec![frame([97])])));
    let mut open = server.open("POST", PATH, &[], streaming().as_bytes()).await;
    open.until("\"content\":\"a\"").await;
    drop(open);
    server.stream_dropped().await;
    assert_eq!(
        server.metric("dynamo_frontend_disconnected_clients").await,
        Some(1.0)
    );
    assert_eq!(
        server.metric("dynamo_frontend_inflight_requests").await,
        Some(0.0)
    );
}

#[tokio::test]
async fn a_client_that_leaves_before_the_first_token_cancels_it() {
    for body in [streaming(), chat(&json!({})).to_string()] {
        let server = Server::saying("").await;
        server.answer(|_| Ok(endless(Vec::new())));
        let open = server.open("POST", PATH, &[], body.as_bytes()).await;
        let called = tokio::time::timeout(PATIENCE, server.script.called.acquire()).await;
        called.unwrap().unwrap().forget();
        drop(open);
        server.stream_dropped().await;
    }
}

#[tokio::test]
async fn a_failure_in_mid_stream_is_an_event_and_the_end() {
    let server = Server::saying("").await;
    server.answer(|_| {
        let lost = GenerateError::new(ErrorKind::WorkerLost, "worker 7 is gone");
        Ok(Box::pin(
            stream_of(vec![frame([97])]).chain(stream::iter([Err(lost)])),
        ))
    });
    let reply = server.send("POST", PATH, &[], streaming().as_bytes()).await;
    let events = reply.events();
    let error: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(
        error["error"],
        json!({"message": "worker 7 is gone", "type": "server_error", "param": null, "code": "worker_lost"})
    );
    assert_eq!(events.len(), 3, "{events:?}");
    assert!(!reply.body.contains("[DONE]"));
}

#[tokio::test]
async fn a_failure_before_the_first_token_has_a_status() {
    let server = Server::saying("").await;
    for (kind, status, code, retry) in [
        (ErrorKind::InvalidRequest, 400, "invalid_request", false),
        (ErrorKind::Overloaded, 503, "overloaded", true),
        (ErrorKind::Unavailable, 503, "unavailable", true),
        (ErrorKind::WorkerLost, 503, "worker_lost", true),
        (ErrorKind::DeadlineExceeded, 504, "deadline_exceeded", false),
        (ErrorKind::Cancelled, 503, "cancelled", true),
        (ErrorKind::Internal, 500, "internal_error", false),
    ] {
        for late in [false, true] {
            for body in [streaming(), chat(&json!({})).to_string()] {
                server.answer(move |_| {
                    let error = GenerateError::new(kind, "why");
                    if late {
                        Ok(Box::pin(stream::iter([Err(error)])))
                    } else {
                        Err(error)
                    }
                });
                let reply = server.send("POST", PATH, &[], body.as_bytes()).await;
                assert_eq!(reply.status, status, "{kind:?}");
                let error = reply.error();
                assert_eq!(error["code"], code);
                assert_eq!(error["message"], "why");
                assert_eq!(reply.header("retry-after").is_some(), retry, "{kind:?}");
            }
        }
    }
}

#[tokio::test]
async fn a_stream_that_ends_too_early_is_an_error() {
    let server = Server::saying("").await;
    server.answer(|_| Ok(stream_of(vec![frame([97])])));
    let reply = server.post(PATH, &chat(&json!({}))).await;
    assert_eq!(reply.status, 503);
    assert_eq!(reply.error()["code"], "worker_lost");
    let reply = server.send("POST", PATH, &[], streaming().as_bytes()).await;
    assert!(reply.events().last().unwrap().contains("worker_lost"));
    server.answer(|_| {
        let cancelled = last(FinishReason::Cancelled, Usage::default());
        Ok(stream_of(vec![cancelled]))
    });
    let reply = server.post(PATH, &chat(&json!({}))).await;
    assert_eq!(reply.error()["code"], "cancelled");
}

#[tokio::test]
async fn the_deadline_is_enforced_here_and_passed_on() {
    let server = Server::saying("").await;
    let limit = [("X-Request-Timeout-Ms", "80")];
    server.answer(|_| Ok(endless(Vec::new())));
    for body in [streaming(), chat(&json!({})).to_string()] {
        let reply = server.send("POST", PATH, &limit, body.as_bytes()).await;
        assert_eq!(reply.status, 504, "{reply:?}");
        assert_eq!(reply.error()["code"], "deadline_exceeded");
        server.stream_dropped().await;
        assert!((1..=80).contains(&server.request().deadline_ms));
    }
    server.answer(|_| Ok(endless(vec![frame([97])])));
    let reply = server
        .send("POST", PATH, &limit, streaming().as_bytes())
        .await;
    assert!(reply.events().last().unwrap().contains("deadline_exceeded"));
    server.stream_dropped().await;
}

#[tokio::test]
async fn the_deadline_holds_while_the_service_decides() {
    let server = Server::saying("").await;
    server.script.gate.forget_permits(1000);
    let limit = [("X-Request-Timeout-Ms", "50")];
    let reply = server
        .send("POST", PATH, &limit, streaming().as_bytes())
        .await;
    assert_eq!(reply.status, 504);
}

#[tokio::test]
async fn a_timeout_that_is_no_time_is_refused() {
    let server = Server::saying("x").await;
    for value in ["0", "-1", "soon", "99999999999"] {
        let header = [("X-Request-Timeout-Ms", value)];
        let reply = server
            .send("POST", PATH, &header, streaming().as_bytes())
            .await;
        assert_eq!(reply.status, 400);
        let message = reply.error()["message"].as_str().unwrap().to_owned();
        assert!(
            message.contains(value) && message.contains("3600000"),
            "{message}"
        );
    }
}

#[tokio::test]
async fn shutdown_lets_requests_finish() {
    let mut server = Server::saying("").await;
    let (release, released) = tokio::sync::oneshot::channel::<()>();
    let mut released = Some(released);
    server.answer(move |_| {
        let released = released.take().unwrap();
        let wait = stream::once(async move {
            let _ = released.await;
            Ok(frame([98]))
        });
        let head = stream_of(vec![frame([97])]);
        Ok(Box::pin(head.chain(wait).chain(stream_of(speech("c")))))
    });
    let mut open = server.open("POST", PATH, &[], streaming().as_bytes()).await;
    open.until("\"content\":\"a\"").await;
    server.begin_shutdown();
    release.send(()).unwrap();
    open.read_all().await;
    assert_eq!(open.reply().chat_text(), "abc");
    server.ended().await;
}

#[tokio::test]
async fn shutdown_cancels_what_does_not_finish() {
    let mut config = FrontendConfig::default();
    config.shutdown_grace = Duration::from_millis(20);
    let mut server = Server::start(config).await;
    server.answer(|_| Ok(endless(vec![frame([97])])));
    let mut open = server.open("POST", PATH, &[], streaming().as_bytes()).await;
    open.until("\"content\":\"a\"").await;
    server.begin_shutdown();
    server.stream_dropped().await;
    open.read_all().await;
    server.ended().await;
}

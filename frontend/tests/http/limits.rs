//! Limits: what is over them is refused, at once and clearly.

use blockplane_frontend::FrontendConfig;
use serde_json::json;

use crate::support::{PATIENCE, Server, chat, endless, frame};

const PATH: &str = "/v1/chat/completions";

async fn limited(change: impl FnOnce(&mut FrontendConfig)) -> Server {
    let mut config = FrontendConfig::default();
    change(&mut config);
    let server = Server::start(config).await;
    server.say("x");
    server
}

#[tokio::test]
async fn a_body_over_the_limit_is_413() {
    let server = limited(|config| config.body_bytes_max = 1000).await;
    let exact = |bytes: usize| {
        let mut body = chat(&json!({})).to_string();
        body.push_str(&" ".repeat(bytes - body.len()));
        body
    };
    let fits = server.send("POST", PATH, &[], exact(1000).as_bytes()).await;
    fits.ok();
    for bytes in [1001, 1900, 10_000, 1_000_000] {
        let reply = server
            .send("POST", PATH, &[], exact(bytes).as_bytes())
            .await;
        assert_eq!(reply.status, 413, "{bytes}");
        assert!(
            reply.error()["message"]
                .as_str()
                .unwrap()
                .contains("1000 bytes")
        );
    }
}

#[tokio::test]
async fn a_chunked_body_over_the_limit_is_413() {
    let server = limited(|config| config.body_bytes_max = 1000).await;
    let chunked = [("Transfer-Encoding", "chunked")];
    let mut body = Vec::new();
    for _ in 0..15 {
        body.extend_from_slice(b"64\r\n");
        body.extend_from_slice(&[b' '; 100]);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(b"0\r\n\r\n");
    let reply = server.send("POST", PATH, &chunked, &body).await;
    assert_eq!(reply.status, 413);
}

#[tokio::test]
async fn a_client_that_asks_first_is_not_made_to_send() {
    let server = limited(|config| config.body_bytes_max = 1000).await;
    let headers = [("Content-Length", "5000"), ("Expect", "100-continue")];
    let reply = server.send("POST", PATH, &headers, b"").await;
    assert_eq!(reply.status, 413);
}

#[tokio::test]
async fn a_body_in_pieces_is_put_together() {
    let server = limited(|_| {}).await;
    let body = chat(&json!({})).to_string();
    let length = body.len().to_string();
    let (head, tail) = body.as_bytes().split_at(20);
    let headers = [
        ("Content-Length", length.as_str()),
        ("Expect", "100-continue"),
    ];
    let mut open = server.open("POST", PATH, &headers, b"").await;
    open.until("100 Continue\r\n\r\n").await;
    open.received.clear();
    open.write(head).await;
    open.write(tail).await;
    open.read_all().await;
    open.reply().ok();
}

#[tokio::test]
async fn a_body_that_does_not_come_is_408() {
    let server = limited(|config| config.body_timeout = std::time::Duration::from_millis(30)).await;
    let reply = server
        .send("POST", PATH, &[("Content-Length", "50")], b"{")
        .await;
    assert_eq!(reply.status, 408);
    assert_eq!(reply.error()["code"], "request_timeout");
}

#[tokio::test]
async fn requests_over_the_limit_are_429() {
    let server = limited(|config| config.requests_max = 1).await;
    server.answer(|_| Ok(endless(vec![frame([97])])));
    let body = chat(&json!({"stream": true})).to_string();
    let mut first = server.open("POST", PATH, &[], body.as_bytes()).await;
    first.until("\"content\":\"a\"").await;
    let second = server.send("POST", PATH, &[], body.as_bytes()).await;
    assert_eq!(second.status, 429);
    assert_eq!(second.header("retry-after"), Some("1"));
    let error = second.error();
    assert_eq!(error["type"], "rate_limit_error");
    assert!(error["message"].as_str().unwrap().contains('1'));
    assert_eq!(
        server.get("/live").await.status,
        200,
        "others are not counted"
    );
    drop(first);
    server.stream_dropped().await;
    server.say("x");
    server.post(PATH, &chat(&json!({}))).await.ok();
}

#[tokio::test]
async fn connections_over_the_limit_wait() {
    let server = limited(|config| config.connections_max = 1).await;
    let idle = server.connect().await;
    let waiting = server.get("/live");
    tokio::pin!(waiting);
    // The first connection holds the only slot until it is closed.
    assert!(futures::poll!(waiting.as_mut()).is_pending());
    drop(idle);
    let reply = tokio::time::timeout(PATIENCE, waiting).await.unwrap();
    assert_eq!(reply.status, 200);
}

#[tokio::test]
async fn a_connection_serves_many_requests() {
    let server = limited(|_| {}).await;
    let mut open = server.connect().await;
    let body = chat(&json!({})).to_string();
    for _ in 0..3 {
        let head = format!(
            "POST {PATH} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        open.write(head.as_bytes()).await;
        open.write(body.as_bytes()).await;
        open.until("\"total_tokens\"").await;
        open.until("}}}").await;
        open.received.clear();
    }
}

#[tokio::test]
async fn what_is_not_http_is_refused() {
    let server = limited(|_| {}).await;
    for garbage in [
        &b"\x16\x03\x01\x02\x00garbage\r\n\r\n"[..],
        b"GET\r\n\r\n",
        b"\r\n\r\n\r\n\0",
    ] {
        let mut open = server.connect().await;
        open.write(garbage).await;
        open.read_all().await;
        assert!(!open.received.contains(" 200 "), "{}", open.received);
    }
    server.post(PATH, &chat(&json!({}))).await.ok();
}

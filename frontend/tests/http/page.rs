//! The status page and the documents behind it.

use blockplane_frontend::ServiceStatus;
use serde_json::json;

use crate::{
    status::worker,
    support::{MODEL, Server, chat},
};

#[tokio::test]
async fn the_page_and_all_its_files_come_from_this_server() {
    let server = Server::saying("x").await;
    let page = server.get("/").await;
    assert_eq!(page.status, 200);
    assert_eq!(
        page.header("content-type"),
        Some("text/html; charset=utf-8")
    );
    assert!(
        page.header("content-security-policy")
            .unwrap()
            .starts_with("default-src 'self'")
    );
    let html = &page.body;
    let mut files = 0;
    for (attribute, _) in html.match_indices("=\"/assets/") {
        let path = html[attribute + 2..].split('"').next().unwrap();
        let file = server.get(path).await;
        assert_eq!(file.status, 200, "{path}");
        // Names of XML vocabularies look like addresses; nobody asks there.
        let asks = file.body.replace("http://www.w3.org/", "");
        assert!(!asks.contains("://"), "{path} asks somebody else");
        files += 1;
    }
    assert!(files >= 3);
    assert!(!html.contains("://"), "the page asks somebody else");
    let missing = server.get("/assets/../Cargo.toml").await;
    assert_eq!(missing.status, 404);
    assert_eq!(missing.error()["code"], "unknown_url");
}

#[tokio::test]
async fn the_status_has_workers_models_totals_and_the_last_requests() {
    let server = Server::saying("abc").await;
    server.script.status.lock().unwrap().workers = vec![worker()];
    let answer = server
        .post("/v1/chat/completions", &chat(&json!({})))
        .await
        .ok();
    let id = answer["id"].as_str().unwrap();

    let request = server.get(&format!("/blockplane/requests/{id}")).await.ok();
    assert_eq!(request["id"], id);
    assert_eq!(request["model"], MODEL);
    assert_eq!(request["outcome"], "stop");
    assert_eq!(request["prompt_tokens"], answer["usage"]["prompt_tokens"]);
    assert_eq!(
        request["output_tokens"],
        answer["usage"]["completion_tokens"]
    );
    assert!(request["ttft_ms"].as_f64().unwrap() <= request["total_ms"].as_f64().unwrap());
    assert_eq!(request["transfer"]["lane"], json!(null));

    let status = server.get("/blockplane/status").await.ok();
    assert_eq!(status["ready"], true);
    assert_eq!(status["models"][0]["id"], MODEL);
    assert_eq!(status["workers"][0]["name"], "decode-0");
    assert_eq!(status["workers"][0]["load"][0]["blocks_active"], 3);
    assert_eq!(
        status["workers"][0]["load"][0]["lower"]["host_blocks_total"],
        0
    );
    assert_eq!(status["recent"][0], request);
    let totals = &status["totals"];
    assert_eq!(
        (&totals["requests"], &totals["in_flight"]),
        (&json!(1), &json!(0))
    );
    assert_eq!(totals["output_tokens"], request["output_tokens"]);

    let missing = server.get("/blockplane/requests/chatcmpl-none").await;
    assert_eq!(missing.status, 404);
    assert_eq!(missing.error()["code"], "request_not_found");
}

#[tokio::test]
async fn the_status_says_why_nothing_is_served() {
    let server = Server::saying("x").await;
    *server.script.status.lock().unwrap() = ServiceStatus {
        ready: false,
        reason: "no decode worker".to_owned(),
        workers: Vec::new(),
    };
    let status = server.get("/blockplane/status").await.ok();
    assert_eq!(status["ready"], false);
    assert_eq!(status["reason"], "no decode worker");
}

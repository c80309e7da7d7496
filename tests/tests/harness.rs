//! The client of the harness sorts the ends of requests correctly: what the fault tests assert is
//! worth as much as this.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener},
    ops::ControlFlow,
    time::Duration,
};

use anyhow::{Result, ensure};
use blockplane_tests::{
    Client, Outcome,
    prompts::{Random, sharing_prefixes},
};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(10);

/// How the server behind a test goes on after it has sent its bytes.
#[derive(Clone, Copy, PartialEq)]
enum Then {
    Close,
    Stay,
}

/// Sends one request to a server that answers with `answer`, whatever it is asked.
fn outcome(answer: &str, then: Then, limit: Duration, stop_after: usize) -> Result<Outcome> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let client = Client::new(listener.local_addr()?);
    std::thread::scope(|scope| {
        scope.spawn(move || -> Result<()> {
            let (mut stream, _) = listener.accept()?;
            let mut request = [0; 4096];
            let read = stream.read(&mut request)?;
            ensure!(read > 0);
            stream.write_all(answer.as_bytes())?;
            if then == Then::Stay {
                // Until the client goes away.
                while stream.read(&mut request)? > 0 {}
            }
            stream.shutdown(Shutdown::Both)?;
            Ok(())
        });
        let body = json!({"stream": true});
        Ok(
            client.run_with("/v1/completions", &body, limit, &mut |so_far| {
                if so_far.chunks == stop_after {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            }),
        )
    })
}

fn events(events: &[&str]) -> String {
    let body: String = events
        .iter()
        .map(|event| format!("data: {event}\n\n"))
        .collect();
    format!("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n{body}")
}

fn body(status: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
}

const FIRST: &str =
    r#"{"choices":[{"text":"a","logprobs":{"tokens":["a"]},"finish_reason":null}]}"#;
const LAST: &str =
    r#"{"choices":[{"text":"b","logprobs":{"tokens":["b"]},"finish_reason":"stop"}]}"#;
const ERROR: &str = r#"{"error":{"message":"lost","type":"server_error","code":"worker_lost"}}"#;

#[test]
fn a_whole_stream_is_done() -> Result<()> {
    let answer = events(&[
        FIRST,
        LAST,
        r#"{"choices":[],"usage":{"total_tokens":3}}"#,
        "[DONE]",
    ]);
    let completion = outcome(&answer, Then::Close, LIMIT, 0)?.done()?;
    ensure!(
        completion.text == "ab" && completion.tokens == ["a", "b"],
        "{completion:?}"
    );
    ensure!(
        completion.chunks == 2 && completion.usage.is_some(),
        "{completion:?}"
    );
    ensure!(
        completion.finish_reason.as_deref() == Some("stop"),
        "{completion:?}"
    );
    Ok(())
}

#[test]
fn a_body_is_done_or_refused() -> Result<()> {
    let completion = outcome(&body("200 OK", LAST), Then::Stay, LIMIT, 0)?.done()?;
    ensure!(completion.text == "b", "{completion:?}");
    let refused = outcome(&body("503 No", ERROR), Then::Stay, LIMIT, 0)?;
    ensure!(
        matches!(refused, Outcome::Refused { status: 503, .. }),
        "{refused:?}"
    );
    ensure!(refused.is_clear());
    Ok(())
}

#[test]
fn an_error_in_a_stream_keeps_what_came_before() -> Result<()> {
    let failed = outcome(&events(&[FIRST, ERROR]), Then::Close, LIMIT, 0)?;
    let Outcome::Failed { error, so_far } = &failed else {
        anyhow::bail!("{failed:?}");
    };
    ensure!(error.message == "lost" && so_far.text == "a", "{failed:?}");
    Ok(())
}

#[test]
fn a_cut_stream_and_a_bare_status_are_broken() -> Result<()> {
    for answer in [
        events(&[FIRST]),
        events(&[FIRST, "{\"choices\":"]),
        body("500 Oops", "<html>"),
        body("500 Oops", "{}"),
        String::new(),
    ] {
        let broken = outcome(&answer, Then::Close, LIMIT, 0)?;
        ensure!(matches!(broken, Outcome::Broken(_)), "{answer}: {broken:?}");
        ensure!(!broken.is_clear());
    }
    Ok(())
}

#[test]
fn silence_is_a_hang_before_and_within_a_stream() -> Result<()> {
    for answer in [String::new(), events(&[FIRST])] {
        let hung = outcome(&answer, Then::Stay, Duration::from_millis(200), 0)?;
        ensure!(matches!(hung, Outcome::Hung(_)), "{answer}: {hung:?}");
        ensure!(!hung.is_clear());
    }
    Ok(())
}

/// Leaving closes the connection: the server's read ends, and with it the scope of the test.
#[test]
fn leaving_cuts_the_connection() -> Result<()> {
    let left = outcome(&events(&[FIRST, FIRST]), Then::Stay, LIMIT, 1)?;
    ensure!(
        matches!(&left, Outcome::Left(so_far) if so_far.chunks == 1),
        "{left:?}"
    );
    Ok(())
}

#[test]
fn prompts_repeat_by_seed_and_share_prefixes() {
    let prompts = sharing_prefixes(&mut Random::new(1), 200, 160, 512);
    assert_eq!(
        prompts,
        sharing_prefixes(&mut Random::new(1), 200, 160, 512)
    );
    assert_ne!(
        prompts,
        sharing_prefixes(&mut Random::new(2), 200, 160, 512)
    );
    let mut shared = 0;
    for (index, prompt) in prompts.iter().enumerate() {
        assert!((2..=160).contains(&prompt.len()));
        assert!(prompt.iter().all(|token| (1..512).contains(token)));
        shared += usize::from(prompts[..index].iter().any(|earlier| {
            earlier
                .iter()
                .zip(prompt)
                .take_while(|(a, b)| a == b)
                .count()
                >= 16
        }));
    }
    assert!(shared > 80, "{shared} of 200 share a block");
}

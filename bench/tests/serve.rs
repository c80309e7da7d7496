//! The load generator against a small server that misbehaves on demand.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
};

use blockplane_bench::{report::Report, serve};
use clap::Parser;
use serde_json::{Value, json};

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    args: serve::ServeArgs,
}

/// What the server does with a streamed request.
#[derive(Clone, Copy)]
enum Behaviour {
    /// Streams as many tokens as asked for.
    Answer,
    /// Answers requests with an odd count of tokens with 503.
    RefuseOdd,
    /// Breaks the stream after the first token.
    BreakOff,
    /// Sends an error in the stream.
    ErrorInStream,
}

fn serve(behaviour: Behaviour) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback port");
    let address = listener.local_addr().expect("a bound socket");
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || {
                // The client hangs up when it is done.
                let _ = connection(&stream, behaviour);
            });
        }
    });
    address
}

fn connection(mut stream: &TcpStream, behaviour: Behaviour) -> std::io::Result<()> {
    let mut input = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if input.read_line(&mut head)? == 0 {
                return Ok(());
            }
        }
        let length = head
            .lines()
            .filter_map(|line| {
                line.to_ascii_lowercase()
                    .strip_prefix("content-length:")?
                    .trim()
                    .parse()
                    .ok()
            })
            .next()
            .unwrap_or(0);
        let mut body = vec![0; length];
        input.read_exact(&mut body)?;
        if head.starts_with("GET /v1/models") {
            write_json(stream, "200 OK", &json!({"data": [{"id": "tiny"}]}))?;
            continue;
        }
        let request: Value = serde_json::from_slice(&body)?;
        assert_eq!(request["model"], "tiny");
        let prompt = request["messages"][0]["content"]
            .as_str()
            .or_else(|| request["prompt"].as_str());
        // Two tokens a word and seven for the template.
        let tokens = prompt.map_or(0, |text| 7 + 2 * text.split_whitespace().count());
        let usage = json!({
            "prompt_tokens": tokens,
            "completion_tokens": request["max_tokens"],
            "prompt_tokens_details": {"cached_tokens": 16},
        });
        if request["stream"] != json!(true) {
            write_json(stream, "200 OK", &json!({"choices": [], "usage": usage}))?;
            continue;
        }
        assert_eq!(request["ignore_eos"], json!(true));
        if matches!(behaviour, Behaviour::RefuseOdd) && !tokens.is_multiple_of(4) {
            write_json(
                stream,
                "503 Service Unavailable",
                &json!({"error": {"message": "full"}}),
            )?;
            continue;
        }
        stream.write_all(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n",
        )?;
        let count = request["max_tokens"].as_u64().unwrap_or(0);
        event(
            stream,
            &json!({"choices": [{"delta": {"role": "assistant", "content": ""}}]}),
        )?;
        for token in 0..count {
            let finish = (token + 1 == count).then_some("length");
            event(
                stream,
                &json!({"choices": [{
                    "delta": {"content": "x"}, "text": "x", "finish_reason": finish,
                }]}),
            )?;
            match behaviour {
                Behaviour::Answer | Behaviour::RefuseOdd => {}
                Behaviour::BreakOff => return Ok(()),
                Behaviour::ErrorInStream => {
                    event(stream, &json!({"error": {"message": "lost"}}))?;
                }
            }
        }
        event(stream, &json!({"choices": [], "usage": usage}))?;
        stream.write_all(b"data: [DONE]\n\n")?;
        return Ok(());
    }
}

fn write_json(mut stream: &TcpStream, status: &str, body: &Value) -> std::io::Result<()> {
    let body = body.to_string();
    write!(
        stream,
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn event(mut stream: &TcpStream, data: &Value) -> std::io::Result<()> {
    write!(stream, "data: {data}\n\n")
}

fn bench(behaviour: Behaviour, options: &str) -> (anyhow::Result<()>, Vec<Value>) {
    let address = serve(behaviour);
    let line = format!("serve --json --url http://{address}/v1/ {options}");
    let args = Cli::parse_from(line.split_whitespace()).args;
    let mut out = Vec::new();
    let result = serve::run_to(&args, &mut Report::new(&mut out, args.json));
    let lines = String::from_utf8(out).expect("JSON is UTF-8");
    let records = lines
        .lines()
        .map(|line| serde_json::from_str(line).expect("one object a line"))
        .collect();
    (result, records)
}

fn metric<'a>(records: &'a [Value], name: &str) -> &'a Value {
    records
        .iter()
        .find(|record| record["metric"] == name)
        .unwrap_or_else(|| panic!("no {name} in {records:?}"))
}

#[test]
fn a_closed_loop_counts_every_token() {
    let (result, records) = bench(
        Behaviour::Answer,
        "--requests 12 --concurrency 3 --output-tokens 5 --input-tokens 107 --warmup 1",
    );
    result.expect("all requests succeed");
    assert_eq!(metric(&records, "ttft_ms")["n"], 12);
    assert_eq!(metric(&records, "itl_ms")["n"], 12 * 4);
    assert_eq!(metric(&records, "tpot_ms")["n"], 12);
    assert_eq!(metric(&records, "errors")["value"], 0.0);
    assert_eq!(
        metric(&records, "cached_input_tokens")["value"],
        12.0 * 16.0
    );
    let e2e = metric(&records, "e2e_ms");
    assert_eq!(
        (&e2e["bench"], &e2e["unit"]),
        (&json!("serve"), &json!("ms"))
    );
    assert_eq!(e2e["case"]["concurrency"], 3);
    assert!(e2e["p50"].as_f64() <= e2e["p99"].as_f64());
    // The prompt has the wanted length in the server's own tokens: 7 + 2 * 50.
    let per_second = |name: &str| metric(&records, name)["value"].as_f64().expect("a number");
    let ratio = per_second("input_tokens_per_s") / per_second("output_tokens_per_s");
    assert!((ratio - 107.0 / 5.0).abs() < 1e-6, "{ratio}");
}

#[test]
fn an_open_loop_sends_all_and_says_how_late() {
    let (result, records) = bench(
        Behaviour::Answer,
        "--api completions --requests 20 --rate 400 --output-tokens 2 --seed 3",
    );
    result.expect("all requests succeed");
    assert_eq!(metric(&records, "e2e_ms")["n"], 20);
    assert_eq!(metric(&records, "send_lag_ms")["n"], 20);
    assert_eq!(metric(&records, "e2e_ms")["case"]["loop"], "open");
}

#[test]
fn failures_are_sorted_by_kind() {
    let (result, records) = bench(
        Behaviour::RefuseOdd,
        "--requests 9 --warmup 0 --input-tokens 109 --output-tokens 2 --rate 500",
    );
    assert!(
        result.is_err(),
        "109 tokens are 7 + 2 * 51, which is odd for this server"
    );
    let kind = metric(&records, "errors_by_kind");
    assert_eq!(
        (&kind["case"]["kind"], &kind["value"]),
        (&json!("status_503"), &json!(9.0))
    );
    for (behaviour, name) in [
        (Behaviour::BreakOff, "incomplete"),
        (Behaviour::ErrorInStream, "in_stream"),
    ] {
        let (result, records) = bench(behaviour, "--requests 2 --warmup 0");
        let message = result.expect_err("no request succeeds").to_string();
        assert!(message.contains(&format!("{name} 2")), "{message}");
        assert_eq!(metric(&records, "errors_by_kind")["case"]["kind"], name);
    }
}

#[test]
fn an_option_that_makes_no_sense_is_named() {
    for (options, name) in [
        ("--rate 0", "--rate"),
        ("--requests 0", "--requests"),
        ("--shared-prefix-tokens 200", "--shared-prefix-tokens"),
        ("--url https://example.com", "--url"),
    ] {
        let line = format!("serve {options}");
        let args = Cli::parse_from(line.split_whitespace()).args;
        let error = serve::run_to(&args, &mut Report::new(Vec::new(), true));
        let error = error.expect_err("refused").to_string();
        assert!(error.contains(name), "{error}");
    }
}

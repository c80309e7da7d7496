//! What a request cost, in words.

use std::fmt::Write;

use serde_json::Value;

/// The record of a request (`GET /blockplane/requests/{id}`) in a few lines.
pub(super) fn describe(record: &Value) -> String {
    let cached = &record["cached"];
    let transfer = &record["transfer"];
    let mut text = format!("prompt   {} tokens", record["prompt_tokens"]);
    let tiers: Vec<String> = ["g1", "g2", "g3", "g4"]
        .into_iter()
        .filter(|tier| cached[tier].as_u64().is_some_and(|tokens| tokens > 0))
        .map(|tier| format!("{} from {}", cached[tier], tier.to_uppercase()))
        .collect();
    if tiers.is_empty() {
        text.push_str(", no prefix reused");
    } else {
        let _ = write!(text, ", prefix reused: {}", tiers.join(", "));
    }
    let remote = transfer["prefill_tokens"].as_u64().unwrap_or(0);
    if remote > 0 {
        let _ = write!(text, ", {remote} computed by a prefill worker");
    }
    text.push_str("\nmoved    ");
    match transfer["blocks"].as_u64().filter(|&blocks| blocks > 0) {
        None => text.push_str("no KV between workers"),
        Some(blocks) => {
            let lane = transfer["lane"].as_str().unwrap_or("an unknown lane");
            let bytes = scaled(transfer["bytes"].as_f64().unwrap_or(0.0));
            let _ = write!(text, "{blocks} blocks, {bytes}, over {lane}");
            if let Some(share) = transfer["overlap"].as_f64() {
                let percent = 100.0 * share;
                let _ = write!(
                    text,
                    ", {percent:.0} % in place before the prompt was computed"
                );
            }
        }
    }
    let _ = write!(
        text,
        "\ntime     TTFT {}, ITL {}, {} tokens in {}",
        millis(&record["ttft_ms"]),
        millis(&record["itl_ms"]),
        record["output_tokens"],
        millis(&record["total_ms"])
    );
    text
}

fn millis(value: &Value) -> String {
    match value.as_f64() {
        None => "none".to_owned(),
        Some(ms) if ms < 10.0 => format!("{ms:.2} ms"),
        Some(ms) if ms < 10_000.0 => format!("{ms:.0} ms"),
        Some(ms) => format!("{:.1} s", ms / 1e3),
    }
}

/// Bytes with a decimal unit.
fn scaled(bytes: f64) -> String {
    let (divisor, unit) = match bytes {
        b if b < 1e3 => (1.0, "B"),
        b if b < 1e6 => (1e3, "kB"),
        b if b < 1e9 => (1e6, "MB"),
        _ => (1e9, "GB"),
    };
    let digits = usize::from(divisor > 1.0);
    format!("{:.digits$} {unit}", bytes / divisor)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::describe;

    #[test]
    fn everything_that_is_known_is_said() {
        let record = json!({
            "prompt_tokens": 300, "output_tokens": 32,
            "cached": {"tokens": 256, "g1": 128, "g2": 0, "g3": 128, "g4": 0},
            "transfer": {
                "prefill_tokens": 44, "blocks": 3, "bytes": 49_152, "lane": "shm", "overlap": 0.75,
            },
            "ttft_ms": 12.34, "itl_ms": 1.926, "total_ms": 72.0,
        });
        assert_eq!(
            describe(&record),
            "prompt   300 tokens, prefix reused: 128 from G1, 128 from G3, 44 computed by a prefill worker\n\
             moved    3 blocks, 49.2 kB, over shm, 75 % in place before the prompt was computed\n\
             time     TTFT 12 ms, ITL 1.93 ms, 32 tokens in 72 ms"
        );
    }

    #[test]
    fn nothing_reused_and_nothing_moved_is_said_too() {
        let record = json!({
            "prompt_tokens": 5, "output_tokens": 1,
            "cached": {"tokens": 0, "g1": 0, "g2": 0, "g3": 0, "g4": 0},
            "transfer": {"prefill_tokens": 0, "blocks": 0, "bytes": 0, "lane": null, "overlap": null},
            "ttft_ms": 3.0, "itl_ms": null, "total_ms": 11_000.0,
        });
        assert_eq!(
            describe(&record),
            "prompt   5 tokens, no prefix reused\n\
             moved    no KV between workers\n\
             time     TTFT 3.00 ms, ITL none, 1 tokens in 11.0 s"
        );
    }
}

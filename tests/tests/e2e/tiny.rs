//! What the model that the binary carries says, over the API of the bare `up`.

use std::{collections::BTreeMap, fs};

use anyhow::{Context, Result, ensure};
use blockplane_tests::{ClusterBuilder, fixtures, traffic::LIMIT};
use serde_json::{Value, json};

const MODEL: &str = "blockplane-tiny";
/// Right answers of each kind that the model is for, of a hundred.
const RIGHT_PERCENT_MIN: usize = 90;
/// The kinds that the model is for.
const PROMISED: [&str; 8] = [
    "greeting",
    "repeat, 1 to 8 words",
    "reverse, 1 to 8 words",
    "two-digit addition",
    "recall at 512 tokens",
    "recall at 1024 tokens",
    "meaning of a word",
    "conversation of several turns",
];

/// The questions of `heldout.json`, which training did not see, get the answers that PyTorch gives,
/// letter by letter, and nine of ten of each kind that the model is for are right. A wrong kernel,
/// tokenizer, template or moved block of KV shows here.
#[test]
fn the_bundled_model_answers_as_it_does_in_pytorch() -> Result<()> {
    let path = fixtures::bundled().join("heldout.json");
    let file = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let items: Vec<Value> = serde_json::from_str(&file)?;
    let cluster = ClusterBuilder::new()
        .arguments(&["--worker-args", "--remote-prefill-min-tokens 1"])
        .up()?;
    let client = cluster.client();
    let mut scores: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for item in &items {
        let field = |name: &str| {
            item[name]
                .as_str()
                .with_context(|| format!("{name} of {item}"))
        };
        let body = json!({
            "model": MODEL,
            "messages": item["messages"],
            "max_tokens": 200,
            "temperature": 0,
        });
        let said = client.run("/v1/chat/completions", &body, LIMIT).done()?;
        ensure!(
            said.text == field("pytorch")?,
            "{item}: PyTorch says otherwise than {said:?}"
        );
        ensure!(
            said.finish_reason.as_deref() == Some("stop"),
            "{item}: {said:?}"
        );
        let score = scores.entry(field("kind")?).or_default();
        score.0 += usize::from(said.text == field("right")?);
        score.1 += 1;
    }
    for kind in PROMISED {
        let (right, of) = scores.get(kind).context(kind)?;
        ensure!(
            right * 100 >= of * RIGHT_PERCENT_MIN,
            "{kind}: {right} of {of} right"
        );
    }
    cluster.stop()
}

/// Without a temperature in the request, as a person's first `curl` has none, the answer is sensible, too.
#[test]
fn a_first_greeting_is_answered_at_the_default_temperature() -> Result<()> {
    let cluster = ClusterBuilder::new().arguments(&["--threads", "1"]).up()?;
    let client = cluster.client();
    for _ in 0..5 {
        let body = json!({"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}]});
        let said = client.run("/v1/chat/completions", &body, LIMIT).done()?;
        ensure!(said.text == "Hello! How can I help you?", "{said:?}");
    }
    cluster.stop()
}

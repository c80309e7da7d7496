//! `DYN_HEALTH_CHECK_PAYLOAD`: what the canary asks for.

use anyhow::Context;
use blockplane_protocol::{GenerateRequest, RequestId, RouteHints, SamplingParams, StopConditions};
use serde::Deserialize;

/// The form that Dynamo's workers take. Fields that are not here have no meaning for one token.
#[derive(Deserialize)]
struct Payload {
    token_ids: Vec<u32>,
    #[serde(default)]
    sampling_options: SamplingOptions,
    #[serde(default)]
    stop_conditions: Conditions,
}

#[derive(Default, Deserialize)]
struct SamplingOptions {
    temperature: Option<f32>,
    top_p: Option<f32>,
}

#[derive(Default, Deserialize)]
struct Conditions {
    max_tokens: Option<u32>,
    min_tokens: Option<u32>,
    ignore_eos: Option<bool>,
}

/// Reads JSON, or the file behind `@`.
pub(super) fn read(text: &str) -> anyhow::Result<GenerateRequest> {
    let read = match text.strip_prefix('@') {
        Some(path) => std::fs::read_to_string(path)
            .with_context(|| format!("health check payload {path} cannot be read"))?,
        None => text.to_owned(),
    };
    let payload: Payload = serde_json::from_str(&read).with_context(|| {
        format!(
            "the health check payload {text} is not accepted; accepted: JSON such as \
             {{\"token_ids\": [1], \"stop_conditions\": {{\"max_tokens\": 1}}}}, or @FILE with it"
        )
    })?;
    let (sampling, stop) = (payload.sampling_options, payload.stop_conditions);
    Ok(GenerateRequest {
        request_id: RequestId("canary".to_owned()),
        model: String::new(),
        token_ids: payload.token_ids,
        sampling: SamplingParams {
            temperature: sampling.temperature.unwrap_or(0.0),
            top_p: sampling.top_p.unwrap_or(1.0),
            ..SamplingParams::default()
        },
        stop: StopConditions {
            max_tokens: stop.max_tokens.unwrap_or(1).max(1),
            min_tokens: stop.min_tokens.unwrap_or(0),
            ignore_eos: stop.ignore_eos.unwrap_or(true),
            ..StopConditions::default()
        },
        logprobs: None,
        cache_salt: None,
        lora_name: None,
        priority: None,
        deadline_ms: 0,
        route: RouteHints::default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_of_dynamo_is_understood() {
        let text = r#"{"token_ids":[1,5],"sampling_options":{"temperature":0.5,"n":null,"top_p":null},
            "stop_conditions":{"max_tokens":2,"stop":null,"ignore_eos":null},"eos_token_ids":[]}"#;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("payload.json");
        std::fs::write(&path, text).unwrap();
        for given in [text.to_owned(), format!("@{}", path.display())] {
            let request = read(&given).unwrap();
            assert_eq!(request.token_ids, [1, 5]);
            assert_eq!(
                (request.sampling.temperature, request.sampling.top_p),
                (0.5, 1.0)
            );
            assert_eq!(request.stop.max_tokens, 2);
        }
    }

    #[test]
    fn what_is_not_a_payload_is_refused() {
        for text in ["{}", "x", "@/no/such/file", r#"{"token_ids":"a"}"#] {
            let error = format!("{:#}", read(text).unwrap_err());
            assert!(error.contains("health check payload"), "{error}");
        }
    }
}

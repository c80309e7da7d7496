//! Templates against what transformers made of them, recorded by `tests/record_templates.py`.

use std::{fs, path::PathBuf};

use serde_json::{Value, json};

use super::template::{ChatInput, ChatTemplate, RenderError};

fn data(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(name);
    fs::read_to_string(path).unwrap()
}

fn input(messages: &Value) -> ChatInput {
    ChatInput {
        messages: messages.as_array().unwrap().clone(),
        tools: None,
        add_generation_prompt: false,
        continue_final_message: false,
        kwargs: serde_json::Map::new(),
    }
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, &[]).unwrap()
}

#[test]
fn templates_render_as_transformers_renders_them() {
    let recorded: Value = serde_json::from_str(&data("chat_templates.json")).unwrap();
    let special: Vec<(String, String)> = recorded["special_tokens"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(name, token)| (name.clone(), token.as_str().unwrap().to_owned()))
        .collect();
    let cases = recorded["cases"].as_array().unwrap();
    assert!(cases.len() > 200, "the recording is there");
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let source = data(&format!("templates/{name}.jinja"));
        let template = ChatTemplate::new(&source, &special).unwrap();
        let conversation = case["conversation"].as_str().unwrap();
        let mut input = input(&recorded["conversations"][conversation]);
        input.tools = case["tools"]
            .as_bool()
            .unwrap()
            .then(|| recorded["tools"].clone());
        input.add_generation_prompt = case["add_generation_prompt"].as_bool().unwrap();
        input.kwargs = case["kwargs"].as_object().unwrap().clone();
        let expected = match case["error"].as_str() {
            Some(error) => Err(RenderError::Refused(error.to_owned())),
            None => Ok(case["expected"].as_str().unwrap().to_owned()),
        };
        assert_eq!(
            template.render(&input),
            expected,
            "{name} {conversation} {}",
            case["kwargs"]
        );
    }
}

#[test]
fn a_broken_template_is_one_error_with_its_line() {
    let error = ChatTemplate::new("{{ messages }}\n{% if %}", &[]).unwrap_err();
    assert!(error.contains("(line 2)"), "{error}");
    assert!(!error.contains('\n'), "{error}");
}

#[test]
fn a_failing_template_names_the_fault() {
    let broken = template("{{ messages[0].content.missing.deeper }}");
    let error = broken
        .render(&input(&json!([{"role": "user", "content": "x"}])))
        .unwrap_err();
    assert!(
        matches!(&error, RenderError::Failed(reason) if reason.contains("(line 1)")),
        "{error}"
    );
}

#[test]
fn a_template_cannot_loop_without_end() {
    let endless = template(
        "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}\
         {% endfor %}{% endfor %}{% endfor %}",
    );
    let error = endless.render(&input(&json!([]))).unwrap_err();
    assert!(matches!(error, RenderError::Failed(_)), "{error}");
}

#[test]
fn developer_becomes_system_where_the_template_does_not_know_it() {
    let messages = json!([{"role": "developer", "content": "x"}]);
    let unaware = template("{{ messages[0].role }}");
    assert_eq!(unaware.render(&input(&messages)).unwrap(), "system");
    let aware = template("{# developer #}{{ messages[0].role }}");
    assert_eq!(aware.render(&input(&messages)).unwrap(), "developer");
}

#[test]
fn the_last_message_can_be_left_open() {
    let chat = template(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}\
         {% if add_generation_prompt %}<assistant>{% endif %}",
    );
    let mut open = input(&json!([
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello, "},
    ]));
    open.continue_final_message = true;
    open.add_generation_prompt = true;
    assert_eq!(
        chat.render(&open).unwrap(),
        "<user>Hi<end><assistant>Hello,"
    );
    let drops = template("nothing");
    assert_eq!(drops.render(&open), Err(RenderError::CannotContinue));
}

#[test]
fn kwargs_do_not_replace_the_conversation() {
    let mut sneaky = input(&json!([{"role": "user", "content": "x"}]));
    sneaky.kwargs.insert("messages".to_owned(), json!([]));
    let count = template("{{ messages | length }}");
    assert_eq!(count.render(&sneaky).unwrap(), "1");
}

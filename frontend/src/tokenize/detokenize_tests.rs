//! Incremental text against the tokenizer's own decoder.

use std::sync::Arc;

use proptest::prelude::*;
use serde_json::{Value, json};
use tokenizers::Tokenizer;

use super::{
    detokenize::Detokenizer,
    vocabulary::{Scheme, Start, Vocabulary},
};

/// A tokenizer that can only decode: `words` in order of id, the last `special` of them special.
fn tokenizer(words: &[String], special: usize, decoder: &Value) -> Arc<Vocabulary> {
    let vocabulary: serde_json::Map<String, Value> = words
        .iter()
        .enumerate()
        .map(|(id, word)| (word.clone(), id.into()))
        .collect();
    let added: Vec<Value> = words
        .iter()
        .enumerate()
        .skip(words.len() - special)
        .map(|(id, word)| {
            json!({
                "id": id, "content": word, "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false,
            })
        })
        .collect();
    let file = json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": decoder,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": words[0]},
    });
    let tokenizer = Tokenizer::from_bytes(file.to_string()).unwrap();
    Arc::new(Vocabulary::new(tokenizer))
}

fn words(list: &[&str]) -> Vec<String> {
    list.iter().map(|&word| word.to_owned()).collect()
}

/// All bytes as byte-level characters, pieces with parts of characters, a word outside the
/// alphabet, and two special tokens.
fn byte_level() -> Arc<Vocabulary> {
    let mut list: Vec<String> = Vec::new();
    let mut next = 0x100;
    for byte in 0..=u8::MAX {
        let c = if matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) {
            char::from(byte)
        } else {
            next += 1;
            char::from_u32(next - 1).unwrap()
        };
        list.push(c.to_string());
    }
    let bytes = |list: &[String], text: &[u8]| -> String {
        text.iter().map(|&b| list[usize::from(b)].clone()).collect()
    };
    let pieces = [
        "你".as_bytes(),
        &"你".as_bytes()[..2],
        b" hello",
        "é好".as_bytes(),
        b"\xf0\x9f",
    ];
    let pieces = pieces.map(|piece| bytes(&list, piece));
    list.extend(pieces);
    list.extend(words(&["two words 叫", "<|end|>", "<|start|>"]));
    tokenizer(
        &list,
        2,
        &json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
    )
}

const PLAIN: [&str; 8] = ["<unk>", "▁", "▁a", "a", "b▁c", "▁▁▁", "é", "你好"];

/// Words, then all byte tokens from id 8 on, then two special tokens.
fn byte_fallback() -> Arc<Vocabulary> {
    let mut list = words(&PLAIN);
    list.extend((0..=u8::MAX).map(|byte| format!("<0x{byte:02X}>")));
    list.extend(words(&["<s>", "</s>"]));
    tokenizer(
        &list,
        2,
        &json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]}),
    )
}

fn metaspace() -> Arc<Vocabulary> {
    let mut list = words(&PLAIN);
    list.push("</s>".to_owned());
    tokenizer(
        &list,
        1,
        &json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}),
    )
}

fn word_piece() -> Arc<Vocabulary> {
    let list = words(&["[UNK]", "play", "##ing", "##s", "the", ",", "##é", "[SEP]"]);
    tokenizer(
        &list,
        1,
        &json!({"type": "WordPiece", "prefix": "##", "cleanup": false}),
    )
}

fn streamed(vocabulary: &Arc<Vocabulary>, prompt: &[u32], output: &[u32], skip: bool) -> String {
    let mut detokenizer = Detokenizer::new(Arc::clone(vocabulary), prompt, skip);
    let mut text = String::new();
    for &token in output {
        detokenizer.push(token, &mut text);
    }
    detokenizer.finish(&mut text);
    text
}

fn decoded(vocabulary: &Vocabulary, tokens: &[u32], skip: bool) -> String {
    vocabulary.tokenizer().decode(tokens, skip).unwrap()
}

#[test]
fn decoders_are_recognised() {
    assert_eq!(byte_level().scheme(), Scheme::Table(Start::Keep));
    assert_eq!(byte_fallback().scheme(), Scheme::Table(Start::DropSpace));
    assert_eq!(metaspace().scheme(), Scheme::Table(Start::DropMetaspaces));
    assert_eq!(word_piece().scheme(), Scheme::Window);
}

#[test]
fn a_character_comes_out_when_its_last_byte_is_there() {
    let vocabulary = byte_level();
    let mut detokenizer = Detokenizer::new(Arc::clone(&vocabulary), &[], true);
    let mut text = String::new();
    let lengths = "a你".bytes().map(|byte| {
        detokenizer.push(u32::from(byte), &mut text);
        text.chars().count()
    });
    assert_eq!(lengths.collect::<Vec<_>>(), [1, 1, 1, 2]);
    assert_eq!(text, "a你");
}

#[test]
fn byte_fallback_keeps_the_whole_characters_of_an_ill_formed_run() {
    let vocabulary = byte_fallback();
    let token = |byte: u8| 8 + u32::from(byte);
    let run = [token(b'A'), token(0xFF), token(b'B')];
    // The one place where the two differ; see the documentation of the detokenizer.
    assert_eq!(decoded(&vocabulary, &run, true), "\u{FFFD}\u{FFFD}\u{FFFD}");
    assert_eq!(streamed(&vocabulary, &[], &run, true), "A\u{FFFD}B");
    let cut = [token(0xE4), token(0xBD), 3, token(0xE4)];
    assert_eq!(
        decoded(&vocabulary, &cut, true),
        streamed(&vocabulary, &[], &cut, true)
    );
}

#[test]
fn special_tokens_show_when_asked_for() {
    let vocabulary = byte_level();
    let end = 256 + 6;
    assert_eq!(streamed(&vocabulary, &[], &[97, end, 98], true), "ab");
    assert_eq!(
        streamed(&vocabulary, &[], &[97, end, 98], false),
        "a<|end|>b"
    );
}

/// Tokens of the byte-fallback vocabulary whose runs of bytes are whole characters.
fn well_formed() -> impl Strategy<Value = Vec<u32>> {
    let item = prop_oneof![
        (0..8_u32).prop_map(|word| vec![word]),
        any::<char>().prop_map(|c| {
            let mut bytes = [0; 4];
            c.encode_utf8(&mut bytes)
                .bytes()
                .map(|b| 8 + u32::from(b))
                .collect()
        }),
        (264..268_u32).prop_map(|special_or_unknown| vec![special_or_unknown]),
    ];
    prop::collection::vec(item, 0..20).prop_map(|items| items.concat())
}

proptest! {
    #[test]
    fn byte_level_text_is_the_decoders(
        output in prop::collection::vec(0..270_u32, 0..40),
        skip in any::<bool>(),
    ) {
        let vocabulary = byte_level();
        prop_assert_eq!(
            streamed(&vocabulary, &[], &output, skip),
            decoded(&vocabulary, &output, skip)
        );
    }

    #[test]
    fn byte_level_text_continues_the_prompt(
        prompt in prop::collection::vec(prop_oneof![0..128_u32, Just(256), Just(258)], 0..8),
        output in prop::collection::vec(0..270_u32, 0..20),
    ) {
        let vocabulary = byte_level();
        let all = [prompt.as_slice(), output.as_slice()].concat();
        prop_assert_eq!(
            decoded(&vocabulary, &prompt, true) + &streamed(&vocabulary, &prompt, &output, true),
            decoded(&vocabulary, &all, true)
        );
    }

    #[test]
    fn byte_fallback_text_is_the_decoders(output in well_formed(), skip in any::<bool>()) {
        let vocabulary = byte_fallback();
        prop_assert_eq!(
            streamed(&vocabulary, &[], &output, skip),
            decoded(&vocabulary, &output, skip)
        );
    }

    #[test]
    fn byte_fallback_text_continues_the_prompt(prompt in well_formed(), output in well_formed()) {
        let vocabulary = byte_fallback();
        let all = [prompt.as_slice(), output.as_slice()].concat();
        prop_assert_eq!(
            decoded(&vocabulary, &prompt, true) + &streamed(&vocabulary, &prompt, &output, true),
            decoded(&vocabulary, &all, true)
        );
    }

    #[test]
    fn metaspace_text_continues_the_prompt(
        prompt in prop::collection::vec(0..10_u32, 0..4),
        output in prop::collection::vec(0..10_u32, 0..20),
    ) {
        let vocabulary = metaspace();
        let all = [prompt.as_slice(), output.as_slice()].concat();
        prop_assert_eq!(
            decoded(&vocabulary, &prompt, true) + &streamed(&vocabulary, &prompt, &output, true),
            decoded(&vocabulary, &all, true)
        );
    }

    #[test]
    fn other_decoders_run_over_a_window(
        prompt in prop::collection::vec(0..8_u32, 0..12),
        output in prop::collection::vec(0..8_u32, 0..20),
    ) {
        let vocabulary = word_piece();
        let all = [prompt.as_slice(), output.as_slice()].concat();
        prop_assert_eq!(
            decoded(&vocabulary, &prompt, true) + &streamed(&vocabulary, &prompt, &output, true),
            decoded(&vocabulary, &all, true)
        );
    }
}

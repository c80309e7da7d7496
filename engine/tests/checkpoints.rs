//! Bad checkpoints are one clear error each, never a panic; good ones in every form load.

#[expect(
    dead_code,
    reason = "shared with other test files, which use other parts"
)]
mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use blockplane_engine::model::{
    ConfigError, ExecutorOptions, ForwardError, LoadError, LoadOptions, Model, ModelConfig,
    SequenceSlice,
};
use blockplane_engine::ops::{Compute, Isa};
use blockplane_protocol::{AttentionKind, BlockId, TokenId};
use common::{HeapKv, Reference, Runner, committed, max_difference};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A copy of a fixture that a test can damage.
struct Copy(TempDir);

impl Copy {
    fn of(name: &str) -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        for file in ["config.json", "generation_config.json", "model.safetensors"] {
            fs::copy(committed(name).join(file), folder.path().join(file)).expect("copied");
        }
        Self(folder)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Sets a field of config.json; `null` removes it.
    fn with(self, field: &str, value: Value) -> Self {
        let path = self.path().join("config.json");
        let mut config: Value =
            serde_json::from_slice(&fs::read(&path).expect("read")).expect("valid");
        if value.is_null() {
            config.as_object_mut().expect("an object").remove(field);
        } else {
            config[field] = value;
        }
        fs::write(path, config.to_string()).expect("written");
        self
    }

    fn load(&self) -> Result<std::sync::Arc<Model>, LoadError> {
        Model::load(self.path(), &LoadOptions::new(Compute::F32, 1))
    }

    fn error(&self) -> LoadError {
        self.load().expect_err("a bad checkpoint")
    }
}

/// The tensors of a safetensors file: dtype, shape, bytes.
type Tensors = BTreeMap<String, (String, Vec<usize>, Vec<u8>)>;

fn read_tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).expect("read");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("whole");
    file.iter()
        .map(|(name, tensor)| {
            let dtype = tensor.dtype().to_string();
            let parts = (dtype, tensor.shape().to_vec(), tensor.data().to_vec());
            (name.to_owned(), parts)
        })
        .collect()
}

fn write_tensors(path: &Path, tensors: &Tensors) {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, (dtype, shape, bytes)) in tensors {
        let start = data.len();
        data.extend_from_slice(bytes);
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name.clone(), entry);
    }
    let header = Value::from(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&data);
    fs::write(path, file).expect("written");
}

#[test]
fn an_empty_folder_has_no_configuration() {
    let folder = TempDir::new().expect("a temporary folder");
    let error = Model::load(folder.path(), &LoadOptions::default()).expect_err("nothing there");
    assert!(matches!(&error, LoadError::Read { path, .. } if path.ends_with("config.json")));
}

#[test]
fn a_checkpoint_without_weights_says_what_is_accepted() {
    let copy = Copy::of("llama");
    fs::remove_file(copy.path().join("model.safetensors")).expect("removed");
    let error = copy.error();
    assert!(matches!(error, LoadError::NoWeights { .. }));
    assert!(
        error.to_string().contains("model.safetensors.index.json"),
        "{error}"
    );
}

#[test]
fn truncated_weights_name_the_file() {
    let copy = Copy::of("llama");
    let path = copy.path().join("model.safetensors");
    let whole = fs::read(&path).expect("read");
    for length in [0, 1, 7, 8, 9, 100, 2_000, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..length]).expect("written");
        let error = copy.error();
        assert!(
            matches!(error, LoadError::Safetensors { .. }),
            "{length} bytes: {error}"
        );
        assert!(error.to_string().contains("model.safetensors"), "{error}");
        assert!(
            error.to_string().contains(&format!("{length} bytes")),
            "{error}"
        );
    }
}

#[test]
fn a_wrong_dtype_names_file_tensor_found_and_accepted() {
    let copy = Copy::of("llama");
    let path = copy.path().join("model.safetensors");
    let mut tensors = read_tensors(&path);
    let name = "model.layers.1.mlp.up_proj.weight";
    // As many bytes as before, so that the file itself is whole.
    tensors.get_mut(name).expect("there").0 = "I16".to_owned();
    write_tensors(&path, &tensors);
    let error = copy.error();
    let LoadError::TensorDType { tensor, found, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!((tensor.as_str(), found.as_str()), (name, "I16"));
    assert!(
        error.to_string().ends_with("accepted: BF16, F16, F32"),
        "{error}"
    );
}

#[test]
fn a_missing_tensor_is_named() {
    for name in [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.post_attention_layernorm.weight",
    ] {
        let copy = Copy::of("llama");
        let path = copy.path().join("model.safetensors");
        let mut tensors = read_tensors(&path);
        tensors.remove(name).expect("there");
        write_tensors(&path, &tensors);
        let error = copy.error();
        assert!(
            matches!(&error, LoadError::MissingTensor { tensor, .. } if tensor == name),
            "{error}"
        );
    }
}

#[test]
fn a_wrong_shape_is_named_with_both_shapes() {
    let error = Copy::of("llama")
        .with("intermediate_size", json!(255))
        .error();
    let LoadError::TensorShape {
        tensor,
        found,
        accepted,
        ..
    } = &error
    else {
        panic!("{error}");
    };
    assert_eq!(tensor, "model.layers.0.mlp.gate_proj.weight");
    assert_eq!(
        (found.as_slice(), accepted.as_slice()),
        (&[256, 128][..], &[255, 128][..])
    );
}

#[test]
fn an_unknown_architecture_lists_the_known_ones() {
    let error = Copy::of("llama")
        .with("architectures", json!(["MambaForCausalLM"]))
        .error()
        .to_string();
    assert!(
        error.contains("MambaForCausalLM") && error.contains("Qwen3ForCausalLM"),
        "{error}"
    );
}

#[test]
fn bad_configuration_values_name_the_field() {
    let cases = [
        ("hidden_size", json!(0)),
        ("hidden_size", json!(-128)),
        ("hidden_size", json!("128")),
        ("hidden_size", json!(1_u64 << 60)),
        ("num_hidden_layers", json!(1_000_000)),
        ("num_attention_heads", json!(0)),
        ("num_key_value_heads", json!(3)),
        ("head_dim", json!(33)),
        ("head_dim", json!(1 << 20)),
        ("vocab_size", json!(1.5)),
        ("max_position_embeddings", json!(0)),
        ("rms_norm_eps", json!(0.0)),
        ("rms_norm_eps", json!(-1e-5)),
        ("rms_norm_eps", json!("1e-5")),
        ("hidden_act", json!("gelu")),
        ("tie_word_embeddings", json!("no")),
        ("quantization_config", json!({"quant_method": "awq"})),
        ("eos_token_id", json!(512)),
        ("eos_token_id", json!([1, "two"])),
        ("layer_types", json!(["full_attention"])),
        ("layer_types", json!(["full_attention", "linear_attention"])),
        ("sliding_window", json!(0)),
        ("partial_rotary_factor", json!(0.5)),
        ("rope_theta", json!(0.0)),
    ];
    for (field, bad) in cases {
        let mut copy = Copy::of("mistral-swa").with(field, bad.clone());
        if field == "rope_theta" {
            copy = copy.with("rope_parameters", Value::Null);
        }
        let error = copy.error();
        let LoadError::Config { source, .. } = &error else {
            panic!("{field} = {bad}: {error}");
        };
        let named = match source {
            ConfigError::Value { field, .. } | ConfigError::Missing { field } => *field,
            other => panic!("{field} = {bad}: {other}"),
        };
        assert_eq!(named, field, "{field} = {bad}: {error}");
    }
    for field in [
        "hidden_size",
        "vocab_size",
        "max_position_embeddings",
        "intermediate_size",
    ] {
        let error = Copy::of("llama")
            .with(field, Value::Null)
            .error()
            .to_string();
        assert!(error.ends_with(&format!("{field} is missing")), "{error}");
    }
}

#[test]
fn bad_rope_scaling_is_an_error() {
    for bad in [
        json!({"rope_type": "longrope", "rope_theta": 1e4}),
        json!({"rope_type": 7}),
        json!({"rope_type": "linear"}),
        json!({"rope_type": "linear", "factor": 0.0}),
        json!({"rope_type": "yarn", "factor": -2.0}),
        json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}),
        json!("yarn"),
        json!([1]),
    ] {
        let error = Copy::of("llama")
            .with("rope_parameters", bad.clone())
            .error();
        assert!(matches!(error, LoadError::Config { .. }), "{bad}: {error}");
    }
}

#[test]
fn an_index_cannot_lead_out_of_the_folder() {
    for file in [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
    ] {
        let copy = Copy::of("llama");
        let index = json!({"weight_map": {"model.norm.weight": file}});
        let path = copy.path().join("model.safetensors.index.json");
        fs::write(&path, index.to_string()).expect("written");
        let error = copy.error();
        assert!(
            matches!(error, LoadError::ShardName { .. }),
            "{file}: {error}"
        );
    }
}

#[test]
fn a_damaged_index_is_an_error() {
    let copy = Copy::of("llama");
    let path = copy.path().join("model.safetensors.index.json");
    for text in [
        "",
        "{",
        "[]",
        "{}",
        r#"{"weight_map": 3}"#,
        r#"{"weight_map": {"a": 1}}"#,
    ] {
        fs::write(&path, text).expect("written");
        let error = copy.error();
        assert!(matches!(error, LoadError::Json { .. }), "{text}: {error}");
    }
    fs::write(&path, r#"{"weight_map": {"a": "absent.safetensors"}}"#).expect("written");
    let error = copy.error();
    assert!(matches!(&error, LoadError::Read { path, .. } if path.ends_with("absent.safetensors")));
}

#[test]
fn shards_give_what_a_single_file_gives() {
    let single = Copy::of("qwen3");
    let sharded = Copy::of("qwen3");
    let file = sharded.path().join("model.safetensors");
    let mut shards = [Tensors::new(), Tensors::new(), Tensors::new()];
    let mut map = serde_json::Map::new();
    for (index, (name, tensor)) in read_tensors(&file).into_iter().enumerate() {
        let shard = index % shards.len();
        map.insert(name.clone(), json!(format!("part-{shard}.safetensors")));
        shards[shard].insert(name, tensor);
    }
    for (index, tensors) in shards.iter().enumerate() {
        write_tensors(
            &sharded.path().join(format!("part-{index}.safetensors")),
            tensors,
        );
    }
    fs::remove_file(file).expect("removed");
    let index = json!({"metadata": {}, "weight_map": map}).to_string();
    fs::write(sharded.path().join("model.safetensors.index.json"), index).expect("written");
    let logits = [single, sharded].map(|copy| {
        let mut runner = Runner::of(copy.load().expect("loads"));
        runner.step(&[1, 2, 3, 4, 5], 0, &HeapKv::table(0, 1))
    });
    assert_eq!(logits[0], logits[1]);
}

#[test]
fn one_bit_of_one_weight_makes_another_fingerprint() {
    let copy = Copy::of("qwen3");
    let path = copy.path().join("model.safetensors");
    let of = |name| copy.load().expect("loads").kv_fingerprint(name);
    let (before, other_name) = (of("a"), of("b"));
    assert_ne!(before, other_name);
    let mut tensors = read_tensors(&path);
    // The same contents in a file that is written anew have the same name.
    write_tensors(&path, &tensors);
    assert_eq!(of("a"), before);
    let tensor = "model.layers.1.mlp.down_proj.weight";
    let bytes = &mut tensors.get_mut(tensor).expect("a tensor of it").2;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    write_tensors(&path, &tensors);
    assert_ne!(of("a"), before);
}

#[test]
fn both_forms_of_the_configuration_mean_the_same() {
    let new = Copy::of("llama");
    let old = Copy::of("llama")
        .with("rope_parameters", Value::Null)
        .with("dtype", Value::Null)
        .with("torch_dtype", json!("bfloat16"))
        .with("rope_theta", json!(500_000.0))
        .with(
            "rope_scaling",
            json!({
                "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            }),
        );
    let [new, old] = [new, old].map(|copy| ModelConfig::read(copy.path()).expect("valid"));
    assert_eq!(new, old);
    assert_eq!(new.eos_token_ids, [2, 0], "of both files");
}

#[test]
fn windows_are_per_layer() {
    let qwen = |extra: Value| {
        let mut config = json!({
            "architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "intermediate_size": 64,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 100, "max_position_embeddings": 512, "sliding_window": 32,
        });
        for (field, value) in extra.as_object().expect("an object") {
            config[field] = value.clone();
        }
        ModelConfig::parse(&config).expect("valid")
    };
    let off = qwen(json!({"use_sliding_window": false, "max_window_layers": 2}));
    assert_eq!(off.windows, [None; 4]);
    let on = qwen(json!({"use_sliding_window": true, "max_window_layers": 2}));
    assert_eq!(on.windows, [None, None, Some(32), Some(32)]);
    let groups = on.attention_groups();
    assert_eq!(groups.len(), 2);
    assert_eq!(
        (groups[0].kind, groups[0].layers.as_slice()),
        (AttentionKind::Full, &[0, 1][..])
    );
    let windowed = AttentionKind::SlidingWindow { window: 32 };
    assert_eq!(
        (groups[1].kind, groups[1].layers.as_slice()),
        (windowed, &[2, 3][..])
    );
    let listed = qwen(json!({"layer_types": [
        "sliding_attention", "full_attention", "sliding_attention", "full_attention"
    ]}));
    assert_eq!(listed.windows, [Some(32), None, Some(32), None]);
}

#[test]
fn planted_faults_move_the_logits() {
    // What the tolerance of the reference tests is worth: each of these is a plausible mistake.
    let faults = [
        ("llama", "rms_norm_eps", json!(1e-4)),
        (
            "llama",
            "rope_parameters",
            json!({"rope_type": "default", "rope_theta": 500_000.0}),
        ),
        (
            "qwen3",
            "rope_parameters",
            json!({"rope_type": "default", "rope_theta": 990_000.0}),
        ),
        ("mistral-swa", "sliding_window", Value::Null),
        ("mistral-swa", "sliding_window", json!(25)),
    ];
    for (name, field, value) in faults {
        let reference = Reference::read(&committed(name));
        let prompt = &reference.prompts[2];
        let copy = Copy::of(name).with(field, value.clone());
        let mut runner = Runner::of(copy.load().expect("loads"));
        let logits = runner.step(&prompt.ids, 0, &HeapKv::table(0, 1));
        let moved = max_difference(&logits, prompt.logits.last().expect("has one"));
        assert!(
            moved > 1e-3,
            "{name} with {field} = {value} moves logits by only {moved}"
        );
    }
}

#[test]
fn an_instruction_set_that_is_not_there_is_an_error() {
    for isa in Isa::ALL.into_iter().filter(|isa| !isa.is_available()) {
        let options = LoadOptions::new(Compute::Bf16, 1).with_isa(isa);
        let error = Model::load(&committed("llama"), &options).expect_err("not there");
        assert!(
            error.to_string().contains("accepted here: portable"),
            "{error}"
        );
    }
    let options = LoadOptions::new(Compute::Bf16, 0);
    let error = Model::load(&committed("llama"), &options).expect_err("no threads");
    assert!(
        error.to_string().starts_with("0 compute threads"),
        "{error}"
    );
}

#[test]
fn bad_batches_are_errors_and_write_nothing() {
    let mut runner = Runner::of(Copy::of("llama").load().expect("loads"));
    let table = HeapKv::table(0, 1);
    let outside = [BlockId(128)];
    let many = vec![1; ExecutorOptions::default().batch_tokens_max + 1];
    let slice = |tokens: &'static [TokenId], position, blocks| SequenceSlice {
        tokens,
        position,
        blocks,
        logits: true,
    };
    let many = SequenceSlice {
        tokens: &many,
        ..slice(&[], 0, &table)
    };
    type Expected = fn(&ForwardError) -> bool;
    let cases: Vec<(Vec<SequenceSlice<'_>>, Expected)> = vec![
        (vec![slice(&[], 0, &table)], |e| {
            matches!(e, ForwardError::Empty { .. })
        }),
        (vec![slice(&[512], 0, &table)], |e| {
            matches!(
                e,
                ForwardError::Token {
                    token: 512,
                    vocab_size: 512,
                    ..
                }
            )
        }),
        (vec![slice(&[1], 4096, &table)], |e| {
            matches!(e, ForwardError::Context { end: 4097, .. })
        }),
        (vec![slice(&[1], u32::MAX, &table)], |e| {
            matches!(e, ForwardError::Context { .. })
        }),
        (vec![slice(&[1, 2], 15, &table[..1])], |e| {
            matches!(
                e,
                ForwardError::BlockTable {
                    found: 1,
                    needed: 2,
                    ..
                }
            )
        }),
        (vec![slice(&[1], 0, &outside)], |e| {
            matches!(e, ForwardError::Block { .. })
        }),
        (vec![slice(&[1], 0, &table), slice(&[2], 1, &table)], |e| {
            matches!(e, ForwardError::SharedBlock { .. })
        }),
        (vec![many], |e| {
            matches!(e, ForwardError::Batch { what: "tokens", .. })
        }),
    ];
    for (batch, is_expected) in cases {
        let error = runner
            .executor
            .forward(&batch, &runner.kv, &mut |_| panic!("nothing may run"))
            .expect_err("a bad batch");
        assert!(is_expected(&error), "{error}");
    }
    // Reading one block from two sequences is fine; only writing is not.
    let prompt: Vec<TokenId> = (0..16).collect();
    runner.step(&prompt, 0, &table);
    let (a, b) = ([table[0], table[1]], [table[0], table[2]]);
    let batch = [slice(&[7], 16, &a), slice(&[8], 16, &b)];
    assert!(
        runner
            .executor
            .forward(&batch, &runner.kv, &mut |_| {})
            .is_ok()
    );

    let wrong = HeapKv::new(
        runner
            .executor
            .model()
            .config()
            .kv_layout(common::BLOCK_TOKENS, blockplane_protocol::DType::Bf16),
    );
    let batch = [slice(&[1], 0, &table)];
    let error = runner
        .executor
        .forward(&batch, &wrong, &mut |_| {})
        .expect_err("not its layout");
    assert!(matches!(error, ForwardError::Layout { .. }), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Random damage to the header of the weights ends in an error or in a model, never a panic.
    #[test]
    fn damaged_headers_never_panic(at in 0_usize..2_600, byte in any::<u8>()) {
        let copy = Copy::of("qwen3");
        let path = copy.path().join("model.safetensors");
        let mut bytes = fs::read(&path).expect("read");
        bytes[at] = byte;
        fs::write(&path, bytes).expect("written");
        if let Err(error) = copy.load() {
            prop_assert!(!error.to_string().is_empty());
        }
    }

    /// Random JSON in place of the configuration never panics.
    #[test]
    fn random_configurations_never_panic(
        field in prop::sample::select(vec![
            "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
            "sliding_window", "layer_types", "eos_token_id", "architectures", "hidden_act",
        ]),
        number in any::<f64>(),
        integer in any::<i64>(),
        kind in 0..6,
    ) {
        let value = match kind {
            0 => json!(number),
            1 => json!(integer),
            2 => json!(integer.to_string()),
            3 => json!([integer, number]),
            4 => json!({"rope_type": "yarn", "factor": number, "rope_theta": integer}),
            _ => json!(true),
        };
        let mut config: Value = serde_json::from_slice(
            &fs::read(committed("mistral-swa").join("config.json")).expect("read"),
        ).expect("valid");
        config[field] = value;
        if let Ok(config) = ModelConfig::parse(&config) {
            prop_assert!(config.kv_layout(16, blockplane_protocol::DType::F32).validate(1).is_ok());
        }
    }
}

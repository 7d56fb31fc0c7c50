//! The files beside the weights.
//!
//! A tuned model is as good as what it is served with: the template that its rows were rendered
//! with, and the tokens that end its answers. Both are written from what training really used, in
//! every place where a loader looks for them.

use hone_cli::Failure;
use hone_model::StoredType;
use hone_schema::InputRef;
use hone_store::{Draft, ModelDir, Sealed};
use serde_json::{Map, Value, json};

/// Longest of these files read: twice the largest vocabulary seen.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Files of a tokenizer that are passed on as they are.
const TOKENIZER_FILES: [&str; 3] = ["added_tokens.json", "special_tokens_map.json", "vocab.json"];

/// Name of the chat template.
const TEMPLATE: &str = "chat_template.jinja";

/// The chat templates that rows were rendered with.
pub(crate) struct Templates {
    /// That of all rows, or of those without tools.
    default: String,
    /// That of rows with tools, where they had one of their own.
    tool_use: Option<String>,
}

/// Writes configuration, tokenizer, template and stop tokens; returns the stop tokens. The
/// configuration is that of the base, and whether its tied head has become a matrix of its own.
pub(crate) fn write(
    draft: &Draft,
    (config_json, unties): (&str, bool),
    stored: StoredType,
    base: &ModelDir,
    packs: &Sealed,
    templates: Option<&Templates>,
) -> Result<Vec<u32>, Failure> {
    let mut config = object("config.json", config_json.as_bytes())?;
    set_dtype(&mut config, stored);
    if unties {
        config.insert("tie_word_embeddings".to_owned(), false.into());
    }
    write_object(draft, "config.json", &config)?;

    let stops = stop_ids(packs)?;
    let generation = base.try_read("generation_config.json", FILE_BYTES_MAX)?;
    let generation =
        generation.map(|bytes| object("generation_config.json", &bytes)).transpose()?;
    let generation = generation_config(generation.unwrap_or_default(), &config, &stops);
    write_object(draft, "generation_config.json", &generation)?;

    draft.write("tokenizer.json", &packs.read("tokenizer.json")?, None)?;
    let tokenizer = base.try_read("tokenizer_config.json", FILE_BYTES_MAX)?;
    let tokenizer = tokenizer.map(|b| object("tokenizer_config.json", &b)).transpose()?;
    let has_two = templates.is_some_and(|t| t.tool_use.is_some());
    if tokenizer.is_some() || has_two {
        let mut tokenizer = tokenizer.unwrap_or_default();
        set_template(&mut tokenizer, templates);
        write_object(draft, "tokenizer_config.json", &tokenizer)?;
    }
    for name in TOKENIZER_FILES {
        if let Some(bytes) = base.try_read(name, FILE_BYTES_MAX)? {
            draft.write(name, &bytes, None)?;
        }
    }
    // Loaders that find this file do not read the list of the configuration.
    let template = match templates {
        Some(_) if has_two => None,
        Some(used) => Some(used.default.as_bytes().to_vec()),
        None => base.try_read(TEMPLATE, FILE_BYTES_MAX)?,
    };
    if let Some(template) = template {
        draft.write(TEMPLATE, &template, None)?;
    }
    Ok(stops)
}

/// The templates that the rows were rendered with, as they were used.
pub(crate) fn templates(rendered: &Sealed) -> Result<Templates, Failure> {
    let read = |name| {
        String::from_utf8(rendered.read(name)?).map_err(|_| {
            Failure::input(format!("`{}` is not UTF-8", rendered.path(name).display()))
        })
    };
    let tool_use = rendered.has("tool_use.jinja").then(|| read("tool_use.jinja")).transpose()?;
    Ok(Templates { default: read("template.jinja")?, tool_use })
}

/// The template's identity, to be told beside scores.
pub(crate) fn template_ref(rendered: &Sealed) -> Option<InputRef> {
    let entry = rendered.manifest().file("template.jinja")?;
    Some(InputRef { role: "template.jinja".to_owned(), sha256: entry.sha256.clone() })
}

/// The tokens that end a text or an answer.
fn stop_ids(packs: &Sealed) -> Result<Vec<u32>, Failure> {
    let name = "stops.json";
    let value = object(name, &packs.read(name)?)?;
    let ids = value.get("stop_ids").and_then(Value::as_array).and_then(|ids| {
        ids.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect()
    });
    ids.ok_or_else(|| {
        let at = packs.path(name);
        Failure::input(format!("`{}`: `stop_ids` is no list of token ids", at.display()))
    })
}

fn object(name: &str, bytes: &[u8]) -> Result<Map<String, Value>, Failure> {
    serde_json::from_slice(bytes)
        .map_err(|e| Failure::input(format!("{name} is not a JSON object: {e}")))
}

fn write_object(draft: &Draft, name: &str, value: &Map<String, Value>) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).expect("JSON values have only string keys");
    Ok(draft.write(name, format!("{text}\n").as_bytes(), None)?)
}

/// Says how values lie in the file now, under the name that the configuration uses.
fn set_dtype(config: &mut Map<String, Value>, stored: StoredType) {
    let name = match stored {
        StoredType::F32 => "float32",
        StoredType::Bf16 => "bfloat16",
    };
    let keys: Vec<&str> =
        ["dtype", "torch_dtype"].into_iter().filter(|key| config.contains_key(*key)).collect();
    for key in if keys.is_empty() { vec!["torch_dtype"] } else { keys } {
        config.insert(key.to_owned(), name.into());
    }
    // What is written is plain, whatever the base was read from.
    config.remove("quantization_config");
}

/// Settings of generation: the base's own, ended by all of `stops` and by whatever ended the base's
/// texts.
fn generation_config(
    mut settings: Map<String, Value>,
    config: &Map<String, Value>,
    stops: &[u32],
) -> Map<String, Value> {
    for key in ["bos_token_id", "pad_token_id"] {
        if let (None, Some(id)) = (settings.get(key), config.get(key)) {
            settings.insert(key.to_owned(), id.clone());
        }
    }
    let mut ids: Vec<Value> = stops.iter().map(|id| json!(id)).collect();
    let before = [settings.get("eos_token_id"), config.get("eos_token_id")];
    for value in before.into_iter().flatten() {
        let more = match value {
            Value::Array(list) => list.clone(),
            Value::Null => Vec::new(),
            one => vec![one.clone()],
        };
        for id in more {
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
    }
    settings.insert("eos_token_id".to_owned(), ids.into());
    settings
}

/// Older loaders read the template here, newer ones from its own file: both get the same. A model
/// that saw no conversation keeps what its base had.
///
/// Two templates are a list of named ones: in files they would need a folder, which a sealed
/// directory does not have.
fn set_template(tokenizer: &mut Map<String, Value>, templates: Option<&Templates>) {
    let Some(Templates { default, tool_use }) = templates else { return };
    let value = match tool_use {
        None => default.as_str().into(),
        Some(tool_use) => json!([
            {"name": "default", "template": default},
            {"name": "tool_use", "template": tool_use},
        ]),
    };
    tokenizer.insert("chat_template".to_owned(), value);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(value: Value) -> Map<String, Value> {
        value.as_object().expect("the tests give objects").clone()
    }

    #[test]
    fn answers_end_at_the_chat_stop_and_at_the_base_s_own() {
        let check = |settings: Value, config: Value, stops: &[u32], expected: Value| {
            assert_eq!(generation_config(map(settings), &map(config), stops), map(expected));
        };
        check(
            json!({"temperature": 0.6, "eos_token_id": 0}),
            json!({"bos_token_id": 1, "eos_token_id": 0}),
            &[2, 0],
            json!({"temperature": 0.6, "eos_token_id": [2, 0], "bos_token_id": 1}),
        );
        check(json!({}), json!({"eos_token_id": [5, 6]}), &[2], json!({"eos_token_id": [2, 5, 6]}));
        check(json!({}), json!({"eos_token_id": null}), &[], json!({"eos_token_id": []}));
    }

    #[test]
    fn the_configuration_says_how_values_lie() {
        let check = |before: Value, expected: Value| {
            let mut config = map(before);
            set_dtype(&mut config, StoredType::F32);
            assert_eq!(config, map(expected));
        };
        check(json!({"dtype": "bfloat16"}), json!({"dtype": "float32"}));
        check(json!({"torch_dtype": "float16", "a": 1}), json!({"torch_dtype": "float32", "a": 1}));
        check(json!({"quantization_config": {"bits": 4}}), json!({"torch_dtype": "float32"}));
    }

    #[test]
    fn both_places_of_the_template_agree() {
        let mut tokenizer = map(json!({"chat_template": "old"}));
        set_template(&mut tokenizer, None);
        assert_eq!(tokenizer["chat_template"], "old");
        let mut templates = Templates { default: "new".to_owned(), tool_use: None };
        set_template(&mut tokenizer, Some(&templates));
        assert_eq!(tokenizer["chat_template"], "new");
        templates.tool_use = Some("tools".to_owned());
        set_template(&mut tokenizer, Some(&templates));
        let list = json!([
            {"name": "default", "template": "new"},
            {"name": "tool_use", "template": "tools"},
        ]);
        assert_eq!(tokenizer["chat_template"], list);
    }
}

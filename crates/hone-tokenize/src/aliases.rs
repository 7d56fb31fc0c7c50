//! The names that other tools give to the settings of this stage.
//!
//! A table `[tokenize]` may use them. Each is turned into hone's own key before the table is read, and it is said which; two that
//! contradict each other, and what has no counterpart here, are refused.

use hone_cli::Failure;
use hone_cli::toml::{Table, Value};
use hone_tokens::TrainOn;

/// What was turned into what.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Aliases {
    /// Own keys, and the names that they have in the file.
    pub(crate) renamed: Vec<(String, String)>,
    /// A line each for people.
    pub(crate) notes: Vec<String>,
}

/// What one setting says about one of hone's own.
struct Says {
    key: &'static str,
    value: Value,
    /// Other values that it does not mind; `None`: no other.
    minds: Option<fn(&Value) -> bool>,
}

/// A setting as it stands in the table.
struct Given {
    name: String,
    value: Value,
    says: Vec<Says>,
}

type Meaning = fn(&Value) -> Result<Vec<Says>, &'static str>;

const BOOL: &str = "it is `true` or `false`";

/// The other tools' names, and what they mean.
#[rustfmt::skip]
const MEANINGS: [(&str, Meaning); 27] = [
    // TRL
    ("completion_only_loss", |v| flag(v, || only("train_on", "all"), unrestricted)),
    ("assistant_only_loss", |v| flag(v, || only("train_on", "all"), unrestricted)),
    ("max_length", |v| Ok(vec![length(v)])),
    ("max_seq_length", |v| Ok(vec![length(v)])),
    ("packing", packing),
    ("packing_strategy", packing_strategy),
    ("truncation_mode", truncation_mode),
    // Axolotl
    ("train_on_inputs", |v| flag(v, || only("train_on", "every"), not_inputs)),
    ("roles_to_train", roles_to_train),
    ("train_on_eos", stop),
    ("train_on_eot", stop),
    ("sequence_len", |v| Ok(vec![length(v)])),
    ("excess_length_strategy", excess_length_strategy),
    ("sample_packing", |v| flag(v, packs, || only("packing", "none"))),
    // LLaMA-Factory
    ("train_on_prompt", |v| flag(v, || only("train_on", "every"), not_inputs)),
    ("mask_history", |v| flag(v, || only("train_on", "last"), responses)),
    ("cutoff_len", |v| Ok(vec![length(v)])),
    ("neat_packing", |v| flag(v, packs, Vec::new)),
    // torchtune
    ("train_on_input", |v| flag(v, || only("train_on", "every"), not_inputs)),
    ("masking_strategy", masking_strategy),
    // mlx-lm, LitGPT, Unsloth
    ("mask_prompt", |v| flag(v, || only("train_on", "last"), unrestricted)),
    ("train_on_responses_only", |v| flag(v, || only("train_on", "all"), unrestricted)),
    // ms-swift
    ("loss_scale", loss_scale),
    ("truncation_strategy", truncation_strategy),
    // Names with a dash, as flags have them.
    ("max-length", |v| Ok(vec![length(v)])),
    ("mask-prompt", |v| flag(v, || only("train_on", "last"), unrestricted)),
    ("train-on-inputs", |v| flag(v, || only("train_on", "every"), not_inputs)),
];

/// Hone's own keys that those names set.
const OWN: [&str; 6] =
    ["max_len", "too_long", "train_on", "train_on_stop", "empty_thoughts", "packing"];

fn text(value: &str) -> Value {
    Value::String(value.to_owned())
}

/// Just this value.
fn only(key: &'static str, value: &str) -> Vec<Says> {
    vec![Says { key, value: text(value), minds: None }]
}

/// Prompts are not trained, whatever else is said of responses.
fn not_inputs() -> Vec<Says> {
    fn minds(value: &Value) -> bool {
        match value {
            Value::Array(roles) => roles.iter().any(|role| {
                matches!(role.as_str(), Some("user" | "human" | "system" | "developer"))
            }),
            value => value.as_str() == Some("every"),
        }
    }
    vec![Says { key: "train_on", value: text("all"), minds: Some(minds) }]
}

/// Prompts are trained as well, where nothing else forbids it.
fn unrestricted() -> Vec<Says> {
    vec![Says { key: "train_on", value: text("every"), minds: Some(|_| false) }]
}

/// All responses are trained, where nothing else is said: what becomes of prompts is another setting's.
fn responses() -> Vec<Says> {
    vec![Says { key: "train_on", value: text("all"), minds: Some(|_| false) }]
}

/// Rows share packs, in one way or another.
fn packs() -> Vec<Says> {
    let minds = |value: &Value| value.as_str() == Some("none");
    vec![Says { key: "packing", value: text("best-fit"), minds: Some(minds) }]
}

fn length(value: &Value) -> Says {
    Says { key: "max_len", value: value.clone(), minds: None }
}

fn flag(
    value: &Value,
    yes: impl Fn() -> Vec<Says>,
    no: impl Fn() -> Vec<Says>,
) -> Result<Vec<Says>, &'static str> {
    value.as_bool().map(|on| if on { yes() } else { no() }).ok_or(BOOL)
}

fn truncate(keep: &str) -> Vec<Says> {
    let value = Value::Table(Table::from_iter([("truncate".to_owned(), text(keep))]));
    vec![Says { key: "too_long", value, minds: None }]
}

fn packing(value: &Value) -> Result<Vec<Says>, &'static str> {
    match value {
        Value::Boolean(true) => Ok(packs()),
        Value::Boolean(false) => Ok(only("packing", "none")),
        // Hone's own key of that name.
        value => Ok(vec![Says { key: "packing", value: value.clone(), minds: None }]),
    }
}

fn packing_strategy(value: &Value) -> Result<Vec<Says>, &'static str> {
    match value.as_str() {
        Some("bfd" | "bfd_split" | "bfd-requeue" | "binpack" | "ffd") => {
            Ok(only("packing", "best-fit"))
        }
        Some("sequential") => Ok(only("packing", "sequential")),
        Some("wrapped") => Err("a document is never wrapped around the border of a pack: write \
                                `packing = \"best-fit\"` and `too_long = \"split\"`"),
        _ => Err("write `packing = \"best-fit\"`, `\"sequential\"` or `\"none\"`"),
    }
}

fn truncation_mode(value: &Value) -> Result<Vec<Says>, &'static str> {
    match value.as_str() {
        Some("keep_start") => Ok(truncate("head")),
        Some("keep_end") => Ok(truncate("tail")),
        _ => Err("write `too_long = { truncate = \"head\" }` or `\"tail\"`, or `\"drop\"`"),
    }
}

fn roles_to_train(value: &Value) -> Result<Vec<Says>, &'static str> {
    let hint = "write `train_on` as a list of roles, such as `[\"assistant\", \"tool\"]`";
    let roles = value.as_array().ok_or(hint)?;
    let own = |role: &Value| {
        Some(match role.as_str()? {
            "gpt" | "model" => text("assistant"),
            "human" => text("user"),
            other => text(other),
        })
    };
    let roles: Option<Vec<Value>> = roles.iter().map(own).collect();
    let value = Value::Array(roles.ok_or(hint)?);
    Ok(vec![Says { key: "train_on", value, minds: None }])
}

fn stop(value: &Value) -> Result<Vec<Says>, &'static str> {
    match value.as_str() {
        Some(which @ ("turn" | "all" | "last" | "none")) => Ok(only("train_on_stop", which)),
        _ => Err("write `train_on_stop = \"turn\"`, `\"all\"`, `\"last\"` or `\"none\"`"),
    }
}

fn excess_length_strategy(value: &Value) -> Result<Vec<Says>, &'static str> {
    match value.as_str() {
        Some("drop") => Ok(only("too_long", "drop")),
        Some("truncate") => Ok(truncate("head")),
        Some("raise") => Ok(only("too_long", "error")),
        _ => Err("write `too_long = \"drop\"`, `{ truncate = \"head\" }` or `\"error\"`"),
    }
}

fn truncation_strategy(value: &Value) -> Result<Vec<Says>, &'static str> {
    match value.as_str() {
        Some("delete") => Ok(only("too_long", "drop")),
        // There it is the side that goes, here what is kept.
        Some("left") => Ok(truncate("tail")),
        Some("right") => Ok(truncate("head")),
        Some("split") => Ok(only("too_long", "split")),
        Some("raise") => Ok(only("too_long", "error")),
        _ => Err("write `too_long = \"drop\"`, `\"split\"`, `\"error\"` or \
                  `{ truncate = \"keep-response\" }`, `\"head\"`, `\"tail\"`"),
    }
}

fn masking_strategy(value: &Value) -> Result<Vec<Says>, &'static str> {
    match value.as_str() {
        Some("train_on_all") => Ok(only("train_on", "every")),
        Some("train_on_assistant") => Ok(only("train_on", "all")),
        Some("train_on_last") => Ok(only("train_on", "last")),
        _ => Err("write `train_on = \"all\"`, `\"last\"`, `\"every\"` or a list of roles"),
    }
}

fn loss_scale(value: &Value) -> Result<Vec<Says>, &'static str> {
    let hint = "known are `default`, `last_round` and `all`, each perhaps with \
                `+ignore_empty_think`; other weights belong into the rows: `weight` on a message \
                or on a part of its content";
    let (mut says, mut base) = (Vec::new(), None);
    for word in value.as_str().ok_or(hint)?.split('+') {
        let train_on = match word {
            "default" => "all",
            "last_round" => "last",
            "all" => "every",
            "ignore_empty_think" => {
                says.extend(only("empty_thoughts", "mask"));
                continue;
            }
            _ => return Err(hint),
        };
        if base.replace(train_on).is_some() {
            return Err(hint);
        }
    }
    says.extend(only("train_on", base.unwrap_or("all")));
    Ok(says)
}

/// Turns other tools' names in the table `[tokenize]` into hone's own.
///
/// # Errors
/// Two settings that contradict each other; one that has no counterpart. The message names the key first.
pub(crate) fn translate(table: &mut Table) -> Result<Aliases, Failure> {
    let mut given = Vec::new();
    for (name, meaning) in MEANINGS {
        let Some(value) = table.get(name) else { continue };
        let says = meaning(value).map_err(|hint| {
            let message = format!("[tokenize] `{name}` is {value}, which has no counterpart");
            Failure::usage(message).hint(hint)
        })?;
        given.push(Given { name: name.to_owned(), value: value.clone(), says });
    }
    // A list of strategies is hone's own way to write `packing`.
    given.retain(|given| given.name != "packing" || given.value.is_bool());
    let mut aliases = Aliases::default();
    if given.is_empty() {
        return Ok(aliases);
    }
    for key in OWN {
        let own = table.get(key).filter(|value| key != "packing" || !value.is_bool());
        let own = own.map(|value| Given {
            name: key.to_owned(),
            value: value.clone(),
            says: vec![Says { key, value: normal(key, value), minds: None }],
        });
        let said: Vec<(&Given, &Says)> = (own.iter().chain(&given))
            .flat_map(|given| given.says.iter().map(move |says| (given, says)))
            .filter(|(_, says)| says.key == key)
            .collect();
        if said.iter().all(|(given, _)| given.name == key && own.is_some()) {
            continue;
        }
        let value = settle(&said)?;
        for (given, says) in said.iter().filter(|(given, _)| own.is_none() || given.name != key) {
            let is = if says.value == value { "is" } else { "agrees with" };
            let shown = format!("`{} = {}`", given.name, given.value);
            aliases.notes.push(format!("{shown} {is} `{key} = {value}`"));
            aliases.renamed.push((key.to_owned(), given.name.clone()));
        }
        for (given, _) in &said {
            table.remove(&given.name);
        }
        table.insert(key.to_owned(), value);
    }
    for given in given.iter().filter(|given| given.says.is_empty()) {
        table.remove(&given.name);
        aliases.notes.push(format!("`{} = {}` changes nothing", given.name, given.value));
        aliases.renamed.push((given.name.clone(), given.name.clone()));
    }
    Ok(aliases)
}

/// The value that all agree on.
fn settle(said: &[(&Given, &Says)]) -> Result<Value, Failure> {
    let agrees = |value: &Value, (_, says): &(&Given, &Says)| match says.minds {
        None => normal(says.key, &says.value) == *value,
        Some(minds) => !minds(value),
    };
    let strict = said.iter().filter(|(_, says)| says.minds.is_none());
    let candidates = strict.chain(said).map(|(_, says)| normal(says.key, &says.value));
    for value in candidates {
        if said.iter().all(|one| agrees(&value, one)) {
            return Ok(value);
        }
    }
    let contradicts = |(_, one): &(&Given, &Says), other: &(&Given, &Says)| {
        !agrees(&normal(one.key, &one.value), other)
    };
    let pair = said.iter().enumerate().find_map(|(idx, one)| {
        let other = said[idx + 1..].iter().find(|o| contradicts(one, o) || contradicts(o, one));
        other.map(|other| (one, other))
    });
    let ((one, says), (other, other_says)) = pair.expect("no value suits all, so two differ");
    let message = format!(
        "[tokenize] `{}` is {} and `{}` is {}, which contradict each other",
        one.name, one.value, other.name, other.value
    );
    Err(Failure::usage(message).hint(format!(
        "one is `{} = {}`, the other `{} = {}`: keep one of them",
        says.key, says.value, other_says.key, other_says.value
    )))
}

/// A value in the one way of writing it that can be compared.
fn normal(key: &str, value: &Value) -> Value {
    match (key, value.clone().try_into::<TrainOn>()) {
        ("train_on", Ok(policy)) => Value::try_from(policy).unwrap_or_else(|_| value.clone()),
        // What is wrong with it is found when the table is read.
        _ => value.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(table: &str, expect: &str, notes: &[&str]) {
        let mut parsed: Table = table.parse().expect("the test's table is TOML");
        let aliases = translate(&mut parsed).unwrap_or_else(|e| panic!("{table}: {}", e.message));
        let expect: Table = expect.parse().expect("the expected table is TOML");
        assert_eq!(parsed, expect, "{table}");
        assert_eq!(aliases.notes, notes, "{table}");
    }

    fn refuse(table: &str, message: &str, hint: &str) {
        let mut parsed: Table = table.parse().expect("the test's table is TOML");
        let failure = translate(&mut parsed).expect_err(table);
        assert_eq!(failure.exit, hone_cli::Exit::Usage);
        assert!(failure.message.contains(message), "{}", failure.message);
        assert!(failure.hint.as_deref().unwrap_or("").contains(hint), "{:?}", failure.hint);
    }

    /// Every name of the table and each of its values means this.
    #[test]
    fn each_name_is_one_of_ours() {
        let cases = [
            ("completion_only_loss = true", "train_on = 'all'"),
            ("completion_only_loss = false", "train_on = 'every'"),
            ("assistant_only_loss = true", "train_on = 'all'"),
            ("assistant_only_loss = false", "train_on = 'every'"),
            ("max_length = 5", "max_len = 5"),
            ("max_seq_length = 5", "max_len = 5"),
            ("sequence_len = 5", "max_len = 5"),
            ("cutoff_len = 5", "max_len = 5"),
            ("packing = true", "packing = 'best-fit'"),
            ("packing = false", "packing = 'none'"),
            ("sample_packing = true", "packing = 'best-fit'"),
            ("sample_packing = false", "packing = 'none'"),
            ("neat_packing = true", "packing = 'best-fit'"),
            ("neat_packing = false", ""),
            ("packing_strategy = 'bfd'", "packing = 'best-fit'"),
            ("packing_strategy = 'binpack'", "packing = 'best-fit'"),
            ("packing_strategy = 'sequential'", "packing = 'sequential'"),
            ("truncation_mode = 'keep_start'", "too_long = { truncate = 'head' }"),
            ("truncation_mode = 'keep_end'", "too_long = { truncate = 'tail' }"),
            ("train_on_inputs = false", "train_on = 'all'"),
            ("train_on_inputs = true", "train_on = 'every'"),
            ("roles_to_train = ['gpt']", "train_on = 'all'"),
            ("roles_to_train = ['assistant', 'tool']", "train_on = ['assistant', 'tool']"),
            ("roles_to_train = []", "train_on = []"),
            ("train_on_eos = 'last'", "train_on_stop = 'last'"),
            ("train_on_eot = 'none'", "train_on_stop = 'none'"),
            ("excess_length_strategy = 'drop'", "too_long = 'drop'"),
            ("excess_length_strategy = 'truncate'", "too_long = { truncate = 'head' }"),
            ("excess_length_strategy = 'raise'", "too_long = 'error'"),
            ("train_on_prompt = false", "train_on = 'all'"),
            ("train_on_prompt = true", "train_on = 'every'"),
            ("mask_history = true", "train_on = 'last'"),
            ("mask_history = false", "train_on = 'all'"),
            ("train_on_input = false", "train_on = 'all'"),
            ("masking_strategy = 'train_on_all'", "train_on = 'every'"),
            ("masking_strategy = 'train_on_assistant'", "train_on = 'all'"),
            ("masking_strategy = 'train_on_last'", "train_on = 'last'"),
            ("mask_prompt = true", "train_on = 'last'"),
            ("train_on_responses_only = true", "train_on = 'all'"),
            ("loss_scale = 'default'", "train_on = 'all'"),
            ("loss_scale = 'last_round'", "train_on = 'last'"),
            ("loss_scale = 'all'", "train_on = 'every'"),
            ("loss_scale = 'ignore_empty_think'", "train_on = 'all'\nempty_thoughts = 'mask'"),
            (
                "loss_scale = 'last_round+ignore_empty_think'",
                "train_on = 'last'\nempty_thoughts = 'mask'",
            ),
            ("truncation_strategy = 'delete'", "too_long = 'drop'"),
            ("truncation_strategy = 'left'", "too_long = { truncate = 'tail' }"),
            ("truncation_strategy = 'right'", "too_long = { truncate = 'head' }"),
            ("truncation_strategy = 'split'", "too_long = 'split'"),
        ];
        for (table, expect) in cases {
            let mut parsed: Table = table.parse().expect("the test's table is TOML");
            let aliases = translate(&mut parsed).unwrap_or_else(|e| panic!("{}", e.message));
            let expect: Table = expect.parse().expect("the expected table is TOML");
            assert_eq!(parsed, expect, "{table}");
            assert!(!aliases.notes.is_empty(), "{table} is said to be ours");
        }
        for (name, _) in MEANINGS.iter().filter(|(name, _)| !name.contains('-')) {
            assert!(cases.iter().any(|(table, _)| table.starts_with(name)), "{name} is not tested");
        }
    }

    #[test]
    fn what_agrees_is_one_setting() {
        check("max_len = 3\ntoo_long = 'drop'", "max_len = 3\ntoo_long = 'drop'", &[]);
        check("packing = 'sequential'", "packing = 'sequential'", &[]);
        check(
            "train_on_prompt = false\nmask_history = true",
            "train_on = 'last'",
            &[
                "`train_on_prompt = false` agrees with `train_on = \"last\"`",
                "`mask_history = true` is `train_on = \"last\"`",
            ],
        );
        check(
            "train_on_prompt = true\nmask_history = false",
            "train_on = 'every'",
            &[
                "`train_on_prompt = true` is `train_on = \"every\"`",
                "`mask_history = false` agrees with `train_on = \"every\"`",
            ],
        );
        check(
            "train_on_prompt = false\nmask_history = false",
            "train_on = 'all'",
            &[
                "`train_on_prompt = false` is `train_on = \"all\"`",
                "`mask_history = false` is `train_on = \"all\"`",
            ],
        );
        check(
            "roles_to_train = ['tool']\nmask_history = false",
            "train_on = ['tool']",
            &[
                "`roles_to_train = [\"tool\"]` is `train_on = [\"tool\"]`",
                "`mask_history = false` agrees with `train_on = [\"tool\"]`",
            ],
        );
        check(
            "completion_only_loss = true\nassistant_only_loss = false",
            "train_on = 'all'",
            &[
                "`completion_only_loss = true` is `train_on = \"all\"`",
                "`assistant_only_loss = false` agrees with `train_on = \"all\"`",
            ],
        );
        check(
            "train_on_inputs = false\nroles_to_train = ['assistant', 'tool']\ntrain_on_eos = 'turn'",
            "train_on = ['assistant', 'tool']\ntrain_on_stop = 'turn'",
            &[
                "`train_on_inputs = false` agrees with `train_on = [\"assistant\", \"tool\"]`",
                "`roles_to_train = [\"assistant\", \"tool\"]` is `train_on = [\"assistant\", \"tool\"]`",
                "`train_on_eos = \"turn\"` is `train_on_stop = \"turn\"`",
            ],
        );
        check(
            "packing = true\npacking_strategy = 'sequential'",
            "packing = 'sequential'",
            &[
                "`packing = true` agrees with `packing = \"sequential\"`",
                "`packing_strategy = \"sequential\"` is `packing = \"sequential\"`",
            ],
        );
        check(
            "train_on = 'assistant'\nassistant_only_loss = true",
            "train_on = 'all'",
            &["`assistant_only_loss = true` is `train_on = \"all\"`"],
        );
        check("neat_packing = false", "", &["`neat_packing = false` changes nothing"]);
    }

    #[test]
    fn what_contradicts_is_refused() {
        refuse(
            "train_on_prompt = true\nmask_history = true",
            "`train_on_prompt` is true and `mask_history` is true, which contradict",
            "one is `train_on = \"every\"`, the other `train_on = \"last\"`",
        );
        refuse(
            "train_on = 'every'\ntrain_on_inputs = false",
            "`train_on` is \"every\" and `train_on_inputs` is false",
            "keep one",
        );
        refuse("max_len = 3\nmax_length = 4", "`max_len` is 3 and `max_length` is 4", "keep one");
        refuse(
            "packing = false\nsample_packing = true",
            "`packing` is false and `sample_packing` is true",
            "keep one",
        );
        refuse(
            "train_on_eos = 'all'\ntrain_on_eot = 'turn'",
            "`train_on_eos` is \"all\" and `train_on_eot` is \"turn\"",
            "keep one",
        );
        refuse(
            "roles_to_train = ['user']\ntrain_on_inputs = false",
            "`train_on_inputs` is false and `roles_to_train` is [\"user\"]",
            "keep one",
        );
    }

    #[test]
    fn what_has_no_counterpart_gets_a_hint() {
        let refuse = |table, hint| refuse(table, "which has no counterpart", hint);
        refuse("packing_strategy = 'wrapped'", "never wrapped around the border");
        refuse("packing_strategy = 3", "\"sequential\"");
        refuse("loss_scale = 'react'", "`weight` on a message");
        refuse("loss_scale = 'all+last_round'", "known are `default`");
        refuse("train_on_eos = true", "`train_on_stop = \"turn\"`");
        refuse("roles_to_train = 'assistant'", "a list of roles");
        refuse("train_on_inputs = 'no'", "`true` or `false`");
        refuse("truncation_strategy = 'middle'", "keep-response");
        refuse("excess_length_strategy = 'keep'", "too_long");
        refuse("truncation_mode = 'keep_middle'", "too_long");
        refuse("masking_strategy = 'some'", "train_on");
    }
}

//! The names that other trainers give to the settings of this stage.
//!
//! A table `[train]` may use those of transformers and TRL, PEFT, Axolotl, LLaMA-Factory, ms-swift and Unsloth. Each is turned into
//! hone's own key before the table is read, and it is said which; two that contradict each other, and what has no counterpart here,
//! are refused.

use hone_cli::Failure;
use hone_cli::toml::{Table, Value};

use super::config::TrainConfig;

/// What was turned into what.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Aliases {
    /// Own keys, and the names that they have in the file.
    pub(crate) renamed: Vec<(String, String)>,
    /// A line each for people.
    pub(crate) notes: Vec<String>,
}

/// What a setting says about one of hone's own; nothing at all when it changes nothing here.
type Says = Vec<(&'static str, Value)>;

type Meaning = fn(&Value) -> Result<Says, &'static str>;

/// The other tools' names, and what they mean. Accumulation stands apart: see [`steps_of`].
#[rustfmt::skip]
const MEANINGS: [(&str, Meaning); 71] = [
    // transformers, TRL
    ("learning_rate", |v| same("lr", v)),
    ("num_train_epochs", epochs),
    ("lr_scheduler_type", schedule),
    ("optim", optimizer),
    ("adam_beta1", |v| same("beta1", v)),
    ("adam_beta2", |v| same("beta2", v)),
    ("adam_epsilon", |v| same("eps", v)),
    ("label_smoothing_factor", |v| same("label_smoothing", v)),
    ("neftune_noise_alpha", |v| same("neftune_alpha", v)),
    ("gradient_checkpointing", |v| flag(v, only("recompute", "layer"), only("recompute", "none"))),
    ("save_steps", |v| same("checkpoint_every", v)),
    ("eval_steps", |v| same("eval_every", v)),
    ("shuffle_dataset", |v| flag(v, only("shuffle", "packs"), only("shuffle", "none"))),
    ("logging_steps", |_| Ok(vec![])),
    ("report_to", |_| Ok(vec![])),
    ("bf16", bf16),
    ("fp16", half),
    ("tf32", half),
    ("loss_type", loss_type),
    ("seed", |_| Err("`seed` stands at the top of the file, and is that of all stages")),
    ("output_dir", |_| Err("output goes to `runs/<name>/train`, or where `--out` says")),
    ("max_length", |_| Err("the length of packs is `max_len` of `[tokenize]`")),
    ("packing", |_| Err("packing is a setting of `[tokenize]`")),
    // PEFT, Unsloth
    ("r", |v| same("rank", v)),
    ("lora_r", |v| same("rank", v)),
    ("lora_alpha", |v| same("alpha", v)),
    ("lora_dropout", |v| same("dropout", v)),
    ("use_rslora", |v| same("rslora", v)),
    ("lora_target_modules", modules),
    ("use_dora", |v| same("dora", v)),
    ("lora_bias", lora_bias),
    ("init_lora_weights", lora_init),
    ("trainable_token_indices", tokens),
    ("bnb_4bit_quant_type", |v| same("quant_type", v)),
    ("bnb_4bit_use_double_quant", |v| same("double_quant", v)),
    ("use_bnb_nested_quant", |v| same("double_quant", v)),
    // Axolotl
    ("num_epochs", epochs),
    ("lr_scheduler", schedule),
    ("adapter", method),
    ("lora_target_linear", |v| flag(v, all_linear(), vec![])),
    ("lora_model_dir", |v| same("adapter_init", v)),
    ("modules_to_save", |v| Ok(vec![("modules_to_save", list(v))])),
    ("lora_modules_to_save", |v| Ok(vec![("modules_to_save", list(v))])),
    ("peft_use_dora", |v| same("dora", v)),
    ("peft_use_rslora", |v| same("rslora", v)),
    ("peft_init_lora_weights", lora_init),
    ("peft_layers_to_transform", |v| Ok(vec![("layers_to_transform", one_or_more(v))])),
    ("peft_layers_pattern", |v| Ok(vec![("layers_pattern", list(v))])),
    ("peft_trainable_token_indices", tokens),
    ("unfrozen_parameters", |_| Err("say what stays as it is: `freeze = [\"pattern\"]`")),
    ("saves_per_epoch", |_| Err("give `checkpoint_every` in steps")),
    ("evals_per_epoch", |_| Err("give `eval_every` in steps")),
    ("curriculum_sampling", |v| flag(v, only("shuffle", "none"), vec![])),
    // LLaMA-Factory, ms-swift
    ("finetuning_type", method),
    ("tuner_type", method),
    ("train_type", method),
    ("lora_rank", |v| same("rank", v)),
    ("lora_target", targets),
    ("adapter_name_or_path", |v| same("adapter_init", v)),
    ("additional_target", |v| Ok(vec![("modules_to_save", list(v))])),
    ("quantization_type", |v| same("quant_type", v)),
    ("double_quantization", |v| same("double_quant", v)),
    ("pissa_init", |v| flag(v, only("lora_init", "pissa"), vec![])),
    ("loraplus_lr_ratio", lora_plus),
    ("use_dft_loss", |v| same("dft", v)),
    ("disable_shuffling", |v| flag(v, only("shuffle", "none"), vec![])),
    ("freeze_parameters_regex", |v| Ok(vec![("freeze", Value::Array(vec![v.clone()]))])),
    // Names of hone's own that have another form too.
    ("order", order),
    ("target_modules", modules),
    ("init_adapter", |v| same("adapter_init", v)),
    ("max_steps", max_steps),
];

/// Those of other tools that count packs, and hone's own.
const MICRO: [&str; 4] = [
    "per_device_train_batch_size",
    "train_micro_batch_size_per_gpu",
    "per_device_batch_size",
    "micro_batch_size",
];

/// Those that ask for a base of 4 bits below whatever adapter is trained, and the value that does.
const FOUR_BITS: [(&str, Value); 2] =
    [("load_in_4bit", Value::Boolean(true)), ("quantization_bit", Value::Integer(4))];

const ACCUMULATION: &str = "gradient_accumulation_steps";

fn text(value: &str) -> Value {
    Value::String(value.to_owned())
}

fn only(key: &'static str, value: &str) -> Says {
    vec![(key, text(value))]
}

fn same(key: &'static str, value: &Value) -> Result<Says, &'static str> {
    Ok(vec![(key, value.clone())])
}

fn all_linear() -> Says {
    vec![("target_modules", Value::Array(vec![text("all-linear")]))]
}

fn flag(value: &Value, yes: Says, no: Says) -> Result<Says, &'static str> {
    value.as_bool().map(|on| if on { yes } else { no }).ok_or("it is `true` or `false`")
}

fn epochs(value: &Value) -> Result<Says, &'static str> {
    let whole = match value {
        Value::Float(x) if x.fract() == 0.0 && *x >= 1.0 => Value::Integer(*x as i64),
        Value::Integer(n) => Value::Integer(*n),
        _ => return Err("`epochs` is a whole number; `max_steps` ends a run anywhere"),
    };
    Ok(vec![("epochs", whole)])
}

fn max_steps(value: &Value) -> Result<Says, &'static str> {
    // There -1 is "no limit".
    if value.as_integer() == Some(-1) { Ok(vec![]) } else { same("max_steps", value) }
}

/// Mixed precision there: products of bf16, all else f32.
fn bf16(value: &Value) -> Result<Says, &'static str> {
    match value {
        Value::Boolean(true) => Ok(only("compute", "bf16")),
        Value::String(auto) if auto == "auto" => Ok(only("compute", "bf16")),
        Value::Boolean(false) => Ok(vec![]),
        _ => Err("it is `true` or `false`"),
    }
}

fn half(value: &Value) -> Result<Says, &'static str> {
    match value {
        Value::Boolean(false) => Ok(vec![]),
        _ => Err("products are of f32, or with `compute = \"bf16\"` of bf16"),
    }
}

fn loss_type(value: &Value) -> Result<Says, &'static str> {
    match value.as_str() {
        Some("nll") => Ok(vec![("dft", Value::Boolean(false))]),
        Some("dft") => Ok(vec![("dft", Value::Boolean(true))]),
        _ => Err("known are `nll` and `dft`"),
    }
}

fn schedule(value: &Value) -> Result<Says, &'static str> {
    match value.as_str() {
        Some(name @ ("constant" | "linear" | "cosine" | "inverse_sqrt")) => {
            Ok(only("schedule", name))
        }
        Some("constant_with_warmup") => Ok(only("schedule", "constant")),
        Some("cosine_with_restarts") => {
            let cycles = ("cycles".to_owned(), Value::Integer(1));
            Ok(vec![("schedule", named("cosine_restarts", Some(cycles)))])
        }
        Some("polynomial") => {
            Err("write `schedule = { name = \"polynomial\", power = 1.0 }`; the \
                                   last rate there, 1e-7, is `min_lr_ratio` times `lr` here")
        }
        Some("cosine_with_min_lr") => {
            Err("write `schedule = \"cosine\"` and `min_lr_ratio`, the last rate over the first")
        }
        Some("warmup_stable_decay") => {
            Err("write `schedule = { name = \"wsd\", decay_steps = N }`")
        }
        _ => Err("known are `constant`, `linear`, `cosine`, `cosine_restarts`, `polynomial`, \
                  `wsd` and `inverse_sqrt`"),
    }
}

/// A table of a name and perhaps a knob.
fn named(name: &str, knob: Option<(String, Value)>) -> Value {
    Value::Table([("name".to_owned(), text(name))].into_iter().chain(knob).collect())
}

fn optimizer(value: &Value) -> Result<Says, &'static str> {
    Ok(match value.as_str() {
        Some("adamw_torch" | "adamw_torch_fused" | "adamw_hf" | "adamw") => {
            only("optimizer", "adamw")
        }
        // Paged or not: it is the same rule.
        Some("adamw_8bit" | "adamw_bnb_8bit" | "paged_adamw_8bit") => {
            only("optimizer", "adamw8bit")
        }
        Some("lion" | "lion_32bit" | "paged_lion_32bit") => only("optimizer", "lion"),
        Some("adafactor") => only("optimizer", "adafactor"),
        // There it has no momentum.
        Some("sgd") => {
            vec![("optimizer", named("sgd", Some(("momentum".to_owned(), Value::Float(0.0)))))]
        }
        Some("muon") => only("optimizer", "muon"),
        _ => {
            return Err("known are `adamw`, `adamw8bit`, `lion`, `adafactor`, `sgd` and `muon`: \
                        write `optimizer`");
        }
    })
}

fn method(value: &Value) -> Result<Says, &'static str> {
    match value.as_str() {
        Some(name @ ("lora" | "qlora" | "full")) => Ok(only("method", name)),
        Some("freeze") => Err("write `method = \"full\"` and `freeze`, the patterns of what stays"),
        _ => Err("known are `lora`, `qlora` and `full`: write `method`"),
    }
}

/// A list of names, or what LLaMA-Factory has in its place: all, or names with commas between them.
fn targets(value: &Value) -> Result<Says, &'static str> {
    Ok(match value {
        Value::String(all) if matches!(all.as_str(), "all" | "all-linear") => all_linear(),
        value => vec![("target_modules", list(value))],
    })
}

/// A list, or names with commas between them.
fn list(value: &Value) -> Value {
    match value {
        Value::String(names) => {
            Value::Array(names.split(',').map(|name| text(name.trim())).collect())
        }
        list => list.clone(),
    }
}

/// A list, or its only value.
fn one_or_more(value: &Value) -> Value {
    match value {
        Value::Array(_) => value.clone(),
        one => Value::Array(vec![one.clone()]),
    }
}

/// PEFT's: a list of names, `all-linear`, or an expression.
fn modules(value: &Value) -> Result<Says, &'static str> {
    match value.as_str() {
        Some("all-linear") => Ok(all_linear()),
        _ => same("target_modules", value),
    }
}

/// PEFT's list is of the embedding alone.
fn tokens(value: &Value) -> Result<Says, &'static str> {
    let value = match value {
        Value::Array(_) => {
            Value::Table([("embed_tokens".to_owned(), value.clone())].into_iter().collect())
        }
        table => table.clone(),
    };
    Ok(vec![("trainable_tokens", value)])
}

fn lora_bias(value: &Value) -> Result<Says, &'static str> {
    match value {
        Value::Boolean(false) => Ok(vec![]),
        // ms-swift's name of PEFT's `bias`.
        Value::String(name) if matches!(name.as_str(), "none" | "all" | "lora_only") => {
            Ok(only("bias", name))
        }
        _ => Err("the factors have no biases here; `bias` is about the model's own"),
    }
}

fn lora_init(value: &Value) -> Result<Says, &'static str> {
    match value {
        Value::Boolean(true) => Ok(only("lora_init", "default")),
        Value::String(name) if matches!(name.as_str(), "gaussian" | "pissa" | "loftq") => {
            Ok(only("lora_init", name))
        }
        // There it says how exact the singular vectors are; here they are as exact as f32 has them.
        Value::String(name) if name.starts_with("pissa_niter_") => Ok(only("lora_init", "pissa")),
        _ => Err("known are `true`, `gaussian`, `pissa` and `loftq`"),
    }
}

fn lora_plus(value: &Value) -> Result<Says, &'static str> {
    let group =
        [("match".to_owned(), text("lora_B")), ("lora_plus_ratio".to_owned(), value.clone())];
    let group = Value::Table(group.into_iter().collect());
    Ok(vec![("groups", Value::Array(vec![group]))])
}

fn order(value: &Value) -> Result<Says, &'static str> {
    match value.as_str() {
        Some("sequential") => Ok(only("shuffle", "none")),
        Some("shuffled") => Ok(only("shuffle", "packs")),
        _ => Err("write `order = \"shuffled\"` or `\"sequential\"`"),
    }
}

/// One thing said of one of hone's own keys.
struct Said {
    /// The setting as it stands in the table.
    name: String,
    written: Value,
    key: &'static str,
    value: Value,
}

impl Said {
    fn new(name: &str, written: &Value, (key, value): (&'static str, Value)) -> Self {
        Said { name: name.to_owned(), written: written.clone(), key, value }
    }
}

/// Turns other tools' names in the table `[train]` into hone's own.
///
/// # Errors
/// Two settings that contradict each other; one that has no counterpart. The message names the key first.
pub(crate) fn translate(table: &mut Table) -> Result<Aliases, Failure> {
    let mut aliases = Aliases::default();
    let mut said = four_bits(table)?;
    for (name, meaning) in MEANINGS {
        let Some(value) = table.get(name).cloned() else { continue };
        let says = meaning(&value).map_err(|hint| no_counterpart(name, &value, hint))?;
        if matches!(says.as_slice(), [(key, own)] if *key == name && *own == value) {
            continue;
        }
        table.remove(name);
        if says.is_empty() {
            aliases.notes.push(format!("`{name} = {value}` changes nothing"));
        }
        said.extend(says.into_iter().map(|says| Said::new(name, &value, says)));
    }
    said.extend(steps_of(table)?);
    for one in said {
        if let Some(other) = table.get(one.key) {
            let agrees = is_same(other, &one.value) || *other == one.value;
            let is_order = one.name == "order" && is_shuffled(&one.value, other);
            if !(agrees || is_order) {
                return Err(contradiction(&one, other, &aliases));
            }
        } else {
            table.insert(one.key.to_owned(), one.value.clone());
        }
        let Said { name, written, key, value } = one;
        if name != key {
            aliases.notes.push(format!("`{name} = {written}` is `{key} = {value}`"));
            aliases.renamed.push((key.to_owned(), name));
        }
    }
    once(table)?;
    Ok(aliases)
}

/// What is said of 4-bit bases. There it is a setting beside the adapter's kind, here a method of its own.
fn four_bits(table: &mut Table) -> Result<Vec<Said>, Failure> {
    let mut said = Vec::new();
    for (name, yes) in FOUR_BITS {
        let Some(value) = table.remove(name) else { continue };
        if value == yes {
            for kind in ["method", "adapter", "finetuning_type", "tuner_type", "train_type"] {
                if table.get(kind).and_then(Value::as_str) == Some("lora") {
                    table.insert(kind.to_owned(), text("qlora"));
                }
            }
            said.push(Said::new(name, &value, ("method", text("qlora"))));
        } else if value.as_bool() != Some(false) {
            let hint = "bases are quantised to 4 bits: `method = \"qlora\"`, or not at all";
            return Err(no_counterpart(name, &value, hint));
        }
    }
    Ok(said)
}

/// What is said of the packs of a step. There a step has micro-batches times accumulation, here `batch_size` packs, which are cut
/// into micro-batches.
fn steps_of(table: &mut Table) -> Result<Vec<Said>, Failure> {
    let mut said = Vec::new();
    let mut micro = None;
    for name in MICRO {
        let Some(value) = table.get(name).cloned() else { continue };
        micro = Some((name, value.clone()));
        if name != "micro_batch_size" {
            table.remove(name);
            said.push(Said::new(name, &value, ("micro_batch_size", value.clone())));
        }
    }
    let accumulation = table.remove(ACCUMULATION);
    let n = |name: &str, value: &Value| {
        let n = value.as_integer().filter(|n| *n > 0);
        n.ok_or_else(|| no_counterpart(name, value, "it is a whole number above 0"))
    };
    match (micro, accumulation) {
        (Some((name, micro)), Some(times)) => {
            let packs = n(name, &micro)?.saturating_mul(n(ACCUMULATION, &times)?);
            said.push(Said::new(ACCUMULATION, &times, ("batch_size", Value::Integer(packs))));
        }
        (None, Some(times)) => match table.get("batch_size") {
            // The packs of a step and how often it is cut say how many are computed at once.
            Some(packs) => {
                let (packs, cuts) = (n("batch_size", packs)?, n(ACCUMULATION, &times)?);
                if packs % cuts != 0 {
                    let hint = "`batch_size` packs cannot be cut so: give `micro_batch_size`";
                    return Err(no_counterpart(ACCUMULATION, &times, hint));
                }
                let micro = Value::Integer(packs / cuts);
                said.push(Said::new(ACCUMULATION, &times, ("micro_batch_size", micro)));
            }
            None => {
                let micro = TrainConfig::default().micro_batch_size as i64;
                let packs = Value::Integer(micro.saturating_mul(n(ACCUMULATION, &times)?));
                said.push(Said::new(ACCUMULATION, &times, ("batch_size", packs)));
            }
        },
        // Without accumulation a step there is one micro-batch.
        (Some((name, micro)), None)
            if name != "micro_batch_size" && !table.contains_key("batch_size") =>
        {
            said.push(Said::new(name, &micro, ("batch_size", micro.clone())));
        }
        _ => {}
    }
    Ok(said)
}

/// Whether both are the same number.
fn is_same(one: &Value, other: &Value) -> bool {
    let number = |value: &Value| value.as_float().or(value.as_integer().map(|n| n as f64));
    number(one).is_some_and(|one| number(other) == Some(one))
}

/// Whether `order = "shuffled"` meets another way to shuffle.
fn is_shuffled(order: &Value, shuffle: &Value) -> bool {
    order.as_str() == Some("packs") && shuffle.as_str() == Some("batches")
}

/// AdamW's knobs stand in `optimizer` or beside it.
fn once(table: &Table) -> Result<(), Failure> {
    let Some(knobs) = table.get("optimizer").and_then(Value::as_table) else { return Ok(()) };
    for key in ["beta1", "beta2", "eps", "weight_decay"] {
        if table.contains_key(key) && knobs.contains_key(key) {
            let message = format!("[train] `{key}` stands in the table `optimizer` as well");
            return Err(Failure::usage(message).hint("keep one of them"));
        }
    }
    Ok(())
}

fn no_counterpart(name: &str, value: &Value, hint: &str) -> Failure {
    let message = format!("[train] `{name}` is {value}, which has no counterpart");
    Failure::usage(message).hint(hint)
}

fn contradiction(one: &Said, other: &Value, aliases: &Aliases) -> Failure {
    let Said { name, written, key, value } = one;
    let renamed = aliases.renamed.iter().find(|(own, _)| own == key);
    let other_name = renamed.map_or(*key, |(_, written)| written);
    let message = format!(
        "[train] `{name}` is {written} and `{other_name}` is {other}, which contradict each other"
    );
    Failure::usage(message)
        .hint(format!("one is `{key} = {value}`, the other `{key} = {other}`: keep one of them"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(table: &str, expect: &str) {
        let mut parsed: Table = table.parse().expect("the test's table is TOML");
        let aliases = translate(&mut parsed).unwrap_or_else(|e| panic!("{table}: {}", e.message));
        let expect: Table = expect.parse().expect("the expected table is TOML");
        assert_eq!(parsed, expect, "{table}");
        assert!(!aliases.notes.is_empty(), "{table} is said to be ours");
    }

    fn refuse(table: &str, message: &str, hint: &str) {
        let mut parsed: Table = table.parse().expect("the test's table is TOML");
        let failure = translate(&mut parsed).expect_err(table);
        assert_eq!(failure.exit, hone_cli::Exit::Usage);
        assert!(failure.message.contains(message), "{}", failure.message);
        assert!(failure.hint.as_deref().unwrap_or("").contains(hint), "{:?}", failure.hint);
    }

    /// Every name of the table that means something here, and what.
    const CASES: &[(&str, &str)] = &[
        ("learning_rate = 2e-4", "lr = 2e-4"),
        ("num_train_epochs = 3", "epochs = 3"),
        ("num_train_epochs = 3.0", "epochs = 3"),
        ("num_epochs = 2", "epochs = 2"),
        ("max_steps = -1", ""),
        ("lr_scheduler_type = 'constant_with_warmup'", "schedule = 'constant'"),
        (
            "lr_scheduler_type = 'cosine_with_restarts'",
            "schedule = { name = 'cosine_restarts', cycles = 1 }",
        ),
        ("lr_scheduler = 'cosine'", "schedule = 'cosine'"),
        ("optim = 'adamw_torch'", "optimizer = 'adamw'"),
        ("optim = 'adamw_bnb_8bit'", "optimizer = 'adamw8bit'"),
        ("optim = 'lion_32bit'", "optimizer = 'lion'"),
        ("optim = 'adafactor'", "optimizer = 'adafactor'"),
        ("optim = 'sgd'", "optimizer = { name = 'sgd', momentum = 0.0 }"),
        ("adam_beta1 = 0.8", "beta1 = 0.8"),
        ("adam_beta2 = 0.98", "beta2 = 0.98"),
        ("adam_epsilon = 1e-6", "eps = 1e-6"),
        ("label_smoothing_factor = 0.1", "label_smoothing = 0.1"),
        ("neftune_noise_alpha = 5.0", "neftune_alpha = 5.0"),
        ("gradient_checkpointing = true", "recompute = 'layer'"),
        ("gradient_checkpointing = false", "recompute = 'none'"),
        ("save_steps = 50", "checkpoint_every = 50"),
        ("eval_steps = 50", "eval_every = 50"),
        ("shuffle_dataset = false", "shuffle = 'none'"),
        ("logging_steps = 1", ""),
        ("report_to = 'tensorboard'", ""),
        ("bf16 = false", ""),
        ("bf16 = true", "compute = 'bf16'"),
        ("bf16 = 'auto'", "compute = 'bf16'"),
        ("fp16 = false", ""),
        ("tf32 = false", ""),
        ("loss_type = 'dft'", "dft = true"),
        ("r = 8", "rank = 8"),
        ("lora_r = 8", "rank = 8"),
        ("lora_rank = 8", "rank = 8"),
        ("lora_alpha = 16", "alpha = 16"),
        ("lora_dropout = 0.05", "dropout = 0.05"),
        ("use_rslora = true", "rslora = true"),
        ("lora_target_modules = ['q_proj']", "target_modules = ['q_proj']"),
        ("lora_target_modules = '.*proj'", "target_modules = '.*proj'"),
        ("use_dora = true", "dora = true"),
        ("peft_use_dora = true", "dora = true"),
        ("peft_use_rslora = true", "rslora = true"),
        ("init_lora_weights = true", "lora_init = 'default'"),
        ("init_lora_weights = 'pissa_niter_16'", "lora_init = 'pissa'"),
        ("peft_init_lora_weights = 'gaussian'", "lora_init = 'gaussian'"),
        ("pissa_init = true", "lora_init = 'pissa'"),
        ("peft_layers_to_transform = [1]", "layers_to_transform = [1]"),
        ("peft_layers_pattern = ['layers']", "layers_pattern = ['layers']"),
        ("trainable_token_indices = [3]", "trainable_tokens = { embed_tokens = [3] }"),
        (
            "peft_trainable_token_indices = { lm_head = [3] }",
            "trainable_tokens = { lm_head = [3] }",
        ),
        ("lora_modules_to_save = ['lm_head']", "modules_to_save = ['lm_head']"),
        ("additional_target = 'lm_head,norm'", "modules_to_save = ['lm_head', 'norm']"),
        ("bnb_4bit_quant_type = 'fp4'", "quant_type = 'fp4'"),
        ("bnb_4bit_use_double_quant = true", "double_quant = true"),
        ("quantization_type = 'nf4'", "quant_type = 'nf4'"),
        ("use_bnb_nested_quant = true", "double_quant = true"),
        ("double_quantization = false", "double_quant = false"),
        ("lora_modules_to_save = 'lm_head'", "modules_to_save = ['lm_head']"),
        ("peft_layers_to_transform = 1", "layers_to_transform = [1]"),
        ("lora_bias = 'lora_only'", "bias = 'lora_only'"),
        ("load_in_4bit = true", "method = 'qlora'"),
        ("load_in_4bit = true\nadapter = 'qlora'", "method = 'qlora'"),
        ("quantization_bit = 4\nfinetuning_type = 'lora'", "method = 'qlora'"),
        ("lora_target = 'all'", "target_modules = ['all-linear']"),
        ("lora_target = 'q_proj, v_proj'", "target_modules = ['q_proj', 'v_proj']"),
        ("lora_target_linear = true", "target_modules = ['all-linear']"),
        ("adapter = 'lora'", "method = 'lora'"),
        ("finetuning_type = 'full'", "method = 'full'"),
        ("tuner_type = 'lora'", "method = 'lora'"),
        ("train_type = 'full'", "method = 'full'"),
        ("lora_model_dir = 'a'", "adapter_init = 'a'"),
        ("adapter_name_or_path = 'a'", "adapter_init = 'a'"),
        ("init_adapter = 'a'", "adapter_init = 'a'"),
        ("curriculum_sampling = true", "shuffle = 'none'"),
        ("disable_shuffling = true", "shuffle = 'none'"),
        ("loraplus_lr_ratio = 16.0", "groups = [{ match = 'lora_B', lora_plus_ratio = 16.0 }]"),
        ("use_dft_loss = true", "dft = true"),
        ("freeze_parameters_regex = 'mlp'", "freeze = ['mlp']"),
        ("order = 'sequential'", "shuffle = 'none'"),
        ("order = 'shuffled'", "shuffle = 'packs'"),
        ("order = 'shuffled'\nshuffle = 'batches'", "shuffle = 'batches'"),
        ("per_device_train_batch_size = 2", "micro_batch_size = 2\nbatch_size = 2"),
        ("per_device_train_batch_size = 2\nbatch_size = 8", "micro_batch_size = 2\nbatch_size = 8"),
        (
            "per_device_train_batch_size = 2\ngradient_accumulation_steps = 8",
            "micro_batch_size = 2\nbatch_size = 16",
        ),
        (
            "micro_batch_size = 3\ngradient_accumulation_steps = 4",
            "micro_batch_size = 3\nbatch_size = 12",
        ),
        (
            "batch_size = 12\ngradient_accumulation_steps = 4",
            "micro_batch_size = 3\nbatch_size = 12",
        ),
        ("gradient_accumulation_steps = 4", "batch_size = 16"),
        ("learning_rate = 1e-3\nlr = 0.001", "lr = 0.001"),
    ];

    #[test]
    fn each_name_is_one_of_ours() {
        for (table, expect) in CASES {
            check(table, expect);
        }
    }

    #[test]
    fn what_has_no_counterpart_is_refused() {
        refuse("seed = 3", "`seed` is 3", "top of the file");
        refuse("fp16 = true", "`fp16` is true", "`compute = \"bf16\"`");
        refuse("num_train_epochs = 1.5", "`num_train_epochs` is 1.5", "max_steps");
        refuse("lr_scheduler_type = 'polynomial'", "`lr_scheduler_type`", "power = 1.0");
        refuse("optim = 'adagrad'", "`optim` is \"adagrad\"", "known are");
        refuse("packing = true", "`packing`", "[tokenize]");
        refuse("output_dir = 'x'", "`output_dir`", "--out");
        refuse("gradient_accumulation_steps = 0", "`gradient_accumulation_steps`", "above 0");
        refuse("batch_size = 7\ngradient_accumulation_steps = 2", "steps` is 2", "cannot be cut");
        refuse("quantization_bit = 8", "`quantization_bit` is 8", "4 bits");
        refuse("load_in_4bit = true\nfinetuning_type = 'full'", "contradict", "method");
        refuse("init_lora_weights = 'olora'", "`init_lora_weights`", "pissa");
        refuse("lora_bias = true", "`lora_bias`", "`bias`");
        refuse("order = 'random'", "`order`", "sequential");
    }

    #[test]
    fn contradictions_are_refused() {
        let both = "which contradict each other";
        refuse("learning_rate = 1e-3\nlr = 2e-3", both, "`lr = 0.001`");
        refuse("lora_r = 8\nlora_rank = 16", "`lora_rank` is 16 and `lora_r` is 8", "keep one");
        refuse("order = 'sequential'\nshuffle = 'packs'", both, "keep one");
        refuse(
            "per_device_train_batch_size = 2\ngradient_accumulation_steps = 8\nbatch_size = 8",
            both,
            "`batch_size = 16`",
        );
        refuse("per_device_train_batch_size = 2\nmicro_batch_size = 4", both, "keep one");
        refuse("optimizer = { beta1 = 0.8 }\nbeta1 = 0.9", "`beta1` stands", "keep one");
    }

    #[test]
    fn own_keys_are_left_alone() {
        let own = "lr = 1e-3\nbatch_size = 8\nmicro_batch_size = 2\nmax_steps = 5\n\
                    target_modules = ['q_proj']\nshuffle = 'none'";
        let mut table: Table = own.parse().expect("the test's table is TOML");
        let before = table.clone();
        assert_eq!(translate(&mut table).expect("nothing is wrong"), Aliases::default());
        assert_eq!(table, before);
        let mut table: Table = "target_modules = 'all-linear'".parse().expect("it is TOML");
        assert_eq!(translate(&mut table).expect("PEFT writes it so"), Aliases::default());
        let all = table["target_modules"].as_array().expect("it is a list now");
        assert_eq!(all.as_slice(), [text("all-linear")]);
    }
}

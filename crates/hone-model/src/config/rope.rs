//! Rotary positions as a `config.json` gives them: `rope_theta` with `rope_scaling` as
//! transformers 4 wrote them, or `rope_parameters` as transformers 5 does.

use serde_json::{Map, Value, json};

use super::families::Table;
use super::keys::{Keys, bad};
use super::{Family, ModelConfig, Rope, RopeScaling};
use crate::ModelError;

/// Keys of a scaling, whatever its kind.
const KNOWN: &[&str] = &[
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "high_freq_factor",
    "long_factor",
    "low_freq_factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_theta",
    "rope_type",
    "short_factor",
    "truncate",
    "type",
];

/// The base where Gemma 3's local layers do not say.
const LOCAL_THETA: f64 = 10_000.0;

/// Names of Gemma 3's two sets in `rope_parameters`.
const LAYER_KINDS: [&str; 2] = ["full_attention", "sliding_attention"];

/// Reads base, scaling and share of the rotary positions into `config`.
pub(super) fn read(
    keys: &Keys<'_>,
    table: &Table,
    config: &mut ModelConfig,
) -> Result<(), ModelError> {
    let old = keys.object("rope_scaling")?;
    let new = keys.object("rope_parameters")?;
    if let (Some(old), Some(new)) = (&old, &new)
        && !old.same(new)
    {
        let what = "`rope_scaling` and `rope_parameters` say different things; remove one";
        return Err(bad(what.to_owned()));
    }
    let mut main = old.or(new);
    let theta = keys.number("rope_theta", table.absent.rope_theta)?;
    if table.family == Family::Gemma3 {
        let local_theta = keys.number("rope_local_base_freq", LOCAL_THETA)?;
        let mut local = None;
        if let Some(nested) = main.filter(|set| LAYER_KINDS.iter().any(|kind| set.has(kind))) {
            nested.refuse_others(&LAYER_KINDS)?;
            main = nested.object(LAYER_KINDS[0])?;
            local = nested.object(LAYER_KINDS[1])?;
        }
        config.knobs.local_rope = Some(one(keys, local, local_theta, config)?);
    }
    let Rope { theta, scaling } = one(keys, main, theta, config)?;
    config.rope_theta = theta;
    config.knobs.rope_scaling = scaling;
    let inner = main.map_or(Ok(None), |set| set.positive("partial_rotary_factor"))?;
    let share = inner.or(keys.positive("partial_rotary_factor")?);
    if table.family == Family::Phi3 {
        config.knobs.partial_rotary_factor = share;
    } else if share.is_some_and(|share| share != 1.0) {
        let holder = main.filter(|_| inner.is_some()).unwrap_or(*keys);
        return Err(holder.unsupported("partial_rotary_factor", "only 1.0 is in this family"));
    }
    Ok(())
}

/// One set of rotary positions; `theta` where it does not say.
fn one(
    keys: &Keys<'_>,
    set: Option<Keys<'_>>,
    theta: f64,
    config: &ModelConfig,
) -> Result<Rope, ModelError> {
    let Some(set) = set else {
        return Ok(Rope { theta, scaling: RopeScaling::None });
    };
    set.refuse_others(KNOWN)?;
    let theta = set.number("rope_theta", theta)?;
    let key = if set.present("rope_type").is_some() { "rope_type" } else { "type" };
    let mut kind = set.text(key)?.unwrap_or("default");
    if config.family == Family::Phi3 && matches!(kind, "su" | "yarn") {
        // Names that Phi-3 used for LongRoPE before it had its own.
        kind = "longrope";
    }
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: factor(&set)? },
        "dynamic" => RopeScaling::Dynamic { factor: factor(&set)? },
        "llama3" => RopeScaling::Llama3 {
            factor: factor(&set)?,
            low_freq_factor: needed(&set, "low_freq_factor")?,
            high_freq_factor: needed(&set, "high_freq_factor")?,
            original: original(keys, &set, config)?,
        },
        "yarn" => yarn(keys, &set, config)?,
        "longrope" => longrope(keys, &set, config)?,
        _ => {
            let reason = "default, linear, dynamic, llama3, yarn and longrope are";
            return Err(set.unsupported(key, reason));
        }
    };
    let is_known_to_phi3 = matches!(scaling, RopeScaling::None | RopeScaling::LongRope { .. });
    if config.family == Family::Phi3 && !is_known_to_phi3 {
        return Err(set.unsupported(key, "only default and longrope are in this family"));
    }
    Ok(Rope { theta, scaling })
}

/// A number above 0 that must be there.
fn needed(set: &Keys<'_>, key: &str) -> Result<f64, ModelError> {
    set.positive(key)?.ok_or_else(|| bad(format!("`{}` is missing", set.name(key))))
}

/// `factor`.
fn factor(set: &Keys<'_>) -> Result<f64, ModelError> {
    needed(set, "factor")
}

/// The context of the pre-training: at the top of the file where Phi-3 has it, else in the set,
/// else the context itself.
fn original(keys: &Keys<'_>, set: &Keys<'_>, config: &ModelConfig) -> Result<usize, ModelError> {
    let key = "original_max_position_embeddings";
    if config.family == Family::Phi3 {
        // The default of its class wins over the set, as in transformers.
        return Ok(keys.optional_size(key)?.unwrap_or(4096));
    }
    Ok(set.optional_size(key)?.unwrap_or(config.max_position_embeddings))
}

/// `factor`, or the ratio of the two contexts.
fn ratio(set: &Keys<'_>, original: usize, config: &ModelConfig) -> Result<f64, ModelError> {
    let ratio = config.max_position_embeddings as f64 / original as f64;
    Ok(set.positive("factor")?.unwrap_or(ratio))
}

/// The paper's temperature as transformers infers it: 0.1 m ln(factor) + 1.
fn yarn(keys: &Keys<'_>, set: &Keys<'_>, config: &ModelConfig) -> Result<RopeScaling, ModelError> {
    let original = original(keys, set, config)?;
    let factor = ratio(set, original, config)?;
    let temperature = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
    let inferred = match (set.positive("mscale")?, set.positive("mscale_all_dim")?) {
        (Some(mscale), Some(all)) => temperature(mscale) / temperature(all),
        _ => temperature(1.0),
    };
    Ok(RopeScaling::Yarn {
        factor,
        attention_factor: set.positive("attention_factor")?.unwrap_or(inferred),
        beta_fast: set.positive("beta_fast")?.unwrap_or(32.0),
        beta_slow: set.positive("beta_slow")?.unwrap_or(1.0),
        original,
        truncate: set.flag("truncate", true)?,
    })
}

fn longrope(
    keys: &Keys<'_>,
    set: &Keys<'_>,
    config: &ModelConfig,
) -> Result<RopeScaling, ModelError> {
    let original = original(keys, set, config)?;
    let factor = ratio(set, original, config)?;
    let inferred =
        if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original as f64).ln()).sqrt() };
    let divisors = |key: &str| -> Result<Vec<f64>, ModelError> {
        let read = |value: &Value| value.as_f64().filter(|x| *x > 0.0);
        let list = set.list(key, "a list of numbers above 0", read)?;
        list.ok_or_else(|| bad(format!("`{}` is missing", set.name(key))))
    };
    Ok(RopeScaling::LongRope {
        short: divisors("short_factor")?,
        long: divisors("long_factor")?,
        attention_factor: set.positive("attention_factor")?.unwrap_or(inferred),
        original,
    })
}

/// Checks a set against the width that it rotates, and that its frequencies are numbers.
pub(super) fn check(rope: &Rope, rotary_dim: usize) -> Result<(), ModelError> {
    let is_good = |value: f64| value > 0.0 && (value as f32).is_normal();
    if !is_good(rope.theta) {
        return Err(bad(format!("`rope_theta` = {} is not above 0", rope.theta)));
    }
    let half = rotary_dim / 2;
    match &rope.scaling {
        RopeScaling::None => {}
        RopeScaling::Linear { factor } if is_good(*factor) => {}
        RopeScaling::Dynamic { .. } if rotary_dim == 2 => {
            return Err(bad("dynamic rotary scaling needs heads wider than 2".to_owned()));
        }
        RopeScaling::Dynamic { factor } if is_good(*factor) => {}
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, .. } => {
            if low_freq_factor >= high_freq_factor {
                let what = format!("`low_freq_factor` = {low_freq_factor} is not below");
                return Err(bad(format!("{what} `high_freq_factor` = {high_freq_factor}")));
            }
            if ![factor, low_freq_factor, high_freq_factor].into_iter().all(|x| is_good(*x)) {
                return Err(out_of_range());
            }
        }
        RopeScaling::Yarn { factor, attention_factor, beta_fast, beta_slow, .. } => {
            let numbers = [factor, attention_factor, beta_fast, beta_slow];
            // The ramp's ends are logarithms to the base.
            if rope.theta <= 1.0 || !numbers.into_iter().all(|x| is_good(*x)) {
                return Err(out_of_range());
            }
        }
        RopeScaling::LongRope { short, long, attention_factor, .. } => {
            for (key, list) in [("short_factor", short), ("long_factor", long)] {
                if list.len() != half {
                    let what = format!("`{key}` has {} numbers", list.len());
                    return Err(bad(format!("{what}, half the rotated width is {half}")));
                }
            }
            if !is_good(*attention_factor) || !short.iter().chain(long).all(|x| is_good(*x)) {
                return Err(out_of_range());
            }
        }
        RopeScaling::Linear { .. } | RopeScaling::Dynamic { .. } => return Err(out_of_range()),
    }
    Ok(())
}

fn out_of_range() -> ModelError {
    bad("the numbers of the rotary scaling leave the range of single precision".to_owned())
}

/// A scaling as an object of a configuration, null where there is none.
pub(super) fn scaling_json(scaling: &RopeScaling) -> Value {
    match scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Dynamic { factor } => json!({"rope_type": "dynamic", "factor": factor}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original,
        }),
        RopeScaling::Yarn {
            factor,
            attention_factor,
            beta_fast,
            beta_slow,
            original,
            truncate,
        } => json!({
            "rope_type": "yarn",
            "factor": factor,
            "attention_factor": attention_factor,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "original_max_position_embeddings": original,
            "truncate": truncate,
        }),
        RopeScaling::LongRope { short, long, attention_factor, original } => json!({
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "attention_factor": attention_factor,
            "original_max_position_embeddings": original,
        }),
    }
}

/// Writes base and scaling of the rotary positions in the older spelling, which both generations
/// of transformers read.
pub(super) fn write(config: &ModelConfig, into: &mut Map<String, Value>) {
    into.insert("rope_theta".to_owned(), json!(config.rope_theta));
    if let Some(share) = config.knobs.partial_rotary_factor {
        into.insert("partial_rotary_factor".to_owned(), json!(share));
    }
    let scaling = scaling_json(&config.knobs.rope_scaling);
    let Some(local) = &config.knobs.local_rope else {
        into.insert("rope_scaling".to_owned(), scaling);
        return;
    };
    into.insert("rope_local_base_freq".to_owned(), json!(local.theta));
    if local.scaling == RopeScaling::None {
        into.insert("rope_scaling".to_owned(), scaling);
    } else {
        // The older spelling has no place for a scaling of the local positions.
        let sets = json!({
            LAYER_KINDS[0]: scaling, LAYER_KINDS[1]: scaling_json(&local.scaling)
        });
        into.insert("rope_parameters".to_owned(), sets);
    }
}

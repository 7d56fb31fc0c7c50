//! Parameter groups: rates and decays of the tensors whose names match a pattern.

use hone_model::{ParamInfo, ParamKind};
use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::optimizer::{bad, check_not_negative, check_positive};
use crate::{LearnError, OptimizerConfig};

/// A group of tensors.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupConfig {
    /// A regular expression, searched for anywhere in a tensor's name; `^` and `$` bind it to the
    /// ends.
    #[serde(rename = "match")]
    pub pattern: String,
    /// Peak rate of the group, in place of the schedule's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Rate of the group over that of the schedule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr_scale: Option<f64>,
    /// Weight decay of all tensors of the group, norms and biases included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// Rate of an adapter's B over that of its A (Hayou et al. 2024: LoRA+).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora_plus_ratio: Option<f64>,
}

impl GroupConfig {
    /// Checks the ranges and the pattern.
    pub(crate) fn check(&self) -> Result<(), LearnError> {
        self.regex()?;
        self.lr.map_or(Ok(()), |lr| check_not_negative("lr", lr))?;
        self.lr_scale.map_or(Ok(()), |scale| check_not_negative("lr_scale", scale))?;
        self.weight_decay.map_or(Ok(()), |decay| check_not_negative("weight_decay", decay))?;
        self.lora_plus_ratio.map_or(Ok(()), |ratio| check_positive("lora_plus_ratio", ratio))?;
        if self.lr.is_some() && self.lr_scale.is_some() {
            return bad("lr_scale", &self.pattern, "given beside `lr`: give one of them");
        }
        let knobs = [self.lr, self.lr_scale, self.weight_decay, self.lora_plus_ratio];
        if knobs.iter().all(Option::is_none) {
            let expected = "a group that changes something: give `lr`, `lr_scale`, `weight_decay` or \
                 `lora_plus_ratio`";
            return bad("match", &self.pattern, expected);
        }
        Ok(())
    }

    fn regex(&self) -> Result<Regex, LearnError> {
        regex(GROUP, &self.pattern)
    }

    fn refuse(&self, reason: String) -> LearnError {
        refuse(GROUP, &self.pattern, reason)
    }
}

/// How messages name the pattern of a group.
const GROUP: &str = "group `match`";

fn regex(setting: &'static str, pattern: &str) -> Result<Regex, LearnError> {
    Regex::new(pattern).map_err(|e| {
        let text = e.to_string();
        // The last line says what is wrong; those before it draw a picture.
        let reason = text.lines().last().unwrap_or_default().trim_start_matches("error: ");
        refuse(setting, pattern, format!("it is no regular expression: {reason}"))
    })
}

fn refuse(setting: &'static str, pattern: &str, reason: String) -> LearnError {
    LearnError::Pattern { setting, pattern: pattern.to_owned(), reason }
}

/// Which of `names` any of the patterns matches. `setting` is where they stand, for messages. Errors:
/// a pattern that is no regular expression, or matches none.
pub fn matching(
    setting: &'static str,
    patterns: &[String],
    names: &[&str],
) -> Result<Vec<bool>, LearnError> {
    let mut matched = vec![false; names.len()];
    for pattern in patterns {
        let regex = regex(setting, pattern)?;
        let mut any = false;
        for (matched, name) in matched.iter_mut().zip(names) {
            let is_match = regex.is_match(name);
            *matched |= is_match;
            any |= is_match;
        }
        if !any {
            let near = nearest(pattern, names).join("`, `");
            let reason = format!("it matches no tensor; the nearest are `{near}`");
            return Err(refuse(setting, pattern, reason));
        }
    }
    Ok(matched)
}

/// What one tensor is updated with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupRates {
    /// Index of its group, if it is in one.
    pub group: Option<usize>,
    /// Factor on the schedule's rate.
    pub lr_scale: f64,
    /// Weight decay.
    pub weight_decay: f64,
}

/// The weight decay of a tensor that no group has.
fn usual_decay(optimizer: &OptimizerConfig, info: &ParamInfo) -> f64 {
    if !info.kind.decays() {
        return 0.0;
    }
    match optimizer {
        OptimizerConfig::AdamW(adamw) => adamw.weight_decay,
        OptimizerConfig::AdamW8bit(adamw) => adamw.weight_decay,
        OptimizerConfig::Lion(lion) => lion.weight_decay,
        OptimizerConfig::Adafactor(adafactor) => adafactor.weight_decay,
        OptimizerConfig::Sgd(sgd) => sgd.weight_decay,
        OptimizerConfig::Muon(muon) if is_muon(info) => muon.weight_decay,
        OptimizerConfig::Muon(muon) => muon.adamw.weight_decay,
    }
}

/// Whether Muon updates a tensor: a matrix that is neither an embedding nor a head.
pub(crate) fn is_muon(info: &ParamInfo) -> bool {
    let is_hidden = !matches!(info.kind, ParamKind::Embedding | ParamKind::Head);
    is_hidden && info.shape.len() == 2
}

/// The rates of every trained tensor, in the order of `infos`. `lr` is the schedule's peak. Errors:
/// a group without a tensor; a rate in place of a schedule's that is 0.
pub(crate) fn resolve(
    groups: &[GroupConfig],
    optimizer: &OptimizerConfig,
    lr: f64,
    infos: &[ParamInfo],
) -> Result<Vec<GroupRates>, LearnError> {
    let regexes = groups.iter().map(GroupConfig::regex).collect::<Result<Vec<_>, _>>()?;
    let group_of = |name: &str| regexes.iter().position(|regex| regex.is_match(name));
    let owners: Vec<Option<usize>> = infos.iter().map(|info| group_of(&info.name)).collect();
    for (idx, (group, regex)) in groups.iter().zip(&regexes).enumerate() {
        if owners.contains(&Some(idx)) {
            continue;
        }
        if infos.iter().any(|info| regex.is_match(&info.name)) {
            let reason = "earlier groups have every tensor that it matches: put it before them";
            return Err(group.refuse(reason.to_owned()));
        }
        let names: Vec<&str> = infos.iter().map(|info| info.name.as_str()).collect();
        let near = nearest(&group.pattern, &names).join("`, `");
        return Err(group.refuse(format!("it matches no trained tensor; the nearest are `{near}`")));
    }
    let rates = infos.iter().zip(&owners).map(|(info, owner)| {
        let usual = usual_decay(optimizer, info);
        let Some(group) = owner.map(|idx| &groups[idx]) else {
            return Ok(GroupRates { group: None, lr_scale: 1.0, weight_decay: usual });
        };
        let mut lr_scale = match group.lr {
            Some(own) if lr > 0.0 => own / lr,
            Some(_) => {
                let reason = "it has an `lr`, which follows a schedule whose own `lr` is above 0";
                return Err(group.refuse(reason.to_owned()));
            }
            None => group.lr_scale.unwrap_or(1.0),
        };
        if info.kind == ParamKind::LoraB {
            lr_scale *= group.lora_plus_ratio.unwrap_or(1.0);
        }
        let weight_decay = group.weight_decay.unwrap_or(usual);
        Ok(GroupRates { group: *owner, lr_scale, weight_decay })
    });
    rates.collect()
}

/// Names shown for a pattern that matches nothing.
const NEAREST_SHOWN: usize = 3;

/// The names that share most with a pattern, one of each kind of layer.
fn nearest<'a>(pattern: &str, names: &[&'a str]) -> Vec<&'a str> {
    let letters = |text: &str| -> Vec<char> {
        text.chars().filter(|c| c.is_alphabetic() || *c == '_').collect()
    };
    let wanted = letters(pattern);
    let pairs: Vec<&[char]> = wanted.windows(2).collect();
    let score = |name: &str| {
        let name = letters(name);
        pairs.iter().filter(|pair| name.windows(2).any(|other| other == **pair)).count()
    };
    let mut scored: Vec<(usize, &str)> = names.iter().map(|name| (score(name), *name)).collect();
    // Stable: of equal ones the first of the model.
    scored.sort_by_key(|(score, _)| std::cmp::Reverse(*score));
    let kind = |name: &str| -> String { name.chars().filter(|c| !c.is_ascii_digit()).collect() };
    let mut seen = Vec::new();
    scored.retain(|(_, name)| {
        let kind = kind(name);
        let is_new = !seen.contains(&kind);
        seen.push(kind);
        is_new
    });
    scored.into_iter().take(NEAREST_SHOWN).map(|(_, name)| name).collect()
}

//! Which modules an adapter changes, and with what rank: PEFT's rules for names and expressions.
//!
//! A list names modules in full or by the end of their names at a dot. A string is a regular
//! expression that must match the whole name, in Python's dialect as far as fancy-regex knows it
//! (look-around included). The keys of `rank_pattern` and `alpha_pattern` are expressions for the
//! end of a name at a dot; the first that matches counts.

use fancy_regex::Regex;

use super::{LoraConfig, bad};
use crate::{ModelConfig, ModelError};

/// What `target_modules` and `exclude_modules` hold.
#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    /// Names, or their ends at a dot: `q_proj`, `mlp.down_proj`.
    Names(Vec<String>),
    /// A regular expression for the whole name.
    Pattern(String),
    /// Every linear map of the layers, by whatever names the family has them
    /// ([`ModelConfig::linear_names`]); not the head. A fresh adapter has those names in its place,
    /// as PEFT writes them.
    AllLinear,
}

impl From<Vec<String>> for Targets {
    /// The names, or `all-linear` where that is one of them.
    fn from(names: Vec<String>) -> Self {
        match names.iter().any(|name| name == "all-linear") {
            true => Targets::AllLinear,
            false => Targets::Names(names),
        }
    }
}

impl Targets {
    /// Whether nothing is named.
    pub fn is_empty(&self) -> bool {
        match self {
            Targets::Names(names) => names.is_empty(),
            Targets::Pattern(pattern) => pattern.is_empty(),
            Targets::AllLinear => false,
        }
    }

    /// Whether the module of that full name is meant.
    pub(crate) fn matches(&self, module: &str) -> bool {
        match self {
            Targets::Names(names) => names.iter().any(|name| ends_with(module, name)),
            Targets::Pattern(pattern) => whole(pattern, module),
            Targets::AllLinear => !matches!(module, "lm_head" | "model.embed_tokens"),
        }
    }

    /// The same with the names of `model`'s linear maps in place of `all-linear`.
    pub(super) fn named(self, model: &ModelConfig) -> Self {
        match self {
            Targets::AllLinear => {
                let names = model.linear_names();
                Targets::Names(names.into_iter().map(str::to_owned).collect())
            }
            other => other,
        }
    }

    /// Refuses an expression that is none.
    pub(crate) fn check(&self, key: &str) -> Result<(), ModelError> {
        match self {
            Targets::Pattern(pattern) => check_pattern(key, pattern),
            _ => Ok(()),
        }
    }
}

/// Whether `module` is `name`, or ends with it after a dot.
fn ends_with(module: &str, name: &str) -> bool {
    let rest = module.strip_suffix(name);
    rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Whether the expression matches the whole text.
fn whole(pattern: &str, text: &str) -> bool {
    is_match(&format!(r"\A(?:{pattern})\z"), text)
}

/// Whether the expression matches somewhere. What cannot be compiled, or gives up, matches nothing:
/// [`LoraConfig::check`] has refused it.
fn is_match(pattern: &str, text: &str) -> bool {
    Regex::new(pattern).is_ok_and(|regex| regex.is_match(text).unwrap_or(false))
}

/// Refuses an expression that cannot be compiled.
pub(super) fn check_pattern(key: &str, pattern: &str) -> Result<(), ModelError> {
    match Regex::new(pattern) {
        Ok(_) => Ok(()),
        Err(error) => {
            Err(bad(format!("`{key}` holds `{pattern}`, which is no regular expression: {error}")))
        }
    }
}

/// Whether a key of `rank_pattern` or `alpha_pattern` is about that module.
pub(super) fn pattern_matches(pattern: &str, module: &str) -> bool {
    whole(&format!(r"(?:.*\.)?(?:{pattern})"), module)
}

/// Whether a name in `modules_to_save` is that module, or one around it.
pub(super) fn is_saved(name: &str, module: &str) -> bool {
    is_match(&format!(r"\A(?:.*\.)?(?:{name})(?:\z|\.)"), module)
}

/// The number of the layer that a module lies in: the first number in its name after one of
/// `patterns`, or after any other part.
fn layer_of(module: &str, patterns: &[String]) -> Option<usize> {
    let parts: Vec<&str> = module.split('.').collect();
    let number = |i: usize| parts.get(i).and_then(|part| part.parse().ok());
    if patterns.is_empty() {
        return (2..parts.len() - 1).find_map(number);
    }
    let first = |pattern: &String| {
        let regex = Regex::new(&format!(r"\A(?:.*?\.)?(?:{pattern})\.(\d+)\.")).ok()?;
        regex.captures(module).ok()??.get(1)?.as_str().parse().ok()
    };
    patterns.iter().find_map(first)
}

impl LoraConfig {
    /// Whether the module of that full name gets an adapter.
    pub fn targets(&self, module: &str) -> bool {
        let is_excluded = self.exclude_modules.as_ref().is_some_and(|out| out.matches(module));
        if is_excluded || self.saves(module) || !self.target_modules.matches(module) {
            return false;
        }
        // As in PEFT, an expression says itself which layers it means.
        match (&self.layers_to_transform, &self.target_modules) {
            (Some(layers), Targets::Names(_) | Targets::AllLinear) => {
                let layer = layer_of(module, &self.layers_pattern);
                layer.is_some_and(|layer| layers.contains(&layer))
            }
            _ => true,
        }
    }

    /// Whether the module of that full name is trained whole and saved with the adapter.
    pub fn saves(&self, module: &str) -> bool {
        self.modules_to_save.iter().any(|name| is_saved(name, module))
    }

    /// The rank of a module's adapter.
    pub fn rank_of(&self, module: &str) -> usize {
        let found = self.rank_pattern.iter().find(|(key, _)| pattern_matches(key, module));
        found.map_or(self.r, |&(_, r)| r)
    }

    /// s, the factor on a module's B A.
    pub fn scaling_of(&self, module: &str) -> f32 {
        let found = self.alpha_pattern.iter().find(|(key, _)| pattern_matches(key, module));
        let alpha = found.map_or(self.lora_alpha, |&(_, alpha)| alpha);
        let r = self.rank_of(module) as f64;
        (alpha / if self.use_rslora { r.sqrt() } else { r }) as f32
    }
}

/// Up to three of `names` that look most like `wanted`, for a message.
pub(super) fn nearest(wanted: &str, names: impl Iterator<Item = String>) -> String {
    let mut candidates: Vec<String> = Vec::new();
    for name in names {
        let last = name.rsplit('.').next().unwrap_or(&name).to_owned();
        if !candidates.contains(&last) {
            candidates.push(last);
        }
    }
    let wanted = wanted.rsplit('.').next().unwrap_or(wanted);
    candidates.sort_by_key(|name| distance(wanted, name));
    candidates.truncate(3);
    candidates.join(", ")
}

/// Letters to change, add or drop between two words (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, y) in b.chars().enumerate() {
            let change = corner + usize::from(x != y);
            corner = row[j + 1];
            row[j + 1] = change.min(corner + 1).min(row[j] + 1);
        }
    }
    *row.last().expect("a row has at least its first column")
}

#[cfg(test)]
mod tests {
    use super::*;

    const Q0: &str = "model.layers.0.self_attn.q_proj";
    const UP11: &str = "model.layers.11.mlp.up_proj";

    fn config(targets: Targets) -> LoraConfig {
        LoraConfig { target_modules: targets, ..LoraConfig::all_linear(4, 8.0) }
    }

    fn names(names: &[&str]) -> Targets {
        Targets::Names(names.iter().map(|&name| name.to_owned()).collect())
    }

    #[test]
    fn names_match_whole_parts() {
        let config = config(names(&["proj", "mlp.up_proj", "q_proj"]));
        assert!(config.targets(Q0) && config.targets(UP11));
        assert!(!config.targets("model.layers.0.self_attn.k_proj"));
    }

    /// Each row is what Python's `re.fullmatch` and PEFT say.
    #[test]
    fn expressions_match_whole_names() {
        for (pattern, q0, up11) in [
            (r".*q_proj", true, false),
            (r"q_proj", false, false),
            (r".*\.(q|up)_proj", true, true),
            (r".*layers\.(0|1|2)\..*", true, false),
            (r"^(?!.*mlp).*_proj$", true, false),
            (r"model\.layers\.\d+\.(self_attn|mlp)\.\w+", true, true),
            (r"a|.*q_proj", true, false),
        ] {
            let config = config(Targets::Pattern(pattern.to_owned()));
            assert_eq!((config.targets(Q0), config.targets(UP11)), (q0, up11), "{pattern}");
        }
    }

    #[test]
    fn layers_and_exclusions() {
        let mut config = config(Targets::AllLinear);
        assert!(config.targets(Q0) && config.targets(UP11) && !config.targets("lm_head"));
        config.layers_to_transform = Some(vec![11]);
        assert!(!config.targets(Q0) && config.targets(UP11));
        config.layers_pattern = vec!["h".to_owned(), "layers".to_owned()];
        assert!(!config.targets(Q0) && config.targets(UP11));
        config.layers_pattern = vec!["h".to_owned()];
        assert!(!config.targets(UP11));
        config.layers_to_transform = None;
        config.exclude_modules = Some(names(&["up_proj"]));
        assert!(config.targets(Q0) && !config.targets(UP11));
        config.exclude_modules = Some(Targets::Pattern(r".*\.0\..*".to_owned()));
        assert!(!config.targets(Q0) && config.targets(UP11));
        config.modules_to_save = vec!["mlp".to_owned()];
        assert!(!config.targets(UP11) && config.saves(UP11));
    }

    #[test]
    fn patterns_give_ranks_and_factors() {
        let mut config = config(Targets::AllLinear);
        config.rank_pattern = vec![
            ("up_proj".to_owned(), 2),
            (r"layers\.0\.self_attn\..*".to_owned(), 16),
            ("q_proj".to_owned(), 1),
        ];
        config.alpha_pattern = vec![("self_attn.q_proj".to_owned(), 32.0)];
        assert_eq!((config.rank_of(Q0), config.rank_of(UP11)), (16, 2));
        assert_eq!(config.rank_of("model.layers.3.self_attn.q_proj"), 1);
        assert_eq!(config.rank_of("model.layers.3.self_attn.xq_proj"), 4);
        assert_eq!((config.scaling_of(Q0), config.scaling_of(UP11)), (2.0, 4.0));
        config.use_rslora = true;
        assert_eq!(config.scaling_of(Q0), 8.0);
    }

    #[test]
    fn nearest_names_are_found() {
        let names = || [Q0, UP11, "lm_head"].map(str::to_owned).into_iter();
        assert!(nearest("up_porj", names()).starts_with("up_proj"));
        assert!(nearest("self_attn.qproj", names()).starts_with("q_proj"));
    }
}

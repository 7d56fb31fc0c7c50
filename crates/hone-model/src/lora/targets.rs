//! Which modules an adapter changes, and with what rank: PEFT's rules for names and expressions.
//!
//! A list names modules in full or by the end of their names at a dot. A string is a regular
//! expression that must match the whole name, in Python's dialect as far as fancy-regex knows it
//! (look-around included). The keys of `rank_pattern` and `alpha_pattern` are expressions for the
//! end of a name at a dot; the first that matches counts. `modules_to_save` holds plain ends of
//! names, wherever they begin: `norm` is every norm of the model.
//!
//! An expression can take too long and be given up. [`LoraConfig::check_expressions`] tries each on
//! every name of a model, so that what is asked for afterwards has an answer.

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
            Targets::Pattern(pattern) => is_match(&whole(pattern), module),
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
}

/// Whether `module` is `name`, or ends with it after a dot.
pub(super) fn ends_with(module: &str, name: &str) -> bool {
    let rest = module.strip_suffix(name);
    rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The expression for a whole name.
fn whole(pattern: &str) -> String {
    format!(r"\A(?:{pattern})\z")
}

/// The expression for the end of a name at a dot: a key of `rank_pattern` or `alpha_pattern`.
fn end(pattern: &str) -> String {
    whole(&format!(r"(?:.*\.)?(?:{pattern})"))
}

/// The expression for a name with the number of its layer.
fn numbered(pattern: &str) -> String {
    format!(r"\A(?:.*?\.)?(?:{pattern})\.(\d+)\.")
}

/// Whether the expression matches somewhere. What cannot be compiled, or gives up, matches nothing:
/// [`LoraConfig::check_expressions`] has refused it.
fn is_match(pattern: &str, text: &str) -> bool {
    Regex::new(pattern).is_ok_and(|regex| regex.is_match(text).unwrap_or(false))
}

/// Whether a key of `rank_pattern` or `alpha_pattern` is about one of those modules.
pub(super) fn means_one_of(pattern: &str, modules: &[String]) -> bool {
    let regex = Regex::new(&end(pattern));
    regex.is_ok_and(|regex| modules.iter().any(|m| regex.is_match(m).unwrap_or(false)))
}

/// The module itself, and the ones around it.
fn around(module: &str) -> impl Iterator<Item = &str> {
    let outer = module.match_indices('.').map(|(at, _)| &module[..at]);
    outer.chain(std::iter::once(module))
}

/// Whether a name in `modules_to_save` is that of the module, or of one around it: as in PEFT the
/// end of its name, which need not begin at a dot.
pub(super) fn is_saved(name: &str, module: &str) -> bool {
    around(module).any(|part| part.ends_with(name))
}

/// Whether a name in `modules_to_save` takes a module from those that get an adapter: here, as in
/// PEFT, it must begin at a dot.
fn is_taken(name: &str, module: &str) -> bool {
    around(module).any(|part| ends_with(part, name))
}

/// The number of the layer that a module lies in: the first number in its name after one of
/// `patterns`, or after any other part.
pub(super) fn layer_of(module: &str, patterns: &[String]) -> Option<usize> {
    let parts: Vec<&str> = module.split('.').collect();
    let number = |i: usize| parts.get(i).and_then(|part| part.parse().ok());
    if patterns.is_empty() {
        return (2..parts.len() - 1).find_map(number);
    }
    let first = |pattern: &String| {
        let regex = Regex::new(&numbered(pattern)).ok()?;
        regex.captures(module).ok()??.get(1)?.as_str().parse().ok()
    };
    patterns.iter().find_map(first)
}

/// Refuses an expression that is none, or that gives up on one of those names, when it is put as
/// `put` puts it.
fn try_on(
    names: &[String],
    key: &str,
    text: &str,
    put: fn(&str) -> String,
) -> Result<(), ModelError> {
    // By itself too: what is put around it must not be what makes it one.
    let regex = Regex::new(text).and_then(|_| Regex::new(&put(text)));
    let regex = regex.map_err(|error| {
        bad(format!("`{key}` holds `{text}`, which is no regular expression: {error}"))
    })?;
    for name in names {
        // With what it captures: looking for a match alone may take another way.
        if let Err(error) = regex.captures(name) {
            let what = format!("`{key}` holds `{text}`, an expression that gives up on `{name}`");
            let what = format!("{what} ({error}): write it without repetitions of repetitions");
            return Err(ModelError::Adapter(what));
        }
    }
    Ok(())
}

impl LoraConfig {
    /// Whether the module of that full name gets an adapter.
    pub fn targets(&self, module: &str) -> bool {
        let is_excluded = self.exclude_modules.as_ref().is_some_and(|out| out.matches(module));
        let is_taken = || self.modules_to_save.iter().any(|name| is_taken(name, module));
        if is_excluded || is_taken() || !self.target_modules.matches(module) {
            return false;
        }
        // As in PEFT, an expression says itself which layers it means, and so does a name in full.
        match (&self.layers_to_transform, &self.target_modules) {
            (Some(_), Targets::Names(names)) if names.iter().any(|name| name == module) => true,
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

    /// Tries every expression of the settings on those names.
    ///
    /// # Errors
    /// Names the key and the expression: it is none, or it gives up.
    pub(super) fn check_expressions(&self, names: &[String]) -> Result<(), ModelError> {
        let pattern = |targets: &Targets| match targets {
            Targets::Pattern(pattern) => Some(pattern.clone()),
            _ => None,
        };
        let targets = pattern(&self.target_modules);
        targets.iter().try_for_each(|text| try_on(names, "target_modules", text, whole))?;
        let excluded = self.exclude_modules.as_ref().and_then(pattern);
        excluded.iter().try_for_each(|text| try_on(names, "exclude_modules", text, whole))?;
        let mut ranks = self.rank_pattern.iter();
        ranks.try_for_each(|(text, _)| try_on(names, "rank_pattern", text, end))?;
        let mut alphas = self.alpha_pattern.iter();
        alphas.try_for_each(|(text, _)| try_on(names, "alpha_pattern", text, end))?;
        let mut layers = self.layers_pattern.iter();
        layers.try_for_each(|text| try_on(names, "layers_pattern", text, numbered))
    }

    /// The rank of a module's adapter.
    pub fn rank_of(&self, module: &str) -> usize {
        let found = self.rank_pattern.iter().find(|(key, _)| is_match(&end(key), module));
        found.map_or(self.r, |&(_, r)| r)
    }

    /// s, the factor on a module's B A.
    pub fn scaling_of(&self, module: &str) -> f32 {
        let found = self.alpha_pattern.iter().find(|(key, _)| is_match(&end(key), module));
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
    // The last word of a name, or of an expression.
    let is_between = |c: char| !c.is_alphanumeric() && c != '_';
    let wanted = wanted.rsplit(is_between).find(|word| !word.is_empty()).unwrap_or(wanted);
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

    /// A name in full is meant in whatever layer it lies, or in none.
    #[test]
    fn full_names_are_in_every_layer() {
        let mut config = config(names(&["v_proj", Q0, "lm_head", "embed_tokens"]));
        config.layers_to_transform = Some(vec![11]);
        assert!(config.targets(Q0) && config.targets("lm_head"));
        assert!(config.targets("model.layers.11.self_attn.v_proj"));
        assert!(!config.targets("model.layers.0.self_attn.v_proj"));
        assert!(!config.targets("model.embed_tokens"));
    }

    /// Each row is what `key.endswith(name)` says of the module or of one around it.
    #[test]
    fn saved_names_are_plain_ends() {
        for (name, module, is_saved) in [
            ("norm", "model.norm", true),
            ("norm", "model.layers.0.input_layernorm", true),
            ("norm", "model.layers.0.self_attn.q_norm", true),
            ("model.norm", "model.norm", true),
            ("model.norm", "model.layers.0.input_layernorm", false),
            ("head", "lm_head", true),
            ("lm_.*", "lm_head", false),
            ("lm_hea", "lm_head", false),
            ("model.lm_head", "lm_head", false),
            ("0.mlp", "model.layers.10.mlp.up_proj", true),
            ("layers.0.mlp", "model.layers.10.mlp.up_proj", false),
        ] {
            let modules_to_save = vec![name.to_owned()];
            let config = LoraConfig { modules_to_save, ..LoraConfig::all_linear(4, 8.0) };
            assert_eq!(config.saves(module), is_saved, "{name} of {module}");
        }
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
        assert!(nearest("lm_h.*", names()).starts_with("lm_head"));
    }
}

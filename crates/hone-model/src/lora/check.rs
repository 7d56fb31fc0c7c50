//! Whether settings mean something in a model: every name and expression is about a module, and
//! what they ask for together is computed.

use super::targets::{self, Targets};
use super::{EMBED, HEAD, InitMethod, LoraConfig, base_tensors, modules, places};
use crate::{ModelConfig, ModelError};

fn refuse<T>(what: impl Into<String>) -> Result<T, ModelError> {
    Err(ModelError::Adapter(what.into()))
}

/// Refuses a name or an expression that is about no module.
fn refuse_stranger(key: &str, what: &str, names: &[String]) -> Result<(), ModelError> {
    let near = targets::nearest(what, names.iter().cloned());
    refuse(format!("`{what}` in `{key}` names no module of the model; near it are {near}"))
}

/// Whether the module is one outside the layers.
fn is_end(module: &str) -> bool {
    [EMBED, HEAD].contains(&module)
}

/// Names of all modules that hold a tensor.
fn holders(model: &ModelConfig) -> Vec<String> {
    let name = |name: String| name.rsplit_once('.').map(|(module, _)| module.to_owned());
    base_tensors(model).into_iter().filter_map(|entry| name(entry.name)).collect()
}

impl LoraConfig {
    /// Checks settings for a new adapter: that every name, expression and number in them means
    /// something in `model`, and that what they ask for together is computed.
    pub fn check_against(&self, model: &ModelConfig) -> Result<(), ModelError> {
        self.check()?;
        self.check_layers(model)?;
        self.check_fits(model)?;
        // Where PEFT only warns. Its own files may be about more than the part that is this model.
        if let Some(excluded) = &self.exclude_modules {
            check_targets("exclude_modules", excluded, model)?;
        }
        Ok(())
    }

    /// [`LoraConfig::check_against`] for an adapter that there is: what PEFT takes is not refused
    /// for meaning nothing.
    pub(super) fn check_fits(&self, model: &ModelConfig) -> Result<(), ModelError> {
        self.check()?;
        let names: Vec<String> = places(model).map(|place| place.name).collect();
        let holders = holders(model);
        // First: what gives up on a name gives no answer below.
        self.check_expressions(&[names.as_slice(), &holders].concat())?;
        check_targets("target_modules", &self.target_modules, model)?;
        let targeted: Vec<String> = names.iter().filter(|n| self.targets(n)).cloned().collect();
        if targeted.is_empty() {
            return refuse("its targets, less what is excluded, name no linear map of the model");
        }
        let ranks = self.rank_pattern.iter().map(|(key, _)| ("rank_pattern", key));
        let alphas = self.alpha_pattern.iter().map(|(key, _)| ("alpha_pattern", key));
        for (key, pattern) in ranks.chain(alphas) {
            if !targets::means_one_of(pattern, &targeted) {
                return refuse_stranger(key, pattern, &names);
            }
        }
        for name in &self.modules_to_save {
            if !holders.iter().any(|module| targets::is_saved(name, module)) {
                // Not the linear maps of the layers, which would be refused next.
                let is_savable = |holder: &&String| !names.contains(holder) || is_end(holder);
                let savable: Vec<String> = holders.iter().filter(is_savable).cloned().collect();
                return refuse_stranger("modules_to_save", name, &savable);
            }
        }
        self.check_kinds(model)?;
        self.check_rows(model)
    }

    /// Refuses layers that the model does not have.
    fn check_layers(&self, model: &ModelConfig) -> Result<(), ModelError> {
        let n = model.num_hidden_layers;
        let wanted = self.layers_to_transform.iter().flatten();
        if let Some(layer) = wanted.clone().find(|&&layer| layer >= n) {
            let what =
                format!("`layers_to_transform` names layer {layer}; the model has {n}, from");
            return refuse(format!("{what} 0 to {}", n - 1));
        }
        let names: Vec<String> = modules(model).map(|(name, _)| name).collect();
        let is_found = |name: &String| targets::layer_of(name, &self.layers_pattern).is_some();
        self.check_expressions(&names)?;
        if !self.layers_pattern.is_empty() && !names.iter().any(is_found) {
            let patterns = self.layers_pattern.join("`, `");
            let what = format!("`{patterns}` in `layers_pattern` names no list of layers; that of");
            return refuse(format!("{what} the model is `layers`"));
        }
        Ok(())
    }

    /// Refuses combinations of targets and modules trained whole that are not computed.
    fn check_kinds(&self, model: &ModelConfig) -> Result<(), ModelError> {
        let ends = [EMBED, HEAD];
        let is_target = |module: &&&str| self.targets(module);
        if self.use_dora && ends.iter().any(|module| self.targets(module)) {
            return refuse(
                "`use_dora` is for the linear maps of the layers: exclude lm_head and embed_tokens",
            );
        }
        let saves = |module: &str| {
            let name = self.modules_to_save.iter().find(|name| targets::is_saved(name, module))?;
            Some((name, module.to_owned()))
        };
        if let Some((name, module)) = modules(model).find_map(|(module, _)| saves(&module)) {
            let what = format!("`{name}` in `modules_to_save` names `{module}`, which is a linear");
            let can = "lm_head, embed_tokens and norms can be saved";
            return refuse(format!("{what} map of a layer; it can have an adapter, and {can}"));
        }
        // PEFT lets a name take its module from the targets only when it begins at a dot.
        if let Some((name, module)) = ends.iter().filter(is_target).find_map(|m| saves(m)) {
            let what = format!("`{module}` is one of `target_modules`, and `{name}` in");
            let what = format!("{what} `modules_to_save` trains it whole: leave it out of one");
            return refuse(what);
        }
        if self.init == InitMethod::Pissa && self.targets(EMBED) {
            return refuse(
                "the embedding has no part in PiSSA, which splits linear maps: exclude \
                 embed_tokens, or choose another `lora_init`",
            );
        }
        if self.init == InitMethod::Pissa && model.tie_word_embeddings && self.targets(HEAD) {
            return refuse(
                "PiSSA takes a part out of the weights below it, and a tied head's are the \
                 embedding: exclude lm_head, or choose another `lora_init`",
            );
        }
        Ok(())
    }

    /// Refuses rows of tokens that cannot be trained by themselves.
    fn check_rows(&self, model: &ModelConfig) -> Result<(), ModelError> {
        for (module, ids) in [EMBED, HEAD].map(|module| (module, self.token_ids(module))) {
            if ids.is_empty() {
                continue;
            }
            if let Some(id) = ids.iter().find(|&&id| id as usize >= model.vocab_size) {
                let what = format!("token {id} in `trainable_token_indices` lies outside the");
                return refuse(format!("{what} vocabulary of {}", model.vocab_size));
            }
            if self.saves(module) || self.targets(module) {
                return refuse(
                    "`trainable_token_indices` is for modules that are not trained otherwise",
                );
            }
        }
        if model.tie_word_embeddings && !self.trainable_tokens.lm_head.is_empty() {
            return refuse("the head is tied: train its tokens as those of embed_tokens");
        }
        let tied_rows = model.tie_word_embeddings && !self.trainable_tokens.is_empty();
        if tied_rows && (self.targets(HEAD) || self.saves(HEAD)) {
            return refuse("rows of a tied head cannot be trained beside an adapter of the head");
        }
        Ok(())
    }
}

/// Refuses a name, or an expression, that is about no module that could have an adapter.
fn check_targets(key: &str, targets: &Targets, model: &ModelConfig) -> Result<(), ModelError> {
    let names: Vec<String> = places(model).map(|place| place.name).collect();
    match targets {
        Targets::AllLinear => Ok(()),
        Targets::Names(targets) => {
            let is_stranger =
                |target: &&String| !names.iter().any(|name| targets::ends_with(name, target));
            let stranger = targets.iter().find(is_stranger);
            stranger.map_or(Ok(()), |target| refuse_stranger(key, target, &names))
        }
        Targets::Pattern(_) if names.iter().any(|name| targets.matches(name)) => Ok(()),
        Targets::Pattern(pattern) => {
            // The end of a name, meant as one of a list.
            if names.iter().any(|name| targets::ends_with(name, pattern)) {
                let what =
                    format!("`{key}` = \"{pattern}\" is a text, and so an expression for the");
                let what = format!("{what} whole name of a module, which no module has; for the");
                return refuse(format!("{what} ends of names give a list: [\"{pattern}\"]"));
            }
            refuse_stranger(key, pattern, &names)
        }
    }
}

//! What the `[train]` table says of adapters, and of the 4-bit weights below them.

use hone_cli::Failure;
use hone_model::{
    BiasMode, CodeBook, InitMethod, LoraConfig, QuantSpec, Targets, TokenRows, ValueType,
};
use serde::{Deserialize, Serialize};

use super::choices::{Bias, Init, LoraInit, Method, QuantType};
use super::config::TrainConfig;

/// Modules of the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a list of names, or an expression in quotes, is expected")]
pub(crate) enum Modules {
    /// By the end of their names.
    Names(Vec<String>),
    /// All whose whole name an expression matches.
    Pattern(String),
}

impl Default for Modules {
    fn default() -> Self {
        Modules::Names(Vec::new())
    }
}

impl Modules {
    /// Whether none is named.
    pub(crate) fn is_empty(&self) -> bool {
        *self == Modules::default()
    }

    /// As the engine has them, where `all-linear` stands for these names.
    fn targets(&self, all_linear: &[&str]) -> Targets {
        let own =
            |names: &[&str]| -> Vec<String> { names.iter().map(|&name| name.into()).collect() };
        match self {
            Modules::Pattern(pattern) => Targets::Pattern(pattern.clone()),
            Modules::Names(names) => {
                // What stands beside `all-linear`, the head for example, is meant too.
                let (all, rest): (Vec<_>, Vec<_>) =
                    names.iter().cloned().partition(|name| name == "all-linear");
                match all.is_empty() {
                    true => Targets::Names(rest),
                    false if all_linear.is_empty() => Targets::AllLinear,
                    false => Targets::Names([own(all_linear), rest].concat()),
                }
            }
        }
    }
}

/// A token of the vocabulary.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a token is its id, or its text in quotes")]
pub(crate) enum Token {
    /// By its id.
    Id(u32),
    /// As it is written.
    Text(String),
}

/// Tokens whose rows are trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "a list of tokens, or a table with `embed_tokens` and `lm_head`, is expected"
)]
pub(crate) enum TokenLists {
    /// Of the embedding, and of a head that is a matrix of its own.
    Both(Vec<Token>),
    /// Of each.
    Each(EachTokens),
}

/// Tokens of the embedding and of the head.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct EachTokens {
    embed_tokens: Vec<Token>,
    lm_head: Vec<Token>,
}

impl Default for TokenLists {
    fn default() -> Self {
        TokenLists::Both(Vec::new())
    }
}

impl TokenLists {
    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        *self == TokenLists::default()
    }

    /// Their ids. `id_of` looks a text up; `is_tied` says that the head is the embedding.
    ///
    /// # Errors
    /// A text that is no token.
    pub(crate) fn rows(
        &self,
        is_tied: bool,
        id_of: impl Fn(&str) -> Option<u32>,
    ) -> Result<TokenRows, Failure> {
        let id = |token: &Token| match token {
            Token::Id(id) => Ok(*id),
            Token::Text(text) => id_of(text).ok_or_else(|| no_token(text)),
        };
        let ids = |tokens: &[Token]| tokens.iter().map(id).collect::<Result<Vec<u32>, _>>();
        match self {
            TokenLists::Both(tokens) => {
                let embed_tokens = ids(tokens)?;
                let lm_head = if is_tied { Vec::new() } else { embed_tokens.clone() };
                Ok(TokenRows { embed_tokens, lm_head })
            }
            TokenLists::Each(EachTokens { embed_tokens, lm_head }) => {
                Ok(TokenRows { embed_tokens: ids(embed_tokens)?, lm_head: ids(lm_head)? })
            }
        }
    }
}

fn no_token(text: &str) -> Failure {
    let message = format!("[train] `trainable_tokens` names {text:?}, which is no token");
    Failure::usage(message).hint(
        "`hone-fetch tokens` makes a base with new tokens, and rows of the embedding for them",
    )
}

impl TrainConfig {
    /// The adapter's settings, where `all-linear` stands for these names, and these rows are trained by themselves.
    pub(crate) fn lora(&self, all_linear: &[&str], trainable_tokens: TokenRows) -> LoraConfig {
        let excluded = &self.exclude_modules;
        let layers = &self.layers_to_transform;
        LoraConfig {
            r: self.rank,
            lora_alpha: self.alpha.unwrap_or(2.0 * self.rank as f64),
            lora_dropout: self.dropout,
            target_modules: self.target_modules.targets(all_linear),
            exclude_modules: (!excluded.is_empty()).then(|| excluded.targets(all_linear)),
            layers_to_transform: (!layers.is_empty()).then(|| layers.clone()),
            layers_pattern: self.layers_pattern.clone(),
            rank_pattern: self.rank_pattern.clone().into_iter().collect(),
            alpha_pattern: self.alpha_pattern.clone().into_iter().collect(),
            use_rslora: self.rslora,
            use_dora: self.dora,
            bias: match self.bias {
                Bias::None => BiasMode::None,
                Bias::All => BiasMode::All,
                Bias::LoraOnly => BiasMode::LoraOnly,
            },
            modules_to_save: self.modules_to_save.clone(),
            trainable_tokens,
            init: match self.lora_init {
                LoraInit::Default => InitMethod::Default,
                LoraInit::Gaussian => InitMethod::Gaussian,
                LoraInit::Pissa => InitMethod::Pissa,
                LoraInit::Loftq => InitMethod::Loftq,
            },
            base_model_name_or_path: None,
        }
    }

    /// How the base's linear maps are to be quantised, if they are; `values` is the type that they have in their files.
    pub(crate) fn quant(&self, values: ValueType) -> Option<QuantSpec> {
        let book = match self.quant_type? {
            QuantType::Nf4 => CodeBook::Nf4,
            QuantType::Fp4 => CodeBook::Fp4,
        };
        Some(QuantSpec { book, nested: self.double_quant?, ..QuantSpec::qlora(values) })
    }

    /// Refuses keys that another method, or another start, has.
    ///
    /// # Errors
    /// Names the key and what it needs.
    pub(crate) fn check_method(&self) -> Result<(), Failure> {
        let needs =
            |key: &str, other: &str| Err(Failure::usage(format!("[train] {key} needs `{other}`")));
        if self.method != Method::Qlora {
            let given = [
                ("`quant_type`", self.quant_type.is_some()),
                ("`double_quant`", self.double_quant.is_some()),
                ("`lora_init` = \"loftq\"", self.lora_init == LoraInit::Loftq),
            ];
            if let Some((key, _)) = given.into_iter().find(|(_, given)| *given) {
                return needs(key, "method = \"qlora\"");
            }
        }
        if !self.method.has_adapter() {
            let given = [
                ("`adapter_init`", self.adapter_init.is_some()),
                ("`dora`", self.dora),
                ("`bias`", self.bias != Bias::None),
                ("`lora_init`", self.lora_init != LoraInit::Default),
                ("`modules_to_save`", !self.modules_to_save.is_empty()),
                ("`trainable_tokens`", !self.trainable_tokens.is_empty()),
            ];
            let given = given.into_iter().find(|(_, given)| *given);
            return given.map_or(Ok(()), |(key, _)| needs(key, "method = \"lora\""));
        }
        let given = [
            ("`init` = \"random\"", self.init == Init::Random),
            ("`reinit_tokens`", !self.reinit_tokens.is_empty()),
            ("`freeze`", !self.freeze.is_empty()),
        ];
        if let Some((key, _)) = given.into_iter().find(|(_, given)| *given) {
            return needs(key, "method = \"full\"");
        }
        if self.lora_init != LoraInit::Default && self.adapter_init.is_some() {
            let message = "[train] `lora_init` is of a fresh adapter, and `adapter_init` names one";
            return Err(Failure::usage(message).hint("leave one of them out"));
        }
        if self.lora_init == LoraInit::Pissa && self.method == Method::Qlora {
            let message = "[train] `lora_init` = \"pissa\" takes its part out of the base before \
                           that is cut to 4 bits: the adapter would fit no base that there is";
            return Err(
                Failure::usage(message).hint("use `lora_init = \"loftq\"`, or `method = \"lora\"`")
            );
        }
        Ok(())
    }
}

//! What a run starts from: the tensors that are trained, an adapter to go on from, the decoder.
//!
//! | file | holds |
//! |---|---|
//! | `base` | the base model, stored in 4 bits or quantised on the way |
//! | `earlier` | an adapter to go on from |

mod base;
mod earlier;

use std::collections::BTreeSet;

use hone_cli::Failure;
use hone_kernels::Backend;
use hone_learn::matching;
use hone_model::{
    Adapter, Decoder, InitMethod, LoraConfig, Merge, Method as Trains, ModelConfig, ModelError,
    ParamInfo, QuantSpec, TensorSource, TokenRows, Training, check_frozen, trained_params,
};
use hone_schema::{ArtefactKind, InputRef};
use hone_store::Sealed;
use hone_tokens::Vocab;

use crate::args::{Init, Method, Objective, TrainPlan, refused};
use crate::epochs::Packs;
use crate::training::failure;

use base::TOKENIZER;

pub(crate) use base::Base;

/// What a run reads, open and checked; of the weights only where they lie.
pub(crate) struct Inputs {
    pub(crate) packs: Sealed,
    pub(crate) base: Base,
    /// Rows of the embedding and of the head that are trained by themselves.
    tokens: TokenRows,
    pub(crate) start: Start,
}

impl Inputs {
    /// Opens them.
    ///
    /// # Errors
    /// One is missing, changed since it was sealed, or does not fit the settings.
    pub(crate) fn open(plan: &TrainPlan) -> Result<Self, Failure> {
        let packs = Sealed::open(&plan.packs, ArtefactKind::Packs)?;
        let base = Base::open(plan).map_err(|failure| plan.at(failure))?;
        let size = base.model.vocab_size;
        let ids = &plan.config.reinit_tokens;
        if let Some(id) = ids.iter().find(|id| **id as usize >= size) {
            let message =
                format!("[train] `reinit_tokens` names {id}, the vocabulary has {size} tokens");
            return Err(Failure::usage(message));
        }
        if plan.config.init == Init::Base {
            fits(&packs, &base, plan)?;
        }
        let tokens = tokens(plan, &packs, &base.model).map_err(|failure| plan.at(failure))?;
        let start = Start::new(plan, &base, &tokens).map_err(|failure| plan.at(failure))?;
        Ok(Inputs { packs, base, tokens, start })
    }

    /// What another plan on these inputs starts from.
    ///
    /// # Errors
    /// Its settings do not fit the model.
    pub(crate) fn start_of(&self, other: &TrainPlan) -> Result<Start, Failure> {
        self.base.check(other)?;
        Start::new(other, &self.base, &self.tokens)
    }

    /// Ids of `trainable_tokens` that no pack has: their rows of the embedding stay what they are.
    pub(crate) fn unseen_tokens(&self, packs: &Packs) -> Result<Vec<u32>, Failure> {
        let TokenRows { embed_tokens, lm_head } = &self.tokens;
        let mut ids: BTreeSet<u32> = embed_tokens.iter().chain(lm_head).copied().collect();
        for idx in 0..packs.len() as u64 {
            if ids.is_empty() {
                break;
            }
            packs.batch(&[idx])?.input_ids.iter().for_each(|id| {
                ids.remove(id);
            });
        }
        Ok(ids.into_iter().collect())
    }

    /// What the run's key is made of.
    pub(crate) fn refs(&self, plan: &TrainPlan) -> Result<Vec<InputRef>, Failure> {
        let mut refs = vec![self.packs.input("packs"), self.base.input(plan)?];
        if let Some(dir) = &plan.config.adapter_init {
            refs.push(earlier::input_of(dir)?);
        }
        Ok(refs)
    }

    /// The packs to train on, of which one at least has a trained token, and those held out.
    pub(crate) fn splits(&self, plan: &TrainPlan) -> Result<(Packs, Packs), Failure> {
        let causal = plan.config.objective == Objective::Causal;
        let train = Packs::read(&self.packs, "train", causal)?;
        let eval = Packs::read(&self.packs, "eval", causal)?;
        train.need_trained(&self.packs)?;
        Ok((train, eval))
    }
}

/// Refuses packs whose ids mean other tokens than the base's own tokenizer has.
fn fits(packs: &Sealed, base: &Base, plan: &TrainPlan) -> Result<(), Failure> {
    let Some(own) = base.tokenizer()? else { return Ok(()) };
    let theirs = packs.read(TOKENIZER)?;
    if own == theirs {
        return Ok(());
    }
    let at = [plan.base.join(TOKENIZER), packs.path(TOKENIZER)];
    let vocab = |bytes: &[u8], at: &std::path::Path| {
        Vocab::from_json(bytes).map_err(|e| Failure::input(format!("{}: {e}", at.display())))
    };
    let (own, theirs) = (vocab(&own, &at[0])?, vocab(&theirs, &at[1])?);
    let shown = |token: Option<String>| token.map_or("no token".to_owned(), |t| format!("{t:?}"));
    for id in 0..own.size().max(theirs.size()) as u32 {
        let (one, other) = (own.token(id), theirs.token(id));
        if one != other {
            let message = format!(
                "{}: id {id} is {} there and {} in the base: the packs were made for another tokenizer",
                packs.dir().display(),
                shown(other),
                shown(one)
            );
            return Err(Failure::input(message).hint("run `hone-tokenize` again"));
        }
    }
    Ok(())
}

/// The ids of `trainable_tokens`, by the vocabulary that the packs were made with.
fn tokens(plan: &TrainPlan, packs: &Sealed, model: &ModelConfig) -> Result<TokenRows, Failure> {
    let wanted = &plan.config.trainable_tokens;
    if wanted.is_empty() {
        return Ok(TokenRows::default());
    }
    let vocab = Vocab::from_json(&packs.read(TOKENIZER)?)
        .map_err(|e| Failure::input(format!("{}: {e}", packs.path(TOKENIZER).display())))?;
    wanted.rows(model.tie_word_embeddings, |text| vocab.id_of(text))
}

/// What a run starts from, checked before anything large is read.
pub(crate) struct Start {
    /// The adapter's settings, with `all-linear` spelt out.
    pub(crate) lora: LoraConfig,
    /// How the linear maps below it are quantised.
    quant: Option<QuantSpec>,
    /// What is trained.
    pub(crate) trained: Vec<ParamInfo>,
    /// Names of the tensors that full fine-tuning leaves as they are.
    frozen: BTreeSet<String>,
}

/// A decoder with what is trained on it.
pub(crate) struct Loaded<B: Backend> {
    pub(crate) decoder: Decoder<B>,
    /// The adapter as it started, where a part of the base went into it (PiSSA): what is saved is the difference.
    pub(crate) taken: Option<Adapter>,
}

impl Start {
    /// Finds what `plan` trains of a base.
    ///
    /// # Errors
    /// A pattern of `freeze` or of a group that matches nothing; an adapter to go on from that is not the one of the settings.
    fn new(plan: &TrainPlan, base: &Base, tokens: &TokenRows) -> Result<Self, Failure> {
        let model = &base.model;
        let lora = plan.lora(model, tokens);
        if plan.config.method.has_adapter() {
            lora.check_against(model).map_err(|e| refused(&e))?;
        }
        let quant = base.quant(plan);
        let mut trained = trained_params(model, trains(plan, quant, &lora));
        let names: Vec<&str> = trained.iter().map(|info| info.name.as_str()).collect();
        let matched = matching("`freeze`", &plan.config.freeze, &names).map_err(failure)?;
        let mut matched = matched.into_iter();
        let mut frozen = BTreeSet::new();
        trained.retain(|info| {
            let is_frozen = matched.next().unwrap_or_default();
            if is_frozen {
                frozen.insert(info.name.clone());
            }
            !is_frozen
        });
        check_frozen(model, &|name| frozen.contains(name))
            .map_err(|e| Failure::usage(format!("[train] `freeze`: {e}")))?;
        if trained.is_empty() && !frozen.is_empty() {
            return Err(Failure::usage("[train] `freeze` leaves nothing to train"));
        }
        let lr = plan.config.lr.unwrap_or_default();
        plan.recipe().check_groups(lr, &trained).map_err(failure)?;
        if let Some(dir) = &plan.config.adapter_init {
            earlier::fits(&earlier::config(dir)?, &lora, model, (dir, plan))?;
        }
        Ok(Start { lora, quant, trained, frozen })
    }

    /// What is trained, as a memory plan has it.
    pub(crate) fn trains(&self, plan: &TrainPlan) -> Trains<'_> {
        trains(plan, self.quant, &self.lora)
    }

    /// Reads the weights, and puts on them what is trained. `backend` gets the arithmetic of the run.
    pub(crate) fn load<B: Backend>(
        &self,
        backend: B,
        plan: &TrainPlan,
        base: &Base,
    ) -> Result<Loaded<B>, Failure> {
        let backend = plan.on(backend);
        let mut loaded = base.with_tensors(plan, |tensors| match plan.config.method {
            Method::Full => {
                let decoder = Decoder::load(backend, &base.model, tensors, Training::Full);
                let mut decoder = decoder.map_err(|e| base.refused(e))?;
                if !self.frozen.is_empty() {
                    let is_frozen = |name: &str| self.frozen.contains(name);
                    decoder.freeze(&is_frozen).map_err(|e| base.refused(e))?;
                }
                Ok(Loaded { decoder, taken: None })
            }
            Method::Lora | Method::Qlora => self.adapted(backend, plan, base, tensors),
        })?;
        loaded.decoder.set_recompute(plan.config.recompute.level());
        Ok(loaded)
    }

    fn adapted<B: Backend>(
        &self,
        backend: B,
        plan: &TrainPlan,
        base: &Base,
        tensors: &dyn TensorSource,
    ) -> Result<Loaded<B>, Failure> {
        let refused = |e: ModelError| base.refused(e);
        let model = &base.model;
        let adapter = match &plan.config.adapter_init {
            None => {
                Adapter::init_from(model, self.lora.clone(), tensors, plan.seed).map_err(refused)?
            }
            Some(dir) => earlier::adapter(dir, &self.lora, model)?,
        };
        let load = |tensors: &dyn TensorSource| {
            Decoder::load(backend, model, tensors, Training::Frozen).map_err(refused)
        };
        let takes = self.lora.init == InitMethod::Pissa;
        let mut decoder = match takes {
            true => load(&Merge::residual(model, tensors, &adapter).map_err(refused)?)?,
            false => load(tensors)?,
        };
        decoder.attach(&adapter, true).map_err(refused)?;
        Ok(Loaded { decoder, taken: takes.then_some(adapter) })
    }

    /// The adapter that a decoder has learned, for the base as it is stored.
    pub(crate) fn learned<B: Backend>(
        &self,
        model: &ModelConfig,
        decoder: &Decoder<B>,
        taken: Option<&Adapter>,
    ) -> Result<Adapter, Failure> {
        let adapter = Adapter { config: self.lora.clone(), tensors: decoder.trained() };
        match taken {
            None => Ok(adapter),
            Some(taken) => {
                adapter.to_plain(model, taken).map_err(|e| Failure::input(e.to_string()))
            }
        }
    }
}

/// What is trained, as the engine has it.
fn trains<'a>(plan: &TrainPlan, quant: Option<QuantSpec>, lora: &'a LoraConfig) -> Trains<'a> {
    match quant {
        _ if !plan.config.method.has_adapter() => Trains::Full,
        None => Trains::Lora(lora),
        Some(quant) => Trains::Qlora(lora, quant),
    }
}

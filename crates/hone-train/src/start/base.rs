//! The base of a run: its shape, how its weights lie and how the decoder is to have them.

use hone_cli::Failure;
use hone_kernels::mapping;
use hone_model::{
    BnbConfig, BnbRegions, ModelConfig, QuantSpec, QuantizeOnLoad, TensorSource, ValueType,
    init_weights,
};
use hone_schema::InputRef;
use hone_store::{ModelDir, input};

use crate::args::{Init, Method, TrainPlan};

/// Longest `config.json` read.
const MODEL_BYTES_MAX: u64 = 1 << 20;

/// The tokenizer, and its longest file read: twice the largest known.
pub(super) const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_BYTES_MAX: u64 = 64 << 20;

/// Files of the base that a run from random weights depends on.
const SHAPE_FILES: [&str; 1] = ["config.json"];

/// A base model, open; of the weights only where they lie.
pub(crate) struct Base {
    dir: ModelDir,
    /// Its shape.
    pub(crate) model: ModelConfig,
    /// How its linear maps are stored, where that is in 4 bits.
    stored: Option<BnbConfig>,
}

impl Base {
    /// Opens the base that `plan` names.
    ///
    /// # Errors
    /// It is none, or its weights are stored in another way than the settings need them.
    pub(super) fn open(plan: &TrainPlan) -> Result<Self, Failure> {
        let dir = ModelDir::open(&plan.base)?;
        let text = String::from_utf8(dir.read("config.json", MODEL_BYTES_MAX)?).map_err(|_| {
            Failure::input(format!("{}: config.json is not UTF-8", plan.base.display()))
        })?;
        let (model, stored) = BnbConfig::read_model_config(&text)
            .map_err(|e| Failure::input(format!("{}: {e}", plan.base.display())))?;
        let base = Base { dir, model, stored };
        base.check(plan)?;
        Ok(base)
    }

    /// Refuses a way to train that the stored weights do not allow.
    pub(super) fn check(&self, plan: &TrainPlan) -> Result<(), Failure> {
        let Some(stored) = &self.stored else { return Ok(()) };
        let name = |spec: QuantSpec| {
            let book = spec.book.name();
            format!("quant_type = \"{book}\", double_quant = {}", spec.nested)
        };
        let wanted = plan.config.quant(ValueType::F32);
        match plan.config.method {
            Method::Full if plan.config.init == Init::Base => {
                let message = "[train] `method` is \"full\", and the base's weights lie in 4 bits";
                Err(Failure::usage(message)
                    .hint("train an adapter on them, `method = \"qlora\"`, or give another base"))
            }
            Method::Qlora if wanted.is_some_and(|spec| name(spec) != name(stored.spec)) => {
                let message = format!(
                    "[train] `quant_type`: the base lies in 4 bits already, with {}",
                    name(stored.spec)
                );
                Err(Failure::usage(message).hint("give those, or the base that it was made from"))
            }
            _ => Ok(()),
        }
    }

    /// How the linear maps are quantised in the run's decoder, if they are.
    pub(super) fn quant(&self, plan: &TrainPlan) -> Option<QuantSpec> {
        self.stored.as_ref().map(|stored| stored.spec).or_else(|| self.on_the_way(plan))
    }

    /// How they are quantised while they are read: what lies in 4 bits is taken as it is, and so is what was left out of that.
    fn on_the_way(&self, plan: &TrainPlan) -> Option<QuantSpec> {
        // Products are of f32 or of bf16: what the values were rounded to before does not matter.
        plan.config.quant(ValueType::F32).filter(|_| self.stored.is_none())
    }

    /// The base's own `tokenizer.json`, if it has one.
    pub(super) fn tokenizer(&self) -> Result<Option<Vec<u8>>, Failure> {
        Ok(self.dir.try_read(TOKENIZER, TOKENIZER_BYTES_MAX)?)
    }

    /// The base as an input of the stage.
    pub(super) fn input(&self, plan: &TrainPlan) -> Result<InputRef, Failure> {
        Ok(match plan.config.init {
            Init::Base => self.dir.input("base")?,
            Init::Random => self.dir.input_of("base", &SHAPE_FILES)?,
        })
    }

    /// Bytes that the weights come from, which are in memory until the decoder has its own.
    pub(crate) fn files(&self, plan: &TrainPlan) -> Result<u64, Failure> {
        if plan.config.init == Init::Random {
            return Ok((size_of::<f32>() * self.model.n_params()) as u64);
        }
        let dir = self.dir.dir();
        let weights = self.dir.names().iter().filter(|name| name.ends_with(".safetensors"));
        let bytes = weights.map(|name| input::len(&dir.join(name)));
        Ok(bytes.sum::<Result<u64, _>>()?)
    }

    /// Whether its files have the embedding in bf16.
    pub(crate) fn half_embedding(&self, plan: &TrainPlan) -> Result<bool, Failure> {
        if plan.config.init == Init::Random {
            return Ok(false);
        }
        self.with_tensors(plan, |source| Ok(source.is_bf16("model.embed_tokens.weight")))
    }

    /// A failure that comes of the base's files.
    pub(super) fn refused(&self, error: impl std::fmt::Display) -> Failure {
        Failure::input(format!("{}: {error}", self.dir.dir().display()))
    }

    /// Calls `work` with the tensors as the decoder is to have them: the files', quantised on the way where they are to be, or
    /// random ones.
    pub(super) fn with_tensors<T>(
        &self,
        plan: &TrainPlan,
        work: impl FnOnce(&dyn TensorSource) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        if plan.config.init == Init::Random {
            return work(&init_weights(&self.model, plan.seed));
        }
        let maps = self.dir.mapped_weights(mapping::map)?;
        let regions: Vec<&[u8]> = maps.iter().map(|(_, map)| map.as_ref()).collect();
        let source = BnbRegions::new(&regions).map_err(|e| {
            let names: Vec<&str> = maps.iter().map(|(name, _)| name.as_str()).collect();
            let (at, names) = (self.dir.dir().display(), names.join(", "));
            Failure::input(format!("{at}/{names}: {e}"))
                .hint("fetch or copy the model again; the file is not whole, or another kind")
        })?;
        match self.on_the_way(plan) {
            Some(spec) => {
                let quant = BnbConfig { spec, skip_modules: Vec::new() };
                work(&QuantizeOnLoad::new(&self.model, &source, &quant))
            }
            None => work(&source),
        }
    }
}

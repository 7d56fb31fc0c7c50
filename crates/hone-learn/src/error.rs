//! Why learning cannot go on.

/// What can go wrong in a step or in the settings of a run.
#[derive(Debug, thiserror::Error)]
pub enum LearnError {
    /// The model refused a batch or a state.
    #[error(transparent)]
    Model(#[from] hone_model::ModelError),
    /// A setting is out of range.
    #[error("`{key}` = {value} is not {expected}")]
    Setting {
        /// The setting.
        key: &'static str,
        /// Its value.
        value: String,
        /// What it has to be.
        expected: &'static str,
    },
    /// A pattern of names cannot be used.
    #[error("{setting} = {pattern:?}: {reason}")]
    Pattern {
        /// The setting that it stands in.
        setting: &'static str,
        /// The pattern.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Nothing is trained.
    #[error("the model has no trained parameter: train all weights or attach a trained adapter")]
    NothingTrained,
    /// The sum of loss weights of a step is zero.
    #[error("step {step} has no trained token: the sum of its loss weights is {weight}")]
    NoTarget {
        /// The step.
        step: u64,
        /// Its sum of weights.
        weight: f64,
    },
    /// The loss or a gradient is NaN or infinite; the parameters are as they were before the step.
    #[error("step {step}: the {what} is {value}; lower the rate or look at the step's rows")]
    NotFinite {
        /// The step.
        step: u64,
        /// `loss` or `gradient norm`.
        what: &'static str,
        /// Its value.
        value: f64,
    },
    /// The state of another run.
    #[error("this state does not belong to this run: {0}")]
    State(String),
}

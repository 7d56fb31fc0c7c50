//! How a model learns: the objective's normaliser, update rules, parameter groups, learning-rate
//! schedules, clipping, averages of weights, the state of a run, the self-test.
//!
//! A step is: sum the loss weights of all its micro-batches, [`Learner::accumulate`] each with that
//! sum as the normaliser, then [`Learner::apply`]. The loss of a step is sum(w CE) / sum(w) over
//! the whole step, however it is cut. Nothing here opens a file or draws a random number that is
//! not a function of a seed and a counter.
//!
//! | file | holds |
//! |---|---|
//! | `learner` | [`Learner`]: accumulate, apply, evaluate |
//! | `recipe` | [`Recipe`]: all that decides how it learns, but the rate |
//! | `optimizer`, `rule`, `muon` | [`OptimizerConfig`]: update rules, their states and steps |
//! | `groups` | [`GroupConfig`]: rates and decays of tensors by pattern |
//! | `schedule` | [`ScheduleConfig`] |
//! | `state` | a run's state as tensors and JSON, for exact resume |
//! | `selftest` | [`SelfTest`]: who got a gradient and who must not |
//! | `order` | the order of rows in an epoch |

mod error;
mod groups;
mod learner;
mod muon;
mod named;
#[cfg(test)]
mod optim_tests;
mod optimizer;
mod order;
mod recipe;
mod rule;
mod schedule;
mod selftest;
mod state;

pub use error::LearnError;
pub use groups::{GroupConfig, GroupRates, matching};
pub use learner::{Evaluation, Learner, StepReport, evaluate};
pub use optimizer::{
    AdafactorConfig, AdamW8bitConfig, AdamWConfig, LionConfig, MuonConfig, MuonScale,
    OptimizerConfig, SgdConfig,
};
pub use order::shuffle;
pub use recipe::{LossConfig, Recipe};
pub use schedule::{
    Convention, CosineRestarts, Decay, InverseSqrt, Polynomial, ScheduleConfig, ScheduleKind,
    Warmup, Wsd,
};
pub use selftest::{SelfTest, SelfTestRow};

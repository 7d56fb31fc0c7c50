//! How a model learns: the objective's normaliser, AdamW, learning-rate schedules, clipping, the
//! state of a run, the self-test.
//!
//! A step is: sum the loss weights of all its micro-batches, [`Learner::accumulate`] each with that
//! sum as the normaliser, then [`Learner::apply`]. The loss of a step is sum(w CE) / sum(w) over
//! the whole step, however it is cut. Nothing here opens a file or draws a random number that is
//! not a function of a seed and a counter.
//!
//! | file | holds |
//! |---|---|
//! | `learner` | [`Learner`]: accumulate, apply, evaluate |
//! | `optimizer`, `schedule` | [`OptimizerConfig`], [`ScheduleConfig`] |
//! | `state` | a run's state as tensors and JSON, for exact resume |
//! | `selftest` | [`SelfTest`]: who got a gradient and who must not |
//! | `order` | the order of rows in an epoch |

mod error;
mod learner;
mod optimizer;
mod order;
mod schedule;
mod selftest;
mod state;

pub use error::LearnError;
pub use learner::{Evaluation, Learner, StepReport, evaluate};
pub use optimizer::OptimizerConfig;
pub use order::shuffle;
pub use schedule::{ScheduleConfig, ScheduleKind, Warmup};
pub use selftest::{SelfTest, SelfTestRow};

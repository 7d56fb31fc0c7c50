//! The numeric operators of hone.
//!
//! [`Backend`] names every operator of a decoder, with its formula. [`Cpu`] is the fast
//! implementation, [`struct@Reference`] its plain twin; a test runs both on one table of cases. Alone of
//! all crates this one may hold `unsafe` code.

mod backend;
mod compute;
pub mod conformance;
mod cpu;
pub mod gpu;
pub mod mapping;
mod place;
pub mod quant;
pub mod reference;
pub mod rng;
mod shape;
#[cfg(test)]
mod tests;
mod update;

pub use backend::*;
pub use compute::Compute;
pub use cpu::{Cpu, CpuBuf, CpuFrozen};
pub use place::{OnBackend, Place, PlaceError};
pub use reference::Reference;
pub use update::*;

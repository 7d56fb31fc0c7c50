//! Tests of the model as a whole, in one binary so that it is linked once.

mod adapters;
mod candle_llama;
mod common;
mod families;
mod files;
mod finite_differences;
mod identities;
mod memory;
mod objective;
mod quant;
